"""Export a checkpoint as a folder in Hugging Face form: `python -m trainer export CHECKPOINT OUT`.

The folder is written beside OUT, a fresh process loads it and must compute what the trained model computes, and
only then it gets its name.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from data.exported import GENES_FILE, LABELS_FILE, TECHNICAL_BATCHES_FILE, TOKENIZER_FILE
from data.perturbation_settings import SETTINGS_FILE, settings_record
from models.fine_tuned import FineTunedModel
from models.pretrained import CONFIG_FILE, FORMAT, save_pretrained
from trainer import export_probe
from trainer.atomicfile import sync_folder
from trainer.checkpoint_model import (
    TRUST,
    Trained,
    check_trusted,
    describe_run_model,
    find_checkpoint,
    load_trained,
    perturbation_entries,
    tokenizer_settings,
)
from trainer.console import printable
from trainer.distributed import Ranks
from trainer.dotted import look_in_current_folder
from trainer.errors import UserError
from trainer.exits import run_command
from trainer.model_card import model_card
from trainer.phases import open_phases
from trainer.shards import has_averages, open_tensors

CARD_FILE = "README.md"
_MERGED_TOLERANCE = 1e-4
"""Relative to the largest: a merged matrix rounds once, where a correction is rounded apart."""


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
    look_in_current_folder()
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
        f"  {trained.num_parameters:,} parameters{', averaged' if trained.is_averaged else ''}",
        f"  {verified}",
    ]


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
        check_trusted(config.loss.loss_class, "loss.loss_class", ("models", "torch.nn", *trusted))
    for index, phase in enumerate(config.datasets):
        check_trusted(phase.dataloader_factory, f"datasets.{index}.dataloader_factory", ("data", *trusted))
        if phase.validation is not None:
            where = f"datasets.{index}.validation.dataloader_factory"
            check_trusted(phase.validation.dataloader_factory, where, ("data", *trusted))
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


def _named(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _write_json(path: Path, content: Any) -> None:
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path.name} cannot be written, because the checkpoint says of its data what no run does ({error}); its "
            "files were edited"
        ) from error
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
