"""Where a fresh run's weights come from: the data's priors, other weights (`init_from`), or an older trainer's file."""

import dataclasses
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data.labels import read_labels
from data.loader import DrawKey
from models.circuit_diffusion import CircuitDiffusion
from models.errors import ModelError
from models.fine_tuned import BACKBONES
from models.lora import plain_name
from models.pretrained import CONFIG_FILE as EXPORTED_CONFIG
from models.pretrained import read_folder
from trainer.checkpoint_folder import MANIFEST, find_newest, open_checkpoint
from trainer.circuit_facts import saved_circuits
from trainer.circuit_weights import is_genqc_pipeline, load_circuit_weights, read_genqc_pipeline
from trainer.config.load import load_saved_config
from trainer.config.schema import RunConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.phases import DataFacts, Phase
from trainer.reference_checkpoint import load_reference_checkpoint
from trainer.resume_checks import check_gene_space, check_names_and_shapes
from trainer.run import Run
from trainer.run_state import load_weights
from trainer.shards import has_averages, open_tensors, whole_weights
from trainer.zero_building import gathered_where_divided, whole_shape

PRIOR_CELLS = 4096
"""Training cells of each phase that a model may take its priors from."""

_SHAPELESS = ("num_heads", "activation")
"""Fields of a model's configuration that decide what its weights compute and that no weight's shape tells."""


def initialise_weights(
    config: RunConfig, model: nn.Module, phases: list[Phase], facts: DataFacts
) -> list[str]:
    """Give a fresh model its starting weights, the same on every rank, and return what was done.

    `init_from` replaces all weights, or those of the backbone of a model that has one. Otherwise a model with
    `initialise_from_data(batches)` sees up to `PRIOR_CELLS` training cells of each phase, without masking, once. A
    model that weighs classes is told how many training cells each one has.
    """
    counted = tell_class_counts(model, phases)
    if config.init_from is not None:
        return [*load_initial_weights(Path(config.init_from), model, facts), *counted]
    hook = getattr(model, "initialise_from_data", None)
    if not callable(hook):
        return counted
    space = facts.gene_space
    offered = {"gene_ids": None, "gene_symbols": None}
    if space is not None:
        offered = {"gene_ids": space.ids, "gene_symbols": space.symbols}
    named = inspect.signature(hook).parameters
    arguments: dict[str, Any] = {name: value for name, value in offered.items() if name in named}
    # Under ZeRO-3 the hook must find what it writes whole: what the model says, or else everything.
    written = getattr(model, "data_initialised_parameters", model.parameters)
    with gathered_where_divided(list(written())):
        account: Any = hook(unmasked_batches(config, phases), **arguments) or {}
    done = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in account.items())
    return [*([f"weights started from the data: {done}"] if done else []), *counted]


def unmasked_batches(config: RunConfig, phases: list[Phase]) -> Iterator[dict[str, Any]]:
    """Yield training cells without masking, from the start of every phase that can give them."""
    for phase in phases:
        unmasked = getattr(phase.loader, "unmasked", None)
        if unmasked is None:
            continue
        yield from unmasked(PRIOR_CELLS, DrawKey(config.seed, phase.index, 0))


def tell_class_counts(model: Any, phases: list[Phase]) -> list[str]:
    """Count the training cells of each class for a model that asks for it, and return what is to be said.

    Raises:
        ConfigError: no phase reads labels of classes with our loader.
    """
    if not getattr(model, "wants_class_counts", False):
        return []
    counts: np.ndarray | None = None
    for phase in phases:
        source = getattr(phase.loader, "source", None)
        labels = getattr(source, "labels", None)
        if source is None or labels is None or labels.task != "classification":
            continue
        codes = read_labels(source.reader.info, labels)
        codes = codes if source.row_mask is None else codes[source.row_mask]
        found = np.bincount(codes[codes >= 0], minlength=len(labels.names))
        counts = found if counts is None else counts + found
    if counts is None:
        raise ConfigError(
            "class_weights: balanced needs the classes of the training cells, and no phase reads them: set `label` of "
            "data.loader.cell_loader, or give the weights as a list"
        )
    model.set_class_counts(counts.tolist())
    return [
        f"classes weighted in inverse proportion to their training cells: {counts.min()} to {counts.max()}"
    ]


class Source(NamedTuple):
    """Weights to start from, and what they say of themselves."""

    weights: dict[str, Tensor]
    genes: str | None = None
    """The `genes.json` that their token ids stand for; None: they do not tell."""
    model_class: str = ""
    """Dotted path of the model's class; empty: they do not tell."""
    config_args: Mapping[str, Any] = {}
    is_averaged: bool = False
    """Whether they are moving averages of the weights that were trained."""


def load_initial_weights(path: Path, model: nn.Module, facts: DataFacts) -> list[str]:
    """Load weights alone: of a checkpoint folder, a run folder, an exported folder, a `.safetensors` or a `.pt` file.

    A model with `pretrained_names()` takes those that it names, and everything else of it starts fresh.

    Raises:
        CheckpointError: there is no such file, it does not fit the model, or its genes are not the data's.
    """
    source = read_source(path)
    if source.genes is not None:
        check_gene_space(source.genes, facts, f"init_from: {path}")
    if callable(getattr(model, "pretrained_names", None)):
        said = load_backbone(source, model, facts, f"init_from: {path}")
    elif isinstance(model, CircuitDiffusion):
        said = load_circuit_weights(source.weights, source.config_args, model, f"init_from: {path}")
        said = [f"{'averages of the ' if source.is_averaged else ''}weights taken from {path}", *said]
    else:
        load_weights(model, source.weights, f"init_from: {path}")
        said = [f"{'averages of the ' if source.is_averaged else ''}weights taken from {path}"]
    if source.genes is None and facts.gene_space is not None:
        said.append(
            f"{path} does not name its genes: that its token ids mean the data's could not be checked"
        )
    return said


