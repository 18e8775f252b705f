"""Circuits as lists of gates, and as grids of tokens [qubits, time] in which a column holds one gate.

0 stands for nothing, n for a target of the n-th gate of the pool, -n for one of its controls, and N + 1 for padding,
where the pool has N gates. Grids that a model drew need not be circuits: what is wrong with them is an answer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError


class GateShape(NamedTuple):
    """How many qubits of each kind a gate acts on."""

    num_controls: int
    num_targets: int


GATES = {
    "h": GateShape(0, 1),
    "x": GateShape(0, 1),
    "y": GateShape(0, 1),
    "z": GateShape(0, 1),
    "s": GateShape(0, 1),
    "sdg": GateShape(0, 1),
    "t": GateShape(0, 1),
    "tdg": GateShape(0, 1),
    "cx": GateShape(1, 1),
    "cy": GateShape(1, 1),
    "cz": GateShape(1, 1),
    "ch": GateShape(1, 1),
    "swap": GateShape(0, 2),
    "ccx": GateShape(2, 1),
    "ccz": GateShape(2, 1),
    "cswap": GateShape(1, 2),
}
"""The gates that circuits may be made of; the targets of one gate are interchangeable, and so are its controls."""

PARAMETRIZED = (
    *("rx", "ry", "rz", "phase", "p", "cp", "crx", "cry", "crz", "rxx", "ryy", "rzz", "u", "u1", "u2", "u3"),
)
"""Gates with angles, which a grid of tokens does not hold."""

_QASM = {"ccz": "h {2}; ccx {0},{1},{2}; h {2};"}
"""Gates that `qelib1.inc` lacks, written with those that it has."""


@dataclass(frozen=True)
class Gate:
    """One gate and the qubits that it acts on, each kind in ascending order."""

    name: str
    controls: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def base(self) -> str:
        """Return the name of what it does to its targets: `x` for `cx` and `ccx`."""
        return self.name.lstrip("c") if self.controls else self.name

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {"gate": self.name, "controls": list(self.controls), "targets": list(self.targets)}


@dataclass(frozen=True)
class Circuit:
    """Gates in the order in which they act."""

    num_qubits: int
    gates: tuple[Gate, ...]


class Fault(NamedTuple):
    """Say why a column of a grid is no gate."""

    column: int | None
    """Counted from 0; None where the grid as a whole is meant."""
    kind: str
    """The same words for all faults of a kind, to count them by."""
    detail: str

    def __str__(self) -> str:
        """Return it as one line."""
        where = "" if self.column is None else f"column {self.column}: "
        return f"{where}{self.kind} ({self.detail})"


@dataclass(frozen=True)
class InvalidCircuit:
    """A grid of tokens that is no circuit."""

    num_qubits: int
    faults: tuple[Fault, ...]
    """At least one, by column."""
    num_columns: int
    """Columns that hold anything but background and padding."""


def check_gate_pool(gate_pool: Iterable[str]) -> tuple[str, ...]:
    """Return the names of a gate pool, in its order.

    Raises:
        DataError: a gate has angles, is unknown or listed twice, or there is none.
    """
    names = tuple(str(name) for name in gate_pool)
    if not names:
        raise DataError("the gate pool is empty; it lists the gates that tokens stand for")
    for name in names:
        if name in PARAMETRIZED:
            raise DataError(
                f"gate {name!r} of the gate pool has an angle, and tokens hold none; use circuits of "
                f"{', '.join(GATES)}"
            )
        if name not in GATES:
            raise DataError(f"gate {name!r} of the gate pool is unknown; known are {', '.join(GATES)}")
        if names.count(name) > 1:
            raise DataError(f"gate {name!r} is listed twice in the gate pool, so tokens could mean either")
    return names


def decode(tokens: NDArray[Any], gate_pool: Sequence[str]) -> Circuit | InvalidCircuit:
    """Read a grid of tokens [qubits, time] as a circuit, or say what is wrong with it.

    Columns without a gate are passed over. Whole rows of padding at the bottom are qubits that the circuit does not
    have, and the first column of padding alone is its end.

    Raises:
        DataError: the grid is not of two dimensions and whole numbers, or the gate pool is one that cannot be read.
    """
    pool = check_gate_pool(gate_pool)
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(
            f"a grid of tokens is whole numbers [qubits, time], not {tokens.dtype} {list(tokens.shape)}"
        )
    padding = len(pool) + 1
    num_qubits = len(tokens)
    while num_qubits and tokens.shape[1] and (tokens[num_qubits - 1] == padding).all():
        num_qubits -= 1
    grid = tokens[:num_qubits]
    if not num_qubits:
        fault = Fault(None, "nothing but padding", f"all {tokens.size} tokens are {padding}")
        return InvalidCircuit(0, (fault,), 0)
    gates: list[Gate] = []
    faults: list[Fault] = []
    num_columns, end = 0, None
    for index, column in enumerate(grid.T):
        if (column == padding).all():
            end = index if end is None else end
        elif column.any():
            num_columns += 1
            found = _read_column(column, pool) if end is None else ("gate after the end", f"column {end}")
            if isinstance(found, Gate):
                gates.append(found)
            else:
                faults.append(Fault(index, *found))
    if faults:
        return InvalidCircuit(num_qubits, tuple(faults), num_columns)
    return Circuit(num_qubits, tuple(gates))


def encode(circuit: Circuit, gate_pool: Sequence[str], num_columns: int | None = None) -> NDArray[np.int32]:
    """Write a circuit as a grid of tokens [qubits, time], one column a gate.

    Args:
        circuit: what is written.
        gate_pool: the gates that tokens stand for, in their order.
        num_columns: width of the grid; more than there are gates leaves background behind them.

    Raises:
        DataError: a gate is not of the pool, does not fit on the qubits, or there are more gates than columns.
    """
    pool = check_gate_pool(gate_pool)
    width = len(circuit.gates) if num_columns is None else num_columns
    if len(circuit.gates) > width:
        raise DataError(f"a circuit of {len(circuit.gates)} gates does not fit {width} columns")
    grid = np.zeros((circuit.num_qubits, width), np.int32)
    for index, gate in enumerate(circuit.gates):
        if gate.name not in pool:
            raise DataError(f"gate {index} is {gate.name!r}, and the gate pool has {', '.join(pool)}")
        _check_nodes(gate, circuit.num_qubits, index)
        token = pool.index(gate.name) + 1
        grid[list(gate.controls), index] = -token
        grid[list(gate.targets), index] = token
    return grid


def uses_only(circuit: Circuit, allowed: Iterable[str]) -> bool:
    """Tell whether a circuit is made of allowed gates alone."""
    return {gate.name for gate in circuit.gates} <= set(allowed)


def to_qasm(circuit: Circuit) -> str:
    """Return a circuit as OpenQASM 2.0."""
    lines = ["OPENQASM 2.0;", 'include "qelib1.inc";', f"qreg q[{circuit.num_qubits}];"]
    for gate in circuit.gates:
        nodes = [f"q[{qubit}]" for qubit in (*gate.controls, *gate.targets)]
        lines.append(
            _QASM[gate.name].format(*nodes) if gate.name in _QASM else f"{gate.name} {','.join(nodes)};"
        )
    return "\n".join(lines) + "\n"


def random_circuit(
    rng: np.random.Generator, num_qubits: int, num_gates: int, gate_pool: Sequence[str]
) -> Circuit:
    """Draw a circuit whose gates are equally likely among those that fit, and the qubits that each acts on as well.

    Raises:
        DataError: every gate acts on more qubits than there are.
    """
    pool = [name for name in check_gate_pool(gate_pool) if sum(GATES[name]) <= num_qubits]
    if not pool:
        raise DataError(f"no gate of {', '.join(gate_pool)} fits on {num_qubits} qubit(s)")
    gates = []
    for choice in rng.integers(len(pool), size=num_gates):
        shape = GATES[pool[choice]]
        nodes = rng.choice(num_qubits, sum(shape), replace=False).tolist()
        gates.append(_gate(pool[choice], nodes[: shape.num_controls], nodes[shape.num_controls :]))
    return Circuit(num_qubits, tuple(gates))


def _gate(name: str, controls: Iterable[int], targets: Iterable[int]) -> Gate:
    return Gate(name, tuple(sorted(controls)), tuple(sorted(targets)))


def _read_column(column: NDArray[Any], pool: Sequence[str]) -> Gate | tuple[str, str]:
    """Return the gate of a column, or the kind of its fault with the detail."""
    used = sorted({abs(int(token)) for token in column if token})
    shown = f"tokens {', '.join(str(int(token)) for token in column)}"
    outside = [token for token in used if token > len(pool)]
    if outside:
        is_padding = outside == [len(pool) + 1]
        return ("padding beside a gate" if is_padding else "token outside the gate pool"), shown
    if len(used) > 1:
        return "several gates", ", ".join(pool[token - 1] for token in used)
    token, name = used[0], pool[used[0] - 1]
    controls, targets = np.flatnonzero(column == -token).tolist(), np.flatnonzero(column == token).tolist()
    if not targets:
        return "controls without a target", f"{name} with {_count(controls, 'control')}"
    if (len(controls), len(targets)) != GATES[name]:
        return (
            "wrong number of qubits",
            f"{name} has {_count(controls, 'control')} and {_count(targets, 'target')}, and takes "
            f"{GATES[name].num_controls} and {GATES[name].num_targets}",
        )
    return _gate(name, controls, targets)


def _check_nodes(gate: Gate, num_qubits: int, index: int) -> None:
    nodes = (*gate.controls, *gate.targets)
    wrong_number = (len(gate.controls), len(gate.targets)) != GATES[gate.name]
    if wrong_number or len(set(nodes)) < len(nodes) or not all(0 <= node < num_qubits for node in nodes):
        shape = GATES[gate.name]
        raise DataError(
            f"gate {index}, {gate.name} with controls {list(gate.controls)} and targets {list(gate.targets)}: it "
            f"takes {shape.num_controls} and {shape.num_targets} different qubits of 0 to {num_qubits - 1}"
        )


def _count(nodes: Sequence[int], noun: str) -> str:
    return f"{len(nodes)} {noun}{'' if len(nodes) == 1 else 's'}"
