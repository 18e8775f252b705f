"""Measure our loader beside other projects' on the same cells: speed, what a batch mixes, and what is exact.

    python benchmarks/peers.py                       # speed, one process and two workers
    python benchmarks/peers.py --facts               # order, processes and resuming, from the batches themselves

anndata and Hugging Face `datasets` come with Cellphase; annbatch (Python 3.12), scDataset and cell-load do not: install
them into an environment of their own. What is not installed is named. Every loader is a process of its own that stays
alive; rounds go through the loaders in turn, so that a busy spell of the machine meets all of them, and a ratio is
the median of the rounds' own: of cells/s by the clock, and of cells for each second of processor time over all of a
loader's threads and processes, which other programs disturb less. The page cache is warm.

Ratios are among loaders of one order. `blocks` permutes blocks of 64 neighbouring cells over the whole data set and
shuffles within windows of 8,192 cells; ours, annbatch's and scDataset's have these two settings in common. `uniform`
is a permutation of all cells; `sets` are of perturbed cells, and cell-load gives nothing else. The two first genes of
every cell hold its number, so that each batch tells which cells are in it.
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

from benchmarks._rounds import run_rounds
from data.corpus import CorpusWriter, open_corpus
from data.genes import GeneSpace
from data.hashing import DrawKey
from data.loader import StepLoader, cell_loader
from data.manifest import ObsColumn
from data.memory import keep_freed_memory
from data.order import GlobalOrder
from data.ragged import offsets_of, pad, row_mask, row_numbers
from data.readers import ArrowReader
from data.synthetic import make_synthetic_counts

BATCH, BLOCK, WINDOW = 128, 64, 8192
DISTINCT_CELLS = 8192
NUM_TARGETS, CONTROL = 32, "non-targeting"
SET_SIZE = 64
DRAINED = 8
"""Batches taken before the clock starts: what workers prepared while other loaders had their turn."""
MAX_SECONDS = 6.0
"""Of a loader in a round, where even one window takes longer."""
FORMS = ("padded", "dense", "sets")
Batches = Iterator[Any]
Epochs = Callable[[int], Batches]


class Asked(NamedTuple):
    """Say what a loader is to give; epochs are asked for in order, from 0."""

    folder: Path
    form: str
    """`padded`: gene index int64, count float32 and mask [B, longest cell]; `dense`: counts float32 [B, genes]; `sets`:
    two sets of 64 perturbed cells of one target and cell type, dense, beside as many controls."""
    workers: int = 0
    rank: int = 0
    world_size: int = 1
    batch: int = BATCH


class Case(NamedTuple):
    """One loader in one order."""

    label: str
    order: str
    package: str
    open: Callable[[Asked], Epochs]
    resume: Callable[[Asked, int], Callable[[], Batches]] | None = None
    """What goes on in epoch 0 after so many batches, by what the loader offers for it."""


def main() -> None:
    """Compare the loaders, or serve as one of them where a child process was started for it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=5 * WINDOW, help="a multiple of 8,192")
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--nonzero", type=int, default=1_482, help="expressed genes of a cell, on average")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each loader in each round, at least")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2], help="worker processes of a loader")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--facts", action="store_true", help="check order and exactness in place of speed")
    parser.add_argument("--keep", type=Path, help="folder to keep the cells in and to take them from again")
    parser.add_argument("--serve", nargs=3, metavar=("CASE", "FORM", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cells < 1 or arguments.cells % WINDOW:
        parser.error(f"--cells {arguments.cells} is not a multiple of {WINDOW}, so that no window is cut off")
    if arguments.serve:
        case, form, workers = arguments.serve
        serve(CASES[case], Asked(arguments.keep, form, int(workers)), arguments.seconds)
        return
    absent = {name for name in arguments.cases if importlib.util.find_spec(CASES[name].package) is None}
    cases = [name for name in arguments.cases if name not in absent]
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="peers-"))
    try:
        make_data(folder, arguments.cells, arguments.genes, arguments.nonzero)
        print(f"{arguments.cells:,} cells x {arguments.genes:,} genes, {arguments.nonzero:,} expressed in a cell; "
              f"batches of {BATCH}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")  # fmt: skip
        print(versions())
        for name in sorted(absent):
            print(f"absent: {CASES[name].label} ({CASES[name].package} is not installed)")
        if arguments.facts:
            print_facts(folder, [name for name in cases if CASES[name].order != "sets"])
            return
        for form, workers in itertools.product(arguments.forms, arguments.workers):
            print(f"\n{form}, {f'{workers} workers' if workers else 'one process'}; "
                  f"load {os.getloadavg()[0]:.1f}", flush=True)  # fmt: skip
            fitting = [name for name in cases if (CASES[name].order == "sets") == (form == "sets")]
            print_speeds(run_loaders(folder, fitting, form, workers, arguments))
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder)


