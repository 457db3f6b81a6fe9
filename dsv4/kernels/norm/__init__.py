"""RMSNorm and what follows it: casts, RoPE, the window ring; the inverse RoPE of the output.

Triton: GPUs from SM 9.0, and the interpreter. The model runs q_norm_rope; rms_norm in the MTP block
and, with inverse_rope, as parts of fused kernels; none of the others.
"""

from dsv4.kernels.norm import (
    inverse_rope,
    inverse_rope_quant,
    kv_norm_rope_quant_insert,
    q_kv_norm_rope_insert,
    q_norm_rope,
    rms_norm,
    rms_norm_quant,
)

__all__ = [
    "inverse_rope",
    "inverse_rope_quant",
    "kv_norm_rope_quant_insert",
    "q_kv_norm_rope_insert",
    "q_norm_rope",
    "rms_norm",
    "rms_norm_quant",
]
