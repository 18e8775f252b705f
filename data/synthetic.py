"""Made-up cells with cell types, for tests and benchmarks."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data.ragged import offsets_of

_CELLS_AT_ONCE = 8192


class SyntheticCounts(NamedTuple):
    """Hold counts of made-up cells as the three arrays of a CSR matrix, and labels."""

    indptr: NDArray[np.int64]  # [cells + 1]
    indices: NDArray[np.int32]  # [nnz], genes, increasing inside a cell
    counts: NDArray[np.uint16]  # [nnz]
    technical_batch: NDArray[np.int64]  # [cells]
    cell_type: NDArray[np.int64]  # [cells]

    @property
    def totals(self) -> NDArray[np.float32]:
        """Return each cell's sum of counts."""
        sums = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        return (sums[self.indptr[1:]] - sums[self.indptr[:-1]]).astype(np.float32)


def make_synthetic_counts(
    num_cells: int,
    num_genes: int,
    mean_genes_per_cell: int,
    seed: int,
    num_batches: int = 4,
    num_cell_types: int = 8,
) -> SyntheticCounts:
    """Make cells of several types: each type has genes of its own that are high, every cell a depth of its own.

    Genes are independent given type and depth. About `mean_genes_per_cell` genes are expressed in a cell.
    """
    rng = np.random.default_rng(seed)
    rates = _type_rates(rng, num_genes, mean_genes_per_cell, num_cell_types)
    chunks = list(_chunks(rng, num_cells, rates, num_batches))
    lengths = np.concatenate([np.diff(chunk.indptr) for chunk in chunks])
    columns: list[Any] = [
        np.concatenate(parts) for parts in zip(*(chunk[1:] for chunk in chunks), strict=True)
    ]
    return SyntheticCounts(offsets_of(lengths), *columns)


def write_synthetic_h5ad(
    path: str | Path,
    num_cells: int,
    num_genes: int,
    mean_genes_per_cell: int,
    seed: int,
    num_batches: int = 4,
    num_cell_types: int = 8,
) -> None:
    """Write made-up cells as an h5ad file (CSR float32 counts; obs batch, cell_type, total) in bounded memory."""
    rng = np.random.default_rng(seed)
    rates = _type_rates(rng, num_genes, mean_genes_per_cell, num_cell_types)
    write_counts_h5ad(
        path,
        _chunks(rng, num_cells, rates, num_batches),
        (num_cells, num_genes),
        _names("batch_", num_batches),
        _names("type_", num_cell_types),
    )


def write_counts_h5ad(
    path: str | Path,
    chunks: Iterable[SyntheticCounts],
    shape: tuple[int, int],
    batch_names: Sequence[str] | pd.Index,
    type_names: Sequence[str] | pd.Index,
) -> None:
    """Write cells that come in pieces, `shape` [cells, genes] in all, as `write_synthetic_h5ad` does.

    No more than a piece of the counts is in memory; of a cell's other columns some 20 bytes stay.
    """
    num_cells, num_genes = shape
    empty = anndata.AnnData(var=pd.DataFrame(index=_names("GENE", num_genes)))
    empty.write_h5ad(path)
    labels: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    ends = [np.zeros(1, np.int64)]
    with h5py.File(path, "r+") as file:
        matrix = _create_csr(file, shape)
        for chunk in chunks:
            for name, values in (("indices", chunk.indices), ("data", chunk.counts.astype(np.float32))):
                stored = matrix[name]
                assert isinstance(stored, h5py.Dataset)
                stored.resize(len(stored) + len(values), axis=0)
                stored[-len(values) :] = values
            ends.append(chunk.indptr[1:] + ends[-1][-1])
            labels.append((chunk.technical_batch, chunk.cell_type, chunk.totals))
        matrix.create_dataset("indptr", data=np.concatenate(ends))
        batch, cell_type, total = (np.concatenate(parts) for parts in zip(*labels, strict=True))
        obs = pd.DataFrame(
            {
                "batch": pd.Categorical.from_codes(batch, batch_names),
                "cell_type": pd.Categorical.from_codes(cell_type, type_names),
                "total": total,
            },
            index=_names("cell_", num_cells),
        )
        del file["obs"]
        anndata.io.write_elem(file, "obs", obs)


def _names(prefix: str, count: int) -> pd.Index:
    return pd.Index([f"{prefix}{index}" for index in range(count)])


def _create_csr(file: h5py.File, shape: tuple[int, int]) -> h5py.Group:
    if "X" in file:
        del file["X"]
    matrix = file.create_group("X")
    matrix.attrs["encoding-type"] = "csr_matrix"
    matrix.attrs["encoding-version"] = "0.1.0"
    matrix.attrs["shape"] = shape
    for name, dtype in (("indices", np.int32), ("data", np.float32)):
        matrix.create_dataset(name, (0,), dtype, maxshape=(None,), chunks=(1 << 18,))
    return matrix


def _chunks(
    rng: np.random.Generator, num_cells: int, rates: NDArray[np.float64], num_batches: int
) -> Iterator[SyntheticCounts]:
    for start in range(0, num_cells, _CELLS_AT_ONCE):
        yield _make_chunk(rng, min(_CELLS_AT_ONCE, num_cells - start), rates, num_batches)


def _type_rates(
    rng: np.random.Generator, num_genes: int, mean_genes_per_cell: int, num_cell_types: int
) -> NDArray[np.float64]:
    """Draw each type's expected counts [types, genes], scaled so that the wanted number of genes is expressed."""
    rates = np.exp(rng.normal(-2, 1.5, num_genes) + rng.normal(0, 1, (num_cell_types, num_genes)))
    low, high = 1e-6, 1e6
    for _ in range(60):
        middle = np.sqrt(low * high)
        is_enough = -np.expm1(-middle * rates).sum() / num_cell_types > mean_genes_per_cell
        low, high = (low, middle) if is_enough else (middle, high)
    return rates * low


def _make_chunk(
    rng: np.random.Generator, num_cells: int, rates: NDArray[np.float64], num_batches: int
) -> SyntheticCounts:
    cell_type = rng.integers(0, len(rates), num_cells)
    batch = rng.integers(0, num_batches, num_cells)
    depth = rng.lognormal(-0.06, 0.35, num_cells).astype(np.float32)
    parts = []
    # A gene is expressed with the probability that a Poisson count is not 0; its count is then geometric, which
    # has the heavy tail of real counts and is cheap to draw.
    for start in range(0, num_cells, 512):
        part = slice(start, start + 512)
        expected = rates.astype(np.float32)[cell_type[part]] * depth[part, None]
        is_expressed = rng.random(expected.shape, np.float32) < -np.expm1(-expected)
        cells, genes = np.nonzero(is_expressed)
        counts = rng.geometric(1 / (1 + expected[is_expressed] / 2))
        lengths = np.bincount(cells, minlength=len(expected))
        parts.append((lengths, genes.astype(np.int32), np.minimum(counts, 65535).astype(np.uint16)))
    lengths, genes, counts = (np.concatenate(each) for each in zip(*parts, strict=True))
    return SyntheticCounts(offsets_of(lengths), genes, counts, batch, cell_type)
