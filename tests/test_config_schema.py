import copy
import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from trainer.config import RunConfig, dump_yaml, json_schema, load_run_config
from trainer.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent

MINIMAL = {
    "run_name": "tiny",
    "model": {"model_class": "models.tiny.Tiny"},
    "datasets": [{"dataloader_factory": "data.tiny.make"}],
    "gradient_accumulation_steps": 1,
}


def changed(**updates):
    """Return the minimal configuration with values set by path; `__` stands for a dot."""
    raw = copy.deepcopy(MINIMAL)
    for path, value in updates.items():
        *parents, last = path.split("__")
        node = raw
        for part in parents:
            if isinstance(node, list):
                while len(node) <= int(part):
                    node.append({"dataloader_factory": "data.tiny.make"})
                node = node[int(part)]
            else:
                node = node.setdefault(part, {})
        node[last] = value
    return raw


def without(raw, *keys):
    return {key: value for key, value in raw.items() if key not in keys}


@pytest.fixture
def load(tmp_path):
    """Return a function that writes a configuration and loads it."""

    def write_and_load(raw, *overrides):
        path = tmp_path / "run.yml"
        path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
        return load_run_config(path, list(overrides))

    return write_and_load


def test_the_defaults_are_the_documented_ones(load):
    config = load(MINIMAL)
    phase = config.datasets[0]
    assert (config.output_dir, config.seed, config.device, config.precision) == (
        "checkpoints",
        42,
        "auto",
        None,
    )
    assert (config.max_grad_norm, config.max_nonfinite_steps, config.resume_from) == (1.0, 10, None)
    assert config.optimizer.optimizer_class == "torch.optim.AdamW"
    assert (phase.name, phase.epochs, phase.schedule, phase.warmup_steps) == ("phase_0", 1, "constant", 0)
    assert (phase.log_every_steps, phase.save_every_steps, phase.max_steps) == (10, 1000, None)
    assert (config.checkpoint.keep_last, config.checkpoint.keep_best, config.checkpoint.asynchronous) == (
        3,
        1,
        True,
    )
    assert [tracker.name for tracker in config.trackers] == ["csv"]
    assert (config.distributed_timeout_seconds, config.num_threads) == (1800, None)


