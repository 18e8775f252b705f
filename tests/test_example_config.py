import pytest
from launching import ROOT, run_command
from running import records


@pytest.mark.slow
def test_the_documents_own_command_runs(tmp_path):
    """`python -u train.py --config configs/example_scrna_vcc.yml`, with the files where this repository has them."""
    samples = sorted((ROOT / "data" / "samples").glob("*.h5ad"))
    options = ["--per-file", "--output", "quickstart/corpora", "--resume"]
    run_command(
        ["python", "-m", "trainer.convert_h5ad", *samples, *options],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
    )
    example = ROOT / "configs" / "example_scrna_vcc.yml"
    run_command(
        ["python", "-u", ROOT / "trainer" / "train.py", "--config", example], cwd=tmp_path, timeout=300
    )
    (folder,) = (tmp_path / "checkpoints").glob("example_scrna_vcc_*")
    steps = records(folder)
    assert [steps[0]["phase"], steps[-1]["phase"]] == ["chr21_counts", "pbmc_lognorm"]
    first, *_, last = (
        record["loss"] for record in records(folder, "validation") if record["phase"] == "chr21_counts"
    )
    assert last < first
