"""Columns of rows in memory: one number a row, or one ragged list a row."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.errors import DataError
from data.ragged import gather, offsets_of


class RaggedColumn(NamedTuple):
    """Hold a list of numbers for each row: `values[offsets[i] : offsets[i + 1]]`."""

    offsets: NDArray[np.int64]  # [B + 1]
    values: NDArray[Any]

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Return each row's number of values."""
        return np.diff(self.offsets)

    def take(self, index: NDArray[np.integer]) -> "RaggedColumn":
        """Return a copy of these rows, in the order of `index`."""
        lengths = self.lengths[index]
        return RaggedColumn(offsets_of(lengths), gather(self.values, self.offsets[index], lengths))


Columns = Mapping[str, NDArray[Any] | RaggedColumn]


class RowTable(Protocol):
    """Give any rows of a table by number."""

    num_rows: int

    def gather(self, rows: NDArray[np.int64]) -> Columns:
        """Return copies of the rows, in the given order."""
        ...

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Prepare for rows that will be asked for soon; no rows: drop what was prepared and stop reading."""
        ...


def take(columns: Columns, index: NDArray[np.integer]) -> Columns:
    """Return a copy of these rows of every column."""
    return {
        name: column.take(index) if isinstance(column, RaggedColumn) else column[index]
        for name, column in columns.items()
    }


def concatenate(parts: Sequence[Columns]) -> Columns:
    """Put the rows of several tables one after the other."""
    if len(parts) == 1:
        return parts[0]
    result: dict[str, NDArray[Any] | RaggedColumn] = {}
    for name, first in parts[0].items():
        columns: list[Any] = [part[name] for part in parts]
        if isinstance(first, RaggedColumn):
            lengths = np.concatenate([column.lengths for column in columns])
            values = np.concatenate([column.values for column in columns])
            result[name] = RaggedColumn(offsets_of(lengths), values)
        else:
            result[name] = np.concatenate(columns)
    return result


def check_type(name: str, kind: pa.DataType, where: str) -> None:
    """Refuse a column that is neither numbers nor lists of numbers."""
    value = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    if not (pa.types.is_integer(value) or pa.types.is_floating(value)):
        raise DataError(
            f"{where}: column {name!r} is of type {kind}; only numbers and lists of numbers can be read"
        )


def from_arrow(column: pa.ChunkedArray, name: str, where: str) -> NDArray[Any] | RaggedColumn:
    """Turn an Arrow column into one of ours, without copying where it is in one piece."""
    if pa.types.is_fixed_size_list(column.type):
        column = column.cast(pa.list_(column.type.value_type))
    check_type(name, column.type, where)
    array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # no chunk at all, or more than one array can hold
        array = pa.concat_arrays(array.chunks or [pa.array([], column.type)])
    if array.null_count:
        raise DataError(f"{where}: column {name!r} has {array.null_count} missing values; fill or drop them")
    if not isinstance(array, pa.ListArray | pa.LargeListArray):
        return array.to_numpy(zero_copy_only=False)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values
    if values.null_count:
        raise DataError(f"{where}: column {name!r} has missing values in its lists; fill or drop them")
    flat = values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
    return RaggedColumn(offsets - offsets[0], flat)
