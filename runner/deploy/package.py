"""Compiles a run's model with AOTInductor into a package, which torch runs without this project.

model.fp32.<device>.pt2   normalized images (batch, 3, H, W) float32 to logits (batch, classes) float32

Images must be contiguous. A package contains code for the machine that compiled it, so only packages of one's own are
loaded, and only when asked.
"""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from runner.common import files
from runner.common.errors import UserError
from runner.common.files import sha256_of
from runner.common.text import first_line
from runner.deploy.onnx import CHECK_IMAGES, LARGEST_BATCH, MAX_LOGIT_ERROR, OnnxFile, silenced_exporter, weights_sha256
from runner.run.folder import Run
from runner.run.schema import Export
from runner.training import checkpoint

DeviceType = Literal["cpu", "cuda"]
DEVICES: tuple[DeviceType, ...] = ("cpu", "cuda")
SUFFIX = ".pt2"


def path_of(run: Run, device: DeviceType) -> Path:
    """The path of a run's package for a device, whether or not it exists."""
    return run.deploy / f"model.fp32.{device}.pt2"


def provider_of(device: str) -> str:
    """What runs a package, as written in results: another version of torch may not."""
    return f"torch {torch.__version__.partition('+')[0]} {device}"


def require_device(device: DeviceType) -> None:
    """Raises UserError if this machine has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--aot-inductor cuda: expected a GPU, found none")


def compile_package(run: Run, device: DeviceType) -> OnnxFile:
    """Compiles the package for a device of this machine, and checks its logits against the model's on random images.

    Raises:
        UserError: there is no such device, or no compiler that works.
        RuntimeError: the logits differ; the package is not kept.
    """
    require_device(device)
    weights, shape = weights_sha256(run), run.config().input.shape
    model = checkpoint.load_model(run).to(memory_format=torch.contiguous_format).to(device)
    path = path_of(run, device)
    path.parent.mkdir(exist_ok=True)
    staging = path.with_name(f".{path.stem}.part.pt2")
    batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
    images = torch.randn(CHECK_IMAGES, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with torch.no_grad(), silenced_exporter():
            program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},))
            try:
                # The code asks for the number of threads when it runs; by default, it contains that of this process.
                config = {"cpp.dynamic_threads": True}
                torch._inductor.aoti_compile_and_package(program, package_path=str(staging), inductor_configs=config)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                raise UserError(
                    f"{path}: cannot be compiled ({first_line(error)}); is a C++ compiler installed?"
                ) from None
            expected = model(images)
            difference = (load(staging)(images) - expected).abs().max()
        if not difference <= MAX_LOGIT_ERROR * expected.abs().max():
            raise RuntimeError(f"{path}: logits differ from the model's by {difference:.3g} on {CHECK_IMAGES} images")
        with staging.open("rb") as file:
            os.fsync(file.fileno())
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    written = OnnxFile(path, "fp32", raw=False, sha256=sha256_of(path))
    files.write_json(run.exports, run.read_exports() | {path.name: Export(sha256=written.sha256, weights=weights)})
    return written


def compiled(run: Run, device: DeviceType) -> OnnxFile:
    """Returns the package for a device. Raises UserError if it is missing, changed, or of earlier weights."""
    path, entry = path_of(run, device), run.read_exports().get(path_of(run, device).name)
    remedy = f"make it: runner export {run.folder} --aot-inductor {device}"
    if entry is None or not path.is_file():
        raise UserError(f"{run.folder}: expected deploy/{path.name}, found none; {remedy}")
    if entry.weights != weights_sha256(run):
        raise UserError(f"{path}: expected one of the current weights, found one of earlier weights; {remedy}")
    if (found := sha256_of(path)) != entry.sha256:
        raise UserError(f"{path}: expected SHA-256 {entry.sha256[:12]}…, found {found[:12]}…; {remedy}")
    return OnnxFile(path, "fp32", raw=False, sha256=entry.sha256)


def all_compiled(run: Run) -> list[OnnxFile]:
    """Returns the packages that are current."""
    found = []
    for device in DEVICES:
        if path_of(run, device).is_file():
            try:
                found.append(compiled(run, device))
            except UserError:
                continue
    return found


def load(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Loads a package, which runs the code in it. Returns a function from images to logits, on its device."""
    try:
        package: Any = torch._inductor.aoti_load_package(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: cannot be loaded ({first_line(error)}); export it again") from None
    return lambda images: package(images.contiguous())  # it reads memory as laid out in the example, unchecked
