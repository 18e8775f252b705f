import itertools
import json
from dataclasses import replace

import pytest
import torch
import yaml
from corpora import make_cells, write_corpus
from running import newest_run, records, toy, train, train_ranks, write_config
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.encoder import EncoderConfig, MaskedCellEncoder
from models.layers import LayerFactory
from trainer import costs
from trainer.checkpoint_folder import open_checkpoint
from trainer.config import load_run_config
from trainer.costs import Gpu, ModelSizes, checkpoint_bytes, find_gpu, state_bytes
from trainer.errors import ConfigError
from trainer.plan import choose_gpu, main, make_plan, render
from trainer.shards import open_tensors

NUM_GENES = 200
SMALL = {
    "vocab_size": NUM_GENES + 4,
    "n_bins": 5,
    "n_technical_batches": 2,
    "hidden_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "dropout": 0.0,
}
VARIANTS = [
    {},
    {"activation": "swiglu", "ffn_dim": 48},
    {"activation": "relu", "pooling": "mean"},
    {"activation": "silu", "gene_loss_weight": 0.0, "use_depth": False},
    {"n_bins": None, "use_cell_summary": False},
    {"expression_loss_weight": 0.0, "tie_gene_head": False},
    {"expression_from_cell": True, "contrast_weight": 0.1},
]
NUM_CELLS, NUM_TOKENS, NUM_MASKED = 3, 96, 14


def made_up_batch(config):
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_CELLS, NUM_TOKENS)
    tokens = torch.randint(4, config.vocab_size, shape, generator=generator)
    tokens[:, 0] = 3
    labels = torch.full(shape, -100)
    labels[:, 1 : NUM_MASKED + 1] = tokens[:, 1 : NUM_MASKED + 1]
    tokens[:, 1 : NUM_MASKED + 1] = 2
    batch = {
        "tokens": tokens,
        "values": torch.rand(shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.bool),
        "num_tokens": tokens.numel(),
        "labels": labels,
        "masked_index": (labels != -100).flatten().nonzero().flatten(),
        "depth": torch.linspace(3, 8, NUM_CELLS),
        "batch_idx": torch.zeros(NUM_CELLS, dtype=torch.long),
    }
    if config.n_bins is None:
        return batch | {"value_labels": torch.rand(shape, generator=generator)}
    bins = torch.randint(0, config.n_bins, shape, generator=generator)
    return batch | {"bins": bins, "value_labels": bins}


def bytes_saved(model, batch, dtype=None):
    """Return the bytes that autograd keeps of a forward pass, beside weights (and copies of these) and the batch."""
    tensors = [*model.parameters(), *model.buffers(), *(v for v in batch.values() if torch.is_tensor(v))]
    known = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    transposed = {tuple(reversed(p.shape)) for p in model.parameters() if p.ndim == 2}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and not (dtype and tuple(tensor.shape) in transposed):
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    context = torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), context:
        model.compute_loss(batch)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_operations_are_those_that_torch_counts(changes):
    config = EncoderConfig(**{**SMALL, **changes})
    model = MaskedCellEncoder(config)
    # Attention by two plain products: a flash kernel counts the scores that its backward pass computes again.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.compute_loss(made_up_batch(config)).sum.backward()
    ours = model.training_flops([NUM_TOKENS] * NUM_CELLS, NUM_CELLS * NUM_MASKED)
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_the_operations_of_a_hand_worked_case():
    config = EncoderConfig(
        vocab_size=100, n_bins=4, hidden_dim=8, num_layers=2, num_heads=2, ffn_dim=16, use_depth=False
    )
    body = 6 * 2 * 10 * (4 * 8 * 8 + 2 * 8 * 16)  # 6 x layers x tokens x (qkv, out, linear1, linear2)
    attention = 12 * 2 * (6**2 + 4**2) * 8  # two cells, of 6 and 4 tokens
    gene_head = 6 * (2 * 64 + 3 * (64 + 8 * 100))  # 2 cells, 3 masked positions
    value_head = 6 * (2 * 64 + 3 * (2 * 64 + 2 * 8 * 4))
    flops = MaskedCellEncoder(config).training_flops([6, 4], 3)
    assert flops == body + attention + gene_head + value_head


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_activations_are_what_autograd_keeps(changes, dtype):
    config = EncoderConfig(**{**SMALL, **changes})
    model = MaskedCellEncoder(config)
    planned = model.activation_bytes(
        num_tokens=NUM_CELLS * NUM_TOKENS,
        num_cells=NUM_CELLS,
        num_masked=NUM_CELLS * NUM_MASKED,
        is_mixed=dtype is not None,
    )
    # Of the logits a forward pass keeps the log probabilities, a third of what the backward pass takes.
    forward = planned.body + planned.heads + planned.logits / 3
    assert forward == pytest.approx(bytes_saved(model, made_up_batch(config), dtype), rel=0.05)


