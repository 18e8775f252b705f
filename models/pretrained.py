"""Models as folders in Hugging Face form: `config.json` and `model.safetensors`, read without executing anything.

`config.json` names the model's class by its dotted path, and importing a module runs its code. Classes of this
package are imported as they are; any other has to be trusted by name or handed over.
"""

import dataclasses
import importlib
import inspect
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.errors import ModelError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT = "cellphase-model-1"
OWN_PACKAGE = __name__.partition(".")[0]

_START_ONLY = ("gene_embedding_path", "text_encoder_path")
"""Arguments of our own models that only a fresh start reads, and that name a file of the machine it ran on."""


@dataclass(frozen=True)
class ModelDescription:
    """Say how a model is constructed, in values that JSON can hold."""

    model_class: str
    """Dotted path of the class, or of a function that returns the model."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the model class."""
    config_class: str | None = None
    """Dotted path of the class whose object is the model's first argument; None where there is none."""
    config_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the config class."""
    n_technical_batches: int | None = None
    """What `model.config.n_technical_batches` is set to, where the config class does not know it."""


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    description: ModelDescription | None = None,
    parts: Mapping[str, str] | None = None,
) -> None:
    """Write a model's `config.json` and `model.safetensors` into a folder, which is made where it is missing.

    Args:
        model: the model; weights that several of its modules share are stored once.
        folder: where the files go; files of these names are replaced.
        description: how the model is constructed; needed unless a dataclass in `model.config` is its only argument.
        parts: for another program's sake, weights in files of their own: file name -> start of their names, which is
            left out there. The others go to the file whose start is empty.

    Raises:
        ModelError: it cannot be told how to construct the model, or its state holds something else than tensors.
    """
    description = describe(model) if description is None else description
    weights, tied = _weights_once(model)
    config = {
        "format": FORMAT,
        "architectures": [description.model_class.replace(":", ".").rpartition(".")[2]],
        **dataclasses.asdict(description),
        "tied_weights": tied,
        **({"parts": dict(parts)} if parts else {}),
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"the arguments of {description.model_class} cannot be written as JSON ({error}); allowed are text, finite "
            "numbers, true, false, null, and lists and tables of them"
        ) from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    for file, inner in _divided(weights, parts or {WEIGHTS_FILE: ""}).items():
        save_weights(inner, folder / file, tied)


def save_weights(weights: Mapping[str, Tensor], path: Path, tied: Mapping[str, str] | None = None) -> None:
    """Write tensors into a safetensors file that whoever may read its folder may read."""
    save_file(dict(weights), path, metadata={"format": "pt", **(tied or {})})
    os.chmod(path, path.parent.stat().st_mode & 0o666)  # safetensors lets only its owner read it


def from_pretrained(
    folder: str | Path,
    *,
    model_class: Callable[..., nn.Module] | None = None,
    trusted_modules: Iterable[str] = (),
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Construct the model that a folder describes, load its weights strictly, and return it in evaluation mode.

    Args:
        folder: what `save_pretrained` or `python -m trainer export` wrote.
        model_class: the model's class, where it is not one of this package; the package it is from is trusted.
        trusted_modules: modules or packages that `config.json` may name beside this package; they are imported.
        device: where the model is put.

    Raises:
        ModelError: a file is missing, damaged or of another kind, names a class that is not trusted, or the weights
            do not fit the model.
    """
    folder = Path(folder)
    description, tied, parts = _read_config(folder)
    weights = _read_parts(folder, parts)
    if isinstance(trusted_modules, str):
        raise ModelError(
            f"trusted_modules is the text {trusted_modules!r}; give a tuple: ({trusted_modules!r},)"
        )
    trusted = [OWN_PACKAGE, *trusted_modules]
    if model_class is not None:
        trusted.append(model_class.__module__.partition(".")[0])
    factory: Any = model_class
    if factory is None:
        factory = resolve_trusted(description.model_class, f"{folder / CONFIG_FILE}: model_class", trusted)
    model = _construct(factory, description, trusted, folder)
    _load(model, weights, tied, folder)
    return model.to(device).eval()


