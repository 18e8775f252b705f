import copy
import struct
from typing import Any

import numpy as np
import pytest
import torch
from cell_batches import N_BINS, NUM_GENES, VOCAB, make_batch, make_encoder, pad_longer
from safetensors.torch import save_file

from models.cell_layout import cell_layout
from models.encoder import EncoderConfig
from models.errors import ModelError
from models.gene_embeddings import fit_to_width, load_gene_embeddings


def permute(batch: dict[str, Any], order: torch.Tensor) -> dict[str, Any]:
    permuted = dict(batch)
    for name in ("tokens", "bins", "values", "attention_mask", "labels", "value_labels"):
        permuted[name] = batch[name][:, order]
    permuted["masked_index"] = (permuted["value_labels"] != -100).flatten().nonzero().flatten()
    return permuted


def test_output_has_hidden_states_of_all_tokens_and_logits_of_masked_ones():
    output = make_encoder()(make_batch(target="gene"))
    assert output.hidden.shape == (3, 9, 16)
    assert output.gene_logits.shape == (9, VOCAB)
    assert output.value_logits.shape == (9, N_BINS)


def test_continuous_model_predicts_one_number_a_position():
    model = make_encoder(n_bins=None)
    batch = make_batch(binned=False)
    output = model(batch)
    assert output.value_logits.shape == (9,)
    truth = batch["value_labels"].flatten()[batch["masked_index"]]
    loss = model.compute_loss(batch)
    torch.testing.assert_close(loss.metrics["expression_loss"], (output.value_logits - truth).square().sum())


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_a_batch_longer_changes_nothing(pooling):
    model = make_encoder(pooling=pooling).eval()
    batch = make_batch()
    longer = pad_longer(batch, 4)
    torch.testing.assert_close(model(batch).value_logits, model(longer).value_logits)
    torch.testing.assert_close(model.encode(batch), model.encode(longer))
    torch.testing.assert_close(model.compute_loss(batch).sum, model.compute_loss(longer).sum)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_order_of_genes_does_not_matter_without_positions(pooling):
    model = make_encoder(pooling=pooling).eval()
    batch = make_batch()
    order = torch.tensor([0, 5, 1, 8, 3, 2, 4, 7, 6])
    permuted = permute(batch, order)
    torch.testing.assert_close(model(batch).hidden[:, order], model(permuted).hidden)
    torch.testing.assert_close(model.encode(batch), model.encode(permuted))
    torch.testing.assert_close(model.compute_loss(batch).sum, model.compute_loss(permuted).sum)


def test_order_of_genes_matters_with_learned_positions():
    model = make_encoder(position_embedding="learned", max_seq_len=9).eval()
    batch = make_batch()
    order = torch.tensor([0, 5, 1, 8, 3, 2, 4, 7, 6])
    assert not torch.allclose(model(batch).hidden[:, order], model(permute(batch, order)).hidden)


def test_logits_of_masked_positions_equal_those_of_all_positions_gathered():
    model = make_encoder().eval()
    batch = make_batch(target="gene")
    hidden = model(batch).hidden.flatten(end_dim=1)
    every = torch.arange(len(hidden))
    rows = every // 9
    offset = model.technical_batch_embedding(batch["batch_idx"])
    cells = model.encode(batch) + offset
    asked = hidden + offset[rows]
    full = model.gene_head(asked, cells, rows, model.token_embedding.weight)
    torch.testing.assert_close(model(batch).gene_logits, full[batch["masked_index"]])


