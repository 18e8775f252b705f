"""Rules about the tree itself: who imports whom, how files are named, what is packaged."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("trainer", "models", "data")
FORBIDDEN = {"models": {"trainer", "data"}, "data": {"trainer", "models"}}


def imported_modules(file: Path) -> set[str]:
    """Return the top-level names that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def declared_dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [re.split(r"[\[<>=;~! ]", line)[0].lower() for line in project["dependencies"] + extras]


def names_that_must_stay_free() -> set[str]:
    dependencies = declared_dependencies()
    names = {name.replace("-", "_") for name in dependencies}
    for module, distributions in importlib.metadata.packages_distributions().items():
        if {name.lower().replace("_", "-") for name in distributions} & set(dependencies):
            names.add(module)
    return names | set(sys.stdlib_module_names) | {"data", "models", "tokenizers", "transformers"}


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_data_and_models_import_neither_the_trainer_nor_each_other(package):
    for file in sorted((ROOT / package).rglob("*.py")):
        wrong = imported_modules(file) & FORBIDDEN[package]
        assert not wrong, f"{file.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_the_import_rule_sees_imports_inside_functions(tmp_path):
    file = tmp_path / "planted.py"
    file.write_text("def f():\n    from trainer.config import load\n    import models.layers\n")
    assert imported_modules(file) == {"trainer", "models"}


def test_relative_imports_are_not_used_to_reach_another_package():
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            levels = [n.level for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
            assert max(levels, default=0) <= 1, f"{file.relative_to(ROOT)} imports from above its own folder"


def test_no_file_of_the_trainer_shadows_another_module():
    # As a script, trainer/train.py may have trainer/ on sys.path: a file logging.py there would be `logging`.
    own = {path.stem for path in (ROOT / "trainer").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not own & names_that_must_stay_free()


def test_the_free_names_include_the_standard_library_and_the_dependencies():
    assert {"logging", "types", "wandb", "datasets", "torch", "yaml", "data"} <= names_that_must_stay_free()


def test_the_packages_list_equals_the_tree():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(listed) == sorted(found)


def test_every_package_folder_has_an_init_file():
    # Without one it is a namespace folder, and another of that name in the current directory may win.
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), (
                f"{file.parent.relative_to(ROOT)} has no __init__.py"
            )
