"""Read a user's loader as it comes, where its rows cannot be addressed: iterable data, own samplers, own sharding."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.errors import DataError
from data.hashing import stateless_hash
from data.loader import MicroBatch
from data.map_style import own_fingerprint
from data.technical_batches import BatchIndexer, batch_size
from data.worker_process import worker_init


class StreamLoader:
    """Group a stream's micro-batches into optimizer steps, and bring it back to a position.

    The stream draws from random state of its own (seeded by run, phase, epoch and rank), so that replaying it gives
    the same cells and reading it never disturbs the model's dropout. A rank whose stream has run dry goes on with
    copies of its last micro-batch that count for nothing, until every rank has: `may_run_dry` tells the loop to ask.
    One process has no others to wait for: its last step is shorter.
    """

    may_run_dry = True
    num_cells: int | None = None
    """What a stream holds is not known before it has been read."""

    def __init__(
        self,
        loader: DataLoader,
        indexer: BatchIndexer,
        *,
        accumulation: int,
        seed: int,
        phase: int,
        rank: int,
        world_size: int,
        num_micro_batches: int | None,
    ) -> None:
        """Take the loader, what completes its batches, and the longest rank's number of micro-batches if known."""
        self.loader = loader
        if loader.num_workers:
            loader.worker_init_fn = worker_init(loader.worker_init_fn)
        self.indexer = indexer
        self.accumulation = accumulation
        self.seed = seed
        self.phase = phase
        self.rank = rank
        self.world_size = world_size
        self.steps_per_epoch = None if num_micro_batches is None else -(-num_micro_batches // accumulation)
        self._saved: dict[str, Any] | None = None
        self._random: tuple[Any, ...] | None = None

    def steps(
        self, epoch: int, first_step: int = 0, stop_step: int | None = None
    ) -> Iterator[list[MicroBatch]]:
        """Yield the micro-batches of each step of an epoch, from `first_step` on."""
        del stop_step  # the loop stops where it wants: nothing is read ahead
        self._random = self._fresh_random(epoch)
        stream = self._positioned(epoch, first_step)
        last: dict[str, Any] | None = None
        while True:
            step: list[MicroBatch] = []
            for number in range(self.accumulation):
                batch = self._next(stream)
                if batch is None and number > 0 and self.world_size == 1:
                    break
                if batch is None:
                    last = self._first_batch(epoch) if last is None else last
                    step.append(MicroBatch(last, 0, np.empty(0, dtype=np.int64)))
                else:
                    last = self.indexer(batch)
                    step.append(
                        MicroBatch(last, batch_size(last, self.indexer.phase), np.empty(0, dtype=np.int64))
                    )
            yield step

    def evaluation_steps(self, max_steps: int | None = None) -> Iterator[list[MicroBatch]]:
        """Yield the steps of an evaluation, always with the same random state; the loop stops at `max_steps`."""
        del max_steps
        return self.steps(-1)

    def state(self) -> dict[str, Any] | None:
        """Return the loader's own position and random state, where it can tell it; None means replay."""
        if not hasattr(self.loader, "state_dict"):
            return None
        assert self._random is not None
        numpy_state = self._random[1]
        return {
            "loader": self.loader.state_dict(),  # type: ignore[attr-defined]
            "python": list(self._random[0][1]),
            "numpy": {
                "keys": torch.from_numpy(numpy_state[1].astype(np.int64)),
                "position": int(numpy_state[2]),
            },
            "torch": self._random[2],
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take a position saved by `state`; the next `steps` starts there."""
        self._saved = state

    def fingerprint(self) -> str:
        """Return what can be told of the stream without reading it: its class, and what it says itself."""
        dataset = self.loader.dataset
        return f"{type(dataset).__qualname__}{own_fingerprint(dataset)}"

    def close(self) -> None:
        """Release nothing: the user's loader ends with its iterator."""

    def _positioned(self, epoch: int, first_step: int) -> Iterator[Any]:
        """Return the epoch's iterator at a step: by the loader's own state, else by reading up to it."""
        for holder in (self.loader, self.loader.sampler, self.loader.batch_sampler, self.loader.dataset):
            set_epoch = getattr(holder, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
        saved, self._saved = self._saved, None
        if saved is not None and first_step > 0:
            self.loader.load_state_dict(saved["loader"])  # type: ignore[attr-defined]
            stream = self._own_random(lambda: iter(self.loader))
            keys = saved["numpy"]["keys"].numpy().astype(np.uint32)
            self._random = (
                (3, tuple(saved["python"]), None),
                ("MT19937", keys, saved["numpy"]["position"], 0, 0.0),
                saved["torch"],
            )
            return stream
        stream = self._own_random(lambda: iter(self.loader))
        for _ in range(first_step * self.accumulation):
            self._next(stream)
        return stream

    def _next(self, stream: Iterator[Any]) -> Any:
        return self._own_random(lambda: next(stream, None))

    def _first_batch(self, epoch: int) -> dict[str, Any]:
        """Return a batch for a rank that has none left: it must still run the passes that the others wait for."""
        batch = self._own_random(lambda: next(iter(self.loader), None))
        if batch is None:
            raise DataError(
                f"datasets '{self.indexer.phase}': the loader of rank {self.rank} yields no batch in epoch {epoch}; "
                "every rank needs at least one"
            )
        return self.indexer(batch)

    def _own_random(self, draw: Any) -> Any:
        """Run a piece of the user's code under the stream's own random state."""
        outside = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        assert self._random is not None
        _set_random(self._random)
        try:
            return draw()
        finally:
            self._random = (random.getstate(), np.random.get_state(), torch.get_rng_state())
            _set_random(outside)

    def _fresh_random(self, epoch: int) -> tuple[Any, ...]:
        key = int(stateless_hash(self.seed, self.phase, epoch, index=np.array([self.rank]))[0])
        generator = torch.Generator().manual_seed(key & (2**63 - 1))
        numpy_state = np.random.RandomState(key & (2**32 - 1)).get_state()
        return random.Random(key).getstate(), numpy_state, generator.get_state()


def _set_random(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
