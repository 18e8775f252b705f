"""Let the ranks that a launcher starts be forks: importing torch anew takes each longer than what most tests train."""

import importlib.util
import sys
from pathlib import Path

STARTS_RANKS = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"


class ReplaceWhenImported:
    """Change by what the launcher's module starts ranks, once it has been imported."""

    def find_spec(self, name, path=None, target=None):
        if name != STARTS_RANKS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_replace(module):
            execute(module)
            sys.path.append(str(Path(__file__).resolve().parent.parent))
            import launching

            module.Popen = launching.rank_as_fork

        spec.loader.exec_module = execute_and_replace
        return spec


sys.meta_path.insert(0, ReplaceWhenImported())
