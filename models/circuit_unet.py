"""A conditional UNet over circuits: embedded tokens [B, C, qubits, time], told about by tokens of a prompt.

Residual convolutions run along time, which each level but the last halves; qubits meet in attention, which sees all
positions of a level. The names of the sizes are those of genQC's UNets, so that presets fit both.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cross_attention import CrossAttention
from models.embeddings import TIME_SCALE, TimeEmbedding
from models.errors import ModelError
from models.layers import MLP, LayerFactory, Linear, Norm, SelfAttention
from models.transformer import TransformerBlock

INIT_STD = 0.02
_KERNEL = 3
_MLP_FACTOR = 2
_MOST_GROUPS = 32


class CircuitUNet(nn.Module):
    """Predict what a circuit's noise is, from the noisy circuit, the timestep and the tokens of the prompt.

    Args:
        model_features: channels of each level; time is halved between two levels.
        clr_dim: channels of the circuit.
        t_emb_size: width of the embedded timestep.
        cond_emb_size: width of the prompt's tokens.
        num_heads: attention heads of each level, or one number for all; must divide its channels.
        num_res_blocks: residual blocks of each level, or one number for all.
        transformer_depths: attention blocks of each level, or one number for all; 0 leaves them out.
        dropout: probability, in residual and attention blocks.
        activation_checkpointing: recompute each level in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        model_features: Sequence[int] = (64, 64, 128),
        clr_dim: int = 8,
        t_emb_size: int = 128,
        cond_emb_size: int = 64,
        num_heads: Sequence[int] | int = 4,
        num_res_blocks: Sequence[int] | int = 1,
        transformer_depths: Sequence[int] | int = 1,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        """Draw the weights."""
        super().__init__()
        widths = tuple(model_features)
        heads = _for_levels("num_heads", num_heads, len(widths), least=1)
        blocks = _for_levels("num_res_blocks", num_res_blocks, len(widths), least=1)
        depths = _for_levels("transformer_depths", transformer_depths, len(widths), least=0)
        _check_sizes(widths, heads, clr_dim, t_emb_size, cond_emb_size, dropout)
        self.cond_emb_size = cond_emb_size
        self.length_multiple = 2 ** (len(widths) - 1)
        self.activation_checkpointing = activation_checkpointing
        self.time_embedding = TimeEmbedding(t_emb_size, INIT_STD)
        self.conv_in = nn.Conv2d(clr_dim, widths[0], 1)

        def level(in_width: int, index: int) -> Level:
            return Level(
                in_width,
                widths[index],
                t_emb_size,
                cond_emb_size,
                num_heads=heads[index],
                num_res_blocks=blocks[index],
                depth=depths[index],
                dropout=dropout,
            )

        self.down_levels = nn.ModuleList()
        self.downs = nn.ModuleList()
        for index in range(len(widths) - 1):
            self.down_levels.append(level(widths[max(0, index - 1)], index))
            self.downs.append(nn.Conv2d(widths[index], widths[index], (1, 2), stride=(1, 2)))
        self.middle = level(widths[max(0, len(widths) - 2)], len(widths) - 1)
        self.ups = nn.ModuleList()
        self.up_levels = nn.ModuleList()
        for index in reversed(range(len(widths) - 1)):
            self.ups.append(nn.Conv2d(widths[index + 1], widths[index], (1, _KERNEL), padding="same"))
            self.up_levels.append(level(2 * widths[index], index))
        self.norm_out = ChannelNorm(widths[0])
        self.head = nn.Conv2d(widths[0], clr_dim, 1)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, c_emb: Tensor) -> Tensor:
        """Return [B, C, Q, T] for a noisy circuit of that shape, timesteps [B] and prompt tokens [B, N, E]."""
        if x.shape[-1] % self.length_multiple:
            raise ModelError(
                f"a circuit of length {x.shape[-1]} was given, but time is halved {len(self.downs)} times; pad to a "
                f"multiple of {self.length_multiple}, or give model_features fewer levels"
            )
        time = self.time_embedding(t / TIME_SCALE)
        x = self.conv_in(x)
        x = x + grid_positions(x)
        skipped = []
        for level, down in zip(self.down_levels, self.downs, strict=True):
            x = self._run(level, x, time, c_emb)
            skipped.append(x)
            x = down(x)
        x = self._run(self.middle, x, time, c_emb)
        for up, level in zip(self.ups, self.up_levels, strict=True):
            x = up(x.repeat_interleave(2, dim=-1))
            # Both halves count alike beside what one of them alone would be.
            x = torch.cat([x, skipped.pop() / math.sqrt(2)], dim=1)
            x = self._run(level, x, time, c_emb)
        return self.head(F.silu(self.norm_out(x)))

    def flops(self, num_circuits: int, num_qubits: int, length: int, context: int) -> float:
        """Return the operations of a forward and a backward pass, counted as `models.costs.encoder_flops` does.

        Args:
            num_circuits: circuits of the batch.
            num_qubits: qubits of the padded batch.
            length: its columns.
            context: tokens that each circuit attends to.
        """
        positions = num_qubits * length
        total = positions * sum(_weights(module) for module in (self.conv_in, self.head))
        total += _weights(self.time_embedding)
        for index, (level, down) in enumerate(zip(self.down_levels, self.downs, strict=True)):
            here = positions >> index
            total += _level_products(level, here, context) + here / 2 * _weights(down)
        total += _level_products(self.middle, positions >> len(self.downs), context)
        for index, (up, level) in enumerate(zip(self.ups, self.up_levels, strict=True)):
            here = positions >> (len(self.ups) - 1 - index)
            total += here * _weights(up) + _level_products(level, here, context)
        return 6.0 * num_circuits * total

    def _run(self, level: nn.Module, *arguments: Tensor) -> Tensor:
        if self.activation_checkpointing and self.training:
            return LayerFactory().checkpoint(level, *arguments)
        return level(*arguments)


