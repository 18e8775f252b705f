"""Write checkpoints: all ranks in the background, complete or not there, without training's collectives.

A save goes into `.checkpoint_<step>.<attempt>-<number>.tmp/`. Each rank writes and flushes its files there,
then leaves `rank<rank>.done.json`. When all have, rank 0 checks the sizes, writes `manifest.json`, renames
the folder to `checkpoint_<step>`, points `latest` at it and deletes what retention lets go, and before that the
checkpoint of the same step that it replaces. A folder that lacks its name alone is given it by the next start
(checkpoint_folder.name_checkpoints), so that a kill between two renames loses nothing. The other ranks
wait for the rename: a rank that left earlier would make a launcher end the rest before the last checkpoint
is complete. A rank that fails leaves `rank<rank>.failed.json`, and every rank raises.

The attempt is a token that the ranks of one start of the program share. Files that an earlier start left
behind, or still writes, stand in folders of another name and cannot get into a new checkpoint.
"""

import errno
import json
import math
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from trainer.atomicfile import replace_text, sync_folder
from trainer.checkpoint_folder import (
    MANIFEST,
    checkpoint_name,
    encode_manifest,
    is_file_name,
    list_checkpoints,
    rank_file_name,
    read_manifest,
)
from trainer.errors import CheckpointError, UserError
from trainer.retention import Retention, delete_expired
from trainer.statefile import BinarySink, FileFacts, HashingSink, Tree, to_host, write_tree

_Found = TypeVar("_Found")
_TEMPORARY = re.compile(r"\.checkpoint_[0-9]+\.(?P<attempt>[A-Za-z0-9]+)-(?P<number>[0-9]+)(\.deleted)?\.tmp")
_HALF_WRITTEN_HINT = re.compile(r"\.latest\.[0-9a-f]+\.tmp")
_FAILED_NOTE = re.compile(r"rank[0-9]+\.failed\.json")
_STOP_SECONDS = 10.0


class WriteFacts(NamedTuple):
    """Describe what this rank wrote for its last save."""

    step: int
    num_bytes: int
    seconds: float
    """From the start of the write until the checkpoint was complete on all ranks."""


@dataclass(frozen=True)
class _Save:
    step: int
    number: int
    files: Mapping[str, Tree]
    texts: Mapping[str, str]
    metric: float | None
    summary: Mapping[str, Any]


class _StoppedError(Exception):
    """The process leaves before its save is complete."""


class _PeerFailedError(CheckpointError):
    """Another rank has failed, and has left the reason for all."""


