"""Train on perturbed cells, predict perturbations that were held out, and score them beside baselines, over seeds.

    python benchmarks/perturbation_recipe.py                       # five seeds of the simulator, as in docs/recipes.md
    python benchmarks/perturbation_recipe.py --seeds 1
    python benchmarks/perturbation_recipe.py --data FILE.h5ad      # of your own: obs target_gene and cell_type
    python benchmarks/perturbation_recipe.py --data FILE.h5ad --hold-out pairs
    python benchmarks/perturbation_recipe.py --first-seed 100      # other seeds, to choose settings on
    python benchmarks/perturbation_recipe.py --set datasets.0.epochs=5

Runs the user's commands: train, predict and score (cell-eval2, preset vcc2026; extra vcc). On the simulator a seed
decides the data, a quarter of the targets that is held out in all cell types, and the model. On a file it decides which
targets are held out in one cell type, out of those that were perturbed in all cell types; seeds take turns with the
cell types. The mean response is learned from the training cells, and the ceiling is one half of the real cells as a
prediction of the other. Parts that are complete in the output folder are taken from there.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._commands import call
from data.simulator import CONTROL, write_simulated_h5ad

SIMULATOR = "simulator"
HELD_OUT_SHARE = 0.25
HELD_OUT_IN_CELL_TYPE = 4
"""Targets held out in a file's cell type, or pairs."""
MIN_CELLS = 30
"""Cells that a target needs in every cell type of a file to be held out in one."""
LOWER_IS_BETTER = ("expr_mse_unbiased_capped_norm", "de_wilcoxon_lfc_nmae")
METRICS = (
    "pds_cosine",
    "expr_mse_unbiased_capped_norm",
    "de_wilcoxon_direction_fidelity_yield_raw",
    "de_wilcoxon_direction_reach_raw",
    "de_wilcoxon_sig_jaccard",
    "de_wilcoxon_lfc_nmae",
)
MODEL, MEAN_RESPONSE, CONTROLS, CEILING = "model", "mean response", "controls", "ceiling"
EFFECT = "effect correlation"
Figures = dict[str, dict[str, float]]
"""Figures by representation and metric."""
Changes = dict[tuple[str, str], np.ndarray]
"""Changes of all genes by target and cell type."""


class Task(NamedTuple):
    """Hold what one seed trains on and holds out."""

    corpus: Path
    config: str
    settings: list[str]
    """Overrides that say what is held out."""
    told: str
    """What is held out, for people."""


