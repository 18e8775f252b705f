"""Benchmarks: the command, and those of held-out cells between the epochs of a run, also where it is interrupted."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pytest
import torch
import yaml
from h5ad_files import write_h5ad
from launching import ROOT, run_command
from running import newest_run, records, toy, train, train_ranks

from data.loader import cell_loader
from data.synthetic import make_synthetic_counts
from trainer import benchmark as benchmark_module
from trainer import benchmarking, preemption, scoring_queue
from trainer.benchmark import main, read_benchmarks
from trainer.checkpoint_folder import open_checkpoint
from trainer.errors import ConfigError, UserError
from trainer.preemption import Preempted
from trainer.scoring import results as picture
from trainer.scoring.cells import load_cells
from trainer.scoring.specs import EmbeddingQualitySpec, LinearProbeSpec
from trainer.scoring_queue import ScoringQueue

pytestmark = pytest.mark.usefixtures("forked_programs")

NUM_CELLS, NUM_GENES = 120, 40
TOKENIZER = {"strategy": "binned_expression", "binning_method": "per_cell", "n_bins": 5, "max_genes": 24}
ENCODER = {
    "model_class": "models.encoder.MaskedCellEncoder",
    "config_class": "models.encoder.EncoderConfig",
    "config_args": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1, "pooling": "mean"},
}
PROBE = {"name": "linear_probe", "cell_type_key": "cell_type", "num_folds": 2, "num_repeats": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from trainer.convert_h5ad import main as convert

    folder = tmp_path_factory.mktemp("benchmark")
    made = make_synthetic_counts(NUM_CELLS, NUM_GENES, 12, seed=1, num_batches=2, num_cell_types=3)
    counts = np.zeros((NUM_CELLS, NUM_GENES))
    counts[np.repeat(np.arange(NUM_CELLS), np.diff(made.indptr)), made.indices] = made.counts
    obs = {
        "cell_type": [f"type{label}" for label in made.cell_type],
        "batch": [f"batch{label}" for label in made.technical_batch],
        "perturbation": ["control" if index % 6 == 0 else f"p{index % 6}" for index in range(NUM_CELLS)],
    }
    write_h5ad(folder / "cells.h5ad", counts, obs=obs)
    kept = ["--obs", "perturbation=perturbation"]
    assert convert([str(folder / "cells.h5ad"), "--output", str(folder / "corpus"), *kept]) == 0
    return folder


def config(place, specs=(PROBE,), *, epochs=2, every=1, val_fraction=0.4, **changes):
    arguments = {
        "path": str(place / "corpus"),
        "tokenizer": TOKENIZER,
        "masking": {"mask_ratio": 0.3},
        "val_fraction": val_fraction,
    }
    phase = {
        "dataloader_factory": "data.loader.cell_loader",
        "dataloader_args": arguments,
        "epochs": epochs,
        "benchmarks": {"every_epochs": every, "batch_size": 16, "specs": list(specs)},
    }
    return toy(phase, **{"model": ENCODER, "micro_batch_size": 8, "global_batch_size": 24, **changes})


def results_of(folder):
    return sorted(records(folder, "benchmark"), key=lambda record: record["epoch"])


# In training


@pytest.mark.slow
def test_held_out_cells_are_scored_at_the_start_and_every_so_many_epochs(tmp_path, place, monkeypatch):
    monkeypatch.setattr(scoring_queue, "subprocess", subprocess)  # here by processes as users have them
    folder = train(tmp_path, config(place, epochs=5, every=2))
    found = results_of(folder)
    assert [record["epoch"] for record in found] == [0, 2, 4]
    steps = {record["epoch"]: record["global_step"] for record in records(folder, "validation")}
    assert [record["global_step"] for record in found] == [0, steps[2], steps[4]]
    for record in found:
        assert 0 <= record["linear_probe/accuracy"] <= 1 and "linear_probe/accuracy/majority" in record
        assert {"depth/r2", "depth/r2/pca_32", "linear_probe/accuracy/all_genes"} <= record.keys()
    assert found[1]["linear_probe/accuracy/at_start"] == found[0]["linear_probe/accuracy"]
    assert "benchmark/" not in (folder / "metrics.csv").read_text()
    left = {path.name for path in (folder / "benchmarks").iterdir()}
    assert left == {"worker.log", *(f"phase0_epoch{epoch}.result.json" for epoch in (0, 2, 4))}


def test_the_cells_that_are_scored_are_those_that_are_held_out(tmp_path, place, monkeypatch):
    seen = {}

    def keep(queue, name, phase, where, rows, embedding):
        seen[where["epoch"]] = rows, embedding, benchmarking.cells_of(phase, rows)

    monkeypatch.setattr(benchmarking, "submit", keep)
    specs = [PROBE, {"name": "embedding_quality", "batch_key": "technical_batch"}]
    train(tmp_path, config(place, specs, epochs=1))
    source = cell_loader(place / "corpus", tokenizer=TOKENIZER, val_fraction=0.4)
    held_out = np.flatnonzero(source.validation.row_mask)
    for rows, embedding, cells in seen.values():
        assert rows.tolist() == held_out.tolist() and len(embedding) == len(cells) == len(rows)
        assert (
            cells.obs["technical_batch"].tolist()
            == source.obs(["technical_batch"], rows)["technical_batch"].tolist()
        )
        assert np.allclose(np.expm1(cells.expression.toarray()).sum(axis=1), 1e4, rtol=1e-4)
    assert np.abs(seen[0][1] - seen[1][1]).max() > 0


def test_benchmarks_change_nothing_in_the_training(tmp_path, place, monkeypatch):
    monkeypatch.setattr(benchmarking, "submit", lambda *arguments: None)
    without = config(place)
    del without["datasets"][0]["benchmarks"]
    one, two = train(tmp_path / "with", config(place)), train(tmp_path / "without", without)
    for kind in ("train", "validation"):
        ours, theirs = records(one, kind), records(two, kind)
        assert [record["loss"] for record in ours] == [record["loss"] for record in theirs]


@pytest.mark.slow
def test_what_was_not_scored_before_a_stop_is_scored_once_after_it(tmp_path, place, monkeypatch):
    whole = results_of(train(tmp_path / "whole", config(place, epochs=1)))
    with monkeypatch.context() as stopped:
        stopped.setattr(ScoringQueue, "poll", lambda self: None)
        stopped.setattr(ScoringQueue, "close", lambda self, wait: None)
        folder = train(tmp_path / "cut", config(place, epochs=1))
    assert results_of(folder) == []
    assert len(list((folder / "benchmarks").glob("*.request.json"))) == 2
    assert train(tmp_path / "cut", config(place, epochs=1), resume_from=str(folder)) == folder
    assert results_of(folder) == whole and [record["epoch"] for record in whole] == [0, 1]


@pytest.mark.slow
def test_a_result_that_came_after_the_checkpoint_is_neither_lost_nor_scored_again(
    tmp_path, place, monkeypatch
):
    folder = train(tmp_path, config(place, epochs=1))
    before = results_of(folder)
    # As if the run had trained on, and the records of epochs 0 and 1 had come after a later step's.
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    late = [line for line in lines if '"benchmark"' in line]
    step = {**records(folder)[-1], "global_step": 99}
    metrics.write_text(
        "\n".join([*(line for line in lines if line not in late), json.dumps(step), *late, ""])
    )
    monkeypatch.setattr(scoring_queue.subprocess, "Popen", lambda *a, **k: pytest.fail("scored again"))
    train(tmp_path, config(place, epochs=1), resume_from=str(folder))
    assert results_of(folder) == before and records(folder)[-1]["global_step"] < 99


@pytest.mark.slow
def test_results_of_steps_that_are_trained_anew_are_dropped(tmp_path, place):
    folder = train(tmp_path, config(place, epochs=2))
    before = results_of(folder)
    last = int((folder / "latest").read_text().strip().removeprefix("checkpoint_"))
    shutil.rmtree(folder / f"checkpoint_{last}")
    first = next(folder.glob("checkpoint_*"))
    assert open_checkpoint(first).step < last
    train(tmp_path, config(place, epochs=2), resume_from=str(folder))
    assert results_of(folder) == before


@pytest.mark.parametrize("key", ["own_file", "output", "cells", "baselines", "shared"])
@pytest.mark.parametrize("where", ["../precious", "{tmp_path}/precious", ".."])
@pytest.mark.parametrize("step", [0, 99])
def test_a_request_that_names_files_elsewhere_is_passed_over(tmp_path, key, where, step, monkeypatch, capsys):
    """A run folder may have come from anywhere; what its requests name is written, and deleted."""
    monkeypatch.setattr(scoring_queue.subprocess, "Popen", lambda *a, **k: pytest.fail("scored"))
    folder = tmp_path / "run" / "benchmarks"
    folder.mkdir(parents=True)
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "run" / "precious").write_text("kept")
    request = {
        "kind": "benchmark",
        "global_step": step,
        "phase": "p",
        "phase_step": 0,
        "epoch": 0,
        "own_file": "a",
    }
    request[key] = where.format(tmp_path=tmp_path)
    (folder / "a.request.json").write_text(json.dumps(request))
    run = SimpleNamespace(progress=SimpleNamespace(global_step=5))
    ScoringQueue(run, tmp_path / "run").close(wait=True)
    assert (tmp_path / "precious").exists() and (tmp_path / "run" / "precious").exists()
    assert "is nothing that a run has left there, and is passed over" in capsys.readouterr().out


def test_a_process_that_outlived_its_run_does_not_answer_for_the_next(tmp_path, monkeypatch):
    where = {"kind": "benchmark", "global_step": 0, "phase": "p", "phase_step": 0, "epoch": 0}
    answers, recorded = [], []

    def start(command, **options):
        _, answer, parent = command[-3:]
        assert parent == str(os.getpid())
        answers.append(Path(answer))
        # The one that was left behind by the start before: it writes where it was told to.
        for place in [folder / "a.result.json", *answers[:-1]]:
            place.write_text(json.dumps({**where, "error": "an orphan's"}))
        answers[-1].write_text(json.dumps({**where, "rows": [], "notes": {}}))
        return SimpleNamespace(poll=lambda: 0, wait=lambda: 0, returncode=0)

    monkeypatch.setattr(scoring_queue.subprocess, "Popen", start)
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    recorder = SimpleNamespace(benchmarked=lambda record, headline: recorded.append(record))
    run = SimpleNamespace(progress=SimpleNamespace(global_step=0), recorder=recorder)
    for _ in range(2):
        (folder / "a.result.json").unlink(missing_ok=True)
        queue = ScoringQueue(run, tmp_path)
        queue.submit("a", {**where, "own_file": "a"})
        queue.close(wait=True)
    assert recorded == [where, where] and answers[0] != answers[1]
    assert json.loads((folder / "a.result.json").read_text()) == {**where, "rows": [], "notes": {}}


def test_a_request_to_end_leaves_the_last_scores_to_the_next_start(tmp_path, monkeypatch):
    popen, processes = subprocess.Popen, []

    def start(command, **options):
        processes.append(popen(["sleep", "60"]))
        return processes[-1]

    monkeypatch.setattr(scoring_queue.subprocess, "Popen", start)
    monkeypatch.setattr(preemption, "request", lambda limit: "SIGTERM")
    settings = SimpleNamespace(max_wall_seconds=None)
    queue = ScoringQueue(SimpleNamespace(progress=SimpleNamespace(global_step=0), config=settings), tmp_path)
    where = {"kind": "benchmark", "global_step": 0, "phase": "p", "phase_step": 0, "epoch": 0}
    for name in "ab":
        queue.submit(name, {**where, "own_file": name})
    with pytest.raises(Preempted, match="SIGTERM while the last benchmarks were scored; a restart"):
        queue.close(wait=True)
    assert [process.poll() for process in processes] == [-signal.SIGKILL]
    assert len(list(tmp_path.glob("benchmarks/*.request.json"))) == 2


def test_a_failed_benchmark_is_said_and_the_run_goes_on(tmp_path, place, monkeypatch, capsys):
    monkeypatch.setattr(benchmarking, "save_cells", lambda path, cells: path.write_bytes(b"damaged"))
    folder = train(tmp_path, config(place, epochs=1))
    assert [record.get("has_failed") for record in results_of(folder)] == [True, True]
    out = capsys.readouterr().out
    assert "the benchmark of phase 'p0' after epoch 0 failed, and training goes on" in out


@pytest.mark.parametrize(
    ("spec", "changes", "message"),
    [
        (
            {**PROBE, "cell_type_key": "donor"},
            {},
            "linear_probe reads obs column donor, which the data of phase 'p0'",
        ),
        ({**PROBE, "num_folds": 100}, {}, "has 0 labels with at least 100"),
        ({"name": "perturbation", "control_label": "DMSO"}, {}, "no cell has 'DMSO'"),
        (PROBE, {"val_fraction": 0.0}, "phase 'p0' has no held-out cells with obs columns"),
    ],
)
def test_what_would_let_a_benchmark_fail_is_found_at_the_start(tmp_path, place, spec, changes, message):
    with pytest.raises(ConfigError, match=f"datasets.0.benchmarks.*{message}"):
        train(tmp_path, config(place, [spec], **changes))
    assert not (tmp_path / "runs").exists()


def test_a_wrong_option_is_found_with_the_configuration(tmp_path, place):
    with pytest.raises(
        ConfigError, match=r"datasets.0.benchmarks.specs.0.folds: linear_probe has no such option"
    ):
        train(tmp_path, config(place, [{"name": "linear_probe", "folds": 3}]))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_ranks_score_as_one_process_does(tmp_path, place, strategy):
    # 48 cells in batches of 16 on two ranks: the last round has cells for one rank only.
    plain = {**ENCODER, "config_args": {**ENCODER["config_args"], "dropout": 0.0}}
    settings = config(place, epochs=1, model=plain, micro_batch_size=4)
    one = results_of(train(tmp_path / "one", settings))
    train_ranks(2, tmp_path / "two", settings, strategy=strategy)
    two = results_of(newest_run(tmp_path / "two"))
    assert [record["epoch"] for record in two] == [0, 1]
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["depth/r2"] == pytest.approx(ours["depth/r2"], abs=1e-3)
        assert theirs["linear_probe/accuracy"] == pytest.approx(ours["linear_probe/accuracy"], abs=0.05)


# The command


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    plain = config(place, epochs=1)
    del plain["datasets"][0]["benchmarks"]
    return train(tmp_path_factory.mktemp("run"), plain)


def benchmark(folder, place, run, settings, *options):
    (folder / "eval.yaml").write_text(yaml.safe_dump(settings))
    paths = ["--model", run, "--data", place / "cells.h5ad", "--output", folder / "results"]
    return main(
        [str(part) for part in ["--config", folder / "eval.yaml", *paths, "--device", "cpu", *options]]
    )


def test_the_command_writes_every_figure_beside_its_baselines(tmp_path, place, run, capsys):
    perturbation = {"name": "perturbation", "n_top_genes": 10}
    settings = {
        "data": {"paths": ["unused.h5ad"]},
        "eval": {
            "benchmarks": [
                PROBE,
                {"name": "embedding_quality", "params": {"batch_key": "batch"}},
                perturbation,
            ]
        },
    }
    assert benchmark(tmp_path, place, run, settings, "--layout", "pca") == 0
    written = json.loads((tmp_path / "results" / "results.json").read_text())
    with open(tmp_path / "results" / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["metric"] for line in lines] == [row["metric"] for row in written["results"]]
    names = {name: {r["representation"] for r in written["results"] if r["benchmark"] == name}
             for name in ("linear_probe", "embedding_quality", "perturbation", "depth")}  # fmt: skip
    common = {"model", "untrained", "all_genes", "pca_32", "random_projection_64"}
    assert names == {
        "linear_probe": common | {"majority"},
        "embedding_quality": common,
        "perturbation": common | {"mean_shift"},
        "depth": common,
    }
    figures = {(r["benchmark"], r["representation"], r["metric"]): r["value"] for r in written["results"]}
    assert figures["depth", "model", "r2"] != figures["depth", "untrained", "r2"]
    assert (tmp_path / "results" / "embedding.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "random_projection_64" in out and f"{figures['linear_probe', 'model', 'accuracy']:.4f}" in out


@pytest.mark.slow
def test_cells_without_genes_are_left_out_and_said(tmp_path, place, run, capsys):
    whole = anndata.read_h5ad(place / "cells.h5ad")
    counts = np.vstack([whole.X.toarray(), np.zeros((30, NUM_GENES))])
    labels = [*whole.obs["cell_type"], *["empty"] * 30]
    write_h5ad(tmp_path / "cells.h5ad", counts, obs={"cell_type": labels})
    scored = {}
    for folder in (tmp_path, place):
        settings = {"data": {"paths": ["unused.h5ad"]}, "eval": {"benchmarks": [PROBE]}}
        assert benchmark(tmp_path, folder, run, settings, "--layout", "pca") == 0
        scored[folder] = json.loads((tmp_path / "results" / "results.json").read_text())
    note = "left out: 30 cells without a count of any of the model's genes"
    assert all(note in notes for notes in scored[tmp_path]["notes"].values())
    assert note in capsys.readouterr().out and "left out" not in str(scored[place]["notes"])
    assert scored[tmp_path]["results"] == scored[place]["results"]


LAID_OUT = """
import sys
from pathlib import Path

