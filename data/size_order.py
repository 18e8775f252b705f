"""Which row comes when, so that rows of one size share their global batch."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.even_windows import EvenWindows
from data.hashing import Stream, stateless_hash

_EPOCHS_KEPT = 2


class SizeOrder(EvenWindows):
    """Show every row once an epoch, in global batches of one size wherever a size has rows enough.

    The rows of a size are permuted, and as many as fill whole global batches make such batches. What is left of all
    sizes, from small to large, is cut into global batches too, which mix neighbouring sizes. All batches are permuted;
    the one that is not full comes last. A function of seed, phase and epoch alone, it answers what
    `data.order.GlobalOrder` does.

    Memory is 8 bytes a row and epoch kept (two), and 8 bytes a row of sorted sizes.
    """

    shuffle = True
    block = 1

    def __init__(
        self,
        sizes: NDArray[np.integer],
        seed: int,
        phase: int,
        global_batch_size: int,
        selected: NDArray[np.bool_] | None = None,
    ) -> None:
        """Describe the order.

        Args:
            sizes: size of each row of the data set, an integer.
            seed: of the run.
            phase: index of the phase.
            global_batch_size: rows of one optimizer step over all ranks.
            selected: which rows take part; None takes all of them.
        """
        rows = np.arange(len(sizes)) if selected is None else np.flatnonzero(selected)
        if len(rows) == 0:
            raise DataError("no row takes part: the data set or the part of it that was selected is empty")
        if global_batch_size < 1:
            raise DataError(f"global batch {global_batch_size}: it must be at least 1")
        self.seed, self.phase, self.window = seed, phase, global_batch_size
        self.num_rows = len(rows)
        by_size = np.argsort(sizes[rows], kind="stable")
        self._rows = rows[by_size]
        _, self._starts, self._counts = np.unique(sizes[rows][by_size], return_index=True, return_counts=True)
        self._of_epoch = lru_cache(_EPOCHS_KEPT)(self._permuted)

    @property
    def num_mixed_rows(self) -> int:
        """Count the rows of an epoch that may share a global batch with rows of another size."""
        return int((self._counts % self.window).sum())

    def rows(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the rows at positions [start, stop) of an epoch, in order."""
        return self._of_epoch(epoch)[max(start, 0) : max(min(stop, self.num_rows), 0)].copy()

    def __getstate__(self) -> dict[str, object]:
        """Leave the epochs behind when the order travels to another process."""
        return {**self.__dict__, "_of_epoch": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Start without epochs."""
        vars(self).update(state)
        self._of_epoch = lru_cache(_EPOCHS_KEPT)(self._permuted)

    def _permuted(self, epoch: int) -> NDArray[np.int64]:
        """Return the rows of a whole epoch in order."""
        keys = self.seed, self.phase, epoch
        hashes = stateless_hash(*keys, Stream.SIZE_ORDER, index=self._rows)
        size = np.repeat(np.arange(len(self._counts)), self._counts)
        rows = self._rows[np.lexsort((hashes, size))]
        place = np.arange(self.num_rows) - np.repeat(self._starts, self._counts)
        is_left = place >= np.repeat(self._counts // self.window * self.window, self._counts)
        rows = np.concatenate([rows[~is_left], rows[is_left]])
        num_full = self.num_rows // self.window
        batches = rows[: num_full * self.window].reshape(num_full, self.window)
        order = np.argsort(stateless_hash(*keys, Stream.SIZE_BATCH_ORDER, index=np.arange(num_full)))
        return np.concatenate([batches[order].reshape(-1), rows[num_full * self.window :]])
