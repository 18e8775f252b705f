"""cell-eval and cell-eval2 as programs: their command lines, a process that runs them, and what they wrote."""

import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError
from trainer.scoring.vcc_options import PERTURBATION_COLUMN, Preset, ScoreOptions

_LINES_SHOWN = 25
_NEED_GENES = (
    "de_wilcoxon_lfc_nmae",
    "de_wilcoxon_direction_fidelity_yield_raw",
    "de_wilcoxon_direction_reach_raw",
)
"""The metrics of 2026 that have no value without significant genes; the first needs ten of a perturbation."""
_NOT_SCORED = (
    "expr_mse_unbiased",
    "expr_mse_unbiased_capped",
    "expr_distance_unbiased",
    "expr_real_mass_ratio",
)
_AGGREGATE, _OWN = "agg_results.csv", "baseline_agg.csv"
"""Means over perturbations: of cells that were given, and of cell-eval2's own baseline."""
_MAINS = {"cell-eval": "cell_eval.__main__:main", "cell-eval2": "cell_eval2.cli:main"}
"""What their console scripts call."""


@dataclass(frozen=True)
class Call:
    """Hold one command line of a program."""

    name: str
    arguments: tuple[str, ...]
    is_needed: bool = True
    """Whether there is no score without it."""
    instead_of: str | None = None
    """The name of the call whose failure it makes up for; it is left out where that one succeeds."""


def installed_version(preset: Preset) -> str:
    """Return the version of a preset's program.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec(preset.module) is None:
        raise UserError(
            f"preset {preset.name} is scored by {preset.program}, which is not installed; "
            'install it with: pip install "cellphase[vcc]"'
        )
    return importlib.metadata.version(preset.program)


def score_prediction(
    name: str, prediction: Path, real: Path, output: Path, known: Path | None, options: ScoreOptions
) -> Call:
    """Return the call that scores predicted cells against real ones.

    cell-eval2 tests genes on the processor, by pdex, wherever it runs: its test on a GPU gives other figures.

    Args:
        name: of the call.
        prediction: the predicted cells.
        real: the real cells.
        output: the folder that the program writes into.
        known: what the program knows of the real cells alone: the folder in which cell-eval2 keeps it, the table
            `real_de.csv` of an earlier call of cell-eval, or None.
        options: of the score.
    """
    files = ("run", "-ap", str(prediction), "-ar", str(real), "-o", str(output))
    if options.preset.program == "cell-eval":
        return Call(name, (*files, *_cell_eval(options), *(["-dr", str(known)] if known else [])))
    return Call(name, (*files, *_cell_eval2(options), *(["--cache-real", str(known)] if known else [])))


def split_in_halves(
    name: str, real: Path, output: Path, known: Path | None, options: ScoreOptions
) -> list[Call]:
    """Return the calls that score one half of the real cells against the other.

    cell-eval2 gives no ceiling at all where one metric has no value, as those of significant genes do where few cells
    leave none significant. Further calls do without them.
    """
    files = ["run", "-ar", str(real), "-o", str(output)]
    if options.preset.program == "cell-eval":
        seeded = ["--ceiling", "--ceiling-seed", str(options.seed)]
        return [Call(name, (*files, *_cell_eval(options), *seeded), is_needed=False)]
    seeded = ["--anchor", "--anchor-base-seed", str(options.seed)]
    arguments = (*files, *_cell_eval2(options), *seeded, *(["--cache-real", str(known)] if known else []))
    calls = [Call(name, arguments, is_needed=False)]
    for number, left_out in enumerate((_NEED_GENES[:1], _NEED_GENES), start=2):
        metrics = [metric for metric in (*options.preset.metrics, *_NOT_SCORED) if metric not in left_out]
        fewer = ("--set", f"metrics=[{', '.join(metrics)}]")
        again = Call(
            f"{name}, try {number}", (*arguments, *fewer), is_needed=False, instead_of=calls[-1].name
        )
        calls.append(again)
    return calls


def own_baseline(name: str, real: Path, cells: Path, output: Path, options: ScoreOptions) -> Call:
    """Return the call that makes the program's own baseline of the real cells; cell-eval2 scores it too."""
    if options.preset.program == "cell-eval":
        arguments = (
            "baseline",
            "-a",
            str(real),
            "-o",
            str(cells),
            "--skip-de",
            *_columns(options, "--control-pert"),
        )
        return Call(name, arguments)
    arguments = ["baseline", "-ar", str(real), "-o", str(output), "--seed", str(options.seed)]
    return Call(name, (*arguments, *_cell_eval2(options), "--allow-degenerate-baseline"))


