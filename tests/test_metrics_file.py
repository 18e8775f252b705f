import json
import math

import numpy as np
import pytest
import torch

from trainer.errors import CheckpointError, UserError
from trainer.metrics_file import (
    WALL_CLOCK_FIELDS,
    MetricsFile,
    comparable,
    decode_record,
    encode_record,
    read_metrics,
)


def step_record(step, **fields):
    return {"kind": "train", "global_step": step, "phase": "first", "phase_step": step, "epoch": 0, **fields}


def write_steps(path, steps):
    with MetricsFile(path) as file:
        for step in steps:
            file.append(step_record(step, loss=1.0 / step))


def test_floats_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    values = [0.1, 1 / 3, 5e-324, -0.0, 1.7976931348623157e308, *rng.standard_normal(200).tolist()]
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        for step, value in enumerate(values):
            file.append(step_record(step, loss=value))
    read = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert [value.hex() for value in read] == [value.hex() for value in values]


def test_values_that_are_not_finite_are_strict_json_and_come_back(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.append(step_record(1, loss=math.nan, grad_norm=math.inf, lr=-math.inf, phase="nan"))
    line = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (strict["loss"], strict["grad_norm"], strict["lr"]) == ("nan", "inf", "-inf")
    [record] = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["loss"]) and record["grad_norm"] == math.inf and record["lr"] == -math.inf
    assert record["phase"] == "nan"


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_constant_that_is_no_json_is_refused(constant):
    with pytest.raises(ValueError, match=f"^{constant} is no JSON"):
        decode_record(f'{{"kind": "train", "is_skipped": {constant}}}')


def test_a_float32_tensor_is_written_as_exactly_its_value():
    value = torch.tensor(0.1, dtype=torch.float32)
    assert decode_record(encode_record({"loss": value, "count": np.int64(3)})) == {
        "loss": value.item(),
        "count": 3,
    }


@pytest.mark.parametrize("value", ["good", torch.zeros(2), [1.0], {"a": 1}])
def test_a_metric_that_is_not_one_number_is_refused_by_name(value):
    with pytest.raises(TypeError, match="metric 'loss'"):
        encode_record({"loss": value})


def test_a_record_is_on_disk_as_soon_as_it_is_appended(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.append(step_record(1))
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
        file.sync()


def test_reopening_appends_after_what_is_there(tmp_path):
    write_steps(tmp_path / "metrics.jsonl", [1, 2])
    write_steps(tmp_path / "metrics.jsonl", [3])
    assert [record["global_step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_resuming_drops_the_records_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3, 4, 5])
    expected = path.read_bytes().splitlines(keepends=True)[:3]
    MetricsFile(path, resume_step=3).close()
    assert path.read_bytes().splitlines(keepends=True) == expected


def test_resuming_keeps_an_evaluation_at_the_checkpoint_s_step(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.append(step_record(1))
        file.append(step_record(1) | {"kind": "validation"})
        file.append(step_record(2))
    MetricsFile(tmp_path / "metrics.jsonl", resume_step=1).close()
    assert [record["kind"] for record in read_metrics(tmp_path / "metrics.jsonl")] == ["train", "validation"]


@pytest.mark.parametrize("torn", [b'{"global_st', b'{"global_step": 3}', b"\0\0\0\0", b"\0\0\n"])
def test_a_last_line_that_was_being_written_is_not_read_and_is_cut_before_appending(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2])
    with open(path, "ab") as file:
        file.write(torn)
    assert [record["global_step"] for record in read_metrics(path)] == [1, 2]
    write_steps(path, [3])
    assert [record["global_step"] for record in read_metrics(path)] == [1, 2, 3]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{oops", lines[2], ""]))
    with pytest.raises(UserError, match="line 2: not a metrics record"):
        read_metrics(path)
    with pytest.raises(UserError, match="line 2"):
        MetricsFile(path, resume_step=1)


def test_a_record_without_a_step_stops_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss": 1.0}\n')
    with pytest.raises(CheckpointError, match="global_step"):
        MetricsFile(path, resume_step=1)


def test_a_missing_file_says_what_to_name(tmp_path):
    with pytest.raises(UserError, match="no such metrics file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_comparable_records_differ_in_the_loss_but_not_in_the_clock():
    first = step_record(1, loss=0.5, **dict.fromkeys(WALL_CLOCK_FIELDS, 1.0))
    second = step_record(1, loss=0.5, **dict.fromkeys(WALL_CLOCK_FIELDS, 2.0))
    assert comparable(first) == comparable(second) != comparable(step_record(1, loss=0.5000001))


def test_comparable_records_with_nan_are_equal():
    assert comparable(step_record(1, loss=math.nan)) == comparable(step_record(1, loss=float("nan")))
