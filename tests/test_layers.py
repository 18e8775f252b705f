import copy

import pytest
import torch
import torch.nn.functional as F
from launching import run_command
from torch import nn

from models.fp8_emulation import fp8_linear
from models.fp8_numerics import quantise
from models.fp8_state import fp8_state
from models.layers import MLP, LayerFactory, Linear, Norm, NormLinear, SelfAttention
from models.transformer import Transformer


def attention(**options) -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(16, 4, init_std=0.3, **options)


def reference_attention(module: SelfAttention, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    B, N, D = x.shape
    normed = F.layer_norm(x, (D,), module.qkv.layer_norm_weight, module.qkv.layer_norm_bias)
    q, k, v = F.linear(normed, module.qkv.weight, module.qkv.bias).chunk(3, dim=-1)
    heads = [t.view(B, N, module.num_heads, -1).transpose(1, 2) for t in (q, k, v)]
    scores = heads[0] @ heads[1].transpose(-1, -2) / heads[0].shape[-1] ** 0.5
    scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    mixed = (scores.softmax(dim=-1) @ heads[2]).transpose(1, 2).reshape(B, N, D)
    return F.linear(mixed, module.out_proj.weight, module.out_proj.bias)


def test_attention_equals_the_written_out_formula():
    module = attention()
    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool()
    torch.testing.assert_close(module(x, mask), reference_attention(module, x, mask))


def test_attention_without_mask_equals_attention_with_a_full_mask():
    module = attention()
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(module(x), module(x, torch.ones(2, 5, dtype=torch.bool)))


def test_attention_does_not_look_at_padding():
    module = attention()
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    changed = x.clone()
    changed[0, 3:] = 100.0
    torch.testing.assert_close(module(x, mask)[0, :3], module(changed, mask)[0, :3])


def test_a_row_of_padding_alone_gives_finite_numbers_and_gradients():
    module = attention()
    x = torch.randn(2, 4, 16, requires_grad=True)
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    output = module(x, mask)
    output.sum().backward()
    assert output.isfinite().all()
    assert x.grad is not None and x.grad.isfinite().all()


def test_attention_dropout_acts_in_training_only():
    module = attention(dropout=0.5)
    x = torch.randn(2, 6, 16)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width 10 is not divisible by 4"):
        SelfAttention(10, 4)


def test_norm_linear_is_the_norm_then_the_linear_layer():
    module = NormLinear(8, 6, init_std=0.5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    norm, linear = nn.LayerNorm(8), nn.Linear(8, 6)
    norm.load_state_dict({"weight": module.layer_norm_weight, "bias": module.layer_norm_bias})
    linear.load_state_dict({"weight": module.weight, "bias": module.bias})
    x = torch.randn(4, 8)
    torch.testing.assert_close(module(x), linear(norm(x)))


def test_rms_norm_has_no_bias_and_keeps_the_mean():
    module = NormLinear(8, 6, normalization="RMSNorm")
    assert [name for name, _ in module.named_parameters()] == ["layer_norm_weight", "weight", "bias"]
    x = torch.randn(4, 8)
    torch.testing.assert_close(module.normalise(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert Norm(8, "RMSNorm").bias is None


def test_parameter_names_are_those_of_transformer_engine():
    names = {name for name, _ in Transformer(16, 1, 2, 32).named_parameters()}
    norm_linear = {"layer_norm_weight", "layer_norm_bias", "weight", "bias"}
    expected = {f"layers.0.attention.qkv.{name}" for name in norm_linear}
    expected |= {f"layers.0.mlp.linear1.{name}" for name in norm_linear}
    expected |= {
        f"layers.0.{layer}.{name}"
        for layer in ("attention.out_proj", "mlp.linear2")
        for name in ("weight", "bias")
    }
    assert names == expected | {"final_norm.weight", "final_norm.bias"}


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_mlp_is_linear_activation_linear(activation):
    module = MLP(8, 12, activation=activation, init_std=0.4)
    x = torch.randn(3, 8)
    torch.testing.assert_close(module(x), module.linear2(getattr(F, activation)(module.linear1(x))))


def test_swiglu_gates_the_second_half_with_the_first():
    module = MLP(8, 12, activation="swiglu", init_std=0.4)
    inner = module.linear1(torch.ones(3, 8).cumsum(-1))
    assert inner.shape == (3, 24)
    expected = module.linear2(F.silu(inner[:, :12]) * inner[:, 12:])
    torch.testing.assert_close(module(torch.ones(3, 8).cumsum(-1)), expected)


def test_unknown_activation_is_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="activation is 'tanh'; allowed: gelu, relu, silu, swiglu"):
        MLP(8, 12, activation="tanh")


def test_weights_start_with_the_std_and_scaled_residual_projections():
    torch.manual_seed(0)
    body = Transformer(128, 8, 4, 256, init_std=0.02)
    first = body.layers[0]
    for weight, std in (
        (first.attention.qkv.weight, 0.02),
        (first.mlp.linear1.weight, 0.02),
        (first.attention.out_proj.weight, 0.02 / 4),
        (first.mlp.linear2.weight, 0.02 / 4),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert not first.attention.qkv.bias.any()


def trained_once(body: Transformer, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    body(x, mask).square().sum().backward()
    return {name: p.grad for name, p in body.named_parameters() if p.grad is not None}


def test_activation_checkpointing_leaves_every_gradient_as_it_is():
    torch.manual_seed(0)
    options = {"dropout": 0.3, "attention_dropout": 0.2, "init_std": 0.2}
    plain = Transformer(16, 4, 4, 32, **options)
    saving = copy.deepcopy(plain)
    saving.activation_checkpointing = True
    x = torch.randn(2, 6, 16)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    expected, found = trained_once(plain, x, mask), trained_once(saving, x, mask)
    assert expected.keys() == found.keys() == dict(plain.named_parameters()).keys()
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name
    norms = [expected[f"layers.{i}.attention.qkv.weight"].norm().item() for i in range(4)]
    assert len(set(norms)) == 4 and min(norms) > 0


def test_activation_checkpointing_runs_each_block_twice():
    body = Transformer(16, 2, 4, 32, activation_checkpointing=True)
    calls = []
    for index, layer in enumerate(body.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    body(torch.randn(1, 3, 16)).sum().backward()
    assert calls == [0, 1, 1, 0]


def test_quantised_values_are_scaled_to_the_full_range():
    x = torch.tensor([0.5, -2.0, 1.0])
    cast = quantise(x, torch.float8_e4m3fn)
    assert cast.values.dtype == torch.float8_e4m3fn
    assert cast.values.float().tolist() == [112.0, -448.0, 224.0]
    assert torch.equal(cast.dequantise(), x)


@pytest.mark.parametrize("dtype, relative", [(torch.float8_e4m3fn, 2**-4), (torch.float8_e5m2, 2**-3)])
def test_quantising_errs_by_no_more_than_the_mantissa(dtype, relative):
    torch.manual_seed(0)
    x = torch.randn(1000)
    error = (quantise(x, dtype).dequantise() - x).abs()
    assert (error <= relative * x.abs() + 1e-4 * x.abs().max()).all()
    assert error.max() > 0


@pytest.mark.parametrize("value", [0.0, 1e-42, 3e38])
def test_quantising_extreme_tensors_stays_finite(value):
    assert quantise(torch.full((3,), value), torch.float8_e4m3fn).dequantise().isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_visible(value):
    assert quantise(torch.tensor([1.0, value]), torch.float8_e4m3fn).dequantise().isnan().any()


def test_fp8_linear_reads_all_its_operands_in_fp8():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, requires_grad=True)
    weight = torch.randn(32, 16, requires_grad=True)
    bias = torch.randn(32, requires_grad=True)
    output = fp8_linear(x, weight, bias)
    qx, qw = (quantise(t.detach(), torch.float8_e4m3fn).dequantise() for t in (x, weight))
    torch.testing.assert_close(output, qx @ qw.T + bias)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    qg = quantise(gradient, torch.float8_e5m2).dequantise()
    torch.testing.assert_close(x.grad, qg @ qw)
    torch.testing.assert_close(weight.grad, qg.flatten(0, 1).T @ qx.flatten(0, 1))
    torch.testing.assert_close(bias.grad, gradient.sum((0, 1)))
    assert not torch.allclose(output, F.linear(x, weight, bias), atol=1e-6)


def test_fp8_linear_under_autocast_computes_in_fp32_and_returns_bf16():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 16), torch.randn(16, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fp8_linear(x, weight)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, fp8_linear(x, weight).bfloat16())
    output.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_layers_without_fp8_import_no_compiler():
    code = "import sys, models.layers as m; m.LayerFactory().linear('a', 2, 2); print('torch._dynamo' in sys.modules)"
    assert run_command(["python", "-c", code]).stdout.strip() == "False"


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # the compiler looks at it
def test_a_compiler_passes_over_what_delayed_scaling_remembers():
    def trained(compile):
        torch.manual_seed(0)
        body = Transformer(
            16, 1, 2, 32, init_std=0.2, factory=LayerFactory("emulate", recipe="delayed_scaling")
        )
        run = torch.compile(body, backend="eager") if compile else body
        for step in range(3):
            run((torch.ones(2, 16, 16).cumsum(1) * 10**step).sin()).square().sum().backward()
        return [p.grad for p in body.parameters()], fp8_state(body)

    (plain, remembered), (compiled, state) = trained(False), trained(True)
    torch.testing.assert_close(compiled, plain)
    torch.testing.assert_close(state, remembered)


def test_emulated_layers_differ_from_plain_ones_a_little_and_excluded_ones_not():
    def outputs(factory: LayerFactory | None) -> torch.Tensor:
        torch.manual_seed(0)
        body = Transformer(16, 2, 4, 32, init_std=0.2, factory=factory)
        return body(torch.ones(1, 5, 16).cumsum(1).cumsum(2).sin())

    plain, emulated = outputs(None), outputs(LayerFactory("emulate"))
    assert not torch.equal(plain, emulated)
    assert (plain - emulated).norm() < 0.1 * plain.norm()
    assert torch.equal(plain, outputs(LayerFactory("emulate", ("layers.*",))))


def test_emulated_and_plain_layers_load_each_others_weights():
    plain = Transformer(16, 1, 4, 32)
    emulated = Transformer(16, 1, 4, 32, factory=LayerFactory("emulate"))
    emulated.load_state_dict(plain.state_dict())


def test_exclusion_that_fits_no_layer_is_refused_with_the_layers():
    with pytest.raises(ValueError, match=r"'\*.fc1' fits no layer; the layers are layers.0.attention.qkv"):
        Transformer(16, 1, 4, 32, factory=LayerFactory("emulate", ("*.fc1",)))


def test_fp8_dimension_that_is_no_multiple_of_16_names_the_layer():
    with pytest.raises(ValueError, match="layers.0.mlp.linear1 has 40 outputs; FP8 needs a multiple of 16"):
        Transformer(16, 1, 4, 40, factory=LayerFactory("emulate"))
    Transformer(16, 1, 4, 40, factory=LayerFactory("emulate", ("*.linear1", "*.linear2")))


def test_exclusions_without_fp8_are_refused():
    with pytest.raises(ValueError, match="backend torch has no FP8 layers"):
        LayerFactory("torch", ("*.linear1",))


def test_linear_is_an_ordinary_linear_layer_for_adapters():
    module = Linear(4, 3)
    assert isinstance(module, nn.Linear)
    assert not isinstance(NormLinear(4, 3), nn.Linear)
