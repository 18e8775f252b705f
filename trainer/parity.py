"""Whether FP8 is worth it for a run: the same steps in bf16 and in FP8, from one state, on the same cells."""

import copy
import dataclasses
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.loader import MicroBatch
from trainer import distributed
from trainer.config.schema import RunConfig
from trainer.console import table
from trainer.errors import ConfigError
from trainer.freezing import split_groups
from trainer.losses import LossModule, build_loss, move_to_device
from trainer.model_building import build_model
from trainer.objective import set_objective_options
from trainer.optim import build_optimizer, mark_trainable
from trainer.phases import DataFacts, Phase, open_phases
from trainer.random_state import seed_dropout, seed_everything
from trainer.strategy import Strategy
from trainer.weights import initialise_weights

WORTH_IT = 1.05
"""FP8 has to be faster by this factor: below, its rounding buys nothing."""

CLOSE = 0.02
"""Relative difference of the loss over the steps that needs no second look."""

MOST_LAYERS = 12


@dataclass
class Side:
    """One precision's steps."""

    losses: list[float]
    seconds: list[float]
    """Of each step, from the first forward pass to the end of the update."""


@dataclass
class Parity:
    """What came out."""

    bf16: Side
    fp8: Side
    gradient_errors: dict[str, float]
    """Relative error of the gradient by parameter: |fp8 - bf16| / |bf16| in the first step, at the same weights."""
    is_real: bool
    """Whether FP8 was computed by hardware."""

    @property
    def loss_difference(self) -> float:
        """Return the mean relative difference of the losses."""
        pairs = zip(self.bf16.losses, self.fp8.losses, strict=True)
        return statistics.fmean(abs(b - a) / max(abs(a), 1e-12) for a, b in pairs)

    @property
    def speed_up(self) -> float:
        """Return bf16's median step time over FP8's, the first step left out: it compiles and allocates."""
        times = [statistics.median(side.seconds[1:] or side.seconds) for side in (self.bf16, self.fp8)]
        return times[0] / times[1]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            **dataclasses.asdict(self),
            "loss_difference": self.loss_difference,
            "speed_up": self.speed_up,
            "advice": self.advice(),
        }

    def advice(self) -> str:
        """Say in one sentence what to do."""
        if self.loss_difference > CLOSE:
            return (
                f"not worth it: the losses differ by {self.loss_difference:.1%}; leave the layers with the largest "
                "gradient errors out (fp8.exclude_layers), or stay in bf16"
            )
        if not self.is_real:
            return (
                f"the losses agree ({self.loss_difference:.2%} apart); emulation says nothing about speed: run this on "
                "a GPU with fp8.backend: te"
            )
        if self.speed_up < WORTH_IT:
            return (
                f"not worth it at this size: FP8 steps take {1 / self.speed_up:.2f} of bf16's time; stay in bf16, or "
                "try a wider model or a larger micro-batch"
            )
        return (
            f"worth it: the losses agree ({self.loss_difference:.2%} apart), and steps are {self.speed_up:.2f} times "
            "as fast"
        )


def compare(config: RunConfig, num_steps: int) -> Parity:
    """Take `num_steps` optimizer steps of the run's first phases in bf16 and in FP8.

    Raises:
        ConfigError: the run does not ask for FP8, FP8 cannot be had, or several processes were launched.
    """
    if config.precision != "fp8" or config.fp8 is None:
        raise ConfigError("the parity of FP8 needs precision: fp8 (and fp8.recipe, fp8.backend) in the run")
    accelerator, ranks = distributed.start(config)
    try:
        if ranks.count > 1 or accelerator.distributed_type == "DEEPSPEED":
            raise ConfigError(
                "the parity of FP8 is measured on one process; start this command without a launcher"
            )
        phases, facts = open_phases(config, ranks, pin_memory=accelerator.device.type == "cuda")
        plain = config.model_copy(update={"precision": "bf16", "fp8": None})
        sides = []
        for which in (plain, config):
            strategy, module = _prepare(accelerator, which, phases, facts)
            if sides:
                module.model.load_state_dict(sides[0][2])
            sides.append((strategy, module, copy.deepcopy(module.model.state_dict())))
        results, gradients = [], []
        for strategy, module, _ in sides:
            side, first = _train(config, strategy, module, phases, num_steps)
            results.append(side)
            gradients.append(first)
        errors = {name: _relative(gradients[1][name], value) for name, value in gradients[0].items()}
        return Parity(*results, gradient_errors=errors, is_real=config.fp8.backend != "emulate")
    finally:
        distributed.shut_down()


