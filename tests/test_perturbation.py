import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from data import technical_batches
from data.control_cells import ControlCells
from data.corpus import CorpusWriter
from data.errors import DataError
from data.hashing import DrawKey, stateless_hash
from data.loader import MicroBatch, StepLoader
from data.manifest import ObsColumn
from data.order import GlobalOrder
from data.permutation import permuted
from data.perturbation import PerturbationSource, perturbation_loader
from data.technical_batches import BatchIndexer, IndexedSource
from tests.corpora import gene_space, make_cells
from tests.h5ad_files import SHARED_DATA

ROOT = Path(__file__).parent.parent
NUM_GENES = 60
TARGETS = ("GENE1", "GENE2", "GENE3", "GENE4", "non-targeting")
CELL_TYPES = ("alpha", "beta")
BATCHES = ("lane-a", "lane-b", "lane-c")
LOG_BINS = {"strategy": "log_bins", "n_bins": 16}
DRAW = DrawKey(7, 0, 0)


def write_cells(
    folder: Path,
    labels: dict[str, Any],
    *,
    targets: tuple[str, ...] = TARGETS,
    storage: str = "arrow",
    columns: tuple[str, ...] = ("target_gene", "cell_type", "technical_batch"),
    control_label: str | None = "non-targeting",
    value_kind: str = "counts",
    source_name: str = "cells.h5ad",
) -> Path:
    """Write cells with these labels, one array of classes for each column, and counts that do not matter."""
    num_cells = len(labels["target_gene"])
    cells = make_cells(num_cells, NUM_GENES, 20, seed=2)
    names = {"target_gene": targets, "cell_type": CELL_TYPES, "technical_batch": BATCHES}
    with CorpusWriter(
        folder,
        gene_space(NUM_GENES),
        columns={name: ObsColumn("class", tuple(names[name])) for name in columns},
        storage=storage,
        rows_per_shard=150,
        value_kind=value_kind,
        control_label=control_label,
        source_name=source_name,
    ) as writer:
        counts = cells.counts if value_kind == "counts" else np.log1p(cells.counts).astype(np.float32)
        writer.write(cells.offsets, cells.genes, counts, {name: np.asarray(labels[name]) for name in columns})
    return folder


def make_labels(num_cells: int = 600, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "target_gene": rng.integers(0, len(TARGETS), num_cells),
        "cell_type": rng.integers(0, len(CELL_TYPES), num_cells),
        "technical_batch": rng.integers(0, len(BATCHES), num_cells),
    }


@pytest.fixture(scope="module")
def labels() -> dict[str, np.ndarray]:
    return make_labels()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, labels: dict[str, np.ndarray]) -> Path:
    return write_cells(tmp_path_factory.mktemp("cells") / "corpus", labels)


def load(path: Path, **options: Any) -> PerturbationSource:
    return perturbation_loader(path, **{"set_size": 8, "tokenizer": LOG_BINS, **options})


def every_set(source: PerturbationSource, draw: DrawKey = DRAW) -> dict[str, Any]:
    return source.fetch(np.arange(len(source)), draw)


def steps_of(source: Any, rank: int = 0, world_size: int = 1, **options: Any) -> StepLoader:
    order = GlobalOrder(
        len(source), seed=3, phase=0, block=source.shuffle_block, window=source.shuffle_window
    )
    sizes = {"global_batch_size": 12, "micro_batch_size": 3, **options}
    return StepLoader(source, order, draw_seed=3, phase=0, rank=rank, world_size=world_size, **sizes)


def assert_equal(one: list[MicroBatch], other: list[MicroBatch]) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        assert first.num_cells == second.num_cells and first.batch.keys() == second.batch.keys()
        for name, value in first.batch.items():
            same = (
                torch.equal(value, second.batch[name])
                if isinstance(value, torch.Tensor)
                else value == second.batch[name]
            )
            assert same, name


def refused(corpus: Path, message: str, **options: Any) -> None:
    with pytest.raises(DataError, match=message):
        load(corpus, **options)


# What a batch holds


def test_a_batch_has_the_documented_shapes(corpus: Path):
    batch = load(corpus).fetch(np.arange(5), DRAW)
    shapes = {
        name: (list(value.shape), value.dtype)
        for name, value in batch.items()
        if isinstance(value, torch.Tensor)
    }
    long, single = torch.int64, torch.float32
    assert shapes == {
        "tokens": ([5, 8, NUM_GENES], long),
        "control": ([5, 8, NUM_GENES], long),
        "target_gene_idx": ([5], long),
        "batch_idx": ([5], long),
        "cell_type_idx": ([5], long),
        "perturbation_idx": ([5], long),
        "cell_index": ([5, 8], long),
        "control_index": ([5, 8], long),
        "depth": ([5, 8], single),
        "control_depth": ([5, 8], single),
        "noise_seed": ([5], long),
    }
    assert batch["num_tokens"] == 5 * 8 * NUM_GENES


