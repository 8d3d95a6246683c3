"""The parts of TensorRT for RTX that the engine code uses exist in TensorRT 11, with the same signatures.

TensorRT 11's bindings are installed without its libraries and load with empty stand-ins. So the tests compare names,
arguments and return types; testing what the functions do needs a GPU and the libraries. Names are collected from the
engine code as attributes of any object: an attribute counts as used if a class of TensorRT for RTX, or TENSORRT_ONLY,
has that name. Of properties only the name is compared, because the bindings do not give them a signature; what an
operator or the buffer protocol does, as in `bytes(plan)`, is not compared at all.
"""

import ast
import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.processes import ROOT

FILES = ("runner/deploy/engine_library.py", "runner/deploy/engine_build.py", "runner/deploy/engine_run.py")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
# Called only with TensorRT for RTX, which builds for GPUs of other machines, compiles kernels at run time, and needs a
# flag for CUDA graphs.
RTX_ONLY = {
    "set_compute_capability",
    "num_compute_capabilities",
    "ComputeCapability",
    "dynamic_shapes_kernel_specialization_strategy",
    "DynamicShapesKernelSpecializationStrategy",
    "REQUIRE_USER_ALLOCATION",
}
# Used only with TensorRT: engines that later versions can run, and other settings of its compiler.
TENSORRT_ONLY = {
    ("BuilderFlag", "VERSION_COMPATIBLE"),
    ("Runtime", "engine_host_code_allowed"),
    ("IBuilderConfig", "build_route"),
}
# Used as attributes of the module itself.
OF_MODULE = {"float32"}
# Prints every class of a module, with the signatures of its attributes as pybind11 writes them into docstrings.
DUMP_API = """
import json, sys
module = __import__(sys.argv[1])
classes = {"": {name: "" for name in dir(module)}}
for name, value in vars(module.tensorrt if hasattr(module, "tensorrt") else module).items():
    if isinstance(value, type):
        docs = {key: (getattr(value, key).__doc__ or "") for key in dir(value) if not key.startswith("__")}
        classes[name] = docs | {"__init__": value.__init__.__doc__ or ""}
print(json.dumps(classes))
"""
Api = dict[str, dict[str, str]]  # docstrings by class and attribute


def api_of(module: str, path: Path | None = None) -> Api:
    """The API of a module, imported in a fresh process; `path` is searched first."""
    environ = {"PATH": "/usr/bin:/bin"} | ({"LD_LIBRARY_PATH": str(path), "PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, "-c", DUMP_API, module], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Api:
    """The API of TensorRT 11, from its bindings with libraries whose functions are empty."""
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
    return api_of("tensorrt", folder)


def used_names() -> set[str]:
    """The name of every attribute that the engine code reads, of any object."""
    trees = [ast.parse((ROOT / file).read_text()) for file in FILES]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def signatures(docstring: str) -> set[str]:
    """The signatures in a docstring of pybind11, without module names; empty for a property."""
    text = re.sub(r"\btensorrt(_rtx)?(_bindings)?\.", "", docstring)
    return set(re.findall(r"^(?:\d+\. )?(\w+\(.*\) -> .*)$", text, re.M))


def test_tensorrt_11_has_what_the_engine_code_uses(tensorrt: Api) -> None:
    rtx, names = api_of("tensorrt_rtx"), used_names()
    used = {
        (cls, name)
        for cls, attributes in rtx.items()
        if cls and cls not in RTX_ONLY
        for name in names & attributes.keys() - RTX_ONLY
    }
    assert {("Builder", "create_network"), ("OnnxParser", "parse"), ("Runtime", "deserialize_cuda_engine")} <= used
    assert {("IExecutionContext", "set_tensor_address"), ("IExecutionContext", "execute_async_v3")} <= used
    # A class that only TensorRT for RTX has does not matter unless the code names it.
    missing = [
        f"{cls}.{name}"
        for cls, name in sorted(used)
        if (cls in tensorrt or cls in names) and name not in tensorrt.get(cls, {})
    ]
    assert missing == []
    differing = {
        f"{cls}.{name}": (rtx[cls][name], tensorrt[cls][name])
        for cls, name in sorted(used)
        if cls in tensorrt and not signatures(rtx[cls][name]) <= signatures(tensorrt[cls][name])
    }
    assert differing == {}
    print(f"{len(used)} attributes of {len({cls for cls, _ in used})} classes compared")


def test_tensorrt_11_has_what_the_engine_code_uses_of_it_alone(tensorrt: Api) -> None:
    names = used_names()
    for cls, name in TENSORRT_ONLY:
        assert name in names
        assert name in tensorrt[cls]
    for module in (tensorrt, api_of("tensorrt_rtx")):
        assert names >= OF_MODULE
        assert module[""].keys() >= OF_MODULE


def test_the_engine_code_uses_nothing_that_tensorrt_11_removed(tensorrt: Api) -> None:
    for flag in ("FP16", "BF16", "INT8"):
        assert flag not in tensorrt["BuilderFlag"]
    assert not {"FP16", "BF16", "INT8", "int8_calibrator"} & used_names()
