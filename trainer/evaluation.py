"""Evaluations between steps. A request to stop breaks one off, and the next start makes up for it."""

import contextlib
from collections.abc import Iterator

import torch

from data.loader import MicroBatch
from trainer.early_stopping import note_evaluation
from trainer.losses import move_to_device
from trainer.meters import LossSum, NamedMeans
from trainer.phases import Phase
from trainer.random_state import random_state, set_random_state
from trainer.run import Run, add_up, is_due, is_over, leave, position, save


@torch.no_grad()
def evaluate(run: Run, phase: Phase) -> None:
    """Compute the mean validation loss over all ranks' cells, record it, and remember it for the next checkpoint."""
    strategy, progress, sums, num_cells = run.strategy, run.progress, LossSum(), 0
    limit, before = phase.config.validation_steps, random_state()
    progress.evaluation_due = 1
    with strategy.evaluating(), contextlib.closing(phase.validation.evaluation_steps(limit)) as steps:
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
                announced = weight if micro.num_cells else None
                output = strategy.module(batch, progress.phase_step, phase.total_steps, announced)
                sums.add(output.sum, output.metrics, weight)
                num_cells += micro.num_cells
    progress.evaluation_due, progress.evaluated_step = 0, progress.global_step
    [means] = NamedMeans(run.ranks).of([sums])
    [cells] = run.ranks.sum([num_cells])
    run.recorder.evaluated(
        phase, {"kind": "validation", **position(run.progress, phase), "cells": int(cells), **means}
    )
    run.saver.note_metric(phase.name, means.get("loss"))
    note_evaluation(run, phase, means)


def make_up_for_evaluation(run: Run, phase: Phase) -> None:
    """Hold the evaluation that a request to stop has cut short, if any, and the save that would have followed."""
    progress, is_epoch_end = run.progress, run.progress.epoch_step == 0
    if not progress.evaluation_due:
        return
    if phase.validation is not None:
        evaluate(run, phase)
    progress.evaluation_due = 0
    is_save_due = is_due(progress.global_step, phase.config.save_every_steps)
    if not is_over(progress, phase) if is_epoch_end else is_save_due:
        save(run)


def waited_for(run: Run, steps: Iterator[list[MicroBatch]]) -> Iterator[list[MicroBatch]]:
    """Yield the steps of an evaluation, and tell the watch which time went into waiting for one."""
    while True:
        run.activity.begin("waiting for validation data", run.progress.global_step)
        micro_batches = next(steps, None)
        run.activity.begin("evaluation", run.progress.global_step, is_collective=True)
        if micro_batches is None:
            return
        yield micro_batches
