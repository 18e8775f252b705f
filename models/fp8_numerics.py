"""FP8 casts, for a whole tensor or in blocks: the arithmetic that every recipe is made of."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_FP32_MAX = torch.finfo(torch.float32).max


class Quantised(NamedTuple):
    """Hold FP8 values and the fp32 factors that turn them back, one for the tensor or one for each block.

    Attributes:
        values: the FP8 values.
        inverse_scale: 0-d, or [ceil(rows / block rows), ceil(columns / block columns)].
        block: rows and columns that share a factor; None: all.
    """

    values: Tensor
    inverse_scale: Tensor
    block: tuple[int, int] | None = None

    def dequantise(self) -> Tensor:
        """Return the values in fp32."""
        if self.block is None:
            return self.values.float() * self.inverse_scale
        return self.values.float() * _spread(self.inverse_scale, self.block, self.values.shape)


def magnitude(tensor: Tensor) -> Tensor:
    """Return the largest magnitude of a tensor as fp32, 0 of an empty one; NaN where a value is NaN."""
    return (
        tensor.detach().abs().amax().float() if tensor.numel() else tensor.new_zeros((), dtype=torch.float32)
    )


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the factor that brings `amax` to the largest FP8 number; 1 where it is zero."""
    # A scale beyond fp32 (amax below 1e-36) is held at the largest finite one.
    scale = torch.where(amax == 0, torch.ones_like(amax), torch.finfo(dtype).max / amax)
    return scale.clamp(max=_FP32_MAX)


def quantise(tensor: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Quantised:
    """Cast a tensor to FP8 with one scale.

    Args:
        tensor: any floating point tensor.
        dtype: `torch.float8_e4m3fn` or `torch.float8_e5m2`.
        scale: what values are multiplied with before the cast, which saturates; None: taken from the tensor's own
            largest magnitude. A tensor with a non-finite value then comes back as NaN throughout, so that the check of
            loss and gradients sees it; with a given scale the infinite values alone become NaN.
    """
    tensor = tensor.float()
    if scale is None:
        scale = scale_for(magnitude(tensor), dtype)
    else:
        tensor = torch.where(tensor.isinf(), torch.nan, tensor)
    return Quantised(_cast(tensor * scale, dtype), scale.reciprocal())


def quantise_blocks(matrix: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Quantised:
    """Cast a matrix to FP8 with one power of two for each block, the largest that does not saturate.

    A block with a non-finite value comes back as NaN throughout; blocks at the edges may be smaller.
    """
    matrix = matrix.float()
    rows, columns = matrix.shape
    padded = F.pad(matrix, (0, -columns % block[1], 0, -rows % block[0]))
    tiles = padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    scale = scale_for(tiles.abs().amax(dim=(1, 3)), dtype)
    # frexp gives a mantissa in [0.5, 1): the power of two at or below the scale is one less than its exponent. Both
    # the scale and its inverse stay normal numbers, as an exponent of 8 bits demands.
    exponent = (torch.frexp(scale).exponent - 1).clamp(-126, 126)
    power = torch.where(
        scale.isfinite() & (scale > 0), torch.ldexp(torch.ones_like(scale), exponent), torch.nan
    )
    values = _cast(matrix * _spread(power, block, matrix.shape), dtype)
    return Quantised(values, power.reciprocal(), block)


def _cast(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    # Clamped first: torch versions differ in whether an overflowing cast saturates or becomes NaN.
    largest = torch.finfo(dtype).max
    return scaled.clamp(-largest, largest).to(dtype)


def _spread(factors: Tensor, block: tuple[int, int], shape: torch.Size) -> Tensor:
    spread = factors.repeat_interleave(block[0], dim=0)[: shape[0]]
    return spread.repeat_interleave(block[1], dim=1)[:, : shape[1]]
