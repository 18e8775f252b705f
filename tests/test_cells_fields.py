"""Every field of the typed configuration acts: what it becomes in the run, and the test that shows what that does.

`python tests/test_cells_fields.py` writes the table of docs/cells.md again.
"""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from running import final_weights, toy, train

import trainer.backbone
from models.errors import ModelError
from trainer.backbone import Backbone
from trainer.config.cells import ScModelForgeConfig, load_config
from trainer.config.cells_run import run_of
from trainer.config.cells_section import CellsSection, section_classes
from trainer.config.messages import inner_section
from trainer.dotted import resolve
from trainer.model_building import with_data_sizes
from trainer.optim import build_optimizer, mark_trainable
from trainer.phases import DataFacts

PAGE = ROOT / "docs" / "cells.md"
BEGIN = "<!-- generated from the code by `python tests/test_cells_fields.py`; do not edit -->"
END = "<!-- end of what is generated -->"

BASES = {
    "local": ["data.paths=[a.h5ad]"],
    "census": ["data.source=cellxgene_census"],
    "hvg": ["data.paths=[a.h5ad]", "data.preprocessing.hvg_selection=100"],
    "binned": ["data.paths=[a.h5ad]", "tokenizer.strategy=binned_expression"],
    "mean": ["data.paths=[a.h5ad]", "model.pooling=mean"],
    "vectors": [
        "data.paths=[a.h5ad]",
        "tokenizer.strategy=gene_embedding",
        "tokenizer.embedding_path=a.npy",
    ],
    "both": ["data.paths=[a.h5ad]", "model.pretraining_task=masked_gene_and_expression_prediction"],
    "autoregressive": ["data.paths=[a.h5ad]", "model.architecture=autoregressive_transformer"],
    "autoencoder": ["data.paths=[a.h5ad]", "model.architecture=masked_autoencoder"],
    "fp8": ["data.paths=[a.h5ad]", "training.precision=fp8"],
    "benchmarks": ["data.paths=[a.h5ad]", "eval.benchmarks=[linear_probe]"],
    "finetune": ["data.paths=[a.h5ad]", "finetune.checkpoint_path=one"],
    "lora": ["data.paths=[a.h5ad]", "finetune.checkpoint_path=one", "finetune.lora.enabled=true"],
    "regression": [
        "data.paths=[a.h5ad]",
        "finetune.checkpoint_path=one",
        "finetune.head.task=regression",
        "training.val_split=0",
    ],
}
"""Configurations in which fields act."""

PHASE = "datasets.0"
ARGS = f"{PHASE}.dataloader_args"
MODEL = "model.config_args"
SELF = "tests/test_cells_fields.py::"


class Row(NamedTuple):
    """Say how one field is shown to act."""

    base: str
    change: str
    """Its other value, as an override has it."""
    keys: tuple[str, ...]
    """All keys of the run that change with it."""
    proof: str
    """The test that shows what these keys do."""


def row(base, change, keys, proof):
    return Row(base, change, tuple(keys.split()), proof)


PREPARED, TOKENS, LOADER, CENSUS = (
    f"tests/test_{name}.py::test_" for name in ("prepared", "tokenizers", "loader", "census")
)
TRAINING, TRACKERS, MASKING = (f"tests/test_{name}.py::test_" for name in ("training", "trackers", "masking"))
SCHEDULE, LAUNCH = (f"tests/test_{name}.py::test_" for name in ("schedule", "launch_ranks"))
HVG = "tests/test_hvg.py::test_"
STEPS = f"{PREPARED}the_steps_of_preprocessing_are_those_of_the_tokenizer"
MODELS = f"{SELF}test_a_field_of_the_model_changes_what_the_model_computes"
EXAMPLES = "tests/test_cells_examples.py::test_"

