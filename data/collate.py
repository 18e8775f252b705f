"""Lay tokenized cells out as the padded tensors of a batch."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.masking import IGNORED_LABEL, MaskedCells
from data.ragged import pad, row_mask
from data.tokenizers import CLS, NUM_SPECIAL_TOKENS, PAD, TokenizedCells


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

    tokens = cells.genes + np.int32(NUM_SPECIAL_TOKENS) if masked is None else masked.tokens
    bins = cells.bins if masked is None else masked.bins
    batch: dict[str, Any] = {
        "tokens": laid_out(tokens, PAD, CLS, np.int64),
        "values": laid_out(cells.values if masked is None else masked.values, 0, 0, np.float32),
        "attention_mask": torch.from_numpy(row_mask(lengths, width)),
        "num_tokens": int(lengths.sum()),
    }
    if bins is not None:
        batch["bins"] = laid_out(bins, 0, 0, np.int64)
    if masked is not None:
        batch |= _labels(cells, masked, width, prepend_cls)
    return batch


def _labels(cells: TokenizedCells, masked: MaskedCells, width: int, prepend_cls: bool) -> dict[str, Any]:
    """Lay out what is to be predicted, and list where."""
    row = np.searchsorted(cells.offsets, masked.chosen, "right") - 1
    index = row * width + masked.chosen - cells.offsets[row] + prepend_cls
    shape = (len(cells.offsets) - 1, width)
    labels = np.full(shape, IGNORED_LABEL, np.int64)
    labels.reshape(-1)[index] = masked.labels
    nothing = IGNORED_LABEL if cells.bins is not None else np.nan
    value_labels = np.full(shape, nothing, np.float32 if cells.bins is None else np.int64)
    value_labels.reshape(-1)[index] = masked.value_labels
    arrays = {"labels": labels, "value_labels": value_labels, "masked_index": index}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
