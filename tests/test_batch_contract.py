"""Whole runs on loaders of a user's own: what a factory may return, and how cells get their technical batch."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from running import newest_checkpoint, records, toy, train
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from data.errors import DataError

seen: list[dict] = []
"""What the model was given, of the test that runs."""


class Sets(Dataset):
    """Eight sets of cells: tokens [N], control [C, N], a target and the name of a technical batch."""

    def __init__(self, names):
        self.unique_batches = sorted(set(names))
        self.names = names
        self.batch_to_idx: dict[str, int] = {}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = torch.full((4,), index)
        return {
            "tokens": tokens,
            "control": tokens.repeat(3, 1),
            "target_gene_idx": index,
            "batch_name": self.names[index % len(self.names)],
        }


def collate(samples):
    batch = {
        key: torch.stack([torch.as_tensor(s[key]) for s in samples])
        for key in samples[0]
        if key != "batch_name"
    }
    return {**batch, "batch_name": [s["batch_name"] for s in samples]}


def sets(names=("lane_b", "lane_a"), subset=False, alone=False, val_names=None):
    """Return (dataset, loader), or the loader alone."""
    dataset: Dataset = Sets(list(names))
    loader = DataLoader(Subset(dataset, range(8)) if subset else dataset, batch_size=4, collate_fn=collate)
    if val_names is not None:
        loader.val_dataset = Sets(list(val_names))
    return loader if alone else (dataset, loader)


def annotated(names):
    """Return cells whose data set has no unique_batches, but an AnnData object with obs['batch']."""
    dataset = Sets(list(names))
    del dataset.unique_batches
    dataset.adata = SimpleNamespace(obs=pd.DataFrame({"batch": names}))
    return dataset, DataLoader(dataset, batch_size=4, collate_fn=collate)


def plain_tensors():
    return DataLoader(torch.arange(32).reshape(8, 4), batch_size=4)


class Objective:
    def compute_loss(self, model, tokens, control_set=None, target_gene_idx=None, batch_idx=None, step=None):
        seen.append(
            {
                "tokens": tokens,
                "control": control_set,
                "target": target_gene_idx,
                "batch": batch_idx,
                "step": step,
            }
        )
        return (model.weight * tokens.float().mean()).square()


class ObjectiveModel(nn.Module):
    """A model whose loss is its `diffusion`'s."""

    def __init__(self, n_technical_batches):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.diffusion = Objective()


def run(folder, *phases):
    seen.clear()
    names = [{"dataloader_factory": f"test_batch_contract.{f}", "dataloader_args": a} for f, a in phases]
    model = {"model_class": "test_batch_contract.ObjectiveModel"}
    return train(folder, toy(*names, model=model, micro_batch_size=4, global_batch_size=4))


def technical_batches(folder):
    saved = newest_checkpoint(folder)
    return saved.shared("run_state.safetensors")["technical_batches"]


def given(key):
    return torch.cat([torch.as_tensor(call[key]).reshape(-1) for call in seen])


@pytest.mark.parametrize("options", [{}, {"subset": True}, {"alone": True}, {"subset": True, "alone": True}])
def test_cells_keep_their_names_whatever_the_factory_returns(tmp_path, options):
    folder = run(tmp_path, ("sets", options))
    assert technical_batches(folder) == {"lane_a": 0, "lane_b": 1}
    # Even sets are of lane_b, odd ones of lane_a.
    assert torch.equal(given("batch"), 1 - given("target") % 2)


def test_the_objective_gets_tokens_controls_target_batch_and_step(tmp_path):
    run(tmp_path, ("sets", {}))
    first, second = seen
    assert [first["step"], second["step"]] == [0, 1]
    assert first["tokens"].shape == (4, 4) and first["control"].shape == (4, 3, 4)
    assert torch.equal(first["control"][:, 0], first["tokens"])
    assert sorted(given("target").tolist()) == list(range(8))


def test_names_of_an_anndata_object_are_found(tmp_path):
    folder = run(tmp_path, ("annotated", {"names": ["x", "y"] * 4}))
    assert technical_batches(folder) == {"x": 0, "y": 1}


def test_two_phases_share_the_index_of_a_name(tmp_path):
    folder = run(tmp_path, ("sets", {"names": ["b", "c"]}), ("sets", {"names": ["a", "b"]}))
    assert technical_batches(folder) == {"a": 0, "b": 1, "c": 2}
    first, second = given("batch")[:8], given("batch")[8:]
    target = given("target")
    assert torch.equal(first, 1 + target[:8] % 2)  # b, c
    assert torch.equal(second, target[8:] % 2)  # a, b


def test_data_without_names_are_one_batch_named_as_the_phase(tmp_path):
    folder = run(tmp_path, ("plain_tensors", {}))
    assert technical_batches(folder) == {"p0": 0}
    assert given("batch").tolist() == [0] * 8
    assert len(records(folder)) == 2


def test_a_name_that_only_validation_cells_have_gets_an_index_of_its_own(tmp_path):
    folder = run(tmp_path / "known", ("sets", {"val_names": ["lane_a", "lane_c"]}))
    assert technical_batches(folder) == {"lane_a": 0, "lane_b": 1, "lane_c": 2}


class Forgetful(Sets):
    """A validation set that does not list a name which its cells have."""

    def __init__(self, names):
        super().__init__(names)
        self.unique_batches = self.unique_batches[:-1]


def forgetful():
    dataset, loader = sets()
    loader.val_dataset = Forgetful(["lane_a", "lane_z"])
    return dataset, loader


def test_a_name_that_no_data_set_listed_is_an_error(tmp_path):
    with pytest.raises(DataError, match="unknown technical batch .lane_z.; known are .lane_a., .lane_b."):
        run(tmp_path, ("forgetful", {}))
