"""What is asked of a trained model and of its export, which must answer alike bit for bit.

`python -m trainer.export_probe FOLDER QUESTION` is the process that knows nothing but the exported folder.
"""

import hashlib
import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.cell_model import CLS, MASK, PAD, CellModel
from models.fine_tuned import FineTunedModel
from models.masked_heads import NUM_SPECIAL_TOKENS
from models.pretrained import from_pretrained, state_tensors

QUESTION_FILE, BATCH_FILE, ANSWER_FILE, HASHES_FILE = (
    "question.json",
    "batch.safetensors",
    "answer.safetensors",
    "hashes.json",
)
_CELLS, _TOKENS, _MASKED = 4, 24, 6


def is_known(model: nn.Module) -> bool:
    """Tell whether a batch can be made up for a model: it is one of ours."""
    return isinstance(model, CellModel | FineTunedModel)


def made_up_batch(model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Return made-up cells of one of our models' own vocabulary, each of another length, masked for pretraining.

    A causal model and one that is fine-tuned see no masks.
    """
    backbone = model.backbone if isinstance(model, FineTunedModel) else model
    assert isinstance(backbone, CellModel)
    config, generator = backbone.config, torch.Generator().manual_seed(seed)
    num_genes = config.vocab_size - NUM_SPECIAL_TOKENS
    width = min(_TOKENS, num_genes + 1, config.max_seq_len or _TOKENS)
    lengths = torch.linspace(width, max(2, width // 2), _CELLS).long()
    genes = torch.stack([torch.randperm(num_genes, generator=generator)[: width - 1] for _ in range(_CELLS)])
    tokens = torch.cat([torch.full((_CELLS, 1), CLS), genes + NUM_SPECIAL_TOKENS], dim=1)
    attention = torch.arange(width) < lengths[:, None]
    values = torch.rand((_CELLS, width), generator=generator) * 5
    labels = torch.full((_CELLS, width), -100)
    is_masked = attention & (torch.arange(width) % max(2, width // _MASKED) == 1)
    is_masked &= isinstance(model, CellModel) and not model.is_causal
    labels[is_masked] = tokens[is_masked]
    tokens = tokens.masked_fill(~attention, PAD).masked_fill(is_masked, MASK)
    batch: dict[str, Any] = {
        "tokens": tokens,
        "values": values.masked_fill(~attention | is_masked, 0.0),
        "attention_mask": attention,
        "num_tokens": int(lengths.sum()),
        "depth": torch.rand(_CELLS, generator=generator) * 5 + 5,
    }
    if is_masked.any():
        batch |= {"labels": labels, "masked_index": is_masked.flatten().nonzero().squeeze(1)}
    if config.n_bins is not None:
        bins = torch.randint(0, config.n_bins, (_CELLS, width), generator=generator)
        batch["bins"] = bins.masked_fill(is_masked, config.n_bins).masked_fill(~attention, 0)
    embedding = getattr(backbone, "technical_batch_embedding", None)
    if embedding is not None:
        count = embedding.num_embeddings
        batch["batch_idx"] = torch.randint(0, count, (_CELLS,), generator=generator)
    return batch


@torch.no_grad()
def answer(
    model: nn.Module, kind: str, batch: dict[str, Any], loss: dict[str, Any] | None
) -> dict[str, Tensor]:
    """Return what a model in evaluation mode makes of a batch.

    Args:
        model: the model.
        kind: `logits` for our models, `loss` for any other model, `weights` to compute nothing.
        batch: the batch.
        loss: what the run configured as `loss`, or None.
    """
    random.seed(0)  # for losses that draw noise or times
    np.random.seed(0)
    torch.manual_seed(0)
    model.eval()
    if kind == "weights":
        return {}
    if kind == "logits":
        asked: Any = model
        answers: dict[str, Tensor | None] = {**asked(batch)._asdict(), "embedding": asked.encode(batch)}
        return {name: tensor.contiguous() for name, tensor in answers.items() if tensor is not None}
    # What answers for a model of ours needs nothing of a run.
    from trainer.config.schema import LossConfig
    from trainer.losses import LossModule, build_loss

    settings = None if loss is None else LossConfig.model_validate(loss)
    output = LossModule(model, build_loss(settings)).eval()(batch, 0, None)
    metrics = {f"metric.{name}": tensor for name, tensor in output.metrics.items()}
    return {name: tensor.detach().clone() for name, tensor in {"loss": output.sum, **metrics}.items()}


def weight_hashes(model: nn.Module) -> dict[str, str]:
    """Return a hash of each tensor of a model's state: its type, shape and bytes."""
    hashes = {}
    for name, tensor in state_tensors(model).items():
        content = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        content.update(_bytes(tensor).numpy().data)
        hashes[name] = content.hexdigest()
    return hashes


def differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """Say which answers are not the same bit for bit, and by how much."""
    found = [f"{name} is missing" for name in sorted(ours.keys() ^ theirs.keys())]
    for name in sorted(ours.keys() & theirs.keys()):
        one, two = ours[name], theirs[name]
        if one.shape != two.shape or one.dtype != two.dtype:
            found.append(f"{name} is {list(two.shape)} {two.dtype} instead of {list(one.shape)} {one.dtype}")
        elif not torch.equal(_bytes(one), _bytes(two)):
            found.append(f"{name} differs by up to {float((one.double() - two.double()).abs().max()):.3g}")
    return found


def write_question(folder: Path, batch: dict[str, Any], **settings: Any) -> None:
    """Write a batch of tensors and plain values, and how it is to be answered.

    Raises:
        TypeError: a value is neither.
    """
    tensors = {name: value.contiguous() for name, value in batch.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in batch.items() if name not in tensors}
    (folder / QUESTION_FILE).write_text(json.dumps({"plain": plain, **settings}))
    save_file({name: value.clone() for name, value in tensors.items()}, folder / BATCH_FILE)


def read_question(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the batch and the settings that `write_question` wrote."""
    settings = json.loads((folder / QUESTION_FILE).read_text())
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / BATCH_FILE).items()}
    return {**settings.pop("plain"), **tensors}, settings


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _main(exported: str, question: str) -> None:
    folder = Path(question)
    batch, settings = read_question(folder)
    torch.set_num_threads(settings["num_threads"])  # sums are ordered by it
    model = from_pretrained(exported, trusted_modules=settings["trusted_modules"])
    (folder / HASHES_FILE).write_text(json.dumps(weight_hashes(model)))
    save_file(answer(model, settings["kind"], batch, settings["loss"]), folder / ANSWER_FILE)


if __name__ == "__main__":
    _main(*sys.argv[1:])
