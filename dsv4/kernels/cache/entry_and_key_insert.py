"""Compressed entries and index keys of a CSA layer in one launch. Triton, SM 9 on.

The windows are the same tokens'. Programs of compressor_insert and of index_key_insert, side by
side, with the bodies of both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.cache import compressor_insert, index_key_insert
from dsv4.kernels.cache.compressor_insert import insert_entries
from dsv4.kernels.cache.index_key_insert import insert_keys
from dsv4.kernels.common.launch import EXACT, INTERPRETED
from dsv4.kernels.common.pdl import PDL, let_next_start, wait_for_previous
from dsv4.kernels.common.split import arrival_counters

REFERENCE = "dsv4.reference.cache_writes:entry_and_key_insert"
CONFIG = {"num_warps": compressor_insert.CONFIG["num_warps"]}


@triton.jit(do_not_specialize=["T"])
def entry_and_key_insert_kernel(
    kappa_ptr, gamma_ptr, state_ptr, norm_ptr, pages_ptr,
    index_kappa_ptr, index_gamma_ptr, index_state_ptr, index_norm_ptr, index_pages_ptr,
    cos_ptr, sin_ptr, table_ptr, slot_ptr, position_ptr, first_row_ptr, first_position_ptr,
    pooled_ptr, counter_ptr, T, max_pages, stride, index_stride, num_rows, eps,
    C: tl.constexpr, R: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
    BF16: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_ROWS: tl.constexpr, PARTS: tl.constexpr,
    PART_C: tl.constexpr, GROUP: tl.constexpr, J: tl.constexpr, MXFP4: tl.constexpr,
    HADAMARD: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    let_next_start()
    wait_for_previous()
    part = tl.program_id(1)
    if part < PARTS:
        insert_entries(
            kappa_ptr, gamma_ptr, state_ptr, norm_ptr, cos_ptr, sin_ptr, pages_ptr, table_ptr,
            slot_ptr, position_ptr, first_row_ptr, first_position_ptr, pooled_ptr, counter_ptr,
            part, T, max_pages, stride, num_rows, eps,
            C, R, RATIO, OVERLAP, BF16, BLOCK_C, BLOCK_ROWS, PARTS, PART_C, GROUP,
        )  # fmt: skip
    else:
        insert_keys(
            index_kappa_ptr, index_gamma_ptr, index_state_ptr, index_norm_ptr, cos_ptr, sin_ptr,
            index_pages_ptr, table_ptr, slot_ptr, position_ptr, first_row_ptr,
            first_position_ptr, T, max_pages, index_stride, num_rows, eps,
            J, R, RATIO, OVERLAP, BF16, MXFP4, HADAMARD, SCALE, BLOCK_ROWS, GROUP,
        )  # fmt: skip


def scratch(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, pages: Tensor,
    index_kappa: Tensor, index_gamma: Tensor, index_state: Tensor, index_norm: Tensor,
    index_pages: Tensor, cos: Tensor, sin: Tensor, page_table: Tensor, slot: Tensor,
    position: Tensor, first_row: Tensor, first_position: Tensor, ratio: int,
    entries_per_page: int, eps: float, dtype: torch.dtype, keys: str, is_rotated: bool,
) -> Tensor:  # fmt: skip
    """Allocate what compressor_insert needs."""
    return compressor_insert.pooled_rows(kappa, norm, ratio)


def launch(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, pages: Tensor,
    index_kappa: Tensor, index_gamma: Tensor, index_state: Tensor, index_norm: Tensor,
    index_pages: Tensor, cos: Tensor, sin: Tensor, page_table: Tensor, slot: Tensor,
    position: Tensor, first_row: Tensor, first_position: Tensor, ratio: int,
    entries_per_page: int, eps: float, dtype: torch.dtype, keys: str, is_rotated: bool,
    scratch: Tensor,
) -> None:  # fmt: skip
    """Write both. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    angles, at = (cos, sin), (page_table, slot, position, first_row, first_position)
    sizes = ratio, entries_per_page, dtype
    T, C, R, stride = compressor_insert.check(
        kappa, gamma, state, norm, *angles, pages, *at, *sizes
    )
    _, J, _, index_stride = index_key_insert.check(
        index_kappa, index_gamma, index_state, index_norm, *angles, index_pages, *at, *sizes, keys,
        prefix="index_",
    )  # fmt: skip
    width, index_width = kappa.shape[1], index_kappa.shape[1]
    if (width == C) != (index_width == J):
        raise ValueError(
            f"index_kappa: expected width {J * width // C}, to overlap as kappa does, "
            f"got {index_width}"
        )
    if T == 0:
        return
    own = compressor_insert.constants(T, C, R, ratio, width, dtype)
    own |= index_key_insert.constants(T, J, R, ratio, index_width, dtype, keys, is_rotated)
    entry_and_key_insert_kernel[(triton.cdiv(T, own["GROUP"]), own["PARTS"] + 1)](
        kappa, gamma, state, norm, pages, index_kappa, index_gamma, index_state, index_norm,
        index_pages, *angles, *at, scratch,
        arrival_counters(kappa.device, T) if own["PARTS"] > 1 else slot, T,
        page_table.shape[1], stride, index_stride, entries_per_page, eps, **own,
        **CONFIG, **PDL, **EXACT,
    )  # fmt: skip


SPEC = KernelSpec("entry_and_key_insert/triton", launch, runs_on_cpu=INTERPRETED)
