"""What a loss returns."""

from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    """Hold a loss as a sum and the weight that it is divided by after both are summed over all ranks.

    Attributes:
        sum: 0-d tensor, the summed loss with its graph.
        weight: what `sum` counts (masked positions, tokens, cells); must equal what `loss_weight(batch)` said.
        metrics: further 0-d tensors by name, each a sum over the same weight. One that only some batches have is
            recorded as the mean over those.
    """

    sum: Tensor
    weight: Tensor | float
    metrics: dict[str, Tensor]
