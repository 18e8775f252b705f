"""What an h5ad file of perturbed cells holds, found out in bounded memory: genes, labels, and what its values are."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from data.h5ad import H5adFile
from data.h5ad_matrix import CscMatrix, Matrix, read
from trainer.errors import UserError
from trainer.scoring.vcc_options import ScoreOptions

_VALUES_AT_ONCE = 1 << 21
_COUNT_TOLERANCE = 1e-6
"""How far from a whole number a count may be stored; cell-eval2's `norm._INT_ATOL`."""


@dataclass(frozen=True)
class Values:
    """Hold what the values of a matrix are."""

    num_stored: int
    num_not_finite: int
    num_negative: int
    num_fractional: int
    example_fractional: float | None
    highest: float
    """0 where nothing is stored."""
    totals: NDArray[np.float64]
    """Sum of each cell's values [cells]."""

    @property
    def is_counts(self) -> bool:
        """Tell whether all values are whole numbers."""
        return self.num_fractional == 0 and self.num_not_finite == 0


@dataclass(frozen=True)
class PerturbedFile:
    """Hold what a file of perturbed cells says of itself."""

    path: Path
    num_cells: int
    genes: tuple[str, ...]
    columns: tuple[str, ...]
    """Columns of obs."""
    labels: dict[str, NDArray[np.str_]]
    """The columns that were asked for and are there [cells]; empty where a cell has no label."""
    values: Values
    about: dict[str, Any]
    """What `python -m trainer predict` says of it in `uns["cellphase"]`; empty where another program wrote it."""


def read_perturbed_file(path: str | Path, columns: tuple[str | None, ...]) -> PerturbedFile:
    """Read what a file holds, its matrix `X` a piece at a time.

    Args:
        path: the h5ad file.
        columns: obs columns whose labels are wanted; those that the file lacks are left out.

    Raises:
        DataError: it is no h5ad file, or damaged.
    """
    path = Path(path).expanduser()
    with H5adFile(path) as file:
        there = file.obs.columns()
        if "X" not in file.matrix_names():
            raise UserError(f"{path}: it has no matrix X, which is what the scoring programs read")
        labels = {name: _labels(file, name) for name in columns if name is not None and name in there}
        matrix = file.matrix("X")
        return PerturbedFile(
            path=path,
            num_cells=file.num_cells,
            genes=file.gene_names("X"),
            columns=tuple(there),
            labels=labels,
            values=_judge(matrix),
            about=_about(file),
        )


def stated_control_label(*paths: str | Path | None) -> str:
    """Return the label of control cells that the first file to state one states; the usual one where none does.

    Raises:
        DataError: one is no h5ad file, or damaged.
    """
    for path in filter(None, paths):
        with H5adFile(Path(path).expanduser()) as file:
            label = _about(file).get("control_label")
        if isinstance(label, str) and label:
            return label
    return ScoreOptions.control_label


def _about(file: H5adFile) -> dict[str, Any]:
    stored = file.handle.get("uns/cellphase")
    text = stored[()] if isinstance(stored, h5py.Dataset) and stored.shape == () else None
    try:
        about = json.loads(text) if isinstance(text, str | bytes) else None
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _labels(file: H5adFile, column: str) -> NDArray[np.str_]:
    parts = [
        np.asarray([*chunk.names, ""])[chunk.codes] if len(chunk.names) else np.full(len(chunk.codes), "")
        for chunk in file.obs.label_chunks(column)
    ]
    return np.concatenate(parts) if parts else np.empty(0, np.str_)


def _judge(matrix: Matrix) -> Values:
    num_stored = num_not_finite = num_negative = num_fractional = 0
    example, highest = None, 0.0
    totals = np.zeros(matrix.shape[0])
    for rows, stored in _pieces(matrix):
        values = np.asarray(stored, np.float64)
        is_finite = np.isfinite(values)
        if not len(values):
            continue
        num_stored += len(values)
        num_not_finite += int((~is_finite).sum())
        num_negative += int((values < 0).sum())
        finite = values[is_finite]
        is_fractional = np.abs(finite - np.rint(finite)) > _COUNT_TOLERANCE
        num_fractional += int(is_fractional.sum())
        if example is None and is_fractional.any():
            example = float(finite[is_fractional][0])
        highest = max(highest, float(finite.max(initial=0.0)))
        first = int(rows.min())
        sums = np.bincount(rows - first, weights=values)
        totals[first : first + len(sums)] += sums
    return Values(num_stored, num_not_finite, num_negative, num_fractional, example, highest, totals)


def _pieces(matrix: Matrix) -> Iterator[tuple[NDArray[np.int64], NDArray[np.generic]]]:
    """Yield the row of each stored value, and the values."""
    if isinstance(matrix, CscMatrix):
        for start in range(0, len(matrix.data), _VALUES_AT_ONCE):
            stop = min(start + _VALUES_AT_ONCE, len(matrix.data))
            rows = read(matrix.where, matrix.indices, start, stop)
            yield rows.astype(np.int64), read(matrix.where, matrix.data, start, stop)
        return
    for chunk in matrix.chunks(0, matrix.shape[0]):
        lengths = np.diff(chunk.offsets)
        yield np.repeat(np.arange(len(lengths)) + chunk.first_row, lengths), chunk.values
