"""What lies between two matrices of an expert. Triton: GPUs from SM 9.0, and the interpreter."""

from dsv4.kernels.activation import gate_up_swiglu

__all__ = ["gate_up_swiglu"]
