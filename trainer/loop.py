"""The phases loop: everything that a run does between its first and its last optimizer step.

`train` reads top-down: phases, their epochs, their optimizer steps; evaluation and checkpoints fall between steps.
Nothing here knows a model family or a data set.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from data.loader import MicroBatch
from trainer import preemption
from trainer.activity import Activity
from trainer.config.schema import RunConfig
from trainer.console import notice
from trainer.distributed import Ranks
from trainer.losses import LossModule, move_to_device
from trainer.meters import LossSum, Meters
from trainer.phases import Phase
from trainer.preemption import Preempted
from trainer.progress import Progress
from trainer.random_state import random_state, set_random_state
from trainer.recorder import Recorder
from trainer.schedule import base_learning_rates, learning_rate_factor, set_learning_rates
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
    activity: Activity = field(default_factory=Activity)
    """What the main thread is doing, which trainer/watch.py watches."""


@dataclass(frozen=True)
class StepTotals:
    """One optimizer step's totals over all ranks, and this rank's weights."""

    weights: list[float]
    weight: float
    cells: float
    tokens: float
    is_asked_to_stop: bool = False
    """Whether any rank was asked to end with a checkpoint."""


def train(run: Run) -> None:
    """Run the phases from where `run.progress` stands to the end."""
    meters = Meters(run.ranks)
    if run.progress.phase_index >= len(run.phases):
        notice(
            f"this run is finished: all its phases ended at step {run.progress.global_step}, nothing is left to do"
        )
    for phase in run.phases[run.progress.phase_index :]:
        begin_phase(run, phase)
        if run.progress.evaluation_due:
            evaluate_at_last(run, phase)
        while not is_over(run.progress, phase):
            run_epoch(run, phase, meters)
        run.progress.next_phase()
        save(run)
        phase.close()


def begin_phase(run: Run, phase: Phase) -> None:
    """Announce a phase, start and hold still what it says; one that sets a rate starts the user's scheduler afresh."""
    run.recorder.phase_begins(phase, run.progress)
    if phase.config.epochs > 0:
        if phase.config.reinitialise and run.progress.phase_step == 0:
            where = f"datasets.{phase.index}.reinitialise"
            run.strategy.start_anew(phase.config.reinitialise, run.config.seed + 1 + phase.index, where)
        run.strategy.hold_still(phase.config.freeze)
    groups = run.strategy.optimizer.param_groups
    rates = base_learning_rates(phase.config, groups)
    if run.scheduler is not None and run.progress.phase_step == 0 and sets_rate(phase):
        run.scheduler.restart(rates)


def run_epoch(run: Run, phase: Phase, meters: Meters) -> None:
    """Train to the end of the current epoch, then evaluate and save as the phase says."""
    progress = run.progress
    stop = progress.epoch_step + steps_left(progress, phase)
    meters.restart_clock()
    with contextlib.closing(phase.loader.steps(progress.epoch, progress.epoch_step, stop)) as steps:
        while progress.epoch_step < stop:
            run.activity.begin("waiting for data", progress.global_step + 1)
            micro_batches = meters.next_of(steps)
            if micro_batches is None:
                break
            run.activity.begin("agreeing on the step", progress.global_step + 1, is_collective=True)
            totals = add_up(run, micro_batches)
            if totals.cells == 0:  # the streams of all ranks have run dry
                break
            if totals.is_asked_to_stop and not phase.loader.may_run_dry:
                leave(run, meters)
            run.activity.begin("forward and backward", progress.global_step + 1, is_collective=True)
            train_step(run, phase, micro_batches, totals, meters)
            epoch_is_over = progress.epoch_step == stop and not phase.loader.may_run_dry
            after_step(run, phase, meters, epoch_is_over)
            if totals.is_asked_to_stop:  # a stream cannot give back a step that it has yielded
                leave(run, meters)
    end_epoch(run, phase, meters)


def train_step(
    run: Run, phase: Phase, micro_batches: list[MicroBatch], totals: StepTotals, meters: Meters
) -> None:
    """Take one optimizer step: every micro-batch's gradient, one clipped update, one record."""
    progress, strategy = run.progress, run.strategy
    rates = set_rates(run, phase)
    sums, norm = LossSum(), None
    if totals.weight > 0:
        doubt: Any = (
            0.0  # NaN from the first loss on that is not finite: it makes the gradient NaN, on every rank
        )
        for index, (micro, weight) in enumerate(zip(micro_batches, totals.weights, strict=True)):
            # Gradients are averaged over ranks, so each rank's sum is scaled up by their number; a rank without
            # cells runs the same passes at weight 0.
            scale = run.ranks.count / totals.weight if weight > 0 else 0.0
            with strategy.accumulation(is_last=index == len(micro_batches) - 1):
                batch = move_to_device(micro.batch, strategy.device)
                output = strategy.module(batch, progress.phase_step, phase.total_steps)
                if weight > 0:
                    doubt = doubt + 0.0 * output.sum.detach()
                strategy.backward(output.sum * (scale + doubt))
            sums.add(output.sum, output.metrics, counts=weight > 0)
        norm = strategy.step()
    if run.scheduler is not None:
        run.scheduler.step()
    count_step(progress, totals)
    record = {"kind": "train", **position(progress, phase), **rates}
    meters.add_step(
        record, sums=sums, weight=totals.weight, gradient_norm=norm, cells=totals.cells, tokens=totals.tokens
    )
    if not isinstance(norm, Tensor) and (norm is None or not math.isfinite(norm)):
        write_records(
            run, meters
        )  # a norm that is still on its way from a GPU is looked at when it is written


