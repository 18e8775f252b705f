"""Ragged rows: values of many cells in one flat array, cut into cells by `offsets` [B + 1].

Cells hold a thousand values or more, so moving a whole cell at a time (`bytes.join` copies each piece in C)
is several times faster than moving elements by index; short rows go by index.
"""

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LONG_ROW = 64
_ALL_BITS = (1 << 32) - 1


def offsets_of(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Return the offsets [B + 1] of rows with the given lengths."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def row_numbers(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the row that each element belongs to."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def positions(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each element's position inside its row."""
    return np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))


def gather(values: NDArray[Any], starts: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[Any]:
    """Copy `values[start : start + length]` of each row, one after the other, into a new array."""
    total = int(lengths.sum())
    if total < _LONG_ROW * len(lengths):
        index = np.arange(total)
        index += np.repeat(starts - offsets_of(lengths)[:-1], lengths)
        return values[index]
    view, stops = values.data, starts + lengths
    rows = [view[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
    return np.frombuffer(bytearray().join(rows), values.dtype)


def pad(
    values: NDArray[Any],
    starts: NDArray[np.integer],
    lengths: NDArray[np.integer],
    width: int,
    fill: Any,
    first: Any = None,
    dtype: Any = None,
) -> NDArray[Any]:
    """Lay `values[start : start + length]` of each row out as [B, width], cut or filled up with `fill`.

    `first`, where given, is put in front of each row. `dtype` is what the result is cast to: laying out narrow
    numbers and casting them then moves less memory than laying out wide ones.
    """
    num_rows = len(lengths)
    lead = 0 if first is None else 1
    room = width - lead
    lengths = np.minimum(lengths, room)
    if int(lengths.sum()) < _LONG_ROW * num_rows:
        result = np.full((num_rows, width), fill, values.dtype)
        if lead:
            result[:, 0] = first
        result[:, lead:][row_mask(lengths, room)] = gather(values, starts, lengths)
    else:
        view, filler = values.data, np.full(room, fill, values.dtype).data
        bounds = zip(starts.tolist(), (starts + lengths).tolist(), strict=True)
        every = 2 + lead
        pieces: list[Any] = [np.array([first] * lead, values.dtype).data] * (every * num_rows)
        pieces[lead::every] = [view[start:stop] for start, stop in bounds]
        pieces[lead + 1 :: every] = [filler[length:] for length in lengths.tolist()]
        result = np.frombuffer(bytearray().join(pieces), values.dtype).reshape(num_rows, width)
    return result if dtype is None else result.astype(dtype, copy=False)


def line_up(
    values: NDArray[Any],
    offsets: NDArray[np.int64],
    width: int,
    fill: Any,
    first: Any = None,
    dtype: Any = None,
) -> NDArray[Any]:
    """Lay all rows out one after the other as [width], filled up with `fill` behind the last one.

    `first`, where given, is put in front of each row. `dtype` is what the result is cast to.
    """
    num_rows = len(offsets) - 1
    lead = 0 if first is None else 1
    filler = np.full(width - int(offsets[-1]) - lead * num_rows, fill, values.dtype)
    view = values.data
    bounds = offsets.tolist()
    pieces: list[Any] = [np.array([first] * lead, values.dtype).data] * (2 * num_rows)
    pieces[1::2] = [view[start:stop] for start, stop in itertools.pairwise(bounds)]
    result = np.frombuffer(bytearray().join([*pieces, filler.data]), values.dtype)
    return result if dtype is None else result.astype(dtype, copy=False)


def row_mask(lengths: NDArray[np.integer], width: int) -> NDArray[np.bool_]:
    """Return bool [B, width], true at the first `length` places of each row."""
    return np.arange(width, dtype=np.int32) < lengths.astype(np.int32)[:, None]


def sort_rows(keys: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[Any]:
    """Sort unsigned keys inside each row."""
    mask = row_mask(np.diff(offsets), int(np.diff(offsets).max(initial=0)))
    table = np.full(mask.shape, ~keys.dtype.type(0), keys.dtype)
    table[mask] = keys
    table.sort(axis=1)
    return table[mask]


def choose_smallest(
    hashes: NDArray[np.uint32], offsets: NDArray[np.int64], counts: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Choose in each row the `counts` elements with the smallest hash; ties go to the earlier element.

    Hashes should be uniform over 32 bits: only elements up to little above the expected threshold are looked
    at. The choice is exact for any hashes.

    Returns:
        int64 [sum(counts)], the flat positions of the chosen elements, ascending.
    """
    lengths = np.diff(offsets)
    counts = np.minimum(counts, lengths)
    # Where more than half is chosen, the largest that are not are looked for instead: flipped bits turn the
    # order around.
    is_flipped = counts > lengths // 2
    fewer = np.where(is_flipped, lengths - counts, counts)
    flips = np.where(is_flipped, np.uint32(_ALL_BITS), np.uint32(0))
    if is_flipped.any():
        hashes = hashes ^ np.repeat(flips, lengths)
    margin = fewer + 6 * np.sqrt(fewer) + 12
    limits = np.minimum(margin / np.maximum(lengths, 1), 1.0) * float(_ALL_BITS)
    limits[fewer == 0] = 0
    while True:
        candidates = np.flatnonzero(hashes <= np.repeat(limits.astype(np.uint32), lengths))
        bounds = np.searchsorted(candidates, offsets)
        found = np.diff(bounds)
        is_short = found < fewer
        if not is_short.any():
            break
        limits[is_short] = float(_ALL_BITS)
    places = np.repeat(flips, found)
    keys = (hashes[candidates].astype(np.uint64) << np.uint64(32)) | (candidates.astype(np.uint32) ^ places)
    ordered = sort_rows(keys, bounds).astype(np.uint32) ^ places
    is_chosen = np.repeat(is_flipped, lengths)
    is_first = positions(bounds) < np.repeat(fewer, found)
    is_chosen[ordered[is_first]] = np.repeat(~is_flipped, fewer)
    return np.flatnonzero(is_chosen)
