"""The toolkit from an h5ad file to an exported classifier: its commands alone, on two ranks, killed on the way."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from launching import ROOT, launch_ranks, run_command, start_ranks
from running import comparable_records, records, same_weights

SAMPLE = ROOT / "data" / "samples" / "10x_pbmc68k_reduced.h5ad"
CONFIG = f"""
data:
  paths: ["{SAMPLE}"]
  gene_vocab: from_data
  num_workers: 0
tokenizer: {{strategy: binned_expression, n_bins: 8, max_genes: 96}}
model:
  hidden_dim: 32
  num_layers: 1
  num_heads: 2
  pooling: mean
  pretraining_task: masked_expression_prediction
training:
  batch_size: 16
  max_epochs: 2
  precision: "32"
  optimizer: {{lr: 2e-3}}
  logger: csv
  log_every_n_steps: 5
  val_split: 0.2
  run_name: whole
eval:
  every_n_epochs: 2
  benchmarks: [{{name: linear_probe, cell_type_key: bulk_labels}}]
finetune:
  label_key: bulk_labels
  freeze_backbone_epochs: 1
  head: {{hidden_dim: 16}}
  backbone_lr: 3e-3
  head_lr: 5e-3
"""

pytestmark = pytest.mark.timeout(900)


def command(name: str, folder: Path, *more: str | Path) -> list[str | Path]:
    places = [f"data.cache_dir={folder / 'cache'}", f"training.log_dir={folder / 'logs'}"]
    return ["-m", "trainer", name, "--config", folder / "cells.yaml", *places, *more]


def run_folder(folder: Path, name: str) -> Path:
    (found,) = (folder / name).iterdir()
    return found


def killed_and_resumed(folder: Path, name: str, *overrides: str) -> Path:
    """Kill both ranks when the first epoch has been saved, go on from there, and return the run folder."""
    place = f"training.checkpoint_dir={folder / f'{name}_killed'}"
    with start_ranks(2, command(name, folder, place, *overrides)) as group:
        while not any((folder / f"{name}_killed").glob("*/checkpoint_*")):  # under its name it is complete
            assert group.is_running(), group.output()
            time.sleep(0.01)
        group.kill()
    launch_ranks(2, command(name, folder, place, "training.resume_from=latest", *overrides))
    return run_folder(folder, f"{name}_killed")


def uninterrupted(folder: Path, name: str, *overrides: str) -> Path:
    place = f"training.checkpoint_dir={folder / f'{name}_whole'}"
    launch_ranks(2, command(name, folder, place, *overrides))
    return run_folder(folder, f"{name}_whole")


def in_order(folder: Path) -> list[dict[str, Any]]:
    """Return what a run recorded, its benchmarks last: when they are recorded depends on the processes that score."""
    return sorted(comparable_records(folder), key=lambda record: record["kind"] == "benchmark")


@pytest.mark.slow
def test_pretrain_fine_tune_benchmark_embed_and_export_by_the_commands_alone(tmp_path):
    (tmp_path / "cells.yaml").write_text(CONFIG)
    pretrained = killed_and_resumed(tmp_path, "train")
    assert same_weights(pretrained, uninterrupted(tmp_path, "train"))
    assert in_order(pretrained) == in_order(run_folder(tmp_path, "train_whole"))
    steps = [record["global_step"] for record in records(pretrained, "benchmark")]
    assert len(steps) == 2 and steps[0] == 0 < steps[1]  # the network as it was drawn, and as it became

    backbone = f"finetune.checkpoint_path={pretrained}"
    changes = [backbone, "training.max_epochs=4", "training.optimizer.lr=5e-3"]
    tuned = killed_and_resumed(tmp_path, "finetune", *changes)
    assert same_weights(tuned, uninterrupted(tmp_path, "finetune", *changes))
    accuracy = [record["accuracy"] for record in records(tuned, "validation")]
    assert accuracy[-1] > 0.45  # the largest of the ten classes has a share of 0.34

    options = ["--model", pretrained, "--data", SAMPLE, "--output", tmp_path / "results"]
    options += ["--layout", "pca"]  # UMAP compiles for longer than all of this trains
    launch_ranks(2, ["-m", "trainer", "benchmark", "--config", tmp_path / "cells.yaml", *options])
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".csv", ".png"}
    assert "linear_probe" in (tmp_path / "results" / "results.json").read_text()

    run_command(["python", "-m", "trainer", "export", tuned, tmp_path / "exported"])
    labels = json.loads((tmp_path / "exported" / "labels.json").read_text())
    assert len(labels) == 10 or len(labels["labels"]) == 10

    embedded = {}
    for source in (tuned, tmp_path / "exported"):
        output = tmp_path / f"{source.name}.h5ad"
        launch_ranks(
            2,
            ["-m", "trainer", "embed", "--model", source, "--data", SAMPLE, "--output", output],
        )
        with warnings.catch_warnings(action="ignore"):  # the sample is of an old format
            embedded[source] = anndata.read_h5ad(output)
            names = list(anndata.read_h5ad(SAMPLE).obs_names)
        assert list(embedded[source].obs_names) == names
    first, second = (cells.obsm["X_cellphase"] for cells in embedded.values())
    assert first.shape == (700, 32)
    np.testing.assert_allclose(first, second, atol=1e-5)
