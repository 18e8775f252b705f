"""LoRA: every target is trained and has its effect in evaluation, the model's own weights stay, exports are merged."""

import copy
import re

import fake_te
import pytest
import torch
from finetuning import backbone_config, fine_tuning, pretraining, write_typed_corpus
from running import (
    comparable_records,
    copy_until,
    final_weights,
    newest_run,
    records,
    same_weights,
    train,
    train_ranks,
)
from safetensors.torch import load_file
from test_fine_tuned import labelled, make_model

from models.errors import ModelError
from models.fine_tuned import FineTunedModel
from models.layers import NormLinear
from models.lora import DEFAULT_TARGETS, LoraSettings, frozen_patterns, is_corrected
from trainer.checkpoint_folder import open_checkpoint
from trainer.checkpoint_model import load_trained
from trainer.errors import CheckpointError, UserError
from trainer.export import export
from trainer.optim import matches

pytestmark = pytest.mark.usefixtures("forked_programs")

LORA = {"rank": 2, "alpha": 4, "dropout": 0.0}


def corrected(**options):
    """Return a model whose corrections are as if they had been trained."""
    model = make_model(**{"lora": LORA, **options})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def corrected_layers(model):
    return {name: layer for name, layer in model.named_modules() if is_corrected(layer)}


def test_the_default_targets_are_all_corrected():
    layers = corrected_layers(make_model(lora=LORA))
    assert {name.rpartition(".")[2] for name in layers} == set(DEFAULT_TARGETS) and len(layers) == 6
    assert isinstance(layers["backbone.transformer.layers.0.mlp.linear1"].base_layer, NormLinear)


def test_a_fresh_correction_changes_nothing():
    plain, lora, batch = make_model().eval(), make_model(lora=LORA).eval(), labelled([0, 1, 2])
    own = dict(plain.state_dict())
    for name, theirs in lora.pretrained_names().items():
        lora.get_parameter(name).data.copy_(own[f"backbone.{theirs}"])
    lora.head.load_state_dict(plain.head.state_dict())
    assert torch.equal(plain(batch).logits, lora(batch).logits)


@pytest.mark.parametrize("target", ["out_proj", "linear1", "linear2", "qkv"])
def test_every_target_is_trained_and_has_its_effect_in_evaluation(target):
    model = make_model(lora={**LORA, "target_modules": [target]})
    batch = labelled([0, 1, 2])
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(names) == 4 and all(f".{target}." in name for name in names)
    optimizer = torch.optim.SGD([model.get_parameter(name) for name in names], lr=0.1)
    before = model.eval()(batch).embedding
    for _ in range(2):  # the second factor starts at 0, so the first one moves in the second step
        optimizer.zero_grad()
        model.train().compute_loss(batch).sum.backward()
        optimizer.step()
    assert all(model.get_parameter(name).grad.abs().max() > 0 for name in names)
    assert not torch.allclose(model.eval()(batch).embedding, before)


def test_a_correction_acts_between_the_norm_and_the_matrix():
    model = corrected()
    layer = model.get_submodule("backbone.transformer.layers.0.mlp.linear1")
    x = torch.randn(2, 5, 16) * 3 + 1
    first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    base = layer.base_layer
    weight = base.weight + 2.0 * second @ first
    expected = torch.nn.functional.linear(base.normalise(x), weight, base.bias)
    torch.testing.assert_close(layer(x), expected)


def test_dropout_is_on_the_corrections_alone_and_off_in_evaluation():
    model, batch = corrected(lora={**LORA, "dropout": 0.5}, head_dropout=0.0), labelled([0, 1, 2])
    assert not torch.equal(model.train()(batch).logits, model(batch).logits)
    assert torch.equal(model.eval()(batch).logits, model(batch).logits)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_merging_gives_plain_weights_that_compute_the_same(activation):
    model, batch = corrected(backbone={"activation": activation}).eval(), labelled([0, 1, 2], padded=True)
    merged = model.merged()
    assert merged.state_dict().keys() == make_model(backbone={"activation": activation}).state_dict().keys()
    torch.testing.assert_close(merged(batch).logits, model(batch).logits)
    assert merged.config.lora is None and model.config.lora == LORA and corrected_layers(model)
    assert make_model().merged() is not None and not merged.training


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_layers_of_transformer_engine_are_corrected_as_torchs(monkeypatch, normalization):
    fake_te.install(monkeypatch)
    sizes = {"hidden_dim": 32, "num_heads": 2, "normalization": normalization}
    plain = corrected(backbone=sizes).eval()
    other = make_model(backbone=sizes, lora=LORA, layer_backend="te").eval()
    other.load_state_dict(plain.state_dict())
    batch = labelled([0, 1, 2])
    torch.testing.assert_close(other(batch).logits, plain(batch).logits, rtol=1e-4, atol=1e-4)
    fake_te.LOG.clear()
    other.train().compute_loss(batch).sum.backward()
    assert all(p.grad is not None for name, p in other.named_parameters() if "lora_" in name)
    torch.testing.assert_close(other.merged().eval()(batch).logits, plain(batch).logits, rtol=1e-3, atol=1e-3)
    fake_te.uninstall()


