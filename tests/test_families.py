"""The table of our families of models of cells agrees with their classes and with the section `model`."""

import dataclasses
from pkgutil import resolve_name
from typing import get_args

import pytest
from launching import run_command

from models.cell_model import CellModel
from models.families import FAMILIES, Architecture
from models.model_config import ModelConfig
from trainer.config import ModelConfig as ModelSection


def test_every_family_has_a_name_that_configurations_may_write():
    assert get_args(Architecture) == tuple(FAMILIES)


def test_the_table_of_families_imports_no_torch():
    code = "import sys, models.families; print({'torch', 'numpy'} & sys.modules.keys())"
    assert run_command(["python", "-c", code]).stdout.strip() == "set()"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_names_its_classes_and_its_fields(name):
    family = FAMILIES[name]
    model_class, config_class = resolve_name(family.model_class), resolve_name(family.config_class)
    assert issubclass(model_class, CellModel) and issubclass(config_class, ModelConfig)
    fields = {field.name for field in dataclasses.fields(config_class)}
    assert set(family.own_fields) <= fields & ModelSection.model_fields.keys()
    assert not set(family.own_fields) & {field.name for field in dataclasses.fields(ModelConfig)}
    assert family.weighs_losses == ({"gene_loss_weight", "expression_loss_weight"} <= fields)
