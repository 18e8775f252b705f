"""The model of a checkpoint: built from its own configuration without its data, and what the checkpoint says of it."""

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from data.exported import GENES_FILE, PhaseSettings, tokenizer_record
from data.genes import GeneSpace
from data.perturbation_settings import LOADER as PERTURBATION_LOADER
from data.perturbation_settings import settings_entry
from models.errors import ModelError
from models.fine_tuned import FineTunedModel
from models.pretrained import (
    ModelDescription,
    config_fields,
    describe,
    is_json,
    resolve_trusted,
    signature_defaults,
)
from trainer import export_probe
from trainer.checkpoint_folder import MANIFEST, SavedCheckpoint, checkpoint_step, find_newest, open_checkpoint
from trainer.circuit_facts import saved_circuits
from trainer.config.load import load_saved_config
from trainer.config.schema import RunConfig
from trainer.errors import CheckpointError
from trainer.model_building import build_model, complete_arguments
from trainer.phases import DataFacts
from trainer.run_state import load_weights
from trainer.shards import has_averages, open_tensors, whole_weights

TRUST: dict[str, Any] = {
    "action": "append",
    "default": [],
    "metavar": "MODULE",
    "help": "a module or package of your own that the model may name, which runs its code; may be repeated",
}
"""The option `--trust` of commands that open models."""


@dataclass(frozen=True)
class Trained:
    """A trained model, and what its checkpoint says of it."""

    saved: SavedCheckpoint
    config: RunConfig
    facts: DataFacts
    model: nn.Module
    is_averaged: bool = False
    """Whether the weights are moving averages of those that were trained."""
    trusted_modules: tuple[str, ...] = ()
    """What else of the user's the configuration may name."""

    @property
    def state(self) -> dict[str, Any]:
        """What the checkpoint says of the run."""
        return self.saved.state

    @property
    def num_parameters(self) -> int:
        """Number of the model's weights."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def is_ours(self) -> bool:
        """Whether a batch can be made up for the model: it is one of ours."""
        return export_probe.is_known(self.model)


def find_checkpoint(path: Path) -> SavedCheckpoint:
    """Open a checkpoint folder, or the newest one of a run folder, every file verified.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder; give a checkpoint folder or a run folder")
    path = Path(os.path.abspath(path))  # `.` may stand for a checkpoint, whose name holds its step
    if (path / MANIFEST).is_file() or checkpoint_step(path) is not None:
        return open_checkpoint(path)
    newest = find_newest(path, fall_back=False).checkpoint
    if newest is None:
        raise CheckpointError(f"{path}: it is neither a checkpoint nor a run folder with a complete one")
    return open_checkpoint(newest, verify=False)


def load_trained(
    saved: SavedCheckpoint, *, averaged: bool = True, trusted_modules: Sequence[str] = ()
) -> Trained:
    """Build the model that a checkpoint's own configuration describes, without its data, and load the weights.

    Args:
        saved: the checkpoint, which may have come from anywhere.
        averaged: take the moving averages of the weights where the run kept them (`ema`).
        trusted_modules: modules or packages that the configuration may name beside this package; they are imported.

    Raises:
        CheckpointError, ModelError: it is damaged, or names a class that is not trusted.
    """
    config = load_saved_config(saved.folder / "config.yaml")
    check_model_is_trusted(config, saved, trusted_modules)
    if "sizes" not in saved.state:
        raise CheckpointError(
            f"{saved.folder} does not say the sizes of its data, so its model cannot be built without them; resume the "
            "run for one step and export the checkpoint that this writes"
        )
    facts = saved_facts(saved)
    # The layers of an export are plain ones, whose weights are the same: it is to run where there is no FP8.
    config = config.model_copy(update={"precision": None, "fp8": None} if config.precision == "fp8" else {})
    model = build_model(config, facts)
    tensors = open_tensors(saved)
    load_weights(model, whole_weights(tensors, averaged=averaged), str(saved.folder))
    is_averaged = averaged and has_averages(tensors)
    return Trained(saved, config, facts, model.eval(), is_averaged, tuple(trusted_modules))


