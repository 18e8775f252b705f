"""The folder through which a launch script and the ranks of its node talk, named by CELLPHASE_CONTROL.

The script reads process ids there to signal the ranks themselves, because launchers do not pass every signal on,
and leaves `preempt.<its own signal>` there first, for a rank that starts later and for what is said of the end. Each
rank says at its end how it ended, because launchers turn every failure into 1. What decides stands in the names of
empty files, which a full disk still takes: `rank<rank>.runs.<process id>` becomes `rank<rank>.exited.<exit code>`. Why
a rank ended is in `rank<rank>.exit.json`, for people; `run_folder` is the run's, where the script looks whether other
ranks have given the run up. Without the variable nothing here does anything.
"""

import contextlib
import json
import os
from pathlib import Path

from trainer.atomicfile import replace_text

VARIABLE = "CELLPHASE_CONTROL"
_REQUEST = "preempt."

_run_folder: str | None = None
_has_left_exit = False


def has_folder() -> bool:
    """Tell whether a launch script gave this process a control folder."""
    return bool(os.environ.get(VARIABLE))


def write_process_id() -> None:
    """Say under which process id this rank takes signals."""
    if has_folder():
        _running().touch()


def request() -> str | None:
    """Return what made the launch script ask for a checkpoint and an end, None while it does not."""
    if not has_folder():
        return None
    try:
        names = sorted(os.listdir(_folder()))
    except OSError:  # the script is gone, and its folder with it
        return None
    return next((name.removeprefix(_REQUEST) for name in names if name.startswith(_REQUEST)), None)


def ask(folder: Path, why: str) -> None:
    """Ask the ranks of a control folder for a checkpoint and an end, also those that start later."""
    (folder / f"{_REQUEST}{why}").touch()


def note_run_folder(folder: str | Path) -> None:
    """Remember the run folder, for the account of this rank's end, and tell it to the launch script."""
    global _run_folder
    _run_folder = str(folder)
    if has_folder():
        with contextlib.suppress(OSError):  # no room; the script then knows less of the run
            replace_text(_folder() / "run_folder", os.path.abspath(folder) + "\n")


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
