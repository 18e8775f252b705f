"""What a checkpoint holds, and how a run is put back to it: everything that the next step depends on."""

import dataclasses
from typing import Any

import torch
from torch import nn

from models.fp8_state import fp8_state, load_fp8_state, merged_fp8_state
from trainer.averaging import drop_average
from trainer.checkpoint import CheckpointWriter
from trainer.checkpoint_folder import MODEL, RUN_STATE, SavedCheckpoint
from trainer.config.load import dump_yaml
from trainer.config.schema import RunConfig
from trainer.optimizer_changes import find_changes, put_in_force
from trainer.phases import DataFacts, Phase
from trainer.progress import Progress
from trainer.random_state import random_state, seed_dropout, set_random_state
from trainer.resume_checks import (
    check_facts,
    check_fit,
    check_groups,
    check_loss,
    check_not_ended,
    check_trajectory,
    refuse_streams,
    trajectory,
)
from trainer.run import Run
from trainer.shards import SHARD, open_tensors
from trainer.zero_building import gathered_where_divided


class Saver:
    """Write the run's checkpoints."""

    def __init__(
        self, writer: CheckpointWriter, config: RunConfig, facts: DataFacts, last: Progress | None
    ) -> None:
        """Take the writer and what does not change; `last` is the progress that the run was resumed from."""
        self._writer = writer
        self._config = config
        self._facts = facts
        self._last = None if last is None else last.to_dict()
        self._metric: float | None = None
        self._metric_phase = ""

    def note_metric(self, phase: str, validation_loss: float | None) -> None:
        """Remember the validation loss that the next checkpoint is ranked by, among those of the same phase."""
        self._metric, self._metric_phase = validation_loss, phase

    def save(self, run: Run) -> None:
        """Copy the run's state and let the writer write it; nothing where this progress was saved last."""
        step = run.progress.global_step
        if run.progress.to_dict() == self._last:
            return
        self._last = run.progress.to_dict()
        saving = run.activity.now[0]
        run.activity.begin("adding up the cells", step, is_collective=True)
        run.cells_seen.merge()
        run.activity.begin(saving, step)
        run.recorder.sync()
        shared = collect_shared(run, self._config, self._facts) if run.ranks.is_main else {}
        phase = run.phases[min(run.progress.phase_index, len(run.phases) - 1)]
        summary = {
            "phase": phase.name,
            "metric_phase": self._metric_phase,
            "progress": run.progress.to_dict(),
        }
        rank_files = {"rank_state": collect_rank(run)}
        shard = run.strategy.shard()
        if shard is not None:
            rank_files[SHARD] = shard
        self._writer.save(step, rank_files, shared, metric=self._metric, summary=summary)
        self._metric = None
        run.recorder.saved(step, f"checkpoint_{step}", self._writer.stall_seconds)
        run.recorder.account_for_cells(step, run.cells_seen.epochs)

    def save_for_good(self, run: Run) -> None:
        """Save as `save` does, and return when all that was saved is complete on every rank."""
        self.save(run)
        self._writer.wait()


def collect_shared(run: Run, config: RunConfig, facts: DataFacts) -> dict[str, Any]:
    """Return the files that are the same for all ranks, by name."""
    strategy = run.strategy
    state: dict[str, Any] = {
        "progress": run.progress.to_dict(),
        **strategy.shared_state(),
        "scheduler": None if run.scheduler is None else run.scheduler.state_dict(),
        "technical_batches": facts.technical_batches,
        "n_technical_batches": facts.n_technical_batches,
        "sizes": facts.sizes,
        "value_kinds": value_kinds(run.phases),
        "label_names": list(facts.label_names),
        "tokenizer_options": facts.tokenizer_options,
        "trackers": run.recorder.tracker_state(),
        "trajectory": trajectory(config, run.phases),
    }
    files: dict[str, Any] = {
        MODEL: strategy.weights(),
        RUN_STATE: state,
        **run.cells_seen.files(),
        "config.yaml": dump_yaml(config),
    }
    if facts.gene_space is not None:
        files["genes.json"] = facts.gene_space.to_json()
    return files


