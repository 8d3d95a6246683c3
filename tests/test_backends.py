"""Which TensorRT library builds an engine, and which GPUs run it; the GPUs are simulated."""

import dataclasses
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from launch import quickstart
from launch.plan import Resources
from runner.commands import doctor
from runner.common.errors import UserError
from runner.common.files import read_json, write_json
from runner.deploy import engine_build, engine_library, engine_run, latency, parity
from runner.deploy import onnx as exporter
from runner.run.folder import Run
from runner.run.schema import EngineSidecar, LatencyRow
from runner.system import environment
from runner.system.environment import Gpu
from tests.support.configs import trusted
from tests.support.processes import ROOT, python

BOTH = ("tensorrt", "tensorrt-rtx")
NAMES = {"8.0": "A100", "8.9": "RTX 4090", "9.0": "H100", "10.0": "B200"}


@pytest.fixture
def own(deployed_run: Path, tmp_path: Path) -> Run:
    """A copy of the tiny run: exported in fp32, and built by TensorRT for RTX."""
    return trusted(shutil.copytree(deployed_run, tmp_path / "tiny" / "own"))


def use_gpu(monkeypatch: pytest.MonkeyPatch, capability: str | None) -> None:
    """Simulates a machine with one GPU, or with none."""
    gpu = Gpu(NAMES.get(capability, "GPU"), capability) if capability else None
    monkeypatch.setattr(environment, "first_gpu", lambda: gpu)


def install(monkeypatch: pytest.MonkeyPatch, *backends: str) -> None:
    """Simulates that only these libraries load."""
    for name, library in engine_library.LIBRARIES.items():
        monkeypatch.setitem(sys.modules, library.module, SimpleNamespace() if name in backends else None)


