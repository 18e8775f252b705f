"""Transformer encoder over the genes of a cell, trained to predict masked genes and masked expression."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import costs
from models.cell_layout import PackedCells, PaddedCells, cell_layout
from models.cell_model import CellModel, asked_genes, needed, read_places
from models.embeddings import CellSummary
from models.masked_heads import GeneHead, ValueHead
from models.model_config import ModelConfig
from models.outputs import LossOutput

_NO_MASKS = "configure masking for this data"
_TEMPERATURE = 0.2
"""Of the contrast's cosines: the lower, the more the most similar cells count."""


@dataclass(frozen=True)
class EncoderConfig(ModelConfig):
    """Hold the sizes and choices of a `MaskedCellEncoder`: those of `models.model_config.ModelConfig`, and its own.

    Attributes:
        use_cell_summary: add to each cell's embedding a linear summary of its visible genes (`CellSummary`).
        gene_loss_weight: weight of the masked gene loss; 0 builds no gene head.
        expression_loss_weight: weight of the masked expression loss; 0 builds no value head.
        tie_gene_head: let the gene head share the token embedding's weight.
        expression_from_cell: predict expression from the cell's embedding alone, not from the hidden state of the
            masked gene too: the embedding then has to hold all that is told of the cell's genes.
        contrast_weight: weight of a loss, a mean over cells, for telling a cell among those of its micro-batch: by the
            summary of its masked genes from the summaries of the visible ones. It keeps few strong directions, such
            as depth, from taking the embedding; with half of the genes masked it works best. 0 leaves it out.
    """

    use_cell_summary: bool = True
    gene_loss_weight: float = 1.0
    expression_loss_weight: float = 1.0
    tie_gene_head: bool = True
    expression_from_cell: bool = False
    contrast_weight: float = 0.0

    def wrong_fields(self) -> Iterable[str]:
        """Say what is wrong, a field or a pair of fields at a time."""
        yield from super().wrong_fields()
        yield from self.wrong_loss_weights()
        if self.expression_from_cell and self.expression_loss_weight == 0:
            yield "expression_from_cell is true, but expression_loss_weight is 0: no expression is predicted"
        if not self.contrast_weight >= 0:
            yield f"contrast_weight is {self.contrast_weight}; it must not be negative"
        if self.contrast_weight and not self.use_cell_summary:
            yield "contrast_weight is set, but use_cell_summary is false: there are no summaries to compare"


class EncoderOutput(NamedTuple):
    """Hold what a forward pass returns.

    Attributes:
        hidden: [B, N, D] hidden states after the final norm; [1, T, D] of a packed batch.
        gene_logits: [M, V] at the masked positions; None without a gene head.
        value_logits: [M, n_bins], or [M] for continuous values; None without a value head.
        gene_loss: the gene head's summed loss and its right guesses, where labels were given in place of the logits.
    """

    hidden: Tensor
    gene_logits: Tensor | None
    value_logits: Tensor | None
    gene_loss: tuple[Tensor, Tensor] | None = None


