"""Fine-tuning from Python: `FineTunePipeline(load_config("finetune.yaml")).run()`."""

from pathlib import Path

from trainer.config.cells import ScModelForgeConfig
from trainer.config.cells_finetune import fine_tuning_run
from trainer.config.schema import RunConfig
from trainer.training import carry_out


class FineTunePipeline:
    """Fine-tune the backbone that a typed configuration names, in this process or in the ranks that it asks for."""

    def __init__(self, config: ScModelForgeConfig) -> None:
        """Take a configuration with a section `finetune`; what is changed in it until `run` counts."""
        self.config = config

    def run_config(self) -> RunConfig:
        """Return what will be carried out, as the run folder will hold it.

        Raises:
            ConfigError: the configuration contradicts itself or the backbone, or lacks what fine-tuning needs.
        """
        return fine_tuning_run(self.config)

    def run(self) -> Path:
        """Train to the end and return the run folder, which holds the checkpoints and metrics.jsonl.

        Raises:
            UserError, DataError: a mistake in the configuration or its files.
            Preempted: the run was asked to end, and did so with a checkpoint.
        """
        return carry_out(self.run_config())
