"""Write made-up cells of any number in bounded memory, drawn molecule by molecule; million_cells.py starts it.

A cell has a log-normal number of molecules. Each is a molecule of a gene with a frequency that falls as one over the
gene's rank (Zipf), changed by the cell's type and technical batch. So counts are those of a multinomial draw.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.ragged import offsets_of
from data.synthetic import SyntheticCounts, write_counts_h5ad

NUM_FILES = 4
BATCHES_PER_FILE = 2
NUM_TYPES = 8
MEDIAN_MOLECULES = 500
"""With 20,000 genes a cell then expresses about 300 of them."""
DEPTH_SPREAD = 0.4
"""Standard deviation of the logarithm of a cell's molecules."""
TYPE_SPREAD, BATCH_SPREAD = 1.0, 0.2
"""Standard deviation of the logarithm of a gene's frequency between types, and between technical batches."""
_TABLE = 1 << 20
_CELLS_AT_ONCE = 4096


def write_files(folder: Path, num_cells: int, num_genes: int, seed: int) -> None:
    """Write `num_cells` cells as h5ad files, each with technical batches of its own and cells of all types."""
    rng = np.random.default_rng(seed)
    frequencies = _type_frequencies(rng, num_genes)
    sizes = np.diff(np.linspace(0, num_cells, NUM_FILES + 1).astype(int))
    types = [f"type_{index}" for index in range(NUM_TYPES)]
    for file, size in enumerate(sizes.tolist()):
        batches = [f"batch_{file * BATCHES_PER_FILE + index}" for index in range(BATCHES_PER_FILE)]
        chunks = draw_cells(rng, size, frequencies)
        write_counts_h5ad(folder / f"cells_{file}.h5ad", chunks, (size, num_genes), batches, types)


def draw_cells(
    rng: np.random.Generator, num_cells: int, frequencies: NDArray[np.float64]
) -> Iterator[SyntheticCounts]:
    """Yield a file's cells in pieces; `frequencies` are those of each type's genes [types, genes]."""
    num_types, num_genes = frequencies.shape
    effect = np.exp(rng.normal(0, BATCH_SPREAD, (BATCHES_PER_FILE, 1, num_genes)))
    tables = _gene_tables(effect * frequencies)
    for start in range(0, num_cells, _CELLS_AT_ONCE):
        count = min(_CELLS_AT_ONCE, num_cells - start)
        batch = rng.integers(0, BATCHES_PER_FILE, count)
        cell_type = rng.integers(0, num_types, count)
        depth = np.maximum(rng.lognormal(np.log(MEDIAN_MOLECULES), DEPTH_SPREAD, count), 1).astype(np.int64)
        place = (batch * num_types + cell_type) * _TABLE
        molecules = np.repeat(place, depth) + rng.integers(0, _TABLE, depth.sum())
        # One number for each pair of cell and gene; equal ones are molecules of the same gene.
        pairs = np.repeat(np.arange(count, dtype=np.int32) * num_genes, depth) + tables[molecules]
        pairs.sort()
        first = np.flatnonzero(np.diff(pairs, prepend=-1))
        counts = np.minimum(np.diff(first, append=len(pairs)), 65535).astype(np.uint16)
        cells, genes = np.divmod(pairs[first], num_genes)
        lengths = np.bincount(cells, minlength=count)
        yield SyntheticCounts(offsets_of(lengths), genes.astype(np.int32), counts, batch, cell_type)


def _type_frequencies(rng: np.random.Generator, num_genes: int) -> NDArray[np.float64]:
    """Return how frequent each gene is in each type, up to a factor [types, genes]; ranks are in no order."""
    zipf = 1.0 / (1 + rng.permutation(num_genes))
    return zipf * np.exp(rng.normal(0, TYPE_SPREAD, (NUM_TYPES, num_genes)))


def _gene_tables(frequencies: NDArray[np.float64]) -> NDArray[np.int32]:
    """Return for each technical batch and type, one after the other, genes as often as they are frequent.

    A gene is then drawn by one look-up at a random place.
    """
    tables = []
    for each in frequencies.reshape(-1, frequencies.shape[-1]):
        ends = np.round(np.cumsum(each) / each.sum() * _TABLE).astype(np.int64)
        tables.append(np.repeat(np.arange(len(each), dtype=np.int32), np.diff(ends, prepend=0)))
    return np.concatenate(tables)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, required=True)
    parser.add_argument("--genes", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    write_files(arguments.folder, arguments.cells, arguments.genes, arguments.seed)


if __name__ == "__main__":
    main()
