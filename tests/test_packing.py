"""Packed and bucketed batches: the same cells, masks, losses and gradients as padded ones."""

from typing import Any

import numpy as np
import pytest
import torch
from corpora import make_cells, write_corpus
from running import (
    all_losses,
    comparable_records,
    copy_until,
    final_weights,
    newest_run,
    records,
    same_weights,
    toy,
    train,
    train_ranks,
    write_config,
)

from data.collate import num_cells
from data.errors import DataError
from data.loader import CellSource, DrawKey, StepLoader, cell_loader
from data.order import GlobalOrder
from models.attention import AttentionSpans, attend_one_by_one, attend_padded, flash_takes, packed_attention
from models.encoder import EncoderConfig, MaskedCellEncoder
from models.layers import SelfAttention
from trainer.config import load_run_config
from trainer.errors import ConfigError
from trainer.export import export
from trainer.losses import LossModule
from trainer.quickstart import baseline_losses
from trainer.run import count_tokens

pytestmark = pytest.mark.usefixtures("forked_programs")

NUM_GENES, NUM_CELLS, N_BINS = 60, 96, 5
BINNED = {"strategy": "binned_expression", "binning_method": "per_cell", "n_bins": N_BINS, "max_genes": 40}
RANKED = {"strategy": "rank_value", "max_genes": 40}
MASKING = {"mask_ratio": 0.3, "target": "both"}
DRAW = DrawKey(3, 0, 0)
ENCODER = {
    "model_class": "models.encoder.MaskedCellEncoder",
    "config_class": "models.encoder.EncoderConfig",
    "config_args": {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    rng = np.random.default_rng(0)
    cells = make_cells(NUM_CELLS, NUM_GENES, 20)
    # Lengths as uneven as in a tissue: each cell keeps a random part of its genes.
    kept = rng.random(len(cells.genes)) < np.repeat(rng.uniform(0.1, 1, NUM_CELLS), np.diff(cells.offsets))
    kept[cells.offsets[:-1]] = True
    offsets = np.concatenate([[0], np.cumsum(np.add.reduceat(kept, cells.offsets[:-1]))])
    uneven = cells._replace(offsets=offsets, genes=cells.genes[kept], counts=cells.counts[kept])
    for storage in ("arrow", "parquet"):
        write_corpus(folder / storage, uneven, NUM_GENES, storage, rows_per_shard=37)
    return folder


def open_source(corpora, layout: Any = "padded", storage="arrow", **options: Any) -> CellSource:
    settings = {"tokenizer": BINNED, "masking": MASKING, "shuffle_block": 8, "shuffle_window": 32}
    return cell_loader(corpora / storage, layout=layout, **{**settings, **options})


def both(corpora, num: int = 7, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    rows = np.random.default_rng(1).permutation(NUM_CELLS)[:num]
    padded, packed = (
        open_source(corpora, layout, **options).fetch(rows, DRAW) for layout in ("padded", "packed")
    )
    return padded, packed


@pytest.mark.parametrize("prepend_cls", [True, False])
@pytest.mark.parametrize("tokenizer", [BINNED, RANKED])
def test_packed_batches_hold_what_padded_ones_do(corpora, tokenizer, prepend_cls):
    padded, packed = both(corpora, tokenizer={**tokenizer, "prepend_cls": prepend_cls})
    is_real, total = padded["attention_mask"], padded["num_tokens"]
    assert packed["num_tokens"] == total == int(packed["cu_seqlens"][-1])
    assert packed["cu_seqlens"].diff().tolist() == is_real.sum(dim=1).tolist()
    assert packed["max_length"] == is_real.shape[1]
    for name in ("tokens", "values", "bins", "labels", "value_labels"):
        if name in padded:
            assert packed[name].dtype == padded[name].dtype and packed[name].shape == packed["tokens"].shape
            torch.testing.assert_close(
                packed[name][0, :total], padded[name][is_real], rtol=0, atol=0, equal_nan=True
            )
    asked = [batch["labels"].flatten()[batch["masked_index"]] for batch in (padded, packed)]
    assert torch.equal(*asked) and len(asked[0]) > 7
    answers = [batch["value_labels"].flatten()[batch["masked_index"]] for batch in (padded, packed)]
    assert torch.equal(*answers)
    for name in ("depth", "cell_index", "batch_idx", "target_gene_idx"):
        assert torch.equal(packed[name], padded[name])


def test_packed_tokens_fill_up_to_a_multiple_of_16_with_padding_that_no_cell_has(corpora):
    lengths = set()
    for num in range(1, 9):
        packed = both(corpora, num)[1]
        width, total = packed["tokens"].shape[1], packed["num_tokens"]
        assert packed["tokens"].shape[0] == 1 and width % 16 == 0 and 0 <= width - total < 16
        assert not packed["tokens"][0, total:].any() and (packed["labels"][0, total:] == -100).all()
        assert (packed["masked_index"] < total).all()
        lengths.add(width - total)
    assert len(lengths) > 1


def test_cells_and_tokens_of_a_packed_batch_are_counted_without_padding(corpora):
    padded, packed = both(corpora)
    assert num_cells(padded) == num_cells(packed) == 7
    assert count_tokens(packed) == count_tokens(padded) == int(padded["attention_mask"].sum())


def test_a_packed_batch_without_masking_is_padded_for_those_who_look_at_rows(corpora):
    rows = np.arange(5)
    padded, packed = (
        open_source(corpora, layout).fetch_unmasked(rows, DRAW) for layout in ("padded", "packed")
    )
    assert padded.keys() == packed.keys() and torch.equal(padded["tokens"], packed["tokens"])


def steps_of(source, rank=0, world_size=1, epoch=0, global_batch_size=24, micro_batch_size=4):
    order = GlobalOrder(len(source), seed=5, phase=0, block=8, window=32)
    loader = StepLoader(
        source, order, draw_seed=5, phase=0, global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size, rank=rank, world_size=world_size,
    )  # fmt: skip
    return list(loader.steps(epoch))


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_bucketed_global_batches_are_the_same_cells_in_micro_batches_of_similar_length(corpora, storage):
    plain = steps_of(open_source(corpora, storage=storage))
    bucketed = steps_of(open_source(corpora, "bucketed", storage=storage))
    width = {"plain": 0, "bucketed": 0}
    for before, after in zip(plain, bucketed, strict=True):
        cells = [sorted(row for micro in step for row in micro.rows) for step in (before, after)]
        assert cells[0] == cells[1]
        lengths = [micro.batch["attention_mask"].sum(dim=1) for micro in after]
        assert all(one.min() >= two.max() for one, two in zip(lengths, lengths[1:], strict=False))
        width["plain"] += sum(micro.batch["tokens"].numel() for micro in before)
        width["bucketed"] += sum(micro.batch["tokens"].numel() for micro in after)
    assert width["bucketed"] < 0.8 * width["plain"]


@pytest.mark.parametrize("world_size", [2, 3])
def test_bucketed_micro_batches_do_not_depend_on_the_number_of_ranks(corpora, world_size):
    whole = steps_of(open_source(corpora, "bucketed"))
    ranks = [steps_of(open_source(corpora, "bucketed"), rank, world_size) for rank in range(world_size)]
    for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert len({len(part) for part in parts}) == 1
        dealt = [part[index] for index in range(len(parts[0])) for part in parts]
        assert [micro.rows.tolist() for micro in dealt] == [micro.rows.tolist() for micro in step]
        assert [micro.num_cells for micro in dealt] == [micro.num_cells for micro in step]


@pytest.mark.parametrize("layout", ["padded", "bucketed"])
def test_the_rows_announced_are_those_that_are_fetched(corpora, layout):
    source, announced, fetched = open_source(corpora, layout), set(), set()
    source.expect = lambda rows: announced.update(rows.tolist())
    for step in steps_of(source, rank=1, world_size=2, global_batch_size=40):
        fetched.update(row for micro in step if micro.num_cells for row in micro.rows.tolist())
    assert announced == fetched and 0 < len(fetched) < NUM_CELLS


def test_layouts_that_contradict_other_options_are_refused(corpora):
    with pytest.raises(DataError, match="layout is 'ragged'; it must be padded | bucketed | packed"):
        open_source(corpora, "ragged")
    for layout in ("packed", "bucketed"):
        with pytest.raises(DataError, match="tokenizer.padding: max_genes asks for it"):
            open_source(corpora, layout, tokenizer={**BINNED, "padding": "max_genes"})


def spans_of(lengths, extra=0):
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    total = int(bounds[-1])
    return AttentionSpans(bounds, max(lengths), total), total + extra


@pytest.mark.parametrize("attend", [attend_one_by_one, attend_padded])
def test_every_way_of_attending_equals_a_mask_over_all_pairs(attend):
    spans, total = spans_of([3, 1, 9, 4])
    torch.manual_seed(0)
    first = torch.randn(3, total, 2, 8, requires_grad=True)
    second = first.detach().clone().requires_grad_()
    cell = torch.repeat_interleave(torch.arange(4), spans.cu_seqlens.diff())
    q, k, v = (x.transpose(0, 1) for x in first)
    mask = cell[:, None] == cell
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)
    got = attend(*second, spans)
    weight = torch.randn_like(got)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(second.grad, first.grad, rtol=1e-5, atol=1e-6)


def test_tokens_of_no_cell_get_zeros_and_influence_nothing():
    spans, total = spans_of([3, 5], extra=8)
    torch.manual_seed(0)
    x = torch.randn(total, 2, 8)
    other = x.clone()
    other[8:] = torch.nan
    one, two = (packed_attention(each, each, each, spans) for each in (x, other))
    assert torch.equal(one, two) and not one[8:].any() and one.shape == x.shape


def test_attention_dropout_acts_within_packed_cells():
    spans, total = spans_of([30, 20])
    layer, x = SelfAttention(16, 2, dropout=0.5), torch.randn(1, total, 16)
    assert not torch.allclose(layer(x, spans), layer(x, spans))
    layer.eval()
    assert torch.equal(layer(x, spans), layer(x, spans))


def test_a_gpu_takes_the_flash_kernel_for_16_bit_operands_without_dropout(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    q = torch.zeros(4, 2, 32, dtype=torch.bfloat16)
    assert flash_takes(q, 0.0)
    assert not flash_takes(q, 0.1) and not flash_takes(q.float(), 0.0)
    assert not flash_takes(q[..., :12], 0.0) and not flash_takes(q.repeat(1, 1, 9), 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not flash_takes(q, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_on_a_gpu_equals_that_on_the_cpu(dtype):
    spans, total = spans_of([300, 1, 77, 512], extra=14)
    torch.manual_seed(0)
    x = torch.randn(3, total, 4, 32).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).detach().requires_grad_()
        there = spans._replace(cu_seqlens=spans.cu_seqlens.to(device))
        out = packed_attention(leaf[0], leaf[1], leaf[2], there)
        (out.float() ** 2).sum().backward()
        assert leaf.grad is not None
        results.append((out.detach().float().cpu(), leaf.grad.float().cpu()))
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(two, one, rtol=tolerance, atol=tolerance)


VARIANTS: dict[str, dict[str, Any]] = {
    "cls": {"pooling": "cls"},
    "mean": {"pooling": "mean"},
    "values": {"n_bins": None},
    "positions": {"position_embedding": "learned", "max_seq_len": 40},
    "no depth": {"use_depth": False},
    "no summary": {"use_cell_summary": False, "pooling": "mean"},
    "no technical batches": {"n_technical_batches": 0},
    "RMSNorm, swiglu": {"normalization": "RMSNorm", "activation": "swiglu"},
    "checkpointing": {"activation_checkpointing": True},
    "genes only": {"expression_loss_weight": 0.0},
    "untied": {"tie_gene_head": False},
    "contrast": {"contrast_weight": 0.5, "expression_from_cell": True},
}


def make_model(**options: Any) -> MaskedCellEncoder:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 4 + NUM_GENES, "n_bins": N_BINS, "n_technical_batches": 3, "hidden_dim": 16, "num_layers": 2,
        "num_heads": 4, "dropout": 0.0, "init_std": 0.2,
    }  # fmt: skip
    return MaskedCellEncoder(EncoderConfig(**{**settings, **options}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_of_a_packed_batch_equal_the_padded_ones(corpora, variant):
    options = VARIANTS[variant]
    tokenizer = RANKED if variant in ("values", "positions") else BINNED
    options = {**options, "n_bins": None} if tokenizer is RANKED else options
    results = []
    for batch in both(corpora, tokenizer=tokenizer):
        model = make_model(**options).double()
        batch = {
            key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in batch.items()
        }
        loss = model.compute_loss(batch)
        loss.sum.backward()
        assert loss.weight == model.loss_weight(batch)
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((loss, gradients, model.eval().encode(batch)))
    (loss, gradients, cells), (packed_loss, packed_gradients, packed_cells) = results
    torch.testing.assert_close(packed_loss.sum, loss.sum, rtol=1e-5, atol=0)
    assert packed_loss.weight == loss.weight
    for name, value in loss.metrics.items():
        torch.testing.assert_close(packed_loss.metrics[name], value, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    torch.testing.assert_close(packed_cells, cells, rtol=1e-5, atol=1e-5)


def test_a_cell_of_a_packed_batch_does_not_see_the_others(corpora):
    packed = both(corpora)[1]
    model = make_model(position_embedding="learned", max_seq_len=40, pooling="mean").eval()
    start = int(packed["cu_seqlens"][3])
    changed = {**packed, "tokens": packed["tokens"].clone(), "bins": packed["bins"].clone()}
    changed["tokens"][0, start:] = 7
    changed["bins"][0, start:] = 1
    one, two = model.encode(packed), model.encode(changed)
    assert torch.equal(one[:3], two[:3]) and not torch.allclose(one[3:], two[3:])


def test_a_packed_batch_without_cls_tokens_is_refused_where_pooling_needs_them(corpora):
    packed = both(corpora, tokenizer={**BINNED, "prepend_cls": False})[1]
    with pytest.raises(ValueError, match="pooling is cls"):
        make_model().loss_weight(packed)


def test_max_seq_len_limits_the_cells_of_a_packed_batch_and_not_their_sum(corpora):
    packed = both(corpora)[1]
    longest = packed["max_length"]
    make_model(max_seq_len=longest).compute_loss(packed)
    with pytest.raises(ValueError, match=f"max_seq_len is {longest - 1}"):
        make_model(max_seq_len=longest - 1).compute_loss(packed)


class PerCell(torch.nn.Module):
    """A loss that is a mean, and so is weighted by the number of cells."""

    accepts_packed_batches = True

    def forward(self, output, batch):
        return output.hidden.mean()


def test_a_mean_loss_counts_the_cells_of_a_packed_batch(corpora):
    packed = both(corpora)[1]
    module = LossModule(make_model(), PerCell())
    assert module.weight(packed) == 7 == module(packed, 0, None).weight


def phase(path, layout, **settings):
    arguments = {"path": str(path), "tokenizer": BINNED, "masking": MASKING, "val_fraction": 0.2}
    arguments |= {"layout": layout, "shuffle_block": 8, "shuffle_window": 32, **settings.pop("arguments", {})}
    return {"dataloader_factory": "data.loader.cell_loader", "dataloader_args": arguments, **settings}


def run_config(*phases, **changes):
    return toy(*phases, **{"model": ENCODER, "micro_batch_size": 4, **changes})


@pytest.fixture(scope="module")
def padded_run(tmp_path_factory, corpora):
    """Return a run of 8 steps on padded batches, which the other layouts are compared with."""
    return train(tmp_path_factory.mktemp("padded"), run_config(phase(corpora / "arrow", "padded", epochs=2)))


def test_packed_and_bucketed_runs_have_the_losses_of_the_padded_one(tmp_path, corpora, padded_run):
    runs = {"padded": padded_run}
    for layout in ("packed", "bucketed"):
        runs[layout] = train(tmp_path / layout, run_config(phase(corpora / "arrow", layout, epochs=2)))
        assert all_losses(runs[layout]) == pytest.approx(all_losses(padded_run), rel=1e-5)
        for name, value in final_weights(runs[layout]).items():
            torch.testing.assert_close(value, final_weights(padded_run)[name], rtol=1e-3, atol=1e-4)
    counted = [[record["tokens"] for record in records(folder)] for folder in runs.values()]
    assert counted[0] == counted[1] == counted[2]


def test_a_run_goes_on_in_another_layout(tmp_path, corpora, padded_run):
    folder = copy_until(padded_run, 4, tmp_path)
    changed = run_config(phase(corpora / "arrow", "packed", epochs=2), resume_from="latest")
    assert train(tmp_path, changed) == folder
    assert all_losses(folder) == pytest.approx(all_losses(padded_run), rel=1e-5)


@pytest.mark.parametrize("layout", ["packed", "bucketed"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, corpora, layout):
    model = {**ENCODER, "config_args": {**ENCODER["config_args"], "dropout": 0.2, "attention_dropout": 0.1}}
    config = run_config(phase(corpora / "arrow", layout, epochs=2, save_every_steps=3), model=model)
    reference = train(tmp_path / "whole", config)
    folder = copy_until(reference, 3, tmp_path)
    train(tmp_path, config, resume_from="latest")
    assert comparable_records(folder) == comparable_records(reference) and same_weights(folder, reference)


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_packed_batches_train_in_bf16_and_come_from_a_worker(tmp_path, corpora, num_workers):
    config = run_config(
        phase(corpora / "parquet", "packed", arguments={"num_workers": num_workers}), precision="bf16"
    )
    assert all(np.isfinite(all_losses(train(tmp_path, config))))


def test_fp8_in_emulation_trains_on_packed_batches(tmp_path, corpora):
    changes = {"precision": "fp8", "fp8": {"backend": "emulate"}}
    padded, packed = (
        train(tmp_path / layout, run_config(phase(corpora / "arrow", layout), **changes))
        for layout in ("padded", "packed")
    )
    assert all_losses(packed) == pytest.approx(all_losses(padded), rel=0.05)


@pytest.mark.parametrize("layout", ["packed", "bucketed"])
def test_two_ranks_have_the_losses_of_one_padded_run(tmp_path, corpora, padded_run, layout):
    train_ranks(2, tmp_path, run_config(phase(corpora / "arrow", layout, epochs=2)))
    assert all_losses(newest_run(tmp_path)) == pytest.approx(all_losses(padded_run), rel=1e-5)


def test_packed_batches_train_under_zero_3(tmp_path, corpora):
    reference = train(tmp_path / "one", run_config(phase(corpora / "arrow", "padded")))
    train_ranks(2, tmp_path / "two", run_config(phase(corpora / "arrow", "packed")), strategy="zero3")
    assert all_losses(newest_run(tmp_path / "two")) == pytest.approx(all_losses(reference), rel=1e-5)


def test_baselines_are_the_same_for_a_packed_configuration(tmp_path, corpora):
    scores = []
    for layout in ("padded", "packed"):
        path = write_config(tmp_path / layout, run_config(phase(corpora / "arrow", layout)))
        scores.append(baseline_losses(load_run_config(path), 0))
    assert scores[0] == scores[1] and min(scores[0]) > 0


def test_the_checkpoint_of_a_packed_run_is_exported(tmp_path, corpora):
    folder = train(tmp_path, run_config(phase(corpora / "arrow", "packed")))
    export(folder / "checkpoint_4", tmp_path / "exported")
    model = MaskedCellEncoder.from_pretrained(tmp_path / "exported")
    padded, packed = both(corpora)
    torch.testing.assert_close(model.encode(packed), model.encode(padded), rtol=1e-5, atol=1e-5)


def test_a_model_that_does_not_take_packed_batches_is_refused_before_training(tmp_path, corpora):
    model = {"model_class": "toy.ToyModel", "config_class": "toy.ToyConfig"}
    with pytest.raises(ConfigError, match="layout: packed.*ToyModel does not say .*use layout: bucketed"):
        train(tmp_path, run_config(phase(corpora / "arrow", "packed"), model=model))
    assert not list((tmp_path / "runs").glob("*"))


def test_a_loss_that_does_not_take_packed_batches_is_refused(tmp_path, corpora):
    loss = {"loss_class": "torch.nn.MSELoss"}
    with pytest.raises(ConfigError, match="the loss MSELoss does not say"):
        train(tmp_path, run_config(phase(corpora / "arrow", "packed"), loss=loss))
