"""Muon for weight matrices and Adam for everything else, as one optimizer with two learning rates.

Muon (Jordan et al. 2024) steps a matrix along its momentum with all singular values brought to about 1. What is no map
between hidden states has no use for that: tables that are looked up, heads, biases and norms go to Adam.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from trainer.errors import ConfigError

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration whose slope at 0 is steepest; singular values end between 0.7 and 1.2."""


class MuonAndAdam(torch.optim.Optimizer):
    """Step the groups marked `use_muon` with Muon, and all others with Adam; weight decay is decoupled in both."""

    def __init__(self, parameters: Iterable[dict[str, Any]], defaults: dict[str, Any]) -> None:
        """Take the groups; `muon_and_adam` makes them and says what the settings are.

        Raises:
            ConfigError: a group marked `use_muon` holds something else than matrices.
        """
        super().__init__(parameters, defaults)
        for group in self.param_groups:
            shapes = [getattr(parameter, "ds_shape", parameter.shape) for parameter in group["params"]]
            wrong = next((list(shape) for shape in shapes if len(shape) != 2), None)
            if group["use_muon"] and wrong is not None:
                raise ConfigError(
                    f"optimizer: group '{group.get('name', 'muon')}' has use_muon and holds a parameter of shape "
                    f"{wrong}; Muon steps matrices alone, so let the group match weight matrices only"
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._step_muon if group["use_muon"] else self._step_adam)(group, parameters)
        return loss

    def _step_muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        for shape, members in by_shape.items():
            if len(shape) != 2:
                raise ValueError(f"Muon steps whole matrices, and this is a tensor of shape {list(shape)}")
            updates = []
            for parameter in members:
                assert parameter.grad is not None
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                updates.append(parameter.grad.lerp(momentum, group["momentum"]))
            # With more outputs than inputs the step grows, so that each output changes as much as in a square matrix.
            rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, update in zip(members, orthogonalised(torch.stack(updates)), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-rate)

    def _step_adam(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"], state["exp_avg_sq"] = (
                    torch.zeros_like(parameter),
                    torch.zeros_like(parameter),
                )
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalised(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """Bring the singular values of matrices [K, M, N] to about 1; in bf16 on a GPU, where precision is no matter."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def muon_and_adam(
    parameters: Sequence[Any],
    *,
    model: nn.Module,
    muon_lr: float = 0.02,
    adam_lr: float = 3e-4,
    weight_decay: float = 0.01,
    adam_weight_decay: float = 0.0,
    momentum: float = 0.95,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-8,
    adam: Sequence[str] = (r"(^|[._])head\.",),
) -> MuonAndAdam:
    """Sort the parameters into the groups `muon` and `adam`; `trainer.muon.muon_and_adam` in a config.

    Muon gets every matrix that is no embedding table and no bias and whose name no pattern of `adam` is found in. With
    `optimizer.groups` nothing is sorted: groups whose args say `use_muon: true` go to Muon, all others to Adam.

    Args:
        parameters: that train, or groups of them.
        model: whose names and modules tell which parameters are for Muon.
        muon_lr: learning rate of the groups for Muon; a step moves a matrix by about this spectral norm.
        adam_lr: learning rate of the other groups.
        weight_decay: of the groups for Muon.
        adam_weight_decay: of the other groups.
        momentum: share of Muon's momentum that one step keeps.
        betas: the same of Adam's two averages.
        eps: Adam's.
        adam: regular expressions on names of matrices that go to Adam all the same: heads.

    Raises:
        ConfigError: nothing is left for Muon.
    """
    if parameters and isinstance(parameters[0], dict):
        groups = [{**group, "use_muon": bool(group.get("use_muon"))} for group in parameters]
        advice = "mark a group of optimizer.groups with args: {use_muon: true}"
    else:
        kept = {id(parameter) for parameter in parameters}
        chosen = {id(p) for p in _matrices(model, adam)} & kept
        groups = [
            {"params": [p for p in parameters if (id(p) in chosen) == use_muon], "use_muon": use_muon}
            for use_muon in (True, False)
        ]
        groups = [
            {**group, "name": "muon" if group["use_muon"] else "adam"} for group in groups if group["params"]
        ]
        advice = f"{type(model).__name__} has none that is no embedding, and that `adam` does not match"
    if not any(group["use_muon"] for group in groups):
        raise ConfigError(
            f"optimizer.optimizer_class: no weight matrix is left for Muon; {advice}; or use torch.optim.AdamW"
        )
    of_kind: dict[bool, dict[str, Any]] = {
        True: {"lr": muon_lr, "weight_decay": weight_decay, "momentum": momentum},
        False: {"lr": adam_lr, "weight_decay": adam_weight_decay, "betas": tuple(betas), "eps": eps},
    }
    return MuonAndAdam([{**of_kind[group["use_muon"]], **group} for group in groups], {"use_muon": False})


def _matrices(model: nn.Module, adam: Sequence[str]) -> list[Tensor]:
    found = []
    for prefix, module in model.named_modules():
        for own, parameter in module.named_parameters(prefix, recurse=False):
            is_matrix = len(getattr(parameter, "ds_shape", parameter.shape)) == 2 and not own.endswith("bias")
            is_table = isinstance(module, nn.Embedding) or any(re.search(pattern, own) for pattern in adam)
            if is_matrix and not is_table:
                found.append(parameter)
    return found
