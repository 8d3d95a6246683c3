"""Writes a model repository for Triton Inference Server, and runs a model on such a server.

REPO/NAME/config.pbtxt   input, output, batching, and the metadata that a client needs
REPO/NAME/labels.txt     a class name per line
REPO/NAME/1/model.onnx   or model.plan, an engine

The model takes decoded pixels (batch, H, W, 3) uint8 and returns logits (batch, classes) float32.
"""

import hashlib
import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from msgspec.structs import replace

from runner.common import files
from runner.common.errors import UserError
from runner.common.text import first_line, without_controls
from runner.deploy import engine_run, onnx, parity
from runner.deploy.onnx import OUTPUT, RAW_INPUT, OnnxFile
from runner.deploy.session import PROVIDERS
from runner.run.folder import Run
from runner.run.schema import EngineSidecar, OnnxMetadata, Precision

IMAGE = "nvcr.io/nvidia/tritonserver:26.05-py3"
METADATA = "runner_metadata"  # the parameter with the metadata of the ONNX file, as JSON
HEADER_LENGTH = "Inference-Header-Content-Length"
REQUEST_SECONDS = 60
LARGEST_RESPONSE = 64 << 20  # bytes
Backend = Literal["onnxruntime", "tensorrt"]


@dataclass(frozen=True)
class ServeOptions:
    """What the server runs, and how it forms batches.

    Attributes:
        name: name of the model on the server, which is also that of its folder.
        precision: precision of the exported file.
        backend: Triton's backend: of the ONNX file, or of the engine that was built from it.
        device: device that onnxruntime runs on, on which the file must have passed the gate.
        batch: largest batch that the server forms.
        delay_us: how long the server waits for more images to fill a batch, in microseconds.
    """

    name: str
    precision: Precision
    backend: Backend
    device: Literal["cpu", "cuda"]
    batch: int
    delay_us: int

    @property
    def on_cpu(self) -> bool:
        """Whether the server needs no GPU."""
        return self.backend == "onnxruntime" and self.device == "cpu"


def write_repository(run: Run, repository: Path, options: ServeOptions) -> tuple[Path, EngineSidecar | None]:
    """Adds a run's model to a model repository.

    Returns:
        The model's folder, which appears only when it is complete, and the sidecar of the engine that is served.

    Raises:
        UserError: no file or engine with uint8 input has passed the gate, the batch is too large for it, or the
            repository has a model of this name.
    """
    folder = repository / options.name
    if folder.exists():
        raise UserError(f"{folder}: exists; remove it, or choose another --name")
    file = onnx.exported(run, options.precision, raw=True)
    _, metadata = onnx.read(file.path)
    sidecar = None
    if options.backend == "tensorrt":
        sidecar = _engine_of(run, file, options.batch)
        model, sha256, target = run.folder / sidecar.engine, sidecar.sha256, "model.plan"
    else:
        parity.require_passed(run, file, PROVIDERS[options.device])
        model, sha256, target = file.path, file.sha256, "model.onnx"
    if options.batch > metadata.largest_batch:
        raise UserError(f"--batch {options.batch}: expected at most {metadata.largest_batch}, the limit of {model}")
    content = model.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{model}: changed since it passed the gate; export and score it again")
    staging = repository / f".{options.name}.writing-{os.getpid()}"
    try:
        staging.joinpath("1").mkdir(parents=True)
        files.write_atomically(staging / "1" / target, content)
        labels = "".join(f"{' '.join(name.split())}\n" for name in metadata.classes)
        files.write_atomically(staging / "labels.txt", labels.encode())
        served = replace(metadata, largest_batch=options.batch)
        files.write_atomically(staging / "config.pbtxt", config_text(served, options).encode())
        staging.rename(folder)
    except OSError as error:
        raise UserError(f"{repository}: cannot write there ({error.strerror}); choose another --out") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder, sidecar


def _engine_of(run: Run, file: OnnxFile, batch: int) -> EngineSidecar:
    """Returns the engine of a file, if Triton can load it and it has passed the gate. Raises UserError."""
    sidecars = engine_run.verified_engines(run, file)
    build = f"runner engine {run.folder} --precision {file.precision} --backend tensorrt --raw"
    for sidecar in sidecars:
        if sidecar.backend == "tensorrt":
            parity.require_passed(run, file, sidecar.provider, sidecar.sha256)
            if not sidecar.batch.min == 1 <= batch <= sidecar.batch.max:
                raise UserError(
                    f"{sidecar.engine}: is for batches of {sidecar.batch.min} to {sidecar.batch.max}, expected 1 to "
                    f"--batch {batch}; build it again with {build} --batch 1 {batch} {batch}"
                )
            return sidecar
    found = ", ".join(sidecar.backend for sidecar in sidecars) or "none"
    raise UserError(
        f"{file.path}: expected an engine of TensorRT, found {found}; on the GPU of the server, first: {build} && "
        f"runner parity {run.folder}"
    )


