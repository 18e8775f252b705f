"""The configuration of a run: every key, its unit, its default and its range. Pure data, no I/O."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from trainer.config.checks import cross_field_problems
from trainer.config.fields import (
    Arguments,
    AsTuple,
    Count,
    DottedPath,
    EmptySectionsAsDefaults,
    LearningRate,
    NotEmpty,
    Pattern,
    Patterns,
    PositiveCount,
    RunName,
    Text,
    named_section,
    null_as,
)
from trainer.errors import ConfigError

PRECISION_SPELLINGS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


class Section(EmptySectionsAsDefaults):
    """A part of the configuration: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )


class ModelConfig(Section):
    """The model: a class, and either its own arguments or a config object's."""

    model_class: DottedPath = Field(description="Dotted path of the model class")
    model_args: Arguments = Field(default_factory=dict, description="Keyword arguments of the model class")
    config_class: DottedPath | None = Field(
        default=None, description="Dotted path of a config class, whose object is the model's first argument"
    )
    config_args: Arguments = Field(
        default_factory=dict,
        description="Keyword arguments of the config class; vocab_size, n_bins and "
        "n_technical_batches follow from the data",
    )


class ParameterGroup(Section):
    """Parameters with optimizer settings of their own."""

    name: Text = Field(description="Name of the group, as group_lrs and the log use it")
    match: Annotated[tuple[Pattern, ...], AsTuple, NotEmpty] = Field(
        description="Regular expressions; a parameter whose name one of them is found in joins the "
        "first such group"
    )
    args: Arguments = Field(
        default_factory=dict, description="Optimizer settings of this group (lr, weight_decay, ...)"
    )


class OptimizerConfig(Section):
    """The run's one optimizer, and the scheduler that may go with it."""

    optimizer_class: DottedPath = Field(
        default="torch.optim.AdamW",
        description="Dotted path of an optimizer class or factory, which gets the parameters first",
    )
    optimizer_args: Arguments = Field(
        default_factory=dict, description="Keyword arguments of the optimizer (lr, betas, ...)"
    )
    scheduler_class: DottedPath | None = Field(
        default=None,
        description="Dotted path of a scheduler class, which gets the optimizer first and is "
        "stepped once an optimizer step",
    )
    scheduler_args: Arguments = Field(default_factory=dict, description="Keyword arguments of the scheduler")
    groups: Annotated[tuple[ParameterGroup, ...], AsTuple, null_as(tuple)] = Field(
        default=(), description="Parameter groups; parameters in none of them form the group 'default'"
    )


class LossConfig(Section):
    """The loss, where the model does not bring its own."""

    loss_class: DottedPath = Field(description="Dotted path of the loss class")
    loss_args: Arguments = Field(default_factory=dict, description="Keyword arguments of the loss class")


class Fp8Config(Section):
    """How FP8 is computed; only with `precision: fp8`."""

    recipe: Literal["current_scaling", "delayed_scaling", "block_scaling", "mxfp8"] = Field(
        default="current_scaling",
        description="How FP8 scales are chosen: by each tensor's own magnitude, by those of steps before, or in blocks "
        "(block_scaling needs Hopper, mxfp8 Blackwell)",
    )
    backend: Literal["te", "torchao", "emulate"] = Field(
        default="te",
        description="Transformer Engine or torchao on a GPU, or FP8 emulated in fp32 on any device "
        "(slow, for tests)",
    )
    exclude_layers: Annotated[tuple[Text, ...], AsTuple, null_as(tuple)] = Field(
        default=(), description="Layer names that stay in bf16, with wildcards (`*.out_proj`, `layers.0.*`)"
    )
    fallback_steps: Count = Field(
        default=0,
        description="After max_nonfinite_steps in a row the run goes back to its last checkpoint and computes so many "
        "steps in bf16 (optimizer steps; 0: it stops)",
    )


class EmaConfig(Section):
    """The exponential moving average of the trained weights."""

    decay: float = Field(
        default=0.999,
        gt=0,
        lt=1,
        description="Share of the average that one optimizer step keeps; at most (1 + n) / (10 + n) in step n",
    )


