"""Rows of Parquet files behind fsspec (local, HTTP, object stores), read by row group in bounded memory."""

import io
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data import remote
from data.columns import Columns, concatenate, from_arrow, take
from data.errors import DataError
from data.ragged import offsets_of

_FOOTER_GUESS = 1 << 16
_SETS_EXPECTED = 3


class _Footer(NamedTuple):
    """Hold what a file's footer says."""

    metadata: pq.FileMetaData
    size: int
    group_starts: NDArray[np.int64]
    """First row of each row group inside the file, and the number of rows."""


class _Expected(NamedTuple):
    """Hold rows that were announced, sorted, and the columns that are being read for them."""

    rows: NDArray[np.int64]
    columns: "Future[Columns]"


class ParquetShards:
    """Give any rows of a set of Parquet files.

    A row group is fetched in one request and decoded whole, so rows should be announced with `expect`: each
    row group of the announced rows is then decoded once, ahead of time in a background thread, and only the
    announced rows of it are kept. Memory holds the last three announced sets and `groups_kept` whole groups,
    which serve rows that nobody announced.
    """

    def __init__(
        self,
        filesystem: fsspec.AbstractFileSystem,
        paths: Sequence[str],
        row_counts: Sequence[int] | None,
        columns: Sequence[str],
        groups_kept: int = 8,
    ) -> None:
        """Name the files, the rows of each (None reads every footer to know) and the columns to give."""
        self._filesystem = filesystem
        self._paths = list(paths)
        self._columns = list(columns)
        self._groups_kept = groups_kept
        self._reset()
        counts = (
            row_counts
            if row_counts is not None
            else [self.footer(i).metadata.num_rows for i in range(len(paths))]
        )
        self._shard_starts = offsets_of(np.asarray(counts, np.int64))
        self.num_rows = int(self._shard_starts[-1])

    def gather(self, rows: NDArray[np.int64]) -> Columns:
        """Return the rows, in the given order."""
        if len(rows) and not (rows.min() >= 0 and rows.max() < self.num_rows):
            raise DataError(
                f"rows {rows.min()} to {rows.max()} are not all inside the {self.num_rows} there are"
            )
        parts: list[Columns] = []
        where: list[NDArray[np.int64]] = []
        left = np.arange(len(rows))
        for expected in reversed(self._expected):
            place = np.searchsorted(expected.rows, rows[left])
            is_here = expected.rows[np.minimum(place, len(expected.rows) - 1)] == rows[left]
            if is_here.any():
                parts.append(take(expected.columns.result(), place[is_here]))
                where.append(left[is_here])
                left = left[~is_here]
        if len(left) or not parts:
            unique, inverse = np.unique(rows[left], return_inverse=True)
            parts.append(take(self._read(unique, keep=True), inverse))
            where.append(left)
        if len(parts) == 1:
            return parts[0]
        return take(concatenate(parts), np.argsort(np.concatenate(where)))

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Start reading rows that will be asked for; no rows: stop reading and drop what was announced."""
        if not len(rows):
            self._stop.set()
            self._expected.clear()
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
            self._stop = threading.Event()
            return
        rows = np.unique(rows)
        if any(np.array_equal(rows, expected.rows) for expected in self._expected):
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parquet-ahead")
        self._expected.append(_Expected(rows, self._pool.submit(self._read, rows, keep=False)))

    def footer(self, shard: int) -> _Footer:
        """Read (once) what a file says of its row groups and columns."""
        with self._lock:
            if shard in self._footers:
                return self._footers[shard]
        path = self._paths[shard]
        size = remote.size_of(self._filesystem, path, self._stop)
        tail = self._fetch(path, max(size - _FOOTER_GUESS, 0), size)
        needed = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != b"PAR1" or needed > size:
            raise DataError(f"{path}: not a Parquet file, or cut short")
        if needed > len(tail):
            tail = self._fetch(path, size - needed, size)
        try:
            metadata = pq.read_metadata(pa.BufferReader(tail))
            names = metadata.schema.to_arrow_schema().names
        except (OSError, pa.ArrowException, UnicodeError) as error:
            raise DataError(
                f"{path}: its Parquet footer cannot be read, the file is damaged ({error})"
            ) from error
        missing = [name for name in self._columns if name not in names]
        if missing:
            raise DataError(f"{path}: no column {', '.join(missing)}; it has: {', '.join(names)}")
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        footer = _Footer(metadata, size, offsets_of(np.asarray(groups, np.int64)))
        with self._lock:
            self._footers[shard] = footer
        return footer

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without threads and decoded rows."""
        names = ("_filesystem", "_paths", "_columns", "_groups_kept", "_shard_starts", "num_rows")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start afresh."""
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._footers: dict[int, _Footer] = {}
        self._groups: OrderedDict[tuple[int, int], Columns] = OrderedDict()
        self._expected: deque[_Expected] = deque(maxlen=_SETS_EXPECTED)
        self._pool: ThreadPoolExecutor | None = None
        self._stop = threading.Event()

    def _read(self, rows: NDArray[np.int64], keep: bool) -> Columns:
        """Decode the row groups of sorted unique rows; `keep` remembers the last whole groups."""
        stop, parts = self._stop, []
        for shard, group, index in self._by_group(rows):
            if stop.is_set():
                raise CancelledError
            # Copied group by group: places in a decoded group would keep all of it in memory.
            parts.append(concatenate([take(self._group(shard, group, keep), index)]))
        return concatenate(parts) if parts else take(self._group(0, 0, keep), rows)

    def _by_group(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """Yield (file, row group, numbers inside the group) for sorted rows."""
        shards = np.searchsorted(self._shard_starts, rows, "right") - 1
        for shard in np.unique(shards).tolist():
            local = rows[shards == shard] - self._shard_starts[shard]
            starts = self.footer(shard).group_starts
            expected = int(self._shard_starts[shard + 1] - self._shard_starts[shard])
            if starts[-1] != expected:
                path = self._paths[shard]
                raise DataError(
                    f"{path}: it holds {starts[-1]} rows, not {expected}; copy or convert the data again"
                )
            groups = np.searchsorted(starts, local, "right") - 1
            for group in np.unique(groups).tolist():
                yield shard, group, local[groups == group] - starts[group]

    def _group(self, shard: int, group: int, keep: bool) -> Columns:
        with self._lock:
            if (shard, group) in self._groups:
                self._groups.move_to_end((shard, group))
                return self._groups[shard, group]
        columns = self._decode(shard, group)
        if keep:
            with self._lock:
                self._groups[shard, group] = columns
                while len(self._groups) > self._groups_kept:
                    self._groups.popitem(last=False)
        return columns

    def _decode(self, shard: int, group: int) -> Columns:
        path, footer = self._paths[shard], self.footer(shard)
        try:
            start, stop = _byte_range(footer.metadata.row_group(group), set(self._columns))
        except UnicodeError:
            start, stop = -1, -1
        if not 0 <= start <= stop <= footer.size:
            raise DataError(f"{path}: row group {group} lies outside the file, which is damaged")
        window = _Window(self._fetch(path, start, stop), start, footer.size)
        try:
            with pq.ParquetFile(pa.PythonFile(window, mode="r"), metadata=footer.metadata) as file:
                table = file.read_row_group(group, columns=self._columns, use_threads=False)
        except (OSError, pa.ArrowException, UnicodeError) as error:
            raise DataError(f"{path}: row group {group} cannot be decoded ({error})") from error
        return {name: from_arrow(table.column(name), name, path) for name in self._columns}

    def _fetch(self, path: str, start: int, stop: int) -> bytes:
        content = remote.read_range(self._filesystem, path, start, stop, self._stop)
        if len(content) != stop - start:
            raise DataError(
                f"{path}: asked for bytes {start} to {stop}, got {len(content)}; the server must answer "
                "range requests, and the file must not change while it is read"
            )
        return content


class _Window(io.RawIOBase):
    """Show one piece of a file as if it were the whole file."""

    def __init__(self, content: bytes, start: int, size: int) -> None:
        self._content, self._start, self._size, self._position = content, start, size, start

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        place = self._position - self._start
        if place < 0 or size < 0 or place + size > len(self._content):
            raise OSError(f"bytes {self._position} to {self._position + size} were not fetched")
        self._position += size
        return self._content[place : place + size]


def _byte_range(group: Any, columns: set[str]) -> tuple[int, int]:
    """Return the bytes of the file that hold these columns of a row group."""
    starts, stops = [], []
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema.split(".")[0] in columns:
            first = chunk.dictionary_page_offset or chunk.data_page_offset
            starts.append(min(first, chunk.data_page_offset))
            stops.append(starts[-1] + chunk.total_compressed_size)
    return min(starts, default=-1), max(stops, default=-1)
