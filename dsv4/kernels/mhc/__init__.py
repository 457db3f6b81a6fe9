"""mHC: four residual streams, mixed before and after every sub-layer."""

from dsv4.kernels.mhc import (
    hc_head_norm,
    hc_head_norm_sm90,
    mhc_post,
    mhc_post_pre,
    mhc_post_pre_sm90,
    mhc_pre_norm,
    mhc_pre_norm_sm90,
)

__all__ = [
    "hc_head_norm",
    "hc_head_norm_sm90",
    "mhc_post",
    "mhc_post_pre",
    "mhc_post_pre_sm90",
    "mhc_pre_norm",
    "mhc_pre_norm_sm90",
]
