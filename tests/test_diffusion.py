import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

from data.hashing import gene_hash, mix
from models.auxiliary_losses import AuxiliaryConfig, auxiliary_losses, mean_changes
from models.diffusion import (
    AbsorbingConfig,
    AbsorbingDiffusion,
    DenoiserOutput,
    MaskedDiffusion,
    PartialMaskingConfig,
    PartialMaskingDiffusion,
    make_diffusion,
)
from models.errors import ModelError
from models.noise import Purpose, fold, hashes, item_seeds, uniforms
from models.schedules import antithetic, cosine_time_grid, make_schedule, unmask_probability

NUM_GENES, K = 3, 3
STATES = torch.tensor(list(itertools.product(range(K), repeat=NUM_GENES)))


def known_distribution() -> Tensor:
    """Return the probabilities of all 27 states of three genes that depend on each other strongly."""
    first, second, third = STATES.unbind(dim=1)
    energy = 1.5 * (first == second).float() - 1.2 * (second == third).float() + 0.3 * first
    return energy.double().softmax(dim=0)


P = known_distribution()
ENTROPY = float(-(P * P.log()).sum())


class Exact(nn.Module):
    """Predict each gene by its true distribution given the genes that are shown."""

    def __init__(self, p: Tensor = P) -> None:
        super().__init__()
        self.p = p

    def encode_conditions(self, **conditions: Tensor | None) -> dict[str, Tensor | None]:
        return conditions

    def forward(self, tokens: Tensor, time: Tensor, conditions: Any) -> DenoiserOutput:
        assert time.shape == tokens.shape[:-1]
        fits = ((tokens.unsqueeze(-2) == STATES) | (tokens.unsqueeze(-2) == K)).all(dim=-1)  # [..., 27]
        of_value = F.one_hot(STATES, K).double()  # [27, N, K]
        joint = torch.einsum("...s,snk->...nk", fits * self.p, of_value)
        return DenoiserOutput((joint / joint.sum(dim=-1, keepdim=True)).clamp(min=1e-30).log())


class Marginal(Exact):
    """Predict each gene by its distribution over all cells, whatever is shown."""

    def forward(self, tokens: Tensor, time: Tensor, conditions: Any) -> DenoiserOutput:
        return super().forward(torch.full_like(tokens, K), time, conditions)


class Table(nn.Module):
    """Predict from a table of everything that can be shown; auxiliary outputs are parameters."""

    def __init__(self, has_auxiliary: bool = False) -> None:
        super().__init__()
        self.logits = nn.Embedding((K + 1) ** NUM_GENES, NUM_GENES * K)
        nn.init.zeros_(self.logits.weight)
        self.auxiliary = nn.Parameter(torch.zeros(NUM_GENES, 3)) if has_auxiliary else None

    def encode_conditions(self, **conditions: Tensor | None) -> None: ...

    def forward(self, tokens: Tensor, time: Tensor, conditions: Any) -> DenoiserOutput:
        place = (K + 1) ** torch.arange(NUM_GENES)
        logits = self.logits((tokens * place).sum(dim=-1)).view(*tokens.shape, K)
        auxiliary = None if self.auxiliary is None else self.auxiliary.expand(*tokens.shape, 3)
        return DenoiserOutput(logits, auxiliary)


