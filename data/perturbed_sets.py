"""Which cells make a set: the groups of a corpus's perturbed cells, and what each set of an epoch draws from them."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.control_cells import ControlCells
from data.corpus import CorpusInfo
from data.errors import DataError
from data.hashing import DrawKey, Stream
from data.permutation import permuted
from data.perturbation_split import CellGroups
from data.perturbation_targets import PerturbationTargets
from data.ragged import offsets_of
from data.readers import number_pieces


class CellLabels(NamedTuple):
    """Hold the labels of every cell of a corpus, [num_cells] each; 0 where the corpus has no such column."""

    perturbation: NDArray[np.int32]
    cell_type: NDArray[np.int32]
    technical_batch: NDArray[np.int32]
    source: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class PerturbedSets:
    """Number the sets of an epoch, and say which cells each has.

    Cells of one perturbation and context are a group. A group of n cells has ceil(n / S) sets. In every epoch its cells
    are put into a seeded order; its sets take S of them one after the other, and the last set, where cells run out,
    goes on with the first of the same order. So the cells of a group are used equally often in an epoch, up to one
    time, and a set repeats a cell only where its group has fewer than S.
    """

    rows: NDArray[np.int64]  # [cells], corpus rows, group after group
    pairs: NDArray[np.int64]  # [cells], pair of cell type and technical batch (see ControlCells)
    starts: NDArray[np.int64]  # [groups], first cell of each group
    sizes: NDArray[np.int64]  # [groups], cells
    perturbation: NDArray[np.int64]  # [groups]
    set_starts: NDArray[np.int64]  # [groups + 1], first set of each group
    set_size: int

    def __len__(self) -> int:
        """Count the sets of an epoch."""
        return int(self.set_starts[-1])

    def draw(self, sets: NDArray[np.int64], draw: DrawKey) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the group [B] of each set, and the places [B, S] of its cells in `rows` and `pairs`."""
        group = np.searchsorted(self.set_starts, sets, "right") - 1
        first = (sets - self.set_starts[group]) * self.set_size
        sizes = np.broadcast_to(self.sizes[group][:, None], (len(sets), self.set_size))
        states = np.broadcast_to(draw.cell_hashes(Stream.SET_CELLS, group)[:, None], sizes.shape)
        place = permuted(states, sizes, (first[:, None] + np.arange(self.set_size)) % sizes)
        return group, self.starts[group][:, None] + place

    def digest(self) -> str:
        """Identify the sets and the cells that they draw from."""
        content = hashlib.sha256()
        for array in (self.rows, self.pairs, self.starts, self.perturbation):
            content.update(array.tobytes())
        return content.hexdigest()


def read_cell_labels(info: CorpusInfo) -> CellLabels:
    """Read the labels of all cells; 4 bytes a cell and column."""
    if "target_gene" not in info.columns:
        raise DataError(
            f"{info.path}: the corpus has no column target_gene; convert the files with --obs target_gene=COLUMN"
        )
    names = ["target_gene", "cell_type", "technical_batch"]
    present = [name for name in names if name in info.columns]
    for name in present:
        info.class_names(name)
    arrays = {name: np.zeros(info.num_cells, np.int32) for name in [*names, "source"]}
    for rows, columns in number_pieces(info, [*present, "source"]):
        for name, values in columns.items():
            arrays[name][rows] = values
    return CellLabels(*arrays.values())


def context_names(info: CorpusInfo) -> tuple[list[str], list[str]]:
    """Return the cell types and the technical batches, one that nobody named where the corpus has none."""
    cell_types, batches = (
        list(info.class_names(name)) if name in info.columns else [f"no {name}"]
        for name in ("cell_type", "technical_batch")
    )
    return cell_types, batches


def find_controls(
    info: CorpusInfo,
    labels: CellLabels,
    targets: PerturbationTargets,
    num_cell_types: int,
    num_batches: int,
    min_controls: int,
) -> ControlCells:
    """Find the control cells of a corpus."""
    rows = np.flatnonzero(labels.perturbation == targets.control)
    if not len(rows):
        raise DataError(
            f"{info.path}: no cell is a control; their label is {targets.names[targets.control]!r}"
        )
    return ControlCells(
        rows,
        labels.cell_type[rows],
        labels.technical_batch[rows],
        num_cell_types=num_cell_types,
        num_batches=num_batches,
        min_controls=min_controls,
    )


def group_cells(
    info: CorpusInfo, labels: CellLabels, targets: PerturbationTargets
) -> tuple[CellGroups, NDArray[np.int64], NDArray[np.int64]]:
    """Return the groups of perturbed cells that take part, and the group of each of these cells with its row."""
    rows = np.flatnonzero(targets.is_used[labels.perturbation])
    if not len(rows):
        raise DataError(
            f"{info.path}: no perturbed cell is left; {'; '.join(targets.notices) or 'all are controls'}"
        )
    cell_types, batches = context_names(info)
    sizes = (len(targets.names), len(cell_types), len(batches))
    # One number for the labels of a cell, which sorts faster than four.
    shape = (*sizes, int(labels.source.max()) + 1)
    codes, group_of = np.unique(
        np.ravel_multi_index([each[rows] for each in labels], shape), return_inverse=True
    )
    perturbation, cell_type, batch, source = np.unravel_index(codes, shape)
    groups = CellGroups(perturbation, cell_type, batch, source, cell_types, batches)
    return groups, group_of, rows


def number_sets(
    labels: CellLabels,
    rows: NDArray[np.int64],
    controls: ControlCells,
    set_size: int,
    min_cells: int,
    *,
    is_mixed: bool,
) -> tuple[PerturbedSets | None, int]:
    """Return the sets of these cells, and how many groups have too few cells."""
    perturbation, cell_type = labels.perturbation[rows], labels.cell_type[rows]
    batch = labels.technical_batch[rows]
    pairs = controls.pair(cell_type, batch)
    keys = [perturbation, cell_type, *([] if is_mixed else [batch])]
    order = np.lexsort([rows, *reversed(keys)])
    ordered = np.stack([each[order] for each in keys])
    is_first = np.append(True, (np.diff(ordered, axis=1) != 0).any(axis=0))
    group_of = np.cumsum(is_first) - 1
    is_kept = np.bincount(group_of) >= min_cells
    dropped = int((~is_kept).sum())
    order = order[is_kept[group_of]]
    if not len(order):
        return None, dropped
    _, starts, sizes = np.unique(group_of[is_kept[group_of]], return_index=True, return_counts=True)
    sets = PerturbedSets(
        rows=rows[order],
        pairs=pairs[order],
        starts=starts.astype(np.int64),
        sizes=sizes.astype(np.int64),
        perturbation=perturbation[order][starts].astype(np.int64),
        set_starts=offsets_of(-(-sizes // set_size)),
        set_size=set_size,
    )
    return sets, dropped
