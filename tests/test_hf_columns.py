from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pytest
import torch

from data.errors import DataError
from data.hf import HFSource, hf_loader
from data.loader import DrawKey, StepLoader
from data.order import GlobalOrder
from tests.corpora import file_server, make_cells, write_corpus

DRAW = DrawKey(seed=1, phase=0, epoch=0)
GENEFORMER = {"tokens": "input_ids", "length": "length"}
IDS: dict[str, Any] = {"vocab_size": 100, "pad_id": 0, "mask_id": 1, "special_ids": [2, 3]}
NUM_ROWS = 150


def geneformer_rows() -> dict[str, list]:
    rng = np.random.default_rng(0)
    ranked = [
        [2, *rng.permutation(np.arange(4, 100))[: rng.integers(1, 60)].tolist(), 3] for _ in range(NUM_ROWS)
    ]
    return {
        "input_ids": ranked,
        "length": [len(row) for row in ranked],
        "expression": [[0.5 * value for value in row] for row in ranked],
        "donor": [f"donor-{number}" for number in rng.integers(0, 12, NUM_ROWS)],
        "lane": rng.integers(0, 2, NUM_ROWS).tolist(),
        "embedding": rng.random((NUM_ROWS, 3)).tolist(),
        "note": ["text"] * NUM_ROWS,
    }


@pytest.fixture(scope="module")
def rows() -> dict[str, list]:
    return geneformer_rows()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, list]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    dataset = datasets.Dataset.from_dict(rows)
    features = dataset.features.copy()
    features["lane"] = datasets.ClassLabel(names=["second", "first"])
    features["embedding"] = datasets.List(datasets.Value("float32"), length=3)
    dataset = dataset.cast(features)
    dataset.save_to_disk(root / "arrow", num_shards=3)
    (root / "parquet").mkdir()
    for index in range(2):
        shard = dataset.select(range(index * 75, index * 75 + 75))
        shard.to_parquet(root / "parquet" / f"{index}.parquet", batch_size=20)
    datasets.DatasetDict({"train": dataset, "test": dataset.select(range(10))}).save_to_disk(root / "dict")
    return {name: root / name for name in ("arrow", "parquet", "dict")}


def fetch(source: HFSource, wanted: list[int]) -> dict[str, Any]:
    return source.fetch(np.array(wanted), DRAW)


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_list_columns_are_padded_and_numbers_are_not(
    folders: dict[str, Path], rows: dict[str, list], storage: str
):
    source = hf_loader(folders[storage], columns={**GENEFORMER, "values": "expression"}, pad_id=7)
    assert len(source) == NUM_ROWS
    wanted = [149, 3, 80]
    batch = fetch(source, wanted)
    width = max(rows["length"][row] for row in wanted)
    assert batch["tokens"].shape == batch["values"].shape == (3, width)
    for index, row in enumerate(wanted):
        length = rows["length"][row]
        assert batch["tokens"][index].tolist() == rows["input_ids"][row] + [7] * (width - length)
        assert batch["values"][index].tolist() == rows["expression"][row] + [0] * (width - length)
    assert batch["attention_mask"].sum(dim=1).tolist() == batch["length"].tolist()
    assert batch["num_tokens"] == int(batch["length"].sum())
    assert batch["cell_index"].tolist() == wanted
    kinds = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert kinds == {"tokens": torch.int64, "values": torch.float32, "attention_mask": torch.bool,
                     "length": torch.int64, "cell_index": torch.int64}  # fmt: skip


def test_arrow_and_parquet_give_the_same_batches(folders: dict[str, Path]):
    remote = fsspec.filesystem("memory")
    for file in folders["parquet"].iterdir():
        remote.pipe(f"/hf/{file.name}", file.read_bytes())
    options: dict[str, Any] = {"columns": GENEFORMER, **IDS, "masking": {}, "technical_batch": "donor"}
    with file_server(folders["parquet"]) as url:
        files = [f"{url}/0.parquet", f"{url}/1.parquet"]
        paths = [
            folders["arrow"],
            folders["parquet"],
            "memory://hf",
            files,
            sorted(folders["parquet"].iterdir()),
        ]
        passes = []
        for path in paths:
            source = hf_loader(path, **options)
            order = GlobalOrder(len(source), 0, 0, block=8, window=32)
            loader = StepLoader(source, order, draw_seed=0, phase=0, global_batch_size=24, micro_batch_size=8,
                                rank=0, world_size=1)  # fmt: skip
            passes.append([micro.batch for step in loader.steps(0) for micro in step if micro.num_cells])
    remote.rm("/hf", recursive=True)
    for batches in passes[1:]:
        for batch, expected in zip(batches, passes[0], strict=True):
            assert batch.keys() == expected.keys()
            assert all(
                torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(expected[name])) for name in batch
            )