@pytest.mark.parametrize("target", ["expression", "gene"])
@pytest.mark.parametrize("binned", [True, False])
def test_labels_have_no_influence_on_hidden_states(target, binned):
    model = make_encoder(n_bins=N_BINS if binned else None).eval()
    batch = make_batch(target=target, binned=binned)
    changed = copy.deepcopy(batch)
    index = batch["masked_index"]
    changed["value_labels"].view(-1)[index] = 1
    changed["values"].view(-1)[index] = 50.0
    if target == "gene":
        changed["labels"].view(-1)[index] = 4
    assert torch.equal(model(batch).hidden, model(changed).hidden)
    assert torch.equal(model.encode(batch), model.encode(changed))
    if target == "gene":
        assert torch.equal(model(batch).gene_logits, model(changed).gene_logits)
    else:
        assert torch.equal(model(batch).value_logits, model(changed).value_logits)


def test_visible_expression_has_an_influence():
    model = make_encoder().eval()
    batch = make_batch()
    changed = copy.deepcopy(batch)
    changed["bins"][:, -1] = (changed["bins"][:, -1] + 1) % N_BINS
    assert not torch.allclose(model(batch).value_logits, model(changed).value_logits)


def test_value_head_answers_for_the_gene_that_the_label_names():
    model = make_encoder().eval()
    batch = make_batch(target="gene")
    other = copy.deepcopy(batch)
    other["labels"].view(-1)[batch["masked_index"]] = 4
    assert not torch.allclose(model(batch).value_logits, model(other).value_logits)


@pytest.mark.parametrize("target", ["expression", "gene"])
@pytest.mark.parametrize("binned", [True, False])
def test_every_parameter_gets_a_gradient(target, binned):
    model = make_encoder(
        n_bins=N_BINS if binned else None, position_embedding="learned", max_seq_len=9, tie_gene_head=False
    )
    model.compute_loss(make_batch(target=target, binned=binned)).sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # Without gene labels the gene head has nothing to learn from, yet takes part for DDP's sake.
        if target == "gene" or not name.startswith("gene_head"):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("binned", [True, False])
def test_batch_without_masked_positions_gives_zero_with_a_graph_over_all_parameters(binned):
    model = make_encoder(n_bins=N_BINS if binned else None)
    batch = make_batch(masked=0, binned=binned)
    loss = model.compute_loss(batch)
    assert loss.sum.item() == 0 and loss.weight == 0 == model.loss_weight(batch)
    loss.sum.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_weight_is_the_number_of_masked_positions():
    model = make_encoder()
    batch = make_batch()
    assert model.compute_loss(batch).weight == model.loss_weight(batch) == 9


def test_loss_is_the_weighted_sum_of_both_targets():
    model = make_encoder(gene_loss_weight=0.5, expression_loss_weight=2.0)
    loss = model.compute_loss(make_batch(target="gene"))
    expected = 0.5 * loss.metrics["gene_loss"] + 2.0 * loss.metrics["expression_loss"]
    torch.testing.assert_close(loss.sum.detach(), expected)


def test_a_target_with_weight_zero_has_no_head():
    assert make_encoder(gene_loss_weight=0).gene_head is None
    assert make_encoder(expression_loss_weight=0).value_head is None
    batch = make_batch(target="gene")
    del batch["value_labels"]
    assert make_encoder(expression_loss_weight=0).compute_loss(batch).metrics.keys() == {
        "gene_loss",
        "gene_accuracy",
    }


def test_accuracy_counts_correct_positions():
    model = make_encoder().eval()
    batch = make_batch()
    best = model(batch).value_logits.argmax(dim=-1)
    batch["value_labels"].view(-1)[batch["masked_index"]] = best
    assert model.compute_loss(batch).metrics["expression_accuracy"] == 9


def test_activation_checkpointing_leaves_gradients_as_they_are():
    gradients = []
    for checkpointing in (False, True):
        model = make_encoder(activation_checkpointing=checkpointing, dropout=0.2)
        torch.manual_seed(3)
        model.compute_loss(make_batch()).sum.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("options", [{}, {"n_bins": None}, {"layer_backend": "emulate"}])
