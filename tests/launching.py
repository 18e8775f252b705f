"""Run the commands that users run, from tests: one process or several ranks on the CPU, for a limited time.

The output of a command that does not end as expected is part of the failure's message. What is started here
is killed at the latest when the test ends: use `start_ranks` as a context manager.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Literal, NamedTuple
from unittest import mock

import preloaded
import psutil

ROOT = Path(__file__).resolve().parent.parent
CPU_CONFIGS = ROOT / "accelerate_configs"

Launcher = Literal["processes", "torchrun", "accelerate"]
"""`processes` starts the ranks themselves: fastest, and with their own exit codes; the others are real."""


LAUNCHER_MODULES = frozenset({"torch.distributed.run", "accelerate.commands.launch"})
MARK = "CELLPHASE_TEST_COMMAND"

PRELOAD = os.environ.get("CELLPHASE_TEST_PRELOAD", "1") != "0"
"""Whether `python SCRIPT` is a fork of a process that has imported torch, which saves seconds; 0 turns it off."""

READ_LATE = (
    *("ACCELERATE_", "CELLPHASE_", "GROUP_", "LOCAL_", "MASTER_", "NUMBA_", "PET_", "PYTEST_", "ROLE_"),
    *("TORCHELASTIC_", "TORCH_NCCL_", "TOY_", "WANDB_"),
)
"""Beginnings of variables that nothing reads while the one that forks imports it."""
READ_LATE_TOO = frozenset(
    {
        *("COLUMNS", "FORK_LAUNCHED", "GLOO_SOCKET_IFNAME", "LINES", "NODES", "NODE_RANK", "PATH"),
        *("PROCESSES_PER_NODE", "PYTHON", "PYTHONPATH", "RANK", "TMPDIR", "WORLD_SIZE"),
        *("OLDPWD", "PWD", "SHLVL", "_"),  # a shell's own
    }
)
FORKED_RANKS = ROOT / "tests" / "forked_ranks"
"""What a launcher's PYTHONPATH has to hold for its ranks to be forks."""

LEFT_BY_IMPORTS = frozenset(
    {
        "DS_ACCELERATOR",
        "KMP_DUPLICATE_LIB_OK",
        "KMP_INIT_AT_FORK",
        "PYTORCH_NVML_BASED_CUDA_CHECK",
        "TORCHINDUCTOR_CACHE_DIR",
        "TORCH_CPP_LOG_LEVEL",
        "_RJEM_MALLOC_CONF",
    }
)
"""Variables that scikit-learn, DeepSpeed, torch's compiler, Polars and our own commands set, for no rank's sake."""

RANK_MODULES = (*preloaded.IMPORTED, *preloaded.OWN, preloaded.STAND_INS)
FORKERS = {
    "plain": RANK_MODULES,
    "deepspeed": (*RANK_MODULES, "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "transformers"),
    "scoring": ("trainer.scoring.worker", "trainer.scoring.vcc_request"),
}
"""What each kind of process that forks imports. DeepSpeed's Muon, to compare with it, brings the compiler."""
FORKERS_AT = "CELLPHASE_TEST_FORKERS"
"""The variable that names the folder of those that the process which began the tests has started."""


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def cpu_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment, but one thread, no GPU, and ranks that talk through loopback."""
    return {
        **{name: value for name, value in os.environ.items() if name not in LEFT_BY_IMPORTS},
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONUNBUFFERED": "1",
        **(extra or {}),
    }


def run_command(
    args: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    cwd: Path | str = ROOT,
    expect: int | None = 0,
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end and return it with `stdout` holding both of its output streams.

    Args:
        args: The command; "python" stands for this interpreter.
        env: Variables on top of `cpu_environment`.
        timeout: Seconds after which it and all its descendants are killed.
        cwd: Where it runs.
        expect: The exit code that it must have; None accepts any.
    """
    command = [sys.executable if part == "python" else str(part) for part in args]
    with RankGroup([command], [cpu_environment(env)], cwd) as group:
        return group.wait(timeout, expect)


def launch_ranks(
    num_ranks: int,
    script_args: Sequence[str | Path],
    *,
    launcher: Launcher = "processes",
    env: Mapping[str, str] | None = None,
    timeout: float = 240,
    cwd: Path | str = ROOT,
    expect: int | None = 0,
) -> subprocess.CompletedProcess[str]:
    """Run a script (or `-m`, a module) on several ranks to its end; see `start_ranks` and `run_command`."""
    with start_ranks(num_ranks, script_args, launcher=launcher, env=env, cwd=cwd) as group:
        return group.wait(timeout, expect)


def start_ranks(
    num_ranks: int,
    script_args: Sequence[str | Path],
    *,
    launcher: Launcher = "processes",
    env: Mapping[str, str] | None = None,
    cwd: Path | str = ROOT,
) -> "RankGroup":
    """Start a script on several CPU ranks and return while it runs.

    Args:
        num_ranks: 1 under `processes` is a plain `python SCRIPT`, without any launcher's variables.
        script_args: The script with its arguments, or `-m`, a module and its arguments.
        launcher: What starts the ranks.
        env: Variables on top of `cpu_environment`.
        cwd: Where it runs.
    """
    script = [str(part) for part in script_args]
    environment = cpu_environment(env)
    if launcher == "torchrun":
        options = ["--standalone", "--nproc-per-node", str(num_ranks)]
        return RankGroup(
            [[sys.executable, "-m", "torch.distributed.run", *options, *script]], [environment], cwd
        )
    if launcher == "accelerate":
        config = CPU_CONFIGS / ("cpu.yaml" if num_ranks == 1 else "cpu_2_processes.yaml")
        options = ["--config_file", str(config), "--num_processes", str(num_ranks)]
        return RankGroup(
            [[sys.executable, "-m", "accelerate.commands.launch", *options, *script]], [environment], cwd
        )
    command = [sys.executable, *script]
    if num_ranks == 1:
        return RankGroup([command], [environment], cwd)
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    environments = [
        environment
        | rendezvous
        | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)}
        for rank in range(num_ranks)
    ]
    return RankGroup([command] * num_ranks, environments, cwd)