ROWS = {
    "data.source": row(
        "local",
        "cellxgene_census",
        f"{PHASE}.dataloader_factory {ARGS}.census {ARGS}.paths {ARGS}.layer {ARGS}.gene_column notes",
        f"{CENSUS}the_loader_gives_batches_with_labels_of_the_cells_that_pass",
    ),
    "data.paths": row(
        "local", "[b.h5ad]", f"{ARGS}.paths", f"{PREPARED}several_files_keep_where_each_cell_came_from"
    ),
    "data.gene_vocab": row(
        "local",
        "from_data",
        f"{ARGS}.gene_vocab",
        f"{PREPARED}a_gene_vocabulary_rules_the_order_and_keeps_the_library_size",
    ),
    "data.preprocessing.normalize": row(
        "local", "null", f"{ARGS}.preprocessing.normalize {ARGS}.preprocessing.target_sum", STEPS
    ),
    "data.preprocessing.target_sum": row("local", "1000", f"{ARGS}.preprocessing.target_sum", STEPS),
    "data.preprocessing.hvg_selection": row(
        "local",
        "100",
        f"{ARGS}.preprocessing.hvg_selection",
        f"{HVG}the_genes_are_those_that_scanpy_chooses_over_the_files",
    ),
    "data.preprocessing.log1p": row("local", "false", f"{ARGS}.preprocessing.log1p", STEPS),
    "data.preprocessing.hvg_flavor": row(
        "hvg",
        "seurat",
        f"{ARGS}.preprocessing.hvg_flavor",
        f"{HVG}log_normalised_values_are_ranked_by_the_flavor_for_them",
    ),
    "data.preprocessing.hvg_batch_key": row(
        "hvg",
        "donor",
        f"{ARGS}.preprocessing.hvg_batch_key",
        f"{HVG}one_file_is_ranked_as_a_whole_and_a_column_by_its_groups",
    ),
    "data.preprocessing.hvg_whitelist": row(
        "hvg",
        "genes.txt",
        f"{ARGS}.preprocessing.hvg_whitelist",
        f"{HVG}the_whitelist_comes_first_and_counts_among_the_genes",
    ),
    "data.max_genes": row(
        "local",
        "64",
        f"{ARGS}.tokenizer.max_genes {MODEL}.max_seq_len",
        f"{TOKENS}the_highest_expressed_genes_stay_in_gene_order",
    ),
    "data.num_workers": row(
        "local", "0", f"{ARGS}.num_workers", f"{LOADER}worker_processes_change_nothing"
    ),
    "data.census.organism": row(
        "census",
        "Mus musculus",
        f"{ARGS}.census.organism",
        f"{CENSUS}a_query_that_cannot_be_answered_says_what_there_is",
    ),
    "data.census.census_version": row(
        "census", "stable", f"{ARGS}.census.census_version", f"{CENSUS}latest_is_resolved_to_its_date"
    ),
    "data.census.obs_value_filter": row(
        "census",
        "tissue == 'lung'",
        f"{ARGS}.census.obs_value_filter",
        f"{CENSUS}the_raw_filter_goes_before_filters_and_says_so",
    ),
    "data.census.var_value_filter": row(
        "census",
        "feature_name == 'TP53'",
        f"{ARGS}.census.var_value_filter",
        f"{CENSUS}a_filter_on_genes_drops_the_others",
    ),
    "data.census.filters": row(
        "census",
        "{tissue: lung}",
        f"{ARGS}.census.filters",
        f"{CENSUS}the_corpus_holds_the_counts_of_the_cells_that_pass",
    ),
    "data.census.obs_columns": row(
        "census",
        "[donor_id]",
        f"{ARGS}.census.obs_columns",
        f"{CENSUS}kept_columns_hold_the_labels_of_their_cells",
    ),
    "data.census.uri": row(
        "census",
        "cells.soma",
        f"{ARGS}.census.uri",
        f"{CENSUS}an_experiment_of_ones_own_is_read_too",
    ),
    "data.cache_dir": row(
        "local",
        "elsewhere",
        f"{ARGS}.cache_dir",
        f"{PREPARED}a_file_is_converted_once_and_reused_wherever_it_lies",
    ),
    "data.technical_batch": row(
        "local",
        "donor",
        f"{ARGS}.technical_batch",
        f"{PREPARED}obs_columns_are_kept_by_name_and_others_are_not",
    ),
    "data.layer": row(
        "local",
        "raw.X",
        f"{ARGS}.layer",
        f"{PREPARED}scaled_values_are_refused_with_the_cell_and_the_option_to_set",
    ),
    "data.gene_column": row(
        "local", "symbol", f"{ARGS}.gene_column", f"{PREPARED}other_settings_make_another_corpus"
    ),
    "data.min_match": row(
        "local",
        "0.1",
        f"{ARGS}.min_match",
        f"{PREPARED}genes_that_no_file_has_in_common_with_the_vocabulary_are_refused",
    ),
    "tokenizer.strategy": row(
        "local",
        "binned_expression",
        f"{ARGS}.tokenizer.strategy {ARGS}.tokenizer.n_bins {ARGS}.tokenizer.binning_method "
        f"{MODEL}.position_embedding run_name",
        f"{TOKENS}strategies_without_bins_keep_the_order_of_genes_and_the_values",
    ),
    "tokenizer.max_genes": row(
        "local",
        "64",
        f"{ARGS}.tokenizer.max_genes {MODEL}.max_seq_len",
        f"{TOKENS}the_highest_expressed_genes_stay_in_gene_order",
    ),
    "tokenizer.gene_vocab": row(
        "local",
        "from_data",
        f"{ARGS}.gene_vocab",
        f"{PREPARED}a_gene_vocabulary_rules_the_order_and_keeps_the_library_size",
    ),
    "tokenizer.prepend_cls": row(
        "mean", "false", f"{ARGS}.tokenizer.prepend_cls", f"{TOKENS}the_cls_token_takes_one_place"
    ),
    "tokenizer.n_bins": row(
        "binned",
        "7",
        f"{ARGS}.tokenizer.n_bins",
        f"{TOKENS}uniform_bins_agree_with_their_edges_above_the_first",
    ),
    "tokenizer.binning_method": row(
        "binned",
        "quantile",
        f"{ARGS}.tokenizer.binning_method",
        f"{TOKENS}quantile_bins_count_the_edges_below_a_value",
    ),
    "tokenizer.embedding_path": row(
        "vectors",
        "b.npy",
        f"{MODEL}.gene_embedding_path",
        "tests/test_encoder.py::test_gene_vectors_start_the_token_embedding_and_missing_genes_keep_theirs",
    ),
    "tokenizer.embedding_dim": row(
        "vectors",
        "3",
        f"{MODEL}.gene_embedding_dim",
        f"{SELF}test_gene_vectors_of_another_length_are_refused",
    ),
    "tokenizer.masking.mask_ratio": row(
        "local",
        "0.5",
        f"{ARGS}.masking.mask_ratio",
        f"{MASKING}every_cell_has_its_share_masked_and_at_least_one",
    ),
    "tokenizer.masking.random_replace_ratio": row(
        "local", "0", f"{ARGS}.masking.random_replace_ratio", f"{MASKING}shares_are_options"
    ),
    "tokenizer.masking.keep_ratio": row(
        "local", "0", f"{ARGS}.masking.keep_ratio", f"{MASKING}shares_are_options"
    ),
    "tokenizer.gene_medians": row(
        "local",
        "medians.json",
        f"{ARGS}.tokenizer.gene_medians",
        f"{TOKENS}ranks_over_medians_are_those_of_geneformer",
    ),
    "model.architecture": row(
        "local",
        "masked_autoencoder",
        f"model.model_class model.config_class {MODEL} {ARGS}.masking run_name",
        MODELS,
    ),
    "model.hidden_dim": row("local", "64", f"{MODEL}.hidden_dim", MODELS),
    "model.num_layers": row("local", "2", f"{MODEL}.num_layers", MODELS),
    "model.num_heads": row("local", "4", f"{MODEL}.num_heads", MODELS),
    "model.ffn_dim": row("local", "48", f"{MODEL}.ffn_dim", MODELS),
    "model.dropout": row("local", "0.5", f"{MODEL}.dropout", MODELS),
    "model.max_seq_len": row(
        "local", "64", f"{ARGS}.tokenizer.max_genes {MODEL}.max_seq_len", MODELS
    ),
    "model.pooling": row("local", "mean", f"{MODEL}.pooling", MODELS),
    "model.activation": row("local", "relu", f"{MODEL}.activation", MODELS),
    "model.use_expression_values": row("local", "false", f"{MODEL}.use_expression_values", MODELS),
    "model.pretraining_task": row(
        "local",
        "masked_expression_prediction",
        f"{ARGS}.masking {MODEL}.gene_loss_weight {MODEL}.expression_loss_weight",
        f"{MASKING}expression_targets_leave_the_gene_visible",
    ),
    "model.mask_ratio": row(
        "local",
        "0.5",
        f"{ARGS}.masking.mask_ratio",
        f"{MASKING}every_cell_has_its_share_masked_and_at_least_one",
    ),
    "model.vocab_size": row("local", "50000", f"{MODEL}.vocab_size", MODELS),
    "model.n_bins": row("autoregressive", "7", f"{ARGS}.tokenizer.n_bins", MODELS),
    "model.gene_loss_weight": row("both", "0.5", f"{MODEL}.gene_loss_weight", MODELS),
    "model.expression_loss_weight": row("both", "0.5", f"{MODEL}.expression_loss_weight", MODELS),
    "model.decoder_dim": row("autoencoder", "24", f"{MODEL}.decoder_dim", MODELS),
    "model.decoder_layers": row("autoencoder", "2", f"{MODEL}.decoder_layers", MODELS),
    "model.decoder_heads": row("autoencoder", "4", f"{MODEL}.decoder_heads", MODELS),
    "training.batch_size": row(
        "local", "8", "micro_batch_size", f"{LOADER}micro_batches_go_round_the_ranks"
    ),
    "training.max_epochs": row(
        "local", "3", f"{PHASE}.epochs", f"{TRAINING}phases_run_in_order_with_their_own_rates_and_limits"
    ),
    "training.seed": row(
        "local",
        "1",
        f"seed {ARGS}.split_seed",
        f"{TRAINING}the_same_seed_gives_identical_runs_and_another_seed_does_not",
    ),
    "training.strategy": row(
        "local", "auto", "launch.strategy", f"{LAUNCH}a_deepspeed_launch_is_refused_unless_the_strategy_is_auto"
    ),
    "training.num_gpus": row(
        "local",
        "2",
        "launch.num_processes",
        f"{LAUNCH}another_number_of_processes_is_refused_with_the_command_that_starts_them",
    ),
    "training.precision": row(
        "local", "32", "precision", "tests/test_cells_training.py::test_bf16_trains"
    ),
    "training.optimizer.name": row(
        "local",
        "adam",
        "optimizer.optimizer_class",
        "tests/test_optim.py::test_an_optimizer_class_gets_all_parameters_in_one_group",
    ),
    "training.optimizer.lr": row(
        "local",
        "0.5",
        "optimizer.optimizer_args.lr",
        f"{SCHEDULE}a_phase_without_rates_uses_what_the_optimizer_was_built_with",
    ),
    "training.optimizer.weight_decay": row(
        "local",
        "0.5",
        "optimizer.optimizer_args.weight_decay",
        f"{SELF}test_biases_and_norms_have_no_weight_decay_and_matrices_have",
    ),
    "training.scheduler": row(
        "local",
        "null",
        f"{PHASE}.schedule {PHASE}.warmup_steps {PHASE}.schedule_steps {PHASE}.schedule_fits",
        f"{SCHEDULE}warmup_starts_above_zero_and_reaches_the_full_rate",
    ),
    "training.scheduler.name": row(
        "local",
        "linear",
        f"{PHASE}.schedule",
        f"{SCHEDULE}decay_follows_warmup_without_repeating_or_skipping_the_full_rate",
    ),
    "training.scheduler.warmup_steps": row(
        "local",
        "7",
        f"{PHASE}.warmup_steps {PHASE}.schedule_fits",
        f"{SCHEDULE}warmup_starts_above_zero_and_reaches_the_full_rate",
    ),
    "training.scheduler.total_steps": row(
        "local",
        "70",
        f"{PHASE}.schedule_steps {PHASE}.schedule_fits",
        f"{SCHEDULE}a_written_horizon_is_kept_and_the_rate_stays_at_its_end",
    ),
    "training.gradient_clip": row(
        "local", "0.5", "max_grad_norm", f"{SELF}test_gradients_are_clipped_to_the_norm_that_is_set"
    ),
    "training.gradient_accumulation": row(
        "local",
        "2",
        "gradient_accumulation_steps",
        f"{TRAINING}accumulation_changes_nothing_but_rounding",
    ),
    "training.logger": row(
        "local",
        "csv",
        "trackers",
        f"{TRACKERS}csv_holds_every_record_in_full_precision",
    ),
    "training.wandb_project": row(
        "local",
        "mine",
        "trackers.0.project",
        f"{TRACKERS}wandb_without_a_key_records_offline_and_goes_on_with_the_same_run",
    ),
    "training.run_name": row(
        "local",
        "mine",
        "run_name",
        "tests/test_runfolder.py::test_a_run_folder_is_named_by_run_and_time_and_a_second_one_gets_a_suffix",
    ),
    "training.log_dir": row(
        "local", "elsewhere", "log_dir", f"{SELF}test_trackers_write_into_the_log_dir"
    ),
    "training.log_every_n_steps": row(
        "local", "7", f"{PHASE}.log_every_steps", f"{SELF}test_the_terminal_has_a_line_every_so_many_steps"
    ),
    "training.checkpoint_dir": row(
        "local",
        "elsewhere",
        "output_dir",
        "tests/test_runfolder.py::test_a_run_folder_is_named_by_run_and_time_and_a_second_one_gets_a_suffix",
    ),
    "training.save_top_k": row(
        "local",
        "1",
        "checkpoint.keep_best",
        "tests/test_checkpoint.py::test_the_best_of_each_phase_stays",
    ),
    "training.num_workers": row(
        "local", "0", f"{ARGS}.num_workers", f"{LOADER}worker_processes_change_nothing"
    ),
    "training.val_split": row(
        "local",
        "0.5",
        f"{ARGS}.val_fraction",
        f"{LOADER}training_and_validation_cells_are_disjoint_and_all",
    ),
    "training.resume_from": row(
        "local", "auto", "resume_from", f"{TRAINING}a_resumed_run_equals_one_that_was_not_interrupted"
    ),
    "training.fp8": row(
        "fp8",
        "{backend: emulate}",
        "fp8.backend",
        "tests/test_cells_training.py::test_fp8_in_emulation_pads_the_technical_batches_to_16",
    ),
    "training.sampling": row(
        "local",
        "{column: cell_type}",
        f"{ARGS}.sampling",
        f"{PREPARED}balanced_sampling_orders_training_and_not_validation",
    ),
    "training.sampling.column": row(
        "local",
        "cell_type",
        f"{ARGS}.sampling",
        f"{PREPARED}balanced_sampling_orders_training_and_not_validation",
    ),
    "training.sampling.warmup_epochs": row(
        "local",
        "{column: cell_type, warmup_epochs: 3}",
        f"{ARGS}.sampling",
        "tests/test_weighted_order.py::test_warmup_goes_from_uniform_to_balanced",
    ),
    "training.early_stopping": row(
        "local",
        "{patience: 2}",
        "early_stopping",
        "tests/test_early_stopping.py::test_a_phase_ends_after_patience_evaluations_without_improvement",
    ),
    "eval.every_n_epochs": row(
        "benchmarks", "1", f"{PHASE}.benchmarks.every_epochs", f"{EXAMPLES}benchmarks_run_every_so_many_epochs"
    ),
    "eval.batch_size": row(
        "benchmarks", "8", f"{PHASE}.benchmarks.batch_size", f"{EXAMPLES}benchmarks_embed_so_many_cells_at_a_time"
    ),
    "eval.benchmarks": row(
        "local", "[linear_probe]", f"{PHASE}.benchmarks {ARGS}.obs", f"{EXAMPLES}every_example_pretrains"
    ),
    "finetune": row(
        "local",
        "{checkpoint_path: one}",
        "notes",
        f"{EXAMPLES}a_fine_tuned_model_learns_labels_and_goes_on_after_a_resume",
    ),
    "finetune.checkpoint_path": row(
        "finetune",
        "two",
        f"init_from {ARGS}.gene_vocab",
        f"{EXAMPLES}a_fine_tuned_model_starts_from_the_weights_of_its_backbone",
    ),
    "finetune.freeze_backbone": row(
        "finetune",
        "true",
        f"{PHASE}.freeze optimizer.groups",
        f"{EXAMPLES}a_frozen_backbone_stays_as_it_was",
    ),
    "finetune.freeze_backbone_epochs": row(
        "finetune",
        "2",
        f"{PHASE}.epochs {PHASE}.name {PHASE}.freeze {PHASE}.schedule_scope datasets.1",
        f"{EXAMPLES}a_backbone_that_is_frozen_at_first_trains_from_the_epoch_that_is_set",
    ),
    "finetune.label_key": row(
        "finetune",
        "disease",
        f"{ARGS}.label run_name",
        f"{PREPARED}batches_hold_the_class_of_each_cell",
    ),
    "finetune.head.task": row(
        "finetune",
        "regression",
        f"{MODEL}.task {MODEL}.output_dim {ARGS}.label_task {ARGS}.stratify",
        f"{PREPARED}numbers_are_labels_of_a_regression",
    ),
    "finetune.head.n_classes": row(
        "finetune", "12", f"{MODEL}.n_classes", f"{SELF}test_a_field_of_the_head_changes_the_head"
    ),
    "finetune.head.output_dim": row(
        "regression",
        "[age, weight]",
        f"{MODEL}.output_dim {ARGS}.label run_name",
        f"{EXAMPLES}several_numbers_are_predicted_by_a_regression",
    ),
    "finetune.head.hidden_dim": row(
        "finetune",
        "24",
        f"{MODEL}.head_hidden_dim",
        f"{SELF}test_a_field_of_the_head_changes_the_head",
    ),
    "finetune.head.dropout": row(
        "finetune", "0.5", f"{MODEL}.head_dropout", f"{SELF}test_a_field_of_the_head_changes_the_head"
    ),
    "finetune.head.class_weights": row(
        "finetune",
        "balanced",
        f"{MODEL}.class_weights",
        f"{SELF}test_a_field_of_the_head_changes_the_head",
    ),
    "finetune.backbone_lr": row(
        "finetune",
        "0.5",
        f"{PHASE}.group_lrs",
        f"{SCHEDULE}a_rate_for_one_group_by_name_rules_over_the_phase_rate",
    ),
    "finetune.head_lr": row(
        "finetune",
        "0.5",
        f"{PHASE}.group_lrs",
        f"{SCHEDULE}a_rate_for_one_group_by_name_rules_over_the_phase_rate",
    ),
    "finetune.lora.enabled": row(
        "finetune",
        "true",
        f"{MODEL}.lora {PHASE}.freeze optimizer.groups",
        f"{EXAMPLES}lora_trains_its_adapters_alone",
    ),
    "finetune.lora.rank": row(
        "lora", "2", f"{MODEL}.lora.rank", f"{SELF}test_a_field_of_lora_changes_the_adapters"
    ),
    "finetune.lora.alpha": row(
        "lora", "3", f"{MODEL}.lora.alpha", f"{SELF}test_a_field_of_lora_changes_the_adapters"
    ),
    "finetune.lora.dropout": row(
        "lora", "0.5", f"{MODEL}.lora.dropout", f"{SELF}test_a_field_of_lora_changes_the_adapters"
    ),
    "finetune.lora.target_modules": row(
        "lora", "[qkv]", f"{MODEL}.lora.target_modules", f"{SELF}test_a_field_of_lora_changes_the_adapters"
    ),
    "finetune.lora.bias": row(
        "lora",
        "all",
        f"{MODEL}.lora.bias {PHASE}.freeze optimizer.groups",
        f"{SELF}test_biases_train_beside_adapters_as_is_set",
    ),
}  # fmt: skip


