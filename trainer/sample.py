"""Draw circuits from a trained model: `python -m trainer sample --model PATH --prompt TEXT --output DIR`.

What comes out is decoded into gates and computed, and the share that is what the prompt asks for is printed beside that
of random circuits of the same length.
"""

import argparse
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from data.circuit_gates import Circuit, InvalidCircuit, decode, to_qasm
from data.circuit_scores import Judged, Scores, Task, judge, score
from data.circuit_states import as_unitary, unitary
from data.known_circuits import KnownCircuits, read_known_circuits
from trainer.atomicfile import sync_folder
from trainer.console import notice, table
from trainer.dotted import look_in_current_folder
from trainer.errors import UserError
from trainer.exits import run_command

CIRCUITS_FILE, SCORES_FILE, TOKENS_FILE = "circuits.json", "scores.json", "tokens.safetensors"


@dataclass(frozen=True)
class Drawn:
    """What came of one prompt."""

    task: Task
    num_qubits: int
    tokens: NDArray[np.int32]
    """[samples, qubits, time]."""
    judged: list[Judged]
    scores: Scores
    label_frequency: float | None
    """Share of the known circuits with this prompt; None where none are known."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for the user's mistake, 130 when interrupted, 1 for anything else."""
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    return run_command(lambda: _sample(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer sample",
        allow_abbrev=False,
        description="Draw circuits from a trained model, and compare them with what was asked for.",
        epilog="Exit codes: 0 done, 2 a mistake in the command or its files, 130 interrupted, 1 anything else.",
    )
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        required=True,
        metavar="PATH",
        help="what a circuits run saved, a run folder (its newest checkpoint), a checkpoint, or an exported folder",
    )
    add(
        "--trust",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module of your own that it may import",
    )
    add("--prompt", action="append", default=[], metavar="TEXT", help="what is asked for; may be repeated")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    add("--overwrite", action="store_true", help="replace the output where this command wrote it")
    add("--num", type=int, default=64, metavar="N", help="circuits for each prompt (default: 64)")
    add("--num-qubits", type=int, metavar="N", help="qubits (default: as the prompt implies, or the model's)")
    add(
        "--length",
        type=int,
        metavar="N",
        help="columns of a grid of tokens (default: the longest in training)",
    )
    add("--num-steps", type=int, default=40, metavar="N", help="denoising steps (default: 40)")
    add(
        "--guidance",
        type=float,
        default=1.0,
        metavar="SCALE",
        help="how far the prompt is followed, in multiples of what it changes; 1 is the plain model (default: 1)",
    )
    add("--seed", type=int, default=0, help="of the draws and of the random circuits (default: 0)")
    add("--batch-size", type=int, default=64, metavar="N", help="circuits drawn at once (default: 64)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)")
    add("--format", choices=("png", "text", "both"), default="both", help="of the drawings (default: both)")
    add("--draw", type=int, default=12, metavar="N", help="circuits of each prompt to draw (default: 12)")
    add("--qasm", action="store_true", help="write every circuit as OpenQASM 2.0 as well")
    add(
        "--num-random",
        type=int,
        default=2000,
        metavar="N",
        help="random circuits for comparison (default: 2000)",
    )
    add("--dataset", type=Path, metavar="DIR", help="circuits that are not new: the model's training data")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--unitary", type=Path, metavar="FILE", help="a safetensors file with what is to be compiled"
    )
    target.add_argument(
        "--circuit-of-dataset",
        type=int,
        metavar="N",
        help="compile anew what this circuit of --dataset computes",
    )
    return parser


