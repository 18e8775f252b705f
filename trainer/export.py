"""Export a checkpoint as a folder in Hugging Face form: `python -m trainer export CHECKPOINT OUT`.

The folder is written beside OUT, a fresh process loads it and must compute what the trained model computes, and
only then it gets its name.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from data.exported import (
    GENES_FILE,
    LABELS_FILE,
    TECHNICAL_BATCHES_FILE,
    TOKENIZER_FILE,
    PhaseSettings,
    tokenizer_record,
)
from data.genes import GeneSpace
from data.perturbation_settings import LOADER as PERTURBATION_LOADER
from data.perturbation_settings import SETTINGS_FILE, settings_entry, settings_record
from models.errors import ModelError
from models.fine_tuned import FineTunedModel
from models.pretrained import (
    CONFIG_FILE,
    FORMAT,
    ModelDescription,
    config_fields,
    describe,
    is_json,
    resolve_trusted,
    save_pretrained,
    signature_defaults,
)
from trainer import export_probe
from trainer.atomicfile import sync_folder
from trainer.checkpoint_folder import MANIFEST, SavedCheckpoint, checkpoint_step, find_newest, open_checkpoint
from trainer.config.load import load_saved_config
from trainer.config.schema import RunConfig
from trainer.console import printable
from trainer.distributed import Ranks
from trainer.errors import CheckpointError, UserError
from trainer.exits import run_command
from trainer.metrics_file import WALL_CLOCK_FIELDS, read_metrics
from trainer.model_building import build_model, complete_arguments
from trainer.phases import DataFacts, open_phases, saved_circuits
from trainer.run_state import load_weights
from trainer.shards import has_averages, open_tensors, whole_weights

CARD_FILE = "README.md"
_PACKAGES = ("cellphase", "torch", "safetensors")
_MERGED_TOLERANCE = 1e-4
"""Relative to the largest: a merged matrix rounds once, where a correction is rounded apart."""
TRUST: dict[str, Any] = {
    "action": "append",
    "default": [],
    "metavar": "MODULE",
    "help": "a module or package of your own that the model may name, which runs its code; may be repeated",
}
"""The option `--trust` of commands that open models."""
_NOT_METRICS = WALL_CLOCK_FIELDS | {"kind", "global_step", "phase", "phase_step", "epoch", "cells"}


@dataclass(frozen=True)
class Trained:
    """A trained model, and what its checkpoint says of it."""

    saved: SavedCheckpoint
    config: RunConfig
    facts: DataFacts
    state: dict[str, Any]
    """What the checkpoint says of the run (`SavedCheckpoint.state`)."""
    model: nn.Module
    is_averaged: bool = False
    """Whether the weights are moving averages of those that were trained."""
    trusted_modules: tuple[str, ...] = ()
    """What else of the user's the configuration may name."""

    @property
    def is_ours(self) -> bool:
        """Whether a batch can be made up for the model: it is one of ours."""
        return export_probe.is_known(self.model)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for the user's mistake, 130 when interrupted, 1 for anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer export",
        allow_abbrev=False,
        description="Write a checkpoint's model as a folder that from_pretrained loads, and verify it.",
        epilog="Exit codes: 0 done, 2 a mistake in the command or its files, 130 interrupted, 1 anything else.",
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a checkpoint folder, or a run folder: its newest one",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it is an exported folder")
    parser.add_argument(
        "--weights",
        choices=("averaged", "trained"),
        help="of a run with ema: the moving average of its weights (default), or the weights as they were trained",
    )
    parser.add_argument("--trust", **TRUST)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    # At the end, as in training: modules of the user's in the current folder are found and shadow nothing.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    return run_command(lambda: _export_and_say(arguments))


def _export_and_say(arguments: argparse.Namespace) -> int:
    try:
        said = export(
            arguments.checkpoint,
            arguments.out,
            overwrite=arguments.overwrite,
            weights=arguments.weights,
            trusted_modules=arguments.trust,
        )
    except OSError as error:
        raise UserError(f"{error.filename or arguments.out}: {error.strerror or error}") from error
    for line in said:
        print(printable(line))
    return 0


