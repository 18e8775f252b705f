"""What our models of cells cost: operations and bytes, by arithmetic on their configurations alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.cross_entropy import rows_at_once
from models.embeddings import DepthEmbedding

if TYPE_CHECKING:
    from models.autoregressive import AutoregressiveConfig
    from models.encoder import EncoderConfig
    from models.layers import Activation, Normalization
    from models.masked_autoencoder import MaskedAutoencoderConfig
    from models.model_config import ModelConfig

FP32 = 4


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


def encoder_flops(config: "EncoderConfig", lengths: Sequence[int], num_masked: int) -> float:
    """Return the operations of a forward and a backward pass over cells of these lengths, padding left out.

    A product of an [m, k] by a [k, n] matrix counts 2mkn operations, and its backward pass twice as much, or as much
    where its input needs no gradient. Attention counts whole (6 x 2 S^2 d a layer), also where it is causal. Look-ups
    in tables, norms, activation functions, softmax and the recomputation of activation checkpointing do not count.

    Args:
        config: the encoder's.
        lengths: tokens of each cell.
        num_masked: positions at which something is predicted, over all cells.
    """
    cells, dim, outputs = len(lengths), config.hidden_dim, config.n_bins or 1
    flops = backbone_flops(config, lengths)
    if config.gene_loss_weight > 0:
        flops += 6.0 * (cells * dim * dim + num_masked * (dim * dim + dim * config.vocab_size))
    if config.expression_loss_weight > 0:
        of_masked = dim * dim + dim * outputs
        flops += 6.0 * (
            cells * dim * dim + num_masked * of_masked * (1 if config.expression_from_cell else 2)
        )
    return flops


def autoregressive_flops(config: "AutoregressiveConfig", lengths: Sequence[int]) -> float:
    """Return the operations of an autoregressive model, counted as `encoder_flops` does.

    Every token of a cell but the first is predicted.
    """
    predicted, dim = sum(max(0, length - 1) for length in lengths), config.hidden_dim
    flops = backbone_flops(config, lengths)
    if config.gene_loss_weight > 0:
        flops += 6.0 * predicted * (dim * dim + dim * config.vocab_size)
    if config.expression_loss_weight > 0:
        flops += 6.0 * predicted * (3 * dim * dim + 2 * dim * (config.n_bins or 1))
    return flops


def autoencoder_flops(config: "MaskedAutoencoderConfig", lengths: Sequence[int], num_masked: int) -> float:
    """Return the operations of a masked autoencoder, counted as `encoder_flops` does.

    Every cell counts as masked to the same share.
    """
    tokens, dim, width = sum(lengths), config.hidden_dim, config.decoder_width
    share = 1 - num_masked / tokens if tokens else 1.0
    flops = backbone_flops(config, [length * share for length in lengths])
    flops += _body_flops(
        width, linear1_width(4 * width, config.activation), 4 * width, config.decoder_layers, lengths
    )
    return flops + 6.0 * (
        (tokens - num_masked) * dim * width
        + num_masked * (dim * width + width * width + width * (config.n_bins or 1))
    )


def backbone_flops(config: "ModelConfig", lengths: Sequence[float]) -> float:
    """Return the operations of a model without its heads, counted as `encoder_flops` does."""
    dim, inner = config.hidden_dim, config.inner_dim
    flops = _body_flops(dim, linear1_width(inner, config.activation), inner, config.num_layers, lengths)
    if config.n_bins is None and config.use_expression_values:
        flops += sum(lengths) * (4.0 * dim + 6.0 * 2 * dim * dim)
    if config.use_depth:
        flops += len(lengths) * 4.0 * DepthEmbedding.NUM_CENTRES * dim
    return flops


def attention_flops(config: "ModelConfig", lengths: Sequence[float]) -> float:
    """Return the operations of attention's own products, which have no weights."""
    return 12.0 * config.num_layers * config.hidden_dim * sum(length * length for length in lengths)


