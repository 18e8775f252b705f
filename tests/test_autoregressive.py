"""The autoregressive model: what it sees and predicts, what it costs, and the cells that it draws."""

import fake_te
import pytest
import torch
import torch.nn.functional as F
from cell_batches import N_BINS, NUM_GENES, VOCAB, cells, make_autoregressive, make_batch, packed
from test_plan import bytes_saved
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.attention import AttentionSpans, attend_one_by_one, attend_padded
from models.errors import ModelError
from models.layers import SelfAttention

# Causal attention


@pytest.mark.parametrize("is_padded", [False, True])
def test_causal_attention_equals_an_explicit_mask(is_padded):
    torch.manual_seed(0)
    layer = SelfAttention(16, 4, is_causal=True)
    x, mask = torch.randn(3, 7, 16), torch.ones(3, 7, dtype=torch.bool)
    if is_padded:
        mask[0, 5:], mask[2, 1:] = False, False
    found = layer(x, mask if is_padded else None)
    q, k, v = layer.qkv(x).view(3, 7, 3, 4, 4).permute(2, 0, 3, 1, 4)
    explicit = torch.ones(7, 7).tril().bool() & mask[:, None, None, :]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=explicit)
    expected = layer.out_proj(expected.transpose(1, 2).reshape(3, 7, 16))
    torch.testing.assert_close(found[mask], expected[mask])


@pytest.mark.parametrize("attend", [attend_one_by_one, attend_padded])
def test_packed_cells_attend_causally_each_within_itself(attend):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 12, 2, 8)
    spans = AttentionSpans(torch.tensor([0, 5, 6, 12], dtype=torch.int32), 6, 12)
    cell = torch.tensor([0] * 5 + [1] + [2] * 6)
    mask = (cell[:, None] == cell) & torch.ones(12, 12).tril().bool()
    by_head = [each.transpose(0, 1) for each in (q, k, v)]
    expected = F.scaled_dot_product_attention(*by_head, attn_mask=mask).transpose(0, 1)
    torch.testing.assert_close(attend(q, k, v, spans, is_causal=True), expected)


def test_transformer_engine_attends_causally_too(monkeypatch):
    fake_te.install(monkeypatch)
    sizes = {"hidden_dim": 32, "num_heads": 2}
    plain, other = make_autoregressive(**sizes), make_autoregressive(**sizes, layer_backend="te")
    other.load_state_dict(plain.state_dict())
    batch = cells(padded=True)
    fake_te.LOG.clear()
    found, expected = other(batch), plain(batch)
    assert {entry[1] for entry in fake_te.LOG if entry[0] == "attention"} == {"causal"}
    torch.testing.assert_close(found.gene_logits, expected.gene_logits, rtol=1e-4, atol=1e-4)
    fake_te.uninstall()


def test_padding_before_a_token_is_refused():
    batch = cells(padded=True)
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(ModelError, match="padding before a token"):
        make_autoregressive().loss_weight(batch)


# What is predicted, and from what


def test_each_token_but_the_first_of_its_cell_is_predicted():
    model, batch = make_autoregressive(), cells(padded=True)
    output = model(batch)
    expected = [row * 9 + t for row, length in enumerate((7, 9, 9)) for t in range(1, length)]
    assert output.positions.tolist() == expected
    assert output.gene_logits.shape == (22, VOCAB) and output.value_logits.shape == (22, N_BINS)
    assert model.loss_weight(batch) == 22 == int(model.compute_loss(batch).weight)


def test_the_loss_is_that_of_the_next_gene_and_of_its_bin():
    model, batch = make_autoregressive(gene_loss_weight=2.0, expression_loss_weight=0.5), cells(padded=True)
    output, loss = model(batch), model.compute_loss(batch)
    genes, bins = (batch[key].flatten()[output.positions] for key in ("tokens", "bins"))
    gene = F.cross_entropy(output.gene_logits, genes, reduction="sum")
    value = F.cross_entropy(output.value_logits, bins, reduction="sum")
    torch.testing.assert_close(loss.sum, 2 * gene + 0.5 * value)
    torch.testing.assert_close(loss.metrics["gene_loss"], gene)
    torch.testing.assert_close(loss.metrics["expression_loss"], value)


