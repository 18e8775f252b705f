"""Score predicted cells by the Virtual Cell Challenge's programs, beside baselines and a ceiling of the same cells."""

import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import UserError
from trainer.scoring import vcc_programs as programs
from trainer.scoring.benchmarks import Results, Row
from trainer.scoring.results import JSON_FILE, write_results
from trainer.scoring.vcc_baselines import copied_controls, learn_mean_response, mean_response_cells
from trainer.scoring.vcc_cells import (
    PerturbedCells,
    join,
    load_cells,
    prepared,
    shared_target_sum,
    write_cells,
)
from trainer.scoring.vcc_contract import CONTEXT_COLUMN, check_pair, raise_problems, used_context
from trainer.scoring.vcc_file import PerturbedFile, read_perturbed_file, stated_control_label
from trainer.scoring.vcc_options import PERTURBATION_COLUMN, ScoreOptions, preset_named

MODEL, MEAN_RESPONSE, CONTROLS, CEILING = "model", "mean response", "controls", "ceiling"
"""Representations: the prediction, what it has to beat, and what the noise of the real cells allows."""
BASELINES = (MEAN_RESPONSE, CONTROLS, CEILING)
SCORE_SUFFIX = "_score"
"""Ends the name of the benchmark whose figures are rescaled: 0 is the mean response, 1 the ceiling (2025: perfect)."""
AVERAGE = "avg_score"
"""The metric that is the year's score: the mean of the rescaled ones."""
TIMEOUT_SECONDS = 4 * 3600.0


@dataclass(frozen=True)
class _Context:
    """Hold one context's place in the temporary folder."""

    name: str
    folder: Path

    def cells(self, representation: str) -> Path:
        return self.folder / f"{_slug(representation)}.h5ad"

    def output(self, representation: str) -> Path:
        return self.folder / _slug(representation)

    @property
    def real(self) -> Path:
        return self.folder / "real.h5ad"

    def titled(self, part: str) -> str:
        return f"{part} of {self.name}" if self.name else part


@dataclass(frozen=True)
class _Plan:
    """Say what is scored beside the prediction."""

    options: ScoreOptions
    baselines: Sequence[str]
    train: Sequence[Path]
    reused: dict[str, Any] | None

    @property
    def is_cell_eval(self) -> bool:
        """Tell the program of 2025, which has a cache of its own and rescales without a ceiling."""
        return self.options.preset.program == "cell-eval"

    @property
    def made(self) -> Sequence[str]:
        """Name the baselines that are made and scored here."""
        return self.baselines if self.reused is None else ()


def score(
    prediction: str | Path,
    real: str | Path,
    preset: str,
    output: str | Path,
    *,
    baselines: Sequence[str] = BASELINES,
    train: Sequence[str | Path] = (),
    reuse: str | Path | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    **options: Any,
) -> list[dict[str, Any]]:
    """Score predicted cells and return every figure as a row with the fields of `trainer.scoring.benchmarks.Row`.

    The same files, options and versions give the same figures. `output` is a folder with `results.json`, `results.csv`
    and, for each representation, the tables that the program wrote; it is there when it is whole.

    Args:
        prediction: h5ad file of predicted cells; control cells are those of `real` where it has none.
        real: h5ad file of measured cells of the same perturbations, and of control cells.
        preset: `vcc2025` or `vcc2026`.
        output: the folder; an earlier one of this function is replaced.
        baselines: which of `BASELINES` to score too; without the mean response there is no score, only metrics.
        train: h5ad files of the cells trained on, from which the mean response is learned; without any it is the
            program's own baseline, which has seen the cells it is scored on.
        reuse: an output of this function for the same real cells, from which baselines are taken as they are.
        timeout_seconds: for the program, all of its runs together.
        **options: other fields of `ScoreOptions`; without `control_label` it is what the files state.

    Raises:
        UserError: a file breaks the rules (all violations are named), or the program is missing or failed.
    """
    if "control_label" not in options:
        options["control_label"] = stated_control_label(prediction, real)
    chosen = ScoreOptions(preset_named(preset), **options)
    results = score_files(
        Path(prediction),
        Path(real),
        Path(output),
        chosen,
        baselines=baselines,
        train=[Path(path) for path in train],
        reuse=None if reuse is None else Path(reuse),
        timeout_seconds=timeout_seconds,
    )
    return [asdict(row) for row in results.rows]


