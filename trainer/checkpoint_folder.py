"""Checkpoint folders as a reader sees them: complete or not there, every file verified, nothing executed.

`checkpoint_<step>/` holds the files of all ranks and `manifest.json` with the size and SHA-256 of each. The
folder gets this name when it is complete (see checkpoint.py), so completeness needs no other mark; the text
file `latest` beside it is for people and scripts and decides nothing here.
"""

import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer.atomicfile import sync_folder
from trainer.errors import CheckpointError
from trainer.saved_state import check_state
from trainer.statefile import FileFacts, Tree, load_tree, open_tree

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
RUN_STATE = "run_state.safetensors"
SUPERSEDED = "superseded"
FORMAT = 1
"""What this version writes and reads; docs/resuming.md says what raises it, and what every format has in common."""
MAX_WORLD_SIZE = 1 << 20
"""Ranks that a manifest may claim: more would be walked through one by one."""
_FOLDER_NAME = re.compile(r"checkpoint_(0|[1-9][0-9]{0,17})")
_UNNAMED = re.compile(r"\.(?P<name>checkpoint_[0-9]+)\.[A-Za-z0-9]+-[0-9]+\.tmp")
"""A save under way, or one that a kill ended, but not a checkpoint that is being deleted."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class OtherFormatError(CheckpointError):
    """Report a whole checkpoint of a format, or with facts of files, that this version does not read."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """Read the files of one complete checkpoint."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Global step at which it was saved."""
        return self.manifest["step"]

    @property
    def world_size(self) -> int:
        """Number of ranks that saved it."""
        return self.manifest["world_size"]

    @property
    def metric(self) -> float | None:
        """What retention ranks it by."""
        return self.manifest["metric"]

    @property
    def summary(self) -> dict[str, Any]:
        """What the run said about itself."""
        return self.manifest["summary"]

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """What rank 0 saved of the run for all ranks, but for the optimizer's state: shards.py reads that by name.

        All readers take it from here, so that what an earlier format had otherwise is put right in one place.
        """
        path = self._path(RUN_STATE)
        return check_state(load_tree(path, leave_out=("optimizer",)), str(path))

    def has(self, name: str) -> bool:
        """Whether there is a shared file `name`, or at least one rank's file of this name."""
        return name in self.manifest["files"] or bool(self._ranks_with(name))

    def shared(self, name: str, device: str | torch.device = "cpu") -> Tree:
        """Load the tree in the shared file `name`."""
        return load_tree(self._path(name), device)

    def lazy(self, name: str) -> Tree:
        """Open the tree in the shared file `name` without reading its tensors."""
        return open_tree(self._path(name))

    def text(self, name: str) -> str:
        """Read the shared text file `name`."""
        try:
            return self._path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.folder / name}: not a text file ({error})") from error

    def rank(self, name: str, rank: int, device: str | torch.device = "cpu") -> Tree:
        """Load the tree that `rank` saved as `name`."""
        return load_tree(self._rank_path(name, rank), device)

    def lazy_rank(self, name: str, rank: int) -> Tree:
        """Open the tree that `rank` saved as `name` without reading its tensors."""
        return open_tree(self._rank_path(name, rank))

    def _rank_path(self, name: str, rank: int) -> Path:
        file_name = rank_file_name(name, rank)
        if file_name not in self.manifest["files"]:
            raise CheckpointError(
                f"{self.folder}: rank {rank} saved no {name!r}; of the {self.world_size} ranks that saved "
                f"this checkpoint, {self._ranks_with(name) or 'none'} have one"
            )
        return self.folder / file_name

    def _path(self, name: str) -> Path:
        if name not in self.manifest["files"]:
            held = ", ".join(sorted(self.manifest["files"]))
            raise CheckpointError(f"{self.folder}: there is no file {name!r} in it; it holds {held}")
        return self.folder / name

    def _ranks_with(self, name: str) -> list[int]:
        ranks = range(self.world_size)
        return [rank for rank in ranks if rank_file_name(name, rank) in self.manifest["files"]]


class Newest(NamedTuple):
    """Say which checkpoint of a run is the newest good one, and why newer ones were passed over."""

    checkpoint: Path | None
    skipped: list[str]


