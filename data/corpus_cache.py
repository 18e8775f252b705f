"""The cache of corpora that loaders make from a user's files: made once, found again by content.

A corpus in the cache folder is named after the content it was made from: a hash over the bytes of the files and over
the settings of the conversion. Any number of processes may ask for the same one at once; one makes it, the others wait.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from data.conversion_plan import ConversionSettings, find_inputs, plan_conversions
from data.conversion_run import ProgressLines, run_conversion
from data.corpus import UNFINISHED, CorpusInfo, hash_file, open_corpus, write_file_atomically
from data.errors import DataError
from data.file_lock import file_lock
from data.genes import GeneSpace
from data.hashing import sha256_of
from data.hvg import HvgOptions
from data.manifest import RESERVED_COLUMNS
from data.spelling import COMMAND, CONFIGURATION

_FORMAT = 3
"""Of the cache: part of every key, so that corpora of another format are left alone."""
_HASHES_FILE = "file_hashes.json"
_OPTION_OF = {
    "--layer": "layer",
    "--gene-column": "gene_column",
    "--min-match": "min_match",
    "--min-genes": "min_genes",
    "--obs": "obs",
    "--genes": "gene_vocab",
}
"""What the options of the conversion command are called here."""


def obs_requests(
    obs: Sequence[str], needed: Sequence[str | None], technical_batch: str | None
) -> tuple[str, ...]:
    """Return the obs columns to keep as `NAME=COLUMN`; what nobody asks for is left out, defaults too.

    Raises:
        DataError: a column would have a name that the corpus uses itself.
    """
    requests = {"technical_batch": technical_batch or "", "target_gene": "", "cell_type": ""}
    for request in obs:
        name, _, column = request.partition("=")
        requests[name] = column or name
    for column in needed:
        if column is not None:
            requests[column] = requests.get(column) or column
    taken = [column for name, column in requests.items() if name in RESERVED_COLUMNS]
    if taken:
        raise DataError(
            f"obs column {taken[0]!r}: every corpus has a column of that name, of its own; keep this one under "
            f"another, as obs: [cell_{taken[0]}={taken[0]}], and use that name"
        )
    return tuple(f"{name}={column}" for name, column in requests.items())


def convert_once(
    paths: Sequence[str], cache_dir: Path, settings: ConversionSettings, *, is_command: bool = False
) -> CorpusInfo:
    """Return the corpus of these files under these settings, converting them where the cache has none.

    Args:
        paths: the files, or patterns.
        cache_dir: folder of the corpora.
        settings: of the conversion.
        is_command: whether messages name options as commands do, rather than as a loader's arguments.

    Raises:
        DataError: no file is named or a file cannot be converted.
    """
    called: Callable[[str], str] = str if is_command else _in_config
    settings = replace(settings, spelling=COMMAND if is_command else CONFIGURATION)
    try:
        return _convert_once(paths, cache_dir, settings, lambda line: say(called(line)))
    except DataError as error:
        raise DataError(called(str(error))) from error


def _convert_once(
    paths: Sequence[str], cache_dir: Path, settings: ConversionSettings, tell: Callable[[str], None]
) -> CorpusInfo:
    if not paths:
        raise DataError("paths: no h5ad file is named; give at least one")
    inputs = find_inputs(paths)
    hashes = file_hashes(inputs, cache_dir)
    genes = settings.genes
    content = {
        "format": _FORMAT,
        "files": [[path.name, digest] for path, digest in zip(inputs, hashes, strict=True)],
        "genes": genes.to_json() if isinstance(genes, GeneSpace) else genes,
        "layer": settings.layer,
        "gene_column": settings.gene_column,
        "obs": settings.obs,
        "min_genes": settings.min_genes,
    }
    folder = cache_dir / cache_name(inputs[0].name.removesuffix(".h5ad"), len(inputs), content)

    def convert() -> None:
        say(f"{_files(inputs)}: converted once to {folder}, and read from there from now on")
        plan = plan_conversions(inputs, folder, settings, is_per_file=False, say=tell)[0]
        progress = ProgressLines("converted", plan.num_cells, say)
        manifest = run_conversion(plan, mode="overwrite", jobs=1, progress=progress).manifest
        for source, path, digest in zip(manifest.sources, inputs, hashes, strict=True):
            if source.sha256 != digest:
                (folder / "manifest.json").unlink()
                raise DataError(
                    f"{path}: the file was changed while it was read; start again when it is complete"
                )

    return made_once(folder, cache_dir, convert, f"converting {_files(inputs)}")


def made_once(folder: Path, cache_dir: Path, make: Callable[[], None], doing: str) -> CorpusInfo:
    """Open the corpus in a folder of the cache; where it is not complete, make it, one process at a time."""
    if not is_complete(folder):
        with file_lock(cache_dir / ".locks" / folder.name, doing, say):
            if not is_complete(folder):
                make()
    return open_corpus(folder)


def is_complete(folder: Path) -> bool:
    """Tell whether a corpus is there, whole."""
    return (folder / "manifest.json").is_file() and not (folder / UNFINISHED).exists()


def cache_name(stem: str, num_files: int, content: Any) -> str:
    """Return the name of a corpus in the cache: what it was made from, for people, and a hash of it."""
    more = f"+{num_files - 1}" if num_files > 1 else ""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', stem)[:60]}{more}-{sha256_of(content)[:16]}"


def narrowed_name(info: CorpusInfo, options: HvgOptions, min_genes: int) -> str:
    """Return the name of the corpus of some genes of another corpus of the cache."""
    columns = {name: column.to_dict() for name, column in info.columns.items()}
    content = {
        "format": _FORMAT,
        "corpus": [info.fingerprint, info.manifest.conversion_sha256, columns],
        "genes": asdict(options),
        "min_genes": min_genes,
    }
    return cache_name(f"{Path(info.path).name.rpartition('-')[0]}-hvg{options.num_genes}", 1, content)


def file_hashes(paths: Sequence[Path], cache_dir: Path) -> list[str]:
    """Return the sha256 of each file; known ones are looked up by path, size and time of change."""
    keys = []
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(
                f"{path}: {'no such file' if isinstance(error, FileNotFoundError) else error}"
            ) from None
        if path.is_dir():
            raise DataError(f"{path}: a folder, not an h5ad file")
        keys.append(json.dumps([str(path.absolute()), status.st_size, status.st_mtime_ns]))
    index = cache_dir / _HASHES_FILE
    known = _read_index(index)
    if any(key not in known for key in keys):
        with file_lock(cache_dir / ".locks" / _HASHES_FILE, f"reading {_files(paths)}", say):
            known = _read_index(index)
            for path, key in zip(paths, keys, strict=True):
                if key not in known:
                    try:
                        known[key] = hash_file(path)
                    except OSError as error:
                        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
            write_file_atomically(index, json.dumps(known, indent=1) + "\n")
    return [known[key] for key in keys]


def say(text: str) -> None:
    """Show what a process does with the cache while nothing else can be seen."""
    print(text, file=sys.stderr, flush=True)


def _read_index(path: Path) -> dict[str, str]:
    """Return the hashes known so far; a damaged file is as good as none, since it can be made anew."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _files(paths: Sequence[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"


def _in_config(message: str) -> str:
    """Name options as they are called here instead of as the conversion command calls them."""
    return re.sub(r"--[a-z-]+", lambda match: _OPTION_OF.get(match[0], match[0]), message)
