"""Time starts and checkpoints under every strategy, on processes of this machine's CPU; ratios within one run count.

    python benchmarks/distributed.py [--ranks 2] [--hidden-dim 512] [--layers 6]

For each strategy: seconds from the command to the first step, bytes of a checkpoint, seconds that a save keeps training
waiting and their ratio to copying rank 0's part of the state once, seconds of a step, and the memory that building the
model takes on a rank, as a fraction of the model.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from corpora import make_cells, write_corpus
from launching import start_ranks
from running import newest_run, records, strategy_environment, toy, write_config

from trainer.console import table

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
NUM_GENES, STEPS, SAVE_EVERY = 400, 12, 6


def configuration(corpus: Path, hidden_dim: int, num_layers: int) -> dict[str, Any]:
    """Return a run of some steps with two checkpoints."""
    model = {
        "model_class": "models.encoder.MaskedCellEncoder",
        "config_class": "models.encoder.EncoderConfig",
        "config_args": {
            "hidden_dim": hidden_dim,
            "num_layers": num_layers,
            "num_heads": 8,
            "use_value_prior": False,
        },
    }
    phase = {
        "dataloader_factory": "data.loader.cell_loader",
        "dataloader_args": {
            "path": str(corpus),
            "tokenizer": {"strategy": "binned_expression", "n_bins": 8, "max_genes": 16},
            "masking": {"mask_ratio": 0.3, "target": "both"},
        },
        "epochs": 100,
        "max_steps": STEPS,
        "save_every_steps": SAVE_EVERY,
        "log_every_steps": 1,
    }
    return toy(phase, model=model, micro_batch_size=2, global_batch_size=None)


def copy_seconds(num_bytes: int) -> float:
    """Return the seconds that copying so many bytes in memory takes once."""
    source = torch.empty(max(1, num_bytes // 4), dtype=torch.float32).fill_(1.0)
    started = time.perf_counter()
    source.clone()
    return time.perf_counter() - started


def measure(folder: Path, strategy: str, ranks: int, hidden_dim: int, num_layers: int) -> list[str]:
    """Train under one strategy and return its row."""
    own = folder / strategy
    corpus = write_corpus(own / "cells", make_cells(400, NUM_GENES, 12), NUM_GENES)
    path = write_config(own, configuration(corpus, hidden_dim, num_layers))
    environment = strategy_environment(own, strategy, ranks, sub_group_size=1_000_000_000)
    started = time.perf_counter()
    with start_ranks(ranks, [ROOT / "trainer" / "train.py", "--config", path], env=environment) as group:
        group.wait_for("step 1 ", timeout=300)
        first_step = time.perf_counter() - started
        output = group.wait(600).stdout
    run = newest_run(own)
    manifest = json.loads((run / f"checkpoint_{SAVE_EVERY}" / "manifest.json").read_text())
    sizes = {name: facts["num_bytes"] for name, facts in manifest["files"].items()}
    part = sum(size for name, size in sizes.items() if ".rank" not in name or ".rank00000." in name)
    stalls = [float(seconds) for seconds in re.findall(r"checkpoint checkpoint_\d+  \(([0-9.]+) s\)", output)]
    seconds = [record["step_seconds"] for record in records(run)]
    memory = build_memory(own, path, environment, ranks)
    copied = copy_seconds(part)
    steps = sorted(seconds[1:SAVE_EVERY]) if seconds else [float("nan")]
    return [
        strategy,
        f"{first_step:.1f}",
        f"{sum(sizes.values()) / 1e6:.1f}",
        f"{stalls[0]:.2f}" if stalls else "-",
        f"{stalls[0] / copied:.1f}" if stalls else "-",
        f"{steps[len(steps) // 2]:.2f}",
        memory,
    ]


def build_memory(folder: Path, path: Path, environment: dict[str, str], ranks: int) -> str:
    """Return the peak of building the model on a rank, as a fraction of the model."""
    script = [ROOT / "benchmarks" / "_build_memory.py", path]
    with start_ranks(ranks, script, env=environment) as group:
        found = re.search(r"MEMORY ([0-9.]+) (\d+)", group.wait(300).stdout)
    return "-" if found is None else f"{float(found[1]):.2f} of {int(found[2]) / 1e6:.0f} MB"


def main() -> int:
    """Measure all strategies."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden-dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="distributed_"))
    try:
        rows = []
        for strategy in arguments.strategies:
            rows.append(measure(folder, strategy, arguments.ranks, arguments.hidden_dim, arguments.layers))
            shutil.rmtree(folder / strategy)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    header = (
        "strategy",
        "first step (s)",
        "checkpoint (MB)",
        "save stalls (s)",
        "stall / copying once",
        "step (s)",
        "memory to build, a rank",
    )
    print(table(header, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
