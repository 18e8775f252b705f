"""Vectors of genes from how they vary together between cells that have the same labels."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.errors import ModelError

MAX_CELLS = 4096
"""Cells that are looked at: what is kept of them takes 4 bytes a cell and gene."""
_MORE_DIRECTIONS = 8
"""Directions beyond those wanted, which make the strongest ones of a random projection exact."""


class Coexpression(NamedTuple):
    """Hold what was found.

    Attributes:
        vectors: [N, dim], zeros behind the last direction; the product of two genes' vectors is how much they vary
            together.
        num_directions: directions that are stronger than those of genes that vary each on their own.
        num_cells: cells that were looked at.
    """

    vectors: Tensor
    num_directions: int
    num_cells: int


def coexpression_vectors(batches: Iterable[dict[str, Any]], num_genes: int, dim: int) -> Coexpression:
    """Find the strongest directions in which the tokens of genes vary together.

    Cells are compared with the mean of their own set and technical batch (single cells: of their type and technical
    batch in their training batch), so what differs between perturbations and types plays no part. A cell's mean over
    all genes is taken away: depth moves all of them. Of independent genes the largest eigenvalue of the correlation
    matrix is (1 + sqrt(genes / cells))^2 (Marchenko and Pastur); weaker directions are noise and left out.

    Raises:
        ModelError: the batches show no two cells with the same labels.
    """
    blocks, freedom, count = [], 0, 0
    for cells, group in _cells(batches):
        change, free = _from_group_means(cells, group)
        blocks.append(change[: MAX_CELLS - count])
        freedom += free
        count += len(blocks[-1])
        if count >= MAX_CELLS:
            break
    if freedom < 1:
        raise ModelError(
            "gene_vectors is coexpression, but the training data shows no two cells of one set, or of one cell type "
            "and technical batch; leave pooling away, or set gene_vector_dim: 0"
        )
    table = torch.cat(blocks)  # [C, N]
    deviation = (table.square().sum(dim=0) / freedom).sqrt()
    table = table / torch.where(deviation > 0, deviation, 1.0)
    table = table - table.mean(dim=1, keepdim=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        size = min(dim + _MORE_DIRECTIONS, *table.shape)
        _, strength, directions = torch.svd_lowrank(table, q=size, niter=4)
    eigenvalues = (strength.square() / freedom)[:dim]
    is_kept = eigenvalues > (1 + (num_genes / freedom) ** 0.5) ** 2
    vectors = torch.zeros(num_genes, dim)
    found = directions[:, : len(eigenvalues)] * ((eigenvalues - 1).clamp(min=0).sqrt() * is_kept)
    vectors[:, : found.shape[1]] = found
    return Coexpression(vectors, int(is_kept.sum()), len(table))


def _cells(batches: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens [C, N] and the number of each cell's group [C]."""
    for batch in batches:
        for name in ("tokens", "control"):
            tokens = batch.get(name)
            if tokens is None:
                continue
            labels = [batch[key] for key in ("cell_type_idx", "batch_idx") if key in batch]
            if tokens.ndim == 3:
                labels.append(torch.arange(len(tokens)))
                labels = [each if each.ndim == 2 else each.unsqueeze(1) for each in labels]
                labels = [each.expand(tokens.shape[:2]).flatten() for each in labels]
            elif not labels:
                labels = [torch.zeros(len(tokens), dtype=torch.int64)]
            group = torch.stack(labels, dim=1).unique(dim=0, return_inverse=True)[1]
            yield tokens.reshape(-1, tokens.shape[-1]), group


def _from_group_means(tokens: Tensor, group: Tensor) -> tuple[Tensor, int]:
    """Return the differences [C, N] from the means of the groups, 0 where a gene is hidden, and their freedom."""
    is_shown = (tokens >= 0).float()
    values = tokens.clamp(min=0).float()
    size = int(group.max()) + 1
    sums = torch.zeros(size, tokens.shape[1]).index_add_(0, group, values)
    counts = torch.zeros(size, tokens.shape[1]).index_add_(0, group, is_shown)
    means = sums / counts.clamp(min=1)
    return (values - means[group]) * is_shown, len(tokens) - size
