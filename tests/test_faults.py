"""What goes wrong around a run is named: ranks that die or hang, other file systems, full disks, damaged files."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, Fork, RankGroup, start_ranks
from running import (
    comparable_records,
    newest_run,
    records,
    same_weights,
    strategy_environment,
    toy,
    train,
    write_config,
)
from toy import ToyModel

from trainer import build
from trainer.activity import Activity
from trainer.checkpoint_folder import list_checkpoints, verify_checkpoint
from trainer.distributed import Ranks
from trainer.errors import UserError
from trainer.journal import read_events
from trainer.metrics_file import MetricsFile, read_metrics
from trainer.preemption import Preempted
from trainer.runfolder import RunLease
from trainer.trackers import CsvTracker
from trainer.watch import Watch, clear, is_collective_failure

FIRST_STEP = "step 1  "
ENDLESS = {"epochs": 500, "log_every_steps": 1, "dataloader_args": {"seconds_per_cell": 0.002}}


def start(folder: Path, config: dict[str, Any], *, script=None, env=None, **changes: Any) -> RankGroup:
    path, command = write_config(folder, config, **changes), ROOT / "trainer" / "train.py"
    if script is not None:  # in a file, since `python -c` would import everything anew in each rank
        command = folder / "script.py"
        command.write_text(script)
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]), **(env or {})}
    return start_ranks(2, [command, "--config", path], env=environment)


def run_as(preparation: str) -> str:
    """Return a program that prepares a rank and then is the user's command."""
    command = str(ROOT / "trainer" / "train.py")
    lines = [
        "import os, runpy, sys",
        preparation,
        f"sys.argv[0] = {command!r}",
        f"runpy.run_path({command!r}, run_name='__main__')",
    ]
    return "\n".join(lines)


def wait_for_end(process: subprocess.Popen | Fork, seconds: float) -> float:
    """Return after how many seconds a process ended."""
    began = time.monotonic()
    process.wait(seconds)
    return time.monotonic() - began


def test_a_killed_rank_is_named_by_the_others_within_seconds(tmp_path):
    with start(tmp_path, toy(ENDLESS, global_batch_size=8)) as group:
        group.wait_for(FIRST_STEP)
        killed = group.processes[1]
        killed.kill()
        assert wait_for_end(group.processes[0], 30) < 15
        output, reason = group.output(), json.loads((newest_run(tmp_path) / "exit_status.json").read_text())
    assert group.processes[0].returncode == 1
    assert (
        f"rank 1 (process {killed.pid} on " in reason["reason"] and "died without a word" in reason["reason"]
    )
    assert "it was last seen at step " in reason["reason"] and reason["exit_code"] == 1
    assert f"trainer.watch.LostRank: {reason['reason']}" in output
    assert "The above exception was the direct cause" in output, "the collective's own error is not kept"


def test_a_rank_whose_main_thread_learns_nothing_is_ended_by_its_watch(tmp_path):
    with start(tmp_path, toy(ENDLESS, global_batch_size=8), env={"TOY_PAUSE": "forward:3:100"}) as group:
        group.wait_for("toy: forward")
        group.processes[1].kill()
        assert 8 < wait_for_end(group.processes[0], 40) < 25
        output = group.output()
    assert group.processes[0].returncode == 1
    assert "watch: rank 1 (process " in output and "Rank 0 waits for it in vain and ends" in output
    status = json.loads((newest_run(tmp_path) / "exit_status.json").read_text())
    assert status["exit_code"] == 1 and "rank 1 (process " in status["reason"]
    stacks = (newest_run(tmp_path) / "heartbeats" / "rank00000.stack.txt").read_text()
    assert "pause_at" in stacks, "the stack of the main thread is missing"


