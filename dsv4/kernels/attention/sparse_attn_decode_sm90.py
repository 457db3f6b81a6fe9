"""Sparse attention for heads of 512 dims, CUDA C++ for Hopper; other sizes go to Triton.

One program holds the sums of 64 heads in the registers of two warp groups while two more turn the
next records into BF16, so loads and casts run beside the matrix products. Fewer heads are padded:
the keys cost the same, and on an H200 this took 50 us for 64 heads and 128 requests where the
Triton kernel took 87 us for 8 or 16 heads without padding. Tiles, groups, merges and the
combination are those of sparse_attn_decode.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.attention import sparse_attn_decode as portable
from dsv4.kernels.attention.sparse_attn_decode import REFERENCE, outputs
from dsv4.kernels.common.attention_checks import LOG2_E, Output, Shape, check_attention
from dsv4.kernels.common.cuda import Source, load, why_not

__all__ = ["REFERENCE", "outputs"]
CONFIG = {"threads": 512, "shared_bytes": 3 * 65536 + 2 * 64 * 4 + 32 + 1024}
HEADS, DIMS = 64, 512


@cache
def source(is_fp8: bool) -> Source:
    """The device function for a result in BF16 or in FP8."""
    path = Path(__file__).with_suffix(".cu")
    return Source.of(path, "sparse_attn_sm90_kernel", {"FP8": int(is_fp8)})


sparse_attn_decode_kernel = source(False)


def sources() -> list[tuple[Source, str]]:
    """What is compiled ahead of time, and an instruction that it must hold."""
    return [(sparse_attn_decode_kernel, "HGMMA")]


def fits(shape: Shape) -> bool:
    """Whether the kernel is made for these sizes."""
    return shape.record.head_dim == DIMS


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
    if not fits(shape):
        portable.attend(args, out, sums, stats)
        return
    if shape.T == 0 or shape.H == 0:
        return
    tiles, each = portable.tiles_of(shape, args[14])
    parts = -(-tiles // each)
    run(shape, args, out, sums, stats, each, parts)
    if parts > 1:
        portable.combine(shape, args, out, sums, stats, each, parts)


def magic(divisor: int) -> int:
    """M so that n // divisor is the upper half of n M, for n divisor < 2^32; as int32, 0 for 1."""
    M = 2**32 // divisor + 1
    return 0 if divisor == 1 else M - 2**32 * (M >= 2**31)


def run(
    shape: Shape, args: tuple, out: Output, sums: Tensor, stats: Tensor, each: int, parts: int
) -> None:
    """Launch the main kernel: `parts` programs of `each` tiles for 64 heads of a token."""
    (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, _, ratio, entries_per_page,
    ) = args  # fmt: skip
    is_rotated = cos is not None
    angles = (cos, sin) if is_rotated else (sink, sink)
    chosen = page_table if entries is None else entries
    load(source(out.scale is not None), q.device, CONFIG["shared_bytes"]).launch(
        shape.T * -(-shape.H // HEADS) * parts, CONFIG["threads"],
        q, step, window, pages, page_table, chosen, slot, position, first_row, first_position,
        sink, *angles, *out, sums, stats, scale * LOG2_E, shape.T, shape.H, shape.num_entries,
        page_table.shape[1], each, parts, rows, entries_per_page, ratio,
        0 if entries is None else entries.element_size() // 4, magic(entries_per_page),
        int(is_rotated), overlaps=True,
    )  # fmt: skip


SPEC = KernelSpec("sparse_attn_decode/sm90", launch, arch=(9,), requires=why_not)
