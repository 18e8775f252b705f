"""What a pretrained model is, read from its checkpoint or export without its weights: for those who build on it."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from data.exported import GENES_FILE, TOKENIZER_FILE
from models.pretrained import CONFIG_FILE, FORMAT
from trainer.checkpoint_model import (
    Trained,
    check_model_is_trusted,
    describe_run_model,
    find_checkpoint,
    saved_facts,
    tokenizer_settings,
)
from trainer.config.load import load_saved_config
from trainer.errors import CheckpointError


@dataclass(frozen=True)
class Backbone:
    """A pretrained model of cells: its class, its complete configuration, and how its cells became tokens."""

    folder: Path
    """A checkpoint or an export, which `init_from` and a loader's `gene_vocab` take."""
    model_class: str
    config: Mapping[str, Any]
    """All fields of the model's configuration, sizes that came from the data among them."""
    tokenizer: Mapping[str, Any]
    """The complete options of its tokenizer, with what was fitted to the training cells."""
    value_kind: str = "counts"
    """What its cells' files held: `counts`, or `lognorm`."""


def read_backbone(path: str | Path, where: str) -> Backbone:
    """Read what a run folder, a checkpoint or an export says of its model; `where` is the YAML key of the path.

    Raises:
        CheckpointError: it is none of these, damaged, or its model cannot be a backbone.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise CheckpointError(
            f"{where}: {path} does not exist; give a run folder, a checkpoint folder or an export"
        )
    if not folder.is_dir():
        raise CheckpointError(
            f"{where}: {path} is a file; give the folder of a run, of a checkpoint or of an export (a checkpoint of "
            "this trainer is a folder)"
        )
    found = _of_export(folder, where) if (folder / CONFIG_FILE).is_file() else _of_checkpoint(folder, where)
    if not found.config:
        raise CheckpointError(
            f"{where}: {path} holds a {found.model_class}, which has no configuration object to build it from again"
        )
    return found


def _of_checkpoint(folder: Path, where: str) -> Backbone:
    saved = find_checkpoint(folder)
    config = load_saved_config(saved.folder / "config.yaml")
    check_model_is_trusted(config, saved)
    if not saved.has(GENES_FILE) or "sizes" not in saved.state:
        raise CheckpointError(
            f"{where}: {saved.folder} does not say its genes and sizes; its data was not cells of genes"
        )
    plain = config.model_copy(update={"precision": None, "fp8": None})
    trained = Trained(saved, plain, saved_facts(saved), nn.Identity())  # its weights are not asked for
    description = describe_run_model(trained)
    record = tokenizer_settings(trained)
    folder = Path(os.path.abspath(saved.folder))
    return Backbone(folder, description.model_class, description.config_args, *_tokens(record, folder, where))


def _of_export(folder: Path, where: str) -> Backbone:
    description = _read_json(folder / CONFIG_FILE, where)
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{where}: {folder / CONFIG_FILE} is not of an export (no format {FORMAT})")
    if not isinstance(description.get("model_class"), str) or not isinstance(
        description.get("config_args"), dict
    ):
        raise CheckpointError(f"{where}: {folder / CONFIG_FILE} does not say its model_class and config_args")
    record = _read_json(folder / TOKENIZER_FILE, where)
    folder = Path(os.path.abspath(folder))
    return Backbone(
        folder, description["model_class"], description["config_args"], *_tokens(record, folder, where)
    )


def _tokens(record: Mapping[str, Any] | None, folder: Path, where: str) -> tuple[dict[str, Any], str]:
    """Return options and value kind of the last phase's tokenizer: the one that the weights were trained with last."""
    match [] if record is None else record.get("settings"):
        case [*_, {"value_kind": str() as value_kind, "options": dict() as options}]:
            return dict(options), value_kind
    raise CheckpointError(f"{where}: {folder} does not say how its cells became tokens")


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {path} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: {path} holds no table")
    return content
