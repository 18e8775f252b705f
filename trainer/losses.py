"""Find a run's loss in one of the ways a config or model can offer it, and give it one shape.

In this order: the configured `loss.loss_class`; `model.diffusion.compute_loss`; `model.compute_loss`;
`model.criterion` on the model's output. All of them run inside one module's forward, so that the hooks of
DDP and ZeRO see every forward pass.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from data.collate import num_cells
from models.outputs import LossOutput
from trainer.config.schema import LossConfig
from trainer.dotted import resolve
from trainer.errors import ConfigError


class LossModule(nn.Module):
    """Hold the model and its loss; the forward pass takes a batch and returns the loss."""

    def __init__(self, model: nn.Module, loss: Any = None) -> None:
        """Take the model and the object built from `loss.loss_class`, if one was configured."""
        super().__init__()
        self.model = model
        self.loss = loss
        self.route, self._compute, owner = _find_loss(model, loss)
        self._objective = (owner,)  # in a tuple, because it may be the model, which is no submodule twice
        self.initial_options: Any = copy.copy(getattr(owner, "options", None))
        """The objective's options as it was built with them, where it has any; phases may change the object itself."""
        weigh = getattr(owner, "loss_weight", None)
        self._weigh: Callable[[dict[str, Any]], Any] | None = weigh if callable(weigh) else None

    @property
    def objective(self) -> Any:
        """Return what computes the loss: the configured object, `model.diffusion`, a criterion, or the model."""
        return self._objective[0]

    def weight(self, batch: dict[str, Any]) -> float:
        """Return what a batch's loss will be divided by (its cells, unless the loss says otherwise)."""
        if self._weigh is not None:
            return float(self._weigh(batch))
        return float(num_cells(batch))

    def refuses_packed_batches(self) -> str | None:
        """Return why packed batches cannot be trained on, or None where the model and the loss say that they can."""
        for what, holder in (("model", self.model), ("loss", self.loss)):
            if holder is not None and not getattr(holder, "accepts_packed_batches", False):
                return f"the {what} {type(holder).__name__} does not say that it takes them (accepts_packed_batches)"
        if self.route.startswith("model.diffusion"):
            return f"its loss ({self.route}) is given the tokens without the bounds of the cells"
        return None

    def forward(
        self,
        batch: dict[str, Any],
        phase_step: int,
        total_steps: int | None,
        announced: float | None = None,
        instead: Callable[[nn.Module, dict[str, Any]], Any] | None = None,
    ) -> Any:
        """Compute the loss of one micro-batch as a sum over what `weight` counts, a `LossOutput`.

        Args:
            batch: on the device.
            phase_step: optimizer steps taken in the phase.
            total_steps: that the phase takes; None where nothing tells.
            announced: what `weight` said of the batch before it went to the device; None: it is asked again.
            instead: return what this makes of the model and the batch, and compute no loss: embeddings, or cells that
                are drawn. Within this forward pass the hooks of DDP and ZeRO run.
        """
        if instead is not None:
            return instead(self.model, batch)
        result = self._compute(batch, phase_step, total_steps)
        return self._normalise(result, batch, announced)

    def _normalise(self, result: Any, batch: dict[str, Any], announced: float | None) -> LossOutput:
        metrics: dict[str, Tensor] = {}
        if isinstance(result, LossOutput):
            if self._weigh is None:
                raise ConfigError(
                    f"the loss ({self.route}) returns LossOutput, whose weight must be known before the forward pass; "
                    "give the same object a method loss_weight(batch) that returns it"
                )
            self._check_weight(result.weight, batch, announced)
            for name, value in result.metrics.items():
                metrics[name] = self._scalar(value, f"metrics['{name}']").detach()
            return LossOutput(self._scalar(result.sum, "sum"), result.weight, metrics)
        if isinstance(result, tuple) and len(result) == 2:
            # The pair (loss, raw loss) of the original phases trainer.
            result, raw = result
            if isinstance(raw, Tensor) and raw.ndim == 0:
                metrics["raw_loss"] = raw.detach()
        if not isinstance(result, Tensor) or result.ndim != 0:
            raise ConfigError(
                f"the loss ({self.route}) returns {_kind(result)}; it must return a scalar tensor, a pair of scalars "
                "(loss, raw loss), or models.outputs.LossOutput"
            )
        weight = self.weight(batch) if announced is None else announced
        return LossOutput(result * weight, weight, {name: value * weight for name, value in metrics.items()})

    def _scalar(self, value: Any, field: str) -> Tensor:
        """Return a part of a `LossOutput`, or say that it is no scalar."""
        if isinstance(value, Tensor) and value.ndim == 0:
            return value
        raise ConfigError(
            f"the loss ({self.route}) returns a LossOutput whose {field} is {_kind(value)}; it must be a scalar "
            "tensor, summed over what the weight counts"
        )

    def _check_weight(self, weight: Any, batch: dict[str, Any], announced: float | None) -> None:
        """Compare the loss's weight with the one announced, where that needs no wait for the device."""
        if isinstance(weight, Tensor) and weight.device.type != "cpu":
            return
        announced = self.weight(batch) if announced is None else announced
        if float(weight) != announced:
            raise ConfigError(
                f"the loss ({self.route}) returned weight {float(weight)}, but its loss_weight(batch) said "
                f"{announced}; the two must agree, because gradients are scaled by the announced one"
            )


