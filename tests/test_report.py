import html
import json
import os
import re
import socket
import subprocess
import sys

import pytest
import yaml
from launching import ROOT
from running import records, reset_accelerate, toy, train, write_config

from trainer import journal, report
from trainer.build import run
from trainer.config import load_run_config
from trainer.console import StartupAccount
from trainer.report import main
from trainer.report_page import write_page
from trainer.run_facts import read_run
from trainer.runfolder import write_exit_status

HOSTILE = '"><script>alert(1)</script><img src=http://bad.example/x onerror=alert(1)>'
START = {
    "event": "start",
    "time": "2026-03-01T10:00:00+00:00",
    "world_size": 2,
    "strategy": "ZeRO-2",
    "device": "2 x NVIDIA H200 (ZeRO-2)",
    "precision": "bf16",
    "num_parameters": 1234567,
    "num_trainable_parameters": 1000,
    "num_threads": 3,
    "batches": {"first": "micro-batch 4 x accumulation 2 x world size 2 = global batch 16"},
    "versions": {"torch": "2.12.0"},
    "resumed_from": None,
    "resumed_step": None,
    "notes": ["loss: model.compute_loss"],
}
STOPPED = {
    "event": "end",
    "exit_code": 75,
    "reason": "SIGTERM: on from checkpoint_60",
    "time": "2026-03-01T10:10:00+00:00",
    "duration_seconds": 600.0,
}
RESUMED = {
    **START,
    "event": "resume",
    "time": "2026-03-01T11:00:00+00:00",
    "world_size": 1,
    "resumed_step": 60,
}
DONE = {
    "event": "end",
    "exit_code": 0,
    "reason": "done",
    "time": "2026-03-01T11:20:00+00:00",
    "duration_seconds": 1260.0,
}


def step(number, phase="first", **changes):
    return {
        "kind": "train",
        "global_step": number,
        "phase": phase,
        "phase_step": number,
        "epoch": 0,
        "loss": 1 + 1 / number,
        "lr": 0.001,
        "cells": 16,
        "tokens": 160,
        "step_seconds": 0.5,
        "cells_per_second": 32.0,
        "data_wait_fraction": 0.25,
        "is_skipped": False,
        **changes,
    }


def other(kind, number, phase="first", /, **figures):
    return {"kind": kind, "global_step": number, "phase": phase, "phase_step": number, "epoch": 2, **figures}


RECORDS = [
    *[step(number) for number in range(1, 60)],
    step(60, loss="nan", is_skipped=True),
    other("validation", 60, loss=1.25, gene_accuracy=0.5),
    other(
        "benchmark",
        60,
        **{
            "linear_probe/accuracy": 0.8125,
            "linear_probe/accuracy_spread": 0.0312,
            "linear_probe/accuracy/pca_32": 0.8401,
            "linear_probe/accuracy/at_start": 0.4444,
        },
    ),
    *[step(number, "second", lr=0.0005) for number in range(61, 101)],
    other("validation", 100, "second", loss=1.125),
    other(
        "score",
        100,
        "second",
        **{
            "vcc2025_score/avg_score": 0.3333,
            "vcc2025_score/avg_score/mean_response": 0.1111,
            "vcc2025_score/avg_score/control_cells": 0.0101,
            "vcc2025_score/avg_score/ceiling": 0.7777,
        },
    ),
    other("benchmark", 100, "second", has_failed=True),
]


