"""Linear layers: weights in the precision of the checkpoint, read once."""

from dsv4.kernels.linear import linear_fp8, linear_fp8_sm90, wide_linear

__all__ = ["linear_fp8", "linear_fp8_sm90", "wide_linear"]
