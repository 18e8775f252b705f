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
from data.ragged import choose_smallest
from data.tokenizers import MASK, NUM_SPECIAL_TOKENS, TokenizedCells

IGNORED_LABEL = -100


class MaskedCells(NamedTuple):
    """Hold the tokens of some cells after masking, and what was masked."""

    tokens: NDArray[np.int64]  # [T]
    values: NDArray[np.float32]  # [T]
    bins: NDArray[np.int64] | None  # [T]
    chosen: NDArray[np.int64]  # [M], flat positions, ascending
    labels: NDArray[np.int64]  # [M], gene tokens to predict, or -100
    value_labels: NDArray[Any]  # [M], bins (int64) or values (float32) that were hidden


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
        tokens = cells.genes.astype(np.int64) + NUM_SPECIAL_TOKENS
        values, bins = cells.values.copy(), None if cells.bins is None else cells.bins.copy()
        lengths = np.diff(cells.offsets)
        counts = np.minimum(np.maximum(np.rint(lengths * self.mask_ratio).astype(np.int64), 1), lengths)
        hashes = gene_hash(draw.cell_hashes(Stream.MASK_POSITION, rows), lengths, cells.genes)
        chosen = choose_smallest(hashes, cells.offsets, counts)
        labels = tokens[chosen]
        value_labels: NDArray[Any] = values[chosen] if bins is None else bins[chosen]
        values[chosen] = 0
        if bins is not None and n_bins is not None:
            bins[chosen] = n_bins

        def drawn(stream: Stream) -> NDArray[np.uint32]:
            return gene_hash(draw.cell_hashes(stream, rows), counts, cells.genes[chosen])

        is_gene = np.full(len(chosen), self.target == "gene")
        if self.target == "both":
            is_gene = drawn(Stream.MASK_TARGET) < 1 << 31
        action = drawn(Stream.MASK_ACTION) / float(1 << 32)
        random_genes = to_range(drawn(Stream.RANDOM_GENE), num_genes) + NUM_SPECIAL_TOKENS
        is_random = action < self.random_replace_ratio
        is_kept = action >= 1 - self.keep_ratio
        hidden = np.where(is_random, random_genes, np.where(is_kept, labels, MASK))
        tokens[chosen] = np.where(is_gene, hidden, labels)
        labels[~is_gene] = IGNORED_LABEL
        return MaskedCells(tokens, values, bins, chosen, labels, value_labels)


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
