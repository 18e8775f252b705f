"""The Census source against a small SOMA collection on disk, which is laid out as the Census is."""

import ast
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from census_files import BUILD, DATASETS, TISSUES, gene_id, write_census
from h5ad_files import dense_corpus
from launching import launch_ranks

import data.census
import data.census_conversion
import data.census_soma
from data.census import CensusQuery, census_corpus, value_filter
from data.census_soma import CensusExperiment
from data.corpus import open_corpus
from data.errors import DataError
from data.hashing import DrawKey
from data.prepared import census_loader
from trainer.config import load_run_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def census(tmp_path_factory):
    pytest.importorskip("tiledbsoma", reason="needs the extra census")
    return write_census(tmp_path_factory.mktemp("soma") / "small-census")


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(data.census_conversion, "CELLS_PER_BATCH", 16)
    monkeypatch.setattr(data.census_conversion, "BATCHES_PER_SHARD", 2)


def corpus_of(census, tmp_path, gene_vocab="from_data", **options):
    keywords = {
        name: options.pop(name)
        for name in ("obs", "technical_batch", "min_match", "min_genes")
        if name in options
    }
    table = {"uri": census.uri, **options}
    return census_corpus(table, gene_vocab=gene_vocab, cache_dir=tmp_path / "cache", **keywords)


def column(info, name):
    from data.labels import read_obs

    return read_obs(info, [name], np.arange(info.num_cells))[name]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"tissue": ["brain", "lung"]}, 'tissue in ["brain", "lung"]'),
        ({"tissue": ["brain"]}, 'tissue in ["brain"]'),
        ({"disease": "normal"}, 'disease == "normal"'),
        ({"is_primary_data": True}, "is_primary_data == True"),
        ({"nnz": 500}, "nnz == 500"),
        ({"raw_sum": 2.5}, "raw_sum == 2.5"),
        ({"nnz": [1, 2]}, "nnz in [1, 2]"),
        ({"is_primary_data": [False]}, "is_primary_data == False"),
        ({"is_primary_data": [True, False]}, "(is_primary_data == True or is_primary_data == False)"),
        ({"cell type": "T"}, 'attr("cell type") == "T"'),
        ({"class": ["T"]}, 'attr("class") in ["T"]'),
        (
            {"tissue": ["brain", "heart"], "disease": ["normal"], "is_primary_data": True},
            'tissue in ["brain", "heart"] and disease in ["normal"] and is_primary_data == True',
        ),
        ({}, ""),
    ],
)
def test_filters_become_a_soma_value_filter(filters, expected):
    assert value_filter(filters) == expected


AWKWARD_TEXTS = [
    'a "b" c', "it's", 'both \' and "', "back\\slash", "\\", 'end"', "é", "\U0001f9e0", "a\nb\tc\r", "\x01", "{x}",
    '"]', "",
]  # fmt: skip


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
def test_any_text_is_read_back_from_a_filter_as_it_was(text):
    compared = ast.parse(value_filter({"tissue": text}), mode="eval").body
    assert isinstance(compared, ast.Compare)
    assert ast.literal_eval(compared.comparators[0]) == text
    listed = ast.parse(value_filter({"tissue": [text, "x"]}), mode="eval").body
    assert isinstance(listed, ast.Compare)
    assert ast.literal_eval(listed.comparators[0]) == [text, "x"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"census.filters.tissue: null is no value"),
        ([], r"census.filters.tissue: the list is empty"),
        (["a", None], r"census.filters.tissue: null"),
        ([["a"]], r"census.filters.tissue: \['a'\] is nested"),
        ({"not": "a"}, r"census.filters.tissue: .* is nested"),
        (["a", 1], r"census.filters.tissue: .* mixes number and text"),
        ([True, 1], r"census.filters.tissue: .* mixes bool and number"),
        (float("nan"), r"census.filters.tissue: nan is not a text"),
        ("a\0b", r"census.filters.tissue: .* zero byte"),
    ],
)
def test_a_value_that_cannot_be_compared_is_refused_with_its_key(value, message):
    with pytest.raises(DataError, match=message):
        value_filter({"tissue": value})


