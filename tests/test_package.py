"""A package of AOTInductor: compiled, scored, measured, and run without this project."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from runner.common.errors import UserError
from runner.deploy import latency, package
from runner.run.folder import Run
from runner.run.schema import LatencyRow
from runner.training import checkpoint
from tests.support.configs import trusted
from tests.support.processes import TINY, python, runner

QUICK = ("--seconds", 0.05, "--repeats", 5, "--batch", 1, 4, "--device", "cpu", *TINY)


@pytest.fixture
def own(deployed_run: Path, tmp_path: Path) -> Run:
    return trusted(Path(shutil.copytree(deployed_run, tmp_path / "tiny" / "seed-0")))


@pytest.mark.every
def test_a_package_is_scored_and_measured_and_needs_no_project(own: Run, tmp_path: Path) -> None:
    refused = runner("bench", own.folder, "--backend", "aotinductor", *QUICK)
    assert refused.returncode == 2
    assert f"expected deploy/model.fp32.cpu.pt2, found none; make it: runner export {own.folder}" in refused.stderr
    done = runner("export", own.folder, "--aot-inductor", "cpu", *TINY)
    assert done.returncode == 0, done.stderr
    assert f"{own.folder}/deploy/model.fp32.cpu.pt2: " in done.stdout
    assert f"next, the gate: runner parity {own.folder} --device cpu --backend onnxruntime aotinductor" in done.stdout
    refused = runner("bench", own.folder, "--backend", "aotinductor", *QUICK)
    assert refused.returncode == 2
    assert "--backend aotinductor" in refused.stderr
    scored = runner("parity", own.folder, "--device", "cpu", *TINY)
    assert scored.returncode == 0, scored.stderr
    assert "pt2" not in scored.stdout  # it is code, which runs only when asked for
    scored = runner("parity", own.folder, "--device", "cpu", "--backend", "aotinductor", *TINY)
    assert scored.returncode == 0, scored.stderr
    assert (
        f"model.fp32.cpu.pt2 on torch {torch.__version__.partition('+')[0]} cpu: agreement 100.0000%" in scored.stdout
    )
    assert "pt2" not in runner("parity", own.folder, "--device", "cpu", *TINY).stdout
    rows = {row.backend: row for row in own.read_parity().rows}
    assert rows["aotinductor"].passed  # kept while other files were scored
    measured = runner("bench", own.folder, "--backend", "aotinductor", "eager", *QUICK)
    assert measured.returncode == 0, measured.stderr
    version = torch.__version__.partition("+")[0]
    lines = [line.rstrip() for line in measured.stdout.splitlines()]
    assert [line.endswith("*") for line in lines].count(True) == 2  # of two batch sizes
    assert any(line.startswith(f"aotinductor torch {version} cpu fp32") for line in lines)
    report = own.read_latency()
    found = {(row.backend, row.batch): row for row in report.rows if row.measured}
    assert found["aotinductor", 1].gate.passed
    assert found["aotinductor", 4].onnx_sha256 == rows["aotinductor"].onnx_sha256

    images = np.random.default_rng(0).standard_normal((3, 3, 32, 32), dtype=np.float32)
    np.save(tmp_path / "images.npy", images)
    code = (
        "import os, sys, numpy, torch\n"
        f"model = torch._inductor.aoti_load_package({str(package.path_of(own, 'cpu'))!r})\n"
        f"images = torch.from_numpy(numpy.load({str(tmp_path / 'images.npy')!r}))\n"
        "torch.set_num_threads(1)\n"
        "threads = os.listdir('/proc/self/task')\n"
        "logits = model(images)\n"
        "assert os.listdir('/proc/self/task') == threads, 'the package was compiled for more threads'\n"
        "assert not any(name.split('.')[0] in ('runner', 'tests', 'data_prep') for name in sys.modules)\n"
        "print(logits.tolist())"
    )
    alone = python("-I", "-c", code)
    assert alone.returncode == 0, alone.stderr
    with torch.no_grad():
        expected = checkpoint.load_model(own)(torch.from_numpy(images))
    torch.testing.assert_close(torch.tensor(json.loads(alone.stdout)), expected, atol=1e-4, rtol=1e-3)

    path = package.path_of(own, "cpu")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    changed = runner("parity", own.folder, "--device", "cpu", "--backend", "aotinductor", *TINY)
    assert changed.returncode == 2
    assert "model.fp32.cpu.pt2: expected SHA-256" in changed.stderr


def test_few_calls_are_marked() -> None:
    steps = {"compute": lambda: time.sleep(0.001)}
    assert latency.measure(steps, 1, 0.01, 99, "cpu")["warning"].startswith("only 99 calls")
    assert "calls" not in (latency.measure(steps, 1, 0.01, 100, "cpu")["warning"] or "")


def test_a_package_for_a_gpu_needs_one(own: Run) -> None:
    before = own.exports.stat().st_mtime_ns
    for devices, message in ((("cuda",), "cuda: expected a GPU, found none"), (("cpu", "cpu"), "expected each device")):
        done = runner("export", own.folder, "--aot-inductor", *devices, *TINY, CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 2
        assert message in done.stderr
    assert own.exports.stat().st_mtime_ns == before  # no file was written before the error


def test_a_package_of_earlier_weights_is_refused(own: Run) -> None:
    entry = {"model.fp32.cpu.pt2": {"sha256": "0" * 64, "weights": "0" * 64}}
    own.exports.write_text(json.dumps(json.loads(own.exports.read_text()) | entry))
    package.path_of(own, "cpu").write_bytes(b"")
    with pytest.raises(UserError, match="found one of earlier weights; make it: runner export"):
        package.compiled(own, "cpu")
    assert package.all_compiled(own) == []


def test_a_new_row_replaces_what_it_contradicts() -> None:
    def row(**fields: Any) -> LatencyRow:
        return LatencyRow(**{"backend": "onnxruntime", "precision": "int8", "provider": "CPU", "batch": 8} | fields)

    measured, refused = row(p50_ms=1.0), row(provider=None, batch=None, not_measured="failed the gate", refused=True)
    assert latency._replaces(refused, measured), "latencies of a file that fails the gate now"
    assert latency._replaces(measured, refused), "the reason why there was none"
    assert latency._replaces(row(p50_ms=2.0), measured)
    for other in (row(batch=1), row(provider="CUDA"), row(precision="fp32"), row(backend="eager")):
        assert not latency._replaces(other, measured)


def test_the_path_of_the_run_decides_nothing(own: Run) -> None:
    report = own.read_latency()
    assert latency._comparable_rows(own, replace(report, run="another path", load=99.0, rows=[])) == report.rows
    assert latency._comparable_rows(own, replace(report, threads=99, rows=[])) == []


def test_the_fastest_of_each_precision_and_batch_size_is_named(own: Run) -> None:
    report = own.read_latency()
    (row,) = [row for row in report.rows if (row.backend, row.batch) == ("eager", 1)]

    def variant(backend: str, precision: str, batch: int, p50: float) -> object:
        return type(row)(backend=backend, precision=precision, batch=batch, p50_ms=p50)

    rows = [
        variant("eager", "fp32", 1, 2.0), variant("onnxruntime", "fp32", 1, 1.0), variant("eager", "fp32", 8, 3.0),
        variant("onnxruntime", "fp32", 8, 4.0), variant("onnxruntime", "int8", 8, 1.0),
    ]  # fmt: skip
    fastest = type(report)(
        **{**{name: getattr(report, name) for name in report.__struct_fields__}, "rows": rows}
    ).fastest
    assert [(row.backend, row.batch) for row in fastest] == [("onnxruntime", 1), ("eager", 8)]
