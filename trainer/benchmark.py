"""Score a trained model's embeddings of an h5ad file beside baselines: `python -m trainer benchmark --config FILE ...`.

Writes `results.json`, `results.csv` and `embedding.png` into the output folder, and prints the tables.
"""

import argparse
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.errors import DataError
from data.exported import LABELS_FILE
from data.h5ad_cells import H5adCells
from trainer.config.cells import cells_config
from trainer.config.compose import compose
from trainer.config.load import check_front_door, load_run_config
from trainer.console import notice, table
from trainer.distributed import leave_group
from trainer.embed import add_model_arguments, open_both
from trainer.embedding import embed_all, join_ranks
from trainer.errors import UserError
from trainer.exits import run_command
from trainer.phase_sources import labelled_in_training, shares_classes
from trainer.saved_model import SavedModel
from trainer.scoring.benchmarks import Results, pivot, run_benchmarks
from trainer.scoring.cells import Cells, check_labels
from trainer.scoring.embedding_baselines import representations
from trainer.scoring.results import LAYOUTS, PICTURE_FILE, choose_layout, draw_embedding, write_results
from trainer.scoring.specs import SPECS, EmbeddingQualitySpec, Spec, parse_specs, titles

MODEL, UNTRAINED = "model", "untrained"
"""Representations: the model's embedding, and that of the same network at random initialisation."""
_BATCH_COLUMNS = ("technical_batch", "batch", "gem_group")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for the user's mistake, 130 when interrupted, 1 for anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer benchmark",
        allow_abbrev=False,
        description="Score a trained model's embeddings of all cells of an h5ad file, beside baselines.",
        epilog="Exit codes: 0 done, 2 a mistake in the command or its files, 130 interrupted, 1 anything else.",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="the YAML file whose benchmarks are run: eval.benchmarks, or datasets[].benchmarks",
    )
    add_model_arguments(parser)
    parser.set_defaults(batch_size=None)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder for results; files there are replaced",
    )
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="how the picture places the cells; without it by UMAP where umap-learn is installed, which first compiles "
        "for some ten seconds, else by PCA",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set one value of the YAML file")
    try:
        arguments = parser.parse_intermixed_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    return run_command(lambda: _benchmark(arguments))


def read_benchmarks(path: str | Path, overrides: Sequence[str] = ()) -> tuple[list[Spec], int]:
    """Return the benchmarks of a YAML file of either kind, and the cells of a forward pass.

    Raises:
        ConfigError, UserError: it is not valid, or names no benchmark.
    """
    raw, problems, sources = compose(Path(path).expanduser(), list(overrides))
    if check_front_door(raw, sources) == "cells":
        settings = cells_config(raw, sources, problems).eval
        specs, batch_size, where = (
            parse_specs(settings.benchmarks, "eval.benchmarks"),
            settings.batch_size,
            "eval",
        )
    else:
        phases = [
            each.benchmarks for each in load_run_config(path, list(overrides)).datasets if each.benchmarks
        ]
        tables = [spec for phase in phases for spec in phase.tables()]
        found = {str(spec.options()): spec for spec in parse_specs(tables, "datasets.benchmarks.specs")}
        specs, where = list(found.values()), "datasets[].benchmarks"
        batch_size = max((phase.batch_size for phase in phases), default=1)
    if not specs:
        raise UserError(f"{path}: {where} names no benchmark; there are: {', '.join(SPECS)}")
    return specs, batch_size


def _benchmark(arguments: argparse.Namespace) -> int:
    specs, batch_size = read_benchmarks(arguments.config, arguments.overrides)
    arguments.batch_size = batch_size if arguments.batch_size is None else arguments.batch_size
    output = Path(os.path.abspath(arguments.output))
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    layout = choose_layout(arguments.layout)
    ranks, device = join_ranks(arguments.device)
    try:
        opened, file = open_both(arguments, device)
        with file:
            # Before anything is computed, and on every rank alike.
            obs = _read_labels(specs, file)
            _make_folder(output)
            trained = embed_all(opened.model, file, ranks, arguments.batch_size)
            untrained = embed_all(opened.untrained(), file, ranks, arguments.batch_size)
            if trained is None or untrained is None:
                return 0
            kept = ~trained.lack_genes
            embedding, cells = trained.embeddings[kept], _cells(file, obs, kept)
            found = {MODEL: embedding, UNTRAINED: untrained.embeddings[kept], **representations(cells)}
            results = run_benchmarks(specs, found, cells)
            results = _with_notes(
                results, _left_out(kept), _seen_labels(specs, opened, arguments.data, cells)
            )
            write_results(output, results, _facts(arguments, opened, file, embedding, specs))
            coloured = {name: labels[kept] for name, labels in _coloured_by(specs, file, obs).items()}
            title = f"{len(cells):,} cells of {arguments.data.name}"
            picture = output / PICTURE_FILE
            method = draw_embedding(picture, embedding, coloured, cells.depth, title=title, layout=layout)
        _say(results, output, method)
        return 0
    finally:
        leave_group()


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output {output}: {error.strerror or error}; name a folder that can be made"
        ) from error


