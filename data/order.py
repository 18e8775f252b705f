"""Which cell comes when: the order of an epoch, and the split into training and validation cells.

Everything here is a pure function of integers. The g-th global batch of an epoch is positions
[g * size, (g + 1) * size) of that epoch's order, whatever the number of ranks and workers.
"""

import threading
from collections import OrderedDict
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.hashing import Stream, stateless_hash

_ROWS_AT_ONCE = 1 << 20
_WINDOWS_KEPT = 4


class Order(Protocol):
    """Say which row comes at which position of an epoch, as a pure function."""

    num_rows: int
    """Positions of an epoch."""
    shuffle: bool
    block: int
    window: int
    is_with_replacement: bool
    """Whether a row may come more than once in an epoch, and another not at all."""

    @property
    def num_windows(self) -> int:
        """Count the windows of an epoch: runs of positions whose rows are announced to the reader together."""
        ...

    def rows(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the rows at positions [start, stop) of an epoch, in order."""
        ...

    def window_at(self, epoch: int, position: int) -> int:
        """Return the window that a position of an epoch lies in."""
        ...

    def window_start(self, epoch: int, window: int) -> int:
        """Return the first position of a window; the window after the last one starts at `num_rows`."""
        ...

    def window_rows(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Return a window's rows in order; the caller must not write into them."""
        ...


class GlobalOrder:
    """Order the cells of each epoch: permuted blocks inside shuffled windows.

    The selected cells, in row order, are cut into blocks of `block` neighbours. The blocks are permuted over
    the whole data set; consecutive permuted blocks make up windows of `window` cells, and the cells of a
    window are permuted. Neighbours on disk are so read together, and every batch mixes cells from everywhere.

    Memory is 8 to 16 bytes a block, not a cell: 12 to 24 MB for 100 million cells in blocks of 64.
    """

    is_with_replacement = False

    def __init__(
        self,
        num_rows: int,
        seed: int,
        phase: int,
        shuffle: bool = True,
        block: int = 64,
        window: int = 8192,
        selected: NDArray[np.bool_] | None = None,
    ) -> None:
        """Describe the order.

        Args:
            num_rows: rows of the data set.
            seed: of the run.
            phase: index of the phase.
            shuffle: False gives the selected rows in natural order, in every epoch.
            block: cells that stay neighbours when blocks are permuted.
            window: cells that are permuted among each other, a multiple of `block`.
            selected: which rows take part; None takes all of them.
        """
        if block < 1 or window < block or window % block:
            raise DataError(
                f"shuffle_window {window} is not a multiple of shuffle_block {block}; both count cells, and "
                "the window holds whole blocks"
            )
        if selected is not None and (selected.dtype != np.bool_ or selected.shape != (num_rows,)):
            got = f"{selected.dtype} {list(selected.shape)}"
            raise DataError(f"the row mask must be bool [{num_rows}], not {got}")
        self.seed, self.phase, self.shuffle = seed, phase, shuffle
        self.block, self.window = block, window
        self._selected = selected if selected is not None and not selected.all() else None
        self.num_rows = num_rows if self._selected is None else int(np.count_nonzero(self._selected))
        if self.num_rows == 0:
            raise DataError("no cell takes part: the data set or the part of it that was selected is empty")
        self._num_blocks = -(-self.num_rows // block)
        self._last_block_rows = self.num_rows - (self._num_blocks - 1) * block
        self._block_starts = None
        if self._selected is not None:
            self._block_starts = np.append(_rows_at(self._selected, block), num_rows)
        self._lock = threading.Lock()
        self._permutation: tuple[int, NDArray[np.int64], int] | None = None
        self._windows: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    @property
    def num_windows(self) -> int:
        """Count the windows of an epoch."""
        return -(-self._num_blocks // (self.window // self.block))

    def rows(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the rows at positions [start, stop) of an epoch, in order."""
        start, stop = max(start, 0), min(stop, self.num_rows)
        if start >= stop:
            return np.empty(0, np.int64)
        pieces = []
        for window in range(self.window_at(epoch, start), self.window_at(epoch, stop - 1) + 1):
            first = self.window_start(epoch, window)
            pieces.append(self.window_rows(epoch, window)[max(start - first, 0) : stop - first])
        return pieces[0].copy() if len(pieces) == 1 else np.concatenate(pieces)

    def window_at(self, epoch: int, position: int) -> int:
        """Return the window that a position of an epoch lies in."""
        window = position // self.window
        # The short block may lie in an earlier window, which is then short too and shifts those after it.
        if window + 1 < self.num_windows and position >= self.window_start(epoch, window + 1):
            return window + 1
        return window

    def window_start(self, epoch: int, window: int) -> int:
        """Return the first position of a window; the window after the last one starts at `num_rows`."""
        if window >= self.num_windows:
            return self.num_rows
        is_shifted = window > self._short_window(epoch)
        return window * self.window - (self.block - self._last_block_rows if is_shifted else 0)

    def window_rows(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Return a window's rows in order; the caller must not write into them."""
        epoch = epoch if self.shuffle else 0
        with self._lock:
            if (epoch, window) in self._windows:
                self._windows.move_to_end((epoch, window))
                return self._windows[epoch, window]
        rows = self._compute_window(epoch, window)
        rows.flags.writeable = False
        with self._lock:
            self._windows[epoch, window] = rows
            while len(self._windows) > _WINDOWS_KEPT:
                self._windows.popitem(last=False)
        return rows

    def __getstate__(self) -> dict[str, object]:
        """Leave the caches behind when the order travels to another process."""
        return {**self.__dict__, "_lock": None, "_permutation": None, "_windows": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Start with empty caches."""
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._windows = OrderedDict()

    def _compute_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        blocks_per_window = self.window // self.block
        first, last = window * blocks_per_window, min((window + 1) * blocks_per_window, self._num_blocks)
        blocks = self._permuted_blocks(epoch)[0][first:last] if self.shuffle else np.arange(first, last)
        rows = self._rows_of_blocks(blocks)
        if self.shuffle:
            keys = stateless_hash(self.seed, self.phase, epoch, Stream.ROW_ORDER, index=rows)
            rows = rows[np.argsort(keys)]
        return rows

    def _rows_of_blocks(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._selected is None or self._block_starts is None:
            rows = (blocks[:, None] * self.block + np.arange(self.block)).reshape(-1)
            return rows[rows < self.num_rows]
        if self.block == 1:
            return self._block_starts[blocks]
        pairs = zip(self._block_starts[blocks].tolist(), self._block_starts[blocks + 1].tolist(), strict=True)
        return np.concatenate([np.flatnonzero(self._selected[start:stop]) + start for start, stop in pairs])

    def _permuted_blocks(self, epoch: int) -> tuple[NDArray[np.int64], int]:
        """Return the blocks in the epoch's order, and where among them the last (short) one is."""
        with self._lock:
            if self._permutation is not None and self._permutation[0] == epoch:
                return self._permutation[1:]
        blocks = np.arange(self._num_blocks)
        keys = stateless_hash(self.seed, self.phase, epoch, Stream.BLOCK_ORDER, index=blocks)
        permutation = np.argsort(keys)
        place = int(np.flatnonzero(permutation == self._num_blocks - 1)[0])
        with self._lock:
            self._permutation = (epoch, permutation, place)
        return permutation, place

    def _short_window(self, epoch: int) -> int:
        """Return the window that holds the last block, which may be short."""
        place = self._permuted_blocks(epoch)[1] if self.shuffle else self._num_blocks - 1
        return place // (self.window // self.block)


def split_rows(num_rows: int, fraction: float, seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Split rows by cell into disjoint masks (training, validation).

    The validation part has round(num_rows * fraction) rows, at least one where the fraction is positive and
    there is more than one row, and never all of them.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"val_fraction is {fraction}; it must be in [0, 1)")
    count = round(num_rows * fraction)
    if fraction > 0 and num_rows > 1:
        count = min(max(count, 1), num_rows - 1)
    validation = choose_rows(num_rows, count, seed, Stream.SPLIT)
    return ~validation, validation


def part_masks(
    num_rows: int, val_fraction: float, split_seed: int, limit_cells: int | None
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]:
    """Mark the rows for training and for validation, of a seeded choice of `limit_cells` rows or of all.

    None stands for all rows in the first place, and for no row in the second.
    """
    if limit_cells is not None and (type(limit_cells) is not int or limit_cells < 1):
        raise DataError(f"limit_cells: got {limit_cells!r}; it must be a whole number, at least 1, or null")
    if limit_cells is None or limit_cells >= num_rows:
        training, validation = split_rows(num_rows, val_fraction, split_seed)
        return (training, validation) if validation.any() else (None, None)
    limited = choose_rows(num_rows, limit_cells, split_seed, Stream.SUBSET)
    rows = np.flatnonzero(limited)
    validation = np.zeros(num_rows, np.bool_)
    validation[rows[split_rows(len(rows), val_fraction, split_seed)[1]]] = True
    return limited & ~validation, validation if validation.any() else None


def choose_rows(num_rows: int, count: int, seed: int, stream: Stream) -> NDArray[np.bool_]:
    """Mark `count` of the rows, those with the smallest hash; needs memory for the mask and little more."""
    chosen = np.zeros(num_rows, np.bool_)
    if count >= num_rows:
        return ~chosen
    if count <= 0:
        return chosen
    # Distinct rows have distinct hashes, so "at most the count-th smallest" marks exactly `count` of them.
    limit = _kth_smallest_hash(num_rows, count, seed, stream)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, num_rows))
        chosen[start : start + len(rows)] = stateless_hash(seed, stream, index=rows) <= limit
    return chosen


def _kth_smallest_hash(num_rows: int, count: int, seed: int, stream: Stream) -> np.uint64:
    """Find the count-th smallest hash: a histogram of the top 16 bits, then the hashes of one bin."""
    histogram = np.zeros(1 << 16, np.int64)
    starts = range(0, num_rows, _ROWS_AT_ONCE)
    pieces = [range(start, min(start + _ROWS_AT_ONCE, num_rows)) for start in starts]
    for piece in pieces:
        hashes = stateless_hash(seed, stream, index=np.asarray(piece))
        histogram += np.bincount((hashes >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    below = np.cumsum(histogram)
    bin_index = int(np.searchsorted(below, count))
    rank = count - 1 - (int(below[bin_index - 1]) if bin_index else 0)
    candidates = []
    for piece in pieces:
        hashes = stateless_hash(seed, stream, index=np.asarray(piece))
        candidates.append(hashes[hashes >> np.uint64(48) == bin_index])
    return np.sort(np.concatenate(candidates))[rank]


def _rows_at(selected: NDArray[np.bool_], every: int) -> NDArray[np.int64]:
    """Return the row of every `every`-th selected row, in pieces."""
    found, skipped = [], 0
    for start in range(0, len(selected), _ROWS_AT_ONCE):
        rows = np.flatnonzero(selected[start : start + _ROWS_AT_ONCE]) + start
        found.append(rows[skipped::every])
        skipped = (skipped - len(rows)) % every
    return np.concatenate(found)
