"""launch.sh: what it starts, what it refuses, and what it does with signals and exit codes.

It runs in a copy of the repository's skeleton with spaces in its path. The ranks keep their side of the control
folder without importing torch; the launcher is a quick one with the faults of the real ones, or the real one.
SLURM's commands are stand-ins that treat signals and processes as the real ones do.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, RankGroup, cpu_environment

# A rank: `--exit` ends it at once, otherwise it runs until it is asked and takes its time to save.
RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
rank, asked = os.environ.get("RANK", "0"), []
control, notes = Path(os.environ["CELLPHASE_CONTROL"]), Path(os.environ["NOTES"])
def write(path, text):
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))
if os.environ.get("DATA_WORKER"):
    worker = subprocess.Popen(["sleep", "60"])
runs = control / f"rank{rank}.runs.{os.getpid()}"
runs.touch()
asked += control.glob("preempt.*")
write(notes / f"arguments{rank}.json", json.dumps(sys.argv[1:]))
sys.stdout.write(f"rank {rank} runs" + chr(10))  # one write: the ranks share the output
sys.stdout.flush()
exits = [argument[5:] for argument in sys.argv if argument.startswith("exit=")]
code = int(exits[0].split(",")[int(rank) % len(exits[0].split(","))]) if exits else None
if exits and "," in exits[0]:
    time.sleep(0.5)  # until the others have begun: the launcher ends all of them after the first
while code is None:
    time.sleep(0.02)
    if asked:
        time.sleep(float(os.environ.get("SAVE_SECONDS", "0")))
        code = 75 if not os.environ.get("DATA_WORKER") or worker.poll() is None else 1
if os.environ.get("DATA_WORKER"):
    worker.kill()
write(control / f"rank{rank}.exit.json", json.dumps({"exit_code": code, "reason": "x", "run_folder": None}))
runs.rename(control / f"rank{rank}.exited.{code}")
sys.stdout.write(f"rank {rank} ends with {code}" + chr(10))
sys.stdout.flush()
sys.exit(code)
"""

# A rank that talks to the script by the program's own code, and fills the disk for temporary files if it is told to.
TALKING_RANK = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from trainer import control, preemption
preemption.install()
control.note_run_folder(os.environ["NOTES"])
sys.stdout.write(f"rank {{os.environ.get('RANK', '0')}} runs" + chr(10))
sys.stdout.flush()
while (request := preemption.request()) is None:
    time.sleep(0.02)
if os.environ.get("FILL"):
    try:
        Path(os.environ["TMPDIR"], "filling").write_bytes(bytes(10**7))
    except OSError as error:
        print(error.strerror, flush=True)
sys.stdout.write(f"asked by {{request}}" + chr(10))
sys.stdout.flush()
control.leave_exit(75, f"{{request}} at step 42")
sys.exit(75)
"""

# accelerate.commands.launch: dies of SIGUSR1, answers SIGTERM with SIGKILL to its ranks, and knows one failure, 1.
LAUNCHER = """
import argparse, os, signal, subprocess, sys, time
parser = argparse.ArgumentParser()
for name in ("config_file", "main_process_ip", "main_process_port", "rdzv_backend", "deepspeed_multinode_launcher"):
    parser.add_argument("--" + name)
for name in ("num_machines", "machine_rank", "num_processes"):
    parser.add_argument("--" + name, type=int)
parser.add_argument("-m", "--module", action="store_true")
parser.add_argument("script")
parser.add_argument("rest", nargs=argparse.REMAINDER)
options = parser.parse_args()
print("launcher", os.getpid(), flush=True)
time.sleep(float(os.environ.get("LAUNCHER_SECONDS", "0")))
local = options.num_processes // options.num_machines
first = options.machine_rank * local
ranks = [
    subprocess.Popen([sys.executable, *["-m"] * options.module, options.script, *options.rest],
                     env={**os.environ, "RANK": str(first + index)}, start_new_session=True)
    for index in range(local)
]
def end(*received):
    for rank in ranks:
        rank.terminate()
    deadline = time.time() + (1 if received else 3)  # another that fails too has time to say so
    while time.time() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
    sys.exit(1)
if "SIGTERM" in os.environ.get("PET_SIGNALS_TO_HANDLE", "SIGTERM"):
    signal.signal(signal.SIGTERM, end)
while any(rank.poll() is None for rank in ranks):
    if any(rank.poll() for rank in ranks):
        end()
    time.sleep(0.02)
sys.exit(1 if any(rank.returncode for rank in ranks) else 0)
"""

# srun: one task a node; SIGUSR1 goes to every process of the step, SIGTERM becomes SIGKILL for all of them.
SRUN = """#!{python}
import os, signal, subprocess, sys, secrets
from pathlib import Path
mark, arguments, nodes = secrets.token_hex(8), sys.argv[1:], 1
with open(os.environ["NOTES"] + "/srun", "a") as file:
    print(*arguments, file=file)