def test_continuous_expression_is_predicted_by_its_squared_error():
    model, batch = make_autoregressive(n_bins=None, gene_loss_weight=0.0), cells(binned=False)
    output = model(batch)
    truth = batch["values"].flatten()[output.positions]
    torch.testing.assert_close(model.compute_loss(batch).sum, (output.value_logits - truth).square().sum())


@pytest.mark.parametrize("n_bins", [N_BINS, None])
def test_no_later_token_changes_a_prediction_by_anything(n_bins):
    model, batch = make_autoregressive(n_bins=n_bins).eval(), cells(binned=n_bins is not None)
    for t in range(1, 9):
        changed = {**batch, "tokens": batch["tokens"].clone(), "values": batch["values"].clone()}
        changed["tokens"][:, t:] = 4 + (batch["tokens"][:, t:] - 4 + 7) % NUM_GENES
        changed["values"][:, t:] += 3
        if n_bins:
            changed["bins"] = torch.cat([batch["bins"][:, :t], (batch["bins"][:, t:] + 1) % N_BINS], dim=1)
        before, after = model(batch), model(changed)
        assert torch.equal(before.hidden[:, :t], after.hidden[:, :t])
        assert not torch.equal(before.hidden[:, t], after.hidden[:, t])
        of_gene = before.positions % 9 <= t  # the gene at t is predicted from what is before it
        assert torch.equal(before.gene_logits[of_gene], after.gene_logits[of_gene])
        of_value = before.positions % 9 < t  # its expression is, too, but told which gene it is
        assert torch.equal(before.value_logits[of_value], after.value_logits[of_value])


def test_the_expression_of_the_next_gene_is_predicted_without_looking_at_it():
    model, batch = make_autoregressive().eval(), cells()
    other = {**batch, "bins": batch["bins"].clone()}
    other["bins"][:, 4] = (other["bins"][:, 4] + 2) % N_BINS
    before, after = model(batch), model(other)
    asked = before.positions % 9 <= 4
    assert torch.equal(before.value_logits[asked], after.value_logits[asked])
    assert not torch.equal(before.value_logits[~asked], after.value_logits[~asked])


def test_expression_is_a_target_alone_where_the_model_does_not_read_it():
    model, batch = make_autoregressive(use_expression_values=False).eval(), cells()
    other = {**batch, "bins": (batch["bins"] + 1) % N_BINS, "values": batch["values"] + 1}
    assert torch.equal(model(batch).hidden, model(other).hidden)
    assert model.compute_loss(batch).sum != model.compute_loss(other).sum


def test_packed_cells_have_the_loss_and_embeddings_of_padded_ones():
    for pooling in ("mean", "cls"):
        model = make_autoregressive(pooling=pooling, position_embedding="learned", max_seq_len=9).eval()
        batch = cells(padded=True)
        one, two = model.compute_loss(batch), model.compute_loss(packed(batch))
        torch.testing.assert_close(one.sum, two.sum)
        assert model.loss_weight(batch) == model.loss_weight(packed(batch)) == int(two.weight)
        torch.testing.assert_close(model.encode(batch), model.encode(packed(batch)))


def test_a_list_of_fixed_length_for_gpus_has_the_loss_of_the_exact_one(monkeypatch):
    model, batch = make_autoregressive(), cells(padded=True)
    exact, exact_positions = model.compute_loss(batch), model(batch).positions

    def fixed(is_wanted, at_most):
        index = torch.nonzero_static(is_wanted.flatten(), size=at_most, fill_value=-1).squeeze(1)
        return index.clamp(min=0), index >= 0

    monkeypatch.setattr("models.autoregressive.places_of", fixed)
    found = model.compute_loss(batch)
    assert len(exact_positions) == 22 and len(model(batch).positions) == 25
    torch.testing.assert_close(found, exact)


def test_masked_cells_are_refused():
    with pytest.raises(ModelError, match="without masking"):
        make_autoregressive().loss_weight(make_batch())


# Embeddings


