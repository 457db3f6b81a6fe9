"""Block-scaled casts, registered as torch.ops.dsv4.*; what each does is said by its oracle.

Weights come apart into plain tensors here: the oracle's BlockScaledTensor is not an op's type.
"""

import torch
from torch import Tensor

from dsv4.core.dispatch import select
from dsv4.core.op import dsv4_op
from dsv4.kernels import quant as kernels

# Best first.
FP8_ACT_QUANTIZE = (kernels.fp8_act_quantize.SPEC,)
FP8_ACT_DEQUANTIZE = (kernels.fp8_act_dequantize.SPEC,)
FP8_BLOCK_QUANTIZE = (kernels.fp8_block_quantize.SPEC,)
FP8_BLOCK_DEQUANTIZE = (kernels.fp8_block_dequantize.SPEC,)
MXFP4_ACT_QUANTIZE = (kernels.mxfp4_act_quantize.SPEC,)
MXFP4_ACT_DEQUANTIZE = (kernels.mxfp4_act_dequantize.SPEC,)
NVFP4_ACT_QUANTIZE = (kernels.nvfp4_act_quantize.SPEC,)
NVFP4_ACT_DEQUANTIZE = (kernels.nvfp4_act_dequantize.SPEC,)


@dsv4_op(fake=kernels.fp8_act_quantize.outputs)
def fp8_act_quantize(x: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """See dsv4.reference.quant.fp8_act_quantize."""
    out = kernels.fp8_act_quantize.outputs(x, group)
    select(FP8_ACT_QUANTIZE, x.device).launch(x, group, out)
    return out


@dsv4_op(fake=kernels.fp8_act_dequantize.outputs)
def fp8_act_dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """See dsv4.reference.quant.fp8_act_dequantize."""
    out = kernels.fp8_act_dequantize.outputs(data, scale, dtype)
    select(FP8_ACT_DEQUANTIZE, data.device).launch(data, scale, dtype, out)
    return out


@dsv4_op(fake=kernels.fp8_block_quantize.outputs)
def fp8_block_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """See dsv4.reference.quant.fp8_block_quantize; -> its data and its scale."""
    out = kernels.fp8_block_quantize.outputs(w)
    select(FP8_BLOCK_QUANTIZE, w.device).launch(w, out)
    return out


@dsv4_op(fake=kernels.fp8_block_dequantize.outputs)
def fp8_block_dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """See dsv4.reference.fused.fp8_block_dequantize."""
    out = kernels.fp8_block_dequantize.outputs(data, scale, dtype)
    select(FP8_BLOCK_DEQUANTIZE, data.device).launch(data, scale, dtype, out)
    return out


@dsv4_op(fake=kernels.mxfp4_act_quantize.outputs)
def mxfp4_act_quantize(x: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """See dsv4.reference.quant.mxfp4_act_quantize."""
    out = kernels.mxfp4_act_quantize.outputs(x, group)
    select(MXFP4_ACT_QUANTIZE, x.device).launch(x, group, out)
    return out


@dsv4_op(fake=kernels.mxfp4_act_dequantize.outputs)
def mxfp4_act_dequantize(
    packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See dsv4.reference.quant.mxfp4_act_dequantize."""
    out = kernels.mxfp4_act_dequantize.outputs(packed, scale, dtype)
    select(MXFP4_ACT_DEQUANTIZE, packed.device).launch(packed, scale, dtype, out)
    return out


@dsv4_op(fake=lambda x, global_scale=None: kernels.nvfp4_act_quantize.outputs(x, global_scale)[:3])
def nvfp4_act_quantize(
    x: Tensor, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """See dsv4.reference.fused.nvfp4_act_quantize."""
    out = kernels.nvfp4_act_quantize.outputs(x, global_scale)
    select(NVFP4_ACT_QUANTIZE, x.device).launch(x, global_scale, out)
    return out[:3]


@dsv4_op(fake=kernels.nvfp4_act_dequantize.outputs)
def nvfp4_act_dequantize(
    packed: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """See dsv4.reference.fused.nvfp4_act_dequantize."""
    out = kernels.nvfp4_act_dequantize.outputs(packed, scale, global_scale, dtype)
    select(NVFP4_ACT_DEQUANTIZE, packed.device).launch(packed, scale, global_scale, dtype, out)
    return out