def leaves(section=ScModelForgeConfig):
    """Yield the path of every field that holds a value, and of every section that may be absent."""
    for name, field in section.model_fields.items():
        path = f"{section.place}.{name}".lstrip(".")
        inner = inner_section(field.annotation)
        if inner is None or not issubclass(inner, CellsSection):
            yield path
        else:
            if type(None) in getattr(field.annotation, "__args__", ()):
                yield path
            yield from leaves(inner)


def flat(value, path=""):
    """Return the leaves of nested containers by path."""
    if isinstance(value, dict) and value:
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path}.{key}").items()}
    if isinstance(value, (list, tuple)) and value:
        return {k: v for index, inner in enumerate(value) for k, v in flat(inner, f"{path}.{index}").items()}
    return {path.lstrip("."): value if not isinstance(value, (dict, list, tuple)) else ()}


@pytest.fixture
def lower(tmp_path, monkeypatch):
    """Turn overrides into a run; a fine-tuning's backbone is made up."""
    monkeypatch.setattr(trainer.backbone, "read_backbone", lambda path, where: made_up_backbone(path))
    path = tmp_path / "config.yaml"
    path.write_text("")

    def lower(overrides):
        config = load_config(path, overrides)
        is_fine_tuning = any(each.startswith("finetune.") for each in overrides)
        return run_of(config, "finetune" if is_fine_tuning else "train")

    return lower


