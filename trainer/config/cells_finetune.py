"""Turn a typed configuration with a section `finetune` into the run that fine-tunes its backbone.

The backbone says what its cells were: genes, tokens and sizes come from its checkpoint. What a configuration writes of
them must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from models.families import FAMILIES
from trainer.config.cells import FinetuneConfig, ScModelForgeConfig
from trainer.config.cells_checks import is_written, value_at
from trainer.config.cells_run import (
    loader,
    optimizer_section,
    phase_settings,
    run_config,
    run_name_of,
    settled,
)
from trainer.config.messages import Problem, ValidationError, config_error
from trainer.config.schema import RunConfig
from trainer.config.yaml_text import describe

if TYPE_CHECKING:
    from trainer.backbone import Backbone

WHOLE_BACKBONE = r"^backbone\."
"""The parameters of the backbone, adapters included."""

_OF_TOKENIZER = {
    "tokenizer.strategy": "strategy",
    "tokenizer.prepend_cls": "prepend_cls",
    "tokenizer.n_bins": "n_bins",
    "tokenizer.binning_method": "binning_method",
    "data.preprocessing.normalize": "normalize",
    "data.preprocessing.target_sum": "target_sum",
    "data.preprocessing.log1p": "log1p",
}
"""Fields that the backbone's tokenizer settles, and what its options call them."""

_OF_MODEL = (
    "hidden_dim",
    "num_layers",
    "num_heads",
    "ffn_dim",
    "activation",
    "use_expression_values",
    "vocab_size",
)
"""Fields of `model` that the backbone's configuration settles; null is whatever it has."""

_STEPS = ("normalize", "target_sum", "log1p")
"""Options that a loader's `preprocessing` takes: it leaves values alone that are log-normalised already."""

_OVER_BACKBONE = ("dropout", "pooling")
"""Fields of `model` that go before the backbone's: no weight depends on them."""


def fine_tuning_run(config: ScModelForgeConfig) -> RunConfig:
    """Return the run that fine-tunes the backbone of a configuration.

    Raises:
        ConfigError: there is no section finetune, or fields contradict each other or the backbone.
        CheckpointError: the backbone cannot be read.
    """
    from trainer.backbone import read_backbone

    config = settled(config)
    finetune = config.finetune
    if finetune is None:
        raise ValidationError("finetune: is missing; say what to fine-tune: finetune.checkpoint_path=FOLDER")
    problems = list(_problems(config, finetune))
    if not finetune.checkpoint_path:
        problems.append(
            Problem(
                "finetune.checkpoint_path",
                "is empty; name the run folder, checkpoint or export to start from",
            )
        )
    if problems:
        raise config_error("the fine-tuning of this configuration", problems, ValidationError)
    backbone = read_backbone(finetune.checkpoint_path, "finetune.checkpoint_path")
    problems = list(_contradictions(config, backbone))
    if problems:
        raise config_error(f"the backbone {backbone.folder}", problems, ValidationError)
    # A run that goes on has its weights in its own checkpoint.
    is_fresh = config.training.resume_from in (None, "auto")
    return run_config(
        config,
        run_name_of("_".join(["finetune", *label_columns(finetune)])),
        _model_section(config, finetune, backbone),
        _optimizer_section(config, finetune),
        _phases(config, finetune, backbone),
        "finetune",
        init_from=str(backbone.folder) if is_fresh else None,
    )


