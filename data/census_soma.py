"""Ask TileDB-SOMA: find and open a release of the Census (or an experiment of one's own), read cells, genes and counts.

Whatever is read comes in pieces of bounded size. The packages come with the extra `census` and are imported only here.
"""

import contextlib
import difflib
import hashlib
import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlparse

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.errors import DataError, listed
from data.genes import SourceGenes, check_gene_names, strip_version

CELL_ID = "soma_joinid"
DATASET = "dataset_id"
MOVING_VERSIONS = ("latest", "stable")
"""Names that stand for another release from time to time."""
MODALITY = "RNA"
LAYER = "raw"
_PRESENCE = "feature_dataset_presence_matrix"
_MEMORY = {
    "soma.init_buffer_bytes": 32 * 1024**2,  # of each column of a piece that is read
    "sm.mem.total_budget": 1024**3,  # of all that TileDB holds while it reads: tiles, filters, results
}

FieldKind = Literal["text", "bool", "int", "float", "other"]


@dataclass(frozen=True)
class Release:
    """Name what is read, before it is opened."""

    name: str
    """Short: date of the release, or name of the folder."""
    uri: str | None
    """Where it lies; None leaves it to the directory of the Census."""
    identity: dict[str, Any]
    """What changes when the content changes."""
    expected_build: str | None
    """Date of the release that it must be; None accepts any."""

    @property
    def title(self) -> str:
        """Return what messages call it."""
        return f"the Census of {self.name}" if self.uri is None else self.uri


class CellLabels(NamedTuple):
    """Hold the labels of consecutive cells: positions in a list of names, -1 where a cell has none."""

    codes: NDArray[np.int64]
    names: list[str]


def find_release(census_version: str, uri: str | None) -> Release:
    """Find out which release a version stands for, or what lies at a URI.

    Raises:
        DataError: there is none, or the network is needed and cannot be reached.
    """
    is_date = census_version not in MOVING_VERSIONS
    if uri is None:
        build = census_version if is_date else _release_build(census_version)
        return Release(build, None, {"build": build}, build)
    expected = census_version if is_date else None
    folder = _local_folder(uri)
    if folder is not None:
        if not folder.is_dir():
            raise DataError(f"census.uri: {uri}: no such folder")
        # Absolute, since TileDB takes a relative one from where the process began.
        where = str(folder.absolute())
        return Release(Path(where).name, where, {"content": _fragments(folder), "build": expected}, expected)
    with contextlib.closing(_open_uri(uri)) as root:
        build = _build_date(root)
    if build is None:
        raise DataError(
            f"census.uri: {uri} does not say of which date it is (census_info/summary, census_build_date), so that a "
            "change could not be noticed; copy it to this machine, or use a mirror of the Census"
        )
    return Release(build, uri, {"uri": uri, "build": build}, expected)


