"""Decide what a conversion reads: the matrix of each file, the gene space, and the obs columns."""

import glob
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np

from data.cell_rows import BadValueError, ValueKind, ValueVerdict, exact_counts, exact_lognorm, judge_values
from data.conversion import FILE_LABEL, ConversionPlan, SourcePlan, bad_value
from data.errors import DataError, listed
from data.gene_vocabulary import gene_vocabulary, that_would_match
from data.genes import GeneSpace, SourceGenes, combine_genes, common_key, match_genes
from data.h5ad import PREFERRED_MATRICES, H5adFile, layers_of_counts, matrix_name
from data.h5ad_matrix import CscMatrix
from data.manifest import LABEL_COLUMNS, RESERVED_COLUMNS, UNLABELLED, ObsColumn, Storage, count_classes
from data.spelling import COMMAND, Spelling

OBS_DEFAULTS = {
    "technical_batch": ("batch", "gem_group"),
    "target_gene": ("target_gene",),
    "cell_type": ("cell_type",),
}
"""Obs columns that are taken where a file has them and --obs does not say otherwise."""
MAX_CLASSES = 100_000
MAX_SOURCES = 2**15
_SOME_MATCH = 0.05
"""Share of matched genes under which names agree by accident, so that a lower threshold is no advice."""
DEFAULT_CONTROL_LABEL = "non-targeting"
_LIKE_CONTROL = re.compile(
    r"control|ctrl|negative|non.?targ|scramble|\bntc?\b|dmso|vehicle|untreated|mock", re.IGNORECASE
)
"""What control cells are called: such labels are shown first where the user has to choose one."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class ConversionSettings:
    """Hold what the user asked of a conversion."""

    genes: str | GeneSpace = "union"
    """`union`, `intersection`, a vocabulary's name or the path of a gene list, or the genes themselves."""
    gene_column: str | None = None
    layer: str = "auto"
    obs: tuple[str, ...] = ()
    """`NAME=COLUMN` for each obs column to keep."""
    control_label: str | None = None
    min_genes: int = 1
    min_match: float = 0.5
    storage: Storage = "arrow"
    rows_per_shard: int = 20_000
    spelling: Spelling = COMMAND
    """How messages advise whoever asked."""