if "--overlap" in arguments and os.environ.get("NO_OVERLAP"):
    sys.exit("srun: unrecognized option '--overlap'")
while arguments[0].startswith("--"):
    option, _, value = arguments.pop(0).partition("=")
    nodes = int(value) if option == "--nodes" else nodes
def forward(number):
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"STEP_MARK={{mark}}".encode() in (folder / "environ").read_bytes().split(b"\\0"):
                os.kill(int(folder.name), number)
        except OSError:
            pass
signal.signal(signal.SIGUSR1, lambda *_: forward(signal.SIGUSR1))
signal.signal(signal.SIGTERM, lambda *_: forward(signal.SIGKILL))
tasks = [
    subprocess.Popen(arguments, start_new_session=True,
                     env={{**os.environ, "SLURM_NODEID": str(node), "SLURM_STEP_ID": "0", "STEP_MARK": mark}})
    for node in range(nodes)
]
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

SCONTROL = """#!/bin/bash
case "$1 $2" in
    "show hostnames") printf 'node-a\\nnode-b\\n' ;;
    "show job") printf 'JobId=%s JobName=x\\n   JobState=%s Reason=None\\n   Command=%s\\n' \\
        "$3" "${JOB_STATE:-RUNNING}" "${JOB_COMMAND:-/nowhere/script}" ;;
    "requeue "*) echo "$2" >>"$NOTES/requeued" ;;
    *) exit 1 ;;
esac
"""

JOB = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}


class Place:
    """A repository's skeleton with launch.sh, a working directory elsewhere, and a folder of stand-ins on PATH."""

    def __init__(self, folder: Path):
        self.root, self.cwd, self.bin = folder / "my repository", folder / "elsewhere", folder / "bin"
        self.notes, self.temporary = folder / "notes", folder / "temporary files"
        for path in (self.root / "trainer", self.cwd / "my runs", self.bin, self.notes, self.temporary):
            path.mkdir(parents=True)
        shutil.copy(ROOT / "launch.sh", self.root)
        shutil.copytree(ROOT / "accelerate_configs", self.root / "accelerate_configs")
        (self.root / "trainer" / "train.py").write_text(RANK)
        package = folder / "modules" / "accelerate" / "commands"
        package.mkdir(parents=True)
        for module in (package.parent, package):
            (module / "__init__.py").touch()
        (package / "launch.py").write_text(LAUNCHER)
        (self.cwd / "my runs" / "first.yml").write_text("run_name: first\n")
        self.env = {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(folder / "modules"),
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "TMPDIR": str(self.temporary),
        }
        self.add_gpus(0)

    def add(self, name, text):
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def add_gpus(self, count):
        lines = "".join(f"GPU {index}: a device (UUID: GPU-{index})\n" for index in range(count))
        self.add("nvidia-smi", f"#!/bin/bash\ncat <<'END'\n{lines}END\n")

    def add_slurm(self):
        self.add("srun", SRUN.format(python=sys.executable))
        self.add("scontrol", SCONTROL)
        self.env |= JOB

    def use_real_launcher(self):
        self.env["PYTHONPATH"] = ""
        return self

    def start(self, *arguments, script=None, env=None):
        environment = cpu_environment(self.env) | (env or {})
        unset = [name for name, value in environment.items() if value is None]
        for name in unset:
            del environment[name]
        return RankGroup(
            [["bash", str(script or self.root / "launch.sh"), *map(str, arguments)]], [environment], self.cwd
        )

    def run(self, *arguments, expect=0, script=None, env=None):
        with self.start(*arguments, script=script, env=env) as group:
            return group.wait(60, expect).stdout

    def on_small_disk(self, size, before=""):
        """Return a script that calls launch.sh with a TMPDIR that takes so many bytes, after a command."""
        if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
            pytest.skip("needs the right to mount (unshare -rm)")
        script = self.cwd / "on_small_disk.sh"
        mount = f'mount -t tmpfs -o size={size} none "$TMPDIR" && {before or ":"}'
        inner = shlex.quote(f'{mount}; exec bash {shlex.quote(str(self.root / "launch.sh"))} "$@"')
        script.write_text(f'exec unshare -rm bash -c {inner} - "$@"\n')
        return script

    def dry_run(self, *arguments, env=None, script=None):
        """Return the last command that is printed, and all of the output."""
        output = self.run("--dry-run", *arguments, "my runs/first.yml", env=env, script=script)
        return shlex.split(output.splitlines()[-1]), output

    def arguments_of(self, rank=0):
        return json.loads((self.notes / f"arguments{rank}.json").read_text())


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def value_of(option, command):
    return command[command.index(option) + 1]


