"""Read the matrices of an h5ad file by rows in bounded memory: CSR, dense, and CSC through a file on disk."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import h5py
import numpy as np

from data.errors import DataError

VALUES_PER_CHUNK = 1 << 17
"""Stored values handled at once: small enough for the processor's cache, large enough to hide overheads."""
_DENSE_BYTES_PER_CHUNK = 1 << 25
_CSC_VALUES_PER_BUCKET = 1 << 21
_SAMPLE_VALUES = 1 << 21
_SAMPLE_PIECES = 8


@dataclass(frozen=True)
class MatrixChunk:
    """Hold consecutive cells of a matrix as compressed rows, with values as stored."""

    first_row: int
    offsets: np.ndarray
    """int64 [rows + 1], starting at 0."""
    columns: np.ndarray
    """Gene position in the file [nnz]."""
    values: np.ndarray
    """[nnz], in the file's type."""

    def of_columns(self, is_kept: np.ndarray) -> "MatrixChunk":
        """Return the same cells without the values of the other columns."""
        positions = np.flatnonzero(is_kept[self.columns])
        offsets = np.searchsorted(positions, self.offsets)
        return MatrixChunk(self.first_row, offsets, self.columns[positions], self.values[positions])


class Matrix(Protocol):
    """Give a matrix by rows, whatever its layout in the file."""

    where: str
    """File and matrix, for messages."""
    shape: tuple[int, int]

    def chunks(self, start: int, stop: int) -> Iterator[MatrixChunk]:
        """Yield the rows [start, stop) in order, a bounded number of values at a time."""
        ...

    def sample(self) -> Iterator[np.ndarray]:
        """Yield stored values from evenly spaced places (all of a small matrix)."""
        ...


class Slices(Protocol):
    """One-dimensional array on disk, read by slices."""

    dtype: Any

    def __len__(self) -> int:
        """Count the values."""
        ...

    def __getitem__(self, key: slice) -> np.ndarray:
        """Read a slice."""
        ...


class _CompressedMatrix:
    """Hold a matrix compressed along one of its axes."""

    _layout: ClassVar[str]
    _axis: ClassVar[int]
    """Along which it is compressed: the row pointers or the column pointers."""

    def __init__(
        self, where: str, shape: tuple[int, int], data: Slices, indices: Slices, indptr: Slices
    ) -> None:
        """Check that the three arrays fit each other."""
        self.where = where
        self.shape = shape
        self.data, self.indices, self.indptr = data, indices, indptr
        check_number_type(where, data.dtype)
        if len(indptr) != shape[self._axis] + 1 or len(data) != len(indices):
            raise DataError(
                f"{where}: damaged {self._layout} matrix: its arrays do not fit its shape {shape}"
            )

    def sample(self) -> Iterator[np.ndarray]:
        """Yield stored values from evenly spaced places (all of a small matrix)."""
        return _sample(self.where, self.data)


class CsrMatrix(_CompressedMatrix):
    """Read compressed rows."""

    _layout, _axis = "CSR", 0

    def chunks(self, start: int, stop: int) -> Iterator[MatrixChunk]:
        """Yield the rows [start, stop) in order, a bounded number of values at a time."""
        rows_at_once = 1 << 16
        for first in range(start, stop, rows_at_once):
            indptr = read(self.where, self.indptr, first, min(first + rows_at_once, stop) + 1).astype(
                np.int64
            )
            if indptr[0] < 0 or indptr[-1] > len(self.data) or (np.diff(indptr) < 0).any():
                raise DataError(f"{self.where}: damaged CSR matrix: its row pointers are not increasing")
            row = 0
            while row < len(indptr) - 1:
                end = int(np.searchsorted(indptr, indptr[row] + VALUES_PER_CHUNK, side="right")) - 1
                end = max(end, row + 1)
                low, high = int(indptr[row]), int(indptr[end])
                columns = read(self.where, self.indices, low, high)
                if len(columns) and (columns.min() < 0 or columns.max() >= self.shape[1]):
                    raise DataError(
                        f"{self.where}: damaged matrix: it names genes outside its {self.shape[1]}"
                    )
                values = read(self.where, self.data, low, high)
                yield MatrixChunk(first + row, indptr[row : end + 1] - low, columns, values)
                row = end