def test_the_raw_filter_goes_before_filters_and_says_so():
    query = CensusQuery.read({"obs_value_filter": "nnz > 5", "filters": {"tissue": "brain"}})
    assert query.obs_filter == "nnz > 5"
    assert "filters is not used" in query.notices[0]
    assert CensusQuery.read({"filters": {"tissue": "brain"}}).notices == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"organism": "human"}, r"organism is 'human'; it must be Homo sapiens \| Mus musculus"),
        (
            {"census_version": "newest"},
            r"census_version is 'newest'; it must be latest \| stable \| the date",
        ),
        ({"tissue": "brain"}, r"unknown options tissue; there are: organism"),
        ({"obs_columns": [1]}, r"obs_columns is \[1\]; it must be a list"),
        ({"obs_value_filter": " "}, r"obs_value_filter is ' '; it must be a text"),
        ({"filters": ["brain"]}, r"census.filters: got \['brain'\]"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        CensusQuery.read(options)


def test_without_the_package_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cellxgene_census", None)
    with pytest.raises(DataError, match=r"needs the package cellxgene_census.*'\.\[census\]'"):
        census_corpus({"census_version": "latest"}, cache_dir=tmp_path)


def test_the_corpus_holds_the_counts_of_the_cells_that_pass(census, tmp_path):
    info = corpus_of(census, tmp_path, filters={"tissue": ["brain", TISSUES[2]], "is_primary_data": True})
    passes = np.isin(census.obs["tissue"], [TISSUES[0], TISSUES[2]]) & census.obs["is_primary_data"]
    assert 0 < passes.sum() < len(passes)
    np.testing.assert_array_equal(dense_corpus(info), census.counts[passes])
    np.testing.assert_array_equal(column(info, "soma_joinid"), np.flatnonzero(passes))
    assert info.gene_space.ids == tuple(census.gene_ids)
    assert info.gene_space.symbols == tuple(census.symbols)


def test_batches_and_shards_hold_the_cells_in_order(census, tmp_path, small_batches):
    info = corpus_of(census, tmp_path, obs_columns=["age"])
    np.testing.assert_array_equal(dense_corpus(info), census.counts)
    np.testing.assert_array_equal(column(info, "age"), census.obs["age"])
    assert [shard.rows for shard in info.manifest.shards] == [32] * 9 + [12]


def test_kept_columns_hold_the_labels_of_their_cells(census, tmp_path):
    info = corpus_of(
        census,
        tmp_path,
        obs_columns=["tissue", "odd name"],
        obs=["primary=is_primary_data"],
        technical_batch="donor_id",
    )
    np.testing.assert_array_equal(column(info, "tissue"), census.obs["tissue"])
    np.testing.assert_array_equal(column(info, "odd name"), census.obs["odd name"])
    np.testing.assert_array_equal(column(info, "primary"), census.obs["is_primary_data"].astype(str))
    np.testing.assert_array_equal(column(info, "technical_batch"), census.obs["donor_id"])
    assert info.manifest.technical_batches == tuple(sorted(set(census.obs["donor_id"])))


def test_library_sizes_are_over_all_genes_of_the_census(census, tmp_path):
    genes = tmp_path / "genes.txt"
    genes.write_text("\n".join([gene_id(5), gene_id(0), gene_id(2), gene_id(999)]))
    info = corpus_of(census, tmp_path, gene_vocab=str(genes), min_match=0.5)
    expected = np.hstack([census.counts[:, [5, 0, 2]], np.zeros((len(census.counts), 1))])
    kept = expected.any(axis=1)
    np.testing.assert_array_equal(dense_corpus(info), expected[kept])
    from data.readers import open_columns

    total = open_columns(info, ["total"]).gather(np.arange(info.num_cells))["total"]
    np.testing.assert_array_equal(total, census.counts.sum(axis=1)[kept])
    share = sum(source.counts_dropped_fraction * 1 for source in info.manifest.sources)
    assert share > 0
    first = census.obs["dataset_id"] == DATASETS[0]
    assert info.manifest.sources[0].counts_dropped_fraction == pytest.approx(
        1 - expected[first].sum() / census.counts[first].sum()
    )


def test_each_dataset_is_a_source_with_the_genes_it_measured(census, tmp_path):
    info = corpus_of(census, tmp_path)
    assert [source.path_name for source in info.manifest.sources] == list(DATASETS)
    for source, measured in zip(info.manifest.sources, census.measured, strict=True):
        np.testing.assert_array_equal(source.measured_mask(len(info.gene_space)), measured)
        assert source.rows == np.count_nonzero(census.obs["dataset_id"] == source.path_name)
    assert 0 < census.measured.sum() < census.measured.size


def test_a_filter_on_genes_drops_the_others(census, tmp_path):
    info = corpus_of(census, tmp_path, var_value_filter="feature_length < 500")
    assert info.gene_space.ids == tuple(census.gene_ids[:5])
    kept = census.counts[:, :5].any(axis=1)
    np.testing.assert_array_equal(dense_corpus(info), census.counts[kept, :5])


def test_cells_with_few_genes_are_dropped_and_counted(census, tmp_path):
    info = corpus_of(census, tmp_path, min_genes=10)
    kept = np.count_nonzero(census.counts, axis=1) >= 10
    np.testing.assert_array_equal(dense_corpus(info), census.counts[kept])
    assert sum(source.cells_dropped for source in info.manifest.sources) == np.count_nonzero(~kept) > 0


def test_the_manifest_says_where_the_cells_come_from(census, tmp_path):
    info = corpus_of(census, tmp_path, filters={"tissue": "lung"})
    origin = info.manifest.origin
    assert origin is not None
    assert origin["build"] == BUILD
    assert origin["obs_value_filter"] == 'tissue == "lung"'
    assert Path(origin["uri"].removeprefix("file://")) == Path(census.uri)
    assert origin["organism"] == "homo_sapiens"


def test_reading_again_takes_the_corpus_from_the_cache(census, tmp_path, monkeypatch):
    first = corpus_of(census, tmp_path, filters={"tissue": "lung"})
    other = corpus_of(census, tmp_path, filters={"tissue": "brain"})
    assert first.path != other.path
    monkeypatch.setattr(data.census, "CensusExperiment", None)
    assert corpus_of(census, tmp_path, filters={"tissue": "lung"}).path == first.path


def test_a_collection_that_was_written_anew_is_read_anew(tmp_path):
    pytest.importorskip("tiledbsoma", reason="needs the extra census")
    import shutil

    first = write_census(tmp_path / "soma", num_cells=20)
    corpora = [corpus_of(first, tmp_path)]
    shutil.rmtree(tmp_path / "soma")
    second = write_census(tmp_path / "soma", num_cells=20, seed=1)
    corpora.append(corpus_of(second, tmp_path))
    assert corpora[0].path != corpora[1].path
    np.testing.assert_array_equal(dense_corpus(corpora[1])[:, 0], second.counts[:, 0])


def test_a_relative_folder_is_the_one_of_where_the_command_runs(census, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(census.uri).parent)
    info = census_corpus({"uri": Path(census.uri).name}, cache_dir=tmp_path)
    assert info.path == census_corpus({"uri": census.uri}, cache_dir=tmp_path).path


def test_several_callers_at_once_read_once(census, tmp_path, monkeypatch):
    times = []
    convert = data.census.convert_census
    monkeypatch.setattr(data.census, "convert_census", lambda *a, **k: (times.append(1), convert(*a, **k)))
    paths = []
    threads = [
        threading.Thread(target=lambda: paths.append(corpus_of(census, tmp_path).path)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(times) == 1
    assert len(paths) == 3 and len(set(paths)) == 1


def test_an_interrupted_reading_is_not_loadable_and_goes_on_with_the_same_bytes(
    census, tmp_path, monkeypatch, small_batches
):
    whole = corpus_of(census, tmp_path / "whole", obs_columns=["tissue"])
    counts = CensusExperiment.counts
    asked = []

    def interrupted(self, numbers):
        asked.append(int(numbers[0]))
        if asked[0] == 0 and len(asked) == 6:
            raise KeyboardInterrupt
        return counts(self, numbers)

    monkeypatch.setattr(CensusExperiment, "counts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        corpus_of(census, tmp_path, obs_columns=["tissue"])
    folder = tmp_path / "cache" / Path(whole.path).name
    with pytest.raises(DataError, match="not finished"):
        open_corpus(folder)
    asked.clear()
    continued = corpus_of(census, tmp_path, obs_columns=["tissue"])
    assert asked[0] == 64  # two shards of 32 cells were there
    assert [shard.sha256 for shard in continued.manifest.shards] == [
        shard.sha256 for shard in whole.manifest.shards
    ]
    assert continued.manifest.to_json() == whole.manifest.to_json()
    assert not (folder / ".unfinished").exists()


def test_a_network_that_fails_on_the_way_is_told_with_what_to_do(
    census, tmp_path, monkeypatch, small_batches
):
    tiledbsoma = pytest.importorskip("tiledbsoma", reason="needs the extra census")
    read, times = tiledbsoma.SparseNDArray.read, []

    def failing(self, *arguments, **options):
        times.append(1)
        if len(times) == 6:
            raise tiledbsoma.SOMAError("[TileDB::S3] Error: could not resolve host")
        return read(self, *arguments, **options)

    monkeypatch.setattr(tiledbsoma.SparseNDArray, "read", failing)
    with pytest.raises(
        DataError, match=r"reading counts: .*could not resolve host; start again, and reading goes on"
    ):
        corpus_of(census, tmp_path)
    np.testing.assert_array_equal(dense_corpus(corpus_of(census, tmp_path)), census.counts)


def test_a_reading_interrupted_while_it_is_published_is_finished(
    census, tmp_path, monkeypatch, small_batches
):
    publish = data.census_conversion.publish_corpus

    def half(folder, manifest, gene_space, parts):
        parts[0].rename(folder / manifest.shards[0].file)
        raise KeyboardInterrupt

    monkeypatch.setattr(data.census_conversion, "publish_corpus", half)
    with pytest.raises(KeyboardInterrupt):
        corpus_of(census, tmp_path)
    monkeypatch.setattr(data.census_conversion, "publish_corpus", publish)
    monkeypatch.setattr(CensusExperiment, "counts", None)
    np.testing.assert_array_equal(dense_corpus(corpus_of(census, tmp_path)), census.counts)


def test_a_large_count_widens_all_shards(tmp_path, small_batches):
    pytest.importorskip("tiledbsoma", reason="needs the extra census")

    def enlarge(counts):
        counts[70, 3] = 70_000

    census = write_census(tmp_path / "soma", num_cells=100, change=enlarge)
    info = corpus_of(census, tmp_path)
    assert info.manifest.count_dtype == "uint32"
    np.testing.assert_array_equal(dense_corpus(info), census.counts)


@pytest.mark.parametrize(
    ("value", "reason"), [(1.5, "is fractional"), (-1, "is negative"), (np.nan, "is NaN")]
)
def test_a_value_that_is_no_count_is_named_with_cell_and_gene(tmp_path, value, reason):
    pytest.importorskip("tiledbsoma", reason="needs the extra census")

    def spoil(counts):
        counts[17, 3] = value

    census = write_census(tmp_path / "soma", num_cells=30, change=spoil)
    with pytest.raises(
        DataError, match=rf"cell 17 of dataset dataset-\w, gene {gene_id(3)}: the value .* {reason}"
    ):
        corpus_of(census, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"filters": {"tisue": "brain"}},
            r"obs of .* has no column 'tisue'; close to it: tissue; it has: soma_joinid",
        ),
        (
            {"filters": {"tissue": "brian"}},
            r"census.filters.tissue: no cell of .* has 'brian'; close to it: brain",
        ),
        ({"filters": {"tissue": 3}}, r"census.filters.tissue: 3 is not a text"),
        ({"filters": {"nnz": "3"}}, r"census.filters.nnz: '3' is not a whole number"),
        ({"filters": {"nnz": 1.5}}, r"census.filters.nnz: 1.5 is not a whole number"),
        ({"filters": {"is_primary_data": 1}}, r"census.filters.is_primary_data: 1 is not true or false"),
        (
            {"obs_value_filter": "tissue = 'brain'"},
            r"census.obs_value_filter \"tissue = 'brain'\" cannot be read as a condition \(.*; write one as",
        ),
        ({"var_value_filter": "feature_id =="}, r"census.var_value_filter .* cannot be read as a condition"),
        ({"obs_value_filter": "nnz >\0"}, r"cannot be read as a condition"),
        ({"obs_value_filter": "(" * 9999}, r"cannot be read as a condition"),
        (
            {"obs_value_filter": "tisue == 'brain'"},
            r"tisue does not exist.*its columns are: soma_joinid, dataset_id",
        ),
        ({"obs_value_filter": "nnz > 100000"}, r"no cell of .* passes the filter 'nnz > 100000'"),
        ({"var_value_filter": "feature_length < 0"}, r"no gene of .* passes it"),
        (
            {"var_value_filter": "length < 5"},
            r"length does not exist.*its columns are: soma_joinid, feature_id",
        ),
        ({"obs_columns": ["celltype"]}, r"obs of .* has no column 'celltype'.*it has: soma_joinid"),
        ({"organism": "Mus musculus"}, r"it has no 'mus_musculus'; there are: homo_sapiens"),
        (
            {"census_version": "2020-01-01"},
            r"is the Census of 2025-01-30, and census_version asks for 2020-01-01",
        ),
        ({"uri": "nowhere"}, r"census.uri: nowhere: no such folder"),
        ({"uri": str(ROOT / "docs")}, r"docs: not a SOMA collection"),
    ],
)
def test_a_query_that_cannot_be_answered_says_what_there_is(census, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        corpus_of(census, tmp_path, **options)
    assert not list(tmp_path.glob("cache/*/manifest.json"))


def test_genes_of_another_organism_are_refused(census, tmp_path):
    with pytest.raises(DataError, match=r"0 of 40 genes matched by ensembl_id.*of another organism"):
        corpus_of(census, tmp_path, gene_vocab="mouse_protein_coding")


def test_an_experiment_of_ones_own_is_read_too(tmp_path):
    pytest.importorskip("tiledbsoma", reason="needs the extra census")
    own = write_census(tmp_path / "own", num_cells=50, is_bare=True)
    info = corpus_of(own, tmp_path, filters={"tissue": "lung"})
    np.testing.assert_array_equal(dense_corpus(info), own.counts[own.obs["tissue"] == "lung"])
    assert all(source.genes_matched == 40 for source in info.manifest.sources)
    assert info.manifest.origin is not None and info.manifest.origin["build"] is None


class FakeDirectory:
    """Stand in for the directory of releases, whose latest one is the collection on disk."""

    def __init__(self, monkeypatch, census):
        self.package = pytest.importorskip("cellxgene_census", reason="needs the extra census")
        self.opened = []
        monkeypatch.setattr(self.package, "get_census_version_description", self.describe)
        monkeypatch.setattr(self.package, "open_soma", self.open)
        self._census = census

    def describe(self, version):
        if version != "latest":
            raise ValueError(f"Unable to locate Census version: {version}.")
        return {"release_build": BUILD}

    def open(self, *, census_version, context):
        import tiledbsoma

        self.opened.append(census_version)
        return tiledbsoma.open(self._census.uri, context=context)


def test_latest_is_resolved_to_its_date(census, tmp_path, monkeypatch):
    directory = FakeDirectory(monkeypatch, census)
    latest = census_corpus({"filters": {"tissue": "lung"}}, cache_dir=tmp_path)
    assert directory.opened == [BUILD]
    dated = census_corpus({"census_version": BUILD, "filters": {"tissue": "lung"}}, cache_dir=tmp_path)
    assert dated.path == latest.path
    assert directory.opened == [BUILD]
    assert BUILD in Path(latest.path).name
    origin = latest.manifest.origin
    assert origin is not None and (origin["census_version"], origin["build"]) == ("latest", BUILD)


def test_a_version_that_moves_is_named_with_its_date(census, tmp_path, monkeypatch):
    FakeDirectory(monkeypatch, census)

    def notices(version):
        tokenizer = {"strategy": "rank_value", "max_genes": 16}
        options = {"census_version": version}
        return " ".join(census_loader(options, tokenizer=tokenizer, cache_dir=str(tmp_path)).notices)

    assert f"census_version latest is {BUILD} today" in notices("latest")
    assert "today" not in notices(BUILD)


def test_a_dated_release_in_the_cache_needs_neither_network_nor_package(census, tmp_path, monkeypatch):
    FakeDirectory(monkeypatch, census)
    corpus = census_corpus({"census_version": BUILD}, cache_dir=tmp_path)
    for package in ("cellxgene_census", "tiledbsoma"):
        monkeypatch.setitem(sys.modules, package, None)
    assert census_corpus({"census_version": BUILD}, cache_dir=tmp_path).path == corpus.path


def test_an_unknown_release_is_refused(census, tmp_path, monkeypatch):
    FakeDirectory(monkeypatch, census)
    with pytest.raises(DataError, match=r"census_version stable: there is no such release"):
        census_corpus({"census_version": "stable"}, cache_dir=tmp_path)


def test_a_release_that_cannot_be_opened_is_not_said_to_be_missing(census, tmp_path, monkeypatch):
    directory = FakeDirectory(monkeypatch, census)

    def fail(**_):
        import tiledbsoma

        raise tiledbsoma.SOMAError("S3: access denied")

    monkeypatch.setattr(directory.package, "open_soma", fail)
    with pytest.raises(
        DataError, match=rf"^the Census of {BUILD}: it cannot be opened \(S3: access denied\)"
    ):
        census_corpus({"census_version": BUILD}, cache_dir=tmp_path)


def test_without_network_the_message_says_what_works_without(tmp_path, monkeypatch):
    package = pytest.importorskip("cellxgene_census", reason="needs the extra census")
    requests = pytest.importorskip("requests")

    def offline(version):
        raise requests.ConnectionError("Name or service not known")

    monkeypatch.setattr(package, "get_census_version_description", offline)
    with pytest.raises(DataError, match=r"cannot be reached.*Without network, give the date"):
        census_corpus({}, cache_dir=tmp_path)


def test_the_loader_gives_batches_with_labels_of_the_cells_that_pass(census, tmp_path):
    source = census_loader(
        {"uri": census.uri, "filters": {"is_primary_data": True}, "obs_value_filter": "nnz >= 8"},
        tokenizer={"strategy": "rank_value", "max_genes": 16},
        preprocessing={"normalize": "library_size", "target_sum": 10_000, "log1p": True},
        technical_batch="@file",
        cache_dir=str(tmp_path),
        label="tissue",
        val_fraction=0.25,
    )
    passes = np.flatnonzero(census.obs["nnz"] >= 8)
    assert len(source) == len(passes)
    batch = source.fetch(np.arange(12), DrawKey(0, 0, 0))
    np.testing.assert_array_equal(
        np.array(source.facts()["label_names"])[batch["label"].numpy()], census.obs["tissue"][passes[:12]]
    )
    assert source.unique_batches == list(DATASETS)
    assert any("filters is not used" in notice for notice in source.notices)
    assert any(f"the Census of {BUILD}" in notice for notice in source.notices)
    assert source.validation is not None


def test_the_cells_of_an_experiment_without_datasets_are_one_technical_batch(tmp_path):
    pytest.importorskip("tiledbsoma", reason="needs the extra census")
    own = write_census(tmp_path / "own", num_cells=30, is_bare=True, has_datasets=False)
    info = corpus_of(own, tmp_path, technical_batch="@file", obs_columns=["tissue"])
    assert info.manifest.technical_batches == ("own",)
    np.testing.assert_array_equal(column(info, "tissue"), own.obs["tissue"])
    assert [source.path_name for source in info.manifest.sources] == ["own"]


def test_the_first_example_of_the_documentation_asks_for_the_cells_that_it_says(tmp_path):
    example = re.search(
        r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "census.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert example is not None
    (tmp_path / "census.yaml").write_text(example[1])
    (phase,) = load_run_config(tmp_path / "census.yaml").datasets
    assert phase.dataloader_factory == "data.prepared.census_loader"
    query = CensusQuery.read(phase.dataloader_args["census"])
    assert (
        query.obs_filter
        == 'tissue in ["brain", "heart"] and disease in ["normal"] and is_primary_data == True'
    )
    assert query.organism == "homo_sapiens" and query.census_version == "latest"
    assert {"tissue", "donor_id", "cell_type"} <= {*query.obs_columns, *phase.dataloader_args["obs"]}


CELLS_DOOR = """
data:
  source: cellxgene_census
  gene_vocab: from_data
  num_workers: 0
  census:
    uri: {uri}
    filters:
      tissue: ["brain", "lung"]
      is_primary_data: true
    obs_columns: ["tissue", "donor_id"]
tokenizer: {{max_genes: 32}}
model: {{hidden_dim: 16, num_layers: 1, num_heads: 2, max_seq_len: 32}}
training: {{batch_size: 16, max_epochs: 1, precision: "32", logger: csv, run_name: census}}
"""


def test_a_typed_configuration_trains_on_the_census_with_two_ranks_that_read_it_once(census, tmp_path):
    (tmp_path / "cells.yaml").write_text(CELLS_DOOR.format(uri=census.uri))
    command = ["-m", "trainer", "train", "--config", tmp_path / "cells.yaml"]
    output = launch_ranks(2, command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}).stdout
    assert output.count("read once into") == 1
    assert f"the Census of {BUILD}" in " ".join(output.split())
    passes = np.isin(census.obs["tissue"], TISSUES[:2]) & census.obs["is_primary_data"]
    (corpus,) = (tmp_path / "cache").glob("census-*")
    np.testing.assert_array_equal(dense_corpus(open_corpus(corpus)), census.counts[passes])
    (metrics,) = tmp_path.glob("checkpoints/*/metrics.jsonl")
    losses = [
        record["loss"] for record in map(json.loads, metrics.read_text().splitlines()) if "loss" in record
    ]
    assert losses and np.isfinite(losses).all()


READ_AND_BE_KILLED = """
import os, signal, sys
import data.census_conversion as conversion
from data.census import census_corpus
from data.census_soma import CensusExperiment
conversion.CELLS_PER_BATCH, conversion.BATCHES_PER_SHARD = 16, 2
counts = CensusExperiment.counts
def killed(self, numbers):
    if numbers[0] >= 160:
        os.kill(os.getpid(), signal.SIGKILL)
    return counts(self, numbers)
CensusExperiment.counts = killed
census_corpus({"uri": sys.argv[1]}, cache_dir=sys.argv[2])
"""


def test_a_reading_that_is_killed_leaves_nothing_loadable_and_goes_on(
    census, tmp_path, monkeypatch, small_batches
):
    command = [sys.executable, "-c", READ_AND_BE_KILLED, census.uri, str(tmp_path / "cache")]
    assert subprocess.run(command, cwd=ROOT, timeout=120, capture_output=True).returncode == -9
    (folder,) = (tmp_path / "cache").glob("census-*")
    with pytest.raises(DataError, match="not finished"):
        open_corpus(folder)
    counts, asked = CensusExperiment.counts, []
    monkeypatch.setattr(
        CensusExperiment,
        "counts",
        lambda self, numbers: (asked.append(int(numbers[0])), counts(self, numbers))[1],
    )
    np.testing.assert_array_equal(dense_corpus(corpus_of(census, tmp_path)), census.counts)
    assert 64 <= asked[0] <= 160


MEASURE = """
import resource, sys
import pyarrow.ipc, tiledbsoma
from data.census import census_corpus
from census_files import write_census
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
census_corpus({"uri": sys.argv[1]}, cache_dir=sys.argv[3])
before = peak()
info = census_corpus({"uri": sys.argv[2]}, cache_dir=sys.argv[3])
print(peak() - before, info.manifest.n_nonzero * 20 // 2**20)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_cells(tmp_path):
    pytest.importorskip("tiledbsoma", reason="needs the extra census")
    sizes = {"few": 4_000, "many": 20_000}
    uris = [write_census(tmp_path / name, cells, 500, density=0.5).uri for name, cells in sizes.items()]
    command = [sys.executable, "-c", MEASURE, *uris, str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    result = subprocess.run(
        command, cwd=tmp_path, timeout=300, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    growth, values = map(int, result.stdout.split())
    assert values > 80, "the query must be large enough to tell"
    assert growth < values / 3, f"memory grew by {growth} MB for {values} MB of values"


def test_highly_variable_genes_are_chosen_of_the_census_too(census, tmp_path):
    source = census_loader(
        {"uri": census.uri},
        tokenizer={"strategy": "rank_value", "max_genes": 16},
        preprocessing={
            "normalize": "library_size",
            "log1p": True,
            "hvg_selection": 8,
            "hvg_batch_key": "tissue",
        },
        technical_batch="@file",
        cache_dir=str(tmp_path),
    )
    info = source.reader.info
    assert len(info.gene_space) == 8 and set(info.gene_space.ids) < set(census.gene_ids)
    assert info.manifest.origin is not None and info.manifest.origin["build"] == BUILD
    assert [record.path_name for record in info.manifest.sources] == list(DATASETS)
    kept = [census.gene_ids.index(name) for name in info.gene_space.ids]
    rows = column(info, "soma_joinid")
    np.testing.assert_array_equal(dense_corpus(info), census.counts[np.ix_(rows, kept)])
