"""Gene vectors from a file, to start a model's token embedding from."""

import pickle
import re
import tokenize
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.errors import ModelError

_ENSEMBL_VERSION = re.compile(r"^(ENS[A-Z]{0,6}G\d{11})\.\d+$")


def load_gene_embeddings(
    path: str | Path, gene_ids: Sequence[str], gene_symbols: Sequence[str | None] | None = None
) -> Tensor:
    """Read gene vectors and put them in the order of `gene_ids`.

    A gene is looked up by its id, and where the file has none by its symbol, if no other gene has the same. Versions
    of Ensembl ids in the file are left out.

    Args:
        path: a matrix [genes, dim] in `NAME.npy`, `NAME.safetensors` or `NAME.pt`, with `NAME.txt` beside it (one gene
            name a line, in row order), or a `.pt` file of `{"gene_names": [...], "embeddings": tensor}`. Nothing in a
            file is executed.
        gene_ids: names to look up, in the order of the rows wanted.
        gene_symbols: their symbols, where these are known.

    Returns:
        [len(gene_ids), dim] float32; rows of genes that the file lacks are NaN.
    """
    path = Path(path)
    matrix, names = _read_file(path)
    names = [_ENSEMBL_VERSION.sub(r"\1", name) for name in names]
    rows = {name: row for row, name in enumerate(names)}
    if len(rows) != len(names):
        twice = next(name for row, name in enumerate(names) if rows[name] != row)
        raise ModelError(f"gene_embedding_path: {path} names {twice!r} more than once")
    symbols = [None] * len(gene_ids) if gene_symbols is None else gene_symbols
    times = Counter(symbols)
    found: list[tuple[int, int]] = []
    for index, (gene, symbol) in enumerate(zip(gene_ids, symbols, strict=True)):
        name = gene if gene in rows else symbol if times[symbol] == 1 else None
        if name is not None and name in rows:
            found.append((index, rows[name]))
    if not found:
        raise ModelError(
            f"gene_embedding_path: {path} has none of the data's {len(gene_ids)} genes;"
            f" it names {names[:3]}, the data {list(gene_ids[:3])}"
        )
    table = torch.full((len(gene_ids), matrix.shape[1]), torch.nan)
    targets, sources = zip(*found, strict=True)
    table[list(targets)] = torch.from_numpy(matrix[list(sources)])
    return table


def fit_to_width(table: Tensor, dim: int, std: float) -> Tensor:
    """Give gene vectors the width and the scale of a token embedding, keeping the angles between them.

    A wider table is cut to its `dim` strongest directions, a narrower one padded; a fixed rotation then spreads
    the directions over all coordinates. Rows of NaN (genes without a vector) stay NaN.

    Args:
        table: [genes, width].
        dim: width wanted.
        std: root mean square wanted of the entries.
    """
    known = ~table.isnan().any(dim=1)
    vectors = table[known].double()
    if vectors.shape[1] > dim:
        directions = torch.linalg.svd(vectors, full_matrices=False).Vh[:dim]
        vectors = vectors @ directions.T
    vectors = torch.nn.functional.pad(vectors, (0, dim - vectors.shape[1]))
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    vectors = vectors @ rotation
    scale = vectors.square().mean().sqrt()
    if scale > 0:
        vectors = vectors * (std / scale)
    fitted = table.new_full((len(table), dim), torch.nan)
    fitted[known] = vectors.to(table.dtype)
    return fitted


