"""Options of the objective that a phase sets: what holds in a phase is a function of the configuration alone.

So a run that goes on in the middle of a phase, or in a later one, has the options that it had.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from models.errors import ModelError
from trainer.config.schema import PhaseConfig
from trainer.errors import ConfigError
from trainer.losses import LossModule


def options_of(phases: Sequence[PhaseConfig], index: int) -> dict[str, Any]:
    """Return what phases up to this one set, later ones over earlier ones; a phase that is skipped sets nothing."""
    found: dict[str, Any] = {}
    for phase in phases[: index + 1]:
        if phase.epochs > 0:
            found |= phase.objective_options
    return found


def set_objective_options(module: LossModule, phases: Sequence[PhaseConfig], index: int) -> None:
    """Give the objective the options of a phase; those that no phase sets so far are as it was built with."""
    names = options_of(phases, len(phases))
    if names:
        objective: Any = module.objective
        built_with = {name: getattr(module.initial_options, name) for name in names}
        objective.set_options(**{**built_with, **options_of(phases, index)})


def check_objective_options(module: LossModule, phases: Sequence[PhaseConfig]) -> None:
    """Set the options of every phase on trial, before training.

    Raises:
        ConfigError: the objective has no such option, refuses its value, or none of its options can be set.
    """
    setting = [index for index, phase in enumerate(phases) if phase.objective_options and phase.epochs > 0]
    if not setting:
        return
    objective: Any = module.objective
    kind, initial = type(objective).__name__, module.initial_options
    if not callable(getattr(objective, "set_options", None)) or not dataclasses.is_dataclass(initial):
        raise ConfigError(
            f"datasets.{setting[0]}.objective_options: the loss ({module.route}) is {kind}'s, whose options cannot be "
            "set; it needs a method set_options(**changes) and its options as a dataclass in `options`, as "
            "models.diffusion.MaskedDiffusion has them, or leave objective_options out"
        )
    known = {field.name for field in dataclasses.fields(initial)}
    for index in setting:
        where = f"datasets.{index}.objective_options"
        unknown = sorted(phases[index].objective_options.keys() - known)
        if unknown:
            raise ConfigError(
                f"{where}.{unknown[0]}: {kind} has no such option; it has {', '.join(sorted(known))}"
            )
        try:
            set_objective_options(module, phases, index)
        except (ModelError, TypeError) as error:  # a value of another type fails where it is compared
            raise ConfigError(f"{where}: {error}") from error
    objective.set_options(**{name: getattr(initial, name) for name in known})