class PretrainedModule(nn.Module):
    """A model whose class loads what was saved or exported of it."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Load a model that was saved or exported (`python -m trainer export`), in evaluation mode.

        Raises:
            ModelError: a file of the folder is missing, damaged, or describes another kind of model.
        """
        return cast(Self, from_pretrained(folder, model_class=cls, device=device))


def construct(folder: str | Path, *, trusted_modules: Iterable[str] = ()) -> nn.Module:
    """Construct the model that a folder describes at random initialisation, in evaluation mode.

    Raises:
        ModelError: the folder describes no model of this program, or names a class that is not trusted.
    """
    description, _, _ = _read_config(Path(folder))
    trusted = [OWN_PACKAGE, *trusted_modules]
    factory = resolve_trusted(description.model_class, f"{Path(folder) / CONFIG_FILE}: model_class", trusted)
    return _construct(factory, description, trusted, Path(folder)).eval()


def read_folder(folder: str | Path) -> tuple[ModelDescription, dict[str, Tensor]]:
    """Read what an exported folder holds, without constructing its model: how that is done, and all its weights.

    Raises:
        ModelError: a file is missing, damaged or of another kind.
    """
    folder = Path(folder)
    description, tied, parts = _read_config(folder)
    weights = _read_parts(folder, parts)
    try:
        return description, {**weights, **{name: weights[kept] for name, kept in tied.items()}}
    except KeyError as error:
        raise ModelError(
            f"{folder}: {CONFIG_FILE} ties a weight to {error}, which {WEIGHTS_FILE} lacks"
        ) from None


def describe(model: nn.Module) -> ModelDescription:
    """Describe a model whose only argument is the dataclass in `model.config`.

    Raises:
        ModelError: the model is of another kind.
    """
    config = getattr(model, "config", None)
    kind = type(model)
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ModelError(
            f"{kind.__name__} has no dataclass in `config` that tells how it was constructed; give save_pretrained a "
            "description=ModelDescription(model_class=..., model_args=...)"
        )
    arguments = config_fields(config)
    return ModelDescription(
        model_class=f"{kind.__module__}.{kind.__qualname__}",
        config_class=f"{type(config).__module__}.{type(config).__qualname__}",
        config_args=arguments,
        n_technical_batches=getattr(config, "n_technical_batches", None),
    )


def set_technical_batches(model: nn.Module, count: int) -> None:
    """Let `model.config.n_technical_batches` be a count, also where its class does not know it or is frozen."""
    if not hasattr(model, "config"):
        model.config = SimpleNamespace()  # type: ignore[assignment]
    if getattr(model.config, "n_technical_batches", None) != count:
        object.__setattr__(model.config, "n_technical_batches", count)


