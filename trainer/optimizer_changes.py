"""Settings of the optimizer that a resume changes: those that differ from the checkpoint's configuration take effect.

A checkpoint holds the settings of each group as they were, which an optimizer may have moved by itself, so they are
loaded. What the configuration has changed since then is put over them, and what could not act there is refused.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from trainer.checkpoint_folder import SavedCheckpoint
from trainer.config.load import load_saved_config
from trainer.config.schema import OptimizerConfig, RunConfig
from trainer.errors import CheckpointError
from trainer.freezing import split_groups
from trainer.optim import build_optimizer, parameter_names
from trainer.run import Run
from trainer.schedule import BUILT_RATE
from trainer.strategy import Strategy, group_settings

_ABSENT = "not set"
_PHASE_RATES = ("lr", "muon_lr", "adam_lr", "group_lrs")
_NOT_SAID = ("initial_lr", BUILT_RATE, "part_of")
"""Settings that say nothing beside the others."""


class Change(NamedTuple):
    """What a setting of a parameter group was when the optimizer was built, and what it is now."""

    was: Any
    now: Any


Changes = list[dict[str, Change]]
"""By parameter group, by setting."""


def find_changes(run: Run, saved: SavedCheckpoint, config: RunConfig) -> Changes:
    """Compare the optimizer's configuration with the checkpoint's; the parameters in its groups are the same.

    Raises:
        CheckpointError: something has changed that could not take effect.
    """
    former = load_saved_config(saved.folder / "config.yaml")
    then, now = former.optimizer, config.optimizer
    if _dotted(then.optimizer_class) != _dotted(now.optimizer_class):
        raise CheckpointError(
            f"{saved.folder}: optimizer.optimizer_class was {then.optimizer_class} and is {now.optimizer_class}, which "
            "remembers other things of the steps before; set it back, or start a new run from the weights with "
            "init_from"
        )
    changes: Changes = [{} for _ in run.strategy.group_names]
    if _arguments(then) != _arguments(now):
        try:
            changes = _compare(run, config, then, now)
        except CheckpointError as error:
            raise CheckpointError(
                f"{saved.folder}: {error}; set it back, or start a new run from the weights with init_from"
            ) from error
    _check_scheduler(saved, former, config, changes)
    return changes


def put_in_force(changes: Changes, strategy: Strategy) -> list[str]:
    """Put what has changed over the settings that were loaded, and return what is to be said of it."""
    groups = strategy.optimizer.param_groups
    changed: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for index, (group, settings) in enumerate(zip(groups, changes, strict=True)):
        _put(group, settings)
        for key, (was, now) in settings.items():
            if key not in _NOT_SAID:
                changed[key, str(was), str(now)].append(str(group.get("name", index)))
    said = [
        f"{key} was {was} and is {now}" + (f" (group {', '.join(names)})" if len(names) < len(groups) else "")
        for (key, was, now), names in changed.items()
    ]
    return [f"the optimizer's settings have changed since the checkpoint: {'; '.join(said)}"] if said else []


def _put(group: dict[str, Any], changes: Mapping[str, Change]) -> None:
    for key, (_, now) in changes.items():
        if now is _ABSENT:
            group.pop(key, None)
        else:
            group[key] = copy.deepcopy(now)
    if changes.keys() & {"momentum", "betas"}:
        # What a schedule that moves it goes back to; that notes the new one.
        group.pop("initial_momentum", None)


def _compare(run: Run, config: RunConfig, then: OptimizerConfig, now: OptimizerConfig) -> Changes:
    """Build the optimizer as it was configured, and compare its groups' settings with those built now."""
    former = _built(run, config, then)
    were = _by_parameter(former, run.module)
    _check_all_act(run, config, former, then, now)
    changes: Changes = []
    for names, is_now in zip(run.strategy.group_names, run.strategy.built_settings, strict=True):
        was = were[names[0]] if names else is_now
        pairs = {
            key: Change(was.get(key, _ABSENT), is_now.get(key, _ABSENT)) for key in sorted({*was, *is_now})
        }
        changes.append({key: pair for key, pair in pairs.items() if _plain(pair.was) != _plain(pair.now)})
    by_name = {
        name: each for names, each in zip(run.strategy.group_names, changes, strict=True) for name in names
    }
    for group, names in zip(former.param_groups, parameter_names(former, run.module), strict=True):
        if names and by_name[names[0]]:
            _check_it_goes_on(former, group, by_name[names[0]], run.strategy.device)
    return changes