class CensusExperiment:
    """Read the cells, genes and counts of one organism, as a context manager."""

    def __init__(self, release: Release, organism: str) -> None:
        """Open a release; `organism` is its key in the Census."""
        self._closing = contextlib.ExitStack()
        try:
            root = self._closing.enter_context(contextlib.closing(_open(release)))
            self.uri: str = root.uri
            self.build = _build_date(root)
            self.name, self.where = release.name, release.title
            if release.expected_build is not None and self.build not in (None, release.expected_build):
                raise DataError(
                    f"census: {self.uri} is the Census of {self.build}, and census_version asks for "
                    f"{release.expected_build}; take one of them out"
                )
            self._info = root.get("census_info")
            self._experiment = _experiment(root, organism, self.uri)
            if MODALITY not in self._experiment.ms or LAYER not in self._experiment.ms[MODALITY].X:
                raise DataError(
                    f"{self.uri}: it has no matrix ms[{MODALITY!r}].X[{LAYER!r}], the counts of the Census"
                )
            self._rna = self._experiment.ms[MODALITY]
            self.fields: dict[str, FieldKind] = {
                field.name: _kind(field.type) for field in self._experiment.obs.schema
            }
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> "CensusExperiment":
        """Return the experiment."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._closing.close()

    @cached_property
    def num_var(self) -> int:
        """Count the gene numbers up to the last one; the matrix may have room for many more."""
        with self._problems("reading the genes", None, []):
            numbers = self._rna.var.read(column_names=[CELL_ID]).concat()[CELL_ID].to_numpy()
        return int(numbers.max(initial=-1)) + 1

    def require(self, column: str, where: str) -> None:
        """Raise where obs lacks a column, or holds it in a type that is not known here."""
        if column not in self.fields:
            near = difflib.get_close_matches(column, self.fields, n=3)
            hint = f"; close to it: {', '.join(near)}" if near else ""
            raise DataError(
                f"{where}: obs of {self.uri} has no column {column!r}{hint}; it has: {', '.join(self.fields)}"
            )
        if self.fields[column] == "other":
            kind = self._experiment.obs.schema.field(column).type
            raise DataError(f"{where}: obs column {column!r} is of type {kind}, which cannot be used here")

    def check_filters(self, filters: Mapping[str, Any], where: str) -> None:
        """Refuse filters on what is not there: a column, a type of values, or a label that no cell can have."""
        schema = self._experiment.obs.schema
        for column, value in filters.items():
            self.require(column, where)
            values = list(value) if isinstance(value, list | tuple) else [value]
            kind = self.fields[column]
            wrong = [each for each in values if not _fits(each, kind)]
            if wrong:
                raise DataError(
                    f"{where}.{column}: {wrong[0]!r} is not {_ALLOWED[kind]}, which the column holds"
                )
            if kind == "text" and pa.types.is_dictionary(schema.field(column).type):
                self._check_labels(column, values, f"{where}.{column}")

    def _check_labels(self, column: str, values: Sequence[str], place: str) -> None:
        obs = self._experiment.obs
        known = obs.get_enumeration_values([column])[column].to_pylist()
        missing = [each for each in values if each not in known]
        if missing:
            near = difflib.get_close_matches(missing[0], known, n=3)
            hint = f"close to it: {', '.join(near)}" if near else f"there are: {listed(sorted(known), 10)}"
            raise DataError(f"{place}: no cell of {self.uri} has {missing[0]!r}; {hint}")

    def genes(self, var_filter: str | None) -> tuple[SourceGenes, NDArray[np.int64]]:
        """Return the genes that pass a filter, and their numbers in the matrix.

        Raises:
            DataError: var has no `feature_id`, the filter cannot be used, or no gene passes it.
        """
        var = self._rna.var
        columns = var.schema.names
        names = [name for name in ("feature_id", "feature_name") if name in columns]
        if "feature_id" not in names:
            raise DataError(f"{self.uri}: var has no column feature_id; it has: {', '.join(columns)}")
        where = f"{self.uri}: var"
        with self._problems("census.var_value_filter", var_filter, columns):
            table = var.read(column_names=[CELL_ID, *names], value_filter=var_filter).concat()
        if not len(table):
            raise DataError(f"census.var_value_filter {var_filter!r}: no gene of {self.uri} passes it")
        ids = tuple(strip_version(name) for name in table["feature_id"].to_pylist())
        check_gene_names(ids, where)
        symbols = None
        if "feature_name" in names:
            symbols = tuple(name or "" for name in table["feature_name"].to_pylist())
        return SourceGenes(where, ids, symbols), table[CELL_ID].to_numpy().astype(np.int64)

    def cells(
        self, columns: Sequence[str], obs_filter: str | None, first: int = 0
    ) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
        """Yield the numbers of the cells that pass a filter, ascending from `first`, and these obs columns of them."""
        last = -1
        with self._problems("census.obs_value_filter", obs_filter, list(self.fields)):
            tables = self._experiment.obs.read(
                coords=(slice(first, None),),
                column_names=list(dict.fromkeys([CELL_ID, *columns])),
                value_filter=obs_filter,
                result_order="row-major",
            )
            for table in tables:
                if not len(table):
                    continue
                numbers = table[CELL_ID].to_numpy()
                if numbers[0] <= last or (np.diff(numbers) <= 0).any():
                    raise DataError(
                        f"{self.uri}: damaged: the cells of obs do not come in the order of {CELL_ID}"
                    )
                last = int(numbers[-1])
                yield numbers, table.unify_dictionaries()

    def counts(
        self, numbers: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Return all values of some cells (ascending numbers), in any order: position of the cell, gene, value."""
        parts = []
        with self._problems("reading counts", None, []):
            for table in self._rna.X[LAYER].read((numbers,)).tables():
                cells = table["soma_dim_0"].to_numpy()
                position = np.minimum(np.searchsorted(numbers, cells), len(numbers) - 1)
                if not np.array_equal(numbers[position], cells):
                    raise DataError(f"{self.uri}: damaged: the matrix gave cells that were not asked for")
                genes = table["soma_dim_1"].to_numpy().astype(np.int32)
                parts.append((position.astype(np.int32), genes, table["soma_data"].to_numpy()))
        if not parts:
            return np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32)
        position, genes, values = (np.concatenate(each) for each in zip(*parts, strict=True))
        return position, genes, values

    def measured(self, datasets: Sequence[str]) -> list[NDArray[np.bool_]] | None:
        """Return for each dataset which genes [num_var] it measured; None where that is not recorded."""
        if self._info is None or "datasets" not in self._info or _PRESENCE not in self._rna:
            return None
        with self._problems("reading which genes were measured", None, []):
            table = self._info["datasets"].read(column_names=[CELL_ID, DATASET]).concat()
            rows = dict(zip(table[DATASET].to_pylist(), table[CELL_ID].to_pylist(), strict=True))
            if any(name not in rows for name in datasets):
                return None
            masks = [np.zeros(self.num_var, np.bool_) for _ in datasets]
            for name, mask in zip(datasets, masks, strict=True):
                for part in self._rna[_PRESENCE].read((np.array([rows[name]], np.int64),)).tables():
                    mask[part["soma_dim_1"].to_numpy()] = (
                        part["soma_data"].to_numpy(zero_copy_only=False) != 0
                    )
        return masks

    @contextlib.contextmanager
    def _problems(self, what: str, value: str | None, columns: Sequence[str]) -> Iterator[None]:
        """Say in the user's terms what TileDB could not do."""
        soma = _package("tiledbsoma")
        try:
            yield
        except (soma.SOMAError, RuntimeError) as error:
            reason = _first_line(error)
            if value is not None:
                raise DataError(
                    f"{what} {value!r}: {reason}; if the filter is at fault, its columns are: {', '.join(columns)}"
                ) from error
            raise DataError(
                f"{self.uri}: {what}: {reason}; start again, and reading goes on from here"
            ) from error


