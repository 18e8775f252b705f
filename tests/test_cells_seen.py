"""The account of cells seen, repeated and skipped: faults that are put in on purpose must show."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import toy as toys
from launching import ROOT, start_ranks
from running import newest_run, records, toy, train, train_ranks, write_config

from data.loader import StepLoader
from data.order import GlobalOrder
from data.weighted_order import WeightedOrder
from trainer import recorder, run_state
from trainer.cells_index import FILE, CellsIndex, EpochCells, Stretch, describe, lines, read_index, unit_of
from trainer.cells_seen import CellsSeen
from trainer.distributed import Ranks
from trainer.errors import UserError
from trainer.progress import Progress

NUM_CELLS = 50
PHASE = {"epochs": 2, "save_every_steps": 1, "dataloader_args": {"num_cells": NUM_CELLS}}


class Rows:
    """A row source of numbers; `row_mask` says which are for training."""

    def __init__(self, num_rows, row_mask=None):
        self.num_rows, self.row_mask = num_rows, row_mask

    def __len__(self):
        return self.num_rows

    def fetch(self, rows, draw):
        return {"tokens": rows}


def phase_of(source, order=None, drop_last=False, **config):
    loader = StepLoader(
        source,
        order or GlobalOrder(len(source), seed=1, phase=0, selected=source.row_mask),
        draw_seed=1,
        phase=0,
        global_batch_size=8,
        micro_batch_size=4,
        rank=0,
        world_size=1,
        prefetch=0,
        drop_last=drop_last,
    )
    limits = {"epochs": 1, "max_steps": None, "max_steps_per_epoch": None, **config}
    return SimpleNamespace(index=0, name="one", unit="cells", loader=loader, config=SimpleNamespace(**limits))


def account_of_an_epoch(phase, last_step=None):
    account, progress = CellsSeen(Ranks(0, 1)), Progress()
    for micro_batches in phase.loader.steps(0, 0, last_step):
        progress.count_step(sum(micro.num_cells for micro in micro_batches), 0)
        account.add_step(phase, progress, micro_batches)
    account.end_epoch(phase, progress)
    [epoch] = account.epochs
    return epoch


def epochs_of(folder):
    index = read_index(folder)
    assert index is not None
    return index.epochs


def resumed_at(folder: Path, target: Path, step: int, config, **changes) -> Path:
    """Copy a run, leave it no later checkpoint than one, and let it go on."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, target)
    for checkpoint in target.glob("checkpoint_*"):
        if int(checkpoint.name.removeprefix("checkpoint_")) > step:
            shutil.rmtree(checkpoint)
    train(target.parent.parent, config, resume_from=str(target), **changes)
    return target


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), toy(PHASE))


def test_every_epoch_of_a_run_sees_every_cell_once(finished):
    first, second = epochs_of(finished)
    for epoch in (first, second):
        assert (epoch.drawn, epoch.seen, epoch.repeated, epoch.skipped) == (NUM_CELLS, NUM_CELLS, 0, 0)
        assert epoch.is_over and not epoch.faults
    assert describe(second) == "50 seen once, 0 repeated, 0 skipped"


def test_a_checkpoint_in_the_middle_of_an_epoch_says_what_was_seen_so_far(tmp_path, capsys):
    train(tmp_path, toy(PHASE))
    said = capsys.readouterr().out
    assert "cells of 'p0' epoch 1: 24 of 50 seen once, 0 repeated so far" in said
    assert said.count("cells of 'p0' epoch 1: 50 seen once, 0 repeated, 0 skipped") == 1


def test_a_resumed_run_counts_lost_steps_once_and_says_what_it_computes_again(finished, tmp_path, capsys):
    folder = resumed_at(finished, tmp_path / "runs" / "copy", 2, toy(PHASE))
    first, second = epochs_of(folder)
    assert describe(first) == "50 seen once, 0 repeated, 0 skipped (1 restart)"
    assert describe(second) == "50 seen once, 0 repeated, 0 skipped"
    index = read_index(folder)
    assert (index.steps_computed_again, index.cells_computed_again) == (4, 52)
    assert "52 cells of 4 steps after step 2 are computed again" in capsys.readouterr().out


def test_what_two_kills_lost_adds_up(finished, tmp_path):
    once = resumed_at(finished, tmp_path / "runs" / "once", 2, toy(PHASE))
    twice = resumed_at(once, tmp_path / "runs" / "twice", 4, toy(PHASE))
    assert read_index(twice).cells_computed_again == 52 + 26


