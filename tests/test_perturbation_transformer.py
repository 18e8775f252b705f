import copy
from typing import Any

import fake_te
import numpy as np
import pytest
import torch
from running import all_losses, newest_run, records, reset_accelerate, train, train_ranks, write_config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.errors import ModelError
from models.noise import item_seeds
from models.perturbation_transformer import PerturbationTransformer, PerturbationTransformerConfig
from models.pretrained import from_pretrained, save_pretrained
from trainer.config import load_run_config
from trainer.costs import find_gpu
from trainer.plan import make_plan

NUM_GENES, K, NUM_BATCHES = 20, 5, 3
SMALL: dict[str, Any] = {
    "num_genes": NUM_GENES,
    "vocab_size": K,
    "n_technical_batches": NUM_BATCHES,
    "hidden_dim": 32,
    "gene_dim": 16,
    "num_latents": 6,
    "num_context_latents": 4,
    "num_layers": 2,
    "num_heads": 4,
    "dropout": 0.0,
    "init_std": 0.2,
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"activation": "swiglu", "normalization": "RMSNorm", "ffn_dim": 48, "gene_ffn_dim": 32},
    {"use_control": False, "n_technical_batches": 0},
    {"use_target": False, "num_context_layers": 2, "dropout": 0.1},
    {"target_table": "own", "num_targets": 7, "control_tokens": "own", "n_bins": 8},
    {"objective": "partial", "objective_args": {"auxiliary": {}}, "gene_vector_dim": 8},
    {"response_rank": 6},
    {"response_rank": 6, "target_table": "own", "num_targets": 7},
]


def make_model(seed: int = 0, **options: Any) -> PerturbationTransformer:
    torch.manual_seed(seed)
    return PerturbationTransformer(PerturbationTransformerConfig(**{**SMALL, **options}))


def make_batch(
    num_sets: int = 3, set_size: int = 4, num_controls: int = 5, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=generator)

    return {
        "tokens": draw(K, num_sets, set_size, NUM_GENES),
        "control": draw(K, num_sets, num_controls, NUM_GENES),
        "target_gene_idx": draw(7, num_sets),
        "batch_idx": draw(NUM_BATCHES, num_sets),
        "noise_seed": item_seeds(seed, torch.arange(num_sets)),
    }


def loss_of(model: PerturbationTransformer, batch: dict[str, Tensor], step: int = 0) -> Tensor:
    output = model.diffusion.compute_loss(
        model,
        batch["tokens"],
        control_set=batch.get("control"),
        target_gene_idx=batch.get("target_gene_idx"),
        batch_idx=batch.get("batch_idx"),
        noise_seed=batch["noise_seed"],
        step=step,
    )
    return output.sum / output.weight


def logits_of(model: PerturbationTransformer, batch: dict[str, Tensor], time: float = 0.5) -> Tensor:
    """Return the logits of cells of which every second gene is masked."""
    tokens = batch["tokens"].clone()
    tokens[..., ::2] = K
    conditions = model.encode_conditions(
        control_set=batch.get("control"),
        target_gene_idx=batch.get("target_gene_idx"),
        batch_idx=batch.get("batch_idx"),
    )
    return model(tokens, torch.full(tokens.shape[:-1], time), conditions).logits


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_cell_has_logits_of_every_gene(changes):
    model, batch = make_model(**changes), make_batch()
    assert logits_of(model, batch).shape == (3, 4, NUM_GENES, K)
    single = {**batch, "tokens": batch["tokens"][:, 0], "control": batch["control"][:, 0]}
    assert logits_of(model, single).shape == (3, NUM_GENES, K)
    assert loss_of(model, batch).isfinite() and loss_of(model, single).isfinite()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("absent", [(), ("control", "target_gene_idx")], ids=["perturbed", "pretraining"])
def test_every_parameter_gets_a_gradient_and_idle_ones_exactly_zero(changes, absent):
    model = make_model(**changes).train()
    batch = {name: value for name, value in make_batch().items() if name not in absent}
    loss_of(model, batch, step=1).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    zero = {name for name, gradient in gradients.items() if gradient is not None and not bool(gradient.any())}
    # Vectors of a file that was not read, and what stands for conditions that the batch has.
    allowed = {
        "gene_embedding.projection.weight",
        "control_encoder.none.weight",
        "target_embedding.none.weight",
    }
    if absent:
        # Exactly zero, and no rounding errors: these Adam would step by as much as by anything.
        idle = (
            "prior.",
            "control_encoder.attention.",
            "control_encoder.latents.",
            "control_value_embedding.",
        )
        idle += ("controls.scale.", "auxiliary_head.", "target_embedding.linear", "target_embedding.norm.")
        idle += ("target_embedding.table.", "controls.shift.weight", "response.")
        assert zero - allowed == {name for name in gradients if name.startswith(idle)}
    else:
        assert zero <= allowed


