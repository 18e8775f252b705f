"""Predicting perturbed cells: which ones, from which controls, in which values, and files that are whole or absent."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from launching import ROOT, launch_ranks, start_ranks
from running import strategy_environment, toy, train, write_config

from data.corpus import open_corpus
from data.errors import DataError
from data.hashing import DrawKey
from data.perturbation import perturbation_loader
from data.perturbation_settings import SETTINGS_FILE, load_entries, settings_of_source
from data.predicted_values import MatchedControls, PredictedRows, ValueDecoder
from data.prediction_sets import (
    PredictionSets,
    Wanted,
    held_out_wanted,
    make_requests,
    open_perturbed_corpus,
    technical_batch_index,
)
from data.simulator import CONTROL, simulate_perturbations, write_simulated_h5ad
from data.value_tokenizers import ValueTokenizer, build_value_tokenizer
from trainer import predict as command
from trainer.export import export
from trainer.losses import LossModule
from trainer.perturbation_model import open_perturbation_model
from trainer.prediction import draw_sets, knows_technical_batches

pytestmark = pytest.mark.usefixtures("forked_programs")

SIZES: dict[str, Any] = {
    "num_genes": 40, "num_pathways": 2, "members_per_pathway": 6, "distal_per_pathway": 6, "targets_per_pathway": 4,
    "num_cell_types": 2, "num_batches": 3, "cells_per_target": 11, "control_cells": 24,
}  # fmt: skip
MODEL = {
    "model_class": "models.perturbation_transformer.PerturbationTransformer",
    "config_class": "models.perturbation_transformer.PerturbationTransformerConfig",
    "config_args": {
        "hidden_dim": 16, "num_latents": 4, "num_context_latents": 4, "num_layers": 1, "num_heads": 2,
    },
}  # fmt: skip
SETS: dict[str, Any] = {"set_size": 4, "tokenizer": {"strategy": "log_bins", "n_bins": 16}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with simulated cells, their corpus, and a model that was trained on it for some steps."""
    from trainer.convert_h5ad import main as convert

    folder = tmp_path_factory.mktemp("predict")
    write_simulated_h5ad(folder / "cells.h5ad", **SIZES)
    assert convert([str(folder / "cells.h5ad"), "--output", str(folder / "corpus")]) == 0
    (folder / "run").symlink_to(train(folder, config(folder, held_out_genes=held_out(folder))))
    return folder


def held_out(place: Path) -> list[str]:
    """Return two targets that the model of `place` is not trained on."""
    return sorted(set(anndata.read_h5ad(place / "cells.h5ad").obs["target_gene"]) - {CONTROL})[:2]


def config(place: Path, **arguments: Any) -> dict[str, Any]:
    """Return a run of a few steps on the corpus."""
    phase = {
        "dataloader_factory": "data.perturbation.perturbation_loader",
        "dataloader_args": {"path": str(place / "corpus"), **SETS, **arguments},
        "max_steps": 3,
    }
    return toy(phase, model=MODEL, micro_batch_size=4, global_batch_size=4)


def predict(place: Path, output: Path, *options: Any) -> int:
    """Run the command in this process, with the model and corpus of `place` unless options say others."""
    given = {"--model": place / "run", "--data": place / "corpus", "--cache-dir": output.parent / "cache"}
    defaults = [part for name, value in given.items() if name not in options for part in (name, value)]
    arguments = [*defaults, "--output", output, "--num-steps", "2", "--device", "cpu", *options]
    return command.main([str(argument) for argument in arguments])


def predicted(place: Path, output: Path, *options: Any) -> anndata.AnnData:
    """Run the command and return what it wrote."""
    assert predict(place, output, *options) == 0
    return anndata.read_h5ad(output)


def is_same(first: anndata.AnnData, second: anndata.AnnData) -> bool:
    """Tell whether two files hold the same cells."""
    same_labels = first.obs.equals(second.obs) and first.var.equals(second.var)
    return same_labels and first.X.shape == second.X.shape and (first.X != second.X).nnz == 0


def composition(obs: Any) -> Counter:
    """Count the cells of each target, cell type and technical batch."""
    return Counter(
        zip(*(obs[name].astype(str) for name in ("target_gene", "cell_type", "batch")), strict=True)
    )


