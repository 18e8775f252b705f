import functools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import toy as toy_module
from accelerate.commands.launch import launch_command, launch_command_parser
from launching import CPU_CONFIGS, ROOT, launch_ranks, run_command, with_forked_ranks
from running import (
    comparable_records,
    copy_until,
    losses,
    newest_run,
    records,
    strategy_environment,
    toy,
    train,
    train_ranks,
    write_config,
)

from trainer.checkpoint_folder import open_checkpoint
from trainer.errors import CheckpointError, ConfigError
from trainer.shards import full_weights, open_tensors
from trainer.zero import check_elementwise
from trainer.zero_config import check_given, complete_config

CELLS = {"dataloader_args": {"batch_size": 2}}
CONFIG = toy(
    {"epochs": 2, "save_every_steps": 1, "schedule": "cosine", **CELLS},
    {"lr": 0.003, "global_batch_size": 12, "freeze": ["^embedding"], "reinitialise": ["^head"], **CELLS},
    micro_batch_size=2,
    ema={"decay": 0.8},
    optimizer={
        "optimizer_args": {"lr": 0.01, "weight_decay": 0.3},
        "groups": [{"name": "head", "match": ["head"], "args": {"weight_decay": 0.0}}],
    },
)
STAGES = ("zero1", "zero2", "zero3")
LAST_OF_FIRST_PHASE = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the run folder of a run that was not interrupted, by strategy and number of ranks."""

    @functools.cache
    def run(strategy, num_ranks=2):
        folder = tmp_path_factory.mktemp(f"{strategy}_{num_ranks}")
        train_ranks(num_ranks, folder, CONFIG, strategy=strategy)
        return newest_run(folder)

    return run


def state_of(run_folder, step):
    """Return every tensor of weights and optimizer state by name, and the groups' settings."""
    saved = open_checkpoint(run_folder / f"checkpoint_{step}")
    tensors, state = open_tensors(saved), saved.shared("run_state.safetensors")
    found = dict(full_weights(saved, averaged=False))
    for name in (name for group in state["group_names"] for name in group):
        found |= {f"{name}/{k}": torch.as_tensor(v) for k, v in tensors.optimizer_state(name).items()}
    return found, state["groups"]