def named_checkpoints(run_folder: str | Path) -> list[Path]:
    """Return the folders of a run that are named like checkpoints, whole or damaged, by ascending step."""
    try:
        folders = [Path(entry.path) for entry in os.scandir(run_folder) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = {step: folder for folder in folders if (step := checkpoint_step(folder)) is not None}
    return [steps[step] for step in sorted(steps)]


def list_checkpoints(run_folder: str | Path) -> list[Path]:
    """Return the complete checkpoints of a run by ascending step; their contents are not verified."""
    complete = []
    for folder in named_checkpoints(run_folder):
        try:
            read_manifest(folder)
        except CheckpointError:
            continue
        complete.append(folder)
    return complete


def find_newest(run_folder: str | Path, *, fall_back: bool) -> Newest:
    """Return the newest checkpoint of a run after verifying it.

    Args:
        run_folder: The folder that holds `checkpoint_<step>` folders.
        fall_back: Pass over damaged checkpoints, with an account of each, instead of raising CheckpointError.

    Raises:
        OtherFormatError: another version wrote the newest one that is not damaged, and can go on from it.
    """
    skipped: list[str] = []
    for folder in reversed(named_checkpoints(run_folder)):
        try:
            verify_checkpoint(folder)
        except OtherFormatError:
            raise
        except CheckpointError as error:
            if not fall_back:
                raise
            skipped.append(str(error))
            continue
        return Newest(folder, skipped)
    return Newest(None, skipped)


def open_checkpoint(folder: str | Path, verify: bool = True) -> SavedCheckpoint:
    """Open a checkpoint for reading.

    Args:
        folder: A `checkpoint_<step>` folder.
        verify: Compare the hash of every file; without it sizes alone. One rank can verify for all.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_files(folder, manifest["files"], hashes=verify)
    return SavedCheckpoint(folder, manifest)


def verify_checkpoint(folder: str | Path) -> None:
    """Compare size and hash of every file with the manifest; CheckpointError names those that differ."""
    open_checkpoint(folder, verify=True)


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of the checkpoint at `step`."""
    return f"checkpoint_{step}"


def checkpoint_step(folder: str | Path) -> int | None:
    """Return the step in the name of a checkpoint folder, or None if it is not such a name."""
    match = _FOLDER_NAME.fullmatch(Path(folder).name)
    return int(match[1]) if match else None


def rank_file_name(name: str, rank: int) -> str:
    """Return the name of the file in which `rank` keeps its tree `name`."""
    return f"{name}.rank{rank:05d}.safetensors"


def is_file_name(name: str) -> bool:
    """Whether a checkpoint may hold a file of this name: plain ASCII, no folder, not hidden."""
    return _FILE_NAME.fullmatch(name) is not None and name != MANIFEST


def encode_manifest(
    step: int, world_size: int, files: Mapping[str, FileFacts], metric: float | None, facts: Mapping[str, Any]
) -> str:
    """Return the text of a manifest; `facts` are further JSON values (summary, time, save)."""
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "metric": metric if metric is not None and math.isfinite(metric) else None,
        **facts,
        "files": {name: file._asdict() for name, file in sorted(files.items())},
    }
    manifest = json.loads(json.dumps(manifest, allow_nan=False))  # what a reader will hash: keys are text
    return json.dumps(manifest | {"manifest_sha256": _manifest_hash(manifest)}, indent=1) + "\n"


def unnamed_checkpoints(run_folder: str | Path) -> dict[Path, Path]:
    """Return the saves that lack their name alone, where no checkpoint has it, with the folder that each is to be.

    A kill leaves one between the end of its writing and its renaming, and so does a writer at work for a moment.
    """
    found: dict[Path, Path] = {}
    try:
        names = sorted(os.listdir(run_folder))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for name in names:
        match = _UNNAMED.fullmatch(name)
        folder = Path(run_folder, name)
        if match is None or folder.with_name(match["name"]).exists():
            continue
        try:
            manifest = _read_manifest(folder)
            is_whole = {MANIFEST, *manifest["files"]} == set(os.listdir(folder))
            if is_whole and checkpoint_name(manifest["step"]) == match["name"]:
                _check_files(folder, manifest["files"], hashes=False)
                found[folder] = folder.with_name(match["name"])
        except OtherFormatError:
            raise
        except CheckpointError:
            continue
    return found