def versions() -> str:
    """Name the versions that speed depends on."""
    names = [
        "torch",
        "numpy",
        "scipy",
        "anndata",
        "annbatch",
        "zarrs",
        "scDataset",
        "datasets",
        "pyarrow",
        "cell-load",
    ]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"Python {sys.version.split()[0]}, " + ", ".join(found)


def make_data(folder: Path, num_cells: int, num_genes: int, nonzero: int) -> None:
    """Write the same cells as a corpus, as h5ad and as annbatch's collections, where they are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps([num_cells, num_genes, nonzero])
    stated = folder / "cells.json"
    if stated.exists() and stated.read_text() != settings:
        raise SystemExit(f"{folder} holds other cells than these; choose another folder for --keep")
    if not (folder / "corpus").exists():
        write_cells(folder, num_cells, num_genes, nonzero)
    stated.write_text(settings)
    if importlib.util.find_spec("annbatch") is not None:
        write_collections(folder)


def write_cells(folder: Path, num_cells: int, num_genes: int, nonzero: int) -> None:
    """Write the cells as a corpus and as h5ad."""
    import anndata
    import pandas as pd
    import scipy.sparse

    names = tuple(f"GENE{index}" for index in range(num_genes))
    made = make_synthetic_counts(min(num_cells, DISTINCT_CELLS), num_genes, nonzero, seed=0)
    labels = {
        "technical_batch": tuple(f"batch_{index}" for index in range(4)),
        "cell_type": tuple(f"type_{index}" for index in range(4)),
        "target_gene": (CONTROL, *names[2 : NUM_TARGETS + 2]),
    }
    every = np.arange(num_cells)
    codes = {
        "technical_batch": np.resize(made.technical_batch, num_cells),
        "cell_type": every // (NUM_TARGETS + 1) % 4,
        "target_gene": every % (NUM_TARGETS + 1),
    }
    columns = {name: ObsColumn("class", values) for name, values in labels.items()}
    parts = []
    with CorpusWriter(folder / "corpus", GeneSpace(names, names, "symbol"), columns=columns) as writer:
        for start in range(0, num_cells, DISTINCT_CELLS):
            count = min(DISTINCT_CELLS, num_cells - start)
            part = numbered(made, every[start : start + count])
            writer.write(*part, {name: each[start : start + count] for name, each in codes.items()})
            parts.append(scipy.sparse.csr_matrix((part[2].astype(np.float32), part[1], part[0]),
                                                 shape=(count, num_genes)))  # fmt: skip
    cells = anndata.AnnData(scipy.sparse.csr_matrix(scipy.sparse.vstack(parts)))
    cells.obs_names = [f"cell_{index}" for index in range(num_cells)]
    cells.var_names = list(names)
    for column, name in (
        ("gem_group", "technical_batch"),
        ("cell_type", "cell_type"),
        ("gene", "target_gene"),
    ):
        cells.obs[column] = pd.Categorical.from_codes(codes[name], labels[name])
    cells.write_h5ad(folder / "cells.h5ad")


def write_collections(folder: Path) -> None:
    """Write the h5ad file's cells in annbatch's own format, packed and not."""
    import annbatch  # type: ignore[import-not-found]

    for name, options in {"annbatch": {}, "annbatch-plain": {"zarr_compressor": ()}}.items():
        if not (folder / f"{name}.done").exists():
            collection = annbatch.DatasetCollection(str(folder / f"{name}.zarr"))
            collection.add_adatas([str(folder / "cells.h5ad")], shuffle=False, **options)
            (folder / f"{name}.done").touch()


def numbered(made: Any, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return offsets, genes and counts of the first made-up cells; the counts of genes 0 and 1 hold their numbers."""
    count = len(numbers)
    end = made.indptr[count]
    rows = row_numbers(made.indptr[: count + 1])
    kept = made.indices[:end] > 1
    lengths = np.bincount(rows[kept], minlength=count) + 2
    offsets = offsets_of(lengths)
    is_number = np.zeros(offsets[-1], np.bool_)
    is_number[offsets[:-1]] = is_number[offsets[:-1] + 1] = True
    genes, counts = np.empty(offsets[-1], np.int32), np.empty(offsets[-1], np.uint16)
    genes[is_number] = np.tile([0, 1], count)
    counts[is_number] = np.stack([numbers // 256 + 1, numbers % 256 + 1], 1).reshape(-1)
    genes[~is_number], counts[~is_number] = made.indices[:end][kept], made.counts[:end][kept]
    return offsets, genes, counts


def cell_numbers(batch: Any) -> np.ndarray:
    """Return which cells are in a batch, by the counts of genes 0 and 1."""
    values = batch["values"] if isinstance(batch, dict) else batch
    high, low = values[:, 0].numpy().astype(np.int64), values[:, 1].numpy().astype(np.int64)
    return (high - 1) * 256 + low - 1


# The loaders


def open_ours(asked: Asked, block: int = BLOCK) -> StepLoader:
    """Open our loader with the counts as they are."""
    keep_freed_memory()
    source: Any = DenseCells(asked.folder / "corpus")
    if asked.form == "padded":
        num_genes = len(open_corpus(asked.folder / "corpus").gene_space)
        options = {"strategy": "continuous_projection", "max_genes": num_genes, "prepend_cls": False,
                   "normalize": None, "log1p": False}  # fmt: skip
        source = cell_loader(asked.folder / "corpus", tokenizer=options, shuffle_block=block)
    order = GlobalOrder(len(source), seed=0, phase=0, block=block, window=WINDOW)
    return StepLoader(source, order, draw_seed=0, phase=0, global_batch_size=asked.batch * asked.world_size,
                      micro_batch_size=asked.batch, rank=asked.rank, world_size=asked.world_size,
                      num_workers=asked.workers)  # fmt: skip


class DenseCells:
    """Counts as dense rows: a source of one's own for our loader."""

    def __init__(self, corpus: Path) -> None:
        """Open the corpus."""
        info = open_corpus(corpus)
        self.reader, self.num_genes = ArrowReader(info, []), len(info.gene_space)

    def __len__(self) -> int:
        """Count the cells."""
        return self.reader.num_rows

    def fetch(self, rows: np.ndarray, draw: DrawKey) -> dict[str, Any]:
        """Return the batch of these rows."""
        cells = self.reader.read(rows)
        dense = np.zeros((len(rows), self.num_genes), np.float32)
        dense.reshape(-1)[row_numbers(cells.offsets) * self.num_genes + cells.genes] = cells.counts
        return {"values": torch.from_numpy(dense)}


def ours(asked: Asked, block: int = BLOCK) -> Epochs:
    """Give epochs of our loader."""
    loader = open_ours(asked, block)
    return lambda epoch: (micro.batch for step in loader.steps(epoch) for micro in step)


def ours_resumed(asked: Asked, batches: int, block: int = BLOCK) -> Callable[[], Batches]:
    """Start our loader in the middle of an epoch, as a resumed run does."""
    return lambda: (micro.batch for step in open_ours(asked, block).steps(0, batches) for micro in step)


def annbatch_epochs(asked: Asked, store: str = "annbatch") -> Epochs:
    """Give epochs of annbatch's loader, over an unshuffled collection in its own format."""
    import annbatch  # type: ignore[import-not-found]
    import anndata
    import zarr
    from annbatch.samplers import DistributedSampler as Distributed  # type: ignore[import-not-found]
    from annbatch.samplers import RandomSampler  # type: ignore[import-not-found]

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1})
    sampler: Any = RandomSampler(chunk_size=BLOCK, preload_nchunks=WINDOW // BLOCK, batch_size=asked.batch,
                                 drop_last=True, rng=np.random.default_rng(0))  # fmt: skip
    if asked.world_size > 1:
        sampler = Distributed(sampler, dist_info=lambda: (asked.rank, asked.world_size))
    loader: Any = annbatch.Loader(batch_sampler=sampler, preload_to_gpu=False).use_collection(
        annbatch.DatasetCollection(str(asked.folder / f"{store}.zarr"), mode="r"),
        load_adata=lambda group: anndata.AnnData(X=anndata.io.sparse_dataset(group["X"])),
    )
    if asked.workers:
        # Spawned: a forked worker waits for ever for the thread in which zarr reads.
        loader = DataLoader(loader, batch_size=None, num_workers=asked.workers, persistent_workers=True,
                            collate_fn=FromCsr(asked.form, "X"), multiprocessing_context="spawn")  # fmt: skip
        return lambda epoch: iter(loader)
    return lambda epoch: map(FromCsr(asked.form, "X"), loader)


