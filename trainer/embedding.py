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
    """[cells, D]."""
    predictions: NDArray[np.float32] | None
    """[cells, K] probabilities or values of a fine-tuned model; None of one that only embeds."""


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


def embed_all(
    model: nn.Module, cells: H5adCells, ranks: Ranks, batch_size: int
) -> NDArray[np.float32] | None:
    """Return the embeddings [cells, D] of a whole file on rank 0, None on the others; every rank must call it."""
    parts = [block.embeddings for block in embedded_blocks(model, cells, ranks, batch_size)]
    return np.concatenate(parts) if ranks.is_main else None


def _embed_block(
    model: nn.Module, cells: H5adCells, start: int, stop: int, batch_size: int, predict: Predict | None
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None] | None:
    """Return embeddings and predictions of the cells [start, stop), None where there are none."""
    embeddings, predictions = [], []
    for first in range(start, stop, batch_size):
        batch = cells.batch(first, min(first + batch_size, stop))
        embeddings.append(embed(model, batch).numpy())
        if predict is not None:
            told = predict(batch).numpy()
            predictions.append(told.reshape(len(told), -1))
    if not embeddings:
        return None
    return np.concatenate(embeddings), np.concatenate(predictions) if predictions else None


def _gathered(
    ranks: Ranks, mine: tuple[NDArray[np.float32], NDArray[np.float32] | None] | None, starts: list[int]
) -> Iterator[Block]:
    """Bring the ranks' blocks to rank 0, in their order."""
    if ranks.count == 1:
        if mine is not None:
            yield Block(starts[0], *mine)
        return
    own, shapes = torch.empty(0), [0, 0, 0]
    if mine is not None:
        embeddings, predictions = mine
        joined = embeddings if predictions is None else np.concatenate([embeddings, predictions], axis=1)
        own = torch.from_numpy(np.ascontiguousarray(joined, dtype=np.float32))
        shapes = [*embeddings.shape, 0 if predictions is None else predictions.shape[1]]
    every = [torch.zeros(3, dtype=torch.int64) for _ in range(ranks.count)]
    torch.distributed.all_gather(every, torch.tensor(shapes))
    for rank, (shape, start) in enumerate(zip(every, starts, strict=True)):
        num_cells, width, num_outputs = shape.tolist()
        if num_cells == 0:
            continue
        buffer = own if rank == ranks.index else torch.empty(num_cells, width + num_outputs)
        if rank != 0 and ranks.index == rank:
            torch.distributed.send(buffer, 0)
        elif rank != 0 and ranks.is_main:
            torch.distributed.recv(buffer, rank)
        if ranks.is_main:
            values = buffer.numpy()
            yield Block(start, values[:, :width], values[:, width:] if num_outputs else None)
