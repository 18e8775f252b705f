"""Hugging Face data sets (`load_from_disk` folders, Parquet files) as a source of batches."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data.columns import Columns, RaggedColumn, RowTable
from data.errors import DataError
from data.hashing import DrawKey, sha256_of
from data.hf_files import TechnicalBatch, find_files
from data.masking import IGNORED_LABEL, Masking, build_masking
from data.order import part_masks
from data.ragged import positions, row_mask
from data.technical_batches import batch_indices

_MADE_HERE = ("batch_idx", "cell_index", "labels", "masked_index", "num_tokens")


class SpecialIds(NamedTuple):
    """Hold the token ids that are no words of the data set's vocabulary."""

    pad: int
    mask: int | None
    others: tuple[int, ...]
    """Further ids (cls, eos, ...) that are neither masked nor put in place of a masked token."""


class HFSource:
    """Fetch padded batches of a Hugging Face data set by row numbers.

    List columns become [B, N] tensors, filled up with zeros (`tokens`: with the pad id), columns of numbers
    become [B] tensors: int64 or float32. `attention_mask` and `num_tokens` come from the lengths of `tokens`.
    """

    is_inline = False

    def __init__(
        self,
        table: RowTable,
        columns: Mapping[str, str],
        special: SpecialIds,
        *,
        vocab_size: int | None,
        max_length: int | None,
        masking: Masking | None,
        row_mask: NDArray[np.bool_] | None,
        technical_batch: TechnicalBatch | None,
        where: str,
        description: Mapping[str, Any],
        shuffle_block: int = 64,
        shuffle_window: int = 8192,
        num_workers: int = 0,
        is_validation: bool = False,
    ) -> None:
        """Take what `hf_loader` opened; `description` is what the fingerprint is made of."""
        self.table = table
        self.columns = dict(columns)
        self.special = special
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.masking = masking
        self.row_mask = row_mask
        self.validation: HFSource | None = None
        self.shuffle_block, self.shuffle_window = shuffle_block, shuffle_window
        self.num_workers = num_workers
        self.unique_batches = [] if technical_batch is None else list(technical_batch.names)
        self._batch_codes = None if technical_batch is None else technical_batch.codes
        self._batch_index = np.arange(len(self.unique_batches))
        self._where = where
        self._description = dict(description)
        self._is_validation = is_validation
        if vocab_size is not None:
            excluded = [special.pad, special.mask, *special.others]
            self._vocabulary = np.setdiff1d(np.arange(vocab_size), [i for i in excluded if i is not None])

    def __len__(self) -> int:
        """Count the rows; `row_mask` says which of them take part."""
        return self.table.num_rows

    def fetch(self, rows: NDArray[np.int64], draw: DrawKey) -> dict[str, Any]:
        """Return the batch of these rows; what is random is drawn from `draw` and the row."""
        return self._fetch(rows, draw, self.masking)

    def fetch_unmasked(self, rows: NDArray[np.int64], draw: DrawKey) -> dict[str, Any]:
        """Return the batch of these rows without masking."""
        return self._fetch(rows, draw, None)

    def expect(self, rows: NDArray[np.int64]) -> None:
        """Read ahead rows that will be fetched soon; no rows: stop reading ahead."""
        self.table.expect(rows)

    def set_batch_mapping(self, mapping: Mapping[str, int]) -> None:
        """Let `batch_idx` hold the run's index of each technical batch."""
        self._batch_index = batch_indices(self.unique_batches, mapping, self._where)

    def facts(self) -> dict[str, Any]:
        """Return what a model's sizes depend on, as far as it was given."""
        facts = {"vocab_size": self.vocab_size, "max_length": self.max_length}
        return {name: value for name, value in facts.items() if value is not None}

    def fingerprint(self) -> str:
        """Identify the data set by its files' names and rows, and how it is read."""
        content = {**self._description, "rows": self.table.num_rows}
        return sha256_of(content)

    def _fetch(self, rows: NDArray[np.int64], draw: DrawKey, masking: Masking | None) -> dict[str, Any]:
        if self._is_validation:
            draw = draw._replace(epoch=-1)
        columns = self._cut(self.table.gather(rows))
        tokens = self._tokens(columns)
        width = int(tokens.lengths.max(initial=1))
        batch: dict[str, Any] = {
            "attention_mask": torch.from_numpy(row_mask(tokens.lengths, width)),
            "num_tokens": int(tokens.lengths.sum()),
            "cell_index": torch.from_numpy(rows.astype(np.int64)),
        }
        batch |= {
            name: _tensor(name, columns[theirs], self.special.pad) for name, theirs in self.columns.items()
        }
        self._check_tokens(tokens, batch["tokens"], rows)
        if masking is not None:
            batch |= self._masked(tokens, rows, draw, masking, width)
            if "values" in batch:
                batch["values"].view(-1)[batch["masked_index"]] = 0
        if self._batch_codes is not None:
            batch["batch_idx"] = torch.from_numpy(self._batch_index[self._batch_codes[rows]])
        return batch

    def _tokens(self, columns: Columns) -> RaggedColumn:
        name = self.columns["tokens"]
        column = columns[name]
        if not isinstance(column, RaggedColumn):
            raise DataError(
                f"{self._where}: columns.tokens: {name!r} holds one number a row; tokens are lists"
            )
        return column

    def _cut(self, columns: Columns) -> Columns:
        """Cut the tokens, and the lists that are as long, to `max_length`."""
        if self.max_length is None:
            return columns
        tokens = self._tokens(columns)
        return {
            name: column.cut(self.max_length)
            if isinstance(column, RaggedColumn) and np.array_equal(column.lengths, tokens.lengths)
            else column
            for name, column in columns.items()
        }

    def _check_tokens(self, column: RaggedColumn, tokens: torch.Tensor, rows: NDArray[np.int64]) -> None:
        if (column.lengths == 0).any():
            row = rows[column.lengths == 0][0]
            raise DataError(f"{self._where}: row {row} has no token; leave such rows out")
        if self.vocab_size is None:
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"{self._where}: token ids reach from {low} to {high}; vocab_size {self.vocab_size} allows 0 to "
                f"{self.vocab_size - 1}"
            )

    def _masked(
        self, tokens: RaggedColumn, rows: NDArray[np.int64], draw: DrawKey, masking: Masking, width: int
    ) -> dict[str, torch.Tensor]:
        """Return the tokens as shown, the labels and where they are."""
        shown, offsets = tokens.values.astype(np.int64), tokens.offsets
        assert self.special.mask is not None
        ids = [self.special.pad, self.special.mask, *self.special.others]
        maskable = np.flatnonzero(~np.isin(shown, ids))
        places = positions(offsets)[maskable]
        chosen, counts = masking.choose(np.searchsorted(maskable, offsets), places, rows, draw)
        hidden = maskable[chosen]
        truth = shown[hidden]
        shown[hidden] = masking.shown_tokens(
            truth, places[chosen], counts, rows, draw, self.special.mask, self._vocabulary
        )
        row = np.searchsorted(offsets, hidden, "right") - 1
        index = row * width + hidden - offsets[row]
        labels = np.full((len(tokens), width), IGNORED_LABEL, np.int64)
        labels.reshape(-1)[index] = truth
        laid_out = RaggedColumn.flat(offsets, shown).padded(width, self.special.pad)
        arrays = {"tokens": laid_out, "labels": labels, "masked_index": index}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def hf_loader(
    path: str | Path | Sequence[str],
    *,
    columns: Mapping[str, str],
    format: Literal["auto", "arrow", "parquet"] = "auto",
    split: str | None = None,
    vocab_size: int | None = None,
    pad_id: int = 0,
    mask_id: int | None = None,
    special_ids: Sequence[int] = (),
    masking: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    technical_batch: str | None = None,
    val_fraction: float = 0.0,
    split_seed: int = 0,
    limit_cells: int | None = None,
    shuffle_block: int = 64,
    shuffle_window: int = 8192,
    num_workers: int = 0,
) -> HFSource:
    """Open a Hugging Face data set as a source of batches; `data.hf.hf_loader` in a config.

    Args:
        path: a folder written by `save_to_disk`, a folder of Parquet files, or Parquet files; fsspec URLs too.
        columns: name in the batch -> column of the data set, such as {tokens: input_ids, length: length} for
            Geneformer's. `tokens` is needed; `values` beside it is hidden where tokens are masked.
        format: how the data set is stored; `auto` looks.
        split: which part of a `DatasetDict` folder.
        vocab_size: number of token ids; needed for masking, checked where given.
        pad_id: token id that rows are filled up with.
        mask_id: token id that hides a masked token; needed for masking.
        special_ids: further ids (cls, eos, ...) that are neither masked nor put in a masked token's place.
        masking: mask_ratio, random_replace_ratio and keep_ratio; None leaves batches unmasked.
        max_length: tokens of a row that are kept; None keeps all.
        technical_batch: column (text, ClassLabel or whole number) that names each row's technical batch.
        val_fraction: share of the rows that is held out for validation.
        split_seed: seed of the split and of `limit_cells`.
        limit_cells: number of rows to take part, a seeded random choice; None takes all.
        shuffle_block: neighbouring rows that are read together.
        shuffle_window: rows that are shuffled among each other, a multiple of `shuffle_block`.
        num_workers: processes that prepare batches; 0 leaves it to one background thread.
    """
    masks = _checked_masking(columns, masking, vocab_size, mask_id)
    files = find_files(path, format, split)
    wanted = list(dict.fromkeys(columns.values()))
    files.check_columns([*wanted, *([technical_batch] if technical_batch is not None else [])])
    batches = None if technical_batch is None else files.technical_batch(technical_batch)
    table = files.table(wanted)
    training, validation = part_masks(table.num_rows, val_fraction, split_seed, limit_cells)
    description = {
        "files": [name.rsplit("/", 1)[-1] for name in files.paths],
        "columns": dict(columns),
        "ids": [vocab_size, pad_id, mask_id, *special_ids],
        "masking": None if masking is None else dict(masking),
        "max_length": max_length,
        "split": [val_fraction, split_seed, limit_cells],
        "shuffle": [shuffle_block, shuffle_window],
    }
    common: dict[str, Any] = {
        "columns": columns,
        "special": SpecialIds(pad_id, mask_id, tuple(special_ids)),
        "vocab_size": vocab_size,
        "max_length": max_length,
        "masking": masks,
        "technical_batch": batches,
        "shuffle_block": shuffle_block,
        "shuffle_window": shuffle_window,
        "num_workers": num_workers,
        "where": files.where,
        "description": description,
    }
    source = HFSource(table, **common, row_mask=training)
    if validation is not None:
        source.validation = HFSource(files.table(wanted), **common, row_mask=validation, is_validation=True)
    return source


