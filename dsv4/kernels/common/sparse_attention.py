"""What the attention kernels share: one tile of keys, the merge of partial results, the output.

A tile is scored, exponentiated and multiplied with V on its own; its result is then merged into a
running one. The reference of a tile's exponents is its maximum rounded up to an integer (in units
of log2), so every factor of a merge is a power of two and exact: tiles merged in one program, and
the same tiles merged by another kernel from memory, give the same bits.

A record is read in chunks of 64 bytes: one for each group of nope dims, two for the 64 RoPE dims.
So every load of a tile has the same layout, and a thread that has found its row keeps it. Two
chunks make a piece of 128 dims; a head has NP pieces, at most four, the last one ends with RoPE.
"""

import triton
import triton.language as tl

from dsv4.kernels.common.attention_checks import LOG2_E as _LOG2_E
from dsv4.kernels.common.attention_checks import PIECE_DIMS
from dsv4.kernels.common.bits import E8M0_NAN, e4m3_value, e8m0_value, narrow, widen
from dsv4.kernels.common.launch import INTERPRETED as _INTERPRETED
from dsv4.kernels.common.rows import fp8_rows

INTERPRETED = tl.constexpr(_INTERPRETED)
CHUNK = tl.constexpr(64)  # bytes; dims that share a scale; RoPE dims
PIECE = tl.constexpr(PIECE_DIMS)
SCALE_BYTES = tl.constexpr(8)  # of a record: 7 scales at most, read as one word
NO_KEYS = tl.constexpr(-1e30)  # the maximum of an empty set; finite, so that differences exist
LOG2_E = tl.constexpr(_LOG2_E)


@triton.jit
def to_bf16(x):
    """FP32 rounded to BF16, ties to even."""
    return narrow(x, True) if INTERPRETED else x.to(tl.bfloat16)


@triton.jit
def dot(a, b, acc):
    """acc + a b in FP32; the interpreter takes BF16 for integers."""
    return tl.dot(widen(a), widen(b), acc) if INTERPRETED else tl.dot(a, b, acc)