def test_masked_tokens_are_words_and_their_values_hidden(folders: dict[str, Path], rows: dict[str, list]):
    columns = {**GENEFORMER, "values": "expression"}
    source = hf_loader(folders["arrow"], columns=columns, **IDS, masking={"mask_ratio": 0.5})
    everything = list(range(NUM_ROWS))
    batch, truth = fetch(source, everything), source.fetch_unmasked(np.arange(NUM_ROWS), DRAW)
    assert "labels" not in truth
    index = batch["masked_index"]
    assert torch.equal(index, (batch["labels"] != -100).flatten().nonzero().flatten())
    labels = batch["labels"].flatten()[index]
    assert torch.equal(labels, truth["tokens"].flatten()[index]) and labels.min() >= 4
    shown = batch["tokens"].flatten()[index]
    is_random = (shown != 1) & (shown != labels)
    shares = [(shown == 1).float().mean(), (shown == labels).float().mean(), is_random.float().mean()]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.03)
    assert shown[is_random].min() >= 4 and shown[is_random].max() < 100
    assert (batch["values"].flatten()[index] == 0).all()
    others = torch.ones(batch["tokens"].numel(), dtype=torch.bool)
    others[index] = False
    assert torch.equal(batch["tokens"].flatten()[others], truth["tokens"].flatten()[others])
    assert torch.equal(batch["values"].flatten()[others], truth["values"].flatten()[others])
    per_row = (batch["labels"] != -100).sum(dim=1).tolist()
    assert per_row == [max(1, round((length - 2) * 0.5)) for length in rows["length"]]


def test_masks_do_not_depend_on_the_batch(folders: dict[str, Path]):
    source = hf_loader(folders["arrow"], columns=GENEFORMER, **IDS, masking={})
    whole, alone = fetch(source, [5, 6, 7, 8]), fetch(source, [7])
    width = int(alone["length"][0])
    assert torch.equal(whole["tokens"][2, :width], alone["tokens"][0])
    other = source.fetch(np.array([7]), DRAW._replace(epoch=1))
    assert not torch.equal(other["tokens"], alone["tokens"])


def test_long_rows_are_cut_with_their_values(folders: dict[str, Path], rows: dict[str, list]):
    columns = {**GENEFORMER, "values": "expression", "embedding": "embedding"}
    source = hf_loader(folders["arrow"], columns=columns, max_length=10)
    batch = fetch(source, [0, 1, 2])
    assert batch["tokens"].shape == batch["values"].shape == (3, 10)
    assert batch["tokens"][1].tolist()[: rows["length"][1]] == rows["input_ids"][1][:10]
    assert batch["embedding"].shape == (3, 3)
    np.testing.assert_allclose(batch["embedding"], np.array(rows["embedding"])[:3], rtol=1e-6)
    assert source.facts() == {"max_length": 10}


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
@pytest.mark.parametrize(
    ("column", "names"), [("donor", None), ("lane", ["second", "first"]), ("length", None)]
)
def test_technical_batches_are_named_by_any_column(
    folders: dict[str, Path], rows: dict[str, list], storage: str, column: str, names: list[str] | None
):
    source = hf_loader(folders[storage], columns=GENEFORMER, technical_batch=column)
    expected = [str(value) if names is None else names[value] for value in rows[column]]
    assert source.unique_batches == sorted(set(expected))
    batch = fetch(source, list(range(NUM_ROWS)))
    assert [source.unique_batches[index] for index in batch["batch_idx"]] == expected
    mapping = {name: index * 2 for index, name in enumerate(source.unique_batches)}
    source.set_batch_mapping(mapping)
    assert fetch(source, [9])["batch_idx"].tolist() == [mapping[expected[9]]]
    with pytest.raises(DataError, match="lacks the technical batch"):
        source.set_batch_mapping({})


def test_without_a_technical_batch_there_are_no_names(folders: dict[str, Path]):
    source = hf_loader(folders["arrow"], columns=GENEFORMER)
    assert source.unique_batches == [] and "batch_idx" not in fetch(source, [0])


def test_a_split_of_a_dataset_dict_is_named(folders: dict[str, Path]):
    assert len(hf_loader(folders["dict"], columns=GENEFORMER, split="test")) == 10
    with pytest.raises(DataError, match="split: got None; the folder has: train, test"):
        hf_loader(folders["dict"], columns=GENEFORMER)
    with pytest.raises(DataError, match="the folder has no splits"):
        hf_loader(folders["arrow"], columns=GENEFORMER, split="train")


def test_held_out_rows_are_disjoint(folders: dict[str, Path]):
    source = hf_loader(folders["arrow"], columns=GENEFORMER, val_fraction=0.2, limit_cells=100)
    assert source.validation is not None and source.row_mask is not None
    assert source.row_mask.sum() == 80 and source.validation.row_mask.sum() == 20
    assert not (source.row_mask & source.validation.row_mask).any()


