"""Compose one configuration from YAML files, presets and `key=value` overrides, as plain containers.

A file may have a `defaults:` list. `- base` merges `base.yml` (or `.yaml`) beside it. `- group: name` merges
`group/name.yml` under the key `group`, or at the top level where its first line is `# @package _global_`.
`- _self_` is the file's own content, last where it is not named. On the command line `group=name` picks
another preset where such a folder exists beside the file; any other `a.b=c` sets one value.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import GrammarParseError, MissingMandatoryValue, OmegaConfBaseException

from trainer.config.messages import COMMAND_LINE, Problem, Sources, unknown_name
from trainer.config.yaml_text import describe, parse_yaml, read_yaml_section
from trainer.errors import ConfigError

_SUFFIXES = (".yml", ".yaml")
_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)\s*$", re.MULTILINE)


def compose(path: Path, overrides: list[str]) -> tuple[dict[str, Any], list[Problem], Sources]:
    """Return the merged configuration, interpolations resolved, the mistakes in it, and where its values were written.

    Raises:
        ConfigError: a file is missing or not YAML, or `defaults` lists go round in a circle.
    """
    choices, settings, problems = _sort_overrides(path.parent, overrides)
    files = _Files(path.parent, choices)
    content = files.merge_all(path)
    for key, value in settings:
        try:
            _set_value(content, key, value, files.sources)
        except ConfigError as error:
            problems.append(Problem(key, str(error), source=COMMAND_LINE))
    content.pop("hydra", None)
    # For data and presets that lie beside the file, wherever the command is given.
    OmegaConf.register_resolver("config_dir", lambda: str(path.parent.resolve()), replace=True)
    return _resolve_interpolations(content, problems), problems, Sources(str(path), files.sources)


def list_presets(folder: Path) -> list[str]:
    """Return the names of the YAML files in a folder."""
    return (
        sorted({file.stem for file in folder.iterdir() if file.suffix in _SUFFIXES})
        if folder.is_dir()
        else []
    )


class _Files:
    """Merge a file and what its `defaults` name, depth first, into one tree."""

    def __init__(self, root: Path, choices: dict[str, Any]) -> None:
        self.root = root
        self.choices = dict(choices)
        self.unused = dict(choices)
        self.content: dict[str, Any] = {}
        self.sources: dict[str, str] = {}
        self.open_files: list[Path] = []

    def merge_all(self, path: Path) -> dict[str, Any]:
        """Merge the main file, then the groups that only the command line names."""
        self.merge_file(path, (), "")
        for group, choice in list(self.unused.items()):
            self._merge_group(self.root, group, choice, (), "", source=COMMAND_LINE)
        return self.content

    def merge_file(self, path: Path, package: tuple[str, ...], group: str) -> None:
        """Merge one file at the keys `package`; `group` is its preset folder, seen from the main file."""
        if path.resolve() in self.open_files:
            round_trip = " -> ".join(file.name for file in [*self.open_files, path])
            raise ConfigError(f"{path}: the defaults lists go round in a circle: {round_trip}")
        text = read_text(path)
        own = read_yaml_section(text, str(path))
        entries = own.pop("defaults", None)
        entries = [] if entries is None else entries
        if not isinstance(entries, list):
            raise ConfigError(f"{path}: defaults: expected a list, got {describe(entries)}")
        header = _PACKAGE.search(text.split("\n\n", 1)[0]) if group else None
        if header is not None:
            package = () if header[1] == "_global_" else tuple(header[1].split("."))
        self.open_files.append(path.resolve())
        self._choose(entries, group)
        for entry in entries if "_self_" in entries else [*entries, "_self_"]:
            if entry == "_self_":
                self._merge_content(own, package, path)
            else:
                self._merge_entry(entry, path, package, group)
        self.open_files.pop()

    def _choose(self, entries: list[Any], group: str) -> None:
        """Note `override group: name` entries; the command line goes before them."""
        for entry in entries:
            if isinstance(entry, dict) and len(entry) == 1:
                key, choice = next(iter(entry.items()))
                words = str(key).split()
                if words[:1] == ["override"] and len(words) == 2:
                    self.choices.setdefault(_join(group, words[1]), choice)

    def _merge_entry(self, entry: Any, path: Path, package: tuple[str, ...], group: str) -> None:
        source = f"{path}: defaults"
        if isinstance(entry, str):
            folder, _, name = entry.rpartition("/")
            if folder.startswith("."):
                self.merge_file(find_file(path.parent / folder, name, source), package, group)
                return
            if not folder.strip("/"):
                self.merge_file(find_file(self.root if folder else path.parent, name, source), package, group)
                return
            key, choice, is_optional = folder, name, False
        elif isinstance(entry, dict) and len(entry) == 1:
            (key, choice), is_optional = next(iter(entry.items())), False
            words = str(key).split()
            if words[:1] == ["override"] or (words and words[-1].startswith("hydra")):
                return
            if words[:1] == ["optional"] and len(words) == 2:
                words, is_optional = words[1:], True
            key = words[0] if len(words) == 1 else ""
            if not key.strip("/") or "@" in key:
                raise ConfigError(f"{source}: '{' '.join(words)}' is not understood; write `- group: name`")
        else:
            raise ConfigError(
                f"{source}: expected a file name, `group: name` or _self_, got {describe(entry)}"
            )
        if key.startswith("/"):
            self._merge_group(self.root, key.strip("/"), choice, (), "", source, is_optional)
        else:
            self._merge_group(path.parent, key, choice, package, group, source, is_optional)

    def _merge_group(
        self,
        folder: Path,
        key: str,
        choice: Any,
        package: tuple[str, ...],
        group: str,
        source: str,
        is_optional: bool = False,
    ) -> None:
        full = _join(group, key)
        choice = self.choices.get(full, choice)
        self.unused.pop(full, None)
        for name in choice if isinstance(choice, list) else [choice]:
            if name is None or (is_optional and str(name) not in list_presets(folder / key)):
                continue
            file = find_file(folder / key, str(name), source)
            self.merge_file(file, package + tuple(key.split("/")), full)

    def _merge_content(self, own: dict[str, Any], package: tuple[str, ...], path: Path) -> None:
        target = self.content
        for depth, key in enumerate(package):
            if key not in target:
                target[key] = {}
                _note(self.sources, package[: depth + 1], str(path))
            inner = target[key]
            if not isinstance(inner, dict):
                raise ConfigError(f"{path}: belongs under {'.'.join(package)}, which is {describe(inner)}")
            target = inner
        _merge(target, own, package, str(path), self.sources)


def read_text(path: Path) -> str:
    """Return a config file's text; ConfigError where there is none."""
    if path.is_dir():
        raise ConfigError(
            f"{path}: is a folder; name one of its files ({', '.join(list_presets(path)) or 'none'})"
        )
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = [f.name for f in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        hint = unknown_name(path.name, beside) if beside else f"there is no YAML file in {path.parent}"
        raise ConfigError(f"{path}: no such file; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error


def find_file(folder: Path, name: str, source: str) -> Path:
    """Return a preset's file, with or without its suffix in `name`."""
    names = [name] if name.endswith(_SUFFIXES) else [name + suffix for suffix in _SUFFIXES]
    found = [folder / candidate for candidate in names if (folder / candidate).is_file()]
    if len(found) == 2:
        raise ConfigError(f"{source}: both {found[0]} and {found[1].name} exist; keep one")
    if not found:
        presets = list_presets(folder)
        hint = unknown_name(name, presets)
        there_are = f" There are: {', '.join(presets)}" if hint.startswith("did you mean") else ""
        raise ConfigError(f"{source}: there is no {folder / names[0]}; {hint}{there_are}")
    return found[0]


def split_key(key: str) -> list[str]:
    """Return the parts of `datasets.0.lr` or `datasets[0].lr`."""
    parts = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    if not all(re.fullmatch(r"[^\s\[\]]+", part) for part in parts):
        raise ConfigError("is not a key; write it as a.b, datasets.0.lr or datasets[0].lr")
    return parts


def parse_value(text: str) -> Any:
    """Read an override's value as YAML where that is what it is, and literally where it is not."""
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        return text
    # Unquoted text with `: `, ` #` or `- ` in it is text: an override holds no block mapping and no comment.
    is_flow = text.lstrip().startswith(("{", "["))
    is_quoted = text.lstrip().startswith(("'", '"'))
    if isinstance(value, (dict, list)) and not is_flow:
        return text
    if isinstance(value, str) and not is_quoted:
        return text
    if value is None and text.strip() not in ("", "~", "null", "Null", "NULL"):
        return text
    return value


def _sort_overrides(
    folder: Path, overrides: list[str]
) -> tuple[dict[str, Any], list[tuple[str, Any]], list[Problem]]:
    """Return chosen presets by group, values by key in the order given, and what is neither."""
    choices: dict[str, Any] = {}
    settings: list[tuple[str, Any]] = []
    problems: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip().lstrip("+")
        if not equals or not key:
            problems.append(Problem("", f"'{override}' is not key=value", source=COMMAND_LINE))
        elif re.match(r"hydra([./]|$)", key):
            continue
        elif re.fullmatch(r"[\w/-]+", key) and list_presets(folder / key):
            choices[key] = parse_value(text)
        else:
            settings.append((key, parse_value(text)))
    return choices, settings, problems


def _set_value(content: dict[str, Any], key: str, value: Any, sources: dict[str, str]) -> None:
    """Set one value in the tree, making the sections on its way."""
    *parents, last = split_key(key)
    node: Any = content
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_index(node, part, parents[:depth])]
        else:
            if node.get(part) is None:
                node[part] = {}
                _note(sources, parents[: depth + 1], COMMAND_LINE)
            node = node[part]
        if not isinstance(node, (dict, list)):
            where = ".".join(parents[: depth + 1])
            raise ConfigError(f"{where} is {describe(node)}, which has no keys below it")
    if isinstance(node, list):
        node[_index(node, last, parents)] = value
    else:
        node[last] = value
    _note(sources, [*parents, last], COMMAND_LINE)


def _note(sources: dict[str, str], keys: Sequence[str], source: str) -> None:
    """Note where a value was written, which takes the place of one with all that was below it."""
    path = ".".join(keys)
    for below in [known for known in sources if known.startswith(f"{path}.")]:
        del sources[below]
    sources[path] = source


def _index(items: list[Any], part: str, path: list[str]) -> int:
    where = ".".join(path)
    if not (part.isascii() and part.isdigit() and len(part) < 10):
        raise ConfigError(f"{where} is a list; give an index, as {where}.0")
    if int(part) >= len(items):
        last = f", the last index is {len(items) - 1}" if items else ""
        raise ConfigError(
            f"index {part} is out of range: {where} has {len(items)} "
            f"{'entry' if len(items) == 1 else 'entries'}{last}"
        )
    return int(part)


def _join(group: str, key: str) -> str:
    return key.strip("/") if not group or key.startswith("/") else f"{group}/{key}"


def _merge(
    target: dict[str, Any],
    update: dict[str, Any],
    keys: tuple[str, ...],
    source: str,
    sources: dict[str, str],
) -> None:
    """Merge sections key by key; anything else replaces what was there."""
    for key, value in update.items():
        path = (*keys, str(key))
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value, path, source, sources)
        else:
            target[key] = value
            _note(sources, path, source)