def made_up_backbone(path):
    return Backbone(
        Path("/backbones") / path,
        "models.encoder.MaskedCellEncoder",
        {"vocab_size": 44, "hidden_dim": 16, "num_layers": 1, "num_heads": 2, "max_seq_len": 32},
        {"strategy": "continuous_projection", "max_genes": 32, "prepend_cls": True},
    )


# The table is complete


def test_every_field_has_a_row():
    assert list(ROWS) == list(leaves()), "each field needs a row: what it becomes, and the test that shows it"


def known_tests():
    return {
        f"tests/{file.name}": set(re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE))
        for file in (ROOT / "tests").glob("test_*.py")
    }


def test_every_named_test_exists():
    known = known_tests()
    for path, (_, _, _, proof) in ROWS.items():
        file, _, name = proof.partition("::")
        assert name in known.get(file, ()), f"{path}: there is no {proof}"


@pytest.mark.parametrize("path", ROWS)
def test_a_field_changes_the_keys_of_the_run_that_the_table_names_and_no_others(path, lower):
    entry = ROWS[path]
    base = BASES[entry.base]
    override = f"{path}={entry.change}"
    if path == "training.sampling.warmup_epochs":
        override = f"training.sampling={entry.change}"
    if path == "finetune.head.output_dim":  # as many columns of labels as numbers
        base = [*base, "finetune.label_key=[age]", f"{path}=1"]
        override = f"finetune.label_key={entry.change}"
    changes = [override, f"{path}=2"] if path == "finetune.head.output_dim" else [override]
    before, after = (flat(lower(overrides).model_dump()) for overrides in (base, [*base, *changes]))
    missing = object()
    changed = {key for key in {*before, *after} if before.get(key, missing) != after.get(key, missing)}
    owner = {key: [k for k in entry.keys if key == k or key.startswith(f"{k}.")] for key in changed}
    assert all(owner.values()), f"not named: {[key for key, found in owner.items() if not found]}"
    unchanged = set(entry.keys) - {found[0] for found in owner.values()}
    assert not unchanged, f"did not change: {unchanged}"


