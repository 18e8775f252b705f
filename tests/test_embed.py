"""Embedding new cells: genes by name, one answer from run, checkpoint and export, an output that is whole or absent."""

import shutil

import anndata
import h5py
import numpy as np
import pytest
from h5ad_files import random_counts, write_h5ad
from launching import ROOT, launch_ranks
from running import toy, train

from data.errors import DataError
from data.h5ad_cells import H5adCells
from models.pretrained import config_fields
from trainer import embedding
from trainer.embed import main
from trainer.errors import UserError
from trainer.export import export
from trainer.saved_model import open_model

pytestmark = pytest.mark.usefixtures("forked_programs")

NUM_CELLS, NUM_GENES = 60, 40
GENES = [f"GENE{index}" for index in range(NUM_GENES)]
TOKENIZER = {
    "strategy": "binned_expression",
    "n_bins": 5,
    "max_genes": 12,
    "gene_selection": "random",
    "include_zero_genes": True,
}
ENCODER = {
    "model_class": "models.encoder.MaskedCellEncoder",
    "config_class": "models.encoder.EncoderConfig",
    "config_args": {"hidden_dim": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.1, "pooling": "mean"},
}


@pytest.fixture(scope="module")
def cells():
    counts = random_counts(NUM_CELLS, NUM_GENES, seed=1, high=9)
    counts[-1, 0] = 1  # of a cell without any there is no embedding
    return counts


@pytest.fixture(scope="module")
def place(tmp_path_factory, cells):
    """Return a folder with a file of cells and a model that was trained on them for a step."""
    from trainer.convert_h5ad import main as convert

    folder = tmp_path_factory.mktemp("embed")
    kinds = [f"kind{index % 3}" for index in range(NUM_CELLS)]
    write_h5ad(folder / "cells.h5ad", cells, obs={"cell_type": kinds, "age": np.arange(NUM_CELLS) * 0.5})
    assert convert([str(folder / "cells.h5ad"), "--output", str(folder / "corpus"), "--min-genes", "0"]) == 0
    arguments = {"path": str(folder / "corpus"), "tokenizer": TOKENIZER, "masking": {"mask_ratio": 0.3}}
    phase = {
        "dataloader_factory": "data.loader.cell_loader",
        "dataloader_args": arguments,
        "max_steps": 2,
    }
    run = train(folder, toy(phase, model=ENCODER, micro_batch_size=8, global_batch_size=8))
    (folder / "run").symlink_to(run)
    return folder


@pytest.fixture(scope="module")
def exported(place, tmp_path_factory, forked_programs):
    folder = tmp_path_factory.mktemp("exported") / "export"
    export(place / "run", folder)
    return folder


@pytest.fixture(scope="module")
def fine_tuned(place, tmp_path_factory):
    """Return a run that learned the type of each cell, beginning with the weights of the other."""
    arguments = {"path": str(place / "corpus"), "tokenizer": TOKENIZER, "label": "cell_type"}
    phase = {"dataloader_factory": "data.loader.cell_loader", "dataloader_args": arguments, "max_steps": 2}
    model = {
        "model_class": "models.fine_tuned.FineTunedModel",
        "config_class": "models.fine_tuned.FineTunedConfig",
        "config_args": {
            "backbone_class": "models.encoder.MaskedCellEncoder",
            "backbone_config": config_fields(open_model(place / "run").model.config),
        },
    }
    config = toy(phase, model=model, micro_batch_size=8, global_batch_size=8, init_from=str(place / "run"))
    return train(tmp_path_factory.mktemp("fine_tuned"), config)


def embed(place, data, output, *options):
    arguments = ["--model", place / "run", "--data", data, "--output", output, "--device", "cpu", *options]
    return main([str(argument) for argument in arguments])


def embeddings(place, data, tmp_path, *options):
    output = tmp_path / "out.h5ad"
    assert embed(place, data, output, "--overwrite", *options) == 0
    return anndata.read_h5ad(output).obsm["X_cellphase"]


