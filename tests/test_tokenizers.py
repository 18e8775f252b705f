import numpy as np
import pytest

from data.cell_source import cell_loader
from data.errors import DataError
from data.hashing import DrawKey
from data.ragged import choose_smallest, offsets_of
from data.readers import RaggedBatch
from data.tokenizer_options import build_tokenizer
from data.tokenizers import TokenizedCells, Tokenizer
from tests.corpora import gene_space, make_cells, write_corpus

DRAW = DrawKey(seed=1, phase=0, epoch=0)
NUM_GENES = 60


QUANTILE = {"strategy": "binned_expression", "binning_method": "quantile", "n_bins": 5}


def make(options: dict, value_kind: str = "counts", measured: list[np.ndarray] | None = None) -> Tokenizer:
    masks = [np.ones(NUM_GENES, bool)] if measured is None else measured
    return build_tokenizer(options, value_kind=value_kind, measured=masks, genes=gene_space(NUM_GENES))


def cells_of(
    *cells: dict[int, float], dtype: type = np.uint16, total: list[float] | None = None
) -> RaggedBatch:
    genes = [np.array(sorted(cell), np.int32) for cell in cells]
    counts = [np.array([cell[gene] for gene in sorted(cell)], dtype) for cell in cells]
    totals = [count.sum() for count in counts] if total is None else total
    columns = {"total": np.array(totals, np.float32), "source": np.zeros(len(cells), np.int16)}
    offsets = offsets_of(np.array([len(each) for each in genes]))
    return RaggedBatch(offsets, np.concatenate(genes), np.concatenate(counts), columns)


def random_cells(num_cells: int, seed: int = 0, dtype: type = np.uint16, mean: int = 25) -> RaggedBatch:
    rng = np.random.default_rng(seed)
    cells = []
    for _ in range(num_cells):
        genes = rng.choice(NUM_GENES, rng.integers(1, 2 * mean), replace=False)
        cells.append({int(gene): rng.integers(1, 9) for gene in genes})
    return cells_of(*cells, dtype=dtype)


def tokenize(
    tokenizer: Tokenizer, cells: RaggedBatch, draw: DrawKey = DRAW, first_row: int = 0
) -> TokenizedCells:
    return tokenizer(cells, np.arange(len(cells)) + first_row, draw)


def split(tokens: TokenizedCells, what: str) -> list[list]:
    array = getattr(tokens, what)
    return [part.tolist() for part in np.split(array, tokens.offsets[1:-1])]


def test_rank_value_orders_by_expression_and_ties_by_gene():
    cells = cells_of({5: 2, 9: 7, 1: 2, 30: 1}, {0: 1}, {8: 3, 2: 3, 4: 3})
    tokens = tokenize(make({"strategy": "rank_value"}), cells)
    assert split(tokens, "genes") == [[9, 1, 5, 30], [0], [2, 4, 8]]
    assert tokens.bins is None


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.float32])
def test_rank_value_agrees_with_a_stable_sort_for_every_count_type(dtype: type):
    cells = random_cells(40, dtype=dtype)
    tokens = tokenize(make({"strategy": "rank_value", "max_genes": 20}), cells)
    for index, genes in enumerate(split(tokens, "genes")):
        part = slice(cells.offsets[index], cells.offsets[index + 1])
        order = np.argsort(-cells.counts[part].astype(float), kind="stable")[:19]
        assert genes == cells.genes[part][order].tolist()


def test_ranking_survives_the_largest_counts():
    cells = cells_of({1: 65535, 2: 65534, 3: 1}, total=[1.0])
    assert split(tokenize(make({"strategy": "rank_value"}), cells), "genes") == [[1, 2, 3]]
    cells = cells_of({1: 2**32 - 2, 2: 2**32 - 1, 3: 1}, dtype=np.uint32)
    assert split(tokenize(make({"strategy": "rank_value"}), cells), "genes") == [[2, 1, 3]]


