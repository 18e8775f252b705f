"""`events.jsonl` of a run folder: when a run started, went on and ended, one line of JSON each.

Nothing that a run computes depends on it, so a line that cannot be written is said and the run goes on. An `end`
holds what `exit_status.json` does, which is there from an end to the next start. What has no `end` was killed, or
still runs.
"""

import contextlib
import json
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.console import StartupAccount, notice

FILE = "events.jsonl"
START, RESUME, END = "start", "resume", "end"


def note_start(
    folder: Path, account: StartupAccount, *, world_size: int, strategy: str, resumed_step: int | None
) -> None:
    """Write that a run begins, or goes on from a step, and what its start-up account says."""
    # What the last end said would be taken for this start's, if it is killed.
    with contextlib.suppress(OSError):
        (folder / "exit_status.json").unlink(missing_ok=True)
    event = {
        "event": START if resumed_step is None else RESUME,
        "time": datetime.now(UTC).isoformat(),
        "host": socket.gethostname(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "world_size": world_size,
        "strategy": strategy,
        "device": account.device,
        "precision": account.precision,
        "num_parameters": account.num_parameters,
        "num_trainable_parameters": account.num_trainable_parameters,
        "num_threads": account.num_threads,
        "batches": {phase.name: phase.batch_arithmetic for phase in account.phases},
        "units": {phase.name: phase.unit for phase in account.phases},
        "versions": dict(account.versions),
        "resumed_from": account.resumed_from,
        "resumed_step": resumed_step,
        "notes": list(account.notes),
    }
    _append(folder, event)


def note_end(folder: Path, status: Mapping[str, Any]) -> None:
    """Write that a run ended; `status` is what `exit_status.json` says."""
    _append(folder, {"event": END, **status})


def read_events(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the events in order, and how many lines cannot be read; a run without a journal has none."""
    events, num_damaged = [], 0
    try:
        lines = (folder / FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if isinstance(event, dict) and event.get("event") in (START, RESUME, END):
            events.append(event)
        elif line.strip():
            num_damaged += 1
    return events, num_damaged


def _append(folder: Path, event: Mapping[str, Any]) -> None:
    try:
        with open(folder / FILE, "a+b") as file:
            # A process that was killed may have left half a line, which must not spoil this one.
            if file.tell() > 0:
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(event).encode() + b"\n")
    except OSError as error:
        notice(f"{folder / FILE}: the {event['event']} of the run is not written down ({error.strerror})")
