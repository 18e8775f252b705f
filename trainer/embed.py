"""Embed the cells of an h5ad file: `python -m trainer embed --model PATH --data X.h5ad --output Y.h5ad`.

The output is the input file with `obsm[KEY]`, and of a fine-tuned model its answers in obs, written where it is whole.
"""

import argparse
import os
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from numpy.typing import NDArray

from data.errors import DataError
from data.h5ad_cells import H5adCells
from trainer.atomicfile import sync_folder
from trainer.checkpoint_model import TRUST
from trainer.console import is_main_process, notice
from trainer.distributed import leave_group
from trainer.dotted import look_in_current_folder
from trainer.embedding import Block, embedded_blocks, join_ranks
from trainer.errors import UserError
from trainer.exits import run_command
from trainer.saved_model import SavedModel, open_model

DEFAULT_KEY = "X_cellphase"
_ROWS_PER_CHUNK = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for the user's mistake, 130 when interrupted, 1 for anything else."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer embed",
        allow_abbrev=False,
        description="Write a copy of an h5ad file with the embeddings of its cells in obsm, and of a fine-tuned model "
        "its predictions in obs.",
        epilog="Exit codes: 0 done, 2 a mistake in the command or its files, 130 interrupted, 1 anything else.",
    )
    add_model_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the h5ad file to write")
    parser.add_argument(
        "--key", default=DEFAULT_KEY, help=f"name of the embeddings in obsm (default: {DEFAULT_KEY})"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output, or the key in obsm")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    return run_command(lambda: _embed(arguments))


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes that gives the cells of an h5ad file to a trained model."""
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="PATH",
        help="a run folder (its newest checkpoint), a checkpoint folder, or an exported folder",
    )
    parser.add_argument("--trust", **TRUST)
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="the h5ad file")
    parser.add_argument(
        "--phase", help="phase of the run whose tokenizer settings are meant, where they differ"
    )
    parser.add_argument(
        "--layer",
        default="auto",
        help="matrix that is read: X, raw.X or a layer's name (default: the first whose values are as in training)",
    )
    parser.add_argument("--gene-column", metavar="NAME", help="column of var that names the genes")
    parser.add_argument(
        "--min-match",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="least share of the file's genes, or of the model's if these are fewer, that must match (default: 0.5)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="cells of a forward pass (default: 64)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
    )


def open_both(arguments: argparse.Namespace, device: Any) -> tuple[SavedModel, H5adCells]:
    """Open the model and the cells that a command names, and say what was found."""
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: it must be at least 1")
    if not 0 <= arguments.min_match <= 1:
        raise UserError(f"--min-match {arguments.min_match:g}: it must be in [0, 1]")
    look_in_current_folder()
    opened = open_model(arguments.model, arguments.phase, device=device, trusted_modules=arguments.trust)
    cells = H5adCells(
        arguments.data,
        opened.tokenizer,
        layer=arguments.layer,
        gene_column=arguments.gene_column,
        min_match=arguments.min_match,
        say=notice,
    )
    return opened, cells


def _embed(arguments: argparse.Namespace) -> int:
    output = Path(os.path.abspath(arguments.output))
    _check_output(arguments.data, output, arguments.overwrite)
    ranks, device = join_ranks(arguments.device)
    try:
        opened, cells = open_both(arguments, device)
        with cells:
            _check_key(arguments)
            predict = None if opened.task is None else opened.predict
            blocks = embedded_blocks(opened.model, cells, ranks, arguments.batch_size, predict)
            if not ranks.is_main:
                for _ in blocks:
                    pass
                return 0
            written = _write(arguments, output, opened, cells, blocks)
        notice(f"wrote {output}: {len(cells):,} cells, {written}")
        return 0
    finally:
        leave_group()


def _check_output(data: Path, output: Path, overwrite: bool) -> None:
    if data.exists() and output.exists() and os.path.samefile(data, output):
        raise UserError(f"--output {output} is the input file itself; name another file")
    if output.exists() and not overwrite:
        raise UserError(f"--output {output} exists; name another file, or give --overwrite to replace it")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file")
    if is_main_process():
        output.parent.mkdir(parents=True, exist_ok=True)


def _check_key(arguments: argparse.Namespace) -> None:
    """Refuse a key that obsm cannot take, on every rank alike and before anything is computed."""
    key = arguments.key
    if not key or "/" in key:
        raise UserError(f"--key {key!r}: it must be a name without '/'")
    with h5py.File(arguments.data, "r") as file:
        obsm: Any = file.get("obsm", ())
        names = obsm.dtype.names or () if isinstance(obsm, h5py.Dataset) else obsm  # before anndata 0.7
        if key in names and not arguments.overwrite:
            raise UserError(
                f"{arguments.data}: obsm has {key!r} already; choose another --key, or give --overwrite"
            )


def _write(
    arguments: argparse.Namespace, output: Path, opened: SavedModel, cells: H5adCells, blocks: Iterator[Block]
) -> str:
    """Write the output beside its place and put it there when it is whole; return what is in it."""
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    try:
        _copy(arguments.data, temporary)
        with h5py.File(temporary, "r+") as file:
            width, columns, num_without = _fill(file, arguments, opened, cells, blocks)
            _add_columns(file, columns)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, output)
        sync_folder(output.parent)
    finally:
        temporary.unlink(missing_ok=True)
    named = f" and obs {', '.join(columns)}" if columns else ""
    if num_without:
        notice(
            f"{arguments.data}: {num_without:,} of {len(cells):,} cells have no count of any of the model's genes: "
            f"they keep their place, with NaN in obsm['{arguments.key}']"
            + (" and no answer in obs" if columns else "")
            + "; drop them before computing neighbours"
        )
    return f"obsm['{arguments.key}'] of {width} numbers{named}"


def _copy(data: Path, temporary: Path) -> None:
    """Copy a file; one that anndata wrote before 0.7, to which nothing can be added, is written anew by anndata."""
    with h5py.File(data, "r") as file:
        is_old = any(
            part in file and not (isinstance(file[part], h5py.Group) and "encoding-type" in file[part].attrs)
            for part in ("obs", "obsm")
        )
    if not is_old:
        shutil.copyfile(data, temporary)
        return
    notice(f"{data}: in the encoding of anndata before 0.7, so it is read as a whole and written anew")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the old encoding
        try:
            cells = anndata.read_h5ad(data)
        except Exception as error:  # anndata raises what each of its readers does
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{data}: anndata cannot read it ({reason}); it is damaged, or needs the version of anndata that wrote "
                "it, to be written anew"
            ) from error
        cells.write_h5ad(temporary)


def _fill(
    file: h5py.File,
    arguments: argparse.Namespace,
    opened: SavedModel,
    cells: H5adCells,
    blocks: Iterator[Block],
) -> tuple[int, dict[str, Any], int]:
    """Write the embeddings as they come; return their width, the answers' obs columns, and the cells without genes."""
    key, num_without = arguments.key, 0
    if "obsm" not in file:
        write_elem(file, "obsm", {})
    if f"obsm/{key}" in file:
        del file[f"obsm/{key}"]
    dataset: Any = None
    answers: list[NDArray[np.float32]] = []
    for block in blocks:
        if dataset is None:
            if not arguments.overwrite:
                _check_columns(file, arguments.data, _predicted(opened, key, block.predictions))
            width = block.embeddings.shape[1]
            chunks = (min(_ROWS_PER_CHUNK, len(cells)), width)
            dataset = file.create_dataset(f"obsm/{key}", (len(cells), width), np.float32, chunks=chunks)
            # What anndata itself writes for an array.
            dataset.attrs["encoding-type"], dataset.attrs["encoding-version"] = "array", "0.2.0"
        dataset[block.start : block.start + len(block.embeddings)] = block.embeddings
        num_without += int(block.lack_genes.sum())
        if block.predictions is not None:
            answers.append(block.predictions)
    if dataset is None:
        raise UserError(f"{arguments.data} has no cells to embed")
    if num_without == len(cells):
        raise UserError(
            f"{arguments.data}: none of its {len(cells):,} cells has a count of any of the model's genes; choose the "
            f"matrix with --layer (read: {cells.matrix_name})"
        )
    return (
        dataset.shape[1],
        _predicted(opened, key, np.concatenate(answers) if answers else None),
        num_without,
    )


def _predicted(opened: SavedModel, key: str, answers: NDArray[np.float32] | None) -> dict[str, Any]:
    """Return the obs columns of a fine-tuned model's answers, named after the key without its `X_`."""
    if answers is None:
        return {}
    stem = key.removeprefix("X_")
    if opened.task == "classification":
        names = list(opened.label_names) or [str(index) for index in range(answers.shape[1])]
        # A cell without an answer is NaN in all classes.
        label = pd.Categorical.from_codes(
            np.where(np.isnan(answers[:, 0]), -1, answers.argmax(axis=1)), names
        )
        return {f"{stem}_label": label, f"{stem}_probability": answers.max(axis=1)}
    if answers.shape[1] == 1:
        return {f"{stem}_value": answers[:, 0]}
    return {f"{stem}_value_{index}": answers[:, index] for index in range(answers.shape[1])}


def _check_columns(file: h5py.File, data: Path, columns: Iterable[str]) -> None:
    obs: Any = file["obs"]
    present = [name for name in columns if name in obs]
    if present:
        raise UserError(
            f"{data}: obs has {', '.join(present)} already; choose another --key, or give --overwrite"
        )


def _add_columns(file: h5py.File, columns: dict[str, Any]) -> None:
    if not columns:
        return
    obs: Any = file["obs"]
    stored: Any = obs.attrs["column-order"]
    order = [name.decode() if isinstance(name, bytes) else str(name) for name in stored]
    for name, values in columns.items():
        write_elem(obs, name, values)
    added = [name for name in columns if name not in order]
    obs.attrs["column-order"] = np.array([*order, *added], dtype=object)
