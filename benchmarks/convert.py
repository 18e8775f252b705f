"""Measure the converter: cells/s and peak memory beside reading the same arrays and beside Hugging Face's way.

Every case runs in a process of its own, after the file has been read once, so that the page cache is warm for
all. Ratios between cases of one run hold; absolute figures depend on how busy the machine is.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

CELLS_FOR_GENERATOR = 2_000
CASES = {
    "h5py": "h5py reads data, indices, indptr",
    "arrow": "trainer.convert_h5ad, genes in the file's order",
    "reordered": "trainer.convert_h5ad, genes in another order, 90 % kept",
    "parquet": "trainer.convert_h5ad --format parquet",
    "generator": f"anndata backed, Dataset.from_generator ({CELLS_FOR_GENERATOR:,} cells)",
}


def main() -> None:
    """Run all cases, or the one that a child process was started for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=50_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--nonzero", type=int, default=1_482, help="expressed genes of a cell, on average")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="where to put temporary files (default: the system's place)"
    )
    parser.add_argument("--case", choices=[*CASES, "write"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case == "write":
        write_h5ad(arguments.folder / "cells.h5ad", arguments.cells, arguments.genes, arguments.nonzero)
        write_gene_list(arguments.folder / "genes.txt", arguments.genes)
        return
    if arguments.case:
        print(json.dumps(run_case(arguments.case, arguments.folder, arguments.jobs)))
        return
    folder = Path(tempfile.mkdtemp(prefix="convert-benchmark-", dir=arguments.folder))
    try:
        # In a process of its own: a child's peak memory starts from what its parent held when it was started.
        shape = ["--cells", arguments.cells, "--genes", arguments.genes, "--nonzero", arguments.nonzero]
        start_case("write", folder, *shape)
        gigabytes = (folder / "cells.h5ad").stat().st_size / 1e9
        print(f"{arguments.cells:,} cells x {arguments.genes:,} genes, {gigabytes:.2f} GB")
        print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; best of {arguments.rounds} rounds")
        results: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
        for _ in range(arguments.rounds):
            for case in CASES:
                results[case].append(json.loads(start_case(case, folder, "--jobs", arguments.jobs)))
        print_table(results)
    finally:
        shutil.rmtree(folder)


def start_case(case: str, folder: Path, *options: object) -> str:
    """Run a case in a process of its own and return the last line it prints."""
    command = [sys.executable, __file__, "--case", case, "--folder", str(folder), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    return done.stdout.rpartition("\n")[0].rpartition("\n")[2]


def run_case(case: str, folder: Path, jobs: int) -> dict[str, float]:
    """Time one case in this process."""
    path, output = folder / "cells.h5ad", folder / f"output-{case}"
    if case == "h5py":
        begin, cpu = time.perf_counter(), time.process_time()
        num_cells = read_arrays(path)
    elif case == "generator":
        import anndata
        import datasets

        datasets.disable_progress_bars()
        file = anndata.read_h5ad(path, backed="r")
        num_cells = min(CELLS_FOR_GENERATOR, file.n_obs)
        begin, cpu = time.perf_counter(), time.process_time()
        made = datasets.Dataset.from_generator(
            backed_rows, gen_kwargs={"path": str(path), "num_cells": num_cells}, cache_dir=str(output)
        )
        assert isinstance(made, datasets.Dataset) and len(made) == num_cells
    else:
        from trainer.convert_h5ad import main as convert

        extra = {
            "arrow": [],
            "reordered": ["--genes", str(folder / "genes.txt")],
            "parquet": ["--format", "parquet"],
        }
        with h5py.File(path) as file:
            indptr: Any = file["X/indptr"]
            num_cells = len(indptr) - 1
        begin, cpu = time.perf_counter(), time.process_time()
        if convert([str(path), "--output", str(output), "--jobs", str(jobs), *extra[case]]):
            raise SystemExit(1)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    shutil.rmtree(output, ignore_errors=True)
    return {
        "cells_per_second": num_cells / seconds,
        "cells_per_cpu": num_cells / cpu_seconds,
        "peak": peak / 1024,
    }


def read_arrays(path: Path) -> int:
    """Read the three arrays of X in slices, as the converter does, and return the number of cells."""
    with h5py.File(path) as file:
        x: Any = file["X"]
        indptr = x["indptr"][:]
        step = 1 << 18
        for start in range(0, int(indptr[-1]), step):
            x["data"][start : start + step]
            x["indices"][start : start + step]
    return len(indptr) - 1


def backed_rows(path: str, num_cells: int) -> Iterator[dict[str, list[int]]]:
    """Yield cells as python lists, as tutorials do, read 512 at a time."""
    import anndata

    matrix: Any = anndata.read_h5ad(path, backed="r").X
    for start in range(0, num_cells, 512):
        rows = matrix[start : min(start + 512, num_cells)]
        for low, high in pairwise(rows.indptr):
            yield {
                "genes": rows.indices[low:high].tolist(),
                "counts": rows.data[low:high].astype(int).tolist(),
            }


def print_table(results: dict[str, list[dict[str, float]]]) -> None:
    """Print the best round of each case and its ratio to reading the arrays."""
    reading = max(result["cells_per_second"] for result in results["h5py"])
    print(f"{'':58} {'cells/s':>10} {'per CPU-s':>10} {'of h5py':>8} {'peak MB':>8}")
    for case, rounds in results.items():
        best = max(rounds, key=lambda result: result["cells_per_second"])
        peak = max(result["peak"] for result in rounds)
        rate = best["cells_per_second"]
        print(
            f"{CASES[case]:58} {rate:10,.0f} {best['cells_per_cpu']:10,.0f} {rate / reading:8.3f} {peak:8.0f}"
        )


def write_gene_list(path: Path, num_genes: int) -> None:
    """Name 90 % of the genes in another order."""
    order = np.random.default_rng(1).permutation(num_genes)[: num_genes * 9 // 10]
    path.write_text("".join(f"{gene_id(gene)}\n" for gene in order))


def gene_id(gene: int) -> str:
    """Return an Ensembl-like id."""
    return f"ENSG{gene:011d}"


def write_h5ad(path: Path, num_cells: int, num_genes: int, nonzero: int) -> None:
    """Write raw counts (CSR, float32) of cells that differ in depth, in anndata's current encoding."""
    rng = np.random.default_rng(0)
    weights = rng.gamma(0.35, size=num_genes).astype(np.float32)
    weights *= nonzero / weights.sum()
    for _ in range(30):  # capping probabilities at 1 loses genes: scale up until the mean is right
        weights *= nonzero / np.minimum(weights, 0.98).sum()
    lengths: list[np.ndarray] = []
    with h5py.File(path, "w") as file:
        x = file.create_group("X")
        x.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [num_cells, num_genes]}
        )
        data, indices = [], []
        for start in range(0, num_cells, 512):
            rows = min(512, num_cells - start)
            depth = rng.lognormal(-0.06, 0.35, (rows, 1)).astype(np.float32)
            rows_at, columns = np.nonzero(rng.random((rows, num_genes), np.float32) < weights * depth)
            indices.append(columns.astype(np.int32))
            data.append((1 + rng.poisson(0.9, len(columns))).astype(np.float32))
            lengths.append(np.bincount(rows_at, minlength=rows))
        x["data"], x["indices"] = np.concatenate(data), np.concatenate(indices)
        x["indptr"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        obs = {
            "_index": [f"cell{i}" for i in range(num_cells)],
            "batch": [f"lane{i % 4}" for i in range(num_cells)],
        }
        for name, columns in (("obs", obs), ("var", {"_index": [gene_id(i) for i in range(num_genes)]})):
            group = file.create_group(name)
            order = [column for column in columns if column != "_index"]
            group.attrs.update(
                {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"}
            )
            group.attrs["column-order"] = np.array(order, dtype=h5py.string_dtype())
            for column, values in columns.items():
                group.create_dataset(column, data=values, dtype=h5py.string_dtype())
                group[column].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})


if __name__ == "__main__":
    main()
