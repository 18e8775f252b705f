"""The exponential moving average of the trained weights, kept beside the optimizer's moments.

An average is one more tensor of a parameter's optimizer state. So every strategy divides it, saves it, loads it on
another number of ranks and forgets it with a re-initialised parameter exactly as it does the moments.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trainer.config.schema import EmaConfig
from trainer.errors import ConfigError

AVERAGE = "weight_average"
"""Key of the average in a parameter's optimizer state."""
_STEPS = "weight_average_steps"


def keep_average(optimizer: torch.optim.Optimizer, settings: EmaConfig | None) -> None:
    """Let every step of the optimizer be followed by one of the average, for the parameters that it has updated.

    The average begins as the weights after the first update. In update n its decay is min(decay, (1 + n) / (10 + n)),
    the usual warmup of such averages (it is TensorFlow's `num_updates`): early weights are soon forgotten. A step that
    a fused optimizer leaves out on the device (`found_inf`) is none for the average either, without waiting for it.

    Raises:
        ConfigError: weights are of a precision in which an average cannot move.
    """
    if settings is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # Those that ZeRO-3 has divided (`ds_id`) are stepped, and averaged, in fp32 whatever they are here.
            if not hasattr(parameter, "ds_id") and parameter.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"ema: the model was built with weights in {str(parameter.dtype).removeprefix('torch.')}, in which "
                    "an average's small steps are rounded away; build it in float32 (precision: bf16 computes in bf16 "
                    "all the same), or leave ema out"
                )
    limit = settings.decay

    @torch.no_grad()
    def update(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        left_out = getattr(optimizer, "found_inf", None)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if group.get("is_held") or parameter.grad is None:
                    continue
                if left_out is None:
                    _follow(optimizer.state[parameter], parameter.detach(), limit)
                else:
                    applied = 1 - left_out.to(parameter.device, torch.float32)
                    _follow_if(applied, optimizer.state[parameter], parameter.detach(), limit)

    optimizer.register_step_post_hook(update)


def _follow(state: dict[str, Any], weight: Tensor, limit: float) -> None:
    if AVERAGE not in state:
        state[AVERAGE], state[_STEPS] = weight.clone(), 0
        return
    state[_STEPS] += 1
    decay = min(limit, (1 + state[_STEPS]) / (10 + state[_STEPS]))
    state[AVERAGE].lerp_(weight, 1 - decay)


def _follow_if(applied: Tensor, state: dict[str, Any], weight: Tensor, limit: float) -> None:
    """Do the same where `applied` is 1, and nothing where it is 0: both on the device."""
    if AVERAGE not in state:
        state[AVERAGE], state[_STEPS] = weight.clone(), applied - 1  # -1: the first update is still to come
        return
    steps = state[_STEPS] = state[_STEPS] + applied
    decay = torch.where(steps == 0, 0.0, ((1 + steps) / (10 + steps)).clamp(max=limit))
    state[AVERAGE].lerp_(weight, (1 - decay) * applied)


def drop_average(optimizer: torch.optim.Optimizer) -> None:
    """Forget the averages: those of a checkpoint, in a run that keeps none."""
    for state in optimizer.state.values():
        state.pop(AVERAGE, None)
        state.pop(_STEPS, None)


def averaged(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors that the optimizer steps beside their averages, where these have begun."""
    for values, state in optimizer.state.items():
        if AVERAGE in state:
            yield values, state[AVERAGE]


@torch.no_grad()
def swap(optimizer: torch.optim.Optimizer) -> None:
    """Exchange what the optimizer steps and its averages; a second time puts both back, bit for bit."""
    for values, average in averaged(optimizer):
        kept = values.detach().clone()
        values.data.copy_(average)
        average.copy_(kept)
