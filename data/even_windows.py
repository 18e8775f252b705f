"""The windows of an order whose rows come in stretches of one length."""

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray


class EvenWindows(ABC):
    """Answer where the windows of an epoch lie, the same in every epoch; the last one may be shorter."""

    window: int
    """Rows of a window."""
    num_rows: int
    """Rows of an epoch."""
    is_with_replacement = False

    @property
    def num_windows(self) -> int:
        """Count the windows of an epoch."""
        return -(-self.num_rows // self.window)

    @abstractmethod
    def rows(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the rows at positions [start, stop) of an epoch, in order."""

    def window_at(self, epoch: int, position: int) -> int:
        """Return the window that a position of an epoch lies in."""
        del epoch
        return position // self.window

    def window_start(self, epoch: int, window: int) -> int:
        """Return the first position of a window; the window after the last one starts at `num_rows`."""
        del epoch
        return min(window * self.window, self.num_rows)

    def window_rows(self, epoch: int, window: int) -> NDArray[np.int64]:
        """Return a window's rows in order."""
        return self.rows(epoch, self.window_start(epoch, window), self.window_start(epoch, window + 1))
