"""Rank the genes of each cell by expression, and sort expression into bins.

Bins: 0 is zero expression and nothing else; expressed genes take 1 to n_bins - 1. `uniform` cuts [0, max_value]
into n_bins equal intervals, open below; the lowest one would be bin 0, so its values join bin 1, and those
beyond max_value the last bin. `quantile` takes edges between equally many values of the training cells. `per_cell`
takes quantiles of the cell's own expressed genes, as scGPT does.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.ragged import offsets_of, positions, sort_rows

_POSITION_BITS = 20
_EDGE_DECIMALS = 6
"""Edges are rounded, so that they are the same where a machine's logarithm differs in the last bit."""


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
    order, _ = by_expression(counts, offsets, int(lengths.max(initial=0)), ascending=True)
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


def edge_bins(values: NDArray[np.float32], edges: NDArray[np.float32]) -> NDArray[np.int32]:
    """Sort the values of expressed genes into bins 1 to len(edges) + 1: one more than the edges below a value."""
    return np.searchsorted(edges, values, side="left").astype(np.int32) + 1


def fit_edges(values: NDArray[np.float32], n_bins: int) -> list[float]:
    """Return the n_bins - 2 edges that divide the values of expressed genes into n_bins - 1 equal parts."""
    quantiles = np.quantile(values.astype(np.float64), np.arange(1, n_bins - 1) / (n_bins - 1))
    return np.round(quantiles, _EDGE_DECIMALS).tolist()


def by_expression(
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
