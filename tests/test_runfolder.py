"""Run folders: found by exact name, resumed as asked or not at all, written by one process at a time."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.checkpoint import CheckpointWriter
from trainer.checkpoint_folder import list_checkpoints
from trainer.errors import CheckpointError, UserError
from trainer.reference_checkpoint import load_reference_checkpoint
from trainer.runfolder import (
    ResumePlan,
    RunLease,
    adopt,
    create_run_folder,
    find_runs,
    resolve_resume,
    write_exit_status,
)

NOW = datetime(2026, 3, 4, 5, 6, 7)


def make_run(folder: Path, *steps: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    attempt = f"a{len(list_checkpoints(folder))}"
    with CheckpointWriter(folder, rank=0, world_size=1, attempt=attempt, asynchronous=False) as writer:
        for step in steps:
            writer.save(
                step, {}, {"model.safetensors": {"weight": torch.tensor(float(step))}, "note": str(step)}
            )
    return folder


def damage(folder: Path) -> None:
    (folder / "note").write_text("xx")


def test_a_run_folder_is_named_by_run_and_time_and_a_second_one_gets_a_suffix(tmp_path: Path) -> None:
    made = [create_run_folder(tmp_path / "out", "cells", NOW).name for _ in range(3)]
    assert made == ["cells_20260304_050607", "cells_20260304_050607_2", "cells_20260304_050607_3"]
    assert datetime.strptime(create_run_folder(tmp_path, "a b").name, "a b_%Y%m%d_%H%M%S")


def test_run_folders_made_at_once_are_all_different(tmp_path: Path) -> None:
    made: list[Path] = []
    threads = [
        threading.Thread(target=lambda: made.append(create_run_folder(tmp_path, "x", NOW))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 16


@pytest.mark.parametrize("name", ["", "a/b", "../x", "/"])
def test_a_run_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="run_name is"):
        create_run_folder(tmp_path, name)


def test_an_output_dir_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UserError, match=rf"output_dir: {tmp_path}/out exists and is not a folder"):
        create_run_folder(tmp_path / "out", "a")
    with pytest.raises(
        UserError, match=r"output_dir: cannot make the run folder .*/out/b/a_\d+_\d+ \(Not a directory\)"
    ):
        create_run_folder(tmp_path / "out" / "b", "a")


def test_runs_are_found_by_exact_name_in_order_of_time(tmp_path: Path) -> None:
    for name in (
        "a_20260304_050607_2", "a_20260304_050607", "a_20260304_050607_10", "a_20250101_000000", "a_b_20260304_050607",
        "b_a_20260304_050607", "a_20260304_050607_x", "a_20260304", "a", "A_20260304_050607",
        "a_20260304_050607_20260304_050607", "a+_20260304_050607",
    ):  # fmt: skip
        (tmp_path / name).mkdir()
    (tmp_path / "a_20270101_000000").write_text("a file")
    assert [run.name for run in find_runs(tmp_path, "a")] == [
        "a_20250101_000000", "a_20260304_050607", "a_20260304_050607_2", "a_20260304_050607_10",
    ]  # fmt: skip
    assert [run.name for run in find_runs(tmp_path, "a+")] == ["a+_20260304_050607"]
    assert find_runs(tmp_path / "missing", "a") == []


def test_null_is_a_fresh_start(tmp_path: Path) -> None:
    make_run(tmp_path / "a_20260304_050607", 1)
    assert resolve_resume(None, tmp_path, "a").kind == "fresh"


@pytest.mark.parametrize("word", ["latest", "auto"])
def test_latest_and_auto_take_the_newest_checkpoint_of_this_run_name(tmp_path: Path, word: str) -> None:
    run = make_run(tmp_path / "a_20260304_050607", 9, 10)
    make_run(tmp_path / "a_b_20260304_050608", 99)
    (tmp_path / "a_20260304_050609").mkdir()
    plan = resolve_resume(word, tmp_path, "a")
    assert (plan.kind, plan.run_folder, plan.checkpoint) == ("run", run, run / "checkpoint_10")
    assert plan.skipped == ()


def test_the_run_that_was_saved_last_goes_on_even_if_it_began_first(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a_20260101_000000", 5)
    make_run(tmp_path / "a_20260202_000000", 500)
    make_run(first, 6)
    assert resolve_resume("latest", tmp_path, "a").checkpoint == first / "checkpoint_6"


def test_latest_without_a_checkpoint_says_where_it_looked_and_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"output_dir {tmp_path}/out does not exist"):
        resolve_resume("latest", tmp_path / "out", "a")
    make_run(tmp_path / "a_b_20260304_050607", 1)
    with pytest.raises(
        CheckpointError, match=rf"of run 'a': output_dir {tmp_path} holds a_b_20260304_050607"
    ):
        resolve_resume("latest", tmp_path, "a")
    (tmp_path / "a_20260304_050607").mkdir()
    with pytest.raises(CheckpointError, match="the run folders a_20260304_050607 in .* hold none"):
        resolve_resume("latest", tmp_path, "a")


def test_auto_starts_afresh_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    make_run(tmp_path / "a_b_20260304_050607", 1)
    (tmp_path / "a_20260304_050607").mkdir()
    assert resolve_resume("auto", tmp_path, "a").kind == "fresh"


def test_only_auto_goes_back_over_a_damaged_checkpoint_and_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a_20260304_050607", 1, 2)
    damage(run / "checkpoint_2")
    with pytest.raises(CheckpointError, match=r"latest: .*checkpoint_2 is damaged: note has .* or give auto"):
        resolve_resume("latest", tmp_path, "a")
    with pytest.raises(CheckpointError, match=r"checkpoint_2 is damaged: note has"):
        resolve_resume(str(run), tmp_path, "a")
    plan = resolve_resume("auto", tmp_path, "a")
    assert plan.checkpoint == run / "checkpoint_1"
    assert len(plan.skipped) == 1 and "checkpoint_2 is damaged: note has" in plan.skipped[0]


def test_auto_never_starts_afresh_when_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a_20260304_050607", 1, 2)
    damage(run / "checkpoint_1")
    (run / "checkpoint_2" / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of .* can be used: .*checkpoint_2.*checkpoint_1"
    ):
        resolve_resume("auto", tmp_path, "a")


def test_a_path_is_a_run_folder_or_a_checkpoint_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "elsewhere", 1, 2)
    assert resolve_resume(str(run), tmp_path, "a").checkpoint == run / "checkpoint_2"
    plan = resolve_resume(str(run / "checkpoint_1"), tmp_path, "a")
    assert (plan.kind, plan.run_folder, plan.checkpoint) == ("run", run, run / "checkpoint_1")
    monkeypatch.chdir(run)
    assert resolve_resume("checkpoint_1", tmp_path, "a").run_folder == run
    (tmp_path / "link").symlink_to(run / "checkpoint_1")
    assert resolve_resume(str(tmp_path / "link"), tmp_path, "a").run_folder == run


def test_a_checkpoint_named_by_path_is_verified_and_others_are_offered(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1, 2)
    damage(run / "checkpoint_2")
    with pytest.raises(CheckpointError, match=r"checkpoint_2 is damaged: note has .*Beside it: checkpoint_1"):
        resolve_resume(str(run / "checkpoint_2"), tmp_path, "a")


def test_a_weights_file_is_known_by_its_suffix(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "old.pt")
    plan = resolve_resume(str(tmp_path / "old.pt"), tmp_path, "a")
    assert (plan.kind, plan.run_folder, plan.checkpoint) == ("weights_file", None, tmp_path / "old.pt")
    (tmp_path / "latest").write_text("checkpoint_1")
    with pytest.raises(CheckpointError, match=r"latest is a file; give a run folder, .* ends with \.pt"):
        resolve_resume(str(tmp_path / "latest"), tmp_path, "a")


def test_a_path_that_is_not_there_or_holds_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"resume_from: last does not exist; give latest, auto, or the path"
    ):
        resolve_resume("last", tmp_path, "a")
    (tmp_path / "empty" / "stuff").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"empty holds no checkpoint .*; there is stuff in it"):
        resolve_resume(str(tmp_path / "empty"), tmp_path, "a")


def test_adopting_an_earlier_checkpoint_sets_newer_ones_and_the_metrics_aside(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1, 2, 3)
    damage(run / "checkpoint_3")
    (run / "metrics.jsonl").write_text("lines\n")
    moved = adopt(run, run / "checkpoint_1")
    assert [folder.relative_to(run).as_posix() for folder in moved] == [
        "superseded/checkpoint_3", "superseded/checkpoint_2",
    ]  # fmt: skip
    (copy,) = (run / "superseded").glob("metrics_until_checkpoint_3_*.jsonl")
    assert copy.read_text() == "lines\n"
    assert (run / "latest").read_text() == "checkpoint_1\n"
    assert resolve_resume(str(run), tmp_path, "a").checkpoint == run / "checkpoint_1"
    with pytest.raises(CheckpointError, match=r"checkpoint_2 was set aside .*; move it back into"):
        resolve_resume(str(run / "superseded" / "checkpoint_2"), tmp_path, "a")
    make_run(run, 2)
    adopt(run, run / "checkpoint_1")
    assert sorted(os.listdir(run / "superseded"))[:2] == ["checkpoint_2", "checkpoint_2.2"]


def test_adopting_the_newest_checkpoint_moves_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 1, 2)
    (run / "metrics.jsonl").write_text("lines\n")
    assert adopt(run, run / "checkpoint_2") == []
    assert not (run / "superseded").exists()
    with pytest.raises(ValueError, match="is not a checkpoint of"):
        adopt(tmp_path, run / "checkpoint_2")


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    message = rf"{tmp_path} is in use by process {os.getpid()} on .*, running since 20"
    with RunLease(tmp_path), pytest.raises(UserError, match=message):
        RunLease(tmp_path)
    RunLease(tmp_path).release()


def test_a_resume_holds_the_run_from_before_its_newest_checkpoint_is_chosen(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a_20260304_050607", 1, 2)
    for name in ("auto", str(run), str(run / "checkpoint_1")):
        with RunLease(run), pytest.raises(UserError, match="in use"):  # its last checkpoint may be to come
            resolve_resume(name, tmp_path, "a", hold=True)
        lease = resolve_resume(name, tmp_path, "a", hold=True).lease
        assert lease is not None
        with lease, pytest.raises(UserError, match="in use"):
            RunLease(run)


def test_a_job_that_is_given_twice_before_its_first_checkpoint_starts_once(tmp_path: Path) -> None:
    run, other = tmp_path / "a_20260304_050607", tmp_path / "b_20260304_050607"
    run.mkdir()
    other.mkdir()
    with RunLease(other), RunLease(run), pytest.raises(UserError, match=rf"{run} is in use by process"):
        resolve_resume("auto", tmp_path, "a", hold=True)
    before = (run / "run.lock").stat()
    assert resolve_resume("auto", tmp_path, "a", hold=True) == ResumePlan("fresh")
    assert (run / "run.lock").stat() == before


def test_a_resume_that_is_refused_gives_the_run_back(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a_20260304_050607", 1)
    damage(run / "checkpoint_1")
    for name in ("auto", "latest", str(run / "checkpoint_1")):
        with pytest.raises(CheckpointError, match="is damaged"):
            resolve_resume(name, tmp_path, "a", hold=True)
        RunLease(run).release()


@pytest.mark.parametrize(
    "name", ["run.lock", "metrics.jsonl", "config.yaml", "benchmarks/worker.log", "benchmarks"]
)
def test_a_run_folder_with_links_is_not_written_to(tmp_path: Path, name: str) -> None:
    run, other = make_run(tmp_path / "a_20260304_050607", 1), tmp_path / "precious"
    other.write_text("one line")
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).symlink_to(other)
    with pytest.raises(UserError, match=rf"{Path(name).name} is a link"):
        RunLease(run)
    assert other.read_text() == "one line"


def test_a_checkpoint_may_be_a_link(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a_20260304_050607", 1)
    (run / "checkpoint_1").rename(tmp_path / "elsewhere")
    (run / "checkpoint_1").symlink_to(tmp_path / "elsewhere")
    RunLease(run).release()


def test_a_full_disk_has_room_for_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with RunLease(tmp_path), pytest.raises(UserError, match="in use by another process"):
        RunLease(tmp_path)


def test_releasing_twice_does_not_touch_anybody_elses_file(tmp_path: Path) -> None:
    lease = RunLease(tmp_path)
    lease.release()
    with open(tmp_path / "other", "w+") as file:
        lease.release()
        file.write("x")
    with RunLease(tmp_path):
        lease.release()
        with pytest.raises(UserError, match="in use"):
            RunLease(tmp_path)


def test_a_deleted_lock_file_does_not_give_the_lease_of_a_file_that_nobody_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real, calls = fcntl.flock, []

    def delete_first(descriptor: int, how: int) -> None:
        if not calls:
            (tmp_path / "run.lock").unlink()
        calls.append(how)
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", delete_first)
    with RunLease(tmp_path), pytest.raises(UserError, match="in use"):
        RunLease(tmp_path)
    assert len(calls) == 3


def test_a_lease_needs_a_folder_that_can_be_written_and_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"missing: the run folder cannot be written \(No such file"):
        RunLease(tmp_path / "missing")

    def refuse(*args: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("trainer.runfolder.fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"this file system does not lock files \(Function not implemented\)"):
        RunLease(tmp_path)


HOLDER = """
    import os, subprocess, sys, time
    from trainer.runfolder import RunLease
    lease = RunLease(sys.argv[1])
    forked = os.fork()
    if forked == 0:
        lease.release()
        time.sleep(120)
        os._exit(0)
    started = subprocess.Popen(["sleep", "120"], close_fds=False)
    print(forked, started.pid, flush=True)
    time.sleep(120)
