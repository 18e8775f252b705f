"""The mistakes of a config as lines of text: YAML path, what was got, what is allowed, the nearest key."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from trainer.config.replaced import advice_on_key
from trainer.config.yaml_text import describe
from trainer.errors import ConfigError


class Problem(NamedTuple):
    """Hold one mistake.

    Attributes:
        path: where in the YAML, as `datasets.0.epochs`.
        text: what is wrong and what to do.
        involves: further paths whose values the mistake rests on.
        source: who wrote it, where its path does not tell.
    """

    path: str
    text: str
    involves: tuple[str, ...] = ()
    source: str = ""

    def line(self) -> str:
        """Return the mistake as one line."""
        return f"{self.path}: {self.text}" if self.path else self.text


COMMAND_LINE = "the command line"


@dataclass(frozen=True)
class Sources:
    """Where the values of a configuration were written."""

    file: str
    """The configuration's own file."""
    by_path: Mapping[str, str]
    """The file, or `COMMAND_LINE`, by dotted path; a value without one was written where the section around it was."""

    def __str__(self) -> str:
        """Return the configuration's own file."""
        return self.file

    def of(self, path: str) -> str:
        """Return where the value at a path was written, or the section that lacks it."""
        while path:
            if path in self.by_path:
                return self.by_path[path]
            path = path.rpartition(".")[0]
        return self.file

    def elsewhere(self, paths: Iterable[str], here: str) -> str:
        """Return a remark on those paths that were written neither in the own file nor `here`; empty: none."""
        found = {path: self.of(path) for path in paths}
        return "".join(f"; {path} is from {s}" for path, s in found.items() if s not in (here, self.file))


class ValidationError(ConfigError):
    """Report wrong fields, types or values of a typed configuration, all of them at once."""


def config_error(
    source: str | Sources, problems: Sequence[Problem], kind: type[ConfigError] = ConfigError
) -> ConfigError:
    """Return one error that lists every mistake, a line each, with who wrote it where it is not the source itself."""
    sources = source if isinstance(source, Sources) else Sources(source, {})
    lines = {}
    for problem in problems:
        written = problem.source or sources.of(problem.path)
        lines[problem.line() + sources.elsewhere(problem.involves, written)] = written
    if len(lines) == 1:
        line, written = next(iter(lines.items()))
        return kind(f"{written}: {line}")
    listed = [line if written == str(source) else f"{written}: {line}" for line, written in lines.items()]
    return kind("\n  ".join([f"{source}: {len(lines)} mistakes", *listed]))


def is_touched(path: str, wrong: Iterable[str]) -> bool:
    """Tell whether a path is one of those known to be wrong, inside one, or around one."""
    return any(path == w or path.startswith(f"{w}.") or w.startswith(f"{path}.") for w in wrong if w)


def near_miss(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that is closest to `name`, if one is close."""
    by_lower = {candidate.lower(): candidate for candidate in allowed}
    matches = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def unknown_name(name: str, allowed: Iterable[str], *, listed: int = 30) -> str:
    """Return a hint for a name that is not allowed: the nearest one, or what there is."""
    allowed = list(allowed)
    close = near_miss(name, allowed)
    if close is not None:
        return f"did you mean '{close}'?"
    shown = ", ".join(allowed[:listed]) + (", ..." if len(allowed) > listed else "")
    return f"allowed: {shown}" if allowed else "nothing is allowed here"


def path_text(location: Iterable[str | int]) -> str:
    """Return a path into the YAML as text."""
    return ".".join(str(part) for part in location if part != "[key]")


def translate(error: dict[str, Any], root: type[BaseModel]) -> Problem:
    """Turn one of pydantic's error records into a problem."""
    location, kind, value = error["loc"], error["type"], error.get("input")
    context = error.get("ctx", {})
    field = field_at(root, location)
    path = path_text(location)
    if kind == "missing":
        about = f": {field.description}" if field is not None and field.description else ""
        return Problem(path, f"is required{about}")
    if kind == "extra_forbidden":
        return Problem(path, _unknown_key(location, root))
    if kind == "literal_error":
        return Problem(path, _not_allowed(value, context["expected"], path, _allows_null(field)))
    if kind in ("value_error", "assertion_error"):
        return Problem(path, str(context["error"]))
    or_null = " or null" if _allows_null(field) else ""
    expected = _EXPECTED.get(kind)
    if expected is not None:
        return Problem(path, f"expected {expected}{or_null}, got {describe(value)}{_advice(kind, value)}")
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return Problem(path, f"must be {word} {context[key]:g}{or_null}, got {describe(value)}")
    return Problem(path, f"{error['msg']}, got {describe(value)}")


def field_at(root: type[BaseModel], location: Sequence[str | int]) -> FieldInfo | None:
    """Return the schema's field at a path, or None inside free-form sections."""
    section, field = root, None
    for part in location:
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return None
        field = section.model_fields[part]
        section = inner_section(field.annotation)
    return field


def inner_section(annotation: Any) -> type[BaseModel] | None:
    """Return the section class that an annotation is, holds or is a list of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := inner_section(part)) is not None), None)


def is_list(field: FieldInfo) -> bool:
    """Tell whether a field of the schema holds a list."""
    return get_origin(field.annotation) is tuple


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def _unknown_key(location: Sequence[str | int], root: type[BaseModel]) -> str:
    key = str(location[-1])
    replaced = advice_on_key(location) if "datasets" in root.model_fields else None
    if replaced is not None:
        return f"no key of this program; {replaced}"
    field = field_at(root, location[:-1])
    section = root if field is None else inner_section(field.annotation)
    fields = [] if section is None else list(section.model_fields)
    if near_miss(key, fields) is None:
        homes = _homes(root, key)
        if homes:
            return f"unknown key here; '{key}' belongs under {' or '.join(homes[:3])}"
    return f"unknown key; {unknown_name(key, fields)}"


def _homes(section: type[BaseModel], key: str, prefix: str = "") -> list[str]:
    """Return the sections of the schema that have a field of this name."""
    homes = [prefix] if prefix and key in section.model_fields else []
    for name, field in section.model_fields.items():
        inner = inner_section(field.annotation)
        if inner is not None:
            homes += _homes(inner, key, f"{prefix}.{name}".lstrip(".") + (".N" if is_list(field) else ""))
    return homes


def _allows_null(field: FieldInfo | None) -> bool:
    return field is not None and type(None) in get_args(field.annotation)


def _not_allowed(value: Any, expected: str, path: str, or_null: bool) -> str:
    allowed = re.findall(r"'([^']*)'", expected)
    choices = ", ".join(allowed) + (" or null" if or_null else "")
    text = f"got {describe(value)}; allowed: {choices}"
    if path.split(".")[-1] == "device" and str(value).startswith("cuda:"):
        return f"{text}; the launcher picks the device of each process (or set CUDA_VISIBLE_DEVICES)"
    close = near_miss(value, allowed) if isinstance(value, str) else None
    return f"{text}; did you mean '{close}'?" if close else text


def _advice(kind: str, value: Any) -> str:
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return "; put it in quotes"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        if not _looks_numeric(value):
            return ""
        return " as text; remove the quotes (an environment variable: ${oc.decode:${oc.env:NAME}})"
    if kind in ("tuple_type", "list_type") and isinstance(value, str):
        return f"; write [{value}]"
    return ""


def _looks_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