@triton.jit
def power_of_two(exponent):
    """2^exponent for integers up to 127 held in FP32; 0 below the normal numbers."""
    bits = (tl.maximum(exponent, -127.0).to(tl.int32) + 127) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def dequantise(code, byte):
    """E4M3 codes (uint8 [TILE, 64]) times 2^(byte [TILE, 1] - 127), exactly, as BF16.

    A code's bits, moved to their places in BF16, stand for its value times 2^-120, subnormal
    numbers included; one packed product takes that back, another applies the scale. Byte 255 is
    NaN. A NaN code is read as 480: records mark NaN by their scale.
    """
    if INTERPRETED:
        value = to_bf16(e4m3_value(code.to(tl.int32)) * e8m0_value(byte))
    else:
        bits = tl.where(byte == 0, 0x40, byte << 7)
        scale = tl.where(byte == E8M0_NAN, 0x7FC0, bits).to(tl.int16).to(tl.bfloat16, bitcast=True)
        value = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 lo, hi, m, one, none;
            mov.b32 one, 0x7B807B80;
            mov.b32 none, 0x80008000;
            prmt.b32 lo, $2, 0, 0x1404;
            prmt.b32 hi, $2, 0, 0x3424;
            shr.b32 m, lo, 4;
            and.b32 m, m, 0x07F007F0;
            lop3.b32 lo, lo, none, m, 0xEA;
            shr.b32 m, hi, 4;
            and.b32 m, m, 0x07F007F0;
            lop3.b32 hi, hi, none, m, 0xEA;
            fma.rn.bf16x2 lo, lo, one, none;
            fma.rn.bf16x2 hi, hi, one, none;
            fma.rn.bf16x2 $0, lo, $3, none;
            fma.rn.bf16x2 $1, hi, $4, none;
            }
            """,
            "=r,=r,r,r,r",
            [code, tl.broadcast_to(scale, code.shape)],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    return value


@triton.jit
def load_chunk(row_ptr, live, I: tl.constexpr):
    """Bytes 64 I .. of each row, uint8 [TILE, 64]."""
    return tl.load(row_ptr + (I * CHUNK + tl.arange(0, CHUNK)[None, :]), live, 0)


@triton.jit
def side_by_side(a, b):
    """[n, w] and [n, w] -> [n, 2 w]."""
    return tl.reshape(tl.permute(tl.join(a, b), [0, 2, 1]), [a.shape[0], 2 * a.shape[1]])


@triton.jit
def bf16_of_bytes(chunk):
    """Pairs of bytes, low byte first, as BF16: [TILE, 64] -> [TILE, 32]."""
    pairs = tl.reshape(chunk, [chunk.shape[0], CHUNK // 2, 2])
    low, high = tl.split(pairs)
    return (low.to(tl.int16) | (high.to(tl.int16) << 8)).to(tl.bfloat16, bitcast=True)


@triton.jit
def load_keys(row_ptr, word, live, I: tl.constexpr, NP: tl.constexpr):
    """Piece I of each key, BF16 [TILE, 128]; zeros where not live. word [TILE, 1]: its scales."""
    a = dequantise(load_chunk(row_ptr, live, 2 * I), ((word >> (16 * I)) & 0xFF).to(tl.int32))
    if I + 1 == NP:
        low = bf16_of_bytes(load_chunk(row_ptr, live, 2 * I + 1))
        b = side_by_side(low, bf16_of_bytes(load_chunk(row_ptr, live, 2 * I + 2)))
    else:
        byte = ((word >> (16 * I + 8)) & 0xFF).to(tl.int32)
        b = dequantise(load_chunk(row_ptr, live, 2 * I + 1), byte)
    return side_by_side(a, b)


@triton.jit
def empty_state(BLOCK_H: tl.constexpr, NP: tl.constexpr):
    """m, l and acc0..3 of heads that have seen no key; a placeholder for an absent piece."""
    m, l = tl.full([BLOCK_H], NO_KEYS, tl.float32), tl.zeros([BLOCK_H], tl.float32)
    acc0 = tl.zeros([BLOCK_H, PIECE], tl.float32)
    acc1 = tl.zeros([BLOCK_H, PIECE if NP > 1 else 1], tl.float32)
    acc2 = tl.zeros([BLOCK_H, PIECE if NP > 2 else 1], tl.float32)
    acc3 = tl.zeros([BLOCK_H, PIECE if NP > 3 else 1], tl.float32)
    return m, l, acc0, acc1, acc2, acc3


@triton.jit
def load_piece(ptr, h, H, I: tl.constexpr, NP: tl.constexpr):
    """Piece I of the heads `h` [BLOCK_H, 1] of a [H, C] array."""
    if I < NP:
        c = I * PIECE + tl.arange(0, PIECE)[None, :]
        x = tl.load(ptr + h * (NP * PIECE) + c, h < H, 0.0)
    else:
        x = tl.zeros([h.shape[0], 1], tl.float32)
    return x


@triton.jit
def score_piece(s, q, row_ptr, word, live, I: tl.constexpr, NP: tl.constexpr):
    """Add the logits of piece I. row_ptr, word (scales), live [TILE, 1] -> s, keys BF16."""
    if I < NP:
        k = load_keys(row_ptr, word, live, I, NP)
        s = dot(q, tl.trans(k), s)
    else:
        k = q
    return s, k


@triton.jit
def merge_piece(acc, p, k, alpha, beta, I: tl.constexpr, NP: tl.constexpr):
    """acc alpha + (p k) beta; p [BLOCK_H, TILE] BF16, k [TILE, 128]."""
    if I < NP:
        acc = tl.fma(dot(p, k, tl.zeros_like(acc)), beta[:, None], acc * alpha[:, None])
    return acc


@triton.jit
def attend_tile(
    m, l, acc0, acc1, acc2, acc3, q0, q1, q2, q3, row_ptr, scale_ptr, live, scale,
    NP: tl.constexpr,
):  # fmt: skip
    """Merge one tile of keys, which are also the values.

    m, l       [BLOCK_H] integer reference of the exponents and sum of the numerators so far
    acc0..3    [BLOCK_H, 128] sums of numerator times value
    row_ptr    [TILE, 1] uint8 data parts of records
    scale_ptr  [TILE, 1] their scale parts
    live       [TILE, 1] bool; others are skipped and not read
    scale      of the logits, times log2(e)
    """
    word = tl.load(scale_ptr.to(tl.pointer_type(tl.int64)), live, 0)
    s = tl.zeros([m.shape[0], live.shape[0]], tl.float32)
    s, k0 = score_piece(s, q0, row_ptr, word, live, 0, NP)
    s, k1 = score_piece(s, q1, row_ptr, word, live, 1, NP)
    s, k2 = score_piece(s, q2, row_ptr, word, live, 2, NP)
    s, k3 = score_piece(s, q3, row_ptr, word, live, 3, NP)
    s = tl.where(tl.trans(live), s, float("-inf"))
    top = tl.maximum(tl.ceil(tl.max(s, axis=1) * scale), NO_KEYS)
    p = to_bf16(tl.exp2(tl.fma(s, scale + tl.zeros_like(s), tl.zeros_like(s) - top[:, None])))
    new = tl.maximum(m, top)
    alpha, beta = power_of_two(m - new), power_of_two(top - new)
    # The numerators as rounded, so that their errors leave the weights' sum at one.
    l = tl.fma(tl.sum(widen(p), axis=1), beta, l * alpha)
    acc0 = merge_piece(acc0, p, k0, alpha, beta, 0, NP)
    acc1 = merge_piece(acc1, p, k1, alpha, beta, 1, NP)
    acc2 = merge_piece(acc2, p, k2, alpha, beta, 2, NP)
    acc3 = merge_piece(acc3, p, k3, alpha, beta, 3, NP)
    return new, l, acc0, acc1, acc2, acc3


@triton.jit
def window_rows(
    j, step_ptr, ring_ptr, T, position, first_row, first_position,
    ROWS: tl.constexpr, DATA: tl.constexpr,
):  # fmt: skip
    """Data and scale parts of window keys j [TILE, 1], oldest first, and which exist.

    Tokens from first_position on are rows of the step's page of T records, others of the ring.
    """
    at = position - ROWS + 1 + j
    live = (j < ROWS) & (at >= 0)
    is_new = at >= first_position
    new_row, old_row = first_row + (at - first_position), at % ROWS
    row_ptr = tl.where(is_new, step_ptr + new_row * DATA, ring_ptr + old_row * DATA)
    scale_ptr = tl.where(
        is_new,
        step_ptr + T * DATA + new_row * SCALE_BYTES,
        ring_ptr + ROWS * DATA + old_row * SCALE_BYTES,
    )
    return tl.multiple_of(row_ptr, (16, 16)), tl.multiple_of(scale_ptr, (8, 8)), live


@triton.jit
def entry_rows(
    j, entries_ptr, pages_ptr, table_ptr, num_entries, visible, max_pages,
    PAGE_ROWS: tl.constexpr, STRIDE: tl.constexpr, DATA: tl.constexpr, IS_LIST: tl.constexpr,
):  # fmt: skip
    """Data and scale parts of the compressed keys j [TILE, 1] of one query, and which exist."""
    entry = tl.load(entries_ptr + j, j < num_entries, -1).to(tl.int32) if IS_LIST else j
    index = entry // PAGE_ROWS
    live = (j < num_entries) & (entry >= 0) & (entry < visible) & (index < max_pages)
    page = tl.load(table_ptr + index, live, 0).to(tl.int64)
    live &= page > 0
    row = entry % PAGE_ROWS
    page_ptr = pages_ptr + page * STRIDE
    return page_ptr + row * DATA, page_ptr + (PAGE_ROWS * DATA + row * SCALE_BYTES), live


@triton.jit
def attend_tiles(
    first, end, q_ptr, step_ptr, ring_ptr, pages_ptr, table_ptr, entries_ptr, position, first_row,
    first_position, h, scale, T, H, num_entries, visible, max_pages,
    NP: tl.constexpr, ROWS: tl.constexpr, PAGE_ROWS: tl.constexpr, STRIDE: tl.constexpr,
    IS_LIST: tl.constexpr, BLOCK_H: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Tiles first .. end - 1 of the keys of one query: the window's, then the entries'.

    Pointers are those of the query, its slot and its row of the entry list. -> m, l, acc0..3
    """
    DATA: tl.constexpr = NP * PIECE + CHUNK
    WINDOW_TILES: tl.constexpr = (ROWS + TILE - 1) // TILE
    q0, q1 = load_piece(q_ptr, h, H, 0, NP), load_piece(q_ptr, h, H, 1, NP)
    q2, q3 = load_piece(q_ptr, h, H, 2, NP), load_piece(q_ptr, h, H, 3, NP)
    m, l, acc0, acc1, acc2, acc3 = empty_state(BLOCK_H, NP)
    j = tl.arange(0, TILE)[:, None]
    for i in range(first, tl.minimum(end, WINDOW_TILES)):
        row_ptr, scale_ptr, live = window_rows(
            i * TILE + j, step_ptr, ring_ptr, T, position, first_row, first_position, ROWS, DATA
        )
        m, l, acc0, acc1, acc2, acc3 = attend_tile(
            m, l, acc0, acc1, acc2, acc3, q0, q1, q2, q3, row_ptr, scale_ptr, live, scale,
            NP,
        )  # fmt: skip
    for i in range(tl.maximum(first, WINDOW_TILES), end):
        row_ptr, scale_ptr, live = entry_rows(
            (i - WINDOW_TILES) * TILE + j, entries_ptr, pages_ptr, table_ptr, num_entries,
            visible, max_pages, PAGE_ROWS, STRIDE, DATA, IS_LIST,
        )  # fmt: skip
        m, l, acc0, acc1, acc2, acc3 = attend_tile(
            m, l, acc0, acc1, acc2, acc3, q0, q1, q2, q3, row_ptr, scale_ptr, live, scale,
            NP,
        )  # fmt: skip
    return m, l, acc0, acc1, acc2, acc3


