"""The documentation is true: its examples train, its tables are what the code says, its paths and messages exist.

`python tests/test_docs.py` writes the generated tables of docs/configuration.md again.
"""

import ast
import contextlib
import copy
import dataclasses
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import sys
from pathlib import Path
from pkgutil import resolve_name
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from census_files import write_census

from data.cell_source import cell_loader
from data.hf import hf_loader
from data.prepared import h5ad_loader
from models.encoder import EncoderConfig
from models.families import FAMILIES
from models.fine_tuned import FineTunedConfig
from models.lora import LoraSettings
from trainer.config import json_schema, load_run_config

pytestmark = pytest.mark.usefixtures("forked_programs")

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.y*ml"))
PHASES_CONFIGS = [path for path in CONFIGS if re.search(r"^datasets:", path.read_text(), re.MULTILINE)]
SAMPLES = sorted((ROOT / "data" / "samples").glob("*.h5ad"))
TYPED_PAGES = ("cells.md", "circuits.md", "sampling_circuits.md")
"""Pages whose YAML blocks are typed configurations."""
HAS_SOMA = importlib.util.find_spec("tiledbsoma") is not None
HAS_VCC = importlib.util.find_spec("cell_eval2") is not None
H5AD_TITLE = "`dataloader_args` of `data.prepared.h5ad_loader`, beside those of `data.loader.cell_loader`"
BEGIN = "<!-- generated from the code by `python tests/test_docs.py`; do not edit -->"
END = "<!-- end of what is generated -->"


def page_id(path):
    return path.relative_to(ROOT).as_posix()


