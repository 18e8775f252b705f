"""Cells as dense rows over a fixed list of genes, which is the same in every phase and for every corpus."""

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data.corpus import CorpusInfo
from data.errors import DataError
from data.genes import GeneSpace, read_gene_list
from data.ragged import offsets_of, row_numbers
from data.readers import RaggedBatch

Unmeasured = Literal["zero", "hide"]
HIDDEN = -1
"""Token of a gene that the cell's file did not measure, with `hide`."""
_NAMES_SHOWN = 8


class GeneColumns:
    """Lay cells out over columns: all genes of a corpus in its order, or those of a list in the list's order."""

    def __init__(
        self, info: CorpusInfo, genes: str | GeneSpace | None = None, unmeasured: Unmeasured = "zero"
    ) -> None:
        """Say which genes are columns.

        Args:
            info: the corpus.
            genes: genes, or the file of a list (see `data.genes.read_gene_list`); None for all genes of the corpus.
            unmeasured: what a gene that the cell's file did not measure is.

        Raises:
            DataError: the corpus lacks a gene of the list; leaving it out would shift the columns behind it.
        """
        if unmeasured not in get_args(Unmeasured):
            raise DataError(f"unmeasured is {unmeasured!r}; it must be {' | '.join(get_args(Unmeasured))}")
        space = info.gene_space
        self.space = space if genes is None else _listed_space(space, genes, info.path)
        columns = space.indices(self.space.ids)
        self._column = np.full(len(space), -1, np.int64)
        self._column[columns] = np.arange(len(self.space))
        measured = np.stack([each.measured_mask(len(space))[columns] for each in info.manifest.sources])
        done = "read as 0" if unmeasured == "zero" else f"are hidden (token {HIDDEN})"
        self.notices = [
            f"{source.path_name} did not measure {int((~mask).sum())} of the {len(self.space)} genes, which {done}"
            for source, mask in zip(info.manifest.sources, measured, strict=True)
            if not mask.all()
        ]
        self._measured = measured if unmeasured == "hide" and not measured.all() else None
        self.reader_columns = ["total"] if self._measured is None else ["total", "source"]
        """What a reader of the cells has to give beside genes and counts."""
        self._is_whole = self.space.sha256 == space.sha256

    def __len__(self) -> int:
        """Count the columns."""
        return len(self.space)

    def is_measured(self, cells: RaggedBatch) -> NDArray[np.bool_] | None:
        """Return [cells, columns], false where a gene is to be hidden; None where none is."""
        return None if self._measured is None else self._measured[cells.columns["source"]]

    def ragged(self, cells: RaggedBatch) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[Any]]:
        """Return the cells' values by columns, which ascend in each cell: offsets [cells + 1], columns, values."""
        if self._is_whole:
            return cells.offsets, cells.genes, cells.counts
        column = self._column[cells.genes]
        kept = np.flatnonzero(column >= 0)
        row = row_numbers(cells.offsets)[kept]
        order = np.argsort(row * len(self) + column[kept])
        lengths = np.bincount(row, minlength=len(cells))
        return offsets_of(lengths), column[kept][order].astype(np.int32), cells.counts[kept][order]

    def sums(self, cells: RaggedBatch) -> NDArray[np.float64]:
        """Return the sum [cells] of each cell's stored values over the columns."""
        kept = slice(None) if self._is_whole else self._column[cells.genes] >= 0
        row = row_numbers(cells.offsets)[kept]
        weights = cells.counts[kept].astype(np.float64)
        return np.bincount(row, weights=weights, minlength=len(cells)).astype(np.float64)

    def dense(self, cells: RaggedBatch, values: NDArray[Any], fill: Any, dtype: Any) -> NDArray[Any]:
        """Lay the values [nnz] of the cells' genes out as [cells, columns], `fill` where there is none."""
        table = np.full((len(cells), len(self)), fill, dtype)
        column = cells.genes if self._is_whole else self._column[cells.genes]
        place = row_numbers(cells.offsets) * len(self) + column
        if not self._is_whole:
            kept = column >= 0
            place, values = place[kept], values[kept]
        table.reshape(-1)[place] = values
        return table


def _listed_space(space: GeneSpace, genes: str | GeneSpace, path: str) -> GeneSpace:
    """Return the genes of a list as the corpus names them, in the list's order."""
    wanted = genes if isinstance(genes, GeneSpace) else read_gene_list(genes)
    listed = "the model" if isinstance(genes, GeneSpace) else genes
    index = space.indices(wanted.ids, by="ensembl_id" if wanted.key == "ensembl_id" else "symbol")
    missing = [name for name, found in zip(wanted.ids, index.tolist(), strict=True) if found < 0]
    if missing:
        shown = ", ".join(missing[:_NAMES_SHOWN]) + (", ..." if len(missing) > _NAMES_SHOWN else "")
        raise DataError(
            f"{path}: the corpus lacks {len(missing)} of the {len(wanted)} genes of {listed}: {shown}; convert the "
            "files with --genes and a list that has them, or take them out of the list"
        )
    ids, symbols = ([names[place] for place in index.tolist()] for names in (space.ids, space.symbols))
    return GeneSpace(tuple(ids), tuple(symbols), space.key)