class CheckpointWriter:
    """Write the checkpoints of one run; every rank has one and makes the same calls in the same order.

    An error in the background is raised by the next `save`, `wait` or `close`; the checkpoints that were
    complete before are untouched by it. Leaving a `with` block by an exception gives up the save in flight.
    """

    def __init__(
        self,
        run_folder: str | Path,
        *,
        rank: int,
        world_size: int,
        attempt: str,
        retention: Retention | None = None,
        asynchronous: bool = True,
        timeout_seconds: float = 1800.0,
    ) -> None:
        """Prepare the run folder.

        Args:
            run_folder: Where the checkpoints go; the same folder for all ranks. Rank 0 holds its lease.
            rank: Index of this rank.
            world_size: Number of ranks.
            attempt: Letters and digits, the same on all ranks and new for every start of the program.
            retention: Which checkpoints stay; None keeps all.
            asynchronous: Write in a thread; otherwise `save` returns when the checkpoint is complete.
            timeout_seconds: For how long nothing may be written before rank 0, done with its own files,
                gives up the others.
        """
        if not re.fullmatch(r"[A-Za-z0-9]+", attempt):
            raise ValueError(f"attempt is {attempt!r}; it consists of letters and digits")
        self.run_folder = Path(run_folder)
        self.rank = rank
        self.world_size = world_size
        self.retention = retention or Retention()
        self.asynchronous = asynchronous
        self.timeout_seconds = timeout_seconds
        self.stall_seconds = 0.0
        """For how long the last `save` kept training waiting."""
        self.total_stall_seconds = 0.0
        """For how long all saves together did."""
        self.last_write: WriteFacts | None = None
        """What the last complete save wrote; None before."""
        self._attempt = attempt
        self._number = 0
        self._error: Exception | None = None
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        # Runs at the end of the interpreter too: a thread torn down inside a write could abort the process.
        self._finalizer = weakref.finalize(self, _stop, self._stopping, self._threads)
        if rank == 0:
            try:
                self.run_folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
            except OSError as error:
                raise self._explain(error, "the run folder cannot be prepared") from error

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Complete the save in flight, or give it up if the block ended by an exception."""
        if kind is None:
            self.close()
        else:
            self.abandon()

    def save(
        self,
        step: int,
        rank_files: Mapping[str, Tree],
        shared_files: Mapping[str, Tree],
        *,
        metric: float | None = None,
        summary: Mapping[str, Any] | None = None,
        synchronous: bool = False,
    ) -> None:
        """Copy the state to host memory, and write it in the background once the previous save is complete.

        A checkpoint of the same step that exists is replaced, and deleted when the new one is on the disk.

        Args:
            step: Global step.
            rank_files: This rank's trees; `name` is written as `<name>.rank<rank>.safetensors`.
            shared_files: From rank 0 alone, empty on the others: a `str` is written as a text file of this
                name, a tree as a state file, whose name ends with `.safetensors`.
            metric: What retention ranks the checkpoint by; None or not finite: it does not take part.
            summary: Facts for people, as JSON values.
            synchronous: Return when the checkpoint is complete on all ranks.
        """
        started = time.monotonic()
        if self._stopping.is_set():
            raise ValueError("this writer is closed")
        try:
            try:
                self.wait()
            finally:
                # Only now: the thread of the save before goes by the number until it has ended.
                self._number += 1
            save = self._take(step, rank_files, shared_files, metric, summary or {})
        except Exception as error:
            with suppress(OSError):
                self._temporary(step).mkdir(exist_ok=True)
                self._leave(self._temporary(step), "failed", {"error": str(error)})
            raise
        if self.asynchronous and not synchronous:
            thread = threading.Thread(
                target=self._perform, args=(save,), name="checkpoint-writer", daemon=True
            )
            self._threads.append(thread)
            thread.start()
        else:
            self._perform(save)
            self._raise_error()
        self.stall_seconds = time.monotonic() - started
        self.total_stall_seconds += self.stall_seconds

    def wait(self) -> None:
        """Return when the save in flight is complete on all ranks; raise what went wrong with it."""
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._raise_error()

    def close(self) -> None:
        """Wait for the save in flight, and accept no more."""
        try:
            self.wait()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give up the save in flight within seconds, as when the program ends by an error; accept no more."""
        self._finalizer()

    def _take(
        self,
        step: int,
        rank_files: Mapping[str, Tree],
        shared_files: Mapping[str, Tree],
        metric: float | None,
        summary: Mapping[str, Any],
    ) -> _Save:
        if shared_files and self.rank != 0:
            raise ValueError(f"rank {self.rank} gives shared files {sorted(shared_files)}; rank 0 alone does")
        texts = {name: content for name, content in shared_files.items() if isinstance(content, str)}
        trees = {name: tree for name, tree in shared_files.items() if name not in texts}
        trees |= {rank_file_name(name, self.rank): tree for name, tree in rank_files.items()}
        wrong = [name for name in (*texts, *trees) if not is_file_name(name)]
        wrong += [name for name in trees if not name.endswith(".safetensors")]
        wrong += [name for name in texts if name.endswith(".safetensors")]
        if wrong or len(trees) != len(rank_files) + len(shared_files) - len(texts):
            raise ValueError(
                f"a checkpoint cannot hold files named {wrong or sorted(trees)}: names are plain ASCII and "
                "different, and those of trees, and of no text, end with .safetensors"
            )
        return _Save(
            step,
            self._number,
            {name: _host_copy(name, tree) for name, tree in trees.items()},
            texts,
            metric,
            _strict_json(summary),
        )

    def _perform(self, save: _Save) -> None:
        """Write this rank's part and see the checkpoint through; runs in the thread."""
        started = time.monotonic()
        folder = self._temporary(save.step)
        is_handed_over = False
        try:
            files = self._write(save, folder)
            self._leave(folder, "done", {"files": {name: facts._asdict() for name, facts in files.items()}})
            is_handed_over = self.rank != 0  # rank 0 may complete the checkpoint at any moment from here on
            if self.rank == 0:
                self._commit(save, folder)
            else:
                self._await_commit(save, folder)
            num_bytes = sum(facts.num_bytes for facts in files.values())
            self.last_write = WriteFacts(save.step, num_bytes, time.monotonic() - started)
        except Exception as error:  # carried to the training thread
            self._error = self._explain(error, f"saving {checkpoint_name(save.step)} failed")
            is_peer_failure = isinstance(error, _PeerFailedError)
            with suppress(OSError):
                if is_peer_failure or not is_handed_over:
                    for name in (*save.files, *save.texts, MANIFEST, self._note_name("done")):
                        (folder / name).unlink(missing_ok=True)  # makes room on a full disk
                if not is_peer_failure and not is_handed_over:
                    self._leave(folder, "failed", {"error": str(self._error)})

    def _write(self, save: _Save, folder: Path) -> dict[str, FileFacts]:
        folder.mkdir(exist_ok=True)
        written: dict[str, FileFacts] = {}
        for name, content in (*save.files.items(), *save.texts.items()):
            with open(folder / name, "xb") as file:
                sink = _StoppableSink(file, self._stopping)
                if name in save.texts:
                    sink.write(content.encode())
                else:
                    write_tree(sink, content)
                file.flush()
                os.fsync(file.fileno())
            written[name] = sink.facts()
        sync_folder(folder)
        return written

    def _commit(self, save: _Save, folder: Path) -> None:
        """Wait for all ranks, then make the folder a checkpoint."""
        notes = self._poll(self.timeout_seconds, folder, lambda: self._done_notes(folder))
        if notes is None:
            missing = ", ".join(str(rank) for rank in self._missing_ranks(folder))
            raise CheckpointError(
                f"{self.run_folder}: {checkpoint_name(save.step)} is given up: rank {missing} of "
                f"{self.world_size} did not finish its part, and nothing was written for "
                f"{self.timeout_seconds:g} s. Is it alive, and does it see the same file system?"
            )
        files = {name: FileFacts(**facts) for note in notes for name, facts in note["files"].items()}
        for name, facts in files.items():
            size = (folder / name).stat().st_size
            if size != facts.num_bytes:
                raise CheckpointError(f"{folder / name} has {size:,} bytes instead of {facts.num_bytes:,}")
        facts = {"summary": save.summary, "time": datetime.now(UTC).isoformat(), "save": self._identity}
        manifest = encode_manifest(save.step, self.world_size, files, save.metric, facts)
        replace_text(folder / MANIFEST, manifest)
        for rank in range(self.world_size):
            (folder / self._note_name("done", rank)).unlink()
        sync_folder(folder)
        final = self.run_folder / checkpoint_name(save.step)
        replaced = self._give_name(folder, final)
        sync_folder(self.run_folder)
        replace_text(self.run_folder / "latest", f"{final.name}\n")
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        delete_expired(self.run_folder, self.retention, save.step, self._identity)
        self._sweep()

    def _give_name(self, folder: Path, final: Path) -> Path | None:
        """Rename a complete save to its checkpoint; return the new place of the one that had the name, if any."""
        if not final.exists():
            os.rename(folder, final)
            return None
        sync_folder(self.run_folder)  # the save must be on the disk before the name is free
        replaced = self.run_folder / f".{final.name}.{self._identity}.deleted.tmp"
        os.rename(final, replaced)
        try:
            os.rename(folder, final)
        except OSError:
            os.rename(replaced, final)
            raise
        return replaced

    def _await_commit(self, save: _Save, folder: Path) -> None:
        """Wait until rank 0 has made the folder a checkpoint."""
        final = self.run_folder / checkpoint_name(save.step)

        def committed() -> bool | None:
            self._raise_failure_of_others(folder)
            with suppress(CheckpointError):
                return read_manifest(final)["save"] == self._identity or None
            return None

        # Rank 0 starts to wait for the others when it has written its files.
        seconds = 2 * self.timeout_seconds
        if self._poll(seconds, folder, committed) is None:
            raise CheckpointError(
                f"{self.run_folder}: rank 0 has not completed {checkpoint_name(save.step)} within "
                f"{seconds:g} s; is it alive, and does rank {self.rank} see the same file system?"
            )

    def _sweep(self) -> None:
        """Delete what interrupted saves left; other ranks may already write this attempt's next save."""
        for name in os.listdir(self.run_folder):
            match = _TEMPORARY.fullmatch(name)
            if match and (match["attempt"] != self._attempt or int(match["number"]) < self._number):
                shutil.rmtree(self.run_folder / name, ignore_errors=True)
            elif _HALF_WRITTEN_HINT.fullmatch(name):
                (self.run_folder / name).unlink(missing_ok=True)

    def _done_notes(self, folder: Path) -> list[dict[str, Any]] | None:
        self._raise_failure_of_others(folder)
        if self._missing_ranks(folder):
            return None
        return [_read_note(folder / self._note_name("done", rank)) for rank in range(self.world_size)]

    def _missing_ranks(self, folder: Path) -> list[int]:
        names = set(os.listdir(folder))  # listing makes a network file system look again
        return [rank for rank in range(self.world_size) if self._note_name("done", rank) not in names]

    def _raise_failure_of_others(self, folder: Path) -> None:
        with suppress(FileNotFoundError):
            failed = sorted(name for name in os.listdir(folder) if _FAILED_NOTE.fullmatch(name))
            if failed:
                note = _read_note(folder / failed[0])
                raise _PeerFailedError(f"rank {note['rank']} failed to save: {note['error']}")

    def _leave(self, folder: Path, kind: str, content: Mapping[str, Any]) -> None:
        # Rank 0 may rename the folder as soon as it sees the last note.
        note = json.dumps({"rank": self.rank, **content})
        replace_text(folder / self._note_name(kind), note, is_kept=False)

    def _note_name(self, kind: str, rank: int | None = None) -> str:
        return f"rank{self.rank if rank is None else rank:05d}.{kind}.json"

    @property
    def _identity(self) -> str:
        return f"{self._attempt}-{self._number}"

    def _temporary(self, step: int) -> Path:
        return self.run_folder / f".{checkpoint_name(step)}.{self._identity}.tmp"

    def _poll(self, seconds: float, folder: Path, check: Callable[[], _Found | None]) -> _Found | None:
        """Return what `check` finds, or None when nobody has written anything for so long."""
        deadline, pause, sizes = time.monotonic() + seconds, 0.005, _file_sizes(folder)
        while (found := check()) is None:
            if time.monotonic() > deadline:
                before, sizes = sizes, _file_sizes(folder)
                if before == sizes:
                    return None
                deadline = time.monotonic() + seconds
            if self._stopping.wait(pause):
                raise _StoppedError
            pause = min(2 * pause, 0.5)
        return found

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _explain(self, error: Exception, what: str) -> Exception:
        """Turn what a file system or the end of the program does into an error for the user."""
        if isinstance(error, _StoppedError):
            return CheckpointError(f"{self.run_folder}: {what}, because the program is ending")
        if not isinstance(error, OSError):
            return error
        complete: list[Path] = []
        with suppress(OSError):
            complete = list_checkpoints(self.run_folder)
        rest = (
            f"The last complete checkpoint is {complete[-1].name}."
            if complete
            else "No checkpoint is complete."
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = "the disk or the quota is full; free some space, or keep fewer checkpoints"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            reason = f"it is not writable ({error.strerror}); make it so, or choose another output_dir"
        elif error.errno == errno.ENOENT and self.rank != 0 and not self.run_folder.is_dir():
            reason = f"rank {self.rank} does not see this folder; all ranks need the same file system"
        else:
            reason = str(error)
        return CheckpointError(f"{self.run_folder}: {what}: {reason}. {rest}")


class _StoppableSink(HashingSink):
    def __init__(self, file: BinarySink, stopping: threading.Event) -> None:
        super().__init__(file)
        self._stopping = stopping

    def write(self, data: bytes | memoryview, /) -> None:
        if self._stopping.is_set():
            raise _StoppedError
        super().write(data)


def _stop(stopping: threading.Event, threads: list[threading.Thread]) -> None:
    stopping.set()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_STOP_SECONDS)


def _host_copy(name: str, tree: Tree) -> Tree:
    try:
        return to_host(tree)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _strict_json(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary with NaN and infinities, which JSON does not know, as text."""

    def strict(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strict(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strict(item) for item in value]
        return repr(value) if isinstance(value, float) and not math.isfinite(value) else value

    try:
        return json.loads(json.dumps(strict(summary), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"the summary of a checkpoint holds JSON values: {error}") from error


def _file_sizes(folder: Path) -> dict[str, int]:
    sizes = {}
    with suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with suppress(FileNotFoundError):
                sizes[entry.name] = entry.stat().st_size
    return sizes


def _read_note(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
