"""FP8 weights from rows of a matrix straight into the registers that wgmma reads them from.

A thread that loads 16 bytes of a row owns 16 neighbouring columns, while an MMA wants two (BF16) or
four (FP8) neighbours a thread and the rest eight or sixteen apart. A product does not change when
the columns of both factors are permuted alike, so the order is chosen such that what a thread
loaded is what it has to hold, and the other factor, the small one, is permuted to match. The same
holds for rows: a warp loads eight neighbouring rows, twice, and `fragment_rows` says which.
In the SASS of Triton 3.6 a step is LDS.128, decode, HGMMA, with no exchange between threads.
"""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from dsv4.kernels.common.bits import (
    FP8_FLOOR_BITS,
    FP8_MAX,
    amax_bits,
    bf16_bits,
    e4m3_code,
    e4m3_value,
    e8m0_byte,
    e8m0_inverse,
    e8m0_value,
    widen,
)
from dsv4.kernels.common.launch import INTERPRETED

IS_INTERPRETED = tl.constexpr(INTERPRETED)
SPAN = tl.constexpr(64)  # columns that are permuted among themselves


@triton.jit
def decode_e4m3(w):
    """E4M3 bytes as BF16, exactly.

    Two codes lie in one 32-bit register as sign, then seven bits that are the low exponent and the
    mantissa bits of BF16; the product with 2^120 sets the exponent and covers subnormal codes.
    The codes of NaN, 0x7F and 0xFF, give 480: loaders refuse them.
    """
    if IS_INTERPRETED:
        bits = bf16_bits(e4m3_value(w.to(tl.int32)))
        out = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        out = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, sign, scale;
            mov.b32 scale, 0x7b807b80;
            prmt.b32 low, $2, 0, 0x1404;
            prmt.b32 high, $2, 0, 0x3424;
            and.b32 sign, low, 0x80008000;
            shr.b32 low, low, 4;
            lop3.b32 low, low, 0x07f007f0, sign, 0xEA;
            mul.bf16x2 $0, low, scale;
            and.b32 sign, high, 0x80008000;
            shr.b32 high, high, 4;
            lop3.b32 high, high, 0x07f007f0, sign, 0xEA;
            mul.bf16x2 $1, high, scale;
            }""",
            "=r,=r,r",
            [w],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return out


@triton.jit
def end_step(step):
    """Wait for the products of this step of a loop, the last thing in it; step int32 is its number.

    Needed where they take an operand from registers: Triton lets products run on into the next
    step, for whose numbers the compiler reuses such registers before all have been read (Triton
    3.6, H200: other last bits in every run). Within a step both know what is under way.
    """
    if not IS_INTERPRETED:  # noqa: SIM102, the interpreter has no target to ask for
        if cuda_capability_geq(9, 0) and not cuda_capability_geq(10, 0):
            tl.inline_asm_elementwise(
                "wgmma.wait_group.sync.aligned 0; mov.b32 $0, $1;", "=r,r", [step], dtype=tl.int32,
                is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def weight_fragment(w, N: tl.constexpr, NUM_WARPS: tl.constexpr):
    """[N, 64] in the order of loading -> the order of 16-bit MMA fragments."""
    # rows: repetition, half, warp, 8; columns: thread, step of 16, pair, half
    t = tl.reshape(w, [N // (16 * NUM_WARPS), 2, NUM_WARPS, 8, 4, 4, 2, 2])
    return tl.reshape(tl.permute(t, [0, 2, 1, 3, 5, 7, 4, 6]), [N, SPAN])


@triton.jit
def input_fragment(x, M: tl.constexpr):
    """Permute the columns of [M, 64] to match `weight_fragment`."""
    t = tl.reshape(x, [M, 4, 4, 2, 2])
    return tl.reshape(tl.permute(t, [0, 2, 4, 1, 3]), [M, SPAN])


@triton.jit
def fp8_fragment(w, N: tl.constexpr, NUM_WARPS: tl.constexpr):
    """Bytes [N, 64] in the order of loading -> E4M3 in the order of 8-bit MMA fragments."""
    # columns: thread, step of 32, half, quad
    t = tl.reshape(
        w.to(tl.float8e4nv, bitcast=True), [N // (16 * NUM_WARPS), 2, NUM_WARPS, 8, 4, 2, 2, 4]
    )
    return tl.reshape(tl.permute(t, [0, 2, 1, 3, 5, 6, 4, 7]), [N, SPAN])


@triton.jit
def fp8_input(x, M: tl.constexpr):
    """Permute the columns of [M, 64] to match `fp8_fragment`."""
    t = tl.reshape(x, [M, 4, 2, 2, 4])
    return tl.reshape(tl.permute(t, [0, 2, 3, 1, 4]), [M, SPAN])


@triton.jit
def fragment_rows(N: tl.constexpr, NUM_WARPS: tl.constexpr):
    """Which row of the matrix each row of a product of `weight_fragment` is."""
    i = tl.arange(0, N)
    group = i // (16 * NUM_WARPS) * (16 * NUM_WARPS)
    return group + (i // 8 % 2) * (8 * NUM_WARPS) + (i // 16 % NUM_WARPS) * 8 + i % 8


@triton.jit
def quantize_fp8_pair(x0, x1):
    """Both halves of 128 columns, BF16 [M, 64], as E4M3, and the scale of each token, [M] FP32."""
    x0, x1 = widen(x0), widen(x1)
    byte = e8m0_byte(tl.maximum(amax_bits(x0), amax_bits(x1)), FP8_FLOOR_BITS, FP8_MAX)
    inverse = e8m0_inverse(byte)[:, None]
    return _e4m3(x0 * inverse), _e4m3(x1 * inverse), e8m0_value(byte)


@triton.jit
def _e4m3(x):
    if IS_INTERPRETED:
        out = e4m3_code(x).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        out = x.to(tl.float8e4nv)
    return out


@triton.jit
def mma(a, b, acc):
    """acc + a b. The interpreter multiplies the bits of BF16 and FP8 as they lie: it gets FP32."""
    return tl.dot(_plain(a), _plain(b), acc) if IS_INTERPRETED else tl.dot(a, b, acc)


@triton.jit
def _plain(x):
    if x.dtype == tl.float8e4nv:
        wide = e4m3_value(x.to(tl.uint8, bitcast=True).to(tl.int32))
    else:
        wide = widen(x)
    return wide
