"""A model's tokens as expression again: log-normalised values, or whole counts whose mean is right."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.hashing import Stream, gene_hash, splitmix64
from data.ragged import offsets_of, row_numbers
from data.tokenizers import ExpressionTransform
from data.value_tokenizers import ValueTokenizer

Space = Literal["counts", "lognorm"]

MAX_TOTAL = 1e6
"""Most counts of a cell: what `vcc prep` of the 2026 challenge lets pass."""
DEFAULT_TARGET_SUM = 1e4
"""Library size of log-normalised values where the model's own values have none."""


class MatchedControls(NamedTuple):
    """Say what is known of the control that each predicted cell was matched to."""

    total: NDArray[np.float64]
    """[cells], sum of its stored values over all genes of its file."""
    column_total: NDArray[np.float64]
    """[cells], the same over the columns alone."""
    values: NDArray[np.float32] | None
    """[cells, N] expression that differences are added to; None where tokens are no differences."""


class PredictedRows(NamedTuple):
    """Hold predicted cells as rows of a sparse matrix."""

    offsets: NDArray[np.int64]
    """[cells + 1]."""
    columns: NDArray[np.int32]
    """[nnz], ascending in each cell."""
    values: NDArray[np.float32]
    """[nnz], none of them 0."""
    num_capped: int = 0
    """Cells whose total was above the most that is allowed."""


@dataclass(frozen=True, eq=False)
class ValueDecoder:
    """Turn tokens into values of one space.

    A token stands for a bin, or where no value of the training cells is so large (or so low), for the outermost bin
    that has any. The value is drawn inside the bin, evenly on either side of what the token decodes to, so
    that this is its mean. Counts of log-normalised values are brought to the depth of the matched control, and rounded
    to one of the two neighbouring whole numbers at random, so that the mean stays. Bins of one count are exact.
    """

    tokenizer: ValueTokenizer
    transform: ExpressionTransform
    space: Space
    holds_counts: bool
    """Whether the corpus holds counts; else it holds log-normalised values, which stay what they are."""

    @property
    def target_sum(self) -> float | None:
        """Return the library size of log-normalised values; None where they are what the corpus holds."""
        if not self.holds_counts or self.space == "counts":
            return None
        return self.transform.target_sum or DEFAULT_TARGET_SUM

    def decode(
        self, tokens: NDArray[np.integer], controls: MatchedControls, seeds: NDArray[np.uint64]
    ) -> PredictedRows:
        """Return the values of cells.

        Args:
            tokens: [cells, N].
            controls: those that the cells were matched to.
            seeds: [cells], what is random in each cell is drawn from.
        """
        tokens = self.tokenizer.within(tokens)
        if controls.values is not None:
            rows = _sparse(self._changed(tokens, controls.values, seeds))
        else:
            rows = self._drawn(tokens, seeds)
        if self.space == "lognorm":
            return self._as_lognorm(rows, controls)
        if self.tokenizer.strategy != "counts":
            rows = self._as_counts(rows, controls, seeds)
        return _capped(rows)

    def _drawn(self, tokens: NDArray[np.integer], seeds: NDArray[np.uint64]) -> PredictedRows:
        """Draw a value in the bin of every token but zero's."""
        is_present = tokens != self.tokenizer.zero_token
        row, column = np.nonzero(is_present)
        lengths = is_present.sum(axis=1)
        columns = column.astype(np.int32)
        values = self._inside(tokens[row, column], seeds, lengths, columns)
        return _nonzero(offsets_of(lengths), columns, values)

    def _changed(
        self, tokens: NDArray[np.integer], base: NDArray[np.float32], seeds: NDArray[np.uint64]
    ) -> NDArray[np.float32]:
        """Add a drawn difference to the control's values [cells, N]; what falls below zero is zero."""
        values = base.copy()
        row, column = np.nonzero(tokens != self.tokenizer.zero_token)
        lengths = np.bincount(row, minlength=len(tokens))
        values[row, column] += self._inside(tokens[row, column], seeds, lengths, column.astype(np.int32))
        return np.maximum(values, 0, out=values)

    def _inside(
        self,
        tokens: NDArray[np.integer],
        seeds: NDArray[np.uint64],
        lengths: NDArray[np.integer],
        columns: NDArray[np.int32],
    ) -> NDArray[np.float64]:
        """Draw a value in the bin of each token; its mean is what the token decodes to."""
        tokenizer = self.tokenizer
        bins = np.abs(tokens - tokenizer.zero_token)
        low, high = (tokenizer.edges[place].astype(np.float64) for place in (bins - 1, bins))
        is_counts = tokenizer.strategy == "counts"
        if is_counts:
            low += 1  # the smallest count of the bin
        signed = tokenizer.decode(tokens).astype(np.float64)
        values, width = np.abs(signed), high - low
        # Most counts have a bin of their own, and nothing to be drawn.
        wide = np.flatnonzero((width > 0) | (is_counts & (values != np.rint(values))))
        row = row_numbers(offsets_of(lengths))[wide]
        cells = seeds, np.bincount(row, minlength=len(lengths)), columns[wide]
        low, high, centre, width = low[wide], high[wide], values[wide], width[wide]
        # A part below and a part above the centre, each drawn from as often as lets the mean be the centre.
        share_below = (high - centre) / np.where(width > 0, width, 1)
        is_below = _uniform(Stream.PREDICTED_SIDE, *cells) < share_below
        place = _uniform(Stream.PREDICTED_VALUE, *cells)
        drawn = np.where(is_below, low + (centre - low) * place, centre + (high - centre) * place)
        # The last bin may hold values beyond its end, and then its mean may lie there too.
        drawn = np.where((low <= centre) & (centre <= high), drawn, centre)
        values[wide] = _rounded(drawn, *cells) if is_counts else drawn
        return np.where(signed < 0, -values, values)

    def _as_lognorm(self, rows: PredictedRows, controls: MatchedControls) -> PredictedRows:
        if self.holds_counts and (self.transform.target_sum is None or not self.transform.log1p):
            values = rows.values.astype(np.float64)
            if self.tokenizer.strategy != "counts" and self.transform.log1p:
                values = np.expm1(values)
            if self.transform.target_sum is None:
                # A cell's counts are its share of a library, as the matched control's are of that one's.
                share = controls.column_total / np.where(controls.total > 0, controls.total, 1)
                values *= _per_value(_scales(rows, values, DEFAULT_TARGET_SUM * share), rows)
            rows = rows._replace(values=np.log1p(values).astype(np.float32))
        return rows

    def _as_counts(
        self, rows: PredictedRows, controls: MatchedControls, seeds: NDArray[np.uint64]
    ) -> PredictedRows:
        values = rows.values.astype(np.float64)
        if self.transform.log1p:
            values = np.expm1(values)
        if self.transform.target_sum is not None:
            values *= _per_value(_scales(rows, values, controls.column_total), rows)
        rounded = _rounded(values, seeds, np.diff(rows.offsets), rows.columns)
        return _nonzero(rows.offsets, rows.columns, rounded)


