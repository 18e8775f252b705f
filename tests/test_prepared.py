import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from launching import ROOT, RankGroup, cpu_environment

from data.cell_source import CellSource
from data.corpus import UNFINISHED, open_corpus
from data.corpus_cache import say
from data.errors import DataError
from data.hashing import DrawKey
from data.prepared import h5ad_loader
from tests.h5ad_files import SAMPLES, anndata_values, random_counts, write_h5ad

TOKENIZER = {"strategy": "binned_expression", "max_genes": 32}
IDS = [f"ENSG{number:011d}" for number in range(1, 13)]


@pytest.fixture
def cells(tmp_path) -> Path:
    """A file of 40 cells with labels, numbers and a technical batch."""
    obs = {
        "lane": ["lane1", "lane2"] * 20,
        "kind": pd.Categorical((["T"] * 3 + ["B"]) * 10, categories=["B", "NK", "T"]),
        "cluster": np.arange(40) % 4,
        "dose": np.where(np.arange(40) == 3, np.nan, np.linspace(0, 1, 40)),
    }
    counts = random_counts(40, 12)
    counts[-1, 2] = 5
    return write_h5ad(tmp_path / "cells.h5ad", counts, obs=obs)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "cache")


def load(*paths: Path, cache_dir: str, **options) -> CellSource:
    return h5ad_loader(list(map(str, paths)), tokenizer=TOKENIZER, cache_dir=cache_dir, **options)


def corpora(cache_dir: str) -> list[str]:
    return sorted(path.name for path in Path(cache_dir).iterdir() if (path / "manifest.json").exists())


# Converting once


def test_batches_hold_the_values_of_the_file(cells, cache):
    source = load(cells, cache_dir=cache, preprocessing={"normalize": None, "log1p": False})
    values, names = anndata_values(cells)
    batch = source.fetch(np.arange(40), DrawKey(0, 0, 0))
    dense = np.zeros_like(values)
    order = [names.index(gene) for gene in source.facts()["gene_space"].ids]
    for row in range(40):
        real = batch["attention_mask"][row] & (batch["tokens"][row] >= 4)
        dense[row, np.array(order)[batch["tokens"][row][real] - 4]] = batch["values"][row][real]
    assert np.array_equal(dense, values)


def test_a_file_is_converted_once_and_reused_wherever_it_lies(cells, cache, tmp_path, capsys):
    first = load(cells, cache_dir=cache)
    assert "cells.h5ad: converted once to" in capsys.readouterr().err
    load(cells, cache_dir=cache)
    (tmp_path / "elsewhere").mkdir()
    copy = Path(shutil.copy(cells, tmp_path / "elsewhere"))
    again = load(copy, cache_dir=cache)
    assert capsys.readouterr().err == ""
    assert first.fingerprint() == again.fingerprint()
    assert len(corpora(cache)) == 1


def test_another_content_under_the_same_path_is_converted_anew(cells, cache, tmp_path):
    load(cells, cache_dir=cache)
    size, before = cells.stat().st_size, cells.stat()
    write_h5ad(cells, random_counts(40, 12, seed=1), obs={"lane": ["x", "y"] * 20})
    values, _ = anndata_values(cells)
    source = load(cells, cache_dir=cache)
    assert len(corpora(cache)) == 2
    total = source.reader.read(np.arange(39)).columns["total"]
    assert np.array_equal(total, values.sum(1)[:39])
    assert cells.stat().st_mtime_ns != before.st_mtime_ns or cells.stat().st_size != size


@pytest.mark.parametrize(
    "settings",
    [{"obs": ["kind"]}, {"technical_batch": "lane"}, {"label": "kind"}, {"min_genes": 3}, {"layer": "X"}],
)
def test_other_settings_make_another_corpus(cells, cache, settings):
    load(cells, cache_dir=cache)
    load(cells, cache_dir=cache, **settings)
    assert len(corpora(cache)) == 2


