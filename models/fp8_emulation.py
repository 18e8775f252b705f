"""FP8 linear layers emulated on any device: values are cast and scaled as FP8 would, products are in fp32."""

import torch
import torch.nn.functional as F
from torch import Tensor

FORWARD_DTYPE = torch.float8_e4m3fn
BACKWARD_DTYPE = torch.float8_e5m2


def quantise(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cast a tensor to FP8 with one scale taken from its own largest magnitude (current scaling).

    Args:
        tensor: any floating point tensor.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.

    Returns:
        The FP8 values and the fp32 factor that turns them back into the original range. A tensor with a
        non-finite value comes back as NaN throughout, so that the check of loss and gradients sees it.
    """
    largest = torch.finfo(dtype).max
    tensor = tensor.float()
    amax = tensor.abs().amax() if tensor.numel() else tensor.new_zeros(())
    # An all-zero tensor keeps scale 1; a scale beyond fp32 (amax below 1e-36) is held at the largest finite one.
    scale = torch.where(amax == 0, torch.ones_like(amax), largest / amax)
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    # Clamped first: torch versions differ in whether an overflowing cast saturates or becomes NaN.
    return (tensor * scale).clamp(-largest, largest).to(dtype), scale.reciprocal()


def dequantise(values: Tensor, inverse_scale: Tensor) -> Tensor:
    """Turn the result of `quantise` back into fp32."""
    return values.float() * inverse_scale


class _Fp8Linear(torch.autograd.Function):
    """A linear layer whose three products (forward, input gradient, weight gradient) read FP8 operands."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = inputs.device.type
        output_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
        quantised_inputs = quantise(inputs, FORWARD_DTYPE)
        quantised_weight = quantise(weight, FORWARD_DTYPE)
        ctx.save_for_backward(*quantised_inputs, *quantised_weight)
        ctx.dtypes = (inputs.dtype, weight.dtype, None if bias is None else bias.dtype)
        with torch.autocast(device, enabled=False):
            output = F.linear(dequantise(*quantised_inputs), dequantise(*quantised_weight))
            if bias is not None:
                output = output + bias.float()
        return output.to(output_dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inputs, inputs_scale, weight, weight_scale = ctx.saved_tensors
        inputs_dtype, weight_dtype, bias_dtype = ctx.dtypes
        input_gradient = weight_gradient = bias_gradient = None
        with torch.autocast(gradient.device.type, enabled=False):
            quantised = dequantise(*quantise(gradient, BACKWARD_DTYPE))
            if ctx.needs_input_grad[0]:
                input_gradient = (quantised @ dequantise(weight, weight_scale)).to(inputs_dtype)
            if ctx.needs_input_grad[1]:
                rows = dequantise(inputs, inputs_scale).flatten(end_dim=-2)
                weight_gradient = (quantised.flatten(end_dim=-2).T @ rows).to(weight_dtype)
            if bias_dtype is not None and ctx.needs_input_grad[2]:
                # The bias gradient is a sum, not a product: it reads the gradient before its cast.
                bias_gradient = gradient.float().flatten(end_dim=-2).sum(dim=0).to(bias_dtype)
        return input_gradient, weight_gradient, bias_gradient


def fp8_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `inputs @ weight.T + bias` as an FP8 layer with current scaling would; see `F.linear`.

    Inputs and weight are read in E4M3, the gradient of the output in E5M2; gradients pass straight through
    the casts. The result has the autocast type where autocast is on, else that of `inputs`.
    """
    return _Fp8Linear.apply(inputs, weight, bias)  # pyright: ignore[reportReturnType]