def rescale(
    name: str,
    scored: Path,
    baseline: Path,
    ceiling: Path,
    output: Path,
    options: ScoreOptions,
    *,
    is_own: bool,
) -> Call:
    """Return the call that rescales one prediction's figures between the baseline's and, in 2026, the ceiling's.

    `is_own` says that the baseline is the program's own.
    """
    if options.preset.program == "cell-eval":
        arguments = ["-i", str(scored / _AGGREGATE), "-I", str(baseline / _AGGREGATE)]
        return Call(name, ("score", *arguments, "-o", str(output)), is_needed=False)
    aggregate, meta = (_OWN, "baseline_meta.json") if is_own else (_AGGREGATE, "run_meta.json")
    arguments = ["--user-agg", str(scored / _AGGREGATE), "--baseline-agg", str(baseline / aggregate)]
    arguments += ["--baseline-meta", str(baseline / meta), "--anchor", str(ceiling)]
    return Call(name, ("score", *arguments, "-o", str(output)), is_needed=False)


def run_calls(
    calls: Sequence[Call], folder: Path, options: ScoreOptions, timeout_seconds: float
) -> dict[str, str]:
    """Run calls one after the other in a process of their own; return why calls failed that are not needed.

    Args:
        calls: command lines.
        folder: a folder for what the calls print; made.
        options: of the score.
        timeout_seconds: for all of them together.

    Raises:
        UserError: a needed one failed, with what it printed, or time ran out.
    """
    folder.mkdir(parents=True)
    logs = {call.name: folder / f"{index:02d}.log" for index, call in enumerate(calls)}
    request = {
        "program": options.preset.program,
        "main": _MAINS[options.preset.program],
        "calls": [
            {
                "name": call.name,
                "arguments": call.arguments,
                "log": str(logs[call.name]),
                "is_needed": call.is_needed,
                "instead_of": call.instead_of,
            }
            for call in calls
        ],
    }
    path = folder / "calls.json"
    path.write_text(json.dumps(request, indent=2))
    code, said = _run_process(path, options.preset.program, timeout_seconds)
    ended = _ended(folder / "ended.json")
    failed = {name: error for name, error in ended.items() if error is not None}
    for call in calls:
        log = logs[call.name]
        was_due = call.instead_of is None or call.instead_of in failed
        if was_due and call.name not in ended and code:
            last = _tail(log.read_text(errors="replace")) if log.exists() else ""
            raise UserError(
                f"{options.preset.program} ended with {code} at '{call.name}':\n{last}\n{_tail(said)}"
            )
        if call.is_needed and call.name in failed:
            shown = _tail(log.read_text(errors="replace"))
            raise UserError(f"{options.preset.program} failed at '{call.name}': {failed[call.name]}\n{shown}")
    return failed