def test_a_set_is_of_one_target_and_context_and_its_controls_are_of_the_same_context(
    corpus: Path, labels: dict[str, np.ndarray]
):
    source = load(corpus)
    batch = every_set(source)
    cells, controls = batch["cell_index"].numpy(), batch["control_index"].numpy()
    for name, key in (
        ("target_gene", "perturbation_idx"),
        ("cell_type", "cell_type_idx"),
        ("technical_batch", "batch_idx"),
    ):
        assert (labels[name][cells] == batch[key].numpy()[:, None]).all()
    assert (labels["target_gene"][controls] == TARGETS.index("non-targeting")).all()
    for name in ("cell_type", "technical_batch"):
        assert np.array_equal(labels[name][controls], labels[name][cells])
    assert batch["target_gene_idx"].tolist() == (batch["perturbation_idx"] + 1).tolist()  # GENE1 is gene 1


def test_tokens_are_those_of_the_cells_that_are_named(corpus: Path):
    source = load(corpus)
    batch = source.fetch(np.array([3, 0]), DRAW)
    for rows, tokens, depth in (
        (batch["cell_index"], batch["tokens"], batch["depth"]),
        (batch["control_index"], batch["control"], batch["control_depth"]),
    ):
        read = source.reader.read(rows.numpy().reshape(-1))
        for place, (start, stop) in enumerate(zip(read.offsets, read.offsets[1:], strict=False)):
            total = read.columns["total"][place]
            values = np.zeros(NUM_GENES)
            values[read.genes[start:stop]] = np.log1p(read.counts[start:stop] * 1e4 / total)
            assert np.array_equal(
                tokens.reshape(-1, NUM_GENES)[place], source.tokenizer.encode(values.astype(np.float32))
            )
            assert depth.reshape(-1)[place] == pytest.approx(np.log1p(total))


def test_parquet_gives_the_same_batches_as_arrow(corpus: Path, labels: dict[str, np.ndarray], tmp_path: Path):
    other = load(write_cells(tmp_path / "parquet", labels, storage="parquet"))
    assert_equal(
        [MicroBatch(every_set(load(corpus)), 1, np.empty(0))], [MicroBatch(every_set(other), 1, np.empty(0))]
    )


def test_a_gene_list_gives_the_columns_in_its_order(corpus: Path, tmp_path: Path):
    names = ["GENE30", "GENE4", "GENE59", "GENE1", "GENE2", "GENE3"]
    (tmp_path / "genes.txt").write_text("\n".join(names))
    whole, part = load(corpus), load(corpus, genes=str(tmp_path / "genes.txt"))
    columns = [int(name.removeprefix("GENE")) for name in names]
    for key in ("tokens", "control"):
        assert torch.equal(every_set(part)[key], every_set(whole)[key][..., columns])
    assert every_set(part)["target_gene_idx"].unique().tolist() == [1, 3, 4, 5]
    assert part.facts()["gene_space"].ids == tuple(names) and part.facts()["num_genes"] == 6


def test_a_gene_that_the_corpus_lacks_is_refused_and_never_shifts_the_columns(corpus: Path, tmp_path: Path):
    (tmp_path / "genes.txt").write_text("GENE1\nGENE7\nELSEWHERE\n")
    refused(corpus, "lacks 1 of the 3 genes .*ELSEWHERE", genes=str(tmp_path / "genes.txt"))


def test_controls_can_be_pooled_into_their_mean(corpus: Path):
    plain, pooled = load(corpus), load(corpus, pooling="control")
    batch = pooled.fetch(np.arange(4), DRAW)
    assert list(batch["control"].shape) == [4, 1, NUM_GENES]
    assert torch.equal(batch["tokens"], plain.fetch(np.arange(4), DRAW)["tokens"])
    read = plain.reader.read(batch["control_index"][2].numpy())
    values = plain.transform.apply(read.counts, read.offsets, read.columns["total"])
    mean = plain.columns.dense(read, values, 0, np.float32).mean(axis=0)
    assert np.array_equal(batch["control"][2, 0], plain.tokenizer.encode(mean))


def test_both_sides_pooled_keep_one_technical_batch_for_each_row(corpus: Path):
    batch = load(corpus, pooling="both").fetch(np.arange(4), DRAW)
    assert list(batch["tokens"].shape) == list(batch["control"].shape) == [4, 1, NUM_GENES]
    assert list(batch["batch_idx"].shape) == [4]
    refused(corpus, "must then be of one technical batch", pooling="both", mix_technical_batches=True)


def test_differences_are_taken_from_the_matched_control(corpus: Path):
    options = {"tokenizer": {"strategy": "delta_bins", "n_bins": 21}, "control_tokenizer": LOG_BINS}
    source, plain = load(corpus, **options), load(corpus)
    batch = source.fetch(np.arange(4), DRAW)
    dense = []
    for rows in (batch["cell_index"], batch["control_index"]):
        read = plain.reader.read(rows.numpy().reshape(-1))
        values = plain.transform.apply(read.counts, read.offsets, read.columns["total"])
        dense.append(plain.columns.dense(read, values, 0, np.float32))
    expected = source.tokenizer.encode(dense[0] - dense[1])
    assert np.array_equal(batch["tokens"].reshape(-1, NUM_GENES), expected)
    assert torch.equal(batch["control"], plain.fetch(np.arange(4), DRAW)["control"])
    refused(corpus, "need another one; set control_tokenizer", tokenizer={"strategy": "delta_bins"})