class ValidationConfig(Section):
    """The validation data of a phase."""

    dataloader_factory: DottedPath = Field(
        description="Dotted path of a function that returns the validation data"
    )
    dataloader_args: Arguments = Field(default_factory=dict, description="Keyword arguments of that function")


class BenchmarkConfig(Section):
    """One benchmark of the cell embeddings; every key but `name` is an option of it."""

    model_config = ConfigDict(extra="allow")

    name: Literal["linear_probe", "embedding_quality", "perturbation"] = Field(description="Which benchmark")


class BenchmarksConfig(Section):
    """Benchmarks of the embeddings of a phase's held-out cells, between its epochs."""

    every_epochs: PositiveCount = Field(
        default=1, description="Between benchmarks (epochs; the run's first start is benchmarked too)"
    )
    batch_size: PositiveCount = Field(default=256, description="Cells per rank and forward pass (cells)")
    max_cells: PositiveCount = Field(
        default=10_000,
        description="Held-out cells that are embedded, a seeded choice where there are more (cells)",
    )
    specs: Annotated[
        tuple[
            Annotated[
                BenchmarkConfig,
                BeforeValidator(
                    named_section,
                    json_schema_input_type=Literal["linear_probe", "embedding_quality", "perturbation"]
                    | BenchmarkConfig,
                ),
            ],
            ...,
        ],
        AsTuple,
        NotEmpty,
    ] = Field(description="Which benchmarks: names, or {name, options}", json_schema_extra={"minItems": 1})

    def tables(self) -> list[dict[str, Any]]:
        """Return the benchmarks as `trainer.scoring.specs.parse_specs` reads them."""
        return [spec.model_dump() for spec in self.specs]


class ScoringConfig(Section):
    """Scores of predicted cells of a phase's held-out perturbations, between its epochs."""

    preset: Literal["vcc2025", "vcc2026"] = Field(
        description="Whose metrics: the Virtual Cell Challenge's of 2025 (cell-eval) or of 2026 (cell-eval2)"
    )
    every_epochs: PositiveCount = Field(default=1, description="Between scores (epochs)")
    max_perturbations: PositiveCount = Field(
        default=50,
        description="Held-out perturbations that are predicted, a seeded choice where there are more (target genes)",
    )
    cells_per_perturbation: PositiveCount | None = Field(
        default=None,
        description="Predicted cells of each perturbation and cell type (cells; null: as many as the real ones)",
    )
    num_steps: PositiveCount = Field(
        default=16, description="Passes through the network for each cell (passes)"
    )
    batch_size: PositiveCount = Field(default=8, description="Sets per rank and forward pass (sets)")


class EarlyStoppingConfig(Section):
    """When a phase ends before its last epoch, because its validation no longer improves."""

    metric: Text = Field(default="loss", description="A figure of the evaluations, as their records name it")
    patience: PositiveCount = Field(
        default=3, description="The phase ends after this many without an improvement (evaluations)"
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="What counts as an improvement is larger than this (as the metric)"
    )
    mode: Literal["min", "max"] = Field(default="min", description="Whether less or more is better")


class CheckpointConfig(Section):
    """Which checkpoints are kept, and how they are written."""

    keep_last: PositiveCount | None = Field(
        default=3, description="Newest checkpoints that are kept (checkpoints; null: all)"
    )
    keep_every_steps: PositiveCount | None = Field(
        default=None,
        description="Checkpoints at multiples of this are kept for good (optimizer steps; null: none)",
    )
    keep_best: Count = Field(
        default=1,
        description="Checkpoints of lowest validation loss that are kept of each phase (checkpoints)",
    )
    asynchronous: bool = Field(default=True, description="Write in the background while training goes on")


class ExportConfig(Section):
    """Where the trained model goes when the last phase has ended."""

    folder: Text = Field(description="The folder that is written; it holds the whole model, or is not there")
    format: Literal["huggingface", "circuits"] = Field(
        default="huggingface",
        description="huggingface: as `python -m trainer export` writes it; circuits: a pipeline of circuit diffusion",
    )
    overwrite: bool = Field(default=False, description="Replace what another run has written there")
    record: Arguments = Field(
        default_factory=dict,
        description="What training_config.yaml of a pipeline holds (empty: this configuration)",
    )