def test_the_order_of_controls_means_nothing():
    model, batch = make_model().eval(), make_batch()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    shuffled = {**batch, "control": batch["control"][:, order]}
    torch.testing.assert_close(logits_of(model, batch), logits_of(model, shuffled), rtol=1e-4, atol=1e-5)


def test_cells_of_a_set_are_predicted_each_on_its_own():
    model, batch = make_model().eval(), make_batch()
    together = logits_of(model, batch)
    alone = logits_of(model, {**batch, "tokens": batch["tokens"][:, 1:2]})
    torch.testing.assert_close(together[:, 1:2], alone, rtol=1e-4, atol=1e-5)


def test_predictions_at_masked_genes_do_not_see_what_is_under_the_mask():
    model, batch = make_model().eval(), make_batch()
    other = {**batch, "tokens": batch["tokens"].clone()}
    other["tokens"][..., ::2] = (other["tokens"][..., ::2] + 1) % K
    assert torch.equal(logits_of(model, batch), logits_of(model, other))
    other["tokens"][..., 1] = (other["tokens"][..., 1] + 1) % K
    assert not torch.allclose(logits_of(model, batch), logits_of(model, other))


@pytest.mark.parametrize("name", ["control", "target_gene_idx", "batch_idx"])
@torch.no_grad()
def test_every_condition_changes_what_is_predicted(name):
    model, batch = make_model().eval(), make_batch()
    before = logits_of(model, batch)
    changed = batch[name].clone()
    changed[0] = (changed[0] + 1) % NUM_BATCHES
    after = logits_of(model, {**batch, name: changed})
    assert float((before - after)[0].abs().max()) > 1e-3
    torch.testing.assert_close(before[1:], after[1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_time_changes_what_is_predicted():
    model, batch = make_model().eval(), make_batch()
    near = [logits_of(model, batch, time) for time in (0.5, 0.51)]
    assert float((near[0] - near[1]).abs().max()) > 1e-3


def test_conditions_that_are_switched_off_play_no_part():
    model = make_model(use_control=False, use_target=False, n_technical_batches=0).eval()
    batch, other = make_batch(), make_batch(seed=1)
    assert torch.equal(logits_of(model, batch), logits_of(model, {**other, "tokens": batch["tokens"]}))
    parts = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert not parts & {
        "controls",
        "control_encoder",
        "prior",
        "target_embedding",
        "technical_batch_embedding",
    }


def test_pairs_of_targets_have_no_order_and_a_missing_second_one_is_one():
    model, batch = make_model().eval(), make_batch()
    pairs = torch.tensor([[2, 9], [4, 4], [3, -1]])
    before = logits_of(model, {**batch, "target_gene_idx": pairs})
    torch.testing.assert_close(before, logits_of(model, {**batch, "target_gene_idx": pairs.flip(1)}))
    singles = logits_of(model, {**batch, "target_gene_idx": torch.tensor([2, 4, 3])})
    torch.testing.assert_close(before[2], singles[2])
    assert not torch.allclose(before[0], singles[0])


def test_no_target_is_the_same_said_or_not():
    model, batch = make_model().eval(), make_batch()
    said = logits_of(model, {**batch, "target_gene_idx": torch.full((3,), -1)})
    batch.pop("target_gene_idx")
    torch.testing.assert_close(said, logits_of(model, batch))


def test_each_cell_can_have_a_technical_batch_of_its_own():
    model, batch = make_model().eval(), make_batch()
    of_cells = batch["batch_idx"].unsqueeze(1).repeat(1, 4)
    torch.testing.assert_close(logits_of(model, batch), logits_of(model, {**batch, "batch_idx": of_cells}))
    of_cells[0, 2] = (of_cells[0, 2] + 1) % NUM_BATCHES
    changed = logits_of(model, {**batch, "batch_idx": of_cells}) != logits_of(model, batch)
    assert changed.flatten(start_dim=2).any(dim=-1).nonzero().tolist() == [[0, 2]]


def test_genes_that_controls_lack_are_left_out_of_their_distribution():
    model, batch = make_model().eval(), make_batch()
    batch["control"][0, 1, 3] = -100
    histogram = model._histogram(batch["control"], 3)
    assert histogram[0, 3].sum() == 4 and histogram[0, 4].sum() == 5
    assert logits_of(model, batch).isfinite().all()


def test_logits_start_from_the_distribution_over_the_controls():
    model, batch = make_model(init_std=1e-6).eval(), make_batch()
    share = torch.nn.functional.one_hot(batch["control"], K).sum(dim=1)
    expected = (share + 1 / K) / 6
    found = logits_of(model, batch).softmax(dim=-1)
    torch.testing.assert_close(found, expected.unsqueeze(1).expand_as(found), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "changes", [{}, {"layer_backend": "emulate", "fp8_recipe": "delayed_scaling"}], ids=str
)
def test_activation_checkpointing_has_the_same_gradients(changes):
    plain = make_model(dropout=0.1, **changes).train()
    saving = make_model(dropout=0.1, activation_checkpointing=True, **changes).train()
    saving.load_state_dict(plain.state_dict())
    losses = []
    for model in (plain, saving):
        for seed in range(2):  # what a recipe remembers of the first pass decides over the second one
            torch.manual_seed(seed)
            model.zero_grad()
            loss = loss_of(model, make_batch(seed=seed))
            loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for (name, one), (_, other) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("recipe", ["current_scaling", "delayed_scaling", "block_scaling", "mxfp8"])
def test_emulated_fp8_is_close_and_not_the_same(recipe):
    sizes = {"hidden_dim": 32, "gene_dim": 32, "init_std": 0.05}
    plain = make_model(**sizes)
    fp8 = make_model(**sizes, layer_backend="emulate", fp8_recipe=recipe)
    fp8.load_state_dict(plain.state_dict())
    losses = [loss_of(model, make_batch()) for model in (plain, fp8)]
    losses[1].backward()
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=0.02, atol=0.0)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in fp8.parameters())


