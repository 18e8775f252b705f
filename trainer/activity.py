"""What the main thread is doing: it sets attributes, and that is all that being watched costs it."""

import time


class Activity:
    """Say where the main thread stands, for the watch and for the heartbeats of its rank."""

    def __init__(self) -> None:
        """Begin with the start of the run."""
        self.count = 0
        """How often anything began or moved on: the same on every rank that has come equally far."""
        self.begin("starting", 0)

    def begin(self, name: str, step: int, *, is_collective: bool = False) -> None:
        """Say what begins.

        Args:
            name: In words.
            step: The global step that it is about.
            is_collective: Whether it needs the other ranks, so that waiting for ever is an error.
        """
        self.now = (name, step, is_collective)
        self.move_on()

    def move_on(self) -> None:
        """Say that it goes on: another micro-batch."""
        self.count += 1
        self.changed = time.monotonic()
