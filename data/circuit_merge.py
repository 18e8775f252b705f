"""Which circuits of one or several sets take part, and which are held out.

Every choice is a function of a circuit's content and a seed, not of its place: a circuit that is held out is held out
in every phase and run with the same seed and share, whatever it was merged with.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.circuit_folder import CircuitSet
from data.hashing import Stream, stateless_hash, to_uniform

_ROWS_AT_ONCE = 8192
_TOKEN_OFFSET = 1 << 15


@dataclass(eq=False)
class CircuitTable:
    """Hold what is known of each circuit of the merged sets, one row each."""

    sets: list[CircuitSet]
    set_index: NDArray[np.int16]
    set_row: NDArray[np.int64]
    qubits: NDArray[np.int16]
    extents: NDArray[np.int16]
    """Columns that are not padding."""
    lengths: NDArray[np.int16]
    """Columns up to the last gate."""
    prompt_idx: NDArray[np.int32]
    prompts: list[str]
    content: NDArray[np.uint64]
    """Hash of the gates and the number of qubits, the same wherever the circuit is stored."""

    def __len__(self) -> int:
        """Count the circuits."""
        return len(self.set_row)

    def gates(self, rows: NDArray[np.int64], num_qubits: int, num_columns: int) -> NDArray[np.int32]:
        """Return the tokens of these rows [B, num_qubits, num_columns], cut or filled; padding is background."""
        tokens = np.zeros((len(rows), num_qubits, num_columns), np.int32)
        for number in np.unique(self.set_index[rows]):
            each, place = self.sets[number], np.flatnonzero(self.set_index[rows] == number)
            part = each.tokens.rows(self.set_row[rows[place]])[:, :num_qubits, :num_columns]
            if each.pad is not None:
                part = np.where(part == each.pad, 0, part)
            tokens[place, : part.shape[1], : part.shape[2]] = part
        return tokens


def merge(sets: list[CircuitSet], *, pads_to_own_length: bool) -> CircuitTable:
    """Put the circuits of several sets one after the other.

    With `pads_to_own_length` what comes after a circuit's last gate is padding, as in a set of mixed sizes; else it is
    background of the data, as it is stored.
    """
    prompts = sorted({prompt for each in sets for prompt in each.prompts})
    place = {prompt: number for number, prompt in enumerate(prompts)}
    lengths = np.concatenate([each.lengths for each in sets])
    is_stored_padded = [each.pad is not None for each in sets]
    return CircuitTable(
        sets,
        set_index=np.concatenate([np.full(len(each), number, np.int16) for number, each in enumerate(sets)]),
        set_row=np.concatenate([np.arange(len(each)) for each in sets]),
        qubits=np.concatenate([each.qubits for each in sets]),
        extents=np.concatenate(
            [
                each.lengths if pads_to_own_length and not is_padded else each.extents
                for each, is_padded in zip(sets, is_stored_padded, strict=True)
            ]
        ),
        lengths=lengths,
        prompt_idx=np.concatenate(
            [np.array([place[text] for text in each.prompts], np.int32)[each.prompt_idx] for each in sets]
        ),
        prompts=prompts,
        content=np.concatenate([_content(each) for each in sets]),
    )


def without_duplicates(table: CircuitTable) -> NDArray[np.bool_]:
    """Mark the first of all circuits with the same qubits, gates and prompt."""
    order = np.lexsort((np.arange(len(table)), table.prompt_idx, table.content))
    content, prompt = table.content[order], table.prompt_idx[order]
    is_first = np.ones(len(table), np.bool_)
    is_first[1:] = (content[1:] != content[:-1]) | (prompt[1:] != prompt[:-1])
    starts = np.flatnonzero(is_first)
    first = order[np.repeat(starts, np.diff(np.append(starts, len(table))))]
    kept = np.ones(len(table), np.bool_)
    later = np.flatnonzero(~is_first)
    for start in range(0, len(later), _ROWS_AT_ONCE):
        places = later[start : start + _ROWS_AT_ONCE]
        rows, others = order[places], first[places]
        sizes = int(table.qubits[rows].max()), int(table.lengths[rows].max())
        # A hash that is shared by chance must cost no circuit.
        is_same = (table.gates(rows, *sizes) == table.gates(others, *sizes)).all(axis=(1, 2))
        is_same &= (table.qubits[rows] == table.qubits[others]) & (
            table.lengths[rows] == table.lengths[others]
        )
        kept[rows[is_same]] = False
    return kept


def balanced(table: CircuitTable, selected: NDArray[np.bool_], most: int, seed: int) -> NDArray[np.bool_]:
    """Keep at most this many of the selected circuits of each prompt, a seeded choice."""
    rows = np.flatnonzero(selected)
    keys = stateless_hash(seed, Stream.CIRCUIT_BALANCE, index=table.content[rows])
    order = np.lexsort((rows, keys, table.prompt_idx[rows]))
    prompt = table.prompt_idx[rows][order]
    starts = np.flatnonzero(np.append(True, prompt[1:] != prompt[:-1]))
    rank = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    kept = np.zeros(len(table), np.bool_)
    kept[rows[order[rank < most]]] = True
    return kept


def limited(table: CircuitTable, selected: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.bool_]:
    """Keep at most this many of the selected circuits, a seeded choice."""
    rows = np.flatnonzero(selected)
    order = np.lexsort((rows, stateless_hash(seed, Stream.CIRCUIT_SUBSET, index=table.content[rows])))
    kept = np.zeros(len(table), np.bool_)
    kept[rows[order[:count]]] = True
    return kept


def held_out(
    table: CircuitTable, selected: NDArray[np.bool_], fraction: float, seed: int
) -> NDArray[np.bool_]:
    """Mark about this share of the selected circuits for validation, equal circuits alike.

    There is at least one where the share is positive and there are two different circuits, and never all of them.
    """
    if fraction == 0:
        return np.zeros(len(table), np.bool_)
    share = to_uniform(stateless_hash(seed, Stream.CIRCUIT_SPLIT, index=table.content))
    chosen = selected & (share < fraction)
    shares = np.unique(share[selected])
    if len(shares) > 1 and not chosen.any():
        chosen = selected & (share == shares[0])
    if len(shares) > 1 and (chosen == selected).all():
        chosen = selected & (share != shares[-1])
    return chosen


def _content(circuits: CircuitSet) -> NDArray[np.uint64]:
    """Hash each circuit: the sum of a random number for every gate at its place, and its qubits.

    Background and padding add nothing, so that the number of stored columns does not matter.
    """
    num_gates = len(circuits.gate_pool)
    width = 2 * num_gates + 1
    place = (np.arange(circuits.max_qubits)[:, None] << 32) + (np.arange(circuits.max_length) << 16)
    keys = place[:, :, None] + np.arange(-num_gates, num_gates + 1) + _TOKEN_OFFSET
    numbers = stateless_hash(Stream.CIRCUIT_CONTENT, index=keys)  # [qubits, columns, tokens]
    numbers[:, :, num_gates] = 0
    flat, start_of_place = numbers.reshape(-1), np.arange(place.size).reshape(place.shape) * width + num_gates
    content = np.empty(len(circuits), np.uint64)
    for start in range(0, len(circuits), _ROWS_AT_ONCE):
        part = slice(start, min(start + _ROWS_AT_ONCE, len(circuits)))
        tokens = circuits.tokens.rows(part).astype(np.int64)
        if circuits.pad is not None:
            tokens[tokens == circuits.pad] = 0
        content[part] = flat[tokens + start_of_place].sum(axis=(1, 2), dtype=np.uint64)
    return content + stateless_hash(Stream.CIRCUIT_CONTENT, 1, index=circuits.qubits)
