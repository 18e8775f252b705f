"""The CELLxGENE Census as a source of cells: which cells a configuration asks for, and the corpus they become.

`data.prepared.census_loader` is the loader of a configuration. What TileDB-SOMA is asked is in `data.census_soma`, how
the answer becomes a corpus in `data.census_conversion`.
"""

import ast
import datetime
import keyword
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.census_conversion import CensusCorpusSettings, convert_census
from data.census_soma import MOVING_VERSIONS, CensusExperiment, Release, find_release
from data.conversion_plan import parse_obs
from data.corpus import CorpusInfo
from data.corpus_cache import cache_name, made_once, obs_requests, say
from data.errors import DataError
from data.gene_vocabulary import FROM_DATA, gene_vocabulary

ORGANISMS = {"Homo sapiens": "homo_sapiens", "Mus musculus": "mus_musculus"}
"""The Census's key of each organism."""
OPTIONS = (
    "organism", "census_version", "obs_value_filter", "var_value_filter", "filters", "obs_columns", "uri",
)  # fmt: skip
_FORMAT = 1
"""Of what is kept in the cache folder: part of every key."""


@dataclass(frozen=True)
class CensusQuery:
    """Say which cells and genes of which release are read."""

    organism: str = "homo_sapiens"
    """Key of the Census, a value of `ORGANISMS`."""
    census_version: str = "latest"
    obs_value_filter: str | None = None
    """As it was given; `filters` make one otherwise (see `obs_filter`)."""
    var_value_filter: str | None = None
    filters: Mapping[str, Any] | None = None
    obs_columns: tuple[str, ...] = ()
    uri: str | None = None

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> "CensusQuery":
        """Read the table `census` of a configuration.

        Raises:
            DataError: an option is unknown or has a value that is not allowed.
        """
        table = {} if options is None else options
        if not isinstance(table, Mapping):
            raise DataError(f"census: got {table!r}; it must be a table of options")
        unknown = [str(name) for name in table if name not in OPTIONS]
        if unknown:
            raise DataError(f"census: unknown options {', '.join(unknown)}; there are: {', '.join(OPTIONS)}")
        organism = table.get("organism", "Homo sapiens")
        if organism not in ORGANISMS:
            raise DataError(f"census.organism is {organism!r}; it must be {' | '.join(ORGANISMS)}")
        columns = table.get("obs_columns") or ()
        if not isinstance(columns, Sequence) or not all(isinstance(each, str) and each for each in columns):
            raise DataError(f"census.obs_columns is {columns!r}; it must be a list of names of obs columns")
        filters = table.get("filters")
        if filters is not None:
            value_filter(filters)
        return cls(
            organism=ORGANISMS[organism],
            census_version=_version(table.get("census_version", "latest")),
            obs_value_filter=_optional_filter(table, "obs_value_filter"),
            var_value_filter=_optional_filter(table, "var_value_filter"),
            filters=filters,
            obs_columns=(columns,) if isinstance(columns, str) else tuple(columns),
            uri=_optional_text(table, "uri"),
        )

    @cached_property
    def obs_filter(self) -> str | None:
        """Return the SOMA value filter on cells: the one that was given, else the one that `filters` make."""
        if self.obs_value_filter is not None:
            return self.obs_value_filter
        return value_filter(self.filters) or None if self.filters else None

    @property
    def is_moving(self) -> bool:
        """Tell whether the same words may stand for other cells tomorrow."""
        return self.uri is None and self.census_version in MOVING_VERSIONS

    @property
    def notices(self) -> tuple[str, ...]:
        """Say what the user should know of how the options were read."""
        if self.obs_value_filter is not None and self.filters:
            return ("census.filters is not used, since census.obs_value_filter is given and goes before it",)
        return ()


def value_filter(filters: Mapping[str, Any], where: str = "census.filters") -> str:
    """Return the SOMA value filter that means: each column has the given value, or one of the given list.

    Raises:
        DataError: a name or value cannot be part of a filter; the message names it.
    """
    if not isinstance(filters, Mapping):
        raise DataError(f"{where}: got {filters!r}; it must be a table of obs columns and values")
    return " and ".join(_term(name, value, where) for name, value in filters.items())


