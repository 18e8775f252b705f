"""Made-up perturbation data with known effects that generalise, for tests and for measuring models against the truth.

Genes belong to pathways. In every cell each pathway has an activity of its own, which moves its member genes, so the
members of one pathway are correlated in control cells. A perturbation knocks one member down: its own expression
falls, and its pathway's activity falls by the strength of the target. With the activity fall the members, and the
pathway's distal genes rise or fall, which do not follow the activity in control cells. So

- the effects of targets of one pathway share a direction and differ in strength;
- a target that was never perturbed has the effect of its pathway, and its pathway can be told from which genes it is
  correlated with in control cells;
- the mean response over all perturbations mixes pathways, and predicts each of them badly.

Cell types shift the baseline of genes and scale how strongly each pathway responds; technical batches shift the
baseline. Counts are negative binomial (Poisson without dispersion) around these rates.

In symbols: a cell of type c and technical batch b with target t of pathway p, activities z and library size L has

    log rate_g = base_g + type_cg + batch_bg + sum_q loading_qg * z_q + effect_tcg
    effect_tcg = -strength_t * scale_cp * (loading_pg + distal_pg) - knockdown * [g = t]
    count_g ~ NegativeBinomial(mean = L * rate_g / sum of rates, variance = mean + dispersion * mean**2)
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from data.errors import DataError

CONTROL = "non-targeting"
_CELLS_AT_ONCE = 4096
_AT_LEAST_ONE = (
    "num_genes", "num_pathways", "members_per_pathway", "targets_per_pathway", "num_cell_types", "num_batches",
)  # fmt: skip
_NOT_NEGATIVE = (
    "distal_per_pathway", "cells_per_target", "control_cells", "depth", "dispersion", "activity", "context_effect",
    "seed",
)  # fmt: skip


@dataclass(frozen=True)
class SimulatorOptions:
    """Hold the sizes and strengths of a simulation."""

    num_genes: int = 200
    num_pathways: int = 6
    members_per_pathway: int = 12
    distal_per_pathway: int = 12
    """Genes that respond to a perturbation of the pathway without following its activity in control cells."""
    targets_per_pathway: int = 6
    """Members that are perturbed, in every cell type."""
    num_cell_types: int = 3
    num_batches: int = 4
    """Technical batches, all with cells of all types."""
    cells_per_target: int = 40
    """Cells of one target in one cell type, divided over the technical batches."""
    control_cells: int = 200
    """Control cells of one cell type, divided over the technical batches."""
    depth: float = 2000.0
    """Mean counts of a cell."""
    dispersion: float = 0.1
    """Variance of a count beyond Poisson's, in units of the squared mean; 0 is Poisson."""
    activity: float = 0.7
    """Standard deviation of a pathway's activity between cells."""
    strength: float = 1.5
    """Mean fall of a pathway's activity when a member is knocked down."""
    knockdown: float = 2.0
    """Fall of the target's own log rate."""
    context_effect: float = 0.3
    """Standard deviation, over cell types, of the logarithm of how strongly a pathway responds."""
    seed: int = 0