def test_cells_and_counts_that_were_dropped_are_said_each_time(cache, tmp_path):
    counts = np.ones((10, 4), int)
    counts[:3], counts[3:, 2:] = (
        0,
        3,
    )  # three empty cells; of the others the last two genes hold 6 of 8 counts
    path = write_h5ad(tmp_path / "a.h5ad", counts)
    (tmp_path / "two.txt").write_text("GENE0\nGENE1\n")
    for _ in range(2):
        source = load(path, cache_dir=cache, gene_vocab=str(tmp_path / "two.txt"))
        cells, values = (notice.partition(": ")[2] for notice in source.notices)
        assert (
            cells == "3 of 10 cells dropped: they express fewer than min_genes 1 of the 2 genes of the corpus"
        )
        assert values == "75.00% of the counts dropped: on genes that are not of the 2 genes of the corpus"
    other = write_h5ad(tmp_path / "b.h5ad", counts[3:, :2], genes=["GENE0", "GENE1"])
    source = load(other, path, cache_dir=cache, gene_vocab=str(tmp_path / "two.txt"))
    assert "75.00% of the counts of a.h5ad, the most of 2 sources, dropped" in source.notices[1]
    assert load(other, cache_dir=cache).notices == []


def test_settings_of_the_tokenizer_and_the_split_do_not_convert_again(cells, cache):
    load(cells, cache_dir=cache)
    load(cells, cache_dir=cache, val_fraction=0.2, preprocessing={"log1p": False}, num_workers=1)
    assert len(corpora(cache)) == 1


