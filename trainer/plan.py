"""Say what a run will take before it takes it: `python -m trainer plan --config FILE [key=value ...]`.

Opens the run's data as the run does and builds its model on torch's meta device, without memory. Needs no GPU.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer import costs, parity
from trainer.averaging import keep_average
from trainer.config.load import load_run_config
from trainer.config.schema import RunConfig
from trainer.console import table
from trainer.costs import Gpu, ModelSizes, StateBytes
from trainer.distributed import Ranks
from trainer.dotted import check_dotted_paths, look_in_current_folder
from trainer.errors import ConfigError
from trainer.exits import run_command
from trainer.losses import LossModule, build_loss
from trainer.model_building import build_model
from trainer.optim import build_optimizer, mark_trainable
from trainer.phases import DataFacts, Phase, open_phases
from trainer.random_state import seed_everything

DEFAULT_GPU = "H100"
DEFAULT_MFU = 0.35
DEFAULT_SAMPLE_CELLS = 512
_MOST_OF_A_LOADER = 1_000_000
"""Cells a second that no loader gives: the GPU waits for the data and the host."""


@dataclass(frozen=True)
class Sample:
    """What the first cells of a phase's order say of all of them."""

    num_cells: int
    tokens_per_cell: float
    longest: int
    laid_out_tokens_per_cell: float
    """With padding, which is computed too."""
    masked_per_cell: float
    flops_per_cell: float
    """Useful operations of a forward and a backward pass, padding left out."""
    activation_bytes_per_cell: float | None
    """Of the micro-batch that takes most, its logits left out; None: the model does not tell."""
    logits_bytes_per_cell: float | None


@dataclass(frozen=True)
class PhaseOnRanks:
    """A phase on a number of GPUs."""

    world_size: int
    problem: str | None = None
    """Why the phase does not run on them."""
    micro_batch_size: int | None = None
    accumulation: int | None = None
    global_batch_size: int | None = None
    steps: int | None = None
    cells: int | None = None
    hours: float | None = None
    """Training alone, at the stated MFU; None: the table has no peak."""
    cells_per_second: float | None = None
    """What the loaders of all ranks must deliver for it."""


@dataclass(frozen=True)
class PhasePlan:
    """What a phase takes."""

    name: str
    epochs: int
    cells_per_epoch: int | None
    sample: Sample
    on_ranks: list[PhaseOnRanks]
    unit: str = "cells"
    """What its data counts, which is meant wherever these figures say cells."""


