"""Call a phase's loader factory and decide how its cells are read: by rows under our order, or as a stream."""

import inspect
from collections.abc import Sized
from dataclasses import dataclass, field
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from data import technical_batches
from data.map_style import MapStyleSource
from trainer.config.schema import PhaseConfig
from trainer.distributed import Ranks
from trainer.dotted import resolve
from trainer.errors import ConfigError


@dataclass
class Cells:
    """The cells of one loader: `rows` that our order can address, or a `stream` that is read as it comes."""

    rows: Any = None
    stream: DataLoader | None = None
    shuffle: bool = True
    drop_last: bool = False
    batch_size: int | None = None
    num_workers: int = 0
    objects: tuple[Any, ...] = ()
    """Data set, loader and collator: where technical batch names are looked for and the map is attached."""
    notices: list[str] = field(default_factory=list)

    def batch_names(self) -> list[str]:
        """Return the technical batch names that the data knows."""
        return technical_batches.discover_names(*self.objects)

    @property
    def unit(self) -> str:
        """Return what one sample is, in the plural: as the data set or its loader says by `unit`, else cells."""
        named = (getattr(holder, "unit", None) for holder in (*self.objects, self.stream))
        return next((unit for unit in named if isinstance(unit, str)), "cells")

    def facts(self) -> dict[str, Any]:
        """Return what one of our own row sources knows of its data; other data knows nothing more."""
        return self.rows.facts() if hasattr(self.rows, "facts") else {}


@dataclass
class PhaseData:
    """A phase's training and validation cells."""

    training: Cells
    validation: Cells | None

    @property
    def parts(self) -> list[Cells]:
        """Return what there is of the two."""
        return [cells for cells in (self.training, self.validation) if cells is not None]


@dataclass
class _Opened:
    """What a factory returned: a data set and its loader, or a row source without one."""

    dataset: Any
    loader: DataLoader | None
    shards_itself: bool


def open_phase_data(index: int, phase: PhaseConfig, ranks: Ranks, offered: dict[str, Any]) -> PhaseData:
    """Call the phase's factories; `offered` are arguments for those that name them (rank, world_size, seed, facts).

    Raises:
        ConfigError: a factory returns something else, the data cannot be divided over the ranks, or evaluation is
            asked for without validation data.
    """
    where = f"datasets.{index}"
    opened = _call_factory(phase.dataloader_factory, phase.dataloader_args, where, offered)
    training = _adapt(opened, phase.name, where, ranks)
    if phase.validation is not None:
        settings, where = phase.validation, f"{where}.validation"
        own = _call_factory(settings.dataloader_factory, settings.dataloader_args, where, offered)
        validation = _adapt(own, phase.name, where, ranks)
    else:
        validation = _carried_validation(opened, training, phase.name, where, ranks)
    if validation is None and (phase.eval_every_epochs or phase.eval_every_steps or phase.validation_steps):
        raise ConfigError(
            f"{where}: evaluation is asked for (eval_every_epochs, eval_every_steps or validation_steps), but phase "
            f"'{phase.name}' has no validation data; set {where}.validation.dataloader_factory, let the factory's data "
            "set or loader carry val_dataset or val_dataloader, or give val_fraction to our own loader"
        )
    return PhaseData(training, validation)


def _call_factory(path: str, arguments: dict[str, Any], where: str, offered: dict[str, Any]) -> _Opened:
    factory = resolve(path, f"{where}.dataloader_factory")
    named = inspect.signature(factory).parameters
    result = factory(**arguments, **{k: v for k, v in offered.items() if k in named and k not in arguments})
    shards_itself = {"rank", "world_size"} <= named.keys()
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], DataLoader):
        return _Opened(result[0], result[1], shards_itself)
    if isinstance(result, DataLoader):
        return _Opened(result.dataset, result, shards_itself)
    if callable(getattr(result, "fetch", None)) and isinstance(result, Sized):
        return _Opened(result, None, shards_itself)
    kinds = [type(item).__name__ for item in (result if isinstance(result, tuple) else (result,))]
    raise ConfigError(
        f"{where}.dataloader_factory: {path} returned {' and '.join(kinds)}; it must return (dataset, DataLoader), a "
        "DataLoader, or a row source (an object with fetch(rows, draw) and a length)"
    )


def _adapt(opened: _Opened, name: str, where: str, ranks: Ranks) -> Cells:
    """Decide how a factory's data is read: by rows under our order wherever that is possible."""
    loader = opened.loader
    if loader is None:
        notices = [f"phase '{name}': {notice}" for notice in getattr(opened.dataset, "notices", ())]
        return Cells(rows=opened.dataset, objects=(opened.dataset,), notices=notices)
    objects = (opened.dataset, loader.dataset, loader.collate_fn)
    common: dict[str, Any] = {
        "batch_size": loader.batch_size,
        "num_workers": loader.num_workers,
        "objects": objects,
    }
    if opened.shards_itself:
        return Cells(stream=loader, **common)
    if not isinstance(loader.dataset, IterableDataset) and _is_ordinary(loader):
        rows = MapStyleSource(loader.dataset, loader.collate_fn)
        shuffle = isinstance(loader.sampler, RandomSampler)
        return Cells(rows=rows, shuffle=shuffle, drop_last=loader.drop_last, **common)
    kind = "an iterable data set" if isinstance(loader.dataset, IterableDataset) else "a sampler of its own"
    stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    if ranks.count > 1 and not stateful:
        raise ConfigError(
            f"{where}: the loader of phase '{name}' has {kind} and cannot be divided over {ranks.count} ranks; let its "
            "factory take rank and world_size and shard itself, return a loader with state_dict and load_state_dict "
            "that does, use a map-style data set with shuffle=True or False, or run one process"
        )
    notice = f"phase '{name}' has {kind}: a resumed run replays it to its position"
    return Cells(stream=loader, notices=[] if stateful else [notice], **common)


def _is_ordinary(loader: DataLoader) -> bool:
    """Tell whether a loader goes once through a map-style data set, in order or shuffled, in batches of one size."""
    sampler = loader.sampler
    if type(loader.batch_sampler) is not BatchSampler or type(sampler) not in (
        RandomSampler,
        SequentialSampler,
    ):
        return False
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return True


def _carried_validation(
    opened: _Opened, training: Cells, name: str, where: str, ranks: Ranks
) -> Cells | None:
    """Find the validation data that the training loader or data set carries."""
    for holder in (opened.loader, opened.dataset):
        loader = getattr(holder, "val_dataloader", None)
        loader = loader() if inspect.ismethod(loader) else loader
        if isinstance(loader, DataLoader):
            return _adapt(
                _Opened(loader.dataset, loader, opened.shards_itself),
                name,
                f"{where} (val_dataloader)",
                ranks,
            )
    for holder in (opened.loader, opened.dataset):
        dataset = next(
            (d for d in (getattr(holder, "val_dataset", None), getattr(holder, "validation", None)) if d),
            None,
        )
        if dataset is None:
            continue
        if callable(getattr(dataset, "fetch", None)):
            return Cells(rows=dataset, shuffle=False, objects=(dataset,))
        collate = None if opened.loader is None else opened.loader.collate_fn
        loader = DataLoader(dataset, batch_size=training.batch_size or 1, collate_fn=collate)
        return _adapt(_Opened(dataset, loader, False), name, f"{where} (val_dataset)", ranks)
    return None
