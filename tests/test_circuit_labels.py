"""Labels of circuits are read as data: what a pickle would execute is refused."""

import io
import os
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from circuit_folders import SAMPLES

from data.circuit_labels import read_label_array
from data.errors import DataError

LABELS = np.array(["Generate SRV: [1, 2, 2]", "", "Compile using: ['h']"])


def archive(
    path: Path, content: bytes, name: str = "ds_y/data.pkl", compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["srv_3q", "unitary_3q", "srv_mixed/4q"])
def test_labels_equal_those_that_the_unpickler_reads(name: str):
    """R5, and the label format of section 2: the sample files, which torch.load(weights_only=True) cannot read."""
    path = SAMPLES / name / "dataset" / "ds_y.pt"
    expected = torch.load(path, weights_only=False)["0"]
    found = read_label_array(path)
    assert np.array_equal(found, expected) and found.dtype.kind == "U"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", ["flat", "buckets", "fortran", "big-endian", "part"])
def test_every_protocol_and_layout_of_a_text_array_is_read(tmp_path: Path, protocol: int, shape: str):
    labels = {
        "flat": LABELS,
        "buckets": np.stack([LABELS, LABELS[::-1]]),
        "fortran": np.asfortranarray(np.stack([LABELS, LABELS[::-1]])),
        "big-endian": LABELS.astype(">U30"),
        "part": np.tile(LABELS, 4)[::2],
    }[shape]
    torch.save({"0": labels}, tmp_path / "y.pt", pickle_protocol=protocol)
    found = read_label_array(tmp_path / "y.pt")
    assert found.shape == labels.shape and found.tolist() == labels.tolist()


class _Calls:
    """Pickles as a call of something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    """Return pickles that would leave a file behind, or reach for something to call, each in a way of its own."""
    command = f"touch {marker}"
    quoted = command.encode()
    simple = {
        f"a call in protocol {protocol}": pickle.dumps({"0": _Calls(os.system, command)}, protocol)
        for protocol in (0, 1, 2, 4, 5)
    }
    array = LABELS.__reduce_ex__(5)
    return {
        **simple,
        "eval": pickle.dumps({"0": _Calls(eval, f"__import__('os').system({command!r})")}, 5),
        "a call beside good labels": pickle.dumps({"0": LABELS, "1": _Calls(os.system, command)}, 5),
        "numpy that loads a pickle": pickle.dumps({"0": _Calls(np.load, str(marker))}, 5),
        "numpy's from-file": pickle.dumps({"0": _Calls(np.fromfile, str(marker))}, 5),
        "an attribute": pickle.dumps({"0": _Calls(getattr, "text", "format")}, 5),
        "INST": b"(S'" + quoted + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + quoted + b"'\no.",
        "NEWOBJ": b"\x80\x02cbuiltins\nobject\n)\x81.",
        "a persistent id": b"\x80\x02Pos.system\n.",
        "an extension code": b"\x80\x02\x82\x01.",
        "a name out of the memo": (
            b"\x80\x04\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93\x8c"
            + bytes([len(quoted)])
            + quoted
            + b"\x85R."
        ),
        "a call of what frombuffer made": pickle.dumps({"0": _Calls(array[0], *array[1])}, 5)[:-2]
        + b"\x8c\x01a\x85R.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x13core.numeric.os.sys\x93.",
    }


@pytest.mark.parametrize("name", sorted(hostile_pickles(Path("m"))))
def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path: Path, name: str):
    """R5: labels are read without executing anything."""
    marker = tmp_path / "executed"
    path = archive(tmp_path / "y.pt", hostile_pickles(marker)[name])
    with pytest.raises(DataError, match=r"y\.pt"):
        read_label_array(path)
    assert not marker.exists()


def test_the_hostile_pickle_would_have_acted(tmp_path: Path):
    """The tests above mean something: Python's unpickler runs the same bytes."""
    marker = tmp_path / "executed"
    pickle.loads(hostile_pickles(marker)["a call in protocol 5"])
    assert marker.exists()


def test_a_hostile_pickle_is_named_with_what_it_calls(tmp_path: Path):
    path = archive(tmp_path / "y.pt", hostile_pickles(tmp_path / "m")["a call in protocol 5"])
    with pytest.raises(DataError, match=r"(posix|nt)\.system.*Nothing of it was executed"):
        read_label_array(path)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"0": np.array(["a", None], object)}, "array of objects"),
        ({"0": np.array(["a", "b"], object)}, "array of objects"),
        ({"0": np.arange(3)}, "type 'i8'"),
        ({"1": LABELS}, "under the key '0'"),
        ({"0": ["a", "b"]}, "under the key '0'"),
        ([LABELS], "under the key '0'"),
        ({0: LABELS}, "keys that are no text"),
    ],
)
def test_other_content_than_an_array_of_text_is_refused(tmp_path: Path, content: Any, why: str):
    with pytest.raises(DataError, match=why):
        read_label_array(archive(tmp_path / "y.pt", pickle.dumps(content, 5)))