def test_a_rank_that_ends_with_an_error_is_named_with_it(tmp_path):
    patch = """
if os.environ["RANK"] == "1":
    import toy
    forward, seen = toy.ToyModel.forward, []
    def fail(self, batch):
        seen.append(0)
        if len(seen) == 5: raise ZeroDivisionError("of this rank alone")
        return forward(self, batch)
    toy.ToyModel.forward = fail
"""
    with start(tmp_path, toy(ENDLESS, global_batch_size=8), script=run_as(patch)) as group:
        group.wait(60, expect=None)
        output = group.output()
    assert {process.returncode for process in group.processes} == {1}
    assert (
        "ended at step 5, forward and backward: exit code 1: ZeroDivisionError: of this rank alone" in output
    )


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_stopped_rank_is_named_before_and_at_the_timeout(tmp_path, strategy):
    config = toy(ENDLESS, global_batch_size=8, distributed_timeout_seconds=10)
    with start(tmp_path, config, env=strategy_environment(tmp_path, strategy, 2)) as group:
        group.wait_for(FIRST_STEP)
        group.processes[1].send_signal(signal.SIGSTOP)
        group.wait_for("watch: rank 0", timeout=15)
        assert group.processes[0].poll() is None, "it ended before the timeout"
        stacks = newest_run(tmp_path) / "heartbeats" / "rank00000.stack.txt"
        assert "MainThread" in stacks.read_text() or "most recent call first" in stacks.read_text()
        wait_for_end(group.processes[0], 30)
        output = group.output()
    who = f"rank 1 (process {group.processes[1].pid} on "
    assert output.count("watch: ") == 1 and "has waited for " in output
    assert "is stopped (SIGSTOP, or a debugger), at step " in output.split("watch: ")[1].splitlines()[0]
    assert f"LostRank: {who}" in output and group.processes[0].returncode == 1


def test_a_rank_that_hangs_in_its_loader_is_ended_after_the_others(tmp_path):
    config = toy({"log_every_steps": 1}, global_batch_size=8, distributed_timeout_seconds=5)
    with start(tmp_path, config, env={"TOY_PAUSE": "validating:2:300", "TOY_PAUSE_RANK": "1"}) as group:
        group.wait_for("toy: validating")
        for process in group.processes:
            wait_for_end(process, 60)
        output = group.output()
    assert [process.returncode for process in group.processes] == [1, 1]
    assert "is late: at step 6, waiting for validation data" in output
    assert "Rank 1 is not waited for and ends" in output


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_the_end_of_a_run_that_loses_rank_0_is_written_by_another_rank(tmp_path, how):
    config = toy(ENDLESS if how == "killed" else {}, global_batch_size=8, distributed_timeout_seconds=5)
    with start(tmp_path, config, env={"TOY_PAUSE": "validating:2:300" if how == "hung" else ""}) as group:
        if how == "killed":
            group.wait_for(FIRST_STEP)
            group.processes[0].kill()
        else:
            group.wait_for("toy: validating")
        for process in group.processes:
            wait_for_end(process, 60)
    run = newest_run(tmp_path)
    status = json.loads((run / "exit_status.json").read_text())
    ends = [event for event in read_events(run)[0] if event["event"] == "end"]
    assert status["exit_code"] == 1 and f"rank 0 (process {group.processes[0].pid} on " in status["reason"]
    assert [end["reason"] for end in ends] == [status["reason"]]


def test_a_slow_rank_is_reported_and_waited_for(tmp_path):
    config = toy({"log_every_steps": 1}, global_batch_size=8, distributed_timeout_seconds=10)
    with start(tmp_path, config, env={"TOY_PAUSE": "validating:2:9"}) as group:
        output = group.wait(60).stdout
    assert (
        "rank 0" in output.split("watch: ")[1] and "is late: at step 6, waiting for validation data" in output
    )
    assert output.count("watch: ") == 1
    status = json.loads((newest_run(tmp_path) / "exit_status.json").read_text())
    assert status["exit_code"] == 0


def test_ranks_that_do_not_see_one_file_system_are_refused(tmp_path):
    for name in "01":
        (tmp_path / name).mkdir()
    patience = "import trainer.runfolder\ntrainer.runfolder.SAME_FOLDER_SECONDS = 1.0\n"
    script = run_as(patience + f"os.chdir(os.path.join({str(tmp_path)!r}, os.environ['RANK']))")
    with start(tmp_path, toy(), script=script, output_dir="runs") as group:
        output = group.wait(60, expect=2).stdout
    assert [process.returncode for process in group.processes] == [2, 2]
    assert "rank 1 on " in output and "cannot see the run folder runs/toy_" in output
    assert "choose an output_dir on one that every node mounts" in output and "Traceback" not in output


