"""Readers of a converted corpus: cells by row number, from mapped Arrow files or Parquet behind fsspec."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from data.columns import RaggedColumn, RowTable
from data.corpus import CorpusInfo
from data.errors import DataError
from data.mapped_shards import MappedShards
from data.parquet_shards import ParquetShards

_CELL_COLUMNS = ("source", "total", "n_genes")
_NUMBER_GROUPS_KEPT = 1 << 13
_NUMBERS_AT_ONCE = 1 << 18


class RaggedBatch(NamedTuple):
    """Hold some cells: their expressed genes with counts, and one number a cell for each other column."""

    offsets: NDArray[np.int64]  # [B + 1]
    genes: NDArray[np.int32]  # [nnz], increasing inside a cell
    counts: NDArray[Any]  # [nnz]
    columns: dict[str, NDArray[Any]]  # [B] each

    def __len__(self) -> int:
        """Count the cells."""
        return len(self.offsets) - 1


class CorpusReader:
    """Read cells of a corpus in any order; the same cells whatever the storage."""

    def __init__(self, info: CorpusInfo, table: RowTable) -> None:
        """Read the cells that `info` describes from a table of its columns."""
        self.info = info
        self.table = table
        self.num_rows = table.num_rows

    def read(self, rows: NDArray[np.int64]) -> RaggedBatch:
        """Return the cells of these rows, in their order."""
        columns = dict(self.table.gather(rows))
        genes = cast(RaggedColumn, columns.pop("genes"))
        counts = cast(RaggedColumn, columns.pop("counts"))
        if counts.lengths is not genes.lengths and not np.array_equal(counts.lengths, genes.lengths):
            raise DataError(
                f"{self.info.path}: a cell among rows {rows.min()} to {rows.max()} has more or fewer "
                "counts than genes; the corpus is damaged, convert the files again"
            )
        self._check_indices(genes.values, cast(dict[str, NDArray[Any]], columns))
        return RaggedBatch(genes.offsets, genes.values, counts.values, cast(dict[str, NDArray[Any]], columns))

    def _check_indices(self, genes: NDArray[np.int32], columns: dict[str, NDArray[Any]]) -> None:
        """Refuse an index of a gene, a source or a class that is none: it would stand for another one further on."""
        limits = {name: len(kept.names) for name, kept in self.info.columns.items() if kept.kind == "class"}
        limits["source"] = len(self.info.manifest.sources)
        found = [("genes", genes, len(self.info.gene_space))]
        found += [(name, columns[name], limit) for name, limit in limits.items() if name in columns]
        for name, values, limit in found:
            if not len(values):
                continue
            # Negative numbers are the largest when they are read without sign.
            if values.dtype.kind not in "iu" or values.view(f"u{values.dtype.itemsize}").max() >= limit:
                raise DataError(
                    f"{self.info.path}: column {name!r} holds a number outside of the {limit} that there are; the "
                    "corpus is damaged, convert the files again"
                )

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Prepare for rows that will be read soon; no rows: drop what was prepared and stop reading."""
        self.table.expect(rows)


class ArrowReader(CorpusReader):
    """Read a corpus of Arrow shards on a local disk through memory maps."""

    def __init__(self, info: CorpusInfo, columns: Sequence[str] | None = None) -> None:
        """Prepare the maps; `columns` are those wanted beside genes and counts, all by default."""
        protocol = info.filesystem.protocol
        if "file" not in ((protocol,) if isinstance(protocol, str) else protocol):
            raise DataError(
                f"{info.path}: Arrow shards are mapped from a local disk; convert with --format parquet to "
                "read from elsewhere, or copy the folder"
            )
        super().__init__(info, MappedShards(info.shard_paths, info.shard_rows, _names(info, columns)))


class ParquetReader(CorpusReader):
    """Read a corpus of Parquet shards from anywhere that fsspec reaches."""

    def __init__(self, info: CorpusInfo, columns: Sequence[str] | None = None, groups_kept: int = 8) -> None:
        """Prepare reading; nothing is fetched before the first cells are asked for or announced."""
        super().__init__(info, _parquet(info, _names(info, columns), groups_kept))


def open_reader(info: CorpusInfo, columns: Sequence[str] | None = None) -> CorpusReader:
    """Return the reader for the corpus's storage."""
    return (ArrowReader if info.manifest.storage == "arrow" else ParquetReader)(info, columns)


def open_columns(info: CorpusInfo, names: Sequence[str]) -> RowTable:
    """Open numbers of each cell alone, such as `n_genes`, which is much cheaper to read than the cells."""
    if info.manifest.storage == "arrow":
        return MappedShards(info.shard_paths, info.shard_rows, names)
    # Shuffled rows come from many row groups, over and over; a number for each of their cells is small enough to keep.
    return _parquet(info, names, _NUMBER_GROUPS_KEPT)


def number_pieces(
    info: CorpusInfo, names: Sequence[str]
) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]]:
    """Yield the numbers of all cells in order, as many rows at a time as fit in little memory, with these rows."""
    table = open_columns(info, names)
    for start in range(0, info.num_cells, _NUMBERS_AT_ONCE):
        rows = np.arange(start, min(start + _NUMBERS_AT_ONCE, info.num_cells))
        yield rows, cast(dict[str, NDArray[Any]], dict(table.gather(rows)))


def _parquet(info: CorpusInfo, columns: Sequence[str], groups_kept: int) -> ParquetShards:
    return ParquetShards(info.filesystem, info.shard_paths, info.shard_rows, columns, groups_kept=groups_kept)


def _names(info: CorpusInfo, columns: Sequence[str] | None) -> list[str]:
    known = [*info.columns, *_CELL_COLUMNS]
    wanted = known if columns is None else list(columns)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise DataError(f"{info.path}: no column {', '.join(missing)}; it has: {', '.join(known)}")
    return ["genes", "counts", *wanted]
