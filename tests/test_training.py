import errno
import functools
import math
from collections import Counter

import pytest
import torch
from running import comparable_records, copy_until, final_weights, losses, records, same_weights, toy, train
from safetensors.torch import load_file

from data.errors import DataError
from trainer import build, statefile
from trainer.checkpoint_folder import read_manifest
from trainer.errors import CheckpointError, ConfigError, UserError
from trainer.run import TrainingStopped
from trainer.statefile import load_tree

DROPOUT = {"model_class": "toy.ToyModel", "config_class": "toy.ToyConfig", "config_args": {"dropout": 0.2}}


def test_training_lowers_the_loss_and_validation_falls(tmp_path):
    folder = train(tmp_path, toy({"epochs": 30, "lr": 0.02}))
    validation = losses(folder, "validation")
    assert losses(folder)[-1] < losses(folder)[0] / 2 and validation[-1] < validation[0] / 2


def test_a_run_ends_with_its_folder_and_what_shows_it(tmp_path, capsys):
    folder = train(tmp_path, toy({"epochs": 1}))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"done at step {len(losses(folder))}: {folder} (python -m trainer report {folder})"


def test_a_dry_run_leaves_out_phases_that_the_run_skips(tmp_path, capsys):
    train(tmp_path, toy({"epochs": 1}, {"epochs": 0}, {"epochs": 1}), dry_run=True)
    said = capsys.readouterr().out
    assert [name for name in ("p0", "p1", "p2") if f"dry run: phase '{name}'" in said] == ["p0", "p2"]


def test_the_same_seed_gives_identical_runs_and_another_seed_does_not(tmp_path):
    first, second = (train(tmp_path / name, toy({"epochs": 2}), model=DROPOUT) for name in "ab")
    other = train(tmp_path / "c", toy({"epochs": 2}), model=DROPOUT, seed=4)
    assert comparable_records(first) == comparable_records(second) and same_weights(first, second)
    assert losses(first) != losses(other) and not same_weights(first, other)


def test_phases_run_in_order_with_their_own_rates_and_limits(tmp_path):
    config = toy(
        {"epochs": 2, "lr": 0.5, "warmup_steps": 2},
        {"epochs": 0, "lr": 9.0},
        {"epochs": 5, "max_steps": 3, "lr": 0.25, "schedule": "linear"},
    )
    steps = records(train(tmp_path, config))
    assert [(r["phase"], r["phase_step"], r["lr"]) for r in steps] == [
        ("p0", 1, 0.25),
        ("p0", 2, 0.5),
        ("p0", 3, 0.5),
        ("p0", 4, 0.5),
        ("p2", 1, 0.25),
        ("p2", 2, 0.125),
        ("p2", 3, 0.0),
    ]
    assert [r["global_step"] for r in steps] == list(range(1, 8))


def test_max_steps_per_epoch_ends_the_epoch_and_counts_in_the_schedule(tmp_path):
    config = toy({"epochs": 3, "max_steps_per_epoch": 1, "lr": 1.0, "schedule": "linear"})
    folder = train(tmp_path, config)
    assert [(r["epoch"], r["lr"]) for r in records(folder)] == [(0, 1.0), (1, 0.5), (2, 0.0)]
    assert len(records(folder, "validation")) == 3


def test_the_first_step_of_an_epoch_cut_short_sees_other_cells_than_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    train(tmp_path, toy({"epochs": 2, "max_steps_per_epoch": 1}))
    lines = (tmp_path / "log.0").read_text().splitlines()
    assert lines[:6] != lines[6:]


def test_evaluation_falls_on_its_steps_and_on_the_phases_end(tmp_path):
    folder = train(tmp_path, toy({"epochs": 2, "eval_every_steps": 3}))
    assert [record["global_step"] for record in records(folder, "validation")] == [3, 4]


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    whole = train(tmp_path / "a", toy({"dataloader_args": {"batch_size": 24}}), micro_batch_size=24)
    parts = train(tmp_path / "b", toy({"dataloader_args": {"batch_size": 4}}))
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-6)


def test_a_partial_last_batch_weighs_its_cells(tmp_path):
    folder = train(tmp_path, toy({"dataloader_args": {"num_cells": 29}}))
    assert [record["cells"] for record in records(folder)] == [24, 5]


