"""What each perturbation of a corpus targets: genes by index, pairs of them, and targets that have no index."""

import csv
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data.corpus import CorpusInfo
from data.errors import DataError, listed
from data.genes import GeneSpace, read_gene_list
from data.manifest import UNLABELLED

Pairs = Literal["error", "skip", "index"]
UnknownTargets = Literal["error", "skip", "index"]
UNKNOWN_TARGET = -1
"""Index of a target that the target space lacks, and of the second target of a perturbation that has one."""
_EMPTY_PARTS = ("", "ctrl", "control")


@dataclass(frozen=True, eq=False)
class PerturbationTargets:
    """Hold the perturbations of a corpus, which are the classes of its column `target_gene`."""

    names: tuple[str, ...]
    """Of the perturbations, controls among them."""
    control: int
    """The class of the control cells."""
    genes: tuple[tuple[str, ...], ...]
    """The genes that each perturbation targets; none for the controls and for cells without a label."""
    indices: NDArray[np.int64]  # [perturbations, 1], or [perturbations, 2] with pairs
    is_used: NDArray[np.bool_]  # [perturbations], false for controls and for what is skipped
    target_names: tuple[str, ...]
    """Name of each index."""
    are_genes: bool
    """Whether an index is a column of the batches."""
    notices: tuple[str, ...]

    def classes(self, names: Iterable[str], where: str) -> NDArray[np.int64]:
        """Return the perturbations with one of these names, or one of these genes among their targets."""
        found = []
        known = {gene for genes in self.genes for gene in genes} | set(self.names)
        for name in names:
            check_known(name, known, where, "target gene")
            found += [
                index
                for index, (own, genes) in enumerate(zip(self.names, self.genes, strict=True))
                if name == own or name in genes
            ]
        if self.control in found:
            raise DataError(f"{where}: {self.names[self.control]!r} is the control label, not a target")
        return np.unique(np.asarray(found, np.int64))

    def why_left_out(self, classes: NDArray[np.int64]) -> str:
        """Say which of some perturbations are skipped, by which option, and what keeps them; empty where none is."""
        skipped = [index for index in classes.tolist() if not self.is_used[index] and self.genes[index]]
        is_pair = [len(self.genes[index]) > self.indices.shape[1] for index in skipped]
        pairs = [self.names[index] for index, pair in zip(skipped, is_pair, strict=True) if pair]
        unknown = [self.names[index] for index, pair in zip(skipped, is_pair, strict=True) if not pair]
        why = ""
        if unknown:
            what = "genes of the batches" if self.are_genes else "targets"
            why += (
                f"; cells of {listed(unknown, 6)} are there, but unknown_targets: skip leaves them out, since their "
                f"target is not among the {len(self.target_names)} {what}: targets: corpus keeps them"
            )
        if pairs:
            why += f"; pairs: skip leaves out {listed(pairs, 6)}: pairs: index keeps them"
        return why


def read_targets(
    info: CorpusInfo,
    *,
    columns: GeneSpace,
    targets: str | GeneSpace,
    control_label: str | None,
    pairs: Pairs,
    pair_separator: str,
    unknown_targets: UnknownTargets,
    may_be_none: bool = False,
) -> PerturbationTargets:
    """Resolve the classes of `target_gene`; the arguments are those of `perturbation_loader`.

    `targets` may be the genes themselves. With `may_be_none` a corpus of control cells alone is no error.
    """
    _check_options(pairs, unknown_targets, pair_separator)
    names = info.class_names("target_gene")
    label = _control_label(info, names, control_label)
    control = names.index(label)
    space = _target_space(targets, columns, info, pair_separator, label)
    genes = tuple(
        () if name in (label, UNLABELLED) else _parts(name, space, pair_separator, label, info.path)
        for name in names
    )
    num_targets = np.array([len(each) for each in genes])
    is_pair, notices, problems = num_targets == 2, [], []
    if UNLABELLED in names and label != UNLABELLED:
        notices.append("cells without a label in target_gene are left out")
    if pairs != "index":
        _refuse_or_note(
            pairs, np.asarray(names)[is_pair].tolist(), problems, notices,
            "of pairs of genes",
            "set pairs: index for target_gene_idx [B, 2], or pairs: skip to leave them out",
        )  # fmt: skip
    indices, is_unknown = _indices(genes, space, 2 if pairs == "index" and is_pair.any() else 1)
    is_used = num_targets > 0
    is_used &= ~is_pair | (pairs == "index")
    what = "genes of the batches" if targets == "genes" else "targets"
    _refuse_or_note(
        unknown_targets, np.asarray(names)[is_unknown & is_used].tolist(), problems, notices,
        f"with a target that is not among the {len(space)} {what}",
        "set unknown_targets: skip to leave them out or index to give such a target index -1, or let "
        "targets: corpus, or a file, say which targets there are",
    )  # fmt: skip
    if problems:
        raise DataError(f"{info.path}: {'; and '.join(problems)}")
    if unknown_targets == "skip":
        is_used &= ~is_unknown
    if not is_used.any() and not may_be_none:
        raise DataError(
            f"{info.path}: no perturbation is left; {'; '.join(notices) or 'all cells are controls'}"
        )
    return PerturbationTargets(
        names, control, genes, indices, is_used, names_of_genes(space), targets == "genes", tuple(notices)
    )


