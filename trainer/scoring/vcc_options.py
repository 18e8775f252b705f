"""What a score of predicted cells is asked for: the challenge's year, the columns that name cells, and the seed."""

from dataclasses import dataclass
from typing import Literal

from trainer.errors import UserError

PERTURBATION_COLUMN = "target_gene"
"""The obs column of perturbations, in the challenge's files and in those of `python -m trainer predict`."""


@dataclass(frozen=True)
class Preset:
    """Hold what one year of the Virtual Cell Challenge scores, by which program."""

    name: str
    program: str
    """The program, as pip knows it."""
    module: str
    """Its package, as Python imports it."""
    kind: Literal["counts", "lognorm"]
    """The values that it scores."""
    metrics: tuple[str, ...]
    """The metrics that make the year's score, as the program names them."""
    num_genes: int
    """Genes of an upload."""
    cells_per_perturbation: int | None
    """Cells that an upload has of each perturbation; None leaves it open."""
    perturbations_per_context: int | None
    """Perturbations that an upload has in each context; None leaves it open."""
    uploads_controls: bool
    """Whether an upload has control cells."""
    max_cells: int | None
    """Cells of an upload."""
    max_stored_values: int | None
    """Values that the sparse matrix of an upload stores."""


VCC2025 = Preset(
    name="vcc2025",
    program="cell-eval",
    module="cell_eval",
    kind="lognorm",
    metrics=("mae", "discrimination_score_l1", "overlap_at_N"),
    num_genes=18_080,
    cells_per_perturbation=None,
    perturbations_per_context=None,
    uploads_controls=True,
    max_cells=200_000,
    max_stored_values=None,
)
"""cell-eval 0.8.2: `VCC_METRICS` in `_pipeline/_runner.py`; `EXPECTED_GENE_DIM`, `MAX_CELL_DIM` in `_cli/_prep.py`."""

VCC2026 = Preset(
    name="vcc2026",
    program="cell-eval2",
    module="cell_eval2",
    kind="counts",
    metrics=(
        "pds_cosine",
        "expr_mse_unbiased_capped_norm",
        "de_wilcoxon_direction_fidelity_yield_raw",
        "de_wilcoxon_direction_reach_raw",
        "de_wilcoxon_sig_jaccard",
        "de_wilcoxon_lfc_nmae",
    ),
    num_genes=18_533,
    cells_per_perturbation=400,
    perturbations_per_context=300,
    uploads_controls=False,
    max_cells=None,
    max_stored_values=4_750_000_000,
)
"""cell-eval2 0.20.0: scored members of the profile `vcc2026` (`catalog.py`); sizes of uploads are the challenge's."""

PRESETS = {preset.name: preset for preset in (VCC2025, VCC2026)}

MAX_COUNTS_PER_CELL = 1_000_000
"""cell-eval2's `configs/vcc2026.yaml`, `max_counts_per_cell`; a cell above it is refused (`norm.check_scale_limit`)."""

MAX_LOGNORM = 15.0
"""cell-eval's `utils.guess_is_lognorm`, `max_threshold`: it refuses fractional values from here on."""


@dataclass(frozen=True)
class ScoreOptions:
    """Hold the options of a score."""

    preset: Preset
    control_label: str = "non-targeting"
    """The label of control cells in obs `target_gene`."""
    cell_type_key: str | None = "cell_type"
    """Obs column within which baselines are built, where the real file has it."""
    context_key: str | None = None
    """Obs column of contexts, scored one by one and then averaged; None takes `context` where both files have it."""
    only_predicted: bool = False
    """Leave out real perturbations that the prediction lacks, rather than refusing it."""
    target_sum: float | None = None
    """Total to which counts are normalised where values are log-normalised; None finds it out."""
    seed: int = 0
    """Of baselines and of the split into halves."""
    threads: int = 1
    """Of the programs."""
    has_target_genes: bool = True
    """Whether perturbations are named after genes, which the programs then leave out of their own scores."""


def preset_named(name: str) -> Preset:
    """Return a preset.

    Raises:
        UserError: there is none of this name.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]
