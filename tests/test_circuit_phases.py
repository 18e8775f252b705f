"""What the trainer knows of circuits: gates and prompts over all phases, in the model and in checkpoints.

The numbers R1 to R17 are those of docs/circuits.md.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from circuit_folders import SAMPLES, random_circuits, write_set
from running import (
    comparable_records,
    final_weights,
    newest_checkpoint,
    newest_run,
    records,
    same_weights,
    train,
    train_ranks,
    write_config,
)
from toy_circuits import CircuitToyConfig

from trainer.checkpoint_folder import open_checkpoint
from trainer.checkpoint_model import load_trained
from trainer.circuit_facts import CircuitFacts
from trainer.config import load_run_config
from trainer.distributed import Ranks
from trainer.errors import CheckpointError, ConfigError
from trainer.model_building import build_model, with_data_sizes
from trainer.phases import DataFacts, Phase, open_phases

POOL = ["h", "cx", "z", "x", "ccx", "swap"]


def circuits(*paths: Path | str, **changes: Any) -> dict[str, Any]:
    """Return a configuration with a phase for each data set."""
    return {
        "run_name": "toy",
        "device": "cpu",
        "seed": 3,
        "model": {"model_class": "toy_circuits.CircuitToy", "config_class": "toy_circuits.CircuitToyConfig"},
        "optimizer": {"optimizer_args": {"lr": 0.05}},
        "micro_batch_size": 16,
        "global_batch_size": 64,
        "datasets": [
            {
                "name": f"p{index}",
                "dataloader_factory": "data.circuits.circuit_loader",
                "dataloader_args": {"path": str(path)},
            }
            for index, path in enumerate(paths)
        ],
        **changes,
    }


def opened(folder: Path, config: dict[str, Any]) -> tuple[list[Phase], DataFacts, Any]:
    run = load_run_config(write_config(folder, config))
    return *open_phases(run, Ranks(0, 1), pin_memory=False), run


def test_a_model_gets_gates_prompts_and_sizes_from_the_data(tmp_path: Path):
    """R9: the vocabulary comes from the data; R10: so does whether there are unitaries."""
    _, facts, config = opened(tmp_path, circuits(SAMPLES / "unitary_3q"))
    model = build_model(config, facts)
    assert isinstance(model.config, CircuitToyConfig) and model.config.vocab_size == 8
    assert list(model.config.gate_pool) == POOL and model.config.has_unitary is True
    assert list(model.config.prompts) == list(facts.circuits.prompts) and model.config.num_prompts == len(
        facts.circuits.prompts
    )
    assert model.config.num_qubits == 3


def test_prompts_are_merged_over_phases_and_batches_count_the_merged_ones(tmp_path: Path):
    """R8: one list of distinct prompts for the whole run."""
    phases, facts, _ = opened(tmp_path, circuits(SAMPLES / "srv_3q", SAMPLES / "srv_mixed" / "4q"))
    folders = (SAMPLES / "srv_3q" / "dataset", SAMPLES / "srv_mixed" / "4q" / "dataset")
    texts = [torch.load(folder / "ds_y.pt", weights_only=False)["0"] for folder in folders]
    assert list(facts.circuits.prompts) == sorted({*texts[0].tolist(), *texts[1].tolist()})
    assert facts.sizes["num_prompts"] == len(facts.circuits.prompts) and facts.sizes["num_qubits"] == 4
    for phase, expected in zip(phases, texts, strict=True):
        for loader in (phase.loader, phase.validation):
            for step in loader.evaluation_steps(3):
                for part in step:
                    found = [facts.circuits.prompts[index] for index in part.batch["prompt_idx"]]
                    assert found == expected[part.rows].tolist()
        phase.close()


def test_phases_with_different_gate_pools_are_refused_by_their_names(tmp_path: Path):
    """R6: as folders of one data set are."""
    write_set(tmp_path / "other", random_circuits(20, 2, 4, 0), ["a"] * 20)
    with pytest.raises(
        ConfigError, match=r"'p0' and 'p1' have different gate pools \(h, cx, z.*and h, cx, swap\)"
    ):
        opened(tmp_path, circuits(SAMPLES / "srv_3q", tmp_path / "other"))


def test_unitaries_in_some_phases_are_none_for_the_model(tmp_path: Path):
    """R10: a model that needs unitaries could not train all phases."""
    _, facts, _ = opened(tmp_path, circuits(SAMPLES / "srv_3q", SAMPLES / "unitary_3q"))
    assert facts.circuits.has_unitary is False


def constructor(vocab_size: int = 0, gate_pool: Any = None, prompts: Any = None) -> None:
    """Name some of what the data knows."""


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"gate_pool": ["h"]}, "here.gate_pool: what was given is not what the data has"),
        ({"prompts": ["b", "a"]}, "here.prompts: what was given is not what the data has"),
        ({"vocab_size": 3}, "here.vocab_size: 3 was given, but the data needs 4"),
    ],
)
def test_what_the_user_gives_must_be_what_the_data_has(given: dict[str, Any], why: str):
    """R9: a vocabulary that is too small is an error, not an index out of range."""
    facts = DataFacts({}, 0, sizes={"vocab_size": 4}, circuits=CircuitFacts(("h", "cx"), ("a", "b"), False))
    with pytest.raises(ConfigError, match=why):
        with_data_sizes(constructor, given, facts, "here")
    expected = {"vocab_size": 4, "gate_pool": ["h", "cx"], "prompts": ["a", "b"]}
    assert with_data_sizes(constructor, {"gate_pool": ("h", "cx")}, facts, "here") == expected


def test_data_without_circuits_gives_a_model_none_of_their_facts():
    facts = DataFacts({"a": 0}, 1, sizes={"vocab_size": 4})
    assert with_data_sizes(constructor, {"prompts": ["mine"]}, facts, "here") == {
        "vocab_size": 4, "prompts": ["mine"],
    }  # fmt: skip


def test_a_required_size_that_neither_the_user_nor_the_data_tells_is_named():
    def network(vocab_size: int, width: int) -> None: ...

    with pytest.raises(ConfigError, match=r"^model\.model_args\.vocab_size: is required, and the data does"):
        with_data_sizes(network, {"width": 3}, DataFacts({"a": 0}, 1), "model.model_args")


def two_stages(second: Path) -> dict[str, Any]:
    """Return a configuration of a small first phase and a bucketed second one, which saves within its epochs."""
    config = circuits(SAMPLES / "srv_3q", second, checkpoint={"keep_last": None})
    config["datasets"][0] |= {"eval_every_epochs": 1}
    config["datasets"][1] |= {"save_every_steps": 5, "epochs": 2}
    config["datasets"][1]["dataloader_args"] |= {"padding": "bucket"}
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train both phases."""
    return train(tmp_path_factory.mktemp("run"), two_stages(SAMPLES / "srv_mixed"))


