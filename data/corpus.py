"""The converted corpus on disk (format 1): its description, opening one, and writing its shards.

A corpus is a folder that `datasets.load_from_disk` opens. `manifest.json` and, for Arrow, `state.json` are
written last, so a folder whose conversion was interrupted is not loadable by anybody.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data import remote
from data.errors import DataError
from data.genes import GeneSpace
from data.manifest import (
    Manifest,
    ObsColumn,
    Shard,
    SourceRecord,
    Storage,
    corpus_features,
    corpus_schema,
)

ROWS_PER_BATCH = 8192
"""Most rows of one Arrow record batch."""
ROWS_PER_GROUP = 1024
"""Rows of one Parquet row group."""
UNFINISHED = ".unfinished"
"""Folder inside the corpus folder that holds everything of a conversion that has not ended."""
_DESCRIPTION_FILES = ("state.json", "manifest.json", "dataset_info.json", "genes.json")


@dataclass(frozen=True)
class CorpusInfo:
    """Hold an opened corpus: where it is, its manifest and its gene space."""

    path: str
    """As the user gave it."""
    filesystem: fsspec.AbstractFileSystem
    root: str
    """Path of the folder inside `filesystem`."""
    manifest: Manifest
    gene_space: GeneSpace

    @property
    def num_cells(self) -> int:
        """Count the cells."""
        return self.manifest.num_cells

    @property
    def columns(self) -> dict[str, ObsColumn]:
        """Return the kept obs columns by name."""
        return self.manifest.columns

    @property
    def shard_paths(self) -> list[str]:
        """Return the path of each shard inside `filesystem`."""
        return [f"{self.root}/{shard.file}" for shard in self.manifest.shards]

    @property
    def shard_rows(self) -> list[int]:
        """Return how many rows each shard holds."""
        return [shard.rows for shard in self.manifest.shards]

    @cached_property
    def fingerprint(self) -> str:
        """Identify the cells and the gene space by hash, wherever the folder lies."""
        content = [self.gene_space.sha256, *(shard.sha256 for shard in self.manifest.shards)]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    def class_names(self, column: str) -> tuple[str, ...]:
        """Return the names of a class column, or raise listing the class columns there are."""
        found = self.columns.get(column)
        if found is None or found.kind != "class":
            known = [name for name, each in self.columns.items() if each.kind == "class"]
            raise DataError(f"{self.path}: no class column {column!r}; it has: {', '.join(known) or 'none'}")
        return found.names


def open_corpus(path: str | Path) -> CorpusInfo:
    """Open a converted corpus (a folder or an fsspec URL of one) and check that it is complete."""
    folder = CorpusFolder.at(path)
    manifest = Manifest.from_json(folder.manifest_text(), where=f"{path}/manifest.json")
    if manifest.storage == "arrow" and folder.read("state.json") is None:
        raise DataError(f"{path}: conversion not finished: run the same command again (no state.json)")
    genes = folder.read("genes.json")
    if genes is None:
        raise DataError(f"{path}: genes.json is missing; convert the files again")
    gene_space = GeneSpace.from_json(genes, where=f"{path}/genes.json")
    if gene_space.sha256 != manifest.gene_sha256:
        raise DataError(f"{path}: genes.json is not the gene space that manifest.json was written with")
    if folder.is_local:
        for shard in manifest.shards:
            file = Path(folder.root, shard.file)
            size = file.stat().st_size if file.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, not {shard.bytes}"
                raise DataError(f"{path}: shard {shard.file} {found}; copy or convert the corpus again")
    return CorpusInfo(str(path), folder.filesystem, folder.root, manifest, gene_space)


def find_location(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of a path or an fsspec URL, and the path inside it."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ValueError, ImportError, OSError) as error:
        raise DataError(f"{path}: {error}") from error


class CorpusFolder(NamedTuple):
    """Say where a corpus lies."""

    path: str
    """As the user gave it."""
    filesystem: fsspec.AbstractFileSystem
    root: str
    """Path of the folder inside `filesystem`."""

    @classmethod
    def at(cls, path: str | Path) -> "CorpusFolder":
        """Find the folder of a path or an fsspec URL."""
        filesystem, root = find_location(str(path))
        folder = cls(str(path), filesystem, root.rstrip("/"))
        try:
            is_missing = folder.is_local and not Path(folder.root).is_dir()
        except OSError as error:
            raise DataError(f"{path}: cannot be opened ({error.strerror or error})") from error
        if is_missing:
            raise DataError(
                f"{path}: no such folder; `python -m trainer.convert_h5ad` makes a corpus from h5ad files"
            )
        return folder

    @property
    def is_local(self) -> bool:
        """Tell whether its files are files of this machine."""
        return remote.is_local(self.filesystem)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file of the folder, None where there is none.

        Raises:
            DataError: it cannot be read.
        """
        try:
            return self.read_or_raise(name)
        except OSError as error:
            raise DataError(f"{self.path}: {name} cannot be read ({error.strerror or error})") from error

    def read_or_raise(self, name: str) -> bytes | None:
        """Do the same, with an OSError."""
        path = f"{self.root}/{name}"
        try:
            # Reading what is no file, such as a pipe, would wait for a writer.
            if self.is_local and Path(path).exists() and not Path(path).is_file():
                raise OSError("it is no regular file")
            content: Any = self.filesystem.cat_file(path)
        except FileNotFoundError:
            return None
        except Exception as error:
            raise remote.as_os_error(error) from error
        return content

    def manifest_text(self) -> bytes:
        """Return the content of `manifest.json`."""
        text = self.read("manifest.json")
        if text is None:
            raise DataError(
                f"{self.path}: conversion not finished: run the same command again (no manifest.json)"
            )
        return text


