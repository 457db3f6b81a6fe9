"""mHC: four residual streams, mixed before and after every sub-layer.

*_sm90: CUDA C++ (common/mhc_cluster.cu; for few tokens *_few_sm90.cu, for many *_many_sm90.cu),
on Hopper, for BF16 and widths that are multiples of 1024; without a suffix: Triton, GPUs from
SM 9.0 and the interpreter.
"""

from dsv4.kernels.mhc import (
    hc_head_norm,
    hc_head_norm_sm90,
    mhc_post,
    mhc_post_pre,
    mhc_post_pre_few_sm90,
    mhc_post_pre_many_sm90,
    mhc_post_pre_sm90,
    mhc_pre_norm,
    mhc_pre_norm_sm90,
)

__all__ = [
    "hc_head_norm",
    "hc_head_norm_sm90",
    "mhc_post",
    "mhc_post_pre",
    "mhc_post_pre_few_sm90",
    "mhc_post_pre_many_sm90",
    "mhc_post_pre_sm90",
    "mhc_pre_norm",
    "mhc_pre_norm_sm90",
]
