"""Find out whether a run can start here, and say what to do about what is wrong: `python -m trainer doctor`.

Under a launcher every rank looks at its own host, and the ranks' clocks are compared.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
import platform
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
import torch.distributed
from torch.cuda import nccl

from trainer.console import counted, is_main_process, process_index
from trainer.exits import run_command

State = Literal["ok", "absent", "warning", "broken"]

NEEDED, OPTIONAL = ("torch", "accelerate"), ("deepspeed", "transformer-engine", "torchao")
FP8_CAPABILITY = (8, 9)
"""The least compute capability whose matrix units take FP8."""

GROUP_TIMEOUT = timedelta(seconds=60)
IMPORT_SECONDS = 120
LEAST_FREE_BYTES = 10e9
LEAST_SHARED_MEMORY_BYTES = 1e9
LEAST_TEMPORARY_BYTES = 65536
LEAST_OPEN_FILES = 1024
LARGEST_CLOCK_OFFSET_SECONDS = 1.0
_WRITTEN_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Finding:
    """What was found of one thing."""

    name: str
    state: State
    """`broken`: a run cannot start; `warning`: one can, all the same; `absent`: something optional is not there."""
    found: str
    advice: str = ""
    """What to do about it; empty where nothing is to be done."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 where a run can start, 2 where something is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer doctor",
        allow_abbrev=False,
        description="Find out whether a run can start on this machine, and what to do where it cannot.",
        epilog="Exit codes: 0 a run can start, 2 something is broken, 130 interrupted, 1 anything else.",
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path("checkpoints"), metavar="DIR", help="the run's output_dir"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    return run_command(lambda: _examine_and_say(arguments))


def _examine_and_say(arguments: argparse.Namespace) -> int:
    findings = examine(arguments.output_dir)
    broken = [finding for finding in findings if finding.state == "broken"]
    if arguments.json:
        said = json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1)
    else:
        said = render(findings)
    # Under a launcher each rank has its own host's faults; those of rank 0 are printed, of others where they have any.
    if is_main_process():
        print(said, flush=True)
    elif broken:
        text = "; ".join(f"{finding.name}: {finding.found}" for finding in broken)
        print(f"rank {process_index()} on {socket.gethostname()}: {text}", flush=True)
    return 2 if broken else 0


def examine(output_dir: Path) -> list[Finding]:
    """Look at everything; a fault of one thing keeps none of the others from being looked at."""
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("versions", check_versions),
        ("gpu", check_devices),
        ("fp8", check_fp8),
        ("process group", check_process_groups),
        ("deepspeed", check_deepspeed),
        ("compiler", check_compiler),
        ("output folder", lambda: check_folder(output_dir)),
        ("temporary files", check_temporary_files),
        ("limits", check_limits),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except Exception as error:
            findings.append(Finding(name, "broken", _reason(error), "report this: the check itself failed"))
    return findings


def check_versions() -> list[Finding]:
    """Look for the packages."""
    found = [Finding("python", "ok", platform.python_version())]
    for name in NEEDED:
        version = _version(name)
        found.append(
            Finding(name, "ok", version)
            if version
            else Finding(name, "broken", "not installed", "make install")
        )
    about = {
        "deepspeed": "needed for ZeRO: make install",
        "transformer-engine": "needed for fp8.backend: te alone",
        "torchao": "needed for fp8.backend: torchao alone",
    }
    for name in OPTIONAL:
        version = _version(name)
        found.append(
            Finding(name, "ok", version) if version else Finding(name, "absent", "not installed", about[name])
        )
    return found


def check_devices() -> list[Finding]:
    """Look for GPUs, and where there is none for the reason."""
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            text = f"{torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
            name = f"gpu {index}"
            if free < total / 2:
                found.append(
                    Finding(name, "warning", text, "another process holds its memory: see nvidia-smi")
                )
            else:
                found.append(Finding(name, "ok", text))
        return found
    if torch.version.cuda is None:
        has_device = Path("/dev/nvidia0").exists()
        text = f"none: torch {torch.__version__} is built for the CPU"
        if has_device:
            return [Finding("gpu", "warning", text, "this machine has one: install torch with CUDA")]
        return [Finding("gpu", "ok", text)]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        text = f"none: CUDA_VISIBLE_DEVICES is '{hidden}', which hides all"
        return [Finding("gpu", "warning", text, "unset it to use GPUs")]
    try:
        torch.cuda.init()
        reason = "torch finds no device"
    except (RuntimeError, AssertionError) as error:
        reason = _reason(error)
    return [
        Finding("gpu", "warning", f"none: {reason}", "compare the driver of nvidia-smi with torch's CUDA")
    ]


