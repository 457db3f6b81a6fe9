"""The choice of the next token."""

from dsv4.kernels.sampling import sample

__all__ = ["sample"]
