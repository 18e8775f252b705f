"""Linear probe: logistic regression from standardised features to a label, in repeated stratified cross-validation."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.preprocessing import StandardScaler

from trainer.scoring.cells import Cells, Scored, labelled, mean_scores, sample
from trainer.scoring.specs import LinearProbeSpec

MAJORITY = "majority"


def score(spec: LinearProbeSpec, features: NDArray[np.floating], cells: Cells) -> Scored:
    """Return accuracy and F1 of held-out folds, with their standard deviation over all folds.

    Every representation of the same cells is scored on the same folds.
    """
    chosen, labels, notes = _chosen(spec, cells)
    folds, unfinished = [], 0
    for train, test in _splits(spec, labels):
        scaler = StandardScaler().fit(features[chosen[train]])
        model = LogisticRegression(C=spec.inverse_regularization, max_iter=spec.max_iterations)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(scaler.transform(features[chosen[train]]), labels[train])
        unfinished += any(issubclass(each.category, ConvergenceWarning) for each in caught)
        folds.append(
            _scores(labels[test], np.asarray(model.predict(scaler.transform(features[chosen[test]]))))
        )
    if unfinished:
        notes.append(
            f"{unfinished} of {len(folds)} fits did not converge in {spec.max_iterations} iterations"
        )
    return Scored(mean_scores(folds), tuple(notes))


def majority(spec: LinearProbeSpec, cells: Cells) -> Scored:
    """Return the scores of always answering the label that most training cells have."""
    _, labels, notes = _chosen(spec, cells)
    folds = []
    for train, test in _splits(spec, labels):
        names, counts = np.unique(labels[train], return_counts=True)
        folds.append(_scores(labels[test], np.full(len(test), names[counts.argmax()])))
    return Scored(mean_scores(folds), tuple(notes))


def _chosen(spec: LinearProbeSpec, cells: Cells) -> tuple[NDArray[np.int64], NDArray[np.str_], list[str]]:
    labels = cells.obs[spec.cell_type_key]
    kept, sampled = sample(np.arange(len(labels)), spec.max_cells, spec.seed)
    within, notes = labelled(labels[kept], spec.cell_type_key, at_least=spec.num_folds)
    return kept[within], labels[kept[within]], [*sampled, *notes]


def _splits(
    spec: LinearProbeSpec, labels: NDArray[np.str_]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    folds = RepeatedStratifiedKFold(
        n_splits=spec.num_folds, n_repeats=spec.num_repeats, random_state=spec.seed
    )
    return list(folds.split(np.zeros(len(labels)), labels))


def _scores(truth: NDArray[np.str_], answer: NDArray[np.str_]) -> dict[str, float]:
    settings: Any = {"zero_division": 0}  # of a label that is never answered
    return {
        "accuracy": float(accuracy_score(truth, answer)),
        "f1_macro": float(f1_score(truth, answer, average="macro", **settings)),
        "f1_weighted": float(f1_score(truth, answer, average="weighted", **settings)),
    }