class Fixed(nn.Module):
    """Predict the same logits for every cell."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def encode_conditions(self, **conditions: Tensor | None) -> None: ...

    def forward(self, tokens: Tensor, time: Tensor, conditions: Any) -> DenoiserOutput:
        return DenoiserOutput(self.logits.expand(*tokens.shape, -1))


def cells(number: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return STATES[torch.multinomial(P, number, replacement=True, generator=generator)]


def seeds(number: int, seed: int = 0) -> Tensor:
    return item_seeds(seed, torch.arange(number))


def absorbing(**options: Any) -> AbsorbingDiffusion:
    return AbsorbingDiffusion(K, AbsorbingConfig(**options))


def partial(**options: Any) -> PartialMaskingDiffusion:
    return PartialMaskingDiffusion(K, PartialMaskingConfig(**options))


def mean_loss(diffusion: MaskedDiffusion, model: nn.Module, tokens: Tensor, **arguments: Any) -> Tensor:
    output = diffusion.compute_loss(model, tokens, **arguments)
    return output.sum / output.weight


def chi_square_p(samples: Tensor, p: Tensor = P) -> float:
    counts = (samples.reshape(-1, 1, NUM_GENES) == STATES).all(dim=-1).sum(dim=0)
    assert int(counts.sum()) == samples[..., 0].numel(), "a sample is no state"
    return float(stats.chisquare(counts.numpy(), p.numpy() * int(counts.sum())).pvalue)


def bound(model: nn.Module, schedule: str, exponent: float = 1.5) -> float:
    """Integrate the bound in nats per token over all times, masks and states."""
    made = make_schedule(schedule, exponent)
    edges = torch.linspace(0, 1, 2001, dtype=torch.float64)
    time = (edges[1:] + edges[:-1]) / 2
    total = 0.0
    for mask in itertools.product([False, True], repeat=NUM_GENES):
        is_masked = torch.tensor(mask)
        shown = torch.where(is_masked, K, STATES)
        logits = model(shown, torch.ones(len(shown)), None).logits
        entropy = F.cross_entropy(logits.flatten(end_dim=-2), STATES.flatten(), reduction="none").view(-1, 3)
        m = made.mask_probability(time)
        of_mask = m ** int(is_masked.sum()) * (1 - m) ** int((~is_masked).sum()) * made.weight(time)
        total += float(of_mask.mean() * (P * (entropy * is_masked).sum(dim=1)).sum())
    return total / NUM_GENES


def test_numbers_are_those_of_the_data_s_hashes():
    drawn = torch.tensor([0, 1, -5, 2**62, -(2**63)])
    words = drawn.numpy().view(np.uint64)
    numbers = np.tile(np.arange(500), len(words))
    expected = gene_hash(words, np.full(len(words), 500), numbers)
    assert np.array_equal(hashes(drawn, 500).numpy().view(np.uint32).ravel(), expected)
    folded = [mix(((int(word) ^ 7) & (2**64 - 1)) + 0x9E3779B97F4A7C15) for word in words]
    assert fold(drawn, 7).numpy().view(np.uint64).tolist() == folded


def test_numbers_are_uniform_and_never_0_or_1():
    drawn = uniforms(seeds(200), 5000)
    assert float(drawn.min()) > 0 and float(drawn.max()) < 1
    assert stats.kstest(drawn.flatten()[::7].numpy(), "uniform").pvalue > 0.01
    between_cells = np.corrcoef(drawn[:50].numpy())[np.triu_indices(50, 1)]
    assert np.abs(between_cells).max() < 5 / math.sqrt(5000)


@pytest.mark.parametrize("count", [1, 2, 49, 98, 103, 107, 196, 1000])
def test_antithetic_times_cover_the_unit_interval_evenly(count):
    drawn = antithetic(torch.tensor(0.637, dtype=torch.float64), count)
    assert len(drawn) == count and float(drawn.min()) >= 0 and float(drawn.max()) < 1
    ordered = drawn.sort().values
    gaps = torch.cat([ordered.diff(), ordered[:1] + 1 - ordered[-1:]])
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / count))


@pytest.mark.parametrize("shape", [(49,), (98,), (7, 7), (1, 103), (107,)])
def test_any_number_of_cells_has_a_loss(shape):
    tokens = cells(math.prod(shape)).view(*shape, NUM_GENES)
    output = absorbing().compute_loss(Exact(), tokens, noise_seed=seeds(shape[0]))
    assert output.sum.isfinite() and float(output.weight) == tokens.numel()


@pytest.mark.parametrize("name", ["polynomial", "linear", "cosine"])
def test_schedules_mask_everything_at_1_nothing_at_0_and_weigh_by_their_slope(name):
    schedule = make_schedule(name, 1.7)
    ends = schedule.mask_probability(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=torch.float64))
    time = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    slope = schedule.mask_probability(time + 1e-6) - schedule.mask_probability(time - 1e-6)
    torch.testing.assert_close(schedule.weight(time), slope / 2e-6 / schedule.mask_probability(time))


def test_steps_of_a_sampler_unmask_what_the_schedule_says():
    schedule = make_schedule("polynomial", 2.0)
    grid = cosine_time_grid(4)
    torch.testing.assert_close(grid, torch.cos(torch.arange(5) * math.pi / 8).double())
    chance = unmask_probability(schedule, grid[:-1], grid[1:])
    left = (1 - chance).cumprod(dim=0)
    torch.testing.assert_close(left[:-1], schedule.mask_probability(grid[1:-1]))
    assert chance[-1] == 1


@pytest.mark.parametrize("schedule", ["polynomial", "linear", "cosine"])
def test_the_loss_at_full_masking_is_the_categorical_negative_log_likelihood(schedule):
    logits = torch.randn(NUM_GENES, K)
    tokens = cells(11)
    expected = F.cross_entropy(logits.expand(11, -1, -1).flatten(end_dim=1), tokens.flatten())
    # At time_min close to 1 nearly all times are put to it: everything is masked.
    whole = absorbing(schedule=schedule, time_min=1 - 1e-9)
    output = whole.compute_loss(Fixed(logits), tokens, noise_seed=seeds(11))
    torch.testing.assert_close(float(output.sum / output.weight), float(expected))
    torch.testing.assert_close(float(output.metrics["masked_cross_entropy"] / output.weight), float(expected))


def test_partial_masking_of_everything_has_the_categorical_negative_log_likelihood():
    logits = torch.randn(NUM_GENES, K)
    tokens = cells(11)
    diffusion = partial(full_mask_probability=1.0)
    loss = mean_loss(diffusion, Fixed(logits), tokens, control_set=tokens, noise_seed=seeds(11))
    expected = F.cross_entropy(logits.expand(11, -1, -1).flatten(end_dim=1), tokens.flatten())
    torch.testing.assert_close(loss.float(), expected)


@pytest.mark.parametrize("schedule", ["polynomial", "linear", "cosine"])
def test_the_bound_of_the_true_conditionals_is_the_entropy(schedule):
    assert bound(Exact(), schedule) == pytest.approx(ENTROPY / NUM_GENES, rel=1e-3)


@pytest.mark.parametrize("schedule", ["polynomial", "linear", "cosine"])
def test_the_loss_of_the_true_conditionals_is_the_entropy(schedule):
    diffusion = absorbing(schedule=schedule, exponent=1.5)
    tokens = cells(1 << 17)
    loss = mean_loss(diffusion, Exact(), tokens, noise_seed=seeds(len(tokens)))
    # Entropy of the cells that were drawn, so that their own noise is not in the comparison.
    drawn = (tokens.unsqueeze(1) == STATES).all(dim=-1).double().argmax(dim=1)
    assert float(loss) == pytest.approx(float(-P[drawn].log().mean()) / NUM_GENES, abs=0.01)


def test_the_loss_of_another_network_is_its_bound_above_the_entropy():
    one_hot = F.one_hot(STATES, K).double()
    marginal = torch.einsum("s,snk->nk", P, one_hot)
    expected = float(-(marginal * marginal.log()).sum()) / NUM_GENES
    assert bound(Marginal(), "linear") == pytest.approx(expected, rel=1e-3)
    assert expected > ENTROPY / NUM_GENES + 0.05
    tokens = cells(1 << 17)
    loss = mean_loss(absorbing(), Marginal(), tokens, noise_seed=seeds(len(tokens)))
    assert float(loss) == pytest.approx(expected, abs=0.012)


def test_per_masked_weighting_divides_by_the_masked_tokens_of_each_cell():
    diffusion = absorbing(weighting="per_masked", schedule="polynomial", exponent=1.3)
    logits, tokens, noise = torch.randn(NUM_GENES, K), cells(20), seeds(20)
    output = diffusion.compute_loss(Fixed(logits), tokens, noise_seed=noise)
    time, _ = diffusion.times(noise)
    is_masked = uniforms(fold(noise, Purpose.MASK), NUM_GENES) < time.unsqueeze(1) ** 1.3
    expected = 0.0
    for cell in range(20):
        entropy = F.cross_entropy(logits, tokens[cell], reduction="none")[is_masked[cell]]
        if len(entropy):
            expected += float(entropy.mean() * 1.3 / time[cell])
    assert float(output.sum) == pytest.approx(expected, rel=1e-4)
    assert float(output.weight) == 20 == diffusion.loss_weight({"tokens": tokens})


def test_a_cell_s_masks_are_the_same_in_any_batch():
    tokens, noise = cells(8).view(8, 1, NUM_GENES), seeds(8)
    diffusion = partial()
    together = diffusion._mask(tokens >= 0, _of(noise, tokens), 0, is_conditioned=False, tokens=tokens)
    alone = [
        diffusion._mask(part >= 0, _of(seed, part), 0, is_conditioned=False, tokens=part)
        for part, seed in zip(tokens.split(1), noise.split(1), strict=True)
    ]
    assert torch.equal(together.is_masked, torch.cat([each.is_masked for each in alone]))
    assert torch.equal(together.time, torch.cat([each.time for each in alone]))


def _of(noise: Tensor, tokens: Tensor) -> Tensor:
    return fold(noise.unsqueeze(1), Purpose.CELL, torch.arange(tokens.shape[1]))


@pytest.mark.parametrize("diffusion", [absorbing(), partial()])
def test_the_loss_is_a_function_of_the_noise_seed(diffusion):
    tokens = cells(16)
    torch.manual_seed(0)
    one = mean_loss(diffusion, Marginal(), tokens, noise_seed=seeds(16))
    torch.manual_seed(1)
    assert torch.equal(one, mean_loss(diffusion, Marginal(), tokens, noise_seed=seeds(16)))
    assert not torch.equal(one, mean_loss(diffusion, Marginal(), tokens, noise_seed=seeds(16, seed=1)))


def test_without_a_noise_seed_noise_comes_from_torch_s_generator():
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(float(mean_loss(absorbing(), Marginal(), cells(16))))
    assert losses[0] == losses[1] != losses[2]


def test_a_wrong_noise_seed_is_refused():
    with pytest.raises(ModelError, match=r"noise_seed is torch.int64 of shape \[3\]; it must be int64 \[4\]"):
        absorbing().compute_loss(Exact(), cells(4), noise_seed=seeds(3))


def test_genes_that_were_not_measured_count_nowhere():
    tokens = cells(64)
    tokens[:, 1] = -100
    shown: list[Tensor] = []

    class Watched(Fixed):
        def forward(self, tokens: Tensor, time: Tensor, conditions: Any) -> DenoiserOutput:
            shown.append(tokens)
            return super().forward(tokens, time, conditions)

    logits = torch.randn(NUM_GENES, K)
    other = logits.clone()
    other[1] = torch.randn(K)
    for diffusion in (absorbing(), absorbing(weighting="per_masked"), partial()):
        results = [
            diffusion.compute_loss(Watched(each), tokens, noise_seed=seeds(64)) for each in (logits, other)
        ]
        assert torch.equal(results[0].sum, results[1].sum)
        assert float(results[0].weight) == diffusion.loss_weight({"tokens": tokens})
    assert all(bool((each[:, 1] == K).all()) for each in shown)
    assert absorbing().loss_weight({"tokens": tokens}) == 128
    assert bool((absorbing().sample(Watched(logits), tokens, num_steps=2, noise_seed=0) == tokens).all())


def test_shares_of_partial_masking_are_beta_distributed_with_a_curriculum():
    diffusion = partial(
        mask_ratio=0.8,
        mask_ratio_start=0.2,
        mask_ratio_end=1.0,
        mask_ratio_steps=10,
        full_mask_probability=0.25,
    )
    noise = seeds(20_000)
    free = diffusion.ratios(noise, 0, is_conditioned=False)
    assert stats.kstest((free / 0.8).numpy(), stats.beta(2, 5).cdf).pvalue > 0.01
    for step, factor in ((0, 0.2), (5, 0.6), (10, 1.0), (99, 1.0)):
        ratios = diffusion.ratios(noise, step, is_conditioned=True)
        whole = ratios == 1
        assert float(whole.float().mean()) == pytest.approx(0.25, abs=0.015)
        assert stats.kstest((ratios[~whole] / factor).numpy(), stats.beta(2, 5).cdf).pvalue > 0.01


def test_partial_masking_always_asks_for_something():
    diffusion = partial(mask_ratio=1e-6)
    masked = diffusion._mask(cells(50) >= 0, seeds(50), 0, is_conditioned=False, tokens=cells(50))
    assert masked.is_masked.sum(dim=1).tolist() == [1] * 50


def test_rare_tokens_count_more_as_the_annealing_goes_on():
    diffusion = partial(token_frequencies=(8, 1, 1), token_weighting_annealing_steps=4)
    plain = torch.tensor([1 / (0.8 + 1 / 3), 1 / (0.1 + 1 / 3), 1 / (0.1 + 1 / 3)])
    for step, share in ((0, 0.0), (2, 0.5), (4, 1.0), (9, 1.0)):
        expected = 1 + share * (plain / plain.mean() - 1)
        torch.testing.assert_close(diffusion._token_weights(step, torch.device("cpu")), expected)
    tokens = cells(200)
    losses = [mean_loss(diffusion, Marginal(), tokens, noise_seed=seeds(200), step=step) for step in (0, 9)]
    assert losses[0] != losses[1]


def test_samples_of_the_true_conditionals_have_the_known_distribution():
    diffusion = absorbing()
    samples = diffusion.sample(Exact(), diffusion.blank(4000, NUM_GENES), num_steps=200, noise_seed=3)
    assert chi_square_p(samples) > 0.01
    # One pass draws all genes independently: the same test must see it.
    at_once = diffusion.sample(Exact(), diffusion.blank(4000, NUM_GENES), num_steps=1, noise_seed=3)
    assert chi_square_p(at_once) < 1e-6


@pytest.mark.parametrize(
    "diffusion",
    [absorbing(), partial(full_mask_probability=0.5)],
    ids=["absorbing", "partial"],
)
def test_samples_of_a_trained_network_have_the_known_distribution(diffusion):
    torch.manual_seed(0)
    model = Table()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(600):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 600)
        optimizer.zero_grad()
        tokens = cells(1024, seed=step)
        mean_loss(diffusion, model, tokens, control_set=tokens, noise_seed=seeds(1024, seed=step)).backward()
        optimizer.step()
    samples = diffusion.sample(model, diffusion.blank(2000, NUM_GENES), num_steps=150, noise_seed=5)
    assert chi_square_p(samples) > 0.01


def test_samples_are_the_same_in_any_batch_and_whatever_was_drawn_before():
    diffusion, items = absorbing(), torch.arange(12)
    noise = item_seeds(9, items)
    blank = diffusion.blank(12, 2, NUM_GENES)
    whole = diffusion.sample(Exact(), blank, num_steps=5, noise_seed=noise)
    torch.manual_seed(123)
    parts = [
        diffusion.sample(Exact(), blank[part], num_steps=5, noise_seed=noise[part])
        for part in (items[::2], items[1::2])
    ]
    assert torch.equal(whole[::2], parts[0]) and torch.equal(whole[1::2], parts[1])
    assert not torch.equal(whole, diffusion.sample(Exact(), blank, num_steps=5, noise_seed=10))
    assert len({tuple(cell) for cell in whole[:, 0].tolist()}) > 3


def test_sampling_keeps_what_is_given_and_fills_what_is_not():
    diffusion = absorbing()
    start = diffusion.blank(3000, NUM_GENES)
    start[:, 0] = 2
    samples = diffusion.sample(Exact(), start, num_steps=100, noise_seed=1)
    assert bool((samples[:, 0] == 2).all()) and int(samples.max()) < K
    given = P * (STATES[:, 0] == 2)
    counts = (samples.unsqueeze(1) == STATES).all(dim=-1).sum(dim=0)[given > 0]
    expected = given[given > 0] / given.sum() * 3000
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 0.01


def test_sampling_at_a_low_temperature_takes_the_likeliest_tokens_and_the_mode_comes_back():
    diffusion, logits = absorbing(), torch.randn(NUM_GENES, K)
    model = Fixed(logits)
    samples = diffusion.sample(
        model, diffusion.blank(50, NUM_GENES), num_steps=3, noise_seed=0, temperature=1e-4
    )
    assert bool((samples == logits.argmax(dim=-1)).all())
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps is 0; sampling takes at least 1 step"),
        ({"num_steps": 1, "temperature": 0.0}, "temperature is 0.0; it must be positive"),
    ],
)
def test_wrong_sampling_arguments_are_refused(arguments, message):
    with pytest.raises(ModelError, match=message):
        absorbing().sample(Exact(), absorbing().blank(2, NUM_GENES), noise_seed=0, **arguments)


def naive_losses(
    config: AuxiliaryConfig, outputs: Tensor, changes: Tensor, masked: Tensor
) -> tuple[float, float]:
    genes = masked.nonzero().flatten()
    size = changes[genes].abs()
    number = math.ceil(len(genes) * config.significant_share)
    moved = genes[size.argsort(descending=True, stable=True)[:number]]
    significance = 0.0
    for gene in genes:
        sign = 1 if gene in moved else -1
        weight = config.positive_weight if gene in moved else 1.0
        significance += weight * float(F.softplus(-sign * outputs[gene, 0])) / len(genes)
    direction = sum(float(F.softplus(-changes[g].sign() * outputs[g, 1])) for g in moved) / len(moved)
    return significance, direction


def test_auxiliary_losses_are_those_of_a_loop_over_genes():
    torch.manual_seed(0)
    config = AuxiliaryConfig(significant_share=0.2)
    outputs, changes = torch.randn(4, 40, 3), torch.randn(4, 40)
    masked = torch.rand(4, 40) < 0.6
    found = auxiliary_losses(config, outputs, changes, masked, seeds(4))
    for cell in range(4):
        significance, direction = naive_losses(config, outputs[cell], changes[cell], masked[cell])
        assert float(found.significance[cell]) == pytest.approx(significance, rel=1e-5)
        assert float(found.direction[cell]) == pytest.approx(direction, rel=1e-5)


def test_the_ranking_loss_compares_strongly_moved_genes_with_others_and_only_masked_ones():
    config = AuxiliaryConfig(ranking_share=0.25)
    changes = torch.tensor([[5.0, -4.0, 1.0, 0.5, 0.1, 0.0, 9.0, 0.0]])
    masked = torch.tensor([[True, True, True, True, True, True, False, True]])
    score = torch.zeros(1, 8, 3)
    even = auxiliary_losses(config, score, changes, masked, seeds(1)).ranking
    torch.testing.assert_close(even, torch.tensor([math.log(2)]))
    score[0, :2, 2] = 10.0  # the upper quarter of seven masked genes
    score[0, 6, 2] = -99.0  # not masked: it must not be drawn
    good = auxiliary_losses(config, score, changes, masked, seeds(1)).ranking
    assert float(good) < 1e-3
    assert float(auxiliary_losses(config, -score, changes, masked, seeds(1)).ranking) > 9


def test_auxiliary_losses_of_a_cell_without_masks_or_changes_are_finite():
    outputs = torch.randn(2, 6, 3, requires_grad=True)
    changes, masked = torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.bool)
    masked[1] = True
    found = auxiliary_losses(AuxiliaryConfig(), outputs, changes, masked, seeds(2))
    assert [float(loss[0].detach()) for loss in found] == [0.0, 0.0, 0.0]
    assert [float(loss[1].detach()) > 0 for loss in found] == [True, False, False]
    sum(loss.sum() for loss in found).backward()
    assert outputs.grad is not None and bool(outputs.grad.isfinite().all())


def test_changes_are_differences_of_means_over_what_was_measured():
    tokens = torch.tensor([[[0, 2, 1], [2, 2, -100]]])
    control = torch.tensor([[[1, 0, -100], [1, 1, -100]]])
    torch.testing.assert_close(
        mean_changes(AuxiliaryConfig(), tokens, control, K), torch.tensor([[0.0, 1.5, 0.0]])
    )
    values = AuxiliaryConfig(token_values=(0.0, 1.0, 10.0))
    torch.testing.assert_close(mean_changes(values, tokens, control, K), torch.tensor([[4.0, 9.5, 0.0]]))
    signed = AuxiliaryConfig(tokens_are_changes=True)
    torch.testing.assert_close(mean_changes(signed, tokens, control, K), torch.tensor([[0.0, 1.0, 0.0]]))


def auxiliary_batch() -> dict[str, Any]:
    return {"tokens": cells(32).view(8, 4, 3), "control": cells(40, seed=1).view(8, 5, 3)}


def test_the_auxiliary_switch_adds_its_losses_and_nothing_else():
    batch, noise = auxiliary_batch(), seeds(8)
    model = Table(has_auxiliary=True)
    nn.init.normal_(model.auxiliary)
    config = {"significance_weight": 0.5, "direction_weight": 0.3, "ranking_weight": 0.1, "ramp_steps": 10}

    def outputs(diffusion: AbsorbingDiffusion, step: int) -> Any:
        return diffusion.compute_loss(
            model, batch["tokens"], control_set=batch["control"], noise_seed=noise, step=step
        )

    off, on = outputs(absorbing(), 10), outputs(absorbing(auxiliary=config), 10)
    assert not any(name.endswith("_loss") for name in off.metrics)
    torch.testing.assert_close(on.metrics["denoising_loss"], off.sum)
    extra = sum(
        config[f"{name}_weight"] * on.metrics[f"{name}_loss"]
        for name in ("significance", "direction", "ranking")
    )
    torch.testing.assert_close(on.sum, off.sum + extra)
    assert float(extra) > 0.01 * float(off.weight)
    half, none = (outputs(absorbing(auxiliary=config), step) for step in (5, 0))
    torch.testing.assert_close(half.sum, off.sum + extra / 2)
    torch.testing.assert_close(none.sum, off.sum)
    on.sum.backward()
    assert model.auxiliary is not None and bool((model.auxiliary.grad != 0).any(dim=0).all())


def test_auxiliary_losses_need_heads_and_controls():
    batch = auxiliary_batch()
    diffusion = absorbing(auxiliary={})
    with pytest.raises(ModelError, match="built without heads"):
        diffusion.compute_loss(Table(), batch["tokens"], control_set=batch["control"], noise_seed=seeds(8))
    without = diffusion.compute_loss(Table(has_auxiliary=True), batch["tokens"], noise_seed=seeds(8))
    assert without.metrics.keys() == {"masked_cross_entropy", "masked_accuracy"}


def test_options_change_by_name_and_wrong_ones_change_nothing():
    diffusion = make_diffusion("absorbing", K, {"schedule": "polynomial"})
    diffusion.set_options(schedule="cosine", auxiliary={"ranking_weight": 0.0})
    assert diffusion.options.schedule == "cosine" and diffusion.options.auxiliary.ranking_weight == 0
    with pytest.raises(ModelError, match="AbsorbingDiffusion has no option 'mask_ratio'; it has schedule, "):
        diffusion.set_options(mask_ratio=0.3)
    with pytest.raises(ModelError, match=r"time_min is 1.5; it must be in \(0, 1\)"):
        diffusion.set_options(time_min=1.5)
    with pytest.raises(ModelError, match="token_values names 2 values, but there are 3 tokens"):
        diffusion.set_options(auxiliary={"token_values": [0, 1]})
    assert diffusion.options.time_min == 1e-3 and diffusion.options.auxiliary.token_values is None


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("md4", {}, "objective is 'md4'; allowed: absorbing, partial"),
        (
            "partial",
            {"schedule": "linear"},
            "objective partial has no option 'schedule'; it has mask_ratio, ",
        ),
        ("absorbing", {"schedule": "sine", "exponent": 0}, "schedule is 'sine'; allowed: .*; exponent is 0"),
        ("absorbing", {"weighting": "none"}, "weighting is 'none'; allowed: elbo, per_masked"),
        (
            "absorbing",
            {"auxiliary": {"lambda": 1}},
            "auxiliary is {'lambda': 1}; it must be a table with some of",
        ),
        (
            "absorbing",
            {"auxiliary": {"ranking_share": 0.7}},
            r"auxiliary.ranking_share is 0.7; .* \(0, 0.5\]",
        ),
        ("partial", {"beta": [2.5, 5]}, r"beta is \(2.5, 5\); it must be two whole numbers"),
        ("partial", {"token_weighting_annealing_steps": 5}, "has no effect without token_frequencies"),
        (
            "partial",
            {"token_frequencies": [1, 2]},
            "token_frequencies names 2 numbers, but there are 3 tokens",
        ),
    ],
)
def test_wrong_objectives_and_options_are_named(objective, options, message):
    with pytest.raises(ModelError, match=message):
        make_diffusion(objective, K, options)


def test_a_network_with_the_wrong_shape_of_logits_is_refused():
    with pytest.raises(ModelError, match=r"logits of shape \[4, 3, 4\]; they must be \[4, 3, 3\]"):
        absorbing().compute_loss(Fixed(torch.zeros(NUM_GENES, 4)), cells(4), noise_seed=seeds(4))
