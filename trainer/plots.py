"""Pictures and tables of a finished run: the losses of its phases as a PNG, and results as plain text."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.console import table
from trainer.errors import UserError
from trainer.report_charts import running_mean

_TRAINING, _VALIDATION, _RATE = "#1f5f99", "#c2410c", "#4b5563"
_BASELINES = ("#15803d", "#7e22ce", "#a16207", "#be123c")
_SHADES = ("#f1f5f9", "#ffffff")


def plot_losses(
    records: Sequence[Mapping[str, Any]],
    path: Path | str,
    *,
    title: str = "",
    loss_label: str = "loss",
    baselines: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Draw training and validation loss and the learning rate over the optimizer steps of a run.

    Args:
        records: The records of `metrics.jsonl`, in order.
        path: The PNG to write.
        title: Printed above.
        loss_label: What the loss is, with its unit.
        baselines: For each phase losses by name, drawn across that phase as dashed lines.

    Returns:
        The path.

    Raises:
        UserError: there is no training step to draw.
    """
    training = [record for record in records if record.get("kind", "train") == "train"]
    if not training:
        raise UserError(f"{path}: not drawn, for the run's metrics hold no optimizer step yet")
    validation = [record for record in records if record.get("kind") == "validation"]
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    phases = _phase_spans(training)
    _draw_training_loss(losses, training)
    if validation:
        losses.plot(
            *_series(validation, "loss"),
            color=_VALIDATION,
            marker="o",
            markersize=4.5,
            linestyle="none",
            markeredgecolor="white",
            markeredgewidth=0.6,
            label="validation",
            zorder=4,
        )
    _draw_baselines(losses, phases, baselines or {})
    _limit_to_data(losses, training, validation, baselines or {})
    rates.plot(*_series(training, "lr"), color=_RATE, linewidth=1.2)
    for axes in (losses, rates):
        _shade_phases(axes, phases)
    _name_phases(losses, phases)
    losses.set_ylabel(loss_label)
    losses.legend(loc="upper right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=9)
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    rates.set_xlabel("optimizer step")
    rates.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, steps=[1, 2, 5, 10]))
    if title:
        figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=150)
    return Path(path)


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a plain-text table; the columns are their keys, in the order of first appearance."""
    headers = list(dict.fromkeys(key for row in rows for key in row))
    return table(headers, [[row.get(header) for header in headers] for row in rows])


def _series(records: Sequence[Mapping[str, Any]], field: str) -> tuple[np.ndarray, np.ndarray]:
    kept = [record for record in records if record.get(field) is not None]
    steps = np.array([record["global_step"] for record in kept], dtype=float)
    return steps, np.array([float(record[field]) for record in kept])


def _phase_spans(training: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Return each phase's name with where it starts and ends on the axis of steps."""
    spans = []
    for name, group in groupby(training, key=lambda record: str(record.get("phase", ""))):
        steps = [record["global_step"] for record in group]
        spans.append((name, steps[0] - 0.5, steps[-1] + 0.5))
    return spans


def _draw_training_loss(axes: Axes, training: Sequence[Mapping[str, Any]]) -> None:
    """Draw the loss of single steps faintly, and their running mean within each phase on top."""
    label: str | None = "training"
    for _, group in groupby(training, key=lambda record: record.get("phase")):
        steps, values = _series(list(group), "loss")
        finite = np.isfinite(values)
        steps, values = steps[finite], values[finite]
        mean_steps, means = running_mean(steps, values)
        if len(means) < len(values):
            axes.plot(steps, values, color=_TRAINING, linewidth=0.7, alpha=0.3)
        # A phase of one step has no line to draw.
        marker = "." if len(means) == 1 else ""
        axes.plot(mean_steps, means, color=_TRAINING, linewidth=1.6, marker=marker, label=label)
        label = None


def _draw_baselines(
    axes: Axes, phases: Sequence[tuple[str, float, float]], baselines: Mapping[str, Mapping[str, float]]
) -> None:
    names = list(dict.fromkeys(name for losses in baselines.values() for name in losses))
    labelled = set()
    for phase, start, end in phases:
        for name, loss in baselines.get(phase, {}).items():
            axes.hlines(
                loss,
                start,
                end,
                color=_BASELINES[names.index(name) % len(_BASELINES)],
                linestyle="dashed",
                linewidth=1.3,
                label="_" if name in labelled else name,
                zorder=3,
            )
            labelled.add(name)


def _name_phases(axes: Axes, phases: Sequence[tuple[str, float, float]]) -> None:
    """Write the phases' names above them; with many phases only some, so that they do not overlap."""
    every = math.ceil(len(phases) / 8)
    for name, start, end in phases[::every]:
        axes.text(
            (start + end) / 2,
            1.015,
            name,
            ha="center",
            va="bottom",
            fontsize=9,
            color=_RATE,
            transform=axes.get_xaxis_transform(),
        )


def _limit_to_data(
    axes: Axes,
    training: Sequence[Mapping[str, Any]],
    validation: Sequence[Mapping[str, Any]],
    baselines: Mapping[str, Mapping[str, float]],
) -> None:
    """Cut off single steps far above the rest (the first ones, a spike), which would flatten the others."""
    steps, points = (_series(records, "loss")[1] for records in (training, validation))
    steps = steps[np.isfinite(steps)]
    others = [
        *points[np.isfinite(points)],
        *(loss for losses in baselines.values() for loss in losses.values()),
    ]
    if not len(steps):
        return
    bottom, top = min([steps.min(), *others]), max([np.quantile(steps, 0.99), *others])
    margin = 0.08 * (top - bottom) or 0.5
    axes.set_ylim(bottom - margin, top + 2 * margin)


def _shade_phases(axes: Axes, phases: Sequence[tuple[str, float, float]]) -> None:
    for index, (_, start, end) in enumerate(phases):
        axes.axvspan(start, end, color=_SHADES[index % 2], zorder=0, linewidth=0)
    if phases:
        start, end = phases[0][1], phases[-1][2]
        axes.set_xlim(start, end + 0.005 * (end - start))
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
