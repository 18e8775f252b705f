"""Turn a circuit configuration into the `RunConfig` that a run is carried out from; imports no torch, opens no data.

One phase, or one a stage. Every field has a key of the run that acts, or is named in the run's notes.
"""

from __future__ import annotations

from typing import Any

from trainer.config.cells_checks import is_written
from trainer.config.cells_run import run_name_of
from trainer.config.cells_section import written_values
from trainer.config.circuits import CircuitsConfig, StageConfig
from trainer.config.circuits_checks import uses_genqc, uses_unitary
from trainer.config.load import validate
from trainer.config.messages import config_error
from trainer.config.schema import RunConfig

MODEL_CLASS = "models.circuit_diffusion.CircuitDiffusion"
CONFIG_CLASS = "models.circuit_diffusion.CircuitDiffusionConfig"
UNETS = {
    "QC_Cond_UNet": "models.circuit_unet.CircuitUNet",
    "QC_Compilation_UNet": "models.circuit_unet.CircuitCompilationUNet",
}
"""Our networks, by the names that presets give them."""

SCHEDULES = {
    None: "constant",
    "constant": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "CosineAnnealingLR": "cosine",
    "one_cycle": "one_cycle",
    "OneCycleLR": "one_cycle",
}

LOADER = "data.circuits.circuit_loader"
RUNS = "runs"
"""Folder of the run folders in `general.output_path`."""


def circuits_run(config: CircuitsConfig) -> RunConfig:
    """Return the run that trains the model of a configuration.

    Raises:
        ValidationError: the configuration contradicts itself, or names no data.
    """
    config = CircuitsConfig(**written_values(config))  # what was changed since it was built is compared anew
    general, training = config.general, config.training
    output = general.output_path
    assert output is not None, "checked when the configuration was built"
    stages = config.stages or [StageConfig(name="training")]
    raw: dict[str, Any] = {
        "run_name": run_name_of(general.experiment_name or general.model_name or "circuits"),
        "output_dir": training.ckpt_path or f"{output}/{RUNS}",
        "seed": training.seed,
        "device": general.device,
        "precision": training.precision,
        "resume_from": general.resume,
        "init_from": general.init_from_pipeline_dir,
        "model": model_section(config),
        "optimizer": {
            "optimizer_class": f"torch.optim.{training.optimizer}",
            "optimizer_args": {"lr": training.learning_rate, **training.optimizer_args},
        },
        "datasets": [phase(config, index, stage) for index, stage in enumerate(stages)],
        "micro_batch_size": training.batch_size,
        "global_batch_size": training.global_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "max_grad_norm": training.max_grad_norm,
        "checkpoint": {"keep_last": training.keep_last},
        "trackers": trackers(config),
        "export_to": {
            "folder": output if general.model_name is None else f"{output}/{general.model_name}",
            "format": "circuits",
            "overwrite": general.overwrite,
            "record": record(config),
        },
        "notes": notes(config),
    }
    for key, section in (("ema", training.ema), ("early_stopping", training.early_stopping)):
        if section is not None:
            raw[key] = section.model_dump()
    run, problems = validate(raw)
    if run is None or problems:
        raise config_error("the run of this configuration", problems)
    return run


def model_section(config: CircuitsConfig) -> dict[str, Any]:
    """Return the run's `model`; gates, prompts and whether there are unitaries follow from the data."""
    model, training = config.model, config.training
    scheduler = config.scheduler.model_dump()
    if config.scheduler.type != "DDIMScheduler":
        del scheduler["params"]["eta"]
    arguments: dict[str, Any] = {
        "unet_class": model.target or UNETS[model.type or "QC_Cond_UNet"],
        "unet_args": unet_arguments(config),
        "embedding_dim": model.params.clr_dim,
        "scheduler": scheduler,
        "enable_guidance_train": training.enable_guidance_train,
        "guidance_train_p": training.guidance_train_p,
        "loss": training.loss,
        "mask_padding": training.mask_padding,
        **prompts(config),
    }
    return {"model_class": MODEL_CLASS, "config_class": CONFIG_CLASS, "config_args": arguments}


