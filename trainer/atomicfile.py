"""Files that a reader sees as they were or whole, and folders whose entries survive a power cut."""

import errno
import os
import secrets
from pathlib import Path


def replace_text(path: str | Path, text: str, *, is_kept: bool = True) -> None:
    """Write `text` to `path` so that a reader, or a crash at any moment, finds the old content or the new.

    Args:
        path: the file; its folder exists.
        text: its new content.
        is_kept: whether the new content stays after a power cut that comes when this has returned. Where readers may
            move or delete the folder as soon as they see the file, nothing can be done to it any more.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if is_kept:
        sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Flush a folder's entries to the disk, so that files created or renamed in it stay after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems keep no unwritten entries and answer that a folder cannot be flushed.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
