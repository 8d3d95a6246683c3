"""`runner doctor` on this machine, and with simulated faults."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from runner.commands import doctor
from tests.support.processes import runner, taken_port


@pytest.mark.processes
def test_this_machine_has_no_faults(small_data: Path, tmp_path: Path) -> None:
    done = runner("doctor", "--data", small_data, "--runs", tmp_path, "--json", WANDB_MODE="offline")
    assert done.returncode == 0, done.stdout
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    well = ("versions", "data", "all-reduce", "onnxruntime", "tensorrt-rtx", "engines")
    assert {name: found[name]["state"] for name in well} == dict.fromkeys(well, "well")
    assert "all hashes match" in found["data"]["found"]
    assert "agree" in found["all-reduce"]["found"]
    assert "CPUExecutionProvider" in found["onnxruntime"]["found"]
    assert found["W&B"]["state"] == "warning"
    for finding in found.values():
        assert finding["state"] == "well" or finding["remedy"]


@pytest.mark.parametrize(("free", "state"), [(9 << 30, "warning"), (11 << 30, "well")])
def test_a_nearly_full_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    finding = doctor.disk(tmp_path)
    assert finding.state == state
    assert f"{free >> 30} GiB free" in finding.found


def test_damaged_data_is_a_fault_and_exit_1(own_data: Path, monkeypatch, capsys) -> None:
    path = own_data / "test.beton"
    path.write_bytes(path.read_bytes()[:-1])
    finding = doctor.dataset(own_data)
    assert finding.state == "fault"
    assert "test.beton" in finding.found
    doctor.show([finding])
    assert "python -m data_prep prepare" in capsys.readouterr().out


def test_an_unreachable_wandb_server_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with taken_port() as port:
        pass
    finding = doctor.wandb({"WANDB_BASE_URL": f"http://127.0.0.1:{port}"})
    assert finding.state == "warning"
    assert "WANDB_MODE=offline" in finding.remedy
    with taken_port() as port:
        finding = doctor.wandb({"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "k"})
    assert finding.state == "well"


def test_a_read_only_folder_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "fsync", refuse)
    finding = doctor.disk(tmp_path / "not" / "there")
    assert finding.state == "fault"
    assert "Read-only" in finding.found


def test_an_exception_in_one_check_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> doctor.Finding:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "gpus", raises)
    for slow in ("all_reduce", "onnxruntime", "tensorrt"):
        monkeypatch.setattr(doctor, slow, lambda *_, slow=slow: doctor.Finding(slow, "well", "skipped"))
    findings = doctor.examine(None, tmp_path, None, {"WANDB_MODE": "disabled"})
    names = [finding.check for finding in findings]
    assert names[:6] == ["versions", "data", "disk", "GPUs", "all_reduce", "rendezvous"]
    assert names[6:] == ["SLURM", "W&B", "onnxruntime", "tensorrt"]
    finding = findings[names.index("GPUs")]
    assert (finding.state, finding.found) == ("fault", "RuntimeError: first line")
