"""Which perturbed cells are held out: genes, contexts, their combinations, and cell-load's TOML split files."""

import fnmatch
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.corpus import CorpusInfo
from data.errors import DataError, listed
from data.perturbation_targets import PerturbationTargets, check_known, counted, read_names

SplitPart = Literal["val", "test"]
_PARTS = ("train", "val", "test")
_SECTIONS = ("datasets", "training", "zeroshot", "fewshot")
_COMBINATION_KEYS = ("target_gene", "cell_type", "technical_batch")


class Part(IntEnum):
    """Say what cells are for."""

    TRAINING = 0
    VALIDATION = 1
    NEITHER = 2


@dataclass(frozen=True, eq=False)
class CellGroups:
    """Hold the groups of perturbed cells that share perturbation, cell type, technical batch and source file."""

    perturbation: NDArray[np.int64]  # [G] each
    cell_type: NDArray[np.int64]
    technical_batch: NDArray[np.int64]
    source: NDArray[np.int64]
    cell_types: list[str]
    technical_batches: list[str]

    def __len__(self) -> int:
        """Count the groups."""
        return len(self.perturbation)

    def chosen(
        self, choice: Mapping[str, Any], targets: PerturbationTargets, where: str
    ) -> NDArray[np.bool_]:
        """Mark the groups that a combination names: each key restricts, its value is a name or a list of names."""
        if not isinstance(choice, Mapping) or not choice or not set(choice) <= set(_COMBINATION_KEYS):
            raise DataError(
                f"{where}: got {choice!r}; it must be a table with some of the keys {', '.join(_COMBINATION_KEYS)}"
            )
        chosen, why = np.ones(len(self), np.bool_), ""
        for key, value in choice.items():
            names = read_names([value] if isinstance(value, str) else value, f"{where}.{key}")
            if key == "target_gene":
                classes = targets.classes(names, f"{where}.{key}")
                chosen &= np.isin(self.perturbation, classes)
                why = targets.why_left_out(classes)
                continue
            is_type = key == "cell_type"
            known = self.cell_types if is_type else self.technical_batches
            for name in names:
                check_known(name, known, f"{where}.{key}", key.replace("_", " "))
            codes = [known.index(name) for name in names]
            chosen &= np.isin(self.cell_type if is_type else self.technical_batch, codes)
        if not chosen.any():
            raise DataError(f"{where}: no perturbed cell is of {dict(choice)!r}{why}")
        return chosen


def split_groups(
    groups: CellGroups,
    targets: PerturbationTargets,
    info: CorpusInfo,
    *,
    held_out_genes: Sequence[str] | str,
    held_out_contexts: Sequence[str | Mapping[str, Any]],
    held_out_combinations: Sequence[Mapping[str, Any]],
    split_file: str | None,
    split_dataset: str | None,
    split_part: SplitPart,
) -> tuple[NDArray[np.int8], list[str]]:
    """Return the `Part` of each group, and notices; the arguments are those of `perturbation_loader`."""
    has_lists = bool(held_out_genes or held_out_contexts or held_out_combinations)
    if split_file is not None:
        if has_lists:
            raise DataError(
                "split_file says what is held out; leave held_out_* away, or write them into the file"
            )
        return _split_by_file(groups, targets, info, split_file, split_dataset, split_part)
    if split_dataset is not None:
        raise DataError("split_dataset: it names a data set of split_file, which is not given")
    held_out = np.zeros(len(groups), np.bool_)
    names = read_names(held_out_genes, "held_out_genes")
    if names:
        held_out |= groups.chosen({"target_gene": names}, targets, "held_out_genes")
    for number, context in enumerate(_as_list(held_out_contexts, "held_out_contexts")):
        choice = {"cell_type": context} if isinstance(context, str) else context
        where = f"held_out_contexts.{number}"
        if isinstance(choice, Mapping) and "target_gene" in choice:
            raise DataError(f"{where}: a context has no target_gene; use held_out_combinations")
        held_out |= groups.chosen(choice, targets, where)
    for number, choice in enumerate(_as_list(held_out_combinations, "held_out_combinations")):
        held_out |= groups.chosen(choice, targets, f"held_out_combinations.{number}")
    return held_out.astype(np.int8), []


def _as_list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise DataError(f"{where}: got {value!r}; it must be a list")
    return list(value)


def _split_by_file(
    groups: CellGroups,
    targets: PerturbationTargets,
    info: CorpusInfo,
    split_file: str,
    split_dataset: str | None,
    split_part: SplitPart,
) -> tuple[NDArray[np.int8], list[str]]:
    """Read a split as cell-load does: `zeroshot` goes before `fewshot`, and that before `training`.

    Cells of `val` and `test` are both kept from training; `split_part` says which of the two validates.
    """
    if split_part not in _PARTS[1:]:
        raise DataError(f"split_part is {split_part!r}; it must be val | test")
    content = _read_split(Path(split_file))
    names = _dataset_of_sources(content["datasets"], info, split_file, split_dataset)
    part = np.full(len(groups), Part.NEITHER, np.int8)
    for source, dataset in enumerate(names):
        if content["training"].get(dataset) == "train":
            part[groups.source == source] = Part.TRAINING
    notices, has_part = [], False
    missing: set[str] = set()
    for mine, lists in _contexts_of_section(content, "fewshot", groups, names, split_file):
        part[mine] = Part.TRAINING
        for name in ("val", "test"):
            codes = [targets.names.index(gene) for gene in lists.get(name, []) if gene in targets.names]
            missing |= set(lists.get(name, [])) - set(targets.names)
            here = mine & np.isin(groups.perturbation, codes)
            # The two may overlap: what validates is validated on, whichever is read last.
            is_validated = part[here] == Part.VALIDATION
            part[here] = np.where(is_validated, Part.VALIDATION, _part(name, split_part))
            has_part |= name == split_part and bool(codes)
    for mine, name in _contexts_of_section(content, "zeroshot", groups, names, split_file):
        part[mine] = _part(name, split_part)
        has_part |= name == split_part
    if missing:
        notices.append(
            f"{split_file}: {counted(len(missing), 'perturbation')} not in the corpus: {listed(sorted(missing), 6)}"
        )
    if not has_part and any(content[section] for section in ("zeroshot", "fewshot")):
        raise DataError(
            f"{split_file}: nothing of this corpus is in {split_part}; set split_part to the other one of val, test"
        )
    left_out = int((part == Part.NEITHER).sum())
    if left_out:
        notices.append(
            f"{split_file}: {counted(left_out, 'group')} of cells in neither part, which take no part"
        )
    return part, notices


