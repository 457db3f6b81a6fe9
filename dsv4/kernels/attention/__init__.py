"""Sparse attention on the paged FP8 cache.

*_sm90: CUDA C++, on Hopper; without a suffix: Triton, GPUs from SM 9.0 and the interpreter.
*_fp8: results in FP8, which the model does not use. Decode steps run *_decode*, prompts *_prefill*.
"""

from dsv4.kernels.attention import (
    kv_step_pack,
    latent_kv_norm_pack,
    sparse_attn_decode,
    sparse_attn_decode_fp8,
    sparse_attn_decode_fp8_sm90,
    sparse_attn_decode_sm90,
    sparse_attn_prefill,
    sparse_attn_prefill_fp8,
    sparse_attn_prefill_fp8_sm90,
    sparse_attn_prefill_sm90,
)

__all__ = [
    "kv_step_pack",
    "latent_kv_norm_pack",
    "sparse_attn_decode",
    "sparse_attn_decode_fp8",
    "sparse_attn_decode_fp8_sm90",
    "sparse_attn_decode_sm90",
    "sparse_attn_prefill",
    "sparse_attn_prefill_fp8",
    "sparse_attn_prefill_fp8_sm90",
    "sparse_attn_prefill_sm90",
]
