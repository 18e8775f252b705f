"""Training on converted cells with our own loader and encoder: one process, several ranks, Arrow and Parquet."""

import json
import shutil

import numpy as np
import pytest
from corpora import Cells, make_cells, write_corpus
from running import (
    comparable_records,
    copy_until,
    final_weights,
    newest_run,
    records,
    same_weights,
    toy,
    train,
    train_ranks,
)
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from data.genes import GeneSpace
from data.loader import DrawKey, cell_loader
from data.synthetic import make_synthetic_counts
from trainer.errors import CheckpointError, ConfigError
from trainer.statefile import load_tree

NUM_GENES = 40
ENCODER = {
    "model_class": "logged.LoggedEncoder",
    "config_class": "models.encoder.EncoderConfig",
    "config_args": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
}
TOKENIZER = {"strategy": "binned_expression", "binning_method": "per_cell", "n_bins": 5, "max_genes": 24}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    cells = make_cells(96, NUM_GENES, 12)
    for storage in ("arrow", "parquet"):
        write_corpus(folder / storage, cells, NUM_GENES, storage, rows_per_shard=37)
    write_corpus(folder / "other_genes", make_cells(30, NUM_GENES + 2, 12), NUM_GENES + 2)
    typed = make_synthetic_counts(300, NUM_GENES, 12, seed=1, num_batches=2, num_cell_types=3)
    columns = {"technical_batch": typed.technical_batch}
    typed_cells = Cells(typed.indptr, typed.indices, typed.counts, columns)
    write_corpus(folder / "typed", typed_cells, NUM_GENES, columns=("technical_batch",))
    return folder


def phase(path, **settings):
    arguments = {"path": str(path), "tokenizer": TOKENIZER, "masking": {"mask_ratio": 0.3, "target": "both"}}
    arguments |= settings.pop("arguments", {})
    return {"dataloader_factory": "data.loader.cell_loader", "dataloader_args": arguments, **settings}


def run_config(*phases, **changes):
    return toy(*phases, **{"model": ENCODER, "micro_batch_size": 4, **changes})


def dropout(rate):
    return {**ENCODER, "config_args": {**ENCODER["config_args"], "dropout": rate}}


def seen(log):
    files = sorted(log.parent.glob(f"{log.name}.*"))
    return [cell for file in files for line in file.read_text().splitlines() for cell in json.loads(line)]


def test_training_lowers_the_held_out_loss(tmp_path, corpora):
    training = phase(corpora / "typed", epochs=6, lr=0.01, arguments={"val_fraction": 0.2})
    folder = train(tmp_path, run_config(training))
    validation = [record["expression_loss"] for record in records(folder, "validation")]
    assert validation[-1] < 0.97 * validation[0]


def test_model_sizes_come_from_the_data(tmp_path, corpora):
    folder = train(tmp_path, run_config(phase(corpora / "arrow")))
    weights = final_weights(folder)
    assert weights["token_embedding.weight"].shape[0] == 4 + NUM_GENES
    assert weights["technical_batch_embedding.weight"].shape[0] == 3
    assert weights["value_head.bias"].shape == (4 + NUM_GENES, 5)


def test_a_vocabulary_smaller_than_the_data_is_an_error_with_both_numbers(tmp_path, corpora):
    model = {**ENCODER, "config_args": {**ENCODER["config_args"], "vocab_size": 10}}
    with pytest.raises(ConfigError, match="vocab_size: 10 was given, but the data needs 44"):
        train(tmp_path, run_config(phase(corpora / "arrow"), model=model))


def test_arrow_and_parquet_train_the_same_model(tmp_path, corpora):
    one, two = (train(tmp_path / s, run_config(phase(corpora / s, epochs=2))) for s in ("arrow", "parquet"))
    assert comparable_records(one) == comparable_records(two) and same_weights(one, two)


def test_training_and_validation_cells_are_disjoint_and_complete(corpora):
    source = cell_loader(corpora / "arrow", tokenizer=TOKENIZER, val_fraction=0.25, split_seed=7)
    training, validation = np.flatnonzero(source.row_mask), np.flatnonzero(source.validation.row_mask)
    assert len(validation) == 24 and sorted([*training, *validation]) == list(range(96))
    assert source.fetch(training[:3], DrawKey(0, 0, 0))["cell_index"].tolist() == training[:3].tolist()


def test_the_gene_space_is_saved_and_another_one_is_refused(tmp_path, corpora):
    folder = train(tmp_path, run_config(phase(corpora / "arrow")))
    saved = GeneSpace.from_json((folder / "checkpoint_4" / "genes.json").read_text())
    assert saved.sha256 == cell_loader(corpora / "arrow", tokenizer=TOKENIZER).facts()["gene_space"].sha256
    with pytest.raises(CheckpointError, match="its gene space has 40 genes, the data's has 42, 40 of them"):
        train(tmp_path / "b", run_config(phase(corpora / "other_genes")), init_from=str(folder))


