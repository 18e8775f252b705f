"""Turn cells into gene tokens with expression, a whole ragged batch at a time.

`rank_value` orders a cell's genes by expression, as Geneformer does. `binned_expression` keeps them in the
order of the gene space and sorts their expression into bins.

Bins: 0 is zero expression and nothing else; expressed genes take 1 to n_bins - 1. `uniform` cuts [0, max_value]
into n_bins equal intervals, open below; the lowest one would be bin 0, so its values join bin 1, and those
beyond max_value the last bin. `per_cell` takes quantiles of the cell's own expressed genes, as scGPT does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.hashing import DrawKey, Stream, gene_hash
from data.options import Options
from data.ragged import choose_smallest, offsets_of, positions, row_numbers, sort_rows
from data.readers import RaggedBatch

NUM_SPECIAL_TOKENS = 4
PAD, UNKNOWN, MASK, CLS = range(NUM_SPECIAL_TOKENS)

STRATEGIES = ("rank_value", "binned_expression")
FITTED_OPTIONS = ("target_sum", "edges", "gene_medians")
"""Options that may come from the data; a run must go on with the same."""
_POSITION_BITS = 20


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

    strategy: Literal["rank_value", "binned_expression"]
    max_genes: int
    """Most tokens of a cell, the cls token among them."""
    prepend_cls: bool
    padding: Literal["longest", "max_genes"]
    """Whether batches are padded to their longest cell or to `max_genes`."""
    transform: ExpressionTransform
    gene_selection: Literal["top", "random"]
    """Which genes stay when a cell has more than fit: the highest expressed, or a seeded random choice."""
    n_bins: int | None = None
    """Expression bins of `binned_expression`; None in `rank_value`."""
    binning_method: Literal["uniform", "per_cell"] = "uniform"
    max_value: float = 10.0
    """Expression at which the `uniform` bins end."""
    measured: tuple[NDArray[np.int32], ...] | None = None
    """The genes that each source measured, where genes without expression are tokens too."""

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
        cells = _expressed(cells)
        if not self.prepend_cls and self.measured is None and (np.diff(cells.offsets) == 0).any():
            row = rows[np.diff(cells.offsets) == 0][0]
            raise DataError(
                f"row {row}: the cell expresses no gene, so it has no token; set tokenizer.prepend_cls: true or "
                "convert with --min-genes 1"
            )
        if self.strategy == "rank_value":
            return self._rank(cells, rows, draw)
        return self._bin(cells, rows, draw)

    def _rank(self, cells: RaggedBatch, rows: NDArray[np.int64], draw: DrawKey) -> TokenizedCells:
        if self.gene_selection == "random":
            cells = _keep(cells, self._chosen_at_random(cells, rows, draw))
        order, offsets = _by_expression(cells.counts, cells.offsets, self.room)
        values = self.transform.apply(cells.counts[order], offsets, cells.columns["total"])
        return TokenizedCells(offsets, cells.genes[order], values, None)

    def _bin(self, cells: RaggedBatch, rows: NDArray[np.int64], draw: DrawKey) -> TokenizedCells:
        assert self.n_bins is not None
        totals = cells.columns["total"]
        bins = None
        if self.binning_method == "per_cell":
            bins = quantile_bins(cells.counts, cells.offsets, self.n_bins)
        if self.measured is None:
            kept = self._fitting(cells, rows, draw)
            if kept is not None:
                bins = None if bins is None else bins[kept]
                cells = _keep(cells, kept)
            genes, counts, offsets = cells.genes, cells.counts, cells.offsets
        else:
            offsets, genes, place = self._with_zeros(cells, rows, draw)
            # Place -1, a gene without expression, finds the zero that is appended.
            counts = np.append(cells.counts, cells.counts.dtype.type(0))[place]
            bins = None if bins is None else np.append(bins, np.int32(0))[place]
        values = self.transform.apply(counts, offsets, totals)
        if bins is None:
            bins = uniform_bins(values, self.n_bins, self.max_value)
            if self.measured is not None:
                bins[counts == 0] = 0
        return TokenizedCells(offsets, genes, values, bins)

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
        order, _ = _by_expression(
            cells.counts[inside], offsets_of(np.diff(cells.offsets)[is_long]), self.room
        )
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


def uniform_bins(values: NDArray[np.float32], n_bins: int, max_value: float) -> NDArray[np.int32]:
    """Sort the values of expressed genes into equal bins of [0, max_value]; bin 0 stays empty."""
    scaled = values * np.float32(n_bins / max_value)
    np.ceil(scaled, out=scaled)
    scaled -= 1
    np.clip(scaled, 1, n_bins - 1, out=scaled)
    return scaled.astype(np.int32)


def quantile_bins(counts: NDArray[Any], offsets: NDArray[np.int64], n_bins: int) -> NDArray[np.int32]:
    """Sort the expressed genes of each cell into bins 1 to n_bins - 1 by quantiles of their own values.

    The bin of x is the number of edges at or below x, the n_bins - 1 edges being the linearly interpolated
    quantiles 0, 1 / (n_bins - 2), ..., 1. Edge j lies at rank j * (k - 1) / (n_bins - 2) of the k values, and is
    at or below x exactly when that is not above u, the highest rank of a value equal to x. So whole numbers
    suffice, equal values share a bin, and scaling or taking logarithms changes nothing.
    """
    lengths = np.diff(offsets)
    order, _ = _by_expression(counts, offsets, int(lengths.max(initial=0)), ascending=True)
    ordered = counts[order]
    is_last = np.ones(len(ordered), np.bool_)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    is_last[offsets[1:][lengths > 0] - 1] = True
    ends = np.flatnonzero(is_last)
    run = np.cumsum(is_last) - is_last
    starts, steps = np.repeat(offsets[:-1], lengths), np.repeat(np.maximum(lengths - 1, 1), lengths)
    ranks = ends[run] - starts
    # A cell with a single value has all edges on it.
    ranks[np.repeat(lengths == 1, lengths)] = 1
    bins = np.empty(len(ordered), np.int32)
    bins[order] = ranks * (n_bins - 2) // steps + 1
    return bins


def build_tokenizer(
    options: Mapping[str, Any],
    *,
    value_kind: Literal["counts", "lognorm"],
    measured: Sequence[NDArray[np.bool_]],
    where: str = "tokenizer",
) -> Tokenizer:
    """Check a tokenizer's options and build it.

    Args:
        options: the table in the YAML file; `strategy` decides which others there are.
        value_kind: what the corpus holds, which decides whether values are normalised.
        measured: for each source of the corpus a mask of the genes that it measured.
        where: place of the options in the YAML file.
    """
    table = Options(options, where)
    if "strategy" not in table:
        table.wrong("strategy", f"missing; it must be one of {', '.join(STRATEGIES)}")
    strategy = table.choice("strategy", STRATEGIES, "binned_expression")
    common: dict[str, Any] = {
        "strategy": strategy,
        "max_genes": table.count("max_genes", 2048, minimum=2),
        "prepend_cls": table.flag("prepend_cls", True),
        "padding": table.choice("padding", ("longest", "max_genes"), "longest"),
        "transform": _transform(table, value_kind),
    }
    selection = table.choice("gene_selection", ("top", "random"), None)
    if strategy == "rank_value":
        table.finish()
        return Tokenizer(**common, gene_selection=selection or "top")
    binned: dict[str, Any] = {
        "n_bins": table.count("n_bins", 51, minimum=3),
        "binning_method": table.choice("binning_method", ("uniform", "per_cell"), "uniform"),
    }
    if binned["binning_method"] == "uniform":
        binned["max_value"] = table.number("max_value", 10.0, low=0, above=True)
    with_zeros = table.flag("include_zero_genes", False)
    if with_zeros and selection == "top":
        table.wrong(
            "gene_selection", "top has no meaning with include_zero_genes: true; set random or leave it out"
        )
    table.finish()
    genes = tuple(np.flatnonzero(mask).astype(np.int32) for mask in measured) if with_zeros else None
    default = "random" if with_zeros else "top"
    return Tokenizer(**common, **binned, gene_selection=selection or default, measured=genes)


def complete_options(tokenizer: Tokenizer, value_kind: str) -> dict[str, Any]:
    """Return the options that build this tokenizer, none left to a default."""
    options: dict[str, Any] = {
        name: getattr(tokenizer, name)
        for name in ("strategy", "max_genes", "prepend_cls", "padding", "gene_selection")
    }
    transform = tokenizer.transform
    options["normalize"] = None if transform.target_sum is None else "library_size"
    if transform.target_sum is not None:
        options["target_sum"] = transform.target_sum
    options["log1p"] = transform.log1p
    if tokenizer.strategy == "binned_expression":
        options |= {"n_bins": tokenizer.n_bins, "binning_method": tokenizer.binning_method}
        if tokenizer.binning_method == "uniform":
            options["max_value"] = tokenizer.max_value
        options["include_zero_genes"] = tokenizer.measured is not None
    return options


def _transform(table: Options, value_kind: str) -> ExpressionTransform:
    """Read the options of the transform; what the corpus holds decides their defaults."""
    is_counts = value_kind == "counts"
    normalize = table.choice("normalize", ("library_size", None), "library_size" if is_counts else None)
    target_sum = table.number("target_sum", 1e4, low=0, above=True)
    log1p = table.flag("log1p", is_counts)
    if not is_counts:
        reason = "the corpus holds log-normalised values already; leave this option out"
        if normalize is not None:
            table.wrong("normalize", reason)
        if log1p:
            table.wrong("log1p", reason)
    if normalize is None and "target_sum" in table:
        table.wrong("target_sum", "nothing is scaled to it without normalize: library_size")
    return ExpressionTransform(target_sum if normalize is not None else None, log1p)


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


def _by_expression(
    counts: NDArray[Any], offsets: NDArray[np.int64], limit: int, ascending: bool = False
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order the genes of each cell by expression, highest first; ties stay in gene order.

    Value and position are packed into one unsigned key, because NumPy sorts those with vector instructions and
    arguments without. Positive floats compare like their bits.

    Returns:
        Flat positions of the first `limit` genes of each cell, and the offsets of these.
    """
    lengths = np.diff(offsets)
    local = positions(offsets)
    if counts.dtype == np.uint16 and lengths.max(initial=0) <= 1 << 16:
        bits, kind, shift = counts.astype(np.uint32), np.uint32, 16
    else:
        if lengths.max(initial=0) > 1 << _POSITION_BITS:
            raise DataError(
                f"a cell with {lengths.max()} genes cannot be ranked; {1 << _POSITION_BITS} is the limit"
            )
        bits = counts.view(np.uint32) if counts.dtype == np.float32 else counts
        bits, kind, shift = bits.astype(np.uint64), np.uint64, _POSITION_BITS
    top = kind((1 << 16) - 1 if kind is np.uint32 else (1 << 32) - 1)
    keys = (bits if ascending else top - bits) << kind(shift)
    keys |= local.astype(kind)
    ordered = (sort_rows(keys, offsets) & kind((1 << shift) - 1)).astype(np.int64)
    ordered += np.repeat(offsets[:-1], lengths)
    if lengths.max(initial=0) <= limit:
        return ordered, offsets
    return ordered[local < limit], offsets_of(np.minimum(lengths, limit))
