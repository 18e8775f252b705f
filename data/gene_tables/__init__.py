"""The gene tables that come with the program; README.md names their source and licence."""

import functools
import lzma
from pathlib import Path
from typing import NamedTuple

TABLES_FOLDER = Path(__file__).parent


class Gene(NamedTuple):
    """Hold a line of a table."""

    id: str
    """Ensembl id without version."""
    symbol: str | None
    biotype: str


def read_table(species: str) -> list[Gene]:
    """Read the genes of `human` or `mouse`, in the order of their ids."""
    return [Gene(id, symbol or None, biotype) for id, symbol, biotype in _rows(species)]


@functools.cache
def previous_symbols() -> dict[str, str]:
    """Return the Ensembl id of each human gene by its previous symbols, those that no gene has now."""
    return {symbol: gene for symbol, gene in _rows("human_previous_symbols")}


def _rows(name: str) -> list[list[str]]:
    with lzma.open(TABLES_FOLDER / f"{name}.tsv.xz", "rt", encoding="utf-8") as file:
        next(file)
        return [line.rstrip("\n").split("\t") for line in file]
