"""Attention of one set of tokens to another: how many genes are compressed into few latents, and read out again."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.layers import LayerFactory, Normalization


class CrossAttention(nn.Module):
    """Multi-head attention of `x` to a context; `q` and `kv` hold the norms of both.

    Args:
        dim: width of `x` and of the result.
        context_dim: width of the context.
        inner_dim: width of queries, keys and values over all heads.
        num_heads: attention heads; must divide `inner_dim`.
        init_std: standard deviation of the initial weights.
        output_init_std: the same of the projection that gives the result.
        normalization: kind of norm.
        factory: decides the precision of each linear layer.
        name: the layer's place in its model.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        inner_dim: int,
        num_heads: int,
        *,
        init_std: float,
        output_init_std: float,
        normalization: Normalization,
        factory: LayerFactory,
        name: str,
    ) -> None:
        """Draw the weights."""
        super().__init__()
        if inner_dim % num_heads:
            raise ModelError(f"width {inner_dim} is not divisible by {num_heads} attention heads")
        self.num_heads = num_heads
        options = {"init_std": init_std, "normalization": normalization}
        self.q = factory.norm_linear(f"{name}.q", dim, inner_dim, **options)
        self.kv = factory.norm_linear(f"{name}.kv", context_dim, 2 * inner_dim, **options)
        self.out_proj = factory.linear(f"{name}.out_proj", inner_dim, dim, init_std=output_init_std)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return [C, M, D] for `x` [C, M, D], not normalised, and a context [C, N, E] of each row.

        `x` may have fewer rows [B, M, D]: each then serves C / B contexts that follow each other.
        """
        rows, length, width = x.shape
        q = self._heads(self.q(x))
        if len(context) != rows:
            q = q.unsqueeze(1).expand(-1, len(context) // rows, -1, -1, -1).flatten(end_dim=1)
        k, v = (self._heads(part) for part in self.kv(context).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v)  # [C, H, M, E / H]
        return self.out_proj(attended.transpose(1, 2).reshape(len(context), length, -1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
