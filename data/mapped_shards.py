"""Rows of Arrow IPC stream files, mapped into memory and gathered by address."""

import ctypes
import os
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.columns import Columns, RaggedColumn, check_type
from data.errors import DataError
from data.ragged import offsets_of


class _Pieces(NamedTuple):
    """Say where a column lies: one entry for each record batch, as addresses or as places in a view."""

    values: NDArray[np.int64]
    """The first value."""
    offsets: NDArray[np.int64]
    """The first list offset; 0 for a column of numbers."""
    num_values: NDArray[np.int64]


class _Shard(NamedTuple):
    """Hold one mapped file."""

    region: pa.Buffer
    batches: list[pa.RecordBatch]
    """Kept so that memory their columns lie in stays valid (a compressed file's lie outside the region)."""
    starts: NDArray[np.int64]
    """First row of each record batch, counted over all files."""
    pieces: dict[str, _Pieces]
    alike: frozenset[str]
    """List columns with the same offsets as the first one in every record batch."""


_mapped_files: WeakValueDictionary[tuple[str, int, int, int], pa.Buffer] = WeakValueDictionary()
"""What is mapped by path, inode, size and time of change, for as long as anything uses it."""


class MappedShards:
    """Give any rows of a set of Arrow files that are mapped, not read.

    A batch of shuffled rows comes from almost as many record batches as it has rows. Asking Arrow for each
    would cost more than the copy, so the place of every record batch is kept in arrays, and rows are found
    and copied with a few vectorised operations over one view that spans all mapped files. Files are mapped
    when they are first used.
    """

    def __init__(self, paths: Sequence[str], row_counts: Sequence[int], columns: Sequence[str]) -> None:
        """Name the files, the rows of each, and the columns to give."""
        self._paths = list(paths)
        self._columns = list(columns)
        self._shard_starts = offsets_of(np.asarray(row_counts, np.int64))
        self.num_rows = int(self._shard_starts[-1])
        self._reset()

    def gather(self, rows: NDArray[np.int64]) -> Columns:
        """Return the rows, in the given order."""
        batch, local = self._locate(np.ascontiguousarray(rows, np.int64))
        columns: dict[str, NDArray[Any] | RaggedColumn] = {}
        shared = None
        for name in self._columns:
            view, place = self._view(self._dtypes[name]), self._places[name].values[batch]
            if self._offset_types[name] is None:
                columns[name] = view[place + local]
                continue
            if shared is None or name not in self._alike:
                starts, stops = self._list_bounds(name, batch, local)
                lists = starts, stops - starts
                shared = lists if name in self._alike else shared
            else:
                lists = shared
            columns[name] = RaggedColumn(view, place + lists[0], lists[1], owner=self)
        return columns

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Ask the kernel to read these rows' pages ahead, so that a cold disk is not read row by row."""
        if not len(rows):
            return
        rows = np.sort(rows)
        first = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        starts, stops = rows[first], rows[np.append(first[1:], len(rows)) - 1]
        batch, local = self._locate(starts)
        last_batch, last_local = self._locate(stops)
        # A run of rows that crosses into another record batch is left to page faults.
        inside = batch == last_batch
        batch, local, last_local = batch[inside], local[inside], last_local[inside]
        shard = np.searchsorted(self._shard_starts, starts[inside], "right") - 1
        for name in self._columns:
            if self._offset_types[name] is not None:
                first_value, width = self._places[name].values[batch], self._dtypes[name].itemsize
                low = first_value + self._list_bounds(name, batch, local)[0]
                high = first_value + self._list_bounds(name, batch, last_local)[1]
                self._read_ahead(shard, self._base + low * width, self._base + high * width)

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process without the maps."""
        return {name: self.__dict__[name] for name in ("_paths", "_columns", "_shard_starts", "num_rows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the files anew when they are used."""
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._shards: dict[int, _Shard] = {}
        self._schema: pa.Schema | None = None

    def _locate(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each row's record batch and its number inside it."""
        # Negative numbers are the largest when they are read without sign.
        if len(rows) and rows.view(np.uint64).max() >= self.num_rows:
            raise DataError(
                f"rows {rows.min()} to {rows.max()} are not all inside the {self.num_rows} there are"
            )
        if len(self._shards) < len(self._paths):
            shards = np.unique(np.searchsorted(self._shard_starts, rows, "right") - 1).tolist()
            missing = [shard for shard in shards if shard not in self._shards]
            if missing or not self._shards:
                self._open(missing or [0])
        batch = np.searchsorted(self._batch_starts, rows, "right") - 1
        return batch, rows - self._batch_starts[batch]

    def _list_bounds(
        self, name: str, batch: NDArray[np.int64], local: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the rows' lists start and stop among the record batch's values."""
        dtype = self._offset_types[name]
        assert dtype is not None
        view, place = self._view(dtype), self._places[name].offsets[batch] + local
        return view[place].astype(np.int64), view[place + 1].astype(np.int64)

    def _open(self, numbers: list[int]) -> None:
        """Map further files and lay the tables and the view over all that are mapped."""
        for number in numbers:
            self._shards[number] = self._map(number)
        shards = [self._shards[number] for number in sorted(self._shards)]
        self._batch_starts = np.concatenate([shard.starts for shard in shards])
        self._alike = frozenset.intersection(*(shard.alike for shard in shards))
        pieces = {
            name: _Pieces(
                *(np.concatenate(part) for part in zip(*(s.pieces[name] for s in shards), strict=True))
            )
            for name in self._columns
        }
        self._span(pieces)

    def _map(self, number: int) -> _Shard:
        """Map a file and check it; its record batches only point into it."""
        path = self._paths[number]
        try:
            region = _mapped(path)
            with pa.ipc.open_stream(region) as stream:
                schema = stream.schema
                batches = [batch for batch in stream if batch.num_rows]
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read as an Arrow stream file ({error})") from error
        try:
            for batch in batches:
                # Rows are copied by address: a length that is more than there is would reach into other memory.
                batch.validate()
        except pa.ArrowException as error:
            raise DataError(f"{path}: a column lies outside the file, which is damaged ({error})") from error
        missing = [name for name in self._columns if name not in schema.names]
        if missing:
            raise DataError(f"{path}: no column {', '.join(missing)}; it has: {', '.join(schema.names)}")
        expected = int(self._shard_starts[number + 1] - self._shard_starts[number])
        starts = offsets_of(np.array([batch.num_rows for batch in batches], np.int64))
        if starts[-1] != expected:
            raise DataError(
                f"{path}: it holds {starts[-1]} rows, not {expected}; copy or convert the data again"
            )
        self._check_columns(schema, batches, path)
        pieces = {name: _pieces([batch.column(name) for batch in batches]) for name in self._columns}
        self._check_places(pieces, path)
        alike = self._check_lists(batches, path)
        return _Shard(region, batches, starts[:-1] + self._shard_starts[number], pieces, alike)

    def _check_columns(self, schema: pa.Schema, batches: list[pa.RecordBatch], path: str) -> None:
        for name in self._columns:
            kind = schema.field(name).type
            check_type(name, kind, path)
            if self._schema is not None and kind != self._schema.field(name).type:
                raise DataError(f"{path}: column {name!r} is {kind}, unlike in the other files")
            for array in (batch.column(name) for batch in batches):
                if array.null_count or (_is_list(kind) and array.values.null_count):
                    raise DataError(f"{path}: column {name!r} has missing values; fill or drop them")
        if self._schema is None:
            self._schema = schema
            kinds = {name: schema.field(name).type for name in self._columns}
            values = {name: kind.value_type if _is_list(kind) else kind for name, kind in kinds.items()}
            self._dtypes = {name: np.dtype(kind.to_pandas_dtype()) for name, kind in values.items()}
            self._offset_types = {
                name: np.dtype(f"i{_offset_width(kind)}") if _is_list(kind) else None
                for name, kind in kinds.items()
            }

    def _check_places(self, pieces: dict[str, _Pieces], path: str) -> None:
        """Refuse numbers that lie between the places of an array of their kind, which no writer of Arrow makes."""
        for name, column in pieces.items():
            offset_type = self._offset_types[name]
            width = 1 if offset_type is None else offset_type.itemsize
            if (column.values % self._dtypes[name].itemsize).any() or (column.offsets % width).any():
                raise DataError(f"{path}: column {name!r} is not aligned; the file is damaged")

    def _check_lists(self, batches: list[pa.RecordBatch], path: str) -> frozenset[str]:
        """Check once that all lists lie inside their file; return the columns whose lists are alike."""
        lists = [name for name in self._columns if self._offset_types[name] is not None]
        alike = set(lists)
        for batch in batches:
            first = None
            for name in lists:
                offsets = batch.column(name).offsets.to_numpy()
                if (
                    offsets[0] < 0
                    or offsets[-1] > len(batch.column(name).values)
                    or (np.diff(offsets) < 0).any()
                ):
                    raise DataError(f"{path}: a list {name!r} lies outside the file, which is damaged")
                first = offsets if first is None else first
                if not np.array_equal(offsets, first):
                    alike.discard(name)
        return frozenset(alike)

    def _span(self, pieces: dict[str, _Pieces]) -> None:
        """Lay one view over the address range of all columns; only mapped places in it are ever touched."""
        low, high = 1 << 62, 0
        for name, column in pieces.items():
            lists = [column.offsets] if self._offset_types[name] is not None else []
            for addresses in [column.values[column.num_values > 0], *lists]:
                low = min(low, int(addresses.min(initial=low)))
            high = max(high, int((column.values + column.num_values * self._dtypes[name].itemsize).max()))
        high = max(high, *(shard.region.address + shard.region.size for shard in self._shards.values()))
        self._base = low // 8 * 8
        size = -(-(high - self._base) // 8) * 8
        self._whole = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self._base))
        self._whole.flags.writeable = False
        self._views: dict[np.dtype[Any], NDArray[Any]] = {}
        self._places = {}
        for name, column in pieces.items():
            offset_type = self._offset_types[name]
            self._places[name] = _Pieces(
                (column.values - self._base) // self._dtypes[name].itemsize,
                (column.offsets - self._base) // (1 if offset_type is None else offset_type.itemsize),
                column.num_values,
            )

    def _view(self, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the address range as an array of `dtype`: element i lies at address base + i * itemsize."""
        if dtype not in self._views:
            self._views[dtype] = self._whole.view(dtype)
        return self._views[dtype]

    def _read_ahead(self, shards: NDArray[np.int64], low: NDArray[np.int64], high: NDArray[np.int64]) -> None:
        for number in np.unique(shards).tolist():
            region, here = self._shards[number].region, shards == number
            descriptor = os.open(self._paths[number], os.O_RDONLY)
            try:
                for start, stop in zip(low[here].tolist(), high[here].tolist(), strict=True):
                    if region.address <= start and stop <= region.address + region.size:
                        place = start - region.address
                        os.posix_fadvise(descriptor, place, stop - start, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _offset_width(kind: pa.DataType) -> int:
    return 8 if pa.types.is_large_list(kind) else 4


def _mapped(path: str) -> pa.Buffer:
    """Map a file, once for all who read it: resident memory counts its pages for each map."""
    facts = os.stat(path)
    key = (path, facts.st_ino, facts.st_size, facts.st_mtime_ns)
    region = _mapped_files.get(key)
    if region is None:
        with pa.memory_map(path) as file:
            region = _mapped_files[key] = file.read_buffer()
    return region


def _pieces(arrays: list[Any]) -> _Pieces:
    """Collect where the arrays of one column lie."""
    table = np.zeros((3, len(arrays)), np.int64)
    for index, array in enumerate(arrays):
        inner = array
        if _is_list(array.type):
            inner = array.values
            table[1, index] = array.buffers()[1].address + array.offset * _offset_width(array.type)
        data = inner.buffers()[-1]
        table[0, index] = (data.address if data is not None else 0) + inner.offset * inner.type.bit_width // 8
        table[2, index] = len(inner)
    return _Pieces(*table)
