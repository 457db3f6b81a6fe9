"""Sparse attention for chunks of prompts, CUDA C++ for Hopper.

The kernel of sparse_attn_decode_sm90 with all tiles of a query in one program; other sizes go to
Triton.
"""

from __future__ import annotations

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.attention import sparse_attn_decode_sm90 as decode
from dsv4.kernels.attention import sparse_attn_prefill as portable
from dsv4.kernels.attention.sparse_attn_prefill import REFERENCE, outputs
from dsv4.kernels.common.attention_checks import Output, check_attention
from dsv4.kernels.common.cuda import Source, why_not

__all__ = ["REFERENCE", "outputs"]
CONFIG = decode.CONFIG
ALL_TILES = 1 << 30

sparse_attn_prefill_kernel = decode.sparse_attn_decode_kernel


def sources() -> list[tuple[Source, str]]:
    """What is compiled ahead of time, and an instruction that it must hold."""
    return [(sparse_attn_prefill_kernel, "HGMMA")]


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
    if not decode.fits(shape):
        portable.attend(args, out)
    elif shape.T and shape.H:
        sink = args[10]
        decode.run(shape, args, out, sink, sink, ALL_TILES, 1)


SPEC = KernelSpec("sparse_attn_prefill/sm90", launch, arch=(9,), requires=why_not)
