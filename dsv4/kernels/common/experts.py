"""FP4 weights of experts from tiles (core.expert_tiles) into the registers that wgmma reads.

A step is 128 columns, 16 words of a weight row. A thread loads 4 of them, 32 columns, and holds
what it has to multiply once the columns of the other factor, the tokens, are in the same order:
`step_order`. That order is made once, where tokens are written, and costs the product nothing. As
in `fragments`, rows are loaded in another order too, here one that gives the product its own.
"""

import triton
import triton.language as tl

from dsv4.core import expert_tiles
from dsv4.kernels.common.fragments import mma
from dsv4.kernels.common.launch import INTERPRETED

IS_INTERPRETED = tl.constexpr(INTERPRETED)
TILE_ROWS = tl.constexpr(expert_tiles.ROWS)
STEP = tl.constexpr(expert_tiles.COLUMNS)  # that are permuted among themselves
WORDS = tl.constexpr(16)  # int32 that hold their codes
SIGN_AND_CODE = tl.constexpr(-0x7E400000)  # of a BF16 in the upper half: bits 31 and 24 to 22
UNSCALE = tl.constexpr(2.0**64)  # of products: `step_factors` leaves the weights times 2^-64


@triton.jit
def tiled(row, row_size, step, size):
    """Where in tiles is row `row` of tile `step` of a matrix: `row_size` a row, `size` a tile's."""
    return row // TILE_ROWS * (TILE_ROWS * row_size) + (step * TILE_ROWS + row % TILE_ROWS) * size


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
    """2^62 times the scale of each loaded word, [N, 16], as two BF16 in an int32.

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
    wide = tl.broadcast_to(factor[:, :, None], [N, STEP // GROUP, GROUP // 8])
    return tl.reshape(wide, [N, WORDS])


@triton.jit
def decode_e2m1(w, factor):
    """Eight codes in each int32, times 2^-126 `factor`, as BF16, exactly: four int32 of two.

    Of codes 0, 4 | 2, 6 | 1, 5 | 3, 7: codes 16 bits apart are decoded together, a multiplication
    shifting sign and magnitude to where BF16 has them.
    """
    if IS_INTERPRETED:
        scale = (factor << 16).to(tl.float32, bitcast=True)
        even, odd = _pair((w & 0xF000F) * 0x1040, scale), _pair((w & 0xF000F0) * 0x104, scale)
        w = w >> 8
        next_even = _pair((w & 0xF000F) * 0x1040, scale)
        next_odd = _pair((w & 0xF000F0) * 0x104, scale)
    else:
        even, next_even, odd, next_odd = tl.inline_asm_elementwise(
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
            "=r,=r,=r,=r,r,r",
            [w, factor],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return even, next_even, odd, next_odd


@triton.jit
def _pair(code, scale):
    low, high = (code << 16) & SIGN_AND_CODE, code & SIGN_AND_CODE
    low = (low.to(tl.float32, bitcast=True) * scale).to(tl.int32, bitcast=True)
    high = (high.to(tl.float32, bitcast=True) * scale).to(tl.int32, bitcast=True)
    return ((low >> 16) & 0xFFFF) | high


@triton.jit
def _halves(pair):
    """Two BF16 in an int32, as a new last dim."""
    low, high = pair.to(tl.int16), (pair >> 16).to(tl.int16)
    return tl.join(low.to(tl.bfloat16, bitcast=True), high.to(tl.bfloat16, bitcast=True))


@triton.jit
def multiply_step(
    w, scales, x, acc, N: tl.constexpr, GROUP: tl.constexpr, NVFP4: tl.constexpr,
    NUM_WARPS: tl.constexpr,
):  # fmt: skip
    """acc [N, M] plus 2^-64 times weights times tokens, 128 columns of both.

    w [N, 16] int32, scales [N], x [M, 128] in order
    """
    even, next_even, odd, next_odd = decode_e2m1(w, step_factors(scales, N, GROUP, NVFP4))
    even = tl.join(_halves(even), _halves(next_even))  # [N, 16, half, pair]
    odd = tl.join(_halves(odd), _halves(next_odd))
    # rows: repetition, half, warp, 8; columns: thread, step of 16, half, pair, odd
    t = tl.reshape(tl.join(even, odd), [N // (16 * NUM_WARPS), 2, NUM_WARPS, 8, 4, 4, 2, 2, 2])
    t = tl.reshape(tl.permute(t, [0, 2, 1, 3, 8, 5, 7, 4, 6]), [N, STEP])
    return mma(t, tl.trans(x), acc)


@triton.jit
def ordered_fp8_steps(x, N: tl.constexpr):
    """[N, 128] with the columns put in the order of `multiply_fp8_step`."""
    # thread, word, half, quad -> word, half, thread, quad
    t = tl.reshape(x, [N, 4, 4, 2, 4])
    return tl.reshape(tl.permute(t, [0, 2, 3, 1, 4]), [N, STEP])


@triton.jit
def largest_value(largest):
    """What sums over weights decoded with `step_tables` have to be multiplied with."""
    return ((largest - 6) << 23).to(tl.float32, bitcast=True)


@triton.jit
def step_tables(scales, largest, N: tl.constexpr):
    """E4M3 bytes of the eight magnitudes of e2m1 as two int32, for each loaded word, [N, 16].

    They are times 2^6 and the group's scale over the row's largest, which is exact down to 2^-11.
    A group with a smaller scale counts as zero.
    """
    byte = (scales[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255
    shift = 6 + byte - largest[:, None]
    low = tl.where(shift < -5, 0, 0x3C383000 + shift * 0x08080800)  # 0, 0.5, 1, 1.5
    high = tl.where(shift < -5, 0, 0x4C484440 + shift * 0x08080808)  # 2, 3, 4, 6
    low = tl.broadcast_to(low[:, :, None], [N, 4, 4])
    high = tl.broadcast_to(high[:, :, None], [N, 4, 4])
    return tl.reshape(low, [N, WORDS]), tl.reshape(high, [N, WORDS])


@triton.jit
def decode_e2m1_fp8(w, low, high, N: tl.constexpr):
    """Eight codes in each int32 as E4M3: codes 0 to 3 in one int32, 4 to 7 in another."""
    if IS_INTERPRETED:
        first, second = _look_up(w, low, high, N)
    else:
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 code, next, signs, odd;
            and.b32 code, $2, 0x77777777;
            shr.u32 next, code, 16;
            shl.b32 odd, $2, 4;
            prmt.b32 code, $3, $4, code;
            prmt.b32 signs, odd, $2, 0xd9c8;
            lop3.b32 $0, code, signs, 0x80808080, 0xf8;
            prmt.b32 code, $3, $4, next;
            prmt.b32 signs, odd, $2, 0xfbea;
            lop3.b32 $1, code, signs, 0x80808080, 0xf8;
            }""",
            "=r,=r,r,r,r",
            [w, low, high],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    return first, second


