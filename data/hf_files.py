"""The files of a Hugging Face data set: which there are, their columns, and rows out of them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data.columns import Columns, RowTable, from_arrow
from data.corpus import find_location
from data.errors import DataError
from data.mapped_shards import MappedShards
from data.parquet_shards import ParquetShards
from data.remote import as_os_error, is_local

FORMATS = ("auto", "arrow", "parquet")


class TechnicalBatch(NamedTuple):
    """Hold the technical batch of every row."""

    names: list[str]
    codes: NDArray[np.int32]  # [rows], positions in `names`


@dataclass(frozen=True)
class HFFiles:
    """Hold the data files of one split."""

    where: str
    """As the user gave it, for messages."""
    storage: Literal["arrow", "parquet"]
    filesystem: fsspec.AbstractFileSystem
    paths: tuple[str, ...]
    folder: str
    schema: pa.Schema

    def check_columns(self, names: Sequence[str]) -> None:
        """Raise where columns are missing, listing those there are."""
        missing = [name for name in dict.fromkeys(names) if name not in self.schema.names]
        if missing:
            there = ", ".join(self.schema.names)
            raise DataError(f"{self.where}: no column {', '.join(missing)}; it has: {there}")

    def table(self, columns: Sequence[str]) -> RowTable:
        """Return what gives any rows of these columns."""
        if self.storage == "parquet":
            return ParquetShards(self.filesystem, self.paths, None, columns)
        if any(pa.types.is_fixed_size_list(self.schema.field(name).type) for name in columns):
            return _DatasetRows(self.folder, columns)
        counts = [sum(batch.num_rows for batch in _stream(path)) for path in self.paths]
        return MappedShards(self.paths, counts, columns)

    def technical_batch(self, column: str) -> TechnicalBatch:
        """Read the column that names each row's technical batch: class labels, text or whole numbers."""
        chunks = [chunk for path in self.paths for chunk in self._read_column(path, column)]
        array = pa.chunked_array(chunks, self.schema.field(column).type)
        if array.null_count:
            raise DataError(f"{self.where}: column {column!r} has {array.null_count} missing values")
        if not (pa.types.is_integer(array.type) or _is_text(array.type)):
            raise DataError(
                f"{self.where}: column {column!r} is of type {array.type}; technical batches are named by text, "
                "class labels or whole numbers"
            )
        encoded = array.combine_chunks().dictionary_encode()
        encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
        labels = _class_names(self.schema, column) if pa.types.is_integer(array.type) else []
        values = encoded.dictionary.to_pylist()
        unnamed = [value for value in values if labels and not 0 <= value < len(labels)]
        if unnamed:
            raise DataError(
                f"{self.where}: column {column!r} has the class {unnamed[0]}, which has no name; leave such rows out"
            )
        found = [labels[value] if labels else str(value) for value in values]
        names = sorted(found)
        place = {name: index for index, name in enumerate(names)}
        order = np.array([place[name] for name in found], np.int32)
        return TechnicalBatch(names, order[encoded.indices.to_numpy()])

    def _read_column(self, path: str, column: str) -> Iterator[pa.Array]:
        if self.storage == "arrow":
            for batch in _stream(path):
                yield batch.column(column)
        else:
            with self.filesystem.open(path, "rb") as file:
                yield from pq.read_table(file, columns=[column]).column(column).chunks


def find_files(path: str | Path | Sequence[str], format: str, split: str | None) -> HFFiles:
    """Find a data set's files: a `save_to_disk` folder, a folder of Parquet files, or Parquet files."""
    if format not in FORMATS:
        raise DataError(f"format: got {format!r}; it must be one of {', '.join(FORMATS)}")
    given = [str(each) for each in path] if isinstance(path, list | tuple) else [str(path)]
    if not given:
        raise DataError("path: got no file")
    where = ", ".join(given[:3]) + (", ..." if len(given) > 3 else "")
    filesystem, root = find_location(given[0])
    roots = [str(filesystem._strip_protocol(each)) for each in given]
    if len(given) > 1 or root.endswith(".parquet"):
        if format == "arrow" or split is not None:
            raise DataError(f"{where}: format: arrow and split need the folder that save_to_disk wrote")
        return _parquet(where, filesystem, roots, root)
    root = _split_folder(filesystem, root.rstrip("/"), split, where)
    if format != "parquet" and filesystem.isfile(f"{root}/state.json"):
        return _arrow(where, filesystem, root)
    found = [] if format == "arrow" else sorted(str(each) for each in filesystem.glob(f"{root}/**/*.parquet"))
    if not found:
        wanted = {"arrow": "state.json", "parquet": "Parquet files"}.get(
            format, "state.json or Parquet files"
        )
        raise DataError(f"{where}: no data set found there: no {wanted}")
    return _parquet(where, filesystem, found, root)