def config_text(metadata: OnnxMetadata, options: ServeOptions) -> str:
    """Returns the model's configuration in protobuf's text format, of type `inference.ModelConfig`."""
    height, width, channels = metadata.image_shape
    kind = "KIND_CPU" if options.on_cpu else "KIND_GPU"
    return f"""\
name: {_quoted(options.name)}
backend: "{options.backend}"
max_batch_size: {options.batch}
input [ {{ name: "{RAW_INPUT}" data_type: TYPE_UINT8 dims: [ {height}, {width}, {channels} ] }} ]
output [
  {{ name: "{OUTPUT}" data_type: TYPE_FP32 dims: [ {len(metadata.classes)} ] label_filename: "labels.txt" }}
]
dynamic_batching {{ max_queue_delay_microseconds: {options.delay_us} }}
instance_group [ {{ count: 1 kind: {kind} }} ]
parameters {{
  key: "{METADATA}"
  value: {{ string_value: {_quoted(msgspec.json.encode(metadata).decode())} }}
}}
"""


def _quoted(text: str) -> str:
    """Returns a string of protobuf's text format, whose escapes of quotes and backslashes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)


def open_served(server: str, name: str) -> tuple[Callable[[np.ndarray], np.ndarray], OnnxMetadata]:
    """Opens a model that `write_repository` wrote, on a running server.

    Args:
        server: address of the server's HTTP endpoint, such as http://localhost:8000.
        name: name of the model.

    Returns:
        A function from pixels (n, H, W, 3) uint8 to logits (n, classes) float32, and the metadata of the model.

    Raises:
        UserError: there is no server or no such model; the function raises it as well.
    """
    try:
        host = urllib.parse.urlsplit(server).hostname
    except ValueError:  # such as brackets around what is no IPv6 address
        host = None
    if not server.startswith(("http://", "https://")) or not host:
        raise UserError(f"--server {server}: expected an address such as http://localhost:8000")
    address = f"{server.rstrip('/')}/v2/models/{urllib.parse.quote(name, safe='')}"
    body, _ = _request(f"{address}/config")
    try:
        text = json.loads(body)["parameters"][METADATA]["string_value"]
        metadata = msgspec.json.decode(without_controls(text.encode()), type=OnnxMetadata)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{address}: expected a model of runner serve-repo, found none of its metadata ({first_line(error)})"
        ) from None

    def forward(pixels: np.ndarray) -> np.ndarray:
        response, header_length = _request(f"{address}/infer", *encode_request(pixels))
        try:
            return decode_response(response, header_length, (len(pixels), len(metadata.classes)))
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise UserError(f"{address}: expected logits, found another response ({first_line(error)})") from None

    return forward, metadata


def encode_request(pixels: np.ndarray) -> tuple[bytes, int]:
    """Encodes pixels (n, H, W, 3) uint8 as an inference request with binary tensors; returns it with the header's size.

    See the KServe inference protocol, version 2, and Triton's extension for binary tensor data.
    """
    tensor = pixels.tobytes()
    header = {
        "inputs": [
            {
                "name": RAW_INPUT,
                "shape": list(pixels.shape),
                "datatype": "UINT8",
                "parameters": {"binary_data_size": len(tensor)},
            }
        ],
        "outputs": [{"name": OUTPUT, "parameters": {"binary_data": True}}],
    }
    encoded = json.dumps(header).encode()
    return encoded + tensor, len(encoded)


def decode_response(response: bytes, header_length: int | None, shape: tuple[int, int]) -> np.ndarray:
    """Decodes the response to a request: logits of this shape, float32. Raises ValueError, KeyError or IndexError."""
    if header_length is None:
        raise ValueError(f"no header {HEADER_LENGTH}")
    (output,) = json.loads(response[:header_length])["outputs"]
    found = output["name"], output["datatype"], tuple(output["shape"])
    if found != (OUTPUT, "FP32", shape):
        raise ValueError(f"{found}, expected {(OUTPUT, 'FP32', shape)}")
    return np.frombuffer(response[header_length:], np.float32).reshape(shape)


def _request(address: str, body: bytes | None = None, header_length: int | None = None) -> tuple[bytes, int | None]:
    """Sends a request; returns the response's body, and the size of its JSON header if it has binary tensors."""
    headers = {} if header_length is None else {
        HEADER_LENGTH: str(header_length), "Content-Type": "application/octet-stream",
    }  # fmt: skip
    try:
        request = urllib.request.Request(address, body, headers)
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
            length = response.headers.get(HEADER_LENGTH)
            content = response.read(LARGEST_RESPONSE + 1)
            if len(content) > LARGEST_RESPONSE:
                raise ValueError(f"more than {LARGEST_RESPONSE >> 20} MiB")
            return content, None if length is None else int(length)
    except urllib.error.HTTPError as error:
        raise UserError(f"{address}: refused: {_reason(error) or error}") from None
    except (OSError, HTTPException, ValueError) as error:
        reason: Any = getattr(error, "reason", error)
        raise UserError(f"{address}: no answer ({reason}); is the server running?") from None


def _reason(response: urllib.error.HTTPError) -> str | None:
    """Returns the message of an error response, if it has one."""
    try:
        return str(json.loads(response.read(LARGEST_RESPONSE))["error"])[:300]
    except (OSError, HTTPException, ValueError, KeyError, TypeError, RecursionError):
        return None
