"""Cells as dense rows of value tokens, one for each gene: what a perturbation model is pretrained on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.corpus import CorpusInfo, open_corpus
from data.errors import DataError
from data.gene_columns import HIDDEN, GeneColumns, Unmeasured
from data.hashing import DrawKey, sha256_of
from data.memory import keep_freed_memory
from data.order import part_masks
from data.perturbation_targets import check_known, counted
from data.readers import CorpusReader, number_pieces, open_reader
from data.technical_batches import batch_indices
from data.tokenizers import ExpressionTransform
from data.value_tokenizers import ValueTokenizer, build_value_tokenizer

_CELLS_TO_FIT = 2048


class ExpressionSource:
    """Fetch batches of cells over a fixed list of genes by row numbers.

    A batch of B cells over N genes holds these CPU tensors, int64 where nothing else is said: `tokens` [B, N] (-1 for a
    gene hidden by `unmeasured: hide`), `batch_idx` [B] and `cell_type_idx` [B] where the corpus has them, `cell_index`
    [B] (row of the corpus), `depth` float32 [B] (log1p of the sum of the cell's stored values), `noise_seed` [B] (a
    number of its own for each cell in each epoch, never negative), and the Python number `num_tokens`.
    """

    is_inline = False

    def __init__(
        self,
        reader: CorpusReader,
        columns: GeneColumns,
        tokenizer: ValueTokenizer,
        transform: ExpressionTransform,
        row_mask: NDArray[np.bool_] | None,
        *,
        description: Mapping[str, Any],
        shuffle_block: int = 64,
        shuffle_window: int = 8192,
        num_workers: int = 0,
        is_validation: bool = False,
        notices: Sequence[str] = (),
    ) -> None:
        """Take what `expression_loader` opened; `description` is what the fingerprint is made of."""
        self.reader = reader
        self.columns = columns
        self.tokenizer = tokenizer
        self.transform = transform
        self.row_mask = row_mask
        self.shuffle_block, self.shuffle_window = shuffle_block, shuffle_window
        self.num_workers = num_workers
        self.notices = list(notices)
        """What the user should know of how the cells were read, for the run's start-up account."""
        self.validation: ExpressionSource | None = None
        self.unique_batches = list(reader.info.manifest.technical_batches)
        self._batch_index = np.arange(len(self.unique_batches))
        self._description = dict(description)
        self._is_validation = is_validation
        keep_freed_memory()

    def __len__(self) -> int:
        """Count the rows of the corpus; `row_mask` says which of them take part."""
        return self.reader.num_rows

    def fetch(self, rows: NDArray[np.int64], draw: DrawKey) -> dict[str, Any]:
        """Return the batch of these rows; only the seeds of the noise depend on `draw`."""
        if self._is_validation:
            draw = draw._replace(epoch=-1)
        cells = self.reader.read(rows)
        values = self.transform.apply(cells.counts, cells.offsets, cells.columns["total"])
        tokens = self.columns.dense(cells, self.tokenizer.encode(values), 0, np.int64)
        is_measured = self.columns.is_measured(cells)
        if is_measured is not None:
            tokens[~is_measured] = HIDDEN
        arrays: dict[str, NDArray[Any]] = {
            "tokens": tokens,
            "cell_index": rows.astype(np.int64),
            "depth": np.log1p(cells.columns["total"].astype(np.float32)),
            "noise_seed": draw.noise_seeds(rows),
        }
        if "technical_batch" in cells.columns:
            arrays["batch_idx"] = self._batch_index[cells.columns["technical_batch"]]
        if "cell_type" in cells.columns:
            arrays["cell_type_idx"] = cells.columns["cell_type"].astype(np.int64)
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"num_tokens": tokens.size}

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Read ahead rows that will be fetched soon; no rows: stop reading ahead."""
        self.reader.expect(rows)

    def set_batch_mapping(self, mapping: Mapping[str, int]) -> None:
        """Let `batch_idx` hold the run's index of each technical batch, instead of the corpus's own."""
        self._batch_index = batch_indices(self.unique_batches, mapping, str(self.reader.info.path))

    def facts(self) -> dict[str, Any]:
        """Return what a model's sizes depend on; the id that hides a value is `vocab_size`.

        `tokenizer_options`, which checkpoints keep, hold what turns tokens into values again
        (`data.value_tokenizers.ValueTokenizer.from_dict`).
        """
        return {
            "vocab_size": self.tokenizer.num_tokens,
            "n_bins": self.tokenizer.num_tokens,
            "num_genes": len(self.columns),
            "gene_space": self.columns.space,
            "value_kind": self.reader.info.manifest.value_kind,
            "technical_batch_names": list(self.unique_batches),
            "tokenizer_options": {
                "target_sum": self.transform.target_sum,
                "log1p": self.transform.log1p,
                "tokenizer": self.tokenizer.to_dict(),
            },
        }

    def fingerprint(self) -> str:
        """Identify the cells, their split and how they are tokenized."""
        content = {"corpus": self.reader.info.fingerprint, **self._description}
        return sha256_of(content)

    def fit(self) -> ValueTokenizer:
        """Return the tokenizer with the mean of some training cells' values in each bin as its inverse."""
        rows = np.arange(len(self)) if self.row_mask is None else np.flatnonzero(self.row_mask)
        chosen = np.unique(np.linspace(0, len(rows) - 1, _CELLS_TO_FIT).astype(np.int64))
        cells = self.reader.read(rows[chosen])
        return self.tokenizer.fitted(
            self.transform.apply(cells.counts, cells.offsets, cells.columns["total"])
        )


