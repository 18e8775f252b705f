"""The phases loop: everything that a run does between its first and its last optimizer step.

`train` reads top-down: phases, their epochs, their optimizer steps; evaluation and checkpoints fall between steps.
Nothing here knows a model family or a data set.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch

from data.loader import MicroBatch
from trainer.config.schema import RunConfig
from trainer.console import notice
from trainer.distributed import Ranks, Strategy
from trainer.losses import LossModule, move_to_device
from trainer.meters import LossSum, Meters
from trainer.optim import is_frozen
from trainer.phases import Phase
from trainer.progress import Progress
from trainer.recorder import Recorder
from trainer.schedule import base_learning_rates, learning_rate_factor, set_learning_rates


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


@dataclass(frozen=True)
class StepTotals:
    """One optimizer step's totals over all ranks, and this rank's weights."""

    weights: list[float]
    weight: float
    cells: float
    tokens: float


def train(run: Run) -> None:
    """Run the phases from where `run.progress` stands to the end."""
    meters = Meters(run.ranks)
    if run.progress.phase_index >= len(run.phases):
        notice(
            f"this run is finished: all its phases ended at step {run.progress.global_step}, nothing is left to do"
        )
    for phase in run.phases[run.progress.phase_index :]:
        begin_phase(run, phase)
        while not is_over(run.progress, phase):
            run_epoch(run, phase, meters)
        run.progress.next_phase()
        run.saver.save(run)
        phase.close()


def begin_phase(run: Run, phase: Phase) -> None:
    """Announce a phase; one that sets a rate starts the user's scheduler afresh from it."""
    run.recorder.phase_begins(phase, run.progress)
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
            micro_batches = meters.next_of(steps)
            if micro_batches is None:
                break
            totals = add_up(run, micro_batches)
            if totals.cells == 0:  # the streams of all ranks have run dry
                break
            train_step(run, phase, micro_batches, totals, meters)
            epoch_is_over = progress.epoch_step == stop and not phase.loader.may_run_dry
            after_step(run, phase, meters, epoch_is_over)
    end_epoch(run, phase, meters)


def train_step(
    run: Run, phase: Phase, micro_batches: list[MicroBatch], totals: StepTotals, meters: Meters
) -> None:
    """Take one optimizer step: every micro-batch's gradient, one clipped update, one record."""
    progress, strategy = run.progress, run.strategy
    rates = set_rates(run, phase)
    sums, norm, is_good = LossSum(), None, False
    if totals.weight > 0:
        for index, (micro, weight) in enumerate(zip(micro_batches, totals.weights, strict=True)):
            # DDP averages gradients over ranks, so each rank's sum is scaled up by their number; a rank without
            # cells runs the same passes at weight 0.
            scale = run.ranks.count / totals.weight if weight > 0 else 0.0
            with strategy.accumulation(is_last=index == len(micro_batches) - 1):
                batch = move_to_device(micro.batch, strategy.device)
                output = strategy.module(batch, progress.phase_step, phase.total_steps)
                strategy.backward(output.sum * scale)
            sums.add(output.sum, output.metrics, counts=weight > 0)
        strategy.drop_gradients(frozen_names(run, phase))
        norm = strategy.clip_gradients(run.config.max_grad_norm)
        is_good = run.ranks.max([not all(map(math.isfinite, (float(norm), *sums.to_host()[:1])))])[0] == 0
        strategy.step() if is_good else strategy.discard()
        strategy.zero_gradients()
    if run.scheduler is not None:
        run.scheduler.step()
    count_step(progress, totals, is_good)
    record = {"kind": "train", **position(progress, phase), **rates, "is_skipped": not is_good}
    meters.add_step(
        record, sums=sums, weight=totals.weight, gradient_norm=norm, cells=totals.cells, tokens=totals.tokens
    )
    if progress.skipped_in_a_row >= run.config.max_nonfinite_steps:
        run.recorder.write(meters.take())
        raise TrainingStopped(
            f"phase '{phase.name}', step {progress.global_step}: {progress.skipped_in_a_row} steps in a row had no "
            "finite loss or gradient, or nothing to learn from (max_nonfinite_steps); lower the learning rate, look at "
            "metrics.jsonl for the step where it began, and resume from the checkpoint before it"
        )


