"""ONNX, engine and latency of every architecture, each with its proof."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from data_prep import manifest
from data_prep.console import UserError, sha256_of
from runner import checkpoint, experiments
from runner.batches.protocol import model_input
from runner.deploy import engine, latency, parity, session
from runner.deploy import onnx as exporter
from runner.recipe import to_json
from runner.runs import Run, write_json
from tests.conftest import runner


def untrained(name: str, data: Path, folder: Path) -> Run:
    """A run folder with random weights, whose batch norm has seen some images."""
    experiment = experiments.get(name)
    prepared = manifest.read(data)
    run = Run(folder / name / "seed-0")
    dataset = {
        key: getattr(prepared, key) for key in ("name", "fingerprint", "classes", "mean", "std", "image_shape")
    }
    write_json(
        run.record,
        {
            "experiment": name,
            "run": "seed-0",
            "architecture": to_json(experiment.architecture),
            "recipe": to_json(experiment.recipe),
            "dataset": {**dataset, "folder": str(data)},
            "input": model_input(prepared, experiment.recipe),
            "git": {},
        },
    )
    torch.manual_seed(0)
    model = experiment.architecture.build()
    model(torch.randn(16 if experiment.recipe.resize else 64, *model_input(prepared, experiment.recipe)["shape"]))
    checkpoint.save(run, model.state_dict(), 0)
    return run


# One experiment of each architecture; those of one differ in depth, optimizer or epochs.
ARCHITECTURES = {e.architecture.factory: name for name, e in experiments.load().items()}


def shape_of(run: Run) -> list[int]:
    """(3, H, W) of an image."""
    return run.config()["input"]["shape"]


@pytest.fixture(scope="module", params=list(ARCHITECTURES.values()))
def exported(request: pytest.FixtureRequest, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = untrained(request.param, small_data, tmp_path_factory.mktemp("deploy"))
    exporter.export(run)
    return run


def test_onnx_agrees_with_the_model(exported: Run) -> None:
    path, _ = exporter.exported(exported)
    report = parity.compare(exported, path, None)
    assert report["passed"]
    assert report["agreement"] == 1
    assert report["images"] == 200
    assert report["largest_logit_difference"] < 1e-4
    assert report["provider"] == "CPUExecutionProvider"


@pytest.mark.parametrize("batch", [1, 7, 30])
def test_onnx_takes_any_batch(exported: Run, batch: int) -> None:
    path, _ = exporter.exported(exported)
    images = torch.randn(batch, *shape_of(exported))
    with torch.no_grad():
        expected = checkpoint.load_model(exported)(images).numpy()
    np.testing.assert_allclose(session.Session(path)(images.numpy()), expected, atol=1e-4)


def test_onnx_is_one_file_that_explains_itself(exported: Run, small_data: Path) -> None:
    path, _ = exporter.exported(exported)
    assert [file.name for file in path.parent.iterdir() if "onnx" in file.name] == ["model.onnx"]
    model = onnx.load(path, load_external_data=False)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    prepared = manifest.read(small_data)
    assert metadata["classes"] == list(prepared.classes)
    assert metadata["mean"] == exported.config()["input"]["mean"]
    assert metadata["dataset"]["fingerprint"] == prepared.fingerprint
    assert (model.graph.input[0].name, model.graph.output[0].name) == ("images", "logits")


def test_a_real_engine_is_built(exported: Run) -> None:
    sidecar = engine.build(exported, "tensorrt-rtx", (1, 64, 256), None)
    file = exported.folder / sidecar["engine"]
    parameters = experiments.get(exported.config()["experiment"]).parameters
    assert file.stat().st_size == sidecar["bytes"] > 3.9 * parameters  # fp32 weights are in it
    assert sidecar["backend"] == "tensorrt-rtx"
    assert sidecar["onnx_sha256"] == sha256_of(exported.deploy / "model.onnx")
    assert set(sidecar["layer_output_types"]["CONVOLUTION"]) == {"FLOAT"}
    assert sidecar["batch"] == {"min": 1, "opt": 64, "max": 256}
    assert sidecar["dataset"] == exported.config()["dataset"]["name"]
    assert engine.check_sidecar(exported) == sidecar


def test_a_target_is_written_down(exported: Run) -> None:
    assert engine.build(exported, "tensorrt-rtx", (1, 8, 16), "SM89")["target"] == "SM89"


@pytest.fixture
def own(tiny_run: Path, tmp_path: Path) -> Run:
    """A copy of the finished tiny run, exported."""
    run = Run(Path(shutil.copytree(tiny_run, tmp_path / "tiny" / "own")))
    exporter.export(run)
    return run


def test_the_gate_fails_for_other_weights(own: Run) -> None:
    path, _ = exporter.exported(own)
    model = onnx.load(path)
    weights = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 4)
    spoiled = onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weights), weights.name)
    weights.CopyFrom(spoiled)
    onnx.save(model, path)
    report = parity.compare(own, path, None)
    assert not report["passed"]
    assert report["agreement"] < 0.9999


def test_commands_print_only_json(own: Run) -> None:
    report = json.loads(runner("export", own.folder, "--json").stdout)
    assert report["passed"]
    sidecar = json.loads(runner("engine", own.folder, "--json", "--batch", 1, 2, 4).stdout)
    assert sidecar["batch"]["max"] == 4
    done = runner("bench", own.folder, "--json", "--batch", 1, 3, "--seconds", 0.05, "--repeats", 20)
    result = json.loads(done.stdout)
    measured = [row for row in result["rows"] if "p50_ms" in row]
    assert [(row["backend"], row["batch"]) for row in measured] == [
        ("eager", 1), ("onnxruntime", 1), ("eager", 3), ("onnxruntime", 3),
    ]  # fmt: skip
    for row in measured:
        assert 0 < row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["calls"] >= 20
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["p50_ms"])
    assert result["hardware"]["cores"] >= 1
    if result["device"] == "cpu":
        assert result["rows"][-1]["not_measured"].startswith("an engine runs on a GPU")


@pytest.mark.parametrize("what", ["engine", "onnx"])
def test_an_engine_that_the_sidecar_does_not_speak_of_is_refused(own: Run, what: str) -> None:
    sidecar = engine.build(own, "tensorrt-rtx", (1, 2, 4), None)
    with (own.folder / sidecar[what]).open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"not the file that .* speaks of"):
        engine.check_sidecar(own)


def test_what_cannot_be_built_is_one_line(own: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--batch 8 4 16"):
        engine.build(own, "tensorrt-rtx", (8, 4, 16), None)
    with pytest.raises(UserError, match="--target SM12345: expected one"):
        engine.build(own, "tensorrt-rtx", (1, 2, 4), "SM12345")
    (own.deploy / "model.onnx").unlink()
    with pytest.raises(UserError, match="make it: runner export"):
        engine.build(own, "auto", (1, 2, 4), None)
    with pytest.raises(UserError, match="make it: runner export"):
        latency.bench(own, (1,), 0.1, 1, "cpu", {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_nothing_falls_back_to_the_cpu(own: Run) -> None:
    with pytest.raises(session.ProviderError, match="asked onnxruntime for CUDAExecutionProvider"):
        session.Session(own.deploy / "model.onnx", "cuda")
    done = runner("bench", own.folder, "--device", "cuda")
    assert done.returncode == 2
    assert "--device cuda means 1 CUDA GPU(s) on this node, found 0" in done.stderr
    with pytest.raises(UserError, match="--backend tensorrt"):
        engine.load("tensorrt")


@pytest.mark.gpu
def test_the_engine_runs_on_a_gpu(own: Run) -> None:
    sidecar = engine.build(own, "auto", (1, 32, 64), None)
    running = engine.RunningEngine(own, sidecar)
    images = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        expected = checkpoint.load_model(own)(images)
    torch.testing.assert_close(running(images.cuda()).cpu(), expected, atol=1e-2, rtol=1e-2)
