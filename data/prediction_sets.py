"""Sets that a model predicts perturbed cells from: controls and a target, which needs no cells of its own.

Everything that is random depends on the seed, the target, the context and the number of the cell alone: neither on what
else is predicted nor on the batches that sets are put in.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data.control_cells import ControlCells
from data.corpus import CorpusInfo
from data.errors import DataError, listed
from data.gene_columns import HIDDEN, GeneColumns
from data.hashing import DrawKey, Stream, splitmix64
from data.permutation import permuted
from data.perturbation import mean_cell
from data.perturbation_settings import PerturbationSettings
from data.perturbation_split import Part, split_groups
from data.perturbation_targets import (
    PerturbationTargets,
    check_known,
    counted,
    names_of_genes,
    read_names,
    read_targets,
    target_indices,
)
from data.perturbed_sets import CellLabels, context_names, find_controls, group_cells, read_cell_labels
from data.predicted_values import MatchedControls
from data.ragged import offsets_of
from data.readers import CorpusReader, RaggedBatch, open_reader

_EPOCH = -3
"""Of the draws: neither training's, nor validation's, nor those that tokenizers are fitted on."""


@dataclass(frozen=True, eq=False)
class PerturbedCorpus:
    """Hold a corpus as a model's phase reads it: control cells, and perturbed ones where there are any."""

    settings: PerturbationSettings
    reader: CorpusReader
    labels: CellLabels
    targets: PerturbationTargets
    columns: GeneColumns
    controls: ControlCells
    cell_types: tuple[str, ...]
    """One that nobody named, where the corpus has no cell types."""
    technical_batches: tuple[str, ...]
    notices: tuple[str, ...]

    @property
    def info(self) -> CorpusInfo:
        """Return the corpus."""
        return self.reader.info

    @property
    def control_label(self) -> str:
        """Return what `target_gene` is in controls."""
        return self.targets.names[self.targets.control]

    @property
    def has_cell_types(self) -> bool:
        """Tell whether the corpus says the cells' types."""
        return "cell_type" in self.info.columns

    @property
    def has_technical_batches(self) -> bool:
        """Tell whether the corpus says the cells' technical batches."""
        return "technical_batch" in self.info.columns

    def control_rows(self, cell_types: Iterable[int] | None = None) -> NDArray[np.int64]:
        """Return the rows of the controls of these cell types, ascending; None: of all."""
        chosen = self.labels.perturbation == self.targets.control
        if cell_types is not None:
            chosen &= np.isin(self.labels.cell_type, list(cell_types))
        return np.flatnonzero(chosen)

    def contexts(self) -> list[int]:
        """Return the cell types that have controls."""
        return np.unique(self.labels.cell_type[self.control_rows()]).tolist()

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
        """Return the rows of training and of held-out cells, and held-out targets without cells here.

        Raises:
            DataError: it cannot be told what is held out.
        """
        held_out = self.settings.held_out
        if held_out is None:
            raise DataError(
                f"phase '{self.settings.phase}': what was held out was said by a file, which an export does not have; "
                "name the targets with --targets, or give the run folder instead of the export"
            )
        genes = read_names(held_out["held_out_genes"], "held_out_genes")
        here = {gene for own in self.targets.genes for gene in own} | set(self.targets.names)
        absent = [gene for gene in genes if gene not in here]
        if not self.targets.is_used.any():
            return np.empty(0, np.int64), np.empty(0, np.int64), absent
        groups, group_of, rows = group_cells(self.info, self.labels, self.targets)
        given = {**held_out, "held_out_genes": [gene for gene in genes if gene in here]}
        parts = split_groups(groups, self.targets, self.info, **given)[0][group_of]
        return rows[parts == Part.TRAINING], rows[parts == Part.VALIDATION], absent


Rule = Literal["asked", "real", "default"]
"""What a number of cells is: one that was asked for, that of the real cells, or a default where there are none."""


class Wanted(NamedTuple):
    """Ask for the cells of one perturbation."""

    target: str
    cell_type: int | None = None
    """None: every context that has controls."""
    num_cells: int | None = None
    """None: as many as the real ones, or a default where there are none."""