def _split_folder(filesystem: fsspec.AbstractFileSystem, root: str, split: str | None, where: str) -> str:
    """Return the folder of a split where the folder is a `DatasetDict`'s."""
    if not filesystem.isfile(f"{root}/dataset_dict.json"):
        if split is not None:
            raise DataError(f"{where}: split: got {split!r}, but the folder has no splits; leave it out")
        return root
    splits = _described(filesystem, f"{root}/dataset_dict.json", "splits")
    if split not in splits:
        raise DataError(f"{where}: split: got {split!r}; the folder has: {', '.join(map(str, splits))}")
    return f"{root}/{split}"


def _described(filesystem: fsspec.AbstractFileSystem, path: str, key: str) -> list[Any]:
    """Return a list out of a file that says what `save_to_disk` wrote."""
    try:
        content: Any = filesystem.cat_file(path)
    except Exception as error:  # each file system raises what its library does
        raise DataError(f"{path}: cannot be read ({as_os_error(error)})") from error
    try:
        found = json.loads(content)[key]
    except (ValueError, RecursionError, KeyError, TypeError):
        found = None
    if not isinstance(found, list):
        raise DataError(f"{path}: damaged: it holds no list {key}, as save_to_disk writes it")
    return found


def _arrow(where: str, filesystem: fsspec.AbstractFileSystem, root: str) -> HFFiles:
    if not is_local(filesystem):
        raise DataError(
            f"{where}: Arrow files are mapped from a local disk; copy the folder or use Parquet files"
        )
    described = _described(filesystem, f"{root}/state.json", "_data_files")
    names = [each.get("filename") if isinstance(each, dict) else None for each in described]
    if not names or not all(isinstance(name, str) and name and PurePath(name).name == name for name in names):
        raise DataError(f"{root}/state.json: damaged: _data_files names no files of this folder")
    paths = tuple(f"{root}/{name}" for name in names)
    return HFFiles(where, "arrow", filesystem, paths, root, _stream(paths[0]).schema)


def _parquet(where: str, filesystem: fsspec.AbstractFileSystem, paths: Sequence[str], root: str) -> HFFiles:
    footer = ParquetShards(filesystem, paths[:1], None, []).footer(0)
    schema = footer.metadata.schema.to_arrow_schema()
    return HFFiles(where, "parquet", filesystem, tuple(paths), root, schema)


def _stream(path: str) -> Any:
    """Open a mapped Arrow file; iterating gives its record batches."""
    try:
        return pa.ipc.open_stream(pa.memory_map(path))
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: cannot be read as an Arrow stream file ({error})") from error


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _class_names(schema: pa.Schema, column: str) -> list[str]:
    """Return the names of a ClassLabel column, from what `datasets` stored with the schema."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = stored["info"]["features"][column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else []
    except (ValueError, RecursionError, KeyError, TypeError):  # the schema is of another program
        return []


class _DatasetRows:
    """Give rows through `datasets`, for column types that cannot be gathered from the map."""

    def __init__(self, folder: str, columns: Sequence[str]) -> None:
        import datasets  # takes a second to import, and few data sets need it

        dataset = datasets.load_from_disk(folder)
        assert isinstance(dataset, datasets.Dataset)
        self._dataset = dataset.select_columns(list(columns)).with_format("arrow")
        self._columns = list(columns)
        self._folder = folder
        self.num_rows = len(self._dataset)

    def gather(self, rows: NDArray[np.int64]) -> Columns:
        table: Any = self._dataset[rows.tolist()]
        return {name: from_arrow(table.column(name), name, self._folder) for name in self._columns}

    def expect(self, rows: NDArray[np.int64]) -> None:
        del rows
