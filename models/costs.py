"""What a masked cell encoder costs: operations and bytes, by arithmetic on its configuration alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.cross_entropy import rows_at_once

if TYPE_CHECKING:
    from models.encoder import EncoderConfig

_DEPTH_CENTRES = 32
_FP32 = 4


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for the backward pass, and that losses over logits need at their peak.

    Attributes:
        body: of embeddings and transformer; one recomputed block on top of the kept ones under checkpointing.
        heads: of both heads, without their logits.
        logits: at the peak: fp32 log probabilities, and two gradients of that size in their backward pass.
    """

    body: float
    heads: float
    logits: float

    @property
    def total(self) -> float:
        """Return all of them."""
        return self.body + self.heads + self.logits


def training_flops(config: "EncoderConfig", lengths: Sequence[int], num_masked: int) -> float:
    """Return the operations of a forward and a backward pass over cells of these lengths, padding left out.

    A product of an [m, k] by a [k, n] matrix counts 2mkn operations, and its backward pass twice as much, or as much
    where its input needs no gradient. Attention counts whole (6 x 2 S^2 d a layer). Look-ups in tables, norms,
    activation functions, softmax and the recomputation of activation checkpointing do not count.

    Args:
        config: the encoder's.
        lengths: tokens of each cell.
        num_masked: positions at which something is predicted, over all cells.
    """
    cells, tokens = len(lengths), sum(lengths)
    dim, inner = config.hidden_dim, config.inner_dim
    in_linear1 = inner * _gate_factor(config)
    layer = 4 * dim * dim + dim * in_linear1 + inner * dim
    flops = 6.0 * config.num_layers * tokens * layer
    flops += 12.0 * config.num_layers * dim * sum(length * length for length in lengths)
    if config.n_bins is None:
        flops += tokens * (4.0 * dim + 6.0 * 2 * dim * dim)
    if config.use_depth:
        flops += cells * 4.0 * _DEPTH_CENTRES * dim
    if config.gene_loss_weight > 0:
        flops += 6.0 * (cells * dim * dim + num_masked * (dim * dim + dim * config.vocab_size))
    if config.expression_loss_weight > 0:
        outputs = config.n_bins or 1
        flops += 6.0 * (cells * dim * dim + num_masked * (2 * dim * dim + 2 * dim * outputs))
    return flops


def activation_bytes(
    config: "EncoderConfig", *, num_tokens: int, num_cells: int, num_masked: int, is_mixed: bool
) -> Activations:
    """Return the bytes of activations of one micro-batch.

    Counted for attention that keeps no matrix of scores. The residual stream and what norms read are fp32 in any
    precision; with mixed precision matrix products keep 2 bytes a value, else 4. Dropout keeps a byte a value.

    Args:
        config: the encoder's.
        num_tokens: tokens of the micro-batch as it is laid out, padding included.
        num_cells: its cells.
        num_masked: its positions at which something is predicted.
        is_mixed: whether matrix products are computed in bf16 or fp16.
    """
    dim, inner, low = config.hidden_dim, config.inner_dim, 2 if is_mixed else _FP32
    mask = 1 if config.dropout > 0 else 0
    norm = _FP32 * dim + (8 if config.normalization == "LayerNorm" else 4)
    # Of each token: the norm's input, the input of qkv; q, k and v, their result, the softmax's logarithm of each head.
    attention = norm + low * dim + low * 3 * dim + low * dim + _FP32 * config.num_heads + mask * dim
    kept_by_activation = {"gelu": 1, "silu": 1, "relu": 0, "swiglu": 3}[config.activation]
    mlp = norm + low * dim + low * inner * kept_by_activation + low * inner + mask * dim
    layer = num_tokens * (attention + mlp)
    block_input = num_tokens * _FP32 * dim
    saved_blocks = config.num_layers * block_input + layer
    body = saved_blocks if config.activation_checkpointing else config.num_layers * layer
    body += num_tokens * (norm + mask * dim + _embedding_bytes(config, low))
    heads = num_cells * 2 * _FP32 * dim
    logits = 0
    if config.gene_loss_weight > 0:
        heads += num_masked * (low * dim + low * dim + norm + low * dim)
        # More logits than fit at once are computed in chunks, and their gradients with them (models/cross_entropy.py).
        at_once = rows_at_once(config.vocab_size)
        logits += min(num_masked, at_once) * config.vocab_size
        if num_masked > at_once:
            heads += _FP32 * (config.vocab_size + num_masked) * dim
    if config.expression_loss_weight > 0:
        # Two inputs of norms, of transform, gene and output; what gelu and the product of cell and gene read.
        heads += num_masked * (2 * norm + 2 * low * dim + low * dim + low * dim + 3 * low * dim)
        logits += num_masked * (config.n_bins or 1)
    return Activations(body, heads, 3 * _FP32 * logits)


def matrix_sizes(config: "EncoderConfig") -> dict[str, int]:
    """Return by field name the sizes of the matrices that FP8 layers multiply."""
    return {"hidden_dim": config.hidden_dim, "ffn_dim": config.inner_dim}


def _gate_factor(config: "EncoderConfig") -> int:
    """Return how many times `ffn_dim` the first layer of an MLP gives out."""
    return 2 if config.activation == "swiglu" else 1


def _embedding_bytes(config: "EncoderConfig", low: int) -> int:
    """Return the bytes a token that the embeddings keep: factors of products of gene vectors and expression."""
    dim = config.hidden_dim
    kept = 2 * _FP32 * dim
    if config.n_bins is None:
        kept += low * 2 * dim
    if config.use_cell_summary and config.n_bins is not None:
        kept += 2 * _FP32 * dim
    return kept
