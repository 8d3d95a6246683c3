"""The Triton kernels, compiled ahead of time for several GPU architectures: they spill no registers and use few."""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from runner.data.kernels import color_gpu, gpu

TARGETS = (80, 89, 90, 100, 120)  # A100, RTX 40 and L4, H100, B200, RTX 50
DTYPES = ("fp32", "bf16", "fp16", "u8")
RECORDED = Path(__file__).parent / "golden" / "gpu_kernel.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SIGNATURE = {
    **{"images": "*u8", "index": "*i64", "row": "*i64", "column": "*i64", "flip": "*u8"},
    **{"scale": "*fp32", "shift": "*fp32", "height": "i32", "width": "i32"},
}
JITTER = {"images": "*u8", "factors": "*fp32", "order": "*i64", "pixels": "i32"}


def resources(capability: int, kernel: str, reflect: bool, folder: Path) -> dict[str, int]:
    """Returns registers, stack bytes and spilled bytes per thread, as the assembler reports them.

    `kernel` is "jitter", or the dtype of the batch that `make` writes.
    """
    function: Any
    constants: dict[str, int]
    if kernel == "jitter":
        function, constants, arguments = color_gpu._jitter, {"block": color_gpu.BLOCK}, JITTER
    else:
        function, constants = gpu._make, {"reflect": reflect, "block": gpu.BLOCK}
        arguments = SIGNATURE | {"out": f"*{kernel}"}
    names = function.arg_names
    signature = arguments | dict.fromkeys(constants, "constexpr")
    aligned = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if name not in constants}
    source = ASTSource(
        fn=function,
        signature={name: signature[name] for name in names},
        constexprs=constants,
        attrs=aligned,
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "enable_fp_fusion": False}
    )
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "--dump-resource-usage", folder / "kernel.cubin"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    match = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert match, usage
    return dict(zip(("registers", "stack", "local"), map(int, match.groups()), strict=True))


VARIANTS = {
    f"sm_{capability} {dtype} {'reflect' if reflect else 'zero'}": (capability, dtype, reflect)
    for capability in TARGETS
    for dtype in DTYPES
    for reflect in (False, True)
} | {f"sm_{capability} jitter": (capability, "jitter", False) for capability in TARGETS}


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if "90" in name else pytest.mark.every) for name in VARIANTS]
)
def test_the_kernel_spills_no_registers(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an intended change: python -m tests.test_gpu_kernel"""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))  # so that it is compiled now
    used = resources(*VARIANTS[variant], tmp_path)
    assert (used["stack"], used["local"]) == (0, 0)
    recorded = json.loads(RECORDED.read_text())
    if triton.__version__ == recorded["triton"]:  # the assembler is part of triton
        assert used["registers"] == recorded["registers"][variant]
    # So that every multiprocessor runs 1,024 threads, or 512 of the jitter, which computes more for each byte.
    assert used["registers"] <= (128 if variant.endswith("jitter") else 64)


def record() -> None:
    """Writes the number of registers of every variant."""
    with tempfile.TemporaryDirectory() as folder:
        registers = {name: resources(*variant, Path(folder))["registers"] for name, variant in VARIANTS.items()}
    RECORDED.write_text(json.dumps({"triton": triton.__version__, "registers": registers}, indent=2) + "\n")


if __name__ == "__main__":
    record()