def test_the_inverse_of_the_tokens_is_fitted_on_the_cells(corpus: Path):
    source, middle = load(corpus), load(corpus, tokenizer={**LOG_BINS, "centres": "middle"})
    batch = every_set(source)

    def mean_bias(inverse: PerturbationSource) -> float:
        biases = []
        for rows, tokens in (
            (batch["cell_index"], batch["tokens"]),
            (batch["control_index"], batch["control"]),
        ):
            read = source.reader.read(rows.numpy().reshape(-1))
            values = source.transform.apply(read.counts, read.offsets, read.columns["total"])
            truth = source.columns.dense(read, values, 0, np.float32)
            biases.append(inverse.tokenizer.decode(tokens.numpy()).mean() / truth.mean() - 1)
        return abs(float(np.mean(biases)))

    assert mean_bias(source) < 1e-3 < mean_bias(middle)
    kept = source.facts()["tokenizer_options"]
    assert kept["tokenizer"] == kept["control_tokenizer"] == source.tokenizer.to_dict()


# Which cells come when


def test_the_cells_of_a_group_are_used_equally_often_up_to_one_time(
    corpus: Path, labels: dict[str, np.ndarray]
):
    source = load(corpus)
    times = np.bincount(every_set(source)["cell_index"].reshape(-1), minlength=len(labels["target_gene"]))
    is_perturbed = labels["target_gene"] != TARGETS.index("non-targeting")
    assert (times[~is_perturbed] == 0).all()
    keys = np.stack(list(labels.values()))
    for group in np.unique(keys[:, is_perturbed], axis=1).T:
        mine = times[(keys == group[:, None]).all(axis=0)]
        assert mine.min() >= 1 and mine.max() - mine.min() <= 1
        assert mine.sum() == -(-len(mine) // 8) * 8


def test_no_set_repeats_a_cell_or_a_control_where_there_are_enough(
    corpus: Path, labels: dict[str, np.ndarray]
):
    batch = every_set(load(corpus))
    keys = np.stack(list(labels.values()))
    _, group, counts = np.unique(keys, axis=1, return_inverse=True, return_counts=True)
    sizes = counts[group.reshape(-1)]
    seen = 0
    for key in ("cell_index", "control_index"):
        for rows in batch[key].numpy():
            if sizes[rows[0]] >= 8:
                assert len(np.unique(rows)) == 8
                seen += 1
    assert seen > 100


def test_small_groups_repeat_their_cells_or_are_left_out(tmp_path: Path):
    target = np.array([0] * 3 + [1] * 20 + [4] * 5)
    where = np.zeros(28, np.int64)
    labels = {"target_gene": target, "cell_type": where, "technical_batch": where}
    corpus = write_cells(tmp_path / "few", labels)
    batch = every_set(load(corpus))
    assert np.bincount(batch["cell_index"][0]).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
    source = load(corpus, min_cells=4)
    assert every_set(source)["perturbation_idx"].tolist() == [1, 1, 1]
    assert "training: 1 group of fewer than 4 cells left out (min_cells)" in source.notices
    refused(corpus, "no set is left to train on; .*min_cells", min_cells=21)


def test_every_epoch_draws_afresh_and_the_same_epoch_draws_the_same(corpus: Path):
    source = load(corpus)
    first, again, next_one = (every_set(source, DRAW._replace(epoch=epoch)) for epoch in (0, 0, 1))
    for key in ("cell_index", "control_index", "noise_seed"):
        assert torch.equal(first[key], again[key])
        assert not torch.equal(first[key], next_one[key])
    for change in ({"seed": 8}, {"phase": 1}):
        other = every_set(source, DRAW._replace(**change))
        assert not torch.equal(first["cell_index"], other["cell_index"])
        assert not torch.equal(first["noise_seed"], other["noise_seed"])
    assert len(first["noise_seed"].unique()) == len(source) and (first["noise_seed"] >= 0).all()


def test_a_set_does_not_depend_on_what_else_is_in_its_batch(corpus: Path):
    source = load(corpus)
    together, alone = source.fetch(np.arange(6), DRAW), source.fetch(np.array([4]), DRAW)
    for name, value in alone.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value[0], together[name][4]), name


def test_all_controls_of_a_context_are_drawn_in_time(corpus: Path, labels: dict[str, np.ndarray]):
    source = load(corpus)
    drawn = np.concatenate(
        [every_set(source, DRAW._replace(epoch=epoch))["control_index"].reshape(-1) for epoch in range(8)]
    )
    controls = np.flatnonzero(labels["target_gene"] == TARGETS.index("non-targeting"))
    assert np.array_equal(np.unique(drawn), controls)


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_and_two_ranks_see_the_same_sets(corpus: Path, num_workers: int):
    source = load(corpus)
    whole = [step for epoch in (0, 1) for step in steps_of(source).steps(epoch)]
    halves = []
    for rank in (0, 1):
        loader = steps_of(source, rank, 2, num_workers=num_workers)
        halves.append([step for epoch in (0, 1) for step in loader.steps(epoch)])
        loader.close()
    for step, first, second in zip(whole, *halves, strict=True):
        merged = [micro for pair in zip(first, second, strict=True) for micro in pair]
        assert_equal(
            [micro for micro in step if micro.num_cells], [micro for micro in merged if micro.num_cells]
        )


