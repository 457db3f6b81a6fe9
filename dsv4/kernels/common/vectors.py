"""One vector held by one program: RMSNorm, RoPE, Hadamard, as in dsv4.reference."""

import triton
import triton.language as tl


@triton.jit
def rms_norm(x, weight, eps, C: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) * weight, FP32; lanes from C on hold zeros."""
    mean = tl.div_rn(tl.sum(x * x, axis=0), C * 1.0)
    return x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps)) * weight


@triton.jit
def rope(
    x, cos_ptr, sin_ptr, row, C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr,
    N: tl.constexpr = 1,
):  # fmt: skip
    """Rotate the last R of C dims; dims 2i and 2i + 1 are a pair. Row `row` of the FP32 tables.

    N  vectors of BLOCK_C lanes in a row
    """
    a, b = tl.split(tl.reshape(x, [N * BLOCK_C // 2, 2]))
    i = tl.arange(0, N * BLOCK_C // 2)
    if N > 1:
        i %= BLOCK_C // 2
    i -= (C - R) // 2
    is_rope = (i >= 0) & (i < R // 2)
    cos = tl.load(cos_ptr + row * (R // 2) + i, is_rope, 1.0)
    sin = tl.load(sin_ptr + row * (R // 2) + i, is_rope, 0.0)
    # Not by cos = 1, sin = 0 alone: a - b * 0 loses the sign of a zero.
    real = tl.where(is_rope, a * cos - b * sin, a)
    imaginary = tl.where(is_rope, a * sin + b * cos, b)
    return tl.reshape(tl.join(real, imaginary), [N * BLOCK_C])


@triton.jit
def hadamard(x, N: tl.constexpr, SCALE: tl.constexpr, COUNT: tl.constexpr = 1):
    """Sylvester-Hadamard transform of natural order of COUNT vectors in a row, times SCALE.

    N, their size, and COUNT are powers of two.

    Each stage pairs elements `half` apart; the pair has to be the last axis to be split.
    """
    y = x
    for stage in tl.static_range(0, 16):
        if 2**stage < N:
            y = _butterfly(y, COUNT * N, 2**stage)
    return y * SCALE


@triton.jit
def _butterfly(x, N: tl.constexpr, HALF: tl.constexpr):
    pairs = tl.permute(tl.reshape(x, [N // (2 * HALF), 2, HALF]), [0, 2, 1])
    even, odd = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(even + odd, even - odd), [0, 2, 1]), [N])