def render_table():
    lines = ["| field | what it is | becomes | shown by |", "|---|---|---|---|"]
    descriptions = {
        f"{section.place}.{name}".lstrip("."): field.description
        for section in section_classes(ScModelForgeConfig)
        for name, field in section.model_fields.items()
    }
    for path, entry in ROWS.items():
        keys = ", ".join(f"`{_short(key)}`" for key in entry.keys)
        file, _, name = entry.proof.partition("::")
        meaning = re.sub(r"([|<])", r"\\\1", descriptions[path])
        lines.append(f"| `{path}` | {meaning} | {keys} | {Path(file).name}: {name} |")
    return "\n".join(lines)


def _short(key):
    key = key.replace(ARGS, "dataloader_args").replace(MODEL, "config_args")
    return key.replace(f"{PHASE}.", "")


def with_table(text):
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{render_table()}\n\n{END}{tail}"


def test_what_is_said_not_to_act_does_not_act(lower):
    census = lower([*BASES["census"], "data.min_match=0.1", "data.layer=X"])
    assert census.notes == ("not used by this run: data.layer (data.source is cellxgene_census)",)
    chosen = ["data.preprocessing.hvg_selection=100", "data.preprocessing.hvg_flavor=seurat"]
    fine_tuning = lower([*BASES["finetune"], *chosen])
    assert fine_tuning.notes == (
        "not used by this run: data.preprocessing.hvg_selection, data.preprocessing.hvg_flavor "
        "(the backbone says so)",
    )
    bins = lower([*BASES["finetune"], "tokenizer.strategy=continuous_projection", "tokenizer.n_bins=7"])
    own = lower([*BASES["finetune"], "tokenizer.n_bins=7"])
    for run in (bins, own):
        assert run.notes == (
            "not used by this run: tokenizer.n_bins "
            "(the backbone's tokenizer.strategy is continuous_projection)",
        )


