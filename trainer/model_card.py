"""The model card of an exported folder: how to load it, and what its run is known to have done."""

import contextlib
import platform
from importlib import metadata
from typing import Any

import yaml

from trainer.checkpoint_model import Trained
from trainer.metrics_file import WALL_CLOCK_FIELDS, read_metrics
from trainer.phase_sources import data_in_words, is_classification, label_columns, last_part

_PACKAGES = ("cellphase", "torch", "safetensors")
_NOT_METRICS = WALL_CLOCK_FIELDS | {"kind", "global_step", "phase", "phase_step", "epoch", "cells"}


def model_card(trained: Trained, verified: str) -> str:
    """Return `README.md`: front matter, how to load the model, and what its run is known to have done."""
    front: dict[str, Any] = {"library_name": "cellphase", "tags": ["biology", "single-cell"]}
    if trained.is_ours:
        front["pipeline_tag"] = "feature-extraction"
    matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    settings = trained.config.model
    is_own = settings.model_class.startswith("models.")
    trust = (
        "" if is_own else f", trusted_modules=({settings.model_class.replace(':', '.').partition('.')[0]!r},)"
    )
    sections = [
        f"---\n{matter}---\n# {_text(trained.config.run_name)}",
        f"`{settings.model_class}`, trained with Cellphase and exported from step {trained.saved.step}.",
        "## Load it\n```python\nfrom models.pretrained import from_pretrained\n\n"
        f'model = from_pretrained("."{trust})  # this folder\n```',
        "## Training\n" + _table(("figure", "value"), _run_figures(trained)),
        "## Data\n" + _table(("phase", "loader", "data", "label"), _data_rows(trained)),
    ]
    metrics = _metric_rows(trained)
    if metrics:
        sections.append(
            "## Metrics\nThe last ones of each phase up to this step.\n\n"
            + _table(("phase", "step", "part", "metric", "value"), metrics)
        )
    sections.append(f"## This export\n{verified[0].upper()}{_text(verified[1:])}.")
    return "\n\n".join(sections) + "\n"


def _run_figures(trained: Trained) -> list[tuple[str, ...]]:
    progress, facts = trained.state["progress"], trained.facts
    rows = [
        ("parameters", f"{trained.num_parameters:,}"),
        ("optimizer steps", f"{progress['global_step']:,}"),
        ("cells seen, each time counted", f"{progress['cells']:,}"),
        ("tokens seen, without padding", f"{progress['tokens']:,}"),
        ("technical batches", f"{len(facts.technical_batches):,}"),
        *(
            [("weights", f"moving average, decay {trained.config.ema.decay:g}")]
            if trained.is_averaged and trained.config.ema
            else []
        ),
        ("seed", str(trained.config.seed)),
    ]
    if trained.config.init_from is not None:
        rows.insert(1, ("weights at the start", last_part(trained.config.init_from)))
    if facts.gene_space is not None:
        rows.append(("genes", f"{len(facts.gene_space):,}"))
    versions = [f"python {platform.python_version()}"]
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # run from a checkout
            versions.append(f"{name} {metadata.version(name)}")
    return [*rows, ("exported with", ", ".join(versions))]


def _data_rows(trained: Trained) -> list[tuple[str, ...]]:
    rows = []
    for phase in trained.config.datasets:
        label = ", ".join(label_columns(phase))
        if label:
            count = len(trained.facts.label_names)
            label += f": {count:,} classes" if is_classification(phase) else ": numbers"
        rows.append((phase.name, phase.dataloader_factory, data_in_words(phase), label or "none"))
    return rows


def _metric_rows(trained: Trained) -> list[tuple[str, ...]]:
    """Return the last training loss and evaluation of each phase, up to the checkpoint's step."""
    path = trained.saved.folder.parent / "metrics.jsonl"
    if not path.is_file():  # the checkpoint was moved away from its run
        return []
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for record in read_metrics(path):
        step = record.get("global_step")
        if isinstance(step, int) and step <= trained.saved.step:
            last[str(record.get("phase")), str(record.get("kind"))] = record
    rows = []
    for (phase, kind), record in last.items():
        shown = [name for name in record if name not in _NOT_METRICS] if kind == "validation" else ["loss"]
        for name in shown:
            value = record.get(name)
            if (
                kind in ("train", "validation")
                and isinstance(value, int | float)
                and not isinstance(value, bool)
            ):
                part = "training, last step" if kind == "train" else "validation"
                rows.append((phase, str(record["global_step"]), part, name, f"{value:.6g}"))
    return rows


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(_text(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _text(text: str) -> str:
    return " ".join(text.split())