def test_model_learns_a_small_batch_by_heart(options):
    model = make_encoder(init_std=0.1, **options)
    # One gene a cell: without positions the model cannot know which of several masked genes stood where.
    batch = make_batch(target="gene", masked=1, binned="n_bins" not in options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = model.compute_loss(batch)
        optimizer.zero_grad()
        loss.sum.backward()
        optimizer.step()
        losses.append(loss.sum.item())
    assert losses[-1] < 0.1 * losses[0]


def test_encode_does_not_depend_on_the_technical_batch_but_predictions_do():
    model = make_encoder().eval()
    batch = make_batch()
    moved = batch | {"batch_idx": 1 - batch["batch_idx"]}
    assert torch.equal(model.encode(batch), model.encode(moved))
    assert not torch.allclose(model(batch).value_logits, model(moved).value_logits)


def test_encode_pools_real_genes_only():
    model = make_encoder(pooling="mean", use_cell_summary=False).eval()
    batch = make_batch(padded=True, masked=0)
    hidden = model(batch).hidden
    torch.testing.assert_close(model.encode(batch)[0], hidden[0, 1:-2].mean(dim=0))
    by_cls = make_encoder(pooling="cls", use_cell_summary=False).eval()
    assert torch.equal(by_cls.encode(batch), by_cls(batch).hidden[:, 0])


def test_the_cell_summary_sees_visible_genes_only():
    model = make_encoder().eval()
    batch = make_batch()
    summary, add_up = model.cell_summary, cell_layout(batch).sum
    hidden_bin = model.config.n_bins
    is_visible = batch["bins"] != hidden_bin
    changed = torch.where(is_visible, batch["bins"], 0)
    before, after = (summary(batch["tokens"], bins, is_visible, add_up) for bins in (batch["bins"], changed))
    assert torch.equal(before, after)
    other = batch["bins"].clone()
    other[0, 5] = (other[0, 5] + 1) % hidden_bin
    assert not torch.allclose(summary(batch["tokens"], other, is_visible, add_up)[0], before[0])


def test_depth_changes_predictions_unless_switched_off():
    batch = make_batch()
    deeper = batch | {"depth": batch["depth"] + 2}
    model, blind = make_encoder().eval(), make_encoder(use_depth=False).eval()
    assert not torch.allclose(model(batch).value_logits, model(deeper).value_logits)
    assert torch.equal(blind(batch).value_logits, blind(deeper).value_logits)


@pytest.mark.parametrize("n_bins", [N_BINS, None])
def test_a_model_without_expression_values_reads_genes_alone(n_bins):
    batch = make_batch(target="gene", binned=n_bins is not None)
    other = {**batch, "values": batch["values"] + 1}
    if n_bins:
        other["bins"] = torch.where(batch["bins"] < n_bins, (batch["bins"] + 1) % n_bins, batch["bins"])
    without, reading = (
        make_encoder(n_bins=n_bins, use_expression_values=use).eval() for use in (False, True)
    )
    for model, is_equal in ((without, True), (reading, False)):
        for before, after in zip(model(batch)[:3], model(other)[:3], strict=True):
            assert torch.equal(before, after) == is_equal
        assert torch.equal(model.encode(batch), model.encode(other)) == is_equal
    names = without.state_dict().keys()
    assert not any("value_embedding" in name or "scale" in name for name in names)
    assert without.compute_loss(batch).metrics["expression_loss"] > 0  # expression is still a target


def test_cls_pooling_without_cls_tokens_is_refused():
    batch = make_batch()
    batch["tokens"] = batch["tokens"][:, 1:]
    with pytest.raises(ValueError, match="pooling is cls"):
        make_encoder().loss_weight(batch)


@pytest.mark.parametrize(
    "key, options, advice",
    [
        ("masked_index", {}, "configure masking"),
        ("bins", {}, "binned_expression"),
        ("depth", {}, "use_depth: false"),
        ("batch_idx", {}, "n_technical_batches is set"),
        ("value_labels", {}, "expression_loss_weight: 0"),
        ("values", {"n_bins": None}, "reads expression"),
    ],
)
def test_missing_batch_entry_says_what_to_do(key, options, advice):
    batch = make_batch(binned=not options)
    del batch[key]
    with pytest.raises(ValueError, match=f"no '{key}'.*{advice}"):
        make_encoder(**options).compute_loss(batch)


def test_rows_beyond_max_seq_len_are_refused():
    with pytest.raises(ValueError, match="max_seq_len is 8, but a batch has rows of 9 tokens"):
        make_encoder(max_seq_len=8)(make_batch())


def test_wrong_config_names_everything_that_is_wrong():
    with pytest.raises(ValueError) as error:
        EncoderConfig(
            vocab_size=4, hidden_dim=30, num_heads=4, dropout=1.0, pooling="max", position_embedding="learned"
        )
    for part in (
        "vocab_size is 4",
        "hidden_dim 30 is not divisible by num_heads 4",
        "dropout is 1.0",
        "pooling is 'max'; allowed: cls, mean",
        "position_embedding learned needs max_seq_len",
    ):
        assert part in str(error.value)


def test_fp8_config_names_the_field_that_is_no_multiple_of_16():
    with pytest.raises(ValueError, match="ffn_dim is 40; FP8 layers need a multiple of 16"):
        EncoderConfig(vocab_size=VOCAB, hidden_dim=32, ffn_dim=40, layer_backend="emulate")


@pytest.mark.parametrize("from_cell", [True, False])
def test_expression_from_cell_leaves_the_hidden_states_of_masked_genes_out(from_cell):
    model = make_encoder(expression_from_cell=from_cell, pooling="mean").eval()
    batch = make_batch(masked=3)

    def disturb(module, arguments, hidden):
        hidden = hidden.clone()
        hidden.flatten(end_dim=1)[batch["masked_index"]] += torch.linspace(-1, 1, hidden.shape[-1])
        return hidden

    before = model(batch).value_logits
    with torch.no_grad():
        handle = model.transformer.register_forward_hook(disturb)
        after = model(batch).value_logits
        handle.remove()
    assert torch.equal(before, after) == from_cell
    assert (model.value_head.transform is None) == from_cell


@pytest.mark.parametrize("target", ["gene", "expression"])
@pytest.mark.parametrize("binned", [True, False])
def test_the_contrast_compares_each_cells_masked_genes_with_the_visible_ones_of_all(target, binned):
    n_bins = N_BINS if binned else None
    model = make_encoder(contrast_weight=0.5, n_bins=n_bins).double()
    options = {"num_cells": 4, "masked": 4, "binned": binned}
    batch = make_batch(target=target, **options)
    batch = {name: each.double() if name in ("values", "depth") else each for name, each in batch.items()}
    whole = make_batch(masked=0, num_cells=4, binned=binned)
    expression = whole["bins"] if binned else whole["values"].double()
    is_masked = torch.zeros_like(whole["tokens"], dtype=torch.bool)
    is_masked.view(-1)[batch["masked_index"]] = True
    is_gene, add_up = whole["tokens"] >= 4, cell_layout(whole).sum
    visible = model.cell_summary(whole["tokens"], expression, is_gene & ~is_masked, add_up)
    masked = model.cell_summary(whole["tokens"], expression, is_masked, add_up)
    likeness = torch.cosine_similarity(visible[:, None], masked[None], dim=-1) / 0.2
    own = likeness.diagonal()
    expected = (likeness.logsumexp(1) - own + likeness.logsumexp(0) - own).mean() / 2

    loss = model.compute_loss(batch)
    found = loss.metrics["contrast_loss"] / loss.weight
    torch.testing.assert_close(found, expected.detach(), check_dtype=False, rtol=1e-5, atol=1e-6)
    without = make_encoder(n_bins=n_bins).double().compute_loss(batch)
    torch.testing.assert_close(
        (loss.sum - without.sum) / loss.weight, 0.5 * expected, check_dtype=False, rtol=1e-4, atol=1e-5
    )


def test_a_contrast_needs_summaries_to_compare():
    with pytest.raises(ModelError, match="contrast_weight is set, but use_cell_summary is false"):
        make_encoder(contrast_weight=0.1, use_cell_summary=False)
    with pytest.raises(ModelError, match="contrast_weight is -1; it must not be negative"):
        make_encoder(contrast_weight=-1)


def test_expression_from_cell_needs_a_loss_on_expression():
    with pytest.raises(ModelError, match="expression_from_cell is true, but expression_loss_weight is 0"):
        make_encoder(expression_from_cell=True, expression_loss_weight=0)


def test_value_prior_is_each_genes_smoothed_distribution():
    model = make_encoder()
    batches = [make_batch(masked=0, seed=seed, padded=True) for seed in range(4)]
    account = model.initialise_from_data(batches)
    prior = model.value_head.prior
    torch.testing.assert_close(prior[4:].exp().sum(dim=1), torch.ones(NUM_GENES))
    assert not prior[:4].any()
    gene = int(batches[0]["tokens"][1, 1])
    found = torch.cat([batch["bins"][batch["tokens"] == gene] for batch in batches])
    everything = torch.cat([batch["bins"][batch["tokens"] >= 4] for batch in batches])
    overall = (torch.bincount(everything, minlength=N_BINS) + 1) / (len(everything) + N_BINS)
    expected = (torch.bincount(found, minlength=N_BINS) + 5 * overall) / (len(found) + 5)
    torch.testing.assert_close(prior[gene].exp(), expected)
    assert account["prior_values"] == len(everything)


def test_value_prior_makes_the_first_loss_the_marginal_one():
    model = make_encoder(init_std=1e-4)
    batches = [make_batch(masked=0, seed=seed) for seed in range(50)]
    model.initialise_from_data(batches)
    batch = make_batch(seed=3)
    genes = batch["tokens"].flatten()[batch["masked_index"]]
    values = batch["value_labels"].flatten()[batch["masked_index"]]
    marginal = -model.value_head.prior[genes, values].sum()
    torch.testing.assert_close(model.compute_loss(batch).sum, marginal, rtol=1e-3, atol=1e-3)


def test_value_prior_of_continuous_values_is_each_genes_smoothed_mean():
    model = make_encoder(n_bins=None)
    batches = [make_batch(masked=0, binned=False, seed=seed) for seed in range(40)]
    model.initialise_from_data(batches)
    gene = int(batches[0]["tokens"][0, 1])
    found = torch.cat([batch["values"][batch["tokens"] == gene] for batch in batches])
    overall = torch.cat([batch["values"][batch["tokens"] >= 4] for batch in batches]).mean()
    expected = (found.sum() + 5 * overall) / (len(found) + 5)
    torch.testing.assert_close(model.value_head.prior[gene], expected.unsqueeze(0))


def test_value_prior_without_batches_is_refused_and_can_be_switched_off():
    with pytest.raises(ValueError, match="use_value_prior: false"):
        make_encoder().initialise_from_data([])
    assert make_encoder(use_value_prior=False).initialise_from_data([]) == {}


def test_value_prior_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \[3, 5\]; the model needs \[34, 5\]"):
        make_encoder().set_value_prior(torch.zeros(3, N_BINS))


def write_vectors(folder, genes, matrix, name="vectors.npy"):
    path = folder / name
    if name.endswith(".npy"):
        np.save(path, matrix)
    else:
        save_file({"vectors": torch.from_numpy(matrix)}, path)
    path.with_suffix(".txt").write_text("\n".join(genes) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["vectors.npy", "vectors.safetensors"])
def test_gene_vectors_are_looked_up_by_name(tmp_path, name):
    matrix = np.arange(6, dtype=np.float32).reshape(3, 2)
    path = write_vectors(tmp_path, ["A", "B", "C"], matrix, name)
    table = load_gene_embeddings(path, ["C", "X", "A"])
    assert table[0].tolist() == [4, 5] and table[2].tolist() == [0, 1]
    assert table[1].isnan().all()


def test_gene_vectors_are_looked_up_by_id_before_symbol(tmp_path):
    matrix = np.arange(10, dtype=np.float32).reshape(5, 2)
    ids = [f"ENSG0000000000{i}" for i in range(5)]
    path = write_vectors(tmp_path, ["B", f"{ids[0]}.7", "C", "twin", "A"], matrix)
    table = load_gene_embeddings(path, ids, ["A", "B", None, "twin", "twin"])
    assert table[:2].tolist() == [[2, 3], [0, 1]]
    assert table[2:].isnan().all()


@pytest.mark.parametrize("form", ["names inside", "names beside"])
def test_gene_vectors_are_read_from_a_torch_file(tmp_path, form):
    matrix, path = torch.arange(6.0).reshape(3, 2), tmp_path / "vectors.pt"
    if form == "names inside":
        torch.save({"gene_names": ["A", "B", "C"], "embeddings": matrix}, path)
    else:
        torch.save(matrix, path)
        path.with_suffix(".txt").write_text("A\nB\nC\n")
    assert torch.equal(load_gene_embeddings(path, ["C", "A"]), matrix[[2, 0]])


class Explosive:
    """Write a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["vectors.pt", "vectors.npy"])
def test_nothing_in_a_file_of_gene_vectors_is_executed(tmp_path, name):
    path, mark = tmp_path / name, tmp_path / "executed"
    content = {"gene_names": ["A"], "embeddings": Explosive(mark)}
    if name.endswith(".pt"):
        torch.save(content, path)
    else:
        np.save(path, np.array(content, dtype=object), allow_pickle=True)
        path.with_suffix(".txt").write_text("A\n")
    mark.unlink(missing_ok=True)
    with pytest.raises(ValueError, match="never unpickled|no plain NumPy array"):
        load_gene_embeddings(path, ["A"])
    assert not mark.exists()


def test_gene_vectors_keep_their_angles_when_the_width_changes():
    torch.manual_seed(0)
    table = torch.randn(6, 4) @ torch.randn(4, 12)  # rank 4, so that 8 directions hold all of it
    table[2] = torch.nan
    for dim in (8, 12, 20):
        fitted = fit_to_width(table, dim, std=0.02)
        assert fitted.shape == (6, dim) and fitted[2].isnan().all()
        known = [0, 1, 3, 4, 5]
        assert fitted[known].square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-4)
        before, after = (torch.nn.functional.normalize(t[known], dim=1) for t in (table, fitted))
        torch.testing.assert_close(after @ after.T, before @ before.T, rtol=1e-4, atol=1e-4)


def test_gene_vectors_start_the_token_embedding_and_missing_genes_keep_theirs(tmp_path):
    matrix = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    path = write_vectors(tmp_path, ["g1", "g4"], matrix)
    model = make_encoder(gene_embedding_path=str(path), use_value_prior=False)
    before = model.token_embedding.weight.detach().clone()
    account = model.initialise_from_data([], [f"g{i}" for i in range(NUM_GENES)])
    changed = (model.token_embedding.weight != before).any(dim=1).nonzero().flatten().tolist()
    assert changed == [5, 8]
    assert account == {"gene_vectors_found": 2, "gene_vectors_missing": NUM_GENES - 2}


@pytest.mark.parametrize(
    "genes, matrix, message",
    [
        (["A"], np.zeros((2, 3), np.float32), "names 1 genes, .* has 2 rows"),
        (["A", "A"], np.zeros((2, 3), np.float32), "names 'A' more than once"),
        (["X", "Y"], np.zeros((2, 3), np.float32), "none of the data's 2 genes"),
        (["A", "B"], np.full((2, 3), np.nan, np.float32), "not finite"),
        (["A", "B"], np.zeros(2, np.float32), "must hold floating point numbers"),
        (["A", "B"], np.array([[None], [1]], dtype=object), "no plain NumPy array"),
    ],
)
def test_bad_gene_vector_files_are_refused(tmp_path, genes, matrix, message):
    path = write_vectors(tmp_path, genes, matrix)
    with pytest.raises(ValueError, match=message):
        load_gene_embeddings(path, ["A", "B"])


def write_lying_array(path):
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2, 10**13)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(64))


def headed(text):
    """Return a writer of a file with a header of its own in the place of a NumPy array's."""
    header = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()
    return lambda path: path.write_bytes(header + bytes(64))


def shaped(shape, descr="'<f4'"):
    return headed(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("vectors.npy", write_lying_array),
        ("vectors.npy", headed("{'descr': ('''")),
        ("vectors.npy", headed("  x\n y")),
        ("vectors.npy", headed("(" * 9_000 + ")" * 9_000)),
        ("vectors.npy", headed("-" * 9_000 + "1")),
        ("vectors.npy", headed("{[]: 1}")),
        ("vectors.npy", shaped("(99999999999999999999, 9)")),
        ("vectors.npy", shaped("(4611686018427387904, 4)")),
        ("vectors.npy", shaped("(-1, 4)")),
        ("vectors.npy", shaped("(2, 2)", descr="['a', 5]")),
        ("vectors.npy", lambda path: path.write_bytes(b"PK\x03\x04 no archive")),
        ("vectors.pt", lambda path: path.write_bytes(b"")),
        ("vectors.pt", lambda path: torch.save(torch.zeros(1).expand(2, 10**12), path)),
        ("vectors.pt", lambda path: torch.save(torch.zeros(2, 3).to_sparse(), path)),
        ("vectors.pt", lambda path: torch.save(torch.zeros(2, 3, dtype=torch.complex64), path)),
        ("vectors.pt", lambda path: torch.save({"gene_names": 5, "embeddings": torch.zeros(2, 3)}, path)),
        ("vectors.safetensors", lambda path: save_file({"a": torch.zeros(2, 3, dtype=torch.int32)}, path)),
    ],
)
def test_a_file_of_gene_vectors_that_is_none_is_refused(tmp_path, name, write):
    write(tmp_path / name)
    (tmp_path / "vectors.txt").write_text("A\nB\n")
    with pytest.raises(ModelError, match="gene_embedding_path: .*vectors"):
        load_gene_embeddings(tmp_path / name, ["A", "B"])


def test_gene_vectors_of_half_precision_are_read(tmp_path):
    save_file({"a": torch.arange(6.0).reshape(2, 3).bfloat16()}, tmp_path / "vectors.safetensors")
    (tmp_path / "vectors.txt").write_text("A\nB\n")
    table = load_gene_embeddings(tmp_path / "vectors.safetensors", ["B", "A"])
    assert table.tolist() == [[3, 4, 5], [0, 1, 2]]


def test_names_of_gene_vectors_that_are_no_text_are_refused(tmp_path):
    path = write_vectors(tmp_path, ["A"], np.zeros((1, 3), np.float32))
    path.with_suffix(".txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="is no text in UTF-8"):
        load_gene_embeddings(path, ["A"])


def test_missing_gene_vector_file_says_what_is_wanted(tmp_path):
    with pytest.raises(ValueError, match="does not exist; give a .npy, .safetensors or .pt matrix"):
        load_gene_embeddings(tmp_path / "none.npy", ["A"])


def test_same_seed_builds_the_same_model():
    first, second = make_encoder(), make_encoder()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_the_padding_token_starts_at_zero():
    assert not make_encoder().token_embedding.weight[0].any()
