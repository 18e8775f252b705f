"""A curriculum: what a phase sets of the objective, two optimizers in one, a run that is killed in its second phase."""

import json
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import ROOT, launch_ranks, start_ranks
from running import comparable_records, newest_run, records, same_weights, toy, train
from torch import nn

from data.simulator import write_simulated_h5ad
from models.diffusion import PartialMaskingConfig
from models.perturbation_transformer import PerturbationTransformer, PerturbationTransformerConfig
from trainer.config import load_run_config
from trainer.config.schema import PhaseConfig
from trainer.errors import ConfigError
from trainer.losses import LossModule
from trainer.muon import muon_and_adam, orthogonalised
from trainer.objective import check_objective_options, set_objective_options
from trainer.optim import parameter_names
from trainer.zero import check_elementwise

SIZES: dict[str, Any] = {
    "num_genes": 6,
    "vocab_size": 4,
    "hidden_dim": 8,
    "num_latents": 2,
    "num_layers": 1,
    "num_heads": 2,
}
PARTIAL: dict[str, Any] = {**SIZES, "objective": "partial", "objective_args": {"mask_ratio": 0.5}}


def module(**changes: Any) -> LossModule:
    return LossModule(PerturbationTransformer(PerturbationTransformerConfig(**{**PARTIAL, **changes})))


def phases(*options: dict[str, Any] | None) -> list[PhaseConfig]:
    """Return phases that set these options; None is a phase that is skipped and would set a wrong one."""
    return [
        PhaseConfig(
            dataloader_factory="toy.map_loader",
            epochs=0 if each is None else 1,
            objective_options={"nonsense": 1} if each is None else each,
        )
        for each in options
    ]


# Options of the objective


