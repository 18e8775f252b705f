"""Checkpoints are complete or not there, whatever happens while they are written."""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import atomicfile, checkpoint, checkpoint_folder
from trainer.checkpoint import CheckpointWriter
from trainer.checkpoint_folder import (
    find_newest,
    list_checkpoints,
    open_checkpoint,
    unnamed_checkpoints,
    verify_checkpoint,
)
from trainer.errors import CheckpointError, UserError
from trainer.retention import Retention
from trainer.runfolder import RunLease, resolve_resume


def make_writer(folder: Path, rank: int = 0, world_size: int = 1, attempt: str = "a1", **options: Any) -> Any:
    return CheckpointWriter(folder, rank=rank, world_size=world_size, attempt=attempt, **options)


def save(writer: Any, step: int, **options: Any) -> None:
    shared = {
        "model.safetensors": {"weight": torch.full((5,), float(step))},
        "config.yaml": f"step: {step}\n",
    }
    rank_files = {"state": {"rank": writer.rank, "step": step}}
    writer.save(step, rank_files, shared if writer.rank == 0 else {}, **options)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def steps(folder: Path) -> list[int]:
    return [open_checkpoint(found).step for found in list_checkpoints(folder)]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[Any]]:
    writers = [make_writer(tmp_path, rank, 2, timeout_seconds=30) for rank in range(2)]
    yield writers
    for writer in writers:
        writer.abandon()


def test_a_checkpoint_of_two_ranks_holds_what_both_saved(tmp_path: Path, pair: list[Any]) -> None:
    for writer in pair:
        save(writer, 7, metric=0.5, summary={"phase": "first", 3: float("nan")})
    for writer in pair:
        writer.close()
    assert names(tmp_path) == ["checkpoint_7", "latest"]
    assert names(tmp_path / "checkpoint_7") == [
        "config.yaml", "manifest.json", "model.safetensors",
        "state.rank00000.safetensors", "state.rank00001.safetensors",
    ]  # fmt: skip
    saved = open_checkpoint(tmp_path / "checkpoint_7")
    assert (saved.step, saved.world_size, saved.metric) == (7, 2, 0.5)
    assert saved.summary == {"phase": "first", "3": "nan"}
    assert torch.equal(saved.shared("model.safetensors")["weight"], torch.full((5,), 7.0))
    assert saved.text("config.yaml") == "step: 7\n"
    assert [saved.rank("state", rank) for rank in range(2)] == [
        {"rank": 0, "step": 7},
        {"rank": 1, "step": 7},
    ]
    assert saved.has("state") and saved.has("config.yaml") and not saved.has("genes.json")
    assert (tmp_path / "latest").read_text() == "checkpoint_7\n"


def test_files_that_are_not_there_are_named_with_those_that_are(tmp_path: Path) -> None:
    save(make_writer(tmp_path), 7, synchronous=True)
    saved = open_checkpoint(tmp_path / "checkpoint_7")
    with pytest.raises(
        CheckpointError, match=r"no file 'genes.json' in it; it holds config.yaml, model.safet"
    ):
        saved.text("genes.json")
    with pytest.raises(CheckpointError, match=r"rank 1 saved no 'state'; of the 1 ranks .*, \[0\] have one"):
        saved.rank("state", 1)


def test_save_returns_before_the_file_is_written_and_the_copy_is_of_that_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    write_tree = checkpoint.write_tree
    monkeypatch.setattr(checkpoint, "write_tree", lambda *args: (gate.wait(30), write_tree(*args)))
    weight = torch.zeros(3)
    writer = make_writer(tmp_path)
    writer.save(1, {}, {"model.safetensors": {"weight": weight}})
    assert list_checkpoints(tmp_path) == []
    weight.fill_(9)
    gate.set()
    writer.close()
    assert torch.equal(
        open_checkpoint(tmp_path / "checkpoint_1").shared("model.safetensors")["weight"], torch.zeros(3)
    )


def test_the_next_save_waits_for_the_one_in_flight_and_measures_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree = checkpoint.write_tree
    monkeypatch.setattr(checkpoint, "write_tree", lambda *args: (time.sleep(0.15), write_tree(*args)))
    writer = make_writer(tmp_path)
    save(writer, 1)
    assert writer.stall_seconds < 0.15
    save(writer, 2)
    assert writer.stall_seconds > 0.15
    assert steps(tmp_path) == [1]
    writer.close()
    assert steps(tmp_path) == [1, 2]
    assert (
        writer.last_write.step == 2 and writer.last_write.seconds > 0.3 and writer.last_write.num_bytes > 20
    )


