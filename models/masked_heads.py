"""Heads that predict masked genes and masked expression, and the prior that the latter starts from."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cross_entropy import linear_cross_entropy
from models.errors import ModelError
from models.layers import Linear, Norm

NUM_SPECIAL_TOKENS = 4
IGNORED_LABEL = -100
_PSEUDO_COUNT = 5.0
"""Observations of the distribution (or mean) over all genes that each gene's prior starts with."""


class GeneHead(nn.Module):
    """Predict which gene stands at a position, from its hidden state and, with `sees_cell`, the cell's embedding."""

    def __init__(
        self, dim: int, vocab_size: int, *, tied: bool, init_std: float, sees_cell: bool = True
    ) -> None:
        """Draw the weights; `tied` takes the output weight from the token embedding."""
        super().__init__()
        self.transform = Linear(dim, dim, init_std=init_std)
        self.cell = Linear(dim, dim, bias=False, init_std=init_std) if sees_cell else None
        self.norm = Norm(dim)
        self.output = None if tied else Linear(dim, vocab_size, bias=False, init_std=init_std)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def reset_parameters(self) -> None:
        """Set the bias to zero; the layers draw their own."""
        nn.init.zeros_(self.bias)

    def forward(
        self,
        hidden: Tensor,
        cells: Tensor | None,
        rows: Tensor | None,
        token_weight: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits [M, V], or with labels the summed cross-entropy and the number of right guesses.

        Args:
            hidden: [M, D] hidden states of the positions.
            cells: [B, D] embeddings of the cells; None for a head that does not see them.
            rows: [M] the cell of each position.
            token_weight: [V, D] of the token embedding.
            labels: [M] the genes that are right; large logits then never stand in memory whole.
        """
        x = self.transform(hidden)
        if self.cell is not None:
            x = x + self.cell(cells)[rows]
        x = self.norm(F.gelu(x))
        weight = token_weight if self.output is None else self.output.weight
        if labels is None:
            return F.linear(x, weight, self.bias)
        return linear_cross_entropy(x, weight, self.bias, labels, ignore_index=IGNORED_LABEL)


class ValueHead(nn.Module):
    """Predict the expression of a named gene at a position: a class for each bin, or one number.

    Three parts add up: what the gene shows in any cell (`prior`, its distribution or mean over training cells,
    zero until it is set, and a trained `bias`, which weight decay pulls back to the prior); what the hidden state
    tells; and a product of the cell's embedding and the gene's vector, through which the cell's embedding
    learns what decides over its genes.
    """

    prior: Tensor

    def __init__(
        self, dim: int, vocab_size: int, num_outputs: int, *, init_std: float, reads_hidden: bool = True
    ) -> None:
        """Draw the weights; without `reads_hidden` the part that the hidden state tells is left out."""
        super().__init__()
        self.transform = self.norm = self.output = None
        if reads_hidden:
            self.transform = Linear(dim, dim, init_std=init_std)
            self.norm = Norm(dim)
            self.output = Linear(dim, num_outputs, bias=False, init_std=init_std)
        self.cell = Linear(dim, dim, init_std=init_std)
        self.cell_norm = Norm(dim)
        self.gene_norm = Norm(dim)
        self.gene = Linear(dim, dim, init_std=init_std)
        self.product_output = Linear(dim, num_outputs, bias=False, init_std=init_std)
        self.bias = nn.Parameter(torch.zeros(vocab_size, num_outputs))
        self.register_buffer("prior", torch.zeros(vocab_size, num_outputs))

    def reset_parameters(self) -> None:
        """Set the bias to zero; the layers draw their own, and the prior stays."""
        nn.init.zeros_(self.bias)

    def forward(
        self, hidden: Tensor, cells: Tensor, rows: Tensor | None, gene_vectors: Tensor, genes: Tensor
    ) -> Tensor:
        """Return [M, outputs].

        Args:
            hidden: [M, D] hidden states of the positions.
            cells: [B, D] embeddings of the cells, or [M, D] what is known of its cell at each position.
            rows: [M] the cell of each position; None where `cells` is [M, D].
            gene_vectors: [M, D] token embeddings of the genes asked about.
            genes: [M] their token ids.
        """
        gene = self.gene(self.gene_norm(gene_vectors))
        cell = self.cell_norm(self.cell(cells))
        logits = self.product_output((cell if rows is None else cell[rows]) * gene)
        if self.transform is not None and self.norm is not None and self.output is not None:
            logits = self.output(self.norm(F.gelu(self.transform(hidden) + gene))) + logits
        return logits + F.embedding(genes, self.bias) + F.embedding(genes, self.prior)


class DecodedValueHead(nn.Module):
    """Predict a gene's expression from what a decoder made of the question for it; `prior` as in `ValueHead`."""

    prior: Tensor

    def __init__(self, dim: int, vocab_size: int, num_outputs: int, *, init_std: float) -> None:
        """Draw the weights."""
        super().__init__()
        self.transform = Linear(dim, dim, init_std=init_std)
        self.norm = Norm(dim)
        self.output = Linear(dim, num_outputs, bias=False, init_std=init_std)
        self.bias = nn.Parameter(torch.zeros(vocab_size, num_outputs))
        self.register_buffer("prior", torch.zeros(vocab_size, num_outputs))

    def reset_parameters(self) -> None:
        """Set the bias to zero; the layers draw their own, and the prior stays."""
        nn.init.zeros_(self.bias)

    def forward(self, decoded: Tensor, genes: Tensor) -> Tensor:
        """Return [M, outputs] for decoded states [M, D] and token ids of the genes [M]."""
        logits = self.output(self.norm(F.gelu(self.transform(decoded))))
        return logits + F.embedding(genes, self.bias) + F.embedding(genes, self.prior)


def value_prior(
    batches: Iterable[dict[str, Any]], vocab_size: int, n_bins: int | None
) -> tuple[Tensor, Tensor]:
    """Count each gene's expression over unmasked batches.

    Args:
        batches: batches without masking.
        vocab_size: token ids.
        n_bins: bins to count; None takes means of continuous values.

    Returns:
        The prior, log probabilities [V, n_bins] or means [V, 1], and the number of values counted [V].
    """
    outputs = n_bins or 1
    sums = np.zeros(vocab_size * outputs)
    counted = np.zeros(vocab_size, dtype=np.int64)
    for batch in batches:
        is_gene = batch["attention_mask"] & (batch["tokens"] >= NUM_SPECIAL_TOKENS)
        tokens = batch["tokens"][is_gene].cpu().numpy()
        counted += np.bincount(tokens, minlength=vocab_size)
        if n_bins is None:
            sums += np.bincount(tokens, weights=batch["values"][is_gene].cpu().numpy(), minlength=vocab_size)
        else:
            if "bins" not in batch:
                raise ModelError(
                    "n_bins is set, but the batches have no bins: use binned_expression, or n_bins: null"
                )
            flat = tokens * n_bins + batch["bins"][is_gene].cpu().numpy()
            sums += np.bincount(flat, minlength=vocab_size * n_bins)
    if not counted.any():
        raise ModelError(
            "no batches to take the value prior from; give training data, or set use_value_prior: false"
        )
    table = sums.reshape(vocab_size, outputs)
    # Every bin keeps some mass, so that no logarithm is infinite.
    overall = (table.sum(axis=0) + (0 if n_bins is None else 1)) / (
        counted.sum() + (0 if n_bins is None else n_bins)
    )
    table = (table + _PSEUDO_COUNT * overall) / (counted[:, None] + _PSEUDO_COUNT)
    if n_bins is not None:
        table = np.log(table)
    table[:NUM_SPECIAL_TOKENS] = 0
    return torch.from_numpy(table).float(), torch.from_numpy(counted)
