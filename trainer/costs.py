"""What training costs: bytes that each rank keeps, operations by cell, and what GPUs can do. Formulas, no device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.layers import Linear, NormLinear
from trainer.errors import ConfigError

Sharding = Literal["DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
SHARDINGS: tuple[Sharding, ...] = ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")

FP8_MULTIPLE = 16
"""What FP8 matrix products need their dimensions to be multiples of."""

RESERVED_BYTES = 4e9
"""Left free on each GPU: CUDA's context, the communication library, workspaces and fragmentation."""

BUCKET_ELEMENTS = 5e8
"""DeepSpeed's `reduce_bucket_size`, which the files in ds_configs/ leave as it is."""

LIVE_ELEMENTS = 1e9
"""DeepSpeed's `stage3_max_live_parameters`: as many gathered weights stay under ZeRO-3."""

_FP32, _LOW = 4, 2


@dataclass(frozen=True)
class Gpu:
    """A GPU as its datasheet describes it; nothing here is measured."""

    name: str
    memory_gb: int
    """In units of 10^9 bytes."""
    tflops: Mapping[str, float]
    """Peak of dense matrix products in TFLOP/s, by what multiplies: bf16 (fp16 has the same), fp8."""
    device_names: tuple[str, ...]
    """What CUDA calls it."""

    def peak(self, precision: str) -> float | None:
        """Return the peak in operations a second for a run's precision; None: the table has no figure for it."""
        found = self.tflops.get({"fp16": "bf16"}.get(precision, precision))
        return None if found is None else found * 1e12