def config_of(command):
    return Path(value_of("--config_file", command)).stem


# What it starts


@pytest.mark.parametrize(
    ("gpus", "env", "config", "processes"),
    [
        (0, {}, "cpu", "1"),
        (0, {"PROCESSES_PER_NODE": "3"}, "cpu_2_processes", "3"),
        (1, {}, "gpu", "1"),
        (4, {}, "ddp", "4"),
        (4, {"PROCESSES_PER_NODE": "2"}, "ddp", "2"),
        (4, {"PROCESSES_PER_NODE": "1"}, "gpu", "1"),
        (4, {"CUDA_VISIBLE_DEVICES": "1,3"}, "ddp", "2"),
        (4, {"CUDA_VISIBLE_DEVICES": ""}, "cpu", "1"),
    ],
)
def test_devices_and_processes_choose_the_accelerate_config(place, gpus, env, config, processes):
    place.add_gpus(gpus)
    command, _ = place.dry_run(env={"CUDA_VISIBLE_DEVICES": None, **env})
    assert (config_of(command), value_of("--num_processes", command)) == (config, processes)


def test_a_fine_tuning_is_started_as_its_command(place):
    shutil.copy(place.root / "trainer" / "train.py", place.root / "trainer" / "__main__.py")
    output = place.run("finetune", "my runs/first.yml", "seed=3", "exit=0", env={"PROCESSES_PER_NODE": "2"})
    arguments = ["finetune", "--config", "my runs/first.yml", "--resume", "seed=3", "exit=0"]
    assert place.arguments_of(0) == place.arguments_of(1) == arguments, output


def test_a_slurm_job_fine_tunes_on_every_node(place):
    shutil.copy(place.root / "trainer" / "train.py", place.root / "trainer" / "__main__.py")
    place.add_slurm()
    place.run("finetune", "my runs/first.yml", "exit=0", env={"PROCESSES_PER_NODE": "2"})
    assert [place.arguments_of(rank)[0] for rank in range(4)] == ["finetune"] * 4


def test_a_named_accelerate_config_starts_the_processes_it_says(place):
    command, _ = place.dry_run("--accelerate-config", "zero2")
    assert config_of(command) == "zero2" and value_of("--num_processes", command) == "2"


def test_an_accelerate_config_may_be_a_file_of_ones_own(place):
    (place.cwd / "my own.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 5\n")
    command, _ = place.dry_run("--accelerate-config=my own.yaml")
    assert value_of("--config_file", command) == "my own.yaml"
    assert value_of("--num_processes", command) == "5"


