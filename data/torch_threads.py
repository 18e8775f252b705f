"""Keep torch's number of threads where a library is called that sets it for the whole process."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Put torch's number of threads back when the block ends; does nothing where torch is not imported.

    numba, which scanpy and umap-learn compute with, gives OpenMP as many threads as there are cores. Torch takes that
    over: a run would sum in another order than its own resume, and several processes on a machine would get in each
    other's way.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
