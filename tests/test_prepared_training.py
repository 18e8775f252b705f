"""Training on h5ad files as they are: what a run saves of its cells, and what resuming and exporting do with it."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
from h5ad_files import random_counts, write_h5ad
from running import comparable_records, copy_until, records, same_weights, toy, train, train_ranks

from data.exported import load_tokenizer
from data.hashing import DrawKey
from data.prepared import h5ad_loader
from trainer.errors import CheckpointError
from trainer.export import export

pytestmark = pytest.mark.usefixtures("forked_programs")

ENCODER = {
    "model_class": "models.encoder.MaskedCellEncoder",
    "config_class": "models.encoder.EncoderConfig",
    "config_args": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
}
TOKENIZER = {"strategy": "binned_expression", "binning_method": "quantile", "n_bins": 6, "max_genes": 24}


def write_cells(path, num_cells=97, kinds=("B", "NK", "T"), seed=0):
    counts = random_counts(num_cells, 30, seed)[: num_cells - 1]
    labels = np.resize(kinds, num_cells - 1)
    return write_h5ad(
        path, counts, obs={"kind": pd.Categorical(labels), "donor": np.resize(["p", "q"], num_cells - 1)}
    )


def phase(folder, file, tokenizer=TOKENIZER, **arguments):
    return {
        "dataloader_factory": "data.prepared.h5ad_loader",
        "dataloader_args": {
            "paths": [str(file)],
            "cache_dir": str(folder / "cache"),
            "tokenizer": tokenizer,
            "masking": {"mask_ratio": 0.3, "target": "both"},
            "preprocessing": {"normalize": "library_size", "target_sum": 1000, "log1p": True},
            "label": "kind",
            "stratify": True,
            "val_fraction": 0.2,
            **arguments,
        },
        "eval_every_epochs": 1,
    }


def run_config(*phases, **changes):
    return toy(*phases, **{"model": ENCODER, "micro_batch_size": 4, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    file = write_cells(folder / "cells.h5ad")
    return folder, file, train(folder, run_config(phase(folder, file)))


def test_an_export_tokenizes_new_cells_with_the_fitted_edges_and_names_the_classes(trained, tmp_path):
    folder, file, run = trained
    export(run, tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "labels.json").read_text()) == ["B", "NK", "T"]
    tokenizer = load_tokenizer(tmp_path / "exported")
    source = h5ad_loader(**phase(folder, file, masking=None)["dataloader_args"])
    assert tokenizer.options == source.facts()["tokenizer_options"]
    other = write_cells(tmp_path / "other.h5ad", num_cells=20, seed=8)
    cells = anndata.read_h5ad(other)
    genes = source.facts()["gene_space"].ids
    theirs = tokenizer.tokenize(cells.X, list(cells.var_names))
    again = h5ad_loader(
        [str(other)],
        tokenizer=tokenizer.options,
        cache_dir=str(tmp_path / "cache"),
        gene_vocab=str(tmp_path / "exported"),
    )
    assert again.facts()["gene_space"].ids == genes
    mine = again.fetch(np.arange(len(again)), DrawKey(0, 0, 0))
    assert (mine["bins"] == theirs["bins"]).all() and (mine["tokens"] == theirs["tokens"]).all()


@pytest.mark.parametrize(
    "other, message",
    [
        ({"kinds": ("B", "T", "mono")}, "its labels have 3 classes, the data's 3, not in both: NK, mono"),
        ({"seed": 5}, r"tokenizer.edges of phase 'p0' was \[.*set the data and the tokenizer"),
    ],
)
def test_a_run_goes_on_with_the_same_classes_and_bins_only(tmp_path, other, message):
    file = write_cells(tmp_path / "cells.h5ad")
    config = run_config({**phase(tmp_path, file), "epochs": 2})
    run = copy_until(train(tmp_path / "whole", config), 4, tmp_path)
    write_cells(file, **other)
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path, config, resume_from=str(run))


def test_a_run_on_files_resumes_bit_for_bit_with_balanced_sampling(tmp_path):
    file = write_cells(tmp_path / "cells.h5ad", kinds=["B"] * 20 + ["T"] * 3)
    sampling = {"column": "kind", "warmup_epochs": 2}
    settings = {**phase(tmp_path, file, sampling=sampling), "epochs": 3, "save_every_steps": 7}
    config = run_config(settings, global_batch_size=8)
    whole = train(tmp_path / "whole", config)
    part = copy_until(whole, 14, tmp_path)
    assert train(tmp_path, config, resume_from="latest") == part
    assert comparable_records(part) == comparable_records(whole) and same_weights(part, whole)


def test_two_ranks_convert_once_and_train_as_one(tmp_path):
    files = [write_cells(tmp_path / f"{name}.h5ad", seed=seed) for name, seed in (("one", 1), ("two", 2))]
    arguments = {"paths": [str(file) for file in files], "sampling": {"column": "donor"}}
    preprocessing = {"hvg_selection": 20, "hvg_flavor": "seurat"}
    config = run_config(
        phase(tmp_path, files[0], **arguments, technical_batch="@file", preprocessing=preprocessing),
        epochs=None,
    )
    train_ranks(2, tmp_path / "two", config)
    made = list((tmp_path / "cache").glob("*/manifest.json"))
    assert len(made) == 2  # of all genes, and of those that were chosen
    times = [path.stat().st_mtime_ns for path in made]
    alone = train(tmp_path / "one", config)
    pair = next((tmp_path / "two" / "runs").iterdir())
    mine, theirs = ([record["loss"] for record in records(run)] for run in (alone, pair))
    assert mine == pytest.approx(theirs, rel=1e-4)
    assert [path.stat().st_mtime_ns for path in made] == times
