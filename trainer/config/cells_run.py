"""Turn a typed configuration into the `RunConfig` that a run is carried out from; imports no torch, opens no data.

Pretraining becomes one phase. Every field either has a key of the run that acts, or is named in the run's notes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from models.families import FAMILIES
from trainer.config.cells import CellsSection, ScModelForgeConfig
from trainer.config.cells_checks import is_written
from trainer.config.cells_section import section_classes, written_values
from trainer.config.load import validate
from trainer.config.messages import ValidationError, config_error
from trainer.config.schema import RunConfig
from trainer.scoring.specs import Spec, parse_specs

TARGETS = {
    "masked_gene_prediction": "gene",
    "masked_expression_prediction": "expression",
    "masked_gene_and_expression_prediction": "both",
}
"""What is asked for at masked positions; `next_gene_prediction` masks nothing."""

PRECISIONS = {"32": "fp32", "16-mixed": "fp16", "bf16-mixed": "bf16", "fp8": "fp8"}
OPTIMIZERS = {"adamw": "torch.optim.AdamW", "adam": "torch.optim.Adam"}
SCHEDULES = {"cosine_warmup": "cosine", "cosine": "cosine", "linear": "linear"}

NO_DECAY = (r"(^|[._])bias$", r"norm")
"""Names of parameters that weight decay leaves alone: biases, and all of norms."""

EACH_FILE = "@file"
"""What the loaders call the technical batch of a cell that is its file."""


def run_of(config: ScModelForgeConfig, command: str) -> RunConfig:
    """Return the run that a command carries out: `train` pretrains, `finetune` fine-tunes.

    Raises:
        ConfigError: the configuration contradicts itself, or lacks what the command needs.
    """
    if command == "train":
        return pretraining_run(config)
    from trainer.config.cells_finetune import fine_tuning_run

    return fine_tuning_run(config)


def pretraining_run(config: ScModelForgeConfig) -> RunConfig:
    """Return the run that pretrains the model of a configuration.

    Raises:
        ValidationError: the configuration contradicts itself, or names no cells.
    """
    config = settled(config)
    phase = {
        "name": "pretraining",
        **loader(config, masking(config)),
        "epochs": config.training.max_epochs,
        **phase_settings(config),
    }
    name = f"{config.model.architecture}_{config.tokenizer.strategy}"
    return run_config(config, name, model_section(config), optimizer_section(config), [phase], "train")


def settled(config: ScModelForgeConfig) -> ScModelForgeConfig:
    """Return a checked copy: what was changed since it was built is compared anew.

    Raises:
        ValidationError: fields contradict each other.
    """
    return ScModelForgeConfig(**written_values(config))


def run_config(
    config: ScModelForgeConfig,
    default_name: str,
    model: dict[str, Any],
    optimizer: dict[str, Any],
    phases: list[dict[str, Any]],
    command: str,
    **settings: Any,
) -> RunConfig:
    """Return a run of these phases with everything that the section `training` says of it."""
    training = config.training
    raw: dict[str, Any] = {
        "run_name": training.run_name or default_name,
        "output_dir": training.checkpoint_dir,
        "seed": training.seed,
        "precision": PRECISIONS[training.precision],
        "resume_from": training.resume_from,
        "model": model,
        "optimizer": optimizer,
        "datasets": phases,
        "micro_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "max_grad_norm": training.gradient_clip or None,
        "checkpoint": {"keep_best": training.save_top_k},
        "trackers": [tracker(config)],
        "log_dir": training.log_dir,
        "launch": {
            "num_processes": training.num_gpus,
            "strategy": "any" if training.strategy == "auto" else "ddp",
            "starts_processes": training.strategy == "ddp_spawn",
        },
        "notes": notes(config, command, phases[0]["dataloader_args"]["tokenizer"]),
        **settings,
    }
    if training.precision == "fp8":
        raw["fp8"] = {} if training.fp8 is None else training.fp8.model_dump()
    if training.early_stopping is not None:
        raw["early_stopping"] = training.early_stopping.model_dump()
    run, problems = validate(raw)
    if run is None or problems:
        raise config_error("the run of this configuration", problems)
    return run


def loader(config: ScModelForgeConfig, mask: dict[str, Any] | None) -> dict[str, Any]:
    """Return the factory and the arguments of the loader that reads the section `data`.

    Raises:
        ValidationError: no cells are named.
    """
    data, training = config.data, config.training
    arguments: dict[str, Any] = {
        "gene_vocab": data.gene_vocab,
        "preprocessing": preprocessing(config),
        "technical_batch": data.technical_batch or EACH_FILE,
        "cache_dir": data.cache_dir,
        "min_match": data.min_match,
        "obs": obs_columns(config),
        "tokenizer": build_tokenizer_kwargs(config),
        "masking": mask,
        "val_fraction": training.val_split,
        "split_seed": training.seed,
        "num_workers": data.num_workers,
    }
    if training.sampling is not None:
        arguments["sampling"] = training.sampling.model_dump()
    if data.source == "cellxgene_census":
        census = {key: value for key, value in data.census.model_dump().items() if value is not None}
        return {
            "dataloader_factory": "data.prepared.census_loader",
            "dataloader_args": {"census": census, **arguments},
        }
    if not data.paths:
        raise ValidationError(
            "data.paths: is empty; name at least one h5ad file, as data.paths=[cells.h5ad] (or set data.source: "
            "cellxgene_census)"
        )
    return {
        "dataloader_factory": "data.prepared.h5ad_loader",
        "dataloader_args": {
            "paths": list(data.paths),
            "layer": data.layer,
            "gene_column": data.gene_column,
            **arguments,
        },
    }


def preprocessing(config: ScModelForgeConfig) -> dict[str, Any]:
    """Return the loader's `preprocessing`."""
    steps = config.data.preprocessing
    arguments: dict[str, Any] = {"normalize": steps.normalize, "log1p": steps.log1p}
    if steps.normalize is not None:
        arguments["target_sum"] = steps.target_sum
    if steps.hvg_selection is not None:
        chosen = {
            "hvg_selection": steps.hvg_selection,
            "hvg_flavor": steps.hvg_flavor,
            "hvg_batch_key": steps.hvg_batch_key,
            "hvg_whitelist": steps.hvg_whitelist,
        }
        arguments |= {key: value for key, value in chosen.items() if value is not None}
    return arguments


