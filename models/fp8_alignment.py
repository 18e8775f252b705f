"""Sizes of FP8 matrix products: what a caller has to keep to, and tokens padded where they are ours to pad."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.fp8_scaling import Recipe

FP8_ALIGNMENT = 16  # FP8 matrix units read operands in groups of 16


def alignment(recipe: Recipe) -> int:
    """Return what every dimension of an FP8 product must be a multiple of."""
    return 32 if recipe == "mxfp8" else FP8_ALIGNMENT


def round_up(size: int, multiple: int) -> int:
    """Return the smallest multiple that is not below a size."""
    return -(-size // multiple) * multiple


def nearest_multiples(size: int, multiple: int) -> str:
    """Name the multiples on both sides of a size that is none."""
    below = size // multiple * multiple
    return f"{below} or {below + multiple}" if below else str(multiple)


def on_aligned_rows(function: Callable[[Tensor], Tensor], inputs: Tensor, multiple: int) -> Tensor:
    """Apply a function of rows to all tokens of [..., D], padded to a multiple of rows that are dropped after.

    The last token is repeated, and its copies get no gradient: no largest magnitude changes, whatever the function
    does to a row before it casts it.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    missing = -len(rows) % multiple
    if missing:
        padding = rows[-1:].detach().expand(missing, -1)
        output = function(torch.cat([rows, padding]))[: len(rows)]
    else:
        output = function(rows)
    return output.reshape(*inputs.shape[:-1], output.shape[-1])
