import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from data.errors import DataError
from data.loader import DrawKey, StepLoader
from data.map_style import MapStyleSource
from data.order import GlobalOrder
from data.stream import StreamLoader

DRAW = DrawKey(seed=1, phase=0, epoch=0)


class Noisy(Dataset):
    """Augments with every global random state there is, as data sets of users do."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = [random.random(), float(np.random.rand()), float(torch.rand(()))]
        return {"tokens": torch.tensor([index]), "noise": torch.tensor(noise)}


class NoisyBatches(Noisy):
    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        assert all(type(index) is int for index in indices)
        return [self[index] for index in indices]


def fetch(dataset: Dataset, rows: list[int], draw: DrawKey = DRAW) -> dict[str, torch.Tensor]:
    return MapStyleSource(dataset).fetch(np.array(rows), draw)


def test_samples_are_collated_in_the_order_of_the_rows():
    batch = fetch(Noisy(), [7, 3, 49])
    assert batch["tokens"].tolist() == [[7], [3], [49]]
    assert len(MapStyleSource(Noisy())) == 50


@pytest.mark.parametrize("dataset", [Noisy(), NoisyBatches()])
def test_augmentation_depends_on_the_draw_and_the_rows_alone(dataset: Dataset):
    first = fetch(dataset, [4, 5])
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    assert torch.equal(first["noise"], fetch(dataset, [4, 5])["noise"])
    for other in (DRAW._replace(seed=2), DRAW._replace(phase=1), DRAW._replace(epoch=1)):
        assert not (first["noise"] == fetch(dataset, [4, 5], other)["noise"]).any()


def test_a_samples_augmentation_does_not_depend_on_its_batch():
    whole = fetch(Noisy(), [4, 5, 6])
    assert torch.equal(whole["noise"][2], fetch(Noisy(), [6])["noise"][0])
    assert len(whole["noise"].unique()) == 9


@pytest.mark.parametrize("dataset", [Noisy(), NoisyBatches()])
def test_the_global_random_states_are_put_back(dataset: Dataset):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = (random.random(), float(np.random.rand()), float(torch.rand(())))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    fetch(dataset, [1, 2, 3])
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected


def test_the_random_states_are_put_back_after_an_error():
    class Broken(Noisy):
        def __getitem__(self, index: int) -> dict[str, Any]:
            torch.rand(())
            raise RuntimeError("broken")

    torch.manual_seed(1)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="broken"):
        fetch(Broken(), [0])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_collate_function_is_seeded_too():
    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        return {"tokens": torch.stack([sample["tokens"] for sample in samples]), "noise": torch.rand(3)}

    source = MapStyleSource(Noisy(), collate)
    first, second = (source.fetch(np.array([1, 2]), DRAW) for _ in range(2))
    assert torch.equal(first["noise"], second["noise"])


def test_a_batch_that_is_a_tensor_holds_the_tokens():
    source = MapStyleSource(list(torch.arange(20).view(10, 2)))
    assert source.fetch(np.array([3, 0]), DRAW)["tokens"].tolist() == [[6, 7], [0, 1]]


def test_a_users_loader_gives_every_sample_once_over_all_ranks():
    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        return {"tokens": torch.stack([sample[0] for sample in samples])}

    user = DataLoader(TensorDataset(torch.arange(50)), batch_size=4, shuffle=True, collate_fn=collate)
    seen = []
    for rank in range(3):
        source = MapStyleSource(user.dataset, user.collate_fn)
        order = GlobalOrder(len(source), seed=0, phase=0)
        loader = StepLoader(source, order, draw_seed=0, phase=0, global_batch_size=24, micro_batch_size=4,
                            rank=rank, world_size=3)  # fmt: skip
        for step in loader.steps(0):
            seen += [cell for micro in step if micro.num_cells for cell in micro.batch["tokens"].tolist()]
    assert sorted(seen) == list(range(50))


def test_the_fingerprint_names_class_length_and_what_the_data_set_says_itself():
    assert MapStyleSource(Noisy()).fingerprint().endswith("Noisy[50]")
    dataset: Any = Noisy()
    dataset.fingerprint = lambda: "split-3"
    assert MapStyleSource(dataset).fingerprint().endswith("Noisy[50]:split-3")
    stream: Any = SimpleNamespace(loader=SimpleNamespace(dataset=dataset))
    assert StreamLoader.fingerprint(stream) == "Noisy:split-3"
    dataset.fingerprint = lambda: 3
    with pytest.raises(DataError, match=r"Noisy.fingerprint\(\) returns int; it must return text"):
        MapStyleSource(dataset).fingerprint()
