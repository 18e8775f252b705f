"""Random numbers that are pure functions of integer seeds: the same on every device, rank and batch they are drawn in.

Seeds are mixed by splitmix64 (Steele, Lea and Flood 2014); the many numbers of a cell come from the 32-bit rounds of
MurmurHash3's finaliser, in which the two words of the cell's seed enter separately.
"""

from enum import IntEnum

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB


class Purpose(IntEnum):
    """Name what numbers are drawn for, so that two uses of one seed never share any."""

    TIME = 1
    MASK = 2
    RATIO = 3
    PAIRS = 4
    TOKEN = 5
    UNMASK = 6
    CELL = 7
    ITEM = 8
    NOISE = 9
    PERTURBATION = 10
    PROMPT = 11
    UNITARY = 12


def fold(seeds: Tensor, *keys: int | Tensor) -> Tensor:
    """Mix integers, or int64 tensors that broadcast, into int64 seeds of any shape; the order of the keys matters."""
    for key in keys:
        seeds = _mix((seeds ^ key) + _signed(_GAMMA))
    return seeds


def item_seeds(seed: int, items: Tensor) -> Tensor:
    """Return the seeds [B] of numbered items [B] under one seed, whatever batches the items are put in."""
    return fold(torch.full_like(items, seed, dtype=torch.int64), Purpose.ITEM, items.to(torch.int64))


def uniform(seeds: Tensor) -> Tensor:
    """Draw one float64 in [0, 1) for each seed."""
    return _shifted(_mix(seeds), 11).double() * 2.0**-53


def uniforms(seeds: Tensor, count: int) -> Tensor:
    """Draw `count` float32 strictly between 0 and 1 for each seed: [..., count] of 23 random bits."""
    # The lowest bit is always set: neither 0 nor, by rounding, 1 can come out.
    return (_shifted(hashes(seeds, count), 9).float() + 0.5) * 2.0**-23


def normals(seeds: Tensor, count: int) -> Tensor:
    """Draw `count` standard normal float32 for each seed: [..., count], none larger than 5.3."""
    return torch.erfinv(2 * uniforms(seeds, count) - 1) * 2**0.5


def hashes(seeds: Tensor, count: int) -> Tensor:
    """Return [..., count] int32, a hash of each seed and each number below `count`."""
    low, high = seeds.to(torch.int32).unsqueeze(-1), (seeds >> 32).to(torch.int32).unsqueeze(-1)
    value = torch.arange(count, dtype=torch.int32, device=seeds.device) * _signed(0x9E3779B1, 32)
    value = value ^ low
    value = (value ^ _shifted(value, 16)) * _signed(0x85EBCA6B, 32)
    value = value ^ high
    value = (value ^ _shifted(value, 13)) * _signed(0xC2B2AE35, 32)
    return value ^ _shifted(value, 16)


def _mix(value: Tensor) -> Tensor:
    """Scramble int64 values (the finaliser of splitmix64); products wrap around."""
    value = (value ^ _shifted(value, 30)) * _signed(_MULTIPLY_1)
    value = (value ^ _shifted(value, 27)) * _signed(_MULTIPLY_2)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Shift to the right and fill with zeros, which torch's own shift of signed integers does not."""
    width = torch.iinfo(value.dtype).bits
    return (value >> bits) & ((1 << (width - bits)) - 1)


def _signed(value: int, bits: int = 64) -> int:
    """Return the signed integer that has the bits of an unsigned one."""
    return value - (1 << bits) if value >> (bits - 1) else value
