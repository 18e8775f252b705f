"""Compare every byte of corpora with their manifests: `python -m trainer verify-corpus CORPUS [CORPUS ...]`."""

import argparse
import time
from collections.abc import Sequence

from data.corpus import CorpusFolder
from data.corpus_check import CorpusCheck, check_corpus
from trainer.console import printable
from trainer.exits import run_command

DIFFERS = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 where all is as it was written, 1 where not, 2 for the user's mistake."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer verify-corpus",
        description="Read every file of each corpus once and compare it with what manifest.json says.",
        epilog="Exit codes: 0 every file is as it was written, 1 one differs, is missing or is not named by the "
        "manifest, 2 a mistake in the command or no corpus, 130 interrupted.",
    )
    parser.add_argument("corpora", nargs="+", metavar="CORPUS", help="folder of a corpus, or an fsspec URL")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    return run_command(lambda: _verify(arguments.corpora))


def _verify(corpora: Sequence[str]) -> int:
    for corpus in corpora:  # what is no corpus is said before hours of reading
        CorpusFolder.at(corpus).manifest_text()
    code = 0
    for corpus in corpora:
        begin = time.monotonic()
        check = check_corpus(corpus)
        print(printable(render(corpus, check, time.monotonic() - begin)), flush=True)
        code = DIFFERS if check.differences else code
    return code


def render(corpus: str, check: CorpusCheck, seconds: float) -> str:
    """Return a line about a corpus, and one for each difference."""
    number = len(check.differences)
    verdict = f"{number} difference{'' if number == 1 else 's'}" if number else "as it was written"
    read = f"{check.num_cells:,} cells, {check.num_files:,} files, {check.num_bytes / 1e9:.3f} GB, {seconds:.1f} s"
    return "\n".join(
        [f"{corpus}: {verdict} ({read})", *(f"  {file} {what}" for file, what in check.differences)]
    )