def test_a_synchronous_save_is_complete_when_it_returns(tmp_path: Path) -> None:
    writer = make_writer(tmp_path, asynchronous=False)
    save(writer, 1)
    assert steps(tmp_path) == [1]
    writer = make_writer(tmp_path, attempt="a2")
    save(writer, 2, synchronous=True)
    assert steps(tmp_path) == [1, 2]


def test_other_ranks_wait_until_rank_0_has_completed_the_checkpoint(tmp_path: Path, pair: list[Any]) -> None:
    save(pair[1], 3)
    pair[1]._threads[0].join(0.3)
    assert pair[1]._threads[0].is_alive()
    save(pair[0], 3)
    pair[1].close()
    assert steps(tmp_path) == [3]


def test_a_file_that_lost_bytes_before_completion_is_named(tmp_path: Path, pair: list[Any]) -> None:
    save(pair[1], 3)
    folder = tmp_path / ".checkpoint_3.a1-1.tmp"
    while not (folder / "rank00001.done.json").exists():
        time.sleep(0.01)
    os.truncate(folder / "state.rank00001.safetensors", 20)
    save(pair[0], 3)
    with pytest.raises(CheckpointError, match=r"state\.rank00001\.safetensors has 20 bytes instead of \d+"):
        pair[0].wait()
    with pytest.raises(CheckpointError, match=r"rank 0 failed to save: .*state\.rank00001"):
        pair[1].wait()
    assert list_checkpoints(tmp_path) == []


def test_an_older_checkpoint_of_the_same_step_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    save(make_writer(tmp_path, attempt="a0"), 3, synchronous=True)
    pair = [make_writer(tmp_path, rank, 2, timeout_seconds=5) for rank in range(2)]
    save(pair[1], 3)
    pair[1]._threads[0].join(0.3)
    assert pair[1]._threads[0].is_alive()
    save(pair[0], 3)
    pair[1].close()
    assert open_checkpoint(tmp_path / "checkpoint_3").world_size == 2


def test_a_rank_that_writes_nothing_is_named_when_time_is_up(tmp_path: Path) -> None:
    writers = [make_writer(tmp_path, rank, 4, timeout_seconds=1.5) for rank in (0, 2)]
    for writer in writers:
        save(writer, 5)
    with pytest.raises(
        CheckpointError, match=r"checkpoint_5 is given up: rank 1, 3 of 4 did not finish .* for 1\.5 s"
    ):
        writers[0].wait()
    with pytest.raises(CheckpointError, match=r"rank 0 failed to save: .*rank 1, 3 of 4 did not finish"):
        writers[1].wait()
    assert list_checkpoints(tmp_path) == []


def test_a_rank_without_rank_0_gives_up_when_time_is_up(tmp_path: Path) -> None:
    writer = make_writer(tmp_path, 1, 2, timeout_seconds=0.1)
    save(writer, 5)
    with pytest.raises(CheckpointError, match="rank 0 has not completed checkpoint_5 within 0.2 s"):
        writer.wait()
    # Rank 0 may be slow and complete it after all: what it needs must not have been taken away.
    late = make_writer(tmp_path, 0, 2, timeout_seconds=5)
    save(late, 5)
    late.close()
    assert steps(tmp_path) == [5]


def test_a_rank_that_does_not_see_the_run_folder_says_so(tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "elsewhere", 1, 2)
    save(writer, 5)
    with pytest.raises(
        CheckpointError, match=r"rank 1 does not see this folder; all ranks need the same file system"
    ):
        writer.wait()


