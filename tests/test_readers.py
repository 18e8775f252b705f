import gc
import os
import pickle
import shutil
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from data.columns import RaggedColumn
from data.corpus import open_corpus
from data.errors import DataError
from data.mapped_shards import MappedShards
from data.readers import ArrowReader, CorpusReader, ParquetReader, RaggedBatch, open_reader
from tests.corpora import Cells, file_server, make_cells, write_corpus

NUM_GENES = 300
NOTHING = np.empty(0, np.int64)


@pytest.fixture(scope="module")
def cells() -> Cells:
    return make_cells(2500, NUM_GENES, 40, min_genes=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, cells: Cells) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("corpora")
    return {
        storage: write_corpus(root / storage, cells, NUM_GENES, storage, rows_per_shard=1100)
        for storage in ("arrow", "parquet")
    }


def assert_same(first: RaggedBatch, second: RaggedBatch) -> None:
    for one, other in zip(first[:3], second[:3], strict=True):
        assert one.dtype == other.dtype and np.array_equal(one, other)
    assert first.columns.keys() == second.columns.keys()
    for name, column in first.columns.items():
        assert column.dtype == second.columns[name].dtype and np.array_equal(column, second.columns[name])


def assert_as_written(batch: RaggedBatch, cells: Cells, rows: np.ndarray) -> None:
    assert len(batch) == len(rows)
    for index, row in enumerate(rows):
        part = slice(batch.offsets[index], batch.offsets[index + 1])
        genes, counts = cells.row(row)
        assert np.array_equal(batch.genes[part], genes) and np.array_equal(batch.counts[part], counts)
    for name, column in cells.columns.items():
        assert np.array_equal(batch.columns[name], column[rows])


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_rows_come_back_as_written_in_any_order(storage: str, folders: dict[str, Path], cells: Cells):
    reader = open_reader(open_corpus(folders[storage]))
    assert reader.num_rows == 2500
    rng = np.random.default_rng(0)
    for rows in [np.array([7, 7, 2499, 0]), rng.permutation(2500)[:300], np.arange(1090, 1120), NOTHING]:
        assert_as_written(reader.read(rows), cells, rows)


@pytest.mark.parametrize("mean_genes", [3, 200])
def test_short_and_long_rows_are_gathered_alike(mean_genes: int, tmp_path: Path):
    cells = make_cells(200, NUM_GENES, mean_genes, min_genes=0)
    reader = open_reader(open_corpus(write_corpus(tmp_path / "corpus", cells, NUM_GENES)))
    rows = np.random.default_rng(1).permutation(200)
    assert_as_written(reader.read(rows), cells, rows)


def test_total_and_number_of_genes_are_read(folders: dict[str, Path], cells: Cells):
    rows = np.arange(100, 140)
    columns = ArrowReader(open_corpus(folders["arrow"]), ["total", "n_genes"]).read(rows).columns
    assert columns.keys() == {"total", "n_genes"}
    assert columns["total"].tolist() == [cells.row(row)[1].sum() for row in rows]
    assert columns["n_genes"].tolist() == [len(cells.row(row)[0]) for row in rows]


def test_all_sources_of_a_corpus_give_the_same_cells(folders: dict[str, Path]):
    remote = fsspec.filesystem("memory")
    for file in folders["parquet"].iterdir():
        remote.pipe(f"/readers/{file.name}", file.read_bytes())
    arrow = ArrowReader(open_corpus(folders["arrow"]))
    with file_server(folders["parquet"]) as url:
        paths = [str(folders["parquet"]), f"file://{folders['parquet']}", "memory://readers", url]
        others = [ParquetReader(open_corpus(path)) for path in paths]
        for seed in range(3):
            rows = np.random.default_rng(seed).permutation(2500)[:200]
            for other in others:
                assert_same(arrow.read(rows), other.read(rows))
    remote.rm("/readers", recursive=True)


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_announced_rows_are_the_same_rows(storage: str, folders: dict[str, Path], cells: Cells):
    reader = open_reader(open_corpus(folders[storage]))
    rng = np.random.default_rng(3)
    for _ in range(5):
        window = rng.permutation(2500)[:400]
        reader.expect(window)
        assert_as_written(reader.read(window[:100]), cells, window[:100])
        mixed = np.concatenate([window[200:210], rng.integers(0, 2500, 20)])
        assert_as_written(reader.read(mixed), cells, mixed)
    reader.expect(NOTHING)
    assert_as_written(reader.read(window[:5]), cells, window[:5])