def test_held_out_perturbations_are_predicted_as_whole_counts_with_the_real_controls(place, tmp_path):
    written = predicted(place, tmp_path / "out.h5ad", "--real", tmp_path / "real.h5ad")
    given = anndata.read_h5ad(place / "cells.h5ad")
    wanted = given[given.obs["target_gene"].isin([*held_out(place), CONTROL])]
    assert composition(written.obs) == composition(wanted.obs)
    assert list(written.var_names) == list(given.var_names)
    own = written[written.obs["target_gene"] != CONTROL].X
    assert (own.data == np.rint(own.data)).all() and own.data.min() >= 1
    controls = [each[each.obs["target_gene"] == CONTROL].X for each in (written, given)]
    assert (controls[0] != controls[1]).nnz == 0
    real = anndata.read_h5ad(tmp_path / "real.h5ad")
    assert composition(real.obs) == composition(wanted.obs) and real.X.sum() == wanted.X.sum()
    about = json.loads(written.uns["cellphase"])
    assert about["kind"] == "counts" and about["seed"] == 0 and about["num_steps"] == 2
    assert about["gene_space"] == open_corpus(place / "corpus").gene_space.sha256


def test_cells_have_the_depth_of_their_matched_controls(place, tmp_path):
    written = predicted(place, tmp_path / "out.h5ad", "--cells-per-perturbation", "60")
    is_control = (written.obs["target_gene"] == CONTROL).to_numpy()
    totals = np.asarray(written.X.sum(axis=1)).ravel()
    assert totals[~is_control].mean() == pytest.approx(totals[is_control].mean(), rel=0.02)


def test_training_cells_are_written_without_any_that_is_held_out(place, tmp_path):
    assert predict(place, tmp_path / "out.h5ad", "--train", tmp_path / "train.h5ad") == 0
    obs, given = (anndata.read_h5ad(path).obs for path in (tmp_path / "train.h5ad", place / "cells.h5ad"))
    assert composition(obs) == composition(given[~given["target_gene"].isin(held_out(place))])


@pytest.mark.parametrize("size", [1, 5, 100])
def test_batches_do_not_change_the_cells(place, tmp_path, size):
    one = predicted(place, tmp_path / "one.h5ad")
    assert is_same(one, predicted(place, tmp_path / "other.h5ad", "--batch-size", size))


def test_another_seed_draws_other_cells(place, tmp_path):
    files = [predicted(place, tmp_path / f"{seed}.h5ad", "--seed", seed, "--no-controls") for seed in (0, 1)]
    assert (files[0].X != files[1].X).nnz > files[0].X.nnz / 10


def test_the_cells_of_a_target_do_not_depend_on_what_else_is_predicted(place, tmp_path):
    name = held_out(place)[1]
    both = predicted(place, tmp_path / "both.h5ad")
    alone = predicted(place, tmp_path / "alone.h5ad", "--targets", name, "--contexts", "type_1")
    chosen = (both.obs["target_gene"] == name) & (both.obs["cell_type"] == "type_1")
    own = alone[alone.obs["target_gene"] == name]
    assert len(own) == 11 and (both[chosen].X != own.X).nnz == 0


def test_two_ranks_write_the_file_of_one(place, tmp_path):
    one = predicted(place, tmp_path / "one.h5ad", "--batch-size", "5")
    options = ["--model", place / "run", "--data", place / "corpus", "--output", tmp_path / "two.h5ad"]
    options += ["--num-steps", "2", "--batch-size", "5", "--device", "cpu"]
    launch_ranks(2, ["-m", "trainer", "predict", *options], cwd=ROOT)
    assert is_same(one, anndata.read_h5ad(tmp_path / "two.h5ad"))


def test_a_file_of_controls_is_enough_to_predict_targets_from(place, tmp_path, capsys):
    given = anndata.read_h5ad(place / "cells.h5ad")
    controls = given[given.obs["target_gene"] == CONTROL].copy()
    del controls.uns["simulator"]
    controls.write_h5ad(tmp_path / "controls.h5ad")
    (tmp_path / "targets.csv").write_text("target_gene,n_cells,context\nGENE30,7,type_1\nGENE31,,type_0\n")
    options = [
        "--data",
        tmp_path / "controls.h5ad",
        "--targets",
        tmp_path / "targets.csv",
        "--preset",
        "vcc2026",
    ]
    written = predicted(place, tmp_path / "out.h5ad", *options, "--no-controls")
    obs = written.obs
    assert Counter(zip(obs["target_gene"], obs["context"], strict=True)) == {
        ("GENE30", "type_1"): 7,
        ("GENE31", "type_0"): 400,
    }
    # 24 controls of a cell type are divided equally over three technical batches.
    assert sorted(Counter(obs["batch"][obs["target_gene"] == "GENE31"]).values()) == [133, 133, 134]
    assert "1 with 7 cells (as asked), 1 with 400 cells (the default)" in capsys.readouterr().out


