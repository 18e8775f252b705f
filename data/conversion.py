"""Convert h5ad files to shards of a corpus: the plan of a conversion and the work on one shard.

A shard depends on the plan alone, so shards can be made in any order and process with the same bytes.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.cell_rows import BadValueError, CellRows, ValueKind, cell_rows
from data.corpus import ROWS_PER_BATCH, UNFINISHED, ShardWriter, hash_file, sync_file
from data.errors import DataError
from data.genes import NOT_A_GENE, GeneSpace
from data.h5ad import H5adFile
from data.h5ad_matrix import CscMatrix, Matrix, MatrixChunk
from data.hashing import sha256_of
from data.manifest import UNLABELLED, ObsColumn, Storage, corpus_schema

FILE_LABEL = "@file"
"""Stands for the name of the source file where an obs column is expected."""
_VALUES_PER_BATCH = 1 << 24


@dataclass(frozen=True)
class SourcePlan:
    """Say what is read from one source file."""

    path: Path
    matrix: str
    num_cells: int
    remap: np.ndarray
    """int32: the corpus index of each column of the matrix, -1 where the gene is dropped, or `NOT_A_GENE`."""
    obs: dict[str, str]
    """The obs column (or `@file`) that each kept column of the corpus is read from."""

    @property
    def stem(self) -> str:
        """Return the file name without its ending."""
        return self.path.name.removesuffix(".h5ad")


class Segment(NamedTuple):
    """Name consecutive cells of one source."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class ConversionPlan:
    """Hold everything that decides the bytes of a corpus."""

    folder: Path
    sources: tuple[SourcePlan, ...]
    gene_space: GeneSpace
    columns: dict[str, ObsColumn]
    value_kind: ValueKind
    control_label: str | None
    min_genes: int
    storage: Storage
    rows_per_shard: int

    @property
    def unfinished(self) -> Path:
        """Return the folder for what is not finished."""
        return self.folder / UNFINISHED

    @cached_property
    def num_cells(self) -> int:
        """Count the cells of the sources."""
        return sum(source.num_cells for source in self.sources)

    @property
    def num_shards(self) -> int:
        """Count the shards, some of which may turn out empty."""
        return -(-self.num_cells // self.rows_per_shard)

    @property
    def count_dtype(self) -> str:
        """Return the type that counts are tried in first."""
        return "uint16" if self.value_kind == "counts" else "float32"

    def segments(self, shard: int) -> Iterator[Segment]:
        """Yield the cells of a shard: a run of cells over the concatenated sources."""
        first, last = shard * self.rows_per_shard, (shard + 1) * self.rows_per_shard
        before = 0
        for index, source in enumerate(self.sources):
            start, stop = max(first - before, 0), min(last - before, source.num_cells)
            if start < stop:
                yield Segment(index, start, stop)
            before += source.num_cells

    def transposed(self, source: int) -> Path:
        """Return where the rows of a CSC matrix are kept during the conversion."""
        return self.unfinished / f"rows-of-source-{source}"

    def arguments(self) -> dict[str, Any]:
        """Return what must be equal for an unfinished conversion to be continued."""
        return {
            "inputs": [source.path.name for source in self.sources],
            "cells": [source.num_cells for source in self.sources],
            "--layer": [source.matrix for source in self.sources],
            "--genes": self.gene_space.sha256,
            "--gene-column": [hashlib.sha256(source.remap.tobytes()).hexdigest() for source in self.sources],
            "--obs": [source.obs for source in self.sources],
            "labels": {name: column.to_dict() for name, column in self.columns.items()},
            "value kind": self.value_kind,
            "--control-label": self.control_label,
            "--min-genes": self.min_genes,
            "--format": self.storage,
            "--rows-per-shard": self.rows_per_shard,
        }

    @cached_property
    def sha256(self) -> str:
        """Identify the conversion by its arguments."""
        return sha256_of(self.arguments())


@dataclass
class SourceCount:
    """Count what a shard took from one source."""

    rows: int = 0
    cells_dropped: int = 0
    sum_all: float = 0.0
    sum_kept: float = 0.0

    def add(self, rows: CellRows) -> None:
        """Count converted cells."""
        num_rows = len(rows.offsets) - 1
        self.rows += num_rows
        self.cells_dropped += len(rows.kept) - num_rows
        self.sum_all += rows.sum_all
        self.sum_kept += rows.sum_kept


@dataclass(frozen=True)
class FinishedShard:
    """Describe a shard whose file is complete and synced; a line of the journal."""

    index: int
    file: str
    """Name inside the unfinished folder."""
    rows: int
    bytes: int
    sha256: str
    count_dtype: str
    n_nonzero: int
    sources: dict[int, SourceCount] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the journal's entry."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "FinishedShard":
        """Read what `to_dict` wrote."""
        counts = {int(source): SourceCount(**count) for source, count in content["sources"].items()}
        return cls(**{**content, "sources": counts})


class _WiderTypeNeededError(Exception):
    """Tell that a count does not fit the type the shard was begun with."""


class ShardConverter:
    """Make shards of one plan; keeps the source files open, as a context manager."""

    def __init__(self, plan: ConversionPlan) -> None:
        """Prepare for a plan."""
        self.plan = plan
        self._open: tuple[int, H5adFile, Matrix] | None = None
        self._batch = _BatchBuffer()
        self._positions = {
            name: {label: index for index, label in enumerate(column.names)}
            for name, column in plan.columns.items()
        }

    def __enter__(self) -> "ShardConverter":
        """Return the converter."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the source file that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def convert(self, shard: int, count_dtype: str, on_cells: Callable[[int], None]) -> "UnsealedShard":
        """Write a shard under a temporary name, in a wider type than asked for where a count needs it."""
        if count_dtype == "uint16":
            try:
                return self._convert(shard, count_dtype, on_cells)
            except _WiderTypeNeededError:
                count_dtype = "uint32"
        return self._convert(shard, count_dtype, on_cells)

    def _convert(self, shard: int, count_dtype: str, on_cells: Callable[[int], None]) -> "UnsealedShard":
        name = f"shard-{shard:05d}.{count_dtype}"
        temporary = self.plan.unfinished / f"{name}.{os.getpid()}.tmp"
        counts: dict[int, SourceCount] = {}
        writer = ShardWriter(temporary, corpus_schema(count_dtype, self.plan.columns), self.plan.storage)
        self._batch.clear(count_dtype)
        n_nonzero = cells_seen = 0
        try:
            for segment in self.plan.segments(shard):
                count = counts.setdefault(segment.source, SourceCount())
                for first in range(segment.start, segment.stop, ROWS_PER_BATCH):
                    part = segment._replace(start=first, stop=min(first + ROWS_PER_BATCH, segment.stop))
                    labels = self._obs_columns(part)
                    for first_row, rows in self._rows(part):
                        if count_dtype == "uint16" and rows.counts.dtype == np.uint32:
                            raise _WiderTypeNeededError
                        count.add(rows)
                        n_nonzero += len(rows.genes)
                        if not self._batch.has_room(rows):
                            self._batch.write_to(writer)
                        self._batch.append(rows, self._scalars(part, first_row, rows, labels))
                    self._batch.write_to(writer)
                    on_cells(part.stop - part.start)
                    cells_seen += part.stop - part.start
            writer.close()
        except BaseException:
            on_cells(-cells_seen)
            writer.abandon()
            temporary.unlink(missing_ok=True)
            raise
        return UnsealedShard(temporary, name, shard, count_dtype, writer.num_rows, n_nonzero, counts)

    def _source(self, index: int) -> tuple[H5adFile, Matrix]:
        """Return a source's file and matrix; one file is open at a time."""
        if self._open is None or self._open[0] != index:
            self.__exit__()
            source = self.plan.sources[index]
            file = H5adFile(source.path)
            matrix = file.matrix(source.matrix)
            if isinstance(matrix, CscMatrix):
                matrix = matrix.open_transposed(self.plan.transposed(index))
            self._open = index, file, matrix
        return self._open[1:]

    def _rows(self, segment: Segment) -> Iterator[tuple[int, CellRows]]:
        """Yield converted chunks with the source row that each begins at."""
        file, matrix = self._source(segment.source)
        source = self.plan.sources[segment.source]
        is_gene = source.remap != NOT_A_GENE
        for stored in matrix.chunks(segment.start, segment.stop):
            chunk = stored if is_gene.all() else stored.of_columns(is_gene)
            try:
                rows = cell_rows(chunk, source.remap, self.plan.value_kind, self.plan.min_genes)
            except BadValueError as error:
                raise bad_value(file, source.matrix, chunk, error, self.plan.value_kind) from None
            yield chunk.first_row, rows

    def _obs_columns(self, part: Segment) -> dict[str, np.ndarray]:
        """Read the kept obs columns of the cells of a segment."""
        file, _ = self._source(part.source)
        source = self.plan.sources[part.source]
        columns: dict[str, np.ndarray] = {}
        for name, column in self.plan.columns.items():
            obs, positions = source.obs[name], self._positions[name]
            if obs == FILE_LABEL:
                columns[name] = np.full(part.stop - part.start, positions[source.stem], np.int64)
            elif column.kind == "number":
                columns[name] = file.obs.numbers(obs, part.start, part.stop)
            else:
                labels = file.obs.labels(obs, part.start, part.stop)
                codes = [positions.get(label, -1) for label in labels.names]
                columns[name] = np.array([*codes, positions.get(UNLABELLED, -1)], np.int64)[labels.codes]
        return columns

    def _scalars(
        self, part: Segment, first_row: int, rows: CellRows, labels: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Return the columns beside genes and counts of converted rows."""
        start = first_row - part.start
        scalars = {name: each[start : start + len(rows.kept)][rows.kept] for name, each in labels.items()}
        scalars["source"] = np.full(len(rows.totals), part.source, np.int16)
        return {**scalars, "total": rows.totals, "n_genes": rows.n_genes}


@dataclass(frozen=True)
class UnsealedShard:
    """Hold a written shard that is not yet synced, hashed and renamed."""

    temporary: Path
    name: str
    index: int
    count_dtype: str
    rows: int
    n_nonzero: int
    sources: dict[int, SourceCount]

    def seal(self) -> FinishedShard:
        """Sync and hash the file and give it the name that the journal will know it by."""
        sync_file(self.temporary)
        digest, size = hash_file(self.temporary), self.temporary.stat().st_size
        os.replace(self.temporary, self.temporary.with_name(self.name))
        sync_file(self.temporary.parent)
        return FinishedShard(
            self.index, self.name, self.rows, size, digest, self.count_dtype, self.n_nonzero, self.sources
        )


class _BatchBuffer:
    """Gather rows for one record batch in memory that is used again for the next one."""

    def __init__(self) -> None:
        self._genes = np.empty(_VALUES_PER_BATCH, np.int32)
        self._counts = np.empty(0, np.uint16)
        self.clear("uint16")

    def clear(self, count_dtype: str) -> None:
        """Forget the rows and take another type of counts."""
        if self._counts.dtype != count_dtype or not len(self._counts):
            self._counts = np.empty(len(self._genes), count_dtype)
        self._size = 0
        self._offsets: list[np.ndarray] = []
        self._scalars: list[dict[str, np.ndarray]] = []

    def has_room(self, rows: CellRows) -> bool:
        """Tell whether rows fit; an empty buffer takes any."""
        return self._size == 0 or self._size + len(rows.genes) <= len(self._genes)

    def append(self, rows: CellRows, scalars: dict[str, np.ndarray]) -> None:
        """Copy rows in; an empty buffer grows where it must."""
        if self._size == 0 and len(rows.genes) > len(self._genes):
            self._genes = np.empty(len(rows.genes), np.int32)
            self._counts = np.empty(len(rows.genes), self._counts.dtype)
        end = self._size + len(rows.genes)
        self._genes[self._size : end] = rows.genes
        self._counts[self._size : end] = rows.counts
        self._offsets.append(rows.offsets[:-1] + self._size)
        self._scalars.append(scalars)
        self._size = end

    def write_to(self, writer: ShardWriter) -> None:
        """Write the rows as one record batch and forget them."""
        if self._scalars:
            offsets = np.concatenate([*self._offsets, [self._size]]).astype(np.int32)
            names = self._scalars[0]
            scalars = {name: np.concatenate([each[name] for each in self._scalars]) for name in names}
            writer.write(offsets, self._genes[: self._size], self._counts[: self._size], scalars)
        self._size = 0
        self._offsets, self._scalars = [], []


def bad_value(
    file: H5adFile, matrix: str, chunk: MatrixChunk, error: BadValueError, value_kind: ValueKind
) -> DataError:
    """Name the cell and gene of a value that cannot be kept."""
    row = chunk.first_row + int(np.searchsorted(chunk.offsets, error.position, side="right")) - 1
    gene = file.gene_names(matrix)[int(chunk.columns[error.position])]
    if error.reason in ("is NaN", "is infinite", "is negative"):
        verdict = f"{matrix} holds neither counts nor log-normalised values"
    else:
        verdict = f"{matrix} does not hold {'counts' if value_kind == 'counts' else 'log-normalised values'}"
    return DataError(
        f"{file.path}: {matrix}: cell {row} ({file.cell_name(row)}), gene {gene}: the value {error.value} "
        f"{error.reason}, so {verdict}; name another matrix with --layer (there are: "
        f"{', '.join(file.matrix_names())}) or repair the file"
    )


def is_disk_full(error: OSError) -> bool:
    """Tell whether an error of the system says that no space (or quota) is left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
