"""Read h5ad files with h5py, in current and old encodings: their matrices, genes and obs columns."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import h5py
import numpy as np

from data.cell_rows import judge_values
from data.errors import DataError
from data.genes import (
    ID_COLUMNS,
    KIND_COLUMNS,
    SYMBOL_COLUMNS,
    SourceGenes,
    is_gene_kind,
    kinds_counted,
    looks_like_ensembl,
    strip_version,
)
from data.h5ad_matrix import CscMatrix, CsrMatrix, DenseMatrix, Matrix, read, reading

PREFERRED_MATRICES = ("layers/counts", "raw.X", "X")
"""Where values are looked for, in this order, where the user names no matrix."""
ROWS_PER_OBS_READ = 1 << 16
_CHUNK_CACHE_BYTES = 1 << 24
_WRITE_ANEW = "read it with anndata where the other file is, and write it anew, as one file"
_NAMES_PER_BYTE = 64
"""More than any compression makes of names that differ."""
_NAME_BYTES_PER_BYTE = 4096
"""The same of the places of names that are padded to one length."""


def _names_damage(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method name the file where what it reads is damaged."""

    @functools.wraps(method)
    def named(self: Any, *args: Any, **options: Any) -> Any:
        with reading(self.where):
            return method(self, *args, **options)

    return named


@dataclass(frozen=True)
class LabelChunk:
    """Hold the labels of consecutive cells as positions in a list of names; -1 where a cell has none."""

    codes: np.ndarray
    names: list[str]


