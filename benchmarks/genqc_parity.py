"""Train genQC's UNets by genQC's own `fit` and by our loop, on the same batches, and compare every step's loss.

    python -m venv genqc-env && genqc-env/bin/pip install -c constraints.txt -e '.[genqc]'
    genqc-env/bin/python benchmarks/genqc_parity.py                   # both tasks; fails where they differ

Needs genQC, in an environment of its own (docs/circuits.md says why). genQC's pipeline trains first, and what it drew
is noted down: batches, timesteps, noise, left-out conditions, first weights. Our run then reads the same batches and
draws, through its ordinary loop, optimizer and loss. genQC's step for SRV circuits cannot run as it is released (it
moves a unitary that it was not given): it is run with that one line left out.

At last a model of genQC's is trained and saved by our own command, and loaded by genQC.
"""

import argparse
import importlib.util
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from data.circuit_folder import CircuitSet, open_circuit_sets
from models.circuit_diffusion import CircuitDiffusion, CircuitDiffusionConfig, Draws
from models.prompts import EncodedPrompts, TextEncoderConfig, encode_prompts
from trainer.build import run
from trainer.config import load_run_config
from trainer.config.schema import RunConfig
from trainer.metrics_file import read_metrics

TOLERANCE = 1e-6
PROMPT_TOLERANCE = 1e-5
"""Of numbers up to some units, after twelve blocks in float32."""
SAMPLES = ROOT / "data" / "samples" / "circuits"
LEARNING_RATE, BATCH_SIZE, SEED = 1e-3, 32, 0
UNET = {
    "model_features": [32, 32, 64],
    "t_emb_size": 64,
    "num_heads": [4, 4, 2],
    "num_res_blocks": [1, 1, 1],
    "transformer_depths": [1, 1, 1],
}
UNITARY_ENCODER = {"cond_emb_size": 512, "num_heads": 4, "transformer_depths": [1, 1]}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "cos_alpha",
    "input_perturbation": 0.1,
    "prediction_type": "epsilon",
    "eta": 1.0,
}

_OF_GENQC = {
    "CachedFrozenOpenCLIPEmbedder": "models.frozen_open_clip",
    "QC_Compilation_UNet": "models.unet_qc",
    "QC_Cond_UNet": "models.unet_qc",
    "DiffusionPipeline": "pipeline.diffusion_pipeline",
    "DiffusionPipeline_Compilation": "pipeline.compilation_diffusion_pipeline",
    "DDIMScheduler": "scheduler.scheduler_ddim",
    "DataLoaders": "utils.misc_utils",
}
recorded: dict[str, Any] = {}
"""What genQC's training drew and began with, for the run that replays it."""


class Replayed(CircuitDiffusion):
    """Begin with genQC's weights, vectors and prompts, and draw what it drew."""

    def __init__(self, config: CircuitDiffusionConfig) -> None:
        """Take what was recorded."""
        super().__init__(config)
        self.unet.load_state_dict(recorded["weights"])
        self.embedding_table.copy_(recorded["table"])
        assert isinstance(self.prompts, EncodedPrompts)
        self.prompts.fill(recorded["prompts"])
        self.scheduler.alpha_bar = recorded["alpha_bar"]

    def initialise_from_data(self, batches: Any, gene_ids: Any = None) -> dict[str, int]:
        """Leave the prompts as they were recorded."""
        return {}

    def draw(self, batch: Any) -> Draws:
        """Return what genQC drew for this batch, and let dropout draw what it drew there."""
        torch.set_rng_state(batch["random_state"])
        return Draws(
            batch["timesteps"],
            batch["noise"],
            batch["perturbation"],
            batch["keeps_prompt"],
            batch.get("keeps_unitary"),
        )


class _Batches(IterableDataset):
    def __iter__(self) -> Any:
        return iter(recorded["batches"])


def replayed_batches() -> DataLoader:
    """Return genQC's batches in its order."""
    return DataLoader(_Batches(), batch_size=None)


