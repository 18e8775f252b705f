import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from data.errors import DataError
from trainer import __main__ as command_line
from trainer import exits, train
from trainer.errors import CheckpointError

ROOT = Path(__file__).resolve().parent.parent

CONFIG = """
run_name: tiny
model: {model_class: my_network.Network, model_args: {width: 3}}
optimizer: {optimizer_class: my_network.make_optimizer}
datasets:
  - dataloader_factory: my_network:make_loader
gradient_accumulation_steps: 1
"""
MODULE = """
class Network:
    def __init__(self, width):
        pass

def make_optimizer(params):
    pass

def make_loader():
    pass
"""
SCRIPT = [str(ROOT / "trainer" / "train.py")]
MODULE_RUN = ["-m", "trainer", "train"]


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    """Make a folder with a config and a module of the user's, and go there."""
    (tmp_path / "run.yml").write_text(CONFIG)
    (tmp_path / "my_network.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield tmp_path
    sys.modules.pop("my_network", None)


@pytest.fixture
def built(monkeypatch):
    """Stand in for the training itself; what it is asked for is noted, and what it does can be set."""
    calls = types.SimpleNamespace(configs=[], dry_runs=[], outcome=lambda: 0)

    def run(config, dry_run):
        calls.configs.append(config)
        calls.dry_runs.append(dry_run)
        return calls.outcome()

    monkeypatch.setitem(sys.modules, "trainer.launch", types.SimpleNamespace(run=run))
    return calls


def run_python(*arguments, cwd, **environment):
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


# In this process


def test_a_run_gets_its_config_and_returns_its_exit_code(user_folder, built):
    built.outcome = lambda: 75
    assert train.main(["--config", "run.yml", "datasets.0.lr=1e-4", "run_name=a=b"]) == 75
    assert built.configs[0].datasets[0].lr == 1e-4
    assert built.configs[0].run_name == "a=b"
    assert built.dry_runs == [False]


def test_options_and_overrides_may_be_mixed(user_folder, built):
    assert train.main(["seed=1", "--config", "run.yml", "run_name=x", "--dry-run", "seed=2"]) == 0
    assert (built.configs[0].seed, built.configs[0].run_name, built.dry_runs) == (2, "x", [True])


def test_dotted_paths_are_checked_before_anything_is_built(user_folder, built, capsys):
    assert train.main(["--config", "run.yml", "model.model_args.widht=3"]) == 2
    assert built.configs == []
    assert (
        "model.model_args.widht: Network takes no such argument; did you mean 'width'?"
        in capsys.readouterr().err
    )


def test_check_tells_each_stage_and_builds_nothing(user_folder, built, capsys):
    assert train.main(["--config", "run.yml", "--check"]) == 0
    output = capsys.readouterr().out
    assert "stage 1, configuration: ok (1 phase)" in output
    assert "stage 2, dotted paths and their arguments: ok (3 resolved)" in output
    assert built.configs == []


def test_check_tells_which_stage_failed(user_folder, capsys):
    assert train.main(["--config", "run.yml", "--check", "seed=x"]) == 2
    assert "stage 1, configuration: failed; stage 2, dotted paths: not reached" in capsys.readouterr().out
    assert train.main(["--config", "run.yml", "--check", "model.model_class=my_network.Nope"]) == 2
    assert "stage 2, dotted paths and their arguments: failed" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["debug.yml", "pretraining.yaml", "circuits/config.yaml"])
def test_resume_makes_a_run_of_any_kind_go_on(path, capsys):
    assert train.main(["--config", str(ROOT / "configs" / path), "--resume", "--print-config"]) == 0
    assert "\nresume_from: auto\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "override", "value"),
    [
        ("resume_from: somewhere", [], "somewhere"),
        ("", ["resume_from=latest"], "latest"),
        ("", ["resume_from=null"], "null"),
    ],
)
def test_resume_leaves_what_the_user_goes_on_from(tmp_path, monkeypatch, capsys, content, override, value):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs" / "debug.yml").read_text()
    (tmp_path / "run.yml").write_text(f"{text}\n{content}\n")
    assert train.main(["--config", "run.yml", "--resume", "--print-config", *override]) == 0
    assert f"\nresume_from: {value}\n" in capsys.readouterr().out


