"""Masked autoencoder over the genes of a cell: an encoder of the visible genes, a decoder that is asked for the rest.

The encoder runs once, on visible tokens alone. The decoder sees what it made of them, and for every masked position
which gene stands there, and predicts that gene's expression.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import costs
from models.attention import AttentionSpans
from models.cell_layout import PackedCells, cell_layout
from models.cell_model import CellModel, asked_genes, hidden_places, needed, num_real_tokens, places_of
from models.embeddings import Embedding
from models.layers import Linear
from models.masked_heads import DecodedValueHead
from models.model_config import ModelConfig, wrong_fp8_sizes
from models.outputs import LossOutput
from models.transformer import Transformer, block_options

_NO_MASKS = "configure masking for this data, with target: expression"


@dataclass(frozen=True)
class MaskedAutoencoderConfig(ModelConfig):
    """Hold the sizes and choices of a `MaskedAutoencoder`: those of `models.model_config.ModelConfig`, and its own.

    Attributes:
        position_embedding: `none` (a cell is a set of genes) or `learned` (for rank-ordered tokens): of a token among
            the visible ones of its cell, so that it does not tell where a masked gene ranks.
        decoder_dim: width of the decoder; None is half of `hidden_dim`. Its MLPs are four times as wide.
        decoder_layers: transformer blocks of the decoder.
        decoder_heads: attention heads of the decoder, which must divide its width; None is `num_heads`.
    """

    decoder_dim: int | None = None
    decoder_layers: int = 4
    decoder_heads: int | None = None

    @property
    def decoder_width(self) -> int:
        """Width of the decoder."""
        return max(1, self.hidden_dim // 2) if self.decoder_dim is None else self.decoder_dim

    @property
    def num_decoder_heads(self) -> int:
        """Attention heads of the decoder."""
        return self.num_heads if self.decoder_heads is None else self.decoder_heads

    def wrong_fields(self) -> Iterable[str]:
        """Say what is wrong, a field or a pair of fields at a time."""
        yield from super().wrong_fields()
        yield from self.at_least(1, "decoder_dim", "decoder_layers", "decoder_heads")
        width, heads = self.decoder_width, self.num_decoder_heads
        if width > 0 and heads > 0 and width % heads:
            yield f"decoder_dim {width} is not divisible by decoder_heads {heads}"
        yield from wrong_fp8_sizes(
            self.layer_backend,
            self.fp8_recipe,
            {"decoder_dim": width},
            dim=width,
            num_heads=heads,
            heads_field="decoder_heads",
        )


class AutoencoderOutput(NamedTuple):
    """Hold what a forward pass returns.

    Attributes:
        hidden: [1, V, D] hidden states of all visible tokens, cell after cell.
        value_logits: [M, n_bins] at the masked positions, or [M] for continuous values.
    """

    hidden: Tensor
    value_logits: Tensor


class MaskedAutoencoder(CellModel):
    """Encode the visible genes of a cell, and decode the expression of the masked ones, which it is told by name.

    Cells are packed one after the other, whatever the batch's layout: no padding is computed in either half.
    """

    head_names = (
        "technical_batch_embedding",
        "to_decoder",
        "gene_to_decoder",
        "mask_vector",
        "decoder",
        "value_head",
    )

    def __init__(self, config: MaskedAutoencoderConfig, *, has_heads: bool = True) -> None:
        """Draw the weights, every module its own."""
        super().__init__(config, has_heads=has_heads)
        dim, std, width = config.hidden_dim, config.init_std, config.decoder_width
        self.technical_batch_embedding = self._build_technical_batches(width)
        self.transformer = self._build_transformer(is_last=not has_heads)
        if not has_heads:
            return
        self.to_decoder = Linear(dim, width, init_std=std)
        self.gene_to_decoder = Linear(dim, width, bias=False, init_std=std)
        self.mask_vector = Embedding(1, width, init_std=std)
        self.decoder = Transformer(
            width,
            config.decoder_layers,
            config.num_decoder_heads,
            4 * width,
            **block_options(config),
            activation_checkpointing=config.activation_checkpointing,
            factory=self._factory,
            name="decoder.layers",
        )
        self.value_head = DecodedValueHead(width, config.vocab_size, config.n_bins or 1, init_std=std)

    def forward(self, batch: dict[str, Any]) -> AutoencoderOutput:
        """Return hidden states of the visible tokens and the predicted expression at the masked positions.

        Args:
            batch: as the loader yields it, masked.
        """
        self._need_heads()
        needed(batch, "masked_index", _NO_MASKS)
        with self._factory.region():
            visible, layout = self._visible(batch)
            hidden = self._hidden_states(visible, layout)  # [1, V, D]
            decoded = self._decode(hidden, visible, batch)  # [M, width]
        assert isinstance(self.value_head, DecodedValueHead)
        value_logits = self.value_head(decoded, asked_genes(batch))
        if self.config.n_bins is None:
            value_logits = value_logits.squeeze(-1)
        return AutoencoderOutput(hidden, value_logits)

    def compute_loss(self, batch: dict[str, Any]) -> LossOutput:
        """Return the summed loss over the masked positions, with accuracy as a metric."""
        masked_index = needed(batch, "masked_index", _NO_MASKS)
        logits = self(batch).value_logits
        values = needed(batch, "value_labels", _NO_MASKS).flatten()[masked_index]
        loss, metrics = self._value_loss(logits, values)
        return LossOutput(loss, float(masked_index.numel()), metrics)

    def loss_weight(self, batch: dict[str, Any]) -> float:
        """Return the number of masked positions, over which the loss is averaged."""
        self.check_cells(batch)
        return float(needed(batch, "masked_index", _NO_MASKS).numel())

    def encode(self, batch: dict[str, Any]) -> Tensor:
        """Return one embedding per cell, [B, D], of its visible tokens; it does not depend on the technical batch."""
        self.check_cells(batch)
        visible, layout = self._visible(batch)
        return self._pooled(self._hidden_states(visible, layout), visible, layout)

    def compiled_modules(self) -> list[nn.Module]:
        """Return what `compile: true` compiles: the blocks of both halves."""
        return [*self.transformer.layers, *(self.decoder.layers if self.has_heads else ())]

    def training_flops(self, lengths: Sequence[int], num_masked: int) -> float:
        """Return the operations of a forward and a backward pass over cells of these lengths in tokens."""
        return costs.autoencoder_flops(self.config, lengths, num_masked)

    def activation_bytes(
        self, *, num_tokens: int, num_cells: int, num_masked: int, is_mixed: bool
    ) -> costs.Activations:
        """Return the bytes that a forward pass over one micro-batch keeps (see models/costs.py)."""
        return costs.autoencoder_activations(
            self.config,
            num_tokens=num_tokens,
            num_cells=num_cells,
            num_masked=num_masked,
            is_mixed=is_mixed,
        )

    def matrix_sizes(self) -> dict[str, int]:
        """Return by field name the sizes of the matrices that FP8 layers multiply."""
        return {**super().matrix_sizes(), "decoder_dim": self.config.decoder_width}

    def _visible(self, batch: dict[str, Any]) -> tuple[dict[str, Any], PackedCells]:
        """Return a batch of the visible tokens alone, packed."""
        layout = cell_layout(batch)
        is_visible = layout.is_real & ~hidden_places(batch)
        num_masked = batch["masked_index"].numel() if "masked_index" in batch else 0
        index, _ = places_of(is_visible, num_real_tokens(batch, layout) - num_masked)
        lengths = layout.sum(is_visible.unsqueeze(-1).float()).squeeze(-1).int()
        bounds = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        visible: dict[str, Any] = {
            "cu_seqlens": bounds,
            "max_length": layout.max_length,
            "num_tokens": len(index),
        }
        for key in ("tokens", "values", "bins"):
            if key in batch:
                visible[key] = batch[key].flatten()[index].unsqueeze(0)
        if "depth" in batch:
            visible["depth"] = batch["depth"]
        return visible, PackedCells(visible)

    def _decode(self, hidden: Tensor, visible: dict[str, Any], batch: dict[str, Any]) -> Tensor:
        """Return what the decoder makes of each masked position, [M, width].

        In the decoder a cell's visible tokens come first, and its masked positions after them: there is no order among
        these, and no position, which in rank-ordered tokens would tell the expression.
        """
        masked_index = batch["masked_index"]
        genes = asked_genes(batch)
        of_visible, of_masked = PackedCells(visible).cell, cell_layout(batch).cells_of(masked_index)
        mask = self.mask_vector(torch.zeros_like(genes))
        told = mask + self.gene_to_decoder(self.token_embedding(genes))  # [M, width]
        x = torch.cat([self.to_decoder(hidden[0]), told.to(hidden.dtype)])
        cells = torch.cat([of_visible, of_masked])
        offset = self._technical_vectors(batch)  # [B, width]
        if offset is not None:
            x = x + F.embedding(cells, offset)
        order = cells.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        num_cells = len(visible["cu_seqlens"]) - 1
        lengths = torch.zeros(num_cells, dtype=torch.long, device=cells.device)
        lengths = lengths.scatter_add(0, cells, torch.ones_like(cells))
        bounds = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        spans = AttentionSpans(bounds, cell_layout(batch).max_length, len(x))
        decoded = self.decoder(self.dropout(x[order]).unsqueeze(0), spans)[0]
        return decoded[place[len(of_visible) :]]
