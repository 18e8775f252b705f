"""Tests of circuits as gates, of what they compute, of their drawings, and of the command that draws new ones."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
from launching import ROOT, run_command
from safetensors.numpy import load_file, save_file

from data.circuit_drawing import draw_picture, draw_text
from data.circuit_folder import open_circuit_sets
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
from data.known_circuits import read_circuit, read_known_circuits
from models.circuit_diffusion import CircuitDiffusion, CircuitDiffusionConfig
from trainer import circuit_sampling, sample

pytestmark = pytest.mark.usefixtures("forked_programs")

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


def test_a_prompt_with_a_number_that_python_does_not_read_asks_for_nothing_known():
    task = Task(f"Generate SRV: [1, {'9' * 5000}]")
    assert (task.srv, task.num_qubits) == (None, None)


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


SRV_PROMPTS = [f"Generate SRV: {srv}" for srv in ("[1, 1, 1]", "[1, 2, 2]", "[2, 2, 2]")]
GHZ_PROMPT = SRV_PROMPTS[2]
DATA_SETS = ("srv_3q", "srv_mixed/3q", "srv_mixed/4q", "unitary_3q")


def opened(name):
    """Return a bundled data set, and its circuits as gates."""
    ((found,), _, _) = open_circuit_sets(SAMPLES / name)
    return found, [read_circuit(found, row) for row in range(len(found))]


@pytest.mark.parametrize("name", DATA_SETS)
def test_all_bundled_circuits_come_back_from_their_gates(name):
    found, circuits = opened(name)
    stored = found.tokens.rows(slice(None))
    assert all(
        (encode(c, POOL, stored.shape[2]) == grid).all() for c, grid in zip(circuits, stored, strict=True)
    )


@pytest.mark.parametrize("name", DATA_SETS[:3])
def test_the_labels_of_all_bundled_circuits_are_reproduced(name):
    found, circuits = opened(name)
    labels = [found.prompts[index] for index in found.prompt_idx]
    assert len(labels) > 580
    assert [f"Generate SRV: {schmidt_rank_vector(circuit)}" for circuit in circuits] == labels


def test_the_unitaries_of_all_bundled_circuits_are_reproduced():
    found, circuits = opened("unitary_3q")
    assert found.unitaries is not None
    stored = found.unitaries.rows(slice(None))
    parts = [[matrix.real, matrix.imag] for matrix in map(unitary, circuits)]
    assert len(parts) == 594 and np.abs(np.array(parts) - stored).max() < 1e-7


def test_compiled_circuits_of_the_data_use_the_gates_of_their_prompts():
    found, circuits = opened("unitary_3q")
    for circuit, index in zip(circuits, found.prompt_idx, strict=True):
        task = Task(found.prompts[index], unitary(circuit))
        assert judge(task, circuit).is_right, (task.prompt, circuit)


def test_known_circuits_are_those_of_all_sets_of_a_folder():
    known = read_known_circuits(SAMPLES / "srv_mixed")
    assert len(known.circuits) == 583 + 596
    assert known.share("Generate SRV: [1, 1, 1]") == pytest.approx(518 / 1179)
    assert {circuit.num_qubits for circuit in known.circuits} == {3, 4}


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


@pytest.mark.parametrize("gates", ["[{[]: 1}]", "[" + "-" * 100_000 + "1]", "[h]"])
def test_gates_that_are_no_list_of_names_are_none(gates):
    assert Task(f"Compile using: {gates}").gates is None


def untrained(folder, **options):
    """Save a small model at random initialisation and return its folder."""
    sizes = {"model_features": [32], "num_heads": 2, "t_emb_size": 32, "cond_emb_size": 32}
    config = CircuitDiffusionConfig(
        vocab_size=len(POOL) + 2,
        num_qubits=3,
        gate_pool=tuple(POOL),
        **{"prompts": tuple(SRV_PROMPTS), "unet_args": sizes, "max_length": 8, **options},
    )
    CircuitDiffusion(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def srv_model(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("srv") / "model")


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    prompts = open_circuit_sets(SAMPLES / "unitary_3q")[0][0].prompts
    return untrained(
        tmp_path_factory.mktemp("unitary") / "model",
        prompts=tuple(prompts),
        has_unitary=True,
        unet_class="models.circuit_unet.CircuitCompilationUNet",
    )


def draw(model, output, *options, prompts=(GHZ_PROMPT,), code=0):
    """Run the command with few and cheap draws."""
    asked = [part for prompt in prompts for part in ("--prompt", prompt)]
    fixed = ["--num", "6", "--num-steps", "3", "--num-random", "50", "--device", "cpu"]
    paths = ["--model", str(model), "--output", str(output)]
    assert sample.main([*paths, *asked, *fixed, *map(str, options)]) == code
    return output


def tokens_of(output, index=0):
    return load_file(output / "tokens.safetensors")[str(index)]


@pytest.fixture
def known_draws(monkeypatch):
    """Let the model draw two GHZ circuits, one of a pair, and one grid that is none."""
    circuits = [GHZ, GHZ, Circuit(3, (H0, CX01))]
    grids = [encode(circuit, POOL, 8) for circuit in circuits] + [np.full((3, 8), 7, np.int32)]
    grids[3][:, 0] = [-2, 0, 0]
    monkeypatch.setattr(circuit_sampling, "draw_tokens", lambda *_, **__: np.stack(grids))


def test_what_is_drawn_is_printed_beside_random_circuits_and_the_data(
    srv_model, tmp_path, known_draws, capsys
):
    draw(srv_model, tmp_path / "out", "--dataset", SAMPLES / "srv_3q")
    lines = capsys.readouterr().out.splitlines()
    headers, values = (line.replace(" %", "%").split("  ") for line in (lines[0], lines[2]))
    found = dict(
        zip([h.strip() for h in headers if h.strip()], [v.strip() for v in values if v.strip()], strict=True)
    )
    assert found.pop("random").endswith("%")
    assert found == {
        "prompt": GHZ_PROMPT,
        "circuits": "4",
        "valid": "75.0%",
        "right": "50.0%",
        "in dataset": "3.1%",
        "distinct": "2",
        "distinct right": "1",
        "new": found["new"],
        "new right": found["new right"],
    }
    assert f"{GHZ_PROMPT}: columns that are no gate: 1 controls without a target" in lines


def test_what_is_drawn_is_written_as_tokens_gates_figures_and_drawings(srv_model, tmp_path, known_draws):
    output = draw(srv_model, tmp_path / "out", "--draw", 2, "--qasm")
    (told,) = json.loads((output / "circuits.json").read_text())
    assert [circuit["valid"] for circuit in told["circuits"]] == [True, True, True, False]
    assert told["circuits"][0]["gates"] == [gate.to_json() for gate in GHZ.gates]
    assert told["circuits"][2]["srv"] == [2, 2, 1] and told["circuits"][2]["right"] is False
    assert told["circuits"][3]["faults"] == ["column 0: controls without a target (cx with 1 control)"]
    (scores,) = json.loads((output / "scores.json").read_text())["prompts"]
    assert (scores["right"], scores["num_qubits"], scores["length"]) == (0.5, 3, 8)
    assert decode(tokens_of(output)[0], POOL) == GHZ
    assert (output / "drawing_0.png").read_bytes()[1:4] == b"PNG"
    assert (output / "drawing_0.txt").read_text().split("\n\n")[1:] == [
        f"0: SRV [2, 2, 2], as asked\n{draw_text(GHZ)}",
        f"1: SRV [2, 2, 2], as asked\n{draw_text(GHZ)}\n",
    ]
    assert (output / "qasm" / "0_2.qasm").read_text() == to_qasm(Circuit(3, (H0, CX01)))
    assert sorted(file.name for file in (output / "qasm").iterdir()) == ["0_0.qasm", "0_1.qasm", "0_2.qasm"]


@pytest.mark.parametrize(("form", "kept"), [("png", "png"), ("text", "txt")])
def test_only_the_asked_form_is_drawn(srv_model, tmp_path, known_draws, form, kept):
    output = draw(srv_model, tmp_path / "out", "--format", form)
    assert [file.suffix for file in output.glob("drawing_*")] == [f".{kept}"]


def test_a_seed_draws_the_same_circuits_whatever_the_batch_size(srv_model, tmp_path):
    first, again, other = (
        tokens_of(draw(srv_model, tmp_path / f"{number}", "--batch-size", size, "--seed", seed))
        for number, (size, seed) in enumerate([(6, 1), (4, 1), (6, 2)])
    )
    assert (first == again).all() and (first != other).any()
    assert len({grid.tobytes() for grid in first}) == 6


def test_another_prompt_beside_it_does_not_change_what_is_drawn(srv_model, tmp_path):
    alone = tokens_of(draw(srv_model, tmp_path / "alone"))
    both = draw(srv_model, tmp_path / "both", prompts=(SRV_PROMPTS[1], GHZ_PROMPT))
    assert (tokens_of(both, 1) == alone).all() and (tokens_of(both, 0) != alone).any()


def test_more_circuits_begin_with_those_of_fewer(srv_model, tmp_path):
    few, many = (tokens_of(draw(srv_model, tmp_path / str(num), "--num", num)) for num in (2, 6))
    assert (many[:2] == few).all()


def test_a_circuit_of_the_data_is_compiled_anew(compiler, tmp_path, monkeypatch):
    found, circuits = opened("unitary_3q")
    grid = encode(circuits[5], POOL, 8)
    seen = {}

    def drawn(*_, **options):
        seen.update(options)
        return np.stack([grid, encode(Circuit(3, ()), POOL, 8)])

    monkeypatch.setattr(circuit_sampling, "draw_tokens", drawn)
    dataset = ("--dataset", SAMPLES / "unitary_3q", "--circuit-of-dataset", 5)
    output = draw(compiler, tmp_path / "out", *dataset, prompts=())
    (scores,) = json.loads((output / "scores.json").read_text())["prompts"]
    assert scores["prompt"] == found.prompts[found.prompt_idx[5]]
    assert is_same(seen["unitary"], unitary(circuits[5]))
    (told,) = json.loads((output / "circuits.json").read_text())
    assert [each["right"] for each in told["circuits"]] == [True, False]
    assert told["circuits"][0]["fidelity"] == pytest.approx(1)
    assert scores["fidelity"] == pytest.approx((1 + told["circuits"][1]["fidelity"]) / 2)


def test_a_unitary_of_a_file_is_compiled_on_its_qubits(compiler, tmp_path):
    matrix = unitary(Circuit(2, (CX01,)))
    save_file({"U": np.stack([matrix.real, matrix.imag]).astype(np.float32)}, tmp_path / "u.safetensors")
    prompt = "Compile using: ['h', 'cx', 'z', 'x', 'ccx', 'swap']"
    output = draw(compiler, tmp_path / "out", "--unitary", tmp_path / "u.safetensors", prompts=(prompt,))
    assert tokens_of(output).shape == (6, 2, 8)
    (scores,) = json.loads((output / "scores.json").read_text())["prompts"]
    assert 0 < scores["random_fidelity"] < 1


@pytest.mark.parametrize(
    ("options", "prompts", "message"),
    [
        (
            (),
            ("Generate SRV: [2, 1, 2]",),
            "'Generate SRV: [2, 1, 2]': the model was not trained on it; it knows\n",
        ),
        ((), (), f"--prompt is missing; the model knows\n  {SRV_PROMPTS[0]}\n"),
        (("--num-qubits", 2), (GHZ_PROMPT,), f"--num-qubits 2: what is asked for by '{GHZ_PROMPT}' has 3"),
        (("--num", 0), (GHZ_PROMPT,), "--num 0: it must be at least 1"),
        (("--batch-size", 0), (GHZ_PROMPT,), "--batch-size 0: it must be at least 1"),
        (("--num-steps", 1001), (GHZ_PROMPT,), "num_steps is 1001"),
        (("--guidance", -1), (GHZ_PROMPT,), "--guidance -1: it must be a number of at least 0"),
        (("--guidance", "nan"), (GHZ_PROMPT,), "--guidance nan: it must be a number"),
        (("--circuit-of-dataset", 0), (GHZ_PROMPT,), "--circuit-of-dataset names a circuit of --dataset"),
        (("--dataset", "/nowhere"), (GHZ_PROMPT,), "/nowhere: there is no such folder"),
        (
            ("--dataset", SAMPLES / "srv_3q", "--circuit-of-dataset", 588),
            (GHZ_PROMPT,),
            "--circuit-of-dataset 588: the data set has circuits 0 to 587",
        ),
        (
            ("--dataset", SAMPLES / "srv_3q", "--circuit-of-dataset", 0),
            (GHZ_PROMPT,),
            "--circuit-of-dataset: the model was trained without unitaries",
        ),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(srv_model, tmp_path, capsys, options, prompts, message):
    output = draw(srv_model, tmp_path / "out", *options, prompts=prompts, code=2)
    assert message in capsys.readouterr().err
    assert not output.exists() and not list(tmp_path.glob(".*"))


def test_a_model_that_compiles_asks_for_a_unitary(compiler, tmp_path, capsys):
    draw(compiler, tmp_path / "out", code=2)
    assert (
        "the model compiles unitaries, and none is given: name one with --unitary" in capsys.readouterr().err
    )


def test_a_file_without_a_unitary_is_refused(compiler, tmp_path, capsys):
    file = tmp_path / "u.safetensors"
    file.write_bytes(b"no")
    draw(compiler, tmp_path / "out", "--unitary", file, code=2)
    save_file({"a": np.zeros(2), "b": np.zeros(2)}, file)
    draw(compiler, tmp_path / "out", "--unitary", file, code=2)
    told = capsys.readouterr().err
    assert "u.safetensors: not a readable safetensors file" in told
    assert "it holds a, b; name the matrix `unitary`" in told


def test_lengths_that_the_model_cannot_draw_are_refused(tmp_path, capsys):
    model = untrained(
        tmp_path / "model",
        unet_args={"model_features": [32, 32], "num_heads": 2, "cond_emb_size": 32},
        max_length=None,
    )
    draw(model, tmp_path / "out", "--length", 7, code=2)
    draw(model, tmp_path / "out", code=2)
    told = capsys.readouterr().err
    assert "--length 7: the model draws multiples of 2 columns" in told and "--length is missing" in told


def test_a_model_trained_without_guidance_is_drawn_from_without(tmp_path, capsys):
    model = untrained(tmp_path / "model", enable_guidance_train=False)
    draw(model, tmp_path / "plain")
    draw(model, tmp_path / "guided", "--guidance", 3, code=2)
    assert "--guidance 3: the model was trained with every prompt" in capsys.readouterr().err


def test_only_folders_of_this_command_are_replaced(srv_model, tmp_path, capsys):
    output = draw(srv_model, tmp_path / "out")
    draw(srv_model, output, code=2)
    draw(srv_model, output, "--overwrite", "--num", 2)
    assert len(tokens_of(output)) == 2
    (tmp_path / "mine").mkdir()
    draw(srv_model, tmp_path / "mine", "--overwrite", code=2)
    told = capsys.readouterr().err
    assert "out exists; name another folder, or give --overwrite" in told
    assert "mine was not written by this command, so it is not replaced" in told


def test_a_folder_without_a_circuit_model_is_refused(tmp_path, capsys):
    from models.encoder import EncoderConfig, MaskedCellEncoder
    from models.pretrained import save_pretrained

    sizes = {"hidden_dim": 8, "num_layers": 1, "num_heads": 1, "ffn_dim": 8}
    save_pretrained(MaskedCellEncoder(EncoderConfig(vocab_size=8, n_bins=3, **sizes)), tmp_path / "cells")
    draw(tmp_path / "cells", tmp_path / "out", code=2)
    draw(tmp_path / "missing", tmp_path / "out", code=2)
    told = capsys.readouterr().err
    assert "it holds a MaskedCellEncoder, which draws no circuits" in told
    assert "missing: there is no such folder" in told


def test_modules_in_the_current_folder_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    draw(tmp_path / "missing", tmp_path / "out", code=2)
    assert sys.path[-1] == str(tmp_path)


def test_the_commands_train_and_draw_from_all_that_a_run_leaves(tmp_path):
    sizes = [
        f"training.model.params.{key}=[{value}]" for key, value in (("model_features", 16), ("num_heads", 2))
    ]
    settings = ["model.params.cond_emb_size=16", "training.max_steps=3", "training.balance_max=20"]
    command = [
        "python",
        "trainer/train.py",
        "--config",
        "configs/circuits/config.yaml",
        "training=srv_3q_recipe",
    ]
    saved = tmp_path / "saved"
    run_command(
        [
            *command,
            f"training.general.output_path={saved}",
            *sizes,
            *(f"training.{each}" for each in settings),
        ]
    )
    (run_folder,) = (saved / "runs").iterdir()
    drawn = []
    for number, model in enumerate((saved, run_folder, run_folder / "checkpoint_3")):
        output = tmp_path / f"drawn_{number}"
        options = ["--num", "3", "--num-steps", "2", "--num-random", "10", "--device", "cpu"]
        paths = ["--model", model, "--output", output, "--dataset", SAMPLES / "srv_3q"]
        told = run_command(["python", "-m", "trainer", "sample", *paths, "--prompt", GHZ_PROMPT, *options])
        assert GHZ_PROMPT in told.stdout and f"wrote {output}" in told.stdout
        drawn.append(tokens_of(output))
    assert drawn[0].shape == (3, 3, 8)
    assert all((each == drawn[0]).all() for each in drawn), "the averaged weights are those of all three"