def test_a_loader_goes_on_in_the_middle_of_an_epoch(corpus: Path):
    whole = list(steps_of(load(corpus)).steps(1))
    resumed = list(steps_of(load(corpus)).steps(1, first_step=2))
    assert len(resumed) == len(whole) - 2 > 0
    for step, expected in zip(resumed, whole[2:], strict=True):
        assert_equal(step, expected)


def test_validation_sets_are_the_same_in_every_epoch(corpus: Path):
    source = load(corpus, held_out_genes=["GENE2"]).validation
    assert source is not None
    first, second = (every_set(source, DRAW._replace(epoch=epoch)) for epoch in (0, 5))
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name]


def test_mixed_sets_span_technical_batches_and_match_each_cell(corpus: Path, labels: dict[str, np.ndarray]):
    source = load(corpus, mix_technical_batches=True)
    batch = every_set(source)
    assert batch["batch_idx"].shape == batch["cell_index"].shape
    cells, controls = batch["cell_index"].numpy(), batch["control_index"].numpy()
    assert np.array_equal(labels["technical_batch"][cells], batch["batch_idx"])
    for name in ("cell_type", "technical_batch"):
        assert np.array_equal(labels[name][controls], labels[name][cells])
    assert max(len(np.unique(row)) for row in batch["batch_idx"]) == len(BATCHES)
    assert all(len(np.unique(row)) == 8 for row in controls)
    assert len(source) < len(load(corpus))


# Controls


def controls_of(pairs: list[tuple[int, int]], **options: Any) -> ControlCells:
    cell_type, batch = np.array(pairs).T
    return ControlCells(
        np.arange(100, 100 + len(pairs)), cell_type, batch, num_cell_types=3, num_batches=3, **options
    )


def drawn_by(controls: ControlCells, cell_type: int, batch: int) -> set[int]:
    pairs = np.full((40, 4), int(controls.pair(np.array(cell_type), np.array(batch))))
    return set(controls.draw(pairs, np.arange(40), DRAW).reshape(-1).tolist())


def test_controls_fall_back_from_both_to_cell_type_to_technical_batch_to_any():
    controls = controls_of([(0, 0), (0, 0), (0, 1), (1, 1)])
    assert drawn_by(controls, 0, 0) == {100, 101}
    assert drawn_by(controls, 0, 2) == {100, 101, 102}  # of the cell type
    assert drawn_by(controls, 2, 1) == {102, 103}  # of the technical batch
    assert drawn_by(controls, 2, 2) == {100, 101, 102, 103}
    assert controls.level.reshape(3, 3)[[0, 0, 2, 2], [0, 2, 1, 2]].tolist() == [0, 1, 2, 3]


def test_a_match_with_too_few_controls_is_passed_over():
    controls = controls_of([(0, 0), (0, 0), (0, 1), (1, 1)], min_controls=3)
    assert drawn_by(controls, 0, 0) == {100, 101, 102}


def test_fallbacks_are_counted_and_can_be_forbidden(tmp_path: Path, labels: dict[str, np.ndarray]):
    # No control of cell type beta in lane-c, and none at all in lane-b.
    is_control = labels["target_gene"] == TARGETS.index("non-targeting")
    moved = labels["technical_batch"].copy()
    moved[is_control & (moved == 1)] = 0
    moved[is_control & (moved == 2) & (labels["cell_type"] == 1)] = 0
    corpus = write_cells(tmp_path / "uneven", {**labels, "technical_batch": moved})
    source = load(corpus)
    fits = ~is_control & ((moved == 0) | ((moved == 2) & (labels["cell_type"] == 0)))
    by_type = int((~is_control & ~fits).sum())
    assert source.notices[-1].endswith(
        f"share with them: technical batch and cell type {int(fits.sum())}, cell type only {by_type}"
    )
    assert len(load(corpus, control_match="cell_type")) == len(source)
    refused(
        corpus,
        "control_match: both is the weakest match that is allowed, and 3 pairs of cell type",
        control_match="both",
    )


def test_a_corpus_without_cell_types_and_technical_batches_matches_controls_anyhow(
    tmp_path: Path, labels: dict[str, np.ndarray]
):
    batch = every_set(load(write_cells(tmp_path / "bare", labels, columns=("target_gene",))))
    assert "batch_idx" not in batch and set(batch["cell_type_idx"].tolist()) == {0}
    assert IndexedSource(load(tmp_path / "bare"), BatchIndexer({"one": 4}, ["one"], "p")).fetch(
        np.arange(2), DRAW
    )["batch_idx"].tolist() == [4, 4]


# Targets


