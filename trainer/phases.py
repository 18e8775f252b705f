"""The phases of a run, opened: their loaders, lengths and batch arithmetic, and the facts of their data."""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from data import technical_batches
from data.loader import MicroBatch, StepLoader
from data.order import GlobalOrder, Order
from data.stream import StreamLoader
from data.technical_batches import BatchIndexer, IndexedSource
from trainer.circuit_facts import CircuitFacts, common_circuits
from trainer.config.schema import BatchPlan, PhaseConfig, RunConfig
from trainer.distributed import Ranks
from trainer.dotted import SIZES
from trainer.errors import ConfigError
from trainer.phase_data import Cells, PhaseData, open_phase_data
from trainer.schedule import (
    base_learning_rates,
    learning_rate_factor,
    momentum,
    set_learning_rates,
    set_momentum,
)

FP8_MULTIPLE = 16
"""What FP8 matrix products need their dimensions to be multiples of."""


@dataclass(frozen=True)
class DataFacts:
    """What the data knows and a model's sizes depend on; saved in every checkpoint."""

    technical_batches: dict[str, int]
    """Index of each technical batch name, over all phases."""
    n_technical_batches: int
    """Their number, rounded up to a multiple of 16 under FP8."""
    gene_space: Any = None
    """The genes that token ids stand for (`data.genes.GeneSpace`), the same in every phase; None for foreign data."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Sizes by the name that a constructor may ask for (`trainer.dotted.SIZES`), as far as the data tells them."""
    label_names: tuple[str, ...] = ()
    """Names of the classes that labels stand for, by index, the same in every phase; empty without such labels."""
    tokenizer_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By phase the complete options of our tokenizer, with what was fitted to the training cells; of circuits what
    their tokens and prompts stand for."""
    circuits: CircuitFacts | None = None
    """What tokens and prompt indices of circuits stand for; None for cells."""


@dataclass
class Phase:
    """One entry of `datasets`, opened."""

    index: int
    config: PhaseConfig
    plan: BatchPlan
    loader: Any
    """`StepLoader` or `StreamLoader` over the training cells."""
    validation: Any
    """The same over the validation cells, or None."""
    batch_names: list[str]
    notices: list[str]
    unit: str = "cells"
    """What its data counts, for people: cells, sets, circuits."""
    predictions: Any = None
    """What is predicted of its held-out perturbations between epochs (`trainer.prediction_scoring`), or None."""
    steps_before: int = 0
    """Optimizer steps of the phases before it."""
    steps_of_run: int | None = None
    """Optimizer steps of all phases."""

    @property
    def name(self) -> str:
        """Return the phase's name."""
        return self.config.name

    @property
    def steps_per_epoch(self) -> int | None:
        """Return the optimizer steps of one epoch, `max_steps_per_epoch` considered; None where nothing tells."""
        known = [n for n in (self.loader.steps_per_epoch, self.config.max_steps_per_epoch) if n is not None]
        return min(known) if known else None

    @property
    def total_steps(self) -> int | None:
        """Return the optimizer steps that the phase will run at most; None where nothing tells."""
        per_epoch = self.steps_per_epoch
        limits = [] if per_epoch is None else [per_epoch * self.config.epochs]
        if self.config.max_steps is not None:
            limits.append(self.config.max_steps)
        return min(limits) if limits else None

    @property
    def scheduled_steps(self) -> int | None:
        """Return the steps that its schedule is over: its own, or the run's; None where nothing tells."""
        return self.steps_of_run if self.config.schedule_scope == "run" else self.total_steps

    def steps_left(self, epoch_step: int, phase_step: int) -> float:
        """Return the steps until the epoch or the phase ends, infinity where only the data can tell."""
        limits = [(self.steps_per_epoch, epoch_step), (self.config.max_steps, phase_step)]
        return min((max(0, limit - done) for limit, done in limits if limit is not None), default=math.inf)

    def first_steps(self, epoch: int, num_steps: int) -> Iterator[list[MicroBatch]]:
        """Yield the first steps of an epoch on one process, without the copies that follow the cells of a stream."""
        with contextlib.closing(self.loader.steps(epoch, 0, num_steps)) as steps:
            for micro_batches in itertools.islice(steps, num_steps):
                given = [micro for micro in micro_batches if micro.num_cells]
                if not given:
                    return
                yield given

    def set_rates(self, groups: Sequence[dict[str, Any]], phase_step: int) -> None:
        """Set the learning rates and the momentum of the step numbered `phase_step` (from 0) on parameter groups."""
        rates = base_learning_rates(self.config, groups)
        set_learning_rates(groups, rates, self.learning_rate_factor(phase_step))
        set_momentum(groups, self.momentum(phase_step))

    def learning_rate_factor(self, phase_step: int) -> float:
        """Return the factor on the base learning rate for the step numbered `phase_step` (from 0)."""
        return learning_rate_factor(self.config, self._scheduled(phase_step), self.scheduled_steps)

    def momentum(self, phase_step: int) -> float | None:
        """Return the momentum for the step numbered `phase_step`; None: the optimizer's own."""
        return momentum(self.config, self._scheduled(phase_step), self.scheduled_steps)

    def _scheduled(self, phase_step: int) -> int:
        return phase_step + (self.steps_before if self.config.schedule_scope == "run" else 0)

    def close(self) -> None:
        """Stop the loaders' threads and processes."""
        for loader in (self.loader, self.validation):
            if loader is not None:
                loader.close()


