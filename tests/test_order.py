import pickle

import numpy as np
import pytest

from data.errors import DataError
from data.hashing import (
    Stream,
    combine_keys,
    gene_hash,
    splitmix64,
    stateless_hash,
    to_range,
    uniform,
)
from data.order import GlobalOrder, choose_rows, split_rows


def whole_epoch(order: GlobalOrder, epoch: int) -> np.ndarray:
    return order.rows(epoch, 0, order.num_rows)


def test_splitmix64_gives_the_published_sequence():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix64(1234567, np.arange(4)).tolist() == published


def test_hashes_are_stable_for_ever():
    assert combine_keys(1, 2, 3) == 15020427595393229491
    hashes = stateless_hash(7, 0, -1, index=np.array([0, 1, 10**12]))
    assert hashes.tolist() == [3585223821014267886, 10992894468599655751, 10588011098445138289]
    cells = np.array([5, 2**63], np.uint64)
    hashes = gene_hash(cells, np.array([2, 1]), np.array([0, 7, 7]))
    assert hashes.tolist() == [3423425485, 1784783872, 1485089424]
    order = whole_epoch(GlobalOrder(20, 1, 0, block=4, window=8), 0)
    assert order.tolist() == [8, 13, 9, 10, 14, 15, 12, 11, 7, 19, 17, 6, 16, 5, 18, 4, 0, 2, 3, 1]


def test_a_hash_does_not_depend_on_what_else_is_hashed():
    index = np.arange(100_000)
    assert np.array_equal(stateless_hash(3, index=index)[70_001:], stateless_hash(3, index=index[70_001:]))
    cells = stateless_hash(4, index=np.arange(2))
    both = gene_hash(cells, np.array([30_000, 30_000]), np.tile(np.arange(30_000), 2))
    assert np.array_equal(both[30_000:], gene_hash(cells[1:], np.array([30_000]), np.arange(30_000)))


def test_key_order_and_sign_matter():
    assert len({combine_keys(*keys) for keys in [(1, 2), (2, 1), (-1, 2), (1, 2, 0), (1,), ()]}) == 6


def test_uniform_draws_are_uniform():
    draws = uniform(5, index=np.arange(100_000))
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-squared, 99 degrees of freedom: p = 1e-4


def test_gene_hashes_are_uniform_and_cells_independent():
    cells = stateless_hash(6, index=np.arange(200))
    hashes = gene_hash(cells, np.full(200, 1000), np.tile(np.arange(1000), 200)).reshape(200, 1000)
    draws = hashes / 2**32
    counts = np.histogram(draws, bins=100, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 160
    correlations = np.corrcoef(draws)[np.triu_indices(200, 1)]
    assert abs(correlations).max() < 0.16 and abs(correlations.std() * 1000**0.5 - 1) < 0.05


def test_integers_drawn_cover_the_whole_range():
    drawn = to_range(stateless_hash(8, index=np.arange(10_000)), 7)
    assert np.bincount(drawn, minlength=7).min() > 1200 and drawn.max() == 6


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 1000, 1024, 1337])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_comes_once_an_epoch(num_rows: int, shuffle: bool):
    order = GlobalOrder(num_rows, seed=1, phase=0, shuffle=shuffle, block=16, window=64)
    for epoch in (0, 1, -1):
        assert np.array_equal(np.sort(whole_epoch(order, epoch)), np.arange(num_rows))


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.9])
@pytest.mark.parametrize("block", [1, 16])
def test_every_selected_row_comes_once_an_epoch(fraction: float, block: int):
    selected = uniform(2, index=np.arange(5000)) < fraction
    order = GlobalOrder(5000, seed=1, phase=0, block=block, window=64, selected=selected)
    assert order.num_rows == selected.sum()
    for epoch in range(3):
        assert np.array_equal(np.sort(whole_epoch(order, epoch)), np.flatnonzero(selected))


def test_selecting_all_rows_is_the_same_as_selecting_nothing():
    every = GlobalOrder(500, 1, 0, block=8, window=64, selected=np.ones(500, bool))
    assert np.array_equal(whole_epoch(every, 3), whole_epoch(GlobalOrder(500, 1, 0, block=8, window=64), 3))


def test_any_range_can_be_read_alone():
    reference = whole_epoch(GlobalOrder(1337, 9, 2, block=16, window=64), 5)
    order = GlobalOrder(1337, 9, 2, block=16, window=64)
    for start in range(1300, -1, -37):
        assert np.array_equal(order.rows(5, start, start + 100), reference[start : start + 100])
    assert len(order.rows(5, 1337, 1400)) == 0


