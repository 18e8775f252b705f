"""The process that runs cell-eval or cell-eval2: `python -m trainer.scoring.vcc_calls CALLS.json PARENT`.

It gives the program's own `main` one command line after the other, as a shell would, in one process, because the first
run of each process spends most of its time on compiling. What a call prints goes into a file of its own. PARENT is the
process id of the one that started it, with which it ends.
"""

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from trainer.atomicfile import replace_text
from trainer.scoring.parent import end_with_parent


def main(argv: list[str]) -> int:
    """Run the calls of a file, and write beside it how each one ended."""
    end_with_parent(int(argv[1]))
    path = Path(argv[0])
    request = json.loads(path.read_text())
    package, name = request["main"].split(":")
    program = getattr(importlib.import_module(package), name)
    ended: list[dict[str, Any]] = []
    for call in request["calls"]:
        instead_of = call["instead_of"]
        if instead_of and not any(each["name"] == instead_of and each["error"] for each in ended):
            continue
        start = time.monotonic()
        error = _run(program, request["program"], call["arguments"], Path(call["log"]))
        ended.append({"name": call["name"], "error": error, "seconds": time.monotonic() - start})
        replace_text(path.with_name("ended.json"), json.dumps(ended, indent=2) + "\n")
        if error is not None and call["is_needed"]:
            return 1
    return 0


def _run(program: Any, name: str, arguments: list[str], log: Path) -> str | None:
    """Run one command line with its output in `log`; return why it failed, or None."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.argv = [name, *arguments]
        try:
            program()
        except SystemExit as done:
            if done.code not in (None, 0):
                if not isinstance(done.code, int):
                    print(done.code, file=sys.stderr)
                return f"exit code {done.code}" if isinstance(done.code, int) else str(done.code)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for copy, number in zip(kept, (1, 2), strict=True):
                os.dup2(copy, number)
                os.close(copy)
    return None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