def open_phases(config: RunConfig, ranks: Ranks, *, pin_memory: bool) -> tuple[list[Phase], DataFacts]:
    """Open every phase's data in order, merge what it knows, and put each loader under the batch contract.

    A factory that names `facts` gets what the phases before it know.
    """
    opened: list[PhaseData] = []
    known: dict[str, Any] = {}
    for index, phase in enumerate(config.datasets):
        offered = {"rank": ranks.index, "world_size": ranks.count, "seed": config.seed, "facts": dict(known)}
        opened.append(open_phase_data(index, phase, ranks, offered))
        known |= {key: value for key, value in opened[-1].training.facts().items() if value is not None}
    names = [
        sorted({name for cells in data.parts for name in cells.batch_names()}) or [phase.name]
        for phase, data in zip(config.datasets, opened, strict=True)
    ]
    mapping = technical_batches.merge_names(names)
    for data in opened:
        for cells in data.parts:
            technical_batches.attach_mapping(mapping, *cells.objects)
    named = {phase.name: data.parts for phase, data in zip(config.datasets, opened, strict=True)}
    circuits = common_circuits(named)  # first, since the options of tokenizers hold the run's prompts
    multiple = FP8_MULTIPLE if config.precision == "fp8" else 1
    facts = DataFacts(
        technical_batches=mapping,
        n_technical_batches=technical_batches.padded_count(len(mapping), multiple),
        gene_space=_common_gene_space(config, opened),
        sizes=_largest_sizes(opened),
        label_names=_common_label_names(config, opened),
        tokenizer_options={
            phase.name: options
            for phase, data in zip(config.datasets, opened, strict=True)
            if (options := data.training.facts().get("tokenizer_options")) is not None
        },
        circuits=circuits,
    )
    phases = [
        _build_phase(
            config,
            index,
            data,
            BatchIndexer(mapping, names[index], config.datasets[index].name),
            ranks,
            pin_memory,
        )
        for index, data in enumerate(opened)
    ]
    lengths = [phase.total_steps or 0 for phase in phases]
    for index, phase in enumerate(phases):
        phase.steps_before, phase.steps_of_run = sum(lengths[:index]), sum(lengths)
    return phases, facts


def _build_phase(
    config: RunConfig, index: int, data: PhaseData, indexer: BatchIndexer, ranks: Ranks, pin_memory: bool
) -> Phase:
    phase = config.datasets[index]
    plan = config.batch_plan(phase, ranks.count, _micro_batch_size(config, index, data.training.batch_size))
    build = _LoaderBuilder(config.seed, index, plan, indexer, ranks, pin_memory)
    result = Phase(
        index=index,
        config=phase,
        plan=plan,
        loader=build.training(data.training),
        validation=None if data.validation is None else build.validation(data.validation),
        batch_names=indexer.phase_names,
        notices=[notice for cells in data.parts for notice in cells.notices],
        unit=data.training.unit,
    )
    if result.total_steps is None:
        raise ConfigError(
            f"datasets.{index}: the loader of phase '{phase.name}' does not tell its length, so nothing would end the "
            "phase or its schedule; set max_steps or max_steps_per_epoch"
        )
    return result


