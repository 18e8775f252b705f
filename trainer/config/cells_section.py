"""Sections of the typed configuration: checked when they are built and when they are changed, all mistakes at once."""

import copy
from typing import Any, ClassVar, Self

import pydantic
from pydantic import BaseModel, ConfigDict

from trainer.config.fields import EmptySectionsAsDefaults
from trainer.config.messages import (
    Problem,
    ValidationError,
    config_error,
    field_at,
    inner_section,
    translate,
)
from trainer.config.repair import build_all


class _Checked(type(BaseModel)):
    """Let constructors raise the package's own `ValidationError`, with all mistakes and their YAML paths."""

    def __call__(cls, *arguments: Any, **values: Any) -> Any:
        """Build a section from keyword arguments."""
        if arguments:
            raise TypeError(f"{cls.__name__} takes keyword arguments only")
        config, problems = build(cls, values)
        if problems:
            raise config_error(cls.__name__, problems, ValidationError)
        return config


class CellsSection(EmptySectionsAsDefaults, metaclass=_Checked):
    """A section of the configuration: no unknown keys, no silent conversion of types, checked at every change."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        validate_assignment=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )
    place: ClassVar[str] = ""
    """Where the section stands in the YAML file."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Change one field, or say why not."""
        try:
            super().__setattr__(name, value)
        except pydantic.ValidationError as error:
            problems = _translated(type(self), error)
            raise config_error(type(self).__name__, problems, ValidationError) from None

    def settle(self) -> list[Problem]:
        """Bring fields that depend on each other together, and return what contradicts; only the whole does."""
        return []

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Build a section from a mapping, with the same errors as the constructor."""
        return obj if isinstance(obj, cls) else cls(**dict(obj))


def build(
    section: type[Any], values: dict[str, Any], known: list[Problem] | None = None
) -> tuple[Any, list[Problem]]:
    """Return a section and all its mistakes, those of single fields and those between fields.

    Fields that are wrong take their defaults while the others are compared.
    """
    return build_all(
        values,
        known or [],
        parse=section.__pydantic_validator__.validate_python,
        translate=lambda error: _translated(section, error),
        repair=_drop,
        contradictions=lambda config: config.settle(),
    )


def _drop(values: Any, error: Any) -> None:
    """Remove the value that an error is about: its key, or the whole list that it stands in."""
    node, owner, key = values, None, None
    for part in error["loc"]:
        if isinstance(node, dict) and part in node:
            owner, key, node = node, part, node[part]
    if owner is not None:
        owner.pop(key)


def _translated(section: type[BaseModel], error: pydantic.ValidationError) -> list[Problem]:
    items: list[dict[str, Any]] = [dict(item) for item in error.errors(include_url=False)]
    for item in items:
        if item["type"] == "no_such_attribute":  # what an assignment says of an unknown key
            item["type"] = "extra_forbidden"
        item["loc"] = _without_alternatives(section, item["loc"])
    problems = [_placed(section, translate(item, section)) for item in items]
    return list({problem.path: problem for problem in reversed(problems)}.values())[::-1]


def _without_alternatives(section: type[BaseModel], location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Leave out what pydantic puts behind a field with alternatives: their types. List indices stay."""
    for end in range(1, len(location) + 1):
        field = field_at(section, location[:end])
        if field is not None and inner_section(field.annotation) is None:
            return (*location[:end], *(part for part in location[end:] if isinstance(part, int)))
    return location


def _placed(section: type[Any], problem: Problem) -> Problem:
    place = section.place
    return problem._replace(path=f"{place}.{problem.path}" if place else problem.path)


def written_values(section: CellsSection) -> dict[str, Any]:
    """Return what was given of a section, as plain values from which an equal one can be built."""
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, CellsSection):
            inner = written_values(value)
            # An optional section that is there was given, even where all in it is left to the defaults.
            if inner or name in section.model_fields_set:
                values[name] = inner
        elif name in section.model_fields_set:
            values[name] = value.model_dump() if isinstance(value, BaseModel) else copy.deepcopy(value)
    return values


def section_classes(root: type[CellsSection]) -> list[type[CellsSection]]:
    """Return a section's class and those below it, in the order of the file."""
    found: list[type[CellsSection]] = [root]
    for field in root.model_fields.values():
        inner = inner_section(field.annotation)
        if inner is not None and issubclass(inner, CellsSection):
            found += section_classes(inner)
    return found
