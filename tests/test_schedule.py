from types import SimpleNamespace

import pytest

from trainer.errors import ConfigError
from trainer.schedule import base_learning_rates, learning_rate_factor, set_learning_rates


def phase(**settings):
    defaults = {
        "name": "p",
        "warmup_steps": 0,
        "schedule": "constant",
        "min_lr_ratio": 0.0,
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
