"""Read option tables from YAML: every wrong key and value is reported at once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from data.errors import DataError


class Options:
    """Take typed values out of a table, collecting mistakes until `finish`."""

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        """Read `table`; `where` is its place in the YAML file, such as `tokenizer`."""
        if not isinstance(table, Mapping):
            raise DataError(f"{where}: got {table!r}; it must be a table of options")
        self._table = dict(table)
        self._where = where
        self._known: list[str] = []
        self._mistakes: list[str] = []

    def __contains__(self, name: str) -> bool:
        """Tell whether the user gave this option."""
        return name in self._table

    def choice(self, name: str, allowed: Iterable[str | None], default: str | None) -> Any:
        """Take one of a few words; None among the allowed ones is YAML's null."""
        words = list(allowed)
        return self._take(
            name, default, words.__contains__, " | ".join("null" if w is None else w for w in words)
        )

    def flag(self, name: str, default: bool) -> bool:
        """Take true or false."""
        return self._take(name, default, lambda value: isinstance(value, bool), "true or false")

    def count(self, name: str, default: int, minimum: int) -> int:
        """Take a whole number."""
        return self._take(
            name,
            default,
            lambda value: type(value) is int and value >= minimum,
            f"a whole number, at least {minimum}",
        )

    def count_or_none(self, name: str, default: int | None, minimum: int) -> int | None:
        """Take a whole number, or null."""
        return self._take(
            name,
            default,
            lambda value: value is None or type(value) is int and value >= minimum,
            f"a whole number, at least {minimum}",
        )

    def take_any(self, name: str) -> Any:
        """Take whatever was given, None where nothing was; the caller checks it."""
        return self._take(name, None, lambda value: True, "")

    def number(
        self, name: str, default: float, low: float, high: float = float("inf"), above: bool = False
    ) -> float:
        """Take a number in [low, high], or in (low, high] with `above`."""
        return float(self._take(name, default, *_range(low, high, above)))

    def number_or_none(
        self, name: str, default: float | None, low: float, above: bool = False
    ) -> float | None:
        """Take a number of at least `low`, or above it, or null."""
        is_valid, allowed = _range(low, float("inf"), above)
        value = self._take(
            name, default, lambda value: value is None or is_valid(value), f"{allowed}, or null"
        )
        return None if value is None else float(value)

    def text(self, name: str) -> str:
        """Take a text, which must be given and not be empty."""
        if name not in self._table:
            self.wrong(name, "missing; it must be a text")
        return self._take(name, "", lambda value: isinstance(value, str) and value != "", "a text")

    def text_or_none(self, name: str) -> str | None:
        """Take a text that is not empty, or null."""
        return self._take(
            name,
            None,
            lambda value: value is None or isinstance(value, str) and value != "",
            "a text, or null",
        )

    def wrong(self, name: str, reason: str) -> None:
        """Note that an option cannot be used here."""
        self._mistakes.append(f"{self._where}.{name}: {reason}")

    def finish(self) -> None:
        """Raise one error with all mistakes, options that nothing took among them."""
        for name in self._table:
            if name not in self._known:
                self.wrong(name, f"not an option here; there are: {', '.join(self._known)}")
        if self._mistakes:
            raise DataError("; ".join(self._mistakes))

    def _take(self, name: str, default: Any, is_valid: Any, allowed: str) -> Any:
        self._known.append(name)
        if name not in self._table:
            return default
        value = self._table[name]
        if not is_valid(value):
            self.wrong(name, f"got {value!r}; it must be {allowed}")
            return default
        return value


def _range(low: float, high: float, above: bool) -> tuple[Callable[[Any], bool], str]:
    """Return the test for a number in a range, and the range in words."""

    def is_valid(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and low <= value <= high and not (above and value == low)

    limit = f", at most {high:g}" if high < float("inf") else ""
    return is_valid, f"a number {'above' if above else 'at least'} {low:g}{limit}"
