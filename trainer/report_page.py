"""The page of a report: HTML and CSS in one file, which loads nothing and runs nothing; every text is escaped."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from trainer.cells_index import EpochCells, unit_of
from trainer.console import counted, printable
from trainer.exits import INTERRUPTED, PREEMPTED
from trainer.report_charts import NUM_COLOURS, Series, Span, chart, running_mean
from trainer.run_facts import RunFacts, as_number

MARK = "<!-- a report of python -m trainer report -->"
_MOST_NAMES = 60
_MOST_STEPS = 20


class Html(str):
    """Text that is HTML already; all other text is escaped."""


def write_page(runs: Sequence[RunFacts]) -> str:
    """Return the page about one run, or about several beside each other."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = _one(runs[0]) if len(runs) == 1 else _several(runs)
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    page = (
        f"<!DOCTYPE html>\n{MARK}\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n{body}\n"
        f"<footer>Written {_text(_when(datetime.now(UTC).isoformat()))} from the files of the run folder.</footer>\n"
        "</main></body></html>\n"
    )
    return printable(page)


def _one(run: RunFacts) -> str:
    config = _section("Configuration", _table(["key", "value"], [*_flat(run.config).items()], "config"))
    return "\n".join([_heading(run), _cards(run), *_sections(run), config])


