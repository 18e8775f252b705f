import pytest
import torch
from running import records, toy, train

from trainer.distributed import Ranks
from trainer.meters import LossSum, Meters, StepTotals
from trainer.metrics_file import comparable


def one_step(meters, **totals):
    step = {"cells": 8, "tokens": 100, "padded_tokens": 160, "flops": 5e12, **totals}
    meters.add_step({"kind": "train"}, LossSum(), 1.0, StepTotals([], 0.0, **step))
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
