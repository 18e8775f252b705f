"""Compare the time of an optimizer step in our loop with a bare PyTorch loop on the same model and batches.

    python benchmarks/loop_overhead.py

Both loops get the same micro-batches from memory, so that data costs neither anything. They take turns, round after
round, in one process; the figure is the ratio of the medians over all rounds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.loader import MicroBatch  # noqa: E402
from models.encoder import EncoderConfig, MaskedCellEncoder  # noqa: E402
from trainer import distributed  # noqa: E402
from trainer.config import RunConfig  # noqa: E402
from trainer.loop import run_epoch  # noqa: E402
from trainer.losses import LossModule  # noqa: E402
from trainer.meters import Meters  # noqa: E402
from trainer.optim import build_optimizer  # noqa: E402
from trainer.phases import Phase  # noqa: E402
from trainer.progress import Progress  # noqa: E402
from trainer.recorder import Recorder  # noqa: E402
from trainer.run import Run  # noqa: E402
from trainer.strategy import Strategy  # noqa: E402

NUM_GENES, NUM_BINS, NUM_TOKENS = 2000, 12, 129


class FromMemory:
    """Yield the same prepared micro-batches in every epoch, as a loader does."""

    may_run_dry = False

    def __init__(self, steps: list[list[MicroBatch]]) -> None:
        """Take the steps of an epoch."""
        self.prepared = steps
        self.steps_per_epoch = len(steps)
        self.num_cells = sum(micro.num_cells for step in steps for micro in step)

    def steps(
        self, epoch: int, first_step: int = 0, stop_step: int | None = None
    ) -> Iterator[list[MicroBatch]]:
        """Yield the steps."""
        yield from self.prepared[first_step:stop_step]


class NoSaver:
    """Save nothing: checkpoints are not part of a step."""

    def save(self, run: Run) -> None:
        """Do nothing."""


def make_batch(num_cells: int, generator: torch.Generator) -> dict[str, Any]:
    """Make one micro-batch as our cell loader yields it."""
    shape = (num_cells, NUM_TOKENS)
    tokens = torch.randint(4, 4 + NUM_GENES, shape, generator=generator)
    bins = torch.randint(0, NUM_BINS, shape, generator=generator)
    masked = torch.rand(shape, generator=generator) < 0.15
    masked[:, 1] = True
    tokens[:, 0], bins[:, 0], masked[:, 0] = 3, 0, False  # the cls token
    return {
        "tokens": tokens,
        "bins": bins.masked_fill(masked, NUM_BINS),
        "values": bins.float(),
        "attention_mask": torch.ones(shape, dtype=torch.bool),
        "labels": tokens.masked_fill(~masked, -100),
        "value_labels": bins.masked_fill(~masked, -100),
        "masked_index": masked.flatten().nonzero().squeeze(1),
        "depth": torch.rand(num_cells, generator=generator),
        "batch_idx": torch.zeros(num_cells, dtype=torch.int64),
        "num_tokens": num_cells * NUM_TOKENS,
    }


def build_model(width: int, num_layers: int) -> MaskedCellEncoder:
    """Build the model that both loops train."""
    torch.manual_seed(0)
    return MaskedCellEncoder(
        EncoderConfig(
            vocab_size=4 + NUM_GENES,
            n_bins=NUM_BINS,
            n_technical_batches=1,
            hidden_dim=width,
            num_layers=num_layers,
            num_heads=4,
            use_value_prior=False,
        )
    )


def bare_round(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[list[MicroBatch]]) -> float:
    """Train over all steps with the shortest loop that computes the same gradients; return its seconds."""
    began = time.perf_counter()
    for step in steps:
        weight = sum(micro.batch["masked_index"].numel() for micro in step)
        for micro in step:
            output = model.compute_loss(micro.batch)  # type: ignore[operator]
            (output.sum / weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def our_run(folder: Path, steps: list[list[MicroBatch]], width: int, num_layers: int) -> Run:
    """Build a run around the prepared steps, with everything that a real one writes at each step."""
    config = RunConfig.model_validate(
        {
            "run_name": "overhead",
            "device": "cpu",
            "model": {"model_class": "models.encoder.MaskedCellEncoder"},
            "datasets": [
                {"dataloader_factory": "data.loader.cell_loader", "epochs": 1000, "save_every_steps": None}
            ],
            "trackers": ["csv"],
        }
    )
    accelerator, ranks = distributed.start(config)
    module = LossModule(build_model(width, num_layers))
    optimizer = build_optimizer(config, module.model, module)
    strategy = Strategy(accelerator, module, optimizer, config.max_grad_norm)
    recorder = Recorder.open(config, folder, None, {})
    plan = config.batch_plan(config.datasets[0], 1, steps[0][0].num_cells)
    phase = Phase(0, config.datasets[0], plan, FromMemory(steps), None, [], [])
    run = Run(config, ranks, strategy, module, [phase], Progress(), recorder, NoSaver())
    recorder.phase_begins(phase, run.progress)
    return run


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12, help="rounds of each loop")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps in a round")
    parser.add_argument("--width", type=int, default=128, help="hidden_dim of the model")
    parser.add_argument("--layers", type=int, default=4, help="layers of the model")
    parser.add_argument(
        "--cells", type=int, default=16, help="cells in a micro-batch, of which a step has two"
    )
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    steps = [
        [MicroBatch(make_batch(arguments.cells, generator), arguments.cells, None) for _ in range(2)]  # type: ignore[arg-type]
        for _ in range(arguments.steps)
    ]
    bare = build_model(arguments.width, arguments.layers)
    optimizer = torch.optim.AdamW(bare.parameters())
    with tempfile.TemporaryDirectory() as folder:
        run = our_run(Path(folder), steps, arguments.width, arguments.layers)
        meters, ours, theirs = Meters(run.ranks), [], []
        for _ in range(arguments.rounds + 1):
            theirs.append(bare_round(bare, optimizer, steps))
            began = time.perf_counter()
            run_epoch(run, run.phases[0], meters)
            ours.append(time.perf_counter() - began)
        run.recorder.close(0)
    per_step = [statistics.median(times[1:]) / arguments.steps * 1e3 for times in (theirs, ours)]
    pairs = sorted(our / their for our, their in zip(ours[1:], theirs[1:], strict=True))
    print(
        f"bare loop {per_step[0]:.2f} ms a step, ours {per_step[1]:.2f} ms: ratio {per_step[1] / per_step[0]:.3f}"
    )
    print(
        f"ratio of neighbouring rounds: median {statistics.median(pairs):.3f}, from {pairs[0]:.3f} to {pairs[-1]:.3f}"
    )
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.width} x {arguments.layers} model"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
