import math

import numpy as np
import pytest
import torch
from torch import Tensor

from models.errors import ModelError
from models.noise import normals
from models.noise_schedulers import DDIMScheduler, DDPMScheduler, DPMScheduler, Estimate, make_scheduler

SCHEDULES = ["linear", "linear_sqrt", "cos_alpha", "cos_alpha4"]
PREDICTIONS = ["epsilon", "x0", "v-type"]
KINDS = [DDPMScheduler, DDIMScheduler, DPMScheduler]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def perfect(scheduler: DDPMScheduler, x0: Tensor):
    """Return a network that knows what it is to find."""

    def predict(x: Tensor, t: int) -> Tensor:
        of_t = float(scheduler.alpha_bar[t])
        hidden = (x - math.sqrt(of_t) * x0) / math.sqrt(1 - of_t)
        return scheduler.target(x0, hidden, torch.full((len(x),), t))

    return predict


def test_drawn_noise_is_standard_normal() -> None:
    drawn = normals(torch.arange(2000) * 7919, 100).double()
    assert abs(float(drawn.mean())) < 0.01
    assert abs(float(drawn.var()) - 1) < 0.01
    assert abs(float((drawn**4).mean()) - 3) < 0.1
    assert abs(float((drawn[:, :-1] * drawn[:, 1:]).mean())) < 0.01
    assert float(drawn.abs().max()) < 5.3


@pytest.mark.parametrize(("name", "power"), [("cos_alpha", 2), ("cos_alpha4", 4)])
def test_alpha_bar_of_the_cosine_schedules_is_a_power_of_a_cosine(name: str, power: int) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule=name)
    steps = np.arange(101)
    wanted = np.cos((steps / 100 + 0.008) / 1.008 * np.pi / 2) ** power
    np.testing.assert_allclose(scheduler.alpha_bar, wanted[1:] / wanted[0], atol=1e-12)


@pytest.mark.parametrize(("name", "power"), [("linear", 1.0), ("linear_sqrt", 0.5)])
def test_betas_of_the_linear_schedules_are_even_in_themselves_or_in_their_root(
    name: str, power: float
) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=50, beta_start=1e-3, beta_end=0.04, beta_schedule=name)
    alphas = scheduler.alpha_bar[1:] / scheduler.alpha_bar[:-1]
    betas = np.concatenate([[1 - scheduler.alpha_bar[0]], 1 - alphas]) ** power
    np.testing.assert_allclose(betas, np.linspace(1e-3**power, 0.04**power, 50), atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noised_data_has_the_mean_and_variance_of_its_timestep(schedule: str) -> None:
    scheduler = DDPMScheduler(beta_schedule=schedule, input_perturbation=0.5)
    for t in (0, 300, 700, 990):
        x0, timesteps = torch.full((20_000,), 2.0), torch.full((20_000,), t)
        x_t = scheduler.add_noise(x0, noise(20_000), timesteps)
        of_t = float(scheduler.alpha_bar[t])
        assert float(x_t.mean()) == pytest.approx(2 * math.sqrt(of_t), abs=0.03)
        assert float(x_t.var()) == pytest.approx(1 - of_t, rel=0.03)
        perturbed = scheduler.add_noise(x0, noise(20_000), timesteps, noise(20_000, seed=1))
        assert float(perturbed.var()) == pytest.approx((1 - of_t) * 1.25, rel=0.04)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_is_trained_on_tells_the_data_and_the_noise(schedule: str, prediction: str) -> None:
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction)
    timesteps = torch.tensor([0, 10, 400, 800])
    x0, hidden = noise(4, 5), noise(4, 5, seed=1)
    x_t = scheduler.add_noise(x0, hidden, timesteps)
    found = scheduler.estimate(scheduler.target(x0, hidden, timesteps), x_t, timesteps)
    torch.testing.assert_close(found.x0, x0, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.noise, hidden, atol=1e-3, rtol=1e-3)