@dataclass(frozen=True)
class ChosenMatrix:
    """Name the matrix that is read from a file and what its values are."""

    name: str
    value_kind: ValueKind


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths and glob patterns name, in the order given."""
    paths: list[Path] = []
    for pattern in patterns:
        if Path(pattern).exists() or not glob.has_magic(pattern):
            paths.append(Path(pattern))
            continue
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise DataError(f"{pattern}: no file matches this pattern")
        paths.extend(Path(name) for name in found)
    times = Counter(resolved := [path.resolve() for path in paths])
    repeated = [str(path) for path, real in zip(paths, resolved, strict=True) if times[real] > 1]
    if repeated:
        raise DataError(f"the same input is given more than once: {', '.join(sorted(set(repeated)))}")
    if len(paths) > MAX_SOURCES:
        raise DataError(f"{len(paths)} inputs are more than the {MAX_SOURCES} that one corpus can tell apart")
    return paths


def plan_conversions(
    inputs: Sequence[Path], output: Path, settings: ConversionSettings, *, is_per_file: bool, say: Say
) -> list[ConversionPlan]:
    """Plan one corpus of all inputs, or one for each (`output`/<stem>), all over one gene space."""
    sources: list[SourcePlan] = []
    kinds: list[ValueKind] = []
    genes: list[SourceGenes] = []
    for path in inputs:
        with H5adFile(path) as file:
            chosen = choose_matrix(file, settings.layer, say)
            shape = file.matrix(chosen.name).shape
            if 0 in shape:
                raise DataError(f"{path}: {chosen.name} has no {'cells' if shape[0] == 0 else 'genes'}")
            kinds.append(chosen.value_kind)
            genes.append(file.genes(chosen.name, settings.gene_column))
            sources.append(SourcePlan(path, chosen.name, shape[0], np.empty(0, np.int32), {}))
    if not is_per_file:
        _require_one_kind(inputs, kinds, settings.spelling)
    space = choose_gene_space(genes, settings.genes, say)
    if settings.genes == "union":
        _check_overlap(genes, space.key, settings, is_per_file=is_per_file)
    sources = [
        replace(source, remap=match_source(space, names, settings, say))
        for source, names in zip(sources, genes, strict=True)
    ]
    if is_per_file:
        plans = _plan_per_file(output, sources, kinds, space, settings, say)
    else:
        plans = [plan_corpus(output, sources, kinds[0], space, settings, say)]
    if settings.control_label is not None and not any(plan.control_label for plan in plans):
        raise DataError(
            f"--control-label {settings.control_label}: no target_gene column is kept; name it with "
            "--obs target_gene=COLUMN"
        )
    return plans


def _require_one_kind(inputs: Sequence[Path], kinds: Sequence[ValueKind], spelling: Spelling) -> None:
    if len(set(kinds)) > 1:
        lists = "; ".join(
            f"{kind}: {', '.join(path.name for path, each in zip(inputs, kinds, strict=True) if each == kind)}"
            for kind in sorted(set(kinds))
        )
        raise DataError(
            f"one corpus holds one kind of values, but the files hold {lists}; choose matrices of one kind "
            f"with --layer, or {spelling.one_each}"
        )


def _plan_per_file(
    output: Path,
    sources: Sequence[SourcePlan],
    kinds: Sequence[ValueKind],
    space: GeneSpace,
    settings: ConversionSettings,
    say: Say,
) -> list[ConversionPlan]:
    """Plan a corpus of each file; an obs column or control label must be in one of the files at least."""
    stems = [source.stem for source in sources]
    if len(set(stems)) != len(stems):
        raise DataError(f"--per-file names the corpora after the files, but names repeat: {', '.join(stems)}")
    has_column = {request: False for request in settings.obs}
    plans = []
    for source, kind in zip(sources, kinds, strict=True):
        with H5adFile(source.path) as file:
            present = {*file.obs.columns(), file.obs.index_name, "index", FILE_LABEL, ""}
        here = [request for request in settings.obs if request.partition("=")[2] in present]
        has_column.update(dict.fromkeys(here, True))
        for request in settings.obs:
            if request not in here:
                say(
                    f"{source.path.name}: --obs {request}: this file has no such column, so it is left out here"
                )
        one = replace(settings, obs=tuple(here))
        plans.append(plan_corpus(output / source.stem, [source], kind, space, one, say))
    missing = [request for request, found in has_column.items() if not found]
    if missing:
        raise DataError(f"--obs {missing[0]}: none of the files has this column: {', '.join(stems)}")
    return plans


def plan_corpus(
    folder: Path,
    sources: Sequence[SourcePlan],
    value_kind: ValueKind,
    space: GeneSpace,
    settings: ConversionSettings,
    say: Say,
) -> ConversionPlan:
    """Plan one corpus: decide its obs columns and control label."""
    requested = parse_obs(settings.obs)
    chosen = choose_obs(sources, requested, say)
    _say_what_is_left(sources, chosen, settings.spelling, say)
    columns: dict[str, ObsColumn] = {}
    for name, per_source in chosen.items():
        columns[name] = _merge_column(
            name, sources, per_source, settings.spelling, is_requested=name in requested, say=say
        )
    return ConversionPlan(
        folder=folder,
        sources=tuple(
            replace(source, obs={name: chosen[name][index] for name in columns})
            for index, source in enumerate(sources)
        ),
        gene_space=space,
        columns=columns,
        value_kind=value_kind,
        control_label=_control_label(columns.get("target_gene"), settings, say),
        min_genes=settings.min_genes,
        storage=settings.storage,
        rows_per_shard=settings.rows_per_shard,
    )


def choose_matrix(file: H5adFile, layer: str, say: Say) -> ChosenMatrix:
    """Choose the matrix to read: the one named, or for `auto` the first that holds counts."""
    if layer == "auto":
        return _choose_automatically(file, say)
    name = matrix_name(layer)
    verdict = judge_values(file.matrix(name).sample())
    if verdict.kind == "counts" or (layer == "counts" and verdict.kind in ("mixed", "lognorm", "not logged")):
        if verdict.kind != "counts":
            _refuse_values(file, name, "counts", verdict)
        say(f"{file.name}: {name} ({verdict.reason}): counts")
        return ChosenMatrix(name, "counts")
    if verdict.kind in ("negative", "not finite", "not logged"):
        _refuse_values(file, name, "lognorm", verdict)
    say(f"{file.name}: {name} ({verdict.reason}): taken as log-normalised values")
    return ChosenMatrix(name, "lognorm")


def _choose_automatically(file: H5adFile, say: Say) -> ChosenMatrix:
    """Take the first of `layers['counts']`, raw.X, X that holds counts, else the first non-negative one."""
    candidates = [name for name in PREFERRED_MATRICES if name in file.matrix_names()]
    if not candidates:
        there = ", ".join(file.matrix_names()) or "none"
        raise DataError(
            f"{file.path}: none of layers/counts, raw.X, X is there; name a layer with --layer ({there})"
        )
    verdicts: dict[str, ValueVerdict] = {}
    for name in candidates:
        verdicts[name] = judge_values(file.matrix(name).sample())
        if verdicts[name].kind == "counts":
            passed = [f"{other}: {verdicts[other].reason}" for other in verdicts if other != name]
            why = f"; passed over: {'; '.join(passed)}" if passed else ""
            say(f"{file.name}: {name} ({verdicts[name].reason}): counts{why}")
            return ChosenMatrix(name, "counts")
    reasons = "; ".join(f"{name}: {verdict.reason}" for name, verdict in verdicts.items())
    _refuse_to_pass_over_counts(file, verdicts, reasons)
    for name, verdict in verdicts.items():
        if verdict.kind == "lognorm":
            say(f"{file.name}: {name}: no matrix holds counts; the first non-negative one is taken as "
                f"log-normalised ({reasons})")  # fmt: skip
            return ChosenMatrix(name, "lognorm")
        if verdict.kind == "mixed":
            hint = f"; if these are normalised values, name the matrix with --layer {name.removeprefix('layers/')}"
            _refuse_values(file, name, "counts", verdict, hint)
    name = next((name for name in candidates if verdicts[name].kind == "not logged"), candidates[0])
    _refuse_values(file, name, "lognorm", verdicts[name], f" ({reasons})")


def _refuse_to_pass_over_counts(file: H5adFile, verdicts: Mapping[str, ValueVerdict], reasons: str) -> None:
    """Raise where a layer that is not looked at by itself holds counts."""
    layers = layers_of_counts(file)
    if not layers:
        return
    logged = [name for name, verdict in verdicts.items() if verdict.kind == "lognorm"]
    instead = f", or the log-normalised values of {logged[0]} with --layer {logged[0]}" if logged else ""
    there = ", ".join(f"layers/{name}" for name in layers)
    raise DataError(
        f"{file.path}: no counts where they are looked for ({reasons}), but in {there}: take them with --layer "
        f"{layers[0]}{instead}"
    )


def _refuse_values(
    file: H5adFile, name: str, value_kind: ValueKind, verdict: ValueVerdict, hint: str = ""
) -> NoReturn:
    """Raise with the cell and gene of the first value that is not of the kind, where rows can be read."""
    there = ", ".join(file.matrix_names())
    if value_kind == "lognorm" and verdict.kind == "not logged":
        raise DataError(
            f"{file.path}: {name} holds neither counts nor log-normalised values: {verdict.reason}; round corrected "
            f"counts, take log1p of normalised values, or name another matrix with --layer (there are: {there})"
        )
    matrix = file.matrix(name)
    exact = exact_counts if value_kind == "counts" else exact_lognorm
    if not isinstance(matrix, CscMatrix):
        for chunk in matrix.chunks(0, matrix.shape[0]):
            try:
                exact(chunk.values)
            except BadValueError as error:
                raise DataError(f"{bad_value(file, name, chunk, error, value_kind)}{hint}") from None
    raise DataError(
        f"{file.path}: {name}: {verdict.reason}; name another matrix with --layer (there are: {there}){hint}"
    )


def choose_gene_space(genes: Sequence[SourceGenes], wanted: str | GeneSpace, say: Say) -> GeneSpace:
    """Return the union or intersection of the sources' genes, or those of a vocabulary or gene list."""
    how: Literal["union", "intersection"]
    if wanted not in ("union", "intersection"):
        space = gene_vocabulary(wanted) if isinstance(wanted, str) else wanted
        named = f" of {wanted}" if isinstance(wanted, str) else ""
        say(f"gene space: {len(space):,} genes{named}, by {space.key}, sha256 {space.sha256[:12]}")
        return space
    how = "union" if wanted == "union" else "intersection"
    key = common_key(genes)
    without = [source.where for source in genes if source.ids is None]
    if key == "symbol" and len(without) < len(genes):
        say(f"genes are matched by symbol: no Ensembl ids in {', '.join(without)}")
    space = combine_genes(genes, how)
    files = "those of the file"
    if len(genes) > 1:
        shared = set(genes[0].names(key)).intersection(*(source.names(key) for source in genes[1:]))
        in_all = f", of which all files have {len(shared):,}" if how == "union" else ""
        files = f"{how} of {len(genes)} files{in_all}"
    say(f"gene space: {len(space):,} genes ({files}), by {space.key}, sha256 {space.sha256[:12]}")
    return space