def import_genqc() -> types.SimpleNamespace:
    """Return the parts of genQC that are used."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # torchvision's wheel is built for CUDA, and without it the operators that it registers Python parts of are
        # missing. open_clip imports it for pictures alone, which nothing here has.
        declared = torch.library.Library("torchvision", "DEF")
        declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        recorded["library"] = declared
    found = {
        name: getattr(importlib.import_module(f"genQC.{module}"), name) for name, module in _OF_GENQC.items()
    }
    return types.SimpleNamespace(**found)


def fit_by_genqc(genqc: Any, folder: Path, num_epochs: int) -> list[float]:
    """Let genQC train, note down what it drew, and return the loss of every step."""
    (circuits,), *_ = open_circuit_sets(folder)
    compiles = circuits.unitaries is not None
    torch.manual_seed(SEED)
    model, embedder, encoder = _networks_of_genqc(genqc, circuits)
    base = genqc.DiffusionPipeline_Compilation if compiles else genqc.DiffusionPipeline

    class Recorded(base):
        """genQC's pipeline, which notes down what its steps draw."""

        def train_step(self, data: Any, train: bool, **settings: Any) -> Tensor:
            before = torch.get_rng_state()
            if train:
                recorded["batches"].append(_drawn(self, data))
            torch.set_rng_state(before)
            if compiles:
                return super().train_step(data, train, **settings)
            return _mended_step(self, data, train)

    device = torch.device("cpu")
    scheduler = genqc.DDIMScheduler(device, **SCHEDULER)
    # genQC's schedule is rounded to float32, ours is not: both train on genQC's.
    recorded["alpha_bar"] = scheduler.alphas_cumprod.double().numpy()
    pipeline = Recorded(scheduler, model, encoder, embedder, device)
    pipeline.compile(torch.optim.Adam, nn.MSELoss)
    loader = DataLoader(_tensors_of(circuits), batch_size=BATCH_SIZE, shuffle=True)
    pipeline.fit(num_epochs, genqc.DataLoaders(loader, None), lr=LEARNING_RATE)
    return pipeline.fit_losses


def _networks_of_genqc(genqc: Any, circuits: CircuitSet) -> tuple[Any, Any, Any]:
    """Build genQC's UNet, the frozen one that embeds its tokens and its text encoder; note down how they start."""
    compiles = circuits.unitaries is not None
    sizes = {**UNET, "clr_dim": 8, "num_clrs": circuits.pad_token + 1, "cond_emb_size": 512}
    make = genqc.QC_Cond_UNet
    if compiles:
        make, sizes = genqc.QC_Compilation_UNet, {**sizes, "unitary_encoder_config": dict(UNITARY_ENCODER)}
    encoder = genqc.CachedFrozenOpenCLIPEmbedder(version=None, enable_cache_token_limit=False)
    texts = [*circuits.prompts, ""]
    encoder.generate_cache(texts, cached_empty_token_index=torch.tensor(len(circuits.prompts)))
    # The encoder computes in inference mode, whose tensors cannot take part in a backward pass.
    encoder.cached_embeddings = encoder.cached_embeddings.clone()
    model, embedder = make(**sizes), make(**sizes)
    for parameter in embedder.parameters():
        parameter.requires_grad_(False)
    recorded.update(
        batches=[],
        weights={name: tensor.clone() for name, tensor in model.state_dict().items()},
        table=embedder.emb_clr.weight.detach().clone(),
        prompts=encoder.cached_embeddings.float(),
        texts=circuits.prompts,
        sizes=sizes,
        gate_pool=circuits.gate_pool,
        num_qubits=circuits.max_qubits,
        compiles=compiles,
    )
    return model, embedder, encoder


def _tensors_of(circuits: CircuitSet) -> TensorDataset:
    """Return tokens and prompt indices as genQC trains on them, and unitaries where there are any."""
    rows = np.arange(len(circuits))
    tensors = [
        torch.from_numpy(circuits.tokens.rows(rows)).long(),
        torch.from_numpy(circuits.prompt_idx.astype(np.int64)),
    ]
    if circuits.unitaries is not None:
        tensors.append(torch.from_numpy(circuits.unitaries.rows(rows)).float())
    return TensorDataset(*tensors)


