from functools import partial
from types import SimpleNamespace

import pytest
import torch

from trainer.config.schema import OneCycleConfig, PhaseConfig
from trainer.errors import ConfigError
from trainer.phases import Phase
from trainer.schedule import (
    base_learning_rates,
    check_momentum,
    learning_rate_factor,
    momentum,
    schedule_lengths,
    schedule_notes,
    set_learning_rates,
    set_momentum,
)


def phase(**settings):
    defaults = {
        "name": "p",
        "warmup_steps": 0,
        "schedule": "constant",
        "min_lr_ratio": 0.0,
        "schedule_steps": None,
        "schedule_fits": (),
        "schedule_scope": "phase",
        "lr": None,
        "muon_lr": None,
        "adam_lr": None,
        "group_lrs": {},
    }
    return SimpleNamespace(**{**defaults, **settings})


def factors(total, **settings):
    return [learning_rate_factor(phase(**settings), step, total) for step in range(total)]


def test_warmup_starts_above_zero_and_reaches_the_full_rate():
    assert factors(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_starts_at_the_full_rate_and_ends_at_the_lowest_on_the_last_step():
    assert factors(5, schedule="linear") == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert factors(5, schedule="linear", min_lr_ratio=0.2)[-1] == pytest.approx(0.2)


def test_decay_follows_warmup_without_repeating_or_skipping_the_full_rate():
    assert factors(6, warmup_steps=2, schedule="linear") == [0.5, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_cosine_never_rises_again_after_its_end():
    values = [learning_rate_factor(phase(schedule="cosine"), step, 10) for step in range(30)]
    assert values[0] == 1.0
    assert all(later <= earlier + 1e-12 for earlier, later in zip(values, values[1:], strict=False))
    assert values[9:] == pytest.approx([0.0] * 21, abs=1e-12)


def test_a_decay_without_a_known_length_is_an_error():
    with pytest.raises(ConfigError, match="'p': schedule 'cosine' decays over the phase.*max_steps"):
        learning_rate_factor(phase(schedule="cosine"), 0, None)


def test_a_written_horizon_is_kept_and_the_rate_stays_at_its_end():
    short = phase(schedule="linear", schedule_steps=5)
    assert [learning_rate_factor(short, step, 8) for step in range(8)] == [
        1.0,
        0.75,
        0.5,
        0.25,
        0.0,
        0.0,
        0.0,
        0.0,
    ]
    long = phase(schedule="linear", schedule_steps=9)
    assert [learning_rate_factor(long, step, 5) for step in range(5)] == [1.0, 0.875, 0.75, 0.625, 0.5]


def test_a_horizon_needs_no_known_length():
    assert learning_rate_factor(phase(schedule="linear", schedule_steps=5), 4, None) == 0.0


def test_what_fits_is_shortened_to_the_steps_that_are_run_and_never_lengthened():
    both = phase(
        schedule="cosine", warmup_steps=2000, schedule_steps=100000, schedule_fits=("warmup", "decay")
    )
    assert schedule_lengths(both, 330) == (33, 330)
    assert schedule_lengths(both, 200000) == (2000, 100000)
    assert learning_rate_factor(both, 329, 330) == pytest.approx(0.0, abs=1e-12)
    kept = phase(schedule="cosine", warmup_steps=50, schedule_steps=100000, schedule_fits=("decay",))
    assert schedule_lengths(kept, 330) == (50, 330)
    only_warmup = phase(schedule="cosine", warmup_steps=2000, schedule_steps=500, schedule_fits=("warmup",))
    assert schedule_lengths(only_warmup, 330) == (33, 500)


def test_the_account_says_what_was_fitted_and_where_a_schedule_ends():
    fitted = phase(
        schedule="cosine", warmup_steps=2000, schedule_steps=100000, schedule_fits=("warmup", "decay")
    )
    assert schedule_notes(fitted, 330) == [
        "schedule fitted to the phase's 330 steps: warmup 33 steps in place of 2000, decay to step 330 in place of "
        "100000"
    ]
    longer = phase(schedule="linear", schedule_steps=9, schedule_scope="run")
    assert schedule_notes(longer, 5) == [
        "the run ends at step 5 of the schedule's 9, with 0.5 of the learning rate"
    ]
    assert (
        "the schedule ends at step 5 of 8" in schedule_notes(phase(schedule="linear", schedule_steps=5), 8)[0]
    )
    assert "within its warmup of 10 steps" in schedule_notes(phase(warmup_steps=10), 8)[0]
    assert schedule_notes(phase(schedule="linear", warmup_steps=2), 8) == []


def test_a_schedule_of_the_run_counts_the_steps_of_all_phases():
    def opened(epochs, before):
        loader = type("Loader", (), {"steps_per_epoch": 2})()
        config = PhaseConfig(
            dataloader_factory="a.b", schedule="linear", schedule_scope="run", epochs=epochs, warmup_steps=1
        )
        plan: object = None
        return Phase(0, config, plan, loader, None, [], [], steps_before=before, steps_of_run=6)

    first, second = opened(1, 0), opened(2, 2)
    factors = [first.learning_rate_factor(step) for step in range(2)]
    factors += [second.learning_rate_factor(step) for step in range(4)]
    assert factors == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


GROUPS = [
    {"name": "body", "initial_lr": 1.0, "use_muon": True},
    {"name": "head", "initial_lr": 2.0},
]


def test_a_phase_without_rates_uses_what_the_optimizer_was_built_with():
    assert base_learning_rates(phase(), GROUPS) == [1.0, 2.0]


def test_muon_and_adam_rates_go_to_their_groups():
    assert base_learning_rates(phase(muon_lr=0.1, adam_lr=0.2), GROUPS) == [0.1, 0.2]


def test_a_rate_for_one_group_by_name_rules_over_the_phase_rate():
    assert base_learning_rates(phase(lr=0.5, group_lrs={"head": 0.05}), GROUPS) == [0.5, 0.05]


def test_an_unknown_group_is_named_with_those_there_are():
    with pytest.raises(ConfigError, match="group_lrs names tail, but .* are body, head"):
        base_learning_rates(phase(group_lrs={"tail": 1.0}), GROUPS)


def test_a_muon_rate_without_a_muon_group_is_an_error():
    with pytest.raises(ConfigError, match="no parameter group of the optimizer has use_muon"):
        base_learning_rates(phase(muon_lr=0.1), [{"initial_lr": 1.0}])


def test_set_learning_rates_writes_base_times_factor():
    groups = [dict(group) for group in GROUPS]
    set_learning_rates(groups, [0.4, 0.2], 0.5)
    assert [group["lr"] for group in groups] == [0.2, 0.1]


# One cycle


@pytest.mark.parametrize("total", [2, 3, 5, 12, 40, 101])
@pytest.mark.parametrize("shape", [{}, {"pct_start": 0.1, "div_factor": 10.0, "final_div_factor": 100.0}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_one_cycle_is_torchs(total, shape, kind):
    ours, theirs = (kind([torch.nn.Parameter(torch.zeros(1))], lr=0.5) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(theirs, max_lr=0.5, total_steps=total, **shape)
    cycle = phase(schedule="one_cycle", one_cycle=OneCycleConfig(**shape))
    for step in range(total):
        set_learning_rates(ours.param_groups, [0.5], learning_rate_factor(cycle, step, total))
        set_momentum(ours.param_groups, momentum(cycle, step, total))
        for key in {"lr", "betas", "momentum"} & theirs.param_groups[0].keys():
            one, other = ours.param_groups[0][key], theirs.param_groups[0][key]
            assert one == pytest.approx(other, rel=1e-12, abs=1e-15), (step, key)
        theirs.step()
        if step < total - 1:
            scheduler.step()


def test_a_phase_after_one_cycle_has_the_optimizers_own_momentum():
    groups = [{"betas": (0.8, 0.99)}]
    set_momentum(groups, 0.95)
    assert groups[0]["betas"] == (0.95, 0.99)
    set_momentum(groups, None)
    assert groups[0]["betas"] == (0.8, 0.99)


def test_one_cycle_needs_a_momentum_to_move():
    cycle = phase(schedule="one_cycle", one_cycle=None)
    with pytest.raises(ConfigError, match="it has none; set one_cycle.cycle_momentum: false"):
        check_momentum(cycle, [{"lr": 0.1}])
    check_momentum(phase(schedule="one_cycle", one_cycle=OneCycleConfig(cycle_momentum=False)), [{"lr": 0.1}])


def test_one_cycle_stays_at_its_end():
    cycle = phase(schedule="one_cycle", one_cycle=None, schedule_steps=10)
    end = learning_rate_factor(cycle, 9, 20)
    assert end == pytest.approx(1 / 25 / 1e4)
    assert learning_rate_factor(cycle, 19, 20) == end
