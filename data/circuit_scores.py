"""Whether circuits are what a prompt asked for, beside random circuits of the same length."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.circuit_gates import Circuit, InvalidCircuit, random_circuit, uses_only
from data.circuit_states import (
    fidelity,
    gates_of_prompt,
    is_same,
    schmidt_rank_vector,
    srv_of_prompt,
    unitary,
)


@dataclass(frozen=True)
class Task:
    """What a prompt asks of a circuit."""

    prompt: str
    unitary: NDArray[np.complex128] | None = None
    """What the circuit is to compute."""

    @property
    def srv(self) -> list[int] | None:
        """Return the Schmidt-rank vector that is asked for, if one is."""
        return srv_of_prompt(self.prompt)

    @property
    def gates(self) -> list[str] | None:
        """Return the only gates that are allowed, if the prompt names them."""
        return gates_of_prompt(self.prompt)

    @property
    def num_qubits(self) -> int | None:
        """Return on how many qubits that is, where it says."""
        if self.unitary is not None:
            return len(self.unitary).bit_length() - 1
        return None if self.srv is None else len(self.srv)


@dataclass(frozen=True)
class Judged:
    """A circuit, and what it is beside what was asked for."""

    circuit: Circuit | InvalidCircuit
    is_right: bool | None
    """None where the prompt asks for nothing that can be told from a circuit."""
    srv: list[int] | None = None
    """Where the prompt asks for one."""
    fidelity: float | None = None
    """Where a unitary is to be compiled."""

    @property
    def is_valid(self) -> bool:
        """Tell whether it is a circuit at all."""
        return isinstance(self.circuit, Circuit)


@dataclass(frozen=True)
class Scores:
    """Figures of the circuits that one prompt brought."""

    num_circuits: int
    valid: float
    """Share that are circuits; the other shares are of all that were drawn, too."""
    right: float | None
    """Share that are what was asked for; None where this cannot be told."""
    random_right: float | None
    """The same share of random circuits."""
    fidelity: float | None
    """Mean over all, with 0 for what is no circuit; None where no unitary was asked for."""
    random_fidelity: float | None
    distinct: int
    """Different circuits among the valid ones."""
    distinct_right: int | None
    """Those of them that are what was asked for."""
    new: int | None
    """Different circuits that the known ones lack; None where none are known."""
    new_right: int | None
    faults: dict[str, int]
    """Columns that are no gate, by what is wrong with them, most frequent first."""


def judge(task: Task, circuit: Circuit | InvalidCircuit) -> Judged:
    """Compare a circuit with what was asked for; what is no circuit is never right."""
    if not isinstance(circuit, Circuit):
        asked = task.srv is not None or task.unitary is not None
        return Judged(circuit, False if asked else None)
    if task.unitary is not None:
        made = unitary(circuit)
        fits = made.shape == task.unitary.shape
        is_right = is_same(made, task.unitary) and uses_only(
            circuit, task.gates or {g.name for g in circuit.gates}
        )
        return Judged(circuit, is_right, fidelity=fidelity(made, task.unitary) if fits else 0.0)
    if task.srv is not None:
        srv = schmidt_rank_vector(circuit)
        return Judged(circuit, srv == task.srv, srv=srv)
    return Judged(circuit, None)


def score(
    task: Task,
    judged: Sequence[Judged],
    *,
    num_qubits: int,
    gate_pool: Sequence[str],
    rng: np.random.Generator,
    num_random: int,
    known: Iterable[Circuit] | None = None,
) -> Scores:
    """Return the figures of what was drawn for one task.

    Args:
        task: What was asked for.
        judged: What was drawn, at least one.
        num_qubits: Qubits of the random circuits.
        gate_pool: Gates of the random circuits; where the prompt names some, these alone.
        rng: Draws the random circuits.
        num_random: How many; each has as many gates as one of those drawn, in turn.
        known: Circuits that are not new.
    """
    baseline = [
        judge(task, random_circuit(rng, num_qubits, length, task.gates or gate_pool))
        for length in np.resize([_length(each.circuit) for each in judged], num_random).tolist()
    ]
    distinct = {each.circuit: each.is_right for each in judged if each.is_valid}
    seen = None if known is None else set(known)
    new = (
        None
        if seen is None
        else {circuit: right for circuit, right in distinct.items() if circuit not in seen}
    )
    can_be_right = judged[0].is_right is not None
    faults = Counter(
        fault.kind
        for each in judged
        if isinstance(each.circuit, InvalidCircuit)
        for fault in each.circuit.faults
    )
    return Scores(
        num_circuits=len(judged),
        valid=_mean(each.is_valid for each in judged),
        right=_mean(bool(each.is_right) for each in judged) if can_be_right else None,
        random_right=_mean(bool(each.is_right) for each in baseline) if can_be_right else None,
        fidelity=None if task.unitary is None else _mean(each.fidelity or 0.0 for each in judged),
        random_fidelity=None if task.unitary is None else _mean(each.fidelity or 0.0 for each in baseline),
        distinct=len(distinct),
        distinct_right=sum(map(bool, distinct.values())) if can_be_right else None,
        new=None if new is None else len(new),
        new_right=None if new is None or not can_be_right else sum(map(bool, new.values())),
        faults=dict(faults.most_common()),
    )


def _length(circuit: Circuit | InvalidCircuit) -> int:
    return len(circuit.gates) if isinstance(circuit, Circuit) else circuit.num_columns


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
