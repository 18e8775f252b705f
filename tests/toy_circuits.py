"""A model of circuits that is small enough for a test of the whole trainer, and says what it was built with."""

from dataclasses import dataclass

from torch import nn


@dataclass
class CircuitToyConfig:
    vocab_size: int = 0
    num_qubits: int = 0
    num_prompts: int = 0
    gate_pool: tuple = ()
    prompts: tuple = ()
    has_unitary: bool = False


class CircuitToy(nn.Module):
    """Predict how many tokens of each kind a circuit has, from its prompt."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.counts = nn.Embedding(config.num_prompts, config.vocab_size)

    def compute_loss(self, batch):
        found = nn.functional.one_hot(batch["tokens"].abs(), self.config.vocab_size).sum(dim=(1, 2))
        return (self.counts(batch["prompt_idx"]) - found).float().square().mean()
