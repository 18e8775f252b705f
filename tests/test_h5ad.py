from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

import data.h5ad_matrix
from data.cell_rows import BadValueError, cell_rows, exact_counts, exact_lognorm, judge_values, sort_rows
from data.errors import DataError
from data.genes import NOT_A_GENE
from data.h5ad import H5adFile
from data.h5ad_matrix import CscMatrix, MatrixChunk
from tests.h5ad_files import SAMPLES, anndata_values, random_counts, read_with_anndata, write_h5ad


def read_rows(file, name, tmp_path, start=0, stop=None):
    """Return the rows of a matrix put together from its chunks, and the number of chunks."""
    matrix = file.matrix(name)
    if isinstance(matrix, CscMatrix):
        matrix.transpose_to(tmp_path / "rows")
        matrix = matrix.open_transposed(tmp_path / "rows")
    stop = matrix.shape[0] if stop is None else stop
    values = np.zeros((stop - start, matrix.shape[1]), np.float64)
    row, num_chunks = start, 0
    for chunk in matrix.chunks(start, stop):
        assert chunk.first_row == row
        lengths = np.diff(chunk.offsets)
        at = np.repeat(np.arange(len(lengths)), lengths) + row - start
        values[at, chunk.columns] = chunk.values
        row += len(lengths)
        num_chunks += 1
    assert row == stop
    return values, num_chunks


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint16"])
def test_every_layout_and_type_is_read_as_anndata_reads_it(tmp_path, monkeypatch, layout, dtype):
    monkeypatch.setattr(data.h5ad_matrix, "VALUES_PER_CHUNK", 100)
    monkeypatch.setattr(data.h5ad_matrix, "_CSC_VALUES_PER_BUCKET", 64)
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(60, 30), layout=layout, dtype=dtype)
    with H5adFile(path) as file:
        values, num_chunks = read_rows(file, "X", tmp_path)
        assert np.array_equal(values, anndata_values(path)[0])
        assert num_chunks > 1
        part, _ = read_rows(file, "X", tmp_path, 7, 41)
        assert np.array_equal(part, values[7:41])


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_compressed_files_are_read(tmp_path, layout):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(50, 20), layout=layout, compression="gzip")
    with H5adFile(path) as file:
        assert np.array_equal(read_rows(file, "X", tmp_path)[0], anndata_values(path)[0])


def test_dense_blocks_follow_the_chunks_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(data.h5ad_matrix, "VALUES_PER_CHUNK", 20)
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(50, 20), layout="dense")
    with h5py.File(path, "r+") as file:
        values = file["X"][:]
        del file["X"]
        file.create_dataset("X", data=values, chunks=(16, 5))
    with H5adFile(path) as file:
        rows = [(chunk.first_row, len(chunk.offsets) - 1) for chunk in file.matrix("X").chunks(5, 50)]
        assert rows == [(5, 11), (16, 16), (32, 16), (48, 2)]
        assert np.array_equal(read_rows(file, "X", tmp_path)[0], values)


def test_a_row_longer_than_a_chunk_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data.h5ad_matrix, "VALUES_PER_CHUNK", 4)
    path = write_h5ad(tmp_path / "a.h5ad", np.ones((3, 10)))
    with H5adFile(path) as file:
        values, num_chunks = read_rows(file, "X", tmp_path)
        assert (values == 1).all()
        assert num_chunks == 3


def test_layers_and_raw_are_found_beside_x(tmp_path):
    counts = random_counts(20, 8)
    path = write_h5ad(
        tmp_path / "a.h5ad", counts * 0.5, layers={"counts": counts, "other": counts}, raw=counts * 2
    )
    with H5adFile(path) as file:
        assert file.matrix_names() == ["layers/counts", "layers/other", "raw.X", "X"]
        for name in file.matrix_names():
            assert np.array_equal(read_rows(file, name, tmp_path)[0], anndata_values(path, name)[0])
        with pytest.raises(
            DataError, match="no matrix 'layers/none'; it has: layers/counts, layers/other, raw.X, X"
        ):
            file.matrix("layers/none")


