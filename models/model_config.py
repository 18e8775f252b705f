"""What the configurations of all our models of cells have in common, and how they are checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from models.errors import raise_all, wrong_choices
from models.fp8_alignment import FP8_ALIGNMENT, alignment, nearest_multiples
from models.fp8_scaling import Recipe
from models.layers import Activation, Backend, Normalization
from models.masked_heads import NUM_SPECIAL_TOKENS

Pooling = Literal["cls", "mean"]
PositionEmbedding = Literal["none", "learned"]


@dataclass(frozen=True)
class ModelConfig:
    """Hold the sizes and choices that all our models of cells have.

    Attributes:
        vocab_size: token ids: 4 special ones and one for each gene.
        n_bins: expression bins to read and predict; None reads and predicts continuous values.
        n_technical_batches: technical batches that the embedding has a vector for, or more; 0 leaves it out. It enters
            the heads only, so that `encode` returns embeddings without it.
        hidden_dim: width of the residual stream.
        num_layers: transformer blocks.
        num_heads: attention heads; must divide `hidden_dim`.
        ffn_dim: inner width of the MLPs; None is 4 x `hidden_dim`.
        dropout: probability, on embeddings and on the output of attention and MLP.
        attention_dropout: probability, on attention weights.
        activation: of the MLPs.
        normalization: kind of norm.
        max_seq_len: longest row of tokens (with cls); needed for learned positions, checked where given.
        position_embedding: `none` (a cell is a set of genes) or `learned` (for rank-ordered tokens).
        use_expression_values: read each gene's expression; False reads genes alone, and expression is only predicted.
        use_depth: tell the model each cell's log1p(total), so that it need not spend its capacity on guessing it.
        pooling: what `encode` returns: the hidden state of `cls`, or the `mean` over genes.
        use_value_prior: start the value head at each gene's own distribution over training cells.
        gene_embedding_path: file of gene vectors to start the token embedding from (.npy, .safetensors or .pt with a
            .txt of gene names, ids or symbols, beside it).
        gene_embedding_dim: length that the vectors in `gene_embedding_path` must have; None takes any.
        init_std: standard deviation of the initial weights.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        layer_backend: `torch` for no FP8, `te` for Transformer Engine, `torchao`, or `emulate`: FP8 emulated in fp32.
        fp8_recipe: how FP8 scales are chosen; `torchao` knows `current_scaling` alone.
        exclude_layers: patterns of layers kept out of FP8, such as `*.out_proj`, `layers.0.*` or
            `technical_batch_embedding`.
        num_technical_batches: rows of the technical batch embedding, where `n_technical_batches` was rounded up from
            them; None takes that.
    """

    vocab_size: int
    n_bins: int | None = None
    n_technical_batches: int = 0
    hidden_dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    ffn_dim: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation: Activation = "gelu"
    normalization: Normalization = "LayerNorm"
    max_seq_len: int | None = None
    position_embedding: PositionEmbedding = "none"
    use_expression_values: bool = True
    use_depth: bool = True
    pooling: Pooling = "cls"
    use_value_prior: bool = True
    gene_embedding_path: str | None = None
    gene_embedding_dim: int | None = None
    init_std: float = 0.02
    activation_checkpointing: bool = False
    layer_backend: Backend = "torch"
    fp8_recipe: Recipe = "current_scaling"
    exclude_layers: tuple[str, ...] = ()
    num_technical_batches: int | None = None

    def __post_init__(self) -> None:
        """Check every field; raise one ValueError that names all that is wrong."""
        object.__setattr__(self, "exclude_layers", tuple(self.exclude_layers))
        raise_all(self.wrong_fields())

    @property
    def inner_dim(self) -> int:
        """Inner width of the MLPs."""
        return 4 * self.hidden_dim if self.ffn_dim is None else self.ffn_dim

    def wrong_fields(self) -> Iterable[str]:
        """Say what is wrong, a field or a pair of fields at a time; a subclass adds what its own fields must be."""
        yield from self._wrong_numbers()
        choices = {
            "activation": Activation,
            "normalization": Normalization,
            "position_embedding": PositionEmbedding,
            "pooling": Pooling,
            "layer_backend": Backend,
            "fp8_recipe": Recipe,
        }
        yield from wrong_choices(self, choices)
        if self.position_embedding == "learned" and self.max_seq_len is None:
            yield "position_embedding learned needs max_seq_len"
        yield from self._wrong_fp8()

    def at_least(self, least: float, *fields: str) -> Iterable[str]:
        """Say which of these fields, where they are set, are less than they must be."""
        for field in fields:
            value = getattr(self, field)
            if value is not None and value < least:
                yield f"{field.replace('inner', 'ffn')} is {value}; it must be at least {least:g}"

    def wrong_loss_weights(self) -> Iterable[str]:
        """Say what is wrong with the weights of the gene loss and the expression loss, for models that have both."""
        weights = [getattr(self, field) for field in ("gene_loss_weight", "expression_loss_weight")]
        for field, value in zip(("gene_loss_weight", "expression_loss_weight"), weights, strict=True):
            if not value >= 0:
                yield f"{field} is {value}; it must not be negative"
        if not any(weights):
            yield "gene_loss_weight and expression_loss_weight are both 0; one must be positive"

    def _wrong_numbers(self) -> Iterable[str]:
        if self.vocab_size <= NUM_SPECIAL_TOKENS:
            yield f"vocab_size is {self.vocab_size}; it must exceed the {NUM_SPECIAL_TOKENS} special tokens"
        if self.n_bins is not None and self.n_bins < 2:
            yield f"n_bins is {self.n_bins}; it must be at least 2, or null for continuous values"
        yield from wrong_technical_batches(self.n_technical_batches, self.num_technical_batches)
        yield from self.at_least(1, "hidden_dim", "num_layers", "num_heads", "inner_dim", "max_seq_len")
        if self.num_heads > 0 and self.hidden_dim % self.num_heads:
            yield f"hidden_dim {self.hidden_dim} is not divisible by num_heads {self.num_heads}"
        yield from wrong_dropout(self)
        yield from self.at_least(1, "gene_embedding_dim")
        if not self.init_std > 0:
            yield f"init_std is {self.init_std}; it must be positive"

    def _wrong_fp8(self) -> Iterable[str]:
        yield from wrong_recipe(self.layer_backend, self.fp8_recipe)
        widths = {"hidden_dim": self.hidden_dim, "ffn_dim": self.inner_dim}
        yield from wrong_fp8_sizes(
            self.layer_backend, self.fp8_recipe, widths, dim=self.hidden_dim, num_heads=self.num_heads
        )


def wrong_dropout(config: object) -> Iterable[str]:
    """Say which of a configuration's two probabilities of dropout are none."""
    for field in ("dropout", "attention_dropout"):
        if not 0 <= getattr(config, field) < 1:
            yield f"{field} is {getattr(config, field)}; it must be in [0, 1)"


