"""The command that fills the GPU tables: rehearsed in miniature on the CPU, and killed in every part."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args
from xml.etree import ElementTree

import pytest

from data_prep.console import UserError
from runner import environment, experiments
from runner.benchmarks import tables
from runner.benchmarks.gpu import correctness, profile, speed, tests
from runner.benchmarks.gpu.__main__ import SHARES, PartName
from runner.benchmarks.gpu.part import Context, Ledger, MissingError, OutOfTimeError
from runner.benchmarks.gpu.speedrun import AIRBENCH_ROW
from tests.conftest import ROOT, clean_environment, gone, python, ranks_of

pytestmark = pytest.mark.timeout(1800)  # the first waits for the rehearsal
PARTS = get_args(PartName)
PEER = """
import torch, time
train = torch.load("cifar10/train.pt")
assert train["images"].shape == (500, 32, 32, 3) and train["images"].dtype == torch.uint8
assert train["labels"].shape == (500,) and len(train["classes"]) == 10
print("|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |")
for run in range(200):
    print(f"|  {run}  |  1  |  0.5  |  0.6  |  |  1.0  |")
    print(f"|  |  eval  |  0.9  |  0.91  |  0.{9400 + run}  |  2.{run:02d}  |")
    time.sleep(0.01)
"""


def begun(data: Path, out: Path, peer: Path) -> subprocess.Popen[str]:
    """The rehearsal, under way."""
    words = ["-m", "runner.benchmarks.gpu", "--rehearse", "--data", data, "--out", out, "--peer", peer]
    return subprocess.Popen(
        [sys.executable, *map(str, words), "--minutes", "60"],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def found_in(out: Path) -> dict[tuple[str, str], dict]:
    """What has been measured so far, by part and name. Every file is whole, whenever it is read."""
    contents = [json.loads(path.read_text()) for path in out.glob("*-rehearsal.json")]
    return {
        (content["part"], name): one
        for content in contents
        for name, one in content["found"].items()
        if not one.keys() & {"missing", "failed"}
    }


@pytest.fixture(scope="module")
def rehearsed(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a rehearsal that was killed once in the middle of each part."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    peer = out.parent / "peer.py"
    peer.write_text(PEER)
    for part in PARTS:
        kept = found_in(out)
        with begun(small_data, out, peer) as process:
            # The first part has one finding: it is killed before that. The others after their first.
            for line in process.stdout:
                if line.startswith(f"{part}:") and part == "tests":
                    break
                if line.endswith(": done\n") and any(key[0] == part for key in found_in(out).keys() - kept.keys()):
                    break
            else:
                pytest.fail(f"over before it could be killed in {part}")
            children = ranks_of(process.pid)
            process.send_signal(signal.SIGKILL)
        assert gone(children, 30)
        assert kept.items() <= found_in(out).items(), f"lost with the kill in {part}"
    kept = found_in(out)
    with begun(small_data, out, peer) as process:
        told = process.stdout.read()
    assert process.returncode == 0, told
    assert kept.items() <= found_in(out).items()
    assert not re.search(r": (RuntimeError|\w*Error):", told), told
    return out


@pytest.mark.processes
def test_every_part_in_miniature(rehearsed: Path) -> None:
    found = found_in(rehearsed)
    assert {part for part, _ in found} == set(PARTS)
    for path in rehearsed.glob("*-rehearsal.json"):
        content = json.loads(path.read_text())
        assert not {name: one for name, one in content["found"].items() if one.keys() & {"missing", "failed"}}
        assert content["ended"]


def test_the_rehearsal_found_what_is_so(rehearsed: Path) -> None:
    found = found_in(rehearsed)
    assert sum(found["tests", "pytest"]["skipped"].values()) == 2
    assert all(found["correctness", f"batches/{kind}"]["equal_share"] == 1 for kind in correctness.AUGMENTATIONS)
    resume = found["correctness", "resume"]
    assert resume["same_weights"]
    assert 0 < resume["resumed_from"] < resume["steps"]
    assert found["correctness", "ddp/one"]["same_gradients"]
    assert found["correctness", "ddp/all"]["difference"]["most"] < 1e-3
    assert 0 < found["correctness", "losses"]["bf16"]["mean"] < 0.2
    assert found["speed", "loader"]["ratio_resident_to_torchvision"]["median"] > 1
    for name in ("podeti-resnet18", "speedrun"):
        shares = found["profile", name]["shares"]
        assert sum(shares.values()) == pytest.approx(1)
        assert next(iter(shares)) in ("convolution", "matrix product")  # the largest share is the first
        assert f"A step of {name} spends" in found["profile", name]["told"]
    assert (rehearsed / "profile.png").read_bytes().startswith(b"\x89PNG")
    together = found["speedrun", "together"]
    assert together["peer"]["trainings"] == 2
    assert together["peer"]["accuracy"] == pytest.approx(0.9401)  # the first row of each block warms up
    assert together["ours/eager"]["ratio_to_peer"]["rounds"] == 2
    (entry,) = json.loads((rehearsed / "papers-rehearsal.json").read_text())["experiments"]
    assert entry["experiment"] == "soni-2"
    parity = found["deployment", "soni-2/fp16/parity/onnxruntime"]
    assert parity["images"] == 200
    for name in ("eager", "fp32/latency/onnxruntime", "fp16/latency/onnxruntime"):
        rows = found["deployment", f"soni-2/{name}"]["rows"]
        assert [row["batch"] for row in rows if row["p50_ms"] > 0] == [1, 2]
    assert found["deployment", "soni-2/fp16/engine"]["layer_precisions"]["CONVOLUTION"].keys() == {"HALF"}


def test_a_folder_of_other_findings_is_refused(rehearsed: Path, data: Path, tmp_path: Path) -> None:
    words = ["-m", "runner.benchmarks.gpu", "--rehearse", "--out", rehearsed, "--only", "tests"]
    done = python(*words, "--data", data)
    assert done.returncode == 2
    assert "expected an --out of its own" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "found no CUDA GPU, expected one; --rehearse"),
        (["--rehearse", "--minutes", 0], "expected more than 0"),
        (["--rehearse", "--peer", "nowhere.py"], "expected a Python script"),
        (["--rehearse", "--only", "everything"], "invalid choice"),
        (["--rehearse", "--peer-row", "("], "expected a regular expression"),
        (["--rehearse", "--peer-row", "eval"], "expected the groups (?P<accuracy>"),
        (["--rehearse", "--out", __file__], "expected a folder, found a file"),
    ],
)
def test_what_cannot_be_measured_is_refused(small_data: Path, tmp_path: Path, words: list, told: str) -> None:
    if not words and environment.count_gpus():
        pytest.skip("needs a machine without a GPU")
    done = python("-m", "runner.benchmarks.gpu", "--data", small_data, "--out", tmp_path / "out", *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert not (tmp_path / "out").exists()


def ledger(small_data: Path, tmp_path: Path, seconds: float) -> Ledger:
    import time

    from data_prep import manifest

    prepared = manifest.read(small_data)
    context = Context(small_data, prepared, tmp_path, True, time.monotonic() + seconds)
    return Ledger(context, "speed")


def test_a_ledger_keeps_what_it_has(small_data: Path, tmp_path: Path) -> None:
    def fails() -> dict:
        raise ZeroDivisionError("by\nnought")

    def lacks() -> dict:
        raise MissingError("no second GPU")

    first = ledger(small_data, tmp_path, 60)
    assert first.once("good", lambda: {"figure": 1})["figure"] == 1
    assert first.once("bad", fails) is None
    assert first.once("lacking", lacks) is None
    assert first.once("package", lambda: __import__("no_such_package")) is None
    again = ledger(small_data, tmp_path, 60)
    assert again.content["found"]["bad"]["failed"] == "ZeroDivisionError: by"
    assert again.content["found"]["package"]["missing"] == "No module named 'no_such_package'"
    assert again.once("good", fails)["figure"] == 1
    assert again.once("bad", lambda: {"figure": 2})["figure"] == 2
    for figure in (1, 1, 2):
        again.once("sum", lambda figure=figure: {"figure": figure}, derived=True)
    assert again.found["sum"]["figure"] == 2
    late = ledger(small_data, tmp_path, -1)
    assert late.once("new", lambda: {"figure": 3}) is None
    assert late.content["found"]["new"]["missing"] == "out of time"
    assert late.once("sum", lambda: {"figure": 2}, derived=True)["figure"] == 2
    with pytest.raises(OutOfTimeError):
        late.context.command("-c", "import time; time.sleep(60)")


def test_shares_leave_time_for_every_part() -> None:
    left = 30.0
    minutes = {}
    for part in PARTS:
        minutes[part] = left * SHARES[part]
        left -= minutes[part]
    assert list(SHARES) == list(PARTS)
    assert min(minutes.values()) > 1


def test_one_experiment_of_each_architecture_is_measured() -> None:
    names = speed.architectures(type("Whole", (), {"scale": type("Scale", (), {"architectures": ()})}))
    known = experiments.load()
    assert names[0] == "podeti-resnet18"
    assert len({str(known[name].architecture) for name in names}) == len(names)
    assert {str(one.architecture) for one in known.values()} == {str(known[name].architecture) for name in names}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolution"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW", "normalisation"),
        ("void at::native::multi_tensor_apply_kernel<...FusedAdam", "optimizer"),
        ("nvjet_hsh_128x256_gemm", "matrix product"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copy and layout"),
        ("something_else", "other"),
    ],
)
def test_kernels_are_told_apart(kernel: str, kind: str) -> None:
    assert profile.kind_of(kernel) == kind


def test_pytests_report_is_read() -> None:
    report = """<testsuites><testsuite>
      <testcase classname="tests.a" name="good"/>
      <testcase classname="tests.a" name="red"><failure message="AssertionError: 1&#10;more"/></testcase>
      <testcase classname="tests.a" name="out"><skipped message="no NVIDIA GPU here"/></testcase>
    </testsuite></testsuites>"""
    assert tests.read(ElementTree.fromstring(report)) == {
        "passed": 1,
        "failed_tests": {"tests.a::red": "AssertionError: 1"},
        "skipped": {"no NVIDIA GPU here": 1},
    }


def test_airbenchs_row_is_read() -> None:
    found = re.search(
        AIRBENCH_ROW, "|           |     eval  |     0.9560  |   0.9342  |       0.9401  |        2.5931  |"
    )
    assert (found["accuracy"], found["seconds"]) == ("0.9401", "2.5931")


def test_the_tables_take_no_rehearsal(rehearsed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for path in rehearsed.glob("*-rehearsal.json"):
        (tmp_path / path.name.replace("rehearsal", "gpu")).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="expected measurements of a GPU, found a rehearsal"):
        tables.architectures()


def test_the_tables_are_made_of_the_findings(
    rehearsed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The rehearsal's findings, given out as a GPU's: the shape of the tables, before the day."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for path in rehearsed.glob("*-rehearsal.json"):
        content = json.loads(path.read_text())
        content["rehearsal"] = False
        content["hardware"]["gpus"] = ["A GPU"]
        for name, one in content["found"].items():
            if name.startswith("architectures/") and "peak_memory_gib" in one:
                one["peak_memory_gib"] = 1.5
        (tmp_path / path.name.replace("rehearsal", "gpu")).write_text(json.dumps(content))
    shown = {name: make() for name, make in tables.TABLES.items()}
    assert "| `soni-2` |" in shown["architectures"]
    assert "A step of podeti-resnet18 spends" in shown["profile"]
    assert "results/profile.png" in shown["profile"]
    assert "GPU tests | 0 passed, 0 failed" in shown["correctness"]
    assert "the same weights, to the bit" in shown["correctness"]
    assert re.search(r"\| ours/eager \| \d+\.\d\d% ± ", shown["speedrun"])
    assert re.search(r"\| `soni-2` \| eager \| fp32 \| 1 \| \d", shown["deployment"])
    assert "Measured on: 1 × A GPU, torch" in shown["deployment"]
    assert re.search(r"\| resident ÷ torchvision \| .* \| A \|\n", shown["ratios"])
    assert "| onnxruntime CPU |" in shown["parity"]
    for name in ("ratios", "parity"):
        assert "\n\nMeasured on: A, 1 × A GPU, torch" in shown[name]