import numpy as np

from trainer.scoring import results

cells = np.random.default_rng(0).normal(size=(16, 4)) + np.repeat([[0.0], [20.0]], 8, axis=0)
results.Figure.savefig = lambda figure, path, dpi: np.save(path, figure.axes[0].collections[0].get_offsets().data)
print(results.draw_embedding(Path(sys.argv[1]), cells, {}, cells[:, 0], title="", layout="umap"))
"""


def test_umap_keeps_cells_apart_that_are(tmp_path):
    (tmp_path / "laid_out.py").write_text(LAID_OUT)
    # Compiling it takes half a minute, and interpreting it for so few cells a second.
    env = {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    done = run_command(["python", tmp_path / "laid_out.py", tmp_path / "points.npy"], env=env)
    assert done.stdout.split() == ["UMAP"]
    points = np.load(tmp_path / "points.npy")
    (first, second), spread = points.reshape(2, 8, 2).mean(axis=1), points.reshape(2, 8, 2).std(axis=1).max()
    assert np.linalg.norm(first - second) > 4 * spread


def test_umap_leaves_torch_its_number_of_threads(tmp_path, monkeypatch):
    class Umap:
        def __init__(self, **_):
            pass

        def fit_transform(self, cells):
            torch.set_num_threads(3)  # as numba does
            return cells[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    cells = np.random.default_rng(0).normal(size=(20, 4))
    drawn = picture.draw_embedding(tmp_path / "a.png", cells, {}, cells[:, 0], title="", layout="umap")
    assert (drawn, torch.get_num_threads()) == ("UMAP", 1)


def test_a_picture_is_laid_out_as_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: name == "umap" or None)
    assert [picture.choose_layout(asked) for asked in (None, "umap", "pca")] == ["umap", "umap", "pca"]
    monkeypatch.setitem(sys.modules, "umap", None)  # importing it would fail
    cells = np.random.default_rng(0).normal(size=(20, 4))
    drawn = picture.draw_embedding(tmp_path / "a.png", cells, {}, cells[:, 0], title="", layout="pca")
    assert drawn == "PCA" and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: None)
    assert picture.choose_layout(None) == "pca"
    with pytest.raises(UserError, match="needs umap-learn, which is not installed"):
        picture.choose_layout("umap")


def test_a_phases_configuration_names_benchmarks_too(tmp_path, place):
    path = tmp_path / "phases.yml"
    path.write_text(yaml.safe_dump(config(place, [PROBE, "embedding_quality", PROBE])))
    specs, batch_size = read_benchmarks(path)
    assert batch_size == 16
    assert specs == [LinearProbeSpec(num_folds=2, num_repeats=1), EmbeddingQualitySpec()]


def test_a_configuration_without_benchmarks_is_an_error(tmp_path):
    path = tmp_path / "eval.yaml"
    path.write_text(yaml.safe_dump({"data": {"paths": ["x.h5ad"]}, "eval": {"batch_size": 7}}))
    with pytest.raises(
        UserError, match="eval names no benchmark; there are: linear_probe, embedding_quality"
    ):
        read_benchmarks(path)


def test_a_column_that_the_file_lacks_is_found_before_anything_is_computed(tmp_path, place, run, capsys):
    settings = {
        "eval": {"benchmarks": [PROBE, {"name": "linear_probe", "cell_type_key": "donor"}]},
        "data": {"paths": ["x"]},
    }
    assert benchmark(tmp_path, place, run, settings) == 2
    said = capsys.readouterr().err
    assert "benchmark linear_probe_2: cell_type_key: " in said
    assert "obs has no column 'donor'; it has: " in said
    assert not (tmp_path / "results").exists()


def test_a_folder_that_cannot_be_made_is_found_before_anything_is_computed(
    tmp_path, place, run, monkeypatch, capsys
):
    monkeypatch.setattr(benchmark_module, "embed_all", lambda *_: pytest.fail("cells were embedded"))
    (tmp_path / "file").touch()
    settings = {"eval": {"benchmarks": [PROBE]}, "data": {"paths": ["x"]}}
    assert benchmark(tmp_path, place, run, settings, "--output", tmp_path / "file" / "results") == 2
    assert "name a folder that can be made" in capsys.readouterr().err


def test_the_held_out_cells_file_is_readable(tmp_path, place, monkeypatch):
    monkeypatch.setattr(ScoringQueue, "poll", lambda self: None)
    monkeypatch.setattr(ScoringQueue, "close", lambda self, wait: None)
    folder = train(tmp_path, config(place, epochs=1))
    cells = load_cells(next((folder / "benchmarks").glob("*.npz")))
    assert set(cells.obs) == {"cell_type"} and cells.expression.shape == (48, NUM_GENES)