class CircuitCompilationUNet(CircuitUNet):
    """A `CircuitUNet` that is told the unitary too, as further tokens beside the prompt's.

    Args:
        unitary_encoder_config: arguments of `UnitaryEncoder`; None takes its defaults.
        options: those of `CircuitUNet`.
    """

    def __init__(self, *, unitary_encoder_config: dict[str, Any] | None = None, **options: Any) -> None:
        """Draw the weights."""
        super().__init__(**options)
        given = dict(unitary_encoder_config or {})
        width = given.pop("cond_emb_size", self.cond_emb_size)
        if width != self.cond_emb_size:
            raise ModelError(
                f"unitary_encoder_config: cond_emb_size is {width}, but the UNet's is {self.cond_emb_size}; leave it "
                "out"
            )
        try:
            self.unitary_encoder = UnitaryEncoder(self.cond_emb_size, **given)
        except TypeError as error:
            raise ModelError(
                f"unitary_encoder_config has an argument that UnitaryEncoder does not take ({error})"
            ) from error

    def forward(self, x: Tensor, t: Tensor, c_emb: Tensor, U: Tensor) -> Tensor:
        """Return [B, C, Q, T]; `U` [B, 2, D, D] is the unitary's real and imaginary part."""
        return super().forward(x, t, torch.cat([c_emb, self.unitary_encoder(U)], dim=1))

    def flops(self, num_circuits: int, num_qubits: int, length: int, context: int) -> float:
        """Return the operations of a forward and a backward pass, those of the encoder with them."""
        tokens = self.unitary_encoder.num_tokens(2**num_qubits)
        of_encoder = num_circuits * self.unitary_encoder.products(tokens)
        return super().flops(num_circuits, num_qubits, length, context + tokens) + 6.0 * of_encoder


