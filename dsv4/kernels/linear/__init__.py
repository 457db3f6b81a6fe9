"""Linear layers: weights in the precision of the checkpoint, read once."""

from dsv4.kernels.linear import (
    joined_wide_linear,
    joined_wide_linear_sm90,
    linear_fp8,
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
    "linear_fp8_sm90",
    "linear_fp8_w8a8",
    "linear_fp8_w8a8_sm90",
    "wide_linear",
    "wide_linear_sm90",
]
