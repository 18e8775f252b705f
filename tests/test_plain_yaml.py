"""YAML from files that nobody vouches for: every mistake is one kind of error, and nothing hangs or grows."""

import pytest
import yaml
from launching import ROOT

from data.circuit_folder import open_circuit_sets
from data.errors import DataError
from data.plain_yaml import load_plain
from trainer.config import compose as composition
from trainer.config.compose import compose
from trainer.config.yaml_text import _Dumper, parse_yaml, write_yaml
from trainer.errors import ConfigError

# 600 bytes that stand for 9**10 values.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)


@pytest.mark.skipif(not yaml.__with_libyaml__, reason="PyYAML was built without libyaml")
@pytest.mark.parametrize("path", sorted(ROOT.glob("**/*configs/**/*.y*ml")), ids=lambda path: path.name)
def test_libyaml_and_pyyaml_agree(path, monkeypatch):
    text = path.read_text()
    values = parse_yaml(text)
    monkeypatch.setattr(yaml, "__with_libyaml__", False)
    assert repr(parse_yaml(text)) == repr(values)
    own = type("Own", (yaml.SafeDumper,), {"yaml_implicit_resolvers": _Dumper.yaml_implicit_resolvers})
    own.ignore_aliases = _Dumper.ignore_aliases
    written = yaml.dump(values, Dumper=own, sort_keys=False, allow_unicode=True, width=2**20)
    assert write_yaml(values) == written


def test_aliases_are_shared_values():
    assert load_plain("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, y: 2}\n") == {
        "a": {"x": 1},
        "b": [{"x": 1}, {"x": 1}],
        "c": {"x": 1, "y": 2},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "aliases stand for more than 1,000,000 values"),
        ("a: &a [*a]", r"the alias \*a refers to a section that it is itself part of"),
        ("a: &a {<<: *a}", r"the alias \*a refers to a section that it is itself part of"),
        ("[" * 20_000, "nested more than 64 levels deep"),
        ("{a: " * 5_000, "nested more than 64 levels deep"),
        ("a: !!int abc", "'abc' is no int"),
        ("a: !!float abc", "'abc' is no float"),
        ("a: !!timestamp abc", "'abc' is no timestamp"),
        ("a: !!bool maybe", "'maybe' is no bool"),
        ("a: " + "9" * 5_000, "'9+' is no int"),
        ("a: 0x" + "f" * 5_000, "a whole number is too long"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    ],
)
def test_a_text_that_is_no_plain_value_is_a_yaml_error(text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        load_plain(text)


def test_a_configuration_of_aliases_that_unfold_is_refused_with_its_line(tmp_path):
    (tmp_path / "main.yml").write_text(BOMB)
    with pytest.raises(
        ConfigError, match=r"main.yml: line \d+, .*aliases stand for more than 1,000,000 values"
    ):
        compose(tmp_path / "main.yml", [])


def doubling(line, depth=9):
    """Return a configuration of a few hundred bytes, each line of which stands for the former one twice."""
    return "k0: xxxxxxxxxx\n" + "".join(line.format(level, level - 1) for level in range(depth, 0, -1))


@pytest.mark.parametrize(
    "text",
    [doubling('k{0}: "${{k{1}}}${{k{1}}}"\n', depth=14), f'a: {"x" * 100_000}\nb: "{"${a}" * 2_000}"\n'],
    ids=["number", "length"],
)
def test_interpolations_that_unfold_are_refused_at_the_bounds_that_are_told(tmp_path, text):
    (tmp_path / "main.yml").write_text(text)
    with pytest.raises(ConfigError, match=r"interpolations are more than 5,000 .*, or stand for more than"):
        compose(tmp_path / "main.yml", [])


@pytest.mark.parametrize(
    "text",
    [
        doubling('k{0}: "${{k{1}}}${{k{1}}}"\n'),
        doubling('k{0}: ["${{k{1}}}", "${{k{1}}}"]\n'),
        doubling('k{0}: {{a: "${{k{1}}}", b: "${{k{1}}}"}}\n'),
        doubling('k{0}: "${{oc.select:k{1}}}${{oc.select:k{1}}}"\n'),
        doubling('k{0}: {{s: {{t: "${{k{1}.s.t}}${{k{1}.s.t}}"}}}}\n').replace("k0: x", "k0: {s: {t: x}} #"),
    ],
    ids=["text", "lists", "sections", "resolvers", "inner sections"],
)
def test_interpolations_that_unfold_are_refused(tmp_path, text, monkeypatch):
    monkeypatch.setattr(composition, "_MOST_INTERPOLATIONS", 150)  # 5,000 take seconds
    (tmp_path / "main.yml").write_text(text)
    with pytest.raises(ConfigError, match=r"interpolations are more than 150 .*, or stand for more than"):
        compose(tmp_path / "main.yml", [])


def test_a_set_of_circuits_described_by_aliases_that_unfold_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(BOMB + "target: *a9\n")
    with pytest.raises(DataError, match="aliases stand for more than 1,000,000 values"):
        open_circuit_sets(tmp_path)
