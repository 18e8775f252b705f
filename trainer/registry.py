"""Saved models by name: `python -m trainer models list|info|load|delete`, and `trainer.registry.load(name)`.

A model is a folder with `metadata.yaml`, as runs with `export_to` write it; its name is the folder's, or its path below
the root. There is no list on disk that could be wrong: the folders are the registry.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.pretrained import from_pretrained
from trainer.atomicfile import sync_folder
from trainer.config.messages import unknown_name
from trainer.config.yaml_text import write_yaml
from trainer.console import printable, table
from trainer.errors import UserError
from trainer.exits import run_command
from trainer.saved_run import METADATA_FILE, PIPELINE_FILES, damaged_files, read_metadata

ROOT = "runs"
_MOST_LEVELS = 3
_LISTED = ("model_type", "training_epochs", "training_steps", "save_timestamp", "run")


@dataclass(frozen=True)
class Entry:
    """A saved model."""

    name: str
    """Its folder's path below the root; `.` for the root itself."""
    folder: Path
    metadata: dict[str, Any]


def list_models(root: str | Path = ROOT) -> list[Entry]:
    """Return the saved models in a folder and up to three levels below it, by name."""
    root = Path(root)
    found = []
    for folder in _folders(root, _MOST_LEVELS):
        metadata = read_metadata(folder)
        if "run" in metadata:
            found.append(Entry(folder.relative_to(root).as_posix(), folder, metadata))
    return sorted(found, key=lambda entry: entry.name)


def find(name: str, root: str | Path = ROOT) -> Entry:
    """Return the saved model of a name.

    Raises:
        UserError: there is none, or several have it.
    """
    entries = list_models(root)
    exact = [entry for entry in entries if entry.name == name.strip("/")]
    matching = exact or [entry for entry in entries if entry.folder.name == name]
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise UserError(
            f"{name}: {', '.join(entry.name for entry in matching)} end like this; give one of these"
        )
    if not entries:
        raise UserError(f"{name}: there is no saved model in {root}; give --root, the folder that holds them")
    raise UserError(
        f"{name}: no such model in {root}; {unknown_name(name, [entry.name for entry in entries])}"
    )


def load(name: str, root: str | Path = ROOT, *, device: str | torch.device = "cpu") -> nn.Module:
    """Return a saved model in evaluation mode, its files compared with what was written.

    Args:
        name: of a model in `root`, or the path of its folder.
        root: the folder that holds saved models.
        device: where the model is put.

    Raises:
        UserError: there is no such model, or a file of it is damaged.
        ModelError: it cannot be loaded.
    """
    folder = Path(name) if (Path(name) / METADATA_FILE).is_file() else find(name, root).folder
    problems = damaged_files(folder)
    if problems:
        raise UserError(f"{folder} is damaged: {'; '.join(problems)}; train or copy it again")
    return from_pretrained(folder, device=device)


def delete(name: str, root: str | Path = ROOT) -> list[str]:
    """Delete a saved model's files, and its folder where nothing else is in it; return what is to be said.

    Raises:
        UserError: there is no such model.
    """
    entry = find(name, root)
    listed = entry.metadata.get("files")
    names = {Path(str(file)).name for file in (listed if isinstance(listed, dict) else {})}
    # The metadata go last: until then the folder is listed, and can be deleted again.
    for file in [*sorted((names | set(PIPELINE_FILES)) - {METADATA_FILE, "", ".."}), METADATA_FILE]:
        (entry.folder / file).unlink(missing_ok=True)
    left = sorted(path.name for path in entry.folder.iterdir())
    if left:
        return [f"deleted {entry.folder}; what else is in it stays: {', '.join(left[:8])}"]
    entry.folder.rmdir()
    sync_folder(entry.folder.parent)
    return [f"deleted {entry.folder}"]


