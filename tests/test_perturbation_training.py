import re
from pathlib import Path
from typing import Any

import pytest
from running import (
    comparable_records,
    copy_until,
    newest_checkpoint,
    newest_run,
    records,
    same_weights,
    train,
    train_ranks,
    write_config,
)

from data.simulator import write_simulated_h5ad
from data.value_tokenizers import ValueTokenizer
from trainer.config import load_run_config
from trainer.costs import find_gpu
from trainer.plan import make_plan, render
from trainer.report_page import write_page
from trainer.run_facts import read_run

SIZES: dict[str, Any] = {
    "num_genes": 40, "num_pathways": 2, "members_per_pathway": 6, "distal_per_pathway": 6, "targets_per_pathway": 4,
    "num_cell_types": 2, "num_batches": 3, "cells_per_target": 12, "control_cells": 30,
}  # fmt: skip
TOKENIZER = {"strategy": "log_bins", "n_bins": 8}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trainer.convert_h5ad import main

    folder = tmp_path_factory.mktemp("simulated")
    write_simulated_h5ad(folder / "cells.h5ad", **SIZES)
    assert main([str(folder / "cells.h5ad"), "--output", str(folder / "corpus")]) == 0
    return folder / "corpus"


def config(corpus: Path, **arguments: Any) -> dict[str, Any]:
    """Return a run of two phases: cells, then their perturbations."""
    sets = {
        "path": str(corpus),
        "tokenizer": TOKENIZER,
        "set_size": 4,
        "held_out_contexts": ["type_1"],
        **arguments,
    }
    cells = {"path": str(corpus), "tokenizer": TOKENIZER, "limit_cells": 48}
    return {
        "run_name": "sets",
        "device": "cpu",
        "seed": 5,
        "model": {"model_class": "toy_sets.SetModel"},
        "optimizer": {"optimizer_args": {"lr": 0.02}},
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "checkpoint": {"keep_last": None},
        "datasets": [
            {
                "name": "cells",
                "dataloader_factory": "data.expression.expression_loader",
                "dataloader_args": cells,
            },
            {
                "name": "response",
                "dataloader_factory": "data.perturbation.perturbation_loader",
                "dataloader_args": sets,
                "epochs": 2,
                "save_every_steps": 1,
                "eval_every_epochs": 1,
            },
        ],
    }


def test_a_run_trains_on_cells_and_then_on_their_perturbations(corpus: Path, tmp_path: Path, capsys: Any):
    folder = train(tmp_path, config(corpus))
    losses = [record["loss"] for record in records(folder)]
    assert len(losses) == 6 + 2 * 3 and losses[-1] < losses[0]
    assert [record["phase"] for record in records(folder, "validation")] == ["response"] * 2
    printed = capsys.readouterr().out
    assert re.search("^cells +[0-9]+ cells ", printed, re.MULTILINE)
    assert re.search("^response +24 sets ", printed, re.MULTILINE)
    assert list(dict.fromkeys(re.findall("[0-9] ([a-z]+)/s  data wait", printed))) == ["cells", "sets"]
    assert "sets of 'response' epoch 1: 24 seen once" in printed and "cells of 'response'" not in printed
    page = write_page([read_run(folder)])
    assert "cells and sets trained on" in page and "samples/s" in page
    assert "training: 24 sets of 4 in an epoch" in " ".join(printed.split())
    assert "what their controls share with them: technical batch and cell type 96" in " ".join(
        printed.split()
    )


def test_a_plan_names_what_its_phases_count(corpus: Path, tmp_path: Path):
    run = load_run_config(write_config(tmp_path, config(corpus)))
    both = render(make_plan(run, find_gpu("H100"), world_sizes=[1], mfu=0.5, sample_cells=16))
    assert "loader samples/s" in both and re.search("^response .* [0-9]+ sets ", both, re.MULTILINE)
    run = run.model_copy(update={"datasets": run.datasets[1:]})
    sets = render(make_plan(run, find_gpu("H100"), world_sizes=[1], mfu=0.5, sample_cells=16))
    assert "Each sample (the first" in sets and "loader sets/s" in sets and "cells" not in sets


def test_a_checkpoint_keeps_what_turns_tokens_into_values(corpus: Path, tmp_path: Path):
    folder = train(tmp_path, config(corpus, targets="corpus"))
    state = newest_checkpoint(folder).shared("run_state.safetensors")
    kept = state["tokenizer_options"]["response"]
    tokenizer = ValueTokenizer.from_dict(kept["tokenizer"])
    assert tokenizer.num_tokens == 8 and (kept["target_sum"], kept["log1p"]) == (1e4, True)
    assert (
        len(kept["targets"]) == 8 and state["sizes"]["num_targets"] == 8 and state["sizes"]["num_genes"] == 40
    )


@pytest.mark.parametrize("arguments", [{}, {"mix_technical_batches": True, "pooling": "control"}])
def test_a_run_interrupted_in_its_second_phase_goes_on_as_if_it_had_not_been(
    corpus: Path, tmp_path: Path, arguments: dict[str, Any]
):
    run = config(corpus, **arguments)
    reference = train(tmp_path / "whole", run)
    folder = copy_until(reference, 7, tmp_path)  # in the middle of the first epoch of the second phase
    train(tmp_path, run, resume_from="latest")
    assert comparable_records(folder) == comparable_records(reference) and same_weights(folder, reference)


def test_one_and_two_processes_have_the_same_losses_on_sets(corpus: Path, tmp_path: Path):
    run = config(corpus)
    run["model"] = {"model_class": "toy_sets.NoDropout"}
    train_ranks(2, tmp_path / "two", run)
    losses = [
        [record["loss"] for kind in ("train", "validation") for record in records(folder, kind)]
        for folder in (train(tmp_path / "one", run), newest_run(tmp_path / "two"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
