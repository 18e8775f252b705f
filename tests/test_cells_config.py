"""The typed configuration: what its classes accept, what they say of mistakes, and which fields belong together."""

import json
from pathlib import Path

import pytest
from launching import ROOT, run_command

import trainer.config as config
from trainer.config import (
    CensusConfig,
    DataConfig,
    FinetuneConfig,
    LoRAConfig,
    ModelConfig,
    ScModelForgeConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationError,
    json_schema,
    load_config,
    schema,
)
from trainer.config.cells import SchedulerConfig
from trainer.config.cells_run import pretraining_run
from trainer.config.cells_section import section_classes, written_values
from trainer.config.compose import compose
from trainer.errors import ConfigError

QUICK_REFERENCE = {
    "ScModelForgeConfig": {"finetune": None},
    "DataConfig": {
        "source": "local",
        "paths": [],
        "gene_vocab": "human_protein_coding",
        "max_genes": 2048,
        "num_workers": 4,
    },
    "PreprocessingConfig": {
        "normalize": "library_size",
        "target_sum": 1e4,
        "hvg_selection": None,
        "log1p": True,
    },
    "CensusConfig": {
        "organism": "Homo sapiens",
        "census_version": "latest",
        "obs_value_filter": None,
        "var_value_filter": None,
        "filters": None,
        "obs_columns": None,
    },
    "TokenizerConfig": {
        "strategy": "rank_value",
        "max_genes": 2048,
        "gene_vocab": "human_protein_coding",
        "prepend_cls": True,
        "n_bins": 51,
        "binning_method": "uniform",
        "embedding_path": None,
        "embedding_dim": 200,
    },
    "MaskingConfig": {"mask_ratio": 0.15, "random_replace_ratio": 0.1, "keep_ratio": 0.1},
    "ModelConfig": {
        "architecture": "transformer_encoder",
        "hidden_dim": 512,
        "num_layers": 12,
        "num_heads": 8,
        "ffn_dim": None,
        "dropout": 0.1,
        "max_seq_len": 2048,
        "pooling": "cls",
        "activation": "gelu",
        "use_expression_values": True,
        "pretraining_task": "masked_gene_prediction",
        "mask_ratio": 0.15,
        "vocab_size": None,
        "n_bins": 51,
        "gene_loss_weight": 1.0,
        "expression_loss_weight": 1.0,
        "decoder_dim": None,
        "decoder_layers": 4,
        "decoder_heads": None,
    },
    "TrainingConfig": {
        "batch_size": 64,
        "max_epochs": 10,
        "seed": 42,
        "strategy": "ddp",
        "num_gpus": None,
        "precision": "bf16-mixed",
        "gradient_clip": 1.0,
        "gradient_accumulation": 1,
        "logger": "wandb",
        "wandb_project": "scmodelforge",
        "run_name": None,
        "log_dir": "logs",
        "log_every_n_steps": 50,
        "checkpoint_dir": "checkpoints",
        "save_top_k": 3,
        "num_workers": 4,
        "val_split": 0.05,
        "resume_from": None,
    },
    "OptimizerConfig": {"name": "adamw", "lr": 1e-4, "weight_decay": 0.01},
    "SchedulerConfig": {"name": "cosine_warmup", "warmup_steps": 2000, "total_steps": 100000},
    "EvalConfig": {"every_n_epochs": 2, "batch_size": 256, "benchmarks": []},
    "FinetuneConfig": {
        "checkpoint_path": "",
        "freeze_backbone": False,
        "freeze_backbone_epochs": 0,
        "label_key": "cell_type",
        "backbone_lr": None,
        "head_lr": None,
    },
    "TaskHeadConfig": {
        "task": "classification",
        "n_classes": None,
        "output_dim": 1,
        "hidden_dim": None,
        "dropout": 0.1,
    },
    "LoRAConfig": {
        "enabled": False,
        "rank": 8,
        "alpha": 16,
        "dropout": 0.05,
        "target_modules": None,
        "bias": "none",
    },
}


@pytest.fixture
def written(tmp_path):
    def write(text, **files):
        for name, content in files.items():
            (tmp_path / f"{name}.yaml").write_text(content)
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


# What there is


