"""The parts of a perturbation transformer: what it embeds, compresses, reads out and predicts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cross_attention import CrossAttention
from models.embeddings import BinEmbedding, Embedding
from models.layers import MLP, LayerFactory, Linear, Norm
from models.perturbation_config import PerturbationTransformerConfig
from models.transformer import TransformerBlock, block_options


class GeneIdentity(nn.Module):
    """A learned vector for each gene and, beside it, a projection of one that was given and stays as it is."""

    vectors: Tensor

    def __init__(self, num_genes: int, dim: int, vector_dim: int, init_std: float) -> None:
        """Draw the learned vectors; the given ones are zero until they are set."""
        super().__init__()
        self.learned = Embedding(num_genes, dim, init_std=init_std)
        self.projection = None
        if vector_dim:
            self.register_buffer("vectors", torch.zeros(num_genes, vector_dim))
            self.projection = Linear(vector_dim, dim, bias=False, init_std=init_std)

    def set_vectors(self, vectors: Tensor) -> None:
        """Take vectors [N, V], zeros for genes without one."""
        self.vectors.copy_(vectors)

    def forward(self) -> Tensor:
        """Return [N, G]."""
        genes = self.learned(torch.arange(self.learned.num_embeddings, device=self.learned.weight.device))
        return genes if self.projection is None else genes + self.projection(self.vectors)


class ControlProfile(nn.Module):
    """Scale and shift of a gene's vector for its distribution over the controls."""

    def __init__(self, num_tokens: int, dim: int, init_std: float) -> None:
        """Draw the weights."""
        super().__init__()
        self.scale = Linear(num_tokens, dim, bias=False, init_std=1.0)
        self.shift = Linear(num_tokens, dim, init_std=init_std)

    def forward(self, genes: Tensor, histogram: Tensor) -> Tensor:
        """Return [B, N, G] for gene vectors [N, G] and counts [B, N, bins]."""
        share = histogram / histogram.sum(dim=-1, keepdim=True).clamp(min=1)
        return genes * (1 + self.scale(share)) + self.shift(share)


