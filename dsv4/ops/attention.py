"""Attention ops, registered as torch.ops.dsv4.*; what each does is said by its oracle.

Within a step and layer: kv_step_pack, the inserts into the pages, attention, and only then
kv_window_append, which overwrites ring rows that attention still reads.
"""

from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels import attention as kernels

# Best first.
KV_STEP_PACK = (kernels.kv_step_pack.SPEC,)
LATENT_KV_NORM_PACK = (kernels.latent_kv_norm_pack.SPEC,)
SPARSE_ATTN_DECODE = (kernels.sparse_attn_decode_sm90.SPEC, kernels.sparse_attn_decode.SPEC)
SPARSE_ATTN_PREFILL = (kernels.sparse_attn_prefill_sm90.SPEC, kernels.sparse_attn_prefill.SPEC)
SPARSE_ATTN_DECODE_FP8 = (
    kernels.sparse_attn_decode_fp8_sm90.SPEC,
    kernels.sparse_attn_decode_fp8.SPEC,
)
SPARSE_ATTN_PREFILL_FP8 = (
    kernels.sparse_attn_prefill_fp8_sm90.SPEC,
    kernels.sparse_attn_prefill_fp8.SPEC,
)


@dsv4_op(fake=kernels.kv_step_pack.outputs)
def kv_step_pack(kv: Tensor, rope_dim: int) -> Tensor:
    """See dsv4.reference.paged_attention.kv_step_pack."""
    out = kernels.kv_step_pack.outputs(kv, rope_dim)
    select(KV_STEP_PACK, kv.device).launch(kv, rope_dim, out)
    return out


@dsv4_op(fake=kernels.latent_kv_norm_pack.outputs)
def latent_kv_norm_pack(
    x: Tensor, q_norm: Tensor, kv_norm: Tensor, cos: Tensor, sin: Tensor, position: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See dsv4.reference.paged_attention.latent_kv_norm_pack."""
    out = kernels.latent_kv_norm_pack.outputs(x, q_norm, kv_norm, cos, sin, position, eps)
    kernel = select(LATENT_KV_NORM_PACK, x.device)
    kernel.launch(x, q_norm, kv_norm, cos, sin, position, eps, out)
    return out


@dsv4_op(fake=kernels.sparse_attn_prefill.outputs)
def sparse_attn_decode(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> Tensor:  # fmt: skip
    """See dsv4.reference.paged_attention.sparse_attn_decode."""
    args = (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, rope_dim, ratio, entries_per_page,
    )  # fmt: skip
    out = kernels.sparse_attn_decode.outputs(*args)
    select(SPARSE_ATTN_DECODE, q.device).launch(*args, out)
    return out[0]


@dsv4_op(fake=kernels.sparse_attn_prefill.outputs)
def sparse_attn_prefill(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> Tensor:  # fmt: skip
    """See dsv4.reference.paged_attention.sparse_attn_prefill."""
    args = (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, rope_dim, ratio, entries_per_page,
    )  # fmt: skip
    out = kernels.sparse_attn_prefill.outputs(*args)
    select(SPARSE_ATTN_PREFILL, q.device).launch(*args, out)
    return out


@dsv4_op(fake=kernels.sparse_attn_prefill_fp8.outputs)
def sparse_attn_decode_fp8(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See dsv4.reference.paged_attention.sparse_attn_decode_fp8."""
    args = (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, rope_dim, ratio, entries_per_page,
    )  # fmt: skip
    out = kernels.sparse_attn_decode_fp8.outputs(*args)
    select(SPARSE_ATTN_DECODE_FP8, q.device).launch(*args, out)
    return out[:2]


@dsv4_op(fake=kernels.sparse_attn_prefill_fp8.outputs)
def sparse_attn_prefill_fp8(
    q: Tensor, step: Tensor, window: Tensor, pages: Tensor, page_table: Tensor,
    entries: Tensor | None, slot: Tensor, position: Tensor, first_row: Tensor,
    first_position: Tensor, sink: Tensor, cos: Tensor | None, sin: Tensor | None, scale: float,
    rows: int, rope_dim: int, ratio: int, entries_per_page: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See dsv4.reference.paged_attention.sparse_attn_prefill_fp8."""
    args = (
        q, step, window, pages, page_table, entries, slot, position, first_row, first_position,
        sink, cos, sin, scale, rows, rope_dim, ratio, entries_per_page,
    )  # fmt: skip
    out = kernels.sparse_attn_prefill_fp8.outputs(*args)
    select(SPARSE_ATTN_PREFILL_FP8, q.device).launch(*args, out)
    return out
