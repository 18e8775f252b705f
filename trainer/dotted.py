"""Resolve the dotted paths of a configuration and check their arguments, before data and devices."""

import importlib
import inspect
import os
import pkgutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer.circuit_facts import CIRCUIT_ARGUMENTS
from trainer.config.messages import Problem, config_error, unknown_name
from trainer.config.replaced import advice_on_path
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError

SIZES = (
    "vocab_size", "n_bins", "max_length", "n_classes", "num_genes", "num_targets", "num_qubits", "num_prompts",
)  # fmt: skip
"""Sizes that a phase's data may tell: the largest of all phases is the model's."""

FROM_DATA = (
    *SIZES,
    "n_technical_batches",
    "num_technical_batches",
    *CIRCUIT_ARGUMENTS,
)
"""Arguments of a model or its config class that follow from the data where they are left out."""

FOR_FACTORY = ("rank", "world_size", "seed", "facts")
"""Arguments that a loader factory is given where it names them."""

_ONLY_OURS = ("rank", "world_size", "facts")
_HIDDEN_KINDS = (
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.VAR_KEYWORD,
    inspect.Parameter.POSITIONAL_ONLY,
)


def look_in_current_folder() -> None:
    """Let modules of the user's in the current folder be found: at the end, where they shadow nothing."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


def resolve(path: str, where: str) -> Any:
    """Return what `package.module.name` or `package.module:name` names; `where` is its YAML key.

    Raises:
        ConfigError: there is no such module or name, or importing the module fails.
    """
    if ":" in path:
        module_path, _, attributes = path.partition(":")
        module = _import(module_path, path, where)
        if module is None:
            raise ConfigError(f"{where}: {_no_module(module_path, path)}")
        return _attribute(module, attributes.split("."), path, where)
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = _import(".".join(parts[:length]), path, where)
        if module is not None:
            return _attribute(module, parts[length:], path, where)
    raise ConfigError(f"{where}: {_no_module(parts[0], path)}")


def bind_arguments(
    target: Callable[..., Any],
    arguments: dict[str, Any],
    where: str,
    provided: Iterable[str] = (),
    leading: int = 0,
) -> None:
    """Check that a callable takes `arguments`, together with what the trainer passes.

    Args:
        target: the class or function.
        arguments: keyword arguments from the configuration.
        where: their YAML key.
        provided: keyword arguments that the trainer passes where the callable names them and `arguments`
            do not.
        leading: number of positional arguments that the trainer passes first.

    Raises:
        ConfigError: lists unknown and missing names.
    """
    problems = argument_problems(target, arguments, where, provided, leading)
    if problems:
        raise ConfigError("\n".join(problem.line() for problem in problems))


def argument_problems(
    target: Any, arguments: dict[str, Any], where: str, provided: Iterable[str] = (), leading: int = 0
) -> list[Problem]:
    """Return what `bind_arguments` would refuse."""
    name = getattr(target, "__name__", None) or type(target).__name__
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (ValueError, TypeError):
        return []  # a builtin that does not tell its signature
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_any_position = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if leading > len(by_position) and not takes_any_position:
        return [
            Problem(
                where, f"{name} takes {len(by_position)} positional arguments; the trainer passes {leading}"
            )
        ]
    taken = {p.name for p in by_position[:leading]}
    by_name = {p.name: p for p in parameters if p.kind not in _HIDDEN_KINDS and p.name not in taken}
    problems = [
        Problem(f"{where}.{key}", f"{name} gets this from the trainer; remove it")
        for key in arguments
        if key in taken
    ]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        problems += [
            Problem(f"{where}.{key}", f"{name} takes no such argument; {unknown_name(str(key), by_name)}")
            for key in arguments
            if key not in by_name and key not in taken
        ]
    given = {*arguments, *provided}
    problems += [
        Problem(f"{where}.{p.name}", f"is required by {name}")
        for p in parameters
        if p.default is p.empty and p.name in by_name and p.name not in given
    ]
    hidden = [p.name for p in by_position[leading:] if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    problems += [
        Problem(where, f"{name} takes {key} by position only, which a configuration cannot give")
        for key in hidden
    ]
    return problems


def check_dotted_paths(config: RunConfig) -> list[str]:
    """Resolve every dotted path of a configuration, bind its arguments, and return the paths.

    Raises:
        ConfigError: lists every mistake with its YAML path.
    """
    check = _Check()
    model, optimizer = config.model, config.optimizer
    if model.config_class is None:
        check.add("model.model_class", model.model_class, "model.model_args", model.model_args, FROM_DATA)
    else:
        check.add("model.config_class", model.config_class, "model.config_args", model.config_args, FROM_DATA)
        check.add("model.model_class", model.model_class, "model.model_args", model.model_args, (), 1)
    # A factory of optimizers may ask for the model beside the parameters; a class gets the parameters only.
    check.add(
        "optimizer.optimizer_class",
        optimizer.optimizer_class,
        "optimizer.optimizer_args",
        optimizer.optimizer_args,
        ("model",),
        1,
    )
    if optimizer.scheduler_class is not None:
        arguments = optimizer.scheduler_args
        check.add(
            "optimizer.scheduler_class",
            optimizer.scheduler_class,
            "optimizer.scheduler_args",
            arguments,
            (),
            1,
        )
    if config.loss is not None:
        check.add("loss.loss_class", config.loss.loss_class, "loss.loss_args", config.loss.loss_args)
    for index, phase in enumerate(config.datasets):
        for where, section in (
            (f"datasets.{index}", phase),
            (f"datasets.{index}.validation", phase.validation),
        ):
            if section is not None:
                check.add_factory(where, section.dataloader_factory, section.dataloader_args)
    if check.problems:
        raise config_error("dotted paths", check.problems)
    return check.paths


class _Check:
    """Collect the mistakes of several dotted paths."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.problems: list[Problem] = []

    def add(
        self,
        where: str,
        path: str,
        arguments_where: str,
        arguments: dict[str, Any],
        provided: Iterable[str] = (),
        leading: int = 0,
    ) -> None:
        """Resolve one path and bind its arguments."""
        self.paths.append(path)
        try:
            target = resolve(path, where)
        except ConfigError as error:
            advice = advice_on_path(path, arguments)
            self.problems.append(Problem("", f"{error}; {advice}" if advice else str(error)))
            return
        if not callable(target):
            kind = "a module" if isinstance(target, ModuleType) else f"of type {type(target).__name__}"
            self.problems.append(Problem(where, f"{path} is {kind}; name a class or a function"))
            return
        if inspect.isclass(target) and where == "optimizer.optimizer_class":
            provided = ()
        self.problems += argument_problems(target, arguments, arguments_where, provided, leading)

    def add_factory(self, where: str, path: str, arguments: dict[str, Any]) -> None:
        """Resolve a loader factory, whose `rank`, `world_size` and `facts` are the trainer's to give."""
        self.problems += [
            Problem(
                f"{where}.dataloader_args.{key}",
                "the trainer gives this to factories that name it; remove it",
            )
            for key in _ONLY_OURS
            if key in arguments
        ]
        self.add(f"{where}.dataloader_factory", path, f"{where}.dataloader_args", arguments, FOR_FACTORY)


