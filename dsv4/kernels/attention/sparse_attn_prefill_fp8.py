"""sparse_attn_prefill with its result rounded to FP8 as the input of a projection. Triton, any SM.

The device function is that of sparse_attn_prefill; see sparse_attn_decode_fp8.
"""

from __future__ import annotations

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.attention import sparse_attn_prefill as prefill
from dsv4.kernels.common.attention_checks import Output, fp8_output
from dsv4.kernels.common.launch import INTERPRETED

REFERENCE = "dsv4.reference.paged_attention:sparse_attn_prefill_fp8"
CONFIG, tensor_core = prefill.CONFIG, prefill.tensor_core

sparse_attn_prefill_fp8_kernel = prefill.sparse_attn_prefill_kernel


def outputs(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Allocate values [T, H, C] and scales [T, H, C/128]. Doubles as the op's fake."""
    return tuple(fp8_output(q))


def launch(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
    out: tuple[Tensor, Tensor],
) -> None:  # fmt: skip
    """Fill `out`. Allocates nothing and reads nothing back, so a CUDA graph can hold it."""
    args = (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, rope_dim, ratio, entries_per_page,
    )  # fmt: skip
    prefill.attend(args, Output(*out))


SPEC = KernelSpec("sparse_attn_prefill_fp8/triton", launch, runs_on_cpu=INTERPRETED)
