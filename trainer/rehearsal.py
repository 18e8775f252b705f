"""A dry run's step: the first batch of each phase that trains through forward and backward, without an update."""

import contextlib

from trainer.console import notice
from trainer.losses import move_to_device
from trainer.objective import set_objective_options
from trainer.run import Run, add_up


def rehearse(run: Run) -> None:
    """Take the first step's batch through forward and backward without updating anything, and say what came out."""
    for phase in run.phases:
        if phase.config.epochs == 0:
            continue
        set_objective_options(run.module, run.config.datasets, phase.index)
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
