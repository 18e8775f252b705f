"""Kill a conversion before every single change it makes on disk and run it again; started by test_convert.py.

Every conversion runs in a forked child, which ends without any clean-up at its n-th change. This process itself
starts no thread, so that forking is safe.
"""

import contextlib
import gc
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import datasets

from data.corpus import open_corpus
from data.errors import DataError
from trainer.convert_h5ad import main

CHANGES = ("fsync", "replace", "unlink", "mkdir", "rmdir", "truncate")

FAULTS = (
    "none",
    "something incomplete loads",
    "it does not go on when run again",
    "it ends with another result",
)


def in_child(run: Callable[[], int]) -> int:
    """Return the exit code of a function that runs in a forked process."""
    child = os.fork()
    if child == 0:
        with (
            open(os.devnull, "w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            os._exit(run())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(change: int, arguments: list[str]) -> int:
    """Convert, but end before the change of this number."""
    count = 0

    def counted(name: str) -> None:
        original = getattr(os, name)

        def call(*args, **keywords):
            nonlocal count
            count += 1
            if count == change:
                os._exit(137)
            return original(*args, **keywords)

        setattr(os, name, call)

    for name in CHANGES:
        counted(name)
    return main(arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder that belong to a corpus."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def loaded_as(folder: Path, corpora: list[dict[str, bytes]]) -> int:
    """Return 0 if the folder loads nowhere, 1 if it loads as one of the corpora, 2 if as anything else."""
    try:
        open_corpus(folder)
    except DataError:
        try:
            datasets.load_from_disk(str(folder))
        except FileNotFoundError:
            return 0
        return 2
    datasets.load_from_disk(str(folder))
    return 1 if contents(folder) in corpora else 2


def run_again(folder: Path, command: list[str], corpora: list[dict[str, bytes]]) -> int:
    """Look at what a killed conversion left, run it again, and return an index of `FAULTS`."""
    loads = loaded_as(folder, corpora)
    if loads == 2:
        return 1
    code = main(command)
    if code != 0 and not (code == 2 and loads == 1):
        return 2
    return 0 if loaded_as(folder, corpora[:1]) == 1 else 3


def crash_everywhere(work: Path, arguments: list[str], old: Path | None) -> int:
    """Crash at every change; return how many there were."""
    whole, folder = work / "whole", work / "c"
    assert in_child(lambda: main([*arguments, "--output", str(whole)])) == 0
    corpora = [contents(whole), *([contents(old)] if old else [])]
    command = [*arguments, "--output", str(folder), *(["--overwrite"] if old else [])]
    change = 0
    while True:
        change += 1
        shutil.rmtree(folder, ignore_errors=True)
        if old:
            shutil.copytree(old, folder)
        code = in_child(lambda number=change: dying_at(number, command))
        if code == 0:
            break
        assert code == 137, f"change {change}: exit code {code}"
        verdict = in_child(lambda: run_again(folder, command, corpora))
        assert verdict == 0, f"change {change}: {FAULTS[verdict]}"
    assert contents(folder) == corpora[0]
    return change - 1


if __name__ == "__main__":
    gc.freeze()  # no child looks at, and so copies, all that has been imported
    os.fsync = lambda descriptor: None  # a kill needs none, and it would take most of the time
    work, arguments = Path(sys.argv[1]), sys.argv[2:]
    fresh = crash_everywhere(work / "fresh", arguments, None)
    old = work / "old"
    assert in_child(lambda: main([*arguments, "--rows-per-shard", "15", "--output", str(old)])) == 0
    print(fresh, crash_everywhere(work / "overwrite", arguments, old))
