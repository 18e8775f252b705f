"""Measure a run: losses summed on the device, read by the host only when they are written, and where time goes."""

import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.costs import model_flops_utilization
from trainer.distributed import Ranks


@dataclass(frozen=True)
class StepTotals:
    """One optimizer step's totals over all ranks, and this rank's weights."""

    weights: list[float]
    weight: float
    cells: float
    tokens: float
    padded_tokens: float
    """What is computed: tokens with padding."""
    flops: float
    """Useful operations, 0 where no peak is known to compare them with, or the model does not tell."""
    is_asked_to_stop: bool = False
    """Whether any rank was asked to end with a checkpoint."""


class LossSum:
    """Add up the losses and metrics of micro-batches, without waiting for the device."""

    def __init__(self) -> None:
        """Start at nothing."""
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, list[float]] = {}

    def add(self, loss: Tensor, metrics: dict[str, Tensor], weight: float) -> None:
        """Add one micro-batch's sums; one of weight 0 (a rank without cells) only names them."""
        for name, value in {"loss": loss, **metrics}.items():
            value = (
                value.detach().double()
                if weight > 0
                else torch.zeros((), dtype=torch.float64, device=loss.device)
            )
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._weights.setdefault(name, []).append(weight)

    def to_host(self) -> dict[str, tuple[float, float]]:
        """Return by name the sum and the weight of what had it, `loss` first; waits for the device."""
        if not self._sums:
            return {}
        values = torch.stack(list(self._sums.values())).cpu().tolist()
        return {
            name: (value, sum(self._weights[name])) for name, value in zip(self._sums, values, strict=True)
        }


class NamedMeans:
    """Turn sums into means over all ranks by name, of which each rank and each step may have others."""

    def __init__(self, ranks: Ranks) -> None:
        """Begin without names; the ranks agree on those that come up, and forget none."""
        self._ranks = ranks
        self._names: list[str] = []

    def of(self, sums: Sequence[LossSum]) -> list[dict[str, float]]:
        """Return each one's means, of a metric over the micro-batches that have it; left out where none has.

        Every rank must call it at the same step, with equally many.
        """
        own = [each.to_host() for each in sums]
        while True:
            is_unknown = any(name not in self._names for each in own for name in each)
            pairs = [each.get(name, (0.0, 0.0)) for each in own for name in self._names]
            numbers = [number for pair in pairs for number in pair]
            num_surprised, *numbers = self._ranks.sum([float(is_unknown), *numbers])
            if not num_surprised:
                break
            self._agree({name: None for each in own for name in each})
        totals, size = list(zip(numbers[::2], numbers[1::2], strict=True)), len(self._names)
        rows = [totals[index * size : (index + 1) * size] for index in range(len(own))]
        return [
            {name: value / weight for name, (value, weight) in zip(self._names, row, strict=True) if weight}
            for row in rows
        ]

    def _agree(self, own: Iterable[str]) -> None:
        """Add every rank's names to those that are known, in the order of ranks."""
        of_ranks = [json.loads(names) for names in self._ranks.gather_text(json.dumps(list(own)))]
        self._names = list(dict.fromkeys([*self._names, *itertools.chain(*of_ranks)]))


@dataclass
class _Pending:
    record: dict[str, Any]
    sums: LossSum
    gradient_norm: Tensor | float | None


@dataclass
class Meters:
    """Collect the records of optimizer steps until they are written."""

    ranks: Ranks
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    peak: float | None = None
    """Peak of one device in operations a second, None where nothing states it: then records have no `mfu`."""
    started: float = field(default_factory=time.perf_counter)
    _pending: list[_Pending] = field(default_factory=list)
    _step_started: float = field(default_factory=time.perf_counter)
    _waited: float = 0.0
    _means: NamedMeans = field(init=False)

    def __post_init__(self) -> None:
        """Begin without names of metrics."""
        self._means = NamedMeans(self.ranks)

    def next_of(self, iterator: Iterator[Any]) -> Any:
        """Return the iterator's next item (None at its end), and count the time that it took as waiting for data."""
        before = time.perf_counter()
        item = next(iterator, None)
        self._waited += time.perf_counter() - before
        return item

    def restart_clock(self) -> None:
        """Begin the next step's time now: evaluation and saving belong to no step."""
        self._step_started, self._waited = time.perf_counter(), 0.0

    def add_step(
        self, record: dict[str, Any], sums: LossSum, gradient_norm: Tensor | float | None, totals: StepTotals
    ) -> None:
        """Keep one optimizer step's record; a step without a gradient norm had nothing to learn from."""
        now = time.perf_counter()
        seconds = max(now - self._step_started, 1e-9)
        record |= {
            "cells": int(totals.cells),
            "tokens": int(totals.tokens),
            "step_seconds": seconds,
            "cells_per_second": totals.cells / seconds,
            "tokens_per_second": totals.tokens / seconds,
            "padded_tokens_per_second": totals.padded_tokens / seconds,
            "data_wait_fraction": min(1.0, self._waited / seconds),
            "elapsed_seconds": now - self.started,
        }
        if self.device.type == "cuda":
            record["peak_memory_bytes"] = torch.cuda.max_memory_allocated(self.device)
        if self.peak is not None and totals.flops:
            record["mfu"] = model_flops_utilization(totals.flops, seconds, self.ranks.count, self.peak)
        self._pending.append(_Pending(record, sums, gradient_norm))
        self._step_started, self._waited = now, 0.0

    @property
    def knows_of_a_skipped_step(self) -> bool:
        """Tell whether the newest step was left out; a norm that is on its way from a GPU tells when it is taken."""
        norm = self._pending[-1].gradient_norm if self._pending else 0.0
        return norm is None or (not isinstance(norm, Tensor) and not math.isfinite(norm))

    def take(self) -> list[dict[str, Any]]:
        """Return the finished records since the last call, with means over all ranks.

        Every rank must call it at the same step.
        """
        pending, self._pending = self._pending, []
        records = []
        for item, metrics in zip(pending, self._means.of([item.sums for item in pending]), strict=True):
            norm = None if item.gradient_norm is None else float(item.gradient_norm)
            loss = metrics.pop("loss", None)
            is_skipped = norm is None or not math.isfinite(norm)
            records.append(
                {**item.record, "is_skipped": is_skipped, "loss": loss, "grad_norm": norm, **metrics}
            )
        return records
