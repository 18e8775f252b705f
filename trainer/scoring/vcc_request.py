"""A request of a training run to score predicted cells: the real cells are written once for all epochs of a phase."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.corpus import open_corpus
from data.genes import GeneSpace
from data.perturbation_settings import read_settings
from data.predicted_values import ValueDecoder
from data.prediction_sets import PerturbedCorpus, open_perturbed_corpus
from trainer.atomicfile import replace_text
from trainer.predicted_cells import write_corpus_cells
from trainer.scoring.benchmarks import Results, Row
from trainer.scoring.results import JSON_FILE
from trainer.scoring.vcc import score


def score_request(folder: Path, request: dict[str, Any]) -> Results:
    """Score the cells that a request names; baselines are scored once, and taken from there by later requests.

    Raises:
        UserError, DataError: the program fails, or the corpus is no longer what it was.
    """
    shared = request["shared"]
    description = json.loads((folder / f"{shared}.sets.json").read_text())
    files = {part: folder / f"{shared}.{part}.h5ad" for part in ("real", "training")}
    where = request["phase"]
    genes = GeneSpace.from_json(json.dumps(description["genes"]), where)
    settings = read_settings([description["settings"]], genes, description["technical_batches"], None, where)
    corpus = open_perturbed_corpus(open_corpus(description["corpus"]), settings)
    decoder = ValueDecoder(
        settings.tokenizer, settings.transform, description["space"], settings.value_kind == "counts"
    )
    with np.load(folder / f"{shared}.rows.npz", allow_pickle=False) as rows:
        for part, path in files.items():
            if not path.exists():
                _write(path, corpus, rows[part], decoder, part, request)
    known = folder / f"{shared}.baselines"
    found = score(
        folder / request["own_file"],
        files["real"],
        request["preset"],
        folder / request["output"],
        train=[files["training"]],
        reuse=folder / known.read_text().strip() if known.exists() else None,
        control_label=corpus.control_label,
    )
    if not known.exists():
        replace_text(known, request["output"] + "\n")
    notes = json.loads((folder / request["output"] / JSON_FILE).read_text())["notes"]
    return Results([Row(**row) for row in found], notes)


def _write(
    path: Path,
    corpus: PerturbedCorpus,
    rows: NDArray[np.int64],
    decoder: ValueDecoder,
    part: str,
    request: dict[str, Any],
) -> None:
    """Write cells and their controls: those of the cell types that are scored, or, of training cells, all."""
    types = set(corpus.labels.cell_type[rows].tolist()) if part == "real" else None
    about = {"part": part, "phase": request["phase"]}
    write_corpus_cells(
        path,
        corpus,
        rows,
        decoder,
        about,
        control_types=types,
        has_context=request["has_context"],
        overwrite=True,
    )
