"""A small SOMA collection laid out as the CELLxGENE Census is, for the tests that read it."""

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

BUILD = "2025-01-30"
TISSUES = ("brain", "lung", 'a "quoted" \\ tissue\'s é\U0001f9e0')
DATASETS = ("dataset-a", "dataset-b", "dataset-c")


class SmallCensus(NamedTuple):
    """What was written."""

    uri: str
    counts: np.ndarray  # [cells, genes]
    obs: dict[str, np.ndarray]
    gene_ids: list[str]
    symbols: list[str]
    measured: np.ndarray  # bool [datasets, genes]


def gene_id(index: int) -> str:
    return f"ENSG{index:011d}"


def write_census(
    folder: Path,
    num_cells: int = 300,
    num_genes: int = 40,
    *,
    organism: str = "homo_sapiens",
    density: float = 0.3,
    high: int = 50,
    change=None,
    is_bare: bool = False,
    has_datasets: bool = True,
    seed: int = 0,
) -> SmallCensus:
    """Write a Census; `change` may edit its counts [cells, genes], `is_bare` writes the experiment alone."""
    import tiledbsoma

    rng = np.random.default_rng(seed)
    counts = (
        rng.integers(1, high, (num_cells, num_genes)) * (rng.random((num_cells, num_genes)) < density)
    ).astype(np.float32)
    counts[:, 0] += 1
    dataset = np.sort(rng.integers(0, len(DATASETS), num_cells))
    measured = rng.random((len(DATASETS), num_genes)) < 0.9
    measured[:, 0] = True
    counts *= measured[dataset]
    if change is not None:
        change(counts)
    cells = np.arange(num_cells)
    obs = {
        "dataset_id": np.array(DATASETS)[dataset],
        "tissue": np.array(TISSUES)[rng.integers(0, 3, num_cells)],
        "donor_id": np.array([f"donor-{index % 7}" for index in cells]),
        "is_primary_data": cells % 3 != 0,
        "nnz": np.count_nonzero(counts, axis=1).astype(np.int64),
        "age": cells / 4,
        "odd name": cells % 5,
    }
    if not has_datasets:
        del obs["dataset_id"]
    ids, symbols = (
        [gene_id(index) for index in range(num_genes)],
        [f"GENE{index}" for index in range(num_genes)],
    )
    census = SmallCensus(str(folder), counts, obs, ids, symbols, measured)
    if is_bare:
        with tiledbsoma.Experiment.create(str(folder)) as experiment:
            _fill(experiment, census, has_presence=False)
        return census
    with tiledbsoma.Collection.create(str(folder)) as root:
        info = root.add_new_collection("census_info")
        _write_frame(info, "summary", {"label": ["census_build_date"], "value": [BUILD]})
        _write_frame(info, "datasets", {"dataset_id": list(DATASETS)})
        data = root.add_new_collection("census_data")
        _fill(data.add_new_collection(organism, tiledbsoma.Experiment), census, has_presence=True)
    return census


def _fill(experiment, census: SmallCensus, *, has_presence: bool) -> None:
    import tiledbsoma

    categories = {
        name: pa.array(census.obs[name]).dictionary_encode()
        for name in ("dataset_id", "tissue", "donor_id")
        if name in census.obs
    }
    _write_frame(experiment, "obs", {**census.obs, **categories})
    rna = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
    lengths = np.arange(len(census.gene_ids), dtype=np.int64) * 100
    var = {"feature_id": census.gene_ids, "feature_name": census.symbols, "feature_length": lengths}
    _write_frame(rna, "var", var)
    _write_matrix(rna.add_new_collection("X"), "raw", census.counts)
    if has_presence:
        _write_matrix(rna, "feature_dataset_presence_matrix", census.measured.astype(np.uint8))


def _write_frame(parent, name: str, columns: dict) -> None:
    import tiledbsoma

    num_rows = len(next(iter(columns.values())))
    table = pa.table({"soma_joinid": pa.array(range(num_rows), pa.int64()), **columns})
    table = table.cast(pa.schema([pa.field(each.name, _large(each.type)) for each in table.schema]))
    frame = parent.add_new_dataframe(
        name, schema=table.schema, index_column_names=["soma_joinid"], domain=[[0, num_rows - 1]]
    )
    uri = frame.uri
    frame.close()
    time.sleep(0.005)  # the categories are a change of the schema, and two of one millisecond have no order
    with tiledbsoma.open(uri, "w") as frame:
        frame.write(table)


def _large(kind: pa.DataType) -> pa.DataType:
    return pa.large_string() if pa.types.is_string(kind) else kind


def _write_matrix(parent, name: str, values: np.ndarray) -> None:
    kind = pa.from_numpy_dtype(values.dtype)
    with parent.add_new_sparse_ndarray(name, type=kind, shape=values.shape) as matrix:
        for start in range(0, len(values), 10_000):
            rows, columns = np.nonzero(values[start : start + 10_000])
            written = {"soma_dim_0": rows + start, "soma_dim_1": columns}
            table = {key: pa.array(each, pa.int64()) for key, each in written.items()}
            matrix.write(pa.table({**table, "soma_data": pa.array(values[rows + start, columns])}))
