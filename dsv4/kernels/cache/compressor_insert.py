"""Compressed entries: pool, norm, RoPE, quantise and write. Triton, SM 9 on.

Only tokens that complete a window have work; finding them takes no list, whose length the host
would have to know before a graph is replayed. A window of 128 rows is half a megabyte, more than
one SM can fetch in 10 us, so its channels are divided among programs; the last of them to arrive
does the rest, which needs the mean square of all channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.core.kv_layout import KvRecord
from dsv4.kernels.common.bits import round_to, widen
from dsv4.kernels.common.checks import check_float, check_stride
from dsv4.kernels.common.compressor import check_compressor, completing, entry_row
from dsv4.kernels.common.kv_record import store_kv_record
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.pooling import pool_window
from dsv4.kernels.common.split import arrival_counters, is_last_arrival
from dsv4.kernels.common.vectors import rms_norm, rope

REFERENCE = "dsv4.reference.cache_writes:compressor_insert"
# TILE: elements of kappa, and of gamma, that a program holds. DECODE: in steps of more tokens a
# program looks at `ratio` of them, because most would find nothing to do (each of which costs the
# interpreter a millisecond).
CONFIG = {"TILE": 4096, "DECODE": 4 if INTERPRETED else 256, "num_warps": 4}


@triton.jit
def finish_entry(
    x, norm_ptr, cos_ptr, sin_ptr, page_ptr, row, entry, num_rows, eps,
    C: tl.constexpr, R: tl.constexpr, BF16: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Norm, RoPE, cast and store of a pooled entry, FP32 [BLOCK_C]."""
    c = tl.arange(0, BLOCK_C)
    weight = widen(tl.load(norm_ptr + c, c < C, 0.0))
    x = round_to(rms_norm(round_to(x, BF16), weight, eps, C), BF16)
    x = round_to(rope(x, cos_ptr, sin_ptr, entry, C, R, BLOCK_C), BF16)
    store_kv_record(page_ptr, row, num_rows, x, C, R, BLOCK_C)


