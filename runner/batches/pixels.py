"""Gather, crop, flip and normalise in one pass: a compiled loop on the CPU, torch operations elsewhere."""

import torch


def make(
    images: torch.Tensor,
    index: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    flip: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    """Makes a batch.

    Args:
        images: (M, H, W, 3) uint8.
        index: (n,) int64, which of them.
        row, column: (n,) int64, the corner of each crop; pixels outside the image are 0 before normalisation.
        flip: (n,) bool.
        scale, shift: (3,) float32; a pixel becomes pixel × scale + shift.

    Returns:
        (n, H, W, 3) float32.
    """
    one_pass = in_numba if images.device.type == "cpu" else in_torch
    return one_pass(images, index, row, column, flip, scale, shift)


def in_torch(
    images: torch.Tensor,
    index: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    flip: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    """`make` by torch operations, on any device; also the yardstick of the others."""
    _, height, width, _ = images.shape
    y = torch.arange(height, device=images.device) + row[:, None]
    x = torch.arange(width, device=images.device)
    x = torch.where(flip[:, None], width - 1 - x, x) + column[:, None]
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    pixels = images[index[:, None, None], y[:, :, None], x[:, None, :]] * inside[..., None]
    return pixels.float() * scale + shift


def in_numba(
    images: torch.Tensor,
    index: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    flip: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
) -> torch.Tensor:
    """`make` by a compiled loop over the images, on as many threads as torch has."""
    import numba

    from runner import cpu
    from runner.batches import kernel

    out = torch.empty((len(index), *images.shape[1:]), dtype=torch.float32)
    with cpu.torch_threads_kept():
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        kernel.make(*(part.numpy() for part in (images, index, row, column, flip, scale, shift, out)))
    return out
