"""Linear layers: weights in the precision of the checkpoint, read once."""

from dsv4.kernels.linear import joined_wide_linear, linear_fp8, linear_fp8_sm90, wide_linear

__all__ = ["joined_wide_linear", "linear_fp8", "linear_fp8_sm90", "wide_linear"]
