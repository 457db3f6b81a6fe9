"""Sparse attention over window rings and compressed pages, reading FP8 records. Triton, SM 9 on.

The keys of a token are cut into tiles of TILE, always at the same places, and tiles into groups of
GROUP: the rule knows only how many keys there are. Where there are few tokens a program takes one
tile, so that the whole device works on them; where there are many it takes a group and writes no
partial results for short lists. Both add in one order, tiles into their group and groups into the
whole, with exact factors (see common.sparse_attention), so a token's bits do not depend on which
was chosen, nor on its neighbours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.attention_checks import (
    LOG2_E,
    Output,
    Shape,
    attention_shape,
    check_attention,
)
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.sparse_attention import (
    CHUNK,
    NO_KEYS,
    PIECE,
    attend_tiles,
    empty_state,
    load_piece,
    power_of_two,
    store_output,
)

REFERENCE = "dsv4.reference.paged_attention:sparse_attn_decode"
TILE = 64
CONFIG = {"TILE": TILE, "num_warps": 4, "num_stages": 2}
# Every step costs the interpreter, so that one takes more heads at once.
COMBINE = {"HEADS": 16 if INTERPRETED else 1, "UNROLL": 4, "num_warps": 1}
GROUP = 32  # tiles
SIZES = ["T", "H", "K", "max_pages", "tiles_each", "num_parts", "parts_of_group"]
FEW_PROGRAMS = 32  # below that many groups in flight, a program takes one tile


@triton.jit(do_not_specialize=SIZES)
def sparse_attn_decode_kernel(
    q_ptr, step_ptr, window_ptr, pages_ptr, table_ptr, entries_ptr, slot_ptr, position_ptr,
    first_row_ptr, first_position_ptr, sink_ptr, cos_ptr, sin_ptr, out_ptr, out_scale_ptr,
    sums_ptr, stats_ptr, scale, T, H, K, max_pages, tiles_each,
    NP: tl.constexpr, ROWS: tl.constexpr, WINDOW_STRIDE: tl.constexpr, PAGE_ROWS: tl.constexpr,
    PAGE_STRIDE: tl.constexpr, RATIO: tl.constexpr, IS_LIST: tl.constexpr,
    IS_WHOLE: tl.constexpr, IS_ROTATED: tl.constexpr, IS_FP8: tl.constexpr,
    BLOCK_H: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    C: tl.constexpr = NP * PIECE
    WINDOW_TILES: tl.constexpr = (ROWS + TILE - 1) // TILE
    head_blocks = tl.cdiv(H, BLOCK_H)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    h = (tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    slot = tl.load(slot_ptr + t)
    position = tl.load(position_ptr + t).to(tl.int32)
    visible = (position + 1) // RATIO
    num_entries = K if IS_LIST else tl.minimum(visible, K)
    num_tiles = tl.where(slot < 0, 0, WINDOW_TILES + tl.cdiv(num_entries, TILE))
    first = tl.program_id(1) * tiles_each
    if (first < num_tiles) | IS_WHOLE:
        end = tl.minimum(first + tiles_each, num_tiles)
        m, l, acc0, acc1, acc2, acc3 = attend_tiles(
            first, end, q_ptr + t * H * C, step_ptr, window_ptr + slot * WINDOW_STRIDE, pages_ptr,
            table_ptr + slot * max_pages, entries_ptr + t * K, position,
            tl.load(first_row_ptr + t).to(tl.int32), tl.load(first_position_ptr + t).to(tl.int32),
            h, scale, T, H, num_entries, visible, max_pages,
            NP, ROWS, PAGE_ROWS, PAGE_STRIDE, IS_LIST, BLOCK_H, TILE,
        )  # fmt: skip
        if IS_WHOLE:
            store_output(
                out_ptr + t * H * C, out_scale_ptr + t * H * NP, h, H, m, l, acc0, acc1, acc2, acc3,
                sink_ptr, cos_ptr + t * (CHUNK // 2), sin_ptr + t * (CHUNK // 2), NP, IS_ROTATED,
                IS_FP8,
            )  # fmt: skip
        else:
            part = t * tl.num_programs(1) + tl.program_id(1)
            store_partial(
                sums_ptr + part * H * C, stats_ptr + part * H * 2, h, H, m, l, acc0, acc1, acc2,
                acc3, NP,
            )  # fmt: skip


@triton.jit
def store_partial(
    sums_ptr, stats_ptr, h, H, m, l, acc0, acc1, acc2, acc3, NP: tl.constexpr
):  # fmt: skip
    """Leave the state of a token's heads for the combination: FP32 sums, m and l."""
    tl.store(stats_ptr + h * 2, m[:, None], h < H)
    tl.store(stats_ptr + h * 2 + 1, l[:, None], h < H)
    store_sums(sums_ptr, h, H, acc0, 0, NP)
    store_sums(sums_ptr, h, H, acc1, 1, NP)
    store_sums(sums_ptr, h, H, acc2, 2, NP)
    store_sums(sums_ptr, h, H, acc3, 3, NP)