def test_values_are_normalised_by_the_total_over_all_genes():
    cells = cells_of({0: 3, 1: 1}, {0: 5}, total=[8.0, 5.0])
    tokens = tokenize(make({"strategy": "binned_expression"}), cells)
    assert tokens.values.dtype == np.float32
    np.testing.assert_allclose(tokens.values, np.log1p([3 / 8 * 1e4, 1 / 8 * 1e4, 1e4]), rtol=1e-6)


def test_small_values_keep_their_precision():
    counts = np.arange(1, 60, dtype=np.uint16)
    cells = cells_of(dict(enumerate(counts)), total=[1e6])
    tokens = tokenize(make({"strategy": "binned_expression"}), cells)
    np.testing.assert_allclose(tokens.values, np.log1p(counts / 100), atol=1e-7, rtol=1e-5)


def test_normalisation_options_act():
    cells = cells_of({0: 3, 1: 1}, total=[8.0])
    raw = make({"strategy": "binned_expression", "normalize": None, "log1p": False})
    assert tokenize(raw, cells).values.tolist() == [3, 1]
    scaled = make({"strategy": "binned_expression", "target_sum": 80, "log1p": False})
    assert tokenize(scaled, cells).values.tolist() == [30, 10]
    logged = make({"strategy": "rank_value", "normalize": None})
    np.testing.assert_allclose(tokenize(logged, cells).values, np.log1p([3, 1]), rtol=1e-6)


def test_log_normalised_values_are_left_alone():
    cells = cells_of({0: 2.5, 1: 0.5}, dtype=np.float32)
    tokens = tokenize(make({"strategy": "rank_value"}, "lognorm"), cells)
    assert tokens.values.tolist() == [2.5, 0.5]


@pytest.mark.parametrize(
    ("option", "key"),
    [({"normalize": "library_size"}, "tokenizer.normalize"), ({"log1p": True}, "tokenizer.log1p"),
     ({"target_sum": 1e4}, "tokenizer.target_sum")],
)  # fmt: skip
def test_normalising_twice_is_refused(option: dict, key: str):
    with pytest.raises(DataError, match=key):
        make({"strategy": "binned_expression", **option}, "lognorm")


def test_uniform_bins_leave_bin_zero_to_zero_expression():
    values = [1e-6, 0.1, 0.19, 0.2, 0.4, 0.41, 9.8, 9.81, 10.0, 12.0]
    cells = cells_of(dict(enumerate(values)), dtype=np.float32)
    tokens = tokenize(make({"strategy": "binned_expression", "n_bins": 50}, "lognorm"), cells)
    assert tokens.bins is not None
    assert tokens.bins.tolist() == [1, 1, 1, 1, 1, 2, 48, 49, 49, 49]


def test_uniform_bins_agree_with_their_edges_above_the_first():
    values = np.random.default_rng(0).uniform(0.001, 11, 5000).astype(np.float32)
    cells = RaggedBatch(np.array([0, 5000]), np.arange(5000, dtype=np.int32), values, {"total": np.ones(1)})
    tokens = tokenize(make({"strategy": "binned_expression", "max_genes": 6000}, "lognorm"), cells)
    edges = np.linspace(0, 10, 52)
    expected = np.maximum(np.searchsorted(edges[1:-1], values, side="left"), 1)
    assert np.array_equal(tokens.bins, expected)


def test_max_value_moves_the_bins():
    cells = cells_of({0: 1.0, 1: 3.0}, dtype=np.float32)
    options = {"strategy": "binned_expression", "n_bins": 10, "max_value": 5}
    assert tokenize(make(options, "lognorm"), cells).bins.tolist() == [1, 5]


