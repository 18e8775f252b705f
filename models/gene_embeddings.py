"""Gene vectors from a file, to start a model's token embedding from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from models.errors import ModelError


def load_gene_embeddings(path: str | Path, gene_ids: Sequence[str]) -> Tensor:
    """Read gene vectors and put them in the order of `gene_ids`.

    Args:
        path: `NAME.npy` ([genes, dim], with `NAME.txt` beside it: one gene name a line, in row order), or
            `NAME.safetensors` with one matrix and its gene names in `NAME.txt`.
        gene_ids: names to look up, in the order of the rows wanted.

    Returns:
        [len(gene_ids), dim] float32; rows of genes that the file lacks are NaN.
    """
    path = Path(path)
    names_path = path.with_suffix(".txt")
    for needed in (path, names_path):
        if not needed.is_file():
            raise ModelError(
                f"gene_embedding_path: {needed} does not exist; give a .npy or .safetensors matrix [genes, dim]"
                " with a .txt of the same name beside it that holds one gene name a line"
            )
    matrix = _read_matrix(path)
    names = [line.strip() for line in names_path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(names) != len(matrix):
        raise ModelError(
            f"gene_embedding_path: {names_path} names {len(names)} genes, {path} has {len(matrix)} rows"
        )
    rows = {name: row for row, name in enumerate(names)}
    if len(rows) != len(names):
        twice = next(name for row, name in enumerate(names) if rows[name] != row)
        raise ModelError(f"gene_embedding_path: {names_path} names {twice!r} more than once")
    found = [(index, rows[gene]) for index, gene in enumerate(gene_ids) if gene in rows]
    if not found:
        raise ModelError(
            f"gene_embedding_path: {path} has none of the data's {len(gene_ids)} genes;"
            f" it names {names[:3]}, the data {list(gene_ids[:3])}"
        )
    table = torch.full((len(gene_ids), matrix.shape[1]), torch.nan)
    targets, sources = zip(*found, strict=True)
    table[list(targets)] = torch.from_numpy(matrix[list(sources)])
    return table


def fit_to_width(table: Tensor, dim: int, std: float, seed: int = 0) -> Tensor:
    """Give gene vectors the width and the scale of a token embedding, keeping the angles between them.

    A wider table is cut to its `dim` strongest directions, a narrower one padded; a seeded rotation then spreads
    the directions over all coordinates. Rows of NaN (genes without a vector) stay NaN.

    Args:
        table: [genes, width].
        dim: width wanted.
        std: root mean square wanted of the entries.
        seed: of the rotation.
    """
    known = ~table.isnan().any(dim=1)
    vectors = table[known].double()
    if vectors.shape[1] > dim:
        directions = torch.linalg.svd(vectors, full_matrices=False).Vh[:dim]
        vectors = vectors @ directions.T
    vectors = torch.nn.functional.pad(vectors, (0, dim - vectors.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    vectors = vectors @ rotation
    scale = vectors.square().mean().sqrt()
    if scale > 0:
        vectors = vectors * (std / scale)
    fitted = table.new_full((len(table), dim), torch.nan)
    fitted[known] = vectors.to(table.dtype)
    return fitted


def _read_matrix(path: Path) -> np.ndarray:
    """Read the one matrix of a file as finite float32 [genes, dim]."""
    if path.suffix == ".npy":
        try:
            matrix = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ModelError(f"gene_embedding_path: {path} is no plain NumPy array: {error}") from error
    elif path.suffix == ".safetensors":
        try:
            with safe_open(str(path), framework="np") as file:
                names = list(file.keys())
                if len(names) != 1:
                    raise ModelError(
                        f"gene_embedding_path: {path} holds the tensors {names}; it must hold one matrix"
                    )
                matrix = file.get_tensor(names[0])
        except SafetensorError as error:
            raise ModelError(f"gene_embedding_path: {path} is no safetensors file: {error}") from error
    else:
        raise ModelError(f"gene_embedding_path: {path} ends in {path.suffix!r}; allowed: .npy, .safetensors")
    if matrix.ndim != 2 or not np.issubdtype(matrix.dtype, np.floating):
        raise ModelError(
            f"gene_embedding_path: {path} holds {matrix.dtype} of shape {matrix.shape};"
            " it must hold floating point numbers [genes, dim]"
        )
    if not np.isfinite(matrix).all():
        raise ModelError(f"gene_embedding_path: {path} has values that are not finite")
    return matrix.astype(np.float32)
