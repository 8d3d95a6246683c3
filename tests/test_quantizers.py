"""The comparison of int8 files by onnxruntime's quantizer and by ModelOpt, which the tests do not have."""

import shutil
import sys
from pathlib import Path

import onnx
import pytest

from runner.benchmarks import deploy, quantizers
from runner.benchmarks.quantizers import Operators, Quantizers, operators_of
from runner.common.files import read_json
from runner.config.trust import TrustedCode
from runner.deploy import precision
from runner.run.folder import Run
from runner.system import cpu
from tests.support.processes import TINY, module

CODE = TrustedCode((TINY[1],))


def test_operators_that_take_int8_values_are_counted(deployed_run: Path, small_data: Path, tmp_path: Path) -> None:
    fp32 = onnx.load(deployed_run / "deploy" / "model.fp32.onnx")
    assert not any(count.int8 for count in operators_of(fp32.graph).values())
    run = deploy.copy_of(Run(deployed_run, CODE), tmp_path)
    shutil.copytree(deployed_run / "deploy", run.deploy)
    images = precision.calibration_images(run, small_data, 32)
    int8 = onnx.load(precision.convert(run, "int8", images).path)
    counts = operators_of(int8.graph)
    assert {kind: count for kind, count in counts.items() if count.int8} == {
        "Conv": Operators(2, 2),
        "Gemm": Operators(1, 1),
    }
    assert sum(count.all for count in counts.values()) == sum(count.all for count in operators_of(fp32.graph).values())
    first = next(node for node in int8.graph.node if node.op_type == "Conv")
    first.input[0] = "images"  # its weights alone are no longer enough
    assert operators_of(int8.graph)["Conv"] == Operators(1, 2)
    on_the_cpu = operators_of(onnx.load(precision.convert(run, "int8-cpu", images).path).graph)
    assert on_the_cpu["Conv"] == Operators(2, 2)
    assert sum(count.int8 for count in on_the_cpu.values()) > 3


@pytest.mark.every
def test_a_run_is_compared_and_not_modified(
    tiny_run: Path,
    small_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but ModelOpt, which is only asked for its version."""
    python = tmp_path / "python"
    python.write_text("""#!/bin/sh\necho '{"nvidia-modelopt": "0.1"}'\n""")
    python.chmod(0o755)
    monkeypatch.setattr(quantizers, "METHODS", ())
    before = sorted(tiny_run.rglob("*"))
    out = tmp_path / "quantizers.json"
    with cpu.preserve_torch_num_threads():
        Quantizers((tiny_run,), python, small_data, calibration=32, code=CODE, json=out)()
    assert sorted(tiny_run.rglob("*")) == before
    result = read_json(out, quantizers.Result)
    assert (result.modelopt, result.calibration) == ({"nvidia-modelopt": "0.1"}, 32)
    (run,) = result.runs
    assert (run.experiment, run.seed) == ("tiny", 0)
    fp32, int8 = run.files
    assert (fp32.quantizer, int8.quantizer) == ("", "onnxruntime, minmax")
    assert (fp32.scores.agreement, fp32.scores.passed) == (1.0, True)
    assert fp32.scores.accuracy == run.eager_accuracy
    assert int8.scores.images == fp32.scores.images > 0
    assert int8.bytes < fp32.bytes
    assert [cells[4] for cells in quantizers.cells_of(run)] == ["0 of 2 Conv, 0 of 1 Gemm", "2 of 2 Conv, 1 of 1 Gemm"]
    assert "onnxruntime, minmax" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no interpreter", "expected a Python with nvidia-modelopt[onnx], found: No such file or directory; make one"),
        ("no ModelOpt", "No package metadata was found for nvidia-modelopt; make one"),
        ("no weights", "expected a checkpoint, found none"),
        ("not finished", "expected a finished run, found no summary.json"),
        ("other data", "expected the dataset of the run"),
    ],
)
def test_what_is_missing_is_one_line_and_exit_2(
    kind: str, message: str, tiny_run: Path, data: Path, small_data: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny" / "seed-0"))
    if kind == "no weights":
        shutil.rmtree(run / "checkpoints")
    if kind == "not finished":
        (run / "summary.json").unlink()
    python = sys.executable if kind == "no ModelOpt" else tmp_path / "nothing"
    folder = data if kind == "other data" else small_data
    done = module("runner.benchmarks.quantizers", run, "--modelopt", python, "--data", folder, *TINY)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
