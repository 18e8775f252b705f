import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from launching import ROOT, launch_ranks
from running import records, strategy_environment
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_prompts import write_clip

from models.circuit_diffusion import CircuitDiffusion, CircuitDiffusionConfig, Draws
from models.circuit_unet import CircuitUNet, UnitaryEncoder
from models.errors import ModelError
from models.outputs import LossOutput
from models.prompts import EncodedPrompts
from trainer.circuit_weights import load_circuit_weights
from trainer.costs import batch_flops
from trainer.errors import CheckpointError

COMPILES = "models.circuit_unet.CircuitCompilationUNet"
PAD = 3
X0 = {"type": "DDIM", "params": {"beta_schedule": "cos_alpha", "prediction_type": "x0"}}
UNITS = {"model_features": [16, 32], "num_heads": 2, "t_emb_size": 32, "cond_emb_size": 16}


def make_config(**changes: Any) -> CircuitDiffusionConfig:
    settings: dict[str, Any] = {
        "vocab_size": 4,
        "prompts": ("all h", "all cx"),
        "num_qubits": 3,
        "gate_pool": ("h", "cx"),
        "unet_args": UNITS,
        "scheduler": {"type": "DDIM", "params": {"beta_schedule": "cos_alpha", "prediction_type": "v-type"}},
    }
    return CircuitDiffusionConfig(**{**settings, **changes})


def make_model(seed: int = 0, **changes: Any) -> CircuitDiffusion:
    torch.manual_seed(seed)
    return CircuitDiffusion(make_config(**changes))


def compiler(**changes: Any) -> CircuitDiffusion:
    return make_model(unet_class=COMPILES, has_unitary=True, **changes)