def unet_arguments(config: CircuitsConfig) -> dict[str, Any]:
    """Return the arguments of the network; its widths of tokens and gates are given by the model and the data."""
    model = config.model
    left_out = {"clr_dim", "num_clrs", "unitary_encoder_config"}
    if uses_genqc(config):
        left_out |= {"dropout", "activation_checkpointing"}
    arguments = model.params.model_dump(exclude=left_out)
    encoder = model.params.unitary_encoder_config
    if uses_unitary(config):
        own = {} if encoder is None else encoder.model_dump(exclude_none=True)
        arguments["unitary_encoder_config"] = {"cond_emb_size": model.params.cond_emb_size, **own}
    return arguments


def prompts(config: CircuitsConfig) -> dict[str, Any]:
    """Return what turns prompts into tokens: a text encoder, or a table that is learned."""
    encoder = config.text_encoder
    if encoder is None:
        return {"prompt_tokens": config.model.prompt_tokens}
    is_open_clip = encoder.type == "CachedFrozenOpenCLIPEmbedder"
    settings: dict[str, Any] = {
        "library": "open_clip" if is_open_clip else "transformers",
        "width": config.model.params.cond_emb_size,
        "num_tokens": encoder.params.max_length,
        "layer": encoder.params.layer,
    }
    if is_open_clip:
        settings["arch"] = encoder.params.arch
    return {"text_encoder": settings, "text_encoder_path": encoder.params.local_weights_path}


def phase(config: CircuitsConfig, index: int, stage: StageConfig) -> dict[str, Any]:
    """Return the phase of a stage: what it says, and what `general` and `training` say where it says nothing."""
    general, training = config.general, config.training

    def of(name: str) -> Any:
        own = getattr(stage, name)
        return getattr(general if name == "dataset" else training, name) if own is None else own

    settings: dict[str, Any] = {
        "name": run_name_of(stage.name or f"stage_{index + 1}"),
        "dataloader_factory": LOADER,
        "dataloader_args": {
            "path": of("dataset"),
            "padding": of("padding_mode"),
            "balance_max": of("balance_max"),
            "max_samples": of("max_samples"),
            "deduplicate": training.deduplicate,
            "val_fraction": training.val_fraction,
            "split_seed": training.split_seed,
            "num_workers": general.njobs,
        },
        "epochs": of("num_epochs"),
        "max_steps": of("max_steps"),
        "lr": of("learning_rate"),
        "log_every_steps": 1 if general.verbose else 10,
        "save_every_steps": training.save_every_steps,
        "save_every_epochs": training.ckpt_interval,
        "micro_batch_size": stage.batch_size,
        **schedule(config, of("lr_scheduler")),
    }
    return settings


def schedule(config: CircuitsConfig, name: str | None) -> dict[str, Any]:
    """Return a phase's schedule; its length follows from the data."""
    training = config.training
    kind = SCHEDULES[name]
    if kind == "one_cycle":
        shape = training.one_cycle
        return {"schedule": kind, "one_cycle": None if shape is None else shape.model_dump()}
    ratio = {"min_lr_ratio": training.min_lr_ratio} if kind != "constant" else {}
    return {"schedule": kind, "warmup_steps": training.warmup_steps, **ratio}


def trackers(config: CircuitsConfig) -> list[dict[str, Any]]:
    """Return the run's trackers."""
    training = config.training
    found: list[dict[str, Any]] = [{"name": training.logger}]
    if training.wandb.enable:
        found.append({"name": "wandb", "project": training.wandb.project})
    return found


def record(config: CircuitsConfig) -> dict[str, Any]:
    """Return the whole configuration as it was resolved, for the saved pipeline."""
    return config.model_dump(mode="json")


def notes(config: CircuitsConfig) -> list[str]:
    """Return the lines of the start-up account that name what was written and does not act in this run."""
    found = []
    if is_written(config, "model.params.num_clrs"):
        found.append("not used by this run: model.params.num_clrs (the gates of the data decide)")
    if not config.training.wandb.enable and is_written(config, "training.wandb.project"):
        found.append("not used by this run: training.wandb.project (training.wandb.enable is false)")
    if not config.training.enable_guidance_train and is_written(config, "training.guidance_train_p"):
        found.append(
            "not used by this run: training.guidance_train_p (training.enable_guidance_train is false)"
        )
    return found
