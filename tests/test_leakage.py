"""On expression without structure no model gets below chance: nothing that is asked for stands in what is read.

Cells are drawn anew at every step, genes and bins at random, so nothing can be learned by heart either. Each test has a
counterpart with a leak, which the same training finds.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch

from data.collate import collate
from data.hashing import DrawKey
from data.masking import build_masking
from data.tokenizers import TokenizedCells
from models import autoregressive, masked_autoencoder
from models.autoregressive import AutoregressiveConfig, AutoregressiveModel
from models.encoder import EncoderConfig, MaskedCellEncoder
from models.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderConfig

NUM_GENES, LENGTH, NUM_CELLS, N_BINS = 20, 12, 48, 5
CHANCE_BIN = math.log(4)
SIZES: dict[str, Any] = {
    "vocab_size": 4 + NUM_GENES,
    "n_bins": N_BINS,
    "hidden_dim": 32,
    "num_layers": 1,
    "num_heads": 2,
    "dropout": 0.0,
    "use_value_prior": False,
}


def draw_batch(step: int, masking: dict[str, Any] | None) -> dict[str, Any]:
    """Draw cells of random genes in bins 1 to 4, and mask them as training does."""
    rng = np.random.default_rng(step)
    genes = np.concatenate([rng.permutation(NUM_GENES)[:LENGTH] for _ in range(NUM_CELLS)]).astype(np.int32)
    bins = rng.integers(1, N_BINS, len(genes)).astype(np.int32)
    offsets = np.arange(0, len(genes) + 1, LENGTH)
    cells = TokenizedCells(offsets, genes, bins.astype(np.float32), bins)
    masked = None
    if masking is not None:
        rows = np.arange(NUM_CELLS)
        draw = DrawKey(step, 0, 0)
        masked = build_masking(masking).apply(cells, rows, draw, NUM_GENES, N_BINS)
    batch = collate(cells, masked, prepend_cls=True)
    return {**batch, "depth": torch.from_numpy(rng.normal(5, 1, NUM_CELLS)).float()}


def trained_losses(model: Any, masking: dict[str, Any] | None, change: Any = None, steps: int = 150):
    """Train on drawn cells and return each loss by name, averaged over cells that were not trained on."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sums: dict[str, float] = {}
    weight = 0.0
    for step in range(steps + 15):
        batch = draw_batch(step, masking)
        batch = batch if change is None else change(batch)
        output = model.compute_loss(batch)
        if step < steps:
            optimizer.zero_grad()
            (output.sum / output.weight).backward()
            optimizer.step()
            continue
        weight += float(output.weight)
        for name, value in output.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {name: value / weight for name, value in sums.items()}


def assert_chance(loss: float, least: float, most: float | None = None) -> None:
    """Check that a loss is at chance; `most` is that of a model which has not learned to exclude the genes it sees."""
    assert least - 0.03 < loss < (least if most is None else most) + 0.1, (loss, least, most)


def shown(batch: dict[str, Any]) -> dict[str, Any]:
    """Show the bins that were hidden: the leak that a collator could have."""
    bins = batch["bins"].clone()
    index = batch["masked_index"]
    bins.view(-1)[index] = batch["value_labels"].flatten()[index]
    return {**batch, "bins": bins}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_masked_genes_and_their_expression_stay_at_chance():
    masking = {"mask_ratio": 0.25, "target": "gene", "random_replace_ratio": 0.0, "keep_ratio": 0.0}
    losses = trained_losses(MaskedCellEncoder(EncoderConfig(**SIZES)), masking)
    # Nine genes are seen, and a masked one is none of them.
    assert_chance(losses["gene_loss"], math.log(NUM_GENES - 9), math.log(NUM_GENES))
    assert_chance(losses["expression_loss"], CHANCE_BIN)


def test_the_expression_of_visible_genes_stays_at_chance_and_a_leak_is_found():
    masking = {"mask_ratio": 0.25, "target": "expression"}
    config = EncoderConfig(**SIZES, gene_loss_weight=0.0)
    assert_chance(trained_losses(MaskedCellEncoder(config), masking)["expression_loss"], CHANCE_BIN)
    leaking = trained_losses(MaskedCellEncoder(config), masking, shown)
    assert leaking["expression_loss"] < 0.5 * CHANCE_BIN


def test_the_masked_autoencoder_stays_at_chance_and_a_leak_is_found(monkeypatch):
    masking = {"mask_ratio": 0.25, "target": "expression"}
    config = MaskedAutoencoderConfig(**SIZES, decoder_layers=1)
    losses = trained_losses(MaskedAutoencoder(config), masking, steps=100)
    assert_chance(losses["expression_loss"], CHANCE_BIN)

    def telling(batch):
        return 4 + batch["value_labels"].flatten()[batch["masked_index"]]

    monkeypatch.setattr(masked_autoencoder, "asked_genes", telling)
    leaking = trained_losses(MaskedAutoencoder(config), masking, steps=60)
    assert leaking["expression_loss"] < 0.5 * CHANCE_BIN


def test_the_next_gene_and_its_expression_stay_at_chance_and_a_leak_is_found(monkeypatch):
    config = AutoregressiveConfig(**SIZES)
    losses = trained_losses(AutoregressiveModel(config), None)
    # The gene at place t is one of those that are not among the t before it.
    chance = sum(math.log(NUM_GENES - t) for t in range(LENGTH)) / LENGTH
    assert_chance(losses["gene_loss"], chance, math.log(NUM_GENES))
    assert_chance(losses["expression_loss"], CHANCE_BIN)
    # Not shifted: each place is asked for the gene that it sees.
    monkeypatch.setattr(autoregressive, "_next", lambda x: x.flatten())
    leaking = trained_losses(AutoregressiveModel(config), None, steps=80)
    assert leaking["gene_loss"] < 0.7 * chance