def test_the_error_of_one_rank_is_raised_on_all_and_the_next_save_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: list[Any]
) -> None:
    for writer in pair:
        save(writer, 1)
    for writer in pair:
        writer.wait()
    write_tree = checkpoint.write_tree

    def fail_on_rank_1(sink: Any, tree: Any) -> None:
        if tree == {"rank": 1, "step": 2}:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_tree(sink, tree)

    monkeypatch.setattr(checkpoint, "write_tree", fail_on_rank_1)
    for writer in pair:
        save(writer, 2)
    with pytest.raises(
        CheckpointError,
        match=r"rank 1 failed to save: .*disk or the quota is full.*last complete checkpoint is checkpoint_1",
    ):
        save(pair[0], 3)
    with pytest.raises(
        CheckpointError, match=f"{tmp_path}: saving checkpoint_2 failed: the disk or the quota is full"
    ):
        save(pair[1], 3)
    leftovers = [file for name in names(tmp_path) if name.endswith(".tmp") for file in names(tmp_path / name)]
    assert leftovers and all(file.endswith(".failed.json") for file in leftovers)
    monkeypatch.setattr(checkpoint, "write_tree", write_tree)
    for writer in pair:
        save(writer, 4)
    for writer in pair:
        writer.close()
    assert names(tmp_path) == ["checkpoint_1", "checkpoint_4", "latest"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EROFS, r"not writable \(Read-only file system\)"),
        (errno.EACCES, r"not writable \(Permission denied\)"),
        (errno.EDQUOT, "the quota is full"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_and_the_last_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    writer = make_writer(tmp_path)
    save(writer, 1, synchronous=True)

    def refuse(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint.os, "fsync", refuse)
    save(writer, 2)
    with pytest.raises(
        CheckpointError, match=rf"{tmp_path}: saving checkpoint_2 failed: .*{message}.*checkpoint_1\."
    ):
        writer.wait()
    monkeypatch.undo()
    assert steps(tmp_path) == [1]
    writer.close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_run_folder_is_named(tmp_path: Path) -> None:
    writer = make_writer(tmp_path)
    tmp_path.chmod(0o500)
    save(writer, 1)
    with pytest.raises(CheckpointError, match="not writable"):
        writer.wait()
    tmp_path.chmod(0o700)


def test_a_real_full_disk_is_named(tmp_path: Path) -> None:
    def open_full_device(*args: Any) -> Any:
        return open("/dev/full", "wb")  # answers every write like a full disk

    writer = make_writer(tmp_path)
    save(writer, 1, synchronous=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "open", open_full_device, raising=False)
        save(writer, 2)
        with pytest.raises(CheckpointError, match="the disk or the quota is full"):
            writer.wait()
    save(writer, 3, synchronous=True)
    assert names(tmp_path) == ["checkpoint_1", "checkpoint_3", "latest"]


def test_an_error_of_rank_0_after_completion_reaches_the_others_at_their_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: list[Any]
) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "delete_expired", refuse)
    for writer in pair:
        save(writer, 1)
    with pytest.raises(
        CheckpointError, match=r"not writable .* The last complete checkpoint is checkpoint_1\."
    ):
        save(pair[0], 2)
    save(pair[1], 2)
    with pytest.raises(CheckpointError, match=r"rank 0 failed to save: .*not writable"):
        pair[1].wait()
    assert steps(tmp_path) == [1]


def test_a_slow_rank_has_time_as_long_as_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree = checkpoint.write_tree

    def write_slowly(sink: Any, tree: Any) -> None:
        if tree == {"rank": 1, "step": 1}:
            for _ in range(8):
                sink.write(b"x")
                sink._file.flush()
                time.sleep(0.1)
        write_tree(sink, tree)

    monkeypatch.setattr(checkpoint, "write_tree", write_slowly)
    pair = [make_writer(tmp_path, rank, 2, timeout_seconds=0.3) for rank in range(2)]
    for writer in pair:
        save(writer, 1)
    for writer in pair:
        writer.close()
    assert steps(tmp_path) == [1]


def test_rank_0_may_complete_a_checkpoint_as_soon_as_it_sees_the_last_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: list[Any]
) -> None:
    replace = os.replace

    def replace_and_lose_the_processor(source: Path, target: Path) -> None:
        replace(source, target)
        deadline = time.monotonic() + 10
        while target.name == "rank00001.done.json" and target.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    monkeypatch.setattr(os, "replace", replace_and_lose_the_processor)
    for writer in pair:
        save(writer, 3)
    for writer in pair:
        writer.wait()
    assert steps(tmp_path) == [3]


def test_state_that_cannot_be_saved_is_an_error_of_save_itself_and_reaches_the_other_ranks(
    tmp_path: Path, pair: list[Any]
) -> None:
    save(pair[1], 1)
    with pytest.raises(UserError, match=r"state\.rank00000\.safetensors: a\.b is a value of type set"):
        pair[0].save(1, {"state": {"a": {"b": {1}}}}, {})
    with pytest.raises(CheckpointError, match=r"rank 0 failed to save: .*a\.b is a value of type set"):
        pair[1].wait()


