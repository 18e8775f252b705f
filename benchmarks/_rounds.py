"""Let processes that stay alive take turns, so that a busy spell of the machine meets all of them."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

_THREADS = ("OMP", "MKL", "OPENBLAS", "NUMBA", "RAYON")


def run_rounds(
    commands: Mapping[str, Sequence[object]], num_rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Start a Python command for each name, with one thread, and return what each answered in every round.

    A command answers every line of its input with a line of JSON, and ends with its input.

    Raises:
        SystemExit: one of them ended before.
    """
    one = {f"{library}_NUM_THREADS": "1" for library in _THREADS}
    environment = {**os.environ, **one, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    children: dict[str, subprocess.Popen[str]] = {}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    try:
        for name, command in commands.items():
            children[name] = subprocess.Popen(
                [sys.executable, *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        for _ in range(num_rounds):
            for name, child in children.items():
                assert child.stdin is not None and child.stdout is not None
                with contextlib.suppress(BrokenPipeError):  # it has ended, and has no answer
                    child.stdin.write("go\n")
                    child.stdin.flush()
                answer = child.stdout.readline()
                if not answer:
                    raise SystemExit(f"{name} ended with exit code {child.wait()}; its error is above")
                results[name].append(json.loads(answer))
    finally:
        for child in children.values():
            child.communicate()
    return results
