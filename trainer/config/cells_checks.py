"""Rules that tie several fields of a typed configuration together: twins, what a model can learn, sizes that fit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any

from models.families import FAMILIES
from trainer.config.messages import Problem
from trainer.config.yaml_text import describe
from trainer.errors import ConfigError
from trainer.scoring.specs import parse_specs

if TYPE_CHECKING:
    from trainer.config.cells import ScModelForgeConfig

TWINS = (
    ("data.max_genes", "tokenizer.max_genes", "model.max_seq_len"),
    ("data.gene_vocab", "tokenizer.gene_vocab"),
    ("data.num_workers", "training.num_workers"),
    ("tokenizer.masking.mask_ratio", "model.mask_ratio"),
    ("tokenizer.n_bins", "model.n_bins"),
)
"""Fields that say the same thing: the one that is written rules, and two that are written must be equal."""


def is_written(config: Any, path: str) -> bool:
    """Tell whether a field was given, in the file, in Python or on the command line, and not left to its default."""
    *parents, name = path.split(".")
    section = reduce(lambda node, part: None if node is None else getattr(node, part), parents, config)
    return section is not None and name in section.model_fields_set


def value_at(config: Any, path: str) -> Any:
    """Return the value of the field at a path such as `training.optimizer.lr`."""
    return reduce(getattr, path.split("."), config)


def settle_twins(config: ScModelForgeConfig) -> None:
    """Let fields that are not written show what rules them: their twin, or the architecture's task.

    They still count as not written.
    """
    for paths in TWINS:
        written = [path for path in paths if is_written(config, path)]
        for path in paths:
            if path not in written:
                default = _field_default(config, path)
                _show(config, path, value_at(config, written[0]) if written else default)
    if not is_written(config, "model.pretraining_task"):
        _show(config, "model.pretraining_task", FAMILIES[config.model.architecture].tasks[0])


def _field_default(config: Any, path: str) -> Any:
    *parents, name = path.split(".")
    return type(reduce(getattr, parents, config)).model_fields[name].default


def _show(config: Any, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    reduce(getattr, parents, config).__dict__[name] = value


def cross_field_problems(config: ScModelForgeConfig) -> list[Problem]:
    """Return every contradiction between fields of a configuration whose single fields are valid."""
    return [
        *_twins(config),
        *_task(config),
        *_widths(config),
        *_masking(config),
        *_tokenizer(config),
        *_schedule(config),
        *_benchmarks(config),
        *_fine_tuning(config),
    ]


def _twins(config: ScModelForgeConfig) -> Iterator[Problem]:
    for paths in TWINS:
        written = [path for path in paths if is_written(config, path)]
        for path in written[1:]:
            first, other = value_at(config, written[0]), value_at(config, path)
            if first != other:
                yield Problem(
                    path,
                    f"{describe(other)} contradicts {written[0]}: {describe(first)}, which says the same thing; keep "
                    "one of the two, or make them equal",
                    (written[0],),
                )


def _task(config: ScModelForgeConfig) -> Iterator[Problem]:
    model = config.model
    possible = FAMILIES[model.architecture].tasks
    if is_written(config, "model.pretraining_task") and model.pretraining_task not in possible:
        yield Problem(
            "model.pretraining_task",
            f"{model.pretraining_task} is not what a {model.architecture} can learn; possible: {', '.join(possible)} "
            "(leave it out to take the first)",
            ("model.architecture",),
        )


def _widths(config: ScModelForgeConfig) -> Iterator[Problem]:
    model = config.model
    if model.hidden_dim % model.num_heads:
        yield Problem(
            "model.num_heads",
            f"{model.num_heads} heads do not divide hidden_dim {model.hidden_dim}",
            ("model.hidden_dim",),
        )
    if model.architecture == "masked_autoencoder":
        width, heads = decoder_width(config), model.decoder_heads or model.num_heads
        if width % heads:
            yield Problem(
                "model.decoder_heads",
                f"{heads} heads do not divide decoder_dim {width}",
                ("model.decoder_dim", "model.hidden_dim", "model.num_heads"),
            )


def decoder_width(config: ScModelForgeConfig) -> int:
    """Return the width of a masked autoencoder's decoder."""
    return config.model.decoder_dim or max(config.model.hidden_dim // 2, 1)


def _masking(config: ScModelForgeConfig) -> Iterator[Problem]:
    masking = config.tokenizer.masking
    if masking.random_replace_ratio + masking.keep_ratio > 1:
        yield Problem(
            "tokenizer.masking.keep_ratio",
            f"{masking.keep_ratio:g} and random_replace_ratio {masking.random_replace_ratio:g} add up to more than 1",
            ("tokenizer.masking.random_replace_ratio",),
        )


def _tokenizer(config: ScModelForgeConfig) -> Iterator[Problem]:
    tokenizer = config.tokenizer
    if tokenizer.strategy == "gene_embedding" and tokenizer.embedding_path is None:
        yield Problem(
            "tokenizer.embedding_path",
            "is required with strategy: gene_embedding: a file of gene vectors (.npy or .pt)",
            ("tokenizer.strategy",),
        )
    if config.model.pooling == "cls" and not tokenizer.prepend_cls:
        yield Problem(
            "model.pooling",
            "cls needs the token that tokenizer.prepend_cls: false leaves out; set pooling: mean, or prepend_cls: true",
            ("tokenizer.prepend_cls",),
        )


def _schedule(config: ScModelForgeConfig) -> Iterator[Problem]:
    scheduler = config.training.scheduler
    if scheduler is None:
        return
    written = is_written(config, "training.scheduler.warmup_steps")
    if scheduler.name == "cosine" and written and scheduler.warmup_steps:
        yield Problem(
            "training.scheduler.warmup_steps",
            f"{scheduler.warmup_steps} has no meaning with name: cosine, which has no warmup; set name: cosine_warmup, "
            "or warmup_steps: 0",
            ("training.scheduler.name",),
        )
    elif scheduler.name != "cosine" and written and scheduler.warmup_steps >= scheduler.total_steps:
        yield Problem(
            "training.scheduler.warmup_steps",
            f"{scheduler.warmup_steps} is not below total_steps {scheduler.total_steps}; the rise must end before it",
            ("training.scheduler.total_steps",),
        )


def _benchmarks(config: ScModelForgeConfig) -> Iterator[Problem]:
    try:
        parse_specs(config.eval.benchmarks, "eval.benchmarks")
    except ConfigError as error:
        for line in str(error).splitlines():
            where, _, text = line.partition(": ")
            yield Problem(where, text)


def _fine_tuning(config: ScModelForgeConfig) -> Iterator[Problem]:
    finetune = config.finetune
    if finetune is None:
        return
    if finetune.freeze_backbone and finetune.freeze_backbone_epochs:
        yield Problem(
            "finetune.freeze_backbone_epochs",
            f"{finetune.freeze_backbone_epochs} would let the backbone train after as many epochs, and "
            "freeze_backbone: true holds it still throughout; keep one of the two",
            ("finetune.freeze_backbone",),
        )