def assert_close(first, second):
    assert first.keys() == second.keys()
    assert any(name.endswith("/step") for name in first) and any(name.endswith("/exp_avg") for name in first)
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("strategy", STAGES)
def test_a_stage_trains_as_ddp_does(finished, strategy):
    ddp, zero = finished("ddp"), finished(strategy)
    for kind in ("train", "validation"):
        assert losses(zero, kind) == pytest.approx(losses(ddp, kind), abs=1e-5)
    norms = [[record["grad_norm"] for record in records(folder)] for folder in (ddp, zero)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    last = len(losses(ddp))
    (of_ddp, groups), (of_zero, same) = state_of(ddp, last), state_of(zero, last)
    assert_close(of_ddp, of_zero)
    assert groups == same


@pytest.mark.parametrize("strategy", ("ddp", *STAGES))
def test_a_phase_holds_frozen_weights_still_and_starts_others_anew(finished, strategy):
    folder = finished(strategy)
    before, after = (state_of(folder, step)[0] for step in (LAST_OF_FIRST_PHASE, len(losses(folder))))
    assert torch.equal(before["embedding.weight"], after["embedding.weight"])
    assert torch.equal(before["model.embedding.weight/exp_avg"], after["model.embedding.weight/exp_avg"])
    assert not torch.equal(before["body.0.weight"], after["body.0.weight"])
    steps = {name: int(after[f"model.{name}.weight/step"]) for name in ("embedding", "body.0", "head")}
    assert steps == {"embedding": 4, "body.0": 8, "head": 4}


@pytest.mark.parametrize("strategy", STAGES)
def test_a_resumed_run_equals_one_that_was_not_interrupted(finished, strategy, tmp_path):
    whole = finished(strategy)
    folder = copy_until(whole, 3, tmp_path)
    train_ranks(2, tmp_path, CONFIG, strategy=strategy, resume_from="latest")
    assert comparable_records(folder) == comparable_records(whole)
    first, second = (state_of(run, len(losses(whole)))[0] for run in (whole, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("source", "before", "strategy", "after"),
    [
        ("ddp", 2, "ddp", 3),
        ("zero1", 2, "zero1", 1),
        ("zero2", 2, "zero2", 3),
        ("zero3", 2, "zero3", 3),
        pytest.param("zero3", 3, "zero3", 2, marks=pytest.mark.slow),
        ("zero3", 2, "ddp", 1),
        ("ddp", 2, "zero2", 2),
    ],
)
def test_a_run_goes_on_on_another_number_of_ranks_or_strategy(
    finished, source, before, strategy, after, tmp_path
):
    whole = finished(source, before)
    folder = copy_until(whole, 3, tmp_path)
    output = train_ranks(after, tmp_path, CONFIG, strategy=strategy, resume_from="latest")
    if before != after:
        assert f"saved by {before} ranks, resumed on {after}" in output
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    rates = [[record["lr"] for record in records(run)] for run in (whole, folder)]
    assert rates[0] == rates[1]
    for step in (4, len(losses(whole))):
        (first, groups), (second, same) = state_of(whole, step), state_of(folder, step)
        assert_close(first, second)
        assert groups == same


def test_a_global_batch_that_does_not_divide_is_an_error_with_the_numbers(finished, tmp_path):
    copy_until(finished("zero2"), 3, tmp_path)
    config = {**CONFIG, "micro_batch_size": 4}
    config["datasets"] = [{**phase, "dataloader_args": {"batch_size": 4}} for phase in CONFIG["datasets"]]
    output = train_ranks(
        3, tmp_path, config, strategy="zero2", resume_from="latest", expect=2, global_batch_size=20
    )
    assert "global batch 20 is not a multiple of micro-batch 4 x 3 ranks = 12" in output


@pytest.mark.parametrize("strategy", STAGES)
def test_bf16_keeps_fp32_weights_and_holds_frozen_ones_still(tmp_path, strategy):
    train_ranks(2, tmp_path, CONFIG, strategy=strategy, precision="bf16")
    folder = newest_run(tmp_path)
    before, after = (state_of(folder, step)[0] for step in (LAST_OF_FIRST_PHASE, len(losses(folder))))
    assert after["body.0.weight"].dtype == torch.float32
    assert not torch.equal(after["body.0.weight"], after["body.0.weight"].bfloat16().float())
    assert torch.equal(before["embedding.weight"], after["embedding.weight"])
    assert losses(folder)[3] < losses(folder)[0]


@pytest.mark.parametrize("strategy", ("zero2", "zero3"))
def test_weights_that_never_train_and_a_users_scheduler_are_saved_too(tmp_path, strategy):
    changes = {"freeze": ["^embedding", "^body"], "reinitialise": [], "schedule": "constant"}
    phases = [{**phase, **changes} for phase in CONFIG["datasets"]]
    scheduler = {"scheduler_class": "torch.optim.lr_scheduler.StepLR", "scheduler_args": {"step_size": 2}}
    config = {**CONFIG, "datasets": phases, "optimizer": {**CONFIG["optimizer"], **scheduler}}
    runs = {}
    for of in ("ddp", strategy):
        train_ranks(2, tmp_path / of, config, strategy=of)
        runs[of] = newest_run(tmp_path / of)
    folder = copy_until(runs[strategy], 3, tmp_path / "resumed")
    train_ranks(1, tmp_path / "resumed", config, strategy=strategy, resume_from="latest")
    for run in (runs[strategy], folder):
        assert losses(run) == pytest.approx(losses(runs["ddp"]), abs=1e-5)
        assert [r["lr"] for r in records(run)] == [r["lr"] for r in records(runs["ddp"])]
        assert_close(state_of(run, len(losses(run)))[0], state_of(runs["ddp"], len(losses(run)))[0])


LOSS = {**CONFIG, "loss": {"loss_class": "toy.LearnedScale"}}


def loss_of(run_folder, step):
    """Return the whole entries of the loss's state dict, and the moments of its trained weights."""
    tensors = open_tensors(open_checkpoint(run_folder / f"checkpoint_{step}"))
    moments = tensors.optimizer_state("loss.scale")
    return {name: tensors.loss_entry(name) for name in tensors.loss_shapes()} | moments


@pytest.fixture(scope="module")
def finished_with_loss(tmp_path_factory):
    """Return the run folder of a run whose loss has weights of its own, by strategy."""

    @functools.cache
    def run(strategy):
        folder = tmp_path_factory.mktemp(f"loss_{strategy}")
        train_ranks(2, folder, LOSS, strategy=strategy)
        return newest_run(folder)

    return run


@pytest.mark.parametrize(
    ("source", "strategy", "after"),
    [
        ("zero3", "zero3", 2),
        ("zero2", "zero3", 1),
        ("ddp", "zero3", 2),
        ("zero3", "ddp", 3),
        ("zero3", "zero2", 2),
    ],
)
def test_a_loss_with_weights_goes_on_under_every_strategy(
    finished_with_loss, source, strategy, after, tmp_path
):
    whole = finished_with_loss(source)
    folder = copy_until(whole, 3, tmp_path)
    train_ranks(after, tmp_path, LOSS, strategy=strategy, resume_from="latest")
    last = len(losses(whole))
    first, second = loss_of(whole, last), loss_of(folder, last)
    assert set(first) >= {"scale", "offset", "passes", "exp_avg"} and first["scale"].shape == (3,)
    assert not torch.equal(first["scale"], torch.tensor([1.0, 2.0, 3.0]))
    if after != 2:  # each rank counts its own passes
        del first["passes"], second["passes"]
    if (source, 2) == (strategy, after):
        assert comparable_records(folder) == comparable_records(whole)
    assert losses(folder) == pytest.approx(losses(whole), abs=1e-5)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            torch.as_tensor(value), torch.as_tensor(second[name]), rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
def test_running_statistics_are_those_of_ddp_and_resume_exactly(tmp_path):
    config = toy({"epochs": 3, "save_every_steps": 1, "lr": 0.03, **CELLS}, micro_batch_size=2)
    config |= {"global_batch_size": 12, "model": {"model_class": "toy.WithStatistics", "model_args": {}}}
    runs = {}
    for strategy in ("ddp", "zero2", "zero3"):
        train_ranks(2, tmp_path / strategy, config, strategy=strategy)
        whole = runs[strategy] = newest_run(tmp_path / strategy)
        folder = copy_until(whole, 3, tmp_path / f"{strategy}_cut")
        train_ranks(2, tmp_path / f"{strategy}_cut", config, strategy=strategy, resume_from="latest")
        assert comparable_records(folder) == comparable_records(whole)
    last = len(losses(runs["ddp"]))
    of_ddp = full_weights(open_checkpoint(runs["ddp"] / f"checkpoint_{last}"))
    assert of_ddp["level"] > 0 and of_ddp["norm.running_var"].std() > 0
    for strategy in ("zero2", "zero3"):
        for kind in ("train", "validation"):
            assert losses(runs[strategy], kind) == pytest.approx(losses(runs["ddp"], kind), abs=1e-5)
        found = full_weights(open_checkpoint(runs[strategy] / f"checkpoint_{last}"))
        for name in ("level", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
            torch.testing.assert_close(found[name], of_ddp[name], rtol=1e-3, atol=1e-4)


def test_dropout_continues_exactly_under_zero_3(tmp_path):
    model = {"model_class": "toy.ToyModel", "config_class": "toy.ToyConfig", "config_args": {"dropout": 0.3}}
    config = {**CONFIG, "model": model}
    train_ranks(2, tmp_path / "whole", config, strategy="zero3")
    whole = newest_run(tmp_path / "whole")
    folder = copy_until(whole, 5, tmp_path / "cut")
    train_ranks(2, tmp_path / "cut", config, strategy="zero3", resume_from="latest")
    assert comparable_records(folder) == comparable_records(whole)


def test_offloading_trains_as_ddp_does(finished, tmp_path):
    train_ranks(2, tmp_path, CONFIG, strategy="zero3_offload")
    assert losses(newest_run(tmp_path)) == pytest.approx(losses(finished("ddp")), abs=1e-5)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_is_a_skipped_step_on_all_ranks(tmp_path):
    config = toy({"epochs": 3, **CELLS}, micro_batch_size=2, max_nonfinite_steps=50)
    config["model"] = {"model_class": "toy.SometimesInfinite", "model_args": {}}
    skipped = {}
    for strategy in ("ddp", "zero1", "zero2", "zero3"):
        train_ranks(2, tmp_path / strategy, config, strategy=strategy)
        skipped[strategy] = [record["is_skipped"] for record in records(newest_run(tmp_path / strategy))]
    assert skipped["ddp"] == [False, True] * 3
    assert all(of_stage == skipped["ddp"] for of_stage in skipped.values())


def test_a_loss_that_does_not_fit_the_checkpoints_is_refused_by_name(tmp_path):
    config = toy({"epochs": 2}, loss={"loss_class": "toy.LearnedScale"})
    train(tmp_path, config)
    config["loss"] = {"loss_class": "toy.LearnedScale", "loss_args": {"num_offsets": 3}}
    with pytest.raises(CheckpointError, match=r"loss.loss_class.*offset is \[2\] there and \[3\] here"):
        train(tmp_path, config, resume_from="latest")


def test_arguments_of_a_loss_act_on_a_resumed_run_or_are_refused(tmp_path):
    config = toy({"epochs": 2}, loss={"loss_class": "toy.LearnedScale"})
    whole = losses(train(tmp_path / "whole", config))
    copy_until(newest_run(tmp_path / "whole"), 2, tmp_path)
    config["loss"]["loss_args"] = {"level": 5.0}
    with pytest.raises(CheckpointError, match="loss_args have changed.*buffers level; .*would not act"):
        train(tmp_path, config, resume_from="latest")
    config["loss"]["loss_args"] = {"power": 4}
    changed = losses(train(tmp_path, config, resume_from="latest"))
    assert changed[:2] == whole[:2] and changed[2] != whole[2]


def test_a_loss_whose_class_has_moved_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_module, "MovedScale", toy_module.LearnedScale, raising=False)
    config = toy({"epochs": 2}, loss={"loss_class": "toy.MovedScale"})
    whole = losses(train(tmp_path / "whole", config))
    copy_until(newest_run(tmp_path / "whole"), 2, tmp_path)
    monkeypatch.undo()
    config["loss"]["loss_class"] = "toy.LearnedScale"
    assert losses(train(tmp_path, config, resume_from="latest")) == whole
    shutil.rmtree(tmp_path / "runs")
    copy_until(newest_run(tmp_path / "whole"), 2, tmp_path)
    config["loss"]["loss_args"] = {"level": 5.0}
    with pytest.raises(CheckpointError, match="loss_args have changed"):
        train(tmp_path, config, resume_from="latest")


def test_a_pickle_in_the_place_of_a_shard_is_refused_and_not_run(finished, tmp_path):
    folder = copy_until(finished("zero2"), 3, tmp_path) / "checkpoint_3"
    witness = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return (Path.touch, (witness,))

    shard = folder / "shard.rank00001.safetensors"
    torch.save({"weight": Hostile()}, shard)
    with pytest.raises(CheckpointError, match="shard.rank00001.safetensors"):
        open_checkpoint(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    unverified = type(open_checkpoint(finished("zero2") / "checkpoint_3"))(folder, manifest)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        full_weights(unverified)
    assert not witness.exists()


def test_a_shard_that_lacks_a_stretch_is_named(finished, tmp_path):
    folder = copy_until(finished("zero2"), 3, tmp_path) / "checkpoint_3"
    saved = open_checkpoint(folder)
    short = type(saved)(folder, {**saved.manifest, "world_size": 1})
    with pytest.raises(CheckpointError, match="shards lack .* values of model"):
        full_weights(short)


@pytest.mark.parametrize("optimizer", ["torch.optim.Muon", "toy.NormalisedMatrices"])
def test_an_optimizer_of_whole_matrices_is_refused_with_the_reason(tmp_path, optimizer):
    config = toy(
        model={"model_class": "toy.OneMatrix", "model_args": {}}, optimizer={"optimizer_class": optimizer}
    )
    output = train_ranks(2, tmp_path, config, strategy="zero2", expect=2)
    assert "ZeRO divides parameters into stretches" in output and "use DDP" in output


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "SGD", "RMSprop", "NAdam", "RAdam", "Adamax"])
def test_optimizers_that_treat_every_value_alone_pass(kind):
    optimizer = getattr(torch.optim, kind)([torch.nn.Parameter(torch.ones(3, 2))], lr=0.1)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    check_elementwise(optimizer)
    assert torch.equal(optimizer.param_groups[0]["params"][0], before) and not optimizer.state


@pytest.mark.parametrize("start", ["torch_nn_init", "in_place"])
def test_a_model_that_starts_its_modules_weights_itself_is_the_same_in_shards(tmp_path, start):
    config = toy({"lr": 0.0, **CELLS}, micro_batch_size=2)
    config["model"] = {"model_class": "toy.StartsItself", "model_args": {"start": start}}
    weights = {}
    for strategy in ("ddp", "zero3"):
        train_ranks(2, tmp_path / strategy, config, strategy=strategy)
        weights[strategy] = full_weights(open_checkpoint(newest_run(tmp_path / strategy) / "checkpoint_2"))
    for name, value in weights["ddp"].items():
        assert torch.equal(value, weights["zero3"][name]), name


def test_initial_weights_that_would_be_lost_are_an_error(tmp_path):
    config = toy(model={"model_class": "toy.StartsItself", "model_args": {"start": "data"}})
    assert "divided over the ranks" in train_ranks(2, tmp_path, config, strategy="zero3", expect=2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "zero_optimization.stage must be 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, "use DDP for none"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {}}, "set the run's `optimizer` instead"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "none and cpu are supported",
        ),
    ],
)
def test_a_deepspeed_configuration_that_cannot_be_carried_out_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        check_given(given, "ds.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient_clipping": 0.5}, "gradient_clipping to 0.5, but the run's max_grad_norm makes it 1.0"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps to 4"),
        ({"train_micro_batch_size_per_gpu": 3}, "micro_batch_size makes it 2"),
        ({"bf16": {"enabled": True}}, "bf16.enabled to True, but the run's precision"),
    ],
)
def test_a_value_that_contradicts_the_run_is_an_error(given, message):
    from trainer.config.schema import BatchPlan, RunConfig

    config = RunConfig.model_validate({k: v for k, v in CONFIG.items() if k != "checkpoint"})
    settings = {"zero_optimization": {"stage": 2}, **given}
    with pytest.raises(ConfigError, match=message):
        complete_config(settings, given, config, [BatchPlan(2, 6, 2, 24)], "no")