def check_fp8() -> list[Finding]:
    """Say whether FP8 by Transformer Engine can be had, or why not."""
    findings = []
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        text = f"compute capability {capability[0]}.{capability[1]}"
        if capability < FP8_CAPABILITY:
            advice = "use precision: bf16, or fp8.backend: emulate to see what FP8 would do"
            findings.append(Finding("fp8 device", "absent", f"{text} has no FP8", advice))
        else:
            findings.append(Finding("fp8 device", "ok", text))
    else:
        advice = "use precision: bf16, or fp8.backend: emulate, which runs on any device"
        findings.append(Finding("fp8 device", "absent", "none: FP8 needs a GPU", advice))
    if importlib.util.find_spec("transformer_engine") is None:
        advice = "pip install --no-build-isolation 'transformer_engine[pytorch]' where FP8 is wanted"
        return [*findings, Finding("transformer engine", "absent", "not installed", advice)]
    # In a process of its own: it may end the one that imports it.
    outcome = _run_python("import transformer_engine.pytorch")
    if outcome is None:
        return [*findings, Finding("transformer engine", "ok", "imports")]
    advice = (
        "install its parts for this torch and CUDA: 'transformer_engine[pytorch]', with --no-build-isolation"
    )
    return [*findings, Finding("transformer engine", "warning", f"does not import: {outcome}", advice)]


def check_process_groups() -> list[Finding]:
    """Make a process group and use it, of one process, or under a launcher of all ranks."""
    if not torch.distributed.is_available():
        return [Finding("process group", "broken", "torch has no torch.distributed", "install another torch")]
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    findings = []
    try:
        if num_ranks > 1:
            torch.distributed.init_process_group("gloo", timeout=GROUP_TIMEOUT)
        else:
            address = f"tcp://127.0.0.1:{_free_port()}"
            torch.distributed.init_process_group(
                "gloo", init_method=address, rank=0, world_size=1, timeout=GROUP_TIMEOUT
            )
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        assert int(total) == num_ranks
        ranks = counted(num_ranks, "process", "processes")
        findings.append(Finding("gloo", "ok", f"a group of {ranks} adds up"))
        if num_ranks > 1:
            findings.append(_compare_clocks(num_ranks))
        findings.append(_check_nccl())
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        advice = (
            "name the network interface in GLOO_SOCKET_IFNAME (`ip addr` lists them; lo for one machine), and let "
            "/etc/hosts resolve this host's name"
        )
        findings.append(Finding("gloo", "broken", _reason(error), advice))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return findings


def _check_nccl() -> Finding:
    if not torch.cuda.is_available():
        return Finding("nccl", "ok", "not needed without a GPU")
    if not torch.distributed.is_nccl_available():
        advice = "one GPU works without; for several install torch with CUDA on Linux"
        return Finding("nccl", "warning", "torch has no NCCL", advice)
    try:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(local % torch.cuda.device_count())
        group = torch.distributed.new_group(backend="nccl", timeout=GROUP_TIMEOUT)
        total = torch.ones(1, device="cuda")
        torch.distributed.all_reduce(total, group=group)
        torch.cuda.synchronize()
    except (RuntimeError, ValueError) as error:
        return Finding(
            "nccl", "broken", _reason(error), "run again with NCCL_DEBUG=INFO, which names the fault"
        )
    return Finding("nccl", "ok", ".".join(map(str, nccl.version())))


def _compare_clocks(num_ranks: int) -> Finding:
    torch.distributed.barrier()
    clocks = [torch.zeros(1, dtype=torch.float64) for _ in range(num_ranks)]
    torch.distributed.all_gather(clocks, torch.tensor([time.time()], dtype=torch.float64))
    offset = float(max(clocks) - min(clocks))
    text = f"{offset:.2f} s apart at most"
    if offset > LARGEST_CLOCK_OFFSET_SECONDS:
        return Finding(
            "clocks", "warning", text, "let NTP or chrony set the hosts' clocks: logs would not compare"
        )
    return Finding("clocks", "ok", text)


