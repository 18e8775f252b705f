"""State files give back the tree that was saved, and refuse what is not one."""

import json
import math
import pickle
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.errors import CheckpointError, UserError
from trainer.statefile import load_tree, save_tree, to_host


def same(left: Any, right: Any) -> bool:
    """Whether two trees are equal in values, types, key order and tensor bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float) and math.isnan(left):
        return math.isnan(right)
    if isinstance(left, float) and left == 0:
        return right == 0 and math.copysign(1, left) == math.copysign(1, right)
    return left == right


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def round_trip(tmp_path: Path, tree: Any) -> Any:
    save_tree(tmp_path / "state.safetensors", tree)
    return load_tree(tmp_path / "state.safetensors")


PLAIN_TREES = {
    "none": None,
    "booleans_stay_booleans": [True, False, 1, 0],
    "floats_keep_every_bit": [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e22, 3.0],
    "non_finite_floats": {"a": float("nan"), "b": float("inf"), "c": -float("inf")},
    "big_integers": [2**63 - 1, -(2**63), 2**63, -(2**200), 10**6000],
    "integer_keys": {0: "a", -5: "b", 2**70: "c", "0": "d"},
    "tuples_and_lists": [(1, [2, (3,)], ()), [], [[]], {}],
    "bytes": [b"", b"\x00\xff" * 5],
    "text": ["", "naïve 細胞", 'quote " backslash \\ null \x00', "\ud800", "NaN"],
    "ordered_mappings": OrderedDict(z=1, a=Counter({3: 2, 1: 1})),
    "keys_like_tags": {"tensor": "x", "tuple": [1], "dict": {"int": "0x1"}, "__metadata__": 2},
}


@pytest.mark.parametrize("name", PLAIN_TREES)
def test_plain_values_come_back_equal(tmp_path: Path, name: str) -> None:
    assert same(round_trip(tmp_path, PLAIN_TREES[name]), PLAIN_TREES[name])


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.complex64, torch.complex128, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    width = torch.empty(0, dtype=dtype).element_size()
    raw = torch.arange(12 * width, dtype=torch.int64).mul(37).byte()
    if dtype == torch.bool:
        raw = raw % 2
    full = raw.view(dtype).reshape(3, 4)
    tree = {
        "full": full,
        "scalar": full[1, 1],
        "empty": full[:0],
        "odd": full.reshape(-1)[:5],
        "turned": full.t(),
    }
    restored = round_trip(tmp_path, tree)
    assert same(restored, tree)
    assert restored["scalar"].shape == () and restored["empty"].shape == (0, 4)


def test_expanded_and_strided_tensors_come_back_with_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 4)
    tree = [base[:, ::2, 1:3], base[0, 0].expand(5, 4), base.permute(2, 0, 1), torch.tensor([1 + 2j]).conj()]
    assert same(round_trip(tmp_path, tree), tree)


def test_numpy_arrays_and_numbers_come_back(tmp_path: Path) -> None:
    state = np.random.RandomState(3).get_state(legacy=False)
    assert same(round_trip(tmp_path, state), state)
    restored = round_trip(tmp_path, [np.float64(0.1), np.int64(3), np.bool_(True)])
    assert same(restored, [0.1, 3, True])


def test_optimizer_state_comes_back_and_loads(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tree = {"model": layer.state_dict(), "optimizer": optimizer.state_dict()}
    restored = round_trip(tmp_path, tree)
    assert same(restored["optimizer"], tree["optimizer"])
    assert type(restored["model"]) is OrderedDict and same(restored["model"], tree["model"])
    optimizer.load_state_dict(restored["optimizer"])
    layer.load_state_dict(restored["model"])


def test_what_is_left_out_is_not_read(tmp_path: Path) -> None:
    save_tree(tmp_path / "t", {"step": 3, "moments": {"w": torch.ones(2)}, "kept": {"moments": 1}})
    assert load_tree(tmp_path / "t", leave_out=("moments",)) == {"step": 3, "kept": {"moments": 1}}


def test_aliased_tensors_come_back_as_one_tensor(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4))
    tree = {
        "embedding": weight,
        "head": weight.detach(),
        "turned": weight.t(),
        "row": weight[0],
        "copy": weight.clone(),
    }
    restored = round_trip(tmp_path, tree)
    assert restored["embedding"] is restored["head"]
    others = [restored["turned"], restored["row"], restored["copy"]]
    assert len({tensor.data_ptr() for tensor in [restored["head"], *others]}) == 4
    assert torch.equal(restored["turned"], weight.t()) and torch.equal(restored["row"], weight[0])
    assert type(restored["embedding"]) is torch.Tensor


def test_aliased_tensors_of_a_dtype_stored_as_bytes_come_back_as_one_tensor(tmp_path: Path) -> None:
    tensor = torch.ones(2, dtype=torch.complex128)
    restored = round_trip(tmp_path, [tensor, tensor])
    assert restored[0] is restored[1]


def test_different_empty_tensors_are_not_taken_for_aliases(tmp_path: Path) -> None:
    restored = round_trip(tmp_path, [torch.empty(0), torch.empty(0), torch.empty(0, 7)])
    assert restored[0] is not restored[1] and restored[2].shape == (0, 7)


def test_paths_that_spell_the_same_are_kept_apart(tmp_path: Path) -> None:
    tree = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "a.b#2": torch.tensor(3), 0: torch.tensor(4)}
    tree |= {
        "0": torch.tensor(5),
        "__metadata__": torch.tensor(6),
        "\ud800": torch.tensor(7),
        "?": torch.tensor(8),
    }
    assert same(round_trip(tmp_path, tree), tree)
    assert same(round_trip(tmp_path, torch.tensor(7)), torch.tensor(7))


def test_a_flat_dict_is_an_ordinary_safetensors_file_of_weights(tmp_path: Path) -> None:
    weights = {"encoder.weight": torch.randn(2, 3), "encoder.bias": torch.randn(3).bfloat16()}
    save_tree(tmp_path / "model.safetensors", weights)
    loaded = load_file(tmp_path / "model.safetensors")
    assert same(dict(sorted(loaded.items())), dict(sorted(weights.items())))


def test_size_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    import hashlib

    facts = save_tree(
        tmp_path / "state.safetensors", {"a": torch.randn(1000), "b": torch.ones(3, dtype=torch.int8)}
    )
    data = (tmp_path / "state.safetensors").read_bytes()
    assert facts == (len(data), hashlib.sha256(data).hexdigest())


def test_bytes_that_a_tree_names_many_times_take_their_memory_once(tmp_path: Path) -> None:
    metadata = {"format": "cellphase-tree-1", "tree": json.dumps([{"bytes": "a"}] * 10_000)}
    save_file(
        {"a": torch.zeros(1_000_000, dtype=torch.uint8)}, tmp_path / "state.safetensors", metadata=metadata
    )
    found = load_tree(tmp_path / "state.safetensors")
    assert len(found) == 10_000 and len({id(value) for value in found}) == 1


def test_loaded_tensors_do_not_hang_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tree(path, torch.arange(5000))
    restored = load_tree(path)
    with open(path, "r+b") as file:
        file.truncate(0)
    assert torch.equal(restored, torch.arange(5000))


class Marker:
    pass


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"opt": {"state": {3: {"foo": Marker()}}}}, r"opt\.state\.3\.foo is a value of type .*Marker"),
        ([0, {"names": {"a", "b"}}], r"1\.names is a value of type set"),
        ({"a": defaultdict(int)}, r"a is a value of type collections\.defaultdict"),
        ({"a": torch.Size([1])}, r"a is a value of type torch\.Size"),
        ({"a": {(1, 2): 3}}, r"a\.\(1, 2\) is a key of type tuple"),
        ({True: 3}, r"True is a key of type bool"),
        ({"a": 1j}, r"a is a value of type complex"),
        ({"a": np.array(["x"])}, r"a is an array of <U1"),
        ({"a": np.array([1j])}, r"a is an array of complex128"),
        ({"a": torch.eye(2).to_sparse()}, r"a is a tensor of a kind .*\(torch\.sparse_coo\)"),
        ({"a": torch.empty(2, device="meta")}, r"a is a tensor of a kind that cannot be saved \(meta\)"),
        (Marker(), r"the state is a value of type .*Marker"),
    ],
)  # fmt: skip
def test_unsupported_objects_are_named_with_their_path(tmp_path: Path, tree: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        save_tree(tmp_path / "state.safetensors", tree)
    with pytest.raises(UserError, match=message):
        to_host(tree)


def test_a_tree_that_contains_itself_is_refused(tmp_path: Path) -> None:
    tree: list[Any] = []
    tree.append(tree)
    with pytest.raises(UserError, match="contains itself"):
        save_tree(tmp_path / "state.safetensors", tree)


def test_a_pickle_with_the_name_of_a_state_file_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"state\.safetensors: not a readable safetensors file"):
        load_tree(path)
    torch.save({"a": Bomb(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match=r"state\.safetensors: not a readable safetensors file"):
        load_tree(path)
    assert not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tree(path, {"a": torch.arange(3), "b": "text"})
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            load_tree(path)


def test_foreign_safetensors_missing_files_and_folders_are_errors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="not a state file of this program"):
        load_tree(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="no such file"):
        load_tree(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_tree(tmp_path)


@pytest.mark.parametrize(
    "skeleton",
    [
        '{"tensor":"b"}', '{"tensor":["a"]}', '{"tensor":"a","dtype":"torch.Tensor","shape":[1]}',
        '{"tensor":"a","dtype":"os.system","shape":[1]}',
        '{"tensor":"a","dtype":"torch.complex128","shape":[9]}', '{"object":"os.system"}',
        '{"dict":[[[1],2]]}', '{"dict":[1]}', '{"int":"x"}', '{"float":[]}', "{}", "[",
        '{"array":{}}', '{"counter":[["a"]]}', '{"tuple":1}', "[" * 100_000 + "]" * 100_000, "1" * 5000,
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_a_hostile_tree_is_an_error(tmp_path: Path, skeleton: str) -> None:
    path = tmp_path / "state.safetensors"
    save_file({"a": torch.ones(2)}, path, metadata={"format": "cellphase-tree-1", "tree": skeleton})
    with pytest.raises(CheckpointError, match=r"state\.safetensors"):
        load_tree(path)


def test_state_too_long_for_the_header_is_refused_when_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.statefile._MAX_HEADER_BYTES", 1000)
    with pytest.raises(UserError, match="keep long lists of numbers as tensors"):
        save_tree(tmp_path / "state.safetensors", list(range(1000)))


def test_the_host_copy_is_untouched_by_later_training() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    array = np.zeros(2)
    tree = {"weight": weight, "nested": [{"step": 1}], "array": array, "frozen": (torch.zeros(2, 2).t(),)}
    copy = to_host(tree)
    with torch.no_grad():
        weight.fill_(1)
    array[:] = 1
    tree["nested"][0]["step"] = 2
    tree["frozen"][0].fill_(1)
    expected = {
        "weight": torch.zeros(3),
        "nested": [{"step": 1}],
        "array": np.zeros(2),
        "frozen": (torch.zeros(2, 2),),
    }
    assert same(copy, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
def test_the_host_copy_keeps_aliases(dtype: torch.dtype) -> None:
    tensor = torch.ones(2, dtype=dtype)
    copy = to_host({"a": tensor, "b": [tensor.detach()], "c": tensor.clone()})
    assert copy["a"] is copy["b"][0] and copy["a"] is not copy["c"]
    assert copy["a"].data_ptr() != tensor.data_ptr() and torch.equal(copy["a"], tensor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_tensors_are_copied_and_come_back_on_a_gpu(tmp_path: Path) -> None:
    tensor = torch.arange(1 << 20, device="cuda")
    copy = to_host({"a": tensor, "b": tensor})
    tensor.zero_()
    assert copy["a"] is copy["b"] and copy["a"].device.type == "cpu"
    assert torch.equal(copy["a"], torch.arange(1 << 20))
    save_tree(tmp_path / "state.safetensors", copy)
    restored = load_tree(tmp_path / "state.safetensors", device="cuda")
    assert restored["a"].is_cuda and restored["a"] is restored["b"]


def test_the_metadata_is_strict_json(tmp_path: Path) -> None:
    save_tree(tmp_path / "state.safetensors", [float("nan"), "é"])
    data = (tmp_path / "state.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["tree"], parse_constant=pytest.fail) == [{"float": "nan"}, "é"]
