"""Cells of an h5ad file as a trained model takes them: genes matched by name, values checked, read by row numbers."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from data.cell_rows import BadValueError, ValueVerdict, judge_values, sum_rows
from data.errors import DataError
from data.exported import ExportedTokenizer
from data.gene_vocabulary import that_would_match
from data.genes import NOT_A_GENE, SourceGenes, match_genes
from data.h5ad import PREFERRED_MATRICES, H5adFile, layers_of_counts, matrix_name
from data.h5ad_matrix import CscMatrix, Matrix, MatrixChunk

DEPTH_COLUMNS = ("n_counts", "total_counts", "nCount_RNA")
"""Obs columns that say how many counts a cell had, where the matrix holds log-normalised values."""
_TARGET_SUM = 1e4
_NAMES_SHOWN = 5

Say = Callable[[str], None]


class H5adCells:
    """Read cells of a file for one model; a context manager, because a matrix by columns needs a temporary file."""

    def __init__(
        self,
        path: str | Path,
        tokenizer: ExportedTokenizer,
        *,
        layer: str = "auto",
        gene_column: str | None = None,
        min_match: float = 0.5,
        say: Say,
    ) -> None:
        """Open the file, choose its matrix and match its genes.

        Args:
            path: the h5ad file.
            tokenizer: the model's.
            layer: `auto` takes the first of `layers['counts']`, `raw.X`, `X` whose values are of the model's kind;
                `X`, `raw.X`, or the name of a layer.
            gene_column: column of var with the genes' names; None looks for it.
            min_match: least share of the file's genes, or of the model's if these are fewer, that must match.
            say: takes lines of the account: which matrix, which genes.

        Raises:
            DataError: there is no fitting matrix, or too few genes are the model's.
        """
        self.tokenizer = tokenizer
        self.file = H5adFile(path)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        try:
            self.matrix_name = _choose_matrix(self.file, layer, tokenizer.value_kind, say)
            genes = self.file.genes(self.matrix_name, gene_column)
            index, key = match_genes(tokenizer.gene_space, genes)
            self.remap = genes.by_column(index)
            self.account = self._check_match(genes, key, min_match)
            for line in (self.account, *genes.notices()):
                say(line)
            self._is_gene = self.remap != NOT_A_GENE
            self._matrix = self._by_rows(self.file.matrix(self.matrix_name))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "H5adCells":
        """Return the open file."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()

    def __len__(self) -> int:
        """Count the cells."""
        return self.file.num_cells

    def close(self) -> None:
        """Close the file and remove what was written for it."""
        self.file.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def batch(self, start: int, stop: int) -> tuple[dict[str, Any], NDArray[np.bool_]]:
        """Return the cells [start, stop) as a batch without masking, and which have none of the model's genes [B]."""
        chunk = self._chunk(start, stop)
        try:
            return self.tokenizer.tokenize_chunk(chunk, self.remap), self._lack_genes(chunk)
        except BadValueError as error:
            row = start + int(np.searchsorted(chunk.offsets, error.position, side="right")) - 1
            raise DataError(
                f"{self.file.path}: {self.matrix_name}: cell {self.file.cell_name(row)!r}: {error.value} "
                f"{error.reason}; the model was trained on {self.tokenizer.value_kind}"
            ) from None

    def expression(self) -> sparse.csr_array:
        """Return all cells over all genes of the file [cells, genes], log-normalised, in memory."""
        chunk = self._chunk(0, len(self))
        values = chunk.values.astype(np.float32)
        if self.tokenizer.value_kind == "counts":
            totals = sum_rows(chunk.offsets, values).astype(np.float32)
            values *= np.repeat(_TARGET_SUM / np.where(totals > 0, totals, 1), np.diff(chunk.offsets))
            np.log1p(values, out=values)
        shape = (len(self), self._matrix.shape[1])
        return sparse.csr_array((values, chunk.columns, chunk.offsets), shape=shape)

    def depth(self) -> tuple[NDArray[np.float64], str]:
        """Return the logarithm of each cell's sequencing depth, and what it was taken from."""
        if self.tokenizer.value_kind == "counts":
            chunk = self._chunk(0, len(self))
            return np.log1p(sum_rows(chunk.offsets, chunk.values).astype(np.float64)), "counts of the cell"
        named = [name for name in DEPTH_COLUMNS if name in self.file.obs.columns()]
        if named and self.file.obs.kind(named[0]) == "number":
            numbers = self.file.obs.numbers(named[0], 0, len(self)).astype(np.float64)
            return np.log1p(numbers), f"obs column {named[0]}"
        chunk = self._chunk(0, len(self))
        expressed = np.add.reduceat(np.append(chunk.values > 0, False), chunk.offsets[:-1], dtype=np.int64)
        expressed[np.diff(chunk.offsets) == 0] = 0
        return np.log1p(expressed.astype(np.float64)), "number of expressed genes"

    def labels(self, column: str) -> NDArray[np.str_]:
        """Return an obs column as text, empty where a cell has none.

        Raises:
            DataError: there is no such column.
        """
        return np.array(self.file.obs.text(self.file.obs.require(column)), dtype=np.str_)

    def _lack_genes(self, chunk: MatrixChunk) -> NDArray[np.bool_]:
        is_gene = (self.remap[chunk.columns] >= 0) & (chunk.values > 0)
        return np.diff(np.append(0, np.cumsum(is_gene))[chunk.offsets]) == 0

    def _chunk(self, start: int, stop: int) -> MatrixChunk:
        """Return rows of the matrix in one piece, without columns that are no genes."""
        parts = list(self._matrix.chunks(start, stop))
        if not self._is_gene.all():
            parts = [part.of_columns(self._is_gene) for part in parts]
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([np.diff(part.offsets) for part in parts] or [np.empty(0, np.int64)])
        return MatrixChunk(
            start,
            np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            np.concatenate([part.columns for part in parts] or [np.empty(0, np.int32)]),
            np.concatenate([part.values for part in parts] or [np.empty(0, np.float32)]),
        )

    def _by_rows(self, matrix: Matrix) -> Matrix:
        if not isinstance(matrix, CscMatrix):
            return matrix
        self._scratch = tempfile.TemporaryDirectory(prefix="cellphase-rows-")
        path = Path(self._scratch.name) / "rows"
        matrix.transpose_to(path)
        return matrix.open_transposed(path)

    def _check_match(self, genes: SourceGenes, key: str, min_match: float) -> str:
        """Return the account of matched genes; refuse too few."""
        where, names, space = genes.where, genes.names(key), self.tokenizer.gene_space
        matched = int((self.remap >= 0).sum())
        lacking = len(space) - len(np.unique(self.remap[self.remap >= 0]))
        account = f"{where}: {matched:,} of {len(names):,} genes are the model's, by {key}"
        if matched == 0:
            raise DataError(
                f"{where}: no gene in common with the model: the file names them like "
                f"{', '.join(names[:3])}, the model like {', '.join(space.ids[:3])}; name the right column of var "
                f"with --gene-column{_organism(genes)}"
            )
        if matched < min_match * min(len(names), len(space)):
            raise DataError(f"{account}, fewer than --min-match {min_match:g} asks for{_organism(genes)}")
        if lacking:
            missing = np.setdiff1d(np.arange(len(space)), self.remap)[:_NAMES_SHOWN]
            shown = ", ".join(space.ids[index] for index in missing)
            account += f"; it lacks {lacking:,} of the model's {len(space):,}, such as {shown}"
        return account


