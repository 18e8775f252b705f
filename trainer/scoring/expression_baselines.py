"""Baselines of masked expression prediction that know no other gene of the cell: gene, and gene by depth.

A model that does not beat the depth-conditional one has only learned how deeply a cell was sequenced.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data.masking import IGNORED_LABEL
from data.tokenizers import NUM_SPECIAL_TOKENS
from trainer.errors import UserError

NUM_FOLDS = 4
PSEUDO_COUNTS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
NUM_QUANTILES = (2, 3, 4, 5, 6, 8, 12)


class BinnedCells(NamedTuple):
    """Hold genes of some cells with their bins, flat, and what a baseline may know of each cell."""

    tokens: NDArray[np.int64]  # [T]
    bins: NDArray[np.int64]  # [T]
    cells: NDArray[np.int64]  # [T], the cell of each entry, from 0
    depths: dict[str, NDArray[np.float64]]  # measures of the cell's depth for each entry, each [T]
    num_cells: int


class Baseline(Protocol):
    """Give every bin of a gene in a cell a probability."""

    def nats(self, cells: BinnedCells) -> NDArray[np.float64]:
        """Return the negative log probability [T] of each entry's bin."""
        ...


@dataclass(frozen=True)
class MarginalBaseline:
    """Each gene's distribution over training cells, smoothed towards that of all genes.

    Attributes:
        probabilities: [V, n_bins].
        pseudo_count: observations of the overall distribution that each gene starts with.
    """

    probabilities: NDArray[np.float64]
    pseudo_count: float

    @classmethod
    def fit(cls, cells: BinnedCells, vocab_size: int, n_bins: int) -> "MarginalBaseline":
        """Count training cells; the pseudo-count is what does best in cross-validation over them."""
        folds = _folds(cells)
        tables = [_counts(part, vocab_size, n_bins) for part in folds]
        everything = np.sum(tables, axis=0)

        def loss(pseudo_count: float) -> float:
            total = 0.0
            for part, table in zip(folds, tables, strict=True):
                fitted = _smoothed(everything - table, _overall(everything - table), pseudo_count)
                total += _nats(fitted[part.tokens], part.bins).sum()
            return total

        best = min(PSEUDO_COUNTS, key=loss)
        return cls(_smoothed(everything, _overall(everything), best), best)

    def nats(self, cells: BinnedCells) -> NDArray[np.float64]:
        """Return the negative log probability [T] of each entry's bin."""
        return _nats(self.probabilities[cells.tokens], cells.bins)


@dataclass(frozen=True)
class DepthConditionalBaseline:
    """Each gene's distribution among cells of similar depth, smoothed towards its distribution in all cells.

    Attributes:
        probabilities: [Q, V, n_bins].
        edges: [Q - 1] between the depth quantiles.
        measure: which measure of depth: `total` (log1p of the cell's sum) or `expressed` (share of the cell's
            other visible genes that are expressed).
        pseudo_count: observations of the gene's marginal that each quantile starts with.
    """

    probabilities: NDArray[np.float64]
    edges: NDArray[np.float64]
    measure: str
    pseudo_count: float

    @classmethod
    def fit(cls, cells: BinnedCells, vocab_size: int, n_bins: int) -> "DepthConditionalBaseline":
        """Count training cells; measure, number of quantiles and pseudo-count do best in cross-validation."""
        gene_pseudo_count = MarginalBaseline.fit(cells, vocab_size, n_bins).pseudo_count
        folds = _folds(cells)
        best: tuple[float, str, int, float] | None = None
        for measure in cells.depths:
            for quantiles in NUM_QUANTILES:
                edges = _edges(cells.depths[measure], quantiles)
                tables = [_depth_counts(part, measure, edges, vocab_size, n_bins) for part in folds]
                everything = np.sum(tables, axis=0)
                losses = np.zeros(len(PSEUDO_COUNTS))
                for part, table in zip(folds, tables, strict=True):
                    # Only the entries' own rows are smoothed: the whole table is much larger.
                    kept = everything - table
                    where = _quantile_of(part, measure, edges), part.tokens
                    counts, gene = kept[where], _gene_marginal(kept, gene_pseudo_count)[part.tokens]
                    for index, pseudo_count in enumerate(PSEUDO_COUNTS):
                        losses[index] += _nats(_smoothed(counts, gene, pseudo_count), part.bins).sum()
                found = (losses.min(), measure, quantiles, PSEUDO_COUNTS[int(losses.argmin())])
                best = found if best is None or found < best else best
        assert best is not None
        _, measure, quantiles, pseudo_count = best
        edges = _edges(cells.depths[measure], quantiles)
        counts = _depth_counts(cells, measure, edges, vocab_size, n_bins)
        table = _smoothed(counts, _gene_marginal(counts, gene_pseudo_count), pseudo_count)
        return cls(table, edges, measure, pseudo_count)

    def nats(self, cells: BinnedCells) -> NDArray[np.float64]:
        """Return the negative log probability [T] of each entry's bin."""
        quantile = _quantile_of(cells, self.measure, self.edges)
        return _nats(self.probabilities[quantile, cells.tokens], cells.bins)


def collect_training(batches: Iterable[Mapping[str, Any]]) -> BinnedCells:
    """Take the binned genes of unmasked batches of training cells.

    Raises:
        UserError: the batches have no bins, or there are none.
    """
    parts = []
    for batch in batches:
        is_gene = _is_gene(batch)
        parts.append(
            _entries(batch, is_gene, _array(batch, "tokens")[is_gene], _array(batch, "bins")[is_gene])
        )
    return _joined(parts)


