"""Sets of circuits as batches. The numbers R1 to R17 are those of docs/circuits.md."""

import pickle
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from circuit_folders import GATES, SAMPLES, random_circuits, random_unitaries, write_set
from safetensors.numpy import load_file, save_file
from scipy.linalg import block_diag

from data import circuit_merge
from data.circuits import CircuitSource, circuit_loader
from data.errors import DataError
from data.hashing import DrawKey
from data.loader import StepLoader
from data.order import GlobalOrder
from data.size_order import SizeOrder
from data.stored_tensor import StoredTensor

DRAW = DrawKey(3, 1, 0)
PAD = len(GATES) + 1


def said(source: CircuitSource, pattern: str) -> list[int]:
    """Return the numbers of the one notice that fits the pattern."""
    found = [re.search(pattern, notice) for notice in source.notices]
    matches = [match for match in found if match is not None]
    assert len(matches) == 1, source.notices
    return [int(number.replace(",", "")) for number in matches[0].groups()]


def everything(source: CircuitSource) -> dict[str, Any]:
    """Return one batch of all stored circuits."""
    return source.fetch(np.arange(len(source)), DRAW)


def prompts_of(tokens: np.ndarray) -> list[str]:
    return [f"prompt {int((each != 0).sum()) % 3}" for each in tokens]


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write sets `a` of 2 qubits x 5 columns and `b` of 3 qubits x 9 columns, with unitaries."""
    folder = tmp_path_factory.mktemp("two")
    for name, num_qubits, num_columns, seed in (("b", 3, 9, 2), ("a", 2, 5, 1)):
        tokens = random_circuits(40, num_qubits, num_columns, seed)
        unitaries = random_unitaries(40, num_qubits, seed)
        write_set(folder / name, tokens, prompts_of(tokens), unitaries=unitaries)
    return folder


# A single set


def test_a_single_folder_is_read_as_it_is_stored():
    """R5: tokens, gates and sizes come from the folder alone; nothing is padded."""
    source = circuit_loader(SAMPLES / "unitary_3q")
    stored = {
        key: load_file(SAMPLES / "unitary_3q" / "dataset" / f"ds_{key}.safetensors")["0"] for key in "xU"
    }
    labels = torch.load(SAMPLES / "unitary_3q" / "dataset" / "ds_y.pt", weights_only=False)["0"]
    batch = everything(source)
    assert np.array_equal(batch["tokens"], stored["x"]) and batch["tokens"].dtype == torch.int64
    assert np.array_equal(batch["unitary"], stored["U"]) and batch["unitary"].dtype == torch.float32
    assert [source.prompts[index] for index in batch["prompt_idx"]] == labels.tolist()
    assert source.prompts == sorted(set(labels.tolist()))
    assert batch["num_tokens"] == stored["x"].size


def test_the_vocabulary_is_the_gates_background_and_padding():
    """R9: vocab_size is len(gate_pool) + 2, whatever tokens the set happens to have."""
    facts = circuit_loader(SAMPLES / "srv_3q").facts()
    assert facts["gate_pool"] == ["h", "cx", "z", "x", "ccx", "swap"] and facts["vocab_size"] == 8
    assert (facts["num_qubits"], facts["max_length"], facts["num_prompts"]) == (3, 8, len(facts["prompts"]))


def test_facts_say_whether_there_are_unitaries():
    """R10: a model that needs unitaries learns of it here."""
    assert circuit_loader(SAMPLES / "unitary_3q").facts()["has_unitary"] is True
    source = circuit_loader(SAMPLES / "srv_3q")
    assert source.facts()["has_unitary"] is False and "unitary" not in everything(source)


def test_a_batch_has_the_documented_shapes(two_sizes: Path):
    batch = circuit_loader(two_sizes).fetch(np.array([0, 1, 50]), DRAW)
    shapes = {name: list(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    columns = shapes["tokens"][2]
    assert columns % 4 == 0
    assert shapes == {
        "tokens": [3, 3, columns], "prompt_idx": [3], "circuit_size": [3, 2], "noise_seed": [3],
        "unitary": [3, 2, 8, 8],
    }  # fmt: skip
    kinds = {name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert kinds.pop("unitary") == torch.float32 and set(kinds.values()) == {torch.int64}


@pytest.mark.parametrize("module", ["genQC.dataset.circuits_dataset", "my_genQC.dataset", "no_such_module.x"])
def test_a_target_is_matched_by_its_end_and_never_imported(tmp_path: Path, module: str):
    """R5: the kind comes from the target's suffix."""
    tokens = random_circuits(6, 2, 4, 0)
    write_set(tmp_path, tokens, prompts_of(tokens), config={"target": f"{module}.CircuitsConfigDataset"})
    assert len(circuit_loader(tmp_path)) == 6
    assert module.split(".")[0] not in sys.modules


@pytest.mark.parametrize(
    "target", ["os.system", "genQC.pipeline.diffusion_pipeline.DiffusionPipeline", None, 3]
)
def test_a_foreign_target_is_refused_by_name(tmp_path: Path, target: Any):
    """R5: what is no set of circuits is named."""
    write_set(tmp_path, random_circuits(6, 2, 4, 0), ["a"] * 6, config={"target": target})
    with pytest.raises(DataError, match=re.escape(repr(target))):
        circuit_loader(tmp_path)


