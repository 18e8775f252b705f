"""Saved pipelines of circuit diffusion: what they hold and how they are written.

A pipeline of ours is an exported folder (`config.json`, `model.safetensors`) with `config.yaml`, which says in words
how it is put together, `embedder.safetensors`, the vectors of the tokens, and `training_config.yaml`. With one of
genQC's networks `config.yaml`, `model.safetensors` and `embedder.safetensors` are those that genQC loads, and what it
has no place for lies in `rest.safetensors`. Nothing in a folder is executed, and no path of a machine is written into
it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.circuit_diffusion import CircuitDiffusion, CircuitDiffusionConfig
from models.pretrained import save_pretrained, save_weights
from trainer.checkpoint_model import Trained, describe_run_model
from trainer.circuit_weights import CONFIG_FILE, GENQC_UNETS, TABLE
from trainer.config.load import dump_yaml
from trainer.config.schema import ExportConfig
from trainer.config.yaml_text import parse_yaml, write_yaml

MODEL_CLASS = "models.circuit_diffusion.CircuitDiffusion"
_GENQC_PARTS = {"model.safetensors": "unet.", "rest.safetensors": ""}


def write_pipeline(trained: Trained, settings: ExportConfig, folder: Path) -> dict[str, Any]:
    """Write a trained model into an empty folder, all but `metadata.yaml`, and return what that says of its kind."""
    model: Any = trained.model
    config: CircuitDiffusionConfig = model.config
    is_genqc = config.unet_class in GENQC_UNETS
    save_pretrained(
        model, folder, description=describe_run_model(trained), parts=_GENQC_PARTS if is_genqc else None
    )
    table = model.embedding_table.detach().to("cpu", torch.float32)
    embedder = {TABLE: table}
    if is_genqc:
        # genQC holds the vectors of the tokens in a second network, of which it uses nothing else.
        whole = {name: tensor.detach().cpu().clone() for name, tensor in model.unet.state_dict().items()}
        embedder = {**whole, **embedder}
    save_weights(embedder, folder / "embedder.safetensors")
    (folder / CONFIG_FILE).write_text(write_yaml(pipeline_config(model, is_genqc)), encoding="utf-8")
    record = settings.record or parse_yaml(dump_yaml(trained.config))
    (folder / "training_config.yaml").write_text(write_yaml(without_paths(record)), encoding="utf-8")
    named = settings.record.get("model") or {}
    facts = {
        "model_type": named.get("type") or config.unet_class.rpartition(".")[2],
        "network": config.unet_class,
        "format": "genqc" if is_genqc else "cellphase",
    }
    if is_genqc and config.text_encoder is None:
        facts["prompts"] = "learned, in rest.safetensors; genQC's own text encoder gives others"
    return facts


def pipeline_config(model: CircuitDiffusion, is_genqc: bool) -> dict[str, Any]:
    """Return `config.yaml`: the parts of the pipeline in genQC's layout, with our classes where the network is ours."""
    config = model.config
    target, parts = _genqc_parts(model) if is_genqc else _own_parts(model)
    return without_paths(
        {
            "target": target,
            "params": {
                **parts,
                "device": "cpu",
                "enable_guidance_train": config.enable_guidance_train,
                "guidance_train_p": config.guidance_train_p,
                "cached_text_enc": True,
                "add_config": {
                    "dataset": {
                        "params": {
                            "gate_pool": list(config.gate_pool),
                            "num_of_qubits": config.num_qubits,
                            "prompts": list(config.prompts),
                        }
                    }
                },
            },
        }
    )


def _genqc_parts(model: CircuitDiffusion) -> tuple[str, dict[str, Any]]:
    """Return genQC's class of the pipeline, and its parts."""
    config = model.config
    kind = "diffusion_pipeline.DiffusionPipeline"
    if model.needs_unitary:
        kind = "compilation_diffusion_pipeline.DiffusionPipeline_Compilation"
    # Without save_path genQC looks beside config.yaml, and without save_type it loads no weights.
    network = {
        "target": config.unet_class,
        "save_path": None,
        "save_type": "safetensors",
        "params": _network_arguments(config),
    }
    scheduler, arguments = _scheduler(config)
    return f"genQC.pipeline.{kind}", {
        "scheduler": {
            "target": f"genQC.scheduler.scheduler_{scheduler.lower()}.{scheduler}Scheduler",
            "params": {"device": "cpu", **arguments},
        },
        "model": network,
        "text_encoder": {
            "target": "genQC.models.frozen_open_clip.CachedFrozenOpenCLIPEmbedder",
            "save_path": None,
            "save_type": None,
            "params": _genqc_text_encoder(config),
        },
        "embedder": network,
    }


def _own_parts(model: CircuitDiffusion) -> tuple[str, dict[str, Any]]:
    """Return our class of the pipeline, and its parts."""
    config = model.config
    scheduler, arguments = _scheduler(config)
    return MODEL_CLASS, {
        "scheduler": {"target": f"models.noise_schedulers.{scheduler}Scheduler", "params": arguments},
        "model": {
            "target": config.unet_class,
            "save_type": "safetensors",
            "params": _network_arguments(config),
        },
        "text_encoder": {
            "target": f"models.prompts.{type(model.prompts).__name__}",
            "params": dict(config.text_encoder or {"num_tokens": config.prompt_tokens}),
        },
        "embedder": {"save_type": "safetensors", "weights": TABLE},
    }


def _network_arguments(config: CircuitDiffusionConfig) -> dict[str, Any]:
    return {
        **config.unet_args,
        "clr_dim": config.embedding_width,
        "num_clrs": config.vocab_size,
        "cond_emb_size": config.prompt_width,
    }


def _scheduler(config: CircuitDiffusionConfig) -> tuple[str, dict[str, Any]]:
    """Return the kind of noise schedule, as `DDIM`, and its arguments."""
    kind = str(config.scheduler.get("type", "DDIM")).removesuffix("Scheduler")
    return kind, dict(config.scheduler.get("params") or {})


def _genqc_text_encoder(config: CircuitDiffusionConfig) -> dict[str, Any]:
    encoder = config.encoder
    return {
        "arch": "ViT-B-32" if encoder is None else encoder.arch,
        "version": None,
        "max_length": 77 if encoder is None else encoder.num_tokens,
        "freeze": True,
        "layer": "penultimate" if encoder is None else encoder.layer,
        "enable_cache_token_limit": False,
    }


def without_paths(value: Any) -> Any:
    """Return plain values in which a whole path of this machine is its last name."""
    if isinstance(value, Mapping):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    if isinstance(value, str) and Path(value).expanduser().is_absolute():
        return Path(value).name
    return value
