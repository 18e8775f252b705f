"""What a prediction has to beat, as cells: copies of control cells, and the mean response to training perturbations."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from trainer.errors import UserError
from trainer.scoring.vcc_cells import PerturbedCells, join, load_cells, normalized
from trainer.scoring.vcc_file import PerturbedFile, read_perturbed_file
from trainer.scoring.vcc_options import PERTURBATION_COLUMN, ScoreOptions


@dataclass(frozen=True)
class MeanResponse:
    """Hold mean profiles [genes] of perturbed and of control cells in each cell type, and over all cell types.

    The mean of perturbed cells weighs each perturbation alike, however many cells it has.
    """

    perturbed: dict[str, NDArray[np.float64]]
    controls: dict[str, NDArray[np.float64]]
    num_perturbations: dict[str, int]

    def of(self, cell_type: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return both profiles of a cell type; of one without training cells, the means over all the others."""
        if cell_type in self.perturbed:
            return self.perturbed[cell_type], self.controls[cell_type]
        return np.mean(list(self.perturbed.values()), axis=0), np.mean(list(self.controls.values()), axis=0)


def copied_controls(real: PerturbedCells, options: ScoreOptions, rng: np.random.Generator) -> PerturbedCells:
    """Return real's controls, and for each perturbed cell of it a control cell of its cell type, drawn anew."""
    is_control = real.labels == options.control_label
    perturbed = real.take(~is_control)
    source = _drawn_controls(real, perturbed, options, rng)
    return join([replace(perturbed, matrix=real.matrix[source]), real.take(is_control)])


def mean_response_cells(
    real: PerturbedCells, response: MeanResponse, options: ScoreOptions, rng: np.random.Generator
) -> PerturbedCells:
    """Return real's controls, and for each perturbed cell of it one of the mean response to training perturbations.

    Counts: as cell-eval2 makes its own baseline (`baseline._emit_scaled_resample`), a control cell is drawn and each
    gene multiplied by the ratio of the mean profiles, so that cells keep their depth and variation. Fractions are
    then rounded up with the chance of the fraction: the mean is the same, and a cell is one that may be uploaded.

    Log-normalised values: as cell-eval makes its own (`_baseline.build_base_mean_adata`), every cell is the mean:
    that of the controls and the mean shift of training perturbations.
    """
    is_control = real.labels == options.control_label
    perturbed = real.take(~is_control)
    if options.preset.kind == "counts":
        source = _drawn_controls(real, perturbed, options, rng)
        matrix = real.matrix[source].astype(np.float64)
        for cell_type in np.unique(perturbed.cell_types):
            mean, controls = response.of(str(cell_type))
            # Where no control cell of training has the gene, there is no ratio to be had: the gene is left alone.
            ratio = np.divide(mean, controls, out=np.ones_like(mean), where=controls > 0)
            rows = np.repeat(perturbed.cell_types == cell_type, np.diff(matrix.indptr))
            matrix.data[rows] *= ratio[matrix.indices[rows]]
        whole = np.floor(matrix.data)
        matrix.data = (whole + (rng.random(len(whole)) < matrix.data - whole)).astype(np.float32)
        matrix.eliminate_zeros()
        return join([replace(perturbed, matrix=matrix.astype(np.float32)), real.take(is_control)])
    dense = np.zeros(perturbed.matrix.shape, np.float32)
    for cell_type in np.unique(perturbed.cell_types):
        mean, controls = response.of(str(cell_type))
        mine = is_control & (real.cell_types == cell_type)
        _check_controls(mine, str(cell_type), options, "the real file")
        base = np.asarray(real.matrix[mine].mean(axis=0, dtype=np.float64)).ravel()
        dense[perturbed.cell_types == cell_type] = np.maximum(base + mean - controls, 0)
    return join([replace(perturbed, matrix=sparse.csr_matrix(dense)), real.take(is_control)])