def test_corrections_of_emulated_fp8_layers_are_trained():
    sizes = {"hidden_dim": 32, "num_heads": 2}
    model = make_model(backbone=sizes, lora=LORA, layer_backend="emulate")
    model.compute_loss(labelled([0, 1, 2])).sum.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_recomputing_blocks_leaves_gradients_as_they_are():
    models = [
        corrected(backbone={"activation_checkpointing": each}, head_dropout=0.0) for each in (False, True)
    ]
    for model in models:
        model.compute_loss(labelled([0, 1, 2])).sum.backward()
    for (name, one), (_, two) in zip(*(model.named_parameters() for model in models), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


@pytest.mark.parametrize(
    ("targets", "number"),
    [(["linear2"], 2), (["layers.1.mlp.linear1"], 1), (["layers.0.*"], 4), (["out_proj", "*.qkv"], 4)],
)
def test_targets_are_last_names_whole_names_or_patterns(targets, number):
    assert len(corrected_layers(make_model(lora={**LORA, "target_modules": targets}))) == number


def test_embeddings_of_values_are_no_targets():
    names = corrected_layers(make_model(backbone={"n_bins": None}, lora=LORA))
    assert all(name.startswith("backbone.transformer.") for name in names)


def test_an_unknown_target_is_refused_with_the_layers_there_are():
    with pytest.raises(
        ModelError, match="'q_proj' fits no linear layer .*; there are qkv, out_proj, linear1"
    ):
        make_model(lora={**LORA, "target_modules": ["out_proj", "q_proj"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"bias": "some"}, "lora.bias is 'some'; allowed: none, all, lora_only"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        LoraSettings(**settings)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_what_is_frozen_is_all_but_corrections_head_and_the_biases_asked_for(bias):
    names = [name for name, _ in make_model(lora={**LORA, "bias": bias}).named_parameters()]
    free = [name for name in names if not matches(name, frozen_patterns(bias))]
    others = [name for name in free if "lora_" not in name and not name.startswith("head.")]
    biases = [name for name in names if name.startswith("backbone.") and name.endswith("bias")]
    expected = {
        "none": [],
        "all": biases,
        "lora_only": [name for name in biases if re.search(r"base_layer\.bias$", name)],
    }[bias]
    assert others == expected and sum("lora_" in name for name in free) == 12
    assert (len(expected) > 0) == (bias != "none")


def test_a_phase_that_trains_other_parameters_beside_is_refused_with_what_to_freeze():
    model = make_model(lora={**LORA, "bias": "lora_only"})

    def told(patterns):
        model.hold_still(lambda name: matches(name, patterns))

    told(frozen_patterns("lora_only"))
    told(["^backbone"])  # the head alone
    with pytest.raises(
        ModelError, match=r"has backbone.token_embedding.weight trained .*set the phase's freeze to"
    ):
        told([])
    with pytest.raises(ModelError, match=r"lora.bias is lora_only.*out_proj.base_layer.bias held still"):
        told(frozen_patterns("none"))


# Runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_typed_corpus(tmp_path_factory.mktemp("cells"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, corpus):
    return train(tmp_path_factory.mktemp("pretrained"), pretraining("encoder", corpus))


def lora_run(corpus, pretrained, bias="none", **changes):
    phase = {"max_steps": 3, "lr": 0.05, "freeze": frozen_patterns(bias), "save_every_steps": 1}
    settings = {"rank": 2, "alpha": 4, "dropout": 0.1, "bias": bias}
    config_args = {"lora": settings, **changes.pop("config_args", {})}
    return fine_tuning(corpus, pretrained, phases=[phase], config_args=config_args, **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus, pretrained):
    return train(tmp_path_factory.mktemp("lora"), lora_run(corpus, pretrained))


def test_a_run_trains_corrections_and_head_and_nothing_else(run, pretrained):
    theirs, found = final_weights(pretrained), final_weights(run)
    own = {n: t for n, t in found.items() if n.startswith("backbone.") and "lora_" not in n}
    for name, tensor in own.items():
        plain = name.removeprefix("backbone.").replace(".base_layer.", ".")
        assert torch.equal(tensor, theirs[plain]), name
    assert len(own) > 20 and all(found[name].any() for name in found if "lora_B" in name)
    first = load_file(run / "checkpoint_1" / "model.safetensors")
    assert not torch.equal(first["head.output.weight"], found["head.output.weight"])


def test_biases_train_beside_where_they_are_asked_for(tmp_path, corpus, pretrained):
    theirs = final_weights(pretrained)
    found = final_weights(train(tmp_path, lora_run(corpus, pretrained, bias="lora_only")))
    moved = {
        name
        for name, tensor in found.items()
        if name.startswith("backbone.")
        and "lora_" not in name
        and not torch.equal(tensor, theirs[name.removeprefix("backbone.").replace(".base_layer.", ".")])
    }
    assert len(moved) == 6 and all(name.endswith(".base_layer.bias") for name in moved)


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, corpus, pretrained, run):
    cut = copy_until(run, 1, tmp_path)
    train(tmp_path, lora_run(corpus, pretrained), resume_from="latest", init_from=None)
    assert comparable_records(cut) == comparable_records(run) and same_weights(cut, run)


def test_an_export_has_plain_weights_and_computes_the_same(tmp_path, corpus, pretrained, run):
    said = " ".join(export(run, tmp_path / "out"))
    assert "computes logits and embeddings of a made-up batch, equal bit for bit" in said
    model = FineTunedModel.from_pretrained(tmp_path / "out")
    assert not corrected_layers(model) and model.config.lora is None
    assert not any("lora" in name or "base_layer" in name for name in model.state_dict())
    trained = load_trained(open_checkpoint(run / "checkpoint_3")).model
    batch = labelled([0, 1, 2])
    batch = {key: value for key, value in batch.items() if key != "batch_idx"}
    torch.testing.assert_close(model(batch).logits, trained(batch).logits)
    bare = copy.deepcopy(trained)
    for name, parameter in bare.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    assert not torch.allclose(bare(batch).logits, trained(batch).logits, atol=1e-3)
    again = train(
        tmp_path / "again", fine_tuning(corpus, tmp_path / "out", phases=[{"lr": 0.0, "max_steps": 1}])
    )
    name = "backbone.transformer.layers.0.mlp.linear1.weight"
    assert torch.equal(final_weights(again)[name], model.state_dict()[name])


def test_an_export_that_would_compute_something_else_is_refused(tmp_path, run, monkeypatch):
    real = FineTunedModel.merged

    def wrong(self):
        model = real(self)
        model.head.output.bias.data += 0.1
        return model

    monkeypatch.setattr(FineTunedModel, "merged", wrong)
    with pytest.raises(UserError, match="with its LoRA corrections merged the model computes another logits"):
        export(run, tmp_path / "out")


def test_unmerged_corrections_are_no_start_for_another_run(tmp_path, corpus, run):
    with pytest.raises(CheckpointError, match="export it, which merges them"):
        train(tmp_path, fine_tuning(corpus, run))


def without_dropout(corpus, pretrained):
    """Return a run that is the same on one rank and on two."""
    quiet = {"backbone_config": {**backbone_config(), "dropout": 0.0}, "head_dropout": 0.0, "lora": LORA}
    return lora_run(corpus, pretrained, config_args=quiet, global_batch_size=8, micro_batch_size=4)


@pytest.fixture(scope="module")
def run_of_one(tmp_path_factory, corpus, pretrained):
    return train(tmp_path_factory.mktemp("run_of_one"), without_dropout(corpus, pretrained))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_two_ranks_train_corrections_as_one_does(tmp_path, corpus, pretrained, run_of_one, strategy):
    train_ranks(2, tmp_path, without_dropout(corpus, pretrained), strategy=strategy)
    together = newest_run(tmp_path)
    one, two = ([record["loss"] for record in records(run)] for run in (run_of_one, together))
    assert two == pytest.approx(one, abs=1e-5)
    weights, same = final_weights(run_of_one), final_weights(together)
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    export(together, tmp_path / "out")
