"""What a checkpoint holds, and how a run is put back to it: everything that the next step depends on."""

import dataclasses
import random
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.checkpoint import CheckpointWriter, SavedCheckpoint
from trainer.config.load import dump_yaml
from trainer.config.schema import RunConfig
from trainer.errors import CheckpointError
from trainer.loop import Run
from trainer.optim import parameter_names
from trainer.phases import DataFacts, Phase
from trainer.progress import Progress


class Saver:
    """Write the run's checkpoints."""

    def __init__(
        self, writer: CheckpointWriter, config: RunConfig, facts: DataFacts, last_step: int | None
    ) -> None:
        """Take the writer and what does not change; `last_step` is the step that the run was resumed from."""
        self._writer = writer
        self._config = config
        self._facts = facts
        self._last_step = last_step
        self._metric: float | None = None
        self._metric_phase = ""

    def note_metric(self, phase: str, validation_loss: float | None) -> None:
        """Remember the validation loss that the next checkpoint is ranked by, among those of the same phase."""
        self._metric, self._metric_phase = validation_loss, phase

    def save(self, run: Run) -> None:
        """Copy the run's state and let the writer write it; one checkpoint for a step at the most."""
        step = run.progress.global_step
        if step == self._last_step:
            return
        self._last_step = step
        run.recorder.sync()
        shared = collect_shared(run, self._config, self._facts) if run.ranks.is_main else {}
        phase = run.phases[min(run.progress.phase_index, len(run.phases) - 1)]
        summary = {
            "phase": phase.name,
            "metric_phase": self._metric_phase,
            "progress": run.progress.to_dict(),
        }
        rank_files = {"rank_state": collect_rank(run)}
        self._writer.save(step, rank_files, shared, metric=self._metric, summary=summary)
        self._metric = None
        run.recorder.saved(step, f"checkpoint_{step}", self._writer.stall_seconds)


def collect_shared(run: Run, config: RunConfig, facts: DataFacts) -> dict[str, Any]:
    """Return the files that are the same for all ranks, by name."""
    module, strategy = run.module, run.strategy
    state: dict[str, Any] = {
        "progress": run.progress.to_dict(),
        "optimizer": strategy.optimizer.state_dict(),
        "parameter_names": parameter_names(strategy.optimizer, module),
        "scheduler": None if run.scheduler is None else run.scheduler.state_dict(),
        "gradient_scaler": None
        if strategy.gradient_scaler is None
        else strategy.gradient_scaler.state_dict(),
        "technical_batches": facts.technical_batches,
        "n_technical_batches": facts.n_technical_batches,
        "trackers": run.recorder.tracker_state(),
        "trajectory": trajectory(config, run.phases),
    }
    if isinstance(module.loss, nn.Module):
        state["loss"] = dict(module.loss.state_dict())
    files: dict[str, Any] = {
        "model.safetensors": dict(module.model.state_dict()),
        "run_state.safetensors": state,
        "config.yaml": dump_yaml(config),
    }
    if facts.gene_space is not None:
        files["genes.json"] = facts.gene_space.to_json()
    return files


def collect_rank(run: Run) -> dict[str, Any]:
    """Return what only this rank knows: its random state, and its position in a stream that tells it."""
    loader = None
    if run.progress.phase_index < len(run.phases) and run.progress.epoch_step > 0:
        loader = run.phases[run.progress.phase_index].loader.state()
    return {"random": random_state(), "loader": loader}


def restore(run: Run, saved: SavedCheckpoint, config: RunConfig, facts: DataFacts) -> list[str]:
    """Put the run back to a checkpoint and return what the user should know about it.

    Raises:
        CheckpointError: the checkpoint belongs to another model, data, seed or batch arithmetic.
    """
    state = saved.shared("run_state.safetensors")
    check_trajectory(state["trajectory"], trajectory(config, run.phases), saved)
    check_facts(state, saved, facts)
    load_weights(run.module.model, saved.shared("model.safetensors"), str(saved.folder))
    if isinstance(run.module.loss, nn.Module):
        run.module.loss.load_state_dict(state["loss"])
    names = parameter_names(run.strategy.optimizer, run.module)
    if state["parameter_names"] != names:
        raise CheckpointError(
            f"{saved.folder}: its optimizer holds {_groups(state['parameter_names'])}, this run's {_groups(names)}; "
            "resume with the optimizer and freezing that it was saved with, or start from its weights with init_from"
        )
    run.strategy.optimizer.load_state_dict(state["optimizer"])
    if run.scheduler is not None and state["scheduler"] is not None:
        run.scheduler.load_state_dict(state["scheduler"])
    if run.strategy.gradient_scaler is not None and state["gradient_scaler"] is not None:
        run.strategy.gradient_scaler.load_state_dict(state["gradient_scaler"])
    for field in dataclasses.fields(Progress):
        setattr(run.progress, field.name, getattr(Progress.from_dict(state["progress"]), field.name))
    return _restore_rank(run, saved, config)


