"""The error that every mistake about a model's sizes or its input raises, and what every check of settings needs."""

from collections.abc import Iterable, Mapping
from typing import get_args


class ModelError(ValueError):
    """Report a model setting or a batch that the model cannot use, and what to do about it."""


def check_choice(field: str, value: str, choices: object) -> None:
    """Raise a ModelError naming `field` unless `value` is one of a Literal's choices."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ModelError(f"{field} is {value!r}; allowed: {', '.join(allowed)}")


def wrong_choices(config: object, choices: Mapping[str, object]) -> Iterable[str]:
    """Say which fields of a configuration are none of their Literal's choices; `choices` has these by field."""
    for field, allowed in choices.items():
        try:
            check_choice(field, getattr(config, field), allowed)
        except ModelError as error:
            yield str(error)


def raise_all(problems: Iterable[str]) -> None:
    """Raise one ModelError that names all problems, where there are any."""
    found = list(problems)
    if found:
        raise ModelError("; ".join(found))
