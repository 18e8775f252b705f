"""Predict perturbed cells: `python -m trainer predict --model PATH --data PATH --output FILE.h5ad`."""

import argparse
import csv
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.conversion_plan import ConversionSettings
from data.corpus import CorpusInfo, open_corpus
from data.corpus_cache import convert_once
from data.perturbation_settings import PerturbationSettings
from data.perturbation_targets import check_known, counted, listed, read_names
from data.predicted_values import MAX_TOTAL, Space, ValueDecoder
from data.prediction_sets import (
    PerturbedCorpus,
    PredictionSets,
    Request,
    Wanted,
    held_out_wanted,
    make_requests,
    open_perturbed_corpus,
    technical_batch_index,
)
from trainer.checkpoint_model import TRUST
from trainer.console import notice
from trainer.distributed import Ranks, leave_group
from trainer.dotted import look_in_current_folder
from trainer.embedding import join_ranks
from trainer.errors import UserError
from trainer.exits import run_command
from trainer.perturbation_model import PerturbationModel, open_perturbation_model
from trainer.predicted_cells import check_free, write_corpus_cells, write_predicted_cells
from trainer.prediction import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_STEPS,
    Block,
    draw_sets,
    predicted_blocks,
    predicts_cells_apart,
)

PRESETS: dict[str, tuple[Space, int]] = {"vcc2025": ("lognorm", 100), "vcc2026": ("counts", 400)}
"""The space of values of each challenge, and its cells of a perturbation without real ones."""
_DEFAULT_CELLS = 100
_SECONDS_BETWEEN_LINES = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for the user's mistake, 130 when interrupted, 1 for anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer predict",
        allow_abbrev=False,
        description="Predict perturbed cells from control cells and write them, with the controls, as an h5ad file.",
        epilog="Exit codes: 0 done, 2 a mistake in the command or its files, 130 interrupted, 1 anything else.",
    )
    _add_arguments(parser)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    return run_command(lambda: _predict(arguments))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    def option(name: str, text: str, **more: Any) -> None:
        parser.add_argument(name, help=text, **more)

    option("--model", "a run folder (its newest checkpoint), a checkpoint folder, or an exported folder",
           type=Path, required=True, metavar="PATH")  # fmt: skip
    parser.add_argument("--trust", **TRUST)
    option("--data", "a corpus folder, or an h5ad file, with control cells", required=True, metavar="PATH")
    option("--output", "the h5ad file to write", type=Path, required=True, metavar="FILE")
    option("--targets", "a .csv or .tsv with a column target_gene (and n_cells, cell_type or context), another file "
           "with a name a line, names with commas between them, or all that the data perturbs (default: those that the "
           "run held out)",
           metavar="FILE|NAME,NAME|all")  # fmt: skip
    option("--contexts", "cell types to predict in (default: all with controls)", metavar="NAME,NAME")
    option("--cells-per-perturbation", "cells of each target and context (default: as many as the real ones; where "
           "there are none 400 with --preset vcc2026, else 100)", type=int, metavar="N")  # fmt: skip
    option("--preset", "values and numbers of cells as a challenge wants them", choices=tuple(PRESETS))
    option("--space", "values to write: whole counts, or log-normalised (default: the preset's, else counts where "
           "the data holds counts)", choices=("counts", "lognorm"))  # fmt: skip
    option("--no-controls", "leave the real control cells out of the output", action="store_true")
    option("--real", "write the real cells of what is predicted too, with controls, in the same genes and values",
           type=Path, metavar="FILE")  # fmt: skip
    option("--train", "write the training cells of the run's phase too, with controls, in the same genes and values",
           type=Path, metavar="FILE")  # fmt: skip
    option("--num-steps", f"passes through the network for each cell (default: {DEFAULT_STEPS})",
           type=int, default=DEFAULT_STEPS, metavar="N")  # fmt: skip
    option("--seed", "of all that is random (default: 0)", type=int, default=0, metavar="N")
    option("--batch-size", f"sets of a forward pass (default: {DEFAULT_BATCH_SIZE})",
           type=int, default=DEFAULT_BATCH_SIZE, metavar="N")  # fmt: skip
    option("--phase", "phase of the run whose sets and held-out cells are meant, where several read sets")
    option(
        "--technical-batch",
        "technical batch of the model's run that new ones are predicted as",
        metavar="NAME",
    )
    option("--obs", "NAME=COLUMN, where the columns of an h5ad file have other names: target_gene, cell_type, "
           "technical_batch", action="append", default=[], metavar="NAME=COLUMN")  # fmt: skip
    option("--layer", "matrix that is read of an h5ad file: X, raw.X or a layer's name", default="auto")
    option("--gene-column", "column of var that names the genes of an h5ad file", metavar="NAME")
    option("--min-match", "least share of an h5ad file's genes, or of the model's if these are fewer, that must match "
           "(default: 0.5)", type=float, default=0.5, metavar="SHARE")  # fmt: skip
    option(
        "--cache-dir", "folder of the corpora made of h5ad files (default: cache)", type=Path, default="cache"
    )
    option("--device", "where to compute (default: auto)", choices=("auto", "cpu", "cuda"), default="auto")
    option("--overwrite", "replace the files that are written", action="store_true")


