"""FP8 steps that are not finite: back to the last checkpoint, on in bf16 for a while, then in FP8 again."""

import shutil
from types import SimpleNamespace

import pytest
from corpora import make_cells, write_corpus
from running import comparable_records, newest_run, records, toy, train, train_ranks

from models.encoder import MaskedCellEncoder
from models.fp8_switch import switch
from trainer import evaluation
from trainer.cells_index import read_index
from trainer.preemption import Preempted
from trainer.run import TrainingStopped
from trainer.statefile import load_tree

NUM_GENES = 40
FAILS_FROM, FAILS_UNTIL = 9, 14
"""The first and the last pass in FP8 whose loss is not finite: two passes a step, steps 5 to 7."""


class FragileEncoder(MaskedCellEncoder):
    """Overflow in FP8 for a while, as a run does that meets an outlier."""

    passes = 0

    def compute_loss(self, batch):
        output = super().compute_loss(batch)
        if not self.training or not switch.is_on:
            return output
        self.passes += 1
        is_overflow = FAILS_FROM <= self.passes <= FAILS_UNTIL
        return output._replace(sum=output.sum * float("inf")) if is_overflow else output


@pytest.fixture(autouse=True)
def in_fp8_before_and_after():
    switch.is_on = True
    yield
    switch.is_on = True


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return write_corpus(folder / "cells", make_cells(64, NUM_GENES, 12), NUM_GENES)


def config(corpus, fallback_steps, **changes):
    phase = {
        "dataloader_factory": "data.loader.cell_loader",
        "dataloader_args": {
            "path": str(corpus),
            "tokenizer": {"strategy": "binned_expression", "n_bins": 5, "max_genes": 16},
            "masking": {"mask_ratio": 0.3, "target": "both"},
        },
        "epochs": 3,
        "save_every_steps": 2,
    }
    model = {
        "model_class": "test_rollback.FragileEncoder",
        "config_class": "models.encoder.EncoderConfig",
        "config_args": {"hidden_dim": 32, "num_layers": 1, "num_heads": 2, "ffn_dim": 64, "dropout": 0.1},
    }
    settings = {"backend": "emulate", "fallback_steps": fallback_steps}
    content = toy(phase, model=model, micro_batch_size=8, global_batch_size=16)
    return {**content, "precision": "fp8", "fp8": settings, "max_nonfinite_steps": 3, **changes}


def test_a_run_goes_back_and_on_in_bf16_and_then_in_fp8_again(corpus, tmp_path, capsys):
    folder = train(tmp_path, config(corpus, 3))
    steps = records(folder)
    assert [record["global_step"] for record in steps] == list(range(1, 13))
    assert [record["is_fallback"] for record in steps] == 6 * [False] + 3 * [True] + 3 * [False]
    assert not any(record["is_skipped"] for record in steps[6:])
    progress = load_tree(folder / "checkpoint_12" / "run_state.safetensors")["progress"]
    assert (progress["rollbacks"], progress["bf16_until"]) == (1, 9)
    said = capsys.readouterr().out
    assert "rollback 1: FP8 steps up to 7 were not finite; on from step 6 in bf16" in said


def test_cells_of_steps_that_were_rolled_back_count_once(corpus, tmp_path):
    index = read_index(train(tmp_path, config(corpus, 3)))
    assert [(epoch.drawn, epoch.seen, epoch.skipped) for epoch in index.epochs] == 3 * [(64, 64, 0)]
    assert index.epochs[1].history == "1 rollback"
    assert index.epochs[1].in_skipped_steps == 32  # steps 5 and 6 are in the checkpoint
    assert (index.steps_computed_again, index.cells_computed_again) == (1, 16)


def test_a_resume_within_the_fallback_goes_on_in_bf16(corpus, tmp_path):
    content = config(corpus, 3)
    whole = train(tmp_path / "whole", content)
    folder = tmp_path / "cut" / "runs" / whole.name
    shutil.copytree(whole, folder)
    for step in (10, 12):
        shutil.rmtree(folder / f"checkpoint_{step}")
    # A new process would overflow again from its ninth pass in FP8 on: it takes six.
    train(tmp_path / "cut", content, resume_from="latest")
    assert comparable_records(folder) == comparable_records(whole)


def test_an_evaluation_that_the_checkpoint_owes_is_recorded_once(corpus, tmp_path, monkeypatch):
    """Asked to end in the evaluation at step 2, held at the resume, and held again after going back to that step."""
    content = config(corpus, 3, trackers=["csv"])
    content["datasets"][0] |= {"save_every_steps": None, "save_every_epochs": 9, "eval_every_steps": 2}
    content["datasets"][0]["dataloader_args"]["val_fraction"] = 0.25
    with monkeypatch.context() as stopped:
        stopped.setattr(evaluation, "add_up", lambda *_: SimpleNamespace(is_asked_to_stop=True))
        with pytest.raises(Preempted):
            train(tmp_path / "cut", content)
    monkeypatch.setattr(FragileEncoder, "passes", FAILS_FROM - 1)
    folder = train(tmp_path / "cut", content, resume_from="latest")
    assert records(folder)[-1]["rollbacks"] == 1
    assert [each["global_step"] for each in records(folder, "validation")] == [2, 4, 6, 8, 9]
    assert (folder / "metrics.csv").read_text().count("validation") == 5


def test_without_fallback_steps_the_run_stops(corpus, tmp_path):
    with pytest.raises(TrainingStopped, match="3 steps in a row"):
        train(tmp_path, config(corpus, 0))


def test_all_ranks_go_back_together_under_zero(corpus, tmp_path):
    content = config(corpus, 3, micro_batch_size=4)
    output = train_ranks(2, tmp_path, content, strategy="zero2")
    steps = records(newest_run(tmp_path))
    assert "rollback 1:" in output and [record["global_step"] for record in steps] == list(range(1, 13))
    assert sum(record["is_fallback"] for record in steps) == 3 and steps[-1]["rollbacks"] == 1