def blocks(page, language):
    """Return the fenced code blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


# The tables of docs/configuration.md


def render_tables():
    """Return the generated part of docs/configuration.md."""
    schema = json_schema()
    sections = [("The run", schema)]
    where = {
        "ModelConfig": "model",
        "OptimizerConfig": "optimizer",
        "ParameterGroup": "optimizer.groups[]",
        "LossConfig": "loss",
        "PhaseConfig": "datasets[]",
        "ValidationConfig": "datasets[].validation",
        "BenchmarksConfig": "datasets[].benchmarks",
        "BenchmarkConfig": "datasets[].benchmarks.specs[]",
        "ScoringConfig": "datasets[].scoring",
        "OneCycleConfig": "datasets[].one_cycle",
        "EarlyStoppingConfig": "early_stopping",
        "EmaConfig": "ema",
        "ExportConfig": "export_to",
        "CheckpointConfig": "checkpoint",
        "TrackerConfig": "trackers[]",
        "Fp8Config": "fp8",
        "LaunchConfig": "launch",
    }
    assert where.keys() == schema["$defs"].keys(), "a section of the schema has no place in the documentation"
    sections += [(f"`{path}`", schema["$defs"][name]) for name, path in where.items()]
    parts = [_schema_table(title, section, where) for title, section in sections]
    shared = inspect.signature(cell_loader).parameters.keys()
    encoder, *other_families = (family.config_class for family in FAMILIES.values())
    assert resolve_name(encoder) is EncoderConfig
    for title, target, heading, told in (
        ("`dataloader_args` of `data.loader.cell_loader`", cell_loader, "Args:", ()),
        (H5AD_TITLE, h5ad_loader, "Args:", shared - {"tokenizer"}),
        ("`dataloader_args` of `data.hf.hf_loader`", hf_loader, "Args:", ()),
        ("`config_args` of `models.encoder.EncoderConfig`", EncoderConfig, "Attributes:", ()),
        *(_family_table(path) for path in other_families),
        ("`config_args` of `models.fine_tuned.FineTunedConfig`", FineTunedConfig, "Attributes:", ()),
        ("`lora` of `models.fine_tuned.FineTunedConfig`", LoraSettings, "Attributes:", ()),
    ):
        parts.append(_signature_table(title, target, _described(target, heading), told))
    return "\n\n".join(parts)


def _family_table(path):
    config_class = resolve_name(path)
    title = f"`config_args` of `{path}`, where they are not an encoder's"
    return title, config_class, "Attributes:", _as_encoder(config_class)


def _as_encoder(config_class):
    """Return the fields that mean what they mean of an encoder, with the same default."""
    meanings, own = (_described(each, "Attributes:") for each in (EncoderConfig, config_class))
    defaults, others = (inspect.signature(each).parameters for each in (EncoderConfig, config_class))
    return {
        name
        for name in others
        if name in defaults and meanings[name] == own[name] and defaults[name].default == others[name].default
    }


def _schema_table(title, section, where):
    rows = []
    for key, field in section["properties"].items():
        if key in section.get("required", []):
            default = "required"
        elif "default" in field:
            default = _default(field["default"])
        elif "$ref" in field:
            default = "the defaults below"
        else:
            default = _default({}) if field.get("type") == "object" else "none"
        rows.append((f"`{key}`", _kind(field, where), default, field.get("description", "")))
    return _table(title, rows)


def _signature_table(title, target, meanings, told):
    rows = []
    hints = inspect.get_annotations(target, eval_str=True) if inspect.isfunction(target) else {}
    if dataclasses.is_dataclass(target):
        hints = {field.name: field.type for field in dataclasses.fields(target)}
    for name, parameter in inspect.signature(target).parameters.items():
        if name in told:
            continue
        default = "required" if parameter.default is parameter.empty else _default(parameter.default)
        meaning = re.sub(r"\bNone\b", "null", meanings[name].rstrip("."))
        rows.append((f"`{name}`", _annotation(hints[name]), default, meaning[0].upper() + meaning[1:]))
    return _table(title, rows)


def _table(title, rows):
    lines = [f"## {title}", "| key | value | default | meaning (unit) |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(re.sub(r"([|<])", r"\\\1", cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _default(value):
    return f"`{json.dumps(value)}`"


def _kind(field, where):
    """Say in words what a JSON schema allows; `${...}`, allowed anywhere, is left out."""
    if "$ref" in field:
        return f"section `{where[field['$ref'].rpartition('/')[2]]}`"
    if "anyOf" in field:
        choices = [_kind(choice, where) for choice in field["anyOf"] if choice.get("pattern") != r"\$\{"]
        return " or ".join(dict.fromkeys(choices))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{word}`" for word in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_kind(field['items'], where)}" if "items" in field else "list"
    if field.get("type") == "object":
        inner = field.get("additionalProperties")
        return f"keys with {_kind(inner, where)}" if isinstance(inner, dict) else "keys and values"
    names = {
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "integer": "whole number",
        "number": "number",
    }
    limits = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    bounds = [f"{words} {field[key]:g}" for key, words in limits.items() if key in field]
    return " ".join([names.get(field.get("type"), "anything"), *([", ".join(bounds)] if bounds else [])])


def _annotation(hint):
    """Say in words what a Python annotation allows."""
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    literal = re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", text)
    if literal:
        return ", ".join(f"`{word.strip().strip(chr(39))}`" for word in literal[1].split(","))
    words = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "None": "null"}
    choices = []
    for part in text.split(" | "):
        part = part.strip()
        if "Mapping" in part:
            choices.append("keys and values")
        elif "tuple" in part or "Sequence" in part:
            item = words[part.partition("[")[2].strip("], .")]
            choices.append(f"list of {item}s".replace("texts", "text"))
        elif not part.endswith("Path"):
            choices.append(words[part])
    return " or ".join(choices)


def _described(target, heading):
    """Return what Google docstrings say of each argument: a class's own, and those of the classes it extends."""
    meanings = {}
    for owner in reversed(target.__mro__[:-1]) if inspect.isclass(target) else [target]:
        _, _, text = inspect.cleandoc(owner.__doc__ or "").partition(f"{heading}\n")
        entries = re.split(r"^    (?=\w+: )", text, flags=re.MULTILINE)
        pairs = [entry.partition(": ") for entry in entries if entry.strip()]
        meanings |= {name: " ".join(meaning.split()) for name, _, meaning in pairs}
    return meanings


