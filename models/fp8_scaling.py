"""FP8 recipes in emulation: which scale each operand of a linear layer's three products is cast with.

The numerics are those of Transformer Engine's recipes with their defaults: `current_scaling` and `delayed_scaling` read
inputs and weight in E4M3 and gradients in E5M2 with one scale for each tensor; `block_scaling` and `mxfp8` read all
three in E4M3 with a power of two for each block along the dimension that a product adds up over.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from models.errors import ModelError
from models.fp8_numerics import E4M3, E5M2, Quantised, magnitude, quantise, quantise_blocks

Recipe = Literal["current_scaling", "delayed_scaling", "block_scaling", "mxfp8"]

HISTORY_LENGTH = 1024
"""Largest magnitudes that delayed scaling remembers, one for each time that a layer ran."""


class ForwardOperands(NamedTuple):
    """Hold inputs and weight as the forward product reads them, and as the two products of the backward pass do."""

    inputs: Quantised
    weight: Quantised
    inputs_in_backward: Quantised
    weight_in_backward: Quantised


class Scaling(Protocol):
    """Cast one layer's operands."""

    def forward_operands(self, inputs: Tensor, weight: Tensor, *, is_recorded: bool) -> ForwardOperands:
        """Cast inputs [T, in] and weight [out, in]; `is_recorded` is False where nothing may be remembered."""
        ...

    def gradient_operands(self, gradient: Tensor) -> tuple[Quantised, Quantised]:
        """Cast the gradient [T, out] for the gradient of the inputs, and for that of the weight."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return copies of what the next cast depends on beside its tensor, empty where there is nothing."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        ...


class _Stateless:
    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take nothing: another recipe's state means nothing here."""


class CurrentScaling(_Stateless):
    """Scale each tensor by its own largest magnitude."""

    def forward_operands(self, inputs: Tensor, weight: Tensor, *, is_recorded: bool) -> ForwardOperands:
        """Cast inputs and weight once for all products."""
        first, second = quantise(inputs, E4M3), quantise(weight, E4M3)
        return ForwardOperands(first, second, first, second)

    def gradient_operands(self, gradient: Tensor) -> tuple[Quantised, Quantised]:
        """Cast the gradient once for both products."""
        cast = quantise(gradient, E5M2)
        return cast, cast


class BlockScaling(_Stateless):
    """Scale inputs and gradients in blocks of 1 x 128, the weight in blocks of 128 x 128."""

    along = 128
    weight_rows = 128

    def forward_operands(self, inputs: Tensor, weight: Tensor, *, is_recorded: bool) -> ForwardOperands:
        """Cast from the unrounded tensors for each direction: a block lies along what a product adds up."""
        return ForwardOperands(
            quantise_blocks(inputs, E4M3, (1, self.along)),
            quantise_blocks(weight, E4M3, (self.weight_rows, self.along)),
            quantise_blocks(inputs, E4M3, (self.along, 1)),
            quantise_blocks(weight, E4M3, (self.along, self.weight_rows)),
        )

    def gradient_operands(self, gradient: Tensor) -> tuple[Quantised, Quantised]:
        """Cast the gradient along its features for the inputs' gradient, along the tokens for the weight's."""
        along_features = quantise_blocks(gradient, E4M3, (1, self.along))
        return along_features, quantise_blocks(gradient, E4M3, (self.along, 1))


class MXScaling(BlockScaling):
    """Scale every operand in blocks of 32 values, with an exponent of 8 bits for each."""

    along = 32
    weight_rows = 1


