"""The typed configuration of single-cell models: the sections `data, tokenizer, model, training, eval, finetune`.

These classes are what a person writes, in YAML or in Python: they can be changed, and every change is checked.
`trainer.config.cells_run` turns one into the frozen `RunConfig` that a run is carried out from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from models.families import Architecture, PretrainingTask
from trainer.config.cells_checks import cross_field_problems, settle_twins
from trainer.config.cells_section import CellsSection, build
from trainer.config.compose import compose
from trainer.config.fields import (
    Count,
    Dropout,
    PathText,
    PositiveCount,
    RunName,
    Share,
    Text,
    path_text,
    precision_word,
)
from trainer.config.messages import Problem, Sources, ValidationError, config_error
from trainer.config.schema import EarlyStoppingConfig, Fp8Config


class PreprocessingConfig(CellsSection):
    """What is done to the expression of a cell before it is tokenized."""

    place = "data.preprocessing"

    normalize: Literal["library_size"] | None = Field(
        default="library_size",
        description="library_size: scale each cell's counts to target_sum; null: leave them. Values that are "
        "log-normalised already are left alone where this is not written",
    )
    target_sum: Annotated[float, Field(gt=0)] | None = Field(
        default=1e4,
        description="Library size that counts are scaled to (counts per cell; null: the median of the training cells)",
    )
    hvg_selection: PositiveCount | None = Field(
        default=None,
        description="Highly variable genes that make up the gene space (genes; null: all)",
    )
    log1p: bool = Field(default=True, description="Take log(1 + x) after scaling")
    hvg_flavor: Literal["seurat_v3", "seurat_v3_paper", "seurat", "cell_ranger"] | None = Field(
        default=None,
        description="How scanpy ranks highly variable genes (null: seurat_v3 for counts, seurat for log-normalised "
        "values); with hvg_selection",
    )
    hvg_batch_key: Text | None = Field(
        default=None,
        description="Column of obs within whose groups genes are ranked (null: within each file); with hvg_selection",
    )
    hvg_whitelist: PathText | None = Field(
        default=None,
        description="Text file with genes that are selected in any case, one a line; with hvg_selection",
    )


class CensusConfig(CellsSection):
    """Which cells of the CELLxGENE Census are read."""

    place = "data.census"

    organism: Literal["Homo sapiens", "Mus musculus"] = Field(
        default="Homo sapiens", description="The Census's name of the organism"
    )
    census_version: Text = Field(
        default="latest", description="Census release: a date as 2025-01-30, stable or latest"
    )
    obs_value_filter: Text | None = Field(
        default=None, description="SOMA value filter on cells; goes before filters"
    )
    var_value_filter: Text | None = Field(default=None, description="SOMA value filter on genes")
    filters: dict[str, Any] | None = Field(
        default=None, description="Column of obs -> the value or list of values that cells must have there"
    )
    obs_columns: list[Text] | None = Field(
        default=None, description="Columns of obs that are kept beside those that the run needs"
    )
    uri: PathText | None = Field(
        default=None, description="A SOMA experiment of your own in place of the Census (path or URI)"
    )


class DataConfig(CellsSection):
    """Where the cells come from, and what is done to them first."""

    place = "data"

    source: Literal["local", "cellxgene_census"] = Field(
        default="local", description="local: the files in paths; cellxgene_census: what census describes"
    )
    paths: list[PathText] = Field(default_factory=list, description="h5ad files; each is converted once")
    gene_vocab: PathText = Field(
        default="human_protein_coding",
        description="Gene space: human_protein_coding, human_all, mouse_protein_coding, mouse_all, from_data, or the "
        "path of a gene list, a checkpoint or an export",
    )
    preprocessing: PreprocessingConfig = Field(
        default_factory=PreprocessingConfig, description="Normalisation and gene selection"
    )
    max_genes: Annotated[PositiveCount, Field(ge=2)] = Field(
        default=2048, description="Most tokens of a cell, the cls token included (tokens)"
    )
    num_workers: Count = Field(
        default=4, description="Processes that prepare batches on each rank (processes; 0: a thread)"
    )
    census: CensusConfig = Field(default_factory=CensusConfig, description="The CELLxGENE Census")
    cache_dir: PathText = Field(
        default="cache", description="Folder of converted files, found again by their content"
    )
    technical_batch: Text | None = Field(
        default=None, description="Column of obs with the technical batch (null: each file is one)"
    )
    layer: Text = Field(
        default="auto",
        description="Matrix of the files: X, raw.X or layers/NAME (auto: the first with counts); with source: local",
    )
    gene_column: Text | None = Field(
        default=None,
        description="Column of var with the gene names (null: found by content); with source: local",
    )
    min_match: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5,
        description="Least share of a file's genes, or of the gene space's if these are fewer, that must match "
        "(fraction)",
    )


class MaskingConfig(CellsSection):
    """Which genes of a cell the model has to fill in, and what stands in their place."""

    place = "tokenizer.masking"

    mask_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.15, description="Share of a cell's genes that are masked (fraction)"
    )
    random_replace_ratio: Share = Field(
        default=0.1, description="Share of the masked genes that show a random gene (fraction)"
    )
    keep_ratio: Share = Field(
        default=0.1, description="Share of the masked genes that show the gene itself (fraction)"
    )


class TokenizerConfig(CellsSection):
    """How a cell becomes a sequence of tokens."""

    place = "tokenizer"

    strategy: Literal["rank_value", "binned_expression", "continuous_projection", "gene_embedding"] = Field(
        default="rank_value",
        description="rank_value: genes by falling expression; binned_expression: expression in bins; "
        "continuous_projection: expression as numbers; gene_embedding: the same with genes from embedding_path",
    )
    max_genes: Annotated[PositiveCount, Field(ge=2)] = Field(
        default=2048, description="Most tokens of a cell, the cls token included (tokens)"
    )
    gene_vocab: PathText = Field(default="human_protein_coding", description="Gene space, as data.gene_vocab")
    prepend_cls: bool = Field(default=True, description="Put a [CLS] token before the genes")
    n_bins: Annotated[PositiveCount, Field(ge=3)] = Field(
        default=51,
        description="Expression bins, bin 0 for zero (bins); with binned_expression, or an autoregressive model",
    )
    binning_method: Literal["uniform", "quantile", "per_cell"] = Field(
        default="uniform",
        description="Bin edges: equal widths, quantiles of the training cells, or quantiles of each cell; "
        "with binned_expression",
    )
    embedding_path: PathText | None = Field(
        default=None,
        description="File of gene vectors that the model's gene table starts from; with gene_embedding",
    )
    embedding_dim: PositiveCount = Field(
        default=200, description="Length of the vectors in embedding_path (numbers); with gene_embedding"
    )
    masking: MaskingConfig = Field(default_factory=MaskingConfig, description="What is masked")
    gene_medians: PathText | None = Field(
        default=None,
        description="File of the genes' median expression, by which counts are divided before they are ranked, as "
        "Geneformer does; with rank_value",
    )


class ModelConfig(CellsSection):
    """The model's architecture and sizes."""

    place = "model"

    architecture: Architecture = Field(default="transformer_encoder", description="Which of the three models")
    hidden_dim: PositiveCount = Field(default=512, description="Width of the model (numbers)")
    num_layers: PositiveCount = Field(default=12, description="Transformer blocks (blocks)")
    num_heads: PositiveCount = Field(default=8, description="Attention heads; must divide hidden_dim (heads)")
    ffn_dim: PositiveCount | None = Field(
        default=None, description="Inner width of the MLPs (numbers; null: 4 x hidden_dim)"
    )
    dropout: Dropout = Field(default=0.1, description="Probability of dropout (fraction)")
    max_seq_len: Annotated[PositiveCount, Field(ge=2)] = Field(
        default=2048, description="Longest sequence that the model takes (tokens)"
    )
    pooling: Literal["cls", "mean"] = Field(
        default="cls", description="What a cell's embedding is: the state of [CLS], or the mean over genes"
    )
    activation: Literal["gelu", "relu"] = Field(default="gelu", description="Activation of the MLPs")
    use_expression_values: bool = Field(
        default=True, description="Let the model read expression beside the genes and their order"
    )
    pretraining_task: PretrainingTask = Field(
        default="masked_gene_prediction",
        description="What the model learns to predict; where not written, what the architecture is for",
    )
    mask_ratio: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.15, description="Share of a cell's genes that are masked (fraction)"
    )
    vocab_size: PositiveCount | None = Field(
        default=None,
        description="Rows of the token table (tokens; null: 4 special ones and the genes of the gene space)",
    )
    n_bins: Annotated[PositiveCount, Field(ge=3)] = Field(
        default=51, description="Expression bins that an autoregressive model predicts (bins)"
    )
    gene_loss_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Weight of the gene loss; where genes and expression are predicted"
    )
    expression_loss_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Weight of the expression loss; where genes and expression are predicted"
    )
    decoder_dim: PositiveCount | None = Field(
        default=None,
        description="Width of the decoder (numbers; null: half of hidden_dim); with masked_autoencoder",
    )
    decoder_layers: PositiveCount = Field(
        default=4, description="Blocks of the decoder (blocks); with masked_autoencoder"
    )
    decoder_heads: PositiveCount | None = Field(
        default=None,
        description="Attention heads of the decoder (heads; null: num_heads); with masked_autoencoder",
    )


