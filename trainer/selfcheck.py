"""Prove on this machine what a user relies on, without data: `python -m trainer selfcheck`.

Trains a tiny model on made-up cells with the user's own command: one process against several, a killed run against one
that was left alone, an export against its checkpoint, FP8 against the precision that it stands in for.
"""

import argparse
import dataclasses
import json
import math
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from data.corpus import CorpusWriter
from data.genes import GeneSpace
from data.manifest import ObsColumn
from data.synthetic import make_synthetic_counts
from trainer import proofs
from trainer.config.schema import RunConfig
from trainer.console import notice
from trainer.doctor import check_fp8
from trainer.errors import UserError
from trainer.exits import run_command
from trainer.launch import is_launched
from trainer.proofs import RunFailedError, child_environment, compare_records, run_folder_of, start_training
from trainer.selfcheck_model import PAUSE_VARIABLE, VARIABLE
from trainer.verify_resume import prove_resume

State = Literal["passed", "failed", "not checked"]

NUM_CELLS, NUM_GENES, MEAN_GENES = 512, 48, 14
STEPS = 6
RANK_TOLERANCE = 1e-4
"""Relative difference of losses and gradient norms: sums in another order, in fp32, over a few steps."""
FP8_TOLERANCE = 0.05
"""Relative difference of the losses."""
KILL_AT, STEPS_AFTER = 4, 8
PAUSE_SECONDS = "0.03"
"""Of each forward pass of the runs to be killed."""
_REPORT = "report this with the output of `python -m trainer doctor --json`"


@dataclass(frozen=True)
class Check:
    """What came of one check."""

    name: str
    state: State
    found: str
    advice: str = ""
    """What to do about it; empty where nothing is to be done."""


@dataclass(frozen=True)
class Bench:
    """What the checks share: a folder for their runs, and what they may use."""

    folder: Path
    corpus: Path
    num_ranks: int
    device: Literal["cpu", "cuda"]
    timeout: float

    @property
    def ranks_device(self) -> Literal["cpu", "cuda"]:
        """The device of the runs on one and on several processes: GPUs where each process has one."""
        has_enough = self.device == "cuda" and torch.cuda.device_count() >= self.num_ranks
        return "cuda" if has_enough else "cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 where no check failed, 1 where one did, 2 for the user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer selfcheck",
        allow_abbrev=False,
        description="Prove on this machine, with made-up cells, that processes agree, resumes and exports are exact, "
        "and FP8 computes.",
        epilog="Exit codes: 0 no check failed, 1 one did, 2 a mistake in the command, 130 interrupted.",
    )
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="processes (default 2)")
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: a GPU where there is one"
    )
    parser.add_argument(
        "--timeout", type=float, default=180, metavar="SECONDS", help="for each run (default 180)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    return run_command(lambda: _check_and_say(arguments))


def _check_and_say(arguments: argparse.Namespace) -> int:
    if is_launched():
        raise UserError("selfcheck starts its processes itself: run it without a launcher, with --ranks N")
    if not 2 <= arguments.ranks <= 64:
        raise UserError(f"--ranks {arguments.ranks}: expected 2 to 64 processes, to compare one with")
    started = time.monotonic()
    say = (lambda text: None) if arguments.json else notice
    folder = Path(tempfile.mkdtemp(prefix="cellphase-selfcheck-"))
    try:
        with proofs.ending_on_signals():
            has_gpu = arguments.device == "auto" and torch.cuda.is_available()
            device: Literal["cpu", "cuda"] = "cuda" if has_gpu else "cpu"
            corpus = write_cells(folder / "cells")
            checks = check_all(Bench(folder, corpus, arguments.ranks, device, arguments.timeout), say)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=1), flush=True)
    else:
        notice(render(checks, time.monotonic() - started))
    return 1 if any(check.state == "failed" for check in checks) else 0


def check_all(bench: Bench, say: Callable[[str], None] = notice) -> list[Check]:
    """Make every check; one that fails keeps none of the others from being made."""
    done: list[Check] = []
    for name, check in CHECKS.items():
        say(f"checking: {name}")
        try:
            done.append(check(bench))
        except RunFailedError as error:
            advice = f"`python -m trainer doctor` looks for causes; --timeout is {bench.timeout:.0f} s for each run"
            done.append(Check(name, "failed", str(error), advice))
        except (UserError, OSError) as error:
            done.append(Check(name, "failed", str(error), "`python -m trainer doctor` looks for causes"))
    return done


