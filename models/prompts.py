"""What a network is told of a prompt: tokens for each of a data set's prompts, and for the empty one.

Either a learned table, or the output of a CLIP text encoder from local weights: computed once for each prompt, before
a fresh start, and kept as a buffer. The encoder itself is no part of the model, is never trained, and no package or
file of its is needed afterwards.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.embeddings import Embedding
from models.errors import ModelError, check_choice

Library = Literal["transformers", "open_clip"]
Layer = Literal["last", "penultimate"]

_PACKAGES = {"transformers": "transformers", "open_clip": "open_clip_torch"}


@dataclass(frozen=True)
class TextEncoderConfig:
    """Say which text encoder turns prompts into tokens.

    Attributes:
        library: `transformers` for a folder with a CLIP text model and its tokenizer, `open_clip` for a file of
            weights.
        width: width of the tokens, which is the encoder's.
        num_tokens: tokens of a prompt, padding included; what the encoder was trained with, 77 for CLIP.
        layer: whose output is taken, normed by the encoder's final norm: `last`, or the one before it.
        arch: name of the architecture; of `open_clip`.
    """

    library: Library = "transformers"
    width: int = 512
    num_tokens: int = 77
    layer: Layer = "penultimate"
    arch: str = "ViT-B-32"

    def __post_init__(self) -> None:
        """Check every field."""
        check_choice("text_encoder.library", self.library, Library)
        check_choice("text_encoder.layer", self.layer, Layer)
        for name in ("width", "num_tokens"):
            if getattr(self, name) < 1:
                raise ModelError(f"text_encoder.{name} is {getattr(self, name)}; it must be at least 1")


class PromptTable(nn.Module):
    """Learned tokens of each prompt; the row after the last one is the empty prompt."""

    def __init__(self, num_prompts: int, num_tokens: int, dim: int) -> None:
        """Draw the table."""
        super().__init__()
        self.num_tokens = num_tokens
        self.table = Embedding(num_prompts + 1, num_tokens * dim, init_std=1.0)

    def forward(self, index: Tensor) -> Tensor:
        """Return [B, N, E] for indices [B]."""
        return self.table(index).unflatten(-1, (self.num_tokens, -1))


class EncodedPrompts(nn.Module):
    """Tokens of each prompt as a text encoder gave them; the row after the last one is the empty prompt."""

    tokens: Tensor

    def __init__(self, num_prompts: int, config: TextEncoderConfig) -> None:
        """Hold zeros until the prompts are encoded or loaded."""
        super().__init__()
        self.num_tokens = config.num_tokens
        self.register_buffer("tokens", torch.zeros(num_prompts + 1, config.num_tokens, config.width))
        self._is_known_filled = False

    def fill(self, tokens: Tensor) -> None:
        """Take the tokens [P + 1, N, E]."""
        if tokens.shape != self.tokens.shape:
            raise ModelError(
                f"the text encoder gives tokens of shape {list(tokens.shape[1:])} for a prompt, but text_encoder says "
                f"num_tokens {self.tokens.shape[1]} and width {self.tokens.shape[2]}; set these"
            )
        self.tokens.copy_(tokens)

    def forward(self, index: Tensor) -> Tensor:
        """Return [B, N, E] for indices [B]."""
        if not self._is_known_filled:
            if not bool(self.tokens.any()):
                raise ModelError(
                    "the prompts have not been encoded; call initialise_from_data before training, as the trainer "
                    "does, or load a trained model"
                )
            self._is_known_filled = True
        return self.tokens[index]


@torch.no_grad()
def encode_prompts(config: TextEncoderConfig, path: str | Path, prompts: Sequence[str]) -> Tensor:
    """Return the tokens [P, N, E] of prompts, from local weights alone.

    Raises:
        ModelError: the package is not installed, the weights are missing or of another kind, or a prompt is too long.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(
            f"text_encoder_path is {path}, which does not exist; it must name weights on this machine, since none are "
            "downloaded (text_encoder: null learns the prompts instead)"
        )
    try:
        if config.library == "transformers":
            return _encode_with_transformers(config, path, prompts)
        return _encode_with_open_clip(config, path, prompts)
    except ImportError as error:
        raise ModelError(
            f"text_encoder.library is {config.library}, which cannot be imported here ({error}); install "
            f"{_PACKAGES[config.library]}, or set text_encoder: null to learn the prompts"
        ) from error


def _encode_with_transformers(config: TextEncoderConfig, path: Path, prompts: Sequence[str]) -> Tensor:
    from transformers import CLIPTextModel, CLIPTokenizer

    if not path.is_dir():
        raise ModelError(f"text_encoder_path is {path}; with library transformers it must be a folder")
    try:
        tokenizer: Any = CLIPTokenizer.from_pretrained(str(path), local_files_only=True)
        # Only safetensors: the other format executes what it holds.
        model: Any = CLIPTextModel.from_pretrained(str(path), local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"text_encoder_path {path} is no folder of a CLIP text model in safetensors with its tokenizer ({reason})"
        ) from error
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    _check_lengths(config, prompts, [len(ids) for ids in encoded])
    padded = tokenizer(list(prompts), padding="max_length", max_length=config.num_tokens, return_tensors="pt")
    model = model.eval().float()
    states = model(input_ids=padded["input_ids"], output_hidden_states=True).hidden_states
    norm = getattr(model, "text_model", model).final_layer_norm
    return norm(states[-1 if config.layer == "last" else -2])


def _encode_with_open_clip(config: TextEncoderConfig, path: Path, prompts: Sequence[str]) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    open_clip = importlib.import_module("open_clip")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"text_encoder_path {path} is not a readable .safetensors file ({error}); no other kind is read"
        ) from error
    model: Any = open_clip.create_model(config.arch, pretrained=None).eval().float()
    missing, _ = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if not name.startswith("visual.")]
    if missing:
        raise ModelError(f"text_encoder_path {path} lacks weights of {config.arch}: {', '.join(missing[:6])}")
    tokenizer: Any = open_clip.get_tokenizer(config.arch)
    ids = tokenizer(list(prompts), context_length=config.num_tokens)
    ends = {int(ids.max())}  # the end of a text has the largest id, and is cut off where the text is too long
    lengths = [config.num_tokens + (int(row[-1]) not in ends and int(row[-1]) != 0) for row in ids]
    _check_lengths(config, prompts, lengths)
    x = model.token_embedding(ids) + model.positional_embedding[: ids.shape[1]]
    blocks = model.transformer.resblocks
    in_rows = getattr(model.transformer, "batch_first", True)
    x = x if in_rows else x.transpose(0, 1)
    for block in blocks[: len(blocks) - (config.layer == "penultimate")]:
        x = block(x, attn_mask=model.attn_mask)
    return model.ln_final(x if in_rows else x.transpose(0, 1))


def _check_lengths(config: TextEncoderConfig, prompts: Sequence[str], lengths: Sequence[int]) -> None:
    for prompt, length in zip(prompts, lengths, strict=True):
        if length > config.num_tokens:
            raise ModelError(
                f"prompt {prompt!r} has more than text_encoder.num_tokens {config.num_tokens} tokens; it would be "
                "cut off"
            )
