"""The configuration of a run: loaded from YAML, validated, written out again."""

from trainer.config.load import dump_yaml, json_schema, load_run_config
from trainer.config.schema import BatchPlan, PhaseConfig, RunConfig

__all__ = ["BatchPlan", "PhaseConfig", "RunConfig", "dump_yaml", "json_schema", "load_run_config"]
