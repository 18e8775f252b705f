"""A tiny model and tiny loaders of a user's own, for tests that train; named in configs as `toy.<name>`."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from models.outputs import LossOutput

NUM_TOKENS = 6

_pauses: dict[str, int] = {}


def pause_at(place):
    """Say so and wait where $TOY_PAUSE ("PLACE:NTH:SECONDS") names this place, for a test that stops rank 0 there."""
    wanted, nth, seconds = (os.environ.get("TOY_PAUSE") or ":0:0").split(":")
    if place != wanted or os.environ.get("RANK", "0") != os.environ.get("TOY_PAUSE_RANK", "0"):
        return
    _pauses[place] = _pauses.get(place, 0) + 1
    if _pauses[place] == int(nth):
        print(f"toy: {place}", flush=True)
        time.sleep(float(seconds))


if (os.environ.get("TOY_PAUSE") or "").startswith("writing:"):
    import trainer.checkpoint

    _write_tree = trainer.checkpoint.write_tree

    def _write_slowly(sink, tree):
        pause_at("writing")
        _write_tree(sink, tree)

    trainer.checkpoint.write_tree = _write_slowly


@dataclass
class ToyConfig:
    width: int = 8
    dropout: float = 0.0
    n_technical_batches: int = 0


class ToyModel(nn.Module):
    """Predict the sum of a cell's tokens; writes which cells each rank sees to $TOY_LOG.<rank> where that is set."""

    def __init__(self, config=None, **arguments):
        super().__init__()
        self.config = config or ToyConfig(**arguments)
        pause_at("building")
        self.embedding = nn.Embedding(32, self.config.width)
        self.batch_embedding = nn.Embedding(max(1, self.config.n_technical_batches), self.config.width)
        self.body = nn.Sequential(
            nn.Linear(self.config.width, self.config.width), nn.GELU(), nn.Dropout(self.config.dropout)
        )
        self.head = nn.Linear(self.config.width, 1)

    def forward(self, batch):
        if self.training:
            pause_at("forward")
        if self.training and "TOY_LOG" in os.environ and "cell_index" in batch:
            with open(f"{os.environ['TOY_LOG']}.{os.environ.get('RANK', '0')}", "a") as file:
                file.write(json.dumps(batch["cell_index"].tolist()) + "\n")
        hidden = self.embedding(batch["tokens"]).mean(dim=1) + self.batch_embedding(batch["batch_idx"])
        return self.head(self.body(hidden)).squeeze(-1)

    def compute_loss(self, batch):
        return (self(batch) - batch["tokens"].float().mean(dim=1) / 10).square().mean()


class ToyCells(Dataset):
    def __init__(self, num_cells=48, seed=0, unique_batches=None, seconds_per_cell=0.0):
        self.seconds_per_cell = seconds_per_cell
        self.tokens = torch.randint(
            0, 32, (num_cells, NUM_TOKENS), generator=torch.Generator().manual_seed(seed)
        )
        if unique_batches is not None:
            self.unique_batches = unique_batches

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        time.sleep(self.seconds_per_cell)
        return {"tokens": self.tokens[index], "cell_index": torch.tensor(index)}


class ValidationCells(ToyCells):
    def __getitem__(self, index):
        pause_at("validating")
        return super().__getitem__(index)


class NoisyCells(ToyCells):
    """Augment with the global random state, as users' data sets do."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "tokens": (sample["tokens"] + torch.randint(0, 3, (NUM_TOKENS,))) % 32}


class StreamedCells(IterableDataset):
    def __init__(self, num_cells=48, first=0, every=1):
        self.cells, self.first, self.every = ToyCells(num_cells), first, every

    def __iter__(self):
        for index in range(self.first, len(self.cells), self.every):
            yield self.cells[index]


def map_loader(
    num_cells=48,
    batch_size=4,
    shuffle=True,
    seed=0,
    noisy=False,
    num_workers=0,
    validation=True,
    seconds_per_cell=0.0,
):
    dataset = (NoisyCells if noisy else ToyCells)(num_cells, seed, seconds_per_cell=seconds_per_cell)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, num_workers=num_workers)
    if validation:
        loader.val_dataset = ValidationCells(10, seed + 1)
    return dataset, loader


def tensor_loader(num_cells=24, batch_size=4):
    """Yield plain tensors [B, N]."""
    return DataLoader([row for row in ToyCells(num_cells).tokens], batch_size=batch_size, shuffle=True)


def stream_loader(num_cells=48, batch_size=4, num_workers=0, validation=False):
    loader = DataLoader(StreamedCells(num_cells), batch_size=batch_size, num_workers=num_workers)
    if validation:
        loader.val_dataset = ValidationCells(10)
    return loader


def sharded_loader(num_cells=48, batch_size=4, *, rank, world_size):
    return DataLoader(StreamedCells(num_cells, rank, world_size), batch_size=batch_size)


def weighted_loader(num_cells=48, batch_size=4):
    sampler = WeightedRandomSampler([1.0 + i % 3 for i in range(num_cells)], num_cells)
    return DataLoader(ToyCells(num_cells), batch_size=batch_size, sampler=sampler)


def exploding_loss(model, batch):
    raise AssertionError("not reached")


class SometimesNan:
    """Give a non-finite loss at the steps it is told."""

    def __init__(self, steps):
        self.steps = set(steps)

    def compute_loss(self, model, batch, phase_step):
        loss = model.compute_loss(batch)
        return loss * float("nan") if phase_step in self.steps else loss


class WithStatistics(ToyModel):
    """Keep running statistics of the cells in buffers, of which one acts in training too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(self.config.width)
        self.register_buffer("level", torch.zeros(()))

    def forward(self, batch):
        hidden = self.norm(self.embedding(batch["tokens"]).mean(dim=1))
        if self.training:
            self.level.lerp_(batch["tokens"].float().mean() / 10, 0.3)
        return self.head(self.body(hidden)).squeeze(-1) + self.level