class H5adFile:
    """Open one h5ad file for reading, as a context manager."""

    def __init__(self, path: str | Path) -> None:
        """Open the file and check that it is an h5ad file."""
        self.path = Path(path)
        self.name = self.path.name
        self.where = str(self.path)
        self.handle = _open_hdf5(self.path)
        try:
            _check_is_whole(self.handle, self.where)
            for part in ("obs", "var"):
                if part not in self.handle:
                    raise DataError(f"{self.path}: not an h5ad file: {self._what_it_is(part)}")
            self.obs = Frame(f"{self.path}: obs", self.handle["obs"], self.handle.get("uns"))
            self.num_cells = self.obs.num_rows
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "H5adFile":
        """Return the file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; what was taken from it cannot be read any more."""
        self.handle.close()

    @_names_damage
    def matrix_names(self) -> list[str]:
        """List the matrices: `layers/NAME`, `raw.X`, `X`."""
        layers = self.handle.get("layers")
        names = [f"layers/{name}" for name in layers] if isinstance(layers, h5py.Group) else []
        return [*names, *(["raw.X"] if self._raw("X") else []), *(["X"] if "X" in self.handle else [])]

    @_names_damage
    def matrix(self, name: str) -> Matrix:
        """Return a reader of one of `matrix_names`, or raise listing them."""
        if name not in self.matrix_names():
            there = ", ".join(self.matrix_names()) or "none"
            raise DataError(f"{self.path}: no matrix {name!r}; it has: {there}")
        item = self.handle[self._raw("X") if name == "raw.X" else name]
        where = f"{self.path}: {name}"
        matrix = _open_matrix(where, item)
        num_genes = self._var(name).num_rows
        if matrix.shape != (self.num_cells, num_genes):
            found = f"{matrix.shape[0]} cells x {matrix.shape[1]} genes"
            raise DataError(f"{where} is {found}, but obs and var have {self.num_cells} and {num_genes} rows")
        return matrix

    @_names_damage
    def genes(self, matrix: str, column: str | None = None) -> SourceGenes:
        """Return the gene names that belong to a matrix, read from `column` of var where one is named.

        Without one, Ensembl ids are looked for in the index and in columns of the usual names, then in any
        text column; symbols likewise. Where a column says what each row measures, rows that are no genes are left out.
        """
        var = self._var(matrix)
        kinds = _kinds(var)
        names = _Names(var, kinds)
        if column is not None:
            where, named = f"{var.where}[{column!r}]", names.text(column)
            if looks_like_ensembl(named):
                symbols = names.first(SYMBOL_COLUMNS, is_ensembl=False)
                return SourceGenes(where, _stripped(named), symbols, kinds)
            return SourceGenes(where, None, named, kinds)
        index = names.text(var.index_name)
        others = [name for name in var.columns() if name not in ID_COLUMNS and var.is_text(name)]
        if looks_like_ensembl(index):
            ids, symbols = index, names.first(SYMBOL_COLUMNS, is_ensembl=False)
        else:
            ids = names.first((*ID_COLUMNS, *others), is_ensembl=True)
            symbols = index
            if all(name.isdigit() for name in index):
                symbols = names.first(SYMBOL_COLUMNS, is_ensembl=False) or index
            if ids is None and symbols is index and _are_row_numbers(index):
                raise DataError(
                    f"{var.where}: the genes have no names, only row numbers ({', '.join(index[:3])}, ...); name the "
                    f"column of var that has them with --gene-column (there are: {', '.join(var.columns()) or 'none'})"
                )
        return SourceGenes(var.where, None if ids is None else _stripped(ids), symbols, kinds)

    @_names_damage
    def gene_names(self, matrix: str) -> tuple[str, ...]:
        """Return the index of var as text, for messages."""
        var = self._var(matrix)
        return var.text(var.index_name)

    @_names_damage
    def cell_name(self, row: int) -> str:
        """Return the index of obs at a row, for messages."""
        return self.obs.text(self.obs.index_name, row, row + 1)[0]

    def _var(self, matrix: str) -> "Frame":
        if matrix != "raw.X":
            return Frame(f"{self.path}: var", self.handle["var"], self.handle.get("uns"))
        path = self._raw("var")
        if path is None:
            raise DataError(f"{self.path}: raw.X has no raw.var that names its genes")
        return Frame(f"{self.path}: raw.var", self.handle[path], self.handle.get("uns"))

    def _raw(self, part: str) -> str | None:
        """Return the path of raw's X or var: `raw/X`, in old files `raw.X`."""
        return next((path for path in (f"raw/{part}", f"raw.{part}") if path in self.handle), None)

    def _what_it_is(self, missing: str) -> str:
        matrix = self.handle.get("matrix")
        if isinstance(matrix, h5py.Group) and "barcodes" in matrix:
            return "it is a 10x Genomics matrix; make one with scanpy.read_10x_h5(FILE).write_h5ad(OUT)"
        return f"it has no {missing!r}; its top level holds: {', '.join(self.handle) or 'nothing'}"


