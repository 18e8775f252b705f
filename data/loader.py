"""From rows to the micro-batches of each optimizer step, the same cells for any number of ranks and workers."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from data.cell_source import CellSource, cell_loader
from data.errors import DataError
from data.hashing import DrawKey
from data.order import Order
from data.read_ahead import WorkerPool, in_thread

__all__ = ["CellSource", "DrawKey", "MicroBatch", "RowSource", "StepLoader", "cell_loader"]

_ROWS_NAMED = 8
_EVALUATION_EPOCH = -1


class RowSource(Protocol):
    """What a `StepLoader` needs of data; it may also offer what `CellSource` has beside these.

    One with `arrangement(rows)` says in which order the rows of a global batch are cut into micro-batches. One with
    `pads_to_step` is called as `fetch(rows, draw, step_rows)`, with the rows of the whole global batch (in evaluation,
    of all ranks' micro-batches), so that what it pads to need not depend on how they are divided.

    `fetch` must be a function of its arguments alone: the same rows and draw key give the same batch. A source
    with `is_inline` is fetched in the consumer's thread, one with `expect(rows)` is told what comes. `unit` names what
    a row is, in the plural, where it is no cell.
    """

    def __len__(self) -> int:
        """Count the rows."""
        ...

    def fetch(self, rows: NDArray[np.int64], draw: DrawKey) -> dict[str, Any]:
        """Return the batch of these rows."""
        ...


class MicroBatch(NamedTuple):
    """Hold what one rank passes through the model at a time."""

    batch: dict[str, Any]
    num_cells: int
    """0 marks a dummy, a copy of another micro-batch that must count for nothing."""
    rows: NDArray[np.int64]


class _Key(NamedTuple):
    """Name one item of a pass: a step of an epoch, and up to where the pass goes."""

    epoch: int
    step: int
    stop: int
    global_batch_size: int


class StepLoader:
    """Give a rank its micro-batches of every optimizer step.

    Global batch g of an epoch is positions [g * size, (g + 1) * size) of the order, which the source may arrange
    among each other. Its i-th micro-batch goes to rank i % world size as accumulation index i // world size, so
    every rank takes equally many steps of equally many micro-batches, and a position to resume from is an epoch
    and a step. Of a last global batch with too few cells, indices at which no rank has any are left out; a rank
    that has none where others do gets a dummy, the first micro-batch's rows.
    """

    may_run_dry = False

    def __init__(
        self,
        source: RowSource,
        order: Order,
        *,
        draw_seed: int,
        phase: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        prefetch: int = 4,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = False,
    ) -> None:
        """Describe the loader; nothing is read and no thread started before `steps`.

        Args:
            source: the data.
            order: which row comes when.
            draw_seed: seed of masks and noise.
            phase: index of the phase, which masks and noise depend on too.
            global_batch_size: cells of one optimizer step over all ranks.
            micro_batch_size: cells that one rank passes through the model at a time.
            rank: index of this rank.
            world_size: number of ranks.
            prefetch: optimizer steps prepared ahead; 0 prepares each when it is due.
            num_workers: processes that prepare steps; 0 is one thread, or none for a source that is inline.
            pin_memory: put tensors into page-locked memory, from which copies to a GPU are asynchronous.
            drop_last: leave out the cells that do not fill a last global batch.
        """
        if micro_batch_size < 1 or not 0 <= rank < world_size or global_batch_size < 1:
            raise DataError(
                f"micro-batch {micro_batch_size}, global batch {global_batch_size}, rank {rank} of {world_size}: "
                "sizes must be at least 1 and the rank below the world size"
            )
        if global_batch_size % (micro_batch_size * world_size):
            raise DataError(
                f"global batch {global_batch_size} is not a multiple of micro-batch {micro_batch_size} x "
                f"{world_size} ranks = {micro_batch_size * world_size}; set global_batch_size or micro_batch_size"
            )
        if pin_memory and not torch.cuda.is_available():
            raise DataError("pin_memory: page-locked memory needs a CUDA device, and there is none")
        if drop_last and order.num_rows < global_batch_size:
            raise DataError(
                f"drop_last: {order.num_rows} cells do not fill one global batch of {global_batch_size}; make it "
                "smaller, or keep the last batch"
            )
        self.source = source
        self.order = order
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.draw_seed, self.phase = draw_seed, phase
        self.prefetch, self.num_workers, self.pin_memory = prefetch, num_workers, pin_memory
        self.drop_last = drop_last
        self._pool: WorkerPool[_Key, list[MicroBatch]] | None = None
        self._announced: list[tuple[int, int, int]] = []
        self._last_step = -1

    @property
    def num_cells(self) -> int:
        """Count the cells of an epoch."""
        return self.steps_per_epoch * self.global_batch_size if self.drop_last else self.order.num_rows

    @property
    def steps_per_epoch(self) -> int:
        """Count the optimizer steps of an epoch."""
        if self.drop_last:
            return self.order.num_rows // self.global_batch_size
        return -(-self.order.num_rows // self.global_batch_size)

    def steps(
        self, epoch: int, first_step: int = 0, stop_step: int | None = None
    ) -> Iterator[list[MicroBatch]]:
        """Yield this rank's micro-batches of each step in [first_step, stop_step) of an epoch."""
        stop = self.steps_per_epoch if stop_step is None else min(stop_step, self.steps_per_epoch)
        return self._items(epoch, first_step, stop, self.global_batch_size)

    def evaluation_steps(self, max_steps: int | None = None) -> Iterator[list[MicroBatch]]:
        """Yield one micro-batch at a time, equally many on all ranks, with the same masks in every evaluation.

        Where `max_steps` ends it before all cells have been seen, they are the first in the order: give the
        loader a shuffled one.
        """
        size = self.micro_batch_size * self.world_size
        steps = -(-self.order.num_rows // size)
        return self._items(_EVALUATION_EPOCH, 0, steps if max_steps is None else min(steps, max_steps), size)

    def unmasked(self, num_cells: int, draw: DrawKey) -> Iterator[dict[str, Any]]:
        """Yield the first cells of the draw's epoch without masking, the same on every rank.

        Yields nothing where the source knows no masking.
        """
        fetch = getattr(self.source, "fetch_unmasked", None)
        if fetch is None:
            return
        for start in range(0, min(num_cells, self.order.num_rows), self.micro_batch_size):
            stop = min(start + self.micro_batch_size, num_cells)
            yield fetch(self.order.rows(draw.epoch, start, stop), draw)

    def fingerprint(self) -> str:
        """Identify the data and its order, for a run that resumes."""
        order = self.order
        content = [order.num_rows, order.shuffle, order.block, order.window, self.drop_last]
        data = getattr(self.source, "fingerprint", None)
        return "/".join(str(each) for each in [data() if callable(data) else len(self.source), *content])

    def state(self) -> None:
        """Return nothing: epoch and step are all that there is to know."""

    def load_state(self, state: None) -> None:
        """Take nothing; `steps` starts wherever it is told."""

    def close(self) -> None:
        """End worker processes; threads end with their iterators."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __getstate__(self) -> dict[str, Any]:
        """Travel to a worker process."""
        return {**self.__dict__, "_pool": None, "_announced": []}

    def _items(self, epoch: int, first: int, stop: int, size: int) -> Iterator[list[MicroBatch]]:
        keys = [_Key(epoch, step, stop, size) for step in range(first, stop)]
        try:
            if self.num_workers:
                if self._pool is None:
                    self._pool = WorkerPool(self._load, self.num_workers, self.prefetch, self.pin_memory)
                yield from self._pool.items(keys)
                return
            load = functools.partial(self._load, pin=self.pin_memory)
            if getattr(self.source, "is_inline", False) or self.prefetch == 0:
                yield from map(load, keys)
            else:
                yield from in_thread(load, keys, self.prefetch)
        finally:
            self._announced, self._last_step = [], -1
            expect = getattr(self.source, "expect", None)
            if expect is not None:
                expect(np.empty(0, np.int64))

    def _load(self, key: _Key, pin: bool = False) -> list[MicroBatch]:
        """Prepare one step."""
        self._announce(key)
        start = key.step * key.global_batch_size
        rows = self.order.rows(key.epoch, start, start + key.global_batch_size)
        arrangement = self._arrangement(rows)
        rows = rows if arrangement is None else rows[arrangement]
        draw = DrawKey(self.draw_seed, self.phase, key.epoch)
        fetch: Any = self.source.fetch
        if getattr(self.source, "pads_to_step", False):
            fetch = functools.partial(fetch, step_rows=rows)
        step = []
        num_filled = -(-len(rows) // self.micro_batch_size)
        for first in range(0, num_filled, self.world_size):
            begin = (first + self.rank) * self.micro_batch_size
            part = rows[begin : begin + self.micro_batch_size]
            num_cells, part = len(part), part if len(part) else rows[: self.micro_batch_size]
            try:
                batch = fetch(part, draw)
            except Exception as error:
                named = ", ".join(map(str, part[:_ROWS_NAMED])) + (", ..." if len(part) > _ROWS_NAMED else "")
                error.add_note(f"while loading rows {named} (epoch {key.epoch}, step {key.step})")
                raise
            step.append(MicroBatch(_pinned(batch) if pin else batch, num_cells, part))
        return step

    def _arrangement(self, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
        arrange = getattr(self.source, "arrangement", None)
        return None if arrange is None else arrange(rows)

    def _announce(self, key: _Key) -> None:
        """Tell the source which rows of the current and the next window this rank will want."""
        expect = getattr(self.source, "expect", None)
        if expect is None:
            return
        if key.step <= self._last_step:  # a new pass: what was announced has been dropped
            self._announced = []
        self._last_step = key.step
        order, start = self.order, key.step * key.global_batch_size
        stop = min(start + key.global_batch_size, order.num_rows)
        first, last = order.window_at(key.epoch, start), order.window_at(key.epoch, stop - 1)
        for window in range(first, min(last + 2, order.num_windows)):
            if (key.epoch, window, key.global_batch_size) in self._announced:
                continue
            self._announced = [*self._announced[-8:], (key.epoch, window, key.global_batch_size)]
            begin, end = order.window_start(key.epoch, window), order.window_start(key.epoch, window + 1)
            position = np.arange(max(begin, start), min(end, key.stop * key.global_batch_size))
            if not len(position):
                continue
            place = self._places(key, position)
            wanted = position[place // self.micro_batch_size % self.world_size == self.rank]
            worker = torch.utils.data.get_worker_info()
            if worker is not None:
                step = wanted // key.global_batch_size
                wanted = wanted[(step - key.step) % worker.num_workers == 0]
            if len(wanted):
                rows = order.window_rows(key.epoch, window)[wanted - begin]
                expect(rows)

    def _places(self, key: _Key, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where in its global batch, as it is arranged, each of consecutive positions of the order comes."""
        size, first = key.global_batch_size, int(position[0])
        place = position % size
        for step in range(first // size, int(position[-1]) // size + 1):
            arrangement = self._arrangement(self.order.rows(key.epoch, step * size, (step + 1) * size))
            if arrangement is None:
                break
            here = place[max(step * size - first, 0) : (step + 1) * size - first]
            here[:] = np.argsort(arrangement)[here]
        return place


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.pin_memory() if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
