from typing import Any

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.scoring.expression_baselines import (
    DepthConditionalBaseline,
    MarginalBaseline,
    collect_masked,
    collect_training,
    mean_cross_entropy,
)

VOCAB, N_BINS, NUM_GENES = 10, 3, 6


def make_batch(num_cells: int, *, seed: int = 0, slope: float = 0.0, masked: int = 0) -> dict[str, Any]:
    """Draw cells whose genes are expressed the more often the deeper the cell is, as `slope` says."""
    rng = np.random.default_rng(seed)
    depth = rng.normal(size=num_cells)
    base = np.linspace(-2, 2, NUM_GENES)
    chance = 1 / (1 + np.exp(-(base + slope * depth[:, None])))
    bins = (rng.random((num_cells, NUM_GENES)) < chance) * rng.integers(1, N_BINS, (num_cells, NUM_GENES))
    genes = np.tile(np.arange(4, VOCAB), (num_cells, 1))
    batch = {
        "tokens": np.concatenate([np.full((num_cells, 1), 3), genes], axis=1),
        "bins": np.concatenate([np.zeros((num_cells, 1), int), bins], axis=1),
        "attention_mask": np.ones((num_cells, NUM_GENES + 1), bool),
        "depth": depth.astype(np.float32),
    }
    if masked:
        hidden = np.zeros_like(batch["attention_mask"])
        hidden[:, 1 : 1 + masked] = True
        batch["labels"] = np.full_like(batch["tokens"], -100)
        batch["value_labels"] = np.where(hidden, batch["bins"], -100)
        batch["bins"] = np.where(hidden, N_BINS, batch["bins"])
    return batch


def test_probabilities_of_a_gene_add_up_to_one():
    cells = collect_training([make_batch(200, slope=1.0)])
    marginal = MarginalBaseline.fit(cells, VOCAB, N_BINS)
    conditional = DepthConditionalBaseline.fit(cells, VOCAB, N_BINS)
    np.testing.assert_allclose(marginal.probabilities.sum(axis=-1), 1)
    np.testing.assert_allclose(conditional.probabilities.sum(axis=-1), 1)


def test_marginal_is_the_smoothed_frequency_of_each_bin():
    batch = make_batch(300)
    fitted = MarginalBaseline.fit(collect_training([batch]), VOCAB, N_BINS)
    counts = np.bincount(batch["bins"][:, 1], minlength=N_BINS)
    every = np.bincount(batch["bins"][:, 1:].ravel(), minlength=N_BINS) + 1
    expected = (counts + fitted.pseudo_count * every / every.sum()) / (300 + fitted.pseudo_count)
    np.testing.assert_allclose(fitted.probabilities[4], expected)


def test_a_gene_that_was_never_seen_gets_the_distribution_over_all_genes():
    fitted = MarginalBaseline.fit(collect_training([make_batch(50)]), VOCAB + 1, N_BINS)
    assert np.isfinite(np.log(fitted.probabilities)).all()
    np.testing.assert_allclose(fitted.probabilities[VOCAB], fitted.probabilities[0])


def test_depth_helps_where_expression_depends_on_it():
    cells = collect_training([make_batch(2000, slope=2.0)])
    asked = [make_batch(500, slope=2.0, masked=3, seed=1)]
    marginal = mean_cross_entropy(MarginalBaseline.fit(cells, VOCAB, N_BINS), asked)
    conditional = mean_cross_entropy(DepthConditionalBaseline.fit(cells, VOCAB, N_BINS), asked)
    assert conditional < 0.9 * marginal


def test_depth_does_no_harm_where_expression_does_not_depend_on_it():
    cells = collect_training([make_batch(2000)])
    asked = [make_batch(500, masked=3, seed=1)]
    marginal = mean_cross_entropy(MarginalBaseline.fit(cells, VOCAB, N_BINS), asked)
    conditional = mean_cross_entropy(DepthConditionalBaseline.fit(cells, VOCAB, N_BINS), asked)
    assert conditional == pytest.approx(marginal, rel=0.01)


def test_the_measure_of_depth_that_tells_more_is_chosen():
    batch = make_batch(2000, slope=2.0)
    assert DepthConditionalBaseline.fit(collect_training([batch]), VOCAB, N_BINS).measure == "total"
    misleading = batch | {"depth": np.random.default_rng(9).normal(size=2000).astype(np.float32)}
    assert DepthConditionalBaseline.fit(collect_training([misleading]), VOCAB, N_BINS).measure == "expressed"


def test_score_is_the_mean_over_masked_positions_alone():
    fitted = MarginalBaseline.fit(collect_training([make_batch(100)]), VOCAB, N_BINS)
    batch = make_batch(20, masked=2, seed=1)
    answers = batch["value_labels"][:, 1:3]
    expected = -np.log(fitted.probabilities[np.array([[4, 5]]), answers]).mean()
    assert mean_cross_entropy(fitted, [batch]) == pytest.approx(expected)


def test_several_batches_score_like_one():
    fitted = DepthConditionalBaseline.fit(collect_training([make_batch(100, slope=1.0)]), VOCAB, N_BINS)
    batch = make_batch(30, masked=2, slope=1.0, seed=1)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 11), slice(11, 30))]
    assert mean_cross_entropy(fitted, parts) == pytest.approx(mean_cross_entropy(fitted, [batch]))


def test_hidden_expression_is_no_part_of_the_measured_depth():
    batch = make_batch(20, masked=3, seed=1)
    changed = batch | {"value_labels": np.where(batch["value_labels"] == -100, -100, 0)}
    before, after = (collect_masked([each]).depths["expressed"] for each in (batch, changed))
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(before, np.repeat((batch["bins"][:, 4:] > 0).mean(axis=1), 3))


def test_a_training_genes_own_expression_is_no_part_of_its_measured_depth():
    batch = make_batch(20)
    changed = batch | {"bins": batch["bins"].copy()}
    changed["bins"][:, 1] = 1 - (changed["bins"][:, 1] > 0)
    first_gene = slice(None, None, NUM_GENES)
    before, after = (collect_training([each]).depths["expressed"][first_gene] for each in (batch, changed))
    np.testing.assert_array_equal(before, after)
    np.testing.assert_allclose(before, (batch["bins"][:, 2:] > 0).mean(axis=1))


def test_a_masked_gene_is_asked_by_its_label():
    batch = make_batch(5, masked=1, seed=1)
    hidden = batch["value_labels"] != -100
    masked = batch | {
        "labels": np.where(hidden, batch["tokens"], -100),
        "tokens": np.where(hidden, 2, batch["tokens"]),
    }
    for mine, theirs in zip(collect_masked([masked])[:3], collect_masked([batch])[:3], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_padding_and_special_tokens_are_not_counted():
    batch = make_batch(10)
    padded = {key: value.copy() for key, value in batch.items()}
    padded["attention_mask"][0, -1] = False
    cells = collect_training([padded])
    assert len(cells.tokens) == 10 * NUM_GENES - 1
    assert cells.tokens.min() >= 4


def test_no_batches_and_a_single_cell_are_refused():
    with pytest.raises(UserError, match="no batches"):
        collect_training([])
    with pytest.raises(UserError, match="at least 2 training cells, not 1"):
        MarginalBaseline.fit(collect_training([make_batch(1)]), VOCAB, N_BINS)


def test_batches_without_bins_say_which_tokenizer_is_needed():
    batch = make_batch(3)
    del batch["bins"]
    with pytest.raises(UserError, match="binned_expression"):
        collect_training([batch])
