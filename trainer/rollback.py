"""Go back to the last checkpoint after FP8 steps that were not finite, and on in bf16 for some steps."""

from pathlib import Path

from trainer.checkpoint import CheckpointWriter, list_checkpoints, open_checkpoint
from trainer.console import notice
from trainer.loop import train
from trainer.phases import DataFacts
from trainer.recorder import Recorder
from trainer.run import Run, TrainingStopped
from trainer.run_state import Saver, restore


def train_with_fallback(run: Run, writer: CheckpointWriter, folder: Path, facts: DataFacts) -> None:
    """Train to the end; where FP8 fails and the run says so, from the last checkpoint on in bf16 for a while.

    Raises:
        TrainingStopped: too many steps in a row were not finite, and bf16 does not help or was not asked for.
    """
    while True:
        try:
            return train(run)
        except TrainingStopped as stop:
            roll_back(run, writer, folder, facts, stop)


def roll_back(
    run: Run, writer: CheckpointWriter, folder: Path, facts: DataFacts, stop: TrainingStopped
) -> None:
    """Put the run back to its newest checkpoint and let it compute in bf16 from there; every rank comes here alike."""
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
    if ranks.is_main:
        run.recorder.close(0)
        trackers = saved.shared("run_state.safetensors")["trackers"]
        run.recorder = Recorder.open(config, folder, saved.step, trackers)
    if run.scores is not None:
        run.scores.rewind(saved.step)
    run.saver = Saver(writer, config, facts, progress)
    notice(
        f"rollback {rollbacks}: FP8 steps up to {failed_at} were not finite; on from step {saved.step} in bf16 until "
        f"step {progress.bf16_until}"
    )
