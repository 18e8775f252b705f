"""Transformer encoder over the genes of a cell, trained to predict masked genes and masked expression."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import costs
from models.cell_layout import PackedCells, PaddedCells, cell_layout
from models.embeddings import (
    BinEmbedding,
    CellSummary,
    DepthEmbedding,
    Embedding,
    TechnicalBatchEmbedding,
    ValueEmbedding,
)
from models.errors import ModelError
from models.fp8_alignment import FP8_ALIGNMENT, alignment, nearest_multiples
from models.fp8_scaling import Recipe
from models.gene_embeddings import fit_to_width, load_gene_embeddings
from models.layers import (
    Activation,
    Backend,
    LayerFactory,
    Normalization,
    check_choice,
)
from models.masked_heads import IGNORED_LABEL, NUM_SPECIAL_TOKENS, GeneHead, ValueHead, value_prior
from models.outputs import LossOutput
from models.pretrained import from_pretrained
from models.transformer import Transformer

PAD, UNKNOWN, MASK, CLS = range(4)

Pooling = Literal["cls", "mean"]
PositionEmbedding = Literal["none", "learned"]


@dataclass(frozen=True)
class EncoderConfig:
    """Hold the sizes and choices of a `MaskedCellEncoder`.

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
        use_depth: tell the model each cell's log1p(total), so that it need not spend its capacity on guessing it.
        use_cell_summary: add to each cell's embedding a linear summary of its visible genes (`CellSummary`).
        pooling: what `encode` returns: the hidden state of `cls`, or the `mean` over genes.
        gene_loss_weight: weight of the masked gene loss; 0 builds no gene head.
        expression_loss_weight: weight of the masked expression loss; 0 builds no value head.
        tie_gene_head: let the gene head share the token embedding's weight.
        use_value_prior: start the value head at each gene's own distribution over training cells.
        gene_embedding_path: file of gene vectors to start the token embedding from (.npy with a .txt of gene names
            beside it, or .safetensors).
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
    use_depth: bool = True
    use_cell_summary: bool = True
    pooling: Pooling = "cls"
    gene_loss_weight: float = 1.0
    expression_loss_weight: float = 1.0
    tie_gene_head: bool = True
    use_value_prior: bool = True
    gene_embedding_path: str | None = None
    init_std: float = 0.02
    activation_checkpointing: bool = False
    layer_backend: Backend = "torch"
    fp8_recipe: Recipe = "current_scaling"
    exclude_layers: tuple[str, ...] = ()
    num_technical_batches: int | None = None

    def __post_init__(self) -> None:
        """Check every field; raise one ValueError that names all that is wrong."""
        object.__setattr__(self, "exclude_layers", tuple(self.exclude_layers))
        problems = [*self._wrong_numbers(), *self._wrong_choices()]
        if problems:
            raise ModelError("; ".join(problems))

    @property
    def inner_dim(self) -> int:
        """Inner width of the MLPs."""
        return 4 * self.hidden_dim if self.ffn_dim is None else self.ffn_dim

    def _wrong_numbers(self) -> Iterable[str]:
        if self.vocab_size <= NUM_SPECIAL_TOKENS:
            yield f"vocab_size is {self.vocab_size}; it must exceed the {NUM_SPECIAL_TOKENS} special tokens"
        if self.n_bins is not None and self.n_bins < 2:
            yield f"n_bins is {self.n_bins}; it must be at least 2, or null for continuous values"
        if self.n_technical_batches < 0:
            yield f"n_technical_batches is {self.n_technical_batches}; it must not be negative"
        rows = self.num_technical_batches
        if rows is not None and not 1 <= rows <= self.n_technical_batches:
            yield f"num_technical_batches is {rows}; it must be in 1 to n_technical_batches {self.n_technical_batches}"
        for field in ("hidden_dim", "num_layers", "num_heads", "inner_dim", "max_seq_len"):
            value = getattr(self, field)
            if value is not None and value < 1:
                yield f"{field.replace('inner', 'ffn')} is {value}; it must be at least 1"
        if self.num_heads > 0 and self.hidden_dim % self.num_heads:
            yield f"hidden_dim {self.hidden_dim} is not divisible by num_heads {self.num_heads}"
        for field in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, field) < 1:
                yield f"{field} is {getattr(self, field)}; it must be in [0, 1)"
        for field in ("gene_loss_weight", "expression_loss_weight"):
            if not getattr(self, field) >= 0:
                yield f"{field} is {getattr(self, field)}; it must not be negative"
        if self.gene_loss_weight == 0 and self.expression_loss_weight == 0:
            yield "gene_loss_weight and expression_loss_weight are both 0; one must be positive"
        if not self.init_std > 0:
            yield f"init_std is {self.init_std}; it must be positive"

    def _wrong_choices(self) -> Iterable[str]:
        choices = {
            "activation": Activation,
            "normalization": Normalization,
            "position_embedding": PositionEmbedding,
            "pooling": Pooling,
            "layer_backend": Backend,
            "fp8_recipe": Recipe,
        }
        for field, allowed in choices.items():
            try:
                check_choice(field, getattr(self, field), allowed)
            except ValueError as error:
                yield str(error)
        if self.position_embedding == "learned" and self.max_seq_len is None:
            yield "position_embedding learned needs max_seq_len"
        yield from self._wrong_fp8()

    def _wrong_fp8(self) -> Iterable[str]:
        backend, recipe = self.layer_backend, self.fp8_recipe
        if backend == "torch":
            if recipe != "current_scaling":
                yield f"fp8_recipe is {recipe}, but layer_backend torch has no FP8 layers"
            return
        if backend == "torchao" and recipe != "current_scaling":
            yield f"fp8_recipe is {recipe}; layer_backend torchao knows current_scaling alone"
        multiple = alignment(recipe)
        for field, value in (("hidden_dim", self.hidden_dim), ("ffn_dim", self.inner_dim)):
            if value % multiple:
                near = nearest_multiples(value, multiple)
                yield f"{field} is {value}; FP8 layers need a multiple of {multiple}, such as {near}"
        if backend == "te" and self.num_heads > 0 and self.hidden_dim % self.num_heads == 0:
            head_dim = self.hidden_dim // self.num_heads
            if head_dim % FP8_ALIGNMENT:
                yield (
                    f"num_heads is {self.num_heads}, which makes heads of {head_dim}; Transformer Engine's attention "
                    f"needs a multiple of {FP8_ALIGNMENT}: {_allowed_heads(self.hidden_dim, self.num_heads)}"
                )


