import errno
import json
import os
import shutil
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from corpora import file_server
from fsspec.implementations.local import LocalFileSystem

from data.corpus import ROWS_PER_BATCH, CorpusWriter, open_corpus
from data.corpus_check import check_corpus
from data.errors import DataError
from data.genes import GeneSpace
from data.manifest import ObsColumn, corpus_schema, index_ranges
from trainer import __main__ as command_line

SPACE = GeneSpace(("A", "B", "C", "D"), ("A", "B", "C", "D"), "symbol")
COLUMNS = {
    "technical_batch": ObsColumn("class", ("day1", "day2")),
    "dose": ObsColumn("number", dtype="float64"),
}


def write_small(folder: Path, **settings) -> Path:
    with CorpusWriter(folder, SPACE, columns=COLUMNS, rows_per_shard=2, **settings) as writer:
        writer.write(
            np.array([0, 2, 2, 5]),
            np.array([0, 3, 0, 1, 2]),
            np.array([7, 65535, 1, 2, 3]),
            {"technical_batch": np.array([1, 0, 1]), "dose": np.array([0.5, np.nan, 2.0])},
        )
    return folder


def test_a_written_corpus_opens_with_its_description(tmp_path):
    info = open_corpus(write_small(tmp_path / "c", control_label="A"))
    assert info.num_cells == 3
    assert info.gene_space == SPACE
    assert info.columns == COLUMNS
    assert info.class_names("technical_batch") == ("day1", "day2")
    assert info.manifest.technical_batches == ("day1", "day2")
    assert info.manifest.control_label == "A"
    assert info.manifest.n_nonzero == 5
    assert [shard.file for shard in info.manifest.shards] == [
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]
    assert info.shard_rows == [2, 1]
    assert not (tmp_path / "c" / ".unfinished").exists()


def test_hugging_face_datasets_opens_the_arrow_corpus_with_class_names(tmp_path):
    dataset = datasets.load_from_disk(str(write_small(tmp_path / "c")))
    assert dataset.features["technical_batch"] == datasets.ClassLabel(names=["day1", "day2"])
    assert dataset[2] == {
        "genes": [0, 1, 2], "counts": [1, 2, 3], "technical_batch": 1, "dose": 2.0, "source": 0, "total": 6.0,
        "n_genes": 3,
    }  # fmt: skip
    assert dataset[1]["genes"] == []
    assert dataset[0]["counts"] == [7, 65535]


def test_the_schema_is_the_one_that_datasets_itself_would_write():
    features = datasets.Features(
        {
            "genes": datasets.List(datasets.Value("int32")),
            "counts": datasets.List(datasets.Value("uint16")),
            "technical_batch": datasets.ClassLabel(names=["day1", "day2"]),
            "dose": datasets.Value("float64"),
            "source": datasets.Value("int16"),
            "total": datasets.Value("float32"),
            "n_genes": datasets.Value("int32"),
        }
    )
    ours = corpus_schema("uint16", COLUMNS)
    assert ours.equals(features.arrow_schema)
    theirs = features.arrow_schema.metadata[b"huggingface"]
    assert json.loads(ours.metadata[b"huggingface"]) == json.loads(theirs)


def test_the_parquet_corpus_holds_the_same_rows_as_the_arrow_one(tmp_path):
    arrow = datasets.load_from_disk(str(write_small(tmp_path / "a")))
    folder = write_small(tmp_path / "p", storage="parquet")
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset(
        "parquet", data_files=f"{folder}/*.parquet", split="train", cache_dir=cache
    )
    assert loaded.features == arrow.features
    assert loaded.remove_columns("dose").to_list() == arrow.remove_columns("dose").to_list()
    group = pq.ParquetFile(folder / "data-00000-of-00002.parquet").metadata.row_group(0)
    assert "DELTA_BINARY_PACKED" in group.column(0).encodings
    assert "BYTE_STREAM_SPLIT" in group.column(1).encodings
    assert group.column(0).compression == "ZSTD"
    assert not (folder / "state.json").exists()


