"""The configuration of circuit models: presets, both shapes, what is refused by name, and the run that it becomes."""

import json
import re

import pytest
import yaml
from launching import ROOT, run_command

from trainer.config import json_schema
from trainer.config.cells_section import section_classes
from trainer.config.circuits import CircuitsConfig, circuits_config, load_circuits_config
from trainer.config.circuits_run import circuits_run
from trainer.config.load import dump_yaml, load_run_config
from trainer.config.messages import ValidationError
from trainer.errors import ConfigError

CONFIG = ROOT / "configs" / "circuits" / "config.yaml"
PRESETS = sorted(path.stem for path in (CONFIG.parent / "training").glob("*.yaml"))
GENERAL = {"general": {"dataset": "circuits", "output_path": "out"}}
STAGES = ["training.stages.0.dataset=a", "training.stages.1.dataset=b"]


def load(*overrides):
    return load_run_config(CONFIG, list(overrides))


def run_of(**sections):
    return circuits_run(circuits_config({**GENERAL, **sections}, "test"))


def refused(**sections):
    with pytest.raises(ValidationError) as caught:
        circuits_config({**GENERAL, **sections}, "test")
    return str(caught.value)


# Presets and overrides


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_becomes_a_run(name):
    given = STAGES if name == "unitary_curriculum" else ["training.general.dataset=circuits"]
    run = load(f"training={name}", *given)
    assert run.export_to is not None and run.export_to.format == "circuits"
    assert all(phase.dataloader_factory == "data.circuits.circuit_loader" for phase in run.datasets)


def test_the_seeds_command_line_is_read():
    run = load(
        "hydra.run.dir=.",
        "hydra.output_subdir=null",
        "training=quick_test_srv",
        "training.general.dataset=./datasets/srv_dataset",
        "training.general.output_path=./models/quick_test",
        "training.training.num_epochs=5",
    )
    assert run.datasets[0].dataloader_args["path"] == "./datasets/srv_dataset"
    assert run.datasets[0].epochs == 5
    assert run.export_to is not None and run.export_to.folder == "./models/quick_test"
    assert run.output_dir == "./models/quick_test/runs"


def test_the_command_line_goes_before_the_preset_and_is_typed():
    run = load("training.training.learning_rate=1e-5", "training.training.max_grad_norm=null")
    assert run.datasets[0].lr == 1e-5 and run.optimizer.optimizer_args["lr"] == 1e-5
    assert run.max_grad_norm is None


def test_a_plus_before_a_key_changes_nothing():
    assert load("+training.training.seed=3").seed == load("training.training.seed=3").seed == 3


def test_an_unknown_preset_lists_those_that_there_are():
    with pytest.raises(
        ConfigError, match="allowed: quick_test_srv, quick_test_unitary, srv, srv_3q_recipe, srv_bucket"
    ):
        load("training=no_such_thing")
    with pytest.raises(
        ConfigError, match="did you mean 'quick_test_srv'.*There are: quick_test_srv, quick_test_uni"
    ):
        load("training=quick_tests_srv")


@pytest.mark.parametrize("plus", ["", "+"])
def test_an_unknown_key_is_an_error_also_after_a_plus(plus):
    with pytest.raises(
        ConfigError, match=r"training\.training\.epochs: unknown key; did you mean 'num_epochs'"
    ):
        load(f"{plus}training.training.epochs=5")


def test_a_key_beside_the_package_is_an_error():
    with pytest.raises(ConfigError, match=r"model: unknown key beside `training`"):
        load("model.type=QC_Cond_UNet")


def test_a_preset_that_wants_data_says_so():
    with pytest.raises(ConfigError, match=r"training\.general\.dataset: the file says \?\?\?"):
        load("training=srv")


def test_both_shapes_become_the_same_run(tmp_path):
    flat, packaged = tmp_path / "flat.yaml", tmp_path / "packaged.yaml"
    flat.write_text(yaml.safe_dump(GENERAL))
    packaged.write_text(yaml.safe_dump({"training": GENERAL}))
    assert load_run_config(flat) == load_run_config(packaged)


