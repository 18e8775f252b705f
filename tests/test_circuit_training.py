"""Circuit models from the command to the saved pipeline: trained, resumed, gone on from, listed and deleted."""

import json
import os
import re
import shutil
import sys
import types

import pytest
import torch
import yaml
from circuit_folders import SAMPLES, random_circuits, write_set
from launching import ROOT, launch_ranks, run_command, start_ranks, with_forked_ranks
from running import (
    comparable_records,
    newest_checkpoint,
    newest_run,
    records,
    reset_accelerate,
    strategy_environment,
)
from safetensors.torch import load_file

import trainer.train
from models.circuit_diffusion import CircuitDiffusion
from models.pretrained import from_pretrained
from trainer import registry, saved_run
from trainer.errors import UserError
from trainer.shards import full_weights

pytestmark = pytest.mark.usefixtures("forked_programs")

CONFIG = ROOT / "configs" / "circuits" / "config.yaml"
TINY = [
    "training.general.device=cpu",
    "training.general.verbose=true",
    "training.model.params.model_features=[8,16]",
    "training.model.params.t_emb_size=16",
    "training.model.params.cond_emb_size=16",
    "training.model.params.num_heads=[2,2]",
    "training.model.params.num_res_blocks=[1,1]",
    "training.model.params.transformer_depths=[1,1]",
    "training.training.batch_size=16",
    "training.training.max_samples=64",
    "training.training.num_epochs=2",
    "training.training.ckpt_interval=1",
]
FILES = {
    "config.json",
    "config.yaml",
    "embedder.safetensors",
    "metadata.yaml",
    "model.safetensors",
    "training_config.yaml",
}


def overrides(output, *more, data=SAMPLES / "srv_3q"):
    return [*TINY, f"training.general.dataset={data}", f"training.general.output_path={output}", *more]


def train(output, *more, data=SAMPLES / "srv_3q", code=0):
    """Train in this process, and return the newest run folder, None where there is none."""
    reset_accelerate()
    assert trainer.train.main(["--config", str(CONFIG), *overrides(output, *more, data=data)]) == code
    return newest(output)


def newest(output):
    return newest_run(output) if (output / "runs").is_dir() else None