class TrackerConfig(Section):
    """Where metrics go; every key but `name` is an argument of the tracker."""

    model_config = ConfigDict(extra="allow")

    name: Literal["csv", "tensorboard", "wandb"] = Field(description="Which tracker")

    @property
    def args(self) -> dict[str, Any]:
        """Return the tracker's own arguments."""
        return dict(self.model_extra or {})


class LaunchConfig(Section):
    """How many processes a run is for, and how they share the work."""

    num_processes: PositiveCount | None = Field(
        default=None, description="A run on another number is refused (processes; null: any)"
    )
    strategy: Literal["any", "ddp"] = Field(
        default="any",
        description="any: what the launcher asks for; ddp: plain data parallelism, DeepSpeed is refused",
    )
    starts_processes: bool = Field(
        default=False,
        description="Without a launcher the command starts num_processes itself (null: one for each GPU)",
    )


class OneCycleConfig(Section):
    """The shape of `schedule: one_cycle`, with the names that torch's OneCycleLR gives it."""

    pct_start: float = Field(
        default=0.3, gt=0, lt=1, description="Share of the steps in which the learning rate rises (fraction)"
    )
    div_factor: float = Field(
        default=25.0, ge=1, description="The base learning rate is divided by this at the first step"
    )
    final_div_factor: float = Field(
        default=1e4,
        ge=1,
        description="The learning rate of the first step is divided by this at the last one",
    )
    cycle_momentum: bool = Field(
        default=True, description="Move momentum (the first beta of Adam) against the learning rate"
    )
    base_momentum: float = Field(
        default=0.85, ge=0, lt=1, description="Momentum at the highest learning rate"
    )
    max_momentum: float = Field(
        default=0.95, ge=0, lt=1, description="Momentum at the first and the last step"
    )