@pytest.mark.parametrize(
    ("rank_files", "shared_files"),
    [
        ({}, {"../x.safetensors": {}}),
        ({}, {".hidden.safetensors": {}}),
        ({}, {"manifest.json": "x"}),
        ({}, {"model": {}}),
        ({}, {"model.safetensors": "text"}),
        ({"a/b": {}}, {}),
        ({"state": 1}, {"state.rank00000.safetensors": 2}),
    ],
)
def test_file_names_that_could_clash_are_refused(tmp_path: Path, rank_files: Any, shared_files: Any) -> None:
    with pytest.raises(ValueError, match="a checkpoint cannot hold files named"):
        make_writer(tmp_path).save(1, rank_files, shared_files)
    assert list_checkpoints(tmp_path) == []


def test_shared_files_come_from_rank_0_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank 1 gives shared files \['a'\]"):
        make_writer(tmp_path, 1, 2).save(1, {}, {"a": "b"})


def test_leaving_by_an_exception_gives_up_the_save_in_seconds(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(KeyError), make_writer(tmp_path, 0, 2) as writer:
        save(writer, 1)
        raise KeyError
    assert time.monotonic() - started < 5
    assert list_checkpoints(tmp_path) == []
    with pytest.raises(ValueError, match="closed"):
        save(writer, 2)


def test_a_program_that_dies_of_an_exception_is_not_held_up_by_its_writer(tmp_path: Path) -> None:
    script = f"""
        from trainer.checkpoint import CheckpointWriter
        writer = CheckpointWriter({str(tmp_path)!r}, rank=0, world_size=2, attempt="a1")
        writer.save(1, {{}}, {{"text": "x"}})
        raise SystemExit(3)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=60)
    assert (result.returncode, result.stderr) == (3, b"")


def test_leftovers_of_an_earlier_start_never_get_into_a_new_checkpoint(tmp_path: Path) -> None:
    # The earlier start had four ranks and was killed; one of its ranks is still writing.
    early = [make_writer(tmp_path, rank, 4, "early", timeout_seconds=60) for rank in range(4)]
    for writer in early[1:3]:
        save(writer, 9)
    pair = [make_writer(tmp_path, rank, 2, "later", timeout_seconds=30) for rank in (1, 0)]
    save(pair[0], 9)
    save(early[3], 9)
    save(pair[1], 9)
    for writer in pair:
        writer.close()
    saved = open_checkpoint(tmp_path / "checkpoint_9")
    assert saved.world_size == 2 and len(saved.manifest["files"]) == 4
    for writer in early:
        writer.abandon()


def test_a_new_start_removes_what_was_left_but_not_what_its_other_ranks_already_write(tmp_path: Path) -> None:
    for name in (
        ".checkpoint_3.old1-2.tmp",
        ".checkpoint_1.old1-1.deleted.tmp",
        ".checkpoint_4.new1-1.tmp",
        "notes.tmp",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    make_writer(tmp_path, attempt="new1")
    assert names(tmp_path) == [".checkpoint_4.new1-1.tmp", "notes.tmp"]


def test_a_checkpoint_saved_again_replaces_the_one_of_the_same_step(tmp_path: Path) -> None:
    for attempt, value in (("a1", 1.0), ("a2", 2.0), ("a3", 3.0)):
        make_writer(tmp_path, attempt=attempt).save(
            5, {}, {"model.safetensors": {"weight": torch.tensor(value)}}, synchronous=True
        )
    assert open_checkpoint(tmp_path / "checkpoint_5").shared("model.safetensors")["weight"] == 3
    assert names(tmp_path) == ["checkpoint_5", "latest"]


class Killed(BaseException):
    """End a save where it stands, as SIGKILL does."""


def fail_at_rename(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    real, calls = os.rename, []

    def rename(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == number:
            raise error
        real(*arguments)

    monkeypatch.setattr(os, "rename", rename)


def save_five(run: Path, attempt: str, value: float) -> None:
    tree = {"weight": torch.tensor(value)}
    make_writer(run, attempt=attempt).save(5, {}, {"model.safetensors": tree}, synchronous=True)


@pytest.mark.parametrize(
    "resume_from", ["latest", "auto", "a_20260304_050607", "a_20260304_050607/checkpoint_5"]
)
def test_a_kill_while_the_only_checkpoint_is_replaced_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume_from: str
) -> None:
    run = tmp_path / "a_20260304_050607"
    save_five(run, "a1", 1.0)
    with monkeypatch.context() as context:
        fail_at_rename(context, 2, Killed())
        with pytest.raises(Killed):
            save_five(run, "a2", 2.0)
    assert steps(run) == []
    where = resume_from if resume_from in ("latest", "auto") else str(tmp_path / resume_from)
    plan = resolve_resume(where, tmp_path, "a", hold=True)
    assert plan.lease is not None and plan.checkpoint == run / "checkpoint_5"
    plan.lease.release()
    assert open_checkpoint(run / "checkpoint_5").shared("model.safetensors")["weight"] == 2
    make_writer(run, attempt="a3")
    assert names(run) == ["checkpoint_5", "latest", "run.lock"]


def test_an_unnamed_checkpoint_is_left_to_the_writer_at_work_and_to_later_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "a_20260304_050607"
    with monkeypatch.context() as context:
        fail_at_rename(context, 1, Killed())
        with pytest.raises(Killed):
            save_five(run, "a1", 1.0)
    with RunLease(run), pytest.raises(UserError, match="in use"):
        resolve_resume("auto", tmp_path, "a", hold=True)
    assert resolve_resume("auto", tmp_path, "a").kind == "fresh"  # a rehearsal writes nothing
    (unnamed,) = run.glob(".checkpoint_*")
    (unnamed / "rank00000.done.json").write_text("{}")
    assert unnamed_checkpoints(run) == {}  # its manifest came, and the kill before the notes had gone
    (unnamed / "rank00000.done.json").unlink()
    (unnamed / "model.safetensors").write_bytes(b"")
    assert unnamed_checkpoints(run) == {}
    forge(unnamed, format=checkpoint_folder.FORMAT + 1)
    with pytest.raises(CheckpointError, match="go on with the version that wrote it"):
        resolve_resume("auto", tmp_path, "a", hold=True)


def test_a_checkpoint_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_five(tmp_path, "a1", 1.0)
    fail_at_rename(monkeypatch, 2, OSError(errno.EIO, "broken"))
    with pytest.raises(CheckpointError, match="saving checkpoint_5 failed"):
        save_five(tmp_path, "a2", 2.0)
    assert open_checkpoint(tmp_path / "checkpoint_5").shared("model.safetensors")["weight"] == 1


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [10, 20, 30, 40, 50, 60]),
        (Retention(keep_last=1), [60]),
        (Retention(keep_last=2), [50, 60]),
        (Retention(keep_last=1, keep_every_steps=20), [20, 40, 60]),
        (Retention(keep_last=1, keep_best=2), [10, 30, 60]),
        (Retention(keep_last=1, keep_best=1, best_is="highest"), [20, 60]),
        (Retention(keep_last=99, keep_best=99), [10, 20, 30, 40, 50, 60]),
    ],
)
def test_retention_keeps_the_newest_the_interval_and_the_best(
    tmp_path: Path, retention: Retention, kept: list[int]
) -> None:
    writer = make_writer(tmp_path, retention=retention)
    metrics = {10: 0.2, 20: 0.9, 30: 0.1, 40: float("nan"), 50: None, 60: 0.5}
    for step, metric in metrics.items():
        save(writer, step, metric=metric)
    writer.close()
    assert steps(tmp_path) == kept
    assert names(tmp_path) == sorted([f"checkpoint_{step}" for step in kept] + ["latest"])


def test_retention_never_deletes_the_checkpoint_just_written(tmp_path: Path) -> None:
    save(make_writer(tmp_path), 50, synchronous=True)
    save(make_writer(tmp_path, attempt="a2", retention=Retention(keep_last=1)), 20, synchronous=True)
    assert steps(tmp_path) == [20, 50]


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_every_steps": 0}, {"keep_best": -1}])
def test_retention_out_of_range_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))} is {next(iter(options.values()))}"):
        Retention(**options)


def test_a_folder_is_renamed_after_its_contents_and_deleted_after_its_renaming_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def record(module: Any, name: str, describe: Callable[..., str]) -> None:
        real = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            events.append(describe(*args))
            return real(*args, **options)

        monkeypatch.setattr(module, name, call)

    save(make_writer(tmp_path, attempt="a0"), 1, synchronous=True)
    record(os, "fsync", lambda descriptor: "sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
    record(os, "rename", lambda old, new: f"rename {Path(new).name}")
    record(os, "replace", lambda old, new: f"replace {Path(new).name}")
    record(shutil, "rmtree", lambda path: f"delete {Path(path).name}")
    save(make_writer(tmp_path, retention=Retention(keep_last=1)), 2, synchronous=True)
    saving, deleted, run = ".checkpoint_2.a1-1.tmp", ".checkpoint_1.a1-1.deleted.tmp", tmp_path.name
    assert [event for event in events if re.search(r"\.[0-9a-f]{8}\.tmp$", event) is None] == [
        "sync model.safetensors", "sync state.rank00000.safetensors", "sync config.yaml",
        f"sync {saving}", "replace rank00000.done.json",
        "replace manifest.json", f"sync {saving}", f"sync {saving}",
        "rename checkpoint_2", f"sync {run}", "replace latest", f"sync {run}",
        f"rename {deleted}", f"sync {run}", f"delete {deleted}",
    ]  # fmt: skip


def damage(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints of steps 1, 2 and 10."""
    with make_writer(tmp_path, asynchronous=False) as writer:
        for step in (1, 2, 10):
            save(writer, step)
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "state.rank00000.safetensors", "config.yaml"])
@pytest.mark.parametrize("position", [0, -1])
def test_a_flipped_bit_is_found_and_its_file_named(run: Path, name: str, position: int) -> None:
    damage(run / "checkpoint_10" / name, position)
    with pytest.raises(
        CheckpointError, match=rf"checkpoint_10 is damaged: {name} has changed since it was written"
    ):
        verify_checkpoint(run / "checkpoint_10")
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(run / "checkpoint_10")
    open_checkpoint(run / "checkpoint_10", verify=False)