def test_layers_are_kept_out_of_fp8_by_name_and_unknown_names_are_refused():
    options = {"gene_dim": 32, "layer_backend": "emulate"}
    names = make_model(**options)._factory.layer_names
    parts = {"cell_encoder.attention.kv", "control_encoder.layers.0.mlp.linear1", "decoder.mlp.linear2"}
    assert parts | {"layers.1.attention.qkv", "technical_batch_embedding"} <= set(names)
    without = make_model(**options, exclude_layers=("*",))
    plain = make_model(gene_dim=32)
    assert torch.equal(loss_of(without, make_batch()), loss_of(plain, make_batch()))
    with pytest.raises(ModelError, match=r"exclude_layers: 'decoder.mpl' fits no layer"):
        make_model(**options, exclude_layers=("decoder.mpl",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 30}, "hidden_dim 30 is not divisible by num_heads 4"),
        ({"gene_dim": 18}, "gene_dim 18 is not divisible by num_heads 4"),
        ({"num_latents": 0, "ffn_dim": 0}, "num_latents is 0; it must be at least 1; ffn_dim is 0"),
        ({"n_bins": 9}, "control_tokens is shared, but perturbed cells have 5 tokens and controls 9"),
        ({"num_targets": 3}, "num_targets is 3 and num_genes 20, but with target_table genes"),
        ({"target_table": "gene"}, "target_table is 'gene'; allowed: genes, own"),
        ({"gene_embedding_path": "x.npy"}, "gene_embedding_path is set, but gene_vector_dim is 0"),
        ({"layer_backend": "emulate", "gene_dim": 24}, "gene_dim is 24; FP8 layers need a multiple of 16"),
        ({"objective_args": {"noise": 1}}, "objective absorbing has no option 'noise'"),
        ({"n_technical_batches": -1}, "n_technical_batches is -1; it must not be negative"),
        (
            {"num_technical_batches": 0},
            "num_technical_batches is 0; it must be in 1 to n_technical_batches 3",
        ),
        (
            {"layer_backend": "te", "hidden_dim": 96, "gene_dim": 96, "num_heads": 8},
            "num_heads is 8, which makes heads of 12; .*: num_heads 6",
        ),
    ],
)
def test_wrong_sizes_are_named(changes, message):
    with pytest.raises(ModelError, match=message):
        PerturbationTransformerConfig(**{**SMALL, **changes})