@pytest.mark.parametrize("loader", ["toy.map_loader", "toy.stream_loader"])
def test_a_partial_last_batch_feeds_running_statistics_with_its_cells_alone(tmp_path, loader):
    phase = {"dataloader_factory": loader, "dataloader_args": {"num_cells": 203, "batch_size": 8}}
    config = toy({"max_steps": 7, **phase}, micro_batch_size=8, global_batch_size=32)  # 203 = 6 x 32 + 8 + 3
    config["model"] = {"model_class": "toy.WithStatistics", "model_args": {}}
    folder = train(tmp_path, config)
    assert [record["cells"] for record in records(folder)] == [32] * 6 + [11]
    assert final_weights(folder)["norm.num_batches_tracked"] == 26


def test_accumulation_may_change_between_phases(tmp_path):
    config = toy({}, {"gradient_accumulation_steps": 2}, {"global_batch_size": 48})
    folder = train(tmp_path, config)
    assert [record["cells"] for record in records(folder)] == [24, 24, *[8] * 6, 48]


def test_frozen_parameters_do_not_move_and_move_again_in_the_next_phase(tmp_path):
    frozen = toy({"freeze": ["^embedding", "batch_embedding"]}, {})
    folder = train(tmp_path, frozen, optimizer={"optimizer_args": {"weight_decay": 0.3}})
    start, end = (load_file(folder / f"checkpoint_{step}" / "model.safetensors") for step in (2, 4))
    reference = final_weights(train(tmp_path / "none", toy({"lr": 0.0}, {"epochs": 0})))
    assert torch.equal(start["embedding.weight"], reference["embedding.weight"])
    assert not torch.equal(start["head.weight"], reference["head.weight"])
    assert not torch.equal(start["embedding.weight"], end["embedding.weight"])


def test_a_non_finite_step_is_skipped_and_counted(tmp_path):
    loss = {"loss_class": "toy.SometimesNan", "loss_args": {"steps": [1]}}
    folder = train(tmp_path, toy({"epochs": 2}), loss=loss)
    assert [record["is_skipped"] for record in records(folder)] == [False, True, False, False]
    assert math.isnan(losses(folder)[1]) and math.isfinite(losses(folder)[2])
    progress = load_tree(folder / "checkpoint_4" / "run_state.safetensors")["progress"]
    assert progress["skipped_steps"] == 1 and progress["skipped_in_a_row"] == 0


def test_a_fused_optimizer_leaves_the_same_steps_out_without_the_host(tmp_path):
    loss = {"loss_class": "toy.SometimesNan", "loss_args": {"steps": [1, 2]}}
    weights, kept = [], []
    for fused in (False, True):
        optimizer = {"optimizer_args": {"lr": 0.01, "weight_decay": 0.3, "fused": fused}}
        folder = train(tmp_path / str(fused), toy({"epochs": 3}, optimizer=optimizer), loss=loss)
        kept.append([record["is_skipped"] for record in records(folder)])
        state = load_tree(folder / "checkpoint_6" / "run_state.safetensors")
        assert state["progress"]["skipped_steps"] == 2
        assert {int(of["step"]) for of in state["optimizer"].values()} == {4}
        weights.append(final_weights(folder))
    assert kept[0] == kept[1] == [False, True, True, False, False, False]
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-5, atol=1e-6)


def test_too_many_non_finite_steps_stop_the_run_with_an_account(tmp_path):
    loss = {"loss_class": "toy.SometimesNan", "loss_args": {"steps": [1, 2, 3]}}
    with pytest.raises(TrainingStopped, match="3 steps in a row"):
        train(tmp_path, toy({"epochs": 4}), loss=loss, max_nonfinite_steps=3)


def test_a_users_scheduler_is_stepped_once_an_optimizer_step(tmp_path):
    optimizer = {
        "optimizer_args": {"lr": 1.0},
        "scheduler_class": "torch.optim.lr_scheduler.StepLR",
        "scheduler_args": {"step_size": 1, "gamma": 0.5},
    }
    folder = train(tmp_path, toy({"epochs": 2}, {"lr": 0.3}), optimizer=optimizer)
    assert [record["lr"] for record in records(folder)] == [1.0, 0.5, 0.25, 0.125, 0.3, 0.15]


def test_technical_batches_of_all_phases_size_the_model_and_are_saved(tmp_path):
    phases = (
        {"dataloader_args": {"validation": False}},
        {"dataloader_factory": "toy.named_loader", "dataloader_args": {"names": ["lane_b", "lane_a"]}},
    )
    folder = train(tmp_path, toy(*phases))
    state = load_tree(folder / "checkpoint_4" / "run_state.safetensors")
    assert state["technical_batches"] == {"lane_a": 0, "lane_b": 1, "p0": 2}
    assert final_weights(folder)["batch_embedding.weight"].shape[0] == 3


