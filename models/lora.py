"""LoRA by PEFT: trained low-rank corrections of the linear layers of a transformer, whose own weights stay as they are.

A correction acts on what the layer's matrix multiplies. In a layer that begins with a norm (`qkv`, `linear1`) that is
the normalised input, so a trained correction can be added to the matrix, and the layers of an export are plain ones.
PEFT is imported when a correction is added.
"""

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from models.errors import ModelError, check_choice, raise_all
from models.layers import Linear, NormLinear

DEFAULT_TARGETS = ("out_proj", "linear1", "linear2")
ADAPTER_MARK = ".lora_"
"""Is in the name of every parameter of a correction, and in no other."""

LoraBias = Literal["none", "all", "lora_only"]
_BASE = "base_layer"


@dataclass(frozen=True)
class LoraSettings:
    """Say which layers get a correction, and of what kind.

    Attributes:
        rank: LoRA rank, the inner width of a correction.
        alpha: a correction is scaled by alpha / rank.
        dropout: probability, on the input of a correction.
        target_modules: the layers: the last part of a name, a whole name, or a pattern of one such as `layers.0.*`;
            None is `out_proj`, `linear1`, `linear2`.
        bias: biases of the model that train beside the corrections: `none`, `all`, or `lora_only`: those of the layers
            that have one. The phases' `freeze` must say the same (`frozen_patterns`), which is checked.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] | None = None
    bias: LoraBias = "none"

    def __post_init__(self) -> None:
        """Check every field."""
        if self.target_modules is not None:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        raise_all(self._problems())

    def _problems(self) -> Iterable[str]:
        if not self.rank >= 1:
            yield f"lora.rank is {self.rank}; it must be at least 1"
        if not self.alpha > 0:
            yield f"lora.alpha is {self.alpha}; it must be positive"
        if not 0 <= self.dropout < 1:
            yield f"lora.dropout is {self.dropout}; it must be in [0, 1)"
        if self.target_modules is not None and not self.target_modules:
            yield "lora.target_modules is empty; name layers, or leave it out for the default ones"
        try:
            check_choice("lora.bias", self.bias, LoraBias)
        except ModelError as error:
            yield str(error)


def frozen_patterns(bias: LoraBias = "none", prefix: str = "backbone.") -> list[str]:
    """Return the regular expressions of the parameters that a run with LoRA holds still: a phase's `freeze`.

    Args:
        bias: which biases train beside the corrections, as in `LoraSettings`.
        prefix: what the names of the model begin with that has the corrections.
    """
    spared = {
        "none": "",
        "all": r"(?!.*bias$)",
        "lora_only": rf"(?!.*\.{_BASE}\.bias$)",
    }[bias]
    return [f"^{re.escape(prefix)}(?!.*{re.escape(ADAPTER_MARK)}){spared}"]


def add_lora(transformer: nn.Module, settings: LoraSettings) -> list[str]:
    """Give the linear layers that `target_modules` names a correction, which changes nothing before it is trained.

    Every parameter can be trained after it: what is held still is said by the run.

    Returns:
        The names of the layers.

    Raises:
        ModelError: a target names no layer.
    """
    layers = dict(_linear_layers(transformer))
    targets = _chosen(layers, settings.target_modules or DEFAULT_TARGETS)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),
        lora_dropout=settings.dropout,
        target_modules=targets,
        bias="none",
    )
    kinds = _adapter_classes()
    config._register_custom_module(
        {type(layers[name]): kinds["norm" if _has_norm(layers[name]) else "plain"] for name in targets}
    )
    inject_adapter_in_model(config, transformer)
    for parameter in transformer.parameters():
        parameter.requires_grad_(True)
    return targets


def merge_lora(transformer: nn.Module) -> None:
    """Add every correction to the matrix of its layer, and put the plain layer back in its place."""
    for name, layer in list(transformer.named_modules()):
        if is_corrected(layer):
            adapter = cast(Any, layer)
            adapter.merge(safe_merge=True)
            owner, _, attribute = name.rpartition(".")
            setattr(transformer.get_submodule(owner), attribute, adapter.base_layer)


def is_corrected(layer: nn.Module) -> bool:
    """Tell whether a layer is one with a correction."""
    return hasattr(layer, _BASE) and hasattr(layer, "lora_A")


def plain_name(name: str) -> str | None:
    """Return what a parameter's name is without LoRA; None: it belongs to a correction."""
    return None if ADAPTER_MARK in name else name.replace(f".{_BASE}.", ".")


def _linear_layers(transformer: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    for name, layer in transformer.named_modules():
        if isinstance(layer, Linear | NormLinear) or hasattr(layer, "scaling_state"):
            yield name, layer


def _chosen(layers: Mapping[str, nn.Module], wanted: Iterable[str]) -> list[str]:
    chosen: dict[str, None] = {}
    for target in wanted:
        found = [
            name
            for name in layers
            if name == target or name.endswith(f".{target}") or fnmatch.fnmatchcase(name, target)
        ]
        if not found:
            kinds = dict.fromkeys(name.rpartition(".")[2] for name in layers)
            raise ModelError(
                f"lora.target_modules: {target!r} fits no linear layer of the transformer; there are "
                f"{', '.join(kinds)}, each with its place: {', '.join(list(layers)[:4])} ..."
            )
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _has_norm(layer: nn.Module) -> bool:
    return hasattr(layer, "layer_norm_weight")


@functools.cache
def _adapter_classes() -> dict[str, Any]:
    """Return PEFT's layer and ours, which cannot be named before PEFT is imported."""
    from peft.tuners.lora.layer import Linear as LoraLinear

    class Corrected(LoraLinear):
        """Hold a layer of any backend with a correction."""

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            layer = cast(Any, module)
            return layer.in_features, layer.out_features

    class CorrectedNormLinear(Corrected):
        """Hold a norm + linear layer with a correction between the two."""

        def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            if self.disable_adapters or self.merged:
                return self.base_layer(x)
            return self.base_layer(x, self._correction)

        def _correction(self, normalised: Tensor) -> Tensor | float:
            total: Tensor | float = 0.0
            for name in self.active_adapters:
                first, second = self.lora_A[name], self.lora_B[name]
                normalised = self._cast_input_dtype(normalised, cast(Any, first).weight.dtype)
                total = total + second(first(self.lora_dropout[name](normalised))) * self.scaling[name]
            return total

    return {"plain": Corrected, "norm": CorrectedNormLinear}
