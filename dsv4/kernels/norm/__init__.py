"""RMSNorm and what follows it: casts, RoPE, the window ring; the inverse RoPE of the output."""

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
