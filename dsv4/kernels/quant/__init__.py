"""Block-scaled casts and back. Triton: GPUs from SM 8.9, and the interpreter.

The model does not use them: its kernels cast and decode on the way.
"""

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