class PhaseConfig(Section):
    """One entry of `datasets`: data with its own learning rates, epochs and limits."""

    name: str = Field(default="", description="Name of the phase, unique in the run; default: phase_<index>")
    dataloader_factory: DottedPath = Field(
        description="Dotted path of a function that returns (dataset, DataLoader), a DataLoader, or "
        "a row source"
    )
    dataloader_args: Arguments = Field(default_factory=dict, description="Keyword arguments of that function")
    validation: ValidationConfig | None = Field(
        default=None, description="Validation data; null: what the training data set carries, if it does"
    )
    epochs: Count = Field(default=1, description="Passes over the phase's data (epochs; 0 skips the phase)")
    max_steps: PositiveCount | None = Field(
        default=None, description="The phase ends after this many (optimizer steps; null: no limit)"
    )
    max_steps_per_epoch: PositiveCount | None = Field(
        default=None, description="An epoch ends after this many (optimizer steps; null: no limit)"
    )
    lr: LearningRate | None = Field(
        default=None, description="Base learning rate of all groups (null: as optimizer_args say)"
    )
    muon_lr: LearningRate | None = Field(
        default=None,
        description="Base learning rate of the groups marked use_muon (null: as optimizer_args say)",
    )
    adam_lr: LearningRate | None = Field(
        default=None,
        description="Base learning rate of the groups not marked use_muon (null: as optimizer_args say)",
    )
    group_lrs: Annotated[dict[str, LearningRate], null_as(dict)] = Field(
        default_factory=dict,
        description="Base learning rates by group name; go before lr, muon_lr and adam_lr",
    )
    warmup_steps: Count = Field(
        default=0, description="Linear rise to the base learning rate (optimizer steps)"
    )
    schedule: Literal["constant", "linear", "cosine", "one_cycle"] = Field(
        default="constant",
        description="Learning rate after warmup, over what the phase really runs; one_cycle brings its own rise",
    )
    one_cycle: OneCycleConfig | None = Field(
        default=None, description="Shape of schedule: one_cycle (null: the defaults below)"
    )
    min_lr_ratio: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Learning rate at the end of the decay (fraction of the base learning rate)",
    )
    schedule_steps: PositiveCount | None = Field(
        default=None,
        description="The decay ends at this step, and the rate stays where it is then (optimizer steps, warmup "
        "included; null: at the last step)",
    )
    schedule_fits: Annotated[tuple[Literal["warmup", "decay"], ...], AsTuple, null_as(tuple)] = Field(
        default=(),
        description="What is shortened where fewer steps are run: warmup to at most a tenth of them, decay to their "
        "number",
    )
    schedule_scope: Literal["phase", "run"] = Field(
        default="phase",
        description="Whether the schedule counts the steps of the phase, or those of all phases together",
    )
    log_every_steps: PositiveCount = Field(
        default=10, description="Between lines of the log (optimizer steps of the phase)"
    )
    save_every_steps: PositiveCount | None = Field(
        default=1000,
        description="Between checkpoints (optimizer steps of the run; null: only at the ends of epochs)",
    )
    save_every_epochs: PositiveCount = Field(
        default=1,
        description="Between checkpoints at the ends of epochs (epochs; the end of the phase has one in any case)",
    )
    eval_every_epochs: PositiveCount | None = Field(
        default=None,
        description="Between evaluations (epochs; null: every epoch if there is validation data)",
    )
    eval_every_steps: PositiveCount | None = Field(
        default=None, description="Between further evaluations (optimizer steps of the phase; null: none)"
    )
    validation_steps: PositiveCount | None = Field(
        default=None,
        description="An evaluation ends after this many (evaluation steps; null: all validation data)",
    )
    global_batch_size: PositiveCount | None = Field(
        default=None,
        description="In this phase, in place of the run's (cells per optimizer step over all ranks)",
    )
    gradient_accumulation_steps: PositiveCount | None = Field(
        default=None,
        description="In this phase, in place of the run's (micro-batches per rank and optimizer step)",
    )
    micro_batch_size: PositiveCount | None = Field(
        default=None, description="In this phase, in place of the run's (cells per rank and forward pass)"
    )
    benchmarks: BenchmarksConfig | None = Field(
        default=None, description="Benchmarks of the embeddings of held-out cells (null: none)"
    )
    scoring: ScoringConfig | None = Field(
        default=None, description="Scores of predicted cells of held-out perturbations (null: none)"
    )
    freeze: Patterns = Field(
        default=(), description="Regular expressions on parameter names that are held still in this phase"
    )
    reinitialise: Patterns = Field(
        default=(),
        description="Regular expressions on names of parameters that start anew with this phase, moments included",
    )
    objective_options: Arguments = Field(
        default_factory=dict,
        description="Options of the model's objective (`model.diffusion.set_options`) from this phase on, until a "
        "later phase sets them otherwise",
    )


