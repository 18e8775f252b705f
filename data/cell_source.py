"""Cells of a converted corpus as batches of tensors: the source that `data.loader.cell_loader` builds."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from data.collate import collate, collate_packed
from data.columns import RowTable
from data.corpus import ROWS_PER_GROUP, CorpusInfo, open_corpus
from data.errors import DataError
from data.hashing import DrawKey, sha256_of
from data.labels import (
    LabelColumn,
    LabelTask,
    describe_labels,
    open_labels,
    read_labels,
    read_obs,
    stratified_masks,
)
from data.masking import Masking, build_masking
from data.memory import keep_freed_memory
from data.options import Options
from data.order import part_masks
from data.readers import CorpusReader, open_columns, open_reader
from data.technical_batches import batch_indices
from data.tokenizer_options import build_tokenizer, complete_options, fitted_options
from data.tokenizers import NUM_SPECIAL_TOKENS, Tokenizer
from data.weighted_order import WeightedOrder

_LABEL_COLUMNS = ("technical_batch", "target_gene")
Layout = Literal["padded", "bucketed", "packed"]
_logger = logging.getLogger(__name__)


class CellSource:
    """Fetch tokenized, masked and padded or packed batches of a corpus by row numbers.

    A batch is a function of its rows and the draw key alone. Its dict holds CPU tensors: `tokens`, `values`,
    `attention_mask`, `depth`, `cell_index`, the Python number `num_tokens`, and where they apply `bins`,
    `labels`, `value_labels`, `masked_index`, `batch_idx`, `target_gene_idx` and `label` (int64 class index, -100
    without a label; or float32, NaN without, [B, columns] of several columns). With layout `packed` it holds
    `cu_seqlens` and `max_length` in place of `attention_mask` (see `data.collate.collate_packed`).
    """

    is_inline = False

    def __init__(
        self,
        reader: CorpusReader,
        tokenizer: Tokenizer,
        masking: Masking | None,
        row_mask: NDArray[np.bool_] | None,
        *,
        description: Mapping[str, Any],
        layout: Layout = "padded",
        shuffle_block: int = 64,
        shuffle_window: int = 8192,
        num_workers: int = 0,
        is_validation: bool = False,
        labels: LabelColumn | None = None,
        sampling: "Sampling | None" = None,
        notices: Sequence[str] = (),
    ) -> None:
        """Take what `cell_loader` opened; `description` is what the fingerprint is made of."""
        self.reader = reader
        self.tokenizer = tokenizer
        self.masking = masking
        self.row_mask = row_mask
        self.layout: Layout = layout
        self.validation: CellSource | None = None
        self.shuffle_block = shuffle_block
        self.shuffle_window = shuffle_window
        self.num_workers = num_workers
        self.labels = labels
        self.notices = list(notices)
        """What the user should know of how the cells were read, for the run's start-up account."""
        self.unique_batches = list(reader.info.manifest.technical_batches)
        self._description = dict(description)
        self._is_validation = is_validation
        self._sampling = sampling
        self._batch_index = np.arange(len(self.unique_batches))
        self._numbers: RowTable | None = None
        if layout == "bucketed":
            self._numbers = open_columns(reader.info, ["n_genes" if tokenizer.measured is None else "source"])
        keep_freed_memory()

    def __len__(self) -> int:
        """Count the rows of the corpus; `row_mask` says which of them take part."""
        return self.reader.num_rows

    def fetch(self, rows: NDArray[np.int64], draw: DrawKey) -> dict[str, Any]:
        """Return the batch of these rows; what is random is drawn from `draw` and the row."""
        return self._fetch(rows, draw, self.masking, is_packed=self.layout == "packed")

    def fetch_unmasked(self, rows: NDArray[np.int64], draw: DrawKey) -> dict[str, Any]:
        """Return the batch of these rows without masking, padded whatever the layout is."""
        return self._fetch(rows, draw, None, is_packed=False)

    def arrangement(self, rows: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the order in which a global batch is cut into micro-batches; None: as it comes.

        With layout `bucketed` the longest cells come first, so that a batch too large for the memory shows at once.
        """
        if self._numbers is None:
            return None
        numbers = cast(NDArray[Any], next(iter(self._numbers.gather(rows).values())))
        return np.argsort(-self.tokenizer.num_tokens(numbers), kind="stable")

    def training_order(self, seed: int, phase: int) -> WeightedOrder | None:
        """Return the order that balances classes, where `sampling` asks for one; None leaves it to the caller."""
        if self._sampling is None:
            return None
        return WeightedOrder(
            self._sampling.classes,
            seed,
            phase,
            self._sampling.warmup_epochs,
            window=self.shuffle_window,
            selected=self.row_mask,
        )

    def obs(self, names: Sequence[str], rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """Return kept obs columns of these rows by name: labels as text, numbers as they are stored."""
        return read_obs(self.reader.info, names, rows)

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Read ahead rows that will be fetched soon; no rows: stop reading ahead."""
        self.reader.expect(rows)

    def set_batch_mapping(self, mapping: Mapping[str, int]) -> None:
        """Let `batch_idx` hold the run's index of each technical batch, instead of the corpus's own."""
        self._batch_index = batch_indices(self.unique_batches, mapping, str(self.reader.info.path))

    def facts(self) -> dict[str, Any]:
        """Return what a model's sizes depend on."""
        info = self.reader.info
        has_targets = "target_gene" in info.columns
        names = None if self.labels is None or not self.labels.names else list(self.labels.names)
        return {
            "vocab_size": NUM_SPECIAL_TOKENS + len(info.gene_space),
            "gene_space": info.gene_space,
            "n_bins": self.tokenizer.n_bins,
            "max_length": self.tokenizer.max_genes,
            "value_kind": info.manifest.value_kind,
            "technical_batch_names": list(self.unique_batches),
            "target_gene_names": list(info.class_names("target_gene")) if has_targets else [],
            "tokenizer_options": complete_options(self.tokenizer, info.gene_space),
            "label_names": names,
            "n_classes": None if names is None else len(names),
        }

    def fingerprint(self) -> str:
        """Identify the cells, their split and how they are tokenized and masked."""
        content = {"corpus": self.reader.info.fingerprint, **self._description}
        return sha256_of(content)

    def _fetch(
        self, rows: NDArray[np.int64], draw: DrawKey, masking: Masking | None, *, is_packed: bool
    ) -> dict[str, Any]:
        if self._is_validation:
            draw = draw._replace(epoch=-1)
        cells = self.reader.read(rows)
        tokenizer = self.tokenizer
        tokens = tokenizer(cells, rows, draw)
        masked = None
        if masking is not None:
            num_genes = len(self.reader.info.gene_space)
            masked = masking.apply(tokens, rows, draw, num_genes, tokenizer.n_bins)
        if is_packed:
            batch = collate_packed(tokens, masked, prepend_cls=tokenizer.prepend_cls)
        else:
            width = tokenizer.max_genes if tokenizer.padding == "max_genes" else None
            batch = collate(tokens, masked, prepend_cls=tokenizer.prepend_cls, width=width)
        batch["depth"] = torch.from_numpy(np.log1p(cells.columns["total"].astype(np.float32)))
        batch["cell_index"] = torch.from_numpy(rows.astype(np.int64))
        if "technical_batch" in cells.columns:
            batch["batch_idx"] = torch.from_numpy(self._batch_index[cells.columns["technical_batch"]])
        if "target_gene" in cells.columns:
            batch["target_gene_idx"] = torch.from_numpy(cells.columns["target_gene"].astype(np.int64))
        if self.labels is not None:
            batch["label"] = torch.from_numpy(self.labels.read(cells.columns))
        return batch


def cell_loader(
    path: str | Path,
    *,
    tokenizer: Mapping[str, Any],
    masking: Mapping[str, Any] | None = None,
    val_fraction: float = 0.0,
    split_seed: int = 0,
    limit_cells: int | None = None,
    layout: Layout = "padded",
    shuffle_block: int = 64,
    shuffle_window: int = 8192,
    num_workers: int = 0,
    label: str | Sequence[str] | None = None,
    label_task: LabelTask = "classification",
    stratify: bool = False,
    sampling: Mapping[str, Any] | None = None,
) -> CellSource:
    """Open a converted corpus as a source of batches; `data.loader.cell_loader` in a config.

    Args:
        path: folder of the corpus, or an fsspec URL of one (Parquet storage).
        tokenizer: options of the tokenizer, `strategy` among them (see `data.tokenizers`).
        masking: options of the masking (see `data.masking`); None leaves batches unmasked.
        val_fraction: share of the cells that is held out for validation.
        split_seed: seed of the split and of `limit_cells`; not the run's, so that runs share their split.
        limit_cells: number of cells to take part, a seeded random choice; None takes all.
        layout: how the cells of a micro-batch are laid out: `padded` to the longest of them; `bucketed`, padded too,
            but each global batch is cut into micro-batches of cells of similar length; `packed` one after the
            other, without padding, for a model that takes such batches (ours does).
        shuffle_block: neighbouring cells that are read together. With Parquet, whole row groups (1024 cells)
            are decoded for the cells of a block: 1024, with a window of 16384, is then four times faster.
        shuffle_window: cells that are shuffled among each other, a multiple of `shuffle_block`.
        num_workers: processes that prepare batches; 0 leaves it to one background thread.
        label: obs column of the corpus that batches hold as `label`; several are the numbers of a regression.
        label_task: `classification` (a class index for each distinct label) or `regression` (the number itself).
        stratify: split by `label`, so that validation has its share of every class.
        sampling: draw training cells with replacement, balanced over the classes of an obs column: `{column,
            warmup_epochs}` (see `data.weighted_order`); None shows every cell once an epoch.
    """
    if layout not in get_args(Layout):
        raise DataError(f"layout is {layout!r}; it must be {' | '.join(get_args(Layout))}")
    info = open_corpus(path)
    labels = _labels(info, label, label_task)
    training, validation, notices = _split(info, labels, stratify, val_fraction, split_seed, limit_cells)
    if labels is not None:
        notices = [describe_labels(info, labels, training), *notices]
    built = _tokenizer(info, fitted_options(tokenizer, info, training, split_seed), layout)
    _warn_of_row_groups(info, shuffle_block, shuffle_window)
    masks = None if masking is None else build_masking(masking)
    balanced = None if sampling is None else _sampling(info, sampling)
    description: dict[str, Any] = {
        "tokenizer": dict(tokenizer),
        "masking": None if masking is None else dict(masking),
        "split": [val_fraction, split_seed, limit_cells],
        "shuffle": [shuffle_block, shuffle_window],
    }
    # Only what is used is named, so that runs without it keep the fingerprint they were saved with.
    if labels is not None:
        description["label"] = [labels.column, labels.task, list(labels.names), stratify, *labels.further]
    if sampling is not None:
        description["sampling"] = dict(sampling)
    if built.gene_medians is not None:
        description["gene_medians"] = built.gene_medians.tolist()
        notices = [*notices, _medians_notice(info, built.gene_medians)]
    common: dict[str, Any] = {
        "shuffle_block": shuffle_block,
        "shuffle_window": shuffle_window,
        "num_workers": num_workers,
        "description": description,
        "layout": layout,
        "labels": labels,
    }
    # Each source has a reader of its own, so that evaluating does not drop what training reads ahead; mapped
    # files share their pages anyway.
    names = _columns_read(info, built, labels)
    source = CellSource(
        open_reader(info, names), built, masks, training, **common, sampling=balanced, notices=notices
    )
    if validation is not None:
        reader = open_reader(info, names)
        source.validation = CellSource(reader, built, masks, validation, **common, is_validation=True)
    return source


class Sampling(NamedTuple):
    """Hold the class of each cell that training draws are balanced over."""

    classes: NDArray[np.int32]  # [num_cells], -100 for cells without a label, which count as one class
    warmup_epochs: int


def _labels(info: CorpusInfo, label: str | Sequence[str] | None, task: LabelTask) -> LabelColumn | None:
    if task not in get_args(LabelTask):
        raise DataError(f"label_task is {task!r}; it must be {' | '.join(get_args(LabelTask))}")
    if not label:
        return None
    return open_labels(info, label, task)


def _split(
    info: CorpusInfo,
    labels: LabelColumn | None,
    stratify: bool,
    val_fraction: float,
    split_seed: int,
    limit_cells: int | None,
) -> tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None, list[str]]:
    """Return the masks of training and validation cells, and notices."""
    training, validation = part_masks(info.num_cells, val_fraction, split_seed, limit_cells)
    if not stratify:
        return training, validation, []
    if labels is None or labels.task == "regression":
        raise DataError(
            "stratify: true splits by the classes of a label; set label to an obs column of classes"
        )
    codes = read_labels(info, labels)
    return stratified_masks(codes, labels.names, val_fraction, split_seed, limit_cells)


