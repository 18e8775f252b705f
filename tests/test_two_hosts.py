"""Two hosts: network namespaces with a cable between them, launch.sh on each, one run folder that both see."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import ROOT, RankGroup, cpu_environment, free_port, with_forked_ranks
from running import comparable_records, newest_run, records, same_weights, toy, train_ranks, write_config

pytestmark = pytest.mark.timeout(600)

TIMEOUT_SECONDS = 20
ADDRESSES = ("10.77.0.1", "10.77.0.2")


@dataclass(frozen=True)
class Host:
    """One end of the cable."""

    rank: int
    namespace: str
    interface: str


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Say why this machine cannot make network namespaces; empty where it can."""
    if shutil.which("ip") is None:
        return "needs the command ip (iproute2)"
    name = f"cellphase-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"network namespaces are not permitted: {made.stderr.strip()}" if made.returncode else ""


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    if reason := why_not():
        pytest.skip(reason)
    mark = f"{os.getpid() % 100000}"
    both = [Host(rank, f"cellphase-{mark}-{rank}", f"cp{mark}x{rank}") for rank in (0, 1)]
    try:
        ip("link", "add", both[0].interface, "type", "veth", "peer", "name", both[1].interface)
        for host in both:
            ip("netns", "add", host.namespace)
            ip("link", "set", host.interface, "netns", host.namespace)
            ip("-n", host.namespace, "addr", "add", f"{ADDRESSES[host.rank]}/24", "dev", host.interface)
            for name in ("lo", host.interface):
                ip("-n", host.namespace, "link", "set", name, "up")
        yield both
    finally:
        for host in both:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)
            subprocess.run(["ip", "link", "del", host.interface], capture_output=True)


@contextmanager
def launched(hosts: list[Host], accelerate_config: str, config: Path) -> Iterator[list[RankGroup]]:
    """Run launch.sh on every host until the block ends."""
    port, groups = str(free_port()), []
    with ExitStack() as stack:
        for host in hosts:
            environment = with_forked_ranks(
                cpu_environment()
                | {
                    "PYTHON": sys.executable,
                    "PYTHONPATH": str(ROOT / "tests"),
                    "NODES": str(len(hosts)),
                    "NODE_RANK": str(host.rank),
                    "MASTER_ADDR": ADDRESSES[0],
                    "MASTER_PORT": port,
                    "PROCESSES_PER_NODE": "1",
                    "GLOO_SOCKET_IFNAME": host.interface,
                }
            )
            script = ["bash", str(ROOT / "launch.sh"), "--accelerate-config", accelerate_config, str(config)]
            command = ["ip", "netns", "exec", host.namespace, *script]
            groups.append(stack.enter_context(RankGroup([command], [environment], ROOT)))
        yield groups


def cut_the_cable(hosts: list[Host], groups: list[RankGroup]) -> None:
    ip("-n", hosts[1].namespace, "link", "set", hosts[1].interface, "down")


def mend_the_cable(hosts: list[Host]) -> None:
    ip("-n", hosts[1].namespace, "link", "set", hosts[1].interface, "up")


def kill_a_host(hosts: list[Host], groups: list[RankGroup]) -> None:
    groups[1].kill()


PHASE = {
    "epochs": 2,
    "save_every_steps": 4,
    "log_every_steps": 1,
    "dataloader_args": {"num_cells": 96, "seconds_per_cell": 0.02},
}
CONFIG = toy(PHASE, global_batch_size=8, distributed_timeout_seconds=TIMEOUT_SECONDS)


def run_to_the_end(hosts: list[Host], accelerate_config: str, config: Path) -> None:
    with launched(hosts, accelerate_config, config) as groups:
        for group in groups:
            group.wait(150)


def wait_for_step(group: RankGroup, step: int) -> None:
    group.wait_for(f"step {step}  ")


# A host that dies closes its connections, which any strategy is told at once; silence is what they may differ in.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("accelerate_config", "strategy", "disaster"),
    [
        ("multi_node_ddp", "ddp", cut_the_cable),
        ("multi_node_zero", "zero2", cut_the_cable),
        ("multi_node_ddp", "ddp", kill_a_host),
    ],
)
def test_a_run_on_two_hosts_survives_the_loss_of_one(hosts, tmp_path, accelerate_config, strategy, disaster):
    train_ranks(2, tmp_path / "reference", CONFIG, strategy=strategy)
    reference, config = newest_run(tmp_path / "reference"), write_config(tmp_path, CONFIG)
    with launched(hosts, accelerate_config, config) as groups:
        wait_for_step(groups[0], 6)
        disaster(hosts, groups)
        # The ranks notice in at most the timeout, and the launcher leaves them 30 seconds to end.
        assert groups[0].wait(TIMEOUT_SECONDS + 45, expect=None).returncode == 1
        groups[1].wait(TIMEOUT_SECONDS + 45, expect=None)
    folder = newest_run(tmp_path)
    assert 4 <= len(records(folder)) < 24
    mend_the_cable(hosts)
    run_to_the_end(hosts, accelerate_config, config)
    assert len(list((tmp_path / "runs").iterdir())) == 1, "the second start began another run"
    assert comparable_records(folder) == comparable_records(reference) and len(records(folder)) == 24
    assert same_weights(folder, reference)


@pytest.mark.slow
def test_a_signal_to_one_host_ends_both_with_a_checkpoint(hosts, tmp_path):
    config = write_config(tmp_path, CONFIG)
    with launched(hosts, "multi_node_ddp", config) as groups:
        wait_for_step(groups[0], 3)
        groups[1].processes[0].send_signal(signal.SIGTERM)
        for group in groups:
            group.wait(60, expect=75)
    folder = newest_run(tmp_path)
    before = len(records(folder))
    newest = (folder / "latest").read_text().strip()
    assert newest == f"checkpoint_{before}" and before < 24
