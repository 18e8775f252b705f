"""How files, presets and the command line become one configuration, and what is said where they cannot."""

import re

import pytest
import yaml

from trainer.config.compose import compose, parse_value, split_key
from trainer.config.load import load_run_config
from trainer.config.yaml_text import parse_yaml, write_yaml
from trainer.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes files, given by path, and returns their folder."""

    def write(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/")
            path = path.with_suffix(".yml") if not path.suffix else path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def composed(folder, *overrides, name="main.yml"):
    content, problems, _ = compose(folder / name, list(overrides))
    assert not problems
    return content


# Numbers and words as YAML has them


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.e5", 1e5),
        (".5", 0.5),
        ("-1e3", -1000.0),
        ("1_000", 1000),
        ("0x10", 16),
        ("0o17", 15),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2020-01-01", "2020-01-01"),
        ("=", "="),
        ("true", True),
        ("no", False),
        ("~", None),
        ("'1e-4'", "1e-4"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".", "."),
        ("-", [None]),
        ("0", 0),
    ],
)
def test_scalars_are_read_as_their_writer_means_them(text, value):
    read = parse_yaml(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "value", ["1e-4", "010", "no", "y", "2020-01-01", "", "~", "=", "a: b", "# c", "1:30", "0x10", "a\nb"]
)
def test_texts_survive_being_written(value):
    assert parse_yaml(write_yaml({"a": value})) == {"a": value}
    assert yaml.safe_load(write_yaml({"a": value})) == {"a": value}


def test_a_key_given_twice_is_refused_with_its_line(folder):
    with pytest.raises(ConfigError, match=r"main\.yml: line 3, column 1: .*the key 'a' is given twice"):
        composed(folder(main="a: 1\nb: 2\na: 3\n"))


def test_merge_keys_of_yaml_work(folder):
    assert composed(folder(main="x: &x {a: 1, b: 2}\ny:\n  <<: *x\n  b: 3\n"))["y"] == {"a": 1, "b": 3}


def test_an_override_of_an_aliased_section_changes_one_place(folder):
    content = composed(folder(main="x: &x {a: 1}\ny: *x\n"), "x.a=2")
    assert content == {"x": {"a": 2}, "y": {"a": 1}}


# Files that cannot be read


def test_a_syntax_error_is_told_with_its_line(folder):
    with pytest.raises(ConfigError, match=r"main\.yml: line 3, column 2: not valid YAML: .* from line 2"):
        composed(folder(main="a: 1\nb: [1, 2\nc: 3\n"))


def test_a_tab_is_told_with_its_line(folder):
    with pytest.raises(ConfigError, match=r"line 2, column 1: not valid YAML: .*'\\t'"):
        composed(folder(main="a:\n\tb: 1\n"))


def test_a_missing_file_is_told_with_the_nearest_one(folder):
    with pytest.raises(ConfigError, match=r"mian\.yml: no such file; did you mean 'main\.yml'\?"):
        composed(folder(main="a: 1"), name="mian.yml")


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"x\.yml: no such file; there is no YAML file in"):
        compose(tmp_path / "nowhere" / "x.yml", [])


def test_a_folder_in_place_of_a_file_is_told(folder):
    with pytest.raises(ConfigError, match=r"is a folder; name one of its files \(main\)"):
        compose(folder(main="a: 1"), [])


def test_a_binary_file_is_told(tmp_path):
    (tmp_path / "main.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        composed(tmp_path)


def test_a_file_that_holds_a_list_is_told(folder):
    with pytest.raises(ConfigError, match=r"expected keys and values, got a list of 2"):
        composed(folder(main="- 1\n- 2\n"))


def test_a_section_that_holds_itself_is_told(folder):
    with pytest.raises(ConfigError, match="itself"):
        composed(folder(main="a: &a\n  b: *a\n"))


# Defaults lists


def test_a_file_beside_is_merged_below_the_files_own_content(folder):
    files = folder(main="defaults: [base]\na: {x: 1}\n", base="a: {x: 0, y: 0}\nb: [1, 2]\n")
    assert composed(files) == {"a": {"x": 1, "y": 0}, "b": [1, 2]}


def test_self_says_where_the_files_own_content_goes(folder):
    files = folder(main="defaults: [_self_, base]\na: 1\n", base="a: 0\n")
    assert composed(files) == {"a": 0}


def test_a_group_is_merged_under_its_name(folder):
    files = folder(
        main="defaults:\n  - optimizer: adamw\noptimizer: {args: {lr: 1}}\n",
        optimizer__adamw="name: AdamW\nargs: {lr: 0, betas: [0, 1]}\n",
    )
    assert composed(files) == {"optimizer": {"name": "AdamW", "args": {"lr": 1, "betas": [0, 1]}}}


def test_both_suffixes_of_yaml_work(folder):
    files = folder(
        **{"main.yaml": "defaults: [base, {model: m}]\n", "base.yaml": "a: 1\n", "model__m": "b: 2\n"}
    )
    assert composed(files, name="main.yaml") == {"a": 1, "model": {"b": 2}}


def test_a_preset_with_both_suffixes_is_refused(folder):
    with pytest.raises(ConfigError, match="keep one"):
        composed(folder(**{"main": "defaults: [base]\n", "base.yaml": "a: 1\n", "base.yml": "a: 1\n"}))


def test_a_list_replaces_a_list(folder):
    assert composed(folder(main="defaults: [base]\na: [1]\n", base="a: [2, 3]\n")) == {"a": [1]}


def test_groups_nest(folder):
    files = folder(
        main="defaults:\n  - training: quick\n",
        training__quick="defaults:\n  - general: small\nepochs: 1\n",
        training__general__small="size: 2\n",
    )
    assert composed(files) == {"training": {"epochs": 1, "general": {"size": 2}}}
    folder(training__general__large="size: 9\n")
    assert composed(files, "training/general=large")["training"]["general"] == {"size": 9}


def test_a_global_preset_is_merged_at_the_top(folder):
    files = folder(
        main="defaults:\n  - experiment: big\na: 1\n", experiment__big="# @package _global_\nb: 2\n"
    )
    assert composed(files) == {"a": 1, "b": 2}


def test_a_preset_in_another_folder_is_named_by_its_path(folder):
    files = folder(main="defaults: [model/tiny]\n", model__tiny="dim: 2\n")
    assert composed(files) == {"model": {"dim": 2}}


def test_a_file_in_the_folder_above_is_merged(folder):
    files = folder(base="a: 1\n", sub__main="defaults: [../base]\nb: 2\n")
    assert composed(files, name="sub/main.yml") == {"a": 1, "b": 2}


def test_an_optional_preset_may_be_missing(folder):
    assert composed(folder(main="defaults:\n  - optional local: mine\na: 1\n")) == {"a": 1}


def test_a_later_entry_overrides_the_choice_of_an_earlier_one(folder):
    files = folder(
        main="defaults: [base, {override optimizer: muon}]\n",
        base="defaults: [{optimizer: adamw}]\n",
        optimizer__adamw="name: AdamW\n",
        optimizer__muon="name: Muon\n",
    )
    assert composed(files)["optimizer"]["name"] == "Muon"
    assert composed(files, "optimizer=adamw")["optimizer"]["name"] == "AdamW"


def test_a_circle_of_defaults_is_told(folder):
    files = folder(main="defaults: [a]\n", a="defaults: [b]\n", b="defaults: [a]\n")
    with pytest.raises(ConfigError, match=r"go round in a circle: main\.yml -> a\.yml -> b\.yml -> a\.yml"):
        composed(files)


def test_the_same_file_twice_is_no_circle(folder):
    files = folder(main="defaults: [a, b]\n", a="defaults: [c]\n", b="defaults: [c]\n", c="x: 1\n")
    assert composed(files) == {"x": 1}


def test_a_missing_preset_is_told_with_the_nearest_one(folder):
    files = folder(main="defaults:\n  - optimizer: adam\n", optimizer__adamw="a: 1\n")
    with pytest.raises(
        ConfigError, match=r"main\.yml: defaults: there is no .*adam\.yml; did you mean 'adamw'\?"
    ):
        composed(files)


@pytest.mark.parametrize("entry", ["3", "[a]", "{a: b, c: d}", "null"])
def test_an_entry_that_names_nothing_is_refused(folder, entry):
    with pytest.raises(ConfigError, match="expected a file name"):
        composed(folder(main=f"defaults: [{entry}]\n"))


@pytest.mark.parametrize("key", ["''", "' '", "/"])
def test_an_entry_with_an_empty_key_is_refused(folder, key):
    with pytest.raises(
        ConfigError, match=r"main\.yml: defaults: '.?' is not understood; write `- group: name`"
    ):
        composed(folder(main=f"defaults: [{{{key}: base}}]\n", base="a: 1\n"))


def test_entries_for_hydra_do_nothing(folder):
    files = folder(
        main="defaults:\n  - override hydra/job_logging: disabled\n  - _self_\nhydra: {run: {dir: .}}\na: 1\n"
    )
    assert composed(files, "hydra.run.dir=.", "hydra.output_subdir=null", "hydra/launcher=x") == {"a": 1}


# Presets from the command line


def test_a_preset_is_picked_where_its_folder_exists(folder):
    files = folder(
        main="defaults:\n  - optimizer: adamw\na: 1\n",
        optimizer__adamw="name: AdamW\n",
        optimizer__muon="name: Muon\n",
    )
    assert composed(files, "optimizer=muon") == {"optimizer": {"name": "Muon"}, "a": 1}


def test_a_preset_that_no_file_names_goes_on_top(folder):
    files = folder(main="optimizer: {name: AdamW, lr: 1}\n", optimizer__muon="name: Muon\n")
    assert composed(files, "optimizer=muon") == {"optimizer": {"name": "Muon", "lr": 1}}


def test_a_preset_may_be_dropped(folder):
    files = folder(main="defaults:\n  - optimizer: adamw\na: 1\n", optimizer__adamw="name: AdamW\n")
    assert composed(files, "optimizer=null") == {"a": 1}


def test_a_missing_preset_on_the_command_line_is_told_with_what_there_is(folder):
    files = folder(main="a: 1\n", optimizer__adamw="a: 1\n", optimizer__muon="a: 1\n")
    with pytest.raises(ConfigError, match=r"the command line: there is no .*zzz\.yml; allowed: adamw, muon"):
        composed(files, "optimizer=zzz")


def test_values_are_set_after_presets(folder):
    files = folder(main="a: 1\n", optimizer__muon="lr: 1\n")
    assert composed(files, "optimizer.lr=2", "optimizer=muon")["optimizer"] == {"lr": 2}


def test_a_folder_without_yaml_is_no_group(folder):
    files = folder(main="checkpoints: a\n")
    (files / "checkpoints").mkdir()
    assert composed(files, "checkpoints=b") == {"checkpoints": "b"}


# Values from the command line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-4", 1e-4),
        ("true", True),
        ("null", None),
        ("", None),
        ("[1, a]", [1, "a"]),
        ("{a: 1, b: [2]}", {"a": 1, "b": [2]}),
        ("'3'", "3"),
        ('"a b"', "a b"),
        ("/data/my cells/[old] run, v=2/x.h5ad", "/data/my cells/[old] run, v=2/x.h5ad"),
        ("[old]/x.h5ad", "[old]/x.h5ad"),
        ("{a}/b", "{a}/b"),
        ("*.h5ad", "*.h5ad"),
        ("a=b=c", "a=b=c"),
        ("/data/run #3/x", "/data/run #3/x"),
        ("#3", "#3"),
        ("note: this", "note: this"),
        ("- a", "- a"),
        ("C:\\x", "C:\\x"),
        ("@a", "@a"),
        ("%x", "%x"),
        ("a, b", "a, b"),
        ("!tag x", "!tag x"),
        ("&a b", "&a b"),
    ],
)
def test_a_value_is_yaml_where_it_can_be_and_literal_where_not(text, value):
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


@pytest.mark.parametrize("key", ["datasets.1.lr", "datasets[1].lr"])
def test_an_entry_of_a_list_is_reached_by_its_index(folder, key):
    assert composed(folder(main="datasets: [{lr: 1}, {lr: 2}]\n"), f"{key}=3")["datasets"] == [
        {"lr": 1},
        {"lr": 3},
    ]


def test_keys_split_at_dots_and_brackets():
    assert split_key("a[0][1].b.2") == ["a", "0", "1", "b", "2"]


def test_absent_keys_may_be_set(folder):
    assert composed(folder(main="a:\n"), "a.b.c=1", "+d=2", "++e.f=3") == {
        "a": {"b": {"c": 1}},
        "d": 2,
        "e": {"f": 3},
    }


def test_later_values_replace_earlier_ones(folder):
    assert composed(folder(main="a: {x: 1}\n"), "a.x=2", "a={y: 3}", "a.z=4") == {"a": {"y": 3, "z": 4}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a.2=1", r"^a\.2: index 2 is out of range: a has 2 entries, the last index is 1"),
        ("a.2.x=1", r"^a\.2\.x: index 2 is out of range"),
        ("a.x=1", r"^a\.x: a is a list; give an index, as a\.0"),
        ("a[-1]=1", r"is not a key"),
        ("b.c=1", r"^b\.c: b is 3, which has no keys below it"),
        ("a..b=1", r"is not a key"),
        ("lr", r"^'lr' is not key=value"),
        ("=3", r"^'=3' is not key=value"),
    ],
)
def test_an_override_that_reaches_nothing_is_told(folder, override, message):
    _, problems, _ = compose(folder(main="a: [1, 2]\nb: 3\n") / "main.yml", [override])
    assert len(problems) == 1 and re.search(message, problems[0].line())


# Who wrote a mistake

PHASES = """run_name: a
model: {model_class: toy.ToyModel}
optimizer: {optimizer_args: {lr: 1.0}}
datasets: [{name: b, dataloader_factory: toy.map_loader}]
"""
"""A configuration without mistakes."""
KINDS = {
    "phases": (PHASES, "seed"),
    "cells": ("data: {paths: [x]}\n", "data.hvg_n_top_genes"),
    "circuits": ("general: {dataset: x, output_path: out}\n", "training.num_epochs"),
}


def refused(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(("text", "key"), KINDS.values(), ids=KINDS)
def test_a_mistake_names_the_file_or_the_command_line_that_it_stands_in(folder, text, key):
    wrong = yaml.safe_dump(nested(key, "many"))
    path = (
        folder(main=f"defaults: [own]\n{text}", own=wrong, right=text, both=f"defaults: [own]\n{text}")
        / "main.yml"
    )
    assert refused(path).startswith(f"{path.parent / 'own.yml'}: {key}: ")
    assert refused(path.parent / "right.yml", f"{key}=many").startswith(f"the command line: {key}: ")
    first, *listed = refused(path, "sede=1").splitlines()
    assert first == f"{path}: 2 mistakes"
    assert {line.split(": ")[0].strip() for line in listed} == {
        "the command line",
        str(path.parent / "own.yml"),
    }


def nested(key, value):
    head, _, rest = key.partition(".")
    return {head: nested(rest, value) if rest else value}


def test_a_mistake_in_a_preset_names_the_preset(folder):
    path = (
        folder(main=f"{PHASES}defaults: [{{checkpoint: few}}]\n", checkpoint__few="keep_lats: 1\n")
        / "main.yml"
    )
    assert refused(path).startswith(
        f"{path.parent / 'checkpoint' / 'few.yml'}: checkpoint.keep_lats: unknown key"
    )


def test_a_value_that_the_command_line_replaces_is_no_longer_the_files(folder):
    path = folder(main=PHASES) / "main.yml"
    wrong = "datasets=[{name: b, dataloader_factory: toy.map_loader, epoch: 1}]"
    assert refused(path, wrong).startswith("the command line: datasets.0.epoch: unknown key")
    assert refused(path, "model.size=3").startswith("the command line: model.size: unknown key")
    assert refused(path, "early_stopping.patience=0").startswith(
        "the command line: early_stopping.patience: "
    )


def test_a_contradiction_says_what_the_command_line_has_to_do_with_it(folder):
    path = folder(main=f"{PHASES}global_batch_size: 8\n") / "main.yml"
    assert refused(path, "gradient_accumulation_steps=2").endswith(
        "; gradient_accumulation_steps is from the command line"
    )
    assert refused(path, "use_wandb=false", "wandb_project=x", "trackers=[wandb]").count("is from") == 0
    assert refused(path, "fp8.fallback_steps=1").endswith("set precision: fp8, or remove it")
    assert refused(path, "data.paths=x").endswith("keep one; data is from the command line")


# Interpolations


def test_interpolations_see_presets_and_overrides(folder):
    files = folder(
        main="defaults: [base]\nname: run_${size}_${sub.x}\nsub: {x: '${size}'}\n", base="size: 1\n"
    )
    assert composed(files, "size=7")["name"] == "run_7_7"
    assert composed(files, "size=7")["sub"]["x"] == 7


def test_a_section_can_be_interpolated(folder):
    assert composed(folder(main="a: {x: [1, 2]}\nb: ${a}\n"))["b"] == {"x": [1, 2]}


def test_environment_variables_are_read(folder, monkeypatch):
    monkeypatch.setenv("CELLPHASE_TEST", "/data/x y")
    files = folder(main="a: ${oc.env:CELLPHASE_TEST}/z\nb: ${oc.env:CELLPHASE_UNSET,default}\n")
    assert composed(files) == {"a": "/data/x y/z", "b": "default"}


def test_config_dir_is_the_folder_of_the_file_that_was_named(folder):
    where = folder(sub__run="path: ${config_dir:}/data\n")
    assert composed(where / "sub", name="run.yml")["path"] == f"{(where / 'sub').resolve()}/data"


def test_an_override_may_interpolate(folder):
    assert composed(folder(main="a: 1\nb: 2\n"), "b=${a}") == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: ${oc.env:CELLPHASE_UNSET}", r"a: the environment variable CELLPHASE_UNSET is not set"),
        ("a: {b: '${missing}'}", r"a\.b: Interpolation key 'missing' not found"),
        ("a: [1, '${x.y}']", r"a\.1: Interpolation key 'x.y' not found"),
        ("a: ${now:%Y}", r"a: Unsupported interpolation type now"),
        ("a: ${b}\nb: ${a}", r"a: Recursive interpolation"),
        ("a: {b: '${a}'}", r"a\.b: Interpolation to parent node"),
        ("a: ???", r"a: the file says \?\?\?"),
    ],
)
def test_an_interpolation_that_gives_nothing_is_told_with_its_place(folder, text, message):
    _, problems, _ = compose(folder(main=text) / "main.yml", [])
    assert re.search(message, "\n".join(problem.line() for problem in problems))


def test_an_interpolation_that_is_not_closed_is_told(folder):
    with pytest.raises(ConfigError, match=r"a\.b: `\$\{\.\.\.\}` is not well formed"):
        composed(folder(main="a: {b: '${oops'}\n"))


def test_sections_interpolated_into_each_other_are_told(folder):
    with pytest.raises(ConfigError, match="itself part of"):
        composed(folder(main="a: {x: '${b}'}\nb: {y: '${a}'}\n"))


# Which kind of config a file is


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("general: {dataset: x}\n", r"general\.output_path: is required"),
        ("training: {general: {}}\n", r"training\.general\.dataset: is required"),
        (
            "general: {}\ntraining: {general: {}}\n",
            r"`general` and `training\.general` both begin a circuits config; keep one of the two",
        ),
        (
            "datasets: []\ndata: {}\ntokenizer: {}\n",
            r"`datasets` makes this a phases config and `data`, `tokenizer` a cells config; keep one",
        ),
        (
            "general: {}\neval: {}\n",
            r"`general` makes this a circuits config and `eval` a cells config; keep one",
        ),
        ("model: {architecture: x}\n", r"model\.architecture: got 'x'; allowed: transformer_encoder"),
        ("datas: {}\n", r"expected `datasets`.*did you mean it by `datas`\?"),
        (
            "datasets: []\ngeneral: {}\n",
            r"`datasets` makes this a phases config and `general` a circuits config; keep one",
        ),
        ("run_name: x\n", r"expected `datasets`, the list of phases, at the top level"),
        ("dataset: []\n", r"expected `datasets`.*did you mean it by `dataset`\?"),
        ("", r"expected `datasets`"),
    ],
)
def test_the_kind_of_a_config_is_told_from_its_keys(folder, text, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(folder(main=text) / "main.yml", [])
