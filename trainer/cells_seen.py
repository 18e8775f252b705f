"""The cells that the optimizer steps have been given which a run stands on: seen, repeated, skipped, by epoch.

They are counted from the row numbers of the micro-batches that every rank has trained on, never from the order in
which they should come: a faulty order, division among ranks or position after a resume shows. The account belongs to
the checkpoint, so that steps lost by a kill or a rollback do not count, and knows nothing of the number of ranks.

Memory is one bit for each row of the open epoch's data on every rank, one more on rank 0, and 1 MB.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.loader import MicroBatch
from trainer.cells_index import FILE, EpochCells, Stretch, decode_epochs, encode_epochs
from trainer.checkpoint_folder import SavedCheckpoint
from trainer.distributed import Ranks
from trainer.errors import CheckpointError
from trainer.phases import Phase
from trainer.progress import Progress

ROWS = "cells_seen.safetensors"
_ROWS_WAITING = 1 << 16


class CellsSeen:
    """Count cells; every rank has one and makes the same calls, and rank 0's knows the sums."""

    def __init__(self, ranks: Ranks) -> None:
        """Begin with nothing seen."""
        self.epochs: list[EpochCells] = []
        """What there is to say of each epoch, in order, as of the last `merge`; the last one may be open."""
        self._ranks = ranks
        self._of_all = np.empty(0, np.uint8)
        """On rank 0 one bit for each row of the open epoch's data: whether any rank was given it until `merge`."""
        self._own = np.empty(0, np.uint8)
        """The same of this rank since then."""
        self._waiting: list[NDArray[np.int64]] = []
        self._num_waiting = self._num_new = 0
        self._row_mask: NDArray[np.bool_] | None = None
        self._has_new = self._has_counted = self._is_in_stretch = False
        self._next_begins_with: Literal["start", "resume", "rollback"] = "start"

    def add_step(self, phase: Phase, progress: Progress, micro_batches: Sequence[MicroBatch]) -> None:
        """Count this rank's micro-batches of the step that `progress` has just counted."""
        epoch = self._opened(phase, progress)
        epoch.stretches[-1].last_step = progress.global_step
        self._has_new = self._has_counted = True
        for micro in micro_batches:
            if micro.num_cells == 0:
                continue
            self._num_new += micro.num_cells
            if epoch.num_cells is not None:
                # A copy: these rows are a view of the whole global batch's.
                self._waiting.append(micro.rows[: micro.num_cells].copy())
                self._num_waiting += micro.num_cells
        if self._num_waiting >= _ROWS_WAITING:
            self._mark()

    def add_skipped(self, num_cells: int) -> None:
        """Count a step of the open epoch, of so many cells over all ranks, whose update was left out."""
        self.epochs[-1].in_skipped_steps += num_cells

    def merge(self) -> None:
        """Bring together on rank 0 what all ranks were given; every rank comes here at the same step."""
        if not self._has_new:
            return
        self._mark()
        epoch = self.epochs[-1]
        epoch.drawn += int(self._ranks.sum([self._num_new])[0])
        self._num_new, self._has_new = 0, False
        if epoch.num_cells is None:
            return
        self._ranks.unite(self._own)
        if self._ranks.is_main:
            self._of_all |= self._own
            given = _num_set(self._of_all)
            if self._row_mask is None:
                epoch.seen = given
            else:
                epoch.seen = _num_set(self._of_all & np.packbits(self._row_mask, bitorder="little"))
                epoch.outside = given - epoch.seen
        self._own.fill(0)

    def end_epoch(self, phase: Phase, progress: Progress) -> None:
        """Close the account of the epoch that `progress` is about to leave; every rank comes here."""
        self.merge()
        if not self._is_open(phase, progress):
            return
        epoch = self.epochs[-1]
        epoch.is_over = True
        if epoch.num_cells is not None:
            epoch.left_out, epoch.left_out_by = _left_out(phase, progress, epoch.num_cells)
        self._of_all = self._own = np.empty(0, np.uint8)
        self._is_in_stretch = False

    def files(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, as of the last `merge`; rank 0's."""
        return {FILE: encode_epochs(self.epochs), ROWS: {"rows": self._of_all}}

    def restore(self, saved: SavedCheckpoint) -> list[str]:
        """Put it back to a checkpoint's and return what the user should know about it.

        Without an account in the checkpoint that this version can read, one begins with the next step.
        """
        self.epochs, self._of_all, missing = _account_of(saved, with_rows=self._ranks.is_main)
        self._own = np.empty(0, np.uint8)
        self._waiting = []
        self._num_waiting = self._num_new = 0
        self._has_new = self._is_in_stretch = False
        self._next_begins_with = "rollback" if self._has_counted else "resume"
        return [f"{missing}: what was seen before step {saved.step} is not known"] if missing else []

    def _is_open(self, phase: Phase, progress: Progress) -> bool:
        where = (phase.index, progress.epoch + 1, False)
        return bool(self.epochs) and where == (
            self.epochs[-1].phase_index,
            self.epochs[-1].epoch,
            self.epochs[-1].is_over,
        )

    def _opened(self, phase: Phase, progress: Progress) -> EpochCells:
        """Return the account of the epoch that a step has been taken in, begun anew where it was its first."""
        if self._is_in_stretch:
            return self.epochs[-1]
        source: Any = getattr(phase.loader, "source", None)  # a stream has none
        self._row_mask = getattr(source, "row_mask", None)
        num_bytes = 0 if source is None else -(-len(source) // 8)
        self._own = np.zeros(num_bytes, np.uint8)
        stretch = Stretch(
            num_ranks=self._ranks.count,
            first_step=progress.global_step,
            last_step=progress.global_step,
            begins_with=self._next_begins_with,
        )
        if self._is_open(phase, progress):
            self.epochs[-1].stretches.append(stretch)
        else:
            self._of_all = np.zeros(num_bytes if self._ranks.is_main else 0, np.uint8)
            order = getattr(phase.loader, "order", None)
            epoch = EpochCells(
                phase=phase.name,
                phase_index=phase.index,
                epoch=progress.epoch + 1,
                unit=phase.unit,
                num_cells=None if source is None else _num_training_cells(source),
                is_with_replacement=getattr(order, "is_with_replacement", False),
                unknown_until_step=None if progress.epoch_step == 1 else progress.global_step - 1,
                stretches=[stretch],
            )
            self.epochs.append(epoch)
        self._next_begins_with, self._is_in_stretch = "start", True
        return self.epochs[-1]

    def _mark(self) -> None:
        """Set the bits of the rows that wait for it."""
        if self._waiting:
            rows = np.concatenate(self._waiting)
            np.bitwise_or.at(self._own, rows >> 3, np.left_shift(1, rows & 7).astype(np.uint8))
            self._waiting, self._num_waiting = [], 0


def _account_of(
    saved: SavedCheckpoint, *, with_rows: bool
) -> tuple[list[EpochCells], NDArray[np.uint8], str]:
    """Return the counts and the rows that a checkpoint keeps, or why there are none: no step depends on them."""
    nothing = np.empty(0, np.uint8)
    if not saved.has(FILE):
        return [], nothing, f"{saved.folder} has no account of cells"
    try:
        epochs = decode_epochs(saved.text(FILE), str(saved.folder / FILE))
    except CheckpointError:
        return [], nothing, f"{saved.folder / FILE} is no account of cells that this version reads"
    return epochs, np.array(saved.shared(ROWS)["rows"]) if with_rows else nothing, ""


def _num_training_cells(source: Any) -> int:
    mask = getattr(source, "row_mask", None)
    return len(source) if mask is None else int(np.count_nonzero(mask))


def _num_set(bits: NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))


def _left_out(phase: Phase, progress: Progress, num_cells: int) -> tuple[int, str]:
    """Return how many cells the epoch was not to reach, and why; without a reason every cell was to come."""
    loader, config, num_steps = phase.loader, phase.config, progress.epoch_step
    num_planned = num_steps * loader.global_batch_size
    if num_steps >= loader.steps_per_epoch:
        num_planned = loader.num_cells
        why = "drop_last leaves them out" if loader.drop_last else "they are not in the phase's order"
    elif progress.is_stopped:
        why = "early stopping ended the phase"
    elif progress.epoch >= config.epochs:
        why = "epochs ended the phase"
    elif config.max_steps is not None and progress.phase_step >= config.max_steps:
        why = "max_steps ended the phase"
    elif config.max_steps_per_epoch is not None and num_steps >= config.max_steps_per_epoch:
        why = "max_steps_per_epoch ended the epoch"
    else:
        return 0, ""
    return (num_cells - num_planned, why) if num_planned < num_cells else (0, "")
