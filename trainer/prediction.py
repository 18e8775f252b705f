"""Predict perturbed cells with a model, in sets, over any number of processes.

`python -m trainer predict` and the scoring of a run that trains share this. With one seed the cells are the same on any
number of ranks.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from data.predicted_values import PredictedRows, ValueDecoder
from data.prediction_sets import PredictionSets, SetBatch
from models.errors import ModelError
from trainer.distributed import Ranks
from trainer.losses import LossModule, move_to_device

DEFAULT_STEPS = 16
DEFAULT_BATCH_SIZE = 8

Draw = Callable[[SetBatch], Tensor]
"""Draws the tokens [B, S, N] of sets, on any device."""


class Block(NamedTuple):
    """What rank 0 gets of consecutive predicted cells."""

    first: int
    """Number of the first cell, as `PredictionSets` numbers them."""
    rows: PredictedRows


def check_can_draw(model: nn.Module, where: str) -> None:
    """Refuse a model that cannot draw perturbed cells.

    Raises:
        ModelError: says what it lacks.
    """
    diffusion = getattr(model, "diffusion", None)
    lacking = [
        name
        for holder, name in ((model, "encode_conditions"), (diffusion, "sample"), (diffusion, "blank"))
        if not callable(getattr(holder, name, None))
    ]
    if lacking:
        raise ModelError(
            f"{where}: {type(model).__name__} cannot draw perturbed cells: it has no {', '.join(lacking)}; predictions "
            "need a model as models.perturbation_transformer.PerturbationTransformer is: encode_conditions, and "
            "diffusion.sample and diffusion.blank"
        )


def predicts_cells_apart(model: nn.Module) -> bool:
    """Tell whether a model predicts the cells of a set each on its own, which it says itself."""
    return bool(getattr(model, "predicts_cells_apart", False))


def knows_technical_batches(model: nn.Module) -> bool:
    """Tell whether a model looks at technical batches; it does unless its configuration says that it does not."""
    return getattr(getattr(model, "config", None), "n_technical_batches", None) != 0


def draw_sets(
    module: nn.Module,
    batch: SetBatch,
    num_steps: int,
    *,
    device: torch.device | str,
    is_prepared: bool = False,
) -> Tensor:
    """Draw the tokens [B, S, N] of the cells of some sets.

    Args:
        module: the model; or, with `is_prepared`, what a run's strategy prepared (`run.strategy.module`), within whose
            forward pass the hooks of DDP and ZeRO run. Under ZeRO-3 every rank must draw as often as the others.
        batch: of `PredictionSets`.
        num_steps: passes through the network.
        device: where the model is.
        is_prepared: whether `module` is a prepared `LossModule`.
    """
    given: dict[str, Any] = move_to_device(batch.conditions, torch.device(device))
    given = {**given, "num_rows": batch.num_rows}
    with torch.no_grad():
        if is_prepared or isinstance(module, LossModule):
            return module(given, 0, None, instead=partial(draw_tokens, num_steps=num_steps))
        return draw_tokens(module, given, num_steps)


def draw_tokens(model: nn.Module, batch: dict[str, Any], num_steps: int) -> Tensor:
    """Draw sets of cells [B, S, N] from nothing but masks.

    Args:
        model: has `diffusion.sample` and `diffusion.blank`, as `models.diffusion.MaskedDiffusion` does.
        batch: on the device: `control` [B, C, N], `target_gene_idx`, `noise_seed` [B], and `num_rows`, the number S;
            `batch_idx` where the model knows technical batches.
        num_steps: passes through the network.
    """
    diffusion: Any = model.diffusion
    control = batch["control"]
    start = diffusion.blank(len(control), batch["num_rows"], control.shape[-1], device=control.device)
    return diffusion.sample(
        model,
        start,
        num_steps=num_steps,
        noise_seed=batch["noise_seed"],
        control_set=control,
        target_gene_idx=batch["target_gene_idx"],
        batch_idx=batch.get("batch_idx"),
    )


def predicted_blocks(
    draw: Draw,
    sets: PredictionSets,
    decoder: ValueDecoder,
    ranks: Ranks,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    before_round: Callable[[], None] | None = None,
) -> Iterator[Block]:
    """Yield predicted cells in their order; only rank 0 gets blocks, and all must iterate to the end.

    In every round each rank draws one batch. A rank that has none left draws the first set, which nobody asked for:
    under ZeRO-3 all take part in every forward pass.

    Args:
        draw: draws the tokens of a batch, such as `draw_sets` of a model.
        sets: what to predict, the same on every rank.
        decoder: turns tokens into values.
        ranks: that share the work.
        batch_size: sets of one batch.
        before_round: called before every round on every rank; what it raises must be raised on all of them.
    """
    for first in range(0, len(sets), batch_size * ranks.count):
        if before_round is not None:
            before_round()
        start = first + ranks.index * batch_size
        mine = np.arange(start, min(start + batch_size, len(sets)))
        error, rows = None, None
        try:
            rows = _predict(draw, sets, decoder, mine if len(mine) else np.arange(1))
        except Exception as failure:
            error = failure
        ranks.agree_on_error(error)
        assert rows is not None
        firsts = [first + rank * batch_size for rank in range(ranks.count)]
        yield from _gathered(
            ranks, rows if len(mine) else None, [sets.starts[min(n, len(sets))] for n in firsts]
        )


def _predict(draw: Draw, sets: PredictionSets, decoder: ValueDecoder, numbers: np.ndarray) -> PredictedRows:
    """Return the cells of some sets that were asked for."""
    batch = sets.batch(numbers)
    tokens = draw(batch).cpu().numpy()
    is_asked = np.arange(batch.num_rows) < batch.sizes[:, None]
    return decoder.decode(tokens[is_asked], batch.controls, batch.seeds)


def _gathered(ranks: Ranks, mine: PredictedRows | None, firsts: list[Any]) -> Iterator[Block]:
    """Bring the ranks' cells to rank 0, in their order, through host memory."""
    if ranks.count == 1:
        if mine is not None:
            yield Block(int(firsts[0]), mine)
        return
    sizes = [0, 0, 0] if mine is None else [len(mine.offsets) - 1, len(mine.columns), mine.num_capped]
    every = [torch.zeros(3, dtype=torch.int64) for _ in range(ranks.count)]
    torch.distributed.all_gather(every, torch.tensor(sizes), group=ranks.group)
    for rank, (shape, first) in enumerate(zip(every, firsts, strict=True)):
        num_cells, num_values, num_capped = shape.tolist()
        if num_cells == 0 or ranks.index not in (0, rank):
            continue
        if rank == ranks.index:
            assert mine is not None
            parts = [torch.from_numpy(np.ascontiguousarray(part)) for part in mine[:3]]
        else:
            parts = [
                torch.empty(num_cells + 1, dtype=torch.int64),
                torch.empty(num_values, dtype=torch.int32),
                torch.empty(num_values, dtype=torch.float32),
            ]
        if rank != 0:
            for part in parts:
                if ranks.is_main:
                    torch.distributed.recv(part, rank, group=ranks.group)
                else:
                    torch.distributed.send(part, 0, group=ranks.group)
        if ranks.is_main:
            offsets, columns, values = (part.numpy() for part in parts)
            yield Block(int(first), PredictedRows(offsets, columns, values, num_capped))
