"""Scores of embeddings: what each benchmark measures, that every option acts, and the figures of real cells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from h5ad_files import SAMPLES, read_with_anndata
from scipy import sparse

from trainer.errors import ConfigError, UserError
from trainer.scoring import embedding_quality, linear_probe, perturbation
from trainer.scoring.benchmarks import pivot, run_benchmarks
from trainer.scoring.cells import Cells, load_cells, save_cells
from trainer.scoring.embedding_baselines import depth_r2, representations
from trainer.scoring.specs import (
    SPECS,
    EmbeddingQualitySpec,
    LinearProbeSpec,
    PerturbationSpec,
    Spec,
    parse_specs,
    titles,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def without_scib_metrics(monkeypatch, request):
    if "scib" not in request.node.name:
        monkeypatch.setattr(embedding_quality, "has_scib_metrics", lambda: False)


def clustered(num_cells=120, num_types=3, num_genes=30, seed=0):
    """Return cells whose embedding [n, 8] shows their type, and that embedding."""
    rng = np.random.default_rng(seed)
    types = np.arange(num_cells) % num_types
    centres = rng.normal(size=(num_types, 8)) * 4
    expression = sparse.csr_array(rng.poisson(1.0, (num_cells, num_genes)).astype(np.float32))
    obs = {
        "cell_type": np.array([f"type{t}" for t in types]),
        "batch": np.array(["one", "two"])[rng.integers(0, 2, num_cells)],
    }
    depth = np.log1p(np.asarray(expression.sum(axis=1)).ravel())
    return Cells(obs, expression, depth, "counts"), centres[types] + rng.normal(size=(num_cells, 8))


def values(scored):
    return {name: score.value for name, score in scored.scores.items()}


# Specs


def test_a_spec_is_a_name_or_a_table_with_options_or_params():
    specs = parse_specs(
        [
            "linear_probe",
            {"name": "embedding_quality", "batch_key": "donor"},
            {"name": "perturbation", "params": {"n_top_genes": 1e2}},
        ],
        "eval.benchmarks",
    )
    assert specs == [
        LinearProbeSpec(),
        EmbeddingQualitySpec(batch_key="donor"),
        PerturbationSpec(n_top_genes=100),
    ]
    assert parse_specs([spec.options() for spec in specs], "again") == specs


def test_wrong_specs_are_told_at_once_with_what_is_allowed():
    wrong = [
        "probe",
        {"name": "embedding_quality", "batch": "donor"},
        {"name": "perturbation", "test_fraction": 2},
        {"name": "linear_probe", "seed": 1, "params": {"seed": 2}},
        7,
    ]
    with pytest.raises(ConfigError) as error:
        parse_specs(wrong, "eval.benchmarks")
    lines = str(error.value).splitlines()
    assert len(lines) == 5
    assert "there is no benchmark 'probe'; there are: linear_probe, embedding_quality" in lines[0]
    assert (
        "benchmarks.1.batch: embedding_quality has no such option; it has: cell_type_key, batch_key"
        in lines[1]
    )
    assert "benchmarks.2.test_fraction: input should be less than 1" in lines[2]
    assert "seed is given both beside the name and under params" in lines[3]
    assert "it must be the name of a benchmark" in lines[4]


def test_every_option_of_every_benchmark_has_a_description():
    for spec in Spec.__subclasses__():
        assert all(field.description for field in spec.model_fields.values()), spec


def test_benchmarks_of_one_name_have_titles_of_their_own():
    specs = [LinearProbeSpec(), PerturbationSpec(), LinearProbeSpec(cell_type_key="batch")]
    assert titles(specs) == ["linear_probe", "perturbation", "linear_probe_2"]


# The linear probe


def test_the_probe_reads_what_is_there_and_nothing_else():
    cells, embedding = clustered()
    noise = np.random.default_rng(1).normal(size=embedding.shape)
    spec = LinearProbeSpec()
    majority = values(linear_probe.majority(spec, cells))["accuracy"]
    assert values(linear_probe.score(spec, embedding, cells))["accuracy"] > 0.95
    assert abs(values(linear_probe.score(spec, noise, cells))["accuracy"] - majority) < 0.12


def test_the_probe_does_not_mind_the_scale_of_a_feature():
    cells, embedding = clustered()
    scaled = embedding * np.array([1e4, 1, 1, 1e-4, 1, 1, 1, 1])
    one, two = (linear_probe.score(LinearProbeSpec(), each, cells) for each in (embedding, scaled))
    assert values(one) == pytest.approx(values(two), abs=1e-6)


def test_labels_that_are_missing_or_too_rare_are_left_out_and_said():
    cells, embedding = clustered()
    labels = cells.obs["cell_type"].astype("U12")
    labels[:3], labels[3:6] = "", "rare"
    few = Cells({"cell_type": labels}, cells.expression, cells.depth, "counts")
    scored = linear_probe.score(LinearProbeSpec(), embedding, few)
    assert scored.notes == (
        "left out: 3 cells without a label and 3 cells of labels with fewer than 5 cells (rare)",
    )


def test_one_label_alone_cannot_be_probed():
    cells, embedding = clustered(num_types=1)
    with pytest.raises(UserError, match="obs column 'cell_type' has 1 labels with at least 5 of these 120"):
        linear_probe.score(LinearProbeSpec(), embedding, cells)


@pytest.mark.parametrize(
    "changed",
    [{"num_folds": 3}, {"num_repeats": 1}, {"inverse_regularization": 1e-4}, {"seed": 1}, {"max_cells": 60}],
)
def test_options_of_the_probe_act(changed):
    cells, embedding = clustered()
    embedding = embedding + 4 * np.random.default_rng(2).normal(size=embedding.shape)
    default, other = (
        linear_probe.score(LinearProbeSpec(**options), embedding, cells) for options in ({}, changed)
    )
    assert values(default) != values(other)


def test_fits_that_do_not_converge_are_said():
    cells, embedding = clustered()
    scored = linear_probe.score(LinearProbeSpec(max_iterations=1), embedding, cells)
    assert "of 15 fits did not converge in 1 iterations" in scored.notes[0]


# scIB's metrics


def test_the_quality_of_clusters_is_above_that_of_noise():
    cells, embedding = clustered()
    noise = np.random.default_rng(1).normal(size=embedding.shape)
    good, bad = (
        values(embedding_quality.score(EmbeddingQualitySpec(), each, cells)) for each in (embedding, noise)
    )
    assert good["kmeans_nmi"] > 0.9 > 0.3 > bad["kmeans_nmi"]
    assert good["bio_conservation"] > bad["bio_conservation"] + 0.3
    assert "batch_correction" not in good


def test_a_shift_between_technical_batches_lowers_their_mixing():
    cells, embedding = clustered()
    shifted = embedding + 20.0 * (cells.obs["batch"] == "one")[:, None]
    spec = EmbeddingQualitySpec(batch_key="batch")
    mixed, apart = (values(embedding_quality.score(spec, each, cells)) for each in (embedding, shifted))
    assert mixed["batch_correction"] > apart["batch_correction"] + 0.2
    assert mixed["total"] == pytest.approx(0.6 * mixed["bio_conservation"] + 0.4 * mixed["batch_correction"])


def test_the_number_of_neighbours_acts():
    cells, embedding = clustered()
    noise = np.random.default_rng(1).normal(size=embedding.shape)
    few, many = (
        values(embedding_quality.score(EmbeddingQualitySpec(n_neighbors=n), noise, cells)) for n in (3, 30)
    )
    assert few["graph_connectivity"] < many["graph_connectivity"]


def test_one_technical_batch_cannot_be_mixed():
    cells, embedding = clustered()
    cells.obs["batch"][:] = "one"
    with pytest.raises(UserError, match="batch_key: obs column 'batch' has 1 technical batches"):
        embedding_quality.score(EmbeddingQualitySpec(batch_key="batch"), embedding, cells)


def test_the_report_says_which_library_computed():
    cells, embedding = clustered()
    scored = embedding_quality.score(EmbeddingQualitySpec(), embedding, cells)
    assert scored.notes == (
        "computed by scikit-learn, for scib-metrics is not installed (pip install 'cellphase[eval]')",
    )


def test_scib_metrics_computes_where_it_is_installed():
    pytest.importorskip("scib_metrics")
    cells, embedding = clustered()
    scored = embedding_quality.score(EmbeddingQualitySpec(batch_key="batch"), embedding, cells)
    assert scored.notes[0].startswith("computed by scib-metrics")
    assert {"kmeans_nmi", "clisi", "bras", "ilisi", "kbet", "graph_connectivity"} <= scored.scores.keys()


# Perturbations


def perturbed(num_perturbations=20, cells_each=30, num_genes=60, seed=0):
    """Return cells whose expression is a linear map of hidden factors that perturbations shift, and the factors."""
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(4, num_genes))
    shifts = np.vstack([np.zeros(4), rng.normal(size=(num_perturbations, 4)) * 2])
    codes = np.repeat(np.arange(num_perturbations + 1), cells_each)
    factors = shifts[codes] + 0.3 * rng.normal(size=(len(codes), 4))
    expression = factors @ loadings + 0.3 * rng.normal(size=(len(codes), num_genes))
    names = np.array(["control", *(f"p{index}" for index in range(num_perturbations))])
    cells = Cells(
        {"perturbation": names[codes]},
        sparse.csr_array(expression.astype(np.float32)),
        rng.normal(size=len(codes)),
        "counts",
    )
    return cells, factors


def test_an_embedding_that_holds_the_shift_tells_it_and_noise_does_not():
    cells, factors = perturbed()
    noise = np.random.default_rng(1).normal(size=factors.shape)
    spec = PerturbationSpec(n_top_genes=20)
    good, bad, mean = (
        values(perturbation.score(spec, factors, cells)),
        values(perturbation.score(spec, noise, cells)),
        values(perturbation.mean_shift(spec, cells)),
    )
    assert good["pearson"] > 0.9 and good["direction_accuracy"] > 0.95
    assert good["mse"] < 0.2 * mean["mse"] and good["fraction_above_mean_shift"] == 1.0
    assert bad["pearson"] < 0.6


@pytest.mark.parametrize(
    "changed", [{"n_top_genes": 5}, {"test_fraction": 0.5}, {"num_splits": 2}, {"seed": 1}]
)
def test_options_of_the_perturbation_benchmark_act(changed):
    cells, factors = perturbed()
    default, other = (
        perturbation.score(PerturbationSpec(**options), factors, cells) for options in ({}, changed)
    )
    assert values(default) != values(other)


def test_a_control_label_that_no_cell_has_is_an_error_that_lists_labels():
    cells, factors = perturbed()
    with pytest.raises(
        UserError, match="no cell has 'DMSO' in obs column 'perturbation'; it has: control, p0"
    ):
        perturbation.score(PerturbationSpec(control_label="DMSO"), factors, cells)


# Baselines


def test_depth_in_an_embedding_is_found_and_absent_depth_is_not():
    cells, embedding = clustered()
    rng = np.random.default_rng(3)
    with_depth = np.column_stack([embedding, cells.depth * 3 + 1])
    assert depth_r2(with_depth, cells).value > 0.95
    assert depth_r2(rng.normal(size=(len(cells), 8)), cells).value < 0.1


def test_baselines_stand_beside_every_figure_of_the_model():
    cells, embedding = clustered()
    features = {"model": embedding, **representations(cells)}
    results = run_benchmarks([LinearProbeSpec(num_repeats=1), EmbeddingQualitySpec()], features, cells)
    tables = {title: [line[0] for line in lines] for title, _, lines in pivot(results)}
    names = ["model", "all_genes", "pca_30", "random_projection_64"]
    assert tables == {
        "linear_probe": [*names, "majority"],
        "embedding_quality": names,
        "depth": names,
    }


def test_of_many_genes_the_most_variable_ones_are_taken():
    rng = np.random.default_rng(0)
    expression = rng.random((50, 2500)).astype(np.float32) * 0.01
    expression[:, ::500] = rng.random((50, 5)) * 9
    cells = Cells({}, sparse.csr_array(expression), np.ones(50), "counts")
    found = representations(cells)["highly_variable_genes"]
    assert found.shape == (50, 2000)
    correlated = np.abs(np.corrcoef(np.column_stack([expression[:, 500], found]).T)[0, 1:])
    assert correlated.max() > 0.999


def test_figures_of_real_cells_are_those_that_are_known():
    data = read_with_anndata(SAMPLES / "10x_pbmc68k_reduced.h5ad")
    assert data.raw is not None
    cells = Cells(
        {"bulk_labels": np.array(data.obs["bulk_labels"], dtype=str)},
        sparse.csr_array(data.raw.X),
        np.log1p(np.array(data.obs["n_counts"])),
        "n_counts",
    )
    results = run_benchmarks(
        [LinearProbeSpec(cell_type_key="bulk_labels", num_repeats=1)], representations(cells), cells
    )
    accuracy = {
        name: results.of("linear_probe", name)["accuracy"] for name in ("majority", *representations(cells))
    }
    assert accuracy["majority"] == pytest.approx(0.343, abs=0.001)
    assert accuracy["all_genes"] == pytest.approx(0.845, abs=0.015)
    assert accuracy["pca_32"] == pytest.approx(0.84, abs=0.015)
    assert accuracy["random_projection_64"] == pytest.approx(0.74, abs=0.02)


def test_cells_come_back_from_their_file(tmp_path):
    cells, _ = clustered()
    save_cells(tmp_path / "cells.npz", cells)
    back = load_cells(tmp_path / "cells.npz")
    assert (back.expression != cells.expression).nnz == 0 and back.depth_measure == "counts"
    assert all((back.obs[name] == cells.obs[name]).all() for name in cells.obs)


def test_the_scoring_process_imports_no_torch():
    code = "import trainer.scoring.worker, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("module", ["worker", "vcc_calls"])
def test_a_process_whose_parent_was_gone_before_it_looked_ends_at_once(tmp_path, module):
    request, answer, gone = tmp_path / "request.json", tmp_path / "answer.json", str(os.getpid() + 1)
    request.write_text("no request")  # a process that goes on fails with a traceback
    paths = [str(request), str(answer), gone] if module == "worker" else [str(request), gone]
    command = [sys.executable, "-m", f"trainer.scoring.{module}", *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, answer.exists()) == (1, "", False)


def test_the_documentation_lists_every_option_with_its_default():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    for spec in SPECS.values():
        section = text.partition(f"### `{spec.name}`")[2].partition("\n###")[0]
        for key, field in spec.model_fields.items():
            assert f"| `{key}` | `{json.dumps(field.default)}` | {field.description} |" in section