def test_the_oldest_encoding_is_read_as_anndata_reads_it(tmp_path):
    path = SAMPLES / "10x_pbmc68k_reduced.h5ad"
    expected = read_with_anndata(path)
    with H5adFile(path) as file:
        assert np.array_equal(read_rows(file, "raw.X", tmp_path)[0], expected.raw.X.toarray())
        assert np.array_equal(read_rows(file, "X", tmp_path)[0], expected.X)
        assert file.genes("raw.X").symbols == tuple(expected.raw.var_names)
        assert file.obs.text("bulk_labels") == tuple(expected.obs["bulk_labels"])
        assert file.obs.text("index") == tuple(expected.obs_names)
        assert np.array_equal(file.obs.numbers("percent_mito", 3, 9), expected.obs["percent_mito"][3:9])
        assert file.obs.kind("n_genes") == "number"
        assert file.obs.kind("bulk_labels") == "class"
        assert file.cell_name(2) == expected.obs_names[2]


def test_categories_of_anndata_0_7_are_read(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(4, 3))
    with h5py.File(path, "r+") as file:
        obs = file["obs"]
        obs.create_dataset("__categories/batch", data=["x", "y"], dtype=h5py.string_dtype())
        obs["batch"] = np.array([1, 0, -1, 1], np.int8)
        obs["batch"].attrs["categories"] = obs["__categories/batch"].ref
    with H5adFile(path) as file:
        assert file.obs.columns() == ["batch"]
        assert file.obs.text("batch") == ("y", "x", "", "y")


def test_obs_columns_of_every_type_are_read(tmp_path):
    obs = {
        "category": pd.Categorical(["b", None, "a", "b"], categories=["a", "b", "unused"]),
        "text": ["x", "", "y", "x"],
        "flag": [True, False, True, True],
        "whole": [3, 1, 2, 3],
        "real": np.array([0.5, np.nan, 1.5, 2.0]),
        "single": np.array([0.5, 1, 1, 2], np.float32),
        "lane": np.array([1.0, 2.0, np.nan, 1.0]),
        "nullable": pd.array([1, None, 3, 1], dtype="Int64"),
        "number_category": pd.Categorical([10, 2, 10, 2]),
    }
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(4, 3), obs=obs)
    with H5adFile(path) as file:
        assert file.obs.text("category") == ("b", "", "a", "b")
        assert file.obs.text("text") == ("x", "", "y", "x")
        assert file.obs.text("flag") == ("True", "False", "True", "True")
        assert file.obs.text("whole") == ("3", "1", "2", "3")
        assert file.obs.text("lane") == ("1", "2", "", "1")
        assert file.obs.text("nullable") == ("1", "", "3", "1")
        assert file.obs.text("number_category", 1, 3) == ("2", "10")
        kinds = {name: file.obs.kind(name) for name in obs}
        assert [name for name, kind in kinds.items() if kind == "class"] == [
            "category", "text", "flag", "number_category",
        ]  # fmt: skip
        assert file.obs.number_type("whole") == "int64"
        assert file.obs.number_type("single") == "float32"
        assert file.obs.numbers("real", 0, 4).dtype == np.float64
        with pytest.raises(DataError, match=r"'nullable'\]: row 1 has no value"):
            file.obs.numbers("nullable", 0, 4)
        with pytest.raises(DataError, match="fractional numbers cannot be labels"):
            file.obs.text("real")
        with pytest.raises(DataError, match="has no column 'none'; it has: .*category"):
            file.obs.labels("none", 0, 4)


def test_nullable_text_is_read(tmp_path):
    obs = {"cell_type": pd.array(["T", None, "B"], dtype="string")}
    with anndata.settings.override(allow_write_nullable_strings=True):
        path = write_h5ad(tmp_path / "a.h5ad", random_counts(3, 2), obs=obs)
    with H5adFile(path) as file:
        assert file.obs.kind("cell_type") == "class"
        assert file.obs.text("cell_type") == ("T", "", "B")