class Frame:
    """Read obs or var: a group of columns, or (before anndata 0.7) one compound dataset."""

    def __init__(self, where: str, item: Any, uns: Any) -> None:
        """Take the HDF5 object; `uns` holds the categories of the old encoding."""
        self.where = where
        with reading(where):
            self._open(item, uns)

    def _open(self, item: Any, uns: Any) -> None:
        where = self.where
        self.item = item
        self.uns = uns
        if isinstance(item, h5py.Dataset):
            if item.dtype.names is None or item.ndim != 1:
                raise DataError(f"{where}: not a table")
            self.index_name = item.dtype.names[0]
            self.num_rows = len(item)
            _check_size(where, item)
        elif not isinstance(item, h5py.Group):
            raise DataError(f"{where}: not a table")
        else:
            name = item.attrs.get("_index", "_index")
            self.index_name = name.decode() if isinstance(name, bytes) else str(name)
            if self.index_name not in item:
                raise DataError(f"{where}: it has no index column {self.index_name!r}")
            self.num_rows = _length(where, item[self.index_name])

    @_names_damage
    def columns(self) -> list[str]:
        """List the columns, without the index."""
        if isinstance(self.item, h5py.Dataset):
            return [name for name in self.item.dtype.names if name != self.index_name]
        return [name for name in self.item if name not in (self.index_name, "__categories")]

    def require(self, column: str) -> str:
        """Return the stored name of a column (`index` is the index), or raise listing those there are."""
        if column in self.columns() or column == self.index_name:
            return column
        if column == "index":
            return self.index_name
        raise DataError(
            f"{self.where} has no column {column!r}; it has: {', '.join(self.columns()) or 'none'}"
        )

    @_names_damage
    def is_text(self, column: str) -> bool:
        """Tell whether a column holds text or categories of text."""
        categories = self._categories(column)
        if categories is not None:
            return _is_text_type(categories.dtype)
        return _is_text_type(self._dtype(column))

    @_names_damage
    def text(self, column: str, start: int = 0, stop: int | None = None) -> tuple[str, ...]:
        """Return a column as text, empty where it holds none."""
        column, stop = self.require(column), self.num_rows if stop is None else stop
        if self._categories(column) is None:
            values, mask = self._values(column, start, stop)
            if mask is None and values.dtype.kind in "OS":
                return tuple(_as_names(values, self.where))
        chunk = self.labels(column, start, stop)
        names = np.array([*chunk.names, ""], dtype=object)
        return tuple(names[chunk.codes].tolist())

    @_names_damage
    def kind(self, column: str) -> Literal["class", "number"]:
        """Tell whether a column holds labels (text, categories, booleans) or numbers."""
        column = self.require(column)
        if self._categories(column) is not None or self._dtype(column).kind not in "iuf":
            return "class"
        return "number"

    def is_number(self, column: str) -> bool:
        """Tell whether a column holds numbers; false for an encoding that cannot be read."""
        try:
            return self.kind(column) == "number"
        except DataError:
            return False

    @_names_damage
    def number_type(self, column: str) -> str:
        """Return the type that a number column is kept in: int64, float32 or float64."""
        dtype = self._dtype(self.require(column))
        return "int64" if dtype.kind in "iu" else "float32" if dtype.itemsize <= 4 else "float64"

    @_names_damage
    def numbers(self, column: str, start: int, stop: int) -> np.ndarray:
        """Return the values of a number column in its `number_type`."""
        column = self.require(column)
        values, mask = self._values(column, start, stop)
        dtype = np.dtype(self.number_type(column))
        if mask is not None and mask.any():
            if dtype.kind == "i":
                row = start + int(np.argmax(mask))
                raise DataError(f"{self.where}[{column!r}]: row {row} has no value; drop or fill such rows")
            values = np.where(mask, np.nan, values)
        return values.astype(dtype)

    @_names_damage
    def labels(self, column: str, start: int, stop: int) -> LabelChunk:
        """Return the labels of rows [start, stop); an empty text or a missing value is no label."""
        column = self.require(column)
        values, mask = self._values(column, start, stop)
        categories = self._categories(column)
        if categories is not None:
            names = _as_names(categories[:], f"{self.where}[{column!r}]")
            codes = values.astype(np.int64)
            if len(codes) and codes.max() >= len(names):
                raise DataError(
                    f"{self.where}[{column!r}]: damaged: a code lies outside its {len(names)} categories"
                )
        else:
            codes, names = _encode(values, f"{self.where}[{column!r}]")
        if mask is not None:
            codes = np.where(mask, -1, codes)
        if "" in names:
            codes = np.where(codes == names.index(""), -1, codes)
        return LabelChunk(np.maximum(codes, -1), names)

    def label_chunks(self, column: str) -> Iterator[LabelChunk]:
        """Yield the labels of all rows, a bounded number at a time."""
        for start in range(0, self.num_rows, ROWS_PER_OBS_READ):
            yield self.labels(column, start, min(start + ROWS_PER_OBS_READ, self.num_rows))

    def _item(self, column: str) -> Any:
        return self.item if isinstance(self.item, h5py.Dataset) else self.item[column]

    def _dtype(self, column: str) -> np.dtype:
        item = self._item(column)
        if isinstance(self.item, h5py.Dataset):
            return item.dtype[column]
        if not isinstance(item, h5py.Group):
            return item.dtype
        stored: Any = item.get("values")
        if stored is None:
            raise DataError(f"{self.where}[{column!r}]: a column in an encoding that is not known here")
        return stored.dtype

    def _categories(self, column: str) -> Any:
        """Return the categories' dataset of a categorical column in any of the three encodings."""
        if isinstance(self.item, h5py.Dataset):
            found = self.uns.get(f"{column}_categories") if isinstance(self.uns, h5py.Group) else None
            found = found if isinstance(found, h5py.Dataset) and self._dtype(column).kind in "iu" else None
        elif isinstance(item := self.item[column], h5py.Group):
            found = item.get("categories")
        else:
            reference = item.attrs.get("categories")
            found = item.file[reference] if isinstance(reference, h5py.Reference) else None
        return None if found is None else _as_list(f"{self.where}[{column!r}]: its categories", found)

    def _values(self, column: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return codes or values of rows [start, stop), and which are masked where the encoding says so."""
        item, where = self._item(column), f"{self.where}[{column!r}]"
        is_coded = self._categories(column) is not None
        if isinstance(self.item, h5py.Dataset):
            _check_kind(f"{where}: its values", item.dtype[column])
            return read(self.where, item.fields(column), start, stop), None
        if not isinstance(item, h5py.Group):
            values = self._list(f"{where}: its {'codes' if is_coded else 'values'}", item, is_coded)
            return _read_column(self.where, values, start, stop), None
        if "codes" in item:
            return read(self.where, self._list(f"{where}: its codes", item["codes"], True), start, stop), None
        if "values" in item:
            mask = self._list(f"{where}: its mask", item["mask"], True) if "mask" in item else None
            values = self._list(f"{where}: its values", item["values"], False)
            masked = None if mask is None else read(self.where, mask, start, stop).astype(bool)
            return _read_column(self.where, values, start, stop), masked
        raise DataError(f"{where}: a column in an encoding that is not known here")

    def _list(self, what: str, item: Any, is_whole: bool) -> h5py.Dataset:
        """Return a dataset with an entry for each row, or raise naming what it is of a column."""
        item = _as_list(what, item)
        if len(item) != self.num_rows:
            raise DataError(
                f"{what} are {len(item):,}, but it has {self.num_rows:,} rows; the file is damaged"
            )
        if is_whole and item.dtype.kind not in "iub":
            raise DataError(f"{what} have type {item.dtype}, not whole numbers; the file is damaged")
        return item


def layers_of_counts(file: H5adFile) -> list[str]:
    """Return what users call the layers, other than the preferred ones, that hold counts of more than 1."""
    found = []
    for name in file.matrix_names():
        if name not in PREFERRED_MATRICES:
            try:
                samples = list(file.matrix(name).sample())
            except DataError:  # nobody asked for this one
                continue
            if any((values > 1).any() for values in samples) and judge_values(samples).kind == "counts":
                found.append(name.removeprefix("layers/"))
    return found


def matrix_name(layer: str) -> str:
    """Return the name in `H5adFile.matrix_names` of what users call `raw`, `X`, or by the name of a layer."""
    if layer in ("X", "raw.X") or layer.startswith("layers/"):
        return layer
    return "raw.X" if layer == "raw" else f"layers/{layer}"


def _open_hdf5(path: Path) -> h5py.File:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if path.is_dir():
        raise DataError(f"{path}: a folder, not an h5ad file")
    try:
        if not h5py.is_hdf5(path):
            hint = "; it is compressed: gunzip it first" if _begins(path, b"\x1f\x8b") else ""
            raise DataError(f"{path}: not an HDF5 file, so not an h5ad file{hint}")
        return h5py.File(path, "r", rdcc_nbytes=_CHUNK_CACHE_BYTES)
    except OSError as error:
        what = "the file is truncated" if "truncated" in str(error) else "it cannot be opened"
        raise DataError(f"{path}: {what} ({error})") from error


def _begins(path: Path, bytes_: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(bytes_)) == bytes_


def _check_is_whole(file: h5py.File, where: str) -> None:
    """Refuse a file that takes content from other files, or whose structure is damaged.

    HDF5 opens what a file names, wherever it lies: content of any file would become a matrix, and a copy of the file
    that is written to would write there. Categories of the old encoding may be in no group.
    """
    waiting: list[tuple[str, Any]] = [("/", file["/"])]
    seen = set()
    with reading(where):
        while waiting:
            path, item = waiting.pop()
            if not isinstance(item, h5py.Group | h5py.Dataset) or item.id in seen:
                continue  # a group may be inside of itself
            seen.add(item.id)
            reference = item.attrs.get("categories")
            if isinstance(reference, h5py.Reference) and reference:
                waiting.append((f"{path}, categories", file[reference]))
            if isinstance(item, h5py.Group):
                waiting += _linked(where, item)
            elif item.external or item.is_virtual:
                raise DataError(f"{where}: {path!r} takes its values from other files; {_WRITE_ANEW}")


def _linked(where: str, group: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is in a group under its name; what a link within the file leads to is met where it lies."""
    for name in map(str, group):
        link: Any = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise DataError(f"{where}: {name!r} lies in another file ({link.filename}); {_WRITE_ANEW}")
        if not isinstance(link, h5py.SoftLink):
            yield name, group[name]


def _open_matrix(where: str, item: Any) -> Matrix:
    if isinstance(item, h5py.Dataset):
        return DenseMatrix(where, item)
    layout = item.attrs.get("encoding-type", item.attrs.get("h5sparse_format", ""))
    layout = layout.decode() if isinstance(layout, bytes) else str(layout)
    kinds = {"csr_matrix": CsrMatrix, "csr": CsrMatrix, "csc_matrix": CscMatrix, "csc": CscMatrix}
    if layout not in kinds or not all(part in item for part in ("data", "indices", "indptr")):
        raise DataError(f"{where}: its encoding {layout!r} is not one of dense array, csr_matrix, csc_matrix")
    shape = np.asarray(item.attrs.get("shape", item.attrs.get("h5sparse_shape")))
    parts = [item[part] for part in ("data", "indices", "indptr")]
    if shape.shape != (2,) or shape.dtype.kind not in "iu":
        raise DataError(f"{where}: damaged matrix: its shape is {str(shape)[:80]}")
    are_lists = all(isinstance(part, h5py.Dataset) and part.ndim == 1 for part in parts)
    if not are_lists or not all(part.dtype.kind in "iuf" for part in parts[1:]):
        raise DataError(f"{where}: damaged matrix: data, indices and indptr must be lists of numbers")
    return kinds[layout](where, (int(shape[0]), int(shape[1])), *parts)


def _length(where: str, item: Any) -> int:
    return len(_as_list(f"{where}: its index", item.get("values") if isinstance(item, h5py.Group) else item))


def _as_list(what: str, item: Any) -> h5py.Dataset:
    """Return a dataset if it is a list of text or numbers that the file can hold, or raise."""
    if not isinstance(item, h5py.Dataset) or item.shape is None or item.ndim != 1:
        raise DataError(f"{what} are no list; the file is damaged")
    _check_kind(what, item.dtype)
    _check_size(what, item)
    return item


def _check_kind(what: str, dtype: np.dtype) -> None:
    if dtype.shape or not (_is_text_type(dtype) or dtype.kind in "iufb"):
        raise DataError(f"{what} have type {dtype}, which is neither text nor numbers")


def _check_size(what: str, item: h5py.Dataset) -> None:
    num_bytes = item.file.id.get_filesize()
    limits = _NAMES_PER_BYTE * num_bytes, _NAME_BYTES_PER_BYTE * num_bytes
    if len(item) > limits[0] or len(item) * item.dtype.itemsize > limits[1]:
        raise DataError(
            f"{what}: it says that it has {len(item):,} entries of {item.dtype.itemsize:,} bytes, which cannot be in a "
            f"file of {num_bytes:,} bytes; the file is damaged"
        )


def _is_text_type(dtype: np.dtype) -> bool:
    return dtype.kind == "S" or h5py.check_string_dtype(dtype) is not None


def _read_column(where: str, item: h5py.Dataset, start: int, stop: int) -> np.ndarray:
    return read(where, item.asstr() if _is_text_type(item.dtype) else item, start, stop)


def _encode(values: np.ndarray, where: str) -> tuple[np.ndarray, list[str]]:
    """Return each value's position in the list of distinct names; -1 for NaN."""
    if values.dtype.kind in "OS":
        texts = _as_names(values, where)
        positions = {name: index for index, name in enumerate(dict.fromkeys(texts))}
        return np.fromiter(map(positions.__getitem__, texts), np.int64, len(texts)), list(positions)
    unique, codes = np.unique(values, return_inverse=True)
    names = _as_names(unique, where)
    missing = np.isnan(unique)[codes] if unique.dtype.kind == "f" else np.zeros(len(codes), bool)
    return np.where(missing, -1, codes), names


def _as_names(values: np.ndarray, where: str) -> list[str]:
    """Return distinct values as names; whole floating-point numbers lose their `.0`."""
    if values.dtype.kind == "f":
        finite = values[np.isfinite(values)]
        if (finite != np.floor(finite)).any():
            raise DataError(f"{where}: fractional numbers cannot be labels; keep the column as a number")
        return [str(int(value)) if np.isfinite(value) else "" for value in values]
    if values.dtype.kind in "iub":
        return [str(value) for value in values.tolist()]
    names = values.tolist()
    return [name.decode() if isinstance(name, bytes) else name for name in names]


def _are_row_numbers(names: tuple[str, ...]) -> bool:
    """Tell whether names count from 0 or 1; numbers that do not, as Entrez ids, are names."""
    return any(names == tuple(map(str, range(first, first + len(names)))) for first in (0, 1))


def _stripped(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(strip_version(name) for name in names)


def _kinds(var: Frame) -> tuple[str, ...] | None:
    """Return what each row of var measures, None where all are genes or no column says so."""
    for column in KIND_COLUMNS:
        if column not in var.columns() or not var.is_text(column):
            continue
        kinds = var.text(column)
        are_genes = [is_gene_kind(kind) for kind in kinds]
        if any(are_genes):
            return None if all(are_genes) else kinds
        if column == KIND_COLUMNS[0] and any(kinds):
            raise DataError(
                f"{var.where}[{column!r}]: no row is 'Gene Expression': {kinds_counted(kinds)}; give a file that holds "
                "the expression of genes, or, where these are genes, drop the column or write 'Gene Expression' in it"
            )
    return None


class _Names:
    """Read text columns of var, of the rows that are genes."""

    def __init__(self, var: Frame, kinds: tuple[str, ...] | None) -> None:
        self._var = var
        self._is_gene = None if kinds is None else [is_gene_kind(kind) for kind in kinds]

    def text(self, column: str) -> tuple[str, ...]:
        """Return a column."""
        names = self._var.text(column)
        return names if self._is_gene is None else tuple(compress(names, self._is_gene))

    def first(self, columns: tuple[str, ...], *, is_ensembl: bool) -> tuple[str, ...] | None:
        """Return the first of the columns that is there, is text, and holds (or does not hold) Ensembl ids."""
        for name in columns:
            if name in self._var.columns() and self._var.is_text(name):
                names = self.text(name)
                if looks_like_ensembl(names) == is_ensembl:
                    return names
        return None
