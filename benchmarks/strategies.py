"""Check every strategy on two processes of this machine's CPU, and print one table; each cell comes from runs.

    python benchmarks/strategies.py --kills 5

Columns: the largest difference of a step's loss from DDP's, over two phases with frozen and reinitialised parameters
and a changing accumulation; whether a run resumed in the middle, with dropout, equals one left alone bit for bit; how
many runs that were killed with SIGKILL at random moments and resumed do; which changes of the number of ranks continue
with the same losses, rates, optimizer state and settings (to 1e-5); whether an exported model computes what the trained
one does. Exits with 1 if any cell is not as it should be.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import torch
from corpora import make_cells, write_corpus
from kill_resume import run_trials
from running import comparable_records, copy_until, losses, newest_run, records, toy, train_ranks
from test_export import ENCODER, NUM_GENES, TOKENIZER
from test_zero import CONFIG, state_of

from trainer.console import table

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
PAIRS = ((2, 1), (1, 2), (2, 3), (3, 2))
STEP = 3
TOLERANCE = 1e-5


def main() -> int:
    """Fill the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=5, help="runs to kill under each strategy")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="strategies_"))
    try:
        reference = losses(finished(folder, "ddp", 2))
        rows, is_good = [], True
        for strategy in arguments.strategies:
            row, passed = examine(folder, strategy, reference, arguments.kills)
            is_good &= passed
            rows.append(row)
            print(f"{strategy}: {row}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    header = (
        "strategy",
        "loss against DDP",
        "exact resume",
        "kill -9 survived",
        "elastic",
        "export verified",
    )
    print(table(header, rows))
    return 0 if is_good else 1


def examine(folder: Path, strategy: str, reference: list[float], kills: int) -> tuple[tuple[str, ...], bool]:
    """Return a strategy's row and whether all of it is as it should be."""
    own = losses(finished(folder, strategy, 2))
    difference = max(abs(a - b) for a, b in zip(own, reference, strict=True))
    is_exact = resume_is_exact(folder, strategy)
    survived = run_trials(2, kills, strategy)
    elastic = {pair: continues(folder, strategy, *pair) for pair in PAIRS}
    is_exported = export_is_verified(folder, strategy)
    good = [f"{a} -> {b}" for (a, b), holds in elastic.items() if holds]
    row = (
        strategy,
        f"{difference:.1e}",
        "yes" if is_exact else "NO",
        f"{survived} of {kills}",
        f"{', '.join(good) or 'none'}",
        "yes" if is_exported else "NO",
    )
    passed = (
        difference <= TOLERANCE and is_exact and survived == kills and all(elastic.values()) and is_exported
    )
    return row, passed


def finished(folder: Path, strategy: str, num_ranks: int) -> Path:
    """Return the run folder of a run that was not interrupted."""
    own = folder / f"{strategy}_{num_ranks}"
    if not own.exists():
        train_ranks(num_ranks, own, CONFIG, strategy=strategy)
    return newest_run(own)


def resume_is_exact(folder: Path, strategy: str) -> bool:
    """Resume in the middle, with dropout, and compare bit for bit."""
    model = {"model_class": "toy.ToyModel", "config_class": "toy.ToyConfig", "config_args": {"dropout": 0.3}}
    config = {**CONFIG, "model": model}
    whole = folder / f"{strategy}_dropout"
    train_ranks(2, whole, config, strategy=strategy)
    copied = copy_until(newest_run(whole), STEP, folder / f"{strategy}_resumed")
    train_ranks(2, folder / f"{strategy}_resumed", config, strategy=strategy, resume_from="latest")
    return comparable_records(copied) == comparable_records(newest_run(whole))


def continues(folder: Path, strategy: str, before: int, after: int) -> bool:
    """Resume on another number of ranks and compare losses, rates, optimizer state and settings."""
    whole = finished(folder, strategy, before)
    own = folder / f"{strategy}_{before}_{after}"
    resumed = copy_until(whole, STEP, own)
    train_ranks(after, own, CONFIG, strategy=strategy, resume_from="latest")
    far = max(abs(a - b) for a, b in zip(losses(whole), losses(resumed), strict=True))
    rates = [[record["lr"] for record in records(run)] for run in (whole, resumed)]
    if far > TOLERANCE or rates[0] != rates[1]:
        return False
    for step in (STEP + 1, len(losses(whole))):
        (first, groups), (second, same) = state_of(whole, step), state_of(resumed, step)
        if groups != same or first.keys() != second.keys():
            return False
        if not all(torch.allclose(first[n], second[n], rtol=TOLERANCE, atol=1e-6) for n in first):
            return False
    return True


def export_is_verified(folder: Path, strategy: str) -> bool:
    """Train our encoder, export it, and take the exporter's word: it compares logits in a fresh process."""
    own = folder / f"{strategy}_encoder"
    corpus = write_corpus(own / "cells", make_cells(60, NUM_GENES, 12), NUM_GENES)
    phase: dict[str, Any] = {
        "dataloader_factory": "data.loader.cell_loader",
        "dataloader_args": {
            "path": str(corpus),
            "tokenizer": TOKENIZER,
            "masking": {"mask_ratio": 0.3, "target": "both"},
        },
        "max_steps": 2,
    }
    train_ranks(2, own, toy(phase, model=ENCODER), strategy=strategy)
    command = [sys.executable, "-m", "trainer", "export", str(newest_run(own)), str(own / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr)
    return done.returncode == 0 and (own / "out" / "model.safetensors").is_file()


if __name__ == "__main__":
    sys.exit(main())
