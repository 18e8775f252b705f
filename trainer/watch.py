"""Watch the ranks of a run: say which one died or comes late, and end those that would wait for it for ever.

Each rank of a run of several has a thread that writes `heartbeats/rank<rank>.json` in the run folder and looks
whether the ranks of its machine are alive. The first to see that one is lost leaves `failure.<attempt>.json`, which
all look for, because a process that waits on a GPU learns of nothing else.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed

from trainer.activity import Activity
from trainer.distributed import Ranks

FOLDER = "heartbeats"
BEAT_SECONDS = 2.0
_TICK_SECONDS = 0.5
_SILENT_SECONDS = 3 * BEAT_SECONDS
_FIND_SECONDS = 8.0
_GRACE_SECONDS = 10.0
"""How long the main thread may take to notice by itself that a rank is lost."""
_STUCK_SECONDS = 60.0
"""How long after the timeout of collectives a main thread that still waits in one is ended."""
_FIRST_LOOK, _REPORT = 0.6, 0.8
"""Shares of the timeout after which the other ranks are looked at, and what was found is said."""
_FAILURE_WORDS = (
    "gloo",
    "NCCL",
    "ProcessGroup",
    "c10d",
    "Connection closed by peer",
    "Connection reset by peer",
    "pair closure",
)


class LostRank(RuntimeError):
    """Report that a collective failed, and which rank is the reason."""


@dataclass(frozen=True)
class Beat:
    """What a heartbeat file says."""

    rank: int
    host: str
    machine: str
    """Identifies the kernel and the process id namespace: within one, a process id tells whether a rank is alive."""
    process: int
    started: str
    """When the process started, as the kernel counts: another one may get its id."""
    attempt: str
    number: int = 0
    """Counts the heartbeats."""
    count: int = 0
    """How often the main thread has gone on."""
    step: int = 0
    activity: str = ""
    seconds: float = 0.0
    """Since the main thread went on."""
    ending: str | None = None
    """Why the rank ended, where it did not end as it should."""
    is_consequence: bool = False
    """Whether it ended because another rank is lost."""

    @property
    def who(self) -> str:
        """Name the rank and where it runs."""
        return f"rank {self.rank} (process {self.process} on {self.host})"

    @property
    def where(self) -> str:
        """Say what it was doing."""
        return f"at step {self.step}, {self.activity}"


def clear(run_folder: Path) -> None:
    """Make an empty folder for heartbeats; rank 0 calls it before any rank watches."""
    shutil.rmtree(run_folder / FOLDER, ignore_errors=True)
    (run_folder / FOLDER).mkdir(exist_ok=True)


class Watch:
    """The watch of one rank; of a run with a single one it does nothing."""

    def __init__(
        self,
        run_folder: Path,
        ranks: Ranks,
        activity: Activity,
        *,
        attempt: str,
        timeout_seconds: float,
        on_end: Callable[[str], None],
    ) -> None:
        """Begin to watch; every rank must do so.

        Args:
            run_folder: The run folder, after `clear`.
            ranks: Who this rank is.
            activity: What the main thread sets.
            attempt: Letters and digits, the same on all ranks and new for every start of the program.
            timeout_seconds: When a collective gives up.
            on_end: Called with the reason before the process is ended from the watch.
        """
        self._folder = run_folder / FOLDER
        self._rank, self._count = ranks.index, ranks.count
        self._activity = activity
        self._timeout = timeout_seconds
        self._on_end = on_end
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._is_ending = False
        self._lost: tuple[str, float] | None = None
        self._reported_count = self._looked_count = -1
        self._first_look: dict[int, int] = {}
        self._next_beat = 0.0
        self._own = Beat(
            ranks.index, socket.gethostname(), _machine(), os.getpid(), _process_start(os.getpid()), attempt
        )
        self._thread: threading.Thread | None = None
        if self._count == 1:
            return
        self._write()
        peers = [Beat(**json.loads(text)) for text in ranks.gather_text(json.dumps(asdict(self._own)))]
        self._neighbours = [
            peer for peer in peers if peer.machine == self._own.machine and peer.rank != self._rank
        ]
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def explain(self, error: BaseException) -> LostRank | None:
        """Return which rank made a collective fail; None for another error, or where nothing is found."""
        if self._thread is None or not is_collective_failure(error):
            return None
        self._is_ending = True
        found = self._find_culprit()
        if found is None:
            return None
        # A rank that hangs outside of collectives learns of nothing else that it is not waited for.
        self._leave_failure(found)
        return LostRank(found)

    def writes_the_end(self) -> bool:
        """Tell whether this rank is to write down how the run ended: one does, once, also where rank 0 is lost.

        A rank asks after `close`, or when its watch ends it.
        """
        if self._thread is None:
            return True
        if not self._failure_path.exists():
            return self._rank == 0
        if self._rank != 0 and not self._is_rank_0_lost():
            return False
        told = self._folder / f"told.{self._own.attempt}"
        with contextlib.suppress(OSError):
            told.touch(exist_ok=False)
            return True
        return self._rank == 0 and not told.exists()

    def close(
        self, exit_code: int, reason: str, *, is_consequence: bool = False, is_wanted: bool = False
    ) -> None:
        """End the watch. A rank that ends as it should (`is_wanted`) takes its heartbeat away; others leave why."""
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        if not is_wanted:
            self._leave_ending(f"exit code {exit_code}: {reason}", is_consequence)
            return
        with contextlib.suppress(OSError):
            self._path(self._rank).unlink()
            self._folder.rmdir()  # by the last rank, unless stacks were written

    def _run(self) -> None:
        while not self._stop.wait(_TICK_SECONDS):
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + BEAT_SECONDS
            self._write()
            if self._lost is None and (note := self._read(self._failure_path)) is not None:
                self._lost = str(note["reason"]), now
        if self._lost is None and (dead := self._dead_neighbour()) is not None:
            self._lost = dead, now
            self._leave_failure(dead)
        if self._lost is not None and now - self._lost[1] > _GRACE_SECONDS and not self._is_ending:
            self._end(self._lost[0])
        self._look_at_waiting(now)

    def _look_at_waiting(self, now: float) -> None:
        """Report a main thread that does not go on; end it where it waits for other ranks beyond all timeouts."""
        count, waited = self._activity.count, now - self._activity.changed
        if waited > _FIRST_LOOK * self._timeout and self._looked_count != count:
            self._looked_count, self._first_look = count, self._numbers()
        if waited > _REPORT * self._timeout and self._reported_count != count:
            self._reported_count = count
            self._dump_stacks()
            late = self._late_ranks(is_long_ago=(_REPORT - _FIRST_LOOK) * self._timeout > _SILENT_SECONDS)
            speaker = min((rank for rank in range(self._count) if rank not in late), default=0)
            if speaker == self._rank:
                self._say(
                    f"{self._position()} has waited for {waited:.0f} s; {self._reason(late)}. Stacks are in "
                    f"{self._folder}/rank*.stack.txt; collectives fail after {self._timeout:g} s "
                    "(distributed_timeout_seconds)"
                )
        is_collective = self._activity.now[2]
        if is_collective and waited > self._timeout + _STUCK_SECONDS and not self._is_ending:
            self._end(
                f"{self._position()} still waits after {waited:.0f} s; {self._reason(self._late_ranks(True))}"
            )

    def _reason(self, late: Mapping[int, str]) -> str:
        return "; ".join(late.values()) or "every rank is at the same place"

    def _position(self) -> str:
        name, step, _ = self._activity.now
        return f"rank {self._rank}, at step {step}, {name},"

    def _late_ranks(self, is_long_ago: bool) -> dict[int, str]:
        """Return the ranks that keep the others waiting, with the reason for each.

        Args:
            is_long_ago: Whether every living rank has given a sign of life since the first look.
        """
        beats = self._beats()
        stopped = {
            peer.rank: f"{peer.who} is stopped (SIGSTOP, or a debugger), {beats[peer.rank].where}"
            for peer in self._neighbours
            if peer.rank in beats and _process_state(peer) in ("T", "t")
        }
        if stopped:
            return stopped
        if is_long_ago:
            silent = {
                rank: f"{beat.who} gives no sign of life; it was last seen {beat.where}"
                for rank, beat in beats.items()
                if rank != self._rank and beat.number == self._first_look.get(rank)
            }
            if silent:
                return silent
        beats[self._rank] = self._now()
        furthest = max(beat.count for beat in beats.values())
        return {
            rank: f"{beat.who} is late: {beat.where} for {beat.seconds:.0f} s"
            for rank, beat in sorted(beats.items())
            if beat.count < furthest
        }

    def _find_culprit(self) -> str | None:
        """Look for a while which rank is lost, has failed, or is late."""
        self._first_look, began = self._numbers(), time.monotonic()
        pause = 0.2 if self._count <= 64 else BEAT_SECONDS
        while True:
            if (dead := self._dead_neighbour()) is not None:
                return dead
            if (note := self._read(self._failure_path)) is not None:
                return str(note["reason"])
            for beat in self._beats().values():
                if beat.ending is not None and not beat.is_consequence:
                    return _ended(beat)
            waited = time.monotonic() - began
            late = self._late_ranks(is_long_ago=waited > _SILENT_SECONDS + 1)
            late.pop(self._rank, None)
            if late and (waited > _SILENT_SECONDS + 1 or "is stopped" in self._reason(late)):
                return self._reason(late)
            if waited > _FIND_SECONDS:
                return None
            time.sleep(pause)

    def _dead_neighbour(self) -> str | None:
        """Return what is to be said of a rank of this machine that is gone without having ended."""
        for peer in list(self._neighbours):
            if _process_state(peer) is not None:
                continue
            beat = self._beat_of(peer.rank)
            if beat is None:  # taken away: it has ended as it should
                self._neighbours.remove(peer)
            elif beat.ending is None:
                return (
                    f"{beat.who} died without a word, as when it is killed or memory runs out; it was last seen "
                    f"{beat.where}"
                )
            elif not beat.is_consequence:
                return _ended(beat)
        return None

    def _is_rank_0_lost(self) -> bool:
        """Tell whether rank 0 is why the run ended, and has not said so itself."""
        note, beat = self._read(self._failure_path), self._beat_of(0)
        return bool(note and beat and beat.ending is None and beat.who in note["reason"])

    def _numbers(self) -> dict[int, int]:
        return {rank: beat.number for rank, beat in self._beats().items()}

    def _beats(self) -> dict[int, Beat]:
        beats = {rank: self._beat_of(rank) for rank in range(self._count) if rank != self._rank}
        return {rank: beat for rank, beat in beats.items() if beat is not None}

    def _beat_of(self, rank: int) -> Beat | None:
        content = self._read(self._path(rank))
        if content is None or content.get("attempt") != self._own.attempt:
            return None
        return Beat(**content)

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _now(self) -> Beat:
        """Return this rank's heartbeat as it would be written now."""
        name, step, _ = self._activity.now
        seconds = round(time.monotonic() - self._activity.changed, 1)
        return replace(self._own, count=self._activity.count, step=step, activity=name, seconds=seconds)

    def _write(self) -> None:
        self._own = replace(self._now(), number=self._own.number + 1)
        self._replace(self._path(self._rank), asdict(self._own))

    def _leave_ending(self, reason: str, is_consequence: bool) -> None:
        self._own = replace(self._own, ending=reason, is_consequence=is_consequence)
        self._write()
        if not is_consequence:
            self._leave_failure(_ended(self._own))

    def _leave_failure(self, reason: str) -> None:
        if not self._failure_path.exists():
            self._replace(self._failure_path, {"reason": reason})

    def _replace(self, path: Path, content: Mapping[str, Any]) -> None:
        temporary = path.with_name(f".{path.name}.{self._rank}.tmp")
        with self._lock, contextlib.suppress(OSError):  # a full disk is the run's trouble, not the watch's
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
            os.replace(temporary, path)

    def _dump_stacks(self) -> None:
        with (
            contextlib.suppress(OSError),
            open(self._path(self._rank).with_suffix(".stack.txt"), "w") as file,
        ):
            faulthandler.dump_traceback(file, all_threads=True)

    def _end(self, reason: str) -> None:
        """End the process from here: its main thread waits for what will not come."""
        self._dump_stacks()
        is_own = self._own.who in reason
        text = f"{reason}. Rank {self._rank} {'is not waited for' if is_own else 'waits for it in vain'} and ends"
        self._say(text)
        self._leave_failure(reason)
        self._leave_ending(text, is_consequence=True)
        self._on_end(text)
        os._exit(1)

    def _say(self, text: str) -> None:
        print(f"watch: {text}", file=sys.stderr, flush=True)

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank{rank:05d}.json"

    @property
    def _failure_path(self) -> Path:
        return self._folder / f"failure.{self._own.attempt}.json"


def is_collective_failure(error: BaseException) -> bool:
    """Tell whether an error comes from talking to other ranks."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _FAILURE_WORDS)


def _ended(beat: Beat) -> str:
    return f"{beat.who} ended {beat.where}: {beat.ending}"


def _process_state(beat: Beat) -> str | None:
    """Return the kernel's letter for what a process of this machine does, None where it is gone."""
    fields = _stat_fields(beat.process)
    # A zombie has ended: its launcher has only not looked yet.
    return None if not fields or fields[0] in "ZX" or fields[19] != beat.started else fields[0]


def _process_start(process: int) -> str:
    fields = _stat_fields(process)
    return fields[19] if fields else ""


def _stat_fields(process: int) -> list[str]:
    """Return /proc/<process>/stat from its third field on; the second, a name, may hold anything."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _machine() -> str:
    """Return what identifies the kernel and the namespace in which this process's id counts."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return f"unknown {socket.gethostname()} {os.getpid()}"
