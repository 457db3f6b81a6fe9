"""Sparse attention for chunks of prompts: one program a query and 32 heads. Triton, any SM.

Each query has its own keys (its window, its entries), so the heads of one query are the rows of the
matrix products, as in decode; thousands of queries fill the device without splitting the keys.
Up to 32 tiles of keys the bits are those of sparse_attn_decode. For longer lists a program adds all
tiles in order, where decode adds groups; a query's bits do not depend on the chunk either way.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, empty_like

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.common.attention_checks import LOG2_E, Output, check_attention
from dsv4.kernels.common.launch import INTERPRETED
from dsv4.kernels.common.sparse_attention import CHUNK, PIECE, attend_tiles, store_output

REFERENCE = "dsv4.reference.paged_attention:sparse_attn_prefill"
CONFIG = {"TILE": 64, "num_warps": 4, "num_stages": 2}  # that TILE of sparse_attn_decode
SIZES = ["T", "H", "K", "max_pages"]  # one binary for all


@triton.jit(do_not_specialize=SIZES)
def sparse_attn_prefill_kernel(
    q_ptr, step_ptr, window_ptr, pages_ptr, table_ptr, entries_ptr, slot_ptr, position_ptr,
    first_row_ptr, first_position_ptr, sink_ptr, cos_ptr, sin_ptr, out_ptr, out_scale_ptr,
    scale, T, H, K, max_pages,
    NP: tl.constexpr, ROWS: tl.constexpr, WINDOW_STRIDE: tl.constexpr, PAGE_ROWS: tl.constexpr,
    PAGE_STRIDE: tl.constexpr, RATIO: tl.constexpr, IS_LIST: tl.constexpr,
    IS_ROTATED: tl.constexpr, IS_FP8: tl.constexpr, BLOCK_H: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = NP * PIECE
    head_blocks = tl.cdiv(H, BLOCK_H)
    t = (tl.program_id(0) // head_blocks).to(tl.int64)
    h = (tl.program_id(0) % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    slot = tl.load(slot_ptr + t)
    position = tl.load(position_ptr + t).to(tl.int32)
    visible = (position + 1) // RATIO
    num_entries = K if IS_LIST else tl.minimum(visible, K)
    num_tiles = tl.where(slot < 0, 0, tl.cdiv(ROWS, TILE) + tl.cdiv(num_entries, TILE))
    m, l, acc0, acc1, acc2, acc3 = attend_tiles(
        0, num_tiles, q_ptr + t * H * C, step_ptr, window_ptr + slot * WINDOW_STRIDE, pages_ptr,
        table_ptr + slot * max_pages, entries_ptr + t * K, position,
        tl.load(first_row_ptr + t).to(tl.int32), tl.load(first_position_ptr + t).to(tl.int32),
        h, scale, T, H, num_entries, visible, max_pages,
        NP, ROWS, PAGE_ROWS, PAGE_STRIDE, IS_LIST, BLOCK_H, TILE,
    )  # fmt: skip
    store_output(
        out_ptr + t * H * C, out_scale_ptr + t * H * NP, h, H, m, l, acc0, acc1, acc2, acc3,
        sink_ptr, cos_ptr + t * (CHUNK // 2), sin_ptr + t * (CHUNK // 2), NP, IS_ROTATED, IS_FP8,
    )  # fmt: skip


def outputs(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> Tensor:  # fmt: skip
    """Allocate the result [T, H, C]. Doubles as the op's fake."""
    return empty_like(q)


def launch(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int, out: Tensor,
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    args = (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, rope_dim, ratio, entries_per_page,
    )  # fmt: skip
    attend(args, Output(out))


def attend(args: tuple, out: Output) -> None:
    """Check the arguments of the op, and fill `out`, BF16 or FP8."""
    shape = check_attention(*args, out)
    if shape.T == 0 or shape.H == 0:
        return
    (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, _, ratio, entries_per_page,
    ) = args  # fmt: skip
    is_rotated = cos is not None
    angles = (cos, sin) if is_rotated else (sink, sink)
    sparse_attn_prefill_kernel[(shape.T * shape.head_blocks,)](
        q, step, window, pages, page_table, entries if shape.is_list else page_table, slot,
        position, first_row, first_position, sink, *angles, *out.pointers(),
        scale * LOG2_E, shape.T, shape.H, shape.num_entries, page_table.shape[1],
        ROWS=rows, WINDOW_STRIDE=window.shape[1], PAGE_ROWS=entries_per_page,
        PAGE_STRIDE=shape.record.page_bytes(entries_per_page), RATIO=ratio,
        IS_LIST=shape.is_list, IS_ROTATED=is_rotated, IS_FP8=out.scale is not None,
        BLOCK_H=shape.block_h, NP=shape.num_pieces, **CONFIG,
    )  # fmt: skip


def tensor_core(arch: int, args: dict[str, Any]) -> str:
    """What the assembly must hold; 32 heads are too few for the products of a warp group."""
    return r"mma\.sync.*bf16"


SPEC = KernelSpec("sparse_attn_prefill/triton", launch, runs_on_cpu=INTERPRETED)