GPUS = (
    Gpu("A100-40GB", 40, {"bf16": 312}, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    Gpu("A100-80GB", 80, {"bf16": 312}, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
    Gpu("H100", 80, {"bf16": 989, "fp8": 1979}, ("NVIDIA H100 80GB HBM3",)),
    Gpu("H200", 141, {"bf16": 989, "fp8": 1979}, ("NVIDIA H200",)),
    Gpu("B200", 180, {"bf16": 2250, "fp8": 4500}, ("NVIDIA B200",)),
    Gpu("L40S", 48, {"bf16": 362, "fp8": 733}, ("NVIDIA L40S",)),
    Gpu("L4", 24, {"bf16": 121, "fp8": 242}, ("NVIDIA L4",)),
)
"""H100 and H200 are the SXM ones; those for PCIe are slower and have other device names."""


def find_gpu(name: str) -> Gpu:
    """Return the GPU of this name, whatever its case.

    Raises:
        ConfigError: the table has none.
    """
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    known = ", ".join(f"{gpu.name} ({gpu.memory_gb} GB)" for gpu in GPUS)
    raise ConfigError(f"--gpu: {name} is not in the table; it has {known}")


def gpu_of_device(device_name: str) -> Gpu | None:
    """Return the GPU that CUDA calls by this name, or None where the table has no figures for it."""
    return next((gpu for gpu in GPUS if device_name in gpu.device_names), None)


def peak_of_device(device: torch.device, precision: str) -> float | None:
    """Return the peak of one device in operations a second, None where nothing states it: a CPU has none."""
    if device.type != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.peak(precision)


def model_flops_utilization(flops: float, seconds: float, num_devices: int, peak: float) -> float:
    """Return the share of the devices' peak that a step's useful operations took (MFU)."""
    return flops / (seconds * num_devices * peak)


def seconds_of(flops: float, num_devices: int, peak: float, mfu: float) -> float:
    """Return how long operations take on devices of which a share `mfu` of the peak is had."""
    return flops / (num_devices * peak * mfu)


def cell_lengths(batch: Mapping[str, Any]) -> list[int]:
    """Return the tokens of each cell of a batch, padding left out where the batch tells it."""
    if "cu_seqlens" in batch:
        return batch["cu_seqlens"].diff().tolist()
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask.sum(dim=1).tolist()
    tokens = batch["tokens"]
    return [tokens[:1].numel()] * len(tokens)  # of a set of cells [B, S, N] all its tokens


def batch_flops(model: nn.Module, batch: Mapping[str, Any]) -> float | None:
    """Return the operations of a forward and a backward pass over a batch; None: the model does not tell."""
    tell_by_batch: Any = getattr(model, "batch_flops", None)
    if callable(tell_by_batch):
        of_batch: Any = tell_by_batch(batch)
        return float(of_batch)
    tell = getattr(model, "training_flops", None)
    if not callable(tell):
        return None
    masked = batch.get("masked_index")
    flops: Any = tell(cell_lengths(batch), 0 if masked is None else masked.numel())
    return float(flops)


@dataclass(frozen=True)
class ModelSizes:
    """What decides the bytes of weights and optimizer state."""

    num_trained: int
    num_frozen: int
    weight_bytes: int
    """Of all parameters, in the precision that the model was built in."""
    gradient_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    """Of every tensor of optimizer state, as one process keeps it."""
    optimizer_tensors: float
    """Values of optimizer state for each trained value: 2 for Adam."""

    @property
    def num_parameters(self) -> int:
        """Return the number of weights."""
        return self.num_trained + self.num_frozen


def measure_model(module: nn.Module, optimizer: torch.optim.Optimizer) -> ModelSizes:
    """Measure a model and its optimizer, on any device, after the optimizer's first step."""
    parameters = list(module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    num_trained = sum(parameter.numel() for parameter in trained)
    shaped, total = 0, 0
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, Tensor):
                total += _bytes(value)
                shaped += value.numel() if value.shape == parameter.shape else 0
    return ModelSizes(
        num_trained=num_trained,
        num_frozen=sum(parameter.numel() for parameter in parameters) - num_trained,
        weight_bytes=sum(map(_bytes, parameters)),
        gradient_bytes=sum(map(_bytes, trained)),
        buffer_bytes=sum(map(_bytes, module.buffers())),
        optimizer_bytes=total,
        optimizer_tensors=shaped / num_trained,
    )


@dataclass(frozen=True)
class StateBytes:
    """Bytes that one rank keeps from step to step, and what communication and precision add while a step runs."""

    weights: float
    """With buffers."""
    master_weights: float
    """The fp32 weights beside those that the model computes with."""
    gradients: float
    optimizer: float
    working: float
    """Buckets of gradients, copies of weights in bf16, weights gathered under ZeRO-3."""

    @property
    def total(self) -> float:
        """Return all of them."""
        return self.weights + self.master_weights + self.gradients + self.optimizer + self.working


def state_bytes(sizes: ModelSizes, sharding: Sharding, world_size: int, *, is_mixed: bool) -> StateBytes:
    """Return the bytes of one rank; padding of shards, some kilobytes, is left out.

    Under DDP weights, gradients and moments are as the model was built, in fp32, and autocast keeps copies of weights
    in bf16 for the backward pass: at most one of each. Under ZeRO the model's weights are bf16 with mixed precision,
    with fp32 weights, moments and (not under ZeRO-1) accumulated gradients beside them. Without it ZeRO-1 and ZeRO-2
    keep a second copy of the weights that a rank steps, ZeRO-3 does not.
    """
    trained, everything, ranks = sizes.num_trained, sizes.num_parameters, world_size
    if sharding == "DDP":
        return StateBytes(
            weights=sizes.weight_bytes + sizes.buffer_bytes,
            master_weights=0,
            gradients=sizes.gradient_bytes,
            optimizer=sizes.optimizer_bytes,
            working=(sizes.gradient_bytes if ranks > 1 else 0) + (_LOW * everything if is_mixed else 0),
        )
    low = _LOW if is_mixed else _FP32
    whole = everything / ranks if sharding == "ZeRO-3" else everything
    gathered = low * min(everything, LIVE_ELEMENTS) if sharding == "ZeRO-3" else 0
    return StateBytes(
        weights=low * whole + sizes.buffer_bytes,
        master_weights=0 if sharding == "ZeRO-3" and not is_mixed else _FP32 * trained / ranks,
        gradients=low * trained if sharding == "ZeRO-1" else _FP32 * trained / ranks,
        optimizer=_FP32 * sizes.optimizer_tensors * trained / ranks,
        working=low * BUCKET_ELEMENTS + gathered,
    )


def checkpoint_bytes(sizes: ModelSizes, sharding: Sharding, *, is_mixed: bool) -> float:
    """Return the bytes of the tensors of one checkpoint, over all ranks' files."""
    if sharding == "DDP":
        return sizes.weight_bytes + sizes.buffer_bytes + sizes.optimizer_bytes
    low = _LOW if is_mixed else _FP32
    kept = _FP32 * (1 + sizes.optimizer_tensors) * sizes.num_trained
    return kept + low * sizes.num_frozen + sizes.buffer_bytes


def largest_micro_batch(gpu: Gpu, state: StateBytes, bytes_per_cell: float) -> int:
    """Return how many cells fit beside the state; 0: not one, or the state alone does not fit."""
    free = gpu.memory_gb * 1e9 - RESERVED_BYTES - state.total
    return max(0, int(free // bytes_per_cell))


def misfits(named_sizes: Mapping[str, int]) -> list[str]:
    """Say which sizes FP8 matrix products cannot take, by name."""
    return [
        f"{name} is {size}: the nearest multiples of {FP8_MULTIPLE} are "
        f"{max(FP8_MULTIPLE, size // FP8_MULTIPLE * FP8_MULTIPLE)} and {-(-size // FP8_MULTIPLE) * FP8_MULTIPLE}"
        for name, size in named_sizes.items()
        if size % FP8_MULTIPLE
    ]


def linear_sizes(model: nn.Module) -> dict[str, int]:
    """Return by name the sizes of the matrices that FP8 would multiply, for a model that does not say them itself.

    Those are its layers of `models.layers`; of a model without any, every `nn.Linear`.
    """
    named = list(model.named_modules())
    ours = [(name, layer) for name, layer in named if isinstance(layer, Linear | NormLinear)]
    sizes: dict[str, int] = {}
    for name, layer in ours or [(name, layer) for name, layer in named if isinstance(layer, nn.Linear)]:
        sizes |= {f"{name}.in_features": layer.in_features, f"{name}.out_features": layer.out_features}
    return sizes


def estimated_flops(num_parameters: int, lengths: Sequence[int]) -> float:
    """Return the usual estimate for a model that does not tell: 6 operations a weight and token."""
    return 6.0 * num_parameters * sum(lengths)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
