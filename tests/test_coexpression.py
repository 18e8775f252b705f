"""Gene vectors from how genes vary together, and the response that rests on them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.coexpression import coexpression_vectors
from models.errors import ModelError
from models.perturbation_transformer import PerturbationTransformer, PerturbationTransformerConfig

NUM_GENES, K = 30, 12
GROUPS = torch.arange(NUM_GENES) // 10  # three modules of ten genes


def batches(count: int = 20, seed: int = 0, *, shift: float = 0.0) -> list[dict[str, Tensor]]:
    """Return sets in which the genes of a module vary together, and all genes of a set are shifted alike."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        module = torch.randn(4, 16, 3, generator=generator)[..., GROUPS]
        own = torch.randn(4, 16, NUM_GENES, generator=generator)
        of_set = shift * torch.randn(4, 1, NUM_GENES, generator=generator)
        tokens = (5 + module + own + of_set).round().clamp(0, K - 1).long()
        found.append({"tokens": tokens, "batch_idx": torch.zeros(4, 16, dtype=torch.int64)})
    return found


def model_of(**options: Any) -> PerturbationTransformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_genes": NUM_GENES, "vocab_size": K, "hidden_dim": 16, "num_latents": 2}
    sizes |= {"num_context_latents": 2, "num_layers": 1, "num_heads": 2, "dropout": 0.0}
    return PerturbationTransformer(PerturbationTransformerConfig(**{**sizes, **options}))


def single_cells() -> list[dict[str, Tensor]]:
    """Return the same cells, in no sets and without labels."""
    return [{"tokens": each["tokens"].flatten(0, 1)} for each in batches()]


@pytest.mark.parametrize(
    "cells",
    [batches(), batches(shift=2.0), single_cells()],
    ids=["sets alike", "sets that differ", "single cells"],
)
def test_genes_that_vary_together_have_vectors_that_point_alike(cells):
    found = coexpression_vectors(cells, NUM_GENES, 6)
    direction = torch.nn.functional.normalize(found.vectors, dim=1)
    cosine = direction @ direction.T
    is_same = GROUPS[:, None] == GROUPS[None]
    assert cosine[is_same].min() > 0.8 and cosine[~is_same].max() < 0.2
    # Three modules, of whose common part depth, the mean over all genes, is taken away.
    assert found.num_directions == 2 and found.num_cells == 20 * 64


def test_genes_that_vary_on_their_own_have_no_directions():
    generator = torch.Generator().manual_seed(0)
    noise = [{"tokens": torch.randint(K, (8, 16, NUM_GENES), generator=generator)} for _ in range(8)]
    found = coexpression_vectors(noise, NUM_GENES, 6)
    assert found.num_directions == 0 and not found.vectors.any()


def test_finding_vectors_moves_no_other_random_numbers():
    torch.manual_seed(3)
    coexpression_vectors(batches(), NUM_GENES, 6)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_data_without_two_like_cells_is_refused():
    alone = [{"tokens": torch.randint(K, (4, 1, NUM_GENES))}]
    with pytest.raises(ModelError, match="no two cells of one set"):
        coexpression_vectors(alone, NUM_GENES, 6)


def test_a_model_takes_its_vectors_from_the_data_and_says_so():
    model = model_of(gene_vectors="coexpression", gene_vector_dim=6)
    assert model.initialise_from_data(batches()) == {
        "coexpression_directions": 2,
        "coexpression_cells": 20 * 64,
    }
    assert model.gene_embedding.vectors.square().mean().sqrt() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gene_vectors": "coexpression"}, "gene_vector_dim is 0; set how many directions"),
        (
            {"gene_vectors": "coexpression", "gene_vector_dim": 4, "gene_embedding_path": "x.npy"},
            "gene_embedding_path names a file; leave one of them away",
        ),
        ({"response_rank": 4, "use_target": False}, "use_target is false: no target responds"),
        ({"response_rank": -1}, "response_rank is -1; it must not be negative"),
    ],
)
def test_options_that_contradict_each_other_are_named(options, message):
    with pytest.raises(ModelError, match=message):
        model_of(**options)


def test_targets_that_vary_alike_respond_alike_and_a_target_itself_further():
    model = model_of(gene_vectors="coexpression", gene_vector_dim=6, response_rank=8)
    model.initialise_from_data(batches())
    assert model.response is not None and model.response.own is not None
    with torch.no_grad():
        model.response.own.fill_(-5.0)
    vectors = model.gene_embedding.vectors
    moved = model.response(torch.tensor([[0], [1], [15], [-1]]), vectors).diff(dim=-1)[..., 0]  # [4, N]
    assert not moved[3].any()
    others = slice(20, None)
    near, far = (
        torch.nn.functional.cosine_similarity(moved[0, others], moved[i, others], dim=0) for i in (1, 2)
    )
    assert near > 0.9 > far
    assert moved[0].argmin() == 0 and moved[1].argmin() == 1 and moved[2].argmin() == 15


def test_the_responses_of_a_pair_add_up():
    model = model_of(target_table="own", num_targets=3, response_rank=8)
    assert model.response is not None
    vectors = model.gene_embedding()
    single = model.response(torch.tensor([[0, -1], [2, -1]]), vectors)
    torch.testing.assert_close(model.response(torch.tensor([[0, 2]]), vectors)[0], single.sum(dim=0))


def test_the_response_moves_the_logits_from_which_cells_are_drawn():
    model = model_of(response_rank=8).eval()
    control = torch.randint(K, (1, 5, NUM_GENES), generator=torch.Generator().manual_seed(0))
    before = model.encode_conditions(control_set=control, target_gene_idx=torch.tensor([4])).prior
    with torch.no_grad():
        assert model.response is not None and model.response.own is not None
        model.response.own.fill_(1.0)
    after = model.encode_conditions(control_set=control, target_gene_idx=torch.tensor([4])).prior
    assert before is not None and after is not None
    change = (after - before)[0]
    assert change[4].diff().min() > 0 and not change[torch.arange(NUM_GENES) != 4].any()
