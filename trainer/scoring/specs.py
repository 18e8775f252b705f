"""Which benchmarks there are, with their options, defaults and ranges; a spec is a name or a table with a name."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from trainer.errors import ConfigError


def _whole(value: Any) -> Any:
    """Read `1e4`, a float to YAML, as the whole number it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Not from trainer.config, which reads this file.
Count = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
PositiveCount = Annotated[int, Field(ge=1), BeforeValidator(_whole)]


class Spec(BaseModel):
    """The options of one benchmark."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    name: ClassVar[str]

    def columns(self) -> tuple[str, ...]:
        """Return the obs columns that it reads."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Return the spec as a table with its name, none left to a default."""
        return {"name": self.name, **self.model_dump()}


class LinearProbeSpec(Spec):
    """How well a linear classifier reads a label out of an embedding."""

    name: ClassVar[str] = "linear_probe"

    cell_type_key: str = Field(default="cell_type", description="Obs column that is predicted")
    num_folds: Annotated[Count, Field(ge=2)] = Field(
        default=5, description="Folds of the cross-validation (folds)"
    )
    num_repeats: PositiveCount = Field(
        default=3, description="Cross-validations, each with other folds (repeats)"
    )
    inverse_regularization: float = Field(
        default=0.1, gt=0, description="C of scikit-learn's LogisticRegression"
    )
    max_iterations: PositiveCount = Field(default=1000, description="Of each fit (iterations)")
    max_cells: Annotated[Count, Field(ge=10)] = Field(
        default=20_000, description="Larger files are sampled, a seeded choice (cells)"
    )
    seed: Count = Field(default=0, description="Seed of folds and sample")

    def columns(self) -> tuple[str, ...]:
        """Return the obs column of the label."""
        return (self.cell_type_key,)


class EmbeddingQualitySpec(Spec):
    """The metrics of scIB: are cells of a type together, and technical batches mixed."""

    name: ClassVar[str] = "embedding_quality"

    cell_type_key: str = Field(default="cell_type", description="Obs column of the cell type")
    batch_key: str | None = Field(
        default=None, description="Obs column of the technical batch (null: without metrics of mixing)"
    )
    n_neighbors: Annotated[Count, Field(ge=3)] = Field(
        default=15, description="Of the graph of nearest neighbours (cells)"
    )
    max_cells: Annotated[Count, Field(ge=10)] = Field(
        default=20_000, description="Larger files are sampled, a seeded choice (cells)"
    )
    seed: Count = Field(default=0, description="Seed of clusterings and sample")

    def columns(self) -> tuple[str, ...]:
        """Return the obs columns of cell type and technical batch."""
        return (self.cell_type_key,) if self.batch_key is None else (self.cell_type_key, self.batch_key)


class PerturbationSpec(Spec):
    """How well the shift of the mean embedding tells the shift of mean expression, for perturbations not fitted on."""

    name: ClassVar[str] = "perturbation"

    perturbation_key: str = Field(default="perturbation", description="Obs column of the perturbation")
    control_label: str = Field(default="control", description="Its label of control cells")
    n_top_genes: Annotated[Count, Field(ge=2)] = Field(
        default=50, description="Genes of each perturbation that are scored: its largest shifts (genes)"
    )
    test_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="Perturbations that are scored and not fitted on (fraction)"
    )
    num_splits: PositiveCount = Field(
        default=5, description="Random splits, over which scores are averaged (splits)"
    )
    seed: Count = Field(default=0, description="Seed of the splits")

    def columns(self) -> tuple[str, ...]:
        """Return the obs column of the perturbation."""
        return (self.perturbation_key,)


SPECS: dict[str, type[Spec]] = {
    spec.name: spec for spec in (LinearProbeSpec, EmbeddingQualitySpec, PerturbationSpec)
}


def parse_specs(raw: Any, where: str) -> list[Spec]:
    """Read benchmark specs: each a name, `{name, options...}` or `{name, params: {options...}}`.

    Args:
        raw: the list in the YAML file.
        where: its place there, for messages.

    Raises:
        ConfigError: with all that is wrong, and what is allowed.
    """
    specs, problems = _read(raw, where)
    if problems:
        raise ConfigError("\n".join(f"{place}: {text}" for place, text in problems))
    return specs


def wrong_specs(raw: Any, where: str) -> list[tuple[str, str]]:
    """Return the mistakes that `parse_specs` would raise, each with its place in the YAML file."""
    return _read(raw, where)[1]


def titles(specs: Sequence[Spec]) -> list[str]:
    """Return a title for each spec: its name, numbered from the second one of the same name on."""
    names = [spec.name for spec in specs]
    return [
        name if name not in names[:index] else f"{name}_{names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]


def _read(raw: Any, where: str) -> tuple[list[Spec], list[tuple[str, str]]]:
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        return [], [(where, f"got {raw!r:.80}; it must be a list of benchmarks ({', '.join(SPECS)})")]
    specs: list[Spec] = []
    problems: list[tuple[str, str]] = []
    for index, entry in enumerate(raw):
        found = entry if isinstance(entry, Spec) else _read_one(entry, f"{where}.{index}")
        if isinstance(found, Spec):
            specs.append(found)
        else:
            problems += found
    return specs, problems


def _read_one(entry: Any, where: str) -> Spec | list[tuple[str, str]]:
    options = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        wanted = f"the name of a benchmark ({', '.join(SPECS)}), or a table with its name and options"
        return [(where, f"got {entry!r:.80}; it must be {wanted}")]
    options = dict(options)
    name = options.pop("name")
    if name not in SPECS:
        return [(where, f"there is no benchmark {name!r}; there are: {', '.join(SPECS)}")]
    params = options.pop("params", None) or {}
    if not isinstance(params, Mapping):
        return [(f"{where}.params", f"got {params!r:.80}; it must be a table of options")]
    twice = sorted(options.keys() & params.keys())
    if twice:
        return [(where, f"{', '.join(twice)} is given both beside the name and under params")]
    spec = SPECS[name]
    try:
        return spec(**{**params, **options})
    except ValidationError as error:
        return [
            (".".join([where, *map(str, each["loc"])]), _wrong_option(each, name, spec))
            for each in error.errors()
        ]


def _wrong_option(error: Any, name: str, spec: type[Spec]) -> str:
    if error["type"] == "extra_forbidden":
        return f"{name} has no such option; it has: {', '.join(spec.model_fields)}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}"
