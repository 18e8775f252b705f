"""The end of a process whose parent is gone: nobody waits for what it computes."""

import os
import threading
import time

_LOOK_SECONDS = 1.0


def end_with_parent() -> None:
    """End this process, from a thread that looks for it, when the one that started it is gone."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=look, name="parent", daemon=True).start()
