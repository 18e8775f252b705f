"""Layers that transformers are built of; parameter names and shapes are those of Transformer Engine's modules."""

import contextlib
import fnmatch
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from models import te_layers, torchao_layers
from models.attention import AttentionSpans, packed_attention
from models.errors import ModelError, check_choice
from models.fp8_alignment import alignment, nearest_multiples
from models.fp8_emulation import EmulatedLinear
from models.fp8_scaling import Recipe, recompute_contexts

Backend = Literal["torch", "emulate", "te", "torchao"]
Normalization = Literal["LayerNorm", "RMSNorm"]
Activation = Literal["gelu", "relu", "silu", "swiglu"]
LinearFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]

NORM_EPSILON = 1e-5


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, with Transformer Engine's parameter names."""

    def __init__(self, dim: int, normalization: Normalization = "LayerNorm") -> None:
        """Start as the plain norm."""
        super().__init__()
        check_choice("normalization", normalization, Normalization)
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if normalization == "LayerNorm" else None

    def reset_parameters(self) -> None:
        """Start as the plain norm."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return _normalise(x, self.weight, self.bias)


class Linear(nn.Linear):
    """A linear layer, initialised N(0, `init_std`) with zero bias.

    Weights are drawn here and not by the model that holds the layer: under ZeRO-3 a parameter is already
    partitioned when the constructor of its own module has returned.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        init_std: float = 0.02,
        linear_function: LinearFunction = F.linear,
    ) -> None:
        """Draw the weight."""
        self.init_std = init_std
        super().__init__(in_features, out_features, bias=bias)
        self.linear_function = linear_function

    def reset_parameters(self) -> None:
        """Draw the weight and set the bias to zero."""
        nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to the last dimension."""
        return self.linear_function(input, self.weight, self.bias)


class NormLinear(nn.Module):
    """A norm followed by a linear layer, in one module as Transformer Engine's LayerNormLinear.

    It is no `nn.Linear`: a correction of its matrix (`models.lora`) acts on what `normalise` returns, between the two.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        init_std: float = 0.02,
        normalization: Normalization = "LayerNorm",
        linear_function: LinearFunction = F.linear,
    ) -> None:
        """Draw the weight; the norm starts plain."""
        super().__init__()
        check_choice("normalization", normalization, Normalization)
        self.in_features, self.out_features = in_features, out_features
        self.init_std = init_std
        self.linear_function = linear_function
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features))
        self.layer_norm_bias = (
            nn.Parameter(torch.zeros(in_features)) if normalization == "LayerNorm" else None
        )
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight, set the bias to zero and the norm to the plain one."""
        nn.init.normal_(self.weight, std=self.init_std)
        nn.init.ones_(self.layer_norm_weight)
        for bias in (self.bias, self.layer_norm_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def normalise(self, x: Tensor) -> Tensor:
        """Return the input of the linear part."""
        return _normalise(x, self.layer_norm_weight, self.layer_norm_bias)

    def forward(self, x: Tensor, correction: Callable[[Tensor], Any] | None = None) -> Tensor:
        """Normalise and project the last dimension; a correction gets the normalised input and is added."""
        normalised = self.normalise(x)
        result = self.linear_function(normalised, self.weight, self.bias)
        return result if correction is None else (result + correction(normalised)).to(result.dtype)


class LayerFactory:
    """Builds the linear layers of a transformer's body with the backend that each one is to have.

    Args:
        backend: `torch` for no FP8, `te` for Transformer Engine's layers, `torchao` for torchao's, or `emulate` for FP8
            emulated in fp32 on any device.
        exclude_layers: patterns (`*.out_proj`, `layers.0.*`) of layers that stay in the model's own precision.
        recipe: how FP8 scales are chosen.

    Raises:
        ModelError: a choice is unknown, or this machine has not what the backend needs.
    """

    def __init__(
        self,
        backend: Backend = "torch",
        exclude_layers: tuple[str, ...] = (),
        recipe: Recipe = "current_scaling",
    ) -> None:
        """Check the choices."""
        check_choice("backend", backend, Backend)
        check_choice("recipe", recipe, Recipe)
        if exclude_layers and backend == "torch":
            raise ModelError(
                "exclude_layers names layers kept out of FP8, but backend torch has no FP8 layers"
            )
        if recipe != "current_scaling" and backend == "torch":
            raise ModelError(f"recipe {recipe} is one of FP8, but backend torch has no FP8 layers")
        self.backend = backend
        self.recipe: Recipe = recipe
        self.exclude_layers = tuple(exclude_layers)
        self.layer_names: list[str] = []
        if backend == "te":
            te_layers.check_available(recipe)
        elif backend == "torchao":
            torchao_layers.check_available(recipe)

    def linear(self, name: str, in_features: int, out_features: int, *, init_std: float = 0.02) -> nn.Module:
        """Build the linear layer called `name` in its model."""
        is_fp8 = self._is_fp8(name, in_features, out_features)
        if is_fp8 and self.backend == "te":
            return te_layers.linear(in_features, out_features, self.recipe, init_std=init_std)
        function = self._function() if is_fp8 else F.linear
        return Linear(in_features, out_features, init_std=init_std, linear_function=function)

    def norm_linear(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        init_std: float = 0.02,
        normalization: Normalization = "LayerNorm",
    ) -> nn.Module:
        """Build the norm + linear layer called `name` in its model."""
        is_fp8 = self._is_fp8(name, in_features, out_features)
        if is_fp8 and self.backend == "te":
            return te_layers.norm_linear(
                in_features,
                out_features,
                self.recipe,
                init_std=init_std,
                normalization=normalization,
                epsilon=NORM_EPSILON,
            )
        return NormLinear(
            in_features,
            out_features,
            init_std=init_std,
            normalization=normalization,
            linear_function=self._function() if is_fp8 else F.linear,
        )

    def embedding_product(self, name: str, dim: int) -> LinearFunction | None:
        """Return what multiplies one-hot rows with the embedding called `name`; None: rows are looked up."""
        if not self._is_fp8(name, None, dim):
            return None
        return te_layers.LinearProduct(self.recipe) if self.backend == "te" else self._function()

    def core_attention(
        self, num_heads: int, head_dim: int, dropout: float, *, is_causal: bool = False
    ) -> nn.Module | None:
        """Build the attention over padded rows that belongs to the backend; None: torch's own."""
        if self.backend != "te":
            return None
        return te_layers.core_attention(num_heads, head_dim, dropout, is_causal=is_causal)

    def region(self) -> contextlib.AbstractContextManager[Any]:
        """Return what each forward pass runs within: all FP8 layers of a model, each once."""
        return te_layers.region(self.recipe) if self.backend == "te" else contextlib.nullcontext()

    def checkpoint(self, block: nn.Module, *arguments: Any) -> Tensor:
        """Run a block and keep none of its activations: the backward pass computes them again, cast as before."""
        if self.backend == "te":
            return te_layers.checkpoint(block, *arguments)
        contexts = recompute_contexts if self.backend == "emulate" else noop_context_fn
        # The block itself is the argument, so recomputation cannot run another block of a loop.
        return cast(Tensor, checkpoint(block, *arguments, use_reentrant=False, context_fn=contexts))

    def check_exclusions(self) -> None:
        """Raise if a pattern of `exclude_layers` fits none of the layers built."""
        for pattern in self.exclude_layers:
            if not fnmatch.filter(self.layer_names, pattern):
                raise ModelError(
                    f"exclude_layers: {pattern!r} fits no layer; the layers are {', '.join(self.layer_names)}"
                )

    def _is_fp8(self, name: str, in_features: int | None, out_features: int) -> bool:
        """Tell whether a layer is to be FP8, and raise where its sizes do not let it."""
        self.layer_names.append(name)
        if self.backend == "torch" or any(fnmatch.fnmatchcase(name, p) for p in self.exclude_layers):
            return False
        multiple = alignment(self.recipe)
        for what, size in (("inputs", in_features), ("outputs", out_features)):
            if size is not None and size % multiple:
                raise ModelError(
                    f"layer {name} has {size} {what}; FP8 needs a multiple of {multiple}, such as"
                    f" {nearest_multiples(size, multiple)} (change the model's dimensions or name the layer in"
                    " exclude_layers)"
                )
        return True

    def _function(self) -> LinearFunction:
        return torchao_layers.TorchaoLinear() if self.backend == "torchao" else EmulatedLinear(self.recipe)