@pytest.mark.parametrize("name", QUICK_REFERENCE)
def test_every_class_of_the_quick_reference_has_its_fields_and_defaults(name):
    section = getattr(config, name)()
    for field, default in QUICK_REFERENCE[name].items():
        assert getattr(section, field) == default, field
        assert type(getattr(section, field)) is type(default), field


def test_sections_have_defaults_of_their_own():
    assert isinstance(ScModelForgeConfig().training.scheduler, SchedulerConfig)
    first, second = ScModelForgeConfig(), ScModelForgeConfig()
    first.training.batch_size = 1
    first.data.paths.append("a.h5ad")
    assert second.training.batch_size == 64 and second.data.paths == []


def test_every_field_has_a_description():
    for section in section_classes(ScModelForgeConfig):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_importing_the_configuration_imports_no_torch():
    code = "import sys, trainer.config, trainer.config.cells_finetune; print({'torch', 'numpy'} & sys.modules.keys())"
    assert run_command(["python", "-c", code]).stdout.strip() == "set()"


def test_the_json_schema_on_disk_is_up_to_date():
    path = ROOT / "configs" / "schema" / "cells_config.schema.json"
    command = (
        "python -c 'import json, trainer.config as c; print(json.dumps(c.json_schema(\"cells\"), indent=2))' "
        "> configs/schema/cells_config.schema.json"
    )
    assert json.loads(path.read_text()) == json_schema("cells"), f"out of date; write it again: {command}"


# Built and changed in Python


def test_a_configuration_is_built_in_python_and_changed():
    built = ScModelForgeConfig(
        data=DataConfig(paths=[Path("data/my_data.h5ad")]),
        model=ModelConfig(hidden_dim=768, num_layers=16),
        training=TrainingConfig(batch_size=128, max_epochs=50),
    )
    built.training.batch_size = 256
    built.model.num_layers = 24
    built.training.scheduler = None
    assert (built.data.paths, built.training.batch_size, built.training.max_epochs) == (
        ["data/my_data.h5ad"],
        256,
        50,
    )
    assert built.model.num_layers == 24 and built.training.scheduler is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ModelConfig(hidden_dm=3), r"^ModelConfig: model\.hidden_dm: unknown key; did you mean 'hidden_dim'"),
        (lambda: ModelConfig(pooling="clss"), r"model\.pooling: got 'clss'; allowed: cls, mean; did you mean 'cls'"),
        (lambda: TrainingConfig(batch_size="64"), r"training\.batch_size: expected a whole number, got '64' as text"),
        (lambda: TrainingConfig(max_epochs=0), r"training\.max_epochs: must be at least 1, got 0"),
        (lambda: DataConfig(paths=["a.h5ad", 3]), r"data\.paths\.1: expected text, got 3"),
        (lambda: DataConfig(paths="a.h5ad"), r"data\.paths: expected a list, got 'a\.h5ad'; write \[a\.h5ad\]"),
        (lambda: DataConfig(preprocessing={"target_sum": -1}), r"data\.preprocessing\.target_sum: must be more than 0"),
        (lambda: TrainingConfig(optimizer={"lr": 0}), r"training\.optimizer\.lr: must be more than 0"),
        (lambda: ScModelForgeConfig(modle={}), r"modle: unknown key; did you mean 'model'"),
        (lambda: LoRAConfig(target_modules=[]), r"finetune\.lora\.target_modules"),
        (lambda: FinetuneConfig(label_key=3), r"FinetuneConfig: finetune\.label_key: expected text, got 3"),
        (lambda: CensusConfig(organism="Danio rerio"), r"data\.census\.organism: .*Homo sapiens, Mus musculus"),
    ],
)  # fmt: skip
def test_a_constructor_names_the_field_and_what_is_allowed(build, message):
    with pytest.raises(ValidationError, match=message):
        build()


