"""What the files of a run folder say of its run, read without torch; what is missing or damaged is said, not fatal."""

import json
import re
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from data.plain_yaml import load_plain
from trainer.cells_index import FILE as CELLS_FILE
from trainer.cells_index import CellsIndex, read_index
from trainer.errors import UserError
from trainer.journal import END, read_events
from trainer.metrics_file import decode_record

_FIELDS = (
    "loss",
    "lr",
    "grad_norm",
    "cells",
    "tokens",
    "step_seconds",
    "cells_per_second",
    "data_wait_fraction",
    "peak_memory_bytes",
    "mfu",
    "is_skipped",
)
_WHERE = frozenset({"kind", "global_step", "phase", "phase_step", "epoch", "cells", "has_failed"})
_CHECKPOINT = re.compile(r"checkpoint_(0|[1-9][0-9]{0,17})")
_MAX_HEADER_BYTES = 100_000_000


@dataclass
class Steps:
    """Hold the optimizer steps of a run as columns; NaN stands for what a step did not record."""

    step: NDArray[np.int64]
    phase: list[str]
    columns: dict[str, NDArray[np.float64]]

    def __len__(self) -> int:
        """Return the number of steps."""
        return len(self.phase)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """Return a column."""
        return self.columns[name]

    def spans(self) -> list[tuple[str, slice]]:
        """Return the phases in order, each with where its steps lie."""
        starts = [i for i in range(len(self)) if i == 0 or self.phase[i] != self.phase[i - 1]]
        return [
            (self.phase[start], slice(start, end))
            for start, end in zip(starts, [*starts[1:], len(self)], strict=False)
        ]


@dataclass(frozen=True)
class Evaluation:
    """Hold one record of an evaluation, a benchmark or a score."""

    kind: str
    phase: str
    step: int
    epoch: int
    figures: dict[str, float]
    has_failed: bool = False


@dataclass(frozen=True)
class CheckpointFacts:
    """Say what a checkpoint's manifest says; a damaged one has no time."""

    step: int
    num_bytes: int
    time: str | None
    metric: float | None
    metric_phase: str
    world_size: int | None


@dataclass(frozen=True)
class Attempt:
    """Say when a process of the run began, and how it ended; one without an end was killed, or still runs."""

    start: dict[str, Any]
    end: dict[str, Any] | None


@dataclass
class RunFacts:
    """Hold all that is known of a run."""

    folder: Path
    steps: Steps
    evaluations: list[Evaluation]
    config: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    """Of the newest checkpoint's run state what is no tensor."""
    genes: dict[str, Any] = field(default_factory=dict)
    cells: CellsIndex | None = None
    """What each epoch was given; None: it is not known."""
    checkpoints: list[CheckpointFacts] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    """How the newest attempt ended; empty where it has not."""
    gaps: list[str] = field(default_factory=list)
    """What is missing or cannot be read."""

    @property
    def name(self) -> str:
        """Name the run as its folder does."""
        return self.folder.resolve().name

    @property
    def units(self) -> dict[str, str]:
        """Return what each phase's data counts, by its name; empty where nothing tells: then it is cells."""
        told = self.attempts[-1].start.get("units") if self.attempts else None
        return {str(name): str(unit) for name, unit in told.items()} if isinstance(told, dict) else {}


def read_run(folder: Path) -> RunFacts:
    """Read a run folder.

    Raises:
        UserError: it is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such run folder")
    if not any((folder / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(f"{folder}: holds neither config.yaml nor metrics.jsonl; name the folder of a run")
    gaps: list[str] = []
    steps, evaluations = _read_metrics(folder / "metrics.jsonl", gaps)
    run = RunFacts(folder, steps, evaluations, gaps=gaps)
    run.checkpoints = _read_checkpoints(folder, gaps)
    run.config = _read_yaml(folder / "config.yaml", gaps)
    if run.checkpoints:
        newest = folder / f"checkpoint_{run.checkpoints[-1].step}"
        run.state = _read_state(newest / "run_state.safetensors", gaps)
        if (newest / "genes.json").exists():
            run.genes = _read_json(newest / "genes.json", gaps)
    else:
        gaps.append(
            "there is no checkpoint yet: data fingerprints, technical batches and genes are not known"
        )
    run.cells = _read_cells(folder, gaps)
    _read_attempts(run)
    return run


def as_number(value: Any) -> float | None:
    """Return a number as a float; None for anything else."""
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None


def _read_metrics(path: Path, gaps: list[str]) -> tuple[Steps, list[Evaluation]]:
    step, phases = array("q"), []
    columns = {name: array("d") for name in _FIELDS}
    evaluations: list[Evaluation] = []
    for record in _records(path, gaps):
        kind, phase = record.get("kind", "train"), sys.intern(str(record.get("phase", "")))
        if kind == "train":
            step.append(record["global_step"])
            phases.append(phase)
            for name, column in columns.items():
                value = as_number(record.get(name))
                column.append(np.nan if value is None else value)
            continue
        figures = {
            name: value
            for name, recorded in record.items()
            if name not in _WHERE and (value := as_number(recorded)) is not None
        }
        epoch = record.get("epoch")
        evaluations.append(
            Evaluation(
                str(kind),
                phase,
                record["global_step"],
                epoch if isinstance(epoch, int) else 0,
                figures,
                record.get("has_failed") is True,
            )
        )
    return Steps(
        np.array(step, np.int64), phases, {name: np.array(column) for name, column in columns.items()}
    ), evaluations


def _records(path: Path, gaps: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the records that can be read, and note the lines that cannot."""
    damaged: list[int] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = decode_record(line)
                    if type(record["global_step"]) is not int or abs(record["global_step"]) >= 2**62:
                        raise ValueError
                except (ValueError, KeyError, RecursionError, OverflowError):
                    damaged.append(number)
                    continue
                yield record
    except OSError as error:
        gaps.append(f"{path.name} cannot be read: {error.strerror}")
    if damaged:
        shown = ", ".join(map(str, damaged[:8])) + (" and more" if len(damaged) > 8 else "")
        gaps.append(
            f"{path.name}: {len(damaged)} lines are no records and are left out (line {shown})"
            if len(damaged) > 1
            else f"{path.name}: line {shown} is no record and is left out"
        )


