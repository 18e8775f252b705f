import pytest
import torch
import torch.nn.functional as F
from cell_batches import make_batch, make_encoder
from torch.utils.flop_counter import FlopCounterMode

from models import cross_entropy
from models.cross_entropy import linear_cross_entropy, rows_at_once

IGNORED = -100


def inputs(num_rows=37, dim=8, vocab_size=11):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, dim, generator=generator)
    weight = torch.randn(vocab_size, dim, generator=generator)
    bias = torch.randn(vocab_size, generator=generator)
    labels = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    labels[[3, 20]] = IGNORED
    return [tensor.requires_grad_() for tensor in (x, weight, bias)], labels


def whole(x, weight, bias, labels):
    logits = F.linear(x, weight, bias)
    loss = F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=IGNORED)
    return loss, (logits.argmax(dim=-1) == labels).sum()


@pytest.mark.parametrize("rows", [1, 5, 36, 37, 100])
def test_chunks_have_the_loss_and_the_gradients_of_the_whole(rows):
    tensors, labels = inputs()
    loss, correct = linear_cross_entropy(*tensors, labels, ignore_index=IGNORED, rows=rows)
    gradients = torch.autograd.grad(3.0 * loss, tensors)
    expected, right = whole(*tensors, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert correct == right
    for found, wanted in zip(gradients, torch.autograd.grad(3.0 * expected, tensors), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_in_bf16_chunks_agree_with_the_whole():
    tensors, labels = inputs(dim=64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = linear_cross_entropy(*tensors, labels, ignore_index=IGNORED, rows=5)
        expected, _ = whole(*tensors, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    found, wanted = (torch.autograd.grad(value, tensors) for value in (loss, expected))
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and (one - other).norm() < 0.02 * other.norm()


def test_nothing_as_large_as_the_logits_is_kept():
    tensors, labels = inputs(num_rows=400, dim=4, vocab_size=300)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(*tensors, labels, ignore_index=IGNORED, rows=16)
    assert max(kept) == 400 * 4


def test_without_gradients_none_are_computed():
    tensors, labels = inputs()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loss, _ = linear_cross_entropy(*tensors, labels, ignore_index=IGNORED, rows=5)
    torch.testing.assert_close(loss, whole(*tensors, labels)[0], rtol=1e-5, atol=1e-5)
    assert counter.get_total_flops() == 2 * 37 * 8 * 11  # of the logits


def test_rows_at_once_fit_the_limit():
    assert rows_at_once(20_000) * 20_000 <= cross_entropy.MAX_LOGITS < (rows_at_once(20_000) + 1) * 20_000
    assert rows_at_once(2 * cross_entropy.MAX_LOGITS) == 1


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_encoder_trains_alike_with_chunked_logits(monkeypatch, is_tied):
    model = make_encoder(tie_gene_head=is_tied)
    batch = make_batch(target="gene")
    results = []
    for limit in (cross_entropy.MAX_LOGITS, 100):
        monkeypatch.setattr(cross_entropy, "MAX_LOGITS", limit)
        model.zero_grad()
        output = model.compute_loss(batch)
        output.sum.backward()
        results.append(
            (output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        )
    (plain, gradients), (chunked, others) = results
    torch.testing.assert_close(plain.sum, chunked.sum)
    assert plain.metrics["gene_accuracy"] == chunked.metrics["gene_accuracy"]
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, others[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