def test_checkpointing_keeps_the_inputs_of_blocks_and_one_block():
    arguments = {"num_tokens": 100, "num_cells": 2, "num_masked": 10, "is_mixed": True}
    plain = MaskedCellEncoder(EncoderConfig(**{**SMALL, "num_layers": 10}))
    saving = MaskedCellEncoder(EncoderConfig(**{**SMALL, "num_layers": 10, "activation_checkpointing": True}))
    one = MaskedCellEncoder(EncoderConfig(**{**SMALL, "num_layers": 1}))
    bodies = [model.activation_bytes(**arguments).body for model in (plain, saving, one)]
    assert bodies[1] == bodies[2] + 10 * 100 * 4 * 32
    assert bodies[1] < bodies[0]


HAND = ModelSizes(
    num_trained=1000,
    num_frozen=200,
    weight_bytes=4800,
    gradient_bytes=4000,
    buffer_bytes=50,
    optimizer_bytes=8020,
    optimizer_tensors=2.0,
)


@pytest.mark.parametrize(
    ("sharding", "ranks", "is_mixed", "weights", "master", "gradients", "optimizer"),
    [
        ("DDP", 1, True, 4850, 0, 4000, 8020),
        ("DDP", 4, False, 4850, 0, 4000, 8020),
        ("ZeRO-1", 4, True, 2450, 1000, 2000, 2000),
        ("ZeRO-2", 4, True, 2450, 1000, 1000, 2000),
        ("ZeRO-3", 4, True, 650, 1000, 1000, 2000),
        ("ZeRO-2", 2, False, 4850, 2000, 2000, 4000),
        ("ZeRO-3", 2, False, 2450, 0, 2000, 4000),
    ],
)
def test_what_a_rank_keeps_of_a_hand_worked_model(
    sharding, ranks, is_mixed, weights, master, gradients, optimizer
):
    kept = state_bytes(HAND, sharding, ranks, is_mixed=is_mixed)
    assert (kept.weights, kept.master_weights, kept.gradients, kept.optimizer) == (
        weights,
        master,
        gradients,
        optimizer,
    )


def test_working_bytes_are_buckets_copies_and_gathered_weights():
    assert state_bytes(HAND, "DDP", 1, is_mixed=False).working == 0
    assert state_bytes(HAND, "DDP", 2, is_mixed=False).working == 4000
    assert state_bytes(HAND, "DDP", 2, is_mixed=True).working == 4000 + 2400
    assert state_bytes(HAND, "ZeRO-2", 2, is_mixed=True).working == 2 * costs.BUCKET_ELEMENTS
    assert state_bytes(HAND, "ZeRO-3", 2, is_mixed=True).working == 2 * costs.BUCKET_ELEMENTS + 2400


