"""What a fresh clone stands on: the pinned versions, the Makefile, CI, the licence and the launch configs."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
INSTALLED_EXTRAS = ("dev", "preprocess", "census", "vcc")


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned_lines():
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned():
    return {normal(name): Version(version) for name, version in (line.split("==") for line in pinned_lines())}


def required():
    extras = project()["optional-dependencies"]
    lines = project()["dependencies"] + [line for extra in INSTALLED_EXTRAS for line in extras[extra]]
    return [Requirement(line) for line in lines]


def make(*arguments):
    command = ["make", "--no-print-directory", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("requirement", required(), ids=lambda requirement: requirement.name)
def test_every_dependency_is_pinned_to_a_version_that_it_allows(requirement):
    version = pinned().get(normal(requirement.name))
    assert version is not None, f"constraints.txt has no line for {requirement.name}"
    assert requirement.specifier.contains(version, prereleases=True)


def test_constraints_are_exact_versions_without_a_local_label():
    for line in pinned_lines():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", line), line
    assert len(pinned()) == len(pinned_lines())
    assert pinned_lines() == sorted(pinned_lines(), key=str.lower)


def test_torch_is_taken_in_the_build_that_the_machine_offers():
    assert "torch==2.13.0" in pinned_lines()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "runs"),
    [
        ("quickstart", "-m trainer.quickstart"),
        ("test", "-m pytest"),
        ("check", "ruff format --check"),
        ("bench", "for script in"),
    ],
)
def test_every_target_installs_first_in_a_fresh_clone(tmp_path, target, runs):
    commands = make(target, f"VENV={tmp_path}/venv", "PYTHON=python3.11")
    assert "pip install" in commands and "-c constraints.txt" in commands
    assert commands.index("pip install") < commands.index(runs)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_cleaning_leaves_runs_and_checkpoints_alone():
    removed = " ".join(make("clean").split())
    assert ".venv" in removed and "runs" not in removed and "checkpoints" not in removed


def test_ci_is_a_script_that_can_be_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)
    text = script.read_text()
    assert all(f"make {target}" in text for target in ("install", "check", "test"))


def test_the_licence_is_the_apache_licence_unedited():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and "Copyright [yyyy] [name of copyright owner]" in text
    assert len(text.splitlines()) >= 201
    assert project()["license"] == "Apache-2.0"


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout"
)
def test_git_ignores_no_source_file():
    files = [
        str(path.relative_to(ROOT))
        for folder in (
            "trainer",
            "models",
            "data",
            "tests",
            "configs",
            "accelerate_configs",
            "ds_configs",
            "docs",
        )
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    command = ["git", "-C", str(ROOT), "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(command, input="\n".join(files), capture_output=True, text=True, timeout=60)
    assert ignored.stdout == ""


def test_the_console_script_exists():
    module, function = project()["scripts"]["cellphase"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_accelerate_reads_every_launch_config():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((ROOT / "accelerate_configs").glob("*.y*ml"))
    assert {"cpu.yaml", "cpu_2_processes.yaml"} <= {file.name for file in files}
    for file in files:
        load_config_from_file(str(file))


def test_one_place_creates_the_accelerator():
    creators = [
        file.relative_to(ROOT).as_posix()
        for package in ("trainer", "models", "data")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) == "Accelerator"
    ]
    assert creators == ["trainer/distributed.py"]
