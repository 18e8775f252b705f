"""Counter-based hashes: every order, split, mask and draw is a pure function of integers.

The numbers are splitmix64 (Steele, Lea and Flood 2014), so they are the same on every machine and for every
release; NumPy's own generators promise neither across versions.
"""

import hashlib
import json
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB
# Arrays are hashed in pieces that stay in the second-level cache: seven passes over memory would cost more
# than the arithmetic.
_PIECE = 16_384


class Stream(IntEnum):
    """Name what a hash is drawn for, so that two uses of the same keys never share numbers."""

    BLOCK_ORDER = 1
    ROW_ORDER = 2
    SPLIT = 3
    SUBSET = 4
    MASK_POSITION = 5
    MASK_ACTION = 6
    MASK_TARGET = 7
    RANDOM_GENE = 8
    GENE_SELECTION = 9
    SAMPLE_SEED = 10
    SAMPLE_KIND = 11
    SAMPLE_CLASS = 12
    SAMPLE_CELL = 13
    FIT_SAMPLE = 14
    MASK_ROUNDING = 15
    SET_CELLS = 21
    SET_CONTROLS = 22
    SET_NOISE = 23
    PREDICTED_SIDE = 24
    PREDICTED_VALUE = 25
    PREDICTED_ROUNDING = 26
    PREDICTED_CELL = 27
    CIRCUIT_CONTENT = 31
    CIRCUIT_SPLIT = 32
    CIRCUIT_BALANCE = 33
    CIRCUIT_SUBSET = 34
    SIZE_ORDER = 35
    SIZE_BATCH_ORDER = 36


class DrawKey(NamedTuple):
    """Name what masks, gene selections and noise are drawn from, together with the cell's row."""

    seed: int
    phase: int
    epoch: int
    """-1 in validation, whose masks are the same in every epoch."""

    def cell_hashes(self, stream: Stream, rows: NDArray[np.integer]) -> NDArray[np.uint64]:
        """Give each cell its hash for one purpose."""
        return stateless_hash(self.seed, self.phase, self.epoch, stream, index=rows)

    def noise_seeds(self, rows: NDArray[np.integer]) -> NDArray[np.int64]:
        """Give each row the seed of its noise, which is never negative."""
        return (self.cell_hashes(Stream.SET_NOISE, rows) >> np.uint64(1)).astype(np.int64)


def mix(value: int) -> int:
    """Scramble one 64-bit integer (the finaliser of splitmix64)."""
    value &= _WORD
    value = ((value ^ (value >> 30)) * _MULTIPLY_1) & _WORD
    value = ((value ^ (value >> 27)) * _MULTIPLY_2) & _WORD
    return value ^ (value >> 31)


def combine_keys(*keys: int) -> int:
    """Fold integers (negative ones too) into one 64-bit state; the order of the keys matters."""
    state = 0
    for key in keys:
        state = mix(((state ^ (int(key) & _WORD)) + _GAMMA) & _WORD)
    return state


def splitmix64(state: int | NDArray[np.uint64], index: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Give the `index`-th output of splitmix64 seeded with `state`, elementwise; `state` may be an array.

    For one state the map from index to output is a bijection, so distinct indices never tie.
    """
    index = np.asarray(index)
    flat = index.reshape(-1)
    states = state if isinstance(state, np.ndarray) else None
    if states is not None:
        states = np.broadcast_to(states, index.shape).reshape(-1)
    result = np.empty(len(flat), np.uint64)
    scratch = np.empty(min(len(flat), _PIECE), np.uint64)
    gamma, offset = np.uint64(_GAMMA), np.uint64(_GAMMA if states is not None else (state + _GAMMA) & _WORD)
    for start in range(0, len(flat), _PIECE):
        piece = result[start : start + _PIECE]
        np.copyto(piece, flat[start : start + _PIECE], casting="unsafe")
        piece *= gamma
        piece += offset
        if states is not None:
            piece += states[start : start + _PIECE]
        _finalise(piece, scratch[: len(piece)])
    return result.reshape(index.shape)


def stateless_hash(*keys: int, index: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Hash each element of `index` under the given keys."""
    return splitmix64(combine_keys(*keys), index)


def gene_hash(
    cell_hashes: NDArray[np.uint64], lengths: NDArray[np.integer], genes: NDArray[np.integer]
) -> NDArray[np.uint32]:
    """Hash (cell, gene) pairs of a ragged batch to 32 bits, at a quarter of what `splitmix64` costs.

    The rounds are those of MurmurHash3's finaliser. The cell's two 32-bit words enter in front of one round
    each, so no two cells share a sequence that is merely shifted along the genes.

    Args:
        cell_hashes: uint64 [B], one hash for each cell.
        lengths: [B], the number of genes of each cell.
        genes: [T], integers in [0, 2**32), the cells' genes one after the other.
    """
    low = np.repeat(cell_hashes.astype(np.uint32), lengths)
    high = np.repeat((cell_hashes >> np.uint64(32)).astype(np.uint32), lengths)
    result = np.empty(len(genes), np.uint32)
    scratch = np.empty(min(len(genes), _PIECE), np.uint32)
    for start in range(0, len(genes), _PIECE):
        part = slice(start, start + _PIECE)
        piece = result[part]
        shifted = scratch[: len(piece)]
        np.copyto(piece, genes[part], casting="unsafe")
        np.multiply(piece, np.uint32(0x9E3779B1), out=piece)
        np.bitwise_xor(piece, low[part], out=piece)
        _fold(piece, 16, shifted)
        np.multiply(piece, np.uint32(0x85EBCA6B), out=piece)
        np.bitwise_xor(piece, high[part], out=piece)
        _fold(piece, 13, shifted)
        np.multiply(piece, np.uint32(0xC2B2AE35), out=piece)
        _fold(piece, 16, shifted)
    return result


def uniform(*keys: int, index: NDArray[np.integer]) -> NDArray[np.float64]:
    """Draw a float in [0, 1) for each element of `index` under the given keys."""
    return to_uniform(stateless_hash(*keys, index=index))


def to_uniform(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn hashes into floats in [0, 1) of 53 random bits."""
    return (hashes >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))


def to_range(hashes: NDArray[np.uint64] | NDArray[np.uint32], limit: int) -> NDArray[np.int64]:
    """Turn 64-bit or 32-bit hashes into integers in [0, limit); the bias is below limit / 2**32."""
    high = hashes >> np.uint64(32) if hashes.dtype == np.uint64 else hashes.astype(np.uint64)
    return ((high * np.uint64(limit)) >> np.uint64(32)).astype(np.int64)


def sha256_of(settings: Any) -> str:
    """Identify settings that JSON can hold, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _finalise(value: NDArray[np.uint64], scratch: NDArray[np.uint64]) -> None:
    """Apply `mix` in place."""
    _fold(value, 30, scratch)
    np.multiply(value, np.uint64(_MULTIPLY_1), out=value)
    _fold(value, 27, scratch)
    np.multiply(value, np.uint64(_MULTIPLY_2), out=value)
    _fold(value, 31, scratch)


def _fold(value: NDArray[Any], bits: int, scratch: NDArray[Any]) -> None:
    """XOR the value's high bits onto its low ones, in place."""
    np.right_shift(value, value.dtype.type(bits), out=scratch)
    np.bitwise_xor(value, scratch, out=value)