def _import(module_path: str, path: str, where: str) -> ModuleType | None:
    """Return a module, or None where there is none of this name; one that fails to import is an error."""
    try:
        return importlib.import_module(module_path)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_path == missing or module_path.startswith(f"{missing}."):
            return None
        raise ConfigError(f"{where}: {_failure(error, module_path, path)}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: {_failure(error, module_path, path)}") from error


def _attribute(holder: Any, names: list[str], path: str, where: str) -> Any:
    for name in names:
        try:
            holder = getattr(holder, name)
        except AttributeError:
            raise ConfigError(f"{where}: {_no_attribute(holder, name, path)}") from None
        except Exception as error:  # a package that imports its parts when they are asked for
            raise ConfigError(f"{where}: {_failure(error, path, path)}") from error
    return holder


def _no_module(module_path: str, path: str) -> str:
    parts = module_path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        parent = sys.modules.get(".".join(parts[:length]))
        if parent is not None:
            return _no_attribute(parent, parts[length], path)
    return (
        f"{path}: there is no module '{parts[0]}'; modules are looked for in the current folder "
        f"({Path.cwd()}), on PYTHONPATH and among the installed packages"
    )


def _no_attribute(holder: Any, name: str, path: str) -> str:
    names = [n for n in dir(holder) if not n.startswith("_")]
    if isinstance(holder, ModuleType):
        names += [m.name for m in pkgutil.iter_modules(getattr(holder, "__path__", []))]
    owner = getattr(holder, "__name__", type(holder).__name__)
    return f"{path}: {owner} has no '{name}'; {unknown_name(name, dict.fromkeys(names), listed=15)}"


def _failure(error: BaseException, module_path: str, path: str) -> str:
    """Say why a module does not import, and at which line of the user's own files."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{error.filename}, line {error.lineno}"
        reason = f"SyntaxError: {error.msg}"
    else:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")
        ]
        frames = [
            f for f in frames if Path(f.filename) != Path(__file__) and f.filename != importlib.__file__
        ]
        libraries = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
        own = [f for f in frames if not f.filename.startswith(libraries)] or frames
        place = f"{own[-1].filename}, line {own[-1].lineno}" if own else module_path
    return f"{path}: importing {module_path} failed: {reason} ({place})"
