"""The learning rate as a pure function of a phase and the step in it, set on the optimizer before every step."""

import math
from collections.abc import Sequence
from typing import Any

from trainer.config.schema import PhaseConfig
from trainer.errors import ConfigError


def learning_rate_factor(phase: PhaseConfig, phase_step: int, total_steps: int | None) -> float:
    """Return the factor on the base learning rate for the step numbered `phase_step` (from 0) of a phase.

    Warmup rises linearly and reaches 1 at step `warmup_steps - 1`, so that no step is taken at rate 0; the
    decay then runs to `min_lr_ratio` at the phase's last step. `total_steps` is what the phase will really run.
    """
    if phase_step < phase.warmup_steps:
        return (phase_step + 1) / phase.warmup_steps
    if phase.schedule == "constant":
        return 1.0
    if total_steps is None:
        raise ConfigError(
            f"datasets '{phase.name}': schedule '{phase.schedule}' decays over the phase, whose length its loader does "
            "not tell; set max_steps, or schedule: constant"
        )
    # `warmup_steps - 1` is the last step at the full rate, and `total_steps - 1` the one at the lowest.
    first, last = max(phase.warmup_steps - 1, 0), total_steps - 1
    passed = min(1.0, (phase_step - first) / max(1, last - first))
    shape = 1.0 - passed if phase.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * passed))
    return phase.min_lr_ratio + (1.0 - phase.min_lr_ratio) * shape


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
        chosen = (phase.group_lrs.get(str(group.get("name"))), of_kind, phase.lr, group["initial_lr"])
        rates.append(float(next(rate for rate in chosen if rate is not None)))
    return rates


def set_learning_rates(groups: Sequence[dict[str, Any]], rates: Sequence[float], factor: float) -> None:
    """Write each group's learning rate for the coming step."""
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate * factor