def test_containers_that_hold_themselves_end_in_an_error(tmp_path: Path):
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(DataError, match="under the key '0'"):
        read_label_array(archive(tmp_path / "y.pt", pickle.dumps({"0": endless}, 5)))
    nested = (
        b"\x80\x04)"
        + b"".join(b"\x94h" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(200))
        + b"."
    )
    with pytest.raises(DataError, match="under the key '0'"):  # 2^200 items if anyone counted them
        read_label_array(archive(tmp_path / "y.pt", nested))


def pickled_array(buffer: bytes, shape: tuple[Any, ...], code: str = "U1") -> bytes:
    """Return the pickle of an array that claims what it is told to."""
    good = {"0": _Calls(LABELS.__reduce_ex__(5)[0], bytearray(buffer), np.dtype(code), shape, "C")}
    return pickle.dumps(good, 5)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pickled_array(b"a\0\0\0", (2,)), "damaged"),
        (pickled_array(b"a\0\0\0", (1 << 62, 4)), "damaged"),
        (pickled_array(b"a\0\0\0", (-1, -1)), "no shape"),
        (pickled_array(b"a\0\0\0", (True,)), "no shape"),
        (pickled_array(b"a\0\0\0", ()), "no shape"),
        (pickled_array(b"a\0\0\0", (1,) * 40), "no shape"),
        (pickled_array(struct.pack("<I", 0x110000), (1,)), "no characters"),
        (pickled_array(struct.pack("<I", 0xD800), (1,)), "no characters"),
        (pickled_array(b"", (1,), "V8"), "type 'V8'"),
    ],
)
def test_arrays_that_lie_about_themselves_are_refused(tmp_path: Path, content: bytes, why: str):
    with pytest.raises(DataError, match=why):
        read_label_array(archive(tmp_path / "y.pt", content))


@pytest.mark.parametrize(
    ("repeated", "why"),
    [(b"h\x00h\x01R", "more bytes than it holds text for"), (b"]", "more than 10,000 items aside")],
)
def test_a_pickle_that_grows_without_bound_is_refused(tmp_path: Path, repeated: bytes, why: str):
    text = b"a" * 100_000
    stored = (
        b"\x80\x02c_codecs\nencode\nq\x00X"
        + struct.pack("<I", len(text))
        + text
        + b"X\6\0\0\0latin1\x86q\x01"
    )
    with pytest.raises(DataError, match=why):
        read_label_array(archive(tmp_path / "y.pt", stored + repeated * 20_000 + b"."))


def test_damaged_pickles_end_in_an_error_or_in_text(tmp_path: Path):
    good = pickle.dumps({"0": np.tile(LABELS, 3)}, 5)
    generator = np.random.default_rng(5)
    num_refused = 0
    for _ in range(1500):
        damaged = bytearray(good)
        for place in generator.integers(0, len(good), int(generator.integers(1, 5))):
            damaged[place] = generator.integers(256)
        if generator.random() < 0.2:
            del damaged[int(generator.integers(len(damaged))) :]
        try:
            assert read_label_array(archive(tmp_path / "y.pt", bytes(damaged))).dtype.kind == "U"
        except DataError:
            num_refused += 1
    assert 300 < num_refused < 1500


def test_files_that_are_no_archive_of_labels_are_refused(tmp_path: Path):
    good = pickle.dumps({"0": LABELS}, 5)
    path = tmp_path / "y.pt"
    path.write_bytes(good)
    with pytest.raises(DataError, match="no archive of labels"):
        read_label_array(path)
    with pytest.raises(DataError, match="compressed"):
        read_label_array(archive(path, good, compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(DataError, match="0 entries data.pkl"):
        read_label_array(archive(path, good, name="other.pkl"))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as file:
        warnings.simplefilter("ignore")
        file.writestr("a/data.pkl", good)
        file.writestr("b/data.pkl", good)
    with pytest.raises(DataError, match="2 entries data.pkl"):
        read_label_array(path)
    with pytest.raises(DataError, match="no such file"):
        read_label_array(tmp_path / "other.pt")
    with pytest.raises(DataError, match="no archive of labels"):
        read_label_array(tmp_path)
    cut = io.BytesIO()
    torch.save({"0": LABELS}, cut, pickle_protocol=5)
    path.write_bytes(cut.getvalue()[:-40])
    with pytest.raises(DataError, match="no archive of labels"):
        read_label_array(path)
