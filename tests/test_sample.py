"""Tests of circuits as gates, of what they compute, of their drawings, and of the command that draws new ones."""

from collections import Counter

import numpy as np
import pytest
from launching import ROOT

from data.circuit_drawing import draw_picture, draw_text
from data.circuit_gates import (
    GATES,
    Circuit,
    Gate,
    InvalidCircuit,
    check_gate_pool,
    decode,
    encode,
    random_circuit,
    to_qasm,
)
from data.circuit_scores import Task, judge, score
from data.circuit_states import (
    as_unitary,
    fidelity,
    is_same,
    schmidt_rank_vector,
    state_vector,
    unitary,
)
from data.errors import DataError

SAMPLES = ROOT / "data" / "samples" / "circuits"
POOL = ["h", "cx", "z", "x", "ccx", "swap"]
H0, CX01, CX12 = Gate("h", (), (0,)), Gate("cx", (0,), (1,)), Gate("cx", (1,), (2,))
GHZ = Circuit(3, (H0, CX01, CX12))


def faults(columns, pool=POOL):
    """Return the faults of a grid that is given by its columns."""
    found = decode(np.array(columns).T, pool)
    assert isinstance(found, InvalidCircuit)
    return found.faults


def test_a_grid_of_tokens_is_read_column_by_column():
    grid = np.array([[1, -2, 0, 6], [0, 2, -2, 0], [0, 0, 2, 6]])
    assert decode(grid, POOL) == Circuit(3, (H0, CX01, CX12, Gate("swap", (), (0, 2))))


def test_every_gate_comes_back_from_its_tokens():
    rng = np.random.default_rng(0)
    for num_qubits in (3, 5):
        circuit = random_circuit(rng, num_qubits, 200, list(GATES))
        assert {gate.name for gate in circuit.gates} == set(GATES)
        assert decode(encode(circuit, list(GATES), 210), list(GATES)) == circuit


def test_columns_without_a_gate_are_passed_over():
    assert decode(np.array([[0, 1, 0, 0, 3], [0, 0, 0, 0, 0]]), POOL) == Circuit(2, (H0, Gate("z", (), (0,))))


def test_padding_ends_a_circuit_and_takes_qubits_away():
    grid = np.array([[1, -2, 7, 7], [0, 2, 7, 7], [7, 7, 7, 7]])
    assert decode(grid, POOL) == Circuit(2, (H0, CX01))


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ([-2, 0, 0], "controls without a target"),
        ([-2, -2, 2], "wrong number of qubits"),
        ([2, 0, 0], "wrong number of qubits"),
        ([1, 1, 0], "wrong number of qubits"),
        ([-1, 1, 0], "wrong number of qubits"),
        ([1, 3, 0], "several gates"),
        ([7, 1, 0], "padding beside a gate"),
        ([8, 0, 0], "token outside the gate pool"),
        ([-9, 0, 0], "token outside the gate pool"),
    ],
)
def test_a_column_that_is_no_gate_is_named(column, kind):
    (fault,) = faults([[1, 0, 0], column, [0, 0, 3]])
    assert (fault.column, fault.kind) == (1, kind)


def test_all_faults_of_a_grid_are_told():
    assert [fault.column for fault in faults([[-2, 0], [1, 0], [2, 2]])] == [0, 2]


def test_a_fault_says_what_the_gate_takes():
    (fault,) = faults([[-5, 5, 0]])
    assert str(fault) == (
        "column 0: wrong number of qubits (ccx has 1 control and 1 target, and takes 2 and 1)"
    )


def test_a_gate_behind_the_end_is_a_fault():
    (fault,) = faults([[1, 0], [7, 7], [0, 1]])
    assert (fault.column, fault.kind) == (2, "gate after the end")


def test_a_grid_of_padding_is_no_circuit():
    (fault,) = faults([[7, 7], [7, 7]])
    assert fault.kind == "nothing but padding"


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (["h", "rx"], "'rx' of the gate pool has an angle"),
        (["h", "cp"], "'cp' of the gate pool has an angle"),
        (["h", "toffoli"], "'toffoli' of the gate pool is unknown; known are h, x, y"),
        (["h", "x", "h"], "'h' is listed twice"),
        ([], "the gate pool is empty"),
    ],
)
def test_a_gate_pool_that_cannot_be_read_is_refused(pool, message):
    with pytest.raises(DataError, match=message):
        check_gate_pool(pool)