def _drawn(pipeline: Any, data: Any) -> dict[str, Any]:
    """Draw as genQC's step does, in its order, and return the batch with it."""
    tokens, prompt_idx, *unitary = data
    size, p = len(tokens), 1.0 - pipeline.guidance_train_p
    keeps = torch.empty(((1 + len(unitary)) * size,)).bernoulli_(p=p).bool().chunk(1 + len(unitary))
    timesteps = torch.randint(0, int(pipeline.scheduler.num_train_timesteps), (size,))
    noise = torch.randn(pipeline.embedder.embed(tokens).shape)
    batch = {
        "tokens": tokens,
        "prompt_idx": prompt_idx,
        "timesteps": timesteps,
        "noise": noise,
        "perturbation": torch.randn_like(noise),
        "keeps_prompt": keeps[0],
    }
    if unitary:
        batch |= {"unitary": unitary[0], "keeps_unitary": keeps[1]}
    return {**batch, "random_state": torch.get_rng_state()}


def _mended_step(self: Any, data: Any, train: bool) -> Tensor:
    """Take the step of genQC's `DiffusionPipeline` without the line that moves a unitary."""
    latents, y = data
    latents = self.embedder.embed(latents)
    if self.enable_guidance_train and train:
        keeps = torch.empty((len(y),)).bernoulli_(p=1.0 - self.guidance_train_p).type(torch.int64)
        y = self.cfg_drop(y, self.empty_token_fn(y), keeps)
    context = self.text_encoder(y, pool=False)
    timesteps = torch.randint(low=0, high=self.scheduler.num_train_timesteps, size=(len(y),))
    noise = torch.randn(latents.shape)
    noisy = self.scheduler.add_noise(latents, noise, timesteps, train=train)
    return self.loss_fn(self.model(noisy, timesteps, context), noise)


def replay(folder: Path) -> list[float]:
    """Train on what was recorded by our loop, and return the loss of every step."""
    sizes = dict(recorded["sizes"])
    vocab_size, clr_dim = sizes.pop("num_clrs"), sizes.pop("clr_dim")
    unet = "QC_Compilation_UNet" if recorded["compiles"] else "QC_Cond_UNet"
    config = RunConfig.model_validate(
        {
            "run_name": "replayed",
            "output_dir": str(folder),
            "device": "cpu",
            "precision": "fp32",
            "model": {
                "model_class": "genqc_parity.Replayed",
                "config_class": "models.circuit_diffusion.CircuitDiffusionConfig",
                "config_args": {
                    "vocab_size": vocab_size,
                    "embedding_dim": clr_dim,
                    "prompts": list(recorded["texts"]),
                    "gate_pool": list(recorded["gate_pool"]),
                    "num_qubits": recorded["num_qubits"],
                    "has_unitary": recorded["compiles"],
                    "unet_class": f"genQC.models.unet_qc.{unet}",
                    "unet_args": sizes,
                    "scheduler": {"type": "DDIM", "params": SCHEDULER},
                    "text_encoder": {"library": "open_clip", "num_tokens": 77, "width": 512},
                },
            },
            "optimizer": {"optimizer_class": "torch.optim.Adam", "optimizer_args": {"lr": LEARNING_RATE}},
            "max_grad_norm": None,
            "micro_batch_size": BATCH_SIZE,
            "datasets": [
                {
                    "dataloader_factory": "genqc_parity.replayed_batches",
                    "max_steps": len(recorded["batches"]),
                    "save_every_steps": None,
                }
            ],
        }
    )
    assert run(config) == 0
    (folder_of_run,) = folder.glob("replayed_*")
    return [float(r["loss"]) for r in read_metrics(folder_of_run / "metrics.jsonl") if r["kind"] == "train"]  # type: ignore[arg-type]


def compare(genqc: Any, task: str, num_epochs: int) -> float:
    """Train both ways, print what came out, and return the largest difference of a step's loss."""
    theirs = fit_by_genqc(genqc, SAMPLES / task, num_epochs)
    # The run imports this file by name: what was recorded has to be there too.
    sys.modules["genqc_parity"] = sys.modules[__name__]
    with tempfile.TemporaryDirectory() as folder:
        ours = replay(Path(folder))
    differences = [abs(a - b) for a, b in zip(theirs, ours, strict=True)]
    print(f"{task}: {len(theirs)} steps, genQC {theirs[0]:.6f} -> {theirs[-1]:.6f}")
    print(
        f"{task}: largest difference of a step's loss {max(differences):.3g}, of the first {differences[0]:.3g}"
    )
    return max(differences)


