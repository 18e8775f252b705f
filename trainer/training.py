"""Pretraining from Python: `TrainingPipeline(load_config("config.yaml")).run()`."""

from pathlib import Path

from trainer import launch
from trainer.config.cells import ScModelForgeConfig
from trainer.config.cells_run import pretraining_run
from trainer.config.schema import RunConfig
from trainer.control import run_folder
from trainer.errors import UserError


class TrainingPipeline:
    """Pretrain the model of a typed configuration, in this process or in the ranks that it asks for."""

    def __init__(self, config: ScModelForgeConfig) -> None:
        """Take a configuration; what is changed in it until `run` counts."""
        self.config = config

    def run_config(self) -> RunConfig:
        """Return what will be carried out, as the run folder will hold it.

        Raises:
            ConfigError: the configuration contradicts itself, or lacks what pretraining needs.
        """
        return pretraining_run(self.config)

    def run(self) -> Path:
        """Train to the end and return the run folder, which holds the checkpoints and metrics.jsonl.

        Raises:
            UserError, DataError: a mistake in the configuration or its files.
            Preempted: the run was asked to end, and did so with a checkpoint.
        """
        return carry_out(self.run_config())


def carry_out(config: RunConfig) -> Path:
    """Carry out a run and return its folder.

    Raises:
        UserError: ranks that were started for it failed, and have said why.
    """
    code = launch.run(config)
    folder = run_folder()
    if code != 0 or folder is None:
        raise UserError(f"the ranks of the run ended with exit code {code}; what they printed says why")
    return Path(folder)