def after_step(run: Run, phase: Phase, meters: Meters, epoch_is_over: bool) -> None:
    """Log, evaluate and save where a step is due for it; an epoch's end does these itself."""
    progress, config = run.progress, phase.config
    evaluates = phase.validation is not None and is_due(progress.phase_step, config.eval_every_steps)
    saves = is_due(progress.global_step, config.save_every_steps)
    if is_due(progress.phase_step, config.log_every_steps) or evaluates or saves or epoch_is_over:
        write_records(run, meters)
    if epoch_is_over:
        return
    if evaluates:
        evaluate(run, phase)
    if saves:
        save(run)
    if evaluates or saves:
        meters.restart_clock()


def end_epoch(run: Run, phase: Phase, meters: Meters) -> None:
    """Evaluate where the epoch is due for it, count the epoch, and save unless the phase's end does."""
    progress, config = run.progress, phase.config
    write_records(run, meters)
    by_steps = is_due(progress.phase_step, config.eval_every_steps)
    every = config.eval_every_epochs or (None if config.eval_every_steps else 1)
    progress.next_epoch()
    is_last = is_over(progress, phase)
    if phase.validation is not None and (by_steps or is_last or is_due(progress.epoch, every)):
        evaluate(run, phase)
    if not is_last:
        save(run)


def evaluate_at_last(run: Run, phase: Phase) -> None:
    """Make up for an evaluation that a request to stop cut short, and for the save that would have followed."""
    progress, is_epoch_end = run.progress, run.progress.epoch_step == 0
    if phase.validation is not None:
        evaluate(run, phase)
    progress.evaluation_due = 0
    is_save_due = is_due(progress.global_step, phase.config.save_every_steps)
    if not is_over(progress, phase) if is_epoch_end else is_save_due:
        save(run)


@torch.no_grad()
def evaluate(run: Run, phase: Phase) -> None:
    """Compute the mean validation loss over all ranks' cells, record it, and remember it for the next checkpoint."""
    strategy, progress, sums, totals = run.strategy, run.progress, LossSum(), [0.0, 0.0]
    limit, before = phase.config.validation_steps, random_state()
    progress.evaluation_due = 1
    strategy.module.eval()
    with contextlib.closing(phase.validation.evaluation_steps(limit)) as steps:
        for index, micro_batches in enumerate(waited_for(run, steps)):
            if limit is not None and index >= limit:
                break
            step = add_up(run, micro_batches)
            if step.is_asked_to_stop:
                set_random_state(before)  # the evaluation begins anew at the next start
                leave(run)
            if step.cells == 0:  # the streams of all ranks have run dry
                break
            for micro, weight in zip(micro_batches, step.weights, strict=True):
                batch = move_to_device(micro.batch, strategy.device)
                output = strategy.module(batch, progress.phase_step, phase.total_steps)
                sums.add(output.sum, output.metrics, counts=weight > 0)
                totals = [totals[0] + weight, totals[1] + micro.num_cells]
    strategy.module.train()
    progress.evaluation_due = 0
    *values, weight, cells = run.ranks.sum([*sums.to_host(), *totals])
    means = {name: value / weight for name, value in zip(sums.names, values, strict=True)} if weight else {}
    run.recorder.evaluated(
        phase, {"kind": "validation", **position(run.progress, phase), "cells": int(cells), **means}
    )
    run.saver.note_metric(phase.name, means.get("loss"))


def add_up(run: Run, micro_batches: list[MicroBatch]) -> StepTotals:
    """Agree on a step's weight, cells and tokens, and on requests to stop, before any forward pass."""
    weights = [run.module.weight(micro.batch) if micro.num_cells else 0.0 for micro in micro_batches]
    cells = sum(micro.num_cells for micro in micro_batches)
    tokens = sum(count_tokens(micro.batch) for micro in micro_batches if micro.num_cells)
    is_asked = stop_request(run) is not None
    weight, cells, tokens, asked = run.ranks.sum([sum(weights), cells, tokens, is_asked])
    return StepTotals(weights, weight, cells, tokens, asked > 0)


