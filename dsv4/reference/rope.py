"""Partial interleaved RoPE with YaRN, and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.core.rope import layer_frequencies, rope_angles, rope_frequencies
from dsv4.reference.precision import wide, wide_dtype

__all__ = ["apply_rope", "layer_frequencies", "rope_cos_sin", "rope_frequencies"]


def rope_cos_sin(positions: Tensor, freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency.

    positions [T] integer
    freqs     [R/2] FP32
    ->        cos, sin [T, R/2] FP32 (FP64 when `dtype` is FP64)
    """
    angles, out = rope_angles(positions, freqs), wide_dtype(dtype)
    return angles.cos().to(out), angles.sin().to(out)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the last R dims of every vector; dims 2i and 2i+1 form one complex number.

        (a + jb) <- (a + jb) e^{+j t f_i},   e^{-j t f_i} for the inverse

    x        [T, ..., C]
    cos, sin [T, R/2]
    ->       [T, ..., C] in x's dtype, the first C - R dims untouched. Pairs are interleaved; there
             is no half-split variant in DSV4. Source: paper sec. 2.3.3, official inference code.
    """
    rope_dim = 2 * cos.shape[-1]
    nope, rope = x[..., :-rope_dim], wide(x[..., -rope_dim:])
    shape = (cos.shape[0], *(1,) * (x.dim() - 2), cos.shape[-1])
    cos, sin = cos.view(shape), sin.view(shape)
    if inverse:
        sin = -sin
    a, b = rope[..., 0::2], rope[..., 1::2]
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    return torch.cat((nope, rotated.to(x.dtype)), dim=-1)