def labels_of(table: pa.Table, column: str, where: str) -> CellLabels:
    """Return an obs column as labels; an empty text or a missing value is no label."""
    values = table[column].combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    if not pa.types.is_dictionary(values.type):
        kind = values.type
        if pa.types.is_floating(kind):
            numbers = values.to_numpy(zero_copy_only=False)
            finite = numbers[np.isfinite(numbers)]
            if (finite != np.floor(finite)).any():
                raise DataError(
                    f"{where}: fractional numbers cannot be labels; keep the column under another name"
                )
            values = pa.array(
                [str(int(each)) if np.isfinite(each) else None for each in numbers.tolist()], pa.string()
            )
        elif pa.types.is_boolean(kind):
            values = pa.array(
                [None if each is None else str(each) for each in values.to_pylist()], pa.string()
            )
        elif pa.types.is_integer(kind):
            values = values.cast(pa.string())
        values = values.dictionary_encode()
    codes = values.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    names = ["" if name is None else str(name) for name in values.dictionary.to_pylist()]
    if "" in names:
        codes = np.where(codes == names.index(""), -1, codes)
    return CellLabels(codes, names)


def numbers_of(table: pa.Table, column: str, dtype: str, where: str) -> NDArray[Any]:
    """Return an obs column of numbers; a missing one is NaN, or an error in a column of whole numbers."""
    values = table[column]
    if values.null_count and dtype == "int64":
        cell = table[CELL_ID].to_numpy()[int(np.argmax(values.is_null().to_numpy()))]
        raise DataError(f"{where}: obs column {column!r} of whole numbers has no value for cell {cell}")
    return values.to_numpy().astype(dtype)


def number_type(kind: pa.DataType) -> str:
    """Return the type that a column of numbers is kept in."""
    if pa.types.is_integer(kind):
        return "int64"
    return "float64" if kind == pa.float64() else "float32"


_ALLOWED = {"text": "a text", "bool": "true or false", "int": "a whole number", "float": "a number"}


