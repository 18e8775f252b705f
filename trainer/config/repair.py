"""All mistakes of a configuration at once: wrong values make way, so that the rules between the others are checked."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from trainer.config.messages import Problem, is_touched

Config = TypeVar("Config")

_MAX_REPAIRS = 8


def build_all(
    values: dict[str, Any],
    known: Sequence[Problem],
    *,
    parse: Callable[[dict[str, Any]], Config],
    translate: Callable[[ValidationError], Iterable[Problem]],
    repair: Callable[[dict[str, Any], Any], None],
    contradictions: Callable[[Config], Iterable[Problem]],
) -> tuple[Config | None, list[Problem]]:
    """Return the configuration and all its mistakes, those of single fields and those between fields.

    A rule that rests on a wrong value is left out, and mistakes at `known` places are not told twice.

    Args:
        values: as written.
        known: mistakes that were found before.
        parse: builds the configuration, with pydantic's own error.
        translate: makes such an error into mistakes.
        repair: changes values so that one of the error's records is gone.
        contradictions: yields the mistakes between fields.
    """
    problems: list[Problem] = []
    for _ in range(_MAX_REPAIRS):
        wrong = [problem.path for problem in (*known, *problems)]
        try:
            config = parse(values)
        except ValidationError as error:
            problems += [problem for problem in translate(error) if not is_touched(problem.path, wrong)]
            values = copy.deepcopy(values)
            for record in sorted(error.errors(), key=lambda record: str(record["loc"]), reverse=True):
                repair(values, record)
            continue
        problems += [
            problem
            for problem in contradictions(config)
            if not any(is_touched(path, wrong) for path in (problem.path, *problem.involves))
        ]
        return config, problems
    return None, problems
