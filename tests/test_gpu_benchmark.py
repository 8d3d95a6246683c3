"""The GPU benchmark: rehearsed in miniature on the CPU, and killed in the middle of a part."""

import json
import re
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from xml.etree import ElementTree

import msgspec
import pytest
import torch

from data_prep import beton, manifest, sources
from data_prep.sources import Source
from runner import experiments
from runner.benchmarks import tables
from runner.benchmarks.gpu import correctness, papers, speed, speedrun, tests
from runner.benchmarks.gpu.__main__ import MIN_SECONDS, SHARES, PartName, time_for
from runner.benchmarks.gpu.context import Context, MissingError, OutOfTimeError
from runner.benchmarks.gpu.ledger import Ledger, PartResults, was_measured
from runner.benchmarks.gpu.speedrun import AIRBENCH_ROW
from runner.common.errors import UserError
from runner.common.files import read_json, write_json
from runner.system import environment
from runner.training.profile import kind_of
from tests.conftest import Once
from tests.support.processes import ROOT, Running, descendants_of, gone, module, start, wait_until

pytestmark = pytest.mark.timeout(5400)  # the first waits for the rehearsal
PARTS = get_args(PartName)
IMAGES = {"train": 200, "test": 100}  # of the rehearsal's dataset
# The line after which each part is killed. Parts with a single finding are killed while they measure it.
KILLED_AFTER = dict.fromkeys(PARTS, "  .*: done")
KILLED_AFTER |= {"tests": "tests: .*", "correctness": "  losses/fp32: done", "papers": "papers: .*"}
PEER = """
import time
from pathlib import Path
from types import SimpleNamespace
assert all(Path("cifar10", f"{split}.pt").stat().st_size for split in ("train", "test"))
print("|  run     |  epoch  |  train_acc  |  val_acc  |  tta_val_acc  |  time_seconds  |")
for run in range(200):
    print(f"|  {run}  |  1  |  0.5  |  0.6  |  |  1.0  |")
    print(f"|  |  eval  |  0.9  |  0.91  |  0.{9400 + run}  |  2.{run:02d}  |")
    time.sleep(0.01)
"""


