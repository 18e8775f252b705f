"""Whether a run may go on from a checkpoint: the same cells, meanings, names and shapes, or what is to be done."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from data.genes import GeneSpace
from data.tokenizer_options import FITTED_OPTIONS
from trainer.agreement import flatten
from trainer.checkpoint_folder import SavedCheckpoint
from trainer.circuit_facts import check_same_circuits, saved_circuits
from trainer.config.load import load_saved_config
from trainer.config.schema import LossConfig, RunConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.losses import build_loss
from trainer.phases import DataFacts, Phase
from trainer.run import Run
from trainer.zero_building import whole_shape


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


def check_not_ended(then: dict[str, Any], now: dict[str, Any], saved: SavedCheckpoint) -> None:
    """Refuse further phases behind a run that has ended.

    Raises:
        CheckpointError: says how to train them.
    """
    names_then, names_now = _phase_names(then), _phase_names(now)
    if saved.state["progress"]["phase_index"] >= len(names_then) and names_then != names_now:
        raise CheckpointError(
            f"{saved.folder} is the end of its run, whose phases were {', '.join(names_then)} and now are "
            f"{', '.join(names_now)}; a run that has ended trains no further: start a new run from its weights, "
            f"with init_from: {saved.folder.parent} and the phases that are to follow"
        )


def _phase_names(run: dict[str, Any]) -> list[str]:
    return [phase["name"] for phase in run["phases"]]


def check_trajectory(
    then: dict[str, Any], now: dict[str, Any], saved: SavedCheckpoint, config: RunConfig
) -> None:
    """Compare what decides which cells follow: a phase under way keeps its data, others may have changed.

    Raises:
        CheckpointError: names what differs.
    """
    problems = [] if then["seed"] == now["seed"] else [f"seed was {then['seed']} and is {now['seed']}"]
    progress = saved.state["progress"]
    current = progress["phase_index"]
    names_then, names_now = _phase_names(then), _phase_names(now)
    if names_then[: current + 1] != names_now[: current + 1]:
        problems.append(f"its phases were {', '.join(names_then)} and are {', '.join(names_now)}")
    elif current < len(now["phases"]) and progress["phase_step"] > 0:
        old, new = then["phases"][current], now["phases"][current]
        # An epoch that has not begun may have other steps, but no cells that its phase has held out so far.
        kept = old if progress["epoch_step"] > 0 else ("data",)
        for key in (key for key in kept if old[key] != new.get(key)):
            same = f"datasets.{current}: {key} was {old[key]} and is {new.get(key)}"
            problems += (_changed_data(saved, config, current) if key == "data" else []) or [same]
    if problems:
        raise CheckpointError(
            f"{saved.folder} cannot be resumed with this configuration, because other cells would follow: "
            + "; ".join(problems)
            + ". Set them back (on another number of ranks, give global_batch_size instead of "
            "gradient_accumulation_steps), leave other data to a phase that has not begun, or start a new run from the "
            "weights with init_from"
        )


def _changed_data(saved: SavedCheckpoint, config: RunConfig, index: int) -> list[str]:
    """Name the settings of a phase's loader that have changed; none: its files have."""
    then = load_saved_config(saved.folder / "config.yaml")
    old, new = (each.model_dump(mode="json")["datasets"][index] for each in (then, config))
    kept = ("dataloader_factory", "dataloader_args")
    old, new = (flatten({key: each[key] for key in kept}, f"datasets.{index}") for each in (old, new))
    return [
        f"{key} was {_short(old.get(key))} and is {_short(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def refuse_streams(run: Run, saved: SavedCheckpoint) -> None:
    """Refuse to go on in the middle of a stream on another number of ranks: each rank reads one of its own.

    Raises:
        CheckpointError: says on how many it goes on.
    """
    progress = run.progress
    if progress.phase_index < len(run.phases) and progress.epoch_step > 0:
        phase = run.phases[progress.phase_index]
        if phase.loader.may_run_dry:
            raise CheckpointError(
                f"{saved.folder} was saved by {saved.world_size} ranks in the middle of an epoch of phase "
                f"'{phase.name}', whose loader divides the cells itself: {run.ranks.count} ranks would see other "
                f"cells; resume on {saved.world_size}, or from a checkpoint at the end of an epoch"
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
    names = tuple(state.get("label_names", facts.label_names))
    if names != facts.label_names:
        different = sorted(set(names) ^ set(facts.label_names))
        raise CheckpointError(
            f"{saved.folder}: its labels have {len(names)} classes, the data's {len(facts.label_names)}, not in both: "
            f"{', '.join(different[:6]) or 'none, but in another order'}; an index would mean another class"
        )
    theirs = saved_circuits(state.get("tokenizer_options", {}))
    check_same_circuits(theirs, facts.circuits, str(saved.folder))
    check_fitted(state, facts, str(saved.folder))


def check_fitted(state: dict[str, Any], facts: DataFacts, where: str) -> None:
    """Compare what the current phase's tokenizer was fitted to with what its data gives: a bin is to mean the same."""
    index, names = state["progress"]["phase_index"], [each["name"] for each in state["trajectory"]["phases"]]
    phase = names[index] if index < len(names) else ""
    then, now = state.get("tokenizer_options", {}).get(phase), facts.tokenizer_options.get(phase)
    if then is None or now is None:
        return
    for key in FITTED_OPTIONS:
        if then.get(key) != now.get(key):
            raise CheckpointError(
                f"{where}: tokenizer.{key} of phase '{phase}' was {_short(then.get(key))} and is "
                f"{_short(now.get(key))}; set the data and the tokenizer back (it is fitted to the training cells), or "
                "start a new run from the weights with init_from"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_gene_space(text: str, facts: DataFacts, where: str) -> None:
    """Refuse weights whose token ids mean other genes than the data's."""
    theirs = GeneSpace.from_json(text)
    if facts.gene_space is None or theirs.sha256 == facts.gene_space.sha256:
        return
    ours = facts.gene_space
    shared = len(set(theirs.ids) & set(ours.ids))
    raise CheckpointError(
        f"{where}: its gene space has {len(theirs)} genes, the data's has {len(ours)}, {shared} of them by the same "
        "name, so token ids would mean other genes; convert the data with --genes and the checkpoint's genes.json"
    )


def check_groups(then: list[list[str]], now: list[list[str]], saved: SavedCheckpoint) -> None:
    """Compare the names of the parameters in the groups of the optimizer.

    Raises:
        CheckpointError: they are other ones.
    """
    if then != now:
        raise CheckpointError(
            f"{saved.folder}: its optimizer holds {_groups(then)}, this run's {_groups(now)}; "
            "resume with the optimizer, freezing and reinitialising that it was saved with, or start from its weights "
            "with init_from"
        )


def _groups(names: list[list[str]]) -> str:
    return " + ".join(str(len(group)) for group in names) + " parameters in its groups"


def check_loss(
    loss: nn.Module, shapes: Mapping[str, tuple[int, ...]], saved: SavedCheckpoint, config: RunConfig
) -> None:
    """Compare the names and shapes of a loss's saved tensors with its own, and what its arguments make of it.

    Raises:
        CheckpointError: they do not fit, or changed arguments would not act.
    """
    message = f"{saved.folder}: its loss does not fit that of the configuration (loss.loss_class)"
    check_names_and_shapes(_whole_shapes(loss), shapes, "loss", message)
    _check_loss_arguments(saved, config)


def _check_loss_arguments(saved: SavedCheckpoint, config: RunConfig) -> None:
    """Refuse changed arguments of a loss that have made other buffers, over which the checkpoint's are loaded."""
    then = load_saved_config(saved.folder / "config.yaml").loss
    if then is None or config.loss is None or then == config.loss:
        return
    now = _buffers_of_loss(config.loss)
    try:
        former = _buffers_of_loss(then)
    except (ConfigError, TypeError, ValueError):  # its class has moved, or takes other arguments now
        former = now if then.loss_args == config.loss.loss_args else {}
    hidden = [name for name in now if name not in former or not torch.equal(former[name], now[name])]
    if hidden:
        raise CheckpointError(
            f"{saved.folder}: loss.loss_class or loss.loss_args have changed, and with them the loss's buffers "
            f"{', '.join(hidden[:6])}; a resumed run goes on with those of its checkpoint, so they would not act: set "
            "them back, or start a new run from the weights with init_from"
        )


def _buffers_of_loss(settings: LossConfig | None) -> dict[str, torch.Tensor]:
    """Return the saved buffers of a loss as it is built, the same whenever its settings are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loss = build_loss(settings)
    entries = loss.state_dict(keep_vars=True) if isinstance(loss, nn.Module) else {}
    return {
        name: entry
        for name, entry in entries.items()
        if isinstance(entry, torch.Tensor) and not isinstance(entry, nn.Parameter)
    }


def check_fit(module: nn.Module, shapes: dict[str, tuple[int, ...]], where: str) -> None:
    """Compare the names and shapes of saved weights with the model's; all must be there and none else."""
    check_names_and_shapes(_whole_shapes(module), shapes, "model", f"{where} does not fit the model")


def check_names_and_shapes(
    own: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]], what: str, message: str
) -> None:
    """Compare the shapes of saved weights with those that are wanted, by the same names; `what` is to hold them.

    Raises:
        CheckpointError: a weight is missing, unknown or of another shape.
    """
    missing, unexpected = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    other = [
        f"{name} is {list(shapes[name])} there and {list(own[name])} here"
        for name in sorted(own.keys() & shapes.keys())
        if own[name] != tuple(shapes[name])
    ]
    problems = [f"it lacks {', '.join(missing[:6])}"] if missing else []
    problems += [f"it has {', '.join(unexpected[:6])}, which the {what} has not"] if unexpected else []
    problems += other[:6]
    if problems:
        raise CheckpointError(
            f"{message} ({len(missing)} names missing, {len(unexpected)} unknown, {len(other)} "
            f"of another shape): {'; '.join(problems)}"
        )


def _whole_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: whole_shape(entry)
        for name, entry in module.state_dict(keep_vars=True).items()
        if isinstance(entry, torch.Tensor)
    }
