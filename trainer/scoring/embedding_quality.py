"""The metrics of scIB: by scib-metrics where it is installed, else those that scikit-learn has."""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_samples,
    silhouette_score,
)
from sklearn.neighbors import NearestNeighbors

from trainer.errors import UserError
from trainer.scoring.cells import Cells, Score, Scored, check_batches, labelled, sample
from trainer.scoring.specs import EmbeddingQualitySpec

_BIO_WEIGHT, _BATCH_WEIGHT = 0.6, 0.4
"""How scIB weighs the conservation of biology and the mixing of technical batches in `total`."""

_Metric = Callable[[], float | Mapping[str, float]]


def score(spec: EmbeddingQualitySpec, features: NDArray[np.floating], cells: Cells) -> Scored:
    """Return the metrics, the mean of those of each kind, and the total; all are at most 1, and 1 is best.

    As in scIB the connectivity of the graph counts as mixing; without technical batches it counts as biology.
    """
    kept, notes = sample(np.arange(len(cells)), spec.max_cells, spec.seed)
    within, left_out = labelled(cells.obs[spec.cell_type_key][kept], spec.cell_type_key, at_least=2)
    kept = kept[within]
    labels = _codes(cells.obs[spec.cell_type_key][kept])
    batches = None if spec.batch_key is None else _batches(spec, cells, kept)
    embedding = np.ascontiguousarray(features[kept], dtype=np.float32)
    if spec.n_neighbors > len(kept):
        raise UserError(
            f"embedding_quality.n_neighbors is {spec.n_neighbors}, but there are {len(kept)} cells"
        )
    distances, indices = NearestNeighbors(n_neighbors=spec.n_neighbors).fit(embedding).kneighbors(embedding)
    if has_scib_metrics():
        library = f"scib-metrics {metadata.version('scib-metrics')}"
        bio, batch = _by_scib_metrics(spec, embedding, indices, distances, labels, batches)
    else:
        library = "scikit-learn, for scib-metrics is not installed (pip install 'cellphase[eval]')"
        bio, batch = _by_scikit_learn(spec, embedding, indices, labels, batches)
    scores = _evaluated(bio)
    scores["bio_conservation"] = float(np.mean(list(scores.values())))
    if batches is not None:
        mixing = _evaluated(batch)
        scores |= {**mixing, "batch_correction": float(np.mean(list(mixing.values())))}
        scores["total"] = (
            _BIO_WEIGHT * scores["bio_conservation"] + _BATCH_WEIGHT * scores["batch_correction"]
        )
    notes = [f"computed by {library}", *notes, *left_out]
    return Scored({name: Score(value) for name, value in scores.items()}, tuple(notes))


def has_scib_metrics() -> bool:
    """Tell whether scib-metrics is installed."""
    return importlib.util.find_spec("scib_metrics") is not None


def _batches(spec: EmbeddingQualitySpec, cells: Cells, kept: NDArray[np.int64]) -> NDArray[np.int64]:
    assert spec.batch_key is not None
    batches = cells.obs[spec.batch_key][kept]
    check_batches(spec.batch_key, batches)
    return _codes(batches)


