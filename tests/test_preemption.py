"""A run that is asked to end saves one checkpoint and says 75; it then ends like one that was left alone."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from launching import ROOT, Launcher, RankGroup, start_ranks, with_forked_ranks
from running import (
    comparable_records,
    newest_run,
    records,
    same_weights,
    strategy_environment,
    toy,
    write_config,
)

from trainer.checkpoint_folder import read_manifest
from trainer.metrics_file import MetricsFile, read_metrics
from trainer.preemption import agreed_request
from trainer.shards import SHARD

FIRST_STEP = "step 1  "
MODEL = {"model_class": "toy.ToyModel", "config_class": "toy.ToyConfig", "config_args": {"dropout": 0.2}}
CELLS = {"noisy": True, "seconds_per_cell": 0.004}
PHASES = (
    {
        "dataloader_args": CELLS,
        "epochs": 2,
        "eval_every_steps": 4,
        "eval_every_epochs": 1,
        "save_every_steps": 4,
        "log_every_steps": 1,
    },
    {"dataloader_args": CELLS, "epochs": 1, "lr": 0.003, "log_every_steps": 3, "warmup_steps": 2},
)
CELLS_EVALUATED = 10
"""By one rank, in one evaluation: at steps 4, 6 (an epoch's end), 8, 12 (the phase's end) and 18."""


def configuration(num_ranks: int, *phases: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings = {"model": MODEL, "ema": {"decay": 0.8}, "global_batch_size": 8, "micro_batch_size": 4}
    return toy(*(phases or PHASES), **{**settings, **changes})


def start(
    num_ranks: int,
    folder: Path,
    config: dict[str, Any],
    *,
    launcher: Launcher = "processes",
    env=None,
    **changes: Any,
) -> RankGroup:
    path = write_config(folder, config, **changes)
    script = [ROOT / "trainer" / "train.py", "--config", path]
    environment = {"PYTHONPATH": str(ROOT / "tests"), **(env or {})}
    return start_ranks(num_ranks, script, launcher=launcher, env=environment)


def run_to_end(num_ranks: int, folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    with start(num_ranks, folder, config, **changes) as group:
        group.wait(90)
    return newest_run(folder)


def end(group: RankGroup) -> str:
    """Wait for the end of all ranks, each with 75, and return what they printed."""
    output = group.wait(60, expect=75).stdout
    assert [process.returncode for process in group.processes] == [75] * len(group.processes), output
    return output


def status(folder: Path) -> dict[str, Any]:
    return json.loads((newest_run(folder) / "exit_status.json").read_text())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Return the run that was left alone, on so many ranks."""
    runs: dict[int, Path] = {}

    def of(num_ranks: int) -> Path:
        if num_ranks not in runs:
            folder = tmp_path_factory.mktemp(f"reference{num_ranks}")
            runs[num_ranks] = run_to_end(num_ranks, folder, configuration(num_ranks))
        return runs[num_ranks]

    return of


@pytest.mark.parametrize(
    ("num_ranks", "place", "step", "to_all"),
    [
        (1, "forward:1", 1, True),
        (1, f"validating:{CELLS_EVALUATED // 2}", 4, True),
        (1, f"validating:{3 * CELLS_EVALUATED + 2}", 12, True),
        (2, "validating:8", 6, False),
        (2, "writing:1", None, True),
    ],
)
def test_a_run_that_was_stopped_ends_like_one_left_alone(tmp_path, reference, num_ranks, place, step, to_all):
    config = configuration(num_ranks)
    with start(num_ranks, tmp_path, config, env={"TOY_PAUSE": f"{place}:1"}) as group:
        group.wait_for("toy: ")
        before = records(newest_run(tmp_path), "validation")
        if to_all:
            group.signal_ranks(signal.SIGTERM)
        else:
            group.processes[-1].send_signal(signal.SIGUSR1)
        output = end(group)
    saved = status(tmp_path)
    assert saved["exit_code"] == 75 and f"stopped: {saved['reason']}" in output
    assert ("SIGTERM" if to_all else "SIGUSR1 on rank 1") in saved["reason"]
    assert f"at step {'' if step is None else step}" in saved["reason"]
    assert (
        f"checkpoint_{(newest_run(tmp_path) / 'latest').read_text().strip()[11:]} is complete"
        in saved["reason"]
    )
    if "validating" in place:
        assert records(newest_run(tmp_path), "validation") == before, "a stopped evaluation left a record"
    resumed = run_to_end(num_ranks, tmp_path, config, resume_from="auto")
    assert comparable_records(resumed) == comparable_records(reference(num_ranks))
    assert same_weights(resumed, reference(num_ranks))
    assert status(tmp_path)["exit_code"] == 0