def test_without_targets_a_file_of_controls_is_asked_for_what_was_held_out_by_name(place, tmp_path):
    given = anndata.read_h5ad(place / "cells.h5ad")
    given[given.obs["target_gene"] == CONTROL].to_memory().write_h5ad(tmp_path / "controls.h5ad")
    written = predicted(place, tmp_path / "out.h5ad", "--data", tmp_path / "controls.h5ad")
    assert Counter(written.obs["target_gene"]) == {CONTROL: 48, **dict.fromkeys(held_out(place), 200)}


def test_held_out_contexts_are_predicted_in_these_alone(place, tmp_path):
    run = train(tmp_path, config(place, held_out_contexts=["type_1"]))
    written = predicted(place, tmp_path / "out.h5ad", "--model", run)
    own = written.obs[written.obs["target_gene"] != CONTROL]
    assert set(own["cell_type"]) == {"type_1"} and own["target_gene"].nunique() == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--targets", "GENE400"], "--targets: no gene of the model 'GENE400'; close to it: GENE40|GENE4"),
        (
            ["--targets", "ctrl+GENE400"],
            "--targets: no gene of the model 'GENE400'; close to it: GENE40|GENE4",
        ),
        (["--targets", CONTROL], "is the control label, not a target"),
        (["--targets", ",".join(["GENE400"] * 60)], "--targets: no gene of the model 'GENE400'"),
        (["--contexts", "type_7"], "--contexts: no cell type 'type_7'"),
        (["--phase", "other"], "no phase 'other' read sets of perturbed cells; there are: p0"),
        (["--num-steps", "0"], "--num-steps 0: it must be at least 1"),
        (["--preset", "vcc2026", "--space", "lognorm"], "scored in counts"),
        (["--obs", "a=b"], "is a corpus, not an h5ad file"),
        (["--technical-batch", "no"], "no technical batch of the model's run 'no'"),
        (["--targets", "GENE1+GENE2"], "is a pair of genes"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(place, tmp_path, capsys, options, message):
    import re

    assert predict(place, tmp_path / "out.h5ad", *options) == 2
    assert re.search(message.replace("+", r"\+"), capsys.readouterr().err)
    assert not list(tmp_path.glob("*.h5ad"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("GENE1,²", "line 2: n_cells is '²'; it must be a whole number"),
        ("GENE1," + "9" * 5_000, "line 2: n_cells is '9999"),
        ("A" * 200_000 + ",1", "cannot be read (field larger than"),
    ],
)
def test_a_line_of_targets_that_cannot_be_read_is_told(place, tmp_path, capsys, line, message):
    (tmp_path / "targets.csv").write_text(f"target_gene,n_cells\n{line}\n")
    assert predict(place, tmp_path / "out.h5ad", "--targets", tmp_path / "targets.csv") == 2
    assert message in capsys.readouterr().err


def test_a_target_that_is_named_twice_is_told_with_its_context(place, tmp_path, capsys):
    (tmp_path / "targets.csv").write_text("target_gene,cell_type\nGENE1,\nGENE1,type_1\n")
    assert predict(place, tmp_path / "out.h5ad", "--targets", tmp_path / "targets.csv") == 2
    assert "'GENE1' in 'type_1' is asked for more than once" in capsys.readouterr().err


def test_a_new_technical_batch_needs_one_of_the_models_to_stand_in(place, tmp_path, capsys):
    given = anndata.read_h5ad(place / "cells.h5ad")
    given.obs["batch"] = "new lane"
    given.write_h5ad(tmp_path / "new.h5ad")
    assert predict(place, tmp_path / "out.h5ad", "--data", tmp_path / "new.h5ad") == 2
    assert (
        "1 technical batch new to the model: new lane; say with --technical-batch" in capsys.readouterr().err
    )
    options = ["--data", tmp_path / "new.h5ad", "--technical-batch", "batch_1"]
    assert set(predicted(place, tmp_path / "out.h5ad", *options).obs["batch"]) == {"new lane"}


def test_log_normalised_values_are_those_of_the_models_transform(place, tmp_path):
    written = predicted(place, tmp_path / "out.h5ad", "--preset", "vcc2025", "--real", tmp_path / "real.h5ad")
    assert json.loads(written.uns["cellphase"])["target_sum"] == 1e4
    given, real = anndata.read_h5ad(place / "cells.h5ad"), anndata.read_h5ad(tmp_path / "real.h5ad")
    part = given[given.obs["target_gene"].isin([*held_out(place), CONTROL])]
    counts = part.X.toarray()
    expected = np.log1p(counts * 1e4 / counts.sum(axis=1, keepdims=True))
    assert real.X.sum() == pytest.approx(expected.sum(), rel=1e-5)
    own = written[written.obs["target_gene"] != CONTROL].X
    assert own.data.min() > 0 and own.data.max() <= np.log1p(1e4) * 1.001
    assert (own.data != np.rint(own.data)).any()


@pytest.mark.parametrize("as_corpus", [True, False])
def test_genes_in_another_order_are_found_by_name(place, tmp_path, capsys, as_corpus):
    from trainer.convert_h5ad import main as convert

    given = anndata.read_h5ad(place / "cells.h5ad")
    shuffled = given[:, np.random.default_rng(0).permutation(given.n_vars)].copy()
    shuffled.write_h5ad(tmp_path / "shuffled.h5ad")
    data = tmp_path / "shuffled.h5ad"
    if as_corpus:
        assert convert([str(data), "--output", str(tmp_path / "shuffled")]) == 0
        data = tmp_path / "shuffled"
    capsys.readouterr()
    other = predicted(place, tmp_path / "other.h5ad", "--data", data)
    assert is_same(predicted(place, tmp_path / "one.h5ad"), other)
    if as_corpus:
        said = capsys.readouterr().out
        assert "the 40 genes of the model were found by name among its 40" in " ".join(said.split())


def test_a_corpus_that_lacks_a_gene_of_the_model_is_refused(place, tmp_path, capsys):
    from trainer.convert_h5ad import main as convert

    anndata.read_h5ad(place / "cells.h5ad")[:, 1:].copy().write_h5ad(tmp_path / "fewer.h5ad")
    assert convert([str(tmp_path / "fewer.h5ad"), "--output", str(tmp_path / "fewer")]) == 0
    assert predict(place, tmp_path / "out.h5ad", "--data", tmp_path / "fewer") == 2
    assert "lacks 1 of the 40 genes of the model: GENE0" in capsys.readouterr().err


def test_an_export_predicts_what_its_run_does(place, tmp_path):
    export(place / "run", tmp_path / "export")
    of_export = predicted(place, tmp_path / "out.h5ad", "--model", tmp_path / "export")
    assert is_same(predicted(place, tmp_path / "run.h5ad"), of_export)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "perturbation_sets.json: not readable .* export the model again"),
        ('{"format": 1, "phases": []}', "it names no phase.* export the model again"),
        ('{"format": 1, "phases": [7]}', "not readable .* export the model again"),
        ('{"format": 2, "phases": []}', "^[^(]*: format 2 is not 1, the only one known here$"),
    ],
)
def test_damaged_settings_of_an_export_are_told(tmp_path, text, message):
    (tmp_path / SETTINGS_FILE).write_text(text)
    with pytest.raises(DataError, match=message):
        load_entries(tmp_path)


