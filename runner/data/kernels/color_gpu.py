"""`color.jitter` as one Triton kernel: one program per image, which changes it in place in four passes."""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # pixels per step of a program


@triton.jit
def _unit(x):  # type: ignore[no-untyped-def]  # Triton infers types when it compiles
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _byte(x):  # type: ignore[no-untyped-def]
    """Clamps to 0..255 and rounds down."""
    return tl.floor(tl.minimum(tl.maximum(x, 0.0), 255.0))


@triton.jit
def _gray(red, green, blue):  # type: ignore[no-untyped-def]
    return tl.floor(red * 0.2989 + green * 0.587 + blue * 0.114)


@triton.jit
def _shift_hue(red, green, blue, shift):  # type: ignore[no-untyped-def]
    red, green, blue = red * (1 / 255), green * (1 / 255), blue * (1 / 255)
    value = tl.maximum(red, tl.maximum(green, blue))
    chroma = value - tl.minimum(red, tl.minimum(green, blue))
    is_gray = chroma == 0
    saturated = tl.div_rn(chroma, tl.where(is_gray, 1.0, value))
    divisor = tl.where(is_gray, 1.0, chroma)
    from_red, from_green = tl.div_rn(value - red, divisor), tl.div_rn(value - green, divisor)
    from_blue = tl.div_rn(value - blue, divisor)
    sector = tl.where(green == value, from_red + 2.0 - from_blue, from_green + 4.0 - from_red)
    sector = tl.where(red == value, from_blue - from_green, sector)
    turn = sector * (1 / 6) + 1.0
    turn = turn - tl.floor(turn) + shift
    turn = (turn - tl.floor(turn)) * 6
    floor = tl.floor(turn)
    fraction = saturated * (turn - floor)
    falling = _unit((1.0 - fraction) * value)
    rising = _unit((fraction + (1.0 - saturated)) * value)
    low = _unit((1.0 - saturated) * value)
    sixth = floor.to(tl.int32) % 6
    red = tl.where((sixth == 0) | (sixth == 5), value, tl.where(sixth == 1, falling, tl.where(sixth == 4, rising, low)))
    green = tl.where(sixth == 0, rising, tl.where(sixth == 3, falling, tl.where(sixth > 3, low, value)))
    blue = tl.where(sixth < 2, low, tl.where(sixth == 2, rising, tl.where(sixth == 5, falling, value)))
    scale: tl.constexpr = 256 - 1e-3
    return tl.floor(red * scale), tl.floor(green * scale), tl.floor(blue * scale)


@triton.jit
def _load(image, start, pixels, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the offsets of `block` pixels, which of them are inside the image, and their colors in float32."""
    at = (start + tl.arange(0, block)) * 3
    inside = at < pixels * 3
    red = tl.load(image + at, mask=inside, other=0).to(tl.float32)
    green = tl.load(image + at + 1, mask=inside, other=0).to(tl.float32)
    blue = tl.load(image + at + 2, mask=inside, other=0).to(tl.float32)
    return at, inside, red, green, blue


@triton.jit
def _jitter(images, factors, order, pixels, block: tl.constexpr):  # type: ignore[no-untyped-def]
    n = tl.program_id(0).to(tl.int64)
    image = images + n * pixels * 3
    for turn in range(4):
        operation = tl.load(order + n * 4 + turn)
        factor = tl.load(factors + n * 4 + operation)
        rest = 1.0 - factor
        mean = 0.0
        if operation == 1:
            total = tl.zeros((), tl.int64)
            for start in range(0, pixels, block):
                _, _, red, green, blue = _load(image, start, pixels, block)
                total += tl.sum(_gray(red, green, blue).to(tl.int32)).to(tl.int64)
            mean = tl.div_rn(total.to(tl.float32), pixels.to(tl.float32))
            tl.debug_barrier()  # all threads have read the image before any changes it
        for start in range(0, pixels, block):
            at, inside, red, green, blue = _load(image, start, pixels, block)
            if operation == 0:
                red, green, blue = _byte(red * factor), _byte(green * factor), _byte(blue * factor)
            elif operation == 3:
                red, green, blue = _shift_hue(red, green, blue, factor)
            else:
                other = rest * tl.where(operation == 1, mean, _gray(red, green, blue))
                red, green = _byte(red * factor + other), _byte(green * factor + other)
                blue = _byte(blue * factor + other)
            tl.store(image + at, red.to(tl.uint8), mask=inside)
            tl.store(image + at + 1, green.to(tl.uint8), mask=inside)
            tl.store(image + at + 2, blue.to(tl.uint8), mask=inside)
        tl.debug_barrier()  # the next pass may read with another layout


def jitter(images: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> None:
    """Jitters images (n, H, W, 3) uint8 in place; see `color.jitter`."""
    count, height, width, channels = images.shape
    assert channels == 3
    if count:
        # Without fused multiply-adds, every value is rounded as on the CPU.
        _jitter[(count,)](
            images, factors.contiguous(), order.contiguous(), height * width, block=BLOCK, enable_fp_fusion=False
        )
