"""Transformer Engine's layers behind our names: norm + linear, linear, attention, FP8 regions, recomputation.

Transformer Engine is imported when a layer of it is asked for and not before: on a machine without a GPU its import, or
its first layer, fails. Parameters have the names and shapes of `models.layers`, and no other state is in the state
dict: what a recipe remembers is handed over by `models.fp8_state`, as tensors.
"""

import contextlib
import functools
import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import ModelError
from models.fp8_alignment import alignment, on_aligned_rows
from models.fp8_scaling import Recipe
from models.fp8_switch import switch

_RECIPES = {
    "current_scaling": "Float8CurrentScaling",
    "delayed_scaling": "DelayedScaling",
    "block_scaling": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
_AVAILABLE = {"block_scaling": "is_fp8_block_scaling_available", "mxfp8": "is_mxfp8_available"}
_DIRECTIONS = ("scaling_fwd", "scaling_bwd")
_INSTEAD = "use precision: bf16, or fp8.backend: emulate, which rounds like FP8 and computes in fp32"


def check_available(recipe: Recipe) -> None:
    """Raise unless Transformer Engine can compute by a recipe here.

    Raises:
        ModelError: there is no GPU, no Transformer Engine that works, or the GPU lacks what the recipe needs.
    """
    if not torch.cuda.is_available():
        raise ModelError(f"layer_backend te needs a CUDA device, and torch sees none; {_INSTEAD}")
    is_available, reason = getattr(load(), _AVAILABLE.get(recipe, "is_fp8_available"))(return_reason=True)
    if not is_available:
        raise ModelError(f"Transformer Engine cannot compute {recipe} on this device: {reason}; {_INSTEAD}")


@functools.cache
def load() -> Any:
    """Import `transformer_engine.pytorch`.

    Raises:
        ModelError: it is not installed, or does not work here.
    """
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:
        raise ModelError(
            f"layer_backend te needs Transformer Engine, which cannot be imported ({error}); install the extra: "
            f"pip install --no-build-isolation 'cellphase[fp8]', or {_INSTEAD}"
        ) from error
    except Exception as error:  # a lacking cuDNN is a RuntimeError, a lacking extension a FileNotFoundError
        raise ModelError(
            f"Transformer Engine is installed but does not work here ({type(error).__name__}: {error}); it needs its "
            f"core library, its extension for this version of torch, and cuDNN; {_INSTEAD}"
        ) from error


def make_recipe(recipe: Recipe) -> Any:
    """Return Transformer Engine's recipe of a name, with its defaults."""
    load()
    return getattr(importlib.import_module("transformer_engine.common.recipe"), _RECIPES[recipe])()


_inside = threading.local()


@contextlib.contextmanager
def region(recipe: Recipe) -> Iterator[None]:
    """Compute Transformer Engine's layers in FP8 within; a region in another one is a part of it.

    Delayed scaling moves on at the end of a region, so a model has one around all of its layers.
    """
    if getattr(_inside, "region", False):
        yield
        return
    _inside.region = True
    try:
        with load().autocast(enabled=switch.is_on, recipe=make_recipe(recipe)):
            yield
    finally:
        _inside.region = False


def checkpoint(block: nn.Module, *arguments: Any) -> Tensor:
    """Run a block that is recomputed in the backward pass; torch's own would let amaxes in twice."""
    return load().checkpoint(block, *arguments, use_reentrant=False)


def linear(in_features: int, out_features: int, recipe: Recipe, *, init_std: float) -> nn.Module:
    """Build Transformer Engine's Linear with the parameters of `models.layers.Linear`."""
    return _classes()["Linear"](in_features, out_features, recipe=recipe, init_std=init_std)


def norm_linear(
    in_features: int,
    out_features: int,
    recipe: Recipe,
    *,
    init_std: float,
    normalization: str,
    epsilon: float,
) -> nn.Module:
    """Build Transformer Engine's LayerNormLinear with the parameters of `models.layers.NormLinear`."""
    options = {"normalization": normalization, "eps": epsilon}
    return _classes()["LayerNormLinear"](
        in_features, out_features, recipe=recipe, init_std=init_std, **options
    )


def core_attention(num_heads: int, head_dim: int, dropout: float, *, is_causal: bool = False) -> nn.Module:
    """Build attention over padded rows: queries, keys and values [B, N, H, D / H] and a mask to [B, N, D].

    Causal attention needs no mask: padding is at the end of rows, where no real token looks.
    """
    return _classes()["DotProductAttention"](num_heads, head_dim, dropout, is_causal=is_causal)


class LinearProduct:
    """Stand for `F.linear` with a weight that another module owns, which stays whole and under its name there."""

    def __init__(self, recipe: Recipe) -> None:
        """Take the recipe; the layer that computes is built when its sizes are known."""
        self.recipe: Recipe = recipe
        self._layer: nn.Module | None = None
        self._loaded: Mapping[str, Tensor] = {}

    def __call__(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `inputs @ weight.T`."""
        assert bias is None, "an embedding has no bias"
        layer = self._layer
        if layer is None:
            out_features, in_features = weight.shape
            # Built in the first pass and held out of the model: its own weight is never used, nor saved.
            layer = cast(
                nn.Module,
                _classes()["Linear"](in_features, out_features, recipe=self.recipe, init_std=1.0, bias=False),
            )
            if self._loaded:
                cast(Any, layer).load_scaling_state(self._loaded)
            self._layer = layer
        return torch.func.functional_call(layer, {"weight": weight}, (inputs,))

    def scaling_state(self) -> dict[str, Tensor]:
        """Return what delayed scaling remembers, empty for the other recipes."""
        return dict(self._loaded) if self._layer is None else cast(Any, self._layer).scaling_state()

    def load_scaling_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `scaling_state` returned."""
        self._loaded = dict(state)
        if self._layer is not None:
            cast(Any, self._layer).load_scaling_state(state)


class _WeightsAlone(nn.Module):
    """Stand before a class of Transformer Engine's, and keep the state dict to the parameters.

    The extra state of its classes is a pickle, and is neither written nor read.
    """

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Layer(_WeightsAlone):
    """Stand before a linear layer of Transformer Engine's: parameters as ours, tokens padded, scaling handed over."""

    def __init__(
        self, in_features: int, out_features: int, *, recipe: Recipe, init_std: float, **options: Any
    ) -> None:
        options = {"bias": True, "init_method": lambda w: nn.init.normal_(w, std=init_std), **options}
        super().__init__(in_features, out_features, **options)
        self.recipe: Recipe = recipe
        self.init_std = init_std

    def reset_parameters(self, defer_init: bool = False) -> None:
        """Draw the weight, set biases to zero and the norm to the plain one."""
        if not hasattr(self, "init_std"):  # within the constructor
            cast(Any, super()).reset_parameters(defer_init=defer_init)
            return
        for name, parameter in self.named_parameters(recurse=False):
            if name == "weight":
                nn.init.normal_(parameter, std=self.init_std)
            elif name == "layer_norm_weight":
                nn.init.ones_(parameter)
            else:
                nn.init.zeros_(parameter)

    def forward(self, inp: Tensor) -> Tensor:
        return on_aligned_rows(super().forward, inp, alignment(self.recipe))

    def scaling_state(self) -> dict[str, Tensor]:
        meta = cast(Any, self).fp8_meta
        if self.recipe != "delayed_scaling" or "scaling_fwd" not in meta:
            return {}
        return {
            f"{direction}_{part}": getattr(meta[direction], part).detach().clone()
            for direction in _DIRECTIONS
            for part in ("scale", "amax_history")
        }

    def load_scaling_state(self, state: Mapping[str, Tensor]) -> None:
        if self.recipe != "delayed_scaling":
            return
        # Before the first pass there is nothing yet to copy to.
        cast(Any, self).init_fp8_meta_tensors(make_recipe(self.recipe))
        own = self.scaling_state()
        if {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in own.items()}:
            raise ModelError(
                f"the state of delayed scaling holds {', '.join(sorted(state)) or 'nothing'}; Transformer "
                f"Engine's layers need {', '.join(sorted(own))}"
            )
        meta = cast(Any, self).fp8_meta
        for direction in _DIRECTIONS:
            for part in ("scale", "amax_history"):
                # In place: the region's end writes to these tensors.
                getattr(meta[direction], part).copy_(state[f"{direction}_{part}"])


@functools.cache
def _classes() -> dict[str, Any]:
    """Return our subclasses of Transformer Engine's modules, which cannot be named before it is imported."""
    te = load()

    class Linear(_Layer, te.Linear): ...

    class LayerNormLinear(_Layer, te.LayerNormLinear):
        def forward(self, inp: Tensor, correction: Callable[[Tensor], Any] | None = None) -> Tensor:
            result = super().forward(inp)
            if correction is None:
                return result
            # Transformer Engine keeps the normalised input to itself.
            own: Any = self
            weight, bias = own.layer_norm_weight.to(inp.dtype), own.layer_norm_bias
            if bias is None:
                normalised = F.rms_norm(inp, weight.shape, weight, own.eps)
            else:
                normalised = F.layer_norm(inp, weight.shape, weight, bias.to(inp.dtype), own.eps)
            return (result + correction(normalised)).to(result.dtype)

    class DotProductAttention(_WeightsAlone, te.DotProductAttention):
        def __init__(self, num_heads: int, head_dim: int, dropout: float, *, is_causal: bool) -> None:
            kind = "causal" if is_causal else "no_mask"
            options = {"attention_dropout": dropout, "qkv_format": "bshd", "attn_mask_type": kind}
            super().__init__(num_heads, head_dim, **options)
            self.is_causal = is_causal

        def forward(self, q: Tensor, k: Tensor, v: Tensor, is_real: Tensor | None) -> Tensor:
            if is_real is None or self.is_causal:
                return super().forward(q, k, v)
            # A row without a real token attends to everything, as in our own attention.
            is_real = is_real | ~is_real.any(dim=-1, keepdim=True)
            return super().forward(q, k, v, ~is_real[:, None, None, :], attn_mask_type="padding")

    return {"Linear": Linear, "LayerNormLinear": LayerNormLinear, "DotProductAttention": DotProductAttention}