def collect_masked(batches: Iterable[Mapping[str, Any]]) -> BinnedCells:
    """Take the genes and hidden bins at the masked positions of evaluation batches: what a model is asked."""
    parts = []
    for batch in batches:
        answers = _array(batch, "value_labels")
        is_asked = answers != IGNORED_LABEL
        genes = np.where(batch["labels"] == IGNORED_LABEL, batch["tokens"], batch["labels"])
        parts.append(_entries(batch, is_asked, genes[is_asked], answers[is_asked]))
    return _joined(parts)


def mean_cross_entropy(baseline: Baseline, batches: Iterable[Mapping[str, Any]]) -> float:
    """Return a baseline's mean nats per masked position of evaluation batches."""
    return float(baseline.nats(collect_masked(batches)).mean())


def _entries(
    batch: Mapping[str, Any], chosen: NDArray[np.bool_], tokens: NDArray[np.int64], bins: NDArray[np.int64]
) -> BinnedCells:
    is_visible = _is_gene(batch)
    if "value_labels" in batch:
        is_visible = is_visible & (_array(batch, "value_labels") == IGNORED_LABEL)
    is_expressed = is_visible & (_array(batch, "bins") > 0)
    # The gene itself is left out of what its cell shows: where it is asked for, it is hidden.
    others = is_visible.sum(axis=1, keepdims=True) - is_visible
    expressed = (is_expressed.sum(axis=1, keepdims=True) - is_expressed) / np.maximum(others, 1)
    cells = np.nonzero(chosen)[0]
    depths = {"total": _array(batch, "depth").astype(np.float64)[cells], "expressed": expressed[chosen]}
    return BinnedCells(tokens, bins, cells, depths, len(chosen))


def _joined(parts: Sequence[BinnedCells]) -> BinnedCells:
    if not parts:
        raise UserError("no batches to fit or score an expression baseline on")
    starts = np.cumsum([0, *(part.num_cells for part in parts)])
    return BinnedCells(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.bins for part in parts]),
        np.concatenate([part.cells + start for part, start in zip(parts, starts, strict=False)]),
        {name: np.concatenate([part.depths[name] for part in parts]) for name in parts[0].depths},
        int(starts[-1]),
    )


def _folds(cells: BinnedCells) -> list[BinnedCells]:
    """Deal the cells out into folds; batches come shuffled, so neighbours are no closer than others."""
    num_folds = min(NUM_FOLDS, cells.num_cells)
    if num_folds < 2:
        raise UserError(f"an expression baseline needs at least 2 training cells, not {cells.num_cells}")
    folds = []
    for fold in range(num_folds):
        chosen = cells.cells % num_folds == fold
        depths = {name: depth[chosen] for name, depth in cells.depths.items()}
        folds.append(
            BinnedCells(
                cells.tokens[chosen], cells.bins[chosen], cells.cells[chosen], depths, cells.num_cells
            )
        )
    return folds


def _edges(depth: NDArray[np.float64], quantiles: int) -> NDArray[np.float64]:
    return np.quantile(depth, np.linspace(0, 1, quantiles + 1)[1:-1])


def _quantile_of(cells: BinnedCells, measure: str, edges: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.searchsorted(edges, cells.depths[measure], side="right")


def _counts(cells: BinnedCells, vocab_size: int, n_bins: int) -> NDArray[np.float64]:
    flat = cells.tokens * n_bins + cells.bins
    return np.bincount(flat, minlength=vocab_size * n_bins).reshape(vocab_size, n_bins).astype(float)


def _depth_counts(
    cells: BinnedCells, measure: str, edges: NDArray[np.float64], vocab_size: int, n_bins: int
) -> NDArray[np.float64]:
    quantiles = len(edges) + 1
    rows = _quantile_of(cells, measure, edges) * vocab_size + cells.tokens
    table = _counts(cells._replace(tokens=rows), quantiles * vocab_size, n_bins)
    return table.reshape(quantiles, vocab_size, n_bins)


def _overall(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distribution [n_bins] over all genes; no bin is impossible."""
    total = counts.sum(axis=0) + 1
    return total / total.sum()


def _gene_marginal(counts: NDArray[np.float64], pseudo_count: float) -> NDArray[np.float64]:
    """Return each gene's smoothed distribution [V, n_bins] from counts by depth [Q, V, n_bins]."""
    table = counts.sum(axis=0)
    return _smoothed(table, _overall(table), pseudo_count)


def _smoothed(
    counts: NDArray[np.float64], prior: NDArray[np.float64], pseudo_count: float
) -> NDArray[np.float64]:
    return (counts + pseudo_count * prior) / (counts.sum(axis=-1, keepdims=True) + pseudo_count)


def _nats(probabilities: NDArray[np.float64], bins: NDArray[np.int64]) -> NDArray[np.float64]:
    return -np.log(np.take_along_axis(probabilities, bins[:, None], axis=1)[:, 0])


def _is_gene(batch: Mapping[str, Any]) -> NDArray[np.bool_]:
    """Return [B, N]: real genes, and the mask token in place of one."""
    is_special = _array(batch, "tokens") < NUM_SPECIAL_TOKENS
    if "value_labels" in batch:
        is_special = is_special & (_array(batch, "value_labels") == IGNORED_LABEL)
    return _array(batch, "attention_mask") & ~is_special


def _array(batch: Mapping[str, Any], key: str) -> NDArray[Any]:
    if key not in batch:
        raise UserError(
            f"expression baselines need batches with {key!r}; use tokenizer.strategy: binned_expression"
        )
    return np.asarray(batch[key])
