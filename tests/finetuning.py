"""Small pretrained models and configurations that fine-tune them, for tests."""

from pathlib import Path
from typing import Any

import numpy as np
from corpora import Cells, write_corpus
from running import toy

from data.synthetic import make_synthetic_counts

NUM_GENES, NUM_CLASSES = 40, 3
SIZES = {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.1}
TOKENIZER = {"strategy": "binned_expression", "binning_method": "per_cell", "n_bins": 5, "max_genes": 24}
FAMILIES = {
    "encoder": ("models.encoder.MaskedCellEncoder", "models.encoder.EncoderConfig", "both"),
    "autoregressive": (
        "models.autoregressive.AutoregressiveModel",
        "models.autoregressive.AutoregressiveConfig",
        None,
    ),
    "autoencoder": (
        "models.masked_autoencoder.MaskedAutoencoder",
        "models.masked_autoencoder.MaskedAutoencoderConfig",
        "expression",
    ),
}


def write_typed_corpus(folder: Path, num_cells: int = 90, seed: int = 1) -> Path:
    """Write cells of three types, which `technical_batch` names, as classes, and `age` numbers."""
    cells = make_synthetic_counts(
        num_cells, NUM_GENES, 12, seed=seed, num_batches=2, num_cell_types=NUM_CLASSES
    )
    kinds = np.asarray(cells.cell_type)
    columns = {"technical_batch": kinds, "age": kinds.astype(np.float64) / 10}
    written = Cells(cells.indptr, cells.indices, cells.counts, columns)
    return write_corpus(folder, written, NUM_GENES, columns=("technical_batch", "age"))


def pretraining(family: str, corpus: Path, **changes: Any) -> dict[str, Any]:
    """Return a run of two steps that pretrains a small model of a family."""
    model_class, config_class, target = FAMILIES[family]
    arguments: dict[str, Any] = {"path": str(corpus), "tokenizer": TOKENIZER}
    if target is not None:
        arguments["masking"] = {"mask_ratio": 0.3, "target": target}
    sizes = {**SIZES, **({"decoder_layers": 1} if family == "autoencoder" else {})}
    model = {"model_class": model_class, "config_class": config_class, "config_args": sizes}
    phase = {"dataloader_factory": "data.loader.cell_loader", "dataloader_args": arguments, "max_steps": 2}
    return toy(phase, **{"model": model, "micro_batch_size": 4, "optimizer": {}, **changes})


def backbone_config(family: str = "encoder") -> dict[str, Any]:
    """Return the whole configuration of the backbone that `pretraining` trains, as its data makes it."""
    sizes = {**SIZES, **({"decoder_layers": 1} if family == "autoencoder" else {})}
    return {**sizes, "vocab_size": 4 + NUM_GENES, "n_bins": 5, "n_technical_batches": 3}


def fine_tuning(
    corpus: Path,
    init_from: Path | None,
    *,
    family: str = "encoder",
    phases: list[dict[str, Any]] | None = None,
    config_args: dict[str, Any] | None = None,
    loader: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Return a run that fine-tunes such a model to tell the three types."""
    model = {
        "model_class": "models.fine_tuned.FineTunedModel",
        "config_class": "models.fine_tuned.FineTunedConfig",
        "config_args": {
            "backbone_class": FAMILIES[family][0],
            "backbone_config": backbone_config(family),
            **(config_args or {}),
        },
    }
    arguments = {"path": str(corpus), "tokenizer": TOKENIZER, "label": "technical_batch", **(loader or {})}
    common = {"dataloader_factory": "data.loader.cell_loader", "dataloader_args": arguments}
    return toy(
        *({**common, **phase} for phase in phases or [{"max_steps": 3}]),
        **{
            "model": model,
            "micro_batch_size": 4,
            "optimizer": {"optimizer_args": {"lr": 0.01}},
            "init_from": None if init_from is None else str(init_from),
            **changes,
        },
    )
