"""The comparison of FP8 with bf16: what it measures, and what it advises."""

import json

import pytest
from corpora import make_cells, write_corpus
from running import reset_accelerate, toy, write_config

from trainer import parity
from trainer.config import load_run_config
from trainer.errors import ConfigError
from trainer.parity import Parity, Side, compare
from trainer.phases import Phase
from trainer.plan import main

NUM_GENES = 40


@pytest.fixture(autouse=True)
def as_the_first_in_its_process():
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture
def config(tmp_path):
    corpus = write_corpus(tmp_path / "cells", make_cells(64, NUM_GENES, 12), NUM_GENES)
    phase = {
        "dataloader_factory": "data.loader.cell_loader",
        "dataloader_args": {
            "path": str(corpus),
            "tokenizer": {"strategy": "binned_expression", "n_bins": 5, "max_genes": 16},
            "masking": {"mask_ratio": 0.3, "target": "both"},
        },
        "epochs": 2,
    }
    model = {
        "model_class": "models.encoder.MaskedCellEncoder",
        "config_class": "models.encoder.EncoderConfig",
        "config_args": {"hidden_dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64},
    }
    content = toy(phase, model=model, micro_batch_size=8, global_batch_size=16)
    return write_config(tmp_path, content, precision="fp8", fp8={"backend": "emulate"})


def made_up(losses=(1.0, 0.9), fp8_losses=(1.0, 0.9), times=(1.0, 1.0), is_real=True):
    sides = [Side(list(of), [9.0, time]) for of, time in zip((losses, fp8_losses), times, strict=True)]
    return Parity(*sides, gradient_errors={"model.layer.weight": 0.04}, is_real=is_real)


def test_both_sides_start_from_one_state_and_see_the_same_cells(config):
    found = compare(load_run_config(config), 5)
    assert len(found.bf16.losses) == len(found.fp8.losses) == len(found.fp8.seconds) == 5
    assert 0 < abs(found.bf16.losses[0] - found.fp8.losses[0]) < 0.01 * found.bf16.losses[0]
    assert found.loss_difference < 0.02


def test_gradients_differ_most_where_fp8_computes_and_not_at_all_in_a_run_with_itself(config, monkeypatch):
    errors = compare(load_run_config(config), 1).gradient_errors
    body = [error for name, error in errors.items() if name.endswith("linear1.weight")]
    assert len(body) == 2 and all(0.005 < error < 0.3 for error in body)
    monkeypatch.setattr(parity, "build_model", lambda config, facts: build_in_bf16(config, facts))
    assert max(compare(load_run_config(config), 1).gradient_errors.values()) == 0.0


def build_in_bf16(config, facts):
    from trainer.model_building import build_model

    return build_model(config.model_copy(update={"precision": "bf16", "fp8": None}), facts)


def test_rates_follow_each_phases_own_steps_and_limits(config, monkeypatch):
    told = []
    monkeypatch.setattr(
        Phase, "learning_rate_factor", lambda self, step: told.append((self.name, step)) or 1.0
    )
    run = load_run_config(config, ["datasets.0.max_steps=2"])
    second = run.datasets[0].model_copy(update={"name": "second", "max_steps": None})
    compare(run.model_copy(update={"datasets": (*run.datasets, second)}), 4)
    name = run.datasets[0].name
    assert told == 2 * [(name, 0), (name, 1), ("second", 0), ("second", 1)]


def test_parameters_that_a_phase_starts_anew_are_drawn_anew_on_both_sides(config):
    plain, anew = (
        compare(load_run_config(config, [f"datasets.0.reinitialise=[{patterns}]"]), 1)
        for patterns in ("", "linear1")
    )
    assert plain.bf16.losses != anew.bf16.losses and plain.fp8.losses != anew.fp8.losses
    assert anew.loss_difference < 0.01


def test_the_command_prints_the_comparison_and_the_advice(config, capsys):
    assert main(["--config", str(config), "--fp8-parity", "3"]) == 0
    output = capsys.readouterr().out
    assert "loss bf16" in output and "mlp.linear1.weight" in output and "emulation says nothing" in output
    assert main(["--config", str(config), "--fp8-parity", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bf16"]["losses"]


def test_a_run_that_does_not_ask_for_fp8_is_refused(config):
    plain = load_run_config(config, ["precision=bf16", "fp8=null"])
    with pytest.raises(ConfigError, match="needs precision: fp8"):
        compare(plain, 1)


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        (made_up(fp8_losses=(1.1, 1.0)), "not worth it: the losses differ by 10"),
        (made_up(times=(1.0, 0.98)), "not worth it at this size: FP8 steps take 0.98 of bf16's time"),
        (made_up(times=(1.3, 1.0)), "worth it: the losses agree .* 1.30 times as fast"),
        (made_up(is_real=False), "emulation says nothing about speed"),
    ],
)
def test_the_advice_follows_from_losses_and_times(found, advice):
    import re

    assert re.search(advice, found.advice())
