"""Weights and optimizer state of a checkpoint by parameter name, whether one rank saved them whole or all in parts.

Under ZeRO each rank saves, in `shard.rank<rank>.safetensors`, the stretches of the flattened parameters that it steps:
the fp32 weights and every tensor of optimizer state of that shape, under the parameter's name with the place of the
stretch. Whoever needs a stretch, on whatever number of ranks and under whatever strategy, reads it from the files that
overlap it. DeepSpeed's own checkpoints are not used: they are pickles, and its conversion between numbers of ranks
mixes up the settings of parameter groups and their step counters.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.averaging import AVERAGE
from trainer.checkpoint_folder import MODEL, RUN_STATE, SavedCheckpoint
from trainer.errors import CheckpointError
from trainer.saved_state import check_state, is_size, is_table
from trainer.statefile import LazyTensor

SHARD = "shard"
"""Name of the ranks' files."""


class Tensors(Protocol):
    """Give the tensors of a checkpoint by parameter name; names start with `model.` or `loss.`."""

    aliases: Mapping[str, str]
    """Further names of tied weights, each with the name that they are saved by; both the model's own."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every entry of the model's state dict, by the model's own names."""
        ...

    def model_weights(self) -> dict[str, Tensor]:
        """Return the model's whole state dict."""
        ...

    def loss_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the loss's state dict, by its own names; empty where it has none."""
        ...

    def loss_entry(self, name: str) -> Any:
        """Return a whole entry of the loss's state dict, by its own name."""
        ...

    def stretch(self, name: str, start: int, num: int, key: str | None = None) -> Tensor | None:
        """Return a stretch of a flattened parameter, or of a tensor of its optimizer state; None: not saved."""
        ...

    def optimizer_keys(self, name: str) -> tuple[list[str], dict[str, Any]]:
        """Return which tensors of optimizer state have the parameter's shape, and the rest by key."""
        ...

    def optimizer_state(self, name: str) -> dict[str, Any]:
        """Return a parameter's whole optimizer state, empty where it has none."""
        ...


def open_tensors(saved: SavedCheckpoint, own_rank: int | None = None) -> Tensors:
    """Open the tensors of a checkpoint; `own_rank`, where the world size is the same, looks into its own file first."""
    return ShardedTensors(saved, own_rank) if saved.has(SHARD) else WholeTensors(saved)


def full_weights(saved: SavedCheckpoint, *, averaged: bool = True) -> dict[str, Tensor]:
    """Open a checkpoint's tensors for its whole weights alone (see `whole_weights`)."""
    return whole_weights(open_tensors(saved), averaged=averaged)


def whole_weights(tensors: Tensors, *, averaged: bool = True) -> dict[str, Tensor]:
    """Return the model's whole state dict from any checkpoint; fp32 where training kept its weights in fp32.

    Args:
        tensors: those of the checkpoint.
        averaged: take the moving averages of the weights that have one (`ema`), else all as they were trained.
    """
    weights = tensors.model_weights()
    if averaged:
        for name, weight in weights.items():
            average = tensors.stretch(f"model.{tensors.aliases.get(name, name)}", 0, weight.numel(), AVERAGE)
            if average is not None:
                weights[name] = average.reshape(weight.shape)
    return weights


def has_averages(tensors: Tensors) -> bool:
    """Tell whether a checkpoint holds moving averages of its weights."""
    return any(AVERAGE in tensors.optimizer_keys(f"model.{name}")[0] for name in tensors.shapes())