def score_files(
    prediction: Path,
    real: Path,
    output: Path,
    options: ScoreOptions,
    *,
    baselines: Sequence[str],
    train: Sequence[Path],
    reuse: Path | None,
    timeout_seconds: float,
) -> Results:
    """Do what `score` does, and return its notes too."""
    unknown = sorted(set(baselines) - set(BASELINES))
    if unknown:
        raise UserError(f"there is no baseline {unknown[0]!r}; there are: {', '.join(BASELINES)}")
    version = programs.installed_version(options.preset)
    output = Path(os.path.abspath(output.expanduser()))
    _check_output(output)
    files = _read_pair(prediction, real, options)
    notes: list[str] = []
    options = _with_target_genes(files[1], options, notes)
    target_sum = shared_target_sum(*files, options, notes)
    identity = _identity(files[1], train, options, target_sum, version)
    reused = None if reuse is None else _read_reused(reuse, identity, baselines)
    plan = _Plan(options, baselines, train, reused)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cellphase-score-") as scratch:
        contexts = _write_files(Path(scratch), files, plan, target_sum, notes)
        calls = [call for context in contexts for call in _calls(context, plan)]
        failed = programs.run_calls(calls, Path(scratch) / "calls", options, timeout_seconds)
        rows = _rows(contexts, plan, failed, notes)
        results = Results(rows, {options.preset.name: list(dict.fromkeys(notes))})
        facts = {
            "prediction": str(prediction),
            "real": str(real),
            "train": [str(path) for path in train],
            "preset": options.preset.name,
            "contexts": {context.folder.name: context.name for context in contexts},
            "identity": identity,
        }
        _publish(output, contexts, baselines, results, facts)
    return results


def _read_pair(prediction: Path, real: Path, options: ScoreOptions) -> tuple[PerturbedFile, PerturbedFile]:
    """Read what both files hold.

    Raises:
        UserError: the rules keep the one from being scored against the other.
    """
    columns = (PERTURBATION_COLUMN, options.context_key, CONTEXT_COLUMN, options.cell_type_key)
    files = read_perturbed_file(prediction, columns), read_perturbed_file(real, columns)
    problems = check_pair(*files, options)
    raise_problems(files[0].path, f"what {options.preset.name} can score", problems)
    return files


def _with_target_genes(real: PerturbedFile, options: ScoreOptions, notes: list[str]) -> ScoreOptions:
    """Return the options with what the real file says: whether its perturbations are named after genes."""
    labels = set(real.labels[PERTURBATION_COLUMN].tolist()) - {options.control_label}
    if options.preset.kind != "counts" or labels & set(real.genes):
        return options
    notes.append("no perturbation is named after a gene, so no gene is left out as a target")
    return replace(options, has_target_genes=False)


def _write_files(
    scratch: Path,
    files: tuple[PerturbedFile, PerturbedFile],
    plan: _Plan,
    target_sum: float | None,
    notes: list[str],
) -> list[_Context]:
    """Write the cells of each context and its baselines; return the contexts."""
    options = plan.options
    context_key = used_context(*files, options)
    cell_type_key = options.cell_type_key if options.cell_type_key in files[1].labels else None
    real = prepared(files[1], load_cells(files[1], cell_type_key, context_key), target_sum)
    mine = prepared(files[0], load_cells(files[0], None, context_key), target_sum)
    names = sorted(set(mine.contexts.tolist()))
    if options.only_predicted:
        real = _only_predicted(real, mine, options)
    _note_sizes(mine, real, options, notes)
    _note_cell_types(real, options, notes)
    response = None
    if plan.train and MEAN_RESPONSE in plan.made:
        response = learn_mean_response(plan.train, real, options, target_sum, cell_type_key, notes)
    elif MEAN_RESPONSE in plan.made:
        notes.append(
            f"mean response: {options.preset.program}'s own baseline, made of the real cells that it is scored on; "
            "--train makes one of training perturbations"
        )
    contexts = []
    for index, name in enumerate(names):
        context = _Context(name, scratch / f"context_{index:02d}")
        context.folder.mkdir()
        of_real, of_mine = real.take(real.contexts == name), mine.take(mine.contexts == name)
        is_control = of_real.labels == options.control_label
        if not (of_mine.labels == options.control_label).any():
            of_mine = join([of_mine, of_real.take(is_control)])
            notes.append("the prediction has no control cells; those of the real file were added")
        write_cells(of_real, context.real)
        write_cells(of_mine, context.cells(MODEL))
        if response is not None:
            rng = np.random.default_rng([options.seed, index, 0])
            write_cells(mean_response_cells(of_real, response, options, rng), context.cells(MEAN_RESPONSE))
        if CONTROLS in plan.made:
            rng = np.random.default_rng([options.seed, index, 1])
            write_cells(copied_controls(of_real, options, rng), context.cells(CONTROLS))
        contexts.append(context)
    return contexts


