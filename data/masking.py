"""BERT-style masking of genes and expression, seeded cell by cell.

A cell's mask is a function of (seed, phase, epoch, cell row) and its genes: padding, the other cells of the
batch, ranks and workers play no part. At every masked position the expression is hidden from the model,
also where the gene stays visible; otherwise the answer would stand beside the question.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.hashing import DrawKey, Stream, gene_hash, to_range
from data.options import Options
from data.ragged import choose_smallest, offsets_of
from data.tokenizers import MASK, NUM_SPECIAL_TOKENS, TokenizedCells

IGNORED_LABEL = -100


class MaskedCells(NamedTuple):
    """Hold the tokens of some cells after masking, and what was masked."""

    tokens: NDArray[np.int32]  # [T]
    values: NDArray[np.float32]  # [T]
    bins: NDArray[np.int32] | None  # [T]
    chosen: NDArray[np.int64]  # [M], flat positions, ascending
    labels: NDArray[np.int64]  # [M], gene tokens to predict, or -100
    value_labels: NDArray[Any]  # [M], bins (int32) or values (float32) that were hidden


@dataclass(frozen=True)
class Masking:
    """Hold the masking options."""

    mask_ratio: float
    """Share of a cell's genes that are masked; every cell has at least one."""
    random_replace_ratio: float
    """Share of the masked genes whose token is a random gene instead of the mask token."""
    keep_ratio: float
    """Share of the masked genes whose token stays."""
    target: Literal["gene", "expression", "both"]
    """What is asked for: the gene, the expression of a visible gene, or one of the two at each position."""

    def apply(
        self,
        cells: TokenizedCells,
        rows: NDArray[np.int64],
        draw: DrawKey,
        num_genes: int,
        n_bins: int | None,
    ) -> MaskedCells:
        """Mask tokenized cells of these corpus rows; the arrays of `cells` stay as they are."""
        tokens = cells.genes + np.int32(NUM_SPECIAL_TOKENS)
        values, bins = cells.values.copy(), None if cells.bins is None else cells.bins.copy()
        chosen, counts = self.choose(cells.offsets, cells.genes, rows, draw)
        labels = tokens[chosen].astype(np.int64)
        value_labels: NDArray[Any] = values[chosen] if bins is None else bins[chosen]
        values[chosen] = 0
        if bins is not None and n_bins is not None:
            bins[chosen] = n_bins

        genes = cells.genes[chosen]
        is_gene = np.full(len(chosen), self.target == "gene")
        if self.target == "both":
            is_gene = gene_hash(draw.cell_hashes(Stream.MASK_TARGET, rows), counts, genes) < 1 << 31
        if self.target != "expression":
            vocabulary = np.arange(NUM_SPECIAL_TOKENS, NUM_SPECIAL_TOKENS + num_genes)
            shown = self.shown_tokens(labels, genes, counts, rows, draw, MASK, vocabulary)
            tokens[chosen] = np.where(is_gene, shown, labels)
        labels[~is_gene] = IGNORED_LABEL
        return MaskedCells(tokens, values, bins, chosen, labels, value_labels)

    def choose(
        self, offsets: NDArray[np.int64], keys: NDArray[np.integer], rows: NDArray[np.int64], draw: DrawKey
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Choose the positions to mask: those whose (cell, key) hash is smallest; keys tell positions apart.

        Returns:
            The flat positions chosen, ascending, and their number in each cell.
        """
        lengths = np.diff(offsets)
        counts = np.minimum(np.maximum(np.rint(lengths * self.mask_ratio).astype(np.int64), 1), lengths)
        hashes = gene_hash(draw.cell_hashes(Stream.MASK_POSITION, rows), lengths, keys)
        return choose_smallest(hashes, offsets, counts), counts

    def shown_tokens(
        self,
        truth: NDArray[np.int64],
        keys: NDArray[np.integer],
        counts: NDArray[np.int64],
        rows: NDArray[np.int64],
        draw: DrawKey,
        mask_id: int,
        vocabulary: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Return what stands at the chosen positions: the mask, a random word of `vocabulary`, or the truth.

        Each cell's share of them is exact to within one position, and exact on the average: what a share leaves
        over of a whole position is rounded up as often as its size says.
        """
        rounding = draw.cell_hashes(Stream.MASK_ROUNDING, rows) / 2.0**64
        order = gene_hash(draw.cell_hashes(Stream.MASK_ACTION, rows), counts, keys)
        offsets = offsets_of(counts)

        def first(share: float) -> NDArray[np.int64]:
            wanted = np.minimum(np.floor(counts * share + rounding).astype(np.int64), counts)
            return choose_smallest(order, offsets, wanted)

        shown = np.full(len(truth), mask_id, truth.dtype)
        changed = first(self.random_replace_ratio + self.keep_ratio)  # the random ones are among these
        shown[changed] = truth[changed]
        replaced = first(self.random_replace_ratio)
        random = gene_hash(draw.cell_hashes(Stream.RANDOM_GENE, rows), counts, keys)[replaced]
        shown[replaced] = vocabulary[to_range(random, len(vocabulary))]
        return shown


def build_masking(options: Mapping[str, Any], where: str = "masking") -> Masking:
    """Check the masking options and build the masking."""
    table = Options(options, where)
    masking = Masking(
        mask_ratio=table.number("mask_ratio", 0.15, low=0, high=1, above=True),
        random_replace_ratio=table.number("random_replace_ratio", 0.1, low=0, high=1),
        keep_ratio=table.number("keep_ratio", 0.1, low=0, high=1),
        target=table.choice("target", ("gene", "expression", "both"), "gene"),
    )
    if masking.random_replace_ratio + masking.keep_ratio > 1:
        table.wrong(
            "keep_ratio",
            f"{masking.keep_ratio:g} and random_replace_ratio "
            f"{masking.random_replace_ratio:g} add up to more than 1",
        )
    if masking.target == "expression":
        for name in ("random_replace_ratio", "keep_ratio"):
            if name in table:
                table.wrong(name, "has no effect with target: expression, where every token stays")
    table.finish()
    return masking
