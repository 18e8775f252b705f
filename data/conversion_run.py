"""Run a conversion so that it can be killed at any moment and continued: journal, processes, publishing."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from data.conversion import (
    ConversionPlan,
    FinishedShard,
    ShardConverter,
    SourceCount,
    UnsealedShard,
    is_disk_full,
)
from data.corpus import UNFINISHED, hash_file, open_corpus, publish_corpus, shard_name
from data.errors import DataError
from data.genes import NOT_A_GENE
from data.h5ad import H5adFile
from data.h5ad_matrix import CscMatrix
from data.journal import JournalFile
from data.manifest import Manifest, Shard, SourceRecord, index_ranges

OutputMode = Literal["new", "resume", "overwrite"]
_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Show how far a conversion is."""

    def resume(self, num_cells: int) -> None:
        """Count cells that an earlier run converted."""
        ...

    def add(self, num_cells: int) -> None:
        """Count cells converted now; negative where a shard is begun again."""
        ...

    def say(self, text: str) -> None:
        """Show a line."""
        ...


class ProgressLines:
    """Show how far a conversion is by a line now and then."""

    def __init__(self, doing: str, num_cells: int, say: Callable[[str], None]) -> None:
        """Say `doing` how many of the cells; `say` takes the lines."""
        self._doing, self._num_cells, self._say = doing, num_cells, say
        self._done = 0
        self._last_line = time.monotonic()

    def resume(self, num_cells: int) -> None:
        """Count cells that an earlier run converted."""
        self._done += num_cells

    def add(self, num_cells: int) -> None:
        """Count cells converted now; negative where a shard is begun again."""
        self._done += num_cells
        if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._say(f"{self._doing} {self._done:,} of {self._num_cells:,} cells")

    def say(self, text: str) -> None:
        """Show a line."""
        self._say(text)


@dataclass(frozen=True)
class InputState:
    """Identify the content of an input file without reading it."""

    path: str
    bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> "InputState":
        """Look at a file."""
        status = path.stat()
        return cls(str(path.absolute()), status.st_size, status.st_mtime_ns)


