"""Score predicted cells as the Virtual Cell Challenge does: `python -m trainer score --pred FILE --real FILE ...`.

Prints one table of every metric for the prediction, the baselines and the ceiling, and with `--output` leaves
`results.json`, `results.csv` and the programs' own tables there.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.console import notice, table
from trainer.errors import UserError
from trainer.exits import run_command
from trainer.scoring.benchmarks import Results, figure
from trainer.scoring.vcc import (
    AVERAGE,
    BASELINES,
    CONTROLS,
    MODEL,
    SCORE_SUFFIX,
    TIMEOUT_SECONDS,
    score_files,
)
from trainer.scoring.vcc_contract import (
    CONTEXT_COLUMN,
    check_pair,
    check_prediction,
    check_upload,
    raise_problems,
    read_names,
)
from trainer.scoring.vcc_file import read_perturbed_file, stated_control_label
from trainer.scoring.vcc_options import PERTURBATION_COLUMN, PRESETS, Preset, ScoreOptions, preset_named

_LOWER_IS_BETTER = ("mae", "expr_mse_unbiased_capped_norm", "de_wilcoxon_lfc_nmae")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for the user's mistake, 130 when interrupted, 1 for anything else."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    return run_command(lambda: _score(arguments))


def layout(results: Results, preset: Preset) -> str:
    """Return the table of every metric, with a column for each representation and for each rescaled score."""
    raw = [row for row in results.rows if row.benchmark == preset.name]
    rescaled = [row for row in results.rows if row.benchmark == preset.name + SCORE_SUFFIX]
    arms = [arm for arm in (MODEL, *BASELINES) if any(row.representation == arm for row in raw)]
    scores = [arm for arm in (MODEL, CONTROLS) if any(row.representation == arm for row in rescaled)]
    figures = {(row.benchmark, row.representation, row.metric): row for row in results.rows}
    lines = []
    for metric in dict.fromkeys(row.metric for row in (*raw, *rescaled)):
        better = "lower" if metric in _LOWER_IS_BETTER else "higher"
        if metric not in (*preset.metrics, AVERAGE):
            better = "not scored"
        line: list[str | None] = [metric, better]
        for benchmark, columns in ((preset.name, arms), (preset.name + SCORE_SUFFIX, scores)):
            for arm in columns:
                line.append(figure(figures.get((benchmark, arm, metric))))
        lines.append(line)
    return table(["metric", "better", *arms, *(f"score of {arm}" for arm in scores)], lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer score",
        allow_abbrev=False,
        description="Check predicted cells against the rules, and score them beside baselines and a ceiling.",
        epilog="Exit codes: 0 done, 2 a mistake in the command or its files, 130 interrupted, 1 anything else.",
    )
    parser.add_argument(
        "--pred", type=Path, required=True, metavar="FILE", help="h5ad file of predicted cells"
    )
    parser.add_argument(
        "--real",
        type=Path,
        metavar="FILE",
        help="h5ad file of measured cells of the same targets, and of controls",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        required=True,
        help="the challenge's year: vcc2025 is cell-eval with profile vcc, vcc2026 cell-eval2 with preset vcc2026",
    )
    parser.add_argument(
        "--train",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="h5ad files trained on, for the mean response; scored perturbations in them are left out "
        "(default: the program's own baseline, made of the real cells)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="the folder for results; an earlier one is replaced"
    )
    _add_rules(parser)
    _add_comparison(parser)
    _add_program(parser)
    return parser


def _add_rules(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rules")
    group.add_argument("--contract-only", action="store_true", help="check the rules, and score nothing")
    group.add_argument(
        "--upload",
        action="store_true",
        help="check the rules of an upload to the challenge too, sizes and all",
    )
    group.add_argument(
        "--genes", type=Path, metavar="FILE", help="with --upload: the challenge's genes, one a line"
    )
    group.add_argument(
        "--perturbations",
        type=Path,
        metavar="FILE",
        help="with --upload: the challenge's perturbations, one a line or in a CSV's column target_gene",
    )


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is compared with what")
    group.add_argument(
        "--control-label",
        metavar="NAME",
        help="the target_gene of control cells (default: what `predict` wrote into the files, else "
        f"{ScoreOptions.control_label})",
    )
    group.add_argument(
        "--cell-type-key",
        default=ScoreOptions.cell_type_key,
        metavar="NAME",
        help="obs column within which baselines are made, where there is one (default: cell_type; '' for none)",
    )
    group.add_argument(
        "--context-key",
        metavar="NAME",
        help="obs column whose values are scored apart and averaged (default: context, where both files have it)",
    )
    group.add_argument(
        "--only-predicted", action="store_true", help="leave out real perturbations that the prediction lacks"
    )
    group.add_argument(
        "--baselines",
        nargs="*",
        choices=[_flag(name) for name in BASELINES],
        default=[_flag(name) for name in BASELINES],
        help="which of them to score (default: all)",
    )
    group.add_argument(
        "--reuse",
        type=Path,
        metavar="DIR",
        help="take baselines from the output for the same real cells and options",
    )
    group.add_argument(
        "--target-sum",
        type=float,
        metavar="TOTAL",
        help="vcc2025: what a cell's counts were normalised to, where the files do not say",
    )


def _add_program(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the program")
    group.add_argument("--seed", type=int, default=0, help="of the baselines and the halves (default: 0)")
    group.add_argument("--threads", type=int, default=1, metavar="N", help="of the program (default: 1)")
    group.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"for the program, all runs together (default: {TIMEOUT_SECONDS:g})",
    )


def _score(arguments: argparse.Namespace) -> int:
    _check_arguments(arguments)
    options = ScoreOptions(
        preset_named(arguments.preset),
        control_label=arguments.control_label or stated_control_label(arguments.pred, arguments.real),
        cell_type_key=arguments.cell_type_key or None,
        context_key=arguments.context_key,
        only_predicted=arguments.only_predicted,
        target_sum=arguments.target_sum,
        seed=arguments.seed,
        threads=arguments.threads,
    )
    if arguments.contract_only or arguments.upload:
        _check_contract(arguments, options)
    if arguments.contract_only:
        return 0
    with tempfile.TemporaryDirectory(prefix="cellphase-score-") as scratch:
        notice(f"running {options.preset.program}; its first minute goes into compiling")
        results = score_files(
            arguments.pred,
            arguments.real,
            Path(scratch) / "output" if arguments.output is None else arguments.output,
            options,
            baselines=[name for name in BASELINES if _flag(name) in arguments.baselines],
            train=arguments.train,
            reuse=arguments.reuse,
            timeout_seconds=arguments.timeout,
        )
    notice("\n" + layout(results, options.preset))
    for note in results.notes[options.preset.name]:
        notice(f"  {note}")
    if arguments.output is not None:
        notice(
            f"\nwrote {Path(os.path.abspath(arguments.output))}: results.json, results.csv, the program's tables"
        )
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.real is None and not arguments.contract_only:
        raise UserError("--real FILE is missing, the measured cells to score against; or say --contract-only")
    for name in ("genes", "perturbations"):
        if getattr(arguments, name) is not None and not arguments.upload:
            raise UserError(f"--{name} is a list of the challenge's; say --upload with it")
    if arguments.threads < 1:
        raise UserError(f"--threads {arguments.threads}: it must be at least 1")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: it must not be negative")
    for name in ("timeout", "target_sum"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: it must be above 0")


def _check_contract(arguments: argparse.Namespace, options: ScoreOptions) -> None:
    columns = (PERTURBATION_COLUMN, options.context_key, CONTEXT_COLUMN)
    prediction = read_perturbed_file(arguments.pred, columns)
    problems, rules = [], []
    if arguments.upload:
        genes, perturbations = (
            None if path is None else read_names(path) for path in (arguments.genes, arguments.perturbations)
        )
        problems += check_upload(prediction, options, genes, perturbations)
        rules.append(f"an upload to {options.preset.name}")
    if arguments.real is not None:
        problems += check_pair(prediction, read_perturbed_file(arguments.real, columns), options)
        rules.append(f"what {options.preset.name} can score against {arguments.real.name}")
    elif not arguments.upload:
        problems += check_prediction(prediction, options)
        rules.append(f"what {options.preset.name} can score")
    raise_problems(prediction.path, " and ".join(rules), list(dict.fromkeys(problems)))
    values = "counts" if prediction.values.is_counts else "log-normalised values"
    notice(
        f"{prediction.path}: {prediction.num_cells:,} cells, {len(prediction.genes):,} genes, {values}: "
        f"keeps all rules of {' and '.join(rules)}"
    )
    if arguments.upload and arguments.genes is None:
        notice("  the names and the order of genes were not checked: no --genes")
    if arguments.upload and arguments.perturbations is None:
        notice("  the names of perturbations were not checked: no --perturbations")


def _flag(name: str) -> str:
    return name.replace(" ", "-")
