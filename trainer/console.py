"""What a run says on the terminal: notices, the start-up account, and the progress of its steps.

Rank 0 alone speaks. Which rank a process is comes from the launcher's environment, so that this works before
the Accelerator exists and imports no torch.
"""

import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from tqdm import tqdm

WIDTH = 100
"""Columns that the account and the tables are laid out for."""

# Control characters but for tab and line feed, those that turn the direction of text, and halves of characters.
_ACTS_ON_TERMINALS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_warned: set[str] = set()


def process_index() -> int:
    """Return this process's rank, from what its launcher says in the environment."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def is_main_process() -> bool:
    """Tell whether this process is rank 0, or the only one: the one that prints."""
    return process_index() == 0


def notice(text: str) -> None:
    """Print a line on rank 0, above a progress bar where there is one."""
    if is_main_process():
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()


def printable(text: str) -> str:
    """Write out what would act on a terminal: names out of files can hold commands to it, or turn its text around."""
    return _ACTS_ON_TERMINALS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def warn_once(text: str) -> None:
    """Print a warning on rank 0 the first time that this text is given."""
    if text not in _warned:
        _warned.add(text)
        notice(f"warning: {text}")


def counted(count: int, one: str, many: str = "") -> str:
    """Return a number with its noun, as in "1 file" or "2,000 files"; `many` where an s alone makes no plural."""
    return f"{count:,} {one if count == 1 else many or f'{one}s'}"


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], indent: str = "") -> str:
    """Lay out rows under headers; columns that hold numbers alone are aligned to the right."""
    cells = [[_cell_text(value) for value in row] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(headers, *cells, strict=True)]
    is_number = [
        bool(rows) and all(value is None or _is_number(value) for value in column)
        for column in zip(*rows, strict=True)
    ] or [False] * len(headers)
    lines = [headers, ["-" * width for width in widths], *cells]
    return "\n".join(
        (indent + "  ".join(_aligned(*parts) for parts in zip(line, widths, is_number, strict=True))).rstrip()
        for line in lines
    )


@dataclass(frozen=True)
class PhaseAccount:
    """What the start-up account says of one phase."""

    name: str
    num_cells: int | None
    """Training cells of one epoch; None where the loader does not tell."""
    num_validation_cells: int | None
    """None where the phase has no validation data."""
    num_epochs: int
    num_steps: int
    """Optimizer steps that the phase will run."""
    learning_rates: Mapping[str, float]
    """Peak learning rate of each parameter group by its name; one entry named "" where there is one group."""
    schedule: str
    """In words, as in "cosine, 100 warmup steps"."""
    micro_batch_size: int
    accumulation: int
    """Micro-batches in an optimizer step."""
    world_size: int
    unit: str = "cells"
    """What the phase's data counts."""

    @property
    def batch_arithmetic(self) -> str:
        """Say how the global batch comes about."""
        global_batch_size = self.micro_batch_size * self.accumulation * self.world_size
        return (
            f"micro-batch {self.micro_batch_size} x accumulation {self.accumulation} "
            f"x world size {self.world_size} = global batch {global_batch_size}"
        )


@dataclass(frozen=True)
class StartupAccount:
    """What a run says of itself before its first step."""

    run_name: str
    run_folder: str
    device: str
    """As in "2 x NVIDIA H200 (DDP)" or "cpu"."""
    precision: str
    num_parameters: int
    num_trainable_parameters: int
    num_threads: int
    """Threads of a process."""
    seed: int
    versions: Mapping[str, str]
    phases: Sequence[PhaseAccount]
    trackers: Sequence[str] = ()
    resumed_from: str | None = None
    """The checkpoint, with its step."""
    notes: Sequence[str] = ()
    """Further lines: what a section that does not act would have done, padding, frozen parameters."""


def render_startup(account: StartupAccount) -> str:
    """Return the start-up account as text."""
    parameters = f"{account.num_parameters:,}"
    if account.num_trainable_parameters != account.num_parameters:
        parameters += f", of which {account.num_trainable_parameters:,} train"
    threads = f"{counted(account.num_threads, 'thread')} a process"
    facts = [
        ("run", account.run_name),
        ("folder", account.run_folder),
        ("resumed from", account.resumed_from),
        ("device", f"{account.device}, {threads}"),
        ("precision", account.precision),
        ("parameters", parameters),
        ("seed", str(account.seed)),
        ("trackers", ", ".join(account.trackers) or "none"),
        ("versions", ", ".join(f"{name} {version}" for name, version in account.versions.items())),
    ]
    lines = [line for name, text in facts if text for line in _labelled(name, text)]
    arithmetic = {phase.batch_arithmetic: None for phase in account.phases}
    if len(arithmetic) == 1:
        lines += _labelled("batch", *arithmetic)
    else:
        lines += [
            line
            for phase in account.phases
            for line in _labelled("batch", f"{phase.name}: {phase.batch_arithmetic}")
        ]
    lines += [line for note in account.notes for line in _labelled("note", note)]
    return "\n".join([*lines, "", _phases_table(account.phases), ""])


def startup_account(account: StartupAccount) -> None:
    """Print the start-up account."""
    notice(render_startup(account))


