"""Kernels of the routed experts."""

from dsv4.kernels.moe import moe_routed, moe_routed_sm90

__all__ = ["moe_routed", "moe_routed_sm90"]