@triton.jit
def finish(m, l, sink):
    """One over the softmax denominator; the sink, in units of logits, joins it here."""
    total = l + tl.exp2(sink * LOG2_E - m)
    return tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))


@triton.jit
def rotate_back(x, cos_ptr, sin_ptr):
    """Inverse RoPE of the last 64 of 128 dims [BLOCK_H, 128]; dims 2i and 2i + 1 are a pair."""
    a, b = tl.split(tl.reshape(x, [x.shape[0], PIECE // 2, 2]))
    i = tl.arange(0, PIECE // 2)[None, :] - CHUNK // 2
    cos = tl.load(cos_ptr + i, i >= 0, 1.0) + tl.zeros_like(a)
    sin = tl.load(sin_ptr + i, i >= 0, 0.0) + tl.zeros_like(a)
    # Spelled as FMA: whatever else the compiler fuses, two kernels round alike.
    real, imaginary = tl.fma(a, cos, b * sin), tl.fma(b, cos, -(a * sin))
    return tl.reshape(tl.join(real, imaginary), [x.shape[0], PIECE])


@triton.jit
def store_piece(
    out_ptr, out_scale_ptr, h, H, acc, inverse, cos_ptr, sin_ptr, I: tl.constexpr,
    NP: tl.constexpr, IS_ROTATED: tl.constexpr, IS_FP8: tl.constexpr,
):  # fmt: skip
    """Finish and write piece I of the heads h [BLOCK_H, 1] of one query.

    BF16, or if IS_FP8 what that rounds to: a piece is the 128 dims that share a scale.
    """
    if I < NP:
        x = acc * inverse
        if IS_ROTATED and I + 1 == NP:
            x = rotate_back(x, cos_ptr, sin_ptr)
        c = I * PIECE + tl.arange(0, PIECE)[None, :]
        y = to_bf16(x)
        if IS_FP8:
            code, byte = fp8_rows(widen(y))
            tl.store(out_ptr + h * (NP * PIECE) + c, code, h < H)
            tl.store(out_scale_ptr + h * NP + I, byte[:, None], h < H)
        else:
            tl.store(out_ptr + h * (NP * PIECE) + c, y, h < H)


@triton.jit
def store_output(
    out_ptr, out_scale_ptr, h, H, m, l, acc0, acc1, acc2, acc3, sink_ptr, cos_ptr, sin_ptr,
    NP: tl.constexpr, IS_ROTATED: tl.constexpr, IS_FP8: tl.constexpr,
):  # fmt: skip
    """Divide, rotate back and write the heads h [BLOCK_H, 1] of one query."""
    sink = tl.load(sink_ptr + h, h < H, 0.0)
    inverse = finish(m[:, None], l[:, None], sink)
    store_piece(
        out_ptr, out_scale_ptr, h, H, acc0, inverse, cos_ptr, sin_ptr, 0, NP, IS_ROTATED, IS_FP8
    )
    store_piece(
        out_ptr, out_scale_ptr, h, H, acc1, inverse, cos_ptr, sin_ptr, 1, NP, IS_ROTATED, IS_FP8
    )
    store_piece(
        out_ptr, out_scale_ptr, h, H, acc2, inverse, cos_ptr, sin_ptr, 2, NP, IS_ROTATED, IS_FP8
    )
    store_piece(
        out_ptr, out_scale_ptr, h, H, acc3, inverse, cos_ptr, sin_ptr, 3, NP, IS_ROTATED, IS_FP8
    )