def test_phases_in_different_gene_spaces_are_refused(tmp_path, corpora):
    with pytest.raises(ConfigError, match="different gene spaces .40 and 42 genes."):
        train(tmp_path, run_config(phase(corpora / "arrow"), phase(corpora / "other_genes")))


def test_a_checkpoint_offers_its_weights_as_plain_safetensors(tmp_path, corpora):
    folder = train(tmp_path, run_config(phase(corpora / "arrow")))
    assert "token_embedding.weight" in load_file(folder / "checkpoint_4" / "model.safetensors")


def test_fp8_in_emulation_pads_the_technical_batches_to_16(tmp_path, corpora):
    changes = {"precision": "fp8", "fp8": {"backend": "emulate"}}
    folder = train(tmp_path, run_config(phase(corpora / "arrow", lr=0.003), **changes))
    state = load_tree(folder / "checkpoint_4" / "run_state.safetensors")
    assert state["n_technical_batches"] == 16 and len(state["technical_batches"]) == 3
    assert final_weights(folder)["technical_batch_embedding.weight"].shape[0] == 3
    plain = train(tmp_path / "plain", run_config(phase(corpora / "arrow", lr=0.003)))
    ours, theirs = ([record["loss"] for record in records(f)] for f in (folder, plain))
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.1)


def test_fp8_that_cannot_be_had_is_an_error(tmp_path, corpora):
    with pytest.raises(ConfigError, match="fp8.backend: te"):
        train(tmp_path, run_config(phase(corpora / "arrow"), precision="fp8"))


def test_bf16_trains(tmp_path, corpora):
    folder = train(tmp_path, run_config(phase(corpora / "arrow", epochs=2), precision="bf16"))
    assert records(folder)[-1]["loss"] < records(folder)[0]["loss"] * 1.2
    assert final_weights(folder)["token_embedding.weight"].dtype.is_floating_point


def test_two_ranks_give_the_losses_of_one_on_the_same_cells(tmp_path, corpora):
    config = run_config(
        phase(corpora / "arrow", epochs=2, arguments={"val_fraction": 0.2}), global_batch_size=48
    )
    one, many = tmp_path / "one", tmp_path / "many"
    train_ranks(1, one, config, env={"TOY_LOG": str(one / "log")})
    train_ranks(2, many, config, env={"TOY_LOG": str(many / "log")})
    assert sorted(seen(one / "log")) == sorted(seen(many / "log"))
    for kind in ("train", "validation"):
        ours, theirs = ([r["loss"] for r in records(newest_run(folder), kind)] for folder in (many, one))
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("global_batch_size", [24, 48])
def test_every_cell_of_an_epoch_is_seen_once(tmp_path, corpora, num_ranks, global_batch_size):
    log = tmp_path / "log"
    config = run_config(phase(corpora / "arrow"), global_batch_size=global_batch_size)
    train_ranks(num_ranks, tmp_path, config, env={"TOY_LOG": str(log)})
    assert sorted(seen(log)) == list(range(96))


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1)])
def test_every_cell_is_seen_once_across_a_resume_on_other_ranks(tmp_path, corpora, before, after):
    config = run_config(phase(corpora / "arrow", save_every_steps=1))
    train_ranks(before, tmp_path, config, env={"TOY_LOG": str(tmp_path / "first")})
    folder = newest_run(tmp_path)
    for step in (3, 4):
        shutil.rmtree(folder / f"checkpoint_{step}", ignore_errors=True)
    train_ranks(after, tmp_path, config, resume_from="latest", env={"TOY_LOG": str(tmp_path / "rest")})
    done = [cell for step in ordered(tmp_path / "first", before)[:2] for cell in step]
    assert sorted(done + seen(tmp_path / "rest")) == list(range(96))


def ordered(log, num_ranks):
    """Return the cells of each optimizer step, of all ranks, one micro-batch of 4 after the other."""
    files = [log.with_name(f"{log.name}.{rank}") for rank in range(num_ranks)]
    per_rank = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    accumulation = 24 // (4 * num_ranks)
    steps = len(per_rank[0]) // accumulation
    return [
        [
            cell
            for lines in per_rank
            for line in lines[step * accumulation : (step + 1) * accumulation]
            for cell in line
        ]
        for step in range(steps)
    ]


