"""Predicted cells: the rules for their files, what they are compared with, and their scores by the field's programs."""

import dataclasses
import json
import subprocess
import sys
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from launching import ROOT
from scipy import sparse

from data.simulator import simulate_perturbations
from trainer import score as command
from trainer.errors import UserError
from trainer.scoring import vcc, vcc_programs
from trainer.scoring.vcc_baselines import copied_controls, learn_mean_response, mean_response_cells
from trainer.scoring.vcc_cells import load_cells, shared_target_sum
from trainer.scoring.vcc_contract import check_pair, check_upload, raise_problems, read_names
from trainer.scoring.vcc_file import read_perturbed_file, stated_control_label
from trainer.scoring.vcc_options import VCC2025, VCC2026, ScoreOptions

COLUMNS = ("target_gene", "cell_type", "context")
GENES = ("A", "B", "C", "D", "E")
LABELS = ("A", "A", "B", "B", "non-targeting", "non-targeting")
OPTIONS = {"vcc2025": ScoreOptions(VCC2025), "vcc2026": ScoreOptions(VCC2026)}
SMALL = dataclasses.replace(
    VCC2026,
    num_genes=5,
    cells_per_perturbation=2,
    perturbations_per_context=2,
    max_stored_values=20,
)
SMALL_2025 = dataclasses.replace(VCC2025, num_genes=5, max_cells=6)


def write(path, labels=LABELS, matrix=None, genes=GENES, uns=None, **obs):
    """Write cells whose counts are 1 to 3 everywhere, if no matrix is given."""
    labels = list(labels)
    if matrix is None:
        matrix = np.random.default_rng(0).integers(1, 4, (len(labels), len(genes)))
    table = pd.DataFrame({"target_gene": labels, **{name: list(values) for name, values in obs.items()}})
    table.index = table.index.astype(str)
    matrix = matrix if sparse.issparse(matrix) else sparse.csr_matrix(np.asarray(matrix, np.float32))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")
        cells = anndata.AnnData(matrix, obs=table, var=pd.DataFrame(index=pd.Index(list(genes))))
        cells.uns.update(uns or {})
        cells.write_h5ad(path)
    return path


def read(path):
    return read_perturbed_file(path, COLUMNS)


def problems_of(tmp_path, preset="vcc2026", *, real=None, options=None, **prediction):
    predicted = write(tmp_path / "pred.h5ad", **prediction)
    measured = write(tmp_path / "real.h5ad", **(real or {}))
    return check_pair(read(predicted), read(measured), options or OPTIONS[preset])


def counts(labels=LABELS, **changed):
    """Return counts of 2 for each cell, some of them changed: `counts(r0c1=-1)`."""
    matrix = np.full((len(labels), len(GENES)), 2.0)
    for place, value in changed.items():
        row, column = place[1:].split("c")
        matrix[int(row), int(column)] = value
    return matrix


def test_a_prediction_that_can_be_scored_has_no_violation(tmp_path):
    assert problems_of(tmp_path, "vcc2026") == problems_of(tmp_path, "vcc2025") == []


def test_a_prediction_needs_no_control_cells_of_its_own(tmp_path):
    assert problems_of(tmp_path, labels=LABELS[:4]) == []