class SelfAttention(nn.Module):
    """Multi-head self-attention of a pre-norm block; `qkv` holds the norm.

    With `is_causal` a token attends to itself and the ones before it. Padding must then be at the end of rows, where no
    real token looks, so that no mask is needed.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        is_causal: bool = False,
        dropout: float = 0.0,
        init_std: float = 0.02,
        output_init_std: float | None = None,
        normalization: Normalization = "LayerNorm",
        factory: LayerFactory | None = None,
        name: str = "attention",
    ) -> None:
        """Draw the weights; `name` is the layer's place in its model."""
        super().__init__()
        if dim % num_heads:
            raise ModelError(f"width {dim} is not divisible by {num_heads} attention heads")
        factory = factory or LayerFactory()
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.dropout = dropout
        self.qkv = factory.norm_linear(
            f"{name}.qkv", dim, 3 * dim, init_std=init_std, normalization=normalization
        )
        self.out_proj = factory.linear(
            f"{name}.out_proj", dim, dim, init_std=init_std if output_init_std is None else output_init_std
        )
        self.core = factory.core_attention(num_heads, dim // num_heads, dropout, is_causal=is_causal)

    def forward(self, x: Tensor, attention_mask: Tensor | AttentionSpans | None = None) -> Tensor:
        """Attend over the real tokens of each row, or within stretches of one row.

        Args:
            x: [B, N, D], not normalised.
            attention_mask: [B, N] bool, True = real token; None where no row is padded; or, with B = 1, the
                stretches that attend to themselves alone.
        """
        B, N, D = x.shape
        if isinstance(attention_mask, AttentionSpans):
            q, k, v = self.qkv(x).view(N, 3, self.num_heads, D // self.num_heads).unbind(dim=1)
            dropout = self.dropout if self.training else 0.0
            attended = packed_attention(q, k, v, attention_mask, dropout, is_causal=self.is_causal)
            return self.out_proj(attended.reshape(B, N, D))
        if self.core is not None:
            q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads).unbind(dim=2)
            return self.out_proj(self.core(q, k, v, attention_mask))
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        mask = None
        if attention_mask is not None and not self.is_causal:
            # A row without a real token attends to everything: a softmax over nothing is NaN in some kernels.
            mask = attention_mask | ~attention_mask.any(dim=-1, keepdim=True)
            mask = mask[:, None, None, :]  # broadcast over heads and queries, never materialised
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.is_causal,
        )
        return self.out_proj(attended.transpose(1, 2).reshape(B, N, D))


