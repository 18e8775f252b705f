"""Prepare items ahead of their consumer, in a thread or in worker processes."""

import contextlib
import pickle
import queue
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.errors import DataError
from data.memory import keep_freed_memory
from data.worker_process import start_fork_server, worker_init

Item = TypeVar("Item")
Key = TypeVar("Key")


class _Failure:
    """Carry an exception from where an item was prepared to where it is consumed."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def in_thread(load: Callable[[Key], Item], keys: Sequence[Key], depth: int) -> Iterator[Item]:
    """Yield `load(key)` of each key, up to `depth` items prepared ahead in a thread.

    Closing the iterator ends and joins the thread. An exception in `load` is raised where its item is due.
    """
    results: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def work() -> None:
        for key in keys:
            if stop.is_set():
                return
            try:
                item: Any = load(key)
            except BaseException as error:
                item = _Failure(error)
            results.put(item)
            if isinstance(item, _Failure):
                return

    thread = threading.Thread(target=work, name="cells-ahead", daemon=True)
    thread.start()
    try:
        for _ in keys:
            item = results.get()
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stop.set()
        while thread.is_alive():
            # A full queue would hold the thread back from seeing that it is to stop.
            with contextlib.suppress(queue.Empty):
                results.get_nowait()
            thread.join(0.005)


class WorkerPool(Generic[Key, Item]):
    """Prepare items in processes that stay alive from one pass to the next.

    Processes are started afresh, not forked from one that has threads, so `load` must survive pickling.
    """

    def __init__(self, load: Callable[[Key], Item], num_workers: int, depth: int, pin_memory: bool) -> None:
        """Take what prepares an item; the processes start with the first pass."""
        self._keys = _Keys()
        with _without_advice_on_workers():
            self._loader = self._make(load, num_workers, depth, pin_memory)

    def _make(
        self, load: Callable[[Key], Item], num_workers: int, depth: int, pin_memory: bool
    ) -> DataLoader[Any]:
        return DataLoader(
            _Loading(load),
            batch_size=None,
            sampler=self._keys,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            prefetch_factor=max(1, -(-depth // num_workers)),
            persistent_workers=True,
            multiprocessing_context="forkserver",
            worker_init_fn=worker_init(_keep_memory),
            # Its own generator: the global one, which dropout draws from, must not move.
            generator=torch.Generator(),
        )

    def items(self, keys: Sequence[Key]) -> Iterator[Item]:
        """Yield the item of each key, in order."""
        self._keys.keys = keys
        try:
            with _without_advice_on_workers():
                warnings.filterwarnings("ignore", message="Got pickle error", category=UserWarning)
                start_fork_server()
                iterator = iter(self._loader)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            if "pickle" not in str(error):
                raise
            raise DataError(
                f"num_workers: the data cannot be sent to worker processes ({error}); define its data set and "
                "collate function at the top of a module, or set num_workers: 0"
            ) from error
        try:
            for item in iterator:
                if isinstance(item, _Failure):
                    raise item.error
                yield item
        finally:
            # A traceback keeps this frame, which must not keep the processes.
            del iterator

    def close(self) -> None:
        """End the processes."""
        del self._loader


class _Keys(Sampler[Any]):
    """Name the items of the current pass."""

    keys: Sequence[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Loading(Dataset[Any]):
    """Prepare items by key; exceptions travel as items, so that they arrive as they were raised."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._load(key)
        except Exception as error:
            error.add_note(f"in a worker process:\n{traceback.format_exc()}")
            return _Failure(error)


@contextlib.contextmanager
def _without_advice_on_workers() -> Iterator[None]:
    """Keep torch from advising, several times a run, to have no more workers than cores: the user chose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield


def _keep_memory(worker: int) -> None:
    """Let a worker process keep freed memory, as sources do in the process that opens them."""
    keep_freed_memory()


def _as_it_is(item: Any) -> Any:
    return item
