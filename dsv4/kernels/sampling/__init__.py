"""The choice of the next token. Triton: GPUs from SM 9.0, and the interpreter."""

from dsv4.kernels.sampling import sample

__all__ = ["sample"]