def test_fine_tuning_points_to_the_key_that_does_it():
    with pytest.raises(ConfigError, match=r"does, with general\.init_from_pipeline_dir"):
        load_run_config(CONFIG, [], "finetune")


# What the fields become


def test_the_run_of_a_preset_is_written_out_and_read_back_equal(tmp_path):
    run = load("training=quick_test_unitary")
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(run))
    assert load_run_config(path) == run


@pytest.mark.parametrize(
    ("type", "unet"),
    [
        ("QC_Cond_UNet", "models.circuit_unet.CircuitUNet"),
        ("QC_Compilation_UNet", "models.circuit_unet.CircuitCompilationUNet"),
    ],
)
def test_the_type_names_our_networks(type, unet):
    assert run_of(model={"type": type}).model.config_args["unet_class"] == unet


def test_a_target_names_another_network_with_its_own_arguments():
    target = "genQC.models.unet_qc.QC_Compilation_UNet"
    encoder = {"model_features": [2, 32, 64], "transformer_depths": [1, 1]}
    run = run_of(model={"target": target, "params": {"clr_dim": 8, "unitary_encoder_config": encoder}})
    arguments = run.model.config_args
    assert arguments["unet_class"] == target and "dropout" not in arguments["unet_args"]
    assert arguments["unet_args"]["unitary_encoder_config"]["model_features"] == [2, 32, 64]


def test_the_number_of_tokens_comes_from_the_data_whatever_is_written():
    run = run_of(model={"params": {"num_clrs": 99}})
    assert "num_clrs" not in run.model.config_args["unet_args"]
    assert any("model.params.num_clrs" in note for note in run.notes)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        (None, "constant"),
        ("OneCycleLR", "one_cycle"),
        ("one_cycle", "one_cycle"),
        ("CosineAnnealingLR", "cosine"),
        ("linear", "linear"),
    ],
)
def test_a_learning_rate_scheduler_becomes_a_schedule(name, schedule):
    assert run_of(training={"lr_scheduler": name}).datasets[0].schedule == schedule


def test_stages_become_phases_with_what_they_say_of_their_own():
    run = run_of(
        training={"num_epochs": 3, "learning_rate": 1e-3, "batch_size": 8},
        stages=[
            {"name": "easy", "balance_max": 10, "lr_scheduler": "OneCycleLR"},
            {"dataset": "hard", "num_epochs": 2, "learning_rate": 1e-4, "batch_size": 4},
        ],
    )
    first, second = run.datasets
    assert (first.name, first.epochs, first.lr, first.schedule) == ("easy", 3, 1e-3, "one_cycle")
    assert (second.name, second.epochs, second.lr, second.schedule) == ("stage_2", 2, 1e-4, "constant")
    assert [phase.dataloader_args["path"] for phase in run.datasets] == ["circuits", "hard"]
    assert [phase.dataloader_args["balance_max"] for phase in run.datasets] == [10, None]
    assert [run.batch_settings(phase).micro_batch_size for phase in run.datasets] == [8, 4]


def test_resume_true_is_the_newest_checkpoint():
    for given, expected in ((True, "latest"), (False, None), ("auto", "auto")):
        run = run_of(general={**GENERAL["general"], "resume": given})
        assert run.resume_from == expected


def test_a_run_and_its_model_go_below_the_output_path_under_their_names():
    run = run_of(general={**GENERAL["general"], "model_name": "m", "experiment_name": "my run"})
    assert run.export_to is not None
    assert (run.run_name, run.output_dir, run.export_to.folder) == ("my_run", "out/runs", "out/m")


def test_checkpoints_are_saved_where_and_as_often_as_is_said():
    run = run_of(training={"ckpt_path": "elsewhere", "ckpt_interval": 5})
    assert run.output_dir == "elsewhere" and run.datasets[0].save_every_epochs == 5


