"""Fine-tune from one YAML file: `python -m trainer finetune --config FILE [key=value ...]`.

Several ranks: `accelerate launch -m trainer finetune --config FILE`. Flags, signals and exit codes are as in `train`.
"""

if not __package__:
    raise SystemExit("run it as a module: python -m trainer finetune --config FILE")

from trainer import train


def main(argv: list[str] | None = None) -> int:
    """Run the command; return an exit code of trainer/exits.py."""
    return train.main(argv, command="finetune")