def _check_overlap(
    genes: Sequence[SourceGenes], key: str, settings: ConversionSettings, *, is_per_file: bool
) -> None:
    """Refuse a union of files that are of different organisms, or name their genes differently.

    Files that become a corpus each may share few genes, but not none.
    """
    names, min_match = [source.names(key) for source in genes], settings.min_match
    largest = max(range(len(names)), key=lambda index: len(names[index]))
    joined = set(names[largest])

    def share(index: int) -> float:
        return len(joined.intersection(names[index])) / min(len(joined), len(names[index]))

    waiting = [index for index in range(len(names)) if index != largest]
    while fitting := [i for i in waiting if share(i) >= min_match or (is_per_file and share(i) > 0)]:
        joined.update(*(names[index] for index in fitting))
        waiting = sorted({*waiting} - {*fitting})
    if not waiting:
        return
    other = names[waiting[0]]
    shared = len(joined.intersection(other))
    alone = listed([name for name in other if name not in joined], 3)
    each = "" if is_per_file else f" or {settings.spelling.one_each}"
    lower = "; if so few are right, lower it with --min-match" if share(waiting[0]) >= _SOME_MATCH else ""
    raise DataError(
        f"{genes[waiting[0]].where}: {shared:,} of its {len(other):,} genes are in the other files (such as "
        f"{genes[largest].where}): {share(waiting[0]):.1%} of the {min(len(joined), len(other)):,} possible, under the "
        f"threshold of {min_match:.0%}; alone it has {alone}. If the files are of one organism, name a column of var "
        f"that names genes alike in all of them (--gene-column); else give the genes with --genes{each}{lower}"
    )