def test_a_converted_corpus_is_such_a_data_set(tmp_path: Path):
    cells = make_cells(60, 50, 12)
    folder = write_corpus(tmp_path / "corpus", cells, 50)
    source = hf_loader(
        folder, columns={"tokens": "genes", "values": "counts"}, technical_batch="technical_batch"
    )
    batch = fetch(source, [11])
    genes, counts = cells.row(11)
    assert batch["tokens"][0].tolist() == genes.tolist() and batch["values"][0].tolist() == counts.tolist()
    assert source.unique_batches == ["lane-a", "lane-b", "lane-c"]


def test_fingerprints_tell_options_apart(folders: dict[str, Path]):
    common: dict[str, Any] = {"columns": GENEFORMER, **IDS}
    sources = [
        hf_loader(folders["arrow"], **common),
        hf_loader(folders["arrow"], **common, masking={}),
        hf_loader(folders["arrow"], **common, max_length=9),
        hf_loader(folders["parquet"], **common),
    ]
    assert len({source.fingerprint() for source in sources}) == 4
    assert hf_loader(folders["arrow"], **common).fingerprint() == sources[0].fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"columns": {"tokens": "ids", "x": "y"}},
            "no column ids, y; it has: input_ids, length, expression, donor",
        ),
        ({"columns": {"length": "length"}}, "no column is mapped to tokens; got length"),
        ({"columns": {"tokens": "input_ids", "labels": "length"}}, "labels cannot be mapped"),
        ({"masking": {}, "mask_id": None}, "mask_id must be given"),
        ({"masking": {}, "mask_id": None, "vocab_size": None}, "vocab_size and mask_id must be given"),
        ({"masking": {"target": "both"}}, "target: got 'both'; it must be gene"),
        ({"masking": {}, "columns": {"tokens": "input_ids", "bins": "length"}}, "map values instead of bins"),
        ({"format": "csv"}, "format: got 'csv'; it must be one of auto, arrow, parquet"),
        ({"format": "parquet"}, "no Parquet files"),
        ({"technical_batch": "batch"}, "no column batch; it has"),
        (
            {"technical_batch": "expression"},
            "technical batches are named by text, class labels or whole numbers",
        ),
        ({"path": []}, "got no file"),
    ],
)
def test_wrong_options_are_refused(folders: dict[str, Path], options: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        hf_loader(**{"path": folders["arrow"], "columns": GENEFORMER, **IDS, **options})


def test_columns_of_text_are_refused(folders: dict[str, Path]):
    source = hf_loader(folders["arrow"], columns={**GENEFORMER, "note": "note"})
    with pytest.raises(DataError, match="column 'note' is of type string; only numbers and lists of numbers"):
        fetch(source, [0])


def test_tokens_that_are_no_lists_are_refused(folders: dict[str, Path]):
    source = hf_loader(folders["arrow"], columns={"tokens": "length"})
    with pytest.raises(DataError, match="columns.tokens: 'length' holds one number a row; tokens are lists"):
        fetch(source, [0])


def test_tokens_outside_the_vocabulary_are_refused(folders: dict[str, Path]):
    source = hf_loader(folders["arrow"], columns=GENEFORMER, vocab_size=50)
    with pytest.raises(DataError, match="vocab_size 50 allows 0 to 49"):
        fetch(source, list(range(NUM_ROWS)))


def test_a_row_without_tokens_is_refused(tmp_path: Path):
    datasets.Dataset.from_dict({"input_ids": [[1], []]}).save_to_disk(tmp_path / "data")
    source = hf_loader(tmp_path / "data", columns={"tokens": "input_ids"})
    with pytest.raises(DataError, match="row 1 has no token"):
        fetch(source, [0, 1])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("state.json", "{", "state.json: damaged: it holds no list _data_files"),
        ("state.json", '{"_data_files": []}', "_data_files names no files of this folder"),
        ("state.json", '{"_data_files": [{"filename": "../other.arrow"}]}', "names no files of this folder"),
        ("dataset_dict.json", '{"splits": 3}', "dataset_dict.json: damaged: it holds no list splits"),
    ],
)
def test_a_damaged_description_is_refused(tmp_path: Path, name: str, text: str, message: str):
    datasets.Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / name).write_text(text)
    with pytest.raises(DataError, match=message):
        hf_loader(tmp_path / "data", columns={"tokens": "input_ids"}, split=None)


def test_a_class_without_a_name_is_no_technical_batch(tmp_path: Path):
    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int64")), "lane": datasets.ClassLabel(names=["a", "b"])}
    )
    rows = {"input_ids": [[1], [2]], "lane": [0, -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match="column 'lane' has the class -1, which has no name"):
        hf_loader(tmp_path / "data", columns={"tokens": "input_ids"}, technical_batch="lane")


def test_a_folder_without_data_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"no state\.json or Parquet files"):
        hf_loader(tmp_path, columns=GENEFORMER)