def test_the_table_of_the_page_is_what_the_rows_say():
    text = PAGE.read_text()
    assert BEGIN in text and END in text
    assert text == with_table(text), "out of date; write it again: python tests/test_cells_fields.py"


# What keys do that no other test shows

SMALL = [
    "model.hidden_dim=16", "model.num_layers=1", "model.num_heads=2", "model.decoder_layers=1", "model.ffn_dim=32",
    "data.max_genes=32", "model.n_bins=5",
]  # fmt: skip
TINY_VALUES = {
    "model.hidden_dim": "32",
    "model.vocab_size": "60",
    "model.decoder_dim": "4",
    "model.decoder_heads": "1",
    "model.num_heads": "4",
}


def small(overrides, path=None, value=None):
    """Return overrides with small sizes; the field in question last."""
    if path is None:
        return [*SMALL, *overrides]
    sizes = [each for each in SMALL if path != "model.max_seq_len" or not each.startswith("data.max_genes")]
    return [*sizes, *overrides, f"{path}={TINY_VALUES.get(path, value)}"]


def built_model(run, n_bins):
    """Build the model of a run on made-up data facts, the same random state before each."""
    config_class = resolve(run.model.config_class, "model.config_class")
    facts = DataFacts(
        {"a": 0}, 1, None, {"vocab_size": 44, "n_bins": n_bins} if n_bins else {"vocab_size": 44}
    )
    arguments = with_data_sizes(config_class, run.model.config_args, facts, "model.config_args")
    torch.manual_seed(0)
    return resolve(run.model.model_class, "model.model_class")(config_class(**arguments))


