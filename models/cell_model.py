"""What our models of cells share: tokens become vectors, the data starts weights, hidden states become an embedding."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import costs
from models.cell_layout import PackedCells, PaddedCells, cell_layout
from models.embeddings import (
    BinEmbedding,
    DepthEmbedding,
    Embedding,
    TechnicalBatchEmbedding,
    ValueEmbedding,
)
from models.errors import ModelError
from models.gene_embeddings import fit_to_width, load_gene_embeddings
from models.layers import LayerFactory
from models.masked_heads import (
    IGNORED_LABEL,
    NUM_SPECIAL_TOKENS,
    DecodedValueHead,
    ValueHead,
    value_prior,
)
from models.model_config import ModelConfig
from models.pretrained import PretrainedModule
from models.transformer import Transformer, block_options

PAD, UNKNOWN, MASK, CLS = range(NUM_SPECIAL_TOKENS)


class CellModel(PretrainedModule):
    """A transformer over the genes of a cell, without what it is trained for: that is the subclass's.

    The subclass's `forward(batch)` returns a NamedTuple of tensors or None, by which exports are compared.

    Args:
        config: its sizes and choices.
        has_heads: whether to build what only pretraining needs. Without it the model has `encode` alone, as a backbone
            needs it that is fine-tuned.
    """

    accepts_packed_batches = True
    """Lets data with `layout: packed` in; the trainer refuses it for models without this."""

    head_names: ClassVar[tuple[str, ...]] = ()
    """The modules that are left out without heads, by the first part of their parameters' names."""

    is_causal: ClassVar[bool] = False

    transformer: Transformer
    technical_batch_embedding: TechnicalBatchEmbedding | None
    value_head: ValueHead | DecodedValueHead | None

    def __init__(self, config: ModelConfig, *, has_heads: bool = True) -> None:
        """Draw the weights of the embeddings; a subclass builds what follows, every module drawing its own."""
        super().__init__()
        self.config: Any = config
        self.has_heads = has_heads
        dim, std = config.hidden_dim, config.init_std
        self._factory = LayerFactory(config.layer_backend, config.exclude_layers, config.fp8_recipe)
        self.token_embedding = Embedding(config.vocab_size, dim, init_std=std, padding_idx=PAD)
        self.value_embedding = None
        if config.use_expression_values:
            self.value_embedding = (
                ValueEmbedding(dim, std) if config.n_bins is None else BinEmbedding(config.n_bins, dim, std)
            )
        self.position_embedding = None
        if config.position_embedding == "learned":
            assert config.max_seq_len is not None
            self.position_embedding = Embedding(config.max_seq_len, dim, init_std=std)
        self.depth_embedding = DepthEmbedding(dim, std) if config.use_depth else None
        self.dropout = nn.Dropout(config.dropout)
        self.value_head = None

    def encode(self, batch: dict[str, Any]) -> Tensor:
        """Return one embedding per cell, [B, D]; it does not depend on the technical batch."""
        self.check_cells(batch)
        layout = cell_layout(batch)
        return self._pooled(self._hidden_states(batch, layout), batch, layout)

    def check_cells(self, batch: dict[str, Any]) -> None:
        """Raise where a batch's cells have not the tokens that pooling reads.

        On a GPU the answer would stop the device; `loss_weight` sees every batch before it is moved there.
        """
        if self.config.pooling != "cls" or batch["tokens"].is_cuda:
            return
        if bool((cell_layout(batch).first(batch["tokens"]) != CLS).any()):
            raise ModelError(
                "pooling is cls, but a batch has rows without a cls token; use prepend_cls or pooling: mean"
            )

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
        self,
        batches: Iterable[dict[str, Any]],
        gene_ids: Sequence[str] | None = None,
        gene_symbols: Sequence[str | None] | None = None,
    ) -> dict[str, int]:
        """Set the value prior and the gene embeddings; called once, before a fresh start.

        Args:
            batches: training batches without masking.
            gene_ids: the names of the genes, in the order of their token ids; needed for `gene_embedding_path`.
            gene_symbols: their symbols, by which a file of vectors may name them too.

        Returns:
            What was done, for the start-up account: gene vectors found, genes and values counted for the prior.
        """
        account: dict[str, int] = {}
        if self.config.gene_embedding_path is not None:
            if gene_ids is None:
                raise ModelError("gene_embedding_path is set, but the data names no genes")
            table = load_gene_embeddings(self.config.gene_embedding_path, gene_ids, gene_symbols)
            wanted = self.config.gene_embedding_dim
            if wanted is not None and table.shape[1] != wanted:
                raise ModelError(
                    f"gene_embedding_path: {self.config.gene_embedding_path} holds vectors of {table.shape[1]} "
                    f"numbers, but gene_embedding_dim is {wanted}"
                )
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

    def matrix_sizes(self) -> dict[str, int]:
        """Return by field name the sizes of the matrices that FP8 layers multiply."""
        return costs.matrix_sizes(self.config)

    def _build_technical_batches(self, dim: int) -> TechnicalBatchEmbedding | None:
        """Build the vectors of the technical batches, which are a part of the heads; None where there are none."""
        return TechnicalBatchEmbedding.of_model(self.config, dim, self._factory) if self.has_heads else None

    def _build_transformer(self, *, is_last: bool = True) -> Transformer:
        config = self.config
        return Transformer(
            config.hidden_dim,
            config.num_layers,
            config.num_heads,
            config.inner_dim,
            is_causal=self.is_causal,
            **block_options(config),
            activation_checkpointing=config.activation_checkpointing,
            factory=self._factory,
            is_last=is_last,
        )

    def _need_heads(self) -> None:
        if not self.has_heads:
            raise ModelError(
                f"this {type(self).__name__} was built without heads: it can encode, not be pretrained"
            )

    def _technical_vectors(self, batch: dict[str, Any]) -> Tensor | None:
        """Return the vector of each cell's technical batch, [B, D]; None for a model that does not know these."""
        if self.technical_batch_embedding is None:
            return None
        return self.technical_batch_embedding(needed(batch, "batch_idx", "n_technical_batches is set"))

    def _embedded(self, batch: dict[str, Any], layout: PaddedCells | PackedCells) -> Tensor:
        """Return the vectors of all tokens, before the transformer."""
        tokens = batch["tokens"]  # [B, N], or [1, T]
        limit = self.config.max_seq_len
        if limit is not None and layout.max_length > limit:
            raise ModelError(f"max_seq_len is {limit}, but a batch has rows of {layout.max_length} tokens")
        x = self.token_embedding(tokens)
        if isinstance(self.value_embedding, BinEmbedding):
            x = self.value_embedding(x, needed(batch, "bins", "use binned_expression or set n_bins: null"))
        elif self.value_embedding is not None:
            x = self.value_embedding(
                x, needed(batch, "values", "the model reads expression"), hidden_places(batch)
            )
        if self.position_embedding is not None:
            x = x + self.position_embedding(layout.positions())
        if self.depth_embedding is not None:
            depth = self.depth_embedding(needed(batch, "depth", "or set use_depth: false"))
            x = x + layout.spread(depth)
        return x

    def _hidden_states(self, batch: dict[str, Any], layout: PaddedCells | PackedCells) -> Tensor:
        """Return the hidden states of all tokens, [B, N, D] or [1, T, D]."""
        return self.transformer(self.dropout(self._embedded(batch, layout)), layout.attention)

    def _pooled(self, hidden: Tensor, batch: dict[str, Any], layout: PaddedCells | PackedCells) -> Tensor:
        """Return the cells' embeddings, [B, D]."""
        if self.config.pooling == "cls":
            return layout.first(hidden)
        weight = read_places(batch, layout).unsqueeze(-1).to(hidden.dtype)
        return layout.sum(hidden * weight) / layout.sum(weight).clamp(min=1)

    def _value_loss(
        self, logits: Tensor, values: Tensor, is_asked: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss of predicted bins or values, and its metrics; with `is_asked`, of these alone."""
        logits = logits.float()
        if self.config.n_bins is None:
            errors = (logits - values).square()
            loss = errors.sum() if is_asked is None else errors.masked_fill(~is_asked, 0.0).sum()
            return loss, {"expression_loss": loss.detach()}
        if is_asked is not None:
            values = values.masked_fill(~is_asked, IGNORED_LABEL)
        loss = F.cross_entropy(logits, values, reduction="sum", ignore_index=IGNORED_LABEL)
        num_right = (logits.detach().argmax(dim=-1) == values).sum()
        return loss, {"expression_loss": loss.detach(), "expression_accuracy": num_right}


def hidden_places(batch: dict[str, Any]) -> Tensor:
    """Return [B, N] bool: positions whose expression the model may not see."""
    is_hidden = batch["tokens"] == MASK
    if "masked_index" in batch:
        is_hidden.view(-1)[batch["masked_index"]] = True
    return is_hidden


def read_places(batch: dict[str, Any], layout: PaddedCells | PackedCells) -> Tensor:
    """Return [B, N] bool: genes that the model sees with their expression."""
    return layout.is_real & (batch["tokens"] >= NUM_SPECIAL_TOKENS) & ~hidden_places(batch)


def asked_genes(batch: dict[str, Any]) -> Tensor:
    """Return [M] the genes at masked positions: those of the labels, else (only expression hidden) the tokens."""
    masked_index = batch["masked_index"]
    labels = batch["labels"].flatten()[masked_index]
    return torch.where(labels == IGNORED_LABEL, batch["tokens"].flatten()[masked_index], labels)


def needed(batch: dict[str, Any], key: str, advice: str) -> Any:
    """Return a batch entry, or say what to do about its absence."""
    if key not in batch:
        raise ModelError(f"the batch has no {key!r} (it has {', '.join(sorted(batch))}); {advice}")
    return batch[key]


def num_real_tokens(batch: dict[str, Any], layout: PaddedCells | PackedCells) -> int:
    """Return the tokens of a batch without padding, which its loader knows as a number."""
    return int(batch["num_tokens"]) if "num_tokens" in batch else int(layout.is_real.sum())


def places_of(is_wanted: Tensor, at_most: int) -> tuple[Tensor, Tensor | None]:
    """Return the flat indices of True entries, and which of them are meant.

    A GPU is not asked how many there are, which would stop it: the list is `at_most` long, and what fills it up is not
    meant. Elsewhere the list is exact, and the second value None.
    """
    flat = is_wanted.flatten()
    if not flat.is_cuda:
        return flat.nonzero().squeeze(1), None
    index = torch.nonzero_static(flat, size=at_most, fill_value=-1).squeeze(1)
    return index.clamp(min=0), index >= 0
