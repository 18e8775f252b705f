import csv
import json
import math
import random
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from launching import ROOT, start_ranks
from running import toy, train, write_config

from trainer.activity import Activity
from trainer.errors import ConfigError, UserError
from trainer.trackers import Trackers, build_trackers, check_trackers, namespaced_scalars

HOME = str(Path.home())  # before a test changes it


def training(step, **fields):
    record = {
        "kind": "train",
        "global_step": step,
        "phase": "first",
        "epoch": 0,
        "loss": 1 / step,
        "lr": 0.001,
    }
    return record | fields


def validation(step, loss):
    return {"kind": "validation", "global_step": step, "phase": "first", "loss": loss}


class Spec(NamedTuple):
    name: str
    args: dict[str, Any] = {}


def build(tmp_path, *specs, state=None):
    specs = [Spec(spec) if isinstance(spec, str) else spec for spec in specs]
    return build_trackers(specs, tmp_path, "test", {"seed": 0}, state)


def log(trackers, *records):
    for record in records:
        trackers.log(record, record["global_step"])


def log_all(trackers, *records):
    log(trackers, *records)
    trackers.finish(0)


def read_csv(tmp_path):
    with open(tmp_path / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_holds_every_record_in_full_precision(tmp_path):
    log_all(build(tmp_path, "csv"), training(3, loss=1 / 3), training(4, loss=math.inf, skipped=None))
    rows = read_csv(tmp_path)
    assert [float(row["loss"]) for row in rows] == [1 / 3, math.inf]
    assert [row["skipped"] for row in rows] == ["", ""]


def test_csv_columns_may_appear_later(tmp_path):
    log_all(build(tmp_path, "csv"), training(1), training(2), validation(2, 0.5), training(3, accuracy=0.25))
    rows = read_csv(tmp_path)
    assert [row["kind"] for row in rows] == ["train", "train", "validation", "train"]
    assert [row["accuracy"] for row in rows] == ["", "", "", "0.25"]
    assert [row["lr"] for row in rows] == ["0.001", "0.001", "", "0.001"]


def test_csv_of_a_resumed_run_equals_that_of_one_that_ran_through(tmp_path):
    records = [
        training(1),
        training(2),
        validation(2, 0.5),
        training(3),
        training(4, accuracy=0.25),
        training(5),
    ]
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    through.mkdir()
    resumed.mkdir()
    log_all(build(through, "csv"), *records)
    killed = build(resumed, "csv")
    log(killed, *records[:3])
    state = killed.state()
    log_all(killed, *records[3:5])
    with open(resumed / "metrics.csv", "a") as file:
        file.write("train,5,fir")  # killed while writing
    log_all(build(resumed, "csv", state=state), *records[3:])
    assert (resumed / "metrics.csv").read_text() == (through / "metrics.csv").read_text()


def test_csv_without_steps_is_not_resumed(tmp_path):
    (tmp_path / "metrics.csv").write_text("loss\n1.0\n")
    with pytest.raises(UserError, match="no column global_step"):
        build(tmp_path, "csv", state={"step": 2, "trackers": {}})


def read_tensorboard(tmp_path, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_training_and_validation_apart(tmp_path):
    trackers = build(tmp_path, "tensorboard")
    log(trackers, training(1), training(2), validation(2, 0.25))
    trackers.finish(0)
    assert read_tensorboard(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert read_tensorboard(tmp_path, "validation/loss") == [(2, 0.25)]


def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path):
    killed = build(tmp_path, "tensorboard")
    log(killed, training(1), training(2))
    state = killed.state()
    log(killed, training(3, loss=7.0))
    killed.finish(1)
    resumed = build(tmp_path, "tensorboard", state=state)
    log(resumed, training(3, loss=0.25))
    resumed.finish(0)
    assert read_tensorboard(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_what_tensorboard_got_before_a_checkpoint_survives_a_kill(tmp_path):
    trackers = build(tmp_path, "tensorboard")
    log(trackers, training(1))
    trackers.state()
    assert read_tensorboard(tmp_path, "train/loss") == [(1, 1.0)]
    trackers.finish(1)


@pytest.fixture
def no_wandb_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    if "wandb" in sys.modules:  # else this test has used it in other processes alone
        sys.modules["wandb"].teardown()


@pytest.mark.usefixtures("no_wandb_key")
def test_wandb_without_a_key_records_offline_and_goes_on_with_the_same_run(tmp_path, capsys):
    first = build(tmp_path, Spec("wandb", {"project": "atlas", "tags": ["a"]}))
    log(first, training(1), validation(1, 0.5))
    state = first.state()
    first.finish(1)
    said = capsys.readouterr().out
    assert said.count("no API key") == 1 and "wandb sync" in said
    second = build(tmp_path, "wandb", state=state)
    assert second.state() == state
    log(second, training(2))
    assert second.state() == state | {"step": 2}
    second.finish(0)
    sys.modules["wandb"].teardown()  # as at the end of a process: its writer has written everything
    files = sorted(
        (tmp_path / "wandb").glob(f"offline-run-*/run-{state['trackers']['wandb']['run_id']}.wandb")
    )
    assert b"validation/loss" in files[0].read_bytes() and b"train/loss" in files[-1].read_bytes()


class StandIn(BaseHTTPRequestHandler):
    """W&B's server as far as a run needs it; `status` is what it answers with."""

    status = 200

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        project = {"id": "p", "name": "atlas", "entity": {"id": "e", "name": "lab"}}
        bucket = {"id": "b", "name": "run1", "displayName": "test", "historyLineCount": 0, "project": project}
        content = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if self.status != 200:
            content = {"errors": [{"message": f"status {self.status}"}], "data": None}
        text = json.dumps(content).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_PUT = do_POST

    def log_message(self, format, *args):
        pass


@pytest.fixture
def wandb_server(monkeypatch, no_wandb_key):
    """A stand-in for W&B's server, and an environment with a key and little patience for it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(StandIn, "status", 200)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
        yield StandIn
        server.shutdown()


@pytest.mark.parametrize("trouble", ["no server", "overloaded"])
def test_a_wandb_server_that_cannot_be_reached_does_not_end_the_run(
    tmp_path, capsys, monkeypatch, wandb_server, trouble
):
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    if trouble == "no server":
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb_server.status = 503
    trackers = build(tmp_path, Spec("wandb", {"project": "atlas", "mode": "online"}))
    log_all(trackers, training(1))
    said = capsys.readouterr().out
    assert "waiting 1 s at most" in said and "CANNOT BE REACHED" in said
    assert f"`wandb sync {tmp_path}/wandb/offline-run-" in said
    sys.modules["wandb"].teardown()
    assert b"train/loss" in next((tmp_path / "wandb").glob("offline-run-*/*.wandb")).read_bytes()


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wandb_server_that_refuses_is_a_mistake(tmp_path, wandb_server, status):
    wandb_server.status = status
    with pytest.raises(UserError, match=f"could not start a run: .*{status}.*; check the API key, project"):
        build(tmp_path, "wandb")
    assert not list((tmp_path / "wandb").glob("offline-run-*"))


def test_other_ranks_do_not_wait_for_wandb_until_their_timeout(tmp_path, capsys, monkeypatch, wandb_server):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    trackers = build_trackers([Spec("wandb")], tmp_path, "test", {}, timeout_seconds=4)
    trackers.finish(0)
    assert "waiting 1 s at most" in capsys.readouterr().out


def test_a_wandb_server_that_is_lost_does_not_hold_up_the_end(tmp_path, capsys, wandb_server):
    trackers = build(tmp_path, "wandb")
    log(trackers, training(1))
    wandb_server.status = 503
    log(trackers, training(2))
    trackers.finish(0)
    said = capsys.readouterr().out
    assert "CANNOT BE REACHED" not in said
    assert f"not everything was uploaded within 1 s of the end; `wandb sync {tmp_path}/wandb/run-" in said


class BrokenRun:
    """A run of W&B's whose own process is gone."""

    offline, url, id = False, None, "x"

    def __init__(self, folder):
        self.dir = f"{folder}/wandb/run-x/files"

    def log(self, values, step):
        raise ConnectionResetError("Connection lost")


@pytest.mark.usefixtures("no_wandb_key")
def test_wandb_that_breaks_is_said_once_and_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wandb.init", lambda **settings: BrokenRun(tmp_path))
    trackers = build(tmp_path, "csv", "wandb")
    log_all(trackers, training(1), training(2))
    said = capsys.readouterr().out
    assert said.count("W&B: lost (ConnectionResetError: Connection lost); the run goes on without it") == 1
    assert len(read_csv(tmp_path)) == 2


def test_ranks_that_wait_for_a_tracker_say_so(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(Activity, "move_on", lambda self: said.append(self.now))
    train(tmp_path, toy(), trackers=["csv"])
    first = said.index(("starting the trackers (csv)", 0, False))
    assert said[first + 1] == ("waiting for rank 0's trackers", 0, True)


def start_two_ranks(tmp_path, **changes):
    trackers = ["csv", {"name": "wandb", "mode": "online"}]
    path = write_config(tmp_path, toy({"max_steps": 2}), trackers=trackers, **changes)
    # The key is a variable, and a process with another HOME would not be a fork.
    env = {"PYTHONPATH": str(ROOT / "tests"), "WANDB_ERROR_REPORTING": "false", "HOME": HOME}
    return start_ranks(2, [ROOT / "trainer" / "train.py", "--config", path], env=env)


@pytest.mark.slow
def test_two_ranks_train_without_a_wandb_server(tmp_path, monkeypatch, wandb_server):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with start_two_ranks(tmp_path, distributed_timeout_seconds=20) as group:
        output = group.wait(expect=0).stdout
    assert "waiting 5 s at most" in output and output.count("CANNOT BE REACHED") == 1


@pytest.mark.slow
def test_every_rank_ends_with_2_where_wandb_refuses(tmp_path, wandb_server):
    wandb_server.status = 401
    with start_two_ranks(tmp_path) as group:
        output = group.wait(expect=2).stdout
        assert [process.returncode for process in group.processes] == [2, 2]
    assert "could not start a run" in output and "Traceback" not in output


@pytest.mark.parametrize("source", ["environment", "netrc"])
def test_a_wandb_key_is_found(monkeypatch, tmp_path, source):
    from trainer.trackers import _has_wandb_key

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    assert not _has_wandb_key("https://api.wandb.ai")
    if source == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "k")
    else:
        (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
        (tmp_path / ".netrc").chmod(0o600)
    assert _has_wandb_key("https://api.wandb.ai")


@pytest.mark.usefixtures("no_wandb_key")
def test_a_wandb_key_is_looked_for_under_the_server_of_the_environment(tmp_path, capsys, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1:9 login user password " + "0" * 40 + "\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("wandb.init", lambda **settings: BrokenRun(tmp_path))
    build(tmp_path, "wandb")
    assert "no API key" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_wandb_key")
def test_trackers_leave_the_random_state_alone(tmp_path):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    trackers = build(tmp_path, "csv", "tensorboard", "wandb")
    log(trackers, training(1))
    trackers.finish(0)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([Spec("mlflow", {})], "there is no tracker 'mlflow'; allowed: csv, tensorboard, wandb"),
        ([Spec("csv", {}), Spec("csv", {})], "csv is given 2 times"),
        ([Spec("csv", {"path": "x"})], "csv takes no argument 'path'; allowed: none"),
        ([Spec("wandb", {"projekt": "x"})], "wandb takes no argument 'projekt'; allowed: .*project"),
        ([Spec("wandb", {"id": "x"})], "wandb takes no argument 'id'"),
        (
            [Spec("tensorboard", {"log_dir": "x"})],
            "tensorboard takes no argument 'log_dir'; allowed: .*flush_secs",
        ),
    ],
)
def test_a_wrong_tracker_is_named_with_what_is_allowed(specs, message):
    with pytest.raises(ConfigError, match=message):
        check_trackers(specs)


def test_all_mistakes_are_reported_together():
    with pytest.raises(ConfigError, match=r"mlflow(.|\n)*projekt"):
        check_trackers([Spec("mlflow", {}), Spec("wandb", {"projekt": "x"})])


def test_a_tracker_that_is_not_installed_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb cannot be imported"):
        build(tmp_path, "csv", "wandb")
    assert not (tmp_path / "metrics.csv").exists()


def test_a_tracker_that_is_new_at_a_resume_starts_there(tmp_path):
    log_all(build(tmp_path, "csv", state={"step": 2, "trackers": {}}), training(3))
    assert [row["global_step"] for row in read_csv(tmp_path)] == ["3"]


def test_no_tracker_does_nothing():
    trackers = Trackers()
    trackers.log(training(1), 1)
    assert trackers.state() == {"step": 1, "trackers": {}}
    trackers.finish(0)


def test_numbers_are_named_by_what_kind_of_record_they_come_from():
    assert namespaced_scalars(training(2) | {"grad_norm": None}) == {
        "train/epoch": 0,
        "train/loss": 0.5,
        "train/lr": 0.001,
    }
    assert namespaced_scalars(validation(2, 0.25)) == {"validation/loss": 0.25}
