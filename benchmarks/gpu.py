"""Check FP8 layers on this GPU and time training in bf16 and FP8; GPU.md keeps what came out.

    python benchmarks/gpu.py                          # all of it, on a GPU
    python benchmarks/gpu.py --dims 768 --steps 20
    python benchmarks/gpu.py --rehearse               # tiny sizes, emulated FP8, on any machine: does the script run?

First every Transformer Engine layer against torch's, forward and backward, in every recipe. Then 50 steps of our
encoder (12 layers, rows of 2,048 tokens, forward, backward and fused AdamW) in bf16 with torch's layers, the same
compiled, and in FP8, at each width: step time, cells/s, MFU against the datasheet's 989 TFLOP/s (H100, H200) and
against the largest matrix product that this machine was seen to do, peak memory, and the ratio to bf16. Last, where
`transformers` is installed, its BERT of the same size (SDPA, compiled) on the same rows as the peer. One run, one
process, nothing else on the GPU.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn

from models.encoder import EncoderConfig, MaskedCellEncoder
from models.errors import ModelError
from models.fp8_scaling import Recipe
from models.layers import LayerFactory
from trainer.console import table

PEAK_BF16 = 989e12
"""Dense bf16 of H100 and H200 SXM by their datasheets, in operations per second."""
VOCAB_SIZE, N_BINS, MASKED_FRACTION = 20_004, 64, 0.15


@dataclass(frozen=True)
class Shape:
    """Sizes of one measurement."""

    dim: int
    num_layers: int
    num_tokens: int
    num_cells: int
    num_steps: int

    @property
    def vocab_size(self) -> int:
        """Return the token ids: fewer where sizes are of no interest."""
        return VOCAB_SIZE if self.dim > 64 else 200


def main() -> int:
    """Run the checks and the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 768, 1024, 2048])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--cells", type=int, default=32, help="rows of a micro-batch")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes and emulated FP8, on any machine")
    arguments = parser.parse_args()
    if arguments.rehearse:
        rehearse()
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured; --rehearse shows that the script runs")
        return 0
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    check_layers(device, "te")
    measured = matrix_product(device)
    print(f"largest matrix product seen: {measured / 1e12:.0f} TFLOP/s in bf16")
    for dim in arguments.dims:
        shape = Shape(dim, arguments.layers, arguments.tokens, arguments.cells, arguments.steps)
        compare(shape, device, "te", measured)
    return 0


def rehearse() -> None:
    """Go through all of it with sizes of no interest."""
    device = torch.device("cpu")
    check_layers(device, "emulate", dim=32, num_tokens=64)
    compare(Shape(32, 1, 16, 4, 2), device, "emulate", matrix_product(device, size=128))


def check_layers(device: torch.device, backend: Any, *, dim: int = 1024, num_tokens: int = 4096) -> None:
    """Print the relative errors of each FP8 layer's output and gradients against torch's layer of the same weights."""
    rows = []
    for recipe in get_args(Recipe):
        for kind in ("linear", "norm_linear"):
            try:
                errors = layer_errors(device, backend, recipe, kind, dim, num_tokens)
            except ModelError as error:
                rows.append([recipe, kind, str(error).split(";")[0][:60], "", ""])
                continue
            rows.append([recipe, kind, *(f"{error:.4f}" for error in errors)])
    print(table(["recipe", "layer", "output", "input gradient", "weight gradient"], rows))


def layer_errors(
    device: torch.device, backend: Any, recipe: Any, kind: str, dim: int, num_tokens: int
) -> list[float]:
    """Return the relative errors of output, input gradient and weight gradient."""
    torch.manual_seed(0)
    plain = getattr(LayerFactory(), kind)("layer", dim, dim).to(device)
    factory = LayerFactory(backend, (), recipe)
    fp8 = getattr(factory, kind)("layer", dim, dim).to(device)
    fp8.load_state_dict(plain.state_dict())
    x = torch.randn(num_tokens, dim, device=device)
    gradient = torch.randn(num_tokens, dim, device=device)
    found = []
    for layer, context in ((plain, None), (fp8, factory)):
        inputs = x.clone().requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            if context is None:
                output = layer(inputs)
            else:
                with context.region():
                    output = layer(inputs)
        output.backward(gradient.to(output.dtype))
        found.append([output, inputs.grad, layer.weight.grad])
    return [relative(b, a) for a, b in zip(*found, strict=True)]


def relative(value: Tensor, reference: Tensor) -> float:
    """Return |value - reference| / |reference|."""
    value, reference = value.detach().float(), reference.detach().float()
    return float((value - reference).norm() / reference.norm())


