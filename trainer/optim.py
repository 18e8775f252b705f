"""Build the run's one optimizer and, where configured, its scheduler."""

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from trainer.config.schema import OptimizerConfig, RunConfig
from trainer.dotted import resolve
from trainer.errors import ConfigError
from trainer.schedule import BUILT_RATE

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
"""Optimizers of torch that step all their parameters in a few kernels where they are told to."""


def build_optimizer(
    config: RunConfig, model: nn.Module, trained: nn.Module, device_type: str = "cpu"
) -> torch.optim.Optimizer:
    """Build the optimizer over every parameter that trains in any phase, each in exactly one group.

    A `torch.optim.Optimizer` subclass gets the parameters (or the groups of `optimizer.groups`) and
    `optimizer_args`; any other callable the same, and `model` where it names it. `trained` holds the model and a
    loss with parameters of its own. For a GPU (`device_type` cuda), torch's own take their fused form unless
    `optimizer_args` choose.

    Raises:
        ConfigError: a parameter is in no group or in two, a group matches nothing, or the factory returns
            something else than an optimizer.
    """
    settings = config.optimizer
    names = {own_name(name): p for name, p in trained.named_parameters() if p.requires_grad}
    if not names:
        raise ConfigError(
            "the model has no parameter that trains in any phase; check model_class and datasets.N.freeze"
        )
    factory: Any = resolve(settings.optimizer_class, "optimizer.optimizer_class")
    arguments = dict(settings.optimizer_args)
    if _names_model(factory):
        arguments["model"] = model
    if device_type == "cuda" and factory in _FUSED and not {"fused", "foreach"} & arguments.keys():
        arguments["fused"] = True
    optimizer = factory(_parameter_groups(settings, names), **arguments)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"optimizer.optimizer_class: {settings.optimizer_class} returned a {type(optimizer).__name__}; "
            "it must return a torch.optim.Optimizer"
        )
    _check_coverage(optimizer, names)
    for group in optimizer.param_groups:
        # `initial_lr` is torch's, from which a scheduler of the user's begins: a phase's rate where one sets it.
        group[BUILT_RATE] = group.setdefault("initial_lr", group["lr"])
    return optimizer


class UserScheduler:
    """Drive the user's `scheduler_class`: one step for each optimizer step, whatever the number of processes.

    A phase that sets a learning rate starts it afresh from that rate; one that does not goes on with it.
    """

    def __init__(self, settings: OptimizerConfig, optimizer: torch.optim.Optimizer) -> None:
        """Build the scheduler on the optimizer's learning rates."""
        assert settings.scheduler_class is not None
        self._settings = settings
        self._optimizer = optimizer
        self._factory = resolve(settings.scheduler_class, "optimizer.scheduler_class")
        self._scheduler = self._build()
        if isinstance(self._scheduler, ReduceLROnPlateau):
            raise ConfigError(
                "optimizer.scheduler_class: ReduceLROnPlateau needs a metric at every step, which a scheduler stepped "
                "once an optimizer step does not get; use a phase's schedule, or a scheduler that counts steps"
            )

    def restart(self, rates: list[float]) -> None:
        """Begin again at its first step from these base learning rates, one for each parameter group."""
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = group["initial_lr"] = rate
        self._scheduler = self._build()

    def step(self) -> None:
        """Set the learning rates of the next optimizer step."""
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Return what the scheduler counts, without the optimizer and without functions."""
        return {key: value for key, value in self._scheduler.state_dict().items() if not callable(value)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state."""
        self._scheduler.load_state_dict(state)

    def _build(self) -> Any:
        # torch notes the optimizer's step counter when a scheduler is built, and warns about an order of calls that
        # does not apply here: the loop steps the optimizer first, always.
        try:
            return self._factory(self._optimizer, **self._settings.scheduler_args)
        except (TypeError, ValueError, IndexError) as error:
            groups = self._optimizer.param_groups
            names = [
                str(group.get("name", f"group {group.get('part_of', i)}")) for i, group in enumerate(groups)
            ]
            raise ConfigError(
                f"optimizer.scheduler_class: {self._settings.scheduler_class} cannot be built ({error}); it is given "
                f"the optimizer's {len(groups)} parameter groups: {', '.join(names)} (freeze and reinitialise of "
                "phases part a group)"
            ) from error


def parameter_names(optimizer: torch.optim.Optimizer, trained: nn.Module) -> list[list[str]]:
    """Return the names of the parameters in each group, in the optimizer's order."""
    names = {id(parameter): name for name, parameter in trained.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def mark_trainable(config: RunConfig, trained: nn.Module) -> None:
    """Turn gradients off for parameters that every phase freezes; the others stay with the optimizer throughout.

    Raises:
        ConfigError: a `freeze` or `reinitialise` pattern matches no parameter.
    """
    running = [phase for phase in config.datasets if phase.epochs > 0]
    for phase in running:
        for key, patterns in (("freeze", phase.freeze), ("reinitialise", phase.reinitialise)):
            for pattern in patterns:
                if not any(matches(name, [pattern]) for name, _ in trained.named_parameters()):
                    raise ConfigError(
                        f"datasets '{phase.name}': {key} pattern {pattern!r} matches no parameter of the model"
                    )
    for name, parameter in trained.named_parameters():
        if running and all(matches(name, phase.freeze) for phase in running):
            parameter.requires_grad_(False)


def own_name(name: str) -> str:
    """Return a parameter's name as its model knows it: `LossModule` holds the model under `model.`."""
    return name.removeprefix("model.")


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Tell whether one of the regular expressions is found in the name that a parameter's model knows it by."""
    return any(re.search(pattern, own_name(name)) for pattern in patterns)


def _names_model(factory: Any) -> bool:
    """Tell whether an optimizer factory, not a class, asks for the model by name."""
    return not inspect.isclass(factory) and "model" in inspect.signature(factory).parameters


def _parameter_groups(settings: OptimizerConfig, names: dict[str, nn.Parameter]) -> list[Any]:
    """Return the parameters in one group, or sorted into `optimizer.groups`; the first that matches takes one."""
    if not settings.groups:
        return list(names.values())
    members: dict[str, list[nn.Parameter]] = {group.name: [] for group in settings.groups}
    rest: list[nn.Parameter] = []
    for name, parameter in names.items():
        owner = next((g for g in settings.groups if any(re.search(p, name) for p in g.match)), None)
        (rest if owner is None else members[owner.name]).append(parameter)
    empty = [name for name, parameters in members.items() if not parameters]
    if empty:
        raise ConfigError(
            f"optimizer.groups: {', '.join(empty)} matches no parameter that is left for it; the first parameters are "
            f"{', '.join(list(names)[:6])}"
        )
    groups: list[Any] = [{"params": members[g.name], "name": g.name, **g.args} for g in settings.groups]
    return groups + ([{"params": rest, "name": "default"}] if rest else [])


def _check_coverage(optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter]) -> None:
    counts: dict[int, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    missing = [name for name, parameter in names.items() if id(parameter) not in counts]
    twice = [name for name, parameter in names.items() if counts.get(id(parameter), 0) > 1]
    foreign = counts.keys() - {id(parameter) for parameter in names.values()}
    problems = [f"in no group: {', '.join(missing[:8])}"] if missing else []
    problems += [f"in several groups: {', '.join(twice[:8])}"] if twice else []
    problems += [f"{len(foreign)} that the model does not train"] if foreign else []
    if problems:
        raise ConfigError(
            f"optimizer.optimizer_class: {type(optimizer).__name__} must hold every trained parameter exactly once; "
            + "; ".join(problems)
        )