def _fits(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "bool":
        return isinstance(value, bool)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and (kind == "float" or value == int(value) and abs(value) < 2**63)


def _kind(kind: pa.DataType) -> FieldKind:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_integer(kind):
        return "int"
    return "float" if pa.types.is_floating(kind) else "other"


def _package(name: str) -> Any:
    """Import a package of the extra `census`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"the Census needs the package {error.name or name}, which is not installed; install the extra with: "
            "pip install -c constraints.txt -e '.[census]'"
        ) from error


def _release_build(alias: str) -> str:
    """Ask the directory of the Census for the date of its latest or stable release."""
    census = _package("cellxgene_census")
    with _network(f"census_version {alias}"):
        return str(census.get_census_version_description(alias)["release_build"])


@contextlib.contextmanager
def _network(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # what requests raises is one
        raise DataError(
            f"census: {what}: the directory of the Census cannot be reached ({_first_line(error)}). Without network, "
            "give the date of a release whose cells are in cache_dir already, or the folder of a copy in census.uri"
        ) from error
    except ValueError as error:
        raise DataError(f"census: {what}: there is no such release ({_first_line(error)})") from error


def _open(release: Release) -> Any:
    if release.uri is not None:
        return _open_uri(release.uri)
    census = _package("cellxgene_census")
    soma = _package("tiledbsoma")
    try:
        with _network(f"census_version {release.name}"):
            return census.open_soma(
                census_version=release.name, context=_context(os.getpid(), of_release=True)
            )
    except (soma.SOMAError, RuntimeError) as error:
        raise DataError(f"{release.title}: it cannot be opened ({_first_line(error)})") from error


@cache
def _context(process: int, *, of_release: bool = False) -> Any:
    """Return what a process opens every collection with.

    One stays for all: tiledbsoma 2.3 now and then corrupts the memory of a process that makes and drops many. A fork
    makes its own, since the threads of its parent's are not there.
    """
    if of_release:
        return _package("cellxgene_census").get_default_soma_context(tiledb_config=_MEMORY)
    return _package("tiledbsoma").SOMATileDBContext(tiledb_config=_MEMORY)


def _open_uri(uri: str) -> Any:
    soma = _package("tiledbsoma")
    try:
        return soma.open(uri, context=_context(os.getpid()))
    except (soma.SOMAError, RuntimeError) as error:
        raise DataError(
            f"census.uri: {uri}: not a SOMA collection that can be read ({_first_line(error)})"
        ) from error


def _experiment(root: Any, organism: str, uri: str) -> Any:
    """Return the experiment of an organism, or the one that was opened itself."""
    if root.soma_type == "SOMAExperiment":
        return root
    if root.soma_type != "SOMACollection" or "census_data" not in root:
        raise DataError(f"{uri}: neither a SOMA experiment nor a Census (it has no census_data)")
    data = root["census_data"]
    if organism not in data:
        raise DataError(f"{uri}: it has no {organism!r}; there are: {', '.join(data) or 'none'}")
    return data[organism]


def _build_date(root: Any) -> str | None:
    """Return the date that a Census says it was built at."""
    if (
        root.soma_type != "SOMACollection"
        or "census_info" not in root
        or "summary" not in root["census_info"]
    ):
        return None
    table = root["census_info"]["summary"].read(column_names=["label", "value"]).concat()
    values = dict(zip(table["label"].to_pylist(), table["value"].to_pylist(), strict=True))
    return values.get("census_build_date")


def _local_folder(uri: str) -> Path | None:
    """Return the folder that a URI names, None where it is on no disk."""
    if uri.startswith("file://"):
        return Path(unquote(urlparse(uri).path))
    return None if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", uri) else Path(uri)


def _fragments(folder: Path) -> str:
    """Identify the content of a SOMA folder by the names of its fragments, which TileDB never writes again."""
    names: list[str] = []
    for place, folders, _ in os.walk(folder):
        if os.path.basename(place) in ("__fragments", "__schema", "__group"):
            names += [os.path.relpath(os.path.join(place, name), folder) for name in os.listdir(place)]
            folders.clear()
    if not names:
        raise DataError(f"census.uri: {folder}: not a SOMA collection (it holds no TileDB array)")
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