def expression_loader(
    path: str | Path,
    *,
    tokenizer: Mapping[str, Any],
    genes: str | None = None,
    unmeasured: Unmeasured = "zero",
    val_fraction: float = 0.0,
    split_seed: int = 0,
    limit_cells: int | None = None,
    leave_out: Mapping[str, Sequence[str]] | None = None,
    shuffle_block: int = 64,
    shuffle_window: int = 8192,
    num_workers: int = 0,
) -> ExpressionSource:
    """Open a corpus as a source of dense cells; `data.expression.expression_loader` in a config.

    Args:
        path: folder of the corpus, or an fsspec URL of one (Parquet storage).
        tokenizer: options of the value tokenizer, `strategy` among them (see `data.value_tokenizers`).
        genes: file with the genes that are the columns of the batches, in its order; None takes all of the corpus.
        unmeasured: what a gene is in cells of a file that did not measure it: `zero`, or `hide` it as token -1.
        val_fraction: share of the cells that is held out for validation.
        split_seed: seed of the split and of `limit_cells`; not the run's, so that runs share their split.
        limit_cells: number of cells to take part, a seeded random choice; None takes all.
        leave_out: labels by column of the corpus, such as `target_gene: [A, B]`; cells that have one of them take no
            part, also where `limit_cells` chose them. So a phase does not see cells that a later one holds out.
        shuffle_block: neighbouring cells that are read together.
        shuffle_window: cells that are shuffled among each other, a multiple of `shuffle_block`.
        num_workers: processes that prepare batches; 0 leaves it to one background thread.
    """
    info = open_corpus(path)
    columns = GeneColumns(info, genes, unmeasured)
    built, transform, is_fitted = build_value_tokenizer(tokenizer, value_kind=info.manifest.value_kind)
    if built.strategy == "delta_bins":
        raise DataError(
            "tokenizer.strategy: delta_bins is for differences from controls; use log_bins or counts"
        )
    training, validation = part_masks(info.num_cells, val_fraction, split_seed, limit_cells)
    notices = list(columns.notices)
    if leave_out:
        kept = _without(info, leave_out)
        training, validation = _kept(info, training, validation, kept)
        notices.append(f"leave_out: {counted(int((~kept).sum()), 'cell')} of {info.num_cells} take no part")
    labels = [name for name in ("technical_batch", "cell_type") if name in info.columns]
    names = [*columns.reader_columns, *labels]
    common: dict[str, Any] = {
        "shuffle_block": shuffle_block,
        "shuffle_window": shuffle_window,
        "num_workers": num_workers,
        "description": {
            "tokenizer": dict(tokenizer),
            "genes": [columns.space.sha256, unmeasured],
            "split": [val_fraction, split_seed, limit_cells],
            **({"leave_out": {name: list(names) for name, names in leave_out.items()}} if leave_out else {}),
            "shuffle": [shuffle_block, shuffle_window],
        },
    }
    source = ExpressionSource(
        open_reader(info, names), columns, built, transform, training, **common, notices=notices
    )
    if is_fitted:
        source.tokenizer = built = source.fit()
    if validation is not None:
        source.validation = ExpressionSource(
            open_reader(info, names), columns, built, transform, validation, **common, is_validation=True
        )
    return source


def _kept(
    info: CorpusInfo,
    training: NDArray[np.bool_] | None,
    validation: NDArray[np.bool_] | None,
    kept: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """Return the masks of training and validation cells without those that are left out."""
    training = kept if training is None else training & kept
    if not training.any():
        raise DataError(f"{info.path}: leave_out leaves no cell to train on")
    return training, None if validation is None or not (validation & kept).any() else validation & kept


def _without(info: CorpusInfo, leave_out: Mapping[str, Sequence[str]]) -> NDArray[np.bool_]:
    """Mark the cells that have none of these labels."""
    kept = np.ones(info.num_cells, np.bool_)
    for column, names in leave_out.items():
        known = info.class_names(column)
        if isinstance(names, str):
            raise DataError(f"leave_out.{column}: got the text {names!r}; give a list of names")
        for name in names:
            check_known(name, known, f"leave_out.{column}", column)
        codes = np.array([known.index(name) for name in names], np.int64)
        for rows, columns in number_pieces(info, [column]):
            kept[rows] &= ~np.isin(columns[column], codes)
    return kept
