"""Tiles of vectors, one a row: RMSNorm, RoPE and block scales as in dsv4.reference.

Casts use the conversion instructions of SM 8.9 and later where there are any, and the integer
rules of `bits` under the interpreter. Both give the same bits; only a BF16 NaN differs, of which
the instruction sets every bit but the sign.
"""

import triton
import triton.language as tl

from dsv4.kernels.common.bits import (
    ABS_MASK,
    FP4_FLOOR_BITS,
    FP4_MAX,
    FP8_FLOOR_BITS,
    FP8_MAX,
    amax_bits,
    bf16_bits,
    e4m3_code,
    e4m3_value,
    e8m0_byte,
    e8m0_inverse,
)
from dsv4.kernels.common.launch import INTERPRETED

HARDWARE = tl.constexpr(not INTERPRETED)
NVFP4_SCALE_MIN_BITS = tl.constexpr(0x3B000000)  # 2^-9, the smallest E4M3 above zero


@triton.jit
def to_bf16(x):
    """FP32 to BF16, ties to even."""
    if HARDWARE:
        return x.to(tl.bfloat16)
    return bf16_bits(x).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def cast(x, BF16: tl.constexpr):
    """FP32 as BF16 or FP32, for a store."""
    return to_bf16(x) if BF16 else x


@triton.jit
def rounded(x, BF16: tl.constexpr):
    """FP32 rounded to BF16 and back, or left alone."""
    return to_bf16(x).to(tl.float32) if BF16 else x


@triton.jit
def e4m3_byte(x):
    """FP32 to E4M3 as uint8, ties to even, saturating at 448. NaN is 127."""
    if HARDWARE:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return e4m3_code(x).to(tl.uint8)


@triton.jit
def e4m3_float(byte):
    """FP32 of E4M3 in uint8."""
    if HARDWARE:
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return e4m3_value(byte.to(tl.int32))


@triton.jit
def e2m1_nibble(x, signed):
    """FP32 to e2m1 as int32 0 to 15, the sign that of `signed`: `bits.e2m1_code` in fewer steps.

    Codes are 0.5 apart up to 2, then 1 up to 4, then 2. A sum with 2^22, 2^23 or 2^24 rounds to
    such multiples, ties to even, and the least of the three codes is the one of the right range.
    NaN is taken for infinity.
    """
    a = tl.abs(x)
    half = (a + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000
    one = (a + 8388608.0).to(tl.int32, bitcast=True) - (0x4B000000 - 2)
    two = (a + 16777216.0).to(tl.int32, bitcast=True) - (0x4B800000 - 4)
    code = tl.minimum(tl.minimum(half, one), tl.minimum(two, 7))
    return code | ((signed.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def rms_factor(x, eps, C: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each row, [n, 1], of FP32 [n, lanes]; lanes from C on are 0."""
    mean = tl.div_rn(tl.sum(x * x, axis=1), C * 1.0)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]


@triton.jit
def rotate_pairs(x, cos, sin, N: tl.constexpr, WIDTH: tl.constexpr, INVERSE: tl.constexpr):
    """Rotate FP32 [N, WIDTH]: columns 2i and 2i + 1 by the angle i of cos, sin [., WIDTH / 2]."""
    a, b = tl.split(tl.reshape(x, [N, WIDTH // 2, 2]))
    # Not with -sin, which Triton takes for 0 - sin: the sign of a zero would be another.
    if INVERSE:
        pairs = tl.join(a * cos + b * sin, b * cos - a * sin)
    else:
        pairs = tl.join(a * cos - b * sin, a * sin + b * cos)
    return tl.reshape(pairs, [N, WIDTH])


@triton.jit
def fp8_rows(x):
    """E4M3 and E8M0 of FP32 [groups, size], one scale a row; both uint8."""
    scale = e8m0_byte(amax_bits(x), FP8_FLOOR_BITS, FP8_MAX)
    return e4m3_byte(x * e8m0_inverse(scale)[:, None]), scale.to(tl.uint8)


@triton.jit
def mxfp4_rows(x, N: tl.constexpr, SIZE: tl.constexpr):
    """Packed e2m1 [N, SIZE / 2] and E8M0 [N] of FP32 [N, SIZE]; both uint8.

    NaN is left to its scale, so its code does not matter.
    """
    scale = e8m0_byte(amax_bits(x), FP4_FLOOR_BITS, FP4_MAX)
    return _pack(x * e8m0_inverse(scale)[:, None], x, N, SIZE), scale.to(tl.uint8)


@triton.jit
def nvfp4_rows(x, share, N: tl.constexpr, SIZE: tl.constexpr):
    """Packed e2m1 [N, SIZE / 2] and E4M3 [N] of FP32 [N, SIZE] under the global scale `share`."""
    amax = amax_bits(x).to(tl.float32, bitcast=True)
    ratio = tl.div_rn(amax, 6.0 * share).to(tl.int32, bitcast=True) & ABS_MASK
    # As integers, so that NaN, above every number, survives.
    code = e4m3_code(tl.maximum(ratio, NVFP4_SCALE_MIN_BITS).to(tl.float32, bitcast=True))
    scale = (e4m3_value(code) * share)[:, None]
    return _pack(tl.div_rn(x, scale), x, N, SIZE), code.to(tl.uint8)


@triton.jit
def _pack(x, signed, N: tl.constexpr, SIZE: tl.constexpr):
    low, high = tl.split(tl.reshape(e2m1_nibble(x, signed), [N, SIZE // 2, 2]))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def unpack_rows(packed, N: tl.constexpr, SIZE: tl.constexpr):
    """FP32 [N, SIZE] of packed e2m1 [N, SIZE / 2] in uint8."""
    byte = packed.to(tl.int32)
    return tl.reshape(tl.join(_e2m1_float(byte & 0xF), _e2m1_float(byte >> 4)), [N, SIZE])


@triton.jit
def _e2m1_float(code):
    # As FP32 fields exponent and mantissa mean the same number times 2^-126, subnormals too.
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