@dataclass(frozen=True, eq=False)
class SimulatedPerturbations:
    """Hold the truth of a simulation and the cells that were drawn from it."""

    options: SimulatorOptions
    genes: list[str]
    cell_types: list[str]
    batches: list[str]
    targets: list[str]
    pathway: NDArray[np.int64]  # [genes], of the members; -1 for the others
    target_pathway: NDArray[np.int64]  # [targets]
    effects: NDArray[np.float64]  # [cell types, targets, genes], change of the log rate
    baseline: NDArray[np.float64]  # [cell types, batches, genes], log rate of a control cell of no activity
    counts: csr_matrix  # [cells, genes], int32
    target_of: NDArray[np.int64]  # [cells], -1 in control cells
    cell_type_of: NDArray[np.int64]  # [cells]
    batch_of: NDArray[np.int64]  # [cells]

    def to_anndata(self) -> anndata.AnnData:
        """Return the cells with obs target_gene, cell_type and batch, and the truth beside them.

        `var["pathway"]` names each member's pathway (-1: none); `varm["effect_TYPE"]` [genes, targets] holds the
        effects in that cell type; `uns["simulator"]` the options, the targets and their pathways.
        """
        names = np.array([*self.targets, CONTROL])
        obs = {
            "target_gene": names[self.target_of],
            "cell_type": np.array(self.cell_types)[self.cell_type_of],
            "batch": np.array(self.batches)[self.batch_of],
        }
        return anndata.AnnData(
            self.counts.astype(np.float32),
            obs=pd.DataFrame(
                {name: pd.Categorical(values) for name, values in obs.items()},
                index=pd.Index([f"cell_{index}" for index in range(len(self.target_of))]),
            ),
            var=pd.DataFrame({"pathway": self.pathway}, index=pd.Index(self.genes)),
            varm={
                f"effect_{name}": self.effects[index].T.copy() for index, name in enumerate(self.cell_types)
            },
            uns={
                "simulator": {
                    "options": dict(vars(self.options)),
                    "targets": np.array(self.targets),
                    "target_pathway": self.target_pathway,
                }
            },
        )


def simulate_perturbations(options: SimulatorOptions | None = None, **changes: Any) -> SimulatedPerturbations:
    """Draw a truth and cells; `changes` are options by name, the same ones always give the same data."""
    options = SimulatorOptions(**{**vars(options or SimulatorOptions()), **changes})
    _check(options)
    rng = np.random.default_rng(options.seed)
    num_genes, num_pathways = options.num_genes, options.num_pathways
    pathway, loading, distal = _pathways(rng, options)
    target_genes = np.concatenate(
        [np.flatnonzero(pathway == p)[: options.targets_per_pathway] for p in range(num_pathways)]
    )
    target_pathway = pathway[target_genes]
    strength = options.strength * rng.uniform(0.7, 1.3, len(target_genes))
    scale = np.exp(rng.normal(0, options.context_effect, (options.num_cell_types, num_pathways)))
    response = (loading + distal)[target_pathway]  # [targets, genes]
    effects = -(strength * scale[:, target_pathway])[:, :, None] * response
    effects[:, np.arange(len(target_genes)), target_genes] -= options.knockdown
    base = rng.normal(0, 1, num_genes)
    # Targets are expressed well enough that their own fall and their correlations can be seen.
    base[pathway >= 0] = rng.normal(1, 0.3, int((pathway >= 0).sum()))
    types = rng.normal(0, 0.5, (options.num_cell_types, 1, num_genes))
    batches = rng.normal(0, 0.2, (1, options.num_batches, num_genes))
    baseline = base + types + batches
    labels = _design(options, len(target_genes))
    counts = _draw_counts(rng, options, baseline, effects, loading, labels)
    genes = [f"GENE{index}" for index in range(num_genes)]
    return SimulatedPerturbations(
        options=options,
        genes=genes,
        cell_types=[f"type_{index}" for index in range(options.num_cell_types)],
        batches=[f"batch_{index}" for index in range(options.num_batches)],
        targets=[genes[index] for index in target_genes],
        pathway=pathway,
        target_pathway=target_pathway,
        effects=effects,
        baseline=baseline,
        counts=counts,
        target_of=labels[0],
        cell_type_of=labels[1],
        batch_of=labels[2],
    )


def write_simulated_h5ad(path: str | Path, **options: Any) -> SimulatedPerturbations:
    """Simulate and write the cells with the truth as an h5ad file; `options` are those of `SimulatorOptions`."""
    simulated = simulate_perturbations(**options)
    simulated.to_anndata().write_h5ad(path)
    return simulated


