import signal
import sys
import time

import psutil
import pytest
from launching import (
    LEFT_BY_IMPORTS,
    PRELOAD,
    ROOT,
    Fork,
    cpu_environment,
    free_port,
    launch_ranks,
    may_be_forked,
    run_command,
    start_ranks,
    with_forked_ranks,
)

SUM_OF_RANKS = """
import torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
total = torch.tensor(float(accelerator.process_index))
torch.distributed.all_reduce(total)
print(f"rank {accelerator.process_index} of {accelerator.num_processes}: sum {total.item():g}\\n", end="")
torch.distributed.destroy_process_group()
"""

WAIT_FOR_SIGNAL = """
import os, signal, subprocess, sys, time
heard = f"rank {os.environ['RANK']} heard\\n"  # one write: the ranks share the output
signal.signal(signal.SIGUSR1, lambda *_: (print(heard, end=""), os._exit(75)))
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
print("ready\\n", end="")
time.sleep(300)
"""


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "script.py"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("launcher", ["processes", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_ranks_that_are_started_find_each_other(script, launcher):
    output = launch_ranks(2, [script(SUM_OF_RANKS)], launcher=launcher).stdout
    assert "rank 0 of 2: sum 1" in output and "rank 1 of 2: sum 1" in output


def test_a_failing_command_shows_its_output():
    with pytest.raises(AssertionError, match=r"exit code 3, expected 0:\n.*\nexplanation"):
        run_command(["python", "-c", "print('explanation'); raise SystemExit(3)"])
    assert run_command(["python", "-c", "raise SystemExit(3)"], expect=3).returncode == 3


def test_a_command_that_hangs_is_killed_and_shows_its_output():
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"still ran after 1 s:\n(.|\n)*before"):
        run_command(["python", "-c", "import time; print('before'); time.sleep(100)"], timeout=1)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("launcher", ["processes", "torchrun"])
def test_killing_a_group_leaves_no_process(script, launcher):
    with start_ranks(2, [script(WAIT_FOR_SIGNAL)], launcher=launcher) as group:
        group.wait_for("ready\nready")
        pids = [child.pid for rank in group.rank_processes() for child in [rank, *rank.children()]]
        assert len(pids) == 4
        group.kill()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert not group.is_running()


def test_a_signal_reaches_the_ranks_and_their_exit_code_comes_back(script):
    with start_ranks(2, [script(WAIT_FOR_SIGNAL)]) as group:
        group.wait_for("ready\nready")
        group.signal_ranks(signal.SIGUSR1)
        output = group.wait(20, expect=75).stdout
    assert "rank 0 heard" in output and "rank 1 heard" in output


def test_a_signal_reaches_the_ranks_behind_a_launcher(script):
    with start_ranks(2, [script(WAIT_FOR_SIGNAL)], launcher="accelerate") as group:
        group.wait_for("ready\nready")
        group.signal_ranks(signal.SIGUSR1)
        output = group.wait(60, expect=1).stdout
    assert "rank 0 heard" in output or "rank 1 heard" in output


def test_free_ports_are_free_and_differ():
    assert len({free_port() for _ in range(5)}) > 1


COMMAND = [sys.executable, str(ROOT / "trainer" / "train.py")]


@pytest.mark.skipif(not PRELOAD, reason="forking is turned off")
def test_what_imports_leave_in_the_environment_does_not_keep_ranks_from_being_forked(monkeypatch, script):
    for name in LEFT_BY_IMPORTS:
        monkeypatch.setenv(name, "left")
    with start_ranks(2, [script("import os; print(sorted(os.environ))")]) as group:
        assert all(isinstance(process, Fork) for process in group.processes)
        assert not any(name in group.wait().stdout for name in LEFT_BY_IMPORTS)


SHOWN = """
import os
shown = open("/proc/self/environ", "rb").read().split(b"\\0")
own = {name + b"=" + value for name, value in os.environb.items()}
print(own == {*shown} - {b""}, os.environ["RANK"] + "\\n", end="")
"""


@pytest.mark.skipif(not PRELOAD, reason="forking is turned off")
def test_a_fork_shows_its_own_variables_to_others(script):
    with start_ranks(2, [script(SHOWN)]) as group:
        assert all(isinstance(process, Fork) for process in group.processes)
        assert sorted(group.wait().stdout.splitlines()) == ["True 0", "True 1"]


@pytest.mark.skipif(not PRELOAD, reason="forking is turned off")
def test_ranks_of_a_launcher_are_forks_where_they_are_asked_to_be(script):
    text = "import os, sys; print('preloaded' in open('/proc/self/cmdline').read(), os.environ['RANK'] + '\\n', end='')"
    for expected, env in ((True, with_forked_ranks({})), (False, {})):
        said = launch_ranks(2, [script(text)], launcher="torchrun", env=env).stdout.splitlines()
        assert {f"{expected} 0", f"{expected} 1"} <= {*said}, said


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "TORCH_LOGS", "HOME"])
def test_a_rank_with_another_variable_that_is_read_early_is_not_forked(name):
    assert may_be_forked(COMMAND, cpu_environment({"RANK": "1", "CELLPHASE_ANY": "1"}), ROOT)
    assert not may_be_forked(COMMAND, cpu_environment({name: "2"}), ROOT)


@pytest.mark.parametrize("name", ["torch.py", "yaml/__init__.py", "trainer/__init__.py", "sitecustomize.py"])
def test_a_rank_that_would_import_another_module_is_not_forked(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert not may_be_forked(COMMAND, cpu_environment({"PYTHONPATH": str(tmp_path)}), ROOT)
    assert not may_be_forked([sys.executable, "-m", "trainer"], cpu_environment(), tmp_path)