def test_an_interrupted_conversion_is_finished_by_the_next_call(cells, cache, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data.conversion_run.publish_corpus", die)
        with pytest.raises(KeyboardInterrupt):
            load(cells, cache_dir=cache)
    assert corpora(cache) == []
    left = [path for path in Path(cache).iterdir() if (path / UNFINISHED).exists()]
    assert len(left) == 1
    assert len(load(cells, cache_dir=cache)) == 40
    assert not (left[0] / UNFINISHED).exists()


def test_a_damaged_index_of_hashes_is_made_anew(cells, cache):
    load(cells, cache_dir=cache)
    (Path(cache) / "file_hashes.json").write_text('{"half')
    load(cells, cache_dir=cache)
    assert len(json.loads((Path(cache) / "file_hashes.json").read_text())) == 1
    assert len(corpora(cache)) == 1


LOAD = """
import json, sys
from data.prepared import h5ad_loader
source = h5ad_loader([sys.argv[1]], cache_dir=sys.argv[2], tokenizer=json.loads(sys.argv[3]))
print("fingerprint", source.fingerprint() + "\\n", end="")
"""


def test_processes_that_ask_at_once_convert_once(cells, cache, tmp_path):
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    command = [sys.executable, str(script), str(cells), cache, json.dumps(TOKENIZER)]
    with RankGroup([command] * 2, [cpu_environment({"PYTHONPATH": str(ROOT)})] * 2, tmp_path) as group:
        said = group.wait(120).stdout
    found = re.findall(r"^fingerprint (\w+)$", said, re.MULTILINE)
    assert len(found) == 2 and len({*found}) == 1, said
    assert said.count("converted once to") == 1


def test_what_a_conversion_says_names_the_loaders_arguments(cells, cache, capsys):
    load(cells, cache_dir=cache)
    told = capsys.readouterr().err
    assert "are not kept: " in told and "; obs: [COLUMN] in dataloader_args keeps one" in told
    assert "--obs" not in told


def test_advice_is_what_a_configuration_can_do(cache, tmp_path, capsys):
    counts = random_counts(30, 12)[:29]
    perturbed = {"target_gene": ["g"] * 29, "technical_batch": ["lane"] * 29}
    files = [write_h5ad(tmp_path / f"{name}.h5ad", counts, obs=perturbed) for name in "ab"]
    files.append(write_h5ad(tmp_path / "logged.h5ad", np.log1p(counts / 7)))
    with pytest.raises(DataError, match="one kind with layer, or give each file a phase of its own") as error:
        load(*files, cache_dir=cache)
    assert "--" not in str(error.value)
    load(*files[:2], cache_dir=cache, obs=["target_gene"], technical_batch="technical_batch")
    told = capsys.readouterr().err
    assert "as one technical batch each; technical_batch: '@file' takes each file as one" in told
    assert "control" not in told and "--" not in told
    ids = [f"ENSG{index:011d}" for index in range(12)]
    files[2] = write_h5ad(tmp_path / "ids.h5ad", counts, genes=ids)
    with pytest.raises(DataError, match="give gene_vocab a vocabulary that knows both, such as human_all"):
        load(*files, cache_dir=cache)


def test_messages_of_labels_name_the_users_file_and_the_keys(cache, tmp_path):
    obs = {"age": [0.5] * 29, "kind": ["T"] * 20 + ["B"] * 9}
    path = write_h5ad(tmp_path / "labs.h5ad", random_counts(30, 12)[:29], obs=obs)
    keys = r"set label_task: {} \(finetune.head.task in a single-cell configuration\)"
    with pytest.raises(DataError, match="'age' of labs.h5ad .*" + keys.format("regression")):
        load(path, cache_dir=cache, label="age")
    with pytest.raises(DataError, match="'kind' of labs.h5ad .*" + keys.format("classification")):
        load(path, cache_dir=cache, label="kind", label_task="regression")
    with pytest.raises(DataError, match="'age' of labs.h5ad .* no classes; take another column"):
        load(path, cache_dir=cache, sampling={"column": "age"})


def test_a_process_that_waits_says_for_what(cells, cache, tmp_path, capsys):
    import threading
    import time

    from data.file_lock import file_lock

    folder = Path(cache) / ".locks"
    entered, released = threading.Event(), threading.Event()

    def hold():
        with file_lock(folder / "x", "nothing", say):
            entered.set()
            released.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(10)
    timer = threading.Timer(0.3, released.set)
    timer.start()
    begin = time.monotonic()
    with file_lock(folder / "x", "converting cells.h5ad", say):
        assert time.monotonic() - begin > 0.2
    holder.join()
    timer.join()
    assert capsys.readouterr().err == "waiting for another process that is converting cells.h5ad\n"


# What is kept


def test_several_files_keep_where_each_cell_came_from(cells, cache, tmp_path):
    other = write_h5ad(
        tmp_path / "other.h5ad", random_counts(20, 12)[:19], genes=[f"GENE{i}" for i in range(6, 18)]
    )
    source = load(cells, other, cache_dir=cache, technical_batch="@file")
    manifest = source.reader.info.manifest
    assert [(each.path_name, each.rows) for each in manifest.sources] == [
        ("cells.h5ad", 40),
        ("other.h5ad", 19),
    ]
    assert manifest.technical_batches == ("cells", "other")
    assert len(source.facts()["gene_space"]) == 18


def test_obs_columns_are_kept_by_name_and_others_are_not(cells, cache):
    source = load(cells, cache_dir=cache, obs=["kind", "dose", "renamed=lane"], technical_batch="lane")
    assert set(source.reader.info.columns) == {"kind", "dose", "renamed", "technical_batch"}
    found = source.obs(["kind", "renamed", "dose"], np.array([3, 0]))
    assert found["kind"].tolist() == ["B", "T"]
    assert found["renamed"].tolist() == ["lane2", "lane1"]
    assert np.isnan(found["dose"][0]) and found["dose"][1] == 0
    with pytest.raises(
        DataError, match="no obs column cluster was kept; it has: technical_batch, kind, dose"
    ):
        source.obs(["cluster"], np.array([0]))


def test_a_gene_vocabulary_rules_the_order_and_keeps_the_library_size(cache, tmp_path):
    counts = random_counts(30, 12)[:29]
    path = write_h5ad(tmp_path / "ids.h5ad", counts, genes=[f"{gene}.3" for gene in IDS])
    genes = tmp_path / "genes.txt"
    genes.write_text("\n".join([IDS[5], IDS[0], IDS[7]]))
    source = load(path, cache_dir=cache, gene_vocab=str(genes))
    assert source.facts()["gene_space"].ids == (IDS[5], IDS[0], IDS[7])
    assert np.array_equal(source.reader.read(np.arange(29)).columns["total"], counts.sum(1))


def test_real_symbols_are_matched_to_the_shipped_vocabulary(cache, capsys):
    source = load(SAMPLES / "10x_pbmc68k_reduced.h5ad", cache_dir=cache, gene_vocab="human_protein_coding")
    assert len(source.facts()["gene_space"]) == 20_120
    text = capsys.readouterr().err
    assert "737 of 765 genes matched by symbol (96.3% of the possible" in text
    assert "47 of them by the symbol that they had before: ATPIF1" in text


# Preprocessing


def test_the_steps_of_preprocessing_are_those_of_the_tokenizer(cells, cache):
    source = load(
        cells, cache_dir=cache, preprocessing={"normalize": "library_size", "target_sum": 500, "log1p": True}
    )
    plain = load(cells, cache_dir=cache, preprocessing={"normalize": None, "log1p": False})
    rows = np.arange(39)
    totals = torch.from_numpy(source.reader.read(rows).columns["total"])[:, None]
    counts = plain.fetch(rows, DrawKey(0, 0, 0))["values"]
    expected = torch.log1p(counts / totals * 500)
    assert torch.allclose(source.fetch(rows, DrawKey(0, 0, 0))["values"], expected, atol=1e-5)


def test_values_that_are_log_normalised_already_are_left_alone_with_a_notice(cache, tmp_path):
    logged = np.log1p(random_counts(30, 12)[:29] / 7)
    path = write_h5ad(tmp_path / "logged.h5ad", logged)
    steps = {"normalize": "library_size", "target_sum": 1e4, "log1p": True}
    source = load(path, cache_dir=cache, preprocessing=steps)
    assert len(source.notices) == 1
    assert "log-normalised already" in source.notices[0]
    batch = source.fetch(np.arange(29), DrawKey(0, 0, 0))
    assert np.allclose(batch["values"].sum(1), logged.astype(np.float32).sum(1), rtol=1e-5)
    assert source.facts()["tokenizer_options"]["normalize"] is None


def test_steps_that_the_tokenizer_says_otherwise_are_refused(cells, cache):
    tokenizer = {**TOKENIZER, "log1p": False}
    with pytest.raises(DataError, match=r"preprocessing.log1p is True and tokenizer.log1p False"):
        h5ad_loader([str(cells)], tokenizer=tokenizer, cache_dir=cache, preprocessing={"log1p": True})


@pytest.mark.parametrize(
    "steps, message",
    [
        (
            {"normalise": "library_size"},
            "preprocessing.normalise: not an option here; there are: normalize, target",
        ),
        ({"normalize": "median"}, r"preprocessing.normalize: got 'median'; it must be library_size \| null"),
        ({"target_sum": -1}, "preprocessing.target_sum: got -1; it must be a number above 0, or null"),
        ({"log1p": "yes"}, "preprocessing.log1p: got 'yes'; it must be true or false"),
    ],
)
def test_wrong_steps_are_named(cells, cache, steps, message):
    with pytest.raises(DataError, match=message):
        load(cells, cache_dir=cache, preprocessing=steps)


# Mistakes


def test_files_that_cannot_be_read_are_named(cells, cache, tmp_path):
    with pytest.raises(DataError, match="no h5ad file is named"):
        load(cache_dir=cache)
    with pytest.raises(DataError, match=r"absent.h5ad: no such file"):
        load(tmp_path / "absent.h5ad", cache_dir=cache)
    with pytest.raises(DataError, match=r"none\*.h5ad: no file matches"):
        load(tmp_path / "none*.h5ad", cache_dir=cache)
    (tmp_path / "text.h5ad").write_text("not HDF5")
    with pytest.raises(DataError, match=r"text.h5ad: not an HDF5 file"):
        load(tmp_path / "text.h5ad", cache_dir=cache)
    with pytest.raises(DataError, match="the same input is given more than once"):
        load(cells, cells, cache_dir=cache)


def test_scaled_values_are_refused_with_the_cell_and_the_option_to_set(cache, tmp_path):
    path = write_h5ad(tmp_path / "scaled.h5ad", random_counts(30, 12) - 3.5)
    with pytest.raises(
        DataError, match=r"scaled.h5ad: X: cell 0 .* is negative.*name another matrix with layer"
    ):
        load(path, cache_dir=cache)
    assert corpora(cache) == []


def test_genes_that_no_file_has_in_common_with_the_vocabulary_are_refused(cells, cache, tmp_path):
    with pytest.raises(DataError, match="no gene in common with the gene space.*set gene_column|gene_column"):
        load(cells, cache_dir=cache, gene_vocab="human_protein_coding")
    few = write_h5ad(tmp_path / "few.h5ad", random_counts(30, 12)[:29], genes=["TP53", *map(str, range(11))])
    with pytest.raises(DataError, match=r"1 of 12 genes matched.*lower it with min_match"):
        load(few, cache_dir=cache, gene_vocab="human_protein_coding")
    source = load(few, cache_dir=cache, gene_vocab="human_protein_coding", min_match=0.05)
    assert len(source.facts()["gene_space"]) == 20_120


# Labels


def test_batches_hold_the_class_of_each_cell(cells, cache):
    source = load(cells, cache_dir=cache, label="kind")
    facts = source.facts()
    assert (facts["label_names"], facts["n_classes"]) == (["B", "T"], 2)
    label = source.fetch(np.array([3, 0, 1]), DrawKey(0, 0, 0))["label"]
    assert (label.tolist(), label.dtype) == ([0, 1, 1], torch.int64)


def test_whole_numbers_are_classes_in_ascending_order(cells, cache):
    source = load(cells, cache_dir=cache, label="cluster")
    assert source.facts()["label_names"] == ["0", "1", "2", "3"]
    assert source.fetch(np.arange(6), DrawKey(0, 0, 0))["label"].tolist() == [0, 1, 2, 3, 0, 1]


def test_numbers_are_labels_of_a_regression(cells, cache):
    source = load(cells, cache_dir=cache, label="dose", label_task="regression")
    label = source.fetch(np.arange(5), DrawKey(0, 0, 0))["label"]
    assert label.dtype == torch.float32
    assert torch.isnan(label).tolist() == [False, False, False, True, False]
    assert (source.facts()["label_names"], source.facts()["n_classes"]) == (None, None)


def test_cells_without_a_label_are_ignored_and_are_no_class(cache, tmp_path):
    kinds = pd.Categorical([None, "T", "B", "T"] * 10)
    numbers = np.where(np.arange(40) % 4 == 0, np.nan, np.arange(40) % 2)
    counts = random_counts(40, 12)
    counts[-1, 0] = 1
    path = write_h5ad(tmp_path / "some.h5ad", counts, obs={"kind": kinds, "number": numbers})
    source = load(path, cache_dir=cache, label="kind")
    assert source.facts()["label_names"] == ["B", "T"]
    assert source.fetch(np.arange(4), DrawKey(0, 0, 0))["label"].tolist() == [-100, 1, 0, 1]
    source = load(path, cache_dir=cache, label="number")
    assert source.facts()["label_names"] == ["0", "1"]
    assert source.fetch(np.arange(4), DrawKey(0, 0, 0))["label"].tolist() == [-100, 1, 0, 1]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"label": "n_genes"},
            r"obs column 'n_genes': every corpus has .* as obs: \[cell_n_genes=n_genes\], and use",
        ),
        ({"label": "absent"}, "obs absent=absent: .*no column 'absent'"),
        ({"label": "dose"}, "'dose' of .* holds fractional numbers such as 0.0.*label_task: regr"),
        (
            {"label": "kind", "label_task": "regression"},
            r"'kind' of .* holds classes \(B, T\), and regression needs",
        ),
        (
            {"label": "kind", "label_task": "ranking"},
            r"label_task is 'ranking'; it must be classification \| regr",
        ),
        (
            {"stratify": True, "val_fraction": 0.1},
            "stratify: true splits by the classes of a label; set label",
        ),
        (
            {"sampling": {"column": "kind", "warm": 1}},
            "sampling.warm: not an option here; there are: column, warmup",
        ),
        ({"sampling": {"warmup_epochs": 1}}, "sampling.column: missing"),
        ({"sampling": {"column": "kind", "warmup_epochs": -1}}, "sampling.warmup_epochs: got -1"),
    ],
)
def test_labels_that_cannot_be_are_named(cells, cache, options, message):
    with pytest.raises(DataError, match=message):
        load(cells, cache_dir=cache, **options)