def _several(runs: Sequence[RunFacts]) -> str:
    names = _distinct_names(runs)
    summary = [dict(_summary(run)) for run in runs]
    labels = list(dict.fromkeys(label for each in summary for label in each))
    headers = ["", *names]
    spans = [_spans(run) for run in runs]
    shared = spans[0] if all(each == spans[0] for each in spans) else []
    each_run = [
        (name, run, index % NUM_COLOURS) for index, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    charts = [
        _figure(
            "Training loss, running mean",
            [Series(name, *_smooth(run, "loss"), colour=colour) for name, run, colour in each_run],
            shared,
        ),
        _figure(
            "Validation loss", [_validation(run, name, colour) for name, run, colour in each_run], shared
        ),
        _figure(
            "Learning rate",
            [Series(name, *_column(run, "lr"), colour=colour) for name, run, colour in each_run],
            shared,
            height=180,
            from_zero=True,
        ),
    ]
    parts = [
        f"<h1>{len(runs)} runs</h1>",
        _table(headers, [[label, *(each.get(label) for each in summary)] for label in labels], "wide"),
        _section("Training", *charts),
        _section("Evaluations beside each other", _compared_evaluations(runs, names)),
        _section("Differences of the configurations", _differences(runs, names)),
    ]
    for name, run in zip(names, runs, strict=True):
        inner = "\n".join([_cards(run), *_sections(run)])
        parts.append(f"<details><summary>{_text(name)} {_badge(run)}</summary>{inner}</details>")
    return "\n".join(parts)


def _sections(run: RunFacts) -> list[str]:
    return [
        _section("Missing from this report", _list(run.gaps)) if run.gaps else "",
        _section("Training", *_training(run)),
        _section(f"{_unit(run).capitalize()} seen", *_cells_seen(run)),
        _section("Evaluations", *_evaluations(run)),
        _section("Starts and ends", _attempts(run)),
        _section("Faults", _list(_faults(run)) if _faults(run) else _line("None.")),
        _section("Checkpoints", _checkpoints(run)),
        _section("Data", *_data(run)),
        _section("Machine and versions", *_machine(run)),
    ]


def _heading(run: RunFacts) -> str:
    reason = run.status.get("reason")
    said = _line(reason) if reason not in (None, "done") else ""
    return f"<h1>{_text(run.name)} {_badge(run)}</h1>{said}"


def _badge(run: RunFacts) -> Html:
    kind, words = _outcome(run)
    return Html(f'<span class="badge {kind}">{_text(words)}</span>')


def _outcome(run: RunFacts) -> tuple[str, str]:
    code = run.status.get("exit_code")
    if code == 0:
        return "good", "done"
    if code == PREEMPTED:
        return "waits", "stopped with a checkpoint"
    if code == INTERRUPTED:
        return "waits", "interrupted"
    if code is None:
        return "waits", "still running, or killed"
    return "bad", f"failed with exit code {code}"


def _cards(run: RunFacts) -> str:
    items = "".join(
        f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>"
        for label, value in _summary(run)
        if value is not None and label != "ended"
    )
    return f'<dl class="cards">{items}</dl>'


def _summary(run: RunFacts) -> list[tuple[str, str | None]]:
    steps, last, unit = run.steps, run.attempts[-1].start if run.attempts else {}, _unit(run)
    losses = [each for each in run.evaluations if each.kind == "validation" and "loss" in each.figures]
    best = min(losses, key=lambda each: _or_inf(each.figures["loss"]), default=None)
    smooth = _smooth(run, "loss")[1]
    seconds = [as_number(a.end.get("duration_seconds")) for a in run.attempts if a.end]
    if not run.attempts:
        seconds = [as_number(run.status.get("duration_seconds"))]
    duration = sum(each for each in seconds if each is not None)
    rows: list[tuple[str, str | None]] = [
        ("ended", _outcome(run)[1]),
        ("optimizer steps", f"{int(steps.step[-1]):,}" if len(steps) else "0"),
        (f"{unit} trained on", _count(np.nansum(steps["cells"])) if len(steps) else None),
        ("tokens trained on", _count(np.nansum(steps["tokens"])) if len(steps) else None),
        ("training loss at the end", _number(smooth[-1]) if len(smooth) else None),
        ("last validation loss", _number(losses[-1].figures["loss"]) if losses else None),
        (
            "lowest validation loss",
            f"{_number(best.figures['loss'])} (step {best.step:,})" if best is not None else None,
        ),
        ("parameters", _count(last.get("num_parameters"))),
        ("processes", _processes(last)),
        ("precision", last.get("precision")),
        (f"{unit}/s", _rate(run)),
        ("data wait", _percent(_mean_over_time(run, "data_wait_fraction"))),
        ("skipped steps", f"{np.count_nonzero(steps['is_skipped'] > 0):,}" if len(steps) else None),
        ("duration", _duration(duration) if duration else None),
    ]
    return [(label, None if value is None else str(value)) for label, value in rows]


def _training(run: RunFacts) -> list[str]:
    if not len(run.steps):
        return [_line("No optimizer step is recorded.")]
    return [*_training_charts(run), _phase_table(run)]


def _training_charts(run: RunFacts) -> list[str]:
    spans = _spans(run)
    loss, rate, wait = (
        _column(run, "loss"),
        _column(run, "cells_per_second"),
        _column(run, "data_wait_fraction"),
    )
    raw = [Series("each step", *loss, kind="faint")] if len(run.steps) >= 80 else []
    return [
        _figure(
            "Loss", [*raw, *_by_phase(run, "loss", "training"), _validation(run, "validation", 1)], spans
        ),
        _figure(
            "Learning rate",
            [Series("learning rate", *_column(run, "lr"), colour=2)],
            spans,
            height=180,
            from_zero=True,
        ),
        '<div class="pair">',
        _figure(
            f"{_unit(run).capitalize()} per second",
            [
                Series("each step", *rate, colour=3, kind="faint"),
                *_by_phase(run, "cells_per_second", "mean", 3),
            ],
            spans,
            from_zero=True,
        ),
        _figure(
            "Share of the time that training waited for data",
            [
                Series("each step", *wait, colour=4, kind="faint"),
                *_by_phase(run, "data_wait_fraction", "mean", 4),
            ],
            spans,
            from_zero=True,
        ),
        "</div>",
    ]


def _phase_table(run: RunFacts) -> str:
    steps, is_mixed = run.steps, len(set(run.units.values())) > 1
    unit = "samples" if is_mixed else _unit(run)
    rows = []
    for name, span in steps.spans():
        validation = [e.figures["loss"] for e in run.evaluations if e.phase == name and "loss" in e.figures]
        rows.append(
            [
                name,
                f"{steps.step[span][0]:,} to {steps.step[span][-1]:,}",
                _count(np.nansum(steps["cells"][span])),
                run.units.get(name, "cells") if is_mixed else None,
                _number(_last(steps["loss"][span])),
                _number(validation[-1]) if validation else None,
                _number(np.nanmax(steps["lr"][span])) if np.isfinite(steps["lr"][span]).any() else None,
                _rate(run, span),
                _percent(_mean_over_time(run, "data_wait_fraction", span)),
                _bytes(_highest(steps["peak_memory_bytes"][span])),
                _percent(_mean_over_time(run, "mfu", span)),
            ]
        )
    headers = [
        "phase",
        "steps",
        unit,
        "of",
        "last loss",
        "validation",
        "peak lr",
        f"{unit}/s",
        "data wait",
        "peak memory",
        "MFU",
    ]
    return _table(*_without_empty(headers, rows))


def _cells_seen(run: RunFacts) -> list[str]:
    index = run.cells
    if index is None or not index.epochs:
        return [_line("Not known.")]

    def judged(count: int | None, is_fault: bool) -> Any:
        return Html(f'<b class="bad">{count:,}</b>') if count and is_fault else _count(count)

    unit, rows = unit_of(index.epochs), []
    for each in index.epochs:
        first, last = each.stretches[0], each.stretches[-1]
        rows.append(
            [
                each.phase,
                f"{each.epoch}" if each.is_over else f"{each.epoch} (so far)",
                f"{first.first_step:,} to {last.last_step:,}",
                _count(each.num_cells),
                each.unit if each.unit != unit else None,
                f"{each.drawn:,}" if each.num_cells is None else f"{each.seen:,}",
                judged(each.repeated, not each.is_with_replacement),
                judged(each.skipped, True),
                judged(each.outside, True) if each.outside else None,
                f"{each.left_out:,}: {each.left_out_by}" if each.left_out else None,
                f"{each.in_skipped_steps:,}" if each.in_skipped_steps else None,
                each.history or None,
                _remark(each),
            ]
        )
    headers = [
        "phase",
        "epoch",
        "steps",
        unit,
        "of",
        "seen",
        "repeated",
        "skipped",
        f"not of its training {unit}",
        "not reached",
        "in skipped steps",
        "ranks and breaks",
        "remark",
    ]
    said = [f"As of step {index.step:,}, from the {unit} that every process trained on."]
    if index.unknown_until_step:
        said.append(f"What was seen up to step {index.unknown_until_step:,} is not known.")
    if index.steps_computed_again:
        lost = f"{index.cells_computed_again:,} {unit} of {counted(index.steps_computed_again, 'step')}"
        said.append(f"{lost} were lost by a kill or a rollback and computed again; they count once.")
    return [_line(" ".join(said)), _table(*_without_empty(headers, rows))]


def _remark(epoch: EpochCells) -> str | None:
    if epoch.num_cells is None:
        return f"its loader has no row numbers: {epoch.unit} are counted and cannot be told apart"
    if epoch.unknown_until_step is not None:
        return f"unknown up to step {epoch.unknown_until_step:,}"
    return "drawn with replacement" if epoch.is_with_replacement else None


def _evaluations(run: RunFacts) -> list[str]:
    parts = []
    for phase in dict.fromkeys(each.phase for each in run.evaluations):
        for kind in dict.fromkeys(each.kind for each in run.evaluations if each.phase == phase):
            found = [each for each in run.evaluations if (each.phase, each.kind) == (phase, kind)]
            good = [each for each in found if not each.has_failed]
            if not good:
                parts.append(_line(f"Every {kind} of phase '{phase}' failed."))
                continue
            last = max(good, key=lambda each: each.step)
            where = f"{kind} of {phase}, step {last.step:,}, after epoch {last.epoch}"
            parts.append(f"<h3>{_text(where)}</h3>")
            parts.append(_validation_table(good) if kind == "validation" else _beside_baselines(last.figures))
            if kind != "validation" and len(good) > 1:
                parts.append(_history(good))
    return parts or [_line("None is recorded.")]


def _validation_table(records: Sequence[Any]) -> str:
    rows = []
    for name in dict.fromkeys(name for each in records for name in each.figures):
        if name.endswith("_seconds"):
            continue
        values = [(each.figures[name], each.step) for each in records if name in each.figures]
        finite = [pair for pair in values if math.isfinite(pair[0])]
        ends = (
            [f"{_number(end[0])} (step {end[1]:,})" for end in (min(finite), max(finite))]
            if finite
            else [None] * 2
        )
        rows.append([name, _number(values[0][0]), _number(values[-1][0]), *ends, len(values)])
    return _table(["figure", "first", "last", "lowest", "highest", "evaluations"], rows)


def _beside_baselines(figures: Mapping[str, float]) -> str:
    """Lay out figures named `benchmark/metric` and `benchmark/metric/representation`, the model's first."""
    split: dict[tuple[str, str], dict[str, float]] = {}
    for name, value in figures.items():
        benchmark, _, rest = name.partition("/")
        metric, _, other = rest.partition("/")
        if metric.endswith("_spread") and not other:
            metric, other = metric.removesuffix("_spread"), "±"
        split.setdefault((benchmark, metric), {})[other or "model"] = value
    first = ["model", "±"]
    others = dict.fromkeys(name for each in split.values() for name in each if name not in first)
    columns = [*first, *others]
    rows = [
        [benchmark, metric, *(_number(values.get(column)) for column in columns)]
        for (benchmark, metric), values in split.items()
    ]
    headers = ["benchmark", "metric", *(column.replace("_", " ") for column in columns)]
    return _table(*_without_empty(headers, rows))


def _history(records: Sequence[Any]) -> str:
    """Lay out the model's own figures of every epoch, folded away."""
    names = dict.fromkeys(
        name
        for each in records
        for name in each.figures
        if name.count("/") < 2 and not name.endswith("_spread")
    )
    rows = [
        [name.replace("/", " "), *(_number(each.figures.get(name)) for each in records)] for name in names
    ]
    table = _table(["model", *(f"epoch {each.epoch}" for each in records)], rows)
    return f"<details><summary>All {len(records)} of them</summary>{table}</details>"


def _compared_evaluations(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    """Lay out the last figures of every run, baselines too, where there are any."""
    last: list[dict[tuple[str, str], float]] = []
    for run in runs:
        figures: dict[tuple[str, str], float] = {}
        for each in sorted(run.evaluations, key=lambda each: each.step):
            figures |= {(each.phase, name): value for name, value in each.figures.items()}
        last.append(figures)
    keys = [
        key for key in dict.fromkeys(key for each in last for key in each) if not key[1].endswith("_spread")
    ]
    if not keys:
        return _line("None is recorded.")
    return _table(
        ["phase", "last figure", *names],
        [[phase, name, *(_number(each.get((phase, name))) for each in last)] for phase, name in keys],
        "wide",
    )


def _differences(runs: Sequence[RunFacts], names: Sequence[str]) -> str:
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = [
        [key, *(each.get(key, "not there") for each in flat)]
        for key in keys
        if len({each.get(key) for each in flat}) > 1
    ]
    data = [{name: _text(value) for name, value in _fingerprints(run)} for run in runs]
    rows += [
        [f"data of phase {name}", *(Html(each.get(name, "not known")) for each in data)]
        for name in dict.fromkeys(name for each in data for name in each)
        if len({each.get(name) for each in data}) > 1
    ]
    if not rows:
        return _line("There are none.")
    return _table(["key", *names], rows, "config")


def _attempts(run: RunFacts) -> str:
    if not run.attempts:
        if not run.status:
            return _line("Not known.")
        row = [
            _when(run.status.get("started")),
            _when(run.status.get("time")),
            _duration(as_number(run.status.get("duration_seconds"))),
            run.status.get("exit_code"),
            run.status.get("reason"),
        ]
        return _table(*_without_empty(["last start", "end", "duration", "exit code", "reason"], [row]))
    rows = []
    for attempt in run.attempts:
        start, end = attempt.start, attempt.end or {}
        rows.append(
            [
                _when(start.get("time")),
                f"resumed at step {start.get('resumed_step')}" if start["event"] == "resume" else "started",
                _processes(start),
                _when(end.get("time")),
                _duration(as_number(end.get("duration_seconds"))),
                end.get("exit_code"),
                end.get("reason") if end else "no end is written down: it still runs, or was killed",
            ]
        )
    return _table(["time", "what", "processes", "end", "duration", "exit code", "how it ended"], rows)


def _faults(run: RunFacts) -> list[str]:
    steps, progress = run.steps, run.state.get("progress")
    faults = []
    skipped = steps.step[steps["is_skipped"] > 0]
    if len(skipped):
        shown = ", ".join(f"{step:,}" for step in skipped[:_MOST_STEPS])
        more = f" and {len(skipped) - _MOST_STEPS:,} more" if len(skipped) > _MOST_STEPS else ""
        faults.append(f"{counted(len(skipped), 'skipped step')}, whose update was left out: {shown}{more}")
    strange = steps.step[np.isinf(steps["loss"])]
    if len(strange):
        faults.append(
            f"{counted(len(strange), 'step')} with an infinite loss, the first at step {strange[0]:,}"
        )
    rollbacks = progress.get("rollbacks") if isinstance(progress, dict) else None
    if rollbacks:
        faults.append(f"rollbacks of FP8 to a checkpoint: {rollbacks}")
    faults += [
        f"{each.unit} of phase '{each.phase}', epoch {each.epoch}: {', '.join(each.faults)}"
        for each in (run.cells.epochs if run.cells else [])
        if each.faults
    ]
    faults += [
        f"the {each.kind} of phase '{each.phase}' after epoch {each.epoch} failed (see benchmarks/worker.log)"
        for each in run.evaluations
        if each.has_failed
    ]
    ends = [attempt.end for attempt in run.attempts if attempt.end] or ([run.status] if run.status else [])
    faults += [
        f"exit code {end.get('exit_code')} on {_when(end.get('time'))}: {end.get('reason')}"
        for end in ends
        if end.get("exit_code") not in (0, PREEMPTED, INTERRUPTED)
    ]
    killed = sum(attempt.end is None for attempt in run.attempts[:-1])
    if killed:
        faults.append(
            f"{counted(killed, 'start')} of the run without an end: killed, or its machine was lost"
        )
    return faults


def _checkpoints(run: RunFacts) -> str:
    if not run.checkpoints:
        return _line("There is none.")
    rows = [
        [
            f"{each.step:,}",
            _bytes(float(each.num_bytes)),
            "damaged: its manifest cannot be read" if each.time is None else _when(each.time),
            _number(each.metric),
            each.metric_phase or None,
            each.world_size,
        ]
        for each in run.checkpoints
    ]
    headers = ["step", "size", "written", "validation loss", "of phase", "processes"]
    return _table(*_without_empty(headers, rows))


def _data(run: RunFacts) -> list[str]:
    parts = []
    prints = _fingerprints(run)
    if prints:
        rows = [[name, Html(f"<code>{_text(value)}</code>")] for name, value in prints]
        parts.append(_table(["phase", "fingerprint of its data"], rows))
    batches = run.state.get("technical_batches")
    if isinstance(batches, dict) and batches:
        padded = run.state.get("n_technical_batches")
        count = counted(len(batches), "technical batch", "technical batches") + (
            f", padded to {padded:,}" if padded != len(batches) and isinstance(padded, int) else ""
        )
        parts.append(_line(f"{count}: {_names(map(str, batches))}"))
    genes = run.genes.get("genes")
    if isinstance(genes, list):
        parts.append(
            _line(
                f"Gene space of {len(genes):,} genes, by {run.genes.get('key')}, SHA-256 {run.genes.get('sha256')}"
            )
        )
    labels = run.state.get("label_names")
    if isinstance(labels, list) and labels:
        parts.append(_line(f"{counted(len(labels), 'label')}: {_names(map(str, labels))}"))
    return parts or [_line("Not known.")]


def _machine(run: RunFacts) -> list[str]:
    if not run.attempts:
        return [_line("Not known.")]
    start = run.attempts[-1].start
    versions = start.get("versions")
    batches = start.get("batches")
    rows = [
        ["device", start.get("device")],
        ["strategy", _strategy(start)],
        ["threads of a process", start.get("num_threads")],
        ["parameters that train", _count(start.get("num_trainable_parameters"))],
        *(
            [f"batch of {name}", text]
            for name, text in (batches if isinstance(batches, dict) else {}).items()
        ),
        *([name, version] for name, version in (versions if isinstance(versions, dict) else {}).items()),
    ]
    changed = [
        f"{name} was {before} and is {versions[name]} from {_when(later.start.get('time'))}"
        for earlier, later in zip(run.attempts, run.attempts[1:], strict=False)
        if isinstance(versions := later.start.get("versions"), dict)
        and isinstance(then := earlier.start.get("versions"), dict)
        for name, before in then.items()
        if name in versions and versions[name] != before
    ]
    notes = start.get("notes")
    parts = [_table(["", ""], [row for row in rows if row[1] is not None])]
    if changed:
        parts += ["<h3>Versions that changed</h3>", _list(changed)]
    if isinstance(notes, list) and notes:
        parts += ["<h3>Notes of the start-up account</h3>", _list(map(str, notes))]
    return parts


def _fingerprints(run: RunFacts) -> list[tuple[str, str]]:
    trajectory = run.state.get("trajectory")
    phases = trajectory.get("phases") if isinstance(trajectory, dict) else None
    return [
        (str(phase.get("name")), str(phase.get("data")))
        for phase in (phases if isinstance(phases, list) else [])
        if isinstance(phase, dict)
    ]


def _flat(value: Any, where: str = "") -> dict[str, str]:
    """Return a configuration as dotted keys with their values as text."""
    children: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        children = enumerate(value)
    flat: dict[str, str] = {}
    for key, item in children:
        flat |= _flat(item, f"{where}.{key}" if where else str(key))
    if not flat and where:
        flat[where] = (
            "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        )
    return flat


def _distinct_names(runs: Sequence[RunFacts]) -> list[str]:
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [f"{index}: {run.folder.resolve().parent.name}/{run.name}" for index, run in enumerate(runs, 1)]


def _column(run: RunFacts, name: str) -> tuple[np.ndarray, np.ndarray]:
    return run.steps.step.astype(float), run.steps[name]


def _spans(run: RunFacts) -> list[Span]:
    steps = run.steps
    return [Span(name, steps.step[rows][0] - 0.5, steps.step[rows][-1] + 0.5) for name, rows in steps.spans()]


def _smooth(run: RunFacts, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a column's running mean, which no phase's end blurs."""
    parts = [
        running_mean(run.steps.step[span].astype(float), run.steps[name][span])
        for _, span in run.steps.spans()
    ]
    if not parts:
        return np.empty(0), np.empty(0)
    x, y = zip(*parts, strict=True)
    return np.concatenate(x), np.concatenate(y)


def _by_phase(run: RunFacts, column: str, name: str, colour: int = 0) -> list[Series]:
    return [
        Series(
            name, *running_mean(run.steps.step[span].astype(float), run.steps[column][span]), colour=colour
        )
        for _, span in run.steps.spans()
    ]


def _validation(run: RunFacts, name: str, colour: int) -> Series:
    found = [each for each in run.evaluations if each.kind == "validation" and "loss" in each.figures]
    x = np.array([each.step for each in found], float)
    return Series(name, x, np.array([each.figures["loss"] for each in found]), colour % NUM_COLOURS, "dots")


def _mean_over_time(run: RunFacts, name: str, span: slice = slice(None)) -> float | None:
    values, seconds = run.steps[name][span], run.steps["step_seconds"][span]
    known = np.isfinite(values) & np.isfinite(seconds)
    total = seconds[known].sum()
    return float((values[known] * seconds[known]).sum() / total) if total > 0 else None


def _unit(run: RunFacts) -> str:
    """Name what the run's phases count, such as cells."""
    return " and ".join(dict.fromkeys(run.units.values())) or "cells"


def _rate(run: RunFacts, span: slice = slice(None)) -> str | None:
    values, seconds = run.steps["cells"][span], run.steps["step_seconds"][span]
    known = np.isfinite(values) & np.isfinite(seconds)
    total = seconds[known].sum()
    return _short(float(values[known].sum() / total)) if total > 0 else None


def _last(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def _highest(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None


def _processes(start: Mapping[str, Any]) -> str | None:
    if "world_size" not in start:
        return None
    strategy = _strategy(start)
    return f"{start['world_size']} ({strategy})" if strategy else str(start["world_size"])


def _strategy(start: Mapping[str, Any]) -> str | None:
    """Return the strategy; one process alone has none to share its work by."""
    strategy = start.get("strategy")
    return None if start.get("world_size") == 1 and strategy == "DDP" else strategy


def _names(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - _MOST_NAMES:,} more" if len(every) > _MOST_NAMES else ""
    return ", ".join(every[:_MOST_NAMES]) + more


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3e}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(value: Any) -> str | None:
    return f"{int(value):,}" if isinstance(value, int | float) and math.isfinite(value) else None


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _bytes(value: float | None) -> str | None:
    if value is None:
        return None
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"


def _duration(seconds: float | None) -> str | None:
    if seconds is None or not math.isfinite(seconds):
        return None
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _when(time: Any) -> str | None:
    try:
        return datetime.fromisoformat(time).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (TypeError, ValueError, OverflowError):
        return None if time is None else str(time)


def _text(value: Any) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


def _line(text: Any) -> str:
    return f"<p>{_text(text)}</p>"


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(item)}</li>' for item in items)}</ul>"


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{''.join(parts)}</section>"


def _figure(
    title: str,
    series: Sequence[Series],
    spans: Sequence[Span] = (),
    *,
    height: int = 250,
    from_zero: bool = False,
) -> str:
    drawn = chart(series, spans, label=f"{title} over optimizer steps", height=height, from_zero=from_zero)
    if not drawn:
        return ""
    shown = {each.name: each for each in series if np.isfinite(each.y).any()}
    keys = "".join(
        f'<span class="key"><i class="c{each.colour} {each.kind}"></i>{_text(name)}</span>'
        for name, each in shown.items()
    )
    legend = f'<span class="keys">{keys}</span>' if len(shown) > 1 else ""
    return f"<figure><figcaption><b>{_text(title)}</b>{legend}</figcaption>{drawn}</figure>"


def _table(headers: Sequence[Any], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    """Lay out rows; columns whose every value begins as a number does are aligned to the right."""
    if not rows:
        return _line("None.")
    columns = list(zip(*rows, strict=True))
    kinds = [
        "t"
        if any(_is_time(value) for value in column)
        else "n"
        if index and all(map(_is_number, column))
        else ""
        for index, column in enumerate(columns)
    ]

    def cells(tag: str, row: Sequence[Any]) -> str:
        return "".join(
            f"<{tag}{f' class={kind}' if kind else ''}>{'–' if value is None else _text(value)}</{tag}>"
            for value, kind in zip(row, kinds, strict=True)
        )

    head = f"<thead><tr>{cells('th', headers)}</tr></thead>" if any(headers) else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _is_time(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(" UTC") and value[:1].isdigit()


def _is_number(value: Any) -> bool:
    if value is None or isinstance(value, Html):
        return value is None
    return str(value).lstrip("-")[:1].isdigit() and " to " not in str(value)


def _without_empty(headers: list[str], rows: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
    """Leave out columns that hold nothing."""
    kept = [index for index in range(len(headers)) if any(row[index] is not None for row in rows)]
    return [headers[index] for index in kept], [[row[index] for index in kept] for row in rows]


_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1e293b;--soft:#64748b;--line:#e2e8f0;--shade:#f5f7fa;--card:#f8fafc;
--c0:#1f5f99;--c1:#c2410c;--c2:#4b5563;--c3:#15803d;--c4:#7e22ce;--c5:#a16207;
--good:#15803d;--waits:#a16207;--bad:#b91c1c}
@media(prefers-color-scheme:dark){:root{--page:#0f172a;--ink:#e2e8f0;--soft:#94a3b8;--line:#334155;--shade:#16203a;
--card:#1a2540;--c0:#7db8ee;--c1:#fb923c;--c2:#cbd5e1;--c3:#4ade80;--c4:#c084fc;--c5:#facc15;
--good:#4ade80;--waits:#facc15;--bad:#f87171}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:1.5rem clamp(.8rem,3vw,2.5rem)}
h1{font-size:1.6rem;margin:.2rem 0 .6rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.2rem 0 .7rem;padding-bottom:.3rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .4rem;overflow-wrap:anywhere}
p,li,summary{overflow-wrap:anywhere}
ul{padding-left:1.2rem}
code{font:.85em ui-monospace,monospace;overflow-wrap:anywhere}
.badge{display:inline-block;font-size:.8rem;font-weight:600;padding:.1rem .6rem;border-radius:1rem;
border:1px solid currentColor;vertical-align:middle;white-space:nowrap}
.good{color:var(--good)}.waits{color:var(--waits)}.bad{color:var(--bad)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:.6rem;margin:1rem 0}
.cards div{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.5rem .7rem}
dt{color:var(--soft);font-size:.8rem}dd{margin:0;font-weight:600;overflow-wrap:anywhere}
figure{margin:1rem 0}
figcaption{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;align-items:baseline}
.keys{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.85rem;color:var(--soft)}
.key{overflow-wrap:anywhere}
.key i{display:inline-block;width:1.2rem;height:.2rem;margin-right:.4rem;vertical-align:middle;background:currentColor}
.key i.faint{opacity:.35}.key i.dots{width:.6rem;height:.6rem;border-radius:50%}
.key .c0{color:var(--c0)}.key .c1{color:var(--c1)}.key .c2{color:var(--c2)}
.key .c3{color:var(--c3)}.key .c4{color:var(--c4)}.key .c5{color:var(--c5)}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:13px}
svg .grid{stroke:var(--line);stroke-width:1}svg .axis{stroke:var(--soft);stroke-width:1}
svg .odd{fill:var(--shade)}svg .even{fill:none}
polyline{fill:none;stroke-width:2;stroke-linejoin:round}
polyline.faint{stroke-width:1;opacity:.35}
polyline.c0{stroke:var(--c0)}polyline.c1{stroke:var(--c1)}polyline.c2{stroke:var(--c2)}
polyline.c3{stroke:var(--c3)}polyline.c4{stroke:var(--c4)}polyline.c5{stroke:var(--c5)}
circle{stroke:var(--page);stroke-width:1}
circle.c0{fill:var(--c0)}circle.c1{fill:var(--c1)}circle.c2{fill:var(--c2)}
circle.c3{fill:var(--c3)}circle.c4{fill:var(--c4)}circle.c5{fill:var(--c5)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 1.5rem}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}
td{max-width:34rem;overflow-wrap:break-word}
.n{text-align:right}.n,.t{white-space:nowrap}
table.config td{font:.82rem/1.5 ui-monospace,monospace;overflow-wrap:anywhere}
table.config td:first-child,table.wide td:first-child{color:var(--soft)}
details{border:1px solid var(--line);border-radius:.5rem;padding:.6rem .9rem;margin:.8rem 0}
summary{cursor:pointer;font-weight:600}
footer{margin-top:2.5rem;color:var(--soft);font-size:.85rem}
@media(max-width:600px){svg text{font-size:21px}h1{font-size:1.3rem}
.cards{grid-template-columns:repeat(2,1fr)}td{max-width:60vw}}
@media(min-width:1000px){svg text{font-size:9px}.pair svg text{font-size:15px}}
"""
