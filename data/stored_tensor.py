"""A tensor of a safetensors file, mapped: rows are read when they are asked for."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

_TYPES = {
    "I8": "<i1", "U8": "<u1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000


class StoredTensor:
    """Read rows of one tensor of a safetensors file; it may travel to another process."""

    def __init__(self, path: Path, name: str = "0") -> None:
        """Read the file's header and check that the tensor lies in it.

        Raises:
            DataError: the file is missing, damaged or of another format, or the tensor is not in it.
        """
        self.path = path
        entry, start = _read_entry(path, name)
        self.dtype = np.dtype(_TYPES[entry["dtype"]])
        self.shape: tuple[int, ...] = tuple(entry["shape"])
        self._start = start
        self._map: NDArray[Any] | None = None

    def __len__(self) -> int:
        """Count the rows."""
        return self.shape[0]

    def flatten_rows(self) -> None:
        """Take the first two dimensions as one."""
        self.shape, self._map = (self.shape[0] * self.shape[1], *self.shape[2:]), None

    def rows(self, rows: NDArray[np.integer] | slice) -> NDArray[Any]:
        """Return these rows; of a slice it is a view of the file, which must not be written to."""
        if self._map is None:
            self._map = np.memmap(self.path, self.dtype, mode="r", offset=self._start, shape=self.shape)
        return np.asarray(self._map[rows])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the mapping behind."""
        return {**self.__dict__, "_map": None}


def _read_entry(path: Path, name: str) -> tuple[dict[str, Any], int]:
    """Return a tensor's entry in the header and where in the file it starts."""
    try:
        with path.open("rb") as file:
            num_bytes = file.seek(0, 2)
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(num_bytes - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length:,} bytes in a file of {num_bytes:,}")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no table")
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: there is no such file; config.yaml says that it is part of the data"
        ) from error
    except (OSError, struct.error, ValueError, RecursionError) as error:
        raise DataError(f"{path}: it is no safetensors file, or a damaged one ({error})") from error
    names = sorted(header.keys() - {"__metadata__"})
    if name not in names:
        raise DataError(f"{path}: it has no tensor '{name}'; it has: {', '.join(names[:8]) or 'none'}")
    entry = _checked(header[name], num_bytes - 8 - length, f"{path}: tensor '{name}'")
    return entry, 8 + length + entry["data_offsets"][0]


def _checked(entry: Any, num_bytes: int, where: str) -> dict[str, Any]:
    """Check that an entry describes a tensor inside the file's `num_bytes` of data."""
    match entry:
        case {
            "dtype": str() as dtype,
            "shape": list() as shape,
            "data_offsets": [int() as start, int() as stop],
        }:
            pass
        case _:
            raise DataError(f"{where}: its entry in the header is damaged")
    if dtype not in _TYPES:
        raise DataError(f"{where}: its numbers are {dtype}; they must be {', '.join(_TYPES)}")
    if not shape or not all(type(size) is int and size >= 0 for size in shape):
        raise DataError(f"{where}: its shape is {shape}; it must have rows")
    size = math.prod(shape) * np.dtype(_TYPES[dtype]).itemsize
    if not 0 <= start <= stop <= num_bytes or stop - start != size:
        raise DataError(f"{where}: {size:,} bytes are said to lie at {start:,} to {stop:,} of {num_bytes:,}")
    if size == 0:
        raise DataError(f"{where}: its shape is {shape}, so there is nothing in it")
    return entry