VIOLATIONS = {
    "fractions": ("vcc2026", {"matrix": counts(r0c0=0.5)}, r"values: 1 are no whole numbers \(such as 0.5\)"),
    "negative": ("vcc2026", {"matrix": counts(r0c0=-1)}, "values: 1 are negative; none may be below 0"),
    "not finite": ("vcc2025", {"matrix": counts(r0c0=np.nan)}, "values: 1 are NaN or infinite"),
    "cell total": (
        "vcc2026",
        {"matrix": counts(r1c0=1e6)},
        r"1 cells have more than 1,000,000 counts \(row 1",
    ),
    "no logarithm": ("vcc2025", {"matrix": counts(r0c0=20.5)}, "values: up to 20.5 and not whole"),
    "gene order": (
        "vcc2026",
        {"genes": "BACDE"},
        "genes: not in the order of the real file: column 0 is 'B'",
    ),
    "genes missing": ("vcc2025", {"genes": "ABCDX"}, r"1 of the real file are missing \(E\)"),
    "genes extra": ("vcc2025", {"genes": "ABCDX"}, r"1 are not in the real file \(X\)"),
    "genes twice": ("vcc2026", {"genes": "AACDE"}, r"genes: 1 names more than once \(A\)"),
    "perturbation missing": ("vcc2026", {"labels": "AAAACC"}, r"1 of the real file are missing \(B\)"),
    "perturbation extra": ("vcc2026", {"labels": "AABBCC"}, r"1 are not in the real file \(C\)"),
    "one cell": ("vcc2026", {"labels": "AAAAAB"}, r"fewer than 2 cells \(B \(1\)\); each needs at least 2"),
    "no label": ("vcc2025", {"labels": ["A", "A", "B", "B", "", ""]}, "target_gene: 2 cells without a name"),
}


