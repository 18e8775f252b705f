"""Prove on a user's own configuration that a killed run resumes to the same result: `python -m trainer verify-resume`.

One run is left alone, a second one is killed with SIGKILL and resumed; records, the cells that
each epoch was given, and weights are compared bit for bit.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from trainer import proofs
from trainer.cells_index import FILE as CELLS_FILE
from trainer.cells_index import EpochCells, decode_epochs
from trainer.config import load_run_config
from trainer.config.schema import LaunchConfig, RunConfig, TrackerConfig
from trainer.console import counted, notice
from trainer.dotted import look_in_current_folder
from trainer.errors import ConfigError, UserError
from trainer.exits import run_command
from trainer.launch import gpu_count, is_launched
from trainer.proofs import Difference, Processes, RunFailedError, newest_step, run_folder_of, start_training

DIFFERS = 1
LATEST_KILL = 0.8
"""Share of the time between the killed step and the last one in which a kill at a random moment falls."""


@dataclass(frozen=True)
class Proof:
    """What came out of a run, a kill and a resume."""

    last_step: int
    """Up to which the runs were compared."""
    is_at_end: bool
    """Whether that is the runs' own end."""
    killed_at: int
    """The last step of which the killed run had left a record."""
    resumed_from: int
    num_records: int
    num_tensors: int
    difference: Difference | None
    refusal: str = ""
    """Why the killed run could not be resumed; empty where it could."""

    @property
    def is_equal(self) -> bool:
        """Whether the resumed run is the one that was left alone, bit for bit."""
        return self.difference is None and not self.refusal

    def causes(self) -> list[str]:
        """Say what usually makes a difference of this kind."""
        return [] if self.difference is None else _causes(self.difference, self.resumed_from)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 where the runs are equal, 1 where they differ, 2 for the user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer verify-resume",
        allow_abbrev=False,
        description="Run a configuration for some steps, kill a second run of it, resume that, and compare the two "
        "bit for bit.",
        epilog="Exit codes: 0 equal, 1 they differ or a run failed, 2 a mistake in the command or its files, "
        "130 interrupted.",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="the YAML file of the run")
    add(
        "--kill-at", required=True, type=_count, metavar="STEP", help="the optimizer step after which to kill"
    )
    add(
        "--steps-after",
        type=_count,
        default=5,
        metavar="STEPS",
        help="optimizer steps to compare after it, and between checkpoints (default 5)",
    )
    add("--ranks", type=_count, metavar="N", help="processes of each run (default: as the file says, or 1)")
    add(
        "--seed",
        type=int,
        help="kill at a random moment after STEP, drawn with this seed (default: at once)",
    )
    add("--timeout", type=_count, default=1800, metavar="SECONDS", help="for each run (default 1800)")
    add("--keep", action="store_true", help="keep the folder with the runs, and say where it is")
    add("--finetune", action="store_true", help="the file is for `finetune`")
    add("overrides", nargs="*", metavar="key=value", help="set one value, as in training")
    try:
        arguments = parser.parse_intermixed_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    return run_command(lambda: _verify_and_say(arguments))


