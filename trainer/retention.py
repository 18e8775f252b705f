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
    """Number of checkpoints with the best metric that stay, of each phase: losses on other data do not compare."""
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

    def expired(
        self, metrics: Mapping[int, float | None], phases: Mapping[int, str] | None = None
    ) -> list[int]:
        """Return the steps of the checkpoints to delete.

        Args:
            metrics: The metric of each checkpoint that there is, by its step.
            phases: The phase that the metric belongs to, by the same steps; None: all to one.
        """
        if self.keep_last is None:
            return []
        kept = set(sorted(metrics)[-self.keep_last :])
        if self.keep_every_steps is not None:
            kept |= {step for step in metrics if step % self.keep_every_steps == 0}
        sign = 1 if self.best_is == "lowest" else -1
        ranked: dict[str, list[tuple[float, int]]] = {}
        for step, metric in metrics.items():
            if metric is not None:
                ranked.setdefault((phases or {}).get(step, ""), []).append((sign * metric, step))
        kept |= {step for best in ranked.values() for _, step in sorted(best)[: self.keep_best]}
        return sorted(set(metrics) - kept)


def delete_expired(run_folder: Path, retention: Retention, newest: int, mark: str) -> None:
    """Delete the checkpoints that retention lets go, but never the one of step `newest`.

    Each first gets the temporary name `.checkpoint_<step>.<mark>.deleted.tmp`, so that a half-deleted folder
    never looks whole. Folders whose manifest cannot be read are left alone.
    """
    manifests = [read_manifest(folder) for folder in list_checkpoints(run_folder)]
    metrics = {manifest["step"]: manifest["metric"] for manifest in manifests}
    phases = {manifest["step"]: str(manifest["summary"].get("metric_phase", "")) for manifest in manifests}
    doomed = []
    for step in retention.expired(metrics, phases):
        if step != newest:
            doomed.append(run_folder / f".{checkpoint_name(step)}.{mark}.deleted.tmp")
            os.rename(run_folder / checkpoint_name(step), doomed[-1])
    if doomed:
        sync_folder(run_folder)  # the new names must be on the disk before the first file goes
    for folder in doomed:
        # A reader on a network file system can keep an entry alive; the sweep of a later save takes it.
        shutil.rmtree(folder, ignore_errors=True)
