"""The trained model in a folder when a run has ended (`export_to`): whole or not there, and never another run's.

`metadata.yaml` in it says which run wrote it and what the other files are; only that run, or `overwrite`, replaces it.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from data.plain_yaml import load_plain
from trainer.atomicfile import replace_text, sync_folder
from trainer.checkpoint_model import Trained, find_checkpoint, load_trained
from trainer.config.schema import ExportConfig, RunConfig
from trainer.config.yaml_text import write_yaml
from trainer.errors import ConfigError, UserError
from trainer.export import check_free, export
from trainer.pipeline_folder import MODEL_CLASS, write_pipeline

METADATA_FILE = "metadata.yaml"
PIPELINE_FILES = (
    "config.yaml",
    "config.json",
    "model.safetensors",
    "embedder.safetensors",
    "rest.safetensors",
    "training_config.yaml",
    METADATA_FILE,
)
"""What a saved pipeline consists of; the first two say how it is loaded."""


def check_destination(config: RunConfig, run_folder: Path | None) -> None:
    """Find before any training that the folder could not be written; `run_folder` is the one that is gone on in.

    Raises:
        UserError: it holds the model of another run, or something else.
        ConfigError: the run's model has no such form.
    """
    settings = config.export_to
    if settings is None:
        return
    folder = Path(settings.folder)
    if settings.format == "circuits" and config.model.model_class.replace(":", ".") != MODEL_CLASS:
        raise ConfigError(
            f"export_to.format: circuits is a pipeline of {MODEL_CLASS}, and model.model_class is "
            f"{config.model.model_class}; set export_to.format: huggingface"
        )
    if folder.exists() and not folder.is_dir():
        raise UserError(f"export_to.folder: {folder} is a file; name a folder")
    replaces = may_replace(settings, folder, run_folder)
    is_pipeline = settings.format == "circuits"
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    there = [name for name in there if name in PIPELINE_FILES] if is_pipeline else there
    if there and not replaces:
        raise UserError(
            f"export_to.folder: {folder} holds {_whose(folder)} ({', '.join(there[:8])}); name another folder "
            "(general.output_path or general.model_name of a circuits config), or allow replacing it with "
            "export_to.overwrite=true (general.overwrite=true)"
        )
    if not is_pipeline:
        check_free(folder, replaces)


def may_replace(settings: ExportConfig, folder: Path, run_folder: Path | None) -> bool:
    """Tell whether what is in a folder may be replaced: the run itself has written it, or is told to."""
    return settings.overwrite or (
        run_folder is not None and read_metadata(folder).get("run") == run_folder.name
    )


def write_result(config: RunConfig, run_folder: Path, device: str) -> list[str]:
    """Write what `export_to` asks for from the newest checkpoint of a run, and return what is to be said of it.

    Raises:
        UserError: the folder cannot be written, or the model has no such form.
    """
    settings = config.export_to
    assert settings is not None
    folder = Path(settings.folder)
    check_destination(config, run_folder)
    try:
        if settings.format == "huggingface":
            replaces = may_replace(settings, folder, run_folder)
            said = export(run_folder, folder, overwrite=replaces, trusted_modules=modules_of(config))
            trained = find_checkpoint(run_folder)
            files = sorted(file.name for file in folder.iterdir() if file.name != METADATA_FILE)
            facts = {"run": run_folder.name, "step": trained.step, "device_used": device}
            write_metadata(folder, facts, files)
            return said
        trained = load_trained(find_checkpoint(run_folder), trusted_modules=modules_of(config))
        facts = metadata_of(trained, run_folder, device)
        written = place(folder, lambda temporary: write_pipeline(trained, settings, temporary), facts)
    except OSError as error:
        raise UserError(f"export_to.folder: {error.filename or folder}: {error.strerror or error}") from error
    size = sum((folder / name).stat().st_size for name in written)
    averaged = ", averaged weights" if trained.is_averaged else ""
    return [
        f"saved the model of step {trained.saved.step} to {folder} ({len(written)} files, {size:,} bytes{averaged})"
    ]


def modules_of(config: RunConfig) -> tuple[str, ...]:
    """Return the modules that a run's own configuration names: its user has trusted them by starting it."""
    paths = [config.model.model_class, config.model.config_class, config.loss and config.loss.loss_class]
    paths += [phase.dataloader_factory for phase in config.datasets]
    paths += [
        phase.validation.dataloader_factory for phase in config.datasets if phase.validation is not None
    ]
    return tuple(sorted({path.replace(":", ".").partition(".")[0] for path in paths if path}))


def metadata_of(trained: Trained, run_folder: Path, device: str) -> dict[str, Any]:
    """Return what `metadata.yaml` says of a trained model, beside its kind."""
    progress = trained.state["progress"]
    return {
        "training_epochs": sum(phase.epochs for phase in trained.config.datasets),
        "training_steps": progress["global_step"],
        "samples_seen": progress["cells"],
        "device_used": device,
        "run": run_folder.name,
        "weights": "averaged" if trained.is_averaged else "trained",
        "seed": trained.config.seed,
    }


def place(folder: Path, write: Callable[[Path], dict[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    """Let `write` fill a folder, add `metadata.yaml`, and give the folder its name; return the files.

    A folder that is there already, which may hold more than the model, gets the files one by one: those that say how
    the model is loaded go first and come last, so that nothing in between loads.

    Args:
        folder: where the model goes.
        write: what writes into an empty folder; it returns what `metadata.yaml` says beside `facts`.
        facts: what `metadata.yaml` says.
    """
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    home = folder if folder.exists() else folder.parent
    temporary = home / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    try:
        temporary.mkdir()
        own = write(temporary)
        names = sorted(file.name for file in temporary.iterdir())
        write_metadata(temporary, {**own, **facts}, names)
        names.append(METADATA_FILE)
        for name in names:
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
        if home != folder:
            sync_folder(temporary)
            with contextlib.suppress(OSError):
                os.rename(temporary, folder)
                sync_folder(folder.parent)
                return names
            folder.mkdir(exist_ok=True)  # somebody was faster
        for name in PIPELINE_FILES:
            (folder / name).unlink(missing_ok=True)
        sync_folder(folder)
        for name in sorted(names, key=lambda name: (name in PIPELINE_FILES[:2], name)):
            os.rename(temporary / name, folder / name)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return names


def write_metadata(folder: Path, facts: Mapping[str, Any], files: list[str]) -> None:
    """Write `metadata.yaml`: plain values, and the size and SHA-256 of the files beside it."""
    content = {
        **facts,
        "save_timestamp": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
            for name in files
        },
    }
    replace_text(folder / METADATA_FILE, write_yaml(content))


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return what `metadata.yaml` of a folder says; empty where there is none that can be read."""
    try:
        content = load_plain((folder / METADATA_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def damaged_files(folder: Path) -> list[str]:
    """Return what of a saved model is missing, or is not what was written; empty where it is whole, or was not said."""
    listed = read_metadata(folder).get("files")
    problems = []
    for name, facts in (listed if isinstance(listed, dict) else {}).items():
        path = folder / Path(str(name)).name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif not isinstance(facts, dict) or _sha256(path) != facts.get("sha256"):
            problems.append(f"{name} is not what was written")
    return problems


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _whose(folder: Path) -> str:
    facts = read_metadata(folder)
    if "run" in facts:
        return f"the model of run {facts['run']}, saved {facts.get('save_timestamp', 'at an unknown time')}"
    return "what no run has saved there"