def export(
    checkpoint: Path,
    out: Path,
    *,
    overwrite: bool = False,
    weights: Literal["averaged", "trained"] | None = None,
    trusted_modules: Sequence[str] = (),
) -> list[str]:
    """Export a checkpoint, or a run folder's newest one, and return what is to be said of it.

    Args:
        checkpoint: the folder of either.
        out: the folder to write.
        overwrite: replace `out` where it is an exported folder.
        weights: which weights; None: averaged where the run kept an average (`ema`).
        trusted_modules: modules or packages that the checkpoint's configuration may name beside this package.

    Raises:
        UserError: `out` exists, the checkpoint is damaged or there is none, or the export does not load as the same
            model; `out` is then as it was.
    """
    out = Path(os.path.abspath(out))
    check_free(out, overwrite)
    saved = find_checkpoint(checkpoint)
    if weights == "averaged" and not has_averages(open_tensors(saved)):
        raise UserError(f"{saved.folder}: the run kept no average of its weights (ema); leave --weights out")
    trained = without_lora(
        load_trained(saved, averaged=weights != "trained", trusted_modules=trusted_modules)
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_folder(trained, temporary)
        verified = verify(trained, temporary)
        (temporary / CARD_FILE).write_text(model_card(trained, verified), encoding="utf-8")
        _flush(temporary)
        _put_in_place(temporary, out, overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.iterdir())
    return [
        f"exported {trained.saved.folder} (step {trained.saved.step}) to {out}",
        f"  {', '.join(sorted(file.name for file in out.iterdir()))}: {size:,} bytes",
        f"  {_num_parameters(trained.model):,} parameters{', averaged' if trained.is_averaged else ''}",
        f"  {verified}",
    ]


def find_checkpoint(path: Path) -> SavedCheckpoint:
    """Open a checkpoint folder, or the newest one of a run folder, every file verified.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder; give a checkpoint folder or a run folder")
    path = Path(os.path.abspath(path))  # `.` may stand for a checkpoint, whose name holds its step
    if (path / MANIFEST).is_file() or checkpoint_step(path) is not None:
        return open_checkpoint(path)
    newest = find_newest(path, fall_back=False).checkpoint
    if newest is None:
        raise CheckpointError(f"{path}: it is neither a checkpoint nor a run folder with a complete one")
    return open_checkpoint(newest, verify=False)


def load_trained(
    saved: SavedCheckpoint, *, averaged: bool = True, trusted_modules: Sequence[str] = ()
) -> Trained:
    """Build the model that a checkpoint's own configuration describes, without its data, and load the weights.

    Args:
        saved: the checkpoint, which may have come from anywhere.
        averaged: take the moving averages of the weights where the run kept them (`ema`).
        trusted_modules: modules or packages that the configuration may name beside this package; they are imported.

    Raises:
        CheckpointError, ModelError: it is damaged, or names a class that is not trusted.
    """
    config = load_saved_config(saved.folder / "config.yaml")
    check_model_is_trusted(config, saved, trusted_modules)
    state = saved.state
    if "sizes" not in state:
        raise CheckpointError(
            f"{saved.folder} does not say the sizes of its data, so its model cannot be built without them; resume the "
            "run for one step and export the checkpoint that this writes"
        )
    genes = GeneSpace.from_json(saved.text(GENES_FILE)) if saved.has(GENES_FILE) else None
    facts = DataFacts(
        state["technical_batches"],
        state["n_technical_batches"],
        genes,
        state["sizes"],
        tuple(state.get("label_names", ())),
        state.get("tokenizer_options", {}),
        **saved_circuits(state.get("tokenizer_options", {})),
    )
    # The layers of an export are plain ones, whose weights are the same: it is to run where there is no FP8.
    config = config.model_copy(update={"precision": None, "fp8": None} if config.precision == "fp8" else {})
    model = build_model(config, facts)
    tensors = open_tensors(saved)
    load_weights(model, whole_weights(tensors, averaged=averaged), str(saved.folder))
    return Trained(
        saved, config, facts, state, model.eval(), averaged and has_averages(tensors), tuple(trusted_modules)
    )


def check_model_is_trusted(
    config: RunConfig, saved: SavedCheckpoint, trusted_modules: Sequence[str] = ()
) -> None:
    """Refuse a checkpoint whose model is neither of this package nor of a trusted module, before it is imported.

    Raises:
        CheckpointError: it is not.
    """
    settings = config.model
    for key, path in (("model_class", settings.model_class), ("config_class", settings.config_class)):
        if path is not None:
            _check_trusted(path, f"{saved.folder / 'config.yaml'}: model.{key}", ("models", *trusted_modules))


def _check_trusted(path: str, where: str, trusted: Sequence[str]) -> None:
    """Refuse what a checkpoint names where its code would run, unless it is of a trusted module."""
    try:
        resolve_trusted(path, where, trusted)
    except ModelError as error:
        module = path.replace(":", ".").partition(".")[0]
        if module in trusted:
            raise CheckpointError(str(error)) from error
        raise CheckpointError(
            f"{where} is {path}, and a checkpoint may name only what is of {', '.join(trusted)}: its code would run. "
            f"If you trust it, give --trust {module}, or trusted_modules=({module!r},) in Python"
        ) from error


def without_lora(trained: Trained) -> Trained:
    """Return the trained model with its LoRA corrections added to the weights that they correct, if it has any.

    Raises:
        UserError: it does not compute the same then.
    """
    model = trained.model
    if not isinstance(model, FineTunedModel) or model.config.lora is None:
        return trained
    merged = model.merged().eval()
    batch = export_probe.made_up_batch(model)
    ours, theirs = (export_probe.answer(each, "logits", batch, None) for each in (model, merged))
    for name, answer in ours.items():
        difference, size = float((answer - theirs[name]).abs().max()), float(answer.abs().max())
        if not difference <= _MERGED_TOLERANCE * size:
            raise UserError(
                f"{trained.saved.folder}: with its LoRA corrections merged the model computes another {name}, off by "
                f"{difference:.3g} where the largest is {size:.3g}; nothing was written"
            )
    return dataclasses.replace(trained, model=merged)


def write_folder(trained: Trained, folder: Path) -> None:
    """Write everything but the model card, which says how the rest was verified."""
    saved = trained.saved
    save_pretrained(trained.model, folder, description=describe_run_model(trained))
    _write_json(folder / TECHNICAL_BATCHES_FILE, trained.facts.technical_batches)
    if saved.has(GENES_FILE):
        shutil.copyfile(saved.folder / GENES_FILE, folder / GENES_FILE)
    record = tokenizer_settings(trained)
    if record is not None:
        _write_json(folder / TOKENIZER_FILE, record)
    sets = settings_record(perturbation_entries(trained))
    if sets is not None:
        _write_json(folder / SETTINGS_FILE, sets)
    if trained.state.get("label_names"):
        _write_json(folder / LABELS_FILE, trained.state["label_names"])


def tokenizer_settings(trained: Trained) -> dict[str, Any] | None:
    """Return how the run's phases tokenized their cells, as `cell_tokenizer.json` holds it; None: not by ours."""
    kinds = trained.state.get("value_kinds", {})
    options = trained.state.get("tokenizer_options", {})
    return tokenizer_record(
        PhaseSettings(
            phase.name,
            phase.dataloader_factory,
            phase.dataloader_args,
            kinds.get(phase.name),
            options.get(phase.name),
        )
        for phase in trained.config.datasets
    )


def perturbation_entries(trained: Trained) -> list[dict[str, Any]]:
    """Return how the phases made sets of perturbed cells (see `data.perturbation_settings`), of those that did."""
    kinds, options = trained.state.get("value_kinds", {}), trained.facts.tokenizer_options
    return [
        settings_entry(phase.name, phase.dataloader_args, kinds[phase.name], options[phase.name])
        for phase in trained.config.datasets
        if phase.dataloader_factory.replace(":", ".") == PERTURBATION_LOADER and phase.name in options
    ]


def describe_run_model(trained: Trained) -> ModelDescription:
    """Return how the run constructed its model, complete with sizes and defaults."""
    config, facts, settings = trained.config, trained.facts, trained.config.model
    if isinstance(trained.model, FineTunedModel):  # merged, it is no more what the run's arguments make
        return describe(trained.model)
    constructor, given = complete_arguments(config, facts)
    complete = {**signature_defaults(constructor), **given}
    if settings.config_class is None:
        return ModelDescription(settings.model_class, complete, n_technical_batches=facts.n_technical_batches)
    resolved = _resolved_fields(constructor, given)
    return ModelDescription(
        settings.model_class,
        dict(settings.model_args),
        settings.config_class,
        complete if resolved is None else resolved,
        facts.n_technical_batches,
    )


def _resolved_fields(config_class: Any, given: dict[str, Any]) -> dict[str, Any] | None:
    """Return the fields of a dataclass config, or None where these are no arguments that make an equal one."""
    make: Any = config_class
    if not (isinstance(config_class, type) and dataclasses.is_dataclass(config_class)):
        return None
    made = make(**given)
    fields = {name: list(v) if isinstance(v, tuple) else v for name, v in config_fields(made).items()}
    if not all(map(is_json, fields.values())):
        return None
    return fields if config_fields(make(**fields)) == config_fields(made) else None


def verify(trained: Trained, folder: Path) -> str:
    """Let a fresh process load the folder, compare what it computes with the trained model, and say what was compared.

    Raises:
        UserError: it does not load, or its weights or what it computes differ.
    """
    with tempfile.TemporaryDirectory(prefix="cellphase-export-") as name:
        question = Path(name)
        kind, reason = _ask(trained, question)
        batch, settings = export_probe.read_question(question)
        expected = {}
        if kind == "loss":
            try:
                expected = export_probe.answer(trained.model, kind, batch, settings["loss"])
            except Exception as error:  # a user's loss may need what only training has
                kind, reason = "weights", f"the loss cannot be computed apart from training ({_named(error)})"
                _write(trained, question, kind, {})
        elif kind == "logits":
            expected = export_probe.answer(trained.model, kind, batch, None)
        _run_fresh_process(folder, question)
        hashes = json.loads((question / export_probe.HASHES_FILE).read_text())
        own = export_probe.weight_hashes(trained.model)
        wrong = [
            f"weight {key}" for key in sorted(own.keys() | hashes.keys()) if own.get(key) != hashes.get(key)
        ]
        wrong += export_probe.differences(expected, load_file(question / export_probe.ANSWER_FILE))
    if wrong:
        raise UserError(
            f"the exported model is not the trained one: {'; '.join(wrong[:8])}; nothing was written. A model that "
            "computes the same in every process, from its arguments and weights alone, can be exported"
        )
    compared = f"all {len(own)} tensors"
    if kind == "weights":
        return f"verified: a fresh process loads {compared} equal bit for bit; nothing was computed: {reason}"
    what = (
        "logits and embeddings of a made-up batch"
        if kind == "logits"
        else "the loss of a batch of the run's data"
    )
    return f"verified: a fresh process loads {compared} and computes {what}, equal bit for bit"


def _ask(trained: Trained, folder: Path) -> tuple[str, str]:
    """Write the question that fits the model; return its kind, and why it asks for weights alone where it does."""
    if trained.is_ours:
        _write(trained, folder, "logits", export_probe.made_up_batch(trained.model))
        return "logits", ""
    reason = ""
    if "loss" in trained.state:
        reason = "the loss has weights of its own, which are not exported"
    else:
        try:
            _write(trained, folder, "loss", _first_batch(trained))
        except Exception as error:  # any loader of the user's, on a machine that may lack its data
            reason = f"no batch of the run's data could be had ({_named(error)})"
    if reason:
        _write(trained, folder, "weights", {})
    return ("weights" if reason else "loss"), reason


def _first_batch(trained: Trained) -> dict[str, Any]:
    """Return the first micro-batch of the run's first phase that runs."""
    config, trusted = trained.config, trained.trusted_modules
    if config.loss is not None:
        _check_trusted(config.loss.loss_class, "loss.loss_class", ("models", "torch.nn", *trusted))
    for index, phase in enumerate(config.datasets):
        _check_trusted(phase.dataloader_factory, f"datasets.{index}.dataloader_factory", ("data", *trusted))
        if phase.validation is not None:
            where = f"datasets.{index}.validation.dataloader_factory"
            _check_trusted(phase.validation.dataloader_factory, where, ("data", *trusted))
    phases, _ = open_phases(config, Ranks(0, 1), pin_memory=False)
    try:
        phase = next(phase for phase in phases if phase.config.epochs)
        with contextlib.closing(phase.loader.steps(0, 0, 1)) as steps:
            return next(steps)[0].batch
    finally:
        for phase in phases:
            phase.close()


def _write(trained: Trained, folder: Path, kind: str, batch: dict[str, Any]) -> None:
    settings = trained.config.model
    paths = [path for path in (settings.model_class, settings.config_class) if path is not None]
    loss = trained.config.loss
    export_probe.write_question(
        folder,
        batch,
        kind=kind,
        loss=None if loss is None or kind != "loss" else loss.model_dump(mode="json"),
        trusted_modules=[path.replace(":", ".").partition(".")[0] for path in paths],
        num_threads=torch.get_num_threads(),
    )


def _run_fresh_process(folder: Path, question: Path) -> None:
    """Start a process that loads the folder and answers.

    Raises:
        UserError: it failed.
    """
    search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    command = [sys.executable, "-P", "-m", "trainer.export_probe", str(folder), str(question)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": search_path}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(
            f"the exported model does not load in a fresh process (exit code {done.returncode}): {last}; nothing was "
            "written"
        )


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a folder that exists, and with `overwrite` one that is no exported model.

    Raises:
        UserError: it must not be written to.
    """
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise UserError(
            f"{out} exists; name another folder, or give --overwrite to replace an exported model"
        )
    try:
        is_export = json.loads((out / CONFIG_FILE).read_text())["format"] == FORMAT and not out.is_symlink()
    except (OSError, ValueError, KeyError, TypeError):
        is_export = False
    if not is_export:
        raise UserError(
            f"{out} is not an exported model, so --overwrite does not replace it; name another folder"
        )


def _put_in_place(temporary: Path, out: Path, overwrite: bool) -> None:
    """Give the verified folder its name; the one that it replaces goes last."""
    check_free(out, overwrite)  # a minute may have passed
    old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
    replaces = out.exists()
    if replaces:
        os.rename(out, old)
    try:
        os.rename(temporary, out)
    except OSError:
        if replaces:
            os.rename(old, out)
        raise
    sync_folder(out.parent)
    if replaces:
        shutil.rmtree(old)


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    sync_folder(folder)


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
        "## Data\n" + _table(("phase", "loader", "data"), _data_rows(trained.config)),
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
        ("parameters", f"{_num_parameters(trained.model):,}"),
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
    if facts.gene_space is not None:
        rows.append(("genes", f"{len(facts.gene_space):,}"))
    versions = [f"python {platform.python_version()}"]
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):  # run from a checkout
            versions.append(f"{name} {metadata.version(name)}")
    return [*rows, ("exported with", ", ".join(versions))]


def _data_rows(config: RunConfig) -> list[tuple[str, ...]]:
    rows = []
    for phase in config.datasets:
        path = phase.dataloader_args.get("path")
        paths = path if isinstance(path, list | tuple) else [] if path is None else [path]
        # Folders above say where a machine keeps its data, and nothing about the data.
        names = ", ".join(str(each).rstrip("/").rpartition("/")[2] for each in paths)
        rows.append((phase.name, phase.dataloader_factory, names))
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


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _named(error: Exception) -> str:
    return _text(f"{type(error).__name__}: {error}")[:300]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