def test_a_config_cannot_be_changed(load):
    with pytest.raises(ValidationError, match="frozen"):
        load(MINIMAL).seed = 3


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        ({"seed": "3"}, r"seed: expected a whole number, got '3' as text; remove the quotes"),
        ({"seed": True}, r"seed: expected a whole number, got true"),
        ({"seed": 1.5}, r"seed: expected a whole number, got 1.5"),
        ({"seed": -1}, r"seed: must be at least 0, got -1"),
        ({"datasets__0__lr": "fast"}, r"datasets\.0\.lr: expected a number or null, got 'fast'"),
        ({"datasets__0__lr": True}, r"datasets\.0\.lr: expected a number or null, got true"),
        ({"datasets__0__lr": -0.1}, r"datasets\.0\.lr: must be at least 0 or null, got -0.1"),
        ({"datasets__0__lr": float("inf")}, r"datasets\.0\.lr: expected a finite number or null, got inf"),
        ({"datasets__0__min_lr_ratio": 2.0}, r"min_lr_ratio: must be at most 1, got 2.0"),
        ({"datasets__0__epochs": -1}, r"datasets\.0\.epochs: must be at least 0, got -1"),
        ({"datasets__0__max_steps": 0}, r"datasets\.0\.max_steps: must be at least 1 or null, got 0"),
        ({"datasets__0__epoch": 3}, r"datasets\.0\.epoch: unknown key; did you mean 'epochs'\?"),
        ({"epochs": 3}, r"epochs: unknown key here; 'epochs' belongs under datasets\.N"),
        ({"checkpoint__keep": 3}, r"checkpoint\.keep: unknown key; did you mean 'keep_last'\?"),
        (
            {"model__zzz": 3},
            r"model\.zzz: unknown key; allowed: model_class, model_args, config_class, config_args",
        ),
        (
            {"precision": "bf61"},
            r"precision: got 'bf61'; allowed: bf16, fp16, fp32, fp8 or null; did you mean 'bf16'",
        ),
        (
            {"device": "cuda:1"},
            r"device: got 'cuda:1'; allowed: auto, cpu, cuda; the launcher picks the device",
        ),
        ({"datasets__0__schedule": "cos"}, r"schedule: got 'cos'; allowed: constant, linear, cosine"),
        ({"run_name": "a/b"}, r"run_name: 'a/b' cannot name a run folder"),
        ({"run_name": ".."}, r"run_name: '\.\.' cannot name a run folder"),
        ({"run_name": 2024}, r"run_name: expected text, got 2024; put it in quotes"),
        ({"output_dir": ""}, r"output_dir: must not be empty"),
        ({"datasets": []}, r"datasets: expected a list with at least one entry"),
        ({"datasets": {"a": 1}}, r"datasets: expected a list, got a section"),
        ({"datasets": ["a.b"]}, r"datasets\.0: expected a section of keys, got 'a\.b'"),
        ({"model": "a.b"}, r"model: expected a section of keys, got 'a\.b'"),
        ({"model__model_class": "AdamW"}, r"model\.model_class: 'AdamW' is not a dotted path"),
        ({"model__model_class": "a.b:"}, r"model\.model_class: 'a\.b:' is not a dotted path"),
        (
            {"model__model_class": "a/b.py:C"},
            r"is not a dotted path; write package\.module\.name or package\.module:name",
        ),
        ({"model__model_args": [1]}, r"model\.model_args: expected a section of keys, got a list of 1"),
        ({"datasets__0__freeze": ["("]}, r"datasets\.0\.freeze\.0: '\(' is not a regular expression"),
        (
            {"datasets__0__freeze": "embed"},
            r"datasets\.0\.freeze: expected a list, got 'embed'; write \[embed\]",
        ),
        (
            {"trackers": ["cvs"]},
            r"trackers\.0\.name: got 'cvs'; allowed: csv, tensorboard, wandb; did you mean 'csv'",
        ),
        ({"max_grad_norm": 0}, r"max_grad_norm: must be more than 0 or null, got 0"),
        (
            {"checkpoint__asynchronous": "yes please"},
            r"asynchronous: expected true or false, got 'yes please'",
        ),
        (
            {"fp8__recipe": "delayed", "precision": "fp8"},
            r"fp8\.recipe: got 'delayed'; allowed: current_scaling, delayed_scaling, block_scaling, mxfp8",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_path_and_what_is_allowed(load, updates, message):
    with pytest.raises(ConfigError, match=message):
        load(changed(**updates))


@pytest.mark.parametrize("key", ["run_name", "model", "datasets"])
def test_a_missing_key_is_named(load, key):
    with pytest.raises(ConfigError, match=key):
        load(without(MINIMAL, key))


def test_whole_numbers_may_be_written_with_an_exponent(load):
    config = load(
        "run_name: a\nmodel: {model_class: a.b}\nglobal_batch_size: 1_024\n"
        "datasets: [{dataloader_factory: a.b, max_steps: 1e5, lr: 1e-4}]\n"
    )
    assert config.datasets[0].max_steps == 100_000 and isinstance(config.datasets[0].max_steps, int)
    assert config.datasets[0].lr == 1e-4
    assert config.global_batch_size == 1024


def test_sections_with_nothing_under_them_are_the_defaults(load):
    text = yaml.safe_dump(MINIMAL) + "optimizer:\ncheckpoint:\n"
    config = load(
        text.replace("model_class: models.tiny.Tiny", "model_class: models.tiny.Tiny\n  model_args:")
    )
    assert config.model.model_args == {} and config.checkpoint.keep_last == 3


# Rules between fields


@pytest.mark.parametrize(
    ("updates", "message"),
    [
        (
            {"precision": "bf16", "amp_dtype": "fp16"},
            r"amp_dtype: 'fp16' contradicts precision: bf16; keep one",
        ),
        ({"precision": "bf16", "fp8__backend": "emulate"}, r"fp8: has no effect with precision: bf16"),
        ({"resume_from": "latest", "init_from": "x"}, r"init_from: contradicts resume_from: latest"),
        ({"resume_from": "runs/a", "init_from": "x"}, r"init_from: contradicts resume_from: runs/a"),
        ({"model__config_args": {"a": 1}}, r"model\.config_args: set without config_class"),
        ({"optimizer__scheduler_args": {"a": 1}}, r"optimizer\.scheduler_args: set without scheduler_class"),
        (
            {"optimizer__scheduler_class": "a.b", "datasets__0__warmup_steps": 5},
            r"datasets\.0\.warmup_steps: set together with optimizer\.scheduler_class",
        ),
        (
            {"optimizer__scheduler_class": "a.b", "datasets__0__schedule": "linear"},
            r"datasets\.0\.schedule: set together with optimizer\.scheduler_class",
        ),
        (
            {"datasets__0__min_lr_ratio": 0.1},
            r"datasets\.0\.min_lr_ratio: has no effect with schedule: constant",
        ),
        (
            {"datasets__0__lr": 1.0, "datasets__0__muon_lr": 1.0},
            r"datasets\.0\.lr: set together with muon_lr;",
        ),
        (
            {"datasets__0__lr": 1.0, "datasets__0__muon_lr": 1.0, "datasets__0__adam_lr": 1.0},
            r"datasets\.0\.lr: set together with muon_lr and adam_lr",
        ),
        (
            {"datasets__0__group_lrs": {"head": 1.0}},
            r"group_lrs\.head: no such parameter group; optimizer\.groups is empty",
        ),
        (
            {
                "datasets__0__group_lrs": {"heads": 1.0},
                "optimizer__groups": [{"name": "head", "match": ["head"]}],
            },
            r"group_lrs\.heads: no such parameter group; did you mean 'head'",
        ),
        (
            {"optimizer__groups": [{"name": "a", "match": ["x"]}, {"name": "a", "match": ["y"]}]},
            r"optimizer\.groups\.1\.name: 'a' is the name of optimizer\.groups\.0 too",
        ),
        (
            {"optimizer__groups": [{"name": "default", "match": ["x"]}]},
            r"optimizer\.groups\.0\.name: 'default' names",
        ),
        (
            {"optimizer__groups": [{"name": "a", "match": []}]},
            r"optimizer\.groups\.0\.match: expected a list with at least",
        ),
        (
            {"datasets__0__name": "a", "datasets__1__name": "a"},
            r"datasets\.1\.name: 'a' is the name of datasets\.0 too; names must differ",
        ),
        (
            {"datasets__0__name": "phase_1", "datasets__1__epochs": 1},
            r"datasets\.1\.name: 'phase_1' is the name of datasets\.0",
        ),
        (
            {"global_batch_size": 8},
            r"global_batch_size: 8 and gradient_accumulation_steps 1 are both set; keep one",
        ),
        (
            {"datasets__0__global_batch_size": 8, "datasets__0__gradient_accumulation_steps": 2},
            r"datasets\.0\.global_batch_size: 8 and datasets\.0\.gradient_accumulation_steps 2 are both set",
        ),
        (
            {"datasets__0__global_batch_size": 96, "micro_batch_size": 10},
            r"datasets\.0\.global_batch_size: global batch 96 is not a multiple of micro-batch 10",
        ),
        ({"trackers": ["csv", {"name": "csv"}]}, r"trackers\.1: 'csv' is listed twice"),
        ({"use_wandb": False, "trackers": ["wandb"]}, r"use_wandb: false contradicts the wandb entry"),
        (
            {"wandb_project": "a", "trackers": [{"name": "wandb", "project": "b"}]},
            r"wandb_project: differs from the project",
        ),
        ({"wandb_project": "a"}, r"wandb_project: set, but nothing goes to wandb"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(load, updates, message):
    with pytest.raises(ConfigError, match=message):
        load(changed(**updates))


def test_without_batch_settings_every_micro_batch_is_a_step(load):
    config = load(without(changed(), "gradient_accumulation_steps"))
    plan = config.batch_plan(0, world_size=2, micro_batch_size=4)
    assert (plan.accumulation, plan.global_batch_size) == (1, 8)


def test_auto_resume_may_take_initial_weights(load):
    config = load(changed(resume_from="auto", init_from="weights.safetensors"))
    assert config.init_from == "weights.safetensors"


def test_a_run_with_two_kinds_of_group_rates_is_accepted(load):
    config = load(
        changed(
            optimizer__groups=[{"name": "head", "match": ["^head"], "args": {"weight_decay": 0.0}}],
            datasets__0__lr=1e-3,
            datasets__0__group_lrs={"head": 1e-2, "default": 1e-4},
        )
    )
    assert config.datasets[0].group_lrs == {"head": 1e-2, "default": 1e-4}


def test_group_rates_of_an_optimizer_factory_are_left_to_it(load):
    config = load(
        changed(optimizer__optimizer_class="mine.muon", datasets__0__group_lrs={"embeddings": 1e-2})
    )
    assert config.datasets[0].group_lrs == {"embeddings": 1e-2}


def test_a_config_built_in_python_obeys_the_rules_between_fields_too():
    with pytest.raises(ValidationError, match="set without config_class"):
        RunConfig.model_validate(changed(model__config_args={"a": 1}))


# Accepted spellings


@pytest.mark.parametrize(
    ("spelled", "precision"),
    [("bf16", "bf16"), ("bfloat16", "bf16"), ("float16", "fp16"), ("float32", "fp32"), ("fp8", "fp8")],
)
def test_amp_dtype_is_a_spelling_of_precision(load, spelled, precision):
    config = load(changed(amp_dtype=spelled))
    assert (config.precision, config.amp_dtype) == (precision, None)


def test_amp_dtype_equal_to_precision_is_accepted(load):
    assert load(changed(amp_dtype="bfloat16", precision="bf16")).precision == "bf16"


def test_fp8_settings_have_defaults(load):
    fp8 = load(changed(precision="fp8")).fp8
    assert fp8 is not None and (fp8.recipe, fp8.backend, fp8.exclude_layers) == ("current_scaling", "te", ())


def test_use_wandb_adds_the_tracker_with_its_project(load):
    config = load(changed(use_wandb=True, wandb_project="cells"))
    assert [(t.name, t.args) for t in config.trackers] == [("csv", {}), ("wandb", {"project": "cells"})]


def test_use_wandb_and_a_wandb_tracker_are_one_tracker(load):
    config = load(
        changed(use_wandb=True, trackers=[{"name": "wandb", "mode": "offline"}], wandb_project="cells")
    )
    assert [(t.name, t.args) for t in config.trackers] == [("wandb", {"mode": "offline", "project": "cells"})]


def test_use_wandb_false_keeps_a_project_quiet(load):
    assert [t.name for t in load(changed(use_wandb=False, wandb_project="cells")).trackers] == ["csv"]


def test_no_trackers_at_all_is_a_choice(load):
    assert load(changed(trackers=[])).trackers == ()


# Batch arithmetic


def test_the_global_batch_gives_the_accumulation(load):
    config = load(without(changed(global_batch_size=96, micro_batch_size=8), "gradient_accumulation_steps"))
    plan = config.batch_plan(config.datasets[0], world_size=4)
    assert (plan.micro_batch_size, plan.accumulation, plan.world_size, plan.global_batch_size) == (
        8,
        3,
        4,
        96,
    )


def test_the_accumulation_gives_the_global_batch(load):
    config = load(changed(gradient_accumulation_steps=3))
    assert config.batch_plan(0, world_size=2, micro_batch_size=5).global_batch_size == 30


def test_a_phase_replaces_the_pair_of_the_run(load):
    config = load(
        changed(datasets__1__global_batch_size=24, datasets__1__micro_batch_size=4, micro_batch_size=8)
    )
    assert config.batch_plan(config.datasets[0], 1).global_batch_size == 8
    assert config.batch_plan(config.datasets[1], 2).accumulation == 3


def test_a_global_batch_that_ranks_do_not_divide_is_refused_with_its_numbers(load):
    config = load(without(changed(global_batch_size=96, micro_batch_size=8), "gradient_accumulation_steps"))
    message = (
        r"global batch 96 is not a multiple of micro-batch 8 x 10 ranks = 80; "
        r"set datasets\.0\.global_batch_size or micro_batch_size"
    )
    with pytest.raises(ConfigError, match=message):
        config.batch_plan(config.datasets[0], 10, 8)


def test_an_unknown_micro_batch_is_refused(load):
    with pytest.raises(ConfigError, match=r"datasets\.0: the micro-batch is not known; set micro_batch_size"):
        load(MINIMAL).batch_plan(0, 1)


# All at once


def test_all_mistakes_are_told_together(load):
    raw = changed(
        seed="x",
        precison="bf16",
        model__config_args={"a": 1},
        datasets__0__epochs=True,
        datasets__0__lr=1.0,
        datasets__0__adam_lr=1.0,
        init_from="x",
        resume_from="latest",
    )
    raw["datasets"].append({"epochs": 3})
    with pytest.raises(ConfigError) as error:
        load(raw, "datasets.7.lr=1", "max_grad_norm=${oc.env:CELLPHASE_TEST_UNSET}", "output_dir=???")
    message = str(error.value)
    for expected in (
        "10 mistakes",
        "datasets.7.lr: index 7 is out of range: datasets has 2 entries",
        "max_grad_norm: the environment variable CELLPHASE_TEST_UNSET is not set; set it, or write "
        "${oc.env:CELLPHASE_TEST_UNSET,DEFAULT}",
        "output_dir: the file says ???",
        "seed: expected a whole number",
        "precison: unknown key; did you mean 'precision'?",
        "datasets.0.epochs: expected a whole number, got true",
        "datasets.1.dataloader_factory: is required: Dotted path",
        "model.config_args: set without config_class",
        "datasets.0.lr: set together with adam_lr",
        "init_from: contradicts resume_from: latest",
    ):
        assert expected in message


def test_a_wrong_value_hides_the_rules_that_rest_on_it_and_no_others(load):
    raw = changed(resume_from=3, init_from="x", model__config_args={"a": 1})
    with pytest.raises(ConfigError) as error:
        load(raw)
    assert "resume_from: expected text or null, got 3" in str(error.value)
    assert "init_from" not in str(error.value)
    assert "model.config_args: set without config_class" in str(error.value)


@pytest.mark.parametrize(
    "broken",
    [
        {"model": None},
        {"datasets": [None, 3]},
        {"datasets": 3},
        {"trackers": [3, {}]},
        {"trackers": None},
        {"optimizer": {"groups": [{}]}},
        {"optimizer": 3},
        {"loss": {}},
        {"fp8": 3},
        {"datasets": [{"validation": {}}]},
        {"datasets": [{"group_lrs": {"a": "b"}}]},
        {"datasets": [{"freeze": [3, "("]}]},
        {"checkpoint": [1]},
    ],
)
def test_however_broken_a_value_is_the_other_mistakes_are_told_too(load, broken):
    raw = {**changed(model__config_args={"a": 1}), **broken}
    if "model" in broken:
        raw["optimizer"] = {"scheduler_args": {"a": 1}}
    with pytest.raises(ConfigError, match=r"set without (config|scheduler)_class"):
        load(raw)


# Written out


def rich_config(load):
    args = {
        "text_like_a_number": "1e-4",
        "text_like_a_date": "2020-01-01",
        "text_like_a_truth": "no",
        "empty": "",
        "octal": "010",
        "number": 1e-5,
        "big": 1e30,
        "nested": [1, {"a": None, "b": [True, 2.0]}],
        "infinite": float("inf"),
        "lines": "a\n  b: c\n",
        "path": r"C:\x\${y}\\${z}",
        "unicode": "α-β",
        "spaces": " a ",
        "key: odd": "# b",
    }
    raw = changed(
        use_wandb=True,
        amp_dtype="float16",
        datasets__0__freeze=[r"^head\.", "x"],
        datasets__1__validation={"dataloader_factory": "a.b:C"},
    )
    config = load(raw)
    model = config.model.model_copy(update={"model_args": args})
    return config.model_copy(update={"model": model})


def test_the_written_configuration_reads_back_equal(load):
    config = rich_config(load)
    text = dump_yaml(config)
    again = load(text)
    assert again == config
    assert dump_yaml(again) == text


def test_the_written_configuration_means_the_same_to_another_reader_of_yaml(load):
    text = dump_yaml(rich_config(load))
    args = yaml.safe_load(text)["model"]["model_args"]
    assert args["octal"] == "010" and args["text_like_a_date"] == "2020-01-01" and args["number"] == 1e-5


def test_another_spelling_is_not_written_out(load):
    text = dump_yaml(load(changed(amp_dtype="bf16", use_wandb=True)))
    assert "amp_dtype" not in text and "use_wandb" not in text


# Schema for editors


def test_the_json_schema_on_disk_is_up_to_date():
    path = ROOT / "configs" / "schema" / "run_config.schema.json"
    command = (
        "python -c 'import json, trainer.config as c; print(json.dumps(c.json_schema(), indent=2))' "
        "> configs/schema/run_config.schema.json"
    )
    assert json.loads(path.read_text()) == json_schema(), f"out of date; write it again: {command}"


def test_the_json_schema_knows_ranges_choices_and_defaults_lists():
    schema = json_schema()
    phase = schema["$defs"]["PhaseConfig"]["properties"]
    assert phase["epochs"]["anyOf"][0] == {"minimum": 0, "type": "integer"}
    assert {"type": "string", "pattern": r"\$\{"} in phase["epochs"]["anyOf"]
    assert {"defaults", "hydra", "amp_dtype", "use_wandb"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False
