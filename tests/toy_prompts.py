"""A CLIP text encoder of random weights, small enough to write in a test."""

import json
from pathlib import Path

import torch


def write_clip(folder: Path, *, width: int) -> Path:
    """Write the encoder and its tokenizer of single letters, and return the folder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=words.index("<|startoftext|>"),
        eos_token_id=words.index("<|endoftext|>"),
        pad_token_id=words.index("<|endoftext|>"),
    )
    CLIPTextModel(config).save_pretrained(folder)
    return folder
