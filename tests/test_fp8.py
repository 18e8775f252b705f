"""Training in FP8 emulation: every recipe, every strategy, exact resumes, checkpoints shared with bf16, exports."""

import copy
import functools
import json

import pytest
import torch
from cell_batches import make_batch, make_encoder
from corpora import Cells, write_corpus
from running import (
    comparable_records,
    copy_until,
    final_weights,
    losses,
    newest_run,
    same_weights,
    toy,
    train,
    train_ranks,
    write_config,
)
from safetensors.torch import load_file

from data.synthetic import make_synthetic_counts
from models.encoder import EncoderConfig, MaskedCellEncoder
from models.errors import ModelError
from models.fp8_state import fp8_state
from models.pretrained import from_pretrained
from trainer.checkpoint_folder import open_checkpoint
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.export import export
from trainer.model_building import build_model
from trainer.phases import DataFacts
from trainer.shards import full_weights

pytestmark = pytest.mark.usefixtures("forked_programs")

RECIPES = ["current_scaling", "delayed_scaling", "block_scaling", "mxfp8"]
MODEL = {
    "model_class": "models.encoder.MaskedCellEncoder",
    "config_class": "models.encoder.EncoderConfig",
    "config_args": {"hidden_dim": 32, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
}
TOKENIZER = {"strategy": "binned_expression", "binning_method": "per_cell", "n_bins": 5, "max_genes": 24}
EMBEDDING = "technical_batch_embedding.weight"


class OnlyBackend(torch.nn.Module):
    """A model whose layers are in FP8 or not, all of them by one recipe."""

    def __init__(self, layer_backend="plain"):
        super().__init__()
        self.layer_backend = layer_backend


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    made = make_synthetic_counts(96, 40, 12, seed=1, num_batches=3, num_cell_types=3)
    cells = Cells(made.indptr, made.indices, made.counts, {"technical_batch": made.technical_batch})
    folder = tmp_path_factory.mktemp("corpus") / "cells"
    return write_corpus(folder, cells, 40, columns=("technical_batch",))


def config_of(corpus, recipe=None, **changes):
    """Return a run of 4 steps an epoch; a recipe makes it one in emulated FP8."""
    masking = {"mask_ratio": 0.3, "target": "both"}
    arguments = {"path": str(corpus), "tokenizer": TOKENIZER, "masking": masking}
    phase = {
        "dataloader_factory": "data.loader.cell_loader",
        "dataloader_args": arguments,
        "lr": 0.02,
        "save_every_steps": 2,
        **changes.pop("phase", {}),
    }
    fp8 = {} if recipe is None else {"precision": "fp8", "fp8": {"backend": "emulate", "recipe": recipe}}
    return toy(phase, **{"model": MODEL, "micro_batch_size": 4, **fp8, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus):
    """Return one run of two epochs by precision or recipe."""

    @functools.cache
    def run(kind):
        changes = {"precision": kind} if kind == "bf16" else {"recipe": kind}
        return train(tmp_path_factory.mktemp(kind), config_of(corpus, phase={"epochs": 2}, **changes))

    return run


@pytest.fixture(scope="module")
def of_two(tmp_path_factory, corpus):
    """Return one run of two epochs by two processes, by strategy."""

    @functools.cache
    def run(strategy):
        folder = tmp_path_factory.mktemp(strategy)
        train_ranks(2, folder, config_of(corpus, "delayed_scaling", phase={"epochs": 2}), strategy=strategy)
        return newest_run(folder)

    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_lowers_the_loss_as_bf16_does(finished, recipe):
    ours, theirs = losses(finished(recipe)), losses(finished("bf16"))
    assert ours[-1] < 0.95 * ours[0]
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.03)


def test_recipes_differ(finished):
    # Powers of two move no rounding but that of the smallest values, so the two in blocks may agree.
    found = [losses(finished(recipe)) for recipe in RECIPES[:3]]
    assert found[0] != found[1] != found[2] != found[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_learns_a_small_batch_by_heart(recipe):
    model = make_encoder(init_std=0.1, hidden_dim=32, layer_backend="emulate", fp8_recipe=recipe)
    batch = make_batch(target="gene", masked=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(60):
        loss = model.compute_loss(batch).sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.1 * found[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_activation_checkpointing_leaves_gradients_and_scales_as_they_are(recipe):
    results = []
    for checkpointing in (False, True):
        model = make_encoder(
            hidden_dim=32,
            dropout=0.2,
            layer_backend="emulate",
            fp8_recipe=recipe,
            activation_checkpointing=checkpointing,
        )
        for step in range(3):
            torch.manual_seed(step)
            model.compute_loss(make_batch(seed=step)).sum.backward()
        results.append(({n: p.grad for n, p in model.named_parameters()}, fp8_state(model)))
    for name, gradient in results[0][0].items():
        assert torch.equal(gradient, results[1][0][name]), name
    for layer, tensors in results[0][1].items():
        assert all(torch.equal(tensor, results[1][1][layer][name]) for name, tensor in tensors.items()), layer


def test_accumulated_micro_batches_train_as_one_large_batch(tmp_path, corpus, finished):
    large = train(tmp_path, config_of(corpus, "current_scaling", micro_batch_size=24, phase={"epochs": 2}))
    assert losses(large) == pytest.approx(losses(finished("current_scaling")), rel=0.02)
    assert losses(large) != losses(finished("current_scaling"))


def test_a_resumed_run_of_delayed_scaling_equals_one_that_was_not_interrupted(tmp_path, corpus, finished):
    reference = finished("delayed_scaling")
    folder = copy_until(reference, 2, tmp_path)
    train(tmp_path, config_of(corpus, "delayed_scaling", phase={"epochs": 2}), resume_from=str(folder))
    assert comparable_records(folder) == comparable_records(reference) and same_weights(folder, reference)
    states = [
        open_checkpoint(run / "checkpoint_8").rank("rank_state", 0)["fp8"] for run in (folder, reference)
    ]
    assert len(states[0]) == 5 and states[0].keys() == states[1].keys()
    for layer, tensors in states[0].items():
        assert tensors["inputs_scale"] != 1
        assert all(torch.equal(tensor, states[1][layer][name]) for name, tensor in tensors.items())


def test_a_resume_that_forgot_the_scales_would_be_seen(tmp_path, corpus, finished, monkeypatch):
    monkeypatch.setattr("trainer.run_state.load_fp8_state", lambda module, state: [])
    reference = finished("delayed_scaling")
    folder = copy_until(reference, 2, tmp_path)
    train(tmp_path, config_of(corpus, "delayed_scaling", phase={"epochs": 2}), resume_from=str(folder))
    assert not same_weights(folder, reference)


def test_weights_of_both_precisions_have_the_same_names_and_shapes(finished):
    shapes = [
        {
            name: tensor.shape
            for name, tensor in load_file(finished(kind) / "checkpoint_8/model.safetensors").items()
        }
        for kind in ("bf16", "delayed_scaling")
    ]
    assert shapes[0] == shapes[1] and shapes[0][EMBEDDING] == (3, 32)


@pytest.mark.parametrize(("before", "after"), [("bf16", "delayed_scaling"), ("delayed_scaling", "bf16")])
def test_weights_of_one_precision_start_a_run_in_the_other(tmp_path, corpus, finished, before, after):
    changes = {"precision": after} if after == "bf16" else {"recipe": after}
    config = config_of(corpus, **changes)
    folder = train(tmp_path, config, init_from=str(finished(before)))
    assert losses(folder)[0] < 0.95 * losses(finished(after))[0]


@pytest.mark.parametrize(("before", "after"), [("bf16", "delayed_scaling"), ("delayed_scaling", "bf16")])
def test_a_run_goes_on_in_the_other_precision(tmp_path, corpus, finished, capsys, before, after):
    folder = copy_until(finished(before), 4, tmp_path)
    changes = {"precision": after} if after == "bf16" else {"recipe": after}
    train(tmp_path, config_of(corpus, phase={"epochs": 2}, **changes), resume_from=str(folder))
    assert losses(folder)[:4] == losses(finished(before))[:4]
    assert losses(folder)[4:] == pytest.approx(losses(finished(before))[4:], rel=0.03)
    assert losses(folder)[4:] != losses(finished(before))[4:]
    said = " ".join(capsys.readouterr().out.split())
    assert ("the checkpoint has no scales for 5 layers" in said) == (after != "bf16")


def test_an_exported_fp8_run_has_plain_layers_and_its_weights(tmp_path, finished):
    folder = finished("delayed_scaling")
    said = export(folder, tmp_path / "out")
    assert "computes logits and embeddings of a made-up batch, equal bit for bit" in said[-1]
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["config_args"]["layer_backend"] == "torch" and settings["n_technical_batches"] == 16
    model = from_pretrained(tmp_path / "out")
    assert isinstance(model, MaskedCellEncoder) and model.config.n_technical_batches == 16
    trained = full_weights(open_checkpoint(folder / "checkpoint_8"))
    assert all(torch.equal(tensor, trained[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_processes_train_alike_under_every_strategy(finished, of_two, strategy):
    folder = of_two(strategy)
    assert losses(folder) == pytest.approx(losses(finished("delayed_scaling")), rel=0.03)
    assert final_weights(folder)[EMBEDDING].shape == (3, 32)
    saved = open_checkpoint(folder / "checkpoint_8")
    one, two = (saved.rank("rank_state", rank)["fp8"] for rank in range(2))
    name = "transformer.layers.0.attention.qkv"
    assert not torch.equal(one[name]["inputs_amax_history"], two[name]["inputs_amax_history"])


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_two_processes_resume_exactly_and_one_process_goes_on_from_both(tmp_path, corpus, of_two, strategy):
    config = config_of(corpus, "delayed_scaling", phase={"epochs": 2})
    reference = of_two(strategy)
    folder = copy_until(reference, 4, tmp_path / "two")
    train_ranks(2, tmp_path / "two", config, strategy=strategy, resume_from=str(folder))
    assert comparable_records(folder) == comparable_records(reference) and same_weights(folder, reference)
    alone = copy_until(reference, 4, tmp_path / "one")
    train(tmp_path / "one", config, resume_from=str(alone))
    assert losses(alone) == pytest.approx(losses(reference), rel=0.01)


@pytest.mark.slow
def test_a_fresh_process_builds_fp8_layers_in_shards(tmp_path, corpus):
    config = config_of(corpus, "current_scaling", phase={"max_steps": 1})
    is_no_fork = {"ANY_VARIABLE": "1"}  # which would have imported torch's compiler
    train_ranks(1, tmp_path, config, strategy="zero3", env=is_no_fork)
    assert len(losses(newest_run(tmp_path))) == 1


def test_the_technical_batch_product_is_a_look_up_with_rounded_rows():
    plain = make_encoder(n_technical_batches=16, num_technical_batches=2).technical_batch_embedding
    ours = make_encoder(
        n_technical_batches=16, num_technical_batches=2, layer_backend="emulate"
    ).technical_batch_embedding
    index = torch.tensor([1, 0, 1])
    assert ours.weight.shape == plain.weight.shape == (2, 16)
    found, expected = ours(index), plain(index)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=2**-4, atol=1e-3)
    found.sum().backward()
    torch.testing.assert_close(ours.weight.grad, torch.tensor([1.0, 2.0])[:, None].expand(2, 16))


def test_the_technical_batches_can_be_left_out_of_fp8():
    model = make_encoder(layer_backend="emulate", exclude_layers=("technical_batch_embedding",))
    index = torch.tensor([1, 0])
    assert torch.equal(model.technical_batch_embedding(index), model.technical_batch_embedding.weight[index])


def test_layers_have_the_names_that_adapters_look_for():
    for backend in ("torch", "emulate"):
        names = {name.rpartition(".")[2] for name, _ in make_encoder(layer_backend=backend).named_modules()}
        assert {"out_proj", "linear1", "linear2"} <= names


def test_a_copied_model_remembers_on_its_own():
    model = make_encoder(hidden_dim=32, layer_backend="emulate", fp8_recipe="delayed_scaling")
    copied = copy.deepcopy(model)
    model.compute_loss(make_batch()).sum.backward()
    layer = "transformer.layers.0.mlp.linear1"
    assert fp8_state(copied)[layer]["inputs_scale"] == 1 != fp8_state(model)[layer]["inputs_scale"]


def test_sizes_that_fp8_does_not_take_are_refused_with_the_nearest_ones():
    with pytest.raises(
        ModelError, match="hidden_dim is 40; .* of 16, such as 32 or 48; ffn_dim is 8; .* such as 16$"
    ):
        EncoderConfig(vocab_size=10, hidden_dim=40, ffn_dim=8, num_heads=2, layer_backend="emulate")
    with pytest.raises(
        ModelError, match="hidden_dim is 48; FP8 layers need a multiple of 32, such as 32 or 64"
    ):
        EncoderConfig(vocab_size=10, hidden_dim=48, layer_backend="emulate", fp8_recipe="mxfp8")


@pytest.mark.parametrize("backend", ["te", "torchao"])
def test_a_backend_that_needs_a_gpu_is_refused_without_one(tmp_path, corpus, backend):
    config = config_of(corpus, precision="fp8", fp8={"backend": backend})
    with pytest.raises(ConfigError, match=f"fp8.backend: {backend} computes on a GPU, and .*emulate"):
        train(tmp_path, config)


def test_a_recipe_that_torchao_lacks_is_refused_by_name(tmp_path, corpus):
    fp8 = {"backend": "torchao", "recipe": "mxfp8"}
    with pytest.raises(ConfigError, match=r"fp8.recipe: mxfp8 with fp8.backend: torchao"):
        train(tmp_path, config_of(corpus, precision="fp8", fp8=fp8))


def test_a_model_without_fp8_layers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="takes no argument layer_backend"):
        train(tmp_path, toy({}, precision="fp8", fp8={"backend": "emulate"}))


@pytest.mark.parametrize(
    ("fp8", "name"), [({"exclude_layers": ["out"]}, "exclude_layers"), ({"recipe": "mxfp8"}, "fp8_recipe")]
)
def test_what_a_model_does_not_take_is_refused_only_where_it_is_asked_for(fp8, name):
    config = RunConfig.model_validate(
        toy({}, precision="fp8", fp8={"backend": "emulate"}, model={"model_class": f"{__name__}.OnlyBackend"})
    )
    assert build_model(config, DataFacts({"a": 0}, 1)).layer_backend == "emulate"
    asked = config.model_copy(update={"fp8": config.fp8.model_copy(update=fp8)})
    with pytest.raises(ConfigError, match=f"model.model_class takes no argument {name}"):
        build_model(asked, DataFacts({"a": 0}, 1))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_dim": 40, "num_heads": 2}, "hidden_dim is 40"),
        ({"hidden_dim": 32, "num_heads": 2, "ffn_dim": 50}, "ffn_dim is 50"),
    ],
)
def test_the_check_names_widths_that_fp8_cannot_have_without_data_or_device(tmp_path, capsys, sizes, message):
    from trainer.train import main

    model = {
        "model_class": "models.encoder.MaskedCellEncoder",
        "config_class": "models.encoder.EncoderConfig",
        "config_args": sizes,
    }
    phase = {"dataloader_factory": "data.loader.cell_loader", "dataloader_args": {}}
    phase["dataloader_args"] = {"path": "nowhere", "tokenizer": {"strategy": "rank_value"}}
    path = write_config(tmp_path, toy(phase, model=model), precision="fp8", fp8={"backend": "te"})
    assert main(["--config", str(path), "--check"]) == 2
    assert message in capsys.readouterr().err
