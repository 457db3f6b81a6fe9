"""Indexer keys: pool, norm, RoPE, Hadamard, cast and write. Triton, SM 9 on.

The work is that of compressor_insert up to the record: only tokens that complete a window do any.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.kv_layout import IndexRecord
from dsv4.kernels.cache import compressor_insert
from dsv4.kernels.common.bits import round_to, widen
from dsv4.kernels.common.checks import check_float, check_power_of_two, check_stride
from dsv4.kernels.common.compressor import check_compressor, completing, entry_row
from dsv4.kernels.common.kv_record import store_index_key
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.pooling import pool_window
from dsv4.kernels.common.vectors import hadamard, rms_norm, rope

REFERENCE = "dsv4.reference.cache_writes:index_key_insert"
# Those of compressor_insert: in one launch with it the sums take the same order.
CONFIG = {"num_warps": compressor_insert.CONFIG["num_warps"]}


@triton.jit
def insert_keys(
    kappa_ptr, gamma_ptr, state_ptr, norm_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr,
    slot_ptr, position_ptr, first_row_ptr, first_position_ptr, T, max_pages, stride, num_rows, eps,
    J: tl.constexpr, R: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
    BF16: tl.constexpr, MXFP4: tl.constexpr, HADAMARD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Keys that GROUP token rows complete."""
    HALVES: tl.constexpr = 2 if OVERLAP else 1
    first = tl.program_id(0).to(tl.int64) * GROUP
    c = tl.arange(0, J)
    i = completing(slot_ptr, position_ptr, first, -1, T, RATIO, GROUP)
    while i < GROUP:
        t = first + i
        slot = tl.load(slot_ptr + t)
        end = tl.load(position_ptr + t) + 1
        entry = end // RATIO - 1
        page, row = entry_row(table_ptr, slot, entry, max_pages, num_rows)
        if page > 0:
            x = pool_window(
                kappa_ptr, gamma_ptr, state_ptr + slot * (2 * HALVES * RATIO * HALVES * J), end,
                tl.load(first_row_ptr + t), tl.load(first_position_ptr + t), c, J, RATIO,
                OVERLAP, BLOCK_ROWS,
            )  # fmt: skip
            weight = widen(tl.load(norm_ptr + c))
            x = round_to(rms_norm(round_to(x, BF16), weight, eps, J), BF16)
            x = round_to(rope(x, cos_ptr, sin_ptr, entry, J, R, J), BF16)
            if HADAMARD:
                x = round_to(hadamard(x, J, SCALE), BF16)
            store_index_key(pages_ptr + page * stride, row, num_rows, x, J, MXFP4)
        i = completing(slot_ptr, position_ptr, first, i, T, RATIO, GROUP)


@triton.jit
def index_key_insert_kernel(
    kappa_ptr, gamma_ptr, state_ptr, norm_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr,
    slot_ptr, position_ptr, first_row_ptr, first_position_ptr, T, max_pages, stride, num_rows, eps,
    J: tl.constexpr, R: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
    BF16: tl.constexpr, MXFP4: tl.constexpr, HADAMARD: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    insert_keys(
        kappa_ptr, gamma_ptr, state_ptr, norm_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr,
        slot_ptr, position_ptr, first_row_ptr, first_position_ptr, T, max_pages, stride, num_rows,
        eps, J, R, RATIO, OVERLAP, BF16, MXFP4, HADAMARD, SCALE, BLOCK_ROWS, GROUP,
    )  # fmt: skip


def check(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, ratio: int, entries_per_page: int, dtype: torch.dtype, keys: str,
    prefix: str = "",
) -> tuple[int, int, int, int]:  # fmt: skip
    """Check the arguments, with names as check_compressor's; -> T, J, R, bytes of a page."""
    T, J, R = check_compressor(
        kappa, gamma, state, norm, cos, sin, pages, page_table, slot, position, first_row,
        first_position, ratio, entries_per_page, prefix,
    )  # fmt: skip
    check_float("dtype", dtype)
    check_power_of_two(f"{prefix}norm", J)
    stride = IndexRecord(J, keys).page_bytes(entries_per_page)
    check_stride(f"{prefix}pages", pages, stride, f"{entries_per_page} keys in {keys}")
    return T, J, R, stride


def constants(
    T: int, J: int, R: int, ratio: int, width: int, dtype: torch.dtype, keys: str,
    is_rotated: bool,
) -> dict[str, int | float]:  # fmt: skip
    """What the device function is compiled for."""
    return compressor_insert.window_constants(T, R, ratio, width == 2 * J, dtype) | {
        "J": J, "MXFP4": keys == "mxfp4", "HADAMARD": is_rotated, "SCALE": J**-0.5,
    }  # fmt: skip


def launch(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, ratio: int, entries_per_page: int, eps: float, dtype: torch.dtype,
    keys: str, is_rotated: bool,
) -> None:  # fmt: skip
    """Write the keys. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    T, J, R, stride = check(
        kappa, gamma, state, norm, cos, sin, pages, page_table, slot, position, first_row,
        first_position, ratio, entries_per_page, dtype, keys,
    )  # fmt: skip
    if T == 0:
        return
    own = constants(T, J, R, ratio, kappa.shape[1], dtype, keys, is_rotated)
    index_key_insert_kernel[(triton.cdiv(T, own["GROUP"]),)](
        kappa, gamma, state, norm, cos, sin, pages, page_table, slot, position, first_row,
        first_position, T, page_table.shape[1], stride, entries_per_page, eps, **own,
        num_warps=CONFIG["num_warps"], **PDL, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("index_key_insert/triton", launch, runs_on_cpu=INTERPRETED)
