"""What a run works with, and what its training and its evaluations have in common."""

import functools
from dataclasses import dataclass, field
from typing import Any, NoReturn

from data.loader import MicroBatch
from trainer import preemption
from trainer.activity import Activity
from trainer.cells_seen import CellsSeen
from trainer.config.schema import RunConfig
from trainer.costs import batch_flops, peak_of_device
from trainer.distributed import Ranks
from trainer.losses import LossModule
from trainer.meters import Meters, StepTotals
from trainer.phases import Phase
from trainer.preemption import Preempted
from trainer.progress import Progress
from trainer.recorder import Recorder
from trainer.strategy import Strategy


class TrainingStopped(RuntimeError):
    """Report a run that cannot go on: too many steps in a row without a finite update."""


@dataclass
class Run:
    """Everything that the loop works with."""

    config: RunConfig
    ranks: Ranks
    strategy: Strategy
    module: LossModule
    phases: list[Phase]
    progress: Progress
    recorder: Recorder
    saver: Any
    """`trainer.run_state.Saver`: writes what `progress` stands for."""
    scheduler: Any = None
    """The user's scheduler, or None: then the learning rate is a pure function of phase and step."""
    scores: Any = None
    """`trainer.scoring_queue.ScoringQueue` on rank 0 of a run that scores held-out cells, else None."""
    activity: Activity = field(default_factory=Activity)
    """What the main thread is doing, which trainer/watch.py watches."""
    cells_seen: CellsSeen = field(init=False)
    """What the steps that the run stands on have been given."""

    def __post_init__(self) -> None:
        """Begin the account of cells."""
        self.cells_seen = CellsSeen(self.ranks)

    @functools.cached_property
    def peak(self) -> float | None:
        """Return the peak of one device in operations a second; None: it is a CPU, or the table has no figure."""
        return peak_of_device(self.strategy.device, self.config.precision or "bf16")


def add_up(run: Run, micro_batches: list[MicroBatch]) -> StepTotals:
    """Agree on a step's weight, cells and tokens, and on requests to stop, before any forward pass."""
    weights = [run.module.weight(micro.batch) if micro.num_cells else 0.0 for micro in micro_batches]
    cells = sum(micro.num_cells for micro in micro_batches)
    tokens = sum(count_tokens(micro.batch) for micro in micro_batches if micro.num_cells)
    padded = sum(micro.batch["tokens"].numel() for micro in micro_batches if micro.num_cells)
    flops = 0.0
    if run.peak is not None:
        of_batches = (
            batch_flops(run.module.model, micro.batch) for micro in micro_batches if micro.num_cells
        )
        flops = sum(flops or 0.0 for flops in of_batches)
    is_asked = stop_request(run) is not None
    mine = [sum(weights), cells, tokens, padded, flops, is_asked]
    weight, cells, tokens, padded, flops, asked = run.ranks.sum(mine)
    return StepTotals(weights, weight, cells, tokens, padded, flops, asked > 0)


def count_tokens(batch: dict[str, Any]) -> int:
    """Return the number of tokens in a batch, padding left out where the batch tells it."""
    if "num_tokens" in batch:
        return int(batch["num_tokens"])
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["tokens"].numel()


def write_records(run: Run, meters: Meters) -> None:
    """Write the steps since the last time, count those without an update, and stop where there are too many in a row.

    A step whose gradient is not finite is left out by all ranks; so is one with nothing to learn from.
    """
    progress, records = run.progress, meters.take()
    run.recorder.write(records)
    if run.scores is not None:
        run.scores.poll()
    for record in records:
        if record["is_skipped"]:
            run.cells_seen.add_skipped(record["cells"])
        progress.skipped_steps += record["is_skipped"]
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if record["is_skipped"] else 0
        if progress.skipped_in_a_row >= run.config.max_nonfinite_steps:
            raise TrainingStopped(
                f"phase '{record['phase']}', step {record['global_step']}: {progress.skipped_in_a_row} steps in a row "
                "had no finite loss or gradient, or nothing to learn from (max_nonfinite_steps); lower the learning "
                "rate, look at metrics.jsonl for the step where it began, and resume from the checkpoint before it"
            )


def save(run: Run) -> None:
    """Hand the run's state to the writer; saving waits for files, not for other ranks' steps."""
    run.activity.begin("saving", run.progress.global_step)
    run.saver.save(run)


def stop_request(run: Run) -> str | None:
    """Return what asks this rank to end; the clock of rank 0 decides on the time limit."""
    return preemption.request(run.config.max_wall_seconds if run.ranks.is_main else None)


def leave(run: Run, meters: Meters | None = None) -> NoReturn:
    """Save where the run stands, complete on every rank, and end it; all ranks have agreed on it."""
    run.strategy.back_to_training()  # an evaluation may be under way
    if meters is not None:
        write_records(run, meters)
    request = preemption.agreed_request(run.ranks, stop_request(run))
    run.activity.begin("saving before the end", run.progress.global_step)
    run.saver.save_for_good(run)
    step = run.progress.global_step
    raise Preempted(
        f"{request} at step {step}; checkpoint_{step} is complete, and resume_from: auto goes on from it"
    )


def is_over(progress: Progress, phase: Phase) -> bool:
    """Tell whether a phase has nothing left to do, its last epoch's end included."""
    config = phase.config
    at_limit = config.max_steps is not None and progress.phase_step >= config.max_steps
    is_at_end = at_limit or bool(progress.is_stopped) or progress.epoch >= config.epochs
    return is_at_end and progress.epoch_step == 0


def is_due(count: int, every: int | None) -> bool:
    """Tell whether something that happens every so many steps or epochs falls on this one."""
    return every is not None and count > 0 and count % every == 0


def position(progress: Progress, phase: Phase) -> dict[str, Any]:
    """Return where a record stands in the run."""
    return {
        "global_step": progress.global_step,
        "phase": phase.name,
        "phase_step": progress.phase_step,
        "epoch": progress.epoch,
    }