def with_pairs(tmp_path: Path, *names: str) -> Path:
    targets = (*names, "non-targeting")
    target = np.repeat(np.arange(len(targets)), 12)
    where = np.zeros(len(target), np.int64)
    return write_cells(
        tmp_path / "pairs",
        {"target_gene": target, "cell_type": where, "technical_batch": where},
        targets=targets,
    )


def test_pairs_are_refused_skipped_and_counted_or_indexed(tmp_path: Path):
    corpus = with_pairs(tmp_path, "GENE5", "GENE5+GENE9", "GENE7+ctrl")
    refused(corpus, r"1 perturbation of pairs of genes: GENE5\+GENE9; set pairs: index")
    skipped = load(corpus, pairs="skip")
    assert sorted(set(every_set(skipped)["target_gene_idx"].tolist())) == [5, 7]
    assert "1 perturbation of pairs of genes (left out): GENE5+GENE9" in skipped.notices
    batch = every_set(load(corpus, pairs="index"))
    found = dict(zip(batch["perturbation_idx"].tolist(), batch["target_gene_idx"].tolist(), strict=True))
    assert found == {0: [5, -1], 1: [5, 9], 2: [7, -1]}


def test_pairs_and_unknown_targets_are_refused_at_once(tmp_path: Path):
    corpus = with_pairs(tmp_path, "GENE5", "GENE5+GENE9", "ELSEWHERE")
    refused(
        corpus, r"1 perturbation of pairs.*; and 1 perturbation with a target .*: ELSEWHERE; set unknown_"
    )


def test_held_out_targets_that_are_skipped_are_said_to_be_there(tmp_path: Path):
    corpus = with_pairs(tmp_path, "GENE5", "GENE9+ELSEWHERE", "ELSEWHERE")
    skip = {"pairs": "skip", "unknown_targets": "skip"}
    refused(
        corpus,
        r"held_out_genes: no perturbed cell .*; cells of ELSEWHERE are there, but unknown_targets: skip leaves them "
        r"out, since their target is not among the 60 genes of the batches: targets: corpus keeps them; pairs: skip "
        r"leaves out GENE9\+ELSEWHERE: pairs: index keeps them",
        held_out_genes=["ELSEWHERE"],
        **skip,
    )
    indexed = {"pairs": "index", "unknown_targets": "skip"}
    refused(corpus, r"cells of GENE9\+ELSEWHERE are there, but", held_out_genes=["GENE9"], **indexed)


def test_a_perturbation_of_three_genes_is_refused(tmp_path: Path):
    refused(with_pairs(tmp_path, "GENE5+GENE9+GENE3"), "targets 3 genes; one or a pair", pairs="index")


def test_targets_that_are_no_gene_are_refused_skipped_and_counted_or_minus_one(tmp_path: Path):
    corpus = with_pairs(tmp_path, "GENE5", "ELSEWHERE", "GENE5+ELSEWHERE")
    refused(corpus, "2 perturbations with a target that is not among the 60 genes", pairs="index")
    skipped = load(corpus, pairs="index", unknown_targets="skip")
    assert every_set(skipped)["target_gene_idx"].unique(dim=0).tolist() == [[5, -1]]
    assert any(
        notice.startswith("2 perturbations with a target") and "(left out)" in notice
        for notice in skipped.notices
    )
    batch = every_set(load(corpus, pairs="index", unknown_targets="index"))
    found = dict(zip(batch["perturbation_idx"].tolist(), batch["target_gene_idx"].tolist(), strict=True))
    assert found == {0: [5, -1], 1: [-1, -1], 2: [5, -1]}


def test_targets_can_be_counted_among_those_of_the_corpus_or_of_a_file(tmp_path: Path):
    corpus = with_pairs(tmp_path, "GENE5", "ELSEWHERE", "GENE5+ELSEWHERE")
    own = load(corpus, pairs="index", targets="corpus")
    assert own.facts()["target_gene_names"] == ["ELSEWHERE", "GENE5"] and own.facts()["num_targets"] == 2
    assert every_set(own)["target_gene_idx"].tolist()[-1] == [1, 0]
    (tmp_path / "panel.txt").write_text("GENE9\nELSEWHERE\nGENE5\n")
    batch = every_set(load(corpus, pairs="skip", targets=str(tmp_path / "panel.txt")))
    assert sorted(set(batch["target_gene_idx"].tolist())) == [1, 2]


@pytest.mark.parametrize("targets", ["genes", "corpus"])
def test_cells_without_a_label_are_no_perturbation(tmp_path: Path, targets: str):
    source = load(with_pairs(tmp_path, "GENE5", "GENE9", "unlabelled"), targets=targets)
    assert sorted(set(every_set(source)["perturbation_idx"].tolist())) == [0, 1]
    assert "unlabelled" not in source.facts()["target_gene_names"]
    assert "cells without a label in target_gene are left out" in source.notices


def test_the_control_label_must_be_one_of_the_corpus(
    corpus: Path, tmp_path: Path, labels: dict[str, np.ndarray]
):
    refused(
        corpus,
        "no class of target_gene 'non-targetting'; close to it: non-targeting",
        control_label="non-targetting",
    )
    other = write_cells(tmp_path / "unnamed", labels, control_label=None)
    refused(other, "names no control label; set control_label")
    assert len(load(other, control_label="non-targeting")) == len(load(corpus))