def _allowed_heads(hidden_dim: int, num_heads: int) -> str:
    """Name the nearest numbers of heads, one fewer and one more, whose width attention kernels take."""
    allowed = [n for n in range(1, hidden_dim + 1) if hidden_dim % (n * FP8_ALIGNMENT) == 0]
    near = [
        max((n for n in allowed if n < num_heads), default=None),
        min((n for n in allowed if n > num_heads), default=None),
    ]
    found = " or ".join(str(n) for n in near if n is not None)
    return f"num_heads {found}" if found else "hidden_dim has to change first"


class EncoderOutput(NamedTuple):
    """Hold what a forward pass returns.

    Attributes:
        hidden: [B, N, D] hidden states after the final norm; [1, T, D] of a packed batch.
        gene_logits: [M, V] at the masked positions; None without a gene head.
        value_logits: [M, n_bins], or [M] for continuous values; None without a value head.
        gene_loss: the gene head's summed loss and its right guesses, where labels were given in place of the logits.
    """

    hidden: Tensor
    gene_logits: Tensor | None
    value_logits: Tensor | None
    gene_loss: tuple[Tensor, Tensor] | None = None


class MaskedCellEncoder(nn.Module):
    """Transformer encoder that predicts masked genes and the expression at masked positions.

    The gene head answers which gene stands at a masked position; the value head which expression the gene that
    the label names has there. Both see the technical batch, and both are computed at masked positions only.
    """

    accepts_packed_batches = True
    """Lets data with `layout: packed` in; the trainer refuses it for models without this."""

    def __init__(self, config: EncoderConfig) -> None:
        """Draw the weights, every module its own."""
        super().__init__()
        self.config = config
        dim, std = config.hidden_dim, config.init_std
        self._factory = LayerFactory(config.layer_backend, config.exclude_layers, config.fp8_recipe)
        self.token_embedding = Embedding(config.vocab_size, dim, init_std=std, padding_idx=PAD)
        if config.n_bins is None:
            self.value_embedding = ValueEmbedding(dim, std)
        else:
            self.value_embedding = BinEmbedding(config.n_bins, dim, std)
        self.position_embedding = None
        if config.position_embedding == "learned":
            assert config.max_seq_len is not None
            self.position_embedding = Embedding(config.max_seq_len, dim, init_std=std)
        self.depth_embedding = DepthEmbedding(dim, std) if config.use_depth else None
        self.cell_summary = None
        if config.use_cell_summary:
            self.cell_summary = CellSummary(config.vocab_size, dim, config.n_bins, std)
        self.technical_batch_embedding = None
        if config.n_technical_batches:
            padded = config.n_technical_batches
            self.technical_batch_embedding = TechnicalBatchEmbedding(
                padded if config.num_technical_batches is None else config.num_technical_batches,
                dim,
                init_std=std,
                product=self._factory.embedding_product("technical_batch_embedding", dim),
                padded_num=padded,
            )
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = Transformer(
            dim,
            config.num_layers,
            config.num_heads,
            config.inner_dim,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            activation=config.activation,
            normalization=config.normalization,
            init_std=std,
            activation_checkpointing=config.activation_checkpointing,
            factory=self._factory,
        )
        self.gene_head = None
        if config.gene_loss_weight > 0:
            self.gene_head = GeneHead(dim, config.vocab_size, tied=config.tie_gene_head, init_std=std)
        self.value_head = None
        if config.expression_loss_weight > 0:
            self.value_head = ValueHead(dim, config.vocab_size, config.n_bins or 1, init_std=std)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> Self:
        """Load an exported model (`python -m trainer export`), in evaluation mode; no other file is needed.

        Raises:
            ModelError: a file of the folder is missing, damaged, or describes another kind of model.
        """
        return cast(Self, from_pretrained(folder, model_class=cls, device=device))

    def forward(self, batch: dict[str, Any], gene_labels: Tensor | None = None) -> EncoderOutput:
        """Return hidden states of all tokens and the logits of the masked positions.

        Args:
            batch: as the loader yields it.
            gene_labels: [M] the genes at the masked positions; their loss is returned in place of the gene logits.
        """
        masked_index = _needed(batch, "masked_index", "configure masking for this data")
        layout = cell_layout(batch)
        offset = None
        with self._factory.region():
            hidden = self._hidden_states(batch, layout)  # [B, N, D]
            if self.technical_batch_embedding is not None:
                batch_idx = _needed(batch, "batch_idx", "n_technical_batches is set")
                offset = self.technical_batch_embedding(batch_idx)  # [B, D]
        cells = self._pooled(hidden, batch, layout)  # [B, D]
        rows = layout.cells_of(masked_index)
        asked = hidden.flatten(end_dim=1)[masked_index]  # [M, D]
        if offset is not None:
            cells, asked = cells + offset, asked + offset[rows]
        gene_result = value_logits = None
        if self.gene_head is not None:
            gene_result = self.gene_head(asked, cells, rows, self.token_embedding.weight, gene_labels)
        if self.value_head is not None:
            genes = _asked_genes(batch)
            value_logits = self.value_head(asked, cells, rows, self.token_embedding(genes), genes)
            if self.config.n_bins is None:
                value_logits = value_logits.squeeze(-1)
        if gene_labels is None:
            return EncoderOutput(hidden, gene_result, value_logits)
        return EncoderOutput(hidden, None, value_logits, gene_result)

    def compute_loss(self, batch: dict[str, Any]) -> LossOutput:
        """Return the summed loss over the masked positions, with accuracy and each loss as metrics."""
        masked_index = _needed(batch, "masked_index", "configure masking for this data")
        genes = None if self.gene_head is None else batch["labels"].flatten()[masked_index]
        output = self(batch, genes)
        total = output.hidden.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        if output.gene_loss is not None:
            gene_loss, num_correct = output.gene_loss
            total = total + self.config.gene_loss_weight * gene_loss
            metrics["gene_loss"] = gene_loss.detach()
            metrics["gene_accuracy"] = num_correct
        if output.value_logits is not None:
            labels = _needed(batch, "value_labels", "or set expression_loss_weight: 0")
            values = labels.flatten()[masked_index]
            value_loss = self._value_loss(output.value_logits.float(), values)
            total = total + self.config.expression_loss_weight * value_loss
            metrics["expression_loss"] = value_loss.detach()
            if self.config.n_bins is not None:
                metrics["expression_accuracy"] = (output.value_logits.detach().argmax(dim=-1) == values).sum()
        return LossOutput(total, float(masked_index.numel()), metrics)

    def loss_weight(self, batch: dict[str, Any]) -> float:
        """Return the number of masked positions, over which the loss is averaged."""
        self._check_cls(batch)
        return float(_needed(batch, "masked_index", "configure masking for this data").numel())

    def encode(self, batch: dict[str, Any]) -> Tensor:
        """Return one embedding per cell, [B, D]; it does not depend on the technical batch."""
        self._check_cls(batch)
        layout = cell_layout(batch)
        return self._pooled(self._hidden_states(batch, layout), batch, layout)

    def set_value_prior(self, prior: Tensor) -> None:
        """Let the value head start from `prior`: log probabilities [V, n_bins], or means [V, 1]."""
        if self.value_head is None:
            raise ModelError("expression_loss_weight is 0: the model has no value head to give a prior to")
        if prior.shape != self.value_head.prior.shape:
            wanted = list(self.value_head.prior.shape)
            raise ModelError(f"the value prior has shape {list(prior.shape)}; the model needs {wanted}")
        self.value_head.prior.copy_(prior)

    @torch.no_grad()
    def initialise_from_data(
        self, batches: Iterable[dict[str, Any]], gene_ids: Sequence[str] | None = None
    ) -> dict[str, int]:
        """Set the value prior and the gene embeddings; called once, before a fresh start.

        Args:
            batches: training batches without masking.
            gene_ids: the names of the genes, in the order of their token ids; needed for `gene_embedding_path`.

        Returns:
            What was done, for the start-up account: gene vectors found, genes and values counted for the prior.
        """
        account: dict[str, int] = {}
        if self.config.gene_embedding_path is not None:
            if gene_ids is None:
                raise ModelError("gene_embedding_path is set, but the data names no genes")
            table = load_gene_embeddings(self.config.gene_embedding_path, gene_ids)
            table = fit_to_width(table, self.config.hidden_dim, self.config.init_std)
            known = ~table.isnan().any(dim=1)
            weight = self.token_embedding.weight
            weight[NUM_SPECIAL_TOKENS:][known.to(weight.device)] = table[known].to(weight)
            account["gene_vectors_found"] = int(known.sum())
            account["gene_vectors_missing"] = int((~known).sum())
        if self.value_head is not None and self.config.use_value_prior:
            prior, counted = value_prior(batches, self.config.vocab_size, self.config.n_bins)
            self.set_value_prior(prior)
            account["prior_genes"] = int((counted > 0).sum())
            account["prior_values"] = int(counted.sum())
        return account

    def compiled_modules(self) -> list[nn.Module]:
        """Return what `compile: true` compiles: the blocks, all of one shape; what follows varies with the masks."""
        return list(self.transformer.layers)

    def data_initialised_parameters(self) -> list[Tensor]:
        """Return the parameters that `initialise_from_data` writes, which must be whole then."""
        return [self.token_embedding.weight] if self.config.gene_embedding_path is not None else []

    def training_flops(self, lengths: Sequence[int], num_masked: int) -> float:
        """Return the operations of a forward and a backward pass over cells of these lengths in tokens."""
        return costs.training_flops(self.config, lengths, num_masked)

    def activation_bytes(
        self, *, num_tokens: int, num_cells: int, num_masked: int, is_mixed: bool
    ) -> costs.Activations:
        """Return the bytes that a forward pass over one micro-batch keeps (see models/costs.py)."""
        return costs.activation_bytes(
            self.config,
            num_tokens=num_tokens,
            num_cells=num_cells,
            num_masked=num_masked,
            is_mixed=is_mixed,
        )

    def matrix_sizes(self) -> dict[str, int]:
        """Return by field name the sizes of the matrices that FP8 layers multiply."""
        return costs.matrix_sizes(self.config)

    def _hidden_states(self, batch: dict[str, Any], layout: PaddedCells | PackedCells) -> Tensor:
        tokens = batch["tokens"]  # [B, N], or [1, T]
        limit = self.config.max_seq_len
        if limit is not None and layout.max_length > limit:
            raise ModelError(f"max_seq_len is {limit}, but a batch has rows of {layout.max_length} tokens")
        x = self.token_embedding(tokens)
        if isinstance(self.value_embedding, BinEmbedding):
            x = self.value_embedding(x, _needed(batch, "bins", "use binned_expression or set n_bins: null"))
        else:
            values = _needed(batch, "values", "the model reads expression")
            x = self.value_embedding(x, values, _is_hidden(batch))
        if self.position_embedding is not None:
            x = x + self.position_embedding(layout.positions())
        if self.depth_embedding is not None:
            depth = self.depth_embedding(_needed(batch, "depth", "or set use_depth: false"))
            x = x + layout.spread(depth)
        return self.transformer(self.dropout(x), layout.attention)

    def _pooled(self, hidden: Tensor, batch: dict[str, Any], layout: PaddedCells | PackedCells) -> Tensor:
        is_read = layout.is_real & (batch["tokens"] >= NUM_SPECIAL_TOKENS) & ~_is_hidden(batch)
        if self.config.pooling == "cls":
            cells = layout.first(hidden)
        else:
            weight = is_read.unsqueeze(-1).to(hidden.dtype)
            cells = layout.sum(hidden * weight) / layout.sum(weight).clamp(min=1)
        if self.cell_summary is not None:
            expression = batch["values"] if self.config.n_bins is None else batch["bins"]
            cells = cells + self.cell_summary(batch["tokens"], expression, is_read, layout.sum)
        return cells

    def _check_cls(self, batch: dict[str, Any]) -> None:
        # On a GPU the answer would stop the device; `loss_weight` sees every batch before it is moved there.
        if self.config.pooling != "cls" or batch["tokens"].is_cuda:
            return
        if bool((cell_layout(batch).first(batch["tokens"]) != CLS).any()):
            raise ModelError(
                "pooling is cls, but a batch has rows without a cls token; use prepend_cls or pooling: mean"
            )

    def _value_loss(self, logits: Tensor, values: Tensor) -> Tensor:
        if self.config.n_bins is not None:
            return F.cross_entropy(logits, values, reduction="sum", ignore_index=IGNORED_LABEL)
        return (logits - values).square().sum()


def _is_hidden(batch: dict[str, Any]) -> Tensor:
    """Return [B, N] bool: positions whose expression the model may not see."""
    is_hidden = batch["tokens"] == MASK
    if "masked_index" in batch:
        is_hidden.view(-1)[batch["masked_index"]] = True
    return is_hidden


def _asked_genes(batch: dict[str, Any]) -> Tensor:
    """Return [M] the genes at masked positions: those of the labels, else (only expression hidden) the tokens."""
    masked_index = batch["masked_index"]
    labels = batch["labels"].flatten()[masked_index]
    return torch.where(labels == IGNORED_LABEL, batch["tokens"].flatten()[masked_index], labels)


def _needed(batch: dict[str, Any], key: str, advice: str) -> Any:
    """Return a batch entry, or say what to do about its absence."""
    if key not in batch:
        raise ModelError(f"the batch has no {key!r} (it has {', '.join(sorted(batch))}); {advice}")
    return batch[key]