def read_source(path: Path) -> Source:
    """Read the weights that a path stands for.

    Raises:
        CheckpointError: there is no such file, or it holds no weights.
    """
    if path.is_dir() and (path / EXPORTED_CONFIG).is_file():
        try:
            description, weights = read_folder(path)
        except ModelError as error:
            raise CheckpointError(f"init_from: {error}") from error
        genes = path / "genes.json"
        text = genes.read_text(encoding="utf-8") if genes.is_file() else None
        return Source(weights, text, description.model_class, description.config_args)
    if path.is_dir() and is_genqc_pipeline(path):
        weights, args = read_genqc_pipeline(path)
        return Source(weights, config_args=args)
    if path.is_dir():
        is_run = not (path / MANIFEST).is_file()
        folder = find_newest(path, fall_back=False).checkpoint if is_run else path
        if folder is None:
            raise CheckpointError(
                f"init_from: {path} is neither a checkpoint, nor a run folder with a complete one, nor an exported "
                "model"
            )
        saved = open_checkpoint(folder, verify=not is_run)
        genes = saved.text("genes.json") if saved.has("genes.json") else None
        settings = load_saved_config(saved.folder / "config.yaml").model
        circuits = saved_circuits(saved.state.get("tokenizer_options", {}))
        args = settings.config_args | (circuits.arguments() if circuits else {})
        tensors = open_tensors(saved)
        weights, is_averaged = whole_weights(tensors), has_averages(tensors)
        return Source(weights, genes, settings.model_class, args, is_averaged=is_averaged)
    if not path.is_file():
        raise CheckpointError(f"init_from: {path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return Source(load_file(path))
        except SafetensorError as error:
            raise CheckpointError(f"init_from: {path} is not a readable safetensors file ({error})") from None
    return Source(load_reference_checkpoint(path).model_state_dict)


def load_backbone(source: Source, model: Any, facts: DataFacts, where: str) -> list[str]:
    """Load the weights of a pretrained model into the backbone of another, strictly; return what is to be said.

    Raises:
        CheckpointError: a weight is missing, unknown or of another shape, or the pretrained model is another one.
    """
    prefix: str = model.pretrained_prefix
    weights, args = source.weights, source.config_args
    model_class = source.model_class
    left_out: Counter[str] = Counter()
    if any(name.startswith(prefix) for name in weights):  # fine-tuned before: its backbone goes on
        model_class, args = args.get("backbone_class", ""), args.get("backbone_config", {})
        if any(plain_name(name) is None for name in weights):
            raise CheckpointError(
                f"{where}: it holds LoRA corrections apart from the weights that they correct; export it, which merges "
                "them, and start from the exported folder"
            )
        left_out.update(name.partition(".")[0] for name in weights if not name.startswith(prefix))
        weights = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    check_same_model(model, model_class, args, facts, where)
    heads = set(model.backbone.head_names)
    left_out.update(name.partition(".")[0] for name in weights if name.partition(".")[0] in heads)
    weights = {name: weight for name, weight in weights.items() if name.partition(".")[0] not in heads}
    wanted: dict[str, str] = model.pretrained_names()
    state = model.state_dict(keep_vars=True)
    shapes = {theirs: whole_shape(state[own]) for own, theirs in wanted.items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    check_names_and_shapes(shapes, found, "backbone", f"{where} does not fit the backbone")
    for own, theirs in wanted.items():
        with gathered_where_divided([state[own]]), torch.no_grad():
            state[own].copy_(weights[theirs])
    named = ", ".join(f"{name} ({number})" for name, number in sorted(left_out.items()))
    said = [f"{len(wanted)} tensors of the backbone taken from {where.removeprefix('init_from: ')}"]
    if named:
        said.append(f"left out, because this model has no use for them: {named}")
    return [*said, "the head starts fresh"]


def check_same_model(
    model: Any, model_class: str, args: Mapping[str, Any], facts: DataFacts, where: str
) -> None:
    """Refuse a pretrained model whose weights would fit and compute something else."""
    config = model.config
    ours = config.backbone_class.replace(":", ".")
    theirs = model_class.replace(":", ".")
    if theirs in BACKBONES and theirs != ours:
        raise CheckpointError(f"{where} is of {theirs}, but backbone_class is {ours}")
    for name in _SHAPELESS:
        mine = getattr(config.backbone, name)
        known = {field.name: field.default for field in dataclasses.fields(config.backbone)}
        given = args.get(name, known[name] if theirs in BACKBONES else mine)
        if given != mine:
            raise CheckpointError(
                f"{where} was trained with {name} {given}, but backbone_config says {mine}, which computes something "
                "else with the same weights; take over the configuration of the pretrained model"
            )
    n_bins, data_bins = config.backbone.n_bins, facts.sizes.get("n_bins")
    if n_bins is not None and config.backbone.use_expression_values and (data_bins or 0) > n_bins:
        raise CheckpointError(
            f"{where} reads {n_bins} expression bins, but the data has {data_bins}; tokenize the data as that of the "
            "pretrained model was"
        )


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