@pytest.mark.parametrize("n_bins", [3, 11, 51])
def test_per_cell_bins_are_those_of_scgpt(n_bins: int):
    rng = np.random.default_rng(0)
    for size in [1, 2, 3, 10, 59]:
        values = rng.permutation(np.arange(size) + rng.integers(1, 5)).astype(np.uint16)
        cells = cells_of(dict(enumerate(values)))
        options = {"strategy": "binned_expression", "binning_method": "per_cell", "n_bins": n_bins}
        bins = tokenize(make(options), cells).bins
        # scGPT: digitize by the quantiles of the non-zero values. Exact fractions avoid rounding at the edges.
        places = [edge * (size - 1) / (n_bins - 2) for edge in range(n_bins - 1)]
        ranks = np.argsort(np.argsort(values))
        assert bins.tolist() == [sum(place <= rank + 1e-9 for place in places) for rank in ranks]
        assert bins.min() >= 1 and bins.max() == n_bins - 1


def test_equal_values_share_a_per_cell_bin_and_order_is_kept():
    cells = cells_of({0: 5, 1: 1, 2: 5, 3: 1, 4: 9, 5: 1}, {7: 2, 9: 2})
    options = {"strategy": "binned_expression", "binning_method": "per_cell", "n_bins": 5}
    first, second = split(tokenize(make(options), cells), "bins")
    assert first[0] == first[2] and first[1] == first[3] == first[5] and first[1] < first[0] < first[4] == 4
    assert second == [4, 4]


def test_per_cell_bins_do_not_depend_on_normalisation_or_neighbours():
    cells = random_cells(30)
    options = {"strategy": "binned_expression", "binning_method": "per_cell"}
    tokens = tokenize(make(options), cells)
    plain = tokenize(make({**options, "normalize": None, "log1p": False}), cells)
    assert np.array_equal(tokens.bins, plain.bins)
    alone = cells_of(
        dict(zip(cells.genes[: cells.offsets[1]], cells.counts[: cells.offsets[1]], strict=True))
    )
    assert tokenize(make(options), alone).bins.tolist() == split(tokens, "bins")[0]


@pytest.mark.parametrize("method", ["uniform", "per_cell"])
def test_the_highest_expressed_genes_stay_in_gene_order(method: str):
    cells = cells_of({0: 1, 1: 9, 2: 3, 3: 9, 4: 3, 5: 1, 6: 8}, {3: 1, 8: 2})
    options = {"strategy": "binned_expression", "max_genes": 5, "binning_method": method}
    tokens = tokenize(make(options), cells)
    assert split(tokens, "genes") == [[1, 2, 3, 6], [3, 8]]
    everything = tokenize(make({**options, "max_genes": 50}), cells)
    kept = [1, 2, 3, 6, 7, 8]
    assert np.array_equal(tokens.bins, everything.bins[kept])
    assert np.array_equal(tokens.values, everything.values[kept])


@pytest.mark.parametrize("strategy", ["rank_value", "binned_expression"])
def test_a_random_gene_selection_is_seeded_cell_by_cell(strategy: str):
    cells = random_cells(20, mean=28)
    tokenizer = make({"strategy": strategy, "max_genes": 11, "gene_selection": "random"})
    genes = [sorted(row) for row in split(tokenize(tokenizer, cells), "genes")]
    assert genes == [sorted(row) for row in split(tokenize(tokenizer, cells), "genes")]
    assert genes != [
        sorted(row) for row in split(tokenize(tokenizer, cells, DRAW._replace(epoch=1)), "genes")
    ]
    for index, row in enumerate(genes):
        part = cells.genes[cells.offsets[index] : cells.offsets[index + 1]]
        assert len(row) == len(set(row)) == min(10, len(part)) and set(row) <= set(part.tolist())
    second = dict(zip(cells.genes[cells.offsets[1] : cells.offsets[2]].tolist(),
                      cells.counts[cells.offsets[1] : cells.offsets[2]].tolist(), strict=True))  # fmt: skip
    assert sorted(tokenize(tokenizer, cells_of(second), first_row=1).genes) == genes[1]


def test_ranks_hold_after_a_random_selection():
    cells = random_cells(20, mean=28)
    tokens = tokenize(make({"strategy": "rank_value", "max_genes": 11, "gene_selection": "random"}), cells)
    assert all((np.diff(row) <= 0).all() for row in split(tokens, "values"))


