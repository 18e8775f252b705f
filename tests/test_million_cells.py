"""Tests of the benchmark that trains on a million cells: its cells, its figures, and what it refuses."""

import json
import re
import subprocess
import sys
from collections import namedtuple
from typing import Any

import anndata
import numpy as np
import pytest

from benchmarks import million_cells
from benchmarks._memory import MemoryWatch, memory_of
from benchmarks._zipf_cells import MEDIAN_MOLECULES, NUM_FILES, write_files


def counts_of(folder) -> list[Any]:
    return [anndata.read_h5ad(path) for path in sorted(folder.iterdir())]


@pytest.mark.slow
def test_each_size_is_measured_and_nothing_is_left_behind(tmp_path, capsys):
    output, place = tmp_path / "out" / "figures.json", tmp_path / "place"
    place.mkdir()
    arguments = ["--cells", "4000", "2000", "--folder", str(place), "--output", str(output)]
    assert million_cells.main(arguments) == 0
    assert not list(place.iterdir())
    first, last = json.loads(output.read_text())["sizes"]
    assert (first["cells"], last["cells"]) == (2000, 4000)
    for figures in (first, last):
        assert figures["parameters"] <= 200_000
        assert (
            0 < figures["first_batch_seconds"] < figures["first_step_seconds"] < figures["training_seconds"]
        )
        assert figures["expression_loss"] < figures["marginal_loss"] + 0.1
        for rank in range(2):
            own, resident = figures[f"rank_own_bytes_{rank}"], figures[f"rank_resident_bytes_{rank}"]
            assert 1e8 < own < resident
    assert last["corpus_bytes"] > 1.5 * first["corpus_bytes"]
    table = output.with_suffix(".md").read_text()
    assert table in capsys.readouterr().out
    assert re.search(r"\| rank 1, own memory \| \d+ MB \| \d+ MB \| x[\d.]+ \| x1 \|", table)


def test_a_disk_that_is_too_small_is_told_before_anything_is_made(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(million_cells.shutil, "disk_usage", lambda _: usage(0, 0, 4_000_000_000))
    monkeypatch.setattr(million_cells, "measure", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit, match="2"):
        million_cells.main(["--cells", "1000000", "--folder", str(tmp_path)])
    assert "5.8 GB are needed, 4.0 GB are free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_to_keep_things_in_that_holds_them_already_is_refused(tmp_path, capsys):
    (tmp_path / "2000").mkdir()
    with pytest.raises(SystemExit, match="2"):
        million_cells.main(["--cells", "2000", "--keep", str(tmp_path)])
    assert "it holds 2000 already; name another folder" in capsys.readouterr().err


def test_memory_that_grows_with_the_cells_is_told_and_time_is_not():
    figures = {name: 100.0 for name in million_cells.ROWS if not name.startswith("rank_")}
    figures |= {f"rank_{kind}_bytes_{rank}": 1e8 for kind in ("own", "mapped", "resident") for rank in (0, 1)}
    slower = {**figures, "first_batch_seconds": 900.0, "rank_mapped_bytes_1": 1e9}
    small, large = {"cells": 1e3, **figures}, {"cells": 1e4, **slower}
    assert million_cells.too_large([small, large]) == []
    assert million_cells.too_large([small, {**large, "rank_own_bytes_1": 1.3e8}]) == ["rank 1, own memory"]
    assert million_cells.too_large([small, {**large, "checkpoint_bytes": 200.0}]) == ["checkpoint"]


def test_the_same_seed_makes_the_same_cells_and_another_seed_others(tmp_path):
    made = {}
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name, 40, 500, seed)
        made[name] = [cells.X.toarray() for cells in counts_of(tmp_path / name)]
    assert all(np.array_equal(*pair) for pair in zip(made["one"], made["same"], strict=True))
    assert not np.array_equal(made["one"][0], made["other"][0])


def test_cells_have_log_normal_depths_and_few_genes_have_most_counts(tmp_path):
    write_files(tmp_path, 2_000, million_cells.NUM_GENES, 0)
    files = counts_of(tmp_path)
    assert len(files) == NUM_FILES and sum(cells.n_obs for cells in files) == 2_000
    assert len({name for cells in files for name in cells.obs["batch"].cat.categories}) == 2 * NUM_FILES
    counts = np.concatenate([np.diff(cells.X.indptr) for cells in files])
    assert 270 < counts.mean() < 340
    totals = np.log(np.concatenate([np.asarray(cells.X.sum(axis=1)).ravel() for cells in files]))
    assert np.median(totals) == pytest.approx(np.log(MEDIAN_MOLECULES), abs=0.05)
    assert totals.std() == pytest.approx(0.4, abs=0.03)
    sums = np.concatenate([np.asarray(cells.X.sum(axis=0)) for cells in files])
    frequencies = np.sort(sums.sum(axis=0))[::-1]
    share = np.cumsum(frequencies) / frequencies.sum()
    assert 0.2 < share[9] < 0.5 and 0.4 < share[99] < 0.75


def test_own_memory_of_a_process_that_was_started_is_seen():
    hold = "import time; held = b'x' * 200_000_000; print('ready', flush=True); time.sleep(1)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True)"
    with subprocess.Popen([sys.executable, "-c", child]) as parent, MemoryWatch(parent.pid, 0.02) as watch:
        parent.wait()
    assert 2e8 < watch.own < 2.6e8
    assert sum(peak.own > 2e8 for peak in watch.peaks.values()) == 1


def test_mapped_pages_of_a_file_are_not_own_memory(tmp_path):
    path = tmp_path / "file"
    np.ones(50_000_000, np.uint8).tofile(path)
    before = memory_of()
    total = int(np.memmap(path, np.uint8).sum())
    mapped = np.memmap(path, np.uint8)
    assert int(mapped.sum()) == total
    after = memory_of()
    assert after.mapped - before.mapped > 4.5e7
    assert abs(after.own - before.own) < 2.5e7