def test_windows_tile_the_epoch_wherever_the_short_block_falls():
    for seed in range(30):
        order = GlobalOrder(16 * 9 + 5, seed, 0, block=16, window=32)
        starts = [order.window_start(0, window) for window in range(order.num_windows + 1)]
        sizes = [len(order.window_rows(0, window)) for window in range(order.num_windows)]
        assert np.array_equal(np.diff(starts), sizes) and starts[-1] == order.num_rows
        for position in range(order.num_rows):
            window = order.window_at(0, position)
            assert starts[window] <= position < starts[window + 1]


def test_seed_phase_and_epoch_each_change_the_order():
    orders = [
        tuple(GlobalOrder(256, seed, phase, block=16, window=64).rows(epoch, 0, 256).tolist())
        for seed, phase, epoch in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, -1)]
    ]
    assert len(set(orders)) == 5


def test_natural_order_is_the_same_in_every_epoch():
    order = GlobalOrder(300, 4, 0, shuffle=False, block=16, window=64)
    assert np.array_equal(whole_epoch(order, 0), np.arange(300))
    assert np.array_equal(whole_epoch(order, 7), np.arange(300))


def test_a_batch_mixes_rows_from_everywhere():
    order = GlobalOrder(200_000, 0, 0)
    files = order.rows(0, 20_000, 20_128) // 50_000
    assert np.bincount(files, minlength=4).min() > 10
    assert len(set((order.rows(0, 20_000, 20_128) // 64).tolist())) > 60


def test_rows_of_a_window_come_from_whole_blocks():
    order = GlobalOrder(10_000, 3, 0, block=16, window=64)
    blocks, sizes = np.unique(order.window_rows(1, 3) // 16, return_counts=True)
    assert len(blocks) == 4 and (sizes == 16).all()


def test_an_order_survives_pickling():
    order = GlobalOrder(500, 1, 0, block=8, window=64)
    expected = whole_epoch(order, 2)
    assert np.array_equal(whole_epoch(pickle.loads(pickle.dumps(order)), 2), expected)


def test_returned_rows_may_be_changed_without_harm():
    order = GlobalOrder(500, 1, 0, block=8, window=64)
    order.rows(0, 0, 10)[:] = -1
    assert order.rows(0, 0, 10).min() >= 0


def test_a_hundred_million_rows_are_addressed_in_modest_memory():
    order = GlobalOrder(100_000_000, 0, 0)
    rows = order.rows(0, 99_999_000, 100_000_000)
    assert len(np.unique(rows)) == 1000 and rows.max() < 100_000_000
    assert order._permutation is not None and order._permutation[1].nbytes < 13_000_000


@pytest.mark.parametrize(("block", "window"), [(0, 64), (64, 32), (64, 100)])
def test_a_window_that_does_not_hold_whole_blocks_is_refused(block: int, window: int):
    with pytest.raises(DataError, match="shuffle_window"):
        GlobalOrder(100, 0, 0, block=block, window=window)


def test_an_empty_selection_is_refused():
    with pytest.raises(DataError, match="no cell takes part"):
        GlobalOrder(10, 0, 0, selected=np.zeros(10, bool))
    with pytest.raises(DataError, match=r"bool \[10\]"):
        GlobalOrder(10, 0, 0, selected=np.ones(9, bool))


@pytest.mark.parametrize(
    ("num_rows", "fraction", "expected"),
    [(1000, 0.05, 50), (10, 0.01, 1), (1, 0.5, 0), (2, 0.99, 1), (1000, 0.0, 0), (3_000_000, 0.1, 300_000)],
)
def test_a_split_has_the_exact_size(num_rows: int, fraction: float, expected: int):
    training, validation = split_rows(num_rows, fraction, seed=3)
    assert validation.sum() == expected
    assert np.array_equal(training, ~validation)


def test_splits_depend_on_the_seed_alone():
    assert np.array_equal(split_rows(500, 0.2, 1)[1], split_rows(500, 0.2, 1)[1])
    assert not np.array_equal(split_rows(500, 0.2, 1)[1], split_rows(500, 0.2, 2)[1])


def test_chosen_rows_are_those_with_the_smallest_hash():
    hashes = stateless_hash(1, Stream.SUBSET, index=np.arange(5000))
    expected = np.zeros(5000, bool)
    expected[np.argsort(hashes)[:123]] = True
    assert np.array_equal(choose_rows(5000, 123, 1, Stream.SUBSET), expected)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_an_impossible_fraction_is_refused(fraction: float):
    with pytest.raises(DataError, match="val_fraction"):
        split_rows(10, fraction, 0)
