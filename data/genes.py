"""Gene spaces: which gene has which index, and how the genes of a file are matched to one."""

import csv
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.errors import DataError, listed
from data.gene_tables import previous_symbols

GeneKey = Literal["ensembl_id", "symbol"]

ID_COLUMNS = ("id", "ensembl_id", "ensembl", "gene_ids", "gene_id", "feature_id", "ensembl_gene_id")
SYMBOL_COLUMNS = (
    "symbol", "gene_symbol", "gene_symbols", "gene_name", "gene_names", "feature_name", "gene_short_name",
    "hgnc_symbol", "name",
)  # fmt: skip
KIND_COLUMNS = ("feature_types", "feature_type", "modality", "feature_biotype")
"""Columns of var that say what each row measures: those of 10x Genomics, of multi-omic files, and of CELLxGENE."""
GENE_KINDS = ("gene expression", "gene")
"""What such columns call a gene, in lower case."""
NOT_A_GENE = -2
"""In place of an index: the column of a matrix is no gene, as an antibody, and counts nowhere."""
_ENSEMBL = re.compile(r"(ENS[A-Z]{0,6}G\d{11})(?:\.\d+)?(_PAR_Y)?")


@dataclass(frozen=True)
class GeneSpace:
    """Hold an ordered set of genes; the position of a gene is its index in the corpus and in models."""

    ids: tuple[str, ...]
    """Unique names that genes are matched by: Ensembl ids without version, or symbols (see `key`)."""
    symbols: tuple[str | None, ...]
    """Symbol of each gene where known; equal to `ids` when the key is `symbol`."""
    key: str
    """What `ids` holds: `ensembl_id` or `symbol`."""

    def __post_init__(self) -> None:
        """Refuse a space that is empty, ambiguous or of an unknown key."""
        if self.key not in ("ensembl_id", "symbol"):
            raise DataError(f"gene space: key {self.key!r} is not one of ensembl_id, symbol")
        if len(self.ids) != len(self.symbols):
            raise DataError(f"gene space: {len(self.ids)} ids but {len(self.symbols)} symbols")
        if not self.ids:
            raise DataError("gene space: it holds no gene")
        if not all(symbol is None or isinstance(symbol, str) for symbol in self.symbols):
            raise DataError("gene space: a symbol is no text")
        check_gene_names(self.ids, "gene space")

    def __len__(self) -> int:
        """Count the genes."""
        return len(self.ids)

    @cached_property
    def sha256(self) -> str:
        """Identify the space by its key and ordered ids; symbols are labels and do not count."""
        content = json.dumps([self.key, list(self.ids)], ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    @cached_property
    def _index_of_id(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.ids)}

    @cached_property
    def _index_of_symbol(self) -> dict[str, int]:
        """Map each symbol that only one gene has."""
        times = Counter(self.symbols)
        return {name: i for i, name in enumerate(self.symbols) if name is not None and times[name] == 1}

    @cached_property
    def ambiguous_symbols(self) -> frozenset[str]:
        """Name the symbols that several genes of the space share."""
        return frozenset(
            name for name, times in Counter(self.symbols).items() if name is not None and times > 1
        )

    def index(self, name: str) -> int:
        """Return the index of the gene with this id (any version) or, where it is unique, this symbol."""
        stripped = strip_version(name)
        found = self._index_of_id.get(stripped, self._index_of_id.get(name, self._index_of_symbol.get(name)))
        if found is not None:
            return found
        if name in self.ambiguous_symbols:
            same = [gene for gene, symbol in zip(self.ids, self.symbols, strict=True) if symbol == name]
            raise DataError(f"gene symbol {name!r} belongs to several genes: {listed(same)}; use the id")
        known = [*self._index_of_id, *self._index_of_symbol]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; close to it: {', '.join(near)}" if near else ""
        raise DataError(f"gene {name!r} is not among the {len(self)} genes of the gene space{hint}")

    def indices(self, names: Sequence[str], by: GeneKey | None = None) -> np.ndarray:
        """Return the int32 index of each name, -1 where the space lacks it; `by` defaults to the key."""
        table = self._index_of_id if by is None or by == self.key else self._index_of_symbol
        return np.fromiter((table.get(name, -1) for name in names), dtype=np.int32, count=len(names))

    def to_json(self) -> str:
        """Return the text of `genes.json`."""
        text = json.encoder.encode_basestring_ascii
        head = json.dumps({"format": 1, "key": self.key, "sha256": self.sha256})[:-1]
        lines = ",\n".join(
            f'{{"id": {text(gene)}, "symbol": {"null" if symbol is None else text(symbol)}}}'
            for gene, symbol in zip(self.ids, self.symbols, strict=True)
        )
        return f'{head}, "genes": [\n{lines}\n]}}\n'

    @classmethod
    def from_json(cls, content: str | bytes | Mapping[str, Any], where: str = "genes.json") -> "GeneSpace":
        """Read what `to_json` wrote (its text, or the parsed object) and verify the hash."""
        try:
            parsed = content if isinstance(content, Mapping) else json.loads(content)
            if parsed["format"] != 1:
                raise DataError(f"{where}: format {parsed['format']!r} is not 1, the only one known here")
            space = cls(
                ids=tuple(gene["id"] for gene in parsed["genes"]),
                symbols=tuple(gene["symbol"] for gene in parsed["genes"]),
                key=parsed["key"],
            )
            expected = parsed["sha256"]
        except DataError:
            raise
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise DataError(f"{where}: not a gene space as `genes.json` holds it ({error!r})") from error
        if expected != space.sha256:
            raise DataError(f"{where}: its genes do not have the sha256 that it names; the file was edited")
        return space


