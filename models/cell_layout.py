"""Where the tokens of each cell lie in a batch, padded or packed, and what a model does by cell with them."""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import AttentionSpans
from models.errors import ModelError


class PaddedCells:
    """Cells in rows of one length: tokens [B, N], and `attention_mask` [B, N] that says which are real."""

    def __init__(self, batch: dict[str, Any]) -> None:
        """Look at a batch."""
        self.is_real: Tensor = batch["attention_mask"]
        self.max_length: int = self.is_real.shape[1]
        # Without padding the attention kernels that take no mask can be used; the count is a Python number.
        is_padded = batch.get("num_tokens") != self.is_real.numel()
        self.attention: Tensor | AttentionSpans | None = self.is_real if is_padded else None

    def positions(self) -> Tensor:
        """Return each token's position in its cell, [N]."""
        return torch.arange(self.max_length, device=self.is_real.device)

    def cells_of(self, index: Tensor) -> Tensor:
        """Return the cell [M] of each of some flat positions [M]."""
        return index // self.max_length

    def first(self, x: Tensor) -> Tensor:
        """Return what stands at each cell's first token: [B, ...] of [B, N, ...]."""
        return x[:, 0]

    def last(self, x: Tensor) -> Tensor:
        """Return what stands at each cell's last token: [B, D] of [B, N, D]."""
        index = (self.is_real.sum(dim=1) - 1).clamp(min=0)
        return x.gather(1, index[:, None, None].expand(-1, 1, x.shape[-1])).squeeze(1)

    def has_next(self) -> Tensor:
        """Tell of each token whether another one of its cell follows, [B, N]."""
        return F.pad(self.is_real[:, :-1] & self.is_real[:, 1:], (0, 1))

    def spread(self, cells: Tensor) -> Tensor:
        """Give each token what its cell has: [B, 1, D], which broadcasts, of [B, D]."""
        return cells.unsqueeze(1)

    def sum(self, x: Tensor) -> Tensor:
        """Add up over the tokens of each cell: [B, D] of [B, N, D]."""
        return x.sum(dim=1)


class PackedCells:
    """Cells one after the other in one row: tokens [1, T], bounded by `cu_seqlens` [B + 1]."""

    def __init__(self, batch: dict[str, Any]) -> None:
        """Look at a batch."""
        tokens, bounds = batch["tokens"], batch["cu_seqlens"]
        self.max_length = int(batch["max_length"])
        self.num_tokens = int(batch["num_tokens"])
        self.bounds = bounds.long()
        self.attention: Tensor | AttentionSpans | None = AttentionSpans(
            bounds, self.max_length, self.num_tokens
        )
        self._token = torch.arange(tokens.shape[1], device=tokens.device)

    @cached_property
    def is_real(self) -> Tensor:
        """Tell of each token whether it belongs to a cell, [1, T]."""
        return (self._token < self.num_tokens).unsqueeze(0)

    @cached_property
    def cell(self) -> Tensor:
        """Give each token's cell, [T]."""
        # Tokens after the last cell go along with it; nothing reads what comes of them.
        return self.cells_of(self._token).clamp(max=len(self.bounds) - 2)

    def positions(self) -> Tensor:
        """Return each token's position in its cell, [T]."""
        return (self._token - self.bounds[self.cell]).clamp(max=self.max_length - 1)

    def cells_of(self, index: Tensor) -> Tensor:
        """Return the cell [M] of each of some flat positions [M]."""
        return torch.searchsorted(self.bounds[1:], index, right=True)

    def first(self, x: Tensor) -> Tensor:
        """Return what stands at each cell's first token: [B, ...] of [1, T, ...]."""
        return x[0, self.bounds[:-1]]

    def last(self, x: Tensor) -> Tensor:
        """Return what stands at each cell's last token: [B, D] of [1, T, D]."""
        return x[0, self.bounds[1:] - 1]

    def has_next(self) -> Tensor:
        """Tell of each token whether another one of its cell follows, [1, T]."""
        return self.is_real & (self._token + 1 < self.bounds[1:][self.cell]).unsqueeze(0)

    def spread(self, cells: Tensor) -> Tensor:
        """Give each token what its cell has: [1, T, D] of [B, D]."""
        # As a look-up in a table: its gradient adds up in a fixed order on a GPU too, unlike that of indexing.
        return F.embedding(self.cell, cells).unsqueeze(0)

    def sum(self, x: Tensor) -> Tensor:
        """Add up over the tokens of each cell: [B, D] of [1, T, D]."""
        real = x[0, : self.num_tokens].float()
        return torch.segment_reduce(real, "sum", lengths=self.bounds.diff(), axis=0, unsafe=True).to(x.dtype)


def cell_layout(batch: dict[str, Any]) -> PaddedCells | PackedCells:
    """Return how a batch's cells lie."""
    if "cu_seqlens" in batch:
        return PackedCells(batch)
    if "attention_mask" in batch:
        return PaddedCells(batch)
    raise ModelError(
        f"the batch has neither 'attention_mask' nor 'cu_seqlens' (it has {', '.join(sorted(batch))}), so its cells "
        "cannot be told from padding"
    )