class WholeTensors:
    """Read a checkpoint in which rank 0 saved everything."""

    def __init__(self, saved: SavedCheckpoint) -> None:
        """Open the checkpoint's files; nothing is read before it is asked for."""
        self._folder = saved.folder
        self._model = _weights(saved)
        state = saved.lazy(RUN_STATE)
        check_state(state, str(saved.folder / RUN_STATE))
        self.aliases: Mapping[str, str] = state["aliases"]
        optimizer = state.get("optimizer", ())
        self._optimizer: Mapping[str, Mapping[str, Any]] = {} if optimizer is None else optimizer
        self._loss: Mapping[str, Any] = state.get("loss") or {}
        if not is_table(self._optimizer, lambda kept: is_table(kept, lambda _: True)):
            raise _damaged(saved.folder, "its optimizer state is no table by parameter")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every entry of the model's state dict."""
        return {name: tensor.shape for name, tensor in self._model.items()}

    def model_weights(self) -> dict[str, Tensor]:
        """Return the model's whole state dict."""
        return {name: tensor.read() for name, tensor in self._model.items()}

    def loss_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the loss's state dict."""
        return _tensor_shapes(self._loss)

    def loss_entry(self, name: str) -> Any:
        """Return a whole entry of the loss's state dict."""
        return _value(self._loss[name])

    def stretch(self, name: str, start: int, num: int, key: str | None = None) -> Tensor | None:
        """Return a stretch of a flattened parameter, or of a tensor of its optimizer state."""
        if key is None:
            kind, _, own = name.partition(".")
            found = (self._loss if kind == "loss" else self._model).get(own)
        else:
            found = self._optimizer.get(name, {}).get(key)
        if found is None:
            return None
        if not isinstance(found, LazyTensor) or math.prod(found.shape) < start + num:
            raise _damaged(self._folder, f"{key or 'the weight'} of {name} is no tensor of its size")
        return found.read().reshape(-1)[start : start + num]

    def optimizer_keys(self, name: str) -> tuple[list[str], dict[str, Any]]:
        """Return which tensors of optimizer state have the parameter's shape, and the rest by key."""
        kind, _, own = name.partition(".")
        shape = (self._loss if kind == "loss" else self._model)[own].shape
        state = self._optimizer.get(name, {})
        shaped = [
            key for key, value in state.items() if isinstance(value, LazyTensor) and value.shape == shape
        ]
        return shaped, {key: _value(value) for key, value in state.items() if key not in shaped}

    def optimizer_state(self, name: str) -> dict[str, Any]:
        """Return a parameter's whole optimizer state."""
        return {key: _value(value) for key, value in self._optimizer.get(name, {}).items()}


@dataclass(frozen=True)
class _Piece:
    start: int
    num: int
    weight: LazyTensor
    state: Mapping[str, Any]
    scalars: Mapping[str, Any]