def test_announced_row_groups_are_fetched_once(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    reader = ParquetReader(open_corpus(folders["parquet"]), groups_kept=1)
    decoded: list[tuple[int, int]] = []
    decode = reader.table._decode

    def count(shard: int, group: int):
        decoded.append((shard, group))
        return decode(shard, group)

    monkeypatch.setattr(reader.table, "_decode", count)
    window = np.random.default_rng(0).permutation(2500)
    reader.expect(window)
    for start in range(0, 2500, 50):
        reader.read(window[start : start + 50])
    reader.expect(NOTHING)
    assert len(decoded) == len(set(decoded)) == 5  # shards of 1100, 1100 and 300 rows in row groups of 1024


def test_only_a_few_decoded_row_groups_are_kept(folders: dict[str, Path]):
    reader = ParquetReader(open_corpus(folders["parquet"]), groups_kept=2)
    reader.read(np.arange(0, 2500, 10))
    assert len(reader.table._groups) == 2
    for seed in range(8):
        reader.expect(np.random.default_rng(seed).permutation(2500)[:10])
    assert len(reader.table._expected) == 3
    reader.expect(NOTHING)


def test_reading_ahead_stops_and_leaves_no_thread(folders: dict[str, Path]):
    before = set(threading.enumerate())
    reader = ParquetReader(open_corpus(folders["parquet"]))
    reader.expect(np.arange(2500))
    assert set(threading.enumerate()) > before
    reader.expect(NOTHING)
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_a_reader_travels_to_another_process(storage: str, folders: dict[str, Path], cells: Cells):
    reader = open_reader(open_corpus(folders[storage]))
    rows = np.array([5, 2000, 1099])
    reader.read(rows)
    copy: CorpusReader = pickle.loads(pickle.dumps(reader))
    assert_as_written(copy.read(rows), cells, rows)


def test_files_stay_closed_after_mapping(folders: dict[str, Path]):
    reader = ArrowReader(open_corpus(folders["arrow"]))
    reader.read(np.arange(0, 2500, 100))
    opened = [
        os.readlink(f"/proc/self/fd/{number}")
        for number in os.listdir("/proc/self/fd")
        if os.path.islink(f"/proc/self/fd/{number}")
    ]
    assert not [path for path in opened if path.endswith(".arrow")]


def test_readers_of_the_same_files_share_their_maps(folders: dict[str, Path], tmp_path: Path):
    info = open_corpus(shutil.copytree(folders["arrow"], tmp_path / "corpus"))

    def maps() -> int:
        return sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())

    first, second = ArrowReader(info), ArrowReader(info)
    wanted = first.read(np.arange(2500))
    assert maps() == 3
    assert_same(second.read(np.arange(2500)), wanted)
    assert maps() == 3
    # Another file in the place of one that is mapped is another map.
    shard = Path(info.shard_paths[0])
    shard.with_suffix(".new").write_bytes(shard.read_bytes())
    shard.with_suffix(".new").replace(shard)
    third = ArrowReader(info)
    assert_same(third.read(np.arange(2500)), wanted)
    assert maps() == 4
    del first, second, third, wanted
    gc.collect()
    assert maps() == 0


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_a_row_outside_the_corpus_is_refused(storage: str, folders: dict[str, Path]):
    reader = open_reader(open_corpus(folders[storage]))
    for row in (-1, 2500):
        with pytest.raises(DataError, match="2500"):
            reader.read(np.array([0, row]))


def test_an_unknown_column_is_refused_with_those_there_are(folders: dict[str, Path]):
    with pytest.raises(DataError, match="no column donor; it has: technical_batch, target_gene, age"):
        ArrowReader(open_corpus(folders["arrow"]), ["donor"])


def test_an_arrow_corpus_elsewhere_is_refused(folders: dict[str, Path]):
    remote = fsspec.filesystem("memory")
    for file in folders["arrow"].iterdir():
        remote.pipe(f"/arrow/{file.name}", file.read_bytes())
    with pytest.raises(DataError, match="--format parquet"):
        open_reader(open_corpus("memory://arrow"))
    remote.rm("/arrow", recursive=True)