def test_a_constructor_tells_all_mistakes_at_once():
    with pytest.raises(ValidationError) as error:
        ScModelForgeConfig(
            training={"precision": "64", "optimizer": {"lr": "x"}},
            model={"hidden_dim": 30, "num_heads": 4},
            data={"max_genes": 64},
            tokenizer=TokenizerConfig(max_genes=65),
            extra=1,
        )
    lines = str(error.value).splitlines()
    assert lines[0] == "ScModelForgeConfig: 5 mistakes"
    told = {line.strip().partition(":")[0] for line in lines[1:]}
    assert told == {
        "training.precision",
        "training.optimizer.lr",
        "extra",
        "model.num_heads",
        "tokenizer.max_genes",
    }


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", -1, r"training\.batch_size: must be at least 1, got -1"),
        ("batchsize", 1, r"training\.batchsize: unknown key; did you mean 'batch_size'"),
        ("precision", "64", r"training\.precision: got '64'; allowed: 32, 16-mixed, bf16-mixed, fp8"),
        ("optimizer", {"name": "sgd"}, r"training\.optimizer\.name: got 'sgd'; allowed: adamw, adam"),
        ("max_epochs", True, r"training\.max_epochs: expected a whole number, got true"),
    ],
)
def test_an_assignment_is_checked_and_changes_nothing_where_it_is_wrong(field, value, message):
    built = ScModelForgeConfig()
    before = built.model_dump()
    with pytest.raises(ValidationError, match=message):
        setattr(built.training, field, value)
    assert built.model_dump() == before


def test_a_validation_error_is_a_config_error_and_a_value_error():
    assert issubclass(ValidationError, ConfigError) and issubclass(ValidationError, ValueError)


def test_model_validate_reports_as_the_constructor_does():
    with pytest.raises(ValidationError, match=r"model\.architecture: got 'x'"):
        ScModelForgeConfig.model_validate({"model": {"architecture": "x"}})


def test_what_was_written_builds_an_equal_configuration():
    built = ScModelForgeConfig(finetune=FinetuneConfig(), data={"max_genes": 64})
    built.training.optimizer.lr = 0.5
    values = written_values(built)
    assert values == {"data": {"max_genes": 64}, "training": {"optimizer": {"lr": 0.5}}, "finetune": {}}
    assert ScModelForgeConfig(**values) == built


# Loaded from a file


def test_a_file_is_merged_with_the_defaults(written):
    loaded = load_config(
        written("training: {optimizer: {lr: 1e-4}, precision: 32}\ndata: {census: }\nfinetune: {}\n")
    )
    assert loaded.training.optimizer.lr == 1e-4 and loaded.training.precision == "32"
    assert loaded.training.optimizer.weight_decay == 0.01 and loaded.data.census == CensusConfig()
    assert loaded.finetune == FinetuneConfig()


def test_overrides_defaults_lists_and_interpolations_work(written):
    path = written(
        "defaults: [base]\nmodel: {hidden_dim: 64}\neval: {batch_size: '${training.batch_size}'}\n",
        base="model: {hidden_dim: 32, num_layers: 2}\ntraining: {batch_size: 8}\n",
    )
    loaded = load_config(path, ["training.num_gpus=null", "model.dropout=0.2"])
    assert (loaded.model.hidden_dim, loaded.model.num_layers, loaded.model.dropout) == (64, 2, 0.2)
    assert loaded.eval.batch_size == 8


def test_a_file_with_mistakes_names_them_all_with_its_name(written):
    path = written("trainig: {}\nmodel: {num_heads: 7, hidden_dim: '9'}\ntokenizer: {n_bins: 5}\n")
    with pytest.raises(ValidationError) as error:
        load_config(path, ["model.n_bins=6", "no_value"])
    text = str(error.value)
    assert text.startswith(f"{path}: 4 mistakes")
    for part in ("trainig: unknown key; did you mean 'training'", "model.hidden_dim: expected a whole number",
                 "model.n_bins: 6 contradicts tokenizer.n_bins: 5", "'no_value' is not key=value"):  # fmt: skip
        assert part in text


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_config(tmp_path / "nothing.yaml")


# Fields that belong together

TWINS = [
    (("data.max_genes", "tokenizer.max_genes", "model.max_seq_len"), "64", "32"),
    (("data.gene_vocab", "tokenizer.gene_vocab"), "from_data", "human_all"),
    (("data.num_workers", "training.num_workers"), "1", "2"),
    (("tokenizer.masking.mask_ratio", "model.mask_ratio"), "0.3", "0.4"),
    (("tokenizer.n_bins", "model.n_bins"), "7", "9"),
]


def value(loaded, path):
    for part in path.split("."):
        loaded = getattr(loaded, part)
    return loaded


@pytest.mark.parametrize(("paths", "one", "other"), TWINS, ids=lambda v: v[0] if isinstance(v, tuple) else v)
def test_the_twin_that_is_written_rules_the_other(written, paths, one, other):
    for path in paths:
        loaded = load_config(written(""), [f"{path}={one}"])
        assert len({str(value(loaded, twin)) for twin in paths}) == 1
        assert str(value(loaded, paths[0])) == one


