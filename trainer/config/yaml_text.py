"""Read and write YAML as users mean it: `1e-4` is a number, a date is text, a repeated key is a mistake."""

import re
from typing import Any

import yaml

from data.plain_yaml import PlainLoader, load_plain
from trainer.errors import ConfigError

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
# `010` (octal for PyYAML) and `1:30` (sixty-based) stay text, so that a field that wants a number can say so.
_INTEGER = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0b[01]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_REPLACED_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("float", "int", "timestamp", "value")}


class _Loader(PlainLoader):
    """Build plain containers, numbers and text, and refuse a key that is given twice."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED_TAGS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping whose keys differ."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            if key is not None:
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))


_SafeDumper: Any = yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper


class _Dumper(_SafeDumper):
    """Quote the texts that `_Loader`, or another reader of YAML, would take for something else."""

    yaml_implicit_resolvers = {
        first: [*_Loader.yaml_implicit_resolvers.get(first, []), *resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that occurs twice out twice."""
        return True


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says; `yaml.YAMLError` when it is not valid."""
    return load_plain(text, _Loader)


def read_yaml_section(text: str, source: str) -> dict[str, Any]:
    """Return the keys of a YAML file's text.

    Raises:
        ConfigError: it is not YAML (with the line), or holds something else than keys.
    """
    try:
        content = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_message(error, source)) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: expected keys and values, got {describe(content)}")
    return _without_sharing(content)


def write_yaml(content: Any) -> str:
    """Return a YAML text that `parse_yaml` reads back equal, with keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**20)


def describe(value: Any) -> str:
    """Name a value in an error message as its writer would recognise it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 80 else f"'{value[:77]}...'"
    if isinstance(value, dict):
        return f"a section with keys {', '.join(map(str, list(value)[:5]))}" if value else "an empty section"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return str(value)


def _without_sharing(value: Any) -> Any:
    """Copy what YAML aliases share, so that changing one place later does not change the other."""
    if isinstance(value, dict):
        return {key: _without_sharing(inner) for key, inner in value.items()}
    return [_without_sharing(inner) for inner in value] if isinstance(value, list) else value


def _syntax_message(error: yaml.YAMLError, source: str) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"{source}: not valid YAML: {error}"
    mark = error.problem_mark
    snippet = (mark.get_snippet(indent=2) or "").rstrip()
    context = error.context
    if context and error.context_mark is not None and error.context_mark.line != mark.line:
        context += f" from line {error.context_mark.line + 1}"
    parts = [part for part in (context, error.problem) if part]
    where = f"{source}: line {mark.line + 1}, column {mark.column + 1}"
    return f"{where}: not valid YAML: {', '.join(parts)}" + (f"\n{snippet}" if snippet else "")
