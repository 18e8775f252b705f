"""What is scored: cells' labels, expression and depth, and their representations as rows of numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.scoring.specs import EmbeddingQualitySpec, LinearProbeSpec, PerturbationSpec, Spec

MIN_PERTURBATIONS = 4


class Score(NamedTuple):
    """Hold a metric's mean over folds or splits and its standard deviation over them; None: computed once."""

    value: float
    spread: float | None = None


@dataclass(frozen=True)
class Scored:
    """What a benchmark found out about one representation."""

    scores: dict[str, Score]
    notes: tuple[str, ...] = field(default=())
    """What was left out, and which library computed."""


@dataclass(frozen=True)
class Cells:
    """Cells with what benchmarks know of them; row i of a representation is cell i."""

    obs: Mapping[str, NDArray[np.str_]]
    """Labels [n] by obs column, empty where a cell has none."""
    expression: Any
    """SciPy sparse rows: log-normalised expression [n, G], float32."""
    depth: NDArray[np.float64]
    """Logarithm of the sequencing depth [n]."""
    depth_measure: str
    """What the depth was taken from."""

    def __len__(self) -> int:
        """Count the cells."""
        return len(self.depth)


def mean_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, Score]:
    """Return each metric's mean over folds or splits, and its standard deviation where there are several."""
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {
        name: Score(float(each.mean()), float(each.std(ddof=1)) if len(each) > 1 else None)
        for name, each in values.items()
    }


def labelled(labels: NDArray[np.str_], column: str, *, at_least: int) -> tuple[NDArray[np.int64], list[str]]:
    """Return the cells with a label that enough cells share, and what was left out in words.

    Args:
        labels: [n], empty for none.
        column: the obs column, for messages.
        at_least: cells of a label.

    Raises:
        UserError: fewer than two labels are left.
    """
    names, counts = np.unique(labels[labels != ""], return_counts=True)
    rare = names[counts < at_least]
    kept = np.flatnonzero((labels != "") & ~np.isin(labels, rare))
    notes = []
    if len(labels) > len(kept):
        without = int((labels == "").sum())
        parts = [f"{without} cells without a label"] if without else []
        if len(rare):
            parts.append(
                f"{int(counts[counts < at_least].sum())} cells of labels with fewer than {at_least} cells "
                f"({', '.join(rare[:5])}{', ...' if len(rare) > 5 else ''})"
            )
        notes.append(f"left out: {' and '.join(parts)}")
    if len(names) - len(rare) < 2:
        raise UserError(
            f"obs column {column!r} has {len(names) - len(rare)} labels with at least {at_least} of these "
            f"{len(labels)} cells; two are needed to score anything"
        )
    return kept, notes


def check_labels(spec: Spec, obs: Mapping[str, NDArray[np.str_]]) -> None:
    """Find what in the labels would let a benchmark fail.

    Raises:
        UserError: there are too few cells of too few labels.
    """
    if isinstance(spec, LinearProbeSpec):
        labelled(obs[spec.cell_type_key], spec.cell_type_key, at_least=spec.num_folds)
    elif isinstance(spec, EmbeddingQualitySpec):
        labelled(obs[spec.cell_type_key], spec.cell_type_key, at_least=2)
        if spec.batch_key is not None:
            check_batches(spec.batch_key, obs[spec.batch_key])
    elif isinstance(spec, PerturbationSpec):
        check_perturbations(spec, obs[spec.perturbation_key])


def check_batches(column: str, batches: NDArray[np.str_]) -> None:
    """Refuse cells that are not all in one of at least two technical batches."""
    without, kinds = int((batches == "").sum()), len(np.unique(batches[batches != ""]))
    if without or kinds < 2:
        raise UserError(
            f"embedding_quality.batch_key: obs column {column!r} has {kinds} technical batches and {without} cells "
            "without one; mixing needs two at least, and every cell in one (batch_key: null leaves it out)"
        )


def check_perturbations(spec: PerturbationSpec, labels: NDArray[np.str_]) -> None:
    """Refuse cells among which there are no control cells, or too few perturbations."""
    names = [name for name in np.unique(labels).tolist() if name]
    if spec.control_label not in names:
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise UserError(
            f"perturbation.control_label: no cell has {spec.control_label!r} in obs column "
            f"{spec.perturbation_key!r}; it has: {shown or 'no label'}"
        )
    if len(names) - 1 < MIN_PERTURBATIONS:
        raise UserError(
            f"perturbation.perturbation_key: obs column {spec.perturbation_key!r} has {len(names) - 1} perturbations "
            f"beside {spec.control_label!r}; {MIN_PERTURBATIONS} are needed at least"
        )


def sample(kept: NDArray[np.int64], max_cells: int, seed: int) -> tuple[NDArray[np.int64], list[str]]:
    """Return at most so many of the cells, a seeded choice in their order, and a note where some are left out."""
    if len(kept) <= max_cells:
        return kept, []
    chosen = np.random.default_rng(seed).choice(kept, max_cells, replace=False)
    return np.sort(chosen), [f"a sample of {max_cells} of {len(kept)} cells (max_cells)"]


def save_cells(path: str | Path, cells: Cells) -> None:
    """Write cells as one .npz file, which `load_cells` reads without executing anything."""
    columns = {f"obs/{name}": values for name, values in cells.obs.items()}
    matrix = cells.expression
    np.savez(
        path,
        allow_pickle=False,
        depth=cells.depth,
        depth_measure=np.array(cells.depth_measure),
        data=matrix.data,
        indices=matrix.indices,
        indptr=matrix.indptr,
        shape=np.array(matrix.shape),
        **columns,  # type: ignore[arg-type]
    )


def load_cells(path: str | Path) -> Cells:
    """Read what `save_cells` wrote."""
    from scipy import sparse  # every run imports this module, and most score nothing

    with np.load(path, allow_pickle=False) as file:
        parts = (file["data"], file["indices"], file["indptr"])
        return Cells(
            {name.removeprefix("obs/"): file[name] for name in file.files if name.startswith("obs/")},
            sparse.csr_array(parts, shape=tuple(int(size) for size in file["shape"])),
            file["depth"],
            str(file["depth_measure"]),
        )
