"""The rotary frequencies of a model: constants of its config that every tier must share.

Their FP32 roundings are part of the trained model, so there is one place that makes them.
"""

from __future__ import annotations

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from dsv4.core.config import LayerKind, ModelConfig, YarnScaling


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


def rope_angles(positions: Tensor, freqs: Tensor) -> Tensor:
    """Angle of each rotated pair at each position.

    positions [T] integer, freqs [R/2] FP32 -> [T, R/2] FP64 holding FP32 products, as in the
    official table: at position 10^6 their rounding is 0.03 rad, part of the model.
    """
    return (positions.to(torch.float32)[:, None] * freqs[None, :].to(positions.device)).double()
