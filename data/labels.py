"""Labels of cells from a kept obs column: classes by name or numbers, and the split that keeps every class in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from data.corpus import CorpusInfo
from data.errors import DataError, listed
from data.hashing import Stream, stateless_hash
from data.manifest import UNLABELLED
from data.masking import IGNORED_LABEL
from data.order import choose_rows
from data.readers import number_pieces, open_columns

LabelTask = Literal["classification", "regression"]


@dataclass(frozen=True)
class LabelColumn:
    """Turn the stored values of one obs column into labels."""

    column: str
    task: LabelTask
    names: tuple[str, ...]
    """Class names in the order of their index; empty in regression."""
    stored: NDArray[Any] | None
    """What is stored of each class, ascending; None in regression."""
    index: NDArray[np.int64] | None
    """Class index of each stored value, -100 for the class of the cells without a label."""
    further: tuple[str, ...] = ()
    """In regression, the columns of the further numbers of each cell."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Name all columns that are read."""
        return (self.column, *self.further)

    def read(self, columns: Mapping[str, Any]) -> NDArray[Any]:
        """Return the labels of cells from their stored columns: [B], or [B, columns] where there are several."""
        found = [self.of(columns[name]) for name in self.columns]
        return np.stack(found, axis=1) if self.further else found[0]

    def of(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the labels of stored values: int64 class index, -100 where there is none, or float32 (NaN)."""
        if self.stored is None or self.index is None:
            return values.astype(np.float32)
        place = np.minimum(np.searchsorted(self.stored, values), len(self.stored) - 1)
        return np.where(self.stored[place] == values, self.index[place], IGNORED_LABEL)


def open_labels(
    info: CorpusInfo,
    column: str | Sequence[str],
    task: LabelTask = "classification",
    where: str = "label",
) -> LabelColumn:
    """Find out the classes of a column, or that it holds numbers; several columns are the numbers of a regression.

    Classes are the names of a class column without `unlabelled`, in alphabetical order, or the whole numbers of a
    column of numbers, in ascending order.

    Raises:
        DataError: there is no such column, or it does not hold what the task needs.
    """
    if not isinstance(column, str):
        if len(column) > 1 and task != "regression":
            raise DataError(
                f"{where}: {len(column)} columns ({', '.join(column)}) were given, but cells have one class; several "
                "columns are numbers for label_task: regression"
            )
        first, *further = [open_labels(info, name, task, where) for name in column]
        return replace(first, further=tuple(each.column for each in further))
    found = info.columns.get(column)
    if found is None:
        raise DataError(
            f"{where}: {info.path} has no obs column {column!r}; it has: {', '.join(info.columns) or 'none'}. Columns "
            "are kept by the conversion: name it in obs, or with --obs NAME=COLUMN"
        )
    if task == "regression":
        if found.kind != "number":
            raise DataError(
                f"{where}: obs column {column!r} of {_files(info)} holds classes ({listed(found.names)}), and "
                f"regression needs numbers; set {_task('classification')}, or store the column as numbers"
            )
        return LabelColumn(column, task, (), None, None)
    if found.kind == "class":
        names = tuple(name for name in found.names if name != UNLABELLED)
        positions = {name: index for index, name in enumerate(names)}
        stored = np.arange(len(found.names))
        index = np.array([positions.get(name, IGNORED_LABEL) for name in found.names], np.int64)
    else:
        stored = _distinct(info, column, where)
        names = tuple(str(int(value)) for value in stored)
        index = np.arange(len(stored))
    if len(names) < 2:
        raise DataError(
            f"{where}: obs column {column!r} of {_files(info)} has {len(names)} class{'' if len(names) == 1 else 'es'} "
            f"({listed(names) or 'no cell has a label'}); two at least are needed"
        )
    return LabelColumn(column, task, names, stored, index)


def read_labels(info: CorpusInfo, labels: LabelColumn) -> NDArray[Any]:
    """Return the label of every cell of the corpus [num_cells]: int32 for classes, float32 in regression."""
    result = np.empty(info.num_cells, np.float32 if labels.task == "regression" else np.int32)
    for rows, columns in number_pieces(info, [labels.column]):
        result[rows] = labels.of(columns[labels.column])
    return result


def describe_labels(info: CorpusInfo, labels: LabelColumn, training: NDArray[np.bool_] | None) -> str:
    """Say how many training cells there are of each class, and how many have no label, which teach nothing."""
    counts, num_without = np.zeros(len(labels.names), np.int64), 0
    for rows, columns in number_pieces(info, labels.columns):
        found = labels.read(columns) if training is None else labels.read(columns)[training[rows]]
        if labels.task == "regression":
            num_without += int(np.isnan(found.reshape(len(found), -1)).any(axis=1).sum())
        else:
            counts += np.bincount(found[found >= 0], minlength=len(counts))
            num_without += int((found < 0).sum())
    what = "numbers"
    if labels.task == "classification":
        each = [f"{name} {count:,}" for name, count in zip(labels.names, counts.tolist(), strict=True)]
        what = f"{len(each):,} classes ({listed(each)})"
    without = f"; {num_without:,} cells have no label and teach nothing" if num_without else ""
    return f"label {', '.join(labels.columns)} of the training cells: {what}{without}"


def read_obs(info: CorpusInfo, names: Sequence[str], rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return kept obs columns of some rows by name: labels as text, numbers as they are stored."""
    missing = [name for name in names if name not in info.columns]
    if missing:
        raise DataError(
            f"{info.path}: no obs column {', '.join(missing)} was kept; it has: {', '.join(info.columns) or 'none'}"
        )
    if not names:
        return {}
    stored = cast(
        Mapping[str, NDArray[Any]], open_columns(info, list(names)).gather(np.asarray(rows, np.int64))
    )
    columns = {}
    for name in names:
        kept = info.columns[name]
        columns[name] = np.array(kept.names, str)[stored[name]] if kept.kind == "class" else stored[name]
    return columns


def stratified_masks(
    codes: NDArray[np.int32],
    names: Sequence[str],
    val_fraction: float,
    split_seed: int,
    limit_cells: int | None,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None, list[str]]:
    """Split cells so that every class has its share in both parts.

    Of a class of n cells round(n * val_fraction) are for validation, at least one where n is two or more, and never
    all of them; a class of one cell stays in training. Cells without a label (-100) are split like a class.

    Returns:
        The masks of training and validation (None where nothing is held out), and notices.
    """
    num_rows = len(codes)
    takes_part = np.ones(num_rows, np.bool_)
    if limit_cells is not None and limit_cells < num_rows:
        takes_part = choose_rows(num_rows, limit_cells, split_seed, Stream.SUBSET)
    validation = np.zeros(num_rows, np.bool_)
    if val_fraction == 0:
        return takes_part, None, []
    single = []
    for code in np.unique(codes[takes_part]).tolist():
        rows = np.flatnonzero(takes_part & (codes == code))
        if len(rows) == 1:
            single.append("cells without a label" if code < 0 else names[code])
            continue
        count = min(max(round(len(rows) * val_fraction), 1), len(rows) - 1)
        hashes = stateless_hash(split_seed, Stream.SPLIT, index=rows)
        validation[rows[np.argsort(hashes)[:count]]] = True
    notices = []
    if single:
        notices.append(
            f"{len(single)} class{'es' if len(single) > 1 else ''} of one cell cannot be split and "
            f"stay{'' if len(single) > 1 else 's'} in training: {listed(single)}"
        )
    return takes_part & ~validation, validation if validation.any() else None, notices


def _files(info: CorpusInfo) -> str:
    """Name the files that a corpus was made of, which users know, and the corpus."""
    return f"{listed([source.path_name for source in info.manifest.sources], 3)} (corpus {info.path})"


def _task(task: LabelTask) -> str:
    """Say how a configuration of either kind sets what is learned."""
    return f"label_task: {task} (finetune.head.task in a single-cell configuration)"


def _distinct(info: CorpusInfo, column: str, where: str) -> NDArray[Any]:
    """Return the distinct values of a column of whole numbers; NaN stands for no label."""
    found: NDArray[Any] = np.empty(0)
    for _, columns in number_pieces(info, [column]):
        values = columns[column][np.isfinite(columns[column])]
        if (values != np.floor(values)).any():
            instead = f"set {_task('regression')}, or take" if where == "label" else "take"
            raise DataError(
                f"{where}: obs column {column!r} of {_files(info)} holds fractional numbers such as "
                f"{values[values != np.floor(values)][0]}, which are no classes; {instead} another "
                "column"
            )
        found = np.union1d(found, values)
    return found
