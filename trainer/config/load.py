"""Load a run's configuration (compose it, find which kind it is, validate it) and write it out again."""

import re
from pathlib import Path
from typing import Any, Literal

from trainer.config.checks import cross_field_problems
from trainer.config.compose import compose, read_text
from trainer.config.messages import (
    Problem,
    Sources,
    config_error,
    field_at,
    inner_section,
    is_list,
    near_miss,
    translate,
)
from trainer.config.repair import build_all
from trainer.config.schema import RunConfig
from trainer.config.yaml_text import read_yaml_section, write_yaml
from trainer.errors import ConfigError

_CELLS_KEYS = ("data", "tokenizer", "training", "eval", "finetune")
_SPELLINGS = {"amp_dtype", "use_wandb", "wandb_project"}


def load_run_config(
    path: str | Path,
    overrides: list[str] | None = None,
    command: Literal["train", "finetune"] = "train",
) -> RunConfig:
    """Load, compose and validate a run's configuration, of whatever kind it is.

    Args:
        path: the YAML file.
        overrides: values on top of it, as `datasets.0.lr=1e-4`.
        command: what a configuration of single-cell models is loaded for: pretraining, or fine-tuning.

    Raises:
        ConfigError: lists every mistake with its YAML path.
    """
    path = Path(path).expanduser()
    raw, problems, sources = compose(path, list(overrides or []))
    door = check_front_door(raw, sources)
    if door == "cells":
        from trainer.config.cells import cells_config
        from trainer.config.cells_run import run_of

        return run_of(cells_config(raw, sources, problems), command)
    if door == "circuits":
        from trainer.config.circuits import circuits_config
        from trainer.config.circuits_run import circuits_run

        if command == "finetune":
            raise ConfigError(
                f"{path}: `general` makes this a circuits config, which finetune does not run; `train` does, with "
                "general.init_from_pipeline_dir for the weights"
            )
        return circuits_run(circuits_config(raw, sources, problems))
    if command == "finetune":
        raise ConfigError(
            f"{path}: `datasets` makes this a phases config, which finetune does not run; `train` does, with init_from "
            "for the weights, or write a config with a section finetune"
        )
    config, more = validate(raw, problems)
    problems += more
    if problems or config is None:
        raise config_error(sources, problems)
    return config


def load_saved_config(path: str | Path) -> RunConfig:
    """Load the configuration that `dump_yaml` wrote into a checkpoint.

    It is resolved, and may have come from anywhere: it reads no other file and nothing of the environment. What its
    dotted paths name is not trusted (see `models.pretrained.resolve_trusted`).

    Raises:
        ConfigError: it is not such a configuration.
    """
    path = Path(path)
    raw = read_yaml_section(read_text(path), str(path))
    if "defaults" in raw or "datasets" not in raw or _has_interpolation(raw):
        raise ConfigError(
            f"{path}: not a configuration as a run writes it into a checkpoint, resolved and with its phases "
            "(datasets); the file was edited"
        )
    return load_run_config(path)


def validate(
    raw: dict[str, Any], known: list[Problem] | None = None
) -> tuple[RunConfig | None, list[Problem]]:
    """Return the configuration and all its mistakes, those of single fields and those between fields.

    Values that are wrong in themselves are replaced by stand-ins. Mistakes at `known` places are not told twice.
    """
    return build_all(
        raw,
        known or [],
        parse=lambda values: RunConfig.model_validate(values, context={"fields_only": True}),
        translate=lambda error: [translate(dict(record), RunConfig) for record in error.errors()],
        repair=_repair,
        contradictions=cross_field_problems,
    )


