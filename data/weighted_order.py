"""Which cell comes when, drawn with replacement so that rare classes come more often."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.even_windows import EvenWindows
from data.hashing import Stream, stateless_hash, to_range, to_uniform


class WeightedOrder(EvenWindows):
    """Draw the cells of each epoch with replacement, more and more evenly over classes.

    A cell of a class of n cells, of N cells in K classes, is drawn with probability (1 - a) / N + a / (K * n), where
    a = min(1, epoch / warmup_epochs), counting epochs from 0, and a = 1 without warmup. An epoch has N draws; each is
    a function of seed, phase, epoch and position alone. It answers what `data.order.GlobalOrder` does.

    Memory is 4 bytes a cell (8 from 2**31 cells on).
    """

    shuffle = True
    block = 1
    is_with_replacement = True

    def __init__(
        self,
        classes: NDArray[np.integer],
        seed: int,
        phase: int,
        warmup_epochs: int = 0,
        window: int = 8192,
        selected: NDArray[np.bool_] | None = None,
    ) -> None:
        """Describe the order.

        Args:
            classes: class of each row of the data set, any integers.
            seed: of the run.
            phase: index of the phase.
            warmup_epochs: epochs until classes are drawn evenly; 0 does so from the first.
            window: draws whose rows are announced to the reader together.
            selected: which rows take part; None takes all of them.
        """
        if warmup_epochs < 0:
            raise DataError(f"sampling.warmup_epochs is {warmup_epochs}; it must be 0 or more")
        rows = np.arange(len(classes)) if selected is None else np.flatnonzero(selected)
        if len(rows) == 0:
            raise DataError("no cell takes part: the data set or the part of it that was selected is empty")
        self.seed, self.phase, self.window = seed, phase, window
        self.warmup_epochs = warmup_epochs
        self.num_rows = len(rows)
        by_class = np.argsort(classes[rows], kind="stable")
        self._rows = rows[by_class].astype(np.int32 if len(classes) < 1 << 31 else np.int64)
        _, starts, counts = np.unique(classes[rows][by_class], return_index=True, return_counts=True)
        self._starts, self._counts = starts.astype(np.int64), counts.astype(np.int64)

    def balance(self, epoch: int) -> float:
        """Return the share of the draws that are even over classes."""
        return 1.0 if self.warmup_epochs == 0 else min(1.0, max(epoch, 0) / self.warmup_epochs)

    def rows(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the rows at positions [start, stop) of an epoch, in order."""
        position = np.arange(max(start, 0), min(stop, self.num_rows))
        keys = (self.seed, self.phase, epoch)
        is_even = to_uniform(stateless_hash(*keys, Stream.SAMPLE_KIND, index=position)) < self.balance(epoch)
        hashes = stateless_hash(*keys, Stream.SAMPLE_CELL, index=position)
        place = _below(hashes, np.full(len(position), self.num_rows))
        chosen = to_range(
            stateless_hash(*keys, Stream.SAMPLE_CLASS, index=position[is_even]), len(self._counts)
        )
        place[is_even] = self._starts[chosen] + _below(hashes[is_even], self._counts[chosen])
        return self._rows[place].astype(np.int64)


def _below(hashes: NDArray[np.uint64], limits: NDArray[Any]) -> NDArray[np.int64]:
    """Turn hashes into whole numbers in [0, limit), each with a limit of its own."""
    return np.minimum((to_uniform(hashes) * limits).astype(np.int64), limits - 1)
