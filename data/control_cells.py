"""Control cells for perturbed cells: matched by technical batch and cell type as well as the data allows."""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.hashing import DrawKey, Stream, splitmix64
from data.permutation import permuted

ControlMatch = Literal["both", "cell_type", "technical_batch", "any"]
LEVELS: tuple[ControlMatch, ...] = get_args(ControlMatch)
_MEANING = ("technical batch and cell type", "cell type only", "technical batch only", "neither")
"""What controls of each level share with the cell."""


class ControlCells:
    """Hold the control cells, and which of them belong to each pair of cell type and technical batch.

    The controls of a pair are those of the same technical batch and cell type; where there are fewer than
    `min_controls` of them, those of the cell type; then those of the technical batch; then all.
    """

    def __init__(
        self,
        rows: NDArray[np.integer],
        cell_type: NDArray[np.integer],
        technical_batch: NDArray[np.integer],
        *,
        num_cell_types: int,
        num_batches: int,
        min_controls: int = 1,
    ) -> None:
        """Take the corpus rows of the control cells, and the cell type and technical batch of each."""
        by_type = np.lexsort((rows, technical_batch, cell_type))
        by_batch = np.lexsort((rows, technical_batch))
        self.rows = np.concatenate([rows[by_type], rows[by_batch]])
        self.num_batches = num_batches
        pairs = np.bincount(cell_type * num_batches + technical_batch, minlength=num_cell_types * num_batches)
        pairs = pairs.reshape(num_cell_types, num_batches)
        pair_starts = np.concatenate([[0], np.cumsum(pairs)[:-1]]).reshape(pairs.shape)
        types, batches = pairs.sum(axis=1), pairs.sum(axis=0)
        batch_starts = len(rows) + np.concatenate([[0], np.cumsum(batches)[:-1]])
        counts = [
            pairs,
            np.broadcast_to(types[:, None], pairs.shape),
            np.broadcast_to(batches, pairs.shape),
            np.full(pairs.shape, len(rows)),
        ]
        starts = [
            pair_starts,
            np.broadcast_to(pair_starts[:, :1], pairs.shape),
            np.broadcast_to(batch_starts, pairs.shape),
            np.zeros(pairs.shape, np.int64),
        ]
        enough = [count >= min_controls for count in counts]
        level = np.select(enough, np.arange(len(LEVELS)).tolist(), default=-1)
        self.level = level.reshape(-1)
        """int64 [cell types * technical batches]: place in `LEVELS`; -1 where even all controls are too few."""
        self._sizes = np.select(enough, counts, default=0).reshape(-1)
        self._starts = np.select(enough, starts, default=0).reshape(-1)

    def pair(self, cell_type: NDArray[np.integer], technical_batch: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the number of each pair of cell type and technical batch."""
        return np.asarray(cell_type, np.int64) * self.num_batches + technical_batch

    def check(
        self, pairs: NDArray[np.int64], weakest: ControlMatch, names: tuple[list[str], list[str]]
    ) -> None:
        """Refuse pairs whose controls match less than the weakest match that is allowed."""
        level = self.level[pairs]
        bad = (level < 0) | (level > LEVELS.index(weakest))
        if not bad.any():
            return
        cell_types, batches = names
        pair = int(pairs[bad][0])
        cell_type, batch = cell_types[pair // self.num_batches], batches[pair % self.num_batches]
        where = f"cell type {cell_type!r}, technical batch {batch!r}"
        if (level < 0).any():
            raise DataError(f"{where}: there are fewer control cells than min_controls in the whole corpus")
        raise DataError(
            f"control_match: {weakest} is the weakest match that is allowed, and {len(np.unique(pairs[bad]))} pairs of "
            f"cell type and technical batch have no controls that match so ({where}, for one); allow a weaker match "
            f"({' | '.join(LEVELS)}), or leave these cells out"
        )

    def account(self, pairs: NDArray[np.int64]) -> str:
        """Say how many perturbed cells of these pairs have controls of each match."""
        counts = np.bincount(self.level[pairs], minlength=len(LEVELS))
        parts = [f"{meaning} {count}" for count, meaning in zip(counts, _MEANING, strict=True) if count]
        return f"cells by what their controls share with them: {', '.join(parts)}"

    def draw(self, pairs: NDArray[np.int64], sets: NDArray[np.int64], draw: DrawKey) -> NDArray[np.int64]:
        """Draw a control for each cell [B, S] of these sets [B]; a set repeats one only where it has too few.

        Args:
            pairs: [B, S], pair of cell type and technical batch of each cell.
            sets: [B], number of each set.
            draw: what the choice is drawn from.
        """
        states = draw.cell_hashes(Stream.SET_CONTROLS, sets)[:, None]
        # Cells that share their controls take the first, second, ... of one seeded order of them.
        starts, sizes = self._starts[pairs], self._sizes[pairs]
        pool = starts * (len(self.rows) + 1) + sizes
        states = splitmix64(np.broadcast_to(states, pool.shape), pool)
        place = permuted(states, sizes, _times_before(pool) % sizes)
        return self.rows[starts + place].astype(np.int64)


def _times_before(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return, for each value of each row, how often it came before in its row."""
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    position = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    is_first = np.ones(values.shape, np.bool_)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    starts = np.maximum.accumulate(np.where(is_first, position, 0), axis=1)
    times = np.empty(values.shape, np.int64)
    np.put_along_axis(times, order, position - starts, axis=1)
    return times
