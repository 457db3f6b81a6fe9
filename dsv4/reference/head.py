"""LM head oracle."""

from __future__ import annotations

from torch import Tensor

from dsv4.reference.linear import wide_linear
from dsv4.reference.norm import rms_norm


def lm_head(y: Tensor, norm: Tensor, head: Tensor, eps: float) -> Tensor:
    """Logits of the next token.

        logits = W RMSNorm(y)

    y [T, D] collapsed streams, norm [D], head [V, D] -> [T, V] FP32
    """
    return wide_linear(rms_norm(y, norm, eps), head)
