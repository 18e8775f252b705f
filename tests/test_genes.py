import json

import numpy as np
import pytest

from data.errors import DataError
from data.genes import (
    GeneSpace,
    SourceGenes,
    combine_genes,
    looks_like_ensembl,
    match_genes,
    read_gene_list,
    strip_version,
)

P53, BRCA, ACTB = "ENSG00000141510", "ENSG00000012048", "ENSG00000075624"
SPACE = GeneSpace((P53, BRCA, ACTB), ("TP53", "BRCA1", None), "ensembl_id")


def test_a_gene_space_survives_json():
    assert GeneSpace.from_json(SPACE.to_json()) == SPACE
    assert GeneSpace.from_json(json.loads(SPACE.to_json())) == SPACE
    odd = GeneSpace(('a"\\', "é}, {"), (None, "\n"), "ensembl_id")
    assert GeneSpace.from_json(odd.to_json()) == odd


def test_the_json_has_the_documented_keys():
    content = json.loads(SPACE.to_json())
    assert content["format"] == 1
    assert content["key"] == "ensembl_id"
    assert content["sha256"] == SPACE.sha256
    assert content["genes"][0] == {"id": P53, "symbol": "TP53"}
    assert content["genes"][2] == {"id": ACTB, "symbol": None}


def test_the_hash_follows_order_and_key_but_not_symbols():
    other_symbols = GeneSpace(SPACE.ids, (None, None, None), "ensembl_id")
    assert other_symbols.sha256 == SPACE.sha256
    assert GeneSpace(SPACE.ids[::-1], SPACE.symbols, "ensembl_id").sha256 != SPACE.sha256
    assert GeneSpace(SPACE.ids, SPACE.ids, "symbol").sha256 != SPACE.sha256


def test_edited_genes_do_not_pass_for_the_hashed_ones():
    content = json.loads(SPACE.to_json())
    content["genes"].reverse()
    with pytest.raises(DataError, match="the file was edited"):
        GeneSpace.from_json(content)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 1, "genes": 3, "key": "symbol"}'])
def test_other_json_is_not_a_gene_space(text):
    with pytest.raises(DataError, match="not a gene space"):
        GeneSpace.from_json(text)


def test_genes_are_found_by_id_version_and_symbol():
    assert SPACE.index(BRCA) == 1
    assert SPACE.index(f"{ACTB}.17") == 2
    assert SPACE.index("TP53") == 0


def test_an_unknown_gene_names_close_ones():
    with pytest.raises(DataError, match="'BRCA2' is not among the 3 genes.*close to it: BRCA1"):
        SPACE.index("BRCA2")


def test_a_symbol_of_two_genes_is_ambiguous():
    space = GeneSpace((P53, BRCA), ("TBCE", "TBCE"), "ensembl_id")
    with pytest.raises(DataError, match=f"belongs to several genes: {P53}, {BRCA}"):
        space.index("TBCE")


@pytest.mark.parametrize(
    ("ids", "symbols", "key", "message"),
    [
        (("A", "A"), ("A", "A"), "symbol", "occur more than once.*: A"),
        (("A", " "), ("A", " "), "symbol", "1 genes have an empty name, at positions 1"),
        ((), (), "symbol", "holds no gene"),
        (("A",), (), "symbol", "1 ids but 0 symbols"),
        (("A",), ("A",), "entrez", "key 'entrez' is not one of"),
        (("A",), (["A"],), "symbol", "a symbol is no text"),
    ],
)
def test_impossible_gene_spaces_are_refused(ids, symbols, key, message):
    with pytest.raises(DataError, match=message):
        GeneSpace(ids, symbols, key)


def test_versions_are_cut_from_ensembl_ids_only():
    assert strip_version("ENSG00000141510.18") == P53
    assert strip_version("ENSMUSG00000059552.7") == "ENSMUSG00000059552"
    assert strip_version("ENSG00000182378.15_PAR_Y") == "ENSG00000182378_PAR_Y"
    assert strip_version("RP11-34P13.7") == "RP11-34P13.7"


def test_ids_are_recognised_among_spike_ins():
    assert looks_like_ensembl([P53, f"{BRCA}.2", "ERCC-00002"])
    assert not looks_like_ensembl(["TP53", "BRCA1", P53])
    assert not looks_like_ensembl([])


def named(ids=None, symbols=None, where="f.h5ad"):
    return SourceGenes(where, ids, symbols)