class MLP(nn.Module):
    """The feed-forward half of a pre-norm block; `linear1` holds the norm (and, for swiglu, the gate)."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        *,
        activation: Activation = "gelu",
        init_std: float = 0.02,
        output_init_std: float | None = None,
        normalization: Normalization = "LayerNorm",
        factory: LayerFactory | None = None,
        name: str = "mlp",
    ) -> None:
        """Draw the weights; `name` is the layer's place in its model."""
        super().__init__()
        check_choice("activation", activation, Activation)
        factory = factory or LayerFactory()
        self.activation: Activation = activation
        inner_dim = 2 * ffn_dim if activation == "swiglu" else ffn_dim
        self.linear1 = factory.norm_linear(
            f"{name}.linear1", dim, inner_dim, init_std=init_std, normalization=normalization
        )
        self.linear2 = factory.linear(
            f"{name}.linear2", ffn_dim, dim, init_std=init_std if output_init_std is None else output_init_std
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the MLP to each token of `x`, which is not normalised."""
        return self.linear2(activate(self.linear1(x), self.activation))


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation by name; swiglu halves the last dimension (first half gate, second half value)."""
    if activation == "swiglu":
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
    return {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[activation](x)


def _normalise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float32:
        # Under ZeRO weights may be bf16, which not every device takes beside fp32.
        weight, bias = weight.float(), None if bias is None else bias.float()
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, NORM_EPSILON)
    return F.layer_norm(x, weight.shape, weight, bias, NORM_EPSILON)
