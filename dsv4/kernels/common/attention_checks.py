"""Argument checks and tile sizes that the attention kernels share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dsv4.core.checks import check_tensors
from dsv4.core.kv_layout import KvRecord
from dsv4.kernels.common.checks import check_aligned, check_int, check_stride

# Heads of a Triton program. 64 fit Hopper, but their products exceed Blackwell's tensor memory.
MAX_BLOCK_H, MIN_BLOCK_H = 32, 16
PIECE_DIMS = 128  # of an accumulator; kernels have names for four
MAX_PIECES, ROPE_DIM = 4, 64
VECTOR_BYTES = 16
LOG2_E = 1.4426950408889634  # kernels take powers of two


@dataclass(frozen=True)
class Shape:
    """Sizes of an attention call.

    num_entries  columns of the entry list, or entries that a row of the page table can name
    is_list      whether there is an entry list
    """

    T: int
    H: int
    record: KvRecord
    num_entries: int
    is_list: bool

    @property
    def block_h(self) -> int:
        """Heads of a Triton program, padded."""
        return max(MIN_BLOCK_H, min(MAX_BLOCK_H, triton.next_power_of_2(self.H)))

    @property
    def num_pieces(self) -> int:
        """Accumulators of 128 dims."""
        return self.record.head_dim // PIECE_DIMS

    @property
    def head_blocks(self) -> int:
        """Triton programs that share the heads of a query."""
        return -(-self.H // self.block_h)


class Output(NamedTuple):
    """Where the result of a call goes.

    values  [T, H, C] BF16, or E4M3
    scale   [T, H, C/128] UE8M0 of E4M3 values; None: they are BF16
    """

    values: Tensor
    scale: Tensor | None = None

    def specs(self) -> dict[str, tuple[Tensor, str, torch.dtype]]:
        """What check_tensors takes."""
        if self.scale is None:
            return {"out": (self.values, "T H C", torch.bfloat16)}
        groups = self.values.shape[-1] // PIECE_DIMS
        return {
            "out": (self.values, "T H C", torch.float8_e4m3fn),
            "out_scale": (self.scale, f"T H {groups}", torch.float8_e8m0fnu),
        }

    def pointers(self) -> tuple[Tensor, Tensor]:
        """Values and scales for a Triton kernel, FP8 as bytes; without scales something unused."""
        if self.scale is None:
            return self.values, self.values
        return self.values.view(torch.uint8), self.scale.view(torch.uint8)


def fp8_output(q: Tensor) -> Output:
    """Allocate the FP8 result of queries [T, H, C]."""
    scale = q.new_empty((*q.shape[:2], q.shape[2] // PIECE_DIMS), dtype=torch.float8_e8m0fnu)
    return Output(q.new_empty(q.shape, dtype=torch.float8_e4m3fn), scale)


def attention_shape(
    q: Tensor, page_table: Tensor, entries: Tensor | None, rope_dim: int, entries_per_page: int
) -> Shape:
    """The sizes of a call, from shapes alone, before they are checked."""
    T, H, C = q.shape
    is_list = entries is not None
    count = entries.shape[1] if is_list else page_table.shape[1] * entries_per_page
    return Shape(T, H, KvRecord(C, rope_dim), count, is_list)


def check_attention(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int, out: Output,
) -> Shape:  # fmt: skip
    """Check the arguments of an attention op. Raises ValueError naming one."""
    if q.dim() != 3:
        raise ValueError(f"q: expected [T, H, C], got {list(q.shape)}")
    for name, value in (("rows", rows), ("ratio", ratio), ("entries_per_page", entries_per_page)):
        check_int(name, value)
    if not scale > 0:
        raise ValueError(f"scale: expected a positive number, got {scale}")
    if rope_dim != ROPE_DIM:
        raise ValueError(f"rope_dim: expected {ROPE_DIM}, got {rope_dim}")
    if q.shape[2] % PIECE_DIMS or not 0 < q.shape[2] <= MAX_PIECES * PIECE_DIMS:
        raise ValueError(f"q: expected 128, 256, 384 or 512 dims a head, got {q.shape[2]}")
    shape = attention_shape(q, page_table, entries, rope_dim, entries_per_page)
    record, T = shape.record, shape.T
    step_bytes = record.page_bytes(T) if T else 0
    specs: dict[str, tuple[Tensor, str, torch.dtype]] = {
        "q": (q, "T H C", torch.bfloat16),
        "step": (step, f"{step_bytes}", torch.uint8),
        "window": (window, "slots window_stride", torch.uint8),
        "pages": (pages, "P page_stride", torch.uint8),
        "page_table": (page_table, "slots max_pages", torch.int32),
        "slot": (slot, "T", torch.int64),
        "position": (position, "T", torch.int64),
        "first_row": (first_row, "T", torch.int64),
        "first_position": (first_position, "T", torch.int64),
        "sink": (sink, "H", torch.float32),
        **out.specs(),
    }
    if entries is not None:
        if entries.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"entries: expected int32 or int64, got {entries.dtype}")
        specs["entries"] = (entries, "T K", entries.dtype)
    if (cos is None) != (sin is None):
        raise ValueError("sin: expected a tensor if and only if cos is one, got one of them")
    if cos is not None and sin is not None:
        pairs = f"T {rope_dim // 2}"
        specs |= {"cos": (cos, pairs, torch.float32), "sin": (sin, pairs, torch.float32)}
    check_tensors(**specs)
    check_stride("window", window, record.page_bytes(rows), f"{rows} records")
    if shape.num_entries:
        stride = record.page_bytes(entries_per_page)
        check_stride("pages", pages, stride, f"{entries_per_page} records")
    check_aligned(VECTOR_BYTES, step=step, window=window, pages=pages)
    return shape