def test_the_velocity_is_the_derivative_of_the_noised_data_by_its_angle() -> None:
    scheduler = DDPMScheduler(beta_schedule="cos_alpha", prediction_type="v")
    assert scheduler.prediction_type == "v-type"
    x0, hidden, t = noise(1, 4).double(), noise(1, 4, seed=1).double(), 321
    angle, small = math.acos(math.sqrt(scheduler.alpha_bar[t])), 1e-6

    def at(angle: float) -> Tensor:
        return math.cos(angle) * x0 + math.sin(angle) * hidden

    slope = (at(angle + small) - at(angle - small)) / (2 * small)
    target = scheduler.target(x0, hidden, torch.tensor([t]))
    torch.testing.assert_close(target, slope, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [1, 7, 1000])
def test_a_perfect_network_leads_back_to_the_data(
    kind, schedule: str, prediction: str, num_steps: int
) -> None:
    scheduler = kind(beta_schedule=schedule, prediction_type=prediction)
    x0 = noise(3, 4)
    found = scheduler.denoise(
        noise(3, 4, seed=1),
        perfect(scheduler, x0),
        num_steps=num_steps,
        draw=lambda t: noise(3, 4, seed=t + 2),
    )
    torch.testing.assert_close(found, x0, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_posterior_is_that_of_jointly_normal_steps(schedule: str) -> None:
    scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type="v-type")
    for t, s in ((500, 499), (800, 300), (999, 960), (10, 0)):
        of_t, of_s = scheduler.alpha_bar[t], scheduler.alpha_bar[s]
        # Given x_0: Var x_s, Var x_t, and Cov(x_s, x_t) = sqrt(a_t / a_s) Var x_s.
        covariance = math.sqrt(of_t / of_s) * (1 - of_s)
        slope = covariance / (1 - of_t)
        mean_x0, mean_x, variance = scheduler.posterior(t, s)
        assert mean_x == pytest.approx(slope, abs=1e-9)
        assert mean_x0 == pytest.approx(math.sqrt(of_s) - slope * math.sqrt(of_t), abs=1e-9)
        assert variance == pytest.approx(1 - of_s - slope * covariance, abs=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("kind", "num_steps"), [(DDPMScheduler, 1000), (DDIMScheduler, 200), (DPMScheduler, 100)]
)
def test_samplers_draw_from_a_known_normal_distribution(kind, num_steps: int, prediction: str) -> None:
    scheduler = kind(beta_schedule="cos_alpha", prediction_type=prediction)
    mean, deviation, count = 1.5, 0.5, 5000

    def predict(x: Tensor, t: int) -> Tensor:
        of_t = float(scheduler.alpha_bar[t])
        gain = math.sqrt(of_t) * deviation**2 / (of_t * deviation**2 + 1 - of_t)
        x0 = mean + gain * (x - math.sqrt(of_t) * mean)
        hidden = (x - math.sqrt(of_t) * x0) / math.sqrt(1 - of_t)
        return scheduler.target(x0, hidden, torch.full((count,), t))

    found = scheduler.denoise(
        noise(count, 1), predict, num_steps=num_steps, draw=lambda t: noise(count, 1, seed=t + 1)
    )
    assert float(found.mean()) == pytest.approx(mean, abs=0.05)
    assert float(found.std()) == pytest.approx(deviation, rel=0.06)


def test_the_solver_of_second_order_is_nearer_than_the_first_order_with_as_many_steps() -> None:
    deviation, count = 0.5, 20

    def end(kind, num_steps: int) -> Tensor:
        scheduler = kind(beta_schedule="cos_alpha", prediction_type="x0")

        def predict(x: Tensor, t: int) -> Tensor:
            of_t = float(scheduler.alpha_bar[t])
            return math.sqrt(of_t) * deviation**2 / (of_t * deviation**2 + 1 - of_t) * x

        return scheduler.denoise(noise(count, 1), predict, num_steps=num_steps, draw=lambda t: noise(1))

    exact = end(DDIMScheduler, 1000)
    first, second = (float((end(kind, 10) - exact).abs().max()) for kind in (DDIMScheduler, DPMScheduler))
    assert second < first / 2


