"""A stand-in for Transformer Engine: its names and signatures, computing in torch on any device.

It checks what the real one checks (sizes in an FP8 region, layers built for a CUDA device) and has its traps: an extra
state in the state dict, default masks that are causal, delayed scaling that moves on when a region ends.
"""

import contextlib
import sys
import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

LOG: list[tuple] = []


class _Recipe:
    def __init__(self):
        self.amax_history_len = 1024


class DelayedScaling(_Recipe): ...


class Float8CurrentScaling(_Recipe): ...


class Float8BlockScaling(_Recipe): ...


class MXFP8BlockScaling(_Recipe): ...


class _State:
    def __init__(self, num, length):
        self.scale = torch.ones(num)
        self.amax_history = torch.zeros(length, num)


_active: list[dict] = []


class TransformerEngineBaseModule(nn.Module):
    def __init__(self, name=None):
        super().__init__()
        self.fp8_meta = {}
        self.param_init_meta = {}

    def init_fp8_meta_tensors(self, recipe):
        if isinstance(recipe, DelayedScaling) and "scaling_fwd" not in self.fp8_meta:
            self.fp8_meta["scaling_fwd"] = _State(3, recipe.amax_history_len)
            self.fp8_meta["scaling_bwd"] = _State(2, recipe.amax_history_len)

    def get_extra_state(self):
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state):
        raise RuntimeError("Refusing to load pickled Transformer Engine extra state")

    def reset_parameters(self, defer_init=False):
        if not defer_init:
            for name, parameter in self.named_parameters(recurse=False):
                self.param_init_meta[name](parameter)

    def _check(self, inp):
        if not _active:
            return
        LOG.append(("fp8", type(self).__name__, tuple(inp.shape), tuple(self.weight.shape)))
        for dims in (inp.shape, self.weight.shape):
            if dims.numel() // dims[-1] % 16 or dims[-1] % 16:
                raise ValueError(f"FP8 execution requires ... divisible by 16, but got {list(dims)}")
        recipe = _active[-1]["recipe"]
        self.init_fp8_meta_tensors(recipe)
        if isinstance(recipe, DelayedScaling) and torch.is_grad_enabled():
            self.fp8_meta["scaling_fwd"].amax_history[0, 0] = inp.detach().abs().max()
            _active[-1]["layers"].append(self)


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features,
        out_features,
        *,
        init_method=None,
        bias=True,
        params_dtype=None,
        device="cuda",
        name=None,
    ):
        super().__init__(name)
        assert device == "cuda"
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.param_init_meta["weight"] = init_method
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))
            self.param_init_meta["bias"] = nn.init.zeros_
        else:
            self.bias = torch.Tensor()
        self.reset_parameters()

    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        self._check(inp)
        return F.linear(inp, self.weight, self.bias if self.bias.numel() else None)


class LayerNormLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features,
        out_features,
        eps=1e-5,
        *,
        init_method=None,
        bias=True,
        normalization="LayerNorm",
        params_dtype=None,
        device="cuda",
        name=None,
    ):
        super().__init__(name)
        assert device == "cuda"
        self.in_features, self.out_features = in_features, out_features
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.empty(in_features))
        self.param_init_meta["layer_norm_weight"] = nn.init.ones_
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = nn.Parameter(torch.empty(in_features))
            self.param_init_meta["layer_norm_bias"] = nn.init.zeros_
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.param_init_meta |= {"weight": init_method, "bias": nn.init.zeros_}
        self.reset_parameters()

    def forward(self, inp, is_first_microbatch=None, fp8_grad=False):
        self._check(inp)
        shape = self.layer_norm_weight.shape
        if self.layer_norm_bias is None:
            normed = F.rms_norm(inp, shape, self.layer_norm_weight, self.eps)
        else:
            normed = F.layer_norm(inp, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return F.linear(normed, self.weight, self.bias)


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
    ):
        super().__init__()
        self.format, self.mask_type, self.dropout = qkv_format, attn_mask_type, attention_dropout

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        *,
        attn_mask_type=None,
    ):
        assert (qkv_format or self.format) == "bshd"
        kind = attn_mask_type or self.mask_type
        LOG.append(("attention", kind))
        q, k, v = (t.transpose(1, 2) for t in (query_layer, key_layer, value_layer))
        if kind == "padding":
            assert (
                attention_mask.shape == (q.shape[0], 1, 1, q.shape[2]) and attention_mask.dtype == torch.bool
            )
            attention_mask = ~attention_mask  # True: masked out
        else:
            assert attention_mask is None
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask,
            is_causal=kind == "causal",
            dropout_p=self.dropout if self.training else 0.0,
        )
        return attended.transpose(1, 2).flatten(start_dim=2)


class autocast:
    def __init__(self, enabled=True, calibrating=False, recipe=None, amax_reduction_group=None):
        self.frame = {"recipe": recipe, "layers": []}

    def __enter__(self):
        assert not _active, "regions are not to be nested"
        LOG.append(("region", type(self.frame["recipe"]).__name__))
        _active.append(self.frame)

    def __exit__(self, *_):
        for layer in _active.pop()["layers"]:
            state = layer.fp8_meta["scaling_fwd"]
            amax = state.amax_history.max(dim=0).values
            state.scale.copy_(torch.where(amax > 0, 448 / amax, state.scale))
            state.amax_history.copy_(state.amax_history.roll(-1, 0))
            state.amax_history[0] = 0


def checkpoint(function, *args, use_reentrant=True):
    assert not use_reentrant
    LOG.append(("checkpoint",))
    recipe = _active[-1]["recipe"] if _active else None

    @contextlib.contextmanager
    def recompute():
        _active.append({"recipe": recipe, "layers": []})
        try:
            yield
        finally:
            _active.pop()

    def contexts():
        return contextlib.nullcontext(), recompute() if recipe else contextlib.nullcontext()

    return torch_checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def _is_available(return_reason=False):
    return (True, "") if return_reason else True


def _is_mxfp8_available(return_reason=False):
    reason = "Device compute capability 10.0 or higher required for MXFP8 execution."
    return (False, reason) if return_reason else False


def install(monkeypatch):
    """Let `models.te_layers` find this module, on a machine that seems to have a GPU."""
    from models import te_layers

    package, common = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.common")
    fake, recipes = (
        types.ModuleType("transformer_engine.pytorch"),
        types.ModuleType("transformer_engine.common.recipe"),
    )
    for member in (Linear, LayerNormLinear, DotProductAttention, autocast, checkpoint):
        setattr(fake, member.__name__, member)
    fake.is_fp8_available = fake.is_fp8_block_scaling_available = _is_available
    fake.is_mxfp8_available = _is_mxfp8_available
    for member in (DelayedScaling, Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling):
        setattr(recipes, member.__name__, member)
    for module in (package, common, fake, recipes):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    te_layers.load.cache_clear()
    te_layers._classes.cache_clear()
    LOG.clear()
    _active.clear()
    return fake


def uninstall():
    """Let `models.te_layers` look for the real one again."""
    from models import te_layers

    te_layers.load.cache_clear()
    te_layers._classes.cache_clear()
