"""Gene vocabularies by name: tables of human and mouse genes that come with the program, and lists in files.

The tables are GENCODE's genes (release 48 for human, M37 for mouse) with Ensembl id, symbol and biotype; see
`data/gene_tables/README.md` for source and licence.
"""

import functools
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.gene_tables import read_table
from data.genes import GeneSpace, SourceGenes, match_genes, read_gene_list

VOCABULARIES = ("human_protein_coding", "human_all", "mouse_protein_coding", "mouse_all")
FROM_DATA = "from_data"
"""Where a loader asks for a vocabulary: the union of the files' own genes."""
_GENES_FILE = "genes.json"
_RUN_CHECKPOINTS = "checkpoint_*"


def gene_vocabulary(name: str) -> GeneSpace:
    """Return the genes that a vocabulary's name, or the path of a file or folder, stands for.

    A path is that of a gene list (`data.genes.read_gene_list`), or of a folder with a `genes.json`: a corpus, a
    checkpoint, an export, or a run, whose newest checkpoint is taken.

    Raises:
        DataError: there is neither a vocabulary of this name nor such a file.
    """
    if name in VOCABULARIES:
        return shipped_vocabulary(name)
    path = Path(name)
    if path.is_dir():
        return _of_folder(path)
    if not path.exists():
        raise DataError(
            f"gene vocabulary {name!r}: there is no vocabulary of this name and no such file; there are "
            f"{', '.join(VOCABULARIES)}, or the path of a gene list (.txt, .csv, .tsv, genes.json) or of a corpus, "
            "run, checkpoint or export"
        )
    return read_gene_list(path)


@functools.cache
def shipped_vocabulary(name: str) -> GeneSpace:
    """Return a vocabulary of a shipped table, in the order of the Ensembl ids."""
    species, _, selection = name.partition("_")
    genes = [gene for gene in read_table(species) if selection == "all" or gene.biotype == "protein_coding"]
    return GeneSpace(tuple(gene.id for gene in genes), tuple(gene.symbol for gene in genes), key="ensembl_id")


def that_would_match(genes: SourceGenes, least: float = 0.5) -> str:
    """Say which vocabularies hold at least this share of a source's genes, to tell a wrong organism; empty for none."""
    found = []
    for name in VOCABULARIES:
        space = shipped_vocabulary(name)
        share = np.count_nonzero(match_genes(space, genes)[0] >= 0) / min(len(genes), len(space))
        if share >= least:
            found.append(f"{name} would match {share:.1%}")
    return ", ".join(found)


def _of_folder(folder: Path) -> GeneSpace:
    """Return the genes of a folder that holds `genes.json`, or of the newest checkpoint of a run folder."""
    inside = [path for path in folder.glob(f"{_RUN_CHECKPOINTS}/{_GENES_FILE}") if path.parent.suffix == ""]
    inside.sort(key=lambda path: _step(path.parent))
    for path in (folder / _GENES_FILE, *reversed(inside)):
        if path.is_file():
            return read_gene_list(path)
    raise DataError(
        f"gene vocabulary {folder}: no {_GENES_FILE} in this folder, nor in a {_RUN_CHECKPOINTS} of it; give a corpus, "
        "run, checkpoint or export of cells over genes, or a gene list"
    )


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("_")[2]
    return int(number) if number.isdigit() else -1
