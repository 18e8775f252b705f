"""A job is done once: `resume_from: auto` loses none, and a run that has ended stays what was trained."""

import os
import shutil

import pytest
from running import TOY, copy_until, records, same_weights, toy, train, write_config

from trainer.config import dump_yaml, load_run_config
from trainer.errors import UserError
from trainer.runfolder import RunLease
from trainer.same_job import is_finished, what_differs

PHASE = {"epochs": 2, "save_every_steps": 1}
JOB = toy(PHASE)
OTHER = toy({**PHASE, "lr": 0.003})
ELSEWHERE = {"max_wall_seconds": 10_000, "trackers": [], "checkpoint": {"keep_last": 1}, "num_threads": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"), JOB)


@pytest.fixture
def ended(finished, tmp_path):
    """Return a copy of the run folder of a job that has ended."""
    return copy_until(finished, 4, tmp_path)


def runs_of(folder):
    return sorted(path.name for path in (folder / "runs").iterdir())


def died_before_its_first_checkpoint(ended, config, seconds_later=1.0):
    """Leave what a run leaves that began so long after another had ended, and saved nothing."""
    folder = ended.with_name("toy_29990101_000000")
    folder.mkdir()
    loaded = load_run_config(write_config(folder / "given", config))
    (folder / "config.yaml").write_text(dump_yaml(loaded))
    shutil.rmtree(folder / "given")
    saved = (ended / "checkpoint_4" / "manifest.json").stat().st_mtime
    os.utime(folder / "config.yaml", (saved + seconds_later,) * 2)
    return folder


def test_a_job_that_has_ended_is_done_and_says_how_to_train_it_anew(ended, tmp_path, capsys):
    before = (ended / "metrics.jsonl").read_bytes()
    train(tmp_path, {**JOB, **ELSEWHERE}, resume_from="auto")
    assert runs_of(tmp_path) == [ended.name] and (ended / "metrics.jsonl").read_bytes() == before
    said = capsys.readouterr().out
    assert "nothing is left to do. To train this job anew, set resume_from: null" in said
    assert "trained otherwise" not in said


def test_another_job_of_the_name_begins_though_one_has_ended(ended, tmp_path, capsys):
    train(tmp_path, OTHER, resume_from="auto")
    first, second = (tmp_path / "runs" / name for name in runs_of(tmp_path))
    assert first == ended and [record["lr"] for record in records(second)] == [0.003] * 4
    said = " ".join(capsys.readouterr().out.split())
    assert "has ended and was trained otherwise (datasets.0.lr): this is a new run" in said


def test_a_requeued_job_finds_its_own_run_behind_that_of_another(ended, tmp_path):
    train(tmp_path, OTHER, resume_from="auto")
    before = runs_of(tmp_path)
    for config in (JOB, OTHER):
        train(tmp_path, config, resume_from="auto")
        assert runs_of(tmp_path) == before


def test_a_job_that_was_cut_goes_on_behind_another_that_has_ended(ended, tmp_path):
    train(tmp_path, OTHER, resume_from="auto")
    for step in (3, 4):
        shutil.rmtree(ended / f"checkpoint_{step}")
    train(tmp_path, JOB, resume_from="auto")
    assert len(runs_of(tmp_path)) == 2 and len(records(ended)) == 4 and (ended / "checkpoint_4").is_dir()


def test_a_job_that_died_before_its_first_checkpoint_is_trained(ended, tmp_path, capsys):
    """Whether it is another job than the one that has ended, or the same that was begun again."""
    died = died_before_its_first_checkpoint(ended, JOB)
    train(tmp_path, JOB, resume_from="auto")
    [new] = set(runs_of(tmp_path)) - {ended.name, died.name}
    assert same_weights(tmp_path / "runs" / new, ended)
    assert "began the same job again and saved nothing" in " ".join(capsys.readouterr().out.split())
    train(tmp_path, JOB, resume_from="auto")
    assert len(runs_of(tmp_path)) == 3, "it has ended since"


@pytest.mark.parametrize(("config", "seconds"), [(OTHER, 1.0), (JOB, -100.0)], ids=["another", "earlier"])
def test_a_run_that_died_says_nothing_of_another_job_or_of_an_earlier_start(ended, tmp_path, config, seconds):
    died = died_before_its_first_checkpoint(ended, config, seconds)
    train(tmp_path, JOB, resume_from="auto")
    assert set(runs_of(tmp_path)) == {ended.name, died.name}


def test_a_job_that_is_being_trained_is_not_begun_beside_one_that_has_ended(ended, tmp_path):
    died = died_before_its_first_checkpoint(ended, JOB)
    with RunLease(died), pytest.raises(UserError, match="is in use by"):
        train(tmp_path, JOB, resume_from="auto")


@pytest.mark.parametrize("by_path", [False, True])
def test_a_run_that_has_ended_keeps_the_configuration_it_was_trained_with(ended, tmp_path, capsys, by_path):
    kept = (ended / "config.yaml").read_text()
    train(tmp_path, toy({**PHASE, "epochs": 5}), resume_from=str(ended) if by_path else "latest")
    assert (ended / "config.yaml").read_text() == kept
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "the run has ended and was trained otherwise (datasets.0.epochs); its config.yaml stays as it was"
        in said
    )


def test_the_end_of_a_run_is_told_from_a_checkpoint_before_it(ended, tmp_path):
    assert is_finished(ended)
    shutil.rmtree(ended / "checkpoint_4")
    assert not is_finished(ended)


def test_what_tells_jobs_apart(finished, tmp_path):
    def told(**changes):
        return what_differs(
            load_run_config(write_config(tmp_path, JOB, **changes)), finished / "checkpoint_4"
        )

    phase = JOB["datasets"][0]
    assert told() == told(**ELSEWHERE) == told(micro_batch_size=8) == ""
    assert told(datasets=[{**phase, "log_every_steps": 1, "eval_every_steps": 1}]) == ""
    assert told(seed=4, datasets=[{**phase, "epochs": 3}]) == "seed, datasets.0.epochs"
    assert told(global_batch_size=None) == "global_batch_size, micro_batch_size"
    optimizer = {**TOY["optimizer"], "optimizer_args": {"lr": 0.1}}
    assert told(optimizer=optimizer) == "optimizer.optimizer_args.lr"