def files(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a trained model, which nobody changes."""
    output = tmp_path_factory.mktemp("trained") / "out"
    train(output)
    return output


@pytest.fixture
def copied(trained, tmp_path):
    """Return a saved pipeline that may be changed."""
    folder = tmp_path / "models" / "first"
    folder.mkdir(parents=True)
    for name in files(trained):
        shutil.copy(trained / name, folder / name)
    return folder


# What a run leaves


def test_a_run_saves_a_pipeline_that_loads(trained):
    assert files(trained) == FILES
    model = from_pretrained(trained)
    assert isinstance(model, CircuitDiffusion)
    assert model.config.gate_pool == ("h", "cx", "z", "x", "ccx", "swap") and model.config.vocab_size == 8
    saved, state = full_weights(newest_checkpoint(newest(trained))), model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in saved)
    table = load_file(trained / "embedder.safetensors")["emb_clr.weight"]
    assert torch.equal(table, model.embedding_table)


def test_the_metadata_are_plain_and_say_what_was_trained(trained):
    facts = yaml.safe_load((trained / "metadata.yaml").read_text())
    assert facts["model_type"] == "QC_Cond_UNet" and facts["training_epochs"] == 2
    assert facts["device_used"] == "cpu" and facts["run"] == newest(trained).name
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", facts["save_timestamp"])
    assert facts["files"].keys() == FILES - {"metadata.yaml"}


def test_the_settings_are_saved_as_they_were_resolved(trained):
    settings = yaml.safe_load((trained / "training_config.yaml").read_text())
    assert settings["training"]["num_epochs"] == 2 and settings["training"]["guidance_train_p"] == 0.1
    assert settings["general"]["dataset"] == "srv_3q"


def test_no_file_of_a_pipeline_names_a_folder_of_this_machine(trained):
    for name in FILES:
        assert str(trained.parent).encode() not in (trained / name).read_bytes()
        assert str(ROOT).encode() not in (trained / name).read_bytes()


def test_a_run_trains_as_many_epochs_as_asked_and_validates_each(trained):
    folder = newest(trained)
    steps = records(folder)
    assert {record["epoch"] for record in steps} == {0, 1}
    assert [record["global_step"] for record in steps] == list(range(1, len(steps) + 1))
    assert [record["epoch"] for record in records(folder, "validation")] == [1, 2]


def test_the_run_says_when_it_began_how_it_ended_and_how_long_it_took(trained):
    status = json.loads((newest(trained) / "exit_status.json").read_text())
    assert status["exit_code"] == 0 and status["reason"] == "done"
    assert status["started"] < status["time"] and status["duration_seconds"] > 0


def test_a_file_in_the_place_of_the_model_is_refused_before_anything_is_trained(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("in the way")
    assert train(tmp_path / "out", "training.general.model_name=x", code=2) is None
    assert "x is a file; name a folder" in capsys.readouterr().err


def test_a_learning_rate_that_is_too_high_ends_the_run_with_an_account(tmp_path):
    output = tmp_path / "out"
    more = [
        "training.training.optimizer=SGD",
        "training.training.learning_rate=1e30",
        "training.training.lr_scheduler=null",
        "training.training.max_grad_norm=null",
        "training.training.num_epochs=20",
    ]
    status = json.loads((train(output, *more, code=1) / "exit_status.json").read_text())
    assert status["exit_code"] == 1 and "had no finite loss or gradient" in status["reason"]
    assert files(output) == set()


# One-cycle, unitaries, stages, averages


def test_the_learning_rate_goes_up_and_down_once(trained):
    rates = [record["lr"] for record in records(newest(trained))]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3 / 25 / 1e4)


def test_the_unitary_preset_trains(tmp_path):
    train(
        tmp_path / "out",
        "training=quick_test_unitary",
        "training.training.num_epochs=1",
        data=SAMPLES / "unitary_3q",
    )
    model = from_pretrained(tmp_path / "out")
    assert model.needs_unitary and model.config.has_unitary


def test_a_network_that_needs_unitaries_refuses_data_without(tmp_path, capsys):
    train(tmp_path / "out", "training=quick_test_unitary", code=2)
    assert "is told the unitary of a circuit, but the data has none" in capsys.readouterr().err


def test_stages_train_one_after_the_other_over_all_prompts(tmp_path):
    mixed = SAMPLES / "srv_mixed"
    stages = [
        f"training.stages=[{{dataset: {mixed}/3q, num_epochs: 1}}, {{dataset: {mixed}/4q, num_epochs: 1}}]"
    ]
    folder = train(tmp_path / "out", *stages)
    assert list(dict.fromkeys(record["phase"] for record in records(folder))) == ["stage_1", "stage_2"]
    config = from_pretrained(tmp_path / "out").config
    assert config.num_qubits == 4
    assert {len(prompt.split(",")) for prompt in config.prompts} == {3, 4}


def test_the_average_of_the_weights_is_what_is_saved(tmp_path):
    folder = train(tmp_path / "out", "training.training.ema={decay: 0.9}", "training.training.num_epochs=1")
    saved = newest_checkpoint(folder)
    state = from_pretrained(tmp_path / "out").state_dict()
    averages, weights = full_weights(saved, averaged=True), full_weights(saved, averaged=False)
    assert all(torch.equal(averages[name], state[name]) for name in state)
    assert any(not torch.equal(weights[name], state[name]) for name in state)
    assert yaml.safe_load((tmp_path / "out" / "metadata.yaml").read_text())["weights"] == "averaged"


# Folders that are there


def test_another_runs_model_is_not_overwritten(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "out", ignore=shutil.ignore_patterns("runs"))
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    train(tmp_path / "out", "training.training.seed=1", code=2)
    assert f"holds the model of run {newest(trained).name}" in capsys.readouterr().err
    assert newest(tmp_path / "out") is None  # found before anything was trained
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    train(tmp_path / "out", "training.training.seed=1", "training.general.overwrite=true")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_a_run_that_is_gone_on_with_replaces_its_own_model(tmp_path):
    first = train(tmp_path / "out", "training.training.num_epochs=1")
    (tmp_path / "out" / "model.safetensors").unlink()
    again = train(tmp_path / "out", "training.training.num_epochs=1", "training.general.resume=true")
    assert first == again and files(tmp_path / "out") == FILES
    facts = yaml.safe_load((tmp_path / "out" / "metadata.yaml").read_text())
    assert facts["training_steps"] == records(again)[-1]["global_step"]


def test_a_pipeline_that_cannot_be_written_whole_is_not_there(tmp_path):
    def write(folder):
        (folder / "config.json").write_text("{}")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        saved_run.place(tmp_path / "new", write, {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("old")
    with pytest.raises(OSError, match="full"):
        saved_run.place(tmp_path / "old", write, {})
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["config.json"]
    assert (tmp_path / "old" / "config.json").read_text() == "old"


def test_what_says_how_a_model_is_loaded_goes_first_and_comes_last(tmp_path, monkeypatch):
    def write(folder):
        for name in ("config.json", "config.yaml", "model.safetensors"):
            (folder / name).write_text("new")
        return {}

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    there, rename = [], os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (there.append(files(b.parent)), rename(a, b))[1])
    saved_run.place(tmp_path / "model", write, {"run": "r"})
    names = ["notes.txt", "metadata.yaml", "model.safetensors", "config.json", "config.yaml"]
    assert there == [set(names[:count]) for count in range(1, 5)]
    assert files(tmp_path / "model") == set(names)


# Weights to start from


def test_training_goes_on_from_a_saved_pipeline(trained, tmp_path):
    start = f"training.general.init_from_pipeline_dir={trained}"
    train(tmp_path / "out", start, "training.training.learning_rate=1e-9", "training.training.num_epochs=1")
    old, new = (from_pretrained(path).state_dict() for path in (trained, tmp_path / "out"))
    assert all(torch.allclose(old[name], new[name], atol=1e-6) for name in old)


def test_the_gates_of_a_saved_pipeline_must_be_the_datas(trained, tmp_path, capsys):
    data = write_set(
        tmp_path / "data",
        random_circuits(40, 3, 8, seed=1),
        ["Generate SRV: [1, 1, 1]"] * 40,
        gates=("h", "cx", "swap"),
    )
    train(tmp_path / "out", f"training.general.init_from_pipeline_dir={trained}", data=data, code=2)
    message = " ".join(capsys.readouterr().err.split())
    assert (
        "was trained on the gates h, cx, z, x, ccx, swap (in this order), and the data has h, cx, swap"
        in message
    )


def test_prompts_are_matched_by_their_text_and_new_ones_start_fresh(trained, tmp_path):
    gates = from_pretrained(trained).config.gate_pool
    prompts = ["Generate SRV: [2, 2, 2]", "an unknown one"] * 20
    data = write_set(tmp_path / "data", random_circuits(40, 3, 8, seed=1), prompts, gates=gates)
    start = [f"training.general.init_from_pipeline_dir={trained}", "training.training.learning_rate=1e-12"]
    # Of another seed, because the fresh rows of two tables of one seed are equal.
    train(tmp_path / "out", *start, "training.training.num_epochs=1", "training.training.seed=7", data=data)
    old, new = from_pretrained(trained), from_pretrained(tmp_path / "out")
    row = old.config.prompts.index("Generate SRV: [2, 2, 2]")
    assert new.config.prompts == ("Generate SRV: [2, 2, 2]", "an unknown one")
    kept, fresh, empty = new.prompts.table.weight.detach()
    assert torch.allclose(kept, old.prompts.table.weight[row], atol=1e-6)
    assert torch.allclose(empty, old.prompts.table.weight[-1], atol=1e-6)
    assert not any(torch.allclose(fresh, other, atol=1e-3) for other in old.prompts.table.weight)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.scheduler.params.prediction_type=v-type", "was trained to predict epsilon"),
        ("training.model.params.num_heads=[4,4]", "was trained with num_heads [2, 2]"),
        ("training.model.params.model_features=[16,16]", "does not fit"),
    ],
)
def test_a_saved_pipeline_of_another_kind_is_refused(trained, tmp_path, capsys, override, message):
    train(tmp_path / "out", f"training.general.init_from_pipeline_dir={trained}", override, code=2)
    assert message in " ".join(capsys.readouterr().err.split())


# genQC's networks


class StandIn(torch.nn.Module):
    """What a pipeline needs of one of genQC's UNets: its arguments, its vectors of tokens, its calls."""

    def __init__(
        self,
        model_features,
        clr_dim,
        num_clrs,
        t_emb_size,
        cond_emb_size,
        num_heads,
        num_res_blocks,
        transformer_depths,
    ):
        super().__init__()
        self.emb_clr = torch.nn.Embedding(num_clrs, clr_dim)
        self.conv = torch.nn.Conv2d(clr_dim, clr_dim, 1)
        self.condition = torch.nn.Linear(cond_emb_size, clr_dim)

    def forward(self, x, t, c_emb):
        return self.conv(x) + self.condition(c_emb.mean(1))[:, :, None, None]


@pytest.fixture
def genqc(monkeypatch):
    """Let a stand-in be genQC's UNet."""
    for name in ("genQC", "genQC.models", "genQC.models.unet_qc"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["genQC.models.unet_qc"], "QC_Cond_UNet", StandIn, raising=False)
    return ["training.model.type=null", "training.model.target=genQC.models.unet_qc.QC_Cond_UNet"]


def test_a_pipeline_of_genqcs_network_has_genqcs_files_and_loads_here_too(genqc, tmp_path):
    output = tmp_path / "out"
    train(output, *genqc, "training.training.num_epochs=1")
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["target"] == "genQC.pipeline.diffusion_pipeline.DiffusionPipeline"
    network, encoder = config["params"]["model"], config["params"]["text_encoder"]
    assert network["save_path"] is None and network["save_type"] == "safetensors"
    assert network["params"]["num_clrs"] == 8 and network["params"]["clr_dim"] == 8
    assert encoder["save_path"] is None and encoder["save_type"] is None
    assert config["params"]["add_config"]["dataset"]["params"]["gate_pool"] == [
        "h",
        "cx",
        "z",
        "x",
        "ccx",
        "swap",
    ]
    model = from_pretrained(output)
    network, embedder = (load_file(output / f"{name}.safetensors") for name in ("model", "embedder"))
    assert network.keys() == embedder.keys() == model.unet.state_dict().keys()
    assert all(torch.equal(network[name], tensor) for name, tensor in model.unet.state_dict().items())
    assert torch.equal(embedder["emb_clr.weight"], model.embedding_table)


def test_training_goes_on_from_a_pipeline_that_genqc_saved(genqc, tmp_path):
    train(tmp_path / "first", *genqc, "training.training.num_epochs=1")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("config.yaml", "model.safetensors", "embedder.safetensors"):
        shutil.copy(tmp_path / "first" / name, theirs / name)
    start = [f"training.general.init_from_pipeline_dir={theirs}", "training.training.learning_rate=1e-12"]
    train(tmp_path / "second", *genqc, *start, "training.training.num_epochs=1")
    first, second = (from_pretrained(tmp_path / name) for name in ("first", "second"))
    for one, other in zip(first.unet.parameters(), second.unet.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert torch.equal(first.embedding_table, second.embedding_table)


# The registry


def models(*arguments):
    return registry.main([str(argument) for argument in arguments])


def test_saved_models_are_listed_told_and_loaded(copied, capsys):
    root = copied.parent
    shutil.copytree(copied, root / "deep" / "second")
    assert models("list", "--root", root) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^deep/second +QC_Cond_UNet", listed, re.MULTILINE) and re.search(
        r"^first ", listed, re.MULTILINE
    )
    assert models("info", "second", "--root", root) == 0
    assert (
        "training_epochs: 2" in (told := capsys.readouterr().out) and "every file is what was written" in told
    )
    assert models("load", "first", "--root", root) == 0
    assert "gates: h, cx, z, x, ccx, swap; up to 3 qubits" in capsys.readouterr().out
    assert isinstance(registry.load("first", root), CircuitDiffusion)
    assert isinstance(registry.load(str(copied)), CircuitDiffusion)


def test_a_damaged_model_is_not_loaded(copied, capsys):
    path = copied / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not what was written"):
        registry.load("first", copied.parent)
    assert models("info", "first", "--root", copied.parent) == 0
    assert "damaged: model.safetensors is not what was written" in capsys.readouterr().out


def test_a_model_is_deleted_when_told_so_and_nothing_else(copied, capsys):
    root = copied.parent
    (copied / "notes.txt").write_text("mine")
    assert models("delete", "first", "--root", root) == 2
    assert "give --yes" in capsys.readouterr().err
    assert models("delete", "first", "--root", root, "--yes") == 0
    assert files(copied) == {"notes.txt"}
    assert registry.list_models(root) == []


def test_names_that_are_unknown_or_of_several_are_told(copied):
    root = copied.parent
    with pytest.raises(UserError, match=r"no such model in .*; did you mean 'first'\?"):
        registry.find("frist", root)
    for place in ("a", "b"):
        shutil.copytree(copied, root / place / "same")
    with pytest.raises(UserError, match="a/same, b/same end like this"):
        registry.find("same", root)
    assert registry.find("a/same", root).folder == root / "a" / "same"


# The user's commands


def test_the_seeds_command_trains_from_the_command_line(tmp_path):
    output = tmp_path / "models" / "quick_test"
    command = [
        *(
            "python",
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            "accelerate_configs/cpu_2_processes.yaml",
        ),
        *("trainer/train.py", "--config", "configs/circuits/config.yaml"),
        *("hydra.run.dir=.", "hydra.output_subdir=null", "training=quick_test_srv"),
        *overrides(output, "training.training.num_epochs=5"),
    ]
    said = run_command(command, env=with_forked_ranks({}), timeout=400).stdout
    assert f"saved the model of step {records(newest(output))[-1]['global_step']} to {output}" in " ".join(
        said.split()
    )
    assert files(output) == FILES
    assert {record["epoch"] for record in records(newest(output))} == set(range(5))
    assert registry.load(str(output)).config.num_qubits == 3


def test_two_ranks_under_zero_2_in_bf16_save_the_whole_model(tmp_path):
    output = tmp_path / "out"
    launch_ranks(
        2,
        [
            ROOT / "trainer" / "train.py",
            *("--config", CONFIG),
            *overrides(output, "training.training.precision=bf16", "training.training.num_epochs=1"),
        ],
        env=strategy_environment(tmp_path, "zero2", 2),
    )
    folder = newest(output)
    weights = full_weights(newest_checkpoint(folder))
    state = from_pretrained(output).state_dict()
    assert all(torch.equal(weights[name].float(), state[name].float()) for name in state)
    assert all(record["loss"] < 2 for record in records(folder))


def test_a_run_that_is_killed_goes_on_to_the_same_model(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = ["training.training.save_every_steps=3", "training.training.num_epochs=4"]
    first = train(whole, *more)
    script = [ROOT / "trainer" / "train.py", "--config", CONFIG, *overrides(broken, *more)]
    with start_ranks(1, script) as group:
        group.wait_for("checkpoint_6")
        group.kill()
    assert not (broken / "config.json").exists()
    second = train(broken, *more, "training.general.resume=auto")
    assert comparable_records(first) == comparable_records(second)
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
