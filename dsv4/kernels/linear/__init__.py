"""Linear layers: weights in the precision of the checkpoint, read once.

*_sm90: CUDA C++, on Hopper, up to 64 tokens, *_prompt_sm90 more; without a suffix: Triton, any
number, GPUs from SM 9.0 and the interpreter. *_w8a8: inputs in FP8, which the model does not use.
"""

from dsv4.kernels.linear import (
    joined_wide_linear,
    joined_wide_linear_sm90,
    linear_fp8,
    linear_fp8_prompt_sm90,
    linear_fp8_sm90,
    linear_fp8_w8a8,
    linear_fp8_w8a8_sm90,
    wide_linear,
    wide_linear_sm90,
)

__all__ = [
    "joined_wide_linear",
    "joined_wide_linear_sm90",
    "linear_fp8",
    "linear_fp8_prompt_sm90",
    "linear_fp8_sm90",
    "linear_fp8_w8a8",
    "linear_fp8_w8a8_sm90",
    "wide_linear",
    "wide_linear_sm90",
]
