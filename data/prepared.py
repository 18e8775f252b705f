"""Loaders that begin with what a user has, h5ad files, and convert it once into a corpus that is kept and reused.

A corpus in the cache folder is named after the content it was made from: a hash over the bytes of the files and over
the settings of the conversion. Any number of processes may ask for the same one at once; one converts, the others wait.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data.cell_source import CellSource, Layout, cell_loader
from data.conversion_plan import ConversionSettings, find_inputs, plan_conversions
from data.conversion_run import run_conversion
from data.corpus import UNFINISHED, CorpusInfo, hash_file, open_corpus, write_file_atomically
from data.errors import DataError
from data.file_lock import file_lock
from data.gene_vocabulary import gene_vocabulary
from data.genes import GeneSpace
from data.labels import LabelTask
from data.preprocessing import Preprocessing

FROM_DATA = "from_data"
"""`gene_vocab` that takes the union of the files' own genes."""
_FORMAT = 1
"""Of the cache: part of every key, so that corpora of another format are left alone."""
_HASHES_FILE = "file_hashes.json"
_SECONDS_BETWEEN_LINES = 10.0
_OPTION_OF = {
    "--layer": "layer",
    "--gene-column": "gene_column",
    "--min-match": "min_match",
    "--min-genes": "min_genes",
    "--obs": "obs",
    "--genes": "gene_vocab",
}
"""What the options of the conversion command are called here."""


def h5ad_loader(
    paths: Sequence[str] | str,
    *,
    tokenizer: Mapping[str, Any],
    gene_vocab: str = FROM_DATA,
    preprocessing: Mapping[str, Any] | None = None,
    obs: Sequence[str] = (),
    technical_batch: str | None = None,
    cache_dir: str = "cache",
    layer: str = "auto",
    gene_column: str | None = None,
    min_genes: int = 1,
    min_match: float = 0.5,
    masking: Mapping[str, Any] | None = None,
    val_fraction: float = 0.0,
    split_seed: int = 0,
    limit_cells: int | None = None,
    layout: Layout = "padded",
    shuffle_block: int = 64,
    shuffle_window: int = 8192,
    num_workers: int = 0,
    label: str | None = None,
    label_task: LabelTask = "classification",
    stratify: bool = False,
    sampling: Mapping[str, Any] | None = None,
) -> CellSource:
    """Read h5ad files as a source of batches: convert them where that was not done before, and open the corpus.

    Args:
        paths: h5ad files, or patterns such as `data/*.h5ad`.
        tokenizer: options of the tokenizer (see `data.tokenizers`).
        gene_vocab: the genes that token ids stand for: `human_protein_coding`, `human_all`, `mouse_protein_coding`,
            `mouse_all`; `from_data`, all genes of the files; or the path of a gene list, or of a corpus, run,
            checkpoint or export, whose `genes.json` is taken.
        preprocessing: `normalize`, `target_sum`, `log1p` (of the values that the model sees; library sizes are over
            all genes of a file), and `hvg_selection`, `hvg_flavor`, `hvg_batch_key`, `hvg_whitelist`,
            `hvg_max_cells` (see `data.hvg`).
        obs: obs columns to keep for `CellSource.obs`, by their name, or `NAME=COLUMN` to rename one.
        technical_batch: obs column of the technical batch; `@file` takes each file as one; None keeps none.
        cache_dir: folder of the converted corpora.
        layer: matrix to read; `auto` takes the first of layers['counts'], raw.X, X that holds counts.
        gene_column: column of var with the gene names; None finds it by content.
        min_genes: cells with fewer expressed genes of the vocabulary are dropped.
        min_match: least share of a file's genes, or of the vocabulary's if these are fewer, that must match.
        masking: and all that follow: as in `data.cell_source.cell_loader`.
        val_fraction: see there.
        split_seed: see there.
        limit_cells: see there.
        layout: see there.
        shuffle_block: see there.
        shuffle_window: see there.
        num_workers: see there.
        label: see there; the column is kept without being named in `obs`.
        label_task: see there.
        stratify: see there.
        sampling: see there; its column is kept without being named in `obs`.

    Raises:
        DataError: a file cannot be read, or does not hold what is asked for.
    """
    steps = Preprocessing.read(preprocessing)
    needed = [label, (sampling or {}).get("column")]
    settings = ConversionSettings(
        genes="union" if gene_vocab == FROM_DATA else gene_vocabulary(gene_vocab),
        gene_column=gene_column,
        layer=layer,
        obs=obs_requests(obs, needed, technical_batch),
        min_genes=min_genes,
        min_match=min_match,
    )
    try:
        corpus = convert_once([paths] if isinstance(paths, str) else paths, Path(cache_dir), settings)
    except DataError as error:
        raise DataError(_in_config(str(error))) from error
    return open_prepared(
        corpus,
        steps,
        tokenizer=tokenizer,
        masking=masking,
        val_fraction=val_fraction,
        split_seed=split_seed,
        limit_cells=limit_cells,
        layout=layout,
        shuffle_block=shuffle_block,
        shuffle_window=shuffle_window,
        num_workers=num_workers,
        label=label,
        label_task=label_task,
        stratify=stratify,
        sampling=sampling,
    )


