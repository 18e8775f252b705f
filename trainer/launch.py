"""The processes of a run: whether they are those that it is for, and those that a command starts itself."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from trainer import build, control, preemption, zero_config
from trainer.config.load import dump_yaml
from trainer.config.schema import RunConfig
from trainer.console import counted, notice
from trainer.errors import ConfigError, UserError
from trainer.exits import FAILED, INTERRUPTED, PREEMPTED, USER_MISTAKE

ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 60.0
"""How long the other ranks may go on after one has failed: they say themselves whom they miss."""
_POLL_SECONDS = 0.2


def run(config: RunConfig, *, dry_run: bool = False) -> int:
    """Carry out a run in this process, or in the ranks that it asks to be started; return the exit code.

    Raises:
        UserError, DataError: a mistake of the user's.
    """
    count = ranks_to_start(config)
    if count > 1:
        return start_ranks(config, count, dry_run=dry_run)
    check_launch(config)
    return build.run(config, dry_run=dry_run)


def is_launched() -> bool:
    """Tell whether a launcher started this process as a rank."""
    return "WORLD_SIZE" in os.environ or "LOCAL_RANK" in os.environ


def ranks_to_start(config: RunConfig) -> int:
    """Return the ranks that this process is to start; 0 where it is a rank itself.

    Raises:
        ConfigError: there are fewer GPUs than ranks.
    """
    if not config.launch.starts_processes or is_launched():
        return 0
    gpus = gpu_count(config)
    count = config.launch.num_processes or max(gpus, 1)
    if 0 < gpus < count:
        raise ConfigError(
            f"{count} processes were asked for (num_gpus, launch.num_processes), a GPU each, and this machine has "
            f"{counted(gpus, 'GPU')}; {_free()} takes as many as there are"
        )
    if gpus == 0 and count > 1:
        notice(f"this machine has 0 GPUs: {count} processes compute on the CPU")
    return count


def check_launch(config: RunConfig) -> None:
    """Refuse another number of processes, or another way to share the work, than the run is for.

    Raises:
        ConfigError: says how to start it.
    """
    launch, world_size = config.launch, int(os.environ.get("WORLD_SIZE", "1"))
    wanted, gpus = launch.num_processes, gpu_count(config)
    if launch.strategy == "ddp" and zero_config.is_asked_for():
        raise ConfigError(
            "the launcher asks for DeepSpeed, and this run for plain data parallelism (strategy: ddp); set "
            "training.strategy=auto (launch.strategy=any in a file with `datasets`), or launch without DeepSpeed"
        )
    if wanted is not None and wanted != world_size:
        raise ConfigError(
            f"this run is for {counted(wanted, 'process', 'processes')} (num_gpus, launch.num_processes), "
            f"and {world_size} {'was' if world_size == 1 else 'were'} started; this machine has "
            f"{counted(gpus, 'GPU')}. Start it with\n  {launch_command(wanted, gpus)}\nor {_free()} takes any number"
        )
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    if 0 < gpus < local:
        raise ConfigError(
            f"{local} processes were started on this machine, a GPU each, and it has {counted(gpus, 'GPU')}; start as "
            "many processes as there are GPUs"
        )
    # Ranks that a command has started need not say what it has said.
    if wanted is not None and gpus == 0 and not is_cpu_run(config) and not launch.starts_processes:
        notice(f"this machine has 0 GPUs: {_processes(world_size)} on the CPU")
    if wanted is None and gpus > 1 and not is_launched():
        notice(f"this machine has {gpus} GPUs, and the run takes one; all: {launch_command(gpus, gpus)}")


def launch_command(count: int, gpus: int) -> str:
    """Return the command that starts what this process was started with on so many ranks."""
    program, arguments = Path(sys.argv[0]), sys.argv[1:]
    is_module = program.name == "__main__.py" or program.stem == "cellphase"
    target = ["-m", "trainer"] if is_module else [sys.argv[0]]
    options = ["--num_processes", str(count)]
    if gpus == 0:
        # Accelerate starts several processes on the CPU only where a file tells it to.
        file = ROOT / "accelerate_configs" / "cpu_2_processes.yaml"
        relative = os.path.relpath(file)
        options = ["--config_file", str(file) if relative.startswith("..") else relative, *options]
    return shlex.join(["accelerate", "launch", *options, *target, *arguments])


def gpu_count(config: RunConfig) -> int:
    """Return the GPUs of this machine that the run may use."""
    return 0 if is_cpu_run(config) or not torch.cuda.is_available() else torch.cuda.device_count()


def is_cpu_run(config: RunConfig) -> bool:
    """Tell whether the run asks for the CPU."""
    return config.device == "cpu"


def start_ranks(config: RunConfig, count: int, *, dry_run: bool = False) -> int:
    """Start the ranks of a run on this machine, pass requests to end on to them, and return their exit code."""
    with _folder_of_ranks(config) as folder:
        command = [sys.executable, "-m", "trainer", "train", "--config", str(folder / "config.yaml")]
        command += ["--dry-run"] if dry_run else []
        search_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        common = {
            **os.environ,
            "PYTHONPATH": search_path,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            control.VARIABLE: str(folder),
        }
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(count):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(subprocess.Popen(command, env={**common, **own}))
            _wait(ranks, folder)
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
        accounts = [_account(folder, rank, process.returncode) for rank, process in enumerate(ranks)]
    folder_of_run = next((account[1] for account in accounts if account[1]), None)
    if folder_of_run is not None:
        control.note_run_folder(folder_of_run)
    return _agreed([code for code, _ in accounts])


@contextlib.contextmanager
def _folder_of_ranks(config: RunConfig) -> Iterator[Path]:
    """Make the folder through which this process and its ranks talk, with their configuration."""
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cellphase-ranks-")))
            (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"TMPDIR={os.environ.get('TMPDIR', '/tmp')} takes no files ({error.strerror}), and the processes of "
                "this machine need some there; make room, or set TMPDIR to a folder on a local disk"
            ) from error
        yield folder


def _wait(ranks: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Wait for the ranks' end; a request to end reaches all of them, and the end of one ends the wait for others."""
    failed_at: float | None = None
    is_told = False
    while any(process.poll() is None for process in ranks):
        try:
            time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:  # the terminal has told the ranks as well
            failed_at = failed_at or time.monotonic()
        if not is_told and (request := preemption.request()) is not None:
            is_told = True
            control.ask(folder, request)
            for process in ranks:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
        if failed_at is None and any(process.poll() not in (None, 0) for process in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            return


def _account(folder: Path, rank: int, returned: int) -> tuple[int, str | None]:
    """Return how a rank ended, by its own account where it left one, and its run folder."""
    with contextlib.suppress(OSError, ValueError):
        account = json.loads((folder / f"rank{rank}.exit.json").read_text())
        return int(account["exit_code"]), account["run_folder"]
    return (returned if returned >= 0 else FAILED), None


def _agreed(codes: list[int]) -> int:
    """Return one exit code for all ranks."""
    if all(code == codes[0] for code in codes):
        return codes[0]
    if set(codes) == {0, PREEMPTED}:  # the others were done while the first one still scored
        return PREEMPTED
    return next((code for code in (USER_MISTAKE, INTERRUPTED) if code in codes), FAILED)


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _processes(count: int) -> str:
    return "the process computes" if count == 1 else f"{count} processes compute"


def _free() -> str:
    return "training.num_gpus=null (launch.num_processes=null in a file with `datasets`)"