def _run_process(request: Path, program: str, timeout_seconds: float) -> tuple[int, str]:
    """Make the calls of a file in a process of their own; return its exit code and what it printed."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.scoring.vcc_calls", str(request), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        raise UserError(f"{program} had not ended after {timeout_seconds:g} seconds (--timeout)") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return process.returncode, said


def aggregates(folder: Path) -> dict[str, float]:
    """Return the mean of each metric that a call wrote, without those that have no value."""
    own = folder / _OWN
    with (own if own.exists() else folder / _AGGREGATE).open(newline="") as file:
        means = next(row for row in csv.DictReader(file) if row["statistic"] == "mean")
    return _numbers({name: text for name, text in means.items() if name != "statistic"})


def ceilings(folder: Path, preset: Preset) -> tuple[dict[str, float], dict[str, float]]:
    """Return each metric of halves of the real cells, and in 2026 its standard deviation over five splits.

    cell-eval corrects its metrics to the depth of all cells, except errors, of which it gives none: these are those of
    the halves, as they are.
    """
    if preset.program == "cell-eval2":
        import polars  # comes with the program

        frame = polars.read_parquet(folder / "anchor_agg.parquet")
        rows = frame.select("metric", "replicate", "replicate_sd").iter_rows()
        found = [(str(name), float(value), float(spread)) for name, value, spread in rows]
        return {name: value for name, value, _ in found}, {name: spread for name, _, spread in found}
    with (folder / "agg_ceiling_results.csv").open(newline="") as file:
        corrected = _numbers(next(csv.DictReader(file)))
    with (folder / "ceiling_results.csv").open(newline="") as file:
        rows = [
            _numbers({k: v for k, v in row.items() if k != "perturbation"}) for row in csv.DictReader(file)
        ]
    plain = {
        name: sum(row[name] for row in rows) / len(rows)
        for name in preset.metrics
        if rows and name not in corrected and all(name in row for row in rows)
    }
    return {**corrected, **plain}, {}


def rescaled(path: Path, preset: Preset) -> dict[str, float]:
    """Return the rescaled figure of each scored metric, and their mean as `avg_score`."""
    column = "from_baseline" if preset.program == "cell-eval" else "from_replicate"
    with path.open(newline="") as file:
        found = _numbers({row["metric"]: row[column] for row in csv.DictReader(file)})
    found = {name: found[name] for name in (*preset.metrics, "avg_score") if name in found}
    # cell-eval2 leaves the average of such a scale to official data; it is the plain mean of the six.
    if "avg_score" not in found and all(name in found for name in preset.metrics):
        found["avg_score"] = sum(found[name] for name in preset.metrics) / len(preset.metrics)
    return found


def keep_tables(source: Path, destination: Path) -> None:
    """Copy the tables that a call wrote, without those of single genes."""
    destination.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if (
            path.is_file()
            and path.suffix in (".csv", ".json", ".yaml", ".parquet")
            and "_de" not in path.stem
        ):
            shutil.copyfile(path, destination / path.name)


def _cell_eval(options: ScoreOptions) -> list[str]:
    threads = ["--num-threads", str(options.threads)]
    return ["--profile", "vcc", *_columns(options, "--control-pert"), *threads]


def _cell_eval2(options: ScoreOptions) -> list[str]:
    engine = ["--set", "de.backend=pdex", "--set", "device=cpu", "--set", f"num_threads={options.threads}"]
    targets = [] if options.has_target_genes else ["--no-target-genes"]
    return ["--preset", options.preset.name, *_columns(options, "--control"), *engine, *targets]


def _columns(options: ScoreOptions, control_flag: str) -> list[str]:
    return ["--pert-col", PERTURBATION_COLUMN, control_flag, options.control_label]


def _ended(path: Path) -> dict[str, str | None]:
    return {each["name"]: each["error"] for each in json.loads(path.read_text())} if path.exists() else {}


def _tail(text: str) -> str:
    """Return the last lines, without bars of progress."""
    lines = [
        line
        for line in re.split(r"[\r\n]+", text)
        if line.strip() and "it/s]" not in line and "?it" not in line
    ]
    return "\n".join(f"  | {line}" for line in lines[-_LINES_SHOWN:])


def _numbers(texts: dict[str, str]) -> dict[str, float]:
    found = {}
    for name, text in texts.items():
        try:
            value = float(text)
        except (TypeError, ValueError):
            continue
        if math.isfinite(value):
            found[name] = value
    return found
