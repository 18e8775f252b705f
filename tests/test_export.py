"""Exported models: the folder, loading it without a configuration, tokenizing new cells, and what is refused."""

import contextlib
import io
import json
import os
import pickle
import shutil
import stat
import subprocess
from types import SimpleNamespace
from typing import NamedTuple

import anndata
import numpy as np
import pytest
import torch
import yaml
from corpora import gene_space, make_cells, write_corpus
from hostile_checkpoints import changed_checkpoint, changed_state
from launching import run_command
from running import newest_run, toy, train, train_ranks
from safetensors.torch import load_file, save_file
from scipy import sparse
from torch import nn
from toy import ToyConfig, ToyModel

from data.errors import DataError
from data.exported import PhaseSettings, load_tokenizer, tokenizer_record
from data.loader import DrawKey, cell_loader
from data.tokenizer_options import build_tokenizer, complete_options
from models.cell_layout import cell_layout
from models.cell_model import CellModel
from models.encoder import EncoderConfig, MaskedCellEncoder
from models.errors import ModelError
from models.model_config import ModelConfig
from models.pretrained import ModelDescription, from_pretrained, save_pretrained
from trainer import export as export_module
from trainer import export_probe
from trainer.__main__ import main
from trainer.backbone import read_backbone
from trainer.checkpoint_folder import open_checkpoint
from trainer.checkpoint_model import load_trained
from trainer.config.load import dump_yaml, load_saved_config
from trainer.errors import CheckpointError, ConfigError, UserError
from trainer.export import export
from trainer.shards import SHARD, full_weights
from trainer.statefile import load_tree

pytestmark = pytest.mark.usefixtures("forked_programs")