def test_the_account_counts_the_classes_that_are_learned_and_the_cells_that_teach_nothing(
    cache, tmp_path, capsys
):
    kinds = pd.Categorical([*["a"] * 20, *["b"] * 9, *[None] * 10])
    obs = {"kind": kinds, "age": [*np.arange(35.0), *[np.nan] * 4]}
    path = write_h5ad(tmp_path / "some.h5ad", random_counts(40, 12)[:39], obs=obs)
    source = load(path, cache_dir=cache, label="kind", stratify=True, val_fraction=0.2)
    assert (
        "kind: 2 classes from obs column kind, and 'unlabelled' for the 10 cells" in capsys.readouterr().err
    )
    said = "label kind of the training cells: 2 classes (a 16, b 7); 8 cells have no label and teach nothing"
    assert source.notices == [said]
    whole = load(path, cache_dir=cache, label="kind")
    assert "2 classes (a 20, b 9); 10 cells have no label" in whole.notices[0]
    numbers = load(path, cache_dir=cache, label=["age"], label_task="regression")
    assert numbers.notices == [
        "label age of the training cells: numbers; 4 cells have no label and teach nothing"
    ]


def test_a_stratified_split_holds_out_some_of_every_class(cache, tmp_path):
    kinds = ["a"] * 50 + ["b"] * 6 + ["c"] * 2 + ["d"]
    counts = random_counts(60, 12)[:59]
    path = write_h5ad(tmp_path / "kinds.h5ad", counts, obs={"kind": kinds})
    source = load(path, cache_dir=cache, label="kind", stratify=True, val_fraction=0.1)
    assert source.validation is not None and source.row_mask is not None
    training, validation = source.row_mask, source.validation.row_mask
    assert validation is not None and np.array_equal(training, ~validation)
    kinds = np.array(kinds)
    assert {kind: int((kinds[validation] == kind).sum()) for kind in "abcd"} == {
        "a": 5,
        "b": 1,
        "c": 1,
        "d": 0,
    }
    assert source.notices[1:] == ["1 class of one cell cannot be split and stays in training: d"]
    again = load(path, cache_dir=cache, label="kind", stratify=True, val_fraction=0.1, split_seed=1)
    assert again.validation is not None and not np.array_equal(again.validation.row_mask, validation)