def _contexts_of_section(
    content: Mapping[str, dict[str, Any]],
    section: str,
    groups: CellGroups,
    names: Sequence[str],
    split_file: str,
) -> Iterator[tuple[NDArray[np.bool_], Any]]:
    """Yield the groups that each entry of a section is about, and what it says; `names` are the sources' data sets."""
    for key, entry in content[section].items():
        dataset, _, cell_type = key.partition(".")
        sources = [source for source, name in enumerate(names) if name == dataset]
        if sources:
            check_known(cell_type, groups.cell_types, f'{split_file}: [{section}] "{key}"', "cell type")
            is_of_type = groups.cell_type == groups.cell_types.index(cell_type)
            yield np.isin(groups.source, sources) & is_of_type, entry


def _part(name: str, split_part: str) -> Part:
    return Part.TRAINING if name == "train" else Part.VALIDATION if name == split_part else Part.NEITHER


def _read_split(path: Path) -> dict[str, dict[str, Any]]:
    """Read the file and check its shape."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"split_file {path}: cannot be read ({error.strerror or error})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"split_file {path}: not a TOML file ({error})") from error
    unknown = [name for name in content if name not in _SECTIONS]
    if unknown or not isinstance(content.get("datasets"), dict) or not content["datasets"]:
        raise DataError(
            f"split_file {path}: " + (f"unknown section {listed(unknown, 6)}" if unknown else "no [datasets]")
            + f"; a split file has the sections {', '.join(_SECTIONS)}"
        )  # fmt: skip
    result = {name: content.get(name, {}) for name in _SECTIONS}
    for section, table in result.items():
        if not isinstance(table, dict):
            raise DataError(f"split_file {path}: {section} is {table!r}; it must be a section, [{section}]")
    for dataset, place in result["datasets"].items():
        if not isinstance(place, str):
            raise DataError(f'split_file {path}: [datasets] "{dataset}": got {place!r}; it must be a path')
    for section in _SECTIONS[1:]:
        for key, value in result[section].items():
            where = f'split_file {path}: [{section}] "{key}"'
            dataset = key.partition(".")[0]
            if section != "training" and "." not in key:
                raise DataError(f'{where}: the key must be "data set.cell type", in quotes')
            check_known(dataset, result["datasets"], where, "data set")
            if section == "fewshot":
                is_valid = isinstance(value, dict) and set(value) <= set(_PARTS)
                is_valid = is_valid and all(
                    isinstance(names, list) and all(isinstance(name, str) for name in names)
                    for names in value.values()
                )
            else:
                is_valid = value in (_PARTS if section == "zeroshot" else ("train",))
            if not is_valid:
                raise DataError(f"{where}: got {value!r}; it must be " + _allowed(section))
    return result


def _allowed(section: str) -> str:
    return {"training": '"train"', "zeroshot": '"train", "val" or "test"'}.get(
        section, "a table of the lists val and test"
    )


def _dataset_of_sources(
    datasets: Mapping[str, str], info: CorpusInfo, split_file: str, split_dataset: str | None
) -> list[str]:
    """Return which data set of the split file each source file of the corpus belongs to."""
    sources = [source.path_name for source in info.manifest.sources]
    if split_dataset is not None:
        check_known(split_dataset, datasets, "split_dataset", f"data set of {split_file}")
        return [split_dataset] * len(sources)
    if len(datasets) == 1:
        return list(datasets) * len(sources)
    found = []
    for file in sources:
        owners = [name for name, path in datasets.items() if _holds(path, file)]
        if len(owners) != 1:
            raise DataError(
                f"{split_file}: [datasets] names {len(owners)} data sets with the file {file!r} of the corpus; set "
                f"split_dataset to the one that the corpus holds: {' | '.join(datasets)}"
            )
        found += owners
    return found


def _holds(path: str, file: str) -> bool:
    """Tell whether a data set's path (a file, a folder, or a pattern with * ? [] or {a,b}) holds a file."""
    brace = re.search(r"\{([^{}]+)\}", path)
    if brace:
        options = brace[1].split(",")
        return any(
            _holds(path[: brace.start()] + each.strip() + path[brace.end() :], file) for each in options
        )
    if path.endswith((".h5", ".h5ad")):
        return fnmatch.fnmatchcase(file, Path(path).name)
    return (Path(path) / file).is_file()