def saved_facts(saved: SavedCheckpoint) -> DataFacts:
    """Return what a checkpoint that says the sizes of its data knows of it."""
    state = saved.state
    genes = GeneSpace.from_json(saved.text(GENES_FILE)) if saved.has(GENES_FILE) else None
    options = state.get("tokenizer_options", {})
    return DataFacts(
        state["technical_batches"],
        state["n_technical_batches"],
        genes,
        state["sizes"],
        tuple(state.get("label_names", ())),
        options,
        saved_circuits(options),
    )


def check_model_is_trusted(
    config: RunConfig, saved: SavedCheckpoint, trusted_modules: Sequence[str] = ()
) -> None:
    """Refuse a checkpoint whose model is neither of this package nor of a trusted module, before it is imported.

    Raises:
        CheckpointError: it is not.
    """
    settings = config.model
    for key, path in (("model_class", settings.model_class), ("config_class", settings.config_class)):
        if path is not None:
            check_trusted(path, f"{saved.folder / 'config.yaml'}: model.{key}", ("models", *trusted_modules))


def check_trusted(path: str, where: str, trusted: Sequence[str]) -> None:
    """Refuse what a checkpoint names where its code would run, unless it is of a trusted module."""
    try:
        resolve_trusted(path, where, trusted)
    except ModelError as error:
        module = path.replace(":", ".").partition(".")[0]
        if module in trusted:
            raise CheckpointError(str(error)) from error
        raise CheckpointError(
            f"{where} is {path}, and a checkpoint may name only what is of {', '.join(trusted)}: its code would run. "
            f"If you trust it, give --trust {module}, or trusted_modules=({module!r},) in Python"
        ) from error


def tokenizer_settings(trained: Trained) -> dict[str, Any] | None:
    """Return how the run's phases tokenized their cells, as `cell_tokenizer.json` holds it; None: not by ours."""
    kinds = trained.state.get("value_kinds", {})
    options = trained.state.get("tokenizer_options", {})
    return tokenizer_record(
        PhaseSettings(
            phase.name,
            phase.dataloader_factory,
            phase.dataloader_args,
            kinds.get(phase.name),
            options.get(phase.name),
        )
        for phase in trained.config.datasets
    )


def perturbation_entries(trained: Trained) -> list[dict[str, Any]]:
    """Return how the phases made sets of perturbed cells (see `data.perturbation_settings`), of those that did."""
    kinds, options = trained.state.get("value_kinds", {}), trained.facts.tokenizer_options
    phases = [
        phase
        for phase in trained.config.datasets
        if phase.dataloader_factory.replace(":", ".") == PERTURBATION_LOADER and phase.name in options
    ]
    unknown = [phase.name for phase in phases if phase.name not in kinds]
    if unknown:
        raise CheckpointError(
            f"{trained.saved.folder}: it does not say what the values of phase '{unknown[0]}' are (value_kinds); its "
            "files were edited"
        )
    return [
        settings_entry(phase.name, phase.dataloader_args, kinds[phase.name], options[phase.name])
        for phase in phases
    ]


def describe_run_model(trained: Trained) -> ModelDescription:
    """Return how the run constructed its model, complete with sizes and defaults."""
    config, facts, settings = trained.config, trained.facts, trained.config.model
    if isinstance(trained.model, FineTunedModel):  # merged, it is no more what the run's arguments make
        return describe(trained.model)
    constructor, given = complete_arguments(config, facts)
    complete = {**signature_defaults(constructor), **given}
    if settings.config_class is None:
        return ModelDescription(settings.model_class, complete, n_technical_batches=facts.n_technical_batches)
    resolved = _resolved_fields(constructor, given)
    return ModelDescription(
        settings.model_class,
        dict(settings.model_args),
        settings.config_class,
        complete if resolved is None else resolved,
        facts.n_technical_batches,
    )


def _resolved_fields(config_class: Any, given: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fields of a dataclass config, or None where these are no arguments that make an equal one."""
    make: Any = config_class
    if not (isinstance(config_class, type) and dataclasses.is_dataclass(config_class)):
        return None
    made = make(**given)
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in config_fields(made).items()}
    if not all(map(is_json, fields.values())):
        return None
    return fields if config_fields(make(**fields)) == config_fields(made) else None
