from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainer.config.schema import OptimizerConfig, PhaseConfig
from trainer.errors import ConfigError
from trainer.freezing import split_groups
from trainer.optim import UserScheduler, build_optimizer, mark_trainable, parameter_names
from trainer.schedule import base_learning_rates, recorded_rates


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 2)
        self.norm = nn.LayerNorm(2)
        self.linear = nn.Linear(2, 2)


def config(**settings):
    return SimpleNamespace(optimizer=OptimizerConfig(**settings))


def names(optimizer, model):
    return [sorted(group) for group in parameter_names(optimizer, model)]


def factory_with_model(params, model, lr):
    own = [parameter for name, parameter in model.named_parameters() if "linear" in name]
    rest = [parameter for parameter in params if not any(parameter is p for p in own)]
    return torch.optim.SGD([{"params": own, "use_muon": True}, {"params": rest}], lr=lr)


def forgetful_factory(params, lr=0.1):
    return torch.optim.SGD(list(params)[1:], lr=lr)


def wrong_factory(params):
    return list(params)


def test_an_optimizer_class_gets_all_parameters_in_one_group():
    model = Model()
    optimizer = build_optimizer(config(optimizer_args={"lr": 0.5}), model, model)
    assert isinstance(optimizer, torch.optim.AdamW) and len(names(optimizer, model)) == 1
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


def test_groups_sort_parameters_by_name_and_the_rest_forms_the_default_group():
    model = Model()
    groups = ({"name": "still", "match": ["norm", "bias"], "args": {"weight_decay": 0.0}},)
    optimizer = build_optimizer(config(groups=groups, optimizer_args={"weight_decay": 0.3}), model, model)
    assert names(optimizer, model) == [
        ["linear.bias", "norm.bias", "norm.weight"],
        ["embedding.weight", "linear.weight"],
    ]
    assert [(g["name"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("still", 0.0),
        ("default", 0.3),
    ]


def test_a_group_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match="optimizer.groups: nobody matches no parameter"):
        build_optimizer(config(groups=({"name": "nobody", "match": ["xyz"]},)), Model(), Model())


def test_a_factory_that_names_the_model_gets_it():
    model = Model()
    settings = config(optimizer_class="test_optim.factory_with_model", optimizer_args={"lr": 0.1})
    optimizer = build_optimizer(settings, model, model)
    assert names(optimizer, model)[0] == ["linear.bias", "linear.weight"]


def test_a_parameter_in_no_group_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="exactly once; in no group: embedding.weight"):
        model = Model()
        build_optimizer(config(optimizer_class="test_optim.forgetful_factory"), model, model)


def test_a_factory_that_returns_something_else_is_an_error():
    with pytest.raises(ConfigError, match="returned a list; it must return a torch.optim.Optimizer"):
        build_optimizer(config(optimizer_class="test_optim.wrong_factory"), Model(), Model())


def test_parameters_frozen_in_every_phase_leave_the_optimizer_and_others_stay():
    model = Model()
    phases = [
        SimpleNamespace(name="a", epochs=1, freeze=["embedding", "norm"], reinitialise=[]),
        SimpleNamespace(name="b", epochs=1, freeze=["embedding"], reinitialise=[]),
        SimpleNamespace(name="skipped", epochs=0, freeze=[], reinitialise=[]),
    ]
    mark_trainable(SimpleNamespace(datasets=phases), model)
    optimizer = build_optimizer(config(), model, model)
    assert names(optimizer, model) == [["linear.bias", "linear.weight", "norm.bias", "norm.weight"]]


def test_a_freeze_pattern_without_a_match_is_an_error():
    phases = [SimpleNamespace(name="a", epochs=1, freeze=["embeddings"], reinitialise=[])]
    with pytest.raises(ConfigError, match="'a': freeze pattern 'embeddings' matches no parameter"):
        mark_trainable(SimpleNamespace(datasets=phases), Model())


def two_factors(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5])


def three_unnamed_groups(params):
    first, *rest, last = params
    return torch.optim.SGD(
        [{"params": [first], "lr": 1e-4}, {"params": rest, "lr": 1e-3}, {"params": [last], "lr": 1e-2}]
    )


def split(optimizer, model, freeze):
    split_groups(optimizer, model, [SimpleNamespace(epochs=1, freeze=freeze, reinitialise=[])])


def test_groups_that_freezing_parts_are_recorded_by_the_rate_of_each_group():
    model = Model()
    optimizer = three_unnamed_groups(list(model.parameters()))
    split(optimizer, model, ["norm"])
    assert len(optimizer.param_groups) == 4
    assert recorded_rates(optimizer.param_groups) == {"lr": 1e-4, "lr/0": 1e-4, "lr/1": 1e-3, "lr/2": 1e-2}


def test_a_scheduler_that_counts_the_groups_is_told_which_there_are():
    model = Model()
    optimizer = three_unnamed_groups(list(model.parameters()))
    split(optimizer, model, ["norm"])
    settings = OptimizerConfig(scheduler_class="test_optim.two_factors")
    told = "two_factors cannot be built .*4 parameter groups: group 0, group 1, group 1, group 2"
    with pytest.raises(ConfigError, match=told):
        UserScheduler(settings, optimizer)


def test_a_scheduler_that_needs_a_metric_is_refused():
    optimizer = torch.optim.SGD(Model().parameters(), lr=1.0)
    settings = OptimizerConfig(scheduler_class="torch.optim.lr_scheduler.ReduceLROnPlateau")
    with pytest.raises(ConfigError, match="ReduceLROnPlateau needs a metric"):
        UserScheduler(settings, optimizer)


def test_a_restarted_scheduler_begins_at_the_new_rate():
    optimizer = torch.optim.SGD(Model().parameters(), lr=1.0)
    settings = OptimizerConfig(
        scheduler_class="torch.optim.lr_scheduler.StepLR", scheduler_args={"step_size": 1, "gamma": 0.5}
    )
    scheduler = UserScheduler(settings, optimizer)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
    scheduler.restart([8.0])
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 4.0


def test_a_rate_of_one_phase_is_not_the_one_that_later_phases_fall_back_on():
    model = Model()
    groups = ({"name": "emb", "match": ["embedding"]},)
    settings = OptimizerConfig(
        groups=groups, optimizer_args={"lr": 1e-3}, scheduler_class="torch.optim.lr_scheduler.ConstantLR"
    )
    optimizer = build_optimizer(SimpleNamespace(optimizer=settings), model, model)
    scheduler = UserScheduler(settings, optimizer)
    first, second = (
        PhaseConfig(dataloader_factory="a.b", name=name, **rates)
        for name, rates in (("one", {"lr": 0.05}), ("two", {"group_lrs": {"emb": 1e-4}}))
    )
    scheduler.restart(base_learning_rates(first, optimizer.param_groups))
    assert base_learning_rates(second, optimizer.param_groups) == [1e-4, 1e-3]


@pytest.mark.parametrize(
    ("device_type", "arguments", "is_fused"),
    [
        ("cuda", {}, True),
        ("cpu", {}, None),
        ("cuda", {"fused": False}, False),
        ("cuda", {"foreach": True}, None),
    ],
)
def test_torch_optimizers_are_fused_on_a_gpu_unless_told_otherwise(device_type, arguments, is_fused):
    model = Model()
    optimizer = build_optimizer(config(optimizer_args=arguments), model, model, device_type)
    assert optimizer.param_groups[0]["fused"] is is_fused