class UnitaryEncoder(nn.Module):
    """Turn a unitary into tokens: patches of its matrix, which attend to each other; any number of qubits.

    Args:
        cond_emb_size: width of the tokens.
        hidden_dim: width inside; None takes `cond_emb_size`.
        patch_size: rows and columns of a patch; must divide 2 to the number of qubits.
        num_heads: attention heads; must divide the width inside.
        depth: transformer blocks.
        dropout: probability, on the output of attention and MLP.
    """

    def __init__(
        self,
        cond_emb_size: int,
        hidden_dim: int | None = None,
        patch_size: int = 2,
        num_heads: int = 4,
        depth: int = 2,
        dropout: float = 0.0,
    ) -> None:
        """Draw the weights."""
        super().__init__()
        dim = cond_emb_size if hidden_dim is None else hidden_dim
        if patch_size < 1 or depth < 0 or dim < 4 or dim % 4:
            raise ModelError(
                f"unitary_encoder_config: patch_size {patch_size} must be positive, depth {depth} not negative, and "
                f"hidden_dim {dim} a multiple of 4"
            )
        self.patch_size = patch_size
        self.patches = Linear(2 * patch_size**2, dim, init_std=(2 * patch_size**2) ** -0.5)
        factory = LayerFactory()
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                num_heads,
                _MLP_FACTOR * dim,
                is_causal=False,
                dropout=dropout,
                attention_dropout=0.0,
                activation="gelu",
                normalization="LayerNorm",
                init_std=INIT_STD,
                output_init_std=INIT_STD / math.sqrt(2 * max(1, depth)),
                factory=factory,
                name=f"blocks.{index}",
            )
            for index in range(depth)
        )
        self.norm = Norm(dim)
        self.out = Linear(dim, cond_emb_size, init_std=dim**-0.5)

    def num_tokens(self, size: int) -> int:
        """Return how many tokens a matrix of `size` rows gives."""
        return (size // self.patch_size) ** 2

    def forward(self, unitary: Tensor) -> Tensor:
        """Return [B, N, E] for [B, 2, D, D]."""
        size = unitary.shape[-1]
        if unitary.shape[1:] != (2, size, size) or size % self.patch_size:
            raise ModelError(
                f"a unitary has shape {list(unitary.shape[1:])}; it must be [2, D, D] with D a multiple of patch_size "
                f"{self.patch_size}"
            )
        # An entry is about 1 / sqrt(D); so scaled, it is about 1 for any number of qubits.
        patches = F.pixel_unshuffle(unitary * math.sqrt(size), self.patch_size)  # [B, 2 p^2, D / p, D / p]
        tokens = self.patches(patches.flatten(2).transpose(1, 2))
        positions = grid_positions(tokens.transpose(1, 2).unflatten(2, patches.shape[2:]))
        tokens = tokens + positions.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens, None)
        return self.out(self.norm(tokens))

    def products(self, tokens: int) -> float:
        """Return the multiplications of a forward pass over one matrix."""
        dim = self.patches.out_features
        return tokens * _weights(self) + len(self.blocks) * 2.0 * tokens * tokens * dim


class Level(nn.Module):
    """What a UNet does at one resolution: residual blocks, then attention among its positions and to the prompt."""

    def __init__(
        self,
        in_width: int,
        width: int,
        time_dim: int,
        context_dim: int,
        *,
        num_heads: int,
        num_res_blocks: int,
        depth: int,
        dropout: float,
    ) -> None:
        """Draw the weights."""
        super().__init__()
        self.res_blocks = nn.ModuleList(
            ResidualBlock(in_width if index == 0 else width, width, time_dim, dropout)
            for index in range(num_res_blocks)
        )
        self.attention_blocks = nn.ModuleList(
            AttentionBlock(width, context_dim, num_heads, dropout, depth) for _ in range(depth)
        )

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Return [B, W, Q, T]."""
        for block in self.res_blocks:
            x = block(x, time)
        if not len(self.attention_blocks):
            return x
        tokens = x.flatten(2).transpose(1, 2)  # [B, Q T, W]
        for block in self.attention_blocks:
            tokens = block(tokens, context)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


class ResidualBlock(nn.Module):
    """Two convolutions along time, the timestep added between them; starts as the identity or a projection."""

    def __init__(self, in_width: int, width: int, time_dim: int, dropout: float) -> None:
        """Draw the weights."""
        super().__init__()
        self.norm1 = ChannelNorm(in_width)
        self.conv1 = nn.Conv2d(in_width, width, (1, _KERNEL), padding="same")
        self.time = Linear(time_dim, width, init_std=time_dim**-0.5)
        self.norm2 = ChannelNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(width, width, (1, _KERNEL), padding="same")
        self.skip = nn.Conv2d(in_width, width, 1) if in_width != width else None
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Return [B, W, Q, T]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (x if self.skip is None else self.skip(x)) + h


class AttentionBlock(nn.Module):
    """Attention among positions, to the prompt's tokens, and an MLP, each added to its input."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, dropout: float, depth: int) -> None:
        """Draw the weights."""
        super().__init__()
        self.dim = dim
        factory, std = LayerFactory(), dim**-0.5
        output_std = std / math.sqrt(3 * max(1, depth))
        self.self_attention = SelfAttention(dim, num_heads, init_std=std, output_init_std=output_std)
        self.cross_attention = CrossAttention(
            dim,
            context_dim,
            dim,
            num_heads,
            init_std=std,
            output_init_std=output_std,
            normalization="LayerNorm",
            factory=factory,
            name="cross_attention",
        )
        self.mlp = MLP(dim, _MLP_FACTOR * dim, init_std=std, output_init_std=output_std)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return [B, N, D] for [B, N, D] and the prompt's tokens [B, M, E]."""
        x = x + self.dropout(self.self_attention(x))
        x = x + self.dropout(self.cross_attention(x, context))
        return x + self.dropout(self.mlp(x))


