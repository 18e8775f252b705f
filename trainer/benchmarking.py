"""Benchmarks of a phase's held-out cells between its epochs.

All ranks embed their share of the cells, without masking. Rank 0 leaves the embeddings in the run folder's
`benchmarks/`, where a process of its own scores them while training goes on; a result is recorded when it is there, at
the latest at the end of the run. A request lies on disk until it is scored, so that a resumed run finds it.
"""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from data.hashing import DrawKey
from data.manifest import UNLABELLED
from trainer.atomicfile import replace_text
from trainer.console import notice, warn_once
from trainer.errors import ConfigError, UserError
from trainer.losses import move_to_device
from trainer.metrics_file import read_metrics
from trainer.phases import Phase
from trainer.run import Run, is_due, leave, position, stop_request
from trainer.scoring.cells import Cells, check_labels, save_cells
from trainer.scoring.specs import Spec, parse_specs

FOLDER = "benchmarks"
AT_START = "at_start"
"""The network as it was at the run's first step: at random initialisation, unless it began with other weights."""
_MODEL = "model"
_EPOCH = -1
_TARGET_SUM = 1e4
_HEADLINES = {"linear_probe": "accuracy", "embedding_quality": "bio_conservation", "perturbation": "pearson"}


def benchmark_if_due(run: Run, phase: Phase) -> None:
    """Embed the held-out cells and hand them to the scorer, where an epoch's end is due for it; every rank comes here.

    Called at the end of every epoch and at the start of a phase, so that what a stop left out is made up for.
    """
    settings, progress = phase.config.benchmarks, run.progress
    if settings is None or phase.config.epochs == 0 or progress.epoch_step:
        return
    if not (is_due(progress.epoch, settings.every_epochs) or progress.global_step == 0):
        return
    queue = run.benchmarks
    if run.ranks.broadcast(queue is not None and queue.has(phase, progress.epoch)):
        return
    rows = held_out_rows(phase)
    embedding = _embed(run, phase, rows)
    if queue is not None:
        assert embedding is not None
        queue.submit(phase, position(progress, phase), rows, embedding)


def check_benchmarks(run: Run) -> None:
    """Find before training what would let a benchmark fail: data, obs columns, labels, the model.

    Raises:
        ConfigError: says what, and where.
    """
    for phase in run.phases:
        settings, where = phase.config.benchmarks, f"datasets.{phase.index}.benchmarks"
        if settings is None or phase.config.epochs == 0:
            continue
        if not callable(getattr(run.module.model, "encode", None)):
            raise ConfigError(
                f"{where}: {type(run.module.model).__name__} has no method encode(batch), which embeds cells"
            )
        source = getattr(phase.validation, "source", None)
        if not all(callable(getattr(source, name, None)) for name in ("fetch_unmasked", "obs")):
            raise ConfigError(
                f"{where}: phase '{phase.name}' has no held-out cells with obs columns; benchmarks need a corpus of "
                "this program's and val_fraction above 0"
            )
        _check_labels(phase, where)


def held_out_rows(phase: Phase) -> NDArray[np.int64]:
    """Return the rows of the held-out cells that are embedded, ascending, the same in every epoch and on every rank."""
    assert phase.config.benchmarks is not None
    order = phase.validation.order
    count = min(order.num_rows, phase.config.benchmarks.max_cells)
    return np.sort(order.rows(_EPOCH, 0, count))


