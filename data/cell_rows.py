"""Turn cells as a file stores them into corpus rows: exact values, genes by index, sorted and filtered."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.sparse import csr_array

from data.h5ad_matrix import MatrixChunk

ValueKind = Literal["counts", "lognorm"]
MAX_COUNT = 2**32 - 1
MAX_LOGARITHM = 32
"""Logarithms of counts, to base 2 or more, are no larger."""
_VALUES_WORTH_A_SORT = 256
"""Fewer values than this in one call of sort cost more than the other way of sorting."""


class BadValueError(Exception):
    """Report a value that cannot be kept, by its position in the chunk; the reader names cell and gene."""

    def __init__(self, position: int, value: object, reason: str) -> None:
        """Keep what the message needs."""
        super().__init__(reason)
        self.position = position
        self.value = value
        self.reason = reason


@dataclass(frozen=True)
class CellRows:
    """Hold corpus rows of consecutive cells, before the obs columns are added."""

    kept: np.ndarray
    """bool [cells of the chunk]: which of them became rows."""
    offsets: np.ndarray
    """int64 [rows + 1], starting at 0."""
    genes: np.ndarray
    """int32 [nnz], increasing inside each row."""
    counts: np.ndarray
    """[nnz] uint16, uint32 or float32."""
    totals: np.ndarray
    """float32 [rows]: sum over all genes of the source."""
    n_genes: np.ndarray
    """int32 [rows]: genes expressed in the source."""
    sum_all: float
    """Sum of all values of the chunk."""
    sum_kept: float
    """Sum of the values on genes of the gene space."""


@dataclass(frozen=True)
class ValueVerdict:
    """Say what a sample of a matrix's values looks like."""

    kind: Literal["counts", "lognorm", "not logged", "mixed", "negative", "not finite"]
    reason: str


def judge_values(samples: Iterable[np.ndarray]) -> ValueVerdict:
    """Tell counts from log-normalised values, and both from what is neither.

    `mixed` is mostly whole numbers with fractions among them, `not logged` fractions too large for logarithms.
    """
    num_nonzero = num_whole = 0
    minimum, maximum = 0.0, 0.0
    for values in samples:
        if values.dtype.kind == "f":
            if not np.isfinite(values).all():
                bad = values[~np.isfinite(values)][0]
                return ValueVerdict("not finite", f"it holds {bad}")
            values = values[values != 0]
            num_whole += int(np.count_nonzero(values == np.rint(values)))
        else:
            values = values[values != 0]
            num_whole += len(values)
        num_nonzero += len(values)
        if len(values):
            minimum, maximum = min(minimum, float(values.min())), max(maximum, float(values.max()))
    if minimum < 0:
        return ValueVerdict("negative", f"it holds negative values (down to {minimum:.6g}), so it is scaled")
    if num_whole == num_nonzero:
        return ValueVerdict("counts", f"whole numbers up to {maximum:.0f}")
    share = num_whole / num_nonzero
    if share > 0.5:
        return ValueVerdict("mixed", f"{share:.1%} of its non-zero values are whole, the others fractional")
    if maximum > MAX_LOGARITHM:
        reason = f"fractional values up to {maximum:.6g}, too large for logarithms"
        return ValueVerdict("not logged", reason)
    return ValueVerdict("lognorm", f"fractional values up to {maximum:.6g}")


def exact_counts(values: np.ndarray) -> np.ndarray:
    """Return counts as uint16, or uint32 where one needs it; raise at the first that is no count."""
    if not len(values):
        return values.astype(np.uint16)
    if values.dtype.kind == "b":
        return values.astype(np.uint16)
    minimum, maximum = float(values.min()), float(values.max())  # float32 would round MAX_COUNT up
    if minimum >= 0 and maximum <= MAX_COUNT:  # false for NaN too
        counts = values.astype(np.uint16 if maximum <= 65535 else np.uint32)
        if values.dtype.kind != "f" or (counts == values).all():
            return counts
    raise _first_bad(values, is_count=True)


def exact_lognorm(values: np.ndarray) -> np.ndarray:
    """Return non-negative finite values as float32; raise at the first that is not."""
    with np.errstate(over="ignore"):
        floats = values.astype(np.float32)
    if len(floats) and not (floats.min() >= 0 and np.isfinite(floats.max())):
        raise _first_bad(values, is_count=False)
    return floats


def _first_bad(values: np.ndarray, *, is_count: bool) -> BadValueError:
    limit = MAX_COUNT if is_count else float(np.finfo(np.float32).max)
    is_float = values.dtype.kind == "f"
    numbers = values.astype(np.float64) if is_float else values  # both limits are exact in it
    tests = {
        "is NaN": np.isnan(values) if is_float else np.zeros(len(values), bool),
        "is infinite": np.isinf(values) if is_float else np.zeros(len(values), bool),
        "is negative": values < 0,
        "is above what the corpus can hold": numbers > limit,
    }
    if is_count and is_float:
        tests["is fractional"] = values != np.rint(values)
    firsts = {reason: int(np.argmax(bad)) for reason, bad in tests.items() if bad.any()}
    reason = min(firsts, key=lambda each: firsts[each])
    return BadValueError(firsts[reason], values[firsts[reason]], reason)


