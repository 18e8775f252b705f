"""What a perturbation does to cells: a diffusion network over the expression of all genes, given control cells.

Thousands of genes are compressed into some tens of latents by cross-attention, a transformer works on these, and each
gene reads its prediction out of them again: what a cell takes grows with the number of genes, not with its square.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import perturbation_costs
from models.auxiliary_losses import NUM_OUTPUTS
from models.coexpression import coexpression_vectors
from models.costs import Activations
from models.diffusion import DenoiserOutput, MaskedDiffusion, make_diffusion
from models.embeddings import BinEmbedding, Embedding, TechnicalBatchEmbedding, TimeEmbedding
from models.errors import ModelError
from models.gene_embeddings import fit_to_width, load_gene_embeddings
from models.layers import LayerFactory, Linear
from models.perturbation_config import PerturbationTransformerConfig
from models.perturbation_layers import (
    CellEncoder,
    ControlPrior,
    ControlProfile,
    GeneDecoder,
    GeneIdentity,
    Response,
    SetEncoder,
    TargetEmbedding,
    TokenHead,
)
from models.pretrained import PretrainedModule
from models.transformer import Transformer, block_options

__all__ = ["Conditions", "PerturbationTransformer", "PerturbationTransformerConfig"]


class Conditions(NamedTuple):
    """Hold what is computed once of a set, whatever the noise is.

    Attributes:
        gene_vectors: [N, G] of the genes themselves.
        queries: [B, N, G] what each gene asks the latents with: its vector, its expression in the controls, whether it
            is a target.
        prior: [B, N, K] logits from the controls, moved by the targets' response; None without both.
        context: [B, L, D] latents of the set of controls; None without.
        target: [B, D] of the perturbed genes; None without.
        technical_batch: [B, D], or [B, S, D]; None without.
    """

    gene_vectors: Tensor
    queries: Tensor
    prior: Tensor | None
    context: Tensor | None
    target: Tensor | None
    technical_batch: Tensor | None


class PerturbationTransformer(PretrainedModule):
    """Predict the expression tokens of perturbed cells under their masks, from control cells, target and batch.

    The cells of a set share its conditions and are predicted each on its own, so their order, and that of the controls,
    means nothing. Without controls, as when pretraining on cells, learned latents stand in for theirs.
    """

    diffusion: MaskedDiffusion

    predicts_cells_apart = True
    """Whether what is drawn of a cell does not depend on the other cells of its set, which then need not be drawn."""

    def __init__(self, config: PerturbationTransformerConfig) -> None:
        """Draw the weights, every module its own."""
        super().__init__()
        self.config = config
        dim, gene_dim, std = config.hidden_dim, config.gene_width, config.init_std
        self.diffusion = make_diffusion(config.objective, config.vocab_size, dict(config.objective_args))
        self._factory = LayerFactory(config.layer_backend, config.exclude_layers, config.fp8_recipe)
        self.gene_embedding = GeneIdentity(config.num_genes, gene_dim, config.gene_vector_dim, std)
        self.value_embedding = BinEmbedding(config.vocab_size, gene_dim, std)
        self._build_controls()
        self._build_targets()
        self.technical_batch_embedding = TechnicalBatchEmbedding.of_model(config, dim, self._factory)
        self.time_embedding = TimeEmbedding(dim, std)
        self.cell_encoder = CellEncoder(config, self._factory)
        self.control_encoder = SetEncoder(config, self._factory) if config.use_control else None
        self.decoder = GeneDecoder(config, self._factory)
        self.head = TokenHead(gene_dim, config.vocab_size, config.num_genes, std)
        self.auxiliary_head = None
        if config.has_auxiliary_heads:
            self.auxiliary_head = Linear(gene_dim, NUM_OUTPUTS, init_std=std)
        self.diffusion.has_auxiliary_heads = config.has_auxiliary_heads
        # Built last: it finds patterns of `exclude_layers` that fit no layer.
        self.transformer = Transformer(
            dim,
            config.num_layers,
            config.num_heads,
            config.inner_dim,
            **block_options(config),
            activation_checkpointing=config.activation_checkpointing,
            factory=self._factory,
        )

    def encode_conditions(
        self,
        *,
        control_set: Tensor | None = None,
        target_gene_idx: Tensor | None = None,
        batch_idx: Tensor | None = None,
    ) -> Conditions:
        """Compute what depends on the conditions alone, once for any number of noise levels.

        Args:
            control_set: [B, C, N] tokens of control cells, or [B, N]; negative where a gene was not measured. None
                where there are none; ignored without `use_control`.
            target_gene_idx: [B] index of the perturbed gene, or [B, P] of several, in any order; -1 stands for none.
                None is -1 everywhere; ignored without `use_target`.
            batch_idx: [B] or [B, S] index of the technical batch; ignored without `n_technical_batches`.
        """
        genes = self.gene_embedding()  # [N, G]
        with self._factory.region():
            rows = next((len(x) for x in (control_set, target_gene_idx, batch_idx) if x is not None), 1)
            queries, prior, histogram = genes.expand(rows, -1, -1), None, None
            if self.controls is not None:
                histogram = self._histogram(control_set, rows)  # [B, N, bins]
                queries = self.controls(genes, histogram)
                if self.prior is not None:
                    prior = (
                        0.0 * self.prior(histogram[:1, :1]) if control_set is None else self.prior(histogram)
                    )
            target = None
            if self.target_embedding is not None:
                if target_gene_idx is None:
                    target_gene_idx = torch.full((rows,), -1, device=queries.device)
                targets = (
                    target_gene_idx if target_gene_idx.ndim == 2 else target_gene_idx.unsqueeze(1)
                )  # [B, P]
                target, queries = self._targets(targets, queries)
                if self.response is not None:
                    fixed = self.config.gene_vector_dim > 0
                    moved = self.response(targets, self.gene_embedding.vectors if fixed else genes)
                    prior = moved if prior is None else prior + moved
            context = None
            if self.control_encoder is not None:
                context = self._context(control_set, genes, target, rows)
            technical_batch = None
            if self.technical_batch_embedding is not None:
                if batch_idx is None:
                    raise ModelError("the batch has no 'batch_idx', but n_technical_batches is set")
                technical_batch = self.technical_batch_embedding(batch_idx)
        return Conditions(genes, queries, prior, context, target, technical_batch)

    def forward(self, tokens: Tensor, time: Tensor, conditions: Conditions) -> DenoiserOutput:
        """Predict what stands under the masks.

        Args:
            tokens: [B, S, N] or [B, N], `vocab_size` at masked genes.
            time: [B, S] or [B] of each cell, 0 to 1.
            conditions: of the sets, B of them or one for all.
        """
        self._check_width(tokens, "tokens")
        sets = tokens if tokens.ndim == 3 else tokens.unsqueeze(1)
        cells = sets.flatten(end_dim=1)  # [C, N]
        with self._factory.region():
            beside = self._beside(time.reshape(sets.shape[:2]), conditions)  # [C, conditions, D]
            condition = beside.sum(dim=1)
            embedded = cells, conditions.gene_vectors, condition
            latents = self._run(self.cell_encoder, *embedded, self.value_embedding)
            parts = [latents, beside]
            if conditions.context is not None:
                parts.append(_for_cells(conditions.context, sets.shape))
            states = self.transformer(torch.cat(parts, dim=1))
            queries = conditions.queries.expand(len(sets), -1, -1)
            hidden = self._run(self.decoder, queries, states, condition)  # [C, N, G]
        prior = None if conditions.prior is None else _for_cells(conditions.prior, sets.shape)
        logits = self.head(hidden, prior)
        auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(hidden)
        shape = (*tokens.shape, -1)
        return DenoiserOutput(logits.view(shape), None if auxiliary is None else auxiliary.view(shape))

    @torch.no_grad()
    def initialise_from_data(
        self, batches: Iterable[dict[str, Any]], gene_ids: Sequence[str] | None = None
    ) -> dict[str, int]:
        """Read or find the gene vectors; called once, before a fresh start.

        Args:
            batches: training data without masks, which `gene_vectors: coexpression` looks at.
            gene_ids: the names of the genes, in the order of the columns.

        Returns:
            What was done, for the start-up account: gene vectors found and missing, or directions and cells.
        """
        config = self.config
        if not config.gene_vector_dim:
            return {}
        if config.gene_vectors == "coexpression":
            found = coexpression_vectors(batches, config.num_genes, config.gene_vector_dim)
            self.gene_embedding.set_vectors(
                found.vectors / found.vectors.square().mean().sqrt().clamp(min=1e-6)
            )
            return {"coexpression_directions": found.num_directions, "coexpression_cells": found.num_cells}
        if config.gene_embedding_path is None:
            raise ModelError(
                f"gene_vector_dim is {config.gene_vector_dim}, but gene_embedding_path names no file to take the gene "
                "vectors from; set both or none"
            )
        if gene_ids is None or len(gene_ids) != config.num_genes:
            named = "no genes" if gene_ids is None else f"{len(gene_ids)} genes"
            raise ModelError(
                f"gene_embedding_path is set, but the data names {named}, and the model has {config.num_genes}"
            )
        table = load_gene_embeddings(config.gene_embedding_path, gene_ids)
        table = fit_to_width(table, config.gene_vector_dim, 1.0)
        known = ~table.isnan().any(dim=1)
        self.gene_embedding.set_vectors(table.nan_to_num(0.0))
        return {"gene_vectors_found": int(known.sum()), "gene_vectors_missing": int((~known).sum())}

    def data_initialised_parameters(self) -> list[Tensor]:
        """Return the parameters that `initialise_from_data` writes: none, the vectors are a buffer."""
        return []

    def compiled_modules(self) -> list[nn.Module]:
        """Return what `compile: true` compiles: the blocks, all of one shape."""
        return list(self.transformer.layers)

    def batch_flops(self, batch: Mapping[str, Any]) -> float:
        """Return the operations of a forward and a backward pass over a batch, by the shapes of its tensors."""
        return perturbation_costs.training_flops(
            self.config, perturbation_costs.sizes_of(batch["tokens"], batch.get("control"))
        )

    def batch_activation_bytes(self, batch: Mapping[str, Any], *, is_mixed: bool) -> Activations:
        """Return the bytes that a forward pass over a batch keeps, by the shapes of its tensors."""
        return perturbation_costs.activation_bytes(
            self.config,
            perturbation_costs.sizes_of(batch["tokens"], batch.get("control")),
            is_mixed=is_mixed,
        )

    def matrix_sizes(self) -> dict[str, int]:
        """Return by field name the sizes of the matrices that FP8 layers multiply."""
        return perturbation_costs.matrix_sizes(self.config)

    def _build_controls(self) -> None:
        """Build what the controls tell of each gene."""
        config = self.config
        self.control_value_embedding = self.controls = self.prior = None
        if not config.use_control:
            return
        if config.control_tokens == "own":
            self.control_value_embedding = BinEmbedding(
                config.num_control_tokens, config.gene_width, config.init_std
            )
        self.controls = ControlProfile(config.num_control_tokens, config.gene_width, config.init_std)
        if config.control_tokens == "shared":
            self.prior = ControlPrior(config.vocab_size)

    def _build_targets(self) -> None:
        """Build what the perturbed genes tell."""
        config, gene_dim, std = self.config, self.config.gene_width, self.config.init_std
        self.target_embedding = self.target_flag = self.response = None
        if not config.use_target:
            return
        own = (config.num_targets or config.num_genes) if config.target_table == "own" else None
        self.target_embedding = TargetEmbedding(gene_dim, config.hidden_dim, own, std)
        if own is None:
            self.target_flag = Embedding(2, gene_dim, init_std=std)
        if config.response_rank:
            vector_dim = config.gene_vector_dim or gene_dim
            self.response = Response(
                config.num_genes, vector_dim, config.vocab_size, config.response_rank, own, std
            )

    def _beside(self, time: Tensor, conditions: Conditions) -> Tensor:
        """Return [C, conditions, D]: what stands beside each cell's latents."""
        parts = [self.time_embedding(time.flatten())]
        for part in (conditions.target, conditions.technical_batch):
            if part is not None:
                of_cells = part if part.ndim == 3 else part.unsqueeze(1)
                parts.append(of_cells.expand(*time.shape, -1).flatten(end_dim=1))
        return torch.stack([part.float() for part in parts], dim=1)

    def _histogram(self, control_set: Tensor | None, rows: int) -> Tensor:
        """Return [B, N, bins]: in how many controls each gene has each token; zeros without controls."""
        config = self.config
        shape = (rows, config.num_genes, config.num_control_tokens)
        counts = torch.zeros(shape, device=self.head.bias.device)
        if control_set is None:
            return counts
        self._check_width(control_set, "control")
        controls = control_set if control_set.ndim == 3 else control_set.unsqueeze(1)
        place = controls.transpose(1, 2)  # [B, N, C]
        return counts.scatter_add_(2, place.clamp(min=0), (place >= 0).to(counts.dtype))

    def _context(self, control_set: Tensor | None, genes: Tensor, target: Tensor | None, rows: int) -> Tensor:
        """Return [B, L, D], the controls compressed; without controls, what is learned for that case."""
        assert self.control_encoder is not None
        config, values = self.config, self.control_value_embedding or self.value_embedding
        if control_set is None:
            stand_in = torch.full((1, 1), config.num_control_tokens, device=genes.device)
            return self.control_encoder(self.cell_encoder(stand_in, genes[:1], None, values), rows)
        controls = control_set if control_set.ndim == 3 else control_set.unsqueeze(1)
        cells = torch.where(controls < 0, config.num_control_tokens, controls).flatten(end_dim=1)
        condition = None if target is None else _for_cells(target, controls.shape)
        latents = self._run(self.cell_encoder, cells, genes, condition, values)  # [B * C, M, D]
        in_sets = latents.unflatten(0, controls.shape[:2]).flatten(1, 2)  # [B, C * M, D]
        return self._run(self.control_encoder, in_sets)

    def _targets(self, targets: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vector [B, D] of targets [B, P], and the queries [B, N, G] marked at the targets."""
        assert self.target_embedding is not None
        vector = self.target_embedding(targets, queries)
        if self.target_flag is None:
            return vector, queries
        is_target = torch.zeros(queries.shape[:2], dtype=torch.int64, device=queries.device)
        is_target = is_target.scatter_add(1, targets.clamp(min=0), (targets >= 0).long()).clamp(max=1)
        return vector, queries + self.target_flag(is_target)

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.config.activation_checkpointing and self.training:
            return self._factory.checkpoint(block, *arguments)
        return block(*arguments)

    def _check_width(self, tokens: Tensor, name: str) -> None:
        if tokens.shape[-1] != self.config.num_genes:
            raise ModelError(
                f"num_genes is {self.config.num_genes}, but a batch has {name} of shape {list(tokens.shape)}, whose "
                "last dimension is the genes"
            )


def _for_cells(of_sets: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat what sets [B, ...] have (or one for all) for each of their S cells: [B * S, ...]; `shape` is (B, S, N)."""
    rest = [-1] * (of_sets.ndim - 1)
    return of_sets.unsqueeze(1).expand(shape[0], shape[1], *rest).flatten(end_dim=1)
