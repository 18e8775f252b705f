"""One process at a time: a lock on a file, which the system releases when its holder ends, however it ends."""

import errno
import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import DataError

_SECONDS_BETWEEN_TRIES = 0.1
_SECONDS_BETWEEN_LINES = 60.0


@contextmanager
def file_lock(path: Path, waiting_for: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock on a file, which is made where it is missing; wait for another holder and say so.

    Raises:
        DataError: the file system of the folder has no locks, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise DataError(f"cache_dir: {path.parent} cannot be written ({error.strerror or error})") from error
    with file:
        begin = time.monotonic()
        next_line = begin
        while not _try(file.fileno(), path):
            if time.monotonic() >= next_line:
                seconds = time.monotonic() - begin
                since = f" ({seconds:.0f} s so far)" if seconds >= 1 else ""
                say(f"waiting for another process that is {waiting_for}{since}")
                next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            time.sleep(_SECONDS_BETWEEN_TRIES)
        yield


def _try(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise DataError(
                f"cache_dir: the file system of {path.parent} has no file locks, so that two processes could convert "
                "at once; set cache_dir to a folder on another disk, or convert once with python -m "
                "trainer.convert_h5ad and read the corpus with data.loader.cell_loader"
            ) from error
        raise
    return True
