"""Where a fresh run's weights come from: the data's priors, other weights (`init_from`), or an older trainer's file."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data.loader import DrawKey
from trainer.checkpoint import list_checkpoints, open_checkpoint
from trainer.config.schema import RunConfig
from trainer.errors import CheckpointError
from trainer.phases import DataFacts, Phase
from trainer.reference_checkpoint import load_reference_checkpoint
from trainer.run import Run
from trainer.run_state import check_gene_space, load_weights
from trainer.shards import full_weights
from trainer.zero_building import gathered_where_divided

PRIOR_CELLS = 4096
"""Training cells of each phase that a model may take its priors from."""


def initialise_weights(
    config: RunConfig, model: nn.Module, phases: list[Phase], facts: DataFacts
) -> list[str]:
    """Give a fresh model its starting weights, the same on every rank, and return what was done.

    `init_from` replaces all weights. Otherwise a model with `initialise_from_data(batches)` sees up to
    `PRIOR_CELLS` training cells of each phase, without masking, once.
    """
    if config.init_from is not None:
        return [load_initial_weights(Path(config.init_from), model, facts)]
    hook = getattr(model, "initialise_from_data", None)
    if not callable(hook):
        return []
    arguments: dict[str, Any] = {}
    if "gene_ids" in inspect.signature(hook).parameters:
        arguments["gene_ids"] = None if facts.gene_space is None else facts.gene_space.ids
    # Under ZeRO-3 the hook must find what it writes whole: what the model says, or else everything.
    written = getattr(model, "data_initialised_parameters", model.parameters)
    with gathered_where_divided(list(written())):
        account: Any = hook(unmasked_batches(config, phases), **arguments) or {}
    done = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in account.items())
    return [f"weights started from the data: {done}"] if done else []


def unmasked_batches(config: RunConfig, phases: list[Phase]) -> Iterator[dict[str, Any]]:
    """Yield training cells without masking, from the start of every phase that can give them."""
    for phase in phases:
        unmasked = getattr(phase.loader, "unmasked", None)
        if unmasked is None:
            continue
        yield from unmasked(PRIOR_CELLS, DrawKey(config.seed, phase.index, 0))


def load_initial_weights(path: Path, model: nn.Module, facts: DataFacts) -> str:
    """Load weights alone from a checkpoint folder, a run folder, a `.safetensors` file or a `.pt` file.

    Raises:
        CheckpointError: there is no such file, it does not fit the model, or its genes are not the data's.
    """
    genes: str | None = None
    if path.is_dir():
        folder = path if (path / "manifest.json").is_file() else None
        complete = list_checkpoints(path) if folder is None else []
        if folder is None and not complete:
            raise CheckpointError(
                f"init_from: {path} is neither a checkpoint nor a run folder with a complete one"
            )
        saved = open_checkpoint(folder if folder is not None else complete[-1])
        weights: dict[str, Tensor] = full_weights(saved)
        genes = saved.text("genes.json") if saved.has("genes.json") else None
    elif not path.is_file():
        raise CheckpointError(f"init_from: {path} does not exist")
    elif path.suffix == ".safetensors":
        try:
            weights = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"init_from: {path} is not a readable safetensors file ({error})") from None
    else:
        weights = load_reference_checkpoint(path).model_state_dict
    if genes is not None:
        check_gene_space(genes, facts, str(path))
    load_weights(model, weights, f"init_from: {path}")
    return f"weights taken from {path}"


def restore_reference_checkpoint(path: Path, run: Run) -> list[str]:
    """Put a run to a `.pt` checkpoint of the original phases trainer, strictly, and say what the file lacks.

    Weights, optimizer and scheduler must fit; the phases start from their beginning, because such a file does not
    know its position in them.
    """
    saved = load_reference_checkpoint(path)
    load_weights(run.module.model, saved.model_state_dict, str(path))
    if run.strategy.is_sharded:
        raise CheckpointError(
            f"{path} holds a whole optimizer state, which ZeRO cannot take; resume it once without DeepSpeed and go on "
            "from the checkpoint of that, or take its weights alone with init_from"
        )
    if saved.optimizer_state_dict is not None:
        theirs = [len(group["params"]) for group in saved.optimizer_state_dict["param_groups"]]
        ours = [len(group["params"]) for group in run.strategy.optimizer.param_groups]
        if theirs != ours:
            raise CheckpointError(
                f"{path}: its optimizer has groups of {theirs} parameters, this run's of {ours}; configure the "
                "optimizer that it was saved with, or take its weights alone with init_from"
            )
        run.strategy.optimizer.load_state_dict(saved.optimizer_state_dict)
    if saved.scheduler_state_dict is not None:
        if run.scheduler is None:
            raise CheckpointError(
                f"{path} holds a scheduler's state, but optimizer.scheduler_class is not set; set it, or take the "
                "weights alone with init_from"
            )
        run.scheduler.load_state_dict(saved.scheduler_state_dict)
    run.progress.global_step = saved.global_step or 0
    lacks = "; ".join(saved.account) or "nothing"
    return [f"{path} (step {run.progress.global_step}) lacks: {lacks}; the phases start from their beginning"]
