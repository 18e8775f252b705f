"""What stands here for names of the phases trainer whose configurations this program reads (`datasets`)."""

from collections.abc import Iterable

REPLACED_KEYS = {
    "eval_mode": "`python -m trainer predict` and `score` measure a trained model; datasets.N.eval_every_epochs and "
    "datasets.N.scoring do in training",
    "test_prep_mode": "`python -m trainer predict` writes predictions of perturbations that no cell was measured of",
    "test_genes_path": "`python -m trainer predict` takes the target genes",
    "datasets.N.hooks": "what happens at the start of a phase has keys of its own: freeze, reinitialise and "
    "objective_options",
    "datasets.N.token_weighting_annealing_steps": "write objective_options: {token_weighting_annealing_steps: ...}, of "
    "an objective that weighs tokens (partial, with token_frequencies)",
}
"""By key, with N for places in lists."""

_LOSS = "leave `loss` out, because the model brings it: model.config_args"
REPLACED_PATHS = {
    "engine.losses.DiffusionLoss": _LOSS,
    "models.diffusion.AbsorbingMaskMD4Continuous": f"{_LOSS}.objective: absorbing",
    "models.diffusion.PartialMaskingDiffusion": f"{_LOSS}.objective: partial",
    "models.diffusion.create_muon_optimizer": "use trainer.muon.muon_and_adam",
    "models.diffusion.ConditionalDiffusionTransformer": "use models.perturbation_transformer.PerturbationTransformer",
    "models.diffusion.ConditionalModelConfig": "use models.perturbation_transformer.PerturbationTransformerConfig",
    "wrappers.factories.create_scrna_pretrain": "use data.expression.expression_loader, of a converted corpus",
    "wrappers.factories.create_orion_finetune": "use data.perturbation.perturbation_loader, of a converted corpus",
    "wrappers.factories.create_vcc_finetune": "use data.perturbation.perturbation_loader, of a converted corpus",
}
"""By dotted path."""

_AUXILIARY = "objective_args.auxiliary"
_LOSS_ARGUMENTS = {
    "diffusion_class": "objective",
    "diffusion_args": "objective_args",
    "lambda_de": f"{_AUXILIARY}.significance_weight",
    "lambda_dir": f"{_AUXILIARY}.direction_weight",
    "lambda_rank": f"{_AUXILIARY}.ranking_weight",
    "de_pos_weight": f"{_AUXILIARY}.positive_weight",
    "signif_mode": f"{_AUXILIARY}.significant_by",
    "signif_arg": f"{_AUXILIARY}.significant_share, or significant_change",
}


def advice_on_key(path: Iterable[str | int]) -> str | None:
    """Return what replaces a key at this place, or None where nothing is known of it."""
    return REPLACED_KEYS.get(".".join("N" if isinstance(part, int) else str(part) for part in path))


def advice_on_path(path: str, arguments: Iterable[str]) -> str | None:
    """Return what replaces a dotted path and its arguments, or None where nothing is known of it."""
    advice = REPLACED_PATHS.get(path.replace(":", "."))
    known = [name for name in arguments if name in _LOSS_ARGUMENTS]
    if advice is None or not advice.startswith(_LOSS):
        return advice
    return advice + "".join(f"; {name} is {_LOSS_ARGUMENTS[name]}" for name in known)
