"""Turn cells into gene tokens with expression, a whole ragged batch at a time.

`rank_value` orders a cell's genes by expression, as Geneformer does, with `gene_medians` by expression over the gene's
median. The other strategies keep them in the order of the gene space: `binned_expression` sorts their expression into
bins, `continuous_projection` and `gene_embedding` leave it as the transform does (of the latter the model takes its
gene vectors from a file; a gene without one is a token like the others). Every strategy can have bins beside
(`n_bins`), for a model that predicts them.

A cell with more genes than fit keeps the highest expressed ones, or a seeded random choice (`gene_selection`).
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.binning import by_expression, edge_bins, quantile_bins, uniform_bins
from data.errors import DataError
from data.hashing import DrawKey, Stream, gene_hash
from data.ragged import choose_smallest, offsets_of, row_numbers
from data.readers import RaggedBatch

NUM_SPECIAL_TOKENS = 4
PAD, UNKNOWN, MASK, CLS = range(NUM_SPECIAL_TOKENS)

Strategy = Literal["rank_value", "binned_expression", "continuous_projection", "gene_embedding"]
BinningMethod = Literal["uniform", "quantile", "per_cell"]


class TokenizedCells(NamedTuple):
    """Hold the tokens of some cells, without the cls token and padding."""

    offsets: NDArray[np.int64]  # [B + 1]
    genes: NDArray[np.int32]  # [T]
    values: NDArray[np.float32]  # [T], expression as the transform leaves it
    bins: NDArray[np.int32] | None  # [T]


@dataclass(frozen=True)
class ExpressionTransform:
    """Turn stored values into expression."""

    target_sum: float | None
    """Library size that counts are scaled to; None leaves them as they are."""
    log1p: bool

    def apply(
        self, counts: NDArray[Any], offsets: NDArray[np.int64], totals: NDArray[np.floating]
    ) -> NDArray[np.float32]:
        """Return float32 [T]; `totals` [B] are the cells' sums over all genes of their source."""
        values = counts.astype(np.float32)
        if self.target_sum is not None:
            # Cells without a single count have nothing to scale.
            scales = np.float32(self.target_sum) / np.where(totals > 0, totals, 1).astype(np.float32)
            values *= np.repeat(scales, np.diff(offsets))
        if self.log1p:
            # log(1 + x) instead of log1p: it is vectorised in NumPy, six times faster, and off by no more than
            # 1e-7 absolute, where expression starts near 0.1.
            values += 1
            np.log(values, out=values)
        return values


