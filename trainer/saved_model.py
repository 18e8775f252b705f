"""A trained model from what a run left: its run folder, one of its checkpoints, or an export."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.exported import ExportedTokenizer, load_tokenizer, tokenizer_from_record
from models.errors import ModelError
from models.pretrained import CONFIG_FILE, construct, from_pretrained
from trainer.checkpoint_model import find_checkpoint, load_trained, tokenizer_settings
from trainer.config.schema import PhaseConfig
from trainer.errors import UserError
from trainer.losses import move_to_device
from trainer.model_building import build_model


@dataclass(frozen=True)
class SavedModel:
    """A model in evaluation mode, and how new cells become its batches."""

    path: Path
    """The export or checkpoint folder that was opened."""
    model: nn.Module
    tokenizer: ExportedTokenizer
    _construct: Callable[[], nn.Module]
    phases: tuple[PhaseConfig, ...] = ()
    """The phases of the run that trained it; empty for an export, which does not hold them."""

    def untrained(self, seed: int = 0) -> nn.Module:
        """Return the same network at random initialisation, on the same device."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self._construct()
        device = next(self.model.parameters()).device
        return model.to(device).eval()

    @property
    def label_names(self) -> tuple[str, ...]:
        """Return the names of its classes by index; empty where it was not fine-tuned to tell any."""
        return self.tokenizer.label_names

    @property
    def task(self) -> str | None:
        """What it was fine-tuned for, `classification` or `regression`; None: it embeds cells and no more."""
        return getattr(self.model.config, "task", None) if callable(self._predict) else None

    @property
    def _predict(self) -> Any:
        return getattr(self.model, "predict", None)

    def embed(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the embedding of each cell of a batch [B, D], on the CPU in fp32."""
        return embed(self.model, batch)

    @torch.no_grad()
    def predict(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return a fine-tuned model's probabilities [B, classes], or its values [B] or [B, outputs], on the CPU."""
        return self._predict(_on_own_device(self.model, batch)).float().cpu()


def open_model(
    path: str | Path,
    phase: str | None = None,
    *,
    device: str | torch.device = "cpu",
    trusted_modules: Sequence[str] = (),
) -> SavedModel:
    """Open a trained model, whatever strategy and number of processes trained it.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint folder, or an exported folder.
        phase: whose tokenizer settings are meant; needed where the phases of the run differ in them.
        device: where the model is put.
        trusted_modules: modules or packages that the model may name beside this program's; they are imported.

    Raises:
        UserError, DataError, ModelError: there is no model, it is damaged, it cannot embed cells, or its cells were
            not tokenized by this program.
    """
    path = Path(path)
    is_export = (path / CONFIG_FILE).is_file()
    opened = (_open_export if is_export else _open_checkpoint)(path, phase, trusted_modules)
    if not callable(getattr(opened.model, "encode", None)):
        raise ModelError(
            f"{path}: {type(opened.model).__name__} has no method encode(batch), which embeds cells; give it one that "
            "returns [B, D]"
        )
    opened.model.to(device)
    return opened


@torch.no_grad()
def embed(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Return a model's embedding of each cell of a batch [B, D], on the CPU in fp32."""
    encode: Any = model.encode
    return encode(_on_own_device(model, batch)).float().cpu()


def _open_export(folder: Path, phase: str | None, trusted_modules: Sequence[str]) -> SavedModel:
    return SavedModel(
        folder,
        from_pretrained(folder, trusted_modules=trusted_modules),
        load_tokenizer(folder, phase),
        lambda: construct(folder, trusted_modules=trusted_modules),
    )


def _open_checkpoint(path: Path, phase: str | None, trusted_modules: Sequence[str]) -> SavedModel:
    trained = load_trained(find_checkpoint(path), trusted_modules=trusted_modules)
    folder = trained.saved.folder
    record, genes = tokenizer_settings(trained), trained.facts.gene_space
    if record is None or genes is None:
        loaders = ", ".join(dict.fromkeys(each.dataloader_factory for each in trained.config.datasets))
        raise UserError(
            f"{folder}: its cells were read by {loaders}, so nothing says how new cells become tokens; only models "
            "that were trained with this program's own loaders can be given h5ad files"
        )
    facts = trained.facts
    return SavedModel(
        folder,
        trained.model,
        tokenizer_from_record(
            record, genes, facts.technical_batches, facts.label_names, phase, f"{folder}: tokenizer"
        ),
        lambda: build_model(trained.config, trained.facts),
        tuple(trained.config.datasets),
    )


def _on_own_device(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    return move_to_device(batch, next(model.parameters()).device)
