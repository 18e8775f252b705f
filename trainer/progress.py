"""Where a run stands: the handful of numbers that resuming needs."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from trainer.errors import CheckpointError


@dataclass
class Progress:
    """Count what a run has done; saved in every checkpoint, changed by the loop alone."""

    global_step: int = 0
    """Optimizer steps of the whole run, skipped ones included."""
    phase_index: int = 0
    """The phase that is being trained, or the number of phases when the run is done."""
    phase_step: int = 0
    """Optimizer steps in this phase."""
    epoch: int = 0
    """Finished epochs of this phase."""
    epoch_step: int = 0
    """Optimizer steps in this epoch: with `epoch` the position in the order of cells."""
    cells: int = 0
    """Cells trained on, counted once for each time they were seen."""
    tokens: int = 0
    """Tokens trained on, padding left out."""
    skipped_steps: int = 0
    """Steps whose update was left out: a non-finite loss or gradient, or nothing to learn from."""
    skipped_in_a_row: int = 0
    """Such steps since the last good one."""
    evaluation_due: int = 0
    """1 from the beginning of an evaluation until it is recorded: a start from there begins with it."""
    evaluated_step: int = -1
    """The global step of this phase's last evaluation: an epoch that ends there has it already; -1: there is none."""
    rollbacks: int = 0
    """How often FP8 failed and the run went back to a checkpoint."""
    bf16_until: int = 0
    """The global step up to which an FP8 run computes in bf16 after the last of them."""
    best_metric: float | None = None
    """The best figure of this phase's evaluations that early stopping goes by; None: there is none yet."""
    evaluations_since_best: int = 0
    """Evaluations of this phase since then."""
    is_stopped: int = 0
    """1 where early stopping has ended this phase."""

    def count_step(self, cells: float, tokens: float) -> None:
        """Move on by one optimizer step, of so many cells and tokens over all ranks."""
        self.global_step += 1
        self.phase_step += 1
        self.epoch_step += 1
        self.cells += int(cells)
        self.tokens += int(tokens)

    def next_epoch(self) -> None:
        """Move to the start of the phase's next epoch."""
        self.epoch += 1
        self.epoch_step = 0

    def next_phase(self) -> None:
        """Move to the start of the next phase."""
        self.phase_index += 1
        self.phase_step = self.epoch = self.epoch_step = 0
        self.best_metric, self.evaluations_since_best, self.is_stopped = None, 0, 0
        self.evaluated_step = -1

    def to_dict(self) -> dict[str, int | float | None]:
        """Return the counters as a plain dict."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Progress":
        """Restore the counters; one that the checkpoint's version did not have stands as in a run that begins.

        Raises:
            CheckpointError: it has one that this version does not know, and would lose.
        """
        unknown = sorted(state.keys() - {field.name for field in fields(cls)})
        if unknown:
            raise CheckpointError(
                f"the checkpoint's progress counts {', '.join(unknown)}, which this version does not; go on with the "
                "version that wrote it"
            )
        best = state.get("best_metric")
        counters = {name: int(value) for name, value in state.items() if name != "best_metric"}
        return cls(**counters, best_metric=None if best is None else float(best))
