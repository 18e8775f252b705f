import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from data.errors import DataError
from data.loader import CellSource, DrawKey, MicroBatch, StepLoader, cell_loader
from data.order import GlobalOrder
from data.tokenizer_options import complete_options
from data.worker_process import start_fork_server
from tests.corpora import Cells, file_server, make_cells, write_corpus

NUM_GENES = 80
NUM_CELLS = 250
OPTIONS: dict[str, Any] = {
    "tokenizer": {"strategy": "binned_expression", "max_genes": 24, "n_bins": 11},
    "masking": {"mask_ratio": 0.3, "target": "both"},
    "shuffle_block": 8,
    "shuffle_window": 64,
}


@pytest.fixture(scope="module")
def cells() -> Cells:
    return make_cells(NUM_CELLS, NUM_GENES, 22)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, cells: Cells) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("corpora")
    return {kind: write_corpus(root / kind, cells, NUM_GENES, kind, 90) for kind in ("arrow", "parquet")}


@pytest.fixture(scope="module")
def source(folders: dict[str, Path]) -> CellSource:
    return cell_loader(folders["arrow"], **OPTIONS)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    left = {thread for thread in set(threading.enumerate()) - before if "fsspecIO" not in thread.name}
    left = {thread for thread in left if "process_request_thread" not in thread.name}  # the test's own server
    for thread in left:
        if thread.name == "QueueFeederThread":  # torch lets them end by themselves
            thread.join(5)
    assert not [thread for thread in left if thread.is_alive()]


def make_loader(source: Any, rank: int = 0, world_size: int = 1, seed: int = 5, **options: Any) -> StepLoader:
    order = GlobalOrder(
        len(source),
        seed=seed,
        phase=1,
        block=getattr(source, "shuffle_block", 8),
        window=getattr(source, "shuffle_window", 64),
        selected=getattr(source, "row_mask", None),
    )
    sizes = {"global_batch_size": 24, "micro_batch_size": 4, **options}
    return StepLoader(source, order, draw_seed=seed, phase=1, rank=rank, world_size=world_size, **sizes)


def assert_same(first: list[list[MicroBatch]], second: list[list[MicroBatch]]) -> None:
    assert len(first) == len(second)
    for step, other_step in zip(first, second, strict=True):
        assert len(step) == len(other_step)
        for one, other in zip(step, other_step, strict=True):
            assert one.num_cells == other.num_cells and np.array_equal(one.rows, other.rows)
            assert one.batch.keys() == other.batch.keys()
            for name, value in one.batch.items():
                if isinstance(value, torch.Tensor):
                    assert value.dtype == other.batch[name].dtype
                    # Compared as bytes, so that NaN equals NaN.
                    assert value.numpy().tobytes() == other.batch[name].numpy().tobytes(), name
                else:
                    assert value == other.batch[name]


def seen_cells(step: list[MicroBatch]) -> list[int]:
    return [cell for micro in step if micro.num_cells for cell in micro.batch["cell_index"].tolist()]


def by_global_batch(source: Any, world_size: int, epoch: int = 0, **options: Any) -> list[list[int]]:
    """Collect each step's cells from all ranks, in the order that the global batch has them."""
    ranks = [
        list(make_loader(source, rank, world_size, **options).steps(epoch)) for rank in range(world_size)
    ]
    assert len({len(steps) for steps in ranks}) == 1
    batches = []
    for steps in zip(*ranks, strict=True):
        assert len({len(step) for step in steps}) == 1
        micro_batches = [step[index] for index in range(len(steps[0])) for step in steps]
        batches.append(seen_cells(micro_batches))
    return batches


@pytest.mark.parametrize("global_batch_size", [24, 48])
def test_every_cell_comes_once_an_epoch_whatever_the_world_size(source: CellSource, global_batch_size: int):
    for epoch in (0, 1):
        expected = by_global_batch(source, 1, epoch, global_batch_size=global_batch_size)
        assert sorted(cell for batch in expected for cell in batch) == list(range(NUM_CELLS))
        assert [len(batch) for batch in expected[:-1]] == [global_batch_size] * (len(expected) - 1)
        for world_size in (2, 3):
            assert by_global_batch(source, world_size, epoch, global_batch_size=global_batch_size) == expected