@triton.jit
def _look_up(w, low, high, N: tl.constexpr):
    i = tl.arange(0, 8)[None, None, :]
    code = (w[:, :, None] >> (4 * i)) & 15
    table = tl.where((code & 4) == 0, low[:, :, None], high[:, :, None])
    byte = ((table >> (8 * (code & 3))) & 127) | ((code & 8) << 4)
    quads = tl.reshape(byte << (8 * (i & 3)), [N, WORDS, 2, 4])
    return tl.split(tl.sum(quads, axis=3).to(tl.int32))


@triton.jit
def _quarters(quad):
    """Four E4M3 in an int32 as two new last dims, the second of the two the outer one of a byte."""
    even = tl.join(quad.to(tl.int8), (quad >> 8).to(tl.int8))
    odd = tl.join((quad >> 16).to(tl.int8), (quad >> 24).to(tl.int8))
    return tl.join(even, odd)


@triton.jit
def multiply_fp8_step(
    w, scales, largest, x, x_scale, acc, N: tl.constexpr, M: tl.constexpr, NUM_WARPS: tl.constexpr
):
    """acc [N, M] plus MXFP4 weights over `largest_value` times tokens in E4M3, 128 columns of both.

    w [N, 16] int32, scales and largest [N]; x [M, 128] in order, x_scale [M]
    """
    low, high = step_tables(scales, largest, N)
    first, second = decode_e2m1_fp8(w, low, high, N)
    t = tl.join(_quarters(first), _quarters(second))
    # rows: repetition, half, warp, 8; columns: thread, word, low bit, high bit of the quad, half
    t = tl.reshape(t, [N // (16 * NUM_WARPS), 2, NUM_WARPS, 8, 4, 4, 2, 2, 2])
    t = tl.reshape(tl.permute(t, [0, 2, 1, 3, 5, 8, 4, 7, 6]), [N, STEP])
    zero = tl.zeros([N, M], tl.float32)
    part = mma(t.to(tl.float8e4nv, bitcast=True), tl.trans(x), zero)
    return tl.fma(part, tl.broadcast_to(x_scale[None, :], [N, M]), acc)