def test_one_of_several_nodes_names_the_others_on_the_command_line(place):
    place.add_gpus(4)
    env = {"NODES": "3", "NODE_RANK": "2", "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "12345"}
    command, _ = place.dry_run(env={**env, "CUDA_VISIBLE_DEVICES": None})
    expected = {
        "--num_machines": "3",
        "--machine_rank": "2",
        "--num_processes": "12",
        "--main_process_ip": "10.1.2.3",
        "--main_process_port": "12345",
        "--rdzv_backend": "static",
    }
    assert {option: value_of(option, command) for option in expected} == expected
    assert config_of(command) == "multi_node_ddp" and "--deepspeed_multinode_launcher" not in command


def test_deepspeed_on_several_nodes_starts_without_ssh(place):
    env = {"NODES": "2", "MASTER_ADDR": "10.1.2.3"}
    command, _ = place.dry_run("--accelerate-config", "multi_node_zero", env=env)
    assert value_of("--deepspeed_multinode_launcher", command) == "standard"
    assert value_of("--main_process_port", command) == "29500"


def test_a_slurm_job_starts_itself_once_on_every_node(place):
    place.add_slurm()
    env = {"SLURM_CPUS_PER_TASK": "6", "PROCESSES_PER_NODE": "2"}
    inner, output = place.dry_run(env=env)
    outer = shlex.split(output.splitlines()[0])
    assert outer[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert {"--kill-on-bad-exit=0", "--export=ALL", "--cpus-per-task=6"} < set(outer)
    assert {"MASTER_ADDR=node-a", f"MASTER_PORT={15000 + 41234 % 15000}", "NODES=2"} < set(outer)
    assert outer[-2:] == ["train", "my runs/first.yml"]
    assert value_of("--main_process_ip", inner) == "node-a" and value_of("--num_processes", inner) == "4"
    assert not (place.notes / "srun").exists()


def test_a_slurm_job_on_one_node_needs_no_srun(place):
    place.add_slurm()
    command, output = place.dry_run(env={"SLURM_JOB_NUM_NODES": "1"})
    assert config_of(command) == "cpu" and "srun" not in output


def test_a_dry_run_starts_nothing_and_leaves_nothing(place):
    command, output = place.dry_run()
    assert "# sets CELLPHASE_CONTROL=" in output and "PET_SIGNALS_TO_HANDLE=SIGQUIT" in output
    assert command[0] == sys.executable
    assert not list(place.notes.iterdir()) and not list(place.temporary.iterdir())


def test_the_printed_command_can_be_pasted(place):
    arguments = ["note=two words", "exit=0", "values=[1, {a: '$x'}]"]
    output = place.run("--dry-run", "my runs/first.yml", *arguments)
    pasted = f"export CELLPHASE_CONTROL={shlex.quote(str(place.temporary))}; {output}"
    script = place.cwd / "pasted.sh"
    script.write_text(pasted)
    place.run(script=script)
    assert place.arguments_of() == ["--config", "my runs/first.yml", "--resume", *arguments]


def test_what_follows_the_config_reaches_the_trainer_untouched_and_in_order(place):
    arguments = ["b=two words", "--check", "a=[1, 'x']", "exit=0", "c=d=e", "--dry-run", "empty=", "*", ""]
    place.run("my runs/first.yml", *arguments)
    assert place.arguments_of() == ["--config", "my runs/first.yml", "--resume", *arguments]


def test_the_environment_of_the_repository_is_the_default_python(place):
    (place.root / ".venv" / "bin").mkdir(parents=True)
    (place.root / ".venv" / "bin" / "python").symlink_to(sys.executable)
    place.env["PYTHONPATH"] = os.pathsep.join([place.env["PYTHONPATH"], *filter(None, sys.path)])
    command, _ = place.dry_run(env={"PYTHON": None})
    assert command[0] == f"{place.root}/.venv/bin/python"


@pytest.mark.parametrize("how", ["command", "submit_dir", "home"])
def test_a_spooled_copy_finds_the_repository(place, tmp_path, how):
    place.add_slurm()
    (tmp_path / "spool").mkdir()
    spooled = shutil.copy(place.root / "launch.sh", tmp_path / "spool" / "slurm_script")
    env = {
        "command": {"JOB_COMMAND": f"{place.root}/launch.sh my runs/first.yml a=b"},
        "submit_dir": {"SLURM_SUBMIT_DIR": str(place.root)},
        "home": {"CELLPHASE_HOME": str(place.root)},
    }[how]
    command, _ = place.dry_run(env=env, script=spooled)
    assert f"{place.root}/trainer/train.py" in command


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ([], {}, "no CONFIG given"),
        (["nothing.yml"], {}, "no such file: nothing.yml"),
        (["--bogus", "my runs/first.yml"], {}, "unknown option --bogus"),
        (["--accelerate-config"], {}, "--accelerate-config needs a file or a name"),
        (["--accelerate-config", "zero9", "my runs/first.yml"], {}, "no accelerate config 'zero9'"),
        (["--accelerate-config", "my runs/first.yml", "my runs/first.yml"], {}, "it has no distributed_type"),
        (
            ["--accelerate-config", "cpu", "my runs/first.yml"],
            {"PROCESSES_PER_NODE": "2"},
            "starts one process",
        ),
        (
            ["my runs/first.yml"],
            {"PROCESSES_PER_NODE": "two"},
            "PROCESSES_PER_NODE=two is not a whole number",
        ),
        (["my runs/first.yml"], {"NODES": "0"}, "NODES=0 is not a whole number"),
        (["my runs/first.yml"], {"NODES": "2", "NODE_RANK": "2"}, "go from 0 to 1"),
        (["my runs/first.yml"], {"NODES": "2", "NODE_RANK": "first"}, "NODE_RANK=first"),
        (["my runs/first.yml"], {"NODES": "2"}, "needs MASTER_ADDR"),
        (["my runs/first.yml"], {"CELLPHASE_SAVE_SECONDS": "5m"}, "CELLPHASE_SAVE_SECONDS=5m is not a whole"),
        (["my runs/first.yml"], {"CELLPHASE_MEET_SECONDS": "0"}, "CELLPHASE_MEET_SECONDS=0 is not a whole"),
        (["my runs/first.yml"], {"MASTER_PORT": "http"}, "MASTER_PORT=http is not a port"),
        (["my runs/first.yml"], {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        (["my runs/first.yml"], {"PYTHON": "/no/python"}, "there is no Python at '/no/python'"),
        (
            ["--accelerate-config", "cpu", "my runs/first.yml"],
            {"NODES": "2", "MASTER_ADDR": "10.0.0.1"},
            "choose multi_node_ddp",
        ),
        (
            ["--accelerate-config", "zero2", "my runs/first.yml"],
            {"CXX": "no-compiler -O2"},
            "no C++ compiler",
        ),
        (["my runs/first.yml"], {**JOB, "SLURM_NTASKS_PER_NODE": "4"}, "submit with --ntasks-per-node=1"),
        (["my runs/first.yml"], {**JOB, "SLURM_STEP_ID": "0"}, "start launch.sh in the batch script itself"),
        (["my runs/first.yml"], JOB, "named no host; set MASTER_ADDR"),
    ],
)
def test_a_mistake_is_named_and_nothing_starts(place, arguments, env, message):
    output = place.run(*arguments, env=env, expect=2)
    assert output.count("launch.sh: error: ") == 1 and message in output
    assert not list(place.notes.iterdir()) and not list(place.temporary.iterdir())


def test_a_port_that_is_taken_is_named_before_anything_starts(place):
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        env = {"NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PROCESSES_PER_NODE": "1"}
        output = place.run("my runs/first.yml", env=env, expect=2)
    assert f"MASTER_PORT={port} cannot be had on this node: Address already in use" in output


def test_a_command_in_an_accelerate_config_is_not_executed(place, tmp_path):
    """Bash executes what stands in brackets of a number, which words of this key would become."""
    command = f"MULTI_GPU 1 PIPESTATUS[$(touch${{IFS}}{tmp_path}/executed)]"
    (place.cwd / "own.yaml").write_text(f"distributed_type: '{command}'\nnum_processes: 1\n")
    output = place.run("--dry-run", "--accelerate-config=own.yaml", "my runs/first.yml", expect=2)
    assert "launch.sh: error: own.yaml: distributed_type is 'MULTI_GPU 1 PIPE" in output
    assert output.count("own.yaml") == 1 and "none of accelerate's" in output
    assert not (tmp_path / "executed").exists()


def test_more_processes_than_gpus_are_refused_unless_the_cpu_is_asked_for(place):
    place.add_gpus(2)
    env = {"PROCESSES_PER_NODE": "4", "CUDA_VISIBLE_DEVICES": None}
    assert "this node has 2 GPUs" in place.run("my runs/first.yml", env=env, expect=2)
    command, _ = place.dry_run("--accelerate-config", "cpu_2_processes", env=env)
    assert value_of("--num_processes", command) == "4"


def test_an_unsupported_python_is_refused(place, tmp_path):
    (tmp_path / "modules" / "sitecustomize.py").write_text(
        "import sys\nfrom collections import namedtuple\n"
        "names = 'major minor micro releaselevel serial'\n"
        "sys.version_info = namedtuple('version_info', names)(3, 10, 1, 'final', 0)\n"
    )
    output = place.run("my runs/first.yml", expect=2)
    assert "is Python 3.10; 3.11 or 3.12 is needed" in output


def test_the_pythons_it_accepts_are_those_of_the_package():
    requires = re.search(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())
    assert requires is not None and requires[1] == ">=3.11,<3.13"
    assert "(3, 11) <= sys.version_info[:2] <= (3, 12)" in (ROOT / "launch.sh").read_text()


def test_a_python_without_the_packages_is_refused(place):
    bare = place.add("bare-python", f'#!/bin/bash\nexec "{sys.executable}" -I -S "$@"\n')
    output = place.run("my runs/first.yml", env={"PYTHON": bare}, expect=2)
    assert "has no torch, accelerate, yaml" in output and "make install" in output


def test_a_missing_deepspeed_is_named(place, tmp_path):
    (tmp_path / "modules" / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'deepspeed' else find(name, *rest)\n"
    )
    output = place.run("--accelerate-config", "zero3", "my runs/first.yml", expect=2)
    assert "asks for DeepSpeed" in output


def test_a_copy_without_its_repository_is_refused(place, tmp_path):
    alone = shutil.copy(place.root / "launch.sh", tmp_path / "slurm_script")
    output = place.run("my runs/first.yml", script=alone, expect=2)
    assert "set CELLPHASE_HOME" in output


def test_a_home_that_is_no_repository_is_refused(place, tmp_path):
    alone = shutil.copy(place.root / "launch.sh", tmp_path / "slurm_script")
    output = place.run("my runs/first.yml", script=alone, env={"CELLPHASE_HOME": "/tmp"}, expect=2)
    assert "CELLPHASE_HOME=/tmp holds no trainer/train.py" in output


# Exit codes and signals

TWO = {"PROCESSES_PER_NODE": "2"}


@pytest.mark.parametrize(
    ("codes", "answer"),
    [
        ("0", 0),
        ("2", 2),
        ("75", 75),
        ("130", 130),
        ("1", 1),
        ("3", 1),
        ("75,1", 1),
        ("2,75", 2),
        ("75,0", 75),
    ],
)
def test_the_ranks_exit_codes_come_back_through_the_launcher(place, codes, answer):
    place.run("my runs/first.yml", f"exit={codes}", env=TWO, expect=answer)
    assert not list(place.temporary.iterdir())


def test_a_rank_that_leaves_no_exit_code_is_a_failure(place):
    (place.root / "trainer" / "train.py").write_text(RANK.replace("runs.rename(", "(0, "))
    place.run("my runs/first.yml", "exit=75", env=TWO, expect=1)


def test_how_the_ranks_ended_is_the_last_that_is_said(place):
    output = place.run("my runs/first.yml", "exit=2,2", env=TWO, expect=2)
    assert output.splitlines()[-1] == "launch.sh: ranks 0, 1 ended with 2: x"


@pytest.mark.parametrize("saved", ["checkpoint_130", None])
def test_a_failure_ends_with_the_run_folder_and_what_to_do(place, saved):
    (place.root / "trainer" / "train.py").write_text(TALKING_RANK)
    (place.notes / "checkpoint_130").mkdir()
    (place.notes / "latest").write_text("checkpoint_130\n")
    if saved:
        (place.notes / "checkpoint_130" / "manifest.json").touch()
    with place.start("my runs/first.yml") as group:
        group.wait_for("rank 0 runs")
        os.kill(pid_of_rank(place, 0), signal.SIGKILL)
        output = group.wait(30, expect=1).stdout
    assert output.splitlines()[-2:] == [
        f"launch.sh: run folder {place.notes}",
        "launch.sh: the last complete checkpoint is checkpoint_130; the same command goes on from it"
        if saved
        else "launch.sh: there is no complete checkpoint yet; the same command starts again",
    ]


def test_a_failure_before_the_run_is_opened_says_what_to_do(place):
    output = place.run("my runs/first.yml", "exit=1,1", env=TWO, expect=1)
    assert output.splitlines()[-2:] == [
        "launch.sh: ranks 0, 1 ended with 1: x",
        "launch.sh: the run was not opened; the same command starts again",
    ]


def test_a_disk_for_temporary_files_that_is_full_keeps_no_exit_code_back(place):
    (place.root / "trainer" / "train.py").write_text(TALKING_RANK)
    with place.start("my runs/first.yml", script=place.on_small_disk("1m"), env={"FILL": "1"}) as group:
        group.wait_for("rank 0 runs")
        group.signal_ranks(signal.SIGTERM)
        output = group.wait(30, expect=75).stdout
    assert "No space left on device" in output and "ended as it was asked to" in output


def test_a_folder_for_temporary_files_that_is_full_is_named_before_anything_starts(place):
    full = place.on_small_disk("128k", 'head -c 100000 /dev/zero >"$TMPDIR/other"')
    output = place.run("my runs/first.yml", script=full, expect=2)
    assert (
        f"error: TMPDIR={place.temporary} takes no files of 65536 bytes (No space left on device)" in output
    )
    output = place.run("my runs/first.yml", env={"TMPDIR": "/no/such"}, expect=2)
    assert "TMPDIR=/no/such takes no files of 65536 bytes (No such file or directory)" in output
    assert not list(place.notes.iterdir())


def pid_of_rank(place, rank):
    return int(next(place.temporary.glob(f"*.d/rank{rank}.runs.*")).suffix[1:])


def test_a_rank_that_was_killed_is_named_last(place):
    with place.start("my runs/first.yml", env=TWO) as group:
        group.wait_for("rank 0 runs")
        group.wait_for("rank 1 runs")
        os.kill(pid_of_rank(place, 1), signal.SIGKILL)
        output = group.wait(30, expect=1).stdout
    assert "launch.sh: rank 1 left no account of its end: it was killed" in output
    assert "launch.sh: rank 0 ended with 75: x" in output


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_a_signal_reaches_every_rank_and_waits_longer_than_the_launcher_would(place, name):
    with place.start("my runs/first.yml", env={**TWO, "SAVE_SECONDS": "2"}) as group:
        group.wait_for("rank 0 runs")
        group.wait_for("rank 1 runs")
        group.processes[0].send_signal(getattr(signal, name))
        output = group.wait(30, expect=75).stdout
    assert output.count("ends with 75") == 2
    assert not list(place.temporary.iterdir())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_the_ranks_learn_which_signal_the_script_was_sent(place, name):
    (place.root / "trainer" / "train.py").write_text(TALKING_RANK)
    with place.start("my runs/first.yml", env=TWO) as group:
        group.wait_for("rank 0 runs")
        group.wait_for("rank 1 runs")
        group.processes[0].send_signal(getattr(signal, name))
        group.wait_for("asks the ranks")
        group.processes[0].send_signal(signal.SIGTERM)
        output = group.wait(30, expect=75).stdout
    assert output.count(f"asked by {name}") == 2


def test_a_signal_before_the_ranks_are_up_is_not_lost(place):
    with place.start("my runs/first.yml", env={**TWO, "LAUNCHER_SECONDS": "1"}) as group:
        group.wait_for("launcher")
        group.processes[0].send_signal(signal.SIGTERM)
        output = group.wait(30, expect=75).stdout
    assert output.count("ends with 75") == 2


def test_a_signal_ends_a_launcher_that_waits_for_other_nodes(place):
    script = place.root / "launch.sh"
    script.write_text(script.read_text().replace("BEGIN_SECONDS=20", "BEGIN_SECONDS=1"))
    env = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "LAUNCHER_SECONDS": "100"}
    with place.start("my runs/first.yml", env={**TWO, **env}) as group:
        group.wait_for("launcher")
        group.processes[0].send_signal(signal.SIGTERM)
        assert "there is nothing to save" in group.wait(30, expect=75).stdout


def with_constant(place, name, value):
    script = place.root / "launch.sh"
    text, count = re.subn(rf"\b{name}=[0-9]+", f"{name}={value}", script.read_text())
    assert count == 1
    script.write_text(text)


def test_a_node_that_waits_long_for_the_others_says_where_and_ends(place):
    with_constant(place, "PATIENCE_SECONDS", 1)
    env = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "LAUNCHER_SECONDS": "100"}
    output = place.run("my runs/first.yml", env={**TWO, **env, "CELLPHASE_MEET_SECONDS": "7"}, expect=1)
    said = "node 1 still waits for the other nodes at 127.0.0.1:29500"
    assert re.findall(rf"{said}.* after 7 seconds .* of which (\d) have", output) == ["1", "5"]
    assert "node 1 has waited 7 seconds in vain for the other nodes at 127.0.0.1:29500: ends" in output


