"""What a token of a cell is made of: gene, expression, depth; and what a network is told of noise: the time."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.fp8_alignment import FP8_ALIGNMENT, round_up
from models.layers import LayerFactory, Linear, LinearFunction, Norm

if TYPE_CHECKING:
    from models.model_config import ModelConfig
    from models.perturbation_config import PerturbationTransformerConfig


TIME_SCALE = 1000.0
"""Times of 0 to 1 are spread so far before their sines are taken: those of nearby times differ."""


class Embedding(nn.Embedding):
    """An embedding table initialised N(0, `init_std`); the row of `padding_idx` stays zero."""

    def __init__(self, num: int, dim: int, *, init_std: float, padding_idx: int | None = None) -> None:
        """Draw the table."""
        self.init_std = init_std
        super().__init__(num, dim, padding_idx=padding_idx)

    def reset_parameters(self) -> None:
        """Draw the table."""
        nn.init.normal_(self.weight, std=self.init_std)
        if self.padding_idx is not None:
            with torch.no_grad():
                self.weight[self.padding_idx].zero_()


class TechnicalBatchEmbedding(Embedding):
    """A vector for each technical batch: looked up, or under FP8 a product of one-hot rows with the table.

    The table has a row for each technical batch. The product needs a padded number of them, and gets rows of zeros:
    weights, optimizer state and checkpoints are the same with FP8 and without.
    """

    def __init__(
        self,
        num: int,
        dim: int,
        *,
        init_std: float,
        product: LinearFunction | None = None,
        padded_num: int = 0,
    ) -> None:
        """Draw the table; `product` multiplies rows with `padded_num` columns, or somewhat more, with it."""
        super().__init__(num, dim, init_std=init_std)
        self.linear_function = product
        # 32 is enough for every recipe; a run's count is padded to 16.
        self.padded_num = round_up(max(num, padded_num), 2 * FP8_ALIGNMENT)

    @classmethod
    def of_model(
        cls, config: "ModelConfig | PerturbationTransformerConfig", dim: int, factory: LayerFactory
    ) -> "TechnicalBatchEmbedding | None":
        """Build what a model calls `technical_batch_embedding`; None for one that knows no technical batches."""
        padded = config.n_technical_batches
        if not padded:
            return None
        return cls(
            padded if config.num_technical_batches is None else config.num_technical_batches,
            dim,
            init_std=config.init_std,
            product=factory.embedding_product("technical_batch_embedding", dim),
            padded_num=padded,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return [B, D] for indices [B]."""
        if self.linear_function is None:
            return super().forward(input)
        missing = self.padded_num - self.num_embeddings
        rows = F.pad(F.one_hot(input, self.num_embeddings).to(self.weight.dtype), (0, missing))
        return self.linear_function(rows, F.pad(self.weight.T, (0, missing)), None)


class BinEmbedding(nn.Module):
    """Scale and shift of a gene's vector for its expression bin; the last row stands for hidden expression."""

    def __init__(self, n_bins: int, dim: int, init_std: float) -> None:
        """Draw the tables."""
        super().__init__()
        self.scale = Embedding(n_bins + 1, dim, init_std=1.0)
        self.shift = Embedding(n_bins + 1, dim, init_std=init_std)

    def forward(self, gene_vectors: Tensor, bins: Tensor) -> Tensor:
        """Return [B, N, D] for gene vectors [B, N, D] and bins [B, N]."""
        # Scaled and not only shifted, so that a sum over genes already tells cells apart.
        return gene_vectors * (1 + self.scale(bins)) + self.shift(bins)