def test_auto_and_equal_values_are_accepted():
    from trainer.config.schema import BatchPlan, RunConfig

    config = RunConfig.model_validate({k: v for k, v in CONFIG.items() if k != "checkpoint"})
    given = {"gradient_clipping": 1.0, "train_batch_size": "auto"}
    settings = {"zero_optimization": {"stage": 2}, **given}
    complete_config(settings, given, config, [BatchPlan(2, 6, 2, 24)], "bf16")
    assert settings["bf16"]["enabled"] and settings["gradient_accumulation_steps"] == 1


def handed_on(launch_file, script, monkeypatch):
    """Return how many ranks `accelerate launch` would start with a file, and the variables that it would give them."""
    started = []
    monkeypatch.setattr("torch.distributed.run.run", lambda args: started.append((args, dict(os.environ))))
    arguments = ["--config_file", str(launch_file), *map(str, script)]
    launch_command(launch_command_parser().parse_args(arguments))
    [(launched, environment)] = started
    assert [launched.training_script, *launched.training_script_args] == [str(part) for part in script]
    new = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    return int(launched.nproc_per_node), new


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_the_launch_files_start_the_users_command_from_anywhere(tmp_path, name, monkeypatch):
    script = [ROOT / "trainer" / "train.py", "--config", write_config(tmp_path, CONFIG), "--dry-run"]
    launch_file = CPU_CONFIGS / f"{name}.yaml"
    search_path = {"PYTHONPATH": str(ROOT / "tests")}
    if name == "zero3_offload":  # one by the real launcher
        command = ["python", "-m", "accelerate.commands.launch", "--config_file", launch_file, *script]
        output = run_command(command, env=with_forked_ranks(search_path), cwd=tmp_path).stdout
    else:
        num_ranks, variables = handed_on(launch_file, script, monkeypatch)
        output = launch_ranks(num_ranks, script, env=variables | search_path, cwd=tmp_path).stdout
    of_strategy = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2"}.get(name, "ZeRO-3")
    assert f"2 x cpu ({of_strategy})" in output and "dry run: phase 'p1' loss" in output


def test_init_from_takes_whole_weights_into_shards(finished, tmp_path):
    source = finished("zero2") / "checkpoint_4"
    still = toy({"lr": 0.0, **CELLS}, {"epochs": 0, **CELLS}, micro_batch_size=2)
    train_ranks(2, tmp_path, still, strategy="zero3", init_from=str(source))
    given, taken = (
        full_weights(open_checkpoint(folder)) for folder in (source, newest_run(tmp_path) / "checkpoint_2")
    )
    assert torch.equal(given["body.0.weight"], taken["body.0.weight"])


def test_a_configuration_file_that_is_not_there_is_named(tmp_path):
    environment = strategy_environment(tmp_path, "zero2", 2)
    environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = "ds_configs/no.json"
    output = train_ranks(2, tmp_path, toy(), env=environment, expect=2)
    assert "deepspeed_config_file ds_configs/no.json is not there" in output
