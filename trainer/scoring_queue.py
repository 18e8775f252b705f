"""What rank 0 of a run has scored beside training: one process at a time, requests on disk, results as records.

Requests lie in the run folder's `benchmarks/`. A result is recorded when it is there, at the latest at the end of the
run. A request lies on disk until it is scored, so that a resumed run finds it. A process answers into a file of its own
in `benchmarks/scratch/`: one that outlives its run for a moment cannot answer for the next.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer import preemption
from trainer.atomicfile import replace_text
from trainer.console import notice, warn_once
from trainer.metrics_file import read_metrics
from trainer.preemption import Preempted
from trainer.run import Run

FOLDER = "benchmarks"
AT_START = "at_start"
"""The network as it was at the run's first step: at random initialisation, unless it began with other weights."""
BENCHMARK, SCORE = "benchmark", "score"
"""Kinds of requests, and of their records: of embeddings, and of predicted cells."""
_MODEL = "model"
_WHERE = ("kind", "global_step", "phase", "phase_step", "epoch")
_FILES = ("own_file", "output", "cells", "baselines", "shared")
"""What names files of the queue's folder."""
_SECONDS_BETWEEN_LOOKS = 0.5
"""For a request to end, while nothing but scoring is left to do."""
_HEADLINES = {
    "linear_probe": "accuracy",
    "embedding_quality": "bio_conservation",
    "perturbation": "pearson",
    "vcc2025_score": "avg_score",
    "vcc2026_score": "avg_score",
}


class ScoringQueue:
    """What is to be scored: at most one process at a time, in the order in which it was asked for."""

    def __init__(self, run: Run, folder: Path) -> None:
        """Take the run, at the checkpoint that it goes on from, and its folder."""
        self._run = run
        self.folder = folder / FOLDER
        self._metrics = folder / "metrics.jsonl"
        self._worker: tuple[subprocess.Popen[bytes], Path, Path] | None = None
        """The process under way, its request, and the file in which it answers."""
        self._waiting: list[Path] = []
        self._notes: dict[str, list[str]] = {}
        # A resumed run may hold other cells out: what it describes does not replace what is still being scored.
        self._token = secrets.token_hex(4)
        self.folder.mkdir(exist_ok=True)
        self.rewind(run.progress.global_step)

    def shared(self, phase_index: int) -> str:
        """Return how the names of files begin that all requests of a phase share; they go when the run is done."""
        return f"phase{phase_index}.{self._token}"

    def has(self, name: str) -> bool:
        """Tell whether something of this name has been asked for, or scored."""
        return any((self.folder / f"{name}{suffix}").exists() for suffix in (".request.json", ".result.json"))

    def submit(self, name: str, request: dict[str, Any]) -> None:
        """Ask for a score; the files that the request names lie there, and go when `own_file` has been scored.

        The request holds `kind`, the position in the run, `own_file`, and what `trainer.scoring.worker` needs.
        """
        path = self.folder / f"{name}.request.json"
        replace_text(path, json.dumps(request, indent=2) + "\n")
        self._waiting.append(path)
        self.poll()

    def poll(self) -> None:
        """Record what has been scored, and start on what comes next."""
        if self._worker is not None:
            process, request, answer = self._worker
            if process.poll() is None:
                return
            self._worker = None
            self._finish(request, answer, process.returncode)
        if self._waiting:
            self._start(self._waiting.pop(0))

    def close(self, *, wait: bool) -> None:
        """Wait for what is still to be scored, or leave it to the next start of the run.

        Raises:
            Preempted: the process was asked to end meanwhile; what is not scored is left to the next start too.
        """
        if not wait:
            self._kill_worker()
            return
        if self._worker or self._waiting:
            notice("waiting for the last benchmarks")
        while self._worker or self._waiting:
            if self._worker:
                self._wait_for(self._worker[0])
            self.poll()
        self._clear_scratch()
        for path in self.folder.glob("phase*.*.*"):
            if path.name.split(".")[0].removeprefix("phase").isdigit():
                path.unlink()

    def _wait_for(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            asked = preemption.request(self._run.config.max_wall_seconds)
            if asked is not None:
                self._kill_worker()
                raise Preempted(
                    f"{asked} while the last benchmarks were scored; a restart scores what is left"
                )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_BETWEEN_LOOKS)

    def _kill_worker(self) -> None:
        if self._worker is not None:
            process = self._worker[0]
            process.kill()
            process.wait()

    def rewind(self, step: int) -> None:
        """Forget what came after a step that the run goes back to, and make up for what is not recorded."""
        self.close(wait=False)
        self._worker, self._waiting = None, []
        recorded = set()
        if self._metrics.exists():
            recorded = {
                tuple(record[key] for key in _WHERE)
                for record in read_metrics(self._metrics)
                if record["kind"] in (BENCHMARK, SCORE)
            }
        for path in sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
            kind = path.suffixes[0] if len(path.suffixes) > 1 else ""
            if kind not in (".request", ".result"):
                continue
            told = _read(path)
            if told is None:
                continue
            if told["global_step"] > step:
                path.unlink()
                (self.folder / told.get("own_file", path.name)).unlink(missing_ok=True)
            elif kind == ".request":
                self._waiting.append(path)
            elif tuple(told[key] for key in _WHERE) not in recorded:
                self._record(told)
        self._waiting = [path for path in self._waiting if not _result_of(path).exists()]
        self.poll()

    def _start(self, request: Path) -> None:
        scratch = self._clear_scratch()
        scratch.mkdir(exist_ok=True)  # a process that a killed run left behind may still write there
        answer = scratch / f"{secrets.token_hex(8)}.json"
        with open(request.with_name("worker.log"), "ab") as log:
            search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
            arguments = [str(request), str(answer), str(os.getpid())]
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "trainer.scoring.worker", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": search_path, "TMPDIR": str(scratch.absolute())},
            )
        self._worker = process, request, answer

    def _clear_scratch(self) -> Path:
        """Remove what a process that was killed left of its temporary files, and return where they go."""
        scratch = self.folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        return scratch

    def _finish(self, request: Path, answer: Path, exit_code: int) -> None:
        asked = json.loads(request.read_text())
        if answer.exists():
            told = json.loads(answer.read_text())
        else:
            told = {key: asked[key] for key in _WHERE}
            told["error"] = f"the process ended with exit code {exit_code} and left no result"
        replace_text(_result_of(request), json.dumps(told, indent=2) + "\n")
        self._record(told)
        request.unlink(missing_ok=True)
        (self.folder / asked["own_file"]).unlink(missing_ok=True)

    def _record(self, told: dict[str, Any]) -> None:
        record = {key: told[key] for key in _WHERE}
        if "error" in told:
            warn_once(
                f"the {told['kind']} of phase '{told['phase']}' after epoch {told['epoch']} failed, and training goes "
                f"on: {told['error']} (see {self.folder / 'worker.log'})"
            )
            self._run.recorder.benchmarked({**record, "has_failed": True}, "")
            return
        figures = {(row["benchmark"], row["metric"], row["representation"]): row for row in told["rows"]}
        for (benchmark, metric, representation), row in figures.items():
            name = f"{benchmark}/{metric}"
            other = f"{name}/{representation.replace(' ', '_')}"
            record[name if representation == _MODEL else other] = row["value"]
            if representation == _MODEL and row["spread"] is not None:
                record[f"{name}_spread"] = row["spread"]
        if told["kind"] == BENCHMARK and told["global_step"] > 0:
            record |= self._at_start(told["phase"])
        self._run.recorder.benchmarked(record, _headline(told["rows"]))
        notes = [f"{name}: {note}" for name, notes in told["notes"].items() for note in notes]
        if told["kind"] == SCORE and notes != self._notes.get(told["phase"]):
            self._notes[told["phase"]] = notes
            for note in notes:
                notice(f"score of phase '{told['phase']}': {note}")

    def _at_start(self, phase: str) -> dict[str, float]:
        """Return the figures of the network as it was at the run's first step, where this phase began it."""
        for path in self.folder.glob("*_epoch0.result.json"):
            told = json.loads(path.read_text())
            if told["phase"] == phase and told["global_step"] == 0 and "rows" in told:
                return {
                    f"{row['benchmark']}/{row['metric']}/{AT_START}": row["value"]
                    for row in told["rows"]
                    if row["representation"] == _MODEL
                }
        return {}