def value_kinds(phases: list[Phase]) -> dict[str, str]:
    """Return by phase what its cells' values are (`counts`, `lognorm`), of those whose data tells it."""
    kinds = {}
    for phase in phases:
        facts = getattr(getattr(phase.loader, "source", None), "facts", dict)()
        if facts.get("value_kind") is not None:
            kinds[phase.name] = facts["value_kind"]
    return kinds


def collect_rank(run: Run) -> dict[str, Any]:
    """Return what only this rank knows: random state, scales of FP8, the position in a stream that tells it."""
    loader = None
    if run.progress.phase_index < len(run.phases) and run.progress.epoch_step > 0:
        loader = run.phases[run.progress.phase_index].loader.state()
    return {"random": random_state(), "loader": loader, "fp8": fp8_state(run.module.model)}


def restore(run: Run, saved: SavedCheckpoint, config: RunConfig, facts: DataFacts) -> list[str]:
    """Put the run back to a checkpoint and return what the user should know about it.

    Raises:
        CheckpointError: the checkpoint belongs to another model, data, seed or batch arithmetic.
    """
    state = saved.state
    now = trajectory(config, run.phases)
    check_not_ended(state["trajectory"], now, saved)
    # Before the trajectory: it names the classes or bins that make the data another.
    check_facts(state, saved, facts)
    check_trajectory(state["trajectory"], now, saved, config)
    tensors = open_tensors(saved, run.ranks.index if saved.world_size == run.ranks.count else None)
    check_fit(run.module.model, tensors.shapes(), str(saved.folder))
    names = run.strategy.group_names
    check_groups(state["group_names"], names, saved)
    if isinstance(run.module.loss, nn.Module):
        check_loss(run.module.loss, tensors.loss_shapes(), saved, config)
    progress = Progress.from_dict(state["progress"])
    has_steps_left = progress.phase_index < len(run.phases)
    changes = find_changes(run, saved, config) if has_steps_left else [{} for _ in names]
    run.strategy.load(tensors, state)
    notes = put_in_force(changes, run.strategy)
    if config.ema is None:
        drop_average(run.strategy.optimizer)
    if run.scheduler is not None and state["scheduler"] is not None:
        run.scheduler.load_state_dict(state["scheduler"])
    for field in dataclasses.fields(Progress):
        setattr(run.progress, field.name, getattr(progress, field.name))
    return [*notes, *_restore_rank(run, saved, config), *run.cells_seen.restore(saved)]


def _restore_rank(run: Run, saved: SavedCheckpoint, config: RunConfig) -> list[str]:
    ranks = run.ranks
    if saved.world_size != ranks.count:
        refuse_streams(run, saved)
        seed_dropout(config.seed, ranks.index, run.progress.global_step)
        every = [saved.rank("rank_state", rank).get("fp8", {}) for rank in range(saved.world_size)]
        return [
            *_restore_scales(run, merged_fp8_state(every)),
            f"saved by {saved.world_size} ranks, resumed on {ranks.count}: the same cells in the same order; dropout "
            "draws anew, so losses agree but are not equal bit for bit",
        ]
    own = saved.rank("rank_state", ranks.index)
    if run.progress.phase_index < len(run.phases):
        run.phases[run.progress.phase_index].loader.load_state(own["loader"])
    set_random_state(own["random"])
    return _restore_scales(run, own.get("fp8", {}))


def _restore_scales(run: Run, state: dict[str, Any]) -> list[str]:
    """Let FP8 layers go on from what their recipe remembered, and name what it remembers nothing of."""
    anew = load_fp8_state(run.module.model, state)
    return (
        [f"fp8.recipe: the checkpoint has no scales for {len(anew)} layers ({anew[0]} ...), which start at 1"]
        if anew
        else []
    )


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    """Load weights strictly, into a model whose parameters may be sharded."""
    check_fit(module, {name: tuple(tensor.shape) for name, tensor in weights.items()}, where)
    for name, tensor in module.state_dict(keep_vars=True).items():
        with gathered_where_divided([tensor]), torch.no_grad():
            tensor.copy_(weights[name])
