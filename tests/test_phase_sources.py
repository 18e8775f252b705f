"""What a run's configuration says of its cells: model cards name them, and benchmarks say which labels were learned."""

import csv
import json

import anndata
import numpy as np
import pytest
import yaml
from h5ad_files import random_counts, write_h5ad
from running import toy, train

from models.pretrained import config_fields
from trainer.benchmark import main
from trainer.checkpoint_model import find_checkpoint, load_trained
from trainer.config.schema import PhaseConfig
from trainer.model_card import model_card
from trainer.phase_sources import data_in_words, labelled_in_training
from trainer.saved_model import open_model

NUM_CELLS, NUM_GENES = 60, 40
ENCODER = {
    "model_class": "models.encoder.MaskedCellEncoder",
    "config_class": "models.encoder.EncoderConfig",
    "config_args": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "pooling": "mean"},
}
KINDS = [f"kind{index % 3}" for index in range(NUM_CELLS)]


def h5ad_phase(folder, **arguments):
    tokenizer = {"strategy": "binned_expression", "n_bins": 5, "max_genes": 12}
    common = {
        "paths": [str(folder / "cells.h5ad")],
        "tokenizer": tokenizer,
        "cache_dir": str(folder / "cache"),
    }
    return {
        "dataloader_factory": "data.prepared.h5ad_loader",
        "dataloader_args": {**common, **arguments},
        "max_steps": 2,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a file of cells, a model of them, and one that learned their labels."""
    folder = tmp_path_factory.mktemp("sources")
    counts = random_counts(NUM_CELLS, NUM_GENES, seed=1, high=9)
    obs = {"celltype": KINDS, "donor": [f"d{i % 2}" for i in range(NUM_CELLS)]}
    write_h5ad(folder / "cells.h5ad", counts, obs=obs)
    common = {"micro_batch_size": 8, "global_batch_size": 8}
    run = train(folder, toy(h5ad_phase(folder, masking={"mask_ratio": 0.3}), model=ENCODER, **common))
    (folder / "run").symlink_to(run)
    model = {
        "model_class": "models.fine_tuned.FineTunedModel",
        "config_class": "models.fine_tuned.FineTunedConfig",
        "config_args": {
            "backbone_class": "models.encoder.MaskedCellEncoder",
            "backbone_config": config_fields(open_model(run).model.config),
        },
    }
    phase = h5ad_phase(folder, obs=["kind=celltype"], label="kind")
    config = toy(phase, model=model, init_from=str(run / "checkpoint_2"), **common)
    (folder / "fine_tuned").symlink_to(train(folder / "tuned", config))
    return folder


def benchmark(folder, model, data, column="celltype"):
    probe = {"name": "linear_probe", "cell_type_key": column, "num_folds": 2, "num_repeats": 1}
    (folder / "eval.yaml").write_text(
        yaml.safe_dump({"data": {"paths": ["x"]}, "eval": {"benchmarks": [probe]}})
    )
    paths = [
        "--config",
        folder / "eval.yaml",
        "--model",
        model,
        "--data",
        data,
        "--output",
        folder / "results",
    ]
    assert main([*map(str, paths), "--device", "cpu", "--layout", "pca"]) == 0
    return json.loads((folder / "results" / "results.json").read_text())["notes"]["linear_probe"]


def test_a_benchmark_says_that_its_labels_were_learned_from_this_file(place, tmp_path, capsys):
    notes = benchmark(tmp_path, place / "fine_tuned", place / "cells.h5ad")
    assert notes[0] == (
        "these labels were in the training of phase p0: it learned obs column 'kind' of this very file"
    )
    assert notes[1] == "so model was told answers that untrained and the baselines were not"
    assert notes[0] in capsys.readouterr().out
    with open(tmp_path / "results" / "results.csv") as file:
        assert next(csv.DictReader(file))["notes"].startswith(notes[0])


def test_a_file_with_the_same_classes_is_told_from_that_of_the_training(place, tmp_path):
    cells = anndata.read_h5ad(place / "cells.h5ad")
    cells.obs["other_name"] = KINDS
    cells.write_h5ad(tmp_path / "changed.h5ad")
    notes = benchmark(tmp_path, place / "fine_tuned", tmp_path / "changed.h5ad", "other_name")
    assert "it learned obs column 'kind' of cells.h5ad, which is not this file" in notes[0]


@pytest.mark.parametrize(("model", "column"), [("run", "celltype"), ("fine_tuned", "donor")])
def test_labels_that_were_not_learned_need_no_notice(place, tmp_path, model, column):
    assert not [
        note
        for note in benchmark(tmp_path, place / model, place / "cells.h5ad", column)
        if "labels were" in note
    ]


def test_the_card_names_files_labels_and_the_weights_at_the_start(place):
    card = model_card(load_trained(find_checkpoint(place / "fine_tuned")), "verified")
    assert "| p0 | data.prepared.h5ad_loader | cells.h5ad | kind: 3 classes |" in card
    run = (place / "run").resolve().name
    assert f"| weights at the start | {run}/checkpoint_2 |" in card
    plain = model_card(load_trained(find_checkpoint(place / "run")), "verified")
    assert "| cells.h5ad | none |" in plain and "weights at the start" not in plain


def phase(factory, **arguments):
    return PhaseConfig(name="p", dataloader_factory=factory, dataloader_args=arguments, epochs=1)


def test_sources_are_named_without_the_folders_of_a_machine():
    files = phase("data.prepared.h5ad_loader", paths=["/home/me/a.h5ad", "b/*.h5ad"])
    assert data_in_words(files) == "a.h5ad, *.h5ad"
    census = {"census_version": "2025-01-30", "organism": "Mus musculus", "filters": {"tissue": "lung"}}
    said = data_in_words(phase("data.prepared.census_loader", census=census))
    assert said.startswith("CELLxGENE Census 2025-01-30, mus_musculus, tissue == ")
    assert data_in_words(phase("mine.loader")) == ""


@pytest.mark.parametrize(
    ("column", "values", "is_said"),
    [
        ("cell_type", ["0", "1"], True),  # numbers count by the column's name
        ("leiden", ["0", "1"], False),
        ("leiden", ["T", "B"], True),
        ("leiden", ["T", "x"], False),
        ("cell_type", ["x", "y"], False),  # other cells, of other types
    ],
)
def test_labels_are_those_of_the_training_by_their_classes(tmp_path, column, values, is_said):
    learned = [phase("data.prepared.h5ad_loader", paths=["/gone.h5ad"], label="cell_type")]
    (tmp_path / "cells.h5ad").touch()
    said = labelled_in_training(learned, ["0", "1", "T", "B"], column, values, tmp_path / "cells.h5ad")
    assert len(said) == is_said
    assert not said or "whether that is this file cannot be told, since it is no more there" in said[0]


def test_the_source_of_a_corpus_is_known_by_its_manifest(place, tmp_path):
    corpus = next(path for path in (place / "cache").iterdir() if (path / "manifest.json").exists())
    learned = [phase("data.loader.cell_loader", path=str(corpus), label="kind")]
    said = labelled_in_training(learned, ["kind0"], "kind", np.unique(KINDS).tolist(), place / "cells.h5ad")
    assert said[0].endswith("of this very file")