def _predict(arguments: argparse.Namespace) -> int:
    _check(arguments)
    look_in_current_folder()
    ranks, device = join_ranks(arguments.device)
    try:
        opened = open_perturbation_model(
            arguments.model, arguments.phase, device=device, trusted_modules=arguments.trust
        )
        corpus = open_perturbed_corpus(_open_data(arguments, opened.settings), opened.settings)
        for line in corpus.notices:
            notice(line)
        decoder = _decoder(arguments, opened.settings)
        plan = _plan(arguments, corpus)
        sets = PredictionSets(
            corpus,
            plan.requests,
            seed=arguments.seed,
            batch_index=technical_batch_index(corpus, plan.requests, arguments.technical_batch)
            if opened.knows_technical_batches
            else None,
            cells_are_apart=predicts_cells_apart(opened.model),
        )
        notice(plan.account(sets, decoder))
        blocks = predicted_blocks(
            lambda batch: draw_sets(opened.model, batch, arguments.num_steps, device=device),
            sets,
            decoder,
            ranks,
            batch_size=arguments.batch_size,
        )
        _write_all(arguments, opened, plan, sets, decoder, ranks, blocks)
        return 0
    finally:
        leave_group()


class _Plan:
    """What is predicted, and which real cells belong to it."""

    def __init__(
        self,
        corpus: PerturbedCorpus,
        requests: list[Request],
        what: str,
        *,
        cells: str,
        real_rows: NDArray[np.int64],
        training_rows: NDArray[np.int64] | None,
        has_context: bool,
    ) -> None:
        self.corpus, self.requests, self.what, self.cells = corpus, requests, what, cells
        self.training_rows, self.has_context = training_rows, has_context
        asked = {(request.target, request.cell_type) for request in requests}
        labels, names = corpus.labels, corpus.targets.names
        keys = zip(labels.perturbation[real_rows].tolist(), labels.cell_type[real_rows].tolist(), strict=True)
        self.real_rows = real_rows[np.array([(names[p], c) in asked for p, c in keys], np.bool_)]
        self.cell_types = sorted({request.cell_type for request in requests})

    def account(self, sets: PredictionSets, decoder: ValueDecoder) -> str:
        """Say what will be predicted."""
        targets = {request.target for request in self.requests}
        space = "counts" if decoder.space == "counts" else "log-normalised values"
        return (
            f"predicting {counted(sets.num_cells, 'cell')} as {space}: {counted(len(targets), 'target')} ({self.what}) "
            f"in {counted(len(self.cell_types), 'context')}: {self.cells}; {counted(len(sets), 'set')} of up to "
            f"{self.corpus.settings.set_size}"
        )