def check_front_door(raw: dict[str, Any], source: Sources) -> Literal["phases", "cells", "circuits"]:
    """Return which kind of configuration this is.

    Raises:
        ConfigError: it is of two kinds, or of none.
    """
    training, model = raw.get("training"), raw.get("model")
    circuits = [
        *(["general"] if "general" in raw else []),
        *(["training.general"] if isinstance(training, dict) and "general" in training else []),
    ]
    cells = [key for key in _CELLS_KEYS if key in raw and not (key == "training" and circuits)]
    if isinstance(model, dict) and "architecture" in model:
        cells.append("model.architecture")
    if "datasets" in raw and (circuits or cells):
        others = circuits or cells
        raise ConfigError(
            f"{source}: `datasets` makes this a phases config and `{'`, `'.join(others)}` a "
            f"{'circuits' if circuits else 'cells'} config; keep one"
            + source.elsewhere(["datasets", *others], source.file)
        )
    if "datasets" in raw:
        return "phases"
    if circuits and cells:
        raise ConfigError(
            f"{source}: `{'`, `'.join(circuits)}` makes this a circuits config and `{'`, `'.join(cells)}` a cells "
            "config; keep one" + source.elsewhere([*circuits, *cells], source.file)
        )
    if len(circuits) == 2:
        raise ConfigError(
            f"{source}: `general` and `training.general` both begin a circuits config; keep one of the two"
        )
    if circuits:
        return "circuits"
    if cells:
        return "cells"
    close = next((key for key in raw if near_miss(str(key), ["datasets", *_CELLS_KEYS])), None)
    hint = f"; did you mean it by `{close}`?" if close else ""
    raise ConfigError(
        f"{source}: expected `datasets`, the list of phases, at the top level (with run_name and model), `data`, "
        f"the cells of a single-cell model, or `general`, of a circuit model{hint}"
    )


def dump_yaml(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that loads as an equal one."""
    content = config.model_dump(mode="python", exclude=_SPELLINGS)
    return write_yaml(_without_interpolations(content))


def json_schema(kind: Literal["phases", "cells", "circuits"] = "phases") -> dict[str, Any]:
    """Return a JSON schema with which editors complete and check a config file as it is typed.

    That of `circuits` is for a file with `general` at the top level, as presets are.
    """
    if kind == "cells":
        from trainer.config.cells import ScModelForgeConfig

        schema = ScModelForgeConfig.model_json_schema(mode="validation")
    elif kind == "circuits":
        from trainer.config.circuits import CircuitsConfig

        schema = CircuitsConfig.model_json_schema(mode="validation")
    else:
        schema = RunConfig.model_json_schema(mode="validation")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_with_interpolations(schema)}
    schema["properties"]["defaults"] = {"description": "Files and presets to merge first", "type": "array"}
    schema["properties"]["hydra"] = {"description": "Accepted; does nothing"}
    return schema


def _repair(raw: dict[str, Any], error: dict[str, Any]) -> None:
    """Replace the value that an error is about by one that is valid in itself."""
    location = [part for part in error["loc"] if part != "[key]"]
    *parents, last = location
    node: Any = raw
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else node[part] if isinstance(node, list) else None
    if error["type"] == "missing" and isinstance(node, dict) or isinstance(node, list):
        node[last] = _stand_in(location)
    elif isinstance(node, dict):
        node.pop(last, None)
    else:  # the schema reads text as a section here
        raw.pop(location[0], None)


def _stand_in(location: list[str | int]) -> Any:
    """Return a value that is valid by itself at a place of the schema that has no default."""
    field = field_at(RunConfig, location)
    if field is None:
        return None
    if location[0] == "trackers":
        return "csv" if location[-1] == "name" else {"name": "csv"}
    if is_list(field) and not isinstance(location[-1], int):
        return [_stand_in([*location, 0])]
    return "stand.in" if inner_section(field.annotation) is None else {}


def _has_interpolation(value: Any) -> bool:
    """Tell whether there is a `${` that is not escaped, by an odd number of backslashes."""
    if isinstance(value, str):
        return any(len(match[1]) % 2 == 0 for match in re.finditer(r"(\\*)\$\{", value))
    if isinstance(value, dict):
        return any(map(_has_interpolation, [*value, *value.values()]))
    return isinstance(value, list) and any(map(_has_interpolation, value))


def _without_interpolations(value: Any) -> Any:
    """Escape `${` in texts: what is resolved is meant literally."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", value)
    if isinstance(value, dict):
        return {key: _without_interpolations(inner) for key, inner in value.items()}
    return [_without_interpolations(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _with_interpolations(schema: Any) -> Any:
    """Allow `${...}` in a file wherever something else than text is expected."""
    if isinstance(schema, list):
        return [_with_interpolations(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _with_interpolations(inner) for key, inner in schema.items()}
    if schema.get("type") in ("integer", "number", "boolean") or "enum" in schema:
        about = {key: schema.pop(key) for key in ("title", "description", "default") if key in schema}
        return {**about, "anyOf": [schema, {"type": "string", "pattern": r"\$\{"}]}
    return schema
