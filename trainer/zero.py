"""Training under DeepSpeed ZeRO: the engine's steps, and this rank's part of weights and optimizer state.

The engine computes. What a step is and what a checkpoint holds stays ours: the loop sets the accumulation boundary, and
each rank's stretches of the flattened weights and optimizer state are saved by parameter name (see shards.py).
"""

import contextlib
import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import CheckpointError, ConfigError
from trainer.shards import Tensors
from trainer.strategy import Strategy
from trainer.zero_config import settings_of


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
                f"{what} cannot step a stretch of a parameter ({error}), and ZeRO divides parameters into stretches; "
                "use DDP, or an optimizer that treats every value alone, as AdamW does"
            ) from error
        if not torch.allclose(whole, parts, rtol=1e-5, atol=1e-7):
            raise ConfigError(
                f"{what} steps a matrix otherwise than stretches of it, and ZeRO divides parameters into stretches; "
                "use DDP, or an optimizer that treats every value alone, as AdamW does"
            )


def _two_steps(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    values: list[Tensor],
    gradients: list[list[Tensor]],
) -> Tensor:
    device = group["params"][0].device
    parameters = [nn.Parameter(value.clone().to(device)) for value in values]
    trial = object.__new__(type(optimizer))
    trial.__dict__.update(optimizer.__dict__)
    trial.state = defaultdict(dict)
    trial.param_groups = [
        {**copy.deepcopy({k: v for k, v in group.items() if k != "params"}), "params": parameters}
    ]
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
    _begins_step = True

    def _prepare(self) -> Any:
        settings = settings_of(self.accelerator)
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
        if self._begins_step:
            self._share_buffers()
        self._begins_step = is_last
        yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have the module in evaluation mode within the block, with rank 0's buffers on every rank."""
        self._share_buffers()
        with super().evaluating():
            yield

    def _share_buffers(self) -> None:
        """Give every rank the buffers of rank 0, which checkpoints hold, when and how DDP does."""
        # Listed each time: a module may put another tensor in a buffer's place.
        buffers = [buffer.detach() for buffer in self.own_module.buffers()]
        if buffers and self.accelerator.num_processes > 1:
            from torch._C._distributed_c10d import _broadcast_coalesced  # some builds of torch have none

            group = torch.distributed.distributed_c10d._get_default_group()
            _broadcast_coalesced(group, buffers, _BUCKET_BYTES, 0)

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradient."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> float:
        """Clip, update, drop the gradients; return their norm, infinity where the update was left out."""
        self.engine.step()
        return float(self.engine.get_global_grad_norm()) if self.engine.was_step_applied() else math.inf

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

    def _forget(self, groups: Iterable[int]) -> None:
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
                    _Stretch(
                        n,
                        m.hp_fragment_address.start,
                        m.lp_fragment_address.start,
                        m.hp_fragment_address.numel,
                    )
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
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        if self.accelerator.mixed_precision == "fp16":
            state["gradient_scaler"] = {
                key: vars(scaler)[key] for key in _SCALER_STATE if key in vars(scaler)
            }
        return state

    def _optimizer_state(self) -> None:
        return None

    def _held_whole(self, part: nn.Module) -> dict[str, Any]:
        """Return what of a state dict is not sharded: buffers, and outside of ZeRO-3 weights that never train."""
        whole = {name for name, p in part.named_parameters() if not p.requires_grad and self._stage != 3}
        persistent = part.state_dict(keep_vars=True)
        return {n: t for n, t in persistent.items() if n in whole or not isinstance(t, nn.Parameter)}

    def shard(self) -> dict[str, Any]:
        """Return this rank's stretches of weights and optimizer state, by parameter name."""
        tree: dict[str, Any] = {}
        for flat in self._flats():
            state = self.optimizer.state.get(flat.values, {})
            shaped = {
                k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == flat.values.shape
            }
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
        self._load_loss(tensors)
        for flat in self._flats():
            self._load_flat(flat, tensors)
        self._publish_weights()
        for group, saved in zip(self.optimizer.param_groups, state["groups"], strict=True):
            group.update(saved)
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        if self.accelerator.mixed_precision == "fp16" and state["gradient_scaler"] is not None:
            vars(scaler).update(state["gradient_scaler"])

    def _load_whole(self, tensors: Tensors) -> None:
        model = self.own_module.model
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
        # Some stay gathered after a forward pass, because they are soon used again: with the values of before.
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()


_BUCKET_BYTES = 250 << 20
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
