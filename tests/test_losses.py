from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models.outputs import LossOutput
from trainer.errors import ConfigError
from trainer.losses import LossModule


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, batch):
        return self.linear(batch["tokens"])


class WithMethod(Base):
    def compute_loss(self, batch):
        return self(batch).mean()


class WithCriterion(Base):
    def criterion(self, output, batch):
        return output.square().mean()


class WithDiffusion(WithMethod):
    def __init__(self):
        super().__init__()
        self.calls = []
        self.diffusion = SimpleNamespace(compute_loss=self._diffuse)

    def _diffuse(self, model, tokens, *, control_set, target_gene_idx, batch_idx, step):
        self.calls.append((model is self, tokens.shape, control_set, target_gene_idx, batch_idx, step))
        return self.linear(tokens).mean()


class Weighted(Base):
    announced = 3.0

    def compute_loss(self, batch):
        loss = self(batch).sum()
        return LossOutput(loss, 3.0, {"half": loss / 2})

    def loss_weight(self, batch):
        return self.announced


BATCH = {"tokens": torch.ones(4, 2)}


def test_the_configured_loss_comes_before_the_models():
    class Loss:
        def compute_loss(self, model, batch, phase_step, total_phase_steps):
            return model(batch).sum() * 0 + phase_step + total_phase_steps, torch.tensor(7.0)

    output = LossModule(WithDiffusion(), Loss())(BATCH, 2, 5)
    assert (
        output.sum.item() / output.weight == 7.0 and float(output.metrics["raw_loss"] / output.weight) == 7.0
    )


def test_a_plain_criterion_can_be_configured():
    class Loss(nn.Module):
        def forward(self, output, batch):
            return output.mean() - batch["tokens"].mean()

    assert LossModule(Base(), Loss()).route == "loss.loss_class Loss"


def test_diffusion_comes_before_compute_loss_and_gets_the_contract_arguments():
    model = WithDiffusion()
    batch = {**BATCH, "control": torch.zeros(1), "batch_idx": torch.zeros(4)}
    module = LossModule(model)
    module(batch, 9, 10)
    is_model, shape, control, target, batch_idx, step = model.calls[0]
    assert module.route == "model.diffusion.compute_loss"
    assert is_model and shape == (4, 2) and control is batch["control"] and target is None
    assert batch_idx is batch["batch_idx"] and step == 9


def test_a_diffusion_that_names_the_seed_of_the_noise_is_given_the_batchs():
    model, seeds = WithDiffusion(), []

    def compute_loss(model, tokens, *, control_set, target_gene_idx, batch_idx, step, noise_seed=None):
        seeds.append(noise_seed)
        return model.linear(tokens).mean()

    model.diffusion = SimpleNamespace(compute_loss=compute_loss)
    batch = {**BATCH, "noise_seed": torch.arange(4)}
    LossModule(model)(batch, 0, 1)
    LossModule(model)(BATCH, 0, 1)
    assert seeds[0] is batch["noise_seed"] and seeds[1] is None
    LossModule(WithDiffusion())(batch, 0, 1)  # one that does not name it is called without


def test_compute_loss_comes_before_criterion():
    class Both(WithMethod, WithCriterion):
        pass

    assert LossModule(Both()).route == "model.compute_loss"


def test_criterion_gets_the_models_output_and_the_batch():
    module = LossModule(WithCriterion())
    expected = module.model(BATCH).square().mean()
    output = module(BATCH, 0, 1)
    assert module.route == "model.criterion" and torch.equal(output.sum / output.weight, expected)


def test_a_scalar_loss_is_averaged_equally_over_cells():
    output = LossModule(WithMethod())(BATCH, 0, 1)
    assert output.weight == 4.0


def test_a_model_without_any_loss_is_an_error_that_lists_the_ways():
    with pytest.raises(ConfigError, match="Base offers no loss: configure loss.loss_class"):
        LossModule(Base())


def test_a_summed_loss_keeps_its_weight_and_detaches_its_metrics():
    output = LossModule(Weighted())(BATCH, 0, 1)
    assert output.weight == 3.0 and output.sum.requires_grad and not output.metrics["half"].requires_grad


def test_a_summed_loss_without_loss_weight_is_an_error():
    model = Weighted()
    model.loss_weight = None
    with pytest.raises(ConfigError, match=r"a method loss_weight\(batch\)"):
        LossModule(model)(BATCH, 0, 1)


def test_a_weight_that_differs_from_the_announced_one_is_an_error():
    model = Weighted()
    model.announced = 2.0
    with pytest.raises(ConfigError, match="returned weight 3.0, but its .* said 2.0"):
        LossModule(model)(BATCH, 0, 1)


def test_a_loss_that_is_no_scalar_is_an_error():
    class Wrong(Base):
        def compute_loss(self, batch):
            return self(batch)

    with pytest.raises(ConfigError, match=r"returns a tensor of shape \[4, 1\]"):
        LossModule(Wrong())(BATCH, 0, 1)


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ({"metrics": {"hits": torch.ones(4)}}, r"metrics\['hits'\] is a tensor of shape \[4\]; it must"),
        ({"metrics": {"hits": 2}}, r"metrics\['hits'\] is int; it must be a scalar tensor"),
        ({"sum": torch.ones(4)}, r"whose sum is a tensor of shape \[4\]"),
    ],
)
def test_a_part_of_a_summed_loss_that_is_no_scalar_is_named(sums, message):
    class Wrong(Weighted):
        def compute_loss(self, batch):
            return LossOutput(self(batch).sum(), 3.0, {})._replace(**sums)

    with pytest.raises(ConfigError, match=message):
        LossModule(Wrong())(BATCH, 0, 1)


def test_the_weight_and_the_options_of_a_criterion_that_is_a_method_are_its_models():
    class WeightedCriterion(WithCriterion):
        def loss_weight(self, batch):
            return 2.0

    module = LossModule(WeightedCriterion())
    assert module(BATCH, 0, 1).weight == 2.0 and module.objective is module.model


def test_what_is_asked_instead_of_a_loss_runs_in_the_modules_forward_pass():
    module, passes = LossModule(WithMethod()), []
    module.register_forward_hook(lambda *_: passes.append(1))
    doubled = module(BATCH, 0, None, instead=lambda model, batch: 2 * model(batch))
    assert torch.equal(doubled, 2 * module.model(BATCH)) and passes == [1]