def test_a_disk_that_fills_up_ends_the_run_and_leaves_the_last_checkpoint(tmp_path):
    # From the fourth step on no file may become as large as the weights.
    patch = """
import resource, toy
forward, seen = toy.ToyModel.forward, []
def limit(self, batch):
    seen.append(0)
    if len(seen) == 4:
        import glob, time
        while not glob.glob(os.environ["TOY_RUNS"] + "/*/checkpoint_2"): time.sleep(0.05)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    return forward(self, batch)
toy.ToyModel.forward = limit
"""
    model = {
        "model_class": "toy.ToyModel",
        "config_class": "toy.ToyConfig",
        "config_args": {"width": 256},
    }
    config = toy({**ENDLESS, "save_every_steps": 2}, global_batch_size=8, model=model)
    with start(tmp_path, config, script=run_as(patch), env={"TOY_RUNS": str(tmp_path / "runs")}) as group:
        group.wait(60, expect=None)
        output = group.output()
    run = newest_run(tmp_path)
    assert {process.returncode for process in group.processes} == {2}, output
    assert (
        f"{run}: saving checkpoint_4 failed" in output
        and "The last complete checkpoint is checkpoint_2" in output
    )
    assert [folder.name for folder in list_checkpoints(run)] == ["checkpoint_2"]
    verify_checkpoint(run / "checkpoint_2")
    assert json.loads((run / "exit_status.json").read_text())["exit_code"] == 2