def save_and_load(genqc: Any, task: str) -> float:
    """Train and save one of genQC's networks by our configuration, load it with genQC, and compare their outputs."""
    compiles = task.startswith("unitary")
    network = "QC_Compilation_UNet" if compiles else "QC_Cond_UNet"
    pipeline = genqc.DiffusionPipeline_Compilation if compiles else genqc.DiffusionPipeline
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = [f"training.model.params.{key}={value}" for key, value in UNET.items()]
        sizes += ["training.model.params.cond_emb_size=512", "training.model.params.clr_dim=8"]
        if compiles:
            encoder = ", ".join(f"{key}: {value}" for key, value in UNITARY_ENCODER.items())
            sizes.append(f"training.model.params.unitary_encoder_config={{{encoder}}}")
        config = load_run_config(
            ROOT / "configs" / "circuits" / "config.yaml",
            [
                f"training=quick_test_{'unitary' if compiles else 'srv'}",
                "training.model.type=null",
                f"training.model.target=genQC.models.unet_qc.{network}",
                f"training.general.dataset={SAMPLES / task}",
                f"training.general.output_path={folder / 'saved'}",
                "training.general.device=cpu",
                "training.training.num_epochs=1",
                *sizes,
            ],
        )
        config = config.model_copy(update={"output_dir": str(folder / "runs")})
        assert run(config) == 0
        loaded = pipeline.from_config_file(f"{folder / 'saved'}/", torch.device("cpu"))
        ours = CircuitDiffusion.from_pretrained(folder / "saved")
        torch.manual_seed(SEED)
        x, t, c = torch.randn(2, 8, 3, 8), torch.tensor([3, 700]), torch.randn(2, 5, 512)
        unitary = {"U": torch.randn(2, 2, 8, 8)} if compiles else {}
        with torch.no_grad():
            one, other = ours.unet.eval()(x, t, c, **unitary), loaded.model.eval()(x, t, c, **unitary)
        vectors = (loaded.embedder.emb_clr.weight - ours.embedding_table).abs().max()
    print(f"{task}: saved by our run, loaded by genQC: gate pool {', '.join(loaded.gate_pool)}")
    return max(float((one - other).abs().max()), float(vectors))


def compare_prompts(genqc: Any) -> float:
    """Encode prompts by genQC's text encoder and by ours with the same random weights; return the difference."""
    texts = ["Generate SRV: [1, 2, 2]", "Compile using: ['h', 'cx']", ""]
    torch.manual_seed(SEED)
    encoder = genqc.CachedFrozenOpenCLIPEmbedder(version=None, enable_cache_token_limit=False)
    weights = {name: tensor.clone().contiguous() for name, tensor in encoder.model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, Path(folder) / "text.safetensors")
        config = TextEncoderConfig(library="open_clip", num_tokens=77, width=512)
        ours = encode_prompts(config, Path(folder) / "text.safetensors", texts)
    theirs = encoder(encoder.tokenize_and_push_to_device(texts))
    return float((ours - theirs).abs().max())


def main() -> int:
    """Compare both tasks; 1 where they differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--tasks", nargs="*", default=["unitary_3q", "srv_3q"])
    arguments = parser.parse_args()
    if importlib.util.find_spec("genQC") is None:
        print(
            "not compared: genQC is not installed here, and needs an environment of its own (docs/circuits.md)"
        )
        return 0
    genqc = import_genqc()
    prompts = compare_prompts(genqc)
    print(f"largest difference of an encoded prompt {prompts:.3g}")
    has_failed = prompts > PROMPT_TOLERANCE
    for task in arguments.tasks:
        largest = compare(genqc, task, arguments.epochs)
        loaded = save_and_load(genqc, task)
        print(f"{task}: largest difference of the loaded network {loaded:.3g}")
        has_failed |= largest > TOLERANCE or loaded > 0
    print("differ" if has_failed else f"equal to {TOLERANCE:g}")
    return int(has_failed)


if __name__ == "__main__":
    raise SystemExit(main())