@dataclass(frozen=True, eq=False)
class Request:
    """Ask for the cells of one perturbation in one context, divided over technical batches."""

    target: str
    indices: tuple[int, ...]
    cell_type: int
    pairs: NDArray[np.int64]
    """Pairs of cell type and technical batch (see `ControlCells`) that get cells."""
    sizes: NDArray[np.int64]
    """Cells of each pair."""
    rule: Rule
    """What its number of cells was taken from."""

    @property
    def num_cells(self) -> int:
        """Count the cells."""
        return int(self.sizes.sum())


class SetBatch(NamedTuple):
    """Hold the conditions of some sets, and what turns their tokens into values again."""

    conditions: dict[str, torch.Tensor]
    """`control` [B, C, N], `target_gene_idx` [B] or [B, 2], `noise_seed` [B], and `batch_idx` [B] or [B, S]."""
    num_rows: int
    """Cells of each set that are drawn."""
    sizes: NDArray[np.int64]
    """[B], those of them that were asked for: the first ones."""
    controls: MatchedControls
    """Of the cells that were asked for, set after set."""
    seeds: NDArray[np.uint64]
    """[cells], of the same cells."""


def open_perturbed_corpus(info: CorpusInfo, settings: PerturbationSettings) -> PerturbedCorpus:
    """Open a corpus as a phase read its own; genes are found by name.

    Raises:
        DataError: it lacks genes of the model, holds other values, or has no controls.
    """
    kind = info.manifest.value_kind
    if kind != settings.value_kind:
        raise DataError(
            f"{info.path}: it holds {kind} values, and phase '{settings.phase}' of the model's run read "
            f"{settings.value_kind}; convert the layer that holds these"
        )
    arguments = settings.arguments
    columns = GeneColumns(info, settings.genes, arguments["unmeasured"])
    notices = list(columns.notices)
    if info.gene_space.sha256 != settings.genes.sha256:
        notices.append(
            f"{info.path}: the {len(columns)} genes of the model were found by name among its {len(info.gene_space)}"
        )
    label = arguments["control_label"]
    if label is not None and "target_gene" in info.columns and label not in info.class_names("target_gene"):
        label = None  # the corpus is another one, with a name of its own for controls
    # What the corpus itself perturbs need not be known to the model: only what is asked for.
    targets = read_targets(
        info,
        columns=columns.space,
        targets=settings.target_space,
        control_label=label,
        pairs="index" if arguments["pairs"] == "index" else "skip",
        pair_separator=arguments["pair_separator"],
        unknown_targets="index" if arguments["unknown_targets"] == "index" else "skip",
        may_be_none=True,
    )
    labels = read_cell_labels(info)
    cell_types, batches = context_names(info)
    controls = find_controls(info, labels, targets, len(cell_types), len(batches), arguments["min_controls"])
    return PerturbedCorpus(
        settings,
        open_reader(info, columns.reader_columns),
        labels,
        targets,
        columns,
        controls,
        tuple(cell_types),
        tuple(batches),
        (*notices, *targets.notices),
    )


def held_out_wanted(
    corpus: PerturbedCorpus, rows: NDArray[np.int64], absent: Sequence[str] = ()
) -> list[Wanted]:
    """Return every perturbation and context of some held-out rows, and targets that have no cells, in all contexts."""
    labels = corpus.labels
    codes = np.stack([labels.perturbation[rows], labels.cell_type[rows]], axis=1)
    found = [Wanted(corpus.targets.names[p], int(c)) for p, c in np.unique(codes, axis=0).tolist()]
    return [*found, *(Wanted(name) for name in absent)]