def test_ensembl_ids_are_found_by_content_and_stripped_of_versions(tmp_path):
    ids = ["ENSG00000000003.15", "ENSG00000000005.6"]
    strip = tuple(name.split(".")[0] for name in ids)
    values = np.ones((2, 2))
    as_column = write_h5ad(tmp_path / "a.h5ad", values, genes=["TSPAN6", "TNMD"], var={"gene_ids": ids})
    as_index = write_h5ad(tmp_path / "b.h5ad", values, genes=ids, var={"feature_name": ["TSPAN6", "TNMD"]})
    odd_column = write_h5ad(tmp_path / "c.h5ad", values, genes=["TSPAN6", "TNMD"], var={"accession": ids})
    for path in (as_column, as_index, odd_column):
        with H5adFile(path) as file:
            genes = file.genes("X")
        assert genes.ids == strip
        assert genes.symbols == ("TSPAN6", "TNMD")
    with H5adFile(as_column) as file:
        assert file.genes("X", "index").ids is None
        assert file.genes("X", "gene_ids").ids == strip
        with pytest.raises(DataError, match="var has no column 'ensembl_id'; it has: gene_ids"):
            file.genes("X", "ensembl_id")


KINDS = ["Gene Expression", "Antibody Capture", "Gene Expression", "CRISPR Guide Capture", "Antibody Capture"]


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_rows_of_var_that_are_no_genes_have_no_names(tmp_path):
    ids = [f"ENSG{number:011d}" for number in range(2)]
    var = {"gene_ids": [ids[0], "CD4_TotalSeqB", ids[1], "guide", "CD3_TotalSeqB"], "feature_types": KINDS}
    path = write_h5ad(
        tmp_path / "a.h5ad", np.ones((2, 5)), genes=["CD4", "CD4", "B", "guide", "CD3"], var=var
    )
    with H5adFile(path) as file:
        genes = file.genes("X")
        assert (genes.ids, genes.symbols) == (tuple(ids), ("CD4", "B"))
        assert file.genes("X", "index").names("symbol") == ("CD4", "B")
    assert genes.by_column(np.array([7, -1], np.int32)).tolist() == [
        7,
        NOT_A_GENE,
        -1,
        NOT_A_GENE,
        NOT_A_GENE,
    ]
    where = f"{path}: var: no genes, and left out of counts and totals"
    assert genes.notices() == [f"{where}: 2 Antibody Capture, 1 CRISPR Guide Capture"]


@pytest.mark.parametrize(
    ("column", "kinds"),
    [
        ("feature_types", ["Gene Expression"] * 3),
        ("feature_type", ["protein_coding", "lncRNA", "protein_coding"]),
        ("modality", ["one", "two", "three"]),
        ("feature_types", ["", "", ""]),
    ],
)
def test_columns_that_call_nothing_else_change_nothing(tmp_path, column, kinds):
    path = write_h5ad(tmp_path / "a.h5ad", np.ones((2, 3)), genes=["A", "B", "C"], var={column: kinds})
    with H5adFile(path) as file:
        genes = file.genes("X")
    assert (genes.symbols, genes.kinds, genes.notices()) == (("A", "B", "C"), None, [])


def test_spike_ins_of_cellxgene_are_no_genes(tmp_path):
    var = {"feature_type": ["protein_coding", "synthetic"], "feature_biotype": ["gene", "spike-in"]}
    path = write_h5ad(tmp_path / "a.h5ad", np.ones((2, 2)), genes=["A", "ERCC-00002"], var=var)
    with H5adFile(path) as file:
        assert file.genes("X").symbols == ("A",)