@dataclass(frozen=True)
class StatePlan:
    """What a rank keeps, and how many cells fit beside it."""

    sharding: str
    world_size: int
    bytes: StateBytes
    total_bytes: float
    largest_micro_batch: int | None
    """Of the phase that takes most; None: the model does not tell its activations."""


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    run_name: str
    model: str
    num_parameters: int
    num_trained_parameters: int
    precision: str
    gpu: str
    gpu_memory_gb: int
    peak_tflops: float | None
    mfu: float
    phases: list[PhasePlan]
    states: list[StatePlan]
    checkpoint_bytes: dict[str, float]
    fp8_misfits: list[str]
    notes: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for the user's mistake, 130 when interrupted, 1 for anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer plan",
        allow_abbrev=False,
        description="Say what a run will take: parameters, memory, operations, steps, hours. Trains nothing.",
        epilog="Exit codes: 0 done, 2 a mistake in the command or its files, 130 interrupted, 1 anything else.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set one value, as for training")
    known = ", ".join(gpu.name for gpu in costs.GPUS)
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"one of {known}; default: this machine's, else {DEFAULT_GPU}"
    )
    parser.add_argument(
        "--world-sizes", nargs="+", default=["1", "2", "4", "8"], metavar="N", help="numbers of GPUs"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=DEFAULT_MFU,
        help=f"share of the GPU's peak that is assumed to be had; default {DEFAULT_MFU}",
    )
    parser.add_argument(
        "--sample-cells",
        type=int,
        default=DEFAULT_SAMPLE_CELLS,
        metavar="N",
        help=f"cells of each phase that are read for their lengths; default {DEFAULT_SAMPLE_CELLS}",
    )
    parser.add_argument(
        "--fp8-parity",
        type=int,
        metavar="STEPS",
        help="instead of the plan: take so many steps in bf16 and in FP8, from one state, and compare them",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, bytes and operations unrounded")
    try:
        arguments = parser.parse_intermixed_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    look_in_current_folder()
    return run_command(lambda: _plan_and_say(arguments))


def _plan_and_say(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.mfu <= 1:
        raise ConfigError(f"--mfu: {arguments.mfu} is not a share of the peak; give a number in (0, 1]")
    # An override may follow the numbers.
    numbers = [text for text in arguments.world_sizes if "=" not in text]
    overrides = [*arguments.overrides, *(text for text in arguments.world_sizes if "=" in text)]
    for text in numbers:
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"--world-sizes: {text} is not a number of GPUs; give integers from 1 on")
    if arguments.sample_cells < 1:
        raise ConfigError(f"--sample-cells: {arguments.sample_cells} is given; the least is 1")
    gpu = choose_gpu(arguments.gpu)
    config = load_run_config(arguments.config, overrides)
    check_dotted_paths(config)
    if arguments.fp8_parity is not None:
        if arguments.fp8_parity < 1:
            raise ConfigError(f"--fp8-parity: {arguments.fp8_parity} is given; the least is 1 step")
        compared = parity.compare(config, arguments.fp8_parity)
        print(json.dumps(compared.to_dict(), indent=1) if arguments.json else parity.report(compared))
        return 0
    plan = make_plan(
        config,
        gpu,
        world_sizes=sorted(set(map(int, numbers))),
        mfu=arguments.mfu,
        sample_cells=arguments.sample_cells,
    )
    print(json.dumps(dataclasses.asdict(plan), indent=1) if arguments.json else render(plan))
    return 0


def choose_gpu(name: str | None) -> Gpu:
    """Return the GPU that was named, else this machine's, else the default."""
    if name is None and torch.cuda.is_available():
        found = costs.gpu_of_device(torch.cuda.get_device_name())
        if found is not None:
            return found
    return costs.find_gpu(name or DEFAULT_GPU)


def make_plan(
    config: RunConfig, gpu: Gpu, *, world_sizes: Sequence[int], mfu: float, sample_cells: int
) -> Plan:
    """Work out what a run takes.

    Args:
        config: the run.
        gpu: what it is to run on.
        world_sizes: numbers of GPUs.
        mfu: share of the GPU's peak that is assumed to be had.
        sample_cells: cells of each phase that are read for their lengths.
    """
    seed_everything(config.seed)
    phases, facts = open_phases(config, Ranks(0, 1), pin_memory=False)
    try:
        module, notes = build_without_memory(config, facts)
        sizes, more = measure(config, module)
        precision = config.precision or "bf16"
        is_mixed = precision != "fp32"
        running = [phase for phase in phases if phase.config.epochs > 0]
        samples = [sample_phase(phase, module, sizes, sample_cells, is_mixed) for phase in running]
    finally:
        for phase in phases:
            phase.close()
    peak = gpu.peak(precision)
    notes += more + _notes(config, gpu, module.model, samples, precision, peak)
    named = getattr(module.model, "matrix_sizes", None)
    matrix_sizes: Any = named() if callable(named) else costs.linear_sizes(module.model)
    return Plan(
        run_name=config.run_name,
        model=config.model.model_class,
        num_parameters=sizes.num_parameters,
        num_trained_parameters=sizes.num_trained,
        precision=precision,
        gpu=gpu.name,
        gpu_memory_gb=gpu.memory_gb,
        peak_tflops=None if peak is None else peak / 1e12,
        mfu=mfu,
        phases=[
            PhasePlan(
                phase.name,
                phase.config.epochs,
                phase.loader.num_cells,
                sample,
                [phase_on_ranks(config, phase, sample, number, peak, mfu) for number in world_sizes],
                phase.unit,
            )
            for phase, sample in zip(running, samples, strict=True)
        ],
        states=plan_states(sizes, samples, gpu, world_sizes, is_mixed),
        checkpoint_bytes={
            sharding: costs.checkpoint_bytes(sizes, sharding, is_mixed=is_mixed)
            for sharding in costs.SHARDINGS
        },
        fp8_misfits=costs.misfits(matrix_sizes),
        notes=notes,
    )


def build_without_memory(config: RunConfig, facts: DataFacts) -> tuple[LossModule, list[str]]:
    """Build the run's model and loss on the meta device, and return what is to be said about it.

    A model that looks at its own values while it is built cannot be built there: it is built in memory.
    """
    try:
        with torch.device("meta"):
            return LossModule(build_model(config, facts), build_loss(config.loss)), []
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        module = LossModule(build_model(config, facts), build_loss(config.loss))
        return module, [f"the model was built in memory, because it cannot be built without ({reason})"]


def measure(config: RunConfig, module: LossModule) -> tuple[ModelSizes, list[str]]:
    """Measure weights and optimizer state, which one optimizer step without memory makes."""
    mark_trainable(config, module)
    module.to("meta")
    optimizer = build_optimizer(config, module.model, module)
    keep_average(optimizer, config.ema)
    for group in optimizer.param_groups:
        for key in ("fused", "foreach", "capturable"):
            if key in group:
                group[key] = False
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # an optimizer of the user's may look at values, which are not there
        optimizer.state.clear()
        kind, reason = type(optimizer).__name__, str(error).splitlines()[0]
        note = f"the state of {kind} is left out of all sums: it takes no step without memory ({reason})"
        return costs.measure_model(module, optimizer), [note]
    return costs.measure_model(module, optimizer), []


def sample_phase(
    phase: Phase, module: LossModule, sizes: ModelSizes, sample_cells: int, is_mixed: bool
) -> Sample:
    """Read the first cells of a phase's order, and work out what they cost."""
    lengths: list[int] = []
    laid_out = masked = 0
    flops = 0.0
    activations: list[tuple[float, float]] = []
    tell = getattr(module.model, "activation_bytes", None)
    tell_by_batch = getattr(module.model, "batch_activation_bytes", None)
    steps = phase.first_steps(0, phase.steps_per_epoch or phase.total_steps or 0)
    for micro in itertools.chain.from_iterable(steps):
        batch = micro.batch
        of_batch = costs.cell_lengths(batch)
        num_tokens = batch["tokens"].numel()
        num_masked = batch["masked_index"].numel() if "masked_index" in batch else 0
        counted = costs.batch_flops(module.model, batch)
        flops += costs.estimated_flops(sizes.num_parameters, of_batch) if counted is None else counted
        kept: Any = None
        if callable(tell_by_batch):
            kept = tell_by_batch(batch, is_mixed=is_mixed)
        elif callable(tell):
            kept = tell(
                num_tokens=num_tokens, num_cells=len(of_batch), num_masked=num_masked, is_mixed=is_mixed
            )
        if kept is not None:
            activations.append(((kept.body + kept.heads) / len(of_batch), kept.logits / len(of_batch)))
        lengths += of_batch
        laid_out, masked = laid_out + num_tokens, masked + num_masked
        if len(lengths) >= sample_cells:
            break
    if not lengths:
        raise ConfigError(f"datasets.{phase.index}: phase '{phase.name}' has no training {phase.unit}")
    most = max(activations, key=sum) if activations else (None, None)
    return Sample(
        num_cells=len(lengths),
        tokens_per_cell=sum(lengths) / len(lengths),
        longest=max(lengths),
        laid_out_tokens_per_cell=laid_out / len(lengths),
        masked_per_cell=masked / len(lengths),
        flops_per_cell=flops / len(lengths),
        activation_bytes_per_cell=most[0],
        logits_bytes_per_cell=most[1],
    )


def phase_on_ranks(
    config: RunConfig, phase: Phase, sample: Sample, world_size: int, peak: float | None, mfu: float
) -> PhaseOnRanks:
    """Work out a phase's steps and hours on a number of GPUs."""
    try:
        plan = config.batch_plan(phase.index, world_size, phase.plan.micro_batch_size)
    except ConfigError as error:
        return PhaseOnRanks(world_size, problem=str(error))
    steps, cells = steps_and_cells(phase, plan.global_batch_size)
    hours = rate = None
    if peak is not None:
        rate = 1.0 / costs.seconds_of(sample.flops_per_cell, world_size, peak, mfu)
        hours = cells / rate / 3600
    return PhaseOnRanks(
        world_size,
        None,
        plan.micro_batch_size,
        plan.accumulation,
        plan.global_batch_size,
        steps,
        cells,
        hours,
        rate,
    )


def steps_and_cells(phase: Phase, global_batch_size: int) -> tuple[int, int]:
    """Return the optimizer steps of a phase and the cells that they see, for a global batch of its own."""
    config, num_cells = phase.config, phase.loader.num_cells
    steps: int | None = None
    if num_cells is not None:
        drops = getattr(phase.loader, "drop_last", False)
        steps = num_cells // global_batch_size if drops else -(-num_cells // global_batch_size)
    limits = [limit for limit in (steps, config.max_steps_per_epoch) if limit is not None]
    per_epoch = min(limits) if limits else None
    total = None if per_epoch is None else per_epoch * config.epochs
    if config.max_steps is not None:
        total = config.max_steps if total is None else min(total, config.max_steps)
    assert total is not None, "open_phases refuses a phase that nothing ends"
    if num_cells is None or per_epoch is None:
        return total, total * global_batch_size
    of_epoch = min(num_cells, per_epoch * global_batch_size)
    whole, rest = divmod(total, per_epoch) if per_epoch else (0, 0)
    return total, whole * of_epoch + min(of_epoch, rest * global_batch_size)


def plan_states(
    sizes: ModelSizes, samples: Sequence[Sample], gpu: Gpu, world_sizes: Sequence[int], is_mixed: bool
) -> list[StatePlan]:
    """Work out what a rank keeps under each strategy, and how many cells fit beside it."""
    per_cell = [
        sample.activation_bytes_per_cell + (sample.logits_bytes_per_cell or 0)
        for sample in samples
        if sample.activation_bytes_per_cell is not None
    ]
    states = []
    for sharding in costs.SHARDINGS:
        for number in world_sizes:
            kept = costs.state_bytes(sizes, sharding, number, is_mixed=is_mixed)
            largest = costs.largest_micro_batch(gpu, kept, max(per_cell)) if per_cell else None
            states.append(StatePlan(sharding, number, kept, kept.total, largest))
    return states


def _notes(
    config: RunConfig,
    gpu: Gpu,
    model: Any,
    samples: Sequence[Sample],
    precision: str,
    peak: float | None,
) -> list[str]:
    notes = []
    if config.precision is None:
        notes.append("precision: bf16, the default on a GPU")
    if config.device == "cpu":
        notes.append("the run says device: cpu; these figures are for the GPU named above")
    if precision == "fp8":
        notes.append("activations are counted as in bf16, an upper bound; attention and heads run in bf16")
        if config.fp8 is not None and config.fp8.backend == "emulate":
            notes.append("fp8.backend: emulate computes in fp32; times are for FP8 on the GPU itself")
    if peak is None:
        notes.append(f"the table has no peak of {gpu.name} in {precision}, so times are left out")
    if not any(callable(getattr(model, name, None)) for name in ("training_flops", "batch_flops")):
        notes.append(
            "operations are an estimate, 6 x parameters x tokens: the model has no method training_flops"
        )
    if any(sample.activation_bytes_per_cell is None for sample in samples):
        notes.append(
            "activations and the largest micro-batch are left out: the model has no method activation_bytes"
        )
    return notes


def render(plan: Plan) -> str:
    """Return a plan as text."""
    trained = (
        ""
        if plan.num_trained_parameters == plan.num_parameters
        else f", of which {plan.num_trained_parameters:,} train"
    )
    peak = "no figure" if plan.peak_tflops is None else f"{plan.peak_tflops:,.0f} TFLOP/s"
    lines = [
        f"run           {plan.run_name}",
        f"model         {plan.model}",
        f"parameters    {plan.num_parameters:,}{trained}",
        f"gpu           {plan.gpu}, {plan.gpu_memory_gb} GB, peak in {plan.precision} {peak} (datasheet)",
        f"assumed       MFU {plan.mfu:g}, {costs.RESERVED_BYTES / 1e9:g} GB of the GPU left free",
        *(f"note          {note}" for note in plan.notes),
        "",
        f"Each {'cell' if _unit(plan) == 'cells' else 'sample'} (the first of each phase's order)",
        _cells_table(plan),
        "",
        "Each phase",
        _phases_table(plan),
        *(
            f"  {phase.name} on {on.world_size}: {on.problem}"
            for phase in plan.phases
            for on in phase.on_ranks
            if on.problem is not None
        ),
        *_times_too_short(plan),
        "",
        f"Each rank, bytes kept from step to step, and micro-batch that fits a {plan.gpu}",
        _states_table(plan),
        "",
        "Each checkpoint, over all ranks' files",
        table(["strategy", "size"], [[name, _size(size)] for name, size in plan.checkpoint_bytes.items()]),
        "",
        "FP8 dimensions that do not fit",
        *([f"  {misfit}" for misfit in plan.fp8_misfits] or ["  none"]),
    ]
    return "\n".join(lines)


def _times_too_short(plan: Plan) -> list[str]:
    """Say where the GPU's operations are not what the time will go to."""
    rates = [on.cells_per_second for phase in plan.phases for on in phase.on_ranks]
    if not any(rate is not None and rate >= _MOST_OF_A_LOADER for rate in rates):
        return []
    return [
        f"  No loader gives {_MOST_OF_A_LOADER:,} {_unit(plan)}/s: the GPU will wait for the data and the host, and "
        "the run take longer"
    ]


def _unit(plan: Plan) -> str:
    """Name what all phases count, in one word: samples where they count different things."""
    units = {phase.unit for phase in plan.phases} or {"cells"}
    return units.pop() if len(units) == 1 else "samples"


def _cells_table(plan: Plan) -> str:
    headers = [
        "phase",
        "sampled",
        "tokens",
        "longest",
        "with padding",
        "masked",
        "GFLOP",
        "activations",
        "logits",
    ]
    return table(
        headers,
        [
            [
                phase.name,
                phase.sample.num_cells,
                f"{phase.sample.tokens_per_cell:,.1f}",
                phase.sample.longest,
                f"{phase.sample.laid_out_tokens_per_cell:,.1f}",
                f"{phase.sample.masked_per_cell:,.1f}",
                f"{phase.sample.flops_per_cell / 1e9:,.3f}",
                _size(phase.sample.activation_bytes_per_cell),
                _size(phase.sample.logits_bytes_per_cell),
            ]
            for phase in plan.phases
        ],
    )


def _phases_table(plan: Plan) -> str:
    unit = _unit(plan)
    headers = ["phase", "GPUs", "batch", "steps", unit, "time", f"loader {unit}/s"]
    rows = []
    for phase in plan.phases:
        for on in phase.on_ranks:
            if on.problem is not None:
                rows.append([phase.name, on.world_size, "does not run", None, None, None, None])
                continue
            rows.append(
                [
                    phase.name,
                    on.world_size,
                    f"{on.micro_batch_size} x {on.accumulation} x {on.world_size} = {on.global_batch_size}",
                    f"{on.steps:,}",
                    f"{on.cells:,}" if phase.unit == unit else f"{on.cells:,} {phase.unit}",
                    _time(on.hours),
                    _rate(on.cells_per_second),
                ]
            )
    return table(headers, rows)


def _states_table(plan: Plan) -> str:
    headers = [
        "strategy",
        "GPUs",
        "weights",
        "fp32 copy",
        "gradients",
        "optimizer",
        "working",
        "total",
        "micro-batch",
    ]
    rows = []
    for state in plan.states:
        kept = state.bytes
        parts = (kept.weights, kept.master_weights, kept.gradients, kept.optimizer, kept.working)
        rows.append(
            [
                state.sharding,
                state.world_size,
                *map(_size, parts),
                _size(state.total_bytes),
                None if state.largest_micro_batch is None else f"{state.largest_micro_batch:,}",
            ]
        )
    return table(headers, rows)


def _size(num_bytes: float | None) -> str | None:
    """Return bytes in the unit that leaves one to three digits before the point, in powers of 1000."""
    if num_bytes is None:
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def _time(hours: float | None) -> str | None:
    """Return hours in the unit that leaves a number people read, of no more digits than an assumed MFU is worth."""
    if hours is None:
        return None
    seconds = hours * 3600
    if seconds < 1:
        return "under a second"
    for unit, length, most in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172800)):
        if seconds < most:
            return f"{seconds / length:.3g} {unit}"
    return f"{hours / 24:,.1f} days"


def _rate(per_second: float | None) -> str | None:
    """Return what the loaders must deliver, without digits where none could."""
    if per_second is None:
        return None
    return f"{per_second:,.0f}" if per_second < _MOST_OF_A_LOADER else f"over {_MOST_OF_A_LOADER:,}"


if __name__ == "__main__":
    raise SystemExit(main())
