"""Highly variable genes of a corpus, chosen by scanpy, and the corpus of these genes alone.

The genes of the whitelist come first, in its order, then those that scanpy ranks highest, until there are as many as
asked for. This order is the gene space of the narrowed corpus, so it is saved in its `genes.json` and in every
checkpoint. Library sizes stay those over all genes of the source files.
"""

import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from data.cell_rows import sort_rows
from data.corpus import UNFINISHED, CorpusInfo, ShardWriter, hash_file, publish_corpus, shard_name, sync_file
from data.errors import DataError
from data.gene_vocabulary import gene_vocabulary
from data.genes import GeneSpace
from data.hashing import Stream
from data.manifest import Shard, SourceRecord, corpus_schema, index_ranges
from data.options import Options
from data.order import choose_rows
from data.ragged import offsets_of
from data.readers import RaggedBatch, open_reader
from data.tokenizers import ExpressionTransform
from data.torch_threads import keep_torch_threads

Flavor = Literal["seurat_v3", "seurat_v3_paper", "seurat", "cell_ranger"]
_COUNT_FLAVORS = ("seurat_v3", "seurat_v3_paper")
_TARGET_SUM = 1e4
"""Library size that counts are scaled to for the flavors that want logarithms."""
_LEAST_CELLS = 20
"""Sampled cells that a group must have to be ranked by itself."""
_SEED = 0
_ROWS_AT_ONCE = 1024
_ROWS_PER_SHARD = 20_000
_NONE_CHOSEN = "no genes are chosen without hvg_selection"

Say = Callable[[str], None]


@dataclass(frozen=True)
class HvgOptions:
    """Say which genes are chosen."""

    num_genes: int
    flavor: Flavor | None = None
    """None takes `seurat_v3` for counts and `seurat` for log-normalised values."""
    batch_key: str | None = None
    """Obs column whose groups are ranked each by itself; None takes each source file as a group."""
    whitelist: tuple[str, ...] = ()
    max_cells: int = 20_000
    """Cells that genes are ranked on, a seeded choice, where there are more."""

    @classmethod
    def read(cls, table: Options) -> "HvgOptions | None":
        """Take the options out of the table `preprocessing`; None where no genes are to be chosen."""
        num_genes = table.count_or_none("hvg_selection", None, minimum=1)
        flavor = table.choice("hvg_flavor", (*get_args(Flavor), None), None)
        batch_key = table.text_or_none("hvg_batch_key")
        given = table.take_any("hvg_whitelist")
        max_cells = table.count("hvg_max_cells", 20_000, minimum=1)
        if num_genes is None:
            asked = {"hvg_flavor": flavor, "hvg_batch_key": batch_key, "hvg_whitelist": given}
            for name, value in asked.items():
                if value is not None:
                    table.wrong(name, _NONE_CHOSEN)
            if "hvg_max_cells" in table:
                table.wrong("hvg_max_cells", _NONE_CHOSEN)
            return None
        if given is not None and not isinstance(given, str | list | tuple):
            table.wrong("hvg_whitelist", f"got {given!r}; it must be a list of genes or the path of one")
            given = None
        names = gene_vocabulary(given).ids if isinstance(given, str) else tuple(map(str, given or ()))
        if len(names) > num_genes:
            table.wrong("hvg_whitelist", f"its {len(names)} genes are more than hvg_selection: {num_genes}")
        return cls(num_genes, flavor, batch_key, names, max_cells)


def choose_genes(info: CorpusInfo, options: HvgOptions, say: Say) -> GeneSpace:
    """Return the chosen genes in their order.

    Raises:
        DataError: scanpy is not there, the flavor does not fit the values, or scanpy cannot rank the genes.
    """
    space = info.gene_space
    kept = _whitelisted(space, options.whitelist, say)
    flavor = _flavor(options, info.manifest.value_kind, say)
    if options.num_genes >= len(space):
        say(f"hvg_selection: all {len(space):,} genes are kept, since {options.num_genes:,} were asked for")
        ranked = np.arange(len(space))
    else:
        ranked = _ranked(info, options, flavor, say)
    others = ranked[~np.isin(ranked, kept)][: max(options.num_genes - len(kept), 0)]
    chosen = np.concatenate([kept, others]).astype(np.int64)
    return GeneSpace(
        tuple(space.ids[index] for index in chosen),
        tuple(space.symbols[index] for index in chosen),
        space.key,
    )


