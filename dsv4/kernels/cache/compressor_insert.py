"""Compressed entries: pool, norm, RoPE, quantise and write, one program a token. Triton, any SM.

Only the program of a token that completes a window works; the others return at once. That needs
no list of windows, whose length the host would have to know before a graph is replayed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.kv_layout import KvRecord
from dsv4.kernels.common.bits import round_to, widen
from dsv4.kernels.common.checks import check_float, check_stride
from dsv4.kernels.common.compressor import check_compressor, entry_row
from dsv4.kernels.common.kv_record import store_kv_record
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pooling import pool_window
from dsv4.kernels.common.vectors import rms_norm, rope

REFERENCE = "dsv4.reference.cache_writes:compressor_insert"
CONFIG = {"TILE": 8, "num_warps": 8}


@triton.jit
def compressor_insert_kernel(
    kappa_ptr, gamma_ptr, state_ptr, norm_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr,
    slot_ptr, position_ptr, first_row_ptr, first_position_ptr, max_pages, stride, num_rows, eps,
    C: tl.constexpr, R: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
    BF16: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + t)
    end = tl.load(position_ptr + t) + 1
    if (slot >= 0) & (end % RATIO == 0):
        entry = end // RATIO - 1
        page, row = entry_row(table_ptr, slot, entry, max_pages, num_rows)
        if page > 0:
            HALVES: tl.constexpr = 2 if OVERLAP else 1
            ring_ptr = state_ptr + slot * (2 * HALVES * RATIO * HALVES * C)
            x = pool_window(
                kappa_ptr, gamma_ptr, ring_ptr, end, tl.load(first_row_ptr + t),
                tl.load(first_position_ptr + t), C, RATIO, OVERLAP, BLOCK_C, TILE,
            )  # fmt: skip
            c = tl.arange(0, BLOCK_C)
            weight = widen(tl.load(norm_ptr + c, c < C, 0.0))
            x = round_to(rms_norm(round_to(x, BF16), weight, eps, C), BF16)
            x = round_to(rope(x, cos_ptr, sin_ptr, entry, C, R, BLOCK_C), BF16)
            store_kv_record(pages_ptr + page * stride, row, num_rows, x, C, R, BLOCK_C)


def launch(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, ratio: int, entries_per_page: int, eps: float, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Write the records. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    T, C, R = check_compressor(
        kappa, gamma, state, norm, cos, sin, pages, page_table, slot, position, first_row,
        first_position, ratio, entries_per_page,
    )  # fmt: skip
    is_bf16 = check_float("dtype", dtype) is torch.bfloat16
    stride = KvRecord(C, R).page_bytes(entries_per_page)
    check_stride("pages", pages, stride, f"{entries_per_page} entries")
    if T == 0:
        return
    compressor_insert_kernel[(T,)](
        kappa, gamma, state, norm, cos, sin, pages, page_table, slot, position, first_row,
        first_position, page_table.shape[1], stride, entries_per_page, eps,
        C=C, R=R, RATIO=ratio, OVERLAP=kappa.shape[1] == 2 * C, BF16=is_bf16,
        BLOCK_C=triton.next_power_of_2(C), **CONFIG, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("compressor_insert/triton", launch, runs_on_cpu=INTERPRETED)
