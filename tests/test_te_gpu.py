"""Transformer Engine and torchao on a GPU: FP8 layers against their emulation. Not run where there is no GPU."""

import pytest
import torch
from cell_batches import make_batch, make_encoder
from running import comparable_records, copy_until, losses, same_weights, train
from test_fp8 import config_of, corpus  # noqa: F401

from models.errors import ModelError
from models.fp8_state import fp8_state
from models.layers import LayerFactory

pytestmark = pytest.mark.gpu
RECIPES = ["current_scaling", "delayed_scaling", "block_scaling", "mxfp8"]
SIZES = {"hidden_dim": 64, "num_heads": 2}


def skip_unless_available(backend, recipe="current_scaling"):
    try:
        LayerFactory(backend, recipe=recipe)
    except ModelError as error:
        pytest.skip(str(error))


def on_device(batch):
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def gradients_of(model, steps=3):
    for step in range(steps):
        model.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model.compute_loss(on_device(make_batch(target="gene", padded=True, seed=step))).sum
        loss.backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("backend", "recipe"), [*(("te", recipe) for recipe in RECIPES), ("torchao", "current_scaling")]
)
def test_gradients_are_those_of_the_emulation(backend, recipe):
    skip_unless_available(backend, recipe)
    emulated = make_encoder(**SIZES, layer_backend="emulate", fp8_recipe=recipe).cuda()
    real = make_encoder(**SIZES, layer_backend=backend, fp8_recipe=recipe).cuda()
    real.load_state_dict(emulated.state_dict())
    expected, found = gradients_of(emulated), gradients_of(real)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 0.15, (name, error.item())


@pytest.mark.parametrize("recipe", ["current_scaling", "delayed_scaling"])
def test_recomputation_leaves_gradients_and_scales_as_they_are(recipe):
    skip_unless_available("te", recipe)
    results = []
    for checkpointing in (False, True):
        model = make_encoder(
            **SIZES, layer_backend="te", fp8_recipe=recipe, activation_checkpointing=checkpointing
        ).cuda()
        results.append((gradients_of(model), fp8_state(model)))
    for name, gradient in results[0][0].items():
        torch.testing.assert_close(results[1][0][name], gradient, rtol=1e-3, atol=1e-3)
    for layer, tensors in results[0][1].items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(results[1][1][layer][name], tensor)


def test_a_resumed_run_of_delayed_scaling_equals_one_that_was_not_interrupted(tmp_path, corpus):  # noqa: F811
    skip_unless_available("te", "delayed_scaling")
    fp8 = {"backend": "te", "recipe": "delayed_scaling"}
    config = config_of(corpus, phase={"epochs": 2}, precision="fp8", fp8=fp8, device="cuda")
    reference = train(tmp_path / "a", config)
    assert losses(reference)[-1] < losses(reference)[0]
    folder = copy_until(reference, 2, tmp_path / "b")
    train(tmp_path / "b", config, resume_from=str(folder))
    assert comparable_records(folder) == comparable_records(reference) and same_weights(folder, reference)
