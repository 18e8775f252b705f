"""Convert h5ad files to a training corpus: python -m trainer.convert_h5ad IN.h5ad [...] --output DIR."""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from data.conversion import ConversionPlan
from data.conversion_plan import ConversionSettings, find_inputs, plan_conversions
from data.conversion_run import Outcome, OutputMode, check_output, is_complete_as_planned, run_conversion
from data.errors import DataError
from trainer.console import counted, printable
from trainer.errors import UserError

SECONDS_BETWEEN_LINES = 10.0
"""How often progress is printed where it is not shown on a terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 2 for the user's mistakes, 130 when stopped with Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    try:
        convert(arguments)
    except (DataError, UserError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    except OSError as error:
        message = f"error: {error.filename or arguments.output}: {error.strerror or error}"
        print(printable(message), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    parser = argparse.ArgumentParser(prog="python -m trainer.convert_h5ad", description=__doc__)
    _add_content_options(parser)
    _add_output_options(parser)
    return parser


def _add_content_options(parser: argparse.ArgumentParser) -> None:
    """Add what decides which cells, genes and columns are taken."""
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IN.h5ad", help="h5ad files or glob patterns")
    add(
        "--genes",
        default="union",
        metavar="FILE|union|intersection",
        help="gene space: a list (.txt, one name a line; .csv or .tsv with columns id,symbol; genes.json), a "
        "vocabulary (human_protein_coding, human_all, mouse_protein_coding, mouse_all), or the union (default) or "
        "intersection of the inputs",
    )
    add(
        "--gene-column",
        metavar="COLUMN",
        help="column of var with the gene names (default: found by content)",
    )
    add(
        "--layer",
        default="auto",
        metavar="auto|counts|raw|X|NAME",
        help="matrix to read; auto (default): the first of layers['counts'], raw.X, X that holds counts, else the "
        "first non-negative one, unless a layer of another name holds counts. `counts` must hold "
        "counts; others may hold log-normalised values",
    )
    add(
        "--obs",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=COLUMN",
        help="obs columns to keep, as technical_batch=batch target_gene=perturbation cell_type=bulk_labels; "
        "those three are taken from batch or gem_group, target_gene and cell_type where present (NAME= leaves one "
        "out); the column @file stands for the name of the file",
    )
    add("--control-label", metavar="LABEL", help="target_gene of control cells (default: non-targeting)")
    add(
        "--min-genes",
        type=_count,
        default=1,
        metavar="N",
        help="drop cells with fewer expressed genes of the gene space (default 1; 0 keeps empty cells)",
    )
    add(
        "--min-match",
        type=_fraction,
        default=0.5,
        metavar="FRACTION",
        help="refuse a file of whose genes, or of the gene space if that is smaller, less is matched (default 0.5)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add how and where the corpus is written."""
    add = parser.add_argument
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the corpus")
    add(
        "--format",
        choices=("arrow", "parquet"),
        default="arrow",
        help="arrow (default) is read fastest; parquet is about five times smaller and can be read remotely",
    )
    add(
        "--rows-per-shard",
        type=_positive,
        default=20_000,
        metavar="N",
        help="cells of one data file (default 20000)",
    )
    add(
        "--jobs",
        type=_positive,
        default=1,
        metavar="N",
        help="processes; the result has the same bytes (default 1)",
    )
    add(
        "--per-file", action="store_true", help="one corpus DIR/<stem> for each file, all over one gene space"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--resume",
        action="store_true",
        help="also accept a finished corpus of the same inputs and arguments (an unfinished one is always continued)",
    )
    modes.add_argument("--overwrite", action="store_true", help="replace a corpus that is there")
    add("--dry-run", action="store_true", help="print what would be done and write nothing")


def convert(arguments: argparse.Namespace) -> None:
    """Plan, convert and report."""
    settings = ConversionSettings(
        genes=arguments.genes,
        gene_column=arguments.gene_column,
        layer=arguments.layer,
        obs=tuple(arguments.obs),
        control_label=arguments.control_label,
        min_genes=arguments.min_genes,
        min_match=arguments.min_match,
        storage=arguments.format,
        rows_per_shard=arguments.rows_per_shard,
    )
    mode: OutputMode = "overwrite" if arguments.overwrite else "resume" if arguments.resume else "new"
    plans = plan_conversions(
        find_inputs(arguments.inputs), arguments.output, settings, is_per_file=arguments.per_file, say=_say
    )
    if len(plans) > 1 and mode == "new" and not all(is_complete_as_planned(plan) for plan in plans):
        # Some corpora of an interrupted --per-file run are complete: they are as good as finished shards.
        mode = "resume"
    for plan in plans:
        check_output(plan, mode)
    for plan in plans:
        files, shards = counted(len(plan.sources), "file"), counted(plan.num_shards, "shard")
        _say(f"{plan.folder}: {plan.num_cells:,} cells of {files} in {shards} ({plan.storage})")
    if arguments.dry_run:
        print("dry run: nothing was written")
        return
    for plan in plans:
        convert_one(plan, mode, arguments.jobs)


