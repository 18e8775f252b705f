"""Seeded permutations of any size, one element at a time: draws without replacement that need no memory."""

import numpy as np
from numpy.typing import NDArray

from data.hashing import splitmix64

_ROUNDS = 32


def permuted(
    states: NDArray[np.uint64], sizes: NDArray[np.integer], index: NDArray[np.integer]
) -> NDArray[np.int64]:
    """Return where each `index` of [0, size) goes under the permutation of that many elements that `state` names.

    The arrays are of one shape. For one state and size the map is a bijection, so the places 0 to k - 1 draw k of the
    elements without replacement. It is the swap-or-not shuffle (Hoang, Morris and Rogaway 2012): in every round an
    element and its partner, the reflection at a seeded point, change places or not.
    """
    place = np.asarray(index, np.int64).reshape(-1).copy()
    flat_states, flat_sizes = states.reshape(-1), np.asarray(sizes, np.int64).reshape(-1)
    for number in range(_ROUNDS):
        # Even numbers are for the points; the others, far above them, leave room for every element of the round.
        points = splitmix64(flat_states, np.full(len(place), 2 * number, np.int64))
        points = _below(points, flat_sizes)
        partner = points - place
        partner += flat_sizes * (partner < 0)
        either = np.maximum(place, partner)
        swaps = splitmix64(flat_states, either + ((2 * number + 1) << 40)) >> np.uint64(63)
        place = np.where(swaps == 1, partner, place)
    return place.reshape(np.shape(index))


def _below(hashes: NDArray[np.uint64], limits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Turn hashes into integers in [0, limit)."""
    return (((hashes >> np.uint64(32)) * limits.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)
