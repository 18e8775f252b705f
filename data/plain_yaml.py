"""YAML as plain values, from files that nobody vouches for: no objects, bounded depth and size, one kind of error."""

import contextlib
import functools
from typing import Any

import yaml

_MOST_VALUES = 1_000_000
"""Values of a file once every alias is written out: a few lines of aliases can stand for billions."""
_MOST_LEVELS = 64
_MOST_BITS = 1024
"""Of a whole number; Python refuses to write out those of more than 4,300 digits."""


class PlainLoader(yaml.SafeLoader):
    """Build plain containers, numbers and text, and refuse what unfolds into more than a file can mean."""

    def __init__(self, text: str) -> None:
        """Take the text."""
        super().__init__(text)
        self._levels = self._values = 0
        self._open: set[str] = set()
        self._values_of: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Count what the next node stands for, and compose it."""
        event: Any = self.peek_event()
        mark, anchor = event.start_mark, event.anchor
        if isinstance(event, yaml.AliasEvent):
            if anchor in self._open:
                raise _error(f"the alias *{anchor} refers to a section that it is itself part of", mark)
            self._count(self._values_of.get(anchor, 1), mark)
            return super().compose_node(parent, index)
        before = self._values
        self._count(1, mark)
        self._levels += 1
        if self._levels > _MOST_LEVELS:
            raise _error(f"it is nested more than {_MOST_LEVELS} levels deep", mark)
        if anchor is not None:
            self._open.add(anchor)
        node = super().compose_node(parent, index)
        self._levels -= 1
        if anchor is not None:
            self._open.discard(anchor)
            self._values_of[anchor] = self._values - before
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Build the value of a node; one that is not what its tag says is an error like all others."""
        try:
            value = super().construct_object(node, deep=deep)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            what = f"'{node.value[:40]}'" if isinstance(node, yaml.ScalarNode) else "a section"
            raise _error(f"{what} is no {node.tag.rpartition(':')[2]}", node.start_mark) from error
        if type(value) is int and value.bit_length() > _MOST_BITS:
            raise _error("a whole number is too long", node.start_mark)
        return value

    def _count(self, number: int, mark: Any) -> None:
        self._values += number
        if self._values > _MOST_VALUES:
            raise _error(f"its aliases stand for more than {_MOST_VALUES:,} values", mark)


def load_plain(text: str, loader: type[PlainLoader] = PlainLoader) -> Any:
    """Return what a YAML text says.

    Raises:
        yaml.YAMLError: it is not valid, or too large when its aliases are written out.
    """
    if yaml.__with_libyaml__:
        with contextlib.suppress(yaml.YAMLError):  # PyYAML's own parser says more of where it is
            return yaml.load(text, Loader=_by_libyaml(loader))
    return yaml.load(text, Loader=loader)


@functools.cache
def _by_libyaml(loader: Any) -> Any:
    """Return a loader that takes its events from libyaml, which finds them six times as fast as PyYAML's parser."""

    class ByLibyaml(loader):
        def __init__(self, text: str) -> None:
            super().__init__(text)
            events = yaml.CSafeLoader(text)
            self.check_event, self.peek_event = events.check_event, events.peek_event
            self.get_event = events.get_event

    return ByLibyaml


def _error(problem: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