def test_a_corpus_without_targets_is_refused(tmp_path: Path, labels: dict[str, np.ndarray]):
    refused(
        write_cells(tmp_path / "bare", labels, columns=("cell_type",)),
        "no class column 'target_gene'|no column",
    )


# What is held out


def cells_of(source: PerturbationSource | None) -> np.ndarray:
    return np.empty(0, np.int64) if source is None else np.unique(every_set(source)["cell_index"])


def assert_held_out(source: PerturbationSource, labels: dict[str, np.ndarray], held_out: np.ndarray) -> None:
    """Check that exactly these cells validate and all other perturbed ones train."""
    is_perturbed = labels["target_gene"] != TARGETS.index("non-targeting")
    assert np.array_equal(cells_of(source.validation), np.flatnonzero(held_out & is_perturbed))
    assert np.array_equal(cells_of(source), np.flatnonzero(~held_out & is_perturbed))


def test_held_out_genes_validate_everywhere(corpus: Path, labels: dict[str, np.ndarray], tmp_path: Path):
    held_out = np.isin(labels["target_gene"], [1, 3])
    assert_held_out(load(corpus, held_out_genes=["GENE2", "GENE4"]), labels, held_out)
    (tmp_path / "genes.csv").write_text("target_gene,n_cells\nGENE2,5\nGENE4,9\n")
    assert_held_out(load(corpus, held_out_genes=str(tmp_path / "genes.csv")), labels, held_out)


def test_held_out_contexts_are_cell_types_or_tables(corpus: Path, labels: dict[str, np.ndarray]):
    assert_held_out(load(corpus, held_out_contexts=["beta"]), labels, labels["cell_type"] == 1)
    contexts = [{"cell_type": "alpha", "technical_batch": "lane-b"}, {"technical_batch": "lane-c"}]
    held_out = (labels["cell_type"] == 0) & (labels["technical_batch"] == 1) | (
        labels["technical_batch"] == 2
    )
    assert_held_out(load(corpus, held_out_contexts=contexts), labels, held_out)


@pytest.mark.parametrize("is_mixed", [False, True])
def test_held_out_combinations_leave_gene_and_context_in_training(
    corpus: Path, labels: dict[str, np.ndarray], is_mixed: bool
):
    combinations = [
        {"target_gene": ["GENE1", "GENE3"], "cell_type": "beta"},
        {"target_gene": "GENE2", "technical_batch": ["lane-a", "lane-c"]},
    ]
    held_out = np.isin(labels["target_gene"], [0, 2]) & (labels["cell_type"] == 1)
    held_out |= (labels["target_gene"] == 1) & (labels["technical_batch"] != 1)
    source = load(corpus, held_out_combinations=combinations, mix_technical_batches=is_mixed)
    assert_held_out(source, labels, held_out)


def test_a_held_out_gene_takes_its_pairs_along(tmp_path: Path):
    corpus = with_pairs(tmp_path, "GENE5", "GENE5+GENE9", "GENE9")
    source = load(corpus, pairs="index", held_out_genes=["GENE9"])
    assert set(every_set(source)["perturbation_idx"].tolist()) == {0}
    assert source.validation is not None
    assert set(every_set(source.validation)["perturbation_idx"].tolist()) == {1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out_genes": ["GENE22"]}, "held_out_genes.*: no target gene 'GENE22'; close to it: GENE2"),
        ({"held_out_genes": ["non-targeting"]}, "is the control label, not a target"),
        ({"held_out_genes": "missing.txt"}, "missing.txt cannot be read"),
        ({"held_out_contexts": ["gamma"]}, "held_out_contexts.0.cell_type: no cell type 'gamma'"),
        ({"held_out_contexts": [{"batch": "lane-a"}]}, "keys target_gene, cell_type, technical_batch"),
        ({"held_out_contexts": [{"target_gene": "GENE1"}]}, "a context has no target_gene"),
        ({"held_out_contexts": "beta"}, "held_out_contexts: got 'beta'; it must be a list"),
        ({"held_out_contexts": ["alpha", "beta"]}, "no set is left to train on"),
        ({"split_dataset": "x"}, "names a data set of split_file"),
        ({"set_size": 0}, "set_size: got 0"),
        ({"min_controls": 0}, "min_controls: got 0"),
        ({"pooling": "mean"}, r"pooling is 'mean'; it must be none \| control \| both"),
        ({"control_match": "batch"}, "control_match is 'batch'; it must be both"),
        ({"pairs": "keep"}, "pairs is 'keep'; it must be error"),
        ({"pair_separator": ""}, "pair_separator is ''; it must be what stands between"),
        ({"tokenizer": {"strategy": "counts"}, "pooling": "control"}, "the mean of counts is no count"),
        ({"control_tokenizer": {**LOG_BINS, "target_sum": 5e4}}, "must be those of tokenizer"),
    ],
)
def test_mistakes_are_named(corpus: Path, options: dict, message: str):
    refused(corpus, message, **options)


# Split files