def scdataset_epochs(asked: Asked) -> Epochs:
    """Give epochs of scDataset over a backed h5ad file."""
    import anndata
    import scdataset  # type: ignore[import-not-found]

    cells = anndata.read_h5ad(asked.folder / "cells.h5ad", backed="r")
    dataset = scdataset.scDataset(cells, scdataset.BlockShuffling(block_size=BLOCK), batch_size=asked.batch,
                                  fetch_factor=WINDOW // asked.batch, fetch_callback=rows_of,
                                  batch_transform=FromCsr(asked.form), rank=asked.rank,
                                  world_size=asked.world_size, seed=0)  # fmt: skip
    loader = DataLoader(
        dataset, batch_size=None, num_workers=asked.workers, persistent_workers=asked.workers > 0
    )
    return lambda epoch: iter(loader)


def rows_of(cells: Any, rows: np.ndarray) -> Any:
    """Read rows of a backed AnnData."""
    return cells.X[rows]


def annloader_epochs(asked: Asked, backed: bool = False) -> Epochs:
    """Give epochs of anndata's AnnLoader."""
    import anndata
    from anndata.experimental import AnnLoader

    open_loader: Any = AnnLoader

    cells = anndata.read_h5ad(asked.folder / "cells.h5ad", backed="r" if backed else None)
    sampler = permutation(cells.n_obs, asked)
    # Sparse rows come out where its converter, which makes them dense, is turned off.
    loader = open_loader(cells, batch_size=None, sampler=BatchSampler(sampler, asked.batch, drop_last=False),
                       use_default_converter=asked.form == "dense", num_workers=asked.workers,
                       persistent_workers=asked.workers > 0, collate_fn=FromView(asked.form))  # fmt: skip
    return sampled(loader, sampler)


