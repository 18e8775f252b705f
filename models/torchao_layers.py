"""torchao's Float8Linear as the product of our layers: scales from each tensor's own magnitude, weights ours.

torchao is imported when such a layer is asked for.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.fp8_alignment import FP8_ALIGNMENT, on_aligned_rows
from models.fp8_scaling import Recipe
from models.fp8_switch import switch

_CAPABILITY = (8, 9)
_INSTEAD = "use precision: bf16, or fp8.backend: emulate, which rounds like FP8 and computes in fp32"


def check_available(recipe: Recipe) -> None:
    """Raise unless torchao can compute by a recipe here.

    Raises:
        ModelError: the recipe is another one than `current_scaling`, or there is no GPU with FP8 or no torchao.
    """
    if recipe != "current_scaling":
        raise ModelError(f"layer_backend torchao knows the recipe current_scaling alone, not {recipe}")
    load()
    if not torch.cuda.is_available():
        raise ModelError(f"layer_backend torchao needs a CUDA device, and torch sees none; {_INSTEAD}")
    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        have, need = (".".join(map(str, each)) for each in (capability, _CAPABILITY))
        raise ModelError(
            f"layer_backend torchao needs a device of compute capability {need}, this one has {have}; {_INSTEAD}"
        )


@functools.cache
def load() -> tuple[Any, Any]:
    """Import torchao's `Float8Linear` and `Float8LinearConfig`.

    Raises:
        ModelError: torchao is not installed, or does not work here.
    """
    try:
        layer = importlib.import_module("torchao.float8.float8_linear").Float8Linear
        return layer, importlib.import_module("torchao.float8").Float8LinearConfig
    except Exception as error:
        raise ModelError(
            f"layer_backend torchao needs torchao, which cannot be imported ({type(error).__name__}: {error}); install "
            f"the extra: pip install 'cellphase[torchao]', or {_INSTEAD}"
        ) from error


class TorchaoLinear:
    """Stand for `F.linear` in one layer.

    Args:
        is_emulated: let torchao compute the product of rounded values in a wider type, on any device.
    """

    def __init__(self, *, is_emulated: bool = False) -> None:
        """Take the choice; the layer that computes is built in the first pass, out of the model."""
        self._is_emulated = is_emulated
        self._layer: nn.Module | None = None
        # A compiler cannot look into a module that is made while it looks.
        self._build = cast(Callable[..., nn.Module], torch.compiler.disable(_build))

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `inputs @ weight.T + bias` on padded rows."""
        if not switch.is_on:
            return F.linear(inputs, weight, bias)
        layer, device = self._layer, inputs.device.type
        if layer is None:
            layer = self._layer = self._build(weight, bias is not None, self._is_emulated)
        if torch.is_autocast_enabled(device):
            inputs = inputs.to(torch.get_autocast_dtype(device))
        weights = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return on_aligned_rows(
            lambda rows: torch.func.functional_call(layer, weights, (rows,)), inputs, FP8_ALIGNMENT
        )


def _build(weight: Tensor, has_bias: bool, is_emulated: bool) -> nn.Module:
    layer, config_class = load()
    config = config_class.from_recipe_name("tensorwise")
    if is_emulated:
        config = dataclasses.replace(config, emulate=True)
    out_features, in_features = weight.shape
    return layer(in_features, out_features, bias=has_bias, device="meta", config=config)
