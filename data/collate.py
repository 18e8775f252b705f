"""Lay tokenized cells out as the tensors of a batch: padded to rows of one length, or packed one after the other."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.masking import IGNORED_LABEL, MaskedCells
from data.ragged import line_up, offsets_of, pad, row_mask
from data.tokenizers import CLS, NUM_SPECIAL_TOKENS, PAD, TokenizedCells

PACKED_MULTIPLE = 16
"""Packed tokens are filled up to a multiple of this, which FP8 matrix products need."""


def num_cells(batch: Mapping[str, Any]) -> int:
    """Count the cells of a batch: rows of `tokens`, or, packed, the stretches that `cu_seqlens` [B + 1] bounds."""
    if "cu_seqlens" in batch:
        return len(batch["cu_seqlens"]) - 1
    return int(batch["tokens"].shape[0])


def collate(
    cells: TokenizedCells, masked: MaskedCells | None, *, prepend_cls: bool, width: int | None = None
) -> dict[str, Any]:
    """Return `tokens`, `values`, `attention_mask`, `num_tokens`, with binning `bins`, with masking the labels.

    Args:
        cells: as the tokenizer gives them.
        masked: the same cells after masking, or None.
        prepend_cls: put a cls token in front of each cell.
        width: columns of the tensors; None takes the longest cell's.
    """
    starts, sizes = cells.offsets[:-1], np.diff(cells.offsets)
    lengths = sizes + prepend_cls
    width = int(lengths.max(initial=1)) if width is None else width

    def laid_out(flat: NDArray[Any], fill: int, first: int, dtype: type) -> torch.Tensor:
        lead = first if prepend_cls else None
        return torch.from_numpy(pad(flat, starts, sizes, width, fill, lead, dtype))

    batch = _inputs(cells, masked, laid_out) | {
        "attention_mask": torch.from_numpy(row_mask(lengths, width)),
        "num_tokens": int(lengths.sum()),
    }
    if masked is not None:
        row = np.searchsorted(cells.offsets, masked.chosen, "right") - 1
        index = row * width + masked.chosen - cells.offsets[row] + prepend_cls
        batch |= _labels(cells, masked, (len(sizes), width), index)
    return batch


def collate_packed(cells: TokenizedCells, masked: MaskedCells | None, *, prepend_cls: bool) -> dict[str, Any]:
    """Return what `collate` does with all cells in one row [1, T], without padding between them.

    In place of `attention_mask` there are `cu_seqlens`, int32 [B + 1]: cell i has the tokens from `cu_seqlens[i]` to
    before `cu_seqlens[i + 1]`; and `max_length`, the tokens of the longest cell. `masked_index` counts along T. The
    tokens after the last cell belong to none and fill T up to a multiple of 16.
    """
    sizes = np.diff(cells.offsets)
    offsets = offsets_of(sizes + prepend_cls)
    total = int(offsets[-1])
    width = -(-total // PACKED_MULTIPLE) * PACKED_MULTIPLE

    def laid_out(flat: NDArray[Any], fill: int, first: int, dtype: type) -> torch.Tensor:
        lead = first if prepend_cls else None
        return torch.from_numpy(line_up(flat, cells.offsets, width, fill, lead, dtype)).unsqueeze(0)

    batch = _inputs(cells, masked, laid_out) | {
        "cu_seqlens": torch.from_numpy(offsets.astype(np.int32)),
        "max_length": int(np.diff(offsets).max(initial=1)),
        "num_tokens": total,
    }
    if masked is not None:
        row = np.searchsorted(cells.offsets, masked.chosen, "right") - 1
        batch |= _labels(cells, masked, (1, width), masked.chosen + (row + 1) * prepend_cls)
    return batch


def _inputs(
    cells: TokenizedCells, masked: MaskedCells | None, laid_out: Callable[..., torch.Tensor]
) -> dict[str, Any]:
    """Lay out what the model sees."""
    shown = cells if masked is None else masked
    tokens = cells.genes + np.int32(NUM_SPECIAL_TOKENS) if masked is None else masked.tokens
    batch: dict[str, Any] = {
        "tokens": laid_out(tokens, PAD, CLS, np.int64),
        "values": laid_out(shown.values, 0, 0, np.float32),
    }
    if shown.bins is not None:
        batch["bins"] = laid_out(shown.bins, 0, 0, np.int64)
    return batch


def _labels(
    cells: TokenizedCells, masked: MaskedCells, shape: tuple[int, int], index: NDArray[np.int64]
) -> dict[str, Any]:
    """Lay out what is to be predicted at the flat positions `index`, and list these."""
    labels = np.full(shape, IGNORED_LABEL, np.int64)
    labels.reshape(-1)[index] = masked.labels
    nothing = IGNORED_LABEL if cells.bins is not None else np.nan
    value_labels = np.full(shape, nothing, np.float32 if cells.bins is None else np.int64)
    value_labels.reshape(-1)[index] = masked.value_labels
    arrays = {"labels": labels, "value_labels": value_labels, "masked_index": index}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