@pytest.mark.parametrize(("preset", "prediction", "match"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_a_violation_is_named_with_what_is_allowed(tmp_path, preset, prediction, match):
    problems = problems_of(tmp_path, preset, **prediction)
    with pytest.raises(UserError, match=match):
        raise_problems(tmp_path / "pred.h5ad", "the rules", problems)


@pytest.mark.parametrize("which", ["pred", "real", "train"])
def test_a_file_that_takes_content_from_another_is_refused(tmp_path, capsys, which):
    files = {name: write(tmp_path / f"{name}.h5ad") for name in ("pred", "real", "train")}
    with h5py.File(files[which], "r+") as file:
        del file["X"]
        file["X"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/X")
    arguments = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    assert command.main([*arguments, "--preset", "vcc2026", "--output", str(tmp_path / "scores")]) == 2
    assert f"{which}.h5ad: 'X' lies in another file" in " ".join(capsys.readouterr().err.split())


def test_all_violations_are_named_at_once(tmp_path):
    problems = problems_of(tmp_path, genes="BACDE", matrix=counts(r0c0=-1, r1c1=0.5), labels="AACC" + "DD")
    text = "\n".join(problems)
    for part in (
        "negative",
        "no whole numbers",
        "not in the order",
        "(B) are missing",
        "are not in the real file",
    ):
        assert part.replace("(B) are missing", "are missing (B)") in text, text
    with pytest.raises(UserError, match="pred.h5ad: 5 violations of the rules"):
        raise_problems(tmp_path / "pred.h5ad", "the rules", problems)


def test_a_real_file_without_controls_is_refused_with_the_labels_that_it_has(tmp_path):
    problems = problems_of(tmp_path, labels=LABELS[:4], real={"labels": ["A", "A", "B", "B", "ctrl", "ctrl"]})
    assert any("real file: 0 control cells" in each and "A, B, ctrl" in each for each in problems)


def test_real_perturbations_that_were_not_predicted_may_be_left_out(tmp_path):
    options = dataclasses.replace(OPTIONS["vcc2026"], only_predicted=True)
    assert problems_of(tmp_path, labels="AAAA", options=options) == []


def test_perturbations_are_compared_in_each_context(tmp_path):
    contexts = ["x", "x", "y", "y", "x", "y"]
    problems = problems_of(tmp_path, context=["x"] * 4 + ["y"] * 2, real={"context": contexts})
    text = "\n".join(problems)
    assert "1 of context 'x' are not in the real file (B)" in text
    assert "1 of the real file of context 'y' are missing (B)" in text
    assert "real file: 1 control cells of context 'x'" in text


def test_a_prediction_says_of_itself_what_values_it_holds(tmp_path):
    uns = {"cellphase": json.dumps({"kind": "lognorm"})}
    problems = problems_of(tmp_path, matrix=counts(r0c0=0.5), uns=uns)
    assert "it says of itself that it holds lognorm; vcc2026 takes raw counts" in problems[0]


def test_log_normalised_values_are_sent_to_the_preset_that_scores_them(tmp_path):
    hint = "takes raw counts (--preset vcc2025 scores log-normalised values)"
    assert hint in problems_of(tmp_path, matrix=counts(r0c0=0.5))[0]
    assert hint not in problems_of(tmp_path, matrix=counts(r0c0=99.5))[0]


@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_matrix, np.asarray])
def test_values_are_judged_alike_in_every_layout(tmp_path, kind):
    matrix = counts(r0c0=0.5, r1c1=-3, r2c2=0)
    cells = anndata.AnnData(kind(matrix), obs=pd.DataFrame({"target_gene": LABELS}, index=list("abcdef")))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    values = read(tmp_path / "cells.h5ad").values
    assert (values.num_fractional, values.num_negative, values.example_fractional) == (1, 1, 0.5)
    np.testing.assert_allclose(values.totals, matrix.sum(axis=1))
    np.testing.assert_array_equal(
        load_cells(read(tmp_path / "cells.h5ad"), None, None).matrix.toarray(), matrix
    )


def upload_problems(path, preset=SMALL, genes=GENES, perturbations=("A", "B")):
    return check_upload(read(path), ScoreOptions(preset), genes, perturbations)


def test_an_upload_of_2026_that_keeps_the_rules_has_no_violation(tmp_path):
    assert upload_problems(write(tmp_path / "pred.h5ad", "AABB", context="xxxx")) == []


def test_an_upload_of_2025_may_have_its_genes_in_any_order_and_has_controls(tmp_path):
    assert upload_problems(write(tmp_path / "pred.h5ad", genes="BACDE"), SMALL_2025) == []
    problems = upload_problems(write(tmp_path / "pred.h5ad", "AABBAA" + "A"), SMALL_2025)
    assert any("control cells: none" in each for each in problems)
    assert any("cells: 7; at most 6" in each for each in problems)


UPLOADS = {
    "number of genes": ({"genes": "ABCDEF"}, "genes: 6; an upload has 5"),
    "order": ({"genes": "BACDE"}, "genes: not in the order of the challenge's list"),
    "cells": ({"labels": "AAAB", "context": "xxxx"}, "have another number of cells than 2 (A (3), B (1))"),
    "controls": (
        {"context": "xxxxxx", "labels": LABELS},
        "control cells: 2 rows of 'non-targeting'; an upload has none",
    ),
    "no context": ({}, "obs: no column 'context'"),
    "number of perturbations": (
        {"labels": "AABBCC", "context": "xxxxxx"},
        "perturbations: 3 in context 'x'; an",
    ),
    "a context lacks one": ({"labels": "AABBAA", "context": "xxxxyy"}, "1 in context 'y' are missing (B)"),
    "not asked for": ({"labels": "AACC", "context": "xxxx"}, "1 in context 'x' were not asked for (C)"),
    "size": ({"labels": "AABBB", "context": "xxxxx"}, "size: 25 stored values; at most 20"),
}


@pytest.mark.parametrize(("prediction", "expected"), UPLOADS.values(), ids=UPLOADS)
def test_a_violation_of_the_upload_contract_is_named(tmp_path, prediction, expected):
    path = write(tmp_path / "pred.h5ad", **{"labels": "AABB", **prediction})
    assert any(expected in each for each in upload_problems(path)), upload_problems(path)


def test_the_sizes_of_uploads_are_those_of_the_programs():
    prep = pytest.importorskip("cell_eval._cli._prep")
    config = pytest.importorskip("cell_eval2.config")
    assert (VCC2025.num_genes, VCC2025.max_cells) == (prep.EXPECTED_GENE_DIM, prep.MAX_CELL_DIM)
    preset = config.EvalConfig.from_preset("vcc2026")
    assert preset.max_counts_per_cell == 1_000_000 and preset.input_type == VCC2026.kind


def test_the_scored_metrics_are_those_of_the_programs():
    runner = pytest.importorskip("cell_eval._pipeline._runner")
    competition = pytest.importorskip("cell_eval2.competition")
    assert set(VCC2025.metrics) == set(runner.VCC_METRICS)
    assert set(VCC2026.metrics) == set(competition.competition_members())


def test_names_are_read_from_plain_lists_and_from_tables(tmp_path):
    (tmp_path / "genes.csv").write_text("A\nB\n")
    (tmp_path / "counts.csv").write_text("n_cells,target_gene\n5,B\n6,C\n")
    assert read_names(tmp_path / "genes.csv") == ["A", "B"]
    assert read_names(tmp_path / "counts.csv") == ["B", "C"]
    (tmp_path / "empty.csv").write_text("\n")
    with pytest.raises(UserError, match="it holds no name"):
        read_names(tmp_path / "empty.csv")


def simulated(tmp_path, **options):
    """Write a real file, a prediction of the same truth and a training file of one simulation; return their paths."""
    sizes = {
        "num_genes": 120,
        "num_pathways": 4,
        "cells_per_target": 120,
        "num_cell_types": 1,
        "num_batches": 1,
    }
    cells = simulate_perturbations(**{**sizes, "control_cells": 150, "strength": 2.0, **options}).to_anndata()
    labels = cells.obs["target_gene"].astype(str).to_numpy()
    targets = [name for name in sorted(set(labels)) if name != "non-targeting"]
    held_out, is_control = np.isin(labels, targets[::3]), labels == "non-targeting"
    is_first = np.arange(len(labels)) % 2 == 0
    paths = {name: tmp_path / f"{name}.h5ad" for name in ("real", "pred", "train")}
    cells[(held_out & is_first) | is_control].write_h5ad(paths["real"])
    cells[held_out & ~is_first].write_h5ad(paths["pred"])
    cells[~held_out | is_control].write_h5ad(paths["train"])
    return paths


def mean_of(matrix):
    return np.asarray(matrix.mean(axis=0)).ravel()


def test_the_mean_response_weighs_training_perturbations_alike_and_leaves_out_scored_ones(tmp_path):
    real = write(tmp_path / "real.h5ad", ["A", "A", "non-targeting", "non-targeting"])
    labels = ["A", "A", "B", "C", "C", "C", "non-targeting"]
    matrix = np.array([[9] * 5, [9] * 5, [4] * 5, [1] * 5, [2] * 5, [3] * 5, [2] * 5])
    train = write(tmp_path / "train.h5ad", labels, matrix)
    cells, notes = load_cells(read(real), None, None), []
    response = learn_mean_response([train], cells, OPTIONS["vcc2026"], None, None, notes)
    np.testing.assert_allclose(response.perturbed[""], [3] * 5)  # of B's 4 and C's 2
    np.testing.assert_allclose(response.controls[""], [2] * 5)
    assert response.num_perturbations == {"": 2}
    assert notes == [
        "mean response: of training perturbations (2); 1 scored ones in the training files left out"
    ]


def test_a_perturbation_that_is_scored_in_one_cell_type_may_be_learned_from_in_another(tmp_path):
    real = write(tmp_path / "real.h5ad", ["A", "A", "non-targeting", "non-targeting"], cell_type="xxxx")
    train = write(
        tmp_path / "train.h5ad",
        ["A", "B", "non-targeting"] * 2,
        np.repeat([[9], [4], [2], [6], [8], [1]], 5, axis=1),
        cell_type="xxxyyy",
    )
    cells = load_cells(read(real), "cell_type", None)
    response = learn_mean_response([train], cells, OPTIONS["vcc2026"], None, "cell_type", [])
    assert {name: profile[0] for name, profile in response.perturbed.items()} == {"x": 4, "y": 7}
    assert response.of("z")[0][0] == 5.5  # a cell type without training cells: the mean over the others


def test_the_mean_response_in_counts_is_whole_and_has_the_mean_of_the_ratio(tmp_path):
    paths = simulated(tmp_path)
    options, real = OPTIONS["vcc2026"], load_cells(read(paths["real"]), "cell_type", None)
    response = learn_mean_response([paths["train"]], real, options, None, "cell_type", [])
    made = mean_response_cells(real, response, options, np.random.default_rng(0))
    is_control = made.labels == "non-targeting"
    assert (made.matrix.data == np.rint(made.matrix.data)).all() and (made.matrix.data > 0).all()
    assert sorted(made.labels) == sorted(real.labels)
    np.testing.assert_array_equal(
        made.matrix[is_control].toarray(), real.matrix[real.labels == "non-targeting"].toarray()
    )
    expected, found = response.perturbed["type_0"], mean_of(made.matrix[~is_control])
    np.testing.assert_allclose(found[expected > 5], expected[expected > 5], rtol=0.15)


def test_the_mean_response_in_log_values_is_the_controls_mean_and_the_mean_shift(tmp_path):
    real = write(tmp_path / "real.h5ad", ["A", "A", "non-targeting"], np.full((3, 5), 1.5))
    train = write(tmp_path / "train.h5ad", ["B", "non-targeting"], np.array([[0.25] * 5, [0.75] * 5]))
    cells = load_cells(read(real), None, None)
    response = learn_mean_response([train], cells, OPTIONS["vcc2025"], None, None, [])
    made = mean_response_cells(cells, response, OPTIONS["vcc2025"], np.random.default_rng(0))
    np.testing.assert_allclose(made.matrix.toarray(), [[1.0] * 5, [1.0] * 5, [1.5] * 5])


def test_copied_controls_are_control_cells_of_the_same_cell_type(tmp_path):
    labels, types = ["A"] * 6 + ["non-targeting"] * 4, "xxxyyyxxyy"
    matrix = np.repeat(np.arange(1, 11)[:, None], 5, axis=1)
    cells = load_cells(
        read(write(tmp_path / "real.h5ad", labels, matrix, cell_type=types)), "cell_type", None
    )
    made = copied_controls(cells, OPTIONS["vcc2026"], np.random.default_rng(0))
    first = made.matrix.toarray()[:, 0]
    assert set(first[:3]) <= {7, 8} and set(first[3:6]) <= {9, 10}
    again = copied_controls(cells, OPTIONS["vcc2026"], np.random.default_rng(0))
    np.testing.assert_array_equal(made.matrix.toarray(), again.matrix.toarray())


def test_a_cell_type_without_controls_is_an_error(tmp_path):
    real = write(tmp_path / "real.h5ad", ["A", "A", "non-targeting"], cell_type="yyx")
    with pytest.raises(UserError, match="no control cells .'non-targeting'. of cell type 'y'"):
        copied_controls(
            load_cells(read(real), "cell_type", None), OPTIONS["vcc2026"], np.random.default_rng(0)
        )


def test_training_cells_without_other_perturbations_are_an_error(tmp_path):
    real = write(tmp_path / "real.h5ad")
    cells = load_cells(read(real), None, None)
    with pytest.raises(UserError, match="no training perturbation beside the scored ones"):
        learn_mean_response([real], cells, OPTIONS["vcc2026"], None, None, [])


def log_values(total):
    values = np.random.default_rng(0).uniform(1, 2, (6, 5))
    return np.log1p(values / values.sum(axis=1, keepdims=True) * total)


def test_files_normalised_to_different_totals_are_refused(tmp_path):
    predicted = read(write(tmp_path / "pred.h5ad", matrix=log_values(1e4)))
    real = read(write(tmp_path / "real.h5ad", matrix=log_values(5e4)))
    with pytest.raises(UserError, match="normalised to about 10,000 a cell and .* to about 50,000"):
        shared_target_sum(predicted, real, OPTIONS["vcc2025"], [])


def test_real_counts_are_normalised_as_the_prediction_says_it_was(tmp_path):
    uns = {"cellphase": json.dumps({"kind": "lognorm", "target_sum": 5000.0})}
    predicted = read(write(tmp_path / "pred.h5ad", matrix=log_values(5000), uns=uns))
    real, notes = read(write(tmp_path / "real.h5ad")), []
    assert shared_target_sum(predicted, real, OPTIONS["vcc2025"], notes) == 5000
    assert notes == ["counts of real.h5ad were normalised to 5000 a cell, log(1 + x)"]


def test_a_program_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch):
    real = write(tmp_path / "real.h5ad")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(UserError, match=r'scored by cell-eval2, which is not installed.*"cellphase\[vcc\]"'):
        vcc.score(real, real, "vcc2026", tmp_path / "out")