def test_options_hold_until_a_later_phase_sets_them_otherwise_and_going_back_restores_them():
    held = module()
    run = phases({}, {"mask_ratio": 0.7, "beta": [1, 1]}, None, {"mask_ratio": 0.9})
    wanted = [(0.5, (2, 5)), (0.7, (1, 1)), (0.7, (1, 1)), (0.9, (1, 1))]
    for index in (0, 1, 2, 3, 1, 0, 3):  # in any order, as a resume or a rollback comes to a phase
        set_objective_options(held, run, index)
        options = held.objective.options
        assert isinstance(options, PartialMaskingConfig)
        assert (options.mask_ratio, options.beta) == wanted[index]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_rato": 0.5}, r"datasets\.1\.objective_options\.mask_rato: PartialMaskingDiffusion has no such option; "
                             "it has auxiliary, beta"),
        ({"mask_ratio": 2.0}, r"datasets\.1\.objective_options: mask_ratio is 2\.0; it must be in \(0, 1\]"),
        ({"mask_ratio": "much"}, r"datasets\.1\.objective_options: '<' not supported"),
        ({"auxiliary": {}}, r"datasets\.1\.objective_options: auxiliary losses are on, but the network was built "
                            "without heads"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_set_are_found_before_training(options: dict[str, Any], message: str):
    held = module()
    with pytest.raises(ConfigError, match=message):
        check_objective_options(held, phases({}, options))
    check_objective_options(held, phases({}, {"mask_ratio": 0.9}))
    assert held.objective.options.mask_ratio == 0.5


def test_options_that_an_objective_changes_in_place_are_set_from_their_phase_on():
    @dataclass
    class Options:
        weight: float = 1.0

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.options = Options()

        def set_options(self, weight: float) -> None:
            self.options.weight = weight

        def compute_loss(self, batch: dict[str, Any]) -> torch.Tensor:
            return torch.zeros(())

    held, run, weights = LossModule(InPlace()), phases({}, {"weight": 5.0}), []
    check_objective_options(held, run)
    for index in (0, 1, 0):
        set_objective_options(held, run, index)
        weights.append(held.objective.options.weight)
    assert weights == [1.0, 5.0, 1.0]


def test_options_of_an_objective_that_has_none_are_an_error(tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"datasets\.0\.objective_options: the loss .* cannot be set; it needs"
    ):
        train(tmp_path, toy({"objective_options": {"mask_ratio": 0.5}}))
    assert not (tmp_path / "runs").exists()


TRANSFORMER = {
    "model_class": "models.perturbation_transformer.PerturbationTransformer",
    "config_class": "models.perturbation_transformer.PerturbationTransformerConfig",
}


def test_auxiliary_losses_are_on_in_the_phases_that_say_so(tmp_path: Path):
    from toy_perturbations import NUM_GENES, NUM_TOKENS

    sizes = {**SIZES, "num_genes": NUM_GENES, "vocab_size": NUM_TOKENS, "use_target": False}
    model = {**TRANSFORMER, "config_args": {**sizes, "objective_args": {"auxiliary": {}}}}
    options: list[dict[str, Any]] = [{"auxiliary": None}, {"auxiliary": {"ramp_steps": 2}}, {}]
    sets = {"dataloader_factory": "toy_perturbations.set_loader", "max_steps": 2}
    run = toy(*({**sets, "objective_options": each} for each in options), model=model, micro_batch_size=2)
    folder = train(tmp_path, {**run, "global_batch_size": 4})
    assert ["direction_loss" in record for record in records(folder)] == [False] * 2 + [True] * 4


# Muon and Adam


def test_matrices_between_hidden_states_go_to_muon_and_everything_else_to_adam():
    model = PerturbationTransformer(
        PerturbationTransformerConfig(**SIZES, n_technical_batches=2, objective_args={"auxiliary": {}})
    )
    optimizer = muon_and_adam(list(model.parameters()), model=model, muon_lr=0.1, adam_lr=0.2)
    muon, adam = (set(names) for names in parameter_names(optimizer, model))
    assert [(g["name"], g["use_muon"], g["lr"]) for g in optimizer.param_groups] == [
        ("muon", True, 0.1),
        ("adam", False, 0.2),
    ]
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    assert muon | adam == shapes.keys() and not muon & adam and all(shapes[name] == 2 for name in muon)
    assert "transformer.layers.0.mlp.linear2.weight" in muon and "decoder.attention.q.weight" in muon
    tables = {name for name in shapes if "embedding" in name and ".linear" not in name or "head" in name}
    assert tables and tables <= adam


def test_a_step_of_muon_moves_a_matrix_by_about_its_rate_in_every_direction():
    torch.manual_seed(0)
    for shape in ((6, 10), (10, 6), (5, 5)):
        singular = torch.linalg.svdvals(orthogonalised(torch.randn(1, *shape) * 1e-3)[0])
        assert singular.min() > 0.5 and singular.max() < 1.3
    model = nn.Linear(4, 16, bias=False)
    before = model.weight.detach().clone()
    optimizer = muon_and_adam([model.weight], model=nn.Sequential(model), muon_lr=0.1, weight_decay=0.0)
    model.weight.grad = torch.randn(16, 4)
    optimizer.step()
    step = torch.linalg.svdvals(model.weight.detach() - before) / 0.1
    assert torch.allclose(step, torch.full((4,), 2.0), rtol=0.5)  # sqrt(16 / 4)


def test_adams_part_steps_as_torchs_adamw_does():
    torch.manual_seed(0)
    body, ours, theirs = (
        nn.Linear(3, 3, bias=False),
        nn.Parameter(torch.randn(5)),
        nn.Parameter(torch.zeros(5)),
    )
    theirs.data.copy_(ours.data)
    groups = [{"params": [body.weight], "use_muon": True}, {"params": [ours], "lr": 0.1}]
    optimizer = muon_and_adam(groups, model=body, adam_weight_decay=0.3)
    reference = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), weight_decay=0.3)
    for _ in range(4):
        ours.grad = torch.randn(5)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_a_model_without_matrices_and_groups_of_other_shapes_are_errors():
    table, norm = nn.Embedding(3, 2), nn.LayerNorm(4)
    with pytest.raises(ConfigError, match="no weight matrix is left for Muon; Embedding has none"):
        muon_and_adam(list(table.parameters()), model=table)
    with pytest.raises(ConfigError, match="group 'body' has use_muon and holds a parameter of shape \\[4\\]"):
        muon_and_adam([{"params": [norm.weight], "name": "body", "use_muon": True}], model=norm)
    with pytest.raises(ConfigError, match="mark a group of optimizer.groups"):
        muon_and_adam([{"params": [norm.weight]}], model=norm)


def test_muon_under_zero_is_refused_with_the_reason():
    model = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match="MuonAndAdam .* ZeRO divides parameters into stretches; use DDP"):
        check_elementwise(muon_and_adam(list(model.parameters()), model=model))


# What the original's configurations are told


