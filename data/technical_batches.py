"""Technical (experimental) batches: which names a phase has, one map for the whole run, and an index in every batch.

A technical batch is a sequencing run, lane or donor pool, not a training batch. Its index travels as
`batch_idx` `[B]` int64.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from data.collate import num_cells
from data.errors import DataError, listed


def discover_names(*objects: Any) -> list[str]:
    """Return the sorted technical batch names that a phase's data set or loader knows, or an empty list.

    Each object is searched, and what it wraps (`Subset`, `ConcatDataset`, anything with `.dataset`), for
    `unique_batches`, then for `adata.obs['batch']`.
    """
    names: set[str] = set()
    for layer in _layers(objects):
        found = getattr(layer, "unique_batches", None)
        if found is None:
            found = _obs_batch(layer)
        if found is not None:
            names.update(str(name) for name in found)
    return sorted(names)


def merge_names(names_per_phase: Iterable[Sequence[str]]) -> dict[str, int]:
    """Map every phase's technical batch names onto one sorted index; equal names share an index."""
    return {
        name: index
        for index, name in enumerate(sorted({name for names in names_per_phase for name in names}))
    }


def batch_indices(names: Sequence[str], mapping: Mapping[str, int], where: str) -> NDArray[np.int64]:
    """Return the run's index of each of some technical batches, which data at `where` holds.

    Raises:
        DataError: the run's map lacks one.
    """
    missing = [name for name in names if name not in mapping]
    if missing:
        raise DataError(
            f"{where}: the run's map lacks the technical batch {', '.join(missing)}; it has: {', '.join(mapping)}"
        )
    return np.array([mapping[name] for name in names], np.int64)