def narrow_corpus(info: CorpusInfo, space: GeneSpace, folder: Path, min_genes: int) -> None:
    """Write the corpus of a part of the genes, in the order of `space`; a folder that is there is replaced.

    Cells with fewer than `min_genes` expressed genes of these are dropped. It is loadable when it is complete.
    """
    shutil.rmtree(folder, ignore_errors=True)
    unfinished = folder / UNFINISHED
    unfinished.mkdir(parents=True)
    writer = _NarrowedShards(info, space, unfinished, min_genes)
    reader = open_reader(info)
    for start in range(0, info.num_cells, _ROWS_AT_ONCE):
        writer.add(reader.read(np.arange(start, min(start + _ROWS_AT_ONCE, info.num_cells))))
    writer.close()
    if not writer.parts:
        raise DataError(
            f"{info.path}: no cell expresses {min_genes} of the {len(space)} chosen genes (min_genes, hvg_selection)"
        )
    storage = info.manifest.storage
    shards = tuple(
        Shard(shard_name(index, len(writer.parts), storage), rows, hash_file(part), part.stat().st_size)
        for index, (part, rows) in enumerate(writer.parts)
    )
    manifest = replace(
        info.manifest,
        num_cells=sum(shard.rows for shard in shards),
        n_nonzero=writer.n_nonzero,
        gene_sha256=space.sha256,
        shards=shards,
        sources=tuple(writer.source_record(index) for index in range(len(info.manifest.sources))),
        conversion_sha256=None,
    )
    publish_corpus(folder, manifest, space, [part for part, _ in writer.parts])
    shutil.rmtree(unfinished)


class _NarrowedShards:
    """Write rows with a part of their genes."""

    def __init__(self, info: CorpusInfo, space: GeneSpace, folder: Path, min_genes: int) -> None:
        self.info = info
        self.parts: list[tuple[Path, int]] = []
        self.n_nonzero = 0
        self._folder, self._min_genes, self._num_genes = folder, min_genes, len(space)
        self._remap = np.full(len(info.gene_space), -1, np.int32)
        self._remap[info.gene_space.indices(space.ids)] = np.arange(len(space), dtype=np.int32)
        self._schema = corpus_schema(info.manifest.count_dtype, info.columns)
        self._writer: ShardWriter | None = None
        num_sources = len(info.manifest.sources)
        self._rows, self._dropped = np.zeros(num_sources, np.int64), np.zeros(num_sources, np.int64)
        self._sum_all, self._sum_kept = np.zeros(num_sources), np.zeros(num_sources)

    def add(self, cells: RaggedBatch) -> None:
        """Write the rows of some cells that have enough of the genes."""
        genes = self._remap[cells.genes]
        kept = np.flatnonzero(genes >= 0)
        offsets = np.searchsorted(kept, cells.offsets)
        offsets, genes, counts = sort_rows(offsets, genes[kept], cells.counts[kept], self._num_genes)
        lengths = np.diff(offsets)
        stays = lengths >= self._min_genes
        sources = cells.columns["source"].astype(np.int64)
        num_sources = len(self._rows)
        self._rows += np.bincount(sources[stays], minlength=num_sources)
        self._dropped += np.bincount(sources[~stays], minlength=num_sources)
        self._sum_all += np.bincount(sources, cells.columns["total"], minlength=num_sources)
        self._sum_kept += np.bincount(np.repeat(sources, lengths), counts, minlength=num_sources)
        if not stays.all():
            inside = np.repeat(stays, lengths)
            genes, counts, offsets = genes[inside], counts[inside], offsets_of(lengths[stays])
        if len(offsets) == 1:
            return
        if self._writer is None or self._writer.num_rows >= _ROWS_PER_SHARD:
            self.close()
            self._path = self._folder / f"shard-{len(self.parts):05d}"
            self._writer = ShardWriter(self._path, self._schema, self.info.manifest.storage)
        scalars = {name: column[stays] for name, column in cells.columns.items()}
        self._writer.write(offsets.astype(np.int32), genes, counts, scalars)
        self.n_nonzero += len(genes)

    def close(self) -> None:
        """Finish the shard that is being written."""
        if self._writer is not None:
            self._writer.close()
            sync_file(self._path)
            self.parts.append((self._path, self._writer.num_rows))
            self._writer = None

    def source_record(self, index: int) -> SourceRecord:
        """Return what the narrowed corpus took from a source."""
        record = self.info.manifest.sources[index]
        measured = np.sort(self._remap[record.measured_mask(len(self._remap)) & (self._remap >= 0)])
        total = self._sum_all[index]
        return replace(
            record,
            rows=int(self._rows[index]),
            genes_matched=len(measured),
            counts_dropped_fraction=float(1 - self._sum_kept[index] / total) if total else 0.0,
            cells_dropped=record.cells_dropped + int(self._dropped[index]),
            measured_genes=index_ranges(measured),
        )


