"""Expression values as tokens, and back: log bins, signed bins of differences, and counts.

Token 0 of `log_bins` and `counts` is zero and nothing else; token i holds the values in (edge i - 1, edge i].
`delta_bins` does the same with the magnitude of a difference on both sides of a neutral token in the middle. The id
that hides a value, in a model that masks, is the number of tokens, outside their range.

The inverse of a token is the middle of its bin, or, once fitted, the mean of the values that fell into it: then the
mean of decoded values is the mean of the values themselves.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.options import Options
from data.tokenizers import ExpressionTransform

Strategy = Literal["log_bins", "delta_bins", "counts"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
_MAX_COUNT = 1 << 24
"""Up to here float32 holds whole numbers exactly."""
_SLACK = 1 + 1e-6
"""What a bound that rests on a logarithm is widened by, so that rounding does not put a value outside."""


@dataclass(frozen=True, eq=False)
class ValueTokenizer:
    """Hold the bins of one strategy; `encode` and `decode` work on arrays of any shape."""

    strategy: Strategy
    edges: NDArray[np.float32]
    """Upper edge of each magnitude bin, the first one that of the zero (or neutral) bin."""
    centres: NDArray[np.float32]
    """What each token decodes to, [num_tokens]."""
    out_of_range: Literal["clip", "error"] = "clip"
    """Values beyond the last edge join the last bin, or are an error."""
    outermost: tuple[int, int] | None = None
    """Lowest and highest token that values fell into when it was fitted; None: not fitted, or before this was kept."""

    @property
    def num_tokens(self) -> int:
        """Count the tokens, the mask not among them."""
        return len(self.centres)

    @property
    def mask_id(self) -> int:
        """Return the id that hides a value."""
        return self.num_tokens

    @property
    def zero_token(self) -> int:
        """Return the token of 0."""
        return len(self.edges) - 1 if self.strategy == "delta_bins" else 0

    def encode(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """Return the token of each value; what no bin can hold is an error."""
        if not values.size:
            return np.zeros(values.shape, np.int64)
        is_signed = self.strategy == "delta_bins"
        magnitudes = np.abs(values) if is_signed else values
        low, high = float(magnitudes.min()), float(magnitudes.max())  # NaN where one is
        limit = float(self.edges[-1])
        if not (low >= 0 and high < np.inf):
            first = values[~(np.isfinite(values) & (magnitudes >= 0))].reshape(-1)[0]
            raise DataError(
                f"the value {first} has no {self.strategy} token: values must be finite"
                + ("" if is_signed else "; differences below zero need strategy: delta_bins")
                + ("" if is_signed else ", and other values cannot be negative")
            )
        if high > limit and self.out_of_range == "error":
            raise DataError(
                f"the value {high:g} lies beyond the last bin, which ends at {limit:g}; raise max_value, or set "
                "out_of_range: clip to count it to the last bin"
            )
        if self.strategy == "counts" and values.dtype.kind == "f" and (values != np.rint(values)).any():
            first = values[values != np.rint(values)].reshape(-1)[0]
            raise DataError(f"the value {first} is no count; strategy: counts needs whole numbers")
        bins = np.searchsorted(self.edges, magnitudes.astype(np.float32, copy=False), side="left")
        bins = np.minimum(bins, len(self.edges) - 1)
        if not is_signed:
            return bins
        return self.zero_token + np.where(values < 0, -bins, bins)

    def decode(self, tokens: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return the value that each token stands for."""
        return self.centres[self.within(tokens)]

    def within(self, tokens: NDArray[np.integer]) -> NDArray[np.integer]:
        """Return tokens, and for those beyond the values that it was fitted to the outermost one that has any."""
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.num_tokens:
            raise DataError(
                f"tokens {tokens.min()} to {tokens.max()} cannot be decoded: there are 0 to {self.num_tokens - 1}, and "
                f"{self.mask_id} hides a value"
            )
        return tokens if self.outermost is None else np.clip(tokens, *self.outermost)

    def fitted(self, parts: Iterable[NDArray[Any]]) -> "ValueTokenizer":
        """Return the tokenizer with the mean of these values in each bin as its inverse.

        Bins that none of them falls into keep theirs, and the token of 0 decodes to 0. A bin that lies beyond all of
        them stands for the last one that holds any: a model that was trained little may draw it, and no cell has it.
        """
        counts, sums = np.zeros(self.num_tokens, np.int64), np.zeros(self.num_tokens)
        for values in parts:
            tokens, flat = self.encode(values).reshape(-1), values.reshape(-1).astype(np.float64)
            counts += np.bincount(tokens, minlength=self.num_tokens)
            sums += np.bincount(tokens, weights=flat, minlength=self.num_tokens)
        counts[self.zero_token] = 0
        means = sums / np.maximum(counts, 1)
        centres = np.where(counts > 0, means, self.centres).astype(np.float32)
        seen = [self.zero_token, *np.flatnonzero(counts).tolist()]
        return replace(self, centres=centres, outermost=(min(seen), max(seen)))

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` makes the tokenizer of again, as JSON can hold it."""
        return {
            "strategy": self.strategy,
            "edges": [float(edge) for edge in self.edges],
            "centres": [float(centre) for centre in self.centres],
            "out_of_range": self.out_of_range,
            "outermost": None if self.outermost is None else list(self.outermost),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], where: str = "value tokenizer") -> "ValueTokenizer":
        """Read what `to_dict` wrote."""
        try:
            edges = np.asarray(content["edges"], np.float32)
            centres = np.asarray(content["centres"], np.float32)
            strategy, out_of_range = content["strategy"], content["out_of_range"]
            num_tokens = 2 * len(edges) - 1 if strategy == "delta_bins" else len(edges)
            given = content.get("outermost")
            outermost = None if given is None else (int(given[0]), int(given[1]))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{where}: not a value tokenizer ({error!r})") from error
        is_known = strategy in STRATEGIES and out_of_range in ("clip", "error")
        is_known = is_known and (outermost is None or 0 <= outermost[0] <= outermost[1] < num_tokens)
        if not is_known or edges.ndim != 1 or centres.shape != (num_tokens,) or (np.diff(edges) <= 0).any():
            raise DataError(f"{where}: not a value tokenizer: its bins do not fit together")
        return cls(strategy, edges, centres, out_of_range, outermost)


def log_bins(num_tokens: int, min_value: float, max_value: float) -> ValueTokenizer:
    """Cut (0, max_value] into bins: up to `min_value`, and from there on equally wide in the logarithm."""
    edges = np.concatenate([[0.0], np.geomspace(min_value, max_value, num_tokens - 1)]).astype(np.float32)
    return ValueTokenizer("log_bins", edges, _middles(edges))


def delta_bins(num_tokens: int, min_value: float, max_value: float) -> ValueTokenizer:
    """Cut [-max_value, max_value] alike on both sides of a neutral token, which ends at `min_value`."""
    edges = np.geomspace(min_value, max_value, num_tokens // 2 + 1).astype(np.float32)
    above = _middles(edges)[1:]
    return ValueTokenizer("delta_bins", edges, np.concatenate([-above[::-1], [np.float32(0)], above]))


def count_bins(num_tokens: int, max_value: int) -> ValueTokenizer:
    """Give every small count a token of its own, and those up to `max_value` bins of equal ratio."""
    edges = [0]
    for left in range(num_tokens - 1, 0, -1):
        ratio = (max_value / max(edges[-1], 1)) ** (1 / left)
        edges.append(max(edges[-1] + 1, round(edges[-1] * ratio)))
    bounds = np.asarray(edges, np.float32)
    centres = np.concatenate([[0.0], (bounds[:-1] + 1 + bounds[1:]) / 2]).astype(np.float32)
    return ValueTokenizer("counts", bounds, centres)


def build_value_tokenizer(
    options: Mapping[str, Any], *, value_kind: Literal["counts", "lognorm"], where: str = "tokenizer"
) -> tuple[ValueTokenizer, ExpressionTransform, bool]:
    """Check a value tokenizer's options and build it.

    Args:
        options: the table in the YAML file; `strategy` decides which others there are.
        value_kind: what the corpus holds, which decides whether values are normalised.
        where: place of the options in the YAML file.

    Returns:
        The tokenizer, what turns stored values into those it takes, and whether its inverse is to be fitted.
    """
    table = Options(options, where)
    strategy = table.choice("strategy", STRATEGIES, None)
    if strategy is None:
        table.wrong("strategy", f"missing; it must be one of {', '.join(STRATEGIES)}")
        strategy = "log_bins"
    transform = ExpressionTransform(None, log1p=False)
    if strategy == "counts":
        if value_kind != "counts":
            table.wrong(
                "strategy", "counts needs a corpus of counts, and this one holds log-normalised values"
            )
        highest = 10_000.0
    else:
        transform, highest = _transform(table, value_kind)
    is_signed = strategy == "delta_bins"
    num_tokens = table.count("n_bins", {"log_bins": 32, "delta_bins": 33, "counts": 64}[strategy], minimum=3)
    if is_signed and num_tokens % 2 == 0:
        table.wrong(
            "n_bins", f"got {num_tokens}; it must be odd: as many bins above the neutral one as below it"
        )
        num_tokens += 1
    max_value = table.number("max_value", highest, low=0, above=True)
    min_value = 0.0
    if strategy != "counts":
        min_value = table.number(
            "min_value", min(1e-3 if is_signed else 0.1, max_value / 2), low=0, above=True
        )
        if min_value >= max_value:
            table.wrong("min_value", f"got {min_value:g}; it must be below max_value, {max_value:g}")
            min_value = max_value / 2
    elif not num_tokens - 1 <= max_value <= _MAX_COUNT or max_value != int(max_value):
        table.wrong(
            "max_value",
            f"got {max_value:g}; it must be a whole number from n_bins - 1 = {num_tokens - 1} (tokens of counts above "
            f"zero) to {_MAX_COUNT}",
        )
        max_value = num_tokens
    out_of_range = table.choice("out_of_range", ("clip", "error"), "clip")
    is_fitted = table.choice("centres", ("fitted", "middle"), "fitted") == "fitted"
    table.finish()
    if strategy == "counts":
        built = count_bins(num_tokens, int(max_value))
    else:
        built = (delta_bins if is_signed else log_bins)(num_tokens, min_value, max_value)
    return replace(built, out_of_range=out_of_range), transform, is_fitted


def _transform(table: Options, value_kind: str) -> tuple[ExpressionTransform, float]:
    """Read how counts become expression, and return the highest value that can come of it (10 where none is)."""
    normalize = table.choice("normalize", ("library_size", None), "library_size")
    target_sum = table.number("target_sum", 1e4, low=0, above=True)
    log1p = table.flag("log1p", True)
    if value_kind != "counts":
        for name in ("normalize", "target_sum", "log1p"):
            if name in table:
                table.wrong(name, "the corpus holds log-normalised values already; leave this option out")
        return ExpressionTransform(None, log1p=False), 10.0
    if normalize is None and "target_sum" in table:
        table.wrong("target_sum", "nothing is scaled to it without normalize: library_size")
    scale = target_sum if normalize is not None else None
    highest = 1e4 if scale is None else scale
    return ExpressionTransform(scale, log1p), float(np.log1p(highest) if log1p else highest) * _SLACK


def _middles(edges: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return 0 for the first bin and the middle of each of the others."""
    middles = (edges[:-1].astype(np.float64) + edges[1:]) / 2
    return np.concatenate([[0.0], middles]).astype(np.float32)
