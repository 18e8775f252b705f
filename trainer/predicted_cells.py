"""An h5ad file of cells that is written block by block, and is there when it is whole or not at all."""

import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from numpy.typing import NDArray

from data.predicted_values import PredictedRows, ValueDecoder
from data.prediction_sets import PerturbedCorpus, PredictionSets
from trainer.atomicfile import sync_folder
from trainer.errors import UserError
from trainer.prediction import Block

UNS_KEY = "cellphase"
_CELLS_AT_ONCE = 1024
_VALUES_PER_CHUNK = 1 << 18


class PredictedCells:
    """Write cells as CSR rows of one matrix, over genes in a fixed order; memory stays that of a block.

    Use it as a context manager and call `finish`: without it, or when anything is raised, nothing is left.
    """

    def __init__(self, path: str | Path, var: pd.DataFrame, *, overwrite: bool = False) -> None:
        """Take the file to write and its genes.

        Raises:
            UserError: the file exists, or its folder cannot be written to.
        """
        self.path = Path(os.path.abspath(path))
        check_free(self.path, overwrite)
        self._var = var
        self._codes: dict[str, list[NDArray[np.int32]]] = {}
        self._names: dict[str, dict[str, int]] = {}
        self._lengths: list[NDArray[np.int64]] = []
        self.num_cells = self.num_values = 0
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = h5py.File(self._temporary, "x")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self._matrix = self._file.create_group("X")
        options: Any = {"maxshape": (None,), "chunks": (_VALUES_PER_CHUNK,), "compression": "gzip"}
        options |= {"compression_opts": 1, "shuffle": True}
        self._data = self._matrix.create_dataset("data", (0,), np.float32, **options)
        self._indices = self._matrix.create_dataset("indices", (0,), np.int32, **options)

    def __enter__(self) -> "PredictedCells":
        """Return the open file."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file, and remove it where it was not finished."""
        if self._file:
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, rows: PredictedRows, labels: Mapping[str, NDArray[np.str_]]) -> None:
        """Append cells with their obs columns, the same ones in every call."""
        start, stop = self.num_values, self.num_values + len(rows.values)
        for dataset, part in ((self._data, rows.values), (self._indices, rows.columns)):
            dataset.resize((stop,))
            dataset[start:stop] = part
        self._lengths.append(np.diff(rows.offsets))
        for column, values in labels.items():
            known = self._names.setdefault(column, {})
            names, place = np.unique(values, return_inverse=True)
            codes = np.array([known.setdefault(str(name), len(known)) for name in names], np.int32)
            self._codes.setdefault(column, []).append(codes[place])
        self.num_values, self.num_cells = stop, self.num_cells + len(rows.offsets) - 1

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write everything else and give the file its name; `about` becomes the JSON text `uns["cellphase"]`."""
        obs = pd.DataFrame(
            {column: self._categorical(column) for column in self._codes},
            index=pd.Index([f"cell_{number}" for number in range(self.num_cells)]),
        )
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int64)
        self._matrix["indptr"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        self._matrix.attrs["shape"] = np.array([self.num_cells, len(self._var)])
        self._file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name, content in (
            ("obs", obs),
            ("var", self._var),
            ("uns", {UNS_KEY: json.dumps(dict(about))}),
            *((empty, {}) for empty in ("layers", "obsm", "obsp", "varm", "varp")),
        ):
            write_elem(self._file, name, content)
        self._file.close()
        with open(self._temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)

    def _categorical(self, column: str) -> pd.Categorical:
        """Return an obs column, its categories in an order that blocks do not decide."""
        names = np.array(list(self._names[column]))
        order = np.argsort(names)
        place = np.empty(len(names), np.int64)
        place[order] = np.arange(len(names))
        return pd.Categorical.from_codes(place[np.concatenate(self._codes[column])], names[order].tolist())


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse an output that exists.

    Raises:
        UserError: it does, and may not be replaced, or it is a folder.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; name another file, or give --overwrite to replace it")


def gene_table(corpus: PerturbedCorpus) -> pd.DataFrame:
    """Return var: genes by the kind of name that targets are called by, with `gene_id` where that is not the id.

    The programs that score leave a target's own gene out by its name.
    """
    space, targets = corpus.columns.space, corpus.targets.names
    if space.key == "symbol":
        return pd.DataFrame(index=pd.Index(space.ids))
    known, ids = {symbol for symbol in space.symbols if symbol}, set(space.ids)
    are_ids = sum(name in ids for name in targets) > sum(name in known for name in targets)
    shared = space.ambiguous_symbols
    names = [
        gene if are_ids or symbol is None or symbol in shared else symbol
        for gene, symbol in zip(space.ids, space.symbols, strict=True)
    ]
    return pd.DataFrame({"gene_id": list(space.ids)}, index=pd.Index(names))


def write_predicted_cells(
    path: str | Path,
    sets: PredictionSets,
    decoder: ValueDecoder,
    blocks: Iterable[Block],
    about: Mapping[str, Any],
    *,
    has_controls: bool = True,
    has_context: bool = False,
    overwrite: bool = False,
    on_cells: Callable[[int], None] | None = None,
) -> tuple[PredictedCells, int]:
    """Write predicted cells as they come, then real controls of their contexts, on rank 0.

    Args:
        path: the file.
        sets: what is predicted.
        decoder: what the values are.
        blocks: of `trainer.prediction.predicted_blocks`.
        about: added to what `uns["cellphase"]` says.
        has_controls: append the controls.
        has_context: repeat the cell type as obs column `context`.
        overwrite: replace a file.
        on_cells: told how many cells have been written, after each block.

    Returns:
        What was written, and how many cells had more counts than are allowed.
    """
    corpus, requests = sets.corpus, sets.requests
    of_cells, batches = sets.requests_of_cells(), sets.technical_batches_of_cells()
    targets = np.array([request.target for request in requests])
    cell_types = np.array([request.cell_type for request in requests], np.int64)
    num_capped = 0
    with PredictedCells(path, gene_table(corpus), overwrite=overwrite) as cells:
        for block in blocks:
            part = slice(block.first, block.first + len(block.rows.offsets) - 1)
            own = of_cells[part]
            labels = _labels(corpus, targets[own], cell_types[own], batches[part], has_context)
            cells.add(block.rows, labels)
            num_capped += block.rows.num_capped
            if on_cells is not None:
                on_cells(cells.num_cells)
        if has_controls:
            _add_corpus_cells(cells, corpus, corpus.control_rows(cell_types), decoder, has_context)
        cells.finish({**_about(corpus, decoder), "part": "predicted", **about})
    return cells, num_capped


def write_corpus_cells(
    path: str | Path,
    corpus: PerturbedCorpus,
    rows: NDArray[np.int64],
    decoder: ValueDecoder,
    about: Mapping[str, Any],
    *,
    control_types: Iterable[int] | None = None,
    has_context: bool = False,
    overwrite: bool = False,
) -> PredictedCells:
    """Write real cells of a corpus in the genes and values of predicted ones, then controls of some cell types.

    Args:
        path: the file.
        corpus: where the cells are.
        rows: of the perturbed ones.
        decoder: what the values are.
        about: added to what `uns["cellphase"]` says.
        control_types: cell types whose controls are appended; None: all.
        has_context: repeat the cell type as obs column `context`.
        overwrite: replace a file.
    """
    with PredictedCells(path, gene_table(corpus), overwrite=overwrite) as cells:
        for part in (rows, corpus.control_rows(control_types)):
            _add_corpus_cells(cells, corpus, part, decoder, has_context)
        cells.finish({**_about(corpus, decoder), "part": "real", **about})
    return cells


def _about(corpus: PerturbedCorpus, decoder: ValueDecoder) -> dict[str, Any]:
    return {
        "kind": decoder.space,
        "target_sum": decoder.target_sum,
        "gene_space": corpus.columns.space.sha256,
        "control_label": corpus.control_label,
    }


def _add_corpus_cells(
    cells: PredictedCells,
    corpus: PerturbedCorpus,
    rows: NDArray[np.int64],
    decoder: ValueDecoder,
    has_context: bool,
) -> None:
    """Append real cells of a corpus, in the genes and values of the predicted ones."""
    for start in range(0, len(rows), _CELLS_AT_ONCE):
        part = rows[start : start + _CELLS_AT_ONCE]
        read = corpus.reader.read(part)
        offsets, columns, stored = corpus.columns.ragged(read)
        values = stored.astype(np.float32)
        if decoder.target_sum is not None:
            totals = read.columns["total"].astype(np.float64)
            scale = decoder.target_sum / np.where(totals > 0, totals, 1)
            values = np.log1p(values * np.repeat(scale, np.diff(offsets))).astype(np.float32)
        found = corpus.labels
        targets = np.array(corpus.targets.names)[found.perturbation[part]]
        labels = _labels(corpus, targets, found.cell_type[part], found.technical_batch[part], has_context)
        cells.add(PredictedRows(offsets, columns, values), labels)


def _labels(
    corpus: PerturbedCorpus,
    targets: NDArray[np.str_],
    cell_types: NDArray[np.integer],
    technical_batches: NDArray[np.integer],
    has_context: bool,
) -> dict[str, NDArray[np.str_]]:
    """Return the obs columns of cells: those that the corpus knows."""
    labels = {"target_gene": np.asarray(targets)}
    names = np.array(corpus.cell_types)[cell_types]
    if corpus.has_cell_types:
        labels["cell_type"] = names
    if corpus.has_technical_batches:
        labels["batch"] = np.array(corpus.technical_batches)[technical_batches]
    if has_context:
        labels["context"] = names
    return labels
