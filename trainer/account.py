"""Fill the start-up account: what a run will do, said before its first step."""

import functools
import platform
from importlib import metadata

import torch

from trainer.config.schema import PhaseConfig, RunConfig
from trainer.console import PhaseAccount, StartupAccount
from trainer.distributed import autocast_precision
from trainer.phases import DataFacts, Phase
from trainer.run import Run
from trainer.schedule import base_learning_rates, schedule_lengths, schedule_notes
from trainer.strategy import Strategy

PACKAGES = ("torch", "accelerate", "datasets", "numpy")
_version = functools.cache(metadata.version)  # which parses all that a package says of itself


def build_account(
    run: Run,
    facts: DataFacts,
    *,
    run_folder: str,
    resumed_from: str | None,
    notes: list[str],
) -> StartupAccount:
    """Collect what the start-up account says."""
    config, module, phases = run.config, run.module, run.phases
    return StartupAccount(
        run_name=config.run_name,
        run_folder=run_folder,
        device=describe_device(run.strategy, run.ranks.count),
        precision=describe_precision(config, run.strategy.device),
        num_parameters=run.strategy.num_parameters(),
        num_trainable_parameters=run.strategy.num_parameters(trained=True),
        num_threads=torch.get_num_threads(),
        seed=config.seed,
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        phases=[_phase_account(run, phase) for phase in phases],
        trackers=[tracker.name for tracker in config.trackers],
        resumed_from=resumed_from,
        notes=[
            f"loss: {module.route}",
            *_data_notes(facts),
            *(n for phase in phases for n in phase.notices),
            *(n for phase in phases for n in _schedule_notes(run, phase)),
            *_average_note(config),
            *config.notes,
            *notes,
        ],
    )


def describe_device(strategy: Strategy, world_size: int) -> str:
    """Name the devices of all ranks, and how they share the work."""
    device = strategy.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    many = f"{world_size} x {name}" if world_size > 1 else name
    return f"{many} ({strategy.name})" if world_size > 1 or strategy.is_sharded else name


def describe_precision(config: RunConfig, device: torch.device) -> str:
    """Say the precision, and who chose it."""
    if config.precision is None:
        chosen = {"no": "fp32", "bf16": "bf16"}[autocast_precision(config, device.type == "cpu")]
        return f"{chosen} (the default on this device)"
    if config.precision == "fp8":
        return f"fp8 ({config.fp8.recipe}, {config.fp8.backend})" if config.fp8 is not None else "fp8"
    return config.precision


def describe_schedule(phase: PhaseConfig, scheduled_steps: int | None, has_scheduler: bool) -> str:
    """Say a phase's schedule in words."""
    if has_scheduler:
        return "scheduler_class"
    warmup, _ = schedule_lengths(phase, scheduled_steps)
    return f"{phase.schedule}{f', {warmup} warmup steps' if warmup else ''}"


def _data_notes(facts: DataFacts) -> list[str]:
    """Return what is to be said of the data: circuits have gates and prompts in place of technical batches."""
    if facts.circuits is not None:
        notes = [facts.circuits.describe(facts.sizes["num_qubits"])]
    else:
        notes = [_technical_batches_note(facts)]
    if facts.gene_space is not None:
        notes.append(f"gene space of {len(facts.gene_space):,} genes, {facts.gene_space.sha256[:12]}")
    return notes


def _technical_batches_note(facts: DataFacts) -> str:
    count = len(facts.technical_batches)
    padded = "" if facts.n_technical_batches == count else f" (padded to {facts.n_technical_batches})"
    more = f" and {count - 6} more" if count > 6 else ""
    return f"{count} technical batches{padded}: {', '.join(list(facts.technical_batches)[:6])}{more}"


def _average_note(config: RunConfig) -> list[str]:
    if config.ema is None:
        return []
    return [f"ema: evaluations use the moving average of the weights, decay {config.ema.decay:g}"]


def _schedule_notes(run: Run, phase: Phase) -> list[str]:
    """Return what is to be said of a schedule: once for one that is over all phases."""
    if run.scheduler is not None or (phase.config.schedule_scope == "run" and phase.index):
        return []
    return schedule_notes(phase.config, phase.scheduled_steps)


def _phase_account(run: Run, phase: Phase) -> PhaseAccount:
    groups = run.strategy.optimizer.param_groups
    rates = base_learning_rates(phase.config, groups)
    named: dict[str, float] = {"": rates[0]}
    if len(set(rates)) > 1:
        named = {
            str(group.get("name", index)): rate
            for index, (group, rate) in enumerate(zip(groups, rates, strict=True))
        }
    return PhaseAccount(
        name=phase.name,
        num_cells=phase.loader.num_cells,
        num_validation_cells=None if phase.validation is None else phase.validation.num_cells,
        num_epochs=phase.config.epochs,
        num_steps=phase.total_steps or 0,
        learning_rates=named,
        schedule=describe_schedule(phase.config, phase.scheduled_steps, run.scheduler is not None),
        micro_batch_size=phase.plan.micro_batch_size,
        accumulation=phase.plan.accumulation,
        world_size=run.ranks.count,
        unit=phase.unit,
    )