def _restore_rank(run: Run, saved: SavedCheckpoint, config: RunConfig) -> list[str]:
    ranks = run.ranks
    if saved.world_size != ranks.count:
        _refuse_streams(run, saved)
        seed_dropout(config.seed, ranks.index, run.progress.global_step)
        return [
            f"saved by {saved.world_size} ranks, resumed on {ranks.count}: the same cells in the same order; dropout "
            "draws anew, so losses agree but are not equal bit for bit"
        ]
    own = saved.rank("rank_state", ranks.index)
    if run.progress.phase_index < len(run.phases):
        run.phases[run.progress.phase_index].loader.load_state(own["loader"])
    set_random_state(own["random"])
    return []


def _refuse_streams(run: Run, saved: SavedCheckpoint) -> None:
    """Refuse to go on in the middle of a stream on another number of ranks: each rank reads one of its own."""
    progress = run.progress
    if progress.phase_index < len(run.phases) and progress.epoch_step > 0:
        phase = run.phases[progress.phase_index]
        if phase.loader.may_run_dry:
            raise CheckpointError(
                f"{saved.folder} was saved by {saved.world_size} ranks in the middle of an epoch of phase "
                f"'{phase.name}', whose loader divides the cells itself: {run.ranks.count} ranks would see other "
                f"cells; resume on {saved.world_size}, or from a checkpoint at the end of an epoch"
            )


def trajectory(config: RunConfig, phases: list[Phase]) -> dict[str, Any]:
    """Return what decides which cells a step sees; a resumed run must agree with it."""
    return {
        "seed": config.seed,
        "phases": [
            {
                "name": phase.name,
                "global_batch_size": phase.plan.global_batch_size,
                "max_steps_per_epoch": phase.config.max_steps_per_epoch,
                "data": phase.loader.fingerprint(),
            }
            for phase in phases
        ],
    }


def check_trajectory(then: dict[str, Any], now: dict[str, Any], saved: SavedCheckpoint) -> None:
    """Compare what decides the order of cells; finished phases may have changed, the current one may not."""
    problems = [] if then["seed"] == now["seed"] else [f"seed was {then['seed']} and is {now['seed']}"]
    progress = saved.shared("run_state.safetensors")["progress"]
    current = progress["phase_index"]
    names_then, names_now = [[phase["name"] for phase in run["phases"]] for run in (then, now)]
    if names_then[: current + 1] != names_now[: current + 1]:
        problems.append(f"its phases were {', '.join(names_then)} and are {', '.join(names_now)}")
    elif current < len(now["phases"]) and progress["epoch_step"] > 0:
        old, new = then["phases"][current], now["phases"][current]
        problems += [
            f"datasets.{current}: {key} was {old[key]} and is {new[key]}"
            for key in old
            if old[key] != new[key]
        ]
    if problems:
        raise CheckpointError(
            f"{saved.folder} cannot be resumed with this configuration, because other cells would follow: "
            + "; ".join(problems)
            + ". Set them back (on another number of ranks, give global_batch_size instead of "
            "gradient_accumulation_steps), or start a new run from the weights with init_from"
        )


def check_facts(state: dict[str, Any], saved: SavedCheckpoint, facts: DataFacts) -> None:
    """Compare the technical batch map and the gene space of a checkpoint with those of the data."""
    if state["technical_batches"] != facts.technical_batches:
        raise CheckpointError(
            f"{saved.folder}: its technical batches are {sorted(state['technical_batches'])}, the data's are "
            f"{sorted(facts.technical_batches)}; an index would mean another batch"
        )
    if saved.has("genes.json"):
        check_gene_space(saved.text("genes.json"), facts, str(saved.folder))


def check_gene_space(text: str, facts: DataFacts, where: str) -> None:
    """Refuse weights whose token ids mean other genes than the data's."""
    from data.genes import GeneSpace

    theirs = GeneSpace.from_json(text)
    if facts.gene_space is None or theirs.sha256 == facts.gene_space.sha256:
        return
    ours = facts.gene_space
    shared = len(set(theirs.ids) & set(ours.ids))
    raise CheckpointError(
        f"{where}: its gene space has {len(theirs)} genes, the data's has {len(ours)}, {shared} of them by the same "
        "name, so token ids would mean other genes; convert the data with --genes and the checkpoint's genes.json"
    )


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], where: str) -> None:
    """Load weights strictly: every name and every shape must be the model's."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} is {list(weights[name].shape)} there and {list(own[name].shape)} here"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    problems = [f"it lacks {', '.join(missing[:6])}"] if missing else []
    problems += [f"it has {', '.join(unexpected[:6])}, which the model has not"] if unexpected else []
    problems += shapes[:6]
    if problems:
        raise CheckpointError(
            f"{where} does not fit the model ({len(missing)} names missing, {len(unexpected)} unknown, {len(shapes)} "
            f"of another shape): {'; '.join(problems)}"
        )
    module.load_state_dict(weights)


def random_state() -> dict[str, Any]:
    """Return the state of every random number generator of this process."""
    numpy_state: Any = np.random.get_state()
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [numpy_state[0], np.asarray(numpy_state[1]), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def seed_dropout(seed: int, rank: int, global_step: int) -> None:
    """Seed every generator for this rank: ranks hold the same weights but must not share dropout masks."""
    from data.hashing import stateless_hash

    key = int(stateless_hash(seed, global_step, index=np.array([rank]))[0])
    random.seed(key)
    np.random.seed(key % 2**32)
    torch.manual_seed(key % 2**63)


def _groups(names: list[list[str]]) -> str:
    return " + ".join(str(len(group)) for group in names) + " parameters in its groups"