def learn_mean_response(
    paths: Sequence[str | Path],
    real: PerturbedCells,
    options: ScoreOptions,
    target_sum: float | None,
    cell_type_key: str | None,
    notes: list[str],
) -> MeanResponse:
    """Return the mean response in training files, of which every perturbation that is scored is left out.

    Args:
        paths: files with control cells and training perturbations.
        real: the scored cells; a perturbation of theirs is left out in the cell types where they have it.
        options: of the score.
        target_sum: total to which counts are normalised; None takes values as they are.
        cell_type_key: obs column of cell types; None tells none apart.
        notes: takes what was left out and what was used.

    Raises:
        UserError: a file lacks genes, labels or controls, or holds other values than the scored ones.
    """
    scored = set(zip(real.cell_types.tolist(), real.labels.tolist(), strict=True))
    sums: dict[tuple[str, str], NDArray[np.float64]] = {}
    sizes: dict[tuple[str, str], int] = {}
    num_left_out = 0
    for path in paths:
        cells = _load_training(path, real.genes, options, target_sum, cell_type_key)
        for cell_type in np.unique(cells.cell_types):
            of_type = cells.take(cells.cell_types == cell_type)
            for label in np.unique(of_type.labels):
                pair = (str(cell_type), str(label))
                if label == "" or (pair in scored and label != options.control_label):
                    num_left_out += label != ""
                    continue
                mine = of_type.matrix[of_type.labels == label]
                total = np.asarray(mine.sum(axis=0, dtype=np.float64)).ravel()
                sums[pair] = sums.get(pair, 0) + total
                sizes[pair] = sizes.get(pair, 0) + mine.shape[0]
    perturbed: dict[str, NDArray[np.float64]] = {}
    controls: dict[str, NDArray[np.float64]] = {}
    counted: dict[str, int] = {}
    named = ", ".join(str(path) for path in paths)
    for cell_type in sorted({cell_type for cell_type, label in sums if label != options.control_label}):
        means = [
            sums[pair] / sizes[pair]
            for pair in sums
            if pair[0] == cell_type and pair[1] != options.control_label
        ]
        key = (cell_type, options.control_label)
        if key not in sums:
            _check_controls(np.zeros(1, np.bool_), cell_type, options, named)
        perturbed[cell_type], counted[cell_type] = np.mean(means, axis=0), len(means)
        controls[cell_type] = sums[key] / sizes[key]
    if not perturbed:
        raise UserError(
            f"{named}: no training perturbation beside the scored ones, so there is no mean response"
        )
    notes.append(
        _account(counted, num_left_out, sorted({str(each) for each in real.cell_types} - counted.keys()))
    )
    return MeanResponse(perturbed, controls, counted)


def _load_training(
    path: str | Path,
    genes: Sequence[str],
    options: ScoreOptions,
    target_sum: float | None,
    cell_type_key: str | None,
) -> PerturbedCells:
    file = read_perturbed_file(path, (PERTURBATION_COLUMN, cell_type_key))
    for column in (PERTURBATION_COLUMN, cell_type_key):
        if column is not None and column not in file.labels:
            raise UserError(
                f"{file.path}: obs has no column {column!r}, which the scored cells have; there are: "
                f"{', '.join(file.columns)}"
            )
    _check_kind(file, options)
    missing = sorted(set(genes) - set(file.genes))
    if missing:
        raise UserError(
            f"{file.path}: {len(missing):,} of the scored genes are missing ({', '.join(missing[:5])}); training "
            "cells need all of them"
        )
    place = {name: index for index, name in enumerate(file.genes)}
    cells = load_cells(file, cell_type_key, None)
    cells = replace(cells, matrix=cells.matrix[:, [place[name] for name in genes]], genes=tuple(genes))
    return normalized(cells, target_sum) if target_sum is not None and file.values.is_counts else cells


def _check_kind(file: PerturbedFile, options: ScoreOptions) -> None:
    if options.preset.kind == "counts" and not file.values.is_counts:
        raise UserError(f"{file.path}: X holds no counts (such as {file.values.example_fractional:g})")


def _drawn_controls(
    real: PerturbedCells, perturbed: PerturbedCells, options: ScoreOptions, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return for each perturbed cell the row of a control cell of its cell type, with replacement."""
    source = np.empty(len(perturbed), np.int64)
    for cell_type in np.unique(perturbed.cell_types):
        mine = (real.labels == options.control_label) & (real.cell_types == cell_type)
        _check_controls(mine, str(cell_type), options, "the real file")
        wanted = perturbed.cell_types == cell_type
        source[wanted] = rng.choice(np.flatnonzero(mine), int(wanted.sum()))
    return source


def _check_controls(is_control: NDArray[np.bool_], cell_type: str, options: ScoreOptions, where: str) -> None:
    if not is_control.any():
        of_type = f" of cell type {cell_type!r}" if cell_type else ""
        raise UserError(
            f"{where}: no control cells ({options.control_label!r}){of_type}, from which baselines are made; "
            "--cell-type-key '' tells no cell types apart"
        )


def _account(counted: dict[str, int], num_left_out: int, others: list[str]) -> str:
    parts = [f"{count} in {name}" if name else f"{count}" for name, count in counted.items()]
    text = f"mean response: of training perturbations ({', '.join(parts)})"
    if num_left_out:
        text += f"; {num_left_out} scored ones in the training files left out"
    if others:
        text += f"; {', '.join(others)}: without training cells, so the mean over the other cell types"
    return text