def waited_for(run: Run, steps: Iterator[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
    """Yield the steps of an evaluation, and tell the watch which time went into waiting for one."""
    while True:
        run.activity.begin("waiting for validation data", run.progress.global_step)
        micro_batches = next(steps, None)
        run.activity.begin("evaluation", run.progress.global_step, is_collective=True)
        if micro_batches is None:
            return
        yield micro_batches


def save(run: Run) -> None:
    """Hand the run's state to the writer; saving waits for files, not for other ranks' steps."""
    run.activity.begin("saving", run.progress.global_step)
    run.saver.save(run)


def stop_request(run: Run) -> str | None:
    """Return what asks this rank to end; the clock of rank 0 decides on the time limit."""
    return preemption.request(run.config.max_wall_seconds if run.ranks.is_main else None)


def leave(run: Run, meters: Meters | None = None) -> NoReturn:
    """Save where the run stands, complete on every rank, and end it; all ranks have agreed on it."""
    if meters is not None:
        write_records(run, meters)
    request = preemption.agreed_request(run.ranks, stop_request(run))
    run.activity.begin("saving before the end", run.progress.global_step)
    run.saver.save_for_good(run)
    step = run.progress.global_step
    raise Preempted(
        f"{request} at step {step}; checkpoint_{step} is complete, and resume_from: auto goes on from it"
    )


def write_records(run: Run, meters: Meters) -> None:
    """Write the steps since the last time, count those without an update, and stop where there are too many in a row.

    A step whose gradient is not finite is left out by all ranks; so is one with nothing to learn from.
    """
    progress, records = run.progress, meters.take()
    run.recorder.write(records)
    for record in records:
        progress.skipped_steps += record["is_skipped"]
        progress.skipped_in_a_row = progress.skipped_in_a_row + 1 if record["is_skipped"] else 0
        if progress.skipped_in_a_row >= run.config.max_nonfinite_steps:
            raise TrainingStopped(
                f"phase '{record['phase']}', step {record['global_step']}: {progress.skipped_in_a_row} steps in a row "
                "had no finite loss or gradient, or nothing to learn from (max_nonfinite_steps); lower the learning "
                "rate, look at metrics.jsonl for the step where it began, and resume from the checkpoint before it"
            )


def count_step(progress: Progress, totals: StepTotals) -> None:
    """Move the counters on by one optimizer step."""
    progress.global_step += 1
    progress.phase_step += 1
    progress.epoch_step += 1
    progress.cells += int(totals.cells)
    progress.tokens += int(totals.tokens)


def is_over(progress: Progress, phase: Phase) -> bool:
    """Tell whether a phase has nothing left to do, its last epoch's end included."""
    config = phase.config
    at_limit = config.max_steps is not None and progress.phase_step >= config.max_steps
    return progress.epoch >= config.epochs or (at_limit and progress.epoch_step == 0)


def steps_left(progress: Progress, phase: Phase) -> float:
    """Return the steps until the epoch or the phase ends, infinity where only the data can tell."""
    limits = [(phase.steps_per_epoch, progress.epoch_step), (phase.config.max_steps, progress.phase_step)]
    return min((max(0, limit - done) for limit, done in limits if limit is not None), default=math.inf)


def set_rates(run: Run, phase: Phase) -> dict[str, float]:
    """Set the learning rates of the coming step and return them for its record."""
    groups = run.strategy.optimizer.param_groups
    if run.scheduler is None:
        factor = learning_rate_factor(phase.config, run.progress.phase_step, phase.total_steps)
        set_learning_rates(groups, base_learning_rates(phase.config, groups), factor)
    rates = {"lr": float(groups[0]["lr"])}
    if len(groups) > 1:
        rates |= {
            f"lr/{group.get('name', group.get('part_of', index))}": float(group["lr"])
            for index, group in enumerate(groups)
        }
    return rates


def position(progress: Progress, phase: Phase) -> dict[str, Any]:
    """Return where a record stands in the run."""
    return {
        "global_step": progress.global_step,
        "phase": phase.name,
        "phase_step": progress.phase_step,
        "epoch": progress.epoch,
    }


def count_tokens(batch: dict[str, Any]) -> int:
    """Return the number of tokens in a batch, padding left out where the batch tells it."""
    if "num_tokens" in batch:
        return int(batch["num_tokens"])
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["tokens"].numel()


def sets_rate(phase: Phase) -> bool:
    """Tell whether a phase sets any learning rate of its own."""
    config = phase.config
    return any(value is not None for value in (config.lr, config.muon_lr, config.adam_lr)) or bool(
        config.group_lrs
    )


def is_due(count: int, every: int | None) -> bool:
    """Tell whether something that happens every so many steps or epochs falls on this one."""
    return every is not None and count > 0 and count % every == 0


def rehearse(run: Run) -> None:
    """Take the first step's batch through forward and backward without updating anything, and say what came out."""
    for phase in run.phases:
        with contextlib.closing(phase.loader.steps(0, 0, 1)) as steps:
            micro_batches = next(iter(steps))
        totals = add_up(run, micro_batches)
        weight = totals.weights[0]
        with run.strategy.accumulation(is_last=True):
            batch = move_to_device(micro_batches[0].batch, run.strategy.device)
            output = run.strategy.module(batch, 0, phase.total_steps)
            run.strategy.backward(output.sum * (run.ranks.count / totals.weight if weight > 0 else 0.0))
        run.strategy.hold_all()
        norm = run.strategy.step()
        loss = float(output.sum.detach()) / weight if weight else float("nan")
        notice(
            f"dry run: phase '{phase.name}' loss {loss:.4f}, gradient norm {float(norm):.4f} on one micro-batch"
        )
