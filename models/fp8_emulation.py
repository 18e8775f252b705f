"""FP8 linear layers emulated on any device: values are cast and scaled as FP8 would, products are in fp32."""

from collections.abc import Callable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models.fp8_alignment import alignment, on_aligned_rows
from models.fp8_numerics import Quantised
from models.fp8_scaling import CurrentScaling, Recipe, Scaling, make_scaling
from models.fp8_switch import switch


class _Fp8Linear(torch.autograd.Function):
    """A linear layer whose three products (forward, input gradient, weight gradient) read FP8 operands."""

    @staticmethod
    def forward(
        ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None, scaling: Scaling, is_recorded: bool
    ) -> Tensor:
        device = inputs.device.type
        output_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        operands = scaling.forward_operands(inputs, weight, is_recorded=is_recorded)
        kept = operands.inputs_in_backward, operands.weight_in_backward
        ctx.save_for_backward(*(tensor for operand in kept for tensor in operand[:2]))
        ctx.blocks = [operand.block for operand in kept]
        ctx.scaling = scaling
        ctx.dtypes = (inputs.dtype, weight.dtype, None if bias is None else bias.dtype)
        with torch.autocast(device, enabled=False):
            output = F.linear(operands.inputs.dequantise(), operands.weight.dequantise())
            if bias is not None:
                output = output + bias.float()
        return output.to(output_dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        saved = ctx.saved_tensors
        inputs = Quantised(saved[0], saved[1], ctx.blocks[0])
        weight = Quantised(saved[2], saved[3], ctx.blocks[1])
        inputs_dtype, weight_dtype, bias_dtype = ctx.dtypes
        input_gradient = weight_gradient = bias_gradient = None
        with torch.autocast(gradient.device.type, enabled=False):
            for_inputs, for_weight = ctx.scaling.gradient_operands(gradient)
            if ctx.needs_input_grad[0]:
                input_gradient = (for_inputs.dequantise() @ weight.dequantise()).to(inputs_dtype)
            if ctx.needs_input_grad[1]:
                weight_gradient = (for_weight.dequantise().T @ inputs.dequantise()).to(weight_dtype)
            if bias_dtype is not None and ctx.needs_input_grad[2]:
                # The bias gradient is a sum, not a product: it reads the gradient before its cast.
                bias_gradient = gradient.float().sum(dim=0).to(bias_dtype)
        return input_gradient, weight_gradient, bias_gradient, None, None


def fp8_linear(
    inputs: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scaling: Scaling | None = None,
    product: Callable[..., Tensor] = _Fp8Linear.apply,
) -> Tensor:
    """Compute `inputs @ weight.T + bias` as an FP8 layer would; see `F.linear`.

    Gradients pass straight through the casts. The result has the autocast type where autocast is on, else that of
    `inputs`. Without `scaling` each tensor is scaled by its own largest magnitude. A layer gives the `product` that
    compilers pass over.
    """
    scaling = CurrentScaling() if scaling is None else scaling
    rows = inputs.reshape(-1, inputs.shape[-1])
    output = product(rows, weight, bias, scaling, torch.is_grad_enabled())
    return output.reshape(*inputs.shape[:-1], output.shape[-1])


class EmulatedLinear:
    """Stand for `F.linear` in one layer: casts by a recipe, and what the recipe remembers of the layer."""

    def __init__(self, recipe: Recipe = "current_scaling") -> None:
        """Take the recipe."""
        self.recipe: Recipe = recipe
        self.scaling = make_scaling(recipe)
        # What delayed scaling remembers is Python state, which a compiler would not keep in order. This imports the
        # compiler, a second that layers in other types need not wait.
        self._product = cast(Callable[..., Tensor], torch.compiler.disable(_Fp8Linear.apply))

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `inputs @ weight.T + bias` on padded rows, as a device would have to."""
        if not switch.is_on:
            return F.linear(inputs, weight, bias)
        return on_aligned_rows(
            lambda rows: fp8_linear(rows, weight, bias, self.scaling, self._product),
            inputs,
            alignment(self.recipe),
        )

    def scaling_state(self) -> dict[str, Tensor]:
        """Return what the recipe remembers of the layer."""
        return self.scaling.state()

    def load_scaling_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `scaling_state` returned."""
        self.scaling.load_state(state)