def test_micro_batches_go_round_the_ranks(source: CellSource):
    whole = next(make_loader(source).steps(0))
    second_of_three = next(make_loader(source, rank=1, world_size=3).steps(0))
    assert [micro.rows.tolist() for micro in second_of_three] == [whole[i].rows.tolist() for i in (1, 4)]


def test_a_rank_without_cells_gets_dummies(source: CellSource):
    first, second = (list(make_loader(source, rank, 2).steps(0))[-1] for rank in (0, 1))
    assert [micro.num_cells for micro in first] == [4, 2]  # 250 = 10 x 24 + 10; no rank has more
    assert [micro.num_cells for micro in second] == [4, 0]
    dummy = second[1]
    assert dummy.rows.tolist() == first[0].rows.tolist() == dummy.batch["cell_index"].tolist()


def test_one_process_gets_no_dummies(source: CellSource):
    assert [micro.num_cells for micro in list(make_loader(source).steps(0))[-1]] == [4, 4, 2]


@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (0, 10), (2, 5)])
def test_a_pass_resumed_anywhere_gives_the_same_remainder(source: CellSource, epoch: int, step: int):
    whole = list(make_loader(source).steps(epoch))
    assert len(whole) == 11
    assert_same(list(make_loader(source).steps(epoch, step)), whole[step:])
    assert_same(list(make_loader(source).steps(epoch, step, step + 2)), whole[step : step + 2])


def test_a_resume_on_another_number_of_ranks_misses_and_repeats_nothing(source: CellSource):
    before = by_global_batch(source, 2)[:4]
    after = [
        [cell for steps in zip(*(make_loader(source, rank, 3).steps(0, 4) for rank in range(3)), strict=True)
         for step in steps for cell in seen_cells(step)]
    ]  # fmt: skip
    assert sorted(cell for batch in before + after for cell in batch) == list(range(NUM_CELLS))


@pytest.mark.parametrize("prefetch", [0, 1, 7])
def test_reading_ahead_changes_nothing(source: CellSource, prefetch: int):
    expected = list(make_loader(source, prefetch=0).steps(0))
    assert_same(list(make_loader(source, prefetch=prefetch).steps(0)), expected)


@pytest.mark.slow
def test_worker_processes_change_nothing(source: CellSource):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    loader = make_loader(source, rank=1, world_size=2, num_workers=2)
    try:
        for epoch, first in [(0, 0), (1, 3)]:
            expected = list(make_loader(source, rank=1, world_size=2).steps(epoch, first))
            assert_same(list(loader.steps(epoch, first)), expected)
        steps = loader.steps(0)
        assert_same([next(steps)], list(make_loader(source, rank=1, world_size=2).steps(0, 0, 1)))
        steps.close()
        assert_same(list(loader.steps(2, 9)), list(make_loader(source, rank=1, world_size=2).steps(2, 9)))
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        loader.close()