@dataclass(frozen=True)
class Tokenizer:
    """Hold a tokenizer's options; calling it turns cells into tokens."""

    strategy: Strategy
    max_genes: int
    """Most tokens of a cell, the cls token among them."""
    prepend_cls: bool
    padding: Literal["longest", "max_genes"]
    """Whether batches are padded to their longest cell or to `max_genes`."""
    transform: ExpressionTransform
    gene_selection: Literal["top", "random"]
    """Which genes stay when a cell has more than fit: the highest expressed, or a seeded random choice."""
    n_bins: int | None = None
    """Expression bins, 0 for zero expression among them; None leaves them out."""
    binning_method: BinningMethod = "uniform"
    max_value: float = 10.0
    """Expression at which the `uniform` bins end."""
    edges: tuple[float, ...] | None = None
    """n_bins - 2 values, ascending, between the `quantile` bins."""
    measured: tuple[NDArray[np.int32], ...] | None = None
    """The genes that each source measured, where genes without expression are tokens too."""
    gene_medians: NDArray[np.float32] | None = None
    """[genes of the gene space]: what `rank_value` divides expression by; genes without one (NaN) are left out."""
    is_logarithm: bool = False
    """Whether the stored values are logarithms, which `gene_medians` apply to after taking these back."""

    @property
    def room(self) -> int:
        """Return how many genes fit."""
        return self.max_genes - self.prepend_cls

    @property
    def columns(self) -> tuple[str, ...]:
        """Name the corpus columns that the tokenizer reads."""
        return ("total",) if self.measured is None else ("total", "source")

    def num_tokens(self, numbers: NDArray[Any]) -> NDArray[np.int64]:
        """Return the tokens [B] of cells, cls left out, from `n_genes`, or from `source` with `measured` genes."""
        if self.measured is not None:
            numbers = np.array([len(genes) for genes in self.measured])[numbers]
        return np.minimum(numbers.astype(np.int64), self.room)

    def __call__(self, cells: RaggedBatch, rows: NDArray[np.int64], draw: DrawKey) -> TokenizedCells:
        """Tokenize the cells of these corpus rows; what is random depends on `draw` and the row alone."""
        cells = self._known(_expressed(cells))
        if not self.prepend_cls and self.measured is None and (np.diff(cells.offsets) == 0).any():
            row = rows[np.diff(cells.offsets) == 0][0]
            some = "gene" if self.gene_medians is None else "gene that has a median"
            raise DataError(
                f"row {row}: the cell expresses no {some}, so it has no token; set tokenizer.prepend_cls: true or "
                "convert with --min-genes 1"
            )
        own_bins = None
        if self.n_bins is not None and self.binning_method == "per_cell":
            own_bins = quantile_bins(cells.counts, cells.offsets, self.n_bins)
        if self.strategy == "rank_value":
            return self._rank(cells, own_bins, rows, draw)
        return self._in_gene_order(cells, own_bins, rows, draw)

    def _known(self, cells: RaggedBatch) -> RaggedBatch:
        """Leave out genes without a median, where medians are used."""
        if self.gene_medians is None:
            return cells
        is_known = np.isfinite(self.gene_medians)[cells.genes]
        return cells if is_known.all() else _keep(cells, np.flatnonzero(is_known))

    def _rank(
        self, cells: RaggedBatch, own_bins: NDArray[np.int32] | None, rows: NDArray[np.int64], draw: DrawKey
    ) -> TokenizedCells:
        if self.gene_selection == "random":
            chosen = self._chosen_at_random(cells, rows, draw)
            cells, own_bins = _keep(cells, chosen), None if own_bins is None else own_bins[chosen]
        order, offsets = by_expression(self._ranked_by(cells), cells.offsets, self.room)
        counts = cells.counts[order]
        values = self.transform.apply(counts, offsets, cells.columns["total"])
        bins = self._bins(values, counts, None if own_bins is None else own_bins[order])
        return TokenizedCells(offsets, cells.genes[order], values, bins)

    def _ranked_by(self, cells: RaggedBatch) -> NDArray[Any]:
        """Return what orders the genes of each cell; what all genes of a cell are scaled by does not matter."""
        if self.gene_medians is None:
            return cells.counts
        values = cells.counts.astype(np.float32)
        return (np.expm1(values) if self.is_logarithm else values) / self.gene_medians[cells.genes]

    def _in_gene_order(
        self, cells: RaggedBatch, own_bins: NDArray[np.int32] | None, rows: NDArray[np.int64], draw: DrawKey
    ) -> TokenizedCells:
        totals = cells.columns["total"]
        if self.measured is None:
            kept = self._fitting(cells, rows, draw)
            if kept is not None:
                own_bins = None if own_bins is None else own_bins[kept]
                cells = _keep(cells, kept)
            genes, counts, offsets = cells.genes, cells.counts, cells.offsets
        else:
            offsets, genes, place = self._with_zeros(cells, rows, draw)
            # Place -1, a gene without expression, finds the zero that is appended.
            counts = np.append(cells.counts, cells.counts.dtype.type(0))[place]
            own_bins = None if own_bins is None else np.append(own_bins, np.int32(0))[place]
        values = self.transform.apply(counts, offsets, totals)
        return TokenizedCells(offsets, genes, values, self._bins(values, counts, own_bins))

    def _bins(
        self, values: NDArray[np.float32], counts: NDArray[Any], own_bins: NDArray[np.int32] | None
    ) -> NDArray[np.int32] | None:
        """Return the bin of each token, None without bins; `own_bins` are those of the cell itself."""
        if self.n_bins is None or own_bins is not None:
            return own_bins
        if self.binning_method == "quantile":
            assert self.edges is not None, "the edges are fitted before cells are tokenized"
            bins = edge_bins(values, np.array(self.edges, np.float32))
        else:
            bins = uniform_bins(values, self.n_bins, self.max_value)
        if self.measured is not None:
            bins[counts == 0] = 0
        return bins

    def _fitting(
        self, cells: RaggedBatch, rows: NDArray[np.int64], draw: DrawKey
    ) -> NDArray[np.int64] | None:
        """Return the flat positions of the genes that stay, or None where all fit."""
        is_long = np.diff(cells.offsets) > self.room
        if not is_long.any():
            return None
        if self.gene_selection == "random":
            return self._chosen_at_random(cells, rows, draw)
        stays = ~np.repeat(is_long, np.diff(cells.offsets))
        inside = np.flatnonzero(~stays)
        order, _ = by_expression(cells.counts[inside], offsets_of(np.diff(cells.offsets)[is_long]), self.room)
        stays[inside[order]] = True
        return np.flatnonzero(stays)

    def _chosen_at_random(
        self, cells: RaggedBatch, rows: NDArray[np.int64], draw: DrawKey
    ) -> NDArray[np.int64]:
        lengths = np.diff(cells.offsets)
        hashes = gene_hash(draw.cell_hashes(Stream.GENE_SELECTION, rows), lengths, cells.genes)
        return choose_smallest(hashes, cells.offsets, np.minimum(lengths, self.room))

    def _with_zeros(
        self, cells: RaggedBatch, rows: NDArray[np.int64], draw: DrawKey
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """Choose among all genes that each cell's source measured.

        Returns:
            Offsets, genes in order, and where each gene's count lies in `cells` (-1: it is not expressed).
        """
        assert self.measured is not None
        sources = cells.columns["source"]
        lengths = np.array([len(genes) for genes in self.measured])[sources]
        candidates = np.concatenate([self.measured[source] for source in sources.tolist()] or [cells.genes])
        offsets = offsets_of(lengths)
        hashes = gene_hash(draw.cell_hashes(Stream.GENE_SELECTION, rows), lengths, candidates)
        chosen = choose_smallest(hashes, offsets, np.minimum(lengths, self.room))
        genes = candidates[chosen]
        chosen_offsets = offsets_of(np.minimum(lengths, self.room))
        num_genes = 1 + int(max(genes.max(initial=0), cells.genes.max(initial=0)))
        place = np.full(len(rows) * num_genes, -1, np.int64)
        place[row_numbers(cells.offsets) * num_genes + cells.genes] = np.arange(len(cells.genes))
        return chosen_offsets, genes, place[row_numbers(chosen_offsets) * num_genes + genes]


def _expressed(cells: RaggedBatch) -> RaggedBatch:
    """Drop entries that are not positive, which a corpus rarely holds."""
    is_expressed = cells.counts > 0
    if is_expressed.all():
        return cells
    return _keep(cells, np.flatnonzero(is_expressed))


def _keep(cells: RaggedBatch, kept: NDArray[np.int64]) -> RaggedBatch:
    """Return the cells with only the genes at these ascending flat positions."""
    offsets = np.searchsorted(kept, cells.offsets)
    return RaggedBatch(offsets, cells.genes[kept], cells.counts[kept], cells.columns)