class Journal:
    """Keep, line by line, what of a conversion is finished."""

    def __init__(self, folder: Path) -> None:
        """Read the journal of an unfinished conversion."""
        self.file = JournalFile(folder / UNFINISHED / "journal.jsonl")
        self.start: dict[str, Any] | None = None
        self.shards: dict[int, FinishedShard] = {}
        self.source_hashes: dict[int, str] = {}
        self.transposed: set[int] = set()
        self.is_publishing = False
        self._lock = threading.Lock()
        for record in self.file.read():
            self._take(record)

    def write(self, kind: str, **content: Any) -> None:
        """Add a line that survives a power cut."""
        record = {"kind": kind, **content}
        with self._lock:
            self.file.append(record)
            self._take(record)

    def begin(self, plan: ConversionPlan) -> None:
        """Write the first line: what is converted and how."""
        inputs = [InputState.of(source.path).__dict__ for source in plan.sources]
        self.write("start", inputs=inputs, arguments=plan.arguments())

    def _take(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "start":
            self.start = record
        elif kind == "shard":
            shard = FinishedShard.from_dict(record["shard"])
            self.shards[shard.index] = shard
        elif kind == "source":
            self.source_hashes[record["source"]] = record["sha256"]
        elif kind == "transposed":
            self.transposed.add(record["source"])
        elif kind == "publishing":
            self.is_publishing = True


@dataclass(frozen=True)
class Outcome:
    """Report a finished conversion."""

    manifest: Manifest
    cells_resumed: int
    """Cells of the shards that an earlier, interrupted run had finished."""


def run_conversion(plan: ConversionPlan, *, mode: OutputMode, jobs: int, progress: Progress) -> Outcome:
    """Convert, continuing an interrupted conversion of the same inputs and arguments."""
    finished = check_output(plan, mode)
    if finished is not None:
        progress.say(f"{plan.folder}: already converted from the same inputs with the same arguments")
        return Outcome(finished, finished.num_cells)
    try:
        plan.unfinished.mkdir(parents=True, exist_ok=True)
        with _lock(plan):
            journal = _open_journal(plan, mode)
            with _HashedInputs(plan, journal) as inputs:
                resumed = _convert_shards(plan, journal, jobs, progress)
                inputs.check()
            manifest = _publish(plan, journal)
        shutil.rmtree(plan.unfinished)
    except OSError as error:
        if is_disk_full(error):
            raise DataError(
                f"{plan.folder}: the disk is full ({error.strerror}); finished shards are kept: free some "
                "space and run the same command again to continue"
            ) from error
        raise
    return Outcome(manifest, resumed)


def check_output(plan: ConversionPlan, mode: OutputMode) -> Manifest | None:
    """Refuse a folder that must not be written; return the manifest where nothing is left to be done."""
    folder = plan.folder
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--output {folder}: a file of that name exists")
    content = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if not content:
        return None
    is_complete = "manifest.json" in content
    if not is_complete and UNFINISHED not in content:
        raise DataError(
            f"--output {folder}: the folder holds something else than a corpus; choose another one"
        )
    if is_complete:
        manifest = Manifest.from_json((folder / "manifest.json").read_text(), where=f"{folder}/manifest.json")
        # A journal beside a corpus belongs to an --overwrite that was begun, or to a publishing cut short.
        is_begun = UNFINISHED in content and Journal(folder).start is not None
        if mode == "new" and not is_begun:
            raise DataError(f"--output {folder}: a complete corpus exists there; --overwrite replaces it")
        if mode == "resume" and not is_begun:
            return _same_conversion(plan, manifest)
    return None


def _same_conversion(plan: ConversionPlan, manifest: Manifest) -> Manifest:
    """Return the manifest of a complete corpus if it came from the same inputs and arguments."""
    is_same = manifest.conversion_sha256 == plan.sha256 and all(
        record.bytes == source.path.stat().st_size and record.sha256 == hash_file(source.path)
        for record, source in zip(manifest.sources, plan.sources, strict=True)
    )
    if not is_same:
        raise DataError(
            f"--output {plan.folder}: a complete corpus of other inputs or arguments exists there; "
            "--overwrite replaces it"
        )
    return open_corpus(plan.folder).manifest


def is_complete_as_planned(plan: ConversionPlan) -> bool:
    """Tell whether the folder holds a finished corpus of this plan's arguments."""
    path = plan.folder / "manifest.json"
    if not path.is_file() or (plan.folder / UNFINISHED).exists():
        return False
    return Manifest.from_json(path.read_text(), where=str(path)).conversion_sha256 == plan.sha256


@contextmanager
def _lock(plan: ConversionPlan) -> Iterator[None]:
    """Keep a second conversion out of the folder; the system releases the lock of a killed process."""
    with (plan.unfinished / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"--output {plan.folder}: another conversion is writing there") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise  # some cluster file systems have no locks: there the user has to take care
        yield


def _open_journal(plan: ConversionPlan, mode: OutputMode) -> Journal:
    """Return the journal to go on with, or a new one."""
    journal = Journal(plan.folder)
    if journal.start is not None:
        difference = _difference(plan, journal)
        if difference is None:
            _drop_leftovers(plan, journal)
            return journal
        if mode != "overwrite":
            raise DataError(f"--output {plan.folder}: {difference}; --overwrite starts again")
    for path in plan.unfinished.iterdir():
        if path.name != "lock":
            path.unlink()
    journal = Journal(plan.folder)
    journal.begin(plan)
    return journal


def _difference(plan: ConversionPlan, journal: Journal) -> str | None:
    """Say how an unfinished conversion differs from the plan, None if it can be continued."""
    assert journal.start is not None
    then = [InputState(**state) for state in journal.start["inputs"]]
    now = [InputState.of(source.path) for source in plan.sources]
    if [state.path for state in then] != [state.path for state in now]:
        return "an unfinished conversion of other inputs is there"
    for index, (before, after) in enumerate(zip(then, now, strict=True)):
        is_touched = before.mtime_ns != after.mtime_ns
        if before.bytes != after.bytes or (
            is_touched and journal.source_hashes.get(index) != hash_file(plan.sources[index].path)
        ):
            return f"the input {after.path} has changed since this conversion was begun"
    arguments = json.loads(json.dumps(plan.arguments()))
    others = [name for name, value in arguments.items() if journal.start["arguments"].get(name) != value]
    if others:
        return f"an unfinished conversion with other arguments is there (they differ in: {', '.join(others)})"
    return None


def _drop_leftovers(plan: ConversionPlan, journal: Journal) -> None:
    """Forget shards whose file is not as recorded and delete files that nothing records."""
    for index, shard in list(journal.shards.items()):
        part = plan.unfinished / shard.file
        is_whole = part.is_file() and part.stat().st_size == shard.bytes
        if not is_whole and not journal.is_publishing:
            del journal.shards[index]
    known = {shard.file for shard in journal.shards.values()} | {"lock", journal.file.path.name}
    for source in journal.transposed:
        known |= {plan.transposed(source).name, f"{plan.transposed(source).name}.indptr"}
    for path in plan.unfinished.iterdir():
        if path.name not in known:
            path.unlink(missing_ok=True)  # a worker of the killed run may still have renamed it


def _convert_shards(plan: ConversionPlan, journal: Journal, jobs: int, progress: Progress) -> int:
    """Make the shards that are not there; return how many cells an earlier run had done."""
    done = sum(segment.stop - segment.start for shard in journal.shards for segment in plan.segments(shard))
    if done:
        progress.say(f"continuing: {len(journal.shards)} of {plan.num_shards} shards are finished")
        progress.resume(done)
    missing = [shard for shard in range(plan.num_shards) if shard not in journal.shards]
    if missing:
        _transpose(plan, journal, progress)
    _convert_some(plan, journal, missing, jobs, progress.add)
    widest = _widest(plan, journal)
    narrow = [index for index, shard in journal.shards.items() if shard.count_dtype != widest]
    if narrow:
        progress.say(f"a count above 65535: {len(narrow)} shards are written again with {widest} counts")
        _convert_some(plan, journal, narrow, jobs, lambda _: None)
    return done


def _widest(plan: ConversionPlan, journal: Journal) -> str:
    is_wide = any(shard.count_dtype == "uint32" for shard in journal.shards.values())
    return "uint32" if is_wide else plan.count_dtype


def _transpose(plan: ConversionPlan, journal: Journal, progress: Progress) -> None:
    """Bring matrices that are stored by genes (CSC) into the order of cells, in a file."""
    for index, source in enumerate(plan.sources):
        if index in journal.transposed:
            continue
        with H5adFile(source.path) as file:
            matrix = file.matrix(source.matrix)
            if isinstance(matrix, CscMatrix):
                progress.say(
                    f"{source.path.name}: {source.matrix} is stored by genes (CSC): reordering on disk"
                )
                matrix.transpose_to(plan.transposed(index))
                journal.write("transposed", source=index)


def _convert_some(
    plan: ConversionPlan, journal: Journal, shards: list[int], jobs: int, on_cells: Callable[[int], None]
) -> None:
    if jobs > 1 and len(shards) > 1:
        _convert_in_processes(plan, journal, shards, min(jobs, len(shards)), on_cells)
        return
    with ShardConverter(plan) as converter, ThreadPoolExecutor(1) as sealer:
        sealing: Future[FinishedShard] | None = None
        try:
            for shard in shards:
                unsealed = converter.convert(shard, _widest(plan, journal), on_cells)
                previous, sealing = sealing, sealer.submit(UnsealedShard.seal, unsealed)
                if previous is not None:
                    journal.write("shard", shard=previous.result().to_dict())
        finally:
            if sealing is not None:
                journal.write("shard", shard=sealing.result().to_dict())


def _convert_in_processes(
    plan: ConversionPlan, journal: Journal, shards: list[int], jobs: int, on_cells: Callable[[int], None]
) -> None:
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(plan,)
    )
    dtype = _widest(plan, journal)
    futures = {pool.submit(_convert_in_worker, shard, dtype): shard for shard in shards}
    failure: BaseException | None = None
    try:
        for future in as_completed(futures):
            if future.cancelled():
                continue
            error = future.exception()
            if error is None:
                journal.write("shard", shard=future.result().to_dict())
                on_cells(sum(each.stop - each.start for each in plan.segments(futures[future])))
            elif failure is None:
                failure = error
                for other in futures:
                    other.cancel()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if isinstance(failure, BrokenProcessPool):
        raise DataError(
            f"{plan.folder}: a worker process was killed, for want of memory perhaps; finished shards are "
            "kept: run the same command again, with fewer --jobs"
        ) from failure
    if failure is not None:
        raise failure


