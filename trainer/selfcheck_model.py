"""The encoder that `python -m trainer selfcheck` trains: it writes down the cells each rank sees, and can be slow."""

import hashlib
import os
import time
from typing import Any

from models.encoder import MaskedCellEncoder
from models.outputs import LossOutput

VARIABLE = "CELLPHASE_SELFCHECK_CELLS"
"""Names the file for a line a cell; the rank is added to it."""

PAUSE_VARIABLE = "CELLPHASE_SELFCHECK_PAUSE"
"""Seconds to wait in each forward pass, so that a run of a tiny model lasts long enough to be killed."""


class WitnessEncoder(MaskedCellEncoder):
    """Masked prediction, with a hash of every training cell (tokens, values, masks) in a file where one is named."""

    def compute_loss(self, batch: dict[str, Any]) -> LossOutput:
        """Write down the cells and return the loss."""
        time.sleep(float(os.environ.get(PAUSE_VARIABLE, "0")))
        path = os.environ.get(VARIABLE)
        if self.training and path:
            with open(f"{path}.{os.environ.get('RANK', '0')}", "a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in cell_hashes(batch))
        return super().compute_loss(batch)


def cell_hashes(batch: dict[str, Any]) -> list[str]:
    """Return a hash of each cell of a padded batch that does not depend on the cells beside it."""
    is_real = batch["attention_mask"].bool().cpu()
    columns = [batch[name].cpu() for name in ("tokens", "labels", "values")]
    return [
        hashlib.sha256(
            b"".join(column[row][is_real[row]].numpy().tobytes() for column in columns)
        ).hexdigest()
        for row in range(len(is_real))
    ]