def test_a_file_without_the_expression_of_genes_is_refused(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", np.ones((2, 3)), var={"feature_types": ["Peaks"] * 3})
    message = r"var\['feature_types'\]: no row is 'Gene Expression': 3 Peaks; give a file .* drop the column"
    with H5adFile(path) as file, pytest.raises(DataError, match=message):
        file.genes("X")


def test_a_numbered_index_gives_way_to_a_column_of_symbols(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", np.ones((2, 2)), genes=["0", "1"], var={"gene_name": ["A", "B"]})
    with H5adFile(path) as file:
        assert file.genes("X").symbols == ("A", "B")


def test_files_that_are_not_h5ad_files_are_refused(tmp_path):
    text = tmp_path / "text.h5ad"
    text.write_text("cell,gene\n")
    with pytest.raises(DataError, match=r"text.h5ad: not an HDF5 file"):
        H5adFile(text)
    with pytest.raises(DataError, match="no such file"):
        H5adFile(tmp_path / "absent.h5ad")
    with pytest.raises(DataError, match="a folder, not an h5ad file"):
        H5adFile(tmp_path)
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["X"] = np.ones((2, 2))
    with pytest.raises(DataError, match="it has no 'obs'; its top level holds: X"):
        H5adFile(tmp_path / "other.h5ad")
    with h5py.File(tmp_path / "tenx.h5", "w") as file:
        file["matrix/barcodes"] = np.ones(2)
    with pytest.raises(DataError, match="10x Genomics matrix.*read_10x_h5"):
        H5adFile(tmp_path / "tenx.h5")


def test_a_truncated_file_is_refused(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(300, 40))
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"a.h5ad: the file is truncated"):
        H5adFile(path)


def damage(path, name, change):
    with h5py.File(path, "r+") as file:
        values = change(file[name][:])
        del file[name]
        file[name] = values


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("X/indptr", lambda a: a[::-1], "row pointers are not increasing"),
        ("X/indptr", lambda a: a[:-1], "arrays do not fit its shape"),
        ("X/indices", lambda a: a + 100, "names genes outside its 8"),
        ("X/data", lambda a: a[:-1], "arrays do not fit its shape"),
        ("X/data", lambda a: a.astype("S3"), "not a number type"),
    ],
)
def test_damaged_csr_arrays_are_refused(tmp_path, name, change, message):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8))
    damage(path, name, change)
    with H5adFile(path) as file, pytest.raises(DataError, match=message):
        read_rows(file, "X", tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("X/indptr", lambda a: a[::-1], "column pointers are not increasing"),
        ("X/indices", lambda a: a + 100, "names cells outside its 20"),
    ],
)
def test_damaged_csc_arrays_are_refused(tmp_path, name, change, message):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8), layout="csc")
    damage(path, name, change)
    with H5adFile(path) as file, pytest.raises(DataError, match=message):
        read_rows(file, "X", tmp_path)


def test_a_matrix_that_does_not_fit_obs_and_var_is_refused(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8), layout="dense")
    damage(path, "X", lambda a: a[:-1])
    with (
        H5adFile(path) as file,
        pytest.raises(DataError, match="19 cells x 8 genes, but obs and var have 20 and 8"),
    ):
        file.matrix("X")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0, 1, 2], "counts"),
        ([0.0, 3.0, 1.0], "counts"),
        ([], "counts"),
        ([0.5, 1.2, 0.0, 1.0], "lognorm"),
        ([0.5, 31.9], "lognorm"),
        ([0.5, 1027.87], "not logged"),
        ([1.0, 2.0, 0.5], "mixed"),
        ([1.0, -2.0], "negative"),
        ([1.0, np.nan], "not finite"),
        ([1.0, np.inf], "not finite"),
    ],
)
def test_values_are_told_apart(values, kind):
    assert judge_values([np.array(values)]).kind == kind


