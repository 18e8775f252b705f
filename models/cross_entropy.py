"""Cross-entropy over a large vocabulary whose logits never stand in memory whole."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOGITS = 1 << 26
"""Logits that may stand at once: 256 MiB in fp32. Below, plain cross-entropy is faster."""


def rows_at_once(vocab_size: int) -> int:
    """Return how many rows of logits are computed at once."""
    return max(1, MAX_LOGITS // vocab_size)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *, ignore_index: int, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of `x @ weight.T + bias` against the labels, and the number of right guesses.

    Where there are more than `rows` rows (by default as many as fit `MAX_LOGITS`), logits are computed for so many at a
    time, and with them the gradients of `x`, `weight` and `bias`: nothing of size M x V is kept for the backward pass.
    The products of a chunk are in the autocast type, softmax and sums in fp32.

    Args:
        x: [M, D].
        weight: [V, D].
        bias: [V].
        labels: [M] int64; rows of `ignore_index` count nothing.
        ignore_index: a label that is none.
        rows: rows at once.
    """
    rows = rows_at_once(weight.shape[0]) if rows is None else rows
    if x.shape[0] <= rows:
        logits = F.linear(x, weight, bias)
        total = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=ignore_index)
        return total, (logits.detach().argmax(dim=-1) == labels).sum()
    if not torch.is_grad_enabled():  # which `needs_input_grad` does not tell: it is what the tensors require
        x, weight, bias = x.detach(), weight.detach(), bias.detach()
    total, correct = _ChunkedCrossEntropy.apply(x, weight, bias, labels, ignore_index, rows)  # pyright: ignore
    return total, correct


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Compute loss and gradients together, chunk by chunk; the backward pass only scales the gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, ignore_index: int, rows: int
    ) -> tuple[Tensor, Tensor]:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        needs_gradients = any(ctx.needs_input_grad[:3])
        x_gradient = torch.empty_like(x) if needs_gradients else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if needs_gradients else None
        bias_gradient = torch.zeros_like(bias, dtype=torch.float32) if needs_gradients else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        correct = torch.zeros((), dtype=torch.int64, device=x.device)
        with torch.autocast(device, enabled=False):
            low_weight = weight.to(dtype)
            for start in range(0, x.shape[0], rows):
                span = slice(start, start + rows)
                low_x, of_span = x[span].to(dtype), labels[span]
                logits = F.linear(low_x, low_weight, bias.to(dtype))
                correct += (logits.argmax(dim=-1) == of_span).sum()
                log_probabilities = F.log_softmax(logits.float(), dim=-1)
                is_counted = of_span != ignore_index
                index = torch.where(is_counted, of_span, 0).unsqueeze(1)
                total -= (log_probabilities.gather(1, index).squeeze(1) * is_counted).sum()
                if x_gradient is None or weight_gradient is None or bias_gradient is None:
                    continue
                gradient = log_probabilities.exp_()
                gradient.scatter_add_(1, index, -torch.ones_like(index, dtype=gradient.dtype))
                gradient *= is_counted.unsqueeze(1)
                bias_gradient += gradient.sum(dim=0)
                gradient = gradient.to(dtype)
                x_gradient[span] = (gradient @ low_weight).to(x.dtype)
                weight_gradient += (gradient.T @ low_x).float()
        if x_gradient is not None and weight_gradient is not None and bias_gradient is not None:
            ctx.save_for_backward(x_gradient, weight_gradient, bias_gradient)
            ctx.dtypes = (weight.dtype, bias.dtype)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        scale = gradients[0]
        x_gradient, weight_gradient, bias_gradient = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            (x_gradient * scale).to(x_gradient.dtype),
            (weight_gradient * scale).to(weight_dtype),
            (bias_gradient * scale).to(bias_dtype),
            None,
            None,
            None,
        )