def test_zero_genes_are_those_measured_in_the_cells_source():
    first, second = np.zeros(NUM_GENES, bool), np.ones(NUM_GENES, bool)
    first[:20] = True
    cells = cells_of({3: 2, 7: 4}, {50: 1})
    cells.columns["source"][:] = [0, 1]
    tokenizer = make({"strategy": "binned_expression", "include_zero_genes": True}, measured=[first, second])
    tokens = tokenize(tokenizer, cells)
    genes, values, bins = (split(tokens, what) for what in ("genes", "values", "bins"))
    assert genes == [list(range(20)), list(range(60))]
    assert [gene for gene, value in zip(genes[0], values[0], strict=True) if value > 0] == [3, 7]
    assert [gene for gene, each in zip(genes[1], bins[1], strict=True) if each > 0] == [50]
    plain = tokenize(make({"strategy": "binned_expression"}), cells)
    assert [value for value in values[0] if value > 0] == split(plain, "values")[0]


@pytest.mark.parametrize("method", ["uniform", "per_cell"])
def test_zero_genes_are_chosen_at_random_to_fit(method: str):
    cells = random_cells(200)
    options = {"strategy": "binned_expression", "include_zero_genes": True, "max_genes": 31}
    tokenizer = make({**options, "binning_method": method})
    tokens = tokenize(tokenizer, cells)
    assert (np.diff(tokens.offsets) == 30).all()
    assert all((np.diff(row) > 0).all() for row in split(tokens, "genes"))
    counted = np.bincount(tokens.genes, minlength=NUM_GENES)
    assert counted.min() > 60 and counted.max() < 140  # 100 expected
    assert np.array_equal(tokens.bins == 0, tokens.values == 0)
    again = tokenize(tokenizer, cells, DRAW._replace(seed=2))
    assert not np.array_equal(again.genes, tokens.genes)


@pytest.mark.parametrize("strategy", ["continuous_projection", "gene_embedding"])
def test_strategies_without_bins_keep_the_order_of_genes_and_the_values(strategy: str):
    cells = random_cells(30)
    tokens = tokenize(make({"strategy": strategy, "max_genes": 12}), cells)
    binned = tokenize(make({"strategy": "binned_expression", "max_genes": 12}), cells)
    assert tokens.bins is None
    assert np.array_equal(tokens.genes, binned.genes)
    assert np.array_equal(tokens.values, binned.values)
    assert all((np.diff(row) > 0).all() for row in split(tokens, "genes"))


@pytest.mark.parametrize("strategy", ["rank_value", "continuous_projection", "gene_embedding"])
@pytest.mark.parametrize("method", ["uniform", "per_cell", "quantile"])
def test_every_strategy_can_have_the_bins_of_binned_expression(strategy: str, method: str):
    cells = random_cells(30)
    options = {"n_bins": 5, "binning_method": method, "max_genes": 12}
    options |= {"edges": [5.0, 6.0, 7.0]} if method == "quantile" else {}
    tokens = tokenize(make({"strategy": strategy, **options}), cells)
    binned = tokenize(make({"strategy": "binned_expression", **options}), cells)
    assert tokens.bins is not None and binned.bins is not None
    for row in range(30):
        mine, theirs = (slice(*each.offsets[row : row + 2]) for each in (tokens, binned))
        pairs = [
            sorted(zip(each.genes[part].tolist(), each.bins[part].tolist(), strict=True))
            for each, part in ((tokens, mine), (binned, theirs))
        ]
        assert pairs[0] == pairs[1]


@pytest.mark.parametrize("method", ["quantile", "per_cell"])
def test_continuous_projection_can_show_genes_without_expression(method: str):
    options = {"n_bins": 4, "binning_method": method, "include_zero_genes": True, "max_genes": 40}
    options |= {"edges": [0.5, 5.0]} if method == "quantile" else {}
    tokens = tokenize(make({"strategy": "continuous_projection", **options}), random_cells(20))
    assert tokens.bins is not None
    assert np.array_equal(tokens.bins == 0, tokens.values == 0)
    assert (tokens.values == 0).any()


