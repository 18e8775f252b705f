"""Quantum circuits by diffusion: grids of gate tokens are embedded, noised, and denoised under a prompt.

Each token stands for a frozen vector, with the sign of the token; a UNet learns to take Gaussian noise away from the
grid of vectors, and the nearest vectors are the circuit. All that is random is a function of a circuit's own seed: it
does not depend on the number of ranks, on the rest of the batch, or on what was drawn before.
"""

import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.errors import ModelError, check_choice, raise_all
from models.noise import Purpose, fold, normals, uniform
from models.noise_schedulers import DDPMScheduler, make_scheduler
from models.outputs import LossOutput
from models.pretrained import PretrainedModule, save_pretrained
from models.prompts import EncodedPrompts, PromptTable, TextEncoderConfig, encode_prompts

Loss = Literal["MSELoss", "L1Loss", "SmoothL1Loss", "HuberLoss"]

UNET_MODULES = ("models.circuit_unet", "genQC.models.unet_qc")
"""Where a UNet may come from: a saved model names its class, and importing any other module would run its code."""

_DEFAULT_PROMPT_WIDTH = 64


@dataclass(frozen=True)
class CircuitDiffusionConfig:
    """Hold the sizes and choices of a `CircuitDiffusion`.

    Attributes:
        vocab_size: tokens: background, the gates and, last, padding.
        prompts: texts that `prompt_idx` counts.
        num_qubits: qubits of the largest circuit.
        max_length: columns of the longest batch of training, which a sampler draws where nothing else is asked.
        has_unitary: whether the data has the circuits' unitaries.
        gate_pool: names of the gates 1 to N.
        unet_class: dotted path of the UNet: `models.circuit_unet.CircuitUNet` or `CircuitCompilationUNet`, which is
            told the unitary; or genQC's of `genQC.models.unet_qc`, with genQC installed.
        unet_args: arguments of the UNet. `clr_dim` and `cond_emb_size` are set to the widths of embedding and prompt,
            and `num_clrs` to `vocab_size`, whatever it says here.
        scheduler: `{type, params}` (see `models.noise_schedulers`).
        embedding_dim: width of a token's vector; None takes `clr_dim` of `unet_args`, else 8, or `vocab_size` where
            that is larger: vectors are then orthogonal.
        prompt_tokens: tokens of a learned prompt; without meaning for a text encoder.
        enable_guidance_train: leave prompt and unitary out of some circuits in training, so that sampling can be
            guided.
        guidance_train_p: share of circuits that each is left out of, one independently of the other.
        text_encoder: arguments of `models.prompts.TextEncoderConfig`; None learns a table.
        text_encoder_path: weights of the text encoder on this machine; only a fresh start reads them.
        loss: name of an elementwise loss of `torch.nn`.
        mask_padding: leave padded positions out of the loss. Without it, as in genQC, padding is a token like any
            other, and a model learns where circuits end.
    """

    vocab_size: int
    prompts: tuple[str, ...]
    num_qubits: int
    has_unitary: bool = False
    gate_pool: tuple[str, ...] = ()
    unet_class: str = "models.circuit_unet.CircuitUNet"
    unet_args: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=lambda: {"type": "DDIM", "params": {}})
    embedding_dim: int | None = None
    prompt_tokens: int = 4
    enable_guidance_train: bool = True
    guidance_train_p: float = 0.1
    text_encoder: Mapping[str, Any] | None = None
    text_encoder_path: str | None = None
    loss: Loss = "MSELoss"
    mask_padding: bool = False
    max_length: int | None = None

    def __post_init__(self) -> None:
        """Check every field; raise one ModelError that names all that is wrong."""
        object.__setattr__(self, "prompts", tuple(self.prompts))
        object.__setattr__(self, "gate_pool", tuple(self.gate_pool))
        raise_all(self._problems())
        make_scheduler(self.scheduler)

    @property
    def embedding_width(self) -> int:
        """Width of a token's vector."""
        if self.embedding_dim is not None:
            return self.embedding_dim
        return self.unet_args.get("clr_dim") or max(8, self.vocab_size)

    @property
    def encoder(self) -> TextEncoderConfig | None:
        """The text encoder; None where the prompts are learned."""
        if self.text_encoder is None:
            return None
        try:
            return TextEncoderConfig(**self.text_encoder)
        except TypeError as error:
            known = ", ".join(f.name for f in dataclasses.fields(TextEncoderConfig))
            raise ModelError(f"text_encoder has the keys {known} ({error})") from error

    @property
    def prompt_width(self) -> int:
        """Width of a prompt's tokens."""
        encoder = self.encoder
        default = _DEFAULT_PROMPT_WIDTH if encoder is None else encoder.width
        return self.unet_args.get("cond_emb_size") or default

    @property
    def padding_token(self) -> int:
        """The token of padding."""
        return len(self.gate_pool) + 1 if self.gate_pool else self.vocab_size - 1

    @property
    def guidance_dropout(self) -> float:
        """Share of circuits that a condition is left out of in training."""
        return self.guidance_train_p if self.enable_guidance_train else 0.0

    def _problems(self) -> Iterable[str]:
        for name, least in (
            ("vocab_size", 3),
            ("num_qubits", 1),
            ("embedding_width", 2),
            ("prompt_tokens", 1),
        ):
            if getattr(self, name) < least:
                shown = {"embedding_width": "embedding_dim"}.get(name, name)
                yield f"{shown} is {getattr(self, name)}; it must be at least {least}"
        if self.gate_pool and self.vocab_size < len(self.gate_pool) + 2:
            yield (
                f"vocab_size is {self.vocab_size}, but a gate pool of {len(self.gate_pool)} needs "
                f"{len(self.gate_pool) + 2}: background, gates and padding"
            )
        if not self.prompts:
            yield "prompts is empty; the data's prompts belong there"
        if len(set(self.prompts)) != len(self.prompts):
            yield "prompts has a text twice"
        if not 0 <= self.guidance_train_p < 1:
            yield f"guidance_train_p is {self.guidance_train_p}; it must be in [0, 1)"
        given = self.unet_args.get("clr_dim")
        if given is not None and given != self.embedding_width:
            yield f"embedding_dim is {self.embedding_dim}, but unet_args has clr_dim {given}; give one of them"
        encoder = self.encoder
        if encoder is not None and encoder.width != self.prompt_width:
            yield f"text_encoder.width is {encoder.width}, but unet_args has cond_emb_size {self.prompt_width}"
        if encoder is None and self.text_encoder_path is not None:
            yield "text_encoder_path is set, but text_encoder is not; set both or none"
        try:
            check_choice("loss", self.loss, Loss)
        except ValueError as error:
            yield f"{error}, the elementwise losses of torch.nn"


