"""Compare every byte of a corpus with what its manifest says."""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data.corpus import CorpusFolder, dataset_info, dataset_state
from data.genes import GeneSpace
from data.manifest import Manifest, Shard
from data.remote import as_os_error

_MOST_THREADS = 8


class Difference(NamedTuple):
    """Name a file of a corpus that is not as its manifest says."""

    file: str
    what: str


@dataclass(frozen=True)
class CorpusCheck:
    """Say what a corpus was found to be."""

    num_cells: int
    """As the manifest says."""
    num_files: int
    """Files that were read."""
    num_bytes: int
    differences: tuple[Difference, ...]


class _Reading(NamedTuple):
    """Say what reading one file gave."""

    num_bytes: int | None
    """None where the file is not there."""
    difference: Difference | None


def check_corpus(path: str | Path) -> CorpusCheck:
    """Read each file of a corpus once, several at a time, and compare.

    Shards are compared with their hashes, the gene space with its own, and what Hugging Face `datasets` needs with
    what the manifest gives; in an Arrow corpus that has a hash of the manifest.

    Raises:
        DataError: there is no corpus, or its manifest cannot be read.
    """
    folder = CorpusFolder.at(path)
    manifest_text = folder.manifest_text()
    manifest = Manifest.from_json(manifest_text, where=f"{path}/manifest.json")
    described = _described(manifest, manifest_text)
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        shards = pool.map(lambda shard: _read_shard(folder, shard), manifest.shards)
        readings = [*shards, *(_read_described(folder, name, check) for name, check in described.items())]
    sizes = [reading.num_bytes for reading in readings if reading.num_bytes is not None]
    differences = [reading.difference for reading in readings if reading.difference is not None]
    known = {"manifest.json", *described, *(shard.file for shard in manifest.shards)}
    return CorpusCheck(
        num_cells=manifest.num_cells,
        num_files=len(sizes) + 1,
        num_bytes=sum(sizes) + len(manifest_text),
        differences=(*differences, *_unknown(folder, known)),
    )


def _read_shard(folder: CorpusFolder, shard: Shard) -> _Reading:
    digest, num_bytes = hashlib.sha256(), 0
    try:
        opened: Any = folder.filesystem.open(f"{folder.root}/{shard.file}", "rb")
        with opened as file:
            while block := file.read(1 << 20):
                digest.update(block)
                num_bytes += len(block)
    except FileNotFoundError:
        return _Reading(None, Difference(shard.file, "is missing"))
    except Exception as error:  # each file system raises what its library does
        failure = as_os_error(error)
        return _Reading(num_bytes, Difference(shard.file, f"cannot be read ({failure.strerror or failure})"))
    what = None
    if num_bytes != shard.bytes:
        what = f"has {num_bytes} bytes, not {shard.bytes}"
    elif digest.hexdigest() != shard.sha256:
        what = f"has other bytes than were written: sha256 {digest.hexdigest()}, not {shard.sha256}"
    return _Reading(num_bytes, Difference(shard.file, what) if what else None)


def _described(manifest: Manifest, manifest_text: bytes) -> dict[str, Callable[[bytes], bool]]:
    """Return the files beside manifest and shards, each with the question whether a content is theirs."""

    def holds_the_genes(content: bytes) -> bool:
        return GeneSpace.from_json(content).sha256 == manifest.gene_sha256

    if manifest.storage == "parquet":
        return {"genes.json": holds_the_genes}
    state = dataset_state([shard.file for shard in manifest.shards], manifest_text)
    return {
        "genes.json": holds_the_genes,
        "dataset_info.json": lambda content: json.loads(content) == dataset_info(manifest),
        "state.json": lambda content: json.loads(content) == state,
    }


def _read_described(folder: CorpusFolder, name: str, is_as_written: Callable[[bytes], bool]) -> _Reading:
    try:
        content = folder.read_or_raise(name)
    except OSError as error:
        return _Reading(0, Difference(name, f"cannot be read ({error.strerror or error})"))
    if content is None:
        return _Reading(None, Difference(name, "is missing"))
    try:
        is_same = is_as_written(content)
    except (ValueError, RecursionError):
        is_same = False
    return _Reading(
        len(content), None if is_same else Difference(name, "is not what manifest.json was written with")
    )


def _unknown(folder: CorpusFolder, known: set[str]) -> list[Difference]:
    """Name what else lies in a folder of this machine; others cannot be listed everywhere."""
    if not folder.is_local:
        return []
    names = sorted(path.name for path in Path(folder.root).iterdir() if path.name not in known)
    return [Difference(name, "is not named by manifest.json") for name in names]