def build_tokenizer_kwargs(config: ScModelForgeConfig) -> dict[str, Any]:
    """Return the options of the loader's tokenizer; only those that the strategy knows."""
    tokenizer = config.tokenizer
    options: dict[str, Any] = {
        "strategy": tokenizer.strategy,
        "max_genes": tokenizer.max_genes,
        "prepend_cls": tokenizer.prepend_cls,
    }
    if uses_bins(config):
        options["n_bins"] = tokenizer.n_bins
        options["binning_method"] = tokenizer.binning_method
    if tokenizer.strategy == "rank_value" and tokenizer.gene_medians is not None:
        options["gene_medians"] = tokenizer.gene_medians
    return options


def uses_bins(config: ScModelForgeConfig) -> bool:
    """Tell whether expression is sorted into bins: by the strategy, or for the model to predict."""
    return config.tokenizer.strategy == "binned_expression" or FAMILIES[config.model.architecture].needs_bins


def masking(config: ScModelForgeConfig) -> dict[str, Any] | None:
    """Return the loader's `masking`; None for a model that learns without."""
    target = TARGETS.get(config.model.pretraining_task)
    if target is None:
        return None
    section = config.tokenizer.masking
    options: dict[str, Any] = {"mask_ratio": section.mask_ratio, "target": target}
    if target != "expression":
        options |= {"random_replace_ratio": section.random_replace_ratio, "keep_ratio": section.keep_ratio}
    return options


def obs_columns(config: ScModelForgeConfig) -> list[str]:
    """Return the obs columns that benchmarks read."""
    columns = [column for spec in benchmark_specs(config) for column in spec.columns()]
    return list(dict.fromkeys(columns))


def benchmark_specs(config: ScModelForgeConfig) -> list[Spec]:
    """Return the benchmarks, checked."""
    return parse_specs(config.eval.benchmarks, "eval.benchmarks")


def model_section(config: ScModelForgeConfig) -> dict[str, Any]:
    """Return the run's `model`: the class of the architecture, and the arguments of its configuration."""
    model = config.model
    family = FAMILIES[model.architecture]
    arguments: dict[str, Any] = {
        "hidden_dim": model.hidden_dim,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "ffn_dim": model.ffn_dim,
        "dropout": model.dropout,
        "max_seq_len": model.max_seq_len,
        # In a ranking the place of a gene is what the tokens say of its expression.
        "position_embedding": "learned" if config.tokenizer.strategy == "rank_value" else "none",
        "pooling": model.pooling,
        "activation": model.activation,
        "use_expression_values": model.use_expression_values,
    }
    if model.vocab_size is not None:
        arguments["vocab_size"] = model.vocab_size
    if config.tokenizer.strategy == "gene_embedding":
        arguments["gene_embedding_path"] = config.tokenizer.embedding_path
        arguments["gene_embedding_dim"] = config.tokenizer.embedding_dim
    arguments |= {name: getattr(model, name) for name in family.own_fields}
    if family.weighs_losses:
        arguments |= loss_weights(config)
    return {
        "model_class": family.model_class,
        "config_class": family.config_class,
        "config_args": arguments,
    }


