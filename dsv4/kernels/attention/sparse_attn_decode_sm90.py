"""Sparse attention for heads of 512 dims, CUDA C++ for Hopper; other sizes go to Triton.

One program holds the sums of 64 heads in the registers of two warp groups while two more turn the
next records into BF16, so loads and casts run beside the matrix products. Fewer heads are padded:
the keys cost the same, and on an H200 this took 50 us for 64 heads and 128 requests where the
Triton kernel took 87 us for 8 or 16 heads without padding. Tiles, groups, merges and the
combination are those of sparse_attn_decode.py. Where few tokens have few tiles, the programs of a
token are clusters, each for some of the value dims, and combine their parts through shared memory
without a second kernel; by the same arithmetic, so the bits tell nothing of it. What each way takes
is in docs/performance/attention.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.attention import sparse_attn_decode as portable
from dsv4.kernels.attention.sparse_attn_decode import REFERENCE, outputs
from dsv4.kernels.common.attention_checks import (
    LOG2_E,
    VECTOR_BYTES,
    Output,
    Shape,
    check_attention,
)
from dsv4.kernels.common.checks import check_aligned
from dsv4.kernels.common.cuda import Source, load, magic, why_not

__all__ = ["REFERENCE", "outputs"]
CONFIG = {"threads": 512, "shared_bytes": 3 * 65536 + 2 * 64 * 4 + 48 + 10240 + 1024}
HEADS, DIMS = 64, 512
# How many clusters may share the value dims of a token, and the fewest blocks of such a cluster:
# with fewer, each has so many heads to finish that a second kernel is faster.
SPLITS = {4: 1, 2: 8}
MAX_CLUSTER, MAX_EACH = 16, 2  # blocks of a cluster; tiles of a block, where 4 share the dims


class Params(ctypes.Structure):
    """`struct Params` of the device code."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (
            "q", "step", "window", "pages", "table", "entries", "slot", "position", "first_row",
            "first_position", "sink", "cos", "sin", "out", "out_scale", "sums", "stats",
        )),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in (
            "T", "H", "K", "max_pages", "tiles_each", "parts", "rows", "page_rows", "ratio",
            "entry_words", "page_magic", "is_rotated",
        )),
    ]  # fmt: skip


@cache
def source(is_fp8: bool, split: int = 0) -> Source:
    """The device function for a result in BF16 or in FP8; split: clusters that share the dims."""
    defines = {"FP8": int(is_fp8), "SPLIT": split, "PARAMS_BYTES": ctypes.sizeof(Params)}
    return Source.of(Path(__file__).with_suffix(".cu"), "sparse_attn_sm90_kernel", defines)


sparse_attn_decode_kernel = source(False)


def sources(is_fp8: bool = False) -> list[tuple[Source, str]]:
    """What is compiled ahead of time, and an instruction that it must hold."""
    clusters = [(source(is_fp8, split), "UCGABAR_ARV") for split in (4, 2)]
    return [(source(is_fp8), "HGMMA"), *clusters]


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
    if parts > 1 and each == 1 and (plan := clusters(shape, tiles, args[0].device)):
        run(shape, args, out, sums, stats, *plan)
        return
    run(shape, args, out, sums, stats, each, parts)
    if parts > 1:
        portable.combine(shape, args, out, sums, stats, each, parts)


def clusters(shape: Shape, tiles: int, device: torch.device) -> tuple[int, int, int] | None:
    """How clusters attend to `tiles` tiles of each token, or None if too few fit at once."""
    if tiles > MAX_CLUSTER * MAX_EACH:
        return None
    kernel = load(source(False, 4), device, CONFIG["shared_bytes"])
    resident = partial(kernel.resident_clusters, CONFIG["threads"])
    return plan_clusters(shape.T * -(-shape.H // HEADS), tiles, resident)


def plan_clusters(
    programs: int, tiles: int, resident: Callable[[int], int]
) -> tuple[int, int, int] | None:
    """Tiles of a block, blocks of a cluster, clusters that share the dims of 64 heads of a token.

    programs  64 heads of a token each
    resident  how many clusters of a size run at once; if not all do, two kernels are faster

    None where two kernels are faster. The finest split that fits is taken: each block then reads
    the least from the others.
    """
    each = -(-tiles // MAX_CLUSTER)
    blocks = -(-tiles // each)
    for split, fewest in SPLITS.items():
        is_made = each == 1 or (each == MAX_EACH and split == 4)
        if is_made and blocks >= fewest and programs * split <= resident(blocks):
            return each, blocks, split
    return None


def run(
    shape: Shape, args: tuple, out: Output, sums: Tensor, stats: Tensor, each: int, parts: int,
    split: int = 0,
) -> None:  # fmt: skip
    """Launch the main kernel: `parts` programs of `each` tiles for 64 heads of a token.

    sums, stats  of parts, if there are several programs that are no cluster
    split  if not 0, programs are clusters of `parts`, and so many of them share the value dims
    """
    (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, _, ratio, entries_per_page,
    ) = args  # fmt: skip
    check_aligned(VECTOR_BYTES, q=q, out=out.values)
    is_rotated = cos is not None
    angles = (cos, sin) if is_rotated else (sink, sink)
    chosen = page_table if entries is None else entries
    tensors = (
        q, step, window, pages, page_table, chosen, slot, position, first_row, first_position,
        sink, *angles, *out, sums, stats,
    )  # fmt: skip
    params = Params(
        *(None if x is None else x.data_ptr() for x in tensors), scale * LOG2_E, shape.T, shape.H,
        shape.num_entries, page_table.shape[1], each, parts, rows, entries_per_page, ratio,
        0 if entries is None else entries.element_size() // 4, magic(entries_per_page), is_rotated,
    )  # fmt: skip
    kernel = load(source(out.scale is not None, split), q.device, CONFIG["shared_bytes"])
    programs = shape.T * -(-shape.H // HEADS) * parts * max(split, 1)
    kernel.launch(
        num_blocks(programs, kernel.num_sms, each, parts, split), CONFIG["threads"], params,
        overlaps=True, cluster=parts if split else 1,
    )  # fmt: skip


def num_blocks(programs: int, num_sms: int, each: int, parts: int, split: int) -> int:
    """How many blocks run `programs` of `each` tiles, `parts` of them for a token.

    A block goes on to another program where all have one tile, or all tiles of a token. Of several
    groups of tiles the last is smaller: SMs take those as they become free.
    """
    goes_on = not split and 1 in (each, parts)
    return min(programs, num_sms) if goes_on else programs


SPEC = KernelSpec("sparse_attn_decode/sm90", launch, arch=(9,), requires=why_not)