def test_a_technical_batch_count_that_differs_is_an_error_with_both_numbers(tmp_path):
    model = {
        "model_class": "toy.ToyModel",
        "config_class": "toy.ToyConfig",
        "config_args": {"n_technical_batches": 7},
    }
    with pytest.raises(ConfigError, match="n_technical_batches: 7 was given, but the data needs 1"):
        train(tmp_path, toy(), model=model)


def test_a_loader_of_plain_tensors_trains(tmp_path):
    folder = train(tmp_path, toy({"dataloader_factory": "toy.tensor_loader"}))
    assert [record["cells"] for record in records(folder)] == [24]


def test_evaluation_without_validation_data_is_an_error(tmp_path):
    phase = {"dataloader_factory": "toy.tensor_loader", "eval_every_steps": 2}
    with pytest.raises(ConfigError, match="datasets.0: evaluation is asked for .* has no validation data"):
        train(tmp_path, toy(phase))


def test_a_loader_without_a_length_needs_max_steps(tmp_path):
    with pytest.raises(ConfigError, match="does not tell its length.*set max_steps"):
        train(tmp_path, toy({"dataloader_factory": "toy.stream_loader"}))


def test_a_micro_batch_that_differs_from_the_loaders_is_an_error(tmp_path):
    with pytest.raises(
        ConfigError, match="micro_batch_size is 4, but the loader of phase 'p0' yields batches of 6"
    ):
        train(tmp_path, toy({"dataloader_args": {"batch_size": 6}}))


def test_a_dry_run_writes_nothing(tmp_path):
    train(tmp_path, toy(), dry_run=True)
    assert not (tmp_path / "runs").exists()


RESUMABLE = {
    "map_style": {"dataloader_args": {"num_cells": 53, "noisy": True}},
    "replayed_stream": {"dataloader_factory": "toy.stream_loader", "max_steps": 9},
    "own_sampler": {"dataloader_factory": "toy.weighted_loader"},
}


def resumable(kind):
    first = {"epochs": 3, "save_every_steps": 1, "schedule": "cosine", **RESUMABLE[kind]}
    return toy(first, {"lr": 0.003}, model=DROPOUT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the run folder of a run that was not interrupted, by the kind of its loader."""
    return functools.cache(lambda kind: train(tmp_path_factory.mktemp(kind), resumable(kind)))


SAVED = toy({"epochs": 2, "save_every_steps": 1})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the run folder of a run of four steps, with a checkpoint of each."""
    return train(tmp_path_factory.mktemp("saved"), SAVED)


@pytest.mark.parametrize("kind", RESUMABLE)
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resumed_run_equals_one_that_was_not_interrupted(finished, tmp_path, kind, step):
    reference = finished(kind)
    folder = copy_until(reference, step, tmp_path)
    assert train(tmp_path, resumable(kind), resume_from="latest") == folder
    assert comparable_records(folder) == comparable_records(reference) and same_weights(folder, reference)


def test_a_resumed_scheduler_goes_on(tmp_path):
    optimizer = {
        "scheduler_class": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "scheduler_args": {"T_max": 6},
    }
    config = toy({"epochs": 3, "save_every_steps": 1}, optimizer=optimizer)
    reference = train(tmp_path / "whole", config)
    folder = copy_until(reference, 3, tmp_path)
    train(tmp_path, config, resume_from="latest")
    assert comparable_records(folder) == comparable_records(reference)


def test_resume_auto_starts_afresh_where_there_is_nothing(tmp_path):
    assert losses(train(tmp_path, toy(), resume_from="auto"))


def test_resume_latest_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="toy"):
        train(tmp_path, toy(), resume_from="latest")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 9}, "seed was 3 and is 9"),
        ({"global_batch_size": 48}, "global_batch_size was 24 and is 48"),
        (
            {"optimizer": {"groups": [{"name": "head", "match": ["head"]}]}},
            "resume with the optimizer, freezing",
        ),
        ({"model": {**DROPOUT, "config_args": {"width": 16}}}, "does not fit the model"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_reason(saved, tmp_path, change, message):
    copy_until(saved, 1, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path, {**SAVED, **change}, resume_from="latest")


def test_a_phase_behind_the_end_of_a_run_is_refused_with_the_way_to_train_it(saved, tmp_path):
    folder = copy_until(saved, 4, tmp_path)
    longer = {**SAVED, "datasets": [*SAVED["datasets"], {**SAVED["datasets"][0], "name": "p1"}]}
    with pytest.raises(
        CheckpointError, match=f"is the end of its run, .* init_from: {folder} and the phases"
    ):
        train(tmp_path, longer, resume_from="latest")


def test_a_refused_resume_leaves_the_run_as_it_was(saved, tmp_path):
    folder = copy_until(saved, 4, tmp_path)
    told = {"exit_status.json", "events.jsonl", "report.html", "report.png", "run.lock"}  # of this attempt
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in told}
    with pytest.raises(CheckpointError, match="seed was 3 and is 9"):
        train(tmp_path, {**SAVED, "seed": 9}, resume_from=str(folder / "checkpoint_1"))
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in told} == before


