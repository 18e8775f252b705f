"""Builds a run's model: its class, its arguments, and what of them follows from the data and from FP8."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from models.errors import ModelError
from models.pretrained import set_technical_batches
from trainer.config.schema import Fp8Config, RunConfig
from trainer.dotted import FROM_DATA, resolve
from trainer.errors import ConfigError
from trainer.phases import DataFacts


def build_model(config: RunConfig, facts: DataFacts) -> nn.Module:
    """Construct the model, its sizes taken from the data where the user leaves them out.

    Raises:
        ConfigError: a size that the user set contradicts the data's, or neither tells it.
    """
    settings = config.model
    constructor, arguments = complete_arguments(config, facts)
    model = constructor(**arguments)
    if settings.config_class is not None:
        model = resolve(settings.model_class, "model.model_class")(model, **settings.model_args)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.model_class: {settings.model_class} made a {type(model).__name__}, not a torch.nn.Module"
        )
    set_technical_batches(model, facts.n_technical_batches)
    return model


def complete_arguments(config: RunConfig, facts: DataFacts) -> tuple[Any, dict[str, Any]]:
    """Return the constructor that takes the sizes (the config class, else the model's) and the arguments of its call.

    Raises:
        ConfigError: as `build_model`.
    """
    settings = config.model
    if settings.config_class is None:
        name, path, given = "model", settings.model_class, settings.model_args
    else:
        name, path, given = "config", settings.config_class, settings.config_args
    constructor = resolve(path, f"model.{name}_class")
    arguments = with_data_sizes(constructor, given, facts, f"model.{name}_args")
    return constructor, arguments | _fp8_arguments(config, constructor, f"model.{name}_class")


def with_data_sizes(factory: Any, given: dict[str, Any], facts: DataFacts, where: str) -> dict[str, Any]:
    """Add to a constructor's arguments the sizes that it names and the data knows."""
    batches = {
        "n_technical_batches": facts.n_technical_batches,
        "num_technical_batches": len(facts.technical_batches),
    }
    sizes = {**batches, **facts.sizes}
    parameters = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    arguments = dict(given)
    for name, size in sizes.items():
        if given.get(name) is None:
            if name in parameters or (takes_any and name == "n_technical_batches"):
                arguments[name] = size
            continue
        # A larger vocabulary or bin count leaves rows unused; a smaller one, or another batch count, is a mistake.
        if given[name] < size or (name == "n_technical_batches" and given[name] != size):
            raise ConfigError(
                f"{where}.{name}: {given[name]} was given, but the data needs {size}; leave it out to take the data's"
            )
    if facts.circuits is not None:
        arguments |= _exact_arguments(facts.circuits.arguments(), parameters.keys(), given, where)
    for name in FROM_DATA:
        is_required = name in parameters and parameters[name].default is inspect.Parameter.empty
        if is_required and name not in arguments:
            raise ConfigError(f"{where}.{name}: is required, and the data does not tell it; give it here")
    return arguments


def _exact_arguments(
    of_data: dict[str, Any], named: Collection[str], given: dict[str, Any], where: str
) -> dict[str, Any]:
    """Return those that a constructor names of the arguments that only the data may tell.

    Raises:
        ConfigError: the user gave something else than the data has.
    """
    for name, value in of_data.items():
        own = given.get(name)
        if own is not None and (list(own) if isinstance(own, tuple) else own) != value:
            raise ConfigError(
                f"{where}.{name}: what was given is not what the data has; leave it out to take the data's"
            )
    return {name: value for name, value in of_data.items() if name in named}


def _fp8_arguments(config: RunConfig, factory: Any, where: str) -> dict[str, Any]:
    """Return what tells a model to build its layers for FP8, empty for any other precision.

    Raises:
        ConfigError: FP8 was asked for and cannot be had.
    """
    if config.precision != "fp8":
        return {}
    assert config.fp8 is not None
    backend, recipe = config.fp8.backend, config.fp8.recipe
    has_gpu = torch.cuda.is_available()
    if backend != "emulate" and (config.device == "cpu" or not has_gpu):
        why = "torch sees no CUDA device" if not has_gpu else "device: cpu leaves it out"
        raise ConfigError(
            f"fp8.backend: {backend} computes on a GPU, and {why}; use precision: bf16, or fp8.backend: emulate, which "
            "rounds like FP8 and computes in fp32"
        )
    parameters = inspect.signature(factory).parameters
    if "layer_backend" not in parameters:
        raise ConfigError(
            f"precision: fp8 needs a model whose layers can be FP8, but {where} takes no argument layer_backend; use "
            "precision: bf16, or a model built on models.layers"
        )
    arguments = _layer_arguments(config.fp8, parameters)
    if config.fp8.exclude_layers and "exclude_layers" not in arguments:
        raise ConfigError(
            f"fp8.exclude_layers was given, but {where} takes no argument exclude_layers, so all its layers would be "
            "FP8; leave it out, or hand exclude_layers on to models.layers.LayerFactory"
        )
    if recipe != "current_scaling" and "fp8_recipe" not in arguments:
        raise ConfigError(
            f"fp8.recipe: {recipe} was asked for, but {where} takes no argument fp8_recipe, so its layers are of "
            "current_scaling; leave the recipe out, or hand fp8_recipe on to models.layers.LayerFactory"
        )
    return arguments


def _layer_arguments(settings: Fp8Config, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return what says how layers are built for FP8, of those arguments that a constructor names."""
    arguments = {
        "layer_backend": settings.backend,
        "exclude_layers": settings.exclude_layers,
        "fp8_recipe": settings.recipe,
    }
    return {name: value for name, value in arguments.items() if name in parameters}


def check_fp8_sizes(config: RunConfig) -> None:
    """Find widths that FP8 layers cannot have before any data is opened: the model's configuration is built on trial.

    Raises:
        ConfigError: names the fields, and what is near.
    """
    settings = config.model
    if config.precision != "fp8" or config.fp8 is None or settings.config_class is None:
        return
    config_class = resolve(settings.config_class, "model.config_class")
    parameters = inspect.signature(config_class).parameters
    if "layer_backend" not in parameters:
        return  # building the model says so
    arguments = {**settings.config_args, **_layer_arguments(config.fp8, parameters)}
    for name in ("vocab_size", "n_bins"):  # the data's, which are not known yet
        if name in parameters and arguments.get(name) is None:
            arguments[name] = 1024
    try:
        config_class(**arguments)
    except ModelError as error:
        raise ConfigError(f"model.config_args: {error}") from error
