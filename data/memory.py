"""How the C library treats freed memory."""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_BYTES = 32 << 20  # the largest that glibc accepts
_TRIM_BYTES = 256 << 20


def keep_freed_memory() -> bool:
    """Let glibc reuse freed arrays of a few MB instead of handing them back; False where there is no glibc.

    By default such arrays go back to the kernel when freed, and each new one is faulted in page by page and
    zeroed: two thirds of the time of tokenizing a batch. Up to 256 MB of freed memory stay with the process.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)) and bool(mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES))