def test_a_resumed_run_on_two_ranks_equals_one_that_was_not_interrupted(tmp_path, corpora):
    config = run_config(
        phase(corpora / "arrow", epochs=2, save_every_steps=3, arguments={"val_fraction": 0.2}),
        phase(corpora / "parquet", lr=0.003),
        model=dropout(0.2),
        global_batch_size=32,
    )
    for name in "ab":
        train_ranks(2, tmp_path / name, config)
    folder, reference = newest_run(tmp_path / "b"), newest_run(tmp_path / "a")
    for checkpoint in folder.glob("checkpoint_*"):
        if int(checkpoint.name.split("_")[1]) > 5:
            shutil.rmtree(checkpoint)
    train_ranks(2, tmp_path / "b", config, resume_from="latest")
    assert comparable_records(folder) == comparable_records(reference) and same_weights(folder, reference)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own
def test_compiled_layers_train_alike(tmp_path, corpora, monkeypatch, capsys):
    # What torch makes C++ of takes it minutes; the graphs, and what breaks them, are the same without that.
    compile_module, losses = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_module(module, backend="aot_eager"))
    config = run_config(phase(corpora / "arrow", max_steps=3))
    for on in (False, True):
        folder = train(tmp_path / str(on), config, compile=on)
        assert capsys.readouterr().out.count("compiled: 1 TransformerBlock") == on
        losses.append([record["loss"] for record in records(folder)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_compiling_is_refused_where_weights_are_gathered_between_layers(tmp_path, corpora):
    config = run_config(phase(corpora / "arrow", max_steps=3), compile=True)
    assert "does not work under ZeRO-3" in train_ranks(2, tmp_path, config, strategy="zero3", expect=2)


def test_a_step_reads_no_number_back_from_the_device(tmp_path, corpora, monkeypatch):
    import trainer.loop

    class Reads(TorchDispatchMode):
        """Note what would let the host wait for a GPU: scalars that are read, shapes that depend on values."""

        def __init__(self):
            super().__init__()
            self.found = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"):
                self.found.append(name)
            return function(*args, **(kwargs or {}))

    reads, step, num_steps = Reads(), trainer.loop.train_step, []

    def watched(*arguments):
        num_steps.append(1)
        with reads:
            return step(*arguments)

    monkeypatch.setattr(trainer.loop, "train_step", watched)
    optimizer = {"optimizer_args": {"lr": 0.01, "fused": True}}
    train(tmp_path, run_config(phase(corpora / "arrow", max_steps=4), optimizer=optimizer))
    assert len(num_steps) == 4 and reads.found == []


@pytest.fixture(scope="module")
def between_epochs(tmp_path_factory, corpora):
    """Return the configuration of a run of two epochs and then another phase, and its run folder."""
    first = phase(corpora / "arrow", epochs=2, arguments={"val_fraction": 0.25, "split_seed": 3})
    config = run_config(first, phase(corpora / "arrow"))
    return config, train(tmp_path_factory.mktemp("between"), config)


CHANGES = {
    "split_seed": ({"split_seed": 7}, "split_seed was 3 and is 7"),
    "val_fraction": ({"val_fraction": 0.5}, "val_fraction was 0.25 and is 0.5"),
    "masking": ({"masking": {"mask_ratio": 0.9, "target": "both"}}, "masking.mask_ratio was 0.3 and is 0.9"),
    "tokenizer": ({"tokenizer": {**TOKENIZER, "max_genes": 20}}, "tokenizer.max_genes was 24 and is 20"),
}


def changed(config, index, change):
    phases = [dict(each) for each in config["datasets"]]
    phases[index]["dataloader_args"] = {**phases[index]["dataloader_args"], **change}
    return {**config, "datasets": phases}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_phase_under_way_keeps_its_cells_between_epochs_too(tmp_path, between_epochs, change, message):
    config, whole = between_epochs
    copy_until(whole, 3, tmp_path)
    with pytest.raises(CheckpointError, match=f"datasets.0.dataloader_args.{message}.*has not begun"):
        train(tmp_path, changed(config, 0, change), resume_from="latest")


def test_files_that_have_changed_under_a_phase_are_refused_between_epochs(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", make_cells(48, NUM_GENES, 12), NUM_GENES)
    config = run_config(phase(corpus, epochs=2))
    copy_until(train(tmp_path / "whole", config), 2, tmp_path)
    shutil.rmtree(corpus)
    write_corpus(corpus, make_cells(48, NUM_GENES, 12, seed=1), NUM_GENES)
    with pytest.raises(CheckpointError, match="datasets.0: data was .* and is "):
        train(tmp_path, config, resume_from="latest")


@pytest.mark.parametrize(("index", "step"), [(0, 6), (1, 3)], ids=["that_is_over", "that_has_not_begun"])
def test_the_data_of_another_phase_may_change(tmp_path, between_epochs, index, step):
    config, whole = between_epochs
    folder = copy_until(whole, step, tmp_path)
    train(tmp_path, changed(config, index, {"split_seed": 9, "val_fraction": 0.25}), resume_from="latest")
    assert records(folder)[-1]["phase"] == "p1"