@dataclass
class _LoaderBuilder:
    """Build a phase's loaders over rows or a stream."""

    seed: int
    index: int
    plan: BatchPlan
    indexer: BatchIndexer
    ranks: Ranks
    pin_memory: bool

    def training(self, cells: Cells) -> StepLoader | StreamLoader:
        """Build the training loader: one item holds the micro-batches of one optimizer step."""
        if cells.stream is not None:
            return self._stream(cells, self.plan.accumulation)
        # A source may draw its cells in an order of its own, balanced over classes for example.
        own_order = getattr(cells.rows, "training_order", None)
        order = None if own_order is None else own_order(self.seed, self.index)
        sizes = self.plan.global_batch_size, self.plan.micro_batch_size
        by_batch = getattr(cells.rows, "batch_order", None)
        if by_batch is not None:
            order = by_batch(self.seed, self.index, sizes[0])
        return self._steps(cells, cells.shuffle, *sizes, order)

    def validation(self, cells: Cells) -> StepLoader | StreamLoader:
        """Build the validation loader: one item holds one micro-batch for each rank."""
        if cells.stream is not None:
            return self._stream(cells, 1)
        micro = cells.batch_size or self.plan.micro_batch_size
        # In a shuffled order a `validation_steps` limit takes cells from everywhere, the same in every evaluation.
        return self._steps(cells, True, micro * self.ranks.count, micro)

    def _steps(
        self,
        cells: Cells,
        shuffle: bool,
        global_batch_size: int,
        micro_batch_size: int,
        order: Order | None = None,
    ) -> StepLoader:
        order = order or GlobalOrder(
            len(cells.rows),
            seed=self.seed,
            phase=self.index,
            shuffle=shuffle,
            selected=getattr(cells.rows, "row_mask", None),
            **_shuffle_sizes(cells.rows),
        )
        return StepLoader(
            IndexedSource(cells.rows, self.indexer),
            order,
            draw_seed=self.seed,
            phase=self.index,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=self.ranks.index,
            world_size=self.ranks.count,
            num_workers=cells.num_workers or getattr(cells.rows, "num_workers", 0),
            drop_last=cells.drop_last,
            pin_memory=self.pin_memory,
        )

    def _stream(self, cells: Cells, accumulation: int) -> StreamLoader:
        assert cells.stream is not None
        length = _stream_length(cells.stream)
        longest = int(self.ranks.max([length])[0])
        return StreamLoader(
            cells.stream,
            self.indexer,
            accumulation=accumulation,
            seed=self.seed,
            phase=self.index,
            rank=self.ranks.index,
            world_size=self.ranks.count,
            num_micro_batches=None if longest < 0 else longest,
        )


def _shuffle_sizes(rows: Any) -> dict[str, int]:
    """Return the block and window that a row source asks to be shuffled by, if it does."""
    sizes = {name: getattr(rows, f"shuffle_{name}", None) for name in ("block", "window")}
    return {name: size for name, size in sizes.items() if size is not None}


def _stream_length(loader: Any) -> int:
    """Return the micro-batches of this rank's stream, -1 where it does not tell."""
    try:
        return len(loader)
    except TypeError:
        return -1


def _micro_batch_size(config: RunConfig, index: int, of_loader: int | None) -> int:
    """Return the micro-batch: what the user's loader yields, or the configured one, which must not differ."""
    phase = config.datasets[index]
    wanted = phase.micro_batch_size if phase.micro_batch_size is not None else config.micro_batch_size
    size = wanted if of_loader is None else of_loader
    if size is None:
        raise ConfigError(
            f"datasets.{index}: micro_batch_size (cells per rank in one forward pass) is missing, and the loader of "
            f"phase '{phase.name}' does not tell its batch size"
        )
    if wanted is not None and wanted != size:
        raise ConfigError(
            f"datasets.{index}: micro_batch_size is {wanted}, but the loader of phase '{phase.name}' yields batches of "
            f"{of_loader}; leave micro_batch_size out or make the two equal"
        )
    return int(size)


def _common_gene_space(config: RunConfig, opened: list[PhaseData]) -> Any:
    """Return the phases' gene space; two different ones are an error."""
    space, owner = None, ""
    for phase, data in zip(config.datasets, opened, strict=True):
        for cells in data.parts:
            found = cells.facts().get("gene_space")
            if found is None:
                continue
            if space is not None and found.sha256 != space.sha256:
                raise ConfigError(
                    f"datasets '{owner}' and '{phase.name}' are in different gene spaces ({len(space)} and "
                    f"{len(found)} genes), so one token id would mean two genes; convert both with the same "
                    "--genes FILE, or together with --per-file"
                )
            space, owner = found, phase.name
    return space


def _common_label_names(config: RunConfig, opened: list[PhaseData]) -> tuple[str, ...]:
    """Return the phases' classes by index; two different lists are an error."""
    names: tuple[str, ...] = ()
    owner = ""
    for phase, data in zip(config.datasets, opened, strict=True):
        for cells in data.parts:
            found = tuple(cells.facts().get("label_names") or ())
            if found and names and found != names:
                different = sorted(set(found) ^ set(names))
                raise ConfigError(
                    f"datasets '{owner}' and '{phase.name}' have different classes ({len(names)} and {len(found)}; not "
                    f"in both: {', '.join(different[:6])}), so one index would mean two classes; give them the same "
                    "labels"
                )
            if found:
                names, owner = found, phase.name
    return names


def _largest_sizes(opened: list[PhaseData]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for data in opened:
        for cells in data.parts:
            facts = cells.facts()
            for key in SIZES:
                if facts.get(key) is not None:
                    sizes[key] = max(sizes.get(key, 0), int(facts[key]))
    return sizes