def _whitelisted(space: GeneSpace, names: Sequence[str], say: Say) -> NDArray[np.int64]:
    """Return the indices of the whitelist's genes, in its order; names that the corpus lacks are said."""
    found: list[int] = []
    missing: list[str] = []
    for name in names:
        try:
            found.append(space.index(name))
        except DataError:
            missing.append(name)
    if missing and not found:
        raise DataError(
            f"preprocessing.hvg_whitelist: none of its {len(names)} genes ({', '.join(names[:3])}) is among the "
            f"{len(space):,} genes of the data ({', '.join(space.ids[:3])})"
        )
    if missing:
        say(
            f"hvg_whitelist: {len(missing)} of {len(names)} genes are not in the data: {', '.join(missing[:6])}"
        )
    return np.array(list(dict.fromkeys(found)), np.int64)


def _flavor(options: HvgOptions, value_kind: str, say: Say) -> Flavor:
    if options.flavor is None:
        return "seurat_v3" if value_kind == "counts" else "seurat"
    if value_kind == "lognorm" and options.flavor in _COUNT_FLAVORS:
        raise DataError(
            f"preprocessing.hvg_flavor: {options.flavor} ranks genes by raw counts, and the files hold log-normalised "
            "values; set seurat or cell_ranger, leave it out, or name the layer that holds counts"
        )
    return options.flavor