def test_ranks_that_do_not_end_when_they_are_asked_are_killed(place):
    with place.start("my runs/first.yml", env={"CELLPHASE_SAVE_SECONDS": "2"}) as group:
        group.wait_for("rank 0 runs")
        os.kill(pid_of_rank(place, 0), signal.SIGSTOP)
        group.processes[0].send_signal(signal.SIGUSR1)
        output = group.wait(30, expect=1).stdout
        assert not group._members()
    assert "still run 2 seconds after they were asked to end (CELLPHASE_SAVE_SECONDS): kills" in output
    assert "launch.sh: rank 0 did not end by itself: launch.sh killed it" in output


def test_nothing_attends_to_a_node_whose_script_was_killed(place):
    with place.start("my runs/first.yml") as group:
        group.wait_for("rank 0 runs")
        group.processes[0].kill()
        deadline = time.monotonic() + 10
        while any("launch.sh" in command for command in group.commands()):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_ranks_that_the_others_have_given_up_are_killed(place):
    (place.root / "trainer" / "train.py").write_text(TALKING_RANK)
    with_constant(place, "ORPHAN_SECONDS", 1)
    with_constant(place, "LOOK_SECONDS", 1)
    with place.start("my runs/first.yml") as group:
        group.wait_for("rank 0 runs")
        os.kill(pid_of_rank(place, 0), signal.SIGSTOP)
        (place.notes / "heartbeats").mkdir()
        (place.notes / "heartbeats" / "failure.a1.json").write_text('{"reason": "rank 3 is stopped"}\n')
        output = group.wait(30, expect=1).stdout
        assert not group._members()
    assert "still run 1 seconds after the run has failed: kills them" in output
    assert "it failed because rank 3 is stopped\n" in output


