"""What the data of circuits means by its tokens and prompt indices, in a run, in its checkpoints and for its model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from trainer.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class CircuitFacts:
    """Hold what every phase of circuits shares; a constructor of a model may name each field."""

    gate_pool: tuple[str, ...]
    """Gates that tokens stand for, in order."""
    prompts: tuple[str, ...]
    """Prompts by their index in batches, sorted, over all phases."""
    has_unitary: bool
    """Whether the circuits of every phase come with their unitaries."""

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a model that follow, as a config file holds them."""
        return {
            "gate_pool": list(self.gate_pool),
            "prompts": list(self.prompts),
            "has_unitary": self.has_unitary,
        }

    def describe(self, num_qubits: int) -> str:
        """Say in a line what the circuits are."""
        return (
            f"circuits of up to {num_qubits} qubits over {len(self.gate_pool)} gates, {len(self.prompts):,} prompts, "
            f"{'with' if self.has_unitary else 'without'} unitaries"
        )


CIRCUIT_ARGUMENTS = tuple(each.name for each in fields(CircuitFacts))


def common_circuits(phases: Mapping[str, Sequence[Any]]) -> CircuitFacts | None:
    """Return what the phases share, and let each count the run's prompts; None where none has circuits.

    Args:
        phases: By name of a phase its `trainer.phase_data.Cells`, the training part first.

    Raises:
        ConfigError: two phases have different gate pools.
    """
    pool, owner, prompts, has_unitary = None, "", set(), True
    for name, parts in phases.items():
        facts = parts[0].facts()
        found = facts.get("gate_pool")
        if found is None:
            continue
        if pool is not None and found != pool:
            raise ConfigError(
                f"datasets '{owner}' and '{name}' have different gate pools ({', '.join(pool)} and "
                f"{', '.join(found)}), so one token would mean two gates; give them data with the same gates in the "
                "same order"
            )
        pool, owner = found, name
        for cells in parts:
            prompts.update(cells.facts()["prompts"])
        has_unitary = has_unitary and bool(facts["has_unitary"])
    if pool is None:
        return None
    merged = tuple(sorted(prompts))
    for parts in phases.values():
        for cells in parts:
            if hasattr(cells.rows, "set_prompts"):
                cells.rows.set_prompts(merged)
    return CircuitFacts(tuple(pool), merged, has_unitary)


def saved_circuits(tokenizer_options: Mapping[str, Mapping[str, Any]]) -> CircuitFacts | None:
    """Return what a checkpoint keeps of circuits, by phase, among the options of tokenizers; None without circuits."""
    kept = [options for options in tokenizer_options.values() if "gate_pool" in options]
    if not kept:
        return None
    return CircuitFacts(
        gate_pool=tuple(kept[0]["gate_pool"]),
        prompts=tuple(kept[0]["prompts"]),  # the run's, the same in every phase
        has_unitary=all(options["has_unitary"] for options in kept),
    )


def check_same_circuits(then: CircuitFacts | None, now: CircuitFacts | None, where: str) -> None:
    """Compare the gates and prompts of a checkpoint with the data's: an index is to mean the same.

    Raises:
        CheckpointError: it would not.
    """
    if then is None:
        return
    for name, noun in (("gate_pool", "gates"), ("prompts", "prompts")):
        theirs, ours = getattr(then, name), getattr(now, name, ())
        if theirs != ours:
            different = sorted(set(theirs) ^ set(ours))
            raise CheckpointError(
                f"{where}: it has {len(theirs)} {noun}, the data {len(ours)}, not in both: "
                f"{', '.join(different[:6]) or 'none, but in another order'}; an index would mean another one"
            )
