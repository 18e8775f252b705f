"""A tiny diffusion over sets of cells, for tests that train on perturbation data; `toy_sets.<name>` in configs."""

import torch
from torch import nn


class HalfMasked:
    """Mask half of the tokens, by the batch's own seeds, and ask for them."""

    def compute_loss(
        self, model, tokens, control_set=None, target_gene_idx=None, batch_idx=None, step=0, noise_seed=None
    ):
        cells = tokens if tokens.ndim == 3 else tokens[:, None]
        hidden = torch.stack(
            [
                torch.rand(cells.shape[1:], generator=torch.Generator().manual_seed(seed)) < 0.5
                for seed in noise_seed.tolist()
            ]
        )
        logits = model(cells.masked_fill(hidden, model.mask_id), control_set, target_gene_idx, batch_idx)
        return nn.functional.cross_entropy(logits[hidden], cells[hidden])


class SetModel(nn.Module):
    """Guess hidden values of a set from the others, its controls, its target and its technical batch."""

    def __init__(self, vocab_size, num_genes, n_technical_batches, num_targets=1, width=8):
        super().__init__()
        self.mask_id = vocab_size
        self.values = nn.Embedding(vocab_size + 1, width)
        self.genes = nn.Embedding(num_genes, width)
        self.targets = nn.Embedding(num_targets + 1, width)
        self.technical_batches = nn.Embedding(n_technical_batches, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(width, vocab_size)
        self.diffusion = HalfMasked()

    def forward(self, cells, control, target, batch_idx):
        hidden = self.values(cells) + self.genes.weight
        if control is not None:
            hidden = hidden + self.values(control).mean(dim=1, keepdim=True)
        if target is not None:
            target = target if target.ndim == 2 else target[:, None]
            hidden = hidden + self.targets(target + 1).sum(dim=1)[:, None, None]
        batches = self.technical_batches(batch_idx if batch_idx.ndim == 2 else batch_idx[:, None])
        hidden = hidden + batches[:, :, None]
        return self.head(self.body(hidden))


class NoDropout(SetModel):
    """The same without dropout, whose masks are each rank's own."""

    def __init__(self, vocab_size, num_genes, n_technical_batches, num_targets):
        super().__init__(vocab_size, num_genes, n_technical_batches, num_targets)
        self.body[2].p = 0.0
