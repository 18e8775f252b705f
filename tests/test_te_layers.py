"""Transformer Engine's layers against a stand-in with its signatures; what only a GPU shows is in benchmarks/GPU.md."""

import copy
import sys
import types

import fake_te
import pytest
import torch
from cell_batches import make_batch, make_encoder

from models import te_layers
from models.encoder import EncoderConfig
from models.errors import ModelError
from models.fp8_state import fp8_state, load_fp8_state
from models.layers import LayerFactory
from models.transformer import Transformer

SIZES = {"hidden_dim": 32, "num_heads": 2}


@pytest.fixture
def te(monkeypatch):
    yield fake_te.install(monkeypatch)
    fake_te.uninstall()


def both(**options):
    plain = make_encoder(**SIZES, **options)
    other = make_encoder(**SIZES, layer_backend="te", **options)
    other.load_state_dict(plain.state_dict())
    return plain, other


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("padded", [False, True])
def test_layers_of_both_kinds_load_each_others_weights_and_agree(te, padded, normalization):
    plain, other = both(normalization=normalization)
    assert plain.state_dict().keys() == other.state_dict().keys()
    batch = make_batch(target="gene", padded=padded)
    for key, value in plain(batch)._asdict().items():
        found = getattr(other(batch), key)
        if key == "hidden":
            value, found = value[batch["attention_mask"]], found[batch["attention_mask"]]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)
    assert ("attention", "padding" if padded else "no_mask") in fake_te.LOG
    plain.load_state_dict(other.state_dict())


def test_gradients_of_both_kinds_agree(te):
    gradients = []
    for model in both():
        model.compute_loss(make_batch(target="gene", padded=True)).sum.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], gradient, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m
        )


def test_a_forward_pass_is_one_region_and_its_products_have_aligned_sizes(te):
    model = both()[1]
    fake_te.LOG.clear()
    model(make_batch())
    assert [entry for entry in fake_te.LOG if entry[0] == "region"] == [("region", "Float8CurrentScaling")]
    products = [entry for entry in fake_te.LOG if entry[0] == "fp8"]
    assert len(products) == 2 * 4 + 1  # four layers a block, and the technical batches
    assert {shape for *_, shape, _ in products} == {(32, 32), (32, 128), (16, 32)}
    assert products[-1][1:] == ("Linear", (16, 32), (32, 32))


def test_packed_cells_attend_as_without_transformer_engine(te):
    from models.attention import AttentionSpans

    plain, other = both()
    spans = AttentionSpans(torch.tensor([0, 4, 9], dtype=torch.int32), 5, 9)
    x = torch.randn(1, 9, 32)
    torch.testing.assert_close(other.transformer(x, spans), plain.transformer(x, spans), rtol=1e-4, atol=1e-4)


def test_recomputation_is_transformer_engines_and_leaves_gradients_as_they_are(te):
    gradients = []
    for checkpointing in (False, True):
        model = make_encoder(**SIZES, layer_backend="te", activation_checkpointing=checkpointing)
        model.compute_loss(make_batch()).sum.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert ("checkpoint",) in fake_te.LOG
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_state_dict_holds_no_pickles_and_ignores_them(te):
    model = both()[1]
    state = model.state_dict()
    assert not any(name.endswith("_extra_state") for name in state)
    layer = "transformer.layers.0.attention.qkv"
    model.load_state_dict({**state, f"{layer}._extra_state": torch.ones(9, dtype=torch.uint8)})


def test_what_delayed_scaling_remembers_is_handed_over_as_tensors(te):
    model = make_encoder(**SIZES, layer_backend="te", fp8_recipe="delayed_scaling")
    model.compute_loss(make_batch()).sum.backward()
    state = fp8_state(model)
    assert len(state) == 9 and "technical_batch_embedding" in state
    saved = state["transformer.layers.1.mlp.linear2"]
    assert saved.keys() == {
        f"scaling_{way}_{part}" for way in ("fwd", "bwd") for part in ("scale", "amax_history")
    }
    assert saved["scaling_fwd_scale"][0] != 1 and saved["scaling_fwd_amax_history"][-1, 0] > 0
    fresh = make_encoder(seed=1, **SIZES, layer_backend="te", fp8_recipe="delayed_scaling")
    assert load_fp8_state(fresh, state) == []
    fresh.compute_loss(make_batch())
    model.load_state_dict(fresh.state_dict())
    load_fp8_state(model, state)
    model.compute_loss(make_batch())
    again, other = fp8_state(fresh), fp8_state(model)
    assert all(torch.equal(again[name][key], other[name][key]) for name in other for key in other[name])


def test_the_scales_of_another_backend_start_anew(te):
    emulated = make_encoder(**SIZES, layer_backend="emulate", fp8_recipe="delayed_scaling")
    model = make_encoder(**SIZES, layer_backend="te", fp8_recipe="delayed_scaling")
    anew = load_fp8_state(model, fp8_state(emulated))
    assert "transformer.layers.0.attention.qkv" in anew


def test_weights_are_drawn_as_ours_and_drawn_anew_in_place(te):
    torch.manual_seed(0)
    body = Transformer(128, 2, 4, 256, init_std=0.02, factory=LayerFactory("te"))
    layer = body.layers[0].mlp.linear2
    assert layer.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05) and not layer.bias.any()
    parameter, before = layer.weight, layer.weight.detach().clone()
    layer.reset_parameters()
    assert layer.weight is parameter and not torch.equal(parameter, before)
    assert parameter.std().item() == pytest.approx(0.02 / 2, rel=0.05)


def test_excluded_layers_are_torchs(te):
    body = Transformer(32, 1, 2, 64, factory=LayerFactory("te", ("*.out_proj",)))
    kinds = {name: type(layer).__module__ for name, layer in body.layers[0].named_modules() if "." in name}
    assert kinds["attention.out_proj"] == "models.layers" and kinds["mlp.linear2"] == "models.te_layers"


def test_a_model_of_these_layers_can_be_copied(te):
    model = both()[1]
    copied = copy.deepcopy(model)
    batch = make_batch()
    torch.testing.assert_close(copied(batch).hidden, model(batch).hidden)


def test_a_device_without_the_recipe_is_refused_with_transformer_engines_reason(te):
    with pytest.raises(ModelError, match="cannot compute mxfp8 on this device: .* 10.0 or higher required"):
        LayerFactory("te", recipe="mxfp8")


def test_no_gpu_is_refused_before_any_import(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    with pytest.raises(ModelError, match="te needs a CUDA device.*emulate"):
        LayerFactory("te")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("No module named 'transformer_engine'"), "cannot be imported.*cellphase.fp8"),
        (RuntimeError("cudnn shared object not found."), r"does not work here .RuntimeError: cudnn shared"),
        (FileNotFoundError("no extension"), r"does not work here .FileNotFoundError: no extension"),
    ],
)
def test_transformer_engine_that_cannot_be_used_is_refused_with_what_is_missing(monkeypatch, error, message):
    def fail(name):
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(te_layers, "importlib", types.SimpleNamespace(import_module=fail))
    te_layers.load.cache_clear()
    with pytest.raises(ModelError, match=message):
        LayerFactory("te")


def test_heads_that_attention_kernels_do_not_take_are_refused_with_those_they_do():
    with pytest.raises(ModelError, match="num_heads is 8, which makes heads of 12; .*: num_heads 6$"):
        EncoderConfig(vocab_size=10, hidden_dim=96, num_heads=8, layer_backend="te")
