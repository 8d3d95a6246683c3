"""A model repository for Triton Inference Server, checked by its published schema and used by a client."""

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image

from data_prep.sources import Source
from runner import cli
from runner.common.errors import UserError
from runner.common.files import read_json, write_json
from runner.deploy import onnx, triton
from runner.run.folder import Run
from runner.run.schema import BatchRange, EngineSidecar
from tests.conftest import Once
from tests.support.processes import ROOT, TINY, runner
from tests.support.triton_server import SCHEMA, TritonServer, read_config

GOLDEN_SIDECAR = ROOT / "tests/golden/runs/soni-2/seed-0/deploy/model.fp32.tensorrt-rtx.engine.json"


@pytest.fixture(scope="session")
def scored(once: Once, tiny_run: Path) -> Path:
    """The tiny run exported with either front end, and scored."""

    def make(folder: Path) -> None:
        run = folder / "tiny" / "seed-0"
        shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("wandb"))
        for words in (["export", run, "--raw", *TINY], ["parity", run, "--device", "cpu", *TINY]):
            done = runner(*words)
            assert done.returncode == 0, done.stderr

    return once("scored-raw", make) / "tiny" / "seed-0"


@pytest.fixture
def repository(scored: Path, tmp_path: Path) -> Path:
    done = runner("serve-repo", scored, "--out", tmp_path / "models", "--batch", 128, "--delay-us", 250)
    assert done.returncode == 0, done.stderr
    return tmp_path / "models"


@pytest.fixture
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository) as running:
        yield running


