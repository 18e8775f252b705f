"""Fine-tuning: the head and its losses, where the backbone's weights come from, and what is held still."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cell_batches import cells, packed
from finetuning import (
    FAMILIES,
    NUM_CLASSES,
    NUM_GENES,
    TOKENIZER,
    backbone_config,
    fine_tuning,
    pretraining,
    write_typed_corpus,
)
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
from safetensors.torch import load_file, save_file

from data.loader import DrawKey, cell_loader
from models.errors import ModelError
from models.fine_tuned import BACKBONES, FineTunedConfig, FineTunedModel
from trainer.errors import CheckpointError, ConfigError
from trainer.export import export

pytestmark = pytest.mark.usefixtures("forked_programs")


def make_model(family: str = "encoder", backbone: dict[str, Any] | None = None, **options: Any):
    torch.manual_seed(0)
    config = {**backbone_config(), "dropout": 0.0, "vocab_size": 34, "init_std": 0.2, **(backbone or {})}
    settings: dict[str, Any] = {"n_classes": 3} if options.get("task") != "regression" else {}
    return FineTunedModel(FineTunedConfig(FAMILIES[family][0], config, **{**settings, **options}))


def labelled(labels: Any, **options: Any) -> dict[str, Any]:
    return {**cells(**options), "label": torch.tensor(labels)}


# Heads and losses


def test_the_head_is_one_layer_or_two():
    one, two = make_model().head, make_model(head_hidden_dim=8).head
    assert {name for name, _ in one.named_parameters()} == {"output.weight", "output.bias"}
    x = torch.randn(2, 16)
    expected = two.output(F.gelu(two.hidden(x)))
    torch.testing.assert_close(two.eval()(x), expected)
    assert two.output.weight.shape == (3, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_classification_counts_the_cells_that_have_a_label(family):
    model, batch = make_model(family).eval(), labelled([2, -100, 0])
    loss = model.compute_loss(batch)
    logits = model(batch).logits
    expected = F.cross_entropy(logits[[0, 2]], torch.tensor([2, 0]), reduction="sum")
    torch.testing.assert_close(loss.sum, expected)
    assert int(loss.weight) == 2 == model.loss_weight(batch)
    right = (logits.argmax(dim=1) == batch["label"]).sum()
    assert loss.metrics["accuracy"] == right
    torch.testing.assert_close(model.predict(batch), logits.softmax(dim=1))
    assert torch.equal(model.encode(batch), model(batch).embedding)


def test_classes_weigh_as_the_list_says():
    model, batch = make_model(class_weights=[1.0, 2.0, 5.0]).eval(), labelled([2, 1, 0])
    each = F.cross_entropy(model(batch).logits, batch["label"], reduction="none")
    torch.testing.assert_close(model.compute_loss(batch).sum, 5 * each[0] + 2 * each[1] + each[2])
    assert int(model.compute_loss(batch).weight) == 3


def test_regression_leaves_out_cells_without_a_label():
    model, batch = make_model(task="regression").eval(), labelled([1.5, float("nan"), -2.0])
    loss, values = model.compute_loss(batch), model.predict(batch)
    errors = values[[0, 2]] - torch.tensor([1.5, -2.0])
    torch.testing.assert_close(loss.sum, errors.square().sum())
    assert int(loss.weight) == 2 == model.loss_weight(batch)
    torch.testing.assert_close(loss.metrics["absolute_error"], errors.abs().sum())
    loss.sum.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_several_numbers_of_a_cell_are_regressed_together():
    model = make_model(task="regression", output_dim=2).eval()
    batch = labelled([[1.0, 2.0], [float("nan"), 0.0], [0.0, 1.0]])
    errors = (model.predict(batch) - batch["label"])[[0, 2]]
    torch.testing.assert_close(model.compute_loss(batch).sum, errors.square().mean(dim=1).sum())


def test_packed_cells_are_classified_as_padded_ones():
    model, batch = make_model().eval(), labelled([0, 1, 2], padded=True)
    other = {**packed(batch), "label": batch["label"]}
    torch.testing.assert_close(model(other).logits, model(batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_backbone_without_heads_has_a_gradient(family):
    model = make_model(family, {"n_technical_batches": 3}, head_hidden_dim=8)
    model.compute_loss(labelled([0, 1, 2])).sum.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    heads = set(model.backbone.head_names)
    assert not {name.split(".")[1] for name in model.state_dict()} & heads
    with pytest.raises(ModelError, match="built without heads"):
        model.backbone(labelled([0, 1, 2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_classes": None}, "n_classes is not known"),
        ({"n_classes": 1}, "n_classes is 1; it must be at least 2"),
        ({"task": "ranking"}, "task is 'ranking'; allowed: classification, regression"),
        ({"output_dim": 2}, "task classification has an output for each class"),
        ({"task": "regression", "n_classes": 3}, "task regression has no classes"),
        ({"task": "regression", "class_weights": "balanced"}, "task regression has no classes"),
        ({"class_weights": "equal"}, "allowed: balanced"),
        ({"class_weights": [1.0, 2.0]}, "are 2 numbers, but there are 3 classes"),
        ({"class_weights": [1.0, 0.0, 1.0]}, "must be positive"),
        ({"head_dropout": 1.0}, "head_dropout is 1.0"),
        ({"lora": {"rank": 0}}, "lora.rank is 0"),
        ({"lora": {"r": 8}}, "lora has unknown fields r; allowed: alpha"),
        ({"backbone": {"hidden_dim": 15}}, "hidden_dim 15 is not divisible"),
        ({"backbone": {"width": 15}}, "unknown fields width; it must be the complete"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(options, message):
    with pytest.raises(ModelError, match=message):
        make_model(**options)


def test_an_unknown_backbone_is_refused_with_those_there_are():
    with pytest.raises(ModelError, match="backbone_class is 'os.system'; allowed: models.encoder"):
        FineTunedConfig("os.system", {})


@pytest.mark.parametrize(
    ("label", "options", "message"),
    [
        ([1.0, 2.0, 3.0], {}, "label_task: classification"),
        ([1, 2, 0], {"task": "regression"}, "label_task: regression"),
        ([1.0, 2.0, 3.0], {"task": "regression", "output_dim": 2}, "needs 2 numbers for each cell"),
    ],
)
def test_labels_of_the_other_task_are_refused(label, options, message):
    with pytest.raises(ModelError, match=message):
        make_model(**options).loss_weight(labelled(label))


def test_cells_without_labels_are_refused():
    with pytest.raises(ModelError, match="no 'label'.*`label` of the loader"):
        make_model().loss_weight(cells())


# What is held still


def test_a_backbone_that_is_held_still_has_no_dropout_and_one_that_is_partly_has():
    model = make_model(backbone={"dropout": 0.5}, head_dropout=0.0)
    batch = labelled([0, 1, 2])

    def is_random():
        return not torch.equal(model(batch).logits, model(batch).logits)

    assert model.train() is model and is_random()
    model.hold_still(lambda name: name.startswith("backbone"))
    assert not is_random() and model.head.training
    assert not model.train().backbone.training  # evaluation ends with this
    model.hold_still(lambda name: name.startswith("backbone.token"))
    assert is_random()


def test_balanced_weights_are_inverse_to_the_classes_cells():
    model = make_model(class_weights="balanced")
    model.set_class_counts([60, 30, 10])
    weights = model.class_weight
    torch.testing.assert_close(weights * torch.tensor([60, 30, 10]), torch.full((3,), 100 / 3))


# Costs


def test_a_frozen_backbone_costs_a_forward_pass_and_lora_no_gradients_of_matrices():
    plain, lora = make_model(), make_model(lora={"rank": 2})
    whole = plain.training_flops([9, 9, 9], 0)
    head = 6 * 3 * 16 * 3
    plain.backbone.requires_grad_(False)
    assert plain.training_flops([9, 9, 9], 0) == pytest.approx((whole - head) / 3 + head)
    kept = plain.activation_bytes(num_tokens=27, num_cells=3, num_masked=0, is_mixed=False)
    assert kept.body == 0
    for name, parameter in lora.named_parameters():
        parameter.requires_grad_("lora_" in name)
    assert whole / 2 < lora.training_flops([9, 9, 9], 0) < whole


# Runs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("fine_tuned")


@pytest.fixture(scope="module")
def corpus(home):
    return write_typed_corpus(home / "cells")


@pytest.fixture(scope="module")
def pretrained(home, corpus):
    """Return a pretrained run of each family."""
    return {family: train(home / family, pretraining(family, corpus)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_starts_from_a_checkpoint_and_from_an_export(
    tmp_path, home, corpus, pretrained, family, capsys
):
    out = home / f"exported_{family}"
    export(pretrained[family], out)
    config = {"phases": [{"lr": 0.0, "max_steps": 1}], "family": family}
    runs = [
        train(tmp_path / str(i), fine_tuning(corpus, source, **config))
        for i, source in enumerate((pretrained[family], out, out / "model.safetensors"))
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "the head starts fresh" in printed and "left out, because this model has no use for them:" in printed
    )
    assert "does not name its genes" in printed
    theirs, found = final_weights(pretrained[family]), final_weights(runs[0])
    names = [name for name in found if name.startswith("backbone.")]
    assert len(names) > 20
    assert all(torch.equal(found[name], theirs[name.removeprefix("backbone.")]) for name in names)
    assert all(same_weights(runs[0], other) for other in runs[1:])


def test_fine_tuning_learns_the_classes_and_can_be_exported(tmp_path, corpus, pretrained):
    settings = {"val_fraction": 0.3, "stratify": True}
    phases = [{"epochs": 8, "lr": 0.01, "schedule": "constant"}]
    config = fine_tuning(
        corpus,
        pretrained["encoder"],
        phases=phases,
        loader=settings,
        config_args={"class_weights": "balanced"},
    )
    folder = train(tmp_path, config)
    accuracy = [record["accuracy"] for record in records(folder, "validation")]
    assert accuracy[-1] > 0.8
    export(folder, tmp_path / "out")
    model = FineTunedModel.from_pretrained(tmp_path / "out")
    source = cell_loader(corpus, tokenizer=TOKENIZER, label="technical_batch")
    batch = source.fetch(np.arange(60), DrawKey(0, 0, 0))
    predicted = model.predict(batch).argmax(dim=1)
    assert (predicted == batch["label"]).float().mean() > 0.8
    counts = torch.bincount(torch.tensor(_training_labels(corpus, settings)), minlength=NUM_CLASSES)
    torch.testing.assert_close(model.class_weight, counts.sum() / (NUM_CLASSES * counts.float()))


def _training_labels(corpus, settings):
    source = cell_loader(corpus, tokenizer=TOKENIZER, label="technical_batch", **settings)
    rows = source.row_mask.nonzero()[0]
    return [
        ["lane-a", "lane-b", "lane-c"].index(name)
        for name in source.obs(["technical_batch"], rows)["technical_batch"]
    ]


def test_a_number_is_regressed(tmp_path, corpus, pretrained):
    config = fine_tuning(
        corpus,
        pretrained["autoencoder"],
        family="autoencoder",
        phases=[{"epochs": 4, "lr": 0.01}],
        loader={"label": "age", "label_task": "regression"},
        config_args={"task": "regression"},
    )
    errors = [record["squared_error"] for record in records(train(tmp_path, config))]
    assert sum(errors[-4:]) < 0.5 * sum(errors[:4])


GRADUAL = [
    {"name": "head", "max_steps": 2, "epochs": 1, "freeze": ["^backbone"], "save_every_steps": 1},
    {"name": "all", "max_steps": 2, "epochs": 1, "save_every_steps": 1},
]


def test_gradual_unfreezing_holds_the_backbone_still_and_resumes_exactly(tmp_path, corpus, pretrained):
    config = fine_tuning(corpus, pretrained["encoder"], phases=GRADUAL)
    whole = train(tmp_path / "whole", config)
    before, half, after = (
        load_file(whole / f"checkpoint_{step}" / "model.safetensors") for step in (1, 2, 4)
    )
    names = [name for name in before if name.startswith("backbone.")]
    assert all(torch.equal(before[name], half[name]) for name in names)
    assert not torch.equal(before["head.output.weight"], half["head.output.weight"])
    assert any(not torch.equal(half[name], after[name]) for name in names)
    for step in (1, 3):
        folder = tmp_path / f"cut_{step}"
        cut = copy_until(whole, step, folder)
        train(folder, config, resume_from="latest", init_from=None)
        assert comparable_records(cut) == comparable_records(whole) and same_weights(cut, whole)


def test_a_run_turns_the_dropout_of_a_backbone_off_while_it_is_held_still(
    tmp_path, corpus, pretrained, monkeypatch
):
    seen = []
    real = FineTunedModel.forward

    def noting(self, batch):
        if self.training:
            seen.append(self.backbone.training)
        return real(self, batch)

    monkeypatch.setattr(FineTunedModel, "forward", noting)
    phases = [{**phase, "eval_every_steps": 1} for phase in GRADUAL]
    loader = {"val_fraction": 0.2}
    train(tmp_path, fine_tuning(corpus, pretrained["encoder"], phases=phases, loader=loader))
    half = len(seen) // 2
    assert half >= 4 and not any(seen[:half]) and all(seen[half:])


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, corpus, pretrained):
    weights = load_file(next(pretrained["encoder"].glob("checkpoint_2")) / "model.safetensors")
    weights["extra.weight"] = weights.pop("transformer.final_norm.weight")
    path = tmp_path / "weights.safetensors"
    save_file({name: tensor.clone() for name, tensor in weights.items()}, path)
    message = "it lacks transformer.final_norm.weight; it has extra.weight, which the backbone has not"
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path, fine_tuning(corpus, path))


def test_a_pretrained_model_that_would_compute_something_else_is_refused(tmp_path, corpus, pretrained):
    for changes, message in (
        ({"num_heads": 4}, "trained with num_heads 2, but backbone_config says 4"),
        ({"activation": "relu"}, "trained with activation gelu, but backbone_config says relu"),
        ({"hidden_dim": 32}, "is .* there and .* here"),
    ):
        config = {"backbone_config": {**backbone_config(), **changes}}
        with pytest.raises(CheckpointError, match=message):
            train(tmp_path / str(changes), fine_tuning(corpus, pretrained["encoder"], config_args=config))
    with pytest.raises(
        CheckpointError, match="is of models.autoregressive.*, but backbone_class is models.enc"
    ):
        train(tmp_path / "family", fine_tuning(corpus, pretrained["autoregressive"]))


def test_other_genes_and_more_bins_are_refused(tmp_path, corpus, pretrained):
    from corpora import make_cells, write_corpus

    other = write_corpus(tmp_path / "other", make_cells(30, NUM_GENES + 1, 12), NUM_GENES + 1)
    with pytest.raises(CheckpointError, match="its gene space has 40 genes, the data's has 41"):
        train(tmp_path / "a", fine_tuning(other, pretrained["encoder"]))
    loader = {"tokenizer": {**TOKENIZER, "n_bins": 9}}
    with pytest.raises(CheckpointError, match="reads 5 expression bins, but the data has 9"):
        train(tmp_path / "b", fine_tuning(corpus, pretrained["encoder"], loader=loader))


def test_a_fine_tuned_model_can_be_fine_tuned_again(tmp_path, corpus, pretrained, capsys):
    first = train(tmp_path / "first", fine_tuning(corpus, pretrained["encoder"]))
    capsys.readouterr()
    config = fine_tuning(
        corpus,
        first,
        phases=[{"lr": 0.0, "max_steps": 1}],
        config_args={"task": "regression"},
        loader={"label": "age", "label_task": "regression"},
    )
    second = train(tmp_path / "second", config)
    assert "no use for them: head (2)" in " ".join(capsys.readouterr().out.split())
    one, two = final_weights(first), final_weights(second)
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith("backbone."))


def test_balanced_weights_need_labels_of_classes(tmp_path, corpus):
    config = fine_tuning(corpus, None, config_args={"class_weights": "balanced", "n_classes": 3})
    for phase in config["datasets"]:
        del phase["dataloader_args"]["label"]
    with pytest.raises(ConfigError, match="balanced needs the classes of the training cells"):
        train(tmp_path, config)


def test_the_backbones_it_knows_are_those_of_the_documentation():
    assert list(BACKBONES) == [each[0] for each in FAMILIES.values()]


def without_dropout(corpus, pretrained):
    """Return a run that is the same on one rank and on two."""
    return fine_tuning(
        corpus,
        pretrained["encoder"],
        phases=GRADUAL,
        config_args={"backbone_config": {**backbone_config(), "dropout": 0.0}, "head_dropout": 0.0},
        global_batch_size=8,
        micro_batch_size=4,
    )


@pytest.fixture(scope="module")
def tuned_by_one(home, corpus, pretrained):
    return train(home / "tuned_by_one", without_dropout(corpus, pretrained))


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_ranks_fine_tune_as_one_does(tmp_path, corpus, pretrained, tuned_by_one, strategy):
    train_ranks(2, tmp_path, without_dropout(corpus, pretrained), strategy=strategy)
    one, two = ([record["loss"] for record in records(run)] for run in (tuned_by_one, newest_run(tmp_path)))
    assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("family", ["autoregressive", "autoencoder"])
def test_two_ranks_pretrain_as_one_does_under_zero_3(tmp_path, corpus, family):
    config = pretraining(family, corpus, global_batch_size=8)
    config["model"]["config_args"]["dropout"] = 0.0
    alone = train(tmp_path / "one", config)
    train_ranks(2, tmp_path / "two", config, strategy="zero3")
    sharded = newest_run(tmp_path / "two")
    one, two = ([r["loss"] for r in records(run)] for run in (alone, sharded))
    assert two == pytest.approx(one, abs=1e-5)
    tuned = train(
        tmp_path / "tuned",
        fine_tuning(corpus, sharded, family=family, phases=[{"lr": 0.0, "max_steps": 1}]),
    )
    theirs, found = final_weights(sharded), final_weights(tuned)
    names = [name for name in found if name.startswith("backbone.")]
    assert names and all(torch.equal(found[n], theirs[n.removeprefix("backbone.")]) for n in names)