def test_an_export_of_a_model_of_ones_own_predicts_where_its_module_is_trusted(place, tmp_path, monkeypatch):
    (tmp_path / "own_transformer.py").write_text(
        "from models.perturbation_transformer import PerturbationTransformer\n"
        "class Own(PerturbationTransformer): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    export(place / "run", tmp_path / "export")
    file = tmp_path / "export" / "config.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps({**described, "model_class": "own_transformer.Own"}))
    options = ["--model", tmp_path / "export", "--trust", "own_transformer"]
    written = predicted(place, tmp_path / "out.h5ad", *options)
    assert is_same(predicted(place, tmp_path / "run.h5ad"), written)


def test_a_model_that_cannot_draw_is_refused(place, tmp_path, capsys):
    run = train(tmp_path, {**config(place), "model": {"model_class": "toy_sets.SetModel"}})
    assert predict(place, tmp_path / "out.h5ad", "--model", run, "--trust", "toy_sets") == 2
    assert (
        "SetModel cannot draw perturbed cells: it has no encode_conditions, sample, blank"
        in capsys.readouterr().err
    )


def test_a_model_of_cells_alone_is_refused(place, tmp_path, capsys):
    phase = {
        "dataloader_factory": "data.expression.expression_loader",
        "dataloader_args": {"path": str(place / "corpus"), "tokenizer": SETS["tokenizer"]},
        "max_steps": 1,
    }
    run = train(tmp_path, toy(phase, model=MODEL, micro_batch_size=4, global_batch_size=4))
    assert predict(place, tmp_path / "out.h5ad", "--model", run) == 2
    assert "only models with a phase of data.perturbation.perturbation_loader" in capsys.readouterr().err


def test_an_interrupted_prediction_leaves_nothing(place, tmp_path, monkeypatch):
    calls = []

    def interrupted(*given: Any, **more: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw_sets(*given, **more)

    monkeypatch.setattr(command, "draw_sets", interrupted)
    assert predict(place, tmp_path / "out.h5ad", "--batch-size", "2") == 130
    assert len(calls) == 3 and not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_when_asked_to(place, tmp_path, capsys):
    (tmp_path / "out.h5ad").write_text("precious")
    assert predict(place, tmp_path / "out.h5ad") == 2
    assert "exists; name another file, or give --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out.h5ad").read_text() == "precious"
    assert len(predicted(place, tmp_path / "out.h5ad", "--overwrite")) == 44 + 48


OPTIONS: list[dict[str, Any]] = [
    {},
    {"mix_technical_batches": True},
    {"pooling": "control"},
    {"pooling": "both"},
    {"tokenizer": {"strategy": "counts", "n_bins": 12}},
    {"tokenizer": {"strategy": "delta_bins"}, "control_tokenizer": {"strategy": "log_bins"}},
    {
        "tokenizer": {"strategy": "delta_bins"},
        "control_tokenizer": {"strategy": "log_bins"},
        "pooling": "control",
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(map(str, options)) or "plain")
def test_conditions_have_the_form_that_they_have_in_training(place, options):
    arguments = {**SETS, **options}
    source = perturbation_loader(place / "corpus", **arguments, held_out_genes=held_out(place))
    batches = {f"batch_{index}": index for index in range(3)}
    settings = settings_of_source(source, {**arguments, "held_out_genes": held_out(place)}, "one", batches)
    corpus = open_perturbed_corpus(open_corpus(place / "corpus"), settings)
    _, rows, _ = corpus.split()
    requests = make_requests(corpus, held_out_wanted(corpus, rows), real_rows=rows, default_cells=1)
    index = technical_batch_index(corpus, requests)
    sets = PredictionSets(corpus, requests, seed=0, batch_index=index, cells_are_apart=False)
    assert sets.num_cells == len(rows) == 44
    trained, ours = source.fetch(np.arange(3), DrawKey(0, 0, 0)), sets.batch(np.arange(3))
    for name, condition in ours.conditions.items():
        assert condition.shape == trained[name].shape and condition.dtype == trained[name].dtype, name
    assert ours.num_rows == trained["tokens"].shape[1]
    tokens = torch.full(trained["tokens"].shape, settings.tokenizer.zero_token).numpy()
    asked = tokens[np.arange(ours.num_rows) < ours.sizes[:, None]]
    decoder = ValueDecoder(settings.tokenizer, settings.transform, "counts", holds_counts=True)
    decoded = decoder.decode(asked, ours.controls, ours.seeds)
    if (
        settings.tokenizer.strategy == "delta_bins"
    ):  # no change from the controls: as many counts as they have
        assert np.add.reduceat(decoded.values, decoded.offsets[:-1]) == pytest.approx(
            ours.controls.total, rel=0.1
        )
    else:
        assert len(decoded.values) == 0


def test_pairs_of_targets_and_single_ones_have_the_form_that_they_have_in_training(place, tmp_path):
    from trainer.convert_h5ad import main as convert

    given = anndata.read_h5ad(place / "cells.h5ad")
    names = given.obs["target_gene"].astype(str)
    single, other = held_out(place)
    given.obs["target_gene"] = names.where(names != other, f"{single}+{other}")
    given.write_h5ad(tmp_path / "pairs.h5ad")
    assert convert([str(tmp_path / "pairs.h5ad"), "--output", str(tmp_path / "pairs")]) == 0
    arguments = {**SETS, "pairs": "index"}
    source = perturbation_loader(tmp_path / "pairs", **arguments)
    settings = settings_of_source(source, arguments, "one", {f"batch_{index}": index for index in range(3)})
    corpus = open_perturbed_corpus(open_corpus(tmp_path / "pairs"), settings)
    wanted = [Wanted(single, 0), Wanted(f"{single}+{other}", 0)]
    requests = make_requests(corpus, wanted, real_rows=np.empty(0, np.int64), default_cells=1)
    index = technical_batch_index(corpus, requests)
    sets = PredictionSets(corpus, requests, seed=0, batch_index=index, cells_are_apart=True)
    genes = [list(given.var_names).index(name) for name in (single, other)]
    assert sets.batch(np.arange(2)).conditions["target_gene_idx"].tolist() == [[genes[0], -1], genes]


def test_genes_that_a_file_did_not_measure_are_hidden_where_training_hid_them(place, tmp_path):
    run = train(tmp_path, config(place, unmeasured="hide", held_out_genes=held_out(place)))
    anndata.read_h5ad(place / "cells.h5ad")[:, 5:].copy().write_h5ad(tmp_path / "fewer.h5ad")
    options = ["--model", run, "--data", tmp_path / "fewer.h5ad", "--min-match", "0.8"]
    written = predicted(place, tmp_path / "out.h5ad", *options)
    is_control = (written.obs["target_gene"] == CONTROL).to_numpy()
    assert written.n_vars == 40 and written[is_control].X[:, :5].nnz == 0 < written[~is_control].X[:, :5].nnz


def test_names_of_targets_may_be_lines_of_a_file(place, tmp_path):
    (tmp_path / "names.txt").write_text("GENE30\n\nGENE31\n")
    written = predicted(place, tmp_path / "out.h5ad", "--targets", tmp_path / "names.txt", "--no-controls")
    assert set(written.obs["target_gene"]) == {"GENE30", "GENE31"} and len(written) == 400


def test_sets_of_a_model_that_predicts_cells_apart_draw_no_more_cells_than_asked_for(place):
    opened = open_perturbation_model(place / "run")
    corpus = open_perturbed_corpus(open_corpus(place / "corpus"), opened.settings)
    wanted = [Wanted("GENE5", 0, 9)]
    requests = make_requests(corpus, wanted, real_rows=np.empty(0, np.int64), default_cells=1)
    index = technical_batch_index(corpus, requests)
    apart, whole = (
        PredictionSets(corpus, requests, seed=0, batch_index=index, cells_are_apart=is_apart)
        for is_apart in (True, False)
    )
    assert apart.batch(np.arange(3)).num_rows == 3 and whole.batch(np.arange(3)).num_rows == 4
    assert apart.sizes.tolist() == whole.sizes.tolist() == [3, 3, 3]


def test_drawing_through_the_loss_module_is_drawing_from_the_model(place):
    opened = open_perturbation_model(place / "run")
    corpus = open_perturbed_corpus(open_corpus(place / "corpus"), opened.settings)
    requests = make_requests(corpus, [Wanted("GENE5")], real_rows=np.empty(0, np.int64), default_cells=6)
    index = technical_batch_index(corpus, requests)
    batch = PredictionSets(corpus, requests, seed=0, batch_index=index, cells_are_apart=True).batch(
        np.arange(4)
    )
    plain = draw_sets(opened.model, batch, 3, device="cpu")
    through = draw_sets(LossModule(opened.model), batch, 3, device="cpu", is_prepared=True)
    assert torch.equal(plain, through) and plain.min() >= 0 and plain.max() < 16


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    simulated = simulate_perturbations(num_genes=150, control_cells=700, cells_per_target=1)
    return simulated.counts.toarray().astype(np.float32)


def decoded(counts: np.ndarray, space: Any, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return expression that was made tokens and then values again, what it was before, and the library sizes."""
    tokenizer, transform, is_fitted = build_value_tokenizer(options, value_kind="counts")
    totals = counts.sum(axis=1).astype(np.float64)
    offsets = np.arange(len(counts) + 1) * counts.shape[1]
    values = transform.apply(counts.reshape(-1), offsets, totals).reshape(counts.shape)
    tokenizer = tokenizer.fitted([values]) if is_fitted else tokenizer
    decoder = ValueDecoder(tokenizer, transform, space, holds_counts=True)
    controls = MatchedControls(totals, totals, None)
    rows = decoder.decode(tokenizer.encode(values), controls, np.arange(len(counts)).astype(np.uint64) ** 3)
    return dense(rows, counts.shape[1]), values, totals


def dense(rows: PredictedRows, width: int) -> np.ndarray:
    """Lay predicted cells out as a matrix."""
    table = np.zeros((len(rows.offsets) - 1, width), np.float32)
    table[np.repeat(np.arange(len(table)), np.diff(rows.offsets)), rows.columns] = rows.values
    return table


def test_tokens_of_single_counts_are_exact(counts):
    found, _, _ = decoded(counts, "counts", strategy="counts", n_bins=64)
    assert (found[counts <= 9] == counts[counts <= 9]).all() and (found > 9).sum() == (counts > 9).sum()


def test_counts_of_wide_bins_keep_their_mean(counts):
    found, _, _ = decoded(counts, "counts", strategy="counts", n_bins=10, max_value=2000)
    is_wide = counts > 20
    error = (found - counts)[is_wide]
    assert (found == np.rint(found)).all() and np.abs(error).max() > 5
    assert abs(error.mean()) < 3 * error.std() / np.sqrt(len(error))


def test_counts_of_log_bins_have_the_depth_and_the_means_of_the_cells(counts):
    found, _, totals = decoded(counts, "counts", strategy="log_bins", n_bins=64)
    assert (found == np.rint(found)).all()
    assert found.sum(axis=1) == pytest.approx(totals, rel=0.1) and found.sum() == pytest.approx(
        totals.sum(), rel=1e-3
    )
    means = counts.mean(axis=0)
    assert np.abs(found.mean(axis=0) / means - 1)[means > 0.5].max() < 0.05


def test_log_normalised_values_keep_their_mean(counts):
    found, values, _ = decoded(counts, "lognorm", strategy="log_bins", n_bins=32)
    error = (found - values)[values > 0]
    assert error.std() > 0.02 and abs(error.mean()) < 3 * error.std() / np.sqrt(len(error))


@pytest.mark.parametrize("strategy", ["log_bins", "delta_bins"])
def test_a_bin_beyond_all_values_of_the_training_cells_is_not_predicted(strategy):
    tokenizer, transform, _ = build_value_tokenizer(
        {"strategy": strategy, "n_bins": 49, "min_value": 0.1}, value_kind="lognorm"
    )
    values = np.float32([-0.5, 3.0, 6.95] if strategy == "delta_bins" else [0.5, 3.0, 6.95])
    fitted = tokenizer.fitted([values])
    kept = ValueTokenizer.from_dict(json.loads(json.dumps(fitted.to_dict())))
    tokens = np.arange(kept.num_tokens)[None]
    low, high = kept.encode(values).min(), kept.encode(values).max()
    expected = np.clip(tokens, min(low, kept.zero_token), high)
    total, base = np.ones(1), np.full(tokens.shape, 20, np.float32)
    controls = MatchedControls(total, total, base if strategy == "delta_bins" else None)
    decoder = ValueDecoder(kept, transform, "lognorm", holds_counts=False)
    shown = dense(decoder.decode(tokens, controls, np.zeros(1, np.uint64)), tokens.shape[1])
    assert np.array_equal(kept.decode(tokens), kept.centres[expected]) and tokens.max() > high
    start = 20 if strategy == "delta_bins" else 0
    assert (shown - start).max() <= kept.edges[np.abs(high - kept.zero_token)] < 9
    assert (shown - start).min() >= (-1 if strategy == "delta_bins" else 0)


def test_a_tokenizer_from_before_the_outermost_bins_were_kept_decodes_as_it_did():
    tokenizer, _, _ = build_value_tokenizer({"strategy": "log_bins"}, value_kind="lognorm")
    content = tokenizer.fitted([np.float32([0.5, 3.0])]).to_dict()
    del content["outermost"]
    older = ValueTokenizer.from_dict(content)
    assert np.array_equal(older.decode(np.arange(older.num_tokens)), older.centres)


@pytest.mark.parametrize("outermost", [[0], [3, 1], [-1, 3], [0, 32], "ab", 5])
def test_outermost_bins_that_are_none_are_refused(outermost):
    tokenizer, _, _ = build_value_tokenizer({"strategy": "log_bins"}, value_kind="lognorm")
    with pytest.raises(DataError, match="not a value tokenizer"):
        ValueTokenizer.from_dict({**tokenizer.to_dict(), "outermost": outermost})


def test_cells_of_too_many_counts_are_scaled_down_and_counted(counts):
    tokenizer, transform, _ = build_value_tokenizer({"strategy": "counts"}, value_kind="counts")
    tokens = np.full((2, 150), tokenizer.num_tokens - 1)
    tokens[1] = 1
    total = np.ones(2)
    decoder = ValueDecoder(tokenizer, transform, "counts", holds_counts=True)
    rows = decoder.decode(tokens, MatchedControls(total, total, None), np.arange(2).astype(np.uint64))
    sums = dense(rows, 150).sum(axis=1)
    assert rows.num_capped == 1 and 0.99e6 < sums[0] <= 1e6 and sums[1] == 150


DRAW_IN_A_RUN = """
import sys
import numpy as np
from trainer import build
from trainer.config import load_run_config
from trainer.prediction import draw_sets, predicted_blocks
from data.perturbation_settings import settings_of_source
from data.predicted_values import ValueDecoder
from data.prediction_sets import PredictionSets, Wanted, make_requests, open_perturbed_corpus, technical_batch_index

def carry_out(run, facts, resume, notes):
    phase = run.phases[0]
    source, none = phase.loader.source, np.empty(0, np.int64)
    settings = settings_of_source(source, phase.config.dataloader_args, phase.name, facts.technical_batches)
    corpus = open_perturbed_corpus(source.reader.info, settings)
    requests = make_requests(corpus, [Wanted("GENE5"), Wanted("GENE6")], real_rows=none, default_cells=9)
    index = technical_batch_index(corpus, requests)
    sets = PredictionSets(corpus, requests, seed=0, batch_index=index, cells_are_apart=True)
    decoder = ValueDecoder(settings.tokenizer, settings.transform, "counts", True)
    draw = lambda batch: draw_sets(
        run.strategy.module, batch, 3, device=run.strategy.device, is_prepared=True
    )
    blocks = list(predicted_blocks(draw, sets, decoder, run.ranks, batch_size=5))
    assert bool(blocks) == run.ranks.is_main and run.module.model.training
    if blocks:
        np.savez(sys.argv[2], *(part for block in blocks for part in block.rows[:3]))
    return 0

build.carry_out = carry_out
raise SystemExit(build.run(load_run_config(sys.argv[1])))
"""


def drawn_in_a_run(place, folder, num_ranks, strategy="ddp"):
    """Return the arrays of the cells that the ranks of a run draw."""
    path = write_config(folder, config(place), global_batch_size=8)
    (folder / "script.py").write_text(DRAW_IN_A_RUN)
    environment = strategy_environment(folder, strategy, num_ranks)
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    arguments = [folder / "script.py", path, folder / "drawn.npz"]
    launch_ranks(num_ranks, arguments, env=environment, cwd=folder)
    return np.load(folder / "drawn.npz")


@pytest.fixture(scope="module")
def drawn_by_one(place, tmp_path_factory):
    return drawn_in_a_run(place, tmp_path_factory.mktemp("drawn_by_one"), 1)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_run_of_two_ranks_draws_the_cells_of_one(place, tmp_path, drawn_by_one, strategy):
    drawn_by_two = drawn_in_a_run(place, tmp_path, 2, strategy)
    # 12 sets in batches of 5: two rounds of two ranks, one batch too many
    assert len(drawn_by_one.files) == len(drawn_by_two.files) == 3 * 3
    assert sum(len(drawn_by_one[f"arr_{index}"]) - 1 for index in (0, 3, 6)) == 36
    for name in drawn_by_one.files:
        assert np.array_equal(drawn_by_one[name], drawn_by_two[name])


def test_an_export_of_a_run_with_a_split_file_asks_for_targets(place, tmp_path, capsys):
    (tmp_path / "split.toml").write_text(
        '[datasets]\nsimulated = "/data"\n[training]\nsimulated = "train"\n[zeroshot]\n"simulated.type_1" = "val"\n'
    )
    run = train(tmp_path, config(place, split_file=str(tmp_path / "split.toml")))
    of_run = predicted(place, tmp_path / "run.h5ad", "--model", run, "--no-controls")
    assert len(of_run) == 88 and set(of_run.obs["cell_type"]) == {"type_1"}
    export(run, tmp_path / "export")
    assert predict(place, tmp_path / "out.h5ad", "--model", tmp_path / "export") == 2
    assert "was said by a file, which an export does not have; name the targets" in capsys.readouterr().err
    options = ["--model", tmp_path / "export", "--targets", "all", "--contexts", "type_1", "--no-controls"]
    assert is_same(of_run, predicted(place, tmp_path / "out.h5ad", *options))


def test_a_prediction_that_is_killed_leaves_no_file_of_the_name(place, tmp_path):
    options = ["--model", place / "run", "--data", place / "corpus", "--output", tmp_path / "out.h5ad"]
    many = ["--targets", "all", "--cells-per-perturbation", "4000", "--num-steps", "8", "--device", "cpu"]
    with start_ranks(1, ["-m", "trainer", "predict", *options, *many], cwd=ROOT) as ranks:
        ranks.wait_for("predicting")
        ranks.kill()
    assert not (tmp_path / "out.h5ad").exists()


def test_a_model_is_given_technical_batches_unless_its_configuration_knows_none():
    model: Any = torch.nn.Linear(1, 1)
    assert knows_technical_batches(model)  # without a configuration too
    model.config = SimpleNamespace(n_technical_batches=0)
    assert not knows_technical_batches(model)
