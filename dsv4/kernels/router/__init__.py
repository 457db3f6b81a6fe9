"""Which experts see a token, with what weight, and the lists a grouped product works through.

Triton: GPUs from SM 9.0, and the interpreter.
"""

from dsv4.kernels.router import moe_align, router_hash, router_topk

__all__ = ["moe_align", "router_hash", "router_topk"]
