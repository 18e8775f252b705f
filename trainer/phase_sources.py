"""Where a phase's cells come from and which obs columns label them, as far as its configuration says."""

import glob
from collections.abc import Sequence
from pathlib import Path

from data.census import CensusQuery
from data.corpus import hash_file, open_corpus
from data.errors import DataError
from data.exported import CELL_LOADERS
from trainer.config.schema import PhaseConfig

_H5AD, _CENSUS = "h5ad_loader", "census_loader"


def data_places(phase: PhaseConfig) -> tuple[str, ...]:
    """Return the files, patterns, folders or URLs that a phase reads; empty where its loader names none."""
    arguments = phase.dataloader_args
    given = arguments.get("paths", arguments.get("path"))
    return (
        tuple(map(str, given)) if isinstance(given, list | tuple) else () if given is None else (str(given),)
    )


def data_in_words(phase: PhaseConfig) -> str:
    """Name what a phase reads; folders above a file say where a machine keeps it, and nothing about it."""
    if _loader(phase) == _CENSUS:
        query = CensusQuery.read(phase.dataloader_args.get("census"))
        release = f"CELLxGENE Census {query.census_version}" if query.uri is None else last_part(query.uri)
        return ", ".join(part for part in (release, query.organism, query.obs_filter) if part)
    return ", ".join(map(last_part, data_places(phase)))


def label_columns(phase: PhaseConfig) -> dict[str, str]:
    """Return the obs columns that a phase learns as labels: the name in its corpus, and in the user's file."""
    if not _loader(phase):
        return {}
    given = phase.dataloader_args.get("label") or ()
    named = [given] if isinstance(given, str) else list(given)
    kept = (str(request).partition("=") for request in phase.dataloader_args.get("obs", ()))
    stored = {name: column for name, _, column in kept if column}
    return {name: stored.get(name, name) for name in named}


def is_classification(phase: PhaseConfig) -> bool:
    """Tell whether labels are classes, not numbers."""
    return phase.dataloader_args.get("label_task", "classification") == "classification"


def labelled_in_training(
    phases: Sequence[PhaseConfig], classes: Sequence[str], column: str, values: Sequence[str], file: Path
) -> list[str]:
    """Say which phases learned the labels that a file's column holds, and whether from this very file.

    Args:
        phases: of the run that made the model.
        classes: the names that the model tells apart.
        column: obs column of the file.
        values: its distinct labels.
        file: the h5ad file; one that differs by a byte is another.
    """
    said = []
    for phase in phases:
        columns = label_columns(phase) if phase.epochs != 0 else {}
        is_named = column in columns or column in columns.values()
        if not columns or not (
            shares_classes(values, classes, is_named) if is_classification(phase) else is_named
        ):
            continue
        is_there = _reads_file(phase, file)
        where = {
            True: "of this very file",
            False: f"of {data_in_words(phase)}, which is not this file (a copy that was changed would not be noticed)",
            None: f"of {data_in_words(phase)}; whether that is this file cannot be told, since it is no more there",
        }[is_there]
        said.append(
            f"these labels were in the training of phase {phase.name}: it learned obs column "
            f"{', '.join(map(repr, columns))} {where}"
        )
    return said


def shares_classes(values: Sequence[str], classes: Sequence[str], is_named: bool) -> bool:
    """Tell whether labels are a model's classes; numbers mean something else in each column, so its name must agree."""
    shared = {value for value in values if is_named or not value.isdigit()} & set(classes)
    return len(shared) >= (1 if is_named else 2)


def last_part(path: str) -> str:
    """Return the last part of a path or URL, and of a checkpoint the run's folder too."""
    *above, name = path.rstrip("/").split("/")
    return f"{above[-1]}/{name}" if above and name.startswith("checkpoint_") else name


def _loader(phase: PhaseConfig) -> str:
    """Return the name of our loader of cells that a phase reads; empty for any other."""
    path = phase.dataloader_factory.replace(":", ".")
    return path.rpartition(".")[2] if path in CELL_LOADERS else ""


def _reads_file(phase: PhaseConfig, file: Path) -> bool | None:
    """Tell whether a phase reads a file, by its bytes; None where that is not known any more."""
    if _loader(phase) == _CENSUS:
        return False
    sources: list[tuple[int, str | Path]] = []
    is_whole = True
    for place in data_places(phase):
        found = [place] if Path(place).exists() else glob.glob(place, recursive=True)
        try:
            if _loader(phase) == _H5AD:
                sources += [(Path(path).stat().st_size, Path(path)) for path in found]
            else:
                records = [source for path in found for source in open_corpus(path).manifest.sources]
                sources += [(record.bytes, record.sha256) for record in records]
        except (DataError, OSError):
            found = []
        is_whole &= bool(found)
    size = file.stat().st_size
    alike = [source for bytes_, source in sources if bytes_ == size]
    own = hash_file(file) if alike else ""
    if any(own == (source if isinstance(source, str) else hash_file(source)) for source in alike):
        return True
    return False if is_whole else None