"""


def test_a_killed_holder_frees_the_lease_though_its_children_live_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        children = [int(number) for number in holder.stdout.readline().split()]
        try:
            with pytest.raises(UserError, match=rf"in use by process {holder.pid} on"):
                RunLease(tmp_path)
            holder.kill()
            holder.wait()
            for child in children:
                os.kill(child, 0)
            RunLease(tmp_path).release()
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)


def test_the_exit_status_is_written_whole(tmp_path: Path) -> None:
    write_exit_status(tmp_path, 1, "first")
    write_exit_status(tmp_path, 75, "preempted")
    status = json.loads((tmp_path / "exit_status.json").read_text())
    started, ended = (datetime.fromisoformat(status.pop(key)) for key in ("started", "time"))
    assert status.pop("duration_seconds") == pytest.approx((ended - started).total_seconds(), abs=0.1)
    assert status == {"exit_code": 75, "reason": "preempted"}
    assert os.listdir(tmp_path) == ["exit_status.json"]


WEIGHTS = {"encoder.weight": torch.ones(2, 3)}


def test_a_reference_checkpoint_gives_what_it_has_and_tells_what_it_lacks(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {
        "model_state_dict": layer.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "config": {"run_name": "x", "datasets": [{"epochs": 2}]},
        "state": {"global_step": 270, "global_epoch": 30},
        "extra": 1,
    }
    torch.save(content, tmp_path / "old.pt")
    loaded = load_reference_checkpoint(tmp_path / "old.pt")
    assert (loaded.global_step, loaded.global_epoch) == (270, 30)
    assert loaded.config == content["config"] and loaded.scheduler_state_dict is None
    assert torch.equal(loaded.model_state_dict["weight"], layer.weight)
    assert loaded.optimizer_state_dict is not None
    optimizer.load_state_dict(loaded.optimizer_state_dict)
    told = " / ".join(loaded.account)
    for part in (
        "no scheduler state",
        "no random number",
        "no position in the data",
        "no technical batch map",
        "'extra'",
    ):
        assert part in told
    assert "optimizer state" not in told and "global_step" not in told


def test_a_reference_checkpoint_with_weights_alone_and_top_level_counters_is_accepted(tmp_path: Path) -> None:
    torch.save({"model_state_dict": WEIGHTS, "global_step": 7}, tmp_path / "old.pt")
    loaded = load_reference_checkpoint(tmp_path / "old.pt")
    assert (loaded.global_step, loaded.global_epoch, loaded.optimizer_state_dict) == (7, None, None)
    told = " / ".join(loaded.account)
    assert "no optimizer state" in told and "no global_epoch" in told and "no config" in told


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": WEIGHTS, "optimizer": {}}, r"expected a dict with 'model_state_dict'.*found 'model', 'optimizer'"),
        ([1], "expected a dict with 'model_state_dict'.*found list"),
        ({"model_state_dict": {"a": 1}}, r"'model_state_dict' holds 'a': a int, not a tensor"),
        ({"model_state_dict": {}}, "'model_state_dict' is empty, expected a dict of tensors"),
        ({"model_state_dict": WEIGHTS, "config": 3}, "'config' is a int, expected a dict"),
        ({"model_state_dict": WEIGHTS, "state": {"global_step": -1}}, "'global_step' is '-1', expected an integer"),
        ({"model_state_dict": WEIGHTS, "state": {"global_step": "3"}}, "'global_step' is '3', expected an integer"),
    ],
)  # fmt: skip
def test_a_reference_checkpoint_of_another_kind_is_an_error(
    tmp_path: Path, content: Any, message: str
) -> None:
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match=rf"old\.pt: {message}"):
        load_reference_checkpoint(tmp_path / "old.pt")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class Shell:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_hostile_reference_checkpoint_is_refused_with_the_class_named(tmp_path: Path, legacy: bool) -> None:
    for bomb, named in ((Bomb(tmp_path / "ran"), "(getattr|pathlib)"), (Shell(), r"posix\.system")):
        content = {"model_state_dict": WEIGHTS, "config": bomb}
        torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=not legacy)
        with pytest.raises(
            CheckpointError, match=rf"old\.pt: it holds an object of {named}\S*, which would run code"
        ):
            load_reference_checkpoint(tmp_path / "old.pt")
    assert not (tmp_path / "ran").exists()


def test_damaged_and_missing_reference_checkpoints_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    with pytest.raises(CheckpointError, match="no such file"):
        load_reference_checkpoint(path)
    torch.save({"model_state_dict": WEIGHTS}, path)
    data = path.read_bytes()
    for length in range(0, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"old\.pt"):
            load_reference_checkpoint(path)
    path.write_bytes(b"not a checkpoint" * 50)
    with pytest.raises(CheckpointError, match=r"old\.pt: not a readable \.pt file"):
        load_reference_checkpoint(path)