class ShardedTensors:
    """Read a checkpoint in which every rank saved a part."""

    def __init__(self, saved: SavedCheckpoint, own_rank: int | None = None) -> None:
        """Take the checkpoint; ranks' files are opened as they are needed."""
        self._saved = saved
        self._whole = _weights(saved)
        self._loss: Mapping[str, Any] = saved.lazy(RUN_STATE).get("loss") or {}
        """What of the loss is not sharded; versions before also kept what is, of no use."""
        self._loss_aliases: Mapping[str, str] = saved.state.get("loss_aliases") or {}
        shapes: Mapping[str, Iterable[int]] = saved.state.get("sharded_shapes", {})
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.aliases: Mapping[str, str] = saved.state["aliases"]
        unknown = set(self.aliases.values()) - {*self._whole, *map(_own, self._shapes)}
        if unknown:
            raise _damaged(saved.folder, f"it ties weights to {sorted(unknown)[0]}, which it lacks")
        self._files: dict[int, dict[str, _Piece]] = {}
        self._own_rank = own_rank

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every entry of the model's state dict."""
        found = {name: tensor.shape for name, tensor in self._whole.items()}
        found |= {_own(name): shape for name, shape in self._shapes.items() if name.startswith("model.")}
        return found | {alias: found[name] for alias, name in self.aliases.items()}

    def model_weights(self) -> dict[str, Tensor]:
        """Return the model's whole state dict."""
        weights = {name: tensor.read() for name, tensor in self._whole.items()}
        for name, shape in self._shapes.items():
            if name.startswith("model."):
                flat = self.stretch(name, 0, _numel(shape))
                assert flat is not None
                weights[_own(name)] = flat.reshape(shape)
        return weights | {alias: weights[name] for alias, name in self.aliases.items()}

    def loss_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the loss's state dict."""
        found = _tensor_shapes(self._loss)
        found |= {_own(name): shape for name, shape in self._shapes.items() if name.startswith("loss.")}
        return found | {alias: found[name] for alias, name in self._loss_aliases.items()}

    def loss_entry(self, name: str) -> Any:
        """Return a whole entry of the loss's state dict."""
        full = f"loss.{self._loss_aliases.get(name, name)}"
        if full not in self._shapes:
            return _value(self._loss[name])
        flat = self.stretch(full, 0, _numel(self._shapes[full]))
        assert flat is not None
        return flat.reshape(self._shapes[full])

    def stretch(self, name: str, start: int, num: int, key: str | None = None) -> Tensor | None:
        """Return a stretch of a flattened parameter, or of a tensor of its optimizer state."""
        if name not in self._shapes:
            own = (self._loss if name.startswith("loss.") else self._whole).get(_own(name))
            return None if own is None or key is not None else _value(own).reshape(-1)[start : start + num]
        parts: list[tuple[int, Tensor]] = []
        left = num
        for piece in self._pieces(name):
            first, last = max(start, piece.start), min(start + num, piece.start + piece.num)
            if first >= last:
                continue
            source = piece.weight if key is None else piece.state.get(key)
            if source is None:
                return None
            parts.append((first, source.read(first - piece.start, last - piece.start)))
            left -= last - first
            if left == 0:
                break
        if left:
            raise CheckpointError(
                f"{self._saved.folder}: the ranks' shards lack {left} of {num} values of {name} from {start} on"
            )
        return torch.cat([part for _, part in sorted(parts, key=lambda found: found[0])])

    def optimizer_keys(self, name: str) -> tuple[list[str], dict[str, Any]]:
        """Return which tensors of optimizer state have the parameter's shape, and the rest by key."""
        for piece in self._pieces(name):
            return list(piece.state), {key: _value(value) for key, value in piece.scalars.items()}
        return [], {}

    def optimizer_state(self, name: str) -> dict[str, Any]:
        """Return a parameter's whole optimizer state."""
        shaped, state = self.optimizer_keys(name)
        shape = self._shapes.get(name, ())
        for key in shaped:
            flat = self.stretch(name, 0, _numel(shape), key)
            assert flat is not None
            state[key] = flat.reshape(shape)
        return state

    def _pieces(self, name: str) -> Iterable[_Piece]:
        ranks = list(range(self._saved.world_size))
        if self._own_rank is not None:
            ranks.sort(key=lambda rank: rank != self._own_rank)
        for rank in ranks:
            if rank not in self._files:
                tree = self._saved.lazy_rank(SHARD, rank)
                if not is_table(tree, _is_piece):
                    raise _damaged(
                        self._saved.folder, f"the shard of rank {rank} holds no stretches of weights"
                    )
                self._files[rank] = {
                    name: _Piece(p["start"], p["weight"].shape[0], p["weight"], p["state"], p["scalars"])
                    for name, p in tree.items()
                }
            if name in self._files[rank]:
                yield self._files[rank][name]


def _weights(saved: SavedCheckpoint) -> Mapping[str, LazyTensor]:
    weights = saved.lazy(MODEL)
    if not is_table(weights, lambda weight: isinstance(weight, LazyTensor)):
        raise _damaged(saved.folder, f"{MODEL} is no table of tensors")
    return weights


def _is_piece(piece: Any) -> bool:
    """Tell whether something is a stretch of a flattened parameter, with tensors of optimizer state as long."""
    if not isinstance(piece, dict) or not isinstance(piece.get("weight"), LazyTensor):
        return False
    shape = piece["weight"].shape
    return (
        len(shape) == 1
        and is_size(piece.get("start"))
        and is_table(piece.get("state"), lambda kept: isinstance(kept, LazyTensor) and kept.shape == shape)
        and is_table(piece.get("scalars"), lambda _: True)
    )


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{folder}: {what}; its files were edited")


def _value(value: Any) -> Any:
    return value.read() if isinstance(value, LazyTensor) else value


def _tensor_shapes(entries: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(value.shape) for name, value in entries.items() if isinstance(value, LazyTensor | Tensor)
    }


def _own(name: str) -> str:
    return name.partition(".")[2]


def _numel(shape: Iterable[int]) -> int:
    return math.prod(shape)