@pytest.fixture(scope="module")
def expected(place, tmp_path_factory):
    return embeddings(place, place / "cells.h5ad", tmp_path_factory.mktemp("expected"))


def test_the_output_is_the_input_with_the_embeddings(place, tmp_path, expected):
    assert embed(place, place / "cells.h5ad", tmp_path / "out.h5ad", "--key", "X_mine") == 0
    given, written = (anndata.read_h5ad(path) for path in (place / "cells.h5ad", tmp_path / "out.h5ad"))
    assert written.obsm["X_mine"].shape == (NUM_CELLS, 16) and np.ptp(expected, axis=0).min() > 0
    del written.obsm["X_mine"]
    assert given.obs.equals(written.obs) and given.var.equals(written.var)
    assert (given.X != written.X).nnz == 0 and list(written.obsm) == []


def test_genes_in_another_order_give_the_same_embeddings(place, tmp_path, cells, expected):
    order = np.random.default_rng(0).permutation(NUM_GENES)
    path = write_h5ad(tmp_path / "permuted.h5ad", cells[:, order], genes=[GENES[index] for index in order])
    assert np.abs(embeddings(place, path, tmp_path) - expected).max() < 1e-5


def test_genes_that_the_model_does_not_know_are_left_out(place, tmp_path, cells, capsys):
    strange = np.column_stack([np.zeros((NUM_CELLS, 3)), cells])
    path = write_h5ad(tmp_path / "more.h5ad", strange, genes=["NOVEL1", "NOVEL2", "NOVEL3", *GENES])
    plain = write_h5ad(tmp_path / "plain.h5ad", cells)
    assert np.abs(embeddings(place, path, tmp_path) - embeddings(place, plain, tmp_path)).max() < 1e-5
    assert "40 of 43 genes are the model's, by symbol" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_antibodies_of_the_file_change_nothing(place, tmp_path, cells, capsys):
    both = np.column_stack([np.full((NUM_CELLS, 2), 500), cells])
    kinds = ["Antibody Capture"] * 2 + ["Gene Expression"] * NUM_GENES
    names = ["GENE1", "CD3", *GENES]  # an antibody may have the name of its gene
    path = write_h5ad(tmp_path / "more.h5ad", both, genes=names, var={"feature_types": kinds})
    plain = write_h5ad(tmp_path / "plain.h5ad", cells)
    assert np.array_equal(embeddings(place, path, tmp_path), embeddings(place, plain, tmp_path))
    assert "no genes, and left out of counts and totals: 2 Antibody Capture" in capsys.readouterr().out
    tokenizer = open_model(place / "run").tokenizer
    with (
        H5adCells(path, tokenizer, say=print) as antibodies,
        H5adCells(plain, tokenizer, say=print) as genes,
    ):
        assert np.array_equal(antibodies.depth()[0], genes.depth()[0])
        assert np.array_equal(antibodies.expression().toarray()[:, 2:], genes.expression().toarray())


def test_a_file_with_fewer_genes_works_with_an_account(place, tmp_path, cells, expected, capsys):
    path = write_h5ad(tmp_path / "fewer.h5ad", cells[:, :25], genes=GENES[:25])
    found = embeddings(place, path, tmp_path)
    account = "25 of 25 genes are the model's, by symbol; it lacks 15 of the model's 40, such as GENE25"
    assert account in capsys.readouterr().out
    assert np.isfinite(found).all() and np.abs(found - expected).max() > 1e-3


def test_a_gene_that_was_not_measured_is_not_a_zero(place, tmp_path, cells):
    zeros = cells.copy()
    zeros[:, 25:] = 0
    measured = write_h5ad(tmp_path / "zeros.h5ad", zeros)
    without = write_h5ad(tmp_path / "without.h5ad", cells[:, :25], genes=GENES[:25])
    assert np.abs(embeddings(place, measured, tmp_path) - embeddings(place, without, tmp_path)).max() > 1e-3


