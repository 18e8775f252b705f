import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from trainer.errors import UserError
from trainer.plots import plot_losses, results_table


def steps(phase, start, stop, loss):
    return [
        {"kind": "train", "global_step": step, "phase": phase, "loss": loss(step), "lr": 1e-3 / step}
        for step in range(start, stop)
    ]


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    save = Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_the_plot_shows_phases_losses_rates_and_baselines(tmp_path, drawn):
    records = [
        *steps("first", 1, 101, lambda step: 3 - step / 100),
        {"kind": "validation", "global_step": 100, "phase": "first", "loss": 2.1},
        *steps("second", 101, 151, lambda step: 2.5),
    ]
    baselines = {"first": {"marginal": 2.4, "depth": 2.2}, "second": {"marginal": 2.6}}
    path = plot_losses(records, tmp_path / "loss.png", baselines=baselines, loss_label="nats")
    assert matplotlib.image.imread(path).shape == (810, 1350, 4)
    losses, rates = drawn[0].axes
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels == ["training", "validation", "marginal", "depth"]
    assert [text.get_text() for text in losses.texts] == ["first", "second"]
    assert losses.get_ylabel() == "nats" and rates.get_ylabel() == "learning rate"
    [validation] = [line for line in losses.lines if line.get_label() == "validation"]
    assert validation.get_xydata().tolist() == [[100, 2.1]]


def test_one_spike_does_not_flatten_the_rest(tmp_path, drawn):
    records = steps("first", 1, 401, lambda step: 1000.0 if step == 200 else 2 + 1 / step)
    plot_losses(records, tmp_path / "loss.png")
    assert drawn[0].axes[0].get_ylim()[1] < 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "records",
    [
        steps("first", 1, 2, lambda step: 2.0),
        steps("first", 1, 4, lambda step: math.nan),
        [{"kind": "train", "global_step": 1, "phase": "first", "loss": None, "lr": 0.1}],
        [record for n in range(30) for record in steps(f"phase_{n}", 3 * n + 1, 3 * n + 4, np.sin)],
    ],
    ids=["one step", "only nan", "a step without loss", "many phases"],
)
def test_unusual_runs_are_drawn_without_complaint(tmp_path, records):
    assert plot_losses(records, tmp_path / "loss.png").stat().st_size > 5000


def test_a_run_without_a_step_is_not_drawn(tmp_path):
    with pytest.raises(UserError, match="no optimizer step yet"):
        plot_losses([], tmp_path / "loss.png")


def test_the_same_records_give_the_same_picture(tmp_path):
    records = steps("first", 1, 50, lambda step: 1 / step)
    pictures = [plot_losses(records, tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    assert pictures[0] == pictures[1]


def test_results_have_a_column_for_each_key_of_any_row():
    rows = [{"phase": "first", "loss": 1.5}, {"phase": "second", "loss": 2.25, "cells": 70}]
    assert results_table(rows).splitlines() == [
        "phase     loss  cells",
        "------  ------  -----",
        "first   1.5000      -",
        "second  2.2500     70",
    ]