_worker: ShardConverter | None = None


def _begin_worker(plan: ConversionPlan) -> None:
    """Prepare a worker process, which ends with its parent and leaves Ctrl-C to it."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = ShardConverter(plan)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _convert_in_worker(shard: int, count_dtype: str) -> FinishedShard:
    assert _worker is not None
    return _worker.convert(shard, count_dtype, lambda _: None).seal()


class _HashedInputs:
    """Hash the inputs beside the conversion and raise where one is not what the conversion began with."""

    def __init__(self, plan: ConversionPlan, journal: Journal) -> None:
        self.plan = plan
        self.journal = journal
        self._stop = threading.Event()
        self._states = [InputState.of(source.path) for source in plan.sources]
        self._pool = ThreadPoolExecutor(1)
        self._hashes = [self._pool.submit(self._hash, index) for index in range(len(plan.sources))]

    def __enter__(self) -> "_HashedInputs":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def check(self) -> None:
        """Wait for the hashes and compare with what was recorded, and the files with their state at first."""
        for index, (source, digest) in enumerate(zip(self.plan.sources, self._hashes, strict=True)):
            is_same = digest.result() == self.journal.source_hashes[index]
            if not is_same or InputState.of(source.path) != self._states[index]:
                raise DataError(
                    f"--output {self.plan.folder}: the input {source.path} has changed since this conversion "
                    "was begun; --overwrite starts again"
                )

    def _hash(self, index: int) -> str:
        digest = hashlib.sha256()
        with self.plan.sources[index].path.open("rb", buffering=0) as file:
            while not self._stop.is_set() and (block := file.read(1 << 20)):
                digest.update(block)
        if not self._stop.is_set() and index not in self.journal.source_hashes:
            self.journal.write("source", source=index, sha256=digest.hexdigest())
        return digest.hexdigest()


def _publish(plan: ConversionPlan, journal: Journal) -> Manifest:
    """Give the shards their final names and write the description, last of all what makes it loadable."""
    shards = [journal.shards[index] for index in sorted(journal.shards) if journal.shards[index].rows]
    if not shards:
        raise DataError(
            f"no cell is left: all {plan.num_cells} have fewer than {plan.min_genes} expressed genes of the "
            f"{len(plan.gene_space)} in the gene space (--min-genes, --genes)"
        )
    if not journal.is_publishing:
        journal.write("publishing")
    named = tuple(
        Shard(shard_name(index, len(shards), plan.storage), shard.rows, shard.sha256, shard.bytes)
        for index, shard in enumerate(shards)
    )
    batches = plan.columns.get("technical_batch")
    manifest = Manifest(
        value_kind=plan.value_kind,
        count_dtype=shards[0].count_dtype,
        num_cells=sum(shard.rows for shard in shards),
        n_nonzero=sum(shard.n_nonzero for shard in shards),
        storage=plan.storage,
        gene_sha256=plan.gene_space.sha256,
        shards=named,
        sources=_source_records(plan, journal),
        technical_batches=batches.names if batches else (),
        control_label=plan.control_label,
        columns=plan.columns,
        conversion_sha256=plan.sha256,
    )
    publish_corpus(plan.folder, manifest, plan.gene_space, [plan.unfinished / shard.file for shard in shards])
    return open_corpus(plan.folder).manifest


def _source_records(plan: ConversionPlan, journal: Journal) -> tuple[SourceRecord, ...]:
    records = []
    for index, source in enumerate(plan.sources):
        total = SourceCount()
        for _, shard in sorted(journal.shards.items()):
            count = shard.sources.get(index, SourceCount())
            total.rows += count.rows
            total.cells_dropped += count.cells_dropped
            total.sum_all += count.sum_all
            total.sum_kept += count.sum_kept
        measured = np.unique(source.remap[source.remap >= 0])
        records.append(
            SourceRecord(
                path_name=source.path.name,
                sha256=journal.source_hashes[index],
                bytes=source.path.stat().st_size,
                rows=total.rows,
                matrix=source.matrix,
                genes_total=int(np.count_nonzero(source.remap != NOT_A_GENE)),
                genes_matched=len(measured),
                counts_dropped_fraction=1 - total.sum_kept / total.sum_all if total.sum_all else 0.0,
                cells_dropped=total.cells_dropped,
                measured_genes=index_ranges(measured),
            )
        )
    return tuple(records)
