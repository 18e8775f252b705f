"""The random state of a process: every generator that a step may draw from."""

import random
from typing import Any

import numpy as np
import torch

from data.hashing import stateless_hash


def random_state() -> dict[str, Any]:
    """Return the state of every random number generator of this process."""
    numpy_state: Any = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [numpy_state[0], np.asarray(numpy_state[1]), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every rank: all build the same data and the same model."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_dropout(seed: int, rank: int, global_step: int) -> None:
    """Seed every generator for this rank: ranks hold the same weights but must not share dropout masks."""
    key = int(stateless_hash(seed, global_step, index=np.array([rank]))[0])
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.manual_seed(key % 2**63)
