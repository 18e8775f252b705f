"""Moving averages of the weights: how they are kept, saved, evaluated, exported and resumed."""

import pytest
import torch
from running import copy_until, final_weights, newest_checkpoint, records, toy, train
from safetensors.torch import load_file
from torch import nn

from trainer.averaging import AVERAGE, averaged, drop_average, keep_average, swap
from trainer.config.schema import EmaConfig
from trainer.errors import ConfigError, UserError
from trainer.export import export
from trainer.shards import full_weights, has_averages, open_tensors

pytestmark = pytest.mark.usefixtures("forked_programs")

EMA = {"decay": 0.5}
VALIDATED = {
    "validation": {"dataloader_factory": "toy.map_loader", "dataloader_args": {"shuffle": False, "seed": 9}},
    "eval_every_steps": 1,
}


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_the_average_follows_its_recurrence(kind):
    weight = nn.Parameter(torch.zeros(3))
    optimizer = kind([weight], lr=0.1)
    keep_average(optimizer, EmaConfig(decay=0.4))
    seen = []
    for step in range(8):
        weight.grad = torch.full((3,), float(step + 1))
        optimizer.step()
        seen.append(weight.detach().clone())
    expected = seen[0]
    for n, weights in enumerate(seen[1:], start=1):
        decay = min(0.4, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weights
    torch.testing.assert_close(optimizer.state[weight][AVERAGE], expected)


@pytest.mark.parametrize("left_out", [(), (0, 1, 4), (2, 3)])
def test_a_step_that_a_fused_optimizer_leaves_out_moves_no_average(left_out):
    averages = []
    for is_fused in (False, True):
        weight = nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=is_fused)
        keep_average(optimizer, EmaConfig(decay=0.4))
        for step in range(8):
            weight.grad = torch.full((3,), float(step + 1))
            if is_fused:
                optimizer.found_inf = torch.tensor(float(step in left_out))  # what the strategy tells it
            if is_fused or step not in left_out:
                optimizer.step()
        averages.append(optimizer.state[weight][AVERAGE])
    torch.testing.assert_close(*averages)


def test_a_weight_that_is_held_still_keeps_its_average():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    keep_average(optimizer, EmaConfig())
    optimizer.param_groups[0]["is_held"] = True
    weight.grad = torch.ones(2)
    optimizer.step()
    assert not list(averaged(optimizer))


def test_a_weight_without_a_gradient_gets_no_average_and_no_state():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW(weights)
    keep_average(optimizer, EmaConfig())
    weights[0].grad = torch.ones(2)
    optimizer.step()
    assert [len(list(averaged(optimizer))), weights[1] in optimizer.state] == [1, False]


def test_a_second_swap_puts_both_back_bit_for_bit():
    weight = nn.Parameter(torch.randn(50))
    optimizer = torch.optim.AdamW([weight])
    keep_average(optimizer, EmaConfig())
    for _ in range(3):
        weight.grad = torch.randn(50)
        optimizer.step()
    before = (weight.detach().clone(), optimizer.state[weight][AVERAGE].clone())
    swap(optimizer)
    assert torch.equal(weight.detach(), before[1]) and not torch.equal(*before)
    swap(optimizer)
    assert torch.equal(weight.detach(), before[0])
    assert torch.equal(optimizer.state[weight][AVERAGE], before[1])


def test_dropped_averages_leave_the_moments():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    keep_average(optimizer, EmaConfig())
    weight.grad = torch.ones(2)
    optimizer.step()
    drop_average(optimizer)
    assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_weights_in_half_precision_are_refused():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2, dtype=torch.bfloat16))])
    with pytest.raises(ConfigError, match="weights in bfloat16.*build it in float32"):
        keep_average(optimizer, EmaConfig())


def test_training_is_the_same_with_an_average_and_evaluations_are_of_it(tmp_path):
    plain, kept = (
        train(tmp_path / name, toy({"epochs": 3, **VALIDATED}, ema=ema))
        for name, ema in (("plain", None), ("kept", EMA))
    )
    ours, theirs = ([{k: r[k] for k in ("loss", "grad_norm")} for r in records(f)] for f in (plain, kept))
    assert ours == theirs
    saved = newest_checkpoint(kept)
    trained = full_weights(saved, averaged=False)
    assert all(torch.equal(trained[name], weight) for name, weight in final_weights(plain).items())
    # The first evaluation is of weights that equal their average, every later one is not.
    validation = [[r["loss"] for r in records(folder, "validation")] for folder in (plain, kept)]
    equal = [a == b for a, b in zip(*validation, strict=True)]
    assert equal[0] and not any(equal[1:])


def test_a_checkpoint_holds_both_and_an_export_takes_the_average(tmp_path):
    folder = train(tmp_path, toy({"epochs": 2}, ema=EMA))
    saved = newest_checkpoint(folder)
    tensors = open_tensors(saved)
    average = tensors.optimizer_state("model.head.weight")[AVERAGE]
    assert has_averages(tensors)
    assert torch.equal(full_weights(saved)["head.weight"], average)
    assert not torch.equal(full_weights(saved, averaged=False)["head.weight"], average)
    for weights, expected in (
        (None, average),
        ("trained", full_weights(saved, averaged=False)["head.weight"]),
    ):
        out = tmp_path / f"export_{weights}"
        said = "\n".join(export(folder, out, weights=weights, trusted_modules=("toy",)))
        assert ("parameters, averaged" in said) == (weights is None)
        assert torch.equal(load_file(out / "model.safetensors")["head.weight"], expected)
    assert "moving average, decay 0.5" in (tmp_path / "export_None" / "README.md").read_text()


def test_an_export_of_averages_that_were_not_kept_is_an_error(tmp_path):
    folder = train(tmp_path, toy({"epochs": 1}))
    with pytest.raises(UserError, match="kept no average"):
        export(folder, tmp_path / "out", weights="averaged")


def test_a_new_run_starts_from_the_averages(tmp_path, capsys):
    first = train(tmp_path / "first", toy({"epochs": 2}, ema=EMA))
    second = train(tmp_path / "second", toy({"epochs": 1, "lr": 1e-30}, init_from=str(first)))
    assert "averages of the weights taken from" in capsys.readouterr().out
    ours, theirs = (full_weights(newest_checkpoint(folder)) for folder in (first, second))
    torch.testing.assert_close(ours["body.0.weight"], theirs["body.0.weight"])


def test_a_run_without_an_average_resumes_from_one_that_kept_it(tmp_path):
    phase = {"epochs": 2, "save_every_steps": 1}
    folder = copy_until(train(tmp_path / "kept", toy(phase, ema=EMA)), 2, tmp_path)
    resumed = train(tmp_path, toy(phase), resume_from="latest")
    assert resumed == folder and not has_averages(open_tensors(newest_checkpoint(resumed)))
