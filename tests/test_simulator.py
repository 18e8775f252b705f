from pathlib import Path

import anndata
import numpy as np
import pytest

from data.errors import DataError
from data.simulator import CONTROL, SimulatedPerturbations, main, simulate_perturbations, write_simulated_h5ad


@pytest.fixture(scope="module")
def cells() -> SimulatedPerturbations:
    return simulate_perturbations()


def log_normalised(cells: SimulatedPerturbations) -> np.ndarray:
    counts = cells.counts.toarray()
    return np.log1p(counts * 1e4 / counts.sum(axis=1, keepdims=True))


def observed_effects(cells: SimulatedPerturbations) -> np.ndarray:
    """Return [cell types, targets, genes], the change of mean expression against the controls of the cell type."""
    values, is_control = log_normalised(cells), cells.target_of < 0

    def mean(chosen: np.ndarray) -> np.ndarray:
        return values[chosen].mean(axis=0)

    types = range(len(cells.cell_types))
    controls = [mean(is_control & (cells.cell_type_of == kind)) for kind in types]
    return np.array(
        [
            [
                mean((cells.target_of == target) & (cells.cell_type_of == kind)) - controls[kind]
                for target in range(len(cells.targets))
            ]
            for kind in types
        ]
    )


def control_correlations(cells: SimulatedPerturbations) -> np.ndarray:
    """Return [targets, targets], the correlation over control cells within each cell type and technical batch."""
    values = log_normalised(cells)
    is_control = cells.target_of < 0
    for kind in range(len(cells.cell_types)):
        for batch in range(len(cells.batches)):
            chosen = is_control & (cells.cell_type_of == kind) & (cells.batch_of == batch)
            values[chosen] -= values[chosen].mean(axis=0)
    places = [cells.genes.index(target) for target in cells.targets]
    return np.corrcoef(values[is_control][:, places].T)


def held_out_error(cells: SimulatedPerturbations, weights: np.ndarray) -> float:
    """Predict each target's effect as the weighted mean of the others'; weights [targets, targets]."""
    effects = observed_effects(cells)
    weights = weights * ~np.eye(len(weights), dtype=bool)
    predicted = np.einsum("tu,cug->ctg", weights / weights.sum(axis=1, keepdims=True), effects)
    places = [cells.genes.index(target) for target in cells.targets]
    errors = np.square(predicted - effects)
    errors[:, np.arange(len(places)), places] = 0  # its own fall is known without any model
    return float(errors.sum())


def test_the_same_options_give_the_same_cells_and_another_seed_gives_others(cells: SimulatedPerturbations):
    again, other = simulate_perturbations(), simulate_perturbations(seed=1)
    assert (again.counts != cells.counts).nnz == 0 and np.array_equal(again.effects, cells.effects)
    assert (other.counts != cells.counts).nnz > 0


