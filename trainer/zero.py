"""Training under DeepSpeed ZeRO: its configuration, models built in shards, and the engine's steps and state.

The engine computes; what a step is, and what a checkpoint holds, stays ours: the loop sets the accumulation boundary, the
run's YAML sets clipping, precision and batch sizes, and each rank's part of the flattened weights and optimizer state is
saved by parameter name (see shards.py).
"""

import contextlib
import copy
import json
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from trainer.config.schema import BatchPlan, RunConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.shards import Tensors
from trainer.strategy import Strategy

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
            raise ConfigError(f"{where}: {key} is set there; set the run's `{instead}` instead, and leave it out")
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(f"{where}: zero_optimization.{key}.device is {device}; none and cpu are supported")
    if zero.get("round_robin_gradients"):
        raise ConfigError(f"{where}: zero_optimization.round_robin_gradients is not supported; leave it out")


def complete_config(
    settings: dict[str, Any], given: dict[str, Any], config: RunConfig, plans: Sequence[BatchPlan], precision: str
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
            f"DeepSpeed's configuration sets {named or key} to {found}, but the run's {of_run} makes it {value}; leave it "
            "out there"
        )


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

    with zero.Init(config_dict_or_path=accelerator.state.deepspeed_plugin.deepspeed_config), _gathering_init():
        with _NoLostWrites():
            yield


def is_stage_3(accelerator: Accelerator) -> bool:
    """Tell whether weights are sharded."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return False
    return accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] == 3


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
                f"model.model_class: an empty tensor is written to (Tensor.{name}) while the model is built under ZeRO-3: "
                "the parameter behind `.data` has been divided over the ranks. Write to the parameter itself under "
                "torch.no_grad(), or use torch.nn.init"
            )
        return function(*args, **kwargs)


_DRAWS = frozenset(
    ("normal_", "uniform_", "zero_", "fill_", "trunc_normal_", "copy_", "mul_", "add_", "div_", "bernoulli_")
)


def is_divided(tensor: Any) -> bool:
    """Tell whether a parameter is sharded and not gathered at present."""
    status = getattr(tensor, "ds_status", None)
    return status is not None and status.name == "NOT_AVAILABLE"


def check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that treats a matrix as a whole: ZeRO hands it flat stretches of parameters.

    Two steps on a small matrix are compared with the same steps on two stretches of it.

    Raises:
        ConfigError: they differ, or cannot be taken.
    """
    what = f"optimizer.optimizer_class: {type(optimizer).__name__}"
    generator = torch.Generator().manual_seed(0)
    values, *gradients = (torch.randn(6, 4, generator=generator) for _ in range(3))
    for group in optimizer.param_groups:
        try:
            whole = _two_steps(optimizer, group, [values], [[g] for g in gradients])
            cut = [torch.split(t.flatten(), [10, 14]) for t in (values, *gradients)]
            parts = _two_steps(optimizer, group, list(cut[0]), [list(g) for g in cut[1:]])
        except Exception as error:
            raise ConfigError(
                f"{what} cannot step a stretch of a parameter ({error}), and ZeRO divides parameters into stretches; use "
                "DDP, or an optimizer that treats every value alone, as AdamW does"
            ) from error
        if not torch.allclose(whole, parts, rtol=1e-5, atol=1e-7):
            raise ConfigError(
                f"{what} steps a matrix otherwise than stretches of it, and ZeRO divides parameters into stretches; use "
                "DDP, or an optimizer that treats every value alone, as AdamW does"
            )


def _two_steps(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], values: list[Tensor], gradients: list[list[Tensor]]
) -> Tensor:
    device = group["params"][0].device
    parameters = [nn.Parameter(value.clone().to(device)) for value in values]
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    trial.state = defaultdict(dict)
    trial.param_groups = [{**copy.deepcopy({k: v for k, v in group.items() if k != "params"}), "params": parameters}]
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone().to(device)
        trial.step()
    return torch.cat([parameter.detach().flatten().cpu() for parameter in parameters])


@dataclass(frozen=True)
class _Stretch:
    """A stretch of one parameter in one of the flat tensors that this rank steps."""

    name: str
    place: int
    """Where it begins in the flat tensor."""
    start: int
    """Where it begins in the flattened parameter."""
    num: int


@dataclass
class _Flat:
    """One flat tensor that the optimizer steps: a group's, or under ZeRO-3 a part of one."""

    values: Tensor
    group: int
    members: list[str]
    """The names of all parameters in it, on whichever rank."""
    stretches: list[_Stretch]