def test_counts_are_exact_or_refused():
    assert exact_counts(np.array([0.0, 65535.0])).dtype == np.uint16
    wide = exact_counts(np.array([65536, 2**32 - 1], np.float64))
    assert wide.dtype == np.uint32
    assert wide.tolist() == [65536, 2**32 - 1]
    assert exact_counts(np.array([True, False])).tolist() == [1, 0]
    for values, position, reason in [
        ([1, 2**32], 1, "above what the corpus can hold"),
        ([1, -1, np.nan], 1, "is negative"),
        ([1, np.nan], 1, "is NaN"),
        ([np.inf, 1], 0, "is infinite"),
        ([1, 2, 2.5], 2, "is fractional"),
        ([70000.5], 0, "is fractional"),
    ]:
        with pytest.raises(BadValueError, match=reason) as error:
            exact_counts(np.array(values))
        assert error.value.position == position


def test_a_count_just_above_the_limit_is_refused_in_single_precision_too():
    with pytest.raises(BadValueError, match="above what the corpus can hold"):
        exact_counts(np.array([1, 2**32], np.float32))


def test_lognorm_values_are_non_negative_and_finite():
    assert exact_lognorm(np.array([0.1, 2.0])).dtype == np.float32
    for values, reason in [
        ([-0.1], "negative"),
        ([np.nan], "NaN"),
        ([np.inf], "infinite"),
        ([1e39], "above"),
    ]:
        with pytest.raises(BadValueError, match=reason):
            exact_lognorm(np.array(values))


def chunk(dense):
    rows = scipy.sparse.csr_array(np.asarray(dense, np.float32))
    return MatrixChunk(0, rows.indptr.astype(np.int64), rows.indices, rows.data)


def test_rows_are_remapped_sorted_and_counted():
    rows = cell_rows(chunk([[1, 2, 3], [0, 0, 4], [0, 5, 0]]), np.array([2, -1, 0], np.int32), "counts", 1)
    assert rows.kept.tolist() == [True, True, False]
    assert rows.offsets.tolist() == [0, 2, 3]
    assert rows.genes.tolist() == [0, 2, 0]
    assert rows.counts.tolist() == [3, 1, 4]
    assert rows.totals.tolist() == [6, 4]
    assert rows.n_genes.tolist() == [3, 1]
    assert (rows.sum_all, rows.sum_kept) == (15, 8)


def test_stored_zeros_are_no_expressed_genes():
    stored = MatrixChunk(0, np.array([0, 3]), np.array([0, 1, 2]), np.array([1.0, 0.0, 2.0]))
    rows = cell_rows(stored, np.arange(3, dtype=np.int32), "counts", 0)
    assert rows.genes.tolist() == [0, 2]
    assert rows.n_genes.tolist() == [2]


def test_a_gene_stored_twice_in_a_cell_is_refused():
    stored = MatrixChunk(0, np.array([0, 1, 4]), np.array([0, 1, 2, 1]), np.array([1.0, 3.0, 2.0, 7.0]))
    with pytest.raises(BadValueError, match="second value of that gene") as error:
        cell_rows(stored, np.arange(3, dtype=np.int32), "counts", 0)
    assert (error.value.position, error.value.value) == (3, 7)


def test_totals_are_exact_beyond_single_precision_of_the_parts():
    rows = cell_rows(chunk(np.full((2, 300), 60000)), np.arange(300, dtype=np.int32), "counts", 0)
    assert rows.totals.tolist() == [18_000_000, 18_000_000]


@pytest.mark.parametrize(
    ("dtype", "high", "num_genes", "per_row"),
    [
        (np.uint16, 30, 40, 30),  # all rows in one sort
        (np.uint16, 60_000, 60_000, 900),  # one row at a time fits
        (np.uint16, 4_000, 60_000, 900),  # blocks of rows
        (np.uint16, 60_000, 200_000, 90),  # too many genes
        (np.uint16, 60_000, 60_000, 9),  # too little in a row
        (np.uint32, 2**32 - 1, 40, 30),
        (np.float32, 9, 40, 30),
    ],
)
def test_rows_are_sorted_like_numpy_sorts_them(dtype, high, num_genes, per_row):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, per_row, 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    genes = np.concatenate([rng.choice(num_genes, n, replace=False) for n in lengths]).astype(np.int32)
    counts = rng.integers(1, high, len(genes), endpoint=True).astype(dtype)
    counts[0] = high
    _, ours, our_counts = sort_rows(offsets, genes, counts, num_genes)
    order = np.lexsort((genes, np.repeat(np.arange(50), lengths)))
    assert np.array_equal(ours, genes[order])
    assert np.array_equal(our_counts, counts[order])
    assert (ours.dtype, our_counts.dtype) == (np.int32, dtype)


