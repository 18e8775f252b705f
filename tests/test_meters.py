import pytest
import torch
from running import records, toy, train

from trainer.distributed import Ranks
from trainer.meters import LossSum, Meters, NamedMeans, StepTotals
from trainer.metrics_file import comparable


def one_step(meters, metrics=None, **totals):
    sums = LossSum()
    if metrics is not None:
        sums.add(torch.tensor(1.0), metrics, weight=1.0)
    step = {"cells": 8, "tokens": 100, "padded_tokens": 160, "flops": 5e12, **totals}
    meters.add_step({"kind": "train"}, sums, 1.0, StepTotals([], 0.0, **step))
    [record] = meters.take()
    return record


def test_rates_with_and_without_padding_are_of_the_same_time():
    record = one_step(Meters(Ranks(0, 1)))
    assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(100)
    assert record["padded_tokens_per_second"] * record["step_seconds"] == pytest.approx(160)


def test_utilization_is_useful_operations_over_what_all_devices_could_do(monkeypatch):
    ranks = Ranks(0, 4)
    monkeypatch.setattr(Ranks, "sum", lambda self, values: list(values))
    record = one_step(Meters(ranks, torch.device("cpu"), 1e12))
    assert record["mfu"] == pytest.approx(5e12 / (record["step_seconds"] * 4 * 1e12))


@pytest.mark.parametrize(("peak", "flops"), [(None, 5e12), (1e12, 0.0)])
def test_without_a_peak_or_operations_there_is_no_utilization(peak, flops):
    assert "mfu" not in one_step(Meters(Ranks(0, 1), torch.device("cpu"), peak), flops=flops)


def test_a_metric_that_some_batches_lack_is_the_mean_over_those_that_have_it():
    sums, other = LossSum(), LossSum()
    sums.add(torch.tensor(6.0), {"all": torch.tensor(2.0)}, weight=2.0)
    sums.add(torch.tensor(2.0), {"all": torch.tensor(4.0), "rare": torch.tensor(9.0)}, weight=3.0)
    sums.add(torch.tensor(5.0), {"all": torch.tensor(5.0), "dummy": torch.tensor(5.0)}, weight=0.0)
    other.add(torch.tensor(4.0), {"new": torch.tensor(1.0)}, weight=4.0)
    means = NamedMeans(Ranks(0, 1)).of([sums, LossSum(), other])
    assert means == [{"loss": 1.6, "all": 1.2, "rare": 3.0}, {}, {"loss": 1.0, "new": 0.25}]


def test_ranks_agree_on_names_only_where_there_are_new_ones(monkeypatch):
    calls = []
    monkeypatch.setattr(Ranks, "sum", lambda self, values: calls.append("sum") or list(values))
    monkeypatch.setattr(
        Ranks, "gather_text", lambda self, text: calls.append("names") or [text, '["theirs"]']
    )
    meters = Meters(Ranks(0, 2))
    one_step(meters)
    one_step(meters, metrics={"a": torch.tensor(1.0)})
    assert calls == ["sum", "sum", "names", "sum"]
    one_step(meters, metrics={"a": torch.tensor(1.0)})
    assert calls[4:] == ["sum"]


def test_on_a_cpu_there_are_neither_utilization_nor_device_memory(tmp_path):
    for record in records(train(tmp_path, toy({}))):
        assert not {"mfu", "peak_memory_bytes"} & record.keys()
        assert record["padded_tokens_per_second"] == record["tokens_per_second"]  # its cells are equally long


def test_on_a_gpu_the_memory_at_its_peak_is_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 12345)
    assert one_step(Meters(Ranks(0, 1), torch.device("cuda")))["peak_memory_bytes"] == 12345


def test_a_run_on_a_device_with_a_peak_records_its_utilization(tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.run.peak_of_device", lambda device, precision: 1e9)
    monkeypatch.setattr(
        "toy.ToyModel.training_flops", lambda self, lengths, masked: sum(lengths), raising=False
    )
    for record in records(train(tmp_path, toy({}))):
        useful = record["mfu"] * record["step_seconds"] * 1e9
        assert useful == pytest.approx(record["tokens"])


def test_two_runs_compare_equal_whatever_the_clock_and_the_device():
    record = {"loss": 1.0, "mfu": 0.3, "padded_tokens_per_second": 2.0, "peak_memory_bytes": 5}
    assert comparable(record) == {"loss": 1.0}