def write_tables():
    path = ROOT / "docs" / "configuration.md"
    path.write_text(with_tables(path.read_text()))


def with_tables(text):
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{render_tables()}\n\n{END}{tail}"


def test_the_configuration_tables_are_what_the_schema_says():
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert BEGIN in text and END in text
    assert text == with_tables(text), "out of date; write it again: python tests/test_docs.py"


def test_every_key_has_a_meaning():
    for line in render_tables().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.replace("\\|", "").strip("|").split("|")]
            assert len(cells) == 4 and all(cells), line


@pytest.mark.parametrize(
    ("heading", "module", "build"),
    [
        (
            "tokenizer",
            "data.tokenizer_options",
            lambda m: [
                m.build_tokenizer(options, value_kind="counts", measured=[])
                for options in (
                    {"strategy": "binned_expression"},
                    {
                        "strategy": "binned_expression",
                        "binning_method": "quantile",
                        "n_bins": 3,
                        "edges": [1],
                    },
                    {"strategy": "rank_value"},
                )
            ],
        ),
        ("preprocessing", "data.preprocessing", lambda m: m.Preprocessing.read({})),
        ("masking", "data.masking", lambda m: m.build_masking({})),
    ],
)
def test_the_tables_of_options_name_what_the_code_reads(heading, module, build):
    module = sys.modules[module]
    read = {}

    class Recording(module.Options):
        def _take(self, name, default, is_valid, allowed):
            read.setdefault(name, default)
            return super()._take(name, default, is_valid, allowed)

    with mock.patch.object(module, "Options", Recording):
        build(module)
    text = (ROOT / "docs" / "configuration.md").read_text()
    section = text.partition(f"## `{heading}`")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \|", section, re.MULTILINE)
    assert {name for name, _ in rows} == read.keys()
    for name, default in rows:
        if re.fullmatch(r"`[^`]*`", default):
            expected = "null" if read[name] is None else str(read[name]).lower()
            assert default.strip("`").rstrip("0").rstrip(".") == expected.rstrip("0").rstrip("."), name


# Examples


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Make a folder that is as the documentation says: its corpora, and the modules of its examples."""
    from data.simulator import write_simulated_h5ad
    from trainer.convert_h5ad import main

    folder = tmp_path_factory.mktemp("docs")
    (folder / "data").mkdir()
    (folder / "data" / "samples").symlink_to(ROOT / "data" / "samples")
    write_simulated_h5ad(folder / "simulated.h5ad")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        corpora = str(folder / "quickstart" / "corpora")
        arguments = [*map(str, SAMPLES), "--per-file", "--output", corpora]
        assert main([*arguments, "--obs", "cell_type=bulk_labels"]) == 0
        assert main([str(folder / "simulated.h5ad"), "--output", f"{corpora}/simulated"]) == 0
    for name, source in modules():
        (folder / name).write_text(source)
    write_geneformer_cells(folder / "my_geneformer.dataset")
    if HAS_SOMA:
        write_census(folder / "small-census")
    return folder


def write_geneformer_cells(folder):
    """Write a data set with the columns of Geneformer's."""
    from datasets import Dataset, Features, List, Value

    rows = [[2 + (7 * cell + 3 * place) % 198 for place in range(5 + cell % 9)] for cell in range(64)]
    features = Features({"input_ids": List(Value("int32")), "length": Value("int64")})
    content = {"input_ids": rows, "length": [len(row) for row in rows]}
    Dataset.from_dict(content, features=features).save_to_disk(folder)


@pytest.fixture
def inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.syspath_prepend(str(workspace))
    return workspace


def modules():
    """Return the files of the Python blocks that begin with their name, as `# my_model.py`."""
    for page in PAGES:
        for block in blocks(page, "python"):
            name = re.match(r"# (\w+\.py)\n", block)
            if name:
                yield name[1], block


