"""The masked autoencoder: what each half sees, what it predicts, and what it costs."""

import copy
from typing import Any

import fake_te
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cell_batches import N_BINS, VOCAB, make_autoencoder, make_batch, packed, pad_longer
from test_plan import bytes_saved
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.errors import ModelError


def packed_with_masks(batch: dict[str, Any]) -> dict[str, Any]:
    mask = batch["attention_mask"]
    flat = {k: batch[k][mask].unsqueeze(0) for k in ("labels", "value_labels")}
    is_masked = torch.zeros(mask.numel(), dtype=torch.bool)
    is_masked[batch["masked_index"]] = True
    index = is_masked[mask.flatten()].nonzero().squeeze(1)
    return {**packed(batch), **flat, "masked_index": index}


def test_the_encoder_reads_visible_tokens_alone_and_runs_once():
    model, batch = make_autoencoder(), make_batch(padded=True)
    seen = []
    model.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    output = model(batch)
    assert seen == [(1, 25 - 9, 16)] and output.hidden.shape == (1, 16, 16)
    assert output.value_logits.shape == (9, N_BINS)


def test_hidden_states_are_those_of_a_batch_without_the_masked_tokens():
    model, batch = make_autoencoder().eval(), make_batch()
    keep = [0, 4, 5, 6, 7, 8]
    alone = {k: batch[k][:, keep] for k in ("tokens", "bins", "attention_mask")} | {"depth": batch["depth"]}
    hidden = model(batch).hidden.view(3, 6, 16)
    torch.testing.assert_close(model.encode(batch), model.encode(alone))
    torch.testing.assert_close(hidden[:, 0], model.encode(alone))


@pytest.mark.parametrize("target", ["expression", "gene"])
@pytest.mark.parametrize("n_bins", [N_BINS, None])
def test_what_is_hidden_has_no_influence(target, n_bins):
    model = make_autoencoder(n_bins=n_bins).eval()
    batch = make_batch(target=target, binned=n_bins is not None)
    changed, index = copy.deepcopy(batch), batch["masked_index"]
    changed["value_labels"].view(-1)[index] = 1
    changed["values"].view(-1)[index] = 50.0
    if n_bins:
        changed["bins"].view(-1)[index] = 2
    before, after = model(batch), model(changed)
    assert torch.equal(before.hidden, after.hidden) and torch.equal(before.value_logits, after.value_logits)


@pytest.mark.parametrize("target", ["expression", "gene"])
def test_the_decoder_is_told_which_gene_is_masked(target):
    model, batch = make_autoencoder(), make_batch(target=target)
    model.value_head.bias.data.zero_()
    key = "tokens" if target == "expression" else "labels"
    changed = {**batch, key: batch[key].clone()}
    place = batch["masked_index"][4]
    changed[key].view(-1)[place] = (set(range(4, VOCAB)) - set(batch[key][1].tolist())).pop()
    before, after = model.eval()(batch), model(changed)
    assert torch.equal(before.hidden, after.hidden)
    assert not torch.allclose(before.value_logits[4], after.value_logits[4])
    assert torch.equal(before.value_logits[6:], after.value_logits[6:])  # of another cell


def test_predictions_stand_in_the_order_of_the_masked_positions():
    model, batch = make_autoencoder().eval(), make_batch()
    order = torch.tensor([8, 0, 5, 3, 1, 2, 7, 6, 4])
    other = {**batch, "masked_index": batch["masked_index"][order]}
    torch.testing.assert_close(model(other).value_logits, model(batch).value_logits[order])


def test_a_masked_gene_has_no_position_that_would_tell_its_rank():
    model, batch = make_autoencoder(position_embedding="learned", max_seq_len=9).eval(), make_batch()
    moved = copy.deepcopy(batch)
    order = torch.tensor([0, 4, 5, 1, 6, 7, 2, 8, 3])  # the visible genes stay in their order
    for key in ("tokens", "bins", "values", "labels", "value_labels"):
        moved[key] = batch[key][:, order]
    moved["masked_index"] = (moved["value_labels"] != -100).flatten().nonzero().flatten()
    torch.testing.assert_close(model(moved).value_logits, model(batch).value_logits)
    swapped = copy.deepcopy(batch)
    for key in ("tokens", "bins", "values"):
        swapped[key] = batch[key][:, [0, 1, 2, 3, 5, 4, 6, 7, 8]]
    assert not torch.allclose(model(swapped).value_logits, model(batch).value_logits)


def test_the_loss_is_over_masked_positions_alone():
    model, batch = make_autoencoder(), make_batch(padded=True)
    truth = batch["value_labels"].flatten()[batch["masked_index"]]
    loss = model.compute_loss(batch)
    torch.testing.assert_close(loss.sum, F.cross_entropy(model(batch).value_logits, truth, reduction="sum"))
    assert loss.weight == 9 == model.loss_weight(batch)
    model, batch = make_autoencoder(n_bins=None), make_batch(binned=False)
    truth = batch["value_labels"].flatten()[batch["masked_index"]]
    torch.testing.assert_close(
        model.compute_loss(batch).sum, (model(batch).value_logits - truth).square().sum()
    )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_and_packing_change_nothing(pooling):
    model = make_autoencoder(pooling=pooling).eval()
    batch = make_batch(padded=True)
    for other in (pad_longer(batch, 4), packed_with_masks(batch)):
        torch.testing.assert_close(model(other).value_logits, model(batch).value_logits)
        torch.testing.assert_close(model.encode(other), model.encode(batch))
        torch.testing.assert_close(model.compute_loss(other).sum, model.compute_loss(batch).sum)


