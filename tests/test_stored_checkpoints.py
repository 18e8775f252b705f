"""Checkpoints of every format that was ever written go on in this version.

Each folder of `stored_checkpoints` holds one of a run of the toy model that was saved in the middle: by one process, or
by two under ZeRO-2. A new format adds its own, written by the last version that had the former one; none is removed.
"""

import shutil
from pathlib import Path

import pytest
import yaml
from running import records, train

from trainer.checkpoint_folder import FORMAT, open_checkpoint, read_manifest
from trainer.shards import full_weights

STORED = Path(__file__).parent / "stored_checkpoints"
NAMES = sorted(path.name for path in STORED.iterdir())


def stored(name):
    (checkpoint,) = (STORED / name).glob("checkpoint_*")
    return checkpoint


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_checkpoint_goes_on_as_the_run_would_have(tmp_path, name):
    checkpoint = stored(name)
    config = yaml.safe_load((checkpoint / "config.yaml").read_text())
    shutil.copytree(checkpoint, tmp_path / "runs" / "toy_20260101_000000" / checkpoint.name)
    resumed = train(tmp_path, config, output_dir=str(tmp_path / "runs"), resume_from="latest")
    whole = train(tmp_path / "whole", config, output_dir=str(tmp_path / "whole" / "runs"))
    assert resumed.name == "toy_20260101_000000"
    step = read_manifest(checkpoint)["step"]
    ours, theirs = ([r for r in records(run) if r["global_step"] > step] for run in (resumed, whole))
    assert len(ours) == 5
    for figure in ("loss", "lr", "grad_norm"):
        assert [r[figure] for r in ours] == pytest.approx([r[figure] for r in theirs], abs=1e-4)
    averages = [full_weights(open_checkpoint(run / "checkpoint_8")) for run in (resumed, whole)]
    for key, average in averages[1].items():
        assert averages[0][key].flatten().tolist() == pytest.approx(average.flatten().tolist(), abs=1e-4)


def test_every_format_up_to_this_versions_is_stored():
    assert {read_manifest(stored(name))["format"] for name in NAMES} == set(range(1, FORMAT + 1))