@torch.no_grad()
def _embed(run: Run, phase: Phase, rows: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """Return the embeddings [n, D] on rank 0; each rank runs equally many forward passes on its share."""
    assert phase.config.benchmarks is not None
    strategy, ranks, progress = run.strategy, run.ranks, run.progress
    size = phase.config.benchmarks.batch_size
    draw = DrawKey(run.config.seed, phase.index, _EPOCH)
    parts: list[NDArray[np.float32]] = []
    with strategy.evaluating():
        for first in range(0, len(rows), size * ranks.count):
            run.activity.begin("benchmark", progress.global_step, is_collective=True)
            if ranks.sum([stop_request(run) is not None])[0] > 0:
                leave(run)  # the benchmark begins anew at the next start
            start = first + ranks.index * size
            # A rank without cells embeds one that nobody asks for: under ZeRO-3 all take part in every forward pass.
            mine = rows[start : start + size] if start < len(rows) else rows[:1]
            batch = move_to_device(phase.validation.source.fetch_unmasked(mine, draw), strategy.device)
            embedding = (
                strategy.module(batch, progress.phase_step, phase.total_steps, encode=True).float().cpu()
            )
            padded = embedding.new_zeros(size, embedding.shape[1])
            padded[: len(embedding)] = embedding
            found = ranks.gather(padded)
            if found is not None:
                parts.append(torch.cat(found).numpy()[: len(rows) - first])
    return np.concatenate(parts) if ranks.is_main else None


class BenchmarkQueue:
    """What rank 0 has to score: at most one process at a time, in the order in which it was asked for."""

    def __init__(self, run: Run, folder: Path) -> None:
        """Take the run, at the checkpoint that it goes on from, and its folder."""
        self._run = run
        self._folder = folder / FOLDER
        self._metrics = folder / "metrics.jsonl"
        self._worker: tuple[subprocess.Popen[bytes], Path] | None = None
        self._waiting: list[Path] = []
        # A resumed run may hold other cells out: what it describes does not replace what is still being scored.
        self._token = secrets.token_hex(4)
        self._described: set[int] = set()
        self._folder.mkdir(exist_ok=True)
        self.rewind(run.progress.global_step)

    def has(self, phase: Phase, epoch: int) -> bool:
        """Tell whether a benchmark has been asked for, or scored."""
        name = _name(phase.index, epoch)
        return any(
            (self._folder / f"{name}{suffix}").exists() for suffix in (".request.json", ".result.json")
        )

    def submit(
        self,
        phase: Phase,
        where: dict[str, Any],
        rows: NDArray[np.int64],
        embedding: NDArray[np.float32],
    ) -> None:
        """Leave embeddings to be scored; the request counts from when it is complete."""
        assert phase.config.benchmarks is not None
        name = _name(phase.index, where["epoch"])
        cells = f"phase{phase.index}.{self._token}.cells.npz"
        if phase.index not in self._described:
            save_cells(self._folder / cells, cells_of(phase, rows))
            self._described.add(phase.index)
        np.save(self._folder / f"{name}.npy", embedding, allow_pickle=False)
        request = {
            **where,
            "specs": phase.config.benchmarks.tables(),
            "cells": cells,
            "embedding": f"{name}.npy",
            "baselines": f"phase{phase.index}.{self._token}.baselines",
            "result": f"{name}.result.json",
        }
        path = self._folder / f"{name}.request.json"
        replace_text(path, json.dumps(request, indent=2) + "\n")
        self._waiting.append(path)
        self.poll()

    def poll(self) -> None:
        """Record what has been scored, and start on what comes next."""
        if self._worker is not None:
            process, request = self._worker
            if process.poll() is None:
                return
            self._worker = None
            self._finish(request, process.returncode)
        if self._waiting:
            request = self._waiting.pop(0)
            with open(request.with_name("worker.log"), "ab") as log:
                search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "trainer.scoring.worker", str(request)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONPATH": search_path},
                )
            self._worker = process, request

    def close(self, *, wait: bool) -> None:
        """Wait for what is still to be scored, or leave it to the next start of the run."""
        if wait and (self._worker or self._waiting):
            notice("waiting for the last benchmarks")
        while self._worker is not None or (wait and self._waiting):
            process = None if self._worker is None else self._worker[0]
            if process is not None and not wait:
                process.kill()
                process.wait()
                return
            if process is not None:
                process.wait()
            self.poll()
        if wait:
            for path in [*self._folder.glob("*.npz"), *self._folder.glob("*.baselines")]:
                path.unlink()

    def rewind(self, step: int) -> None:
        """Forget what came after a step that the run goes back to, and make up for what is not recorded."""
        self.close(wait=False)
        self._worker, self._waiting = None, []
        recorded = set()
        if self._metrics.exists():
            recorded = {
                (record["phase"], record["epoch"], record["global_step"])
                for record in read_metrics(self._metrics)
                if record["kind"] == "benchmark"
            }
        for path in sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
            kind = path.suffixes[0] if len(path.suffixes) > 1 else ""
            if kind not in (".request", ".result"):
                continue
            told = json.loads(path.read_text())
            if told["global_step"] > step:
                path.unlink()
            elif kind == ".request":
                self._waiting.append(path)
            elif (told["phase"], told["epoch"], told["global_step"]) not in recorded:
                self._record(told)
        self._waiting = [path for path in self._waiting if not _result_of(path).exists()]
        self.poll()

    def _finish(self, request: Path, exit_code: int) -> None:
        result = _result_of(request)
        if result.exists():
            told = json.loads(result.read_text())
        else:
            asked = json.loads(request.read_text())
            told = {key: asked[key] for key in ("global_step", "phase", "phase_step", "epoch")}
            told["error"] = f"the process ended with exit code {exit_code} and left no result"
            replace_text(result, json.dumps(told, indent=2) + "\n")
        self._record(told)
        request.unlink(missing_ok=True)
        request.with_name(request.name.replace(".request.json", ".npy")).unlink(missing_ok=True)

    def _record(self, told: dict[str, Any]) -> None:
        record = {
            "kind": "benchmark",
            **{k: told[k] for k in ("global_step", "phase", "phase_step", "epoch")},
        }
        if "error" in told:
            warn_once(
                f"the benchmark of phase '{told['phase']}' after epoch {told['epoch']} failed, and training goes on: "
                f"{told['error']} (see {self._folder / 'worker.log'})"
            )
            self._run.recorder.benchmarked({**record, "has_failed": True}, "")
            return
        figures = {(row["benchmark"], row["metric"], row["representation"]): row for row in told["rows"]}
        for (benchmark, metric, representation), row in figures.items():
            name = f"{benchmark}/{metric}"
            record[name if representation == _MODEL else f"{name}/{representation}"] = row["value"]
            if representation == _MODEL and row["spread"] is not None:
                record[f"{name}_spread"] = row["spread"]
        if told["global_step"] > 0:
            record |= self._at_start(told["phase"])
        self._run.recorder.benchmarked(record, _headline(told["rows"]))

    def _at_start(self, phase: str) -> dict[str, float]:
        """Return the figures of the network as it was at the run's first step, where this phase began it."""
        for path in self._folder.glob("*_epoch0.result.json"):
            told = json.loads(path.read_text())
            if told["phase"] == phase and told["global_step"] == 0 and "rows" in told:
                return {
                    f"{row['benchmark']}/{row['metric']}/{AT_START}": row["value"]
                    for row in told["rows"]
                    if row["representation"] == _MODEL
                }
        return {}


