"""The command line: `python -m trainer COMMAND ...`."""

import importlib
import sys
from typing import NamedTuple

from trainer import preemption
from trainer.console import is_main_process
from trainer.exits import USER_MISTAKE, end_process, run_command


class Command(NamedTuple):
    """Name the module whose `main(argv) -> int` is a command, and what the command does."""

    module: str
    about: str


COMMANDS = {
    "train": Command("trainer.train", "train from a YAML file"),
    "finetune": Command("trainer.finetune", "fine-tune a pretrained model from a YAML file"),
    "convert": Command("trainer.convert_h5ad", "convert h5ad files into a corpus"),
    "plan": Command("trainer.plan", "say what a run will take, without a GPU and without training"),
    "doctor": Command("trainer.doctor", "find out whether a run can start on this machine"),
    "selfcheck": Command("trainer.selfcheck", "prove on this machine, without data, that results are exact"),
    "verify-resume": Command("trainer.verify_resume", "prove that a run of your own resumes exactly"),
    "verify-corpus": Command("trainer.verify_corpus", "compare every byte of corpora with their manifests"),
    "sample": Command("trainer.sample", "draw quantum circuits from a trained model"),
    "embed": Command("trainer.embed", "write the embeddings of an h5ad file's cells into a copy of it"),
    "score": Command(
        "trainer.score", "check predicted cells and score them as the Virtual Cell Challenge does"
    ),
    "benchmark": Command("trainer.benchmark", "score a model's embeddings beside baselines"),
    "predict": Command("trainer.predict", "predict perturbed cells from control cells"),
    "report": Command("trainer.report", "put a run, or several beside each other, on one page"),
    "export": Command("trainer.export", "write a checkpoint's model as a folder that from_pretrained loads"),
    "models": Command("trainer.registry", "list, load or delete saved models"),
}


_TRAINING = ("train", "finetune")
"""The commands that end with a checkpoint when they are asked to."""

_OF_RANKS = (*_TRAINING, "embed", "benchmark", "predict")
"""The commands that several processes carry out together."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in _TRAINING:
        preemption.install()  # importing the command takes seconds, in which a signal would be lost
    if argv and argv[0] in COMMANDS:
        return run_command(lambda: importlib.import_module(COMMANDS[argv[0]].module).main(argv[1:]))
    is_help = bool(argv) and argv[0] in ("-h", "--help")
    if is_main_process():
        lines = [f"  {name:<13} {command.about}" for name, command in COMMANDS.items()]
        usage = "\n".join(["usage: python -m trainer COMMAND ...", "", "commands:", *lines])
        mistake = "" if is_help or not argv else f"error: unknown command '{argv[0]}'\n"
        print(f"{mistake}{usage}", file=sys.stdout if is_help else sys.stderr)
    return 0 if is_help else USER_MISTAKE


def console() -> None:
    """Run one command as the whole process: `python -m trainer`, or the installed `cellphase`."""
    code = main()
    if sys.argv[1:2] and sys.argv[1] in _OF_RANKS:
        end_process(code)
    raise SystemExit(code)


if __name__ == "__main__":
    console()