def test_a_flipped_bit_anywhere_in_a_manifest_is_found(run: Path) -> None:
    path = run / "checkpoint_10" / "manifest.json"
    for position in range(0, len(path.read_bytes()) - 1, 5):  # the last byte is a line end
        damage(path, position)
        with pytest.raises(CheckpointError, match="checkpoint_10"):
            verify_checkpoint(run / "checkpoint_10")
        damage(path, position)
    verify_checkpoint(run / "checkpoint_10")


def test_missing_and_short_files_are_named_together(run: Path) -> None:
    folder = run / "checkpoint_10"
    (folder / "config.yaml").unlink()
    os.truncate(folder / "model.safetensors", 100)
    with pytest.raises(
        CheckpointError, match=r"config\.yaml is missing; model\.safetensors has 100 bytes instead of \d+"
    ):
        open_checkpoint(folder, verify=False)


def test_a_checkpoint_without_manifest_is_not_complete(run: Path) -> None:
    (run / "checkpoint_10" / "manifest.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint_10 is not a complete checkpoint: manifest.json is missing"
    ):
        open_checkpoint(run / "checkpoint_10")
    assert steps(run) == [1, 2]


def test_a_renamed_checkpoint_and_a_missing_one_are_errors(run: Path) -> None:
    (run / "checkpoint_10").rename(run / "checkpoint_11")
    with pytest.raises(CheckpointError, match="holds the checkpoint of step 10; rename it to checkpoint_10"):
        open_checkpoint(run / "checkpoint_11")
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        open_checkpoint(run / "checkpoint_10")