def test_a_file_without_a_common_gene_is_refused(place, tmp_path, cells, capsys):
    path = write_h5ad(tmp_path / "other.h5ad", cells, genes=[f"OTHER{index}" for index in range(NUM_GENES)])
    assert embed(place, path, tmp_path / "out.h5ad") == 2
    assert "no gene in common with the model: the file names them like OTHER0" in capsys.readouterr().err
    path = write_h5ad(tmp_path / "human.h5ad", cells[:, :3], genes=["TP53", "BRCA1", "ACTB"])
    assert embed(place, path, tmp_path / "out.h5ad") == 2
    assert "cells of the model's organism? Of the gene vocabularies, human_" in capsys.readouterr().err
    assert not (tmp_path / "out.h5ad").exists()


def test_too_few_common_genes_are_refused_unless_asked_for(place, tmp_path, cells, capsys):
    names = [*GENES[:4], *(f"OTHER{index}" for index in range(36))]
    path = write_h5ad(tmp_path / "few.h5ad", cells, genes=names)
    assert embed(place, path, tmp_path / "out.h5ad") == 2
    assert "4 of 40 genes are the model's, by symbol, fewer than --min-match 0.5" in capsys.readouterr().err
    assert embed(place, path, tmp_path / "out.h5ad", "--min-match", "0.1") == 0


def test_the_batch_size_and_the_layout_of_the_matrix_do_not_matter(place, tmp_path, cells, expected):
    for number, layout in enumerate(("csc", "dense")):
        path = write_h5ad(tmp_path / f"{layout}.h5ad", cells, layout=layout)
        found = embeddings(place, path, tmp_path, "--batch-size", 7 + number)
        assert np.abs(found - expected).max() < 1e-5


def test_the_matrix_of_the_models_kind_is_found(place, tmp_path, cells, expected, capsys):
    logs = np.log1p(cells)
    path = write_h5ad(tmp_path / "layer.h5ad", logs, layers={"counts": cells})
    assert np.abs(embeddings(place, path, tmp_path) - expected).max() < 1e-5
    assert (
        "layers/counts (whole numbers up to 9): counts, as the model was trained on"
        in capsys.readouterr().out
    )
    path = write_h5ad(tmp_path / "logs.h5ad", logs)
    assert embed(place, path, tmp_path / "none.h5ad") == 2
    assert "no matrix of counts, which the model was trained on" in capsys.readouterr().err
    path = write_h5ad(tmp_path / "other.h5ad", logs, layers={"raw_counts": cells})
    assert embed(place, path, tmp_path / "none.h5ad") == 2
    assert "; counts are in raw_counts: --layer raw_counts" in capsys.readouterr().err


