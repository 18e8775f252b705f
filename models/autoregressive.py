"""Causal transformer over the genes of a cell, trained to predict the next gene and its expression; it generates cells.

Position t sees the tokens up to t, with their expression, and predicts token t + 1: first which gene it is, then, told
the gene, which expression it has. With a cls token in front the first gene is predicted too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import costs
from models.cell_layout import PackedCells, PaddedCells, cell_layout
from models.cell_model import PAD, CellModel, needed, num_real_tokens, places_of
from models.errors import ModelError
from models.masked_heads import IGNORED_LABEL, NUM_SPECIAL_TOKENS, GeneHead, ValueHead
from models.model_config import ModelConfig, Pooling
from models.outputs import LossOutput


@dataclass(frozen=True)
class AutoregressiveConfig(ModelConfig):
    """Hold the sizes and choices of an `AutoregressiveModel`: those of `models.model_config.ModelConfig`, and its own.

    Attributes:
        n_bins: expression bins to read and predict; None reads and predicts continuous values. The tokenizer needs
            `n_bins` too: batches must have bins.
        use_depth: tell the model each cell's log1p(total), which is known of a whole cell: generation needs it then.
        pooling: what `encode` returns: with `cls` the hidden state of a cell's last token, the only one that has seen
            all of them; with `mean` the mean over genes.
        gene_loss_weight: weight of the next gene's loss; 0 builds no gene head.
        expression_loss_weight: weight of the loss of the next gene's expression; 0 builds no value head.
        tie_gene_head: let the gene head share the token embedding's weight.
    """

    use_depth: bool = False
    pooling: Pooling = "mean"
    gene_loss_weight: float = 1.0
    expression_loss_weight: float = 1.0
    tie_gene_head: bool = True

    def wrong_fields(self) -> Iterable[str]:
        """Say what is wrong, a field or a pair of fields at a time."""
        yield from super().wrong_fields()
        yield from self.wrong_loss_weights()


class AutoregressiveOutput(NamedTuple):
    """Hold what a forward pass returns.

    Attributes:
        hidden: [B, N, D] hidden states after the final norm; [1, T, D] of a packed batch.
        positions: [M] the flat position of each token that is predicted, in a cell's order.
        gene_logits: [M, V] which gene stands there; None without a gene head.
        value_logits: [M, n_bins], or [M] for continuous values: the expression of the gene that stands there; None
            without a value head.
        gene_loss: the gene head's summed loss and its right guesses, where it was asked for in place of the logits.
    """

    hidden: Tensor
    positions: Tensor
    gene_logits: Tensor | None
    value_logits: Tensor | None
    gene_loss: tuple[Tensor, Tensor] | None = None


class GeneratedCells(NamedTuple):
    """Hold what `generate` drew for each prompt, in the order in which it was drawn.

    Attributes:
        genes: [B, num_genes] token ids.
        expression: [B, num_genes] their bins, or values of a continuous model; None of one without a value head.
    """

    genes: Tensor
    expression: Tensor | None


class AutoregressiveModel(CellModel):
    """Causal transformer that predicts the next gene of a cell, and that gene's expression.

    The gene head sees the hidden state of the position before; the value head that, and the gene whose expression it
    predicts. Both see the technical batch.
    """

    head_names = ("technical_batch_embedding", "gene_head", "value_head")
    is_causal: ClassVar[bool] = True

    def __init__(self, config: AutoregressiveConfig, *, has_heads: bool = True) -> None:
        """Draw the weights, every module its own."""
        super().__init__(config, has_heads=has_heads)
        dim, std = config.hidden_dim, config.init_std
        self.technical_batch_embedding = self._build_technical_batches(dim)
        self.transformer = self._build_transformer()
        self.gene_head = None
        if has_heads and config.gene_loss_weight > 0:
            self.gene_head = GeneHead(
                dim, config.vocab_size, tied=config.tie_gene_head, init_std=std, sees_cell=False
            )
        if has_heads and config.expression_loss_weight > 0:
            self.value_head = ValueHead(dim, config.vocab_size, config.n_bins or 1, init_std=std)

    def forward(self, batch: dict[str, Any], *, with_gene_loss: bool = False) -> AutoregressiveOutput:
        """Return hidden states of all tokens and the logits of every token that has one before it in its cell.

        Args:
            batch: as the loader yields it, without masking.
            with_gene_loss: return the gene head's loss in place of its logits, which are large.
        """
        self._need_heads()
        layout = cell_layout(batch)
        with self._factory.region():
            hidden = self._hidden_states(batch, layout)  # [B, N, D]
            offset = self._technical_vectors(batch)  # [B, D]
        before, is_meant = places_of(_precedes_gene(batch, layout), num_real_tokens(batch, layout))
        asked = hidden.flatten(end_dim=1)[before]  # [M, D]
        if offset is not None:
            asked = asked + offset[layout.cells_of(before)]
        genes = _next(batch["tokens"])[before]
        positions = before + 1
        if is_meant is not None:
            positions = positions.masked_fill(~is_meant, -1)
        gene_result = value_logits = None
        if self.gene_head is not None:
            labels = genes.masked_fill(positions < 0, IGNORED_LABEL) if with_gene_loss else None
            gene_result = self.gene_head(asked, None, None, self.token_embedding.weight, labels)
        if self.value_head is not None:
            value_logits = self._expression_logits(asked, genes)
        if with_gene_loss:
            return AutoregressiveOutput(hidden, positions, None, value_logits, gene_result)
        return AutoregressiveOutput(hidden, positions, gene_result, value_logits)

    def compute_loss(self, batch: dict[str, Any]) -> LossOutput:
        """Return the summed loss over the predicted tokens, with accuracy and each loss as metrics."""
        output = self(batch, with_gene_loss=True)
        is_meant = output.positions >= 0
        total = output.hidden.new_zeros((), dtype=torch.float32)
        metrics: dict[str, Tensor] = {}
        if output.gene_loss is not None:
            gene_loss, num_correct = output.gene_loss
            total = total + self.config.gene_loss_weight * gene_loss
            metrics["gene_loss"] = gene_loss.detach()
            metrics["gene_accuracy"] = num_correct
        if output.value_logits is not None:
            key = "values" if self.config.n_bins is None else "bins"
            expression = needed(batch, key, "give the tokenizer n_bins, or set expression_loss_weight: 0")
            truth = expression.flatten()[output.positions.clamp(min=0)]
            value_loss, value_metrics = self._value_loss(output.value_logits, truth, is_meant)
            total = total + self.config.expression_loss_weight * value_loss
            metrics |= value_metrics
        return LossOutput(total, is_meant.sum(), metrics)

    def loss_weight(self, batch: dict[str, Any]) -> float:
        """Return the number of predicted tokens, over which the loss is averaged."""
        if "masked_index" in batch:
            raise ModelError(
                "an autoregressive model predicts the next gene and needs data without masking: leave `masking` out"
            )
        self.check_cells(batch)
        return float(_precedes_gene(batch, cell_layout(batch)).sum())

    def check_cells(self, batch: dict[str, Any]) -> None:
        """Raise where padding stands before a token: causal attention would look at it."""
        mask = batch.get("attention_mask")
        if mask is not None and not mask.is_cuda and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ModelError(
                "a batch has padding before a token of a cell; causal attention needs it at the end of rows"
            )

    @torch.no_grad()
    def generate(
        self,
        prompt_tokens: Tensor,
        num_genes: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        prompt_expression: Tensor | None = None,
        depth: Tensor | None = None,
        batch_idx: Tensor | None = None,
    ) -> GeneratedCells:
        """Draw genes that follow a prompt, one after the other, each with its expression.

        No gene of a cell is drawn twice, prompt included, and special tokens never. Each gene costs a forward pass over
        all tokens before it.

        Args:
            prompt_tokens: [B, P] token ids that cells begin with: a cls token, genes, or both; 0 fills shorter ones up.
            num_genes: genes to draw for each cell.
            temperature: of the distributions that genes and bins are drawn from; 0 takes the likeliest.
            top_k: draw among the likeliest genes alone; None: among all.
            seed: of the draws.
            prompt_expression: [B, P] bins (or values) of the prompt; None lets the model give the prompt's genes
                expression, which needs a token before each of them.
            depth: [B] log1p of the cells' totals, for a model with `use_depth`.
            batch_idx: [B] technical batches, for a model that knows them.

        Raises:
            ModelError: more genes are asked for than there are, or the model lacks what drawing needs.
        """
        self._need_heads()
        lengths = self._check_prompt(prompt_tokens, num_genes, temperature, top_k, prompt_expression)
        device = self.token_embedding.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        lengths = lengths.to(device)
        width = int(lengths.max()) + num_genes
        tokens, expression, known = self._begun(prompt_tokens.to(device), prompt_expression, lengths, width)
        is_taken = torch.zeros(len(tokens), self.config.vocab_size, dtype=torch.bool, device=device)
        is_taken[:, :NUM_SPECIAL_TOKENS] = True
        is_taken.scatter_(1, tokens, True)
        extra = {"depth": depth, "batch_idx": batch_idx}
        extra = {name: value.to(device) for name, value in extra.items() if value is not None}
        was_training = self.training
        self.eval()
        try:
            for end in range(1, width):
                seen = torch.arange(end, device=device) < (lengths + num_genes)[:, None]
                batch = {"tokens": tokens[:, :end], "attention_mask": seen, **extra}
                batch["values" if self.config.n_bins is None else "bins"] = expression[:, :end]
                asked = self._last_states(batch, end)
                is_drawn = (end >= lengths) & (end < lengths + num_genes)
                if bool(is_drawn.any()):
                    assert self.gene_head is not None
                    logits = self.gene_head(asked, None, None, self.token_embedding.weight)
                    drawn = _draw(logits.masked_fill(is_taken, -torch.inf), temperature, generator, top_k)
                    tokens[:, end] = torch.where(is_drawn, drawn, tokens[:, end])
                    is_taken.scatter_(1, tokens[:, end : end + 1], True)
                if self.value_head is not None:
                    told = self._drawn_expression(asked, tokens[:, end], temperature, generator)
                    is_free = (tokens[:, end] >= NUM_SPECIAL_TOKENS) & ~known[:, end]
                    expression[:, end] = torch.where(is_free, told, expression[:, end])
        finally:
            self.train(was_training)
        columns = lengths[:, None] + torch.arange(num_genes, device=device)
        found = expression.gather(1, columns) if self.value_head is not None else None
        return GeneratedCells(tokens.gather(1, columns), found)

    def training_flops(self, lengths: Sequence[int], num_masked: int) -> float:
        """Return the operations of a forward and a backward pass over cells of these lengths in tokens."""
        return costs.autoregressive_flops(self.config, lengths)

    def activation_bytes(
        self, *, num_tokens: int, num_cells: int, num_masked: int, is_mixed: bool
    ) -> costs.Activations:
        """Return the bytes that a forward pass over one micro-batch keeps (see models/costs.py)."""
        return costs.autoregressive_activations(
            self.config, num_tokens=num_tokens, num_cells=num_cells, is_mixed=is_mixed
        )

    def _pooled(self, hidden: Tensor, batch: dict[str, Any], layout: PaddedCells | PackedCells) -> Tensor:
        if self.config.pooling == "cls":
            return layout.last(hidden)
        return super()._pooled(hidden, batch, layout)

    def _expression_logits(self, asked: Tensor, genes: Tensor) -> Tensor:
        """Return [M, n_bins], or [M], for the states before some tokens and the genes that these are."""
        assert isinstance(self.value_head, ValueHead)
        logits = self.value_head(asked, asked, None, self.token_embedding(genes), genes)
        return logits.squeeze(-1) if self.config.n_bins is None else logits

    def _begun(
        self, prompt: Tensor, given: Tensor | None, lengths: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens and expression [B, width] that begin with the prompt's, and whose expression is given."""
        tokens = F.pad(prompt, (0, width - prompt.shape[1])) if width > prompt.shape[1] else prompt[:, :width]
        kind = torch.long if self.config.n_bins else torch.float
        expression = torch.zeros(tokens.shape, dtype=kind, device=tokens.device)
        if given is None:
            return tokens, expression, torch.zeros_like(tokens, dtype=torch.bool)
        given = given.to(expression)[:, :width]
        expression[:, : given.shape[1]] = given
        return tokens, expression, torch.arange(width, device=tokens.device) < lengths[:, None]

    def _last_states(self, batch: dict[str, Any], end: int) -> Tensor:
        """Return [B, D] the hidden states after `end` tokens, as the heads see them."""
        layout = cell_layout(batch)
        with self._factory.region():
            hidden, offset = self._hidden_states(batch, layout), self._technical_vectors(batch)
        return hidden[:, end - 1] if offset is None else hidden[:, end - 1] + offset

    def _drawn_expression(
        self, asked: Tensor, genes: Tensor, temperature: float, generator: torch.Generator
    ) -> Tensor:
        logits = self._expression_logits(asked, genes)
        if self.config.n_bins is None:
            return logits.float().clamp(min=0)
        return _draw(logits, temperature, generator, None)

    def _check_prompt(
        self,
        tokens: Tensor,
        num_genes: int,
        temperature: float,
        top_k: int | None,
        expression: Tensor | None,
    ) -> Tensor:
        """Return the prompts' lengths [B], or say what generation cannot do with them."""
        self._check_can_generate()
        self._check_prompt_tokens(tokens, expression)
        if temperature < 0 or num_genes < 1 or (top_k is not None and top_k < 1):
            raise ModelError(
                f"temperature {temperature} must not be negative, num_genes {num_genes} and top_k {top_k} at least 1"
            )
        lengths = (tokens != PAD).sum(dim=1)
        num_known = int((tokens >= NUM_SPECIAL_TOKENS).sum(dim=1).max())
        room = self.config.vocab_size - NUM_SPECIAL_TOKENS - num_known
        if num_genes > room:
            raise ModelError(f"num_genes is {num_genes}, but only {room} genes are not in the longest prompt")
        longest, limit = int(lengths.max()) + num_genes, self.config.max_seq_len
        if limit is not None and longest > limit:
            raise ModelError(f"prompt and num_genes make {longest} tokens; max_seq_len is {limit}")
        return lengths

    def _check_can_generate(self) -> None:
        """Raise where the model lacks a head that drawing needs."""
        if self.gene_head is None:
            raise ModelError(
                "generate draws genes, and gene_loss_weight 0 leaves the model without a gene head"
            )
        if self.value_head is None and self.config.use_expression_values:
            raise ModelError(
                "the model reads expression and has no value head to give genes theirs: generate needs a model with an "
                "expression_loss_weight above 0, or one with use_expression_values: false"
            )

    def _check_prompt_tokens(self, tokens: Tensor, expression: Tensor | None) -> None:
        """Raise where no cell can begin with the tokens of a prompt, or with their expression."""
        if tokens.ndim != 2 or not tokens.numel() or bool((tokens[:, 0] == PAD).any()):
            raise ModelError(
                f"prompt_tokens is of shape {list(tokens.shape)}; it must be [cells, tokens], each row beginning with "
                "a cls token or a gene"
            )
        is_token = tokens != PAD
        is_broken = bool((is_token[:, 1:] & ~is_token[:, :-1]).any())
        if is_broken or int(tokens.min()) < 0 or int(tokens.max()) >= self.config.vocab_size:
            raise ModelError(
                "prompt_tokens must have its padding at the end of rows, and token ids of at least 0 and below "
                f"vocab_size {self.config.vocab_size}"
            )
        if expression is not None and expression.shape != tokens.shape:
            raise ModelError(
                f"prompt_expression is of shape {list(expression.shape)}, prompt_tokens of {list(tokens.shape)}"
            )
        if (
            expression is None
            and self.config.use_expression_values
            and bool((tokens[:, 0] >= NUM_SPECIAL_TOKENS).any())
        ):
            raise ModelError(
                "a prompt begins with a gene, whose expression nothing before it predicts: give prompt_expression, or "
                "begin with a cls token as in training"
            )


def _precedes_gene(batch: dict[str, Any], layout: PaddedCells | PackedCells) -> Tensor:
    """Return [B, N] bool: tokens that a gene of the same cell follows."""
    is_followed = layout.has_next()
    return is_followed & (_next(batch["tokens"]).view_as(is_followed) >= NUM_SPECIAL_TOKENS)


def _next(x: Tensor) -> Tensor:
    """Return, flat, what stands at the next place; the last one's is not meant."""
    return x.flatten().roll(-1)


def _draw(logits: Tensor, temperature: float, generator: torch.Generator, top_k: int | None) -> Tensor:
    """Draw one class of each row."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)
