"""How much memory processes take, read from /proc while they run."""

import contextlib
import threading
from pathlib import Path
from typing import NamedTuple

import psutil


class Memory(NamedTuple):
    """Hold the memory of a process, in bytes."""

    peak: int
    """The most that was resident so far, mapped pages of files included: the kernel's own count."""
    own: int
    """What is resident now and belongs to no file: it can only be freed by the process."""
    mapped: int
    """What is resident now of mapped files: the kernel takes it back when memory is short."""


def memory_of(process: int | str = "self") -> Memory:
    """Return the memory of a process, zeros for one that has ended."""
    lines = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line
    )
    peak, anonymous, shared, mapped = (
        int(lines.get(name, "0").split()[0]) * 1024 for name in ("VmHWM", "RssAnon", "RssShmem", "RssFile")
    )
    return Memory(peak, anonymous + shared, mapped)


class MemoryWatch:
    """Keep the peaks of a process and all its descendants while the block runs.

    Resident peaks are the kernel's and exact. What is own and mapped is looked at every `seconds`, so that a
    shorter peak can be missed.
    """

    def __init__(self, root: int, seconds: float = 0.1) -> None:
        """Watch the process numbered `root`."""
        self.peaks: dict[int, Memory] = {}
        """The highest value of each figure, by process."""
        self.own = 0
        """The most that all processes held at once of their own."""
        self._root = psutil.Process(root)
        self._seconds = seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        """Begin to look."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking."""
        self._done.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._done.wait(self._seconds):
            with contextlib.suppress(psutil.NoSuchProcess):  # the root has ended
                self._look([self._root, *self._root.children(recursive=True)])

    def _look(self, processes: list[psutil.Process]) -> None:
        own = 0
        for process in processes:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                now = memory_of(process.pid)
                before = self.peaks.get(process.pid, now)
                self.peaks[process.pid] = Memory(*map(max, before, now))
                own += now.own
        self.own = max(self.own, own)
