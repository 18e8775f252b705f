"""Build a model as a run does and print how much memory a rank took at most; distributed.py starts it on each rank."""

import math
import os
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainer import distributed
from trainer.config.load import load_run_config
from trainer.config.schema import BatchPlan
from trainer.model_building import build_model
from trainer.phases import DataFacts
from trainer.zero_building import whole_shape


class Peak:
    """The most memory that this process holds while the block runs, beyond what it held before, in bytes."""

    def __enter__(self) -> "Peak":
        """Start to look, every millisecond."""
        self._before = self.bytes = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking."""
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, resident()) - self._before

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.bytes = max(self.bytes, resident())


def resident() -> int:
    """Return the memory that this process holds now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Build and report."""
    config = load_run_config(Path(sys.argv[1]))
    accelerator, ranks = distributed.start(config)
    facts = DataFacts({"a": 0}, 1, sizes={"vocab_size": 1000, "n_bins": 8})
    with (
        distributed.building_model(accelerator, config, [BatchPlan(1, 1, ranks.count, ranks.count)]),
        Peak() as peak,
    ):
        model = build_model(config, facts)
    size = 4 * sum(math.prod(whole_shape(parameter)) for parameter in model.parameters())
    highest = ranks.max([peak.bytes])[0]
    if ranks.is_main:
        print(f"MEMORY {highest / size:.3f} {size}", flush=True)
    ranks.barrier()
    os._exit(0)  # nothing is left to do, and DeepSpeed was not given the model to take down


if __name__ == "__main__":
    main()