def test_worker_processes_begin_with_torch_imported():
    start_fork_server()
    code = "import sys; sys.exit(0 if 'torch' in sys.modules else 7)"
    process = multiprocessing.get_context("forkserver").Process(target=exec, args=(code,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_errors_in_a_worker_process_surface_with_the_rows():
    loader = make_loader(FailingSource(), num_workers=1)
    with pytest.raises(KeyError) as caught:
        list(loader.steps(0))
    loader.close()
    assert "while loading rows" in caught.value.__notes__[0]
    assert "in a worker process" in caught.value.__notes__[1]


def test_data_that_cannot_travel_to_workers_is_refused():
    loader = make_loader(FailingSource(), num_workers=1)
    loader.source.lock = threading.Lock()
    with pytest.raises(DataError, match="num_workers: the data cannot be sent to worker processes"):
        list(loader.steps(0))
    loader.close()


def all_fields(steps: list[list[MicroBatch]]) -> dict[int, dict[str, Any]]:
    """Collect what was made of each cell, without padding."""
    found = {}
    for step in steps:
        for micro in step[:]:
            for index in range(micro.num_cells):
                real = micro.batch["attention_mask"][index]
                names = ("tokens", "values", "bins", "labels", "value_labels")
                found[int(micro.rows[index])] = {
                    name: micro.batch[name][index][real].tolist() for name in names
                }
    return found


def test_masks_do_not_depend_on_ranks_or_on_the_batch(source: CellSource):
    expected = all_fields(list(make_loader(source).steps(1)))
    for world_size in (2, 3):
        steps = [
            step for rank in range(world_size) for step in make_loader(source, rank, world_size).steps(1)
        ]
        assert all_fields(steps) == expected
    other = make_loader(source, global_batch_size=35, micro_batch_size=7)
    assert all_fields(list(other.steps(1))) == expected


def test_masks_change_with_seed_and_epoch(source: CellSource):
    def labels(seed: int, epoch: int) -> dict[int, Any]:
        fields = all_fields(list(make_loader(source, seed=seed).steps(epoch)))
        return {row: each["value_labels"] for row, each in fields.items()}

    assert labels(5, 0) == labels(5, 0)
    assert labels(5, 0) != labels(5, 1)
    assert labels(5, 0) != labels(6, 0)


def test_every_storage_gives_the_same_batches(source: CellSource, folders: dict[str, Path]):
    expected = list(make_loader(source, rank=1, world_size=2).steps(0, 2))
    remote = fsspec.filesystem("memory")
    for file in folders["parquet"].iterdir():
        remote.pipe(f"/loader/{file.name}", file.read_bytes())
    with file_server(folders["parquet"]) as url:
        for path in [folders["parquet"], f"file://{folders['parquet']}", "memory://loader", url]:
            other = cell_loader(path, **OPTIONS)
            assert_same(list(make_loader(other, rank=1, world_size=2).steps(0, 2)), expected)
    remote.rm("/loader", recursive=True)


def test_a_batch_holds_what_the_corpus_holds(source: CellSource, cells: Cells):
    rows = np.array([3, 240, 100])
    batch = source.fetch_unmasked(rows, DrawKey(0, 0, 0))
    assert batch["cell_index"].tolist() == rows.tolist()
    assert batch["batch_idx"].tolist() == cells.columns["technical_batch"][rows].tolist()
    assert batch["target_gene_idx"].tolist() == cells.columns["target_gene"][rows].tolist()
    for index, row in enumerate(rows):
        genes, counts = cells.row(row)
        if len(genes) < 24:
            real = batch["attention_mask"][index]
            assert batch["tokens"][index][real].tolist() == [3, *(genes + 4).tolist()]
            expected = np.log1p(counts / counts.sum() * 1e4)
            np.testing.assert_allclose(batch["values"][index][real][1:], expected, rtol=1e-5)
        np.testing.assert_allclose(batch["depth"][index], np.log1p(counts.sum()), rtol=1e-6)
    assert "labels" not in batch and batch["num_tokens"] == int(batch["attention_mask"].sum())


def test_padding_to_the_longest_length_is_an_option(folders: dict[str, Path]):
    tokenizer = {**OPTIONS["tokenizer"], "padding": "max_genes", "max_genes": 70}
    source = cell_loader(folders["arrow"], tokenizer=tokenizer)
    assert source.fetch(np.arange(3), DrawKey(0, 0, 0))["tokens"].shape == (3, 70)


def test_facts_are_what_a_model_needs(source: CellSource):
    facts = source.facts()
    assert len(facts.pop("gene_space")) == NUM_GENES
    assert facts == {
        "vocab_size": NUM_GENES + 4,
        "n_bins": 11,
        "max_length": 24,
        "value_kind": "counts",
        "technical_batch_names": ["lane-a", "lane-b", "lane-c"],
        "target_gene_names": ["non-targeting", "GENE1"],
        "tokenizer_options": complete_options(source.tokenizer),
        "label_names": None,
        "n_classes": None,
    }


def test_the_run_decides_the_index_of_technical_batches(folders: dict[str, Path], cells: Cells):
    source = cell_loader(folders["arrow"], **OPTIONS)
    source.set_batch_mapping({"other": 0, "lane-c": 1, "lane-a": 5, "lane-b": 2})
    batch = source.fetch(np.arange(50), DrawKey(0, 0, 0))
    expected = np.array([5, 2, 1])[cells.columns["technical_batch"][:50]]
    assert batch["batch_idx"].tolist() == expected.tolist()
    with pytest.raises(DataError, match="lacks the technical batch lane-b, lane-c; it has: lane-a"):
        source.set_batch_mapping({"lane-a": 0})


def test_a_corpus_without_technical_batches_names_none(cells: Cells, tmp_path: Path):
    folder = write_corpus(tmp_path / "corpus", cells, NUM_GENES, columns=("age",))
    source = cell_loader(folder, **OPTIONS)
    source.set_batch_mapping({"phase": 0})
    assert source.unique_batches == []
    batch = source.fetch(np.arange(4), DrawKey(0, 0, 0))
    assert "batch_idx" not in batch and "target_gene_idx" not in batch


def test_training_and_validation_cells_are_disjoint_and_all(folders: dict[str, Path]):
    source = cell_loader(folders["arrow"], **OPTIONS, val_fraction=0.2)
    assert source.validation is not None
    training = [cell for step in make_loader(source).steps(0) for cell in seen_cells(step)]
    held_out = [
        cell for step in make_loader(source.validation).evaluation_steps() for cell in seen_cells(step)
    ]
    assert len(held_out) == 50
    assert sorted(training + held_out) == list(range(NUM_CELLS))
    assert cell_loader(folders["arrow"], **OPTIONS).validation is None


def test_a_limited_number_of_cells_is_split_exactly(folders: dict[str, Path]):
    source = cell_loader(folders["arrow"], **OPTIONS, val_fraction=0.1, limit_cells=60)
    assert source.row_mask is not None and source.validation is not None
    assert source.row_mask.sum() == 54 and source.validation.row_mask.sum() == 6
    assert not (source.row_mask & source.validation.row_mask).any()
    assert source.row_mask[:60].sum() < 40  # a random choice, not the first cells


def test_validation_masks_never_change(folders: dict[str, Path]):
    validation = cell_loader(folders["arrow"], **OPTIONS, val_fraction=0.2).validation
    first, second = (validation.fetch(np.arange(9), DrawKey(1, 0, epoch)) for epoch in (0, 7))
    assert torch.equal(first["tokens"], second["tokens"])
    assert first["masked_index"].numel() > 0
    loader = make_loader(validation)
    assert_same(list(loader.evaluation_steps()), list(loader.evaluation_steps()))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_cell_once_in_equal_steps(folders: dict[str, Path], world_size: int):
    validation = cell_loader(folders["arrow"], **OPTIONS, val_fraction=0.2).validation
    ranks = [list(make_loader(validation, rank, world_size).evaluation_steps()) for rank in range(world_size)]
    assert {len(steps) for steps in ranks} == {-(-50 // (4 * world_size))}
    assert all(len(step) == 1 for steps in ranks for step in steps)
    cells = [cell for steps in ranks for step in steps for cell in seen_cells(step)]
    assert sorted(cells) == np.flatnonzero(validation.row_mask).tolist()
    assert len(list(make_loader(validation, 0, world_size).evaluation_steps(max_steps=2))) == 2


def test_unmasked_batches_are_the_first_cells_of_the_order(source: CellSource):
    loader = make_loader(source)
    batches = list(loader.unmasked(10, DrawKey(5, 1, 0)))
    cells = [cell for batch in batches for cell in batch["cell_index"].tolist()]
    assert cells == [cell for step in loader.steps(0, 0, 1) for cell in seen_cells(step)][:10]
    assert all("labels" not in batch and (batch["tokens"] != 2).all() for batch in batches)
    assert list(make_loader(FailingSource()).unmasked(10, DrawKey(5, 1, 0))) == []


def test_an_incomplete_last_batch_can_be_left_out(source: CellSource):
    loader = make_loader(source, drop_last=True)
    assert loader.steps_per_epoch == len(list(loader.steps(0))) == 10
    assert loader.num_cells == 240
    with pytest.raises(DataError, match="250 cells do not fill one global batch of 252"):
        make_loader(source, drop_last=True, global_batch_size=252)


def test_closing_the_iterator_ends_its_thread(source: CellSource):
    before = set(threading.enumerate())
    steps = make_loader(source, prefetch=1).steps(0)
    next(steps)
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"cells-ahead"}
    steps.close()
    assert set(threading.enumerate()) == before


class FailingSource:
    """Fails at row 77."""

    def __len__(self) -> int:
        return 100

    def fetch(self, rows: np.ndarray, draw: DrawKey) -> dict[str, Any]:
        if 77 in rows:
            raise KeyError("no such thing")
        return {"tokens": torch.zeros(len(rows), 2), "cell_index": torch.from_numpy(rows)}


@pytest.mark.parametrize("prefetch", [0, 3])
def test_errors_surface_where_they_are_due_with_the_rows(prefetch: int):
    loader = make_loader(FailingSource(), prefetch=prefetch)
    seen = 0
    with pytest.raises(KeyError) as caught:
        for step in loader.steps(0):
            seen += len(seen_cells(step))
    position = loader.order.rows(0, 0, 100).tolist().index(77)
    assert seen == position // 24 * 24
    assert "77" in caught.value.__notes__[0] and "while loading rows" in caught.value.__notes__[0]


def test_only_the_consumers_thread_fetches_from_an_inline_source():
    class Inline(FailingSource):
        is_inline = True

        def fetch(self, rows: np.ndarray, draw: DrawKey) -> dict[str, Any]:
            assert threading.current_thread() is threading.main_thread()
            return {"cell_index": torch.from_numpy(rows)}

    assert len(list(make_loader(Inline()).steps(0))) == 5


def test_a_source_is_told_of_all_rows_before_they_are_fetched():
    class Listening(FailingSource):
        def __init__(self) -> None:
            self.expected: set[int] = set()
            self.times_told = 0

        def expect(self, rows: np.ndarray) -> None:
            self.expected = self.expected | set(rows.tolist()) if len(rows) else set()
            self.times_told += 1

        def fetch(self, rows: np.ndarray, draw: DrawKey) -> dict[str, Any]:
            assert set(rows.tolist()) <= self.expected
            return {"cell_index": torch.from_numpy(rows)}

    for options in [{}, {"rank": 1, "world_size": 2}, {"rank": 2, "world_size": 3, "prefetch": 0}]:
        source = Listening()
        loader = make_loader(source, **options)
        assert (
            sum(micro.num_cells for step in loader.steps(0, 1, 3) for micro in step)
            == 48 // loader.world_size
        )
        assert source.times_told <= 4 and not source.expected


def test_the_random_state_of_the_run_is_not_touched(source: CellSource):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(make_loader(source).steps(0, 0, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_fingerprints_tell_data_and_options_apart(folders: dict[str, Path], source: CellSource):
    assert cell_loader(folders["arrow"], **OPTIONS).fingerprint() == source.fingerprint()
    changes: list[dict[str, Any]] = [{"masking": None}, {"limit_cells": 9}, {"val_fraction": 0.1},
                                     {"shuffle_window": 128}]  # fmt: skip
    others = [cell_loader(folders["arrow"], **{**OPTIONS, **change}) for change in changes]
    loaders = [make_loader(each) for each in [source, *others]]
    loaders.append(make_loader(source, drop_last=True))
    assert len({loader.fingerprint() for loader in loaders}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 25}, r"global batch 25 is not a multiple of micro-batch 4 x 1 ranks = 4"),
        ({"micro_batch_size": 0}, "sizes must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
    ],
)
def test_impossible_sizes_are_refused(source: CellSource, options: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        make_loader(source, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to pin memory for")
def test_pinned_memory_without_a_gpu_is_refused(source: CellSource):
    with pytest.raises(DataError, match="pin_memory"):
        make_loader(source, pin_memory=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_are_pinned(source: CellSource):
    step = next(make_loader(source, pin_memory=True).steps(0))
    assert all(value.is_pinned() for value in step[0].batch.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("limit", [0, -1, 2.5, True])
def test_a_senseless_limit_is_refused(folders: dict[str, Path], limit: Any):
    with pytest.raises(DataError, match="limit_cells"):
        cell_loader(folders["arrow"], **OPTIONS, limit_cells=limit)


def test_an_inefficient_reading_of_parquet_is_named(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
):
    cell_loader(folders["parquet"], **OPTIONS)
    assert "decoded whole for 8 cells each; shuffle_block: 1024" in caplog.text
    caplog.clear()
    cell_loader(folders["arrow"], **OPTIONS)
    assert not caplog.records


def test_no_file_stays_open(source: CellSource):
    list(make_loader(source).steps(0, 0, 2))
    descriptors = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    assert not [path for path in descriptors if os.path.islink(path) and os.readlink(path).endswith(".arrow")]