def test_the_path_of_the_machine_that_wrote_a_set_is_not_used(tmp_path: Path):
    write_set(tmp_path / "a", random_circuits(6, 2, 4, 0), ["a"] * 6, config={"save_path": "/etc/passwd"})
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert len(circuit_loader(tmp_path / "b")) == 6


def test_lengths_are_padded_to_a_multiple_of_four(tmp_path: Path):
    tokens = random_circuits(8, 2, 6, 0, shortest=6)
    source = circuit_loader(write_set(tmp_path, tokens, prompts_of(tokens)))
    found = everything(source)["tokens"].numpy()
    assert np.array_equal(found[:, :, :6], tokens) and (found[:, :, 6:] == PAD).all() and found.shape[2] == 8
    assert source.facts()["max_length"] == 8


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"gate_pool": ["h", "cx"]}, r"circuit \d+ has the token -?3; gate_pool has 2 gates"),
        ({"gate_pool": []}, "gate_pool is"),
        ({"gate_pool": ["h", "cx", "cx"]}, "names a gate twice: h, cx, cx"),
        ({"gate_pool": ["h", "cx", True]}, "gate_pool is"),
        ({"num_of_qubits": 3}, "3 qubits x 4 columns"),
        ({"max_gates": 8}, "2 qubits x 8 columns"),
        ({"max_gates": None}, "max_gates is None"),
        ({"num_of_qubits": 31}, "at most 30"),
        ({"max_params": 2}, "its gates have angles"),
        ({"store_dict": {"x": "tensor"}}, "must name x"),
        ({"store_dict": {"x": "tensor", "y": "numpy", "w": "tensor"}}, "store_dict.w is 'tensor'"),
        ({"store_dict": {"x": "tensor", "y": "list"}}, "store_dict.y is 'list'"),
        (
            {"store_dict": {"x": "tensor", "y": "numpy", "U": "tensor"}},
            "ds_U.safetensors: there is no such file",
        ),
        ({"config": {"save_type": "pt"}}, "save_type is 'pt'"),
        ({"config": {"params": None}}, "no table params"),
    ],
)
def test_a_set_that_does_not_fit_its_config_is_refused(tmp_path: Path, changes: dict[str, Any], why: str):
    """R5: shapes, tokens and files are checked against config.yaml."""
    tokens = random_circuits(30, 2, 4, 0, shortest=4)
    write_set(tmp_path, tokens, prompts_of(tokens), **changes)
    with pytest.raises(DataError, match=why):
        circuit_loader(tmp_path)


def test_labels_and_circuits_must_be_equally_many(tmp_path: Path):
    write_set(tmp_path, random_circuits(6, 2, 4, 0), ["a"] * 5)
    with pytest.raises(DataError, match=r"5 labels \(y\) for 6 circuits"):
        circuit_loader(tmp_path)


def test_prompts_that_a_run_lacks_are_counted(tmp_path: Path):
    tokens = random_circuits(8, 2, 5, seed=1)
    source = circuit_loader(write_set(tmp_path, tokens, ["a", "b"] * 4))
    with pytest.raises(DataError, match="^the run's prompts lack 'b' of the data's$"):
        source.set_prompts(["a"])
    with pytest.raises(DataError, match="^the run's prompts lack 'a' and 1 more of the data's$"):
        source.set_prompts(["c"])


def test_prompts_that_are_stored_as_numbers_are_their_lists(tmp_path: Path):
    tokens = random_circuits(4, 2, 4, 0)
    write_set(tmp_path, tokens, ["unused"] * 4, store_dict={"x": "tensor", "y": "tensor"})
    numbers = np.array([[2, 2], [1, 1], [2, 2], [1, 2]], np.int64)
    save_file({"0": numbers}, tmp_path / "dataset" / "ds_y.safetensors")
    source = circuit_loader(tmp_path)
    assert source.prompts == ["[1, 1]", "[1, 2]", "[2, 2]"]
    assert everything(source)["prompt_idx"].tolist() == [2, 0, 2, 1]


@pytest.mark.parametrize("kind", ["plain", "tag", "list", "nothing"])
def test_a_config_that_is_no_plain_yaml_table_is_refused(tmp_path: Path, kind: str):
    write_set(tmp_path, random_circuits(6, 2, 4, 0), ["a"] * 6)
    text = {"plain": "a: [", "tag": "!!python/object/apply:os.getcwd []", "list": "- 1", "nothing": ""}[kind]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError, match=r"config\.yaml"):
        circuit_loader(tmp_path)


# Unitaries


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_unitaries_of_any_float_are_read_as_float32(tmp_path: Path, kind: type):
    unitaries = random_unitaries(6, 2, 1).astype(kind)
    write_set(tmp_path, random_circuits(6, 2, 4, 0), ["a"] * 6, unitaries=unitaries)
    found = everything(circuit_loader(tmp_path))["unitary"]
    assert found.dtype == torch.float32 and np.array_equal(found, unitaries.astype(np.float32))