def _ranked(info: CorpusInfo, options: HvgOptions, flavor: Flavor, say: Say) -> NDArray[np.int64]:
    """Return the indices of as many genes as are asked for, best first."""
    scanpy, anndata = _import_scanpy(flavor)
    rows = np.flatnonzero(choose_rows(info.num_cells, options.max_cells, _SEED, Stream.FIT_SAMPLE))
    needs_logarithm = flavor not in _COUNT_FLAVORS and info.manifest.value_kind == "counts"
    transform = (
        ExpressionTransform(_TARGET_SUM, log1p=True) if needs_logarithm else ExpressionTransform(None, False)
    )
    matrix, groups = _without_small_groups(*_sample(info, rows, options.batch_key, transform), say)
    num_cells, num_genes = cast(tuple[int, int], matrix.shape)
    cells = anndata.AnnData(matrix)
    cells.var_names = list(map(str, range(num_genes)))
    has_groups = len(np.unique(groups)) > 1
    if has_groups:
        cells.obs["group"] = groups.astype(str)
        cells.obs["group"] = cells.obs["group"].astype("category")
    say(
        f"hvg_selection: scanpy {version('scanpy')} ranks {num_genes:,} genes on {num_cells:,} of "
        f"{info.num_cells:,} cells, flavor {flavor}"
        + (
            f", in {len(np.unique(groups))} groups ({options.batch_key or 'source file'})"
            if has_groups
            else ""
        )
    )
    try:
        with keep_torch_threads(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = scanpy.pp.highly_variable_genes(
                cells,
                n_top_genes=options.num_genes,
                flavor=flavor,
                batch_key="group" if has_groups else None,
                inplace=False,
            )
    except (ValueError, ZeroDivisionError, IndexError) as error:
        raise DataError(
            f"preprocessing.hvg_selection: scanpy cannot rank the genes ({error}), of too few cells or too even ones "
            f"perhaps ({num_cells} cells); raise hvg_max_cells, choose another hvg_batch_key, or set hvg_flavor: "
            "seurat"
        ) from error
    return _best_first(table.reindex(cells.var_names), flavor)


def _best_first(table: Any, flavor: Flavor) -> NDArray[np.int64]:
    """Return the genes that scanpy chose, in the order that it chose them by; ties in the order of the gene space."""
    chosen = np.flatnonzero(table["highly_variable"].fillna(False).to_numpy(bool))

    def ranking(column: str, highest_first: bool) -> NDArray[np.float64]:
        if column not in table:  # of a single group
            return np.zeros(len(chosen))
        values = table[column].to_numpy(np.float64)[chosen]
        return np.nan_to_num(-values if highest_first else values, nan=np.inf)

    by_groups = ranking("highly_variable_nbatches", True)
    by_rank = ranking(
        *(("highly_variable_rank", False) if flavor in _COUNT_FLAVORS else ("dispersions_norm", True))
    )
    first, second = (by_rank, by_groups) if flavor == "seurat_v3" else (by_groups, by_rank)
    return chosen[np.lexsort((second, first))]


def _sample(
    info: CorpusInfo, rows: NDArray[np.int64], batch_key: str | None, transform: ExpressionTransform
) -> tuple[scipy.sparse.csr_matrix, NDArray[Any]]:
    """Read cells as a matrix of what the transform makes of their values, and the group of each."""
    if batch_key is not None and batch_key not in info.columns:
        raise DataError(
            f"preprocessing.hvg_batch_key: no obs column {batch_key!r} was kept; there are: "
            f"{', '.join(info.columns) or 'none'}"
        )
    group = batch_key or "source"
    reader = open_reader(info, ["total", group])
    genes, counts, lengths, groups = [], [], [], []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        cells = reader.read(rows[start : start + _ROWS_AT_ONCE])
        genes.append(cells.genes)
        counts.append(transform.apply(cells.counts, cells.offsets, cells.columns["total"]))
        lengths.append(np.diff(cells.offsets))
        groups.append(cast(NDArray[Any], cells.columns[group]))
    parts = (np.concatenate(counts), np.concatenate(genes), offsets_of(np.concatenate(lengths)))
    matrix = scipy.sparse.csr_matrix(parts, shape=(len(rows), len(info.gene_space)))
    return matrix, np.concatenate(groups)


def _without_small_groups(
    matrix: scipy.sparse.csr_matrix, groups: NDArray[Any], say: Say
) -> tuple[scipy.sparse.csr_matrix, NDArray[Any]]:
    names, index, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    small = sizes < _LEAST_CELLS
    if len(names) == 1 or not small.any():
        return matrix, groups
    if small.all():
        raise DataError(
            f"preprocessing.hvg_selection: each of the {len(names)} groups has fewer than {_LEAST_CELLS} of the "
            "sampled cells, too few to rank genes by; raise hvg_max_cells or choose another hvg_batch_key"
        )
    say(
        f"hvg_selection: {small.sum()} groups of fewer than {_LEAST_CELLS} sampled cells are left out of the ranking"
    )
    stays = ~small[index]
    return matrix[stays], groups[stays]


def _import_scanpy(flavor: Flavor) -> tuple[Any, Any]:
    needed = "scanpy"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import anndata
            import scanpy

            if flavor in _COUNT_FLAVORS:
                needed = "scikit-misc"
                import skmisc.loess  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"preprocessing.hvg_selection: {needed} is not installed ({error}); it is in the extra `preprocess`: "
            'pip install -c constraints.txt -e ".[preprocess]"'
        ) from error
    return scanpy, anndata
