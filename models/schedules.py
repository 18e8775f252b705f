"""Noise schedules of absorbing-state diffusion: which share of the tokens is masked at a time between 0 and 1.

The chance of being masked is m(t) = 1 - alpha(t), with m(0) = 0 and m(1) = 1 exactly, so that the bound has no term for
the end of the noise.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from models.errors import check_choice

ScheduleName = Literal["polynomial", "linear", "cosine"]


class Schedule(Protocol):
    """Tell by time, element by element in (0, 1], how much is masked."""

    def mask_probability(self, time: Tensor) -> Tensor:
        """Return m(t), the chance that a token is masked."""
        ...

    def weight(self, time: Tensor) -> Tensor:
        """Return m'(t) / m(t), the weight of the cross-entropy at a time in the bound."""
        ...


@dataclass(frozen=True)
class PolynomialSchedule:
    """m(t) = t ** exponent; an exponent of 1 is the linear schedule."""

    exponent: float = 1.0

    def mask_probability(self, time: Tensor) -> Tensor:
        """Return t ** exponent."""
        return time**self.exponent

    def weight(self, time: Tensor) -> Tensor:
        """Return exponent / t."""
        return self.exponent / time


@dataclass(frozen=True)
class CosineSchedule:
    """m(t) = sin(t pi / 2), that is alpha(t) = 1 - cos((1 - t) pi / 2): few tokens are left at most times."""

    def mask_probability(self, time: Tensor) -> Tensor:
        """Return sin(t pi / 2)."""
        return torch.sin(time * (math.pi / 2))

    def weight(self, time: Tensor) -> Tensor:
        """Return (pi / 2) / tan(t pi / 2)."""
        # In the form cos / sin it is 0 at t = 1, where the tangent is infinite.
        angle = time * (math.pi / 2)
        return (math.pi / 2) * torch.cos(angle) / torch.sin(angle)


def make_schedule(name: ScheduleName, exponent: float) -> Schedule:
    """Build a schedule by its name; `exponent` is the polynomial one's."""
    check_choice("schedule", name, ScheduleName)
    if name == "cosine":
        return CosineSchedule()
    return PolynomialSchedule(exponent if name == "polynomial" else 1.0)


def unmask_probability(schedule: Schedule, time: Tensor, next_time: Tensor) -> Tensor:
    """Return the chance that a token masked at `time` is shown at the earlier `next_time`."""
    left = schedule.mask_probability(next_time) / schedule.mask_probability(time)
    return torch.where(next_time > 0, 1 - left, torch.ones_like(left))


def cosine_time_grid(num_steps: int) -> Tensor:
    """Return the times [num_steps + 1] of a sampler, float64 from 1 to 0, first slowly and then fast."""
    place = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    grid = torch.cos(place * (math.pi / 2))
    grid[-1] = 0.0
    return grid


def antithetic(offset: Tensor, count: int) -> Tensor:
    """Return `count` numbers [count] that cover [0, 1) evenly: offset + i / count, modulo 1."""
    # Counted in integers: a range with step 1 / count has one number too many for some counts, such as 49.
    steps = torch.arange(count, dtype=torch.float64, device=offset.device) / count
    return (offset.double() + steps) % 1.0