def _verify_and_say(arguments: argparse.Namespace) -> int:
    if is_launched():
        raise UserError(
            "verify-resume starts its processes itself: run it without a launcher, with --ranks N"
        )
    look_in_current_folder()
    command = "finetune" if arguments.finetune else "train"
    config = load_run_config(arguments.config, arguments.overrides, command)
    num_ranks = arguments.ranks or config.launch.num_processes or 1
    gpus = gpu_count(config)
    if 0 < gpus < num_ranks:
        raise ConfigError(
            f"--ranks {num_ranks} takes a GPU each, and this machine has {gpus}; device=cpu uses none"
        )
    folder = Path(tempfile.mkdtemp(prefix="cellphase-verify-resume-"))
    try:
        with proofs.ending_on_signals():
            proof = prove_resume(
                config,
                folder,
                kill_at=arguments.kill_at,
                steps_after=arguments.steps_after,
                num_ranks=num_ranks,
                seed=arguments.seed,
                timeout=arguments.timeout,
            )
    except RunFailedError as error:
        if error.is_mistake:
            raise UserError(str(error)) from None
        notice(f"not compared: {error}")
        return DIFFERS
    finally:
        if arguments.keep:
            notice(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    notice(render(proof, num_ranks))
    return 0 if proof.is_equal else DIFFERS


def prove_resume(
    config: RunConfig,
    folder: Path,
    *,
    kill_at: int,
    steps_after: int = 5,
    num_ranks: int = 1,
    seed: int | None = None,
    timeout: float = 1800,
    variables: Mapping[str, str] | None = None,
    say: Callable[[str], None] = notice,
) -> Proof:
    """Run once, kill a second run and resume it, and compare.

    The runs are stopped when the checkpoint of the last step to compare is complete, so that the configuration's own
    phases and schedules stay as they are; a run that ends before is compared up to its end.

    Args:
        config: the configuration, of which nothing but `watched_config` is changed.
        folder: an empty folder for the runs.
        kill_at: the optimizer step after which the second run is killed.
        steps_after: optimizer steps to compare after it, at least.
        num_ranks: processes of each run.
        seed: of the random moment of the kill; None: as soon as the step and a checkpoint are there.
        timeout: for each run, in seconds.
        variables: what the environment of the runs holds beside this process's.
        say: is told what is being done.

    Raises:
        RunFailedError: a run that should go well did not.
        UserError: the run is over before it can be killed.
    """
    every = min(kill_at, steps_after)
    last = every * -(-(kill_at + steps_after) // every)
    whole, broken = folder / "whole", folder / "killed"
    say(f"1 of 3: a run that is left alone, to step {last}")
    reference = watched_config(config, whole, every, last)
    with start_training(reference, folder, "whole", num_ranks, variables) as run:
        reaches_last, seconds_after = _run_alone(run, whole, kill_at, last, timeout)
    expected = _made(whole)
    if not reaches_last:
        last = newest_step(expected) or 0
        if last <= kill_at:
            raise UserError(
                f"--kill-at {kill_at}: the run has {last} optimizer steps; choose an earlier step"
            )
    say(f"2 of 3: the same run, killed at step {kill_at}")
    watched = watched_config(config, broken, every, last)
    with start_training(watched, folder, "killed", num_ranks, variables) as run:
        delay = 0.0 if seed is None else random.Random(seed).uniform(0, LATEST_KILL * seconds_after)
        kill(run, broken, kill_at, timeout, delay)
    resumed = _made(broken)
    killed_at, resumed_from = proofs.last_recorded_step(resumed), newest_step(resumed) or 0
    if resumed_from >= last:
        raise UserError(
            f"the run was past step {last} before it could be killed: its steps are too fast; set --steps-after higher"
        )
    say(f"3 of 3: resumed from the checkpoint of step {resumed_from}, to step {last}")
    again = watched.model_copy(update={"resume_from": str(resumed)})
    try:
        with start_training(again, folder, "resumed", num_ranks, variables) as run:
            reached = run.wait_until(lambda: has_saved(broken, last), "the resumed run", timeout)
        refusal = ""
        if not reached and newest_step(resumed) != last:
            refusal = f"the resumed run ended after step {newest_step(resumed)}, the other after step {last}"
    except RunFailedError as error:
        refusal = str(error)
    num_records, num_tensors, difference = (0, 0, None) if refusal else _compared(expected, resumed, last)
    return Proof(
        last, not reaches_last, killed_at, resumed_from, num_records, num_tensors, difference, refusal
    )


def _run_alone(run: Processes, folder: Path, kill_at: int, last: int, timeout: float) -> tuple[bool, float]:
    """Tell whether a run that is left alone came to the last step, and how many seconds after the kill's step."""
    name = "the run that is left alone"
    if not run.wait_until(lambda: has_taken(folder, kill_at), name, timeout):
        return False, 0.0
    started = time.monotonic()
    reaches_last = run.wait_until(lambda: has_saved(folder, last), name, timeout)
    return reaches_last, time.monotonic() - started


def _compared(expected: Path, resumed: Path, last: int) -> tuple[int, int, Difference | None]:
    """Return how many records and tensors of two runs were compared up to a step, and their first difference."""
    records = [proofs.records_until(run_folder, last) for run_folder in (expected, resumed)]
    weights = [proofs.weights_at(run_folder, last) for run_folder in (expected, resumed)]
    difference = (
        proofs.compare_records(records[0], records[1])
        or compare_cells(*(cells_at(run_folder, last) for run_folder in (expected, resumed)))
        or proofs.compare_weights(*weights)
    )
    return len(records[0]), len(weights[0]), difference


def cells_at(run_folder: Path, step: int) -> list[EpochCells]:
    """Return what each epoch had been given at a checkpoint."""
    path = run_folder / f"checkpoint_{step}" / CELLS_FILE
    return decode_epochs(path.read_text(encoding="utf-8"), str(path))


def compare_cells(expected: Sequence[EpochCells], got: Sequence[EpochCells]) -> Difference | None:
    """Return the first count of cells that differs, None where the epochs were given equally many of each kind."""
    for one, other in zip_longest(expected, got):
        named = other if one is None else one
        assert named is not None
        place = f"{named.unit} of phase '{named.phase}', epoch {named.epoch}"
        for name in ("drawn", "seen", "outside", "in_skipped_steps", "is_over"):
            values = [getattr(each, name, None) for each in (one, other)]
            if values[0] != values[1]:
                return Difference(named.stretches[-1].last_step, place, name, values[0], values[1])
    return None


def watched_config(config: RunConfig, output_dir: Path, save_every: int, keep: int) -> RunConfig:
    """Return a configuration whose run can be watched, killed and compared, and touches nothing of the user's.

    Args:
        config: the user's.
        output_dir: where the run goes.
        save_every: optimizer steps between checkpoints.
        keep: checkpoints at multiples of this step are kept for good.
    """
    changes = {
        "save_every_steps": save_every,
        "log_every_steps": 1,
        "benchmarks": None,
        "scoring": None,
    }
    return config.model_copy(
        update={
            "output_dir": str(output_dir),
            "log_dir": None,
            "resume_from": None,
            "export_to": None,
            "max_wall_seconds": None,
            "trackers": (TrackerConfig(name="csv"),),
            "launch": LaunchConfig(strategy=config.launch.strategy),
            "checkpoint": config.checkpoint.model_copy(update={"keep_last": 2, "keep_every_steps": keep}),
            "datasets": tuple(phase.model_copy(update=changes) for phase in config.datasets),
        }
    )


def has_taken(output_dir: Path, step: int) -> bool:
    """Tell whether the run in a folder has taken a step."""
    return proofs.last_recorded_step(run_folder_of(output_dir)) >= step


def has_saved(output_dir: Path, step: int) -> bool:
    """Tell whether the run in a folder has a complete checkpoint of a step."""
    folder = run_folder_of(output_dir)
    return folder is not None and (folder / f"checkpoint_{step}" / "manifest.json").exists()


def kill(run: Processes, output_dir: Path, step: int, timeout: float, delay: float = 0.0) -> None:
    """Kill a run with SIGKILL some seconds after a step and a first checkpoint are there.

    Raises:
        RunFailedError: it failed before.
        UserError: it ended before.
    """

    def can_be_killed() -> bool:
        return has_taken(output_dir, step) and newest_step(run_folder_of(output_dir)) is not None

    if not run.wait_until(can_be_killed, "the run to be killed", timeout):
        raise UserError(
            "the run ended before it could be killed; its steps are too fast, or --kill-at is too late"
        )
    time.sleep(delay)
    run.kill()


def render(proof: Proof, num_ranks: int) -> str:
    """Return the outcome as text."""
    processes = counted(num_ranks, "process", "processes")
    end = ", where the run ends" if proof.is_at_end else ""
    how = f"killed after step {proof.killed_at}, resumed from step {proof.resumed_from}, {processes}"
    if proof.is_equal:
        return (
            f"equal bit for bit up to step {proof.last_step}{end}: {proof.num_records} records (all but the clock) and "
            f"{proof.num_tensors} tensors of weights; {how}\n"
            "not compared: benchmarks and scores between epochs, which were left out"
        )
    if proof.refusal:
        return f"NOT RESUMED: {proof.refusal}\n{how}"
    causes = [f"  - {cause}" for cause in proof.causes()]
    return "\n".join(
        [f"DIFFERENT: {proof.difference} (left alone against resumed)", how, "usual causes:", *causes]
    )


def _causes(difference: Difference, resumed_from: int) -> list[str]:
    if difference.step is not None and difference.step <= resumed_from:
        return [
            "this step came before the kill: two runs of this configuration differ without any resume",
            "a generator of your own without a fixed seed (numpy.random.default_rng(), random.Random()), the time, a "
            "process id, or the order of a set in your code",
            "on a GPU: operations that add up in no fixed order; torch.use_deterministic_algorithms(True) names them",
            "files that changed between the two runs",
        ]
    name = difference.field
    if name == "the record" or name in ("kind", "global_step", "phase", "phase_step", "epoch"):
        return ["a loader whose length changes from one start to the next: it must yield the same cells"]
    loader = (
        "a loader that does not come back to its place: make it addressable by row (a map-style data set), or give it "
        "state_dict and load_state_dict; see docs/your_own_code.md"
    )
    if name in ("cells", "tokens", "padded_tokens", "drawn", "seen", "outside"):
        return [loader]
    if name == "lr" or name.startswith("lr/"):
        return ["a scheduler or optimizer of your own whose state_dict does not hold all of its state"]
    return [
        "random state of your own (a torch.Generator, numpy.random.Generator or random.Random of a model, loss, data "
        "set or loader): draw from the global ones, which a checkpoint holds, or from (seed, epoch, row)",
        "a plain attribute of the model or loss that training changes: register it as a buffer",
        loader,
        "on a GPU: operations that add up in no fixed order; torch.use_deterministic_algorithms(True) names them; "
        "compare two runs that nobody kills",
    ]


def _made(output_dir: Path) -> Path:
    folder = run_folder_of(output_dir)
    assert folder is not None, "a run that takes steps has a folder"
    return folder


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError("expected a whole number of 1 or more")
    return count


if __name__ == "__main__":
    raise SystemExit(main())