class ControlPrior(nn.Module):
    """Logits from a gene's distribution over the controls: a perturbation leaves most genes as they are.

    How many made-up observations, of all tokens alike, are added to the counts is learned, and so is how much the
    logits count.
    """

    def __init__(self, num_tokens: int) -> None:
        """Start with one observation and the logits as they are."""
        super().__init__()
        self.num_tokens = num_tokens
        self.log_observations = nn.Parameter(torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        """Start with one observation and the logits as they are."""
        nn.init.zeros_(self.log_observations)
        nn.init.ones_(self.scale)

    def forward(self, histogram: Tensor) -> Tensor:
        """Return [B, N, K] for counts [B, N, K]; without counts all tokens have the same."""
        made_up = self.log_observations.float().exp()
        share = (histogram + made_up / self.num_tokens) / (histogram.sum(dim=-1, keepdim=True) + made_up)
        return self.scale.float() * share.log()


class TargetEmbedding(nn.Module):
    """One vector for the perturbed genes of a set, whatever their order, or for there being none."""

    def __init__(self, gene_dim: int, dim: int, num_targets: int | None, init_std: float) -> None:
        """Draw the weights; `num_targets` None takes the genes' own vectors."""
        super().__init__()
        self.table = None if num_targets is None else Embedding(num_targets, gene_dim, init_std=init_std)
        self.none = Embedding(1, dim, init_std=init_std)
        self.norm = Norm(gene_dim)
        self.linear1 = Linear(gene_dim, dim, init_std=init_std)
        self.linear2 = Linear(dim, dim, init_std=init_std)

    def forward(self, targets: Tensor, genes: Tensor) -> Tensor:
        """Return [B, D] for indices [B, P], -1 for none, and gene vectors [B, N, G] in their context."""
        is_there = (targets >= 0).unsqueeze(-1)
        index = targets.clamp(min=0)
        if self.table is None:
            found = genes.gather(1, index.unsqueeze(-1).expand(-1, -1, genes.shape[-1]))
        else:
            found = self.table(index)
        vectors = self.linear2(F.silu(self.linear1(self.norm(found))))
        total = (vectors * is_there).sum(dim=1)
        return total + self.none(torch.zeros_like(index[:, 0])) * ~is_there.any(dim=1)


class Response(nn.Module):
    """Move each gene's whole distribution along its tokens, by a product of what the target is and what the gene is.

    A target is a linear map of its fixed gene vector, and so targets that vary alike with other genes move them alike,
    also one that was never perturbed; with a table of targets it has a row of its own. What is moved is the logarithm
    of the odds, in proportion to the place of the token. A target's own expression moves further by one learned amount.
    """

    SPAN = 4.0
    """Difference in place between the first and the last token: amounts of about 1 then move a gene far."""
    SHORT_VECTOR = 0.1
    """Vectors much shorter than this part of the longest one count less than others, which have length 1."""

    def __init__(
        self,
        num_genes: int,
        vector_dim: int,
        num_tokens: int,
        rank: int,
        num_targets: int | None,
        init_std: float,
    ) -> None:
        """Draw the weights; `num_targets` is the size of the table of targets, None where these are genes."""
        super().__init__()
        self.num_tokens = num_tokens
        self.genes = Embedding(num_genes, rank, init_std=2.0 / math.sqrt(rank))
        self.table = self.code = self.own = None
        if num_targets is not None:
            self.table = Embedding(num_targets, rank, init_std=init_std)
        else:
            self.code = Linear(vector_dim, rank, init_std=init_std)
            self.own = nn.Parameter(torch.zeros(1))

    def reset_parameters(self) -> None:
        """Set the own amount to zero; the layers draw their own weights."""
        if self.own is not None:
            nn.init.zeros_(self.own)

    def forward(self, targets: Tensor, vectors: Tensor) -> Tensor:
        """Return logits [B, N, K] to add, for indices [B, P], -1 for none, and vectors [N, V] of the genes."""
        is_there = (targets >= 0).unsqueeze(-1).float()  # [B, P, 1]
        index = targets.clamp(min=0)
        if self.table is not None:
            codes = self.table(index)
        else:
            assert self.code is not None
            length = vectors.norm(dim=1, keepdim=True)
            floor = (self.SHORT_VECTOR * length.max()).clamp(min=1e-6)
            codes = self.code((vectors / (length + floor))[index])
        rows = torch.arange(self.genes.num_embeddings, device=targets.device)
        amount = (codes * is_there).sum(dim=1).float() @ self.genes(rows).float().T  # [B, N]
        if self.own is not None:
            own = self.own.float() * is_there.squeeze(-1)
            amount = amount.scatter_add(1, index, own)
        place = torch.linspace(-self.SPAN / 2, self.SPAN / 2, self.num_tokens, device=targets.device)
        return amount.unsqueeze(-1) * place


class CellEncoder(nn.Module):
    """Compress the genes of a cell into latents, which attend to them."""

    def __init__(self, config: PerturbationTransformerConfig, factory: LayerFactory) -> None:
        """Draw the weights."""
        super().__init__()
        dim, gene_dim, std = config.hidden_dim, config.gene_width, config.init_std
        self.latents = Embedding(config.num_latents, dim, init_std=std)
        self.summary_norm = Norm(gene_dim, config.normalization)
        self.summary = Linear(gene_dim, dim, init_std=std)
        self.attention = _attention("cell_encoder.attention", dim, gene_dim, dim, config, factory)

    def forward(
        self, tokens: Tensor, genes: Tensor, condition: Tensor | None, values: BinEmbedding
    ) -> Tensor:
        """Return [C, M, D].

        Args:
            tokens: [C, N], the last row of `values` for what is masked.
            genes: [N, G] vectors of the genes.
            condition: [C, D] added to the latents, so that they can look for what matters to it.
            values: embeds tokens.
        """
        embedded = values(genes, tokens)  # [C, N, G]
        # A mean over all genes tells cells apart from the first step on, while attention needs many more to.
        latents = self.latents(torch.arange(self.latents.num_embeddings, device=tokens.device))
        latents = latents + self.summary(self.summary_norm(embedded.mean(dim=1))).unsqueeze(1)
        if condition is not None:
            latents = latents + condition.unsqueeze(1)
        return latents + self.attention(latents, embedded)


class SetEncoder(nn.Module):
    """Compress the latents of all control cells of a set into few, whatever their order."""

    def __init__(self, config: PerturbationTransformerConfig, factory: LayerFactory) -> None:
        """Draw the weights."""
        super().__init__()
        dim, std = config.hidden_dim, config.init_std
        self.latents = Embedding(config.num_context_latents, dim, init_std=std)
        self.none = Embedding(config.num_context_latents, dim, init_std=std)
        self.attention = _attention("control_encoder.attention", dim, dim, dim, config, factory)
        self.layers = nn.ModuleList(
            TransformerBlock(
                dim,
                config.num_heads,
                config.inner_dim,
                **block_options(config),
                output_init_std=std / math.sqrt(2 * config.num_context_layers),
                is_causal=False,
                factory=factory,
                name=f"control_encoder.layers.{index}",
            )
            for index in range(config.num_context_layers)
        )

    def forward(self, cells: Tensor, rows: int | None = None) -> Tensor:
        """Return [B, L, D] for the latents [B, C * M, D] of the sets' cells.

        With `rows`, return [rows, L, D] for sets without controls. `cells` then stand in for theirs, and count 0 times.
        """
        numbers = torch.arange(self.latents.num_embeddings, device=self.latents.weight.device)
        latents = self.latents(numbers).expand(len(cells), -1, -1)
        latents = latents + self.attention(latents, cells)
        # Weights that play no part have gradients of exactly 0: where there are none, DDP and ZeRO-3 step differently,
        # and of gradients that are rounding errors Adam would make steps of full size.
        none = self.none(numbers)
        latents = latents + 0.0 * none if rows is None else (none + 0.0 * latents).expand(rows, -1, -1)
        for layer in self.layers:
            latents = layer(latents, None)
        return latents


class GeneDecoder(nn.Module):
    """Let every gene read from a cell's latents what becomes of it."""

    def __init__(self, config: PerturbationTransformerConfig, factory: LayerFactory) -> None:
        """Draw the weights."""
        super().__init__()
        dim, gene_dim, std = config.hidden_dim, config.gene_width, config.init_std
        self.attention = _attention("decoder.attention", gene_dim, dim, gene_dim, config, factory)
        self.condition = factory.norm_linear(
            "decoder.condition", dim, 2 * gene_dim, init_std=std, normalization=config.normalization
        )
        self.mlp = MLP(
            gene_dim,
            config.gene_inner_dim,
            activation=config.activation,
            init_std=std,
            normalization=config.normalization,
            factory=factory,
            name="decoder.mlp",
        )
        self.norm = Norm(gene_dim, config.normalization)

    def forward(self, queries: Tensor, states: Tensor, condition: Tensor) -> Tensor:
        """Return [C, N, G] for queries [B, N, G] of sets, states [C, M, D] and conditions [C, D] of their cells."""
        read = self.attention(queries, states)
        scale, shift = self.condition(condition).unsqueeze(1).chunk(2, dim=-1)
        # Scaled by the condition and not only shifted: what a target does to a gene is a product of the two.
        queries = queries.repeat_interleave(len(states) // len(queries), dim=0)
        hidden = queries * (1 + scale) + shift + read
        return self.norm(hidden + self.mlp(hidden))


class TokenHead(nn.Module):
    """Logits over expression tokens: from a gene's hidden state, and its own in any cell."""

    def __init__(self, gene_dim: int, num_tokens: int, num_genes: int, init_std: float) -> None:
        """Draw the weights."""
        super().__init__()
        self.output = Linear(gene_dim, num_tokens, bias=False, init_std=init_std)
        self.bias = nn.Parameter(torch.zeros(num_genes, num_tokens))

    def reset_parameters(self) -> None:
        """Set the bias to zero; the linear layer draws its own weights."""
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, prior: Tensor | None) -> Tensor:
        """Return float32 [C, N, K] for hidden states [C, N, G] and logits [C, N, K] to start from."""
        logits = self.output(hidden).float() + self.bias.float()
        return logits if prior is None else logits + prior


def _attention(
    name: str,
    dim: int,
    context_dim: int,
    inner_dim: int,
    config: PerturbationTransformerConfig,
    factory: LayerFactory,
) -> CrossAttention:
    return CrossAttention(
        dim,
        context_dim,
        inner_dim,
        config.num_heads,
        init_std=config.init_std,
        output_init_std=config.init_std,
        normalization=config.normalization,
        factory=factory,
        name=name,
    )
