"""Tiny sets of perturbed cells, for tests that train a perturbation transformer; `toy_perturbations.set_loader`."""

import torch
from torch.utils.data import DataLoader, Dataset

NUM_GENES, NUM_TOKENS, NUM_TARGETS = 12, 4, 5


class Sets(Dataset):
    """Sets whose cells are their controls moved by one token at genes that the target decides; or cells alone."""

    def __init__(self, num_sets: int, seed: int, has_conditions: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        effects = torch.randint(2, (NUM_TARGETS, NUM_GENES), generator=torch.Generator().manual_seed(99))
        self.control = torch.randint(NUM_TOKENS - 1, (num_sets, 3, NUM_GENES), generator=generator)
        self.target = torch.randint(NUM_TARGETS, (num_sets,), generator=generator)
        self.tokens = self.control + effects[self.target].unsqueeze(1)
        self.has_conditions = has_conditions

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # The state of torch's generator is a function of seed, phase, epoch and row here.
        sample = {"tokens": self.tokens[index], "noise_seed": torch.randint(1 << 62, ())}
        if not self.has_conditions:
            return {**sample, "tokens": self.tokens[index, 0]}
        return {**sample, "control": self.control[index], "target_gene_idx": self.target[index]}


def set_loader(num_sets: int = 24, batch_size: int = 2, seed: int = 0, has_conditions: bool = True):
    loader = DataLoader(Sets(num_sets, seed, has_conditions), batch_size=batch_size, shuffle=True)
    loader.val_dataset = Sets(8, seed + 1, has_conditions)
    return loader
