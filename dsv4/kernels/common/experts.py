"""FP4 weights of experts from the checkpoint's bytes into the registers that wgmma reads.

A step is 128 columns, 64 bytes of a weight row. A thread loads 16 of them, 32 columns, and holds
what it has to multiply once the columns of the other factor, the tokens, are in the same order:
`step_order`. That order is made once, where tokens are written, and costs the product nothing. As
in `fragments`, rows are loaded in another order too, here one that gives the product its own.
"""

import triton
import triton.language as tl

from dsv4.kernels.common.bits import e2m1_value, narrow
from dsv4.kernels.common.fragments import mma
from dsv4.kernels.common.launch import INTERPRETED

IS_INTERPRETED = tl.constexpr(INTERPRETED)
STEP = tl.constexpr(128)  # columns that are permuted among themselves
HALF = tl.constexpr(64)  # of them in a low nibble, as many in a high one
SMALLEST = tl.constexpr(2.0**-126)  # what a code has to be multiplied with to be read as BF16
UNSCALE = tl.constexpr(2.0**64)  # of products: `step_factors` leaves the weights times 2^-64


@triton.jit
def step_order(position):
    """The column of its step that is at `position`, 0 to 127, of a row in order."""
    thread, step = (position >> 1) & 3, (position >> 4) & 3
    half, pair, odd = position & 1, (position >> 3) & 1, position >> 6
    return (thread << 5) | (step << 3) | (half << 2) | (pair << 1) | odd


@triton.jit
def ordered_steps(x, N: tl.constexpr):
    """[N, 128] with the columns put in order: column i of the result is `step_order(i)`."""
    # thread, step, half, pair, odd -> odd, step, pair, thread, half
    t = tl.reshape(x, [N, 4, 4, 2, 2, 2])
    return tl.reshape(tl.permute(t, [0, 5, 2, 4, 1, 3]), [N, STEP])


@triton.jit
def load_rows(N: tl.constexpr, NUM_WARPS: tl.constexpr):
    """Which row of the product each of N loaded rows becomes after `weight_fragment`."""
    i = tl.arange(0, N)
    within = i % (16 * NUM_WARPS)
    half, warp = within // (8 * NUM_WARPS), within // 8 % NUM_WARPS
    return i - within + warp * 16 + half * 8 + i % 8


@triton.jit
def step_factors(scales, N: tl.constexpr, GROUP: tl.constexpr, NVFP4: tl.constexpr):
    """2^62 times the scale of each loaded byte, [N, 64], as two BF16 in an int32.

    scales [N]  the 4 (MXFP4, int32) or 8 (NVFP4, int64) scale bytes of a step
    """
    shift = (8 * tl.arange(0, STEP // GROUP)).to(scales.dtype)
    byte = ((scales[:, None] >> shift[None, :]) & 255).to(tl.int32)
    if NVFP4:
        tiny = ((byte & 0x7F) << 20).to(tl.float32, bitcast=True)  # the value times 2^-120
        bits = (tiny * 2.0**120 * 2.0**62).to(tl.int32, bitcast=True)
        factor = bits | (bits >> 16)
    else:
        factor = (byte + 62) * 0x00800080
    wide = tl.broadcast_to(factor[:, :, None], [N, STEP // GROUP, GROUP // 2])
    return tl.reshape(wide, [N, HALF])


@triton.jit
def decode_e2m1(w, factor, N: tl.constexpr):
    """Low and high nibbles of bytes [N, 64], times 2^-126 `factor`, as BF16 and exactly.

    The second and third of every four bytes change places: nibbles 16 bits apart in a register are
    decoded together, a multiplication shifting sign and magnitude to where BF16 has them.
    """
    if IS_INTERPRETED:
        t = tl.reshape(tl.permute(tl.reshape(w, [N, 16, 2, 2]), [0, 1, 3, 2]), [N, HALF])
        scale = (factor << 16).to(tl.float32, bitcast=True)
        low = narrow(e2m1_value(t.to(tl.int32) & 15) * SMALLEST * scale, True)
        high = narrow(e2m1_value(t.to(tl.int32) >> 4) * SMALLEST * scale, True)
    else:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 code, next;
            shr.u32 next, $4, 8;
            and.b32 code, $4, 0x000f000f;
            mul.lo.u32 code, code, 0x1040;
            and.b32 code, code, 0x81c081c0;
            mul.bf16x2 $0, code, $5;
            and.b32 code, next, 0x000f000f;
            mul.lo.u32 code, code, 0x1040;
            and.b32 code, code, 0x81c081c0;
            mul.bf16x2 $1, code, $5;
            and.b32 code, $4, 0x00f000f0;
            mul.lo.u32 code, code, 0x0104;
            and.b32 code, code, 0x81c081c0;
            mul.bf16x2 $2, code, $5;
            and.b32 code, next, 0x00f000f0;
            mul.lo.u32 code, code, 0x0104;
            and.b32 code, code, 0x81c081c0;
            mul.bf16x2 $3, code, $5;
            }""",
            "=r,=r,=r,=r,r,r,r,r,r",
            [w, factor],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def _fragment(low, high, N: tl.constexpr, NUM_WARPS: tl.constexpr):
    """Two times [N, 64] in the order of loading -> [N, 128] in the order of MMA fragments."""
    # rows: repetition, half, warp, 8; columns: thread, step of 16, pair, half, odd
    t = tl.reshape(tl.join(low, high), [N // (16 * NUM_WARPS), 2, NUM_WARPS, 8, 4, 4, 2, 2, 2])
    return tl.reshape(tl.permute(t, [0, 2, 1, 3, 8, 5, 6, 4, 7]), [N, STEP])


@triton.jit
def multiply_step(
    w, scales, x, acc, N: tl.constexpr, GROUP: tl.constexpr, NVFP4: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):  # fmt: skip
    """acc [N, M] plus 2^-64 times weights times tokens, 128 columns of both.

    w [N, 64] bytes, scales [N], x [M, 128] in order
    """
    low, high = decode_e2m1(w, step_factors(scales, N, GROUP, NVFP4), N)
    return mma(_fragment(low, high, N, NUM_WARPS), tl.trans(x), acc)
