"""Processes: the one place that creates the Accelerator, and where the differences between strategies end.

The rest of the trainer sees `Ranks` (who am I, sums over all ranks) and a `Strategy` (strategy.py, zero.py).
"""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from numpy.typing import NDArray

from trainer import zero_building, zero_config
from trainer.config.schema import BatchPlan, RunConfig
from trainer.errors import ConfigError, UserError
from trainer.losses import LossModule
from trainer.strategy import Strategy
from trainer.zero import ZeroStrategy

_BYTES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Ranks:
    """Say which rank this process is, and agree on numbers with the others through host memory."""

    index: int
    count: int
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Tell whether this is rank 0."""
        return self.index == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over all ranks, the same on each; every rank must call it."""
        return self._reduce(values, torch.distributed.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Return the maxima over all ranks, the same on each; every rank must call it."""
        return self._reduce(values, torch.distributed.ReduceOp.MAX)

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value (anything that JSON holds) on every rank."""
        if self.count == 1:
            return value
        data = json.dumps(value).encode() if self.is_main else b""
        size = int(self.max([len(data)])[0])
        buffer = torch.zeros(size, dtype=torch.uint8)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        torch.distributed.broadcast(buffer, src=0, group=self.group)
        return json.loads(bytes(buffer.tolist()))

    def unite(self, bits: NDArray[np.uint8]) -> None:
        """Set on rank 0 every bit that is set on any rank, all arrays of one length; the others' are then undefined.

        The ranks' numbers travel through host memory, where gloo has the operation that NCCL lacks.
        """
        if self.count == 1:
            return
        for start in range(0, len(bits), _BYTES_AT_ONCE):
            part = torch.from_numpy(bits[start : start + _BYTES_AT_ONCE])
            torch.distributed.reduce(part, dst=0, op=torch.distributed.ReduceOp.BOR, group=self.group)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.sum([0.0])

    def agree_on_error(self, error: Exception | None) -> None:
        """Raise on every rank when any rank failed, so that none waits for another for ever."""
        messages = self.gather_text("" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [(rank, message) for rank, message in enumerate(messages) if message]
        if failed:
            raise UserError(f"rank {failed[0][0]} failed: {failed[0][1]}")

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's text, in the order of ranks."""
        if self.count == 1:
            return [text]
        # Names of files may hold bytes that are no text: an error on one rank here would leave the others waiting.
        content = text.encode(errors="backslashreplace") or b"\0"
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        size = int(self.max([len(data)])[0])
        padded = torch.zeros(size, dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.zeros_like(padded) for _ in range(self.count)]
        torch.distributed.all_gather(parts, padded, group=self.group)
        return [bytes(part.tolist()).rstrip(b"\0").decode() for part in parts]

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Return every rank's CPU tensor, all of one shape, on rank 0, and None on the others."""
        if self.count == 1:
            return [tensor]
        parts = [torch.zeros_like(tensor) for _ in range(self.count)] if self.is_main else None
        torch.distributed.gather(tensor, parts, dst=0, group=self.group)
        return parts

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.count == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(list(values), dtype=torch.float64)
        torch.distributed.all_reduce(tensor, op=operation, group=self.group)
        return tensor.tolist()


def start(config: RunConfig) -> tuple[Accelerator, Ranks]:
    """Create the Accelerator, before any model exists, and say which rank this process is.

    Raises:
        ConfigError: a device or precision was asked for that this machine cannot give.
    """
    has_gpu = torch.cuda.is_available()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError(
            "device: cuda was asked for, but torch sees no CUDA device; use device: auto or cpu"
        )
    on_cpu = config.device == "cpu" or not has_gpu
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    # Without a search for unused parameters DDP rebuilds its buckets after the first backward pass, and a resumed
    # process would sum gradients in another order than one that ran through.
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    if "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        timeout = timedelta(seconds=config.distributed_timeout_seconds)
        handlers.append(InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timeout))
    precision = autocast_precision(config, on_cpu)
    uses_deepspeed = zero_config.is_asked_for()
    if uses_deepspeed:
        zero_config.prepare_environment(on_cpu, precision)
    accelerator = Accelerator(
        # Accelerate would leave DeepSpeed aside, which takes the CPU by itself.
        cpu=on_cpu and not uses_deepspeed,
        mixed_precision=precision,
        # The loop owns the accumulation boundary; Accelerate must not divide or count.
        gradient_accumulation_steps=1,
        kwargs_handlers=handlers,
    )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
        DistributedType.DEEPSPEED,
    ):
        raise ConfigError(
            f"the launcher asks for {accelerator.distributed_type}, which is not supported; launch one process, "
            "several with plain data parallelism (MULTI_GPU), or DeepSpeed ZeRO (DEEPSPEED): see accelerate_configs/"
        )
    group = None
    if accelerator.num_processes > 1 and not on_cpu:
        # Numbers that the host needs travel through host memory: asking the GPU for them would stop its queue.
        timeout = timedelta(seconds=config.distributed_timeout_seconds)
        group = torch.distributed.new_group(backend="gloo", timeout=timeout)
    return accelerator, Ranks(accelerator.process_index, accelerator.num_processes, group)


def building_model(
    accelerator: Accelerator, config: RunConfig, plans: Sequence[BatchPlan]
) -> contextlib.AbstractContextManager[None]:
    """Return what a model is built within: under ZeRO-3 no rank ever holds all of it."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = zero_config.settings_of(accelerator)
        given = zero_config.read_given(os.environ[zero_config.CONFIG_VARIABLE])
        zero_config.complete_config(settings, given, config, plans, accelerator.mixed_precision)
    return zero_building.building(accelerator)


def prepare(
    accelerator: Accelerator,
    module: LossModule,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
) -> Strategy:
    """Prepare a model and its optimizer for the launch's way of training."""
    is_zero = accelerator.distributed_type == DistributedType.DEEPSPEED
    kind = ZeroStrategy if is_zero else Strategy
    return kind(accelerator, module, optimizer, max_grad_norm)


def autocast_precision(config: RunConfig, on_cpu: bool) -> str:
    """Return what Accelerate calls the run's precision: `no`, `bf16` or `fp16`."""
    precision = config.precision or ("fp32" if on_cpu else "bf16")
    if precision == "fp16" and on_cpu:
        raise ConfigError("precision: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    # Under FP8 everything around the FP8 layers is bf16.
    return {"fp32": "no", "bf16": "bf16", "fp16": "fp16", "fp8": "bf16"}[precision]


_finished_groups: list[Any] = []


def shut_down() -> None:
    """End what `start` began, without waiting for other ranks, and let another run begin in this process."""
    leave_group()
    # Accelerate keeps device and precision of a process for good, and refuses another run's.
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def leave_group() -> None:
    """Leave the process group, where there is one, without waiting for other ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Kept until the process ends: gloo's destructor waits for its thread with the interpreter's lock held, for
        # which that thread may be waiting.
        _finished_groups.extend(torch.distributed.distributed_c10d._world.pg_map)
        torch.distributed.destroy_process_group()
