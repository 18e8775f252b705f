"""What circuits do: the state that they make of |0...0>, their unitary, and how far each qubit is entangled.

Qubit 0 is the least significant bit of an index into a state or a unitary, as in Qiskit.
"""

import ast
import re

import numpy as np
from numpy.typing import NDArray

from data.circuit_gates import Circuit, Gate
from data.errors import DataError

MAX_QUBITS = 12
"""A unitary of 13 qubits takes a gibibyte."""

RANK_TOLERANCE = 1e-6
"""Schmidt coefficients below this count as zero; those of circuits without angles are far above or at rounding."""

EXACT_INFIDELITY = 1e-5
"""Two unitaries count as equal up to a global phase where their fidelity falls short of 1 by no more."""

_UNITARY_TOLERANCE = 1e-2
"""How far U+ U may be from the identity, in any entry: fp16 stores entries to 5e-4."""

_ROOT = 1 / np.sqrt(2)
_MATRICES = {
    "h": np.array([[_ROOT, _ROOT], [_ROOT, -_ROOT]]),
    "x": np.array([[0, 1], [1, 0]]),
    "y": np.array([[0, -1j], [1j, 0]]),
    "z": np.diag([1, -1]),
    "s": np.diag([1, 1j]),
    "sdg": np.diag([1, -1j]),
    "t": np.diag([1, np.exp(0.25j * np.pi)]),
    "tdg": np.diag([1, np.exp(-0.25j * np.pi)]),
    "swap": np.eye(4)[[0, 2, 1, 3]],
}
_SRV_PROMPT = re.compile(r"^Generate SRV: (\[[\d, ]*\])$")
_COMPILE_PROMPT = re.compile(r"^Compile using: (\[.*\])$")


def state_vector(circuit: Circuit) -> NDArray[np.complex128]:
    """Return the state [2^qubits] that a circuit makes of |0...0>.

    Raises:
        DataError: there are too many qubits to hold it.
    """
    _check_size(circuit)
    start = np.zeros((2**circuit.num_qubits, 1), np.complex128)
    start[0] = 1
    return _applied(circuit, start)[:, 0]


def unitary(circuit: Circuit) -> NDArray[np.complex128]:
    """Return the matrix [2^qubits, 2^qubits] of a circuit.

    Raises:
        DataError: there are too many qubits to hold it.
    """
    _check_size(circuit)
    return _applied(circuit, np.eye(2**circuit.num_qubits, dtype=np.complex128))


def schmidt_rank_vector(circuit: Circuit) -> list[int]:
    """Return for each qubit the rank of its state within the one that the circuit makes of |0...0>.

    It is 2 for a qubit that is entangled with the others, and 1 for one that is not.
    """
    state = state_vector(circuit).reshape((2,) * circuit.num_qubits)
    ranks = []
    for qubit in range(circuit.num_qubits):
        split = np.moveaxis(state, _axis(qubit, circuit.num_qubits), 0).reshape(2, -1)
        ranks.append(int((np.linalg.svd(split, compute_uv=False) > RANK_TOLERANCE).sum()))
    return ranks


def fidelity(one: NDArray[np.complex128], other: NDArray[np.complex128]) -> float:
    """Return how alike two unitaries are, 1 where they differ by a global phase alone: |tr(A+ B)|^2 / D^2."""
    return float(abs(np.vdot(one, other) / len(one)) ** 2)


def is_same(one: NDArray[np.complex128], other: NDArray[np.complex128]) -> bool:
    """Tell whether two unitaries are equal up to a global phase."""
    return one.shape == other.shape and fidelity(one, other) > 1 - EXACT_INFIDELITY


def as_unitary(parts: NDArray[np.floating], where: str) -> NDArray[np.complex128]:
    """Return the unitary nearest to stored real and imaginary parts [2, 2^qubits, 2^qubits].

    Raises:
        DataError: they are of another shape, or no unitary's.
    """
    size = parts.shape[-1] if parts.ndim else 0
    if parts.ndim != 3 or parts.shape != (2, size, size) or size < 2 or size & (size - 1):
        raise DataError(
            f"{where}: a unitary is stored as [2, 2^qubits, 2^qubits], its real and its imaginary part, and this is "
            f"{list(parts.shape)}"
        )
    matrix = parts[0].astype(np.float64) + 1j * parts[1].astype(np.float64)
    off = np.abs(matrix.conj().T @ matrix - np.eye(size)).max() if np.isfinite(matrix).all() else np.inf
    if not off <= _UNITARY_TOLERANCE:
        raise DataError(f"{where}: it is not a unitary, for U+ U differs from the identity by {off:.3g}")
    left, _, right = np.linalg.svd(matrix)
    return left @ right


def srv_of_prompt(prompt: str) -> list[int] | None:
    """Return the Schmidt-rank vector that a prompt asks for; None: it asks for none."""
    found = _SRV_PROMPT.match(prompt.strip())
    if not found:
        return None
    try:
        return [int(rank) for rank in re.findall(r"\d+", found[1])]
    except ValueError:  # Python reads no number of thousands of digits
        return None


def gates_of_prompt(prompt: str) -> list[str] | None:
    """Return the gates that a prompt allows; None: it speaks of none."""
    found = _COMPILE_PROMPT.match(prompt.strip())
    if not found:
        return None
    try:
        names = ast.literal_eval(found[1])
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return [str(name) for name in names]


def _check_size(circuit: Circuit) -> None:
    if circuit.num_qubits > MAX_QUBITS:
        raise DataError(
            f"a circuit of {circuit.num_qubits} qubits is not computed; the most are {MAX_QUBITS}"
        )


def _applied(circuit: Circuit, columns: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """Return what a circuit makes of the columns [2^qubits, K]."""
    states = columns.reshape(*(2,) * circuit.num_qubits, -1)
    for gate in circuit.gates:
        _apply(gate, states, circuit.num_qubits)
    return states.reshape(columns.shape)


def _apply(gate: Gate, states: NDArray[np.complex128], num_qubits: int) -> None:
    """Let a gate act on states [2, ..., 2, K] in place."""
    # Only where all controls are 1; kept as axes of length one, so that the others keep their places.
    place: list[slice] = [slice(None)] * states.ndim
    for qubit in gate.controls:
        place[_axis(qubit, num_qubits)] = slice(1, 2)
    part = np.moveaxis(
        states[tuple(place)], [_axis(q, num_qubits) for q in gate.targets], range(len(gate.targets))
    )
    matrix = _MATRICES[gate.base]
    part[...] = (matrix @ part.reshape(len(matrix), -1)).reshape(part.shape)


def _axis(qubit: int, num_qubits: int) -> int:
    return num_qubits - 1 - qubit
