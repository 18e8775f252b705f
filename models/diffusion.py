"""Masked (absorbing-state) diffusion over expression tokens: losses for training, and a sampler.

Tokens are 0 to K - 1, and K is the mask. Noise replaces tokens by the mask, each on its own; a network learns to tell
what was there. All that is random is a function of a seed for each item of a batch: it does not depend on the number of
ranks, on what else is in the batch but for the spread of the times, or on what was drawn before.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.auxiliary_losses import AuxiliaryConfig, auxiliary_losses, mean_changes
from models.errors import ModelError, raise_all, wrong_choices
from models.noise import Purpose, fold, item_seeds, uniform, uniforms
from models.outputs import LossOutput
from models.schedules import (
    PolynomialSchedule,
    Schedule,
    ScheduleName,
    antithetic,
    cosine_time_grid,
    make_schedule,
    unmask_probability,
)

Objective = Literal["absorbing", "partial"]
Weighting = Literal["elbo", "per_masked"]

ORIGINAL_EXPONENT = 1.3132617
"""softplus(1), the exponent of the first published trainer of this kind for cells."""

_IGNORED = -100
_NO_HEADS = (
    "auxiliary losses are on, but the network was built without heads for them; build it with objective_args: "
    "{auxiliary: {...}}"
)


class DenoiserOutput(NamedTuple):
    """Hold what a network predicts for every token.

    Attributes:
        logits: [..., N, K] over the tokens that may have stood there.
        auxiliary: [..., N, 3] for the auxiliary losses; None without heads for them.
    """

    logits: Tensor
    auxiliary: Tensor | None = None


class Denoiser(Protocol):
    """A network that this objective trains: conditions are encoded once, and tokens as often as needed."""

    def encode_conditions(
        self, *, control_set: Tensor | None, target_gene_idx: Tensor | None, batch_idx: Tensor | None
    ) -> Any:
        """Return what a network needs of the conditions of a batch, in any form of its own."""
        ...

    def __call__(self, tokens: Tensor, time: Tensor, conditions: Any) -> DenoiserOutput:
        """Predict the tokens under the masks of `tokens` [..., N]; `time` is one number for each cell [...]."""
        ...


@dataclass(frozen=True)
class AbsorbingConfig:
    """Hold the choices of continuous-time absorbing diffusion.

    Attributes:
        schedule: how much is masked at a time: `polynomial`, `linear` or `cosine`.
        exponent: of the polynomial schedule.
        weighting: `elbo`, the bound in nats per token: each masked token's cross-entropy times the schedule's weight,
            over the number of tokens; or `per_masked`: over the number of masked tokens of the cell, which lets small
            times count far more than the bound does.
        time_min: times below it are put to it. The bound begins there and stays one, and no weight is larger than
            1 / `time_min` (of the linear schedule).
        auxiliary: the auxiliary losses (`models.auxiliary_losses.AuxiliaryConfig`); None leaves them out.
    """

    schedule: ScheduleName = "linear"
    exponent: float = ORIGINAL_EXPONENT
    weighting: Weighting = "elbo"
    time_min: float = 1e-3
    auxiliary: AuxiliaryConfig | None = None

    def __post_init__(self) -> None:
        """Check every field; raise one ModelError that names all that is wrong."""
        _read_auxiliary(self)
        raise_all(self._problems())

    def _problems(self) -> Iterable[str]:
        yield from wrong_choices(self, {"schedule": ScheduleName})
        if not self.exponent > 0:
            yield f"exponent is {self.exponent}; it must be positive"
        yield from wrong_choices(self, {"weighting": Weighting})
        if not 0 < self.time_min < 1:
            yield f"time_min is {self.time_min}; it must be in (0, 1)"


@dataclass(frozen=True)
class PartialMaskingConfig:
    """Hold the choices of masking a share of each cell, with a curriculum of shares for cells with controls.

    The share is a factor times a number of the distribution Beta(`beta`). With controls, a cell is masked whole with
    probability `full_mask_probability`, and the factor moves from `mask_ratio_start` to `mask_ratio_end`.

    Attributes:
        mask_ratio: the factor for batches without controls.
        mask_ratio_start: the factor with controls at the first step of a phase.
        mask_ratio_end: the factor with controls after `mask_ratio_steps`.
        mask_ratio_steps: optimizer steps of a phase over which it moves; 0 begins at the end.
        full_mask_probability: chance that a cell with controls is masked whole. Samples begin with everything masked:
            without it a network has not learned to.
        beta: the two whole numbers of the Beta distribution.
        token_frequencies: of each token in the data; rare tokens then count more, 1 / (frequency + 1 / K), in the mean
            over all tokens 1. None counts all alike.
        token_weighting_annealing_steps: optimizer steps of a phase over which these weights grow from 1 to theirs.
        auxiliary: the auxiliary losses (`models.auxiliary_losses.AuxiliaryConfig`); None leaves them out.
    """

    mask_ratio: float = 1.0
    mask_ratio_start: float = 1.0
    mask_ratio_end: float = 1.0
    mask_ratio_steps: int = 0
    full_mask_probability: float = 0.2
    beta: tuple[int, int] = (2, 5)
    token_frequencies: tuple[float, ...] | None = None
    token_weighting_annealing_steps: int = 0
    auxiliary: AuxiliaryConfig | None = None

    def __post_init__(self) -> None:
        """Check every field; raise one ModelError that names all that is wrong."""
        object.__setattr__(self, "beta", tuple(self.beta))
        if self.token_frequencies is not None:
            object.__setattr__(self, "token_frequencies", tuple(self.token_frequencies))
        _read_auxiliary(self)
        raise_all(self._problems())

    def _problems(self) -> Iterable[str]:
        for field in ("mask_ratio", "mask_ratio_start", "mask_ratio_end"):
            if not 0 < getattr(self, field) <= 1:
                yield f"{field} is {getattr(self, field)}; it must be in (0, 1]"
        for field in ("mask_ratio_steps", "token_weighting_annealing_steps"):
            if getattr(self, field) < 0:
                yield f"{field} is {getattr(self, field)}; it must not be negative"
        if not 0 <= self.full_mask_probability <= 1:
            yield f"full_mask_probability is {self.full_mask_probability}; it must be in [0, 1]"
        if len(self.beta) != 2 or any(not isinstance(each, int) or each < 1 for each in self.beta):
            yield f"beta is {self.beta}; it must be two whole numbers from 1 on, such as [2, 5]"
        frequencies = self.token_frequencies
        if frequencies is not None and (min(frequencies, default=-1.0) < 0 or sum(frequencies) <= 0):
            yield "token_frequencies must not be negative, and not all 0"
        if frequencies is None and self.token_weighting_annealing_steps:
            yield "token_weighting_annealing_steps has no effect without token_frequencies"


class _Masked(NamedTuple):
    """Say what is masked and how much it counts; cells are [B, S], or [B]."""

    is_masked: Tensor  # [..., N]
    time: Tensor  # [...]
    token_weight: Tensor  # [...] or [..., N], of each masked token's cross-entropy
    cell_weight: Tensor  # [...], what the cell adds to the weight of the loss
    is_per_masked: bool  # whether a cell's cross-entropies are divided by the number of its masked tokens


class MaskedDiffusion:
    """What all objectives share: the loss over masked tokens, and the sampler."""

    options: Any

    has_auxiliary_heads: bool | None = None
    """Whether the network has heads for the auxiliary losses, which cannot be on without; None: it has not said."""

    def __init__(self, num_tokens: int, options: Any) -> None:
        """Take the size K of the vocabulary, without the mask, and the objective's options."""
        if num_tokens < 2:
            raise ModelError(f"the vocabulary has {num_tokens} tokens; diffusion needs at least 2")
        self.num_tokens = num_tokens
        self.mask_id = num_tokens
        self._check_options(options)
        self.options = options

    @property
    def schedule(self) -> Schedule:
        """Return how much is masked at a time."""
        raise NotImplementedError

    def set_options(self, **changes: Any) -> None:
        """Change options by name, as between two phases; the others stay.

        Raises:
            ModelError: there is no such option, or its value is not allowed.
        """
        known = [field.name for field in dataclasses.fields(self.options)]
        for name in changes:
            if name not in known:
                kind = type(self).__name__
                raise ModelError(f"{kind} has no option {name!r}; it has {', '.join(known)}")
        options = dataclasses.replace(self.options, **changes)
        self._check_options(options)
        self.options = options

    def loss_weight(self, batch: dict[str, Any]) -> float:
        """Return what a batch's loss is divided by: its measured tokens, or its cells (see `LossOutput`)."""
        tokens = batch["tokens"]
        if self._is_per_masked():
            return float(tokens[..., 0].numel())
        return float((tokens >= 0).sum())

    def compute_loss(
        self,
        model: Denoiser,
        tokens: Tensor,
        control_set: Tensor | None = None,
        target_gene_idx: Tensor | None = None,
        batch_idx: Tensor | None = None,
        step: int = 0,
        noise_seed: Tensor | None = None,
    ) -> LossOutput:
        """Mask tokens, let the model predict them, and return the loss.

        Args:
            model: the network.
            tokens: [B, S, N] sets of S cells, or [B, N]; negative where a gene was not measured: it is shown as
                masked and not asked for.
            control_set: [B, C, N] control cells of each set, or [B, N].
            target_gene_idx: [B] column of the perturbed gene, or [B, P] of several; see the network.
            batch_idx: technical batch of each set [B], or of each cell [B, S].
            step: optimizer steps taken in the phase, for curricula.
            noise_seed: [B] int64, a seed for each set; None draws them from torch's default generator of the device,
                whose state checkpoints hold, but which is another one on another number of ranks.
        """
        self._check_tokens(tokens)
        seeds = _cell_seeds(noise_seed, tokens)
        is_measured = tokens >= 0
        masked = self._mask(is_measured, seeds, step, is_conditioned=control_set is not None, tokens=tokens)
        shown = torch.where(masked.is_masked | ~is_measured, self.mask_id, tokens)
        conditions = model.encode_conditions(
            control_set=control_set, target_gene_idx=target_gene_idx, batch_idx=batch_idx
        )
        output = model(shown, masked.time, conditions)
        labels = torch.where(masked.is_masked, tokens, _IGNORED)
        loss, metrics = self._denoising_loss(output.logits, labels, masked)
        extra = self._auxiliary(output, tokens, control_set, masked, seeds, step)
        if output.auxiliary is not None and not extra:
            # Heads that are not asked have gradients of exactly 0, in place of none.
            loss = loss + 0.0 * output.auxiliary.float().sum(dim=(-2, -1))
        if extra:  # the loss without them, which is what runs with and without them can be compared by
            metrics["denoising_loss"] = loss.detach()
        for name, (weighted, plain) in extra.items():
            loss = loss + weighted
            metrics[name] = plain.detach()
        weight = masked.cell_weight.double().sum()
        return LossOutput(loss.sum(), weight, {name: value.sum() for name, value in metrics.items()})

    @torch.no_grad()
    def sample(
        self,
        model: Any,
        start: Tensor,
        *,
        num_steps: int,
        noise_seed: Tensor | int,
        control_set: Tensor | None = None,
        target_gene_idx: Tensor | None = None,
        batch_idx: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Draw what stands under the masks of `start`, and return all tokens.

        In `num_steps` passes over a cosine grid of times, first few tokens at a time and then many; the last pass fills
        all that is left. Each item's draws depend on its seed alone, so samples are the same however items are put into
        batches and on ranks, up to the rounding of the network itself.

        Args:
            model: the network; it is in evaluation mode meanwhile.
            start: [B, S, N] or [B, N]; what is the mask is drawn, the rest stays (see `blank`). What is negative stays
                too, and is shown to the network as masked.
            num_steps: passes through the network.
            noise_seed: [B] int64, a seed for each item (see `models.noise.item_seeds`); or one number, under which the
                items of this batch are numbered from 0.
            control_set: as for `compute_loss`.
            target_gene_idx: as for `compute_loss`.
            batch_idx: as for `compute_loss`.
            temperature: divides the logits; below 1 samples are closer to the most likely tokens.
        """
        if num_steps < 1:
            raise ModelError(f"num_steps is {num_steps}; sampling takes at least 1 step")
        if not temperature > 0:
            raise ModelError(f"temperature is {temperature}; it must be positive")
        self._check_tokens(start)
        if isinstance(noise_seed, int):
            noise_seed = item_seeds(noise_seed, torch.arange(len(start), device=start.device))
        seeds = _cell_seeds(noise_seed, start)
        grid = cosine_time_grid(num_steps).to(start.device)
        shown_share = unmask_probability(self.schedule, grid[:-1], grid[1:]).float()
        was_training = model.training
        model.eval()
        try:
            conditions = model.encode_conditions(
                control_set=control_set, target_gene_idx=target_gene_idx, batch_idx=batch_idx
            )
            tokens = start
            for index in range(num_steps):
                time = grid[index].float().expand(start.shape[:-1])
                shown = torch.where(tokens < 0, self.mask_id, tokens)
                logits = model(shown, time, conditions).logits.float() / temperature
                drawn = _draw(logits, uniforms(fold(seeds, Purpose.TOKEN, index), start.shape[-1]))
                chance = uniforms(fold(seeds, Purpose.UNMASK, index), start.shape[-1])
                is_shown = (tokens == self.mask_id) & (chance < shown_share[index])
                tokens = torch.where(is_shown, drawn, tokens)
        finally:
            model.train(was_training)
        return tokens

    def blank(self, *shape: int, device: torch.device | str | None = None) -> Tensor:
        """Return tokens of a shape that are all masked, to start sampling from."""
        return torch.full(shape, self.mask_id, dtype=torch.int64, device=device)

    def _mask(
        self, is_measured: Tensor, seeds: Tensor, step: int, *, is_conditioned: bool, tokens: Tensor
    ) -> _Masked:
        raise NotImplementedError

    def _is_per_masked(self) -> bool:
        raise NotImplementedError

    def _check_options(self, options: Any) -> None:
        """Check what depends on the vocabulary."""
        auxiliary = options.auxiliary
        if auxiliary is not None and self.has_auxiliary_heads is False:
            raise ModelError(_NO_HEADS)
        values = None if auxiliary is None else auxiliary.token_values
        if values is not None and len(values) != self.num_tokens:
            raise ModelError(
                f"auxiliary.token_values names {len(values)} values, but there are {self.num_tokens} tokens; give one "
                "for each"
            )

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.ndim not in (2, 3) or tokens.is_floating_point():
            raise ModelError(
                f"tokens are {tokens.dtype} of shape {list(tokens.shape)}; they must be whole numbers [B, N] or "
                "[B, S, N]"
            )

    def _denoising_loss(
        self, logits: Tensor, labels: Tensor, masked: _Masked
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each cell and what else is worth knowing, in the unit of the loss's weight."""
        if logits.shape != (*labels.shape, self.num_tokens):
            raise ModelError(
                f"the network returned logits of shape {list(logits.shape)}; they must be "
                f"{[*labels.shape, self.num_tokens]}"
            )
        flat = F.cross_entropy(
            logits.float().flatten(end_dim=-2), labels.flatten(), reduction="none", ignore_index=_IGNORED
        )
        entropy = flat.view(labels.shape)
        weight = masked.token_weight
        weight = weight if weight.ndim == entropy.ndim else weight.unsqueeze(-1)
        count = masked.is_masked.sum(dim=-1)
        loss = (entropy * weight).sum(dim=-1)
        if masked.is_per_masked:
            loss = loss / count.clamp(min=1)
        share = masked.cell_weight / count.clamp(min=1)
        is_right = (logits.detach().argmax(dim=-1) == labels).sum(dim=-1)
        return loss, {
            "masked_cross_entropy": entropy.detach().sum(dim=-1) * share,
            "masked_accuracy": is_right * share,
        }

    def _auxiliary(
        self,
        output: DenoiserOutput,
        tokens: Tensor,
        control_set: Tensor | None,
        masked: _Masked,
        seeds: Tensor,
        step: int,
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return by name each cell's auxiliary losses, weighted and plain; none where there are no controls."""
        config: AuxiliaryConfig | None = self.options.auxiliary
        if config is None or control_set is None:
            return {}
        if output.auxiliary is None:
            raise ModelError(_NO_HEADS)
        controls = control_set if control_set.ndim == 3 else control_set.unsqueeze(1)
        sets = tokens if tokens.ndim == 3 else tokens.unsqueeze(1)
        changes = mean_changes(config, sets, controls, self.num_tokens)
        changes = changes.unsqueeze(1) if tokens.ndim == 3 else changes
        losses = auxiliary_losses(config, output.auxiliary, changes, masked.is_masked, seeds)
        ramp = config.ramp(step)
        found = {}
        for name, value in losses._asdict().items():
            of_cells = value * masked.cell_weight
            found[f"{name}_loss"] = (of_cells * (ramp * getattr(config, f"{name}_weight")), of_cells)
        return found


class AbsorbingDiffusion(MaskedDiffusion):
    """Continuous-time absorbing diffusion (MD4; Shi et al. 2024): the negative evidence lower bound per token.

    The times of a batch are antithetic: one uniform number, and i / (number of cells) beyond it for the i-th cell.
    """

    options: AbsorbingConfig

    def __init__(self, num_tokens: int, options: AbsorbingConfig | None = None) -> None:
        """Take the size K of the vocabulary and the options."""
        super().__init__(num_tokens, AbsorbingConfig() if options is None else options)

    @property
    def schedule(self) -> Schedule:
        """Return how much is masked at a time."""
        return make_schedule(self.options.schedule, self.options.exponent)

    def times(self, seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Return the times [cells] of a batch and the weight of a masked token's cross-entropy at each.

        Below `time_min` lies one stratum, whose expectation is the cross-entropy of what is masked at `time_min`: the
        reconstruction term of a bound that begins there.
        """
        count = seeds.numel()
        drawn = antithetic(uniform(fold(seeds.flatten()[0], Purpose.TIME)), count)
        low = self.options.time_min
        time = drawn.clamp(min=low)
        weight = torch.where(drawn < low, 1.0 / low, self.schedule.weight(time))
        return time.view(seeds.shape), weight.view(seeds.shape)

    def _mask(
        self, is_measured: Tensor, seeds: Tensor, step: int, *, is_conditioned: bool, tokens: Tensor
    ) -> _Masked:
        time, weight = self.times(seeds)
        chance = self.schedule.mask_probability(time).float().unsqueeze(-1)
        is_masked = (uniforms(fold(seeds, Purpose.MASK), is_measured.shape[-1]) < chance) & is_measured
        is_per_masked = self._is_per_masked()
        cell_weight = torch.ones_like(time) if is_per_masked else is_measured.sum(dim=-1)
        return _Masked(is_masked, time.float(), weight.float(), cell_weight.float(), is_per_masked)

    def _is_per_masked(self) -> bool:
        return self.options.weighting == "per_masked"


class PartialMaskingDiffusion(MaskedDiffusion):
    """Masked prediction with drawn shares of masked tokens: each cell's mean cross-entropy over them.

    No bound on anything, and often quicker to learn from. At least one token of every cell is masked. The network's
    time is the share that is masked, so samples are drawn as under a linear schedule.
    """

    options: PartialMaskingConfig

    def __init__(self, num_tokens: int, options: PartialMaskingConfig | None = None) -> None:
        """Take the size K of the vocabulary and the options."""
        super().__init__(num_tokens, PartialMaskingConfig() if options is None else options)

    @property
    def schedule(self) -> Schedule:
        """Return the linear schedule, whose time is the share that is masked."""
        return PolynomialSchedule()

    def ratios(self, seeds: Tensor, step: int, *, is_conditioned: bool) -> Tensor:
        """Return the share of its tokens that is masked of each cell [...]."""
        options, (first, second) = self.options, self.options.beta
        # The a-th smallest of a + b - 1 uniform numbers has the distribution Beta(a, b).
        drawn = uniforms(fold(seeds, Purpose.RATIO), first + second)
        beta = drawn[..., 1:].sort(dim=-1).values[..., first - 1]
        if not is_conditioned:
            return options.mask_ratio * beta
        done = min(1.0, step / options.mask_ratio_steps) if options.mask_ratio_steps else 1.0
        factor = options.mask_ratio_start + (options.mask_ratio_end - options.mask_ratio_start) * done
        return torch.where(drawn[..., 0] < options.full_mask_probability, 1.0, factor * beta)

    def _mask(
        self, is_measured: Tensor, seeds: Tensor, step: int, *, is_conditioned: bool, tokens: Tensor
    ) -> _Masked:
        ratio = self.ratios(seeds, step, is_conditioned=is_conditioned)
        drawn = uniforms(fold(seeds, Purpose.MASK), is_measured.shape[-1]).masked_fill(~is_measured, 2.0)
        smallest = drawn.amin(dim=-1, keepdim=True)
        is_masked = ((drawn < ratio.unsqueeze(-1)) | (drawn == smallest)) & is_measured
        weight = torch.ones_like(ratio)
        if self.options.token_frequencies is not None:
            weight = self._token_weights(step, tokens.device)[tokens.clamp(0, self.num_tokens - 1)]
        return _Masked(is_masked, ratio, weight, torch.ones_like(ratio), is_per_masked=True)

    def _token_weights(self, step: int, device: torch.device) -> Tensor:
        """Return the weight of each token [K]."""
        frequencies = torch.tensor(self.options.token_frequencies, dtype=torch.float32, device=device)
        weights = 1.0 / (frequencies / frequencies.sum() + 1.0 / self.num_tokens)
        weights = weights / weights.mean()
        steps = self.options.token_weighting_annealing_steps
        done = min(1.0, step / steps) if steps else 1.0
        return 1.0 + (weights - 1.0) * done

    def _is_per_masked(self) -> bool:
        return True

    def _check_options(self, options: Any) -> None:
        super()._check_options(options)
        frequencies = options.token_frequencies
        if frequencies is not None and len(frequencies) != self.num_tokens:
            raise ModelError(
                f"token_frequencies names {len(frequencies)} numbers, but there are {self.num_tokens} tokens"
            )


def make_diffusion(objective: Objective, num_tokens: int, options: dict[str, Any]) -> MaskedDiffusion:
    """Build an objective from its name and options.

    Raises:
        ModelError: there is no such objective or option, or a value is not allowed.
    """
    kinds = {
        "absorbing": (AbsorbingDiffusion, AbsorbingConfig),
        "partial": (PartialMaskingDiffusion, PartialMaskingConfig),
    }
    if objective not in kinds:
        raise ModelError(f"objective is {objective!r}; allowed: {', '.join(kinds)}")
    diffusion, config = kinds[objective]
    known = [field.name for field in dataclasses.fields(config)]
    for name in options:
        if name not in known:
            raise ModelError(f"objective {objective} has no option {name!r}; it has {', '.join(known)}")
    return diffusion(num_tokens, config(**options))


def _cell_seeds(noise_seed: Tensor | None, tokens: Tensor) -> Tensor:
    """Return a seed for each cell: [B], or [B, S]."""
    size = (len(tokens),)
    if noise_seed is None:
        limits = torch.iinfo(torch.int64)
        noise_seed = torch.randint(limits.min, limits.max, size, device=tokens.device)
    if noise_seed.shape != size or noise_seed.dtype != torch.int64:
        raise ModelError(
            f"noise_seed is {noise_seed.dtype} of shape {list(noise_seed.shape)}; it must be int64 {list(size)}"
        )
    if tokens.ndim == 2:
        return noise_seed
    cells = torch.arange(tokens.shape[1], device=tokens.device)
    return fold(noise_seed.unsqueeze(1), Purpose.CELL, cells)


def _draw(logits: Tensor, uniform_numbers: Tensor) -> Tensor:
    """Draw a token for each position from logits [..., K], given a number between 0 and 1."""
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)
    threshold = uniform_numbers.unsqueeze(-1) * cumulative[..., -1:]
    return (cumulative < threshold).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


def _read_auxiliary(config: AbsorbingConfig | PartialMaskingConfig) -> None:
    """Let the auxiliary options be a table, as in a YAML file."""
    given: Any = config.auxiliary
    if given is None or isinstance(given, AuxiliaryConfig):
        return
    known = [field.name for field in dataclasses.fields(AuxiliaryConfig)]
    if not isinstance(given, dict) or any(name not in known for name in given):
        raise ModelError(
            f"auxiliary is {given!r}; it must be a table with some of {', '.join(known)}, or null"
        )
    object.__setattr__(config, "auxiliary", AuxiliaryConfig(**given))