def cell_rows(chunk: MatrixChunk, remap: np.ndarray, value_kind: ValueKind, min_genes: int) -> CellRows:
    """Convert a chunk: `remap` is the corpus index of each gene of the file (int32, -1 drops the gene)."""
    counts = exact_counts(chunk.values) if value_kind == "counts" else exact_lognorm(chunk.values)
    offsets, columns = chunk.offsets, chunk.columns
    if np.count_nonzero(counts) != len(counts):
        offsets, columns, counts = _select(counts != 0, offsets, columns, counts)
    totals = sum_rows(offsets, counts)
    n_genes = np.diff(offsets).astype(np.int32)
    sum_all = float(totals.sum())
    sum_kept = sum_all
    genes = np.take(remap, columns, mode="clip")  # the reader has checked the range; clip is the fast way
    if len(genes) and genes.min() < 0:
        offsets, genes, counts = _select(genes >= 0, offsets, genes, counts)
        sum_kept = float(counts.sum(dtype=np.int64 if value_kind == "counts" else np.float64))
    repeated = unsorted_at(offsets, genes)
    if repeated is not None:
        offsets, genes, counts = sort_rows(offsets, genes, counts, int(remap.max()) + 1)
        repeated = unsorted_at(offsets, genes)
        if repeated is not None:
            raise _second_value(chunk, remap, offsets, genes, repeated)
    kept = np.diff(offsets) >= min_genes
    if not kept.all():
        offsets, genes, counts = _select(np.repeat(kept, np.diff(offsets)), offsets, genes, counts)
        offsets = np.concatenate([offsets[:1], offsets[1:][kept]])
        totals, n_genes = totals[kept], n_genes[kept]
    return CellRows(kept, offsets, genes, counts, totals.astype(np.float32), n_genes, sum_all, sum_kept)


def _second_value(
    chunk: MatrixChunk, remap: np.ndarray, offsets: np.ndarray, genes: np.ndarray, repeated: int
) -> BadValueError:
    """Find where in the chunk the gene of a repeated converted value is stored last."""
    row = int(np.searchsorted(offsets, repeated, side="right")) - 1
    low, high = chunk.offsets[row], chunk.offsets[row + 1]
    position = int(low + np.flatnonzero(remap[chunk.columns[low:high]] == genes[repeated])[-1])
    return BadValueError(position, chunk.values[position], "is a second value of that gene in that cell")


def sum_rows(offsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sum each row exactly: int64 for counts, float64 else."""
    dtype = np.float64 if counts.dtype.kind == "f" else np.int64
    sums = np.zeros(len(offsets) - 1, dtype)
    filled = offsets[1:] > offsets[:-1]
    if filled.any():
        sums[filled] = np.add.reduceat(counts, offsets[:-1][filled], dtype=dtype)
    return sums


def unsorted_at(offsets: np.ndarray, genes: np.ndarray) -> int | None:
    """Return the position of the first gene that does not lie above its predecessor in its row, if any."""
    rises = np.empty(len(genes) + 1, bool)
    np.greater(genes[1:], genes[:-1], out=rises[1:-1])
    rises[offsets] = True
    return None if rises.all() else int(np.argmin(rises))


def sort_rows(
    offsets: np.ndarray, genes: np.ndarray, counts: np.ndarray, num_genes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort the genes inside each row, without a loop over cells.

    Row, gene and count are packed in 32 bits and sorted as one number, as many rows at once as fit; where
    that makes many small pieces or does not fit at all, transposing twice is a counting sort.
    """
    if counts.dtype == np.uint16 and len(counts):
        gene_bits, count_bits = (num_genes - 1).bit_length(), int(counts.max()).bit_length()
        row_bits = 32 - gene_bits - count_bits
        if row_bits >= 0 and len(genes) >= _VALUES_WORTH_A_SORT * ((len(offsets) - 2 >> row_bits) + 1):
            return offsets, *_sort_packed(offsets, genes, counts, gene_bits, count_bits)
    rows = csr_array((counts, genes, offsets.astype(np.int32)), shape=(len(offsets) - 1, num_genes))
    ordered = rows.tocsc().tocsr()
    return offsets, ordered.indices, ordered.data


def _sort_packed(
    offsets: np.ndarray, genes: np.ndarray, counts: np.ndarray, gene_bits: int, count_bits: int
) -> tuple[np.ndarray, np.ndarray]:
    num_rows = len(offsets) - 1
    rows_at_once = 1 << 32 - gene_bits - count_bits
    row_keys = (np.arange(num_rows) % rows_at_once << gene_bits + count_bits).astype(np.uint32)
    packed = np.repeat(row_keys, np.diff(offsets))
    packed |= genes.astype(np.uint32) << np.uint32(count_bits)
    packed |= counts
    for start in range(0, num_rows, rows_at_once):
        packed[offsets[start] : offsets[min(start + rows_at_once, num_rows)]].sort()
    sorted_counts = (packed & np.uint32((1 << count_bits) - 1)).astype(np.uint16)
    packed >>= np.uint32(count_bits)
    packed &= np.uint32((1 << gene_bits) - 1)
    return packed.view(np.int32), sorted_counts


def _select(
    mask: np.ndarray, offsets: np.ndarray, genes: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keep the masked values and move the offsets accordingly."""
    positions = np.flatnonzero(mask)
    return np.searchsorted(positions, offsets), genes[positions], counts[positions]