class ShardWriter:
    """Write the rows of one data file; the caller names it, syncs it and makes it visible."""

    def __init__(self, path: Path, schema: pa.Schema, storage: Storage) -> None:
        """Open the file; `schema` is `corpus_schema`'s."""
        self.schema = schema
        self.num_rows = 0
        self._sink = pa.OSFile(str(path), "wb")
        if storage == "arrow":
            self._writer = pa.ipc.new_stream(self._sink, schema)
        else:
            self._writer = pq.ParquetWriter(
                self._sink,
                schema,
                compression="zstd",
                use_dictionary=False,
                column_encoding={
                    "genes.list.element": "DELTA_BINARY_PACKED",
                    "counts.list.element": "BYTE_STREAM_SPLIT",
                },
                write_page_index=True,
            )

    def write(
        self, offsets: np.ndarray, genes: np.ndarray, counts: np.ndarray, scalars: Mapping[str, np.ndarray]
    ) -> None:
        """Append rows: int32 offsets [B + 1], genes and counts [nnz], one array [B] for each other column."""
        num_rows = len(offsets) - 1
        if num_rows == 0:
            return
        arrow_offsets = _arrow_array(offsets, pa.int32())
        values = {"genes": genes, "counts": counts}
        columns: list[pa.Array] = []
        for field in self.schema:
            if field.name in values:
                array = _arrow_array(values[field.name], field.type.value_type)
                columns.append(pa.ListArray.from_arrays(arrow_offsets, array))
            else:
                columns.append(_arrow_array(scalars[field.name], field.type))
        batch = pa.RecordBatch.from_arrays(columns, schema=self.schema)
        if isinstance(self._writer, pq.ParquetWriter):
            self._writer.write_batch(batch, row_group_size=ROWS_PER_GROUP)
        else:
            self._writer.write_batch(batch)
        self.num_rows += num_rows

    def close(self) -> None:
        """Write the end of the file."""
        try:
            self._writer.close()
        finally:
            self._sink.close()

    def abandon(self) -> None:
        """Close the file without caring for its content."""
        try:
            self.close()
        except OSError:
            self._sink.close()