def match_source(space: GeneSpace, genes: SourceGenes, settings: ConversionSettings, say: Say) -> np.ndarray:
    """Return the corpus index of each column of a source, or raise where too few are matched."""
    remap, key = match_genes(space, genes)
    matched = int(np.count_nonzero(remap >= 0))
    names = genes.names(key)
    possible = min(len(genes), len(space))
    share = matched / possible
    account = f"{matched:,} of {len(genes):,} genes matched by {key}"
    if matched == 0:
        raise DataError(
            f"{genes.where}: no gene in common with the gene space: it names them like "
            f"{', '.join(names[:3])}, the gene space like {', '.join(space.ids[:3])}; {_other_genes(genes)}name the "
            "right column of var with --gene-column, or give --genes a table with the columns id,symbol"
        )
    if settings.genes != "intersection" and share < settings.min_match:
        other = _other_genes(genes)
        is_some = share >= _SOME_MATCH and not other
        lower = "; if so few are right, lower it with --min-match" if is_some else ""
        raise DataError(
            f"{genes.where}: {account}: {share:.1%} of the {possible:,} possible, under the threshold of "
            f"{settings.min_match:.0%}; {other}name another column with --gene-column{lower}"
        )
    say(f"{genes.where}: {account} ({share:.1%} of the possible; refused under {settings.min_match:.0%})")
    if key != space.key:
        renamed = [
            name
            for name, index in zip(names, remap, strict=True)
            if index >= 0 and space.symbols[index] != name
        ]
        if renamed:
            some = ", ".join(renamed[:5])
            say(f"{genes.where}: {len(renamed)} of them by the symbol that they had before: {some}")
        shared = [name for name in names if name in space.ambiguous_symbols]
        if shared:
            some = ", ".join(shared[:5])
            say(f"{genes.where}: {len(shared)} symbols belong to several genes and are dropped: {some}")
    for notice in genes.notices():
        say(notice)
    return genes.by_column(remap)


