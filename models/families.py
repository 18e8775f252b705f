"""Our families of models of cells: what configurations call them, their classes, what they learn; imports no torch."""

from dataclasses import dataclass
from typing import Literal

Architecture = Literal["transformer_encoder", "autoregressive_transformer", "masked_autoencoder"]
"""What configurations call the families; a test compares it with `FAMILIES`."""

PretrainingTask = Literal[
    "masked_gene_prediction",
    "masked_expression_prediction",
    "masked_gene_and_expression_prediction",
    "next_gene_prediction",
]


@dataclass(frozen=True)
class Family:
    """What the rest of the program knows of a family without importing it."""

    model_class: str
    """Dotted path of the model's class, a `models.cell_model.CellModel`."""
    config_class: str
    """Dotted path of the class of its configuration, a `models.model_config.ModelConfig`."""
    tasks: tuple[PretrainingTask, ...]
    """What it can be trained to predict; the first is what it is for."""
    own_fields: tuple[str, ...] = ()
    """Fields of the section `model` that its configuration alone has."""
    weighs_losses: bool = True
    """Whether its configuration has `gene_loss_weight` and `expression_loss_weight`."""
    needs_bins: bool = False
    """Whether cells are binned for it to predict, whatever the tokenizer's strategy."""


FAMILIES: dict[Architecture, Family] = {
    "transformer_encoder": Family(
        model_class="models.encoder.MaskedCellEncoder",
        config_class="models.encoder.EncoderConfig",
        tasks=(
            "masked_gene_prediction",
            "masked_expression_prediction",
            "masked_gene_and_expression_prediction",
        ),
    ),
    "autoregressive_transformer": Family(
        model_class="models.autoregressive.AutoregressiveModel",
        config_class="models.autoregressive.AutoregressiveConfig",
        tasks=("next_gene_prediction",),
        needs_bins=True,
    ),
    "masked_autoencoder": Family(
        model_class="models.masked_autoencoder.MaskedAutoencoder",
        config_class="models.masked_autoencoder.MaskedAutoencoderConfig",
        tasks=("masked_expression_prediction",),
        own_fields=("decoder_dim", "decoder_layers", "decoder_heads"),
        weighs_losses=False,
    ),
}
