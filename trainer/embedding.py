"""Embed the cells of an h5ad file with a trained model, block by block, over any number of processes."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import nn

from data.h5ad_cells import H5adCells
from trainer.distributed import Ranks
from trainer.errors import UserError
from trainer.saved_model import embed

_BATCHES_PER_BLOCK = 8
_TIMEOUT = timedelta(hours=1)
"""How long a process may wait for another: reading and embedding one block on a slow disk."""

Device = Literal["auto", "cpu", "cuda"]
Predict = Callable[[dict[str, Any]], torch.Tensor]


@dataclass(frozen=True)
class Block:
    """What rank 0 gets of consecutive cells."""

    start: int
    embeddings: NDArray[np.float32]
    """[cells, D], NaN for cells without genes."""
    predictions: NDArray[np.float32] | None
    """[cells, K] probabilities or values of a fine-tuned model, NaN as above; None of one that only embeds."""
    lack_genes: NDArray[np.bool_]
    """[cells] which have no count of any of the model's genes, so that nothing can be said of them."""


def join_ranks(device: Device = "auto") -> tuple[Ranks, torch.device]:
    """Return which of the launched processes this is, and where it computes.

    Raises:
        UserError: a GPU was asked for and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch sees no CUDA device; use auto or cpu")
    on_gpu = has_gpu and device != "cpu"
    chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Ranks(0, 1), chosen
    # Results travel through host memory, so that one backend serves every device.
    torch.distributed.init_process_group(backend="gloo", timeout=_TIMEOUT)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size()), chosen


def embedded_blocks(
    model: nn.Module, cells: H5adCells, ranks: Ranks, batch_size: int, predict: Predict | None = None
) -> Iterator[Block]:
    """Yield the cells' embeddings and predictions in order; only rank 0 gets blocks, and all must iterate.

    Each rank embeds its share of every round of blocks, so that shares differ by at most one block.

    Args:
        model: embeds them.
        cells: of one file.
        ranks: every one comes here.
        batch_size: cells of a forward pass.
        predict: answers for a batch (`SavedModel.predict`); None: no answers are asked for.
    """
    size = batch_size * _BATCHES_PER_BLOCK
    for first in range(0, len(cells), size * ranks.count):
        mine = first + ranks.index * size
        error, found = None, None
        try:
            found = _embed_block(model, cells, mine, min(mine + size, len(cells)), batch_size, predict)
        except Exception as failure:
            error = failure
        ranks.agree_on_error(error)
        yield from _gathered(ranks, found, [first + rank * size for rank in range(ranks.count)])


def embed_all(model: nn.Module, cells: H5adCells, ranks: Ranks, batch_size: int) -> Block | None:
    """Return the embeddings of a whole file on rank 0, None on the others; every rank must call it."""
    blocks = list(embedded_blocks(model, cells, ranks, batch_size))
    if not ranks.is_main:
        return None
    embeddings, lacks = zip(*((block.embeddings, block.lack_genes) for block in blocks), strict=True)
    return Block(0, np.concatenate(embeddings), None, np.concatenate(lacks))


def _embed_block(
    model: nn.Module, cells: H5adCells, start: int, stop: int, batch_size: int, predict: Predict | None
) -> Block | None:
    """Return embeddings and predictions of the cells [start, stop), None where there are none."""
    embeddings, predictions, lacks = [], [], []
    for first in range(start, stop, batch_size):
        batch, lack_genes = cells.batch(first, min(first + batch_size, stop))
        embeddings.append(_without(embed(model, batch), lack_genes))
        if predict is not None:
            told = predict(batch)
            predictions.append(_without(told.reshape(len(told), -1), lack_genes))
        lacks.append(lack_genes)
    if not embeddings:
        return None
    answers = np.concatenate(predictions) if predictions else None
    return Block(start, np.concatenate(embeddings), answers, np.concatenate(lacks))


def _without(rows: torch.Tensor, lack_genes: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the rows, NaN for cells without genes: what a model makes of nothing is no answer."""
    return np.where(lack_genes[:, None], np.float32(np.nan), rows.numpy())


def _gathered(ranks: Ranks, mine: Block | None, starts: list[int]) -> Iterator[Block]:
    """Bring the ranks' blocks to rank 0, in their order."""
    if ranks.count == 1:
        if mine is not None:
            yield mine
        return
    own, shapes = torch.empty(0), [0, 0, 0]
    if mine is not None:
        predictions = mine.predictions
        parts = [mine.lack_genes[:, None], mine.embeddings, *([] if predictions is None else [predictions])]
        own = torch.from_numpy(np.concatenate(parts, axis=1, dtype=np.float32))
        shapes = [*mine.embeddings.shape, 0 if predictions is None else predictions.shape[1]]
    every = [torch.zeros(3, dtype=torch.int64) for _ in range(ranks.count)]
    torch.distributed.all_gather(every, torch.tensor(shapes))
    for rank, (shape, start) in enumerate(zip(every, starts, strict=True)):
        num_cells, width, num_outputs = shape.tolist()
        if num_cells == 0:
            continue
        buffer = own if rank == ranks.index else torch.empty(num_cells, 1 + width + num_outputs)
        if rank != 0 and ranks.index == rank:
            torch.distributed.send(buffer, 0)
        elif rank != 0 and ranks.is_main:
            torch.distributed.recv(buffer, rank)
        if ranks.is_main:
            lack_genes, values = buffer.numpy()[:, 0] > 0, buffer.numpy()[:, 1:]
            yield Block(start, values[:, :width], values[:, width:] if num_outputs else None, lack_genes)
