"""Run folders, `<output_dir>/<run_name>_<timestamp>/`: who may write into one, and where a run goes on."""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from trainer import preemption
from trainer.atomicfile import replace_text
from trainer.checkpoint_folder import (
    MANIFEST,
    SUPERSEDED,
    OtherFormatError,
    checkpoint_step,
    find_newest,
    list_checkpoints,
    name_checkpoints,
    named_checkpoints,
    read_manifest,
    set_aside,
    unnamed_checkpoints,
    verify_checkpoint,
)
from trainer.config.schema import RunConfig
from trainer.distributed import Ranks
from trainer.errors import CheckpointError, UserError
from trainer.same_job import Choice, choose_run

_WEIGHTS_FILE_SUFFIXES = (".pt", ".pth", ".ckpt")
_MOST_LISTED = 8

SAME_FOLDER_SECONDS = 10.0
"""How long a rank waits to see what rank 0 has made in the run folder."""


@dataclass(frozen=True)
class ResumePlan:
    """Say what a run starts from."""

    kind: Literal["fresh", "run", "weights_file"]
    run_folder: Path | None = None
    """The folder that the run goes on in; None: it makes its own."""
    checkpoint: Path | None = None
    """A verified checkpoint folder of `run_folder`, or the file with weights."""
    skipped: tuple[str, ...] = ()
    """Newer checkpoints, or whole runs, that were passed over, and why."""
    lease: "RunLease | None" = None
    """Held since before the checkpoints of `run_folder` were looked at, where that was asked for."""


def create_run_folder(output_dir: str | Path, run_name: str, now: datetime | None = None) -> Path:
    """Make the folder of a new run; a second run of the same second gets the suffix `_2`."""
    stem = f"{run_name}_{(now or datetime.now()).strftime('%Y%m%d_%H%M%S')}"
    if not run_name or Path(stem).name != stem:
        raise UserError(f"run_name is {run_name!r}; it is the start of a folder's name, without '/'")
    folder, number = Path(output_dir) / stem, 2
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError as error:
            if not folder.parent.is_dir():
                raise UserError(f"output_dir: {error.filename} exists and is not a folder") from error
            folder, number = folder.with_name(f"{stem}_{number}"), number + 1
        except OSError as error:
            raise UserError(f"output_dir: cannot make the run folder {folder} ({error.strerror})") from error