def padded_count(count: int, multiple: int) -> int:
    """Round a number of technical batches up to a multiple (16 under FP8, whose matrix products need it)."""
    return -(-count // multiple) * multiple


def attach_mapping(mapping: Mapping[str, int], *objects: Any) -> None:
    """Hand the run's map to data sets and collators that ask for it (`batch_to_idx`, `set_batch_mapping`)."""
    for layer in _layers(objects):
        if hasattr(layer, "batch_to_idx"):
            layer.batch_to_idx = dict(mapping)
        set_mapping = getattr(layer, "set_batch_mapping", None)
        if callable(set_mapping):
            set_mapping(dict(mapping))


def row_names(dataset: Any) -> np.ndarray | None:
    """Return each row's technical batch name `[num_rows]` where `adata.obs['batch']` tells it, else None."""
    if isinstance(dataset, Subset):
        names = row_names(dataset.dataset)
        return None if names is None else names[np.asarray(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [row_names(part) for part in dataset.datasets]
        return (
            None
            if any(part is None for part in parts)
            else np.concatenate([p for p in parts if p is not None])
        )
    column = _obs_batch(dataset)
    if column is not None and len(column) == len(dataset):
        return np.asarray([str(name) for name in column], dtype=object)
    inner = getattr(dataset, "dataset", None)
    if inner is not None and hasattr(inner, "__len__") and len(inner) == len(dataset):
        return row_names(inner)
    return None


class BatchIndexer:
    """Turn what a loader yields into a dict that has `tokens` and `batch_idx`."""

    def __init__(self, mapping: Mapping[str, int], phase_names: Sequence[str], phase: str) -> None:
        """Take the run's map, the names of this phase, and the phase's name for messages."""
        self.mapping = dict(mapping)
        self.phase_names = list(phase_names)
        self.phase = phase

    def __call__(self, batch: Any, names: Sequence[str] | np.ndarray | None = None) -> dict[str, Any]:
        """Adapt one batch; `names` are the technical batch names of its cells where the rows tell them."""
        batch = as_dict(batch, self.phase)
        size = batch_size(batch, self.phase)
        if "batch_idx" in batch:
            self._check_range(batch["batch_idx"])
            return batch
        names = batch.get("batch_name", names)
        if names is None:
            if len(self.phase_names) != 1:
                raise DataError(
                    f"datasets '{self.phase}': its batches carry neither 'batch_idx' nor 'batch_name', and the phase "
                    f"has {len(self.phase_names)} technical batches ({_quoted(self.phase_names)}), so a cell's own "
                    "cannot be told; return one of the two from the collate function"
                )
            names = [self.phase_names[0]] * size
        if isinstance(names, str) or len(names) != size:
            raise DataError(
                f"datasets '{self.phase}': 'batch_name' must be a list with one name for each of the {size} cells"
            )
        unknown = sorted({str(name) for name in names} - self.mapping.keys())
        if unknown:
            raise DataError(
                f"datasets '{self.phase}': unknown technical batch {_quoted(unknown)}; "
                f"known are {_quoted(sorted(self.mapping))}"
            )
        batch["batch_idx"] = torch.tensor([self.mapping[str(name)] for name in names], dtype=torch.int64)
        return batch

    def _check_range(self, batch_idx: torch.Tensor) -> None:
        if batch_idx.numel() and not 0 <= int(batch_idx.min()) <= int(batch_idx.max()) < len(self.mapping):
            raise DataError(
                f"datasets '{self.phase}': 'batch_idx' holds {int(batch_idx.min())} to {int(batch_idx.max())}, but the "
                f"run has technical batches 0 to {len(self.mapping) - 1}"
            )


class IndexedSource:
    """Wrap a row source so that every batch it fetches is a dict with `tokens` and `batch_idx`."""

    def __init__(self, source: Any, indexer: BatchIndexer) -> None:
        """Take the source and what completes its batches."""
        self.source = source
        self.indexer = indexer
        self._names: np.ndarray | None = None
        self._looked = False

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        """Offer everything else that the source offers."""
        if name.startswith("__") or name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    def fetch(self, rows: np.ndarray, draw: Any, **step: Any) -> dict[str, Any]:
        """Fetch rows and complete their batch; `step` is for a source that wants the rows of the whole step."""
        batch = self.source.fetch(rows, draw, **step)
        needs_names = len(self.indexer.phase_names) > 1 and not (
            isinstance(batch, Mapping) and ("batch_idx" in batch or "batch_name" in batch)
        )
        return self.indexer(batch, self._row_names(rows) if needs_names else None)

    def _row_names(self, rows: np.ndarray) -> np.ndarray | None:
        if not self._looked:
            self._names, self._looked = row_names(getattr(self.source, "dataset", None)), True
        return None if self._names is None else self._names[rows]


def as_dict(batch: Any, phase: str) -> dict[str, Any]:
    """Return a loader's batch (`[B, N]` tensor or dict with `tokens`) as a dict."""
    if isinstance(batch, list | tuple) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, torch.Tensor):
        return {"tokens": batch}
    if isinstance(batch, Mapping) and isinstance(batch.get("tokens"), torch.Tensor):
        return dict(batch)
    what = (
        f"a dict with the keys {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    )
    raise DataError(
        f"datasets '{phase}': the loader yields {what}; it must yield a tensor [B, N] or a dict with 'tokens' "
        "(and optionally 'control', 'target_gene_idx', 'batch_idx')"
    )


def batch_size(batch: Mapping[str, Any], phase: str) -> int:
    """Return the number of cells in a batch: the first dimension of `tokens`, unless they are packed."""
    if batch["tokens"].ndim < 1:
        raise DataError(f"datasets '{phase}': 'tokens' is a scalar; its first dimension must be the cells")
    return num_cells(batch)


def _layers(objects: Iterable[Any]) -> Iterator[Any]:
    """Walk through data sets, loaders, collators and what they wrap, each once."""
    queue, seen = [item for item in objects if item is not None], set()
    while queue:
        layer = queue.pop(0)
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        yield layer
        for name in ("dataset", "collate_fn", "collate"):
            inner = getattr(layer, name, None)
            if inner is not None and not isinstance(inner, str):
                queue.append(inner)
        queue.extend(getattr(layer, "datasets", None) or [])


def _obs_batch(dataset: Any) -> Any:
    """Return `dataset.adata.obs['batch']` where there is one."""
    obs = getattr(getattr(dataset, "adata", None), "obs", None)
    return obs["batch"] if obs is not None and "batch" in obs else None


def _quoted(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names])