def matrix_product(device: torch.device, size: int = 8192) -> float:
    """Return the operations per second of the fastest of ten square bf16 products."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        started = time.perf_counter()
        torch.mm(a, a)
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def compare(shape: Shape, device: torch.device, backend: Any, measured: float) -> None:
    """Train in each way at one width and print the table."""
    ways: dict[str, Callable[[], tuple[nn.Module, Callable[[Any], Tensor]]]] = {
        "bf16": lambda: ours(shape, device, "torch")
    }
    if device.type == "cuda":
        ways["bf16, compiled"] = lambda: ours(shape, device, "torch", is_compiled=True)
    ways |= {
        f"fp8 {recipe}": lambda recipe=recipe: ours(shape, device, backend, recipe)
        for recipe in get_args(Recipe)
    }
    if find_spec("transformers") is not None:
        ways["transformers BERT, compiled"] = lambda: peer(shape, device, is_compiled=device.type == "cuda")
    rows, reference = [], None
    batch = make_batch(shape, device)
    flops = MaskedCellEncoder(config(shape, "torch")).training_flops(
        [shape.num_tokens] * shape.num_cells, batch["masked_index"].numel()
    )
    for name, build in ways.items():
        try:
            seconds, memory, loss = train(*build(), batch, shape, device)
        except (ModelError, torch.OutOfMemoryError) as error:
            rows.append([name, str(error).split(";")[0][:70], *[""] * 6])
            continue
        reference = reference or seconds
        rate = flops / seconds
        mfu = [f"{100 * rate / PEAK_BF16:.1f} %", f"{100 * rate / measured:.1f} %"]
        figures = [f"{1000 * seconds:.1f}", f"{shape.num_cells / seconds:,.0f}", *mfu]
        rows.append([name, *figures, f"{memory / 2**30:.1f}", f"{reference / seconds:.2f}", f"{loss:.4f}"])
    print(
        f"\nwidth {shape.dim}, {shape.num_layers} layers, {shape.num_cells} rows of {shape.num_tokens} tokens"
    )
    head = [
        "",
        "step (ms)",
        "cells/s",
        "MFU of 989",
        "MFU of measured",
        "memory (GiB)",
        "against bf16",
        "last loss",
    ]
    print(table(head, rows))


def config(shape: Shape, backend: Any, recipe: Any = "current_scaling") -> EncoderConfig:
    """Return our encoder at these sizes."""
    return EncoderConfig(
        vocab_size=shape.vocab_size,
        n_bins=N_BINS,
        hidden_dim=shape.dim,
        num_layers=shape.num_layers,
        num_heads=max(1, shape.dim // 64),
        dropout=0.0,
        use_value_prior=False,
        layer_backend=backend,
        fp8_recipe=recipe,
    )


def ours(
    shape: Shape,
    device: torch.device,
    backend: Any,
    recipe: Any = "current_scaling",
    *,
    is_compiled: bool = False,
) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """Return our encoder and its loss."""
    torch.manual_seed(0)
    model = MaskedCellEncoder(config(shape, backend, recipe)).to(device)
    if is_compiled:
        for module in model.compiled_modules():
            module.compile()

    def loss(batch: dict[str, Any]) -> Tensor:
        output = model.compute_loss(batch)
        return output.sum / output.weight

    return model, loss


def peer(
    shape: Shape, device: torch.device, *, is_compiled: bool
) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """Return a plain BERT for masked tokens of the same size, and its loss at the masked positions."""
    from transformers import BertConfig, BertForMaskedLM  # pyright: ignore[reportMissingImports]

    settings = BertConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=max(1, shape.dim // 64),
        intermediate_size=4 * shape.dim,
        max_position_embeddings=shape.num_tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    settings._attn_implementation = "sdpa"
    model: Any = BertForMaskedLM(settings)
    model = model.to(device)
    if is_compiled:
        model.compile()

    def loss(batch: dict[str, Any]) -> Tensor:
        return model(input_ids=batch["tokens"], labels=batch["labels"]).loss

    return model, loss


def make_batch(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Return one made-up micro-batch without padding, masked as in training."""
    generator = torch.Generator().manual_seed(0)
    size = (shape.num_cells, shape.num_tokens)
    tokens = torch.randint(4, shape.vocab_size, size, generator=generator)
    bins = torch.randint(0, N_BINS, size, generator=generator)
    tokens[:, 0] = 3  # cls
    is_masked = torch.rand(size, generator=generator) < MASKED_FRACTION
    is_masked[:, 0] = False
    labels = torch.where(is_masked, tokens, -100)
    batch: dict[str, Any] = {
        "tokens": torch.where(is_masked, 2, tokens),
        "bins": torch.where(is_masked, N_BINS, bins),
        "values": bins.float(),
        "labels": labels,
        "value_labels": torch.where(is_masked, bins, -100),
        "masked_index": is_masked.flatten().nonzero().squeeze(1),
        "depth": bins.sum(dim=1).float().log1p(),
    }
    moved = {name: tensor.to(device) for name, tensor in batch.items()}
    return moved | {
        "num_tokens": tokens.numel(),
        "attention_mask": torch.ones(size, dtype=torch.bool, device=device),
    }


def train(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batch: dict[str, Any],
    shape: Shape,
    device: torch.device,
) -> tuple[float, int, float]:
    """Return the median seconds of a step, the peak memory in bytes, and the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, value = [], torch.zeros(())
    for _ in range(shape.num_steps + 3):  # the first ones compile and allocate
        synchronise(device)
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = loss(batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return sorted(seconds[3:])[shape.num_steps // 2], memory, float(value.detach())


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