def _uniform(
    stream: Stream, seeds: NDArray[np.uint64], lengths: NDArray[np.integer], columns: NDArray[np.int32]
) -> NDArray[np.float64]:
    """Draw a number in (0, 1) for each value of each cell."""
    of_cells = splitmix64(seeds, np.full(len(seeds), int(stream), np.int64))
    return (gene_hash(of_cells, lengths, columns).astype(np.float64) + 0.5) * 2.0**-32


def _rounded(
    values: NDArray[np.float64],
    seeds: NDArray[np.uint64],
    lengths: NDArray[np.integer],
    columns: NDArray[np.int32],
) -> NDArray[np.float64]:
    """Round to a neighbouring whole number at random, so that the value is the mean."""
    return np.floor(values + _uniform(Stream.PREDICTED_ROUNDING, seeds, lengths, columns))


def _scales(
    rows: PredictedRows, values: NDArray[np.float64], totals: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return what each cell is multiplied by to have this total; a cell of zeros stays one."""
    sums = np.bincount(row_numbers(rows.offsets), weights=values, minlength=len(rows.offsets) - 1)
    return totals / np.where(sums > 0, sums, 1)


def _per_value(of_cells: NDArray[Any], rows: PredictedRows) -> NDArray[Any]:
    return np.repeat(of_cells, np.diff(rows.offsets))


def _capped(rows: PredictedRows) -> PredictedRows:
    """Scale counts of a cell that has more than are allowed, rounding down."""
    values = rows.values.astype(np.float64)
    totals = np.bincount(row_numbers(rows.offsets), weights=values, minlength=len(rows.offsets) - 1)
    is_over = totals > MAX_TOTAL
    if not is_over.any():
        return rows
    scales = np.where(is_over, MAX_TOTAL / np.where(totals > 0, totals, 1), 1.0)
    scaled = np.where(_per_value(is_over, rows), np.floor(values * _per_value(scales, rows)), values)
    return _nonzero(rows.offsets, rows.columns, scaled)._replace(num_capped=int(is_over.sum()))


def _sparse(values: NDArray[np.float32]) -> PredictedRows:
    row, column = np.nonzero(values)
    lengths = np.bincount(row, minlength=len(values))
    return PredictedRows(offsets_of(lengths), column.astype(np.int32), values[row, column])


def _nonzero(
    offsets: NDArray[np.int64], columns: NDArray[np.int32], values: NDArray[np.floating]
) -> PredictedRows:
    """Leave out the zeros."""
    kept = values != 0
    if kept.all():
        return PredictedRows(offsets, columns, values.astype(np.float32))
    lengths = np.bincount(row_numbers(offsets)[kept], minlength=len(offsets) - 1)
    return PredictedRows(offsets_of(lengths), columns[kept], values[kept].astype(np.float32))
