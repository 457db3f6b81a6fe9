"""sparse_attn_decode with its result rounded to FP8, CUDA C++ for Hopper; other sizes: Triton.

The kernel of sparse_attn_decode_sm90, which finds a scale among the four threads of a head.
"""

from __future__ import annotations

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.attention import sparse_attn_decode_sm90 as decode
from dsv4.kernels.attention.sparse_attn_decode_fp8 import REFERENCE, outputs
from dsv4.kernels.common.attention_checks import Output
from dsv4.kernels.common.cuda import Source, why_not

__all__ = ["REFERENCE", "outputs"]
CONFIG = decode.CONFIG

sparse_attn_decode_fp8_kernel = decode.source(is_fp8=True)


def sources() -> list[tuple[Source, str]]:
    """What is compiled ahead of time, and instructions that it must hold."""
    return [*decode.sources(is_fp8=True), (sparse_attn_decode_fp8_kernel, "E4M3")]


def launch(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    values, value_scale, *shared = out
    args = (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, rope_dim, ratio, entries_per_page,
    )  # fmt: skip
    decode.attend(args, Output(values, value_scale), *shared)


SPEC = KernelSpec("sparse_attn_decode_fp8/sm90", launch, arch=(9,), requires=why_not)
