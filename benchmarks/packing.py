"""Compare training steps on padded, bucketed and packed batches of cells whose lengths vary as in a real corpus.

    python benchmarks/packing.py                    # on a GPU where there is one, in bf16; else on the CPU
    python benchmarks/packing.py --device cpu

All three see the same cells in global batches of the same size. They take turns, step by step, in one process; the
figure is cells/s over all steps, and its ratio to padded. Batches are prepared beforehand, so that only the model's
work counts.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.corpus import CorpusWriter
from data.genes import GeneSpace
from data.loader import MicroBatch, StepLoader, cell_loader
from data.order import GlobalOrder
from data.ragged import gather, offsets_of
from data.synthetic import make_synthetic_counts
from models.encoder import EncoderConfig, MaskedCellEncoder
from trainer.losses import move_to_device

LAYOUTS = ("padded", "bucketed", "packed")
N_BINS = 51
SIZES: dict[str, dict[str, int]] = {
    "cpu": {
        "hidden_dim": 128,
        "num_layers": 2,
        "num_heads": 4,
        "mean_genes": 300,
        "max_genes": 1024,
        "micro_batch_size": 16,
    },
    "cuda": {
        "hidden_dim": 512,
        "num_layers": 8,
        "num_heads": 8,
        "mean_genes": 1400,
        "max_genes": 4096,
        "micro_batch_size": 16,
    },
}


def main() -> None:
    """Measure the three layouts and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=SIZES, default=found)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each layout")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches of an optimizer step")
    parser.add_argument(
        "--spread", type=float, default=0.6, help="standard deviation of log(genes of a cell)"
    )
    for name in SIZES["cpu"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None)
    arguments = parser.parse_args()
    sizes = {name: getattr(arguments, name) or size for name, size in SIZES[arguments.device].items()}
    device = torch.device(arguments.device)
    global_batch = sizes["micro_batch_size"] * arguments.accumulation
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_cells(
            Path(folder) / "corpus", global_batch * arguments.steps, sizes["mean_genes"], arguments.spread
        )
        steps = {layout: prepare(corpus, layout, global_batch, sizes, arguments.steps) for layout in LAYOUTS}
        measure(steps, sizes, device)


def write_cells(path: Path, num_cells: int, mean_genes: int, spread: float) -> Path:
    """Write cells whose numbers of genes are log-normal, as in tissues of small and large cells."""
    rng = np.random.default_rng(0)
    num_genes = 16 * mean_genes
    wanted = np.exp(rng.normal(np.log(mean_genes) - spread**2 / 2, spread, num_cells)).astype(np.int64)
    longest = int(1.3 * wanted.max())
    full = make_synthetic_counts(min(num_cells, 512), num_genes, min(longest, num_genes // 2), seed=0)
    source = np.arange(num_cells) % (len(full.indptr) - 1)
    starts, lengths = full.indptr[source], np.diff(full.indptr)[source]
    kept = np.clip(wanted, 16, lengths)
    genes, counts = gather(full.indices, starts, lengths), gather(full.counts, starts, lengths)
    # Each cell keeps a random choice of its genes, in their order.
    offsets = offsets_of(lengths)
    chosen = np.concatenate(
        [
            np.sort(rng.permutation(size)[:count]) + start
            for start, size, count in zip(offsets, lengths, kept, strict=False)
        ]
    )
    names = tuple(f"GENE{index}" for index in range(num_genes))
    with CorpusWriter(path, GeneSpace(names, names, "symbol")) as writer:
        writer.write(offsets_of(kept), genes[chosen], counts[chosen], {})
    return path


def prepare(
    corpus: Path, layout: Any, global_batch: int, sizes: dict[str, int], num_steps: int
) -> list[list[MicroBatch]]:
    """Load every step's micro-batches into memory."""
    source = cell_loader(
        corpus,
        tokenizer={
            "strategy": "binned_expression",
            "n_bins": N_BINS,
            "max_genes": sizes["max_genes"],
        },
        masking={"mask_ratio": 0.15, "target": "both"},
        layout=layout,
    )
    loader = StepLoader(
        source,
        GlobalOrder(len(source), seed=0, phase=0),
        draw_seed=0,
        phase=0,
        global_batch_size=global_batch,
        micro_batch_size=sizes["micro_batch_size"],
        rank=0,
        world_size=1,
    )
    return list(loader.steps(0, 0, num_steps))


def measure(steps: dict[str, list[list[MicroBatch]]], sizes: dict[str, int], device: torch.device) -> None:
    """Train a model on each layout's steps in turn, and print what came of it."""
    models = {layout: build_model(sizes, device) for layout in LAYOUTS}
    optimizers = {
        layout: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for layout, model in models.items()
    }
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    losses: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for layout in LAYOUTS:  # kernels are chosen and memory is taken in a first step that does not count
        train_step(models[layout], optimizers[layout], steps[layout][0], device, is_update=False)
    for number in range(len(steps["padded"])):
        for layout in LAYOUTS:
            started = time.perf_counter()
            loss = train_step(models[layout], optimizers[layout], steps[layout][number], device)
            losses[layout].append(loss)  # a number of the host: the device has finished
            seconds[layout].append(time.perf_counter() - started)
    num_cells = {
        layout: sum(micro.num_cells for step in steps[layout] for micro in step) for layout in LAYOUTS
    }
    real = sum(micro.batch["num_tokens"] for step in steps["padded"] for micro in step)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    parameters = sum(parameter.numel() for parameter in models["padded"].parameters())
    print(f"{name}; {parameters:,} parameters, micro-batch {sizes['micro_batch_size']}, "
          f"{len(steps['padded'])} steps of {num_cells['padded'] // len(steps['padded'])} cells, "
          f"{real / num_cells['padded']:.0f} tokens a cell")  # fmt: skip
    print(
        "| layout | padding | cells/s | to padded (median of steps) | loss of the last step |\n|---|---|---|---|---|"
    )
    for layout in LAYOUTS:
        held = sum(micro.batch["tokens"].numel() for step in steps[layout] for micro in step)
        ratio = statistics.median(a / b for a, b in zip(seconds["padded"], seconds[layout], strict=True))
        print(f"| {layout} | {1 - real / held:.0%} | {num_cells[layout] / sum(seconds[layout]):.1f} | {ratio:.2f} | "
              f"{losses[layout][-1]:.5f} |")  # fmt: skip


def build_model(sizes: dict[str, int], device: torch.device) -> MaskedCellEncoder:
    """Build the encoder, the same for each layout; without dropout, so that losses can be compared."""
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=4 + 16 * sizes["mean_genes"],
        n_bins=N_BINS,
        hidden_dim=sizes["hidden_dim"],
        num_layers=sizes["num_layers"],
        num_heads=sizes["num_heads"],
        dropout=0.0,
        gene_loss_weight=1.0,
    )
    return MaskedCellEncoder(config).to(device)


def train_step(
    model: MaskedCellEncoder,
    optimizer: torch.optim.Optimizer,
    step: list[MicroBatch],
    device: torch.device,
    *,
    is_update: bool = True,
) -> float:
    """Take an optimizer step as the trainer does, bf16 on a GPU, and return its loss."""
    weight = sum(model.loss_weight(micro.batch) for micro in step)
    total = torch.zeros((), device=device)
    for micro in step:
        batch = move_to_device(micro.batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model.compute_loss(batch).sum / weight
        loss.backward()
        total += loss.detach()
    if is_update:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()
    return float(total)


if __name__ == "__main__":
    main()
