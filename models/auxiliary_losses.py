"""Losses beside the denoising one that ask which genes a perturbation moves, where to, and in which order.

They compare a set of perturbed cells with its set of control cells: a gene's change is the difference of the two means.
Every loss is a mean over one cell's masked genes, whose own expression the network does not see.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import raise_all, wrong_choices
from models.noise import Purpose, fold, uniforms

SignificantBy = Literal["share", "change"]

NUM_OUTPUTS = 3
"""What a network gives for each gene: logit of being moved, logit of moving up, and a score of by how much."""


@dataclass(frozen=True)
class AuxiliaryConfig:
    """Hold the choices of the auxiliary losses.

    Attributes:
        significance_weight: of the loss that tells genes that are moved from others.
        direction_weight: of the loss that tells up from down, over the genes that are moved.
        ranking_weight: of the loss that puts strongly moved genes before others.
        positive_weight: how much a moved gene counts beside one that is not, in the first loss.
        significant_by: `share`: the genes with the largest changes are moved; `change`: those that change enough.
        significant_share: share of the masked genes that count as moved.
        significant_change: least absolute change of a gene that counts as moved, in the unit of `token_values`.
        ranking_share: share of the genes that the upper genes of pairs are from, and again the lower ones.
        ranking_least: an upper gene changes at least this share of the largest change.
        num_pairs: pairs of genes that are drawn of each cell.
        token_values: expression that each token stands for; None counts in tokens.
        tokens_are_changes: tokens stand for changes already, and controls are not subtracted.
        ramp_steps: optimizer steps of a phase over which the weights grow from 0 to theirs; 0 begins with theirs.
    """

    significance_weight: float = 0.5
    direction_weight: float = 0.2
    ranking_weight: float = 0.2
    positive_weight: float = 2.0
    significant_by: SignificantBy = "share"
    significant_share: float = 0.1
    significant_change: float = 1.0
    ranking_share: float = 0.1
    ranking_least: float = 0.05
    num_pairs: int = 512
    token_values: tuple[float, ...] | None = None
    tokens_are_changes: bool = False
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        """Check every field; raise one ModelError that names all that is wrong."""
        if self.token_values is not None:
            object.__setattr__(self, "token_values", tuple(self.token_values))
        raise_all(f"auxiliary.{problem}" for problem in self._problems())

    def _problems(self) -> Iterable[str]:
        for field in ("significance_weight", "direction_weight", "ranking_weight", "significant_change"):
            if not getattr(self, field) >= 0:
                yield f"{field} is {getattr(self, field)}; it must not be negative"
        if not self.positive_weight > 0:
            yield f"positive_weight is {self.positive_weight}; it must be positive"
        yield from wrong_choices(self, {"significant_by": SignificantBy})
        for field, limit in (("significant_share", 1.0), ("ranking_share", 0.5), ("ranking_least", 1.0)):
            if not 0 < getattr(self, field) <= limit:
                yield f"{field} is {getattr(self, field)}; it must be in (0, {limit:g}]"
        if self.num_pairs < 1:
            yield f"num_pairs is {self.num_pairs}; it must be at least 1"
        if self.ramp_steps < 0:
            yield f"ramp_steps is {self.ramp_steps}; it must not be negative"

    def ramp(self, step: int) -> float:
        """Return the share of their weights that the losses have at a step of the phase."""
        return min(1.0, step / self.ramp_steps) if self.ramp_steps else 1.0


class AuxiliaryLosses(NamedTuple):
    """Hold each loss of each cell, [...] without the genes, not weighted."""

    significance: Tensor
    direction: Tensor
    ranking: Tensor


def mean_changes(config: AuxiliaryConfig, tokens: Tensor, control: Tensor, num_tokens: int) -> Tensor:
    """Return [B, N], the change of each gene's mean from the controls to the perturbed cells.

    Args:
        config: says what tokens stand for.
        tokens: [B, S, N] of perturbed cells; negative where a gene was not measured.
        control: [B, C, N] of control cells, likewise.
        num_tokens: of the vocabulary, without the mask.
    """
    if config.token_values is None:
        # The middle token of a vocabulary of signed changes stands for none.
        middle = (num_tokens - 1) / 2 if config.tokens_are_changes else 0.0
        values = torch.arange(num_tokens, dtype=torch.float32, device=tokens.device) - middle
    else:
        values = torch.tensor(config.token_values, dtype=torch.float32, device=tokens.device)
    of_tokens, is_there = _mean_values(values, tokens)
    if config.tokens_are_changes:
        return of_tokens
    of_controls, is_there_too = _mean_values(values, control)
    return torch.where(is_there & is_there_too, of_tokens - of_controls, 0.0)


def auxiliary_losses(
    config: AuxiliaryConfig, outputs: Tensor, changes: Tensor, is_masked: Tensor, seeds: Tensor
) -> AuxiliaryLosses:
    """Return the losses of each cell; those of a cell without masked genes are 0.

    Args:
        config: the choices.
        outputs: [..., N, 3] of the network.
        changes: [..., N], the same for all cells of a set; broadcasts over cells.
        is_masked: [..., N] bool.
        seeds: [...] int64 of the cells, for the pairs.
    """
    outputs = outputs.float()
    size = changes.abs().expand(is_masked.shape).masked_fill(~is_masked, -1.0)
    count = is_masked.sum(dim=-1, keepdim=True)
    order = size.argsort(dim=-1, descending=True, stable=True)
    if config.significant_by == "change":
        is_moved = size >= max(config.significant_change, torch.finfo(torch.float32).tiny)
    else:
        wanted = (count * config.significant_share).ceil().long()
        # At least as large as the last of the wanted ones: genes that tie with it are not told apart by their place.
        last = size.gather(-1, order.gather(-1, (wanted - 1).clamp(min=0)))
        is_moved = (size >= last) & (size > 0)
    is_moved = is_moved & is_masked
    moved = F.binary_cross_entropy_with_logits(
        outputs[..., 0],
        is_moved.float(),
        pos_weight=outputs.new_tensor(config.positive_weight),
        reduction="none",
    )
    goes_up = (changes > 0).expand(is_masked.shape).float()
    up = F.binary_cross_entropy_with_logits(outputs[..., 1], goes_up, reduction="none")
    return AuxiliaryLosses(
        significance=_masked_mean(moved, is_masked),
        direction=_masked_mean(up, is_moved),
        ranking=_ranking(config, outputs[..., 2], size, order, count, seeds),
    )


def _ranking(
    config: AuxiliaryConfig, score: Tensor, size: Tensor, order: Tensor, count: Tensor, seeds: Tensor
) -> Tensor:
    """Return the mean over drawn pairs of -log sigmoid(score of the upper gene - score of the lower one)."""
    band = (count * config.ranking_share).ceil()
    drawn = [uniforms(fold(seeds, Purpose.PAIRS, which), config.num_pairs) for which in range(2)]
    last = order.shape[-1] - 1
    upper = order.gather(-1, (drawn[0] * band).long().clamp(max=last))
    lower = order.gather(-1, (count - 1 - (drawn[1] * band).long()).clamp(min=0))
    upper_size, lower_size = size.gather(-1, upper), size.gather(-1, lower)
    is_pair = (upper_size >= config.ranking_least * size.amax(dim=-1, keepdim=True)) & (
        upper_size > lower_size
    )
    is_pair = is_pair & (count > 1)
    loss = F.softplus(score.gather(-1, lower) - score.gather(-1, upper))
    return _masked_mean(loss, is_pair)


def _mean_values(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean value [B, N] of tokens [B, S, N] where they were measured, and whether any was."""
    is_measured = tokens >= 0
    found = values[tokens.clamp(0, len(values) - 1)] * is_measured
    count = is_measured.sum(dim=1)
    return found.sum(dim=1) / count.clamp(min=1), count > 0


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