def build_loss(settings: LossConfig | None) -> Any:
    """Build the object of `loss.loss_class`, or return None."""
    if settings is None:
        return None
    return resolve(settings.loss_class, "loss.loss_class")(**settings.loss_args)


def _kind(value: Any) -> str:
    """Say what a loss returned that is no scalar tensor."""
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _find_loss(model: nn.Module, loss: Any) -> tuple[str, Callable[..., Any], Any]:
    """Return the route's name, a function (batch, phase_step, total_steps) -> result, and who knows the weight."""
    if loss is not None:
        return _configured(model, loss)
    diffusion = getattr(model, "diffusion", None)
    if callable(getattr(diffusion, "compute_loss", None)):
        return "model.diffusion.compute_loss", _diffusion(model, diffusion), diffusion
    compute = getattr(model, "compute_loss", None)
    if callable(compute):
        return "model.compute_loss", lambda batch, step, total: compute(batch), model
    criterion = getattr(model, "criterion", None)
    if callable(criterion):
        owner = model if inspect.ismethod(criterion) else criterion
        return "model.criterion", lambda batch, step, total: criterion(model(batch), batch), owner
    raise ConfigError(
        f"model.model_class: {type(model).__name__} offers no loss: configure loss.loss_class, or give the model "
        "diffusion.compute_loss(...), compute_loss(batch) or criterion(output, batch)"
    )


def _configured(model: nn.Module, loss: Any) -> tuple[str, Callable[..., Any], Any]:
    name = f"loss.loss_class {type(loss).__name__}"
    compute = getattr(loss, "compute_loss", None)
    if callable(compute):
        wanted = _accepted(compute, {"phase_step", "step", "total_phase_steps", "total_steps"})

        def with_method(batch: dict[str, Any], step: int, total: int | None) -> Any:
            given = {"phase_step": step, "step": step, "total_phase_steps": total, "total_steps": total}
            return compute(model, batch, **{key: given[key] for key in wanted})

        return f"{name}.compute_loss", with_method, loss
    if callable(loss):
        return name, lambda batch, step, total: loss(model(batch), batch), loss
    raise ConfigError(
        f"loss.loss_class: {type(loss).__name__} has neither compute_loss(model, batch) nor a call (output, batch)"
    )


def _diffusion(model: nn.Module, diffusion: Any) -> Callable[..., Any]:
    # Seeds of the noise make it the same after a resume and on another number of ranks.
    takes_seed = bool(_accepted(diffusion.compute_loss, {"noise_seed"}))

    def compute(batch: dict[str, Any], step: int, total: int | None) -> Any:
        seed = {"noise_seed": batch["noise_seed"]} if takes_seed and "noise_seed" in batch else {}
        return diffusion.compute_loss(
            model,
            batch["tokens"],
            control_set=batch.get("control"),
            target_gene_idx=batch.get("target_gene_idx"),
            batch_idx=batch.get("batch_idx"),
            step=step,
            **seed,
        )

    return compute


def _accepted(function: Callable[..., Any], names: set[str]) -> set[str]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return names
    return names & parameters.keys()


def move_to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy a batch's tensors to the device, without waiting where the memory is pinned."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