def forge(folder: Path, **changes: Any) -> None:
    """Rewrite a manifest with a hash that fits it."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    del manifest["manifest_sha256"]
    manifest["manifest_sha256"] = checkpoint_folder._manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../outside": {"num_bytes": 1, "sha256": ""}}},
        {"files": {"/etc/passwd": {"num_bytes": 1, "sha256": ""}}},
        {"files": ["a"]},
        {"files": {"a": {"size": 1}}},
        {"files": {"a": {"num_bytes": "1", "sha256": ""}}},
        {"step": "10"},
        {"world_size": None},
        {"world_size": 0},
        {"world_size": 10**15},
        {"metric": "0.5"},
        {"summary": None},
        {"time": None},
        {"save": 1},
        {"format": checkpoint_folder.FORMAT + 1},
    ],
)
def test_a_forged_manifest_is_an_error(run: Path, changes: dict[str, Any]) -> None:
    forge(run / "checkpoint_10", **changes)
    with pytest.raises(CheckpointError, match=r"checkpoint_10/manifest\.json"):
        open_checkpoint(run / "checkpoint_10")


def test_a_pickle_in_the_place_of_a_shard_is_refused_and_not_run(run: Path) -> None:
    folder, name = run / "checkpoint_10", "state.rank00000.safetensors"
    (folder / name).write_bytes(pickle.dumps(Bomb(run / "ran")))
    data = (folder / name).read_bytes()
    facts = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(folder, files=json.loads((folder / "manifest.json").read_text())["files"] | {name: facts})
    saved = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=rf"{name}: not a readable safetensors file"):
        saved.rank("state", 0)
    assert not (run / "ran").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_the_newest_whole_folder_wins_whatever_latest_says(run: Path) -> None:
    (run / "latest").write_text("checkpoint_1\n")
    assert find_newest(run, fall_back=False) == (run / "checkpoint_10", [])
    (run / "latest").unlink()
    assert find_newest(run, fall_back=True) == (run / "checkpoint_10", [])


def test_a_damaged_newest_checkpoint_is_an_error_or_passed_over_with_an_account(run: Path) -> None:
    damage(run / "checkpoint_10" / "model.safetensors", -1)
    (run / "checkpoint_2" / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint_10 is damaged: model\.safetensors has changed"):
        find_newest(run, fall_back=False)
    newest, skipped = find_newest(run, fall_back=True)
    assert newest == run / "checkpoint_1"
    assert [line.split(" is damaged: ")[1].split()[0] for line in skipped] == [
        "model.safetensors",
        "config.yaml",
    ]


@pytest.mark.parametrize("what", ["format", "a fact of a file"])
def test_a_checkpoint_of_another_format_is_never_passed_over(run: Path, what: str) -> None:
    if what == "format":
        forge(run / "checkpoint_10", format=checkpoint_folder.FORMAT + 1)
    else:
        files = json.loads((run / "checkpoint_10" / "manifest.json").read_text())["files"]
        files["config.yaml"]["compression"] = "zstd"
        forge(run / "checkpoint_10", files=files, note="keys at the top are read over")
    for fall_back in (False, True):
        with pytest.raises(CheckpointError, match="go on with the version that wrote it"):
            find_newest(run, fall_back=fall_back)


def test_a_format_that_was_changed_by_damage_is_damage(run: Path) -> None:
    manifest = run / "checkpoint_10" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 3'))
    newest, skipped = find_newest(run, fall_back=True)
    assert newest == run / "checkpoint_2" and "does not match its own hash" in skipped[0]


def test_only_names_of_checkpoints_are_taken_for_checkpoints(run: Path) -> None:
    for name in (
        "checkpoint_",
        "checkpoint_x",
        "checkpoint_007",
        "checkpoint_99.tmp",
        ".checkpoint_99.a-1.tmp",
    ):
        shutil.copytree(run / "checkpoint_10", run / name)
    (run / "checkpoint_98").write_text("a file")
    assert steps(run) == [1, 2, 10]
    assert find_newest(run, fall_back=False).checkpoint == run / "checkpoint_10"
    assert find_newest(run / "missing", fall_back=False) == (None, [])


def test_text_is_replaced_at_once_and_a_failure_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atomicfile.replace_text(tmp_path / "latest", "old")

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="full"):
        atomicfile.replace_text(tmp_path / "latest", "new")
    assert names(tmp_path) == ["latest"] and (tmp_path / "latest").read_text() == "old"


def crash(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    script = Path(__file__).with_name("checkpoint_crashes.py")
    command = [sys.executable, str(script), arguments[0], str(tmp_path), *arguments[1:]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_dying_at_any_call_of_a_save_leaves_whole_checkpoints(tmp_path: Path) -> None:
    seen = crash(tmp_path, "calls")
    assert min(number for name, number in seen.items() if name.startswith("calls")) > 25
    assert seen["outcomes of step 3 after both"] == [[1, 2], [1, 2, 3], [2, 3]]
    assert seen["outcomes of step 2 after only"] == [[2]]


def test_two_ranks_killed_at_random_moments_leave_whole_checkpoints(tmp_path: Path) -> None:
    seen = crash(tmp_path, "kills", "10")
    assert seen["kills"] == 10 and seen["during a save"] >= 3 and seen["checkpoints completed"] >= 1


def test_the_best_of_each_phase_stays():
    retention = Retention(keep_last=1, keep_best=1)
    metrics = {1: 0.2, 2: 0.1, 3: 0.9, 4: 0.8, 5: 0.95}
    phases = {1: "one", 2: "one", 3: "two", 4: "two", 5: "two"}
    assert retention.expired(metrics, phases) == [1, 3]