def config_fields(config: Any) -> dict[str, Any]:
    """Return the arguments from which a dataclass object is made anew; what only a fresh start reads is left empty."""
    arguments = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init}
    if type(config).__module__.partition(".")[0] == OWN_PACKAGE:
        arguments |= dict.fromkeys(arguments.keys() & set(_START_ONLY))
    return arguments


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict, all of it tensors.

    Raises:
        ModelError: it holds something else.
    """
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"{type(model).__name__}: {name} in its state is of type {type(value).__name__}; a safetensors file "
                "holds tensors only"
            )
    return dict(state)


def _weights_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to store, and for each name that shares one the name it is stored under."""
    stored: dict[tuple[Any, ...], str] = {}
    weights: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in state_tensors(model).items():
        # Empty tensors all lie at the null address and share nothing.
        place = tensor.data_ptr() if tensor.numel() else name
        view = (place, tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if view in stored:
            tied[name] = stored[view]
            continue
        stored[view] = name
        # Copied, because views into one memory that differ otherwise are stored one by one.
        weights[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return weights, tied


def _read_config(folder: Path) -> tuple[ModelDescription, dict[str, str], dict[str, str]]:
    """Return how the model is constructed, which weights are tied, and the files that hold them."""
    path = folder / CONFIG_FILE
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: there is no such folder; a model is a folder that `trainer export` wrote"
        )
    if not path.is_file():
        is_checkpoint = (folder / "run_state.safetensors").exists()
        advice = (
            "this is a checkpoint of a run: export it first, with python -m trainer export FOLDER OUT"
            if is_checkpoint
            else f"it holds {', '.join(sorted(os.listdir(folder))[:8]) or 'nothing'}"
        )
        raise ModelError(f"{folder}: no {CONFIG_FILE} in it; {advice}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a readable JSON file ({error})") from None
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise ModelError(
            f"{path}: format {found!r} is not {FORMAT!r}; it does not describe a model of this program"
        )
    kinds: dict[str, tuple[type, ...]] = {
        "model_class": (str,),
        "model_args": (dict,),
        "config_class": (str, type(None)),
        "config_args": (dict,),
        "n_technical_batches": (int, type(None)),
        "tied_weights": (dict,),
    }
    for key, kind in kinds.items():
        if not isinstance(config.get(key, ...), kind):
            raise ModelError(
                f"{path}: {key} is {config.get(key, 'missing')!r:.80}; the file was edited or is damaged"
            )
    tied = config["tied_weights"]
    if not all(isinstance(kept, str) for kept in tied.values()):
        raise ModelError(f"{path}: tied_weights is {tied!r:.80}; the file was edited or is damaged")
    parts = config.get("parts", {WEIGHTS_FILE: ""})
    if not isinstance(parts, dict) or not all(
        isinstance(start, str) and Path(file).name == file and file.endswith(".safetensors")
        for file, start in parts.items()
    ):
        raise ModelError(f"{path}: parts is {parts!r:.80}; the file was edited or is damaged")
    return ModelDescription(**{key: config[key] for key in kinds if key != "tied_weights"}), tied, parts


def _divided(weights: Mapping[str, Tensor], parts: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Return the weights of each file; a name goes to the longest start that it has."""
    files: dict[str, dict[str, Tensor]] = {file: {} for file in parts}
    for name, tensor in weights.items():
        file = max(
            (file for file in parts if name.startswith(parts[file])), key=lambda file: len(parts[file])
        )
        files[file][name.removeprefix(parts[file])] = tensor
    return files


def _read_parts(folder: Path, parts: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the weights of all files by their whole names."""
    return {
        f"{start}{name}": tensor
        for file, start in parts.items()
        for name, tensor in _read_weights(folder / file).items()
    }


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"{path.parent}: no {path.name} in it; export the model again")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path}: not a readable safetensors file ({error}); no other kind is read"
        ) from None


def resolve_trusted(path: str, where: str, trusted: Sequence[str]) -> Any:
    """Return the class or function that a path in a file names, importing only what is trusted.

    Args:
        path: the dotted path.
        where: the file and its key, for messages.
        trusted: modules and packages that may be imported, and whose classes are then called.

    Raises:
        ModelError: it names something else.
    """
    module_path, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    if not module_path or not name:
        raise ModelError(
            f"{where} is {path!r}; it must be a dotted path such as models.encoder.MaskedCellEncoder"
        )
    if not _is_within(module_path, trusted):
        raise ModelError(
            f"{where} is {path}, which is not of this package, and importing {module_path} would run its code; if you "
            f"trust it, give trusted_modules=({module_path.partition('.')[0]!r},), or the class itself: "
            f"from_pretrained(folder, model_class=...); to a command, --trust {module_path.partition('.')[0]}"
        )
    try:
        found: Any = importlib.import_module(module_path)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"{where} is {path}, which cannot be found here ({error})") from error
    # A trusted module holds names of others (`models.encoder.torch`), and those are not trusted with it.
    if not callable(found) or not _is_within(getattr(found, "__module__", None) or "", trusted):
        raise ModelError(
            f"{where} is {path}, which is no class of {', '.join(trusted)} but {found!r:.80}; trusted_modules names "
            "the module that defines a class"
        )
    if _is_within(module_path, [OWN_PACKAGE]) and not _is_own_class(found):
        raise ModelError(f"{where} is {path}, which is neither a model nor a config class of this package")
    return found


