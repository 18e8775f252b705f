"""`metrics.jsonl`: one line of JSON for each optimizer step and each evaluation, in full float precision.

A record is a flat dict. Every record has the fields `kind` ("train" for an optimizer step, "validation" for
an evaluation, "benchmark" and "score" for those of held-out cells, which may be written after later steps),
`global_step`, `phase`, `phase_step` and `epoch`. The file is strict JSON, which knows no NaN
and no infinity: they are written as the strings "nan", "inf" and "-inf", and `read_metrics` turns them back
into floats everywhere but in the text fields.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from trainer.errors import CheckpointError, UserError

MetricValue = str | int | float | bool | None

WALL_CLOCK_FIELDS = frozenset(
    {
        "cells_per_second",
        "tokens_per_second",
        "padded_tokens_per_second",
        "mfu",
        "data_wait_fraction",
        "data_wait_seconds",
        "step_seconds",
        "evaluation_seconds",
        "checkpoint_seconds",
        "elapsed_seconds",
        "time",
        "memory_bytes",
        "peak_memory_bytes",
        "peak_gpu_memory_bytes",
    }
)
"""The fields in which two runs of the same config and seed may differ; all others are equal bit for bit."""

TEXT_FIELDS = frozenset({"kind", "phase", "event"})
"""The fields that hold text; no other may."""

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsFile:
    """Append records to a metrics file; each is with the operating system when `append` returns."""

    def __init__(
        self,
        path: Path | str,
        *,
        resume_step: int | None = None,
        redone: Mapping[str, MetricValue] | None = None,
    ) -> None:
        """Open the file for appending and cut off a line that a killed process left half written.

        Args:
            path: The file; its folder must exist.
            resume_step: Drop every record after this global step: the checkpoint's, when a run goes on. None
                keeps them all.
            redone: Fields of the record at that step itself that the run writes again; None: none of them.
        """
        self.path = Path(path)
        self.num_dropped_steps = self.num_dropped_cells = 0
        """The steps whose records were dropped, and the cells of them: they are computed again."""
        late: list[dict[str, MetricValue]] = []
        if self.path.exists():
            end, late, dropped = _kept_records(self.path, resume_step, redone)
            self.num_dropped_steps = len(dropped)
            self.num_dropped_cells = sum(int(cells) for cells in dropped if isinstance(cells, int))
            os.truncate(self.path, end)
        # Without a buffer: what a full disk refuses would be written again when the file is closed.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        for record in late:
            self.append(record)

    def __enter__(self) -> "MetricsFile":
        """Return the open file."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record as a line.

        Args:
            record: Text in the text fields; numbers, booleans, None, or 0-d tensors and arrays in all others.
        """
        rest = memoryview(encode_record(record).encode() + b"\n")
        while rest:
            rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        """Wait until what was appended is on the disk.

        A checkpoint syncs before it counts as complete, so that the records up to it outlive a power cut.
        """
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        self._file.close()


def encode_record(record: Mapping[str, Any]) -> str:
    """Return a record as one line of strict JSON that `decode_record` reads back equal."""
    return json.dumps({name: _encodable(name, value) for name, value in record.items()}, allow_nan=False)


def decode_record(line: str | bytes) -> dict[str, MetricValue]:
    """Read one line of a metrics file.

    Raises:
        ValueError: it is not an object of strict JSON.
    """
    record = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {record!r}")
    for name, value in record.items():
        if isinstance(value, str) and name not in TEXT_FIELDS and value in _NON_FINITE:
            record[name] = _NON_FINITE[value]
    return record


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON; figures that are not finite are written as text")


def read_metrics(path: Path | str) -> list[dict[str, MetricValue]]:
    """Return all records of a metrics file, in order; a last line that was being written is left out.

    Raises:
        UserError: the file is missing, or a line before the last is not a record.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such metrics file; name the metrics.jsonl of a run folder")
    return [record for _, record in _whole_lines(path)]


def comparable(record: Mapping[str, MetricValue]) -> dict[str, MetricValue]:
    """Return a record without the fields that depend on the clock or the machine.

    NaN becomes the text "nan", so that two records that hold one compare equal.
    """
    return {
        name: "nan" if isinstance(value, float) and math.isnan(value) else value
        for name, value in record.items()
        if name not in WALL_CLOCK_FIELDS
    }


def plain_number(value: Any) -> int | float | bool | None:
    """Return a number, or what a 0-d tensor or array holds, as a plain Python number.

    Raises:
        TypeError: it is neither.
    """
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    raise TypeError(f"expected a number, got {value!r}")


def _encodable(name: str, value: Any) -> MetricValue:
    if name in TEXT_FIELDS:
        if value is not None and not isinstance(value, str):
            raise TypeError(f"metric {name!r}: expected text, got {value!r}")
        return value
    try:
        value = plain_number(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"metric {name!r}: expected one number, got {value!r}") from error
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _whole_lines(path: Path) -> Iterator[tuple[int, dict[str, MetricValue]]]:
    """Yield each record with the byte offset at which its line ends."""
    with open(path, "rb") as file:
        line, end, number = file.readline(), 0, 1
        while line:
            following = file.readline()
            try:
                record = decode_record(line)
                if not line.endswith(b"\n"):
                    raise ValueError("it has no end")
            except ValueError as error:
                if not following:
                    return
                raise UserError(
                    f"{path}, line {number}: not a metrics record ({error}); remove that line"
                ) from None
            end += len(line)
            yield end, record
            line, number = following, number + 1


def _kept_records(
    path: Path, resume_step: int | None, redone: Mapping[str, MetricValue] | None
) -> tuple[int, list[dict[str, MetricValue]], list[MetricValue]]:
    """Return the size to which the file is cut, the records behind it that are to be written again, and lost cells.

    Those are benchmarks and scores of steps up to the one that the run goes on from, which were written later; these
    are the `cells` of every optimizer step after it.
    """
    kept, late, dropped, is_cut = 0, [], [], False
    for end, record in _whole_lines(path):
        step = record.get("global_step")
        if not isinstance(step, int):
            raise CheckpointError(f"{path}: a metrics record without an integer global_step: {record}")
        is_redone = bool(redone) and step == resume_step and redone.items() <= record.items()
        if is_redone or (resume_step is not None and step > resume_step):
            is_cut = True
            if record.get("kind") == "train":
                dropped.append(record.get("cells"))
        elif is_cut and record.get("kind") in ("benchmark", "score"):
            late.append(record)
        if not is_cut:
            kept = end
    return kept, late, dropped
