"""Run the user's commands from a benchmark."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def call(arguments: Sequence[object]) -> None:
    """Show a Python command, run it in the repository, and leave with its exit code if it fails."""
    texts = [str(part) for part in arguments]
    print(f"\n$ python {shlex.join(texts)}\n".replace(f"{ROOT}/", ""), flush=True)
    code = subprocess.run([sys.executable, *texts], cwd=ROOT).returncode
    if code:
        raise SystemExit(code)
