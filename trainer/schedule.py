"""The learning rate as a pure function of a phase and the step in it, set on the optimizer before every step."""

import math
from collections.abc import Sequence
from typing import Any

from trainer.config.schema import OneCycleConfig, PhaseConfig
from trainer.errors import ConfigError

BUILT_RATE = "built_lr"
"""Key, in a parameter group, of the learning rate that the optimizer was built with."""


def learning_rate_factor(phase: PhaseConfig, step: int, total_steps: int | None) -> float:
    """Return the factor on the base learning rate for the step numbered `step` (from 0) of a phase's schedule.

    Warmup rises linearly and reaches 1 at step `warmup_steps - 1`, so that no step is taken at rate 0; the decay then
    runs to `min_lr_ratio` at the last step, or at `schedule_steps`, and stays there. `total_steps` is what will really
    be run: of the phase, or with `schedule_scope: run` of all phases, in which `step` counts too.
    """
    warmup, end = schedule_lengths(phase, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if phase.schedule == "constant":
        return 1.0
    if end is None:
        raise ConfigError(
            f"datasets '{phase.name}': schedule '{phase.schedule}' decays over the phase, whose length its loader does "
            "not tell; set max_steps or schedule_steps, or schedule: constant"
        )
    if phase.schedule == "one_cycle":
        shape = _one_cycle(phase)
        first = 1.0 / shape.div_factor
        return _along_the_cycle(shape.pct_start, step, end, (first, 1.0, first / shape.final_div_factor))
    # `warmup - 1` is the last step at the full rate, and `end - 1` the one at the lowest.
    first, last = max(warmup - 1, 0), end - 1
    passed = min(1.0, (step - first) / max(1, last - first))
    shape = 1.0 - passed if phase.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * passed))
    return phase.min_lr_ratio + (1.0 - phase.min_lr_ratio) * shape


def momentum(phase: PhaseConfig, step: int, total_steps: int | None) -> float | None:
    """Return the momentum of a step of a one-cycle schedule; None: the optimizer's own."""
    if phase.schedule != "one_cycle" or not (shape := _one_cycle(phase)).cycle_momentum:
        return None
    _, end = schedule_lengths(phase, total_steps)
    assert end is not None, "the learning rate was asked for first"
    return _along_the_cycle(
        shape.pct_start, step, end, (shape.max_momentum, shape.base_momentum, shape.max_momentum)
    )


def _one_cycle(phase: PhaseConfig) -> OneCycleConfig:
    return OneCycleConfig() if phase.one_cycle is None else phase.one_cycle


def _along_the_cycle(pct_start: float, step: int, end: int, values: tuple[float, float, float]) -> float:
    """Return what goes from the first value to the second and on to the third, in half cosines, as OneCycleLR has it.

    The turn lies at step `pct_start * end - 1`, which is no whole number in general.
    """
    turn, last = pct_start * end - 1.0, end - 1.0
    if step <= turn:
        start, stop, passed = values[0], values[1], step / turn if turn else 1.0
    else:
        start, stop, passed = values[1], values[2], min(1.0, (step - turn) / (last - turn))
    return stop + (start - stop) / 2.0 * (1.0 + math.cos(math.pi * passed))


