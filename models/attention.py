"""Attention within cells that are packed one after the other, in the fastest exact way that the device offers."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FLASH_TYPES = (torch.bfloat16, torch.float16)
_FLASH_CAPABILITY = (8, 0)
_FLASH_HEAD_MULTIPLE, _FLASH_HEAD_LIMIT = 8, 256


class AttentionSpans(NamedTuple):
    """Say which stretches of a row of tokens attend to themselves alone, in the form that attention kernels take.

    Attributes:
        cu_seqlens: [B + 1] int32, where each stretch begins, and at last where the last one ends.
        max_length: tokens of the longest stretch.
        num_tokens: where the last stretch ends, as a number that the host knows; tokens after it belong to none.
    """

    cu_seqlens: Tensor
    max_length: int
    num_tokens: int


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    dropout: float = 0.0,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Attend within each stretch, with `is_causal` to no later token; return [T, H, D] for [T, H, D] each.

    Tokens that belong to no stretch get zeros. No [T, T] matrix is made on any path.
    """
    end = spans.num_tokens
    real = q[:end], k[:end], v[:end]
    if q.is_cuda and flash_takes(q, dropout):
        attended = attend_by_flash(*real, spans, is_causal=is_causal)
    elif q.is_cuda or torch.compiler.is_compiling():
        # On a CPU too: a compiler would unroll the loop anew for all lengths it meets.
        attended = attend_padded(*real, spans, dropout, is_causal=is_causal)
    else:
        attended = attend_one_by_one(*real, spans, dropout, is_causal=is_causal)
    return F.pad(attended, (0, 0, 0, 0, 0, len(q) - end))


def attend_one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    dropout: float = 0.0,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Attend stretch by stretch: no work on padding. On a CPU, launching each costs little beside computing it."""
    lengths = spans.cu_seqlens.diff().tolist()
    parts = [
        F.scaled_dot_product_attention(
            *(part.transpose(0, 1).unsqueeze(0) for part in parts), dropout_p=dropout, is_causal=is_causal
        )
        for parts in zip(*(each.split(lengths) for each in (q, k, v)), strict=True)
    ]
    return torch.cat([part.squeeze(0).transpose(0, 1) for part in parts])


def attend_by_flash(
    q: Tensor, k: Tensor, v: Tensor, spans: AttentionSpans, *, is_causal: bool = False
) -> Tensor:
    """Attend with torch's flash kernel for stretches: no work on padding, in bf16 or fp16 on a GPU."""
    # Imported where it is used: with it comes torch's compiler, a second that a CPU need not wait.
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = spans.cu_seqlens, spans.max_length
    window = (-1, 0) if is_causal else (-1, -1)
    attended = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=window)
    assert isinstance(attended, Tensor)
    return attended


def attend_padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: AttentionSpans,
    dropout: float = 0.0,
    *,
    is_causal: bool = False,
) -> Tensor:
    """Attend with the stretches padded to the longest: where the flash kernel does not take the operands."""
    num_cells, length = len(spans.cu_seqlens) - 1, spans.max_length
    token = torch.arange(len(q), dtype=torch.int32, device=q.device)
    cell = torch.searchsorted(spans.cu_seqlens[1:], token, right=True)
    place = token - spans.cu_seqlens[cell] + cell * length

    def padded(x: Tensor) -> Tensor:
        rows = x.new_zeros(num_cells * length, *x.shape[1:]).index_copy(0, place, x)
        return rows.view(num_cells, length, *x.shape[1:]).transpose(1, 2)

    mask = None
    if not is_causal:  # padding is at the end, where no causal query looks
        mask = (torch.arange(length, device=q.device) < spans.cu_seqlens.diff()[:, None])[:, None, None, :]
    attended = F.scaled_dot_product_attention(
        padded(q), padded(k), padded(v), attn_mask=mask, dropout_p=dropout, is_causal=is_causal
    )
    return attended.transpose(1, 2).reshape(num_cells * length, *q.shape[1:])[place]


def flash_takes(q: Tensor, dropout: float) -> bool:
    """Tell whether the kernel for stretches takes these operands; it knows neither fp32 nor dropout."""
    head_dim = q.shape[-1]
    return (
        q.dtype in _FLASH_TYPES
        and dropout == 0
        and head_dim % _FLASH_HEAD_MULTIPLE == 0
        and head_dim <= _FLASH_HEAD_LIMIT
        and torch.cuda.get_device_capability(q.device) >= _FLASH_CAPABILITY
    )