@dataclass(frozen=True)
class BatchSettings:
    """What the configuration says of a phase's batches, run and phase merged; None where it says nothing."""

    global_batch_size: int | None
    gradient_accumulation_steps: int | None
    micro_batch_size: int | None


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic of a phase: micro-batch x accumulation x world size = global batch."""

    micro_batch_size: int
    accumulation: int
    world_size: int
    global_batch_size: int


class RunConfig(Section):
    """A run: one model and one optimizer through an ordered list of phases."""

    run_name: RunName = Field(description="Name of the run and its folder")
    output_dir: Text = Field(default="checkpoints", description="Folder in which the run folder is made")
    seed: Count = Field(default=42, description="Seed of initialisation, order, masks and noise")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Kind of device; auto: a GPU where there is one"
    )
    precision: Literal["bf16", "fp16", "fp32", "fp8"] | None = Field(
        default=None, description="Precision of the computation (null: bf16 on a GPU, fp32 on a CPU)"
    )
    amp_dtype: Literal["bf16", "fp16", "fp32", "fp8", "bfloat16", "float16", "float32"] | None = Field(
        default=None, description="Another spelling of precision"
    )
    fp8: Fp8Config | None = Field(default=None, description="FP8 settings; only with precision: fp8")
    resume_from: Text | None = Field(
        default=None,
        description="latest: go on with this run name's newest checkpoint; auto: the same, or start "
        "where there is none; "
        "or the path of a run folder, checkpoint or .pt file; null: start",
    )
    init_from: Text | None = Field(
        default=None,
        description="Path of a checkpoint, exported model or weights file whose weights a fresh start takes",
    )
    model: ModelConfig = Field(description="The model")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="The optimizer")
    loss: LossConfig | None = Field(default=None, description="The loss; null: the model brings its own")
    datasets: Annotated[tuple[PhaseConfig, ...], AsTuple, NotEmpty] = Field(
        description="The phases, in the order in which they run", json_schema_extra={"minItems": 1}
    )
    global_batch_size: PositiveCount | None = Field(
        default=None,
        description="Cells per optimizer step over all ranks; gradient_accumulation_steps follows from it",
    )
    gradient_accumulation_steps: PositiveCount | None = Field(
        default=None,
        description="Micro-batches per rank and optimizer step, from which global_batch_size follows; "
        "1 where neither is given",
    )
    micro_batch_size: PositiveCount | None = Field(
        default=None, description="Cells per rank and forward pass; null: what a loader of your own yields"
    )
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="Gradients are clipped to this global L2 norm (null: off)"
    )
    max_nonfinite_steps: PositiveCount = Field(
        default=10,
        description="Steps skipped in a row for a non-finite loss or gradient before the run stops (steps)",
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        default=None, description="When a phase ends early (null: never)"
    )
    ema: EmaConfig | None = Field(
        default=None,
        description="Keep a moving average of the trained weights, which evaluations, exports and init_from take in "
        "place of them (null: none)",
    )
    checkpoint: CheckpointConfig = Field(
        default_factory=CheckpointConfig, description="Which checkpoints are kept, and how they are written"
    )
    export_to: ExportConfig | None = Field(
        default=None,
        description="Write the model of the last checkpoint into a folder when the run has ended (null: do not)",
    )
    trackers: Annotated[
        tuple[
            Annotated[
                TrackerConfig,
                BeforeValidator(
                    named_section,
                    json_schema_input_type=Literal["csv", "tensorboard", "wandb"] | TrackerConfig,
                ),
            ],
            ...,
        ],
        AsTuple,
    ] = Field(
        default=(TrackerConfig(name="csv"),),
        description="Where metrics go beside metrics.jsonl: names, or {name, arguments}",
    )
    log_dir: Text | None = Field(
        default=None,
        description="Folder for the files of trackers, in one named as the run folder (null: in the run folder)",
    )
    use_wandb: bool | None = Field(default=None, description="Another spelling of the tracker wandb")
    wandb_project: Text | None = Field(
        default=None, description="Another spelling of the tracker wandb's project"
    )
    distributed_timeout_seconds: PositiveCount = Field(
        default=1800, description="A collective that waits longer than this fails (seconds)"
    )
    max_wall_seconds: PositiveCount | None = Field(
        default=None,
        description="The run saves a checkpoint and ends with exit code 75 after this time since its process started, "
        "to be resumed (seconds; null: no limit)",
    )
    compile: bool = Field(
        default=False,
        description="Compile the model's layers with torch.compile; not under ZeRO-3, nor with Transformer "
        "Engine's layers",
    )
    num_threads: PositiveCount | None = Field(
        default=None, description="CPU threads of torch per rank (threads; null: left alone)"
    )
    launch: LaunchConfig = Field(
        default_factory=LaunchConfig, description="The processes that the run is for"
    )
    notes: Annotated[tuple[Text, ...], AsTuple, null_as(tuple)] = Field(
        default=(), description="Lines that the start-up account says"
    )

    @model_validator(mode="before")
    @classmethod
    def _spell_one_way(cls, raw: Any) -> Any:
        """Turn accepted spellings into the one that is stored, name the phases, and fill in `fp8`."""
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        _spell_precision(raw)
        _spell_trackers(raw)
        if raw.get("precision") == "fp8" and raw.get("fp8") is None:
            raw["fp8"] = {}
        phases = raw.get("datasets")
        if isinstance(phases, (list, tuple)):
            raw["datasets"] = [
                {**phase, "name": phase.get("name") or f"phase_{index}"} if isinstance(phase, dict) else phase
                for index, phase in enumerate(phases)
            ]
        return raw

    @model_validator(mode="after")
    def _check_fields_together(self, info: ValidationInfo) -> "RunConfig":
        """Refuse fields that contradict each other, unless the caller collects these itself."""
        if not (info.context or {}).get("fields_only"):
            problems = cross_field_problems(self)
            if problems:
                raise ValueError("\n".join(problem.line() for problem in problems))
        return self

    def batch_settings(self, phase: PhaseConfig) -> BatchSettings:
        """Return a phase's batch settings: its own pair or the run's, never a mixture; neither: no accumulation."""
        own = (phase.global_batch_size, phase.gradient_accumulation_steps)
        pair = own if own != (None, None) else (self.global_batch_size, self.gradient_accumulation_steps)
        return BatchSettings(
            *(pair if pair != (None, None) else (None, 1)), phase.micro_batch_size or self.micro_batch_size
        )

    def batch_plan(
        self, phase: PhaseConfig | int, world_size: int, micro_batch_size: int | None = None
    ) -> BatchPlan:
        """Return a phase's batch arithmetic; `micro_batch_size` is what its loader yields.

        Raises:
            ConfigError: the numbers do not work out.
        """
        index = phase if isinstance(phase, int) else [p.name for p in self.datasets].index(phase.name)
        settings = self.batch_settings(self.datasets[index])
        micro = micro_batch_size or settings.micro_batch_size
        if micro is None:
            raise ConfigError(
                f"datasets.{index}: the micro-batch is not known; set micro_batch_size (cells per "
                "rank and forward pass)"
            )
        if settings.gradient_accumulation_steps is not None:
            accumulation = settings.gradient_accumulation_steps
            return BatchPlan(micro, accumulation, world_size, micro * accumulation * world_size)
        total, per_round = settings.global_batch_size, micro * world_size
        assert total is not None, "checked when the configuration was loaded"
        if total % per_round:
            raise ConfigError(
                f"global batch {total} is not a multiple of micro-batch {micro} x {world_size} "
                f"{'rank' if world_size == 1 else 'ranks'} = {per_round}; "
                f"set datasets.{index}.global_batch_size or micro_batch_size"
            )
        return BatchPlan(micro, total // per_round, world_size, total)


def _spell_precision(raw: dict[str, Any]) -> None:
    """Move `amp_dtype` into `precision`; where the two differ both stay, and are refused."""
    spelled = raw.get("amp_dtype")
    wanted = PRECISION_SPELLINGS.get(spelled, spelled) if isinstance(spelled, str) else None
    if wanted in ("bf16", "fp16", "fp32", "fp8") and raw.get("precision") in (None, wanted):
        raw["precision"] = wanted
        raw["amp_dtype"] = None


def _spell_trackers(raw: dict[str, Any]) -> None:
    """Move `use_wandb` and `wandb_project` into `trackers`; what contradicts them stays, and is refused."""
    use, project = raw.get("use_wandb"), raw.get("wandb_project")
    trackers = raw.get("trackers", ["csv"])
    if not isinstance(trackers, (list, tuple)) or not (use is None or isinstance(use, bool)):
        return
    trackers = [named_section(tracker) for tracker in trackers]
    of_wandb = [t for t in trackers if isinstance(t, dict) and t.get("name") == "wandb"]
    if use and not of_wandb:
        of_wandb = [{"name": "wandb"}]
        trackers += of_wandb
    if bool(of_wandb) != (use is False):
        raw["use_wandb"] = None
    if use is False and not of_wandb:
        raw["wandb_project"] = None
    elif of_wandb and isinstance(project, str) and of_wandb[0].get("project", project) == project:
        trackers = [{**t, "project": project} if t is of_wandb[0] else t for t in trackers]
        raw["wandb_project"] = None
    raw["trackers"] = trackers