# Files that may have come from anywhere


def to_link(file, other):
    file["obsm"]["outside"] = h5py.ExternalLink(str(other), "/values")


def to_raw_bytes(file, other):
    file.create_dataset("layers/outside", (20, 8), "u1", external=[(str(other), 0, h5py.h5f.UNLIMITED)])


def to_virtual(file, other):
    layout = h5py.VirtualLayout((20, 8), "f4")
    layout[:] = h5py.VirtualSource(str(other), "values", (20, 8))
    file.create_virtual_dataset("layers/outside", layout)


@pytest.mark.parametrize("change", [to_link, to_raw_bytes, to_virtual])
def test_a_file_that_takes_content_from_other_files_is_refused(tmp_path, change):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8))
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["values"] = np.ones((20, 8), np.float32)
    with h5py.File(path, "r+") as file:
        change(file, tmp_path / "other.h5")
    with pytest.raises(DataError, match=r"a.h5ad: 'outside' (lies in another file|takes its values)"):
        H5adFile(path)


def hide_categories(path, secret):
    """Let the categories of obs/kind lie in another file, as a dataset that no group names."""
    with h5py.File(path, "r+") as file:
        file["obs/kind"] = np.zeros(20, np.int8)
        hidden = file.create_dataset("hidden", (1,), "S6", external=[(str(secret), 0, 6)])
        file["obs/kind"].attrs["categories"] = hidden.ref
        address = h5py.h5o.get_info(hidden.id).addr
    content = bytearray(path.read_bytes())
    assert content[address] == 1  # of an object header, whose number of links is at its byte 4
    content[address + 4] = 5
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        del file["hidden"]  # one link of five, so it stays


def test_categories_that_no_group_names_cannot_lie_in_another_file(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8))
    (tmp_path / "secret").write_bytes(b"SECRET")
    hide_categories(path, tmp_path / "secret")
    with h5py.File(path) as file:
        obs: Any = file["obs"]
        assert file[obs["kind"].attrs["categories"]][:].tolist() == [b"SECRET"]
    with pytest.raises(DataError, match="'kind, categories' takes its values from other files"):
        H5adFile(path)


def test_a_link_within_the_file_is_followed(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8), layout="dense")
    with h5py.File(path, "r+") as file:
        file["layers/again"] = h5py.SoftLink("/X")
    with H5adFile(path) as file:
        assert np.array_equal(read_rows(file, "layers/again", tmp_path)[0], anndata_values(path)[0])


def test_a_file_that_says_more_names_than_its_bytes_can_hold_is_refused(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8))
    with h5py.File(path, "r+") as file:
        del file["var/_index"]
        file["var"].create_dataset("_index", (10**10,), h5py.string_dtype(), chunks=(1024,))
    with H5adFile(path) as file, pytest.raises(DataError, match="it says that it has 10,000,000,000 entries"):
        file.genes("X")


def replace(file, name, content):
    del file[name]
    file[name] = content


def no_lists(file):
    del file["X/data"]
    file.create_group("X/data")


def to_itself(file):
    del file["X"]
    file["X"] = h5py.SoftLink("/X")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file["X"].attrs.__setitem__("shape", np.array([1, 2, 3])), r"its shape is \[1 2 3\]"),
        (lambda file: file["X"].attrs.__setitem__("shape", "wide"), "its shape is wide"),
        (no_lists, "data, indices and indptr must be lists of numbers"),
        (lambda file: replace(file, "X/indptr", np.zeros(21, "S1")), "must be lists of numbers"),
        (to_itself, "damaged"),
    ],
)
def test_a_matrix_that_is_none_is_refused(tmp_path, change, message):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8))
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=message), H5adFile(path) as file:
        file.matrix("X")


