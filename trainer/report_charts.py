"""Line charts as SVG that stands in a page: no script, colours from the page's style sheet, numbers alone inside."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

NUM_COLOURS = 6
_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 86, 14, 30, 44
_MOST_POINTS = 400
LARGEST = 1e100
"""What is above is not drawn: it is no loss, and arithmetic with it overflows."""


@dataclass(frozen=True)
class Series:
    """One line of a chart, or its dots."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    colour: int = 0
    kind: Literal["line", "faint", "dots"] = "line"


@dataclass(frozen=True)
class Span:
    """Say where a phase lies on the axis of steps."""

    name: str
    start: float
    end: float


def chart(
    series: Sequence[Series],
    spans: Sequence[Span] = (),
    *,
    label: str,
    height: int = 250,
    from_zero: bool = False,
) -> str:
    """Return a chart as SVG; empty where there is nothing finite to draw.

    Args:
        series: What is drawn, the last on top.
        spans: Phases, which are shaded and named.
        label: What the chart shows, for readers that cannot see it.
        height: In the units in which the width is 720.
        from_zero: Let the vertical axis begin at 0.
    """
    kept = _drawable(series)
    if not kept:
        return ""
    x_low = min([*(each.x.min() for each in kept), *(span.start for span in spans)])
    x_high = max([*(each.x.max() for each in kept), *(span.end for span in spans)])
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    y_low, y_high = _limits(kept, from_zero)
    x_scale = (_WIDTH - _LEFT - _RIGHT) / (x_high - x_low)
    y_scale = (height - _TOP - _BOTTOM) / (y_high - y_low)
    floor = height - _BOTTOM

    def across(x: float) -> float:
        return round(_LEFT + (x - x_low) * x_scale, 1)

    def up(y: float) -> float:
        # What lies above the limits is drawn at the frame.
        return round(floor - (min(max(y, y_low), y_high) - y_low) * y_scale, 1)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(label)}">',
        *_shaded(spans, across, floor),
        *_axes((x_low, x_high), (y_low, y_high), across, up, floor),
        *(part for each in kept for part in _drawn(each, across, up)),
        "</svg>",
    ]
    return "".join(parts)


def running_mean(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """Return the mean over a fortieth of the points around each; what is not finite is left out."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    window = max(1, len(y) // 40)
    if window == 1:
        return x, y
    means = np.convolve(y, np.full(window, 1 / window), mode="valid")
    first = (window - 1) // 2
    return x[first : first + len(means)], means


def tick_text(value: float) -> str:
    """Return a number as short as an axis needs it."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _drawable(series: Sequence[Series]) -> list[Series]:
    """Return what of the series is finite; none that has nothing left."""
    kept = []
    for each in series:
        finite = np.isfinite(each.x) & (np.abs(each.y) < LARGEST)
        if finite.any():
            kept.append(Series(each.name, each.x[finite], each.y[finite], each.colour, each.kind))
    return kept


def _axes(
    x_limits: tuple[float, float],
    y_limits: tuple[float, float],
    across: Callable[[float], float],
    up: Callable[[float], float],
    floor: int,
) -> list[str]:
    """Return the grid, the numbers at both axes (whole ones at the horizontal one) and the horizontal axis."""
    parts = []
    for tick in _ticks(*y_limits, 5):
        y = up(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y}" dy="0.35em" text-anchor="end">{tick_text(tick)}</text>')
    for tick in _ticks(*x_limits, 5):
        if tick == round(tick):
            parts.append(
                f'<text x="{across(tick)}" y="{floor + 22}" text-anchor="middle">{tick_text(tick)}</text>'
            )
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{floor}" y2="{floor}"/>')
    return parts


def _drawn(series: Series, across: Callable[[float], float], up: Callable[[float], float]) -> list[str]:
    """Return the dots of a series, or its line; a single point is a dot."""
    points = zip(*_thinned(series.x, series.y), strict=True)
    if series.kind == "dots" or len(series.x) == 1:
        return [
            f'<circle class="c{series.colour}" cx="{across(x)}" cy="{up(y)}" r="4">'
            f"<title>{html.escape(series.name)}, step {x:g}: {y:.5g}</title></circle>"
            for x, y in points
        ]
    line = " ".join(f"{across(x)},{up(y)}" for x, y in points)
    return [f'<polyline class="c{series.colour} {series.kind}" points="{line}"/>']


def _limits(series: Sequence[Series], from_zero: bool) -> tuple[float, float]:
    """Return the vertical limits; single steps far above the rest, as at the start, do not flatten the others."""
    low = min(each.y.min() for each in series)
    high = max(
        each.y.max() if each.kind == "dots" or len(each.y) < 20 else np.quantile(each.y, 0.99)
        for each in series
    )
    low, high = (min(0.0, low) if from_zero else low), max(low, high)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return float(low if from_zero and low == 0 else low - margin), float(high + margin)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between two limits, at most about `most`."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def _thinned(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
    """Keep of many points the lowest and the highest of each stretch."""
    if len(x) <= _MOST_POINTS:
        return x, y
    kept = []
    for stretch in np.array_split(np.arange(len(x)), _MOST_POINTS // 2):
        kept += sorted({int(stretch[np.argmin(y[stretch])]), int(stretch[np.argmax(y[stretch])])})
    return x[kept], y[kept]


def _shaded(spans: Sequence[Span], across: Callable[[float], float], floor: int) -> list[str]:
    parts = []
    every = math.ceil(len(spans) / 6) or 1
    for index, span in enumerate(spans):
        x, width = across(span.start), across(span.end) - across(span.start)
        kind = "even" if index % 2 else "odd"
        parts.append(f'<rect class="{kind}" x="{x}" y="{_TOP}" width="{width:.1f}" height="{floor - _TOP}"/>')
        if index % every == 0:
            room = max(3, int(width * every / 11))
            name = span.name if len(span.name) <= room else f"{span.name[: room - 1]}…"
            parts.append(
                f'<text x="{x + width / 2:.1f}" y="{_TOP - 9}" text-anchor="middle">{html.escape(name)}</text>'
            )
    return parts
