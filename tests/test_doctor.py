import errno
import fcntl
import json
import os
import resource
import shutil
from collections import namedtuple

import pytest
import torch
from launching import ROOT, launch_ranks, run_command

from trainer import doctor
from trainer.doctor import main, render

Usage = namedtuple("Usage", "total used free")


def by_name(findings):
    return {finding.name: finding for finding in findings}


def only(findings, name):
    return by_name(findings)[name]


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Leave out what starts interpreters; return an output folder."""
    monkeypatch.setattr(doctor, "_run_python", lambda code, output=None: None)
    monkeypatch.setattr(doctor, "_WRITTEN_BYTES", 2**20)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return tmp_path


def test_a_sound_machine_can_start_a_run(quick, capsys):
    assert main(["--output-dir", str(quick / "runs")]) == 0
    text = capsys.readouterr().out
    assert "a run can start: 0 broken" in text
    for name in ("python", "torch", "gloo", "locks", "renames", "threads"):
        assert any(line.split()[:2] == ["ok", name] for line in text.splitlines()), name
    assert list(quick.iterdir()) == []


def test_json_holds_state_and_advice(quick, capsys):
    assert main(["--output-dir", str(quick), "--json"]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert found["gloo"] == {
        "name": "gloo",
        "state": "ok",
        "found": "a group of 1 process adds up",
        "advice": "",
    }


def test_one_broken_thing_makes_the_exit_code_2_and_the_rest_is_looked_at(quick, capsys, monkeypatch):
    def fails(*arguments, **settings):
        raise RuntimeError("Unable to find address for: eth9\nmore")

    monkeypatch.setattr(torch.distributed, "init_process_group", fails)
    assert main(["--output-dir", str(quick)]) == 2
    text = capsys.readouterr().out
    assert "broken   gloo" in text and "Unable to find address for: eth9" in text
    assert "-> name the network interface in GLOO_SOCKET_IFNAME" in text
    assert "a run cannot start: 1 broken" in text and "locks" in text


def test_a_check_that_fails_itself_is_a_finding(quick, monkeypatch):
    def fails():
        raise KeyError("surprise")

    monkeypatch.setattr(doctor, "check_limits", fails)
    found = only(doctor.examine(quick), "limits")
    assert found.state == "broken" and "surprise" in found.found


def test_no_process_group_is_left(quick):
    doctor.check_process_groups()
    assert not torch.distributed.is_initialized()


def test_a_missing_package_is_broken_where_needed_and_absent_where_not(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    found = by_name(doctor.check_versions())
    assert found["accelerate"].state == "broken" and found["accelerate"].advice == "make install"
    assert found["deepspeed"].state == "absent" and "ZeRO" in found["deepspeed"].advice


def test_a_compiler_that_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = by_name(doctor.check_compiler())
    assert found["c++ compiler"].state == found["ninja"].state == "warning"
    assert "install g++ or set CXX" in found["c++ compiler"].advice


def test_the_users_own_compiler_comes_first(monkeypatch):
    monkeypatch.setenv("CXX", "my-c++")
    monkeypatch.setattr(shutil, "which", lambda name: f"/opt/{name}")
    assert only(doctor.check_compiler(), "c++ compiler").found == "/opt/my-c++"


def fake_package(folder, monkeypatch, text):
    package = folder / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(text)
    (package / "pytorch.py").write_text("")
    monkeypatch.syspath_prepend(str(folder))


@pytest.mark.parametrize(
    ("text", "state", "found"),
    [
        ("", "ok", "imports"),
        (
            "raise RuntimeError('Found empty `transformer-engine` meta package installed.')",
            "warning",
            "does not import: RuntimeError: Found empty `transformer-engine` meta package",
        ),
        ("raise FileNotFoundError('no shared object')", "warning", "FileNotFoundError: no shared object"),
        ("import os; os.abort()", "warning", "does not import: exit code -6"),
    ],
    ids=["whole", "meta package alone", "no extension", "ends the process"],
)
def test_transformer_engine_is_imported_elsewhere_and_the_reason_kept(
    tmp_path, monkeypatch, text, state, found
):
    fake_package(tmp_path, monkeypatch, text)
    result = only(doctor.check_fp8(), "transformer engine")
    assert result.state == state and found in result.found


def test_transformer_engine_that_is_not_installed_is_not_imported(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "_run_python", lambda *_: pytest.fail("it was imported"))
    assert only(doctor.check_fp8(), "transformer engine").state == "absent"


@pytest.mark.parametrize(("capability", "state"), [((8, 0), "absent"), ((8, 9), "ok"), ((9, 0), "ok")])
def test_fp8_needs_a_gpu_that_has_it(monkeypatch, capability, state):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert only(doctor.check_fp8(), "fp8 device").state == state


def test_an_import_that_does_not_come_back_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 0.5)
    assert doctor._run_python("import time; time.sleep(60)") == "no answer within 0.5 s"


def test_why_there_is_no_gpu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built for the CPU" in only(doctor.check_devices(), "gpu").found
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = only(doctor.check_devices(), "gpu")
    assert hidden.state == "warning" and "CUDA_VISIBLE_DEVICES is ''" in hidden.found
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    def fails():
        raise RuntimeError("Found no NVIDIA driver on your system.\nlong text")

    monkeypatch.setattr(torch.cuda, "init", fails)
    found = only(doctor.check_devices(), "gpu").found
    assert found == "none: RuntimeError: Found no NVIDIA driver on your system."


@pytest.mark.parametrize(("free", "state"), [(130e9, "ok"), (10e9, "warning")])
def test_a_gpu_whose_memory_another_process_holds_is_named(monkeypatch, free, state):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free, 140e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    found = only(doctor.check_devices(), "gpu 0")
    assert found.state == state and "NVIDIA H200" in found.found and "of 140.0 GB free" in found.found


def test_a_folder_that_may_not_be_written_is_broken(quick, monkeypatch):
    def refuses(self, *arguments, **settings):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(doctor.Path, "mkdir", refuses)
    [found] = doctor.check_folder(quick)
    assert found.state == "broken" and "Permission denied" in found.found
    assert "choose an output_dir that you may write to" in found.advice


def test_a_file_in_the_place_of_the_folder_is_broken(quick):
    (quick / "file").write_text("")
    [found] = doctor.check_folder(quick / "file" / "runs")
    assert found.state == "broken" and "is a file" in found.found


def test_a_full_disk_is_one_fault(tmp_path, monkeypatch):
    full = doctor.Finding("writing", "broken", "No space left on device", "make room")
    monkeypatch.setattr(doctor, "_check_speed", lambda trial: full)
    assert [finding.name for finding in doctor.check_folder(tmp_path)] == ["output folder", "writing"]


def test_a_full_disk_is_named(quick, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    found = only(doctor.check_folder(quick), "writing")
    assert found.state == "broken" and found.found == "No space left on device"
    assert list(quick.iterdir()) == []


def test_little_room_is_a_warning(quick, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1e12, 0, 2e9))
    found = only(doctor.check_folder(quick), "output folder")
    assert found.state == "warning" and "2.0 GB free" in found.found


@pytest.mark.parametrize("fault", ["refused", "lets two in"])
def test_a_file_system_without_locks_is_broken(quick, monkeypatch, fault):
    def flock(file, operation):
        if fault == "refused":
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    found = only(doctor.check_folder(quick), "locks")
    assert found.state == "broken" and "flock" in found.found and "nolock" in found.advice


def test_a_file_system_that_does_not_rename_is_broken(quick, monkeypatch):
    def refuses(old, new):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "rename", refuses)
    assert only(doctor.check_folder(quick), "renames").state == "broken"


def test_a_folder_for_temporary_files_that_takes_none_is_broken(quick, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(quick))
    assert only(doctor.check_temporary_files(), "temporary files").state == "ok" and not list(quick.iterdir())
    monkeypatch.setenv("TMPDIR", str(quick / "absent"))
    found = only(doctor.check_temporary_files(), "temporary files")
    assert found.state == "broken" and "takes no files (No such file or directory)" in found.found
    assert "set TMPDIR" in found.advice


def test_few_open_files_little_shared_memory_and_many_threads_are_warnings(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64e6, 0, 64e6))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = by_name(doctor.check_limits())
    assert [found[name].state for name in ("open files", "/dev/shm", "threads")] == ["warning"] * 3
    assert "ulimit -n" in found["open files"].advice and "--shm-size" in found["/dev/shm"].advice
    assert found["threads"].found == "2 CPUs, 4 x 2 threads of torch"
    assert "OMP_NUM_THREADS=1" in found["threads"].advice


def test_deepspeed_that_does_not_import_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "_run_python", lambda code, output: "ImportError: no such symbol")
    [found] = doctor.check_deepspeed()
    assert found.state == "warning" and found.found == "fails: ImportError: no such symbol"


def test_deepspeed_is_imported_and_names_what_it_would_compile():
    [found] = doctor.check_deepspeed()
    assert found.state == "ok" and found.found.startswith("imports; ")


def test_clocks_that_are_apart_are_a_warning(monkeypatch):
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)

    def gather(parts, own):
        for index, part in enumerate(parts):
            part.copy_(own + 3.0 * index)

    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    found = doctor._compare_clocks(2)
    assert found.state == "warning" and found.found == "3.00 s apart at most" and "NTP" in found.advice


@pytest.mark.slow
def test_under_a_launcher_all_ranks_add_up_and_compare_their_clocks(tmp_path):
    arguments = ["-m", "trainer", "doctor", "--output-dir", tmp_path]
    output = launch_ranks(2, arguments, env={"PYTHONPATH": str(ROOT)}, cwd=ROOT).stdout
    assert "a group of 2 processes adds up" in output and "clocks" in output
    assert output.count("a run can start") == 1


def test_the_command_ends_with_its_exit_code(tmp_path):
    (tmp_path / "file").write_text("")
    command = ["python", "-m", "trainer", "doctor", "--output-dir", tmp_path / "file"]
    assert "a run cannot start: 1 broken" in run_command(command, expect=2).stdout


def test_advice_stands_below_its_finding():
    findings = [doctor.Finding("a", "ok", "fine"), doctor.Finding("bb", "broken", "wrong", "mend it")]
    assert render(findings).splitlines() == [
        "ok       a   fine",
        "broken   bb  wrong",
        "             -> mend it",
        "",
        "a run cannot start: 1 broken, 0 warnings",
    ]


@pytest.mark.parametrize(
    ("has_gpu", "state", "found"),
    [(False, "ok", "not needed without a GPU"), (True, "warning", "torch has no NCCL")],
)
def test_nccl_is_needed_for_several_gpus_alone(monkeypatch, has_gpu, state, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    result = doctor._check_nccl()
    assert (result.state, result.found) == (state, found)