class ValueEmbedding(nn.Module):
    """Scale and shift of a gene's vector for its continuous expression; learned ones where it is hidden."""

    def __init__(self, dim: int, init_std: float) -> None:
        """Draw the weights."""
        super().__init__()
        self.linear1 = Linear(1, dim, init_std=1.0)
        self.linear2 = Linear(dim, 2 * dim, init_std=init_std)
        self.init_std = init_std
        self.hidden = nn.Parameter(torch.empty(2 * dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vector that stands for hidden expression; the linear layers draw their own."""
        nn.init.normal_(self.hidden, std=self.init_std)

    def forward(self, gene_vectors: Tensor, values: Tensor, is_hidden: Tensor) -> Tensor:
        """Return [B, N, D] for gene vectors [B, N, D] and values [B, N], not looking at hidden ones."""
        embedded = self.linear2(F.gelu(self.linear1(values.masked_fill(is_hidden, 0.0).unsqueeze(-1))))
        scale, shift = torch.where(is_hidden.unsqueeze(-1), self.hidden.to(embedded.dtype), embedded).chunk(
            2, dim=-1
        )
        return gene_vectors * (1 + scale) + shift


class DepthEmbedding(nn.Module):
    """Embed log1p of a cell's total as a smooth code of 32 overlapping bumps, one every 0.5."""

    NUM_CENTRES = 32
    SPACING = 0.5

    def __init__(self, dim: int, init_std: float) -> None:
        """Draw the weights."""
        super().__init__()
        self.linear = Linear(self.NUM_CENTRES, dim, init_std=init_std)

    def forward(self, depth: Tensor) -> Tensor:
        """Return [B, D] for depth [B]."""
        centres = self.SPACING * torch.arange(self.NUM_CENTRES, device=depth.device)
        return self.linear(torch.exp(-(((depth[:, None] - centres) / (2 * self.SPACING)) ** 2)))


class TimeEmbedding(nn.Module):
    """Embed a time of 0 to 1 by sines of many frequencies and an MLP."""

    NUM_FREQUENCIES = 128

    def __init__(self, dim: int, init_std: float) -> None:
        """Draw the weights."""
        super().__init__()
        self.linear1 = Linear(2 * self.NUM_FREQUENCIES, dim, init_std=init_std)
        self.linear2 = Linear(dim, dim, init_std=init_std)

    def forward(self, time: Tensor) -> Tensor:
        """Return [C, D] for times [C]."""
        place = torch.arange(self.NUM_FREQUENCIES, device=time.device) / self.NUM_FREQUENCIES
        angle = TIME_SCALE * time.float().unsqueeze(1) * torch.exp(-math.log(10_000.0) * place)
        return self.linear2(F.silu(self.linear1(torch.cat([angle.sin(), angle.cos()], dim=1))))


class BinWeight(Embedding):
    """How much a gene counts in a cell's summary, for its expression bin; the last row stands for hidden expression."""

    def __init__(self, n_bins: int, dim: int, init_std: float) -> None:
        """Draw the table."""
        super().__init__(n_bins + 1, dim, init_std=init_std)

    def reset_parameters(self) -> None:
        """Let unexpressed genes count against their vector and expressed ones for it, the more the higher the bin."""
        super().reset_parameters()
        n_bins = self.num_embeddings - 1
        with torch.no_grad():
            self.weight[:n_bins] += torch.linspace(-0.3, 0.7, n_bins).unsqueeze(1)


class CellSummary(nn.Module):
    """Sum up what a cell shows: each visible gene's vector, weighted by its expression, as one normalised vector.

    A linear view of the whole cell, as in factor analysis: what separates cell types is in it from the first steps
    on, while attention needs many more to find it.
    """

    def __init__(self, vocab_size: int, dim: int, n_bins: int | None, init_std: float) -> None:
        """Draw the tables; `n_bins` None weighs genes by continuous values."""
        super().__init__()
        self.gene = Embedding(vocab_size, dim, init_std=init_std)
        self.scale = None
        if n_bins is not None:
            self.scale = BinWeight(n_bins, dim, init_std)
        self.norm = Norm(dim)

    def forward(
        self,
        tokens: Tensor,
        expression: Tensor,
        is_visible: Tensor,
        add_up: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return [B, D].

        Args:
            tokens: [B, N] token ids.
            expression: [B, N] bins, or values where genes are weighed by these.
            is_visible: [B, N] bool, genes whose expression may be looked at.
            add_up: adds up over each cell, [B, D] of [B, N, D].
        """
        weight = expression.unsqueeze(-1) if self.scale is None else self.scale(expression)
        weighted = self.gene(tokens) * weight * is_visible.unsqueeze(-1)
        count = add_up(is_visible.unsqueeze(-1).float())
        return self.norm(add_up(weighted) / count.clamp(min=1).sqrt())