def test_a_run_stopped_again_and_again_at_random_moments_ends_like_one_left_alone(tmp_path, reference):
    config, chance = configuration(2), random.Random(1)
    changes: dict[str, Any] = {}
    for _ in range(2):
        with start(2, tmp_path, config, **changes) as group:
            group.wait_for("parameters ")
            time.sleep(chance.uniform(0, 0.5))
            group.processes[chance.randrange(2)].send_signal(signal.SIGTERM)
            group.wait(60, expect=None)
            codes = {process.returncode for process in group.processes}
            assert codes in ({0}, {75}), group.output()
        changes = {"resume_from": "auto"}
    resumed = run_to_end(2, tmp_path, config, **changes)
    assert comparable_records(resumed) == comparable_records(reference(2))
    assert same_weights(resumed, reference(2))


def test_a_sharded_run_stopped_in_an_evaluation_ends_like_one_left_alone(tmp_path):
    config = configuration(2, {"dataloader_args": CELLS, "eval_every_steps": 2, "max_steps": 4})
    environment = strategy_environment(tmp_path, "zero3", 2)
    whole = run_to_end(2, tmp_path / "whole", config, env=environment)
    with start(2, tmp_path, config, env={**environment, "TOY_PAUSE": "validating:2:1"}) as group:
        group.wait_for("toy: validating")
        group.processes[1].send_signal(signal.SIGTERM)
        end(group)
    assert "at step 2" in status(tmp_path)["reason"]
    resumed = run_to_end(2, tmp_path, config, resume_from="auto", env=environment)
    assert comparable_records(resumed) == comparable_records(whole)
    shards = [
        {name: facts for name, facts in read_manifest(run / "checkpoint_4")["files"].items() if SHARD in name}
        for run in (resumed, whole)
    ]
    assert len(shards[0]) == 2 and shards[0] == shards[1]


def test_a_stream_is_stopped_without_losing_cells(tmp_path):
    phase = {
        "dataloader_factory": "toy.sharded_loader",
        "dataloader_args": {"num_cells": 96},
        "max_steps": 20,
        "epochs": 4,
        "log_every_steps": 1,
    }
    config = configuration(2, phase)
    whole = run_to_end(2, tmp_path / "whole", config)
    with start(2, tmp_path, config, env={"TOY_PAUSE": "forward:5:1"}) as group:
        group.wait_for("toy: forward")
        group.processes[1].send_signal(signal.SIGTERM)
        end(group)
    resumed = run_to_end(2, tmp_path, config, resume_from="auto")
    assert comparable_records(resumed) == comparable_records(whole) and same_weights(resumed, whole)


def test_a_launched_run_leaves_its_accounts_for_the_launch_script(tmp_path):
    control = tmp_path / "control"
    control.mkdir()
    config = configuration(2)
    env = with_forked_ranks({"PYTHONPATH": str(ROOT / "tests"), "CELLPHASE_CONTROL": str(control)})
    with start(2, tmp_path, config, launcher="accelerate", env=env) as group:
        group.wait_for(FIRST_STEP)
        for rank in range(2):
            os.kill(int(next(control.glob(f"rank{rank}.runs.*")).suffix[1:]), signal.SIGTERM)
        group.wait(60, expect=1)  # a launcher turns every failure into 1
    for rank in range(2):
        account = json.loads((control / f"rank{rank}.exit.json").read_text())
        assert account["exit_code"] == 75 and account["reason"].startswith("SIGTERM"), account
        assert (control / f"rank{rank}.exited.75").exists()
        assert Path(account["run_folder"]) == newest_run(tmp_path)
    assert (control / "run_folder").read_text() == f"{newest_run(tmp_path)}\n"
    assert status(tmp_path)["exit_code"] == 75
    assert not list(newest_run(tmp_path).glob("heartbeats/*.json"))


def test_ranks_whose_launcher_dies_save_and_end(tmp_path):
    phase = {**PHASES[0], "epochs": 40}
    with start(1, tmp_path, configuration(1, phase), launcher="accelerate") as group:
        group.wait_for(FIRST_STEP)
        (rank,) = group.rank_processes()
        group.processes[0].kill()
        psutil.wait_procs([rank], timeout=20)
        assert not rank.is_running(), group.output()
    assert status(tmp_path)["exit_code"] == 75 and "the end of the launcher" in status(tmp_path)["reason"]


def test_a_time_limit_ends_a_run_with_a_checkpoint(tmp_path):
    phase = {**PHASES[0], "epochs": 200}
    with start(1, tmp_path, configuration(1, phase), max_wall_seconds=15) as group:
        end(group)
    assert status(tmp_path)["reason"].startswith("wall-clock limit at step ")
    assert (newest_run(tmp_path) / (newest_run(tmp_path) / "latest").read_text().strip()).is_dir()


