"""DeepSpeed's configuration: found from anywhere, checked, and completed from the run's own.

The run's YAML is the only source of clipping, precision and batch sizes; a DeepSpeed file says how state is sharded.
"""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from trainer.config.schema import BatchPlan, RunConfig
from trainer.errors import ConfigError

CONFIG_VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
ROOT = Path(__file__).resolve().parent.parent


def is_asked_for() -> bool:
    """Tell whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def prepare_environment(on_cpu: bool, precision: str) -> None:
    """Find the launcher's DeepSpeed configuration from any working directory, and settle DeepSpeed's own choices.

    Raises:
        ConfigError: there is no such file, or it asks for another device or precision than the run.
    """
    named = os.environ.get(CONFIG_VARIABLE, "none")
    if named == "none":
        raise ConfigError(
            "the accelerate configuration asks for DeepSpeed without deepspeed_config.deepspeed_config_file; name one, "
            "as accelerate_configs/zero2.yaml does"
        )
    candidates = [Path(named), *([] if Path(named).is_absolute() else [ROOT / named])]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise ConfigError(
            f"deepspeed_config_file {named} is not there; looked for {', '.join(map(str, candidates))}"
        )
    given = read_given(found)
    check_given(given, str(found))
    settle_precision(given, precision)
    os.environ[CONFIG_VARIABLE] = str(found)
    # DeepSpeed calls collectives by names that torch is renaming.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if on_cpu:
        if torch.cuda.is_available():
            raise ConfigError(
                "device: cpu under DeepSpeed needs a machine whose GPUs are hidden; set CUDA_VISIBLE_DEVICES to nothing"
            )
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # It serves inference alone, and would be compiled for minutes on first use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def read_given(path: str | Path) -> dict[str, Any]:
    """Read DeepSpeed's configuration as the user wrote it."""
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error})") from error


def check_given(given: dict[str, Any], where: str) -> None:
    """Refuse what a DeepSpeed configuration cannot decide or this trainer cannot carry out."""
    zero = given.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise ConfigError(f"{where}: zero_optimization.stage must be 1, 2 or 3; use DDP for none")
    for key, instead in (("optimizer", "optimizer"), ("scheduler", "optimizer.scheduler_class")):
        if key in given:
            raise ConfigError(
                f"{where}: {key} is set there; set the run's `{instead}` instead, and leave it out"
            )
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"{where}: zero_optimization.{key}.device is {device}; none and cpu are supported"
            )
    if zero.get("round_robin_gradients"):
        raise ConfigError(f"{where}: zero_optimization.round_robin_gradients is not supported; leave it out")


def complete_config(
    settings: dict[str, Any],
    given: dict[str, Any],
    config: RunConfig,
    plans: Sequence[BatchPlan],
    precision: str,
) -> None:
    """Write what the run's YAML says into DeepSpeed's configuration.

    Args:
        settings: DeepSpeed's configuration as Accelerate has filled it, completed in place.
        given: The same as the user wrote it.
        config: The run.
        plans: The batch arithmetic of its phases.
        precision: `no`, `bf16` or `fp16`.

    Raises:
        ConfigError: a value that stands there contradicts the run's.
    """
    clipping = 0.0 if config.max_grad_norm is None else config.max_grad_norm
    _agree(given, "gradient_clipping", clipping, "max_grad_norm")
    for plan in plans:
        for key, value, of_run in (
            ("train_micro_batch_size_per_gpu", plan.micro_batch_size, "micro_batch_size"),
            ("gradient_accumulation_steps", plan.accumulation, "gradient_accumulation_steps"),
            ("train_batch_size", plan.global_batch_size, "global_batch_size"),
        ):
            _agree(given, key, value, of_run)
    settle_precision(settings, precision)
    settings["gradient_clipping"] = clipping
    # The loop owns the accumulation boundary, and may set another one in another phase: DeepSpeed must not count.
    settings["gradient_accumulation_steps"] = 1
    settings["train_micro_batch_size_per_gpu"] = plans[0].micro_batch_size
    settings["train_batch_size"] = plans[0].micro_batch_size * plans[0].world_size
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False  # the run's own optimizer, on the host too
    settings.setdefault("steps_per_print", 2**31)
    stage = settings["zero_optimization"]["stage"]
    if precision == "no" or stage > 1:
        # With bf16 weights DeepSpeed would take another optimizer for stage 1, whose state lies elsewhere.
        settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def settle_precision(given: dict[str, Any], precision: str) -> None:
    """Write the run's precision into DeepSpeed's configuration."""
    for kind in ("bf16", "fp16"):
        section = given.setdefault(kind, {})
        _agree(section, "enabled", precision == kind, "precision", f"{kind}.enabled")
        section["enabled"] = precision == kind


def _agree(section: dict[str, Any], key: str, value: Any, of_run: str, named: str | None = None) -> None:
    found = section.get(key, "auto")
    if found != "auto" and found != value:
        raise ConfigError(
            f"DeepSpeed's configuration sets {named or key} to {found}, but the run's {of_run} makes it {value}; leave "
            "it out there"
        )


def settings_of(accelerator: Accelerator) -> dict[str, Any]:
    """Return DeepSpeed's configuration as Accelerate holds it; changes act until the engine is built."""
    plugin: Any = accelerator.state.deepspeed_plugin
    return plugin.deepspeed_config


def is_stage_3(accelerator: Accelerator) -> bool:
    """Tell whether weights are sharded."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    return settings_of(accelerator)["zero_optimization"]["stage"] == 3