def name_checkpoints(run_folder: str | Path) -> None:
    """Complete the saves that lack their name alone; the caller holds the run folder's lease."""
    for folder, final in unnamed_checkpoints(run_folder).items():
        os.rename(folder, final)
        sync_folder(run_folder)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check the manifest of a checkpoint; CheckpointError says what is wrong with it."""
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest["step"] != checkpoint_step(folder):
        raise CheckpointError(
            f"{folder} holds the checkpoint of step {manifest['step']}; "
            f"rename it to {checkpoint_name(manifest['step'])}"
        )
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint folder")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a complete checkpoint: {MANIFEST} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} is not readable ({error})") from error
    if not isinstance(manifest, dict) or manifest.pop("manifest_sha256", None) != _manifest_hash(manifest):
        raise CheckpointError(f"{folder} is damaged: {MANIFEST} does not match its own hash")
    if manifest.get("format") != FORMAT:
        raise OtherFormatError(
            f"{path} has format {manifest.get('format')!r}, and this version reads format {FORMAT}; it is whole: go on "
            "with the version that wrote it"
        )
    unknown = _unknown_facts(manifest.get("files"))
    if unknown:
        raise OtherFormatError(
            f"{path} says {', '.join(unknown)} of its files, which this version does not know; it is whole: go on with "
            "the version that wrote it"
        )
    if not _is_well_formed(manifest):
        raise CheckpointError(f"{path} does not describe a checkpoint, or lists files outside of its folder")
    return manifest


def set_aside(folder: Path) -> Path:
    """Move a checkpoint into `superseded/` of its run, where nothing picks it up; return its new place."""
    shelf = folder.parent / SUPERSEDED
    shelf.mkdir(exist_ok=True)
    target, number = shelf / folder.name, 2
    while target.exists():
        target = shelf / f"{folder.name}.{number}"
        number += 1
    os.rename(folder, target)
    sync_folder(shelf)
    sync_folder(folder.parent)
    return target


def _check_files(folder: Path, files: Mapping[str, Any], *, hashes: bool) -> None:
    def check(name: str) -> str | None:
        return _problem(folder / name, FileFacts(**files[name]), hashes)

    with ThreadPoolExecutor(max_workers=8) as pool:  # hashing leaves the interpreter free
        problems = [problem for problem in pool.map(check, files) if problem]
    if problems:
        raise CheckpointError(f"{folder} is damaged: {'; '.join(problems)}")


def _problem(path: Path, facts: FileFacts, hashes: bool) -> str | None:
    try:
        size = path.stat().st_size
        if size != facts.num_bytes:
            return f"{path.name} has {size:,} bytes instead of {facts.num_bytes:,}"
        if hashes:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != facts.sha256:
                    return f"{path.name} has changed since it was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None


def _unknown_facts(files: Any) -> list[str]:
    """Return the keys of files' entries that this version knows nothing of: they may say how a file is to be read."""
    entries = files.values() if isinstance(files, dict) else []
    keys = {key for facts in entries if isinstance(facts, dict) for key in facts}
    return sorted(keys - set(FileFacts._fields))


def _is_well_formed(manifest: Mapping[str, Any]) -> bool:
    try:
        files = [FileFacts(**facts) for facts in manifest["files"].values()]
        numbers = [manifest["step"], manifest["world_size"] - 1, *(file.num_bytes for file in files)]
        texts, metric = [manifest["time"], manifest["save"]], manifest["metric"]
        has_summary = isinstance(manifest["summary"], dict)
        is_possible = manifest["world_size"] <= MAX_WORLD_SIZE
    except (KeyError, TypeError, AttributeError):
        return False
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and all(isinstance(text, str) for text in texts)
        and (metric is None or type(metric) in (int, float))
        and has_summary
        and is_possible
        and all(map(is_file_name, manifest["files"]))
    )


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