def test_all_of_the_variance_makes_ddim_ancestral() -> None:
    settings = {"beta_schedule": "cos_alpha", "prediction_type": "x0"}
    ancestral = make_scheduler({"type": "DDPM", "params": settings})
    implicit = make_scheduler({"type": "DDIM", "params": {**settings, "eta": 1.0}})
    x, x0, drawn = noise(2, 3), noise(2, 3, seed=1), noise(2, 3, seed=2)
    for t, s in ((700, 650), (5, 4)):
        found = ancestral.estimate(x0, x, torch.tensor([t]))
        steps = [scheduler.step(x, found, t, s, drawn) for scheduler in (ancestral, implicit)]
        torch.testing.assert_close(*steps)


def test_without_eta_ddim_asks_for_no_noise() -> None:
    scheduler = DDIMScheduler()
    assert not scheduler.draws_noise
    x, found = noise(1, 2), Estimate(noise(1, 2, seed=1), noise(1, 2, seed=2))
    kept = float(scheduler.alpha_bar[3])
    wanted = math.sqrt(kept) * found.x0 + math.sqrt(1 - kept) * found.noise
    torch.testing.assert_close(scheduler.step(x, found, 9, 3), wanted)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_last_timestep_has_no_signal_for_x0_and_v(schedule: str) -> None:
    for prediction in ("x0", "v"):
        scheduler = DDPMScheduler(beta_schedule=schedule, prediction_type=prediction)
        assert scheduler.alpha_bar[-1] == 0
        assert scheduler.sampling_timesteps(10)[0] == 999
        with_signal = DDPMScheduler(
            beta_schedule=schedule, prediction_type=prediction, enable_zero_terminal_snr=False
        )
        assert with_signal.alpha_bar[-1] > 0


def test_a_predicted_noise_is_not_asked_for_where_nothing_else_is_left() -> None:
    scheduler = DDIMScheduler(beta_schedule="cos_alpha")
    assert scheduler.alpha_bar[-1] == 0
    assert scheduler.sampling_timesteps()[0] == 998
    assert scheduler.sampling_timesteps(40) == list(range(975, -1, -25))
    assert scheduler.sampling_timesteps(600)[0] == 998
    assert DDIMScheduler().sampling_timesteps()[0] == 999
    found = scheduler.estimate(noise(1, 2), noise(1, 2, seed=1), torch.tensor([999]))
    assert bool(found.x0.isfinite().all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "Euler"}, "type is 'Euler'; allowed: DDPM, DDIM, DPM"),
        ({"kind": "DDIM"}, "'kind' is unknown"),
        ({"type": "DDPM", "params": {"eta": 0.1}}, "DDPM has no parameter 'eta'"),
        ({"params": {"eta": 2.0}}, "eta is 2.0"),
        ({"params": {"prediction_type": "mu"}}, "prediction_type is 'mu'; allowed: epsilon, x0, v-type"),
        ({"params": {"beta_schedule": "cosine"}}, "allowed: linear, linear_sqrt, cos_alpha, cos_alpha4"),
        ({"params": {"num_train_timesteps": 1}}, "must be at least 2"),
        ({"params": {"num_train_timesteps": "many"}}, "of the wrong kind"),
        ({"params": {"beta_end": 1.5}}, "betas must be above 0 and at most 1"),
        ({"params": {"input_perturbation": -1.0}}, "must not be negative"),
    ],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_scheduler(settings)


def test_more_steps_than_timesteps_are_refused() -> None:
    with pytest.raises(ModelError, match="num_steps is 1001; it must be in 1 to num_train_timesteps 1000"):
        DDIMScheduler().sampling_timesteps(1001)


def test_given_betas_replace_the_schedule() -> None:
    scheduler = make_scheduler({"type": "DDPMScheduler", "params": {"betas": [0.1, 0.2, 0.5]}})
    np.testing.assert_allclose(scheduler.alpha_bar, [0.9, 0.72, 0.36])
    assert scheduler.num_train_timesteps == 3
