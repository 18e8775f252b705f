"""Perturbation benchmark: from the shift of the mean embedding to the shift of mean expression, by ridge regression."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import Ridge

from trainer.scoring.cells import Cells, Scored, check_perturbations, mean_scores
from trainer.scoring.specs import PerturbationSpec

MEAN_SHIFT = "mean_shift"


def score(spec: PerturbationSpec, features: NDArray[np.floating], cells: Cells) -> Scored:
    """Return how well shifts of perturbations that were not fitted on are told, over several random splits.

    A perturbation's shift is the mean of its cells less the mean of the control cells. `pearson`, `mse` and
    `direction_accuracy` are over its `n_top_genes` largest true shifts; `fraction_above_mean_shift` is the share of
    perturbations whose correlation is above that of the mean shift of the others.
    """
    shifts, answers, notes = _shifts(spec, features, cells)
    rows = []
    for train, test in _splits(spec, len(answers)):
        # Standardised over the perturbations fitted on, so that the penalty means the same for every representation.
        scale = shifts[train].std(axis=0) + 1e-8
        model = Ridge(alpha=1.0).fit(shifts[train] / scale, answers[train])
        predicted = np.asarray(model.predict(shifts[test] / scale))
        found = _compared(spec, answers[test], predicted)
        mean = _compared(spec, answers[test], np.tile(answers[train].mean(axis=0), (len(test), 1)))
        row = {name: float(values.mean()) for name, values in found.items()}
        row["fraction_above_mean_shift"] = float((found["pearson"] > mean["pearson"]).mean())
        rows.append(row)
    return Scored(mean_scores(rows), notes)


def mean_shift(spec: PerturbationSpec, cells: Cells) -> Scored:
    """Return the scores of answering the mean shift of the perturbations fitted on."""
    _, answers, notes = _shifts(spec, np.zeros((len(cells), 1)), cells)
    rows = []
    for train, test in _splits(spec, len(answers)):
        answer = np.tile(answers[train].mean(axis=0), (len(test), 1))
        rows.append(
            {name: float(values.mean()) for name, values in _compared(spec, answers[test], answer).items()}
        )
    return Scored(mean_scores(rows), notes)


def _shifts(
    spec: PerturbationSpec, features: NDArray[np.floating], cells: Cells
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[str, ...]]:
    """Return the shifts [P, D] of the features and [P, G] of expression, of each perturbation."""
    labels = cells.obs[spec.perturbation_key]
    check_perturbations(spec, labels)
    names, codes = np.unique(labels, return_inverse=True)
    is_perturbation = (names != spec.control_label) & (names != "")
    counts = np.bincount(codes, minlength=len(names))
    groups = sparse.csr_array((1.0 / counts[codes], (codes, np.arange(len(codes)))))  # [P, n]
    control = int(np.flatnonzero(names == spec.control_label)[0])
    means = np.asarray(groups @ features.astype(np.float64))
    summed: Any = groups @ cells.expression
    expressed = summed.toarray().astype(np.float64)
    notes = (f"{int(is_perturbation.sum())} perturbations, {int(counts[control])} control cells",)
    return (
        means[is_perturbation] - means[control],
        expressed[is_perturbation] - expressed[control],
        notes,
    )


def _splits(spec: PerturbationSpec, count: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    num_test = min(max(1, round(count * spec.test_fraction)), count - 2)
    rng = np.random.default_rng(spec.seed)
    orders = [rng.permutation(count) for _ in range(spec.num_splits)]
    return [(np.sort(order[num_test:]), np.sort(order[:num_test])) for order in orders]


def _compared(
    spec: PerturbationSpec, truth: NDArray[np.float64], answer: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Return each metric [P] over the genes of the largest true shifts."""
    top = np.argsort(-np.abs(truth), axis=1, kind="stable")[:, : spec.n_top_genes]
    true, told = np.take_along_axis(truth, top, 1), np.take_along_axis(answer, top, 1)
    centred = true - true.mean(axis=1, keepdims=True), told - told.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred[0], axis=1) * np.linalg.norm(centred[1], axis=1)
    products = (centred[0] * centred[1]).sum(axis=1)
    return {
        # An answer without any variation has no correlation; it counts as 0.
        "pearson": np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0),
        "mse": np.square(true - told).mean(axis=1),
        "direction_accuracy": (np.sign(true) == np.sign(told)).mean(axis=1),
    }
