"""Columns of rows in memory: one number a row, or one ragged list a row."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.errors import DataError
from data.ragged import gather, offsets_of, pad


class RaggedColumn:
    """Hold a list of numbers for each row, as places in a source array that are copied when they are needed.

    Copies are laid out as wanted: one list after the other (`values`, with `offsets`), or padded.
    """

    def __init__(
        self,
        source: NDArray[Any],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        owner: object = None,
    ) -> None:
        """Let row i be `source[starts[i] : starts[i] + lengths[i]]`; `owner` keeps the source's memory valid."""
        self._source = source
        self._starts = starts
        self._owner = owner
        self.lengths = lengths

    @classmethod
    def flat(cls, offsets: NDArray[np.int64], values: NDArray[Any]) -> "RaggedColumn":
        """Let row i be `values[offsets[i] : offsets[i + 1]]`."""
        column = cls(values, offsets[:-1], np.diff(offsets))
        column.offsets, column.values = offsets, values
        return column

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.lengths)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the type of the numbers."""
        return self._source.dtype

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Return [B + 1], where each row's list starts in `values`."""
        return offsets_of(self.lengths)

    @cached_property
    def values(self) -> NDArray[Any]:
        """Return all lists, one after the other."""
        return gather(self._source, self._starts, self.lengths)

    def padded(self, width: int, fill: Any, dtype: Any = None) -> NDArray[Any]:
        """Return a new array [B, width], cut or filled up with `fill`, cast to `dtype`."""
        return pad(self._source, self._starts, self.lengths, width, fill, dtype=dtype)

    def take(self, index: NDArray[np.integer]) -> "RaggedColumn":
        """Return these rows, in the order of `index`; nothing is copied yet."""
        return RaggedColumn(self._source, self._starts[index], self.lengths[index], self._owner)

    def cut(self, length: int) -> "RaggedColumn":
        """Return the rows without what is beyond `length`."""
        return RaggedColumn(self._source, self._starts, np.minimum(self.lengths, length), self._owner)


Columns = Mapping[str, NDArray[Any] | RaggedColumn]


class RowTable(Protocol):
    """Give any rows of a table by number."""

    num_rows: int

    def gather(self, rows: NDArray[np.int64]) -> Columns:
        """Return the rows, in the given order."""
        ...

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Prepare for rows that will be asked for soon; no rows: drop what was prepared and stop reading."""
        ...


def take(columns: Columns, index: NDArray[np.integer]) -> Columns:
    """Return these rows of every column."""
    return {
        name: column.take(index) if isinstance(column, RaggedColumn) else column[index]
        for name, column in columns.items()
    }


def concatenate(parts: Sequence[Columns]) -> Columns:
    """Copy the rows of several tables one after the other."""
    result: dict[str, NDArray[Any] | RaggedColumn] = {}
    for name, first in parts[0].items():
        columns: list[Any] = [part[name] for part in parts]
        if isinstance(first, RaggedColumn):
            lengths = np.concatenate([column.lengths for column in columns])
            values = np.concatenate([column.values for column in columns])
            result[name] = RaggedColumn.flat(offsets_of(lengths), values)
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
    return RaggedColumn.flat(offsets - offsets[0], flat)
