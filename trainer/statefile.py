"""Training state (nested Python values and tensors) in one safetensors file, read without running any code.

A file holds the tensors under the path at which they stand in the tree ("model.encoder.weight"), so a flat
dict of weights is an ordinary safetensors file; the rest of the tree is JSON in the file's metadata.
"""

import contextlib
import hashlib
import json
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from trainer.errors import CheckpointError, UserError

# A nested dict (keys str or int), OrderedDict, Counter, list or tuple of torch.Tensor, numpy array or number,
# str, bytes, int, float, bool and None. Were it a recursive type, every reader of a tree would have to cast.
Tree: TypeAlias = Any

FORMAT = "cellphase-tree-1"
_MAX_HEADER_BYTES = 100_000_000  # what safetensors refuses to read beyond
_CHUNK_BYTES = 1 << 24
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered_dict", Counter: "counter"}
_MAPPING_TYPES = {name: kind for kind, name in _MAPPINGS.items()}
_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

# Other dtypes are stored as bytes, with dtype and shape beside the name in the tree.
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class FileFacts(NamedTuple):
    """Describe a file as it was written."""

    num_bytes: int
    sha256: str


class BinarySink(Protocol):
    """Take bytes, as an open binary file does."""

    def write(self, data: bytes | memoryview, /) -> Any:
        """Write all of `data`."""


class HashingSink:
    """Pass bytes on to a file and keep their number and SHA-256."""

    def __init__(self, file: BinarySink) -> None:
        """Wrap an open binary file."""
        self._file = file
        self._hash = hashlib.sha256()
        self._num_bytes = 0

    def write(self, data: bytes | memoryview, /) -> None:
        """Write all of `data`, hashing on the way."""
        self._hash.update(data)
        self._file.write(data)
        self._num_bytes += len(data)

    def facts(self) -> FileFacts:
        """Return size and hash of what has been written."""
        return FileFacts(self._num_bytes, self._hash.hexdigest())


def save_tree(path: str | Path, tree: Tree) -> FileFacts:
    """Write `tree` to one safetensors file and flush it to the disk; not atomic, so pick a temporary name."""
    with open(path, "wb") as file:
        sink = HashingSink(file)
        write_tree(sink, tree)
        file.flush()
        os.fsync(file.fileno())
    return sink.facts()


