"""Worker processes of loaders: they obey their parent alone, and end with it in whatever way it ends.

A launcher that is told to stop sends the signal to every process of a rank, workers included, while the rank goes on
to its checkpoint and still needs them.
"""

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterator

_PRELOADED = ["__main__", "torch.utils.data"]
"""What the process that workers are forked from imports, so that not each of them does; the first is Python's own."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_LOOK_SECONDS = 1.0


def worker_init(own: Callable[[int], None] | None) -> Callable[[int], None]:
    """Return a loader's `worker_init_fn`, which calls the user's own after ours."""
    return functools.partial(_begin, own)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold signals back from what is started within the block; they arrive here after it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_fork_server() -> None:
    """Start the process that workers are forked from, unless it runs: it holds back the signals too."""
    with signals_held():
        multiprocessing.resource_tracker.ensure_running()  # lets SIGTERM through again where it starts
    multiprocessing.forkserver.set_forkserver_preload(_PRELOADED)
    with signals_held():
        multiprocessing.forkserver.ensure_running()


def _begin(own: Callable[[int], None] | None, worker: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # threads that begin later inherit it
    threading.Thread(target=_obey_parent, name="parent", daemon=True).start()
    if own is not None:
        own(worker)


def _obey_parent() -> None:
    """End when the parent says so or is gone; a held signal tells who sent it."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    while not multiprocessing.connection.wait([parent.sentinel], timeout=0):
        received = signal.sigtimedwait(_SIGNALS, _LOOK_SECONDS)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == parent.pid:
            break
    os._exit(1)
