"""The circuits of a data set as lists of gates, to tell whether drawn ones are new."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.circuit_folder import CircuitSet, open_circuit_sets
from data.circuit_gates import Circuit, decode
from data.errors import DataError


@dataclass(frozen=True)
class KnownCircuits:
    """The circuits of a data set in the order of its files, and the prompt of each."""

    circuits: list[Circuit]
    prompts: list[str]

    def share(self, prompt: str) -> float:
        """Return the share of the circuits that have this prompt."""
        return Counter(self.prompts)[prompt] / len(self.prompts)


def read_known_circuits(path: str | Path) -> KnownCircuits:
    """Read a data set of circuits, or all that a folder holds.

    Raises:
        DataError: there is none, it is damaged, or it holds something that is no circuit.
    """
    circuits: list[Circuit] = []
    prompts: list[str] = []
    for each in open_circuit_sets(path)[0]:
        circuits += [read_circuit(each, row) for row in range(len(each))]
        prompts += [each.prompts[index] for index in each.prompt_idx]
    if not circuits:
        raise DataError(f"{path}: the data set has no circuits")
    return KnownCircuits(circuits, prompts)


def read_circuit(circuits: CircuitSet, row: int) -> Circuit:
    """Return one circuit of a set.

    Raises:
        DataError: it is none.
    """
    grid = circuits.tokens.rows(slice(row, row + 1))[0][: circuits.qubits[row], : circuits.extents[row]]
    found = decode(grid.astype(np.int32), circuits.gate_pool)
    if not isinstance(found, Circuit):
        raise DataError(f"{circuits.tokens.path}: circuit {row} is none: {'; '.join(map(str, found.faults))}")
    return found
