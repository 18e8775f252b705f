"""Figures of benchmarks as JSON, CSV and a picture of the embedding."""

import csv
import importlib.util
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from data.torch_threads import keep_torch_threads
from trainer.atomicfile import replace_text
from trainer.errors import UserError
from trainer.scoring.benchmarks import Results

JSON_FILE, CSV_FILE, PICTURE_FILE = "results.json", "results.csv", "embedding.png"
LAYOUTS = UMAP, PRINCIPAL = "umap", "pca"
"""How a picture may place cells."""
_MAX_POINTS = 20_000
_MAX_NAMES = 40
_COLOURS = ("tab20", "tab20b", "tab20c")


def write_results(folder: Path, results: Results, facts: Mapping[str, Any]) -> None:
    """Write `results.json`, which holds `facts` too, and `results.csv` with a line for each figure and its notes."""
    content = {**facts, "results": [asdict(row) for row in results.rows], "notes": results.notes}
    replace_text(folder / JSON_FILE, json.dumps(content, indent=2) + "\n")
    lines = io.StringIO()
    writer = csv.DictWriter(lines, [*asdict(results.rows[0]), "notes"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {**asdict(row), "notes": "; ".join(results.notes.get(row.benchmark, []))} for row in results.rows
    )
    replace_text(folder / CSV_FILE, lines.getvalue())


def choose_layout(asked: str | None) -> str:
    """Return how cells are placed in a picture: as asked, else by UMAP where it is installed.

    Raises:
        UserError: UMAP is asked for and not installed.
    """
    has_umap = importlib.util.find_spec("umap") is not None
    if asked == UMAP and not has_umap:
        raise UserError(
            "--layout umap needs umap-learn, which is not installed; install it, or take --layout pca"
        )
    return asked or (UMAP if has_umap else PRINCIPAL)


def draw_embedding(
    path: Path,
    embedding: NDArray[np.floating],
    labels: Mapping[str, NDArray[np.str_]],
    depth: NDArray[np.floating],
    *,
    title: str,
    layout: str,
    seed: int = 0,
) -> str:
    """Draw the embedding in two dimensions, once for each of the labels and once for the depth; return how.

    UMAP places more than three cells; fewer are placed by their principal components.

    Args:
        path: the PNG.
        embedding: [n, D].
        labels: what cells are coloured by, by the panel's title.
        depth: logarithm of the cells' sequencing depth [n].
        title: printed above.
        layout: one of `LAYOUTS`.
        seed: of the layout, and of the sample where there are too many cells to draw.
    """
    shown = np.arange(len(embedding))
    if len(shown) > _MAX_POINTS:
        shown = np.sort(np.random.default_rng(seed).choice(shown, _MAX_POINTS, replace=False))
    points, method = _two_dimensions(embedding[shown], layout, seed)
    width = 5.2 * (len(labels) + 1) + 1.6 * len(labels)
    figure = Figure(figsize=(width, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(labels) + 1, squeeze=False)[0]
    size = float(np.clip(6000 / len(shown), 1.0, 14.0))
    for axes, (name, values) in zip(panels, labels.items(), strict=False):
        _draw_labels(axes, points, values[shown], size)
        axes.set_title(name, fontsize=11)
    drawn = panels[-1].scatter(*points.T, c=depth[shown], s=size, cmap="viridis", linewidths=0)
    figure.colorbar(drawn, ax=panels[-1], fraction=0.05).set_label("log sequencing depth", fontsize=9)
    panels[-1].set_title("sequencing depth", fontsize=11)
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel(f"{method} 1", fontsize=9)
        axes.set_ylabel(f"{method} 2", fontsize=9)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)
    return method


def _two_dimensions(
    embedding: NDArray[np.floating], layout: str, seed: int
) -> tuple[NDArray[np.floating], str]:
    """Return the places of the cells [n, 2], by UMAP or by the first two principal components, and which it was."""
    if layout == UMAP and len(embedding) > 3:
        with keep_torch_threads(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Tensorflow is not there, and that a seed means one thread
            import umap  # pyright: ignore[reportMissingImports]

            placed: Any = umap.UMAP(n_neighbors=min(15, len(embedding) - 1), random_state=seed).fit_transform(
                embedding
            )
        return np.asarray(placed), "UMAP"
    scaled = StandardScaler().fit_transform(embedding)
    if scaled.shape[1] < 2:
        return np.column_stack([scaled[:, 0], np.zeros(len(scaled))]), "PCA"
    return PCA(2, svd_solver="full").fit_transform(scaled), "PCA"


def _draw_labels(axes: Axes, points: NDArray[np.floating], labels: NDArray[np.str_], size: float) -> None:
    names, counts = np.unique(labels, return_counts=True)
    order = names[np.argsort(-counts, kind="stable")]
    named = [name for name in order if name][:_MAX_NAMES]
    rest = ~np.isin(labels, named)
    if rest.any():
        axes.scatter(*points[rest].T, s=size, color="#cbd5e1", linewidths=0, label="other or none")
    for index, name in enumerate(named):
        axes.scatter(*points[labels == name].T, s=size, color=_colour(index), linewidths=0, label=name)
    axes.legend(
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        fontsize=8,
        frameon=False,
        markerscale=max(1.0, 5.0 / np.sqrt(size)),
        handletextpad=0.2,
        ncols=1 if len(named) <= 20 else 2,
    )


def _colour(index: int) -> Any:
    import matplotlib

    table = matplotlib.colormaps[_COLOURS[index // 20 % len(_COLOURS)]]
    # The strong colours of the table come first, then the pale ones between them.
    return table((2 * (index % 20)) % 20 + (index % 20) // 10)