def after_step(run: Run, phase: Phase, meters: Meters, epoch_is_over: bool) -> None:
    """Log, evaluate and save where a step is due for it; an epoch's end does these itself."""
    progress, config = run.progress, phase.config
    evaluates = phase.validation is not None and is_due(progress.phase_step, config.eval_every_steps)
    saves = is_due(progress.global_step, config.save_every_steps)
    if is_due(progress.phase_step, config.log_every_steps) or evaluates or saves or epoch_is_over:
        run.recorder.write(meters.take())
    if epoch_is_over:
        return
    if evaluates:
        evaluate(run, phase)
    if saves:
        run.saver.save(run)
    if evaluates or saves:
        meters.restart_clock()


def end_epoch(run: Run, phase: Phase, meters: Meters) -> None:
    """Evaluate where the epoch is due for it, count the epoch, and save unless the phase's end does."""
    progress, config = run.progress, phase.config
    run.recorder.write(meters.take())
    by_steps = is_due(progress.phase_step, config.eval_every_steps)
    every = config.eval_every_epochs or (None if config.eval_every_steps else 1)
    progress.next_epoch()
    is_last = is_over(progress, phase)
    if phase.validation is not None and (by_steps or is_last or is_due(progress.epoch, every)):
        evaluate(run, phase)
    if not is_last:
        run.saver.save(run)


@torch.no_grad()
def evaluate(run: Run, phase: Phase) -> None:
    """Compute the mean validation loss over all ranks' cells, record it, and remember it for the next checkpoint."""
    strategy, sums, totals = run.strategy, LossSum(), [0.0, 0.0]
    limit = phase.config.validation_steps
    strategy.module.eval()
    with contextlib.closing(phase.validation.evaluation_steps(limit)) as steps:
        for index, micro_batches in enumerate(steps):
            if limit is not None and index >= limit:
                break
            if phase.validation.may_run_dry and add_up(run, micro_batches).cells == 0:
                break
            for micro in micro_batches:
                weight = run.module.weight(micro.batch) if micro.num_cells else 0.0
                batch = move_to_device(micro.batch, strategy.device)
                output = strategy.module(batch, run.progress.phase_step, phase.total_steps)
                sums.add(output.sum, output.metrics, counts=weight > 0)
                totals = [totals[0] + weight, totals[1] + micro.num_cells]
    strategy.module.train()
    *values, weight, cells = run.ranks.sum([*sums.to_host(), *totals])
    means = {name: value / weight for name, value in zip(sums.names, values, strict=True)} if weight else {}
    run.recorder.evaluated(
        phase, {"kind": "validation", **position(run.progress, phase), "cells": int(cells), **means}
    )
    run.saver.note_metric(phase.name, means.get("loss"))


def add_up(run: Run, micro_batches: list[MicroBatch]) -> StepTotals:
    """Agree on a step's weight, cells and tokens over all ranks, before any forward pass."""
    weights = [run.module.weight(micro.batch) if micro.num_cells else 0.0 for micro in micro_batches]
    cells = sum(micro.num_cells for micro in micro_batches)
    tokens = sum(count_tokens(micro.batch) for micro in micro_batches if micro.num_cells)
    weight, cells, tokens = run.ranks.sum([sum(weights), cells, tokens])
    return StepTotals(weights, weight, cells, tokens)


def count_step(progress: Progress, totals: StepTotals, is_good: bool) -> None:
    """Move the counters on by one optimizer step."""
    progress.global_step += 1
    progress.phase_step += 1
    progress.epoch_step += 1
    progress.cells += int(totals.cells)
    progress.tokens += int(totals.tokens)
    progress.skipped_steps += not is_good
    progress.skipped_in_a_row = 0 if is_good else progress.skipped_in_a_row + 1


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
        rates |= {f"lr/{group.get('name', index)}": float(group["lr"]) for index, group in enumerate(groups)}
    return rates


def position(progress: Progress, phase: Phase) -> dict[str, Any]:
    """Return where a record stands in the run."""
    return {
        "global_step": progress.global_step,
        "phase": phase.name,
        "phase_step": progress.phase_step,
        "epoch": progress.epoch,
    }


def frozen_names(run: Run, phase: Phase) -> list[str]:
    """Return the parameters that this phase holds still."""
    return [name for name, _ in run.module.named_parameters() if is_frozen(name, phase.config.freeze)]


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
        norm = run.strategy.clip_gradients(None)
        run.strategy.zero_gradients()
        loss = float(output.sum.detach()) / weight if weight else float("nan")
        notice(
            f"dry run: phase '{phase.name}' loss {loss:.4f}, gradient norm {float(norm):.4f} on one micro-batch"
        )
