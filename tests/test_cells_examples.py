"""Every example of a typed configuration trains, shrunk; pretraining and fine-tuning do what their fields say."""

import contextlib
import io
import json
import re
import warnings
from dataclasses import replace

import anndata
import numpy as np
import pytest
import torch
import yaml
from census_files import write_census
from launching import ROOT
from running import comparable_records, final_weights, records, same_weights

import trainer.backbone
from models.encoder import MaskedCellEncoder
from trainer.backbone import read_backbone
from trainer.checkpoint_folder import list_checkpoints, open_checkpoint
from trainer.config import FinetuneConfig, load_config, load_run_config
from trainer.config.cells_run import pretraining_run, run_of
from trainer.config.compose import compose
from trainer.errors import UserError
from trainer.finetuning import FineTunePipeline
from trainer.launch import run as carry_out
from trainer.scoring_queue import ScoringQueue
from trainer.shards import full_weights
from trainer.train import main
from trainer.training import TrainingPipeline

pytestmark = pytest.mark.usefixtures("forked_programs")

SAMPLE = ROOT / "data" / "samples" / "10x_pbmc68k_reduced.h5ad"
EXAMPLES = [
    *(path for path in sorted((ROOT / "configs").glob("*.yaml")) if "datasets:" not in path.read_text()),
    *sorted((ROOT / "configs" / "cells").glob("*.yaml")),
]
SMALL = [
    "data.max_genes=32", "tokenizer.max_genes=32", "model.max_seq_len=32", "data.gene_vocab=from_data",
    "tokenizer.gene_vocab=from_data", "data.num_workers=0", "training.num_workers=0", "model.hidden_dim=16",
    "model.num_layers=1", "model.num_heads=2", "model.ffn_dim=32", "training.batch_size=140",
    "training.max_epochs=1", "training.num_gpus=null", "training.precision=32", "training.logger=csv",
    "training.val_split=0.2", "training.log_every_n_steps=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make a folder with labelled cells, gene vectors, a converted corpus and a pretrained run."""
    folder = tmp_path_factory.mktemp("cells")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is of an old format
        cells = anndata.read_h5ad(SAMPLE)
    generator = np.random.default_rng(0)
    cells.obs["cell_type"] = cells.obs["bulk_labels"].astype(str)
    cells.obs["donor"] = generator.choice(["one", "two"], len(cells))
    cells.obs["disease_status"] = generator.choice(["well", "ill"], len(cells))
    cells.obs["perturbation"] = generator.choice(["control", "a", "b", "c", "d", "e", "f"], len(cells))
    cells.obs["age"] = generator.normal(40, 5, len(cells))
    cells.write_h5ad(folder / "cells.h5ad")
    np.save(folder / "vectors.npy", generator.normal(size=(40, 200)).astype(np.float32))
    (folder / "vectors.txt").write_text("\n".join(cells.raw.var_names[:40]) + "\n")
    return folder


def here(place, *overrides):
    """Return overrides with which an example trains on this machine in a second."""
    return [
        *SMALL, f"data.paths=[{place / 'cells.h5ad'}]", f"data.cache_dir={place / 'cache'}",
        f"training.checkpoint_dir={place / 'runs'}", f"training.log_dir={place / 'logs'}", *overrides,
    ]  # fmt: skip


def written(place, *overrides):
    """Return a configuration that consists of overrides alone."""
    path = place / "empty.yaml"
    path.write_text("")
    return load_config(path, here(place, *overrides))


def quietly(pipeline):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return pipeline.run()


@pytest.fixture(scope="module")
def pretrained(place):
    return quietly(TrainingPipeline(written(place, "training.run_name=pretrained", "training.max_epochs=2")))


def weights(run_folder, which=-1):
    return full_weights(open_checkpoint(list_checkpoints(run_folder)[which]))


# Examples


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_example_is_a_whole_configuration(path, place):
    config = load_config(path, here(place))
    run = pretraining_run(config)
    copy = place / "copy.yaml"
    from trainer.config import dump_yaml

    copy.write_text(dump_yaml(run))
    assert load_run_config(copy) == run


def shrunk(path, place, census_uri=None):
    """Return the overrides that an example needs beside the common ones."""
    raw, *_ = compose(path, [])
    extra = []
    if raw.get("tokenizer", {}).get("strategy") == "gene_embedding":
        extra.append(f"tokenizer.embedding_path={place / 'vectors.npy'}")
    if raw.get("data", {}).get("source") == "cellxgene_census":
        extra += [f"data.census.uri={census_uri}", "data.census.filters={tissue: [brain, lung]}"]
        extra += ["data.census.obs_columns=[tissue]", "data.census.census_version=stable"]
    if "scheduler" in raw.get("training", {}):
        extra += ["training.scheduler.warmup_steps=1", "training.scheduler.total_steps=4"]
    if raw.get("eval"):
        extra += ["eval.every_n_epochs=2"]  # at the start alone: a process for each that scores takes seconds
    return extra


@pytest.fixture(scope="module")
def census_uri(place):
    pytest.importorskip("tiledbsoma", reason="needs the extra census")
    return write_census(place / "census").uri


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_example_pretrains(path, place, request):
    is_census = "cellxgene_census" in path.read_text() and path.name != "complete.yaml"
    uri = request.getfixturevalue("census_uri") if is_census else None
    config = load_config(path, here(place, *shrunk(path, place, uri)))
    folder = quietly(TrainingPipeline(config))
    steps = records(folder)
    assert steps and all(np.isfinite(step["loss"]) for step in steps)
    assert bool(records(folder, "benchmark")) == bool(config.eval.benchmarks)


@pytest.mark.parametrize(
    "path",
    [path for path in EXAMPLES if "\nfinetune:" in f"\n{path.read_text()}"],
    ids=lambda path: str(path.relative_to(ROOT / "configs")),
)
def test_every_example_with_a_section_finetune_fine_tunes(path, place, pretrained):
    overrides = [*here(place, *shrunk(path, place)), f"finetune.checkpoint_path={pretrained}"]
    overrides += ["training.max_epochs=2", "eval.benchmarks=[]"]
    config = load_config(path, overrides)
    if config.finetune.freeze_backbone_epochs:
        config.finetune.freeze_backbone_epochs = 1
    folder = quietly(FineTunePipeline(config))
    assert all(np.isfinite(step["loss"]) for step in records(folder))
    assert len({step["phase"] for step in records(folder)}) == 1 + config.finetune.freeze_backbone_epochs


def blocks_of_the_page():
    """Return the YAML blocks of docs/cells.md, each merged over the first, which is whole."""
    blocks = re.findall(
        r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "cells.md").read_text(), re.MULTILINE | re.DOTALL
    )
    first, *others = [yaml.safe_load(block) for block in blocks]
    return [first, *({**first, **other} for other in others)]


