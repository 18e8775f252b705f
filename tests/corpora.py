"""Small corpora for the tests of readers and loaders, and a file server with range requests."""

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.corpus import CorpusWriter
from data.genes import GeneSpace
from data.manifest import ObsColumn


class Cells(NamedTuple):
    """What was written."""

    offsets: np.ndarray
    genes: np.ndarray
    counts: np.ndarray
    columns: dict[str, np.ndarray]

    def row(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[row], self.offsets[row + 1])
        return self.genes[part], self.counts[part]


def gene_space(num_genes: int) -> GeneSpace:
    names = tuple(f"GENE{index}" for index in range(num_genes))
    return GeneSpace(names, names, "symbol")


def make_cells(num_cells: int, num_genes: int, mean_genes: int, seed: int = 0, min_genes: int = 1) -> Cells:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.poisson(mean_genes, num_cells), min_genes, num_genes)
    genes = np.concatenate([np.sort(rng.choice(num_genes, size, replace=False)) for size in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    columns = {
        "technical_batch": rng.integers(0, 3, num_cells),
        "target_gene": rng.integers(0, 2, num_cells),
        "age": rng.random(num_cells),
    }
    return Cells(offsets, genes.astype(np.int32), rng.geometric(0.3, len(genes)).astype(np.uint16), columns)


def write_corpus(
    folder: Path,
    cells: Cells,
    num_genes: int,
    storage: str = "arrow",
    rows_per_shard: int = 150,
    value_kind: str = "counts",
    columns: tuple[str, ...] = ("technical_batch", "target_gene", "age"),
) -> Path:
    known = {
        "technical_batch": ObsColumn("class", ("lane-a", "lane-b", "lane-c")),
        "target_gene": ObsColumn("class", ("non-targeting", "GENE1")),
        "age": ObsColumn("number", dtype="float64"),
    }
    writer = CorpusWriter(
        folder,
        gene_space(num_genes),
        columns={name: known[name] for name in columns},
        storage=storage,
        rows_per_shard=rows_per_shard,
        value_kind=value_kind,
    )
    with writer:
        writer.write(
            cells.offsets, cells.genes, cells.counts, {name: cells.columns[name] for name in columns}
        )
    return folder


class _RangeHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    answers_ranges = True
    failures: list[int]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        status = 200 if (self.folder / self.path.lstrip("/")).is_file() else 404
        if self.failures:
            status = self.failures.pop(0)
        if status == 0:
            self.close_connection = True
            return
        if status != 200:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = (self.folder / self.path.lstrip("/")).read_bytes()
        asked = self.headers.get("Range", "") if self.answers_ranges else ""
        size = len(content)
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            stop = min(int(last) + 1, size) if last else size
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{size}")
            content = content[int(first) : stop]
        else:
            self.send_response(200)
        if self.answers_ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def file_server(
    folder: Path, answers_ranges: bool = True, failures: list[int] | None = None
) -> Iterator[str]:
    """Serve a folder on the loopback interface; yields its URL.

    Each of `failures` is taken off the list by one request, which gets that status, or for 0 no answer at all.
    """
    handler = type(
        "Handler",
        (_RangeHandler,),
        {
            "folder": folder,
            "answers_ranges": answers_ranges,
            "failures": [] if failures is None else failures,
        },
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
