"""What a perturbation transformer costs: operations and bytes, by arithmetic on configuration and shapes of a batch."""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from models.auxiliary_losses import NUM_OUTPUTS
from models.costs import FP32, Activations, kept_by_activation, linear1_width, norm_bytes
from models.embeddings import TimeEmbedding

if TYPE_CHECKING:
    from models.perturbation_config import PerturbationTransformerConfig

_INT64 = 8


class BatchSizes(NamedTuple):
    """Say how large a batch is."""

    num_sets: int
    cells_per_set: int
    controls_per_set: int
    """0 where there are none."""

    @property
    def num_cells(self) -> int:
        """Count the perturbed cells."""
        return self.num_sets * self.cells_per_set

    @property
    def num_controls(self) -> int:
        """Count the control cells."""
        return self.num_sets * self.controls_per_set


def sizes_of(tokens: Tensor, control: Tensor | None) -> BatchSizes:
    """Return the sizes of a batch of tokens [B, S, N] or [B, N], and of its controls, alike or None."""
    of_control = 0 if control is None else control.shape[1] if control.ndim == 3 else 1
    return BatchSizes(len(tokens), tokens.shape[1] if tokens.ndim == 3 else 1, of_control)


def training_flops(config: "PerturbationTransformerConfig", sizes: BatchSizes) -> float:
    """Return the operations of a forward and a backward pass, counted as `models.costs.encoder_flops` does."""
    dim, gene_dim, genes = config.hidden_dim, config.gene_width, config.num_genes
    cells, sets = sizes.num_cells, sizes.num_sets
    states = _states(config)
    flops = 4.0 * genes * config.gene_vector_dim * gene_dim
    flops += cells * (4.0 * 2 * TimeEmbedding.NUM_FREQUENCIES * dim + 6.0 * dim * dim)
    if config.use_target:
        flops += 6.0 * sets * (gene_dim * dim + dim * dim)
        flops += sets * config.response_rank * (6.0 * genes + _code_flops(config))
    flops += _encoder_flops(config, cells, genes)
    if config.use_control:
        flops += 4.0 * 2 * sets * genes * config.num_control_tokens * gene_dim
        if sizes.controls_per_set:
            flops += _encoder_flops(config, sizes.num_controls, genes)
            flops += _set_flops(config, sets, sizes.controls_per_set * config.num_latents)
        else:  # one cell of one gene stands in, in all sets
            flops += _encoder_flops(config, 1, 1) + _set_flops(config, 1, config.num_latents)
        flops += config.num_context_layers * _block_flops(config, sets, config.num_context_latents)
    flops += config.num_layers * _block_flops(config, cells, states)
    # The decoder: queries of the genes once a set, then attention and MLP at each gene of each cell, and the heads.
    flops += 6.0 * sets * genes * gene_dim * gene_dim
    flops += 6.0 * cells * (states * dim * 2 * gene_dim + dim * 2 * gene_dim + genes * gene_dim * gene_dim)
    flops += 12.0 * cells * genes * states * gene_dim
    at_gene = linear1_width(config.gene_inner_dim, config.activation) + config.gene_inner_dim
    outputs = config.vocab_size + (NUM_OUTPUTS if config.has_auxiliary_heads else 0)
    return flops + 6.0 * cells * genes * gene_dim * (at_gene + outputs)


def activation_bytes(
    config: "PerturbationTransformerConfig", sizes: BatchSizes, *, is_mixed: bool
) -> Activations:
    """Return the bytes of activations of one micro-batch, counted as `models.costs.encoder_activations` does.

    With activation checkpointing the largest block that is computed again counts on top of what is kept.
    """
    low = 2 if is_mixed else FP32
    dim, gene_dim, genes = config.hidden_dim, config.gene_width, config.num_genes
    cells, sets, controls = sizes.num_cells, sizes.num_sets, sizes.num_controls if config.use_control else 0
    states = _states(config)
    # Of each gene that is embedded: tokens, scale, what keys and values are made of, and these; then the latents.
    of_gene = _INT64 + FP32 * gene_dim + _norm(config, gene_dim) + low * gene_dim + low * 2 * dim
    encoder = genes * of_gene + _queries(config, config.num_latents, dim, dim, low)
    layer = _block_bytes(config, states, low)
    # Of each gene that is read out: the query beside its scale and shift, attention, the MLP with both its norms.
    of_gene = FP32 * gene_dim + 2 * low * gene_dim + FP32 * config.num_heads + 2 * _norm(config, gene_dim)
    of_gene += low * gene_dim + low * config.gene_inner_dim * (1 + kept_by_activation(config.activation))
    decoder = genes * of_gene + states * (_norm(config, dim) + low * dim + low * 2 * gene_dim)
    of_sets = sets * _set_bytes(config, sizes.controls_per_set, low)
    if config.activation_checkpointing:
        kept = cells * config.num_layers * states * FP32 * dim + (cells + controls) * genes * _INT64
        kept += cells * states * FP32 * dim + controls * config.num_latents * FP32 * dim
        again = max(cells * encoder, controls * encoder, cells * layer, cells * decoder)
        body = kept + again + of_sets
    else:
        body = (cells + controls) * encoder + cells * (config.num_layers * layer + decoder) + of_sets
    body += cells * states * _norm(config, dim)  # of the final norm
    heads = cells * genes * (low * gene_dim + _INT64 + 3 * FP32)
    if config.has_auxiliary_heads:
        heads += cells * genes * 8 * FP32
    return Activations(body, heads, 3.0 * FP32 * cells * genes * config.vocab_size)


