"""Whether all ranks run the same configuration, modules, versions and data."""

import pytest
import torch
from launching import ROOT, start_ranks
from running import toy, write_config

from trainer.agreement import check_agreement, check_same_data, differences, facts_of
from trainer.config import load_run_config
from trainer.distributed import Ranks
from trainer.errors import ConfigError


def facts(**changes):
    values = {"optimizer.lr": 0.1, "datasets.0.dataloader_args.path": "/a/corpus", "seed": 1}
    own = {"configuration": values, "versions": {"torch": "2.8"}, "modules": {"my.model": "0a", "rare": "0b"}}
    return own | {name: own[name] | change for name, change in changes.items()}


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"configuration": {"optimizer.lr": 0.2}}, ["optimizer.lr is 0.2, not 0.1"]),
        ({"configuration": {"ema": 1}}, ["ema is 1, not 'nothing'"]),
        ({"versions": {"torch": "2.9"}}, ["torch is 2.9, not 2.8"]),
        ({"modules": {"my.model": "ff"}}, ["its source differs in my.model"]),
        ({"modules": {"seen_here_alone": "ff"}}, []),
    ],
)
def test_what_a_rank_has_otherwise_is_named(changes, found):
    assert differences(facts(), facts(**changes)) == found


def test_the_same_data_may_lie_elsewhere_on_each_node():
    other = {"datasets.0.dataloader_args.path": "/scratch/b/corpus"}
    assert differences(facts(), facts(configuration=other)) == []


def test_no_more_differences_are_listed_than_can_be_read():
    many = {f"key{number}": number for number in range(50)}
    assert differences(facts(), facts(configuration=many))[-1] == "and 45 more"


class PretendedRanks(Ranks):
    """Rank 1 of two, of which rank 0 is whatever a test says it is."""

    first = None

    def barrier(self):
        pass

    def broadcast(self, value):
        return self.first

    def gather_text(self, text):
        return ["", text]


def test_a_file_name_that_is_no_text_reaches_the_other_ranks(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, **_: None)
    monkeypatch.setattr(
        torch.distributed, "all_gather", lambda parts, own, **_: [part.copy_(own) for part in parts]
    )
    assert Ranks(0, 2).gather_text("caf\udce9.h5ad") == ["caf\\udce9.h5ad"] * 2


def rank_1(first):
    ranks = PretendedRanks(1, 2)
    object.__setattr__(ranks, "first", first)
    return ranks


def test_a_rank_with_other_data_is_refused():
    check_same_data({"first": "a", "second": "b"}, rank_1({"first": "a", "second": "b"}))
    with pytest.raises(ConfigError, match=r"rank 1 on .*: the data of phase second is other data"):
        check_same_data({"first": "a", "second": "b"}, rank_1({"first": "a", "second": "c"}))


def test_a_source_that_differs_is_refused(tmp_path):
    config = load_run_config(write_config(tmp_path, toy()))
    own = facts_of(config)
    check_agreement(config, rank_1(own))
    with pytest.raises(ConfigError, match="its source differs in trainer.loop"):
        check_agreement(config, rank_1(own | {"modules": {**own["modules"], "trainer.loop": "ff"}}))


def test_a_node_that_was_given_another_configuration_is_refused(tmp_path):
    path = write_config(tmp_path, toy({"epochs": 1}))
    command = str(ROOT / "trainer" / "train.py")
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, runpy, sys\nsys.argv = [{command!r}, *sys.argv[1:]]\n"
        "sys.argv += ['datasets.0.lr=0.5'] * int(os.environ['RANK'])\n"
        f"runpy.run_path({command!r}, run_name='__main__')"
    )
    with start_ranks(2, [script, "--config", path], env={"PYTHONPATH": str(ROOT / "tests")}) as group:
        output = group.wait(120, expect=2).stdout
    assert [process.returncode for process in group.processes] == [2, 2]
    assert "datasets.0.lr is 0.5, not " in output and "rank 1 on " in output and "Traceback" not in output
    assert not list((tmp_path / "runs").glob("*")), "a run folder was made"
