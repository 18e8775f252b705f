"""What an embedding has to beat: representations that took no training, and how much of it is sequencing depth."""

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trainer.scoring.cells import Cells, Score

NUM_HVG = 2000
NUM_COMPONENTS = 32
NUM_PROJECTED = 64
_NUM_FOLDS = 5
_PENALTIES = tuple(10.0**power for power in range(-1, 6))


def representations(cells: Cells, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Return representations [n, D] of the cells that know expression alone, by name.

    `highly_variable_genes` are the genes whose log-normalised expression varies most, standardised (`all_genes` where
    no more than that are expressed); `pca_32` their principal components, and `random_projection_64` a random linear
    map of the log-normalised expression of all genes.
    """
    name, genes = _variable_genes(cells)
    scaled = StandardScaler().fit_transform(genes).astype(np.float32)
    num_components = min(NUM_COMPONENTS, *scaled.shape)
    # Not the randomised solver: its components of small variance differ from seed to seed, and with them the scores.
    components = PCA(num_components, svd_solver="covariance_eigh").fit_transform(scaled)
    rng = np.random.default_rng(seed)
    num_genes = cells.expression.shape[1]
    projection = rng.standard_normal((num_genes, NUM_PROJECTED)) / np.sqrt(NUM_PROJECTED)
    return {
        name: scaled,
        f"pca_{num_components}": components.astype(np.float32),
        f"random_projection_{NUM_PROJECTED}": np.asarray(cells.expression @ projection, dtype=np.float32),
    }


def depth_r2(features: NDArray[np.floating], cells: Cells, seed: int = 0) -> Score:
    """Return how much of the variance of log sequencing depth a linear map of the features explains, held out.

    Near 1: the representation knows little else than how deeply a cell was sequenced, or that beside other things.
    """
    if cells.depth.std() == 0:
        return Score(0.0)
    folds = KFold(min(_NUM_FOLDS, len(cells)), shuffle=True, random_state=seed)
    model = make_pipeline(StandardScaler(), RidgeCV(alphas=_PENALTIES))
    return Score(float(r2_score(cells.depth, cross_val_predict(model, features, cells.depth, cv=folds))))


def _variable_genes(cells: Cells) -> tuple[str, NDArray[np.float32]]:
    expression = cells.expression
    mean = np.asarray(expression.mean(axis=0)).ravel()
    variance = np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean**2
    expressed = np.flatnonzero(np.asarray((expression > 0).sum(axis=0)).ravel())
    if len(expressed) <= NUM_HVG:
        return "all_genes", expression[:, expressed].toarray()
    chosen = np.sort(np.argsort(-variance, kind="stable")[:NUM_HVG])
    return "highly_variable_genes", expression[:, chosen].toarray()
