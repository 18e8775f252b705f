"""Small h5ad files for the tests of the converter, and what anndata itself reads from them."""

import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from data.corpus import CorpusInfo, open_corpus

SAMPLES = Path(__file__).parent.parent / "data" / "samples"
SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def random_counts(num_cells: int, num_genes: int, seed: int = 0, high: int = 50) -> np.ndarray:
    """Return mostly zero counts: every cell has the first gene but the last one, which has none."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, high, (num_cells, num_genes)) * (rng.random((num_cells, num_genes)) < 0.3)
    counts[:, 0] += 1
    counts[0, 1], counts[-1] = high - 1, 0
    return counts


def write_h5ad(
    path: Path,
    matrix,
    *,
    layout: str = "csr",
    dtype: str = "float32",
    genes: list[str] | None = None,
    obs: dict | None = None,
    var: dict | None = None,
    layers: dict | None = None,
    raw=None,
    **settings,
) -> Path:
    """Write a matrix [cells, genes] as X in the given layout and type."""
    matrix = np.asarray(matrix, dtype)
    make = {"csr": scipy.sparse.csr_matrix, "csc": scipy.sparse.csc_matrix, "dense": np.array}[layout]
    names = genes if genes is not None else [f"GENE{i}" for i in range(matrix.shape[1])]
    data = anndata.AnnData(
        make(matrix),
        obs=pd.DataFrame(obs or {}, index=[f"cell{i}" for i in range(matrix.shape[0])]),
        var=pd.DataFrame(var or {}, index=pd.Index(names, dtype=object)),
    )
    if raw is not None:
        data.raw = anndata.AnnData(scipy.sparse.csr_matrix(raw), obs=data.obs, var=data.var)
    for name, layer in (layers or {}).items():
        data.layers[name] = layer
    data.write_h5ad(path, **settings)
    return path


def dense_corpus(info: CorpusInfo) -> np.ndarray:
    """Return the corpus's values [cells, genes of the gene space], checking the order of genes in each row."""
    import datasets

    if info.manifest.storage == "arrow":
        table = datasets.load_from_disk(info.path).with_format("arrow")[:]
    else:
        import pyarrow.parquet as pq

        table = pq.read_table([f"{info.path}/{shard.file}" for shard in info.manifest.shards])
    values = np.zeros((info.num_cells, len(info.gene_space)), np.float64)
    rows = zip(table["genes"].to_pylist(), table["counts"].to_pylist(), strict=True)
    for row, (genes, counts) in enumerate(rows):
        assert genes == sorted(set(genes))
        assert 0 not in counts
        values[row, genes] = counts
    return values


def read_with_anndata(path: Path) -> anndata.AnnData:
    """Read a file, also of an old encoding, which anndata warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return anndata.read_h5ad(path)


def anndata_values(path: Path, matrix: str = "X") -> tuple[np.ndarray, list[str]]:
    """Return what anndata reads from a file: values [cells, genes] and gene names."""
    data = read_with_anndata(path)
    source = data.raw if matrix == "raw.X" else data
    assert source is not None
    values = data.layers[matrix.removeprefix("layers/")] if matrix.startswith("layers/") else source.X
    dense = values.toarray() if scipy.sparse.issparse(values) else np.asarray(values)
    return dense, list(source.var_names)


def assert_equals_anndata(folder: Path, path: Path, matrix: str = "X") -> None:
    """Compare a corpus of one file and all its genes with anndata's reading, cell by cell."""
    info = open_corpus(folder)
    values, names = anndata_values(path, matrix)
    ours = dense_corpus(info)
    order = [info.gene_space.index(name) for name in names]
    assert np.array_equal(ours[:, order], values.astype(np.float32))
