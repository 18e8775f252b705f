import json

import numpy as np
import pytest

from data.errors import DataError
from data.value_tokenizers import (
    STRATEGIES,
    ValueTokenizer,
    build_value_tokenizer,
    count_bins,
    delta_bins,
    log_bins,
)


def expression(size: int = 40_000, seed: int = 0) -> np.ndarray:
    """Return log-normalised values as cells have them: counts of a few, at many library sizes."""
    rng = np.random.default_rng(seed)
    counts = rng.geometric(0.4, size)
    return np.log1p(counts * 1e4 / rng.lognormal(8.5, 0.4, size)).astype(np.float32)


def build(options: dict, value_kind: str = "counts") -> ValueTokenizer:
    return build_value_tokenizer(options, value_kind=value_kind)[0]


def test_a_log_bin_holds_what_lies_above_the_edge_below_it_and_up_to_its_own():
    tokenizer = log_bins(31, 0.1, 9.2)
    assert tokenizer.num_tokens == tokenizer.mask_id == 31
    assert tokenizer.encode(np.zeros(2)).tolist() == [0, 0]
    tokens = np.arange(31)
    assert np.array_equal(tokenizer.encode(tokenizer.edges), tokens)
    above = np.nextafter(tokenizer.edges[:-1], np.float32(np.inf))
    assert np.array_equal(tokenizer.encode(above), tokens[1:])


@pytest.mark.parametrize(
    "tokenizer", [log_bins(31, 0.1, 9.2), delta_bins(31, 1e-3, 9.2), count_bins(40, 5000)]
)
def test_every_token_decodes_to_a_value_of_its_own_bin(tokenizer: ValueTokenizer):
    tokens = np.arange(tokenizer.num_tokens)
    decoded = tokenizer.decode(tokens)
    # The middle of two neighbouring counts may lie between them.
    decoded = np.rint(decoded) if tokenizer.strategy == "counts" else decoded
    assert np.array_equal(tokenizer.encode(decoded), tokens)


def test_the_middle_of_a_bin_is_the_mean_of_its_edges_and_not_of_the_next_bins():
    tokenizer = log_bins(31, 0.1, 9.2)
    edges = tokenizer.edges
    assert tokenizer.decode(np.arange(1, 31)) == pytest.approx((edges[:-1] + edges[1:]) / 2)
    assert tokenizer.decode(tokenizer.encode(np.array([0.05]))) == pytest.approx([0.05])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_round_trip_is_unbiased(strategy: str):
    rng = np.random.default_rng(1)
    train, fresh = expression(seed=0), expression(seed=1)
    options = {"strategy": strategy}
    if strategy == "delta_bins":
        train, fresh = train - rng.permutation(train), fresh - rng.permutation(fresh)
    if strategy == "counts":
        train, fresh = (np.rint(np.expm1(each)) for each in (train, fresh))
        options["max_value"] = 2000
    tokenizer = build(options)
    scale = np.abs(fresh).mean()

    def bias(inverse: ValueTokenizer, values: np.ndarray) -> float:
        return abs(float((inverse.decode(inverse.encode(values)).astype(float) - values).mean())) / scale

    fitted = tokenizer.fitted([train[:1000], train[1000:]])
    assert bias(fitted, train) < 1e-5  # by construction
    assert bias(fitted, fresh) < 2e-3  # cells that it was not fitted on
    assert bias(tokenizer, fresh) < 0.02  # the middles of the bins
    # Shifted by one bin, as it is easily got wrong, the bias of log bins is above 10 percent.
    shifted = np.append(tokenizer.centres[1:], tokenizer.edges[-1])[tokenizer.encode(fresh)]
    if strategy == "log_bins":
        assert abs(float((shifted - fresh).mean())) / scale > 0.1


def test_the_fitted_inverse_has_the_least_squared_error_of_all():
    values = expression()
    tokenizer = log_bins(16, 0.1, 9.2)
    fitted = tokenizer.fitted([values])
    errors = [np.square(each.decode(each.encode(values)) - values).mean() for each in (fitted, tokenizer)]
    assert errors[0] < errors[1]


def test_a_bin_that_no_value_fell_into_keeps_its_middle():
    tokenizer = log_bins(31, 0.1, 9.2)
    fitted = tokenizer.fitted([np.full(5, 0.5, np.float32)])
    token = int(tokenizer.encode(np.array([0.5]))[0])
    assert fitted.centres[token] == pytest.approx(0.5)
    others = np.arange(31) != token
    assert np.array_equal(fitted.centres[others], tokenizer.centres[others])