def test_a_server_without_range_requests_is_named(folders: dict[str, Path]):
    with file_server(folders["parquet"], answers_ranges=False) as url:
        reader = ParquetReader(open_corpus(url))
        with pytest.raises((DataError, ValueError), match="range"):
            reader.read(np.array([0]))


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.remote.WAITS", (0.01, 0.02))


@pytest.mark.parametrize("status", [503, 429, 408, 0])
@pytest.mark.usefixtures("short_waits")
def test_a_server_that_fails_for_a_moment_is_asked_again(status: int, folders: dict[str, Path], cells: Cells):
    failures: list[int] = []
    with file_server(folders["parquet"], failures=failures) as url:
        reader = ParquetReader(open_corpus(url))
        for rows in (np.array([200, 3]), np.array([900, 2499])):
            failures += [status, status]
            assert_as_written(reader.read(rows), cells, rows)
            assert not failures


@pytest.mark.usefixtures("short_waits")
def test_a_server_that_fails_for_long_is_not_taken_for_a_mistake_of_the_user(folders: dict[str, Path]):
    failures: list[int] = []
    with file_server(folders["parquet"], failures=failures) as url:
        reader = ParquetReader(open_corpus(url))
        failures += [503] * 20
        with pytest.raises(ConnectionError, match=r"after 3 attempts \(the server answered 503"):
            reader.read(np.array([0]))
        failures.clear()


def test_a_refusal_is_told_at_once(folders: dict[str, Path]):
    failures: list[int] = []
    with file_server(folders["parquet"], failures=failures) as url:
        reader = ParquetReader(open_corpus(url))
        failures += [403] * 20
        with pytest.raises(DataError, match=r"parquet: cannot be read \(the server answered 403 Forbidden\)"):
            reader.read(np.array([0]))
        assert len(failures) > 10
        with pytest.raises(DataError, match=r"manifest.json cannot be read \(the server answered 403"):
            open_corpus(url)
        failures.clear()


def test_waiting_for_a_server_ends_with_the_reading_ahead(folders: dict[str, Path]):
    failures: list[int] = []
    with file_server(folders["parquet"], failures=failures) as url:
        reader = ParquetReader(open_corpus(url))
        failures += [503] * 20
        reader.expect(np.arange(5))
        while len(failures) == 20:
            time.sleep(0.001)
        reader.expect(np.arange(0))  # else it would wait for half a minute
        assert len(failures) > 10
        failures.clear()


def write_stream(path: Path, table: pa.Table, **options: object) -> str:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=7)
    return str(path)


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list])
def test_arrow_lists_of_any_kind_are_gathered(compression: str | None, list_type, tmp_path: Path):
    lists = [list(range(row % 90)) for row in range(40)]
    table = pa.table({"ids": pa.array(lists, list_type(pa.int64())), "size": [len(row) for row in lists]})
    options = pa.ipc.IpcWriteOptions(compression=compression)
    paths = [write_stream(tmp_path / f"{i}", table.slice(i * 20, 20), options=options) for i in range(2)]
    shards = MappedShards(paths, [20, 20], ["ids", "size"])
    rows = np.array([39, 0, 20, 7, 19])
    columns = shards.gather(rows)
    assert columns["size"].tolist() == [len(lists[row]) for row in rows]
    assert columns["ids"].values.tolist() == [value for row in rows for value in lists[row]]
    shards.expect(np.arange(40))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([[1], None]), "missing values"),
        (pa.array([[1], [None]]), "missing values"),
        (pa.array([1, None]), "missing values"),
        (pa.array(["a", "b"]), "only numbers and lists of numbers"),
        (pa.array([["a"], ["b"]]), "only numbers and lists of numbers"),
    ],
)
def test_columns_that_cannot_be_gathered_are_refused(column: pa.Array, message: str, tmp_path: Path):
    path = write_stream(tmp_path / "file", pa.table({"x": column}))
    with pytest.raises(DataError, match=message):
        MappedShards([path], [2], ["x"]).gather(np.array([0]))


def test_damaged_arrow_files_are_refused(tmp_path: Path):
    table = pa.table({"x": pa.array([[1, 2, 3]] * 20)})
    path = write_stream(tmp_path / "file", table)
    with pytest.raises(DataError, match="holds 20 rows, not 21"):
        MappedShards([path], [21], ["x"]).gather(np.array([0]))
    with pytest.raises(DataError, match="no column y; it has: x"):
        MappedShards([path], [20], ["y"]).gather(np.array([0]))
    Path(path).write_bytes(b"no arrow" * 10)
    with pytest.raises(DataError, match="Arrow stream file"):
        MappedShards([path], [20], ["x"]).gather(np.array([0]))