@triton.jit
def insert_entries(
    kappa_ptr, gamma_ptr, state_ptr, norm_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr,
    slot_ptr, position_ptr, first_row_ptr, first_position_ptr, pooled_ptr, counter_ptr, part, T,
    max_pages, stride, num_rows, eps,
    C: tl.constexpr, R: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
    BF16: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr,
    PART_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Entries that GROUP token rows complete; of their channels those of `part`."""
    HALVES: tl.constexpr = 2 if OVERLAP else 1
    first = tl.program_id(0).to(tl.int64) * GROUP
    i = completing(slot_ptr, position_ptr, first, -1, T, RATIO, GROUP)
    while i < GROUP:
        t = first + i
        slot = tl.load(slot_ptr + t)
        end = tl.load(position_ptr + t) + 1
        entry = end // RATIO - 1
        page, row = entry_row(table_ptr, slot, entry, max_pages, num_rows)
        if page > 0:
            c = part * PART_C + tl.arange(0, PART_C)
            x = pool_window(
                kappa_ptr, gamma_ptr, state_ptr + slot * (2 * HALVES * RATIO * HALVES * C), end,
                tl.load(first_row_ptr + t), tl.load(first_position_ptr + t), c, C, RATIO,
                OVERLAP, BLOCK_ROWS,
            )  # fmt: skip
            page_ptr = pages_ptr + page * stride
            if PARTS == 1:
                finish_entry(
                    x, norm_ptr, cos_ptr, sin_ptr, page_ptr, row, entry, num_rows, eps,
                    C, R, BF16, BLOCK_C,
                )  # fmt: skip
            else:
                tl.store(pooled_ptr + t * C + c, x, c < C)
                if is_last_arrival(counter_ptr + t, PARTS):
                    at = tl.arange(0, BLOCK_C)
                    whole = tl.load(pooled_ptr + t * C + at, at < C, 0.0, cache_modifier=".cg")
                    finish_entry(
                        whole, norm_ptr, cos_ptr, sin_ptr, page_ptr, row, entry, num_rows, eps,
                        C, R, BF16, BLOCK_C,
                    )  # fmt: skip
        i = completing(slot_ptr, position_ptr, first, i, T, RATIO, GROUP)


@triton.jit(do_not_specialize=["T"])
def compressor_insert_kernel(
    kappa_ptr, gamma_ptr, state_ptr, norm_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr,
    slot_ptr, position_ptr, first_row_ptr, first_position_ptr, pooled_ptr, counter_ptr, T,
    max_pages, stride, num_rows, eps,
    C: tl.constexpr, R: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
    BF16: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr,
    PART_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    insert_entries(
        kappa_ptr, gamma_ptr, state_ptr, norm_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr,
        slot_ptr, position_ptr, first_row_ptr, first_position_ptr, pooled_ptr, counter_ptr,
        tl.program_id(1), T, max_pages, stride, num_rows, eps,
        C, R, RATIO, OVERLAP, BF16, BLOCK_C, BLOCK_ROWS, PARTS, PART_C, GROUP,
    )  # fmt: skip


def parts_of(C: int, ratio: int, width: int) -> tuple[int, int]:
    """Programs that share a window, and channels of each; from the shape of a window alone."""
    rows = triton.next_power_of_2(ratio * (width // C))
    part = min(triton.next_power_of_2(C), max(CONFIG["TILE"] // rows, 16))
    return triton.cdiv(C, part), part


def scratch(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, ratio: int, entries_per_page: int, eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Allocate [T, C] for pooled channels on their way to another program, if they go there."""
    return pooled_rows(kappa, norm, ratio)


def pooled_rows(kappa: Tensor, norm: Tensor, ratio: int) -> Tensor:
    """The scratch of an insertion of entries."""
    C = norm.shape[0]
    is_shared = C > 0 and ratio > 0 and parts_of(C, ratio, kappa.shape[1])[0] > 1
    return kappa.new_empty(kappa.shape[0] * is_shared, C)


def check(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, ratio: int, entries_per_page: int, dtype: torch.dtype,
) -> tuple[int, int, int, int]:  # fmt: skip
    """Check the arguments; -> T, C, R, bytes of a page."""
    T, C, R = check_compressor(
        kappa, gamma, state, norm, cos, sin, pages, page_table, slot, position, first_row,
        first_position, ratio, entries_per_page,
    )  # fmt: skip
    check_float("dtype", dtype)
    stride = KvRecord(C, R).page_bytes(entries_per_page)
    check_stride("pages", pages, stride, f"{entries_per_page} entries")
    return T, C, R, stride


def constants(T: int, C: int, R: int, ratio: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """What the device function is compiled for."""
    parts, part = parts_of(C, ratio, width)
    return window_constants(T, R, ratio, width == 2 * C, dtype) | {
        "C": C, "BLOCK_C": triton.next_power_of_2(C), "PARTS": parts, "PART_C": part,
    }  # fmt: skip


def window_constants(
    T: int, R: int, ratio: int, is_overlap: bool, dtype: torch.dtype
) -> dict[str, int]:
    """Those of them that hold for index keys too."""
    return {
        "R": R, "RATIO": ratio, "OVERLAP": is_overlap, "BF16": dtype is torch.bfloat16,
        "BLOCK_ROWS": triton.next_power_of_2(ratio * (1 + is_overlap)),
        "GROUP": 1 if CONFIG["DECODE"] >= T else triton.next_power_of_2(ratio),
    }  # fmt: skip


def launch(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, ratio: int, entries_per_page: int, eps: float, dtype: torch.dtype,
    scratch: Tensor,
) -> None:  # fmt: skip
    """Write the records. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    T, C, R, stride = check(
        kappa, gamma, state, norm, cos, sin, pages, page_table, slot, position, first_row,
        first_position, ratio, entries_per_page, dtype,
    )  # fmt: skip
    if T == 0:
        return
    own = constants(T, C, R, ratio, kappa.shape[1], dtype)
    compressor_insert_kernel[(triton.cdiv(T, own["GROUP"]), own["PARTS"])](
        kappa, gamma, state, norm, cos, sin, pages, page_table, slot, position, first_row,
        first_position, scratch,
        arrival_counters(kappa.device, T) if own["PARTS"] > 1 else slot, T,
        page_table.shape[1], stride, entries_per_page, eps, **own,
        num_warps=CONFIG["num_warps"], **PDL, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("compressor_insert/triton", launch, runs_on_cpu=INTERPRETED)
