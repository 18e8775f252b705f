"""Weights that a circuit model starts from: gates compared, prompts matched by their text, genQC's pipelines read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.plain_yaml import load_plain
from models.circuit_diffusion import CircuitDiffusion
from models.prompts import PromptTable
from trainer.checkpoint_folder import MANIFEST
from trainer.errors import CheckpointError
from trainer.run_state import load_weights
from trainer.zero_building import gathered_where_divided

CONFIG_FILE = "config.yaml"
GENQC_UNETS = ("genQC.models.unet_qc.QC_Cond_UNet", "genQC.models.unet_qc.QC_Compilation_UNet")
TABLE = "emb_clr.weight"
"""Name of the vectors of the tokens in `embedder.safetensors`."""
_PROMPTS = ("prompts.table.weight", "prompts.tokens")


def load_circuit_weights(
    weights: Mapping[str, Tensor], config_args: Mapping[str, Any], model: CircuitDiffusion, where: str
) -> list[str]:
    """Start a model from the weights of another one over the same gates, and return what is to be said.

    Prompts are matched by their text; those that the other model does not know start fresh.

    Raises:
        CheckpointError: its gates are others, it is another kind of model, or its prompts are damaged.
    """
    _check_kind(config_args, model, where)
    taken = {name: tensor for name, tensor in weights.items() if name not in _PROMPTS}
    name, said = _PROMPTS[0 if isinstance(model.prompts, PromptTable) else 1], []
    known = [*config_args.get("prompts", ()), ""]  # the empty prompt comes last
    wanted = [*model.config.prompts, ""]
    rows = weights.get(name)
    new = [prompt for prompt in wanted if rows is None or prompt not in known]
    if new and name == _PROMPTS[1]:
        model.initialise_from_data([])  # the text encoder tells what new prompts are
    own: Any = dict(model.named_parameters()) | dict(model.named_buffers())
    with gathered_where_divided([own[name]]):
        table = own[name].detach().cpu().clone()
    if rows is not None:
        if rows.ndim == 0 or len(rows) != len(known):
            raise CheckpointError(
                f"{where}: {name} is of shape {list(rows.shape)}, which is not a row for each of its {len(known)} "
                "prompts (the empty one is the last); it is damaged: save or export it again"
            )
        if rows.shape[1:] != table.shape[1:]:
            raise CheckpointError(
                f"{where}: its prompts are {list(rows.shape[1:])} numbers each, this model's {list(table.shape[1:])}; "
                "set cond_emb_size and prompt_tokens (or the text encoder) as there"
            )
        for index, prompt in enumerate(wanted):
            if prompt in known:
                table[index] = rows[known.index(prompt)]
    if new:
        shown = "; ".join(prompt or "the empty one" for prompt in new[:3])
        how = "start fresh" if name == _PROMPTS[0] else "come from the text encoder"
        said.append(
            f"{len(new)} of {len(wanted)} prompts are new and {how}: {shown}{' ...' if len(new) > 3 else ''}"
        )
    load_weights(model, {**taken, name: table}, where)
    return said


def _check_kind(config_args: Mapping[str, Any], model: CircuitDiffusion, where: str) -> None:
    config = model.config
    theirs, ours = config_args.get("gate_pool"), list(config.gate_pool)
    if not theirs:
        raise CheckpointError(
            f"{where}: it does not say which gates its tokens stand for, so nothing can go on from it"
        )
    if list(theirs) != ours:
        raise CheckpointError(
            f"{where} was trained on the gates {', '.join(map(str, theirs))} (in this order), and the data has "
            f"{', '.join(ours)}: one token would mean two gates; take data with the same gate_pool, or train from the "
            "start"
        )
    unet_class = str(config_args.get("unet_class", config.unet_class)).replace(":", ".")
    if unet_class != config.unet_class:
        raise CheckpointError(
            f"{where} is a pipeline of {unet_class}, and this run's network is {config.unet_class}; set model.type or "
            "model.target (unet_class) to that"
        )
    before, now = _prediction(config_args.get("scheduler")), _prediction(config.scheduler)
    if before != now:
        raise CheckpointError(
            f"{where} was trained to predict {before}, and scheduler.params.prediction_type is {now}; set it to that"
        )
    heads = (config_args.get("unet_args") or {}).get("num_heads")
    own = config.unet_args.get("num_heads", heads)
    if heads is not None and _plain(heads) != _plain(own):
        raise CheckpointError(
            f"{where} was trained with num_heads {_plain(heads)}, and this run's are {_plain(own)}: the same weights "
            "would compute something else; set model.params.num_heads to that"
        )


def _prediction(scheduler: Mapping[str, Any] | None) -> str:
    params = (scheduler or {}).get("params") or {}
    return str(params.get("prediction_type", "epsilon"))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def is_genqc_pipeline(folder: Path) -> bool:
    """Tell whether a folder looks like a pipeline that genQC has saved."""
    names = (CONFIG_FILE, "model.safetensors")
    return all((folder / name).is_file() for name in names) and not (folder / MANIFEST).exists()


def read_genqc_pipeline(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of a pipeline that genQC has saved, by our names, and the arguments of our configuration.

    Raises:
        CheckpointError: it is not one, is damaged, or is of a kind that has no counterpart here.
    """
    path = folder / CONFIG_FILE
    try:
        content = load_plain(path.read_text(encoding="utf-8"))
        params = content["params"]
        network, dataset = params["model"], params["add_config"]["dataset"]["params"]
        name = str(network["target"]).rpartition(".")[2]
        arguments = dict(network["params"])
        gate_pool = [str(gate) for gate in dataset["gate_pool"]]
        scheduler = dict(params.get("scheduler") or {})
        noise = dict(scheduler.get("params") or {})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path}: not the configuration of a saved pipeline (target, params.model and the gate pool in "
            f"params.add_config.dataset.params): {type(error).__name__} {error}"
        ) from None
    unet_class = f"genQC.models.unet_qc.{name}"
    if unet_class not in GENQC_UNETS:
        raise CheckpointError(
            f"{path}: its network is {network['target']}; a pipeline of {' or '.join(GENQC_UNETS)} can be gone on from"
        )
    try:
        weights = {f"unet.{key}": tensor for key, tensor in load_file(folder / "model.safetensors").items()}
        embedder = folder / "embedder.safetensors"
        table = load_file(embedder)[TABLE] if embedder.is_file() else weights[f"unet.{TABLE}"]
    except (SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(f"{folder}: its weights cannot be read ({error})") from None
    weights["embedding_table"] = table.float()
    return weights, {
        "unet_class": unet_class,
        "unet_args": {key: value for key, value in arguments.items() if key not in ("clr_dim", "num_clrs")},
        "embedding_dim": arguments.get("clr_dim"),
        "gate_pool": gate_pool,
        "scheduler": {
            "type": str(scheduler.get("target", "DDIMScheduler")).rpartition(".")[2],
            "params": {key: value for key, value in noise.items() if key != "device"},
        },
    }