def wrong_technical_batches(padded: int, rows: int | None) -> Iterable[str]:
    """Say what is wrong with `n_technical_batches` and `num_technical_batches`."""
    if padded < 0:
        yield f"n_technical_batches is {padded}; it must not be negative"
    if rows is not None and not 1 <= rows <= padded:
        yield f"num_technical_batches is {rows}; it must be in 1 to n_technical_batches {padded}"


def wrong_recipe(backend: Backend, recipe: Recipe) -> Iterable[str]:
    """Say if a backend does not know an FP8 recipe."""
    if backend == "torch" and recipe != "current_scaling":
        yield f"fp8_recipe is {recipe}, but layer_backend torch has no FP8 layers"
    if backend == "torchao" and recipe != "current_scaling":
        yield f"fp8_recipe is {recipe}; layer_backend torchao knows current_scaling alone"


def wrong_fp8_sizes(
    backend: Backend,
    recipe: Recipe,
    widths: Mapping[str, int],
    *,
    dim: int,
    num_heads: int,
    heads_field: str = "num_heads",
) -> Iterable[str]:
    """Say which widths, by field name, FP8 layers cannot have, and which heads of `dim` attention cannot."""
    if backend == "torch":
        return
    multiple = alignment(recipe)
    for field, value in widths.items():
        if value % multiple:
            near = nearest_multiples(value, multiple)
            yield f"{field} is {value}; FP8 layers need a multiple of {multiple}, such as {near}"
    if backend == "te" and num_heads > 0 and dim % num_heads == 0 and dim // num_heads % FP8_ALIGNMENT:
        yield (
            f"{heads_field} is {num_heads}, which makes heads of {dim // num_heads}; Transformer Engine's attention "
            f"needs a multiple of {FP8_ALIGNMENT}: {_allowed_heads(dim, num_heads, heads_field)}"
        )


def _allowed_heads(dim: int, num_heads: int, field: str) -> str:
    """Name the nearest numbers of heads, one fewer and one more, whose width attention kernels take."""
    allowed = [n for n in range(1, dim + 1) if dim % (n * FP8_ALIGNMENT) == 0]
    near = [
        max((n for n in allowed if n < num_heads), default=None),
        min((n for n in allowed if n > num_heads), default=None),
    ]
    found = " or ".join(str(n) for n in near if n is not None)
    return f"{field} {found}" if found else "the width has to change first"