def matrix_sizes(config: "PerturbationTransformerConfig") -> dict[str, int]:
    """Return by field name the sizes of the matrices that FP8 layers multiply."""
    return {
        "hidden_dim": config.hidden_dim,
        "gene_dim": config.gene_width,
        "ffn_dim": config.inner_dim,
        "gene_ffn_dim": config.gene_inner_dim,
    }


def _states(config: "PerturbationTransformerConfig") -> int:
    """Return the tokens that the transformer sees of a cell."""
    return (
        config.num_latents + config.num_conditions + (config.num_context_latents if config.use_control else 0)
    )


def _code_flops(config: "PerturbationTransformerConfig") -> float:
    """Return the operations of a target's code for each of its directions: fixed vectors have no gradients."""
    if config.target_table == "own":
        return 0.0
    return 4.0 * config.gene_vector_dim if config.gene_vector_dim else 6.0 * config.gene_width


def _encoder_flops(config: "PerturbationTransformerConfig", cells: int, genes: int) -> float:
    """Return the operations of compressing cells: summary, queries and output, keys and values, attention."""
    dim, gene_dim, latents = config.hidden_dim, config.gene_width, config.num_latents
    weights = gene_dim * dim + 2 * latents * dim * dim + genes * gene_dim * 2 * dim
    return 6.0 * cells * weights + 12.0 * cells * latents * genes * dim


def _set_flops(config: "PerturbationTransformerConfig", sets: int, keys: int) -> float:
    """Return the operations of compressing the latents of sets, `keys` of each."""
    dim, latents = config.hidden_dim, config.num_context_latents
    weights = 2 * latents * dim * dim + keys * dim * 2 * dim
    return 6.0 * sets * weights + 12.0 * sets * latents * keys * dim


def _block_flops(config: "PerturbationTransformerConfig", rows: int, tokens: int) -> float:
    dim, inner = config.hidden_dim, config.inner_dim
    weights = 4 * dim * dim + dim * linear1_width(inner, config.activation) + inner * dim
    return 6.0 * rows * tokens * weights + 12.0 * rows * tokens * tokens * dim


def _norm(config: "PerturbationTransformerConfig", dim: int) -> int:
    return norm_bytes(dim, config.normalization)


def _queries(config: "PerturbationTransformerConfig", count: int, dim: int, inner: int, low: int) -> int:
    """Return what attention keeps of its queries: their norm, the input of `q`, they themselves, and the result."""
    return count * (_norm(config, dim) + low * dim + 2 * low * inner + FP32 * config.num_heads)


def _block_bytes(config: "PerturbationTransformerConfig", tokens: int, low: int) -> int:
    """Return what a transformer block keeps of one row."""
    dim, mask = config.hidden_dim, 1 if config.dropout > 0 else 0
    attention = _norm(config, dim) + low * 5 * dim + FP32 * config.num_heads + mask * dim
    mlp = (
        _norm(config, dim)
        + low * dim
        + low * config.inner_dim * (1 + kept_by_activation(config.activation))
        + mask * dim
    )
    return tokens * (attention + mlp)


def _set_bytes(config: "PerturbationTransformerConfig", controls: int, low: int) -> float:
    """Return what a set keeps beside its cells: counts of the controls' tokens, queries of the genes, latents."""
    dim, gene_dim, genes = config.hidden_dim, config.gene_width, config.num_genes
    kept = genes * (_norm(config, gene_dim) + 2 * low * gene_dim)
    if not config.use_control:
        return kept
    kept += genes * (low * config.num_control_tokens + FP32 * gene_dim)
    if config.control_tokens == "shared" and controls:
        kept += genes * 3 * FP32 * config.vocab_size
    keys, latents = controls * config.num_latents, config.num_context_latents
    if keys:
        kept += keys * (_norm(config, dim) + low * dim + low * 2 * dim) + _queries(
            config, latents, dim, dim, low
        )
    return kept + config.num_context_layers * _block_bytes(config, latents, low)
