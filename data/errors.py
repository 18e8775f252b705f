"""The error that every user mistake about data raises, and how it names many things."""

from collections.abc import Sequence


class DataError(ValueError):
    """Report a data file, column or setting that cannot be used, and what to do about it."""


def listed(names: Sequence[object], most: int = 8) -> str:
    """Show the first names of a long list and how many are left out."""
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
