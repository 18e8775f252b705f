"""Any map-style data set, a user's own included, as a source of batches by row numbers."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from data.errors import DataError
from data.hashing import DrawKey, Stream, combine_keys


class MapStyleSource:
    """Fetch batches of a map-style data set through its collate function.

    Python's, NumPy's and torch's random state are seeded from the draw key and the row in front of each sample
    and put back after the batch: augmentation is the same whatever else was drawn, on however many ranks, and
    the random state that dropout draws from is not disturbed. A data set with `__getitems__` is asked for the
    whole batch at once and seeded from its rows.
    """

    is_inline = True
    """Code of users may use global state, so it is not run in a second thread."""

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any] | None = None) -> None:
        """Take the data set and what makes a batch of its samples (torch's default where None)."""
        self.dataset = dataset
        self.collate_fn = default_collate if collate_fn is None else collate_fn

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.dataset)

    def fetch(self, rows: NDArray[np.int64], draw: DrawKey) -> Any:
        """Return the batch of these rows, as the collate function makes it."""
        numbers = rows.tolist()
        with _kept_random_state():
            if hasattr(self.dataset, "__getitems__"):
                _seed(draw, *numbers)
                samples = self.dataset.__getitems__(numbers)
            else:
                samples = []
                for number in numbers:
                    _seed(draw, number)
                    samples.append(self.dataset[number])
            _seed(draw, -1, *numbers)
            batch = self.collate_fn(samples)
        return {"tokens": batch} if isinstance(batch, torch.Tensor) else batch

    def fingerprint(self) -> str:
        """Identify the data as well as a foreign data set allows: by its class, its length and what it says."""
        kind = type(self.dataset)
        return f"{kind.__module__}.{kind.__qualname__}[{len(self.dataset)}]{own_fingerprint(self.dataset)}"


def own_fingerprint(dataset: Any) -> str:
    """Return what a user's data set says of its content by a method `fingerprint()`; empty where it has none.

    Raises:
        DataError: it returns no text.
    """
    tell = getattr(dataset, "fingerprint", None)
    if not callable(tell):
        return ""
    told = tell()
    if not isinstance(told, str):
        raise DataError(
            f"{type(dataset).__qualname__}.fingerprint() returns {type(told).__name__}; it must return text that is "
            "the same for the same cells (a hash of them, or their version)"
        )
    return f":{told}"


def _seed(draw: DrawKey, *numbers: int) -> None:
    state = combine_keys(*draw, Stream.SAMPLE_SEED, *numbers)
    random.seed(state)
    np.random.seed(state & 0xFFFFFFFF)
    # Only the CPU's generator: torch.manual_seed would seed every GPU's as well.
    torch.default_generator.manual_seed(state & (2**63 - 1))


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    """Put the global random states back after the block."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