def _read_file(path: Path) -> tuple[np.ndarray, list[str]]:
    """Return the matrix of a file as finite float32 [genes, dim], and the name of each row."""
    names_path = path.with_suffix(".txt")
    content = _load(path) if path.is_file() else None
    if isinstance(content, tuple):
        return _checked(path, content[0]), content[1]
    for needed in (path, names_path):
        if not needed.is_file():
            raise ModelError(
                f"gene_embedding_path: {needed} does not exist; give a .npy, .safetensors or .pt matrix [genes, dim]"
                " with a .txt of the same name beside it that holds one gene name a line"
            )
    assert content is not None
    matrix = _checked(path, content)
    try:
        names = [line.strip() for line in names_path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ModelError(f"gene_embedding_path: {names_path} is no text in UTF-8 ({error})") from error
    if len(names) != len(matrix):
        raise ModelError(
            f"gene_embedding_path: {names_path} names {len(names)} genes, {path} has {len(matrix)} rows"
        )
    return matrix, names


def _load(path: Path) -> np.ndarray | tuple[np.ndarray, list[str]]:
    """Read what a file holds: a matrix, or a matrix and its names."""
    if path.suffix == ".npy":
        return _load_npy(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="pt") as file:
                names = list(file.keys())
                if len(names) != 1:
                    raise ModelError(
                        f"gene_embedding_path: {path} holds the tensors {names}; it must hold one matrix"
                    )
                return _as_array(path, file.get_tensor(names[0]))
        except SafetensorError as error:
            raise ModelError(f"gene_embedding_path: {path} is no safetensors file: {error}") from error
    if path.suffix == ".pt":
        return _load_pt(path)
    raise ModelError(f"gene_embedding_path: {path} ends in {path.suffix!r}; allowed: .npy, .safetensors, .pt")


def _load_npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":
                raise ValueError("it does not begin as one")
        # Mapped, so that a shape that is more than the file holds is refused before memory is taken for it.
        with np.errstate(over="raise"):
            return np.load(path, mmap_mode="r", allow_pickle=False)
    # The header is a Python literal, which NumPy gives to Python's own parser and then takes at its word.
    except (
        ValueError, EOFError, OSError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError, TypeError,
        ArithmeticError, KeyError,
    ) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"gene_embedding_path: {path} is no plain NumPy array: {reason}; save the matrix alone, with the names in "
            "a .txt beside it"
        ) from error


def _load_pt(path: Path) -> np.ndarray | tuple[np.ndarray, list[str]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    # What a damaged file makes the reader of its format stumble over.
    except (
        pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError, KeyError, IndexError, TypeError,
        AttributeError, AssertionError,
    ) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"gene_embedding_path: {path} holds something else than tensors and names, or is damaged, and is never "
            f"unpickled: {reason}"
        ) from error
    if isinstance(content, Tensor):
        return _as_array(path, content)
    keys = list(content) if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or not {"gene_names", "embeddings"} <= content.keys():
        raise ModelError(
            f"gene_embedding_path: {path} holds {keys}; it must hold a matrix, or gene_names and embeddings"
        )
    matrix, names = content["embeddings"], content["gene_names"]
    if not isinstance(matrix, Tensor) or not isinstance(names, list | tuple) or matrix.ndim == 0:
        raise ModelError(f"gene_embedding_path: {path}: gene_names must be a list, and embeddings a matrix")
    if len(names) != len(matrix):
        raise ModelError(f"gene_embedding_path: {path} has {len(names)} gene_names for other embeddings")
    return _as_array(path, matrix), [str(name) for name in names]


def _as_array(path: Path, matrix: Tensor) -> np.ndarray:
    """Return a tensor as float32; one number may not stand for many, as a view of it in a file can."""
    is_plain = matrix.layout == torch.strided and matrix.is_floating_point()
    if not is_plain or matrix.numel() * matrix.element_size() > matrix.untyped_storage().nbytes():
        raise ModelError(
            f"gene_embedding_path: {path} holds {matrix.dtype} {list(matrix.shape)}, which is no plain matrix of "
            "floating point numbers"
        )
    return matrix.detach().float().numpy()


def _checked(path: Path, matrix: np.ndarray) -> np.ndarray:
    if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.floating):
        raise ModelError(
            f"gene_embedding_path: {path} holds {matrix.dtype} of shape {matrix.shape};"
            " it must hold floating point numbers [genes, dim]"
        )
    if not np.isfinite(matrix).all():
        raise ModelError(f"gene_embedding_path: {path} has values that are not finite")
    return matrix.astype(np.float32)