class RankGroup:
    """Processes that belong together: a launcher with its ranks, or the ranks themselves."""

    grace_seconds = 30.0
    """How long the other ranks may go on after one has failed."""

    def __init__(
        self, commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], cwd: Path | str
    ) -> None:
        """Start one process for each command; all write into one file."""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        # Launchers put their ranks into sessions of their own and may die before them, so that neither a
        # process group nor the tree of parents reaches everything; but all descendants inherit a variable.
        self._mark = secrets.token_hex(8)
        self._first = [*commands[0]]
        self.processes = [
            start_process(command, {**environment, MARK: self._mark}, cwd, self._output.fileno())
            for command, environment in zip(commands, environments, strict=True)
        ]

    def __enter__(self) -> "RankGroup":
        """Return the running group."""
        return self

    def __exit__(self, *error: object) -> None:
        """Kill what still runs."""
        self.kill()
        self._output.close()

    def output(self) -> str:
        """Return what has been written so far, of all ranks."""
        return os.pread(self._output.fileno(), os.fstat(self._output.fileno()).st_size, 0).decode(
            errors="replace"
        )

    def is_running(self) -> bool:
        """Tell whether any process has not ended."""
        return any(process.poll() is None for process in self.processes)

    def wait(self, timeout: float = 240, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Wait until all have ended, and fail with their output when that is not as expected.

        The exit code of several ranks is that of the one that failed first.

        Raises:
            AssertionError: the time is up, or the exit code is another.
        """
        deadline, failed = time.monotonic() + timeout, None
        while self.is_running():
            now = time.monotonic()
            if failed is None and any(process.poll() for process in self.processes):
                failed = next(process.poll() for process in self.processes if process.poll())
                deadline = min(deadline, now + self.grace_seconds)
            if now > deadline:
                self.kill()
                reason = (
                    f"still ran after {timeout} s"
                    if failed is None
                    else f"one rank ended with {failed}, others hung"
                )
                raise AssertionError(f"{reason}:\n{self._command()}\n{self.output()}")
            time.sleep(0.02)
        code = failed or next((process.returncode for process in self.processes if process.returncode), 0)
        if expect is not None and code != expect:
            raise AssertionError(f"exit code {code}, expected {expect}:\n{self._command()}\n{self.output()}")
        return subprocess.CompletedProcess(self._command(), code, stdout=self.output())

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Wait until the output holds a text.

        Raises:
            AssertionError: the time is up, or all processes ended without it.
        """
        deadline = time.monotonic() + timeout
        while text not in self.output():
            if not self.is_running() and text not in self.output():
                raise AssertionError(f"ended without saying {text!r}:\n{self._command()}\n{self.output()}")
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(
                    f"did not say {text!r} in {timeout} s:\n{self._command()}\n{self.output()}"
                )
            time.sleep(0.01)

    def kill(self) -> None:
        """End all with SIGKILL, launchers, ranks and what they started, and wait until they are gone."""
        while members := self._members():
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(members, timeout=10)
        for process in self.processes:
            process.wait(10)

    def signal_ranks(self, number: int) -> None:
        """Send a signal to the ranks: not to their launcher, nor to processes that they started."""
        for rank in self.rank_processes():
            rank.send_signal(number)

    def rank_processes(self) -> list[psutil.Process]:
        """Return the processes of the ranks that run, in no order."""
        running = [psutil.Process(process.pid) for process in self.processes if process.poll() is None]
        if len(running) != 1 or not LAUNCHER_MODULES.intersection(running[0].cmdline()):
            return running
        started = running[0].children()
        return [child for child in started if len(started) == 1 or "RANK" in child.environ()]

    def commands(self) -> list[str]:
        """Return the command lines of all that runs."""
        found = []
        for member in self._members():
            with contextlib.suppress(psutil.Error):  # it has ended since
                found.append(" ".join(member.cmdline()))
        return found

    def _members(self) -> list[psutil.Process]:
        # A fork that has just begun shows the environment of what it was forked from.
        started = {process.pid for process in self.processes if process.poll() is None}
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_member = process.pid in started or process.environ().get(MARK) == self._mark
                if is_member and process.status() != psutil.STATUS_ZOMBIE:
                    members.append(process)
        return members

    def _command(self) -> str:
        return " ".join(self._first)


class Fork:
    """A process that `preloaded.py` forked, with what `RankGroup` uses of `subprocess.Popen`."""

    def __init__(self, command: Sequence[str], pid: int, report: int) -> None:
        """Take its number, and the pipe through which it is told how it ended."""
        self.args, self.pid, self.returncode = list(command), pid, None
        self._report = report

    def poll(self) -> int | None:
        """Return the exit code, minus the signal's number where one ended it; None while it runs."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit code."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Signal the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout)[0]:
            told = os.read(self._report, 64)
            os.close(self._report)
            assert told, "the process that forks ranks has died"
            self.returncode = int(json.loads(told))
        return self.returncode


def start_process(
    command: Sequence[str], environment: Mapping[str, str], cwd: Path | str, output: int
) -> "subprocess.Popen[bytes] | Fork":
    """Start a command in a session of its own, as a fork where that comes to the same."""
    if PRELOAD and may_be_forked(command, environment, cwd):
        return fork(command, environment, cwd, output)
    return subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def may_be_forked(command: Sequence[str], environment: Mapping[str, str], cwd: Path | str) -> bool:
    """Tell whether a fresh interpreter would find what the one that forks has found.

    It would not where a variable that is read early differs, or where PYTHONPATH puts another module in the place of
    one that has been imported.
    """
    first = next((part for part in command[1:] if part not in ("-u", "-P")), "")
    is_python = command[0] == sys.executable and (first == "-m" or first.endswith(".py"))
    if not is_python or LAUNCHER_MODULES.intersection(command[:3]):
        return False
    base = forkers().environment
    differing = {name for name in base.keys() | environment.keys() if base.get(name) != environment.get(name)}
    if any(not name.startswith(READ_LATE) for name in differing - READ_LATE_TOO - LEFT_BY_IMPORTS):
        return False
    imported = ({*FORKERS["deepspeed"]} - {preloaded.STAND_INS}) | {"data", "models"}
    taken = {name.split(".")[0] for name in imported} | {"sitecustomize", "usercustomize"}
    searched = Path(cwd) if first == "-m" else Path(cwd, first).parent
    search_path = environment.get("PYTHONPATH", "").split(os.pathsep)
    folders = [searched, *(Path(part) for part in search_path if part)]
    return not any(
        taken & {path.stem for path in folder.iterdir()}
        for folder in folders
        if folder.is_dir() and folder.resolve() not in (ROOT, FORKED_RANKS)
    )


class Forkers(NamedTuple):
    """Processes that fork: one of each kind, which all that tests at the same time share."""

    folder: Path
    """Of the sockets at which they are asked."""
    environment: dict[str, str]
    """What they began with."""


def forker_for(environment: Mapping[str, str]) -> str:
    """Return the kind of what forks a rank: one that has imported DeepSpeed where the rank will."""
    return "deepspeed" if environment.get("ACCELERATE_USE_DEEPSPEED") == "true" else "plain"


@contextlib.contextmanager
def started_forkers() -> Iterator[Path]:
    """Start what forks, which imports when it is first asked, and end it with the block or with this process."""
    environment = cpu_environment()
    environment.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory(prefix="cellphase_forkers_") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "environment.json").write_text(json.dumps(environment))
        for kind, modules in FORKERS.items():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
                listener.bind(str(folder / kind))
                listener.listen()
                process = subprocess.Popen(
                    [sys.executable, preloaded.__file__, str(listener.fileno()), *modules],
                    env={**environment, preloaded.ROOM: "x" * preloaded.ROOM_BYTES},
                    stdin=subprocess.PIPE,  # closes when this process ends, however it does
                    pass_fds=[listener.fileno()],
                )
            stack.enter_context(process)
        yield folder


@functools.cache
def forkers() -> Forkers:
    """Return those that the process which began the tests has started, or start some for this process alone."""
    folder = os.environ.get(FORKERS_AT)
    if folder is None:
        stack = contextlib.ExitStack()
        atexit.register(stack.close)
        folder = stack.enter_context(started_forkers())
    return Forkers(Path(folder), json.loads(Path(folder, "environment.json").read_text()))


@functools.cache
def channel_to(kind: str) -> socket.socket:
    """Connect to what forks."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.connect(str(forkers().folder / kind))
    atexit.register(channel.close)
    return channel


def fork(
    command: Sequence[str],
    environment: Mapping[str, str],
    cwd: Path | str,
    output: int,
    kind: str | None = None,
) -> Fork:
    """Fork what `command`, a `python` with arguments, would start; the kind is that of a rank, if none is named."""
    request = {"arguments": list(command[1:]), "environment": dict(environment), "cwd": str(cwd)}
    report, reports = os.pipe()
    channel = channel_to(kind or forker_for(environment))
    with open("/proc/self/ns/net", "rb") as network:
        socket.send_fds(channel, [json.dumps(request).encode()], [output, reports, network.fileno()])
    os.close(reports)
    answer = channel.recv(8)
    assert answer, "the process that forks ranks could not be started"
    return Fork(command, int.from_bytes(answer, "little"), report)


def run_as_fork(
    command: Sequence[str], *, env: Mapping[str, str], **_: object
) -> subprocess.CompletedProcess[str]:
    """Stand for `subprocess.run` where a program starts `python -P -m MODULE`, as a fork that has imported torch.

    Its PYTHONPATH is this process's whole search path, on which a fork finds what it has imported: `may_be_forked`,
    which looks for other modules of the same names, is not asked.
    """
    with tempfile.TemporaryFile() as output:
        process = fork(command, env, os.getcwd(), output.fileno())
        code = process.wait(120)
        output.seek(0)
        said = output.read().decode(errors="replace")
    return subprocess.CompletedProcess(command, code, stdout=said, stderr=said)


def scoring_as_fork(
    command: Sequence[str], *, env: Mapping[str, str], stdout: IO[bytes], **_: object
) -> Fork:
    """Stand for `subprocess.Popen` where a run starts `python -P -m trainer.scoring.worker ... PARENT`.

    It ends with the process that forks, not with the run.
    """
    return fork([*command[:-1], preloaded.PARENT], env, os.getcwd(), stdout.fileno(), "scoring")


def rank_as_fork(
    args: Sequence[str], *, env: Mapping[str, str], stdout: IO[bytes] | None = None, **_: object
) -> "subprocess.Popen[bytes] | Fork":
    """Stand for `subprocess.Popen` where a launcher, or a command of ours, starts a rank in a session of its own."""
    return start_process(args, env, os.getcwd(), 1 if stdout is None else stdout.fileno())


def with_forked_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a launcher whose ranks shall be forks."""
    search_path = [str(FORKED_RANKS), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(search_path)} if PRELOAD else {**environment}


@contextlib.contextmanager
def programs_as_forks() -> Iterator[None]:
    """Let commands of ours start their own programs as forks in this process, which saves the imports."""
    stand_ins = {
        "trainer.export": {"run": run_as_fork},
        "trainer.launch": {"Popen": rank_as_fork},
        "trainer.proofs": {"Popen": rank_as_fork},
        "trainer.scoring_queue": {"Popen": scoring_as_fork},
    }
    with contextlib.ExitStack() as stack:
        for name, replaced in stand_ins.items() if PRELOAD else ():
            names = {**vars(subprocess), **replaced}
            stack.enter_context(mock.patch(f"{name}.subprocess", SimpleNamespace(**names)))
        yield


@contextlib.contextmanager
def runs_without_picture() -> Iterator[None]:
    """Let the runs of this process end without the picture of their report.

    Drawing it takes as long as a tiny training, and cannot fail one.
    """
    build, report = (importlib.import_module(f"trainer.{name}") for name in ("build", "report"))
    write = build.report_at_end

    def write_without_picture(folder: Path) -> None:
        with mock.patch.object(report, "_draw", return_value=False):
            write(folder)

    with mock.patch.object(build, "report_at_end", write_without_picture):
        yield