def test_batches_that_do_not_fit_are_refused():
    model, batch = make_model(), make_batch()
    with pytest.raises(ModelError, match=r"num_genes is 20, but a batch has tokens of shape \[3, 4, 19\]"):
        loss_of(model, {**batch, "tokens": batch["tokens"][..., 1:]})
    with pytest.raises(ModelError, match=r"a batch has control of shape \[3, 5, 19\]"):
        loss_of(model, {**batch, "control": batch["control"][..., 1:]})
    batch.pop("batch_idx")
    with pytest.raises(ModelError, match="the batch has no 'batch_idx', but n_technical_batches is set"):
        loss_of(model, batch)


def test_gene_vectors_of_a_file_are_read_kept_and_exported(tmp_path):
    names = [f"g{index}" for index in range(NUM_GENES)]
    vectors = np.random.default_rng(0).normal(size=(NUM_GENES - 2, 30)).astype(np.float32)
    np.save(tmp_path / "esm.npy", vectors)
    (tmp_path / "esm.txt").write_text("\n".join(reversed(names[2:])))
    model = make_model(gene_embedding_path=str(tmp_path / "esm.npy"), gene_vector_dim=8)
    account = model.initialise_from_data([], gene_ids=names)
    assert account == {"gene_vectors_found": NUM_GENES - 2, "gene_vectors_missing": 2}
    kept = model.gene_embedding.vectors.clone()
    assert not kept[:2].any() and bool(kept[2:].any(dim=1).all())
    loss_of(model, make_batch()).backward()
    assert bool(model.gene_embedding.projection.weight.grad.any())
    assert torch.equal(model.gene_embedding.vectors, kept)
    save_pretrained(model, tmp_path / "out")
    (tmp_path / "esm.npy").unlink()
    loaded = from_pretrained(tmp_path / "out", model_class=PerturbationTransformer)
    batch = make_batch()
    assert torch.equal(logits_of(loaded, batch), logits_of(model.eval(), batch))
    with pytest.raises(ModelError, match="the data names 19 genes, and the model has 20"):
        model.initialise_from_data([], gene_ids=names[1:])
    with pytest.raises(ModelError, match="gene_vector_dim is 8, but gene_embedding_path names no file"):
        make_model(gene_vector_dim=8).initialise_from_data([], gene_ids=names)