def start_benchmarks(run: Run, folder: Path) -> None:
    """Begin to score benchmarks on rank 0 of a run that asks for any, with what an earlier process left undone."""
    if any(phase.config.benchmarks is not None for phase in run.phases):
        run.benchmarks = BenchmarkQueue(run, folder)


def finish_benchmarks(run: Run, *, wait: bool) -> None:
    """End a run's benchmarks; a run that is done waits for them, one that goes on later makes up for them then."""
    if run.benchmarks is not None:
        run.benchmarks.close(wait=wait)


def cells_of(phase: Phase, rows: NDArray[np.int64]) -> Cells:
    """Return what benchmarks need to know of held-out cells beside their embeddings."""
    source = phase.validation.source
    stored = source.reader.read(rows)
    is_counts = source.reader.info.manifest.value_kind == "counts"
    totals, lengths = stored.columns["total"].astype(np.float64), np.diff(stored.offsets)
    values = stored.counts.astype(np.float32)
    if is_counts:
        values *= np.repeat(_TARGET_SUM / np.where(totals > 0, totals, 1), lengths).astype(np.float32)
        np.log1p(values, out=values)
    shape = (len(rows), len(source.reader.info.gene_space))
    return Cells(
        _labels(phase, rows),
        sparse.csr_array((values, stored.genes, stored.offsets), shape=shape),
        np.log1p(totals) if is_counts else np.log1p(lengths.astype(np.float64)),
        "counts of the cell" if is_counts else "number of expressed genes",
    )


def _specs(phase: Phase) -> list[Spec]:
    assert phase.config.benchmarks is not None
    return parse_specs(phase.config.benchmarks.tables(), f"datasets.{phase.index}.benchmarks.specs")


def _labels(phase: Phase, rows: NDArray[np.int64]) -> dict[str, NDArray[np.str_]]:
    columns = sorted({column for spec in _specs(phase) for column in spec.columns()})
    found = phase.validation.source.obs(columns, rows)
    texts = {name: np.asarray(values).astype(np.str_) for name, values in found.items()}
    return {name: np.where(values == UNLABELLED, "", values) for name, values in texts.items()}


def _check_labels(phase: Phase, where: str) -> None:
    columns = phase.validation.source.reader.info.columns
    for index, spec in enumerate(_specs(phase)):
        missing = [name for name in spec.columns() if name not in columns]
        if missing:
            raise ConfigError(
                f"{where}.specs.{index}: {spec.name} reads obs column {', '.join(missing)}, which the data of phase "
                f"'{phase.name}' has not kept; it has: {', '.join(columns) or 'none'} (the conversion keeps columns: "
                "--obs NAME=COLUMN)"
            )
    labels = _labels(phase, held_out_rows(phase))
    for index, spec in enumerate(_specs(phase)):
        try:
            check_labels(spec, labels)
        except UserError as error:
            raise ConfigError(f"{where}.specs.{index}: {error} (of held-out cells)") from None


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


def _name(phase_index: int, epoch: int) -> str:
    return f"phase{phase_index}_epoch{epoch}"


def _result_of(request: Path) -> Path:
    return request.with_name(request.name.replace(".request.json", ".result.json"))
