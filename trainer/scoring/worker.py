"""The process that scores beside a training run: `python -m trainer.scoring.worker REQUEST ANSWER PARENT`.

It imports no torch for embeddings, obeys the process that started it alone, and ends with it. ANSWER is the file that
it writes, a new one for each start, so that one which outlives its run for a moment answers nobody else; PARENT is the
process id of the one that started it.
"""

import json
import os
import signal
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trainer.atomicfile import replace_text
from trainer.errors import UserError
from trainer.scoring.benchmarks import Results, Row, run_benchmarks
from trainer.scoring.cells import Cells, load_cells
from trainer.scoring.embedding_baselines import representations
from trainer.scoring.parent import end_with_parent
from trainer.scoring.specs import Spec, parse_specs

MODEL = "model"
"""The representation that is the model's own embedding."""
_NICE = 5


def main(argv: list[str]) -> int:
    """Score what a request file names and write its result, or why there is none."""
    _obey_parent(int(argv[2]))
    request_path = Path(argv[0])
    request = json.loads(request_path.read_text())
    folder = request_path.parent
    result = {key: request[key] for key in ("kind", "global_step", "phase", "phase_step", "epoch")}
    try:
        result |= to_json(
            _benchmark(folder, request) if request["kind"] == "benchmark" else _score(folder, request)
        )
    except UserError as error:
        result["error"] = str(error)
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    replace_text(argv[1], json.dumps(result, indent=2) + "\n")
    return 1 if "error" in result else 0


def to_json(results: Results) -> dict[str, Any]:
    """Return results as JSON can hold them."""
    return {"rows": [asdict(row) for row in results.rows], "notes": results.notes}


def from_json(parsed: dict[str, Any]) -> Results:
    """Return what `to_json` was given."""
    return Results([Row(**row) for row in parsed["rows"]], parsed["notes"])


def _score(folder: Path, request: dict[str, Any]) -> Results:
    from trainer.scoring.vcc_request import score_request  # which imports torch and the data's readers

    return score_request(folder, request)


def _benchmark(folder: Path, request: dict[str, Any]) -> Results:
    specs = parse_specs(request["specs"], "specs")
    cells = load_cells(folder / request["cells"])
    embedding = np.load(folder / request["own_file"], allow_pickle=False)
    mine = run_benchmarks(specs, {MODEL: embedding}, cells)
    baselines = _baselines(folder / request["baselines"], specs, cells)
    return Results([*mine.rows, *(row for row in baselines.rows if row not in mine.rows)], mine.notes)


def _baselines(path: Path, specs: list[Spec], cells: Cells) -> Results:
    """Return the scores of what took no training, which are the same in every epoch."""
    if path.exists():
        return from_json(json.loads(path.read_text()))
    found = run_benchmarks(specs, representations(cells), cells)
    replace_text(path, json.dumps(to_json(found)) + "\n")
    return found


def _obey_parent(parent: int) -> None:
    """Let signals to a launcher's processes pass, and end when the parent is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICE)
    end_with_parent(parent)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