@pytest.mark.parametrize("absent", [(), ("control",)], ids=["with controls", "without"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_operations_are_those_that_torch_counts(changes, absent):
    model = make_model(**changes)
    batch = {name: value for name, value in make_batch().items() if name not in absent}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss_of(model, batch).backward()
    assert model.batch_flops(batch) == pytest.approx(counter.get_total_flops(), rel=1e-3)


def bytes_saved(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype | None) -> int:
    """Return the bytes that autograd keeps of a forward pass, beside weights (and copies of these) and the batch."""
    tensors = [*model.parameters(), *model.buffers(), *batch.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    transposed = {tuple(reversed(p.shape)) for p in model.parameters() if p.ndim == 2}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and not (dtype and tuple(tensor.shape) in transposed):
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    context = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        loss_of(model, batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("absent", [(), ("control",)], ids=["with controls", "without"])
@pytest.mark.parametrize("changes", VARIANTS[:5], ids=str)
def test_the_activations_are_what_autograd_keeps(changes, absent, dtype):
    # A CPU keeps more of an RMS norm than a GPU, where it is one kernel.
    options = {"hidden_dim": 64, "gene_dim": 32, "num_genes": 400, **changes, "normalization": "LayerNorm"}
    model = make_model(**options).train()
    batch = make_batch()
    batch["tokens"] = torch.randint(K, (3, 4, 400))
    batch["control"] = torch.randint(K, (3, 5, 400))
    batch = {name: value for name, value in batch.items() if name not in absent}
    planned = model.batch_activation_bytes(batch, is_mixed=dtype is not None)
    forward = planned.body + planned.heads + planned.logits / 3
    assert forward == pytest.approx(bytes_saved(model, batch, dtype), rel=0.1)


def test_checkpointing_plans_less_and_keeps_less():
    batch = make_batch(num_sets=2, set_size=8, num_controls=8)
    models = [make_model(num_layers=6, activation_checkpointing=on).train() for on in (False, True)]
    planned = [model.batch_activation_bytes(batch, is_mixed=False).body for model in models]
    kept = [bytes_saved(model, batch, None) for model in models]
    assert planned[1] < 0.6 * planned[0] and kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("num_genes", [6288, 18533])
def test_thousands_of_genes_fit_and_their_plan_grows_in_proportion(num_genes):
    options = {**SMALL, "num_genes": num_genes, "num_layers": 1}
    model = PerturbationTransformer(PerturbationTransformerConfig(**options))
    batch = make_batch(num_sets=1, set_size=1, num_controls=2)
    batch["tokens"] = torch.randint(K, (1, 1, num_genes))
    batch["control"] = torch.randint(K, (1, 2, num_genes))
    loss_of(model, batch).backward()
    one = model.batch_activation_bytes(batch, is_mixed=True).total
    other = PerturbationTransformer(PerturbationTransformerConfig(**{**options, "num_genes": 2 * num_genes}))
    assert other.batch_activation_bytes(batch, is_mixed=True).total < 2 * one


NUM_TARGETS, NUM_STEPS = 6, 250


def conditional_batch(num_sets: int, seed: int, set_size: int = 4) -> dict[str, Tensor]:
    """Draw sets whose cells depend on their type, which controls show alone, on the target, and on the batch.

    Controls do not show the effect of the technical batch, so that its index is the only way to know it.
    """
    world = torch.Generator().manual_seed(0)
    of_type = torch.randint(3, (2, NUM_GENES), generator=world)
    of_target = torch.randint(-1, 2, (NUM_TARGETS, NUM_GENES), generator=world)
    of_batch = torch.randint(-1, 2, (NUM_BATCHES, NUM_GENES), generator=world)
    generator = torch.Generator().manual_seed(seed)
    cell_type = torch.randint(2, (num_sets,), generator=generator)
    target = torch.randint(NUM_TARGETS, (num_sets,), generator=generator)
    batch = torch.randint(NUM_BATCHES, (num_sets,), generator=generator)
    level = of_type[cell_type] + 1

    def cells(mean: Tensor, count: int) -> Tensor:
        noise = torch.randint(2, (num_sets, count, NUM_GENES), generator=generator)
        return (mean.unsqueeze(1) + noise).clamp(0, K - 1)

    return {
        "tokens": cells(level + of_target[target] + of_batch[batch], set_size),
        "control": cells(level, 4),
        "target_gene_idx": target,
        "batch_idx": batch,
        "noise_seed": item_seeds(seed, torch.arange(num_sets)),
    }


@pytest.fixture(scope="module")
def trained() -> PerturbationTransformer:
    """Train on the conditional distribution of `conditional_batch`."""
    model = make_model(init_std=0.05, num_layers=1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (step + 1) / 20) * (1 - step / NUM_STEPS)
        optimizer.zero_grad()
        loss_of(model, conditional_batch(16, 1000 + step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", ["control", "target_gene_idx", "batch_idx"])
@torch.no_grad()
def test_shuffling_a_condition_worsens_the_held_out_loss_of_a_trained_model(trained, name):
    batch = conditional_batch(256, seed=7)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    right = float(loss_of(trained, batch))
    shuffled = float(loss_of(trained, {**batch, name: batch[name][order]}))
    assert shuffled > right + 0.1, (right, shuffled)


@torch.no_grad()
def test_samples_of_a_trained_model_follow_target_batch_and_controls(trained):
    batch = conditional_batch(64, seed=8, set_size=32)
    blank = trained.diffusion.blank(64, 32, NUM_GENES)
    samples = trained.diffusion.sample(
        trained,
        blank,
        num_steps=8,
        noise_seed=0,
        control_set=batch["control"],
        target_gene_idx=batch["target_gene_idx"],
        batch_idx=batch["batch_idx"],
    )
    truth, found = batch["tokens"].float().mean(dim=1), samples.float().mean(dim=1)
    of_controls = batch["control"].float().mean(dim=1)
    assert float((found - truth).abs().mean()) < 0.5 * float((of_controls - truth).abs().mean())


def test_a_model_is_copied_with_its_objective():
    model = make_model(objective="partial", objective_args={"mask_ratio": 0.5})
    other = copy.deepcopy(model)
    other.diffusion.set_options(mask_ratio=0.25)
    assert (model.diffusion.options.mask_ratio, other.diffusion.options.mask_ratio) == (0.5, 0.25)


def run_config(**changes: Any) -> dict[str, Any]:
    """Return a run that pretrains on cells without conditions, then on sets with all of them."""
    sizes = {name: SMALL[name] for name in ("num_heads", "num_layers", "num_latents", "dropout", "init_std")}
    given = {**sizes, "hidden_dim": 16, "num_genes": 12, "vocab_size": 4, **changes.pop("config_args", {})}
    return {
        "run_name": "sets",
        "device": "cpu",
        "seed": 5,
        "model": {
            "model_class": "models.perturbation_transformer.PerturbationTransformer",
            "config_class": "models.perturbation_transformer.PerturbationTransformerConfig",
            "config_args": given,
        },
        "optimizer": {"optimizer_args": {"lr": 0.01}},
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "datasets": [
            {
                "name": name,
                "dataloader_factory": "toy_perturbations.set_loader",
                "dataloader_args": {"has_conditions": name == "sets"},
                "epochs": epochs,
            }
            for name, epochs in (("cells", 1), ("sets", 2))
        ],
        **changes,
    }


@pytest.fixture(scope="module")
def losses_of_one(tmp_path_factory):
    return all_losses(train(tmp_path_factory.mktemp("one"), run_config()))


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_losses_of_one_process_and_of_two_are_the_same(tmp_path, losses_of_one, strategy):
    train_ranks(2, tmp_path, run_config(), strategy=strategy)
    assert len(losses_of_one) == 3 + 6 + 3
    assert all_losses(newest_run(tmp_path)) == pytest.approx(losses_of_one, rel=1e-4)


def test_fp8_checkpointing_and_auxiliary_losses_train_together(tmp_path):
    config = run_config(
        precision="fp8",
        fp8={"backend": "emulate", "recipe": "delayed_scaling"},
        config_args={
            "activation_checkpointing": True,
            "objective_args": {"auxiliary": {"ramp_steps": 2}, "schedule": "cosine"},
        },
    )
    found = records(train(tmp_path, config))
    of_sets = [record for record in found if record["phase"] == "sets"]
    assert all(np.isfinite(record["loss"]) for record in found)
    assert of_sets[-1]["loss"] > of_sets[-1]["denoising_loss"]
    assert of_sets[-1]["significance_loss"] > 0 and "significance_loss" not in found[0]


def test_a_plan_counts_the_control_cells(tmp_path):
    reset_accelerate()
    config = load_run_config(write_config(tmp_path, run_config(precision="bf16")))
    plan = make_plan(config, find_gpu("H100"), world_sizes=[1], mfu=0.35, sample_cells=8)
    cells, sets = (phase.sample for phase in plan.phases)
    assert (cells.tokens_per_cell, sets.tokens_per_cell) == (12, 36)
    given = {"n_technical_batches": 1, **run_config()["model"]["config_args"]}
    model = PerturbationTransformer(PerturbationTransformerConfig(**given))
    with_controls, without = (
        model.batch_flops({"tokens": torch.zeros(2, 3, 12), "control": control}) / 2
        for control in (torch.zeros(2, 3, 12), None)
    )
    assert sets.flops_per_cell == with_controls > without
    assert cells.activation_bytes_per_cell and sets.activation_bytes_per_cell
    assert sets.activation_bytes_per_cell > 2 * cells.activation_bytes_per_cell
    assert not any("activations" in note or "operations" in note for note in plan.notes)


def test_transformer_engines_layers_agree_with_torchs(monkeypatch):
    fake_te.install(monkeypatch)
    try:
        sizes = {"hidden_dim": 32, "gene_dim": 32, "num_heads": 2}
        plain = make_model(**sizes)
        other = make_model(**sizes, layer_backend="te", activation_checkpointing=True).train()
        assert plain.state_dict().keys() == other.state_dict().keys()
        other.load_state_dict(plain.state_dict())
        batch = make_batch()
        found = [loss_of(model, batch) for model in (plain, other)]
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
        for loss in found:
            loss.backward()
        for (name, one), (_, two) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4, msg=name)
    finally:
        fake_te.uninstall()