class OptimizerConfig(CellsSection):
    """The optimizer."""

    place = "training.optimizer"

    name: Literal["adamw", "adam"] = Field(
        default="adamw",
        description="adamw: weight decay apart from the gradient; adam: added to the gradient",
    )
    lr: Annotated[float, Field(gt=0)] = Field(default=1e-4, description="Base learning rate")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.01, description="Weight decay of matrices; biases and norms have none"
    )


class SchedulerConfig(CellsSection):
    """How the learning rate changes over the run."""

    place = "training.scheduler"

    name: Literal["cosine_warmup", "cosine", "linear"] = Field(
        default="cosine_warmup",
        description="cosine_warmup: linear rise, then a cosine to 0; cosine: without the rise; "
        "linear: linear rise, then a line to 0",
    )
    warmup_steps: Count = Field(
        default=2000,
        description="Steps of the rise (optimizer steps); where not written, at most a tenth of the run",
    )
    total_steps: PositiveCount = Field(
        default=100000,
        description="Step at which the rate reaches 0, and stays (optimizer steps); where not written, at most the run",
    )


class SamplingConfig(CellsSection):
    """Draw cells of rare groups more often."""

    place = "training.sampling"

    column: Text = Field(description="Column of obs whose groups are drawn equally often")
    warmup_epochs: Count = Field(
        default=0, description="Epochs over which the draw turns from uniform to balanced (epochs)"
    )


