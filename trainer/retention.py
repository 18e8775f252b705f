"""Which checkpoints of a run stay, and the deletion of the others."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.atomicfile import sync_folder
from trainer.checkpoint_folder import checkpoint_name, list_checkpoints, read_manifest
from trainer.errors import UserError


@dataclass(frozen=True)
class Retention:
    """Say which checkpoints stay; the newest always does."""

    keep_last: int | None = None
    """Number of newest checkpoints that stay; None keeps all."""
    keep_every_steps: int | None = None
    """Checkpoints whose step is a multiple of this stay, in optimizer steps."""
    keep_best: int = 0
    """Number of checkpoints with the best metric that stay."""
    best_is: Literal["lowest", "highest"] = "lowest"
    """Which metric is the best."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.keep_last is not None and self.keep_last < 1:
            raise UserError(
                f"keep_last is {self.keep_last}; it is at least 1, or null to keep all checkpoints"
            )
        if self.keep_every_steps is not None and self.keep_every_steps < 1:
            raise UserError(f"keep_every_steps is {self.keep_every_steps}; it is at least 1, or null")
        if self.keep_best < 0:
            raise UserError(f"keep_best is {self.keep_best}; it is at least 0")

    def expired(self, metrics: Mapping[int, float | None]) -> list[int]:
        """Return the steps of the checkpoints to delete, given the metric of each one that there is."""
        if self.keep_last is None:
            return []
        kept = set(sorted(metrics)[-self.keep_last :])
        if self.keep_every_steps is not None:
            kept |= {step for step in metrics if step % self.keep_every_steps == 0}
        sign = 1 if self.best_is == "lowest" else -1
        ranked = sorted((sign * metric, step) for step, metric in metrics.items() if metric is not None)
        kept |= {step for _, step in ranked[: self.keep_best]}
        return sorted(set(metrics) - kept)


def delete_expired(run_folder: Path, retention: Retention, newest: int, mark: str) -> None:
    """Delete the checkpoints that retention lets go, but never the one of step `newest`.

    Each first gets the temporary name `.checkpoint_<step>.<mark>.deleted.tmp`, so that a half-deleted folder
    never looks whole. Folders whose manifest cannot be read are left alone.
    """
    metrics = {step: metric for step, metric in map(_step_and_metric, list_checkpoints(run_folder))}
    doomed = []
    for step in retention.expired(metrics):
        if step != newest:
            doomed.append(run_folder / f".{checkpoint_name(step)}.{mark}.deleted.tmp")
            os.rename(run_folder / checkpoint_name(step), doomed[-1])
    if doomed:
        sync_folder(run_folder)  # the new names must be on the disk before the first file goes
    for folder in doomed:
        # A reader on a network file system can keep an entry alive; the sweep of a later save takes it.
        shutil.rmtree(folder, ignore_errors=True)


def _step_and_metric(folder: Path) -> tuple[int, float | None]:
    manifest = read_manifest(folder)
    return manifest["step"], manifest["metric"]
