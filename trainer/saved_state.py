"""What a checkpoint's `run_state.safetensors` says of its run, checked before anything takes it."""

from collections.abc import Callable, Mapping
from typing import Any

from trainer.errors import CheckpointError

MAX_SIZE = (1 << 31) - 1
"""Of what a model is built with; more names or tokens than these have no index."""
_MAX_COUNT = (1 << 63) - 1


def check_state(state: Any, where: str) -> dict[str, Any]:
    """Return a checkpoint's state of the run if every entry is of the kind that a run saves.

    Args:
        state: what the file holds, without the optimizer's state.
        where: the file, for messages.

    Raises:
        CheckpointError: an entry is missing, or is something else.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"{where}: it is no state of a run, but {type(state).__name__}")
    missing = [key for key in _REQUIRED if key not in state]
    if missing:
        raise CheckpointError(f"{where}: it does not say {missing[0]}; the file was edited")
    for key, (what, is_right) in (_REQUIRED | _OPTIONAL).items():
        if key in state and not is_right(state[key]):
            raise CheckpointError(f"{where}: {key} is not {what}; the file was edited")
    return state


def is_size(value: Any) -> bool:
    """Tell whether a value can be a length of something that a model or a checkpoint holds."""
    return type(value) is int and 0 <= value <= MAX_SIZE


def is_table(value: Any, is_right: Callable[[Any], bool]) -> bool:
    """Tell whether a value is a table by text of what is right."""
    return isinstance(value, Mapping) and all(isinstance(k, str) and is_right(v) for k, v in value.items())


def is_list(value: Any, is_right: Callable[[Any], bool]) -> bool:
    """Tell whether a value is a list of what is right."""
    return isinstance(value, list | tuple) and all(map(is_right, value))


def is_text(value: Any) -> bool:
    """Tell whether a value is text."""
    return isinstance(value, str)


def _is_section(value: Any) -> bool:
    return is_table(value, lambda _: True)


def _is_options(value: Any) -> bool:
    """Tell whether a value is the options of a tokenizer; those of circuits say their gates and prompts."""
    return _is_section(value) and (
        "gate_pool" not in value
        or all(is_list(value.get(key), is_text) for key in ("gate_pool", "prompts"))
        and type(value.get("has_unitary")) is bool
    )


def _is_progress(value: Any) -> bool:
    if not _is_section(value):
        return False
    counters = {key: number for key, number in value.items() if key != "best_metric"}
    best = value.get("best_metric")
    return (
        {"global_step", "phase_index", "epoch_step", "cells", "tokens"} <= counters.keys()
        and all(type(number) is int and -1 <= number <= _MAX_COUNT for number in counters.values())
        and (best is None or type(best) in (int, float))
    )


def _is_trajectory(value: Any) -> bool:
    return (
        _is_section(value)
        and type(value.get("seed")) is int
        and is_list(
            value.get("phases"), lambda phase: is_table(phase, _is_plain) and is_text(phase.get("name"))
        )
    )


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)


def _is_nothing_or_section(value: Any) -> bool:
    return value is None or _is_section(value)


_Rule = tuple[str, Callable[[Any], bool]]
_REQUIRED: dict[str, _Rule] = {
    "progress": ("a table of counters", _is_progress),
    "groups": ("a list of tables", lambda value: is_list(value, _is_section)),
    "group_names": (
        "a list of lists of names",
        lambda value: is_list(value, lambda names: is_list(names, is_text)),
    ),
    "aliases": ("a table of names", lambda value: is_table(value, is_text)),
    "scheduler": ("a table, or nothing", _is_nothing_or_section),
    "technical_batches": ("a table of indices by name", lambda value: is_table(value, is_size)),
    "n_technical_batches": (f"a whole number up to {MAX_SIZE:,}", is_size),
    "trackers": ("a table", _is_section),
    "trajectory": ("a seed and a list of phases", _is_trajectory),
}
_OPTIONAL: dict[str, _Rule] = {
    "sizes": (f"a table of whole numbers up to {MAX_SIZE:,}", lambda value: is_table(value, is_size)),
    "value_kinds": ("a table of text", lambda value: is_table(value, is_text)),
    "label_names": ("a list of names", lambda value: is_list(value, is_text)),
    "tokenizer_options": ("a table of options by phase", lambda value: is_table(value, _is_options)),
    "loss": ("a table", _is_section),
    "loss_aliases": ("a table of names", lambda value: is_table(value, is_text)),
    "gradient_scaler": ("a table, or nothing", _is_nothing_or_section),
    "sharded_shapes": (
        "a table of shapes",
        lambda value: is_table(value, lambda shape: is_list(shape, is_size)),
    ),
}
"""What a run saves only of some data, models and strategies."""
