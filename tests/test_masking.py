import numpy as np
import pytest
import torch

from data.collate import collate
from data.errors import DataError
from data.hashing import DrawKey
from data.masking import MaskedCells, Masking, build_masking
from data.ragged import offsets_of, pad
from data.tokenizers import MASK, TokenizedCells

DRAW = DrawKey(seed=1, phase=0, epoch=0)
NUM_GENES = 400
N_BINS = 11


def random_tokens(num_cells: int, seed: int = 0, mean: int = 100, binned: bool = True) -> TokenizedCells:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 2 * mean, num_cells)
    genes = np.concatenate([np.sort(rng.choice(NUM_GENES, size, replace=False)) for size in lengths])
    values = rng.uniform(0.1, 9, len(genes)).astype(np.float32)
    bins = rng.integers(1, N_BINS, len(genes)) if binned else None
    return TokenizedCells(offsets_of(lengths), genes.astype(np.int32), values, bins)


def mask(
    masking: Masking, cells: TokenizedCells, rows: np.ndarray | None = None, draw: DrawKey = DRAW
) -> MaskedCells:
    rows = np.arange(len(cells.offsets) - 1) if rows is None else rows
    return masking.apply(cells, rows, draw, NUM_GENES, N_BINS)


def subset(cells: TokenizedCells, chosen: list[int]) -> TokenizedCells:
    places = np.concatenate([np.arange(cells.offsets[i], cells.offsets[i + 1]) for i in chosen])
    lengths = np.diff(cells.offsets)[chosen]
    return TokenizedCells(offsets_of(lengths), cells.genes[places], cells.values[places], cells.bins[places])


def test_the_shares_of_masked_shown_and_random_genes_are_exact_in_each_cell_and_on_the_average():
    cells = random_tokens(400)
    masked = mask(build_masking({"mask_ratio": 0.5, "random_replace_ratio": 0.25, "keep_ratio": 0.1}), cells)
    shown = masked.tokens[masked.chosen]
    row = np.searchsorted(cells.offsets, masked.chosen, "right") - 1
    num_masked, num_chosen = np.bincount(row[shown == MASK], minlength=400), np.bincount(row, minlength=400)
    assert np.abs(num_masked - 0.65 * num_chosen).max() <= 1
    assert num_masked.sum() == pytest.approx(0.65 * num_chosen.sum(), abs=4 * np.sqrt(400 / 4))