def schedule_lengths(phase: PhaseConfig, total_steps: int | None) -> tuple[int, int | None]:
    """Return the steps of warmup, and those after which the decay has ended; None: nothing tells."""
    end = total_steps if phase.schedule_steps is None else phase.schedule_steps
    if end is not None and total_steps is not None and "decay" in phase.schedule_fits:
        end = min(end, total_steps)
    warmup = phase.warmup_steps
    known = [steps for steps in (end, total_steps) if steps is not None]
    if known and "warmup" in phase.schedule_fits:
        warmup = min(warmup, min(known) // 10)
    return warmup, end


def schedule_notes(phase: PhaseConfig, total_steps: int | None) -> list[str]:
    """Return what a person should know of a schedule whose lengths are not those of what is run."""
    if total_steps is None or (not phase.warmup_steps and phase.schedule_steps is None):
        return []
    warmup, end = schedule_lengths(phase, total_steps)
    fitted = []
    if warmup != phase.warmup_steps:
        fitted.append(f"warmup {warmup} steps in place of {phase.warmup_steps}")
    if end != phase.schedule_steps and phase.schedule_steps is not None:
        fitted.append(f"decay to step {end} in place of {phase.schedule_steps}")
    where = "run" if phase.schedule_scope == "run" else "phase"
    notes = [f"schedule fitted to the {where}'s {total_steps} steps: {', '.join(fitted)}"] if fitted else []
    if phase.schedule_steps is not None and end is not None and end > total_steps:
        factor = learning_rate_factor(phase, total_steps - 1, total_steps)
        notes.append(
            f"the {where} ends at step {total_steps} of the schedule's {end}, with {factor:.3g} of the learning rate"
        )
    elif phase.schedule_steps is not None and end is not None and end < total_steps:
        notes.append(
            f"the schedule ends at step {end} of {total_steps}: from there on the {where} trains with "
            f"{phase.min_lr_ratio:g} of the learning rate"
        )
    elif warmup >= total_steps:
        notes.append(f"the {where} ends at step {total_steps}, within its warmup of {warmup} steps")
    return notes


def base_learning_rates(phase: PhaseConfig, groups: Sequence[dict[str, Any]]) -> list[float]:
    """Return the base learning rate of each parameter group in a phase.

    The phase's `group_lrs` by the group's name rule over `muon_lr` / `adam_lr` (groups with and without
    `use_muon`), these over `lr`, and that over the rate the optimizer was built with.
    """
    unknown = sorted(set(phase.group_lrs) - {str(group.get("name")) for group in groups})
    if unknown:
        names = sorted(str(group["name"]) for group in groups if "name" in group)
        raise ConfigError(
            f"datasets '{phase.name}': group_lrs names {', '.join(unknown)}, but the optimizer's parameter groups are "
            f"{', '.join(names) or 'unnamed'}; name them under optimizer.groups"
        )
    if phase.muon_lr is not None and not any(group.get("use_muon") for group in groups):
        raise ConfigError(
            f"datasets '{phase.name}': muon_lr is set, but no parameter group of the optimizer has use_muon; "
            "use lr, or an optimizer that marks its groups"
        )
    rates = []
    for group in groups:
        of_kind = phase.muon_lr if group.get("use_muon") else phase.adam_lr
        chosen = (phase.group_lrs.get(str(group.get("name"))), of_kind, phase.lr, built_rate(group))
        rates.append(float(next(rate for rate in chosen if rate is not None)))
    return rates


def built_rate(group: dict[str, Any]) -> float:
    """Return the rate that a parameter group was built with, which older checkpoints have by torch's name alone."""
    return group.get(BUILT_RATE, group["initial_lr"])


def sets_rate(phase: PhaseConfig) -> bool:
    """Tell whether a phase sets any learning rate of its own."""
    rates = (phase.lr, phase.muon_lr, phase.adam_lr)
    return any(rate is not None for rate in rates) or bool(phase.group_lrs)


def recorded_rates(groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the learning rates in force by their names in a step's record: the first group's, and each of several."""
    rates = {"lr": float(groups[0]["lr"])}
    if len(groups) > 1:
        rates |= {
            f"lr/{group.get('name', group.get('part_of', index))}": float(group["lr"])
            for index, group in enumerate(groups)
        }
    return rates


def set_learning_rates(groups: Sequence[dict[str, Any]], rates: Sequence[float], factor: float) -> None:
    """Write each group's learning rate for the coming step."""
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate * factor


def set_momentum(groups: Sequence[dict[str, Any]], value: float | None) -> None:
    """Write the momentum of the coming step; None puts back what the optimizer was built with."""
    for group in groups:
        if value is None and "initial_momentum" not in group:
            continue
        key = _momentum_key(group)
        held = group[key]
        own = group.setdefault("initial_momentum", held[0] if key == "betas" else held)
        wanted = own if value is None else value
        group[key] = (wanted, *held[1:]) if key == "betas" else wanted


def check_momentum(phase: PhaseConfig, groups: Sequence[dict[str, Any]]) -> None:
    """Refuse a schedule that moves a momentum which the optimizer has not.

    Raises:
        ConfigError: says what to set.
    """
    if phase.schedule != "one_cycle" or not _one_cycle(phase).cycle_momentum:
        return
    if not all("betas" in group or "momentum" in group for group in groups):
        raise ConfigError(
            f"datasets '{phase.name}': schedule: one_cycle moves the optimizer's momentum, and it has none; set "
            "one_cycle.cycle_momentum: false, or take an optimizer with momentum or betas"
        )


def _momentum_key(group: dict[str, Any]) -> str:
    return "betas" if "betas" in group else "momentum"
