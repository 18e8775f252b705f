"""The rules for files of predicted cells: what scoring needs, and what an upload to the challenge of each year needs.

All violations of a file are found before the first is reported, each with what is allowed.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.scoring.vcc_file import PerturbedFile, Values
from trainer.scoring.vcc_options import (
    MAX_COUNTS_PER_CELL,
    MAX_LOGNORM,
    PERTURBATION_COLUMN,
    VCC2025,
    Preset,
    ScoreOptions,
)

CONTEXT_COLUMN = "context"
"""The obs column that names the challenge's contexts."""
_NAMES_SHOWN = 5
_MIN_CELLS = 2


def check_prediction(prediction: PerturbedFile, options: ScoreOptions) -> list[str]:
    """Return what keeps a prediction from being scored, whatever it is compared with.

    - obs `target_gene`, with a label in every cell: cell-eval's and cell-eval2's `pert_col`.
    - no gene twice: both programs match genes by name.
    - finite, non-negative values (cell-eval2 `norm.validate_input_type`; cell-eval `utils.guess_is_lognorm`).
    - 2026: whole counts (`norm.validate_input_type`), at most 1,000,000 a cell (`norm.check_scale_limit`).
    - 2025: log-normalised values below 15, or counts, which are normalised (`utils.guess_is_lognorm`).
    - two cells of each perturbation: 2026 takes the noise out of means by leaving out one cell (`moments`).
    """
    return [
        *_wrong_labels(prediction),
        *_repeated_genes(prediction.genes),
        *_wrong_values(prediction.values, options.preset, prediction.about.get("kind")),
        *_few_cells(prediction, options),
    ]


def check_pair(prediction: PerturbedFile, real: PerturbedFile, options: ScoreOptions) -> list[str]:
    """Return what keeps a prediction from being scored against real cells, each line with what is allowed.

    Beside the rules of `check_prediction`:

    - the same genes in the same order, the same perturbations in each context: cell-eval refuses anything else
      (`_types/_anndata.PerturbationAnndataPair`), and cell-eval2 compares matrices column by column.
    - control cells in the real file, in each context.
    """
    problems = check_prediction(prediction, options)
    problems += [f"real file: {problem}" for problem in _wrong_labels(real)]
    problems += [f"real file: {problem}" for problem in _repeated_genes(real.genes)]
    problems += [f"real file: {problem}" for problem in _wrong_values(real.values, options.preset, None)]
    problems += _genes_differ(prediction.genes, real.genes, "the real file")
    if not all(PERTURBATION_COLUMN in each.labels for each in (prediction, real)):
        return problems
    context_key = used_context(prediction, real, options)
    if options.context_key is not None and context_key is None:
        missing = [each.path.name for each in (prediction, real) if options.context_key not in each.columns]
        problems.append(f"contexts: obs has no column {options.context_key!r} in {' and '.join(missing)}")
        return problems
    predicted, measured = (_groups(each, context_key) for each in (prediction, real))
    strange = sorted(predicted.keys() - measured.keys())
    if strange:
        there = _some(sorted(measured))
        problems.append(f"contexts: {_some(strange)} not in the real file, whose {context_key} are {there}")
    lacking = sorted(measured.keys() - predicted.keys())
    if lacking and not options.only_predicted:
        problems.append(
            f"contexts: {_some(lacking)} missing; all contexts of the real file are predicted, or say --only-predicted"
        )
    for context in sorted(measured.keys() & predicted.keys()):
        where = f" of {context_key} {context!r}" if context_key else ""
        problems += _perturbations_differ(predicted[context], measured[context], where, options)
        controls = measured[context].get(options.control_label, 0)
        if controls < _MIN_CELLS:
            problems.append(
                f"real file: {controls} control cells{where}: no {PERTURBATION_COLUMN} is {options.control_label!r} "
                f"(--control-label); at least {_MIN_CELLS} are needed; there are: {_some(sorted(measured[context]))}"
            )
    return problems


def check_upload(
    prediction: PerturbedFile,
    options: ScoreOptions,
    genes: Sequence[str] | None,
    perturbations: Sequence[str] | None,
) -> list[str]:
    """Return what an upload to the challenge would be refused for, each line with what is allowed.

    - 2025, `cell_eval/_cli/_prep.py` (`strip_anndata`): 18,080 genes, those of the given list, in any order, which
      `prep` restores; at most 200,000 cells; obs `target_gene`, control cells among them; values as in
      `check_prediction`.
    - 2026, the challenge's upload contract: 18,533 genes in the given order, obs `target_gene` and `context`, 300
      perturbations of 400 cells in each context, no control cells, whole counts of at most 1,000,000 a cell, at most
      4,750,000,000 stored values.

    Args:
        prediction: the file.
        options: of the score.
        genes: the challenge's list of genes; None checks their number alone.
        perturbations: the challenge's list of perturbations; None checks their number alone.
    """
    preset = options.preset
    problems = check_prediction(prediction, options)
    if len(prediction.genes) != preset.num_genes:
        problems.append(f"genes: {len(prediction.genes):,}; an upload has {preset.num_genes:,}")
    if genes is not None:
        differ = _genes_differ(prediction.genes, genes, "the challenge's list")
        # cell-eval's prep puts the right genes into the right order by itself.
        is_order = len(differ) == 1 and "order" in differ[0]
        problems += [] if preset.uploads_controls and is_order else differ
    if preset.max_cells is not None and prediction.num_cells > preset.max_cells:
        problems.append(
            f"cells: {prediction.num_cells:,}; at most {preset.max_cells:,} with the control cells (`cell-eval prep`)"
        )
    stored = prediction.values.num_stored
    if preset.max_stored_values is not None and stored > preset.max_stored_values:
        problems.append(f"size: {stored:,} stored values; at most {preset.max_stored_values:,}")
    if PERTURBATION_COLUMN in prediction.labels:
        problems += _wrong_uploaded_groups(prediction, options, perturbations)
    return problems


