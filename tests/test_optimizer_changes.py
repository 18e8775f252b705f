"""Settings of the optimizer that change at a resume: what is configured is what trains, or it is refused."""

import pytest
import torch
from running import (
    comparable_records,
    copy_until,
    newest_checkpoint,
    newest_run,
    records,
    same_weights,
    toy,
    train,
    train_ranks,
)

from trainer.checkpoint_folder import open_checkpoint
from trainer.errors import CheckpointError
from trainer.shards import full_weights

PHASE = {"epochs": 3, "save_every_steps": 1}
ADAM, SGD = "torch.optim.AdamW", "torch.optim.SGD"
COSINE = "torch.optim.lr_scheduler.CosineAnnealingLR"
LAST = 6


def configured(optimizer_class=ADAM, phase=PHASE, groups=(), scheduler=None, **arguments):
    settings = {"optimizer_class": optimizer_class, "optimizer_args": arguments, "groups": list(groups)}
    return toy(phase, optimizer={**settings, **(scheduler or {})})


def resumed(tmp_path, first, then, step=3):
    """Train with one configuration, go on from a step with another, and return both run folders."""
    whole = train(tmp_path / "whole", first)
    folder = copy_until(whole, step, tmp_path)
    train(tmp_path, then, resume_from="latest")
    return whole, folder


def groups_of(folder):
    return newest_checkpoint(folder).shared("run_state.safetensors")["groups"]


def weights(run_folder, step, name="embedding.weight"):
    return full_weights(open_checkpoint(run_folder / f"checkpoint_{step}"))[name]


def test_a_changed_learning_rate_is_the_one_that_trains(tmp_path):
    whole, folder = resumed(tmp_path, configured(lr=0.01), configured(lr=0.5))
    assert [record["lr"] for record in records(whole)] == [0.01] * LAST
    assert [record["lr"] for record in records(folder)] == [0.01] * 3 + [0.5] * 3
    assert not same_weights(whole, folder)
    [group] = groups_of(folder)
    assert group["initial_lr"] == 0.5


def test_a_changed_weight_decay_is_the_one_that_trains(tmp_path):
    first, then = configured(SGD, lr=0.01), configured(SGD, lr=0.01, weight_decay=0.5)
    whole, folder = resumed(tmp_path, first, {**then, "max_grad_norm": 1e9}, step=LAST - 1)
    plain = copy_until(whole, LAST - 1, tmp_path / "plain")
    train(tmp_path / "plain", first, max_grad_norm=1e9, resume_from="latest")
    expected = weights(plain, LAST) - 0.01 * 0.5 * weights(plain, LAST - 1)
    torch.testing.assert_close(weights(folder, LAST), expected)


def test_a_changed_momentum_and_rate_are_those_that_train(tmp_path):
    first = configured(SGD, lr=0.01, momentum=0.9)
    whole, slow = resumed(tmp_path, first, configured(SGD, lr=0.01, momentum=0.0), step=LAST - 1)
    fast = copy_until(whole, LAST - 1, tmp_path / "fast")
    train(tmp_path / "fast", configured(SGD, lr=0.3, momentum=0.0), resume_from="latest")
    before = weights(whole, LAST - 1)
    moved = [weights(folder, LAST) - before for folder in (whole, slow, fast)]
    torch.testing.assert_close(moved[2], 30 * moved[1], rtol=1e-2, atol=1e-5)
    assert not torch.allclose(moved[0], moved[1])


def test_a_change_is_said_at_the_start_and_kept_by_the_next_resume(tmp_path, capsys):
    then = configured(lr=0.02, weight_decay=0.5)
    _, folder = resumed(tmp_path, configured(lr=0.01), then)
    said = "settings have changed since the checkpoint: lr was 0.01 and is 0.02; weight_decay was 0.01 and is 0.5"
    assert said in " ".join(capsys.readouterr().out.split())
    again = copy_until(folder, 5, tmp_path / "again")
    train(tmp_path / "again", then, resume_from="latest")
    assert same_weights(again, folder)
    assert comparable_records(again) == comparable_records(folder)
    assert "have changed since" not in capsys.readouterr().out


