"""What FP8 recipes remember of a model's layers, as tensors apart from its weights.

Kept out of the state dict, so that a run in FP8 and one in bf16 have the same weights by the same names.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ModelError


def fp8_state(module: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return copies of what recipes remember, by layer; empty for recipes that remember nothing."""
    states = {name: holder.scaling_state() for name, holder in _holders(module)}
    return {name: state for name, state in states.items() if state}


def load_fp8_state(module: nn.Module, state: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Let the layers go on from what `fp8_state` returned.

    Returns:
        The layers that remember something and for which `state` has nothing that fits: they start anew.
    """
    started_anew = []
    for name, holder in _holders(module):
        try:
            holder.load_scaling_state(state.get(name, {}))
        except ModelError:  # of another backend, or none
            started_anew.append(name)
    return started_anew


def merged_fp8_state(states: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """Merge what the processes of a run remember: the largest magnitudes of any, and so the smallest scales."""
    merged: dict[str, dict[str, Tensor]] = {}
    for state in states:
        for layer, tensors in state.items():
            known = merged.setdefault(layer, dict(tensors))
            for name, tensor in tensors.items():
                pick = torch.minimum if name.endswith("scale") else torch.maximum
                known[name] = pick(known[name], tensor)
    return merged


def _holders(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, layer in module.named_modules():
        for holder in (layer, getattr(layer, "linear_function", None)):
            if hasattr(holder, "scaling_state"):
                yield name, holder