def test_quantile_bins_count_the_edges_below_a_value():
    cells = cells_of({gene: gene + 1 for gene in range(8)}, total=[100])
    options = {**QUANTILE, "edges": [2, 4, 4], "normalize": None, "log1p": False}
    tokens = tokenize(make(options), cells)
    assert tokens.bins is not None
    assert tokens.bins.tolist() == [1, 1, 2, 2, 4, 4, 4, 4]


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", make_cells(400, NUM_GENES, 20), NUM_GENES)


def test_quantile_edges_are_fitted_to_the_training_cells_alone(corpus):
    options = {**QUANTILE, "n_bins": 6, "max_genes": NUM_GENES + 1}
    source = cell_loader(corpus, tokenizer=options, val_fraction=0.5)
    assert source.row_mask is not None and source.validation is not None
    edges = source.facts()["tokenizer_options"]["edges"]
    values = source.fetch_unmasked(np.flatnonzero(source.row_mask), DRAW)["values"].numpy()
    expected = np.quantile(values[values > 0].astype(np.float64), np.arange(1, 5) / 5)
    assert edges == pytest.approx(expected, abs=1e-6)
    counts = np.bincount(source.fetch_unmasked(np.flatnonzero(source.row_mask), DRAW)["bins"].flatten())[1:]
    assert counts.min() / counts.max() > 0.8
    assert source.validation.facts()["tokenizer_options"]["edges"] == edges