def _calls(context: _Context, plan: _Plan) -> Iterator[programs.Call]:
    """Yield the program's calls for one context, those whose output others need first."""
    options, output, cells = plan.options, context.output, context.cells
    # The first call of either program leaves what the real cells alone decide to the calls after it.
    cache = None if plan.is_cell_eval else context.folder / "cache"
    yield programs.score_prediction(
        context.titled(MODEL), cells(MODEL), context.real, output(MODEL), cache, options
    )
    if plan.is_cell_eval:
        cache = output(MODEL) / "real_de.csv"
    if plan.reused is not None:
        _take_reused(Path(plan.reused["folder"]), context, plan.baselines)
    if CEILING in plan.made:
        yield from programs.split_in_halves(
            context.titled(CEILING), context.real, output(CEILING), cache, options
        )
    is_own = MEAN_RESPONSE in plan.made and not plan.train
    if is_own:
        title, place = context.titled(f"making the {MEAN_RESPONSE}"), output(MEAN_RESPONSE)
        yield programs.own_baseline(title, context.real, cells(MEAN_RESPONSE), place, options)
    for arm in (MEAN_RESPONSE, CONTROLS):
        # cell-eval2 scores its own mean response where it makes it.
        is_scored_already = arm == MEAN_RESPONSE and is_own and not plan.is_cell_eval
        if arm in plan.made and not is_scored_already:
            yield programs.score_prediction(
                context.titled(arm), cells(arm), context.real, output(arm), cache, options
            )
    if MEAN_RESPONSE in plan.baselines and (plan.is_cell_eval or CEILING in plan.baselines):
        for arm in (MODEL, CONTROLS):
            if arm == MODEL or arm in plan.made:
                yield programs.rescale(
                    context.titled(f"rescaling the {arm}"),
                    output(arm),
                    output(MEAN_RESPONSE),
                    output(CEILING),
                    _rescaled_path(context, arm),
                    options,
                    is_own=not plan.train,
                )


def _rows(contexts: Sequence[_Context], plan: _Plan, failed: dict[str, str], notes: list[str]) -> list[Row]:
    """Return every figure, the mean over contexts; what some context has no figure of is left out and noted."""
    preset = plan.options.preset
    notes += [f"{name} failed: {_first_sentence(error)}" for name, error in failed.items()]
    figures, spreads = _figures(contexts, plan)
    named = {metric for _, _, metric in figures}
    ordered = [*preset.metrics, *sorted(named - {*preset.metrics, AVERAGE}), AVERAGE]
    rows = []
    for key in itertools.product((preset.name, preset.name + SCORE_SUFFIX), ordered, (MODEL, *BASELINES)):
        benchmark, metric, arm = key
        values = figures.get((benchmark, arm, metric), [])
        if len(values) == len(contexts) > 0:
            spread = spreads.get((benchmark, arm, metric)) if len(values) == 1 else statistics.stdev(values)
            rows.append(Row(benchmark, arm, metric, statistics.fmean(values), spread))
        elif values:
            notes.append(f"{arm}: {metric} has a value in {len(values)} of {len(contexts)} contexts only")
    if CEILING in plan.baselines and plan.is_cell_eval:
        notes.append(
            "ceiling: mae is that of halves of the cells, which a perfect prediction of the mean is below"
        )
    if len(contexts) > 1:
        names = ", ".join(context.name for context in contexts)
        notes.append(f"means over {len(contexts)} contexts: {names}")
    if plan.reused is not None:
        notes += [note for note in plan.reused["notes"][preset.name] if note.startswith("mean response")]
    return rows


_Figure = tuple[str, str, str]  # benchmark, representation, metric


def _figures(
    contexts: Sequence[_Context], plan: _Plan
) -> tuple[dict[_Figure, list[float]], dict[_Figure, float]]:
    """Read every figure of every context, and the spreads that the program states of its ceiling."""
    preset = plan.options.preset
    figures: dict[_Figure, list[float]] = {}
    spreads: dict[_Figure, float] = {}
    for context in contexts:
        for arm in (MODEL, *(each for each in BASELINES if each in plan.baselines)):
            if arm == CEILING:
                if not any((context.output(CEILING) / name).exists() for name in _CEILING_FILES):
                    continue
                values, spread = programs.ceilings(context.output(CEILING), preset)
                spreads |= {(preset.name, arm, metric): value for metric, value in spread.items()}
            else:
                values = programs.aggregates(context.output(arm))
            for metric, value in values.items():
                figures.setdefault((preset.name, arm, metric), []).append(value)
            if arm in (MODEL, CONTROLS) and _rescaled_path(context, arm).exists():
                for metric, value in programs.rescaled(_rescaled_path(context, arm), preset).items():
                    figures.setdefault((preset.name + SCORE_SUFFIX, arm, metric), []).append(value)
    return figures, spreads


_CEILING_FILES = ("anchor_agg.parquet", "agg_ceiling_results.csv")


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[a-z)\]])\. ", " ".join(text.split()))[0]


