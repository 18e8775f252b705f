"""Gaussian diffusion in discrete timesteps: how noise is added for training, what is predicted, how it is taken away.

At timestep t, 0 to T - 1, x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, where a_t is the product of 1 - beta up to t ("alpha
bar") and e is standard normal. Everything here is arithmetic; the noise is drawn by the caller.

Sources: DDPM (Ho et al., arXiv 2006.11239), DDIM (Song et al., 2010.02502), DPM-Solver++ 2M (Lu et al., 2211.01095),
cosine schedules (Nichol and Dhariwal, 2102.09672), v prediction (Salimans and Ho, 2202.00512), zero terminal
signal-to-noise ratio (Lin et al., 2305.08891), input perturbation (Ning et al., 2301.11706). Names, defaults and the
constants of the cosine schedules are those of genQC, whose presets and folders use them.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.errors import ModelError, check_choice

BetaSchedule = Literal["linear", "linear_sqrt", "cos_alpha", "cos_alpha4"]
PredictionType = Literal["epsilon", "x0", "v-type"]
Predict = Callable[[Tensor, int], Tensor]

_OTHER_SPELLINGS = {"v": "v-type", "v_prediction": "v-type", "sample": "x0"}
_NO_SIGNAL = 1e-10
"""Where alpha bar is below it, a predicted noise tells nothing of x_0 in fp32."""


class Estimate(NamedTuple):
    """What a prediction says of the two things that x_t was mixed from."""

    x0: Tensor
    noise: Tensor


class Previous(NamedTuple):
    """The step before, which a solver of second order looks back on."""

    x0: Tensor
    timestep: int


class DDPMScheduler:
    """Ancestral sampling: each step draws from the posterior of x_s given x_t and the predicted x_0, s < t.

    Its variance is the posterior's own, and steps over several timesteps use the posterior over that distance.

    Zero terminal signal-to-noise ratio: with `cos_alpha`, or with `enable_zero_terminal_snr` and a prediction of x0 or
    v, alpha bar of the last timestep is 0. x0 and v predictions have a finite x_0 there. A predicted noise has none, so
    with `epsilon` sampling steps over that timestep: x_t is pure noise there, and so is what the next one starts from.

    Args:
        num_train_timesteps: T.
        beta_start: beta of the first timestep; of `linear` and `linear_sqrt`.
        beta_end: beta of the last timestep; of `linear` and `linear_sqrt`.
        beta_schedule: `linear`, or `linear_sqrt` in the square root of beta; `cos_alpha`, where alpha bar is
            cos((t / T + 0.008) pi / 2.016) squared, or `cos_alpha4`, to the fourth power.
        input_perturbation: standard deviation of further noise in training, in units of the noise of the timestep; the
            targets know nothing of it. None or 0 adds none.
        prediction_type: what the network is trained to predict: `epsilon`, the noise; `x0`; or `v-type` (also `v`):
            sqrt(a) e - sqrt(1 - a) x_0.
        enable_zero_terminal_snr: let alpha bar end at 0 for x0 and v; without it betas are at most 0.999.
        betas: the betas themselves, [T], in place of a schedule.
    """

    draws_noise = True
    """Whether a step adds noise."""

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        input_perturbation: float | None = 0.1,
        prediction_type: str = "epsilon",
        enable_zero_terminal_snr: bool = True,
        betas: Sequence[float] | None = None,
    ) -> None:
        """Check the choices and work out alpha bar."""
        kind = _OTHER_SPELLINGS.get(prediction_type, prediction_type)
        check_choice("scheduler: prediction_type", kind, PredictionType)
        check_choice("scheduler: beta_schedule", beta_schedule, BetaSchedule)
        if betas is None and num_train_timesteps < 2:
            raise ModelError(
                f"scheduler: num_train_timesteps is {num_train_timesteps}; it must be at least 2"
            )
        if input_perturbation is not None and input_perturbation < 0:
            raise ModelError(
                f"scheduler: input_perturbation is {input_perturbation}; it must not be negative"
            )
        self.prediction_type = cast(PredictionType, kind)
        self.input_perturbation = input_perturbation or 0.0
        if betas is not None:
            alphas = 1 - np.asarray(betas, dtype=np.float64)
        else:
            largest = 1.0 if enable_zero_terminal_snr else 0.999
            alphas = 1 - _betas(beta_schedule, num_train_timesteps, beta_start, beta_end, largest)
            if enable_zero_terminal_snr and kind != "epsilon" and beta_schedule != "cos_alpha":
                alphas = _with_zero_end(alphas)
        if not (len(alphas) > 1 and np.all((alphas >= 0) & (alphas < 1))):
            raise ModelError(
                "scheduler: betas must be above 0 and at most 1, two or more of them; check beta_start and beta_end, "
                "or betas"
            )
        self.num_train_timesteps = len(alphas)
        alpha_bar = np.cumprod(alphas)
        # cos(pi / 2) is not quite 0 in floating point.
        self.alpha_bar: NDArray[np.float64] = np.where(alpha_bar < 1e-30, 0.0, alpha_bar)
        self._tables: dict[torch.device, Tensor] = {}

    def add_noise(
        self, x0: Tensor, noise: Tensor, timesteps: Tensor, perturbation: Tensor | None = None
    ) -> Tensor:
        """Return x_t for x_0 [B, ...] and timesteps [B]; `perturbation` is the noise of `input_perturbation`."""
        signal, scale = self._scales(timesteps, x0.ndim)
        if perturbation is not None:
            noise = noise + self.input_perturbation * perturbation
        return signal * x0 + scale * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the network is to predict."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "x0":
            return x0
        signal, scale = self._scales(timesteps, x0.ndim)
        return signal * noise - scale * x0

    def estimate(self, prediction: Tensor, x_t: Tensor, timesteps: Tensor) -> Estimate:
        """Return the x_0 and the noise that a prediction means; always finite.

        Where no signal is left, the x_0 of a predicted noise is not told by it, and its scale means nothing.
        """
        signal, scale = self._scales(timesteps, x_t.ndim)
        if self.prediction_type == "x0":
            return Estimate(prediction, (x_t - signal * prediction) / scale)
        if self.prediction_type == "v-type":
            return Estimate(signal * x_t - scale * prediction, scale * x_t + signal * prediction)
        return Estimate((x_t - scale * prediction) / signal.clamp(min=_NO_SIGNAL**0.5), prediction)

    def sampling_timesteps(self, num_steps: int | None = None) -> list[int]:
        """Return the timesteps of a sampler, from noise to circuit, evenly spaced; None takes all of them.

        With predictions of x0 and v they begin at T - 1. With epsilon they end at 0 and begin a whole stride below T,
        as genQC's do: a predicted noise says little where little else is left.
        """
        total = self.num_train_timesteps
        count = total if num_steps is None else num_steps
        if not 1 <= count <= total:
            raise ModelError(f"num_steps is {count}; it must be in 1 to num_train_timesteps {total}")
        if self.prediction_type != "epsilon":
            return [round((index + 1) * total / count) - 1 for index in reversed(range(count))]
        found = [index * total // count for index in reversed(range(count))]
        return [t for t in found if self.alpha_bar[t] >= _NO_SIGNAL]

    @torch.no_grad()
    def denoise(
        self, x: Tensor, predict: Predict, *, num_steps: int | None, draw: Callable[[int], Tensor]
    ) -> Tensor:
        """Take the noise away, and return x_0.

        Args:
            x: standard normal noise [B, ...].
            predict: the network: prediction for x_t at one timestep.
            num_steps: calls of the network.
            draw: noise of the shape of `x` for a timestep; asked only where `draws_noise`.
        """
        grid = self.sampling_timesteps(num_steps)
        previous: Previous | None = None
        for t, s in zip(grid, [*grid[1:], None], strict=True):
            found = self.estimate(predict(x, t).float(), x, torch.tensor([t], device=x.device))
            noise = draw(t) if self.draws_noise and s is not None else None
            x = self.step(x, found, t, s, noise, previous)
            previous = Previous(found.x0, t)
        return x

    def step(
        self,
        x: Tensor,
        found: Estimate,
        t: int,
        s: int | None,
        noise: Tensor | None = None,
        previous: Previous | None = None,
    ) -> Tensor:
        """Go from timestep t to the earlier s, or with None to x_0."""
        mean_x0, mean_x, variance = self.posterior(t, s)
        mean = mean_x0 * found.x0 + mean_x * x
        return mean if noise is None else mean + math.sqrt(variance) * noise

    def posterior(self, t: int, s: int | None) -> tuple[float, float, float]:
        """Return the factors of x_0 and x_t in the mean of x_s given both, and its variance."""
        of_t, of_s = self._alpha_bar_at(t), self._alpha_bar_at(s)
        between = of_t / of_s
        variance = (1 - between) * (1 - of_s) / (1 - of_t)
        return (
            math.sqrt(of_s) * (1 - between) / (1 - of_t),
            math.sqrt(between) * (1 - of_s) / (1 - of_t),
            variance,
        )

    def _alpha_bar_at(self, t: int | None) -> float:
        return 1.0 if t is None else float(self.alpha_bar[t])

    def _scales(self, timesteps: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """Return the factors of x_0 and noise, fp32, shaped to multiply [B, ...]."""
        table = self._tables.get(timesteps.device)
        if table is None:
            scales = np.stack([np.sqrt(self.alpha_bar), np.sqrt(1 - self.alpha_bar)])
            table = torch.tensor(scales.tolist(), dtype=torch.float32, device=timesteps.device)
            # While a model is built for ZeRO, new tensors are of lower precision.
            if table.dtype == torch.float32:
                self._tables[timesteps.device] = table
        signal, scale = table[:, timesteps].reshape(2, -1, *[1] * (ndim - 1))
        return signal, scale


class DDIMScheduler(DDPMScheduler):
    """Deterministic sampling, or with `eta` between that and DDPM's noise, which `eta` 1 is.

    Args:
        eta: share of the posterior's standard deviation that is drawn anew.
        options: those of `DDPMScheduler`.
    """

    def __init__(self, *, eta: float = 0.0, **options: Any) -> None:
        """Check the choices."""
        super().__init__(**options)
        if not 0 <= eta <= 1:
            raise ModelError(f"scheduler: eta is {eta}; it must be in 0 to 1")
        self.eta = eta
        self.draws_noise = eta > 0

    def step(
        self,
        x: Tensor,
        found: Estimate,
        t: int,
        s: int | None,
        noise: Tensor | None = None,
        previous: Previous | None = None,
    ) -> Tensor:
        """Go from timestep t to the earlier s, or with None to x_0."""
        of_s = self._alpha_bar_at(s)
        variance = self.eta**2 * self.posterior(t, s)[2]
        mean = math.sqrt(of_s) * found.x0 + math.sqrt(max(0.0, 1 - of_s - variance)) * found.noise
        return mean if noise is None else mean + math.sqrt(variance) * noise


class DPMScheduler(DDPMScheduler):
    """DPM-Solver++ 2M: deterministic, of second order from the second step on, for few steps."""

    draws_noise = False

    def step(
        self,
        x: Tensor,
        found: Estimate,
        t: int,
        s: int | None,
        noise: Tensor | None = None,
        previous: Previous | None = None,
    ) -> Tensor:
        """Go from timestep t to the earlier s, or with None to x_0."""
        if s is None:
            return found.x0
        of_t, of_s = self._alpha_bar_at(t), self._alpha_bar_at(s)
        step, x0 = self._log_snr(s) - self._log_snr(t), found.x0
        if previous is not None:
            # 0 after the end without signal
            ratio = step / (self._log_snr(t) - self._log_snr(previous.timestep))
            x0 = x0 + ratio / 2 * (x0 - previous.x0)
        return math.sqrt((1 - of_s) / (1 - of_t)) * x - math.sqrt(of_s) * math.expm1(-step) * x0

    def _log_snr(self, t: int) -> float:
        """Return half of the logarithm of the signal-to-noise ratio."""
        of_t = self._alpha_bar_at(t)
        return -math.inf if of_t == 0 else 0.5 * math.log(of_t / (1 - of_t))


SCHEDULERS: dict[str, type[DDPMScheduler]] = {
    "DDPM": DDPMScheduler,
    "DDIM": DDIMScheduler,
    "DPM": DPMScheduler,
}


def make_scheduler(settings: Mapping[str, Any]) -> DDPMScheduler:
    """Build a scheduler from `{type, params}`; the type is `DDPM`, `DDIM` or `DPM`, with or without `Scheduler`.

    Raises:
        ModelError: the type, a parameter or its value is not one that there is.
    """
    unknown = sorted(settings.keys() - {"type", "params"})
    if unknown:
        raise ModelError(f"scheduler: {unknown[0]!r} is unknown; it has the keys type and params")
    name = str(settings.get("type", "DDIM"))
    kind = SCHEDULERS.get(name.removesuffix("Scheduler"))
    if kind is None:
        raise ModelError(f"scheduler: type is {name!r}; allowed: {', '.join(SCHEDULERS)}")
    params = dict(settings.get("params") or {})
    allowed = [*inspect.signature(DDPMScheduler).parameters, *(["eta"] if kind is DDIMScheduler else [])]
    unknown = sorted(params.keys() - set(allowed))
    if unknown:
        raise ModelError(f"scheduler: {name} has no parameter {unknown[0]!r}; it has {', '.join(allowed)}")
    try:
        return kind(**params)
    except TypeError as error:
        raise ModelError(f"scheduler: a parameter of {name} is of the wrong kind ({error})") from error


def _betas(schedule: str, total: int, start: float, end: float, largest: float) -> NDArray[np.float64]:
    """Return the betas [T]; `largest` bounds those of the cosine schedules."""
    if schedule == "linear":
        return np.linspace(start, end, total)
    if schedule == "linear_sqrt":
        return np.linspace(start**0.5, end**0.5, total) ** 2
    power = 4 if schedule == "cos_alpha4" else 2
    alpha_bar = np.cos((np.arange(total + 1) / total + 0.008) * np.pi / 2.016) ** power
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], largest)


def _with_zero_end(alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shift and scale sqrt(alpha bar) so that it ends at 0 and begins as it did."""
    root = np.sqrt(np.cumprod(alphas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return np.concatenate([root[:1], root[1:] / root[:-1]]) ** 2
