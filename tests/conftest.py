"""What every test runs under: one thread, no network, fixed seeds. Tests marked `gpu` need one."""

import contextlib
import importlib
import os
import random
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

# Before torch, wandb or datasets is imported: they read these once.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_PROJECT", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
    os.environ.pop(name, None)

# Started by nohup or in the background, everything would inherit that these signals are ignored.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

START_FIRST = (
    "test_two_hosts.py",
    "test_cells_examples.py",
    "test_prediction_scoring.py",
    "test_faults.py",
    "test_convert.py",
    "test_preemption.py",
    "test_docs.py",
    "test_launch_script.py",
    "test_zero.py",
    "test_cells_whole.py",
    "test_fp8.py",
    "test_benchmark.py",
    "test_million_cells.py",
    "test_score.py",
    "test_ranks.py",
    "test_cells_training.py",
)
"""The files that take longest, so that no worker is left alone with one at the end.

Those that wait much, for timeouts and for other processes, are among others that compute, or processors idle.
"""

_LOOPBACK = ("127.", "::1", "localhost")

_forkers = contextlib.ExitStack()


def processor_seconds():
    """Return the seconds that all processors were busy, idle, and run for others by a hypervisor."""
    times = psutil.cpu_times()._asdict()  # each system has some of these
    kinds = (("user", "nice", "system", "irq", "softirq"), ("idle", "iowait"), ("steal",))
    return [sum(times.get(name, 0.0) for name in names) for names in kinds]


_at_start = processor_seconds()


def pytest_configure(config):
    """Start what forks ranks once, for all workers: see launching.py."""
    from launching import FORKERS_AT, PRELOAD, started_forkers

    if PRELOAD and FORKERS_AT not in os.environ:
        os.environ[FORKERS_AT] = str(_forkers.enter_context(started_forkers()))


def pytest_unconfigure(config):
    _forkers.close()


def pytest_terminal_summary(terminalreporter):
    """Say whose time the tests took: where a hypervisor gives it to others, they take longer, and some time out."""
    both = zip(_at_start, processor_seconds(), strict=True)
    busy, idle, stolen = (end - start for start, end in both)
    number = os.cpu_count() or 1
    terminalreporter.write_line(
        f"{number} processors: {busy:.0f} s busy, {idle:.0f} s idle, {stolen:.0f} s taken by the hypervisor; "
        f"all of this in {(busy + idle) / number:.0f} s where it takes none"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session):
    """Let each worker import the tests from another one on: whoever is first rewrites a file's assertions for all."""
    worker = getattr(session.config, "workerinput", None)
    if worker is None or session.config.args_source is session.config.ArgsSource.ARGS:
        return
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    start = len(names) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
    for name in (*names[start:], *names[:start]):
        with contextlib.suppress(Exception, pytest.skip.Exception):  # collecting tells it
            importlib.import_module(name)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(START_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    import numpy as np

    random.seed(0)
    np.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        # torch.manual_seed formats the stack for every kind of accelerator that is not there: milliseconds.
        seed = torch.manual_seed if torch.cuda.is_initialized() else torch.default_generator.manual_seed
        seed(0)


@pytest.fixture(autouse=True)
def one_thread():
    """Give torch its one thread back after tests that compute with scanpy or scikit-learn themselves."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="module")
def forked_programs():
    """Let forks verify what a module's tests export and score what they train: fresh processes would import anew.

    Runs end without the picture of their report.
    """
    from launching import programs_as_forks, runs_without_picture

    with programs_as_forks(), runs_without_picture():
        yield


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Let the programs that score predictions compile once for all tests at a time, in place of in each process."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    first = os.path.join(os.path.dirname(__file__), "compiled_once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", str(shared / "numba"))
        patch.setenv("PYTHONPATH", first, prepend=os.pathsep)
        patch.syspath_prepend(first)
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def connect_to_this_machine(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
            raise AssertionError(f"a test tried to connect to {address}; tests use no network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_to_this_machine)