def _other_genes(genes: SourceGenes) -> str:
    """Advise the vocabulary that a source's genes are of, where there is one."""
    found = that_would_match(genes)
    return f"{found}: take that if the cells are of this organism, or " if found else ""


def parse_obs(requests: Sequence[str]) -> dict[str, str]:
    """Read `NAME=COLUMN` requests; an empty column leaves a default out."""
    parsed: dict[str, str] = {}
    for request in requests:
        name, equals, column = request.partition("=")
        if not equals or not name:
            raise DataError(
                f"--obs {request}: not of the form NAME=COLUMN, such as cell_type={request or 'celltype'}"
            )
        if name in parsed:
            raise DataError(f"--obs {request}: {name} is named twice")
        if not column and name not in OBS_DEFAULTS:
            raise DataError(
                f"--obs {request}: only {', '.join(OBS_DEFAULTS)} are kept unasked and can be left out"
            )
        if name in RESERVED_COLUMNS:
            raise DataError(f"--obs {request}: the corpus itself has a column {name}; choose another name")
        parsed[name] = column
    return parsed


def choose_obs(sources: Sequence[SourcePlan], requested: Mapping[str, str], say: Say) -> dict[str, list[str]]:
    """Return, for each kept column, the obs column of every source: those requested, then the defaults."""
    columns_of: list[list[str]] = []
    for source in sources:
        with H5adFile(source.path) as file:
            columns_of.append(file.obs.columns())
            for name, column in requested.items():
                if column and column != FILE_LABEL:
                    _require(file, name, column)
    chosen: dict[str, list[str]] = {}
    for name, candidates in OBS_DEFAULTS.items():
        if name in requested:
            if requested[name]:
                chosen[name] = [requested[name]] * len(sources)
            continue
        found = [next((each for each in candidates if each in columns), None) for columns in columns_of]
        taken = [column for column in found if column is not None]
        if len(taken) == len(sources):
            chosen[name] = taken
        elif taken:
            lacking = [source.path.name for source, each in zip(sources, found, strict=True) if each is None]
            say(f"{name}: left out, since {', '.join(lacking)} has no column {' or '.join(candidates)}")
    for name, column in requested.items():
        if column and name not in chosen:
            chosen[name] = [column] * len(sources)
    return chosen


def _say_what_is_left(
    sources: Sequence[SourcePlan], chosen: Mapping[str, Sequence[str]], spelling: Spelling, say: Say
) -> None:
    """Name the obs columns that the corpus will not have, labels before numbers."""
    is_number: dict[str, bool] = {}
    for index, source in enumerate(sources):
        kept = {per_source[index] for per_source in chosen.values()}
        with H5adFile(source.path) as file:
            left = [column for column in file.obs.columns() if column not in kept]
            is_number |= {column: file.obs.is_number(column) for column in left}
    if is_number:
        names = sorted(is_number, key=lambda column: (is_number[column], column))
        say(f"obs columns that are not kept: {listed(names, 10)}; {spelling.keeps_column}")