SPLIT = """
[datasets]
first = "/data/first/lane*.h5ad"
second = "/data/{cells,others}.h5ad"

[training]
second = "train"

[zeroshot]
"second.beta" = "test"
"first.gamma" = "val"

[fewshot."second.alpha"]
val = ["GENE1", "ABSENT"]
test = ["GENE1", "GENE2"]
"""


def test_a_split_file_of_cell_load_is_read_as_cell_load_reads_it(
    tmp_path: Path, labels: dict[str, np.ndarray]
):
    corpus = write_cells(tmp_path / "corpus", labels, source_name="others.h5ad")
    (tmp_path / "split.toml").write_text(SPLIT)
    source = load(corpus, split_file=str(tmp_path / "split.toml"))
    is_alpha, target = labels["cell_type"] == 0, labels["target_gene"]
    assert np.array_equal(cells_of(source), np.flatnonzero(is_alpha & np.isin(target, [2, 3])))
    assert np.array_equal(cells_of(source.validation), np.flatnonzero(is_alpha & (target == 0)))
    assert any("1 perturbation not in the corpus: ABSENT" in notice for notice in source.notices)
    tested = load(corpus, split_file=str(tmp_path / "split.toml"), split_part="test")
    assert np.array_equal(cells_of(tested), cells_of(source))
    is_tested = (~is_alpha & (target < 4)) | (is_alpha & np.isin(target, [0, 1]))
    assert np.array_equal(cells_of(tested.validation), np.flatnonzero(is_tested))


def test_the_data_set_of_a_split_file_is_named_where_file_names_do_not_tell(corpus: Path, tmp_path: Path):
    split = tmp_path / "split.toml"
    split.write_text(SPLIT.replace("{cells,others}", "others"))
    refused(
        corpus,
        "names 0 data sets with the file .cells.h5ad.*set split_dataset to the one",
        split_file=str(split),
    )
    source = load(corpus, split_file=str(split), split_dataset="second")
    assert source.validation is not None
    refused(corpus, "no data set of .* 'third'", split_file=str(split), split_dataset="third")


def test_cells_that_a_split_file_does_not_name_take_no_part(
    corpus: Path, tmp_path: Path, labels: dict[str, np.ndarray]
):
    split = tmp_path / "split.toml"
    split.write_text(
        '[datasets]\nd = "x"\n[zeroshot]\n"d.beta" = "train"\n[fewshot."d.beta"]\nval = ["GENE1"]\n'
    )
    refused(corpus, "nothing of this corpus is in test", split_file=str(split), split_part="test")
    split.write_text('[datasets]\nd = "x"\n[fewshot."d.beta"]\nval = ["GENE1"]\n')
    source = load(corpus, split_file=str(split))
    is_beta = labels["cell_type"] == 1
    assert np.array_equal(
        cells_of(source), np.flatnonzero(is_beta & np.isin(labels["target_gene"], [1, 2, 3]))
    )
    assert any("of cells in neither part" in notice for notice in source.notices)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[datasets", "not a TOML file"),
        ("[training]\nd = 'train'", r"no \[datasets\]"),
        ("[datasets]\nd = 'x'\n[other]\na = 1", "unknown section other"),
        ("[datasets]\nd = 'x'\n[training]\ne = 'train'", "no data set 'e'"),
        ("[datasets]\nd = 'x'\n[training]\nd = 'test'", "got 'test'; it must be \"train\""),
        ("[datasets]\nd = 'x'\n[zeroshot]\nd = 'test'", "the key must be"),
        ("[datasets]\nd = 'x'\n[zeroshot]\n'd.beta' = 'eval'", "got 'eval'"),
        ("[datasets]\nd = 'x'\n[zeroshot]\n'd.gamma' = 'val'", "no cell type 'gamma'"),
        ("[datasets]\nd = 'x'\n[fewshot.'d.beta']\nheld = ['GENE1']", "must be a table of the lists"),
        ("[datasets]\nd = 'x'\n[fewshot.'d.beta']\nval = [['GENE1']]", "must be a table of the lists"),
        ("zeroshot = 'val'\n[datasets]\nd = 'x'", r"zeroshot is 'val'; it must be a section, \[zeroshot\]"),
        ("[datasets]\nd = ['x']", r"\[datasets\] \"d\": got \['x'\]; it must be a path"),
    ],
)
def test_a_wrong_split_file_is_refused(corpus: Path, tmp_path: Path, text: str, message: str):
    (tmp_path / "split.toml").write_text(text)
    refused(corpus, message, split_file=str(tmp_path / "split.toml"))


def test_a_split_file_does_not_go_with_lists(corpus: Path, tmp_path: Path):
    (tmp_path / "split.toml").write_text(SPLIT)
    refused(corpus, "leave held_out", split_file=str(tmp_path / "split.toml"), held_out_genes=["GENE1"])


# Technical batches


