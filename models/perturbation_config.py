"""The sizes and choices of a perturbation transformer, and how they are checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from models import perturbation_costs
from models.diffusion import Objective, make_diffusion
from models.errors import raise_all, wrong_choices
from models.fp8_scaling import Recipe
from models.layers import Activation, Backend, Normalization
from models.model_config import wrong_dropout, wrong_fp8_sizes, wrong_recipe, wrong_technical_batches

TargetTable = Literal["genes", "own"]
GeneVectors = Literal["file", "coexpression"]
ControlTokens = Literal["shared", "own"]


@dataclass(frozen=True)
class PerturbationTransformerConfig:
    """Hold the sizes and choices of a `PerturbationTransformer`.

    Attributes:
        num_genes: genes, which are the columns of the tokens.
        vocab_size: expression tokens of a gene; the id after the last one is the mask.
        n_bins: expression tokens of control cells; None takes `vocab_size`.
        control_tokens: `shared` where a token means the same in perturbed cells and controls: the logits of a gene then
            start from its distribution over the controls. `own` where it does not, as with changes for tokens.
        n_technical_batches: technical batches that the embedding has a vector for, or more; 0 leaves it out.
        use_control: condition on the set of control cells.
        use_target: condition on the perturbed genes.
        target_table: `genes`: a target is a gene among the columns, seen by its vector and its expression in controls;
            `own`: one of `num_targets`, with a vector of its own.
        num_targets: targets of the own table; None takes `num_genes`.
        hidden_dim: width of the latents.
        gene_dim: width at each gene; None is `hidden_dim`.
        num_latents: latents that a cell is compressed into.
        num_context_latents: latents that the set of controls is compressed into.
        num_layers: transformer blocks over the latents.
        num_context_layers: transformer blocks over the latents of the controls.
        num_heads: attention heads; must divide `hidden_dim` and `gene_dim`.
        ffn_dim: inner width of the latents' MLPs; None is 4 x `hidden_dim`.
        gene_ffn_dim: inner width of the MLP at each gene; None is 2 x `gene_dim`.
        dropout: probability, on the output of attention and MLP of the blocks.
        attention_dropout: probability, on attention weights of the blocks.
        activation: of the MLPs.
        normalization: kind of norm.
        gene_embedding_path: file of gene vectors, such as of the genes' proteins (.npy with a .txt of gene names beside
            it, or .safetensors), which stay as they are beside the learned ones.
        gene_vectors: `file`, or `coexpression`: what the training data shows of which genes vary together between cells
            of the same labels (`models.coexpression`), found before a fresh start, which stays as it is too.
        gene_vector_dim: width that the vectors of the file are brought to, or directions of `coexpression`; 0 has none.
        response_rank: directions in which a perturbation moves the genes' distributions along their tokens, each gene
            by as much as it learns: what targets with similar fixed gene vectors do is alike. 0 leaves it out.
        objective: `absorbing` or `partial` (see `models.diffusion`).
        objective_args: options of the objective. With `auxiliary` among them heads for these losses are built.
        init_std: standard deviation of the initial weights.
        activation_checkpointing: recompute blocks in the backward pass instead of keeping their activations.
        layer_backend: `torch` for no FP8, `te` for Transformer Engine, `torchao`, or `emulate`: FP8 emulated in fp32.
        fp8_recipe: how FP8 scales are chosen; `torchao` knows `current_scaling` alone.
        exclude_layers: patterns of layers kept out of FP8, such as `*.out_proj`, `layers.0.*` or `decoder.*`.
        num_technical_batches: rows of the technical batch embedding, where `n_technical_batches` was rounded up from
            them; None takes that.
    """

    num_genes: int
    vocab_size: int
    n_bins: int | None = None
    control_tokens: ControlTokens = "shared"
    n_technical_batches: int = 0
    use_control: bool = True
    use_target: bool = True
    target_table: TargetTable = "genes"
    num_targets: int | None = None
    hidden_dim: int = 256
    gene_dim: int | None = None
    num_latents: int = 64
    num_context_latents: int = 32
    num_layers: int = 6
    num_context_layers: int = 1
    num_heads: int = 8
    ffn_dim: int | None = None
    gene_ffn_dim: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation: Activation = "gelu"
    normalization: Normalization = "LayerNorm"
    gene_embedding_path: str | None = None
    gene_vectors: GeneVectors = "file"
    gene_vector_dim: int = 0
    response_rank: int = 0
    objective: Objective = "absorbing"
    objective_args: Mapping[str, Any] = field(default_factory=dict)
    init_std: float = 0.02
    activation_checkpointing: bool = False
    layer_backend: Backend = "torch"
    fp8_recipe: Recipe = "current_scaling"
    exclude_layers: tuple[str, ...] = ()
    num_technical_batches: int | None = None

    def __post_init__(self) -> None:
        """Check every field; raise one ModelError that names all that is wrong."""
        object.__setattr__(self, "exclude_layers", tuple(self.exclude_layers))
        raise_all([*self._wrong_numbers(), *self._wrong_choices()])
        make_diffusion(self.objective, self.vocab_size, dict(self.objective_args))

    @property
    def gene_width(self) -> int:
        """Width at each gene."""
        return self.hidden_dim if self.gene_dim is None else self.gene_dim

    @property
    def inner_dim(self) -> int:
        """Inner width of the latents' MLPs."""
        return 4 * self.hidden_dim if self.ffn_dim is None else self.ffn_dim

    @property
    def gene_inner_dim(self) -> int:
        """Inner width of the MLP at each gene."""
        return 2 * self.gene_width if self.gene_ffn_dim is None else self.gene_ffn_dim

    @property
    def num_control_tokens(self) -> int:
        """Expression tokens of control cells."""
        return self.vocab_size if self.n_bins is None else self.n_bins

    @property
    def num_conditions(self) -> int:
        """Tokens beside the latents: time and, where they are used, target and technical batch."""
        return 1 + self.use_target + (self.n_technical_batches > 0)

    @property
    def has_auxiliary_heads(self) -> bool:
        """Whether there are heads for the auxiliary losses."""
        return self.objective_args.get("auxiliary") is not None

    def _wrong_numbers(self) -> Iterable[str]:
        sizes = (
            "num_genes",
            "vocab_size",
            "n_bins",
            "num_targets",
            "hidden_dim",
            "gene_width",
            "num_latents",
            "num_context_latents",
            "num_layers",
            "num_context_layers",
            "num_heads",
            "inner_dim",
            "gene_inner_dim",
        )
        for name in sizes:
            value, least = getattr(self, name), 2 if name in ("vocab_size", "n_bins") else 1
            if value is not None and value < least:
                shown = {"gene_width": "gene_dim", "inner_dim": "ffn_dim", "gene_inner_dim": "gene_ffn_dim"}
                yield f"{shown.get(name, name)} is {value}; it must be at least {least}"
        yield from wrong_technical_batches(self.n_technical_batches, self.num_technical_batches)
        for name in ("gene_vector_dim", "response_rank"):
            if getattr(self, name) < 0:
                yield f"{name} is {getattr(self, name)}; it must not be negative"
        for name, width in (("hidden_dim", self.hidden_dim), ("gene_dim", self.gene_width)):
            if self.num_heads > 0 and width % self.num_heads:
                yield f"{name} {width} is not divisible by num_heads {self.num_heads}"
        yield from wrong_dropout(self)
        if not self.init_std > 0:
            yield f"init_std is {self.init_std}; it must be positive"

    def _wrong_choices(self) -> Iterable[str]:
        choices = {
            "control_tokens": ControlTokens,
            "target_table": TargetTable,
            "gene_vectors": GeneVectors,
            "activation": Activation,
            "normalization": Normalization,
            "objective": Objective,
            "layer_backend": Backend,
            "fp8_recipe": Recipe,
        }
        yield from wrong_choices(self, choices)
        if self.control_tokens == "shared" and self.num_control_tokens != self.vocab_size:
            yield (
                f"control_tokens is shared, but perturbed cells have {self.vocab_size} tokens and controls "
                f"{self.num_control_tokens}; set control_tokens: own, or tokenize both alike"
            )
        if self.gene_embedding_path is not None and not self.gene_vector_dim:
            yield "gene_embedding_path is set, but gene_vector_dim is 0; set the width to keep, such as 64"
        if self.gene_vectors == "coexpression" and self.gene_embedding_path is not None:
            yield "gene_vectors is coexpression, and gene_embedding_path names a file; leave one of them away"
        if self.gene_vectors == "coexpression" and not self.gene_vector_dim:
            yield "gene_vectors is coexpression, but gene_vector_dim is 0; set how many directions to keep, such as 16"
        if self.response_rank and not self.use_target:
            yield f"response_rank is {self.response_rank}, but use_target is false: no target responds"
        if self.target_table == "genes" and self.num_targets not in (None, self.num_genes):
            yield (
                f"num_targets is {self.num_targets} and num_genes {self.num_genes}, but with target_table genes the "
                "targets are the genes; set target_table: own"
            )
        yield from self._wrong_fp8()

    def _wrong_fp8(self) -> Iterable[str]:
        yield from wrong_recipe(self.layer_backend, self.fp8_recipe)
        widths = perturbation_costs.matrix_sizes(self)
        yield from wrong_fp8_sizes(
            self.layer_backend, self.fp8_recipe, widths, dim=self.hidden_dim, num_heads=self.num_heads
        )
