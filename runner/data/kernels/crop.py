"""Gather, crop, flip and normalize in one pass: a compiled loop on the CPU, one kernel on a GPU."""

import contextlib
import fcntl
import functools
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


def prepare(device: torch.device) -> None:
    """Loads what `make_batch` needs on a device, in a background thread.

    Importing numba and loading the compiled loop takes as long as reading the images, and can overlap with it.
    """
    if device.type == "cpu":
        threading.Thread(target=load_loop, name="load kernel", daemon=True).start()


@functools.cache
def load_loop() -> None:
    """Compiles the CPU loop for both output types, or loads it from the cache; once per process.

    Must run before FFCV creates a Loader, which marks numba's type of byte arrays as read-only in the whole process.
    """
    import numba

    from runner.data.kernels import cpu as kernel
    from runner.system import cpu

    cpu.choose_openmp()
    pixels, index = torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    for out in (pixels.float(), pixels):
        example = (pixels, index, index, index, index.bool(), False, *[torch.zeros(3)] * 2, 1, out)
        types = tuple(numba.typeof(a.numpy() if isinstance(a, torch.Tensor) else a) for a in example)
        compile_loop(kernel.make, types)


def compile_loop(loop: Any, types: tuple[Any, ...]) -> None:
    """Compiles a numba loop for the types of its arguments, or loads it from numba's cache.

    One process of a machine compiles, and the others wait and load. A file of the cache that cannot be read, for
    example because the disk was full, is written again.
    """
    folder = Path(loop.stats.cache_path)
    name = f"{loop.py_func.__module__.rpartition('.')[2]}.{loop.py_func.__qualname__}"
    is_cached = len(list(folder.glob(f"{name}-*.nbc"))) > len(loop.signatures)  # a file for each signature
    with contextlib.nullcontext() if is_cached else _locked(folder):
        try:
            loop.compile(types)
        except Exception:  # numba unpickles the file, which raises errors of many types
            for file in folder.glob(f"{name}-*.nb[ic]"):
                file.unlink(missing_ok=True)
            loop.compile(types)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a folder for at most a minute's wait, and not on file systems that cannot: compiling twice is no error."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            end = time.monotonic() + 60
            while not _try_lock(descriptor) and time.monotonic() < end:
                time.sleep(0.05)
            stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)  # a forked process would keep it
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Crops(NamedTuple):
    """The images of a batch, and the crop of each.

    Attributes:
        samples: (n,) int64, positions in the split.
        row, column: (n,) int64, the corner of each crop relative to the image's corner.
        flip: (n,) bool, mirror left to right.
    """

    samples: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    flip: torch.Tensor


class Output(NamedTuple):
    """How cropped pixels are filled, normalized and stored.

    Attributes:
        reflect: mirror the image at its edges; otherwise pixels outside are 0 before normalization.
        scale, shift: (3,) float32; a pixel becomes pixel × scale + shift.
        dtype: uint8 for unchanged pixels, or a float type.
    """

    reflect: bool
    scale: torch.Tensor
    shift: torch.Tensor
    dtype: torch.dtype = torch.float32


def make_batch(images: torch.Tensor, crops: Crops, output: Output) -> torch.Tensor:
    """Gathers, crops, flips and normalizes: images (M, H, W, 3) uint8 to a batch (n, H, W, 3) of `output.dtype`."""
    implementation = {"cpu": make_batch_numba, "cuda": make_batch_triton}.get(images.device.type, make_batch_torch)
    return implementation(images, crops, output)


def make_resized_batch(
    images: torch.Tensor, crops: Crops, boxes: torch.Tensor, size: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """Gathers, crops, resizes and flips: images (M, H, W, 3) uint8 to a batch (n, *size, 3) of `dtype`, in 0..255.

    Bilinear without antialiasing, as torchvision's `resized_crop`; the pixels of an image do not depend on its batch.

    Args:
        images: (M, H, W, 3) uint8.
        crops: the images of the batch and their flips; the corners are those of the boxes.
        boxes: (n, 4) int64, top, left, bottom and right of each crop, within the image.
        size: height and width of the result.
        dtype: float32, or uint8 for rounded pixels.
    """
    top, left, bottom, right = boxes[..., None].unbind(1)
    y, x = _positions(top, bottom, images.shape[1], size[0]), _positions(left, right, images.shape[2], size[1])
    x = torch.where(crops.flip[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)
    pixels = images[crops.samples].permute(0, 3, 1, 2).float()
    batch = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False).permute(0, 2, 3, 1)
    return (batch.round() if dtype == torch.uint8 else batch).to(dtype).contiguous()


def _positions(begin: torch.Tensor, end: torch.Tensor, length: int, size: int) -> torch.Tensor:
    """Returns where `size` pixels lie that replace pixels begin..end-1 (n, 1) of `length`, (n, size) float32, -1 to 1.

    None lies beyond the centers of the first and the last pixel, so that none mixes in pixels from outside of the crop.
    """
    steps = torch.arange(size, device=begin.device) + 0.5
    inside = (steps * ((end - begin) / size) - 0.5).clamp(min=0).minimum(end - begin - 1)
    return (2 * (begin + inside) + 1) / length - 1


def make_batch_torch(images: torch.Tensor, crops: Crops, output: Output) -> torch.Tensor:
    """`make_batch` in torch operations, on any device: the reference implementation."""
    _, height, width, _ = images.shape
    index, row, column, flip = crops
    y = torch.arange(height, device=images.device) + row[:, None]
    x = torch.arange(width, device=images.device)
    x = torch.where(flip[:, None], width - 1 - x, x) + column[:, None]
    if output.reflect:
        y = (height - 1) - ((height - 1) - y.abs()).abs()
        x = (width - 1) - ((width - 1) - x.abs()).abs()
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    pixels = images[index[:, None, None], y[:, :, None], x[:, None, :]] * inside[..., None]
    return (pixels.float() * output.scale + output.shift).to(output.dtype)


def make_batch_numba(images: torch.Tensor, crops: Crops, output: Output) -> torch.Tensor:
    """`make_batch` as a compiled loop on the CPU, with as many threads as torch uses."""
    from runner.data.kernels import cpu as kernel
    from runner.system import cpu

    load_loop()
    dtype = torch.uint8 if output.dtype == torch.uint8 else torch.float32
    batch = torch.empty((len(crops.samples), *images.shape[1:]), dtype=dtype)
    samples, row, column, flip = (tensor.numpy() for tensor in crops)
    scale, shift = output.scale.numpy(), output.shift.numpy()
    with cpu.preserve_torch_num_threads():
        threads = cpu.sync_numba_num_threads()
        kernel.make(images.numpy(), samples, row, column, flip, output.reflect, scale, shift, threads, batch.numpy())
    return batch.to(output.dtype)


def make_batch_triton(images: torch.Tensor, crops: Crops, output: Output) -> torch.Tensor:
    """`make_batch` as one Triton kernel on a GPU."""
    from runner.data.kernels import gpu

    batch = torch.empty((len(crops.samples), *images.shape[1:]), dtype=output.dtype, device=images.device)
    gpu.make(images, *crops, output.reflect, output.scale, output.shift, batch)
    return batch