def _checked_masking(
    columns: Mapping[str, str],
    options: Mapping[str, Any] | None,
    vocab_size: int | None,
    mask_id: int | None,
) -> Masking | None:
    """Check the column mapping and what masking needs, and build the masking."""
    if "tokens" not in columns:
        raise DataError(f"columns: no column is mapped to tokens; got {', '.join(columns) or 'nothing'}")
    taken = [name for name in columns if name in _MADE_HERE]
    if taken:
        raise DataError(f"columns: {', '.join(taken)} cannot be mapped, the loader makes it itself")
    if options is None:
        return None
    missing = [name for name, value in (("vocab_size", vocab_size), ("mask_id", mask_id)) if value is None]
    if missing:
        raise DataError(f"masking: {' and '.join(missing)} must be given to mask this data set")
    if "bins" in columns:
        raise DataError("masking: the bins of masked tokens cannot be hidden; map values instead of bins")
    if options.get("target", "gene") != "gene":
        raise DataError(f"masking.target: got {options['target']!r}; it must be gene for such a data set")
    return build_masking(options)


def _tensor(name: str, column: NDArray[Any] | RaggedColumn, pad_id: int) -> torch.Tensor:
    """Turn a column into a tensor: [B, N] of lists, [B] of numbers."""
    if not isinstance(column, RaggedColumn):
        return torch.from_numpy(column.astype(np.float32 if column.dtype.kind == "f" else np.int64))
    width = int(column.lengths.max(initial=1))
    dtype = np.float32 if column.dtype.kind == "f" else np.int64
    tensor = torch.from_numpy(column.padded(width, pad_id if name == "tokens" else 0, dtype))
    return tensor.bool() if name == "attention_mask" else tensor
