import io
from dataclasses import replace

import pytest

from trainer import console
from trainer.console import (
    PhaseAccount,
    ProgressLine,
    StartupAccount,
    checkpoint_line,
    evaluation_line,
    notice,
    render_startup,
    startup_account,
    table,
    warn_once,
)
from trainer.errors import UserError
from trainer.exits import run_command

PHASE = PhaseAccount(
    name="pretrain",
    num_cells=1_234_567,
    num_validation_cells=1000,
    num_epochs=3,
    num_steps=2400,
    learning_rates={"": 1e-3},
    schedule="cosine, 100 warmup steps",
    micro_batch_size=8,
    accumulation=4,
    world_size=16,
)
ACCOUNT = StartupAccount(
    run_name="atlas",
    run_folder="checkpoints/atlas_20260102-030405",
    device="cpu",
    precision="fp32",
    num_parameters=1_234_567,
    num_trainable_parameters=1_234_567,
    num_threads=1,
    seed=0,
    versions={"torch": "2.13.0", "numpy": "2.4.6"},
    phases=(PHASE,),
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def nothing_warned(monkeypatch):
    monkeypatch.setattr(console, "_warned", set())


def step(number, **fields):
    record = {
        "global_step": 100 + number,
        "phase": "pretrain",
        "phase_step": number,
        "loss": 2.5,
        "lr": 0.001,
    }
    return record | fields


def lines_of(num_steps, records, **options):
    stream = io.StringIO()
    line = ProgressLine("pretrain", num_steps, stream=stream, **options)
    for record in records:
        line.update(record)
    line.close()
    return stream.getvalue().splitlines()


def test_the_account_says_how_the_global_batch_comes_about():
    text = render_startup(ACCOUNT)
    assert "micro-batch 8 x accumulation 4 x world size 16 = global batch 512" in text
    assert "pretrain  1,234,567       1,000       3  2,400  0.001  cosine, 100 warmup steps" in text
    assert "parameters    1,234,567\n" in text


def test_phases_with_different_batches_each_say_theirs():
    text = render_startup(replace(ACCOUNT, phases=(PHASE, replace(PHASE, name="tune", accumulation=1))))
    assert "tune: micro-batch 8 x accumulation 1 x world size 16 = global batch 128" in text


def test_the_table_of_phases_names_what_each_counts():
    sets = replace(PHASE, name="response", num_cells=24, num_validation_cells=None, unit="sets")
    header, _, row = render_startup(replace(ACCOUNT, phases=(sets,))).splitlines()[-3:]
    assert header.split()[:3] == ["phase", "sets", "validation"] and row.split()[:3] == [
        "response",
        "24",
        "-",
    ]
    text = render_startup(replace(ACCOUNT, phases=(PHASE, sets)))
    assert "phase     training         validation" in text
    assert "pretrain  1,234,567 cells  1,000 cells" in text and "response  24 sets " in text


def test_the_account_names_what_is_frozen_resumed_and_special():
    account = replace(
        ACCOUNT,
        num_trainable_parameters=10,
        resumed_from="checkpoint_5",
        notes=("padded",),
        phases=(replace(PHASE, learning_rates={"muon": 0.02, "adam": 3e-4}, num_cells=None),),
    )
    text = render_startup(account)
    for part in (
        "of which 10 train",
        "resumed from  checkpoint_5",
        "note          padded",
        "muon 0.02, adam 0.0003",
    ):
        assert part in text


def test_the_account_fits_a_hundred_columns():
    account = replace(ACCOUNT, versions={f"package{n}": "1.2.3" for n in range(20)}, notes=("word " * 60,))
    assert max(len(line) for line in render_startup(account).splitlines()) <= 100


def test_without_a_terminal_a_line_is_printed_every_so_many_steps_and_at_the_end():
    lines = lines_of(25, [step(number) for number in range(1, 26)], log_every_steps=10)
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 110", "pretrain 10/25"],
        ["step 120", "pretrain 20/25"],
        ["step 125", "pretrain 25/25"],
    ]
    assert lines[0].endswith("left") and not lines[-1].endswith("left")


def test_a_line_averages_rates_over_its_steps():
    slow = step(1, step_seconds=3.0, cells_per_second=100.0, data_wait_fraction=0.0)
    fast = step(2, step_seconds=1.0, cells_per_second=500.0, data_wait_fraction=0.8)
    [line] = lines_of(None, [slow, fast], log_every_steps=2)
    assert line == "step 102  pretrain 2  loss 2.5000  lr 1.00e-03  200 cells/s  data wait 20%"
    [line] = lines_of(None, [slow], log_every_steps=1, unit="sets")
    assert "  100 sets/s  " in line


@pytest.mark.parametrize(
    ("loss", "text"), [(None, "loss none"), (float("nan"), "loss nan"), (1e-7, "loss 1.000e-07")]
)
def test_a_loss_of_any_kind_is_shown(loss, text):
    [line] = lines_of(1, [step(1, loss=loss)], log_every_steps=1)
    assert text in line


def test_a_terminal_gets_a_bar_that_starts_where_the_run_resumed():
    stream = Terminal()
    line = ProgressLine("pretrain", 20, first_step=10, log_every_steps=1, stream=stream)
    line.update(step(11))
    line.close()
    last = stream.getvalue().split("\r")[-1]
    assert "pretrain 11/20 |" in last and "loss 2.5000  lr 1.00e-03" in last


def test_evaluations_and_checkpoints_have_their_lines(capsys):
    evaluation_line("pretrain", 40, {"loss": 5.1234, "accuracy": 0.1}, 63.0)
    checkpoint_line(40, "checkpoint_40", 0.81)
    assert capsys.readouterr().out.splitlines() == [
        "step 40  validation of pretrain  loss 5.1234  accuracy 0.1000  (1 min 03 s)",
        "step 40  checkpoint checkpoint_40  (0.81 s)",
    ]


def test_a_warning_is_given_once(capsys):
    warn_once("no ninja")
    warn_once("no ninja")
    warn_once("no numactl")
    assert capsys.readouterr().out.splitlines() == ["warning: no ninja", "warning: no numactl"]


def test_names_out_of_files_do_not_act_on_the_terminal(capsys):
    notice("gene \x1b]0;title\x07\x1b[2J\x9b\u202e\ud800\r of\ta file\nnext µ→✓")
    assert capsys.readouterr().out == (
        "gene \\x1b]0;title\\x07\\x1b[2J\\x9b\\u202e\\ud800\\r of\ta file\nnext µ→✓\n"
    )


def test_a_mistake_that_quotes_a_file_does_not_act_on_the_terminal(capsys):
    def refuse():
        raise UserError("no gene '\x1b[2J'")

    assert run_command(refuse) == 2
    assert capsys.readouterr().err == "error: no gene '\\x1b[2J'\n"


def test_only_rank_0_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    notice("hello")
    warn_once("hello")
    startup_account(ACCOUNT)
    checkpoint_line(1, "checkpoint_1", 0.0)
    assert lines_of(1, [step(1)], log_every_steps=1) == []
    assert capsys.readouterr().out == ""


def test_a_table_aligns_numbers_to_the_right():
    assert table(["model", "loss", "cells"], [["ours", 1.25, 3], ["marginal", None, 4000]]).splitlines() == [
        "model       loss  cells",
        "--------  ------  -----",
        "ours      1.2500      3",
        "marginal       -   4000",
    ]


def test_a_table_without_rows_is_its_headers():
    assert table(["model", "loss"], []).splitlines() == ["model  loss", "-----  ----"]
