"""Pretrain on 558 cells without their types, then fine-tune, and score both on cells held out, over several seeds.

    python benchmarks/pbmc68k_recipe.py                  # five seeds, as in docs/recipes.md
    python benchmarks/pbmc68k_recipe.py --seeds 1
    python benchmarks/pbmc68k_recipe.py --set datasets.0.epochs=5

Runs the user's commands for configs/pbmc68k.yaml and configs/pbmc68k_finetune.yaml, each seed with its own split of the
cells, and puts the probes of the embedding beside those of the same network at random initialisation, of a random
projection, of principal components and of all genes. Trainings that are complete in the output folder are taken
from there; others go on where they stopped.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._commands import call
from data.loader import CellSource, DrawKey
from trainer.config import load_run_config
from trainer.dotted import resolve
from trainer.metrics_file import read_metrics
from trainer.plots import results_table
from trainer.saved_model import SavedModel, open_model
from trainer.scoring import linear_probe
from trainer.scoring.cells import Cells
from trainer.scoring.embedding_baselines import depth_r2, representations
from trainer.scoring.specs import LinearProbeSpec

SAMPLE = ROOT / "data" / "samples" / "10x_pbmc68k_reduced.h5ad"
LABEL = "bulk_labels"
SPEC = LinearProbeSpec(cell_type_key=LABEL)
CELLS_PER_BATCH = 20
Figures = dict[str, dict[str, float]]
"""Figures by representation and by what was measured."""


def main(argv: list[str] | None = None) -> None:
    """Train every seed and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="trainings, each with its own seed and split")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "pbmc68k", help="folder of the runs")
    parser.add_argument("--skip-finetuning", action="store_true", help="only pretrain")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the pretraining"
    )
    arguments = parser.parse_args(argv)
    output = arguments.output.resolve()
    cells = read_cells()
    found: list[Figures] = []
    for seed in range(arguments.seeds):
        pretrained = pretrain(output, seed, arguments.set)
        figures = score(pretrained, cells, seed)
        if not arguments.skip_finetuning:
            fine_tuned = fine_tune(output, seed, pretrained)
            figures["fine-tuned"] = score_fine_tuned(fine_tuned, held_out(pretrained), cells)
        found.append(figures)
        report(found)


def pretrain(output: Path, seed: int, changes: list[str]) -> Path:
    """Pretrain by the user's command and return the run folder."""
    name = f"pbmc68k_seed_{seed}"
    launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
    split = f"datasets.0.dataloader_args.split_seed={seed}"
    call(
        [
            *launch,
            "trainer/train.py",
            "--config",
            "configs/pbmc68k.yaml",
            *of_run(output, name, seed),
            split,
            *changes,
        ]
    )
    return run_folder(output, name)


def fine_tune(output: Path, seed: int, pretrained: Path) -> Path:
    """Fine-tune by the user's command and return the run folder."""
    name = f"pbmc68k_finetune_seed_{seed}"
    settings = [
        f"finetune.checkpoint_path={pretrained}",
        f"training.run_name={name}",
        f"training.checkpoint_dir={output}",
        f"training.seed={seed}",
        "training.resume_from=auto",
    ]
    call(["-m", "trainer", "finetune", "--config", "configs/pbmc68k_finetune.yaml", *settings])
    return run_folder(output, name)


def of_run(output: Path, name: str, seed: int) -> list[str]:
    return [f"run_name={name}", f"output_dir={output}", f"seed={seed}", "resume_from=auto"]


def run_folder(output: Path, name: str) -> Path:
    return max(output.glob(f"{name}_*"), key=lambda folder: folder.stat().st_mtime)


def read_cells() -> Cells:
    """Return the expression, types and depth of the bundled cells."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is of anndata's first format
        data = anndata.read_h5ad(SAMPLE)
    return Cells(
        {LABEL: data.obs[LABEL].astype(str).to_numpy()},
        sparse.csr_array(data.raw.X),
        np.log(data.obs["n_counts"].to_numpy(np.float64)),
        "obs['n_counts']",
    )


def score(run: Path, cells: Cells, seed: int) -> Figures:
    """Return the figures of a pretrained run's embedding, and of the representations that took no training."""
    source, opened, is_held_out = source_of(run), open_model(run), held_out(run)
    features = {
        "pretrained": embed(opened, opened.model, source),
        "random initialisation": embed(opened, opened.untrained(seed), source),
        **{name.replace("_", " "): each for name, each in representations(cells, seed).items()},
    }
    labels = cells.obs[LABEL]
    figures: Figures = {}
    for name, each in features.items():
        figures[name] = {
            "probe": linear_probe.score(SPEC, each, cells).scores["accuracy"].value,
            "probe, held out": probe_held_out(each, labels, is_held_out),
            "R2 of depth": depth_r2(each, cells).value,
        }
    names, counts = np.unique(labels[~is_held_out], return_counts=True)
    figures["majority"] = {
        "probe": linear_probe.majority(SPEC, cells).scores["accuracy"].value,
        "probe, held out": float((labels[is_held_out] == names[counts.argmax()]).mean()),
    }
    figures["pretrained"]["seconds"] = seconds(run)
    return figures


