"""Checkpoints as somebody makes them who hands them to others: any configuration, and hashes that fit."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def changed_checkpoint(saved: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Copy a checkpoint into `folder`, let `change` edit its configuration in place, and write its hashes anew."""
    copy = Path(shutil.copytree(saved, folder / saved.name))
    path = copy / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["manifest_sha256"]
    content = path.read_bytes()
    manifest["files"]["config.yaml"] = {
        "num_bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    seal = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps({**manifest, "manifest_sha256": seal}))
    return copy