def _check(arguments: argparse.Namespace) -> None:
    """Find mistakes that need neither model nor data."""
    for name in ("cells_per_perturbation", "num_steps", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least 1")
    if not 0 <= arguments.min_match <= 1:
        raise UserError(f"--min-match {arguments.min_match:g}: it must be in [0, 1]")
    if arguments.preset == "vcc2026" and arguments.space == "lognorm":
        raise UserError("--space lognorm: --preset vcc2026 is scored in counts; leave one of the two out")
    outputs = [path for path in (arguments.output, arguments.real, arguments.train) if path is not None]
    absolute = [os.path.abspath(path) for path in outputs]
    if len(set(absolute)) < len(absolute):
        raise UserError("--output, --real and --train must be different files")
    for path in outputs:
        if os.path.exists(path) and os.path.exists(arguments.data) and os.path.samefile(path, arguments.data):
            raise UserError(f"{path} is the data itself; name another file")
        check_free(path, arguments.overwrite)


def _open_data(arguments: argparse.Namespace, settings: PerturbationSettings) -> CorpusInfo:
    """Open a corpus, or that of an h5ad file, which is made once over the model's genes."""
    if not arguments.data.endswith(".h5ad"):
        for name, default in (("obs", []), ("layer", "auto"), ("gene_column", None)):
            if getattr(arguments, name) != default:
                raise UserError(
                    f"--{name.replace('_', '-')}: --data {arguments.data} is a corpus, not an h5ad file"
                )
        return open_corpus(arguments.data)
    conversion = ConversionSettings(
        genes=settings.genes,
        gene_column=arguments.gene_column,
        layer=arguments.layer,
        obs=tuple(arguments.obs),
        min_genes=0,
        min_match=arguments.min_match,
    )
    return convert_once([arguments.data], arguments.cache_dir, conversion, is_command=True)


def _decoder(arguments: argparse.Namespace, settings: PerturbationSettings) -> ValueDecoder:
    holds_counts = settings.value_kind == "counts"
    space: Space = "counts" if holds_counts else "lognorm"
    if arguments.preset is not None:
        space = PRESETS[arguments.preset][0]
    space = arguments.space or space
    if space == "counts" and not holds_counts:
        raise UserError(
            f"phase '{settings.phase}' of the model's run read log-normalised values, which do not become counts "
            "again; use --space lognorm, or train on a corpus of counts"
        )
    return ValueDecoder(settings.tokenizer, settings.transform, space, holds_counts)


def _plan(arguments: argparse.Namespace, corpus: PerturbedCorpus) -> _Plan:
    """Find what is asked for."""
    labels = corpus.labels
    perturbed = np.flatnonzero(corpus.targets.is_used[labels.perturbation])
    real_rows, training_rows, has_context = perturbed, None, arguments.preset == "vcc2026"
    if arguments.train is not None or arguments.targets is None:
        training_rows, held_out_rows, absent = corpus.split()
    if arguments.targets is None:
        wanted, real_rows = held_out_wanted(corpus, held_out_rows, absent), held_out_rows
        what, where = f"held out of phase '{corpus.settings.phase}'", "held out"
        if not wanted:
            raise UserError(
                f"{corpus.info.path}: nothing in it was held out of phase '{corpus.settings.phase}' of the model's "
                "run; name the targets with --targets"
            )
    elif arguments.targets == "all":
        wanted, what, where = held_out_wanted(corpus, perturbed), "all of the data", "--targets all"
        if not wanted:
            raise UserError(
                f"{corpus.info.path}: it perturbs nothing that the model knows; name the --targets"
            )
    else:
        wanted, says_context = _read_targets(arguments.targets, corpus)
        has_context |= says_context
        what, where = f"of --targets {arguments.targets}"[:60], "--targets"
    default = PRESETS[arguments.preset][1] if arguments.preset is not None else _DEFAULT_CELLS
    requests = make_requests(
        corpus,
        wanted,
        real_rows=real_rows,
        default_cells=default,
        cells_per_perturbation=arguments.cells_per_perturbation,
        contexts=_contexts(arguments.contexts, corpus),
        where=where,
    )
    if not requests:
        raise UserError(f"--contexts {arguments.contexts}: nothing that is asked for is in these contexts")
    return _Plan(
        corpus,
        requests,
        what,
        cells=_about_cells(requests),
        real_rows=real_rows,
        training_rows=training_rows if arguments.train is not None else None,
        has_context=has_context,
    )


def _contexts(text: str | None, corpus: PerturbedCorpus) -> list[int] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        check_known(name, corpus.cell_types, "--contexts", "cell type")
    return [corpus.cell_types.index(name) for name in dict.fromkeys(names)]


def _about_cells(requests: Sequence[Request]) -> str:
    """Say how the numbers of cells were found."""
    meaning = {"asked": "as asked", "real": "as many as the real ones", "default": "the default"}
    parts = []
    for rule, text in meaning.items():
        sizes = [request.num_cells for request in requests if request.rule == rule]
        if sizes:
            low, high = min(sizes), max(sizes)
            parts.append(f"{len(sizes)} with {low if low == high else f'{low} to {high}'} cells ({text})")
    return ", ".join(parts)


def _read_targets(text: str, corpus: PerturbedCorpus) -> tuple[list[Wanted], bool]:
    """Return the perturbations of a file or a list, and whether they name contexts by the column `context`."""
    path = Path(text)
    if path.suffix not in (".csv", ".tsv"):
        # `Path.is_file` raises where a list of names is longer than a file's name may be.
        given = read_names(text, "--targets") if os.path.isfile(text) else text.split(",")
        names = [name.strip() for name in given if name.strip()]
        if not names:
            raise UserError(f"--targets {text}: it names no target")
        return [Wanted(name) for name in dict.fromkeys(names)], False
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        reader = csv.DictReader(lines, delimiter="," if path.suffix == ".csv" else "\t")
        header, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--targets {path}: cannot be read ({error})") from error
    if "target_gene" not in header or not rows:
        raise UserError(
            f"--targets {path}: it has no column target_gene, or no row; its columns: {listed(header)}"
        )
    columns = [name for name in ("cell_type", "context") if name in header]
    if len(columns) == 2:
        raise UserError(
            f"--targets {path}: it has cell_type and context, which mean the same; leave one of them out"
        )
    wanted = []
    for number, row in enumerate(rows, 2):
        where, count, cell_type = f"--targets {path}, line {number}", None, None
        if not row["target_gene"]:
            raise UserError(f"{where}: target_gene is empty")
        if row.get("n_cells"):
            count = int(row["n_cells"]) if re.fullmatch("[0-9]{1,9}", row["n_cells"]) else 0
            if count < 1:
                raise UserError(
                    f"{where}: n_cells is {row['n_cells']!r}; it must be a whole number, 1 to 999999999"
                )
        if columns and row[columns[0]]:
            check_known(row[columns[0]], corpus.cell_types, where, "cell type")
            cell_type = corpus.cell_types.index(row[columns[0]])
        wanted.append(Wanted(row["target_gene"], cell_type, count))
    return wanted, "context" in columns


def _write_all(
    arguments: argparse.Namespace,
    opened: PerturbationModel,
    plan: _Plan,
    sets: PredictionSets,
    decoder: ValueDecoder,
    ranks: Ranks,
    blocks: Iterator[Block],
) -> None:
    """Write the files on rank 0, real cells first; the others only draw."""
    corpus = plan.corpus
    if arguments.real is not None and not len(plan.real_rows):
        raise UserError(f"--real: {corpus.info.path} has no cells of what is predicted")
    if not ranks.is_main:
        for _ in blocks:
            pass
        return
    shared = {"overwrite": arguments.overwrite, "has_context": plan.has_context}
    about = {"preset": arguments.preset, "data": Path(arguments.data).name}
    others = (
        (arguments.real, "real", plan.real_rows, plan.cell_types),
        (arguments.train, "training", plan.training_rows, None),
    )
    for path, part, rows, types in others:
        if path is not None and rows is not None:
            told = {**about, "part": part}
            written = write_corpus_cells(path, corpus, rows, decoder, told, control_types=types, **shared)
            notice(f"wrote {path}: {len(rows):,} {part} cells and {written.num_cells - len(rows):,} controls")
    about |= {
        "model": opened.path.name,
        "phase": opened.settings.phase,
        "num_steps": arguments.num_steps,
        "seed": arguments.seed,
    }
    progress, has_controls = _Progress(sets.num_cells), not arguments.no_controls
    cells, num_capped = write_predicted_cells(
        arguments.output, sets, decoder, blocks, about, has_controls=has_controls, on_cells=progress, **shared
    )
    if num_capped:
        notice(
            f"{counted(num_capped, 'cell')} had more than {MAX_TOTAL:,.0f} counts and were scaled down to that"
        )
    beside = f"{cells.num_cells - sets.num_cells:,} controls" if has_controls else "no controls"
    notice(
        f"wrote {arguments.output}: {sets.num_cells:,} predicted cells, {beside}, {cells.num_values:,} values"
    )


class _Progress:
    """Say now and then how many cells have been predicted."""

    def __init__(self, total: int) -> None:
        self._total, self._said = total, time.monotonic()

    def __call__(self, count: int) -> None:
        if time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            notice(f"predicted {count:,} of {self._total:,} cells")


if __name__ == "__main__":
    raise SystemExit(main())
