"""Checkpoints of the trainer that came before: one `.pt` file with model, optimizer and counters."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.errors import CheckpointError

_COUNTERS = {"global_step": ("global_step", "step"), "global_epoch": ("global_epoch", "epoch")}
_KNOWN_KEYS = {
    "model_state_dict",
    "optimizer_state_dict",
    "scheduler_state_dict",
    "config",
    "state",
    *(key for keys in _COUNTERS.values() for key in keys),
}
_NEVER_THERE = (
    "random number states: dropout draws anew",
    "position in the data: training starts at the beginning of the first phase",
    "technical batch map: indices are made from the data and may mean other batches than before",
    "gene space: that token ids mean the same genes as before is not checked",
)


@dataclass(frozen=True)
class ReferenceCheckpoint:
    """Hold what such a file has."""

    path: Path
    model_state_dict: dict[str, torch.Tensor]
    optimizer_state_dict: dict[str, Any] | None
    scheduler_state_dict: dict[str, Any] | None
    global_step: int | None
    global_epoch: int | None
    config: dict[str, Any] | None
    account: list[str]
    """What the file lacks or has beyond that, one line each, for the user."""


def load_reference_checkpoint(path: str | Path) -> ReferenceCheckpoint:
    """Read a `.pt` file without running code from it.

    Raises:
        CheckpointError: it is missing or damaged, would run code, or does not hold `model_state_dict`.
    """
    path = Path(path)
    content = _load(path)
    if not isinstance(content, dict) or "model_state_dict" not in content:
        found = ", ".join(map(repr, content)) if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path}: expected a dict with 'model_state_dict' and, where they are known, "
            f"'optimizer_state_dict', 'scheduler_state_dict', 'state' and 'config'; found {found[:400]}"
        )
    weights = content["model_state_dict"]
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{path}: 'model_state_dict' is {_kind(weights)}, expected a dict of tensors")
    for name, weight in weights.items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
            raise CheckpointError(f"{path}: 'model_state_dict' holds {name!r}: {_kind(weight)}, not a tensor")
    parts = {
        key: _optional_dict(path, content, key)
        for key in ("optimizer_state_dict", "scheduler_state_dict", "config", "state")
    }
    counters = {
        name: _counter(path, {**content, **(parts["state"] or {})}, keys) for name, keys in _COUNTERS.items()
    }
    return ReferenceCheckpoint(
        path=path,
        model_state_dict=dict(weights),
        optimizer_state_dict=parts["optimizer_state_dict"],
        scheduler_state_dict=parts["scheduler_state_dict"],
        global_step=counters["global_step"],
        global_epoch=counters["global_epoch"],
        config=parts["config"],
        account=_account(content, parts, counters),
    )


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([A-Za-z_][\w.]*)", str(error))
        if refused is None:
            reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n")[0][:200]
            raise CheckpointError(f"{path}: not a readable .pt file ({reason})") from error
        raise CheckpointError(
            f"{path}: it holds an object of {refused[1]}, which would run code when loaded and is refused; "
            "save it again with tensors, numbers, text, dicts and lists alone"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    # What a damaged file makes the reader of its format stumble over.
    except (
        RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{path}: not a readable .pt file ({_first_line(error)})") from error


def _account(
    content: Mapping[str, Any], parts: Mapping[str, Any], counters: Mapping[str, int | None]
) -> list[str]:
    missing = []
    if parts["optimizer_state_dict"] is None:
        missing.append("optimizer state: the optimizer starts anew")
    if parts["scheduler_state_dict"] is None:
        missing.append("scheduler state: learning rates follow this run's own schedule")
    missing += [f"{name}: counting starts at 0" for name, value in counters.items() if value is None]
    if parts["config"] is None:
        missing.append("config: that the model was built the same way is checked by names and shapes alone")
    account = [f"it has no {line}" for line in (*missing, *_NEVER_THERE)]
    unknown = sorted(str(key) for key in content if key not in _KNOWN_KEYS)
    return account + [f"it also has {key!r}, which is not used" for key in unknown]


def _optional_dict(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any] | None:
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{path}: {key!r} is {_kind(value)}, expected a dict")
    return value


def _counter(path: Path, values: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = values.get(key)
        if value is None:
            continue
        if type(value) is not int or value < 0:
            raise CheckpointError(
                f"{path}: {key!r} is {str(value)[:80]!r}, expected an integer of at least 0"
            )
        return value
    return None


def _kind(value: Any) -> str:
    return "empty" if isinstance(value, dict) and not value else f"a {type(value).__name__}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