def _rescaled_path(context: _Context, arm: str) -> Path:
    return context.output(arm) / "rescaled.csv"


def _only_predicted(real: PerturbedCells, mine: PerturbedCells, options: ScoreOptions) -> PerturbedCells:
    wanted = set(zip(mine.contexts.tolist(), mine.labels.tolist(), strict=True))
    pairs = zip(real.contexts.tolist(), real.labels.tolist(), strict=True)
    kept = np.array(
        [label == options.control_label or (context, label) in wanted for context, label in pairs]
    )
    return real.take(kept)


def _note_sizes(mine: PerturbedCells, real: PerturbedCells, options: ScoreOptions, notes: list[str]) -> None:
    """Say where a prediction has other numbers of cells than the real file, which move tests of significance."""
    sizes = []
    for cells in (mine, real):
        is_perturbed = cells.labels != options.control_label
        keys = np.char.add(np.char.add(cells.contexts[is_perturbed], "\t"), cells.labels[is_perturbed])
        sizes.append(dict(zip(*np.unique(keys, return_counts=True), strict=True)))
    other = [key for key, size in sizes[0].items() if sizes[1].get(key) != size]
    if other:
        notes.append(
            f"{len(other)} of {len(sizes[0])} predicted perturbations have another number of cells than the real ones, "
            "which moves what is significant"
        )


def _note_cell_types(real: PerturbedCells, options: ScoreOptions, notes: list[str]) -> None:
    """Say where perturbations are compared with controls of cell types that they do not have."""
    types: dict[tuple[str, str], set[str]] = {}
    for context, label, cell_type in zip(
        real.contexts.tolist(), real.labels.tolist(), real.cell_types.tolist(), strict=True
    ):
        types.setdefault((context, label), set()).add(cell_type)
    other = [key for key, mine in types.items() if mine != types[key[0], options.control_label]]
    if other:
        notes.append(
            f"{len(other)} perturbations are of fewer cell types than the controls that they are compared with, so "
            f"that differences of cell types count as response; --context-key {options.cell_type_key} scores each apart"
        )


def _identity(
    real: PerturbedFile, train: Sequence[Path], options: ScoreOptions, target_sum: float | None, version: str
) -> dict[str, Any]:
    """Return what figures of baselines follow from."""
    fields = {**asdict(replace(options, threads=1)), "preset": options.preset.name, "target_sum": target_sum}
    files = {
        name: _digest(path)
        for name, path in (("real", real.path), *((f"train_{i}", p) for i, p in enumerate(train)))
    }
    return {"files": files, "options": fields, "program": f"{options.preset.program} {version}"}


def _digest(path: Path) -> str:
    with path.expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_reused(folder: Path, identity: dict[str, Any], baselines: Sequence[str]) -> dict[str, Any]:
    """Read an earlier output whose baselines are those that would come out.

    Raises:
        UserError: it is of other cells or options, or lacks a baseline.
    """
    try:
        known = json.loads((folder / JSON_FILE).read_text())
        earlier = known["identity"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: no output of an earlier score to take baselines from: {error!r}"
        ) from None
    if earlier != identity:
        parts = [name for name in identity if earlier.get(name) != identity[name]]
        raise UserError(f"{folder}: its baselines are of other {', '.join(parts)}; score them anew")
    for arm in baselines:
        if arm != CEILING and not (folder / _slug(arm)).is_dir():
            raise UserError(f"{folder}: it holds no figures of {arm!r}; score them anew")
    return {**known, "folder": str(folder)}


def _take_reused(folder: Path, context: _Context, baselines: Sequence[str]) -> None:
    for arm in baselines:
        source = folder / _slug(arm) / context.folder.name
        if source.is_dir():
            programs.keep_tables(source, context.output(arm))


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; name a folder")
    if output.exists() and any(output.iterdir()) and not (output / JSON_FILE).is_file():
        raise UserError(f"--output {output} holds other files than a score's; name another folder")


def _publish(
    output: Path,
    contexts: Sequence[_Context],
    baselines: Sequence[str],
    results: Results,
    facts: dict[str, Any],
) -> None:
    """Write the output beside its place, and move it there when it is whole."""
    staged = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        staged.mkdir()
        for context in contexts:
            for arm in _written(context, baselines):
                programs.keep_tables(context.output(arm), staged / _slug(arm) / context.folder.name)
        write_results(staged, results, facts)
        if output.exists():
            old = output.with_name(f".{output.name}.{secrets.token_hex(4)}.old")
            output.rename(old)
            staged.rename(output)
            shutil.rmtree(old)
        else:
            staged.rename(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _written(context: _Context, baselines: Sequence[str]) -> Iterator[str]:
    for arm in (MODEL, *baselines):
        if context.output(arm).is_dir():
            yield arm


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower())
