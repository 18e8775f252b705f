"""Train from one YAML file: `accelerate launch trainer/train.py --config FILE [key=value ...]`."""

import sys
from pathlib import Path

if not __package__:  # run as a file: put the repository root, not trainer/, on sys.path
    _HERE = Path(__file__).resolve().parent
    sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if p != str(_HERE))]

from trainer import preemption

if __name__ == "__main__":
    preemption.install()  # the imports below take seconds, in which a signal would be lost or end the process

import argparse
import contextlib
import importlib
import os
from typing import Literal

# torch reads it when it is imported. DDP warns from C++ that it looked for unused parameters in vain; it has to look,
# see trainer/distributed.py.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from trainer.config import dump_yaml, load_run_config
from trainer.console import counted, is_main_process
from trainer.dotted import check_dotted_paths, look_in_current_folder
from trainer.errors import ConfigError
from trainer.exits import end_process, run_command

Command = Literal["train", "finetune"]


def main(argv: list[str] | None = None, command: Command = "train") -> int:
    """Run the command; return an exit code of trainer/exits.py."""
    return run_command(lambda: _train(argv, command))


def _train(argv: list[str] | None, command: Command) -> int:
    arguments = _parse(sys.argv[1:] if argv is None else argv, command)
    if isinstance(arguments, int):
        return arguments
    if arguments.check or arguments.print_config or arguments.dry_run:
        preemption.uninstall()
    look_in_current_folder()
    try:
        config = load_run_config(arguments.config, arguments.overrides, command)
    except ConfigError:
        if arguments.check:
            _say("stage 1, configuration: failed; stage 2, dotted paths: not reached")
        raise
    if arguments.resume and config.resume_from is None and not _says_resume(arguments.overrides):
        config = config.model_copy(update={"resume_from": "auto"})
    if arguments.print_config:
        _say(dump_yaml(config).rstrip())
        return 0
    if arguments.check:
        phases = counted(len(config.datasets), "phase")
        _say(f"stage 1, configuration: ok ({phases})")
    try:
        paths = check_dotted_paths(config)
        if config.precision == "fp8":
            importlib.import_module("trainer.model_building").check_fp8_sizes(config)
    except ConfigError:
        if arguments.check:
            _say("stage 2, dotted paths and their arguments: failed")
        raise
    if arguments.check:
        _say(f"stage 2, dotted paths and their arguments: ok ({len(paths)} resolved)")
        return 0
    return importlib.import_module("trainer.launch").run(config, dry_run=arguments.dry_run)


_ABOUT = {
    "train": "Train the model that a YAML file describes.",
    "finetune": "Fine-tune a pretrained model as a YAML file with a section finetune describes.",
}


def _parse(argv: list[str], command: Command = "train") -> argparse.Namespace | int:
    """Return the parsed command line, or the exit code where argparse has said all there is to say."""
    parser = argparse.ArgumentParser(
        prog=command,
        allow_abbrev=False,
        description=_ABOUT[command],
        epilog="Exit codes: 0 done, 2 a mistake in the command or its files, 75 stopped by SIGTERM, SIGUSR1 or "
        "max_wall_seconds with a checkpoint, 130 interrupted, 1 anything else.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="set one value (training.batch_size=32, datasets.0.lr=1e-4), or pick a preset (group=name) from a "
        "folder beside FILE",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with this run's newest checkpoint where there is one (resume_from: auto), unless FILE or the "
        "command says what to go on from",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--check", action="store_true", help="check the file and its dotted paths; touch no data"
    )
    mode.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML")
    mode.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, one forward and backward pass, no optimizer step",
    )
    with contextlib.ExitStack() as stack:
        if not is_main_process():
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(silence))
            stack.enter_context(contextlib.redirect_stdout(silence))
        try:
            return parser.parse_intermixed_args(argv)
        except SystemExit as done:
            return int(done.code or 0)


def _says_resume(overrides: list[str]) -> bool:
    """Tell whether the command line sets what to go on from, in the words of any kind of configuration."""
    keys = {override.partition("=")[0] for override in overrides}
    return not keys.isdisjoint(("resume_from", "training.resume_from", "general.resume"))


def _say(text: str) -> None:
    if is_main_process():
        print(text, flush=True)


if __name__ == "__main__":
    end_process(main())
