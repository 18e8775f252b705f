"""Turn what a command raises into one message and the process's exit code."""

import atexit
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from data.errors import DataError
from models.errors import ModelError
from trainer import control
from trainer.console import is_main_process, printable, process_index
from trainer.errors import ConfigError, UserError
from trainer.preemption import Preempted

FAILED, USER_MISTAKE, PREEMPTED, INTERRUPTED = 1, 2, 75, 130

GRACE_SECONDS = 3.0
"""How long a further process waits with its mistake: launchers end all when the first one ends."""


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; a user's mistake becomes a message, printed by one process."""
    code, reason = FAILED, "ended by an exception"
    try:
        code = command()
        reason = "done" if code == 0 else "a mistake in the command"
    except (UserError, DataError, ModelError) as error:
        # Before the message: a process that waits with its own may be ended by its launcher meanwhile.
        control.leave_exit(USER_MISTAKE, str(error))
        _report(error)
        code, reason = USER_MISTAKE, str(error)
    except Preempted as stop:
        if is_main_process():
            print(f"stopped: {stop}", file=sys.stderr, flush=True)
        code, reason = PREEMPTED, str(stop)
    except KeyboardInterrupt:
        if is_main_process():
            print("interrupted", file=sys.stderr)
        code, reason = INTERRUPTED, "interrupted"
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    finally:
        control.leave_exit(code, reason)
    return code


def end_process(code: int) -> NoReturn:
    """End the process of a command that has said and written all, its exit functions run.

    Destructors of libraries that hold threads sometimes abort a process that trained on several ranks after its end
    (`terminate called without an active exception`), and its exit code with it.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(code)


def _report(error: Exception) -> None:
    """Print a mistake once: from the main process, or from one that met it alone (a file missing there)."""
    if is_main_process():
        print(printable(f"error: {error}"), file=sys.stderr, flush=True)
        return
    time.sleep(GRACE_SECONDS)
    if not isinstance(error, ConfigError):  # every process meets those
        print(printable(f"error on rank {process_index()}: {error}"), file=sys.stderr, flush=True)
