"""Go back to the last checkpoint after FP8 steps that were not finite, and on in bf16 for some steps."""

from pathlib import Path
from typing import Any

from models.fp8_switch import switch
from trainer.checkpoint import CheckpointWriter
from trainer.checkpoint_folder import SavedCheckpoint, list_checkpoints, open_checkpoint
from trainer.console import notice
from trainer.phases import DataFacts
from trainer.recorder import Recorder
from trainer.run import Run, TrainingStopped
from trainer.run_state import Saver, restore


def choose_precision(run: Run) -> dict[str, Any]:
    """Let an FP8 run that has rolled back compute in bf16 for a while; return what a step's record says of it."""
    if run.config.fp8 is None or run.config.fp8.fallback_steps == 0:
        return {}
    switch.is_on = run.progress.global_step >= run.progress.bf16_until
    return {"is_fallback": not switch.is_on, "rollbacks": run.progress.rollbacks}


def roll_back(
    run: Run, writer: CheckpointWriter, folder: Path, facts: DataFacts, stop: TrainingStopped
) -> None:
    """Put the run back to its newest checkpoint and let it compute in bf16 from there; every rank comes here alike.

    Raises:
        TrainingStopped: it is `stop`: the steps were computed in bf16, or the run does not ask for a fallback.
    """
    config, ranks, progress = run.config, run.ranks, run.progress
    steps = 0 if config.fp8 is None else config.fp8.fallback_steps
    if steps == 0 or progress.global_step <= progress.bf16_until:
        raise stop
    writer.wait()
    newest = ""
    if ranks.is_main:
        complete = list_checkpoints(folder)
        newest = str(complete[-1]) if complete else ""
    newest = ranks.broadcast(newest)
    if not newest:
        raise stop
    failed_at, rollbacks = progress.global_step, progress.rollbacks + 1
    saved = open_checkpoint(newest, verify=False)
    restore(run, saved, config, facts)
    ranks.barrier()  # the next save may delete what a slower rank still reads
    progress.rollbacks, progress.bf16_until = rollbacks, saved.step + steps
    run.activity.begin("starting the trackers again", saved.step)
    if ranks.is_main:
        run.recorder.close(0)
        run.recorder = open_records(run, folder, saved)
    if run.scores is not None:
        run.scores.rewind(saved.step)
    run.saver = Saver(writer, config, facts, progress)
    notice(
        f"rollback {rollbacks}: FP8 steps up to {failed_at} were not finite; on from step {saved.step} in bf16 until "
        f"step {progress.bf16_until}"
    )


def open_records(run: Run, folder: Path, saved: SavedCheckpoint | None) -> Recorder:
    """Open the records of a run on rank 0, at the checkpoint that it has been put back to, if any.

    The record of an evaluation that the checkpoint says is still due is dropped: the run holds it again.
    """
    if saved is None:
        return Recorder.open(run.config, folder)
    redone: dict[str, Any] | None = None
    if run.progress.evaluation_due:
        phase = run.phases[run.progress.phase_index]
        redone = {"kind": "validation", "phase": phase.name, "epoch": run.progress.epoch}
    trackers = saved.state["trackers"]
    return Recorder.open(run.config, folder, saved.step, trackers, redone, run.cells_seen.epochs)
