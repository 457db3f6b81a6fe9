"""sparse_attn_decode with its result rounded to FP8 as the input of a projection. Triton, SM 9 on.

The device functions are those of sparse_attn_decode. A scale belongs to 128 dims of one head, so it
is found where these are finished, in the combination as in the kernel of all tiles, and what is
rounded is the BF16 number that sparse_attn_decode would have written.
"""

from __future__ import annotations

from torch import Tensor

from dsv4.core.dispatch import KernelSpec
from dsv4.kernels.attention import sparse_attn_decode as decode
from dsv4.kernels.common.attention_checks import Output, attention_shape, fp8_output
from dsv4.kernels.common.launch import INTERPRETED

REFERENCE = "dsv4.reference.paged_attention:sparse_attn_decode_fp8"
CONFIG = decode.CONFIG

sparse_attn_decode_fp8_kernel = decode.sparse_attn_decode_kernel


def outputs(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Allocate values and scales and, where programs share a token, their sums and m, l."""
    shape = attention_shape(q, page_table, entries, rope_dim, entries_per_page)
    values, value_scale = fp8_output(q)
    return values, value_scale, *decode.partials(shape, rows, q)


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


SPEC = KernelSpec("sparse_attn_decode_fp8/triton", launch, runs_on_cpu=INTERPRETED)