def test_a_start_that_ends_while_its_trackers_start_loses_no_count(finished, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise UserError("the tracker's service refuses")

    with monkeypatch.context() as broken, pytest.raises(UserError, match="refuses"):
        broken.setattr(recorder, "build_trackers", fail)
        resumed_at(finished, tmp_path / "runs" / "copy", 2, toy(PHASE))
    folder = tmp_path / "runs" / "copy"
    train(tmp_path, toy(PHASE), resume_from=str(folder))
    index = read_index(folder)
    assert (index.steps_computed_again, index.cells_computed_again) == (4, 52)


@pytest.mark.parametrize(
    ("shift", "fault"), [(1, ["24 skipped"]), (-1, ["24 repeated", "2 skipped"])], ids=["late", "early"]
)
def test_a_resume_at_the_wrong_step_shows(finished, tmp_path, monkeypatch, capsys, shift, fault):
    right = StepLoader.steps

    def wrong(self, epoch, first_step=0, stop_step=None):
        return right(self, epoch, first_step + shift if first_step else 0, stop_step)

    monkeypatch.setattr(StepLoader, "steps", wrong)
    folder = resumed_at(finished, tmp_path / "runs" / "copy", 1, toy(PHASE))
    first, second = epochs_of(folder)
    assert first.faults == fault
    assert not second.faults
    assert "warning: cells of 'p0' epoch 1: " in capsys.readouterr().out


def test_an_order_that_gives_a_cell_twice_shows(monkeypatch):
    right = GlobalOrder.rows
    monkeypatch.setattr(
        GlobalOrder, "rows", lambda self, *where: np.where((rows := right(self, *where)) == 7, 8, rows)
    )
    assert account_of_an_epoch(phase_of(Rows(30))).faults == ["1 repeated", "1 skipped"]


def test_an_order_that_is_too_short_shows():
    epoch = account_of_an_epoch(phase_of(Rows(30), GlobalOrder(24, seed=1, phase=0)))
    assert describe(epoch).endswith("0 repeated, 0 skipped, 6 not reached: they are not in the phase's order")


def test_a_held_out_cell_that_is_trained_on_shows():
    mask = np.arange(30) < 24
    epoch = account_of_an_epoch(phase_of(Rows(30, mask), GlobalOrder(30, seed=1, phase=0)))
    assert (epoch.num_cells, epoch.seen, epoch.outside) == (24, 24, 6)
    assert epoch.faults == ["6 not of its training cells"]


def test_only_cells_of_the_training_part_are_expected():
    epoch = account_of_an_epoch(phase_of(Rows(30, np.arange(30) % 2 == 0)))
    assert (epoch.num_cells, epoch.seen, epoch.faults) == (15, 15, [])


def test_more_rows_than_wait_at_a_time_are_counted(monkeypatch):
    monkeypatch.setattr("trainer.cells_seen._ROWS_WAITING", 10)
    assert account_of_an_epoch(phase_of(Rows(1003))).seen == 1003


def test_cells_that_drop_last_leaves_out_are_no_fault():
    epoch = account_of_an_epoch(phase_of(Rows(30), drop_last=True))
    assert not epoch.faults
    assert describe(epoch) == (
        "24 of 30 seen once, 0 repeated, 0 skipped, 6 not reached: drop_last leaves them out"
    )


@pytest.mark.parametrize("limit", ["max_steps", "max_steps_per_epoch"])
def test_cells_behind_a_limit_of_steps_are_no_fault(limit):
    epoch = account_of_an_epoch(phase_of(Rows(30), **{limit: 2}), last_step=2)
    assert not epoch.faults
    assert describe(epoch).startswith(f"16 of 30 seen once, 0 repeated, 0 skipped, 14 not reached: {limit} ")


def test_fewer_epochs_at_a_resume_end_the_one_under_way(tmp_path, capsys):
    whole = train(tmp_path / "whole", toy({**PHASE, "epochs": 3}))
    folder = resumed_at(whole, tmp_path / "runs" / whole.name, 4, toy({**PHASE, "epochs": 1}))
    last = epochs_of(folder)[-1]
    assert last.epoch == 2 and last.is_over and not last.faults
    said = "24 of 50 seen once, 0 repeated, 0 skipped, 26 not reached: epochs ended the phase"
    assert describe(last) == said
    evaluated = records(folder, "validation")[-1]
    assert (evaluated["global_step"], evaluated["epoch"]) == (4, 2)
    assert [record["global_step"] for record in records(folder)] == [1, 2, 3, 4]


def test_an_epoch_that_ends_early_without_a_reason_shows():
    assert account_of_an_epoch(phase_of(Rows(30)), last_step=2).faults == ["14 skipped"]


def test_repeats_of_a_weighted_order_are_meant():
    order = WeightedOrder(np.arange(40) % 7, seed=1, phase=0)
    epoch = account_of_an_epoch(phase_of(Rows(40), order))
    assert epoch.repeated and epoch.drawn == 40
    assert not epoch.faults
    assert "repeated (drawn with replacement)" in describe(epoch)


def test_cells_of_a_stream_are_counted_but_not_told_apart(tmp_path):
    phase = {"dataloader_factory": "toy.stream_loader", "max_steps_per_epoch": 5}
    [epoch] = epochs_of(train(tmp_path, toy(phase)))
    assert (epoch.drawn, epoch.num_cells, epoch.faults) == (48, None, [])
    assert describe(epoch).startswith("48 given; its loader has no row numbers")


def test_cells_of_skipped_steps_are_counted_apart(tmp_path):
    loss = {"loss_class": "toy.SometimesNan", "loss_args": {"steps": [1]}}
    [epoch] = epochs_of(train(tmp_path, toy({**PHASE, "epochs": 1}, loss=loss)))
    assert (epoch.seen, epoch.in_skipped_steps) == (NUM_CELLS, 24)
    assert describe(epoch).endswith("0 skipped, 24 in skipped steps")


def test_cells_of_steps_with_nothing_to_learn_from_are_counted_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(toys.ToyModel, "loss_weight", lambda self, batch: 0.0, raising=False)
    [epoch] = epochs_of(train(tmp_path, toy({**PHASE, "epochs": 1})))
    assert (epoch.seen, epoch.in_skipped_steps) == (NUM_CELLS, NUM_CELLS)


def test_early_stopping_is_the_reason_for_cells_that_are_not_reached():
    phase, account = phase_of(Rows(30)), CellsSeen(Ranks(0, 1))
    progress = Progress(is_stopped=1)
    for micro_batches in phase.loader.steps(0, 0, 1):
        progress.count_step(8, 0)
        account.add_step(phase, progress, micro_batches)
    account.end_epoch(phase, progress)
    assert account.epochs[0].left_out_by == "early stopping ended the phase"
    assert not account.epochs[0].faults


def test_a_checkpoint_without_an_account_begins_one(tmp_path, monkeypatch, capsys):
    complete = run_state.collect_shared

    def before(*arguments):
        return {name: file for name, file in complete(*arguments).items() if "cells" not in name}

    with monkeypatch.context() as old:
        old.setattr(run_state, "collect_shared", before)
        folder = train(tmp_path, toy(PHASE))
    (folder / FILE).unlink()
    folder = resumed_at(folder, tmp_path / "other" / "runs" / "copy", 2, toy(PHASE))
    assert "has no account of cells: what was seen before step 2 is not known" in capsys.readouterr().out
    first, second = epochs_of(folder)
    assert (first.unknown_until_step, first.seen, first.skipped, first.faults) == (2, 2, None, [])
    assert describe(first) == "2 of 50 seen once, 0 repeated, unknown up to step 2"
    assert describe(second) == "50 seen once, 0 repeated, 0 skipped"
    assert read_index(folder).unknown_until_step == 2


def later_account(known):
    epochs = json.loads(known)
    for epoch in epochs:
        epoch["of_a_later_version"] = 1
        epoch["stretches"][0]["of_a_later_version"] = 1
    return json.dumps(epochs)


def saved_with(tmp_path, monkeypatch, change):
    complete = run_state.collect_shared

    def changed(*arguments):
        files = complete(*arguments)
        return {**files, FILE: change(files[FILE])}

    with monkeypatch.context() as later:
        later.setattr(run_state, "collect_shared", changed)
        return train(tmp_path, toy(PHASE))


def test_an_account_with_fields_of_a_later_version_goes_on(tmp_path, monkeypatch):
    folder = saved_with(tmp_path, monkeypatch, later_account)
    folder = resumed_at(folder, tmp_path / "other" / "runs" / "copy", 2, toy(PHASE))
    assert [describe(epoch) for epoch in epochs_of(folder)] == [
        "50 seen once, 0 repeated, 0 skipped (1 restart)",
        "50 seen once, 0 repeated, 0 skipped",
    ]


def test_an_account_that_this_version_cannot_read_is_as_none(tmp_path, monkeypatch, capsys):
    folder = saved_with(tmp_path, monkeypatch, lambda known: known.replace('"start"', '"a later way"'))
    folder = resumed_at(folder, tmp_path / "other" / "runs" / "copy", 2, toy(PHASE))
    said = " ".join(capsys.readouterr().out.split())
    assert f"{FILE} is no account of cells that this version reads: what was seen" in said
    assert [epoch.unknown_until_step for epoch in epochs_of(folder)] == [2, None]


@pytest.mark.parametrize("content", [None, "{", '{"step": "two", "epochs": []}'])
def test_an_index_that_is_missing_or_damaged_stops_no_run(finished, tmp_path, content):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    (copy / FILE).unlink()
    if content is not None:
        (copy / FILE).write_text(content)
    folder = resumed_at(copy, tmp_path / "runs" / "again", 2, toy(PHASE))
    assert [describe(epoch) for epoch in epochs_of(folder)] == [
        "50 seen once, 0 repeated, 0 skipped (1 restart)",
        "50 seen once, 0 repeated, 0 skipped",
    ]


def test_an_index_reads_back_equal(finished):
    index = read_index(finished)
    assert CellsIndex.model_validate_json(index.model_dump_json()) == index


def test_epochs_of_which_the_same_is_to_be_said_share_a_line():
    stretch = Stretch(num_ranks=1, first_step=1, last_step=9, begins_with="start")
    common = {"phase": "one", "phase_index": 0, "num_cells": 9, "is_over": True, "stretches": [stretch]}
    epochs = [EpochCells(**common, epoch=number, drawn=9, seen=9) for number in (1, 2, 3)]
    assert lines(epochs) == ["cells of 'one' epochs 1 to 3, each: 9 seen once, 0 repeated, 0 skipped"]


def test_what_is_counted_is_named():
    stretch = Stretch(num_ranks=1, first_step=1, last_step=9, begins_with="start")
    common = {"phase": "one", "phase_index": 0, "epoch": 1, "is_over": True, "stretches": [stretch]}
    sets = EpochCells(**common, unit="sets", num_cells=9, drawn=9, seen=8, outside=1)
    stream = EpochCells(**common, unit="documents", num_cells=None, drawn=9)
    assert lines([sets, stream]) == [
        "warning: sets of 'one' epoch 1: 8 of 9 seen once, 0 repeated, 1 skipped, 1 not of its training sets",
        "documents of 'one' epoch 1: 9 given; its loader has no row numbers, so documents cannot be told apart",
    ]
    assert (unit_of([]), unit_of([sets]), unit_of([sets, stream])) == ("cells", "sets", "samples")


def alike_loader(num_cells):
    """Give every rank the rows of rank 0, as a loader that forgets which rank it is on."""
    right = StepLoader.steps

    def wrong(self, *where):
        self.rank = 0
        return right(self, *where)

    StepLoader.steps = wrong
    return toys.map_loader(num_cells, validation=False)


def test_two_ranks_that_get_the_same_cells_show(tmp_path):
    phase = {**PHASE, "epochs": 1, "dataloader_factory": "test_cells_seen.alike_loader"}
    said = train_ranks(2, tmp_path, toy(phase))
    [epoch] = epochs_of(newest_run(tmp_path))
    # Of each step of 24 the ranks get the same 12; of the last one, of 2, both get both.
    assert epoch.faults == ["26 repeated", "24 skipped"]
    assert "warning: cells of 'p0' epoch 1: 26 of 50 seen, 26 repeated, 24 skipped" in said


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_a_run_killed_and_resumed_on_another_number_of_ranks_sees_every_cell_once(tmp_path, before, after):
    arguments = {"num_cells": 100, "validation": False}
    phase = {**PHASE, "save_every_steps": 2, "dataloader_args": arguments, "epochs": 2}
    script = [
        ROOT / "trainer" / "train.py",
        "--config",
        write_config(tmp_path, toy({**phase, "dataloader_args": {**arguments, "seconds_per_cell": 0.02}})),
    ]
    with start_ranks(before, script, env={"PYTHONPATH": str(ROOT / "tests")}) as group:
        group.wait_for("checkpoint_8")
        group.kill()
    train_ranks(after, tmp_path, toy(phase), resume_from="latest")
    first, second = epochs_of(newest_run(tmp_path))
    for epoch in (first, second):
        assert (epoch.drawn, epoch.seen, epoch.repeated, epoch.skipped) == (100, 100, 0, 0)
    ranks = {each.num_ranks for epoch in (first, second) for each in epoch.stretches}
    assert ranks == {before, after}
