"""`cells_seen.json` of a run folder: what each epoch was given, in numbers and in words; read without torch.

Nothing that a run computes depends on it: the account itself is part of every checkpoint (cells_seen.py). Fields that
this version does not know are read over: a later version has them.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from trainer.atomicfile import replace_text
from trainer.console import counted
from trainer.errors import CheckpointError

FILE = "cells_seen.json"


class Stretch(BaseModel):
    """Say which steps of an epoch one process group computed without a break."""

    model_config = ConfigDict(extra="ignore", strict=True)

    num_ranks: int
    first_step: int
    """Global step, counted from 1."""
    last_step: int
    begins_with: Literal["start", "resume", "rollback"]


class EpochCells(BaseModel):
    """Count the cells that one epoch's optimizer steps were given, on all ranks."""

    model_config = ConfigDict(extra="ignore", strict=True)

    phase: str
    phase_index: int
    epoch: int
    """From 1."""
    unit: str = "cells"
    """What is counted, where the data names it: sets of cells, circuits."""
    num_cells: int | None
    """Cells of the phase's training data; None: its loader has no row numbers, and cells cannot be told apart."""
    is_with_replacement: bool = False
    """Whether its order draws cells with replacement, so that repeats are meant."""
    drawn: int = 0
    """Cells given, counted each time."""
    seen: int = 0
    """Different cells of the training data given; 0 where they cannot be told apart."""
    outside: int = 0
    """Different cells given that are not among the phase's training cells, such as held-out ones."""
    in_skipped_steps: int = 0
    """Of `drawn`, those of steps whose update was left out."""
    is_over: bool = False
    left_out: int = 0
    """Cells that the epoch was not to reach."""
    left_out_by: str = ""
    """What ended the epoch before them."""
    unknown_until_step: int | None = None
    """The account begins after this global step; None: with the epoch."""
    stretches: list[Stretch] = Field(min_length=1)

    @property
    def repeated(self) -> int | None:
        """Return how often a cell was given that had been given before; None: cells cannot be told apart."""
        return None if self.num_cells is None else self.drawn - self.seen - self.outside

    @property
    def skipped(self) -> int | None:
        """Return the cells that the epoch should have given and has not; None where nothing tells (yet)."""
        if self.num_cells is None or not self.is_over or self.unknown_until_step is not None:
            return None
        return 0 if self.is_with_replacement else max(0, self.num_cells - self.left_out - self.seen)

    @property
    def faults(self) -> list[str]:
        """Return what should not be."""
        repeated = 0 if self.is_with_replacement else self.repeated
        counts = [
            (repeated, "repeated"),
            (self.skipped, "skipped"),
            (self.outside, f"not of its training {self.unit}"),
        ]
        return [f"{count:,} {what}" for count, what in counts if count]

    @property
    def history(self) -> str:
        """Return on how many ranks it was computed, and what interrupted it; empty for one rank without a break."""
        ranks = [str(number) for number, _ in groupby(each.num_ranks for each in self.stretches)]
        parts = [] if ranks == ["1"] else [", then ".join([counted(int(ranks[0]), "rank"), *ranks[1:]])]
        for kind, noun in (("resume", "restart"), ("rollback", "rollback")):
            count = sum(each.begins_with == kind for each in self.stretches[1:])
            parts += [counted(count, noun)] if count else []
        return "; ".join(parts)


_EPOCHS = TypeAdapter(list[EpochCells])


class CellsIndex(BaseModel):
    """Hold the account of a run as of a step."""

    model_config = ConfigDict(extra="ignore", strict=True)

    step: int
    """Global step that it is as of."""
    epochs: list[EpochCells]
    steps_computed_again: int = 0
    """Steps that were lost by a kill or a rollback after they had been recorded; they count once above."""
    cells_computed_again: int = 0
    """Cells of those steps."""

    @property
    def unknown_until_step(self) -> int:
        """Return the global step after which the account begins: 0, but for a run that began without one."""
        return self.epochs[0].stretches[0].first_step - 1 if self.epochs else 0


def unit_of(epochs: Sequence[EpochCells]) -> str:
    """Return what all of these epochs count, in one word: samples where they count different things."""
    units = {epoch.unit for epoch in epochs} or {"cells"}
    return units.pop() if len(units) == 1 else "samples"


def describe(epoch: EpochCells) -> str:
    """Say an epoch's counts in words."""
    if epoch.num_cells is None:
        said = f"{epoch.drawn:,} given; its loader has no row numbers, so {epoch.unit} cannot be told apart"
    else:
        once = " once" if not epoch.repeated else ""
        of_all = "" if epoch.seen == epoch.num_cells else f" of {epoch.num_cells:,}"
        said = f"{epoch.seen:,}{of_all} seen{once}, {epoch.repeated:,} repeated"
        if epoch.is_with_replacement:
            said += " (drawn with replacement)"
        if epoch.skipped is not None and not epoch.is_with_replacement:
            said += f", {epoch.skipped:,} skipped"
        if epoch.left_out and not epoch.is_with_replacement:
            said += f", {epoch.left_out:,} not reached: {epoch.left_out_by}"
    if epoch.outside:
        said += f", {epoch.outside:,} not of its training {epoch.unit}"
    if epoch.in_skipped_steps:
        said += f", {epoch.in_skipped_steps:,} in skipped steps"
    if epoch.unknown_until_step is not None:
        said += f", unknown up to step {epoch.unknown_until_step:,}"
    said += "" if epoch.is_over else " so far"
    return f"{said} ({epoch.history})" if epoch.history else said


def lines(epochs: Sequence[EpochCells]) -> list[str]:
    """Return a line for each epoch; neighbours of which the same is to be said share one."""
    said = []
    for (unit, phase, words, is_faulty), group in groupby(
        epochs, key=lambda each: (each.unit, each.phase, describe(each), bool(each.faults))
    ):
        numbers = [each.epoch for each in group]
        which = f"epoch {numbers[0]}" if len(numbers) == 1 else f"epochs {numbers[0]} to {numbers[-1]}, each"
        said.append(f"{'warning: ' if is_faulty else ''}{unit} of '{phase}' {which}: {words}")
    return said


def encode_epochs(epochs: Sequence[EpochCells]) -> str:
    """Return the text in which a checkpoint keeps the counts."""
    return _EPOCHS.dump_json(list(epochs), indent=1).decode() + "\n"


def decode_epochs(text: str, where: str) -> list[EpochCells]:
    """Return the counts that a checkpoint keeps.

    Raises:
        CheckpointError: it is another text.
    """
    try:
        return _EPOCHS.validate_json(text)
    except ValueError as error:
        raise CheckpointError(f"{where} is no account of cells: {error}") from error


def write_index(folder: Path, index: CellsIndex) -> None:
    """Replace the index of a run folder."""
    replace_text(folder / FILE, index.model_dump_json(indent=1) + "\n")


def read_index(folder: Path) -> CellsIndex | None:
    """Return the index of a run folder; None where there is none.

    Raises:
        OSError, ValueError: it cannot be read, or is damaged.
    """
    try:
        text = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return None
    return CellsIndex.model_validate_json(text)
