"""Tests of the recipe that predicts perturbations that were never seen (docs/recipes.md)."""

import importlib.util
import json
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from launching import ROOT
from running import newest_run, reset_accelerate

from data.simulator import write_simulated_h5ad
from trainer.build import run
from trainer.config import load_run_config
from trainer.convert_h5ad import main as convert
from trainer.predict import main as predict

pytestmark = pytest.mark.usefixtures("forked_programs")

CONFIG = ROOT / "configs" / "perturbation_simulated.yaml"


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = ROOT / "benchmarks" / "perturbation_recipe.py"
    spec = importlib.util.spec_from_file_location("perturbation_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_targets_that_were_never_seen_are_predicted_better_than_by_the_mean_response(recipe, tmp_path):
    cells, corpus = tmp_path / "cells.h5ad", tmp_path / "corpus"
    write_simulated_h5ad(cells, num_genes=80, num_pathways=4, num_cell_types=2, num_batches=2, seed=7)
    assert convert([str(cells), "--output", str(corpus)]) == 0
    task = recipe.simulated_task(cells, corpus, 7)
    settings = [
        f"output_dir={tmp_path / 'runs'}",
        f"datasets.0.dataloader_args.path={corpus}",
        "datasets.0.epochs=5",
        "datasets.0.eval_every_epochs=5",
    ]
    reset_accelerate()
    assert run(load_run_config(CONFIG, [*settings, *task.settings])) == 0
    files = {name: tmp_path / f"{name}.h5ad" for name in ("predicted", "real", "train")}
    arguments = ["--model", str(newest_run(tmp_path)), "--data", str(corpus), "--num-steps", "2"]
    arguments += ["--output", str(files["predicted"]), "--real", str(files["real"])]
    assert predict([*arguments, "--train", str(files["train"]), "--device", "cpu"]) == 0
    changes = {name: recipe.changes_of(path) for name, path in files.items()}
    held_out = {target for target, _ in changes["predicted"]}
    assert len(held_out) == 6 and not held_out & {target for target, _ in changes["train"]}
    model = recipe.effect_correlation(changes["predicted"], changes["real"])
    mean = recipe.effect_correlation(recipe.mean_changes(changes["train"], changes["real"]), changes["real"])
    assert model > mean + 0.25, (model, mean)


def test_a_file_holds_targets_out_in_one_cell_type_that_were_seen_in_the_others(recipe, tmp_path):
    everywhere = [f"T{index}" for index in range(6)]
    rows = [(target, line) for line in ("A", "B") for target in [*everywhere, "non-targeting"]] * 30
    rows += [("only B", "B")] * 50
    obs = pd.DataFrame({"target_gene": [row[0] for row in rows], "cell_type": [row[1] for row in rows]})
    obs.index = obs.index.astype(str)
    AnnData(np.ones((len(obs), 3), np.float32), obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    chosen = []
    for seed in range(2):
        task = recipe.cell_type_task(tmp_path / "cells.h5ad", tmp_path / "corpus", seed)
        (combination,) = json.loads(task.settings[0].split("=", 1)[1])
        assert combination["cell_type"] == "AB"[seed]
        chosen.append(combination["target_gene"])
        assert len(chosen[-1]) == recipe.HELD_OUT_IN_CELL_TYPE and set(chosen[-1]) <= set(everywhere)
    assert chosen[0] != chosen[1]


def test_a_file_holds_pairs_out_whose_targets_were_seen_alone(recipe, tmp_path):
    alone = [f"T{index}" for index in range(4)]
    pairs = [f"{first}+{second}" for i, first in enumerate(alone) for second in alone[i + 1 :]]
    rows = ["non-targeting", *alone, *pairs, "T0+other"] * 30
    obs = pd.DataFrame({"target_gene": rows, "cell_type": "A"})
    obs.index = obs.index.astype(str)
    AnnData(np.ones((len(obs), 3), np.float32), obs=obs).write_h5ad(tmp_path / "cells.h5ad")
    task = recipe.pair_task(tmp_path / "cells.h5ad", tmp_path / "corpus", 0)
    (combination,) = json.loads(task.settings[0].split("=", 1)[1])
    assert combination["cell_type"] == "A" and len(set(combination["target_gene"])) == 4
    assert set(combination["target_gene"]) <= set(pairs)


def test_a_win_is_a_lower_value_where_lower_is_better(recipe):
    model = dict.fromkeys(recipe.METRICS, 0.5)
    other = {metric: 0.4 if metric in recipe.LOWER_IS_BETTER else 0.6 for metric in recipe.METRICS}
    figures = {recipe.MODEL: model, recipe.MEAN_RESPONSE: other, recipe.CONTROLS: model}
    assert recipe.wins(figures, recipe.MEAN_RESPONSE) == 0
    assert recipe.wins(figures, recipe.CONTROLS) == 0
    figures[recipe.MODEL], figures[recipe.MEAN_RESPONSE] = other, model
    assert recipe.wins(figures, recipe.MEAN_RESPONSE) == 6
