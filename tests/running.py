"""Run whole trainings from tests: in this process (one rank), or as the user's command on several ranks."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from launching import ROOT, free_port, launch_ranks, runs_without_picture

from trainer.build import run
from trainer.checkpoint_folder import SavedCheckpoint, open_checkpoint
from trainer.config import load_run_config
from trainer.metrics_file import comparable, read_metrics
from trainer.shards import full_weights

TOY: dict[str, Any] = {
    "run_name": "toy",
    "device": "cpu",
    "seed": 3,
    "model": {"model_class": "toy.ToyModel", "config_class": "toy.ToyConfig", "config_args": {}},
    "optimizer": {"optimizer_args": {"lr": 0.01}},
    "micro_batch_size": 4,
    "global_batch_size": 24,
    "checkpoint": {"keep_last": None},
    "datasets": [{"name": "one", "dataloader_factory": "toy.map_loader"}],
}


def toy(*phases: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the toy configuration with other phases and top-level keys; a key set to None is left out."""
    config = {**TOY, **changes}
    if phases:
        config["datasets"] = [
            {"name": f"p{index}", "dataloader_factory": "toy.map_loader", **phase}
            for index, phase in enumerate(phases)
        ]
    return {key: value for key, value in config.items() if value is not None}


def write_config(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    """Write a configuration whose runs go into `folder`/runs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "runs"), **config, **changes}))
    return path


def train(
    folder: Path, config: dict[str, Any], *, dry_run: bool = False, has_picture: bool = False, **changes: Any
) -> Path:
    """Train in this process and return the run folder, whose report has its picture where it is asked for."""
    path = write_config(folder, config, **changes)
    reset_accelerate()
    with contextlib.nullcontext() if has_picture else runs_without_picture():
        assert run(load_run_config(path), dry_run=dry_run) == 0
    return newest_run(folder) if not dry_run else folder


def reset_accelerate() -> None:
    """Let the next training in this process begin as the first one."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def train_ranks(
    num_ranks: int,
    folder: Path,
    config: dict[str, Any],
    *,
    strategy="ddp",
    env=None,
    expect=0,
    **changes: Any,
) -> str:
    """Train with the user's command on several ranks, under DDP or `zero1` to `zero3`, and return what it printed."""
    path = write_config(folder, config, **changes)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        **strategy_environment(folder, strategy, num_ranks),
        **(env or {}),
    }
    return launch_ranks(
        num_ranks, [ROOT / "trainer" / "train.py", "--config", path], env=environment, expect=expect
    ).stdout


def strategy_environment(
    folder: Path, strategy: str, num_ranks: int, sub_group_size: int = 60
) -> dict[str, str]:
    """Return the variables by which `accelerate launch` hands a strategy on, for ranks that are started without it.

    Small parameters are sharded too under ZeRO-3, and sub-groups are small: tiny models hide faults otherwise.
    """
    if strategy == "ddp":
        return {}
    settings = json.loads((ROOT / "ds_configs" / f"{strategy}.json").read_text())
    if settings["zero_optimization"]["stage"] == 3:
        small = {"stage3_param_persistence_threshold": 0, "sub_group_size": sub_group_size}
        settings["zero_optimization"] |= small
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{strategy}.json"
    path.write_text(json.dumps(settings))
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return {
        **(alone if num_ranks == 1 else {}),
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
    }


def copy_until(run_folder: Path, step: int, folder: Path) -> Path:
    """Copy a run into `folder`/runs as if it had been killed after the checkpoint of a step, and return the copy."""
    copied = folder / "runs" / run_folder.name
    shutil.copytree(run_folder, copied)
    for checkpoint in copied.glob("checkpoint_*"):
        if int(checkpoint.name.removeprefix("checkpoint_")) > step:
            shutil.rmtree(checkpoint)
    return copied


def newest_run(folder: Path) -> Path:
    """Return the run folder that was made last."""
    return max((folder / "runs").iterdir(), key=lambda path: (path.stat().st_mtime, path.name))


def records(run_folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the records of one kind."""
    return [record for record in read_metrics(run_folder / "metrics.jsonl") if record["kind"] == kind]


def losses(run_folder: Path, kind: str = "train") -> list[float]:
    """Return the losses of the records of one kind."""
    return [record["loss"] for record in records(run_folder, kind)]


def all_losses(run_folder: Path) -> list[float]:
    """Return the losses of training and of validation, of which there are both."""
    parts = losses(run_folder), losses(run_folder, "validation")
    assert all(parts)
    return [*parts[0], *parts[1]]


def comparable_records(run_folder: Path) -> list[dict[str, Any]]:
    """Return all records without what depends on the clock."""
    return [comparable(record) for record in read_metrics(run_folder / "metrics.jsonl")]


def newest_checkpoint(run_folder: Path) -> SavedCheckpoint:
    """Open the checkpoint that `latest` names."""
    return open_checkpoint(run_folder / (run_folder / "latest").read_text().strip())


def final_weights(run_folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the newest checkpoint."""
    return full_weights(newest_checkpoint(run_folder))


def same_weights(first: Path, second: Path) -> bool:
    """Tell whether two runs ended with the same weights bit for bit."""
    one, two = final_weights(first), final_weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