def test_every_cell_type_has_its_cells_of_every_target_in_every_batch(cells: SimulatedPerturbations):
    options = cells.options
    keys = np.stack([cells.target_of, cells.cell_type_of, cells.batch_of])
    found, counts = np.unique(keys, axis=1, return_counts=True)
    is_control = found[0] < 0
    assert found.shape[1] == (len(cells.targets) + 1) * options.num_cell_types * options.num_batches
    assert set(counts[is_control]) == {options.control_cells // options.num_batches}
    assert set(counts[~is_control]) == {options.cells_per_target // options.num_batches}


def test_the_pathway_of_a_target_can_be_told_from_control_cells(cells: SimulatedPerturbations):
    correlations = control_correlations(cells)
    np.fill_diagonal(correlations, np.nan)
    pathways = range(cells.options.num_pathways)
    scores = np.stack(
        [np.nanmean(correlations[:, cells.target_pathway == pathway], axis=1) for pathway in pathways], axis=1
    )
    assert np.mean(scores.argmax(axis=1) == cells.target_pathway) > 0.9


def test_what_control_cells_say_of_pathways_beats_the_mean_response_on_targets_never_seen(
    cells: SimulatedPerturbations,
):
    everything = np.ones((len(cells.targets), len(cells.targets)))
    mean_response = held_out_error(cells, everything)
    same_pathway = held_out_error(cells, (cells.target_pathway[:, None] == cells.target_pathway) * 1.0)
    correlated = held_out_error(cells, np.maximum(control_correlations(cells), 0) ** 2)
    no_effect = float(np.square(observed_effects(cells)).sum())
    assert correlated < 0.4 * mean_response < mean_response < no_effect
    assert same_pathway < 0.4 * mean_response


def test_targets_of_a_pathway_share_a_direction_and_others_do_not(cells: SimulatedPerturbations):
    effects = cells.effects[0].copy()
    effects[np.arange(len(effects)), [cells.genes.index(target) for target in cells.targets]] = 0
    unit = effects / np.linalg.norm(effects, axis=1, keepdims=True)
    cosine = unit @ unit.T
    is_same = cells.target_pathway[:, None] == cells.target_pathway
    assert cosine[is_same].min() > 0.8 > 0.6 > cosine[~is_same].max()


def test_the_effects_that_are_said_are_those_of_the_cells(cells: SimulatedPerturbations):
    rates = np.exp(cells.baseline.mean(axis=1))
    expected = np.log(np.exp(cells.effects) * rates[:, None]) - np.log(rates[:, None])
    observed = observed_effects(cells)
    assert np.corrcoef(expected.reshape(-1), observed.reshape(-1))[0, 1] > 0.8
    places = [cells.genes.index(target) for target in cells.targets]
    assert (observed[:, np.arange(len(places)), places] < 0).all()


def test_the_baseline_depends_on_cell_type_and_technical_batch(cells: SimulatedPerturbations):
    values, is_control = log_normalised(cells), cells.target_of < 0
    first = is_control & (cells.cell_type_of == 0)
    noise = values[first & (cells.batch_of == 0)].std(axis=0).mean() / np.sqrt(25)
    by_batch = [values[first & (cells.batch_of == batch)].mean(axis=0) for batch in (0, 1)]
    by_type = [values[is_control & (cells.cell_type_of == kind)].mean(axis=0) for kind in (0, 1)]
    assert np.abs(by_batch[0] - by_batch[1]).mean() > noise
    assert np.abs(by_type[0] - by_type[1]).mean() > 3 * noise


@pytest.mark.parametrize("dispersion", [0.0, 0.5])
def test_counts_are_poisson_or_wider(dispersion: float):
    cells = simulate_perturbations(
        dispersion=dispersion, activity=0.0, num_cell_types=1, num_batches=1, cells_per_target=1,
        control_cells=3000, num_genes=100, depth=5000.0,
    )  # fmt: skip
    counts = cells.counts.toarray()[cells.target_of < 0].astype(float)
    rates = np.exp(cells.baseline[0, 0])
    # The library size is the cell's own, so it is divided out.
    library = counts.sum(axis=1, keepdims=True)
    mean = rates / rates.sum()
    excess = (
        np.mean((counts - library * mean) ** 2 - library * mean, axis=0)
        / np.mean(library * mean, axis=0) ** 2
    )
    assert np.median(excess) == pytest.approx(dispersion, abs=0.08)


def test_the_file_holds_the_cells_and_the_truth(tmp_path: Path):
    cells = write_simulated_h5ad(tmp_path / "cells.h5ad", num_genes=120, cells_per_target=4, control_cells=8)
    read = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert np.array_equal(read.X.toarray(), cells.counts.toarray())
    names = np.array([*cells.targets, CONTROL])
    assert read.obs["target_gene"].tolist() == names[cells.target_of].tolist()
    assert read.obs["batch"].tolist() == np.array(cells.batches)[cells.batch_of].tolist()
    assert np.array_equal(read.varm["effect_type_1"], cells.effects[1].T)
    assert read.var["pathway"].tolist() == cells.pathway.tolist()
    told = read.uns["simulator"]
    assert told["targets"].tolist() == cells.targets and told["options"]["num_genes"] == 120
    assert told["target_pathway"].tolist() == cells.target_pathway.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_genes": 50}, "num_genes 50 is less than 6 pathways of 12 members = 72"),
        ({"targets_per_pathway": 13}, "targets are members"),
        ({"distal_per_pathway": 190}, "more than the genes beside"),
        ({"num_batches": 0}, "num_batches is 0; it must be at least 1"),
        ({"depth": -1.0}, "depth is -1.0; it must be at least 0"),
        ({"activity": float("nan")}, "activity is nan; it must be at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict, message: str):
    with pytest.raises(DataError, match=message):
        simulate_perturbations(**options)


def test_the_command_writes_what_its_options_say_and_names_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    path = tmp_path / "cells.h5ad"
    options = ["--num-genes", "90", "--cells-per-target", "2", "--control-cells", "6", "--dispersion", "0"]
    assert main([str(path), *options]) == 0
    assert "234 cells, 90 genes, 36 targets" in capsys.readouterr().out
    expected = simulate_perturbations(num_genes=90, cells_per_target=2, control_cells=6, dispersion=0.0)
    assert np.array_equal(anndata.read_h5ad(path).X.toarray(), expected.counts.toarray())
    assert main([str(path), "--num-genes", "5"]) == 2
    assert "error: num_genes 5 is less" in capsys.readouterr().err
