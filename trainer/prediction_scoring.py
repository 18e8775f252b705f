"""Scores of predicted cells of a phase's held-out perturbations, between its epochs.

All ranks draw their share of the cells, the same ones on any number of ranks and in every epoch but for the weights.
Rank 0 writes them and leaves them to `trainer/scoring_queue.py`; everything else happens in its process.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.perturbation_settings import LOADER, settings_entry, settings_of_source
from data.predicted_values import Space, ValueDecoder
from data.prediction_sets import (
    PerturbedCorpus,
    PredictionSets,
    held_out_wanted,
    make_requests,
    open_perturbed_corpus,
    technical_batch_index,
)
from models.errors import ModelError
from trainer.atomicfile import replace_text
from trainer.config.schema import ScoringConfig
from trainer.errors import ConfigError, UserError
from trainer.phases import Phase
from trainer.prediction import (
    check_can_draw,
    draw_sets,
    knows_technical_batches,
    predicted_blocks,
    predicts_cells_apart,
)
from trainer.run import Run, is_due, leave, position, stop_request
from trainer.scoring.vcc_options import Preset, preset_named
from trainer.scoring.vcc_programs import installed_version
from trainer.scoring_queue import SCORE, ScoringQueue


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a phase predicts of its held-out perturbations, the same in every epoch."""

    preset: Preset
    sets: PredictionSets
    decoder: ValueDecoder
    description: Mapping[str, Any]
    """What the scoring process opens the corpus by, as JSON has it."""
    real_rows: NDArray[np.int64]
    """Held-out cells of what is predicted."""
    training_rows: NDArray[np.int64]

    @property
    def has_context(self) -> bool:
        """Whether cell types are scored one by one."""
        return self.preset.name == "vcc2026"


def check_scoring(run: Run, technical_batches: Mapping[str, int]) -> None:
    """Find before training what would let a score fail, and decide what every phase predicts.

    Raises:
        ConfigError: the program is not installed, the model cannot draw cells, or nothing is held out.
    """
    for phase in run.phases:
        settings, where = phase.config.scoring, f"datasets.{phase.index}.scoring"
        if settings is None or phase.config.epochs == 0:
            continue
        try:
            preset = preset_named(settings.preset)
            installed_version(preset)
            check_can_draw(run.module.model, where)
            phase.predictions = _predictions(run, phase, settings, preset, technical_batches)
        except (UserError, DataError, ModelError) as error:
            text = str(error)
            raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from error


def score_if_due(run: Run, phase: Phase) -> None:
    """Draw cells and hand them to the scorer, where an epoch's end is due for it; every rank comes here.

    Called at the end of every epoch and at the start of a phase, so that what a stop left out is made up for.
    """
    settings, progress, strategy = phase.config.scoring, run.progress, run.strategy
    predictions: Predictions | None = phase.predictions
    if settings is None or predictions is None or progress.epoch_step:
        return
    if not is_due(progress.epoch, settings.every_epochs):
        return
    queue, name = run.scores, f"phase{phase.index}_epoch{progress.epoch}_{settings.preset}"
    if run.ranks.broadcast(queue is not None and queue.has(name)):
        return

    def before_round() -> None:
        run.activity.begin("predicting held-out cells", progress.global_step, is_collective=True)
        if run.ranks.sum([stop_request(run) is not None])[0] > 0:
            leave(run)  # the prediction begins anew at the next start

    with strategy.evaluating():
        blocks = predicted_blocks(
            lambda batch: draw_sets(
                strategy.module, batch, settings.num_steps, device=strategy.device, is_prepared=True
            ),
            predictions.sets,
            predictions.decoder,
            run.ranks,
            batch_size=settings.batch_size,
            before_round=before_round,
        )
        if queue is None:
            for _ in blocks:
                pass
            return
        # AnnData and pandas take a second to import, and most runs score nothing.
        from trainer.predicted_cells import write_predicted_cells

        write_predicted_cells(
            queue.folder / f"{name}.h5ad",
            predictions.sets,
            predictions.decoder,
            blocks,
            {"preset": settings.preset, "phase": phase.name, "num_steps": settings.num_steps},
            has_controls=False,  # the real file has them
            has_context=predictions.has_context,
            overwrite=True,
        )
    _submit(queue, name, phase, position(progress, phase), predictions)