@pytest.mark.parametrize(
    ("capability", "installed", "selected"),
    [
        *((capability, BOTH, "tensorrt") for capability in ("7.5", "8.0", "8.9", "9.0", "10.0", "12.0", "13.0")),
        *((capability, ("tensorrt-rtx",), "tensorrt-rtx") for capability in ("7.5", "8.6", "8.9", "12.0", "12.1")),
        (None, BOTH, "tensorrt-rtx"),
    ],
)
def test_auto_selects_a_library_that_covers_the_gpu(
    capability: str | None, installed: tuple[str, ...], selected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpu(monkeypatch, capability)
    install(monkeypatch, *installed)
    backend, module = engine_library.select_library("auto")
    assert (backend, module) == (selected, sys.modules[engine_library.LIBRARIES[selected].module])


RTX = "7.5, 8.6, 8.9, 12.0, 12.1"


@pytest.mark.parametrize(
    ("capability", "installed", "backend", "targets", "message"),
    [
        *(
            (
                capability, ("tensorrt-rtx",), "auto", (),
                f"--backend auto: no library here builds an engine for {NAMES[capability]} (compute capability "
                f"{capability}): tensorrt does not load (import of tensorrt halted; None in sys.modules), tensorrt-rtx "
                f"covers only compute capability {RTX}; install it: pip install tensorrt-cu13",
            )
            for capability in ("8.0", "9.0", "10.0")
        ),
        (
            "9.0", BOTH, "tensorrt-rtx", (),
            f"--backend tensorrt-rtx: covers only compute capability {RTX}, found H100 (compute capability 9.0); use "
            "--backend tensorrt, or other GPUs by --target",
        ),
        (
            "7.0", BOTH, "auto", (),
            "--backend auto: no library here builds an engine for GPU (compute capability 7.0): tensorrt covers only "
            f"compute capability 7.5 and later, tensorrt-rtx covers only compute capability {RTX}; use another GPU",
        ),
        (
            None, (), "auto", (),
            "--backend auto: no library here builds an engine without a GPU: tensorrt builds only for the GPU of this "
            "machine, tensorrt-rtx does not load (import of tensorrt_rtx halted; None in sys.modules); install it: pip "
            "install tensorrt-rtx",
        ),
        (
            None, BOTH, "tensorrt", (),
            "--backend tensorrt: builds only for the GPU of this machine, found none; use --backend tensorrt-rtx",
        ),
        (
            "9.0", BOTH, "auto", ("SM89",),
            "--target SM89: expected none on H100 (compute capability 9.0), which has no target; to build for other "
            "GPUs only, add --backend tensorrt-rtx",
        ),
        (
            "8.9", BOTH, "auto", ("SM120",),
            "--target SM120: expected to include SM89 for RTX 4090 (compute capability 8.9); to build for other GPUs "
            "only, add --backend tensorrt-rtx",
        ),
        (
            None, BOTH, "auto", ("SM86", "SM80"),
            "--target SM80: expected one of tensorrt-rtx's targets (SM75, SM86, SM89, SM120, SM121)",
        ),
        (
            "9.0", BOTH, "tensorrt", ("SM89",),
            "--target SM89: expected one of tensorrt's targets (none, because it builds for the GPU of this machine)",
        ),
    ],
)  # fmt: skip
def test_what_no_library_covers_is_refused(
    capability: str | None,
    installed: tuple[str, ...],
    backend: str,
    targets: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_gpu(monkeypatch, capability)
    install(monkeypatch, *installed)
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        engine_library.select_library(backend, targets)


@pytest.mark.parametrize(
    ("capability", "backend", "targets"),
    [("9.0", "tensorrt-rtx", ("SM89",)), ("8.9", "auto", ("SM89", "SM120")), (None, "auto", ("SM75",))],
)
def test_targets_are_built_by_tensorrt_for_rtx(
    capability: str | None, backend: str, targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gpu(monkeypatch, capability)
    install(monkeypatch, *BOTH)
    assert engine_library.select_library(backend, targets)[0] == "tensorrt-rtx"


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 7 + ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "H100", size); return device != 7; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : -1;
    return device != 7;
}
"""


def test_an_engine_that_this_gpu_cannot_run_is_not_built(own: Run, tmp_path: Path) -> None:
    """The command asks a driver that has an H100."""
    source = tmp_path / "driver.c"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    before = sorted(own.deploy.iterdir())
    done = python("-m", "runner", "engine", own.folder, LD_LIBRARY_PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "--backend auto: no library here builds an engine for H100 (compute capability 9.0)" in line
    assert line.endswith("install it: pip install tensorrt-cu13")
    assert sorted(own.deploy.iterdir()) == before


@pytest.mark.parametrize(
    ("capability", "targets", "target", "capabilities"),
    [
        (None, (), "portable (8.6, 8.9, 12.0)", ["8.6", "8.9", "12.0"]),
        ("9.0", ("SM120", "SM86"), "SM120, SM86", ["8.6", "12.0"]),
        (None, ("SM121",), "SM121", ["12.1"]),
    ],
)
def test_the_sidecar_names_the_gpus(
    own: Run,
    capability: str | None,
    targets: tuple[str, ...],
    target: str,
    capabilities: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_gpu(monkeypatch, capability)
    options = engine_build.EngineOptions("tensorrt-rtx", (1, 2, 4), targets)
    sidecar = engine_build.build(own, exporter.exported(own), options)
    assert (sidecar.target, sidecar.compute_capabilities) == (target, capabilities)
    assert (sidecar.outside_matrix, sidecar.caveat) == ([], None)
    assert engine_run.verified_engines(own, exporter.exported(own)) == [sidecar]


def test_a_gpu_that_portable_engines_do_not_cover_is_a_target() -> None:
    built_for = {
        capability: engine_library.resolve_targets("tensorrt-rtx", (), Gpu("GPU", capability))
        for capability in ("7.5", "8.6")
    }
    assert built_for == {"7.5": (("SM75",), ("7.5",)), "8.6": ((), ("8.6", "8.9", "12.0"))}
    assert engine_library.resolve_targets("tensorrt", (), Gpu("H100", "9.0")) == ((), ("9.0",))


def test_int8_arithmetic_is_outside_the_matrix_of_tensorrt_for_rtx() -> None:
    precisions = {"CONVOLUTION": {"FLOAT": 1, "INT8": 3}, "MATRIX_MULTIPLY": {"FLOAT": 1}, "SHUFFLE": {"INT8": 2}}
    assert engine_build.outside_matrix("tensorrt-rtx", precisions) == ["int8 convolutions"]
    assert engine_build.outside_matrix("tensorrt", precisions) == []


def test_an_engine_that_does_not_load_here_is_not_written(own: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if environment.count_gpus():
        pytest.skip("needs a machine without a GPU")
    for path in own.deploy.glob("*.engine*"):
        path.unlink()
    use_gpu(monkeypatch, "8.9")
    with pytest.raises(UserError, match=r"model\.fp32\.onnx: tensorrt-rtx's engine does not load on this GPU: ERROR"):
        engine_build.build(own, exporter.exported(own), engine_build.EngineOptions("tensorrt-rtx", (1, 2, 4)))
    assert not list(own.deploy.glob("*.engine*"))


def test_an_engine_for_other_gpus_is_not_for_this_one(own: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed with the reason, and is an error only if engines were requested and no other one runs."""
    file = exporter.exported(own)
    (sidecar,) = engine_run.verified_engines(own, file)
    use_gpu(monkeypatch, "9.0")
    reason = (
        f"{sidecar.engine}: not for this GPU: expected compute capability 8.6 or 8.9 or 12.0, found H100 (compute "
        "capability 9.0)"
    )
    with pytest.raises(UserError, match=re.escape(f"{reason}; build one: runner engine {own.folder}")):
        engine_run.LoadedEngine(own, sidecar)
    (target,) = latency._engine_targets(own, file, "cuda")
    assert target.row.not_measured.startswith(reason)
    monkeypatch.setattr(parity, "_open_session", lambda file, device: "session")
    candidates, not_scored = parity._open_candidates(own, [file], "cuda", ())
    assert candidates == ["session"]
    assert [entry.reason.startswith(reason) for entry in not_scored] == [True]
    with pytest.raises(UserError, match="not for this GPU"):
        parity._open_candidates(own, [file], "cuda", ("engine",))
    other = replace(sidecar, compute_capabilities=["9.0"])
    monkeypatch.setattr(engine_run, "verified_engines", lambda run, file: [sidecar, other])
    monkeypatch.setattr(parity, "_open_engine", lambda run, file, opened: opened)
    candidates, not_scored = parity._open_candidates(own, [file], "cuda", ("engine",))
    assert candidates == [other]
    assert [entry.reason for entry in not_scored] == [reason]


@pytest.mark.parametrize("changed", ["nothing", "engine", "onnx", "version", "gpu"])
def test_an_engine_is_checked_before_it_is_loaded(own: Run, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT, which executes it, never gets an engine of another file, version or GPU."""
    file, loaded = exporter.exported(own), []
    (sidecar,) = engine_run.verified_engines(own, file)
    if changed in ("engine", "onnx"):
        with (own.folder / getattr(sidecar, changed)).open("ab") as opened:
            opened.write(b"x")
    elif changed == "version":
        write_json(engine_run.sidecar_of(own.folder / sidecar.engine), replace(sidecar, version="0.1"))
    use_gpu(monkeypatch, "9.0" if changed == "gpu" else "8.9")
    library = engine_library.import_library(sidecar.backend)
    runtime = SimpleNamespace(deserialize_cuda_engine=loaded.append)
    monkeypatch.setattr(library, "Runtime", lambda logger: runtime)
    message = {
        "nothing": "does not load on this GPU", "engine": "found [0-9a-f]{12}…", "onnx": "found [0-9a-f]{12}…",
        "version": "built by tensorrt-rtx 0.1, but", "gpu": "not for this GPU",
    }  # fmt: skip
    with pytest.raises(UserError, match=message[changed]):
        parity._open_candidates(own, [file], "cuda", ("engine",))
    assert len(loaded) == (1 if changed == "nothing" else 0)


def test_a_sidecar_of_an_earlier_version_is_read_and_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "tests/golden/runs/soni-2/seed-0/deploy/model.fp32.tensorrt-rtx.engine.json"
    sidecar = read_json(path, EngineSidecar)
    assert (sidecar.compute_capabilities, sidecar.outside_matrix) == ([], [])
    use_gpu(monkeypatch, "9.0")
    assert engine_run.incompatibility(sidecar) is None


def test_rows_of_a_marked_engine_say_so(monkeypatch: pytest.MonkeyPatch, own: Run, capsys) -> None:
    (sidecar,) = engine_run.verified_engines(own, exporter.exported(own))
    marked = replace(sidecar, outside_matrix=["int8 convolutions"])
    caveat = "outside NVIDIA's support matrix: int8 convolutions"
    monkeypatch.setattr(parity, "require_passed", lambda *_: own.read_parity().rows[0].gate)
    row = LatencyRow(backend="engine", precision="int8")
    target = latency._engine_target(own, exporter.exported(own), SimpleNamespace(), row, marked)
    target = dataclasses.replace(target, prepare=lambda images: latency.Call({"compute": lambda: None}))
    for figures, warning in (({}, caveat), ({"warning": "p90 is high"}, f"{caveat}; p90 is high")):
        monkeypatch.setattr(latency, "measure", lambda *_, figures=figures: {"p50_ms": 1.0, **figures})
        (measured,) = latency._measure_target(target, [3, 32, 32], latency.BenchOptions((1,)), "cpu")
        assert measured.warning == warning
    scored = replace(own.read_parity().rows[0], caveat=marked.caveat)
    assert str(scored).endswith(f", {caveat}")
    write_json(own.parity, replace(own.read_parity(), rows=[scored]))
    assert own.read_parity().rows == [scored]


@pytest.mark.parametrize(
    ("built", "compatible", "installed", "runs"),
    [
        ("11.4.0.106", False, "11.4.0.106", True),
        ("11.4.0.106", False, "11.5.0.1", False),
        ("11.4.0.106", True, "11.4.0.106", True),
        ("11.4.0.106", True, "11.5.0.1", True),
        ("11.4.0.106", True, "11.10.0.1", True),  # by number, not as text
        ("11.4.0.106", True, "11.3.9.9", False),
        ("11.4.0.106", True, "12.0.0.1", False),
        ("11.4.0.106", True, "11.4.0.105", False),
        ("10.0.0b6", True, "10.0.1", True),
        ("", True, "10.0.1", False),
    ],
)
def test_an_engine_runs_on_the_version_that_built_it_and_if_compatible_on_later_ones(
    built: str, compatible: bool, installed: str, runs: bool, own: Run
) -> None:
    (sidecar,) = engine_run.verified_engines(own, exporter.exported(own))
    sidecar = replace(sidecar, version=built, version_compatible=compatible)
    assert engine_run.runs_on(sidecar, installed) == runs


@pytest.mark.parametrize("option", [{"version_compatible": True}, {"build_route": "a"}])
def test_what_only_tensorrt_can_do_is_refused(own: Run, option: dict[str, Any]) -> None:
    options = engine_build.EngineOptions("tensorrt-rtx", **option)
    with pytest.raises(UserError, match=r"--(version-\w+|build-route): expected TensorRT, .*, found tensorrt-rtx"):
        engine_build.build(own, exporter.exported(own), options)


@pytest.mark.parametrize(
    ("text", "layers", "problem"),
    [
        ('{"Layers": [{"Name": "a"}]}', [{"Name": "a"}], None),
        ('{"Layers": [', None, "returned no valid JSON (Expecting value: line 1 column 13 (char 12))"),
        ("", None, "returned no valid JSON (Expecting value: line 1 column 1 (char 0))"),
        ("[]", None, "listed no layers"),
        ('{"Layers": {}}', None, "listed no layers"),
    ],
)
def test_a_damaged_description_of_an_engine_is_a_message(
    text: str, layers: list[Any] | None, problem: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    inspector = SimpleNamespace(get_engine_information=lambda form: text)
    context = SimpleNamespace(set_input_shape=lambda name, shape: None)
    loaded = SimpleNamespace(
        create_engine_inspector=lambda: inspector,
        create_execution_context=lambda: context,
        get_tensor_shape=lambda name: (-1, 3, 32, 32),
    )
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: loaded)
    trt = SimpleNamespace(Runtime=lambda logger: runtime, LayerInformationFormat=SimpleNamespace(JSON=1))
    log = SimpleNamespace(logger=None, lines=[])
    assert engine_build._inspect(trt, log, b"", "images", engine_build.EngineOptions(), "x.onnx: the engine") == layers
    line = f"x.onnx: the engine: the inspector {problem}, so the types of its tensors are not checked"
    assert capsys.readouterr().err == (f"runner: {line}\n" if problem else "")
    assert log.lines == ([f"WARNING: {line}"] if problem else [])
    assert engine_build.inspected_precisions([{"Outputs": None}, "a name"]) == {}


def test_the_doctor_says_what_it_has_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100 with TensorRT for RTX alone, on one with TensorRT, and on one where TensorRT does not run."""
    use_gpu(monkeypatch, "9.0")
    install(monkeypatch, "tensorrt-rtx")
    found = {finding.check: finding for finding in doctor.tensorrt()}
    assert {name: finding.state for name, finding in found.items()} == {
        "tensorrt": "warning", "tensorrt-rtx": "warning", "engines": "fault",
    }  # fmt: skip
    assert f"covers only compute capability {RTX}, found H100" in found["tensorrt-rtx"].found
    assert "pip install tensorrt-cu13" in found["engines"].found
    install(monkeypatch, *BOTH)
    smoke_test = engine_library.smoke_test

    def run(backend: str) -> engine_library.SmokeTest:
        return (
            engine_library.SmokeTest(1000, ("9.0",), environment.first_gpu())
            if backend == "tensorrt"
            else smoke_test(backend)
        )

    monkeypatch.setattr(engine_library, "smoke_test", run)
    well, _, last = doctor.tensorrt()
    assert (well.state, well.found) == (
        "well", "builds, loads and runs an engine (1,000 bytes) on H100 (compute capability 9.0)",
    )  # fmt: skip
    assert (last.check, last.state, last.found) == ("engines", "well", "--backend auto selects tensorrt")

    def fail(backend: str) -> engine_library.SmokeTest:
        raise RuntimeError("builds an engine that does not load on this GPU: no reason given\nmore")

    monkeypatch.setattr(engine_library, "smoke_test", fail)
    assert [finding.state for finding in doctor.tensorrt()] == ["fault", "fault", "well"]


def test_without_a_gpu_the_doctor_says_that_nothing_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    use_gpu(monkeypatch, None)
    found = {finding.check: finding for finding in doctor.tensorrt()}
    assert found["tensorrt"].state == "warning"
    assert re.fullmatch(
        r"builds an engine \([\d,]+ bytes\) for compute capability 8\.6, 8\.9, 12\.0; loading and running it needs "
        "such a GPU",
        found["tensorrt-rtx"].found,
    )
    assert found["engines"].found == "--backend auto selects tensorrt-rtx"


@pytest.mark.gpu
def test_a_small_engine_runs_on_a_gpu() -> None:
    try:
        backend, _ = engine_library.select_library("auto")
    except UserError as error:
        pytest.skip(str(error))
    gpu = engine_library.smoke_test(backend).gpu
    major, minor = torch.cuda.get_device_capability()
    assert gpu == environment.first_gpu() == Gpu(torch.cuda.get_device_name(), f"{major}.{minor}")


@pytest.mark.parametrize(("capability", "stages"), [("9.0", ""), ("8.9", "engine")])
def test_the_quickstart_goes_on_where_no_engine_can_be_built(
    capability: str, stages: str, own: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    use_gpu(monkeypatch, capability)
    install(monkeypatch, "tensorrt-rtx")
    pipeline = quickstart.Pipeline(quickstart.Quickstart(out=tmp_path))
    pipeline.resources = Resources(1, 2, True)
    ran = []
    monkeypatch.setattr(pipeline, "run_stage", lambda title, done, argv: ran.append(title.split()[0]))
    plan = SimpleNamespace(name="own", launcher=[], options=[], description="")
    monkeypatch.setattr(quickstart, "training_command", lambda *_: [])
    fingerprint = own.config().dataset.fingerprint
    pipeline.train_and_deploy(
        "tiny", plan, tmp_path, own.folder.parent.parent, SimpleNamespace(fingerprint=fingerprint)
    )
    assert " ".join(ran) == " ".join(filter(None, ("train export", stages, "parity bench")))
    skipped = "engine tiny (not possible here)\n  --backend auto: no library here builds an engine for H100"
    assert (skipped in capsys.readouterr().out) == (not stages)