def test_the_printed_config_is_a_config(user_folder, built, capsys):
    assert train.main(["--config", "run.yml", "--print-config", "seed=7"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["seed"] == 7
    (user_folder / "again.yml").write_text(text)
    assert train.main(["--config", "again.yml", "--print-config"]) == 0
    assert capsys.readouterr().out == text
    assert built.configs == []


@pytest.mark.parametrize("error", [DataError("no cells"), CheckpointError("no cells")])
def test_a_users_mistake_is_a_message_and_exit_code_2(user_folder, built, capsys, error):
    def fail():
        raise error

    built.outcome = fail
    assert train.main(["--config", "run.yml"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: no cells\n" and captured.out == ""


def test_any_other_error_is_a_traceback_and_exit_code_1(user_folder, built, capsys):
    built.outcome = lambda: 1 / 0
    assert train.main(["--config", "run.yml"]) == 1
    assert "Traceback" in (error := capsys.readouterr().err) and "ZeroDivisionError" in error


def test_an_interrupt_is_exit_code_130(user_folder, built, capsys):
    def interrupt():
        raise KeyboardInterrupt

    built.outcome = interrupt
    assert train.main(["--config", "run.yml"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_only_the_main_process_tells_a_mistake_in_the_config(user_folder, capsys, monkeypatch, variable):
    monkeypatch.setattr(exits, "GRACE_SECONDS", 0.0)
    monkeypatch.setenv(variable, "1")
    assert train.main(["--config", "run.yml", "seed=x", "--check"]) == 2
    assert train.main(["--bogus"]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    monkeypatch.setenv(variable, "0")
    assert train.main(["--config", "run.yml", "seed=x"]) == 2
    assert "seed: expected a whole number" in capsys.readouterr().err


def test_a_mistake_that_another_process_met_alone_is_told_with_its_rank(
    user_folder, built, capsys, monkeypatch
):
    def fail():
        raise DataError("no such file")

    built.outcome = fail
    monkeypatch.setattr(exits, "GRACE_SECONDS", 0.0)
    monkeypatch.setenv("RANK", "3")
    assert train.main(["--config", "run.yml"]) == 2
    assert capsys.readouterr().err == "error on rank 3: no such file\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --config"),
        (["--config", "run.yml", "--chek"], "unrecognized arguments: --chek"),
        (["--config", "run.yml", "--check", "--print-config"], "not allowed with"),
        (["--config", "nope.yml"], "nope.yml: no such file; did you mean 'run.yml'?"),
        (["--config", "run.yml", "lr"], "'lr' is not key=value"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(user_folder, capsys, arguments, message):
    assert train.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_is_no_mistake(capsys):
    assert train.main(["--help"]) == 0
    assert "--config FILE" in capsys.readouterr().out


def test_the_users_folder_comes_last_on_the_path(user_folder, built):
    (user_folder / "yaml.py").write_text("raise RuntimeError('shadowed')\n")
    assert train.main(["--config", "run.yml", "--check"]) == 0
    assert sys.path[-1] == str(user_folder)


# python -m trainer


def test_a_command_gets_the_arguments_after_its_name(monkeypatch):
    seen = []
    module = types.SimpleNamespace(main=lambda argv: seen.append(argv) or 5)
    monkeypatch.setitem(sys.modules, "trainer.convert_h5ad", module)
    assert command_line.main(["convert", "a.h5ad", "--output", "b"]) == 5
    assert seen == [["a.h5ad", "--output", "b"]]


def test_a_command_that_raises_a_data_error_is_exit_code_2(monkeypatch, capsys):
    def fail(argv):
        raise DataError("not an HDF5 file")

    monkeypatch.setitem(sys.modules, "trainer.convert_h5ad", types.SimpleNamespace(main=fail))
    assert command_line.main(["convert"]) == 2
    assert capsys.readouterr().err == "error: not an HDF5 file\n"


@pytest.mark.parametrize(("arguments", "message"), [([], "usage"), (["trian"], "unknown command 'trian'")])
def test_no_command_and_an_unknown_one_list_the_commands(capsys, arguments, message):
    assert command_line.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and all(name in error for name in command_line.COMMANDS)


def test_help_lists_the_commands(capsys):
    assert command_line.main(["--help"]) == 0
    assert "convert" in capsys.readouterr().out


# As users call it


@pytest.mark.parametrize(
    "command", [SCRIPT, MODULE_RUN, ["-m", "trainer.train"]], ids=["script", "-m trainer", "-m trainer.train"]
)
def test_every_way_to_call_it_finds_the_users_modules_from_another_folder(user_folder, command):
    environment = {} if command is SCRIPT else {"PYTHONPATH": str(ROOT)}
    result = run_python(*command, "--config", "run.yml", "--check", cwd=user_folder, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stage 2, dotted paths and their arguments: ok (3 resolved)" in result.stdout
    assert result.stderr == ""


def test_the_script_prefers_our_packages_to_folders_of_the_same_name(user_folder):
    for package in ("data", "trainer", "models"):
        (user_folder / package).mkdir()
        (user_folder / package / "__init__.py").write_text("raise RuntimeError('not ours')\n")
    result = run_python(*SCRIPT, "--config", "run.yml", "--print-config", cwd=user_folder)
    assert result.returncode == 0, result.stderr
    assert yaml.safe_load(result.stdout)["run_name"] == "tiny"


@pytest.mark.parametrize("command", [SCRIPT, MODULE_RUN], ids=["script", "-m trainer"])
def test_a_wrong_config_is_one_message_and_exit_code_2(user_folder, command):
    arguments = ("--config", "run.yml", "seed=x", "datasets.0.epoch=3", "precision=fp4")
    result = run_python(*command, *arguments, cwd=user_folder, PYTHONPATH=str(ROOT))
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: run.yml: 3 mistakes",
        "  the command line: seed: expected a whole number, got 'x'",
        "  the command line: precision: got 'fp4'; allowed: bf16, fp16, fp32, fp8 or null; did you mean 'fp8'?",
        "  the command line: datasets.0.epoch: unknown key; did you mean 'epochs'?",
    ]


def test_checking_imports_torch_only_for_the_users_paths(user_folder):
    program = (
        "import sys; from trainer.train import main; code = main(['--config', 'run.yml', '--check']); "
        "assert code == 0, code; heavy = {'torch', 'accelerate', 'datasets', 'anndata'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "main(['--config', 'run.yml', '--check', 'seed=x']); "
        "assert 'torch' not in sys.modules"
    )
    result = run_python("-c", program, cwd=user_folder, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr


def test_a_mistake_in_the_numbers_of_sample_is_told_without_torch(user_folder):
    program = (
        "import sys; from trainer.sample import main; "
        "assert main(['--model', 'm', '--output', 'o', '--num', '0']) == 2; assert 'torch' not in sys.modules"
    )
    result = run_python("-c", program, cwd=user_folder, PYTHONPATH=str(ROOT))
    assert result.returncode == 0 and "--num 0: it must be at least 1" in result.stderr


def test_under_a_launcher_with_two_processes_one_of_them_tells_the_mistake(user_folder):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", *SCRIPT]
    result = run_python(*command, "--config", "run.yml", "seed=x", cwd=user_folder)
    assert result.returncode != 0
    assert result.stderr.count("error: the command line: seed: expected a whole number, got 'x'") == 1, (
        result.stderr
    )


def test_accelerate_launches_the_script(user_folder):
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *SCRIPT]
    result = run_python(*command, "--config", "run.yml", "--check", cwd=user_folder)
    assert result.returncode == 0, result.stderr
    assert "stage 2, dotted paths and their arguments: ok (3 resolved)" in result.stdout