@dataclass(frozen=True)
class SourceGenes:
    """Hold what one source file calls its genes, in the file's order."""

    where: str
    """File (and column) the names come from, for messages."""
    ids: tuple[str, ...] | None
    """Ensembl ids without version, where the file has them."""
    symbols: tuple[str, ...] | None
    """Symbols, where the file has them; may repeat when ids are used."""
    kinds: tuple[str, ...] | None = None
    """What each column of the matrix measures, where some are no genes; names are those of the genes alone."""

    def __len__(self) -> int:
        """Count the genes."""
        return len(self.ids if self.ids is not None else self.symbols or ())

    def names(self, key: str) -> tuple[str, ...]:
        """Return the unique names under this key, or raise listing what is missing or repeated."""
        names = self.ids if key == "ensembl_id" else self.symbols
        if names is None:
            kind = "Ensembl ids" if key == "ensembl_id" else "gene symbols"
            raise DataError(f"{self.where}: no {kind} found; name their column in var with --gene-column")
        check_gene_names(names, self.where)
        return names

    def by_column(self, index: np.ndarray) -> np.ndarray:
        """Return the index of each gene as that of each column of the matrix, `NOT_A_GENE` where it is none."""
        if self.kinds is None:
            return index
        columns = np.full(len(self.kinds), NOT_A_GENE, index.dtype)
        columns[[is_gene_kind(kind) for kind in self.kinds]] = index
        return columns

    def notices(self) -> list[str]:
        """Say which columns are no genes, and which names are no Ensembl ids where the others are."""
        said = []
        if self.kinds is not None:
            others = kinds_counted(self.kinds)
            said.append(f"{self.where}: no genes, and left out of counts and totals: {others}")
        strange = [name for name in self.ids or () if not _ENSEMBL.fullmatch(name)]
        if strange:
            said.append(
                f"{self.where}: {len(strange)} of {len(self):,} names are no Ensembl ids ({listed(strange, 3)}) and "
                "are taken for genes; antibodies, guides or spike-ins are left out by a column "
                f"{KIND_COLUMNS[0]} of var that says 'Gene Expression' of genes alone"
            )
        return said


def is_gene_kind(kind: str) -> bool:
    """Tell whether a column of kinds calls a row of var a gene."""
    return kind.strip().lower() in GENE_KINDS


def kinds_counted(kinds: Sequence[str]) -> str:
    """Count the rows of var that are no genes, by their kind."""
    times = Counter(kind.strip() or "of no kind" for kind in kinds if not is_gene_kind(kind))
    return ", ".join(f"{number:,} {kind}" for kind, number in times.most_common())


def looks_like_ensembl(names: Sequence[str]) -> bool:
    """Tell whether at least half of the names are Ensembl gene ids (spike-ins and antibodies are not)."""
    return bool(names) and 2 * sum(map(bool, map(_ENSEMBL.fullmatch, names))) >= len(names)


def strip_version(name: str) -> str:
    """Cut the version from an Ensembl gene id (`ENSG00000141510.18`); return other names as they are."""
    match = _ENSEMBL.fullmatch(name)
    return match[1] + (match[2] or "") if match else name


def check_gene_names(names: Sequence[str], where: str) -> None:
    """Raise where a name is empty or occurs twice, listing positions or names."""
    if "" in names or any(map(str.isspace, names)):
        empty = [str(index) for index, name in enumerate(names) if not name.strip()]
        raise DataError(f"{where}: {len(empty)} genes have an empty name, at positions {listed(empty)}")
    if len(set(names)) != len(names):
        repeated = [name for name, times in Counter(names).items() if times > 1]
        raise DataError(
            f"{where}: {len(repeated)} gene names occur more than once (Ensembl versions are cut before): "
            f"{listed(repeated)}; make them unique or name another column with --gene-column"
        )


def common_key(sources: Sequence[SourceGenes]) -> GeneKey:
    """Choose what genes of several sources are matched by: Ensembl ids if all have them, else symbols."""
    if all(source.ids is not None for source in sources):
        return "ensembl_id"
    without = [source.where for source in sources if source.symbols is None]
    if without:
        only_symbols = [source.where for source in sources if source.ids is None]
        raise DataError(
            f"the files share no kind of gene name: only Ensembl ids in {listed(without)}, none in "
            f"{listed(only_symbols)}; give --genes a vocabulary that knows both, such as human_all or mouse_all, or a "
            "table with the columns id,symbol"
        )
    return "symbol"