def _built(run: Run, config: RunConfig, settings: OptimizerConfig) -> torch.optim.Optimizer:
    changed = config.model_copy(update={"optimizer": settings})
    try:
        optimizer = build_optimizer(changed, run.module.model, run.module, run.strategy.device.type)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            "optimizer.optimizer_args or optimizer.groups have changed, and what it was saved with can no longer be "
            f"built ({error})"
        ) from error
    split_groups(optimizer, run.module, config.datasets)
    return optimizer


def _by_parameter(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Any]]:
    groups = zip(parameter_names(optimizer, module), group_settings(optimizer), strict=True)
    return {name: settings for names, settings in groups for name in names}


def _check_all_act(
    run: Run, config: RunConfig, former: torch.optim.Optimizer, then: OptimizerConfig, now: OptimizerConfig
) -> None:
    """Refuse changed arguments that no group's settings show: the optimizer may keep them anywhere."""
    old, new = (each.model_dump(mode="json")["optimizer_args"] for each in (then, now))
    shown = {key for group in former.param_groups for key in group}
    were = _by_parameter(former, run.module)
    for key in sorted({*old, *new} - shown):
        was, is_now = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if was == is_now:
            continue
        arguments = {name: value for name, value in {**old, key: is_now}.items() if value is not _ABSENT}
        alone = _built(run, config, then.model_copy(update={"optimizer_args": arguments}))
        if _by_parameter(alone, run.module) == were:
            raise CheckpointError(
                f"optimizer.optimizer_args: {key} was {was} and is {is_now}, and it is no setting of the optimizer's "
                "parameter groups, so it would not act on one that goes on"
            )


def _check_it_goes_on(
    former: torch.optim.Optimizer, group: dict[str, Any], changes: Mapping[str, Change], device: torch.device
) -> None:
    """Try a step after a change on a small matrix: some settings decide what an optimizer remembers of steps before."""
    parameter = nn.Parameter(torch.zeros(4, 4, device=device))
    trial = {**group, "params": [parameter]}
    former.param_groups = [trial]
    try:
        for settings in ({}, changes):
            _put(trial, settings)
            parameter.grad = torch.ones_like(parameter)
            former.step()
    except Exception as error:
        said = "; ".join(f"{k} was {c.was} and is {c.now}" for k, c in changes.items() if k not in _NOT_SAID)
        raise CheckpointError(
            f"optimizer: {said}, and {type(former).__name__} cannot go on with it from what it remembers "
            f"({type(error).__name__}: {error})"
        ) from error


def _check_scheduler(saved: SavedCheckpoint, then: RunConfig, config: RunConfig, changes: Changes) -> None:
    """Refuse changes that a scheduler of the user's, which goes on with the rates it was saved with, would not see."""
    if config.optimizer.scheduler_class is None:
        return
    pairs = [
        (f"optimizer.{key}", getattr(then.optimizer, key), getattr(config.optimizer, key))
        for key in ("scheduler_class", "scheduler_args")
    ]
    pairs += [("the optimizer's lr", *group["lr"]) for group in changes if "lr" in group]
    progress = saved.state["progress"]
    index = progress["phase_index"]
    if progress["phase_step"] > 0:
        pairs += [
            (f"datasets.{index}.{key}", *(getattr(each.datasets[index], key) for each in (then, config)))
            for key in _PHASE_RATES
        ]
    problems = [f"{where} was {was} and is {now}" for where, was, now in pairs if was != now]
    if problems:
        raise CheckpointError(
            f"{saved.folder}: {'; '.join(problems)}, and optimizer.scheduler_class goes on with the rates that it was "
            "saved with; set it back, let a phase that has not begun set `lr`, which starts the scheduler afresh, or "
            "start a new run from the weights with init_from"
        )


def _arguments(settings: OptimizerConfig) -> tuple[Any, Any]:
    dumped = settings.model_dump(mode="json")
    return dumped["optimizer_args"], dumped["groups"]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _dotted(path: str) -> str:
    return path.replace(":", ".")
