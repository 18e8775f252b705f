"""Rules that tie several fields of a configuration together; none of them needs torch, data or a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from trainer.config.messages import Problem, unknown_name
from trainer.config.yaml_text import describe
from trainer.scoring.specs import wrong_specs

if TYPE_CHECKING:
    from trainer.config.schema import OptimizerConfig, PhaseConfig, RunConfig

_SCHEDULE = (
    "schedule",
    "one_cycle",
    "warmup_steps",
    "min_lr_ratio",
    "schedule_steps",
    "schedule_fits",
    "schedule_scope",
)
_PAIR = ("global_batch_size", "gradient_accumulation_steps")


def cross_field_problems(config: RunConfig) -> list[Problem]:
    """Return every contradiction between fields of a configuration whose single fields are valid."""
    problems = [*_precision(config), *_start(config), *_optimizer(config.optimizer), *_trackers(config)]
    if config.model.config_args and config.model.config_class is None:
        problems.append(
            Problem(
                "model.config_args",
                "set without config_class; name the config class, or use model_args",
                ("model.config_class",),
            )
        )
    problems += _batches(config)
    names = [phase.name for phase in config.datasets]
    for index, phase in enumerate(config.datasets):
        where = f"datasets.{index}"
        if phase.name in names[:index]:
            first = f"datasets.{names.index(phase.name)}"
            text = f"'{phase.name}' is the name of {first} too; names must differ"
            problems.append(Problem(f"{where}.name", text, (f"{first}.name",)))
        problems += _learning_rates(phase, where, config.optimizer)
        problems += _benchmarks(phase, where)
        problems += _schedule(phase, where, config.optimizer)
    return [*problems, *_schedule_of_the_run(config)]


def _precision(config: RunConfig) -> Iterator[Problem]:
    if config.amp_dtype is not None:
        yield Problem(
            "amp_dtype",
            f"{describe(config.amp_dtype)} contradicts precision: {config.precision}; keep one of the two",
            ("precision",),
        )
    if config.fp8 is not None and config.precision != "fp8":
        got = "null" if config.precision is None else config.precision
        yield Problem(
            "fp8",
            f"has no effect with precision: {got}; set precision: fp8, or remove it",
            ("precision", "amp_dtype"),
        )
    if config.fp8 is not None and config.fp8.backend == "torchao" and config.fp8.recipe != "current_scaling":
        yield Problem(
            "fp8.recipe",
            f"{config.fp8.recipe} with fp8.backend: torchao, which knows current_scaling alone; use that, or backend: "
            "te or emulate",
            ("fp8.backend",),
        )


def _start(config: RunConfig) -> Iterator[Problem]:
    if config.init_from is not None and config.resume_from not in (None, "auto"):
        yield Problem(
            "init_from",
            f"contradicts resume_from: {config.resume_from}, which restores the weights too; remove one "
            "(with resume_from: auto it gives the weights of a fresh start)",
            ("resume_from",),
        )


def _optimizer(optimizer: OptimizerConfig) -> Iterator[Problem]:
    if optimizer.scheduler_args and optimizer.scheduler_class is None:
        yield Problem(
            "optimizer.scheduler_args", "set without scheduler_class", ("optimizer.scheduler_class",)
        )
    names = [group.name for group in optimizer.groups]
    for index, name in enumerate(names):
        where = f"optimizer.groups.{index}"
        if name in names[:index]:
            first = f"optimizer.groups.{names.index(name)}"
            text = f"'{name}' is the name of {first} too; names must differ"
            yield Problem(f"{where}.name", text, (f"{first}.name",))
        if name == "default":
            yield Problem(
                f"{where}.name", "'default' names the parameters that are in no other group; use another"
            )
        reserved = sorted({"params", "name"} & optimizer.groups[index].args.keys())
        for key in reserved:
            yield Problem(f"{where}.args.{key}", "is set by the trainer; remove it")


def _trackers(config: RunConfig) -> Iterator[Problem]:
    names = [tracker.name for tracker in config.trackers]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Problem(
                f"trackers.{index}", f"'{name}' is listed twice", (f"trackers.{names.index(name)}",)
            )
    if config.use_wandb is False:
        yield Problem("use_wandb", "false contradicts the wandb entry in trackers; remove one", ("trackers",))
    if config.wandb_project is not None:
        text = (
            "differs from the project of the wandb entry in trackers; remove one"
            if "wandb" in names
            else "set, but nothing goes to wandb; set use_wandb: true (or false, to keep the "
            "project for later)"
        )
        yield Problem("wandb_project", text, ("trackers", "use_wandb"))


def _batches(config: RunConfig) -> Iterator[Problem]:
    for prefix, section in [("", config), *((f"datasets.{i}.", p) for i, p in enumerate(config.datasets))]:
        if section.global_batch_size is not None and section.gradient_accumulation_steps is not None:
            yield Problem(
                f"{prefix}global_batch_size",
                f"{section.global_batch_size} and {prefix}gradient_accumulation_steps "
                f"{section.gradient_accumulation_steps} are both set; keep one, the other follows",
                (f"{prefix}gradient_accumulation_steps",),
            )
    settings = [config.batch_settings(phase) for phase in config.datasets]
    told: set[str] = set()
    for index, batch in enumerate(settings):
        total, micro = batch.global_batch_size, batch.micro_batch_size
        phase = config.datasets[index]
        is_own = phase.global_batch_size is not None or phase.micro_batch_size is not None
        prefix = f"datasets.{index}." if is_own else ""
        if total is not None and micro is not None and total % micro and prefix not in told:
            told.add(prefix)
            yield Problem(
                f"{prefix}global_batch_size",
                f"global batch {total} is not a multiple of micro-batch {micro}; set "
                f"{prefix}global_batch_size or "
                f"{prefix}micro_batch_size",
                (*_PAIR, "micro_batch_size", *(f"{prefix}{key}" for key in (*_PAIR, "micro_batch_size"))),
            )


def _benchmarks(phase: PhaseConfig, where: str) -> Iterator[Problem]:
    if phase.benchmarks is None:
        return
    for place, text in wrong_specs(phase.benchmarks.tables(), f"{where}.benchmarks.specs"):
        yield Problem(place, text)


def _learning_rates(phase: PhaseConfig, where: str, optimizer: OptimizerConfig) -> Iterator[Problem]:
    split = [key for key in ("muon_lr", "adam_lr") if getattr(phase, key) is not None]
    if phase.lr is not None and split:
        yield Problem(
            f"{where}.lr",
            f"set together with {' and '.join(split)}; use lr for all groups, or muon_lr and adam_lr",
            tuple(f"{where}.{key}" for key in split),
        )
    groups = [group.name for group in optimizer.groups]
    if groups or optimizer.optimizer_class.startswith("torch.optim"):
        for name in phase.group_lrs:
            if name not in [*groups, "default"] or not groups:
                hint = unknown_name(name, [*groups, "default"]) if groups else "optimizer.groups is empty"
                yield Problem(f"{where}.group_lrs.{name}", f"no such parameter group; {hint}", ("optimizer",))


def _schedule(phase: PhaseConfig, where: str, optimizer: OptimizerConfig) -> Iterator[Problem]:
    if optimizer.scheduler_class is not None:
        for key in _SCHEDULE:
            if getattr(phase, key) != type(phase).model_fields[key].default:
                yield Problem(
                    f"{where}.{key}",
                    "set together with optimizer.scheduler_class, which decides the learning rate; "
                    "remove one",
                    ("optimizer.scheduler_class",),
                )
        return
    if phase.one_cycle is not None and phase.schedule != "one_cycle":
        yield Problem(
            f"{where}.one_cycle",
            f"has no effect with schedule: {phase.schedule}; set schedule: one_cycle, or remove it",
            (f"{where}.schedule",),
        )
    if phase.schedule == "one_cycle":
        for key in ("warmup_steps", "min_lr_ratio"):
            if getattr(phase, key):
                yield Problem(
                    f"{where}.{key}",
                    "has no effect with schedule: one_cycle, whose rise and end one_cycle.pct_start, div_factor and "
                    "final_div_factor describe; remove it",
                    (f"{where}.schedule",),
                )
    for key in ("min_lr_ratio", "schedule_steps"):
        if getattr(phase, key) and phase.schedule == "constant":
            yield Problem(
                f"{where}.{key}",
                "has no effect with schedule: constant; set schedule: linear or cosine, or remove it",
                (f"{where}.schedule",),
            )
    is_too_short = phase.schedule_steps is not None and phase.schedule_steps <= phase.warmup_steps
    if is_too_short and "warmup" not in phase.schedule_fits:
        yield Problem(
            f"{where}.schedule_steps",
            f"{phase.schedule_steps} is not above warmup_steps {phase.warmup_steps}, which are part of it",
            (f"{where}.warmup_steps",),
        )
    for part, key in (("warmup", "warmup_steps"), ("decay", "schedule_steps")):
        if part in phase.schedule_fits and not getattr(phase, key):
            yield Problem(
                f"{where}.schedule_fits", f"{part} has no effect without {key}", (f"{where}.{key}",)
            )


def _schedule_of_the_run(config: RunConfig) -> Iterator[Problem]:
    """Refuse phases that would each follow another schedule of the run."""
    running = [(index, phase) for index, phase in enumerate(config.datasets) if phase.epochs > 0]
    if config.optimizer.scheduler_class is not None or not any(p.schedule_scope == "run" for _, p in running):
        return
    first, model = running[0]
    for index, phase in running[1:]:
        for key in _SCHEDULE:
            if getattr(phase, key) != getattr(model, key):
                yield Problem(
                    f"datasets.{index}.{key}",
                    f"differs from datasets.{first}.{key}; with schedule_scope: run all phases follow one schedule",
                    (f"datasets.{first}.{key}", f"datasets.{index}.schedule_scope"),
                )
