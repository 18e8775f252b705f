"""Read cells of the Census into a corpus, a batch of cells at a time, so that it can be killed and continued.

Each dataset of the Census is a source of the corpus, since each measured genes of its own. Cells come in the order of
the Census. What is finished is noted line by line in a journal; nothing is loadable before the last cell is written.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from numpy.typing import NDArray

from data.cell_rows import BadValueError, CellRows, cell_rows
from data.census_soma import CELL_ID, DATASET, CensusExperiment, labels_of, number_type, numbers_of
from data.conversion import FILE_LABEL, is_disk_full
from data.conversion_plan import MAX_CLASSES, MAX_SOURCES
from data.conversion_run import ProgressLines
from data.corpus import UNFINISHED, ShardWriter, hash_file, publish_corpus, shard_name, sync_file
from data.errors import DataError
from data.genes import GeneSpace, combine_genes, match_genes
from data.h5ad_matrix import MatrixChunk
from data.journal import JournalFile
from data.manifest import (
    LABEL_COLUMNS,
    UNLABELLED,
    Manifest,
    ObsColumn,
    Shard,
    SourceRecord,
    corpus_schema,
    count_classes,
    index_ranges,
)

CELLS_PER_BATCH = 2048
"""Cells whose counts are in memory at once, twice: one batch is converted while the next one is read."""
BATCHES_PER_SHARD = 10

Say = Callable[[str], None]


@dataclass(frozen=True)
class CensusCorpusSettings:
    """Hold what decides the form of the corpus."""

    columns: Mapping[str, str]
    """The obs column (or `@file`, the dataset) that each kept column is read from."""
    gene_space: GeneSpace | None
    """Genes of the corpus; None takes those of the Census."""
    min_match: float = 0.5
    min_genes: int = 1
    """Cells with fewer expressed genes of the corpus are dropped."""


@dataclass(frozen=True)
class _Plan:
    """Hold what a first look at the cells shows; the first line of the journal."""

    num_cells: int
    columns: dict[str, ObsColumn]
    obs: dict[str, str]
    """The obs column of the Census that each column is read from; a column that is not named has one class."""
    datasets: tuple[str, ...]
    """Sources of the corpus by name; empty where the cells do not say."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "_Plan":
        columns = {
            name: ObsColumn(column["kind"], tuple(column["names"]), column["dtype"])
            for name, column in content["columns"].items()
        }
        return cls(content["num_cells"], columns, content["obs"], tuple(content["datasets"]))


class _Seen(NamedTuple):
    """Hold what reading obs columns of all cells has shown, by column of the Census."""

    num_cells: int
    labels: dict[str, set[str]]
    unlabelled: dict[str, int]
    """Cells without a label."""
    types: dict[str, pa.DataType]


@dataclass
class _FinishedShard:
    """Describe a shard whose file is complete and synced; a line of the journal."""

    file: str
    """Name inside the unfinished folder."""
    count_dtype: str
    last_cell: int
    """Number in the Census of the last cell that the shard was made of."""
    rows: int = 0
    cells: int = 0
    """Cells that it was made of, dropped ones included."""
    n_nonzero: int = 0
    sources: dict[int, list[float]] = field(default_factory=dict)
    """Of each source: rows, cells dropped, sum of all counts, sum of the counts that were kept."""


class _Batch(NamedTuple):
    """Hold some cells' numbers, their sources and the columns that are kept."""

    numbers: NDArray[np.int64]
    sources: NDArray[np.int16]
    columns: dict[str, NDArray[Any]]


class _Converted(NamedTuple):
    """Hold the cells of a batch as rows of the corpus."""

    batch: _Batch
    rows: CellRows
    sums: NDArray[np.float64]  # [cells of the batch], over all genes
    kept_sums: NDArray[np.float64]  # [cells of the batch], over the genes of the corpus


class _WiderTypeNeededError(Exception):
    """Tell that a count does not fit uint16."""


