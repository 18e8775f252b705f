"""Rules between the fields of a circuit configuration, and the keys of other programs' files that mean nothing here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from trainer.config.messages import Problem
from trainer.config.yaml_text import describe

if TYPE_CHECKING:
    from trainer.config.circuits import CircuitsConfig

_Rule = tuple[str, Callable[[Any], bool], str]


def _always(value: Any) -> bool:
    return True


FOREIGN_KEYS: tuple[_Rule, ...] = (
    *(
        (f"training.{key}", _always, f"belongs under general; write general.{key}")
        for key in ("output_path", "model_name", "experiment_name")
    ),
    (
        "model.save_type",
        lambda value: value in ("pt", "pth", "bin"),
        "weights in torch's own format can run code where they are loaded, and are not written; set safetensors, or "
        "remove it",
    ),
    (
        "training.cached_text_enc",
        lambda value: value is False,
        "each prompt is encoded once in every run, and nothing of it is kept on disk; remove it",
    ),
    (
        "text_encoder.params.version",
        lambda value: value is not None,
        "names weights that would be downloaded; set version: null, and local_weights_path to the file of weights",
    ),
    (
        "text_encoder.params.freeze",
        lambda value: value is False,
        "a text encoder is not trained; remove it, or leave out text_encoder, for a table of prompts that is learned",
    ),
    (
        "text_encoder.params.cloob_weights_path",
        lambda value: value is not None,
        "weights of CLOOB are not read; set local_weights_path to weights of CLIP, or leave out text_encoder",
    ),
    (
        "text_encoder.params.njobs",
        _always,
        "the few distinct prompts of a data set are encoded by one process; remove it",
    ),
    (
        "training.wandb.run_name",
        _always,
        "a run has one name everywhere, which is general.experiment_name; remove it",
    ),
    (
        "text_encoder.params.enable_cache_token_limit",
        lambda value: value is True,
        "prompts are padded to max_length; remove it, and set max_length lower where prompts are short",
    ),
    ("training.wandb.dir", _always, "its files go into the run folder; remove it, or set training.ckpt_path"),
    ("scheduler.params.device", _always, "general.device decides; remove it"),
    (
        "embedder",
        _always,
        "the table that tokens are diffused in follows from model.params.clr_dim and training.seed; remove it",
    ),
    (
        "dataset",
        _always,
        "what a set of circuits holds is said by its own config.yaml; remove it, and set general.dataset to its folder",
    ),
)
"""Keys that files of genQC's users have: path, whether the value is refused, and what to do."""

_ACCEPTED_EMPTY = ("text_encoder.params.cloob_weights_path", "text_encoder.params.enable_cache_token_limit")


