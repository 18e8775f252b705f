"""A stack of pre-norm transformer blocks with a final norm."""

import math
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor, nn

from models.attention import AttentionSpans
from models.layers import MLP, Activation, LayerFactory, Norm, Normalization, SelfAttention

if TYPE_CHECKING:
    from models.model_config import ModelConfig
    from models.perturbation_config import PerturbationTransformerConfig


class BlockOptions(TypedDict):
    """Name what all blocks of a model have in common, whatever their sizes."""

    dropout: float
    attention_dropout: float
    activation: Activation
    normalization: Normalization
    init_std: float


def block_options(config: "ModelConfig | PerturbationTransformerConfig") -> BlockOptions:
    """Return what a model's configuration says of all its blocks."""
    return {
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation": config.activation,
        "normalization": config.normalization,
        "init_std": config.init_std,
    }


class TransformerBlock(nn.Module):
    """Self-attention and MLP, each added to its input; dropout acts on what is added."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn_dim: int,
        *,
        is_causal: bool,
        dropout: float,
        attention_dropout: float,
        activation: Activation,
        normalization: Normalization,
        init_std: float,
        output_init_std: float,
        factory: LayerFactory,
        name: str,
    ) -> None:
        """Draw the weights; `name` is the block's place in its model."""
        super().__init__()
        self.attention = SelfAttention(
            dim,
            num_heads,
            is_causal=is_causal,
            dropout=attention_dropout,
            init_std=init_std,
            output_init_std=output_init_std,
            normalization=normalization,
            factory=factory,
            name=f"{name}.attention",
        )
        self.mlp = MLP(
            dim,
            ffn_dim,
            activation=activation,
            init_std=init_std,
            output_init_std=output_init_std,
            normalization=normalization,
            factory=factory,
            name=f"{name}.mlp",
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, attention_mask: Tensor | AttentionSpans | None) -> Tensor:
        """Return the block's output [B, N, D]."""
        x = x + self.dropout(self.attention(x, attention_mask))
        return x + self.dropout(self.mlp(x))


class Transformer(nn.Module):
    """Transformer body: `num_layers` blocks and a final norm.

    Weights start as N(0, `init_std`); the two projections of a block that write into the residual stream are
    scaled down by sqrt(2 * num_layers), so that its variance at the end does not grow with depth.

    Args:
        dim: width of the residual stream.
        num_layers: number of blocks.
        num_heads: attention heads; must divide `dim`.
        ffn_dim: inner width of the MLP.
        is_causal: let a token attend to itself and the ones before it alone; padding must be at the end of rows.
        dropout: probability, on the output of attention and MLP.
        attention_dropout: probability, on attention weights.
        activation: of the MLP.
        normalization: kind of norm.
        init_std: standard deviation of the initial weights.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        factory: decides the precision of each linear layer.
        name: what `exclude_layers` calls the blocks by: `layers`, of a second body of a model `decoder.layers`.
        is_last: whether the factory builds no layer after these, so that its patterns can be checked.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        *,
        is_causal: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        activation: Activation = "gelu",
        normalization: Normalization = "LayerNorm",
        init_std: float = 0.02,
        activation_checkpointing: bool = False,
        factory: LayerFactory | None = None,
        name: str = "layers",
        is_last: bool = True,
    ) -> None:
        """Draw the weights."""
        super().__init__()
        factory = factory or LayerFactory()
        self.activation_checkpointing = activation_checkpointing
        self.layers = nn.ModuleList(
            TransformerBlock(
                dim,
                num_heads,
                ffn_dim,
                is_causal=is_causal,
                dropout=dropout,
                attention_dropout=attention_dropout,
                activation=activation,
                normalization=normalization,
                init_std=init_std,
                output_init_std=init_std / math.sqrt(2 * num_layers),
                factory=factory,
                name=f"{name}.{index}",
            )
            for index in range(num_layers)
        )
        self.final_norm = Norm(dim, normalization)
        if is_last:
            factory.check_exclusions()
        self._factory = factory

    def forward(self, x: Tensor, attention_mask: Tensor | AttentionSpans | None = None) -> Tensor:
        """Return normalised hidden states.

        Args:
            x: [B, N, D] token embeddings.
            attention_mask: [B, N] bool, True = real token; None where no row is padded; or, with B = 1, the
                stretches that attend to themselves alone.
        """
        with self._factory.region():
            for layer in self.layers:
                if self.activation_checkpointing and self.training:
                    x = self._factory.checkpoint(layer, x, attention_mask)
                else:
                    x = layer(x, attention_mask)
        return self.final_norm(x)
