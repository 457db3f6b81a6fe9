"""Partial interleaved RoPE with YaRN, and its inverse."""

from __future__ import annotations

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from dsv4.core.config import LayerKind, ModelConfig, YarnScaling
from dsv4.reference.precision import wide, wide_dtype


def rope_frequencies(rope_dim: int, theta: float, yarn: YarnScaling | None) -> Tensor:
    """Angular frequency of each rotated pair, radians per token.

        f_i  = theta^(-2i/R)
        f'_i = (f_i / factor) ramp_i + f_i (1 - ramp_i)
        ramp_i = clamp((i - low) / (high - low), 0, 1)
        low = floor(c(beta_fast)), high = ceil(c(beta_slow)),
        c(n) = R ln(L0 / (2 pi n)) / (2 ln theta),   L0 the original context length

    -> [R/2] FP32: the rounding of the frequencies is part of the trained model, so FP64 runs use
    the same values. YaRN acts at every position, long context or not, and has no magnitude scale.
    Source: YaRN (arXiv:2309.00071), official inference code.
    """
    i = torch.arange(0, rope_dim, 2, dtype=torch.float32)
    freqs = 1.0 / theta ** (i / rope_dim)
    if yarn is None:
        return freqs

    def correction(rotations: float) -> float:
        span = log(yarn.original_max_position_embeddings / (rotations * 2 * pi))
        return rope_dim * span / (2 * log(theta))

    low = max(floor(correction(yarn.beta_fast)), 0)
    high = min(ceil(correction(yarn.beta_slow)), rope_dim - 1)
    index = torch.arange(rope_dim // 2, dtype=torch.float32)
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    return freqs / yarn.factor * ramp + freqs * (1 - ramp)


def layer_frequencies(config: ModelConfig, kind: LayerKind) -> Tensor:
    """The table of one layer: base theta for SWA; compress theta with YaRN for CSA and HCA.

    -> [R/2] FP32. Window keys, compressed entries, queries, the indexer and the inverse rotation
    of one layer all use this same table.
    """
    if kind is LayerKind.SWA:
        return rope_frequencies(config.qk_rope_head_dim, config.rope_theta, None)
    return rope_frequencies(config.qk_rope_head_dim, config.compress_rope_theta, config.yarn)


def rope_cos_sin(positions: Tensor, freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency.

    positions [T] integer
    freqs     [R/2] FP32
    ->        cos, sin [T, R/2] FP32 (FP64 when `dtype` is FP64). The angle is an FP32 product, as
              in the official table: at position 10^6 its rounding is 0.03 rad, part of the model.
    """
    angles = positions.to(torch.float32)[:, None] * freqs[None, :].to(positions.device)
    out = wide_dtype(dtype)
    return angles.double().cos().to(out), angles.double().sin().to(out)


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
