"""What rank 0 writes and says of a run: metrics.jsonl, trackers, and the terminal."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trainer.cells_index import FILE as CELLS_FILE
from trainer.cells_index import CellsIndex, EpochCells, lines, read_index, unit_of, write_index
from trainer.config.schema import RunConfig
from trainer.console import ProgressLine, checkpoint_line, evaluation_line, notice
from trainer.errors import UserError
from trainer.metrics_file import MetricsFile
from trainer.phases import Phase
from trainer.progress import Progress
from trainer.trackers import Trackers, build_trackers

NOT_METRICS = frozenset({"kind", "global_step", "phase", "phase_step", "epoch", "cells"})


class Recorder:
    """Write a run's records; on every rank but the first, and in a rehearsal, do nothing."""

    def __init__(self, folder: Path | None = None) -> None:
        """Record into a run folder; None records nothing."""
        self._folder = folder
        self._metrics: MetricsFile | None = None
        self._trackers: Trackers | None = None
        self._line: ProgressLine | None = None
        self._cells = CellsIndex(step=0, epochs=[])
        self._clock = time.perf_counter()

    @classmethod
    def open(
        cls,
        config: RunConfig,
        folder: Path,
        resume_step: int | None = None,
        tracker_state: Mapping[str, Any] | None = None,
        redone: Mapping[str, Any] | None = None,
        epochs: Sequence[EpochCells] = (),
    ) -> "Recorder":
        """Open the run's files.

        A run that goes on from a checkpoint drops the records after its step, and those redone at it, and puts the
        account of cells back to the checkpoint's `epochs`. It says what it computes again, and writes it down before
        the trackers start: a start that ends there has dropped the records that told it.
        """
        recorder = cls(folder)
        with recorder._writing():
            recorder._metrics = MetricsFile(folder / "metrics.jsonl", resume_step=resume_step, redone=redone)
        recorder._cells = _cells_so_far(folder) or recorder._cells
        recorder._cells.steps_computed_again += recorder._metrics.num_dropped_steps
        recorder._cells.cells_computed_again += recorder._metrics.num_dropped_cells
        if resume_step is not None:
            recorder._goes_on(resume_step, epochs)
        try:
            with recorder._writing():
                recorder._trackers = build_trackers(
                    config.trackers,
                    run_folder=_tracker_folder(config, folder),
                    run_name=config.run_name,
                    config=config.model_dump(mode="json"),
                    resume_state=tracker_state,
                    redone=redone,
                    timeout_seconds=config.distributed_timeout_seconds,
                )
        except BaseException:
            recorder._metrics.close()
            raise
        return recorder

    def phase_begins(self, phase: Phase, progress: Progress) -> None:
        """Start a phase's progress line."""
        if self._metrics is None:
            return
        if self._line is not None:
            self._line.close()
        if phase.config.epochs == 0:
            notice(f"phase '{phase.name}' is skipped: epochs is 0")
            return
        self._line = ProgressLine(
            phase.name,
            phase.total_steps,
            first_step=progress.phase_step,
            log_every_steps=phase.config.log_every_steps,
            unit=phase.unit,
        )

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Write the records of optimizer steps."""
        if self._metrics is None:
            return
        assert self._line is not None
        for record in records:
            self._append(record)
            self._line.update(record)
        self._clock = time.perf_counter()

    def evaluated(self, phase: Phase, record: dict[str, Any]) -> None:
        """Write an evaluation's record."""
        if self._metrics is None:
            return
        self._append(record)
        values = {name: value for name, value in record.items() if name not in NOT_METRICS}
        evaluation_line(phase.name, record["global_step"], values, time.perf_counter() - self._clock)

    def benchmarked(self, record: dict[str, Any], headline: str) -> None:
        """Write the record of a benchmark or a score, which may belong to an earlier step, and say what it found."""
        if self._metrics is None:
            return
        self._append(record)
        if headline:
            where = f"{record['phase']} after epoch {record['epoch']}"
            notice(f"step {record['global_step']}  {record['kind']} of {where}  {headline}")

    def saved(self, step: int, folder: str, seconds: float) -> None:
        """Say that a checkpoint has been handed to the writer."""
        if self._metrics is not None:
            checkpoint_line(step, folder, seconds)

    def account_for_cells(self, step: int, epochs: Sequence[EpochCells]) -> None:
        """Write what each epoch has been given, and say it of the open one and of those ended since the last time."""
        if self._folder is None or self._metrics is None:
            return
        num_said = sum(epoch.is_over for epoch in self._cells.epochs)
        for line in lines(epochs[num_said:]):
            notice(line)
        self._cells.step, self._cells.epochs = step, [epoch.model_copy() for epoch in epochs]
        self._write_cells()

    def sync(self) -> None:
        """Bring the records to the disk, before a checkpoint that counts on them."""
        if self._metrics is not None:
            with self._writing():
                self._metrics.sync()

    def tracker_state(self) -> dict[str, Any]:
        """Return what the trackers need to go on after a resume."""
        return {} if self._trackers is None else self._trackers.state()

    def _goes_on(self, step: int, epochs: Sequence[EpochCells]) -> None:
        """Put the account of cells back to the checkpoint that the run goes on from, and say what it computes again."""
        assert self._metrics is not None
        unit = unit_of([*self._cells.epochs, *epochs])
        self._cells.step, self._cells.epochs = step, [epoch.model_copy() for epoch in epochs]
        if self._metrics.num_dropped_steps:
            notice(
                f"{self._metrics.num_dropped_cells:,} {unit} of {self._metrics.num_dropped_steps:,} steps after step "
                f"{step} are computed again: they were lost, and count once"
            )
        self._write_cells()

    def _write_cells(self) -> None:
        assert self._folder is not None
        try:
            write_index(self._folder, self._cells)
        except OSError as error:
            notice(f"{self._folder / CELLS_FILE} is not written ({error.strerror})")

    def _append(self, record: dict[str, Any]) -> None:
        """Write a record down, and hand it to the trackers."""
        assert self._metrics is not None and self._trackers is not None
        with self._writing():
            self._metrics.append(record)
            self._trackers.log(record, record["global_step"])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Name the run folder where its disk takes no more records."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._folder}: the run's records cannot be written ({error}); free some space, or make it writable, "
                "and go on with resume_from: auto: the last complete checkpoint stays as it is"
            ) from error

    def close(self, exit_code: int) -> None:
        """Finish the trackers and the terminal's line; what a full disk leaves unwritten is said."""
        closing = [
            None if self._line is None else self._line.close,
            None if self._trackers is None else partial(self._trackers.finish, exit_code),
            None if self._metrics is None else self._metrics.close,
        ]
        for close in filter(None, closing):
            try:
                close()
            except OSError as error:
                notice(f"{self._folder}: not all records are written ({error})")


def _cells_so_far(folder: Path) -> CellsIndex | None:
    """Return the account of cells that an earlier start left in the run folder, if it can be read."""
    try:
        return read_index(folder)
    except (OSError, ValueError) as error:
        notice(
            f"{folder / CELLS_FILE} cannot be read ({type(error).__name__}): how many cells earlier starts computed "
            "again is not known"
        )
        return None


def _tracker_folder(config: RunConfig, run_folder: Path) -> Path:
    """Return where trackers write: the run folder, or the folder of its name under `log_dir`."""
    if config.log_dir is None:
        return run_folder
    folder = Path(config.log_dir) / run_folder.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"log_dir: cannot make {folder} ({error.strerror})") from error
    return folder
