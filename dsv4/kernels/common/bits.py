"""Casts by integer arithmetic: the same bits on every GPU, under the interpreter and in PyTorch.

The interpreter rounds FP32 to BF16 and to FP8 in another way than hardware, so no kernel that
stores bytes uses those casts. The rules are those of dsv4.reference.quant.
"""

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
FP8_FLOOR_BITS = tl.constexpr(0x38D1B717)  # 1e-4 in FP32, the least amax
FP4_MAX = tl.constexpr(6.0)
FP4_FLOOR_BITS = tl.constexpr(0x01C00000)  # 6 * 2^-126
ABS_MASK = tl.constexpr(0x7FFFFFFF)
INF_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
E8M0_NAN = tl.constexpr(255)


@triton.jit
def widen(x):
    """FP32 of a BF16 or FP32 tensor, exactly."""
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x
    return wide


@triton.jit
def bf16_bits(x):
    """The 16 bits of FP32 rounded to BF16, ties to even, as int32."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & ABS_MASK
    rounded = magnitude + 0x7FFF + ((magnitude >> 16) & 1)
    is_nan = magnitude > INF_BITS
    return tl.where(is_nan, NAN_BITS >> 16, (rounded >> 16)) | ((bits >> 16) & 0x8000)


@triton.jit
def round_to(x, BF16: tl.constexpr):
    """FP32 rounded to BF16 and back, or left alone."""
    return (bf16_bits(x) << 16).to(tl.float32, bitcast=True) if BF16 else x


@triton.jit
def narrow(x, BF16: tl.constexpr):
    """FP32 as BF16 or FP32, for a store."""
    return bf16_bits(x).to(tl.int16).to(tl.bfloat16, bitcast=True) if BF16 else x


@triton.jit
def e8m0_byte(amax_bits, FLOOR_BITS: tl.constexpr, MAX_VALUE: tl.constexpr):
    """Exponent byte of the smallest power of two that brings a block of that amax into range.

    amax_bits int32: magnitudes compare as integers, and NaN is above infinity, so it survives.
    """
    amax = tl.maximum(amax_bits, FLOOR_BITS).to(tl.float32, bitcast=True)
    bits = (amax * (1.0 / MAX_VALUE)).to(tl.int32, bitcast=True) & ABS_MASK
    return tl.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32), E8M0_NAN)


@triton.jit
def e8m0_value(byte):
    """2^(byte - 127) in FP32; 255 is NaN and 0 a subnormal number."""
    bits = tl.where(byte == 0, 0x400000, byte << 23)
    return tl.where(byte == E8M0_NAN, NAN_BITS, bits).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_inverse(byte):
    """2^(127 - byte) for the bytes 1 to 253 that `e8m0_byte` gives, NaN for 255."""
    bits = tl.where(byte == E8M0_NAN, NAN_BITS, (254 - byte) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def e4m3_code(x):
    """FP32 to E4M3, ties to even, saturating at 448, as int32 0 to 255. NaN is 127."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & ABS_MASK
    clamped = tl.minimum(magnitude, 0x43E00000)  # 448
    normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 codes are multiples of 2^-9, the unit in the last place of 2^14.
    shifted = clamped.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(clamped < 0x3C800000, subnormal, normal) | ((bits >> 24) & 0x80)
    return tl.where(magnitude > INF_BITS, 0x7F, code)


@triton.jit
def e4m3_value(code):
    """FP32 of E4M3 codes in int32."""
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)  # 2^-9
    bits = tl.where(magnitude == 0x7F, NAN_BITS, value.to(tl.int32, bitcast=True))
    return (bits | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_code(x):
    """FP32 to e2m1, ties to the even code, saturating at 6, as int32 0 to 15. NaN is 0."""
    bits = x.to(tl.int32, bitcast=True)
    a = (bits & ABS_MASK).to(tl.float32, bitcast=True)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32)
    code += (a >= 1.75).to(tl.int32) + (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32)
    code += (a > 5.0).to(tl.int32)
    return code | ((bits >> 28) & 8)


@triton.jit
def e2m1_value(code):
    """FP32 of e2m1 codes in int32."""
    exponent, mantissa = (code >> 1) & 3, code & 1
    normal = ((126 + exponent) << 23) | (mantissa << 22)
    bits = tl.where(exponent == 0, mantissa * 0x3F000000, normal)  # 0 or 0.5
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)


@triton.jit
def amax_bits(blocks):
    """Bits of the largest magnitude of each row of [groups, size]."""
    return tl.max(blocks.to(tl.int32, bitcast=True) & ABS_MASK, axis=1)


@triton.jit
def fp8_groups(x, N: tl.constexpr, GROUP: tl.constexpr):
    """E4M3 codes [N] and exponent bytes [N / GROUP] of FP32 [N], both int32."""
    blocks = tl.reshape(x, [N // GROUP, GROUP])
    byte = e8m0_byte(amax_bits(blocks), FP8_FLOOR_BITS, FP8_MAX)
    code = e4m3_code(blocks * e8m0_inverse(byte)[:, None])
    return tl.reshape(code, [N]), byte


@triton.jit
def mxfp4_groups(x, N: tl.constexpr):
    """Packed e2m1 [N / 2], low nibble first, and exponent bytes [N / 32] of FP32 [N]; int32."""
    blocks = tl.reshape(x, [N // 32, 32])
    byte = e8m0_byte(amax_bits(blocks), FP4_FLOOR_BITS, FP4_MAX)
    code = e2m1_code(blocks * e8m0_inverse(byte)[:, None])
    low, high = tl.split(tl.reshape(code, [N // 2, 2]))
    return low | (high << 4), byte