def _check(options: SimulatorOptions) -> None:
    for names, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for name in names:
            value = getattr(options, name)
            if not value >= least:
                raise DataError(f"{name} is {value}; it must be at least {least}")
    needed = options.num_pathways * options.members_per_pathway
    if needed > options.num_genes:
        raise DataError(
            f"num_genes {options.num_genes} is less than {options.num_pathways} pathways of "
            f"{options.members_per_pathway} members = {needed}"
        )
    if options.targets_per_pathway > options.members_per_pathway:
        raise DataError(
            f"targets_per_pathway {options.targets_per_pathway} is above members_per_pathway "
            f"{options.members_per_pathway}; targets are members"
        )
    if options.distal_per_pathway > options.num_genes - options.members_per_pathway:
        raise DataError(
            f"distal_per_pathway {options.distal_per_pathway} is more than the genes beside a pathway's own members"
        )


def _pathways(
    rng: np.random.Generator, options: SimulatorOptions
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return each gene's pathway, and the loadings and distal responses [pathways, genes]."""
    members = rng.permutation(options.num_genes)[: options.num_pathways * options.members_per_pathway]
    members = members.reshape(options.num_pathways, -1)
    pathway = np.full(options.num_genes, -1, np.int64)
    loading = np.zeros((options.num_pathways, options.num_genes))
    distal = np.zeros_like(loading)
    for index, mine in enumerate(members):
        pathway[mine] = index
        loading[index, mine] = rng.uniform(0.5, 1.0, len(mine))
        others = rng.permutation(np.setdiff1d(np.arange(options.num_genes), mine))
        others = others[: options.distal_per_pathway]
        distal[index, others] = rng.choice([-1, 1], len(others)) * rng.uniform(0.4, 0.8, len(others))
    return pathway, loading, distal


def _design(
    options: SimulatorOptions, num_targets: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return target (-1: control), cell type and technical batch of every cell, batches taking turns."""
    per_type = np.concatenate(
        [
            np.full(options.control_cells, -1),
            np.repeat(np.arange(num_targets), options.cells_per_target),
        ]
    )
    turns = np.concatenate(
        [
            np.arange(options.control_cells),
            np.tile(np.arange(options.cells_per_target), num_targets),
        ]
    )
    target = np.tile(per_type, options.num_cell_types)
    batch = np.tile(turns % options.num_batches, options.num_cell_types)
    return target, np.repeat(np.arange(options.num_cell_types), len(per_type)), batch


def _draw_counts(
    rng: np.random.Generator,
    options: SimulatorOptions,
    baseline: NDArray[np.float64],
    effects: NDArray[np.float64],
    loading: NDArray[np.float64],
    labels: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
) -> csr_matrix:
    parts = []
    for start in range(0, len(labels[0]), _CELLS_AT_ONCE):
        target, cell_type, batch = (each[start : start + _CELLS_AT_ONCE] for each in labels)
        log_rate = baseline[cell_type, batch]
        log_rate += rng.normal(0, options.activity, (len(target), options.num_pathways)) @ loading
        is_perturbed = target >= 0
        log_rate[is_perturbed] += effects[cell_type[is_perturbed], target[is_perturbed]]
        rate = np.exp(log_rate)
        mean = rate * (
            options.depth * rng.lognormal(-0.045, 0.3, (len(target), 1)) / rate.sum(1, keepdims=True)
        )
        if options.dispersion > 0:
            mean *= rng.gamma(1 / options.dispersion, options.dispersion, mean.shape)
        parts.append(rng.poisson(mean))
    return csr_matrix(np.concatenate(parts).astype(np.int32))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a simulated file: `python -m data.simulator FILE.h5ad [--OPTION VALUE ...]`."""
    parser = argparse.ArgumentParser(prog="python -m data.simulator", description="Simulate perturbed cells.")
    parser.add_argument("output", metavar="FILE.h5ad")
    for field in fields(SimulatorOptions):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, dest=field.name, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    try:
        simulated = write_simulated_h5ad(output, **options)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{output}: {len(simulated.target_of):,} cells, {len(simulated.genes)} genes, {len(simulated.targets)} targets"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
