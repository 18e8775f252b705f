"""Compare the time of an optimizer step in our loop with a bare PyTorch loop on the same model and batches.

    python benchmarks/loop_overhead.py

Where it is installed, the Trainer of Hugging Face transformers takes the same steps, and writes a record of each of
them as our loop does. All get the same micro-batches from memory, so that data costs nothing. They take turns, round
after round, in one process; the figures are ratios to the bare loop over all rounds, by the clock and by processor
time, which other programs on the machine disturb less.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.loader import MicroBatch
from models.encoder import EncoderConfig, MaskedCellEncoder
from trainer import distributed
from trainer.config import RunConfig
from trainer.loop import run_epoch
from trainer.losses import LossModule
from trainer.meters import Meters
from trainer.optim import build_optimizer
from trainer.phases import Phase
from trainer.progress import Progress
from trainer.recorder import Recorder
from trainer.run import Run
from trainer.strategy import Strategy

NUM_GENES, NUM_BINS, NUM_TOKENS = 2000, 12, 129


class Spent(NamedTuple):
    """Time since some moment."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> "Spent":
        """Return both clocks."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Spent") -> "Spent":
        """Return what has passed."""
        return Spent(self.wall - start.wall, self.cpu - start.cpu)


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


def bare_round(
    model: MaskedCellEncoder, optimizer: torch.optim.Optimizer, steps: list[list[MicroBatch]]
) -> Spent:
    """Train over all steps with the shortest loop that computes the same gradients; return its time."""
    began = Spent.now()
    for step in steps:
        weight = sum(micro.batch["masked_index"].numel() for micro in step)
        for micro in step:
            output = model.compute_loss(micro.batch)
            (output.sum / weight).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return Spent.now().since(began)


class ForTrainer(nn.Module):
    """Give the model the shape that transformers.Trainer asks for."""

    def __init__(self, model: MaskedCellEncoder) -> None:
        """Take the model."""
        super().__init__()
        self.model = model

    def forward(self, micro: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the mean loss of a micro-batch."""
        output = self.model.compute_loss(micro)
        return {"loss": output.sum / micro["masked_index"].numel()}


def trainer_round(model: ForTrainer, steps: list[list[MicroBatch]], folder: Path) -> Spent:
    """Take all steps with transformers.Trainer; return their time, from the end of one step before them."""
    import transformers

    ends: list[Spent] = []

    class Clock(transformers.TrainerCallback):
        """Note when steps end."""

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """Note it."""
            ends.append(Spent.now())

    micros = [micro.batch for step in [steps[-1], *steps] for micro in step]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "transformers"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(steps[0]),
        max_steps=len(steps) + 1,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        lr_scheduler_type="constant",
        # Its own would throw away the state of the processes that our run holds.
        accelerator_config={"use_configured_state": True},
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=lambda items: {"micro": items[0]},
        train_dataset=micros,  # type: ignore[arg-type]
        optimizers=(torch.optim.AdamW(model.parameters()), None),
        callbacks=[Clock()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return ends[-1].since(ends[0])


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


def compared(kind: str, rounds: list[Spent], of_bare: list[Spent]) -> str:
    """Describe the ratios of rounds to the bare loop's rounds beside them."""
    ratios = sorted(
        getattr(each, kind) / getattr(bare, kind) for each, bare in zip(rounds, of_bare, strict=True)
    )
    return (
        f"; {kind} {statistics.median(ratios):.3f} of the bare loop, from {ratios[0]:.3f} to {ratios[-1]:.3f}"
    )


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
    rows = np.arange(arguments.cells)
    steps = [
        [MicroBatch(make_batch(arguments.cells, generator), arguments.cells, rows) for _ in range(2)]
        for _ in range(arguments.steps)
    ]
    bare = build_model(arguments.width, arguments.layers)
    optimizer = torch.optim.AdamW(bare.parameters())
    theirs = ForTrainer(build_model(arguments.width, arguments.layers))
    has_trainer = importlib.util.find_spec("transformers") is not None
    times: dict[str, list[Spent]] = {"bare loop": [], "ours": []}
    if has_trainer:
        times["transformers.Trainer"] = []
    with tempfile.TemporaryDirectory() as folder:
        run = our_run(Path(folder), steps, arguments.width, arguments.layers)
        meters = Meters(run.ranks)
        for _ in range(arguments.rounds + 1):
            times["bare loop"].append(bare_round(bare, optimizer, steps))
            began = Spent.now()
            run_epoch(run, run.phases[0], meters)
            times["ours"].append(Spent.now().since(began))
            if has_trainer:
                times["transformers.Trainer"].append(trainer_round(theirs, steps, Path(folder)))
        run.recorder.close(0)
    for name, rounds in times.items():
        print(f"{name:20} {statistics.median(each.wall for each in rounds[1:]) / arguments.steps * 1e3:8.2f} ms a step"
              + "".join(compared(kind, rounds[1:], times["bare loop"][1:]) for kind in Spent._fields))  # fmt: skip
    if not has_trainer:
        print("transformers is not installed, so its Trainer is left out")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.width} x {arguments.layers} model"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