def test_record_batches_hold_at_most_the_documented_rows(tmp_path):
    rows = ROWS_PER_BATCH + 5
    with CorpusWriter(tmp_path / "c", SPACE) as writer:
        writer.write(np.arange(rows + 1), np.zeros(rows), np.ones(rows))
    with pa.ipc.open_stream(str(tmp_path / "c" / "data-00000-of-00001.arrow")) as reader:
        assert [batch.num_rows for batch in reader] == [ROWS_PER_BATCH, 5]


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_corpus_without_its_last_files_is_not_finished(tmp_path, name):
    folder = write_small(tmp_path / "c")
    (folder / name).unlink()
    with pytest.raises(DataError, match="conversion not finished: run the same command again"):
        open_corpus(folder)


def test_a_missing_folder_names_the_converter(tmp_path):
    with pytest.raises(DataError, match=r"no such folder.*convert_h5ad"):
        open_corpus(tmp_path / "absent")


@pytest.mark.parametrize("where", ["cat_file", "is_dir"])
def test_a_folder_without_permission_is_named(tmp_path, monkeypatch, where):
    folder = write_small(tmp_path / "c")

    def refuse(*arguments):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(LocalFileSystem if where == "cat_file" else Path, where, refuse)
    with pytest.raises(DataError, match=r"/c: .*cannot be (read|opened) \(Permission denied\)"):
        open_corpus(folder)
    with pytest.raises(DataError, match=r"/c: .*cannot be (read|opened) \(Permission denied\)"):
        check_corpus(folder)


def test_a_host_that_cannot_be_reached_is_named(tmp_path):
    with file_server(tmp_path) as url:
        pass
    with pytest.raises(DataError, match=rf"{url}/c: manifest.json cannot be read \(.*[Cc]onnect"):
        open_corpus(f"{url}/c")


def test_a_shard_of_the_wrong_size_is_refused(tmp_path):
    folder = write_small(tmp_path / "c")
    shard = folder / "data-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow has \d+ bytes, not \d+"):
        open_corpus(folder)
    shard.unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow is missing"):
        open_corpus(folder)


def test_another_gene_space_than_the_manifest_names_is_refused(tmp_path):
    folder = write_small(tmp_path / "c")
    other = GeneSpace(("A", "B", "D", "C"), ("A", "B", "D", "C"), "symbol")
    (folder / "genes.json").write_text(other.to_json())
    with pytest.raises(DataError, match="is not the gene space that manifest.json was written with"):
        open_corpus(folder)


def test_another_format_version_is_refused(tmp_path):
    folder = write_small(tmp_path / "c")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(DataError, match="corpus format 2 is not 1"):
        open_corpus(folder)


