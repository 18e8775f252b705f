"""A file of what is finished: lines of JSON that survive a power cut."""

import json
import os
from pathlib import Path
from typing import Any


class JournalFile:
    """Keep records, a line each; a line that a crash cut short does not count."""

    def __init__(self, path: Path) -> None:
        """Take the path, where there may be a file."""
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return the records, and cut off what comes after the last whole one."""
        content = self.path.read_bytes() if self.path.exists() else b""
        records: list[dict[str, Any]] = []
        complete = 0
        for line in content.splitlines(keepends=True):
            try:
                record = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            records.append(record)
            complete += len(line)
        if complete != len(content):
            os.truncate(self.path, complete)
        return records

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; where that fails, the file is as it was."""
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if self.path.exists():
                os.truncate(self.path, size)  # half a line would spoil the next one
            raise