def check_deepspeed() -> list[Finding]:
    """Import DeepSpeed, and list what it would compile where that is used."""
    if importlib.util.find_spec("deepspeed") is None:
        return []  # said with the versions
    code = (
        "import json, deepspeed, deepspeed.ops\n"
        "from deepspeed.git_version_info import installed_ops\n"
        "compatible = deepspeed.ops.__compatible_ops__\n"
        "print('ops:' + json.dumps(sorted(n for n, is_so in compatible.items() if is_so and not installed_ops.get(n))))"
    )
    output: list[str] = []
    outcome = _run_python(code, output)
    if outcome is not None:
        return [Finding("deepspeed import", "warning", f"fails: {outcome}", "ZeRO needs it: make install")]
    line = next((line for line in output if line.startswith("ops:")), "ops:[]")
    ops = json.loads(line.removeprefix("ops:"))
    text = f"imports; compiled on first use: {', '.join(ops)}" if ops else "imports; nothing to compile"
    return [Finding("deepspeed import", "ok", text)]


def check_compiler() -> list[Finding]:
    """Look for what DeepSpeed compiles its operators with."""
    compiler = next(
        (path for name in (os.environ.get("CXX"), "c++", "g++") if name and (path := shutil.which(name))),
        None,
    )
    ninja = shutil.which("ninja")
    needed = "needed where DeepSpeed compiles an operator, as for offloading with its own optimizers"
    return [
        Finding("c++ compiler", "ok", compiler)
        if compiler
        else Finding("c++ compiler", "warning", "not found", f"{needed}: install g++ or set CXX"),
        Finding("ninja", "ok", ninja)
        if ninja
        else Finding("ninja", "warning", "not on PATH", f"{needed}: pip install ninja"),
    ]


def check_folder(output_dir: Path) -> list[Finding]:
    """Write, lock and rename in the output folder, or where it would be made; nothing stays there."""
    folder = Path(os.path.abspath(output_dir))
    while not folder.exists():
        folder = folder.parent
    where = str(folder) if folder == Path(os.path.abspath(output_dir)) else f"{folder} (for {output_dir})"
    if not folder.is_dir():
        return [Finding("output folder", "broken", f"{folder} is a file", "choose another output_dir")]
    trial = folder / f".doctor-{secrets.token_hex(4)}"
    try:
        trial.mkdir()
    except OSError as error:
        advice = "choose an output_dir that you may write to"
        return [Finding("output folder", "broken", f"{where}: {error.strerror or error}", advice)]
    try:
        space, speed = _check_space(folder, where), _check_speed(trial)
        if speed.state == "broken":  # the others would fail of the same
            return [space, speed]
        return [space, speed, _check_locks(trial), _check_renames(trial)]
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def _check_space(folder: Path, where: str) -> Finding:
    free = shutil.disk_usage(folder).free
    text = f"{where}: {free / 1e9:.1f} GB free"
    if free < LEAST_FREE_BYTES:
        advice = "checkpoints may not fit: `python -m trainer plan` says their size; make room or keep fewer"
        return Finding("output folder", "warning", text, advice)
    return Finding("output folder", "ok", text)