def test_a_circuit_that_does_not_fit_its_grid_is_refused():
    with pytest.raises(DataError, match="3 gates does not fit 2 columns"):
        encode(GHZ, POOL, 2)
    with pytest.raises(DataError, match="gate 0 is 'y', and the gate pool has h, cx"):
        encode(Circuit(1, (Gate("y", (), (0,)),)), POOL)
    with pytest.raises(DataError, match=r"gate 0, cx with controls \[0\] and targets \[2\]"):
        encode(Circuit(2, (Gate("cx", (0,), (2,)),)), POOL)


def test_open_qasm_names_controls_before_targets():
    circuit = Circuit(3, (H0, Gate("cx", (2,), (0,)), Gate("ccz", (0, 1), (2,)), Gate("swap", (), (0, 1))))
    assert to_qasm(circuit).splitlines() == [
        "OPENQASM 2.0;",
        'include "qelib1.inc";',
        "qreg q[3];",
        "h q[0];",
        "cx q[2],q[0];",
        "h q[2]; ccx q[0],q[1],q[2]; h q[2];",
        "swap q[0],q[1];",
    ]


def test_qubit_0_is_the_least_significant_bit():
    assert state_vector(Circuit(3, (Gate("x", (), (0,)),))).tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert unitary(Circuit(2, (CX01,))).real.tolist() == [
        [1, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 1, 0],
        [0, 1, 0, 0],
    ]


PAULI = {"x": [[0, 1], [1, 0]], "y": [[0, -1j], [1j, 0]], "z": [[1, 0], [0, -1]]}


@pytest.mark.parametrize("name", list(GATES))
def test_a_gate_is_its_base_where_all_controls_are_set_and_nothing_elsewhere(name):
    shape, num_qubits = GATES[name], 4
    controls = tuple(range(1, 1 + shape.num_controls))
    targets = (0, 3)[: shape.num_targets]
    matrix = unitary(Circuit(num_qubits, (Gate(name, controls, targets),)))
    base = name[shape.num_controls :]
    alone = unitary(Circuit(num_qubits, (Gate(base, (), targets),)))
    is_on = [all(index >> qubit & 1 for qubit in controls) for index in range(2**num_qubits)]
    expected = np.where(is_on, alone, np.eye(2**num_qubits))
    assert np.allclose(matrix, expected) and np.allclose(matrix.conj().T @ matrix, np.eye(2**num_qubits))
    if base in PAULI:
        assert np.allclose(unitary(Circuit(1, (Gate(base, (), (0,)),))), PAULI[base])


@pytest.mark.parametrize(
    ("names", "other"),
    [("ss", "z"), ("tt", "s"), ("s sdg", ""), ("t tdg", ""), ("hxh", "z"), ("hzh", "x")],
)
def test_gates_multiply_as_they_should(names, other):
    first, second = (
        Circuit(1, tuple(Gate(name, (), (0,)) for name in (text.split() if " " in text else text)))
        for text in (names, other)
    )
    assert np.allclose(unitary(first), unitary(second))


@pytest.mark.parametrize(
    ("gates", "srv"),
    [
        ((), [1, 1, 1]),
        ((H0,), [1, 1, 1]),
        ((H0, CX01), [2, 2, 1]),
        ((H0, Gate("cx", (0,), (2,))), [2, 1, 2]),
        ((H0, CX01, CX12), [2, 2, 2]),
        ((H0, CX01, CX01), [1, 1, 1]),
    ],
)
def test_the_schmidt_rank_vector_tells_which_qubits_are_entangled(gates, srv):
    assert schmidt_rank_vector(Circuit(3, gates)) == srv


def test_a_global_phase_makes_no_other_unitary():
    matrix = unitary(GHZ)
    assert is_same(matrix, np.exp(0.7j) * matrix) and fidelity(
        matrix, np.exp(0.7j) * matrix
    ) == pytest.approx(1)
    assert not is_same(matrix, unitary(Circuit(3, (H0, CX01))))
    assert not is_same(matrix, unitary(Circuit(2, (H0, CX01))))


def test_a_unitary_stored_in_half_precision_is_the_same():
    matrix = unitary(Circuit(3, (H0, Gate("h", (), (1,)), CX12, Gate("t", (), (0,)))))
    stored = np.stack([matrix.real, matrix.imag]).astype(np.float16)
    assert is_same(as_unitary(stored, "stored"), matrix)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (np.zeros((2, 3, 3)), r"file: a unitary is stored as \[2, 2\^qubits, 2\^qubits\].*\[2, 3, 3\]"),
        (np.zeros((4, 4)), r"this is \[4, 4\]"),
        (np.zeros((2, 4, 4)), "file: it is not a unitary, for .* by 1"),
        (np.full((2, 2, 2), np.nan), "it is not a unitary"),
    ],
)
def test_what_is_no_unitary_is_refused(parts, message):
    with pytest.raises(DataError, match=message):
        as_unitary(parts, "file")


