"""How whoever asks for a conversion says what messages advise: by a command's options, or in a configuration."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Spelling:
    """Hold the advice that is more than the name of an option."""

    keeps_column: str
    """Keeps an obs column."""
    one_each: str
    """Lets files that do not fit into one corpus be read."""
    takes_files: str
    """Makes each file a technical batch."""
    names_control: str | None
    """Names the label of control cells; None: nothing that is read has need of it."""


COMMAND = Spelling(
    keeps_column="--obs NAME=COLUMN keeps one",
    one_each="make a corpus of each file with --per-file",
    takes_files="--obs technical_batch=@file",
    names_control="--control-label names it",
)
CONFIGURATION = Spelling(
    keeps_column="obs: [COLUMN] in dataloader_args keeps one",
    one_each="give each file a phase of its own (datasets, with one gene_vocab)",
    takes_files="technical_batch: '@file'",
    names_control=None,
)
