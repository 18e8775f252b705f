"""Sets of perturbed cells beside sets of matched controls, drawn afresh in every epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from data.control_cells import ControlCells, ControlMatch
from data.corpus import CorpusInfo, open_corpus
from data.errors import DataError
from data.gene_columns import HIDDEN, GeneColumns, Unmeasured
from data.hashing import DrawKey, sha256_of
from data.memory import keep_freed_memory
from data.perturbation_split import Part, SplitPart, split_groups
from data.perturbation_targets import Pairs, PerturbationTargets, UnknownTargets, counted, read_targets
from data.perturbed_sets import (
    CellLabels,
    PerturbedSets,
    find_controls,
    group_cells,
    number_sets,
    read_cell_labels,
)
from data.readers import CorpusReader, RaggedBatch, open_reader
from data.technical_batches import batch_indices
from data.tokenizers import ExpressionTransform
from data.value_tokenizers import ValueTokenizer, build_value_tokenizer

Pooling = Literal["none", "control", "both"]
_SETS_TO_FIT, _SETS_AT_ONCE = 64, 4
_FIT_EPOCH = -2
"""Epoch of the draws that a tokenizer's inverse is fitted on, which is neither training's nor validation's."""


class PerturbationSource:
    """Fetch batches of sets: a row of this source is a set, and what it holds is drawn from the set and the epoch.

    A batch of B sets of S cells over N genes holds these CPU tensors, int64 where nothing else is said:

    - `tokens` [B, S, N]: values of the perturbed cells; [B, 1, N] with `pooling: both`.
    - `control` [B, S, N]: values of as many controls, cell i of the one matched to cell i of the other; [B, 1, N], the
      tokens of their mean, with `pooling: control` or `both`. -1 stands for a gene hidden by `unmeasured: hide`.
    - `target_gene_idx` [B]; [B, 2] where the corpus has pairs and `pairs: index`, -1 behind a single target.
    - `batch_idx` [B]: the set's technical batch; [B, S], each cell's, with `mix_technical_batches: true`. Absent where
      the corpus has no technical batches.
    - `cell_type_idx` [B], `perturbation_idx` [B] (class of `target_gene` in the corpus, controls among the classes).
    - `cell_index` and `control_index` [B, S]: corpus rows of the cells.
    - `depth` and `control_depth` float32 [B, S]: log1p of each cell's sum of stored values.
    - `noise_seed` [B]: a number of its own for each set in each epoch, never negative.
    - `num_tokens`: the Python number of elements of `tokens`.
    """

    unit = "sets"
    is_inline = False
    shuffle_block = 1
    shuffle_window = 8192

    def __init__(
        self,
        reader: CorpusReader,
        sets: PerturbedSets,
        controls: ControlCells,
        targets: PerturbationTargets,
        columns: GeneColumns,
        tokenizer: ValueTokenizer,
        control_tokenizer: ValueTokenizer,
        transform: ExpressionTransform,
        *,
        description: Mapping[str, Any],
        pooling: Pooling = "none",
        mix_technical_batches: bool = False,
        num_workers: int = 0,
        is_validation: bool = False,
        notices: Sequence[str] = (),
    ) -> None:
        """Take what `perturbation_loader` opened; `description` is what the fingerprint is made of."""
        self.reader = reader
        self.sets = sets
        self.controls = controls
        self.targets = targets
        self.columns = columns
        self.tokenizer, self.control_tokenizer = tokenizer, control_tokenizer
        self.transform = transform
        self.pooling: Pooling = pooling
        self.mix_technical_batches = mix_technical_batches
        self.num_workers = num_workers
        self.validation: PerturbationSource | None = None
        self.notices = list(notices)
        """What the user should know of how the cells were read, for the run's start-up account."""
        self.unique_batches = list(reader.info.manifest.technical_batches)
        self._batch_index = np.arange(len(self.unique_batches))
        self._description = dict(description)
        self._is_validation = is_validation
        keep_freed_memory()

    def __len__(self) -> int:
        """Count the sets of an epoch."""
        return len(self.sets)

    def fetch(self, rows: NDArray[np.int64], draw: DrawKey) -> dict[str, Any]:
        """Return the batch of these sets; cells, controls and noise are drawn from `draw` and the set."""
        if self._is_validation:
            draw = draw._replace(epoch=-1)
        group, places = self.sets.draw(rows, draw)
        cells, pairs = self.sets.rows[places], self.sets.pairs[places]
        controls = self.controls.draw(pairs, rows, draw)
        read = self.reader.read(np.concatenate([cells.reshape(-1), controls.reshape(-1)]))
        tokens, control = self._tokens(read, cells.shape)
        depth = np.log1p(read.columns["total"].astype(np.float32)).reshape(2, *cells.shape)
        cell_type, batch = np.divmod(pairs, self.controls.num_batches)
        indices = self.targets.indices[self.sets.perturbation[group]]
        arrays: dict[str, NDArray[Any]] = {
            "tokens": tokens,
            "control": control,
            "target_gene_idx": indices[:, 0] if indices.shape[1] == 1 else indices,
            "cell_type_idx": cell_type[:, 0],
            "perturbation_idx": self.sets.perturbation[group],
            "cell_index": cells,
            "control_index": controls,
            "depth": depth[0],
            "control_depth": depth[1],
            "noise_seed": draw.noise_seeds(rows),
        }
        if self.unique_batches:
            arrays["batch_idx"] = self._batch_index[batch if self.mix_technical_batches else batch[:, 0]]
        result: dict[str, Any] = {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()
        }
        return {**result, "num_tokens": tokens.size}

    def fetch_unmasked(self, rows: NDArray[np.int64], draw: DrawKey) -> dict[str, Any]:
        """Return what `fetch` does, whose values are never masked: a model may look at them before it trains."""
        return self.fetch(rows, draw)

    def set_batch_mapping(self, mapping: Mapping[str, int]) -> None:
        """Let `batch_idx` hold the run's index of each technical batch, instead of the corpus's own."""
        self._batch_index = batch_indices(self.unique_batches, mapping, str(self.reader.info.path))

    def facts(self) -> dict[str, Any]:
        """Return what a model's sizes depend on; the id that hides a value is `vocab_size`.

        `tokenizer_options`, which checkpoints keep, hold what turns tokens into values again
        (`data.value_tokenizers.ValueTokenizer.from_dict`), and the names of the targets where these are not the genes.
        """
        info = self.reader.info
        return {
            "vocab_size": self.tokenizer.num_tokens,
            "n_bins": self.control_tokenizer.num_tokens,
            "num_genes": len(self.columns),
            "num_targets": len(self.targets.target_names),
            "gene_space": self.columns.space,
            "value_kind": info.manifest.value_kind,
            "technical_batch_names": list(self.unique_batches),
            "target_gene_names": list(self.targets.target_names),
            "tokenizer_options": {
                "target_sum": self.transform.target_sum,
                "log1p": self.transform.log1p,
                "tokenizer": self.tokenizer.to_dict(),
                "control_tokenizer": self.control_tokenizer.to_dict(),
                "targets": None if self.targets.are_genes else list(self.targets.target_names),
                "num_target_indices": self.targets.indices.shape[1],
            },
        }

    def fingerprint(self) -> str:
        """Identify the cells, their sets and how they are tokenized."""
        content = {"corpus": self.reader.info.fingerprint, "sets": self.sets.digest(), **self._description}
        return sha256_of(content)

    def fit(self) -> tuple[ValueTokenizer, ValueTokenizer]:
        """Return both tokenizers with the mean of some sets' values in each bin as their inverse.

        One tokenizer for both is fitted on perturbed cells and controls together.
        """
        sets = np.unique(np.linspace(0, len(self) - 1, _SETS_TO_FIT).astype(np.int64))
        sides: tuple[list[NDArray[np.float32]], ...] = ([], [])
        draw = DrawKey(0, 0, _FIT_EPOCH)
        for start in range(0, len(sets), _SETS_AT_ONCE):
            part = sets[start : start + _SETS_AT_ONCE]
            _, places = self.sets.draw(part, draw)
            cells = self.sets.rows[places]
            controls = self.controls.draw(self.sets.pairs[places], part, draw)
            read = self.reader.read(np.concatenate([cells.reshape(-1), controls.reshape(-1)]))
            for side, (values, shown) in zip(sides, self._values(read, cells.shape), strict=True):
                # Most values are zero, and zero decodes to zero in any case.
                side.append(values[values != 0 if shown is None else (values != 0) & shown])
        if self.tokenizer is self.control_tokenizer:
            fitted = self.tokenizer.fitted([*sides[0], *sides[1]])
            return fitted, fitted
        return self.tokenizer.fitted(sides[0]), self.control_tokenizer.fitted(sides[1])

    def _tokens(
        self, read: RaggedBatch, shape: tuple[int, ...]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the tokens of the perturbed cells and of their controls, which `read` holds one after the other."""
        if self.pooling != "none" or self.tokenizer.strategy == "delta_bins":
            tokens = []
            tokenizers = (self.tokenizer, self.control_tokenizer)
            for encoder, (values, shown) in zip(tokenizers, self._values(read, shape), strict=True):
                table = np.full(values.shape, encoder.zero_token, np.int64)
                table[values != 0] = encoder.encode(values[values != 0])
                tokens.append(table)
                if shown is not None:
                    tokens[-1][~shown] = HIDDEN
            return tokens[0], tokens[1]
        # Most genes of a cell are zero: only the others are looked up.
        values = self.transform.apply(read.counts, read.offsets, read.columns["total"])
        border = int(read.offsets[len(read) // 2])
        if self.tokenizer is self.control_tokenizer:
            flat = self.tokenizer.encode(values)
        else:
            parts = self.tokenizer.encode(values[:border]), self.control_tokenizer.encode(values[border:])
            flat = np.concatenate(parts)
        table = self.columns.dense(read, flat, 0, np.int64)
        is_measured = self.columns.is_measured(read)
        if is_measured is not None:
            table[~is_measured] = HIDDEN
        table = table.reshape(2, *shape, len(self.columns))
        return table[0], table[1]

    def _values(
        self, read: RaggedBatch, shape: tuple[int, ...]
    ) -> tuple[tuple[NDArray[np.float32], NDArray[np.bool_] | None], ...]:
        """Return what the two tokenizers are given, pooled and as differences where asked for, and what is shown."""
        values = self.transform.apply(read.counts, read.offsets, read.columns["total"])
        whole = (2, *shape, len(self.columns))
        perturbed, control = self.columns.dense(read, values, 0, np.float32).reshape(whole)
        is_measured = self.columns.is_measured(read)
        shown, control_shown = (None, None) if is_measured is None else is_measured.reshape(whole)
        if self.pooling != "none":
            control, control_shown = mean_cell(control, control_shown)
        if self.pooling == "both":
            perturbed, shown = mean_cell(perturbed, shown)
        if self.tokenizer.strategy == "delta_bins":
            perturbed = perturbed - control
            shown = None if shown is None or control_shown is None else shown & control_shown
        return (perturbed, shown), (control, control_shown)


def perturbation_loader(
    path: str | Path,
    *,
    set_size: int,
    tokenizer: Mapping[str, Any],
    control_tokenizer: Mapping[str, Any] | None = None,
    genes: str | None = None,
    unmeasured: Unmeasured = "zero",
    targets: str = "genes",
    control_label: str | None = None,
    pairs: Pairs = "error",
    pair_separator: str = "+",
    unknown_targets: UnknownTargets = "error",
    mix_technical_batches: bool = False,
    pooling: Pooling = "none",
    control_match: ControlMatch = "any",
    min_controls: int = 1,
    min_cells: int = 1,
    held_out_genes: Sequence[str] | str = (),
    held_out_contexts: Sequence[str | Mapping[str, Any]] = (),
    held_out_combinations: Sequence[Mapping[str, Any]] = (),
    split_file: str | None = None,
    split_dataset: str | None = None,
    split_part: SplitPart = "val",
    num_workers: int = 0,
) -> PerturbationSource:
    """Open a perturbation corpus as a source of sets; `data.perturbation.perturbation_loader` in a config.

    Args:
        path: folder of the corpus, or an fsspec URL of one (Parquet storage).
        set_size: perturbed cells of a set, and controls of a set (cells).
        tokenizer: options of the value tokenizer, `strategy` among them (see `data.value_tokenizers`).
        control_tokenizer: the same for the controls; needed with `delta_bins`, else None takes `tokenizer`.
        genes: file with the genes that are the columns of the batches, in its order; None takes all of the corpus.
        unmeasured: what a gene is in cells of a file that did not measure it: `zero`, or `hide` it as token -1.
        targets: what `target_gene_idx` counts: `genes` (the columns of the batches), `corpus` (the genes that the
            corpus perturbs, sorted), or a file with a list of genes.
        control_label: class of `target_gene` that the controls have; None takes the corpus's own.
        pairs: perturbations of two genes: `error`, `skip` them, or `index` both.
        pair_separator: what stands between the genes of a pair.
        unknown_targets: targets that `targets` lacks: `error`, `skip` them, or `index` them as -1.
        mix_technical_batches: let a set mix the technical batches of its cell type; each cell's control is still
            matched to the cell's own. False: a set is of one technical batch.
        pooling: `none`, or replace the `control` cells of a set by their mean, or `both` sides.
        control_match: the weakest match of controls that is allowed: `both` (technical batch and cell type),
            `cell_type`, `technical_batch`, or `any`. The best that there is gets taken, in this order.
        min_controls: controls that a match needs to be taken (cells).
        min_cells: groups of one perturbation and context with fewer are left out (cells).
        held_out_genes: target genes that validate, in all contexts, pairs with one of them too; a list, or a file.
        held_out_contexts: cell types that validate, or tables with `cell_type` and `technical_batch`.
        held_out_combinations: tables with `target_gene`, `cell_type` and `technical_batch`, of names or lists.
        split_file: TOML split file of cell-load, in place of the three above.
        split_dataset: data set of the split file that the corpus is; None finds it by the names of the files.
        split_part: part of the split file that validates: `val` or `test`; the other one is left out.
        num_workers: processes that prepare batches; 0 leaves it to one background thread.
    """
    _check_arguments(set_size, min_controls, min_cells, pooling, control_match, mix_technical_batches)
    info = open_corpus(path)
    columns = GeneColumns(info, genes, unmeasured)
    built, built_control, transform, fits = _tokenizers(info, tokenizer, control_tokenizer, pooling)
    known = read_targets(
        info,
        columns=columns.space,
        targets=targets,
        control_label=control_label,
        pairs=pairs,
        pair_separator=pair_separator,
        unknown_targets=unknown_targets,
    )
    labels = read_cell_labels(info)
    groups, group_of, rows = group_cells(info, labels, known)
    parts, notices = split_groups(
        groups,
        known,
        info,
        held_out_genes=held_out_genes,
        held_out_contexts=held_out_contexts,
        held_out_combinations=held_out_combinations,
        split_file=split_file,
        split_dataset=split_dataset,
        split_part=split_part,
    )
    controls = find_controls(
        info, labels, known, len(groups.cell_types), len(groups.technical_batches), min_controls
    )
    description = {
        "set_size": set_size,
        "tokenizers": [dict(tokenizer), None if control_tokenizer is None else dict(control_tokenizer)],
        "genes": [columns.space.sha256, unmeasured],
        "targets": known.indices.tolist(),
        "mix_technical_batches": mix_technical_batches,
        "pooling": pooling,
        "controls": [known.names[known.control], control_match, min_controls],
    }
    sources: dict[Part, PerturbationSource] = {}
    notices = [*known.notices, *columns.notices, *notices]
    for part in (Part.TRAINING, Part.VALIDATION):
        chosen = rows[parts[group_of] == part]
        if not len(chosen):
            continue
        sets, said = _sets(part, labels, chosen, controls, set_size, min_cells, mix_technical_batches)
        notices += said
        if sets is None:
            continue
        controls.check(sets.pairs, control_match, (groups.cell_types, groups.technical_batches))
        sources[part] = PerturbationSource(
            open_reader(info, columns.reader_columns), sets, controls, known, columns, built, built_control, transform,
            description=description, pooling=pooling, mix_technical_batches=mix_technical_batches,
            num_workers=num_workers, is_validation=part == Part.VALIDATION,
        )  # fmt: skip
    if Part.TRAINING not in sources:
        raise DataError(f"{info.path}: no set is left to train on; {'; '.join(notices)}")
    source = sources[Part.TRAINING]
    source.notices = notices
    source.validation = sources.get(Part.VALIDATION)
    if any(fits):
        fitted = source.fit()
        for each in sources.values():
            each.tokenizer = fitted[0] if fits[0] else each.tokenizer
            each.control_tokenizer = fitted[1] if fits[1] else each.control_tokenizer
    return source


def _sets(
    part: Part,
    labels: CellLabels,
    rows: NDArray[np.int64],
    controls: ControlCells,
    set_size: int,
    min_cells: int,
    is_mixed: bool,
) -> tuple[PerturbedSets | None, list[str]]:
    """Number the sets of one part, and say what they are and what was left out."""
    name, notices = "training" if part == Part.TRAINING else "validation", []
    sets, dropped = number_sets(labels, rows, controls, set_size, min_cells, is_mixed=is_mixed)
    if dropped:
        notices.append(
            f"{name}: {counted(dropped, 'group')} of fewer than {min_cells} cells left out (min_cells)"
        )
    if sets is not None:
        notices.append(
            f"{name}: {counted(len(sets), 'set')} of {set_size} in an epoch, from {counted(len(sets.rows), 'cell')} of "
            f"{counted(len(np.unique(sets.perturbation)), 'perturbation')}; {controls.account(sets.pairs)}"
        )
    return sets, notices


def _check_arguments(
    set_size: int, min_controls: int, min_cells: int, pooling: str, control_match: str, is_mixed: bool
) -> None:
    """Refuse numbers and words that mean nothing."""
    if type(set_size) is not int or set_size < 1:
        raise DataError(f"set_size: got {set_size!r}; it must be a whole number of cells, at least 1")
    for name, number in (("min_controls", min_controls), ("min_cells", min_cells)):
        if type(number) is not int or number < 1:
            raise DataError(f"{name}: got {number!r}; it must be a whole number, at least 1")
    for name, word, allowed in (
        ("pooling", pooling, get_args(Pooling)),
        ("control_match", control_match, get_args(ControlMatch)),
    ):
        if word not in allowed:
            raise DataError(f"{name} is {word!r}; it must be {' | '.join(allowed)}")
    if pooling == "both" and is_mixed:
        raise DataError("pooling: both makes one row of a set, which must then be of one technical batch; leave "
                        "mix_technical_batches away")  # fmt: skip


def mean_cell(
    values: NDArray[np.float32], shown: NDArray[np.bool_] | None
) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Return the mean [B, 1, N] over the cells of each set that measured a gene, and which genes any of them did."""
    if shown is None:
        return values.mean(axis=1, keepdims=True), None
    counts = shown.sum(axis=1, keepdims=True)
    return values.sum(axis=1, keepdims=True) / np.maximum(counts, 1).astype(np.float32), counts > 0


def _tokenizers(
    info: CorpusInfo, tokenizer: Mapping[str, Any], control_tokenizer: Mapping[str, Any] | None, pooling: str
) -> tuple[ValueTokenizer, ValueTokenizer, ExpressionTransform, tuple[bool, bool]]:
    """Build the tokenizers of perturbed cells and of controls, which see the same transform."""
    kind = info.manifest.value_kind
    built, transform, is_fitted = build_value_tokenizer(tokenizer, value_kind=kind)
    built_control, control_transform, control_is_fitted = built, transform, is_fitted
    if control_tokenizer is not None:
        built_control, control_transform, control_is_fitted = build_value_tokenizer(
            control_tokenizer, value_kind=kind, where="control_tokenizer"
        )
    if built_control.strategy == "delta_bins":
        raise DataError(
            "control_tokenizer: tokenizer.strategy delta_bins is for differences from the controls, whose own values "
            "need another one; set control_tokenizer: {strategy: log_bins}"
        )
    if control_transform != transform:
        raise DataError(
            "control_tokenizer: normalize, target_sum and log1p must be those of tokenizer (and counts has none), "
            "because the two sides are compared"
        )
    for name, pooled, each in (
        ("tokenizer", pooling == "both", built),
        ("control_tokenizer", pooling != "none", built_control),
    ):
        if pooled and each.strategy == "counts":
            raise DataError(f"{name}: the mean of counts is no count; use log_bins with pooling: {pooling}")
    return built, built_control, transform, (is_fitted, control_is_fitted)