def csr_epochs(asked: Asked, by_cell: bool) -> Epochs:
    """Give epochs of a torch DataLoader over a scipy matrix in memory."""
    import anndata

    matrix = anndata.read_h5ad(asked.folder / "cells.h5ad").X
    dataset = CellsOfMatrix(matrix, asked.form) if by_cell else BatchesOfMatrix(matrix)
    sampler = permutation(len(dataset), asked)
    collate = stack_cells if by_cell else FromCsr(asked.form)
    loader = DataLoader(dataset, asked.batch, sampler=sampler, collate_fn=collate, num_workers=asked.workers,
                        persistent_workers=asked.workers > 0)  # fmt: skip
    return sampled(loader, sampler)


def datasets_epochs(asked: Asked) -> Epochs:
    """Give epochs of a torch DataLoader over a `datasets.Dataset`, our corpus."""
    dataset: Any = hugging_face(asked)
    sampler = permutation(len(dataset), asked)
    loader = DataLoader(dataset, asked.batch, sampler=sampler, collate_fn=FromRows(asked), num_workers=asked.workers,
                        persistent_workers=asked.workers > 0)  # fmt: skip
    return sampled(loader, sampler)


def stream_of(asked: Asked) -> tuple[Any, Any]:
    """Open a `datasets.IterableDataset` with a shuffle buffer of a window, and a DataLoader over it."""
    from datasets.distributed import split_dataset_by_node

    stream: Any = hugging_face(asked).to_iterable_dataset(num_shards=8).shuffle(seed=0, buffer_size=WINDOW)
    if asked.world_size > 1:
        stream = split_dataset_by_node(stream, asked.rank, asked.world_size)
    return stream, DataLoader(stream, asked.batch, collate_fn=FromRows(asked), num_workers=asked.workers,
                              persistent_workers=asked.workers > 0)  # fmt: skip