class Draws(NamedTuple):
    """All that is random in a loss.

    Attributes:
        timesteps: [B].
        noise: [B, C, Q, T], standard normal.
        perturbation: noise of the input perturbation [B, C, Q, T]; None without.
        keeps_prompt: [B] bool; None keeps all.
        keeps_unitary: [B] bool; None keeps all.
    """

    timesteps: Tensor
    noise: Tensor
    perturbation: Tensor | None = None
    keeps_prompt: Tensor | None = None
    keeps_unitary: Tensor | None = None


class CircuitDiffusion(PretrainedModule):
    """Predict the noise in embedded circuits, their embedding or the velocity between the two, and draw circuits.

    `embedding_table` [vocab_size, embedding_dim] is frozen: circuits are noised in it and decoded by it.
    """

    embedding_table: Tensor

    def __init__(self, config: CircuitDiffusionConfig) -> None:
        """Draw the weights, and the vectors of the tokens.

        Raises:
            ModelError: the UNet cannot be had, does not fit, or needs unitaries that the data has not.
        """
        super().__init__()
        self.config = config
        self.scheduler: DDPMScheduler = make_scheduler(config.scheduler)
        self.unet = _build_unet(config)
        self.needs_unitary = "U" in inspect.signature(self.unet.forward).parameters
        if self.needs_unitary and not config.has_unitary:
            raise ModelError(
                f"unet_class {config.unet_class} is told the unitary of a circuit, but the data has none; use data "
                "with unitaries, or a UNet without, such as models.circuit_unet.CircuitUNet"
            )
        encoder = config.encoder
        self.prompts: PromptTable | EncodedPrompts
        if encoder is None:
            self.prompts = PromptTable(len(config.prompts), config.prompt_tokens, config.prompt_width)
        else:
            self.prompts = EncodedPrompts(len(config.prompts), encoder)
        self.register_buffer("embedding_table", self._first_table())
        self.criterion = getattr(nn, config.loss)(reduction="none")
        if not callable(getattr(self.unet, "flops", None)):
            object.__setattr__(self, "batch_flops", None)  # nothing tells what a foreign UNet costs

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, from which `from_pretrained` makes the model anew."""
        save_pretrained(self, folder)

    def forward(
        self, x_t: Tensor, timesteps: Tensor, prompt_idx: Tensor, unitary: Tensor | None = None
    ) -> Tensor:
        """Return what the scheduler's `prediction_type` names, fp32 [B, C, Q, T].

        Args:
            x_t: noisy embedded circuits [B, C, Q, T].
            timesteps: [B].
            prompt_idx: [B]; `empty_prompt` is the empty prompt.
            unitary: [B, 2, D, D], zeros for none; None for a UNet that is told none.
        """
        with self._own_precision(x_t.device):
            context = self.prompts(prompt_idx)
            if not self.needs_unitary:
                return self.unet(x_t, timesteps, context).float()
            assert unitary is not None
            return self.unet(x_t, timesteps, context, U=unitary).float()

    @property
    def empty_prompt(self) -> int:
        """The index of the empty prompt."""
        return len(self.config.prompts)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the vectors [B, C, Q, T] of tokens [B, Q, T]; control nodes have the negative vector."""
        sign = torch.where(tokens < 0, -1.0, 1.0).unsqueeze(-1)
        return (self.embedding_table.float()[tokens.abs()] * sign).permute(0, 3, 1, 2)

    def decode(self, x: Tensor) -> Tensor:
        """Return the tokens [B, Q, T] whose vectors have the largest cosine with x [B, C, Q, T].

        A token's vector and its negative compete; background and padding have no negative.
        """
        table = self.embedding_table.float()
        table = table / torch.linalg.vector_norm(table, dim=1, keepdim=True)
        cosines = torch.einsum("bcqt,vc->bqtv", x.float(), table)  # but for the length of x
        found = cosines.abs().argmax(dim=-1)
        is_negative = cosines.gather(-1, found.unsqueeze(-1)).squeeze(-1) < 0
        is_gate = (found != 0) & (found != self.config.padding_token)
        return torch.where(is_negative & is_gate, -found, found)

    def loss_weight(self, batch: Mapping[str, Any]) -> float:
        """Return the circuits of a batch, which its loss is divided by."""
        return float(len(batch["tokens"]))

    def compute_loss(self, batch: Mapping[str, Any], draws: Draws | None = None) -> LossOutput:
        """Return the summed loss of circuits, each the mean over its positions.

        Args:
            batch: `tokens` [B, Q, T], `prompt_idx` [B], `noise_seed` [B], and `unitary` [B, 2, D, D] if it is needed.
            draws: all that is random, in place of what the seeds give.
        """
        tokens, unitary = batch["tokens"], self._unitary_of(batch)
        draws = self.draw(batch) if draws is None else draws
        x0, prompt_idx = self.embed(tokens), batch["prompt_idx"]
        x_t = self.scheduler.add_noise(x0, draws.noise, draws.timesteps, draws.perturbation)
        if draws.keeps_prompt is not None:
            prompt_idx = torch.where(draws.keeps_prompt, prompt_idx, self.empty_prompt)
        if unitary is not None and draws.keeps_unitary is not None:
            unitary = unitary * draws.keeps_unitary[:, None, None, None]
        prediction = self(x_t, draws.timesteps, prompt_idx, unitary)
        losses = self.criterion(prediction, self.scheduler.target(x0, draws.noise, draws.timesteps))
        if self.config.mask_padding:
            counts = (tokens != self.config.padding_token).float()
            positions = counts.sum(dim=(1, 2)).clamp(min=1)
            total = ((losses.mean(dim=1) * counts).sum(dim=(1, 2)) / positions).sum()
        else:
            counts = torch.ones_like(tokens, dtype=torch.float32)
            positions = counts.sum(dim=(1, 2))
            total = losses.mean() * len(tokens)  # one mean over all, as genQC's, rounds as genQC's does
        with torch.no_grad():
            guessed = self.decode(self.scheduler.estimate(prediction, x_t, draws.timesteps).x0)
            accuracy = ((guessed == tokens) * counts).sum(dim=(1, 2)) / positions
        return LossOutput(total, float(len(tokens)), {"token_accuracy": accuracy.sum()})

    def draw(self, batch: Mapping[str, Any]) -> Draws:
        """Return all that is random in the loss of a batch, from the seeds of its circuits.

        Conditions are left out, and the input is perturbed, in training only.
        """
        tokens, seeds, config = batch["tokens"], batch["noise_seed"], self.config
        share = uniform(fold(seeds, Purpose.TIME))
        timesteps = (share * self.scheduler.num_train_timesteps).long()
        size = tokens.shape[1:]
        perturbation = keeps_prompt = keeps_unitary = None
        if self.training and self.scheduler.input_perturbation > 0:
            perturbation = self._normals(fold(seeds, Purpose.PERTURBATION), *size)
        if self.training and config.guidance_dropout > 0:
            keeps_prompt = uniform(fold(seeds, Purpose.PROMPT)) >= config.guidance_dropout
            keeps_unitary = uniform(fold(seeds, Purpose.UNITARY)) >= config.guidance_dropout
        noise = self._normals(fold(seeds, Purpose.NOISE), *size)
        return Draws(timesteps, noise, perturbation, keeps_prompt, keeps_unitary)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str] | Sequence[int] | Tensor,
        num_qubits: int,
        length: int,
        *,
        seeds: Sequence[int] | Tensor,
        num_steps: int | None = None,
        guidance_scale: float = 1.0,
        unitary: Tensor | None = None,
    ) -> Tensor:
        """Draw circuits, one for each prompt: tokens [B, Q, T].

        Args:
            prompts: texts or their indices [B].
            num_qubits: qubits of the circuits, at most those of the training data.
            length: columns; what a circuit does not need is padding or background.
            seeds: [B], a number for each circuit, which it depends on alone; int64.
            num_steps: steps of the sampler; None takes every timestep.
            guidance_scale: 1 samples by prompt and unitary alone, more pushes away from what the network predicts
                without them, 0 ignores them.
            unitary: [B, 2, 2^Q, 2^Q] for a model that is told it.

        Raises:
            ModelError: a prompt is unknown, or sizes or guidance are not what the model was trained for.
        """
        device = self.embedding_table.device
        prompt_idx = self._prompt_indices(prompts).to(device)
        seeds = torch.as_tensor(seeds, dtype=torch.int64).to(device)
        self._check_sampling(prompt_idx, seeds, num_qubits, length, guidance_scale)
        if self.needs_unitary:
            unitary = self._check_unitary(unitary, len(prompt_idx), num_qubits, "sample").to(device)
        elif unitary is not None:
            raise ModelError(f"a unitary was given, but {self.config.unet_class} is told none")

        def predict(x: Tensor, t: int) -> Tensor:
            timesteps = torch.full((len(x),), t, device=device)
            empty = torch.full_like(prompt_idx, self.empty_prompt)
            nothing = None if unitary is None else torch.zeros_like(unitary)
            if guidance_scale == 1:
                return self(x, timesteps, prompt_idx, unitary)
            if guidance_scale == 0:
                return self(x, timesteps, empty, nothing)
            both = None if unitary is None or nothing is None else torch.cat([nothing, unitary])
            indices = torch.cat([empty, prompt_idx])
            without, with_them = self(
                torch.cat([x, x]), torch.cat([timesteps, timesteps]), indices, both
            ).chunk(2)
            return without + guidance_scale * (with_them - without)

        def draw(t: int) -> Tensor:
            return self._normals(fold(seeds, Purpose.PERTURBATION, t), num_qubits, length)

        was_training = self.training
        self.eval()
        try:
            noise = self._normals(fold(seeds, Purpose.NOISE), num_qubits, length)
            x0 = self.scheduler.denoise(noise, predict, num_steps=num_steps, draw=draw)
        finally:
            self.train(was_training)
        return self.decode(x0)

    @torch.no_grad()
    def initialise_from_data(
        self, batches: Iterable[dict[str, Any]], gene_ids: Sequence[str] | None = None
    ) -> dict[str, int]:
        """Encode the prompts, where a text encoder does; called once, before a fresh start.

        Args:
            batches: not looked at.
            gene_ids: not looked at.

        Returns:
            What was done, for the start-up account.
        """
        encoder = self.config.encoder
        if encoder is None:
            return {}
        if self.config.text_encoder_path is None:
            raise ModelError(
                "text_encoder is set, but text_encoder_path names no weights; give a local folder or file, or set "
                "text_encoder: null to learn the prompts"
            )
        assert isinstance(self.prompts, EncodedPrompts)
        self.prompts.fill(encode_prompts(encoder, self.config.text_encoder_path, [*self.config.prompts, ""]))
        return {"prompts_encoded": len(self.config.prompts)}

    def data_initialised_parameters(self) -> list[Tensor]:
        """Return the parameters that `initialise_from_data` writes: none, encoded prompts are a buffer."""
        return []

    def batch_flops(self, batch: Mapping[str, Any]) -> float:
        """Return the operations of a forward and a backward pass over a batch, by the shapes of its tensors."""
        unet: Any = self.unet
        return unet.flops(*batch["tokens"].shape, self.prompts.num_tokens)

    def _first_table(self) -> Tensor:
        """Return the vectors of the tokens: the UNet's own, where it has any, or an orthogonal matrix."""
        own = getattr(self.unet, "emb_clr", None)
        if own is not None:
            own.weight.requires_grad_(False)
            return own.weight.detach().clone()
        table = torch.empty(self.config.vocab_size, self.config.embedding_width).float()
        # So rounded, the vectors are the same in a model of any precision.
        return nn.init.orthogonal_(table).bfloat16().float()

    def _normals(self, seeds: Tensor, num_qubits: int, length: int) -> Tensor:
        """Draw [B, C, Q, T]; a longer circuit begins with what a shorter one has."""
        width = self.embedding_table.shape[1]
        drawn = normals(seeds, length * num_qubits * width)
        return drawn.view(len(seeds), length, num_qubits, width).permute(0, 3, 2, 1)

    def _own_precision(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Return what the network runs within: autocast, where its weights are of low precision."""
        dtype = next(self.unet.parameters()).dtype
        if dtype == torch.float32 or torch.is_autocast_enabled(device.type):
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=dtype)

    def _unitary_of(self, batch: Mapping[str, Any]) -> Tensor | None:
        tokens = batch["tokens"]
        if tokens.shape[1] > self.config.num_qubits:
            raise ModelError(
                f"a batch has circuits of {tokens.shape[1]} qubits, but num_qubits is {self.config.num_qubits}"
            )
        if not self.needs_unitary:
            return None
        return self._check_unitary(batch.get("unitary"), len(tokens), tokens.shape[1], "a batch")

    def _check_unitary(self, unitary: Tensor | None, count: int, num_qubits: int, where: str) -> Tensor:
        if unitary is None:
            raise ModelError(f"{where}: no unitary was given, but {self.config.unet_class} is told it")
        wanted = (count, 2, 2**num_qubits, 2**num_qubits)
        if unitary.shape != wanted:
            raise ModelError(
                f"{where}: the unitary has shape {list(unitary.shape)}; {count} circuits of {num_qubits} qubits have "
                f"{list(wanted)}, real and imaginary part"
            )
        return unitary.float()

    def _prompt_indices(self, prompts: Sequence[str] | Sequence[int] | Tensor) -> Tensor:
        """Return [B] int64."""
        known = {text: index for index, text in enumerate(self.config.prompts)}
        indices = []
        for prompt in prompts.tolist() if isinstance(prompts, Tensor) else prompts:
            index = known.get(prompt) if isinstance(prompt, str) else int(prompt)
            if index is None or not 0 <= index < len(known):
                shown = ", ".join(repr(text) for text in self.config.prompts[:20])
                more = f" and {len(known) - 20} more" if len(known) > 20 else ""
                raise ModelError(f"prompt {prompt!r} is unknown; the model was trained on {shown}{more}")
            indices.append(index)
        return torch.tensor(indices, dtype=torch.int64)

    def _check_sampling(
        self, prompt_idx: Tensor, seeds: Tensor, num_qubits: int, length: int, guidance_scale: float
    ) -> None:
        if seeds.shape != prompt_idx.shape:
            raise ModelError(
                f"{len(prompt_idx)} prompts were given and {seeds.numel()} seeds; give one for each"
            )
        if not 1 <= num_qubits <= self.config.num_qubits:
            raise ModelError(
                f"num_qubits is {num_qubits}; the model was trained on circuits of up to {self.config.num_qubits}"
            )
        if length < 1:
            raise ModelError(f"length is {length}; it must be at least 1")
        if guidance_scale != 1 and not self.config.guidance_dropout:
            raise ModelError(
                f"guidance_scale is {guidance_scale}, but the model was trained with every prompt "
                "(enable_guidance_train, guidance_train_p); only 1 can be sampled"
            )


def _build_unet(config: CircuitDiffusionConfig) -> nn.Module:
    """Construct the UNet, its widths and vocabulary set."""
    module_path, _, name = config.unet_class.rpartition(".")
    where = f"unet_class is {config.unet_class!r}"
    if module_path not in UNET_MODULES:
        raise ModelError(f"{where}; it must be a class of {' or '.join(UNET_MODULES)}")
    try:
        module = importlib.import_module(module_path)
    except ImportError as error:
        advice = (
            "install the extra: pip install cellphase[genqc]; " if module_path.startswith("genQC") else ""
        )
        raise ModelError(
            f"{where}, and {module_path} cannot be imported ({error}); {advice}"
            "models.circuit_unet.CircuitUNet needs no package"
        ) from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ModelError(f"{where}, and {module_path} has no such class of networks")
    parameters = inspect.signature(found.__init__).parameters
    arguments = {key: value for key, value in config.unet_args.items() if key != "num_clrs"}
    arguments |= {"clr_dim": config.embedding_width, "cond_emb_size": config.prompt_width}
    if "num_clrs" in parameters:
        arguments["num_clrs"] = config.vocab_size
    try:
        return found(**arguments)
    except TypeError as error:
        raise ModelError(f"unet_args do not fit {config.unet_class} ({error})") from error
