"""Turn what a command raises into one message and the process's exit code."""

import os
import sys
import time
import traceback
from collections.abc import Callable

from data.errors import DataError
from models.errors import ModelError
from trainer.errors import ConfigError, UserError

FAILED, USER_MISTAKE, INTERRUPTED = 1, 2, 130

GRACE_SECONDS = 3.0
"""How long a further process waits with its mistake: launchers end all when the first one ends."""


def process_index() -> int:
    """Return this process's rank, from what its launcher says in the environment."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def is_main_process() -> bool:
    """Tell whether this process is the one that prints."""
    return process_index() == 0


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit code; a user's mistake becomes a message, printed by one process."""
    try:
        return command()
    except (UserError, DataError, ModelError) as error:
        _report(error)
        return USER_MISTAKE
    except KeyboardInterrupt:
        if is_main_process():
            print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return FAILED


def _report(error: Exception) -> None:
    """Print a mistake once: from the main process, or from one that met it alone (a file missing there)."""
    if is_main_process():
        print(f"error: {error}", file=sys.stderr, flush=True)
        return
    time.sleep(GRACE_SECONDS)
    if not isinstance(error, ConfigError):  # every process meets those
        print(f"error on rank {process_index()}: {error}", file=sys.stderr, flush=True)