def test_a_cell_of_which_nothing_is_visible_is_predicted_from_the_genes_names():
    model = make_autoencoder(pooling="mean", use_depth=False).eval()
    batch = make_batch(num_tokens=4)
    alone = {k: batch[k][:, 1:] for k in ("tokens", "bins", "values", "attention_mask", "labels")}
    alone["value_labels"] = batch["value_labels"][:, 1:]
    some = {**alone, "masked_index": torch.tensor([0, 1, 2, 4]), "batch_idx": batch["batch_idx"]}
    some["num_tokens"] = 9
    output = model(some)
    assert output.value_logits.isfinite().all() and output.hidden.shape == (1, 5, 16)
    embedding = model.encode(some)
    assert not embedding[0].any() and embedding[1].any()


def test_technical_batches_change_predictions_and_not_embeddings():
    model, batch = make_autoencoder().eval(), make_batch()
    moved = batch | {"batch_idx": 1 - batch["batch_idx"]}
    assert torch.equal(model.encode(batch), model.encode(moved))
    assert not torch.allclose(model(batch).value_logits, model(moved).value_logits)


def test_the_decoder_is_half_as_wide_unless_told():
    assert make_autoencoder().decoder.layers[0].mlp.linear2.weight.shape == (8, 32)
    assert make_autoencoder(decoder_dim=12, decoder_heads=3).value_head.output.weight.shape == (N_BINS, 12)


def test_wrong_sizes_of_the_decoder_are_named():
    with pytest.raises(ModelError, match="decoder_dim 10 is not divisible by decoder_heads 4"):
        make_autoencoder(decoder_dim=10)
    with pytest.raises(ModelError, match="decoder_dim is 24; FP8 layers need a multiple of 16"):
        make_autoencoder(hidden_dim=32, decoder_dim=24, num_heads=2, layer_backend="emulate")


def test_layers_of_the_decoder_are_excluded_from_fp8_by_name():
    sizes = {"hidden_dim": 32, "num_heads": 2, "n_technical_batches": 0, "layer_backend": "emulate"}
    model = make_autoencoder(**sizes, exclude_layers=("decoder.layers.0.*",))
    kinds = [
        type(model.get_submodule(f"{name}.mlp.linear2").linear_function).__name__
        for name in ("transformer.layers.0", "decoder.layers.0", "decoder.layers.1")
    ]
    assert kinds == ["EmulatedLinear", "builtin_function_or_method", "EmulatedLinear"]
    with pytest.raises(ModelError, match="'encoder.*' fits no layer"):
        make_autoencoder(**sizes, exclude_layers=("encoder.*",))


def test_data_without_masking_is_refused_and_can_be_encoded():
    model, batch = make_autoencoder(), make_batch(masked=0)
    del batch["masked_index"]
    with pytest.raises(ModelError, match="no 'masked_index'.*configure masking"):
        model.compute_loss(batch)
    assert model.encode(batch).shape == (3, 16)


def test_recomputing_blocks_leaves_gradients_as_they_are():
    gradients = []
    for checkpointing in (False, True):
        model = make_autoencoder(activation_checkpointing=checkpointing)
        model.compute_loss(make_batch(padded=True)).sum.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_layers_of_transformer_engine_compute_as_torchs(monkeypatch):
    fake_te.install(monkeypatch)
    sizes = {"hidden_dim": 64, "num_heads": 2}
    plain, other = make_autoencoder(**sizes), make_autoencoder(**sizes, layer_backend="te")
    other.load_state_dict(plain.state_dict())
    batch = make_batch(padded=True)
    torch.testing.assert_close(other(batch).value_logits, plain(batch).value_logits, rtol=1e-4, atol=1e-4)
    assert len([entry for entry in fake_te.LOG if entry[0] == "region"]) == 1
    fake_te.uninstall()


def test_the_value_prior_and_gene_vectors_start_from_the_data(tmp_path):
    path = tmp_path / "vectors.npy"
    np.save(path, np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32))
    path.with_suffix(".txt").write_text("g1\ng4\n")
    model = make_autoencoder(gene_embedding_path=str(path))
    batches = [make_batch(masked=0, seed=seed) for seed in range(3)]
    before = model.token_embedding.weight.detach().clone()
    account = model.initialise_from_data(batches, [f"g{index}" for index in range(VOCAB - 4)])
    assert account["gene_vectors_found"] == 2 and account["prior_values"] == 3 * 3 * 8
    changed = (model.token_embedding.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [5, 8] and model.value_head.prior[4:].any()


def test_it_learns_what_it_is_shown():
    model = make_autoencoder(n_technical_batches=0)
    batch = make_batch(padded=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model.compute_loss(batch)
        optimizer.zero_grad()
        loss.sum.backward()
        optimizer.step()
        losses.append(loss.sum.item())
    assert losses[-1] < 0.1 * losses[0]


VARIANTS = [{}, {"n_bins": None, "use_depth": False}, {"activation": "swiglu", "decoder_layers": 3}]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_operations_are_those_that_torch_counts(changes):
    model = make_autoencoder(hidden_dim=32, n_technical_batches=0, **changes)
    batch = make_batch(4, 25, masked=6, binned=model.config.n_bins is not None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.compute_loss(batch).sum.backward()
    assert model.training_flops([25] * 4, 24) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_activations_are_what_autograd_keeps(changes, dtype):
    model = make_autoencoder(hidden_dim=32, n_technical_batches=0, **changes)
    batch = make_batch(8, 30, masked=6, binned=model.config.n_bins is not None)
    planned = model.activation_bytes(num_tokens=240, num_cells=8, num_masked=48, is_mixed=dtype is not None)
    forward = planned.body + planned.heads + planned.logits / 3
    assert forward == pytest.approx(bytes_saved(model, batch, dtype), rel=0.1)