def combine_genes(sources: Sequence[SourceGenes], how: Literal["union", "intersection"]) -> GeneSpace:
    """Build the space of all (or the shared) genes, in order of first appearance over the sources."""
    key = common_key(sources)
    per_source = [source.names(key) for source in sources]
    if how == "union":
        kept = list(dict.fromkeys(name for names in per_source for name in names))
    else:
        shared = set(per_source[0]).intersection(*per_source[1:])
        kept = [name for name in per_source[0] if name in shared]
        if not kept:
            files = listed([source.where for source in sources])
            raise DataError(f"the files have no gene in common (matched by {key}): {files}")
    if key == "symbol":
        return GeneSpace(ids=tuple(kept), symbols=tuple(kept), key=key)
    symbol_of: dict[str, str] = {}
    for source, names in zip(sources, per_source, strict=True):
        if source.symbols is not None:
            for name, symbol in zip(names, source.symbols, strict=True):
                if symbol.strip():
                    symbol_of.setdefault(name, symbol)
    return GeneSpace(ids=tuple(kept), symbols=tuple(symbol_of.get(name) for name in kept), key=key)


def match_genes(space: GeneSpace, source: SourceGenes) -> tuple[np.ndarray, str]:
    """Return the space's index of each gene of the source (int32, -1 absent) and the key matched by.

    A human gene that the source names by a previous symbol is found too, where the space has Ensembl ids and the source
    has no other name for the gene.
    """
    if space.key == "ensembl_id" and source.ids is None:
        if all(symbol is None for symbol in space.symbols):
            raise DataError(
                f"{source.where} has gene symbols only, the gene list Ensembl ids only; "
                "give --genes a vocabulary that knows both, such as human_all or mouse_all, or a table with the "
                "columns id,symbol"
            )
        names = source.names("symbol")
        return _with_previous_symbols(space, names, space.indices(names, by="symbol")), "symbol"
    return space.indices(source.names(space.key)), space.key


def _with_previous_symbols(space: GeneSpace, names: Sequence[str], index: np.ndarray) -> np.ndarray:
    """Fill in the genes that are named by a previous symbol, each by one name at most."""
    ids = [
        previous_symbols().get(name, "") if found < 0 else ""
        for name, found in zip(names, index, strict=True)
    ]
    renamed = space.indices(ids)
    times = Counter(renamed.tolist())
    is_new = (
        (renamed >= 0) & ~np.isin(renamed, index) & np.array([times[each] == 1 for each in renamed.tolist()])
    )
    return np.where(is_new, renamed, index)


def read_gene_list(path: str | Path) -> GeneSpace:
    """Read a gene list: .txt (a name a line), .csv or .tsv (id and symbol columns), or `genes.json`."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"gene list {path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"gene list {path}: not a UTF-8 text file") from error
    if path.suffix == ".json":
        return GeneSpace.from_json(text, where=str(path))
    if path.suffix in (".csv", ".tsv"):
        ids, symbols = _table_columns(text, "," if path.suffix == ".csv" else "\t", path)
    else:
        ids, symbols = [line.strip() for line in text.splitlines() if line.strip()], None
    if not (ids or symbols):
        raise DataError(f"gene list {path}: it holds no gene")
    if ids is not None and looks_like_ensembl(ids):
        stripped = tuple(strip_version(name) for name in ids)
        check_gene_names(stripped, f"gene list {path}")
        known = tuple(name or None for name in symbols) if symbols is not None else (None,) * len(stripped)
        return GeneSpace(ids=stripped, symbols=known, key="ensembl_id")
    names = tuple(symbols or ids or ())
    check_gene_names(names, f"gene list {path}")
    return GeneSpace(ids=names, symbols=names, key="symbol")


def _table_columns(text: str, delimiter: str, path: Path) -> tuple[list[str] | None, list[str] | None]:
    """Return the id column and the symbol column of a table with a header, None for one it lacks."""
    reader = csv.reader(text.splitlines(), delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(
            f"gene list {path}: line {reader.line_num} is no line of a table ({error})"
        ) from error
    columns: list[list[str] | None] = []
    for wanted in (ID_COLUMNS, SYMBOL_COLUMNS):
        name = next((name for name in wanted if name in header), None)
        if name is None:
            columns.append(None)
            continue
        position = header.index(name)
        short = [number for number, row in rows if len(row) <= position]
        if short:
            raise DataError(f"gene list {path}: line {short[0]} has no column {name!r}")
        columns.append([row[position].strip() for _, row in rows])
    if columns == [None, None]:
        raise DataError(
            f"gene list {path}: its header {header} names neither an id column ({', '.join(ID_COLUMNS)}) "
            f"nor a symbol column ({', '.join(SYMBOL_COLUMNS)})"
        )
    return columns[0], columns[1]
