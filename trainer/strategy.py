"""How a prepared model takes its steps: one process, or plain data parallelism (DDP); `zero.py` is the other way.

The loop owns the accumulation boundary: gradients are summed over micro-batches and averaged over ranks on the last
one, with no division by the number of micro-batches.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer import averaging
from trainer.freezing import HeldStill, owners
from trainer.losses import LossModule
from trainer.optim import matches, parameter_names
from trainer.shards import Tensors

_HOW_IT_IS_COMPUTED = ("fused", "foreach", "capturable", "differentiable", "is_held")
"""Settings of a parameter group that belong to the machine, not to the run."""


class Strategy:
    """Run backward passes and optimizer steps of a prepared model, and hand over its state by parameter name."""

    is_sharded = False
    """Whether each rank holds, and saves, a part of weights and optimizer state."""

    name = "DDP"

    def __init__(
        self,
        accelerator: Accelerator,
        module: LossModule,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
    ) -> None:
        """Prepare the module and its optimizer; call once.

        Args:
            accelerator: What Accelerate knows of the launch.
            module: The model with its loss, as built.
            optimizer: Over the module's own parameters.
            max_grad_norm: Gradients are scaled to at most this global L2 norm; None leaves them.
        """
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.own_module = module
        self.optimizer = optimizer
        """The torch optimizer: its groups' settings act under every strategy."""
        self.group_names = parameter_names(optimizer, module)
        """The parameters of each group by name, in the optimizer's order."""
        self.built_settings = group_settings(optimizer)
        """The settings of each group as it was built, whatever is loaded or scheduled later."""
        self._max_grad_norm = max_grad_norm
        self._has_averages_in = False
        self._held = HeldStill(optimizer, [list(group["params"]) for group in optimizer.param_groups])
        self.module: Any = self._prepare()

    def _prepare(self) -> Any:
        self._parameters = [p for p in self.own_module.parameters() if p.requires_grad]
        module, self._stepper = self.accelerator.prepare(self.own_module, self.optimizer)
        is_fused = all(group.get("fused") for group in self.optimizer.param_groups)
        self._leaves_out_by_itself = is_fused and self.accelerator.scaler is None
        return module

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradient."""
        self.accelerator.backward(loss)

    @contextlib.contextmanager
    def accumulation(self, is_last: bool) -> Iterator[None]:
        """Wrap a micro-batch's forward and backward; gradients cross ranks in the last one only."""
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self.module):
            yield

    def step(self) -> Tensor | float:
        """Clip, update, drop the gradients; return their global L2 norm.

        Where it is not finite the update is left out, on every rank alike: all have the same gradients. A fused
        optimizer decides that on the device, and nothing waits for it: the norm is then a tensor.
        """
        self.accelerator.unscale_gradients()
        limit = math.inf if self._max_grad_norm is None else self._max_grad_norm
        norm: Tensor | float = nn.utils.clip_grad_norm_(self._parameters, limit)
        if self._leaves_out_by_itself:
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        else:
            norm = float(norm)
            # fp16's loss scaler leaves a bad update out by itself, and has to learn of it.
            if math.isfinite(norm) or self.accelerator.scaler is not None:
                self._stepper.step()
        self._stepper.zero_grad()
        return norm

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have the module in evaluation mode within the block, with averaged weights where the run keeps averages."""
        self.module.eval()
        self._put_averages(True)
        yield  # an error on one rank must not let it wait here for the others
        self.back_to_training()

    def back_to_training(self) -> None:
        """End an evaluation; also within its block, which is then left to save the trained weights."""
        self._put_averages(False)
        self.module.train()

    def _put_averages(self, are_in: bool) -> None:
        if are_in != self._has_averages_in and any(averaging.averaged(self.optimizer)):
            averaging.swap(self.optimizer)
            self._publish_weights()
            self._has_averages_in = are_in

    def _publish_weights(self) -> None:
        """Bring what the optimizer steps into what the model computes with; here they are the same tensors."""

    def hold_still(self, patterns: Sequence[str]) -> None:
        """Hold the parameters of these patterns still from here on, and no others; tell the model where it asks."""
        self._held.hold(self._groups_of(patterns))
        tell = getattr(self.own_module.model, "hold_still", None)
        if callable(tell):
            tell(lambda name: matches(name, patterns))

    def hold_all(self) -> None:
        """Let steps compute their norm and change nothing."""
        self._held.hold(range(len(self.group_names)))

    def start_anew(self, patterns: Sequence[str], seed: int, where: str) -> None:
        """Draw the parameters of these patterns anew, the same on every rank, and forget their moments.

        Raises:
            ConfigError: a module cannot draw its parameters alone.
        """
        chosen = self._groups_of(patterns)
        names = [name for name, _ in self.own_module.named_parameters() if matches(name, patterns)]
        modules = owners(self.own_module, names, where)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for module in modules:
                with self.gathered(list(module.parameters(recurse=False))), torch.no_grad():
                    module.reset_parameters()  # type: ignore[operator]
        self._forget(chosen)

    def _groups_of(self, patterns: Sequence[str]) -> list[int]:
        return [
            index
            for index, names in enumerate(self.group_names)
            if names and all(matches(name, patterns) for name in names)
        ]

    def _forget(self, groups: Iterable[int]) -> None:
        for index in groups:
            for parameter in self.optimizer.param_groups[index]["params"]:
                self.optimizer.state.pop(parameter, None)

    @contextlib.contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Have whole parameters within the block, where each rank holds a part of them."""
        yield

    def num_parameters(self, *, trained: bool = False) -> int:
        """Return the number of weights, or of those that train."""
        return sum(p.numel() for p in self.own_module.parameters() if p.requires_grad or not trained)

    def shared_state(self) -> dict[str, Any]:
        """Return what rank 0 saves for all: the groups' settings, and the state that is not sharded."""
        return {
            "groups": group_settings(self.optimizer),
            "group_names": self.group_names,
            "optimizer": self._optimizer_state(),
            "aliases": _aliases(self.own_module.model),
            "gradient_scaler": None
            if self.accelerator.scaler is None
            else self.accelerator.scaler.state_dict(),
            **self._loss_state(),
        }

    def _loss_state(self) -> dict[str, Any]:
        loss = self.own_module.loss
        if not isinstance(loss, nn.Module):
            return {}
        return {"loss": self._held_whole(loss), "loss_aliases": _aliases(loss)}

    def _optimizer_state(self) -> dict[str, Any] | None:
        names = {
            id(parameter): name
            for group, members in zip(self.optimizer.param_groups, self.group_names, strict=True)
            for parameter, name in zip(group["params"], members, strict=True)
        }
        return {names[id(parameter)]: dict(state) for parameter, state in self.optimizer.state.items()}

    def weights(self) -> dict[str, Tensor]:
        """Return the entries of the model's state dict that rank 0 saves, by the model's own names."""
        return self._held_whole(self.own_module.model)

    def _held_whole(self, part: nn.Module) -> dict[str, Any]:
        """Return the entries of the state dict of the model, or of the loss, that are not sharded."""
        return dict(part.state_dict())

    def shard(self) -> dict[str, Any] | None:
        """Return this rank's part of weights and optimizer state, or None where nothing is sharded."""
        return None

    def load(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Take the weights and the optimizer's state of a checkpoint, whatever strategy and world size saved it.

        Names and shapes have been compared before.
        """
        self.own_module.model.load_state_dict(tensors.model_weights())
        self._load_loss(tensors)
        own = {name: index for index, name in enumerate(n for names in self.group_names for n in names)}
        settings, first = [], 0
        for group, names in zip(state["groups"], self.group_names, strict=True):
            settings.append({**group, "params": list(range(first, first + len(names)))})
            first += len(names)
        states = {own[name]: tensors.optimizer_state(name) for name in own}
        machine = [
            {key: group[key] for key in _HOW_IT_IS_COMPUTED if key in group}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(
            {"state": {index: held for index, held in states.items() if held}, "param_groups": settings}
        )
        for group, kept in zip(self.optimizer.param_groups, machine, strict=True):
            group.update(kept)
        if self.accelerator.scaler is not None and state["gradient_scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["gradient_scaler"])

    def _load_loss(self, tensors: Tensors) -> None:
        loss = self.own_module.loss
        if isinstance(loss, nn.Module):
            held = {name: tensors.loss_entry(name) for name in self._held_whole(loss)}
            loss.load_state_dict(held, strict=False)  # what is sharded is taken in stretches


def _aliases(part: nn.Module) -> dict[str, str]:
    """Return the further names of tied weights of the model, or of the loss, by its own names."""
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in part.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            aliases[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return aliases


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return each group's settings without its parameters."""
    leave_out = ("params", *_HOW_IT_IS_COMPUTED)
    return [
        {key: value for key, value in group.items() if key not in leave_out}
        for group in optimizer.param_groups
    ]