def test_cls_pooling_is_the_last_token_and_mean_pooling_that_of_genes():
    batch = cells(padded=True)
    by_last, by_mean = make_autoregressive(pooling="cls").eval(), make_autoregressive(pooling="mean").eval()
    hidden = by_last(batch).hidden
    assert torch.equal(by_last.encode(batch), torch.stack([hidden[0, 6], hidden[1, 8], hidden[2, 8]]))
    torch.testing.assert_close(by_mean.encode(batch)[0], by_mean(batch).hidden[0, 1:7].mean(dim=0))


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_gene_of_a_cell_changes_its_embedding(pooling):
    model, batch = make_autoregressive(pooling=pooling).eval(), cells()
    before = model.encode(batch)
    for t in range(1, 9):
        other = {**batch, "bins": batch["bins"].clone()}
        other["bins"][:, t] = (other["bins"][:, t] + 1) % N_BINS
        assert ((model.encode(other) - before).abs().max(dim=1).values > 0).all()


# Training


def test_recomputing_blocks_leaves_gradients_as_they_are():
    gradients = []
    for checkpointing in (False, True):
        model = make_autoregressive(activation_checkpointing=checkpointing)
        model.compute_loss(cells(padded=True)).sum.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_emulated_fp8_trains_near_fp32():
    sizes = {"hidden_dim": 32, "num_heads": 2}
    plain, other = make_autoregressive(**sizes), make_autoregressive(**sizes, layer_backend="emulate")
    other.load_state_dict(plain.state_dict())
    one, two = (model.compute_loss(cells()).sum for model in (plain, other))
    assert one != two
    torch.testing.assert_close(one, two, rtol=0.05, atol=0)


def test_the_value_prior_starts_from_the_data():
    model = make_autoregressive()
    account = model.initialise_from_data([cells(seed=seed) for seed in range(3)])
    assert account["prior_values"] == 3 * 3 * 8 and model.value_head.prior[4:].any()


# Costs