def census_corpus(
    census: Mapping[str, Any] | None,
    *,
    gene_vocab: str = FROM_DATA,
    obs: Sequence[str] = (),
    needed: Sequence[str | None] = (),
    technical_batch: str | None = None,
    cache_dir: str | Path = "cache",
    min_genes: int = 1,
    min_match: float = 0.5,
) -> CorpusInfo:
    """Return the corpus of the cells that a table `census` describes; read them where the cache has none.

    It is found again by the release, the filters, the kept columns and the genes. Any number of processes may ask
    for it at once: one reads, the others wait. Where reading was interrupted, the next call goes on.

    Args:
        census: options of `CensusQuery.read`.
        gene_vocab: genes of the corpus, as in `data.prepared.h5ad_loader`; `from_data` takes those of the Census.
        obs: obs columns to keep beside `obs_columns`, by name, or `NAME=COLUMN` to rename one.
        needed: further columns that a loader reads; None stands for none.
        technical_batch: obs column of the technical batch; `@file` takes each dataset of the Census as one.
        cache_dir: folder of the converted corpora.
        min_genes: cells with fewer expressed genes of the corpus are dropped.
        min_match: least share of the genes (of the Census or the vocabulary, whichever are fewer) that must match.

    Raises:
        DataError: the Census cannot be read, or does not hold what is asked for.
    """
    query = CensusQuery.read(census)
    requests = obs_requests((*query.obs_columns, *obs), needed, technical_batch)
    settings = CensusCorpusSettings(
        columns={name: column for name, column in parse_obs(requests).items() if column},
        gene_space=None if gene_vocab == FROM_DATA else gene_vocabulary(gene_vocab),
        min_genes=min_genes,
        min_match=min_match,
    )
    release = find_release(query.census_version, query.uri)
    content = {
        "format": _FORMAT,
        "release": release.identity,
        "organism": query.organism,
        "obs_filter": query.obs_filter,
        "var_filter": query.var_value_filter,
        "columns": sorted(settings.columns.items()),
        "min_genes": min_genes,
        "genes": FROM_DATA if settings.gene_space is None else settings.gene_space.to_json(),
    }
    folder = Path(cache_dir) / cache_name(f"census-{query.organism}-{release.name}", 1, content)

    def convert() -> None:
        for notice in query.notices:
            say(notice)
        say(f"{release.title}: read once into {folder}, and read from there from now on")
        _convert(release, query, settings, folder)

    return made_once(folder, Path(cache_dir), convert, f"reading {release.title}")


def _convert(release: Release, query: CensusQuery, settings: CensusCorpusSettings, folder: Path) -> None:
    with CensusExperiment(release, query.organism) as experiment:
        if query.obs_value_filter is None and query.filters:
            experiment.check_filters(query.filters, "census.filters")
        origin = {
            "census": experiment.where,
            "uri": experiment.uri,
            "build": experiment.build,
            "census_version": query.census_version if query.uri is None else None,
            "organism": query.organism,
            "obs_value_filter": query.obs_filter,
            "var_value_filter": query.var_value_filter,
        }
        convert_census(
            experiment, folder, settings, query.obs_filter, query.var_value_filter, origin=origin, say=say
        )


def _version(value: Any) -> str:
    if isinstance(value, datetime.date):  # YAML reads a date without quotes as one
        return value.isoformat()
    if isinstance(value, str) and value in MOVING_VERSIONS:
        return value
    try:
        return datetime.date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise DataError(
            f"census.census_version is {value!r}; it must be latest | stable | the date of a release, as 2025-01-30"
        ) from None


def _optional_text(table: Mapping[str, Any], name: str) -> str | None:
    value = table.get(name)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise DataError(f"census.{name} is {value!r}; it must be a text, or null")
    return value


def _optional_filter(table: Mapping[str, Any], name: str) -> str | None:
    """Return a SOMA value filter that can be parsed; what else is wrong with it, the release has to be opened for."""
    value = _optional_text(table, name)
    if value is None:
        return None
    try:
        ast.parse(value, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else str(error) or "nested too deeply"
        raise DataError(
            f"census.{name} {value!r} cannot be read as a condition ({reason}); "
            "write one as tissue == 'lung' and nnz > 500, with == for equals"
        ) from error
    return value


def _term(name: Any, value: Any, where: str) -> str:
    """Return the condition on one column."""
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: got {name!r} where the name of an obs column is expected")
    place = f"{where}.{name}"
    is_word = name.isidentifier() and not keyword.iskeyword(name)
    column = name if is_word else f"attr({_literal(name, where)})"
    if not isinstance(value, list | tuple):
        return f"{column} == {_literal(value, place)}"
    if not value:
        raise DataError(f"{place}: the list is empty, so that no cell could match; leave the column out")
    literals = [_literal(each, place) for each in value]
    kinds = {
        "text" if isinstance(each, str) else "bool" if isinstance(each, bool) else "number" for each in value
    }
    if len(kinds) > 1:
        raise DataError(
            f"{place}: {value!r} mixes {' and '.join(sorted(kinds))}; a column holds one kind of values"
        )
    if kinds == {"bool"}:  # TileDB-SOMA has no membership test for them
        terms = [f"{column} == {literal}" for literal in dict.fromkeys(literals)]
        return terms[0] if len(terms) == 1 else f"({' or '.join(terms)})"
    return f"{column} in [{', '.join(literals)}]"


def _literal(value: Any, place: str) -> str:
    """Write a value so that SOMA, which reads Python literals, reads it back as the same."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or isinstance(value, float) and math.isfinite(value):
        return repr(value)
    if isinstance(value, str):
        if "\0" in value:
            raise DataError(f"{place}: {value!r} holds a zero byte, which no obs column can hold")
        return '"' + "".join(map(_escaped, value)) + '"'
    if value is None:
        reason = "null is no value that can be compared; leave the column out, or use obs_value_filter"
    elif isinstance(value, Mapping | list | tuple | set):
        reason = f"{value!r} is nested; a column has one value or one list of values"
    elif isinstance(value, datetime.date):
        reason = f"{value!r} is a date; write it in quotes to compare texts"
    else:
        reason = f"{value!r} is not a text, true, false or a finite number"
    raise DataError(f"{place}: {reason}")


def _escaped(character: str) -> str:
    if character == '"':
        return '\\"'
    is_plain = character.isprintable() and character != "\\"
    return character if is_plain else character.encode("unicode_escape").decode()