class Wrapper:
    """Stand in for a user's own wrapper, which offers nothing but what it wraps."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset


@pytest.mark.parametrize("wrap", [lambda source: Subset(source, [0, 1]), Wrapper, lambda source: source])
def test_technical_batches_are_found_and_mapped_behind_wrappers(corpus: Path, wrap: Any):
    source = load(corpus)
    before = source.fetch(np.arange(6), DRAW)["batch_idx"]
    assert technical_batches.discover_names(wrap(source)) == sorted(BATCHES)
    mapping = {"lane-c": 5, "lane-a": 9, "other": 0, "lane-b": 2}
    technical_batches.attach_mapping(mapping, wrap(source))
    expected = torch.tensor([9, 2, 5])[before]
    assert torch.equal(source.fetch(np.arange(6), DRAW)["batch_idx"], expected)


def test_a_validation_set_with_a_technical_batch_that_the_run_does_not_know_is_an_error(corpus: Path):
    source = load(corpus, held_out_contexts=[{"technical_batch": "lane-c"}])
    with pytest.raises(
        DataError, match="the run's map lacks the technical batch lane-c; it has: lane-a, lane-b"
    ):
        technical_batches.attach_mapping({"lane-a": 0, "lane-b": 1}, source.validation)
    unknown = IndexedSource(source.validation, BatchIndexer({"lane-a": 0, "lane-b": 1}, ["lane-a"], "p"))
    with pytest.raises(DataError, match="'batch_idx' holds 2 to 2, but the run has technical batches 0 to 1"):
        unknown.fetch(np.arange(2), DRAW)


# Identity, travel and sizes


def test_the_fingerprint_tells_apart_what_gives_other_batches(corpus: Path):
    changes: list[dict[str, Any]] = [
        {}, {"set_size": 9}, {"tokenizer": {**LOG_BINS, "n_bins": 8}}, {"held_out_genes": ["GENE1"]},
        {"held_out_genes": ["GENE2"]}, {"pooling": "control"}, {"mix_technical_batches": True}, {"min_controls": 3},
        {"targets": "corpus"},
    ]  # fmt: skip
    prints = [load(corpus, **change).fingerprint() for change in changes]
    assert len(set(prints)) == len(prints) and prints[0] == load(corpus).fingerprint()


def test_facts_hold_the_sizes_of_a_model(corpus: Path):
    facts = load(corpus).facts()
    assert (facts["vocab_size"], facts["num_genes"], facts["num_targets"]) == (16, NUM_GENES, NUM_GENES)
    assert every_set(load(corpus))["tokens"].max() < facts["vocab_size"]


def test_permutations_are_bijections_and_even():
    for size in (1, 2, 3, 7, 50):
        states = np.repeat(stateless_hash(1, index=np.arange(20)), size)
        places = permuted(states, np.full(len(states), size), np.tile(np.arange(size), 20)).reshape(20, size)
        assert (np.sort(places, axis=1) == np.arange(size)).all()
    states = np.repeat(stateless_hash(2, index=np.arange(12_000)), 4).reshape(-1, 4)
    places = permuted(states, np.full(states.shape, 4), np.broadcast_to(np.arange(4), states.shape))
    _, counts = np.unique(places, axis=0, return_counts=True)
    assert len(counts) == 24
    assert (
        np.square(counts - 500).sum() / 500 < 50
    )  # chi-square, 23 degrees of freedom: 1 in 1,000 is above 49.7


@pytest.mark.skipif(
    not (SHARED_DATA / "perturbench_devel_counts_csr.h5ad").exists(), reason="the file is not here"
)
def test_a_real_perturbation_file_loads_with_its_pairs_and_contexts(tmp_path: Path, capsys: Any):
    from trainer.convert_h5ad import main

    file = str(SHARED_DATA / "perturbench_devel_counts_csr.h5ad")
    assert main([file, "--output", str(tmp_path / "corpus")]) == 0
    options: dict[str, Any] = {"set_size": 32, "targets": "corpus", "pairs": "index"}
    source = load(
        tmp_path / "corpus",
        **options,
        held_out_genes=["KLF1"],
        held_out_contexts=["A172"],
        control_match="both",
    )
    assert source.validation is not None
    cells = [np.unique(every_set(each)["cell_index"]) for each in (source, source.validation)]
    assert not np.intersect1d(*cells).size and sum(map(len, cells)) == 5959 - 400
    assert [len(each.fetch(np.arange(2), DRAW)["tokens"]) for each in (source, source.validation)] == [2, 2]
    names = source.facts()["target_gene_names"]
    batch = every_set(source)
    trained = {names[index] for index in batch["target_gene_idx"].unique().tolist() if index >= 0}
    assert "KLF1" not in trained and {"KLF1"} < set(names)
    refused(tmp_path / "corpus", "32 perturbations with a target that is not among the 500", pairs="index")


def test_the_documented_arguments_are_those_of_the_loader():
    page = (ROOT / "docs" / "perturbation.md").read_text()
    section = page.partition("## All arguments")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \|", section, re.MULTILINE)
    parameters = inspect.signature(perturbation_loader).parameters
    assert [name for name, _ in rows] == list(parameters)
    for name, default in rows:
        value = parameters[name].default
        words = {inspect.Parameter.empty: "required", None: "`null`", (): "none"}
        expected = words.get(value) or f"`{str(value).lower() if isinstance(value, bool) else value}`"
        assert default == expected, name