def main(argv: list[str] | None = None) -> int:
    """Train, predict and score every seed, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="trainings, each with its own seed and split")
    parser.add_argument("--first-seed", type=int, default=0, help="the others follow it")
    parser.add_argument("--data", default=SIMULATOR, help="`simulator`, or an h5ad file with counts")
    parser.add_argument(
        "--hold-out", choices=("cell-type", "pairs"), default="cell-type", help="what a file's seeds hold out"
    )
    parser.add_argument("--simulate", nargs="*", default=[], metavar="OPTION=VALUE", help="of the simulator")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "perturbation_recipe")
    parser.add_argument("--num-steps", type=int, default=4, help="passes through the network for each cell")
    parser.add_argument(
        "--no-scores",
        action="store_true",
        help="only effect correlations, as where cell-eval2 finds no effect",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the training")
    arguments = parser.parse_args(argv)
    output = arguments.output.resolve()
    found = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        options = dict(each.split("=", 1) for each in arguments.simulate)
        task = make_task(arguments.data, arguments.hold_out, options, output, seed)
        print(f"\nseed {seed}: held out {task.told}", flush=True)
        has_scores = not arguments.no_scores
        found.append(
            measure(task, output / f"seed_{seed}", seed, arguments.set, arguments.num_steps, has_scores)
        )
        print(f"\n{table(found)}\n", flush=True)
    return 0


def make_task(data: str, hold_out: str, options: dict[str, str], output: Path, seed: int) -> Task:
    """Make or convert the data, and choose what is held out."""
    output.mkdir(parents=True, exist_ok=True)
    if data == SIMULATOR:
        path = output / f"simulated_{seed}.h5ad"
        if not path.exists():
            write_simulated_h5ad(
                path, seed=seed, **{key: json.loads(value) for key, value in options.items()}
            )
        return simulated_task(path, convert(path, output), seed)
    path = Path(data).resolve()
    make = pair_task if hold_out == "pairs" else cell_type_task
    return make(path, convert(path, output), seed)


def convert(path: Path, output: Path) -> Path:
    corpus = output / f"{path.stem}_corpus"
    call(["-m", "trainer.convert_h5ad", path, "--output", corpus, "--resume"])
    return corpus


def simulated_task(path: Path, corpus: Path, seed: int) -> Task:
    """Hold a share of all targets out, in all cell types."""
    targets = sorted(set(read_obs(path)["target_gene"]) - {CONTROL})
    order = np.random.default_rng(seed).permutation(targets)
    chosen = sorted(order[: round(HELD_OUT_SHARE * len(targets))].tolist())
    held_out = f"datasets.0.dataloader_args.held_out_genes={json.dumps(chosen)}"
    return Task(corpus, "configs/perturbation_simulated.yaml", [held_out], ", ".join(chosen))


def cell_type_task(path: Path, corpus: Path, seed: int) -> Task:
    """Hold targets out in one cell type that were perturbed in all of them."""
    counts = cell_counts(path)
    everywhere = sorted(counts.index[(counts >= MIN_CELLS).all(axis=1)])
    if counts.shape[1] < 2 or len(everywhere) <= HELD_OUT_IN_CELL_TYPE:
        raise SystemExit(
            f"{path}: {len(everywhere)} targets have at least {MIN_CELLS} cells in each of {counts.shape[1]} cell "
            f"types; holding some out needs more than {HELD_OUT_IN_CELL_TYPE} targets, and 2 cell types"
        )
    cell_type = sorted(counts.columns)[seed % counts.shape[1]]
    chosen = sorted(np.random.default_rng(seed).permutation(everywhere)[:HELD_OUT_IN_CELL_TYPE].tolist())
    return _combination_task(corpus, chosen, cell_type)


def pair_task(path: Path, corpus: Path, seed: int) -> Task:
    """Hold pairs out in the cell type with most of those whose two targets were perturbed each on its own there."""
    counts = cell_counts(path)
    enough = {name: set(counts.index[counts[name] >= MIN_CELLS]) for name in counts.columns}
    pairs = {
        name: sorted(each for each in there if each.count("+") == 1 and set(each.split("+")) <= there)
        for name, there in enough.items()
    }
    cell_type = max(sorted(pairs), key=lambda name: len(pairs[name]))
    if len(pairs[cell_type]) < HELD_OUT_IN_CELL_TYPE:
        raise SystemExit(
            f"{path}: the most pairs of a cell type whose targets have {MIN_CELLS} cells each on their own are "
            f"{len(pairs[cell_type])}; holding some out needs {HELD_OUT_IN_CELL_TYPE}"
        )
    order = np.random.default_rng(seed).permutation(pairs[cell_type])
    return _combination_task(corpus, sorted(order[:HELD_OUT_IN_CELL_TYPE].tolist()), cell_type)


def _combination_task(corpus: Path, chosen: list[str], cell_type: str) -> Task:
    combinations = json.dumps([{"target_gene": chosen, "cell_type": cell_type}])
    settings = [f"datasets.0.dataloader_args.held_out_combinations={combinations}"]
    return Task(
        corpus, "configs/perturbation_cell_lines.yaml", settings, f"{', '.join(chosen)} in {cell_type}"
    )


def cell_counts(path: Path) -> pd.DataFrame:
    """Return the number of cells of each target and cell type."""
    obs = read_obs(path)
    return pd.crosstab(obs["target_gene"], obs["cell_type"]).drop(index=CONTROL)


def read_obs(path: Path) -> pd.DataFrame:
    data = anndata.read_h5ad(path, backed="r")
    columns = {name: data.obs[name].astype(str).to_numpy() for name in ("target_gene", "cell_type")}
    data.file.close()
    return pd.DataFrame(columns)


def measure(
    task: Task, folder: Path, seed: int, changes: list[str], num_steps: int, has_scores: bool
) -> Figures:
    """Train, predict and score one seed; what is there is not made again."""
    folder.mkdir(exist_ok=True)
    launch = ("-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml")
    settings = [
        f"datasets.0.dataloader_args.path={task.corpus}",
        *task.settings,
        "run_name=run",
        f"output_dir={folder}",
        f"seed={seed}",
        "resume_from=auto",
        *changes,
    ]
    started = time.perf_counter()
    call([*launch, "trainer/train.py", "--config", task.config, *settings])
    seconds = time.perf_counter() - started
    run = max(folder.glob("run_*"), key=lambda each: each.stat().st_mtime)
    files = {name: folder / f"{name}.h5ad" for name in ("predicted", "real", "train")}
    call(["-m", "trainer", "predict", "--model", run, "--data", task.corpus, "--output", files["predicted"],
         "--real", files["real"], "--train", files["train"], "--num-steps", num_steps, "--seed", seed,
         "--device", "cpu", "--overwrite"])  # fmt: skip
    figures: Figures = {MODEL: {}, MEAN_RESPONSE: {}}
    if has_scores:
        scores = folder / "scores"
        call(["-m", "trainer", "score", "--pred", files["predicted"], "--real", files["real"],
             "--train", files["train"], "--preset", "vcc2026", "--output", scores, "--seed", seed])  # fmt: skip
        figures = read_figures(scores / "results.json")
    seen = {name: changes_of(path) for name, path in files.items()}
    means = mean_changes(seen["train"], seen["real"])
    figures[MODEL][EFFECT] = effect_correlation(seen["predicted"], seen["real"])
    figures[MEAN_RESPONSE][EFFECT] = effect_correlation(means, seen["real"])
    figures[MODEL]["training seconds"] = seconds
    return figures


def read_figures(path: Path) -> Figures:
    """Return the metrics of the preset for every representation."""
    figures: Figures = {}
    for row in json.loads(path.read_text())["results"]:
        if row["metric"] in METRICS and not row["benchmark"].endswith("_score") and row["value"] is not None:
            figures.setdefault(row["representation"], {})[row["metric"]] = row["value"]
    return figures


def changes_of(path: Path) -> Changes:
    """Return how each target changes each cell type, from the controls of the type in the same file.

    A change is that of log(1 + counts per ten thousand) of the sum of the cells.
    """
    data = anndata.read_h5ad(path)
    matrix: Any = data.X
    groups = list(zip(*(data.obs[name].astype(str) for name in ("target_gene", "cell_type")), strict=True))
    bulks = {}
    for group in sorted(set(groups)):
        total = np.asarray(matrix[[each == group for each in groups]].sum(axis=0)).ravel()
        bulks[group] = np.log1p(1e4 * total / total.sum())
    return {
        (target, cell_type): bulk - bulks[CONTROL, cell_type]
        for (target, cell_type), bulk in bulks.items()
        if target != CONTROL
    }


def mean_changes(train: Changes, wanted: Iterable[tuple[str, str]]) -> Changes:
    """Return for each target that is wanted the mean change of its cell type in training."""
    return {
        (target, cell_type): np.mean(
            [change for (_, each), change in train.items() if each == cell_type], axis=0
        )
        for target, cell_type in wanted
    }


def effect_correlation(predicted: Changes, real: Changes) -> float:
    """Return the mean over targets and cell types of the correlation of predicted and measured changes."""
    return float(np.mean([np.corrcoef(change, real[key])[0, 1] for key, change in predicted.items()]))


def wins(figures: Figures, other: str) -> int:
    """Count the metrics in which the model is better."""
    signs = {metric: -1 if metric in LOWER_IS_BETTER else 1 for metric in METRICS}
    return sum(
        signs[metric] * (figures[MODEL][metric] - figures[other][metric]) > 0
        for metric in METRICS
        if metric in figures[MODEL] and metric in figures[other]
    )


def table(found: list[Figures]) -> str:
    """Return mean and standard deviation over the seeds, and the wins of each."""
    lines = [f"{len(found)} seed{'s, mean ± standard deviation' if len(found) > 1 else ''}\n"]
    if all(CEILING in each for each in found):
        lines += _metric_lines(found)
    for name in (MODEL, MEAN_RESPONSE):
        lines.append(f"\n{EFFECT}, {name}: {_text([each[name][EFFECT] for each in found])}")
    lines.append(f"\ntraining seconds: {_text([each[MODEL]['training seconds'] for each in found])}")
    return "\n".join(lines)


def _metric_lines(found: list[Figures]) -> list[str]:
    lines = [
        "| metric | better | model | mean response | controls | ceiling | wins of the model |",
        "|---|---|---|---|---|---|---|",
    ]
    for metric in METRICS:
        lower = metric in LOWER_IS_BETTER
        cells = [_text([each[name].get(metric) for each in found if name in each]) for name in
                 (MODEL, MEAN_RESPONSE, CONTROLS, CEILING)]  # fmt: skip
        better = [
            (each[MODEL][metric] < each[MEAN_RESPONSE][metric]) == lower
            and each[MODEL][metric] != each[MEAN_RESPONSE][metric]
            for each in found
            if metric in each[MODEL] and metric in each[MEAN_RESPONSE]
        ]
        won = f"{sum(better)} of {len(better)}"
        lines.append(" | ".join([f"| {metric}", "lower" if lower else "higher", *cells, f"{won} |"]))
    for other in (MEAN_RESPONSE, CONTROLS):
        lines.append(
            f"\nmetrics in which the model is better than {other}: {[wins(each, other) for each in found]}"
        )
    return lines


def _text(values: list[float | None]) -> str:
    there = [each for each in values if each is not None]
    if not there:
        return ""
    spread = f" ± {statistics.stdev(there):.3f}" if len(there) > 1 else ""
    return f"{statistics.mean(there):.3f}{spread}"


if __name__ == "__main__":
    sys.exit(main())
