"""Proofs that a user runs: they find what was planted, say where and why, and leave nothing behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from launching import ROOT, cpu_environment, rank_as_fork, run_command
from running import toy, write_config

from trainer import proofs, selfcheck, verify_resume
from trainer.config import load_run_config
from trainer.metrics_file import comparable, encode_record
from trainer.proofs import Processes, RunFailedError, compare_records, compare_weights
from trainer.selfcheck import Bench, Check
from trainer.selfcheck_model import cell_hashes
from trainer.verify_resume import Proof, watched_config

SLOW_CELLS = {"noisy": True, "seconds_per_cell": 0.02, "validation": False}


def records(*losses, **fields):
    return [
        {"kind": "train", "global_step": step, "phase": "a", "cells": 8, "lr": 0.1, "loss": loss, **fields}
        for step, loss in enumerate(losses, start=1)
    ]


def metrics(folder, *losses):
    folder.mkdir(parents=True)
    lines = [encode_record({**record, "time": time.time()}) for record in records(*losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def proof(**changes):
    facts = {
        "last_step": 9,
        "is_at_end": False,
        "killed_at": 4,
        "resumed_from": 3,
        "num_records": 9,
        "num_tensors": 2,
    }
    return Proof(**{**facts, "difference": None, **changes})


# Comparing


def test_equal_runs_have_no_difference():
    assert compare_records(records(1.0, 2.0), records(1.0, 2.0)) is None
    assert compare_weights({"w": torch.ones(2)}, {"w": torch.ones(2)}) is None


def test_the_first_different_record_is_named_with_step_field_and_both_values():
    found = compare_records(records(1.0, 2.0, 3.0), records(1.0, 2.0000000000000004, 4.0))
    assert str(found) == "step 2 (train, phase 'a'), loss: 2.0 against 2.0000000000000004"


def test_a_difference_is_told_by_its_cause_before_its_consequences():
    found = compare_records(records(1.0), records(2.0, cells=7))
    assert found is not None and (found.field, found.expected, found.got) == ("cells", 8, 7)
    assert found.others == ("loss",)


def test_a_record_that_one_run_lacks_is_a_difference():
    found = compare_records(records(1.0, 2.0), records(1.0))
    assert found is not None and (found.step, found.field, found.expected, found.got) == (
        2,
        "the record",
        "a record",
        "none",
    )


def test_nan_in_both_runs_is_no_difference():
    one, two = ([comparable(record) for record in records(float("nan"))] for _ in range(2))
    assert compare_records(one, two) is None


def test_the_clock_is_not_compared_and_later_steps_are_left_out(tmp_path):
    one, two = metrics(tmp_path / "one", 1.0, 2.0), metrics(tmp_path / "two", 1.0, 3.0)
    assert compare_records(proofs.records_until(one, 1), proofs.records_until(two, 1)) is None
    assert compare_records(proofs.records_until(one), proofs.records_until(two)) is not None


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"a": torch.tensor([1.0, -0.0])}, "weights, a[1]: 0.0 against -0.0"),
        ({"a": torch.tensor([1.0])}, "weights, a: [2] float32 against [1] float32"),
        ({"a": torch.tensor([1.0, 0.0]), "b": torch.ones(1)}, "weights, b: none against [1] float32"),
    ],
)
def test_weights_that_differ_in_one_bit_are_found(other, said):
    assert str(compare_weights({"a": torch.tensor([1.0, 0.0])}, other)) == said


def test_the_last_step_of_a_file_that_is_being_written_is_that_of_its_last_whole_line(tmp_path):
    folder = metrics(tmp_path / "run", 1.0, 2.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "global_step": 3')
    assert proofs.last_recorded_step(folder) == 2
    assert proofs.last_recorded_step(tmp_path / "none") == 0


# Causes


@pytest.mark.parametrize(
    ("planted", "word"),
    [
        (compare_records(records(1.0), records(2.0)), "before the kill"),
        (compare_records(records(1, 1, 1, 1.0), records(1, 1, 1, 2.0)), "random state of your own"),
        (compare_records(records(1, 1, 1, 1)[3:], records(1, 1, 1, 1, lr=0.2)[3:]), "scheduler"),
        (compare_records(records(1, 1, 1, 1)[3:], records(1, 1, 1, 1, cells=7)[3:]), "loader"),
        (compare_weights({"a": torch.ones(1)}, {"a": torch.zeros(1)}), "buffer"),
    ],
)
def test_usual_causes_fit_where_the_difference_is(planted, word):
    text = verify_resume.render(proof(difference=planted), 2)
    assert text.startswith("DIFFERENT") and word in text and "2 processes" in text


def test_equal_runs_are_told_with_what_was_compared():
    text = verify_resume.render(proof(), 1)
    assert "equal bit for bit up to step 9: 9 records" in text and "resumed from step 3" in text


# Processes


def test_what_was_started_is_killed_with_its_children(tmp_path):
    code = "import subprocess,sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); p.wait()"
    with Processes([sys.executable, "-c", code], [dict(os.environ)], tmp_path / "log") as group:
        assert group.wait_until(lambda: "\n" in group.output(), "it", 30)
        child = int(group.output())
    assert not group.is_running()
    deadline = time.monotonic() + 10
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(child)


def is_alive(process):
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def test_a_process_that_takes_too_long_is_killed_with_a_clear_message(tmp_path):
    with Processes(["sleep", "60"], [dict(os.environ)], tmp_path / "log") as group:
        with pytest.raises(RunFailedError, match="the training did not end within 0 s"):
            group.wait("the training", 0.2)
        assert not group.is_running()


def test_a_process_that_fails_is_told_with_its_message(tmp_path):
    code = "import sys; print('progress'); print('error: no such file'); sys.exit(2)"
    with (
        Processes([sys.executable, "-c", code], [dict(os.environ)], tmp_path / "log") as group,
        pytest.raises(RunFailedError, match="failed with exit code 2: no such file") as failure,
    ):
        group.wait("the training", 30)
    assert failure.value.is_mistake


def test_a_command_that_is_asked_to_end_kills_what_it_started(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), proofs.ending_on_signals():  # noqa: SIM117
        with Processes(["sleep", "60"], [dict(os.environ)], tmp_path / "log") as group:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
    assert not group.is_running() and signal.getsignal(signal.SIGTERM) == before


# What is run of the user's configuration


def test_the_watched_run_touches_nothing_of_the_users(tmp_path):
    path = write_config(
        tmp_path,
        toy(),
        trackers=["wandb"],
        log_dir=str(tmp_path / "logs"),
        resume_from="auto",
        max_wall_seconds=5,
        launch={"num_processes": 4, "starts_processes": True},
    )
    config = load_run_config(path)
    watched = watched_config(config, tmp_path / "elsewhere", 3, 9)
    assert watched.output_dir == str(tmp_path / "elsewhere")
    assert [tracker.name for tracker in watched.trackers] == ["csv"]
    assert (watched.log_dir, watched.resume_from, watched.max_wall_seconds) == (None, None, None)
    assert watched.launch.num_processes is None and not watched.launch.starts_processes
    assert watched.datasets[0].save_every_steps == 3 and watched.checkpoint.keep_every_steps == 9
    assert (watched.model, watched.optimizer, watched.seed) == (config.model, config.optimizer, config.seed)


@pytest.mark.parametrize(
    "command", [selfcheck.main, lambda a: verify_resume.main([*a, *["--config", "x", "--kill-at", "1"]])]
)
def test_a_launcher_is_refused(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command([]) == 2
    assert "run it without a launcher" in capsys.readouterr().err


# Selfcheck


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path, tmp_path / "cells", 2, "cpu", 10)


def test_a_failed_check_gives_exit_code_1_and_advice(monkeypatch, capsys):
    made = {
        "one": lambda bench: Check("one", "passed", "fine"),
        "two": lambda bench: Check("two", "failed", "1 against 2", "mend it"),
    }
    monkeypatch.setattr(selfcheck, "CHECKS", made)
    assert selfcheck.main(["--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "failed       two  1 against 2" in text and "-> mend it" in text
    assert "1 passed, 1 failed, 0 not checked" in text


def test_what_was_not_checked_is_neither_passed_nor_failed(monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "CHECKS", {"export": selfcheck.check_export})
    assert selfcheck.main(["--device", "cpu"]) == 0
    assert "not checked  export  no run left a checkpoint" in capsys.readouterr().out


def test_a_run_that_fails_fails_its_check_and_the_others_are_made(monkeypatch, bench):
    def fails(bench):
        raise RunFailedError("a training failed with exit code 1", 1, "Traceback\nMemoryError")

    made = {"one": fails, "two": lambda bench: Check("two", "passed", "fine")}
    monkeypatch.setattr(selfcheck, "CHECKS", made)
    first, second = selfcheck.check_all(bench, lambda text: None)
    assert (first.state, second.state) == ("failed", "passed")
    assert "MemoryError" in first.found and "doctor" in first.advice


@pytest.mark.parametrize(
    ("fp8", "state", "said"),
    [
        ((1.0, 0.9), "failed", "no layer computed in FP8"),
        ((1.001, 0.901), "passed", ""),
        ((1.0, 1.2), "failed", "use precision: bf16"),
        ((1.0, float("nan")), "failed", "use precision: bf16"),
    ],
)
def test_fp8_has_to_be_close_and_not_the_same(fp8, state, said, monkeypatch, bench):
    monkeypatch.setattr(
        selfcheck,
        "train",
        lambda bench, name, *_, **__: metrics(bench.folder / name, *(fp8 if name == "fp8" else (1.0, 0.9))),
    )
    found = selfcheck.check_precision(bench)
    assert found.state == state and said in found.advice and "emulated (no GPU)" in found.found


@pytest.mark.parametrize(
    ("cells", "losses", "state", "said"),
    [
        ({"a": 1, "b": 1}, (1.0, 2.0), "passed", "the same 2 cells"),
        ({"a": 2}, (1.0, 2.0), "failed", "of 2 cells 1 were not seen again, 1 others were"),
        ({"a": 1, "b": 1}, (1.0, 2.1), "failed", "step 2 (train, phase 'a'), loss: 2.0 against 2.1"),
        ({"a": 1, "b": 1}, (1.0, 2.00000001), "passed", "within 5e-09"),
    ],
)
def test_processes_have_to_see_the_same_cells_and_lose_the_same(
    cells, losses, state, said, monkeypatch, bench
):
    def several(name):
        return name.endswith("ranks")

    monkeypatch.setattr(
        selfcheck,
        "train",
        lambda bench, name, *_, **__: metrics(
            bench.folder / name, *(losses if several(name) else (1.0, 2.0))
        ),
    )
    monkeypatch.setattr(
        selfcheck, "cells_seen", lambda bench, name: Counter(cells if several(name) else {"a": 1, "b": 1})
    )
    found = selfcheck.check_ranks(bench)
    assert found.state == state and said in found.found


def test_a_cells_hash_does_not_depend_on_its_padding_and_does_on_its_mask():
    def batch(width, label=-100):
        tokens, labels = torch.zeros(1, width, dtype=torch.long), torch.full((1, width), -100)
        tokens[0, :3], labels[0, 1] = torch.tensor([1, 5, 6]), label
        values = torch.zeros(1, width)
        return {
            "tokens": tokens,
            "labels": labels,
            "values": values,
            "attention_mask": torch.arange(width)[None] < 3,
        }

    assert cell_hashes(batch(3)) == cell_hashes(batch(8)) != cell_hashes(batch(3, label=5))


# The commands


@pytest.fixture
def forked(monkeypatch, tmp_path):
    """Let a command run in this process and fork what it starts, each of which would import torch; return its folder.

    The last test runs the command of its name.
    """

    def fork(command, **options):
        assert command[:3] == [sys.executable, "-P", "-m"]
        return rank_as_fork(command, **options)

    named = SimpleNamespace(Popen=fork, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(proofs, "subprocess", named)
    for name, value in cpu_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", [*sys.path])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    return scratch


@pytest.mark.slow
def test_the_selfcheck_passes_and_leaves_nothing_behind(forked, capsys):
    assert selfcheck.main(["--json", "--device", "cpu"]) == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert {check["state"] for check in found.values()} == {"passed"}, found
    assert found.keys() == {"processes", "resume", "export", "fp8"}
    assert "the same 96 cells" in found["processes"]["found"] and "emulated" in found["fp8"]["found"]
    assert not list(forked.glob("cellphase-*"))


@pytest.fixture
def verify(forked, tmp_path, monkeypatch, capsys):
    """Return what proves the toy run with changes, and returns what it said."""

    def run(*arguments, phases=({"dataloader_args": SLOW_CELLS},), expect=0, **changes):
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(tmp_path)]))
        path = write_config(tmp_path, toy(*phases, global_batch_size=8, **changes))
        code = verify_resume.main(["--config", str(path), *arguments])
        said = capsys.readouterr()
        assert code == expect, said
        assert not (tmp_path / "runs").exists(), "the user's own folder"
        return said.out

    return run


def test_a_run_on_two_processes_across_phases_is_equal_and_keeps_its_folders_where_asked(verify, forked):
    dropout = {
        "model_class": "toy.ToyModel",
        "config_class": "toy.ToyConfig",
        "config_args": {"dropout": 0.2},
    }
    said = verify(
        *("--kill-at", "3", "--steps-after", "4", "--ranks", "2", "--seed", "1", "--keep", "seed=11"),
        phases=[
            {"dataloader_args": SLOW_CELLS, "max_steps": 4},
            {"dataloader_args": SLOW_CELLS, "epochs": 2},
        ],
        model=dropout,
    )
    assert "equal bit for bit up to step 9: 9 records" in said and "2 processes" in said, said
    [kept] = forked.glob("cellphase-verify-resume-*")
    assert f"kept: {kept}" in said
    assert yaml.safe_load((kept / "resumed.yaml").read_text())["seed"] == 11


def test_a_model_with_random_state_of_its_own_is_caught(verify, forked, tmp_path):
    (tmp_path / "forgetful.py").write_text(
        textwrap.dedent(
            """
            import numpy as np
            from toy import ToyModel

            class ForgetfulModel(ToyModel):
                def __init__(self, config=None, **arguments):
                    super().__init__(config, **arguments)
                    self.random = np.random.default_rng(5)

                def compute_loss(self, batch):
                    return super().compute_loss(batch) * float(self.random.uniform(0.5, 1.5))
            """
        )
    )
    model = {"model_class": "forgetful.ForgetfulModel", "config_class": "toy.ToyConfig", "config_args": {}}
    said = verify("--kill-at", "2", "--steps-after", "2", expect=1, model=model)
    assert "DIFFERENT: step 3 (train, phase 'p0')" in said, said
    assert "resumed from step 2" in said and "random state of your own" in said
    assert not list(forked.glob("cellphase-*"))


def test_a_step_after_the_runs_end_is_the_users_mistake(tmp_path):
    path = write_config(tmp_path, toy({"dataloader_args": {"num_cells": 16}}, global_batch_size=8))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    said = run_command(
        ["python", "-m", "trainer", "verify-resume", "--config", path, "--kill-at", "2"],
        env={"PYTHONPATH": str(ROOT / "tests"), "TMPDIR": str(scratch)},
        expect=2,
    ).stdout
    assert "--kill-at 2: the run has 2 optimizer steps; choose an earlier step" in said
    assert not list(scratch.glob("cellphase-*")) and not (tmp_path / "runs").exists()
