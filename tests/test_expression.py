from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import make_cells, write_corpus
from h5ad_files import write_h5ad

from data.errors import DataError
from data.expression import ExpressionSource, expression_loader
from data.hashing import DrawKey
from data.loader import StepLoader
from data.order import GlobalOrder
from data.perturbation import perturbation_loader
from data.readers import open_reader

NUM_GENES = 50
TOKENIZER = {"strategy": "log_bins", "n_bins": 12}
DRAW = DrawKey(3, 1, 0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(
        tmp_path_factory.mktemp("cells") / "corpus", make_cells(200, NUM_GENES, 15), NUM_GENES
    )


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert two files with overlapping genes: GENE0 to GENE9, and GENE5 to GENE14, all counts 3."""
    from trainer.convert_h5ad import main

    folder = tmp_path_factory.mktemp("two")
    for name, first in (("a", 0), ("b", 5)):
        obs = {
            "target_gene": ["GENE6"] * 6 + ["non-targeting"] * 6,
            "cell_type": ["t"] * 12,
            "batch": [name] * 12,
        }
        genes = [f"GENE{index}" for index in range(first, first + 10)]
        write_h5ad(folder / f"{name}.h5ad", np.full((12, 10), 3), genes=genes, obs=obs)
    files = [str(folder / "a.h5ad"), str(folder / "b.h5ad")]
    assert main([*files, "--output", str(folder / "corpus")]) == 0
    return folder / "corpus"


def load(path: Path, **options: Any) -> ExpressionSource:
    return expression_loader(path, **{"tokenizer": TOKENIZER, **options})


def test_a_batch_has_the_documented_shapes_and_the_tokens_of_its_cells(corpus: Path):
    source = load(corpus)
    rows = np.array([17, 3, 99])
    batch = source.fetch(rows, DRAW)
    assert {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)} == {
        "tokens": (3, NUM_GENES), "batch_idx": (3,), "cell_index": (3,), "depth": (3,), "noise_seed": (3,),
    }  # fmt: skip
    assert batch["cell_index"].tolist() == rows.tolist() and batch["num_tokens"] == 3 * NUM_GENES
    read = open_reader(source.reader.info, ["total"]).read(rows)
    for place in range(3):
        part = slice(read.offsets[place], read.offsets[place + 1])
        values = np.zeros(NUM_GENES, np.float32)
        values[read.genes[part]] = np.log1p(read.counts[part] * 1e4 / read.columns["total"][place])
        assert np.array_equal(batch["tokens"][place], source.tokenizer.encode(values))


def test_a_phase_of_cells_and_one_of_perturbations_have_the_same_columns_and_tokens(
    two_files: Path, tmp_path: Path
):
    (tmp_path / "genes.txt").write_text("GENE8\nGENE6\nGENE5\n")
    options: dict[str, Any] = {"tokenizer": TOKENIZER, "genes": str(tmp_path / "genes.txt")}
    cells, sets = (
        expression_loader(two_files, **options),
        perturbation_loader(two_files, set_size=4, **options),
    )
    for key in ("vocab_size", "n_bins", "num_genes", "gene_space"):
        assert cells.facts()[key] == sets.facts()[key]
    batch = sets.fetch(np.arange(2), DRAW)
    again = cells.fetch(batch["cell_index"].numpy().reshape(-1), DRAW)
    assert torch.equal(batch["tokens"].flatten(0, 1), again["tokens"])


def test_validation_cells_are_not_trained_on_and_their_noise_stays(corpus: Path):
    source = load(corpus, val_fraction=0.2)
    assert (
        source.validation is not None
        and source.row_mask is not None
        and source.validation.row_mask is not None
    )
    assert not (source.row_mask & source.validation.row_mask).any() and source.validation.row_mask.sum() == 40
    rows = np.flatnonzero(source.validation.row_mask)[:5]
    first, second = (source.validation.fetch(rows, DRAW._replace(epoch=epoch)) for epoch in (0, 1))
    assert torch.equal(first["noise_seed"], second["noise_seed"])
    mine = [source.fetch(rows, DRAW._replace(epoch=epoch))["noise_seed"] for epoch in (0, 0, 1)]
    assert torch.equal(mine[0], mine[1]) and not torch.equal(mine[0], mine[2])
    assert source.tokenizer is source.validation.tokenizer


def test_the_inverse_is_fitted_and_has_no_bias(corpus: Path):
    source = load(corpus)
    tokens = source.fetch(np.arange(200), DRAW)["tokens"].numpy()
    cells = source.reader.read(np.arange(200))
    values = source.transform.apply(cells.counts, cells.offsets, cells.columns["total"])
    assert source.tokenizer.decode(tokens).sum() == pytest.approx(values.sum(), rel=1e-4)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_cell_comes_once_an_epoch_on_any_number_of_ranks(corpus: Path, world_size: int):
    source, seen = load(corpus), []
    for rank in range(world_size):
        order = GlobalOrder(len(source), seed=1, phase=0, block=8, window=64)
        loader = StepLoader(
            source,
            order,
            draw_seed=1,
            phase=0,
            global_batch_size=24,
            micro_batch_size=4,
            rank=rank,
            world_size=world_size,
        )
        for step in loader.steps(0):
            seen += [cell for micro in step if micro.num_cells for cell in micro.batch["cell_index"].tolist()]
    assert sorted(seen) == list(range(200))


def test_genes_that_a_file_did_not_measure_are_zero_or_hidden(two_files: Path):
    rows = np.array([0, 12])  # of the first file, and of the second
    plain, hidden = load(two_files), load(two_files, unmeasured="hide")
    with_zeros, with_holes = (source.fetch(rows, DRAW)["tokens"].numpy() for source in (plain, hidden))
    missing = np.array([[False] * 10 + [True] * 5, [True] * 5 + [False] * 10])
    assert (with_zeros[missing] == 0).all() and (with_zeros[~missing] > 0).all()
    assert (with_holes[missing] == -1).all() and np.array_equal(with_holes[~missing], with_zeros[~missing])
    assert "a.h5ad did not measure 5 of the 15 genes, which read as 0" in plain.notices
    assert "b.h5ad did not measure 5 of the 15 genes, which are hidden (token -1)" in hidden.notices


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "both"},
        {"tokenizer": {"strategy": "delta_bins"}, "control_tokenizer": TOKENIZER},
        {"tokenizer": {"strategy": "delta_bins"}, "control_tokenizer": TOKENIZER, "pooling": "control"},
    ],
)
def test_sets_hide_genes_that_their_cells_did_not_measure(two_files: Path, options: dict[str, Any]):
    source = perturbation_loader(
        two_files, **{"set_size": 4, "tokenizer": TOKENIZER, "unmeasured": "hide", **options}
    )
    batch = source.fetch(np.arange(len(source)), DRAW)
    for index, batch_idx in enumerate(batch["batch_idx"].tolist()):
        missing = torch.zeros(15, dtype=torch.bool)
        missing[slice(10, 15) if batch_idx == 0 else slice(0, 5)] = True
        for key in ("tokens", "control"):
            assert (batch[key][index][:, missing] == -1).all() and (batch[key][index][:, ~missing] >= 0).all()


def test_a_mean_of_controls_is_that_of_those_that_measured_the_gene(two_files: Path):
    # Sets of both files at once: the mean of equal values is that value, however many cells measured the gene.
    options: dict[str, Any] = {"tokenizer": {"strategy": "log_bins", "normalize": None}, "unmeasured": "hide"}
    source = perturbation_loader(
        two_files, set_size=12, mix_technical_batches=True, pooling="control", **options
    )
    control = source.fetch(np.array([0]), DRAW)["control"][0, 0]
    expected = int(source.control_tokenizer.encode(np.log1p(np.array([3.0], np.float32)))[0])
    assert control.tolist() == [expected] * 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": {"strategy": "delta_bins"}}, "delta_bins is for differences from controls"),
        ({"unmeasured": "skip"}, r"unmeasured is 'skip'; it must be zero \| hide"),
        ({"val_fraction": 1.0}, r"val_fraction is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_mistakes_are_named(corpus: Path, options: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        load(corpus, **options)


def test_the_run_must_know_every_technical_batch(corpus: Path):
    source = load(corpus)
    source.set_batch_mapping({"lane-a": 4, "lane-b": 5, "lane-c": 6})
    assert set(source.fetch(np.arange(50), DRAW)["batch_idx"].tolist()) == {4, 5, 6}
    with pytest.raises(DataError, match="lacks the technical batch lane-b"):
        source.set_batch_mapping({"lane-a": 4, "lane-c": 6})


def test_cells_of_labels_that_are_left_out_take_no_part(two_files: Path):
    source = load(two_files, leave_out={"target_gene": ["GENE6"]}, val_fraction=0.3)
    assert source.row_mask is not None and source.validation is not None
    labels = open_reader(source.reader.info, ["target_gene"]).read(np.arange(24)).columns["target_gene"]
    is_left_out = labels == source.reader.info.class_names("target_gene").index("GENE6")
    assert is_left_out.sum() == 12 and not (source.row_mask & is_left_out).any()
    assert source.validation.row_mask is not None and not (source.validation.row_mask & is_left_out).any()
    assert source.row_mask.sum() + source.validation.row_mask.sum() == 12
    assert any("leave_out: 12 cells of 24 take no part" in notice for notice in source.notices)
    assert source.fingerprint() != load(two_files, val_fraction=0.3).fingerprint()


def test_cells_with_any_label_that_is_left_out_take_no_part(two_files: Path):
    source = load(two_files, leave_out={"target_gene": ["GENE6"], "technical_batch": ["b"]})
    cells = open_reader(source.reader.info, ["target_gene", "technical_batch"]).read(np.arange(24)).columns
    info = source.reader.info
    is_kept = cells["target_gene"] == info.class_names("target_gene").index("non-targeting")
    is_kept &= cells["technical_batch"] == info.class_names("technical_batch").index("a")
    assert is_kept.sum() == 6 and source.row_mask is not None
    assert source.row_mask.tolist() == is_kept.tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_gene": ["GENE61"]}, "leave_out.target_gene: no target_gene 'GENE61'; close to it: GENE6"),
        ({"target_gene": "GENE6"}, "leave_out.target_gene: got the text 'GENE6'; give a list"),
        ({"donor": ["A"]}, "no class column 'donor'"),
        ({"target_gene": ["GENE6", "non-targeting"]}, "leave_out leaves no cell to train on"),
    ],
)
def test_labels_to_leave_out_that_mean_nothing_are_an_error(two_files: Path, given: Any, message: str):
    with pytest.raises(DataError, match=message):
        load(two_files, leave_out=given)
