"""The configuration of circuit-diffusion models: the sections `general, model, training, text_encoder, scheduler`.

A file has them at the top level, or all of them under `training`, which is where the presets of a folder `training/`
are merged. `trainer.config.circuits_run` turns them into the frozen `RunConfig` that a run is carried out from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from trainer.config.cells_section import CellsSection, build
from trainer.config.circuits_checks import cross_field_problems, without_foreign_keys
from trainer.config.compose import compose
from trainer.config.fields import Arguments, Count, PathText, PositiveCount, Share, Text
from trainer.config.messages import Problem, Sources, ValidationError, config_error
from trainer.config.schema import EarlyStoppingConfig, EmaConfig, OneCycleConfig

LrScheduler = Literal["OneCycleLR", "CosineAnnealingLR", "one_cycle", "cosine", "linear", "constant"]
PaddingMode = Literal["max", "bucket"]
Sizes = Annotated[list[PositiveCount], Field(min_length=1)]


def _text_of_switch(value: Any) -> Any:
    """Read `resume: true` as the newest checkpoint, and false as none."""
    return {True: "latest", False: None}[value] if isinstance(value, bool) else value


class GeneralConfig(CellsSection):
    """What is trained on, and where the result goes."""

    place = "general"

    dataset: PathText | None = Field(
        default=None,
        description="Folder of a saved set of circuits (config.yaml and dataset/), or a folder of such folders, which "
        "are merged; required, unless every stage names its own",
    )
    output_path: PathText | None = Field(
        default=None, description="Folder that the trained pipeline and the run's checkpoints go to; required"
    )
    model_name: Text | None = Field(
        default=None, description="Folder in output_path for the trained pipeline (null: output_path itself)"
    )
    experiment_name: Text | None = Field(
        default=None, description="Name of the run and its folder (null: model_name, or circuits)"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Kind of device; auto: a GPU where there is one"
    )
    init_from_pipeline_dir: PathText | None = Field(
        default=None,
        description="Saved pipeline, exported model or checkpoint whose weights a fresh start takes; its gates must "
        "be the data's",
    )
    resume: Annotated[PathText | None, BeforeValidator(_text_of_switch)] = Field(
        default=None,
        description="true or latest: go on with this run name's newest checkpoint; auto: the same, or start where "
        "there is none; or the path of a run or checkpoint folder; false or null: start",
    )
    overwrite: bool = Field(
        default=False, description="Replace a pipeline that another run has saved in the same folder"
    )
    njobs: Count = Field(
        default=0, description="Processes that prepare batches on each rank (processes; 0: a thread)"
    )
    verbose: bool = Field(default=False, description="A line of the log for every step, not every tenth")


class UnitaryEncoderConfig(CellsSection):
    """The encoder of the unitary that is to be compiled; each of the two kinds has sizes of its own."""

    place = "model.params.unitary_encoder_config"

    cond_emb_size: PositiveCount | None = Field(
        default=None,
        description="Width of what it puts out (numbers; null: that of the prompts, which it must be)",
    )
    num_heads: PositiveCount | None = Field(
        default=None, description="Attention heads (heads; null: 4, genQC 8)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Probability of dropout (fraction)"
    )
    hidden_dim: PositiveCount | None = Field(
        default=None, description="Width inside (numbers; null: cond_emb_size); of ours"
    )
    patch_size: PositiveCount | None = Field(
        default=None, description="Rows and columns of a patch of the matrix (null: 2); of ours"
    )
    depth: PositiveCount | None = Field(
        default=None, description="Transformer blocks (blocks; null: 2); of ours"
    )
    model_features: Sizes | None = Field(
        default=None,
        description="Channels of its levels, the first one 2 (numbers); of genQC's, with model.target",
    )
    transformer_depths: Sizes | None = Field(
        default=None, description="Transformer blocks of its levels (blocks); of genQC's, with model.target"
    )


class UnetParams(CellsSection):
    """The sizes of the UNet."""

    place = "model.params"

    model_features: Sizes = Field(
        default_factory=lambda: [128, 128, 256], description="Channels of each level (numbers)"
    )
    clr_dim: Annotated[PositiveCount, Field(ge=2)] | None = Field(
        default=None,
        description="Width of the vectors that tokens are diffused as (numbers; null: 8, or the number of tokens where "
        "that is larger)",
    )
    num_clrs: PositiveCount | None = Field(
        default=None, description="Accepted; the gates of the data decide: their number + 2"
    )
    t_emb_size: PositiveCount = Field(
        default=256, description="Width of the embedding of time steps (numbers)"
    )
    cond_emb_size: PositiveCount = Field(
        default=512, description="Width of the embedding of prompts (numbers)"
    )
    num_heads: Sizes = Field(
        default_factory=lambda: [8, 8, 2], description="Attention heads of each level (heads)"
    )
    num_res_blocks: Sizes = Field(
        default_factory=lambda: [2, 2, 4], description="Residual blocks of each level (blocks)"
    )
    transformer_depths: Sizes = Field(
        default_factory=lambda: [1, 2, 1], description="Transformer blocks of each level (blocks)"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Probability of dropout in its blocks (fraction); of our UNet"
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Compute each level again in the backward pass, to save memory; of our UNet",
    )
    unitary_encoder_config: UnitaryEncoderConfig | None = Field(
        default=None, description="The encoder of unitaries (null: its defaults); with QC_Compilation_UNet"
    )


class ModelConfig(CellsSection):
    """The network."""

    place = "model"

    type: Literal["QC_Cond_UNet", "QC_Compilation_UNet"] | None = Field(
        default=None,
        description="Our UNet: QC_Cond_UNet, conditioned on prompts, or QC_Compilation_UNet, on unitaries too (null: "
        "QC_Cond_UNet, unless target is given)",
    )
    target: (
        Literal[
            "genQC.models.unet_qc.QC_Cond_UNet",
            "genQC.models.unet_qc.QC_Compilation_UNet",
            "models.circuit_unet.CircuitUNet",
            "models.circuit_unet.CircuitCompilationUNet",
        ]
        | None
    ) = Field(
        default=None, description="Dotted path of the UNet, in place of type; genQC's need genqc installed"
    )
    save_type: Literal["safetensors"] | None = Field(
        default=None, description="Weights are saved as safetensors, whether or not this says so"
    )
    params: UnetParams = Field(default_factory=UnetParams, description="Its sizes")
    prompt_tokens: PositiveCount = Field(
        default=4, description="Tokens of a prompt that is learned (tokens); not with a text_encoder"
    )


class TextEncoderParams(CellsSection):
    """A CLIP text encoder on this machine."""

    place = "text_encoder.params"

    local_weights_path: PathText | None = Field(
        default=None,
        description="Its weights, required: a .safetensors file for CachedFrozenOpenCLIPEmbedder, a folder with model "
        "and tokenizer for CLIPTextModel",
    )
    arch: Text = Field(
        default="ViT-B-32",
        description="Name of the architecture, as open_clip has it; with CachedFrozenOpenCLIPEmbedder",
    )
    version: None = Field(default=None, description="Accepted where it is null: nothing is downloaded")
    max_length: PositiveCount = Field(default=77, description="Tokens of a prompt, padding included (tokens)")
    freeze: Literal[True] = Field(default=True, description="Accepted where it is true: it is not trained")
    layer: Literal["last", "penultimate"] = Field(
        default="penultimate", description="Whose states a prompt's tokens are"
    )


class TextEncoderConfig(CellsSection):
    """What turns prompts into tokens, in place of a table that is learned; each prompt once, before training."""

    place = "text_encoder"

    type: Literal["CachedFrozenOpenCLIPEmbedder", "CLIPTextModel"] = Field(
        default="CachedFrozenOpenCLIPEmbedder",
        description="CachedFrozenOpenCLIPEmbedder: of open_clip; CLIPTextModel: of transformers",
    )
    params: TextEncoderParams = Field(default_factory=TextEncoderParams, description="Which one")


class SchedulerParams(CellsSection):
    """The noise schedule, and what the network is asked for."""

    place = "scheduler.params"

    num_train_timesteps: PositiveCount = Field(default=1000, description="Steps of noise (time steps)")
    beta_start: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.0001, description="Variance that the first step adds; with linear schedules"
    )
    beta_end: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.02, description="Variance that the last step adds; with linear schedules"
    )
    beta_schedule: Literal["linear", "linear_sqrt", "cos_alpha", "cos_alpha4"] = Field(
        default="cos_alpha", description="How the noise grows over the time steps"
    )
    input_perturbation: Annotated[float, Field(ge=0)] = Field(
        default=0.1, description="Further noise on what the network sees in training (share of the noise)"
    )
    prediction_type: Literal["epsilon", "x0", "v-type"] = Field(
        default="epsilon",
        description="What the network is trained to say: the noise, the circuit, or the velocity",
    )
    enable_zero_terminal_snr: bool = Field(
        default=True, description="Leave nothing of the circuit at the last time step, with x0 and v-type"
    )
    eta: Annotated[float, Field(ge=0)] = Field(
        default=1.0,
        description="Noise that the sampler adds at each step (0: none, 1: as DDPM); with DDIMScheduler",
    )


class SchedulerConfig(CellsSection):
    """How noise is added, and taken away."""

    place = "scheduler"

    type: Literal["DDIMScheduler", "DDPMScheduler", "DPMScheduler"] = Field(
        default="DDIMScheduler", description="Which sampler the trained pipeline has"
    )
    params: SchedulerParams = Field(default_factory=SchedulerParams, description="The noise schedule")


class WandbConfig(CellsSection):
    """Weights & Biases."""

    place = "training.wandb"

    enable: bool = Field(default=False, description="Send metrics there")
    project: Text = Field(default="circuits", description="Project")


class TrainingConfig(CellsSection):
    """The training loop."""

    place = "training"

    num_epochs: PositiveCount = Field(default=50, description="Passes over the data (epochs)")
    max_steps: PositiveCount | None = Field(
        default=None, description="Training ends after this many (optimizer steps; null: no limit)"
    )
    batch_size: PositiveCount = Field(
        default=256, description="Circuits per rank and forward pass (circuits)"
    )
    global_batch_size: PositiveCount | None = Field(
        default=None, description="Circuits per optimizer step over all ranks (null: one batch_size a rank)"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=3e-4, description="Base learning rate; with one_cycle the highest"
    )
    optimizer: Literal[
        "Adam", "AdamW", "Adamax", "Adadelta", "Adagrad", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"
    ] = Field(default="Adam", description="Optimizer of torch.optim")
    optimizer_args: Arguments = Field(
        default_factory=dict, description="Its further arguments (weight_decay, betas, ...)"
    )
    loss: Literal["MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"] = Field(
        default="MSELoss", description="Loss of torch.nn between what the network says and what it should"
    )
    lr_scheduler: LrScheduler | None = Field(
        default=None,
        description="one_cycle (OneCycleLR): up and down over the run; cosine (CosineAnnealingLR) and linear: down "
        "to min_lr_ratio at the last step; null or constant: the base learning rate",
    )
    one_cycle: OneCycleConfig | None = Field(
        default=None, description="Shape of lr_scheduler: one_cycle (null: torch's defaults)"
    )
    warmup_steps: Count = Field(
        default=0, description="Linear rise to the base learning rate (optimizer steps); not with one_cycle"
    )
    min_lr_ratio: Share = Field(
        default=0.0,
        description="Learning rate at the end of cosine and linear (fraction of the base learning rate)",
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Gradients are clipped to this global L2 norm (null: off)"
    )
    gradient_accumulation_steps: PositiveCount | None = Field(
        default=None, description="Micro-batches per rank and optimizer step (null: 1)"
    )
    enable_guidance_train: bool = Field(
        default=True, description="Leave out conditions at random, which classifier-free guidance needs"
    )
    guidance_train_p: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Share of circuits whose prompt, and whose unitary, is left out (fraction)"
    )
    cached_text_enc: Literal[True] = Field(
        default=True, description="Accepted where it is true: each prompt is encoded once"
    )
    padding_mode: PaddingMode = Field(
        default="max",
        description="max: every circuit takes part in every batch, padded to its longest; bucket: batches of circuits "
        "of one size",
    )
    balance_max: PositiveCount | None = Field(
        default=None, description="Most circuits of one prompt, a seeded choice (circuits; null: all)"
    )
    max_samples: PositiveCount | None = Field(
        default=None, description="Most circuits in all, a seeded choice (circuits; null: all)"
    )
    deduplicate: bool = Field(default=True, description="Keep one of circuits that are equal")
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Share of the circuits that is held out for validation (fraction)"
    )
    split_seed: Count = Field(
        default=0,
        description="Seed of that choice, of balance_max and of max_samples, so that runs can share them",
    )
    mask_padding: bool = Field(
        default=False,
        description="Leave padded positions out of the loss; without it padding is a token like any other, and the "
        "model learns where circuits end",
    )
    seed: Count = Field(default=42, description="Seed of weights, order and noise")
    precision: Literal["bf16", "fp16", "fp32"] | None = Field(
        default=None, description="Precision of the computation (null: bf16 on a GPU, fp32 on a CPU)"
    )
    ema: EmaConfig | None = Field(
        default=None, description="Moving average of the weights, which is what is saved (null: none)"
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        default=None, description="End when a metric stands still (null: never)"
    )
    ckpt_path: PathText | None = Field(
        default=None, description="Folder in which the run folder is made (null: runs in output_path)"
    )
    ckpt_interval: PositiveCount = Field(default=1, description="Between checkpoints (epochs)")
    save_every_steps: PositiveCount | None = Field(
        default=None, description="Between further checkpoints (optimizer steps; null: none)"
    )
    keep_last: PositiveCount = Field(default=3, description="Newest checkpoints that are kept (checkpoints)")
    logger: Literal["csv", "tensorboard"] = Field(
        default="csv", description="Where metrics go beside metrics.jsonl"
    )
    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Weights & Biases, beside the logger")


class StageConfig(CellsSection):
    """A stage of a curriculum: data and settings of its own; what is left out is as `general` and `training` say."""

    name: Text | None = Field(default=None, description="Name of the stage (null: stage_1, stage_2, ...)")
    dataset: PathText | None = Field(default=None, description="As general.dataset")
    num_epochs: PositiveCount | None = Field(default=None, description="As training.num_epochs (epochs)")
    max_steps: PositiveCount | None = Field(default=None, description="As training.max_steps, of this stage")
    batch_size: PositiveCount | None = Field(default=None, description="As training.batch_size (circuits)")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="As training.learning_rate"
    )
    lr_scheduler: LrScheduler | None = Field(default=None, description="As training.lr_scheduler")
    padding_mode: PaddingMode | None = Field(default=None, description="As training.padding_mode")
    balance_max: PositiveCount | None = Field(default=None, description="As training.balance_max (circuits)")
    max_samples: PositiveCount | None = Field(default=None, description="As training.max_samples (circuits)")


class CircuitsConfig(CellsSection):
    """Everything that a person configures of a circuit-diffusion model."""

    general: GeneralConfig = Field(default_factory=GeneralConfig, description="Data and result")
    model: ModelConfig = Field(default_factory=ModelConfig, description="The network")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="The training")
    stages: list[StageConfig] = Field(
        default_factory=list, description="Stages of a curriculum, one after the other (empty: one)"
    )
    text_encoder: TextEncoderConfig | None = Field(
        default=None, description="What encodes prompts (null: a table that is learned, one row a prompt)"
    )
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig, description="The noise")

    def settle(self) -> list[Problem]:
        """Return what contradicts."""
        return cross_field_problems(self)


def load_circuits_config(path: str | Path, overrides: list[str] | None = None) -> CircuitsConfig:
    """Load, compose and check the configuration of a circuit-diffusion model.

    Raises:
        ValidationError: lists every mistake with its YAML path.
        ConfigError: there is no such file, or it is not YAML.
    """
    path = Path(path).expanduser()
    raw, problems, sources = compose(path, list(overrides or []))
    return circuits_config(raw, sources, problems)


def circuits_config(
    raw: dict[str, Any], source: str | Sources, known: list[Problem] | None = None
) -> CircuitsConfig:
    """Return the configuration of composed values; `known` are mistakes that composing them found.

    Raises:
        ValidationError: lists every mistake.
    """
    problems = list(known or [])
    packaged = raw.get("training")
    prefix = ""
    if isinstance(packaged, dict) and "general" in packaged:
        prefix = "training."
        problems += [
            Problem(key, "unknown key beside `training`, which holds the whole configuration; remove it")
            for key in raw
            if key != "training"
        ]
        raw = packaged
    inner = [p._replace(path=p.path.removeprefix(prefix)) for p in problems]
    raw, foreign = without_foreign_keys(raw)
    config, found = build(CircuitsConfig, raw, [*inner, *foreign])
    problems += [problem._replace(path=f"{prefix}{problem.path}") for problem in (*foreign, *found)]
    if problems or config is None:
        raise config_error(source, problems, ValidationError)
    return config
