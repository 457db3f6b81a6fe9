"""Block-scaled casts and back."""

from dsv4.kernels.quant import (
    fp8_act_dequantize,
    fp8_act_quantize,
    fp8_block_dequantize,
    fp8_block_quantize,
    mxfp4_act_dequantize,
    mxfp4_act_quantize,
    nvfp4_act_dequantize,
    nvfp4_act_quantize,
)

__all__ = [
    "fp8_act_dequantize",
    "fp8_act_quantize",
    "fp8_block_dequantize",
    "fp8_block_quantize",
    "mxfp4_act_dequantize",
    "mxfp4_act_quantize",
    "nvfp4_act_dequantize",
    "nvfp4_act_quantize",
]
