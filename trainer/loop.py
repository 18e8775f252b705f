"""The phases loop: everything that a run does between its first and its last optimizer step.

`train` reads top-down: phases, their epochs, their optimizer steps; evaluation and checkpoints fall between steps.
Nothing here knows a model family or a data set.
"""

import contextlib
from typing import Any

from data.loader import MicroBatch
from trainer.benchmarking import benchmark_if_due
from trainer.evaluation import evaluate, make_up_for_evaluation
from trainer.losses import move_to_device
from trainer.meters import LossSum, Meters
from trainer.objective import set_objective_options
from trainer.phases import Phase
from trainer.prediction_scoring import score_if_due
from trainer.rollback import choose_precision
from trainer.run import Run, StepTotals, add_up, is_due, is_over, leave, position, save, write_records
from trainer.schedule import base_learning_rates, recorded_rates, sets_rate


def train(run: Run) -> None:
    """Run the phases from where `run.progress` stands to the end."""
    meters = Meters(run.ranks, run.strategy.device, run.peak)
    for phase in run.phases[run.progress.phase_index :]:
        begin_phase(run, phase)
        benchmark_if_due(run, phase)
        score_if_due(run, phase)
        make_up_for_evaluation(run, phase)
        while not is_over(run.progress, phase):
            run_epoch(run, phase, meters)
        run.progress.next_phase()
        save(run)
        phase.close()


def begin_phase(run: Run, phase: Phase) -> None:
    """Announce a phase and do what it says at its start; one that sets a rate starts the user's scheduler afresh."""
    run.recorder.phase_begins(phase, run.progress)
    if phase.config.epochs > 0:
        if phase.config.reinitialise and run.progress.phase_step == 0:
            where = f"datasets.{phase.index}.reinitialise"
            run.strategy.start_anew(phase.config.reinitialise, run.config.seed + 1 + phase.index, where)
        run.strategy.hold_still(phase.config.freeze)
        set_objective_options(run.module, run.config.datasets, phase.index)
    choose_precision(run)
    rates = base_learning_rates(phase.config, run.strategy.optimizer.param_groups)
    if run.scheduler is not None and run.progress.phase_step == 0 and sets_rate(phase.config):
        run.scheduler.restart(rates)


def run_epoch(run: Run, phase: Phase, meters: Meters) -> None:
    """Train to the end of the current epoch, then evaluate and save as the phase says."""
    progress = run.progress
    # A resume with fewer epochs may stand within one that is no longer to be trained: it ends where it is.
    is_given = progress.epoch < phase.config.epochs
    left = phase.steps_left(progress.epoch_step, progress.phase_step) if is_given else 0
    stop = progress.epoch_step + left
    meters.restart_clock()
    with contextlib.closing(phase.loader.steps(progress.epoch, progress.epoch_step, stop)) as steps:
        while progress.epoch_step < stop and not progress.is_stopped:
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
            after_step(run, phase, meters, epoch_is_over=progress.epoch_step == stop)
            if totals.is_asked_to_stop:  # a stream cannot give back a step that it has yielded
                leave(run, meters)
    end_epoch(run, phase, meters)


def train_step(
    run: Run, phase: Phase, micro_batches: list[MicroBatch], totals: StepTotals, meters: Meters
) -> None:
    """Take one optimizer step: every micro-batch's gradient, one clipped update, one record."""
    progress, strategy = run.progress, run.strategy
    groups = strategy.optimizer.param_groups
    if run.scheduler is None:
        phase.set_rates(groups, progress.phase_step)
    settings = recorded_rates(groups) | choose_precision(run)
    sums, norm = LossSum(), None
    if totals.weight > 0:
        # NaN from the first loss on that is not finite: it makes the gradient NaN, and so on every rank.
        doubt: Any = 0.0
        for index, (micro, weight) in enumerate(zip(micro_batches, totals.weights, strict=True)):
            # Gradients are averaged over ranks, so each rank's sum is scaled up by their number; a rank without
            # cells runs the same passes at weight 0.
            scale = run.ranks.count / totals.weight if weight > 0 else 0.0
            with strategy.accumulation(is_last=index == len(micro_batches) - 1):
                batch = move_to_device(micro.batch, strategy.device)
                # A rank without cells announces nothing: its weight of 0 is not that of the cells it stands in with.
                announced = weight if micro.num_cells else None
                output = strategy.module(batch, progress.phase_step, phase.total_steps, announced)
                if weight > 0:
                    doubt = doubt + 0.0 * output.sum.detach()
                strategy.backward(output.sum * (scale + doubt))
            sums.add(output.sum, output.metrics, weight)
        norm = strategy.step()
    if run.scheduler is not None:
        run.scheduler.step()
    progress.count_step(totals.cells, totals.tokens)
    run.cells_seen.add_step(phase, progress, micro_batches)
    meters.add_step({"kind": "train", **position(progress, phase), **settings}, sums, norm, totals)
    if meters.knows_of_a_skipped_step:
        write_records(run, meters)


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
    # At this very step, because early stopping ended the phase there, or a stream has run dry since.
    is_evaluated = progress.evaluated_step == progress.global_step
    by_steps = is_due(progress.phase_step, config.eval_every_steps)
    every = config.eval_every_epochs or (None if config.eval_every_steps else 1)
    run.cells_seen.end_epoch(phase, progress)
    progress.next_epoch()
    is_last = is_over(progress, phase)
    is_due_now = by_steps or is_last or is_due(progress.epoch, every)
    if phase.validation is not None and is_due_now and not is_evaluated:
        evaluate(run, phase)
    benchmark_if_due(run, phase)
    score_if_due(run, phase)
    if not is_over(progress, phase) and is_due(progress.epoch, config.save_every_epochs):
        save(run)