@pytest.mark.parametrize("factor", [0.0, 1.01, float("nan")])
def test_matrices_that_are_not_unitary_are_refused(tmp_path: Path, factor: float):
    """R10: a matrix of zeros, which genQC fills in where there is none, is found out too."""
    unitaries = random_unitaries(6, 2, 1)
    unitaries[4] *= factor
    write_set(tmp_path, random_circuits(6, 2, 4, 0), ["a"] * 6, unitaries=unitaries)
    with pytest.raises(DataError, match="circuit 4 is not unitary"):
        circuit_loader(tmp_path)


def test_unitaries_of_another_size_are_refused(tmp_path: Path):
    write_set(tmp_path, random_circuits(6, 2, 4, 0), ["a"] * 6, unitaries=random_unitaries(6, 3, 1))
    with pytest.raises(DataError, match=r"have floats \[6, 2, 4, 4\]"):
        circuit_loader(tmp_path)


def test_unitaries_in_one_set_alone_are_refused(two_sizes: Path, tmp_path: Path):
    """R6: a set without unitaries is named, not filled with zeros."""
    shutil.copytree(two_sizes / "a", tmp_path / "a")
    write_set(tmp_path / "without", random_circuits(6, 3, 4, 0), ["a"] * 6)
    with pytest.raises(DataError, match="without has no unitaries"):
        circuit_loader(tmp_path)


def test_smaller_unitaries_stand_along_the_diagonal(two_sizes: Path):
    """R6: tiled block-diagonally, against numpy's kron and scipy's block_diag."""
    source = circuit_loader(two_sizes)
    small, large = (load_file(two_sizes / n / "dataset" / "ds_U.safetensors")["0"] for n in "ab")
    found = source.fetch(np.array([3, 45]), DRAW)["unitary"].numpy()
    assert np.array_equal(found[1], large[5])
    for part in range(2):
        assert np.array_equal(found[0, part], np.kron(np.eye(2), small[3, part]))
        assert np.array_equal(found[0, part], block_diag(small[3, part], small[3, part]))
    alone = source.fetch(np.array([3, 4]), DRAW)["unitary"].numpy()
    assert np.array_equal(alone, small[3:5])  # not larger than the batch's own qubits


# A folder of folders


def test_a_folder_of_folders_is_merged_in_the_order_of_names(two_sizes: Path, tmp_path: Path):
    """R6: sorted; files are ignored, folders that are no data sets skipped and named."""
    for name in "ab":
        shutil.copytree(two_sizes / name, tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "logs").mkdir()
    shutil.copytree(two_sizes / "a", tmp_path / "half", ignore=shutil.ignore_patterns("dataset"))
    source = circuit_loader(tmp_path)
    assert [each.folder.name for each in source.table.sets] == ["a", "b"] and len(source) == 80
    assert any("skipped half, logs" in notice for notice in source.notices)
    assert not any("notes" in notice for notice in source.notices)
    assert source.fingerprint() == circuit_loader(two_sizes).fingerprint()


