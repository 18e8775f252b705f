import os
import sys
import warnings
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse
import torch

from data.cell_source import CellSource
from data.corpus import UNFINISHED
from data.errors import DataError
from data.hashing import DrawKey
from data.prepared import h5ad_loader
from tests.h5ad_files import anndata_values, dense_corpus, write_h5ad

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import scanpy

TOKENIZER = {"strategy": "binned_expression", "max_genes": 64}
NUM_GENES = 120


def noisy_counts(num_cells: int, seed: int, variable: range) -> np.ndarray:
    """Return counts whose genes in `variable` differ between two halves of the cells."""
    rng = np.random.default_rng(seed)
    means = rng.gamma(2.0, 2.0, NUM_GENES)
    rates = np.tile(means, (num_cells, 1))
    rates[: num_cells // 2, list(variable)] *= 8
    return rng.poisson(rates * rng.gamma(9, 1 / 9, (num_cells, 1)))


@pytest.fixture
def files(tmp_path) -> list[Path]:
    obs = {"donor": ["p", "q", "r"] * 40}
    return [
        write_h5ad(tmp_path / f"{name}.h5ad", noisy_counts(120, seed, variable), obs=obs)
        for name, seed, variable in (("one", 1, range(10, 30)), ("two", 2, range(20, 40)))
    ]


@pytest.fixture
def cache(tmp_path) -> str:
    return str(tmp_path / "cache")


def load(paths: list[Path], cache_dir: str, **options) -> CellSource:
    preprocessing = {"hvg_selection": 25, **options.pop("preprocessing", {})}
    return h5ad_loader(
        list(map(str, paths)),
        tokenizer=TOKENIZER,
        preprocessing=preprocessing,
        cache_dir=cache_dir,
        **options,
    )


def genes(source: CellSource) -> tuple[str, ...]:
    return source.facts()["gene_space"].ids


def by_scanpy(paths: list[Path], groups: list | None, **options) -> set[str]:
    values, names = zip(*(anndata_values(path) for path in paths), strict=True)
    data = anndata.AnnData(scipy.sparse.csr_matrix(np.concatenate(values).astype(np.float32)))
    data.var_names = names[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if options["flavor"] in ("seurat", "cell_ranger"):
            scanpy.pp.normalize_total(data, target_sum=1e4)
            scanpy.pp.log1p(data)
        if groups is not None:
            data.obs["group"] = groups
            data.obs["group"] = data.obs["group"].astype("category")
        table = scanpy.pp.highly_variable_genes(
            data, n_top_genes=25, batch_key=None if groups is None else "group", inplace=False, **options
        )
    return set(table.index[table["highly_variable"]])


@pytest.mark.parametrize("flavor", ["seurat_v3", "seurat_v3_paper", "seurat", "cell_ranger"])
def test_the_genes_are_those_that_scanpy_chooses_over_the_files(files, cache, flavor):
    source = load(files, cache, preprocessing={"hvg_flavor": flavor})
    expected = by_scanpy(files, ["0"] * 120 + ["1"] * 120, flavor=flavor)
    assert len(genes(source)) == 25
    assert len(set(genes(source)) ^ expected) <= 2  # rounding of scaled values decides between near ties
    assert len(set(genes(source)) & {f"GENE{index}" for index in range(10, 40)}) > 12  # 6 by chance


def test_ranking_leaves_torch_its_number_of_threads(files, cache):
    before, wanted = torch.get_num_threads(), (os.cpu_count() or 1) + 1
    torch.set_num_threads(wanted)
    try:
        load(files[:1], cache)
        assert torch.get_num_threads() == wanted
    finally:
        torch.set_num_threads(before)


def test_the_genes_are_in_the_order_of_their_rank(files, cache):
    values, names = anndata_values(files[0])
    data = anndata.AnnData(scipy.sparse.csr_matrix(values.astype(np.float32)))
    data.var_names = names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = scanpy.pp.highly_variable_genes(data, n_top_genes=25, flavor="seurat_v3", inplace=False)
    ranked = table[table["highly_variable"]].sort_values("highly_variable_rank")
    assert genes(load(files[:1], cache)) == tuple(ranked.index)


def test_one_file_is_ranked_as_a_whole_and_a_column_by_its_groups(files, cache):
    whole = load(files[:1], cache)
    assert set(genes(whole)) == by_scanpy(files[:1], None, flavor="seurat_v3")
    grouped = load(files[:1], cache, preprocessing={"hvg_batch_key": "donor"})
    assert set(genes(grouped)) == by_scanpy(files[:1], ["p", "q", "r"] * 40, flavor="seurat_v3")
    assert set(genes(grouped)) != set(genes(whole))


def test_log_normalised_values_are_ranked_by_the_flavor_for_them(cache, tmp_path):
    logged = np.log1p(noisy_counts(120, 1, range(10, 30)) / 3)
    path = write_h5ad(tmp_path / "logged.h5ad", logged)
    source = load([path], cache)
    assert len(set(genes(source)) & {f"GENE{index}" for index in range(10, 30)}) > 12
    with pytest.raises(
        DataError, match="hvg_flavor: seurat_v3 ranks genes by raw counts.*set seurat or cell_ranger"
    ):
        load([path], cache, preprocessing={"hvg_flavor": "seurat_v3"})


def test_the_whitelist_comes_first_and_counts_among_the_genes(files, cache, tmp_path, capsys):
    plain = genes(load(files, cache))
    white = ["GENE100", plain[20], "GENE7", "TP53"]
    source = load(files, cache, preprocessing={"hvg_whitelist": white})
    assert genes(source)[:3] == ("GENE100", plain[20], "GENE7")
    assert genes(source)[3:] == tuple(gene for gene in plain if gene != plain[20])[:22]
    assert "hvg_whitelist: 1 of 4 genes are not in the data: TP53" in capsys.readouterr().err
    (tmp_path / "white.txt").write_text("\n".join(white))
    again = load(files, cache, preprocessing={"hvg_whitelist": str(tmp_path / "white.txt")})
    assert genes(again) == genes(source)


def test_the_narrowed_corpus_holds_the_same_values_and_library_sizes(files, cache):
    source = load(files, cache, obs=["donor"], technical_batch="@file", min_genes=0)
    values = np.concatenate([anndata_values(path)[0] for path in files])
    names = anndata_values(files[0])[1]
    columns = [names.index(gene) for gene in genes(source)]
    info = source.reader.info
    assert np.array_equal(dense_corpus(info), values[:, columns])
    assert np.array_equal(source.reader.read(np.arange(240)).columns["total"], values.sum(1))
    assert source.obs(["donor", "technical_batch"], np.array([1, 121]))["technical_batch"].tolist() == [
        "one",
        "two",
    ]
    dropped = [
        1 - values[part][:, columns].sum() / values[part].sum() for part in (slice(120), slice(120, 240))
    ]
    assert [each.counts_dropped_fraction for each in info.manifest.sources] == pytest.approx(dropped)
    assert [each.rows for each in info.manifest.sources] == [120, 120]
    assert all(each.measured_mask(25).all() for each in info.manifest.sources)
    batch = source.fetch(np.array([3]), DrawKey(0, 0, 0))
    expected = np.log1p(values[3, columns] / values[3].sum() * 1e4)
    assert np.allclose(batch["values"][0][1:].numpy(), expected[expected > 0], atol=1e-4)


def test_cells_without_a_chosen_gene_are_dropped_and_counted(cache, tmp_path):
    counts = noisy_counts(120, 1, range(10, 30))
    plain = load([write_h5ad(tmp_path / "full.h5ad", counts)], cache)
    chosen = [int(gene.removeprefix("GENE")) for gene in genes(plain)]
    counts[5, chosen] = 0
    source = load(
        [write_h5ad(tmp_path / "gap.h5ad", counts)], cache, preprocessing={"hvg_whitelist": genes(plain)}
    )
    assert len(source) == 119
    assert source.reader.info.manifest.sources[0].cells_dropped == 1
    assert any("1 of 120 cells dropped" in notice for notice in source.notices)


def test_genes_are_chosen_once_and_for_all_settings_of_the_tokenizer(files, cache, capsys):
    first = load(files, cache)
    assert "hvg_selection: scanpy" in capsys.readouterr().err
    again = load(files, cache, val_fraction=0.1, preprocessing={"log1p": False})
    assert capsys.readouterr().err == ""
    assert genes(again) == genes(first)
    assert load(files, cache, preprocessing={"hvg_selection": 24}).reader.info.path != first.reader.info.path


def test_the_choice_is_made_on_a_seeded_sample(files, cache, capsys):
    first = load(files, cache, preprocessing={"hvg_max_cells": 150})
    assert "ranks 120 genes on 150 of 240 cells" in capsys.readouterr().err
    other = load(files, cache + "2", preprocessing={"hvg_max_cells": 150})
    assert genes(first) == genes(other)
    assert genes(first) != genes(load(files, cache))


def test_small_groups_are_left_out_with_a_notice(cache, tmp_path, capsys):
    obs = {"donor": ["big"] * 115 + ["small"] * 5}
    path = write_h5ad(tmp_path / "groups.h5ad", noisy_counts(120, 1, range(10, 30)), obs=obs)
    load([path], cache, preprocessing={"hvg_batch_key": "donor"})
    text = capsys.readouterr().err
    assert "1 groups of fewer than 20 sampled cells are left out of the ranking" in text
    assert "on 115 of 120 cells" in text


def test_fewer_genes_than_asked_for_are_all_kept(files, cache, capsys):
    assert len(genes(load(files, cache, preprocessing={"hvg_selection": 500}))) == NUM_GENES
    assert "all 120 genes are kept, since 500 were asked for" in capsys.readouterr().err


def test_an_interrupted_choice_is_made_again(files, cache, monkeypatch):
    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("data.hvg.publish_corpus", die)
        with pytest.raises(KeyboardInterrupt):
            load(files, cache)
    unfinished = [path for path in Path(cache).iterdir() if (path / UNFINISHED).exists()]
    assert len(unfinished) == 1 and not (unfinished[0] / "manifest.json").exists()
    assert len(load(files, cache)) == 240
    assert not (unfinished[0] / UNFINISHED).exists()


@pytest.mark.parametrize("module, flavor", [("scanpy", "seurat"), ("skmisc.loess", "seurat_v3")])
def test_a_missing_package_is_named_with_its_extra(files, cache, monkeypatch, module, flavor):
    monkeypatch.setitem(sys.modules, module, None)
    name = {"scanpy": "scanpy", "skmisc.loess": "scikit-misc"}[module]
    with pytest.raises(DataError, match=f"{name} is not installed .* extra `preprocess`: pip install"):
        load(files, cache, preprocessing={"hvg_flavor": flavor})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hvg_selection": 0}, "hvg_selection: got 0; it must be a whole number, at least 1"),
        ({"hvg_flavor": "best"}, "hvg_flavor: got 'best'; it must be seurat_v3 | seurat_v3_paper | seurat"),
        (
            {"hvg_selection": None, "hvg_flavor": "seurat"},
            "hvg_flavor: no genes are chosen without hvg_selection",
        ),
        (
            {"hvg_selection": None, "hvg_max_cells": 100},
            "hvg_max_cells: no genes are chosen without hvg_selection",
        ),
        (
            {"hvg_selection": 1, "hvg_whitelist": ["A", "B"]},
            "hvg_whitelist: its 2 genes are more than hvg_selection",
        ),
        (
            {"hvg_whitelist": ["A", "B"]},
            "hvg_whitelist: none of its 2 genes (A, B) is among the 120 genes of the data",
        ),
        ({"hvg_batch_key": "absent"}, "no column 'absent'"),
        ({"hvg_max_cells": 10}, "each of the 2 groups has fewer than 20 of the sampled cells"),
    ],
)
def test_what_cannot_be_chosen_is_named(files, cache, options, message):
    import re

    with pytest.raises(DataError, match=re.escape(message)):
        load(files, cache, preprocessing=options)