def test_a_run_folder_that_cannot_be_taken_over_is_named(saved, tmp_path, monkeypatch):
    folder = copy_until(saved, 3, tmp_path)

    def refuse(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, "replace_text", refuse)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match=f"{folder}: the run folder cannot be written .No space left"):
        train(tmp_path, SAVED, resume_from="latest")
    assert (folder / "config.yaml").read_text() == before


def test_every_file_of_a_resumed_run_is_the_same(tmp_path):
    optimizer = {
        "scheduler_class": "torch.optim.lr_scheduler.CosineAnnealingLR",
        "scheduler_args": {"T_max": 6},
    }
    phase = {"epochs": 3, "save_every_steps": 1, "dataloader_args": {"num_cells": 53, "noisy": True}}
    config = toy(phase, {"lr": 0.003}, model=DROPOUT, optimizer=optimizer, ema={"decay": 0.9})
    reference = train(tmp_path / "whole", config)
    folder = copy_until(reference, 4, tmp_path)
    train(tmp_path, config, resume_from="latest")
    last = max(path.name for path in reference.glob("checkpoint_?"))
    files = [read_manifest(run / last)["files"] for run in (reference, folder)]
    # The counts of cells tell of the restart as well.
    for name in sorted(files[0].keys() - {"config.yaml", "cells_seen.json"}):
        assert files[0][name] == files[1][name], name


def test_a_resume_reads_the_optimizers_state_once(saved, tmp_path, monkeypatch):
    copy_until(saved, 2, tmp_path)
    reads, real = Counter(), statefile.safe_open

    class Counted:
        def __init__(self, *args, **options):
            self._file = real(*args, **options)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *error):
            return self._file.__exit__(*error)

        def get_tensor(self, name):
            reads[name] += 1
            return self._file.get_tensor(name)

    monkeypatch.setattr(statefile, "safe_open", Counted)
    train(tmp_path, SAVED, resume_from="latest")
    of_optimizer = [count for name, count in reads.items() if name.startswith("optimizer.")]
    assert of_optimizer and set(of_optimizer) == {1}


def test_init_from_takes_the_newest_checkpoint_of_a_run_or_says_why_not(saved, tmp_path):
    source = copy_until(saved, 4, tmp_path / "a")
    (source / "checkpoint_4" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="checkpoint_4 is not a complete checkpoint"):
        train(tmp_path / "b", toy(), init_from=str(source))


def test_init_from_takes_weights_alone_and_starts_afresh(tmp_path):
    source = train(tmp_path / "a", toy({"epochs": 2}))
    folder = train(tmp_path / "b", toy({"lr": 0.0}), init_from=str(source / "checkpoint_4"))
    assert same_weights(source, folder) and records(folder)[0]["global_step"] == 1


def test_an_original_pt_checkpoint_is_restored_with_an_account(tmp_path, capsys):
    source = train(tmp_path / "a", toy({"epochs": 2}))
    file = tmp_path / "checkpoint_ep1_step4.pt"
    torch.save(
        {"model_state_dict": final_weights(source), "state": {"global_step": 4, "global_epoch": 2}}, file
    )
    folder = train(tmp_path / "b", toy({"lr": 0.0}), resume_from=str(file))
    assert same_weights(source, folder) and records(folder)[0]["global_step"] == 5
    assert "lacks:" in capsys.readouterr().out


def test_an_original_pt_checkpoint_that_does_not_fit_is_refused(tmp_path):
    file = tmp_path / "checkpoint.pt"
    torch.save({"model_state_dict": {"head.weight": torch.zeros(1, 8)}}, file)
    with pytest.raises(CheckpointError, match="it lacks .*batch_embedding.weight"):
        train(tmp_path, toy(), resume_from=str(file))


def test_a_batch_of_a_wrong_kind_is_an_error_before_training(tmp_path):
    with pytest.raises(DataError, match="must yield a tensor"):
        train(tmp_path, toy({"dataloader_factory": "toy.wrong_loader"}))