def _check_speed(trial: Path) -> Finding:
    block = os.urandom(2**20)
    started = time.perf_counter()
    try:
        with open(trial / "written", "wb") as file:
            for _ in range(_WRITTEN_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        advice = "make room, raise the quota, or choose another output_dir"
        return Finding("writing", "broken", f"{error.strerror or error}", advice)
    speed = _WRITTEN_BYTES / (time.perf_counter() - started)
    text = f"{speed / 1e6:,.0f} MB/s to the disk"
    if speed < 20e6:
        return Finding(
            "writing", "warning", text, "checkpoints will take long: choose a faster disk as output_dir"
        )
    return Finding("writing", "ok", text)


def _check_locks(trial: Path) -> Finding:
    advice = "mount it with locks (NFS: not `nolock`; Lustre: `flock`), or choose another output_dir"
    path = trial / "lock"
    with open(path, "w") as first, open(path, "w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return Finding("locks", "broken", f"flock: {error.strerror or error}", advice)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("locks", "ok", "flock keeps a second process out")
    return Finding("locks", "broken", "flock lets two in: two processes could write one run", advice)


def _check_renames(trial: Path) -> Finding:
    advice = "checkpoints get their names by renaming; choose an output_dir on another file system"
    try:
        (trial / "new").mkdir()
        (trial / "new" / "inside").write_text("whole")
        os.rename(trial / "new", trial / "named")
        (trial / "old.txt").write_text("old")
        (trial / "new.txt").write_text("new")
        os.replace(trial / "new.txt", trial / "old.txt")
        is_good = (trial / "named" / "inside").read_text() == "whole"
        is_good &= (trial / "old.txt").read_text() == "new" and not (trial / "new").exists()
    except OSError as error:
        return Finding("renames", "broken", f"{error.strerror or error}", advice)
    if not is_good:
        return Finding("renames", "broken", "a renamed folder or file is not what it was", advice)
    return Finding("renames", "ok", "folders and files are renamed whole")


def check_temporary_files() -> list[Finding]:
    """Write in the folder for temporary files, through which launch.sh and its ranks talk; nothing stays there."""
    folder = Path(os.environ.get("TMPDIR") or "/tmp")
    trial = folder / f".doctor-{secrets.token_hex(4)}"
    try:
        trial.write_bytes(bytes(LEAST_TEMPORARY_BYTES))
        text = f"{folder}: {shutil.disk_usage(folder).free / 1e9:.1f} GB free"
    except OSError as error:
        advice = "make room, or set TMPDIR to a folder on a local disk: launch.sh and its ranks need some"
        text = f"TMPDIR={folder} takes no files ({error.strerror or error})"
        return [Finding("temporary files", "broken", text, advice)]
    finally:
        with contextlib.suppress(OSError):
            trial.unlink(missing_ok=True)
    return [Finding("temporary files", "ok", text)]


def check_limits() -> list[Finding]:
    """Look at open files, shared memory, and threads against CPUs."""
    findings = []
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        advice = f"`ulimit -n {LEAST_OPEN_FILES}` or more: corpora of many files and loader workers need it"
        findings.append(Finding("open files", "warning", files, advice))
    else:
        findings.append(Finding("open files", "ok", files))
    shared = Path("/dev/shm")
    size = shutil.disk_usage(shared).total if shared.is_dir() else 0
    text = f"{size / 1e9:.1f} GB"
    if size < LEAST_SHARED_MEMORY_BYTES:
        advice = "worker processes and NCCL share memory there; in a container: --shm-size, or num_workers: 0"
        findings.append(Finding("/dev/shm", "warning", text, advice))
    else:
        findings.append(Finding("/dev/shm", "ok", text))
    num_cpus, num_threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    text = f"{num_cpus} CPUs, {num_local} x {num_threads} threads of torch"
    if num_local * num_threads > num_cpus:
        advice = f"set num_threads, or OMP_NUM_THREADS={max(1, num_cpus // num_local)}: more threads than CPUs are slow"
        findings.append(Finding("threads", "warning", text, advice))
    else:
        findings.append(Finding("threads", "ok", text))
    return findings


def render(findings: Sequence[Finding]) -> str:
    """Return the findings as text, with what to do below each fault."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<8} {finding.name:<{width}}  {finding.found}")
        if finding.advice:
            lines.append(f"{'':<8} {'':<{width}}  -> {finding.advice}")
    counts = {state: sum(f.state == state for f in findings) for state in ("broken", "warning")}
    verdict = "a run cannot start" if counts["broken"] else "a run can start"
    return "\n".join([*lines, "", f"{verdict}: {counts['broken']} broken, {counts['warning']} warnings"])


def _run_python(code: str, output: list[str] | None = None) -> str | None:
    """Run code in a fresh interpreter with this one's path; return None, or why it failed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {IMPORT_SECONDS} s"
    if output is not None:
        output += done.stdout.splitlines()
    if done.returncode == 0:
        return None
    last = [line for line in done.stderr.splitlines() if line.strip()]
    return last[-1].strip() if last else f"exit code {done.returncode}"


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    raise SystemExit(main())
