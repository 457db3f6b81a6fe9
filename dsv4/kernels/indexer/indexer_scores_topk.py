"""RoPE and rounding of queries, scores of index keys read from pages, top k. Triton, from SM 9.0.

Three launches, each started while the one before it still runs: queries; scores; choice (a fourth
merges blocks beyond 32K tokens of context). Scores go to a scratch of at most SCRATCH_BYTES, that
many queries at a time, and never to a buffer of all queries. The score of an entry is the same
bits however entries are split over programs and whichever queries share them, so splits may
follow the batch and the choice does not depend on it.

Key values times query values are exact in the matrix unit: E4M3 as FP16, or everything as BF16,
never as FP8, whose sums are not full FP32 on Hopper. Scales are powers of two and applied to sums.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.dispatch import KernelSpec
from dsv4.core.kv_layout import IndexRecord
from dsv4.kernels.common.bits import (
    FP4_FLOOR_BITS,
    FP4_MAX,
    amax_bits,
    e2m1_code,
    e2m1_value,
    e4m3_value,
    e8m0_byte,
    e8m0_inverse,
    e8m0_value,
    fp8_groups,
    narrow,
    round_to,
    widen,
)
from dsv4.kernels.common.checks import (
    check_aligned,
    check_angles,
    check_float,
    check_int,
    check_stride,
)
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.vectors import hadamard, rope
from dsv4.kernels.indexer.topk_select import launch_select, winner_shape

REFERENCE = "dsv4.reference.paged_indexer:indexer_scores_topk"
# TILES from so many queries on: QUERIES that a program takes, BLOCK keys of a tile, STAGES of tiles
# under way. They and PROGRAMS were swept on an H200 at 64 requests of 32K tokens; one dot for all
# heads of a key gives its score the same bits in any of them. SCRATCH_BYTES: 64 queries of a
# million tokens.
CONFIG = {
    "HEADS": 4, "PROGRAMS": 528, "num_warps": 4, "SCRATCH_BYTES": 64 << 20,
    "TILES": (
        (256, {"QUERIES": 4, "BLOCK": 128, "STAGES": 3}),
        (0, {"QUERIES": 1, "BLOCK": 64, "STAGES": 5}),
    ),
}  # fmt: skip
_IS_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def visible_entries(slot, position, ratio, capacity):
    """How many entries a query sees; none for padding."""
    visible = tl.minimum(tl.maximum((position + 1) // ratio, 0), capacity)
    return tl.where(slot >= 0, visible, 0).to(tl.int32)


@triton.jit
def indexer_query_kernel(
    q_ptr, weights_ptr, slot_ptr, position_ptr, cos_ptr, sin_ptr, query_ptr, scaled_ptr,
    visible_ptr, ratio, capacity, I,
    J: tl.constexpr, R: tl.constexpr, HEADS: tl.constexpr, MXFP4: tl.constexpr,
    ROTATE: tl.constexpr, ROUND: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Turn the last R dims of HEADS heads of a query, rotate and round the heads.

    The scale of an FP8 query goes to its weight.
    """
    # In this order: the scores load keys, some of this step, before they wait.
    wait_for_previous()
    let_next_start()
    t, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    position = tl.load(position_ptr + t)
    if first == 0:
        visible = visible_entries(tl.load(slot_ptr + t), position, ratio, capacity)
        tl.store(visible_ptr + t, visible.to(tl.int64))
    n, h = tl.arange(0, HEADS * J), tl.arange(0, HEADS)
    at = (t * I + first) * J + n
    is_live = first + n // J < I
    loaded = tl.load(q_ptr + at, is_live, 0.0)
    x = widen(loaded)
    if R > 0:
        x = rope(x, cos_ptr, sin_ptr, position, J, R, J, HEADS)
        x = round_to(x, loaded.dtype == tl.bfloat16)
    if ROTATE:
        x = round_to(hadamard(x, J, SCALE, HEADS), loaded.dtype == tl.bfloat16)
    weight = tl.load(weights_ptr + t * I + first + h, first + h < I, 0.0)
    if not ROUND:
        out = narrow(x, True)
    elif MXFP4:
        blocks = tl.reshape(x, [HEADS * J // 32, 32])
        byte = e8m0_byte(amax_bits(blocks), FP4_FLOOR_BITS, FP4_MAX)[:, None]
        value = e2m1_value(e2m1_code(blocks * e8m0_inverse(byte))) * e8m0_value(byte)
        out = narrow(tl.reshape(value, [HEADS * J]), True)
    else:
        code, byte = fp8_groups(x, HEADS * J, J)
        out = e4m3_value(code).to(tl.float16)
        weight *= e8m0_value(byte)
    if MXFP4:  # even dims of a group first, as the nibbles of a key are taken apart
        c = n % 32
        at += (c % 2) * 16 + c // 2 - c
    tl.store(query_ptr + at, out, is_live)
    tl.store(scaled_ptr + t * I + first + h, weight, first + h < I)


@triton.jit
def _load_keys(
    pages_ptr, table_ptr, tile, length, page_stride,
    J: tl.constexpr, PER_PAGE: tl.constexpr, MXFP4: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Value bytes of a tile of keys, a tuple of matrices, and their four scale bytes [BLOCK].

    Zeros, and no access, from `length` on and for entries of the null page.
    """
    BYTES: tl.constexpr = J // 2 if MXFP4 else J
    i = tl.arange(0, BLOCK)
    if PER_PAGE % BLOCK == 0 or BLOCK % PER_PAGE == 0:  # few pages: one number each
        row = (tile * BLOCK) % PER_PAGE + i % PER_PAGE
        page = tl.zeros([BLOCK], tl.int64)
        for n in tl.static_range((BLOCK + PER_PAGE - 1) // PER_PAGE):
            start = tile * BLOCK + n * PER_PAGE
            own = tl.load(table_ptr + start // PER_PAGE, start < length, 0).to(tl.int64)
            page = tl.where(i // PER_PAGE == n, own, page) if BLOCK > PER_PAGE else page + own
    else:
        entry = tile * BLOCK + i
        page = tl.load(table_ptr + entry // PER_PAGE, entry < length, 0).to(tl.int64)
        row = entry % PER_PAGE
    is_live = (page > 0) & (tile * BLOCK + i < length)
    page_ptr = pages_ptr + page * page_stride
    row_ptr = (page_ptr + row * BYTES)[:, None]
    if MXFP4:  # a tile for each scale
        c = tl.arange(0, 16)[None, :]
        v0 = tl.load(row_ptr + c, is_live[:, None], 0)
        v1 = tl.load(row_ptr + 16 + c, is_live[:, None], 0)
        v2 = tl.load(row_ptr + 32 + c, is_live[:, None], 0)
        v3 = tl.load(row_ptr + 48 + c, is_live[:, None], 0)
        values = (v0, v1, v2, v3)
    else:
        values = (tl.load(row_ptr + tl.arange(0, J)[None, :], is_live[:, None], 0),)
    scale_ptr = (page_ptr + PER_PAGE * BYTES).to(tl.pointer_type(tl.int32), bitcast=True)
    return values, tl.load(scale_ptr + row, is_live, 0)


@triton.jit
def _load_query(
    query_ptr, weights_ptr, t, I,
    J: tl.constexpr, BLOCK_I: tl.constexpr, MXFP4: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_I] of the heads of query t, and the heads as right operands of dots.

    One operand [J, BLOCK_I] for FP8 keys; for MXFP4 even and odd dims of each group of 32.
    """
    h = tl.arange(0, BLOCK_I)
    weights = tl.load(weights_ptr + t * I + h, h < I, 0.0)
    is_head, at = (h < I)[:, None], query_ptr + (t * I + h)[:, None] * J
    if MXFP4:
        c = tl.arange(0, 16)[None, :]
        query = (
            weights,
            tl.trans(tl.load(at + c, is_head, 0.0)), tl.trans(tl.load(at + 16 + c, is_head, 0.0)),
            tl.trans(tl.load(at + 32 + c, is_head, 0.0)),
            tl.trans(tl.load(at + 48 + c, is_head, 0.0)),
            tl.trans(tl.load(at + 64 + c, is_head, 0.0)),
            tl.trans(tl.load(at + 80 + c, is_head, 0.0)),
            tl.trans(tl.load(at + 96 + c, is_head, 0.0)),
            tl.trans(tl.load(at + 112 + c, is_head, 0.0)),
        )  # fmt: skip
    else:
        query = (weights, tl.trans(tl.load(at + tl.arange(0, J)[None, :], is_head, 0.0)))
    return query


@triton.jit
def _load_queries(
    query_ptr, weights_ptr, first, T, I,
    J: tl.constexpr, BLOCK_I: tl.constexpr, MXFP4: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """A tuple of QUERIES queries from `first` on; the last one again past the end."""
    q0 = _load_query(query_ptr, weights_ptr, first, I, J, BLOCK_I, MXFP4)
    if QUERIES == 1:
        queries = (q0,)
    else:
        t1, t2 = tl.minimum(first + 1, T - 1), tl.minimum(first + 2, T - 1)
        q1 = _load_query(query_ptr, weights_ptr, t1, I, J, BLOCK_I, MXFP4)
        if QUERIES == 2:
            queries = (q0, q1)
        else:
            q2 = _load_query(query_ptr, weights_ptr, t2, I, J, BLOCK_I, MXFP4)
            t3 = tl.minimum(first + 3, T - 1)
            q3 = _load_query(query_ptr, weights_ptr, t3, I, J, BLOCK_I, MXFP4)
            queries = (q0, q1, q2, q3)
    return queries


@triton.jit
def _nibbles(byte):
    """BF16 of the low and of the high e2m1 code of each byte."""
    if _IS_INTERPRETED:
        code = byte.to(tl.int32)
        low, high = narrow(e2m1_value(code & 0xF), True), narrow(e2m1_value(code >> 4), True)
    else:
        # A code's exponent and mantissa are those of a BF16 2^126 times smaller.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b, t, u, k;
            mov.b32 k, 0x7E807E80;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            shl.b32 t, a, 6;
            shl.b32 u, a, 12;
            and.b32 t, t, 0x01C001C0;
            lop3.b32 t, u, 0x80008000, t, 0xEA;
            mul.rn.bf16x2 $0, t, k;
            shl.b32 t, b, 6;
            shl.b32 u, b, 12;
            and.b32 t, t, 0x01C001C0;
            lop3.b32 t, u, 0x80008000, t, 0xEA;
            mul.rn.bf16x2 $1, t, k;
            shl.b32 t, a, 2;
            shl.b32 u, a, 8;
            and.b32 t, t, 0x01C001C0;
            lop3.b32 t, u, 0x80008000, t, 0xEA;
            mul.rn.bf16x2 $2, t, k;
            shl.b32 t, b, 2;
            shl.b32 u, b, 8;
            and.b32 t, t, 0x01C001C0;
            lop3.b32 t, u, 0x80008000, t, 0xEA;
            mul.rn.bf16x2 $3, t, k;
            }""",
            "=r,=r,=r,=r,r", [byte], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    return low, high


@triton.jit
def _operand(x):
    """The interpreter multiplies BF16 as if its bits were integers."""
    return widen(x) if _IS_INTERPRETED and x.dtype == tl.bfloat16 else x


@triton.jit
def _store_scores(
    scores_ptr, S, values, scale, queries, tile, lengths,
    J: tl.constexpr, MXFP4: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr,
    OPERAND: tl.constexpr,
):  # fmt: skip
    """score = scale * sum_h u_h ReLU(q_h . k), of a tile of keys and each query.

    One dot of the same shape and one sum a query, so its bits do not depend on the others.
    """
    entry = tile * BLOCK + tl.arange(0, BLOCK)
    if MXFP4:
        low0, high0 = _nibbles(values[0])
        low1, high1 = _nibbles(values[1])
        low2, high2 = _nibbles(values[2])
        low3, high3 = _nibbles(values[3])
        lefts = (low0, high0, low1, high1, low2, high2, low3, high3)
    else:
        lefts = (values[0].to(tl.float8e4nv, bitcast=True).to(OPERAND),)
    for n in tl.static_range(QUERIES):
        query = queries[n]
        dots = tl.dot(_operand(lefts[0]), _operand(query[1]))
        if MXFP4:
            dots = tl.dot(_operand(lefts[1]), _operand(query[2]), dots)
            dots *= e8m0_value(scale & 0xFF)[:, None]
            for g in tl.static_range(1, 4):
                part = tl.dot(_operand(lefts[2 * g]), _operand(query[2 * g + 1]))
                part = tl.dot(_operand(lefts[2 * g + 1]), _operand(query[2 * g + 2]), part)
                dots += part * e8m0_value((scale >> 8 * g) & 0xFF)[:, None]
        score = tl.sum(tl.maximum(dots, 0.0) * query[0][None, :], axis=1)
        if not MXFP4:
            score *= scale.to(tl.float32, bitcast=True)
        length = tl.sum(tl.where(tl.arange(0, QUERIES) == n, lengths, 0), axis=0)
        tl.store(scores_ptr + n * S + entry, score, entry < length)


@triton.jit(do_not_specialize=["T"])
def indexer_scores_topk_kernel(
    query_ptr, weights_ptr, slot_ptr, position_ptr, pages_ptr, table_ptr, scores_ptr,
    T, S, I, ratio, capacity, page_stride, table_stride,
    K: tl.constexpr, J: tl.constexpr, BLOCK_I: tl.constexpr, PER_PAGE: tl.constexpr,
    MXFP4: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of a share of the tiles that QUERIES neighbouring queries see.

    Queries of the same slot share the keys; a block of queries with several slots takes them one
    slot after the other. A query that sees at most K entries needs no scores.
    """
    let_next_start()
    first = tl.program_id(0).to(tl.int64) * QUERIES
    i = tl.arange(0, QUERIES)
    slots = tl.load(slot_ptr + first + i, first + i < T, -1)
    position = tl.load(position_ptr + first + i, first + i < T, -1)
    lengths = visible_entries(slots, position, ratio, capacity)
    lengths = tl.where(lengths > K, lengths, 0)
    for run in range(QUERIES):
        slot = tl.sum(tl.where(i == run, slots, 0), axis=0)
        num_before = tl.sum(((slots == slot) & (i < run)).to(tl.int32), axis=0)
        own = tl.where((slots == slot) & (num_before == 0), lengths, 0)
        num_tiles = tl.cdiv(tl.max(own, axis=0), BLOCK)
        share = tl.cdiv(num_tiles, tl.num_programs(1))
        begin = tl.program_id(1) * share
        end = tl.minimum(begin + share, num_tiles)
        length = tl.where(begin < end, tl.max(own, axis=0), 0)
        own_table_ptr = table_ptr + tl.maximum(slot, 0) * table_stride
        if STAGES == 1:  # before the queries are ready
            values, scale = _load_keys(
                pages_ptr, own_table_ptr, begin, length, page_stride, J, PER_PAGE, MXFP4, BLOCK
            )
        wait_for_previous()
        if begin < end:
            queries = _load_queries(query_ptr, weights_ptr, first, T, I, J, BLOCK_I, MXFP4, QUERIES)
            for tile in tl.range(begin, end, num_stages=STAGES):
                if STAGES > 1:
                    values, scale = _load_keys(
                        pages_ptr, own_table_ptr, tile, length, page_stride, J, PER_PAGE, MXFP4,
                        BLOCK,
                    )  # fmt: skip
                _store_scores(
                    scores_ptr + first * S, S, values, scale, queries, tile, own, J, MXFP4, BLOCK,
                    QUERIES, query_ptr.dtype.element_ty,
                )  # fmt: skip
                if STAGES == 1:
                    values, scale = _load_keys(
                        pages_ptr, own_table_ptr, tile + 1, tl.where(tile + 1 < end, length, 0),
                        page_stride, J, PER_PAGE, MXFP4, BLOCK,
                    )  # fmt: skip


def operand_dtype(keys: str, is_rounded: bool) -> torch.dtype:
    """What a query is held in for the matrix unit: E4M3 fits FP16, which is cheaper to widen to."""
    return torch.float16 if keys == "fp8" and is_rounded else torch.bfloat16


def outputs(
    q: Tensor, head_weights: Tensor, pages: Tensor, page_table: Tensor, slot: Tensor,
    position: Tensor, ratio: int, entries_per_page: int, topk: int, keys: str,
    is_rotated: bool, is_rounded: bool, cos: Tensor | None, sin: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Allocate the entries [T, topk]; then scratch, in the order of `launch`'s checks."""
    T, I, J = q.shape
    S = page_table.shape[1] * entries_per_page
    rows = rows_at_once(T, S)
    winners = winner_shape(rows, S, topk)
    return (
        q.new_empty((T, topk), dtype=torch.int32),
        q.new_empty((T, I, J), dtype=operand_dtype(keys, is_rounded)),
        q.new_empty((T, I), dtype=torch.float32),
        q.new_empty((T,), dtype=torch.int64),
        q.new_empty((rows, S), dtype=torch.float32),
        q.new_empty(winners, dtype=torch.int32),
        q.new_empty(winners, dtype=torch.int32),
    )


def rows_at_once(T: int, S: int) -> int:
    """Queries whose scores fit the scratch."""
    return max(1, min(T, CONFIG["SCRATCH_BYTES"] // (4 * max(S, 1))))


def launch(
    q: Tensor, head_weights: Tensor, pages: Tensor, page_table: Tensor, slot: Tensor,
    position: Tensor, ratio: int, entries_per_page: int, topk: int, keys: str,
    is_rotated: bool, is_rounded: bool, cos: Tensor | None, sin: Tensor | None,
    out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    args = (
        q, head_weights, pages, page_table, slot, position, ratio, entries_per_page, topk, keys,
        is_rotated, is_rounded, cos, sin,
    )  # fmt: skip
    launch_with(launch_select, *args, out)


def launch_with(
    choose: Callable[..., None], q: Tensor, head_weights: Tensor, pages: Tensor,
    page_table: Tensor, slot: Tensor, position: Tensor, ratio: int, entries_per_page: int,
    topk: int, keys: str, is_rotated: bool, is_rounded: bool, cos: Tensor | None,
    sin: Tensor | None, out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """What `launch` does, with the choice among scores left to `choose`, a `launch_select`."""
    entries, query, weights, visible, scores, winner_keys, winner_ids = out
    T, I, J = _check(
        q, head_weights, pages, page_table, slot, position, ratio, entries_per_page, topk, keys,
        is_rounded,
    )  # fmt: skip
    rope_dim = check_angles(q, cos, sin)
    S = page_table.shape[1] * entries_per_page
    rows = rows_at_once(T, S)
    check_tensors(
        entries=(entries, f"{T} {topk}", torch.int32),
        query=(query, f"{T} {I} {J}", operand_dtype(keys, is_rounded)),
        weights=(weights, f"{T} {I}", torch.float32),
        visible=(visible, f"{T}", torch.int64),
        scores=(scores, f"{rows} {S}", torch.float32),
        winner_keys=(winner_keys, f"{rows} blocks {topk}", torch.int32),
        winner_ids=(winner_ids, f"{rows} blocks {topk}", torch.int32),
    )
    if T == 0:
        return
    indexer_query_kernel[(T, triton.cdiv(I, CONFIG["HEADS"]))](
        q, head_weights, slot, position, *((cos, sin) if rope_dim else (weights, weights)),
        query, weights, visible, ratio, S, I, J=J, R=rope_dim, HEADS=CONFIG["HEADS"],
        MXFP4=keys == "mxfp4", ROTATE=is_rotated, ROUND=is_rounded, SCALE=J**-0.5, num_warps=1,
        **PDL, **EXACT,
    )  # fmt: skip
    for start in range(0, T, rows):
        part = slice(start, min(start + rows, T))
        if topk < S:
            _launch_scores(
                query[part], weights[part], slot[part], position[part], pages, page_table,
                scores, ratio, entries_per_page, topk, keys,
            )  # fmt: skip
        size = part.stop - start
        choose(
            scores[:size], visible[part], topk, entries[part], winner_keys, winner_ids,
            is_first=False,
        )  # fmt: skip


def _launch_scores(
    query: Tensor, weights: Tensor, slot: Tensor, position: Tensor, pages: Tensor,
    page_table: Tensor, scores: Tensor, ratio: int, entries_per_page: int, topk: int, keys: str,
) -> None:  # fmt: skip
    T, I, J = query.shape
    S = scores.shape[1]
    tile = next(tile for least, tile in CONFIG["TILES"] if least <= T)
    blocks = triton.cdiv(T, tile["QUERIES"])
    splits = min(max(CONFIG["PROGRAMS"] // blocks, 1), triton.cdiv(S, tile["BLOCK"]))
    stages = tile["STAGES"] if splits * tile["BLOCK"] < S else 1
    indexer_scores_topk_kernel[(blocks, splits)](
        query, weights, slot, position, pages, page_table, scores, T, S, I, ratio, S,
        pages.shape[1], page_table.stride(0), K=topk, J=J,
        BLOCK_I=max(16, triton.next_power_of_2(I)), PER_PAGE=entries_per_page,
        MXFP4=keys == "mxfp4", BLOCK=tile["BLOCK"], QUERIES=tile["QUERIES"], STAGES=stages,
        num_warps=CONFIG["num_warps"],
        **PDL, **EXACT,
    )  # fmt: skip


def _check(
    q: Tensor, head_weights: Tensor, pages: Tensor, page_table: Tensor, slot: Tensor,
    position: Tensor, ratio: int, entries_per_page: int, topk: int, keys: str, is_rounded: bool,
) -> tuple[int, int, int]:  # fmt: skip
    """Check the arguments; -> T, I, J."""
    dtype = check_float("q", q)
    if dtype is torch.float32 and not is_rounded:
        raise ValueError(f"q: expected torch.bfloat16 where it is not rounded, got {dtype}")
    sizes = check_tensors(
        q=(q, "T I 128", dtype),
        head_weights=(head_weights, "T I", torch.float32),
        pages=(pages, "pages stride", torch.uint8),
        slot=(slot, "T", torch.int64),
        position=(position, "T", torch.int64),
    )
    if page_table.dim() != 2 or page_table.dtype != torch.int32 or page_table.stride(1) != 1:
        raise ValueError(
            "page_table: expected torch.int32 [slots, max_pages] with adjacent columns, got "
            f"{page_table.dtype} {list(page_table.shape)} with strides {page_table.stride()}"
        )
    for name, value in (("ratio", ratio), ("entries_per_page", entries_per_page), ("topk", topk)):
        check_int(name, value)
    stride = IndexRecord(128, keys).page_bytes(entries_per_page)
    check_stride("pages", pages, stride, f"{entries_per_page} keys in {keys}")
    check_aligned(4, pages=pages)  # the scales are words
    return sizes["T"], sizes["I"], 128


SPEC = KernelSpec("indexer_scores_topk/triton", launch, runs_on_cpu=INTERPRETED)
