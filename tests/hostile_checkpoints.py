"""Checkpoints as somebody makes them who hands them to others: anything in their files, and hashes that fit."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from trainer.checkpoint_folder import RUN_STATE
from trainer.statefile import load_tree, save_tree


def changed_checkpoint(saved: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a checkpoint into `folder`, let `change` edit its configuration in place, and write its hashes anew."""
    copy = Path(shutil.copytree(saved, folder / saved.name))
    path = copy / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))
    return _seal(path)


def changed_state(saved: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Do the same with the state of its run."""
    copy = Path(shutil.copytree(saved, folder / saved.name))
    path = copy / RUN_STATE
    state = load_tree(path)
    change(state)
    save_tree(path, state)
    return _seal(path)


def _seal(path: Path) -> Path:
    """Let a checkpoint's manifest fit a file of it that was changed, and return the folder."""
    place = path.parent / "manifest.json"
    manifest = json.loads(place.read_text())
    del manifest["manifest_sha256"]
    content = path.read_bytes()
    manifest["files"][path.name] = {
        "num_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    place.write_text(json.dumps({**manifest, "manifest_sha256": seal}))
    return path.parent
