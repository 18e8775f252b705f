"""Sets of quantum circuits on disk: a folder with `config.yaml` and `dataset/ds_*`, or a folder of such folders."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from data.circuit_labels import read_label_array
from data.errors import DataError, listed
from data.plain_yaml import load_plain
from data.stored_tensor import StoredTensor

_PLAIN, _MIXED = "CircuitsConfigDataset", "MixedCircuitsConfigDataset"
_ROWS_AT_ONCE = 16_384
_UNITARY_NUMBERS_CHECKED = 1 << 20
_MIN_UNITARIES_CHECKED = 16
_MAX_QUBITS = 30
_TOLERANCES = {2: 2e-2, 4: 1e-3, 8: 1e-6}
"""How far U U^H may be from the identity, by the bytes of a stored number."""


@dataclass(eq=False)
class CircuitSet:
    """Hold one set of circuits: tensors that are read on demand, and a few numbers for each circuit."""

    folder: Path
    gate_pool: tuple[str, ...]
    tokens: StoredTensor  # [n, qubits, columns]
    unitaries: StoredTensor | None  # [n, 2, 2^qubits, 2^qubits]
    prompts: list[str]
    """Sorted, each once."""
    prompt_idx: NDArray[np.int32]  # [n]
    pad: int | None
    """Token of padding in the stored tensor; None: nothing is padded."""
    qubits: NDArray[np.int16]  # [n]
    extents: NDArray[np.int16]  # [n], columns that are not padding
    lengths: NDArray[np.int16]  # [n], columns up to the last gate, at least 1

    def __len__(self) -> int:
        """Count the circuits."""
        return len(self.tokens)

    @property
    def max_qubits(self) -> int:
        """Return the qubits of the stored tensor."""
        return self.tokens.shape[1]

    @property
    def max_length(self) -> int:
        """Return the columns of the stored tensor."""
        return self.tokens.shape[2]

    @property
    def pad_token(self) -> int:
        """Return the token that batches are padded with: the one after the last gate."""
        return len(self.gate_pool) + 1


def open_circuit_sets(path: str | Path) -> tuple[list[CircuitSet], bool, list[str]]:
    """Open the sets of a folder, in the order of their names.

    Returns:
        The sets, whether `path` is a folder of sets (which are merged, even a single one), and notices.

    Raises:
        DataError: there is no set, one is not of circuits or damaged, or they do not go together.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give a folder with config.yaml and dataset/")
    if (folder / "config.yaml").is_file():
        return [_open_set(folder)], False, []
    inner = sorted(child for child in folder.iterdir() if child.is_dir())
    found = [child for child in inner if (child / "config.yaml").is_file() and (child / "dataset").is_dir()]
    skipped = [child.name for child in inner if child not in found]
    if not found:
        names = listed([child.name for child in inner]) or "none"
        raise DataError(
            f"{folder}: it has no config.yaml, and none of its folders ({names}) is a data set of circuits "
            "(config.yaml beside dataset/)"
        )
    notices = []
    if skipped:
        notices.append(f"{folder}: skipped {listed(skipped)}: no data set (config.yaml beside dataset/)")
    sets = [_open_set(child) for child in found]
    _check_together(sets)
    return sets, True, notices


def _check_together(sets: list[CircuitSet]) -> None:
    """Refuse sets whose tokens mean different gates, or of which only some have unitaries."""
    first = sets[0]
    for other in sets[1:]:
        if other.gate_pool != first.gate_pool:
            raise DataError(
                f"{first.folder} and {other.folder} have different gate pools ({', '.join(first.gate_pool)} and "
                f"{', '.join(other.gate_pool)}), so one token would mean two gates; write both with the same gate_pool"
            )
    without = [each.folder.name for each in sets if each.unitaries is None]
    if without and len(without) < len(sets):
        raise DataError(
            f"{first.folder.parent}: {listed(without)} has no unitaries (U in its store_dict), the other sets have; "
            "they cannot be learned together: keep them in folders of their own, as phases"
        )


