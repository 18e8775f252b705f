"""A trained model of perturbations from what a run left, with what its sets were made by."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data.exported import GENES_FILE, TECHNICAL_BATCHES_FILE, read_json
from data.genes import GeneSpace
from data.perturbation_settings import LOADER, PerturbationSettings, load_entries, read_settings
from models.pretrained import CONFIG_FILE, from_pretrained
from trainer.checkpoint_model import find_checkpoint, load_trained, perturbation_entries
from trainer.errors import UserError
from trainer.prediction import check_can_draw, knows_technical_batches


@dataclass(frozen=True)
class PerturbationModel:
    """A model in evaluation mode, and how the sets that it was trained on were made."""

    path: Path
    """The export or checkpoint folder that was opened."""
    model: nn.Module
    settings: PerturbationSettings

    @property
    def knows_technical_batches(self) -> bool:
        """Tell whether the model looks at technical batches."""
        return knows_technical_batches(self.model)


def open_perturbation_model(
    path: str | Path,
    phase: str | None = None,
    *,
    device: str | torch.device = "cpu",
    trusted_modules: Sequence[str] = (),
) -> PerturbationModel:
    """Open a trained model of perturbations.

    Args:
        path: a run folder (its newest checkpoint), a checkpoint folder, or an exported folder.
        phase: whose sets are meant; needed where several phases of the run read sets.
        device: where the model is put.
        trusted_modules: modules or packages that the model may name beside this program's; they are imported.

    Raises:
        UserError, DataError, ModelError: there is no model, it is damaged, cannot draw cells, or was not trained on
            sets of perturbed cells that this program read.
    """
    path = Path(path)
    is_export = (path / CONFIG_FILE).is_file()
    opened = (_open_export if is_export else _open_checkpoint)(path, phase, trusted_modules)
    opened.model.to(device).eval()
    return opened


def _open_export(folder: Path, phase: str | None, trusted_modules: Sequence[str]) -> PerturbationModel:
    model = from_pretrained(folder, trusted_modules=trusted_modules)
    check_can_draw(model, str(folder))
    genes = GeneSpace.from_json(read_json(folder / GENES_FILE), str(folder / GENES_FILE))
    batches = read_json(folder / TECHNICAL_BATCHES_FILE)
    return PerturbationModel(
        folder, model, read_settings(load_entries(folder), genes, batches, phase, str(folder))
    )


def _open_checkpoint(path: Path, phase: str | None, trusted_modules: Sequence[str]) -> PerturbationModel:
    trained = load_trained(find_checkpoint(path), trusted_modules=trusted_modules)
    folder = trained.saved.folder
    check_can_draw(trained.model, str(folder))
    entries, genes = perturbation_entries(trained), trained.facts.gene_space
    if not entries or genes is None:
        loaders = ", ".join(dict.fromkeys(each.dataloader_factory for each in trained.config.datasets))
        raise UserError(
            f"{folder}: its cells were read by {loaders}, so nothing says how controls become its conditions; only "
            f"models with a phase of {LOADER} can predict"
        )
    settings = read_settings(entries, genes, trained.facts.technical_batches, phase, str(folder))
    return PerturbationModel(folder, trained.model, settings)