def loss_weights(config: ScModelForgeConfig) -> dict[str, float]:
    """Return the weights of the two losses; one that the task does not ask for is 0, and builds no head."""
    model, target = config.model, TARGETS.get(config.model.pretraining_task, "both")
    if target == "both":
        return {
            "gene_loss_weight": model.gene_loss_weight,
            "expression_loss_weight": model.expression_loss_weight,
        }
    return {
        "gene_loss_weight": float(target == "gene"),
        "expression_loss_weight": float(target == "expression"),
    }


def optimizer_section(config: ScModelForgeConfig) -> dict[str, Any]:
    """Return the run's `optimizer`: two groups of parameters, of which one has no weight decay."""
    optimizer = config.training.optimizer
    return {
        "optimizer_class": OPTIMIZERS[optimizer.name],
        "optimizer_args": {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay},
        "groups": [{"name": "no_decay", "match": list(NO_DECAY), "args": {"weight_decay": 0.0}}],
    }


def phase_settings(config: ScModelForgeConfig) -> dict[str, Any]:
    """Return what every phase of a run says: the schedule, the log, the benchmarks."""
    settings = {"log_every_steps": config.training.log_every_n_steps, **schedule(config)}
    specs = benchmark_specs(config)
    if specs:
        settings["benchmarks"] = {
            "every_epochs": config.eval.every_n_epochs,
            "batch_size": config.eval.batch_size,
            "specs": [spec.options() for spec in specs],
        }
    return settings


def schedule(config: ScModelForgeConfig) -> dict[str, Any]:
    """Return a phase's schedule; lengths that are not written fit a run that is shorter."""
    scheduler = config.training.scheduler
    if scheduler is None:
        return {}
    warmup = 0 if scheduler.name == "cosine" else scheduler.warmup_steps
    fits = []
    if warmup and not is_written(config, "training.scheduler.warmup_steps"):
        fits.append("warmup")
    if not is_written(config, "training.scheduler.total_steps"):
        fits.append("decay")
    return {
        "schedule": SCHEDULES[scheduler.name],
        "warmup_steps": warmup,
        "schedule_steps": scheduler.total_steps,
        "schedule_fits": fits,
    }


def tracker(config: ScModelForgeConfig) -> dict[str, Any]:
    """Return the run's tracker."""
    training = config.training
    if training.logger == "wandb":
        return {"name": "wandb", "project": training.wandb_project}
    return {"name": training.logger}


def run_name_of(text: str) -> str:
    """Return a text as a run may be named."""
    return re.sub(r"[^A-Za-z0-9_.+=@-]", "_", text)[:100]


# What does not act


def notes(config: ScModelForgeConfig, command: str, tokenizer: dict[str, Any]) -> list[str]:
    """Return the lines of the start-up account that name what was written and does not act in this run.

    `tokenizer` holds the options that its loader has, which in fine-tuning are the backbone's.
    """
    unused: dict[str, list[str]] = {}
    for path, reason in unused_fields(config, command, tokenizer):
        unused.setdefault(reason, []).append(path)
    return [f"not used by this run: {', '.join(paths)} ({reason})" for reason, paths in unused.items()]


