"""Batches of cells made by hand, and small models of each family for them."""

from typing import Any

import torch
import torch.nn.functional as F

from models.autoregressive import AutoregressiveConfig, AutoregressiveModel
from models.encoder import EncoderConfig, MaskedCellEncoder
from models.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderConfig

NUM_GENES = 30
VOCAB = 4 + NUM_GENES
N_BINS = 5
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_bins": N_BINS,
    "n_technical_batches": 2,
    "hidden_dim": 16,
    "num_layers": 2,
    "num_heads": 4,
    "dropout": 0.0,
    "init_std": 0.2,
}


def make_encoder(seed: int = 0, **options: Any) -> MaskedCellEncoder:
    torch.manual_seed(seed)
    return MaskedCellEncoder(EncoderConfig(**SMALL | options))


def make_autoregressive(seed: int = 0, **options: Any) -> AutoregressiveModel:
    torch.manual_seed(seed)
    return AutoregressiveModel(AutoregressiveConfig(**SMALL | options))


def make_autoencoder(seed: int = 0, **options: Any) -> MaskedAutoencoder:
    torch.manual_seed(seed)
    return MaskedAutoencoder(MaskedAutoencoderConfig(**SMALL | {"decoder_layers": 2} | options))


def make_batch(
    num_cells: int = 3,
    num_tokens: int = 9,
    *,
    masked: int = 3,
    target: str = "expression",
    binned: bool = True,
    padded: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    genes = torch.stack(
        [torch.randperm(NUM_GENES, generator=generator)[: num_tokens - 1] for _ in range(num_cells)]
    )
    tokens = torch.cat([torch.full((num_cells, 1), 3), genes + 4], dim=1)
    bins = torch.randint(0, N_BINS, tokens.shape, generator=generator)
    values = bins.float()
    labels = torch.full_like(tokens, -100)
    value_labels = torch.full_like(tokens, -100) if binned else torch.full_like(values, torch.nan)
    places = slice(1, 1 + masked)
    value_labels[:, places] = (bins if binned else values)[:, places]
    is_masked = torch.zeros_like(tokens, dtype=torch.bool)
    is_masked[:, places] = True
    if target == "gene":
        labels[:, places] = tokens[:, places]
        tokens[is_masked] = 2
    bins[is_masked], values[is_masked] = N_BINS, 0.0
    bins[:, 0], values[:, 0] = 0, 0.0
    attention_mask = torch.ones_like(is_masked)
    if padded:
        attention_mask[0, -2:] = False
        tokens[0, -2:], bins[0, -2:], values[0, -2:] = 0, 0, 0.0
    batch = {
        "tokens": tokens,
        "values": values,
        "attention_mask": attention_mask,
        "labels": labels,
        "value_labels": value_labels,
        "masked_index": is_masked.flatten().nonzero().flatten(),
        "depth": torch.linspace(3, 8, num_cells),
        "batch_idx": torch.arange(num_cells) % 2,
        "num_tokens": int(attention_mask.sum()),
    }
    return batch | {"bins": bins} if binned else batch


def cells(num_tokens: int = 9, **options: Any) -> dict[str, Any]:
    batch = make_batch(masked=0, num_tokens=num_tokens, **options)
    return {k: v for k, v in batch.items() if k not in ("masked_index", "labels", "value_labels")}


def pad_longer(batch: dict[str, Any], extra: int) -> dict[str, Any]:
    longer = dict(batch)
    width = batch["tokens"].shape[1]
    for name, fill in (("tokens", 0), ("bins", 0), ("values", 0), ("attention_mask", 0), ("labels", -100)):
        longer[name] = F.pad(batch[name], (0, extra), value=fill)
    longer["value_labels"] = F.pad(batch["value_labels"], (0, extra), value=-100)
    index = batch["masked_index"]
    longer["masked_index"] = index // width * (width + extra) + index % width
    return longer


def packed(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of a padded batch one after the other."""
    mask = batch["attention_mask"]
    bounds = F.pad(mask.sum(dim=1).cumsum(0), (1, 0)).int()
    flat = {k: batch[k][mask].unsqueeze(0) for k in ("tokens", "bins", "values") if k in batch}
    kept = {k: batch[k] for k in ("depth", "batch_idx")}
    sizes = {"max_length": int(mask.sum(dim=1).max()), "num_tokens": int(mask.sum())}
    return {**flat, **kept, **sizes, "cu_seqlens": bounds}