def _open_set(folder: Path) -> CircuitSet:
    where = folder / "config.yaml"
    config = _read_yaml(where)
    target = config.get("target")
    kind = target.rsplit(".", 1)[-1] if isinstance(target, str) else None
    if kind not in (_PLAIN, _MIXED):
        raise DataError(
            f"{where}: target is {target!r}, which is not a set of circuits; a target must end in .{_PLAIN} or "
            f".{_MIXED} (it is compared, never imported)"
        )
    params = config.get("params")
    if not isinstance(params, Mapping):
        raise DataError(f"{where}: it has no table params")
    stored = _stored(params, config, where)
    gate_pool = _gate_pool(params, where)
    sizes = _number(params, "num_of_qubits", where), _number(params, "max_gates", where)
    if sizes[0] > _MAX_QUBITS:
        raise DataError(f"{where}: num_of_qubits is {sizes[0]}; it may be at most {_MAX_QUBITS}")
    is_bucketed = kind == _MIXED and _number(params, "bucket_batch_size", where, minimum=-1) > 0
    tokens = _tensor(folder, "x", is_bucketed, rank=3)
    if tokens.shape[1:] != sizes or tokens.dtype.kind != "i":
        raise DataError(
            f"{tokens.path}: it holds {tokens.dtype} {list(tokens.shape)}, but config.yaml says integers of "
            f"{sizes[0]} qubits x {sizes[1]} columns (num_of_qubits, max_gates)"
        )
    prompts, prompt_idx = _read_prompts(folder, stored["y"], is_bucketed)
    if len(prompt_idx) != len(tokens):
        raise DataError(f"{folder}: {len(prompt_idx):,} labels (y) for {len(tokens):,} circuits (x)")
    pad = _pad_token(params, gate_pool, where) if kind == _MIXED else None
    qubits, extents, lengths = _measure(tokens, pad, len(gate_pool))
    if "z" in stored:
        _check_recorded_sizes(_tensor(folder, "z", is_bucketed, rank=2), qubits, lengths, folder)
    unitaries = _open_unitaries(folder, is_bucketed, tokens) if "U" in stored else None
    return CircuitSet(
        folder, gate_pool, tokens, unitaries, prompts, prompt_idx, pad, qubits, extents, lengths
    )


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        config = load_plain(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: it cannot be read as plain YAML ({error})") from error
    if not isinstance(config, Mapping):
        raise DataError(f"{path}: it holds no table")
    return config


def _stored(params: Mapping[str, Any], config: Mapping[str, Any], where: Path) -> dict[str, str]:
    """Return what files there are and of which kind; refuse what would be left out in silence."""
    stored = params.get("store_dict")
    if not isinstance(stored, Mapping) or not {"x", "y"} <= stored.keys():
        raise DataError(f"{where}: params.store_dict must name x (circuits) and y (labels)")
    kinds = {
        "x": ("tensor",),
        "y": ("numpy", "tensor"),
        "U": ("tensor",),
        "z": ("tensor",),
        "params": ("tensor",),
    }
    for key, kind in stored.items():
        if key not in kinds or kind not in kinds[key]:
            raise DataError(
                f"{where}: params.store_dict.{key} is {kind!r}, which is not read; there may be "
                + ", ".join(f"{name}: {' or '.join(allowed)}" for name, allowed in kinds.items())
            )
    num_angles = _number(params, "max_params", where, minimum=0) if "max_params" in params else 0
    if num_angles:
        raise DataError(
            f"{where}: max_params is {num_angles}: its gates have angles, which are not learned here; use a gate pool "
            "without parametrised gates"
        )
    if config.get("save_type", "safetensors") not in (None, "safetensors"):
        raise DataError(
            f"{where}: save_type is {config['save_type']!r}; tensors are read from safetensors files alone, because "
            "others may execute code when they are opened; save the data set anew with save_type: safetensors"
        )
    return {str(key): str(kind) for key, kind in stored.items()}


def _gate_pool(params: Mapping[str, Any], where: Path) -> tuple[str, ...]:
    pool = params.get("gate_pool")
    if not isinstance(pool, list) or not pool or not all(isinstance(gate, str) and gate for gate in pool):
        raise DataError(f"{where}: params.gate_pool is {pool!r}; it must be a list of names of gates")
    if len(set(pool)) != len(pool):
        raise DataError(f"{where}: params.gate_pool names a gate twice: {', '.join(pool)}")
    return tuple(pool)


def _number(params: Mapping[str, Any], key: str, where: Path, minimum: int = 1) -> int:
    value = params.get(key)
    if value is None and minimum < 1:
        return minimum
    if type(value) is not int or value < minimum:
        raise DataError(f"{where}: params.{key} is {value!r}; it must be a whole number, at least {minimum}")
    return value


def _pad_token(params: Mapping[str, Any], gate_pool: tuple[str, ...], where: Path) -> int:
    pad = params.get("pad_constant")
    if type(pad) is not int or -len(gate_pool) <= pad <= len(gate_pool):
        raise DataError(
            f"{where}: params.pad_constant is {pad!r}; it must be a whole number that no gate has, beyond "
            f"{len(gate_pool)}"
        )
    return pad


def _tensor(folder: Path, key: str, is_bucketed: bool, rank: int) -> StoredTensor:
    tensor = StoredTensor(folder / "dataset" / f"ds_{key}.safetensors")
    expected = rank + is_bucketed
    if len(tensor.shape) != expected:
        raise DataError(
            f"{tensor.path}: its shape is {list(tensor.shape)}; {key} has {expected} dimensions here"
            + (" (bucket_batch_size is set)" if is_bucketed else "")
        )
    if is_bucketed:
        tensor.flatten_rows()
    return tensor


def _read_prompts(folder: Path, kind: str, is_bucketed: bool) -> tuple[list[str], NDArray[np.int32]]:
    """Return the distinct prompts, sorted, and the index of each circuit's."""
    if kind == "tensor":  # numbers, whose prompt is their list as text
        numbers = _tensor(folder, "y", is_bucketed, rank=2)
        rows, index = np.unique(numbers.rows(slice(None)), axis=0, return_inverse=True)
        texts = [str(row) for row in rows.tolist()]
    else:
        labels = read_label_array(folder / "dataset" / "ds_y.pt")
        if labels.ndim != 1 + is_bucketed:
            raise DataError(
                f"{folder / 'dataset' / 'ds_y.pt'}: its shape is {list(labels.shape)}; there must be one label for "
                "each circuit"
            )
        found, index = np.unique(labels.reshape(-1), return_inverse=True)
        texts = found.tolist()
    prompts = sorted(set(texts))
    place = {prompt: number for number, prompt in enumerate(prompts)}
    return prompts, np.array([place[text] for text in texts], np.int32)[index.reshape(-1)]


def _measure(
    tokens: StoredTensor, pad: int | None, num_gates: int
) -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int16]]:
    """Return of each circuit its qubits, the columns that are not padding, and those up to its last gate.

    Raises:
        DataError: a token stands for no gate, or padding is not a rectangle's outside.
    """
    num_rows, num_qubits, num_columns = tokens.shape
    if max(num_qubits, num_columns) > np.iinfo(np.int16).max:
        raise DataError(f"{tokens.path}: circuits of {num_qubits} x {num_columns} are too large")
    qubits, extents, lengths = (np.empty(num_rows, np.int16) for _ in range(3))
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        part = slice(start, min(start + _ROWS_AT_ONCE, num_rows))
        x = tokens.rows(part)
        is_pad: NDArray[np.bool_] = np.equal(x, pad) if pad is not None else np.zeros(x.shape, np.bool_)
        wrong: NDArray[np.bool_] = ~is_pad & ((x < -num_gates) | (x > num_gates))
        if wrong.any():
            row = int(np.argmax(wrong.any(axis=(1, 2))))
            value = int(x[row][wrong[row]][0])
            raise DataError(
                f"{tokens.path}: circuit {start + row} has the token {value}; gate_pool has {num_gates} gates, so "
                f"tokens are {-num_gates} to {num_gates}" + ("" if pad is None else f", and {pad} pads")
            )
        is_own = ~is_pad
        qubits[part] = np.maximum(_last(is_own, 1), 1)
        extents[part] = np.maximum(_last(is_own, 2), 1)
        lengths[part] = np.maximum(_last(is_own & (x != 0), 2), 1)
        if pad is not None:
            inside = np.arange(num_qubits)[:, None] < qubits[part, None, None]
            inside = inside & (np.arange(num_columns) < extents[part, None, None])
            if (inside & is_pad).any():
                row = int(np.argmax((inside & is_pad).any(axis=(1, 2))))
                raise DataError(f"{tokens.path}: circuit {start + row} has padding ({pad}) between its gates")
    return qubits, extents, lengths