def evaluation_line(phase: str, step: int, metrics: Mapping[str, float | None], seconds: float) -> None:
    """Say what an evaluation found.

    Args:
        phase: The phase whose validation data were used.
        step: The global step.
        metrics: Values by name, `loss` first.
        seconds: How long it took.
    """
    values = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items())
    notice(f"step {step}  validation of {phase}  {values}  ({_duration(seconds)})")


def checkpoint_line(step: int, folder: str, seconds: float) -> None:
    """Say that a checkpoint is complete, and for how long training waited for it."""
    waited = f"{seconds:.2f} s" if seconds < 10 else _duration(seconds)
    notice(f"step {step}  checkpoint {folder}  ({waited})")


class ProgressLine:
    """Show the progress of a phase: a bar on a terminal, else a line every `log_every_steps` steps."""

    def __init__(
        self,
        phase: str,
        num_steps: int | None,
        *,
        first_step: int = 0,
        log_every_steps: int = 10,
        unit: str = "cells",
        stream: TextIO | None = None,
    ) -> None:
        """Show nothing yet but an empty bar.

        Args:
            phase: The phase's name.
            num_steps: Optimizer steps that the phase will run; None where nothing tells.
            first_step: Steps of it that an earlier process ran.
            log_every_steps: Steps between two lines, or two updates of the bar's numbers.
            unit: What the phase's data counts.
            stream: Where to write; None means the standard output.
        """
        self._phase, self._num_steps, self._log_every_steps = phase, num_steps, max(1, log_every_steps)
        self._unit = unit
        self._stream = sys.stdout if stream is None else stream
        self._is_shown = is_main_process()
        self._bar: tqdm | None = None
        if self._is_shown and self._stream.isatty():
            self._bar = tqdm(
                total=num_steps,
                initial=first_step,
                desc=phase,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}",
            )
        self._first_step, self._started = first_step, time.monotonic()
        self._cells = self._seconds = self._wait_seconds = 0.0

    def update(self, record: Mapping[str, Any]) -> None:
        """Count one optimizer step.

        Args:
            record: The step's metrics: `global_step`, `phase_step`, `loss` (None for a step that had nothing
                to learn from), `lr`; and for the rates, which are averaged since the last line,
                `cells_per_second`, `data_wait_fraction` and `step_seconds`.
        """
        if not self._is_shown:
            return
        step_seconds = record.get("step_seconds", 1.0)
        self._seconds += step_seconds
        self._cells += record.get("cells_per_second", 0.0) * step_seconds
        self._wait_seconds += record.get("data_wait_fraction", 0.0) * step_seconds
        if self._bar is not None:
            self._bar.update()
        step = record["phase_step"]
        if step % self._log_every_steps and step != self._num_steps:
            return
        values = [f"loss {_short(record['loss'])}", f"lr {record['lr']:.2e}"]
        if self._seconds > 0:
            values.append(f"{self._cells / self._seconds:,.0f} {self._unit}/s")
            values.append(f"data wait {self._wait_seconds / self._seconds:.0%}")
        self._cells = self._seconds = self._wait_seconds = 0.0
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(values), refresh=True)
            return
        position = f"{self._phase} {step}" + ("" if self._num_steps is None else f"/{self._num_steps}")
        line = "  ".join([f"step {record['global_step']}", position, *values, *self._time_left(step)])
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _time_left(self, step: int) -> list[str]:
        done = step - self._first_step
        if self._num_steps is None or done <= 0 or step >= self._num_steps:
            return []
        return [f"{_duration((time.monotonic() - self._started) / done * (self._num_steps - step))} left"]


def _phases_table(phases: Sequence[PhaseAccount]) -> str:
    units = {phase.unit for phase in phases}
    is_mixed = len(units) > 1
    counts = "training" if is_mixed else "".join(units)
    headers = ["phase", counts, "validation", "epochs", "steps", "lr", "schedule"]

    def counted(count: int, unit: str) -> str:
        return f"{count:,} {unit}" if is_mixed else f"{count:,}"

    rows = [
        [
            phase.name,
            "?" if phase.num_cells is None else counted(phase.num_cells, phase.unit),
            "-" if phase.num_validation_cells is None else counted(phase.num_validation_cells, phase.unit),
            phase.num_epochs,
            f"{phase.num_steps:,}",
            ", ".join(f"{name} {lr:g}".strip() for name, lr in phase.learning_rates.items()),
            phase.schedule,
        ]
        for phase in phases
    ]
    return table(headers, rows)


def _labelled(label: str, text: str) -> list[str]:
    """Return text behind its label, broken between words so that it fits the width."""
    margin = 14
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and margin + len(lines[-1]) + 1 + len(word) > WIDTH:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return [f"{label if number == 0 else '':<{margin}}{line}" for number, line in enumerate(lines)]


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value) and (value in "?-" or value.replace(",", "").replace(".", "", 1).isdigit())
    return isinstance(value, int | float)


def _cell_text(value: Any) -> str:
    if value is None:
        return "-"
    return _short(value) if isinstance(value, float) else str(value)


def _aligned(text: str, width: int, to_the_right: bool) -> str:
    return text.rjust(width) if to_the_right else text.ljust(width)


def _short(value: float | None) -> str:
    """Return a number with four decimals, or in powers of ten where those would hide it."""
    if value is None:
        return "none"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3e}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole_seconds:02d} s" if minutes else f"{whole_seconds} s"
