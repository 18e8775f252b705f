"""Run benchmarks on representations of the same cells, with the baselines of each beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.scoring import embedding_quality, linear_probe, perturbation
from trainer.scoring.cells import Cells, Scored
from trainer.scoring.embedding_baselines import depth_r2
from trainer.scoring.specs import EmbeddingQualitySpec, LinearProbeSpec, PerturbationSpec, Spec, titles

DEPTH = "depth"
"""Title under which the share of sequencing depth stands."""


@dataclass(frozen=True)
class Row:
    """One figure."""

    benchmark: str
    representation: str
    metric: str
    value: float
    spread: float | None
    """Standard deviation over folds or splits; None where it was computed once."""


@dataclass(frozen=True)
class Results:
    """All figures, and what was left out of each benchmark or computed by which library."""

    rows: list[Row]
    notes: dict[str, list[str]]
    """By the benchmark's title."""

    def of(self, benchmark: str, representation: str) -> dict[str, float]:
        """Return the values of one representation in one benchmark by metric."""
        return {
            row.metric: row.value
            for row in self.rows
            if (row.benchmark, row.representation) == (benchmark, representation)
        }


def run_benchmarks(
    specs: Sequence[Spec], representations: Mapping[str, NDArray[np.floating]], cells: Cells
) -> Results:
    """Score every representation in every benchmark, and how much of it is sequencing depth.

    Raises:
        UserError: the cells' labels do not allow a benchmark.
    """
    rows: list[Row] = []
    notes: dict[str, list[str]] = {}
    for title, spec in zip(titles(specs), specs, strict=True):
        found = {name: _score(spec, features, cells) for name, features in representations.items()}
        found |= _without_features(spec, cells)
        for name, scored in found.items():
            rows += [
                Row(title, name, metric, value, spread) for metric, (value, spread) in scored.scores.items()
            ]
        notes[title] = list(dict.fromkeys(note for scored in found.values() for note in scored.notes))
    for name, features in representations.items():
        rows.append(Row(DEPTH, name, "r2", *depth_r2(features, cells)))
    notes[DEPTH] = [f"depth is the logarithm of: {cells.depth_measure}"]
    return Results(rows, notes)


def pivot(results: Results) -> list[tuple[str, list[str], list[list[Any]]]]:
    """Return for each benchmark its title, the headers of a table and its lines, one for each representation."""
    tables = []
    for title in dict.fromkeys(row.benchmark for row in results.rows):
        rows = [row for row in results.rows if row.benchmark == title]
        metrics = list(dict.fromkeys(row.metric for row in rows))
        figures = {(row.representation, row.metric): row for row in rows}
        lines = [
            [name, *(figure(figures.get((name, metric))) for metric in metrics)]
            for name in dict.fromkeys(row.representation for row in rows)
        ]
        tables.append((title, ["representation", *metrics], lines))
    return tables


def figure(row: Row | None) -> str | None:
    """Return a figure as a table shows it, with its spread; None where there is none."""
    if row is None:
        return None
    return f"{row.value:.4f}" if row.spread is None else f"{row.value:.4f} ± {row.spread:.4f}"


def _score(spec: Spec, features: NDArray[np.floating], cells: Cells) -> Scored:
    if isinstance(spec, LinearProbeSpec):
        return linear_probe.score(spec, features, cells)
    if isinstance(spec, EmbeddingQualitySpec):
        return embedding_quality.score(spec, features, cells)
    assert isinstance(spec, PerturbationSpec)
    return perturbation.score(spec, features, cells)


def _without_features(spec: Spec, cells: Cells) -> dict[str, Scored]:
    """Return the baselines that look at no features."""
    if isinstance(spec, LinearProbeSpec):
        return {linear_probe.MAJORITY: linear_probe.majority(spec, cells)}
    if isinstance(spec, PerturbationSpec):
        return {perturbation.MEAN_SHIFT: perturbation.mean_shift(spec, cells)}
    return {}
