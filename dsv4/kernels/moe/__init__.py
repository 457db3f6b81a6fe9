"""Kernels of the routed experts.

moe_routed_sm90: CUDA C++, on Hopper, up to 64 tokens; moe_with_shared_sm90: the same with the
shared expert, one token; moe_routed_grouped: Triton, more tokens, Blackwell and the interpreter;
moe_routed: Triton, where neither runs. *_w4a8*: inputs in FP8, which the model does not use.
"""

from dsv4.kernels.moe import moe_routed, moe_routed_sm90

__all__ = ["moe_routed", "moe_routed_sm90"]