def made_up_batch(n_bins, masked):
    """Return four cells of twelve genes each, at masked positions a hidden gene or a hidden value."""
    generator = np.random.default_rng(0)
    tokens = torch.from_numpy(np.stack([generator.permutation(40)[:13] + 4 for _ in range(4)]))
    tokens[:, 0] = 3
    values = torch.from_numpy(generator.random((4, 13), dtype=np.float32) + 0.1)
    values[:, 0] = 0
    batch = {
        "tokens": tokens,
        "values": values,
        "attention_mask": torch.ones(4, 13, dtype=torch.bool),
        "depth": torch.full((4,), 5.0),
        "batch_idx": torch.zeros(4, dtype=torch.int64),
        "cell_index": torch.arange(4),
        "num_tokens": 52,
    }
    bins = torch.from_numpy(generator.integers(1, n_bins, (4, 13))) if n_bins else None
    if bins is not None:
        bins[:, 0] = 0
        batch["bins"] = bins
    if masked:
        places = torch.tensor([5, 9, 20, 31, 45])
        is_gene = torch.tensor([masked != "expression", True, masked == "gene", False, masked == "gene"])
        is_gene &= torch.tensor(masked != "expression")
        labels = torch.full((52,), -100)
        hidden = bins.flatten() if bins is not None else values.flatten()
        value_labels = torch.full((52,), -100) if bins is not None else torch.full((52,), torch.nan)
        flat_tokens = tokens.flatten()
        labels[places[is_gene]] = flat_tokens[places[is_gene]]
        value_labels[places] = hidden[places].clone()
        flat_tokens[places[is_gene]] = 2
        values.flatten()[places] = 0
        batch |= {
            "labels": labels.view(4, 13),
            "value_labels": value_labels.view(4, 13),
            "masked_index": places,
        }
        if bins is not None:
            bins.view(-1)[places] = n_bins
    return batch


def behaviour(run):
    """Return what a model is and computes: shapes of its parameters, its loss and its embeddings in training."""
    arguments = run.datasets[0].dataloader_args
    n_bins = arguments["tokenizer"].get("n_bins")
    model = built_model(run, n_bins)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    masking = arguments["masking"]
    batch = made_up_batch(n_bins, None if masking is None else masking["target"])
    # The start of the heads is zero in places; every weight is to matter.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    torch.manual_seed(1)
    model.train()
    loss = float(model.compute_loss(batch).sum.detach())
    model.eval()
    with torch.no_grad():
        embedding = model.encode(batch)
    return shapes, loss, embedding


@pytest.mark.parametrize("path", [path for path, entry in ROWS.items() if entry.proof == MODELS])
def test_a_field_of_the_model_changes_what_the_model_computes(path, lower):
    entry = ROWS[path]
    base = BASES[entry.base]
    one = behaviour(lower(small(base)))
    other = behaviour(lower(small(base, path, entry.change)))
    assert np.isfinite([one[1], other[1]]).all()
    same = one[0] == other[0] and one[1] == other[1] and torch.equal(one[2], other[2])
    assert not same


def test_a_model_built_twice_computes_the_same(lower):
    one, other = (behaviour(lower(small(BASES["both"]))) for _ in range(2))
    assert one[:2] == other[:2] and torch.equal(one[2], other[2])


def test_gene_vectors_of_another_length_are_refused(lower, tmp_path):
    np.save(tmp_path / "v.npy", np.ones((2, 3), np.float32))
    (tmp_path / "v.txt").write_text("a\nb\n")
    overrides = [f"tokenizer.embedding_path={tmp_path / 'v.npy'}"]
    model = built_model(lower(small([*BASES["vectors"], *overrides, "tokenizer.embedding_dim=3"])), None)
    genes = [chr(ord("a") + index) for index in range(40)]
    assert model.initialise_from_data([], genes)["gene_vectors_found"] == 2
    model = built_model(lower(small([*BASES["vectors"], *overrides, "tokenizer.embedding_dim=4"])), None)
    with pytest.raises(ModelError, match="vectors of 3 numbers, but gene_embedding_dim is 4"):
        model.initialise_from_data([], genes)