def unused_fields(
    config: ScModelForgeConfig, command: str, tokenizer: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """Yield each field or section that was written and does not act in this run, with the reason."""
    if command == "train" and config.finetune is not None:
        yield "finetune", "the command is train"
    told: set[str] = set()
    for paths, acts, reason in _conditions(config, command, tokenizer):
        for path in paths:
            if not acts and path not in told and is_written(config, path):
                told.add(path)
                yield path, reason


def _conditions(
    config: ScModelForgeConfig, command: str, tokenizer: dict[str, Any]
) -> list[tuple[tuple[str, ...], bool, str]]:
    """Return fields, whether they act, and why they would not."""
    data, model, training = config.data, config.model, config.training
    steps = data.preprocessing
    is_census = data.source == "cellxgene_census"
    has_bins = tokenizer.get("n_bins") is not None
    whose = "" if command == "train" else "the backbone's "
    strategy = f"{whose}tokenizer.strategy is {tokenizer['strategy']}"
    architecture = f"model.architecture is {model.architecture}"
    conditions = [
        (_fields("data.census"), is_census, f"data.source is {data.source}"),
        (
            ("data.paths", "data.layer", "data.gene_column"),
            not is_census,
            f"data.source is {data.source}",
        ),
        (
            ("data.census.filters",),
            data.census.obs_value_filter is None,
            "data.census.obs_value_filter goes before it",
        ),
        (
            ("data.preprocessing.target_sum",),
            steps.normalize is not None,
            "data.preprocessing.normalize is null",
        ),
        (
            (
                "data.preprocessing.hvg_flavor",
                "data.preprocessing.hvg_batch_key",
                "data.preprocessing.hvg_whitelist",
            ),
            steps.hvg_selection is not None,
            "data.preprocessing.hvg_selection is null",
        ),
        (("tokenizer.n_bins", "tokenizer.binning_method"), has_bins, strategy),
        (("model.n_bins",), has_bins, f"{strategy}, and {architecture}" if command == "train" else strategy),
        (
            ("tokenizer.embedding_path", "tokenizer.embedding_dim"),
            tokenizer["strategy"] == "gene_embedding",
            strategy,
        ),
        (("tokenizer.gene_medians",), tokenizer["strategy"] == "rank_value", strategy),
        *((fields, name == model.architecture, architecture) for name, fields in _fields_of_families()),
        (
            ("eval.every_n_epochs", "eval.batch_size"),
            bool(config.eval.benchmarks),
            "eval.benchmarks is empty",
        ),
        (("training.wandb_project",), training.logger == "wandb", f"training.logger is {training.logger}"),
        (("training.fp8",), training.precision == "fp8", f"training.precision is {training.precision}"),
        (("training.save_top_k",), training.val_split > 0, "training.val_split is 0"),
    ]
    if command == "train":
        return [*conditions, *_pretraining_conditions(config)]
    return [*_fine_tuning_conditions(config), *conditions]


def _pretraining_conditions(config: ScModelForgeConfig) -> list[tuple[tuple[str, ...], bool, str]]:
    target = TARGETS.get(config.model.pretraining_task)
    family = FAMILIES[config.model.architecture]
    has_both_losses = family.weighs_losses and target in ("both", None)  # None: genes and expression in turn
    task = f"model.pretraining_task is {config.model.pretraining_task}"
    return [
        (
            ("tokenizer.masking.random_replace_ratio", "tokenizer.masking.keep_ratio"),
            target in ("gene", "both"),
            task,
        ),
        (("tokenizer.masking.mask_ratio", "model.mask_ratio"), target is not None, task),
        (("model.gene_loss_weight", "model.expression_loss_weight"), has_both_losses, task),
    ]


def _fine_tuning_conditions(config: ScModelForgeConfig) -> list[tuple[tuple[str, ...], bool, str]]:
    finetune = config.finetune
    assert finetune is not None
    of_pretraining = (
        *_fields("tokenizer.masking"),
        "model.mask_ratio",
        "model.pretraining_task",
        "model.gene_loss_weight",
        "model.expression_loss_weight",
        *(path for _, paths in _fields_of_families() for path in paths),
    )
    of_backbone = (
        "data.gene_vocab",
        "tokenizer.gene_vocab",
        "data.preprocessing.hvg_selection",
        "data.preprocessing.hvg_flavor",
        "data.preprocessing.hvg_batch_key",
        "data.preprocessing.hvg_whitelist",
        "tokenizer.embedding_path",
        "tokenizer.embedding_dim",
        "tokenizer.gene_medians",
    )
    head, lora = finetune.head, finetune.lora
    lora_fields = tuple(path for path in _fields("finetune.lora") if path != "finetune.lora.enabled")
    task = f"finetune.head.task is {head.task}"
    return [
        (of_pretraining, False, "only pretraining reads it"),
        (of_backbone, False, "the backbone says so"),
        (lora_fields, lora.enabled, "finetune.lora.enabled is false"),
        (
            ("finetune.head.n_classes", "finetune.head.class_weights"),
            head.task == "classification",
            task,
        ),
        (("finetune.head.output_dim",), head.task == "regression", task),
        (
            ("finetune.backbone_lr",),
            lora.enabled or not finetune.freeze_backbone,
            "finetune.freeze_backbone is true",
        ),
        (
            ("finetune.freeze_backbone",),
            not lora.enabled,
            "with finetune.lora.enabled the backbone's own weights are held still in any case",
        ),
    ]


def _fields_of_families() -> list[tuple[str, tuple[str, ...]]]:
    """Return the paths of the fields that one architecture alone reads, by its name."""
    return [
        (name, tuple(f"model.{field}" for field in family.own_fields)) for name, family in FAMILIES.items()
    ]


def _fields(place: str) -> tuple[str, ...]:
    """Return the paths of a section's own fields."""
    section: type[CellsSection] = next(
        cls for cls in section_classes(ScModelForgeConfig) if cls.place == place
    )
    return tuple(f"{place}.{name}" for name in section.model_fields)
