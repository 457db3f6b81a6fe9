"""RMSNorm oracles."""

from __future__ import annotations

from torch import Tensor

from dsv4.reference.precision import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale every row to unit root mean square, then by a learned weight.

        y = x / sqrt(mean(x^2) + eps) * w

    x      [..., D]
    weight [D]
    ->     [..., D] in x's dtype: computed in FP32 (FP64 for FP64), one rounding at the end,
           after the weight. Source: official inference code, RMSNorm.
    """
    h = wide(x)
    h = h * (h.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (h * wide(weight)).to(x.dtype)


def rms_norm_unweighted(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a weight: the norm of every query head.

    x  [T, H, C]
    -> [T, H, C] in x's dtype. The official code rounds each step to BF16; here, as in serving
       engines, there is one rounding at the end.
    """
    h = wide(x)
    return (h * (h.square().mean(dim=-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
