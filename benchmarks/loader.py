"""Measure the loader: cells/s beside a bare copy of the same bytes, anndata and Hugging Face `datasets`.

Every case is a process of its own that stays alive; rounds go through the cases in turn, so that a busy spell
of the machine meets all of them. The page cache is warm. Ratios to the copy in the same run hold; absolute
figures depend on the machine and its load.
"""

import argparse
import functools
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks._memory import memory_of
from benchmarks._rounds import run_rounds
from data.columns import RaggedColumn
from data.corpus import CorpusWriter, open_corpus
from data.genes import GeneSpace
from data.hashing import DrawKey
from data.loader import StepLoader, cell_loader
from data.manifest import ObsColumn
from data.memory import keep_freed_memory
from data.order import GlobalOrder
from data.ragged import row_mask, row_numbers
from data.readers import ArrowReader
from data.synthetic import make_synthetic_counts, write_synthetic_h5ad
from data.tokenizers import NUM_SPECIAL_TOKENS

BATCH = 128
WIDTH = 2048
H5AD_CELLS = 10_000
DISTINCT_CELLS = 8_192
CASES = {
    "copy": "bare copy of the bytes of 128 cells",
    "sparse": "ours, sparse, blocks of 64",
    "uniform": "ours, sparse, uniform random",
    "padded": f"ours, padded [128, {WIDTH}] int32 + uint16 + mask",
    "contract": f"ours, padded [128, {WIDTH}] int64 + float32 + mask",
    "binned": "ours, log-normalised and binned, padded",
    "masked": "ours, the same with masking",
    "ranked": "ours, rank_value, padded",
    "dense": "ours, dense [128, genes] float32",
    "hf_map": "datasets, map style, numpy format",
    "hf_stream": "datasets, streaming, shuffle buffer",
    "anndata": "anndata backed, random rows",
}
TARGETS = {"sparse": 0.22, "uniform": 0.22, "padded": 0.19, "contract": 0.19}


def main() -> None:
    """Run all cases in turn, or the one that a child process was started for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--nonzero", type=int, default=1_482, help="expressed genes of a cell, on average")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each case in each round")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--keep", type=Path, help="folder to keep the corpus in and to take it from again")
    parser.add_argument("--case", nargs=2, metavar=("CASE", "DATA"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        serve_case(arguments.case[0], Path(arguments.case[1]), arguments.seconds)
        return
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="loader-benchmark-"))
    try:
        corpus, h5ad = make_data(folder, arguments.cells, arguments.genes, arguments.nonzero)
        num_cells, size = open_corpus(corpus).num_cells, sum(file.stat().st_size for file in corpus.iterdir())
        print(f"{num_cells:,} cells x {arguments.genes:,} genes, {size / 1e9:.2f} GB; load {os.getloadavg()[0]:.1f} "
              f"on {os.cpu_count()} cores; {arguments.rounds} rounds of {arguments.seconds:g} s")  # fmt: skip
        print_table(run_cases(corpus, h5ad, arguments))
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder)


def make_data(folder: Path, num_cells: int, num_genes: int, nonzero: int) -> tuple[Path, Path]:
    """Write the corpus and a smaller h5ad file where they are missing, and return where they are."""
    num_in_h5ad = min(num_cells, H5AD_CELLS)
    corpus = folder / f"corpus-{num_cells}-{num_genes}-{nonzero}"
    h5ad = folder / f"cells-{num_in_h5ad}-{num_genes}-{nonzero}.h5ad"
    folder.mkdir(parents=True, exist_ok=True)
    if not corpus.exists():
        # A few thousand distinct cells, repeated: drawing them takes longer than everything else here.
        cells = make_synthetic_counts(min(num_cells, DISTINCT_CELLS), num_genes, nonzero, seed=0)
        names = tuple(f"GENE{index}" for index in range(num_genes))
        columns = {"technical_batch": ObsColumn("class", tuple(f"batch_{index}" for index in range(4)))}
        with CorpusWriter(corpus, GeneSpace(names, names, "symbol"), columns=columns) as writer:
            for start in range(0, num_cells, DISTINCT_CELLS):
                count = min(DISTINCT_CELLS, num_cells - start)
                end = cells.indptr[count]
                labels = {"technical_batch": cells.technical_batch[:count]}
                writer.write(cells.indptr[: count + 1], cells.indices[:end], cells.counts[:end], labels)
    if not h5ad.exists():
        write_synthetic_h5ad(h5ad, num_in_h5ad, num_genes, nonzero, seed=0)
    return corpus, h5ad


def run_cases(corpus: Path, h5ad: Path, arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Let the cases take turns, each in a process of its own."""
    options = ["--seconds", arguments.seconds]
    commands = {
        case: [Path(__file__).resolve(), "--case", case, h5ad if case == "anndata" else corpus, *options]
        for case in arguments.cases
    }
    return run_rounds(commands, arguments.rounds)