def _arrow_array(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Wrap numbers without a copy; `pa.array` would import pandas, half a second and 50 MB."""
    values = np.ascontiguousarray(values, kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def sync_file(path: Path) -> None:
    """Make a file's (or folder's) content survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file_atomically(path: Path, text: str) -> None:
    """Write a text file that is either absent (or as it was) or complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    sync_file(temporary)
    os.replace(temporary, path)
    sync_file(path.parent)


def shard_name(index: int, num_shards: int, storage: Storage) -> str:
    """Return the final name of a data file."""
    return f"data-{index:05d}-of-{num_shards:05d}.{storage}"


def publish_corpus(folder: Path, manifest: Manifest, gene_space: GeneSpace, parts: Sequence[Path]) -> None:
    """Move finished parts to their final names and describe them; replaces a corpus that was there.

    May be called again after it was interrupted: a part that is no longer there has been moved.
    """
    for name in _DESCRIPTION_FILES:
        (folder / name).unlink(missing_ok=True)
    sync_file(folder)
    names = [shard.file for shard in manifest.shards]
    for part, name in zip(parts, names, strict=True):
        if part.exists():
            os.replace(part, folder / name)
    for stale in [*folder.glob("data-*-of-*.arrow"), *folder.glob("data-*-of-*.parquet")]:
        if stale.name not in names:
            stale.unlink()
    write_file_atomically(folder / "genes.json", gene_space.to_json())
    if manifest.storage == "arrow":
        write_file_atomically(folder / "dataset_info.json", json.dumps(dataset_info(manifest), indent=1))
    write_file_atomically(folder / "manifest.json", manifest.to_json())
    if manifest.storage == "arrow":
        state = dataset_state(names, manifest.to_json().encode())
        write_file_atomically(folder / "state.json", json.dumps(state, indent=1))


def dataset_info(manifest: Manifest) -> dict[str, Any]:
    """Return the content of `dataset_info.json`, the features as Hugging Face `datasets` describes them."""
    features = corpus_features(manifest.count_dtype, manifest.columns)
    return {"citation": "", "description": "", "homepage": "", "license": "", "features": features}


def dataset_state(shard_names: Sequence[str], manifest_text: bytes) -> dict[str, Any]:
    """Return the content of `state.json`, which names the shards and has a hash of `manifest.json`."""
    return {
        "_data_files": [{"filename": name} for name in shard_names],
        "_fingerprint": hashlib.sha256(manifest_text).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }


class CorpusWriter:
    """Write a corpus from rows in memory, as a context manager; nothing is loadable before it ends well."""

    def __init__(
        self,
        folder: str | Path,
        gene_space: GeneSpace,
        *,
        columns: Mapping[str, ObsColumn] | None = None,
        value_kind: Literal["counts", "lognorm"] = "counts",
        count_dtype: str | None = None,
        storage: Storage = "arrow",
        control_label: str | None = None,
        rows_per_shard: int = 50_000,
        source_name: str = "generated",
    ) -> None:
        """Prepare an empty or absent folder; `count_dtype` defaults to uint16, or float32 for lognorm."""
        self.folder = Path(folder)
        self.gene_space = gene_space
        self.columns = dict(columns or {})
        self.value_kind: Literal["counts", "lognorm"] = value_kind
        self.count_dtype = count_dtype or ("uint16" if value_kind == "counts" else "float32")
        self.storage: Storage = storage
        self.control_label = control_label
        self.rows_per_shard = rows_per_shard
        self.source_name = source_name
        self._schema = corpus_schema(self.count_dtype, self.columns)
        self._parts: list[Path] = []
        self._rows: list[int] = []
        self._n_nonzero = 0
        self._shard: ShardWriter | None = None
        if self.folder.exists() and any(self.folder.iterdir()):
            raise DataError(f"{folder}: the folder is not empty")
        self._unfinished = self.folder / UNFINISHED
        self._unfinished.mkdir(parents=True)

    def __enter__(self) -> "CorpusWriter":
        """Return the writer."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the corpus, or remove what was written if the block raised."""
        try:
            if kind is None:
                self._publish()
            elif self._shard is not None:
                self._shard.abandon()
        finally:
            shutil.rmtree(self._unfinished)

    def write(
        self,
        offsets: np.ndarray,
        genes: np.ndarray,
        counts: np.ndarray,
        columns: Mapping[str, np.ndarray] | None = None,
        totals: np.ndarray | None = None,
        n_genes: np.ndarray | None = None,
    ) -> None:
        """Append cells: int offsets [B + 1], genes and counts [nnz], one array [B] for each obs column.

        `totals` and `n_genes` describe the cell before genes were dropped; they default to what is written.
        """
        offsets = np.asarray(offsets, np.int64)
        genes, counts = np.asarray(genes, np.int32), np.asarray(counts)
        self._check_rows(offsets, genes, counts)
        lengths = np.diff(offsets)
        if totals is None:
            sums = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
            totals = sums[offsets[1:]] - sums[offsets[:-1]]
        scalars = {
            **{name: np.asarray((columns or {})[name]) for name in self.columns},
            "source": np.zeros(len(lengths), np.int16),
            "total": np.asarray(totals, np.float32),
            "n_genes": np.asarray(lengths if n_genes is None else n_genes, np.int32),
        }
        start = 0
        while start < len(lengths):
            if self._shard is None or self._shard.num_rows == self.rows_per_shard:
                self._next_shard()
            assert self._shard is not None
            stop = min(
                start + ROWS_PER_BATCH, len(lengths), start + self.rows_per_shard - self._shard.num_rows
            )
            low, high = offsets[start], offsets[stop]
            rows = {name: values[start:stop] for name, values in scalars.items()}
            local = (offsets[start : stop + 1] - low).astype(np.int32)
            self._shard.write(local, genes[low:high], counts[low:high].astype(self.count_dtype), rows)
            start = stop
        self._n_nonzero += len(genes)

    def _check_rows(self, offsets: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> None:
        lengths = np.diff(offsets)
        if offsets[0] != 0 or offsets[-1] != len(genes) or len(genes) != len(counts) or (lengths < 0).any():
            raise DataError("rows to write: offsets do not fit the genes and counts")
        if len(genes) and (genes.min() < 0 or genes.max() >= len(self.gene_space)):
            raise DataError(f"rows to write: gene indices lie outside [0, {len(self.gene_space)})")
        is_first = np.zeros(len(genes) + 1, dtype=bool)
        is_first[offsets] = True
        if not (is_first[1:-1] | (genes[1:] > genes[:-1])).all():
            raise DataError("rows to write: gene indices do not increase strictly inside each cell")
        with np.errstate(invalid="ignore"):
            is_exact = np.array_equal(counts.astype(self.count_dtype), counts)
        if not is_exact:
            raise DataError(f"rows to write: counts are not exact in {self.count_dtype}")

    def _next_shard(self) -> None:
        self._close_shard()
        self._parts.append(self._unfinished / f"shard-{len(self._parts):05d}")
        self._shard = ShardWriter(self._parts[-1], self._schema, self.storage)

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shard.close()
            self._rows.append(self._shard.num_rows)
            sync_file(self._parts[-1])

    def _publish(self) -> None:
        self._close_shard()
        shards = tuple(
            Shard(
                shard_name(index, len(self._parts), self.storage), rows, hash_file(part), part.stat().st_size
            )
            for index, (part, rows) in enumerate(zip(self._parts, self._rows, strict=True))
        )
        if not shards:
            raise DataError(f"{self.folder}: no cell was written")
        num_genes = len(self.gene_space)
        source = SourceRecord(
            path_name=self.source_name, sha256="", bytes=0, rows=sum(self._rows), matrix="X",
            genes_total=num_genes, genes_matched=num_genes, counts_dropped_fraction=0.0, cells_dropped=0,
            measured_genes=((0, num_genes),),
        )  # fmt: skip
        batches = self.columns.get("technical_batch")
        manifest = Manifest(
            value_kind=self.value_kind, count_dtype=self.count_dtype, num_cells=sum(self._rows),
            n_nonzero=self._n_nonzero, storage=self.storage, gene_sha256=self.gene_space.sha256,
            shards=shards, sources=(source,), technical_batches=batches.names if batches else (),
            control_label=self.control_label, columns=self.columns,
        )  # fmt: skip
        publish_corpus(self.folder, manifest, self.gene_space, self._parts)