class LearnedScale(nn.Module):
    """A loss of the model's output with weights that train, one that does not, a level and a count of its passes."""

    def __init__(self, num_offsets=2, level=10.0, power=2):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.offset = nn.Parameter(torch.full((num_offsets,), 0.3), requires_grad=False)
        self.register_buffer("level", torch.tensor(level))
        self.register_buffer("passes", torch.zeros(()))
        self.power = power

    def forward(self, output, batch):
        if self.training:
            self.passes += 1
        guesses = output * self.scale.mean() + self.offset.sum()
        return (guesses - batch["tokens"].float().mean(dim=1) / self.level).abs().pow(self.power).mean()


class RareMetrics:
    """Log where a batch comes from: what its rank is, 5 on rank 1 alone, and 7 where it has cell 0."""

    def loss_weight(self, batch):
        return float(len(batch["tokens"]))

    def compute_loss(self, model, batch):
        rank, weight = os.environ.get("RANK", "0"), self.loss_weight(batch)
        metrics = {"rare": 5.0} if rank == "1" else {}
        metrics |= {f"rank_{rank}": float(rank) + 1.0, "everywhere": 3.0}
        metrics |= {"with_cell_0": 7.0} if (batch["cell_index"] == 0).any() else {}
        sums = {name: torch.tensor(value * weight) for name, value in metrics.items()}
        return LossOutput(model.compute_loss(batch) * weight, weight, sums)


def seen_cells(log: Path) -> list[list[int]]:
    """Return the cells of every forward pass that the ranks logged, rank after rank."""
    files = sorted(log.parent.glob(f"{log.name}.*"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def named_loader(names, num_cells=48, batch_size=4):
    """Tell technical batches by name: the data set lists them, and each batch names its cells'."""
    dataset = ToyCells(num_cells, unique_batches=names)

    def collate(samples):
        batch = torch.utils.data.default_collate(samples)
        return {**batch, "batch_name": [names[int(index) % len(names)] for index in batch["cell_index"]]}

    return dataset, DataLoader(dataset, batch_size=batch_size, shuffle=True, collate_fn=collate)


def wrong_loader(batch_size=4):
    return DataLoader([{"input": torch.zeros(2)} for _ in range(8)], batch_size=batch_size)


class SometimesInfinite(ToyModel):
    """Every second step, one rank's loss is not finite."""

    def __init__(self):
        super().__init__()
        self.passes = 0

    def compute_loss(self, batch):
        loss = super().compute_loss(batch)
        if not self.training:
            return loss
        self.passes += 1
        is_second_step = (self.passes - 1) // 6 % 2 == 1
        is_last_rank = os.environ.get("RANK") == "1"
        return loss + (float("inf") if is_second_step and is_last_rank and self.passes % 6 == 3 else 0.0)


class OneMatrix(nn.Module):
    """A model that an optimizer of matrices alone can train."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 4))

    def compute_loss(self, batch):
        return self.weight[batch["tokens"]].square().mean()


class NormalisedMatrices(torch.optim.SGD):
    """Steps by a gradient of norm 1: what a stretch gets depends on the whole."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= parameter.grad.norm() + 1e-8
        return super().step(closure)


class StartsItself(ToyModel):
    """Draws its modules' weights after they are built."""

    def __init__(self, start):
        super().__init__()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if start == "torch_nn_init":
                    nn.init.xavier_uniform_(module.weight)
                elif start == "in_place":
                    with torch.no_grad():
                        module.weight.normal_(0.0, 0.3)
                else:
                    module.weight.data.normal_(0.0, 0.3)


class LooksAtItself(ToyModel):
    """Looks at a value of its own while it is built."""

    def __init__(self):
        super().__init__()
        assert self.head.bias.abs().sum().item() >= 0


class LooksAtValues(torch.optim.SGD):
    """Steps by what a value is."""

    def step(self, closure=None):
        for group in self.param_groups:
            if any(parameter.grad.sum().item() > 0 for parameter in group["params"]):
                super().step(closure)