def make_requests(
    corpus: PerturbedCorpus,
    wanted: Iterable[Wanted],
    *,
    real_rows: NDArray[np.int64],
    default_cells: int,
    cells_per_perturbation: int | None = None,
    contexts: Sequence[int] | None = None,
    where: str = "--targets",
) -> list[Request]:
    """Say how many cells of which technical batches are asked for.

    They are of the technical batches of the real cells, where there are any, in proportion; else of those of the
    context's controls. Nothing else of real cells is looked at.

    Args:
        corpus: where the controls are.
        wanted: the perturbations.
        real_rows: rows of the real cells that count.
        default_cells: cells of a perturbation and context that has no real ones.
        cells_per_perturbation: cells of those that say no number; None: as many as the real ones.
        contexts: cell types; None: those that each perturbation says, or all that have controls.
        where: what named the perturbations, for messages.

    Raises:
        DataError: a target is unknown, or a context has no controls.
    """
    labels, controls, targets = corpus.labels, corpus.controls, corpus.targets
    match = corpus.settings.arguments["control_match"]
    real = _cells_of(
        labels.perturbation[real_rows], labels.cell_type[real_rows], labels.technical_batch[real_rows]
    )
    rows = corpus.control_rows()
    pool = _cells_of(np.zeros(len(rows), np.int64), labels.cell_type[rows], labels.technical_batch[rows])
    index_of = {name: index for index, name in enumerate(targets.names)}
    with_controls, requests = corpus.contexts(), []
    for each in wanted:
        indices = _indices(corpus, each.target, where)
        for cell_type in _cell_types_of(each, contexts, with_controls):
            own = real.get((index_of.get(each.target, -1), cell_type))
            batches, sizes = pool.get((0, cell_type), (None, None)) if own is None else own
            if batches is None or sizes is None:
                raise DataError(
                    f"{where}: {corpus.cell_types[cell_type]!r} has no control cells to predict {each.target!r} from; "
                    f"contexts with controls: {listed([corpus.cell_types[code] for code in with_controls], 6)}"
                )
            num_real = 0 if own is None else int(sizes.sum())
            asked = each.num_cells or cells_per_perturbation
            count = asked or num_real or default_cells
            rule: Rule = "asked" if asked else "real" if num_real else "default"
            sizes = _divided(count, sizes)
            pairs = controls.pair(np.full(len(batches), cell_type), batches)[sizes > 0]
            controls.check(pairs, match, (list(corpus.cell_types), list(corpus.technical_batches)))
            requests.append(Request(each.target, indices, cell_type, pairs, sizes[sizes > 0], rule))
    times = Counter((request.target, request.cell_type) for request in requests)
    for (target, cell_type), count in times.items():
        if count > 1:
            raise DataError(
                f"{where}: {target!r} in {corpus.cell_types[cell_type]!r} is asked for more than once"
            )
    return requests