class DenseMatrix:
    """Read a plain two-dimensional array."""

    def __init__(self, where: str, dataset: h5py.Dataset) -> None:
        """Take an HDF5 dataset [cells, genes]."""
        self.where = where
        if dataset.ndim != 2:
            raise DataError(f"{where}: it has {dataset.ndim} dimensions, not cells by genes")
        self.shape: tuple[int, int] = (dataset.shape[0], dataset.shape[1])
        self.dataset = dataset
        check_number_type(where, dataset.dtype)

    def chunks(self, start: int, stop: int) -> Iterator[MatrixChunk]:
        """Yield the rows [start, stop) in order, a bounded number of values at a time."""
        num_genes = max(self.shape[1], 1)
        rows_at_once = max(1, 16 * VALUES_PER_CHUNK // num_genes)
        if self.dataset.chunks:
            # Whole HDF5 chunks, where memory allows, so that none is decompressed twice.
            chunk_rows = self.dataset.chunks[0]
            limit = max(1, _DENSE_BYTES_PER_CHUNK // (num_genes * self.dataset.dtype.itemsize))
            rows_at_once = (
                max(rows_at_once // chunk_rows, 1) * chunk_rows if chunk_rows <= limit else rows_at_once
            )
        row = start
        while row < stop:
            end = min(stop, (row // rows_at_once + 1) * rows_at_once)
            block = read(self.where, self.dataset, row, end).reshape(-1)
            nonzero = np.flatnonzero(block != 0)  # NaN is not zero, so it stays and is found
            row_starts = np.arange(end - row + 1, dtype=np.int64) * self.shape[1]
            offsets = np.searchsorted(nonzero, row_starts)
            columns = nonzero - np.repeat(row_starts[:-1], np.diff(offsets))
            yield MatrixChunk(row, offsets, columns, block[nonzero])
            row = end

    def sample(self) -> Iterator[np.ndarray]:
        """Yield values from evenly spaced rows (all of a small matrix)."""
        num_rows, num_genes = self.shape
        wanted = max(_SAMPLE_PIECES, _SAMPLE_VALUES // max(num_genes, 1))
        rows = max(1, wanted // _SAMPLE_PIECES) if num_rows > wanted else max(1, num_rows)
        pieces = _SAMPLE_PIECES if num_rows > wanted else 1
        for start in np.linspace(0, max(num_rows - rows, 0), pieces).astype(np.int64):
            yield read(self.where, self.dataset, int(start), int(start) + rows).reshape(-1)


class CscMatrix(_CompressedMatrix):
    """Hold compressed columns; they are read by rows only after `transpose_to`."""

    _layout, _axis = "CSC", 1

    def chunks(self, start: int, stop: int) -> Iterator[MatrixChunk]:
        """Refuse: call `transpose_to` first."""
        raise NotImplementedError("compressed columns are read by rows through transpose_to")

    def transpose_to(self, path: Path) -> None:
        """Write the matrix by rows to `path` and `path`.indptr, for `open_transposed`.

        Two passes over the file: the first counts the values of each cell, the second distributes them to
        buckets of cells inside `path`, each of which is then sorted in memory. Disk: 8 bytes and the size of
        a value for each stored value. Memory: 24 bytes a cell and about 200 MB.
        """
        num_rows = self.shape[0]
        per_row = np.zeros(num_rows, np.int64)
        for start, stop in _steps(len(self.indices), _CSC_VALUES_PER_BUCKET):
            rows = read(self.where, self.indices, start, stop)
            if rows.min() < 0 or rows.max() >= num_rows:
                raise DataError(f"{self.where}: damaged matrix: it names cells outside its {num_rows}")
            per_row += np.bincount(rows, minlength=num_rows)
        row_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(per_row)])
        del per_row
        bucket_rows = _bucket_boundaries(row_starts)
        record = _record_type(self.data.dtype)
        with path.open("wb+") as file:
            self._distribute(file.fileno(), row_starts, bucket_rows, record)
            for first, last in zip(bucket_rows[:-1], bucket_rows[1:], strict=True):
                low, high = int(row_starts[first]), int(row_starts[last])
                file.seek(low * record.itemsize)
                records = np.fromfile(file, record, count=high - low)
                records = records.take(_stable_order(records["row"] - first, last - first))
                _write_at(file.fileno(), records, low * record.itemsize)
        row_starts.tofile(f"{path}.indptr")

    def _distribute(
        self, file: int, row_starts: np.ndarray, bucket_rows: np.ndarray, record: np.dtype
    ) -> None:
        """Append every stored value to the bucket of its cell; columns stay in order within a bucket."""
        num_buckets = len(bucket_rows) - 1
        bucket_of_row = np.repeat(np.arange(num_buckets, dtype=np.uint32), np.diff(bucket_rows))
        cursors = row_starts[bucket_rows[:-1]].copy()
        column_starts = read(self.where, self.indptr, 0, self.shape[1] + 1).astype(np.int64)
        if column_starts[0] != 0 or column_starts[-1] != len(self.data) or (np.diff(column_starts) < 0).any():
            raise DataError(f"{self.where}: damaged CSC matrix: its column pointers are not increasing")
        for start, stop in _steps(len(self.data), _CSC_VALUES_PER_BUCKET):
            records = np.empty(stop - start, record)
            records["row"] = read(self.where, self.indices, start, stop)
            records["column"] = np.repeat(
                np.arange(self.shape[1], dtype=np.int32), np.diff(np.clip(column_starts, start, stop))
            )
            records["value"] = read(self.where, self.data, start, stop)
            buckets = bucket_of_row[records["row"]]
            records = records.take(_stable_order(buckets, num_buckets))
            ends = np.cumsum(np.bincount(buckets, minlength=num_buckets))
            begin = 0
            for bucket in np.flatnonzero(np.diff(ends, prepend=0)):
                end = int(ends[bucket])
                _write_at(file, records[begin:end], int(cursors[bucket]) * record.itemsize)
                cursors[bucket] += end - begin
                begin = end

    def open_transposed(self, path: Path) -> CsrMatrix:
        """Return the rows that `transpose_to` wrote."""
        record = _record_type(self.data.dtype)
        return CsrMatrix(
            self.where,
            self.shape,
            data=_FileSlices(path, record, "value"),
            indices=_FileSlices(path, record, "column"),
            indptr=_FileSlices(Path(f"{path}.indptr"), np.dtype(np.int64)),
        )


class _FileSlices:
    """Read slices of a plain file of numbers, or of one field of its records."""

    def __init__(self, path: Path, record: np.dtype, field: str | None = None) -> None:
        self.path = path
        self.record = record
        self.field = field
        self.dtype = record if field is None else record[field]

    def __len__(self) -> int:
        return self.path.stat().st_size // self.record.itemsize

    def __getitem__(self, key: slice) -> np.ndarray:
        offset = key.start * self.record.itemsize
        records = np.fromfile(self.path, self.record, count=key.stop - key.start, offset=offset)
        return records if self.field is None else np.ascontiguousarray(records[self.field])


def read(where: str, array: Any, start: int, stop: int) -> np.ndarray:
    """Read a slice of an array in a file, naming the file where it is damaged."""
    with reading(where):
        return array[start:stop]


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Name the file in what h5py raises where a file is damaged."""
    try:
        yield
    except DataError:
        raise
    # What h5py raises; MemoryError for lengths that no memory holds, TypeError for types that Python has not.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, MemoryError) as error:
        raise DataError(f"{where}: cannot be read: the file is truncated or damaged ({error})") from error


def check_number_type(where: str, dtype: Any) -> None:
    """Refuse a matrix that does not hold real numbers."""
    if np.dtype(dtype).kind not in "fiub":
        raise DataError(f"{where}: its values have type {dtype}, not a number type")


def _stable_order(keys: np.ndarray, num_keys: int) -> np.ndarray:
    """Return what sorts small numbers and keeps equal ones in order; 16 bits are sorted by radix."""
    return np.argsort(keys.astype(np.uint16) if num_keys <= 1 << 16 else keys, kind="stable")


def _write_at(file: int, records: np.ndarray, offset: int) -> None:
    """Write records at a place in a file; a disk that fills up half-way raises on the next call."""
    content = memoryview(records.tobytes())
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written


def _sample(where: str, data: Slices) -> Iterator[np.ndarray]:
    size = len(data)
    if size <= _SAMPLE_VALUES:
        yield read(where, data, 0, size)
        return
    piece = _SAMPLE_VALUES // _SAMPLE_PIECES
    for start in np.linspace(0, size - piece, _SAMPLE_PIECES).astype(np.int64):
        yield read(where, data, int(start), int(start) + piece)


def _steps(size: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, size, step):
        yield start, min(start + step, size)


def _bucket_boundaries(row_starts: np.ndarray) -> np.ndarray:
    """Cut the rows where a bucket would exceed its number of values."""
    boundaries = [0]
    while boundaries[-1] < len(row_starts) - 1:
        limit = row_starts[boundaries[-1]] + _CSC_VALUES_PER_BUCKET
        boundaries.append(max(int(np.searchsorted(row_starts, limit, side="right")) - 1, boundaries[-1] + 1))
    return np.array(boundaries, np.int64)


def _record_type(value_type: Any) -> np.dtype:
    return np.dtype([("row", np.int32), ("column", np.int32), ("value", value_type)])