def test_a_union_keeps_the_order_of_first_appearance():
    space = combine_genes([named(symbols=("B", "A")), named(symbols=("A", "C"))], "union")
    assert space.ids == ("B", "A", "C")
    assert space.key == "symbol"


def test_an_intersection_keeps_the_order_of_the_first_file():
    space = combine_genes([named(symbols=("C", "B", "A")), named(symbols=("A", "C", "D"))], "intersection")
    assert space.ids == ("C", "A")


def test_an_empty_intersection_is_refused():
    with pytest.raises(DataError, match="no gene in common"):
        combine_genes([named(symbols=("A",)), named(symbols=("B",))], "intersection")


def test_files_with_ids_are_joined_by_id_and_keep_symbols():
    space = combine_genes([named((P53,), ("TP53",)), named((P53, BRCA), ("", "BRCA1"))], "union")
    assert space == GeneSpace((P53, BRCA), ("TP53", "BRCA1"), "ensembl_id")


def test_a_file_without_ids_makes_the_symbol_the_key():
    assert combine_genes([named((P53,), ("TP53",)), named(None, ("BRCA1",))], "union").ids == (
        "TP53",
        "BRCA1",
    )


def test_files_without_a_common_kind_of_name_are_refused():
    with pytest.raises(DataError, match="share no kind of gene name"):
        combine_genes([named((P53,), None, "a"), named(None, ("BRCA1",), "b")], "union")


def test_repeated_names_of_a_source_are_listed():
    with pytest.raises(DataError, match=r"f.h5ad: 2 gene names occur more than once.*: A, B;"):
        combine_genes([named(symbols=("A", "B", "A", "C", "B"))], "union")


def test_unmatched_genes_get_minus_one():
    remap, key = match_genes(SPACE, named((ACTB, "ENSG00000000003", P53)))
    assert remap.tolist() == [2, -1, 0]
    assert remap.dtype == np.int32
    assert key == "ensembl_id"


def test_a_source_with_symbols_is_matched_through_the_table_of_the_space():
    remap, key = match_genes(SPACE, named(None, ("BRCA1", "ACTB", "TP53")))
    assert remap.tolist() == [1, -1, 0]
    assert key == "symbol"


def test_a_space_without_symbols_cannot_match_a_source_with_symbols_only():
    with pytest.raises(DataError, match="columns id,symbol"):
        match_genes(GeneSpace((P53,), (None,), "ensembl_id"), named(None, ("TP53",)))


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_gene_lists_are_read_in_every_format(tmp_path):
    ids = GeneSpace((P53, BRCA), (None, None), "ensembl_id")
    assert read_gene_list(write(tmp_path, "a.txt", f"{P53}.2\n\n {BRCA} \n")) == ids
    assert read_gene_list(write(tmp_path, "b.txt", "TP53\nBRCA1\n")).key == "symbol"
    table = f"name,gene_id,length\nTP53,{P53}.1,3\nBRCA1,{BRCA},4\n"
    both = GeneSpace((P53, BRCA), ("TP53", "BRCA1"), "ensembl_id")
    assert read_gene_list(write(tmp_path, "c.csv", table)) == both
    assert read_gene_list(write(tmp_path, "d.tsv", table.replace(",", "\t"))) == both
    assert read_gene_list(write(tmp_path, "e.json", SPACE.to_json())) == SPACE
    assert read_gene_list(write(tmp_path, "f.csv", "symbol\nTP53\n")).ids == ("TP53",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "holds no gene"),
        ("a.txt", "A\nB\nA\n", "occur more than once.*: A"),
        ("a.txt", f"{P53}.1\n{P53}.2\n", f"occur more than once.*: {P53}"),
        ("a.csv", "x,y\n1,2\n", "names neither an id column"),
        ("a.csv", "length,symbol\n1\n", "line 2 has no column 'symbol'"),
        ("a.csv", "length,symbol\n\n1\n", "line 3 has no column 'symbol'"),
        ("a.csv", "id\n" + "A" * 200_000, "line 2 is no line of a table"),
        ("a.json", "{", "not a gene space"),
        ("a.json", "[" * 100_000, "not a gene space"),
    ],
)
def test_unusable_gene_lists_are_refused(tmp_path, name, text, message):
    with pytest.raises(DataError, match=message):
        read_gene_list(write(tmp_path, name, text))


def test_a_missing_gene_list_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent.txt: cannot be read \(No such file"):
        read_gene_list(tmp_path / "absent.txt")