def test_run_checkpoint_and_export_open_the_same_model(place, exported, tmp_path, expected):
    newest = (place / "run" / "latest").read_text().strip()
    for path in (place / "run" / newest, exported):
        options = ["--model", path, "--data", place / "cells.h5ad", "--output", tmp_path / "out.h5ad"]
        assert main([str(part) for part in [*options, "--overwrite"]]) == 0
        assert np.array_equal(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_cellphase"], expected)


def test_an_export_of_a_model_of_ones_own_is_opened_where_its_module_is_trusted(
    place, exported, tmp_path, monkeypatch, expected, capsys
):
    (tmp_path / "own_encoder.py").write_text(
        "from models.encoder import MaskedCellEncoder\nclass Own(MaskedCellEncoder): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(exported, tmp_path / "export")
    config = tmp_path / "export" / "config.json"
    config.write_text(config.read_text().replace("models.encoder.MaskedCellEncoder", "own_encoder.Own"))
    output = tmp_path / "out.h5ad"
    options = ["--model", tmp_path / "export", "--data", place / "cells.h5ad", "--output", output]
    assert main([*map(str, options)]) == 2
    assert "to a command, --trust own_encoder" in capsys.readouterr().err
    assert main([*map(str, options), "--trust", "own_encoder"]) == 0
    assert np.array_equal(anndata.read_h5ad(output).obsm["X_cellphase"], expected)


def test_an_untrained_network_has_the_same_shape_and_other_weights(place, exported):
    for path in (place / "run", exported):
        opened = open_model(path)
        one, two, three = (opened.untrained(seed).state_dict() for seed in (0, 0, 1))
        trained = opened.model.state_dict()
        name = "token_embedding.weight"
        assert one.keys() == trained.keys() and one[name].equal(two[name])
        assert not one[name].equal(three[name]) and not one[name].equal(trained[name])


def test_an_existing_output_is_kept_unless_it_is_to_be_replaced(place, tmp_path, capsys):
    output = tmp_path / "out.h5ad"
    output.write_text("precious")
    assert embed(place, place / "cells.h5ad", output) == 2
    assert "exists; name another file, or give --overwrite" in capsys.readouterr().err
    assert output.read_text() == "precious"
    assert embed(place, place / "cells.h5ad", output, "--overwrite") == 0
    assert anndata.read_h5ad(output).obsm["X_cellphase"].shape == (NUM_CELLS, 16)


def test_an_output_in_the_place_of_the_input_is_refused(place, tmp_path, cells, capsys):
    path = write_h5ad(tmp_path / "cells.h5ad", cells)
    assert embed(place, path, path, "--overwrite") == 2
    assert "is the input file itself" in capsys.readouterr().err


def test_embeddings_that_the_input_has_already_are_not_replaced(place, tmp_path, capsys):
    data = anndata.read_h5ad(place / "cells.h5ad")
    data.obsm["X_cellphase"] = np.zeros((NUM_CELLS, 2))
    data.write_h5ad(tmp_path / "embedded.h5ad")
    assert embed(place, tmp_path / "embedded.h5ad", tmp_path / "next.h5ad") == 2
    assert "obsm has 'X_cellphase' already; choose another --key" in capsys.readouterr().err


def test_an_old_file_that_anndata_cannot_read_is_named(place, tmp_path, capsys):
    data = shutil.copy(place / "cells.h5ad", tmp_path / "old.h5ad")
    with h5py.File(data, "r+") as file:
        del file["obs"].attrs["encoding-type"]
        file["uns"].create_group("broken").attrs["encoding-type"] = "of a later version"
    assert embed(place, data, tmp_path / "out.h5ad") == 2
    assert "old.h5ad: anndata cannot read it (" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["old.h5ad"]


def test_a_failure_on_the_way_leaves_nothing_behind(place, tmp_path, cells):
    spoiled = cells.astype(float)
    spoiled[-2, 3] = 2.5
    # Not in the sample by which the matrix is chosen: whole numbers before, so it is met on the way.
    path = write_h5ad(tmp_path / "spoiled.h5ad", spoiled)
    assert embed(place, path, tmp_path / "out.h5ad", "--layer", "X") == 2
    assert sorted(each.name for each in tmp_path.iterdir()) == ["spoiled.h5ad"]


def test_a_model_whose_cells_this_program_did_not_tokenize_is_refused(tmp_path):
    run = train(tmp_path, toy({}))
    with pytest.raises(
        UserError, match="its cells were read by toy.map_loader, so nothing says how new cells"
    ):
        open_model(run, trusted_modules=("toy",))


def test_phases_that_differ_need_a_name(place, tmp_path):
    arguments = {"path": str(place / "corpus"), "masking": {"mask_ratio": 0.3}}
    loader = {"dataloader_factory": "data.loader.cell_loader", "max_steps": 1}
    phases = [
        {**loader, "dataloader_args": {**arguments, "tokenizer": {**TOKENIZER, "max_genes": size}}}
        for size in (12, 8)
    ]
    run = train(tmp_path, toy(*phases, model=ENCODER, micro_batch_size=8, global_batch_size=8))
    with pytest.raises(DataError, match="the run's phases differ in their settings"):
        open_model(run)
    assert open_model(run, "p1").tokenizer.options["max_genes"] == 8


def test_a_fine_tuned_model_answers_by_name(place, fine_tuned, tmp_path):
    options = ["--model", fine_tuned, "--data", place / "cells.h5ad", "--output", tmp_path / "out.h5ad"]
    assert main([str(part) for part in options]) == 0
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(written.obs["cellphase_label"].cat.categories) == ["kind0", "kind1", "kind2"]
    assert written.obs["cellphase_probability"].between(1 / 3 - 1e-6, 1).all()
    assert list(written.obs.columns[:2]) == ["cell_type", "age"]


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_cells_without_the_models_genes_get_no_embedding_and_no_answer(
    fine_tuned, tmp_path, cells, layout, capsys
):
    counts = np.column_stack([cells, np.ones(NUM_CELLS)])
    counts[[0, 7, 59], :NUM_GENES] = 0  # the gene that is left is not the model's
    path = write_h5ad(tmp_path / "in.h5ad", counts, genes=[*GENES, "NOVEL"], layout=layout)
    options = ["--model", fine_tuned, "--data", path, "--output", tmp_path / "out.h5ad", "--batch-size", "3"]
    assert main([str(part) for part in options]) == 0
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    empty = np.isin(np.arange(NUM_CELLS), [0, 7, 59])
    assert (np.isnan(written.obsm["X_cellphase"]) == empty[:, None]).all()
    assert (written.obs["cellphase_label"].isna() == empty).all()
    assert (written.obs["cellphase_probability"].isna() == empty).all()
    said = capsys.readouterr().out
    assert (
        "3 of 60 cells have no count of any of the model's genes: they keep their place, with NaN in" in said
    )


def test_a_file_of_cells_without_the_models_genes_is_refused(place, tmp_path, cells, capsys):
    path = write_h5ad(
        tmp_path / "none.h5ad", np.column_stack([0 * cells, cells[:, 0]]), genes=[*GENES, "NOVEL"]
    )
    assert embed(place, path, tmp_path / "out.h5ad") == 2
    assert "none of its 60 cells has a count of any of the model's genes" in capsys.readouterr().err
    assert not (tmp_path / "out.h5ad").exists()


def test_a_column_of_answers_that_is_there_is_found_before_the_rest_is_computed(
    fine_tuned, tmp_path, cells, monkeypatch, capsys
):
    path = write_h5ad(tmp_path / "taken.h5ad", cells, obs={"cellphase_label": ["x"] * NUM_CELLS})
    rounds = []
    gathered = embedding._gathered
    monkeypatch.setattr(embedding, "_gathered", lambda *given: rounds.append(1) or gathered(*given))
    options = ["--model", fine_tuned, "--data", path, "--output", tmp_path / "next.h5ad", "--batch-size", "1"]
    assert main([str(part) for part in options]) == 2
    assert "obs has cellphase_label already; choose another --key" in capsys.readouterr().err
    assert len(rounds) == 1


def test_a_model_that_is_opened_knows_what_it_was_fine_tuned_for(place, fine_tuned):
    assert open_model(fine_tuned).task == "classification" and open_model(place / "run").task is None


def test_two_ranks_embed_as_one(place, tmp_path, expected):
    options = ["--model", place / "run", "--data", place / "cells.h5ad", "--output", tmp_path / "out.h5ad"]
    launch_ranks(2, ["-m", "trainer", "embed", *options, "--batch-size", "3", "--device", "cpu"], cwd=ROOT)
    assert np.abs(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_cellphase"] - expected).max() < 1e-5


def test_two_ranks_leave_out_the_cells_that_one_does(fine_tuned, tmp_path, cells):
    counts = cells.copy()
    counts[[5, 30]] = 0
    path = write_h5ad(tmp_path / "in.h5ad", counts)
    options = ["--model", fine_tuned, "--data", path, "--output", tmp_path / "out.h5ad"]
    launch_ranks(2, ["-m", "trainer", "embed", *options, "--batch-size", "3", "--device", "cpu"], cwd=ROOT)
    written = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert np.flatnonzero(np.isnan(written.obsm["X_cellphase"]).any(axis=1)).tolist() == [5, 30]
    assert np.flatnonzero(written.obs["cellphase_label"].isna()).tolist() == [5, 30]
