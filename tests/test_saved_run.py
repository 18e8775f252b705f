"""What any run writes where `export_to` says when it has ended."""

import pytest
import yaml
from running import final_weights, toy, train

from models.pretrained import from_pretrained
from trainer.errors import ConfigError, UserError

pytestmark = pytest.mark.usefixtures("forked_programs")


def test_a_pipeline_of_circuits_is_refused_for_another_model_before_training(tmp_path):
    config = toy(export_to={"folder": str(tmp_path / "model"), "format": "circuits"})
    with pytest.raises(
        ConfigError, match=r"export_to\.format: circuits is a pipeline of models\.circuit_diffusion"
    ):
        train(tmp_path, config)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "model").exists()


def test_what_is_no_exported_model_is_not_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    for settings in ({}, {"overwrite": True}):
        with pytest.raises(UserError, match="what no run has saved there|is not an exported model"):
            train(tmp_path, toy(export_to={"folder": str(tmp_path / "model"), **settings}))
    assert not (tmp_path / "runs").exists()


def test_a_run_exports_its_model_when_it_has_ended_and_keeps_it_from_others(tmp_path):
    config = toy(export_to={"folder": str(tmp_path / "model")})
    folder = train(tmp_path, config)
    model = from_pretrained(tmp_path / "model", trusted_modules=("toy",))
    saved = final_weights(folder)
    assert all(saved[name].equal(weight) for name, weight in model.state_dict().items())
    metadata = yaml.safe_load((tmp_path / "model" / "metadata.yaml").read_text())
    assert metadata["run"] == folder.name and "model.safetensors" in metadata["files"]
    with pytest.raises(UserError, match=f"holds the model of run {folder.name}"):
        train(tmp_path, config)
    assert train(tmp_path, config, resume_from="latest") == folder  # its own is replaced