class TrainingConfig(CellsSection):
    """The training loop."""

    place = "training"

    batch_size: PositiveCount = Field(default=64, description="Cells per rank and forward pass (cells)")
    max_epochs: PositiveCount = Field(default=10, description="Passes over the data (epochs)")
    seed: Count = Field(default=42, description="Seed of weights, order, split, masks and dropout")
    strategy: Literal["ddp", "ddp_spawn", "auto"] = Field(
        default="ddp",
        description="ddp: plain data parallelism under a launcher; ddp_spawn: the command starts its ranks itself; "
        "auto: whatever the launcher asks for, DeepSpeed ZeRO included",
    )
    num_gpus: PositiveCount | None = Field(
        default=None, description="Ranks of the run (processes, a GPU each; null: what the launcher starts)"
    )
    precision: Annotated[Literal["32", "16-mixed", "bf16-mixed", "fp8"], BeforeValidator(precision_word)] = (
        Field(default="bf16-mixed", description="Precision of the computation; fp8 needs a recent GPU")
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="The optimizer")
    scheduler: SchedulerConfig | None = Field(
        default_factory=SchedulerConfig, description="The schedule (null: a constant learning rate)"
    )
    gradient_clip: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Gradients are clipped to this global L2 norm (0: off)"
    )
    gradient_accumulation: PositiveCount = Field(
        default=1, description="Micro-batches per rank and optimizer step"
    )
    logger: Literal["wandb", "tensorboard", "csv"] = Field(
        default="wandb", description="Where metrics go beside metrics.jsonl"
    )
    wandb_project: Text = Field(
        default="scmodelforge", description="Project of Weights & Biases; with logger: wandb"
    )
    run_name: RunName | None = Field(
        default=None, description="Name of the run and its folder (null: made from what is trained)"
    )
    log_dir: PathText = Field(
        default="logs", description="Folder of the logger's files, in one named as the run folder"
    )
    log_every_n_steps: PositiveCount = Field(
        default=50, description="Between lines of the log (optimizer steps)"
    )
    checkpoint_dir: PathText = Field(
        default="checkpoints", description="Folder in which the run folder is made"
    )
    save_top_k: Count = Field(
        default=3,
        description="Checkpoints of lowest validation loss that are kept, beside the newest (checkpoints)",
    )
    num_workers: Count = Field(default=4, description="As data.num_workers (processes)")
    val_split: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05, description="Share of the cells that is held out for validation (fraction)"
    )
    resume_from: PathText | None = Field(
        default=None,
        description="latest or auto (this run name's newest checkpoint), or a run or checkpoint folder; null: start",
    )
    fp8: Fp8Config | None = Field(default=None, description="How FP8 is computed; with precision: fp8")
    sampling: SamplingConfig | None = Field(
        default=None, description="Weighted draw of cells (null: each cell once an epoch)"
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        default=None, description="End the run when a metric stands still (null: never)"
    )