def _organism(genes: SourceGenes) -> str:
    """Say which vocabularies the genes of a file are of, which may not be the model's."""
    found = that_would_match(genes)
    return f"; are its cells of the model's organism? Of the gene vocabularies, {found}" if found else ""


def _choose_matrix(file: H5adFile, layer: str, value_kind: str, say: Say) -> str:
    """Return the name of the matrix whose values are of the model's kind."""
    if layer == "auto":
        candidates = [name for name in PREFERRED_MATRICES if name in file.matrix_names()]
    else:
        candidates = [matrix_name(layer)]
    verdicts: dict[str, ValueVerdict] = {}
    for name in candidates:
        verdicts[name] = judge_values(file.matrix(name).sample())
        if verdicts[name].kind == value_kind:
            say(f"{file.name}: {name} ({verdicts[name].reason}): {value_kind}, as the model was trained on")
            return name
    found = "; ".join(f"{name}: {verdict.reason}" for name, verdict in verdicts.items()) or "none"
    there = ", ".join(file.matrix_names()) or "none"
    others = layers_of_counts(file) if layer == "auto" and value_kind == "counts" else []
    hint = f"; counts are in {', '.join(others)}: --layer {others[0]}" if others else ""
    raise DataError(
        f"{file.path}: no matrix of {value_kind}, which the model was trained on ({found}); name another with "
        f"--layer (there are: {there}){hint}"
    )
