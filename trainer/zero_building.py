"""Models built in shards under ZeRO-3, and access to parameters that are divided over the ranks."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainer.errors import ConfigError
from trainer.zero_config import is_stage_3, settings_of


@contextlib.contextmanager
def building(accelerator: Accelerator) -> Iterator[None]:
    """Build a model within: under ZeRO-3 each module's parameters are divided over the ranks when it is complete.

    No rank ever holds the whole model. What writes to a parameter that is divided already, as a model does that starts
    its modules' weights itself, finds it gathered: the functions of `torch.nn.init`, and in-place methods.
    """
    if not is_stage_3(accelerator):
        yield
        return
    from deepspeed import zero

    # FP8 layers import it when they are built, and it cannot be imported while DeepSpeed replaces torch's functions.
    importlib.import_module("torch._dynamo")
    with zero.Init(config_dict_or_path=settings_of(accelerator)), _gathering_init(), _NoLostWrites():
        yield


@contextlib.contextmanager
def _gathering_init() -> Iterator[None]:
    """Let the functions of `torch.nn.init` gather parameters that are divided, as when a parent starts its children."""
    from deepspeed import zero

    originals = {name: f for name, f in vars(nn.init).items() if name.endswith("_") and callable(f)}

    def gathering(function: Callable[..., Any]) -> Callable[..., Any]:
        def initialise(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not is_divided(tensor):
                return function(tensor, *args, **kwargs)
            with zero.GatheredParameters([tensor], modifier_rank=0):
                function(tensor, *args, **kwargs)
            return tensor

        return initialise

    for name, function in originals.items():
        if not name.startswith("_"):
            setattr(nn.init, name, gathering(function))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(nn.init, name, function)


class _NoLostWrites(TorchFunctionMode):
    """Gather a divided parameter for an in-place write to it, and refuse writes that would be lost."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        kwargs = kwargs or {}
        if not args or not name.endswith("_") or (name.startswith("_") and name != "__setitem__"):
            return function(*args, **kwargs)
        target = args[0]
        if isinstance(target, nn.Parameter):
            if is_divided(target) and name != "requires_grad_":
                from deepspeed import zero

                with zero.GatheredParameters([target], modifier_rank=0):
                    function(*args, **kwargs)
                return target
        elif isinstance(target, Tensor) and target.numel() == 0 and name in _DRAWS:
            raise ConfigError(
                f"model.model_class: an empty tensor is written to (Tensor.{name}) while the model is built under "
                "ZeRO-3: the parameter behind `.data` has been divided over the ranks. Write to the parameter itself "
                "under torch.no_grad(), or use torch.nn.init"
            )
        return function(*args, **kwargs)


_DRAWS = frozenset(
    ("normal_", "uniform_", "zero_", "fill_", "trunc_normal_", "copy_", "mul_", "add_", "div_", "bernoulli_")
)


def is_divided(tensor: Any) -> bool:
    """Tell whether a parameter is sharded and not gathered at present."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name == "NOT_AVAILABLE"


def gathered_where_divided(parameters: Sequence[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Have whole parameters within the block, those that are divided gathered; what rank 0 writes stays."""
    divided = [parameter for parameter in parameters if is_divided(parameter)]
    if not divided:
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(divided, modifier_rank=0)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's shape, of a sharded parameter that of the whole."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))