def made_up_run(folder, *, lines=RECORDS, events=(START, STOPPED, RESUMED, DONE), config=None):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        yaml.safe_dump(config or {"run_name": "made", "optimizer": {"lr": 0.001}})
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if events:
        (folder / journal.FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
        (folder / "exit_status.json").write_text(json.dumps({**events[-1], "event": None}))
    checkpoint = folder / "checkpoint_100"
    checkpoint.mkdir()
    manifest = {
        "step": 100,
        "time": "2026-03-01T11:19:00+00:00",
        "metric": 1.125,
        "world_size": 1,
        "summary": {"metric_phase": "second"},
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    genes = [{"id": f"g{number}", "symbol": None} for number in range(765)]
    (checkpoint / "genes.json").write_text(
        json.dumps({"key": "symbol", "sha256": "feed" * 16, "genes": genes})
    )
    phases = [{"dict": [["name", name], ["data", f"{name}_print"]]} for name in ("first", "second")]
    tree = {
        "dict": [
            ["technical_batches", {"dict": [["lane_a", 0], ["lane_b", 1]]}],
            ["n_technical_batches", 16],
            ["progress", {"dict": [["rollbacks", 3]]}],
            ["trajectory", {"dict": [["phases", phases]]}],
            ["optimizer", {"tensor": "optimizer"}],
        ]
    }
    header = json.dumps({"__metadata__": {"tree": json.dumps(tree)}}).encode()
    (checkpoint / "run_state.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def page_of(*folders):
    return write_page([read_run(folder) for folder in folders])


def sections(page):
    return {
        html.unescape(title): inner
        for title, inner in re.findall(r"<section><h2>(.*?)</h2>(.*?)</section>", page, re.DOTALL)
    }


def rows(section):
    """Return the cells of all rows of a section's tables."""
    return [
        [
            html.unescape(re.sub("<.*?>", "", cell))
            for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row, re.DOTALL)
        ]
        for row in re.findall(r"<tr>(.*?)</tr>", section, re.DOTALL)
    ]


def words(section):
    return html.unescape(re.sub(r"<[^>]*>", " ", section))


@pytest.fixture
def page(tmp_path):
    return page_of(made_up_run(tmp_path / "made"))


def test_the_head_says_how_the_run_ended_and_its_main_figures(page):
    cards = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert '<span class="badge good">done</span>' in page
    assert cards["optimizer steps"] == "100" and cards["cells trained on"] == "1,600"
    assert cards["lowest validation loss"] == "1.1250 (step 100)"
    assert cards["cells/s"] == "32" and cards["data wait"] == "25.0%"
    assert cards["duration"] == "31 min 00 s" and cards["skipped steps"] == "1"
    assert cards["parameters"] == "1,234,567" and cards["processes"] == "1 (ZeRO-2)"


def test_curves_of_loss_rate_and_throughput_have_their_phases_marked(page):
    training = sections(page)["Training"]
    drawn = re.findall(r'<svg [^>]*aria-label="(.*?)">(.*?)</svg>', training)
    assert [label.removesuffix(" over optimizer steps") for label, _ in drawn] == [
        "Loss",
        "Learning rate",
        "Cells per second",
        "Share of the time that training waited for data",
    ]
    for _, inside in drawn:
        assert re.findall(r"<text[^>]*>(first|second)</text>", inside) == ["first", "second"]
        assert "<polyline" in inside and "nan" not in inside
    assert re.findall(r"<title>(.*?)</title>", drawn[0][1]) == [
        "validation, step 60: 1.25",
        "validation, step 100: 1.125",
    ]
    table = rows(training)
    assert table[1][:5] == ["first", "1 to 60", "960", "1.0169", "1.2500"]
    assert table[2][5:] == ["5.000e-04", "32", "25.0%"]


def test_what_phases_count_is_named(tmp_path):
    sets = {**START, "units": {"first": "sets", "second": "sets"}}
    page = page_of(made_up_run(tmp_path / "sets", events=(sets, DONE)))
    assert "<dt>sets trained on</dt>" in page and "<dt>sets/s</dt>" in page
    assert "<b>Sets per second</b>" in page and "<b>Cells per second</b>" not in page
    assert rows(sections(page)["Training"])[0][2] == "sets"
    mixed = {**START, "units": {"first": "cells", "second": "sets"}}
    page = page_of(made_up_run(tmp_path / "mixed", events=(mixed, DONE)))
    assert "<dt>cells and sets/s</dt>" in page
    table = rows(sections(page)["Training"])
    assert table[0][2:4] == ["samples", "of"]
    assert [row[2:4] for row in table[1:]] == [["960", "cells"], ["640", "sets"]]


def test_benchmarks_and_scores_stand_beside_their_baselines(page):
    found = rows(sections(page)["Evaluations"])
    assert ["benchmark", "metric", "model", "±", "pca 32", "at start"] in found
    assert ["linear_probe", "accuracy", "0.8125", "0.0312", "0.8401", "0.4444"] in found
    assert ["benchmark", "metric", "model", "mean response", "control cells", "ceiling"] in found
    assert ["vcc2025_score", "avg_score", "0.3333", "0.1111", "0.0101", "0.7777"] in found
    assert ["gene_accuracy", "0.5000", "0.5000", "0.5000 (step 60)", "0.5000 (step 60)", "1"] in found


def test_starts_resumes_and_ends_are_listed_in_order(page):
    first, second = rows(sections(page)["Starts and ends"])[1:]
    assert first[:3] == ["2026-03-01 10:00:00 UTC", "started", "2 (ZeRO-2)"]
    assert first[4:] == ["10 min 00 s", "75", "SIGTERM: on from checkpoint_60"]
    assert second[1] == "resumed at step 60" and second[5:] == ["0", "done"]


def test_a_start_without_an_end_was_killed_or_still_runs(tmp_path):
    page = page_of(made_up_run(tmp_path / "made", events=(START, RESUMED)))
    assert "still running, or killed</span>" in page
    assert "1 start of the run without an end" in words(sections(page)["Faults"])


def test_faults_skipped_steps_and_rollbacks_are_named(page):
    said = words(sections(page)["Faults"])
    assert "1 skipped step, whose update was left out: 60" in said
    assert "rollbacks of FP8 to a checkpoint: 3" in said
    assert "the benchmark of phase 'second' after epoch 2 failed" in said


STRETCH = {"num_ranks": 2, "first_step": 1, "last_step": 40, "begins_with": "start"}
EPOCH = {
    "phase": "first",
    "phase_index": 0,
    "epoch": 1,
    "num_cells": 640,
    "drawn": 640,
    "seen": 640,
    "is_over": True,
}


def with_cells(folder, *epochs, **more):
    found = [{**EPOCH, "stretches": [STRETCH], **changes} for changes in epochs]
    (folder / "cells_seen.json").write_text(json.dumps({"step": 60, "epochs": found, **more}))
    return folder


def test_the_cells_of_each_epoch_are_laid_out_with_what_interrupted_it(tmp_path):
    again = {**STRETCH, "num_ranks": 1, "first_step": 21, "begins_with": "resume"}
    folder = with_cells(
        made_up_run(tmp_path / "made"),
        {"stretches": [STRETCH, again]},
        {"epoch": 2, "is_over": False, "seen": 320, "drawn": 320},
        steps_computed_again=3,
        cells_computed_again=48,
    )
    page = page_of(folder)
    table = rows(sections(page)["Cells seen"])
    assert table[0] == ["phase", "epoch", "steps", "cells", "seen", "repeated", "skipped", "ranks and breaks"]
    assert table[1] == ["first", "1", "1 to 40", "640", "640", "0", "0", "2 ranks, then 1; 1 restart"]
    assert table[2][1:] == ["2 (so far)", "1 to 40", "640", "320", "0", "–", "2 ranks"]
    assert "48 cells of 3 steps were lost by a kill or a rollback" in words(sections(page)["Cells seen"])
    assert 'class="bad"' not in sections(page)["Cells seen"]


def test_the_account_names_what_each_phase_counts(tmp_path):
    start = {**START, "units": {"first": "sets", "second": "sets"}}
    folder = made_up_run(tmp_path / "sets", events=(start, DONE))
    with_cells(folder, {"unit": "sets", "seen": 624}, steps_computed_again=3, cells_computed_again=48)
    found = sections(page_of(folder))
    assert rows(found["Sets seen"])[0][3] == "sets"
    assert "48 sets of 3 steps were lost" in words(found["Sets seen"])
    assert "sets of phase 'first', epoch 1: 16 repeated" in words(found["Faults"])
    with_cells(folder, {}, {"phase": "second", "unit": "sets"})
    table = rows(sections(page_of(folder))["Sets seen"])
    assert table[0][3:5] == ["samples", "of"] and [row[4] for row in table[1:]] == ["cells", "sets"]


def test_cells_that_are_repeated_or_skipped_stand_out_and_are_faults(tmp_path):
    page = page_of(with_cells(made_up_run(tmp_path / "made"), {"seen": 624}))
    found = sections(page)
    assert found["Cells seen"].count('<b class="bad">16</b>') == 2
    assert "cells of phase 'first', epoch 1: 16 repeated, 16 skipped" in words(found["Faults"])


def test_repeats_that_are_meant_do_not_stand_out(tmp_path):
    page = page_of(with_cells(made_up_run(tmp_path / "made"), {"seen": 624, "is_with_replacement": True}))
    found = sections(page)
    assert "drawn with replacement" in words(found["Cells seen"])
    assert 'class="bad"' not in found["Cells seen"] and "16 repeated" not in words(found["Faults"])


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 1, "epochs": [{"phase": 3}]}'])
def test_a_damaged_account_of_cells_is_missing_from_the_report(tmp_path, content):
    folder = made_up_run(tmp_path / "made")
    (folder / "cells_seen.json").write_text(content)
    found = sections(page_of(folder))
    assert "cells_seen.json is damaged" in words(found["Missing from this report"])
    assert "Not known." in words(found["Cells seen"])


def test_a_failed_run_says_its_reason_first(tmp_path):
    failed = {**DONE, "exit_code": 1, "reason": "RuntimeError: out of memory"}
    page = page_of(made_up_run(tmp_path / "made", events=(START, failed)))
    assert (
        '<span class="badge bad">failed with exit code 1</span></h1><p>RuntimeError: out of memory</p>'
        in page
    )


def test_checkpoints_data_machine_and_configuration_are_there(page, tmp_path):
    found = sections(page)
    size = sum(file.stat().st_size for file in (tmp_path / "made" / "checkpoint_100").iterdir())
    assert rows(found["Checkpoints"])[1] == [
        "100",
        f"{size / 1000:.3g} kB",
        "2026-03-01 11:19:00 UTC",
        "1.1250",
        "second",
        "1",
    ]
    assert ["second", "second_print"] in rows(found["Data"])
    assert "2 technical batches, padded to 16: lane_a, lane_b" in words(found["Data"])
    assert f"Gene space of 765 genes, by symbol, SHA-256 {'feed' * 16}" in words(found["Data"])
    assert ["torch", "2.12.0"] in rows(found["Machine and versions"])
    assert "loss: model.compute_loss" in words(found["Machine and versions"])
    assert ["optimizer.lr", "0.001"] in rows(found["Configuration"])


def test_versions_that_changed_between_starts_are_said(tmp_path):
    later = {**RESUMED, "versions": {"torch": "2.13.0"}}
    page = page_of(made_up_run(tmp_path / "made", events=(START, STOPPED, later, DONE)))
    assert "torch was 2.12.0 and is 2.13.0" in words(sections(page)["Machine and versions"])


def test_hostile_text_is_shown_and_never_acts(tmp_path):
    lines = [
        step(1, HOSTILE),
        step(2, HOSTILE),
        other("validation", 2, HOSTILE, **{"loss": 1.0, HOSTILE: 2.0}),
        other("benchmark", 2, HOSTILE, **{f"{HOSTILE}/x/y": 1.0}),
    ]
    start = {
        key: HOSTILE if isinstance(value, str) and key != "event" else value for key, value in START.items()
    }
    start |= {"notes": [HOSTILE], "versions": {HOSTILE: HOSTILE}, "batches": {HOSTILE: HOSTILE}}
    end = {**DONE, "reason": HOSTILE, "time": HOSTILE, "exit_code": HOSTILE}
    name = HOSTILE.replace("/", "_")
    folder = made_up_run(tmp_path / name, lines=lines, events=(start, end), config={HOSTILE: HOSTILE})
    for page in (page_of(folder), page_of(folder, made_up_run(tmp_path / "other"))):
        assert "<script" not in page.lower() and "<img" not in page.lower()
        assert html.escape(HOSTILE) in page and html.escape(name) in page


def test_a_count_that_is_not_finite_is_no_number_of_steps(tmp_path):
    page = page_of(made_up_run(tmp_path / "a", lines=[step(1, is_skipped="inf"), step(2, is_skipped=True)]))
    assert "skipped steps" in page


def test_the_page_loads_nothing(page):
    assert not re.search(
        r"""(src|href|action|data)\s*=|url\(|@import|<(script|link|iframe|object|embed|base)\b""", page
    )
    assert "http://" not in page and "https://" not in page
    assert "default-src 'none'" in page


def test_several_runs_show_only_what_differs_in_their_configurations(tmp_path):
    first = made_up_run(tmp_path / "one", config={"seed": 1, "model": {"dim": 64, "same": [1, 2]}})
    second = made_up_run(
        tmp_path / "two",
        lines=RECORDS[:30],
        config={"seed": 1, "model": {"dim": 32, "same": [1, 2]}, "ema": 0.5},
    )
    page = page_of(first, second)
    found = sections(page)
    assert rows(found["Differences of the configurations"]) == [
        ["key", "one", "two"],
        ["model.dim", "64", "32"],
        ["ema", "not there", "0.5"],
    ]
    assert ["optimizer steps", "100", "30"] in rows(page)
    assert ["first", "linear_probe/accuracy", "0.8125", "–"] in rows(found["Evaluations beside each other"])
    assert "Configuration" not in found


def test_equal_configurations_have_no_differences(tmp_path):
    page = page_of(made_up_run(tmp_path / "one"), made_up_run(tmp_path / "two"))
    assert "There are none." in sections(page)["Differences of the configurations"]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    page = page_of(made_up_run(tmp_path / "a" / "run"), made_up_run(tmp_path / "b" / "run"))
    assert ["", "1: a/run", "2: b/run"] in rows(page)


def test_a_run_without_a_journal_has_a_report_that_says_so(tmp_path):
    folder = made_up_run(tmp_path / "made", events=())
    (folder / "exit_status.json").write_text(
        json.dumps({"exit_code": 0, "reason": "done", "time": DONE["time"]})
    )
    page = page_of(folder)
    assert "there is no events.jsonl" in words(sections(page)["Missing from this report"])
    assert rows(sections(page)["Starts and ends"])[1] == ["2026-03-01 11:20:00 UTC", "0", "done"]
    assert '<span class="badge good">done</span>' in page


@pytest.mark.parametrize(
    "name",
    [
        "config.yaml",
        "metrics.jsonl",
        "checkpoint_100/manifest.json",
        "checkpoint_100/run_state.safetensors",
        "checkpoint_100/genes.json",
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"\xff\x00[", b"[1]", b"\xff" * 8])
def test_missing_and_damaged_files_are_said_and_leave_the_rest(tmp_path, name, content):
    folder = made_up_run(tmp_path / "made")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    found = sections(page_of(folder))
    may_be_empty = (content is None and name.endswith("genes.json")) or (
        content == b"" and name == "metrics.jsonl"
    )
    if not may_be_empty:
        assert name in words(found["Missing from this report"])
    assert {
        "Training",
        "Evaluations",
        "Starts and ends",
        "Checkpoints",
        "Data",
        "Configuration",
    } <= found.keys()


def test_damaged_lines_are_counted_and_left_out(tmp_path):
    folder = made_up_run(tmp_path / "made")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[4] = lines[4][:20]
    lines[9] = '{"kind": "train", "global_step": "ten"}'
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / journal.FILE).write_text((folder / journal.FILE).read_text() + '{"event": "resu')
    said = words(sections(page_of(folder))["Missing from this report"])
    assert "metrics.jsonl: 2 lines are no records and are left out (line 5, 10)" in said
    assert "events.jsonl: 1 damaged line" in said
    assert len(read_run(folder).steps) == 98


