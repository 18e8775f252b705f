"""Let numba keep what it compiles for cell-eval and cell-eval2: each process of them compiles for ten seconds else."""

import functools
import sys


class KeepWhenImported:
    """Change numba's decorator before the first of these packages is imported, and find nothing."""

    packages = frozenset({"numba_mwu", "pdex", "cell_eval2"})

    def find_spec(self, name, path=None, target=None):
        if name in self.packages and self in sys.meta_path:
            sys.meta_path.remove(self)
            import numba

            numba.njit = functools.partial(numba.njit, cache=True)
        return None


sys.meta_path.insert(0, KeepWhenImported())