def _problems(config: ScModelForgeConfig, finetune: FinetuneConfig) -> Iterator[Problem]:
    epochs = config.training.max_epochs
    if finetune.freeze_backbone_epochs >= epochs:
        yield Problem(
            "finetune.freeze_backbone_epochs",
            f"{finetune.freeze_backbone_epochs} is not below training.max_epochs {epochs}, so the backbone would never "
            "train; set freeze_backbone: true to want that, or fewer",
        )
    columns, head = label_columns(finetune), finetune.head
    if head.task == "classification" and len(columns) > 1:
        yield Problem(
            "finetune.label_key",
            f"names {len(columns)} columns, but a cell has one class; set finetune.head.task: regression for numbers",
        )
    wanted = head.output_dim if is_written(config, "finetune.head.output_dim") else len(columns)
    if head.task == "regression" and wanted != len(columns):
        yield Problem(
            "finetune.head.output_dim",
            f"{wanted} numbers for each cell need as many columns of labels, and finetune.label_key names "
            f"{len(columns)}",
        )


def label_columns(finetune: FinetuneConfig) -> list[str]:
    """Return the obs columns of the labels."""
    return [finetune.label_key] if isinstance(finetune.label_key, str) else list(finetune.label_key)


def _contradictions(config: ScModelForgeConfig, backbone: Backbone) -> Iterator[Problem]:
    """Yield what is written and differs from what the backbone is."""
    model_class = FAMILIES[config.model.architecture].model_class
    if is_written(config, "model.architecture") and backbone.model_class != model_class:
        yield _differs("model.architecture", config.model.architecture, backbone.model_class)
    for name in _OF_MODEL:
        wanted, has = getattr(config.model, name), backbone.config.get(name)
        if name == "ffn_dim":
            has = has or 4 * backbone.config["hidden_dim"]
        if is_written(config, f"model.{name}") and wanted is not None and wanted != has:
            yield _differs(f"model.{name}", wanted, has)
    for path, option in _OF_TOKENIZER.items():
        if backbone.value_kind == "lognorm" and path.startswith("data.preprocessing."):
            continue  # the values were taken as they are, whatever was written
        wanted = value_at(config, path)
        # A tokenizer without bins knows nothing of them.
        if is_written(config, path) and option in backbone.tokenizer and wanted != backbone.tokenizer[option]:
            yield _differs(path, wanted, backbone.tokenizer[option])
    longest = int(backbone.tokenizer["max_genes"])
    written = _max_genes(config)
    if written is not None and config.tokenizer.max_genes > longest:
        yield Problem(
            written, f"{config.tokenizer.max_genes} is more than the {longest} tokens that the backbone takes"
        )
    wants_cls = config.model.pooling == "cls" and is_written(config, "model.pooling")
    if wants_cls and not backbone.tokenizer["prepend_cls"]:
        yield Problem("model.pooling", "cls needs a token that the backbone's cells do not have; set mean")


def _differs(path: str, wanted: Any, has: Any) -> Problem:
    return Problem(
        path, f"{describe(wanted)} is not what the backbone has, {describe(has)}; leave it out to take that"
    )


def _max_genes(config: ScModelForgeConfig) -> str | None:
    """Return the field that writes the length of cells; None: it is the backbone's."""
    fields = ("data.max_genes", "tokenizer.max_genes", "model.max_seq_len")
    return next((path for path in fields if is_written(config, path)), None)


def _model_section(
    config: ScModelForgeConfig, finetune: FinetuneConfig, backbone: Backbone
) -> dict[str, Any]:
    head = finetune.head
    own = {
        name: getattr(config.model, name) for name in _OVER_BACKBONE if is_written(config, f"model.{name}")
    }
    arguments: dict[str, Any] = {
        "backbone_class": backbone.model_class,
        "backbone_config": {**backbone.config, **own},
        "task": head.task,
        "head_hidden_dim": head.hidden_dim,
        "head_dropout": head.dropout,
    }
    if head.task == "classification":
        arguments |= {"n_classes": head.n_classes, "class_weights": head.class_weights}
    else:
        arguments["output_dim"] = len(label_columns(finetune))
    if finetune.lora.enabled:
        arguments["lora"] = finetune.lora.model_dump(exclude={"enabled"})
    return {
        "model_class": "models.fine_tuned.FineTunedModel",
        "config_class": "models.fine_tuned.FineTunedConfig",
        "config_args": {key: value for key, value in arguments.items() if value is not None},
    }


