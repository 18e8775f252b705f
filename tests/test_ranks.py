"""Several real processes on the CPU: one run is the same run however many ranks share it."""

import shutil

import pytest
import torch
from running import (
    comparable_records,
    copy_until,
    losses,
    newest_run,
    records,
    same_weights,
    toy,
    train,
    train_ranks,
)
from toy import seen_cells

from benchmarks import kill_resume
from trainer import distributed

DROPOUT = {"model_class": "toy.ToyModel", "config_class": "toy.ToyConfig", "config_args": {"dropout": 0.2}}


def numbers(folder, field):
    return [record[field] for record in records(folder)]


def cells_of(log):
    """Return the cells of every forward pass, of all ranks."""
    return [cell for batch in seen_cells(log) for cell in batch]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_ranks_give_the_losses_of_one(tmp_path, num_ranks):
    config = toy({"epochs": 2, "schedule": "linear"}, {"global_batch_size": 48, "lr": 0.005})
    one = train(tmp_path / "one", config)
    train_ranks(num_ranks, tmp_path / "many", config)
    many = newest_run(tmp_path / "many")
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    assert numbers(many, "grad_norm") == pytest.approx(numbers(one, "grad_norm"), rel=1e-4)
    assert losses(many, "validation") == pytest.approx(losses(one, "validation"), rel=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_users_loader_is_divided_so_that_each_cell_is_seen_once(tmp_path, num_ranks):
    log = tmp_path / "log"
    config = toy({"dataloader_args": {"num_cells": 96}})
    train_ranks(num_ranks, tmp_path, config, env={"TOY_LOG": str(log)})
    assert sorted(cells_of(log)) == list(range(96))


def test_a_rank_without_cells_in_a_last_micro_batch_trains_with_batch_statistics(tmp_path):
    phase = {"dataloader_args": {"num_cells": 195, "batch_size": 8}}  # 6 x 32 + 3
    model = {"model_class": "toy.WithStatistics", "model_args": {}}
    train_ranks(2, tmp_path, toy(phase, micro_batch_size=8, global_batch_size=32, model=model))
    assert numbers(newest_run(tmp_path), "cells") == [32] * 6 + [3]


def test_ranks_that_log_other_metrics_record_each_by_its_name(tmp_path):
    loss = {"loss": {"loss_class": "toy.RareMetrics"}, "distributed_timeout_seconds": 30}
    train_ranks(2, tmp_path, toy({"epochs": 2, "log_every_steps": 2}, **loss))
    own = {"rare": 5.0, "rank_0": 1.0, "rank_1": 2.0, "everywhere": 3.0}
    train_records = records(newest_run(tmp_path))
    for record in [*train_records, *records(newest_run(tmp_path), "validation")]:
        assert {name: record[name] for name in own} == pytest.approx(own)
        assert record.get("with_cell_0", 7.0) == pytest.approx(7.0)
    assert ["with_cell_0" in record for record in train_records].count(True) == 2  # once in each epoch


def test_a_loader_that_shards_itself_is_read_by_every_rank(tmp_path):
    log = tmp_path / "log"
    phase = {"dataloader_factory": "toy.sharded_loader", "dataloader_args": {"num_cells": 96}, "max_steps": 4}
    train_ranks(2, tmp_path, toy(phase), env={"TOY_LOG": str(log)})
    assert sorted(cells_of(log)) == list(range(96))


def test_ranks_with_unequal_streams_take_equal_steps(tmp_path):
    phase = {"dataloader_factory": "toy.sharded_loader", "dataloader_args": {"num_cells": 41}, "max_steps": 9}
    train_ranks(2, tmp_path, toy(phase, global_batch_size=8))
    assert sum(numbers(newest_run(tmp_path), "cells")) == 41


def test_an_iterable_loader_on_two_ranks_is_refused_with_one_message(tmp_path):
    output = train_ranks(
        2, tmp_path, toy({"dataloader_factory": "toy.stream_loader", "max_steps": 3}), expect=2
    )
    assert output.count("cannot be divided over 2 ranks") == 1
    assert "let its factory take rank and world_size" in output and "Traceback" not in output


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_resume_on_another_number_of_ranks_sees_every_cell_once(tmp_path, before, after):
    config = toy({"dataloader_args": {"num_cells": 96}, "epochs": 2, "save_every_steps": 1})
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    train_ranks(1, tmp_path / "reference", config, env={"TOY_LOG": str(whole)})
    train_ranks(before, tmp_path / "first", config)
    folder = copy_until(newest_run(tmp_path / "first"), 6, tmp_path)
    output = train_ranks(after, tmp_path, config, resume_from="latest", env={"TOY_LOG": str(rest)})
    assert f"saved by {before} ranks, resumed on {after}" in output
    assert sorted(cells_of(rest)) == sorted(cells_of(whole)[6 * 24 :])
    assert losses(folder) == pytest.approx(losses(newest_run(tmp_path / "reference")), rel=1e-5)


def test_resume_on_two_ranks_is_exact(tmp_path):
    config = toy({"epochs": 3, "save_every_steps": 1}, {"lr": 0.003}, model=DROPOUT)
    train_ranks(2, tmp_path / "whole", config)
    reference = newest_run(tmp_path / "whole")
    folder = copy_until(reference, 3, tmp_path)
    train_ranks(2, tmp_path, config, resume_from="latest")
    assert comparable_records(folder) == comparable_records(reference) and same_weights(folder, reference)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "trials"), [(1, 1), (2, 2)])
def test_a_run_killed_at_a_random_moment_ends_like_one_left_alone(num_ranks, trials):
    assert kill_resume.run_trials(num_ranks, trials) == trials


def test_a_stream_is_not_resumed_in_the_middle_on_another_number_of_ranks(tmp_path):
    phase = {"dataloader_factory": "toy.sharded_loader", "dataloader_args": {"num_cells": 96}, "max_steps": 4}
    config = toy({**phase, "save_every_steps": 1}, global_batch_size=16)
    train_ranks(2, tmp_path, config)
    shutil.rmtree(newest_run(tmp_path) / "checkpoint_4")
    output = train_ranks(1, tmp_path, config, resume_from="latest", expect=2)
    assert "resume on 2, or from a checkpoint at the end of an epoch" in output


def test_a_group_that_was_left_is_not_destroyed_before_the_process_ends(tmp_path):
    # Its destructor waits for a thread, holding the lock that the thread may be waiting for.
    place = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    group = torch.distributed.group.WORLD
    distributed.leave_group()
    assert not torch.distributed.is_initialized()
    assert group in distributed._finished_groups
