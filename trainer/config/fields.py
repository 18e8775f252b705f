"""What fields may hold: the types of single ones, what is said of a wrong value, and what an empty section means."""

import re
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator


class EmptySectionsAsDefaults(BaseModel):
    """Read `checkpoint:` with nothing under it as the defaults of that section."""

    @model_validator(mode="before")
    @classmethod
    def _read_empty_sections(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {key: {} if value is None and cls._is_section(key) else value for key, value in raw.items()}

    @classmethod
    def _is_section(cls, key: str) -> bool:
        annotation = cls.model_fields[key].annotation if key in cls.model_fields else None
        return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _check_dotted(path: str) -> str:
    module, colon, attribute = path.partition(":")
    parts = [*module.split("."), *(attribute.split(".") if colon else [])]
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(f"'{path}' is not a dotted path; write package.module.name or package.module:name")
    return path


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is not a regular expression: {error}") from error
    return pattern


def _check_run_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]{0,99}", name):
        raise ValueError(
            f"'{name}' cannot name a run folder; use up to 100 letters, digits and . _ - + = @, "
            "a letter, digit or _ first"
        )
    return name


def _check_not_empty(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty; leave the key out or set null for the default")
    return text


def _check_some(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    if not entries:
        raise ValueError("expected a list with at least one entry, got an empty one")
    return entries


def _whole(value: Any) -> Any:
    """Read `1e5`, a float to YAML, as the whole number it is."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def named_section(value: Any) -> Any:
    """Read a bare name, of a tracker or a benchmark, as a section with that name."""
    return {"name": value} if isinstance(value, str) else value


def path_text(value: Any) -> Any:
    """Read a path object, which Python code may give, as the text that it stands for."""
    return str(value) if isinstance(value, PurePath) else value


def precision_word(value: Any) -> Any:
    """Read `precision: 32`, a number to YAML, as the word that it is meant to be."""
    return str(value) if value == 32 and not isinstance(value, bool) else value


def null_as(default: type) -> BeforeValidator:
    """Read a key whose lines are all commented out as empty."""
    return BeforeValidator(lambda value: default() if value is None else value)


_Whole = BeforeValidator(_whole)
AsTuple = Field(strict=False)
NotEmpty = AfterValidator(_check_some)
Count = Annotated[int, Field(ge=0), _Whole]
PositiveCount = Annotated[int, Field(ge=1), _Whole]
LearningRate = Annotated[float, Field(ge=0)]
DottedPath = Annotated[str, AfterValidator(_check_dotted)]
Pattern = Annotated[str, AfterValidator(_check_pattern)]
RunName = Annotated[str, AfterValidator(_check_run_name)]
Text = Annotated[str, AfterValidator(_check_not_empty)]
PathText = Annotated[Text, BeforeValidator(path_text)]
Share = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Arguments = Annotated[dict[str, Any], null_as(dict)]
Patterns = Annotated[tuple[Pattern, ...], AsTuple, null_as(tuple)]