def serve_case(case: str, data: Path, seconds: float) -> None:
    """Run one case for a while whenever a line comes in, and answer with what it did."""
    batches = START[case](data)
    next(batches)
    # A training loop holds a few batches at a time, so memory is not the same few pages again and again.
    held: deque[Any] = deque(maxlen=4)
    for _ in sys.stdin:
        cells, started, cpu = 0, time.perf_counter(), time.process_time()
        while time.perf_counter() - started < seconds:
            count, batch = next(batches)
            held.append(batch)
            cells += count
        wall = time.perf_counter() - started
        answer = {"wall": cells / wall, "cpu": cells / (time.process_time() - cpu), **memory()}
        print(json.dumps(answer), flush=True)


def memory() -> dict[str, float]:
    """Return the peak of resident memory, mapped pages included, and what of it is the process's own now."""
    now = memory_of()
    return {"peak": now.peak / 1e6, "own": now.own / 1e6}


Batches = Iterator[tuple[int, Any]]


def copy_bytes(corpus: Path) -> Batches:
    """Copy the genes and counts of 128 neighbouring cells out of the mapped files, into new arrays."""
    import pyarrow as pa

    pieces = []
    for path in open_corpus(corpus).shard_paths:
        for batch in pa.ipc.open_stream(pa.memory_map(path)):
            genes, counts = (batch.column(name) for name in ("genes", "counts"))
            offsets = genes.offsets.to_numpy()
            values = genes.values.to_numpy(), counts.values.to_numpy()
            for start in range(0, batch.num_rows - BATCH + 1, BATCH):
                pieces.append((offsets[start], offsets[start + BATCH], *values))
    while True:
        for index in np.random.default_rng(0).permutation(len(pieces)):
            start, stop, genes, counts = pieces[index]
            yield BATCH, (genes[start:stop].copy(), counts[start:stop].copy())


def sparse(corpus: Path, block: int = 64) -> Batches:
    """Read cells in the loader's order."""
    keep_freed_memory()
    reader = ArrowReader(open_corpus(corpus), ["total"])
    window = 8192 if block > 1 else reader.num_rows
    order = GlobalOrder(reader.num_rows, 0, 0, block=block, window=window)
    epoch = 0
    while True:
        for start in range(0, reader.num_rows, BATCH):
            rows = order.rows(epoch, start, start + BATCH)
            yield len(rows), reader.read(rows)
        epoch += 1


class Laid:
    """Lay cells out without any transformation."""

    def __init__(self, corpus: Path, layout: Callable[[RaggedColumn, RaggedColumn], dict[str, Any]]) -> None:
        """Read this corpus; `layout` makes a batch of genes and counts."""
        self.table = ArrowReader(open_corpus(corpus), []).table
        self.layout = layout
        keep_freed_memory()

    def __len__(self) -> int:
        """Count the cells."""
        return self.table.num_rows

    def fetch(self, rows: np.ndarray, draw: DrawKey) -> dict[str, Any]:
        """Return the batch of these rows."""
        cells: Any = self.table.gather(rows)
        return self.layout(cells["genes"], cells["counts"])