def _by_scib_metrics(
    spec: EmbeddingQualitySpec,
    embedding: NDArray[np.float32],
    indices: NDArray[np.int64],
    distances: NDArray[np.floating],
    labels: NDArray[np.int64],
    batches: NDArray[np.int64] | None,
) -> tuple[dict[str, _Metric], dict[str, _Metric]]:
    import scib_metrics as scib  # pyright: ignore[reportMissingImports]
    from scib_metrics.nearest_neighbors import NeighborsResults  # pyright: ignore[reportMissingImports]

    neighbors: Any = NeighborsResults(indices=indices, distances=distances.astype(np.float32))
    bio: dict[str, _Metric] = {
        "leiden": lambda: scib.nmi_ari_cluster_labels_leiden(
            neighbors, labels, optimize_resolution=True, seed=spec.seed
        ),
        "kmeans": lambda: _of_kmeans(spec, embedding, labels),
        "silhouette_label": lambda: scib.silhouette_label(embedding, labels),
        "clisi": lambda: scib.clisi_knn(neighbors, labels),
    }
    if not (importlib.util.find_spec("igraph") and importlib.util.find_spec("leidenalg")):
        del bio["leiden"]
    logging.getLogger("scib_metrics").setLevel(logging.ERROR)  # it says which types kBET skips
    connectivity: dict[str, _Metric] = {
        "graph_connectivity": lambda: scib.graph_connectivity(neighbors, labels)
    }
    if batches is None:
        return {**bio, **connectivity}, {}
    bio["isolated_labels"] = lambda: scib.isolated_labels(embedding, labels, batches)
    return bio, {
        "bras": lambda: scib.bras(embedding, labels, batches),
        "ilisi": lambda: scib.ilisi_knn(neighbors, batches),
        "kbet": lambda: scib.kbet_per_label(neighbors, batches, labels),
        **connectivity,
    }


def _by_scikit_learn(
    spec: EmbeddingQualitySpec,
    embedding: NDArray[np.float32],
    indices: NDArray[np.int64],
    labels: NDArray[np.int64],
    batches: NDArray[np.int64] | None,
) -> tuple[dict[str, _Metric], dict[str, _Metric]]:
    bio: dict[str, _Metric] = {
        "kmeans": lambda: _of_kmeans(spec, embedding, labels),
        "silhouette_label": lambda: (float(silhouette_score(embedding, labels)) + 1) / 2,
    }
    connectivity: dict[str, _Metric] = {"graph_connectivity": lambda: _graph_connectivity(indices, labels)}
    if batches is None:
        return {**bio, **connectivity}, {}
    return bio, {
        "silhouette_batch": lambda: _silhouette_batch(embedding, labels, batches),
        **connectivity,
    }


def _evaluated(metrics: Mapping[str, _Metric]) -> dict[str, float]:
    found: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax and scikit-learn warn of their own defaults
        for name, metric in metrics.items():
            value = metric()
            if isinstance(value, Mapping):
                found |= {f"{name}_{key}": float(each) for key, each in value.items()}
            else:
                found[name] = float(value)
    return found


def _of_kmeans(
    spec: EmbeddingQualitySpec, embedding: NDArray[np.float32], labels: NDArray[np.int64]
) -> dict[str, float]:
    """Compare clusters by k-means, as many as there are labels, with the labels."""
    settings: Any = {"n_init": 10}
    clusters = KMeans(len(np.unique(labels)), random_state=spec.seed, **settings).fit_predict(embedding)
    return {
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
    }


def _graph_connectivity(indices: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Return the mean over labels of the share of its cells in its largest piece of the neighbours' graph."""
    num_cells, num_neighbors = indices.shape
    rows = np.repeat(np.arange(num_cells), num_neighbors)
    graph = sparse.csr_array((np.ones(indices.size), (rows, indices.ravel())), shape=(num_cells, num_cells))
    shares = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        _, pieces = sparse.csgraph.connected_components(graph[members][:, members], connection="weak")
        shares.append(np.bincount(pieces).max() / len(members))
    return float(np.mean(shares))


def _silhouette_batch(
    embedding: NDArray[np.float32], labels: NDArray[np.int64], batches: NDArray[np.int64]
) -> float:
    """Return scIB's batch silhouette: the mean over labels of 1 - |silhouette of technical batches within it|."""
    found = []
    for label in np.unique(labels):
        members = labels == label
        present = len(np.unique(batches[members]))
        if 1 < present < members.sum():
            widths = np.asarray(silhouette_samples(embedding[members], batches[members]))
            found.append(float((1 - np.abs(widths)).mean()))
    if not found:
        raise UserError(
            "embedding_quality.batch_key: no cell type has cells of two technical batches, so that mixing cannot be "
            "told from biology; leave batch_key out"
        )
    return float(np.mean(found))


def _codes(labels: NDArray[np.str_]) -> NDArray[np.int64]:
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)