def _tokenizer(info: CorpusInfo, options: Mapping[str, Any], layout: Layout) -> Tokenizer:
    """Build the tokenizer of a corpus, and refuse padding that the layout is there to avoid."""
    num_genes = len(info.gene_space)
    built = build_tokenizer(
        options,
        value_kind=info.manifest.value_kind,
        measured=[source.measured_mask(num_genes) for source in info.manifest.sources],
        genes=info.gene_space,
    )
    if layout != "padded" and built.padding == "max_genes":
        raise DataError(
            f"layout: {layout} avoids padding, and tokenizer.padding: max_genes asks for it; leave one of them out"
        )
    return built


def _warn_of_row_groups(info: CorpusInfo, shuffle_block: int, shuffle_window: int) -> None:
    """Say what the shuffling costs where it reads Parquet row groups several times."""
    is_whole = shuffle_block >= ROWS_PER_GROUP or info.num_cells <= shuffle_window
    if info.manifest.storage == "parquet" and not is_whole:
        _logger.warning(
            "%s: Parquet row groups of %d cells are decoded whole for %d cells each; shuffle_block: %d with "
            "shuffle_window: %d reads them once",
            info.path, ROWS_PER_GROUP, shuffle_block, ROWS_PER_GROUP, 16 * ROWS_PER_GROUP,
        )  # fmt: skip


def _columns_read(info: CorpusInfo, tokenizer: Tokenizer, labels: LabelColumn | None) -> list[str]:
    """Return the columns of the corpus that batches need beside genes and counts."""
    names = [*(name for name in _LABEL_COLUMNS if name in info.columns), *tokenizer.columns]
    if labels is not None:
        names += [name for name in labels.columns if name not in names]
    return names


def _medians_notice(info: CorpusInfo, medians: NDArray[np.float32]) -> str:
    num_known = int(np.isfinite(medians).sum())
    return (
        f"gene_medians: {num_known:,} of the {len(medians):,} genes of {info.path} have a median; the others are left "
        "out of every cell"
    )


def _sampling(info: CorpusInfo, options: Mapping[str, Any]) -> Sampling:
    table = Options(options, "sampling")
    column = table.text("column")
    warmup_epochs = table.count("warmup_epochs", 0, minimum=0)
    table.finish()
    return Sampling(read_labels(info, open_labels(info, column, where="sampling.column")), warmup_epochs)
