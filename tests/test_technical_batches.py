from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from data.errors import DataError
from data.technical_batches import (
    BatchIndexer,
    attach_mapping,
    discover_names,
    merge_names,
    padded_count,
    row_names,
)


class Named(Dataset):
    def __init__(self, size=4, **attributes):
        self.size = size
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return torch.tensor([index])


def with_obs(names):
    return Named(len(names), adata=SimpleNamespace(obs=pd.DataFrame({"batch": pd.Categorical(names)})))


def test_names_come_from_unique_batches_before_adata():
    dataset = with_obs(["x", "y"])
    dataset.unique_batches = ["b", "a"]
    assert discover_names(dataset) == ["a", "b"]


def test_names_come_from_adata_obs_batch():
    assert discover_names(with_obs(["y", "x", "y"])) == ["x", "y"]


def test_names_are_found_through_wrappers_and_loaders():
    first, second = Named(unique_batches=["a"]), Named(unique_batches=["b"])
    wrapped = ConcatDataset([Subset(first, [0, 1]), second])
    assert discover_names(DataLoader(wrapped)) == ["a", "b"]


def test_data_without_names_has_none():
    assert discover_names(Named(), None) == []


def test_equal_names_of_two_phases_share_an_index():
    assert merge_names([["b", "a"], ["c", "b"]]) == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(("count", "padded"), [(1, 16), (16, 16), (17, 32)])
def test_the_count_is_rounded_up_to_a_multiple_of_16(count, padded):
    assert padded_count(count, 16) == padded


def test_the_map_is_attached_where_it_is_asked_for():
    seen = {}
    dataset = Named(batch_to_idx=None, set_batch_mapping=seen.update)
    collator = SimpleNamespace(batch_to_idx={})
    attach_mapping({"a": 0}, Subset(dataset, [0]), collator)
    assert dataset.batch_to_idx == {"a": 0} and collator.batch_to_idx == {"a": 0} and seen == {"a": 0}


def test_rows_keep_their_names_through_subsets_and_concatenation():
    both = ConcatDataset([Subset(with_obs(["x", "y", "z"]), [2, 0]), with_obs(["w"])])
    assert row_names(both).tolist() == ["z", "x", "w"]


def test_rows_without_names_have_none():
    assert row_names(Named()) is None


def indexer(names=("a",), mapping=None):
    return BatchIndexer(mapping or {"a": 0, "b": 1, "c": 2}, names, "p")


def test_a_tensor_becomes_tokens_with_the_phases_only_name():
    batch = indexer(["b"])(torch.zeros(3, 5))
    assert batch["tokens"].shape == (3, 5) and batch["batch_idx"].tolist() == [1, 1, 1]


def test_names_in_the_batch_become_indices():
    batch = indexer(["a", "c"])({"tokens": torch.zeros(2, 5), "batch_name": ["c", "a"]})
    assert batch["batch_idx"].tolist() == [2, 0]


def test_an_index_in_the_batch_is_kept():
    given = torch.tensor([2, 1])
    assert indexer(["a", "b", "c"])({"tokens": torch.zeros(2, 5), "batch_idx": given})["batch_idx"] is given


def test_an_index_outside_the_map_is_an_error():
    with pytest.raises(DataError, match="'batch_idx' holds 0 to 3, but the run has technical batches 0 to 2"):
        indexer()({"tokens": torch.zeros(2, 5), "batch_idx": torch.tensor([0, 3])})


def test_an_unknown_name_is_an_error():
    with pytest.raises(DataError, match="unknown technical batch 'q'; known are 'a', 'b', 'c'"):
        indexer()({"tokens": torch.zeros(1, 5), "batch_name": ["q"]})


def test_several_names_and_no_way_to_tell_a_cells_own_is_an_error():
    with pytest.raises(DataError, match="neither 'batch_idx' nor 'batch_name'"):
        indexer(["a", "b"])(torch.zeros(2, 5))


def test_names_of_the_rows_complete_a_batch():
    assert indexer(["a", "b"])(torch.zeros(2, 5), names=np.array(["b", "a"], dtype=object))[
        "batch_idx"
    ].tolist() == [1, 0]


@pytest.mark.parametrize("batch", [{"input": 1}, "text", [torch.zeros(1), torch.zeros(1)]])
def test_a_batch_of_another_shape_is_an_error(batch):
    with pytest.raises(DataError, match=r"must yield a tensor \[B, N\] or a dict with 'tokens'"):
        indexer()(batch)
