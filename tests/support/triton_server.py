"""A server of a model repository over HTTP, as Triton Inference Server is one: only what a client needs of it.

It reads `config.pbtxt` by the published schema, and requests by the KServe protocol with Triton's binary tensors. Its
code shares nothing with the client's.
"""

import importlib.metadata
import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
from google.protobuf import json_format, text_format

TYPES = {"UINT8": np.uint8, "FP32": np.float32}


def schema() -> ModuleType:
    """The messages of Triton's model_config.proto, from the client library, which itself would need gRPC."""
    (path,) = (
        file.locate()
        for file in importlib.metadata.files("tritonclient") or ()
        if file.parts[-3:] == ("tritonclient", "grpc", "model_config_pb2.py")
    )
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(path))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCHEMA = schema()


def read_config(folder: Path) -> Any:
    """A model's configuration, of type ModelConfig; raises ParseError."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), SCHEMA.ModelConfig())


class TritonServer:
    """Serves the ONNX models of a repository on a free port; `pixels` are the tensors it was sent, in order."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.pixels: list[np.ndarray] = []
        self.response: tuple[int, dict[str, str], bytes] | None = None  # instead of the right one
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "TritonServer":
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(b"", 0)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.answer(body, int(self.headers["Inference-Header-Content-Length"]))

            def answer(self, body: bytes, header_length: int) -> None:
                status, headers, content = server.respond(self.path, body, header_length)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler

    def respond(self, path: str, body: bytes, header_length: int) -> tuple[int, dict[str, str], bytes]:
        if self.response is not None and (body or path.endswith("/config")):
            return self.response
        _, _, _, name, request = path.split("/")
        folder = self.repository / name
        if not folder.is_dir():
            return 400, {}, json.dumps({"error": f"Request for unknown model: '{name}' is not found"}).encode()
        config = read_config(folder)
        if request == "config":
            return 200, {}, json_format.MessageToJson(config, preserving_proto_field_name=True).encode()
        header, rest = json.loads(body[:header_length]), body[header_length:]
        (tensor,) = header["inputs"]
        assert len(rest) == tensor["parameters"]["binary_data_size"]
        count, *dims = tensor["shape"]
        assert dims == list(config.input[0].dims)
        assert count <= config.max_batch_size
        pixels = np.frombuffer(rest, TYPES[tensor["datatype"]]).reshape(tensor["shape"])
        self.pixels.append(pixels)
        session = onnxruntime.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
        (output,) = config.output
        assert header["outputs"] == [{"name": output.name, "parameters": {"binary_data": True}}]
        (logits,) = session.run([output.name], {tensor["name"]: pixels})
        described = {
            "name": output.name,
            "datatype": "FP32",
            "shape": list(logits.shape),
            "parameters": {"binary_data_size": logits.nbytes},
        }
        answer = json.dumps({"model_name": name, "model_version": "1", "outputs": [described]}).encode()
        return 200, {"Inference-Header-Content-Length": str(len(answer))}, answer + logits.tobytes()