def _sample(arguments: argparse.Namespace) -> int:
    _check_numbers(arguments)
    output = Path(os.path.abspath(arguments.output))
    _check_output(output, arguments.overwrite)
    # Torch and what builds models take seconds to import, and a mistake above needs neither.
    from trainer.circuit_sampling import check_guidance, check_prompts, open_circuit_model
    from trainer.embedding import join_ranks

    look_in_current_folder()
    _, device = join_ranks(arguments.device)
    model = open_circuit_model(arguments.model, device, arguments.trust)
    known = None if arguments.dataset is None else read_known_circuits(arguments.dataset)
    tasks = _tasks(arguments, known, needs_unitary=model.needs_unitary)
    check_prompts(model, [task.prompt for task in tasks])
    check_guidance(model, arguments.guidance)
    drawn = [_draw(arguments, model, task, known) for task in tasks]
    notice(scores_table(drawn))
    for each in drawn:
        if each.scores.faults:
            counts = ", ".join(f"{count} {kind}" for kind, count in each.scores.faults.items())
            notice(f"{each.task.prompt}: columns that are no gate: {counts}")
    _write(arguments, output, drawn, list(model.config.gate_pool))
    notice(f"wrote {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    least = {
        "num": 1,
        "num_qubits": 1,
        "length": 1,
        "num_steps": 1,
        "batch_size": 1,
        "draw": 0,
        "num_random": 1,
    }
    for name, lowest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be at least {lowest}")
    if not 0 <= arguments.guidance < float("inf"):
        raise UserError(
            f"--guidance {arguments.guidance:g}: it must be a number of at least 0; 1 is the plain model"
        )
    if arguments.circuit_of_dataset is not None and arguments.dataset is None:
        raise UserError("--circuit-of-dataset names a circuit of --dataset, which is missing")


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"--output {output} exists; name another folder, or give --overwrite to replace it")
    if not (output / CIRCUITS_FILE).is_file():
        raise UserError(
            f"--output {output} was not written by this command, so it is not replaced; name another folder"
        )


def _tasks(arguments: argparse.Namespace, known: KnownCircuits | None, *, needs_unitary: bool) -> list[Task]:
    """Return what is asked for, by prompts and perhaps by a unitary that all of them are to compute."""
    prompts, number = list(arguments.prompt), arguments.circuit_of_dataset
    target = None
    if arguments.unitary is not None:
        target = _read_unitary(arguments.unitary)
    elif number is not None:
        assert known is not None
        if not 0 <= number < len(known.circuits):
            raise UserError(
                f"--circuit-of-dataset {number}: the data set has circuits 0 to {len(known.circuits) - 1}"
            )
        target = unitary(known.circuits[number])
        prompts = prompts or [known.prompts[number]]
    if needs_unitary and target is None:
        raise UserError(
            "the model compiles unitaries, and none is given: name one with --unitary FILE, or a circuit that computes "
            "it with --dataset DIR --circuit-of-dataset N"
        )
    if target is not None and not needs_unitary:
        option = "--unitary" if arguments.unitary is not None else "--circuit-of-dataset"
        raise UserError(f"{option}: the model was trained without unitaries and cannot compile one")
    return [Task(prompt, target) for prompt in prompts]