def stream_epochs(asked: Asked) -> Epochs:
    """Give epochs of the stream."""
    stream, loader = stream_of(asked)

    def batches(epoch: int) -> Batches:
        stream.set_epoch(epoch)
        return iter(loader)

    return batches


def stream_resumed(asked: Asked, batches: int) -> Callable[[], Batches]:
    """Go on from the stream's own state after so many batches."""
    stream, loader = stream_of(asked)
    for _ in itertools.islice(loader, batches):
        pass
    state = stream.state_dict()

    def start() -> Batches:
        stream, loader = stream_of(asked)
        stream.load_state_dict(state)
        return iter(loader)

    return start


def hugging_face(asked: Asked) -> Any:
    """Open the corpus as a data set of Hugging Face."""
    import datasets

    return (
        datasets.load_from_disk(str(asked.folder / "corpus"))
        .select_columns(["genes", "counts"])
        .with_format("numpy")
    )


def our_sets(asked: Asked) -> Epochs:
    """Give epochs of our loader of perturbed cells; its rows are tokens, int64."""
    from data.perturbation import perturbation_loader

    source = perturbation_loader(asked.folder / "corpus", set_size=SET_SIZE, tokenizer={"strategy": "counts"},
                                 control_label=CONTROL, mix_technical_batches=True)  # fmt: skip
    sets = asked.batch // SET_SIZE
    order = GlobalOrder(
        len(source), seed=0, phase=0, block=source.shuffle_block, window=source.shuffle_window
    )
    loader = StepLoader(source, order, draw_seed=0, phase=0, global_batch_size=sets, micro_batch_size=sets, rank=0,
                        world_size=1, num_workers=asked.workers)  # fmt: skip
    return lambda epoch: (micro.batch for step in loader.steps(epoch) for micro in step)


def cell_load_epochs(asked: Asked) -> Epochs:
    """Give epochs of cell-load, with random controls of the cell type."""
    from cell_load.data_modules import PerturbationDataModule  # type: ignore[import-not-found]

    split = asked.folder / "split.toml"
    split.write_text(f'[datasets]\ncells = "{asked.folder / "cells.h5ad"}"\n\n[training]\ncells = "train"\n')
    module = PerturbationDataModule(str(split), batch_size=asked.batch // SET_SIZE, num_workers=asked.workers,
                                    pert_col="gene", batch_col="gem_group", cell_type_key="cell_type",
                                    control_pert=CONTROL, output_space="all", is_log1p=False,
                                    should_yield_control_cells=False, cell_sentence_len=SET_SIZE)  # fmt: skip
    module.setup("fit")
    loader = module.train_dataloader()

    def batches(epoch: int) -> Batches:
        loader.batch_sampler.set_epoch(epoch)
        return iter(loader)

    return batches


# From what they give to the batch that was asked for