class ZeroStrategy(Strategy):
    """Train under ZeRO-1, ZeRO-2 or ZeRO-3."""

    is_sharded = True
    engine: Any

    def _prepare(self) -> Any:
        settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
        self._stage = settings["zero_optimization"]["stage"]
        self.name = f"ZeRO-{self._stage}"
        if isinstance(self.optimizer, torch.optim.Adagrad):
            raise ConfigError(
                "optimizer.optimizer_class: DeepSpeed builds Adagrad anew and merges its parameter groups; use DDP, or "
                "another optimizer"
            )
        check_elementwise(self.optimizer)
        if self.accelerator.mixed_precision in ("bf16", "fp16"):
            self._autocast(self.own_module)
        self.engine, _ = self.accelerator.prepare(self.own_module, self.optimizer)
        return self.engine

    def _autocast(self, module: nn.Module) -> None:
        """Let every forward pass choose precisions as DDP's does: norms and losses stay in fp32."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.accelerator.mixed_precision]
        forward = module.forward

        def with_autocast(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(self.device.type, dtype=dtype):
                return forward(*args, **kwargs)

        module.forward = with_autocast

    @contextlib.contextmanager
    def accumulation(self, is_last: bool) -> Iterator[None]:
        """Wrap a micro-batch's forward and backward, and tell the engine whether the update follows."""
        self.engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradient."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> tuple[float, bool]:
        """Clip, update, drop the gradients; return their norm and whether the update took place."""
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        is_good = bool(self.engine.was_step_applied())
        return (norm if is_good else math.inf), is_good

    @contextlib.contextmanager
    def gathered(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Have whole parameters within the block; what rank 0 writes into them stays."""
        if self._stage != 3 or not parameters:
            yield
            return
        from deepspeed import zero

        with zero.GatheredParameters(list(parameters), modifier_rank=0):
            yield

    def num_parameters(self, *, trained: bool = False) -> int:
        """Return the number of weights, or of those that train."""
        chosen = (p for p in self.own_module.parameters() if p.requires_grad or not trained)
        return sum(getattr(p, "ds_numel", p.numel()) for p in chosen)

    def _forget(self, groups: Any) -> None:
        chosen, optimizer = set(groups), self.engine.optimizer
        for index, flat in enumerate(self._flats()):
            if flat.group not in chosen:
                continue
            self.optimizer.state.pop(flat.values, None)
            if self._stage == 3:
                flat.values.data.copy_(optimizer.fp16_partitioned_groups_flat[index].data)
            else:
                rank = self.accelerator.process_index
                flat.values.data.copy_(optimizer.parallel_partitioned_bit16_groups[index][rank].data)

    def _flats(self) -> list[_Flat]:
        """Return this rank's flat tensors, in DeepSpeed's order."""
        optimizer = self.engine.optimizer
        names = {id(parameter): name for name, parameter in self.own_module.named_parameters()}
        if self._stage != 3:
            flats = []
            for index, parameters in enumerate(optimizer.bit16_groups):
                mapped = [(names[id(p)], p._hp_mapping) for p in parameters if p._hp_mapping is not None]
                stretches = [
                    _Stretch(n, m.hp_fragment_address.start, m.lp_fragment_address.start, m.hp_fragment_address.numel)
                    for n, m in mapped
                ]
                values = optimizer.single_partition_of_fp32_groups[index]
                flats.append(_Flat(values, index, [names[id(p)] for p in parameters], stretches))
            return flats
        flats = []
        for index, parameters in enumerate(optimizer.fp16_groups):
            stretches = []
            for parameter in parameters:
                _, place, num = optimizer.grad_position[optimizer.get_param_id(parameter)]
                start = num * self.accelerator.process_index
                num = min(num, parameter.ds_numel - start)
                if num > 0:  # the last ranks may hold nothing but padding of a small parameter
                    stretches.append(_Stretch(names[id(parameter)], place, start, num))
            values = optimizer.fp32_partitioned_groups_flat[index]
            group = optimizer.sub_group_to_group_id[index]
            flats.append(_Flat(values, group, [names[id(p)] for p in parameters], stretches))
        return flats

    def _held_elsewhere(self) -> list[tuple[str, Any]]:
        """Return the parameters that never train and are sharded all the same: ZeRO-3 alone has them."""
        if self._stage != 3:
            return []
        return [(name, p) for name, p in self.own_module.named_parameters() if not p.requires_grad]

    def shared_state(self) -> dict[str, Any]:
        """Return what rank 0 saves for all."""
        named = dict(self.own_module.named_parameters())
        sharded = {n: p for n, p in named.items() if p.requires_grad or self._stage == 3}
        state = super().shared_state()
        state["sharded_shapes"] = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in sharded.items()}
        state["aliases"] = self._aliases()
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        if self.accelerator.mixed_precision == "fp16":
            state["gradient_scaler"] = {key: vars(scaler)[key] for key in _SCALER_STATE if key in vars(scaler)}
        return state

    def _optimizer_state(self) -> None:
        return None

    def _aliases(self) -> dict[str, str]:
        """Return the further names of tied weights, by the model's own names."""
        model: Any = self.own_module.model
        first: dict[int, str] = {}
        aliases = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in first:
                aliases[name] = first[id(parameter)]
            first.setdefault(id(parameter), name)
        return aliases

    def weights(self) -> dict[str, Tensor]:
        """Return the entries of the model's state dict that are not sharded: buffers, and weights that never train."""
        model: Any = self.own_module.model
        whole = {name for name, p in model.named_parameters() if not p.requires_grad and self._stage != 3}
        persistent = model.state_dict(keep_vars=True)
        return {n: t for n, t in persistent.items() if n in whole or not isinstance(t, nn.Parameter)}

    def shard(self) -> dict[str, Any]:
        """Return this rank's stretches of weights and optimizer state, by parameter name."""
        tree: dict[str, Any] = {}
        for flat in self._flats():
            state = self.optimizer.state.get(flat.values, {})
            shaped = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == flat.values.shape}
            scalars = {key: value for key, value in state.items() if key not in shaped}
            for stretch in flat.stretches:
                span = slice(stretch.place, stretch.place + stretch.num)
                tree[stretch.name] = {
                    "start": stretch.start,
                    "weight": flat.values.detach()[span],
                    "state": {key: value[span] for key, value in shaped.items()},
                    "scalars": scalars,
                }
        for name, parameter in self._held_elsewhere():
            start = self.accelerator.process_index * parameter.ds_tensor.ds_numel
            num = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)
            if num > 0:
                values = parameter.ds_tensor.detach().reshape(-1)[:num]
                tree[name] = {"start": start, "weight": values, "state": {}, "scalars": {}}
        return tree

    def load(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Take this rank's stretches of a checkpoint, whatever strategy and world size saved it."""
        self._load_whole(tensors)
        for flat in self._flats():
            self._load_flat(flat, tensors)
        self._publish_weights()
        for group, saved in zip(self._groups(), state["groups"], strict=True):
            group.update(saved)
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        if self.accelerator.mixed_precision == "fp16" and state["gradient_scaler"] is not None:
            vars(scaler).update(state["gradient_scaler"])

    def _load_whole(self, tensors: Tensors) -> None:
        model: Any = self.own_module.model
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, nn.Parameter) or (self._stage != 3 and not tensor.requires_grad):
                found = tensors.stretch(f"model.{name}", 0, tensor.numel())
                assert found is not None, "names were compared"
                tensor.data.copy_(found.reshape(tensor.shape))
        for name, parameter in self._held_elsewhere():
            with self.gathered([parameter]):
                if self.accelerator.process_index == 0:
                    found = tensors.stretch(name, 0, parameter.ds_numel)
                    assert found is not None, "names were compared"
                    parameter.data.copy_(found.reshape(parameter.shape))

    def _load_flat(self, flat: _Flat, tensors: Tensors) -> None:
        described = [tensors.optimizer_keys(name) for name in flat.members]
        keys = sorted({key for shaped, _ in described for key in shaped})
        state: dict[str, Any] = {key: torch.zeros_like(flat.values) for key in keys}
        for _, scalars in described:
            # Each flat tensor counts its steps by itself: a shared tensor would be stepped by all of them.
            state |= {key: copy.deepcopy(value) for key, value in scalars.items() if key not in state}
        for stretch in flat.stretches:
            span = slice(stretch.place, stretch.place + stretch.num)
            weight = tensors.stretch(stretch.name, stretch.start, stretch.num)
            if weight is None:
                raise CheckpointError(f"the checkpoint holds no weights of {stretch.name}")
            flat.values.data[span].copy_(weight)
            for key in keys:
                found = tensors.stretch(stretch.name, stretch.start, stretch.num, key)
                if found is not None:
                    state[key][span].copy_(found)
        if state:
            self.optimizer.state[flat.values] = state

    def _publish_weights(self) -> None:
        """Bring the fp32 weights into those that the model computes with, as DeepSpeed does after a step."""
        optimizer = self.engine.optimizer
        if self._stage != 3:
            optimizer.update_lp_params()
            return
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()


_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def gathered_where_divided(parameters: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
    """Have whole parameters within the block, those that are divided gathered; what rank 0 writes stays."""
    divided = [parameter for parameter in parameters if is_divided(parameter)]
    if not divided:
        return contextlib.nullcontext()
    from deepspeed import zero

    return zero.GatheredParameters(divided, modifier_rank=0)


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return a tensor's shape, of a sharded parameter that of the whole."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))