def test_a_stratified_split_of_some_cells_takes_no_others(cells, cache):
    source = load(cells, cache_dir=cache, label="kind", stratify=True, val_fraction=0.25, limit_cells=16)
    assert (
        source.validation is not None
        and source.row_mask is not None
        and source.validation.row_mask is not None
    )
    assert source.row_mask.sum() + source.validation.row_mask.sum() == 16
    assert not (source.row_mask & source.validation.row_mask).any()


def test_balanced_sampling_orders_training_and_not_validation(cells, cache):
    options = {"sampling": {"column": "kind"}, "val_fraction": 0.2, "shuffle_window": 64}
    source = load(cells, cache_dir=cache, **options)
    order = source.training_order(seed=0, phase=0)
    assert order is not None and source.row_mask is not None and source.validation is not None
    rows = np.concatenate([order.rows(epoch, 0, order.num_rows) for epoch in range(40)])
    kinds = source.obs(["kind"], rows)["kind"]
    assert (kinds == "B").mean() == pytest.approx(0.5, abs=0.05)
    assert source.row_mask[rows].all()
    assert source.validation.training_order(0, 0) is None
    assert load(cells, cache_dir=cache).fingerprint() != source.fingerprint()


def test_the_corpus_of_the_cache_is_an_ordinary_one(cells, cache):
    source = load(cells, cache_dir=cache)
    info = open_corpus(source.reader.info.path)
    assert info.manifest.sources[0].path_name == "cells.h5ad"