def test_only_a_ddim_scheduler_has_eta():
    run = run_of(scheduler={"type": "DDPMScheduler"})
    assert "eta" not in run.model.config_args["scheduler"]["params"]
    assert "has no effect with type: DDPMScheduler" in refused(
        scheduler={"type": "DDPMScheduler", "params": {"eta": 1.0}}
    )


def test_a_text_encoder_is_one_of_this_machine():
    text = {"params": {"local_weights_path": "clip.safetensors", "max_length": 20}}
    arguments = run_of(text_encoder=text).model.config_args
    assert arguments["text_encoder_path"] == "clip.safetensors"
    assert arguments["text_encoder"]["num_tokens"] == 20 and "prompt_tokens" not in arguments
    assert "local_weights_path: is required" in refused(text_encoder={"params": {}})


def test_wandb_is_a_tracker_where_it_is_enabled():
    run = run_of(training={"wandb": {"enable": True, "project": "atlas"}})
    assert [(t.name, t.args) for t in run.trackers] == [("csv", {}), ("wandb", {"project": "atlas"})]
    assert any(
        "training.wandb.project" in note for note in run_of(training={"wandb": {"project": "x"}}).notes
    )


# What is refused, by name


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"model": {"save_type": "pt"}},
            r"model\.save_type: 'pt': weights in torch's own format can run code",
        ),
        ({"training": {"cached_text_enc": False}}, r"cached_text_enc: false: each prompt is encoded once"),
        ({"training": {"output_path": "x"}}, r"training\.output_path: 'x': belongs under general"),
        ({"training": {"wandb": {"run_name": "x"}}}, r"wandb\.run_name: 'x': a run has one name everywhere"),
        ({"text_encoder": {"params": {"version": "laion2b"}}}, r"names weights that would be downloaded"),
        ({"text_encoder": {"params": {"njobs": 8}}}, r"njobs: 8: the few distinct prompts"),
        ({"text_encoder": {"params": {"cloob_weights_path": "x.pt"}}}, r"weights of CLOOB are not read"),
        ({"embedder": {}}, r"embedder: an empty section: the table that tokens are diffused in follows"),
        ({"dataset": {"store_dict": {}}}, r"said by its own config\.yaml"),
        ({"training": {"optimizer": "Adm"}}, r"training\.optimizer: got 'Adm'.*did you mean 'Adam'\?"),
        (
            {"training": {"loss": "CrossEntropyLoss"}},
            r"training\.loss: got 'CrossEntropyLoss'; allowed: MSELoss",
        ),
        ({"general": {}}, r"general\.dataset: is required"),
        ({"general": {"dataset": "x"}}, r"general\.output_path: is required"),
        ({"general": {"dataset": "x", "output_path": "y", "model_name": "a/b"}}, r"cannot name a folder"),
        ({"general": {"dataset": "x", "output_path": "y", "model_name": "runs"}}, r"cannot name a folder"),
        ({"model": {"params": {"num_heads": [1]}}}, r"\[1\] is for 1 levels, and model_features .* for 3"),
        ({"model": {"params": {"unitary_encoder_config": {}}}}, r"a network that is not told unitaries"),
        (
            {"model": {"type": "QC_Cond_UNet", "target": "genQC.models.unet_qc.QC_Cond_UNet"}},
            r"each name a network; keep one",
        ),
        (
            {"model": {"target": "my_module.MyNetwork"}},
            r"model\.target: got 'my_module.MyNetwork'; allowed: genQC",
        ),
        (
            {
                "model": {
                    "type": "QC_Compilation_UNet",
                    "params": {"unitary_encoder_config": {"model_features": [2, 4]}},
                }
            },
            r"is of genQC's encoder; ours has hidden_dim, patch_size and depth",
        ),
        (
            {
                "model": {
                    "target": "genQC.models.unet_qc.QC_Compilation_UNet",
                    "params": {"unitary_encoder_config": {"depth": 2}, "dropout": 0.1},
                }
            },
            r"(?s)dropout: is of our UNet.*is of our encoder; genQC's has",
        ),
        ({"training": {"one_cycle": {}}}, r"training\.one_cycle: has no effect with lr_scheduler: null"),
        (
            {"training": {"warmup_steps": 5, "lr_scheduler": "OneCycleLR"}},
            r"which rises over one_cycle\.pct_start",
        ),
        ({"training": {"min_lr_ratio": 0.1}}, r"without lr_scheduler: cosine or linear"),
        (
            {
                "training": {"one_cycle": {}, "lr_scheduler": "one_cycle"},
                "stages": [{"lr_scheduler": "cosine"}, {"lr_scheduler": "linear"}],
            },
            r"training\.one_cycle: has no effect with lr_scheduler: cosine, linear;",
        ),
        (
            {
                "training": {"warmup_steps": 5, "lr_scheduler": "cosine"},
                "stages": [{"lr_scheduler": "one_cycle"}],
            },
            r"which rises over one_cycle\.pct_start",
        ),
        (
            {"training": {"global_batch_size": 100, "batch_size": 64}},
            r"100 is not a multiple of batch_size 64",
        ),
        (
            {"training": {"global_batch_size": 64, "batch_size": 64}, "stages": [{}, {"batch_size": 48}]},
            r"global_batch_size: 64 is not a multiple of stages\.1\.batch_size 48",
        ),
        (
            {"general": {**GENERAL["general"], "resume": True, "init_from_pipeline_dir": "x"}},
            r"general\.init_from_pipeline_dir: contradicts resume: latest, which restores the weights too",
        ),
        (
            {"general": {**GENERAL["general"], "device": "cuda:0"}},
            r"general\.device: got 'cuda:0'; .*the launcher picks the device",
        ),
        (
            {"training": {"global_batch_size": 128, "batch_size": 64, "gradient_accumulation_steps": 2}},
            r"both set; keep one",
        ),
        (
            {"stages": [{"name": "a"}, {"name": "a"}]},
            r"stages\.1\.name: 'a' is the name of another stage too",
        ),
        ({"stages": [{}], "training": {"max_steps": 5}}, r"training\.max_steps: would end each stage"),
    ],
)
def test_what_cannot_act_is_refused_with_what_to_do(sections, message):
    assert re.search(message, refused(**sections))


