"""The processes that a run is for: what is refused, what is said, and ranks that a command starts itself."""

import errno
import json
import os
import signal
import sys
import time

import pytest
import yaml
from launching import ROOT, RankGroup, cpu_environment, run_command
from running import TOY, newest_run, records, train, write_config

from trainer import launch
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, UserError


def run_of(**settings):
    return RunConfig.model_validate({**TOY, "launch": settings})


@pytest.fixture
def machine(monkeypatch):
    """Stand in for a machine with some GPUs, and for what a launcher says."""

    def stand_in(gpus=0, **variables):
        monkeypatch.setattr(launch, "gpu_count", lambda config: gpus)
        for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_DEEPSPEED"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return stand_in


def test_another_number_of_processes_is_refused_with_the_command_that_starts_them(machine, monkeypatch):
    machine(gpus=2)
    monkeypatch.setattr(
        sys, "argv", ["/x/trainer/__main__.py", "train", "--config", "a b.yaml", "training.num_gpus=4"]
    )
    with pytest.raises(ConfigError) as error:
        launch.check_launch(run_of(num_processes=4))
    text = str(error.value)
    assert (
        "for 4 processes (num_gpus, launch.num_processes), and 1 was started; this machine has 2 GPUs" in text
    )
    command = "accelerate launch --num_processes 4 -m trainer train --config 'a b.yaml' training.num_gpus=4"
    assert f"\n  {command}\n" in text
    assert "training.num_gpus=null" in text


@pytest.mark.parametrize(
    ("codes", "answer"),
    [((0, 0), 0), ((75, 0), 75), ((0, 75, 75), 75), ((75, 1), 1), ((75, 2), 2), ((0, 130), 130), ((0, 9), 1)],
)
def test_ranks_that_end_in_other_ways_have_one_exit_code(codes, answer):
    assert launch._agreed(list(codes)) == answer


def test_ranks_are_ended_where_another_cannot_be_started(monkeypatch):
    started = []

    class Started:
        returncode = None

        def __init__(self, *_, **__):
            if started:
                raise OSError("no process is left")
            started.append(self)

        def poll(self):
            return self.returncode

        def kill(self):
            self.returncode = -9

        def wait(self):
            return self.returncode

    monkeypatch.setattr(launch.subprocess, "Popen", Started)
    with pytest.raises(OSError, match="no process is left"):
        launch.start_ranks(run_of(), 2)
    assert [each.returncode for each in started] == [-9]


def test_a_full_folder_for_temporary_files_is_named_before_ranks_start(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(launch.tempfile, "tempdir", None)
    monkeypatch.setattr(launch.Path, "write_text", full)
    with pytest.raises(UserError, match=rf"TMPDIR={tmp_path} takes no files \(No space left.*make room"):
        launch.start_ranks(run_of(), 2)
    assert not list(tmp_path.iterdir())


def test_the_command_for_a_machine_without_gpus_names_a_file_that_makes_accelerate_start_several(
    machine, monkeypatch
):
    machine()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["trainer/train.py", "--config", "a.yaml"])
    assert launch.launch_command(2, 0) == (
        "accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml --num_processes 2 "
        "trainer/train.py --config a.yaml"
    )


def test_the_number_that_was_asked_for_is_taken(machine, capsys):
    machine(WORLD_SIZE="2", LOCAL_RANK="0")
    launch.check_launch(run_of(num_processes=2))
    machine(gpus=2, WORLD_SIZE="2", LOCAL_RANK="0")
    launch.check_launch(run_of(num_processes=2))
    launch.check_launch(run_of())


def test_more_processes_than_gpus_are_refused_by_number(machine):
    machine(gpus=2, WORLD_SIZE="3", LOCAL_RANK="0", LOCAL_WORLD_SIZE="3")
    with pytest.raises(ConfigError, match=r"3 processes were started on this machine.*it has 2 GPUs"):
        launch.check_launch(run_of(num_processes=3))
    machine(gpus=1)
    with pytest.raises(ConfigError, match=r"4 processes were asked for.*this machine has 1 GPU"):
        launch.ranks_to_start(run_of(num_processes=4, starts_processes=True))