def test_differences_are_treated_alike_on_both_sides_of_zero():
    tokenizer = delta_bins(31, 1e-3, 9.2)
    values = np.linspace(-9, 9, 200).astype(np.float32)
    tokens = tokenizer.encode(values)
    assert np.array_equal(tokenizer.encode(-values), 30 - tokens)
    assert np.array_equal(tokenizer.decode(tokenizer.encode(-values)), -tokenizer.decode(tokens))
    assert (np.diff(tokens) >= 0).all()
    small = np.array([0.0, 1e-3, -1e-3, 1e-9])
    assert tokenizer.encode(small).tolist() == [15] * 4 and tokenizer.zero_token == 15
    assert tokenizer.decode(np.array([15])).tolist() == [0.0]


def test_small_counts_have_a_token_each_and_the_largest_fits():
    tokenizer = count_bins(64, 10_000)
    assert np.array_equal(tokenizer.encode(np.arange(10)), np.arange(10))
    assert np.array_equal(tokenizer.decode(np.arange(10)), np.arange(10))
    assert tokenizer.encode(np.array([10_000, 1])).tolist() == [63, 1]
    assert np.array_equal(count_bins(11, 10).decode(np.arange(11)), np.arange(11))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_beyond_the_last_bin_join_it_or_are_refused(strategy: str):
    options = {"strategy": strategy, "max_value": 200, "n_bins": 21}
    beyond = np.array([0.0, 200.0, 1000.0])
    tokenizer = build(options)
    assert tokenizer.encode(beyond)[1] == tokenizer.encode(beyond)[2] == 20
    with pytest.raises(
        DataError, match=r"1000 lies beyond the last bin, which ends at 200.*out_of_range: clip"
    ):
        build({**options, "out_of_range": "error"}).encode(beyond)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(strategy: str, bad: float):
    with pytest.raises(DataError, match="must be finite"):
        build({"strategy": strategy}).encode(np.array([1.0, bad, 2.0]))


@pytest.mark.parametrize("strategy", ["log_bins", "counts"])
def test_negative_values_are_refused_where_bins_have_no_sign(strategy: str):
    with pytest.raises(DataError, match=r"the value -1.0 has no .* need strategy: delta_bins"):
        build({"strategy": strategy}).encode(np.array([3.0, -1.0]))


def test_fractions_are_no_counts():
    with pytest.raises(DataError, match=r"the value 1.5 is no count"):
        build({"strategy": "counts"}).encode(np.array([1.0, 1.5]))


def test_the_mask_id_cannot_be_decoded():
    tokenizer = log_bins(31, 0.1, 9.2)
    with pytest.raises(DataError, match="31 hides a value"):
        tokenizer.decode(np.array([0, tokenizer.mask_id]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_tokenizer_survives_json(strategy: str):
    tokenizer = build({"strategy": strategy}).fitted([np.arange(50)])
    again = ValueTokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again.to_dict() == tokenizer.to_dict()
    values = np.arange(200)
    assert np.array_equal(again.decode(again.encode(values)), tokenizer.decode(tokenizer.encode(values)))


@pytest.mark.parametrize("change", [{"edges": [0, 0]}, {"strategy": "x"}, {"centres": [1]}, {"edges": None}])
def test_a_damaged_tokenizer_is_refused(change: dict):
    with pytest.raises(DataError, match="not a value tokenizer"):
        ValueTokenizer.from_dict({**log_bins(5, 0.1, 9).to_dict(), **change})


def test_no_expression_of_a_normalised_cell_lies_beyond_the_last_bin():
    tokenizer, transform, _ = build_value_tokenizer(
        {"strategy": "log_bins", "target_sum": 5e4, "out_of_range": "error"}, value_kind="counts"
    )
    one_gene = transform.apply(np.array([7]), np.array([0, 1]), np.array([7.0]))
    assert tokenizer.encode(one_gene).tolist() == [tokenizer.num_tokens - 1]


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, "counts", r"tokenizer.strategy: missing"),
        ({"strategy": "words"}, "counts", r"tokenizer.strategy: got 'words'"),
        ({"strategy": "log_bins", "bins": 5}, "counts", r"tokenizer.bins: not an option here"),
        ({"strategy": "delta_bins", "n_bins": 8}, "counts", r"n_bins: got 8; it must be odd"),
        (
            {"strategy": "log_bins", "min_value": 10},
            "counts",
            r"min_value: got 10; it must be below max_value",
        ),
        (
            {"strategy": "counts", "n_bins": 8, "max_value": 3},
            "counts",
            r"max_value: got 3; it must be a whole",
        ),
        ({"strategy": "counts"}, "lognorm", r"counts needs a corpus of counts"),
        ({"strategy": "counts", "log1p": True}, "counts", r"log1p: not an option here"),
        ({"strategy": "log_bins", "log1p": True}, "lognorm", r"log1p: the corpus holds log-normalised"),
        ({"strategy": "log_bins", "normalize": None, "target_sum": 10}, "counts", r"nothing is scaled to it"),
    ],
)
def test_wrong_options_are_named(options: dict, kind: str, message: str):
    with pytest.raises(DataError, match=message):
        build(options, kind)