def start_scoring(run: Run, folder: Path) -> None:
    """Begin to score on rank 0 of a run that asks for any of it, with what an earlier process left undone."""
    if any(phase.config.benchmarks is not None or phase.config.scoring is not None for phase in run.phases):
        run.scores = ScoringQueue(run, folder)


def finish_scoring(run: Run, *, wait: bool) -> None:
    """End a run's scoring; a run that is done waits for it, one that goes on later makes up for it then."""
    if run.scores is not None:
        run.scores.close(wait=wait)


def _headline(rows: list[dict[str, Any]]) -> str:
    """Say one figure of each benchmark, beside those of what took no training."""
    parts = []
    for title in dict.fromkeys(row["benchmark"] for row in rows):
        metric = next((m for name, m in _HEADLINES.items() if title.startswith(name)), "r2")
        found = {
            r["representation"]: r["value"] for r in rows if (r["benchmark"], r["metric"]) == (title, metric)
        }
        if _MODEL in found:
            others = ", ".join(f"{name} {value:.3f}" for name, value in found.items() if name != _MODEL)
            parts.append(f"{title} {metric} {found[_MODEL]:.3f}" + (f" ({others})" if others else ""))
    return "; ".join(parts)


def _read(path: Path) -> dict[str, Any] | None:
    """Return a request or a result that lies there from before; None for what no run has left there.

    A run folder may have come from anywhere, and files that a request names are deleted and written.
    """
    try:
        told = json.loads(path.read_text())
        names = [told[key] for key in _FILES if key in told]
        is_ours = all(key in told for key in _WHERE) and type(told["global_step"]) is int
        if is_ours and all(name not in ("", "..") and Path(name).name == name for name in names):
            return told
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    warn_once(f"{path} is nothing that a run has left there, and is passed over; delete it")
    return None


def _result_of(request: Path) -> Path:
    return request.with_name(request.name.replace(".request.json", ".result.json"))
