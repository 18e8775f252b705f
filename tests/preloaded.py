"""A process that has imported what every rank imports first, and forks where a test starts one.

Importing torch and its like takes a processor longer than most of the trainings that tests run. A fork has the
arguments, folder, environment, output and search path of the command that it stands for, and ends as that would.
So are the modules of the project that a run imports: none reads its environment or clock while it is imported. The
other side, and what may not be forked, is in launching.py.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

IMPORTED = (
    "accelerate",
    "anndata",
    "datasets",
    "matplotlib.backends.backend_agg",
    "omegaconf",
    "pandas",
    "psutil",
    "pydantic",
    "safetensors.torch",
    "scipy.sparse",
    "torch",
    "torch._dynamo",  # what creating an optimizer imports
    "torch.utils.data",
    "yaml",
)
OWN = (
    "trainer.build",
    "trainer.export",
    "trainer.launch",
    "trainer.loop",
    "trainer.plots",
    "trainer.proofs",
    "trainer.report",
    "trainer.scoring_queue",
)
STAND_INS = "launching"
"""The module of what stands for a run's own programs; which process imports it decides whether forks use it."""
ROOT = Path(__file__).resolve().parent.parent
MAX_REQUEST = 1 << 20
until_end = contextlib.ExitStack()
"""What holds in a fork for as long as it lives."""
PARENT = "{parent}"
"""An argument that stands for the process number of the parent, this process."""
ROOM = "CELLPHASE_TEST_ROOM"
"""A long variable that this process began with; /proc shows in its place the variables of a fork."""
ROOM_BYTES = 1 << 16


def main(listening: int, modules: Sequence[str]) -> None:
    """Serve requests that come over a socket until standard input ends, and do in each fork what was asked."""
    with socket.socket(fileno=listening) as listener:
        if listener not in select.select([listener, sys.stdin], [], [])[0]:
            return
        sys.path.insert(0, str(ROOT))
        for name in modules:
            importlib.import_module(name)
        del sys.path[:2]
        gc.collect()
        gc.freeze()  # or each fork looks at, and so copies, all that has been imported
        command = serve(listener)
    if command is not None:
        command()


def serve(listener: socket.socket) -> Callable[[], None] | None:
    """Fork for each request, and tell how each fork ended; return in a fork, with what it has to do."""
    woken, wakes = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    reports: dict[int, int] = {}
    channels: list[socket.socket] = []
    while True:
        ready = select.select([listener, sys.stdin, woken, *channels], [], [])[0]
        if sys.stdin in ready:
            return None
        if woken in ready:
            os.read(woken, 4096)
        for child, status in ended(reports):
            with contextlib.suppress(BrokenPipeError):  # whoever asked has gone
                os.write(reports[child], json.dumps(os.waitstatus_to_exitcode(status)).encode())
            os.close(reports.pop(child))
        if listener in ready:
            channels.append(listener.accept()[0])
        for channel in [channel for channel in channels if channel in ready]:
            request, descriptors, _, _ = socket.recv_fds(channel, MAX_REQUEST, 3)
            if not request:
                channel.close()
                channels.remove(channel)
                continue
            output, report, network = descriptors
            child = os.fork()
            if child == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for held in (woken, wakes, report, *reports.values()):
                    os.close(held)
                for each in (listener, *channels):
                    each.close()
                return functools.partial(become, json.loads(request), output, network)
            os.close(output)
            os.close(network)
            reports[child] = report
            channel.sendall(child.to_bytes(8, "little"))


def ended(children: dict[int, int]) -> list[tuple[int, int]]:
    """Return the process numbers and statuses of children that have ended since."""
    found = [os.waitpid(child, os.WNOHANG) for child in children]
    return [(child, status) for child, status in found if child]


def become(request: dict[str, Any], output: int, network: int) -> None:
    """Be the process that `python *arguments` would start."""
    os.setsid()
    enter_network(network)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    show_environment()
    tempfile.tempdir = None  # imports have looked for it
    arguments = [str(os.getppid()) if part == PARENT else part for part in request["arguments"]]
    is_isolated = False
    while arguments[0] in ("-u", "-P"):
        is_isolated |= arguments.pop(0) == "-P"
    is_module = arguments[0] == "-m"
    first = request["cwd"] if is_module else os.path.dirname(os.path.abspath(arguments[0]))
    own = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [*([] if is_isolated else [first]), *own, *sys.path]
    importlib.invalidate_caches()
    if STAND_INS in sys.modules:
        until_end.enter_context(sys.modules[STAND_INS].programs_as_forks())
        until_end.enter_context(sys.modules[STAND_INS].runs_without_picture())
    if is_module:
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def enter_network(network: int) -> None:
    """Enter a network namespace, the one of who asked, unless this process is in it."""
    if os.fstat(network).st_ino != os.stat("/proc/self/ns/net").st_ino:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(network, 0):
            raise OSError(ctypes.get_errno(), "the network of who asked cannot be entered")
    os.close(network)


def show_environment() -> None:
    """Let others find this process by its variables: /proc shows what lies where those that it began with lay."""
    # The 50th and 51st field of the file, proc(5): where they begin and end. The second, a name, may hold anything.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    text = b"".join(name + b"=" + value + b"\0" for name, value in os.environb.items())
    assert len(text) <= end - start, f"{ROOM} is too short for {len(text)} bytes"
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
