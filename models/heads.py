"""The head of a fine-tuned model: from a cell's embedding to classes or numbers."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Linear


class TaskHead(nn.Module):
    """Dropout and a linear layer; with a hidden width a linear layer and GELU before them."""

    def __init__(
        self, dim: int, num_outputs: int, *, hidden_dim: int | None, dropout: float, init_std: float
    ) -> None:
        """Draw the weights."""
        super().__init__()
        self.hidden = None if hidden_dim is None else Linear(dim, hidden_dim, init_std=init_std)
        self.dropout = nn.Dropout(dropout)
        self.output = Linear(dim if hidden_dim is None else hidden_dim, num_outputs, init_std=init_std)

    def forward(self, cells: Tensor) -> Tensor:
        """Return [B, outputs] for embeddings [B, D]."""
        if self.hidden is not None:
            cells = F.gelu(self.hidden(cells))
        return self.output(self.dropout(cells))