def check_ranks(bench: Bench) -> Check:
    """Train on one process and on several, and compare the cells that were seen and the losses."""
    name, device = "processes", bench.ranks_device
    runs = [
        train(bench, f"{device}_fp32", 1, device=device, precision="fp32"),
        train(bench, f"{device}_fp32_ranks", bench.num_ranks, device=device, precision="fp32"),
    ]
    seen = [cells_seen(bench, run) for run in (f"{device}_fp32", f"{device}_fp32_ranks")]
    where = "on the CPU" if device == "cpu" else "on GPUs"
    what = f"1 and {bench.num_ranks} processes {where}"
    if bench.device == "cuda" and device == "cpu":
        what += f" (this machine has {torch.cuda.device_count()} GPU)"
    if seen[0] != seen[1] or not seen[0]:
        missing, surplus = (seen[0] - seen[1]).total(), (seen[1] - seen[0]).total()
        found = f"{what}: of {seen[0].total()} cells {missing} were not seen again, {surplus} others were"
        return Check(name, "failed", found, _REPORT)
    records = [_without_choices(proofs.records_until(run)) for run in runs]
    difference = compare_records(*records, is_same=_is_close)
    if difference is not None:
        advice = f"the processes do not add up to one; {_REPORT}"
        return Check(name, "failed", f"{what}: {difference}", advice)
    return Check(
        name,
        "passed",
        f"{what}: the same {seen[0].total()} cells with the same masks, losses of {STEPS} steps within "
        f"{_largest_distance(*records):.0e}",
    )


def check_resume(bench: Bench) -> Check:
    """Kill a run with dropout and resume it."""
    name, folder = "resume", bench.folder / "resume"
    folder.mkdir()
    model = {**MODEL, "config_args": {**MODEL["config_args"], "dropout": 0.1}}
    config = configuration(bench, device=bench.device, model=model, steps=4 * (KILL_AT + STEPS_AFTER))
    proof = prove_resume(
        config,
        folder,
        kill_at=KILL_AT,
        steps_after=STEPS_AFTER,
        timeout=bench.timeout,
        variables={PAUSE_VARIABLE: PAUSE_SECONDS},
        say=lambda text: None,
    )
    how = f"killed with SIGKILL after step {proof.killed_at}, resumed from step {proof.resumed_from}"
    if proof.is_equal:
        found = f"{how}: {proof.num_records} records and {proof.num_tensors} tensors equal bit for bit"
        return Check(name, "passed", found)
    if proof.refusal:
        return Check(name, "failed", f"{how}: {proof.refusal}", "`python -m trainer doctor` looks for causes")
    is_early = proof.difference is not None and (proof.difference.step or math.inf) <= proof.resumed_from
    advice = (
        "two runs differ without any resume; try --device cpu" if is_early else "a resume is not exact here"
    )
    return Check(name, "failed", f"{how}: {proof.difference}", f"{advice}; {_REPORT}")


def check_export(bench: Bench) -> Check:
    """Export the checkpoint of the first run, and let a fresh process compute with both."""
    name = "export"
    run = run_folder_of(bench.folder / "resume" / "whole")
    if run is None or proofs.newest_step(run) is None:
        return Check(name, "not checked", "no run left a checkpoint to export", "see the check above")
    out = bench.folder / "exported"
    trusted = MODEL["model_class"].rpartition(".")[0]
    command = [sys.executable, "-P", "-m", "trainer", "export", str(run), str(out), "--trust", trusted]
    with proofs.Processes(command, [child_environment()], bench.folder / "export.log") as export:
        export.wait("the export", bench.timeout)
        said = export.output().strip().splitlines()
    verified = next((line.strip() for line in said if "verified:" in line), "")
    if "equal bit for bit" not in verified or "computes" not in verified or not out.is_dir():
        found = verified or "the exporter compared nothing"
        return Check(name, "failed", found, _REPORT)
    return Check(name, "passed", verified.removeprefix("verified: "))


def check_precision(bench: Bench) -> Check:
    """Train in FP8 and in the precision that it stands in for."""
    name = "fp8"
    states = {finding.name: finding for finding in check_fp8()} if bench.device == "cuda" else {}
    is_real = bool(states) and all(finding.state == "ok" for finding in states.values())
    backend, device = ("te", "cuda") if is_real else ("emulate", bench.ranks_device)
    base = "bf16" if is_real else "fp32"
    reference = run_folder_of(bench.folder / f"{device}_fp32") if base == "fp32" else None
    if reference is None or proofs.last_recorded_step(reference) < STEPS:
        reference = train(bench, f"{device}_{base}_again", 1, device=device, precision=base)
    settings = {"device": device, "precision": "fp8", "fp8": {"backend": backend}}
    ours = train(bench, "fp8", 1, **settings)
    if is_real:
        what = "Transformer Engine"
    else:
        missing = next((f"{f.name}: {f.found}" for f in states.values() if f.state != "ok"), "no GPU")
        what = f"emulated ({missing})"
    losses = [_losses(run) for run in (ours, reference)]
    distances = [abs(one - two) / abs(two) for one, two in zip(*losses, strict=True)]
    far = max(distances) if all(map(math.isfinite, distances)) else math.inf
    found = f"{what} against {base}: losses of {STEPS} steps differ by {far:.2%} at most"
    if losses[0] == losses[1]:
        advice = f"no layer computed in FP8: {_REPORT}"
        return Check(name, "failed", f"{what}: the losses are those of {base}", advice)
    if not far <= FP8_TOLERANCE:
        return Check(
            name, "failed", found, f"more than {FP8_TOLERANCE:.0%}: use precision: bf16, and report this"
        )
    return Check(name, "passed", found)