def test_merged_circuits_are_padded_as_genqc_pads_them(two_sizes: Path):
    """R6: qubits to the largest, columns to the longest rounded up to 4, what no circuit fills is token N + 1."""
    source = circuit_loader(two_sizes)
    stored = [load_file(two_sizes / name / "dataset" / "ds_x.safetensors")["0"] for name in "ab"]
    for rows in (np.array([1, 2, 5]), np.array([0, 41, 79]), np.arange(80)):
        circuits = [stored[row // 40][row % 40] for row in rows]
        lengths = [max(int(np.count_nonzero(np.abs(each).sum(axis=0))), 1) for each in circuits]
        expected = np.full((len(rows), max(map(len, circuits)), -(-max(lengths) // 4) * 4), PAD)
        for place, (circuit, length) in enumerate(zip(circuits, lengths, strict=True)):
            expected[place, : len(circuit), :length] = circuit[:, :length]
        batch = source.fetch(rows, DRAW)
        assert np.array_equal(batch["tokens"], expected)
        sizes = [[len(circuit), length] for circuit, length in zip(circuits, lengths, strict=True)]
        assert batch["circuit_size"].tolist() == sizes
        assert batch["num_tokens"] == (expected != PAD).sum()
    assert source.facts()["num_qubits"] == 3 and source.facts()["max_length"] == 12


def test_different_gate_pools_are_refused_by_the_names_of_their_folders(tmp_path: Path):
    """R6: one token would mean two gates; the order counts."""
    write_set(tmp_path / "one", random_circuits(6, 2, 4, 0), ["a"] * 6)
    write_set(tmp_path / "two", random_circuits(6, 2, 4, 0), ["a"] * 6, gates=("cx", "h", "swap"))
    with pytest.raises(
        DataError, match=r"one and .*two have different gate pools \(h, cx, swap and cx, h, swap\)"
    ):
        circuit_loader(tmp_path)


def test_a_foreign_set_among_others_is_refused(two_sizes: Path, tmp_path: Path):
    """R6: what looks like a data set and is none is an error, not skipped."""
    shutil.copytree(two_sizes / "a", tmp_path / "a")
    write_set(
        tmp_path / "images", random_circuits(6, 2, 4, 0), ["a"] * 6, config={"target": "x.ImageDataset"}
    )
    with pytest.raises(DataError, match=r"images.*'x.ImageDataset'"):
        circuit_loader(tmp_path)


def test_a_folder_without_any_set_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="there is no such folder"):
        circuit_loader(tmp_path / "nowhere")
    (tmp_path / "logs").mkdir()
    with pytest.raises(DataError, match=r"none of its folders \(logs\) is a data set"):
        circuit_loader(tmp_path)


# Sets that genQC merged


def stored_as_mixed(two_sizes: Path, folder: Path, bucket: int) -> Path:
    """Write the two sets as genQC stores them when it has merged them, shuffled; of whole buckets where it has any."""
    stored = [
        {key: load_file(two_sizes / n / "dataset" / f"ds_{key}.safetensors")["0"] for key in "xU"}
        for n in "ab"
    ]
    x, u, z, y = np.full((80, 3, 12), PAD, np.int32), np.zeros((80, 2, 8, 8), np.float32), [], []
    for row in range(80):
        circuit, matrix = stored[row // 40]["x"][row % 40], stored[row // 40]["U"][row % 40]
        length = max(int(np.count_nonzero(np.abs(circuit).sum(axis=0))), 1)
        x[row, : len(circuit), :length] = circuit[:, :length]
        for part in range(2):
            u[row, part] = block_diag(*[matrix[part]] * (8 // len(matrix[part])))
        z.append([len(circuit), -(-length // 4) * 4])
        y.append(prompts_of(circuit[None])[0])
    order = np.random.default_rng(0).permutation(80)
    arrays = [each[order] for each in (x, u, np.array(z, np.int32), np.array(y))]
    if bucket > 0:
        arrays = [each.reshape(80 // bucket, bucket, *each.shape[1:]) for each in arrays]
    return write_set(
        folder, arrays[0], arrays[3], unitaries=arrays[1], sizes=arrays[2],
        config={"target": "genQC.dataset.circuits_dataset.MixedCircuitsConfigDataset"},
        pad_constant=PAD, bucket_batch_size=bucket, model_scale_factor=4, collate_fn="cut_padding_collate_fn",
    )  # fmt: skip


def by_content(source: CircuitSource) -> dict[tuple[int, str], tuple[Any, ...]]:
    """Return each circuit's batch of one by its content and prompt."""
    batches = [source.fetch(np.array([row]), DRAW) for row in range(len(source))]
    return {
        (int(source.table.content[row]), source.prompts[int(batch["prompt_idx"])]): (
            batch["tokens"].tolist(), batch["unitary"].tolist(), batch["circuit_size"].tolist(),
        )
        for row, batch in enumerate(batches)
    }  # fmt: skip


@pytest.mark.parametrize("bucket", [-1, 8])
def test_a_set_that_genqc_merged_gives_what_its_parts_give(two_sizes: Path, tmp_path: Path, bucket: int):
    """R6: `Mixed` sets, padded to the maximum (-1) or in buckets, with z; the same circuits, unitaries and sizes."""
    merged = circuit_loader(stored_as_mixed(two_sizes, tmp_path / "mixed", bucket))
    parts = circuit_loader(two_sizes)
    assert by_content(merged) == by_content(parts)
    assert merged.facts() == parts.facts()


def test_a_merged_set_may_be_one_of_a_folder_of_sets(two_sizes: Path, tmp_path: Path):
    """R6: and what both hold counts once."""
    stored_as_mixed(two_sizes, tmp_path / "mixed", -1)
    shutil.copytree(two_sizes / "a", tmp_path / "a")
    source = circuit_loader(tmp_path)
    assert said(source, r"^([\d,]+) circuits left out: another has the same") == [40]
    assert said(source, r"([\d,]+) circuits for training, ([\d,]+) for validation") == [
        int(source.row_mask.sum()), 80 - int(source.row_mask.sum()),
    ]  # fmt: skip


@pytest.mark.parametrize("pad", [0, 3, -2, None, "4"])
def test_padding_that_a_gate_has_is_refused(two_sizes: Path, tmp_path: Path, pad: Any):
    folder = stored_as_mixed(two_sizes, tmp_path / "mixed", -1)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["params"]["pad_constant"] = pad
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(DataError, match="pad_constant is"):
        circuit_loader(folder)


def test_another_padding_token_than_ours_is_translated(two_sizes: Path, tmp_path: Path):
    folder = stored_as_mixed(two_sizes, tmp_path / "mixed", -1)
    expected = everything(circuit_loader(folder))["tokens"]
    path = folder / "dataset" / "ds_x.safetensors"
    tokens = load_file(path)["0"]
    tokens[tokens == PAD] = 99
    save_file({"0": tokens}, path)
    config = (folder / "config.yaml").read_text().replace(f"pad_constant: {PAD}", "pad_constant: 99")
    (folder / "config.yaml").write_text(config)
    assert torch.equal(everything(circuit_loader(folder))["tokens"], expected)


def test_recorded_sizes_that_are_not_those_of_the_circuits_are_refused(two_sizes: Path, tmp_path: Path):
    folder = stored_as_mixed(two_sizes, tmp_path / "mixed", -1)
    path = folder / "dataset" / "ds_z.safetensors"
    save_file({"0": load_file(path)["0"][::-1].copy()}, path)
    with pytest.raises(DataError, match=r"but ds_z says \["):
        circuit_loader(folder)


def test_padding_between_gates_is_refused(two_sizes: Path, tmp_path: Path):
    folder = stored_as_mixed(two_sizes, tmp_path / "mixed", -1)
    path = folder / "dataset" / "ds_x.safetensors"
    tokens = load_file(path)["0"]
    row = int(np.flatnonzero((tokens != PAD).all(axis=1).sum(axis=1) > 2)[0])
    tokens[row, 0, 1] = PAD
    save_file({"0": tokens}, path)
    with pytest.raises(DataError, match=rf"circuit {row} has padding \({PAD}\) between its gates"):
        circuit_loader(folder)


def test_sets_that_genqc_itself_merged_are_read(two_sizes: Path, tmp_path: Path):
    """R6: by genQC 0.2.5, where it is installed; 40 circuits fill buckets of 8, so that it drops none."""
    genqc = pytest.importorskip("genQC.dataset.circuits_dataset")
    parts = circuit_loader(two_sizes)
    expected = by_content(parts)
    for bucket in (-1, 8):
        datasets = [
            genqc.CircuitsConfigDataset.from_config_file(
                str(two_sizes / name / "config.yaml"),
                torch.device("cpu"),
                str(two_sizes / name / "dataset/ds"),
            )
            for name in "ab"
        ]
        written = genqc.MixedCircuitsConfigDataset.from_datasets(
            datasets, [1000, 1000], PAD, bucket_batch_size=bucket, max_samples=[1000, 1000], optimized=True,
            dataset_to_gpu=False, gate_pool=list(GATES), model_scale_factor=4, max_params=0,
        )  # fmt: skip
        found = {}
        for number, dataset in enumerate(written):
            folder = tmp_path / f"{bucket}_{number}"
            dataset.save_dataset(str(folder / "config.yaml"), str(folder / "dataset" / "ds"))
            found |= by_content(circuit_loader(folder))
        assert found == expected


# Which circuits take part


def test_the_same_circuit_with_the_same_prompt_counts_once_wherever_it_is_stored(tmp_path: Path):
    """R6: deduplicated over sets whose stored lengths differ, and counted."""
    tokens = random_circuits(20, 2, 4, 0)
    longer = np.pad(tokens[5:15], ((0, 0), (0, 0), (0, 4)))
    write_set(tmp_path / "a", np.concatenate([tokens, tokens[:3]]), ["x"] * 23)
    write_set(tmp_path / "b", longer, ["x"] * 6 + ["y"] * 4)
    source = circuit_loader(tmp_path, val_fraction=0.0)
    assert said(source, r"^([\d,]+) circuits left out: another has the same") == [9]
    assert source.row_mask is not None and source.row_mask.sum() == 24
    kept = circuit_loader(tmp_path, val_fraction=0.0, deduplicate=False)
    assert kept.row_mask is not None and kept.row_mask.sum() == 33
    assert not any("left out" in notice for notice in kept.notices)


def test_the_same_gates_on_more_qubits_are_another_circuit(tmp_path: Path):
    tokens = random_circuits(10, 2, 4, 0)
    write_set(tmp_path / "a", tokens, ["x"] * 10)
    write_set(tmp_path / "b", np.pad(tokens, ((0, 0), (0, 1), (0, 0))), ["x"] * 10)
    source = circuit_loader(tmp_path, val_fraction=0.0)
    assert source.row_mask is not None and source.row_mask.all()


def test_circuits_that_share_a_hash_by_chance_are_all_kept(tmp_path: Path):
    tokens = random_circuits(30, 2, 4, 0)
    table = circuit_loader(write_set(tmp_path, tokens, ["x"] * 30)).table
    table.content = np.zeros_like(table.content)
    assert circuit_merge.without_duplicates(table).all()


def test_no_prompt_has_more_circuits_than_balance_max(tmp_path: Path):
    """R6: a cap for each prompt, a seeded choice, and counted."""
    tokens = random_circuits(60, 2, 5, 0)
    labels = ["a"] * 40 + ["b"] * 15 + ["c"] * 5
    write_set(tmp_path, tokens, labels)
    sources = [
        circuit_loader(tmp_path, balance_max=10, val_fraction=0.0, split_seed=seed) for seed in (1, 1, 2)
    ]
    masks = [source.row_mask for source in sources]
    assert all(mask is not None for mask in masks)
    chosen = np.array(labels)[masks[0]].tolist()
    assert [chosen.count(name) for name in "abc"] == [10, 10, 5]
    assert np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[0], masks[2])
    assert said(sources[0], r"^([\d,]+) circuits left out: their prompt has more than 10") == [35]


def test_max_samples_is_a_seeded_choice_and_counted(tmp_path: Path):
    write_set(tmp_path, random_circuits(60, 2, 5, 0), ["a"] * 60)
    sources = [
        circuit_loader(tmp_path, max_samples=20, val_fraction=0.0, split_seed=seed) for seed in (1, 1, 2)
    ]
    masks = [source.row_mask for source in sources]
    assert [int(mask.sum()) for mask in masks if mask is not None] == [20] * 3
    assert np.array_equal(masks[0], masks[1]) and not np.array_equal(masks[0], masks[2])
    assert said(sources[0], r"^([\d,]+) circuits left out: more than 20 are left") == [40]


def test_every_circuit_is_trained_on_held_out_or_counted_as_left_out():
    """R6: nothing is dropped in silence, as genQC drops 5 % of what it merges."""
    source = circuit_loader(SAMPLES / "srv_mixed", balance_max=40, max_samples=200)
    left_out = [
        int(notice.split(" ")[0].replace(",", "")) for notice in source.notices if "left out" in notice
    ]
    parts = said(source, r"^([\d,]+) circuits for training, ([\d,]+) for validation")
    assert len(left_out) == 2 and sum(left_out) + sum(parts) == 1179
    whole = circuit_loader(SAMPLES / "srv_mixed")
    assert sum(said(whole, r"^([\d,]+) circuits for training, ([\d,]+) for validation")) == 1179


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"padding": "none"}, "padding is 'none'; it must be max | bucket"),
        ({"balance_max": 0}, "balance_max is 0"),
        ({"max_samples": 2.5}, "max_samples is 2.5"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"deduplicate": "yes"}, "deduplicate is 'yes'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], why: str):
    with pytest.raises(DataError, match=re.escape(why)):
        circuit_loader(SAMPLES / "srv_3q", **options)


# The split


def parts(source: CircuitSource) -> tuple[np.ndarray, np.ndarray]:
    assert source.row_mask is not None and source.validation is not None
    assert source.validation.row_mask is not None
    return source.row_mask, source.validation.row_mask


def test_the_split_is_disjoint_seeded_and_of_the_share_that_was_asked_for():
    """R7: 0.1 by default, equal wherever it is computed, another one under another seed."""
    training, validation = parts(circuit_loader(SAMPLES / "srv_3q"))
    assert not (training & validation).any() and (training | validation).all()
    assert 0.07 < validation.mean() < 0.13
    again, other = (parts(circuit_loader(SAMPLES / "srv_3q", split_seed=seed))[1] for seed in (0, 1))
    assert np.array_equal(validation, again) and not np.array_equal(validation, other)


def test_equal_circuits_are_never_on_both_sides(tmp_path: Path):
    """R7: nor with another prompt, since a model would have seen the circuit."""
    tokens = random_circuits(100, 2, 6, 0)
    write_set(tmp_path, np.concatenate([tokens, tokens]), ["a"] * 150 + ["b"] * 50)
    training, validation = parts(circuit_loader(tmp_path, deduplicate=False, val_fraction=0.3))
    assert 30 < validation.sum() < 90
    assert np.array_equal(validation[:100], validation[100:])


def test_a_held_out_circuit_is_held_out_whatever_it_is_merged_with():
    """R7: the stages of a curriculum do not train on each other's validation circuits."""
    alone, merged = circuit_loader(SAMPLES / "srv_mixed" / "3q"), circuit_loader(SAMPLES / "srv_mixed")
    assert np.array_equal(parts(alone)[1], parts(merged)[1][:583])
    few = circuit_loader(SAMPLES / "srv_mixed", max_samples=300)
    assert not (parts(few)[0] & parts(merged)[1]).any()


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_sides_have_a_circuit(tmp_path: Path, fraction: float):
    write_set(tmp_path, random_circuits(12, 2, 4, 0), ["a"] * 12)
    training, validation = parts(circuit_loader(tmp_path, val_fraction=fraction))
    assert min(training.sum(), validation.sum()) == 1


def test_noise_differs_by_circuit_and_epoch_and_stays_in_validation():
    source = circuit_loader(SAMPLES / "srv_3q")
    rows = np.arange(50)
    first, again, later = (
        source.fetch(rows, DRAW._replace(epoch=epoch))["noise_seed"] for epoch in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, later)
    assert len(set(first.tolist())) == 50 and first.min() >= 0
    assert source.validation is not None
    held = [source.validation.fetch(rows, DRAW._replace(epoch=epoch))["noise_seed"] for epoch in (0, 1)]
    assert torch.equal(held[0], held[1])


# Order and batches


def loader(source: CircuitSource, world_size: int, rank: int, micro: int = 4, size: int = 24) -> StepLoader:
    order = source.batch_order(1, 0, size) or GlobalOrder(
        len(source), seed=1, phase=0, block=1, window=64, selected=source.row_mask
    )
    return StepLoader(
        source, order, draw_seed=1, phase=0, global_batch_size=size, micro_batch_size=micro, rank=rank,
        world_size=world_size, prefetch=0,
    )  # fmt: skip


def steps_of(source: CircuitSource, world_size: int, *span: int, micro: int = 4) -> list[list[int]]:
    """Return the rows of each global batch of the second epoch, sorted, out of all ranks' micro-batches."""
    steps: dict[int, list[int]] = {}
    for rank in range(world_size):
        for number, step in enumerate(loader(source, world_size, rank, micro).steps(1, *span)):
            rows = steps.setdefault(number, [])
            for part in step:
                rows += part.rows[: part.num_cells].tolist()
    return [sorted(steps[number]) for number in sorted(steps)]


@pytest.mark.parametrize("padding", ["max", "bucket"])
def test_global_batches_are_the_same_on_any_number_of_ranks_and_every_circuit_comes_once(padding: Any):
    """R7: batch sizes are honoured, and all ranks take equally many steps."""
    source = circuit_loader(SAMPLES / "srv_mixed", padding=padding)
    alone = steps_of(source, 1)
    assert alone == steps_of(source, 2) == steps_of(source, 3, micro=8) == steps_of(source, 1, micro=24)
    assert sorted(sum(alone, [])) == np.flatnonzero(source.row_mask).tolist()
    assert [len(step) for step in alone[:-1]] == [24] * (len(alone) - 1)
    assert {len(list(loader(source, 2, rank).steps(1))) for rank in range(2)} == {len(alone)}


def batches_of(
    source: CircuitSource, world_size: int, micro: int, *, evaluates: bool = False
) -> dict[int, Any]:
    """Return the tokens and unitaries of each circuit as a pass over them gives it, without what only fills a step."""
    found = {}
    for rank in range(world_size):
        each = loader(source, world_size, rank, micro)
        for step in each.evaluation_steps() if evaluates else each.steps(1):
            for part in step:
                for place, row in enumerate(part.rows[: part.num_cells].tolist()):
                    found[row] = [
                        part.batch[key][place].tolist() for key in ("tokens", "unitary", "noise_seed")
                    ]
    return found


@pytest.mark.parametrize("padding", ["max", "bucket"])
def test_the_padding_of_a_circuit_depends_on_its_global_batch_alone(two_sizes: Path, padding: Any):
    """R6: cut back to the longest of the batch, which is the optimizer step's; noise and loss depend on the shape."""
    source = circuit_loader(two_sizes, padding=padding)
    alone = batches_of(source, 1, 24)
    assert alone == batches_of(source, 2, 4) == batches_of(source, 3, 8) == batches_of(source, 1, 1)
    assert len({sum(tokens, []).count(PAD) for tokens, *_ in alone.values()}) > 1


def test_validation_is_padded_alike_on_any_number_of_ranks(two_sizes: Path):
    source = circuit_loader(two_sizes, val_fraction=0.5).validation
    assert source is not None
    alone = batches_of(source, 1, 4, evaluates=True)
    assert alone == batches_of(source, 3, 2, evaluates=True)
    assert {(len(tokens), len(tokens[0])) for tokens, *_ in alone.values()} == {(3, 12)}


@pytest.mark.parametrize("padding", ["max", "bucket"])
def test_an_epoch_goes_on_at_a_step(padding: Any):
    source = circuit_loader(SAMPLES / "srv_mixed", padding=padding)
    assert steps_of(source, 2, 7) == steps_of(source, 1)[7:]


def test_buckets_give_global_batches_of_one_size():
    """R6: bucketed batches, as far as a size has circuits enough; what is left mixes neighbouring sizes."""
    source = circuit_loader(SAMPLES / "srv_mixed", padding="bucket")
    order = source.batch_order(1, 0, 24)
    assert order is not None
    num_mixed = order.num_mixed_rows
    assert 0 < num_mixed < 24 * 5  # 2 + 3 sizes
    for epoch in range(2):
        shapes = []
        for rank in range(2):
            for number, step in enumerate(loader(source, 2, rank).steps(epoch)):
                for part in step:
                    sizes = part.batch["circuit_size"]
                    columns = -(-sizes[:, 1] // 4) * 4
                    shapes += [(number, int(q), int(c)) for q, c in zip(sizes[:, 0], columns, strict=True)]
        by_step: dict[int, set[tuple[int, int]]] = {}
        for number, *shape in shapes:
            by_step.setdefault(number, set()).add(tuple(shape))
        pure = sum(len(found) == 1 for found in by_step.values())
        assert pure >= len(by_step) - -(-num_mixed // 24)
        assert max(by_step) + 1 == order.num_windows
    assert not np.array_equal(order.rows(0, 0, 99), order.rows(1, 0, 99))


def test_one_size_shows_in_its_batches_without_any_padding():
    source = circuit_loader(SAMPLES / "srv_mixed", padding="bucket")
    order = source.batch_order(1, 0, 24)
    assert order is not None
    num_padded = 0
    for start in range(0, order.num_rows // 24 * 24, 24):
        batch = source.fetch(order.rows(0, start, start + 24), DRAW)
        whole = batch["tokens"].numel()
        needed = int((batch["circuit_size"][:, 0] * (-(-batch["circuit_size"][:, 1] // 4) * 4)).sum())
        num_padded += whole != needed
    assert num_padded <= -(-order.num_mixed_rows // 24)


def test_an_order_by_size_is_a_function_of_its_seed():
    sizes = np.array([3, 1, 2] * 30)
    first, again, other = (SizeOrder(sizes, seed, 0, 8) for seed in (1, 1, 2))
    travelled = pickle.loads(pickle.dumps(first))
    for epoch in (0, 3):
        rows = first.rows(epoch, 0, 90)
        assert sorted(rows.tolist()) == list(range(90))
        assert np.array_equal(rows, again.rows(epoch, 0, 90)) and np.array_equal(
            rows, travelled.rows(epoch, 0, 90)
        )
        assert not np.array_equal(rows, other.rows(epoch, 0, 90))
        windows = [first.window_rows(epoch, window) for window in range(first.num_windows)]
        assert np.array_equal(np.concatenate(windows), rows) and len(windows[-1]) == 2
        assert all(first.window_start(epoch, first.window_at(epoch, place)) <= place for place in range(90))
    assert first.num_mixed_rows == 18


def test_all_of_a_data_set_smaller_than_a_global_batch_is_trained_on(tmp_path: Path):
    tokens = random_circuits(10, 2, 8, 0)
    source = circuit_loader(write_set(tmp_path / "in" / "a", tokens, ["x"] * 10).parent, padding="bucket")
    assert sum(map(len, steps_of(source, 2))) == parts(source)[0].sum()


def test_a_source_travels_to_another_process_without_its_tensors():
    source = circuit_loader(SAMPLES / "unitary_3q")
    expected = everything(source)
    packed = pickle.dumps(source)
    assert len(packed) < 60_000 < (SAMPLES / "unitary_3q" / "dataset" / "ds_U.safetensors").stat().st_size
    found = everything(pickle.loads(packed))
    assert all(torch.equal(found[key], expected[key]) for key in expected if key != "num_tokens")


def test_the_fingerprint_follows_content_and_options_not_places(two_sizes: Path, tmp_path: Path):
    shutil.copytree(two_sizes, tmp_path / "copy")
    first = circuit_loader(two_sizes).fingerprint()
    assert first == circuit_loader(tmp_path / "copy").fingerprint()
    assert first != circuit_loader(two_sizes, padding="bucket").fingerprint()
    assert first != circuit_loader(two_sizes, balance_max=3).fingerprint()
    unitaries = random_unitaries(40, 2, 9)
    save_file({"0": unitaries}, tmp_path / "copy" / "a" / "dataset" / "ds_U.safetensors")
    assert first != circuit_loader(tmp_path / "copy").fingerprint()


# Tensors on disk


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.float16, np.float64])
def test_rows_of_a_stored_tensor_are_those_that_were_saved(tmp_path: Path, kind: type):
    array = np.arange(60).reshape(10, 2, 3).astype(kind)
    save_file({"other": np.zeros(3), "0": array}, tmp_path / "t.safetensors", metadata={"format": "pt"})
    stored = StoredTensor(tmp_path / "t.safetensors")
    assert stored.shape == (10, 2, 3) and stored.dtype == kind
    assert np.array_equal(stored.rows(np.array([7, 0, 7])), array[[7, 0, 7]])
    stored.flatten_rows()
    assert np.array_equal(stored.rows(slice(3, 5)), array.reshape(20, 3)[3:5])


def with_header(path: Path, header: bytes) -> Path:
    """Write a file of a header and 16 bytes of zeros."""
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    return path


def test_a_header_that_fits_is_read(tmp_path: Path):
    header = b'{"0":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    stored = StoredTensor(with_header(tmp_path / "t.safetensors", header))
    assert stored.rows(slice(None)).tolist() == [0] * 4


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b'{"0":{"dtype":"F32","shape":[4],"data_offsets":[0,17]}}', "are said to lie"),
        (b'{"0":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}', "are said to lie"),
        (b'{"0":{"dtype":"F32","shape":[4],"data_offsets":[-16,0]}}', "are said to lie"),
        (b'{"0":{"dtype":"F32","shape":[-2,-2],"data_offsets":[0,16]}}', "its shape is"),
        (b'{"0":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}', "nothing in it"),
        (b'{"0":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}', "its numbers are F8_E4M3"),
        (b'{"0":{"dtype":"F32","shape":4,"data_offsets":[0,16]}}', "damaged"),
        (b'{"0":[]}', "damaged"),
        (b'{"x":{}}', "no tensor '0'; it has: x"),
        (b"[1]", "no safetensors file"),
        (b"{", "no safetensors file"),
        (b"[" * 100_000, "no safetensors file"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: bytes, why: str):
    path = with_header(tmp_path / "t.safetensors", header)
    with pytest.raises(DataError, match=why):
        StoredTensor(path)


def test_a_file_shorter_than_its_header_is_refused(tmp_path: Path):
    path = tmp_path / "t.safetensors"
    for content in (b"", b"1234", (1 << 60).to_bytes(8, "little"), (200).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="no safetensors file"):
            StoredTensor(path)