class FromCsr:
    """Make the batch of a CSR matrix; padding is ours, which no other project has."""

    def __init__(self, form: str, key: str | None = None) -> None:
        """Take the form, and the key of a dict under which the matrix is."""
        self.form, self.key = form, key

    def __call__(self, batch: Any) -> Any:
        """Return the batch."""
        matrix = batch if self.key is None else batch[self.key]
        if self.form == "dense":
            return torch.from_numpy(matrix.toarray())
        return padded(matrix.indptr, matrix.indices, matrix.data)


class FromView:
    """Take the batch out of what AnnLoader gives."""

    def __init__(self, form: str) -> None:
        """Take the form."""
        self.form = form

    def __call__(self, view: Any) -> Any:
        """Return the batch."""
        return view.X if self.form == "dense" else FromCsr(self.form)(view.X)


class FromRows:
    """Make the batch of rows of genes and counts."""

    def __init__(self, asked: Asked) -> None:
        """Take form and genes."""
        self.form, self.num_genes = asked.form, len(open_corpus(asked.folder / "corpus").gene_space)

    def __call__(self, rows: list[dict[str, np.ndarray]]) -> Any:
        """Return the batch."""
        offsets = offsets_of(np.array([len(row["genes"]) for row in rows]))
        genes, counts = (np.concatenate([row[name] for row in rows]) for name in ("genes", "counts"))
        if self.form == "padded":
            return padded(offsets, genes, counts)
        dense = np.zeros((len(rows), self.num_genes), np.float32)
        dense[row_numbers(offsets), genes] = counts
        return torch.from_numpy(dense)


