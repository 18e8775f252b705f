"""Convert and train on a hundred thousand and on a million made-up cells, and say what grows with their number.

    python benchmarks/million_cells.py                                     # minutes to half an hour on two cores, 6 GB
    python benchmarks/million_cells.py --cells 5000 20000 --keep /data/cells

Four h5ad files of 20,000 genes, about 300 of them in a cell, eight technical batches and eight cell types, are made
(`_zipf_cells.py`), converted with `python -m trainer.convert_h5ad`, and trained on for one epoch with `accelerate
launch trainer/train.py`: a small model, 64 tokens a cell. The table has a column for each number of cells, how much
each figure grows from the fewest cells to the most, and what is expected: x1 where it should not depend on the number
of cells. Own memory is what belongs to no file and can be freed by the process alone; the rest of what is resident is
mapped pages of files, mostly of the corpus, which the kernel takes back when memory is short.

The marginal baseline is each gene's distribution over bins in training cells. A model below it has learned from the
cells; of cells as shallow as these, most of it is how deeply each one was sequenced.

Exits with 1 if the own memory of the conversion or of a rank, or the size of a checkpoint, grows with the number of
cells. Times depend on the machine and its load.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from launching import RankGroup, cpu_environment, start_ranks
from running import newest_run, records, write_config

from benchmarks._memory import MemoryWatch
from trainer.config.load import load_run_config
from trainer.quickstart import baseline_losses
from trainer.scoring.expression_baselines import MarginalBaseline

NUM_GENES = 20_000
MICRO_BATCH = 256
VALIDATION_CELLS = 2_000
BASELINE_CELLS = 20_000
"""Training cells that the marginal baseline is fitted to."""
LOG_EVERY, SAVES = 20, 4
WARM_STEPS = 20
"""Steps at the start of the training that its rate leaves out, where there are twice as many."""
LARGEST_GROWTH = 1.25
"""Of what should not depend on the number of cells."""
BYTES_PER_CELL = 5_500
"""A cell of an h5ad file and of the corpus, with a fifth to spare."""
BYTES_PER_SIZE = 300_000_000
"""Checkpoints, reports and everything else that does not depend on the number of cells."""


class Row(NamedTuple):
    """Say what the table tells of a figure."""

    title: str
    unit: str
    grows: bool = False
    """Whether it should grow as the number of cells does."""
    is_bound: bool = False
    """Whether the benchmark fails if it grows all the same."""
    is_ratio: bool = True
    """Whether its growth says anything."""


ROWS = {
    "generation_seconds": Row("making the files", "s", grows=True),
    "generation_own_bytes": Row("making the files, own memory", "MB"),
    "h5ad_bytes": Row("h5ad files", "MB", grows=True),
    "conversion_seconds": Row("conversion", "s", grows=True),
    "conversion_cells_per_second": Row("conversion", "cells/s"),
    "conversion_own_bytes": Row("conversion, own memory of all processes", "MB", is_bound=True),
    "corpus_bytes": Row("corpus", "MB", grows=True),
    "first_batch_seconds": Row("training, command to first batch", "s"),
    "first_step_seconds": Row("training, command to end of first step", "s"),
    "training_cells_per_second": Row("training, steady", "cells/s"),
    "data_wait_percent": Row("training, waiting for data", "%", is_ratio=False),
    "training_seconds": Row("training, whole command", "s", grows=True),
    "rank_own_bytes": Row("rank {rank}, own memory", "MB", is_bound=True),
    "rank_mapped_bytes": Row("rank {rank}, mapped pages", "MB", grows=True),
    "rank_resident_bytes": Row("rank {rank}, all that is resident", "MB", grows=True),
    "checkpoint_bytes": Row("checkpoint", "MB", is_bound=True),
    "checkpoint_seconds": Row("training waits for a checkpoint", "s"),
    "expression_loss": Row("held-out cells, loss (nats)", "", is_ratio=False),
    "marginal_loss": Row("held-out cells, marginal baseline (nats)", "", is_ratio=False),
}
"""What is told of each size, in this order; those of a rank are there once for each rank."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each number of cells and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cells", type=int, nargs="+", default=[100_000, 1_000_000], help="numbers of cells to measure")
    add("--ranks", type=int, default=2, help="processes that train")
    add("--jobs", type=int, default=2, help="processes that convert")
    add("--seed", type=int, default=0, help="of the cells and of the training")
    add("--folder", type=Path, help="where temporary files go (default: the system's place)")
    add("--keep", type=Path, metavar="DIR", help="leave cells, corpora and runs in this folder")
    add(
        "--output", type=Path, metavar="FILE.json", help="write the figures there, and FILE.md with the table"
    )
    arguments = parser.parse_args(argv)
    sizes = sorted(set(arguments.cells))
    if sizes[0] < 1_000:
        parser.error(f"--cells {sizes[0]}: give at least 1000, of which a tenth is held out")
    if arguments.output is not None and arguments.output.suffix != ".json":
        parser.error(f"--output {arguments.output}: name a file that ends with .json")
    taken = [size for size in sizes if arguments.keep and (arguments.keep / str(size)).exists()]
    if taken:
        parser.error(f"--keep {arguments.keep}: it holds {taken[0]} already; name another folder")
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="million-cells-", dir=arguments.folder))
    try:
        check_disk(folder, sizes, is_kept=arguments.keep is not None)
        results = []
        for size in sizes:
            results.append(measure(folder / str(size), size, arguments))
            print(f"{size:,} cells: {json.dumps(results[-1])}", flush=True)
            if arguments.keep is None:
                shutil.rmtree(folder / str(size))
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    grown = too_large(results)
    report = {"cores": os.cpu_count(), "ranks": arguments.ranks, "jobs": arguments.jobs, "sizes": results}
    text = markdown(results)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(text)
    print(text)
    for name in grown:
        print(f"{name} grows with the number of cells and should not (more than {LARGEST_GROWTH} times)")
    return 1 if grown else 0