def without_foreign_keys(raw: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return the values without the keys of other programs, and what is to be said of those that cannot be ignored."""
    raw, problems = copy.deepcopy(raw), []
    for path, is_refused, advice in FOREIGN_KEYS:
        *parents, last = path.split(".")
        node: Any = raw
        for part in parents:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            continue
        if is_refused(node[last]):
            problems.append(Problem(path, f"{describe(node.pop(last))}: {advice}"))
        elif path in _ACCEPTED_EMPTY:
            del node[last]
    return raw, problems


def cross_field_problems(config: CircuitsConfig) -> list[Problem]:
    """Return every contradiction between fields of a configuration whose single fields are valid."""
    return [
        *_places(config),
        *_model(config),
        *_text_encoder(config),
        *_schedule(config),
        *_batches(config),
        *_stages(config),
    ]


def _places(config: CircuitsConfig) -> Iterator[Problem]:
    general = config.general
    names_all = bool(config.stages) and all(stage.dataset is not None for stage in config.stages)
    if general.dataset is None and not names_all:
        yield Problem(
            "general.dataset",
            "is required: the folder of a saved set of circuits (config.yaml and dataset/), or a folder of such ones",
        )
    if general.output_path is None:
        yield Problem("general.output_path", "is required: the folder that the trained pipeline goes to")
    name = general.model_name
    if name is not None and (name in (".", "..", "runs") or "/" in name):
        yield Problem(
            "general.model_name",
            f"'{name}' cannot name a folder in output_path beside runs; use a name without '/'",
        )
    if general.init_from_pipeline_dir is not None and general.resume not in (None, "auto"):
        yield Problem(
            "general.init_from_pipeline_dir",
            f"contradicts resume: {general.resume}, which restores the weights too; remove one (with resume: auto it "
            "gives the weights of a fresh start)",
            ("general.resume",),
        )


def _model(config: CircuitsConfig) -> Iterator[Problem]:
    model = config.model
    params = model.params
    if model.type is not None and model.target is not None:
        yield Problem(
            "model.target",
            f"{model.target} and model.type: {model.type} each name a network; keep one",
            ("model.type",),
        )
    if params.unitary_encoder_config is not None and not uses_unitary(config):
        yield Problem(
            "model.params.unitary_encoder_config",
            "has no effect with a network that is not told unitaries; set type: QC_Compilation_UNet, or remove it",
            ("model.type", "model.target"),
        )
    yield from _unitary_encoder(config)
    if config.scheduler.type != "DDIMScheduler" and "eta" in config.scheduler.params.model_fields_set:
        yield Problem(
            "scheduler.params.eta",
            f"has no effect with type: {config.scheduler.type}; remove it, or set type: DDIMScheduler",
            ("scheduler.type",),
        )
    levels = {
        "model_features": params.model_features,
        "num_heads": params.num_heads,
        "num_res_blocks": params.num_res_blocks,
        "transformer_depths": params.transformer_depths,
    }
    for key, sizes in levels.items():
        if len(sizes) != len(params.model_features):
            yield Problem(
                f"model.params.{key}",
                f"{sizes} is for {len(sizes)} levels, and model_features {params.model_features} for "
                f"{len(params.model_features)}; give each level one entry",
                ("model.params.model_features",),
            )


def uses_unitary(config: CircuitsConfig) -> bool:
    """Tell whether the network is told the unitary."""
    named = config.model.target or config.model.type or ""
    return "Compilation" in named


def uses_genqc(config: CircuitsConfig) -> bool:
    """Tell whether the network is genQC's."""
    return (config.model.target or "").startswith("genQC.")


def _unitary_encoder(config: CircuitsConfig) -> Iterator[Problem]:
    """Refuse what only the other kind of network has."""
    model = config.model
    encoder, where = model.params.unitary_encoder_config, "model.params"
    if uses_genqc(config):
        for key in ("dropout", "activation_checkpointing"):
            if key in model.params.model_fields_set:
                yield Problem(
                    f"{where}.{key}", "is of our UNet, and target names genQC's; remove it", ("model.target",)
                )
    if encoder is None:
        return
    genqc, ours = ("model_features", "transformer_depths"), ("hidden_dim", "patch_size", "depth")
    for key in ours if uses_genqc(config) else genqc:
        if getattr(encoder, key) is not None:
            advice = (
                "is of our encoder; genQC's has model_features and transformer_depths"
                if uses_genqc(config)
                else "is of genQC's encoder; ours has hidden_dim, patch_size and depth (or set model.target: "
                "genQC.models.unet_qc.QC_Compilation_UNet in place of type)"
            )
            yield Problem(f"{where}.unitary_encoder_config.{key}", advice, ("model.target", "model.type"))
    width = encoder.cond_emb_size
    if width is not None and width != model.params.cond_emb_size:
        yield Problem(
            f"{where}.unitary_encoder_config.cond_emb_size",
            f"{width} is not model.params.cond_emb_size {model.params.cond_emb_size}, beside which it is read; leave "
            "it out",
            (f"{where}.cond_emb_size",),
        )


def _text_encoder(config: CircuitsConfig) -> Iterator[Problem]:
    encoder = config.text_encoder
    if encoder is None:
        return
    if encoder.params.local_weights_path is None:
        yield Problem(
            "text_encoder.params.local_weights_path",
            "is required with a text_encoder, which is never downloaded; name its weights on this machine, or leave "
            "out text_encoder, for a table of prompts that is learned",
        )
    if encoder.type == "CLIPTextModel" and "arch" in encoder.params.model_fields_set:
        yield Problem(
            "text_encoder.params.arch",
            "has no effect with type: CLIPTextModel, whose folder says it; remove it",
            ("text_encoder.type",),
        )
    if "prompt_tokens" in config.model.model_fields_set:
        yield Problem(
            "model.prompt_tokens",
            "has no effect with a text_encoder, whose max_length says it; remove it",
            ("text_encoder",),
        )


def _schedule(config: CircuitsConfig) -> Iterator[Problem]:
    training = config.training
    own = training.lr_scheduler
    kinds = {stage.lr_scheduler or own for stage in config.stages} or {own}
    cycles = kinds & {"OneCycleLR", "one_cycle"}
    named = ", ".join(sorted(kind or "null" for kind in kinds))
    if training.one_cycle is not None and not cycles:
        yield Problem(
            "training.one_cycle",
            f"has no effect with lr_scheduler: {named}; set lr_scheduler: one_cycle, or remove it",
            ("training.lr_scheduler",),
        )
    if training.warmup_steps and kinds == cycles:
        yield Problem(
            "training.warmup_steps",
            "has no effect with lr_scheduler: one_cycle, which rises over one_cycle.pct_start of the run; remove it",
            ("training.lr_scheduler",),
        )
    if training.min_lr_ratio and not kinds & {"CosineAnnealingLR", "cosine", "linear"}:
        yield Problem(
            "training.min_lr_ratio",
            "has no effect without lr_scheduler: cosine or linear; set one of them, or remove it",
            ("training.lr_scheduler",),
        )


def _batches(config: CircuitsConfig) -> Iterator[Problem]:
    training = config.training
    if training.global_batch_size is None:
        return
    if training.gradient_accumulation_steps is not None:
        yield Problem(
            "training.gradient_accumulation_steps",
            f"{training.gradient_accumulation_steps} and training.global_batch_size {training.global_batch_size} are "
            "both set; keep one, the other follows",
            ("training.global_batch_size",),
        )
    sizes = [("training.batch_size", "batch_size", training.batch_size)]
    for index, stage in enumerate(config.stages):
        if stage.batch_size is not None:
            sizes.append((f"stages.{index}.batch_size", f"stages.{index}.batch_size", stage.batch_size))
    for path, name, size in sizes:
        if training.global_batch_size % size:
            text = f"{training.global_batch_size} is not a multiple of {name} {size}"
            yield Problem("training.global_batch_size", text, (path,))


def _stages(config: CircuitsConfig) -> Iterator[Problem]:
    names = [stage.name or f"stage_{index + 1}" for index, stage in enumerate(config.stages)]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Problem(
                f"stages.{index}.name", f"'{name}' is the name of another stage too; names must differ"
            )
    if config.stages and "max_steps" in config.training.model_fields_set and config.training.max_steps:
        yield Problem(
            "training.max_steps",
            "would end each stage; set max_steps of the stages that it is meant for",
            ("stages",),
        )