def test_a_signal_during_the_checks_is_not_lost(place):
    slow = place.add("slow-python", f'#!/bin/bash\n[[ $1 == - ]] && sleep 1\nexec "{sys.executable}" "$@"\n')
    with place.start("my runs/first.yml", env={"PYTHON": slow}) as group:
        time.sleep(0.6)
        assert not list(place.temporary.glob("*.d"))
        group.processes[0].send_signal(signal.SIGTERM)
        assert "rank 0 ends with 75" in group.wait(30, expect=75).stdout


def test_repeated_signals_change_nothing(place):
    with place.start("my runs/first.yml", env={**TWO, "SAVE_SECONDS": "1"}) as group:
        group.wait_for("rank 1 runs")
        for name in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            group.processes[0].send_signal(name)
            time.sleep(0.1)
        assert group.wait(30, expect=75).stdout.count("ends with 75") == 2


def test_a_signal_to_all_processes_at_once_leaves_the_ranks_their_time(place):
    with place.start("my runs/first.yml", env={**TWO, "SAVE_SECONDS": "2"}) as group:
        group.wait_for("rank 1 runs")
        for member in group._members():
            member.send_signal(signal.SIGTERM)
        assert group.wait(30, expect=75).stdout.count("ends with 75") == 2


def test_a_second_interrupt_ends_everything_at_once(place):
    with place.start("my runs/first.yml", env={**TWO, "SAVE_SECONDS": "50"}) as group:
        group.wait_for("rank 1 runs")
        group.processes[0].send_signal(signal.SIGINT)
        group.wait_for("waits for them")
        group.processes[0].send_signal(signal.SIGINT)
        output = group.wait(10, expect=130).stdout
        assert "without a checkpoint" in output and not group._members()
    assert not list(place.temporary.iterdir())