def test_a_list_that_points_outside_its_file_is_refused(tmp_path: Path):
    table = pa.table({"x": pa.array([[1, 2, 3], [4, 5, 6]], pa.list_(pa.int64()))})
    path = Path(write_stream(tmp_path / "file", table))
    content = path.read_bytes()
    offsets = np.array([0, 3, 6], np.int32).tobytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, np.array([0, 3, 2**30], np.int32).tobytes()))
    shards = MappedShards([str(path)], [2], ["x"])
    with pytest.raises(DataError, match="lies outside the file, which is damaged"):
        shards.gather(np.array([0, 1]))


@pytest.mark.parametrize("length", [2**20, 2**61, -1])
def test_a_list_whose_values_are_said_to_be_more_than_there_are_is_refused(length: int, tmp_path: Path):
    """Its offsets fit what is said, so that only the bytes of the file tell."""
    values = np.arange(777, dtype=np.int64)
    path = Path(write_stream(tmp_path / "file", pa.table({"x": pa.array([values], pa.list_(pa.int64()))})))
    content, said = path.read_bytes(), np.array([777], np.int64).tobytes()
    metadata = content[: content.index(values.tobytes())]
    place = metadata.index(said)
    changed = bytearray(content)
    changed[place : place + 8] = np.array([length], np.int64).tobytes()
    offsets = np.array([0, 777], np.int32).tobytes()
    place = metadata.index(offsets)
    changed[place : place + 8] = np.array([0, min(max(length, 777), 2**31 - 1)], np.int32).tobytes()
    path.write_bytes(changed)
    with pytest.raises(DataError, match="Arrow stream file|outside the file, which is damaged"):
        MappedShards([str(path)], [1], ["x"]).gather(np.array([0]))


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
@pytest.mark.parametrize("column", ["genes", "technical_batch", "source"])
@pytest.mark.parametrize("is_negative", [False, True])
def test_an_index_that_stands_for_nothing_is_refused(
    storage: str, column: str, is_negative: bool, cells: Cells, tmp_path: Path
):
    """As -1 it would count from the end, and as a token stand for another one."""
    folder = write_corpus(tmp_path / "corpus", cells, 400, storage)
    reader = open_reader(open_corpus(folder))
    gather = reader.table.gather

    def changed(rows: np.ndarray) -> dict:
        found = dict(gather(rows))
        values = found[column]
        array = values.values.copy() if isinstance(values, RaggedColumn) else values.copy()
        array[0] = -1 if is_negative else 400
        found[column] = RaggedColumn.flat(values.offsets, array) if column == "genes" else array
        return found

    reader.table.gather = changed
    with pytest.raises(DataError, match=f"column '{column}' holds a number outside of the"):
        reader.read(np.arange(3))


def test_a_truncated_parquet_file_is_refused(folders: dict[str, Path], tmp_path: Path):
    remote = fsspec.filesystem("memory")
    for file in folders["parquet"].iterdir():
        content = file.read_bytes()
        remote.pipe(f"/cut/{file.name}", content[:-100] if file.suffix == ".parquet" else content)
    with pytest.raises(DataError, match="not a Parquet file, or cut short"):
        ParquetReader(open_corpus("memory://cut")).read(np.array([0]))
    remote.rm("/cut", recursive=True)


def test_damaged_bytes_of_a_parquet_file_end_in_an_error_or_in_cells(tmp_path: Path):
    """Cells that are read are of the gene space, whatever bytes they came from."""
    folder = write_corpus(tmp_path / "corpus", make_cells(30, 20, 5), 20, "parquet")
    file = next(folder.glob("*.parquet"))
    content, rng, num_refused = file.read_bytes(), np.random.default_rng(0), 0
    for _ in range(200):
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 2):
            changed[place] = rng.integers(256)
        file.write_bytes(changed)
        try:
            cells = open_reader(open_corpus(folder)).read(np.arange(30))
            assert len(cells) == 30 and cells.genes.min() >= 0 and cells.genes.max() < 20
        except DataError:
            num_refused += 1
    assert num_refused > 50