def test_a_disk_that_fills_up_while_records_are_written_ends_the_run_in_one_message(tmp_path, monkeypatch):
    limits, seen = resource.getrlimit(resource.RLIMIT_FSIZE), []
    forward = ToyModel.forward

    def fill_disk(model, batch):
        seen.append(0)
        if len(seen) == 60:  # no file may outgrow what metrics.jsonl has in some more steps
            size = (newest_run(tmp_path) / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, limits[1]))
        return forward(model, batch)

    monkeypatch.setattr(ToyModel, "forward", fill_disk)
    phase = {"epochs": 500, "log_every_steps": 1, "save_every_epochs": 1000}
    try:
        with pytest.raises(
            UserError, match=r"the run's records cannot be written .*; free some space"
        ) as caught:
            train(tmp_path, toy(phase, global_batch_size=4, trackers=["csv"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run = newest_run(tmp_path)
    status = json.loads((run / "exit_status.json").read_text())
    assert status["exit_code"] == 2 and status["reason"] == str(caught.value) and str(run) in status["reason"]
    assert json.loads((run / "events.jsonl").read_text().splitlines()[-1])["event"] == "end"
    RunLease(run).release()
    with MetricsFile(run / "metrics.jsonl") as file:
        file.append({"kind": "train", "global_step": 999})
    assert read_metrics(run / "metrics.jsonl")[-1]["global_step"] == 999


@pytest.mark.parametrize(
    ("error", "code"), [(OSError("the scores are gone"), 1), (Preempted("SIGTERM while ..."), 75)]
)
def test_what_fails_at_a_run_s_end_does_not_hide_how_it_ended(tmp_path, monkeypatch, error, code):
    def fail(tracker, exit_code):
        ends.append(json.loads((newest_run(tmp_path) / "exit_status.json").read_text())["exit_code"])
        tracker._file.close()
        raise OSError("the tracker's file is gone")

    def fail_to_wait(run, *, wait):
        raise error

    ends = []
    monkeypatch.setattr(CsvTracker, "finish", fail)
    monkeypatch.setattr(build, "finish_scoring", fail_to_wait)
    with pytest.raises(type(error), match=str(error)):
        train(tmp_path, toy(trackers=["csv"]))
    assert ends == [code]  # written before trackers, which may wait for a server, are closed
    run = newest_run(tmp_path)
    assert (run / "report.html").exists()
    RunLease(run).release()


def test_only_auto_passes_over_a_damaged_checkpoint_and_says_so(tmp_path):
    config = toy({"epochs": 3, "save_every_steps": 1}, checkpoint={"keep_last": None})
    reference = train(tmp_path / "whole", config)
    run = train(tmp_path, config)
    damaged = run / (run / "latest").read_text().strip() / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    script = [ROOT / "trainer" / "train.py", "--config", write_config(tmp_path, config)]
    environment = {"PYTHONPATH": str(ROOT / "tests")}
    with start_ranks(1, [*script, "resume_from=latest"], env=environment) as group:
        output = group.wait(60, expect=2).stdout
    assert (
        f"{damaged.parent} is damaged: model.safetensors" in output
        and "SHA-256 differs" in output
        and "give auto" in output
    )
    with start_ranks(1, [*script, "resume_from=auto"], env=environment) as group:
        output = group.wait(60).stdout
    assert "model.safetensors" in output and "checkpoint_5" in output
    assert comparable_records(run) == comparable_records(reference) and same_weights(run, reference)
    assert len(records(run)) == 6


class PretendedRanks(Ranks):
    """Two ranks, of which the other is whatever a test says it is."""

    other = None

    def gather_text(self, text: str) -> list[str]:
        own = json.loads(text)
        return [text, json.dumps({**own, "rank": 1, **(self.other or {})})]


def watch_of(folder: Path, other: dict[str, Any]) -> Watch:
    clear(folder)
    ranks = PretendedRanks(0, 2)
    object.__setattr__(ranks, "other", other)
    watch = Watch(folder, ranks, Activity(), attempt="a", timeout_seconds=100, on_end=lambda reason: None)
    beat = replace(watch._own, **{"rank": 1, "step": 7, "activity": "forward and backward", **other})
    (folder / "heartbeats" / "rank00001.json").write_text(json.dumps(asdict(beat)))
    return watch


def test_a_process_that_has_ended_but_is_not_reaped_is_dead(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    started = Path(f"/proc/{ended.pid}/stat").read_text().rpartition(")")[2].split()[19]
    watch = watch_of(tmp_path, {"process": ended.pid, "started": started})
    found = watch.explain(RuntimeError("gloo: Connection closed by peer"))
    assert f"rank 1 (process {ended.pid} on " in str(found) and "at step 7, forward and backward" in str(
        found
    )
    ended.wait()
    watch.close(0, "done", is_wanted=True)


def test_another_process_of_the_same_id_is_not_taken_for_the_rank(tmp_path):
    watch = watch_of(tmp_path, {"process": os.getpid(), "started": "1"})
    assert "died without a word" in str(watch.explain(RuntimeError("gloo")))
    watch.close(0, "done", is_wanted=True)


def test_a_process_id_of_another_machine_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.watch._FIND_SECONDS", 0.0)
    watch = watch_of(tmp_path, {"process": 2**22 + 1, "machine": "another"})
    assert watch.explain(RuntimeError("gloo")) is None
    watch.close(0, "done", is_wanted=True)


def test_a_silent_rank_of_another_machine_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.watch._SILENT_SECONDS", 0.0)
    watch = watch_of(tmp_path, {"machine": "another", "host": "far"})
    assert "on far) gives no sign of life; it was last seen at step 7" in str(
        watch.explain(RuntimeError("gloo"))
    )
    watch.close(0, "done", is_wanted=True)


def test_heartbeats_of_an_earlier_start_are_not_read(tmp_path):
    watch = watch_of(tmp_path, {"process": 2**22 + 1, "attempt": "earlier"})
    assert watch._dead_neighbour() is None
    watch.close(0, "done", is_wanted=True)


def test_a_rank_that_ends_as_it_should_takes_its_heartbeat_away(tmp_path):
    watch = watch_of(tmp_path, {"process": os.getpid()})
    (tmp_path / "heartbeats" / "rank00001.json").unlink()
    watch.close(75, "SIGTERM", is_wanted=True)
    assert not (tmp_path / "heartbeats").exists()


def test_only_errors_of_talking_to_other_ranks_are_explained():
    assert is_collective_failure(
        RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    )
    # What Gloo says in a backward pass.
    assert is_collective_failure(RuntimeError("Application timeout caused pair closure"))
    assert not is_collective_failure(RuntimeError("CUDA out of memory"))
    assert not is_collective_failure(ValueError("gloo"))