def test_scoring_imports_no_torch():
    code = "import sys, trainer.scoring.vcc; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_a_program_that_fails_is_said_with_its_output_and_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("cell_eval2")
    real = write(tmp_path / "real.h5ad")
    monkeypatch.setitem(vcc_programs._MAINS, "cell-eval2", "json:dumps")
    with pytest.raises(UserError, match="cell-eval2 failed at 'model': TypeError(.|\n)*Traceback"):
        vcc.score(real, real, "vcc2026", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.h5ad"]


def test_a_program_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    pytest.importorskip("cell_eval2")
    real = write(tmp_path / "real.h5ad")
    monkeypatch.setitem(vcc_programs._MAINS, "cell-eval2", "signal:pause")
    with pytest.raises(UserError, match="cell-eval2 had not ended after 3 seconds"):
        vcc.score(real, real, "vcc2026", tmp_path / "out", timeout_seconds=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.h5ad"]


def test_the_call_that_failed_is_named_and_not_one_that_was_left_out(tmp_path, monkeypatch):
    (tmp_path / "fails_if_told.py").write_text("import sys\ndef main():\n    sys.exit(int(sys.argv[1]))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(vcc_programs._MAINS, "cell-eval2", "fails_if_told:main")
    calls = [
        vcc_programs.Call("ceiling", ("0",), is_needed=False),
        vcc_programs.Call("ceiling, try 2", ("0",), is_needed=False, instead_of="ceiling"),
        vcc_programs.Call("own baseline", ("3",)),
    ]
    with pytest.raises(UserError, match="cell-eval2 failed at 'own baseline': exit code 3"):
        vcc_programs.run_calls(calls, tmp_path / "calls", OPTIONS["vcc2026"], 60)


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    pytest.importorskip("cell_eval2")
    real = write(tmp_path / "real.h5ad")
    with pytest.raises(UserError, match="holds other files than a score's"):
        vcc.score(real, real, "vcc2026", tmp_path)


def test_the_command_checks_the_contract_alone(tmp_path, capsys):
    pred = write(tmp_path / "pred.h5ad")
    assert command.main(["--pred", str(pred), "--preset", "vcc2026", "--contract-only"]) == 0
    assert "6 cells, 5 genes, counts: keeps all rules" in capsys.readouterr().out
    assert command.main(["--pred", str(pred), "--preset", "vcc2026", "--contract-only", "--upload"]) == 2
    assert "genes: 5; an upload has 18,533" in capsys.readouterr().err
    assert command.main(["--pred", str(pred), "--preset", "vcc2026"]) == 2
    assert "--real FILE is missing" in capsys.readouterr().err


def test_the_label_of_controls_is_the_one_that_a_file_states(tmp_path):
    labels, uns = ("A", "A", "control", "control"), {"cellphase": json.dumps({"control_label": "control"})}
    stating = write(tmp_path / "pred.h5ad", labels, uns=uns)
    silent = write(tmp_path / "real.h5ad", labels)
    damaged = write(tmp_path / "damaged.h5ad", labels, uns={"cellphase": "{"})
    assert stated_control_label(stating, silent) == stated_control_label(damaged, stating) == "control"
    assert stated_control_label(silent, None, damaged) == "non-targeting"
    arguments = ["--real", str(silent), "--preset", "vcc2026", "--contract-only"]
    assert command.main(["--pred", str(stating), *arguments]) == 0
    assert command.main(["--pred", str(silent), *arguments]) == 2
    assert command.main(["--pred", str(silent), *arguments, "--control-label", "control"]) == 0


def test_controls_of_other_cell_types_than_a_perturbations_are_told(tmp_path):
    options, notes = OPTIONS["vcc2026"], []
    labels = ["A", "A", "B", "B", "non-targeting", "non-targeting"]
    cells = load_cells(read(write(tmp_path / "real.h5ad", labels, cell_type="xyxyxy")), "cell_type", None)
    vcc._note_cell_types(cells, options, notes)
    assert notes == []
    cells = load_cells(read(write(tmp_path / "real.h5ad", labels, cell_type="xyyyxy")), "cell_type", None)
    vcc._note_cell_types(cells, options, notes)
    assert notes[0].startswith("1 perturbations are of fewer cell types than the controls")
    assert "--context-key cell_type" in notes[0]


@pytest.fixture(scope="module")
def scored(tmp_path_factory, compiled_once):
    """Score a prediction of the same truth, for both years; return files, results and the output folders."""
    pytest.importorskip("cell_eval")
    pytest.importorskip("cell_eval2")
    folder = tmp_path_factory.mktemp("scored")
    paths = simulated(folder)
    results = {
        preset: vcc.score_files(
            paths["pred"],
            paths["real"],
            folder / preset,
            OPTIONS[preset],
            baselines=vcc.BASELINES,
            train=[paths["train"]] if preset == "vcc2026" else [],
            reuse=None,
            timeout_seconds=500,
        )
        for preset in OPTIONS
    }
    return paths, results, folder


def figures(results, preset, suffix=""):
    found = {arm: results[preset].of(preset + suffix, arm) for arm in (vcc.MODEL, *vcc.BASELINES)}
    return {arm: values for arm, values in found.items() if values}


@pytest.mark.parametrize("preset", list(OPTIONS))
def test_cells_of_the_same_truth_beat_every_baseline_in_every_metric(scored, preset):
    found = figures(scored[1], preset)
    for metric in OPTIONS[preset].preset.metrics:
        sign = -1 if metric in command._LOWER_IS_BETTER else 1
        for arm in (vcc.MEAN_RESPONSE, vcc.CONTROLS):
            assert sign * found[vcc.MODEL][metric] > sign * found[arm][metric], (metric, arm)


@pytest.mark.parametrize("preset", list(OPTIONS))
def test_the_ceiling_is_above_the_baselines_in_every_metric(scored, preset):
    found = figures(scored[1], preset)
    for metric in OPTIONS[preset].preset.metrics:
        sign = -1 if metric in command._LOWER_IS_BETTER else 1
        for arm in (vcc.MEAN_RESPONSE, vcc.CONTROLS):
            assert sign * found[vcc.CEILING][metric] > sign * found[arm][metric], (metric, arm)


def test_copied_controls_score_no_better_than_the_baseline_and_the_truth_near_the_ceiling(scored):
    found = figures(scored[1], "vcc2026", vcc.SCORE_SUFFIX)
    assert found[vcc.CONTROLS][vcc.AVERAGE] < 0.1
    assert found[vcc.MODEL][vcc.AVERAGE] > 0.8


def test_the_rescaled_score_lies_between_baseline_and_ceiling(scored):
    raw, rescaled = figures(scored[1], "vcc2026"), figures(scored[1], "vcc2026", vcc.SCORE_SUFFIX)
    for metric in ("pds_cosine", "de_wilcoxon_sig_jaccard"):
        low, high = raw[vcc.MEAN_RESPONSE][metric], raw[vcc.CEILING][metric]
        expected = (raw[vcc.MODEL][metric] - low) / (high - low)
        assert rescaled[vcc.MODEL][metric] == pytest.approx(expected, abs=1e-6)
    mean = np.mean([rescaled[vcc.MODEL][metric] for metric in VCC2026.metrics])
    assert rescaled[vcc.MODEL][vcc.AVERAGE] == pytest.approx(mean)


def test_the_table_has_every_metric_and_says_which_baseline_was_taken(scored):
    for preset, results in scored[1].items():
        text = command.layout(results, OPTIONS[preset].preset)
        header = text.splitlines()[0]
        assert all(name in header for name in (*vcc.BASELINES, "score of model", "score of controls"))
        lines = {line.split()[0]: line for line in text.splitlines()[2:]}
        assert set(OPTIONS[preset].preset.metrics) <= lines.keys() and vcc.AVERAGE in lines
    notes = {preset: "\n".join(results.notes[preset]) for preset, results in scored[1].items()}
    assert "mean response: of training perturbations (16 in type_0)" in notes["vcc2026"]
    assert "cell-eval's own baseline, made of the real cells that it is scored on" in notes["vcc2025"]


def test_the_output_holds_the_figures_and_the_programs_own_tables(scored):
    _, results, folder = scored
    written = json.loads((folder / "vcc2026" / "results.json").read_text())
    assert written["results"] == [dataclasses.asdict(row) for row in results["vcc2026"].rows]
    assert written["identity"]["program"].startswith("cell-eval2 ")
    assert (
        len((folder / "vcc2026" / "results.csv").read_text().splitlines()) == len(results["vcc2026"].rows) + 1
    )
    for arm in ("model", "mean_response", "controls"):
        assert (folder / "vcc2026" / arm / "context_00" / "agg_results.csv").is_file()
    assert (folder / "vcc2026" / "ceiling" / "context_00" / "anchor_agg.parquet").is_file()


@pytest.mark.slow
def test_scoring_again_with_the_baselines_of_before_gives_the_same_figures(scored, tmp_path):
    paths, results, folder = scored
    again = vcc.score(
        paths["pred"],
        paths["real"],
        "vcc2026",
        tmp_path / "again",
        train=[paths["train"]],
        reuse=folder / "vcc2026",
        threads=2,
    )
    rows = [dataclasses.asdict(row) for row in results["vcc2026"].rows]

    def figures(rows, **which):
        chosen = (row for row in rows if all(row[key] == value for key, value in which.items()))
        return {(row["benchmark"], row["representation"], row["metric"]): row["value"] for row in chosen}

    # Threads add up in another order.
    for which in ({"representation": vcc.MODEL}, {"benchmark": "vcc2026"}):
        assert figures(again, **which) == pytest.approx(figures(rows, **which), rel=1e-9, nan_ok=True)


def test_baselines_of_other_real_cells_are_not_taken(scored, tmp_path):
    paths, _, folder = scored
    with pytest.raises(UserError, match="its baselines are of other files; score them anew"):
        vcc.score(paths["pred"], paths["real"], "vcc2026", tmp_path / "out", reuse=folder / "vcc2026")


@pytest.mark.slow
def test_figures_are_those_of_the_program_run_by_hand(scored, tmp_path):
    paths, results, _ = scored
    real, predicted = (anndata.read_h5ad(paths[name]) for name in ("real", "pred"))
    whole = anndata.concat([predicted, real[real.obs["target_gene"] == "non-targeting"]])
    whole.obs_names = [str(index) for index in range(len(whole))]
    whole.write_h5ad(tmp_path / "whole.h5ad")
    arguments = [
        "run",
        "-ap",
        str(tmp_path / "whole.h5ad"),
        "-ar",
        str(paths["real"]),
        "-o",
        str(tmp_path / "hand"),
    ]
    arguments += ["--preset", "vcc2026", "--pert-col", "target_gene", "--set", "de.backend=pdex"]
    command = [sys.executable, "-c", "from cell_eval2.cli import main; main()", *arguments]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    by_hand = vcc_programs.aggregates(tmp_path / "hand")
    assert results["vcc2026"].of("vcc2026", vcc.MODEL) == pytest.approx(by_hand, abs=1e-9)
