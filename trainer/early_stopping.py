"""End a phase whose validation no longer improves; every rank comes to the same answer from the same figures."""

import math
from collections.abc import Mapping

from trainer.console import counted, notice
from trainer.errors import ConfigError
from trainer.phases import Phase
from trainer.run import Run


def note_evaluation(run: Run, phase: Phase, means: Mapping[str, float]) -> None:
    """Compare an evaluation with the best one of its phase, and say that the phase is to end where it is time.

    Args:
        run: its progress remembers the best figure and how many evaluations have passed since, also in checkpoints.
        phase: the phase that was evaluated.
        means: the evaluation's figures, the same on every rank; empty where no cell had anything to tell.

    Raises:
        ConfigError: there is no such figure.
    """
    settings, progress = run.config.early_stopping, run.progress
    if settings is None or progress.is_stopped:
        return
    if means and settings.metric not in means:
        raise ConfigError(
            f"early_stopping.metric: the evaluations of phase '{phase.name}' have no {settings.metric!r}; they have: "
            f"{', '.join(sorted(means))}"
        )
    value, best = means.get(settings.metric, math.nan), progress.best_metric
    gain = math.inf if best is None else (best - value if settings.mode == "min" else value - best)
    if math.isfinite(value) and gain > settings.min_delta:
        progress.best_metric, progress.evaluations_since_best = value, 0
        return
    progress.evaluations_since_best += 1
    if progress.evaluations_since_best >= settings.patience:
        progress.is_stopped = 1
        shown = "no finite figure" if best is None else f"{best:.6g}"
        notice(
            f"early stopping: phase '{phase.name}' ends at step {progress.global_step}, for {settings.metric} has not "
            f"improved on {shown} in {counted(settings.patience, 'evaluation')}"
        )


def check_early_stopping(run: Run) -> None:
    """Refuse early stopping where nothing is evaluated.

    Raises:
        ConfigError: no phase that runs has validation data.
    """
    running = [phase for phase in run.phases if phase.config.epochs > 0]
    if run.config.early_stopping is None or not running:
        return
    without = [phase.name for phase in running if phase.validation is None]
    if len(without) == len(running):
        raise ConfigError(
            "early_stopping: no phase has validation data, so nothing is evaluated; hold cells out (val_fraction of "
            "the loader, or datasets[].validation), or leave early_stopping out"
        )
    if without:
        notice(
            f"early_stopping: has no effect in {', '.join(without)}, which hold{'s' * (len(without) == 1)} no cells out"
        )