def _is_within(module_path: str, packages: Iterable[str]) -> bool:
    return any(module_path == package or module_path.startswith(f"{package}.") for package in packages)


def _is_own_class(found: Any) -> bool:
    return isinstance(found, type) and (issubclass(found, nn.Module) or dataclasses.is_dataclass(found))


def _construct(factory: Any, description: ModelDescription, trusted: list[str], folder: Path) -> nn.Module:
    path = folder / CONFIG_FILE
    arguments: list[Any] = []
    try:
        if description.config_class is not None:
            config_class = resolve_trusted(description.config_class, f"{path}: config_class", trusted)
            arguments.append(config_class(**description.config_args))
        model = factory(*arguments, **description.model_args)
    except (TypeError, RuntimeError, MemoryError) as error:  # sizes that no memory holds are among them
        raise ModelError(f"{path}: its arguments do not fit {description.model_class} ({error})") from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{path}: model_class {description.model_class} made a {type(model).__name__}, not a torch.nn.Module"
        )
    if description.n_technical_batches is not None:
        set_technical_batches(model, description.n_technical_batches)
    return model


def _load(model: nn.Module, weights: dict[str, Tensor], tied: Mapping[str, str], folder: Path) -> None:
    """Load the weights strictly, and tie again what was tied."""
    path = folder / WEIGHTS_FILE
    own = model.state_dict().keys()
    for name, kept in tied.items():
        if kept not in weights or name in weights:
            raise ModelError(
                f"{folder}: {CONFIG_FILE} ties {name} to {kept}, but {WEIGHTS_FILE} does not hold it so"
            )
        _tie(model, name, kept, own, folder)
    state = state_tensors(model)
    complete = {**weights, **{name: weights[kept] for name, kept in tied.items()}}
    missing, unexpected = sorted(state.keys() - complete.keys()), sorted(complete.keys() - state.keys())
    shapes = [
        f"{name} is {list(complete[name].shape)} there and {list(state[name].shape)} in the model"
        for name in sorted(state.keys() & complete.keys())
        if state[name].shape != complete[name].shape
    ]
    problems = [f"it lacks {', '.join(missing[:6])}"] if missing else []
    problems += [f"it has {', '.join(unexpected[:6])}, which the model has not"] if unexpected else []
    problems += shapes[:6]
    if problems:
        raise ModelError(f"{path} does not fit {type(model).__name__}: {'; '.join(problems)}")
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.data = tensor.data.to(complete[name].dtype)  # a model may have been saved in another precision
    model.load_state_dict(complete)


def _tie(model: nn.Module, name: str, kept: str, own: Collection[str], folder: Path) -> None:
    """Let two names of a model share one tensor, where its constructor does not do so; `own` are all it has."""
    for each in (name, kept):
        if each not in own:
            raise ModelError(
                f"{folder / CONFIG_FILE}: it ties {name} to {kept}, but {type(model).__name__} has no weight {each}"
            )
    owner_name, _, attribute = name.rpartition(".")
    kept_owner, _, kept_attribute = kept.rpartition(".")
    try:
        owner, source = model.get_submodule(owner_name), model.get_submodule(kept_owner)
        current, shared = getattr(owner, attribute), getattr(source, kept_attribute)
        if current is not shared and current.data_ptr() != shared.data_ptr():
            setattr(owner, attribute, shared)
    except (AttributeError, TypeError) as error:
        raise ModelError(f"{folder / CONFIG_FILE}: it ties {name} to {kept}, but {error}") from None


def signature_defaults(factory: Any) -> dict[str, Any]:
    """Return the defaults of a callable's arguments that JSON can hold, for a record that outlives their change."""
    defaults: dict[str, Any] = {}
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD) and is_json(
            parameter.default
        ):
            defaults[parameter.name] = parameter.default
    return defaults


def is_json(value: Any) -> bool:
    """Tell whether a value comes back equal from JSON."""
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError, RecursionError):
        return False