def convert_census(
    experiment: CensusExperiment,
    folder: Path,
    settings: CensusCorpusSettings,
    obs_filter: str | None,
    var_filter: str | None,
    *,
    origin: Mapping[str, Any],
    say: Say,
) -> None:
    """Write the corpus of the cells that pass a filter; goes on where an interrupted call stopped.

    Args:
        experiment: what is read.
        folder: where the corpus is written; it belongs to this content and these settings alone.
        settings: what decides the form of the corpus.
        obs_filter: SOMA value filter on cells; None takes all.
        var_filter: SOMA value filter on genes; the counts of others are dropped. None takes all.
        origin: what the manifest says of where the cells come from.
        say: takes lines of the account.

    Raises:
        DataError: there is no such column, gene or cell, or a value is no count.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / UNFINISHED).mkdir(exist_ok=True)
        conversion = _Conversion(experiment, folder, settings, obs_filter, var_filter, say)
        conversion.run()
        conversion.publish(origin)
        shutil.rmtree(folder / UNFINISHED)
    except OSError as error:
        if is_disk_full(error):
            raise DataError(
                f"{folder}: the disk is full ({error.strerror}); finished shards are kept: free some space and start "
                "again to go on"
            ) from error
        raise


class _Conversion:
    """Do one conversion: look at the cells, make the shards, describe them."""

    def __init__(
        self,
        experiment: CensusExperiment,
        folder: Path,
        settings: CensusCorpusSettings,
        obs_filter: str | None,
        var_filter: str | None,
        say: Say,
    ) -> None:
        self.experiment, self.folder, self.obs_filter, self.say = experiment, folder, obs_filter, say
        for name, column in settings.columns.items():
            if column != FILE_LABEL:
                experiment.require(column, f"obs column for {name}")
        self.min_genes = settings.min_genes
        self.journal = _Journal(folder / UNFINISHED)
        genes, gene_numbers = experiment.genes(var_filter)
        self.gene_names = dict(zip(gene_numbers.tolist(), genes.names("ensembl_id"), strict=True))
        self.num_source_genes = len(genes)
        self.gene_space = settings.gene_space or combine_genes([genes], "union")
        matched, key = match_genes(self.gene_space, genes)
        self.remap = np.full(experiment.num_var, -1, np.int32)
        self.remap[gene_numbers] = matched
        self._check_match(int(np.count_nonzero(matched >= 0)), len(genes), key, settings.min_match)
        if self.journal.plan is None:
            self.journal.write({"plan": self._look(settings).to_dict()})
        assert self.journal.plan is not None
        self.plan = self.journal.plan
        self._positions = {
            name: {label: index for index, label in enumerate(column.names)}
            for name, column in self.plan.columns.items()
        }

    def _check_match(self, matched: int, num_genes: int, key: str, min_match: float) -> None:
        possible = min(num_genes, len(self.gene_space))
        account = f"{matched:,} of {num_genes:,} genes matched by {key}"
        if matched < max(min_match * possible, 1):
            raise DataError(
                f"{self.experiment.where}: {account}, of {possible:,} possible: is gene_vocab of another organism? "
                f"(refused under a share of {min_match:g}, min_match)"
            )
        self.say(f"{self.experiment.where}: {account} ({matched / possible:.1%} of the possible)")

    def _look(self, settings: CensusCorpusSettings) -> _Plan:
        """Read the kept obs columns once, for the labels that there are."""
        experiment = self.experiment
        has_datasets = experiment.fields.get(DATASET) == "text"
        asked = {**settings.columns, CELL_ID: CELL_ID}
        constant = [] if has_datasets else [name for name, column in asked.items() if column == FILE_LABEL]
        obs = {
            name: DATASET if column == FILE_LABEL else column
            for name, column in asked.items()
            if name not in constant
        }
        is_class = {
            name: name in LABEL_COLUMNS or experiment.fields[column] in ("text", "bool")
            for name, column in obs.items()
        }
        labelled = [column for name, column in obs.items() if is_class[name]]
        seen = self._see([*labelled, DATASET] if has_datasets else labelled, list(obs.values()))
        columns = {name: ObsColumn("class", (experiment.name,)) for name in sorted(constant)}
        for name, column in obs.items():
            if is_class[name]:
                columns[name] = self._class_column(name, column, seen)
            else:
                columns[name] = ObsColumn("number", dtype=number_type(seen.types[column]))
        datasets = (
            tuple(sorted(seen.labels[DATASET])) if has_datasets and not seen.unlabelled[DATASET] else ()
        )
        if len(datasets) > MAX_SOURCES:
            raise DataError(
                f"{len(datasets)} datasets are more than the {MAX_SOURCES} that one corpus can tell apart"
            )
        if "is_primary_data" in experiment.fields and "is_primary_data" not in (self.obs_filter or ""):
            self.say(
                "cells that are in several datasets come several times; the filter is_primary_data: true takes one each"
            )
        self.say(f"{experiment.where}: {seen.num_cells:,} cells of {max(len(datasets), 1):,} datasets")
        return _Plan(seen.num_cells, columns, obs, datasets)

    def _see(self, labelled: list[str], others: list[str]) -> _Seen:
        """Read obs columns of all cells, some of them as labels."""
        labels: dict[str, set[str]] = {column: set() for column in labelled}
        unlabelled = dict.fromkeys(labelled, 0)
        types: dict[str, pa.DataType] = {}
        num_cells = 0
        for numbers, table in self.experiment.cells([*labelled, *others], self.obs_filter):
            num_cells += len(numbers)
            types = types or {field.name: field.type for field in table.schema}
            for column in labels:
                read = labels_of(table, column, self._column(column))
                labels[column] |= {read.names[code] for code in np.unique(read.codes) if code >= 0}
                unlabelled[column] += int(np.count_nonzero(read.codes < 0))
        if not num_cells:
            raise DataError(
                f"census: no cell of {self.experiment.where} passes the filter {self.obs_filter!r}"
            )
        return _Seen(num_cells, labels, unlabelled, types)

    def _class_column(self, name: str, column: str, seen: _Seen) -> ObsColumn:
        """Describe a column by the labels that were seen."""
        num_unlabelled = seen.unlabelled[column]
        names = seen.labels[column] | ({UNLABELLED} if num_unlabelled else set())
        if len(names) > MAX_CLASSES:
            raise DataError(
                f"{self._column(column)}: {len(names)} different labels; at most {MAX_CLASSES} can be kept"
            )
        self.say(f"{name}: {count_classes(names, num_unlabelled, column)}")
        return ObsColumn("class", tuple(sorted(names)))

    def run(self) -> None:
        """Make the shards that are not there."""
        if self.journal.is_publishing:
            return
        done = sum(shard.cells for shard in self.journal.shards)
        if done:
            self.say(f"going on: {done:,} of {self.plan.num_cells:,} cells were read before")
        self.journal.drop_leftovers()
        dtype = self.count_dtype
        try:
            self._make_shards(dtype)
        except _WiderTypeNeededError:
            self.say("a count above 65535: counts are stored as uint32")
            self._make_shards("uint32")
        if not sum(shard.rows for shard in self.journal.shards):
            raise DataError(f"{self.experiment.where}: none of the cells expresses a gene of the gene space")

    @property
    def count_dtype(self) -> str:
        """Return the widest type that a shard needed."""
        return "uint32" if any(shard.count_dtype == "uint32" for shard in self.journal.shards) else "uint16"

    def _make_shards(self, dtype: str) -> None:
        progress = ProgressLines("read", self.plan.num_cells, self.say)
        progress.resume(sum(shard.cells for shard in self.journal.shards))
        last = self.journal.shards[-1].last_cell if self.journal.shards else -1
        with contextlib.closing(self._converted(last + 1)) as batches:
            while some := list(itertools.islice(batches, 1)):
                shard_batches = itertools.chain(some, itertools.islice(batches, BATCHES_PER_SHARD - 1))
                self._make_shard(shard_batches, dtype, progress)

    def _make_shard(self, batches: Iterator[_Converted], dtype: str, progress: ProgressLines) -> None:
        name = f"shard-{len(self.journal.shards):05d}.{dtype}"
        temporary = self.folder / UNFINISHED / f"{name}.tmp"
        shard = _FinishedShard(name, dtype, last_cell=-1)
        writer = ShardWriter(temporary, corpus_schema(dtype, self.plan.columns), "arrow")
        try:
            for converted in batches:
                batch, rows = converted.batch, converted.rows
                if dtype == "uint16" and rows.counts.dtype == np.uint32:
                    raise _WiderTypeNeededError
                scalars = {name: each[rows.kept] for name, each in batch.columns.items()}
                scalars |= {"source": batch.sources[rows.kept], "total": rows.totals, "n_genes": rows.n_genes}
                writer.write(rows.offsets, rows.genes, rows.counts, scalars)
                self._count(shard, converted)
                progress.add(len(batch.numbers))
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        sync_file(temporary)
        os.replace(temporary, temporary.with_name(name))
        sync_file(temporary.parent)
        self.journal.write({"shard": asdict(shard)})

    def _count(self, shard: _FinishedShard, converted: _Converted) -> None:
        batch, rows = converted.batch, converted.rows
        shard.last_cell = int(batch.numbers[-1])
        shard.cells += len(batch.numbers)
        shard.rows += len(rows.totals)
        shard.n_nonzero += len(rows.genes)
        for source in np.unique(batch.sources).tolist():
            here = batch.sources == source
            count = shard.sources.setdefault(source, [0, 0, 0.0, 0.0])
            count[0] += int(np.count_nonzero(here & rows.kept))
            count[1] += int(np.count_nonzero(here & ~rows.kept))
            count[2] += float(converted.sums[here].sum())
            count[3] += float(converted.kept_sums[here].sum())

    def _converted(self, first: int) -> Generator[_Converted]:
        """Yield cells from a number on as rows; the next batch is read while one is converted."""
        with ThreadPoolExecutor(1) as pool, contextlib.closing(self._batches(first)) as batches:
            due = None
            for batch in itertools.chain(batches, [None]):
                reading = (
                    None if batch is None else (batch, pool.submit(self.experiment.counts, batch.numbers))
                )
                if due is not None:
                    yield self._rows(due[0], *due[1].result())
                due = reading

    def _batches(self, first: int) -> Generator[_Batch]:
        """Yield the cells from a number on, equally many at a time."""
        waiting: _Batch | None = None
        wanted = [*self.plan.obs.values(), *([DATASET] if self.plan.datasets else [])]
        for numbers, table in self.experiment.cells(wanted, self.obs_filter, first):
            read = self._encode(numbers, table)
            if waiting is not None:
                read = _Batch(
                    np.concatenate([waiting.numbers, read.numbers]),
                    np.concatenate([waiting.sources, read.sources]),
                    {
                        name: np.concatenate([waiting.columns[name], each])
                        for name, each in read.columns.items()
                    },
                )
            whole = len(read.numbers) // CELLS_PER_BATCH * CELLS_PER_BATCH
            for start in range(0, whole, CELLS_PER_BATCH):
                yield _cut(read, start, start + CELLS_PER_BATCH)
            waiting = _cut(read, whole, len(read.numbers))
        if waiting is not None and len(waiting.numbers):
            yield waiting

    def _encode(self, numbers: NDArray[np.int64], table: pa.Table) -> _Batch:
        columns: dict[str, NDArray[Any]] = {}
        for name, kept in self.plan.columns.items():
            column = self.plan.obs.get(name)
            if column is None:  # one class for all cells, since they are of no datasets
                columns[name] = np.zeros(len(numbers), np.int64)
                continue
            if kept.kind == "number":
                columns[name] = numbers_of(table, column, kept.dtype, self.experiment.where)
                continue
            labels = labels_of(table, column, self._column(column))
            positions = self._positions[name]
            codes = [positions.get(label, -1) for label in labels.names]
            columns[name] = np.array([*codes, positions.get(UNLABELLED, -1)], np.int64)[labels.codes]
        sources = np.zeros(len(numbers), np.int16)
        if self.plan.datasets:
            labels = labels_of(table, DATASET, self._column(DATASET))
            index = {name: position for position, name in enumerate(self.plan.datasets)}
            sources = np.array([index.get(name, -1) for name in labels.names], np.int16)[labels.codes]
        return _Batch(numbers, sources, columns)

    def _rows(
        self,
        batch: _Batch,
        position: NDArray[np.int32],
        genes: NDArray[np.int32],
        values: NDArray[np.float32],
    ) -> "_Converted":
        """Bring the values of a batch into the order of its cells and convert them."""
        if len(genes) and not 0 <= int(genes.min()) <= int(genes.max()) < len(self.remap):
            raise DataError(f"{self.experiment.uri}: damaged: the matrix names genes that var does not have")
        num_cells = len(batch.numbers)
        offsets = np.concatenate([[0], np.cumsum(np.bincount(position, minlength=num_cells))])
        order = np.argsort(
            position.astype(np.uint16), kind="stable"
        )  # of 16 bits, since numpy sorts them by counting
        chunk = MatrixChunk(0, offsets, genes[order], values[order])
        try:
            rows = cell_rows(chunk, self.remap, "counts", self.min_genes)
        except BadValueError as error:
            row = int(np.searchsorted(chunk.offsets, error.position, side="right")) - 1
            gene = int(chunk.columns[error.position])
            dataset = f" of dataset {self.plan.datasets[batch.sources[row]]}" if self.plan.datasets else ""
            raise DataError(
                f"{self.experiment.where}: cell {batch.numbers[row]}{dataset}, gene {self.gene_names.get(gene, gene)}: "
                f"the value {error.value} {error.reason}, so it is no count; leave these cells out with a filter"
            ) from None
        sums = np.bincount(position, values, minlength=num_cells).astype(np.float64)
        kept = np.where(self.remap[genes] >= 0, values, 0)
        return _Converted(
            batch, rows, sums, np.bincount(position, kept, minlength=num_cells).astype(np.float64)
        )

    def publish(self, origin: Mapping[str, Any]) -> None:
        """Give the shards their names and describe them."""
        dtype = self.count_dtype
        if not self.journal.is_publishing:
            shards = self.journal.shards
            for index, shard in enumerate(shards):
                if shard.count_dtype != dtype:
                    shards[index] = self._widened(shard, dtype)
            parts = [shard for shard in shards if shard.rows]
            files = [self.folder / UNFINISHED / shard.file for shard in parts]
            named = [
                asdict(
                    Shard(
                        shard_name(index, len(parts), "arrow"),
                        part.rows,
                        hash_file(file),
                        file.stat().st_size,
                    )
                )
                for index, (part, file) in enumerate(zip(parts, files, strict=True))
            ]
            files = [part.file for part in parts]
            self.journal.write({"publishing": {"files": files, "shards": named, "dtype": dtype}})
        publishing = self.journal.publishing
        assert publishing is not None
        batches = self.plan.columns.get("technical_batch")
        manifest = Manifest(
            value_kind="counts",
            count_dtype=publishing["dtype"],
            num_cells=sum(shard.rows for shard in self.journal.shards),
            n_nonzero=sum(shard.n_nonzero for shard in self.journal.shards),
            storage="arrow",
            gene_sha256=self.gene_space.sha256,
            shards=tuple(Shard(**shard) for shard in publishing["shards"]),
            sources=self._source_records(),
            technical_batches=batches.names if batches else (),
            control_label=None,
            columns=self.plan.columns,
            origin=dict(origin),
        )
        parts = [self.folder / UNFINISHED / file for file in publishing["files"]]
        publish_corpus(self.folder, manifest, self.gene_space, parts)
        self.say(f"{self.folder}: {manifest.num_cells:,} cells, {len(self.gene_space):,} genes")

    def _widened(self, shard: _FinishedShard, dtype: str) -> _FinishedShard:
        """Write a shard again with a wider type of counts."""
        old = self.folder / UNFINISHED / shard.file
        new = old.with_name(f"{Path(shard.file).stem}.{dtype}")
        schema = corpus_schema(dtype, self.plan.columns)
        with pa.OSFile(str(old)) as source, pa.OSFile(str(new), "wb") as sink:
            reader = pa.ipc.open_stream(source)
            with pa.ipc.new_stream(sink, schema) as writer:
                for batch in reader:
                    columns = [
                        column.cast(part.type) for column, part in zip(batch.columns, schema, strict=True)
                    ]
                    writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        sync_file(new)
        return _FinishedShard(**{**asdict(shard), "file": new.name, "count_dtype": dtype})

    def _source_records(self) -> tuple[SourceRecord, ...]:
        names = self.plan.datasets or (self.experiment.name,)
        measured = self.experiment.measured(self.plan.datasets) if self.plan.datasets else None
        if measured is None:
            self.say(
                f"{self.experiment.where} does not say which genes were measured: all of them are taken to be"
            )
        records = []
        for index, name in enumerate(names):
            rows, dropped, sum_all, sum_kept = np.sum(
                [shard.sources.get(index, [0, 0, 0.0, 0.0]) for shard in self.journal.shards], axis=0
            ).tolist()
            here = self.remap >= 0 if measured is None else (self.remap >= 0) & measured[index]
            records.append(
                SourceRecord(
                    path_name=name,
                    sha256="",
                    bytes=0,
                    rows=int(rows),
                    matrix="raw",
                    genes_total=self.num_source_genes,
                    genes_matched=int(np.count_nonzero(here)),
                    counts_dropped_fraction=1 - sum_kept / sum_all if sum_all else 0.0,
                    cells_dropped=int(dropped),
                    measured_genes=index_ranges(np.unique(self.remap[here])),
                )
            )
        return tuple(records)

    def _column(self, column: str) -> str:
        return f"{self.experiment.where}: obs column {column!r}"


def _cut(batch: _Batch, start: int, stop: int) -> _Batch:
    columns = {name: each[start:stop] for name, each in batch.columns.items()}
    return _Batch(batch.numbers[start:stop], batch.sources[start:stop], columns)


class _Journal:
    """Keep, line by line, what of a conversion is finished."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = JournalFile(folder / "journal.jsonl")
        self.plan: _Plan | None = None
        self.shards: list[_FinishedShard] = []
        self.publishing: dict[str, Any] | None = None
        for record in self.file.read():
            self._take(record)

    @property
    def is_publishing(self) -> bool:
        """Tell whether all shards are made."""
        return self.publishing is not None

    def write(self, record: dict[str, Any]) -> None:
        """Add a line that survives a power cut."""
        self.file.append(record)
        self._take(record)

    def drop_leftovers(self) -> None:
        """Delete what no line of the journal names."""
        known = {shard.file for shard in self.shards} | {self.file.path.name}
        for path in self.folder.iterdir():
            if path.name not in known:
                path.unlink()

    def _take(self, record: dict[str, Any]) -> None:
        if "plan" in record:
            self.plan = _Plan.from_dict(record["plan"])
        elif "shard" in record:
            shard = record["shard"]
            sources = {int(source): count for source, count in shard["sources"].items()}
            self.shards.append(_FinishedShard(**{**shard, "sources": sources}))
        else:
            self.publishing = record["publishing"]