class EvalConfig(CellsSection):
    """Benchmarks of the cell embeddings during training."""

    place = "eval"

    every_n_epochs: PositiveCount = Field(default=2, description="Between benchmarks (epochs)")
    batch_size: PositiveCount = Field(default=256, description="Cells per rank and forward pass (cells)")
    benchmarks: list[Any] = Field(
        default_factory=list,
        description="linear_probe, embedding_quality, perturbation: names, or sections with name and options",
    )


class TaskHeadConfig(CellsSection):
    """The head that a fine-tuned model gets."""

    place = "finetune.head"

    task: Literal["classification", "regression"] = Field(
        default="classification", description="Whether labels are classes or numbers"
    )
    n_classes: Annotated[PositiveCount, Field(ge=2)] | None = Field(
        default=None,
        description="Classes (null: those of the training cells' labels); with task: classification",
    )
    output_dim: PositiveCount = Field(
        default=1, description="Numbers predicted, as many as label_key names columns; with task: regression"
    )
    hidden_dim: PositiveCount | None = Field(
        default=None, description="Width of a hidden layer (numbers; null: no such layer)"
    )
    dropout: Dropout = Field(default=0.1, description="Probability of dropout in the head (fraction)")
    class_weights: Literal["balanced"] | None = Field(
        default=None,
        description="balanced: weight classes by the inverse of their frequency; with task: classification",
    )


class LoRAConfig(CellsSection):
    """Low-rank adapters in place of training the backbone's own weights."""

    place = "finetune.lora"

    enabled: bool = Field(default=False, description="Train adapters; the backbone's weights stay")
    rank: PositiveCount = Field(default=8, description="LoRA rank r of each adapter")
    alpha: PositiveCount = Field(default=16, description="An adapter's output is scaled by alpha / rank")
    dropout: Dropout = Field(default=0.05, description="Probability of dropout before an adapter (fraction)")
    target_modules: Annotated[list[Text], Field(min_length=1)] | None = Field(
        default=None,
        description="Names of the layers that get one (null: out_proj, linear1, linear2)",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none",
        description="Biases that train: none, all of the backbone, or those of layers with an adapter",
    )


class FinetuneConfig(CellsSection):
    """Fine-tuning of a pretrained backbone; used by the command `finetune`."""

    place = "finetune"

    checkpoint_path: Annotated[str, BeforeValidator(path_text)] = Field(
        default="", description="Run folder, checkpoint or export that the backbone comes from"
    )
    freeze_backbone: bool = Field(
        default=False, description="Hold all weights of the backbone still throughout"
    )
    freeze_backbone_epochs: Count = Field(
        default=0, description="The backbone trains after this many (epochs; 0: from the start)"
    )
    label_key: Text | Annotated[list[Text], Field(min_length=1)] = Field(
        default="cell_type",
        description="Column of obs with the labels; several columns are the numbers of a regression",
    )
    head: TaskHeadConfig = Field(default_factory=TaskHeadConfig, description="The head")
    backbone_lr: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Base learning rate of the backbone (null: training.optimizer.lr)"
    )
    head_lr: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Base learning rate of the head (null: training.optimizer.lr)"
    )
    lora: LoRAConfig = Field(default_factory=LoRAConfig, description="Adapters")


class ScModelForgeConfig(CellsSection):
    """Everything that a person configures of a single-cell model."""

    data: DataConfig = Field(default_factory=DataConfig, description="The cells")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="Cells into tokens")
    model: ModelConfig = Field(default_factory=ModelConfig, description="The model")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="The training")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="Benchmarks")
    finetune: FinetuneConfig | None = Field(
        default=None, description="Fine-tuning (null: this configuration is for pretraining)"
    )

    def settle(self) -> list[Problem]:
        """Let twins show the value that rules them, and return what contradicts."""
        settle_twins(self)
        return cross_field_problems(self)


def load_config(path: str | Path, overrides: list[str] | None = None) -> ScModelForgeConfig:
    """Load, compose and check a typed configuration.

    Args:
        path: the YAML file; it may have a `defaults` list and interpolations.
        overrides: values on top of the file, as `training.batch_size=128`.

    Raises:
        ValidationError: lists every wrong key, type and value with its YAML path, and what contradicts.
        ConfigError: there is no such file, or it is not YAML.
    """
    path = Path(path).expanduser()
    raw, problems, sources = compose(path, list(overrides or []))
    return cells_config(raw, sources, problems)


def cells_config(
    raw: dict[str, Any], source: str | Sources, known: list[Problem] | None = None
) -> ScModelForgeConfig:
    """Return the typed configuration of composed values; `known` are mistakes that composing them found.

    Raises:
        ValidationError: lists every mistake.
    """
    config, problems = build(ScModelForgeConfig, raw, known or [])
    problems = [*(known or []), *problems]
    if problems or config is None:
        raise config_error(source, problems, ValidationError)
    return config