def _resolve_interpolations(content: dict[str, Any], problems: list[Problem]) -> dict[str, Any]:
    budget = _Budget()
    try:
        tree = OmegaConf.create(content)
        _count(tree, budget)
        resolved = _resolved(tree, "", problems, budget)
        budget.check()
        return resolved
    except GrammarParseError as error:
        where = error.full_key or "an interpolation"
        raise ConfigError(f"{where}: `${{...}}` is not well formed: {_first_line(error)}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'the configuration'}: {_first_line(error)}") from error
    except RecursionError:
        raise ConfigError("a `${...}` interpolation refers to a section that it is itself part of") from None


class _Budget:
    """Bound what interpolations stand for: a few lines of `${a}${a}`, each of the next, would be billions of values."""

    def __init__(self) -> None:
        self.interpolations, self.values, self.characters = (
            _MOST_INTERPOLATIONS,
            _MOST_VALUES,
            _MOST_CHARACTERS,
        )

    def check(self) -> None:
        """Raise where it is spent; OmegaConf makes an error within an interpolation one of its own, to be noted."""
        if min(self.interpolations, self.values, self.characters) < 0:
            raise ConfigError(
                f"its `${{...}}` interpolations are more than {_MOST_INTERPOLATIONS:,} with those in what they name, "
                f"or stand for more than {_MOST_VALUES:,} values or {_MOST_CHARACTERS:,} characters; write the values "
                "themselves"
            )

    def spend_value(self, value: Any) -> None:
        """Count a value of the configuration, or what an interpolation stands for."""
        self.values -= 1
        self.characters -= len(value) if isinstance(value, str) else 0
        self.check()

    def spend_interpolation(self, resolve: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Resolve an interpolation and count it."""
        self.interpolations -= 1
        self.check()
        found = resolve(*arguments, **options)
        self.spend_value(found._value() if isinstance(found, Node) else found)
        return found


def _counting(kind: Any, budget: _Budget) -> Any:
    """Return a container of OmegaConf that spends a budget for every interpolation that it resolves."""

    class Counting(kind):
        def _resolve_node_interpolation(self, *arguments: Any, **options: Any) -> Any:
            return budget.spend_interpolation(super()._resolve_node_interpolation, *arguments, **options)

        def _evaluate_custom_resolver(self, *arguments: Any, **options: Any) -> Any:
            return budget.spend_interpolation(super()._evaluate_custom_resolver, *arguments, **options)

    return Counting


def _count(tree: Any, budget: _Budget) -> None:
    """Let every container of a tree spend the budget; OmegaConf itself makes them of its own classes alone."""
    kinds = {kind: _counting(kind, budget) for kind in (DictConfig, ListConfig)}
    waiting = [tree]
    while waiting:
        node: Any = waiting.pop()
        keys: Any = node if isinstance(node, DictConfig) else range(len(node))
        for key in keys:
            if not (OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)):
                inner = node[key]
                waiting += [inner] if isinstance(inner, DictConfig | ListConfig) else []
        object.__setattr__(
            node, "__class__", kinds[type(node)]
        )  # a section would take it for a key of its own


def _resolved(node: Any, path: str, problems: list[Problem], budget: _Budget) -> Any:
    """Return a container without interpolations; values that cannot be had are left out and noted."""
    budget.spend_value(node)
    if isinstance(node, DictConfig):
        pairs = [(key, _value(node, key, path, problems, budget)) for key in node]
        return {key: value for key, value in pairs if value is not _ABSENT}
    if isinstance(node, ListConfig):
        return [_value(node, index, path, problems, budget) for index in range(len(node))]
    return node


_ABSENT = object()
_MAX_DEPTH = 100
_MOST_INTERPOLATIONS = 5_000
_MOST_VALUES = 2_000_000
"""Twice what a file may hold (`data.plain_yaml`)."""
_MOST_CHARACTERS = 100_000_000


def _value(node: Any, key: Any, path: str, problems: list[Problem], budget: _Budget) -> Any:
    where = f"{path}.{key}".lstrip(".")
    if where.count(".") > _MAX_DEPTH:
        raise RecursionError
    try:
        return _resolved(node[key], where, problems, budget)
    except MissingMandatoryValue:
        problems.append(Problem(where, "the file says ???: a value has to be given"))
    except OmegaConfBaseException as error:
        problems.append(Problem(where, _first_line(error)))
    return _ABSENT if isinstance(node, DictConfig) else None


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()[0]
    variable = re.search(r"Environment variable '([^']*)' not found", text)
    if variable:
        name = variable[1]
        return f"the environment variable {name} is not set; set it, or write ${{oc.env:{name},DEFAULT}}"
    return text