def test_the_repository_is_what_the_schema_asks_for(scored: Path, repository: Path) -> None:
    folder = repository / "tiny-seed-0"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "1/model.onnx", "config.pbtxt", "labels.txt",
    ]  # fmt: skip
    config = read_config(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("tiny-seed-0", "onnxruntime", 128)
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [
        ("pixels", SCHEMA.TYPE_UINT8, [32, 32, 3])
    ]
    assert [(one.name, one.data_type, list(one.dims), one.label_filename) for one in config.output] == [
        ("logits", SCHEMA.TYPE_FP32, [10], "labels.txt")
    ]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    assert [group.kind for group in config.instance_group] == [SCHEMA.ModelInstanceGroup.KIND_CPU]
    run = Run(scored)
    assert (folder / "labels.txt").read_text().splitlines() == run.config().dataset.classes
    assert (folder / "1/model.onnx").read_bytes() == onnx.path_of(run, "fp32", raw=True).read_bytes()


def test_any_class_name_is_quoted(scored: Path) -> None:
    _, metadata = onnx.read(onnx.path_of(Run(scored), "fp32", raw=True))
    names = ['"', "\\", "a\\n", "'", "{", "naïve 🐦"] + [str(k) for k in range(4)]
    options = triton.ServeOptions("a", "fp32", "tensorrt", "cpu", 8, 0)
    text = triton.config_text(triton.replace(metadata, classes=names), options)
    config = text_format.Parse(text, SCHEMA.ModelConfig())
    assert json.loads(config.parameters[triton.METADATA].string_value)["classes"] == names
    assert [group.kind for group in config.instance_group] == [SCHEMA.ModelInstanceGroup.KIND_GPU]


def test_a_client_gets_the_classes_that_the_file_itself_gives(
    scored: Path, server: TritonServer, source: Source, tmp_path: Path
) -> None:
    """For 1,000 test images; the server gets exactly their pixels."""
    images = source.test.images[:1000]
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(pictures / f"{number:04}.png", compress_level=1)
    file = onnx.path_of(Run(scored), "fp32", raw=True)
    here = runner("predict", file, pictures, "--json", "--batch", 128)
    there = runner("predict", "tiny-seed-0", pictures, "--json", "--batch", 128, "--server", f"{server.url}/")
    assert there.returncode == 0, there.stderr
    expected, found = (json.loads(done.stdout) for done in (here, there))
    assert len(found) == 1000
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    assert [one["probability"] for one in found] == pytest.approx([one["probability"] for one in expected], rel=1e-5)
    assert [len(pixels) for pixels in server.pixels] == [128] * 7 + [104]
    assert np.concatenate(server.pixels).tobytes() == images.tobytes()


def test_what_has_not_passed_the_gate_is_not_served(tiny_run: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(tiny_run, tmp_path / "tiny" / "own", ignore=shutil.ignore_patterns("wandb")))
    out = tmp_path / "models"
    steps = (
        (None, "own: expected deploy/model.fp32.raw.onnx, found none; make it: runner export"),
        (["export", own, "--raw", *TINY], "not scored on CPUExecutionProvider yet; first: runner parity"),
    )
    for words, reason in steps:
        assert words is None or runner(*words).returncode == 0
        done = runner("serve-repo", own, "--out", out)
        assert done.returncode == 2
        assert reason in done.stderr
    assert runner("parity", own, "--device", "cpu", *TINY).returncode == 0
    report = json.loads((own / "deploy/parity.json").read_text())
    for row in report["rows"]:
        row["passed"] = False
    (own / "deploy/parity.json").write_text(json.dumps(report))
    done = runner("serve-repo", own, "--out", out)
    assert done.returncode == 2
    assert "failed the gate on CPUExecutionProvider" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--batch", 5000), "--batch 5000: expected at most 4096"),
        (("--batch", 0), "--batch 0: expected"),
        (("--delay-us", -1), "--delay-us -1: expected"),
        (("--name", "../x"), "--name '../x': expected letters"),
        (("--name", ""), "--name"),
        (("--precision", "int8"), "expected deploy/model.int8.raw.onnx, found none"),
        (("--backend", "tensorrt"), "expected an engine of TensorRT, found none"),
        (("--backend", "tensorrt", "--device", "cuda"), "--device cuda: expected with --backend onnxruntime"),
        (("--device", "cuda"), "not scored on CUDAExecutionProvider"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_wrong_options_write_nothing(words: tuple[object, ...], reason: str, scored: Path, tmp_path: Path) -> None:
    done = runner("serve-repo", scored, "--out", tmp_path / "models", *words)
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "models").exists()


def test_a_model_is_not_replaced(scored: Path, repository: Path) -> None:
    before = (repository / "tiny-seed-0" / "config.pbtxt").read_bytes()
    done = runner("serve-repo", scored, "--out", repository)
    assert done.returncode == 2
    assert "exists; remove it, or choose another --name" in done.stderr
    assert (repository / "tiny-seed-0" / "config.pbtxt").read_bytes() == before
    assert runner("serve-repo", scored, "--out", repository, "--name", "second").returncode == 0
    assert sorted(path.name for path in repository.iterdir()) == ["second", "tiny-seed-0"]


def test_a_server_that_answers_otherwise_is_one_line(server: TritonServer, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    forward, metadata = triton.open_served(server.url, "tiny-seed-0")
    assert metadata.largest_batch == 128
    logits = forward(pixels)
    header = {"outputs": [{"name": "logits", "datatype": "FP32", "shape": [1, 10]}]}

    def answer(**changes: object) -> tuple[int, dict[str, str], bytes]:
        text = json.dumps({"outputs": [header["outputs"][0] | changes]}).encode()
        return 200, {"Inference-Header-Content-Length": str(len(text))}, text + logits.tobytes()

    server.response = answer()
    assert forward(pixels).tolist() == logits.tolist()
    for response in (
        (500, {}, b'{"error": "out of memory"}'),
        (500, {}, b"<html>"),
        (400, {}, b"[" * 100_000),
        (400, {}, b'{"error": "' + b"x" * 100_000 + b'"}'),
        (200, {"Inference-Header-Content-Length": "100000"}, b"[" * 100_000),
        (200, {}, b""),
        (200, {}, b"{}"),
        (200, {"Inference-Header-Content-Length": "x"}, b"{}"),
        (200, {"Inference-Header-Content-Length": "2"}, b"{}"),
        (200, {"Inference-Header-Content-Length": "15"}, b'{"outputs": []}'),
        answer(shape=[1, 9]),
        answer(datatype="FP16"),
        answer(name="other"),
        (200, answer()[1], answer()[2][:-4]),
        (200, answer()[1], answer()[2] + struct.pack("f", 0)),
    ):
        server.response = response
        with pytest.raises(UserError, match="/v2/models/tiny-seed-0") as raised:
            forward(pixels)
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 500
    for response in (
        (200, {}, b"[]"),
        (200, {}, b"[" * 100_000),
        (200, {}, b'{"parameters": {}}'),
        (200, {}, b"\xff"),
        (200, {}, b'{"parameters": {"runner_metadata": {"string_value": 1}}}'),
    ):
        server.response = response
        with pytest.raises(UserError, match="expected a model of runner serve-repo"):
            triton.open_served(server.url, "tiny-seed-0")
    server.response = None
    for words, reason in (
        (("tiny", "--server", server.url), "Request for unknown model: 'tiny' is not found"),
        (("a/b?c", "--server", server.url), "a%2Fb%3Fc/config: refused"),
        (("tiny-seed-0", "--server", "localhost:8000"), "--server localhost:8000: expected an address"),
        (("tiny-seed-0", "--server", "file:///etc/passwd"), "expected an address"),
        (("tiny-seed-0", "--server", "http://"), "--server http://: expected an address"),
        (("tiny-seed-0", "--server", "http://["), "--server http://[: expected an address"),
        (("tiny-seed-0", "--server", "http://127.0.0.1:1"), "no answer (["),
        (("tiny-seed-0", "--server", server.url, "--batch", 129), "--batch 129: expected at most 128"),
        (("tiny-seed-0", "--server", server.url, "--device", "cuda"), "--device cuda and --server: expected one"),
    ):
        done = runner("predict", words[0], tmp_path / "black.png", *words[1:])
        assert done.returncode == 2, done.stderr
        assert reason in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_requests_are_those_of_nvidias_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its HTTP client, whose own package needs gevent; the modules that encode do not."""
    package = ModuleType("tritonclient.http")
    package.__path__ = [str(Path(str(find_spec("tritonclient").origin)).parent / "http")]
    monkeypatch.setitem(sys.modules, "tritonclient.http", package)
    encoder = import_module("tritonclient.http._utils")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    image = import_module("tritonclient.http._infer_input").InferInput("pixels", list(pixels.shape), "UINT8")
    image.set_data_from_numpy(pixels, binary_data=True)
    logits = import_module("tritonclient.http._requested_output").InferRequestedOutput("logits", binary_data=True)
    theirs, their_length = encoder._get_inference_request([image], "", [logits], 0, False, False, 0, None, None)
    ours, our_length = triton.encode_request(pixels)
    assert json.loads(ours[:our_length]) == json.loads(theirs[:their_length])
    assert ours[our_length:] == theirs[their_length:] == pixels.tobytes()


def test_onnxruntime_on_a_gpu_computes_as_in_the_gate(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gate turns TF32 off, and Triton cannot."""
    run = Run(Path(shutil.copytree(scored, tmp_path / "tiny" / "seed-0")))
    report = run.read_parity()
    on_gpu = [msgspec.structs.replace(row, provider="CUDAExecutionProvider") for row in report.rows]
    for device, flags in (("cuda", "--gpus all -e NVIDIA_TF32_OVERRIDE=0 -p"), ("cpu", "-p")):
        write_json(run.parity, msgspec.structs.replace(report, rows=[*report.rows, *on_gpu]))
        cli.parse(["serve-repo", str(run.folder), "--out", str(tmp_path / device), "--device", device])({})
        assert f"serve: docker run --rm {flags} 8000:8000 " in capsys.readouterr().out


@pytest.mark.parametrize("compatible", [False, True])
def test_an_engine_that_passed_is_served(
    scored: Path, tmp_path: Path, compatible: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its file is not read here, so that any bytes do: only a server with its GPU can."""
    run = Run(Path(shutil.copytree(scored, tmp_path / "tiny" / "seed-0")))
    file = onnx.exported(run, "fp32", raw=True)
    engine = run.deploy / "model.fp32.raw.tensorrt.engine"
    engine.write_bytes(b"engine")
    sha256 = hashlib.sha256(b"engine").hexdigest()
    golden = read_json(GOLDEN_SIDECAR, EngineSidecar)
    sidecar = msgspec.structs.replace(
        golden, engine=f"deploy/{engine.name}", sha256=sha256, onnx=f"deploy/{file.path.name}", onnx_sha256=file.sha256,
        backend="tensorrt", version="11.4.0.106", version_compatible=compatible, batch=BatchRange(min=1, opt=8, max=64),
    )  # fmt: skip
    write_json(engine.with_name(f"{engine.name}.json"), sidecar)
    report = run.read_parity()
    (row,) = [row for row in report.rows if row.onnx == f"deploy/{file.path.name}"]
    scored_engine = msgspec.structs.replace(
        row, backend="engine", provider=sidecar.provider, engine_sha256=sha256, front_end=row.front_end
    )
    write_json(run.parity, msgspec.structs.replace(report, rows=[*report.rows, scored_engine]))
    cli.parse(["serve-repo", str(run.folder), "--out", str(tmp_path / "models"), "--backend", "tensorrt"])({})
    folder = tmp_path / "models" / "tiny-seed-0"
    assert (folder / "1/model.plan").read_bytes() == b"engine"
    config = read_config(folder)
    assert (config.backend, config.max_batch_size) == ("tensorrt", 64)
    flag = " --backend-config=tensorrt,version-compatible=true" if compatible else ""
    assert capsys.readouterr().out.splitlines() == [
        str(folder),
        f"serve: docker run --rm --gpus all -p 8000:8000 -v {tmp_path}/models:/models:ro {triton.IMAGE} tritonserver "
        f"--model-repository=/models{flag}",
        "use: runner predict tiny-seed-0 IMAGES --server http://localhost:8000",
        f"needs: TensorRT 11.4.0.106{' or later' if compatible else ''} in the container, and a GPU of compute "
        "capability not recorded",
    ]
