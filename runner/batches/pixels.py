"""Gather, crop, flip and normalise in one pass: a compiled loop on the CPU, one kernel on a GPU."""

import functools
import threading

import torch


def prepare(device: torch.device) -> None:
    """Loads what `make` needs on a device, in the background: importing numba and finding the compiled loop takes
    as long as reading the images does, which needs no Python.
    """
    if device.type == "cpu":
        threading.Thread(target=load_loop, name="load kernel", daemon=True).start()


@functools.cache
def load_loop() -> None:
    """Compiles the CPU's loop for both of its outputs, or finds it compiled; once in a process.

    Before FFCV makes a Loader: that marks numba's one type of byte arrays as read-only, for everybody.
    """
    import numba

    from runner import cpu
    from runner.batches import kernel

    cpu.choose_openmp()
    pixels, places = torch.zeros(1, 1, 1, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    for out in (pixels.float(), pixels):
        example = (pixels, places, places, places, places.bool(), False, *[torch.zeros(3)] * 2, 1, out)
        kernel.make.compile(tuple(numba.typeof(a.numpy() if isinstance(a, torch.Tensor) else a) for a in example))


def make(
    images: torch.Tensor,
    index: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    flip: torch.Tensor,
    reflect: bool,
    scale: torch.Tensor,
    shift: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Makes a batch.

    Args:
        images: (M, H, W, 3) uint8.
        index: (n,) int64, which of them.
        row, column: (n,) int64, the corner of each crop, from the image's own.
        flip: (n,) bool.
        reflect: pixels outside the image are those that it mirrors at its edges; otherwise 0 before normalisation.
        scale, shift: (3,) float32; a pixel becomes pixel × scale + shift.
        dtype: float32, or uint8 for pixels as they are; a lower float precision on a GPU.

    Returns:
        (n, H, W, 3) of `dtype`.
    """
    one_pass = {"cpu": in_numba, "cuda": in_triton}.get(images.device.type, in_torch)
    return one_pass(images, index, row, column, flip, reflect, scale, shift, dtype)


def in_torch(
    images: torch.Tensor,
    index: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    flip: torch.Tensor,
    reflect: bool,
    scale: torch.Tensor,
    shift: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`make` by torch operations, on any device; also the yardstick of the others."""
    _, height, width, _ = images.shape
    y = torch.arange(height, device=images.device) + row[:, None]
    x = torch.arange(width, device=images.device)
    x = torch.where(flip[:, None], width - 1 - x, x) + column[:, None]
    if reflect:
        y = (height - 1) - ((height - 1) - y.abs()).abs()
        x = (width - 1) - ((width - 1) - x.abs()).abs()
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    pixels = images[index[:, None, None], y[:, :, None], x[:, None, :]] * inside[..., None]
    return (pixels.float() * scale + shift).to(dtype)


def in_numba(
    images: torch.Tensor,
    index: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    flip: torch.Tensor,
    reflect: bool,
    scale: torch.Tensor,
    shift: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`make` by a compiled loop over the images, on as many threads as torch has."""
    from runner import cpu
    from runner.batches import kernel

    load_loop()
    out = torch.empty((len(index), *images.shape[1:]), dtype=torch.uint8 if dtype == torch.uint8 else torch.float32)
    parts = [part.numpy() for part in (images, index, row, column, flip)]
    with cpu.torch_threads_kept():
        threads = cpu.give_numba_torchs_threads()
        kernel.make(*parts, reflect, scale.numpy(), shift.numpy(), threads, out.numpy())
    return out.to(dtype)


def in_triton(
    images: torch.Tensor,
    index: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    flip: torch.Tensor,
    reflect: bool,
    scale: torch.Tensor,
    shift: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`make` by one kernel on a GPU."""
    from runner.batches import gpu_kernel

    out = torch.empty((len(index), *images.shape[1:]), dtype=dtype, device=images.device)
    gpu_kernel.make(images, index, row, column, flip, reflect, scale, shift, out)
    return out