VARIANTS = [
    {},
    {"n_bins": None, "use_depth": True},
    {"gene_loss_weight": 0.0, "activation": "swiglu"},
    {"expression_loss_weight": 0.0, "use_expression_values": False, "tie_gene_head": False},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_operations_are_those_that_torch_counts(changes):
    model = make_autoregressive(hidden_dim=32, n_technical_batches=0, **changes)
    batch = cells(25, num_cells=4, binned=model.config.n_bins is not None)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.compute_loss(batch).sum.backward()
    assert model.training_flops([25] * 4, 0) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_activations_are_what_autograd_keeps(changes, dtype):
    model = make_autoregressive(hidden_dim=32, n_technical_batches=0, **changes)
    batch = cells(30, num_cells=8, binned=model.config.n_bins is not None)
    planned = model.activation_bytes(num_tokens=240, num_cells=8, num_masked=0, is_mixed=dtype is not None)
    forward = planned.body + planned.heads + planned.logits / 3
    assert forward == pytest.approx(bytes_saved(model, batch, dtype), rel=0.08)


# Generation

PROMPT = torch.tensor([[3, 5, 0], [3, 6, 7], [3, 0, 0]])


def generated(model, prompt=PROMPT, num_genes=6, **options):
    return model.generate(prompt, num_genes, batch_idx=torch.zeros(len(prompt), dtype=torch.long), **options)


def test_drawn_genes_are_new_ones_and_no_special_tokens():
    model = make_autoregressive()
    found = generated(model, num_genes=28)
    for row, genes in enumerate(found.genes.tolist()):
        together = [token for token in PROMPT[row].tolist() if token > 3] + genes
        assert len(set(together)) == len(together) and min(genes) >= 4 and max(genes) < VOCAB
    assert found.expression.shape == (3, 28) and int(found.expression.max()) < N_BINS
    assert model.training  # as before


def test_a_seed_draws_the_same_cells_and_another_one_others():
    model = make_autoregressive()
    one, same, other = (generated(model, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.genes, same.genes) and torch.equal(one.expression, same.expression)
    assert not torch.equal(one.genes, other.genes)


def test_temperature_0_takes_the_likeliest_gene_and_bin_of_what_is_left():
    model = make_autoregressive().eval()
    found = generated(model, PROMPT[1:2], 3, temperature=0.0, prompt_expression=torch.tensor([[0, 1, 2]]))
    tokens = torch.cat([PROMPT[1:2], found.genes], dim=1)
    bins = torch.cat([torch.tensor([[0, 1, 2]]), found.expression], dim=1)
    batch = {"tokens": tokens, "bins": bins, "attention_mask": torch.ones_like(tokens, dtype=torch.bool)}
    output = model({**batch, "batch_idx": torch.zeros(1, dtype=torch.long)})
    for t in (3, 4, 5):
        logits = output.gene_logits[t - 1].clone()
        logits[[0, 1, 2, 3, *tokens[0, :t].tolist()]] = -torch.inf
        assert logits.argmax() == tokens[0, t] and output.value_logits[t - 1].argmax() == bins[0, t]


def test_top_k_leaves_the_likeliest_genes_alone_to_be_drawn():
    model, expression = make_autoregressive(), torch.tensor([[0, 1, 2]])

    def first(**options):
        return int(generated(model, PROMPT[1:2], 1, prompt_expression=expression, **options).genes)

    assert {first(top_k=1, seed=seed) for seed in range(9)} == {first(temperature=0.0)}
    assert len({first(seed=seed) for seed in range(9)}) > 2
    assert len({first(top_k=2, seed=seed) for seed in range(9)}) == 2


def test_cells_are_drawn_in_a_batch_as_alone():
    model = make_autoregressive().eval()
    together = generated(model, temperature=0.0)
    for row, length in enumerate((2, 3, 1)):
        alone = generated(model, PROMPT[row : row + 1, :length], temperature=0.0)
        assert torch.equal(alone.genes[0], together.genes[row])
        assert torch.equal(alone.expression[0], together.expression[row])


def test_a_trained_model_draws_the_cells_that_it_saw():
    model = make_autoregressive(n_technical_batches=0)
    tokens = torch.tensor([[3, 10, 20, 30, 12], [3, 11, 21, 31, 13]])
    bins = torch.tensor([[0, 4, 3, 2, 1], [0, 1, 2, 3, 4]])
    batch = {"tokens": tokens, "bins": bins, "attention_mask": torch.ones_like(tokens, dtype=torch.bool)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = model.compute_loss(batch)
        optimizer.zero_grad()
        (loss.sum / 8).backward()
        optimizer.step()
    found = model.generate(tokens[:, :2], 3, temperature=0.0)
    assert torch.equal(found.genes, tokens[:, 2:]) and torch.equal(found.expression, bins[:, 2:])


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"gene_loss_weight": 0.0}, {}, "without a gene head"),
        ({"expression_loss_weight": 0.0}, {}, "no value head to give genes theirs"),
        ({}, {"prompt": torch.tensor([[0, 3]])}, "beginning with a cls token or a gene"),
        ({}, {"prompt": torch.zeros(0, 3, dtype=torch.long)}, r"of shape \[0, 3\]"),
        ({}, {"prompt": torch.tensor([[3, 0, 5]])}, "padding at the end of rows"),
        ({}, {"prompt": torch.tensor([[3, -5]])}, "at least 0 and below vocab_size 34"),
        ({}, {"prompt": torch.tensor([[5, 6]])}, "give prompt_expression"),
        ({}, {"num_genes": 29}, "only 28 genes are not in the longest prompt"),
        ({"max_seq_len": 8}, {}, "make 9 tokens; max_seq_len is 8"),
        ({}, {"top_k": 0}, "top_k 0 at least 1"),
        ({"use_depth": True}, {}, "no 'depth'"),
    ],
)
def test_a_prompt_that_cannot_be_continued_says_why(options, arguments, message):
    with pytest.raises(ModelError, match=message):
        generated(make_autoregressive(**options), **arguments)


def test_genes_are_drawn_without_expression_where_the_model_has_none():
    found = generated(make_autoregressive(expression_loss_weight=0.0, use_expression_values=False))
    assert found.expression is None and found.genes.shape == (3, 6)
