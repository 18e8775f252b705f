"""How a phase of a run made its sets of perturbed cells, as its checkpoints and exports say it."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.errors import DataError
from data.genes import GeneSpace
from data.perturbation import PerturbationSource, perturbation_loader
from data.perturbation_targets import read_names
from data.tokenizers import ExpressionTransform
from data.value_tokenizers import ValueTokenizer

FORMAT = 1
SETTINGS_FILE = "perturbation_sets.json"
LOADER = "data.perturbation.perturbation_loader"
_HELD_OUT = (
    "held_out_genes", "held_out_contexts", "held_out_combinations", "split_file", "split_dataset", "split_part",
)  # fmt: skip
_OF_SETS = (
    "set_size", "unmeasured", "control_label", "pairs", "pair_separator", "unknown_targets", "mix_technical_batches",
    "pooling", "control_match", "min_controls",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class PerturbationSettings:
    """Hold what turns controls into a model's conditions, and its tokens into expression again."""

    phase: str
    arguments: Mapping[str, Any]
    """Of `data.perturbation.perturbation_loader`, defaults among them: those that say how a set is made."""
    held_out: Mapping[str, Any] | None
    """Those that say what was held out; None where they name files that an export does not have."""
    value_kind: Literal["counts", "lognorm"]
    tokenizer: ValueTokenizer
    control_tokenizer: ValueTokenizer
    transform: ExpressionTransform
    genes: GeneSpace
    target_names: tuple[str, ...] | None
    """What a target's index counts; None: the genes."""
    num_target_indices: int
    """1: `target_gene_idx` [B]; 2: [B, 2], as a corpus with pairs of targets has it."""
    technical_batches: Mapping[str, int]
    """The run's index of each technical batch."""

    @property
    def set_size(self) -> int:
        """Return the cells, and the controls, of a set."""
        return self.arguments["set_size"]

    @property
    def target_space(self) -> GeneSpace:
        """Return the genes that a target's index counts."""
        names = self.target_names
        return self.genes if names is None else GeneSpace(names, names, "symbol")


def settings_of_source(
    source: PerturbationSource, arguments: Mapping[str, Any], phase: str, technical_batches: Mapping[str, int]
) -> PerturbationSettings:
    """Return the settings of a source that is open, which a phase's `dataloader_args` made."""
    facts = source.facts()
    entry = settings_entry(phase, arguments, facts["value_kind"], facts["tokenizer_options"])
    return _read(entry, facts["gene_space"], technical_batches, phase)


def settings_entry(
    phase: str, arguments: Mapping[str, Any], value_kind: str, tokenizer_options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a phase's entry of `settings_record`; relative paths in it are as the run's configuration has them."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(perturbation_loader).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    given = {**defaults, **arguments}
    return {
        "phase": phase,
        "value_kind": value_kind,
        "sets": {name: given[name] for name in _OF_SETS},
        "held_out": {name: _plain(given[name]) for name in _HELD_OUT},
        "tokenizer_options": dict(tokenizer_options),
    }


def settings_record(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what `perturbation_sets.json` of an export holds; None where no phase read sets of perturbed cells."""
    if not entries:
        return None
    return {"format": FORMAT, "phases": [{**each, "held_out": _without_files(each)} for each in entries]}


def read_settings(
    entries: Sequence[Mapping[str, Any]],
    genes: GeneSpace,
    technical_batches: Mapping[str, int],
    phase: str | None,
    where: str,
) -> PerturbationSettings:
    """Read the settings of a phase.

    Raises:
        DataError: there is no such phase, several and none was named, or they are no settings.
    """
    names = [each["phase"] for each in entries]
    if phase is None and len(names) > 1:
        raise DataError(
            f"{where}: several phases read sets of perturbed cells; name one with --phase: {', '.join(names)}"
        )
    if phase is not None and phase not in names:
        raise DataError(
            f"{where}: no phase {phase!r} read sets of perturbed cells; there are: {', '.join(names)}"
        )
    return _read(entries[0 if phase is None else names.index(phase)], genes, technical_batches, where)


def load_entries(folder: str | Path) -> list[dict[str, Any]]:
    """Return the entries of an exported folder's phases.

    Raises:
        DataError: it has none, or they are damaged.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise DataError(
            f"{folder}: no {SETTINGS_FILE} in it, which python -m trainer export writes for models that were trained "
            f"on sets of perturbed cells ({LOADER})"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(f"{path}: format {content['format']!r} is not {FORMAT}, the only one known here")
        entries = list(content["phases"])
        if not entries or not all(isinstance(each["phase"], str) for each in entries):
            raise ValueError("it names no phase")
        return entries
    except DataError:
        raise
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not readable ({error!r}); export the model again") from error


def _read(
    entry: Mapping[str, Any], genes: GeneSpace, technical_batches: Mapping[str, int], where: str
) -> PerturbationSettings:
    try:
        options = entry["tokenizer_options"]
        names = options["targets"]
        return PerturbationSettings(
            phase=entry["phase"],
            arguments=dict(entry["sets"]),
            held_out=entry["held_out"],
            value_kind=entry["value_kind"],
            tokenizer=ValueTokenizer.from_dict(options["tokenizer"], where),
            control_tokenizer=ValueTokenizer.from_dict(options["control_tokenizer"], where),
            transform=ExpressionTransform(options["target_sum"], options["log1p"]),
            genes=genes,
            target_names=None if names is None else tuple(names),
            num_target_indices=int(options.get("num_target_indices", 1)),
            technical_batches=dict(technical_batches),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where}: not the settings of sets of perturbed cells ({error!r})") from error


def _plain(value: Any) -> Any:
    """Return lists and tables as JSON has them."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _without_files(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what was held out by names alone; None where a file that stays behind says it."""
    held_out = dict(entry["held_out"])
    if isinstance(held_out["held_out_genes"], str):
        try:
            held_out["held_out_genes"] = read_names(held_out["held_out_genes"], "held_out_genes")
        except DataError:
            return None
    return None if held_out["split_file"] is not None else held_out
