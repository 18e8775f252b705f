"""The tokenizer of an exported model: which settings turned cells into tokens, and how new cells are given the same.

`cell_tokenizer.json` holds the settings of a run's phases, complete with defaults and what was fitted to the training
cells, `genes.json` the genes that token ids stand for, `technical_batches.json` the index of each technical batch,
`labels.json` the names of the classes of a model that was trained on labels.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy import sparse

from data.cell_rows import BadValueError, cell_rows
from data.cell_source import CellSource, cell_loader
from data.collate import collate
from data.corpus import open_corpus
from data.errors import DataError
from data.genes import GeneSpace, SourceGenes, looks_like_ensembl, match_genes, strip_version
from data.h5ad_matrix import MatrixChunk
from data.hashing import DrawKey
from data.readers import RaggedBatch
from data.tokenizer_options import build_tokenizer, complete_options
from data.tokenizers import CLS, MASK, PAD, UNKNOWN, Tokenizer

FORMAT = 1
TOKENIZER_FILE = "cell_tokenizer.json"
GENES_FILE = "genes.json"
TECHNICAL_BATCHES_FILE = "technical_batches.json"
LABELS_FILE = "labels.json"

CELL_LOADERS = (
    "data.loader.cell_loader",
    "data.cell_source.cell_loader",
    "data.prepared.h5ad_loader",
    "data.prepared.census_loader",
)
HF_LOADER = "data.hf.hf_loader"
_HF_OPTIONS = ("columns", "vocab_size", "pad_id", "mask_id", "special_ids", "max_length")

ValueKind = Literal["counts", "lognorm"]


class PhaseSettings(NamedTuple):
    """Say how a phase of a run read its cells."""

    phase: str
    loader: str
    """Dotted path of the loader factory."""
    arguments: Mapping[str, Any]
    value_kind: str | None
    """What its corpora hold: `counts` or `lognorm`; None where the data does not tell."""
    tokenizer_options: Mapping[str, Any] | None = None
    """The complete options of the tokenizer as the run had it; None where its checkpoint does not say them."""


@dataclass(frozen=True)
class ExportedTokenizer:
    """Turn new cells into batches as a run did with its own; made by `load_tokenizer`."""

    phases: tuple[str, ...]
    """The phases of the run whose cells were tokenized so."""
    options: dict[str, Any]
    """The `tokenizer` options of `data.loader.cell_loader`, complete."""
    value_kind: ValueKind
    """What the cells' values must be: raw counts, or log-normalised values."""
    gene_space: GeneSpace
    """The genes that token ids stand for: gene i is token 4 + i."""
    technical_batches: dict[str, int]
    """Index of each technical batch that the model knows."""
    label_names: tuple[str, ...] = ()
    """Names of the classes that the model tells apart, by index; empty where it was trained without."""

    def open_corpus(self, path: str | Path, **arguments: Any) -> CellSource:
        """Open a converted corpus of new cells, which must be over the model's genes.

        A technical batch that the model does not know has the index -1: `encode` does not look at it, and a forward
        pass that needs it fails.

        Args:
            path: the corpus, converted with `--genes` and the `genes.json` of the exported folder.
            arguments: further ones of `data.loader.cell_loader`, such as `masking` or `num_workers`.

        Raises:
            DataError: its genes or its kind of values are others than the model's.
        """
        info = open_corpus(path)
        if info.gene_space.sha256 != self.gene_space.sha256:
            raise DataError(
                f"{path}: its gene space has {len(info.gene_space)} genes and is not the model's of "
                f"{len(self.gene_space)}, so token ids would mean other genes; convert it with --genes and the "
                f"{GENES_FILE} of the exported folder"
            )
        if info.manifest.value_kind != self.value_kind:
            raise DataError(
                f"{path}: it holds {info.manifest.value_kind} values, and phase '{self.phases[0]}' of the model's run "
                f"read {self.value_kind}; convert the layer that holds these, or take the settings of another phase"
            )
        source = cell_loader(path, tokenizer=self.options, **arguments)
        for part in (source, source.validation):
            if part is not None:
                indices = {name: self.technical_batches.get(name, -1) for name in part.unique_batches}
                part.set_batch_mapping(indices)
        return source

    def tokenize(
        self, values: Any, genes: Sequence[str], *, seed: int = 0, min_match: float = 0.5
    ) -> dict[str, Any]:
        """Return a batch of cells that are in memory, without masking.

        Args:
            values: [cells, genes] matrix, a NumPy array or any SciPy sparse one (`adata.X`, `adata.layers[...]`), of
                the kind that `value_kind` says.
            genes: the name of each column: Ensembl ids, or symbols; those that the model does not know are left
                out, but count in a cell's total.
            seed: of the choice among genes, where that is random.
            min_match: least share of the columns, or of the model's genes if these are fewer, that must match.

        Raises:
            DataError: the values are no matrix, names and columns differ in number, too few names match, or a value is
                of the wrong kind.
        """
        if np.ndim(values) != 2:
            raise DataError(
                f"values: expected a matrix [cells, genes], got {np.ndim(values)} dimensions; one cell is a matrix of "
                "one row, as values[None]"
            )
        matrix: Any = sparse.csr_array(values, copy=True)  # duplicates are summed below, in place
        num_columns = matrix.shape[1]
        if num_columns != len(genes):
            raise DataError(f"genes: {len(genes)} names were given for a matrix of {num_columns} columns")
        matrix.sum_duplicates()
        remap = self._match(genes, min_match)
        columns = matrix.indices.astype(np.int32)
        chunk = MatrixChunk(0, matrix.indptr.astype(np.int64), columns, matrix.data)
        try:
            return self.tokenize_chunk(chunk, remap, seed=seed)
        except BadValueError as error:
            raise DataError(
                f"values: {error.value} {error.reason}; the model was trained on {self.value_kind}, so give it those"
            ) from None

    def tokenize_chunk(self, chunk: MatrixChunk, remap: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
        """Return a batch of consecutive cells of a file, without masking.

        Args:
            chunk: the cells; what is random depends on their row numbers, not on where the chunk begins.
            remap: the model's index of each column, -1 where the model does not know the gene.
            seed: of the choice among genes, where that is random.

        Raises:
            BadValueError: a value is of the wrong kind.
        """
        cells = cell_rows(chunk, remap, self.value_kind, 0)
        rows = np.arange(chunk.first_row, chunk.first_row + len(chunk.offsets) - 1, dtype=np.int64)
        scalars = {"total": cells.totals, "source": np.zeros(len(rows), np.int64)}
        tokenizer = self._build([np.isin(np.arange(len(self.gene_space)), remap)])
        ragged = RaggedBatch(cells.offsets, cells.genes, cells.counts, scalars)
        tokens = tokenizer(ragged, rows, DrawKey(seed, 0, -1))
        width = tokenizer.max_genes if tokenizer.padding == "max_genes" else None
        batch = collate(tokens, None, prepend_cls=tokenizer.prepend_cls, width=width)
        batch["depth"] = torch.from_numpy(np.log1p(cells.totals))
        return batch

    def _match(self, genes: Sequence[str], min_match: float) -> np.ndarray:
        names = tuple(map(str, genes))
        has_ids = looks_like_ensembl(names)
        has_symbols = any(symbol is not None for symbol in self.gene_space.symbols)
        if (self.gene_space.key == "symbol") if has_ids else not has_symbols:
            known, given = ("symbols", "Ensembl ids") if has_ids else ("Ensembl ids", "symbols")
            raise DataError(f"genes: these are {given}, and the model knows its genes by {known}; give those")
        ids = tuple(strip_version(name) for name in names) if has_ids else None
        remap, _ = match_genes(self.gene_space, SourceGenes("genes", ids, None if has_ids else names))
        num_matched, needed = int((remap >= 0).sum()), min_match * min(len(names), len(self.gene_space))
        if num_matched < needed or num_matched == 0:
            raise DataError(
                f"genes: {num_matched} of {len(names)} names are among the model's {len(self.gene_space)} genes "
                f"(such as {', '.join(self.gene_space.ids[:3])}), fewer than min_match {min_match:g} asks for"
            )
        return remap

    def _build(self, measured: Sequence[np.ndarray]) -> Tokenizer:
        return build_tokenizer(
            self.options, value_kind=self.value_kind, measured=measured, genes=self.gene_space
        )


def load_tokenizer(folder: str | Path, phase: str | None = None) -> ExportedTokenizer:
    """Load the tokenizer of an exported model.

    Args:
        folder: what `python -m trainer export` wrote.
        phase: the phase of the run whose settings are meant; needed where phases differ in them.

    Raises:
        DataError: a file is missing or damaged, the phases differ and none was named, or the run's cells were not
            tokenized by `data.loader.cell_loader`.
    """
    folder = Path(folder)
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(
            f"{folder}: no {TOKENIZER_FILE} in it; it is written by python -m trainer export, for runs whose loaders "
            "are those of this program"
        )
    entry = _settings(read_json(path), phase, str(path))
    genes = GeneSpace.from_json(read_json(folder / GENES_FILE), str(folder / GENES_FILE))
    batches = read_json(folder / TECHNICAL_BATCHES_FILE)
    return _tokenizer(entry, genes, batches, load_label_names(folder), str(path))


def tokenizer_from_record(
    record: Any,
    gene_space: GeneSpace,
    technical_batches: Mapping[str, int],
    label_names: Sequence[str],
    phase: str | None,
    where: str,
) -> ExportedTokenizer:
    """Build the tokenizer that a record describes, which `tokenizer_record` made.

    Args:
        record: the record.
        gene_space: the genes that token ids stand for.
        technical_batches: index of each technical batch that the model knows.
        label_names: names of the classes that the model tells apart, by index.
        phase: as for `load_tokenizer`.
        where: the record's place, for messages.
    """
    return _tokenizer(_settings(record, phase, where), gene_space, technical_batches, label_names, where)


def _settings(record: Any, phase: str | None, where: str) -> Any:
    """Return the settings of a phase, which must be those of our own loader."""
    try:
        if record["format"] != FORMAT:
            raise DataError(f"{where}: format {record['format']!r} is not {FORMAT}, the only one known here")
        entry = _chosen([(tuple(entry["phases"]), entry) for entry in record["settings"]], phase, where)
        if entry["loader"] not in CELL_LOADERS:
            raise DataError(
                f"{where}: phase '{entry['phases'][0]}' read cells that were tokenized before, by {entry['loader']}; "
                f"prepare new cells the same way ({json.dumps(entry['options'])}) and read them with that loader"
            )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise _not_settings(where, error) from None
    return entry


def _tokenizer(
    entry: Any, genes: GeneSpace, batches: Mapping[str, int], label_names: Sequence[str], where: str
) -> ExportedTokenizer:
    try:
        tokenizer = ExportedTokenizer(
            tuple(entry["phases"]),
            dict(entry["options"]),
            entry["value_kind"],
            genes,
            {str(name): int(index) for name, index in batches.items()},
            tuple(label_names),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_settings(where, error) from None
    build_tokenizer(tokenizer.options, value_kind=tokenizer.value_kind, measured=[], genes=genes, where=where)
    return tokenizer


def _not_settings(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: not the settings of a tokenizer ({error!r}); export the model again")


def load_label_names(folder: str | Path) -> tuple[str, ...]:
    """Return the names of the classes of an exported model, by index; empty where it was trained without labels."""
    path = Path(folder) / LABELS_FILE
    if not path.exists():
        return ()
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: it must be a list of names; export the model again")
    return tuple(names)


def tokenizer_record(phases: Iterable[PhaseSettings]) -> dict[str, Any] | None:
    """Return what `cell_tokenizer.json` holds, or None where no phase read cells with a loader of ours."""
    settings: list[dict[str, Any]] = []
    for phase in phases:
        kind = phase.value_kind
        if phase.loader.replace(":", ".") in CELL_LOADERS and kind in ("counts", "lognorm"):
            entry = {"loader": CELL_LOADERS[0], "value_kind": kind, "options": _run_options(phase, kind)}
        elif phase.loader.replace(":", ".") == HF_LOADER:
            given = {name: phase.arguments[name] for name in _HF_OPTIONS if name in phase.arguments}
            entry = {"loader": HF_LOADER, "value_kind": None, "options": given}
        else:
            continue
        same = next((known for known in settings if entry == {k: known[k] for k in entry}), None)
        if same is None:
            settings.append({"phases": [phase.phase], **entry})
        else:
            same["phases"].append(phase.phase)
    special = {"pad": PAD, "unknown": UNKNOWN, "mask": MASK, "cls": CLS}
    return {"format": FORMAT, "special_tokens": special, "settings": settings} if settings else None


def _run_options(phase: PhaseSettings, value_kind: ValueKind) -> dict[str, Any]:
    """Return the complete options of a phase's tokenizer."""
    if phase.tokenizer_options is not None:
        return dict(phase.tokenizer_options)
    return complete_options(build_tokenizer(phase.arguments["tokenizer"], value_kind=value_kind, measured=[]))


def _chosen(entries: list[tuple[tuple[str, ...], Any]], phase: str | None, where: str) -> Any:
    named = "; ".join(", ".join(phases) for phases, _ in entries)
    if phase is not None:
        for phases, entry in entries:
            if phase in phases:
                return entry
        raise DataError(f"{where}: no settings of a phase {phase!r}; there are those of: {named}")
    if len(entries) != 1:
        raise DataError(
            f"{where}: the run's phases differ in their settings; name one by --phase (in Python phase=): {named}"
        )
    return entries[0][1]


def read_json(path: Path) -> Any:
    """Read a JSON file of an exported folder."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; export the model again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a readable JSON file ({error})") from None