def _say(text: str) -> None:
    print(printable(text))


def convert_one(plan: ConversionPlan, mode: OutputMode, jobs: int) -> None:
    """Make one corpus and print its summary."""
    begin = time.monotonic()
    with ConversionProgress(plan.num_cells, plan.folder.name, sys.stderr) as progress:
        outcome = run_conversion(plan, mode=mode, jobs=jobs, progress=progress)
    _say(summary(plan, outcome, time.monotonic() - begin))


def summary(plan: ConversionPlan, outcome: Outcome, seconds: float) -> str:
    """Return the account of a finished corpus."""
    manifest = outcome.manifest
    dropped = sum(source.cells_dropped for source in manifest.sources)
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    lines = [
        ("cells", f"{manifest.num_cells:,}" + (f" ({dropped:,} dropped by --min-genes)" if dropped else "")),
        ("values", f"{manifest.value_kind} ({manifest.count_dtype}), {manifest.n_nonzero:,} non-zero"),
        ("gene space", f"{len(plan.gene_space):,} genes by {plan.gene_space.key}"),
    ]
    for source in manifest.sources:
        share = source.genes_matched / source.genes_total
        lines.append(
            (
                source.path_name,
                f"{source.rows:,} cells from {source.matrix}, genes matched {share:.1%} "
                f"({source.genes_matched:,} of {source.genes_total:,}), "
                f"{'counts' if manifest.value_kind == 'counts' else 'values'} dropped "
                f"{source.counts_dropped_fraction:.2%}",
            )
        )
    lines.append(("technical batches", _some(manifest.technical_batches)))
    if "target_gene" in manifest.columns:
        control = f"control {manifest.control_label}" if manifest.control_label else "no control"
        lines.append(("targets", f"{_some(manifest.columns['target_gene'].names)}; {control}"))
    new_cells = sum(source.num_cells for source in plan.sources) - outcome.cells_resumed
    rate = f", {new_cells / seconds:,.0f} cells/s" if new_cells else ""
    lines.append(("shards", f"{len(manifest.shards)} ({manifest.storage}), {num_bytes:,} bytes"))
    lines.append(("seconds", f"{seconds:.1f}{rate}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join([f"{plan.folder}: done", *(f"  {name:<{width}}  {text}" for name, text in lines)])


class ConversionProgress:
    """Show cells done and cells/s: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, num_cells: int, name: str, stream: TextIO) -> None:
        """Take the number of cells to convert."""
        self.num_cells = num_cells
        self.name = name
        self.stream = stream
        self._done = self._resumed = 0
        self._begin = self._last_line = time.monotonic()
        self._bar: tqdm | None = None
        if stream.isatty():
            self._bar = tqdm(total=num_cells, desc=name, unit=" cells", unit_scale=True, file=stream)

    def __enter__(self) -> "ConversionProgress":
        """Return the progress."""
        return self

    def __exit__(self, *_: object) -> None:
        """Show the last state."""
        if self._bar is not None:
            self._bar.close()
        elif self._done > self._resumed:
            self._line()

    def resume(self, num_cells: int) -> None:
        """Count cells that an earlier run converted."""
        self._done += num_cells
        self._resumed += num_cells
        if self._bar is not None:
            self._bar.initial = num_cells
            self._bar.n = num_cells
            self._bar.refresh()

    def add(self, num_cells: int) -> None:
        """Count cells converted now; negative where a shard is begun again."""
        self._done += num_cells
        if self._bar is not None:
            self._bar.update(num_cells)
        elif time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._line()

    def say(self, text: str) -> None:
        """Show a line."""
        tqdm.write(printable(text), file=self.stream)

    def _line(self) -> None:
        self._last_line = time.monotonic()
        rate = (self._done - self._resumed) / max(self._last_line - self._begin, 1e-9)
        print(
            f"{self.name}: {self._done:,} of {self.num_cells:,} cells, {rate:,.0f} cells/s",
            file=self.stream,
            flush=True,
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{len(names)}" + (f" ({shown}{', ...' if len(names) > 6 else ''})" if names else "")


def _count(text: str, least: int = 0) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= least:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")


def _positive(text: str) -> int:
    return _count(text, least=1)


def _fraction(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a number between 0 and 1")


if __name__ == "__main__":
    sys.exit(main())