def write_tree(sink: BinarySink, tree: Tree) -> None:
    """Write `tree` in safetensors form to an open binary file, without a second copy of the tensors."""
    skeleton, tensors = _flatten(tree)
    # Wide elements first, so that every tensor starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    metadata = {"format": FORMAT, "tree": json.dumps(skeleton, allow_nan=False, separators=(",", ":"))}
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name in names:
        tensor = tensors[name]
        num_bytes = tensor.numel() * tensor.element_size()
        dtype_name = _DTYPE_NAMES.get(tensor.dtype, "U8")
        shape = list(tensor.shape) if tensor.dtype in _DTYPE_NAMES else [num_bytes]
        header[name] = {"dtype": dtype_name, "shape": shape, "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    encoded = json.dumps(header, allow_nan=False, separators=(",", ":")).encode("ascii")
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _MAX_HEADER_BYTES:
        raise UserError(
            f"the state without its tensors takes {len(encoded):,} bytes and a state file holds at most "
            f"{_MAX_HEADER_BYTES:,}; keep long lists of numbers as tensors"
        )
    sink.write(len(encoded).to_bytes(8, "little"))
    sink.write(encoded)
    for name in names:
        for chunk in _byte_chunks(tensors[name]):
            sink.write(chunk)


def load_tree(path: str | Path, device: str | torch.device = "cpu", leave_out: Collection[str] = ()) -> Tree:
    """Read the tree that `save_tree` wrote, its tensors in fresh memory on `device`.

    Args:
        path: the file.
        device: where the tensors go.
        leave_out: keys of the outermost dict whose values are not read.
    """
    return _read_tree(path, device, is_lazy=False, leave_out=leave_out)


class LazyTensor:
    """Stand for a tensor of a state file, or for a stretch of a one-dimensional one, until it is read."""

    def __init__(self, file: Any, name: str, path: str) -> None:
        """Take the open file, which stays open as long as this object lives."""
        self._file = file
        self._name = name
        self._path = path
        self.shape: tuple[int, ...] = tuple(file.get_slice(name).get_shape())

    def read(self, start: int | None = None, stop: int | None = None) -> torch.Tensor:
        """Return the tensor, or the values from `start` to `stop` of a one-dimensional one, in fresh memory."""
        try:
            if start is None and stop is None:
                return self._file.get_tensor(self._name).clone()
            return self._file.get_slice(self._name)[start:stop].clone()
        except SafetensorError as error:
            raise CheckpointError(f"{self._path}: {self._name} cannot be read ({error})") from error


def open_tree(path: str | Path) -> Tree:
    """Open the tree that `save_tree` wrote with a `LazyTensor` in the place of every tensor of a common dtype."""
    return _read_tree(path, "cpu", is_lazy=True)


def _read_tree(
    path: str | Path, device: str | torch.device, *, is_lazy: bool, leave_out: Collection[str] = ()
) -> Tree:
    try:
        with contextlib.ExitStack() as stack:
            file: Any = safe_open(str(path), framework="pt", device="cpu")
            if not is_lazy:
                stack.enter_context(file)  # a lazy tree keeps its file open
            metadata = file.metadata() or {}
            names = set(file.keys())
            cache: dict[str, Any] = {}

            def check(name: str) -> None:
                if name not in names:
                    raise CheckpointError(f"{path}: its tree names the tensor {name!r}, which the file lacks")

            def read(name: str) -> torch.Tensor:
                # Copied, because later damage to the mapped file must not reach a running training.
                if name not in cache:
                    check(name)
                    cache[name] = file.get_tensor(name).to(device, copy=True)
                return cache[name]

            def read_later(name: str) -> LazyTensor:
                check(name)
                return LazyTensor(file, name, str(path))

            if metadata.get("format") != FORMAT or "tree" not in metadata:
                raise CheckpointError(
                    f"{path}: a safetensors file, but not a state file of this program "
                    f"(format {metadata.get('format')!r}, expected {FORMAT!r})"
                )
            restorer = _Restorer(read, str(path), read_later=read_later if is_lazy else None)
            return restorer.value(json.loads(metadata["tree"]), leave_out)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except CheckpointError:
        raise
    except (SafetensorError, ValueError) as error:  # ValueError: text that is no JSON, or a number too long
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: its tree is nested too deeply to be a training state") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error


def to_host(tree: Tree) -> Tree:
    """Copy `tree` with all its containers and tensors into CPU memory that training will not touch.

    Copies from a GPU are queued together and waited for once. A tensor that stands at several places of the
    tree is copied once and stands at the same places of the copy.
    """
    skeleton, tensors = _flatten(tree)
    # On CUDA a non-blocking copy to the CPU goes to pinned memory and returns at once.
    copies = {
        name: tensor.to("cpu", copy=True, non_blocking=tensor.is_cuda) for name, tensor in tensors.items()
    }
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    return _Restorer(copies.__getitem__, "the state", stored_as_bytes=False).value(skeleton)


def _flatten(tree: Tree) -> tuple[Any, dict[str, torch.Tensor]]:
    flattener = _Flattener()
    try:
        skeleton = flattener.node(tree, "")
    except RecursionError as error:
        raise UserError("the state contains itself, or is nested too deeply to be saved") from error
    return skeleton, flattener.tensors


class _Flattener:
    """Turn a tree into plain JSON values and a dict of named tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._names = {"__metadata__"}  # safetensors' own key in the header
        self._views: dict[tuple[Any, ...], str] = {}

    def node(self, value: Any, path: str) -> Any:
        """Return the JSON form of `value`, which stands at `path` of the tree."""
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, bool | str):
            return str.__str__(value) if isinstance(value, str) else value
        if isinstance(value, int):
            # JSON readers agree on 64 bits, and Python limits decimal digits but not hexadecimal ones.
            return int(value) if -(2**63) <= value < 2**63 else {"int": hex(value)}
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if isinstance(value, bytes):
            data = torch.frombuffer(bytearray(value), dtype=torch.uint8) if value else torch.empty(0).byte()
            return {"bytes": self._add(data, path)}
        if isinstance(value, torch.Tensor):
            return self._tensor_node(value, path)
        if isinstance(value, np.ndarray):
            return self._array_node(value, path)
        return self._container_node(value, path)

    def _container_node(self, value: Any, path: str) -> Any:
        if type(value) is list:
            return [self.node(item, _join(path, index)) for index, item in enumerate(value)]
        if type(value) is tuple:
            return {"tuple": [self.node(item, _join(path, index)) for index, item in enumerate(value)]}
        kind = _MAPPINGS.get(type(value))
        if kind is None:
            raise UserError(_cannot_save(path, value))
        items = []
        for key, item in value.items():
            if type(key) not in (str, int):
                raise UserError(f"{_cannot_save(_join(path, key), key, 'key')}; keys are str or int")
            items.append([self.node(key, path), self.node(item, _join(path, key))])
        return {kind: items}

    def _tensor_node(self, tensor: torch.Tensor, path: str) -> dict[str, Any]:
        plain = tensor.data if isinstance(tensor, torch.nn.Parameter) else tensor.detach()
        if type(plain) is not torch.Tensor:
            raise UserError(_cannot_save(path, plain))
        if plain.layout != torch.strided or plain.is_quantized or plain.is_nested or plain.is_meta:
            kind = "meta" if plain.is_meta else "nested" if plain.is_nested else str(plain.layout)
            raise UserError(f"{path or 'the state'} is a tensor of a kind that cannot be saved ({kind})")
        # Empty tensors share the null address, so they are told apart by their object.
        place = plain.data_ptr() if plain.numel() else id(tensor)
        view = (
            place,
            plain.device,
            plain.dtype,
            plain.shape,
            plain.stride(),
            plain.is_conj(),
            plain.is_neg(),
        )
        if view not in self._views:
            self._views[view] = self._add(plain.resolve_conj().resolve_neg(), path)
        name = self._views[view]
        node: dict[str, Any] = {"tensor": name}
        if plain.dtype not in _DTYPE_NAMES:
            node |= {"dtype": str(plain.dtype), "shape": list(plain.shape)}
        return node

    def _array_node(self, array: np.ndarray, path: str) -> dict[str, Any]:
        try:
            tensor = torch.from_numpy(np.array(array, order="C", copy=True))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{path or 'the state'} is an array of {array.dtype}, which cannot be saved"
            ) from error
        if tensor.dtype not in _DTYPE_NAMES:
            raise UserError(f"{path or 'the state'} is an array of {array.dtype}, which cannot be saved")
        return {"array": self._add(tensor, path)}

    def _add(self, tensor: torch.Tensor, path: str) -> str:
        # The true keys are in the tree; half a surrogate pair in a name would make the header unreadable.
        name = path = path.encode("utf-8", "replace").decode() or "value"
        suffix = 2
        while name in self._names:  # {"a.b": x, "a": {"b": y}}
            name = f"{path}#{suffix}"
            suffix += 1
        self._names.add(name)
        self.tensors[name] = tensor
        return name


class _Restorer:
    """Turn JSON values and named tensors back into the tree; anything unexpected in them is an error."""

    def __init__(
        self,
        read: Callable[[str], torch.Tensor],
        source: str,
        *,
        stored_as_bytes: bool = True,
        read_later: Callable[[str], LazyTensor] | None = None,
    ) -> None:
        self._read = read
        self._read_later = read_later
        self._source = source
        self._stored_as_bytes = stored_as_bytes
        self._reshaped: dict[str, torch.Tensor] = {}
        # Once for each tensor: a tree that names one over and over does not take its memory as often.
        self._bytes: dict[str, bytes] = {}

    def value(self, node: Any, leave_out: Collection[str] = ()) -> Any:
        """Return the value that `node` stands for, of a dict without the keys in `leave_out`."""
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if isinstance(node, list):
            return [self.value(item) for item in node]
        try:
            return self._tagged(node, leave_out)
        except (CheckpointError, RecursionError):
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{self._source}: its tree is damaged at {str(node)[:80]!r}") from error

    def _tagged(self, node: dict[str, Any], leave_out: Collection[str]) -> Any:
        if "tensor" in node:
            return self._tensor(node)
        ((tag, content),) = node.items()
        if tag in _MAPPING_TYPES:
            kept = [(key, item) for key, item in content if key not in leave_out]
            return _MAPPING_TYPES[tag]({self.value(key): self.value(item) for key, item in kept})
        if tag == "tuple":
            return tuple(self.value(item) for item in content)
        if tag == "int":
            return int(content, 16)
        if tag == "float":
            return float(content)
        if tag == "array":
            return self._read(content).cpu().numpy()
        if tag == "bytes":
            if content not in self._bytes:
                self._bytes[content] = self._read(content).cpu().numpy().tobytes()
            return self._bytes[content]
        raise ValueError(f"unknown tag {tag!r}")

    def _tensor(self, node: dict[str, Any]) -> torch.Tensor | LazyTensor:
        name = node["tensor"]
        if self._read_later is not None and "dtype" not in node:
            return self._read_later(name)
        tensor = self._read(name)
        if "dtype" not in node or not self._stored_as_bytes:
            return tensor
        if name not in self._reshaped:
            self._reshaped[name] = tensor.view(_DTYPES[node["dtype"]]).reshape(node["shape"])
        return self._reshaped[name]


def _byte_chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    flat = tensor.to("cpu").contiguous().reshape(-1).view(torch.uint8)
    data = flat.numpy().data
    for start in range(0, len(data), _CHUNK_BYTES):
        yield data[start : start + _CHUNK_BYTES]


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _cannot_save(path: str, value: object, what: str = "value") -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return (
        f"{path or 'the state'} is a {what} of type {name}, which cannot be saved; allowed are tensors, "
        "numpy arrays, str, bytes, int, float, bool, None and dict, list or tuple of them"
    )
