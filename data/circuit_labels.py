"""Prompts out of a saved label file (`ds_y.pt`), without executing anything that it says.

Such a file is a zip archive with a pickle of `{"0": array of text}`. Python's unpickler calls what a pickle names; here
a pickle is read as data by a machine of its own, which knows the few operations that describe an array and calls
nothing, not even NumPy's.
"""

import math
import pickletools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

_FROM_BUFFER = ("numpy.core.numeric", "_frombuffer")
_RECONSTRUCT = ("numpy.core.multiarray", "_reconstruct")
_ARRAY, _DTYPE, _ENCODE = ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")
_KNOWN_NAMES = (_FROM_BUFFER, _RECONSTRUCT, _ARRAY, _DTYPE, _ENCODE)
_PUSHED = (
    "BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES",
    "BINBYTES", "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_MAX_DIMENSIONS = 4
_MAX_STACK = 10_000
"""Python's pickler lays at most 1,000 items of a list aside at once."""


def read_label_array(path: Path) -> NDArray[np.str_]:
    """Return the array of text that a label file holds.

    Raises:
        DataError: the file is no such archive, its pickle names something to call, or it holds something else.
    """
    pickle = _read_pickle(path)
    machine = _Machine(str(path))
    try:
        found = machine.run(pickle)
    except (ValueError, IndexError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: its labels cannot be read ({error}); write the data set anew") from error
    if not isinstance(found, dict) or not isinstance(found.get("0"), _Array):
        raise DataError(f"{path}: it must hold a table with an array of text under the key '0'")
    return _as_text(found["0"], str(path))


@dataclass(frozen=True)
class _Name:
    """Stand for something that the pickle names."""

    key: tuple[str, str]


@dataclass
class _DType:
    """Stand for a NumPy dtype."""

    code: str
    byte_order: str = "="


@dataclass
class _Array:
    """Stand for a NumPy array."""

    dtype: _DType | None = None
    shape: tuple[Any, ...] = ()
    order: str = "C"
    content: bytes | bytearray | None = None
    """None: its elements are objects."""


class _Machine:
    """Follow a pickle's operations over stand-ins: text, bytes, numbers, containers, `_Name`, `_DType`, `_Array`."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.bytes_left = 0
        """How many more bytes may be made out of text; the pickle holds the text of each once."""

    def run(self, pickle: bytes) -> Any:
        """Return what the pickle describes."""
        self.bytes_left = len(pickle)
        for operation, argument, _ in pickletools.genops(pickle):
            if operation.name == "STOP":
                return self.stack.pop()
            self._do(operation.name, argument)
            if len(self.stack) > _MAX_STACK:
                self._refuse(f"it lays more than {_MAX_STACK:,} items aside at once")
        self._refuse("it ends without an end mark")

    def _do(self, operation: str, argument: Any) -> None:
        stack = self.stack
        if operation in ("PROTO", "FRAME"):
            return
        if operation in _PUSHED:
            stack.append(argument)
        elif operation in _CONSTANTS:
            stack.append(_CONSTANTS[operation])
        elif operation == "MARK":
            stack.append(_MARK)
        elif operation == "EMPTY_DICT":
            stack.append({})
        elif operation == "EMPTY_LIST":
            stack.append([])
        elif operation in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[operation])))
        elif operation == "TUPLE":
            stack.append(tuple(self._pop_to_mark()))
        elif operation in ("SETITEM", "SETITEMS"):
            items = self._pop(2) if operation == "SETITEM" else self._pop_to_mark()
            self._top(dict).update(self._pairs(items))
        elif operation in ("APPEND", "APPENDS"):
            items = self._pop(1) if operation == "APPEND" else self._pop_to_mark()
            self._top(list).extend(items)
        elif operation in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if operation == "MEMOIZE" else argument] = stack[-1]
        elif operation in ("BINGET", "LONG_BINGET"):
            if argument not in self.memo:
                self._refuse("it refers to what it has not stored")
            stack.append(self.memo[argument])
        elif operation == "GLOBAL":
            stack.append(self._name(*argument.split(" ", 1)))
        elif operation == "STACK_GLOBAL":
            stack.append(self._name(*self._pop(2)))
        elif operation == "REDUCE":
            stack.append(self._reduced(*self._pop(2)))
        elif operation == "BUILD":
            what, state = self._pop(2)
            self._build(what, state)
            stack.append(what)
        else:
            self._refuse(f"it uses the operation {operation}, which no array of text needs")

    def _name(self, module: Any, name: Any) -> _Name:
        """Admit the names that describe arrays; nothing is imported for them."""
        if not isinstance(module, str) or not isinstance(name, str):
            self._refuse("it names something by no text")
        # NumPy 2 has moved its inner modules.
        key = (module.replace("numpy._core.", "numpy.core.", 1), name)
        if key not in _KNOWN_NAMES:
            self._refuse(f"it names {module}.{name}, which Python's unpickler would call")
        return _Name(key)

    def _reduced(self, what: Any, arguments: Any) -> Any:
        """Return the stand-in for the result of a call."""
        key = what.key if isinstance(what, _Name) else None
        match key, arguments:
            case k, (
                bytes() | bytearray() as content,
                _DType() as dtype,
                tuple() as shape,
                str() as order,
            ) if k == _FROM_BUFFER:
                return _Array(dtype, shape, order, content)
            case k, (_Name(kind), *_) if k == _RECONSTRUCT and kind == _ARRAY:
                return _Array()
            case k, (str() as code, *_) if k == _DTYPE:
                return _DType(code)
            case k, (str() as text, "latin1") if k == _ENCODE:
                self.bytes_left -= len(text)
                if self.bytes_left < 0:
                    self._refuse("it makes more bytes than it holds text for")
                return text.encode("latin1")
        self._refuse("it calls something with other arguments than an array of text needs")

    def _build(self, what: Any, state: Any) -> None:
        """Complete a stand-in."""
        match what, state:
            case _DType(), (int(), str() as byte_order, *_):
                what.byte_order = byte_order
            case _Array(), (int(), tuple() as shape, _DType() as dtype, is_fortran, content):
                what.shape, what.dtype = shape, dtype
                what.order = "F" if is_fortran is True else "C"
                what.content = content if isinstance(content, bytes | bytearray) else None
            case _:
                self._refuse("it completes something with other content than an array of text has")

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count or any(item is _MARK for item in self.stack[-count:]):
            self._refuse("its operations want more than there is")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _pop_to_mark(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            self._refuse("its operations want more than there is")
        self.stack.pop()
        return items[::-1]

    def _top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            self._refuse("it puts items into something that holds none")
        return self.stack[-1]

    def _pairs(self, items: list[Any]) -> dict[str, Any]:
        if len(items) % 2 or not all(isinstance(key, str) for key in items[::2]):
            self._refuse("its tables have keys that are no text")
        return dict(zip(items[::2], items[1::2], strict=True))

    def _refuse(self, why: str) -> NoReturn:
        raise DataError(
            f"{self.where}: refused, {why}. Nothing of it was executed. A label file is a saved table of one array of "
            "text; write it anew from where the data comes from, or do not use it"
        )


def _read_pickle(path: Path) -> bytes:
    """Return the pickle out of the archive, which may not hold more than the file has bytes."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.split("/")[1:] == ["data.pkl"]]
            if len(entries) != 1:
                raise DataError(
                    f"{path}: it holds {len(entries)} entries data.pkl where a label file has one"
                )
            if entries[0].compress_type != zipfile.ZIP_STORED:
                raise DataError(f"{path}: it is compressed, which a label file is not")
            return archive.read(entries[0])
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: there is no such file; config.yaml says that it holds the labels"
        ) from error
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: it is no archive of labels, or a damaged one ({error})") from error


def _as_text(array: _Array, where: str) -> NDArray[np.str_]:
    code = array.dtype.code if array.dtype is not None else ""
    text = re.fullmatch(r"([<>=|]?)U([1-9][0-9]{0,6})", code)
    if array.content is None or text is None or array.dtype is None:
        kind = (
            "objects" if code.endswith("O") or code[:1] == "O" or array.content is None else f"type {code!r}"
        )
        raise DataError(
            f"{where}: its labels are an array of {kind[:40]}; they must be an array of text (labels.astype(str))"
        )
    sizes, width = array.shape, int(text[2])
    if not (1 <= len(sizes) <= _MAX_DIMENSIONS and all(type(size) is int and size >= 0 for size in sizes)):
        raise DataError(f"{where}: its labels have no shape that an array of text has")
    if math.prod(sizes) * width * 4 != len(array.content):
        raise DataError(
            f"{where}: {len(array.content):,} bytes are not {list(sizes)} labels of {width} characters; it is damaged"
        )
    byte_order = ">" if ">" in (array.dtype.byte_order, text[1]) else "<"
    flat = np.frombuffer(array.content, f"{byte_order}U{width}")
    codes = flat.view(f"{byte_order}u4")
    if ((codes > 0x10FFFF) | ((codes >= 0xD800) & (codes < 0xE000))).any():
        raise DataError(f"{where}: its labels hold numbers that are no characters; it is damaged")
    return flat.reshape(sizes, order="F" if array.order == "F" else "C")