def _optimizer_section(config: ScModelForgeConfig, finetune: FinetuneConfig) -> dict[str, Any]:
    """Return four groups: backbone and head, each with and without weight decay; those without parameters left out."""
    groups = _groups("head")
    if not _is_frozen(finetune):
        groups += _groups("backbone")
        if finetune.lora.enabled and finetune.lora.bias == "none":
            groups = [group for group in groups if group["name"] != "backbone_no_decay"]
    return {**optimizer_section(config), "groups": groups}


def _groups(part: str) -> list[dict[str, Any]]:
    return [
        {
            "name": f"{part}_no_decay",
            "match": [rf"^{part}\.(.*[._])?bias$", rf"^{part}\..*norm"],
            "args": {"weight_decay": 0.0},
        },
        {"name": part, "match": [rf"^{part}\."]},
    ]


def _is_frozen(finetune: FinetuneConfig) -> bool:
    """Tell whether nothing below the head trains in any phase."""
    return finetune.freeze_backbone and not finetune.lora.enabled


def _phases(config: ScModelForgeConfig, finetune: FinetuneConfig, backbone: Backbone) -> list[dict[str, Any]]:
    """Return one phase, or two where the backbone trains later than the head: one schedule goes over both."""
    settings = {**_loader(config, finetune, backbone), **phase_settings(config)}
    rates = _learning_rates(config, finetune)
    if rates:
        settings["group_lrs"] = rates
    frozen = _frozen_patterns(finetune)
    epochs, first = config.training.max_epochs, finetune.freeze_backbone_epochs
    if not first:
        return [{"name": "fine_tuning", "epochs": epochs, "freeze": frozen, **settings}]
    if "schedule" in settings:
        settings["schedule_scope"] = "run"
    return [
        {"name": "head", "epochs": first, "freeze": [WHOLE_BACKBONE], **settings},
        {"name": "all", "epochs": epochs - first, "freeze": frozen, **settings},
    ]


def _frozen_patterns(finetune: FinetuneConfig) -> list[str]:
    """Return what is held still while all trains that is to train."""
    if finetune.lora.enabled:
        from models.lora import frozen_patterns

        return frozen_patterns(finetune.lora.bias)
    return [WHOLE_BACKBONE] if finetune.freeze_backbone else []


def _learning_rates(config: ScModelForgeConfig, finetune: FinetuneConfig) -> dict[str, float]:
    """Return the learning rates of the groups that have one of their own."""
    of_part = {"backbone": finetune.backbone_lr, "head": finetune.head_lr}
    groups = [group["name"] for group in _optimizer_section(config, finetune)["groups"]]
    rates = {name: of_part[name.removesuffix("_no_decay")] for name in groups}
    return {name: rate for name, rate in rates.items() if rate is not None}


def _loader(config: ScModelForgeConfig, finetune: FinetuneConfig, backbone: Backbone) -> dict[str, Any]:
    """Return the loader: the configuration's cells, in the genes and tokens of the backbone, with labels."""
    section = loader(config, None)
    arguments = section["dataloader_args"]
    options = dict(backbone.tokenizer)
    steps = {name: options.pop(name) for name in _STEPS if name in options}
    if backbone.value_kind == "lognorm":
        # Counts become what such values are by the configuration's own steps.
        steps = {name: value for name, value in arguments["preprocessing"].items() if name in _STEPS}
    if _max_genes(config) is not None:
        options["max_genes"] = config.tokenizer.max_genes
    columns = label_columns(finetune)
    arguments |= {
        "gene_vocab": str(backbone.folder),
        "preprocessing": steps,
        "tokenizer": options,
        "label": columns[0] if len(columns) == 1 else columns,
        "label_task": finetune.head.task,
        "stratify": finetune.head.task == "classification" and config.training.val_split > 0,
    }
    return section