def needs_packages(block):
    """Return the marks of an example that reads the Census, or has a challenge's program score."""
    needs = {"census": (HAS_SOMA, "needs the extra census"), "scoring:": (HAS_VCC, "needs the extra vcc")}
    return [pytest.mark.skipif(not has, reason=why) for word, (has, why) in needs.items() if word in block]


def snippets():
    """Return the Python blocks that are no files."""
    return [
        pytest.param(block, id=f"{page_id(page)}-{number}", marks=needs_packages(block))
        for page in PAGES
        for number, block in enumerate(blocks(page, "python"))
        if not re.match(r"# \w+\.py\n", block)
    ]


def runs():
    """Return whole configurations: the YAML blocks with `datasets`, and the others merged into the page's first.

    Typed configurations are run by tests/test_cells_examples.py.
    """
    # The workspace stands for the repository, in which these files find the corpora.
    texts = {path: path.read_text().replace("${config_dir:}/../", "") for path in PHASES_CONFIGS}
    found = [pytest.param(yaml_of(text), id=page_id(path)) for path, text in texts.items()]
    for page in PAGES:
        whole = None
        if page.name in TYPED_PAGES:
            continue
        for number, block in enumerate(blocks(page, "yaml")):
            content = yaml_of(block)
            if whole is None and "data" in content:
                continue
            whole = content if whole is None and "datasets" in content else whole
            assert whole is not None, f"{page}: the first YAML block is no whole configuration"
            found.append(
                pytest.param(
                    {**whole, **content}, id=f"{page_id(page)}-{number}", marks=needs_packages(block)
                )
            )
    return found


def yaml_of(text):
    from trainer.config.yaml_text import parse_yaml

    return parse_yaml(text)


def test_there_are_examples_to_test():
    assert len(list(modules())) >= 4 and len(snippets()) >= 2 and len(runs()) >= 8


@pytest.mark.parametrize("config", runs())
def test_the_configurations_train(config, inside, tmp_path):
    from running import records, train

    config = copy.deepcopy(config)
    config |= {"device": "cpu", "precision": "fp32" if config.get("precision") != "fp8" else "fp8"}
    config.pop("output_dir", None)
    config.pop("resume_from", None)
    for phase in config["datasets"]:
        phase |= {"max_steps": 2, "epochs": min(1, phase.get("epochs", 1)), "validation_steps": 1}
        if not phase.get("validation") and "val_fraction" not in phase.get("dataloader_args", {}):
            del phase["validation_steps"]
    folder = train(tmp_path, config)
    losses = [record["loss"] for record in records(folder)]
    assert losses and all(isinstance(loss, float) for loss in losses)


@pytest.mark.parametrize("code", snippets())
def test_the_snippets_run(code, inside):
    run = inside / "checkpoints"
    if not run.exists():
        from running import reset_accelerate

        import trainer.train

        reset_accelerate()
        with contextlib.redirect_stdout(io.StringIO()):
            assert trainer.train.main(["--config", str(ROOT / "configs" / "debug.yml")]) == 0
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "<documentation>", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("path", CONFIGS, ids=page_id)
def test_every_shipped_configuration_passes_the_check(path):
    from trainer.dotted import check_dotted_paths

    assert check_dotted_paths(load_run_config(path))


# Commands, paths, links and messages


def commands():
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.partition("  #")[0].strip()
                if line and not line.startswith("#"):
                    yield page, line


def test_the_converters_options_in_the_documentation_exist():
    from trainer.convert_h5ad import build_parser

    parser, seen = build_parser(), 0
    for _, line in commands():
        found = re.search(
            r"(?:python -m trainer\.convert_h5ad|python -m trainer convert|cellphase convert) (.*)", line
        )
        if found and "--help" not in line:
            parser.parse_args(shlex.split(found[1]))
            seen += 1
    assert seen >= 5


