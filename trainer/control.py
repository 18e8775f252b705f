"""The folder through which a launch script and the ranks of its node talk, named by CELLPHASE_CONTROL.

The script reads process ids there to signal the ranks themselves, because launchers do not pass every signal on,
and leaves `preempt` there first, for a rank that starts later. Each rank says at its end how it ended, because
launchers turn every failure into 1. What decides stands in the names of empty files, which a full disk still takes:
`rank<rank>.runs.<process id>` becomes `rank<rank>.exited.<exit code>`. Why a rank ended is in `rank<rank>.exit.json`,
for people. Without the variable nothing here does anything.
"""

import contextlib
import json
import os
from pathlib import Path

from trainer.atomicfile import replace_text

VARIABLE = "CELLPHASE_CONTROL"

_run_folder: str | None = None
_has_left_exit = False


def has_folder() -> bool:
    """Tell whether a launch script gave this process a control folder."""
    return bool(os.environ.get(VARIABLE))


def write_process_id() -> None:
    """Say under which process id this rank takes signals."""
    if has_folder():
        _running().touch()


def asks_to_stop() -> bool:
    """Tell whether the launch script asks for a checkpoint and an end."""
    return has_folder() and (_folder() / "preempt").exists()


def note_run_folder(folder: str | Path) -> None:
    """Remember the run folder, for the account of this rank's end."""
    global _run_folder
    _run_folder = str(folder)


def run_folder() -> str | None:
    """Return the folder of the run that this process carried out last; None: it has made none."""
    return _run_folder


def leave_exit(exit_code: int, reason: str) -> None:
    """Say how this rank ends; the first account of a process stands."""
    global _has_left_exit
    if not has_folder() or _has_left_exit:
        return
    _has_left_exit = True
    account = {"exit_code": exit_code, "reason": reason, "run_folder": _run_folder}
    with contextlib.suppress(OSError):  # no room for the reason, which does not decide
        replace_text(_path("exit.json"), json.dumps(account) + "\n")
    with contextlib.suppress(OSError):  # the script may be gone, and its folder with it
        _running().rename(_path(f"exited.{exit_code}"))


def _folder() -> Path:
    return Path(os.environ[VARIABLE])


def _running() -> Path:
    return _path(f"runs.{os.getpid()}")


def _path(kind: str) -> Path:
    return _folder() / f"rank{os.environ.get('RANK') or 0}.{kind}"
