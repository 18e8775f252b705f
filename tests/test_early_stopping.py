"""Early stopping: a phase ends at the evaluation that its patience says, after a resume too; the next one begins."""

import pytest
from running import (
    comparable_records,
    copy_until,
    newest_checkpoint,
    newest_run,
    records,
    same_weights,
    toy,
    train,
    train_ranks,
)

from trainer.checkpoint_folder import open_checkpoint
from trainer.errors import CheckpointError, ConfigError
from trainer.progress import Progress

STILL = {"optimizer_args": {"lr": 0.0}}
"""Nothing changes, so no evaluation improves on the first."""


def stopping(**settings):
    return {"metric": "loss", "patience": 2, **settings}


def epochs_of(folder, phase):
    return [record["epoch"] for record in records(folder, "validation") if record["phase"] == phase]


def test_a_phase_ends_after_patience_evaluations_without_improvement(tmp_path, capsys):
    folder = train(tmp_path, toy({"epochs": 9}, optimizer=STILL, early_stopping=stopping()))
    assert epochs_of(folder, "p0") == [1, 2, 3]
    assert "early stopping: phase 'p0' ends at step 6" in capsys.readouterr().out
    assert (folder / "latest").read_text().strip() == "checkpoint_6"


def test_the_next_phase_runs_with_a_patience_of_its_own(tmp_path):
    phases = ({"epochs": 9}, {"epochs": 9})
    folder = train(tmp_path, toy(*phases, optimizer=STILL, early_stopping=stopping(patience=1)))
    assert epochs_of(folder, "p0") == [1, 2] and epochs_of(folder, "p1") == [1, 2]


def test_an_improving_phase_runs_to_its_end(tmp_path):
    folder = train(tmp_path, toy({"epochs": 4}, early_stopping=stopping(patience=1)))
    losses = [record["loss"] for record in records(folder, "validation")]
    assert losses == sorted(losses, reverse=True) and len(losses) == 4


def test_an_improvement_must_be_larger_than_min_delta(tmp_path):
    folder = train(tmp_path, toy({"epochs": 9}, early_stopping=stopping(patience=1, min_delta=1e9)))
    assert epochs_of(folder, "p0") == [1, 2]


def test_mode_max_takes_a_falling_figure_for_no_improvement(tmp_path):
    folder = train(tmp_path, toy({"epochs": 9}, early_stopping=stopping(patience=2, mode="max")))
    assert epochs_of(folder, "p0") == [1, 2, 3]


def test_an_evaluation_in_the_middle_of_an_epoch_ends_the_phase_at_its_step(tmp_path):
    phase = {"epochs": 9, "eval_every_steps": 1, "dataloader_args": {"num_cells": 96}}
    folder = train(tmp_path, toy(phase, optimizer=STILL, early_stopping=stopping()))
    assert [record["global_step"] for record in records(folder, "validation")] == [1, 2, 3]
    assert records(folder)[-1]["global_step"] == 3
    state = open_checkpoint(folder / "checkpoint_3").shared("run_state.safetensors")
    assert state["progress"]["phase_index"] == 1


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_a_resumed_run_stops_at_the_same_evaluation(tmp_path, checkpoint):
    config = toy({"epochs": 9}, optimizer=STILL, early_stopping=stopping())
    whole = train(tmp_path / "whole", config)
    cut = copy_until(whole, checkpoint, tmp_path / "cut")
    resumed = train(tmp_path / "cut", config, resume_from=str(cut))
    assert comparable_records(resumed) == comparable_records(whole) and same_weights(resumed, whole)


def test_a_checkpoint_between_the_decision_and_the_end_ends_the_phase_too(tmp_path, monkeypatch):
    phase = {"epochs": 9, "eval_every_steps": 1, "save_every_steps": 1, "dataloader_args": {"num_cells": 96}}
    config = toy(phase, optimizer=STILL, early_stopping=stopping())
    whole = train(tmp_path / "whole", config)

    def die(run, *_):
        run.saver.save_for_good(run)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.loop.end_epoch", die)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", config)
    cut = newest_run(tmp_path / "cut")
    progress = newest_checkpoint(cut).shared("run_state.safetensors")["progress"]
    assert progress["is_stopped"] and progress["epoch_step"] == 3
    resumed = train(tmp_path / "cut", config, resume_from=str(cut))
    assert records(resumed)[-1]["global_step"] == 3 and same_weights(resumed, whole)


