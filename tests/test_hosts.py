"""Two hosts without SLURM, simulated by two network namespaces with different addresses."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.run.folder import Run
from tests.support.processes import ROOT, TINY, clean_environment

ADDRESSES = {"host-a": "10.231.7.1", "host-b": "10.231.7.2"}


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    names = list(ADDRESSES)
    try:
        if not all(ip("netns", "add", name) for name in names):
            pytest.skip("needs the right to create network namespaces")
        assert ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1])
        for name, address in ADDRESSES.items():
            assert ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            assert ip("-n", name, "link", "set", name, "up")
            assert ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.every
@pytest.mark.root
@pytest.mark.processes
def test_the_two_commands_of_the_readme_train_on_two_hosts(hosts: list[str], small_data: Path, tmp_path: Path) -> None:
    running = []
    for rank, host in enumerate(hosts):
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", "launch/multi_node.yaml", "--num_machines", "2", "--num_processes", "2"]
        command += [
            "--machine_rank",
            rank,
            "--main_process_ip",
            ADDRESSES[hosts[0]],
            "--main_process_port",
            "29500",
        ]
        command += ["-m", "runner", "train", "tiny", *TINY, "--data", small_data, "--runs", tmp_path]
        running.append(
            subprocess.Popen(
                [*map(str, command), "--device", "cpu"], cwd=ROOT, text=True, stderr=subprocess.PIPE,
                env=clean_environment(GLOO_SOCKET_IFNAME=host),
            )
        )  # fmt: skip
    errors = [process.communicate(timeout=900)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    run = Run(tmp_path / "tiny" / "seed-0")
    assert run.config().world_size == 2
    assert run.read_summary().test_images == 200