NUM_GENES = 40
TOKENIZER = {"strategy": "binned_expression", "binning_method": "per_cell", "n_bins": 5, "max_genes": 24}
ENCODER = {
    "model_class": "models.encoder.MaskedCellEncoder",
    "config_class": "models.encoder.EncoderConfig",
    "config_args": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def run(home):
    """Train our encoder for four steps, with a checkpoint after each two, and take the data away."""
    cells = make_cells(60, NUM_GENES, 12)
    corpus = write_corpus(home / "secret_place" / "cells", cells, NUM_GENES)
    masking = {"mask_ratio": 0.3, "target": "both"}
    phase = {
        "name": "chips | and pipes",
        "dataloader_factory": "data.loader.cell_loader",
        "dataloader_args": {
            "path": str(corpus),
            "tokenizer": TOKENIZER,
            "masking": masking,
            "val_fraction": 0.2,
        },
        "epochs": 2,
    }
    folder = train(home / "ours", toy(phase, model=ENCODER))
    shutil.rmtree(corpus)
    return folder


@pytest.fixture(scope="module")
def exported(home, run):
    said = export(run, home / "exported")
    assert "computes logits and embeddings of a made-up batch, equal bit for bit" in said[-1]
    return home / "exported"


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture(scope="module")
def toy_run(home):
    return train(home / "toy", toy({"max_steps": 2}))


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def command(*arguments):
    """Run the command and return its exit code and what it said of a mistake."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(["export", *map(str, arguments)])
    return code, said.getvalue()


def newest(run):
    return run / (run / "latest").read_text().strip()


def left_over(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# What an export computes


def test_an_export_is_verified_in_a_fresh_process(run, home, monkeypatch):
    started, starts = [], subprocess.run
    monkeypatch.setattr(
        export_module, "subprocess", SimpleNamespace(run=lambda *a, **k: started.append(a) or starts(*a, **k))
    )
    said = export(run, home / "verified_afresh")
    assert len(started) == 1 and "a fresh process loads all" in said[-1]


def test_loading_an_export_imports_no_compiler(exported):
    """Importing it would take as long as the rest."""
    script = f"""
import sys
from models.encoder import MaskedCellEncoder
MaskedCellEncoder.from_pretrained({str(exported)!r})
sys.exit("torch._dynamo" in sys.modules)
"""
    run_command(["python", "-c", script])


def test_an_export_computes_what_the_trained_model_computes(run, exported):
    trained = load_trained(open_checkpoint(newest(run))).model
    loaded = MaskedCellEncoder.from_pretrained(exported)
    batch = export_probe.made_up_batch(trained, seed=7)
    one, two = (export_probe.answer(model, "logits", batch, None) for model in (trained, loaded))
    assert {"hidden", "gene_logits", "value_logits", "embedding"} == one.keys()
    assert export_probe.differences(one, two) == [] and not loaded.training


def test_the_weights_are_those_of_the_checkpoint(run, exported):
    saved, ours = load_file(newest(run) / "model.safetensors"), load_file(exported / "model.safetensors")
    assert saved.keys() == ours.keys() and all(torch.equal(saved[name], ours[name]) for name in saved)


def test_the_gene_head_uses_the_token_embedding_after_loading(exported):
    model = MaskedCellEncoder.from_pretrained(exported)
    batch = export_probe.made_up_batch(model)
    before = model(batch).gene_logits
    rare = max(
        set(range(4, 44)) - set(batch["tokens"].flatten().tolist()) - set(batch["labels"].flatten().tolist())
    )
    with torch.no_grad():
        model.token_embedding.weight[rare] += 1
    changed = (model(batch).gene_logits != before).any(dim=0).nonzero().flatten().tolist()
    assert changed == [rare]


def test_a_difference_stops_the_export_and_leaves_nothing(home, run, monkeypatch):
    real = export_probe.answer
    monkeypatch.setattr(export_probe, "answer", lambda *a: {k: v + 1e-3 for k, v in real(*a).items()})
    with pytest.raises(UserError, match="not the trained one: embedding differs by up to 0.001"):
        export(run, home / "different")
    assert not (home / "different").exists() and not left_over(home)


def test_a_weight_that_is_lost_stops_the_export(home, run, monkeypatch):
    real = export_module.save_pretrained

    def damaged(model, folder, **arguments):
        real(model, folder, **arguments)
        weights = load_file(folder / "model.safetensors")
        weights["gene_head.bias"][3] += 1e-6
        save_file({k: v.clone() for k, v in weights.items()}, folder / "model.safetensors")

    monkeypatch.setattr(export_module, "save_pretrained", damaged)
    with pytest.raises(UserError, match="weight gene_head.bias"):
        export(run, home / "lossy")
    assert not (home / "lossy").exists() and not left_over(home)


@pytest.mark.parametrize(
    "changes", [{"n_bins": None, "pooling": "mean"}, {"gene_loss_weight": 0.0, "n_bins": 7}]
)
def test_a_batch_is_made_up_for_every_kind_of_encoder(changes):
    arguments = {"vocab_size": 9, "hidden_dim": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 5}
    model = MaskedCellEncoder(EncoderConfig(**arguments | changes)).eval()
    batch = export_probe.made_up_batch(model)
    assert batch["tokens"].shape == (4, 5) and batch["masked_index"].numel() >= 4
    assert all(
        tensor.isfinite().all() for tensor in export_probe.answer(model, "logits", batch, None).values()
    )


def test_a_family_that_is_named_nowhere_is_compared_by_what_it_computes():
    class Answer(NamedTuple):
        hidden: torch.Tensor

    class Causal(CellModel):
        is_causal = True

        def __init__(self, config):
            super().__init__(config)
            self.transformer = self._build_transformer()

        def forward(self, batch):
            return Answer(self._hidden_states(batch, cell_layout(batch)))

    model = Causal(ModelConfig(vocab_size=9, hidden_dim=16, num_layers=1, num_heads=2)).eval()
    batch = export_probe.made_up_batch(model)
    assert export_probe.is_known(model) and "masked_index" not in batch
    assert export_probe.answer(model, "logits", batch, None).keys() == {"hidden", "embedding"}


# The folder


def test_the_genes_are_the_checkpoints_own_file(run, exported):
    assert (exported / "genes.json").read_bytes() == (newest(run) / "genes.json").read_bytes()


def test_the_configuration_holds_every_argument_with_its_value(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["config_args"].keys() == EncoderConfig.__dataclass_fields__.keys()
    sizes = {
        name: config["config_args"][name]
        for name in ("vocab_size", "n_bins", "n_technical_batches", "dropout")
    }
    assert sizes == {"vocab_size": 44, "n_bins": 5, "n_technical_batches": 3, "dropout": 0.1}


def test_the_technical_batches_are_listed_with_their_index(exported):
    found = json.loads((exported / "technical_batches.json").read_text())
    assert found == {"lane-a": 0, "lane-b": 1, "lane-c": 2}


def test_the_card_has_front_matter_and_the_figures_of_the_run(run, exported):
    card = (exported / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["library_name"] == "cellphase" and front["pipeline_tag"] == "feature-extraction"
    progress = open_checkpoint(newest(run)).summary["progress"]
    assert f"| cells seen, each time counted | {progress['cells']:,} |" in card
    assert f"| tokens seen, without padding | {progress['tokens']:,} |" in card
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {record["kind"]: record["loss"] for record in records}
    assert f"| chips \\| and pipes | 4 | training, last step | loss | {last['train']:.6g} |" in card
    assert f"| chips \\| and pipes | 4 | validation | loss | {last['validation']:.6g} |" in card


def test_no_file_of_the_folder_says_where_the_data_was(exported):
    assert not [file.name for file in exported.iterdir() if b"secret_place" in file.read_bytes()]


def test_every_file_can_be_read_by_whoever_can_read_the_others(exported):
    assert len({stat.S_IMODE(file.stat().st_mode) for file in exported.iterdir()}) == 1


# Which checkpoint, and where to


def test_a_run_folder_stands_for_its_newest_checkpoint(home, run, exported):
    export(newest(run), home / "from_checkpoint")
    for file in exported.iterdir():
        assert file.read_bytes() == (home / "from_checkpoint" / file.name).read_bytes()


def test_an_earlier_checkpoint_has_its_own_figures(home, run):
    export(run / "checkpoint_2", home / "earlier")
    card = (home / "earlier" / "README.md").read_text()
    assert "from step 2" in card and "| 2 | validation |" in card and "| 4 |" not in card


def test_a_folder_that_exists_is_refused(home, run, exported):
    before = {file.name: file.read_bytes() for file in exported.iterdir()}
    code, said = command(run, exported)
    assert code == 2 and "exists; name another folder, or give --overwrite" in said
    assert {file.name: file.read_bytes() for file in exported.iterdir()} == before


def test_overwrite_replaces_an_export_and_nothing_else(run, copy, tmp_path):
    (copy / "README.md").write_text("old")
    assert command(run, copy, "--overwrite") == (0, "")
    assert "# toy" in (copy / "README.md").read_text() and not left_over(tmp_path)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    code, said = command(run, precious, "--overwrite")
    assert code == 2 and "not an exported model" in said and (precious / "thesis.txt").exists()


def test_a_failing_export_leaves_the_folder_that_it_was_to_replace(run, copy, tmp_path, monkeypatch):
    (copy / "README.md").write_text("old")
    monkeypatch.setattr(export_probe, "differences", lambda *_: ["hidden differs"])
    with pytest.raises(UserError, match="hidden differs"):
        export(run, copy, overwrite=True)
    assert (copy / "README.md").read_text() == "old" and not left_over(tmp_path)


def test_a_damaged_checkpoint_is_refused(run, tmp_path):
    damaged = shutil.copytree(newest(run), tmp_path / "run" / newest(run).name)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    for source in (damaged, tmp_path / "run"):
        code, said = command(source, tmp_path / "out")
        assert code == 2 and "model.safetensors has changed since it was written" in said
    assert not (tmp_path / "out").exists()


def test_an_unfinished_checkpoint_is_refused(run, tmp_path):
    unfinished = shutil.copytree(newest(run), tmp_path / newest(run).name)
    (unfinished / "manifest.json").unlink()
    code, said = command(unfinished, tmp_path / "out")
    assert code == 2 and "is not a complete checkpoint" in said


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    code, said = command(tmp_path, tmp_path / "out")
    assert code == 2 and "neither a checkpoint nor a run folder" in said
    assert command(tmp_path / "nothing", tmp_path / "out")[0] == 2


def test_the_shards_of_a_zero_run_are_put_together(tmp_path):
    corpus = write_corpus(tmp_path / "cells", make_cells(48, NUM_GENES, 12), NUM_GENES)
    arguments = {
        "path": str(corpus),
        "tokenizer": TOKENIZER,
        "masking": {"mask_ratio": 0.3, "target": "both"},
    }
    phase = {"dataloader_factory": "data.loader.cell_loader", "dataloader_args": arguments, "max_steps": 2}
    train_ranks(2, tmp_path, toy(phase, model=ENCODER), strategy="zero3")
    saved = open_checkpoint(newest(newest_run(tmp_path)))
    assert saved.has(SHARD) and "token_embedding.weight" not in load_tree(saved.folder / "model.safetensors")
    export(saved.folder, tmp_path / "out")
    whole, ours = full_weights(saved), MaskedCellEncoder.from_pretrained(tmp_path / "out").state_dict()
    assert whole.keys() == ours.keys() and all(torch.equal(whole[name], ours[name]) for name in ours)


# Loading


def test_a_folder_without_its_files_is_an_error_that_names_them(copy, run):
    with pytest.raises(ModelError, match="there is no such folder"):
        from_pretrained(copy / "none")
    with pytest.raises(ModelError, match="this is a checkpoint of a run: export it first"):
        from_pretrained(newest(run))
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no model.safetensors in it"):
        from_pretrained(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ModelError, match="no config.json in it; it holds README.md"):
        from_pretrained(copy)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB_CRATER"],)


def test_a_pickle_named_safetensors_is_refused_without_being_run(copy, tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB_CRATER", str(tmp_path / "crater"))
    (copy / "model.safetensors").write_bytes(pickle.dumps({"token_embedding.weight": Bomb()}))
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        MaskedCellEncoder.from_pretrained(copy)
    assert not (tmp_path / "crater").exists()
    pickle.loads((copy / "model.safetensors").read_bytes())
    assert (tmp_path / "crater").exists(), "the bomb is no bomb, so the test shows nothing"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bomb.Model", "importing bomb would run its code"),
        ("os.system", "importing os would run its code"),
        ("models.pretrained.os.system", "cannot be found here"),
        ("models.pretrained:os.system", "no class of models"),
        ("models.pretrained:importlib.import_module", "no class of models"),
        ("models.pretrained.save_pretrained", "neither a model nor a config class"),
        ("models.encoder.nn", "no class of models|cannot be found"),
        ("modelsx.Model", "importing modelsx would run its code"),
        ("models.encoder.Missing", "has no attribute 'Missing'"),
        ("Model", "must be a dotted path"),
    ],
)
@pytest.mark.parametrize("key", ["model_class", "config_class"])
def test_a_class_path_that_is_not_trusted_is_refused_unimported(
    copy, tmp_path, monkeypatch, key, path, message
):
    for name in ("bomb", "modelsx"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'crater')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    edit(copy, **{key: path})
    with pytest.raises(ModelError, match=message):
        from_pretrained(copy)
    assert not (tmp_path / "crater").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other-1"}, "format 'other-1' is not"),
        ({"model_class": 3}, "model_class is 3"),
        ({"config_args": {"vocab_size": 44, "hidden_dims": 3}}, "arguments do not fit .* 'hidden_dims'"),
        ({"config_args": {"vocab_size": 44, "hidden_dim": 15}}, "not divisible by num_heads"),
        ({"tied_weights": {"a.weight": "b.weight"}}, "ties a.weight to b.weight"),
        ({"tied_weights": {"output.weight": "token_embedding.weight"}}, "has no weight output.weight"),
        ({"tied_weights": {"training": "token_embedding.weight"}}, "has no weight training"),
        ({"tied_weights": {"output.weight": ["token_embedding.weight"]}}, "tied_weights is .*was edited"),
        ({"config_args": {"vocab_size": 10**15}}, "arguments do not fit"),
    ],
)
def test_an_edited_configuration_is_an_error(copy, changes, message):
    edit(copy, **changes)
    with pytest.raises(ModelError, match=message):
        from_pretrained(copy)


@pytest.mark.parametrize("name", ["config.json", "cell_tokenizer.json"])
@pytest.mark.parametrize(
    "text", ["[1]", "{", "[" * 100_000, '{"format": "cellphase-model-1", "settings": [{}]}']
)
def test_a_backbone_of_an_export_that_is_none_is_an_error(copy, name, text):
    (copy / name).write_text(text)
    with pytest.raises(CheckpointError, match="backbone: "):
        read_backbone(copy, "backbone")


def test_a_configuration_that_is_no_json_is_an_error(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json: not a readable JSON file"):
        from_pretrained(copy)


def test_weights_that_do_not_fit_are_an_error_that_names_them(copy):
    weights = load_file(copy / "model.safetensors")
    weights["surplus"] = weights.pop("gene_head.bias")
    weights["value_head.bias"] = torch.zeros(2, 2)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        from_pretrained(copy)
    message = str(caught.value)
    assert "lacks gene_head.bias" in message and "has surplus" in message
    assert "value_head.bias is [2, 2] there and [44, 5] in the model" in message


class Tied(nn.Module):
    """Two names for one weight; `ties` says whether the constructor does it."""

    def __init__(self, ties=True, scale=1.5):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.register_buffer("counts", torch.zeros(0))
        self.register_buffer("others", torch.zeros(0))
        if ties:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize("ties", [True, False])
def test_tied_weights_are_stored_once_and_share_memory_after_loading(tmp_path, ties):
    model = Tied()
    described = ModelDescription(f"{__name__}.Tied", {"ties": ties})
    save_pretrained(model, tmp_path, description=described)
    assert load_file(tmp_path / "model.safetensors").keys() == {"embedding.weight", "counts", "others"}
    loaded = from_pretrained(tmp_path, model_class=Tied)
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_a_model_keeps_the_precision_that_it_was_saved_in(tmp_path):
    config = EncoderConfig(vocab_size=9, hidden_dim=8, num_layers=1, num_heads=2)
    model = MaskedCellEncoder(config).to(torch.bfloat16)
    save_pretrained(model, tmp_path)
    loaded = MaskedCellEncoder.from_pretrained(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and loaded.config == config
    assert export_probe.weight_hashes(loaded) == export_probe.weight_hashes(model)


def test_the_path_of_gene_vectors_stays_on_the_machine_that_had_them(tmp_path):
    arguments = {"vocab_size": 9, "hidden_dim": 8, "num_layers": 1, "num_heads": 2}
    save_pretrained(
        MaskedCellEncoder(EncoderConfig(**arguments, gene_embedding_path="/data/v.npy")), tmp_path
    )
    assert MaskedCellEncoder.from_pretrained(tmp_path).config == EncoderConfig(**arguments)


def test_a_model_that_does_not_tell_its_arguments_needs_a_description(tmp_path):
    with pytest.raises(ModelError, match="give save_pretrained a description"):
        save_pretrained(nn.Linear(2, 2), tmp_path)


def test_arguments_that_json_cannot_hold_are_an_error(tmp_path):
    with pytest.raises(ModelError, match="cannot be written as JSON"):
        save_pretrained(nn.Linear(2, 2), tmp_path, description=ModelDescription("a.B", {"x": float("nan")}))


# Models of the user's


def test_a_model_of_ones_own_is_compared_by_the_loss_of_its_data(home, toy_run):
    said = export(toy_run, home / "toy_exported", trusted_modules=("toy",))
    assert "the loss of a batch of the run's data, equal bit for bit" in said[-1]
    with pytest.raises(ModelError, match="give trusted_modules=.'toy',."):
        from_pretrained(home / "toy_exported")
    for arguments in ({"trusted_modules": ("toy",)}, {"model_class": ToyModel}):
        loaded = from_pretrained(home / "toy_exported", **arguments)
        assert type(loaded) is ToyModel and loaded.config == ToyConfig(n_technical_batches=1)
    names = {file.name for file in (home / "toy_exported").iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "technical_batches.json"}


def test_a_model_whose_data_is_gone_is_compared_by_weights_and_says_so(home, toy_run, monkeypatch):
    def gone(**_):
        raise FileNotFoundError("cells.h5ad is gone")

    monkeypatch.setattr(gone, "__module__", "toy")
    monkeypatch.setattr("toy.map_loader", gone)
    said = export(toy_run, home / "toy_without_data", trusted_modules=("toy",))
    for text in (said[-1], (home / "toy_without_data" / "README.md").read_text()):
        assert (
            "nothing was computed: no batch of the run's data could be had (FileNotFoundError: cells" in text
        )


def test_a_model_without_a_config_class_is_exported_with_its_defaults(home):
    model = {"model_class": "toy.ToyModel", "model_args": {"width": 4}}
    trained = train(home / "plain", toy({"max_steps": 1}, model=model))
    export(trained, home / "plain_exported", trusted_modules=("toy",))
    config = json.loads((home / "plain_exported" / "config.json").read_text())
    assert config["config_class"] is None and config["model_args"]["width"] == 4
    assert from_pretrained(home / "plain_exported", model_class=ToyModel).config.width == 4


FOREIGN = "a checkpoint may name only what is of models: its code would run"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"model_class": "os.system", "model_args": {"command": "touch EXECUTED"}}, FOREIGN),
        ({"model_class": "os:system", "model_args": {"command": "touch EXECUTED"}}, FOREIGN),
        ({"config_class": "os.system", "config_args": {"command": "touch EXECUTED"}}, FOREIGN),
        ({"model_class": "executes.Model"}, FOREIGN),
        (
            {"model_class": "models.pretrained.importlib.import_module", "model_args": {"name": "executes"}},
            "cannot be found here",
        ),
        (
            {"model_class": "models.pretrained:importlib.import_module", "model_args": {"name": "executes"}},
            "is no class of models",
        ),
    ],
)
@pytest.mark.parametrize("open_it", [load_trained, lambda saved: read_backbone(saved.folder, "backbone")])
def test_what_a_checkpoint_names_is_not_executed(run, tmp_path, monkeypatch, model, message, open_it):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "executes.py").write_text("open('EXECUTED', 'w').close()\n")
    saved = changed_checkpoint(newest(run), tmp_path, lambda config: config["model"].update(model))
    with pytest.raises(CheckpointError, match=message):
        open_it(open_checkpoint(saved))
    assert not (tmp_path / "EXECUTED").exists()


def test_a_checkpoint_of_a_model_of_ones_own_is_opened_where_its_module_is_trusted(toy_run, capsys):
    with pytest.raises(CheckpointError, match="give --trust toy, or trusted_modules=.'toy',. in Python"):
        load_trained(open_checkpoint(newest(toy_run)))
    assert type(load_trained(open_checkpoint(newest(toy_run)), trusted_modules=("toy",)).model) is ToyModel


def test_the_command_exports_a_model_of_ones_own_where_its_module_is_trusted(home, toy_run):
    code, said = command(toy_run, home / "toy_by_command")
    assert code == 2 and "give --trust toy" in said
    assert command(toy_run, home / "toy_by_command", "--trust", "toy") == (0, "")


@pytest.mark.parametrize("key", ["dataloader_factory", "loss"])
def test_a_loader_or_loss_that_a_checkpoint_names_is_not_executed(toy_run, tmp_path, key):
    """Its model is trusted; a loader of another module is not, so nothing is computed on its data."""

    def change(config):
        path = "subprocess.check_call"
        if key == "loss":
            config["loss"] = {
                "loss_class": path,
                "loss_args": {"args": ["touch", str(tmp_path / "EXECUTED")]},
            }
        else:
            config["datasets"][0] |= {
                key: path,
                "dataloader_args": {"args": ["touch", str(tmp_path / "EXECUTED")]},
            }

    saved = changed_checkpoint(newest(toy_run), tmp_path, change)
    said = export(saved, tmp_path / "out", trusted_modules=("toy",))
    assert (
        "nothing was computed" in said[-1]
        and "subprocess.check_call, and a checkpoint may name only" in said[-1]
    )
    assert not (tmp_path / "EXECUTED").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(run_name="${oc.env:HOME}"),
        lambda config: config["model"]["config_args"].update({"a": ["${oc.env:HOME}"]}),
        lambda config: config.update({r"\\\\${oc.env:HOME}": 1}),
        lambda config: config.update(defaults=["/etc/other"]),
        lambda config: config.update(data=config.pop("datasets")),
    ],
)
def test_the_configuration_of_a_checkpoint_reads_nothing_else(run, tmp_path, change):
    saved = changed_checkpoint(newest(run), tmp_path, change)
    with pytest.raises(ConfigError, match="not a configuration as a run writes it into a checkpoint"):
        load_saved_config(saved / "config.yaml")


def test_a_text_with_a_dollar_comes_back_from_a_saved_configuration(run, tmp_path):
    config = load_saved_config(newest(run) / "config.yaml")
    config.datasets[0].dataloader_args["path"] = r"a ${b} \${c}"
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert load_saved_config(tmp_path / "config.yaml") == config


def test_a_list_of_trusted_modules_that_is_a_text_is_refused(exported):
    with pytest.raises(ModelError, match="give a tuple: .'toy',."):
        from_pretrained(exported, trusted_modules="toy")


# The tokenizer


@pytest.fixture(scope="module")
def new_cells(home):
    """Write a corpus of new cells over the same genes; return it, its cells as a matrix, and the gene names."""
    cells = make_cells(20, NUM_GENES, 15, seed=5)
    corpus = write_corpus(home / "new", cells, NUM_GENES)
    matrix = sparse.csr_matrix((cells.counts, cells.genes, cells.offsets), shape=(20, NUM_GENES))
    return corpus, matrix, list(gene_space(NUM_GENES).ids)


def test_new_cells_are_tokenized_as_in_training(exported, new_cells):
    corpus, matrix, genes = new_cells
    rows, draw = np.arange(20), DrawKey(0, 0, 0)
    expected = cell_loader(corpus, tokenizer=TOKENIZER).fetch_unmasked(rows, draw)
    tokenizer = load_tokenizer(exported)
    from_corpus = tokenizer.open_corpus(corpus).fetch_unmasked(rows, draw)
    in_memory = tokenizer.tokenize(matrix, genes)
    assert in_memory.keys() == expected.keys() - {"cell_index", "batch_idx", "target_gene_idx"}
    for name in in_memory:
        same = torch.equal if isinstance(expected[name], torch.Tensor) else lambda a, b: a == b
        assert same(in_memory[name], expected[name]) and same(from_corpus[name], expected[name]), name


def test_columns_are_matched_by_name_and_unknown_genes_count_in_the_total(exported, new_cells):
    _, matrix, genes = new_cells
    tokenizer = load_tokenizer(exported)
    order = np.random.default_rng(0).permutation(NUM_GENES)
    wider = sparse.hstack([matrix[:, order], sparse.csr_matrix(np.full((20, 1), 100))])
    plain = tokenizer.tokenize(matrix.toarray(), genes)
    mixed = tokenizer.tokenize(wider, [*(genes[i] for i in order), "UNKNOWN"])
    assert torch.equal(plain["tokens"], mixed["tokens"]) and torch.equal(plain["bins"], mixed["bins"])
    totals = torch.expm1(mixed["depth"]) - torch.expm1(plain["depth"])
    assert torch.allclose(totals, torch.full((20,), 100.0), atol=1e-2)


def test_new_technical_batches_do_no_harm_to_embeddings_and_stop_a_forward_pass(exported, new_cells):
    source = load_tokenizer(exported).open_corpus(new_cells[0], masking={"mask_ratio": 0.3, "target": "both"})
    known = source.fetch(np.arange(4), DrawKey(0, 0, 0))
    model = MaskedCellEncoder.from_pretrained(exported)
    assert model(known).gene_logits is not None
    fewer = load_tokenizer(exported)
    fewer.technical_batches.pop("lane-b")
    source = fewer.open_corpus(new_cells[0], masking={"mask_ratio": 0.3, "target": "both"})
    batch = source.fetch(np.arange(20), DrawKey(0, 0, 0))
    assert model.encode(batch).isfinite().all() and (batch["batch_idx"] == -1).any()
    with pytest.raises(IndexError):
        model(batch)


def test_cells_that_the_model_cannot_know_are_refused(exported, new_cells, home):
    corpus, matrix, genes = new_cells
    tokenizer = load_tokenizer(exported)
    with pytest.raises(DataError, match="values: [0-9.]+5 is fractional; the model was trained on counts"):
        tokenizer.tokenize(matrix * 0.5, genes)
    for values, dimensions in ((matrix.toarray()[0], 1), (matrix.toarray()[None], 3)):
        with pytest.raises(DataError, match=rf"expected a matrix \[cells, genes\], got {dimensions} dim"):
            tokenizer.tokenize(values, genes)
    with pytest.raises(DataError, match="39 names were given for a matrix of 40 columns"):
        tokenizer.tokenize(matrix, genes[1:])
    with pytest.raises(DataError, match="genes: 4 of 40 names are among the model's 40 genes"):
        tokenizer.tokenize(matrix, genes[:4] + [f"mouse{i}" for i in range(36)])
    with pytest.raises(DataError, match="these are Ensembl ids, and the model knows its genes by symbols"):
        tokenizer.tokenize(matrix, [f"ENSG{i:011d}" for i in range(40)])
    other = write_corpus(home / "wider", make_cells(9, 42, 12), 42)
    with pytest.raises(DataError, match="its gene space has 42 genes and is not the model's of 40"):
        tokenizer.open_corpus(other)
    cells = make_cells(9, NUM_GENES, 12)
    values = cells._replace(counts=(cells.counts * 0.5).astype(np.float32))
    lognorm = write_corpus(home / "lognorm", values, NUM_GENES, value_kind="lognorm")
    with pytest.raises(
        DataError, match="it holds lognorm values, and phase 'chips . and pipes'.*read counts"
    ):
        tokenizer.open_corpus(lognorm)


def test_a_tokenizer_that_is_missing_or_damaged_is_an_error(copy):
    (copy / "genes.json").write_text((copy / "genes.json").read_text().replace("GENE7", "GENE777"))
    with pytest.raises(DataError, match="the file was edited"):
        load_tokenizer(copy)
    with pytest.raises(DataError, match="no settings of a phase 'other'"):
        load_tokenizer(copy, "other")
    (copy / "cell_tokenizer.json").write_text('{"format": 1, "settings": [{"phases": ["a"]}]}')
    with pytest.raises(DataError, match="not the settings of a tokenizer"):
        load_tokenizer(copy)
    (copy / "cell_tokenizer.json").unlink()
    with pytest.raises(DataError, match="no cell_tokenizer.json in it"):
        load_tokenizer(copy)


def test_phases_that_differ_keep_their_own_settings(copy):
    path, other = "data.loader.cell_loader", {"strategy": "rank_value", "max_genes": 9}
    phases = [
        PhaseSettings("a", path, {"tokenizer": TOKENIZER}, "counts"),
        PhaseSettings("b", path, {"tokenizer": other}, "lognorm"),
        PhaseSettings("c", "data.loader:cell_loader", {"tokenizer": {**TOKENIZER, "log1p": True}}, "counts"),
        PhaseSettings("d", "my_loaders.cells", {"tokenizer": TOKENIZER}, None),
        PhaseSettings("e", "data.hf.hf_loader", {"path": "x", "columns": {"tokens": "input_ids"}}, None),
    ]
    (copy / "cell_tokenizer.json").write_text(json.dumps(tokenizer_record(phases)))
    with pytest.raises(
        DataError, match="phases differ in their settings; name one by --phase .*: a, c; b; e"
    ):
        load_tokenizer(copy)
    assert (
        load_tokenizer(copy, "c").phases == ("a", "c") and load_tokenizer(copy, "b").value_kind == "lognorm"
    )
    with pytest.raises(DataError, match="tokenized before, by data.hf.hf_loader"):
        load_tokenizer(copy, "e")


@pytest.mark.parametrize("value_kind", ["counts", "lognorm"])
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "rank_value", "gene_selection": "random"},
        {"strategy": "binned_expression", "max_value": 8, "prepend_cls": False, "padding": "max_genes"},
        {"strategy": "binned_expression", "include_zero_genes": True, "log1p": False},
        {"strategy": "binned_expression", "binning_method": "per_cell", "n_bins": 9},
        {"strategy": "binned_expression", "binning_method": "quantile", "n_bins": 4, "edges": [0.1, 2.5]},
        {"strategy": "continuous_projection", "n_bins": 7, "include_zero_genes": True},
        {"strategy": "gene_embedding", "max_genes": 30},
    ],
)
def test_complete_options_build_the_same_tokenizer(options, value_kind):
    built = build_tokenizer(options, value_kind=value_kind, measured=[])
    complete = json.loads(json.dumps(complete_options(built)))
    assert options.items() <= complete.items()
    assert build_tokenizer(complete, value_kind=value_kind, measured=[]) == built


def test_an_anndata_object_can_be_embedded(exported, new_cells):
    _, matrix, genes = new_cells
    cells = anndata.AnnData(matrix.astype(np.float32))
    cells.var_names = genes
    batch = load_tokenizer(exported).tokenize(cells.X, cells.var_names)
    with torch.no_grad():
        assert MaskedCellEncoder.from_pretrained(exported).encode(batch).shape == (20, 16)


def put(*path):
    """Return a change of a state: the last of `path` in the place that the others name."""
    *parents, last, value = path

    def change(state):
        for key in parents:
            state = state[key]
        state[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (put("sizes", "vocab_size", {}), "sizes is not a table of whole numbers"),
        (put("sizes", "vocab_size", 1 << 20_000), "sizes is not a table of whole numbers"),
        (put("sizes", "vocab_size", -1), "sizes is not a table of whole numbers"),
        (put("n_technical_batches", ""), "n_technical_batches is not a whole number"),
        (put("technical_batches", 0), "technical_batches is not a table"),
        (put("tokenizer_options", [1]), "tokenizer_options is not a table"),
        (
            put("tokenizer_options", "chips | and pipes", "n_bins", torch.ones(1)),
            "cell_tokenizer.json cannot be",
        ),
        (put("tokenizer_options", {"p": {"gate_pool": 1}}), "tokenizer_options is not a table"),
        (put("label_names", [1]), "label_names is not a list of names"),
        (put("value_kinds", "counts"), "value_kinds is not a table of text"),
        (put("aliases", {"a": 1}), "aliases is not a table of names"),
        (put("progress", "cells", "many"), "progress is not a table of counters"),
        (put("trajectory", "phases", [{}]), "trajectory is not a seed and a list of phases"),
        (lambda state: state.pop("technical_batches"), "it does not say technical_batches"),
        (lambda state: state.pop("progress"), "it does not say progress"),
        (lambda state: state.pop("optimizer"), "its optimizer state is no table by parameter"),
        (put("optimizer", "model.gene_head.bias", "none"), "its optimizer state is no table by parameter"),
        (
            put("optimizer", "model.gene_head.bias", "weight_average", 1.0),
            "weight_average of model.gene_head.bias",
        ),
    ],
)
def test_a_state_that_no_run_saved_is_refused(run, tmp_path, change, why):
    hostile = changed_state(newest(run), tmp_path, change)
    code, said = command(hostile, tmp_path / "exported")
    assert code == 2 and why in said and "edited" in said
    assert not (tmp_path / "exported").exists()
