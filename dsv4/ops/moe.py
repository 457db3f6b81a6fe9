"""Ops of the routed experts, registered as torch.ops.dsv4.*; their oracles say what they do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.expert_tiles import to_tiles
from dsv4.core.formats import BlockScaledTensor
from dsv4.core.op import dsv4_op
from dsv4.kernels.moe import moe_routed as portable
from dsv4.kernels.moe import moe_routed_grouped as grouped
from dsv4.kernels.moe import moe_routed_sm90
from dsv4.kernels.moe import moe_routed_w4a8 as w4a8
from dsv4.kernels.moe import moe_routed_w4a8_sm100 as w4a8_sm100
from dsv4.kernels.moe import moe_with_shared_sm90 as with_shared
from dsv4.ops.activation import gate_up_swiglu
from dsv4.ops.linear import linear_fp8

# Best first. Up to 64 tokens an expert's weights decide, beyond them the matrix units. Within each
# kernel a token gets the same bits in any batch; the decode kernel adds in another order than the
# grouped one, so on Hopper its last bits can differ between 64 tokens in a call and 65.
MOE_ROUTED_DECODE = (moe_routed_sm90.SPEC, grouped.SPEC, portable.SPEC)
MOE_ROUTED = (grouped.SPEC, portable.SPEC)
MOE_ROUTED_W4A8 = (w4a8_sm100.SPEC, w4a8.SPEC)
# Where it does not run, its parts do: they give the same bits.
MOE_WITH_SHARED = with_shared.SPEC


def _result(*args: object, **kwargs: object) -> Tensor:
    return portable.outputs(*args, **kwargs)[0]  # type: ignore[arg-type]


@dsv4_op(fake=_result)
def moe_routed(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, shared: Tensor | None, limit: float,
    first_expert: int, format: str,
) -> Tensor:  # fmt: skip
    """See dsv4.reference.experts.moe_routed."""
    args = (
        x, ids, routing, w1, s1, w3, s3, w2, s2, global_scale, shared, limit, first_expert, format,
    )  # fmt: skip
    is_decode = len(x) <= moe_routed_sm90.MAX_TOKENS
    kernel = select(MOE_ROUTED_DECODE if is_decode else MOE_ROUTED, x.device)
    out = (grouped if kernel is grouped.SPEC else portable).outputs(*args)
    kernel.launch(*args, out)
    return out[0]


@dsv4_op(fake=lambda x, *args, **kwargs: torch.empty_like(x))
def moe_with_shared(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, gate_up: Tensor, gate_up_scale: Tensor,
    down: Tensor, down_scale: Tensor, limit: float, first_expert: int, format: str,
    after_router: bool,
) -> Tensor:  # fmt: skip
    """See dsv4.reference.experts.moe_with_shared."""
    with_shared.check_shared(x, w1, gate_up, gate_up_scale, down, down_scale)
    routed = x, ids, routing, w1, s1, w3, s3, w2, s2, global_scale
    options = limit, first_expert, format
    reason = with_shared.why_not(x, gate_up, gate_up_scale, down_scale)
    if (reason or MOE_WITH_SHARED.why_not(x.device)) is None:
        args = *routed, gate_up, gate_up_scale, down, down_scale, *options, after_router
        out = with_shared.outputs(*args)
        MOE_WITH_SHARED.launch(*args, out)
        return out[0]
    hidden = gate_up_swiglu(linear_fp8(x, gate_up, gate_up_scale), limit)
    return moe_routed(*routed, linear_fp8(hidden, down, down_scale), *options)


@dsv4_op(fake=lambda x, *args, **kwargs: torch.empty_like(x))
def moe_routed_w4a8(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, shared: Tensor | None, limit: float, first_expert: int,
) -> Tensor:  # fmt: skip
    """See dsv4.reference.experts.moe_routed_w4a8."""
    args = x, ids, routing, w1, s1, w3, s3, w2, s2, shared, limit, first_expert
    kernel = select(MOE_ROUTED_W4A8, x.device)
    is_native = kernel is w4a8_sm100.SPEC
    out = (w4a8_sm100 if is_native else w4a8).outputs(*args)
    kernel.launch(*args, out)
    return out[0]


def stack_experts(weights: Sequence[BlockScaledTensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """One matrix of every expert as the ops take it: in tiles, and stacked.

    -> codes [E, N / 8, K / 128, 8, 64] uint8, scales [E, N / 8, K / 128, 8, 128 / group] uint8,
       global scales [E] FP32 or None
    `core.expert_tiles.from_tiles` of codes[e] and scales[e] is expert e again. Raises ValueError
    for MXFP4 scales that the kernels do not decode exactly, outside 2^-64 .. 2^65; no trained
    weight comes near them.
    """
    first = weights[0]
    if first.format.name not in portable.GROUPS:
        raise ValueError(f"weights: expected mxfp4 or nvfp4, got {first.format.name}")
    columns = first.shape[1]
    codes = torch.stack([to_tiles(w.data.view(torch.uint8), columns) for w in weights])
    scales = torch.stack([to_tiles(w.scale.view(torch.uint8), columns) for w in weights])
    if first.format.has_global:
        parts = [w.global_scale for w in weights if w.global_scale is not None]
        return codes, scales, torch.stack([p.reshape(()) for p in parts])
    check_expert_scales(scales)
    return codes, scales, None


def check_expert_scales(scales: Tensor) -> None:
    """Raises ValueError for bytes of MXFP4 scales that the kernels decode wrongly."""
    low, high = int(scales.min()), int(scales.max())
    if low < 63 or high > 192:
        raise ValueError(f"weights: expected scale bytes from 63 to 192, got {low} to {high}")
