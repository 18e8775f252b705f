"""What a proof does: start a training as the user would, kill it at a step, and say where two runs differ."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from trainer import control
from trainer.checkpoint_folder import checkpoint_step, list_checkpoints, open_checkpoint
from trainer.config.load import dump_yaml
from trainer.config.schema import RunConfig
from trainer.exits import USER_MISTAKE
from trainer.launch import ROOT, free_port
from trainer.metrics_file import MetricValue, comparable, decode_record, read_metrics
from trainer.shards import has_averages, open_tensors, whole_weights

_POLL_SECONDS = 0.005
_TAIL_BYTES = 1 << 16
_SAID_LINES = 12
_GRACE_SECONDS = 20.0
"""How long the other ranks may go on after one has failed."""

_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_CAUSES_FIRST = (
    "kind",
    "global_step",
    "phase",
    "phase_step",
    "epoch",
    "cells",
    "tokens",
    "padded_tokens",
    "lr",
)
"""Fields in the order in which one brings about the next: other cells give another loss, never the reverse."""


class RunFailedError(Exception):
    """Report a process that did not end as it should have, with what it said last."""

    def __init__(self, what: str, code: int | None, output: str) -> None:
        """Remember the exit code (None: it was still running) and the output."""
        self.code = code
        self.said = _last_words(output)
        super().__init__(f"{what}: {self.said}" if self.said else what)

    @property
    def is_mistake(self) -> bool:
        """Whether the process said that the user made a mistake."""
        return self.code == USER_MISTAKE


class Processes:
    """Processes of one command, one a rank, each in a session of its own; leaving the context kills them."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]], log: Path) -> None:
        """Start one process for each environment; all write into one file."""
        self.log = log
        self._processes: list[subprocess.Popen[bytes]] = []
        with open(log, "wb") as file:
            try:
                for environment in environments:
                    self._processes.append(
                        subprocess.Popen(
                            command,
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                        )
                    )
            except BaseException:
                self.kill()
                raise

    def __enter__(self) -> "Processes":
        """Return the running processes."""
        return self

    def __exit__(self, *error: object) -> None:
        """Kill what still runs."""
        self.kill()

    def output(self) -> str:
        """Return what has been written so far, of all ranks."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_running(self) -> bool:
        """Tell whether any process has not ended."""
        return any(process.poll() is None for process in self._processes)

    def wait(self, what: str, seconds: float) -> None:
        """Wait until all have ended well.

        Raises:
            RunFailedError: one failed, or the time is up; none runs then.
        """
        self.wait_until(lambda: False, what, seconds)

    def wait_until(self, is_reached: Callable[[], bool], what: str, seconds: float) -> bool:
        """Wait until something is reached, and tell whether it was; False: all ended well without it.

        Raises:
            RunFailedError: one failed, or the time is up; none runs then.
        """
        deadline, failed, limit = time.monotonic() + seconds, None, f"did not end within {seconds:.0f} s"
        while True:
            is_running = self.is_running()
            if is_reached():
                return True
            code = next((process.returncode for process in self._processes if process.returncode), None)
            if code is not None and failed is None:
                failed, limit = code, f"failed with exit code {code}"
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            if not is_running:
                if failed is not None:
                    raise RunFailedError(f"{what} {limit}", failed, self.output())
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise RunFailedError(f"{what} {limit}", failed, self.output())
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """End all with SIGKILL, the workers that they started too, and wait until they are gone."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()


def start_training(
    config: RunConfig,
    folder: Path,
    name: str,
    num_ranks: int = 1,
    variables: Mapping[str, str] | None = None,
) -> Processes:
    """Start `python -m trainer train` with a configuration, on some ranks of this machine.

    Args:
        config: the configuration; it is written to `folder`/`name`.yaml.
        folder: where it goes, and `name`.log with what the processes say.
        name: of the two files.
        num_ranks: how many processes.
        variables: what their environment holds beside this process's.
    """
    path = folder / f"{name}.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    # Not from the current folder: a user's data/ or models/ there would hide ours. The command itself looks there last.
    command = [sys.executable, "-P", "-m", "trainer", "train", "--config", str(path)]
    environments = [{**each, **(variables or {})} for each in rank_environments(num_ranks)]
    return Processes(command, environments, folder / f"{name}.log")


def rank_environments(num_ranks: int) -> list[dict[str, str]]:
    """Return the environment of each rank; a single process gets no launcher's variables."""
    common = child_environment()
    if num_ranks == 1:
        return [common]
    common.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // num_ranks)))
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    return [
        {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)}
        for rank in range(num_ranks)
    ]