def test_processes_without_gpus_are_named(machine, capsys, monkeypatch):
    machine(WORLD_SIZE="2", LOCAL_RANK="0")
    monkeypatch.setattr(launch, "is_cpu_run", lambda config: False)
    launch.check_launch(run_of(num_processes=2))
    assert "this machine has 0 GPUs: 2 processes compute on the CPU" in capsys.readouterr().out


def test_one_process_on_a_machine_with_more_gpus_says_how_to_use_them(machine, capsys):
    machine(gpus=8)
    launch.check_launch(run_of())
    assert "this machine has 8 GPUs, and the run takes one; all: accelerate launch --num_processes 8" in (
        capsys.readouterr().out
    )


def test_a_deepspeed_launch_is_refused_unless_the_strategy_is_auto(machine):
    machine(WORLD_SIZE="2", LOCAL_RANK="0", ACCELERATE_USE_DEEPSPEED="true")
    with pytest.raises(ConfigError, match=r"asks for DeepSpeed.*training\.strategy=auto"):
        launch.check_launch(run_of(strategy="ddp"))
    launch.check_launch(run_of(strategy="any"))


def test_a_rank_starts_no_further_ranks(machine):
    machine(WORLD_SIZE="2", LOCAL_RANK="1")
    assert launch.ranks_to_start(run_of(num_processes=2, starts_processes=True)) == 0
    machine()
    assert launch.ranks_to_start(run_of(num_processes=2)) == 0


def test_as_many_ranks_are_started_as_there_are_gpus(machine):
    machine(gpus=3)
    assert launch.ranks_to_start(run_of(starts_processes=True)) == 3
    machine()
    assert launch.ranks_to_start(run_of(starts_processes=True)) == 1


def spawned(folder, **changes):
    launch_section = {"num_processes": 2, "strategy": "ddp", "starts_processes": True}
    return write_config(folder, {**TOY, "launch": launch_section, **changes})


ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}


def test_ranks_that_a_command_starts_train_as_launched_ones_do(tmp_path):
    path = spawned(tmp_path)
    run_command(["python", "-m", "trainer", "train", "--config", path], env=ENVIRONMENT)
    alone = train(tmp_path / "alone", TOY)
    one, two = records(newest_run(tmp_path)), records(alone)
    assert [record["cells"] for record in one] == [record["cells"] for record in two]
    assert one[-1]["loss"] == pytest.approx(two[-1]["loss"], rel=1e-4)


def test_a_mistake_of_a_started_rank_is_told_with_its_exit_code(tmp_path):
    path = spawned(tmp_path, resume_from="latest")
    said = run_command(["python", "-m", "trainer", "train", "--config", path], env=ENVIRONMENT, expect=2)
    assert said.stdout.count("error: ") == 1 and "resume_from" in said.stdout


def test_a_request_to_end_reaches_the_started_ranks_and_they_go_on_afterwards(tmp_path):
    phase = {"name": "one", "dataloader_factory": "toy.map_loader", "epochs": 40, "log_every_steps": 1}
    path = spawned(tmp_path, datasets=[phase])
    command = [sys.executable, "-m", "trainer", "train", "--config", str(path)]
    with RankGroup([command], [cpu_environment(ENVIRONMENT)], ROOT) as group:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("runs/*/metrics.jsonl")):
            assert time.monotonic() < deadline, "the ranks did not begin to train"
            time.sleep(0.1)
        group.processes[0].send_signal(signal.SIGUSR1)
        group.wait(90, 75)
    assert json.loads((newest_run(tmp_path) / "exit_status.json").read_text())["reason"].startswith("SIGUSR1")
    run_command(["python", "-m", "trainer", "train", "--config", path, "resume_from=auto"], env=ENVIRONMENT)
    # Two global batches of 24 cells an epoch, each once.
    assert [record["global_step"] for record in records(newest_run(tmp_path))] == list(range(1, 81))


def test_the_configuration_of_started_ranks_is_the_runs_own(tmp_path):
    from trainer.config import dump_yaml, load_run_config

    config = load_run_config(spawned(tmp_path))
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_yaml(config))
    assert load_run_config(copy) == config
    assert yaml.safe_load(copy.read_text())["launch"]["num_processes"] == 2
