"""Benchmarks of a phase's held-out cells between its epochs.

All ranks embed their share of the cells, without masking. Rank 0 leaves the embeddings to `trainer/scoring_queue.py`.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data.hashing import DrawKey
from data.manifest import UNLABELLED
from trainer.errors import ConfigError, UserError
from trainer.losses import move_to_device
from trainer.phases import Phase
from trainer.run import Run, is_due, leave, position, stop_request
from trainer.scoring.cells import Cells, check_labels, save_cells
from trainer.scoring.specs import Spec, parse_specs
from trainer.scoring_queue import BENCHMARK, ScoringQueue

_EPOCH = -1
_TARGET_SUM = 1e4


def benchmark_if_due(run: Run, phase: Phase) -> None:
    """Embed the held-out cells and hand them to the scorer, where an epoch's end is due for it; every rank comes here.

    Called at the end of every epoch and at the start of a phase, so that what a stop left out is made up for.
    """
    settings, progress = phase.config.benchmarks, run.progress
    if settings is None or phase.config.epochs == 0 or progress.epoch_step:
        return
    if not (is_due(progress.epoch, settings.every_epochs) or progress.global_step == 0):
        return
    queue, name = run.scores, f"phase{phase.index}_epoch{progress.epoch}"
    if run.ranks.broadcast(queue is not None and queue.has(name)):
        return
    rows = held_out_rows(phase)
    embedding = _embed(run, phase, rows)
    if queue is not None:
        assert embedding is not None
        submit(queue, name, phase, position(progress, phase), rows, embedding)


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
                strategy.module(batch, progress.phase_step, phase.total_steps, instead=_encode).float().cpu()
            )
            padded = embedding.new_zeros(size, embedding.shape[1])
            padded[: len(embedding)] = embedding
            found = ranks.gather(padded)
            if found is not None:
                parts.append(torch.cat(found).numpy()[: len(rows) - first])
    return np.concatenate(parts) if ranks.is_main else None


def _encode(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    encode: Any = model.encode
    return encode(batch)


def submit(
    queue: ScoringQueue,
    name: str,
    phase: Phase,
    where: dict[str, Any],
    rows: NDArray[np.int64],
    embedding: NDArray[np.float32],
) -> None:
    """Leave embeddings to be scored."""
    assert phase.config.benchmarks is not None
    shared = queue.shared(phase.index)
    cells = queue.folder / f"{shared}.cells.npz"
    if not cells.exists():
        save_cells(cells, cells_of(phase, rows))
    np.save(queue.folder / f"{name}.npy", embedding, allow_pickle=False)
    request = {
        "kind": BENCHMARK,
        **where,
        "specs": phase.config.benchmarks.tables(),
        "cells": cells.name,
        "own_file": f"{name}.npy",
        "baselines": f"{shared}.baselines",
    }
    queue.submit(name, request)


def cells_of(phase: Phase, rows: NDArray[np.int64]) -> Cells:
    """Return what benchmarks need to know of held-out cells beside their embeddings."""
    from scipy import sparse  # takes half a second, and most runs score nothing

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
