"""What a corpus says of itself: manifest, obs columns, Arrow schema and Hugging Face features (format 1)."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from data.errors import DataError

FORMAT = 1
COUNT_DTYPES = ("uint16", "uint32", "float32")
LABEL_COLUMNS = ("technical_batch", "target_gene", "cell_type")
_DTYPES = ("int64", "float32", "float64")
RESERVED_COLUMNS = ("genes", "counts", "source", "total", "n_genes")
UNLABELLED = "unlabelled"
"""Class of the cells that have no label in a column that was asked for."""

_SHA256 = re.compile("[0-9a-f]{64}")
_SURROGATE = re.compile("[\ud800-\udfff]")

Storage = Literal["arrow", "parquet"]


@dataclass(frozen=True)
class ObsColumn:
    """Describe one kept obs column: class labels with their names, or a number."""

    kind: Literal["class", "number"]
    names: tuple[str, ...] = ()
    """Class names; the stored value is the position in them."""
    dtype: str = "int64"
    """Stored type: int64 for classes; int64, float32 or float64 for numbers."""

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest's entry."""
        if self.kind == "class":
            return {"kind": "class", "names": list(self.names)}
        return {"kind": "number", "dtype": self.dtype}


@dataclass(frozen=True)
class Shard:
    """Name one data file of the corpus."""

    file: str
    rows: int
    sha256: str
    bytes: int


@dataclass(frozen=True)
class SourceRecord:
    """Say what one source file was and what the conversion took from it."""

    path_name: str
    """File name without its folder."""
    sha256: str
    bytes: int
    rows: int
    """Cells of this source in the corpus."""
    matrix: str
    """Which matrix was read: `X`, `raw.X` or `layers/NAME`."""
    genes_total: int
    genes_matched: int
    counts_dropped_fraction: float
    """Share of the summed values that lay on genes outside the gene space."""
    cells_dropped: int
    measured_genes: tuple[tuple[int, int], ...]
    """Gene indices that the source measured, as ranges [start, stop)."""

    def measured_mask(self, num_genes: int) -> np.ndarray:
        """Return a bool array [num_genes] that is true where the source measured the gene."""
        mask = np.zeros(num_genes, dtype=bool)
        for start, stop in self.measured_genes:
            mask[start:stop] = True
        return mask