def padded(offsets: np.ndarray, genes: np.ndarray, counts: np.ndarray) -> dict[str, torch.Tensor]:
    """Pad genes and counts to the longest cell."""
    lengths = np.diff(offsets)
    width = int(lengths.max())
    arrays = {
        "tokens": pad(genes, offsets[:-1], lengths, width, 0, dtype=np.int64),
        "values": pad(counts, offsets[:-1], lengths, width, 0, dtype=np.float32),
        "attention_mask": row_mask(lengths, width),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class CellsOfMatrix(Dataset[Any]):
    """One cell at a time, as tutorials have it."""

    def __init__(self, matrix: Any, form: str) -> None:
        """Take the matrix."""
        self.matrix, self.form = matrix, form

    def __len__(self) -> int:
        """Count the cells."""
        return self.matrix.shape[0]

    def __getitem__(self, index: int) -> Any:
        """Return a cell, dense or as its genes and counts."""
        row = self.matrix[index]
        if self.form == "dense":
            return torch.from_numpy(row.toarray()[0])
        return torch.from_numpy(row.indices), torch.from_numpy(row.data)


def stack_cells(cells: list[Any]) -> Any:
    """Stack or pad cells with torch's own functions."""
    if isinstance(cells[0], torch.Tensor):
        return torch.stack(cells)
    genes, counts = (torch.nn.utils.rnn.pad_sequence(list(each), batch_first=True)
                     for each in zip(*cells, strict=True))  # fmt: skip
    lengths = torch.tensor([len(each) for each, _ in cells])
    mask = torch.arange(genes.shape[1]) < lengths[:, None]
    return {"tokens": genes.long(), "values": counts, "attention_mask": mask}


class BatchesOfMatrix(Dataset[Any]):
    """All cells of a batch at a time."""

    def __init__(self, matrix: Any) -> None:
        """Take the matrix."""
        self.matrix = matrix

    def __len__(self) -> int:
        """Count the cells."""
        return self.matrix.shape[0]

    def __getitems__(self, indices: list[int]) -> Any:
        """Return these cells as a matrix."""
        return self.matrix[indices]


def permutation(num_cells: int, asked: Asked) -> DistributedSampler[Any]:
    """Permute all cells, a different one in each epoch, divided over processes as torch does it."""
    return DistributedSampler(range(num_cells), asked.world_size, asked.rank, shuffle=True, seed=0)  # type: ignore[arg-type]


def sampled(loader: Any, sampler: DistributedSampler[Any]) -> Epochs:
    """Give epochs of a DataLoader with such a sampler."""

    def batches(epoch: int) -> Batches:
        sampler.set_epoch(epoch)
        return iter(loader)

    return batches


CASES = {
    "ours": Case("Cellphase", "blocks", "data", ours, ours_resumed),
    "annbatch": Case("annbatch, its format with lz4", "blocks", "annbatch", annbatch_epochs),
    "annbatch_plain": Case("annbatch, uncompressed", "blocks", "annbatch",
                           lambda asked: annbatch_epochs(asked, "annbatch-plain")),
    "scdataset": Case("scDataset, backed h5ad", "blocks", "scdataset", scdataset_epochs),
    "hf_stream": Case("datasets, streamed, buffer of 8,192", "blocks", "datasets", stream_epochs, stream_resumed),
    "ours_uniform": Case("Cellphase, shuffle_block 1", "uniform", "data", lambda asked: ours(asked, 1),
                         lambda asked, batches: ours_resumed(asked, batches, 1)),
    "hf_map": Case("datasets and torch DataLoader", "uniform", "datasets", datasets_epochs),
    "csr_batches": Case("scipy matrix in memory, by batch", "uniform", "scipy", lambda asked: csr_epochs(asked, False)),
    "csr_cells": Case("scipy matrix in memory, by cell", "uniform", "scipy", lambda asked: csr_epochs(asked, True)),
    "annloader": Case("anndata AnnLoader, in memory", "uniform", "anndata", annloader_epochs),
    "annloader_backed": Case("anndata AnnLoader, backed h5ad", "uniform", "anndata",
                             lambda asked: annloader_epochs(asked, backed=True)),
    "our_sets": Case("Cellphase, perturbation_loader", "sets", "data", our_sets),
    "cell_load": Case("cell-load, backed h5ad", "sets", "cell_load", cell_load_epochs),
}  # fmt: skip


# Speed


def run_loaders(
    folder: Path, cases: list[str], form: str, workers: int, arguments: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Let the loaders take turns, each in a process of its own."""
    options = ["--seconds", arguments.seconds, "--keep", folder]
    commands = {case: [Path(__file__).resolve(), "--serve", case, form, workers, *options] for case in cases}
    return run_rounds(commands, arguments.rounds)


def serve(case: Case, asked: Asked, seconds: float) -> None:
    """Take batches for a while whenever a line comes in, and answer with how many cells they had."""
    warnings.simplefilter("ignore")
    epochs = case.open(asked)
    batches = itertools.chain.from_iterable(map(epochs, itertools.count()))
    # A training loop holds a few batches at a time, so memory is not the same few pages again and again.
    held: deque[Any] = deque(itertools.islice(batches, 1), maxlen=4)
    per_window = WINDOW // asked.batch
    for _ in sys.stdin:
        started, drained = time.perf_counter(), 0
        while drained < DRAINED and time.perf_counter() - started < seconds:
            held.append(next(batches))
            drained += 1
        taken, started, cpu = 0, time.perf_counter(), processor_seconds()
        # Whole windows, since some loaders read one at once and then hand out its batches.
        while (passed := time.perf_counter() - started) < seconds or taken % per_window:
            if passed > MAX_SECONDS:
                break
            held.append(next(batches))
            taken += 1
        cells = taken * asked.batch
        wall, used = time.perf_counter() - started, processor_seconds() - cpu
        print(json.dumps({"wall": cells / wall, "cpus": used / wall, "cpu": cells / used}), flush=True)


def processor_seconds() -> float:
    """Return the processor time of this process and all below it."""
    this = psutil.Process()
    return sum(sum(each.cpu_times()[:2]) for each in [this, *this.children(recursive=True)])


def print_speeds(results: dict[str, list[dict[str, float]]]) -> None:
    """Print medians; a ratio is the median of the rounds' own ratios to our loader in the same order."""
    print(f"{'loader':36} {'order':8} {'cells/s':>9} {'cells/CPU-s':>11} {'CPUs':>5} {'by the clock':>18} "
          f"{'by processor time':>18}")  # fmt: skip
    for name, rounds in results.items():
        case = CASES[name]
        wall, cpu, cpus = (statistics.median(each[key] for each in rounds) for key in ("wall", "cpu", "cpus"))
        yardstick = results.get({"blocks": "ours", "uniform": "ours_uniform", "sets": "our_sets"}[case.order])
        texts = ["", ""]
        if yardstick is not None:
            for place, key in enumerate(("wall", "cpu")):
                ratios = sorted(each[key] / our[key] for each, our in zip(rounds, yardstick, strict=True))
                texts[place] = f"{statistics.median(ratios):.3f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
        print(
            f"{case.label:36} {case.order:8} {wall:9,.0f} {cpu:11,.0f} {cpus:5.2f} {texts[0]:>18} {texts[1]:>18}"
        )


# Order and exactness


def print_facts(folder: Path, cases: list[str]) -> None:
    """Print what the cells of the batches show."""
    warnings.simplefilter("ignore")
    uniform = expected_blocks(json.loads((folder / "cells.json").read_text())[0])
    print(f"a batch of {BATCH} cells drawn uniformly has {uniform:.0f} of the blocks of {BLOCK} neighbours\n")
    head = ["loader", "order", "each cell once", "with 2 workers", "blocks in a batch", "2 processes: once",
            "the same global batches", "resumed at half an epoch"]  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in cases:
        print("| " + " | ".join(facts(CASES[name], folder)) + " |", flush=True)


def expected_blocks(num_cells: int) -> float:
    """Return how many blocks a batch meets on average when cells are drawn uniformly."""
    blocks = num_cells / BLOCK
    return blocks * (1 - (1 - 1 / blocks) ** BATCH)


def facts(case: Case, folder: Path) -> list[str]:
    """Read epochs and compare which cells came when."""
    asked = Asked(folder, "padded")
    num_cells = json.loads((folder / "cells.json").read_text())[0]
    batches = list(map(cell_numbers, case.open(asked)(0)))
    mixed = statistics.median(len(np.unique(batch // BLOCK)) for batch in batches)
    by_workers = list(map(cell_numbers, case.open(asked._replace(workers=2))(0)))
    ranks = []
    for rank in range(2):
        part = case.open(asked._replace(rank=rank, world_size=2, batch=BATCH // 2))
        ranks.append(list(map(cell_numbers, part(0))))
    together = [np.concatenate(pair) for pair in zip(*ranks, strict=False)]
    is_same = len(together) == len(batches) and all(
        np.array_equal(np.sort(one), np.sort(two)) for one, two in zip(batches, together, strict=True)
    )
    return [
        case.label,
        case.order,
        *(yes(is_once(each, num_cells)) for each in (batches, by_workers)),
        f"{mixed:.0f}",
        yes(is_once([*ranks[0], *ranks[1]], num_cells)),
        yes(is_same),
        resumed(case, asked, batches),
    ]


def resumed(case: Case, asked: Asked, batches: list[np.ndarray]) -> str:
    """Say whether an epoch that is resumed at its half goes on with the same batches, and how fast the first comes."""
    if case.resume is None:
        return "not offered"
    half = len(batches) // 2
    start = case.resume(asked, half)
    started = time.perf_counter()
    rest = start()
    first = cell_numbers(next(rest))
    seconds = time.perf_counter() - started
    found = [first, *map(cell_numbers, rest)]
    is_equal = len(found) == len(batches) - half and all(map(np.array_equal, found, batches[half:]))
    return f"{'exact' if is_equal else 'other cells'}, {seconds:.2g} s"


def is_once(batches: list[np.ndarray], num_cells: int) -> bool:
    """Tell whether every cell came exactly once."""
    return np.array_equal(np.sort(np.concatenate(batches)), np.arange(num_cells))


def yes(answer: bool) -> str:
    """Say it."""
    return "yes" if answer else "no"


if __name__ == "__main__":
    main()
