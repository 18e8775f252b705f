"""A pretrained model of ours as the backbone of a classifier or a regression, whole or with LoRA."""

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import costs
from models.cell_model import CellModel, needed
from models.errors import ModelError, raise_all, wrong_choices
from models.families import FAMILIES, Family
from models.fp8_scaling import Recipe
from models.heads import TaskHead
from models.layers import Backend
from models.lora import LoraSettings, add_lora, frozen_patterns, merge_lora, plain_name
from models.masked_heads import IGNORED_LABEL
from models.model_config import ModelConfig
from models.outputs import LossOutput
from models.pretrained import PretrainedModule

BACKBONES = {family.model_class: family for family in FAMILIES.values()}
"""The models that can be fine-tuned, by the dotted path that configurations call them by."""

Task = Literal["classification", "regression"]
_FP8_FIELDS = ("layer_backend", "fp8_recipe", "exclude_layers")


@dataclass(frozen=True)
class FineTunedConfig:
    """Hold the choices of a `FineTunedModel`.

    Attributes:
        backbone_class: dotted path of the pretrained model's class, one of ours.
        backbone_config: all fields of the pretrained model's configuration; those for FP8 are taken from here instead,
            and `gene_embedding_path` is left out, because weights come from the pretrained model.
        task: `classification` into classes, or `regression` to numbers.
        n_classes: classes, which the data knows; classification only.
        output_dim: numbers for each cell; regression only.
        head_hidden_dim: width of a hidden layer in the head; None: the head is one linear layer.
        head_dropout: probability, before the head's last layer.
        class_weights: of each class in the loss: a list of positive numbers in the order of the classes, `balanced`
            for weights in inverse proportion to the classes' cells in the training data, whose mean over these cells
            is 1, or None for 1 each.
        lora: train low-rank corrections of the backbone (`models.lora.LoraSettings`); None trains its own weights. The
            phases' `freeze` must hold still what `models.lora.frozen_patterns` says.
        layer_backend: of the backbone, as in its own configuration.
        fp8_recipe: of the backbone.
        exclude_layers: of the backbone.
    """

    backbone_class: str
    backbone_config: Mapping[str, Any]
    task: Task = "classification"
    n_classes: int | None = None
    output_dim: int = 1
    head_hidden_dim: int | None = None
    head_dropout: float = 0.1
    class_weights: Sequence[float] | str | None = None
    lora: Mapping[str, Any] | None = None
    layer_backend: Backend = "torch"
    fp8_recipe: Recipe = "current_scaling"
    exclude_layers: tuple[str, ...] = ()
    backbone: ModelConfig = field(init=False, repr=False, compare=False)
    """The backbone's configuration."""

    def __post_init__(self) -> None:
        """Check every field, those of the backbone and of LoRA too."""
        object.__setattr__(self, "exclude_layers", tuple(self.exclude_layers))
        given = {**self.backbone_config, "gene_embedding_path": None}
        object.__setattr__(self, "backbone_config", given)
        raise_all(self._wrong_fields())
        config_class = resolve_name(self.family.config_class)
        names = {each.name for each in dataclasses.fields(config_class)}
        unknown, missing = sorted(given.keys() - names), sorted({"vocab_size"} - given.keys())
        if unknown or missing:
            what = f"has unknown fields {', '.join(unknown)}" if unknown else "lacks vocab_size"
            raise ModelError(
                f"backbone_config {what}; it must be the complete configuration of the pretrained {self.backbone_class}"
            )
        fp8 = {name: getattr(self, name) for name in _FP8_FIELDS}
        object.__setattr__(self, "backbone", config_class(**{**given, **fp8}))
        _ = self.lora_settings  # checks them

    @property
    def family(self) -> Family:
        """The family that the backbone is of."""
        return BACKBONES[self.backbone_class.replace(":", ".")]

    @property
    def lora_settings(self) -> LoraSettings | None:
        """What `lora` says, checked."""
        if self.lora is None:
            return None
        known = {each.name for each in dataclasses.fields(LoraSettings)}
        unknown = sorted(self.lora.keys() - known)
        if unknown:
            raise ModelError(
                f"lora has unknown fields {', '.join(unknown)}; allowed: {', '.join(sorted(known))}"
            )
        return LoraSettings(**self.lora)

    def _wrong_fields(self) -> Iterable[str]:
        if self.backbone_class.replace(":", ".") not in BACKBONES:
            yield f"backbone_class is {self.backbone_class!r}; allowed: {', '.join(BACKBONES)}"
        yield from wrong_choices(self, {"task": Task, "layer_backend": Backend, "fp8_recipe": Recipe})
        for name, least in (("n_classes", 2), ("output_dim", 1), ("head_hidden_dim", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name} is {value}; it must be at least {least}"
        if not 0 <= self.head_dropout < 1:
            yield f"head_dropout is {self.head_dropout}; it must be in [0, 1)"
        if self.task == "classification" and self.output_dim != 1:
            yield f"output_dim is {self.output_dim}, but task classification has an output for each class"
        if self.task == "regression" and self.n_classes is not None:
            yield f"n_classes is {self.n_classes}, but task regression has no classes; use output_dim"
        yield from self._wrong_class_weights()

    def _wrong_class_weights(self) -> Iterable[str]:
        weights = self.class_weights
        if weights is None:
            return
        if self.task == "regression":
            yield "class_weights are given, but task regression has no classes"
        if isinstance(weights, str):
            if weights != "balanced":
                yield f"class_weights is {weights!r}; allowed: balanced, a list of numbers, or null"
        elif not all(weight > 0 for weight in weights):
            yield f"class_weights are {list(weights)}; they must be positive"
        elif self.n_classes is not None and len(weights) != self.n_classes:
            yield f"class_weights are {len(weights)} numbers, but there are {self.n_classes} classes"


class FineTunedOutput(NamedTuple):
    """Hold what a forward pass returns.

    Attributes:
        logits: [B, n_classes], or the values [B, output_dim].
        embedding: [B, D] the backbone's embeddings of the cells.
    """

    logits: Tensor
    embedding: Tensor


class FineTunedModel(PretrainedModule):
    """A backbone that embeds cells, and a head that tells what is asked of them.

    While a phase holds all of the backbone's parameters still, the backbone is in evaluation mode: its dropout is off.
    The trainer tells it by `hold_still`. With LoRA the corrections train, and dropout is on.
    """

    accepts_packed_batches = True
    """Lets data with `layout: packed` in: all backbones take it."""

    pretrained_prefix = "backbone."
    """Where in this model the weights of a pretrained one go."""

    class_weight: Tensor | None

    def __init__(self, config: FineTunedConfig) -> None:
        """Draw the weights; those of the backbone are to be replaced."""
        super().__init__()
        self.config = config
        num_outputs = config.output_dim
        if config.task == "classification":
            if config.n_classes is None:
                raise ModelError(
                    "n_classes is not known: give the data a label of classes (`label` of the loader), or set n_classes"
                )
            num_outputs = config.n_classes
        model_class: type[CellModel] = resolve_name(config.family.model_class)
        self.backbone = model_class(config.backbone, has_heads=False)
        if config.lora_settings is not None:
            add_lora(self.backbone.transformer, config.lora_settings)
        self.head = TaskHead(
            config.backbone.hidden_dim,
            num_outputs,
            hidden_dim=config.head_hidden_dim,
            dropout=config.head_dropout,
            init_std=config.backbone.init_std,
        )
        weights = config.class_weights
        given = None if weights is None else torch.ones(num_outputs)
        if given is not None and not isinstance(weights, str):
            given = torch.tensor(weights, dtype=torch.float32)
            if len(given) != num_outputs:
                raise ModelError(
                    f"class_weights are {len(given)} numbers, but there are {num_outputs} classes"
                )
        self.register_buffer("class_weight", given)
        self._is_held = False

    def forward(self, batch: dict[str, Any]) -> FineTunedOutput:
        """Return what the head makes of each cell, and the embeddings that it read."""
        embedding = self.backbone.encode(batch)
        return FineTunedOutput(self.head(embedding), embedding)

    def encode(self, batch: dict[str, Any]) -> Tensor:
        """Return the backbone's embedding of each cell, [B, D]."""
        return self.backbone.encode(batch)

    @torch.no_grad()
    def predict(self, batch: dict[str, Any]) -> Tensor:
        """Return the probability of each class, [B, n_classes]; in regression the values, [B] or [B, output_dim].

        Call `eval()` before: this leaves dropout as it is.
        """
        logits = self(batch).logits.float()
        if self.config.task == "classification":
            return logits.softmax(dim=-1)
        return logits.squeeze(-1) if self.config.output_dim == 1 else logits

    def compute_loss(self, batch: dict[str, Any]) -> LossOutput:
        """Return the summed loss over the cells that have a label, with accuracy or errors as metrics."""
        logits = self(batch).logits.float()
        labels = self._labels(batch)
        if self.config.task == "classification":
            is_labelled = labels != IGNORED_LABEL
            weight = None if self.class_weight is None else self.class_weight.float()
            loss = F.cross_entropy(logits, labels, weight, ignore_index=IGNORED_LABEL, reduction="sum")
            metrics = {"accuracy": (logits.detach().argmax(dim=-1) == labels).sum()}
            return LossOutput(loss, is_labelled.sum(), metrics)
        is_labelled = ~labels.isnan().any(dim=-1)
        errors = (logits - labels).masked_fill(~is_labelled[:, None], 0.0)
        loss = errors.square().mean(dim=-1).sum()
        metrics = {"squared_error": loss.detach(), "absolute_error": errors.detach().abs().mean(dim=-1).sum()}
        return LossOutput(loss, is_labelled.sum(), metrics)

    def loss_weight(self, batch: dict[str, Any]) -> float:
        """Return the number of cells with a label, over which the loss is averaged."""
        self.backbone.check_cells(batch)
        labels = self._labels(batch)
        is_labelled = labels != IGNORED_LABEL if labels.ndim == 1 else ~labels.isnan().any(dim=-1)
        return float(is_labelled.sum())

    def hold_still(self, is_held: Callable[[str], bool]) -> None:
        """Be told, by parameter name, what is held still from here on; the trainer calls it at a phase's begin.

        Raises:
            ModelError: corrections are trained, and beside them other parameters than `lora.bias` says.
        """
        names = [f"{self.pretrained_prefix}{name}" for name, _ in self.backbone.named_parameters()]
        free = [name for name in names if not is_held(name)]
        self._is_held = not free
        settings = self.config.lora_settings
        if settings is not None and any(plain_name(name) is None for name in free):
            patterns = frozen_patterns(settings.bias, self.pretrained_prefix)
            meant = [name for name in names if not any(re.search(pattern, name) for pattern in patterns)]
            wrong = [name for name in names if (name in free) != (name in meant)]
            if wrong:
                what = "trained" if wrong[0] in free else "held still"
                raise ModelError(
                    f"lora.bias is {settings.bias}, but a phase that trains corrections has {wrong[0]} {what} (and "
                    f"{len(wrong) - 1} more parameters unlike it says); set the phase's freeze to {patterns}"
                )
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Change to training mode, or back; a backbone that is held still stays in evaluation mode."""
        super().train(mode)
        if self._is_held:
            self.backbone.eval()
        return self

    @property
    def wants_class_counts(self) -> bool:
        """Whether a fresh start needs the number of training cells of each class."""
        return self.config.class_weights == "balanced"

    def set_class_counts(self, counts: Sequence[int]) -> None:
        """Weigh the classes of the loss in inverse proportion to their training cells; a class without cells by 0."""
        assert self.class_weight is not None
        if len(counts) != len(self.class_weight):
            raise ModelError(
                f"{len(counts)} classes were counted, but the model has {len(self.class_weight)}"
            )
        number = torch.tensor(counts, dtype=torch.float64)
        weights = torch.where(number > 0, number.sum() / ((number > 0).sum() * number.clamp(min=1)), 0.0)
        self.class_weight.copy_(weights)

    def pretrained_names(self) -> dict[str, str]:
        """Return the names of the weights that come from a pretrained model, and what that model calls them."""
        names: dict[str, str] = {}
        for name in self.state_dict():
            plain = plain_name(name)
            if name.startswith(self.pretrained_prefix) and plain is not None:
                names[name] = plain.removeprefix(self.pretrained_prefix)
        return names

    def merged(self) -> "FineTunedModel":
        """Return the model without LoRA that computes the same: every correction is added to its layer's matrix.

        Itself where it has no LoRA.
        """
        if self.config.lora is None:
            return self
        config = dataclasses.replace(self.config, lora=None)
        model = FineTunedModel(config)
        own = copy.deepcopy(self)
        merge_lora(own.backbone.transformer)
        model.load_state_dict(own.state_dict())
        return model.train(self.training)

    def compiled_modules(self) -> list[nn.Module]:
        """Return what `compile: true` compiles: the backbone's blocks."""
        return self.backbone.compiled_modules()

    def training_flops(self, lengths: Sequence[int], num_masked: int) -> float:
        """Return the operations of a forward and a backward pass over cells of these lengths in tokens.

        A backbone that no phase trains has no backward pass; with LoRA its own matrices get no gradient.
        """
        config = self.config.backbone
        flops = costs.backbone_flops(config, lengths)
        attention = costs.attention_flops(config, lengths)
        trained = [name for name, p in self.backbone.named_parameters() if p.requires_grad]
        if not trained:
            flops /= 3
        elif not any(plain_name(name) and not name.endswith("bias") for name in trained):
            flops = (flops - attention) * 2 / 3 + attention
        per_cell = sum(p.numel() for p in self.head.parameters() if p.ndim == 2)
        adapters = sum(p.numel() for n, p in self.backbone.named_parameters() if plain_name(n) is None)
        return flops + 6.0 * (per_cell * len(lengths) + adapters * sum(lengths))

    def activation_bytes(
        self, *, num_tokens: int, num_cells: int, num_masked: int, is_mixed: bool
    ) -> costs.Activations:
        """Return the bytes that a forward pass over one micro-batch keeps (see models/costs.py)."""
        config = self.config.backbone
        body = costs.backbone_bytes(config, num_tokens, is_mixed=is_mixed)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            body = 0.0
        heads = 4.0 * num_cells * (config.hidden_dim + 2 * (self.config.head_hidden_dim or 0))
        return costs.Activations(body, heads, 3 * 4.0 * num_cells * self.head.output.out_features)

    def matrix_sizes(self) -> dict[str, int]:
        """Return by field name the sizes of the matrices that FP8 layers multiply."""
        return self.backbone.matrix_sizes()

    def _labels(self, batch: dict[str, Any]) -> Tensor:
        """Return [B] classes, or [B, output_dim] values."""
        labels: Tensor = needed(batch, "label", "name the obs column of the labels: `label` of the loader")
        if self.config.task == "classification":
            if labels.is_floating_point() or labels.ndim != 1:
                raise ModelError(
                    f"labels are {labels.dtype} of shape {list(labels.shape)}, and task classification needs a class "
                    "index for each cell: set the loader's label_task: classification"
                )
            return labels
        labels = labels.unsqueeze(1) if labels.ndim == 1 else labels
        if not labels.is_floating_point() or labels.shape[1] != self.config.output_dim:
            raise ModelError(
                f"labels are {labels.dtype} of shape {list(labels.shape)}, and task regression needs "
                f"{self.config.output_dim} numbers for each cell (output_dim), with the loader's label_task: regression"
            )
        return labels