def raise_problems(path: Path, what: str, problems: Sequence[str]) -> None:
    """Raise with every problem, if there is one.

    Raises:
        UserError: there is one.
    """
    if problems:
        lines = [f"{path}: {len(problems)} violation{'s'[: len(problems) > 1]} of {what}:", *problems]
        raise UserError("\n  - ".join(lines))


def used_context(prediction: PerturbedFile, real: PerturbedFile | None, options: ScoreOptions) -> str | None:
    """Return the obs column by which cells are scored apart; None where all are scored together."""
    key = options.context_key or CONTEXT_COLUMN
    files = [prediction] if real is None else [prediction, real]
    return key if all(key in each.labels for each in files) else None


def read_names(path: str | Path) -> list[str]:
    """Read names of genes or perturbations: a CSV with a column `target_gene`, else the first column without a header.

    Raises:
        UserError: it cannot be read, or holds no name.
    """
    path = Path(path).expanduser()
    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8").splitlines()) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a list of names: {error}") from None
    column = 0
    if rows and PERTURBATION_COLUMN in rows[0]:
        column = rows[0].index(PERTURBATION_COLUMN)
        rows = rows[1:]
    names = [row[column].strip() for row in rows if len(row) > column and row[column].strip()]
    if not names:
        raise UserError(
            f"{path}: it holds no name; give one a line, or a CSV with a column {PERTURBATION_COLUMN}"
        )
    return names


def _wrong_labels(file: PerturbedFile) -> list[str]:
    if PERTURBATION_COLUMN not in file.labels:
        there = ", ".join(file.columns) or "none"
        return [
            f"obs: no column {PERTURBATION_COLUMN!r}, which names each cell's perturbation; there are: {there}"
        ]
    empty = int((file.labels[PERTURBATION_COLUMN] == "").sum())
    return (
        [f"obs {PERTURBATION_COLUMN}: {empty:,} cells without a name; every cell needs one"] if empty else []
    )


def _repeated_genes(genes: Sequence[str]) -> list[str]:
    names, counts = np.unique(np.asarray(genes), return_counts=True)
    repeated = [str(name) for name in names[counts > 1]]
    if not repeated:
        return []
    return [f"genes: {len(repeated):,} names more than once ({_some(repeated)}); each gene is named once"]


def _wrong_values(values: Values, preset: Preset, stated_kind: Any) -> list[str]:
    problems = []
    if values.num_not_finite:
        problems.append(f"values: {values.num_not_finite:,} are NaN or infinite; all must be finite")
    if values.num_negative:
        problems.append(f"values: {values.num_negative:,} are negative; none may be below 0")
    if preset.kind == "counts":
        if values.num_fractional:
            hint = f"; it says of itself that it holds {stated_kind}" if isinstance(stated_kind, str) else ""
            is_logged = values.highest < MAX_LOGNORM and not values.num_negative
            other = f" (--preset {VCC2025.name} scores log-normalised values)" if is_logged else ""
            problems.append(
                f"values: {values.num_fractional:,} are no whole numbers (such as {values.example_fractional:g})"
                f"{hint}; {preset.name} takes raw counts{other}"
            )
        deep = values.totals > MAX_COUNTS_PER_CELL
        if deep.any():
            row = int(np.argmax(values.totals))
            problems.append(
                f"size: {int(deep.sum()):,} cells have more than {MAX_COUNTS_PER_CELL:,} counts "
                f"(row {row}: {values.totals[row]:,.0f}); that is the most a cell may have"
            )
    elif values.num_fractional and values.highest >= MAX_LOGNORM:
        problems.append(
            f"values: up to {values.highest:g} and not whole; log-normalised values (natural logarithm) are below "
            f"{MAX_LOGNORM:g}, counts are whole"
        )
    return problems


def _few_cells(file: PerturbedFile, options: ScoreOptions) -> list[str]:
    if PERTURBATION_COLUMN not in file.labels:
        return []
    problems = []
    context_key = used_context(file, None, options)
    for context, sizes in _groups(file, context_key).items():
        few = [f"{name} ({size})" for name, size in sizes.items() if size < _MIN_CELLS and name]
        if few:
            where = f" in {context_key} {context!r}" if context_key else ""
            problems.append(
                f"cells: {len(few):,} perturbations have fewer than {_MIN_CELLS} cells{where} ({_some(few)}); "
                f"each needs at least {_MIN_CELLS}"
            )
    return problems