def test_values_of_the_wrong_kind_do_not_stop_the_report(tmp_path):
    lines = [
        step(1, loss="text", lr=None, cells=10**400),
        step(2, loss=-1e300, step_seconds=0),
        step(3, loss="inf", lr="nan"),
        other("validation", 3, loss="nan"),
    ]
    start = {**START, "versions": [1], "batches": 3, "notes": "text", "num_parameters": "many", "time": 5}
    folder = made_up_run(tmp_path / "made", lines=lines, events=(start, {**DONE, "duration_seconds": "x"}))
    assert main([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "1 step with an infinite loss, the first at step 3" in words(sections(page)["Faults"])


def test_a_run_that_has_not_begun_has_a_page_and_no_picture(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "report.png").write_bytes(b"of an earlier report")
    assert main([str(folder), "--overwrite"]) == 0
    page = (folder / "report.html").read_text()
    assert "No optimizer step is recorded." in page and not (folder / "report.png").exists()


def test_the_picture_lies_beside_the_page(tmp_path):
    folder = made_up_run(tmp_path / "made")
    assert main([str(folder)]) == 0
    assert (folder / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert main([str(folder)]) == 0, "a report is replaced without being asked"


def test_what_is_no_report_is_not_replaced(tmp_path, capsys):
    folder = made_up_run(tmp_path / "made")
    (tmp_path / "mine.png").write_text("mine")
    assert main([str(folder), "--output", str(tmp_path / "mine.html")]) == 2
    assert "mine.png exists and is no report" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_text() == "mine"


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), "--output", str(tmp_path / "page.html")]) == 2
    assert "holds neither config.yaml nor metrics.jsonl" in capsys.readouterr().err
    assert main([str(tmp_path / "none")]) == 2
    assert "there is no such run folder" in capsys.readouterr().err


