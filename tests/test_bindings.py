"""What our engine code asks of TensorRT for RTX, TensorRT 11's own bindings offer with the same signatures.

The bindings come without TensorRT's libraries, and load over empty stand-ins of these. So names, arguments and
return types of the interface are compared; what the functions of TensorRT 11 then do is not, and needs a GPU and
its libraries.
"""

import ast
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.conftest import ROOT

FILES = ("runner/deploy/engine.py", "runner/deploy/latency.py")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# Only TensorRT for RTX builds for GPUs that are not there, compiles kernels when it sees a shape, and has to be
# told of CUDA graphs; with it alone these are called.
RTX_ALONE = {
    "set_compute_capability",
    "num_compute_capabilities",
    "ComputeCapability",
    "dynamic_shapes_kernel_specialization_strategy",
    "DynamicShapesKernelSpecializationStrategy",
    "REQUIRE_USER_ALLOCATION",
}
# Every class of a module, and of each attribute the signature that pybind11 writes, without the module's name.
SURFACE = """
import json, sys
module = __import__(sys.argv[1])
found = {}
for name, one in vars(module.tensorrt if hasattr(module, "tensorrt") else module).items():
    if isinstance(one, type):
        parts = {key: (getattr(one, key).__doc__ or "") for key in dir(one) if not key.startswith("__")}
        found[name] = parts | {"__init__": one.__init__.__doc__ or ""}
print(json.dumps(found))
"""


def surface(module: str, path: Path | None = None) -> dict[str, dict[str, str]]:
    environ = {"PATH": "/usr/bin:/bin"} | ({"LD_LIBRARY_PATH": str(path), "PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, "-c", SURFACE, module], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def of_tensorrt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The interface of TensorRT 11, from its bindings over libraries in which every function is empty."""
    folder = tmp_path_factory.mktemp("libraries")
    files = metadata.distribution("tensorrt-cu13-bindings").files or []
    binary = next(Path(str(file.locate())) for file in files if file.name == "tensorrt.so")
    undefined = subprocess.run(["nm", "-D", "--undefined-only", binary], capture_output=True, text=True, check=True)
    names = re.findall(r" U ((?:create|get|initLib)\w+)$", undefined.stdout, re.M)
    assert "createInferBuilder_INTERNAL" in names
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    major = metadata.version("tensorrt-cu13-bindings").split(".")[0]
    for library in LIBRARIES:
        code = source if library == "nvinfer" else "/dev/null"
        out = folder / f"lib{library}.so.{major}"
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-o", out, code], check=True)
    (folder / "tensorrt.so").symlink_to(binary)
    return surface("tensorrt", folder)


def asked_for() -> set[str]:
    """Every attribute that the engine code reads of anything."""
    trees = [ast.parse((ROOT / file).read_text()) for file in FILES]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def signatures(text: str) -> list[str]:
    """The signatures in a docstring of pybind11, without the module's name; nothing for a property."""
    text = re.sub(r"\btensorrt(_rtx)?(_bindings)?\.", "", text)
    return re.findall(r"^(?:\d+\. )?(\w+\(.*\) -> .*)$", text, re.M)


def test_tensorrt_11_offers_what_the_engine_code_asks_for(of_tensorrt: dict[str, dict[str, str]]) -> None:
    rtx, names = surface("tensorrt_rtx"), asked_for()
    used = [
        (one, key)
        for one, parts in rtx.items()
        if one not in RTX_ALONE
        for key in sorted(names & parts.keys() - RTX_ALONE)
    ]
    assert {("Builder", "create_network"), ("OnnxParser", "parse"), ("Runtime", "deserialize_cuda_engine")} <= set(
        used
    )
    assert {("IExecutionContext", "set_tensor_address"), ("IExecutionContext", "execute_async_v3")} <= set(used)
    missing = [f"{one}.{key}" for one, key in used if key not in of_tensorrt.get(one, {})]
    # Classes that only TensorRT for RTX has are no concern of ours as long as their names are not in our code.
    assert [entry for entry in missing if entry.split(".")[0] in of_tensorrt or entry.split(".")[0] in names] == []
    differ = {
        f"{one}.{key}": (ours, theirs)
        for one, key in used
        if one in of_tensorrt
        and not set(ours := signatures(rtx[one][key])) <= set(theirs := signatures(of_tensorrt[one][key]))
    }
    assert differ == {}
    print(f"{len(used)} attributes of {len({one for one, _ in used})} classes compared")


def test_what_tensorrt_11_took_away_is_not_asked_for(of_tensorrt: dict[str, dict[str, str]]) -> None:
    for flag in ("FP16", "BF16", "INT8"):
        assert flag not in of_tensorrt["BuilderFlag"]
    assert not {"FP16", "BF16", "INT8", "int8_calibrator"} & asked_for()
