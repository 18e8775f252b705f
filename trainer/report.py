"""Put a run on one page: `python -m trainer report RUN [RUN ...] --output report.html`.

The page holds all it shows and loads nothing. A run writes its own into its folder when it ends.
"""

import argparse
import math
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.atomicfile import replace_text
from trainer.console import notice
from trainer.errors import UserError
from trainer.exits import run_command
from trainer.report_charts import LARGEST
from trainer.report_page import MARK, write_page
from trainer.run_facts import RunFacts, read_run

FILE, PICTURE = "report.html", "report.png"
_MOST_DRAWN = 20_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for the user's mistake, 130 when interrupted, 1 for anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer report",
        allow_abbrev=False,
        description="Write one page about a run, or about several beside each other, from their folders' files.",
        epilog="Exit codes: 0 done, 2 a mistake in the command or its files, 130 interrupted, 1 anything else.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the page to write, with its picture beside it as .png (default: {FILE} in the first run's folder)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are no report")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    return run_command(lambda: _report(arguments))


def report_at_end(folder: Path) -> None:
    """Write the report of a run that ends into its folder; what goes wrong is said, and fails nothing."""
    try:
        write_report([read_run(folder)], folder / FILE)
    except Exception as error:
        notice(f"{folder / FILE} is not written: {type(error).__name__}: {error}")


def write_report(runs: Sequence[RunFacts], output: Path) -> list[str]:
    """Write the page and its picture, which shows the first run; return the names of the files."""
    picture = output.with_suffix(".png")
    names = [output.name, picture.name] if _draw(runs[0], picture) else [output.name]
    replace_text(output, write_page(runs))
    return names


def _report(arguments: argparse.Namespace) -> int:
    folders = [Path(os.path.abspath(folder)) for folder in arguments.runs]
    output = Path(os.path.abspath(arguments.output)) if arguments.output else folders[0] / FILE
    if output.suffix not in (".html", ".htm"):
        raise UserError(f"--output {output}: name a file that ends with .html")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file in it")
    picture = output.with_suffix(".png")
    if not arguments.overwrite and not _is_report(output):
        for path in (output, picture):
            if path.exists():
                raise UserError(f"{path} exists and is no report; name another file, or give --overwrite")
    runs = [read_run(folder) for folder in folders]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        names = write_report(runs, output)
    except OSError as error:
        raise UserError(f"--output {output}: it cannot be written ({error.strerror})") from error
    for run in runs:
        for gap in run.gaps:
            notice(f"{run.name}: {gap}")
    notice(f"wrote {output.parent}: {', '.join(names)}")
    return 0


def _is_report(path: Path) -> bool:
    try:
        return MARK in path.read_text(encoding="utf-8")[:300]
    except (OSError, ValueError):
        return False


def _draw(run: RunFacts, path: Path) -> bool:
    """Draw a run's losses; a run without a step has no picture, and none of an earlier report stays."""
    steps = run.steps
    if not len(steps):
        path.unlink(missing_ok=True)
        return False
    from trainer.plots import plot_losses  # matplotlib takes a second to import

    def known(value: float | None) -> float | None:
        return value if value is not None and abs(value) < LARGEST else None

    records = [
        {
            "kind": "train",
            "global_step": int(steps.step[i]),
            "phase": steps.phase[i],
            "loss": known(steps["loss"][i]),
            "lr": known(steps["lr"][i]),
        }
        for i in range(0, len(steps), math.ceil(len(steps) / _MOST_DRAWN))
    ] + [
        {
            "kind": each.kind,
            "global_step": each.step,
            "phase": each.phase,
            "loss": known(each.figures.get("loss")),
        }
        for each in run.evaluations
    ]
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.png")
    try:
        # A dollar sign would begin a formula.
        plot_losses(records, temporary, title=run.name.replace("$", r"\$"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
