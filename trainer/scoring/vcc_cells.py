"""Predicted and real cells as the scoring programs are given them: one file a context, all values in one space."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from data.h5ad import H5adFile
from data.h5ad_matrix import CscMatrix
from trainer.errors import UserError
from trainer.scoring.vcc_file import PerturbedFile
from trainer.scoring.vcc_options import PERTURBATION_COLUMN, ScoreOptions

_MAX_RATIO_OF_TOTALS = 1.5
_STEADY = 1.02


@dataclass(frozen=True)
class PerturbedCells:
    """Hold cells with the labels that scores and baselines need."""

    matrix: Any
    """SciPy CSR [cells, genes], float32."""
    genes: tuple[str, ...]
    labels: NDArray[np.str_]
    """The perturbation of each cell [cells]."""
    cell_types: NDArray[np.str_]
    """[cells], empty where cell types are not told apart."""
    contexts: NDArray[np.str_]
    """[cells], empty where all cells are scored together."""

    def __len__(self) -> int:
        """Count the cells."""
        return len(self.labels)

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> "PerturbedCells":
        """Return some of the cells."""
        return PerturbedCells(
            self.matrix[rows],
            self.genes,
            self.labels[rows],
            self.cell_types[rows],
            self.contexts[rows],
        )


def load_cells(file: PerturbedFile, cell_type_key: str | None, context_key: str | None) -> PerturbedCells:
    """Read all cells of a file into memory, as the programs do."""
    matrix = _read_matrix(file.path, np.float32)
    none = np.full(file.num_cells, "")
    return PerturbedCells(
        matrix,
        file.genes,
        file.labels[PERTURBATION_COLUMN],
        none if cell_type_key is None else file.labels[cell_type_key],
        none if context_key is None else file.labels[context_key],
    )


def join(parts: Sequence[PerturbedCells]) -> PerturbedCells:
    """Put cells of the same genes after each other."""
    return PerturbedCells(
        sparse.csr_matrix(sparse.vstack([part.matrix for part in parts], format="csr")),
        parts[0].genes,
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.cell_types for part in parts]),
        np.concatenate([part.contexts for part in parts]),
    )


def write_cells(cells: PerturbedCells, path: Path) -> None:
    """Write cells as a program reads them: `X`, the genes' names and obs `target_gene`."""
    obs = pd.DataFrame(
        {PERTURBATION_COLUMN: pd.Categorical(cells.labels)},
        index=pd.Index([f"cell_{index}" for index in range(len(cells))]),
    )
    var = pd.DataFrame(index=pd.Index(list(cells.genes)))
    anndata.AnnData(cells.matrix, obs=obs, var=var).write_h5ad(path)


def normalized(cells: PerturbedCells, target_sum: float) -> PerturbedCells:
    """Return counts as log(1 + count * target_sum / total of the cell)."""
    matrix = cells.matrix.copy()
    totals = np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()
    factors = target_sum / np.where(totals > 0, totals, 1)
    values = matrix.data * np.repeat(factors, np.diff(matrix.indptr))
    matrix.data = np.log1p(values).astype(np.float32)
    return replace(cells, matrix=matrix)


def shared_target_sum(
    prediction: PerturbedFile, real: PerturbedFile, options: ScoreOptions, notes: list[str]
) -> float | None:
    """Return the total that counts are normalised to before 2025's program sees them; None where counts are scored.

    cell-eval normalises each file of counts to its own median total, so that a prediction and real cells would be
    compared on two scales; and log-normalised files of two totals differ in every gene.

    Raises:
        UserError: the totals of the two files differ, or what to normalise to cannot be found out.
    """
    if options.preset.kind == "counts":
        return None
    stated = options.target_sum
    if prediction.values.is_counts and real.values.is_counts:
        totals = real.values.totals
        found = stated or float(np.median(totals[totals > 0]))
        notes.append(f"counts of both files were normalised to {found:g} a cell, log(1 + x)")
        return found
    if not prediction.values.is_counts and not real.values.is_counts:
        mine, theirs = _stated_total(prediction) or _total(prediction)[0], _total(real)[0]
        if not 1 / _MAX_RATIO_OF_TOTALS < mine / theirs < _MAX_RATIO_OF_TOTALS:
            raise UserError(
                f"{prediction.path} was normalised to about {mine:,.0f} a cell and {real.path} to about {theirs:,.0f}; "
                "normalise both to the same total, or give both as counts"
            )
        return stated or mine
    lognorm, counts = (real, prediction) if prediction.values.is_counts else (prediction, real)
    found = stated or _stated_total(lognorm)
    if not found:
        found, spread = _total(lognorm)
        if spread > _STEADY:
            raise UserError(
                f"{counts.path} holds counts and {lognorm.path} log-normalised values whose totals vary from cell to "
                "cell; say what they were normalised to with --target-sum"
            )
    notes.append(f"counts of {counts.path.name} were normalised to {found:g} a cell, log(1 + x)")
    return found


def prepared(file: PerturbedFile, cells: PerturbedCells, target_sum: float | None) -> PerturbedCells:
    """Return cells with values that the program scores: counts normalised where they have to be."""
    return normalized(cells, target_sum) if target_sum is not None and file.values.is_counts else cells


def _stated_total(file: PerturbedFile) -> float | None:
    total = file.about.get("target_sum")
    return float(total) if isinstance(total, int | float) and total > 0 else None


def _total(file: PerturbedFile) -> tuple[float, float]:
    """Return the median total of the cells before the logarithm, and the 95th percentile over the 5th."""
    matrix = _read_matrix(file.path, np.float64)
    totals = np.asarray(matrix.expm1().sum(axis=1)).ravel()
    totals = totals[totals > 0]
    if not len(totals):
        raise UserError(f"{file.path}: X holds nothing but zeros")
    low, middle, high = np.percentile(totals, [5, 50, 95])
    return float(middle), float(high / low)


def _read_matrix(path: Path, dtype: Any) -> Any:
    """Return X as rows; of places that are stored twice, the sum."""
    with H5adFile(path) as file:
        stored = file.matrix("X")
        if isinstance(stored, CscMatrix):
            parts = (stored.data[:].astype(dtype), stored.indices[:], stored.indptr[:])
            matrix: Any = sparse.csr_matrix(sparse.csc_matrix(parts, shape=stored.shape))
        else:
            chunks = list(stored.chunks(0, stored.shape[0]))
            lengths = [np.diff(chunk.offsets) for chunk in chunks]
            values = np.concatenate([np.empty(0, dtype), *(chunk.values.astype(dtype) for chunk in chunks)])
            columns = np.concatenate([np.empty(0, np.int64), *(chunk.columns for chunk in chunks)])
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([[], *lengths]))])
            matrix = sparse.csr_matrix((values, columns, offsets.astype(np.int64)), shape=stored.shape)
    matrix.sum_duplicates()
    return matrix
