"""Circuits drawn from a trained diffusion model, each from a seed of its own."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.circuit_gates import check_gate_pool
from data.circuit_scores import Task
from models import noise
from models.circuit_diffusion import CircuitDiffusion
from models.pretrained import CONFIG_FILE, from_pretrained
from trainer.checkpoint_model import find_checkpoint, load_trained
from trainer.errors import UserError


def open_circuit_model(
    path: Path, device: torch.device, trusted_modules: Sequence[str] = ()
) -> CircuitDiffusion:
    """Open a trained circuit model, in evaluation mode.

    Args:
        path: what a circuits run saved at its end, its run folder (its newest checkpoint), a checkpoint folder, or an
            exported folder.
        device: where the model is put.
        trusted_modules: modules or packages of the user's that the model may name; they are imported.

    Raises:
        UserError, ModelError: there is no model, it is damaged, or it draws no circuits.
    """
    if not path.is_dir():
        raise UserError(f"--model {path}: there is no such folder; name what a run saved, or a run folder")
    model: Any
    has_config = (path / CONFIG_FILE).is_file()
    if has_config:
        model = from_pretrained(path, trusted_modules=trusted_modules)
    else:
        model = load_trained(find_checkpoint(path), trusted_modules=trusted_modules).model
    if not isinstance(model, CircuitDiffusion):
        raise UserError(f"--model {path}: it holds a {type(model).__name__}, which draws no circuits")
    check_gate_pool(model.config.gate_pool)
    return model.to(device).eval()


def check_prompts(model: CircuitDiffusion, prompts: Sequence[str]) -> None:
    """Refuse prompts that a model cannot take: a text encoder's outputs are kept for those of the training alone.

    Raises:
        UserError: one is unknown, or there is none.
    """
    known = model.config.prompts
    listed = "\n".join(f"  {prompt}" for prompt in known)
    if not prompts:
        raise UserError(f"--prompt is missing; the model knows\n{listed}")
    unknown = [prompt for prompt in prompts if prompt not in known]
    if unknown:
        raise UserError(f"--prompt {unknown[0]!r}: the model was not trained on it; it knows\n{listed}")


def qubits_of(model: CircuitDiffusion, task: Task, asked: int | None) -> int:
    """Return on how many qubits circuits for a task are drawn: as asked, as it implies, or the model's most.

    Raises:
        UserError: the model takes fewer, or the task implies another number.
    """
    largest, implied = model.config.num_qubits, task.num_qubits
    if asked is not None and implied is not None and asked != implied:
        raise UserError(
            f"--num-qubits {asked}: what is asked for by {task.prompt!r} has {implied}; leave it out"
        )
    chosen = asked or implied or largest
    if chosen > largest:
        raise UserError(f"{task.prompt!r} on {chosen} qubits: the model was trained on up to {largest}")
    return chosen


def length_of(model: CircuitDiffusion, asked: int | None) -> int:
    """Return how many columns are drawn.

    Raises:
        UserError: nothing was asked for, and nothing tells how long the circuits of training were.
    """
    chosen = asked or model.config.max_length
    if chosen is None:
        raise UserError(
            "--length is missing, and the model does not say how long the circuits of its training were"
        )
    multiple = getattr(model.unet, "length_multiple", 1)
    if chosen % multiple:
        raise UserError(f"--length {chosen}: the model draws multiples of {multiple} columns")
    return chosen


def check_guidance(model: CircuitDiffusion, scale: float) -> None:
    """Refuse guidance of a model that has not learned to do without a prompt, which guidance compares with.

    Raises:
        UserError: the scale is not 1, and the model has not.
    """
    if scale != 1 and not model.config.guidance_dropout:
        raise UserError(
            f"--guidance {scale:g}: the model was trained with every prompt (enable_guidance_train, guidance_train_p), "
            "so only 1 can be drawn"
        )


def draw_tokens(
    model: CircuitDiffusion,
    prompt: str,
    num: int,
    *,
    num_qubits: int,
    length: int,
    num_steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    unitary: NDArray[np.complex128] | None = None,
) -> NDArray[np.int32]:
    """Draw grids of tokens [num, qubits, time] for one prompt; what comes out does not depend on the batch size.

    Args:
        model: draws them.
        prompt: what is asked for.
        num: how many.
        num_qubits: rows of a grid.
        length: columns of a grid.
        num_steps: denoising steps.
        guidance_scale: how far the prompt is followed, in multiples of what it changes; 1 is the plain model.
        seed: with the prompt and a grid's number it makes the grid's own random numbers.
        batch_size: grids that are drawn at once.
        unitary: what the circuits are to compute, for a model that compiles.
    """
    device = next(model.parameters()).device
    seeds = noise.fold(noise.item_seeds(seed, torch.arange(num)), _text_seed(prompt))
    parts = None
    if unitary is not None:
        parts = torch.from_numpy(np.stack([unitary.real, unitary.imag]).astype(np.float32)).to(device)
    drawn = []
    for start in range(0, num, batch_size):
        own = seeds[start : start + batch_size].to(device)
        condition = {} if parts is None else {"unitary": parts.expand(len(own), *parts.shape)}
        tokens = model.sample(
            [prompt] * len(own),
            num_qubits,
            length,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            seeds=own,
            **condition,
        )
        drawn.append(tokens.to(torch.int32).cpu())
    return torch.cat(drawn).numpy()


def _text_seed(text: str) -> int:
    """Return 63 bits of a text's hash, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