def _read_unitary(path: Path) -> NDArray[np.complex128]:
    """Read the only tensor of a file, or the one named `unitary`."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--unitary {path}: not a readable safetensors file ({error})") from None
    if len(tensors) != 1 and "unitary" not in tensors:
        raise UserError(
            f"--unitary {path}: it holds {', '.join(tensors) or 'nothing'}; name the matrix `unitary`"
        )
    return as_unitary(tensors.get("unitary", next(iter(tensors.values()))), f"--unitary {path}")


def _draw(arguments: argparse.Namespace, model: Any, task: Task, known: KnownCircuits | None) -> Drawn:
    """Draw the circuits of one prompt and compare them with it."""
    from trainer.circuit_sampling import draw_tokens, length_of, qubits_of

    num_qubits = qubits_of(model, task, arguments.num_qubits)
    tokens = draw_tokens(
        model,
        task.prompt,
        arguments.num,
        num_qubits=num_qubits,
        length=length_of(model, arguments.length),
        num_steps=arguments.num_steps,
        guidance_scale=arguments.guidance,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        unitary=task.unitary,
    )
    pool = model.config.gate_pool
    judged = [judge(task, decode(grid, pool)) for grid in tokens]
    scores = score(
        task,
        judged,
        num_qubits=num_qubits,
        gate_pool=pool,
        rng=np.random.default_rng(arguments.seed),
        num_random=arguments.num_random,
        known=None if known is None else known.circuits,
    )
    return Drawn(
        task, num_qubits, tokens, judged, scores, None if known is None else known.share(task.prompt)
    )


def scores_table(drawn: Sequence[Drawn]) -> str:
    """Return a table with a line for each prompt; columns that no prompt fills are left out."""
    columns: dict[str, list[Any]] = {
        "prompt": [each.task.prompt for each in drawn],
        "circuits": [each.scores.num_circuits for each in drawn],
        "valid": [_share(each.scores.valid) for each in drawn],
        "right": [_share(each.scores.right) for each in drawn],
        "random": [_share(each.scores.random_right) for each in drawn],
        "in dataset": [_share(each.label_frequency) for each in drawn],
        "fidelity": [each.scores.fidelity for each in drawn],
        "random fidelity": [each.scores.random_fidelity for each in drawn],
        "distinct": [each.scores.distinct for each in drawn],
        "distinct right": [each.scores.distinct_right for each in drawn],
        "new": [each.scores.new for each in drawn],
        "new right": [each.scores.new_right for each in drawn],
    }
    filled = {name: values for name, values in columns.items() if any(v is not None for v in values)}
    return table(list(filled), list(zip(*filled.values(), strict=True)))


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f} %"


def _write(arguments: argparse.Namespace, output: Path, drawn: Sequence[Drawn], gate_pool: list[str]) -> None:
    """Write the folder beside its place and put it there when it is whole."""
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        for index, each in enumerate(drawn):
            _write_drawings(arguments, temporary, index, each)
            if arguments.qasm:
                _write_qasm(temporary / "qasm", index, each)
        save_file(
            {str(index): each.tokens for index, each in enumerate(drawn)},
            temporary / TOKENS_FILE,
            metadata={
                "gate_pool": json.dumps(gate_pool),
                "prompts": json.dumps([e.task.prompt for e in drawn]),
            },
        )
        # safetensors lets only its owner read the file.
        os.chmod(temporary / TOKENS_FILE, 0o666 & ~_umask())
        _write_json(temporary / CIRCUITS_FILE, [_circuits_json(each) for each in drawn])
        settings = {
            name: getattr(arguments, name) for name in ("num", "num_steps", "guidance", "seed", "num_random")
        }
        scores = [
            {
                "prompt": e.task.prompt,
                "num_qubits": e.num_qubits,
                "length": int(e.tokens.shape[2]),
                **asdict(e.scores),
            }
            | {"label_frequency": e.label_frequency}
            for e in drawn
        ]
        _write_json(temporary / SCORES_FILE, {"settings": settings, "prompts": scores})
        if output.exists():
            shutil.rmtree(output)
        os.replace(temporary, output)
        sync_folder(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_drawings(arguments: argparse.Namespace, folder: Path, index: int, drawn: Drawn) -> None:
    """Draw the first valid circuits of a prompt."""
    shown: list[tuple[str, Circuit]] = [
        (_caption(number, each), each.circuit)
        for number, each in enumerate(drawn.judged)
        if isinstance(each.circuit, Circuit)
    ][: arguments.draw]
    if not shown:
        if arguments.draw:
            notice(f"{drawn.task.prompt}: nothing drawn, for none is a circuit")
        return
    # Matplotlib takes a second to import.
    from data.circuit_drawing import draw_picture, draw_text

    if arguments.format != "png":
        blocks = [f"{caption}\n{draw_text(circuit)}\n" for caption, circuit in shown]
        (folder / f"drawing_{index}.txt").write_text(
            f"{drawn.task.prompt}\n\n" + "\n".join(blocks), encoding="utf-8"
        )
    if arguments.format != "text":
        draw_picture(shown, folder / f"drawing_{index}.png", title=drawn.task.prompt)


def _caption(number: int, judged: Judged) -> str:
    verdict = {True: "as asked", False: "not as asked", None: "valid"}[judged.is_right]
    if judged.srv is not None:
        return f"{number}: SRV {judged.srv}, {verdict}"
    if judged.fidelity is not None:
        return f"{number}: fidelity {judged.fidelity:.3f}, {verdict}"
    return f"{number}: {verdict}"


def _write_qasm(folder: Path, index: int, drawn: Drawn) -> None:
    folder.mkdir(exist_ok=True)
    for number, each in enumerate(drawn.judged):
        if isinstance(each.circuit, Circuit):
            (folder / f"{index}_{number}.qasm").write_text(to_qasm(each.circuit), encoding="utf-8")


def _circuits_json(drawn: Drawn) -> dict[str, Any]:
    circuits = []
    for each in drawn.judged:
        entry: dict[str, Any] = {
            "valid": each.is_valid,
            "right": each.is_right,
            "num_qubits": each.circuit.num_qubits,
        }
        if isinstance(each.circuit, InvalidCircuit):
            entry["faults"] = [str(fault) for fault in each.circuit.faults]
        else:
            entry["gates"] = [gate.to_json() for gate in each.circuit.gates]
        entry |= {
            key: value for key, value in (("srv", each.srv), ("fidelity", each.fidelity)) if value is not None
        }
        circuits.append(entry)
    return {"prompt": drawn.task.prompt, "circuits": circuits}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