def test_biases_and_norms_have_no_weight_decay_and_matrices_have(lower):
    run = lower(small([*BASES["both"], "training.optimizer.weight_decay=0.5"]))
    model = built_model(run, None)
    optimizer = build_optimizer(run, model, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups
    }
    assert decayed.keys() == {0.0, 0.5}
    assert decayed[0.0] == {name for name in names.values() if name.endswith("bias") or "norm" in name}
    assert "transformer.layers.0.attention.qkv.layer_norm_weight" in decayed[0.0]
    assert "transformer.layers.0.attention.out_proj.weight" in decayed[0.5]


def tuned(run):
    """Build the fine-tuned model of a run."""
    config_class = resolve(run.model.config_class, "model.config_class")
    arguments = {"n_classes": 3, **run.model.config_args}
    if arguments.get("task") == "regression":
        arguments.pop("n_classes")
    torch.manual_seed(0)
    return resolve(run.model.model_class, "model.model_class")(config_class(**arguments))


def tuned_behaviour(model):
    """Return the shapes of a fine-tuned model's parameters, and its loss in training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if model.class_weight is not None:
        model.set_class_counts([1, 2, 7])
    batch = {**made_up_batch(None, None), "label": torch.tensor([0, 1, 2, 1])}
    torch.manual_seed(1)
    model.train()
    loss = float(model.compute_loss(batch).sum.detach())
    assert np.isfinite(loss)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}, loss


@pytest.mark.parametrize("base", ["finetune", "lora"])
def test_a_fine_tuned_model_built_twice_computes_the_same(base, lower):
    one, other = (tuned_behaviour(tuned(lower(BASES[base]))) for _ in range(2))
    assert one == other


@pytest.mark.parametrize("path", [p for p, entry in ROWS.items() if entry.proof.endswith("changes_the_head")])
def test_a_field_of_the_head_changes_the_head(path, lower):
    base = BASES[ROWS[path].base]
    assert tuned_behaviour(tuned(lower(base))) != tuned_behaviour(
        tuned(lower([*base, f"{path}={ROWS[path].change}"]))
    )


@pytest.mark.parametrize(
    "path", [p for p, entry in ROWS.items() if entry.proof.endswith("changes_the_adapters")]
)
def test_a_field_of_lora_changes_the_adapters(path, lower):
    base = BASES["lora"]
    assert tuned_behaviour(tuned(lower(base))) != tuned_behaviour(
        tuned(lower([*base, f"{path}={ROWS[path].change}"]))
    )


@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        ("none", []),
        ("all", ["transformer.final_norm.bias", "transformer.layers.0.attention.out_proj.base_layer.bias"]),
        ("lora_only", ["transformer.layers.0.attention.out_proj.base_layer.bias"]),
    ],
)
def test_biases_train_beside_adapters_as_is_set(bias, trained, lower):
    run = lower([*BASES["lora"], f"finetune.lora.bias={bias}"])
    model = tuned(run)
    mark_trainable(run, model)
    build_optimizer(run, model, model)
    names = {name.removeprefix("backbone.") for name, p in model.named_parameters() if p.requires_grad}
    biases = {name for name in names if name.endswith("bias") and not name.startswith("head.")}
    assert biases >= set(trained) and (bool(biases) == bool(trained))
    assert ("transformer.final_norm.bias" in biases) == (bias == "all")
    assert any(".lora_" in name for name in names)
    assert not any("base_layer.weight" in name for name in names)


def test_trackers_write_into_the_log_dir(tmp_path):
    folder = train(tmp_path, toy({"max_steps": 1}), log_dir=str(tmp_path / "logs"))
    assert (tmp_path / "logs" / folder.name / "metrics.csv").is_file()
    assert (folder / "metrics.jsonl").is_file() and not (folder / "metrics.csv").exists()


def test_the_terminal_has_a_line_every_so_many_steps(tmp_path, capsys):
    train(tmp_path, toy({"epochs": 10, "max_steps": 7, "log_every_steps": 3, "eval_every_epochs": None}))
    told = re.findall(r"^step\s+(\d+)\s+p0 \d+/7", capsys.readouterr().out, re.MULTILINE)
    assert told == ["3", "6", "7"]


def test_gradients_are_clipped_to_the_norm_that_is_set(tmp_path):
    phase = {"max_steps": 3, "schedule": "constant"}
    optimizer = {"optimizer_class": "torch.optim.SGD", "optimizer_args": {"lr": 1.0}}
    ends = [
        final_weights(train(tmp_path / str(norm), toy(phase, optimizer=optimizer, max_grad_norm=norm)))
        for norm in (1e-6, 1.0)
    ]
    starts = final_weights(train(tmp_path / "start", toy(phase, optimizer=optimizer, max_grad_norm=1e-12)))
    moved = [max(float((end[name] - starts[name]).norm()) for name in starts) for end in ends]
    assert moved[0] <= 3.1e-6 < moved[1]


if __name__ == "__main__":
    os.chdir(ROOT)
    PAGE.write_text(with_table(PAGE.read_text()))
