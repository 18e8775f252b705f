"""The configuration of a run: loaded from YAML, validated, written out again.

`load_run_config` reads any configuration for a run. `load_config` reads one of single-cell models into the typed
classes, which are built and changed in Python too.
"""

from trainer.config.cells import (
    CensusConfig,
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    LoRAConfig,
    MaskingConfig,
    ModelConfig,
    OptimizerConfig,
    PreprocessingConfig,
    SamplingConfig,
    SchedulerConfig,
    ScModelForgeConfig,
    TaskHeadConfig,
    TokenizerConfig,
    TrainingConfig,
    load_config,
)
from trainer.config.cells_run import build_tokenizer_kwargs
from trainer.config.load import dump_yaml, json_schema, load_run_config
from trainer.config.messages import ValidationError
from trainer.config.schema import BatchPlan, PhaseConfig, RunConfig

__all__ = [
    "BatchPlan",
    "CensusConfig",
    "DataConfig",
    "EvalConfig",
    "FinetuneConfig",
    "LoRAConfig",
    "MaskingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "PreprocessingConfig",
    "RunConfig",
    "SamplingConfig",
    "ScModelForgeConfig",
    "SchedulerConfig",
    "TaskHeadConfig",
    "TokenizerConfig",
    "TrainingConfig",
    "ValidationError",
    "build_tokenizer_kwargs",
    "dump_yaml",
    "json_schema",
    "load_config",
    "load_run_config",
]