def _check_options(pairs: Pairs, unknown_targets: UnknownTargets, pair_separator: str) -> None:
    for name, value in (("pairs", pairs), ("unknown_targets", unknown_targets)):
        if value not in get_args(Pairs):
            raise DataError(f"{name} is {value!r}; it must be {' | '.join(get_args(Pairs))}")
    if not isinstance(pair_separator, str) or not pair_separator:
        raise DataError(
            f"pair_separator is {pair_separator!r}; it must be what stands between the genes of a pair"
        )


def target_indices(
    name: str, space: GeneSpace, *, pair_separator: str, control_label: str, where: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the genes that a perturbation of this name targets, and their indices; -1 where the space lacks one."""
    genes = _parts(name, space, pair_separator, control_label, where)
    return genes, tuple(_index(space, gene) for gene in genes)


def names_of_genes(space: GeneSpace) -> tuple[str, ...]:
    """Return each gene's symbol, or its id where it has none."""
    return tuple(symbol or gene for gene, symbol in zip(space.ids, space.symbols, strict=True))


def read_names(names: Sequence[str] | str, where: str) -> list[str]:
    """Return names given as a list, or as a file: .csv or .tsv with a column `target_gene`, else one name a line."""
    if not isinstance(names, str | Path):
        if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
            raise DataError(f"{where}: got {names!r}; it must be a list of names, or a file with them")
        return list(names)
    path = Path(names)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        if path.suffix not in (".csv", ".tsv"):
            return [line.strip() for line in lines if line.strip()]
        rows = list(csv.DictReader(lines, delimiter="," if path.suffix == ".csv" else "\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where}: {path} cannot be read ({error})") from error
    if not rows or "target_gene" not in rows[0]:
        raise DataError(f"{where}: {path} has no column target_gene, or no row")
    return [row["target_gene"] for row in rows if row["target_gene"]]


def check_known(name: str, known: Iterable[str], where: str, what: str) -> None:
    """Refuse a name that is not among the known ones, and say which are close to it."""
    known = list(known)
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=3)
    hint = f"close to it: {', '.join(near)}" if near else f"there are: {listed(known, 6)}"
    raise DataError(f"{where}: no {what} {name!r}; {hint}")


def counted(number: int, what: str) -> str:
    """Say how many there are of something."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _control_label(info: CorpusInfo, names: Sequence[str], given: str | None) -> str:
    """Return what the controls are called: the label that was given, or else the corpus's own."""
    label = given if given is not None else info.manifest.control_label
    if label is None:
        raise DataError(f"{info.path}: the corpus names no control label; set control_label")
    check_known(label, names, f"{info.path}: control_label", "class of target_gene")
    return label


def _indices(
    genes: Sequence[Sequence[str]], space: GeneSpace, width: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the indices [perturbations, width] of the targets, and whose targets the space lacks."""
    indices = np.full((len(genes), width), UNKNOWN_TARGET, np.int64)
    is_unknown = np.zeros(len(genes), np.bool_)
    for index, own in enumerate(genes):
        found = [_index(space, gene) for gene in own]
        is_unknown[index] = UNKNOWN_TARGET in found
        indices[index, : len(found)] = found[:width]
    return indices, is_unknown


def _target_space(
    targets: str | GeneSpace, columns: GeneSpace, info: CorpusInfo, separator: str, label: str
) -> GeneSpace:
    """Return the genes that a target's index counts."""
    if isinstance(targets, GeneSpace):
        return targets
    if targets == "genes":
        return columns
    if targets != "corpus":
        return read_gene_list(targets)
    names = info.class_names("target_gene")
    parts = {part for name in names if name not in (label, UNLABELLED) for part in name.split(separator)}
    kept = tuple(sorted(part for part in parts if part not in (*_EMPTY_PARTS, label)))
    if not kept:
        raise DataError(f"{info.path}: no perturbation is left; all cells are controls")
    return GeneSpace(kept, kept, "symbol")


def _parts(name: str, space: GeneSpace, separator: str, label: str, path: str) -> tuple[str, ...]:
    """Return the genes that a perturbation names; one that is a gene as it stands is never cut."""
    if separator not in name or _index(space, name) != UNKNOWN_TARGET:
        return (name,)
    parts = [part for part in name.split(separator) if part not in (*_EMPTY_PARTS, label)]
    if not 1 <= len(parts) <= 2:
        raise DataError(
            f"{path}: the perturbation {name!r} targets {len(parts)} genes; one or a pair can be read. Leave such "
            "cells out of the files, or set pair_separator to what stands between the genes of a pair"
        )
    return tuple(parts)


def _index(space: GeneSpace, gene: str) -> int:
    found = int(space.indices([gene])[0])
    return found if found >= 0 or space.key == "symbol" else int(space.indices([gene], by="symbol")[0])


def _refuse_or_note(
    choice: str, names: list[str], problems: list[str], notices: list[str], what: str, remedy: str
) -> None:
    if not names:
        return
    if choice == "error":
        problems.append(f"{counted(len(names), 'perturbation')} {what}: {listed(names, 6)}; {remedy}")
        return
    done = "left out" if choice == "skip" else "index -1"
    notices.append(f"{counted(len(names), 'perturbation')} {what} ({done}): {listed(names, 6)}")