def census_loader(
    census: Mapping[str, Any] | None = None,
    *,
    tokenizer: Mapping[str, Any],
    gene_vocab: str = FROM_DATA,
    preprocessing: Mapping[str, Any] | None = None,
    obs: Sequence[str] = (),
    technical_batch: str | None = None,
    cache_dir: str = "cache",
    min_genes: int = 1,
    min_match: float = 0.5,
    masking: Mapping[str, Any] | None = None,
    val_fraction: float = 0.0,
    split_seed: int = 0,
    limit_cells: int | None = None,
    layout: Layout = "padded",
    shuffle_block: int = 64,
    shuffle_window: int = 8192,
    num_workers: int = 0,
    label: str | None = None,
    label_task: LabelTask = "classification",
    stratify: bool = False,
    sampling: Mapping[str, Any] | None = None,
) -> CellSource:
    """Read cells of the CELLxGENE Census as a source of batches: read them once into a corpus, and open that.

    Args:
        census: which cells: `organism`, `census_version`, `filters` or `obs_value_filter`, `var_value_filter`,
            `obs_columns`, `uri` (see `data.census.CensusQuery`).
        tokenizer: options of the tokenizer (see `data.tokenizers`).
        gene_vocab: as in `h5ad_loader`; `from_data` takes the genes of the Census.
        preprocessing: as in `h5ad_loader`.
        obs: as in `h5ad_loader`, beside `obs_columns`.
        technical_batch: obs column of the technical batch; `@file` takes each dataset as one; None keeps none.
        cache_dir: folder of the corpora.
        min_genes: cells with fewer expressed genes of the vocabulary are dropped.
        min_match: least share of the genes, or of the vocabulary's if these are fewer, that must match.
        masking: and all that follow: as in `h5ad_loader`.
        val_fraction: see there.
        split_seed: see there.
        limit_cells: see there.
        layout: see there.
        shuffle_block: see there.
        shuffle_window: see there.
        num_workers: see there.
        label: see there.
        label_task: see there.
        stratify: see there.
        sampling: see there.

    Raises:
        DataError: the Census cannot be read, or does not hold what is asked for.
    """
    from data.census import CensusQuery, census_corpus  # which builds on this file

    steps = Preprocessing.read(preprocessing)
    corpus = census_corpus(
        census,
        gene_vocab=gene_vocab,
        obs=obs,
        needed=[label, (sampling or {}).get("column")],
        technical_batch=technical_batch,
        cache_dir=cache_dir,
        min_genes=min_genes,
        min_match=min_match,
    )
    source = open_prepared(
        corpus,
        steps,
        tokenizer=tokenizer,
        masking=masking,
        val_fraction=val_fraction,
        split_seed=split_seed,
        limit_cells=limit_cells,
        layout=layout,
        shuffle_block=shuffle_block,
        shuffle_window=shuffle_window,
        num_workers=num_workers,
        label=label,
        label_task=label_task,
        stratify=stratify,
        sampling=sampling,
    )
    source.notices = [*CensusQuery.read(census).notices, *source.notices]
    return source


def open_prepared(
    corpus: CorpusInfo, steps: Preprocessing, *, tokenizer: Mapping[str, Any], **arguments: Any
) -> CellSource:
    """Open a corpus of the cache with the steps of `preprocessing` that the tokenizer does."""
    options, notices = steps.tokenizer_options(tokenizer, corpus.manifest.value_kind)
    source = cell_loader(corpus.path, tokenizer=options, **arguments)
    source.notices = [*(f"{corpus.path}: {notice}" for notice in notices), *source.notices]
    return source


def obs_requests(
    obs: Sequence[str], needed: Sequence[str | None], technical_batch: str | None
) -> tuple[str, ...]:
    """Return the obs columns to keep as `NAME=COLUMN`; what nobody asks for is left out, defaults too."""
    requests = {"technical_batch": technical_batch or "", "target_gene": "", "cell_type": ""}
    for request in obs:
        name, _, column = request.partition("=")
        requests[name] = column or name
    for column in needed:
        if column is not None:
            requests[column] = requests.get(column) or column
    return tuple(f"{name}={column}" for name, column in requests.items())


def convert_once(paths: Sequence[str], cache_dir: Path, settings: ConversionSettings) -> CorpusInfo:
    """Return the corpus of these files under these settings, converting them where the cache has none.

    Raises:
        DataError: no file is named or a file cannot be converted.
    """
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
        plan = plan_conversions(inputs, folder, settings, is_per_file=False, say=say)[0]
        manifest = run_conversion(plan, mode="overwrite", jobs=1, progress=_Progress(plan.num_cells)).manifest
        for source, path, digest in zip(manifest.sources, inputs, hashes, strict=True):
            if source.sha256 != digest:
                (folder / "manifest.json").unlink()
                raise DataError(
                    f"{path}: the file was changed while it was read; start again when it is complete"
                )

    return made_once(folder, cache_dir, convert, f"converting {_files(inputs)}")


def made_once(folder: Path, cache_dir: Path, make: Any, doing: str) -> CorpusInfo:
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
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    more = f"+{num_files - 1}" if num_files > 1 else ""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', stem)[:60]}{more}-{digest[:16]}"


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


class _Progress:
    """Show now and then how far a conversion is."""

    def __init__(self, num_cells: int) -> None:
        self._num_cells = num_cells
        self._done = 0
        self._last_line = time.monotonic()

    def resume(self, num_cells: int) -> None:
        """Count cells that an earlier run converted."""
        self._done += num_cells

    def add(self, num_cells: int) -> None:
        """Count cells converted now."""
        self._done += num_cells
        if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            say(f"converted {self._done:,} of {self._num_cells:,} cells")

    def say(self, text: str) -> None:
        """Show a line."""
        say(text)