class MaskedCellEncoder(CellModel):
    """Transformer encoder that predicts masked genes and the expression at masked positions.

    The gene head answers which gene stands at a masked position; the value head which expression the gene that
    the label names has there. Both see the technical batch, and both are computed at masked positions only.
    """

    head_names = ("technical_batch_embedding", "gene_head", "value_head")

    def __init__(self, config: EncoderConfig, *, has_heads: bool = True) -> None:
        """Draw the weights, every module its own."""
        super().__init__(config, has_heads=has_heads)
        dim, std = config.hidden_dim, config.init_std
        self.cell_summary = None
        if config.use_cell_summary:
            n_bins = config.n_bins if config.use_expression_values else None
            self.cell_summary = CellSummary(config.vocab_size, dim, n_bins, std)
        self.technical_batch_embedding = self._build_technical_batches(dim)
        self.transformer = self._build_transformer()
        self.gene_head = None
        if has_heads and config.gene_loss_weight > 0:
            self.gene_head = GeneHead(dim, config.vocab_size, tied=config.tie_gene_head, init_std=std)
        if has_heads and config.expression_loss_weight > 0:
            self.value_head = ValueHead(
                dim,
                config.vocab_size,
                config.n_bins or 1,
                init_std=std,
                reads_hidden=not config.expression_from_cell,
            )

    def forward(self, batch: dict[str, Any], gene_labels: Tensor | None = None) -> EncoderOutput:
        """Return hidden states of all tokens and the logits of the masked positions.

        Args:
            batch: as the loader yields it.
            gene_labels: [M] the genes at the masked positions; their loss is returned in place of the gene logits.
        """
        self._need_heads()
        masked_index = needed(batch, "masked_index", _NO_MASKS)
        layout = cell_layout(batch)
        with self._factory.region():
            hidden = self._hidden_states(batch, layout)  # [B, N, D]
            offset = self._technical_vectors(batch)  # [B, D]
        cells = self._pooled(hidden, batch, layout)  # [B, D]
        rows = layout.cells_of(masked_index)
        asked = hidden.flatten(end_dim=1)[masked_index]  # [M, D]
        if offset is not None:
            cells, asked = cells + offset, asked + offset[rows]
        gene_result = value_logits = None
        if self.gene_head is not None:
            gene_result = self.gene_head(asked, cells, rows, self.token_embedding.weight, gene_labels)
        if self.value_head is not None:
            genes = asked_genes(batch)
            value_logits = self.value_head(asked, cells, rows, self.token_embedding(genes), genes)
            if self.config.n_bins is None:
                value_logits = value_logits.squeeze(-1)
        if gene_labels is None:
            return EncoderOutput(hidden, gene_result, value_logits)
        return EncoderOutput(hidden, None, value_logits, gene_result)

    def compute_loss(self, batch: dict[str, Any]) -> LossOutput:
        """Return the summed loss over the masked positions, with accuracy and each loss as metrics."""
        masked_index = needed(batch, "masked_index", _NO_MASKS)
        genes = None if self.gene_head is None else batch["labels"].flatten()[masked_index]
        output = self(batch, genes)
        total = output.hidden.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        if output.gene_loss is not None:
            gene_loss, num_correct = output.gene_loss
            total = total + self.config.gene_loss_weight * gene_loss
            metrics["gene_loss"] = gene_loss.detach()
            metrics["gene_accuracy"] = num_correct
        if output.value_logits is not None:
            labels = needed(batch, "value_labels", "or set expression_loss_weight: 0")
            values = labels.flatten()[masked_index]
            value_loss, value_metrics = self._value_loss(output.value_logits, values)
            total = total + self.config.expression_loss_weight * value_loss
            metrics |= value_metrics
        if self.config.contrast_weight > 0:
            # A mean over cells, beside losses that are means over masked positions.
            contrast = self._contrast(batch) * masked_index.numel()
            total = total + self.config.contrast_weight * contrast
            metrics["contrast_loss"] = contrast.detach()
        return LossOutput(total, float(masked_index.numel()), metrics)

    def loss_weight(self, batch: dict[str, Any]) -> float:
        """Return the number of masked positions, over which the loss is averaged."""
        self.check_cells(batch)
        return float(needed(batch, "masked_index", _NO_MASKS).numel())

    def training_flops(self, lengths: Sequence[int], num_masked: int) -> float:
        """Return the operations of a forward and a backward pass over cells of these lengths in tokens."""
        return costs.encoder_flops(self.config, lengths, num_masked)

    def activation_bytes(
        self, *, num_tokens: int, num_cells: int, num_masked: int, is_mixed: bool
    ) -> costs.Activations:
        """Return the bytes that a forward pass over one micro-batch keeps (see models/costs.py)."""
        return costs.encoder_activations(
            self.config,
            num_tokens=num_tokens,
            num_cells=num_cells,
            num_masked=num_masked,
            is_mixed=is_mixed,
        )

    def _pooled(self, hidden: Tensor, batch: dict[str, Any], layout: PaddedCells | PackedCells) -> Tensor:
        cells = super()._pooled(hidden, batch, layout)
        if self.cell_summary is None:
            return cells
        return cells + self._summary(
            batch["tokens"], self._expression(batch), read_places(batch, layout), layout
        )

    def _summary(
        self, tokens: Tensor, expression: Tensor, is_read: Tensor, layout: PaddedCells | PackedCells
    ) -> Tensor:
        assert self.cell_summary is not None
        return self.cell_summary(tokens, expression, is_read, layout.sum)

    def _expression(self, batch: dict[str, Any]) -> Tensor:
        """Return what the summary weighs genes by."""
        if not self.config.use_expression_values:
            return torch.ones_like(batch["tokens"], dtype=self.token_embedding.weight.dtype)
        return batch["values"] if self.config.n_bins is None else batch["bins"]

    def _contrast(self, batch: dict[str, Any]) -> Tensor:
        """Return the mean loss of naming each cell of the micro-batch, by either half of its genes from the other."""
        layout, masked_index = cell_layout(batch), batch["masked_index"]
        tokens, expression = batch["tokens"], self._expression(batch)
        visible = self._summary(tokens, expression, read_places(batch, layout), layout)
        is_masked = torch.zeros_like(tokens, dtype=torch.bool)
        is_masked.view(-1)[masked_index] = True
        tokens, expression = tokens.clone(), expression.clone()
        tokens.view(-1)[masked_index] = asked_genes(batch)
        if self.config.use_expression_values:
            hidden_values = needed(batch, "value_labels", "or set contrast_weight: 0").flatten()[masked_index]
            expression.view(-1)[masked_index] = hidden_values.to(expression.dtype)
        masked = self._summary(tokens, expression, is_masked, layout)
        likeness = F.normalize(visible.float(), dim=-1) @ F.normalize(masked.float(), dim=-1).T / _TEMPERATURE
        cells = torch.arange(len(likeness), device=likeness.device)
        return (F.cross_entropy(likeness, cells) + F.cross_entropy(likeness.T, cells)) / 2