class ChannelNorm(nn.GroupNorm):
    """A group norm over channels [B, W, ...], computed in fp32 whatever the precision of weights and input."""

    def __init__(self, width: int) -> None:
        """Take up to 32 groups, of four channels at least; the width is a multiple of 4."""
        super().__init__(math.gcd(width // 4, _MOST_GROUPS), width)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise."""
        return F.group_norm(input.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)


def grid_positions(x: Tensor) -> Tensor:
    """Return [1, W, H, L], sines of the two places in a grid, for x [B, W, H, L]; each takes half of the channels."""
    _, width, *sizes = x.shape
    parts = []
    for axis, size in enumerate(sizes):
        frequencies = torch.exp(
            torch.arange(width // 4, device=x.device, dtype=torch.float32)
            * (-math.log(10_000.0) / (width // 4))
        )
        angles = (
            torch.arange(size, device=x.device, dtype=torch.float32) * frequencies[:, None]
        )  # [W / 4, size]
        of_axis = torch.cat([angles.sin(), angles.cos()])
        parts.append(of_axis[:, :, None] if axis == 0 else of_axis[:, None, :])
    first, second = (part.expand(-1, *sizes) for part in parts)
    return torch.cat([first, second]).unsqueeze(0)


def _for_levels(name: str, given: Sequence[int] | int, count: int, *, least: int) -> tuple[int, ...]:
    """Return one number for each level."""
    values = (given,) * count if isinstance(given, int) else tuple(given)
    if len(values) != count or any(value < least for value in values):
        raise ModelError(
            f"{name} is {list(values)}; it must be one number for each of the {count} levels of model_features, or one "
            f"for all, each at least {least}"
        )
    return values


def _check_sizes(
    widths: tuple[int, ...],
    heads: tuple[int, ...],
    clr_dim: int,
    t_emb_size: int,
    cond_emb_size: int,
    dropout: float,
) -> None:
    if not widths or any(width < 4 or width % 4 for width in widths):
        raise ModelError(f"model_features is {list(widths)}; each level needs a positive multiple of 4")
    for width, count in zip(widths, heads, strict=True):
        if width % count:
            raise ModelError(f"model_features {width} is not divisible by num_heads {count}")
    for name, size in (("clr_dim", clr_dim), ("t_emb_size", t_emb_size), ("cond_emb_size", cond_emb_size)):
        if size < 1:
            raise ModelError(f"{name} is {size}; it must be at least 1")
    if not 0 <= dropout < 1:
        raise ModelError(f"dropout is {dropout}; it must be in [0, 1)")


def _weights(module: nn.Module) -> int:
    """Return the values of a module's matrices and kernels, which each position is multiplied with."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


def _level_products(level: nn.Module, positions: int, context: int) -> float:
    """Return the multiplications of a level's forward pass over one circuit."""
    assert isinstance(level, Level)
    total = 0.0
    for block in level.res_blocks:
        assert isinstance(block, ResidualBlock)
        of_time = _weights(block.time)
        total += positions * (_weights(block) - of_time) + of_time
    for block in level.attention_blocks:
        assert isinstance(block, AttentionBlock)
        of_context = _weights(block.cross_attention.kv)
        total += positions * (_weights(block) - of_context) + context * of_context
        total += 2.0 * positions * (positions + context) * block.dim
    return total
