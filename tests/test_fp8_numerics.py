"""What the FP8 recipes compute in emulation: scales, rounding, saturation, and what delayed scaling remembers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from models.errors import ModelError
from models.fp8_alignment import alignment, on_aligned_rows
from models.fp8_emulation import EmulatedLinear, fp8_linear
from models.fp8_numerics import E4M3, E5M2, quantise, quantise_blocks
from models.fp8_scaling import BlockScaling, CurrentScaling, DelayedScaling, MXScaling, recompute_contexts
from models.fp8_state import fp8_state, load_fp8_state, merged_fp8_state
from models.layers import LayerFactory
from models.transformer import Transformer

RECIPES = ["current_scaling", "delayed_scaling", "block_scaling", "mxfp8"]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def warmed_up(recipe, x, weight, gradient):
    """Return a layer that has run once, so that delayed scaling knows magnitudes."""
    layer = EmulatedLinear(recipe)
    layer(x.requires_grad_(), weight.requires_grad_()).backward(gradient)
    x.grad = weight.grad = None
    return layer


def test_each_block_has_its_own_power_of_two_and_edges_are_smaller_blocks():
    matrix = torch.tensor([[1.0, 2.0, 1000.0], [0.0, 0.0, 3.0]])
    cast = quantise_blocks(matrix, E4M3, (1, 2))
    # 448 / 2 = 224 -> 128; 448 / 1000 = 0.448 -> 0.25; zeros keep 1; 448 / 3 = 149.3 -> 128
    assert cast.inverse_scale.reciprocal().tolist() == [[128.0, 0.25], [1.0, 128.0]]
    assert torch.equal(cast.dequantise()[:, :2], matrix[:, :2])
    # 1000 * 0.25 = 250 lies between 240 and 256, the numbers of three mantissa bits there.
    assert cast.dequantise()[0, 2] == 256 / 0.25


@pytest.mark.parametrize("value", [1e-42, 3e38, 447.99, 448.0, 449.0])
def test_blocks_of_any_magnitude_stay_finite_and_near(value):
    cast = quantise_blocks(torch.full((2, 32), value), E4M3, (1, 32))
    assert cast.dequantise().isfinite().all()
    if value > 1e-30:
        assert ((cast.dequantise() - value).abs() <= 2**-4 * value).all()


def test_a_value_that_is_not_finite_makes_its_block_nan_and_no_other():
    matrix = torch.ones(2, 64)
    matrix[0, 3] = torch.inf
    found = quantise_blocks(matrix, E4M3, (1, 32)).dequantise().isnan()
    assert found[0, :32].all() and found.sum() == 32


def test_an_outlier_costs_the_precision_of_its_own_block_alone():
    x = drawn(4, 256) * 1e-3
    x[0, 0] = 1e4
    by_tensor = quantise(x, E4M3).dequantise()
    by_block = quantise_blocks(x, E4M3, (1, 128)).dequantise()
    assert not by_tensor[1:].any()
    torch.testing.assert_close(by_block[1:], x[1:], rtol=2**-4, atol=1e-7)


@pytest.mark.parametrize(
    ("scaling", "block", "gradient_type"),
    [(CurrentScaling(), None, E5M2), (BlockScaling(), 128, E4M3), (MXScaling(), 32, E4M3)],
)
def test_operands_have_the_recipes_types_and_blocks_along_what_is_added_up(scaling, block, gradient_type):
    x, weight, gradient = drawn(48, 160), drawn(96, 160), drawn(48, 96)
    forward = scaling.forward_operands(x, weight, is_recorded=True)
    for_inputs, for_weight = scaling.gradient_operands(gradient)
    assert {operand.values.dtype for operand in forward} == {E4M3}
    assert for_inputs.values.dtype == for_weight.values.dtype == gradient_type
    if block is None:
        return
    rows = 128 if block == 128 else 1
    assert forward.inputs.block == (1, block) and forward.weight.block == (rows, block)
    assert forward.inputs_in_backward.block == (block, 1)
    assert forward.weight_in_backward.block == (block, rows)
    assert for_inputs.block == (1, block) and for_weight.block == (block, 1)
    powers = torch.cat([o.inverse_scale.flatten() for o in (*forward, for_inputs, for_weight)]).log2()
    assert torch.equal(powers, powers.round())


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_and_gradients_err_by_little(recipe):
    x, weight, gradient = drawn(40, 160), drawn(96, 160, seed=1), drawn(40, 96, seed=2)
    layer = warmed_up(recipe, x, weight, gradient)
    output = layer(x, weight)
    output.backward(gradient)
    for found, exact, bound in (
        (output, x @ weight.T, 0.06),
        (x.grad, gradient @ weight, 0.1),
        (weight.grad, gradient.T @ x, 0.1),
    ):
        error = ((found - exact).norm() / exact.norm()).item()
        assert 0.005 < error < bound, (error, bound)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gradient_is_that_of_the_rounded_operands(recipe):
    x, weight, gradient = drawn(32, 64), drawn(96, 64, seed=1), drawn(32, 96, seed=2)
    bias = torch.zeros(96, requires_grad=True)
    layer = warmed_up(recipe, x, weight, gradient)
    twin = copy.deepcopy(layer.scaling)
    layer(x, weight, bias).backward(gradient)
    operands = twin.forward_operands(x.detach(), weight.detach(), is_recorded=True)
    for_inputs, for_weight = twin.gradient_operands(gradient)
    torch.testing.assert_close(x.grad, for_inputs.dequantise() @ operands.weight_in_backward.dequantise())
    torch.testing.assert_close(
        weight.grad, for_weight.dequantise().T @ operands.inputs_in_backward.dequantise()
    )
    torch.testing.assert_close(bias.grad, gradient.sum(dim=0))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_reach_the_output_and_the_gradients(recipe, value):
    x, weight = drawn(16, 32), drawn(32, 32, seed=1).requires_grad_()
    x[0, 0] = value
    layer = EmulatedLinear(recipe)
    output = layer(x.requires_grad_(), weight)
    assert not output.isfinite().all()
    gradient = torch.ones(16, 32)
    gradient[3, 3] = value
    layer(torch.ones(16, 32).requires_grad_(), weight).backward(gradient)
    assert weight.grad is not None and not weight.grad.isfinite().all()


def history_of(scaling, kind="inputs"):
    return scaling.state()[f"{kind}_amax_history"].tolist()


def test_delayed_scaling_lags_one_run_and_forgets_after_its_history():
    scaling = DelayedScaling(history_length=3)
    weight = torch.eye(16)
    used, remembered, largest = [], [], []
    for amax in (2.0, 8.0, 1.0, 1.0, 1.0):
        used.append(scaling.state()["inputs_scale"].item())
        x = torch.zeros(16, 16)
        x[0, 0] = amax
        output = fp8_linear(x.requires_grad_(), weight, None, scaling)
        largest.append(output.max().item())
        remembered.append(history_of(scaling))
    # Runs with the scale known before: 1, 448 / 2, 448 / 8 as long as 8 is among the last three, then 448 / 1.
    assert used == [1.0, 224.0, 56.0, 56.0, 56.0]
    assert scaling.state()["inputs_scale"].item() == 448.0
    # The second run's 8 is beyond what its scale reaches and saturates at 448 / 224.
    assert largest == [2.0, 2.0, 1.0, 1.0, 1.0]
    assert remembered == [[0, 0, 2], [0, 2, 8], [0, 8, 1], [0, 1, 1], [0, 1, 1]]


def test_delayed_scaling_remembers_gradients_in_their_own_type():
    scaling = DelayedScaling(history_length=4)
    x, weight = torch.ones(16, 16, requires_grad=True), torch.eye(16, requires_grad=True)
    fp8_linear(x, weight, None, scaling).backward(torch.full((16, 16), 2.0))
    assert scaling.state()["gradient_scale"].item() == torch.finfo(E5M2).max / 2
    assert history_of(scaling, "gradient") == [0, 0, 0, 2]


def test_delayed_scaling_remembers_nothing_of_evaluations_nor_of_values_that_are_not_finite():
    scaling = DelayedScaling(history_length=4)
    x, weight = torch.ones(16, 16), torch.eye(16)
    with torch.no_grad():
        fp8_linear(x, weight, None, scaling)
    assert not any(history_of(scaling))
    fp8_linear(x * torch.inf, weight, None, scaling)
    assert not any(history_of(scaling)) and scaling.state()["inputs_scale"] == 1


def test_a_recomputed_layer_casts_as_it_ran_and_remembers_it_once():
    weight = drawn(32, 32, seed=1).requires_grad_()
    results = []
    for recomputes in (False, True):
        layer = EmulatedLinear("delayed_scaling")
        weight.grad = None
        for step in range(3):
            x = (drawn(16, 32, seed=step) * 10**step).requires_grad_()
            if recomputes:
                output = checkpoint(layer, x, weight, use_reentrant=False, context_fn=recompute_contexts)
            else:
                output = layer(x, weight)
            output.square().sum().backward()
        results.append((weight.grad.clone(), layer.scaling_state()))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


def body(recipe="delayed_scaling", seed=0):
    torch.manual_seed(seed)
    return Transformer(32, 2, 2, 64, init_std=0.2, factory=LayerFactory("emulate", recipe=recipe))


def test_what_a_model_remembers_goes_on_exactly_in_another_one():
    one, x = body(), drawn(2, 5, 32)
    one(x).square().sum().backward()
    other = body(seed=1)
    other.load_state_dict(one.state_dict())
    assert load_fp8_state(other, fp8_state(one)) == []
    assert torch.equal(one(2 * x), other(2 * x))
    again, state = fp8_state(other), fp8_state(one)
    assert len(state) == 8 and all(torch.equal(again[n][k], state[n][k]) for n in state for k in state[n])


def test_recipes_without_memory_have_no_state_and_take_none():
    model = body("current_scaling")
    model(drawn(2, 5, 32)).sum().backward()
    assert fp8_state(model) == {} and load_fp8_state(model, fp8_state(body())) == []


def test_layers_of_which_nothing_is_known_start_anew_and_are_named():
    state = fp8_state(body())
    del state["layers.0.mlp.linear1"]
    assert load_fp8_state(body(), state) == ["layers.0.mlp.linear1"]


def test_a_state_of_another_length_is_refused():
    with pytest.raises(ModelError, match="with a history of 3"):
        DelayedScaling(3).load_state(DelayedScaling(4).state())


def test_the_memories_of_several_processes_merge_to_the_largest_magnitudes():
    states = []
    for amax in (2.0, 4.0):
        model = body()
        model(torch.full((1, 3, 32), amax) * drawn(1, 3, 32)).sum().backward()
        states.append(fp8_state(model))
    merged = merged_fp8_state(states)
    for layer, tensors in merged.items():
        for name, tensor in tensors.items():
            pick = torch.minimum if name.endswith("scale") else torch.maximum
            assert torch.equal(tensor, pick(states[0][layer][name], states[1][layer][name]))


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 33])
@pytest.mark.parametrize("recipe", RECIPES)
def test_padded_tokens_change_neither_output_nor_gradients(recipe, num_tokens):
    x, weight = drawn(num_tokens, 32).requires_grad_(), drawn(64, 32, seed=1).requires_grad_()
    seen, results = [], []

    def product(rows):
        seen.append(len(rows))
        return fp8_linear(rows, weight, None, EmulatedLinear(recipe).scaling)

    for multiple in (1, alignment(recipe)):
        x.grad = weight.grad = None
        output = on_aligned_rows(product, x, multiple)
        output.square().sum().backward()
        results.append((output.detach(), x.grad.clone(), weight.grad.clone()))
    assert seen[0] == num_tokens and seen[1] % alignment(recipe) == 0 and seen[1] - num_tokens < 32
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


def test_no_tokens_give_no_outputs_and_no_gradient():
    weight = drawn(32, 32).requires_grad_()
    for recipe in RECIPES:
        output = EmulatedLinear(recipe)(torch.zeros(0, 32, requires_grad=True), weight)
        output.sum().backward()
        assert output.shape == (0, 32) and not weight.grad.any()


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_what_scaling_remembers_stays_out_of_compiled_layers():
    layers = [LayerFactory("emulate", recipe="delayed_scaling").linear("layer", 32, 64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    compiled = []
    layers[1].compile(backend=lambda graph, _: compiled.append(str(graph.graph)) or graph.forward)
    for size in (1.0, 3.0):
        one, two = (layer(size * drawn(16, 32)) for layer in layers)
        assert torch.equal(one, two)
    assert compiled and not any("Fp8" in graph or "float8" in graph for graph in compiled)


def test_mxfp8_needs_multiples_of_32():
    with pytest.raises(ModelError, match="has 48 inputs; FP8 needs a multiple of 32, such as 32 or 64"):
        LayerFactory("emulate", recipe="mxfp8").linear("layer", 48, 32)


def test_torchao_rounds_as_the_emulation_of_current_scaling_does():
    pytest.importorskip("torchao.float8")
    from models.torchao_layers import TorchaoLinear

    results = []
    for layer in (TorchaoLinear(is_emulated=True), EmulatedLinear("current_scaling")):
        x, weight = drawn(2, 9, 32).requires_grad_(), drawn(64, 32, seed=1).requires_grad_()
        bias = drawn(64, seed=2).requires_grad_()
        output = layer(x, weight, bias)
        output.square().sum().backward()
        results.append((output.detach(), x.grad, weight.grad, bias.grad))
    assert not torch.equal(results[0][0], F.linear(x, weight, bias))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_torchao_under_autocast_returns_its_type():
    pytest.importorskip("torchao.float8")
    from models.torchao_layers import TorchaoLinear

    weight = drawn(32, 32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = TorchaoLinear(is_emulated=True)(drawn(3, 32), weight)
    output.sum().backward()
    assert output.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_torchao_that_is_missing_or_has_no_gpu_is_refused(monkeypatch):
    from models import torchao_layers

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torchao_layers.load.cache_clear()
    with pytest.raises(ModelError, match=r"needs torchao, which cannot be imported|needs a CUDA device"):
        LayerFactory("torchao")
    with pytest.raises(ModelError, match="knows the recipe current_scaling alone, not mxfp8"):
        LayerFactory("torchao", recipe="mxfp8")


def test_torchao_needs_a_device_with_fp8(monkeypatch):
    from models import torchao_layers

    monkeypatch.setattr(torchao_layers, "load", lambda: (object, object))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ModelError, match=r"compute capability 8.9, this one has 8.0"):
        LayerFactory("torchao")