def _last(flags: NDArray[np.bool_], dimension: int) -> NDArray[np.intp]:
    """Return for each circuit's flags [B, qubits, columns] one more than the last true place on a dimension, or 0."""
    found = np.asarray(flags.any(axis=3 - dimension))
    return np.where(found.any(axis=1), found.shape[1] - np.argmax(found[:, ::-1], axis=1), 0)


def _check_recorded_sizes(
    sizes: StoredTensor, qubits: NDArray[np.int16], lengths: NDArray[np.int16], folder: Path
) -> None:
    """Compare the sizes that a mixed set records (z: qubits, and length rounded up) with its circuits."""
    if sizes.shape != (len(qubits), 2):
        raise DataError(f"{sizes.path}: its shape is {list(sizes.shape)}; it must be [{len(qubits)}, 2]")
    recorded = sizes.rows(slice(None))
    wrong = (recorded[:, 0] != qubits) | (recorded[:, 1] < lengths)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(
            f"{folder}: circuit {row} has {qubits[row]} qubits and {lengths[row]} columns, but ds_z says "
            f"{recorded[row].tolist()}"
        )


def _open_unitaries(folder: Path, is_bucketed: bool, tokens: StoredTensor) -> StoredTensor:
    unitaries = _tensor(folder, "U", is_bucketed, rank=4)
    side = 1 << tokens.shape[1]
    if unitaries.shape != (len(tokens), 2, side, side) or unitaries.dtype.kind != "f":
        raise DataError(
            f"{unitaries.path}: it holds {unitaries.dtype} {list(unitaries.shape)}; {len(tokens):,} circuits of "
            f"{tokens.shape[1]} qubits have floats [{len(tokens)}, 2, {side}, {side}] (real and imaginary part)"
        )
    count = max(_UNITARY_NUMBERS_CHECKED // (2 * side * side), _MIN_UNITARIES_CHECKED)
    checked = np.unique(np.linspace(0, len(tokens) - 1, min(count, len(tokens))).astype(np.int64))
    for row in checked:
        parts = unitaries.rows(slice(row, row + 1))[0].astype(np.float64)
        matrix = parts[0] + 1j * parts[1]
        distance = float(np.abs(matrix @ matrix.conj().T - np.eye(side)).max())
        if not distance <= _TOLERANCES[unitaries.dtype.itemsize]:
            raise DataError(
                f"{unitaries.path}: the matrix of circuit {row} is not unitary (off by {distance:.3g}); a set that "
                "mixes circuits with and without unitaries cannot be used"
            )
    return unitaries
