"""Write sets of circuits in genQC's format, as small as a test needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import save_file

SAMPLES = Path(__file__).parent.parent / "data" / "samples" / "circuits"
GATES = ("h", "cx", "swap")


def write_set(
    folder: Path,
    tokens: Any,
    prompts: Any,
    *,
    gates: Sequence[str] = GATES,
    unitaries: Any = None,
    sizes: Any = None,
    config: dict[str, Any] | None = None,
    **params: Any,
) -> Path:
    """Write a set; `config` and `params` replace what `config.yaml` says, a value of None leaves it out."""
    tokens = np.asarray(tokens, np.int32)
    (folder / "dataset").mkdir(parents=True, exist_ok=True)
    stored = {"x": "tensor", "y": "numpy"}
    save_file({"0": np.ascontiguousarray(tokens)}, folder / "dataset" / "ds_x.safetensors")
    torch.save({"0": np.asarray(prompts)}, folder / "dataset" / "ds_y.pt", pickle_protocol=5)
    for key, array in (("U", unitaries), ("z", sizes)):
        if array is not None:
            stored[key] = "tensor"
            path = folder / "dataset" / f"ds_{key}.safetensors"
            save_file({"0": np.ascontiguousarray(array)}, path)
    values = {
        "store_dict": stored,
        "dataset_to_gpu": False,
        "optimized": True,
        "random_samples": len(tokens),
        "num_of_qubits": tokens.shape[-2],
        "min_gates": 1,
        "max_gates": tokens.shape[-1],
        "max_params": 0,
        "gate_pool": list(gates),
        **params,
    }
    content = {
        "target": "genQC.dataset.circuits_dataset.CircuitsConfigDataset",
        "device": "cpu",
        "save_path": "/nowhere/dataset/ds",
        "save_type": "safetensors",
        "params": {key: value for key, value in values.items() if value is not None},
        **(config or {}),
    }
    (folder / "config.yaml").write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None})
    )
    return folder


def random_circuits(
    count: int, num_qubits: int, num_columns: int, seed: int, shortest: int = 1
) -> np.ndarray:
    """Return circuits [count, num_qubits, num_columns] of one gate a column, each of a drawn length, all different."""
    generator = np.random.default_rng(seed)
    found: dict[bytes, np.ndarray] = {}
    while len(found) < count:
        circuit = np.zeros((num_qubits, num_columns), np.int32)
        for column in range(int(generator.integers(shortest, num_columns + 1))):
            first, second = generator.permutation(num_qubits)[:2] if num_qubits > 1 else (0, 0)
            gate = int(generator.integers(1, 4)) if num_qubits > 1 else 1
            circuit[first, column] = gate
            if gate > 1:
                circuit[second, column] = -gate if gate == 2 else gate
        found[circuit.tobytes()] = circuit
    return np.stack(list(found.values()))


def random_unitaries(count: int, num_qubits: int, seed: int) -> np.ndarray:
    """Return float32 [count, 2, 2^q, 2^q], real and imaginary parts of random unitary matrices."""
    generator = np.random.default_rng(seed)
    side = 1 << num_qubits
    values = generator.normal(size=(count, side, side)) + 1j * generator.normal(size=(count, side, side))
    matrices = np.linalg.qr(values)[0]
    return np.stack([matrices.real, matrices.imag], axis=1).astype(np.float32)
