"""The end of a process whose parent is gone: nobody waits for what it computes."""

import os
import threading
import time

_LOOK_SECONDS = 1.0


def end_with_parent(parent: int) -> None:
    """End this process when the one that started it, of the process id `parent`, is gone: at once, or from a thread.

    Its id is handed over: whoever asks after the imports may have been given another parent meanwhile.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    threading.Thread(target=look, name="parent", daemon=True).start()