def test_too_many_qubits_are_refused_by_their_number():
    with pytest.raises(DataError, match="40 qubits is not computed; the most are"):
        state_vector(Circuit(40, ()))


def test_random_circuits_take_gates_and_qubits_equally_often():
    circuit = random_circuit(np.random.default_rng(0), 3, 12_000, ["h", "cx"])
    counts = Counter(circuit.gates)
    for shape, placements, expected in (("h", 3, 2000), ("cx", 6, 1000)):
        found = [count for gate, count in counts.items() if gate.name == shape]
        assert len(found) == placements and max(abs(np.array(found) - expected)) < 5 * expected**0.5


def test_random_circuits_on_few_qubits_have_gates_that_fit():
    assert {gate.name for gate in random_circuit(np.random.default_rng(0), 2, 60, POOL).gates} == set(
        POOL
    ) - {"ccx"}
    with pytest.raises(DataError, match="no gate of ccx fits on 2 qubit"):
        random_circuit(np.random.default_rng(0), 2, 1, ["ccx"])


def test_a_circuit_is_drawn_as_text():
    circuit = Circuit(
        3,
        (
            H0,
            Gate("cx", (2,), (0,)),
            Gate("swap", (), (0, 1)),
            Gate("ccz", (0, 1), (2,)),
            Gate("tdg", (), (1,)),
        ),
    )
    assert draw_text(circuit).splitlines() == [
        "q0: ─H──⊕──╳──●──────",
        "        │  │  │",
        "q1: ────┼──╳──●──T†──",
        "        │     │",
        "q2: ────●─────●──────",
    ]


def test_circuits_are_drawn_as_a_picture(tmp_path):
    rng = np.random.default_rng(0)
    circuits = [(f"circuit {number}", random_circuit(rng, 3, number, list(GATES))) for number in range(7)]
    picture = draw_picture(circuits, tmp_path / "circuits.png", title="seven circuits")
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] > 300 and pixels.shape[1] > 1000
    # Boxes are filled with their colour, wires cross most of the width of a drawing.
    assert (np.abs(pixels - np.array([0xFD, 0xE6, 0x8A]) / 255).max(axis=-1) < 0.01).sum() > 500
    with pytest.raises(DataError, match="there is no circuit"):
        draw_picture([], tmp_path / "none.png")


def figures(task, circuits, **options):
    judged = [judge(task, circuit) for circuit in circuits]
    options = {"num_qubits": 3, "gate_pool": POOL, "num_random": 300, **options}
    return score(task, judged, rng=np.random.default_rng(0), **options)


def test_scores_count_circuits_that_are_what_was_asked_for():
    task = Task("Generate SRV: [2, 2, 2]")
    invalid = decode(np.array([[-2, 1], [0, 0], [0, 0]]), POOL)
    bell = Circuit(3, (H0, CX01))
    found = figures(task, [GHZ, GHZ, bell, invalid], known=[bell])
    assert (found.num_circuits, found.valid, found.right) == (4, 0.75, 0.5)
    assert (found.distinct, found.distinct_right, found.new, found.new_right) == (2, 1, 1, 1)
    assert found.faults == {"controls without a target": 1}
    assert found.random_right is not None and found.random_right < 0.05


def test_compiled_circuits_must_compute_the_unitary_with_allowed_gates_alone():
    target = unitary(Circuit(2, (Gate("z", (), (0,)),)))
    with_h = Circuit(2, (H0, Gate("x", (), (0,)), H0))
    with_z = Circuit(2, (Gate("z", (), (0,)),))
    task = Task("Compile using: ['h', 'x']", target)
    assert [judge(task, circuit).is_right for circuit in (with_h, with_z)] == [True, False]
    assert [judge(task, circuit).fidelity for circuit in (with_h, with_z)] == pytest.approx([1, 1])
    found = figures(task, [with_h, Circuit(2, ())], num_qubits=2)
    assert (found.right, found.fidelity) == (0.5, pytest.approx(0.5))
    assert found.random_fidelity is not None and 0 < found.random_fidelity < 0.5


def test_a_prompt_that_asks_for_nothing_computable_has_no_right_share():
    found = figures(Task("a circuit, please"), [GHZ])
    assert (found.valid, found.right, found.random_right, found.distinct_right) == (1.0, None, None, None)