def test_keys_of_the_original_trainer_are_answered_with_what_replaces_them(tmp_path: Path):
    phase = {"dataloader_factory": "toy.map_loader", "hooks": {}, "token_weighting_annealing_steps": 1}
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump({**toy(), "eval_mode": False, "datasets": [phase]}))
    with pytest.raises(ConfigError) as error:
        load_run_config(path)
    for text in (
        "datasets.0.hooks: no key of this program; .* freeze, reinitialise and objective_options",
        "datasets.0.token_weighting_annealing_steps: no key of this program; write objective_options",
        "eval_mode: no key of this program; `python -m trainer predict`",
    ):
        assert re.search(text, str(error.value)), text


def test_the_originals_loss_is_answered_with_what_replaces_it_and_its_arguments(tmp_path: Path):
    loss = {
        "loss_class": "engine.losses:DiffusionLoss",
        "loss_args": {"lambda_de": 0.1, "signif_mode": "share"},
    }
    with pytest.raises(ConfigError) as error:
        train(tmp_path, toy(), loss=loss)
    assert "leave `loss` out, because the model brings it" in str(error.value)
    assert "lambda_de is objective_args.auxiliary.significance_weight" in str(error.value)
    assert "signif_mode is objective_args.auxiliary.significant_by" in str(error.value)


# The shipped curriculum


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the corpus of configs/vcc.yaml, smaller, and its targets' names."""
    from trainer.convert_h5ad import main

    folder = tmp_path_factory.mktemp("curriculum")
    write_simulated_h5ad(
        folder / "cells.h5ad", num_genes=40, num_pathways=2, members_per_pathway=6, distal_per_pathway=6,
        targets_per_pathway=4, num_cell_types=2, num_batches=2, cells_per_target=8, control_cells=24,
    )  # fmt: skip
    assert main([str(folder / "cells.h5ad"), "--output", str(folder / "corpus")]) == 0
    return folder


def curriculum(place: Path, folder: Path, **changes: Any) -> list[str]:
    """Return the command's arguments for configs/vcc.yaml on a smaller corpus, in a few steps."""
    from data.corpus import open_corpus

    targets = [
        name for name in open_corpus(place / "corpus").class_names("target_gene") if name != "non-targeting"
    ]
    values: dict[str, Any] = {
        "output_dir": str(folder / "runs"),
        "device": "cpu",
        "model.config_args.hidden_dim": 8,
        "model.config_args.gene_dim": 8,
        "model.config_args.num_latents": 2,
        "model.config_args.num_layers": 1,
        "model.config_args.num_heads": 2,
        "datasets.0.dataloader_args.leave_out.target_gene": targets[:2],
        "datasets.1.dataloader_args.held_out_genes": targets[:2],
        "datasets.0.micro_batch_size": 8,
        "datasets.0.global_batch_size": 16,
        "datasets.0.max_steps": 4,
        "datasets.1.epochs": 10,
        "datasets.1.eval_every_epochs": 5,
        "datasets.1.save_every_steps": 1,
        "datasets.1.dataloader_args.set_size": 4,
        "checkpoint.keep_last": None,
        **{f"datasets.{phase}.dataloader_args.path": str(place / "corpus") for phase in (0, 1)},
        **changes,
    }
    return ["--config", str(ROOT / "configs" / "vcc.yaml")] + [
        f"{key}={json.dumps(value)}" for key, value in values.items()
    ]


@pytest.mark.slow
def test_the_curriculum_killed_in_its_second_phase_on_two_ranks_goes_on_bit_for_bit(
    place: Path, tmp_path: Path
):
    script = ROOT / "trainer" / "train.py"
    launch_ranks(2, [script, *curriculum(place, tmp_path / "whole")])
    whole = newest_run(tmp_path / "whole")
    cut = curriculum(place, tmp_path / "cut")
    with start_ranks(2, [script, *cut]) as group:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "cut").glob("runs/*/checkpoint_6/manifest.json")):
            assert group.is_running() and time.monotonic() < deadline, group.output()
            time.sleep(0.005)
        group.signal_ranks(signal.SIGKILL)
        group.wait(expect=None)
    killed = newest_run(tmp_path / "cut")
    last = int((killed / "latest").read_text().strip().removeprefix("checkpoint_"))
    assert 4 < last < 34, "the run was not killed in its second phase"
    launch_ranks(2, [script, *cut, "resume_from=latest"])
    assert newest_run(tmp_path / "cut") == killed
    assert comparable_records(killed) == comparable_records(whole) and same_weights(killed, whole)
    assert [record["phase"] for record in records(whole)] == ["cells"] * 4 + ["perturbations"] * 30
    has_auxiliary = ["direction_loss" in record for record in records(killed)]
    assert has_auxiliary == [False] * 4 + [True] * 30