@triton.jit
def store_sums(sums_ptr, h, H, acc, I: tl.constexpr, NP: tl.constexpr):
    """Write a piece of the sums of heads h [BLOCK_H, 1]."""
    if I < NP:
        c = I * PIECE + tl.arange(0, PIECE)[None, :]
        tl.store(sums_ptr + h * (NP * PIECE) + c, acc, h < H)


@triton.jit
def load_partial(sums_ptr, stats_ptr, head, H, NP: tl.constexpr):
    """What store_partial left of heads [HEADS]."""
    h = head[:, None]
    top = tl.load(stats_ptr + head * 2, head < H, NO_KEYS)
    total = tl.load(stats_ptr + head * 2 + 1, head < H, 0.0)
    sum0 = load_piece(sums_ptr, h, H, 0, NP)
    sum1 = load_piece(sums_ptr, h, H, 1, NP)
    sum2 = load_piece(sums_ptr, h, H, 2, NP)
    sum3 = load_piece(sums_ptr, h, H, 3, NP)
    return top, total, sum0, sum1, sum2, sum3


@triton.jit
def merge_states(m, l, acc0, acc1, acc2, acc3, top, total, sum0, sum1, sum2, sum3):
    """Merge a later state of heads [HEADS] into an earlier one, as attend_tile does."""
    new = tl.maximum(m, top)
    alpha, beta = power_of_two(m - new), power_of_two(top - new)
    l = tl.fma(total, beta, l * alpha)
    alpha, beta = alpha[:, None], beta[:, None]
    acc0 = tl.fma(sum0, beta, acc0 * alpha)
    acc1 = tl.fma(sum1, beta, acc1 * alpha)
    acc2 = tl.fma(sum2, beta, acc2 * alpha)
    acc3 = tl.fma(sum3, beta, acc3 * alpha)
    return new, l, acc0, acc1, acc2, acc3