def test_fitting_again_gives_the_same_edges_and_other_cells_others(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("data.tokenizer_options.CELLS_FITTED", 100)

    def edges(**options) -> list[float]:
        return cell_loader(corpus, tokenizer=QUANTILE, **options).facts()["tokenizer_options"]["edges"]

    assert edges() == edges()
    assert edges(split_seed=1) != edges()


def test_fitted_edges_are_options_that_are_not_fitted_again(corpus, tmp_path):
    first = cell_loader(corpus, tokenizer=QUANTILE)
    options = first.facts()["tokenizer_options"]
    other = write_corpus(tmp_path / "other", make_cells(50, NUM_GENES, 9, seed=5), NUM_GENES)
    assert cell_loader(other, tokenizer=options).facts()["tokenizer_options"] == options
    assert cell_loader(other, tokenizer=QUANTILE).facts()["tokenizer_options"] != options


def test_a_target_sum_of_null_is_the_median_of_the_training_cells(corpus):
    source = cell_loader(corpus, tokenizer={"strategy": "rank_value", "target_sum": None}, val_fraction=0.3)
    assert source.row_mask is not None
    totals = source.reader.read(np.flatnonzero(source.row_mask)).columns["total"]
    assert source.facts()["tokenizer_options"]["target_sum"] == np.median(totals)


MEDIANS = {f"GENE{gene}": 0.5 + gene % 7 for gene in range(40)}


def ranked_by_hand(cell: dict[int, float]) -> list[int]:
    known = [gene for gene in sorted(cell) if gene < 40]
    return sorted(known, key=lambda gene: -np.float32(cell[gene]) / np.float32(MEDIANS[f"GENE{gene}"]))


@pytest.mark.parametrize("kind", ["counts", "lognorm"])
def test_ranks_over_medians_are_those_of_geneformer(kind: str):
    rng = np.random.default_rng(3)
    raw = [
        {int(gene): int(rng.integers(1, 99)) for gene in rng.choice(NUM_GENES, 30, False)} for _ in range(20)
    ]
    tokenizer = make({"strategy": "rank_value", "gene_medians": MEDIANS, "max_genes": 11}, kind)
    if kind == "counts":
        cells = cells_of(*raw)
    else:
        cells = cells_of(
            *({gene: np.log1p(count) for gene, count in cell.items()} for cell in raw), dtype=np.float32
        )
    tokens = tokenize(tokenizer, cells)
    for row, cell in zip(split(tokens, "genes"), raw, strict=True):
        scores = [cell[gene] / MEDIANS[f"GENE{gene}"] for gene in row]
        expected = [cell[gene] / MEDIANS[f"GENE{gene}"] for gene in ranked_by_hand(cell)[:10]]
        assert scores == pytest.approx(expected, rel=1e-5)


def test_medians_change_the_order_and_not_the_values():
    cells = random_cells(20)
    plain = tokenize(make({"strategy": "rank_value"}), cells)
    ranked = tokenize(
        make({"strategy": "rank_value", "gene_medians": {f"GENE{g}": 1 + g for g in range(60)}}), cells
    )
    assert split(plain, "genes") != split(ranked, "genes")
    for row in range(20):
        before, after = (
            dict(zip(split(each, "genes")[row], split(each, "values")[row], strict=True))
            for each in (plain, ranked)
        )
        assert before == after


@pytest.mark.parametrize("name", ["m.json", "m.tsv", "m.csv"])
def test_medians_are_read_from_a_file_and_kept_in_the_options(tmp_path, corpus, name: str):
    path = tmp_path / name
    separator = "," if name.endswith(".csv") else "\t"
    lines = [separator.join(["gene", "median"]), *(f"{gene}{separator}{m}" for gene, m in MEDIANS.items())]
    path.write_text(str(MEDIANS).replace("'", '"') if name.endswith(".json") else "\n".join(lines))
    source = cell_loader(corpus, tokenizer={"strategy": "rank_value", "gene_medians": str(path)})
    assert source.facts()["tokenizer_options"]["gene_medians"] == MEDIANS
    assert source.notices == [
        f"gene_medians: 40 of the 60 genes of {corpus} have a median; the others are left out of every cell"
    ]
    path.unlink()
    again = cell_loader(corpus, tokenizer=source.facts()["tokenizer_options"])
    assert (again.fetch(np.arange(9), DRAW)["tokens"] == source.fetch(np.arange(9), DRAW)["tokens"]).all()


@pytest.mark.parametrize(
    ("medians", "message"),
    [
        ({"GENE1": 0}, r"a median must be a number above 0; 1 are not, such as GENE1 \(0\)"),
        ({"TP53": 1.0}, r"none of its 1 genes \(TP53\) is among the data's \(GENE0, GENE1, GENE2\)"),
        ("absent.tsv", "absent.tsv cannot be read as text"),
        (7, "got int; it must be the path of a file"),
    ],
)
def test_wrong_medians_are_named(medians, message: str):
    with pytest.raises(DataError, match=message):
        make({"strategy": "rank_value", "gene_medians": medians})


def test_a_pickle_of_medians_is_never_read(tmp_path):
    import pickle

    path = tmp_path / "gene_median_dictionary.pkl"
    path.write_bytes(pickle.dumps({"GENE1": 1.0, "x": b"\xff" * 9}))
    with pytest.raises(DataError, match="never unpickled"):
        make({"strategy": "rank_value", "gene_medians": str(path)})


def test_entries_that_are_not_expressed_are_dropped():
    cells = cells_of({0: 0, 1: 2, 2: 0}, {5: 1})
    tokens = tokenize(make({"strategy": "binned_expression"}), cells)
    assert split(tokens, "genes") == [[1], [5]]


def test_a_cell_without_genes_needs_a_cls_token():
    cells = cells_of({1: 2}, {3: 0})
    assert np.diff(tokenize(make({"strategy": "rank_value"}), cells).offsets).tolist() == [1, 0]
    with pytest.raises(DataError, match="row 8: the cell expresses no gene"):
        tokenize(make({"strategy": "rank_value", "prepend_cls": False}), cells, first_row=7)


def test_the_cls_token_takes_one_place():
    cells = cells_of({gene: 1 for gene in range(20)})
    for prepend_cls, expected in [(True, 9), (False, 10)]:
        tokenizer = make({"strategy": "rank_value", "max_genes": 10, "prepend_cls": prepend_cls})
        assert len(tokenize(tokenizer, cells).genes) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "gene2vec"}, "strategy: got 'gene2vec'; it must be rank_value | binned_expression | continuous"),
        ({}, "strategy: missing; it must be one of rank_value, binned_expression"),
        ({"strategy": "rank_value", "max_value": 9}, "max_value: there are no bins without n_bins"),
        ({"strategy": "continuous_projection", "binning_method": "per_cell"}, "binning_method: there are no bins with"),
        ({"strategy": "binned_expression", "n_bins": None}, "n_bins: got None; binned_expression needs a whole"),
        ({"strategy": "binned_expression", "edges": [1, 2]}, "edges: not an option here"),
        ({**QUANTILE, "edges": [1, 2]}, "edges: they must be n_bins - 2 = 3 ascending numbers"),
        ({**QUANTILE, "edges": [1, 3, 2]}, "edges: they must be n_bins - 2 = 3 ascending numbers"),
        ({"strategy": "rank_value", "target_sum": None}, "target_sum: null stands for the median of the training"),
        ({"strategy": "binned_expression", "gene_medians": {"GENE1": 1}}, "gene_medians: not an option here"),
        ({"strategy": "rank_value", "include_zero_genes": True}, "include_zero_genes: not an option here"),
        ({"strategy": "binned_expression", "n_bins": 2}, "n_bins: got 2; it must be a whole number, at least 3"),
        ({"strategy": "binned_expression", "n_bins": True}, "n_bins: got True"),
        ({"strategy": "binned_expression", "max_value": 0}, "max_value: got 0; it must be a number above 0"),
        ({"strategy": "binned_expression", "binning_method": "deciles"}, "must be uniform | quantile | per_cell"),
        ({"strategy": "binned_expression", "binning_method": "per_cell", "max_value": 9}, "max_value: not an option"),
        ({"strategy": "rank_value", "max_genes": "many"}, "max_genes: got 'many'"),
        ({"strategy": "rank_value", "normalize": "median"}, "normalize: got 'median'; it must be library_size | null"),
        ({"strategy": "rank_value", "normalize": None, "target_sum": 5}, "target_sum: nothing is scaled"),
        ({"strategy": "rank_value", "prepend_cls": 1}, "prepend_cls: got 1; it must be true or false"),
        ({"strategy": "binned_expression", "include_zero_genes": True, "gene_selection": "top"}, "gene_selection: top"),
        ({"strategy": "rank_value", "typo": 1, "max_genes": 0}, r"max_genes: got 0.*typo: not an option"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_with_what_is_allowed(options: dict, message: str):
    pattern = message if ".*" in message else message.replace("|", r"\|")
    with pytest.raises(DataError, match=pattern):
        make(options)


def test_options_must_be_a_table():
    with pytest.raises(DataError, match="must be a table of options"):
        make(["rank_value"])


@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.15, 0.5, 0.6, 0.97, 1.0])
def test_choosing_the_smallest_hashes_is_exact(ratio: float):
    rng = np.random.default_rng(0)
    lengths = np.array([0, 1, 2, 900, 5, 1500, 64, 0])
    offsets = offsets_of(lengths)
    for hashes in [rng.integers(0, 2**32, offsets[-1], dtype=np.uint32), np.full(offsets[-1], 7, np.uint32),
                   rng.integers(2**32 - 9, 2**32, offsets[-1], dtype=np.uint32)]:  # fmt: skip
        counts = np.rint(lengths * ratio).astype(int)
        chosen = choose_smallest(hashes, offsets, counts)
        expected = [
            start + np.sort(np.argsort(hashes[start:stop], kind="stable")[:count])
            for start, stop, count in zip(offsets[:-1], offsets[1:], counts, strict=True)
        ]
        assert chosen.tolist() == np.concatenate(expected).tolist()