@pytest.mark.parametrize("number", range(2))
def test_the_configurations_of_the_page_train(number, place, tmp_path, pretrained):
    path = tmp_path / "page.yaml"
    path.write_text(yaml.safe_dump(blocks_of_the_page()[number]))
    overrides = here(place)
    if number == 0:
        folder = quietly(TrainingPipeline(load_config(path, overrides)))
    else:
        backbone = [f"finetune.checkpoint_path={pretrained}", "tokenizer={}", "training.max_epochs=2"]
        folder = quietly(FineTunePipeline(load_config(path, [*overrides, *backbone, *SMALL[:3]])))
    assert records(folder)


# Commands


def test_a_check_names_what_is_wrong_and_opens_no_data(place, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("data: {paths: [nothing.h5ad]}\n")
    assert main(["--config", str(path), "--check"]) == 0
    assert main(["--config", str(path), "--check", "model.hidden_dim=10"]) == 2
    said = capsys.readouterr()
    assert "stage 2, dotted paths and their arguments: ok" in said.out
    assert "model.num_heads: 8 heads do not divide hidden_dim 10" in said.err


def test_the_printed_configuration_is_the_run_that_is_carried_out(place, tmp_path, capsys):
    path = ROOT / "configs" / "geneformer_basic.yaml"
    assert main(["--config", str(path), "--print-config", *here(place)]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_run_config(printed) == load_run_config(path, here(place))


def test_a_phases_configuration_is_not_fine_tuned(capsys):
    assert main(["--config", str(ROOT / "configs" / "debug.yml")], command="finetune") == 2
    assert "`datasets` makes this a phases config, which finetune does not run" in capsys.readouterr().err


def test_fine_tuning_without_a_section_or_a_backbone_says_what_to_write(place, capsys):
    path = str(ROOT / "configs" / "pretraining.yaml")
    assert main(["--config", path, "--check"], command="finetune") == 2
    assert "finetune.checkpoint_path=FOLDER" in capsys.readouterr().err
    assert main(["--config", path, "--check", "finetune={}"], command="finetune") == 2
    assert "finetune.checkpoint_path: is empty" in capsys.readouterr().err
    assert main(["--config", path, "--check", "finetune.checkpoint_path=none.ckpt"], command="finetune") == 2
    assert "finetune.checkpoint_path: none.ckpt does not exist" in capsys.readouterr().err


def test_a_dry_run_writes_nothing(place, tmp_path, capsys):
    path = str(ROOT / "configs" / "geneformer_basic.yaml")
    assert (
        main(["--config", path, "--dry-run", *here(place, f"training.checkpoint_dir={tmp_path / 'r'}")]) == 0
    )
    assert "dry run: phase 'pretraining' loss" in capsys.readouterr().out
    assert not (tmp_path / "r").exists()


def test_the_account_names_what_is_not_used(place, capsys):
    path = str(ROOT / "configs" / "complete.yaml")
    overrides = here(
        place, "training.scheduler.warmup_steps=1", "training.scheduler.total_steps=4", "eval={}"
    )
    assert main(["--config", path, "--dry-run", *overrides]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "not used by this run: finetune (the command is train)" in said
    assert (
        "model.decoder_dim, model.decoder_layers, model.decoder_heads (model.architecture is transformer_encoder)"
        in said
    )


# Pretraining


def test_pretraining_is_the_same_from_python_and_from_the_run_that_is_printed(place, tmp_path):
    from trainer.config import dump_yaml

    config = written(place, f"training.checkpoint_dir={tmp_path / 'one'}")
    first = quietly(TrainingPipeline(config))
    path = tmp_path / "run.yaml"
    config.training.checkpoint_dir = str(tmp_path / "two")
    path.write_text(dump_yaml(TrainingPipeline(config).run_config()))
    with contextlib.redirect_stdout(io.StringIO()):
        assert carry_out(load_run_config(path)) == 0
    (second,) = (tmp_path / "two").iterdir()
    assert same_weights(first, second)


@pytest.mark.slow
def test_what_is_changed_in_a_configuration_counts_when_it_runs(place, tmp_path):
    config = written(place)
    pipeline = TrainingPipeline(config)
    config.training.checkpoint_dir = str(tmp_path)
    config.training.max_epochs = 2
    config.model.num_layers = 2
    folder = quietly(pipeline)
    assert records(folder)[-1]["epoch"] == 1
    assert any(name.startswith("transformer.layers.1.") for name in final_weights(folder))


@pytest.mark.parametrize("architecture", ["autoregressive_transformer", "masked_autoencoder"])
@pytest.mark.parametrize("strategy", ["rank_value", "binned_expression", "continuous_projection"])
def test_every_architecture_trains_on_every_kind_of_tokens(architecture, strategy, place):
    overrides = [f"model.architecture={architecture}", f"tokenizer.strategy={strategy}"]
    folder = quietly(TrainingPipeline(written(place, *overrides, "model.pooling=mean")))
    assert np.isfinite(records(folder)[-1]["loss"])


def test_the_schedule_fits_a_short_run_and_written_lengths_are_kept(place):
    fitted = quietly(
        TrainingPipeline(written(place, "training.max_epochs=5", "training.optimizer.lr=1.0e-3"))
    )
    rates = [record["lr"] for record in records(fitted)]
    assert len(rates) == 20 and rates[0] == pytest.approx(5e-4) and max(rates) == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(0.0, abs=1e-9)
    kept = ["training.scheduler.warmup_steps=2", "training.scheduler.total_steps=3"]
    rates = [record["lr"] for record in records(quietly(TrainingPipeline(written(place, *kept))))]
    assert rates == pytest.approx([5e-5, 1e-4, 0.0, 0.0], abs=1e-12)


@pytest.fixture
def asked_scores(monkeypatch):
    """Return the requests for scores, none of which is carried out: that takes seconds for each."""
    requests = []
    monkeypatch.setattr(ScoringQueue, "submit", lambda queue, name, request: requests.append(request))
    return requests


def test_benchmarks_run_every_so_many_epochs(place, asked_scores):
    probe = ["eval.benchmarks=[linear_probe]", "training.max_epochs=3", "eval.every_n_epochs=2"]
    quietly(TrainingPipeline(written(place, *probe)))
    # The first one is made before anything is learnt.
    assert [(request["kind"], request["epoch"]) for request in asked_scores] == [
        ("benchmark", 0),
        ("benchmark", 2),
    ]


def test_benchmarks_embed_so_many_cells_at_a_time(place, asked_scores, monkeypatch):
    sizes, encode = [], MaskedCellEncoder.encode

    def counted(self, batch):
        sizes.append(len(batch["tokens"]))
        return encode(self, batch)

    monkeypatch.setattr(MaskedCellEncoder, "encode", counted)
    probe = ["eval.benchmarks=[linear_probe]", "eval.every_n_epochs=1", "eval.batch_size=50"]
    quietly(TrainingPipeline(written(place, *probe)))
    assert max(sizes) == 50 and sum(sizes) >= 140 and asked_scores


# Fine-tuning


def fine_tuning(place, pretrained, *overrides):
    config = written(
        place, f"finetune.checkpoint_path={pretrained}", "training.optimizer.lr=1.0e-2", *overrides
    )
    return FineTunePipeline(config)


def backbone_moved(folder, pretrained, which=-1):
    """Return the names of the backbone's own weights that differ from the pretrained ones."""
    start = weights(pretrained)
    own = {
        name.removeprefix("backbone.").replace(".base_layer.", "."): tensor
        for name, tensor in weights(folder, which).items()
        if name.startswith("backbone.") and ".lora_" not in name
    }
    assert own.keys() <= start.keys() and len(own) > 10
    return [name for name, tensor in own.items() if not torch.equal(tensor, start[name])]


def test_a_fine_tuned_model_starts_from_the_weights_of_its_backbone(place, pretrained):
    folder = quietly(fine_tuning(place, pretrained, "training.optimizer.lr=1.0e-30"))
    moved = backbone_moved(folder, pretrained)
    assert moved == []


def test_a_fine_tuned_model_learns_labels_and_goes_on_after_a_resume(place, pretrained, tmp_path):
    overrides = [
        "training.max_epochs=6",
        "finetune.freeze_backbone_epochs=2",
        f"training.checkpoint_dir={tmp_path}",
    ]
    overrides += ["training.save_top_k=20"]
    whole = quietly(fine_tuning(place, pretrained, *overrides))
    evaluations = records(whole, "validation")
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    saved = list_checkpoints(whole)[0]
    assert open_checkpoint(saved).summary["phase"] == "head"
    resumed = quietly(fine_tuning(place, pretrained, *overrides, f"training.resume_from={saved}"))
    assert resumed == whole
    assert [record["epoch"] for record in records(resumed) if record["phase"] == "all"][-1] == 3
    assert comparable_records(resumed)[-1]["loss"] == evaluations[-1]["loss"]


def test_a_frozen_backbone_stays_as_it_was(place, pretrained):
    folder = quietly(fine_tuning(place, pretrained, "finetune.freeze_backbone=true"))
    assert backbone_moved(folder, pretrained) == []


def test_a_backbone_that_is_frozen_at_first_trains_from_the_epoch_that_is_set(place, pretrained, tmp_path):
    folder = quietly(
        fine_tuning(
            place, pretrained, "training.max_epochs=3", "finetune.freeze_backbone_epochs=2",
            "training.save_top_k=9", f"training.checkpoint_dir={tmp_path}",
        )
    )  # fmt: skip
    phases = [(record["phase"], record["epoch"]) for record in records(folder)]
    assert sorted(set(phases)) == [("all", 0), ("head", 0), ("head", 1)]
    of_step = {open_checkpoint(path).step: index for index, path in enumerate(list_checkpoints(folder))}
    ends_of_head = sum(phase == "head" for phase, _ in phases)
    assert backbone_moved(folder, pretrained, of_step[ends_of_head]) == []
    assert backbone_moved(folder, pretrained)


def test_lora_trains_its_adapters_alone(place, pretrained):
    folder = quietly(fine_tuning(place, pretrained, "finetune.lora.enabled=true", "training.max_epochs=2"))
    assert backbone_moved(folder, pretrained) == []
    adapters = {name: tensor for name, tensor in weights(folder).items() if ".lora_B" in name}
    assert len(adapters) == 3 and all(tensor.abs().max() > 0 for tensor in adapters.values())


def test_backbone_and_head_have_their_own_learning_rates(place, pretrained):
    folder = quietly(
        fine_tuning(
            place,
            pretrained,
            "finetune.backbone_lr=1.0e-4",
            "finetune.head_lr=1.0e-2",
            "training.scheduler=null",
        )
    )
    record = records(folder)[0]
    assert record["lr/backbone"] == record["lr/backbone_no_decay"] == 1e-4
    assert record["lr/head"] == record["lr/head_no_decay"] == 1e-2


def test_numbers_are_predicted_by_a_regression(place, pretrained):
    folder = quietly(
        fine_tuning(
            place,
            pretrained,
            "finetune.label_key=age",
            "finetune.head.task=regression",
            "training.max_epochs=2",
        )
    )
    losses = [record["loss"] for record in records(folder)]
    assert all(np.isfinite(losses)) and losses[-1] < losses[0]


def test_several_numbers_are_predicted_by_a_regression(place, pretrained):
    task = ["finetune.label_key=[age, percent_mito]", "finetune.head.task=regression"]
    folder = quietly(fine_tuning(place, pretrained, *task, "finetune.head.output_dim=2"))
    assert weights(folder)["head.output.weight"].shape[0] == 2
    assert np.isfinite(records(folder)[-1]["loss"])
    with pytest.raises(UserError, match=r"output_dim: 3 numbers for each cell need.*label_key names 2"):
        fine_tuning(place, pretrained, *task, "finetune.head.output_dim=3").run_config()
    with pytest.raises(UserError, match=r"finetune\.label_key: names 2 columns, but a cell has one class"):
        fine_tuning(place, pretrained, task[0]).run_config()


def test_what_is_written_of_the_backbone_must_agree_with_it(place, pretrained):
    for override, message in (
        ("model.hidden_dim=32", r"model\.hidden_dim: 32 is not what the backbone has, 16; leave it out"),
        (
            "tokenizer.strategy=binned_expression",
            r"tokenizer\.strategy: 'binned_expression' is not .*'rank_value'",
        ),
        ("model.architecture=masked_autoencoder", r"model\.architecture: 'masked_autoencoder' is not what"),
    ):
        with pytest.raises(UserError, match=message):
            fine_tuning(place, pretrained, override).run_config()


def test_longer_cells_than_the_backbone_takes_are_refused_and_shorter_ones_are_not(place, pretrained):
    lengths = ["data.max_genes", "tokenizer.max_genes", "model.max_seq_len"]
    with pytest.raises(UserError, match=r"64 is more than the 32 tokens that the backbone takes"):
        fine_tuning(place, pretrained, *(f"{path}=64" for path in lengths)).run_config()
    run = fine_tuning(place, pretrained, *(f"{path}=16" for path in lengths)).run_config()
    assert run.datasets[0].dataloader_args["tokenizer"]["max_genes"] == 16
    assert run.model.config_args["backbone_config"]["max_seq_len"] == 32


def test_a_backbone_may_be_a_checkpoint_or_an_export(place, pretrained, tmp_path):
    from trainer.export import export

    export(pretrained, tmp_path / "exported")
    checkpoint = list_checkpoints(pretrained)[-1]
    runs = [fine_tuning(place, path).run_config() for path in (pretrained, checkpoint, tmp_path / "exported")]
    configs = [dict(run.model.config_args["backbone_config"]) for run in runs]
    assert configs[0] == configs[1] == configs[2] and configs[0]["vocab_size"] == 769
    tokenizers = [run.datasets[0].dataloader_args["tokenizer"] for run in runs]
    assert tokenizers[0] == tokenizers[1] == tokenizers[2]
    assert runs[0].init_from == runs[1].init_from == str(checkpoint)
    json.dumps(configs[0])


def test_values_become_what_the_backbone_read_whatever_the_file_holds(place, pretrained, monkeypatch):
    arguments = fine_tuning(place, pretrained).run_config().datasets[0].dataloader_args
    assert arguments["preprocessing"] == {"normalize": "library_size", "log1p": True, "target_sum": 1e4}
    assert not {"normalize", "log1p", "target_sum"} & arguments["tokenizer"].keys()
    of_counts = replace(
        read_backbone(pretrained, "x"),
        value_kind="counts",
        tokenizer={**arguments["tokenizer"], "normalize": "library_size", "target_sum": 500.0, "log1p": True},
    )
    monkeypatch.setattr(trainer.backbone, "read_backbone", lambda path, where: of_counts)
    arguments = fine_tuning(place, pretrained).run_config().datasets[0].dataloader_args
    assert arguments["preprocessing"] == {"normalize": "library_size", "log1p": True, "target_sum": 500.0}
    with pytest.raises(
        UserError, match=r"data\.preprocessing\.target_sum: .* is not what the backbone has, 500"
    ):
        fine_tuning(place, pretrained, "data.preprocessing.target_sum=1000").run_config()


def test_a_backbone_that_would_never_train_is_refused(place, pretrained):
    with pytest.raises(UserError, match=r"freeze_backbone_epochs: 1 is not below training\.max_epochs 1"):
        fine_tuning(place, pretrained, "finetune.freeze_backbone_epochs=1").run_config()


def test_the_same_configuration_pretrains_and_fine_tunes(place, pretrained):
    config = written(place)
    config.finetune = FinetuneConfig(checkpoint_path=str(pretrained))
    assert run_of(config, "train").model.model_class == "models.encoder.MaskedCellEncoder"
    assert run_of(config, "finetune").model.model_class == "models.fine_tuned.FineTunedModel"
