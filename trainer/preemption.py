"""Requests to end with a checkpoint: SIGTERM, SIGUSR1, a launcher that has died, and a time limit.

A handler only sets a flag. The loop reads it between steps, where all ranks agree and save, so that a request to
one rank ends all of them at the same step. Imports no torch: the handlers stand before anything slow begins.
"""

import atexit
import os
import signal
import time
from types import FrameType
from typing import Protocol

from trainer import control

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

LAUNCHER_VARIABLES = (control.VARIABLE, "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "CROSS_SIZE")
"""What launch.sh, torchrun, Accelerate and DeepSpeed's launcher leave in the environment of their ranks."""

_started = time.monotonic()
_received: list[str] = []
_launcher: int | None = None


class Preempted(Exception):
    """End a run because of a request; what it says is for the user, and a restart goes on."""


class _Ranks(Protocol):
    @property
    def count(self) -> int: ...

    def gather_text(self, text: str) -> list[str]: ...


def install() -> None:
    """Take signals as requests from here on, count the process's time from here, and tell a launch script so."""
    global _launcher, _started
    _started = time.monotonic()
    for number in SIGNALS:
        signal.signal(number, _receive)
    os.register_at_fork(after_in_child=_forget)
    atexit.register(_ignore)
    # Only under a launcher: `nohup python ... &` legitimately loses its parent.
    if any(name in os.environ for name in LAUNCHER_VARIABLES):
        _launcher = os.getppid()
    control.write_process_id()
    if (asked := control.request()) is not None:
        _received.append(asked)


def uninstall() -> None:
    """Let signals end the process again, as for a command that has nothing to save."""
    for number in SIGNALS:
        if signal.getsignal(number) is _receive:
            signal.signal(number, signal.SIG_DFL)
    if _received:
        os.kill(os.getpid(), signal.SIGTERM)


def running_seconds() -> float:
    """Return how long this process has run: since `install`, which commands call before they import anything slow."""
    return time.monotonic() - _started


def request(limit_seconds: float | None = None) -> str | None:
    """Return what asks this process to end, None while nothing does; once asked, always asked.

    Args:
        limit_seconds: How long the process may run; None: as long as it likes.
    """
    if _received:
        # The launch script says SIGTERM to its ranks, whatever it was told itself.
        return control.request() or _received[0]
    if _launcher is not None and os.getppid() != _launcher:
        return "the end of the launcher"
    if limit_seconds is not None and running_seconds() >= limit_seconds:
        return "wall-clock limit"
    return None


def agreed_request(ranks: _Ranks, own: str | None) -> str:
    """Return what asked, and which rank; empty where no rank was asked. Every rank must call it."""
    requests = ranks.gather_text(own or "")
    asked = [rank for rank, text in enumerate(requests) if text]
    if not asked:
        return ""
    first = requests[asked[0]]
    return (
        first if len(asked) == ranks.count or first == "wall-clock limit" else f"{first} on rank {asked[0]}"
    )


def _receive(number: int, frame: FrameType | None) -> None:
    _received.append(signal.Signals(number).name)


def _ignore() -> None:
    # The outcome stands, and the end of the interpreter would let signals end the process with another exit code.
    for number in SIGNALS:
        if signal.getsignal(number) is _receive:
            signal.signal(number, signal.SIG_IGN)


def _forget() -> None:
    # A forked child must end when it is told to, not remember the request.
    _received.clear()
    for number in SIGNALS:
        if signal.getsignal(number) is _receive:
            signal.signal(number, signal.SIG_DFL)
