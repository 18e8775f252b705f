"""Reads through fsspec that the short failure of a server or of the network does not end.

fsspec's own HTTP file system makes one attempt, so that a single 503 among millions of requests would end a run of
days; file systems of object stores make several of their own, which these come on top of.
"""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

import fsspec

from data.errors import DataError

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before the second attempt and those after it."""

_PASSING_STATUS = frozenset({408, 425, 429})
_PASSING = ("aiohttp.", "botocore.", "urllib3.", "requests.")
"""Modules whose errors without a status are those of connections."""
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Tell whether a file system's files are files of this machine."""
    protocol = filesystem.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def read_range(
    filesystem: fsspec.AbstractFileSystem, path: str, start: int, end: int, stop: threading.Event
) -> bytes:
    """Return the bytes `start` to `end` of a file, after several attempts where a failure may pass.

    Raises:
        CancelledError: `stop` was set while it waited.
        ConnectionError: it failed for half a minute.
        OSError: the disk of this machine failed.
        DataError: it cannot be read, and will not be by waiting.
    """
    return _attempted(lambda: filesystem.cat_file(path, start=start, end=end), filesystem, path, stop)


def size_of(filesystem: fsspec.AbstractFileSystem, path: str, stop: threading.Event) -> int:
    """Return the size of a file (bytes), as `read_range` reads."""
    return int(_attempted(lambda: filesystem.size(path), filesystem, path, stop) or 0)


def as_os_error(error: Exception) -> OSError:
    """Return the error of a file system as an OSError: some of its libraries raise errors of their own."""
    return error if isinstance(error, OSError) else OSError(_said(error))


def _attempted(
    read: Callable[[], Any], filesystem: fsspec.AbstractFileSystem, path: str, stop: threading.Event
) -> Any:
    waits = iter(WAITS)
    while True:
        try:
            return read()
        except Exception as error:  # each file system raises what its library does
            if not _may_pass(error):
                raise DataError(f"{path}: cannot be read ({_said(error)})") from error
            if is_local(filesystem):
                raise
            seconds = next(waits, None)
            if seconds is None:
                raise ConnectionError(
                    f"{path}: cannot be read, after {len(WAITS) + 1} attempts ({_said(error)})"
                ) from error
        if stop.wait(seconds):
            raise CancelledError


def _may_pass(error: Exception) -> bool:
    """Tell whether the same request may succeed a moment later."""
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return _may_pass(error.__cause__)  # fsspec says so of a size that it could not ask for
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int):
        return status >= 500 or status in _PASSING_STATUS
    if isinstance(error, _LASTING):
        return False
    return isinstance(error, OSError) or type(error).__module__.startswith(_PASSING)


def _said(error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
        return _said(error.__cause__)
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    if isinstance(status, int):
        return f"the server answered {status} {message or ''}".rstrip()
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