@pytest.mark.parametrize("ratio", [0.01, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("target", ["gene", "expression", "both"])
def test_every_cell_has_its_share_masked_and_at_least_one(ratio: float, target: str):
    cells = random_tokens(50)
    masked = mask(build_masking({"mask_ratio": ratio, "target": target}), cells)
    per_cell = np.bincount(np.searchsorted(cells.offsets, masked.chosen, "right") - 1, minlength=50)
    expected = np.maximum(np.rint(np.diff(cells.offsets) * ratio), 1)
    assert np.array_equal(per_cell, expected)


def test_a_cell_without_genes_has_nothing_masked():
    cells = TokenizedCells(np.array([0, 0, 2]), np.array([3, 5], np.int32), np.ones(2, np.float32), None)
    masked = mask(build_masking({}), cells)
    assert len(masked.chosen) == 1


def test_masked_genes_are_hidden_replaced_or_kept_in_the_given_shares():
    cells = random_tokens(300)
    masked = mask(build_masking({"mask_ratio": 0.5}), cells)
    truth = cells.genes[masked.chosen] + 4
    shown = masked.tokens[masked.chosen]
    assert np.array_equal(masked.labels, truth)
    shares = [(shown == 2).mean(), (shown == truth).mean(), ((shown != 2) & (shown != truth)).mean()]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.015)
    replaced = shown[(shown != 2) & (shown != truth)]
    assert replaced.min() >= 4 and replaced.max() < NUM_GENES + 4
    assert len(np.unique(replaced)) > 0.9 * NUM_GENES


def test_shares_are_options():
    cells = random_tokens(20)
    only_random = mask(build_masking({"random_replace_ratio": 1.0, "keep_ratio": 0}), cells)
    assert only_random.tokens[only_random.chosen].min() >= 4
    only_kept = mask(build_masking({"random_replace_ratio": 0, "keep_ratio": 1}), cells)
    assert np.array_equal(only_kept.tokens, cells.genes + 4)


def test_what_was_not_chosen_stays_and_the_input_is_untouched():
    cells = random_tokens(20)
    before = [array.copy() for array in cells]
    masked = mask(build_masking({"target": "both"}), cells)
    assert all(np.array_equal(one, other) for one, other in zip(before, cells, strict=True))
    others = np.setdiff1d(np.arange(len(cells.genes)), masked.chosen)
    assert np.array_equal(masked.tokens[others], cells.genes[others] + 4)
    assert np.array_equal(masked.values[others], cells.values[others])
    assert np.array_equal(masked.bins[others], cells.bins[others])


@pytest.mark.parametrize("target", ["gene", "expression", "both"])
def test_expression_is_hidden_at_every_chosen_position(target: str):
    cells = random_tokens(50)
    masked = mask(build_masking({"target": target}), cells)
    assert (masked.values[masked.chosen] == 0).all()
    assert (masked.bins[masked.chosen] == N_BINS).all()
    assert np.array_equal(masked.value_labels, cells.bins[masked.chosen])


def test_expression_targets_leave_the_gene_visible():
    cells = random_tokens(50)
    masked = mask(build_masking({"target": "expression"}), cells)
    assert np.array_equal(masked.tokens, cells.genes + 4)
    assert (masked.labels == -100).all()


def test_both_targets_share_the_positions_half_and_half():
    cells = random_tokens(300)
    masked = mask(build_masking({"target": "both", "keep_ratio": 0, "random_replace_ratio": 0}), cells)
    is_gene = masked.labels != -100
    assert 0.46 < is_gene.mean() < 0.54
    assert np.array_equal(masked.tokens[masked.chosen] == 2, is_gene)
    assert np.array_equal(masked.labels[is_gene], cells.genes[masked.chosen][is_gene] + 4)


def test_continuous_values_are_their_own_labels():
    cells = random_tokens(20, binned=False)
    masked = mask(build_masking({}), cells)
    assert masked.bins is None and masked.value_labels.dtype == np.float32
    assert np.array_equal(masked.value_labels, cells.values[masked.chosen])


def test_a_mask_does_not_depend_on_the_other_cells_of_the_batch():
    cells, masking = random_tokens(30), build_masking({"target": "both"})
    rows = np.arange(30) * 7 + 3
    whole = mask(masking, cells, rows)
    for chosen in [[4], [29, 3, 11], list(range(29, -1, -1))]:
        part = subset(cells, chosen)
        masked = mask(masking, part, rows[chosen])
        for index, cell in enumerate(chosen):
            here = slice(part.offsets[index], part.offsets[index + 1])
            there = slice(cells.offsets[cell], cells.offsets[cell + 1])
            assert np.array_equal(masked.tokens[here], whole.tokens[there])
            assert np.array_equal(masked.bins[here], whole.bins[there])


def test_a_mask_does_not_depend_on_the_order_of_a_cells_genes():
    cells, masking = random_tokens(1), build_masking({})
    order = np.random.default_rng(0).permutation(len(cells.genes))
    turned = TokenizedCells(cells.offsets, cells.genes[order], cells.values[order], cells.bins[order])
    assert np.array_equal(mask(masking, turned).tokens, mask(masking, cells).tokens[order])


@pytest.mark.parametrize("changed", [{"seed": 2}, {"phase": 1}, {"epoch": 1}, {"epoch": -1}])
def test_seed_phase_and_epoch_each_change_the_mask(changed: dict):
    cells, masking = random_tokens(20), build_masking({})
    first = mask(masking, cells)
    assert np.array_equal(first.chosen, mask(masking, cells).chosen)
    assert not np.array_equal(first.chosen, mask(masking, cells, draw=DRAW._replace(**changed)).chosen)


def test_every_gene_is_masked_about_equally_often():
    genes = np.tile(np.arange(100, dtype=np.int32), 2000)
    cells = TokenizedCells(np.arange(2001) * 100, genes, np.ones(len(genes), np.float32), None)
    masked = mask(build_masking({"mask_ratio": 0.15}), cells)
    times = np.bincount(masked.chosen % 100, minlength=100)  # 300 expected, standard deviation 16
    assert times.min() > 235 and times.max() < 365


@pytest.mark.parametrize("prepend_cls", [True, False])
@pytest.mark.parametrize("width", [None, 250])
def test_labels_lie_where_the_mask_is_whatever_the_padding(prepend_cls: bool, width: int | None):
    cells = random_tokens(12)
    masked = mask(build_masking({"target": "both", "mask_ratio": 0.3}), cells)
    batch = collate(cells, masked, prepend_cls=prepend_cls, width=width)
    longest = int(np.diff(cells.offsets).max()) + prepend_cls
    assert batch["tokens"].shape == (12, longest if width is None else width)
    index = batch["masked_index"]
    assert torch.equal(index, index.sort().values)
    has_label = (batch["value_labels"] != -100).flatten().nonzero().flatten()
    assert torch.equal(index, has_label)
    is_gene = batch["labels"].flatten()[index] != -100
    assert is_gene.sum() == (batch["labels"] != -100).sum() > 0
    assert (batch["values"].flatten()[index] == 0).all()
    assert (batch["bins"].flatten()[index] == N_BINS).all()
    assert batch["attention_mask"].flatten()[index].all()
    if prepend_cls:
        assert (batch["tokens"][:, 0] == 3).all() and (batch["labels"][:, 0] == -100).all()
    truth = collate(cells, None, prepend_cls=prepend_cls, width=width)
    assert torch.equal(batch["labels"].flatten()[index[is_gene]], truth["tokens"].flatten()[index[is_gene]])
    assert torch.equal(batch["value_labels"].flatten()[index], truth["bins"].flatten()[index])


@pytest.mark.parametrize("mean", [5, 120])
def test_padding_is_marked_and_counted(mean: int):
    cells = random_tokens(9, mean=mean)
    batch = collate(cells, None, prepend_cls=True)
    lengths = np.diff(cells.offsets) + 1
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths.tolist()
    assert batch["num_tokens"] == lengths.sum()
    padding = ~batch["attention_mask"]
    assert (batch["tokens"][padding] == 0).all() and (batch["tokens"][~padding] >= 3).all()
    assert (batch["values"][padding] == 0).all() and (batch["bins"][padding] == 0).all()
    assert (
        batch["tokens"][batch["attention_mask"] & (batch["tokens"] > 3)].tolist()
        == (cells.genes + 4).tolist()
    )
    assert batch["values"][batch["bins"] > 0].tolist() == cells.values.tolist()
    kinds = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert kinds == {"tokens": torch.int64, "values": torch.float32, "attention_mask": torch.bool,
                     "bins": torch.int64}  # fmt: skip


def test_continuous_labels_are_nan_elsewhere():
    cells = random_tokens(5, binned=False)
    batch = collate(cells, mask(build_masking({}), cells), prepend_cls=True)
    assert "bins" not in batch
    has_label = (~batch["value_labels"].isnan()).flatten().nonzero().flatten()
    assert torch.equal(has_label, batch["masked_index"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0}, "masking.mask_ratio: got 0; it must be a number above 0, at most 1"),
        ({"mask_ratio": 1.5}, "mask_ratio: got 1.5"),
        ({"mask_ratio": "half"}, "mask_ratio: got 'half'"),
        ({"random_replace_ratio": 0.6, "keep_ratio": 0.6}, "add up to more than 1"),
        ({"target": "genes"}, r"target: got 'genes'; it must be gene \| expression \| both"),
        ({"target": "expression", "keep_ratio": 0.2}, "keep_ratio: has no effect with target: expression"),
        ({"ratio": 0.1}, "ratio: not an option here; there are: mask_ratio"),
    ],
)
def test_wrong_masking_options_are_refused(options: dict, message: str):
    with pytest.raises(DataError, match=message):
        build_masking(options)


@pytest.mark.parametrize("size", [6, 200])
def test_rows_longer_than_the_width_are_cut(size: int):
    offsets = offsets_of(np.array([size, 2, 0, size - 1]))
    values = np.arange(offsets[-1])
    laid_out = pad(values, offsets[:-1], np.diff(offsets), 5, -1, first=9)
    assert laid_out[:, 0].tolist() == [9] * 4
    assert (
        laid_out[0, 1:].tolist() == [0, 1, 2, 3]
        and laid_out[3, 1:].tolist() == values[offsets[3] :][:4].tolist()
    )
    assert laid_out[1, 1:].tolist() == [size, size + 1, -1, -1] and laid_out[2, 1:].tolist() == [-1] * 4
