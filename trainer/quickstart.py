"""The quickstart: convert the bundled cells, train two phases, and put the held-out loss beside honest baselines.

`python -m trainer.quickstart [--seeds N] [--output DIR]`, or `make quickstart`. It runs the commands that a user
would run, and shows them.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.loader import CellSource, DrawKey, cell_loader
from trainer.config import RunConfig, load_run_config
from trainer.console import notice
from trainer.exits import run_command
from trainer.metrics_file import read_metrics
from trainer.plots import plot_losses, results_table
from trainer.scoring.expression_baselines import (
    DepthConditionalBaseline,
    MarginalBaseline,
    collect_training,
    mean_cross_entropy,
)

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "quickstart.yaml"
SAMPLES = ROOT / "data" / "samples"
CELLS_PER_BATCH = 256


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.quickstart", description=__doc__)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "quickstart", help="folder for corpora and runs"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="trainings, each with its own seed and split of cells"
    )
    arguments = parser.parse_args(argv)
    return run_command(lambda: quickstart(arguments.output.resolve(), arguments.seeds))


def quickstart(output: Path, num_seeds: int) -> int:
    """Convert, train once for each seed, and compare."""
    started = time.monotonic()
    convert(output)
    results = []
    for seed in range(num_seeds):
        config = configuration(output, seed)
        run_folder = train(output, seed)
        results.append(compare(config, run_folder))
    report(results, run_folder)
    notice(f"\n{time.monotonic() - started:.0f} seconds. Run folder: {run_folder}")
    return 0


def convert(output: Path) -> None:
    """Convert the bundled files to two corpora over one gene space; finished ones are left as they are."""
    samples = sorted(SAMPLES.glob("*.h5ad"))
    options = ["--output", str(output / "corpora"), "--genes", "union", "--per-file", "--resume"]
    call(["-m", "trainer.convert_h5ad", *map(str, samples), *options])


def overrides(output: Path, seed: int) -> list[str]:
    """Return what the quickstart changes in its configuration: places, and the seeds."""
    phases = load_run_config(CONFIG).datasets
    changes = [f"seed={seed}", f"output_dir={output / 'runs'}"]
    for index, phase in enumerate(phases):
        corpus = output / "corpora" / Path(phase.dataloader_args["path"]).name
        changes += [
            f"datasets.{index}.dataloader_args.path={corpus}",
            f"datasets.{index}.dataloader_args.split_seed={seed}",
        ]
    return changes


def configuration(output: Path, seed: int) -> RunConfig:
    """Return the configuration of one seed's training."""
    return load_run_config(CONFIG, overrides(output, seed))


def train(output: Path, seed: int) -> Path:
    """Train with the user's own command and return the run folder."""
    call([str(ROOT / "trainer" / "train.py"), "--config", str(CONFIG), *overrides(output, seed)])
    return max((output / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)


def call(arguments: list[str]) -> None:
    """Show a Python command, run it, and leave with its exit code if it fails."""
    shown = [argument.replace(f"{ROOT}/", "") for argument in arguments]
    notice(f"\n$ python {' '.join(shown)}\n")
    code = subprocess.run([sys.executable, *arguments], cwd=ROOT).returncode
    if code:
        raise SystemExit(code)


def compare(config: RunConfig, run_folder: Path) -> dict[str, dict[str, float]]:
    """Return each phase's last validation loss beside the baselines' on the same masked positions, in nats."""
    records = [
        record for record in read_metrics(run_folder / "metrics.jsonl") if record["kind"] == "validation"
    ]
    results: dict[str, dict[str, float]] = {}
    for index, phase in enumerate(config.datasets):
        last = [record for record in records if record["phase"] == phase.name][-1]
        marginal, depth = baseline_losses(config, index)
        model = float(last["expression_loss"] or 0.0)
        results[phase.name] = {"model": model, "marginal": marginal, "depth-conditional": depth}
    return results


def baseline_losses(
    config: RunConfig,
    index: int,
    baselines: Sequence[type[MarginalBaseline | DepthConditionalBaseline]] = (
        MarginalBaseline,
        DepthConditionalBaseline,
    ),
    max_cells: int | None = None,
) -> list[float]:
    """Fit baselines on a phase's training cells, with all their genes, and score what the model was asked.

    `max_cells` fits them to so many cells at most, from everywhere in the corpus.
    """
    # Baselines read a cell from each row.
    arguments = {**config.datasets[index].dataloader_args, "layout": "padded"}
    asked = cell_loader(**arguments)
    everything = cell_loader(**{**arguments, "tokenizer": {**arguments["tokenizer"], "max_genes": 1 << 20}})
    assert asked.validation is not None and everything.row_mask is not None
    facts = asked.facts()
    draw = DrawKey(config.seed, index, 0)
    training = collect_training(batches(everything, draw, masked=False, max_cells=max_cells))
    questions = list(batches(asked.validation, DrawKey(config.seed, index, -1), masked=True))
    sizes = facts["vocab_size"], facts["n_bins"]
    return [mean_cross_entropy(kind.fit(training, *sizes), questions) for kind in baselines]


def batches(
    source: CellSource, draw: DrawKey, *, masked: bool, max_cells: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield all cells of a source, or evenly spaced ones where there are more than `max_cells`, in order."""
    assert source.row_mask is not None
    rows = np.flatnonzero(source.row_mask)
    if max_cells is not None:
        rows = rows[:: -(-len(rows) // max_cells)]
    for start in range(0, len(rows), CELLS_PER_BATCH):
        part = rows[start : start + CELLS_PER_BATCH]
        yield source.fetch(part, draw) if masked else source.fetch_unmasked(part, draw)


def report(results: list[dict[str, dict[str, float]]], run_folder: Path) -> None:
    """Print the table and draw the plot."""
    notice(
        "\nHeld-out cells: cross-entropy of the hidden expression bin, in nats per masked gene (lower is better)\n"
    )
    rows = []
    for phase in results[0]:
        columns = {name: [result[phase][name] for result in results] for name in results[0][phase]}
        margins = {
            name: [
                1 - model / baseline for model, baseline in zip(columns["model"], columns[name], strict=True)
            ]
            for name in ("marginal", "depth-conditional")
        }
        rows.append(
            {
                "data": phase,
                "model": spread(columns["model"], "{:.4f}"),
                "marginal": spread(columns["marginal"], "{:.4f}"),
                "depth-conditional": spread(columns["depth-conditional"], "{:.4f}"),
                "below marginal": spread(margins["marginal"], "{:.2%}"),
                "below depth-conditional": spread(margins["depth-conditional"], "{:.2%}"),
            }
        )
    notice(results_table(rows))
    if len(results) > 1:
        notice(f"\nmean ± standard deviation over {len(results)} seeds, each with its own split of the cells")
    notice(
        "\nmarginal: a gene's distribution over training cells. depth-conditional: the same among cells of similar "
        "depth;\na model that does not beat it has learned how deeply a cell was sequenced, and nothing of the cell."
    )
    baselines = {
        phase: {name: loss for name, loss in losses.items() if name != "model"}
        for phase, losses in results[-1].items()
    }
    plot = run_folder / "loss.png"
    plot_losses(
        read_metrics(run_folder / "metrics.jsonl"),
        plot,
        title="Quickstart: masked expression prediction",
        loss_label="loss (nats per masked gene)",
        baselines=baselines,
    )
    notice(f"\nLoss plot: {plot}")


def spread(values: list[float], form: str) -> str:
    """Return one value, or mean and standard deviation of several."""
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(statistics.mean(values))} ± {form.format(statistics.stdev(values))}"


if __name__ == "__main__":
    sys.exit(main())