def find_runs(output_dir: str | Path, run_name: str) -> list[Path]:
    """Return the run folders of exactly this run name, oldest first."""
    pattern = re.compile(re.escape(run_name) + r"_([0-9]{8}_[0-9]{6})(?:_([0-9]+))?")
    found = []
    try:
        for entry in os.scandir(output_dir):
            match = pattern.fullmatch(entry.name)
            if match and entry.is_dir():
                found.append((match[1], int(match[2] or 1), Path(entry.path)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder for _, _, folder in sorted(found)]


def resolve_resume(
    resume_from: str | None,
    output_dir: str | Path,
    run_name: str,
    *,
    hold: bool = False,
    job: RunConfig | None = None,
) -> ResumePlan:
    """Find what `resume_from` names and verify it.

    `latest` is the newest checkpoint of the run of this name that was saved last. `auto` is the same, but
    goes back over damaged checkpoints with an account, and is a fresh start where there is no checkpoint, or where
    none of the runs has done, or begun, the `job` (see same_job.py).

    With `hold` the lease of the run folder is taken first: a job that is about to end could otherwise still complete
    a checkpoint that is newer than the one found here. A run of this name that has saved nothing yet and is still
    being trained is no fresh start either: the same job was given twice. A save that was killed when it lacked its
    name alone gets it.

    Raises:
        CheckpointError: it is not there or damaged; a damaged checkpoint is never a fresh start.
        UserError: another process writes into the run folder (with `hold`).
    """
    if resume_from is None:
        return ResumePlan("fresh")
    if resume_from in ("latest", "auto"):
        runs = find_runs(output_dir, run_name)
        if hold:
            _complete(runs)
        saved = sorted((run for run in runs if named_checkpoints(run)), key=_last_saved, reverse=True)
        choice = Choice(saved[0] if saved else None)
        if saved and resume_from == "auto" and job is not None:
            choice = choose_run(job, saved, [run for run in runs if run not in saved])
        if choice.run is not None:
            return _newest_of_run(choice.run, resume_from, hold)
        if resume_from == "auto":
            if hold:
                _refuse_running([run for run in runs if run not in saved])
            return ResumePlan("fresh", skipped=choice.said)
        raise CheckpointError(_nothing_to_resume(Path(output_dir), run_name))
    path = Path(resume_from).expanduser()
    if hold:
        _complete([path if checkpoint_step(path) is None else path.parent])
    if not path.exists():
        raise CheckpointError(
            f"resume_from: {resume_from} does not exist; give latest, auto, or the path of a run folder, of "
            f"a checkpoint folder or of a .pt file. {_what_is_there(Path(output_dir))}"
        )
    path = path.resolve()
    if path.is_file():
        return _weights_file(path)
    if checkpoint_step(path) is not None or (path / MANIFEST).is_file():
        return _named_checkpoint(path, hold)
    return _newest_of_run(path, resume_from, hold)


def adopt(run_folder: str | Path, checkpoint: str | Path) -> list[Path]:
    """Make `checkpoint` the newest of its run: newer ones, and a copy of the metrics, go to `superseded/`.

    Called by the process that holds the lease, before anything is written. Returns the new places.
    """
    run_folder, checkpoint = Path(run_folder), Path(checkpoint)
    step = checkpoint_step(checkpoint)
    if step is None or checkpoint.resolve().parent != run_folder.resolve():
        raise ValueError(f"{checkpoint} is not a checkpoint of {run_folder}")
    newer = [folder for folder in named_checkpoints(run_folder) if (checkpoint_step(folder) or 0) > step]
    metrics = run_folder / "metrics.jsonl"
    if newer and metrics.exists():
        shelf = run_folder / SUPERSEDED
        shelf.mkdir(exist_ok=True)
        stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
        shutil.copy2(metrics, shelf / f"metrics_until_{newer[-1].name}_{stamp}.jsonl")
    moved = [set_aside(folder) for folder in reversed(newer)]
    replace_text(run_folder / "latest", f"{checkpoint.name}\n")
    return moved


def write_exit_status(run_folder: str | Path, code: int, reason: str) -> dict[str, Any]:
    """Write `exit_status.json`: how a run ended, and when its process began, for scripts and for people.

    Launch scripts learn from it what launchers' exit codes do not tell. Returns what it says.
    """
    now, duration = datetime.now(UTC), preemption.running_seconds()
    status = {
        "exit_code": code,
        "reason": reason,
        "started": (now - timedelta(seconds=duration)).isoformat(),
        "time": now.isoformat(),
        "duration_seconds": round(duration, 1),
    }
    replace_text(Path(run_folder) / "exit_status.json", json.dumps(status) + "\n")
    return status


def check_same_folder(ranks: Ranks, folder: Path) -> None:
    """Refuse ranks that do not see the run folder of rank 0: their parts of a checkpoint would lie elsewhere.

    Raises:
        UserError: on every rank, naming those that do not see it.
    """
    if ranks.count == 1:
        return
    mark = folder / f".seen_{ranks.broadcast(secrets.token_hex(8))}"
    if ranks.is_main:
        mark.touch()
    ranks.barrier()
    # A network file system may show a new file seconds later.
    deadline = time.monotonic() + SAME_FOLDER_SECONDS
    while not (is_seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    hosts = ranks.gather_text(socket.gethostname() + ("" if is_seen else " does not see it"))
    if ranks.is_main:
        mark.unlink()
    blind = [f"rank {rank} on {host.split()[0]}" for rank, host in enumerate(hosts) if " " in host]
    if blind:
        raise UserError(
            f"{', '.join(blind[:8])}{' and others' if len(blind) > 8 else ''} cannot see the run folder {folder} that "
            f"rank 0 on {hosts[0]} has made; all ranks need the same file system there: choose an output_dir on one "
            "that every node mounts"
        )


class RunLease:
    """Hold the right to write into a run folder until `release`, or until the process dies in whatever way.

    The kernel keeps the lock and frees it with the process. Child processes do not inherit it, so a worker
    that outlives its parent does not block the next start.
    """

    def __init__(self, run_folder: str | Path) -> None:
        """Take the lease.

        Raises:
            UserError: another process has it, the folder cannot be locked, or a link in it leads elsewhere.
        """
        self.path = Path(run_folder) / "run.lock"
        _refuse_links(Path(run_folder))
        self._process = os.getpid()
        self._descriptor: int | None = _lock(self.path)
        _held_descriptors.add(self._descriptor)
        holder = {
            "host": socket.gethostname(),
            "pid": self._process,
            "started": datetime.now(UTC).isoformat(),
        }
        # It is for people alone, and a full disk has no room for it.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def __enter__(self) -> Self:
        """Return the lease."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lease back."""
        self.release()

    def release(self) -> None:
        """Give the lease back; further calls, and calls in a forked child, do nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None or os.getpid() != self._process:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        _held_descriptors.discard(descriptor)
        os.close(descriptor)


_held_descriptors: set[int] = set()


def _close_in_child() -> None:
    # A lock of flock lives until every copy of its descriptor is closed, and fork makes copies.
    for descriptor in _held_descriptors:
        os.close(descriptor)
    _held_descriptors.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _refuse_links(run_folder: Path) -> None:
    """Refuse a run folder in which a file is a link: writing to it would change a file somewhere else.

    Such a folder may have come from anywhere, and a run that goes on empties, replaces and appends to its files.
    """
    for folder in (run_folder, run_folder / "benchmarks"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            links = sorted(entry.name for entry in os.scandir(folder) if entry.is_symlink())
            links = [name for name in links if checkpoint_step(name) is None]
            if links:
                raise UserError(
                    f"{folder}: {_listed(links)} {'is a link' if len(links) == 1 else 'are links'}, and a run would "
                    "write to what lies behind; put the files themselves there, or start a new run (init_from takes "
                    "the weights)"
                )


def _lock(path: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"{path.parent}: the run folder cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(_occupied(path)) from error
            raise UserError(
                f"{path}: this file system does not lock files ({error.strerror}), so two jobs could write "
                "into one run folder unnoticed; choose an output_dir on one that does"
            ) from error
        os.close(descriptor)  # somebody deleted the file meanwhile: the lock is on a file that nobody sees


def _complete(runs: list[Path]) -> None:
    """Give a name to the saves of these runs that were killed just before they had one."""
    for run in runs:
        if unnamed_checkpoints(run):
            with RunLease(run):
                name_checkpoints(run)


def _refuse_running(runs: list[Path]) -> None:
    """Refuse to go on where another process trains one of these runs; nothing is written."""
    for run in runs:
        with contextlib.suppress(OSError), open(run / "run.lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(_occupied(run / "run.lock")) from error


def _occupied(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        who = f"process {holder['pid']} on {holder['host']}, running since {holder['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"{path.parent} is in use by {who}; two jobs on one run folder would mix their checkpoints. "
        "Stop that one, or start a new run"
    )


def _newest_of_run(run_folder: Path, resume_from: str, hold: bool) -> ResumePlan:
    with contextlib.ExitStack() as held:
        lease = held.enter_context(RunLease(run_folder)) if hold and named_checkpoints(run_folder) else None
        try:
            checkpoint, skipped = find_newest(run_folder, fall_back=resume_from == "auto")
        except OtherFormatError as error:
            raise CheckpointError(f"resume_from: {resume_from}: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(
                f"resume_from: {resume_from}: {error}. Name an earlier checkpoint, or give auto to go on from "
                "the last good one"
            ) from error
        if checkpoint is not None:
            held.pop_all()
            return ResumePlan("run", run_folder, checkpoint, tuple(skipped), lease)
    if skipped:
        raise CheckpointError(
            f"resume_from: {resume_from}: no checkpoint of {run_folder} can be used: {'; '.join(skipped)}. "
            "resume_from: null starts afresh"
        )
    found = sorted(entry.name for entry in os.scandir(run_folder))
    raise CheckpointError(
        f"resume_from: {resume_from} holds no checkpoint (it is neither a run folder with one nor a "
        f"checkpoint folder); there is {_listed(found)} in it"
    )


def _named_checkpoint(folder: Path, hold: bool) -> ResumePlan:
    if folder.parent.name == SUPERSEDED:
        raise CheckpointError(
            f"resume_from: {folder} was set aside when its run went on from an earlier checkpoint; move it "
            f"back into {folder.parent.parent} to go on from it"
        )
    with contextlib.ExitStack() as held:
        lease = held.enter_context(RunLease(folder.parent)) if hold else None
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            others = [other.name for other in list_checkpoints(folder.parent) if other != folder]
            raise CheckpointError(f"resume_from: {error}. Beside it: {_listed(others)}") from error
        held.pop_all()
    return ResumePlan("run", folder.parent, folder, lease=lease)


def _weights_file(path: Path) -> ResumePlan:
    if path.suffix not in _WEIGHTS_FILE_SUFFIXES:
        raise CheckpointError(
            f"resume_from: {path} is a file; give a run folder, a checkpoint folder, or a file that ends "
            f"with {', '.join(_WEIGHTS_FILE_SUFFIXES)}"
        )
    return ResumePlan("weights_file", None, path)


def _last_saved(run_folder: Path) -> tuple[str, Path]:
    """Return when the newest checkpoint of a run was written."""
    newest = named_checkpoints(run_folder)[-1]
    try:
        return read_manifest(newest).get("time", ""), run_folder
    except CheckpointError:
        return datetime.fromtimestamp(newest.stat().st_mtime, UTC).isoformat(), run_folder


def _nothing_to_resume(output_dir: Path, run_name: str) -> str:
    runs = [run.name for run in find_runs(output_dir, run_name)]
    if runs:
        where = f"the run folders {_listed(runs)} in {output_dir.absolute()} hold none"
    else:
        where = _what_is_there(output_dir)
    return f"resume_from: latest: there is no complete checkpoint of run {run_name!r}: {where}"


def _what_is_there(output_dir: Path) -> str:
    where = output_dir.absolute()
    if not output_dir.is_dir():
        return f"output_dir {where} does not exist"
    return f"output_dir {where} holds {_listed(sorted(entry.name for entry in os.scandir(output_dir)))}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(names[:_MOST_LISTED]) + more if names else "nothing"
