"""Crash processes that save checkpoints, and look at what is left; run as a script.

    python tests/checkpoint_crashes.py calls FOLDER           die at every file system call of a save in turn
    python tests/checkpoint_crashes.py kills FOLDER COUNT     kill -9 two saving ranks at random moments

Prints JSON with what was seen, or fails.
"""

import builtins
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from trainer import checkpoint, statefile
from trainer.checkpoint import CheckpointWriter
from trainer.checkpoint_folder import find_newest, list_checkpoints, name_checkpoints, open_checkpoint
from trainer.retention import Retention

NUM_NUMBERS = 200_000


def alone(folder: Path, attempt: str, retention: Retention | None = None) -> CheckpointWriter:
    """Return the writer of a single rank that writes in the calling thread."""
    options: dict[str, Any] = {"rank": 0, "world_size": 1, "asynchronous": False}
    return CheckpointWriter(folder, attempt=attempt, retention=retention, **options)


def save(writer: CheckpointWriter, step: int, token: int, num_numbers: int = 64) -> None:
    """Save a state in which every file says to which start and step it belongs."""
    content = {"numbers": torch.full((num_numbers,), float(step)), "token": token}
    shared = {"model.safetensors": content, "config.yaml": str(token)} if writer.rank == 0 else {}
    writer.save(step, {"state": content}, shared, metric=float(step % 7))


def check(folder: Path) -> list[int]:
    """Verify every folder named like a checkpoint, and that its files are of one save; return the steps."""
    steps = []
    for name in sorted(os.listdir(folder)):
        if not name.startswith("checkpoint_"):
            continue
        saved = open_checkpoint(folder / name)
        contents = [saved.shared("model.safetensors")]
        contents += [saved.rank("state", rank) for rank in range(saved.world_size)]
        assert {content["token"] for content in contents} == {int(saved.text("config.yaml"))}, name
        assert all((content["numbers"] == saved.step).all() for content in contents), name
        steps.append(saved.step)
    newest, skipped = find_newest(folder, fall_back=True)
    assert skipped == []
    assert (newest is None) == (not steps) and (newest is None or newest.name == f"checkpoint_{max(steps)}")
    assert [open_checkpoint(found).step for found in list_checkpoints(folder)] == sorted(steps)
    return sorted(steps)


def die_at_call(number: int) -> None:
    """Make this process die at its `number`-th call that changes files, half way where it can be."""
    count = 0

    def before(real: Any, half: Any = None) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                if half is not None:
                    half(*args)
                os._exit(9)
            return real(*args, **options)

        return call

    for name in ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "truncate"):
        setattr(os, name, before(getattr(os, name)))
    shutil.rmtree = before(shutil.rmtree, half=lambda folder: os.unlink(Path(folder) / "model.safetensors"))
    checkpoint.open = before(builtins.open)
    real_write = statefile.HashingSink.write

    def write_half(sink: Any, data: Any) -> None:
        real_write(sink, data[: len(data) // 2])
        sink._file.flush()

    statefile.HashingSink.write = before(real_write, half=write_half)


def crash_at_every_call(folder: Path) -> dict[str, Any]:
    """Die at each call in turn while step 3 is saved, or step 2 again, after 1 and 2, or after 2 alone."""
    os.fsync = lambda descriptor: None  # a killed process loses nothing that the kernel has
    seen: dict[str, Any] = {}
    for earlier in (1, 2):
        save(alone(folder / "both", f"e{earlier}"), earlier, 0)
    save(alone(folder / "only", "e2"), 2, 0)
    expected = {
        ("both", 3): [{1, 2}, {1, 2, 3}, {2, 3}],
        ("both", 2): [{1, 2}],
        ("only", 3): [{2}, {2, 3}],
        ("only", 2): [{2}],
    }
    for template, step in expected:
        number, outcomes = 0, set()
        while True:
            number += 1
            run = folder / f"{step}_{number}"
            shutil.copytree(folder / template, run)
            child = os.fork()
            if child == 0:
                writer = alone(run, "crash", Retention(keep_last=2))
                die_at_call(number)
                save(writer, step, 1)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            check(run)
            name_checkpoints(run)  # as every resume does first
            steps = check(run)
            assert set(steps) in expected[template, step], (template, number, steps)
            outcomes.add(tuple(steps))
            save(alone(run, "next"), 4, 2)
            assert 4 in check(run)
            left = [name for name in os.listdir(run) if name.startswith(".") or name == "superseded"]
            assert left == [], left
            shutil.rmtree(run)
            if code == 0:
                break
            assert code == 9, code
        seen[f"calls while saving step {step} after {template}"] = number - 1
        seen[f"outcomes of step {step} after {template}"] = sorted(outcomes)
    return seen


def rank_process(folder: Path, rank: int, start: int, token: int) -> None:
    """Save in a tight loop until killed."""
    writer = CheckpointWriter(
        folder,
        rank=rank,
        world_size=2,
        attempt=f"t{token}",
        retention=Retention(keep_last=2, keep_every_steps=25, keep_best=1),
        timeout_seconds=20,
    )
    for step in range(start, start + 1_000_000):
        save(writer, step, token, NUM_NUMBERS)


def kill_at_random_moments(folder: Path, count: int) -> dict[str, Any]:
    """Start two ranks, kill them at a random moment in a random order, check, and start again."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(count)
    seen = {"kills": 0, "during a save": 0, "during a deletion": 0, "checkpoints completed": 0}
    newest = 0
    for token in range(count):
        ranks = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                try:
                    rank_process(folder, rank, newest + 1, token)
                finally:
                    os._exit(1)
            ranks.append(child)
        time.sleep(chance.uniform(0.02, 0.5))
        chance.shuffle(ranks)
        for child in ranks:
            os.kill(child, signal.SIGKILL)
            time.sleep(chance.choice([0, 0, 0.03]))
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
        assert codes == [-signal.SIGKILL] * 2, codes
        left = [name for name in os.listdir(folder) if name.startswith(".checkpoint")]
        seen["kills"] += 1
        seen["during a save"] += any(not name.endswith(".deleted.tmp") for name in left)
        seen["during a deletion"] += any(name.endswith(".deleted.tmp") for name in left)
        steps = check(folder)
        before, newest = newest, max(steps, default=0)
        assert newest >= before, (newest, before)
        seen["checkpoints completed"] += newest - before
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "calls":
        print(json.dumps(crash_at_every_call(Path(sys.argv[2]))))
    else:
        print(json.dumps(kill_at_random_moments(Path(sys.argv[2]), int(sys.argv[3]))))
