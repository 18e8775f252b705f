"""Whether all ranks run the same: configuration, modules, versions and data, compared before anything is built.

A rank that differs would train without any error: with its own learning rate or its own cells, while the checkpoint
says what rank 0 was given.
"""

import hashlib
import platform
import socket
import sys
import sysconfig
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trainer.config.schema import RunConfig
from trainer.distributed import Ranks
from trainer.errors import ConfigError

_LIBRARIES = ("torch", "accelerate", "datasets", "deepspeed", "numpy")
_OUR_PACKAGES = ("trainer", "models", "data")
_MOST = 5
"""Differences of a rank that are listed."""


def check_agreement(config: RunConfig, ranks: Ranks) -> None:
    """Compare every rank's configuration, modules and versions with rank 0's; every rank must call it.

    Raises:
        ConfigError: names the ranks that differ, and what differs; on every rank.
    """
    if ranks.count == 1:
        return
    ranks.barrier()  # so that all read the same sources, should somebody edit them while ranks start
    own = facts_of(config)
    _refuse(differences(ranks.broadcast(own), own), ranks)


def check_same_data(fingerprints: Mapping[str, str], ranks: Ranks) -> None:
    """Compare the fingerprints of every rank's phases with rank 0's; every rank must call it.

    Raises:
        ConfigError: names the ranks and phases that differ; on every rank.
    """
    first = ranks.broadcast(dict(fingerprints))
    _refuse(
        [f"the data of phase {name} is other data" for name in first if first[name] != fingerprints[name]],
        ranks,
    )


def _refuse(found: list[str], ranks: Ranks) -> None:
    told = ranks.gather_text(f"{socket.gethostname()}: {'; '.join(found)}" if found else "")
    differing = [f"rank {rank} on {text}" for rank, text in enumerate(told) if text]
    if differing:
        more = [f"and {len(differing) - _MOST} more ranks"] if len(differing) > _MOST else []
        raise ConfigError(
            "not all processes run what rank 0 runs; start all with the same command, configuration, code, versions "
            "and data:\n" + "\n".join(differing[:_MOST] + more)
        )


def facts_of(config: RunConfig) -> dict[str, Any]:
    """Return what has to be the same on every rank, as JSON holds it."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "none"
    values = flatten(config.model_dump(mode="json", exclude={"notes"}))
    return {"configuration": values, "versions": versions, "modules": _modules()}


def differences(first: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Say in which facts a rank differs from rank 0, the first ones of each kind."""
    found = []
    before, after = first["configuration"], own["configuration"]
    for key in sorted(before.keys() | after.keys()):
        there, here = before.get(key, "nothing"), after.get(key, "nothing")
        # Nodes may keep the same data at different places; what lies there is compared when it is opened.
        is_place = key.startswith("datasets.") and all(isinstance(v, str) and "/" in v for v in (there, here))
        if there != here and not is_place:
            found.append(f"{key} is {here!r}, not {there!r}")
    for name, there in first["versions"].items():
        if own["versions"][name] != there:
            found.append(f"{name} is {own['versions'][name]}, not {there}")
    # A module that one of them has not imported yet says nothing.
    common = sorted(first["modules"].keys() & own["modules"].keys())
    changed = [name for name in common if first["modules"][name] != own["modules"][name]]
    if changed:
        more = f" and {len(changed) - _MOST} more modules" if len(changed) > _MOST else ""
        found.append(f"its source differs in {', '.join(changed[:_MOST])}{more}")
    return found[:_MOST] + ([f"and {len(found) - _MOST} more"] if len(found) > _MOST else [])


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Return nested values by dotted names."""
    if isinstance(value, dict) and value:
        parts = value.items()
    elif isinstance(value, list) and value:
        parts = enumerate(value)
    else:
        return {name: value}
    return {
        k: v for key, part in parts for k, v in flatten(part, f"{name}.{key}" if name else f"{key}").items()
    }


def _modules() -> dict[str, str]:
    """Return a hash of each imported module's source: ours, and those of the user that no installer has put there."""
    installed = tuple(
        {f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    )
    found = {}
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name == "__main__" or not file or not file.endswith(".py"):
            continue
        # A process has thousands of modules that an installer has put there: those are not looked for on the disk.
        is_ours = name.split(".")[0] in _OUR_PACKAGES
        if (is_ours or not file.startswith(installed)) and Path(file).is_file():
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]
    return found