def _folders(folder: Path, levels: int) -> Iterator[Path]:
    """Yield a folder and those below it, but for hidden ones and what is in runs."""
    if (folder / METADATA_FILE).is_file():
        yield folder
    if levels == 0 or not folder.is_dir() or (folder / "metrics.jsonl").exists():
        return
    with os.scandir(folder) as found:
        inner = sorted(Path(each.path) for each in found if each.is_dir() and not each.name.startswith("."))
    for each in inner:
        yield from _folders(each, levels - 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for the user's mistake, 130 when interrupted, 1 for anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer models",
        allow_abbrev=False,
        description="List saved models, tell what one is, load one to see whether it is whole, or delete one.",
        epilog="Exit codes: 0 done, 2 a mistake in the command or its files, 130 interrupted, 1 anything else.",
    )
    parser.add_argument("action", choices=("list", "info", "load", "delete"))
    parser.add_argument("name", nargs="?", metavar="NAME", help="the model; not with list")
    parser.add_argument(
        "--root", default=ROOT, metavar="DIR", help=f"the folder that holds saved models (default: {ROOT})"
    )
    parser.add_argument("--yes", action="store_true", help="delete without asking")
    try:
        arguments = parser.parse_args(argv)
        if (arguments.name is None) != (arguments.action == "list"):
            parser.error("list takes no NAME" if arguments.name else f"{arguments.action} needs a NAME")
    except SystemExit as done:
        return int(done.code or 0)
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.action == "list":
        said = _listing(arguments.root)
    elif arguments.action == "info":
        said = _account(find(arguments.name, arguments.root))
    elif arguments.action == "load":
        said = _loading(arguments.name, arguments.root)
    else:
        entry = find(arguments.name, arguments.root)
        if not arguments.yes and not _agrees(entry):
            print("nothing was deleted")
            return 0
        said = delete(arguments.name, arguments.root)
    for line in said:
        print(printable(line))
    return 0


def _listing(root: str) -> list[str]:
    if not Path(root).is_dir():
        raise UserError(f"{root}: there is no such folder; give --root, the folder that holds saved models")
    entries = list_models(root)
    if not entries:
        return [f"there is no saved model in {root}"]
    rows = [[entry.name, *(str(entry.metadata.get(key, "")) for key in _LISTED)] for entry in entries]
    return [table(["name", "kind", "epochs", "steps", "saved", "run"], rows)]


def _account(entry: Entry) -> list[str]:
    facts = {key: value for key, value in entry.metadata.items() if key != "files"}
    problems = damaged_files(entry.folder)
    return [
        f"{entry.name}: {entry.folder}",
        *(f"  {line}" for line in write_yaml(facts).splitlines()),
        f"  files: {', '.join(sorted(file.name for file in entry.folder.iterdir() if file.is_file()))}",
        f"  {'damaged: ' + '; '.join(problems) if problems else 'every file is what was written'}",
    ]


def _loading(name: str, root: str) -> list[str]:
    model = load(name, root)
    config: Any = getattr(model, "config", None)
    said = [
        f"{type(model).__name__} with {sum(p.numel() for p in model.parameters()):,} parameters, every file verified"
    ]
    gates, prompts = getattr(config, "gate_pool", None), getattr(config, "prompts", None)
    if gates and prompts:
        said += [
            f"  gates: {', '.join(gates)}; up to {config.num_qubits} qubits"
            f"{'; told the unitary' if getattr(model, 'needs_unitary', False) else ''}",
            f"  {len(prompts)} prompts: {'; '.join(prompts[:4])}{' ...' if len(prompts) > 4 else ''}",
        ]
    return said


def _agrees(entry: Entry) -> bool:
    """Ask the person whether a model is to be deleted."""
    if not sys.stdin.isatty():
        raise UserError(f"{entry.folder} would be deleted, and nobody can be asked here; give --yes")
    return input(f"delete {entry.folder} (run {entry.metadata.get('run')})? [y/N] ").strip().lower() in (
        "y",
        "yes",
    )


if __name__ == "__main__":
    raise SystemExit(main())
