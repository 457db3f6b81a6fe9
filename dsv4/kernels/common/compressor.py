"""What the two inserting kernels of the compressors share: their checks and an entry's place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.kernels.common.checks import check_float, check_int


@triton.jit
def entry_row(table_ptr, slot, entry, max_pages, num_rows):
    """Page and row of an entry of a slot. Page 0, the null page, also past the table's end."""
    index = entry // num_rows
    is_inside = (slot >= 0) & (entry >= 0) & (index < max_pages)
    page = tl.load(table_ptr + slot * max_pages + index, is_inside, 0).to(tl.int64)
    return page, entry % num_rows


@triton.jit
def completing(
    slot_ptr, position_ptr, first, after, T, RATIO: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """The next of rows `first` + 0 .. GROUP - 1, beyond `after`, that completes a window.

    -> its number in the group, GROUP if there is none
    """
    i = tl.arange(0, GROUP)
    slot = tl.load(slot_ptr + first + i, first + i < T, -1)
    position = tl.load(position_ptr + first + i, first + i < T, 0)
    is_done = (slot >= 0) & ((position + 1) % RATIO == 0) & (i > after)
    return tl.min(tl.where(is_done, i, GROUP), axis=0)


def check_compressor(
    kappa: Tensor, gamma: Tensor, state: Tensor, norm: Tensor, cos: Tensor, sin: Tensor,
    pages: Tensor, page_table: Tensor, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, ratio: int, entries_per_page: int, prefix: str = "",
) -> tuple[int, int, int]:  # fmt: skip
    """Check the arguments of an insertion; -> T, the dims of an entry and its RoPE dims.

    prefix  of the names of kappa, gamma, state, norm and pages
    """
    sizes = check_tensors(**{
        f"{prefix}kappa": (kappa, "T width", torch.float32),
        f"{prefix}gamma": (gamma, "T width", torch.float32),
        f"{prefix}state": (state, "slots 2 rows width", torch.float32),
        f"{prefix}norm": (norm, "C", check_float(f"{prefix}norm", norm)),
        "cos": (cos, "S pairs", torch.float32),
        "sin": (sin, "S pairs", torch.float32),
        f"{prefix}pages": (pages, "pages stride", torch.uint8),
        "page_table": (page_table, "slots max_pages", torch.int32),
        "slot": (slot, "T", torch.int64),
        "position": (position, "T", torch.int64),
        "first_row": (first_row, "T", torch.int64),
        "first_position": (first_position, "T", torch.int64),
    })  # fmt: skip
    check_int("ratio", ratio)
    check_int("entries_per_page", entries_per_page)
    width, C, rows = sizes["width"], sizes["C"], sizes["rows"]
    if width not in (C, 2 * C):
        raise ValueError(
            f"{prefix}kappa: expected width {C} or {2 * C} for {prefix}norm [{C}], got {width}"
        )
    if rows != ratio * (width // C):
        raise ValueError(f"{prefix}state: expected {ratio * (width // C)} rows, got {rows}")
    R = 2 * sizes["pairs"]
    if R > C:
        raise ValueError(f"cos: expected at most {C // 2} pairs, got {R // 2}")
    return sizes["T"], C, R