def encoder_activations(
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
    heads = num_cells * 2 * FP32 * config.hidden_dim
    of_genes, gene_logits = _gene_head_bytes(config, num_masked, is_mixed)
    of_values, value_logits = _value_head_bytes(
        config, num_masked, is_mixed, reads_hidden=not config.expression_from_cell
    )
    body = backbone_bytes(config, num_tokens, is_mixed=is_mixed)
    if config.use_cell_summary and config.n_bins is not None and config.use_expression_values:
        summaries = 3 if config.contrast_weight > 0 else 1
        body += summaries * num_tokens * 2 * FP32 * config.hidden_dim
    return Activations(body, heads + of_genes + of_values, 3 * FP32 * (gene_logits + value_logits))


def autoregressive_activations(
    config: "AutoregressiveConfig", *, num_tokens: int, num_cells: int, is_mixed: bool
) -> Activations:
    """Return the bytes of activations of an autoregressive model, counted as `encoder_activations` does."""
    predicted, dim, low = max(0, num_tokens - num_cells), config.hidden_dim, 2 if is_mixed else FP32
    of_genes, gene_logits = _gene_head_bytes(config, predicted, is_mixed)
    of_values, value_logits = _value_head_bytes(config, predicted, is_mixed)
    if config.expression_loss_weight > 0:  # the part that an encoder computes once a cell
        of_values += predicted * (norm_bytes(dim, config.normalization) + low * dim)
    body = backbone_bytes(config, num_tokens, is_mixed=is_mixed)
    return Activations(body, of_genes + of_values, 3 * FP32 * (gene_logits + value_logits))


def autoencoder_activations(
    config: "MaskedAutoencoderConfig", *, num_tokens: int, num_cells: int, num_masked: int, is_mixed: bool
) -> Activations:
    """Return the bytes of activations of a masked autoencoder, counted as `encoder_activations` does.

    Its tokens are those without padding: padding is left out before anything is computed.
    """
    dim, width, low = config.hidden_dim, config.decoder_width, 2 if is_mixed else FP32
    mask = 1 if config.dropout > 0 else 0
    visible = num_tokens - num_masked
    body = backbone_bytes(config, visible, is_mixed=is_mixed)
    body += visible * low * dim + num_masked * low * dim
    body += _blocks_bytes(
        width, 4 * width, config.num_decoder_heads, config.decoder_layers, num_tokens, config, is_mixed
    )
    body += num_tokens * (norm_bytes(width, config.normalization) + mask * width)
    # The input of transform, of the activation function, of the norm and of the output.
    heads = num_masked * (2 * low * width + norm_bytes(width, config.normalization) + low * width)
    return Activations(body, heads, 3 * FP32 * num_masked * (config.n_bins or 1))


def backbone_bytes(config: "ModelConfig", num_tokens: int, *, is_mixed: bool) -> float:
    """Return the bytes that embeddings and transformer keep, counted as `encoder_activations` does."""
    dim, mask = config.hidden_dim, 1 if config.dropout > 0 else 0
    body = _blocks_bytes(
        dim, config.inner_dim, config.num_heads, config.num_layers, num_tokens, config, is_mixed
    )
    return body + num_tokens * (
        norm_bytes(dim, config.normalization) + mask * dim + _embedding_bytes(config, is_mixed)
    )


def matrix_sizes(config: "ModelConfig") -> dict[str, int]:
    """Return by field name the sizes of the matrices that FP8 layers multiply."""
    return {"hidden_dim": config.hidden_dim, "ffn_dim": config.inner_dim}


def linear1_width(inner: int, activation: "Activation") -> int:
    """Return what the first layer of an MLP gives out: with a gate twice what the second one takes."""
    return 2 * inner if activation == "swiglu" else inner


def kept_by_activation(activation: "Activation") -> int:
    """Return how many tensors as wide as an MLP's inside its activation function keeps."""
    return {"gelu": 1, "silu": 1, "relu": 0, "swiglu": 3}[activation]


def norm_bytes(dim: int, normalization: "Normalization") -> int:
    """Return the bytes that a norm keeps of a token: its input and its fp32 statistics."""
    return FP32 * dim + (8 if normalization == "LayerNorm" else 4)


def _body_flops(dim: int, linear1: int, inner: int, num_layers: int, lengths: Sequence[float]) -> float:
    layer = 4 * dim * dim + dim * linear1 + inner * dim
    attention = 12.0 * num_layers * dim * sum(length * length for length in lengths)
    return 6.0 * num_layers * sum(lengths) * layer + attention


def _blocks_bytes(
    dim: int,
    inner: int,
    num_heads: int,
    num_layers: int,
    num_tokens: int,
    config: "ModelConfig",
    is_mixed: bool,
) -> float:
    """Return the bytes that the blocks of a transformer keep; one of them, and inputs, under checkpointing."""
    low, mask = 2 if is_mixed else FP32, 1 if config.dropout > 0 else 0
    norm = norm_bytes(dim, config.normalization)
    # Of each token: the norm's input, the input of qkv; q, k and v, their result, the softmax's logarithm of each head.
    attention = norm + low * dim + low * 3 * dim + low * dim + FP32 * num_heads + mask * dim
    kept_inside = low * inner * kept_by_activation(config.activation)
    mlp = norm + low * dim + kept_inside + low * inner + mask * dim
    layer = num_tokens * (attention + mlp)
    if config.activation_checkpointing:
        return num_layers * num_tokens * FP32 * dim + layer
    return num_layers * layer


def _gene_head_bytes(
    config: "EncoderConfig | AutoregressiveConfig", num_predicted: int, is_mixed: bool
) -> tuple[float, float]:
    """Return the bytes of the gene head, and the logits that stand in memory at once."""
    if config.gene_loss_weight == 0:
        return 0.0, 0.0
    dim, low = config.hidden_dim, 2 if is_mixed else FP32
    kept = float(num_predicted * (low * dim + low * dim + norm_bytes(dim, config.normalization) + low * dim))
    # More logits than fit at once are computed in chunks, and their gradients with them (models/cross_entropy.py).
    at_once = rows_at_once(config.vocab_size)
    if num_predicted > at_once:
        kept += FP32 * (config.vocab_size + num_predicted) * dim
    return kept, float(min(num_predicted, at_once) * config.vocab_size)


def _value_head_bytes(
    config: "EncoderConfig | AutoregressiveConfig",
    num_predicted: int,
    is_mixed: bool,
    reads_hidden: bool = True,
) -> tuple[float, float]:
    """Return the bytes of the value head, and its logits."""
    if config.expression_loss_weight == 0:
        return 0.0, 0.0
    dim, low = config.hidden_dim, 2 if is_mixed else FP32
    # Inputs of a norm, of gene and product_output; what the product of cell and gene reads.
    kept = num_predicted * (norm_bytes(dim, config.normalization) + 4 * low * dim)
    if reads_hidden:  # inputs of a norm, of transform and output; what gelu reads
        kept += num_predicted * (norm_bytes(dim, config.normalization) + 3 * low * dim)
    return float(kept), float(num_predicted * (config.n_bins or 1))


def _embedding_bytes(config: "ModelConfig", is_mixed: bool) -> int:
    """Return the bytes a token that the embeddings keep: factors of products of gene vectors and expression."""
    dim, low = config.hidden_dim, 2 if is_mixed else FP32
    if not config.use_expression_values:
        return 0
    kept = 2 * FP32 * dim
    if config.n_bins is None:
        kept += low * 2 * dim
    return kept