def child_environment() -> dict[str, str]:
    """Return this process's environment with the way to our packages, and without what a launcher says."""
    hidden = (*_LAUNCHER_VARIABLES, control.VARIABLE)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    search_path = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    return {**environment, "PYTHONPATH": search_path, "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP leave as Ctrl-C does, so that what was started is killed and folders are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    wanted = [
        number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN
    ]
    before = {number: signal.signal(number, leave) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_folder_of(output_dir: Path) -> Path | None:
    """Return the run folder in a folder that holds one run; None: it is not made yet."""
    with contextlib.suppress(FileNotFoundError):
        return next((path for path in output_dir.iterdir() if path.is_dir()), None)
    return None


def newest_step(run_folder: Path | None) -> int | None:
    """Return the step of the newest complete checkpoint."""
    found = [] if run_folder is None else list_checkpoints(run_folder)
    return checkpoint_step(found[-1]) if found else None


def last_recorded_step(run_folder: Path | None) -> int:
    """Return the last optimizer step of which there is a record; 0 where there is none."""
    if run_folder is None:
        return 0
    try:
        with open(run_folder / "metrics.jsonl", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            record = decode_record(line)
            if record["kind"] == "train" and isinstance(record["global_step"], int):
                return record["global_step"]
    return 0


@dataclass(frozen=True)
class Difference:
    """Where two runs differ first."""

    step: int | None
    """None: in the weights at the end."""
    place: str
    """Kind of record and phase, or the weight's name."""
    field: str
    expected: Any
    got: Any
    others: tuple[str, ...] = ()
    """What else differs there."""

    def __str__(self) -> str:
        """Say where, and both values."""
        where = self.place if self.step is None else f"step {self.step} ({self.place})"
        more = f"; there differ too: {', '.join(self.others)}" if self.others else ""
        return f"{where}, {self.field}: {_shown(self.expected)} against {_shown(self.got)}{more}"


def records_until(run_folder: Path, step: int | None = None) -> list[dict[str, MetricValue]]:
    """Return a run's records up to a step, without what depends on the clock."""
    records = map(comparable, read_metrics(run_folder / "metrics.jsonl"))
    return [record for record in records if step is None or _step_of(record) <= step]


def compare_records(
    expected: Sequence[Mapping[str, MetricValue]],
    got: Sequence[Mapping[str, MetricValue]],
    is_same: Callable[[Any, Any], bool] = lambda one, two: one == two,
) -> Difference | None:
    """Return the first difference of two runs' records; None: there is none.

    Args:
        expected: the records of the run that was left alone.
        got: those of the other one.
        is_same: what counts as equal, of two values.
    """
    for one, two in zip(expected, got, strict=False):
        names = sorted({**one, **two}, key=_rank_of_field)
        wrong = [name for name in names if not is_same(one.get(name), two.get(name))]
        if wrong:
            first = wrong[0]
            return Difference(
                _step_of(one), _place(one), first, one.get(first), two.get(first), tuple(wrong[1:])
            )
    if len(expected) == len(got):
        return None
    longer = expected if len(expected) > len(got) else got
    record = longer[min(len(expected), len(got))]
    values = ("a record", "none") if longer is expected else ("none", "a record")
    return Difference(_step_of(record), _place(record), "the record", *values)


def compare_weights(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> Difference | None:
    """Return the first tensor that is not the same bit for bit, and how many are not; None: there is none."""
    wrong = [
        name
        for name in sorted(expected.keys() | got.keys())
        if name not in expected or name not in got or not _is_equal(expected[name], got[name])
    ]
    if not wrong:
        return None
    one, two = expected.get(wrong[0]), got.get(wrong[0])
    others = (f"{len(wrong) - 1} more of {len(expected)} tensors",) if wrong[1:] else ()
    if one is None or two is None or one.shape != two.shape or one.dtype != two.dtype:
        return Difference(None, "weights", wrong[0], _kind(one), _kind(two), others)
    place = int((_bytes(one) != _bytes(two)).reshape(one.numel(), -1).any(dim=1).nonzero()[0])
    values = (float(one.flatten()[place]), float(two.flatten()[place]))
    return Difference(None, "weights", f"{wrong[0]}[{place}]", *values, others)


def weights_at(run_folder: Path, step: int) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, every file verified, and their moving averages where it has some."""
    saved = open_checkpoint(next(p for p in list_checkpoints(run_folder) if checkpoint_step(p) == step))
    tensors = open_tensors(saved)
    weights = whole_weights(tensors, averaged=False)
    if has_averages(tensors):
        averages = whole_weights(tensors, averaged=True)
        weights = weights | {f"average of {name}": tensor for name, tensor in averages.items()}
    return weights


def _is_equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(_bytes(one), _bytes(two))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _rank_of_field(name: str) -> tuple[int, str]:
    if name.startswith("lr/"):
        name = "lr"
    return (_CAUSES_FIRST.index(name), name) if name in _CAUSES_FIRST else (len(_CAUSES_FIRST), name)


def _step_of(record: Mapping[str, MetricValue]) -> int:
    step = record["global_step"]
    assert isinstance(step, int)
    return step


def _place(record: Mapping[str, MetricValue]) -> str:
    return f"{record['kind']}, phase '{record['phase']}'"


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, float | int) else "none" if value is None else str(value)


def _last_words(output: str) -> str:
    """Return the message with which a process ended, or its last lines."""
    lines = [line for line in output.strip().splitlines() if line.strip()]
    for number in reversed(range(len(lines))):
        if lines[number].startswith("error"):
            return "\n".join(lines[number : number + _SAID_LINES]).partition(": ")[2]
    return "\n".join(lines[-_SAID_LINES:])