@pytest.mark.parametrize(("paths", "one", "other"), TWINS, ids=lambda v: v[0] if isinstance(v, tuple) else v)
def test_twins_that_are_both_written_must_be_equal(written, paths, one, other):
    for path in paths[1:]:
        load_config(written(""), [f"{paths[0]}={one}", f"{path}={one}"])
        with pytest.raises(ValidationError, match=rf"{path}: .*contradicts {paths[0]}: "):
            load_config(written(""), [f"{paths[0]}={one}", f"{path}={other}"])


def test_a_twin_changed_after_loading_rules_when_the_run_is_made(written):
    loaded = load_config(written("data: {paths: [a.h5ad], max_genes: 64}\n"))
    loaded.data.max_genes = 32
    arguments = pretraining_run(loaded).datasets[0].dataloader_args
    assert arguments["tokenizer"]["max_genes"] == 32
    loaded.model.max_seq_len = 16
    with pytest.raises(ValidationError, match=r"model\.max_seq_len: 16 contradicts data\.max_genes: 32"):
        pretraining_run(loaded)


def test_the_task_follows_the_architecture_where_it_is_not_written(written):
    for architecture, task in (
        ("transformer_encoder", "masked_gene_prediction"),
        ("autoregressive_transformer", "next_gene_prediction"),
        ("masked_autoencoder", "masked_expression_prediction"),
    ):
        loaded = load_config(written(""), [f"model.architecture={architecture}"])
        assert loaded.model.pretraining_task == task
        assert (
            load_config(written(""), [f"model.architecture={architecture}", f"model.pretraining_task={task}"])
            == loaded
        )


def test_a_task_that_the_architecture_cannot_learn_is_refused_with_those_it_can(written):
    message = r"model\.pretraining_task: masked_gene_prediction .*masked_autoencoder can learn; possible: masked_expr"
    with pytest.raises(ValidationError, match=message):
        load_config(
            written("model: {architecture: masked_autoencoder, pretraining_task: masked_gene_prediction}\n")
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.hidden_dim=30", "model.num_heads=4"], r"model\.num_heads: 4 heads do not divide hidden_dim 30"),
        (
            ["model.architecture=masked_autoencoder", "model.decoder_dim=10", "model.decoder_heads=4"],
            r"model\.decoder_heads: 4 heads do not divide decoder_dim 10",
        ),
        (["tokenizer.masking.keep_ratio=0.95"], r"tokenizer\.masking\.keep_ratio: .*add up to more than 1"),
        (["tokenizer.strategy=gene_embedding"], r"tokenizer\.embedding_path: is required with strategy"),
        (["tokenizer.prepend_cls=false"], r"model\.pooling: cls needs the token"),
        (
            ["training.scheduler.name=cosine", "training.scheduler.warmup_steps=5"],
            r"training\.scheduler\.warmup_steps: 5 has no meaning with name: cosine",
        ),
        (
            ["training.scheduler.total_steps=5", "training.scheduler.warmup_steps=5"],
            r"training\.scheduler\.warmup_steps: 5 is not below total_steps 5",
        ),
        (["eval.benchmarks=[linear_prob]"], r"eval\.benchmarks\.0: there is no benchmark 'linear_prob'"),
        (["eval.benchmarks=[{name: linear_probe, folds: 2}]"], r"eval\.benchmarks\.0\.folds: linear_probe has no such"),
        (
            ["finetune.freeze_backbone=true", "finetune.freeze_backbone_epochs=2"],
            r"finetune\.freeze_backbone_epochs: 2 would let the backbone train.*freeze_backbone: true",
        ),
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other_are_refused(written, overrides, message):
    with pytest.raises(ValidationError, match=message):
        load_config(written(""), overrides)


def test_every_example_is_read_as_it_was_written():
    for path in sorted((ROOT / "configs" / "cells").glob("*.yaml")):
        raw, *_ = compose(path, [])
        written = written_values(load_config(path))
        for section, values in raw.items():
            assert written[section].keys() == values.keys(), path


def test_python_keeps_classes_apart_that_share_a_name():
    assert config.ModelConfig is not schema.ModelConfig
    assert config.ModelConfig.__module__.startswith("trainer.config.cells")
