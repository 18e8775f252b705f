"""Which of the runs of a name `resume_from: auto` goes on with, so that every job is done, and none twice.

A job is what a configuration trains; where it runs, what it logs and how often it saves do not tell jobs apart.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from trainer.agreement import flatten
from trainer.checkpoint_folder import named_checkpoints, read_manifest
from trainer.config.load import load_saved_config
from trainer.config.schema import RunConfig
from trainer.errors import CheckpointError, ConfigError

CONFIG = "config.yaml"
_NOT_OF_THE_JOB = {
    "run_name", "output_dir", "device", "amp_dtype", "resume_from", "checkpoint", "export_to", "trackers", "log_dir",
    "use_wandb", "wandb_project", "max_nonfinite_steps", "distributed_timeout_seconds", "max_wall_seconds", "compile",
    "num_threads", "launch", "notes",
}  # fmt: skip
_NOT_OF_A_PHASE = {"log_every_steps", "save_every_steps", "save_every_epochs", "benchmarks", "scoring"}
_EVALUATIONS = {"validation", "eval_every_epochs", "eval_every_steps", "validation_steps"}
_MOST_NAMED = 6


class Choice(NamedTuple):
    """Say which run goes on, or None for a new one, and what the user should know about it."""

    run: Path | None
    said: tuple[str, ...] = ()


def choose_run(config: RunConfig, runs: Sequence[Path], unsaved: Sequence[Path]) -> Choice:
    """Choose among the runs of a name.

    The run that was saved last goes on, unless it has ended and was another job: then one of the same job does, or
    the job begins. A job that ended and was begun again since begins again, if nothing of that was saved.

    Args:
        config: The job.
        runs: Those with checkpoints, the one that was saved last first.
        unsaved: Those without.
    """
    if not is_finished(runs[0]):
        return Choice(runs[0])
    ours = _job(config)
    for run in runs:
        if ours != _job_of(_newest(run)):
            continue
        again = [
            each
            for each in unsaved
            if is_finished(run) and _begun(each) > _saved(run) and ours == _job_of(each)
        ]
        if not again:
            return Choice(run)
        return Choice(
            None, (f"{run} has ended, and {again[0]} began the same job again and saved nothing: a new run",)
        )
    differences = what_differs(config, _newest(runs[0]))
    return Choice(
        None, (f"{runs[0]} has ended and was trained otherwise ({differences}): this is a new run",)
    )


def is_finished(run: Path) -> bool:
    """Tell whether a run's newest checkpoint is that of its end; one that is damaged tells nothing."""
    try:
        progress = read_manifest(_newest(run))["summary"].get("progress", {})
        return progress.get("phase_index", 0) >= len(load_saved_config(_newest(run) / CONFIG).datasets)
    except (CheckpointError, ConfigError):
        return False


def what_differs(config: RunConfig, folder: Path) -> str:
    """Name the settings of the job that differ from those in the `config.yaml` of a folder; empty: none."""
    ours, theirs = flatten(_job(config)), flatten(_job_of(folder))
    names = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _job(config: RunConfig) -> dict[str, Any]:
    job = config.model_dump(mode="json", exclude=_NOT_OF_THE_JOB)
    left_out = set(_NOT_OF_A_PHASE)
    if config.early_stopping is None:  # which goes by them
        left_out |= _EVALUATIONS
    if all(config.batch_settings(phase).global_batch_size is not None for phase in config.datasets):
        left_out.add("micro_batch_size")
        job.pop("micro_batch_size")
    job["datasets"] = [
        {key: value for key, value in phase.items() if key not in left_out} for phase in job["datasets"]
    ]
    return job


def _job_of(folder: Path) -> dict[str, Any] | None:
    """Return the job that the `config.yaml` of a run or a checkpoint describes; None: it cannot be read."""
    try:
        return _job(load_saved_config(folder / CONFIG))
    except ConfigError:
        return None


def _begun(unsaved: Path) -> float:
    """Return when a run without a checkpoint began: then its configuration was written."""
    try:
        return (unsaved / CONFIG).stat().st_mtime
    except OSError:
        return 0.0


def _saved(run: Path) -> float:
    return datetime.fromisoformat(read_manifest(_newest(run))["time"]).timestamp()


def _newest(run: Path) -> Path:
    return named_checkpoints(run)[-1]
