"""`crop.make_batch` as one Triton kernel: each program makes 1,024 values, without intermediate results in memory."""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # values per program


@triton.jit
def _make(  # type: ignore[no-untyped-def]  # Triton infers types when it compiles
    images, index, row, column, flip, scale, shift, out,
    height, width, reflect: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    size = height * width * 3
    k = tl.program_id(1) * block + tl.arange(0, block)
    channel, x, y = k % 3, (k // 3) % width, k // (3 * width)
    x = tl.where(tl.load(flip + n) != 0, width - 1 - x, x) + tl.load(column + n)
    y = y + tl.load(row + n)
    if reflect:
        x, y = tl.abs(x), tl.abs(y)
        x = tl.where(x >= width, 2 * (width - 1) - x, x)
        y = tl.where(y >= height, 2 * (height - 1) - y, y)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (k < size)
    source = tl.load(index + n) * size + (y * width + x) * 3 + channel
    pixel = tl.load(images + source, mask=inside, other=0).to(tl.float32)
    normalized = pixel * tl.load(scale + channel) + tl.load(shift + channel)
    tl.store(out + n * size + k, normalized.to(out.dtype.element_ty), mask=k < size)


def make(
    images: torch.Tensor,
    index: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    flip: torch.Tensor,
    reflect: bool,
    scale: torch.Tensor,
    shift: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Gathers, crops, flips and normalizes into `out` (n, H, W, 3) of any dtype; see `crop.make_batch`."""
    count, height, width, channels = out.shape
    assert channels == 3
    if count:
        grid = (count, triton.cdiv(height * width * 3, BLOCK))
        arguments = (images, index, row, column, flip.view(torch.uint8), scale, shift, out)
        # Without fused multiply-adds, every value is rounded as on the CPU, by any version of Triton.
        _make[grid](*arguments, height, width, reflect=reflect, block=BLOCK, enable_fp_fusion=False)