def report(parity: Parity) -> str:
    """Return the comparison as text: losses, layers with the largest gradient errors, times, advice."""
    pairs = list(zip(parity.bf16.losses, parity.fp8.losses, strict=True))
    shown = sorted({0, *range(0, len(pairs), max(1, len(pairs) // 8)), len(pairs) - 1})
    rows = [[index + 1, f"{pairs[index][0]:.5f}", f"{pairs[index][1]:.5f}"] for index in shown]
    worst = sorted(parity.gradient_errors.items(), key=lambda item: -item[1])[:MOST_LAYERS]
    median = statistics.median(parity.gradient_errors.values())
    return "\n".join(
        [
            table(["step", "loss bf16", "loss fp8"], rows),
            "",
            table(["gradient of", "relative error"], [[name, f"{error:.4f}"] for name, error in worst]),
            f"median over {len(parity.gradient_errors)} parameters: {median:.4f}",
            "",
            f"step time, fp8 over bf16: {1 / parity.speed_up:.2f}"
            + ("" if parity.is_real else " (emulated)"),
            parity.advice(),
        ]
    )


def _prepare(
    accelerator: Any, config: RunConfig, phases: list[Phase], facts: DataFacts
) -> tuple[Strategy, LossModule]:
    seed_everything(config.seed)
    model = build_model(config, facts)
    module = LossModule(model, build_loss(config.loss))
    mark_trainable(config, module)
    initialise_weights(config, model, phases, facts)
    optimizer = build_optimizer(config, model, module, accelerator.device.type)
    split_groups(optimizer, module, config.datasets)
    return distributed.prepare(accelerator, module, optimizer, config.max_grad_norm), module


def _train(
    config: RunConfig, strategy: Strategy, module: LossModule, phases: list[Phase], num_steps: int
) -> tuple[Side, dict[str, Tensor]]:
    side, first = Side([], []), {}
    seed_dropout(config.seed, 0, 0)
    for phase, phase_step, micro_batches in _steps(phases, num_steps):
        if phase_step == 0:
            if phase.config.reinitialise:
                where = f"datasets.{phase.index}.reinitialise"
                strategy.start_anew(phase.config.reinitialise, config.seed + 1 + phase.index, where)
            strategy.hold_still(phase.config.freeze)
            set_objective_options(module, config.datasets, phase.index)
        phase.set_rates(strategy.optimizer.param_groups, phase_step)
        weight = sum(module.weight(micro.batch) for micro in micro_batches)
        _wait(strategy)
        started = time.perf_counter()
        total = 0.0
        for number, micro in enumerate(micro_batches):
            with strategy.accumulation(is_last=number == len(micro_batches) - 1):
                batch = move_to_device(micro.batch, strategy.device)
                output = strategy.module(batch, phase_step, phase.total_steps)
                strategy.backward(output.sum / weight)
            total = total + output.sum.detach()
        if not side.losses:
            named = module.named_parameters()
            first = {name: p.grad.detach().float().cpu().clone() for name, p in named if p.grad is not None}
        strategy.step()
        _wait(strategy)
        side.seconds.append(time.perf_counter() - started)
        side.losses.append(float(total) / weight)
    return side, first


def _steps(phases: list[Phase], num_steps: int) -> Iterator[tuple[Phase, int, list[MicroBatch]]]:
    """Yield the micro-batches of the run's first steps, each with its phase and its number there, from 0."""
    left = num_steps
    for phase in phases:
        phase_step = 0
        for epoch in range(phase.config.epochs):
            stop = int(min(phase.steps_left(0, phase_step), left))
            for micro_batches in phase.first_steps(epoch, stop):
                yield phase, phase_step, micro_batches
                phase_step, left = phase_step + 1, left - 1


def _wait(strategy: Strategy) -> None:
    if strategy.device.type == "cuda":
        torch.cuda.synchronize(strategy.device)


def _relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm().clamp(min=1e-30))