class PredictionSets:
    """Number the sets that some requests make, and give their batches.

    A set is of one request, and of one technical batch unless the model's run mixed them. It has as many controls as
    in training. Where the model predicts each cell apart, it draws no more cells than were asked for.
    """

    def __init__(
        self,
        corpus: PerturbedCorpus,
        requests: Sequence[Request],
        *,
        seed: int,
        batch_index: NDArray[np.int64] | None,
        cells_are_apart: bool,
    ) -> None:
        """Take what to predict.

        Args:
            corpus: where the controls are.
            requests: the perturbations.
            seed: of everything that is random.
            batch_index: [technical batches of the corpus], the model's index of each; None: the model knows none.
            cells_are_apart: whether the model predicts the cells of a set each on its own.
        """
        self.corpus, self.requests = corpus, list(requests)
        self.cells_are_apart = cells_are_apart
        self._batch_index = batch_index
        self._draw = DrawKey(seed, 0, _EPOCH)
        settings = corpus.settings
        self._is_mixed = bool(settings.arguments["mix_technical_batches"])
        self._pooling: str = settings.arguments["pooling"]
        # Where the cells of a set are pooled, each predicted cell is a set of its own.
        self._rows_per_set = 1 if self._pooling == "both" else settings.set_size
        self._sets: list[tuple[int, int]] = []  # request and number of cells
        keys: list[int] = []
        pairs: list[NDArray[np.int64]] = []
        for number, request in enumerate(self.requests):
            for group in self._groups(request):
                name = [request.target, corpus.cell_types[request.cell_type], self._batch_name(group)]
                for place, part in enumerate(_parts(group, self._rows_per_set, cells_are_apart)):
                    self._sets.append((number, len(part)))
                    keys.append(_key([*name, place]))
                    pairs.append(part)
        self._keys = np.array(keys, np.int64)
        self._pairs = np.concatenate(pairs) if pairs else np.empty(0, np.int64)
        self.sizes = np.array([size for _, size in self._sets], np.int64)
        self.starts = offsets_of(self.sizes)

    def __len__(self) -> int:
        """Count the sets."""
        return len(self._sets)

    @property
    def num_cells(self) -> int:
        """Count the cells that were asked for."""
        return int(self.starts[-1])

    def requests_of_cells(self) -> NDArray[np.int64]:
        """Return the request [cells] of each predicted cell, in their order."""
        return np.repeat(np.array([number for number, _ in self._sets], np.int64), self.sizes)

    def technical_batches_of_cells(self) -> NDArray[np.int64]:
        """Return the corpus's technical batch [cells] of each predicted cell, in their order."""
        return self._pairs % self.corpus.controls.num_batches

    def batch(self, sets: NDArray[np.integer]) -> SetBatch:
        """Return the conditions of these sets."""
        corpus, size = self.corpus, self.corpus.settings.set_size
        sizes = self.sizes[sets]
        num_rows = int(sizes.max()) if self.cells_are_apart else self._rows_per_set
        # Beyond the cells that were asked for, a set's controls are matched to the same cells again.
        place = self.starts[:-1][sets][:, None] + np.arange(size) % sizes[:, None]
        pairs = self._pairs[place]
        keys = self._keys[sets]
        rows = corpus.controls.draw(pairs, keys, self._draw)
        read = corpus.reader.read(rows.reshape(-1))
        tokens, values = self._tokens(read, rows.shape)
        is_asked = np.arange(size) < sizes[:, None]
        totals = read.columns["total"].astype(np.float64).reshape(rows.shape)
        column_totals = corpus.columns.sums(read).reshape(rows.shape)
        base = None
        if values is not None:
            whole = (*rows.shape, len(corpus.columns))
            base = np.broadcast_to(values, whole)[is_asked].astype(np.float32)
        indices = np.array([self._indices_of(self._sets[number][0]) for number in sets.tolist()], np.int64)
        arrays: dict[str, NDArray[Any]] = {
            "control": tokens,
            "target_gene_idx": indices[:, 0] if indices.shape[1] == 1 else indices,
            "noise_seed": self._draw.noise_seeds(keys),
        }
        if self._batch_index is not None:
            of_cells = self._batch_index[pairs % corpus.controls.num_batches]
            arrays["batch_idx"] = of_cells[:, :num_rows] if self._is_mixed else of_cells[:, 0]
        seeds = splitmix64(
            np.broadcast_to(self._draw.cell_hashes(Stream.PREDICTED_CELL, keys)[:, None], rows.shape),
            np.broadcast_to(np.arange(size), rows.shape),
        )
        return SetBatch(
            {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()},
            num_rows,
            sizes,
            MatchedControls(totals[is_asked], column_totals[is_asked], base),
            seeds[is_asked],
        )

    def _groups(self, request: Request) -> list[NDArray[np.int64]]:
        """Return the pairs of the cells of each group: of one technical batch, or of all in a seeded order."""
        if not self._is_mixed:
            return [np.full(size, pair) for pair, size in zip(request.pairs, request.sizes, strict=True)]
        pairs = np.repeat(request.pairs, request.sizes)
        key = _key([request.target, self.corpus.cell_types[request.cell_type], "order"])
        states = np.full(len(pairs), self._draw.cell_hashes(Stream.SET_CELLS, np.array([key]))[0])
        return [pairs[permuted(states, np.full(len(pairs), len(pairs)), np.arange(len(pairs)))]]

    def _batch_name(self, pairs: NDArray[np.int64]) -> str:
        if self._is_mixed:
            return "mixed"
        return self.corpus.technical_batches[int(pairs[0]) % self.corpus.controls.num_batches]

    def _indices_of(self, request: int) -> list[int]:
        indices = list(self.requests[request].indices)
        return indices + [-1] * (self.corpus.settings.num_target_indices - len(indices))

    def _tokens(
        self, read: RaggedBatch, shape: tuple[int, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """Return the tokens of the controls [B, C, N], and their values where differences are added to them."""
        corpus, settings = self.corpus, self.corpus.settings
        tokenizer = settings.control_tokenizer
        needs_values = settings.tokenizer.strategy == "delta_bins"
        stored = settings.transform.apply(read.counts, read.offsets, read.columns["total"])
        shown = corpus.columns.is_measured(read)
        if self._pooling == "none" and not needs_values:
            table = corpus.columns.dense(read, tokenizer.encode(stored), tokenizer.zero_token, np.int64)
            if shown is not None:
                table[~shown] = HIDDEN
            return table.reshape(*shape, -1), None
        values = corpus.columns.dense(read, stored, 0, np.float32).reshape(*shape, -1)
        shown = None if shown is None else shown.reshape(*shape, -1)
        if self._pooling != "none":
            values, shown = mean_cell(values, shown)
        tokens = tokenizer.encode(values)
        if shown is not None:
            tokens[~shown] = HIDDEN
        return tokens, values if needs_values else None


def technical_batch_index(
    corpus: PerturbedCorpus, requests: Iterable[Request], stand_in: str | None = None
) -> NDArray[np.int64]:
    """Return the model's index of each technical batch of the corpus; -1 for those that no request needs.

    Args:
        corpus: where the controls are.
        requests: what is predicted.
        stand_in: technical batch of the model's run that new ones are predicted as.

    Raises:
        DataError: a technical batch is new to the model, and nothing stands in for it.
    """
    known = corpus.settings.technical_batches
    names = corpus.technical_batches if corpus.has_technical_batches else (corpus.settings.phase,)
    if stand_in is not None:
        check_known(stand_in, known, "--technical-batch", "technical batch of the model's run")
    found = np.array(
        [known.get(name, -1 if stand_in is None else known[stand_in]) for name in names], np.int64
    )
    needed = np.unique(np.concatenate([request.pairs % corpus.controls.num_batches for request in requests]))
    missing = [names[index] for index in needed.tolist() if found[index] < 0]
    if missing:
        raise DataError(
            f"{corpus.info.path}: {counted(len(missing), 'technical batch')} new to the model: {listed(missing, 6)}; "
            f"say with --technical-batch which one of its own they are predicted as: {listed(sorted(known), 6)}"
        )
    return found


def _cell_types_of(
    wanted: Wanted, contexts: Sequence[int] | None, with_controls: Sequence[int]
) -> Sequence[int]:
    """Return the cell types that a perturbation is predicted in; `contexts` are those asked for, None: any."""
    if wanted.cell_type is None:
        return with_controls if contexts is None else contexts
    return [wanted.cell_type] if contexts is None or wanted.cell_type in contexts else []


def _cells_of(
    perturbation: NDArray[np.integer], cell_type: NDArray[np.integer], batch: NDArray[np.integer]
) -> Mapping[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the technical batches of each perturbation and cell type, and how many cells are in each."""
    codes, counts = np.unique(np.stack([perturbation, cell_type, batch], axis=1), axis=0, return_counts=True)
    result: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for (first, second, third), count in zip(codes.tolist(), counts.tolist(), strict=True):
        batches, sizes = result.setdefault((first, second), ([], []))
        batches.append(third)
        sizes.append(count)
    return {key: (np.array(one, np.int64), np.array(two, np.int64)) for key, (one, two) in result.items()}


def _indices(corpus: PerturbedCorpus, target: str, where: str) -> tuple[int, ...]:
    """Return a target's indices, and refuse one that the model cannot be told."""
    settings, label = corpus.settings, corpus.control_label
    if target == label:
        raise DataError(f"{where}: {target!r} is the control label, not a target")
    space = settings.target_space
    separator = settings.arguments["pair_separator"]
    genes, found = target_indices(
        target, space, pair_separator=separator, control_label=label, where=str(corpus.info.path)
    )
    if len(found) > settings.num_target_indices:
        raise DataError(
            f"{where}: {target!r} is a pair of genes, and phase '{settings.phase}' of the model's run had single "
            "targets"
        )
    if -1 in found and settings.arguments["unknown_targets"] != "index":
        names = names_of_genes(space)
        for gene, index in zip(genes, found, strict=True):
            if index < 0:
                what = "gene of the model" if settings.target_names is None else "target that the model knows"
                check_known(gene, [name for name in names if name != gene], where, what)
    return found


def _parts(group: NDArray[np.int64], most: int, as_equal: bool) -> list[NDArray[np.int64]]:
    """Cut a group's cells into sets: as equal as can be, or full ones and what is left."""
    count = -(-len(group) // most)
    if as_equal:
        return np.array_split(group, count)
    return [group[start : start + most] for start in range(0, len(group), most)]


def _divided(count: int, weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Divide a number in proportion to weights into whole numbers; the largest remainders are rounded up."""
    exact = count * weights / weights.sum()
    sizes = np.floor(exact).astype(np.int64)
    order = np.argsort(sizes - exact, kind="stable")
    sizes[order[: count - int(sizes.sum())]] += 1
    return sizes


def _key(name: Sequence[str | int]) -> int:
    """Return a number for a name, the same in every process and on every machine."""
    digest = hashlib.sha256(json.dumps(list(name)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