def test_all_mistakes_are_told_at_once_with_their_places():
    with pytest.raises(ConfigError) as caught:
        load(
            "training.training.num_epochs=five",
            "training.model.save_type=pt",
            "training.general.dataset=null",
        )
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("3 mistakes") and len(lines) == 4
    assert all(line.strip().startswith("the command line: training.") for line in lines[1:])


# The classes


def test_every_field_has_a_description():
    for section in section_classes(CircuitsConfig):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_a_configuration_is_changed_in_python():
    config = load_circuits_config(CONFIG)
    config.training.num_epochs = 7
    config.scheduler.params.prediction_type = "v-type"
    run = circuits_run(config)
    assert run.datasets[0].epochs == 7
    assert run.model.config_args["scheduler"]["params"]["prediction_type"] == "v-type"
    with pytest.raises(ValidationError, match=r"training\.num_epochs: must be at least 1"):
        config.training.num_epochs = 0


def test_importing_the_configuration_imports_no_torch():
    code = "import sys, trainer.config.circuits_run; print({'torch', 'numpy'} & sys.modules.keys())"
    assert run_command(["python", "-c", code]).stdout.strip() == "set()"


def test_the_json_schema_on_disk_is_up_to_date():
    path = ROOT / "configs" / "schema" / "circuits_config.schema.json"
    command = (
        "python -c 'import json, trainer.config as c; print(json.dumps(c.json_schema(\"circuits\"), indent=2))' "
        "> configs/schema/circuits_config.schema.json"
    )
    assert json.loads(path.read_text()) == json_schema("circuits"), f"out of date; write it again: {command}"
