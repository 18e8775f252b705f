import numpy as np
import pytest

from data.errors import DataError
from data.loader import DrawKey, StepLoader
from data.weighted_order import WeightedOrder

CLASSES = np.repeat([0, 1, 2], [900, 90, 10]).astype(np.int32)


def shares(order: WeightedOrder, epoch: int) -> np.ndarray:
    rows = order.rows(epoch, 0, order.num_rows)
    return np.bincount(CLASSES[rows], minlength=3) / len(rows)


def many(order_of, epoch: int, seeds: int = 20) -> np.ndarray:
    return np.mean([shares(order_of(seed), epoch) for seed in range(seeds)], axis=0)


def test_without_warmup_every_class_is_drawn_equally_often():
    assert many(lambda seed: WeightedOrder(CLASSES, seed, 0), 0) == pytest.approx([1 / 3] * 3, abs=0.01)


@pytest.mark.parametrize("epoch, share", [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)])
def test_warmup_goes_from_uniform_to_balanced(epoch, share):
    expected = (1 - share) * np.array([0.9, 0.09, 0.01]) + share / 3
    drawn = many(lambda seed: WeightedOrder(CLASSES, seed, 0, warmup_epochs=4), epoch)
    assert drawn == pytest.approx(expected, abs=0.01)


def test_all_cells_of_a_class_are_equally_likely():
    order = WeightedOrder(CLASSES, 3, 0)
    rows = np.concatenate([order.rows(epoch, 0, order.num_rows) for epoch in range(60)])
    rare = np.bincount(rows[CLASSES[rows] == 2] - 990, minlength=10)
    expected = rare.sum() / 10  # about 2000 draws of each; 5 standard deviations
    assert np.abs(rare - expected).max() < 5 * expected**0.5
    assert len(np.unique(rows)) == len(CLASSES)


def test_a_draw_depends_on_seed_phase_epoch_and_position_alone():
    order = WeightedOrder(CLASSES, 3, 1, warmup_epochs=2)
    whole = order.rows(1, 0, 1000)
    pieces = [order.rows(1, start, start + 7) for start in range(0, 1000, 7)]
    assert np.array_equal(whole, np.concatenate(pieces))
    assert np.array_equal(whole, WeightedOrder(CLASSES, 3, 1, warmup_epochs=2).rows(1, 0, 1000))
    for other in (
        order.rows(2, 0, 1000),
        WeightedOrder(CLASSES, 4, 1, warmup_epochs=2).rows(1, 0, 1000),
        WeightedOrder(CLASSES, 3, 2, warmup_epochs=2).rows(1, 0, 1000),
    ):
        assert not np.array_equal(whole, other)


def test_only_selected_rows_are_drawn():
    selected = np.arange(1000) % 2 == 0
    order = WeightedOrder(CLASSES, 3, 0, selected=selected)
    assert order.num_rows == 500
    assert selected[order.rows(0, 0, 500)].all()


def test_windows_are_pieces_of_the_epoch():
    order = WeightedOrder(CLASSES, 3, 0, window=64)
    windows = [order.window_rows(5, window) for window in range(order.num_windows)]
    assert np.array_equal(np.concatenate(windows), order.rows(5, 0, 1000))
    assert order.window_start(5, order.num_windows) == 1000
    assert [order.window_at(5, position) for position in (0, 63, 64, 999)] == [0, 0, 1, 15]


def test_an_empty_part_is_refused():
    with pytest.raises(DataError, match="no cell takes part"):
        WeightedOrder(CLASSES, 0, 0, selected=np.zeros(1000, bool))


class Rows:
    """Rows that say which ones they were, and remember what was announced."""

    is_inline = True

    def __init__(self):
        self.announced: list[int] = []

    def __len__(self) -> int:
        return len(CLASSES)

    def fetch(self, rows: np.ndarray, draw: DrawKey) -> dict:
        return {"rows": rows}

    def expect(self, rows: np.ndarray) -> None:
        self.announced.extend(rows.tolist())


def test_two_ranks_draw_what_one_rank_draws_and_announce_it_before():
    def drawn(rank: int, world_size: int) -> list[np.ndarray]:
        source = Rows()
        loader = StepLoader(
            source, WeightedOrder(CLASSES, 5, 0, window=64), draw_seed=5, phase=0, global_batch_size=48,
            micro_batch_size=4, rank=rank, world_size=world_size,
        )  # fmt: skip
        rows = [micro.rows for step in loader.steps(2) for micro in step if micro.num_cells]
        assert set(source.announced) == set(np.concatenate(rows).tolist())
        return rows

    alone = np.sort(np.concatenate(drawn(0, 1)))
    assert np.array_equal(alone, np.sort(np.concatenate([*drawn(0, 2), *drawn(1, 2)])))
    assert len(alone) == 1000