def score_fine_tuned(run: Path, is_held_out: NDArray[np.bool_], cells: Cells) -> dict[str, float]:
    """Return the share of the held-out cells whose type the fine-tuned model names."""
    if not np.array_equal(held_out(run), is_held_out):
        raise SystemExit(f"{run}: other cells were held out than in the pretraining")
    source, opened = source_of(run), open_model(run)
    rows = np.flatnonzero(is_held_out)
    answers = each_batch(source, rows, lambda batch: opened.predict(batch).argmax(dim=1)).numpy()
    names = np.array(opened.label_names)
    return {
        "accuracy, held out": float((names[answers] == cells.obs[LABEL][rows]).mean()),
        "seconds": seconds(run),
    }


def source_of(run: Path) -> CellSource:
    """Open the cells of a run as its last phase did."""
    phase = load_run_config(run / "config.yaml").datasets[-1]
    return resolve(phase.dataloader_factory, "dataloader_factory")(**phase.dataloader_args)


def held_out(run: Path) -> NDArray[np.bool_]:
    validation = source_of(run).validation
    assert validation is not None and validation.row_mask is not None
    return validation.row_mask


def embed(opened: SavedModel, model: torch.nn.Module, source: CellSource) -> NDArray[np.float32]:
    """Return the embeddings of all cells in the order of the file."""
    of_model = SavedModel(opened.path, model, opened.tokenizer, opened.untrained)
    return each_batch(source, np.arange(len(source)), of_model.embed).numpy()


def each_batch(
    source: CellSource, rows: NDArray[np.int64], compute: Callable[[dict], torch.Tensor]
) -> torch.Tensor:
    draw = DrawKey(0, 0, 0)
    starts = range(0, len(rows), CELLS_PER_BATCH)
    return torch.cat(
        [compute(source.fetch_unmasked(rows[start : start + CELLS_PER_BATCH], draw)) for start in starts]
    )


def probe_held_out(
    features: NDArray[np.floating], labels: NDArray[np.str_], is_held_out: NDArray[np.bool_]
) -> float:
    """Return the probe's accuracy on the held-out cells, where it was fitted on all others."""
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=SPEC.inverse_regularization, max_iter=SPEC.max_iterations)
    )
    probe.fit(features[~is_held_out], labels[~is_held_out])
    return float(probe.score(features[is_held_out], labels[is_held_out]))


def seconds(run: Path) -> float:
    """Return how long a run took by the clock."""
    return max(float(record.get("elapsed_seconds") or 0) for record in read_metrics(run / "metrics.jsonl"))


def report(found: list[Figures]) -> None:
    """Print mean and standard deviation over the seeds."""
    rows = []
    for name in found[0]:
        row = {"representation": name}
        for measure in found[0][name]:
            values = [figures[name][measure] for figures in found]
            digits = 0 if measure == "seconds" else 3
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            row[measure] = f"{statistics.mean(values):.{digits}f}{spread}"
        rows.append(row)
    count = f"{len(found)} seed{'s, mean ± standard deviation' if len(found) > 1 else ''}"
    print(f"\n{count}\n\n{results_table(rows)}\n", flush=True)
    if "fine-tuned" in found[0]:
        gaps = [
            figures["fine-tuned"]["accuracy, held out"] - figures["all genes"]["probe, held out"]
            for figures in found
        ]
        print(f"fine-tuned less logistic regression on all genes, same cells: {gaps_text(gaps)}")
    gaps = [figures["pretrained"]["probe"] - figures["random initialisation"]["probe"] for figures in found]
    print(f"probe, pretrained less random initialisation: {gaps_text(gaps)}", flush=True)


def gaps_text(gaps: list[float]) -> str:
    return f"{statistics.mean(gaps):+.3f} (" + ", ".join(f"{gap:+.3f}" for gap in gaps) + ")"


if __name__ == "__main__":
    main()