def changed_manifest(folder, change):
    """Let `change` edit the manifest of a corpus in place, and return the folder."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("value_kind", "other", "value_kind"),
        ("count_dtype", "O", "count_dtype"),
        ("storage", "pickle", "storage"),
        ("technical_batches", [["a"]], "a name"),
        ("control_label", 5, "a name"),
        ("columns", {"genes": {"kind": "number", "dtype": "int64"}}, "columns"),
        ("columns", {"age": {"kind": "number", "dtype": "O"}}, "columns"),
        ("gene_sha256", "0" * 63, "sha256"),
        ("conversion_sha256", 5, "sha256"),
        ("technical_batches", ["\ud800"], "a name"),
        ("columns", {"\ud800": {"kind": "number", "dtype": "int64"}}, "a name"),
        ("num_cells", [], "do not add up"),
        ("num_cells", 3.0, "do not add up"),
    ],
)
def test_a_manifest_that_no_conversion_wrote_is_refused(tmp_path, key, value, message):
    folder = changed_manifest(write_small(tmp_path / "c"), lambda manifest: manifest.update({key: value}))
    with pytest.raises(DataError, match=message):
        open_corpus(folder)


@pytest.mark.parametrize("value", ["3", 3.0, -1, True, None])
def test_a_shard_whose_rows_are_no_count_is_refused(tmp_path, value):
    def change(manifest):
        manifest["shards"][0]["rows"] = value

    with pytest.raises(DataError, match="rows and bytes"):
        open_corpus(changed_manifest(write_small(tmp_path / "c"), change))


@pytest.mark.parametrize("value", [None, "\ud800", "", "0" * 65, ["0" * 64]])
def test_a_shard_whose_hash_is_none_is_refused(tmp_path, value):
    def change(manifest):
        manifest["shards"][0]["sha256"] = value

    with pytest.raises(DataError, match="sha256: what it says is nothing that a conversion writes"):
        open_corpus(changed_manifest(write_small(tmp_path / "c"), change))


@pytest.mark.parametrize("name", ["manifest.json", "genes.json", "state.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused(tmp_path, name):
    folder = write_small(tmp_path / "c")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match=f"{name} cannot be read .it is no regular file"):
        open_corpus(folder)


@pytest.mark.parametrize("file", ["../{}", "{folder}/{}", "./{}", ""])
def test_a_shard_outside_of_the_corpus_is_refused(tmp_path, file):
    folder = write_small(tmp_path / "c")

    def change(manifest):
        shard = manifest["shards"][0]
        shutil.copy(folder / shard["file"], tmp_path)
        shard["file"] = file.format(shard["file"], folder=tmp_path)

    with pytest.raises(DataError, match="a shard's file"):
        open_corpus(changed_manifest(folder, change))


def test_a_shard_that_is_named_twice_is_refused(tmp_path):
    def change(manifest):
        manifest["shards"] *= 2
        manifest["num_cells"] *= 2

    with pytest.raises(DataError, match="a shard's file"):
        open_corpus(changed_manifest(write_small(tmp_path / "c"), change))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' + "9" * 5_000 + "}"])
def test_a_manifest_that_python_cannot_parse_is_refused(tmp_path, text):
    folder = write_small(tmp_path / "c")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="not a corpus manifest"):
        open_corpus(folder)


def test_a_corpus_opens_through_an_fsspec_url(tmp_path):
    local = open_corpus(write_small(tmp_path / "c"))
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "c"), "/corpora/c", recursive=True)
    try:
        info = open_corpus("memory://corpora/c")
        assert info.manifest == local.manifest
        assert info.fingerprint == local.fingerprint
        with info.filesystem.open(info.shard_paths[0]) as file:
            assert file.read() == (tmp_path / "c" / "data-00000-of-00002.arrow").read_bytes()
    finally:
        memory.rm("/corpora", recursive=True)


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    folder = write_small(tmp_path / "c")
    shutil.copytree(folder, tmp_path / "moved")
    other = write_small(tmp_path / "other", count_dtype="uint32")
    assert open_corpus(tmp_path / "moved").fingerprint == open_corpus(folder).fingerprint
    assert open_corpus(other).fingerprint != open_corpus(folder).fingerprint


def test_a_writer_that_fails_leaves_nothing_that_loads(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), CorpusWriter(tmp_path / "c", SPACE) as writer:
        writer.write(np.array([0, 1]), np.array([0]), np.array([1]))
        raise RuntimeError("stop")
    assert list((tmp_path / "c").iterdir()) == []
    with pytest.raises(DataError, match="conversion not finished"):
        open_corpus(tmp_path / "c")


def test_a_writer_without_cells_leaves_an_empty_folder(tmp_path):
    with pytest.raises(DataError, match="no cell was written"), CorpusWriter(tmp_path / "c", SPACE):
        pass
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize(
    ("offsets", "genes", "counts", "message"),
    [
        ([0, 2], [1, 1], [1, 1], "do not increase strictly"),
        ([0, 2], [2, 1], [1, 1], "do not increase strictly"),
        ([0, 1], [4], [1], r"outside \[0, 4\)"),
        ([0, 1], [0], [65536], "not exact in uint16"),
        ([0, 1], [0], [0.5], "not exact in uint16"),
        ([0, 1], [0], [np.nan], "not exact in uint16"),
        ([0, 3], [0], [1], "offsets do not fit"),
    ],
)
def test_rows_that_break_the_format_are_refused(tmp_path, offsets, genes, counts, message):
    with pytest.raises(DataError, match=message), CorpusWriter(tmp_path / "c", SPACE) as writer:
        writer.write(np.array(offsets), np.array(genes), np.array(counts))


def test_a_class_column_that_is_not_there_lists_those_there_are(tmp_path):
    with pytest.raises(DataError, match="no class column 'dose'; it has: technical_batch"):
        open_corpus(write_small(tmp_path / "c")).class_names("dose")


def test_measured_genes_are_kept_as_ranges(tmp_path):
    assert index_ranges(np.array([0, 1, 2, 5, 7, 8])) == ((0, 3), (5, 6), (7, 9))
    assert index_ranges(np.array([], dtype=np.int32)) == ()
    source = open_corpus(write_small(tmp_path / "c")).manifest.sources[0]
    assert source.measured_mask(4).tolist() == [True] * 4


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_a_corpus_is_found_as_it_was_written(tmp_path, capsys, storage):
    folder = write_small(tmp_path / "c", storage=storage)
    check = check_corpus(folder)
    assert check.differences == ()
    assert check.num_cells == 3
    assert check.num_files == len(list(folder.iterdir()))
    assert check.num_bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert command_line.main(["verify-corpus", str(folder), str(folder)]) == 0
    [first, second] = capsys.readouterr().out.splitlines()
    assert f"{folder}: as it was written (3 cells, {check.num_files} files, 0.00" in first
    assert first.split(" GB, ")[0] == second.split(" GB, ")[0]


def test_a_byte_that_was_changed_in_a_shard_is_found(tmp_path, capsys):
    whole, folder = write_small(tmp_path / "whole"), write_small(tmp_path / "c")
    flip_a_byte(folder / "data-00001-of-00002.arrow")
    open_corpus(folder)
    assert command_line.main(["verify-corpus", str(folder), str(whole)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines if not line.startswith(" ")] == [
        f"{folder}: 1 difference",
        f"{whole}: as it was written",
    ]
    assert "data-00001-of-00002.arrow has other bytes than were written: sha256 " in lines[1]


def test_every_file_of_a_corpus_that_is_missing_differs_or_is_unknown_is_named(tmp_path):
    folder = write_small(tmp_path / "c")
    (folder / "data-00000-of-00002.arrow").unlink()
    with (folder / "data-00001-of-00002.arrow").open("ab") as file:
        file.write(b"more")
    flip_a_byte(folder / "genes.json")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-1.arrow").touch()
    (folder / ".unfinished").mkdir()
    found = dict(check_corpus(folder).differences)
    size = (folder / "data-00001-of-00002.arrow").stat().st_size
    assert found == {
        "data-00000-of-00002.arrow": "is missing",
        "data-00001-of-00002.arrow": f"has {size} bytes, not {size - 4}",
        "genes.json": "is not what manifest.json was written with",
        "dataset_info.json": "is not what manifest.json was written with",
        ".unfinished": "is not named by manifest.json",
        "cache-1.arrow": "is not named by manifest.json",
    }


def test_an_edited_manifest_is_found_by_the_hash_in_state_json(tmp_path):
    folder = changed_manifest(write_small(tmp_path / "c"), lambda m: m.update(control_label="A"))
    assert [each.file for each in check_corpus(folder).differences] == ["state.json"]


def test_a_folder_that_is_no_corpus_is_a_mistake_before_anything_is_read(tmp_path, capsys):
    folder = write_small(tmp_path / "c")
    assert command_line.main(["verify-corpus", str(folder), str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "no manifest.json" in printed.err and printed.out == ""


def test_the_command_that_compares_corpora_needs_one(capsys):
    assert command_line.main(["verify-corpus"]) == 2
    assert "required: " in capsys.readouterr().err


def test_a_remote_corpus_is_compared_too(tmp_path):
    folder = write_small(tmp_path / "c", storage="parquet")
    flip_a_byte(folder / "data-00000-of-00002.parquet")
    with file_server(tmp_path) as url:
        assert [each.file for each in check_corpus(f"{url}/c").differences] == ["data-00000-of-00002.parquet"]


def test_a_url_of_an_unknown_kind_is_a_mistake(tmp_path):
    with pytest.raises(DataError, match="nowhere://c: Protocol not known"):
        open_corpus("nowhere://c")