def test_ranks_without_their_launcher_may_save(place):
    with place.start("my runs/first.yml", env={**TWO, "SAVE_SECONDS": "1"}) as group:
        group.wait_for("rank 1 runs")
        group.wait_for("rank 0 runs")
        launcher = re.search(r"launcher (\d+)", group.output())
        assert launcher is not None
        os.kill(int(launcher[1]), signal.SIGKILL)
        output = group.wait(30, expect=75).stdout
    assert output.count("ends with 75") == 2 and "the launcher is gone" in output


def test_ranks_without_their_launcher_that_do_not_end_are_killed(place):
    script = place.root / "launch.sh"
    script.write_text(script.read_text().replace("ORPHAN_SECONDS=300", "ORPHAN_SECONDS=1"))
    with place.start("my runs/first.yml", env={**TWO, "SAVE_SECONDS": "50"}) as group:
        group.wait_for("rank 1 runs")
        group.wait_for("rank 0 runs")
        launcher = re.search(r"launcher (\d+)", group.output())
        assert launcher is not None
        os.kill(int(launcher[1]), signal.SIGKILL)
        group.wait(30, expect=1)
        assert not group._members()


@pytest.mark.parametrize(("name", "processes"), [("SIGTERM", 2), ("SIGUSR1", 1)])
def test_the_real_launcher_does_not_cut_a_save_short(place, name, processes):
    env = {"PROCESSES_PER_NODE": str(processes), "SAVE_SECONDS": "3", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1"}
    with place.use_real_launcher().start("my runs/first.yml", env=env) as group:
        group.wait_for(f"rank {processes - 1} runs")
        group.wait_for("rank 0 runs")
        for member in group._members():  # as SLURM does at a job's end
            member.send_signal(getattr(signal, name))
        assert group.wait(60, expect=75).stdout.count("ends with 75") == processes


# SLURM


def start_job(place, env=None):
    place.add_slurm()
    group = place.start("my runs/first.yml", env={"PROCESSES_PER_NODE": "2", **(env or {})})
    for rank in range(4):
        group.wait_for(f"rank {rank} runs")
    return group


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_to_the_batch_script_ends_all_nodes_with_a_checkpoint_and_requeues(place, name):
    with start_job(place, {"SAVE_SECONDS": "1", "DATA_WORKER": "1"}) as group:
        group.processes[0].send_signal(getattr(signal, name))
        assert group.wait(30, expect=75).stdout.count("ends with 75") == 4
    assert (place.notes / "requeued").read_text() == "41234\n"


def test_the_nodes_of_a_job_learn_which_signal_it_was_sent(place):
    with start_job(place) as group:
        group.processes[0].send_signal(signal.SIGHUP)
        output = group.wait(30, expect=75).stdout
    assert output.count("launch.sh: SIGHUP: asks the ranks") == 2


def test_an_srun_that_starts_no_second_step_passes_the_signal_on(place):
    with start_job(place, {"SAVE_SECONDS": "1", "NO_OVERLAP": "1"}) as group:
        group.processes[0].send_signal(signal.SIGUSR1)
        assert group.wait(30, expect=75).stdout.count("ends with 75") == 4
    assert (place.notes / "requeued").exists()


def test_a_job_that_was_cancelled_is_not_requeued(place):
    with start_job(place, {"JOB_STATE": "CANCELLED"}) as group:
        group.processes[0].send_signal(signal.SIGTERM)
        assert "is not requeued" in group.wait(30, expect=75).stdout
    assert not (place.notes / "requeued").exists()


def test_a_job_on_one_node_is_requeued_too(place):
    place.add_slurm()
    place.run("my runs/first.yml", "exit=75", env={"SLURM_JOB_NUM_NODES": "1"}, expect=75)
    assert (place.notes / "requeued").read_text() == "41234\n"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_job_that_ended_by_itself_is_not_requeued(place, code):
    place.add_slurm()
    place.run("my runs/first.yml", f"exit={code}", expect=code)
    assert not (place.notes / "requeued").exists()


def test_each_node_of_a_job_has_its_ranks(place):
    place.add_slurm()
    place.run("my runs/first.yml", "exit=0", env=TWO)
    assert len(list(place.notes.glob("arguments*.json"))) == 4


def test_sbatch_reads_the_options_of_the_script():
    lines = (ROOT / "launch.sh").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--ntasks-per-node=1", "--signal=B:USR1@300", "--requeue"} < set(options)
    assert all(line.startswith("#") for line in lines[: len(options) + 1])