@triton.jit(do_not_specialize=SIZES)
def sparse_attn_combine_kernel(
    sums_ptr, stats_ptr, slot_ptr, position_ptr, sink_ptr, cos_ptr, sin_ptr, out_ptr,
    out_scale_ptr, H, K, tiles_each, num_parts, parts_of_group,
    NP: tl.constexpr, WINDOW_TILES: tl.constexpr, RATIO: tl.constexpr, IS_LIST: tl.constexpr,
    IS_ROTATED: tl.constexpr, IS_FP8: tl.constexpr, TILE: tl.constexpr, HEADS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    C: tl.constexpr = NP * PIECE
    head_blocks = tl.cdiv(H, HEADS)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    head = (tl.program_id(0) % head_blocks) * HEADS + tl.arange(0, HEADS)
    visible = (tl.load(position_ptr + t).to(tl.int32) + 1) // RATIO
    num_entries = K if IS_LIST else tl.minimum(visible, K)
    num_tiles = tl.where(tl.load(slot_ptr + t) < 0, 0, WINDOW_TILES + tl.cdiv(num_entries, TILE))
    written = tl.cdiv(num_tiles, tiles_each)
    m, l, acc0, acc1, acc2, acc3 = empty_state(HEADS, NP)
    for start in range(0, written, parts_of_group):
        gm, gl, sum0, sum1, sum2, sum3 = empty_state(HEADS, NP)
        # Unrolled, so that the loads of several parts are under way together.
        for i in tl.range(
            start, tl.minimum(start + parts_of_group, written), loop_unroll_factor=UNROLL
        ):
            at = (t * num_parts + i) * H
            top, total, new0, new1, new2, new3 = load_partial(
                sums_ptr + at * C, stats_ptr + at * 2, head, H, NP
            )
            gm, gl, sum0, sum1, sum2, sum3 = merge_states(
                gm, gl, sum0, sum1, sum2, sum3, top, total, new0, new1, new2, new3
            )
        m, l, acc0, acc1, acc2, acc3 = merge_states(
            m, l, acc0, acc1, acc2, acc3, gm, gl, sum0, sum1, sum2, sum3
        )
    store_output(
        out_ptr + t * H * C, out_scale_ptr + t * H * NP, head[:, None], H, m, l, acc0, acc1, acc2,
        acc3, sink_ptr, cos_ptr + t * (CHUNK // 2), sin_ptr + t * (CHUNK // 2), NP, IS_ROTATED,
        IS_FP8,
    )  # fmt: skip


def tiles_of(shape: Shape, rows: int) -> tuple[int, int]:
    """Tiles that a token can have, and how many of them a program takes."""
    tiles = -(-rows // TILE) + -(-shape.num_entries // TILE)
    groups = shape.T * -(-shape.H // 64) * -(-tiles // GROUP)
    return tiles, 1 if groups < FEW_PROGRAMS else GROUP


def outputs(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate the result [T, H, C] and, where programs share a token, their sums and m, l."""
    shape = attention_shape(q, page_table, entries, rope_dim, entries_per_page)
    return torch.empty_like(q), *partials(shape, rows, q)


def partials(shape: Shape, rows: int, q: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the sums and m, l of programs that share a token."""
    tiles, each = tiles_of(shape, rows)
    parts = -(-tiles // each)
    size = (shape.T, parts if parts > 1 else 0, shape.H)
    sums = q.new_empty((*size, q.shape[2]), dtype=torch.float32)
    return sums, q.new_empty((*size, 2), dtype=torch.float32)


def launch(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    result, *shared = out
    args = (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, rope_dim, ratio, entries_per_page,
    )  # fmt: skip
    attend(args, Output(result), *shared)


def attend(args: tuple, out: Output, sums: Tensor, stats: Tensor) -> None:
    """Check the arguments of the op, and fill `out`, BF16 or FP8."""
    shape = check_attention(*args, out)
    if shape.T == 0 or shape.H == 0:
        return
    (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, _, ratio, entries_per_page,
    ) = args  # fmt: skip
    tiles, each = tiles_of(shape, rows)
    parts = -(-tiles // each)
    angles = (sink, sink) if cos is None else (cos, sin)
    sparse_attn_decode_kernel[(shape.T * shape.head_blocks, parts)](
        q, step, window, pages, page_table, entries if shape.is_list else page_table, slot,
        position, first_row, first_position, sink, *angles, *out.pointers(), sums, stats,
        scale * LOG2_E, shape.T, shape.H, shape.num_entries, page_table.shape[1], each,
        NP=shape.num_pieces, ROWS=rows, WINDOW_STRIDE=window.shape[1], PAGE_ROWS=entries_per_page,
        PAGE_STRIDE=shape.record.page_bytes(entries_per_page), RATIO=ratio, IS_LIST=shape.is_list,
        IS_WHOLE=parts == 1, IS_ROTATED=cos is not None, IS_FP8=out.scale is not None,
        BLOCK_H=shape.block_h, **CONFIG, **PDL,
    )  # fmt: skip
    if parts > 1:
        combine(shape, args, out, sums, stats, each, parts)


def combine(
    shape: Shape, args: tuple, out: Output, sums: Tensor, stats: Tensor, each: int, parts: int
) -> None:
    """Add the parts of each token, `each` tiles in one, in order; args are those of the op."""
    slot, position, sink, cos, sin, rows, ratio = (args[i] for i in (6, 7, 10, 11, 12, 14, 16))
    angles = (sink, sink) if cos is None else (cos, sin)
    sparse_attn_combine_kernel[(shape.T * -(-shape.H // COMBINE["HEADS"]),)](
        sums, stats, slot, position, sink, *angles, *out.pointers(), shape.H, shape.num_entries,
        each, parts, GROUP // each, NP=shape.num_pieces, WINDOW_TILES=-(-rows // TILE),
        RATIO=ratio, IS_LIST=shape.is_list, IS_ROTATED=cos is not None,
        IS_FP8=out.scale is not None, TILE=TILE, **COMBINE, **PDL,
    )  # fmt: skip


SPEC = KernelSpec("sparse_attn_decode/triton", launch, runs_on_cpu=INTERPRETED)