def streamed(**changes):
    data = {"num_cells": 96, "validation": True}  # 4 steps in each epoch
    return {"dataloader_factory": "toy.stream_loader", "dataloader_args": data, "epochs": 2, **changes}


def evaluated_steps(folder):
    return [record["global_step"] for record in records(folder, "validation")]


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps_per_epoch": 4, "eval_every_steps": 4}, [4, 8]),
        ({"max_steps": 4, "eval_every_steps": 2}, [2, 4]),
        ({"max_steps": 20, "eval_every_steps": 4}, [4, 8]),  # runs dry where an evaluation is due
        ({"max_steps": 20, "eval_every_steps": 3, "eval_every_epochs": 1}, [3, 4, 6, 8]),  # and where none is
    ],
)
def test_a_stream_is_evaluated_once_at_a_step(tmp_path, limits, steps):
    config = toy(streamed(**limits), optimizer=STILL, early_stopping=stopping(patience=9))
    folder = train(tmp_path, config)
    assert evaluated_steps(folder) == steps
    state = open_checkpoint(folder / f"checkpoint_{steps[-1]}").shared("run_state.safetensors")
    assert state["progress"]["phase_index"] == 1


def test_a_resumed_stream_that_runs_dry_is_not_evaluated_again(tmp_path):
    changes = {"max_steps": 20, "eval_every_steps": 4, "save_every_steps": 4, "save_every_epochs": 5}
    config = toy(streamed(**changes), early_stopping=stopping(patience=9))
    whole = train(tmp_path / "whole", config)
    cut = copy_until(whole, 4, tmp_path / "cut")
    progress = open_checkpoint(cut / "checkpoint_4").shared("run_state.safetensors")["progress"]
    assert (progress["epoch"], progress["epoch_step"], progress["evaluated_step"]) == (0, 4, 4)
    resumed = train(tmp_path / "cut", config, resume_from=str(cut))
    assert comparable_records(resumed) == comparable_records(whole) and evaluated_steps(whole) == [4, 8]


def test_an_unknown_metric_is_an_error_that_lists_those_there_are(tmp_path):
    with pytest.raises(ConfigError, match="early_stopping.metric: .* have no 'accuracy'; they have: loss"):
        train(tmp_path, toy({}, early_stopping=stopping(metric="accuracy")))


def test_early_stopping_without_validation_data_is_found_at_the_start(tmp_path):
    phase = {"dataloader_args": {"validation": False}}
    with pytest.raises(ConfigError, match="early_stopping: no phase has validation data"):
        train(tmp_path, toy(phase, early_stopping=stopping()))


def test_progress_keeps_its_best_figure_exactly():
    progress = Progress(best_metric=0.1 + 0.2, evaluations_since_best=1)
    assert Progress.from_dict(progress.to_dict()) == progress


def test_progress_of_an_earlier_version_begins_what_it_did_not_count():
    assert Progress.from_dict({"global_step": 7, "cells": 9}) == Progress(global_step=7, cells=9)


def test_progress_of_a_later_version_is_refused():
    with pytest.raises(CheckpointError, match="counts retries, which this version does not"):
        Progress.from_dict({**Progress().to_dict(), "retries": 1})


def test_all_ranks_stop_together(tmp_path):
    config = toy({"epochs": 9}, optimizer=STILL, early_stopping=stopping())
    alone = train(tmp_path / "one", config)
    assert "early stopping" in train_ranks(2, tmp_path / "two", config)
    two = newest_run(tmp_path / "two")
    assert epochs_of(two, "p0") == epochs_of(alone, "p0") == [1, 2, 3]