def padded(genes: RaggedColumn, counts: RaggedColumn) -> dict[str, Any]:
    """Pad genes and counts in the types that they are stored in."""
    arrays = {
        "tokens": genes.padded(WIDTH, -1),
        "values": counts.padded(WIDTH, 0),
        "attention_mask": row_mask(genes.lengths, WIDTH),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def contract(genes: RaggedColumn, counts: RaggedColumn) -> dict[str, Any]:
    """Pad genes and counts in the types that models get them in."""
    arrays = {
        "tokens": genes.padded(WIDTH, -NUM_SPECIAL_TOKENS),
        "values": counts.padded(WIDTH, 0, np.float32),
        "attention_mask": row_mask(genes.lengths, WIDTH),
    }
    arrays["tokens"] += NUM_SPECIAL_TOKENS
    arrays["tokens"] = arrays["tokens"].astype(np.int64)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def dense(genes: RaggedColumn, counts: RaggedColumn, num_genes: int) -> dict[str, Any]:
    """Write counts into rows of all genes."""
    cells = np.zeros((len(genes), num_genes), np.float32)
    cells.reshape(-1)[row_numbers(genes.offsets) * num_genes + genes.values] = counts.values
    return {"expression": torch.from_numpy(cells)}


def through_loader(source: Any) -> Batches:
    """Run a source through the loader, eight micro-batches a step."""
    order = GlobalOrder(len(source), seed=0, phase=0)
    loader = StepLoader(source, order, draw_seed=0, phase=0, global_batch_size=8 * BATCH, micro_batch_size=BATCH,
                        rank=0, world_size=1)  # fmt: skip
    epoch = 0
    while True:
        for micro in itertools.chain.from_iterable(loader.steps(epoch)):
            yield micro.num_cells, micro.batch
        epoch += 1


def tokenized(strategy: str, masking: dict[str, Any] | None = None) -> Callable[[Path], Batches]:
    """Run the whole loader with a tokenizer."""
    tokenizer = {"strategy": strategy, "max_genes": WIDTH, "padding": "max_genes"}
    return lambda corpus: through_loader(cell_loader(corpus, tokenizer=tokenizer, masking=masking))


def dense_loader(corpus: Path) -> Batches:
    """Densify in the loader's thread."""
    num_genes = len(open_corpus(corpus).gene_space)
    return through_loader(Laid(corpus, functools.partial(dense, num_genes=num_genes)))


def hf_map(corpus: Path) -> Batches:
    """Take random rows of a `datasets.Dataset` in numpy format."""
    import datasets

    dataset = datasets.load_from_disk(str(corpus)).select_columns(["genes", "counts"]).with_format("numpy")
    rng = np.random.default_rng(0)
    while True:
        rows = rng.integers(0, len(dataset), BATCH)
        batch = dataset[rows.tolist()]
        flat = np.concatenate(list(batch["genes"])), np.concatenate(list(batch["counts"]))
        yield BATCH, flat


def hf_stream(corpus: Path) -> Batches:
    """Stream a `datasets.IterableDataset` through a shuffle buffer."""
    import datasets

    dataset = datasets.load_from_disk(str(corpus)).select_columns(["genes", "counts"]).with_format("numpy")
    assert isinstance(dataset, datasets.Dataset)
    stream = dataset.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=2048)
    while True:
        rows: list[Any] = []
        for row in stream:
            rows.append(row)
            if len(rows) == BATCH:
                flat = [np.concatenate([each[name] for each in rows]) for name in ("genes", "counts")]
                yield BATCH, flat
                rows = []


def backed(h5ad: Path) -> Batches:
    """Take random rows of a backed AnnData."""
    import anndata

    cells = anndata.read_h5ad(h5ad, backed="r")
    rng = np.random.default_rng(0)
    assert cells.X is not None
    while True:
        yield BATCH, cells.X[np.sort(rng.choice(cells.n_obs, BATCH, replace=False))]


START: dict[str, Callable[[Path], Batches]] = {
    "copy": copy_bytes,
    "sparse": sparse,
    "uniform": lambda corpus: sparse(corpus, block=1),
    "padded": lambda corpus: through_loader(Laid(corpus, padded)),
    "contract": lambda corpus: through_loader(Laid(corpus, contract)),
    "binned": tokenized("binned_expression"),
    "masked": tokenized("binned_expression", {"mask_ratio": 0.15}),
    "ranked": tokenized("rank_value"),
    "dense": dense_loader,
    "hf_map": hf_map,
    "hf_stream": hf_stream,
    "anndata": backed,
}


def print_table(results: dict[str, list[dict[str, float]]]) -> None:
    """Print medians over the rounds; a ratio is the median of the rounds' own ratios to the copy."""
    print(f"{'case':50} {'cells/s':>9} {'per CPU-s':>9} {'of the copy':>11} {'peak MB':>8} {'own MB':>7}")
    for case, rounds in results.items():
        wall, cpu = (statistics.median(each[name] for each in rounds) for name in ("wall", "cpu"))
        ratio, wanted = "", ""
        if "copy" in results:
            ratios = [each["wall"] / copy["wall"] for each, copy in zip(rounds, results["copy"], strict=True)]
            middle = statistics.median(ratios)
            ratio = f"{middle:11.3f}"
            if case in TARGETS:
                wanted = f"  {'ok' if middle >= TARGETS[case] else 'below'}: {TARGETS[case]:.2f} wanted"
        peak, own = (max(each[name] for each in rounds) for name in ("peak", "own"))
        print(f"{CASES[case]:50} {wall:9,.0f} {cpu:9,.0f} {ratio:>11} {peak:8,.0f} {own:7,.0f}{wanted}")


if __name__ == "__main__":
    main()
