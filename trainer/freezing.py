"""Parameters that a phase holds still or starts anew, under every strategy.

ZeRO flattens each parameter group into one tensor, whose parts it cannot step apart. So parameters that the same phases
freeze and start anew get a group of their own, and whole groups are held still: the gradients of their parameters are
zeroed where they arise (they must not enter the norm that clipping goes by), and the optimizer finds no gradient in
them, so that neither moments nor decay nor update touch them.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.schema import PhaseConfig
from trainer.errors import ConfigError
from trainer.optim import matches


def split_groups(optimizer: torch.optim.Optimizer, trained: nn.Module, phases: Sequence[PhaseConfig]) -> None:
    """Split the optimizer's groups so that each holds parameters which the same phases freeze and start anew.

    The parts keep the group's settings and name; `part_of` of every group is the index of the one it comes from.
    """
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    running = [phase for phase in phases if phase.epochs > 0]

    def treatment(parameter: Tensor) -> tuple[Any, ...]:
        name = names[id(parameter)]
        return tuple((matches(name, p.freeze), matches(name, p.reinitialise)) for p in running)

    groups: list[dict[str, Any]] = []
    for index, group in enumerate(optimizer.param_groups):
        parts: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter in group["params"]:
            parts.setdefault(treatment(parameter), []).append(parameter)
        group["part_of"] = index
        if len(parts) == 1:
            groups.append(group)
        else:
            groups += [{**group, "params": members} for members in parts.values()]
    optimizer.param_groups = groups


class HeldStill:
    """Hold groups of parameters still, from one `hold` to the next."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, group_parameters: Sequence[Sequence[Tensor]]
    ) -> None:
        """Take the optimizer and the model's own parameters in each of its groups."""
        self._optimizer = optimizer
        self._parameters = group_parameters
        self._hooks: list[Any] = []
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        optimizer.register_step_pre_hook(self._hide_gradients)
        optimizer.register_step_post_hook(self._show_gradients)

    def hold(self, groups: Iterable[int]) -> None:
        """Hold these groups still, by their indices, and let the others go."""
        for hook in self._hooks:
            hook.remove()
        held = set(groups)
        for index, group in enumerate(self._optimizer.param_groups):
            group["is_held"] = index in held
        self._hooks = [
            parameter.register_hook(torch.zeros_like)
            for index in held
            for parameter in self._parameters[index]
        ]

    def _hide_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group.get("is_held"):
                for parameter in group["params"]:
                    self._gradients.append((parameter, parameter.grad))
                    parameter.grad = None

    def _show_gradients(self, *_: Any) -> None:
        # With offloading the gradient is a buffer that is written again in the next step.
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._gradients.clear()


def owners(module: nn.Module, names: Iterable[str], where: str) -> list[nn.Module]:
    """Return the modules that hold these parameters and can start them anew by `reset_parameters()`.

    Raises:
        ConfigError: a module has no `reset_parameters`, or holds further parameters that would start anew with them.
    """
    wanted = set(names)
    found: list[nn.Module] = []
    for name in sorted(wanted):
        path = name.rpartition(".")[0]
        owner = module.get_submodule(path)
        if any(owner is other for other in found):
            continue
        if not callable(getattr(owner, "reset_parameters", None)):
            raise ConfigError(
                f"{where}: {name} belongs to a {type(owner).__name__}, which has no method reset_parameters() that "
                "draws its initial values"
            )
        siblings = {f"{path}.{own}" if path else own for own, _ in owner.named_parameters()}
        if not siblings <= wanted:
            raise ConfigError(
                f"{where}: reset_parameters() of {type(owner).__name__} would also start "
                f"{', '.join(sorted(siblings - wanted)[:4])} anew; let the pattern match all of the module's parameters"
            )
        found.append(owner)
    return found