def _require(file: H5adFile, name: str, column: str) -> None:
    try:
        file.obs.require(column)
    except DataError as error:
        raise DataError(f"--obs {name}={column}: {error}") from None


class _Column(NamedTuple):
    """Hold what a column is in all sources."""

    kinds: set[str]
    """`class` or `number`, or both."""
    number_types: set[str]
    names_of: list[set[str]]
    """Labels by source that has any."""
    unlabelled: int
    """Cells without a label."""


def _read_column(name: str, sources: Sequence[SourcePlan], per_source: Sequence[str]) -> _Column:
    kinds: set[str] = set()
    number_types: set[str] = set()
    names_of: list[set[str]] = []
    unlabelled = 0
    for source, column in zip(sources, per_source, strict=True):
        if column == FILE_LABEL:
            kinds.add("class")
            names_of.append({source.stem})
            continue
        with H5adFile(source.path) as file:
            kind = "class" if name in LABEL_COLUMNS else file.obs.kind(column)
            kinds.add(kind)
            if kind == "number":
                number_types.add(file.obs.number_type(column))
                continue
            names: set[str] = set()
            for chunk in file.obs.label_chunks(column):
                names |= {chunk.names[code] for code in np.unique(chunk.codes) if code >= 0}
                unlabelled += int(np.count_nonzero(chunk.codes < 0))
            names_of.append(names)
    return _Column(kinds, number_types, names_of, unlabelled)


def _merge_column(
    name: str,
    sources: Sequence[SourcePlan],
    per_source: Sequence[str],
    spelling: Spelling,
    *,
    is_requested: bool,
    say: Say,
) -> ObsColumn:
    """Merge a column of all sources: one list of class names, or one number type."""
    kinds, number_types, names_of, unlabelled = _read_column(name, sources, per_source)
    where = ", ".join(sorted(set(per_source)))
    if len(kinds) > 1:
        raise DataError(f"--obs {name}={where}: it holds labels in some files and numbers in others")
    if kinds == {"number"}:
        dtype = "float64" if len(number_types) > 1 else number_types.pop()
        say(f"{name}: numbers ({dtype}) from obs column {where}")
        return ObsColumn("number", dtype=dtype)
    if unlabelled and not is_requested:
        raise DataError(
            f"obs column {where}: {unlabelled} cells have no label; --obs {name}={where} keeps them as the class "
            f"{UNLABELLED!r}, --obs {name}= leaves the column out"
        )
    classes = set().union(*names_of, {UNLABELLED} if unlabelled else set())
    if len(classes) > MAX_CLASSES:
        raise DataError(
            f"--obs {name}={where}: {len(classes)} different labels; at most {MAX_CLASSES} can be kept"
        )
    say(f"{name}: {count_classes(classes, unlabelled, where)}")
    if name == "technical_batch":
        shared = sorted({label for label in classes if sum(label in names for names in names_of) > 1})
        if shared:
            say(
                f"technical_batch: {', '.join(shared[:5])} occur in several files and count as one technical batch "
                f"each; {spelling.takes_files} takes each file as one"
            )
    return ObsColumn("class", names=tuple(sorted(classes)))


def _control_label(target_genes: ObsColumn | None, settings: ConversionSettings, say: Say) -> str | None:
    """Return the label of control cells where target genes are kept and have it."""
    if target_genes is None:
        return None
    wanted, names_it = settings.control_label, settings.spelling.names_control
    label = wanted or DEFAULT_CONTROL_LABEL
    if label in target_genes.names:
        return label
    likely_first = sorted(target_genes.names, key=lambda name: _LIKE_CONTROL.search(name) is None)
    some = listed(likely_first, 10)
    if wanted is not None:
        raise DataError(f"--control-label {wanted}: no cell has this target_gene; there are: {some}")
    if names_it is not None:
        say(f"no cell has the target_gene {label!r}, so no control is recorded; {names_it} ({some})")
    return None