@pytest.mark.parametrize("by", ["signal", "preempt"])
def test_a_run_asked_to_end_before_its_folder_exists_ends_at_once(tmp_path, by):
    control = tmp_path / "control"
    control.mkdir()
    if by == "preempt":
        (control / "preempt.SIGUSR1").touch()
    environment = {"CELLPHASE_CONTROL": str(control), "TOY_PAUSE": "building:1:1"}
    with start(1, tmp_path, configuration(1), env=environment) as group:
        group.wait_for("toy: building")
        if by == "signal":
            group.signal_ranks(signal.SIGTERM)
        output = end(group)
    account = json.loads((control / "rank0.exit.json").read_text())
    assert account["exit_code"] == 75 and account["run_folder"] is None
    assert account["reason"].startswith("SIGTERM" if by == "signal" else "SIGUSR1")
    assert (
        "before its run folder was made" in account["reason"] and "before its run folder was made" in output
    )
    assert not (tmp_path / "runs").exists()


def test_a_mistake_and_ctrl_c_are_told_to_the_launch_script_too(tmp_path):
    cases: list[tuple[dict[str, Any], int]] = [({"micro_batch_size": 5}, 2), ({}, 130)]
    for number, (changes, code) in enumerate(cases):
        control = tmp_path / f"control{number}"
        control.mkdir()
        environment = {"CELLPHASE_CONTROL": str(control)}
        with start(1, tmp_path, configuration(1), env=environment, **changes) as group:
            if code == 130:
                group.wait_for(FIRST_STEP)
                group.signal_ranks(signal.SIGINT)
            group.wait(60, expect=code)
        account = json.loads((control / "rank0.exit.json").read_text())
        assert account["exit_code"] == code and account["reason"]
    assert status(tmp_path) == {**status(tmp_path), "exit_code": 130, "reason": "interrupted"}


def test_a_command_that_saves_nothing_is_ended_by_a_signal(tmp_path):
    path = write_config(tmp_path, configuration(1))
    environment = {"PYTHONPATH": str(ROOT / "tests"), "TOY_PAUSE": "building:1:20"}
    arguments = [ROOT / "trainer" / "train.py", "--config", path, "--dry-run"]
    with start_ranks(1, arguments, env=environment) as group:
        group.wait_for("toy: building")
        group.signal_ranks(signal.SIGTERM)
        group.wait(10, expect=-signal.SIGTERM)


def test_loader_processes_outlive_a_signal_to_all_but_not_their_rank(tmp_path):
    phase = {**PHASES[0], "dataloader_args": {**CELLS, "num_workers": 1}, "epochs": 40}
    config = configuration(1, phase)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with start(1, tmp_path / str(number), config) as group:
            group.wait_for(FIRST_STEP)
            started = psutil.Process(group.processes[0].pid).children(recursive=True)
            # The worker, the process that it was forked from, and Python's resource tracker.
            assert len(started) == 3, "the loader started no processes"
            if number == signal.SIGTERM:
                os.killpg(group.processes[0].pid, number)
                end(group)
            else:
                group.processes[0].kill()
            _, left = psutil.wait_procs(started, timeout=10)
            assert not left


def test_a_forked_worker_of_a_users_loader_outlives_a_signal_to_all(tmp_path):
    phase = {
        "dataloader_factory": "toy.stream_loader",
        "dataloader_args": {"num_cells": 4000, "num_workers": 1},
        "max_steps": 2000,
        "log_every_steps": 1,
    }
    with start(1, tmp_path, configuration(1, phase)) as group:
        group.wait_for(FIRST_STEP)
        os.killpg(group.processes[0].pid, signal.SIGTERM)
        end(group)


def test_a_request_names_the_rank_unless_all_were_asked():
    class Ranks:
        count = 3

        def __init__(self, *texts):
            self.texts = list(texts)

        def gather_text(self, text):
            return self.texts

    assert agreed_request(Ranks("", "", ""), None) == ""
    assert agreed_request(Ranks("", "SIGTERM", ""), None) == "SIGTERM on rank 1"
    assert agreed_request(Ranks("SIGTERM", "SIGTERM", "SIGTERM"), None) == "SIGTERM"
    assert agreed_request(Ranks("wall-clock limit", "", ""), None) == "wall-clock limit"


def test_the_record_of_an_evaluation_that_is_made_again_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    shared = {"phase": "p", "phase_step": 4}
    kept = [
        {"kind": "validation", "global_step": 4, "epoch": 0, **shared},
        {"kind": "train", "global_step": 4, "epoch": 0, **shared},
    ]
    with MetricsFile(path) as file:
        for record in [*kept, {"kind": "validation", "global_step": 4, "epoch": 1, **shared}]:
            file.append(record)
    shutil.copy(path, tmp_path / "copy")
    MetricsFile(tmp_path / "copy", resume_step=4).close()
    assert len(read_metrics(tmp_path / "copy")) == 3
    MetricsFile(path, resume_step=4, redone={"kind": "validation", "phase": "p", "epoch": 1}).close()
    assert read_metrics(path) == kept
