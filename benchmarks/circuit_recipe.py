"""Train circuits of an asked entanglement on the bundled set, draw new ones, and score them beside chance, over seeds.

    python benchmarks/circuit_recipe.py                  # three seeds, as in docs/recipes.md
    python benchmarks/circuit_recipe.py --seeds 1
    python benchmarks/circuit_recipe.py --set training.training.max_steps=500

Runs the user's commands, `trainer/train.py` with the preset srv_3q_recipe and `python -m trainer sample`, and puts the
share of drawn circuits that have the asked Schmidt-rank vector beside that of random circuits of the same length, and
beside its share in the data. Trainings and draws that are complete in the output folder are taken from there.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._commands import call
from data.known_circuits import read_known_circuits
from trainer.plots import results_table

DATASET = ROOT / "data" / "samples" / "circuits" / "srv_3q"
PRESET = "srv_3q_recipe"


def main(argv: list[str] | None = None) -> None:
    """Train and draw with every seed, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings, each with its own seed")
    parser.add_argument("--num", type=int, default=128, help="circuits drawn for each prompt")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[1.0], help="how far prompts are followed"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "runs" / "circuits" / "recipe", help="folder of the models"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the training")
    arguments = parser.parse_args(argv)
    output = arguments.output.resolve()
    prompts = sorted(set(read_known_circuits(DATASET).prompts))
    models = [train(output / f"seed_{seed}", seed, arguments.set) for seed in range(arguments.seeds)]
    for guidance in arguments.guidance:
        found = [
            draw(model, prompts, seed, guidance=guidance, num=arguments.num)
            for seed, model in enumerate(models)
        ]
        print(f"\nguidance {guidance:g}, {arguments.num} circuits for each prompt and seed", flush=True)
        report(prompts, found)


def train(folder: Path, seed: int, changes: Sequence[str]) -> Path:
    """Train by the user's command and return the folder of the model."""
    if not (folder / "config.json").is_file():
        settings = [f"training.general.output_path={folder}", f"training.training.seed={seed}", *changes]
        config = ["--config", "configs/circuits/config.yaml", f"training={PRESET}", *settings]
        call(["trainer/train.py", *config, "training.general.resume=auto"])
    return folder


def draw(
    model: Path, prompts: Sequence[str], seed: int, *, guidance: float, num: int
) -> list[dict[str, Any]]:
    """Draw by the user's command and return the figures of each prompt."""
    output = model / f"samples_guidance_{guidance:g}_of_{num}"
    if not output.is_dir():
        asked = [part for prompt in prompts for part in ("--prompt", prompt)]
        options = [
            "--num",
            num,
            "--guidance",
            guidance,
            "--seed",
            seed,
            "--dataset",
            DATASET,
            "--batch-size",
            256,
        ]
        call(["-m", "trainer", "sample", "--model", model, "--output", output, *asked, *options])
    return json.loads((output / "scores.json").read_text())["prompts"]


def report(prompts: Sequence[str], found: Sequence[list[dict[str, Any]]]) -> None:
    """Print mean and standard deviation over the seeds, of each prompt and of those that ask for entanglement."""
    rows = [row(prompt, [scores[index] for scores in found]) for index, prompt in enumerate(prompts)]
    entangled = [index for index, prompt in enumerate(prompts) if "2" in prompt]
    rows.append(
        row(f"mean of {len(entangled)} entangled", [mean_of([s[i] for i in entangled]) for s in found])
    )
    print(f"{len(found)} seeds, mean ± standard deviation\n\n{results_table(rows)}\n", flush=True)
    for seed, scores in enumerate(found):
        mine = mean_of([scores[index] for index in entangled])
        times = mine["right"] / max(mine["random_right"], mine["label_frequency"])
        print(f"seed {seed}: right {mine['right']:.3f}, {times:.1f} times the higher chance", flush=True)


def row(name: str, scores: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return a line of the table: one prompt over the seeds."""
    figures = {
        "valid": [each["valid"] for each in scores],
        "right": [each["right"] for each in scores],
        "random circuits": [each["random_right"] for each in scores],
        "share in data": [each["label_frequency"] for each in scores],
        "new and right": [each["new_right"] / each["num_circuits"] for each in scores],
    }
    return {"prompt": name} | {key: mean_and_spread(values) for key, values in figures.items()}


def mean_of(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of some prompts' figures."""
    keys = ("valid", "right", "random_right", "label_frequency", "new_right", "num_circuits")
    return {key: statistics.mean(each[key] for each in scores) for key in keys}


def mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