def test_a_report_imports_no_torch(tmp_path):
    folder = made_up_run(tmp_path / "made")
    code = (
        "import sys; from trainer.report import main; assert main(sys.argv[1:]) == 0; "
        "raise SystemExit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0


def test_a_journal_goes_on_after_half_a_line(tmp_path):
    (tmp_path / journal.FILE).write_text('{"event": "start"}\n{"event": "en')
    journal.note_end(tmp_path, {"exit_code": 0})
    assert journal.read_events(tmp_path) == ([{"event": "start"}, {"event": "end", "exit_code": 0}], 1)


def test_a_start_takes_away_what_the_end_before_it_said(tmp_path):
    write_exit_status(tmp_path, 75, "SIGTERM; go on from here")
    account = StartupAccount("toy", str(tmp_path), "cpu", "fp32", 1, 1, 1, 0, {}, ())
    journal.note_start(tmp_path, account, world_size=1, strategy="DDP", resumed_step=3)
    assert not (tmp_path / "exit_status.json").exists()


def test_a_start_says_which_job_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41234")
    account = StartupAccount("toy", str(tmp_path), "cpu", "fp32", 1, 1, 1, 0, {}, ())
    journal.note_start(tmp_path, account, world_size=1, strategy="DDP", resumed_step=None)
    [start] = journal.read_events(tmp_path)[0]
    assert (start["slurm_job"], start["host"]) == ("41234", socket.gethostname())


def test_a_journal_that_cannot_be_written_is_said_and_stops_nothing(tmp_path, capsys):
    (tmp_path / journal.FILE).mkdir()
    journal.note_end(tmp_path, {"exit_code": 0})
    assert "the end of the run is not written down" in capsys.readouterr().out


def test_a_run_writes_its_journal_and_its_report(tmp_path):
    folder = train(tmp_path, toy({"epochs": 2}, {"epochs": 1}), has_picture=True)
    page = (folder / "report.html").read_text()
    losses = records(folder, "validation")
    cards = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))
    assert cards["optimizer steps"] == str(records(folder)[-1]["global_step"])
    assert cards["last validation loss"] == f"{losses[-1]['loss']:.4f}"
    assert "Missing from this report" not in sections(page)
    assert "2 technical batches" in words(sections(page)["Data"])
    assert (folder / "report.png").exists()
    start, end = journal.read_events(folder)[0]
    assert (start["event"], start["world_size"], start["resumed_step"]) == ("start", 1, None)
    status = json.loads((folder / "exit_status.json").read_text())
    assert end == {"event": "end", **status} and status["exit_code"] == 0

    config = write_config(tmp_path, toy({"epochs": 3}, {"epochs": 1}), resume_from=str(folder))
    reset_accelerate()
    assert run(load_run_config(config)) == 0
    events = journal.read_events(folder)[0]
    assert [event["event"] for event in events] == ["start", "end", "resume", "end"]
    assert events[2]["resumed_step"] == losses[-1]["global_step"]


def test_a_report_that_fails_does_not_fail_its_run(tmp_path, monkeypatch, capsys):
    def fail(runs):
        raise KeyError("planted")

    monkeypatch.setattr(report, "write_page", fail)
    folder = train(tmp_path, toy({"epochs": 1}))
    assert "report.html is not written: KeyError: 'planted'" in capsys.readouterr().out
    assert json.loads((folder / "exit_status.json").read_text())["exit_code"] == 0