def test_a_checkpoint_says_what_tokens_and_prompts_stand_for(run: Path):
    """A sampler needs no data: the model is built from the checkpoint alone."""
    saved = newest_checkpoint(run)
    trained = load_trained(saved, trusted_modules=("toy_circuits",))
    assert list(trained.facts.circuits.gate_pool) == POOL and trained.facts.circuits.has_unitary is False
    assert (
        "Generate SRV: [1, 2, 2]" in trained.facts.circuits.prompts
        and len(trained.facts.circuits.prompts) == 17
    )
    options = saved.shared("run_state.safetensors")["tokenizer_options"]
    assert options["p1"] == {
        "gate_pool": POOL, "prompts": list(trained.facts.circuits.prompts), "num_qubits": 4, "max_length": 12,
        "has_unitary": False,
    }  # fmt: skip
    assert options["p0"]["prompts"] == options["p1"]["prompts"] and options["p0"]["max_length"] == 8
    assert list(trained.model.config.prompts) == options["p1"]["prompts"]


def test_a_resumed_run_ends_as_the_one_that_was_not_interrupted(run: Path, tmp_path: Path):
    """R7: circuits in buckets go on at a step of an epoch, bit for bit."""
    copy = shutil.copytree(run, tmp_path / "runs" / run.name)
    middle = open_checkpoint(copy / "checkpoint_20")
    progress = middle.shared("run_state.safetensors")["progress"]
    assert progress["phase_index"] == 1 and progress["epoch_step"] > 0
    train(tmp_path, two_stages(SAMPLES / "srv_mixed"), resume_from=str(middle.folder))
    assert same_weights(copy, run)
    assert comparable_records(copy)[-1] == comparable_records(run)[-1]


def test_a_run_does_not_go_on_with_other_prompts(run: Path, tmp_path: Path):
    """R8: an index would mean another prompt, even where a phase is over and the next has not begun."""
    copy = shutil.copytree(run, tmp_path / "runs" / run.name)
    with pytest.raises(CheckpointError, match="it has 17 prompts, the data 5, not in both"):
        train(tmp_path, two_stages(SAMPLES / "srv_mixed" / "3q"), resume_from=str(copy / "checkpoint_9"))


def test_the_account_names_gates_and_prompts_and_no_technical_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train(tmp_path, circuits(SAMPLES / "srv_3q"), dry_run=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "circuits of up to 3 qubits over 6 gates, 5 prompts, without unitaries" in printed
    assert "535 circuits for training, 53 for validation" in printed
    assert "technical" not in printed


@pytest.mark.parametrize("padding", ["max", "bucket"])
def test_two_processes_train_as_one_with_another_micro_batch(tmp_path: Path, padding: str):
    """R7: the same split, global batches and padding, with workers that read ahead; R17 in part: the user's command."""
    config = circuits(SAMPLES / "srv_mixed")
    config["datasets"][0]["dataloader_args"] |= {"padding": padding, "balance_max": 60}
    one = train(tmp_path / "one", config, micro_batch_size=32)
    config["datasets"][0]["dataloader_args"]["num_workers"] = 1
    train_ranks(2, tmp_path / "two", config)
    expected, found = final_weights(one), final_weights(newest_run(tmp_path / "two"))
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    losses = [records(run, "validation")[-1]["loss"] for run in (one, newest_run(tmp_path / "two"))]
    assert padding == "bucket" or losses[0] == pytest.approx(losses[1], rel=1e-6)