def _genes_differ(mine: Sequence[str], others: Sequence[str], whose: str) -> list[str]:
    missing, extra = set(others) - set(mine), set(mine) - set(others)
    problems = []
    if missing:
        named = _some([name for name in others if name in missing])
        problems.append(
            f"genes: {len(missing):,} of {whose} are missing ({named}); all of them must be there"
        )
    if extra:
        named = _some([name for name in mine if name in extra])
        problems.append(f"genes: {len(extra):,} are not in {whose} ({named}); no other may be there")
    if not problems and list(mine) != list(others) and len(mine) == len(others):
        at = next(index for index, pair in enumerate(zip(mine, others, strict=True)) if pair[0] != pair[1])
        problems.append(
            f"genes: not in the order of {whose}: column {at} is {mine[at]!r}, which must be {others[at]!r}"
        )
    return problems


def _perturbations_differ(
    predicted: Mapping[str, int], measured: Mapping[str, int], where: str, options: ScoreOptions
) -> list[str]:
    mine, others = set(predicted) - {options.control_label, ""}, set(measured) - {options.control_label, ""}
    problems = []
    if others - mine and not options.only_predicted:
        problems.append(
            f"perturbations: {len(others - mine):,} of the real file{where} are missing "
            f"({_some(sorted(others - mine))}); all are predicted, or say --only-predicted"
        )
    if mine - others:
        problems.append(
            f"perturbations: {len(mine - others):,}{where} are not in the real file ({_some(sorted(mine - others))}); "
            "leave them out"
        )
    few = [f"{name} ({measured[name]})" for name in sorted(mine & others) if measured[name] < _MIN_CELLS]
    if few:
        problems.append(
            f"real file: {len(few):,} perturbations have fewer than {_MIN_CELLS} cells{where} ({_some(few)}); "
            "leave them out of both files"
        )
    if not mine:
        problems.append(f"perturbations: none{where}; all cells are controls ({options.control_label!r})")
    return problems


def _wrong_uploaded_groups(
    prediction: PerturbedFile, options: ScoreOptions, perturbations: Sequence[str] | None
) -> list[str]:
    preset, problems = options.preset, []
    labels = prediction.labels[PERTURBATION_COLUMN]
    num_controls = int((labels == options.control_label).sum())
    if preset.uploads_controls and not num_controls:
        problems.append(
            f"control cells: none; an upload has rows of {options.control_label!r} among its cells"
        )
    if not preset.uploads_controls and num_controls:
        problems.append(
            f"control cells: {num_controls:,} rows of {options.control_label!r}; an upload has none"
        )
    context_key = used_context(prediction, None, options)
    if preset.perturbations_per_context is not None and context_key is None:
        problems.append(
            f"obs: no column {options.context_key or CONTEXT_COLUMN!r}, which names each cell's context"
        )
    if context_key is not None and (prediction.labels[context_key] == "").any():
        empty = int((prediction.labels[context_key] == "").sum())
        problems.append(f"obs {context_key}: {empty:,} cells without a name; every cell needs one")
    for context, sizes in _groups(prediction, context_key).items():
        where = f" in {context_key} {context!r}" if context_key else ""
        mine = {name: size for name, size in sizes.items() if name not in (options.control_label, "")}
        wanted = preset.perturbations_per_context
        if wanted is not None and len(mine) != wanted:
            problems.append(f"perturbations: {len(mine):,}{where}; an upload has {wanted:,}")
        if perturbations is not None:
            lacking = [name for name in perturbations if name not in mine and name != options.control_label]
            strange = sorted(mine.keys() - set(perturbations))
            if lacking:
                problems.append(f"perturbations: {len(lacking):,}{where} are missing ({_some(lacking)})")
            if strange:
                problems.append(
                    f"perturbations: {len(strange):,}{where} were not asked for ({_some(strange)})"
                )
        each = preset.cells_per_perturbation
        wrong = [f"{name} ({size:,})" for name, size in mine.items() if size != each] if each else []
        if wrong:
            problems.append(
                f"cells: {len(wrong):,} perturbations{where} have another number of cells than {each} ({_some(wrong)})"
            )
    return problems


def _groups(file: PerturbedFile, context_key: str | None) -> dict[str, dict[str, int]]:
    """Return the cells of each perturbation by context, which is empty where there are none."""
    labels = file.labels[PERTURBATION_COLUMN]
    contexts = file.labels[context_key] if context_key else np.full(len(labels), "")
    found: dict[str, dict[str, int]] = {}
    for context in np.unique(contexts):
        names, counts = np.unique(labels[contexts == context], return_counts=True)
        found[str(context)] = _sizes(names, counts)
    return found


def _sizes(names: NDArray[np.str_], counts: NDArray[np.int64]) -> dict[str, int]:
    return {str(name): int(count) for name, count in zip(names, counts, strict=True)}


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
