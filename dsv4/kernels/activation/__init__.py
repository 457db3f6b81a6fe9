"""What lies between two matrices of an expert."""

from dsv4.kernels.activation import gate_up_swiglu

__all__ = ["gate_up_swiglu"]