def test_the_converters_defaults_in_the_documentation_are_the_programs():
    from trainer.convert_h5ad import build_parser

    defaults = {name: action.default for action in build_parser()._actions for name in action.option_strings}
    text = (ROOT / "docs" / "converting.md").read_text().partition("## All options")[2]
    told = re.findall(r"^\| `(--[\w-]+)[^`]*` \| `?([\w.]+)`? \|", text, re.MULTILINE)
    told = {
        name: value
        for name, value in told
        if value in ("off", "auto", "union", "arrow") or value[0].isdigit()
    }
    assert told.keys() >= {"--rows-per-shard", "--min-genes", "--min-match", "--jobs", "--layer", "--resume"}
    assert told == {name: "off" if defaults[name] is False else str(defaults[name]) for name in told}


def test_the_trainers_commands_in_the_documentation_are_understood():
    from trainer.train import _parse

    seen = 0
    for page, line in commands():
        found = re.search(r"(?:trainer/train\.py|-m trainer train|cellphase train) (.*)", line)
        if not found or "--help" in line:
            continue
        arguments = _parse(shlex.split(found[1]))
        assert not isinstance(arguments, int), f"{page}: {line}"
        named_on_page = Path(arguments.config).name in page.read_text().replace(line, "")
        assert (ROOT / arguments.config).is_file() or named_on_page, f"{page}: {arguments.config}"
        seen += 1
    assert seen >= 5


def test_the_make_targets_in_the_documentation_exist():
    targets = re.findall(r"^(\w+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for page in PAGES:
        for target in re.findall(r"`make (\w+)|^make (\w+)", page.read_text(), re.MULTILINE):
            assert (target[0] or target[1]) in targets, f"{page}: make {target}"


def test_every_relative_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_every_link_into_a_page_finds_its_heading():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", page.read_text()):
            other = page.parent / target if target else page
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert anchor in [_anchor(heading) for heading in headings], f"{page}: {target}#{anchor}"


def _anchor(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_file_of_the_tree_in_the_readme_exists_and_none_is_missing():
    tree = (ROOT / "README.md").read_text().partition("## What is where")[2].partition("\n## ")[0]
    listed, folder = set(), ""
    for line in re.search(r"```\n(.*?)```", tree, re.DOTALL)[1].splitlines():
        if line.strip():
            name = line.split()[0]
            folder = folder if line.startswith(" ") else (name if name.endswith("/") else "")
            path = f"{folder}{name}" if line.startswith(" ") else name
            listed.add(path.rstrip("/"))
            assert list(ROOT.glob(path.rstrip("/"))), f"README: {path}"
    for package in ("trainer", "trainer/config", "trainer/scoring", "models", "data"):
        for file in (ROOT / package).glob("*.py"):
            name = file.relative_to(ROOT).as_posix()
            assert name in listed or file.name == "__init__.py", f"README lists no {name}"


def source_texts():
    """Return the texts of the packages' string literals, `\\0` where a value is filled in."""
    texts = []
    for package in ("trainer", "models", "data"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                    texts.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return texts


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    texts = source_texts()
    assert len(messages) >= 20
    fragments = {
        part.strip() for message in messages for part in message.split("...") if len(part.strip()) > 3
    }
    missing = [fragment for fragment in fragments if not any(fragment in text for text in texts)]
    assert missing == []


def test_every_test_that_the_documentation_names_exists():
    named = [
        (page.name, *found)
        for page in sorted((ROOT / "docs").glob("*.md"))
        for found in re.findall(r"\b(test_\w+\.py): (test_\w+)", page.read_text())
    ]
    tests = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    missing = [found for found in named if f"def {found[2]}(" not in tests.get(found[1], "")]
    assert missing == [] and len(named) > 100


def test_the_documentation_says_nothing_of_the_past_or_of_a_machine():
    for page in PAGES:
        if page.name != "CHANGELOG.md":
            found = re.search(r"\b(?:no longer|previously|used to|TODO|TBD)\b", page.read_text())
            assert found is None, f"{page}: {found}"


if __name__ == "__main__":
    os.chdir(ROOT)
    write_tables()