def make_batch(count: int = 8, seed: int = 0, length: int = 8) -> dict[str, Tensor]:
    """Return circuits of two kinds: h on the first qubit, shorter than the grid, and cx from it to the second."""
    generator = torch.Generator().manual_seed(seed)
    prompt_idx = torch.arange(count) % 2
    tokens = torch.zeros(count, 3, length, dtype=torch.int64)
    tokens[prompt_idx == 0, 0, : length // 2] = 1
    tokens[prompt_idx == 0, :, length // 2 :] = PAD
    tokens[prompt_idx == 1, 0] = -2
    tokens[prompt_idx == 1, 1] = 2
    noise_seed = torch.randint(0, 2**62, (count,), generator=generator)
    unitary = torch.zeros(count, 2, 8, 8)
    unitary[prompt_idx == 0, 0] = torch.eye(8)
    unitary[prompt_idx == 1, 1] = torch.eye(8).flip(0)
    return {"tokens": tokens, "prompt_idx": prompt_idx, "noise_seed": noise_seed, "unitary": unitary}


def train(
    model: CircuitDiffusion, num_steps: int, learning_rate: float = 1e-2, **changes: Tensor
) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for step in range(num_steps):
        result = model.compute_loss({**make_batch(seed=step), **changes})
        loss = result.sum / result.weight
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def loss_of(model: CircuitDiffusion, batch: dict[str, Tensor]) -> LossOutput:
    with torch.no_grad():
        return model.compute_loss(batch)


def halves(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    half = len(batch["tokens"]) // 2
    return {k: v[:half] for k, v in batch.items()}, {k: v[half:] for k, v in batch.items()}


@pytest.fixture(scope="module")
def trained() -> CircuitDiffusion:
    model = make_model(scheduler=X0)
    train(model, 60)
    return model.eval()


def test_every_token_is_decoded_to_itself() -> None:
    model = make_model()
    tokens = torch.tensor([[[0, 1, 2, 3], [-1, -2, 0, 3]]])
    assert torch.equal(model.decode(model.embed(tokens)), tokens)
    assert torch.equal(model.decode(0.01 * model.embed(tokens)), tokens)
    table = model.embedding_table
    torch.testing.assert_close(model.embed(tokens)[0, :, 1, 1], -table[2])
    assert torch.equal(table, table.bfloat16().float())
    torch.testing.assert_close(table @ table.T, torch.eye(4), atol=0.01, rtol=0)


def test_background_and_padding_have_no_negative() -> None:
    model = make_model()
    tokens = torch.tensor([[[0, 3]]])
    assert torch.equal(model.decode(-model.embed(tokens)), tokens)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_training_lowers_the_loss(prediction: str) -> None:
    params = {"beta_schedule": "cos_alpha", "prediction_type": prediction, "num_train_timesteps": 100}
    model = make_model(scheduler={"type": "DDPM", "params": params})
    unseen = make_batch(64, seed=1000)
    before = float(loss_of(model, unseen).sum)
    train(model, 40)
    assert float(loss_of(model, unseen).sum) < 0.85 * before


def test_a_trained_model_draws_what_the_prompt_asks_for(trained: CircuitDiffusion) -> None:
    wanted = make_batch(8)["tokens"]
    found = trained.sample(
        ["all h", "all cx"] * 4, 3, 8, num_steps=10, seeds=list(range(8)), guidance_scale=2.0
    )
    assert found.dtype == torch.int64
    assert float((found == wanted).float().mean()) > 0.9
    swapped = trained.sample([1, 0] * 4, 3, 8, num_steps=10, seeds=list(range(8)), guidance_scale=2.0)
    assert float((swapped == wanted).float().mean()) < 0.6


def test_guidance_leads_from_the_empty_prompt_to_the_asked_one_and_beyond(trained: CircuitDiffusion) -> None:
    def drawn(prompt: str, scale: float) -> Tensor:
        return trained.sample([prompt] * 6, 3, 8, num_steps=4, seeds=list(range(6)), guidance_scale=scale)

    assert torch.equal(drawn("all h", 0.0), drawn("all cx", 0.0))
    assert not torch.equal(drawn("all h", 1.0), drawn("all h", 0.0))


def test_a_circuit_depends_on_its_seed_alone(trained: CircuitDiffusion) -> None:
    prompts, seeds = ["all h", "all cx", "all h", "all cx"], [5, 6, 7, 2**62]
    whole = trained.sample(prompts, 3, 8, num_steps=5, seeds=seeds, guidance_scale=1.5)
    torch.manual_seed(99)
    parts = [
        trained.sample([prompt], 3, 8, num_steps=5, seeds=[seed], guidance_scale=1.5)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_ancestral_sampling_depends_on_the_seed_alone_too() -> None:
    model = make_model(scheduler={"type": "DDPM", "params": {"prediction_type": "v"}})
    train(model, 3)
    whole = model.sample([0, 1, 0], 3, 8, num_steps=6, seeds=[1, 2, 3])
    assert torch.equal(whole[1:], model.sample([1, 0], 3, 8, num_steps=6, seeds=[2, 3]))
    others = model.sample([0, 1, 0], 3, 8, num_steps=6, seeds=[4, 5, 6])
    assert not torch.equal(whole, others)
    assert model.training


def test_the_prompt_changes_the_prediction() -> None:
    model = make_model()
    train(model, 3)
    model.eval()
    x, t = torch.randn(2, 8, 3, 8), torch.tensor([500, 500])
    x[1] = x[0]
    first, second = model(x, t, torch.tensor([0, 1]))
    assert not torch.allclose(first, second, atol=1e-4)
    first, second = model(x, t, torch.tensor([0, 0]))
    torch.testing.assert_close(first, second)


def test_the_unitary_tells_what_the_prompt_does_not() -> None:
    model = compiler(scheduler=X0)
    same_prompt = torch.zeros(8, dtype=torch.int64)
    losses = train(model, 60, prompt_idx=same_prompt)
    model.eval()
    batch = {**make_batch(64, seed=1000), "prompt_idx": torch.zeros(64, dtype=torch.int64)}
    right = float(loss_of(model, batch).sum)
    wrong = float(loss_of(model, {**batch, "unitary": batch["unitary"].flip(0)}).sum)
    assert losses[-1] < losses[0]
    assert wrong > 5 * right
    found = model.sample([0] * 8, 3, 8, num_steps=8, seeds=list(range(8)), unitary=batch["unitary"][:8])
    assert float((found == batch["tokens"][:8]).float().mean()) > 0.9


def test_unitaries_of_several_numbers_of_qubits_become_tokens_that_differ() -> None:
    encoder = UnitaryEncoder(16)
    for num_qubits in (1, 2, 3, 4):
        size = 2**num_qubits
        unitary = torch.linalg.qr(torch.randn(2, size, size, dtype=torch.complex64)).Q
        tokens = encoder(torch.view_as_real(unitary).permute(0, 3, 1, 2))
        assert tokens.shape == (2, encoder.num_tokens(size), 16) == (2, (size // 2) ** 2, 16)
        assert not torch.allclose(tokens[0], tokens[1], atol=1e-3)


@pytest.mark.parametrize("compiles", [False, True])
def test_gradients_reach_everything_that_trains_and_not_the_embedding(compiles: bool) -> None:
    model = compiler() if compiles else make_model()
    train(model, 2)  # the head and the second convolutions start at zero
    table = model.embedding_table.clone()
    model.zero_grad()
    model.compute_loss(make_batch()).sum.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == []
    assert "embedding_table" not in dict(model.named_parameters())
    assert not model.embedding_table.requires_grad
    train(model, 1)
    assert torch.equal(model.embedding_table, table)


def test_conditions_are_left_out_of_their_share_of_circuits_independently() -> None:
    model = compiler(guidance_train_p=0.3)
    draws = model.draw(make_batch(4000))
    assert draws.keeps_prompt is not None and draws.keeps_unitary is not None
    prompt, unitary = ~draws.keeps_prompt, ~draws.keeps_unitary
    assert float(prompt.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float(unitary.float().mean()) == pytest.approx(0.3, abs=0.03)
    assert float((prompt & unitary).float().mean()) == pytest.approx(0.09, abs=0.02)
    assert draws.perturbation is not None
    model.eval()
    draws = model.draw(make_batch(8))
    assert draws.keeps_prompt is None and draws.keeps_unitary is None and draws.perturbation is None
    off = make_model(enable_guidance_train=False).draw(make_batch(8))
    assert off.keeps_prompt is None


def test_a_prompt_and_a_unitary_that_are_left_out_are_not_seen() -> None:
    model = compiler()
    train(model, 2)
    batch, none = make_batch(), torch.zeros(8, dtype=torch.bool)
    draws = model.draw(batch)._replace(keeps_prompt=none, keeps_unitary=none)
    other = {**batch, "prompt_idx": 1 - batch["prompt_idx"], "unitary": batch["unitary"].flip(0)}
    with torch.no_grad():
        first, second = (model.compute_loss(each, draws) for each in (batch, other))
    assert float(first.sum) == float(second.sum)


def test_timesteps_and_noise_are_those_of_the_seeds_whatever_the_rest_of_the_batch() -> None:
    model = make_model()
    whole, long = model.draw(make_batch(4000)), model.draw(make_batch(4000, length=16))
    assert torch.equal(whole.noise, long.noise[..., :8])
    second = model.draw(halves(make_batch(4000))[1])
    for name in ("timesteps", "noise", "perturbation", "keeps_prompt"):
        assert torch.equal(getattr(whole, name)[2000:], getattr(second, name))
    assert float(whole.timesteps.float().mean()) == pytest.approx(499.5, abs=15)
    assert int(whole.timesteps.min()) < 5 and int(whole.timesteps.max()) > 994


def test_two_halves_of_a_batch_sum_to_the_whole() -> None:
    model = make_model()
    train(model, 3)
    batch = make_batch(8, seed=77)
    whole, parts = loss_of(model, batch), [loss_of(model, half) for half in halves(batch)]
    assert float(sum(part.sum for part in parts)) == pytest.approx(float(whole.sum), rel=1e-5)
    assert whole.weight == model.loss_weight(batch) == 8
    accuracy = sum(part.metrics["token_accuracy"] for part in parts)
    assert float(accuracy) == pytest.approx(float(whole.metrics["token_accuracy"]), abs=0.1)


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v-type"])
@pytest.mark.parametrize("loss", ["MSELoss", "L1Loss", "HuberLoss"])
def test_the_loss_is_that_of_torch_between_prediction_and_target(prediction: str, loss: str) -> None:
    model = make_model(loss=loss, scheduler={"params": {"prediction_type": prediction}})
    batch = make_batch(4)
    draws = Draws(torch.tensor([3, 300, 600, 999]), torch.randn(4, 8, 3, 8))
    x0 = model.embed(batch["tokens"])
    kept = torch.tensor(model.scheduler.alpha_bar)[draws.timesteps].float().view(4, 1, 1, 1)
    signal, scale = kept.sqrt(), (1 - kept).sqrt()
    target = {"epsilon": draws.noise, "x0": x0, "v-type": signal * draws.noise - scale * x0}[prediction]
    with torch.no_grad():
        predicted = model(signal * x0 + scale * draws.noise, draws.timesteps, batch["prompt_idx"])
        result = model.compute_loss(batch, draws)
    wanted = getattr(nn, loss)()(predicted, target)
    assert float(result.sum / result.weight) == pytest.approx(float(wanted), rel=1e-5)


def test_masked_padding_counts_neither_in_the_loss_nor_in_the_accuracy() -> None:
    model, batch = make_model(mask_padding=True), make_batch(2)
    draws = Draws(torch.tensor([300, 300]), torch.randn(2, 8, 3, 8))
    x0 = model.embed(batch["tokens"])
    target = model.scheduler.target(x0, draws.noise, draws.timesteps)
    errors = target.square().mean(dim=1)  # an untrained model predicts 0
    wanted = errors[0, :, :4].mean() + errors[1].mean()
    masked = model.compute_loss(batch, draws)
    assert float(masked.sum.detach()) == pytest.approx(float(wanted), rel=1e-5)
    plain = make_model().compute_loss(batch, draws)
    assert float(plain.sum.detach()) == pytest.approx(float(errors.mean(dim=(1, 2)).sum()), rel=1e-5)


def test_a_model_trains_in_bf16_nearly_as_in_fp32() -> None:
    whole, low = make_model(), make_model()
    losses = train(whole, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low_losses = train(low, 20)
    assert low_losses[-1] == pytest.approx(losses[-1], rel=0.2)
    result = loss_of(low.bfloat16(), make_batch())
    assert result.sum.dtype == torch.float32 and bool(result.sum.isfinite())
    assert low.sample([0], 3, 8, num_steps=2, seeds=[1]).shape == (1, 3, 8)
    assert torch.equal(low.embedding_table.float(), whole.embedding_table)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    models = [make_model(), make_model(unet_args={**UNITS, "activation_checkpointing": True})]
    gradients = []
    for model in models:
        train(model, 1)
        model.zero_grad()
        model.compute_loss(make_batch()).sum.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_saved_model_draws_the_same_circuits(tmp_path: Path) -> None:
    model = compiler()
    train(model, 3)
    model.save_pretrained(tmp_path)
    loaded = CircuitDiffusion.from_pretrained(tmp_path)
    assert not loaded.training and loaded.config == model.config
    batch = make_batch(4)
    arguments: dict[str, Any] = {"num_steps": 3, "seeds": [1, 2, 3, 4], "unitary": batch["unitary"]}
    found = [each.sample(batch["prompt_idx"], 3, 8, **arguments) for each in (model, loaded)]
    assert torch.equal(*found)


def test_the_model_is_built_without_memory() -> None:
    with torch.device("meta"):
        model = compiler()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.embedding_table.device.type == "meta"


@pytest.mark.parametrize("features", [[16], [16, 32], [8, 16, 32]])
def test_sizes_of_levels_are_those_asked_for(features: list[int]) -> None:
    unet = CircuitUNet(
        features, num_heads=2, num_res_blocks=2, transformer_depths=[0] * (len(features) - 1) + [2]
    )
    length = 2 ** (len(features) - 1) * 3
    assert unet(torch.randn(2, 8, 3, length), torch.tensor([1, 2]), torch.randn(2, 4, 64)).shape[-1] == length
    if len(features) > 1:
        with pytest.raises(ModelError, match=f"pad to a multiple of {unet.length_multiple}"):
            unet(torch.randn(2, 8, 3, length + 1), torch.tensor([1, 2]), torch.randn(2, 4, 64))


@pytest.mark.parametrize("compiles", [False, True])
def test_operations_are_counted_as_torch_counts_them(compiles: bool) -> None:
    model = compiler() if compiles else make_model()
    batch = make_batch(4)
    # Attention is counted in its plain form alone.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.compute_loss(batch).sum.backward()
    assert batch_flops(model, batch) == pytest.approx(counter.get_total_flops(), rel=0.02)


class GenqcUNet(nn.Module):
    """A network with the constructor, the embedding and the call of genQC's."""

    def __init__(
        self,
        model_features=[32, 32, 64],  # noqa: B006
        clr_dim=8,
        num_clrs=8,
        t_emb_size=128,
        cond_emb_size=512,
        num_heads=[8, 8, 2],  # noqa: B006
        num_res_blocks=[2, 2, 4],  # noqa: B006
        transformer_depths=[1, 2, 1],  # noqa: B006
    ) -> None:
        super().__init__()
        self.emb_clr = nn.Embedding(num_clrs, clr_dim)
        self.conv = nn.Conv2d(clr_dim, clr_dim, 1)
        self.context = nn.Linear(cond_emb_size, clr_dim)

    def forward(self, x, t, c_emb, attn_mask=None, key_padding_mask=None, **kwargs):
        return self.conv(x) + self.context(c_emb).mean(dim=1)[:, :, None, None] + 0 * t.view(-1, 1, 1, 1)


class GenqcCompilationUNet(GenqcUNet):
    def __init__(self, *args, unitary_encoder_config: Any = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.factor = nn.Parameter(torch.ones(unitary_encoder_config["cond_emb_size"]))

    def forward(self, x, t, c_emb, U, attn_mask=None, key_padding_mask=None, **kwargs):
        return (
            super().forward(x, t, c_emb)
            * (1 + U.mean(dim=(1, 2, 3)))[:, None, None, None]
            * self.factor.mean()
        )


@pytest.fixture
def genqc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package be found, with stand-ins of its networks' signatures."""
    module = ModuleType("genQC.models.unet_qc")
    module.QC_Cond_UNet, module.QC_Compilation_UNet = GenqcUNet, GenqcCompilationUNet
    for name in ("genQC", "genQC.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "genQC.models.unet_qc", module)


def test_a_network_of_genqc_gets_the_vocabulary_of_the_data_whatever_a_preset_says(genqc: None) -> None:
    model = make_model(
        unet_class="genQC.models.unet_qc.QC_Cond_UNet", unet_args={"num_clrs": 99, "cond_emb_size": 16}
    )
    unet: Any = model.unet
    assert unet.emb_clr.weight.shape == (4, 8)
    assert torch.equal(model.embedding_table, unet.emb_clr.weight)
    assert train(model, 10)[-1] > 0
    assert torch.equal(model.embedding_table, unet.emb_clr.weight)
    assert unet.emb_clr.weight.grad is None
    assert batch_flops(model, make_batch()) is None


def test_a_network_of_genqc_is_told_the_unitary(genqc: None, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "unet_class": "genQC.models.unet_qc.QC_Compilation_UNet",
        "unet_args": {"cond_emb_size": 16, "unitary_encoder_config": {"cond_emb_size": 16}},
    }
    model = make_model(has_unitary=True, **options)
    train(model, 2)
    model.save_pretrained(tmp_path)
    loaded = CircuitDiffusion.from_pretrained(tmp_path)
    batch = make_batch()
    assert float(loss_of(model.eval(), batch).sum) == float(loss_of(loaded, batch).sum)
    assert float(loss_of(model, {**batch, "unitary": 9 * batch["unitary"]}).sum) != float(
        loss_of(model, batch).sum
    )
    with pytest.raises(ModelError, match="is told the unitary of a circuit, but the data has none"):
        make_model(**options)


def test_genqc_that_is_not_installed_is_named() -> None:
    with pytest.raises(ModelError, match=r"genQC.models.unet_qc cannot be imported .*cellphase\[genqc\]"):
        make_model(unet_class="genQC.models.unet_qc.QC_Cond_UNet")


@pytest.mark.parametrize("num_rows", [0, 2, 4])
def test_weights_without_a_row_for_each_prompt_are_damaged(num_rows: int) -> None:
    model = make_model()
    arguments = {
        "gate_pool": ["h", "cx"],
        "prompts": ["all h", "all cx"],
        "scheduler": model.config.scheduler,
    }
    weights = dict(make_model(seed=1).state_dict())
    assert not load_circuit_weights(weights, arguments, model, "export")
    weights["prompts.table.weight"] = weights["prompts.table.weight"][:1].repeat(num_rows, 1)
    with pytest.raises(
        CheckpointError, match=r"export: prompts.table.weight .* each of its 3 prompts .* damaged"
    ):
        load_circuit_weights(weights, arguments, model, "export")


def test_prompts_of_a_text_encoder_are_encoded_once_and_kept(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip", width=16)
    encoder = {"library": "transformers", "width": 16, "num_tokens": 8}
    model = make_model(text_encoder=encoder, text_encoder_path=str(folder))
    assert isinstance(model.prompts, EncodedPrompts)
    with pytest.raises(ModelError, match="the prompts have not been encoded"):
        model.compute_loss(make_batch())
    assert model.initialise_from_data([]) == {"prompts_encoded": 2}
    tokens = model.prompts.tokens.clone()
    assert tokens.shape == (3, 8, 16)
    assert not torch.allclose(tokens[0], tokens[1]) and not torch.allclose(tokens[0], tokens[2])
    train(model, 2)
    assert torch.equal(model.prompts.tokens, tokens)
    model.save_pretrained(tmp_path / "saved")
    loaded = CircuitDiffusion.from_pretrained(tmp_path / "saved")
    assert loaded.config.text_encoder_path is None
    assert float(loss_of(loaded, make_batch()).sum) == float(loss_of(model.eval(), make_batch()).sum)


def test_the_layer_of_the_text_encoder_is_the_one_asked_for(tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = write_clip(tmp_path / "clip", width=16)
    found = {}
    for layer in ("last", "penultimate"):
        encoder = {"width": 16, "num_tokens": 8, "layer": layer}
        model = make_model(text_encoder=encoder, text_encoder_path=str(folder))
        model.initialise_from_data([])
        assert isinstance(model.prompts, EncodedPrompts)
        found[layer] = model.prompts.tokens[:2]
    tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(["all h", "all cx"], padding="max_length", max_length=8, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = CLIPTextModel.from_pretrained(folder)(ids).last_hidden_state
    torch.testing.assert_close(found["last"], wanted)
    assert not torch.allclose(found["penultimate"], wanted, atol=1e-3)


@pytest.mark.parametrize(
    ("encoder", "path", "message"),
    [
        ({"width": 16}, None, "text_encoder_path names no weights"),
        ({"width": 16}, "nowhere", "does not exist; it must name weights on this machine"),
        ({"width": 16, "library": "open_clip"}, ".", "install open_clip_torch"),
        ({"width": 16}, ".", "is no folder of a CLIP text model"),
    ],
)
def test_a_text_encoder_that_cannot_be_had_is_an_error(
    encoder: dict, path: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    given = None if path is None else str(tmp_path / path)
    model = make_model(text_encoder=encoder, text_encoder_path=given)
    with pytest.raises(ModelError, match=message):
        model.initialise_from_data([])


def test_a_prompt_that_the_text_encoder_would_cut_off_is_refused(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip", width=16)
    model = make_model(text_encoder={"width": 16, "num_tokens": 4}, text_encoder_path=str(folder))
    with pytest.raises(ModelError, match="has more than text_encoder.num_tokens 4 tokens"):
        model.initialise_from_data([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 3}, "vocab_size is 3, but a gate pool of 2 needs 4"),
        ({"prompts": ()}, "prompts is empty"),
        ({"prompts": ("a", "a")}, "prompts has a text twice"),
        ({"guidance_train_p": 1.0}, "guidance_train_p is 1.0"),
        ({"loss": "CrossEntropyLoss"}, "loss is 'CrossEntropyLoss'; allowed: MSELoss"),
        (
            {"embedding_dim": 6, "unet_args": {"clr_dim": 8}},
            "embedding_dim is 6, but unet_args has clr_dim 8",
        ),
        ({"text_encoder": {"width": 8}}, "text_encoder.width is 8, but unet_args has cond_emb_size 16"),
        ({"text_encoder": {"wide": 8}}, "text_encoder has the keys library, width"),
        ({"text_encoder_path": "clip"}, "text_encoder_path is set, but text_encoder is not"),
        ({"unet_class": "os.system"}, "unet_class is 'os.system'; it must be a class of models.circuit_unet"),
        ({"unet_class": "models.circuit_unet.Tensor"}, "has no such class of networks"),
        ({"unet_class": COMPILES}, "but the data has none; use data with unitaries"),
        ({"unet_args": {"depth": 3}}, "unet_args do not fit models.circuit_unet.CircuitUNet"),
        ({"unet_args": {"model_features": [10]}}, "model_features is .10.; each level needs"),
        ({"unet_args": {"model_features": [12], "num_heads": 8}}, "12 is not divisible by num_heads 8"),
        (
            {"unet_args": {"num_heads": [1, 2]}},
            "num_heads is .1, 2.; it must be one number for each of the 3 levels",
        ),
        ({"scheduler": {"type": "Euler"}}, "scheduler: type is 'Euler'"),
    ],
)
def test_wrong_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_model(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["all x"]}, "prompt 'all x' is unknown; the model was trained on 'all h', 'all cx'"),
        ({"prompts": [2]}, "prompt 2 is unknown"),
        ({"seeds": [1, 2]}, "1 prompts were given and 2 seeds"),
        ({"num_qubits": 4}, "num_qubits is 4; the model was trained on circuits of up to 3"),
        ({"length": 5}, "pad to a multiple of 2"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"unitary": torch.zeros(1, 2, 8, 8)}, "a unitary was given"),
    ],
)
def test_what_cannot_be_sampled_is_named(changes: dict, message: str) -> None:
    arguments: dict[str, Any] = {"prompts": ["all h"], "num_qubits": 3, "length": 8, "seeds": [1]}
    with pytest.raises(ModelError, match=message):
        make_model().sample(**{**arguments, **changes})


def test_guidance_that_was_not_trained_is_refused() -> None:
    model = make_model(enable_guidance_train=False)
    with pytest.raises(
        ModelError, match="guidance_scale is 2.0, but the model was trained with every prompt"
    ):
        model.sample(["all h"], 3, 8, seeds=[1], guidance_scale=2.0)


def test_unitaries_that_do_not_fit_are_refused() -> None:
    model, batch = compiler(), make_batch()
    with pytest.raises(ModelError, match="no unitary was given"):
        model.compute_loss({key: value for key, value in batch.items() if key != "unitary"})
    with pytest.raises(ModelError, match=r"shape \[8, 2, 4, 4\]; 8 circuits of 3 qubits have \[8, 2, 8, 8\]"):
        model.compute_loss({**batch, "unitary": torch.zeros(8, 2, 4, 4)})
    with pytest.raises(ModelError, match="circuits of 4 qubits, but num_qubits is 3"):
        model.compute_loss({**batch, "tokens": torch.zeros(8, 4, 8, dtype=torch.int64)})


@pytest.mark.slow
def test_a_model_in_shards_trains_as_a_whole_one_does(tmp_path: Path) -> None:
    losses = {}
    for strategy in ("ddp", "zero3"):
        output = tmp_path / strategy / "out"
        settings = {
            "training": "quick_test_srv",
            "training.general.dataset": ROOT / "data/samples/circuits/srv_3q",
            "training.general.output_path": output,
            "training.training.num_epochs": 1,
            "training.model.params.model_features": "[16, 16, 32]",
            "training.model.params.num_heads": "[2, 2, 2]",
            "training.training.batch_size": 32,
            "training.training.max_samples": 128,
        }
        launch_ranks(
            2,
            [
                ROOT / "trainer/train.py",
                *("--config", ROOT / "configs/circuits/config.yaml"),
                *(f"{key}={value}" for key, value in settings.items()),
            ],
            env=strategy_environment(tmp_path / strategy, strategy, 2),
        )
        (folder,) = (output / "runs").glob("*")
        losses[strategy] = [record["loss"] for record in records(folder)]
    assert len(losses["ddp"]) > 1
    assert losses["zero3"] == pytest.approx(losses["ddp"], rel=1e-5)