def unwritten(type_, size):
    """Return a change of a column's categories to many that were never written, which take no place."""

    def change(file):
        del file["obs/kind/categories"]
        file.create_dataset("obs/kind/categories", (size,), type_, chunks=(1 << 10,), compression="gzip")

    return change


def to_group(file):
    del file["obs/kind/categories"]
    file.create_group("obs/kind/categories")


def column_of(type_):
    def change(file):
        del file["obs/kind"]
        file.create_dataset("obs/kind", (20,), type_)

    return change


def refer(to):
    """Return a change of a column to the old encoding, whose categories an attribute refers to."""

    def change(file):
        replace(file, "obs/kind", np.zeros(20, np.int8))
        file["obs/kind"].attrs["categories"] = to(file)

    return change


def coded(codes):
    return lambda file: replace(file, "obs/kind/codes", codes)


def named(categories):
    return lambda file: replace(file, "obs/kind/categories", categories)


def whole(column):
    return lambda file: replace(file, "obs/kind", column)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unwritten("S1", 2_000_000_000), "2,000,000,000 entries of 1 bytes, which cannot be"),
        (unwritten(h5py.string_dtype(), 2_000_000_000), "entries of 8 bytes, which cannot be"),
        (unwritten("S65536", 100_000), "100,000 entries of 65,536 bytes, which cannot be"),
        (named(h5py.Empty("S4")), "its categories are no list"),
        (named(b"x"), "its categories are no list"),
        (named([[b"a"], [b"b"]]), "its categories are no list"),
        (to_group, "its categories are no list"),
        (named(np.zeros(3, [("a", "i4")])), "its categories have type"),
        (coded(np.array([b"a"] * 20)), "its codes have type"),
        (coded(np.zeros(20)), "its codes have type float64, not whole numbers"),
        (coded(np.int8(0)), "its codes are no list"),
        (coded(np.zeros(3, np.int8)), "its codes are 3, but it has 20 rows"),
        (whole(np.zeros((20, 3))), "its values are no list"),
        (whole(np.zeros(20, "c8")), "its values have type complex64"),
        (whole(np.zeros(20, [("a", "i4")])), "its values have type"),
        (column_of(h5py.vlen_dtype("i4")), "its values have type object"),
        (column_of(h5py.ref_dtype), "its values have type object"),
        (column_of(np.dtype(("i4", (3,)))), "its values have type"),
        (refer(lambda file: h5py.Reference()), "Invalid HDF5 object reference"),
        (refer(lambda file: file.ref), "its categories are no list"),
    ],
)
def test_a_column_that_is_none_is_refused(tmp_path, change, message):
    path = write_h5ad(
        tmp_path / "a.h5ad", random_counts(20, 8), obs={"kind": pd.Categorical(["a", "b"] * 10)}
    )
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=message), H5adFile(path) as file:
        file.obs.labels("kind", 0, 20)


def test_names_that_are_no_text_are_refused(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8))
    with h5py.File(path, "r+") as file:
        del file["var/_index"]
        file["var/_index"] = np.array([b"\xff\xfe%d" % gene for gene in range(8)])
    with H5adFile(path) as file, pytest.raises(DataError, match="the file is truncated or damaged"):
        file.genes("X")


def test_damaged_bytes_end_in_an_error_or_in_values(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8), obs={"kind": ["a", "b"] * 10})
    content, rng, num_refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 6):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            with H5adFile(path) as file:
                read_rows(file, "X", tmp_path)
                file.genes("X")
                file.obs.text("kind")
        except DataError:
            num_refused += 1
    assert num_refused > 15


def test_a_group_inside_of_itself_is_read_once(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", random_counts(20, 8))
    with h5py.File(path, "r+") as file:
        file["uns/again"] = file["uns"]
    with H5adFile(path) as file:
        assert file.num_cells == 20