CHECKS: dict[str, Callable[[Bench], Check]] = {
    "processes": check_ranks,
    "resume": check_resume,
    "export": check_export,
    "fp8": check_precision,
}

MODEL: dict[str, Any] = {
    "model_class": "trainer.selfcheck_model.WitnessEncoder",
    "config_class": "models.encoder.EncoderConfig",
    "config_args": {"hidden_dim": 32, "ffn_dim": 64, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
}


def write_cells(folder: Path) -> Path:
    """Write made-up cells as a corpus."""
    cells = make_synthetic_counts(NUM_CELLS, NUM_GENES, MEAN_GENES, seed=0)
    names = tuple(f"GENE{index}" for index in range(NUM_GENES))
    lanes = tuple(f"lane_{index}" for index in range(int(cells.technical_batch.max()) + 1))
    columns = {"technical_batch": ObsColumn("class", lanes)}
    with CorpusWriter(folder, GeneSpace(names, names, "symbol"), columns=columns) as writer:
        writer.write(cells.indptr, cells.indices, cells.counts, {"technical_batch": cells.technical_batch})
    return folder


def configuration(bench: Bench, steps: int = STEPS, **changes: Any) -> RunConfig:
    """Return a run on the made-up cells: a tiny encoder, accumulation, a few steps."""
    phase = {
        "name": "made_up",
        "dataloader_factory": "data.loader.cell_loader",
        "dataloader_args": {
            "path": str(bench.corpus),
            "tokenizer": {"strategy": "binned_expression", "n_bins": 5, "max_genes": 32},
            "masking": {"mask_ratio": 0.3, "target": "both"},
        },
        "epochs": steps,
        "max_steps": steps,
        "lr": 3e-3,
        "warmup_steps": 2,
        "schedule": "cosine",
        "log_every_steps": 1,
    }
    return RunConfig.model_validate(
        {
            "run_name": "selfcheck",
            "seed": 7,
            "num_threads": 1,
            "model": MODEL,
            "micro_batch_size": 4,
            "global_batch_size": 8 * bench.num_ranks,
            "datasets": [phase],
            **changes,
        }
    )


def train(bench: Bench, name: str, num_ranks: int, **changes: Any) -> Path:
    """Train to the end and return the run folder; the model writes down which cells it sees.

    Raises:
        RunFailedError: the run failed or took too long.
    """
    config = configuration(bench, output_dir=str(bench.folder / name), **changes)
    witness = {VARIABLE: str(bench.folder / f"{name}.cells")}
    with start_training(config, bench.folder, name, num_ranks, witness) as run:
        run.wait(f"a training on {num_ranks} {'process' if num_ranks == 1 else 'processes'}", bench.timeout)
    folder = run_folder_of(bench.folder / name)
    assert folder is not None, "a run that ended well has a folder"
    return folder


def cells_seen(bench: Bench, name: str) -> Counter[str]:
    """Return how often a run saw each cell, with its masks, over all ranks."""
    files = bench.folder.glob(f"{name}.cells.*")
    return Counter(line for file in files for line in file.read_text(encoding="utf-8").splitlines())


def render(checks: Sequence[Check], seconds: float) -> str:
    """Return the checks as text, with what to do below each fault."""
    width = max(len(check.name) for check in checks)
    lines = [""]
    for check in checks:
        first, *more = check.found.splitlines() or [""]
        lines.append(f"{check.state:<11}  {check.name:<{width}}  {first}")
        lines += [f"{'':<11}  {'':<{width}}  {line}" for line in more]
        if check.advice:
            lines.append(f"{'':<11}  {'':<{width}}  -> {check.advice}")
    counts = Counter(check.state for check in checks)
    said = ", ".join(f"{counts[state]} {state}" for state in ("passed", "failed", "not checked"))
    return "\n".join([*lines, "", f"{said}; {seconds:.0f} seconds"])


def _is_close(one: Any, two: Any) -> bool:
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=RANK_TOLERANCE, abs_tol=1e-7)
    return one == two


def _without_choices(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out shares of largest values, which rounding may move by a whole position."""
    return [{name: value for name, value in record.items() if "accuracy" not in name} for record in records]


def _losses(run_folder: Path) -> list[float]:
    records = proofs.records_until(run_folder)
    return [float(record["loss"] or 0.0) for record in records if record["kind"] == "train"]


def _largest_distance(one: Sequence[Any], two: Sequence[Any]) -> float:
    return max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(one, two, strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