def test_the_largest_micro_batch_fills_what_the_state_leaves():
    gpu = Gpu("made up", 10, {"bf16": 1}, ())
    kept = state_bytes(HAND, "DDP", 1, is_mixed=False)
    free = 10e9 - costs.RESERVED_BYTES - kept.total
    assert costs.largest_micro_batch(gpu, kept, 1e9) == int(free // 1e9) == 5
    assert costs.largest_micro_batch(gpu, kept, 1e10) == 0
    assert costs.largest_micro_batch(Gpu("small", 3, {}, ()), kept, 1.0) == 0


def test_seconds_and_utilization_are_each_other_s_inverse():
    seconds = costs.seconds_of(3e15, num_devices=4, peak=1e15, mfu=0.25)
    assert seconds == 3.0
    assert costs.model_flops_utilization(3e15, seconds, num_devices=4, peak=1e15) == 0.25


@pytest.mark.parametrize(
    ("batch", "lengths"),
    [
        (
            {"tokens": torch.zeros(2, 5), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()},
            [2, 1],
        ),
        ({"tokens": torch.zeros(1, 16), "cu_seqlens": torch.tensor([0, 4, 11])}, [4, 7]),
        ({"tokens": torch.zeros(2, 5)}, [5, 5]),
        ({"tokens": torch.zeros(3)}, [1, 1, 1]),
        ({"tokens": torch.zeros(2, 4, 5)}, [20, 20]),
    ],
    ids=["padded", "packed", "without a mask", "one token a cell", "sets of cells"],
)
def test_lengths_of_cells_leave_padding_out(batch, lengths):
    assert costs.cell_lengths(batch) == lengths


def test_an_unknown_gpu_is_an_error_that_names_the_table():
    with pytest.raises(ConfigError, match=r"--gpu: V100 is not in the table; it has .*H100 \(80 GB\).*L4"):
        find_gpu("V100")


def test_gpus_are_told_apart_by_what_cuda_calls_them():
    found = [
        costs.gpu_of_device(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H100 PCIe")
    ]
    assert [gpu and gpu.name for gpu in found] == ["H100", "H200", None]
    assert find_gpu("h100").peak("fp16") == 989e12
    assert find_gpu("A100-80GB").peak("fp8") is None and find_gpu("H100").peak("fp32") is None
    assert costs.peak_of_device(torch.device("cpu"), "bf16") is None


def test_of_a_model_that_mixes_its_own_layers_with_ours_only_ours_are_multiplied_in_fp8():
    factory = LayerFactory()
    model = torch.nn.Sequential(
        factory.norm_linear("0", 24, 32), factory.linear("1", 32, 40), torch.nn.Linear(40, 3)
    )
    assert costs.linear_sizes(model) == {
        "0.in_features": 24, "0.out_features": 32, "1.in_features": 32, "1.out_features": 40,
    }  # fmt: skip


def test_without_a_name_the_machine_s_own_gpu_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_gpu(None).name == "H100"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    assert choose_gpu(None).name == "L4"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T4")
    assert choose_gpu(None).name == "H100"


def test_fp8_misfits_are_named_with_what_would_fit():
    assert costs.misfits({"hidden_dim": 40, "ffn_dim": 160, "small": 3}) == [
        "hidden_dim is 40: the nearest multiples of 16 are 32 and 48",
        "small is 3: the nearest multiples of 16 are 16 and 16",
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    cells = make_cells(100, NUM_GENES, 30)
    return write_corpus(tmp_path_factory.mktemp("corpus") / "cells", cells, NUM_GENES)


def run_config(corpus, **changes):
    phase = {
        "name": "one",
        "dataloader_factory": "data.loader.cell_loader",
        "dataloader_args": {
            "path": str(corpus),
            "tokenizer": {"strategy": "binned_expression", "n_bins": 5, "max_genes": 64},
            "masking": {"mask_ratio": 0.2, "target": "both"},
        },
        "epochs": 3,
    }
    return {
        "run_name": "planned",
        "model": {
            "model_class": "models.encoder.MaskedCellEncoder",
            "config_class": "models.encoder.EncoderConfig",
            "config_args": {"hidden_dim": 24, "num_layers": 1, "num_heads": 2},
        },
        "micro_batch_size": 4,
        "global_batch_size": 16,
        "datasets": [phase],
        **changes,
    }


def planned(folder, config, gpu="H100", world_sizes=(1, 2), **options):
    path = write_config(folder, config)
    settings = {"mfu": 0.5, "sample_cells": 1000, **options}
    return make_plan(load_run_config(path), find_gpu(gpu), world_sizes=world_sizes, **settings)


def test_parameters_and_state_are_those_of_a_real_run(corpus, tmp_path):
    config = run_config(corpus, device="cpu")
    plan = planned(tmp_path / "plan", config)
    folder = train(tmp_path / "run", config)
    saved = open_checkpoint(sorted(folder.glob("checkpoint_*"))[-1])
    weights = open_tensors(saved).model_weights()
    buffers = {"value_head.prior"}
    assert plan.num_parameters == sum(t.numel() for n, t in weights.items() if n not in buffers)
    state = saved.shared("run_state.safetensors")["optimizer"]
    tensors = list(itertools.chain.from_iterable(held.values() for held in state.values()))
    optimizer = sum(t.numel() * t.element_size() for t in tensors)
    kept = next(s.bytes for s in plan.states if (s.sharding, s.world_size) == ("DDP", 1))
    assert kept.optimizer == optimizer
    assert kept.weights == sum(t.numel() * t.element_size() for t in weights.values())
    assert plan.checkpoint_bytes["DDP"] == kept.weights + kept.optimizer
    on_disk = sum(
        (saved.folder / name).stat().st_size for name in ("model.safetensors", "run_state.safetensors")
    )
    assert plan.checkpoint_bytes["DDP"] == pytest.approx(on_disk, rel=0.2)


def test_steps_cells_and_lengths_are_those_of_a_real_run(corpus, tmp_path):
    config = run_config(corpus, device="cpu", global_batch_size=24)
    config["datasets"][0] |= {"max_steps_per_epoch": 4, "max_steps": 10, "epochs": 5}
    plan = planned(tmp_path / "plan", config)
    steps = records(train(tmp_path / "run", config))
    on_one = plan.phases[0].on_ranks[0]
    assert on_one.steps == len(steps) == 10
    assert on_one.cells == sum(step["cells"] for step in steps)
    first = planned(tmp_path / "first", config, sample_cells=24).phases[0].sample
    assert first.num_cells == 24
    assert first.tokens_per_cell * 24 == pytest.approx(steps[0]["tokens"])


def test_a_last_batch_that_is_not_full_is_counted(corpus, tmp_path):
    config = run_config(corpus, device="cpu")
    on_one = planned(tmp_path, config).phases[0].on_ranks[0]
    assert (on_one.steps, on_one.cells) == (3 * 7, 3 * 100)


def test_hours_and_loader_rate_follow_from_peak_and_assumption(corpus, tmp_path):
    plan = planned(tmp_path, run_config(corpus), mfu=0.25)
    phase = plan.phases[0]
    for on in phase.on_ranks:
        rate = 0.25 * 989e12 * on.world_size / phase.sample.flops_per_cell
        assert on.cells_per_second == pytest.approx(rate)
        assert on.hours == pytest.approx(300 / rate / 3600)


def test_a_number_of_ranks_that_does_not_divide_says_why(corpus, tmp_path):
    plan = planned(tmp_path, run_config(corpus), world_sizes=(1, 3))
    assert plan.phases[0].on_ranks[0].problem is None
    assert "global batch 16 is not a multiple of micro-batch 4 x 3 ranks" in (
        plan.phases[0].on_ranks[1].problem or ""
    )
    assert "does not run" in render(plan) and "one on 3: global batch 16" in render(plan)


@pytest.mark.parametrize(
    ("hours", "text"),
    [
        (6.64e-08, "under a second"),
        (0.01, "36 s"),
        (0.5, "30 min"),
        (3.14159, "3.14 h"),
        (47.0, "47 h"),
        (99.0, "4.1 days"),
        (1e6, "41,666.7 days"),
        (None, "-"),
    ],
)
def test_times_are_in_units_that_people_read(corpus, tmp_path, hours, text):
    plan = planned(tmp_path, run_config(corpus), world_sizes=(1,))
    phase = plan.phases[0]
    timed = replace(phase.on_ranks[0], hours=hours, cells_per_second=999_999.0)
    written = render(replace(plan, phases=[replace(phase, on_ranks=[timed])]))
    row = next(line for line in written.splitlines() if "999,999" in line)
    assert row.split("999,999")[0].rstrip().endswith(f"  {text}")
    assert "No loader gives" not in written


def test_a_rate_that_no_loader_gives_is_said_to_be_one(corpus, tmp_path):
    written = render(planned(tmp_path, run_config(corpus), world_sizes=(1,)))
    assert "over 1,000,000" in written
    assert "No loader gives 1,000,000 cells/s: the GPU will wait for the data and the host" in written


def test_without_a_peak_hours_are_left_out_and_that_is_said(corpus, tmp_path):
    plan = planned(tmp_path, run_config(corpus, precision="fp32"))
    assert plan.phases[0].on_ranks[0].hours is None
    assert "the table has no peak of H100 in fp32, so times are left out" in render(plan)


def test_dimensions_that_fp8_cannot_take_are_named_whatever_the_precision(corpus, tmp_path):
    text = render(planned(tmp_path, run_config(corpus)))
    assert "hidden_dim is 24: the nearest multiples of 16 are 16 and 32" in text
    assert "ffn_dim" not in text


def test_emulated_fp8_is_planned_as_fp8_and_that_is_said(corpus, tmp_path):
    config = run_config(corpus, precision="fp8", fp8={"backend": "emulate"})
    config["model"]["config_args"] |= {"hidden_dim": 32}
    plan = planned(tmp_path, config)
    assert plan.peak_tflops == 1979 and plan.fp8_misfits == []
    assert "emulate computes in fp32" in render(plan)


def test_planning_takes_no_memory_for_the_model(corpus, tmp_path):
    config = run_config(corpus)
    config["model"]["config_args"] |= {"hidden_dim": 16384, "num_layers": 96, "num_heads": 128}
    plan = planned(tmp_path, config, gpu="H200", world_sizes=(8,))
    assert plan.num_parameters > 3e11
    assert all(state.largest_micro_batch == 0 for state in plan.states)


def test_a_stream_is_read_to_its_end_and_no_further(tmp_path):
    phase = {"dataloader_factory": "toy.stream_loader", "max_steps": 100}
    assert planned(tmp_path, toy(phase)).phases[0].sample.num_cells == 48


def test_a_model_of_a_user_s_own_is_exact_in_parameters_and_estimated_in_operations(tmp_path):
    plan = planned(tmp_path, toy({}))
    expected = 32 * 8 + 8 + (8 * 8 + 8) + (8 + 1)
    assert plan.num_parameters == expected
    assert plan.phases[0].sample.flops_per_cell == 6 * expected * 6
    assert plan.phases[0].sample.activation_bytes_per_cell is None
    assert all(state.largest_micro_batch is None for state in plan.states)
    text = render(plan)
    assert "operations are an estimate, 6 x parameters x tokens" in text
    assert "activations and the largest micro-batch are left out" in text
    assert "body.0.in_features is 8: the nearest multiples of 16 are 16 and 16" in text


def test_parameters_that_every_phase_freezes_have_no_state(tmp_path):
    whole = planned(tmp_path / "a", toy({}))
    frozen = planned(tmp_path / "b", toy({"freeze": ["^embedding"]}))
    assert whole.num_trained_parameters - frozen.num_trained_parameters == 32 * 8
    states = [plan.states[0].bytes for plan in (whole, frozen)]
    assert states[0].optimizer - states[1].optimizer == 32 * 8 * 8 + 4  # two moments, and the count of steps
    assert states[0].weights == states[1].weights
    assert f"of which {frozen.num_trained_parameters:,} train" in render(frozen)


@pytest.mark.parametrize(
    ("optimizer", "values"),
    [("torch.optim.SGD", 0.0), ("torch.optim.RMSprop", 1.0), ("torch.optim.Adam", 2.0)],
)
def test_the_optimizer_s_own_state_is_counted(tmp_path, optimizer, values):
    config = toy({}, optimizer={"optimizer_class": optimizer, "optimizer_args": {"lr": 0.01}})
    plan = planned(tmp_path, config)
    kept = next(s.bytes for s in plan.states if (s.sharding, s.world_size) == ("ZeRO-2", 2))
    assert kept.optimizer == 4 * values * plan.num_trained_parameters / 2


def test_an_optimizer_that_looks_at_values_is_left_out_and_that_is_said(tmp_path):
    config = toy({}, optimizer={"optimizer_class": "toy.LooksAtValues", "optimizer_args": {"lr": 0.01}})
    plan = planned(tmp_path, config)
    assert plan.states[0].bytes.optimizer == 0
    assert "the state of LooksAtValues is left out of all sums" in render(plan)


def test_a_model_that_looks_at_values_is_built_in_memory_and_that_is_said(tmp_path):
    config = toy({}, model={"model_class": "toy.LooksAtItself", "model_args": {}})
    plan = planned(tmp_path, config)
    assert plan.num_parameters == planned(tmp_path / "plain", toy({})).num_parameters
    assert "the model was built in memory" in render(plan)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_the_shards_of_a_real_zero_run_are_what_is_planned(tmp_path, strategy):
    config = toy({"dataloader_args": {"batch_size": 2}}, micro_batch_size=2)
    plan = planned(tmp_path / "plan", config)
    train_ranks(2, tmp_path / "run", config, strategy=strategy)
    folder = sorted(newest_run(tmp_path / "run").glob("checkpoint_*"))[-1]
    sizes = []
    for file in sorted(folder.glob("shard.rank*.safetensors")):
        with safe_open(file, "pt") as tensors:
            held = [tensors.get_tensor(name) for name in tensors.keys()]  # noqa: SIM118
        sizes.append(sum(t.numel() * t.element_size() for t in held if t.ndim and t.is_floating_point()))
    kept = next(s.bytes for s in plan.states if (s.sharding, s.world_size) == (f"ZeRO-{strategy[-1]}", 2))
    of_rank = 4 * plan.num_trained_parameters / 2 + kept.optimizer
    assert sum(sizes) == 2 * of_rank
    assert sizes[0] == pytest.approx(of_rank, rel=0.1)
    assert plan.checkpoint_bytes[f"ZeRO-{strategy[-1]}"] == sum(sizes)


@pytest.mark.parametrize("sharding", ["ZeRO-1", "ZeRO-2", "ZeRO-3"])
def test_a_checkpoint_holds_fp32_weights_and_the_optimizer_s_state(sharding):
    assert checkpoint_bytes(HAND, sharding, is_mixed=False) == 4 * 3 * 1000 + 4 * 200 + 50
    assert checkpoint_bytes(HAND, "DDP", is_mixed=False) == 4800 + 50 + 8020


def test_the_command_prints_a_plan_and_its_json(corpus, tmp_path, capsys):
    path = str(write_config(tmp_path, run_config(corpus)))
    assert main(["--config", path, "--gpu", "L4", "--world-sizes", "1", "2", "global_batch_size=8"]) == 0
    text = capsys.readouterr().out
    assert "gpu           L4, 24 GB, peak in bf16 121 TFLOP/s (datasheet)" in text
    assert "4 x 2 x 1 = 8" in text and "4 x 1 x 2 = 8" in text
    assert main(["--config", path, "--gpu", "L4", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["gpu"] == "L4" and plan["phases"][0]["on_ranks"][0]["steps"] == 21


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "V100"], "is not in the table; it has"),
        (["--mfu", "1.5"], "--mfu: 1.5 is not a share of the peak"),
        (["--world-sizes", "0"], "--world-sizes: 0 is not a number of GPUs"),
        (["--world-sizes", "two"], "--world-sizes: two is not a number of GPUs"),
        (["--sample-cells", "0"], "--sample-cells: 0 is given"),
        (["no_such_key=1"], "no_such_key"),
    ],
)
def test_a_mistake_in_the_command_is_a_message_and_exit_code_2(tmp_path, capsys, arguments, message):
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(toy({})))
    assert main(["--config", str(path), *arguments]) == 2
    assert message in capsys.readouterr().err
