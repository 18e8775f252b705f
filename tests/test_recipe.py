"""Tests of the recipe that learns cell types without their names (docs/recipes.md)."""

import re

import numpy as np
import pytest
import torch
from launching import ROOT
from running import newest_run, reset_accelerate

from data.hashing import DrawKey
from data.prepared import h5ad_loader
from trainer.build import run
from trainer.config import load_config, load_run_config
from trainer.config.yaml_text import parse_yaml
from trainer.saved_model import open_model
from trainer.scoring import linear_probe
from trainer.scoring.cells import Cells
from trainer.scoring.specs import LinearProbeSpec

pytestmark = pytest.mark.usefixtures("forked_programs")

CONFIG = ROOT / "configs" / "pbmc68k.yaml"
FINE_TUNING = ROOT / "configs" / "pbmc68k_finetune.yaml"
SPEC = LinearProbeSpec(cell_type_key="bulk_labels", num_repeats=1)


@pytest.fixture
def short_run(tmp_path):
    """Train by the recipe for one of its epochs, on fewer of each cell's genes, and return the run folder."""
    first = "datasets.0"
    config = load_run_config(
        CONFIG,
        [
            f"output_dir={tmp_path / 'runs'}",
            f"{first}.dataloader_args.cache_dir={tmp_path / 'cache'}",
            f"{first}.dataloader_args.tokenizer.max_genes=300",
            f"{first}.epochs=1",
            f"{first}.eval_every_epochs=1",
        ],
    )
    reset_accelerate()
    assert run(config) == 0
    return newest_run(tmp_path)


def probe(embed, source, cells):
    parts = np.array_split(np.arange(len(source)), 50)
    with torch.no_grad():
        features = torch.cat([embed(source.fetch_unmasked(rows, DrawKey(0, 0, 0))) for rows in parts])
    return linear_probe.score(SPEC, features.numpy(), cells).scores["accuracy"].value


def test_an_epoch_without_labels_beats_the_probe_of_the_network_before_training(short_run):
    source = h5ad_loader(**load_run_config(short_run / "config.yaml").datasets[0].dataloader_args)
    labels = source.obs(["bulk_labels"], np.arange(len(source)))
    cells = Cells(labels, expression=None, depth=np.zeros(len(source)), depth_measure="")
    opened = open_model(short_run)
    trained = probe(opened.embed, source, cells)
    untrained = max(probe(opened.untrained(seed).encode, source, cells) for seed in range(2))
    assert trained > untrained + 0.06, (trained, untrained)


def test_the_documentation_shows_the_recipe_as_it_is_shipped():
    shown = re.search(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "recipes.md").read_text(), re.M | re.S)
    assert shown is not None
    shipped = CONFIG.read_text().replace("${config_dir:}/../", "")
    assert parse_yaml(shown[1]) == parse_yaml(shipped)


def test_fine_tuning_holds_out_the_cells_that_pretraining_did():
    pretraining = load_run_config(CONFIG).datasets[0].dataloader_args
    fine_tuning = load_config(FINE_TUNING)
    assert fine_tuning.finetune is not None
    assert pretraining["label"] == fine_tuning.finetune.label_key and pretraining["stratify"]
    assert pretraining["val_fraction"] == fine_tuning.training.val_split
    assert pretraining["split_seed"] == fine_tuning.training.seed