def _read_labels(specs: Sequence[Spec], file: H5adCells) -> dict[str, NDArray[np.str_]]:
    """Return the obs columns that benchmarks read, by name.

    Raises:
        UserError: names the benchmark that lacks a column, or that the labels would let fail.
    """
    obs: dict[str, NDArray[np.str_]] = {}
    for title, spec in zip(titles(specs), specs, strict=True):
        for column in spec.columns():
            try:
                obs[column] = file.labels(column)
            except DataError as error:
                option = next(name for name, value in spec.model_dump().items() if value == column)
                raise UserError(f"benchmark {title}: {option}: {error}") from None
        try:
            check_labels(spec, obs)
        except UserError as error:
            raise UserError(f"benchmark {title}: {error}") from None
    return obs


def _cells(file: H5adCells, obs: dict[str, NDArray[np.str_]], kept: NDArray[np.bool_]) -> Cells:
    """Return what benchmarks know of the cells that are kept.

    Raises:
        UserError: there is none.
    """
    if not kept.any():
        raise UserError(
            f"{file.file.path}: none of its {len(kept):,} cells has a count of any of the model's genes; choose the "
            f"matrix with --layer (read: {file.matrix_name})"
        )
    depth, measure = file.depth()
    labels = {name: values[kept] for name, values in obs.items()}
    return Cells(labels, file.expression()[kept], depth[kept], measure)


def _left_out(kept: NDArray[np.bool_]) -> list[str]:
    """Return which cells no benchmark saw, in words."""
    number = int((~kept).sum())
    return [f"left out: {number:,} cells without a count of any of the model's genes"] if number else []


def _seen_labels(specs: Sequence[Spec], opened: SavedModel, data: Path, cells: Cells) -> dict[str, list[str]]:
    """Return for each benchmark's title which of its labels the model was trained on, in words."""
    said = {}
    for title, spec in zip(titles(specs), specs, strict=True):
        notes = []
        for column in spec.columns():
            values = np.unique(cells.obs[column]).tolist()
            notes += labelled_in_training(opened.phases, opened.label_names, column, values, data)
            if not opened.phases and shares_classes(values, opened.label_names, is_named=False):
                notes.append(
                    f"these labels were in the training of the model: obs column {column!r} has names that "
                    f"{opened.path.name}/{LABELS_FILE} holds; an export does not say which cells it learned them from"
                )
        if notes:
            said[title] = [*notes, f"so {MODEL} was told answers that {UNTRAINED} and the baselines were not"]
    return said


def _with_notes(results: Results, common: list[str], by_title: dict[str, list[str]]) -> Results:
    """Return the results with notes that hold for every benchmark, and those of some."""
    notes = {title: [*by_title.get(title, []), *common, *own] for title, own in results.notes.items()}
    return replace(results, notes=notes)


def _facts(
    arguments: argparse.Namespace,
    opened: SavedModel,
    file: H5adCells,
    embedding: NDArray[np.floating],
    specs: Sequence[Spec],
) -> dict[str, Any]:
    versions = {"torch": torch.__version__, "scikit-learn": importlib.metadata.version("scikit-learn")}
    return {
        "model": str(opened.path),
        "data": str(arguments.data),
        "matrix": file.matrix_name,
        "genes": file.account,
        "num_cells": len(embedding),
        "embedding_dim": int(embedding.shape[1]),
        "benchmarks": [spec.options() for spec in specs],
        "versions": versions,
    }


def _coloured_by(
    specs: Sequence[Spec], file: H5adCells, obs: dict[str, NDArray[np.str_]]
) -> dict[str, NDArray[np.str_]]:
    """Return what the picture is coloured by: the first label that a benchmark reads, and the technical batch."""
    label = specs[0].columns()[0]
    coloured = {label: obs[label]}
    named = [spec.batch_key for spec in specs if isinstance(spec, EmbeddingQualitySpec) and spec.batch_key]
    there = [*named, *(name for name in _BATCH_COLUMNS if name in file.file.obs.columns())]
    if there:
        coloured[f"technical batch: {there[0]}"] = file.labels(there[0])
    return coloured


def _say(results: Results, output: Path, method: str) -> None:
    for title, headers, lines in pivot(results):
        notice(f"\n{title}")
        notice(table(headers, lines))
        for note in results.notes.get(title, []):
            notice(f"  {note}")
    notice(f"\nwrote {output}: results.json, results.csv, {PICTURE_FILE} ({method})")