def start_rehearsal(data: Path, out: Path) -> Running:
    """Starts the rehearsal."""
    peer = out.parent / "peer.py"
    peer.write_text(PEER)
    words = ["--rehearse", "--data", data, "--out", out, "--peer", peer, "--minutes", 60]
    return start("runner.benchmarks.gpu", *words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def measured_in(out: Path) -> dict[tuple[str, str], dict]:
    """What has been measured so far, by part and name. Every file is complete whenever it is read."""
    return {
        (content.part, name): finding
        for content in (read_json(path, PartResults) for path in out.glob("*-rehearsal.json"))
        for name, finding in content.findings.items()
        if was_measured(finding)
    }


def kill_in(part: str, data: Path, out: Path) -> None:
    """Kills a rehearsal in the middle of a part. Earlier findings stay, and its child processes end."""
    before, reached = measured_in(out), False
    with start_rehearsal(data, out) as process:
        for line in process.stdout:
            reached |= line.startswith(f"{part}: ")
            if reached and re.fullmatch(KILLED_AFTER[part], line.rstrip("\n")):
                break
        else:
            pytest.fail(f"ended before it could be killed in {part}")
        if part in ("tests", "papers"):  # the part's process and its child
            wait_until(lambda: len(descendants_of(process.pid)) > 1, running=process)
        children = descendants_of(process.pid)
        process.send_signal(signal.SIGKILL)
    assert children
    assert gone(children, 30)
    measured = measured_in(out)
    assert before.items() <= measured.items()
    assert (part in ("tests", "papers")) != any(name == part for name, _ in measured)


def resume(data: Path, out: Path) -> None:
    """Runs the same command to the end; earlier findings are unchanged."""
    before = measured_in(out)
    with start_rehearsal(data, out) as process:
        output = process.stdout.read()
    assert process.returncode == 0, output
    assert before.items() <= measured_in(out).items()
    assert not re.search(r": (RuntimeError|\w*Error):", output), output


@pytest.fixture(scope="module")
def images(once: Once, small: Source) -> Path:
    """A dataset with a few images of each class."""
    train, test = (sources.limit_split(getattr(small, split), count // 10) for split, count in IMAGES.items())
    few = replace(small, train=train, test=test)
    return once("rehearsal", lambda folder: beton.write(few, folder / "data")) / "data"


@pytest.fixture(scope="module")
def rehearsed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a rehearsal that was killed once in each part."""
    out = tmp_path_factory.mktemp("gpu") / "out"
    for part in PARTS:
        kill_in(part, images, out)
    resume(images, out)
    return out


@pytest.mark.every
@pytest.mark.processes
def test_a_kill_in_any_part_loses_nothing(rehearsed: Path) -> None:
    """`rehearsed` compares the findings before and after each kill; at the end, every part is complete."""
    assert {part for part, _ in measured_in(rehearsed)} == set(PARTS)
    for path in rehearsed.glob("*-rehearsal.json"):
        content = read_json(path, PartResults)
        assert not {name: finding for name, finding in content.findings.items() if not was_measured(finding)}
        assert content.ended


@pytest.mark.every
def test_the_findings_of_the_rehearsal(rehearsed: Path) -> None:
    found = measured_in(rehearsed)
    (report,) = (finding for (part, _), finding in found.items() if part == "tests")
    assert report["failed_tests"] == {}
    assert report["passed"] + sum(report["skipped"].values()) > 0
    assert environment.count_gpus() or report["skipped"].keys() == {"no NVIDIA GPU here"}
    assert all(found["correctness", f"batches/{kind}"]["equal_share"] == 1 for kind in correctness.AUGMENTATIONS)
    resumed = found["correctness", "resume"]
    assert resumed["same_weights"]
    assert 0 < resumed["resumed_from"] < resumed["steps"]
    assert found["correctness", "ddp/one"]["same_gradients"]
    assert found["correctness", "ddp/all"]["difference"]["most"] < 1e-3
    assert 0 < found["correctness", "losses"]["bf16"]["mean"] < 0.2
    assert found["speed", "loader"]["ratio_resident_to_torchvision"]["median"] > 1
    for name in ("podeti-resnet18", "speedrun"):
        shares = found["profile", name]["shares"]
        assert sum(shares.values()) == pytest.approx(1)
        assert next(iter(shares)) in ("convolution", "matrix product")  # the largest share is the first
        assert f"A step of {name} spends" in found["profile", name]["summary"]
    assert (rehearsed / "profile.png").read_bytes().startswith(b"\x89PNG")
    together = found["speedrun", "together"]
    assert together["peer"]["trainings"] == 2
    assert together["peer"]["accuracy"] == pytest.approx(0.9401)  # the first row of each block warms up
    assert together["ours/eager"]["ratio_to_peer"]["rounds"] == 2
    for split, count in IMAGES.items():
        written = torch.load(rehearsed / "peer" / "cifar10" / f"{split}.pt")
        assert written["images"].shape == (count, 32, 32, 3)
        assert written["images"].dtype == torch.uint8
        assert written["labels"].shape == (count,)
        assert len(written["classes"]) == 10
    (outcome,) = read_json(rehearsed / "papers-rehearsal.json", PartResults).experiments
    assert outcome["experiment"] == "soni-2"
    parity = found["deployment", "soni-2/fp16/parity/onnxruntime"]
    assert parity["images"] == IMAGES["test"]
    for name in ("eager", "fp16/latency/onnxruntime"):
        rows = found["deployment", f"soni-2/{name}"]["rows"]
        assert [row["batch"] for row in rows if row["p50_ms"] > 0] == [1, 2]
    assert found["deployment", "soni-2/fp16/engine"]["layer_precisions"]["CONVOLUTION"].keys() == {"HALF"}


@pytest.mark.every
def test_a_folder_with_findings_of_another_dataset_is_rejected(rehearsed: Path, small_data: Path) -> None:
    words = ["--rehearse", "--out", rehearsed, "--only", "tests", "--data", small_data]
    done = module("runner.benchmarks.gpu", *words)
    assert done.returncode == 2
    assert "choose another --out" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "found no CUDA GPU, expected one; --rehearse"),
        (["--rehearse", "--peer", "nowhere.py"], "expected a Python script"),
        (["--rehearse", "--peer-row", "("], "expected a regular expression"),
        (["--rehearse", "--peer-row", "eval"], "expected the groups (?P<accuracy>"),
        (["--rehearse", "--peer-row", "(?P<accuracy>.)(?P<seconds>.)"], "expected with --peer"),
        (["--rehearse", "--out", __file__], "expected a folder, found a file"),
    ],
)
def test_invalid_options_exit_2(small_data: Path, tmp_path: Path, words: list, message: str) -> None:
    if not words and environment.count_gpus():
        pytest.skip("needs a machine without a GPU")
    out = [] if "--out" in words else ["--out", tmp_path / "out"]
    done = module("runner.benchmarks.gpu", "--data", small_data, *out, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def ledger(small_data: Path, tmp_path: Path, seconds: float) -> Ledger:
    prepared = manifest.read(small_data)
    context = Context(small_data, prepared, tmp_path, True, time.monotonic() + seconds)
    return Ledger(context, "speed")


def test_a_ledger_measures_once_and_retries_what_failed(
    small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> dict:
        raise ZeroDivisionError("by\nzero")

    def lacks() -> dict:
        raise MissingError("no second GPU")

    first = ledger(small_data, tmp_path, 60)
    assert first.once("good", lambda: {"figure": 1})["figure"] == 1
    assert first.once("bad", fails) is None
    assert first.once("lacking", lacks) is None
    assert first.once("package", lambda: __import__("no_such_package")) is None
    again = ledger(small_data, tmp_path, 60)
    assert again.file.findings["bad"]["failed"] == "ZeroDivisionError: by"
    assert again.file.findings["package"]["missing"] == "No module named 'no_such_package'"
    assert again.once("good", fails)["figure"] == 1
    assert again.once("bad", lambda: {"figure": 2})["figure"] == 2
    for figure in (1, 1, 2):
        again.once("sum", lambda figure=figure: {"figure": figure}, remeasure=True)
    assert again.measured["sum"]["figure"] == 2
    assert again.once("sum", fails, remeasure=True)["figure"] == 2  # an error replaces no measurement
    assert "sum: ZeroDivisionError: by" in capsys.readouterr().out
    again.once("parts", lambda: {"a": 1, "b": 2}, remeasure=True)
    assert "b" not in again.once("parts", lambda: {"a": 1}, remeasure=True)

    def breaks_the_gpu() -> dict:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(SystemExit, match="can no longer use the GPU"):
        again.once("sum", breaks_the_gpu, remeasure=True)
    again.once("broken", fails)
    late = ledger(small_data, tmp_path, -1)
    assert late.once("new", lambda: {"figure": 3}) is None
    assert late.file.findings["new"]["missing"] == "out of time"
    assert late.once("broken", lambda: {"figure": 4}) is None
    assert late.file.findings["broken"]["failed"] == "ZeroDivisionError: by"  # which says more

    overrun = ledger(small_data, tmp_path, 60)

    def fails_late() -> dict:
        object.__setattr__(overrun.context, "deadline", time.monotonic())  # the time was up meanwhile
        raise MemoryError("of another kind")

    assert overrun.once("broken", fails_late) is None
    assert overrun.file.findings["broken"]["failed"] == "MemoryError: of another kind"
    assert late.once("sum", lambda: {"figure": 2}, remeasure=True)["figure"] == 2
    with pytest.raises(OutOfTimeError):
        late.context.run_python("-c", "import time; time.sleep(60)")


def test_ratios_measured_before_the_time_was_up_are_kept(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, rounds = ledger(small_data, tmp_path, 60).context, []

    def run_python(self: Context, *argv: object) -> str:
        if rounds:
            write_json(Path(argv[argv.index("--json") + 1]), {"ratio": rounds.pop(), "hardware": {}})
        raise OutOfTimeError

    monkeypatch.setattr(Context, "run_python", run_python)
    rounds.append({"median": 1.0, "rounds": 1})
    assert speed.run_benchmark(context, "overhead") == {"ratio": {"median": 1.0, "rounds": 1}, "partial": True}
    with pytest.raises(OutOfTimeError):  # not the ratios of the first call
        speed.run_benchmark(context, "overhead")


def test_what_was_measured_in_part_is_measured_again_when_there_is_time(small_data: Path, tmp_path: Path) -> None:
    first = ledger(small_data, tmp_path, 60)
    first.once("overhead", lambda: {"rounds": 1, "partial": True})
    first.file.ended = True
    first.write()
    assert not first.complete
    late = ledger(small_data, tmp_path, -1)
    assert late.once("overhead", lambda: {"rounds": 7})["rounds"] == 1
    again = ledger(small_data, tmp_path, 60)
    assert again.once("overhead", lambda: {"rounds": 7})["rounds"] == 7
    assert again.complete


def test_findings_of_another_gpu_or_commit_are_refused(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = manifest.read(small_data)

    def opened(commit: str) -> Ledger:
        later = time.monotonic() + 60
        return Ledger(Context(small_data, prepared, tmp_path, True, later, commit=commit), "speed")

    opened("one").once("figure", lambda: {"figure": 1})
    assert opened("one").measured["figure"]["figure"] == 1
    with pytest.raises(UserError, match="expected results with commit two, found one; choose another --out"):
        opened("two")
    hardware = msgspec.structs.replace(environment.describe_hardware(), gpus=["NVIDIA B200"])
    monkeypatch.setattr(environment, "describe_hardware", lambda: hardware)
    with pytest.raises(UserError, match=r"expected results with hardware .*B200"):
        opened("one")


def test_experiments_are_trained_by_predicted_seconds() -> None:
    known = experiments.load()
    images = 50_000
    assert papers.predicted_seconds(known["speedrun"], images) < papers.predicted_seconds(
        known["podeti-resnet18"], images
    )
    twice = papers.predicted_seconds(known["podeti-resnet18"], 2 * images)
    assert twice == pytest.approx(2 * papers.predicted_seconds(known["podeti-resnet18"], images))


@pytest.mark.parametrize("minutes", [9, 30, 60])
def test_every_part_has_time_in_one_call_or_in_several(minutes: int) -> None:
    """A call skips the parts that are complete, so that pieces of nine minutes reach the last part."""
    assert list(SHARES) == list(PARTS)
    parts = list(PARTS)
    while parts:
        left, seconds = 60.0 * minutes, []
        for part in parts:
            seconds.append(time_for(part, left, part == parts[-1]))
            left -= seconds[-1]
        assert sum(seconds) <= 60 * minutes
        assert seconds[0] >= MIN_SECONDS
        parts = parts[sum(time >= MIN_SECONDS for time in seconds) :]


def test_a_series_of_seeds_keeps_those_for_which_there_was_time(monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter([1.0, 1.0, -1.0])
    trained = []

    class Trained:
        recipe = SimpleNamespace(epochs=8)

        def __init__(self, context: Any, mode: str) -> None: ...

        def __call__(self, seed: int) -> tuple[float, float]:
            trained.append(seed)
            return 2.0, 0.9

    monkeypatch.setattr(speedrun, "SpeedRun", Trained)
    found = speedrun.run_seeds(SimpleNamespace(seconds_left=lambda: next(left)), range(5), "eager")
    assert trained == [speedrun.WARMUP_SEED, 0, 1]
    assert (found["seeds"], found["seconds"], found["accuracy"]) == ([0, 1], [2.0, 2.0], [0.9, 0.9])
    with pytest.raises(OutOfTimeError):
        speedrun.run_seeds(SimpleNamespace(seconds_left=lambda: -1.0), range(5), "eager")


def test_one_experiment_of_each_architecture_is_measured() -> None:
    names = speed.one_experiment_per_architecture(SimpleNamespace(scale=SimpleNamespace(step_experiments=())))
    known = experiments.load()
    assert names[0] == "podeti-resnet18"
    assert len({str(known[name].architecture) for name in names}) == len(names)
    assert {str(one.architecture) for one in known.values()} == {str(known[name].architecture) for name in names}


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32", "convolution"),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW", "normalization"),
        ("void at::native::multi_tensor_apply_kernel<...FusedAdam", "optimizer"),
        ("nvjet_hsh_128x256_gemm", "matrix product"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copy and layout"),
        ("something_else", "other"),
    ],
)
def test_the_kind_of_a_kernel(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


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


@pytest.mark.every
def test_the_tables_take_no_rehearsal(rehearsed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for path in rehearsed.glob("*-rehearsal.json"):
        (tmp_path / path.name.replace("rehearsal", "gpu")).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="expected measurements of a GPU, found a rehearsal"):
        tables.training_speeds()


@pytest.mark.every
def test_the_tables_are_made_of_the_findings(rehearsed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rehearsal's findings are relabeled as a GPU's."""
    shutil.copy(tables.RESULTS / "muon-gpu.json", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    for path in rehearsed.glob("*-rehearsal.json"):
        content = json.loads(path.read_text())
        content["rehearsal"] = False
        content["hardware"]["gpus"] = ["A GPU"]
        for name, one in content["found"].items():
            if name.startswith("architectures/") and "peak_memory_gib" in one:
                one["peak_memory_gib"] = 1.5
        (tmp_path / path.name.replace("rehearsal", "gpu")).write_text(json.dumps(content))
    shown = {name: make() for document in tables.TABLES.values() for name, make in document.items()}
    assert "| `soni-2` |" in shown["architectures"]
    assert "A step of podeti-resnet18 spends" in shown["profile"]
    assert "results/profile.png" in shown["profile"]
    assert "GPU tests | 0 passed, 0 failed" in shown["correctness"]
    assert "bit-identical weights" in shown["correctness"]
    assert re.search(r"\| ours/eager \| \d+\.\d\d% ± ", shown["speedrun"])
    assert re.search(r"\| `soni-2` \| eager \| fp32 \| 1 \| \d", shown["deployment"])
    assert "Measured on: 1 × A GPU, torch" in shown["deployment"]
    assert re.search(r"\| resident ÷ torchvision \| .* \| A \|\n", shown["ratios"])
    assert "| onnxruntime CPU |" in shown["parity"]
    for name in ("ratios", "parity"):
        assert "\n\nMeasured on: A, 1 × A GPU, torch" in shown[name]


def test_evidence_is_refused_without_a_gpu_before_anything_is_installed(tmp_path: Path) -> None:
    """In a copy without an environment, which would be created first."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", copy / "launch")
    program = copy / "bin" / "nvidia-smi"  # as with a driver, but without a GPU
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    path = f"{program.parent}:/usr/bin:/bin"
    environ = {"PATH": path, "HOME": str(tmp_path), "RUNNER_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([copy / "launch/gpu-evidence"], env=environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("launch/gpu-evidence: expected an NVIDIA GPU, found none")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkout"]