def _predictions(
    run: Run, phase: Phase, settings: ScoringConfig, preset: Preset, technical_batches: Mapping[str, int]
) -> Predictions:
    config = phase.config
    if config.dataloader_factory.replace(":", ".") != LOADER:
        raise ConfigError(
            f"phase '{phase.name}' reads its data by {config.dataloader_factory}; perturbations are predicted of what "
            f"{LOADER} holds out"
        )
    source, arguments = phase.loader.source, config.dataloader_args
    known = settings_of_source(source, arguments, phase.name, technical_batches)
    space: Space = "counts" if preset.kind == "counts" else "lognorm"
    if space == "counts" and known.value_kind != "counts":
        raise ConfigError(
            f"preset {preset.name} scores counts, and phase '{phase.name}' reads log-normalised values, which do not "
            "become counts again; use preset vcc2025, or a corpus of counts"
        )
    corpus = open_perturbed_corpus(source.reader.info, known)
    training_rows, held_out_rows, _ = corpus.split()
    if not len(held_out_rows):
        raise ConfigError(
            f"phase '{phase.name}' holds no cells of perturbations out; name some by held_out_genes, "
            "held_out_contexts, held_out_combinations or split_file of dataloader_args"
        )
    sets, chosen = _chosen_sets(run, phase, settings, corpus, held_out_rows)
    facts = source.facts()
    description = {
        "corpus": str(source.reader.info.path),
        "settings": settings_entry(phase.name, arguments, known.value_kind, facts["tokenizer_options"]),
        "genes": json.loads(known.genes.to_json()),
        "technical_batches": dict(technical_batches),
        "space": space,
    }
    names = np.array(corpus.targets.names)[corpus.labels.perturbation[held_out_rows]]
    real_rows = held_out_rows[np.isin(names, sorted(chosen))]
    decoder = ValueDecoder(known.tokenizer, known.transform, space, known.value_kind == "counts")
    return Predictions(preset, sets, decoder, description, real_rows, training_rows)


def _chosen_sets(
    run: Run, phase: Phase, settings: ScoringConfig, corpus: PerturbedCorpus, held_out_rows: NDArray[np.int64]
) -> tuple[PredictionSets, set[str]]:
    """Return the sets of the held-out targets that the run's seed chooses, and the targets."""
    wanted = held_out_wanted(corpus, held_out_rows)
    targets = sorted({each.target for each in wanted})
    rng = np.random.default_rng([run.config.seed, phase.index])
    chosen = set(rng.permutation(np.array(targets))[: settings.max_perturbations].tolist())
    requests = make_requests(
        corpus,
        [each for each in wanted if each.target in chosen],
        real_rows=held_out_rows,
        default_cells=1,
        cells_per_perturbation=settings.cells_per_perturbation,
        where="held out",
    )
    knows_batches = knows_technical_batches(run.module.model)
    sets = PredictionSets(
        corpus,
        requests,
        seed=run.config.seed,
        batch_index=technical_batch_index(corpus, requests) if knows_batches else None,
        cells_are_apart=predicts_cells_apart(run.module.model),
    )
    return sets, chosen


def _submit(
    queue: ScoringQueue, name: str, phase: Phase, where: dict[str, Any], predictions: Predictions
) -> None:
    shared = queue.shared(phase.index)
    rows, description = queue.folder / f"{shared}.rows.npz", queue.folder / f"{shared}.sets.json"
    if not description.exists():
        np.savez(rows, real=predictions.real_rows, training=predictions.training_rows)
        replace_text(description, json.dumps(predictions.description) + "\n")
    request = {
        "kind": SCORE,
        **where,
        "preset": predictions.preset.name,
        "has_context": predictions.has_context,
        "shared": shared,
        "own_file": f"{name}.h5ad",
        "output": name,
    }
    queue.submit(name, request)