class DelayedScaling:
    """Scale each tensor by the largest magnitude of the layer's last runs, which was known before this one.

    A value beyond it saturates. Magnitudes that are not finite are not remembered. Each process remembers its own.
    """

    def __init__(self, history_length: int = HISTORY_LENGTH) -> None:
        """Start with scale 1 and an empty history."""
        self._history_length = history_length
        # Made when they are needed: where models are built in shards, tensors are made in the type of the weights.
        self._scale: dict[str, Tensor] = {}
        self._history: dict[str, Tensor] = {}

    def forward_operands(self, inputs: Tensor, weight: Tensor, *, is_recorded: bool) -> ForwardOperands:
        """Cast inputs and weight with the scales known so far, then let them into the history."""
        tape = _tape.get()
        if tape is not None and id(self) in tape.scales and tape.is_replayed:
            scales = tape.scales[id(self)]
        else:
            scales = self._scale_of("inputs", inputs), self._scale_of("weight", weight)
            if tape is not None:
                tape.scales[id(self)] = scales
            if is_recorded:
                self._record("inputs", inputs)
                self._record("weight", weight)
        first, second = quantise(inputs, E4M3, scales[0]), quantise(weight, E4M3, scales[1])
        return ForwardOperands(first, second, first, second)

    def gradient_operands(self, gradient: Tensor) -> tuple[Quantised, Quantised]:
        """Cast the gradient with the scale known so far, then let it into the history."""
        cast = quantise(gradient, E5M2, self._scale_of("gradient", gradient))
        self._record("gradient", gradient)
        return cast, cast

    def state(self) -> dict[str, Tensor]:
        """Return copies of the scales and histories."""
        for kind in _KINDS:
            self._begin(kind)
        scales = {f"{kind}_scale": self._scale[kind].clone() for kind in _KINDS}
        return scales | {f"{kind}_amax_history": self._history[kind].clone() for kind in _KINDS}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from scales and histories.

        Raises:
            ModelError: they are not such as `state` returns.
        """
        own = self.state()
        if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in own.items()}:
            raise ModelError(
                f"the state of delayed scaling holds {', '.join(sorted(state)) or 'nothing'}; needed are "
                f"{', '.join(sorted(own))}, with a history of {self._history_length}"
            )
        for kind in _KINDS:
            self._scale[kind] = state[f"{kind}_scale"].clone()
            self._history[kind] = state[f"{kind}_amax_history"].clone()

    def _begin(self, kind: str) -> None:
        if kind not in self._scale:
            self._scale[kind] = torch.ones((), dtype=torch.float32)
            self._history[kind] = torch.zeros(self._history_length, dtype=torch.float32)

    def _scale_of(self, kind: str, tensor: Tensor) -> Tensor:
        self._begin(kind)
        self._scale[kind] = self._scale[kind].to(tensor.device)
        self._history[kind] = self._history[kind].to(tensor.device)
        return self._scale[kind]

    def _record(self, kind: str, tensor: Tensor) -> None:
        """Let a tensor's magnitude into the history, whose first place is the newest, and set the next scale."""
        amax = magnitude(tensor)
        history, scale = self._history[kind].clone(), self._scale[kind]
        history[0] = torch.where(amax.isfinite(), amax, 0.0)
        largest = history.amax()
        new = torch.finfo(_KINDS[kind]).max / largest
        new = new.clamp(max=torch.finfo(torch.float32).max)
        self._scale[kind] = torch.where(largest > 0, new, scale)
        history = history.roll(-1)
        history[0] = 0.0  # the oldest one has come round to here
        self._history[kind] = history


_KINDS = {"inputs": E4M3, "weight": E4M3, "gradient": E5M2}


def make_scaling(recipe: Recipe) -> Scaling:
    """Return what casts one layer's operands by a recipe."""
    kinds: dict[str, type[Scaling]] = {
        "current_scaling": CurrentScaling,
        "delayed_scaling": DelayedScaling,
        "block_scaling": BlockScaling,
        "mxfp8": MXScaling,
    }
    return kinds[recipe]()


class _Tape:
    """Hold the scales that layers were run with, so that a recomputation casts as the run did and remembers nothing."""

    def __init__(self) -> None:
        self.scales: dict[int, tuple[Tensor, Tensor]] = {}
        self.is_replayed = False


_tape: contextvars.ContextVar[_Tape | None] = contextvars.ContextVar("fp8_tape", default=None)


def recompute_contexts() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """Return the `context_fn` of `torch.utils.checkpoint` under which layers are recomputed as they ran."""
    tape = _Tape()
    return _with_tape(tape, is_replayed=False), _with_tape(tape, is_replayed=True)


@contextlib.contextmanager
def _with_tape(tape: _Tape, *, is_replayed: bool) -> Iterator[None]:
    tape.is_replayed = is_replayed
    token = _tape.set(tape)
    try:
        yield
    finally:
        _tape.reset(token)