@dataclass(frozen=True)
class Manifest:
    """Describe a whole corpus: the content of `manifest.json`."""

    value_kind: Literal["counts", "lognorm"]
    count_dtype: str
    num_cells: int
    n_nonzero: int
    storage: Storage
    gene_sha256: str
    shards: tuple[Shard, ...]
    sources: tuple[SourceRecord, ...]
    technical_batches: tuple[str, ...]
    control_label: str | None
    columns: dict[str, ObsColumn]
    conversion_sha256: str | None = None
    """Identifies inputs and arguments of the conversion, so that it can be recognised when run again."""
    origin: dict[str, Any] | None = None
    """Where the cells come from, where that is not a file: release, URI and filters of the Census."""

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        content = {"format": FORMAT, **asdict(self)}
        content["columns"] = {name: column.to_dict() for name, column in self.columns.items()}
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Manifest":
        """Read what `to_json` wrote; `where` names the file in messages."""
        try:
            content = json.loads(text)
            version = content.pop("format")
            if version != FORMAT:
                raise DataError(
                    f"{where}: corpus format {version!r} is not {FORMAT}; convert the files again"
                )
            content["shards"] = tuple(Shard(**shard) for shard in content["shards"])
            sources = content["sources"]
            for source in sources:
                source["measured_genes"] = tuple((start, stop) for start, stop in source["measured_genes"])
            content["sources"] = tuple(SourceRecord(**source) for source in sources)
            content["technical_batches"] = tuple(content["technical_batches"])
            content["columns"] = {
                name: ObsColumn(**{**column, "names": tuple(column.get("names", ()))})
                for name, column in content["columns"].items()
            }
            manifest = cls(**content)
            manifest._check()
        except DataError:
            raise
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: not a corpus manifest ({error!r})") from error
        num_rows = sum(shard.rows for shard in manifest.shards)
        if type(manifest.num_cells) is not int or manifest.num_cells != num_rows:
            raise DataError(f"{where}: its shards do not add up to num_cells {manifest.num_cells}")
        return manifest

    def _check(self) -> None:
        """Raise ValueError where a value is none that a conversion writes.

        A manifest may come from anywhere: a shard that it names lies in its own folder, and is counted once.
        """
        files = [shard.file for shard in self.shards]
        counts = [count for shard in self.shards for count in (shard.rows, shard.bytes)]
        ranges = [bound for source in self.sources for pair in source.measured_genes for bound in pair]
        texts = [
            *self.technical_batches,
            *(name for column in self.columns.values() for name in column.names),
        ]
        texts += [self.control_label] if self.control_label is not None else []
        texts += [
            *self.columns,
            *(text for source in self.sources for text in (source.path_name, source.matrix)),
        ]
        hashes = [self.gene_sha256, *(shard.sha256 for shard in self.shards)]
        hashes += [
            each
            for each in (self.conversion_sha256, *(s.sha256 for s in self.sources))
            if each not in (None, "")
        ]
        problems = {
            "value_kind": self.value_kind not in ("counts", "lognorm"),
            "count_dtype": self.count_dtype not in COUNT_DTYPES,
            "storage": self.storage not in ("arrow", "parquet"),
            "a shard's file": not all(_is_name(f) and f and PurePath(f).name == f for f in files)
            or len(set(files)) < len(files),
            "rows and bytes": not all(type(count) is int and count >= 0 for count in counts),
            "measured_genes": not all(type(bound) is int and bound >= 0 for bound in ranges),
            "a name": not all(map(_is_name, texts)),
            "sha256": not all(isinstance(each, str) and _SHA256.fullmatch(each) for each in hashes),
            "columns": any(
                name in RESERVED_COLUMNS
                or column.kind not in ("class", "number")
                or column.dtype not in _DTYPES
                for name, column in self.columns.items()
            ),
        }
        wrong = [what for what, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: what it says is nothing that a conversion writes")


def _is_name(value: Any) -> bool:
    """Tell whether a value is text that can be written in UTF-8."""
    return isinstance(value, str) and _SURROGATE.search(value) is None


def corpus_features(count_dtype: str, columns: Mapping[str, ObsColumn]) -> dict[str, Any]:
    """Return the columns as Hugging Face `datasets` describes features in JSON."""

    def value(dtype: str) -> dict[str, Any]:
        return {"dtype": dtype, "_type": "Value"}

    features: dict[str, Any] = {
        "genes": {"feature": value("int32"), "_type": "List"},
        "counts": {"feature": value(count_dtype), "_type": "List"},
    }
    for name, column in columns.items():
        is_class = column.kind == "class"
        features[name] = (
            {"names": list(column.names), "_type": "ClassLabel"} if is_class else value(column.dtype)
        )
    return {**features, "source": value("int16"), "total": value("float32"), "n_genes": value("int32")}


def corpus_schema(count_dtype: str, columns: Mapping[str, ObsColumn]) -> pa.Schema:
    """Return the Arrow schema of a shard, with the metadata that Hugging Face `datasets` reads."""
    if count_dtype not in COUNT_DTYPES:
        raise DataError(f"count type {count_dtype!r} is not one of {', '.join(COUNT_DTYPES)}")
    reserved = [name for name in columns if name in RESERVED_COLUMNS]
    if reserved:
        raise DataError(
            f"an obs column cannot be named {', '.join(reserved)}: the corpus uses that name itself"
        )
    fields = [
        pa.field("genes", pa.list_(pa.int32())),
        pa.field("counts", pa.list_(pa.from_numpy_dtype(np.dtype(count_dtype)))),
        *(pa.field(name, pa.from_numpy_dtype(np.dtype(each.dtype))) for name, each in columns.items()),
        pa.field("source", pa.int16()),
        pa.field("total", pa.float32()),
        pa.field("n_genes", pa.int32()),
    ]
    metadata = {"info": {"features": corpus_features(count_dtype, columns)}}
    return pa.schema(fields, metadata={"huggingface": json.dumps(metadata)})


def index_ranges(indices: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return sorted unique indices as ranges [start, stop)."""
    if not len(indices):
        return ()
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    starts = indices[np.concatenate([[0], breaks])]
    stops = indices[np.concatenate([breaks - 1, [len(indices) - 1]])] + 1
    return tuple((int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))


def count_classes(names: set[str], num_unlabelled: int, column: str) -> str:
    """Say how many classes a column of labels gives, and for how many cells it has no label."""
    count = len(names - {UNLABELLED}) if num_unlabelled else len(names)
    others = (
        f", and {UNLABELLED!r} for the {num_unlabelled:,} cells without a label" if num_unlabelled else ""
    )
    return f"{count} class{'es' if count != 1 else ''} from obs column {column}{others}"