def _read_checkpoints(folder: Path, gaps: list[str]) -> list[CheckpointFacts]:
    found = []
    for path in folder.iterdir():
        match = _CHECKPOINT.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        manifest = _read_json(path / "manifest.json", gaps)
        summary = manifest.get("summary")
        found.append(
            CheckpointFacts(
                step=int(match[1]),
                num_bytes=sum(file.stat().st_size for file in path.iterdir() if file.is_file()),
                time=manifest.get("time") if isinstance(manifest.get("time"), str) else None,
                metric=as_number(manifest.get("metric")),
                metric_phase=str(summary.get("metric_phase", "")) if isinstance(summary, dict) else "",
                world_size=manifest.get("world_size")
                if isinstance(manifest.get("world_size"), int)
                else None,
            )
        )
    return sorted(found, key=lambda each: each.step)


def _read_json(path: Path, gaps: list[str]) -> dict[str, Any]:
    where = f"{path.parent.name}/{path.name}"
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        gaps.append(f"{where} cannot be read: {error.strerror}")
        return {}
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        gaps.append(f"{where} is damaged")
        return {}
    return content


def _read_yaml(path: Path, gaps: list[str]) -> dict[str, Any]:
    try:
        content = load_plain(path.read_text(encoding="utf-8"))
    except OSError as error:
        gaps.append(f"{path.name} cannot be read: {error.strerror}")
        return {}
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        gaps.append(f"{path.name} is damaged")
        return {}
    return content


def _read_cells(folder: Path, gaps: list[str]) -> CellsIndex | None:
    try:
        return read_index(folder)
    except OSError as error:
        gaps.append(f"{CELLS_FILE} cannot be read: {error.strerror}")
    except ValueError:
        gaps.append(f"{CELLS_FILE} is damaged")
    return None


def _read_state(path: Path, gaps: list[str]) -> dict[str, Any]:
    """Return what the header of a state file holds beside tensors (see statefile.py)."""
    where = f"{path.parent.name}/{path.name}"
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError
            header = json.loads(file.read(length))
        state = _plain(json.loads(header["__metadata__"]["tree"]))
        if isinstance(state, dict):
            return state
    except OSError as error:
        gaps.append(f"{where} cannot be read: {error.strerror}")
        return {}
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    gaps.append(f"{where} is damaged")
    return {}


def _plain(node: Any) -> Any:
    """Return the value of a node of a state file's tree; None in the place of tensors, arrays and bytes."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    for tag in ("dict", "ordered_dict", "counter"):
        if tag in node:
            return {key: _plain(item) for key, item in node[tag]}
    if "tuple" in node:
        return [_plain(item) for item in node["tuple"]]
    return int(node["int"], 16) if "int" in node else float(node["float"]) if "float" in node else None


def _read_attempts(run: RunFacts) -> None:
    try:
        events, num_damaged = read_events(run.folder)
    except OSError as error:
        events, num_damaged = [], 0
        run.gaps.append(f"events.jsonl cannot be read: {error.strerror}")
    if num_damaged:
        run.gaps.append(f"events.jsonl: {num_damaged} damaged lines are left out")
    for event in events:
        if event["event"] != END:
            run.attempts.append(Attempt(event, None))
        elif run.attempts:  # the last of several ends counts: a watch says why before the process ends
            run.attempts[-1] = Attempt(run.attempts[-1].start, event)
    if run.attempts:
        run.status = run.attempts[-1].end or {}
        return
    run.gaps.append(
        "there is no events.jsonl: starts, versions and notes of the start-up account are not known"
    )
    if (run.folder / "exit_status.json").exists():
        run.status = _read_json(run.folder / "exit_status.json", run.gaps)
