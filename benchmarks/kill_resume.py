"""Kill a run with SIGKILL at random moments, resume it, and compare with a run that was left alone, bit for bit.

    python benchmarks/kill_resume.py --trials 20 --ranks 1 2
    python benchmarks/kill_resume.py --trials 5 --ranks 3 4
    python benchmarks/kill_resume.py --trials 5 --ranks 2 --strategy zero3

Two phases (our own cell loader on the bundled-like synthetic corpus, and a user's map-style loader with random
augmentation), dropout on, accumulation 2, a checkpoint every other step. Prints one line a trial and the count of
equal ones; exits with 1 if any differs.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from launching import RankGroup, start_ranks
from running import newest_run, strategy_environment, toy, write_config
from torch import Tensor

from trainer.proofs import (
    Difference,
    compare_records,
    compare_weights,
    newest_step,
    records_until,
    weights_at,
)

FIRST_STEP = "one 1/"
"""What a run prints when training has begun."""

STARTED = "parameters "
"""What a run prints in its account; a resumed one may have nothing left to do."""


def configuration(global_batch_size: int) -> dict[str, Any]:
    """Return a run of some seconds: two phases, dropout, accumulation, frequent checkpoints."""
    model = {
        "model_class": "toy.ToyModel",
        "config_class": "toy.ToyConfig",
        "config_args": {"dropout": 0.2, "width": 64},
    }
    common = {
        "save_every_steps": 2,
        "log_every_steps": 1,
        "dataloader_factory": "toy.map_loader",
        "dataloader_args": {"num_cells": 211, "noisy": True, "seconds_per_cell": 0.0005},
        "warmup_steps": 3,
    }
    return toy(
        {**common, "name": "one", "epochs": 3, "schedule": "cosine"},
        {**common, "name": "two", "epochs": 2, "lr": 0.003, "eval_every_steps": 4},
        model=model,
        global_batch_size=global_batch_size,
        checkpoint={"keep_last": 3},
    )


def start(num_ranks: int, folder: Path, strategy: str, **changes: Any) -> RankGroup:
    """Start the run on some ranks."""
    path = write_config(folder, configuration(8 * num_ranks), **changes)
    script = [ROOT / "trainer" / "train.py", "--config", path]
    environment = {
        "PYTHONPATH": str(ROOT / "tests"),
        **strategy_environment(folder, strategy, num_ranks, sub_group_size=2000),
    }
    return start_ranks(num_ranks, script, env=environment)


def run_to_end(num_ranks: int, folder: Path, strategy: str, **changes: Any) -> tuple[Path, float]:
    """Run without a kill and return the run folder and the seconds between the first step and the end."""
    with start(num_ranks, folder, strategy, **changes) as group:
        group.wait_for(FIRST_STEP)
        began = time.monotonic()
        group.wait()
    return newest_run(folder), time.monotonic() - began


def kill_once(num_ranks: int, folder: Path, strategy: str, seconds: float, **changes: Any) -> str:
    """Start the run, kill all its ranks some seconds after the first step, and say what they were doing."""
    with start(num_ranks, folder, strategy, **changes) as group:
        group.wait_for(STARTED if changes else FIRST_STEP)
        time.sleep(seconds)
        was_running = group.is_running()
        group.kill()
        said = group.output().strip().splitlines()[-1]
    saving = any((folder / "runs").glob("*/.checkpoint_*"))
    where = "during a save" if saving else "between saves"
    return f"{where}, after '{said[:44]}'" if was_running else "after its end"


def trial(
    number: int, num_ranks: int, strategy: str, reference: Path, seconds: float, chance: random.Random
) -> bool:
    """Kill once or twice, resume to the end, and compare."""
    folder = Path(tempfile.mkdtemp(prefix="kill_resume_"))
    try:
        moments = [kill_once(num_ranks, folder, strategy, chance.uniform(0, seconds))]
        if chance.random() < 0.3:
            later = chance.uniform(0, seconds / 2)
            moments.append(kill_once(num_ranks, folder, strategy, later, resume_from="auto"))
        resumed = run_rest(num_ranks, folder, strategy)
        found = difference(reference, resumed)
        said = "equal" if found is None else f"DIFFERENT at {found}"
        print(f"{num_ranks} ranks, trial {number}: {said}; killed {'; '.join(moments)}")
        return found is None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def difference(reference: Path, resumed: Path) -> Difference | None:
    """Return where two runs differ first: in a record, or in the weights at the end; None: nowhere."""
    in_records = compare_records(records_until(reference), records_until(resumed))
    return in_records or compare_weights(final_weights(reference), final_weights(resumed))


def final_weights(run_folder: Path) -> dict[str, Tensor]:
    """Return the weights of the newest checkpoint."""
    step = newest_step(run_folder)
    assert step is not None
    return weights_at(run_folder, step)


def run_rest(num_ranks: int, folder: Path, strategy: str) -> Path:
    """Resume to the end; a run that was killed before its first checkpoint starts afresh."""
    with start(num_ranks, folder, strategy, resume_from="auto") as group:
        group.wait()
    return newest_run(folder)


def run_trials(num_ranks: int, trials: int, strategy: str = "ddp", seed: int = 0) -> int:
    """Return how many of the trials ended equal to a run that was left alone."""
    folder = Path(tempfile.mkdtemp(prefix="kill_reference_"))
    try:
        reference, seconds = run_to_end(num_ranks, folder, strategy)
        chance = random.Random(seed)
        equal = sum(
            trial(number, num_ranks, strategy, reference, seconds, chance) for number in range(1, trials + 1)
        )
        print(f"{strategy}, {num_ranks} ranks: {equal} of {trials} equal bit for bit", flush=True)
        return equal
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Run the trials for each number of ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=20, help="kills for each number of ranks")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks to try")
    parser.add_argument(
        "--strategy", default="ddp", choices=["ddp", "zero1", "zero2", "zero3"], help="how they train"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    arguments = parser.parse_args()
    results = [
        run_trials(ranks, arguments.trials, arguments.strategy, arguments.seed) for ranks in arguments.ranks
    ]
    return 0 if all(equal == arguments.trials for equal in results) else 1


if __name__ == "__main__":
    sys.exit(main())
