"""Quantum circuits as grids of tokens: the row source that a circuit model is trained on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from data import circuit_merge
from data.circuit_folder import open_circuit_sets
from data.circuit_merge import CircuitTable
from data.errors import DataError
from data.hashing import DrawKey
from data.memory import keep_freed_memory
from data.size_order import SizeOrder

Padding = Literal["max", "bucket"]
LENGTH_MULTIPLE = 4
"""The length of a batch is a multiple of it: a model may halve its columns twice."""
_UNITARIES_IN_FINGERPRINT = 64


class CircuitSource:
    """Fetch batches of circuits by row numbers.

    A batch of B circuits over at most Q qubits and T columns holds these CPU tensors, int64 where nothing else is said:
    `tokens` [B, Q, T] (0 background, gates 1 to N, their control nodes negative, padding N + 1), `prompt_idx` [B],
    `circuit_size` [B, 2] (qubits, and columns up to the last gate), `noise_seed` [B] (a number of its own for each
    circuit in each epoch, never negative), `unitary` float32 [B, 2, 2^Q, 2^Q] (real and imaginary part) where the data
    have it, and the Python number `num_tokens`, which leaves padding out.

    Q and T are the largest of the circuits of the whole optimizer step, T rounded up to a multiple of 4: neither the
    number of ranks nor the micro-batch changes how a circuit is padded. In validation they are the largest of the data,
    with padding `bucket` of the batch. A smaller circuit's unitary stands along the diagonal as often as it fits.
    """

    unit = "circuits"
    is_inline = False
    pads_to_step = True
    shuffle_block, shuffle_window = 1, 8192

    def __init__(
        self,
        table: CircuitTable,
        row_mask: NDArray[np.bool_] | None,
        *,
        padding: Padding,
        description: Mapping[str, Any],
        num_workers: int = 0,
        is_validation: bool = False,
        notices: Sequence[str] = (),
    ) -> None:
        """Take what `circuit_loader` opened; `description` is what the fingerprint is made of."""
        self.table = table
        self.row_mask = row_mask
        self.padding: Padding = padding
        self.num_workers = num_workers
        self.notices = list(notices)
        """What the user should know of how the circuits were read, for the run's start-up account."""
        self.validation: CircuitSource | None = None
        self.gate_pool = table.sets[0].gate_pool
        self.has_unitary = table.sets[0].unitaries is not None
        self.prompts = list(table.prompts)
        """The prompts that `prompt_idx` counts: the data's own, or the run's after `set_prompts`."""
        self._prompt_index = np.arange(len(self.prompts))
        self._description = dict(description)
        self._is_validation = is_validation
        self._largest = self._frame(np.arange(len(table)))
        keep_freed_memory()

    def __len__(self) -> int:
        """Count the stored circuits; `row_mask` says which of them take part."""
        return len(self.table)

    def fetch(
        self, rows: NDArray[np.int64], draw: DrawKey, step_rows: NDArray[np.int64] | None = None
    ) -> dict[str, Any]:
        """Return the batch of these rows, padded to the largest of `step_rows`, which are the batch's own by default.

        Only the seeds of the noise depend on `draw`.
        """
        table, pad = self.table, len(self.gate_pool) + 1
        if self._is_validation:
            draw = draw._replace(epoch=-1)
            # A step of an evaluation depends on the number of ranks.
            num_qubits, num_columns = self._frame(rows) if self.padding == "bucket" else self._largest
        else:
            num_qubits, num_columns = self._frame(rows if step_rows is None else step_rows)
        qubits, extents = (each[rows].astype(np.int64) for each in (table.qubits, table.extents))
        tokens = table.gates(rows, num_qubits, num_columns).astype(np.int64)
        is_own = np.arange(num_qubits)[:, None] < qubits[:, None, None]
        is_own = is_own & (np.arange(num_columns) < extents[:, None, None])
        tokens[~is_own] = pad
        sizes = np.stack([qubits, table.lengths[rows].astype(np.int64)], axis=1)
        arrays: dict[str, NDArray[Any]] = {
            "tokens": tokens,
            "prompt_idx": self._prompt_index[table.prompt_idx[rows]].astype(np.int64),
            "circuit_size": sizes,
            "noise_seed": draw.noise_seeds(rows),
        }
        if self.has_unitary:
            arrays["unitary"] = self._unitaries(rows, num_qubits)
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {
            "num_tokens": int(np.count_nonzero(is_own))
        }

    def arrangement(self, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the order in which a global batch is cut into micro-batches, large circuits first; None: as it comes.

        With padding `bucket` it keeps circuits of one size together where a global batch has several.
        """
        if self.padding == "max":
            return None
        return np.argsort(-self._sizes()[rows], kind="stable")

    def batch_order(self, seed: int, phase: int, global_batch_size: int) -> SizeOrder | None:
        """Return the order whose global batches have circuits of one size; None leaves it to the caller."""
        if self.padding == "max":
            return None
        return SizeOrder(self._sizes(), seed, phase, global_batch_size, self.row_mask)

    def set_prompts(self, prompts: Sequence[str]) -> None:
        """Let `prompt_idx` count the run's prompts instead of the data's own.

        Raises:
            DataError: the run's prompts lack one of the data's.
        """
        place = {prompt: index for index, prompt in enumerate(prompts)}
        missing = [prompt for prompt in self.table.prompts if prompt not in place]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(f"the run's prompts lack {missing[0]!r}{more} of the data's")
        self.prompts = list(prompts)
        self._prompt_index = np.array([place[prompt] for prompt in self.table.prompts], np.int64)

    def facts(self) -> dict[str, Any]:
        """Return what a model's sizes depend on.

        `tokenizer_options`, which checkpoints keep, say what tokens and prompts stand for; a sampler needs no more.
        """
        num_qubits = max(each.max_qubits for each in self.table.sets)
        max_length = _rounded_up(max(each.max_length for each in self.table.sets))
        kept = {
            "gate_pool": list(self.gate_pool),
            "prompts": list(self.prompts),
            "num_qubits": num_qubits,
            "max_length": max_length,
            "has_unitary": self.has_unitary,
        }
        return {
            **kept,
            "vocab_size": len(self.gate_pool) + 2,
            "num_prompts": len(self.prompts),
            "tokenizer_options": kept,
        }

    def fingerprint(self) -> str:
        """Identify the circuits, their prompts and unitaries, and how they are chosen, split and padded."""
        table, digest = self.table, hashlib.sha256()
        content = [list(self.gate_pool), table.prompts, self._description]
        digest.update(json.dumps(content, sort_keys=True).encode())
        for array in (table.content, table.prompt_idx, table.extents):
            digest.update(array.tobytes())
        for each in table.sets:
            if each.unitaries is not None:
                rows = np.unique(np.linspace(0, len(each) - 1, _UNITARIES_IN_FINGERPRINT).astype(np.int64))
                digest.update(each.unitaries.rows(rows).tobytes())
        return digest.hexdigest()

    def _frame(self, rows: NDArray[np.int64]) -> tuple[int, int]:
        """Return the qubits and columns that hold all of these circuits."""
        return int(self.table.qubits[rows].max()), _rounded_up(int(self.table.extents[rows].max()))

    def _unitaries(self, rows: NDArray[np.int64], num_qubits: int) -> NDArray[np.float32]:
        """Return the matrices of these rows; what a circuit leaves of the qubits is untouched by it."""
        table, side = self.table, 1 << num_qubits
        result = np.zeros((len(rows), 2, side, side), np.float32)
        for number in np.unique(table.set_index[rows]):
            stored, place = table.sets[number].unitaries, np.flatnonzero(table.set_index[rows] == number)
            assert stored is not None
            part = stored.rows(table.set_row[rows[place]])[:, :, :side, :side]
            size = part.shape[-1]
            for start in range(0, side, size):
                result[place, :, start : start + size, start : start + size] = part
        return result

    def _sizes(self) -> NDArray[np.int64]:
        """Return one number for the size of a batch of each circuit alone, larger for more qubits, then for longer."""
        columns = -(-self.table.extents.astype(np.int64) // LENGTH_MULTIPLE)
        return (self.table.qubits.astype(np.int64) << 32) + columns


def circuit_loader(
    path: str | Path,
    *,
    padding: Padding = "max",
    balance_max: int | None = None,
    deduplicate: bool = True,
    val_fraction: float = 0.1,
    split_seed: int = 0,
    max_samples: int | None = None,
    num_workers: int = 0,
) -> CircuitSource:
    """Open circuits as a source of batches; `data.circuits.circuit_loader` in a config.

    A single folder (`config.yaml`, `dataset/ds_*`) is taken as it is stored: what comes after a circuit's last gate is
    background. The sets of a folder of folders are merged: what a circuit leaves of the batch's qubits and columns is
    padding, token N + 1.

    Args:
        path: a folder of circuits, or a folder of such folders.
        padding: `max` pads to the largest circuits of a global batch; `bucket` makes global batches of circuits of one
            size, as far as there are enough of it, so that hardly anything is padded.
        balance_max: circuits of one prompt that take part at most, a seeded choice; None takes all.
        deduplicate: leave out circuits that have the same qubits, gates and prompt as another.
        val_fraction: share of the circuits that is held out for validation; equal circuits are never on both sides.
        split_seed: seed of the split, of `balance_max` and of `max_samples`; not the run's, so that runs share them.
        max_samples: circuits that take part at most, a seeded choice of what the other options leave; None takes all.
        num_workers: processes that prepare batches; 0 leaves it to one background thread.
    """
    _check_options(
        padding, deduplicate, val_fraction, {"balance_max": balance_max, "max_samples": max_samples}
    )
    sets, is_merged, notices = open_circuit_sets(path)
    table = circuit_merge.merge(sets, pads_to_own_length=is_merged)
    selected, left_out = _select(table, deduplicate, balance_max, max_samples, split_seed)
    validation = circuit_merge.held_out(table, selected, val_fraction, split_seed)
    training = selected & ~validation
    notices += [_described(table, is_merged), *left_out, _divided(path, training, validation)]
    common: dict[str, Any] = {
        "padding": padding,
        "num_workers": num_workers,
        "description": {
            "padding": padding,
            "selection": [deduplicate, balance_max, max_samples],
            "split": [val_fraction, split_seed],
        },
    }
    source = CircuitSource(table, training, **common, notices=notices)
    if validation.any():
        source.validation = CircuitSource(table, validation, **common, is_validation=True)
    return source


def _check_options(padding: Any, deduplicate: Any, val_fraction: Any, counts: Mapping[str, Any]) -> None:
    if padding not in get_args(Padding):
        raise DataError(f"padding is {padding!r}; it must be {' | '.join(get_args(Padding))}")
    if not isinstance(deduplicate, bool):
        raise DataError(f"deduplicate is {deduplicate!r}; it must be true or false")
    if (
        isinstance(val_fraction, bool)
        or not isinstance(val_fraction, int | float)
        or not 0 <= val_fraction < 1
    ):
        raise DataError(f"val_fraction is {val_fraction!r}; it must be in [0, 1)")
    for name, count in counts.items():
        if count is not None and (type(count) is not int or count < 1):
            raise DataError(f"{name} is {count!r}; it must be a whole number, at least 1, or null")


def _select(
    table: CircuitTable, deduplicate: bool, balance_max: int | None, max_samples: int | None, seed: int
) -> tuple[NDArray[np.bool_], list[str]]:
    """Return which circuits take part, and what is to be said of those that do not."""
    notices = []
    selected = np.ones(len(table), np.bool_)

    def keep(kept: NDArray[np.bool_], why: str) -> NDArray[np.bool_]:
        num_left_out = int(selected.sum() - kept.sum())
        if num_left_out:
            notices.append(f"{num_left_out:,} circuits left out: {why}")
        return kept

    if deduplicate:
        why = "another has the same qubits, gates and prompt (deduplicate)"
        selected = keep(circuit_merge.without_duplicates(table), why)
    if balance_max is not None:
        why = f"their prompt has more than {balance_max:,} (balance_max)"
        selected = keep(circuit_merge.balanced(table, selected, balance_max, seed), why)
    if max_samples is not None:
        why = f"more than {max_samples:,} are left (max_samples)"
        selected = keep(circuit_merge.limited(table, selected, max_samples, seed), why)
    return selected, notices


def _described(table: CircuitTable, is_merged: bool) -> str:
    sets, pool = table.sets, ", ".join(table.sets[0].gate_pool)
    parts = "; ".join(f"{each.folder.name}: {len(each):,}" for each in sets[:8]) + (
        f" and {len(sets) - 8} more" if len(sets) > 8 else ""
    )
    return (
        f"{len(table):,} circuits ({parts}) of up to {max(each.max_qubits for each in sets)} qubits and "
        f"{max(each.max_length for each in sets)} columns, {len(table.prompts):,} prompts, gates {pool}, "
        f"{'with' if sets[0].unitaries is not None else 'without'} unitaries"
        + (", padded" if is_merged or sets[0].pad is not None else "")
    )


def _divided(path: str | Path, training: NDArray[np.bool_], validation: NDArray[np.bool_]) -> str:
    if not training.any():
        raise DataError(f"{path}: no circuit is left for training")
    return f"{training.sum():,} circuits for training, {validation.sum():,} for validation"


def _rounded_up(length: int) -> int:
    return -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