def test_a_changed_setting_of_one_group_is_that_groups_alone(tmp_path, capsys):
    def grouped(rate):
        return configured(lr=0.01, groups=[{"name": "head", "match": ["head"], "args": {"lr": rate}}])

    _, folder = resumed(tmp_path, grouped(0.02), grouped(0.04))
    assert {group["name"]: group["initial_lr"] for group in groups_of(folder)} == {
        "head": 0.04,
        "default": 0.01,
    }
    assert "lr was 0.02 and is 0.04 (group head)" in " ".join(capsys.readouterr().out.split())


def test_a_changed_argument_of_a_factory_acts_on_the_groups_that_it_makes(tmp_path):
    muon = "trainer.muon.muon_and_adam"
    _, folder = resumed(tmp_path, configured(muon, muon_lr=0.02), configured(muon, muon_lr=0.05))
    assert {group["name"]: group["lr"] for group in groups_of(folder)} == {"muon": 0.05, "adam": 3e-4}


def test_a_changed_momentum_is_what_a_cycle_goes_back_to(tmp_path):
    cycle = {**PHASE, "schedule": "one_cycle"}
    first, then = (toy(cycle, {}, optimizer={"optimizer_args": {"betas": [b, 0.99]}}) for b in (0.9, 0.7))
    _, folder = resumed(tmp_path, first, then)
    assert groups_of(folder)[0]["betas"][0] == 0.7


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_a_change_acts_under_zero_as_under_ddp(tmp_path, strategy):
    first, then = configured(lr=0.01), configured(lr=0.03, weight_decay=0.5)
    _, folder = resumed(tmp_path, first, then)
    train_ranks(1, tmp_path / "whole_zero", first, strategy=strategy)
    sharded = copy_until(newest_run(tmp_path / "whole_zero"), 3, tmp_path / "zero")
    train_ranks(1, tmp_path / "zero", then, strategy=strategy, resume_from="latest")
    assert groups_of(sharded) == groups_of(folder)
    torch.testing.assert_close(weights(sharded, LAST), weights(folder, LAST))


class KeepsItself(torch.optim.SGD):
    """Keeps an argument where no group shows it."""

    def __init__(self, parameters, lr, strength=1.0):
        super().__init__(parameters, lr)
        self.strength = strength


OWN = f"{__name__}.KeepsItself"
DECAYING = {"scheduler_class": COSINE, "scheduler_args": {"T_max": 6}}


ADAM_W = configured(lr=0.01)
SCHEDULED = configured(lr=0.01, scheduler=DECAYING)
REFUSED = {
    "class": (
        ADAM_W,
        configured("torch.optim.Adam", lr=0.01),
        "was torch.optim.AdamW and is torch.optim.Adam",
    ),
    "memory": (ADAM_W, configured(lr=0.01, amsgrad=True), "amsgrad was False and is True, and AdamW cannot"),
    "argument": (
        configured(OWN, lr=0.1),
        configured(OWN, lr=0.1, strength=2.0),
        "strength was not set and is 2.0, .* no setting",
    ),
    "scheduler": (
        SCHEDULED,
        configured(lr=0.01, scheduler={**DECAYING, "scheduler_args": {"T_max": 9}}),
        "scheduler_args was {'T_max': 6} and is {'T_max': 9}, .* the rates that it was saved with",
    ),
    "scheduled": (
        SCHEDULED,
        configured(lr=0.02, scheduler=DECAYING),
        "the optimizer's lr was 0.01 and is 0.02",
    ),
    "phase": (
        SCHEDULED,
        configured(lr=0.01, scheduler=DECAYING, phase={**PHASE, "lr": 0.02}),
        "datasets.0.lr was None and is 0.02",
    ),
}


@pytest.mark.parametrize(("first", "then", "message"), REFUSED.values(), ids=REFUSED)
def test_a_change_that_could_not_act_is_refused(tmp_path, first, then, message):
    whole = train(tmp_path / "whole", first)
    folder = copy_until(whole, 3, tmp_path)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=f"{message}.*init_from"):
        train(tmp_path, then, resume_from="latest")
    assert (folder / "config.yaml").read_text() == before


def test_a_finished_run_is_not_asked_for_its_optimizer(tmp_path):
    whole, folder = resumed(tmp_path, configured(lr=0.01), configured(SGD, lr=0.5), step=LAST)
    assert same_weights(whole, folder)
