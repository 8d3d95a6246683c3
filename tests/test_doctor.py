"""`runner doctor` on this machine, and on machines with something wrong."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from runner import doctor
from tests.conftest import runner, taken_port


@pytest.mark.processes
def test_this_machine_is_well(small_data: Path, tmp_path: Path) -> None:
    done = runner("doctor", "--data", small_data, "--runs", tmp_path, "--json", WANDB_MODE="offline")
    assert done.returncode == 0, done.stdout
    found = {finding["check"]: finding for finding in json.loads(done.stdout)}
    well = ("versions", "data", "all-reduce", "onnxruntime", "tensorrt-rtx")
    assert {name: found[name]["state"] for name in well} == dict.fromkeys(well, "well")
    assert "every file has its hash" in found["data"]["found"]
    assert "agree" in found["all-reduce"]["found"]
    assert "CPUExecutionProvider" in found["onnxruntime"]["found"]
    assert found["W&B"]["state"] == "warning"
    for finding in found.values():
        assert finding["state"] == "well" or finding["remedy"]


@pytest.mark.parametrize(("free", "state"), [(9 << 30, "warning"), (11 << 30, "well")])
def test_a_disk_that_is_nearly_full_is_a_warning(
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


def test_w_and_b_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    with taken_port() as port:
        pass
    finding = doctor.w_and_b({"WANDB_BASE_URL": f"http://127.0.0.1:{port}"})
    assert finding.state == "warning"
    assert "WANDB_MODE=offline" in finding.remedy
    with taken_port() as port:
        finding = doctor.w_and_b({"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": "k"})
    assert finding.state == "well"


def test_a_folder_that_cannot_be_written_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "fsync", refuse)
    finding = doctor.disk(tmp_path / "not" / "there")
    assert finding.state == "fault"
    assert "Read-only" in finding.found


def test_one_check_that_breaks_does_not_end_the_others() -> None:
    def breaks() -> doctor.Finding:
        raise RuntimeError("unheard of")

    (finding,) = doctor._done("it", breaks)
    assert (finding.state, finding.found) == ("fault", "RuntimeError: unheard of")