def check_disk(folder: Path, sizes: Sequence[int], *, is_kept: bool) -> None:
    """Refuse to begin where the disk cannot hold what will be on it at one time."""
    needed = [size * BYTES_PER_CELL + BYTES_PER_SIZE for size in sizes]
    most, free = sum(needed) if is_kept else max(needed), shutil.disk_usage(folder).free
    if most > free:
        print(
            f"error: {folder}: {most / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; free some, name a folder "
            "of another disk (--folder, --keep), or give fewer --cells",
            file=sys.stderr,
        )
        raise SystemExit(2)


def measure(folder: Path, num_cells: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Make so many cells, convert them and train on them."""
    h5ad, corpus = folder / "h5ad", folder / "corpus"
    seed, results = arguments.seed, {"cells": float(num_cells)}
    make = [ROOT / "benchmarks" / "_zipf_cells.py", h5ad, "--cells", num_cells, "--genes", NUM_GENES]
    seconds, own = run([*make, "--seed", seed], num_cells)
    files = sorted(h5ad.iterdir())
    results |= {"generation_seconds": seconds, "generation_own_bytes": own, "h5ad_bytes": bytes_of(files)}
    convert = ["-m", "trainer.convert_h5ad", *files, "--output", corpus, "--jobs", arguments.jobs]
    seconds, own = run(convert, num_cells)
    results |= {
        "conversion_seconds": seconds,
        "conversion_cells_per_second": num_cells / seconds,
        "conversion_own_bytes": own,
        "corpus_bytes": bytes_of(corpus.iterdir()),
    }
    config = write_config(folder, configuration(corpus, num_cells, arguments.ranks, seed))
    results |= train(config, num_cells, arguments.ranks)
    (marginal,) = baseline_losses(load_run_config(config), 0, [MarginalBaseline], max_cells=BASELINE_CELLS)
    return results | {"marginal_loss": marginal}


def run(command: Sequence[object], num_cells: int) -> tuple[float, int]:
    """Run a Python command and return its seconds and the most memory that all its processes held of their own."""
    started = time.perf_counter()
    with (
        RankGroup([[sys.executable, *map(str, command)]], [cpu_environment()], ROOT) as group,
        MemoryWatch(group.processes[0].pid) as watch,
    ):
        group.wait(time_limit(num_cells))
        seconds = time.perf_counter() - started
    return seconds, watch.own


def train(config: Path, num_cells: int, num_ranks: int) -> dict[str, float]:
    """Train with the user's command and return the figures of its run."""
    num_steps = steps_of(num_cells, num_ranks)
    first_line = min(LOG_EVERY, num_steps)
    script = [ROOT / "trainer" / "train.py", "--config", config]
    started = time.perf_counter()
    with (
        start_ranks(num_ranks, script, launcher="accelerate") as group,
        MemoryWatch(group.processes[0].pid) as watch,
    ):
        group.wait_for(f"step {first_line}  pretrain {first_line}/{num_steps}", timeout=1800)
        said = time.perf_counter() - started
        ranks = {int(process.environ()["RANK"]): process.pid for process in group.rank_processes()}
        output = group.wait(time_limit(num_cells)).stdout
        seconds = time.perf_counter() - started
    run_folder = newest_run(config.parent)
    steps = records(run_folder)
    # The line is written when its last step is done, and the records say how long before that the first one was.
    first, last = steps[0], steps[first_line - 1]
    first_step = said - (last["elapsed_seconds"] - first["elapsed_seconds"])
    parameters = re.search(r"parameters +([\d,]+)", output)
    assert parameters is not None, output
    results = {
        "parameters": float(parameters[1].replace(",", "")),
        "first_batch_seconds": first_step - first["step_seconds"] * (1 - first["data_wait_fraction"]),
        "first_step_seconds": first_step,
        "training_seconds": seconds,
        **rates(steps),
        **checkpoints(run_folder, output),
        "expression_loss": records(run_folder, "validation")[-1]["expression_loss"],
    }
    for rank, process in sorted(ranks.items()):
        peak = watch.peaks[process]
        results |= {
            f"rank_own_bytes_{rank}": peak.own,
            f"rank_mapped_bytes_{rank}": peak.mapped,
            f"rank_resident_bytes_{rank}": peak.peak,
        }
    return results


def rates(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the cells/s of the training when it has warmed up, and rank 0's share of waiting in it."""
    warm = steps[WARM_STEPS:] if len(steps) >= 2 * WARM_STEPS else steps
    seconds = sum(step["step_seconds"] for step in warm)
    waited = sum(step["step_seconds"] * step["data_wait_fraction"] for step in warm)
    return {
        "training_cells_per_second": sum(step["cells"] for step in warm) / seconds,
        "data_wait_percent": 100 * waited / seconds,
    }


def checkpoints(run_folder: Path, output: str) -> dict[str, float]:
    """Return the bytes of the last checkpoint, and for how long training waited for one."""
    newest = (run_folder / "latest").read_text().strip()
    files = json.loads((run_folder / newest / "manifest.json").read_text())["files"]
    waited = [float(seconds) for seconds in re.findall(r"checkpoint checkpoint_\d+  \(([0-9.]+) s\)", output)]
    return {
        "checkpoint_bytes": sum(facts["num_bytes"] for facts in files.values()),
        "checkpoint_seconds": statistics.median(waited),
    }


def configuration(corpus: Path, num_cells: int, num_ranks: int, seed: int) -> dict[str, Any]:
    """Return a run of one epoch: gene vectors of four numbers keep a model of 20,000 genes under 0.2 M parameters."""
    phase = {
        "name": "pretrain",
        "dataloader_factory": "data.loader.cell_loader",
        "dataloader_args": {
            "path": str(corpus),
            "tokenizer": {
                "strategy": "binned_expression",
                "max_genes": 64,
                "gene_selection": "random",
                "n_bins": 5,
                "binning_method": "quantile",
            },
            "masking": {"mask_ratio": 0.15, "target": "expression"},
            "val_fraction": held_out(num_cells) / num_cells,
        },
        "warmup_steps": 20,
        "schedule": "cosine",
        "schedule_fits": ["warmup"],
        "log_every_steps": LOG_EVERY,
        "save_every_steps": max(1, steps_of(num_cells, num_ranks) // SAVES),
    }
    sizes = {"hidden_dim": 4, "num_layers": 1, "num_heads": 1, "dropout": 0.0}
    return {
        "run_name": "million_cells",
        "device": "cpu",
        "seed": seed,
        "model": {
            "model_class": "models.encoder.MaskedCellEncoder",
            "config_class": "models.encoder.EncoderConfig",
            "config_args": {**sizes, "use_cell_summary": False, "gene_loss_weight": 0},
        },
        "optimizer": {"optimizer_args": {"lr": 3e-3}},
        "micro_batch_size": MICRO_BATCH,
        "checkpoint": {"keep_last": 1},
        "datasets": [phase],
    }


def held_out(num_cells: int) -> int:
    """Return the cells that are held out: evaluating them takes as long however many there are to train on."""
    return min(VALIDATION_CELLS, num_cells // 10)


def steps_of(num_cells: int, num_ranks: int) -> int:
    """Return the optimizer steps of an epoch."""
    return -(-(num_cells - held_out(num_cells)) // (MICRO_BATCH * num_ranks))


def time_limit(num_cells: int) -> float:
    """Return the seconds after which a command that still runs hangs."""
    return 900 + num_cells / 50


def bytes_of(files: Any) -> int:
    """Return what files take on the disk."""
    return sum(file.stat().st_size for file in files)


def expanded(results: Sequence[dict[str, float]]) -> dict[str, Row]:
    """Return the rows by the name of their figure, with one for each rank."""
    rows = {}
    for name, row in ROWS.items():
        numbered = sorted(key for key in results[0] if re.fullmatch(rf"{name}_\d+", key))
        for key in numbered or [name]:
            rows[key] = row._replace(title=row.title.format(rank=key.rpartition("_")[2]))
    return rows


def growth(results: Sequence[dict[str, float]], name: str) -> float:
    """Return how many times as large a figure is with the most cells as with the fewest."""
    return results[-1][name] / results[0][name] if results[0][name] else float("nan")


def too_large(results: Sequence[dict[str, float]]) -> list[str]:
    """Return what grows with the number of cells and must not."""
    rows = expanded(results).items()
    return [row.title for name, row in rows if row.is_bound and growth(results, name) > LARGEST_GROWTH]


def markdown(results: Sequence[dict[str, float]]) -> str:
    """Return the table: a row for each figure, a column for each number of cells, growth and what is expected."""
    sizes = [f"{result['cells']:,.0f} cells" for result in results]
    lines = [["", *sizes, "growth", "expected"]]
    for name, row in expanded(results).items():
        values = [shown(result[name], row.unit) for result in results]
        factor = f"x{growth(results, name):.2f}" if row.is_ratio else ""
        expected = f"x{growth(results, 'cells'):g}" if row.grows else "x1"
        if "mapped" in name or "resident" in name:
            expected = f"up to {expected}"
        lines.append([row.title, *values, factor, expected if row.is_ratio else ""])
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def shown(value: float, unit: str) -> str:
    """Return a figure as the table has it."""
    if unit == "MB":
        return f"{value / 1e6:,.1f} MB" if value < 1e7 else f"{value / 1e6:,.0f} MB"
    if unit == "cells/s":
        return f"{value:,.0f} {unit}"
    if unit in ("s", "%"):
        return f"{value:,.1f} {unit}" if value >= 1 else f"{value:.2f} {unit}"
    return f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
