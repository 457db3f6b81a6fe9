"""Routed experts on FP8 tokens, from the definitions of the formats: no oracle takes part."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from dsv4.reference import experts
from dsv4.testing.cases.moe import MoeCase
from dsv4.testing.numeric import relative_error

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Magnitudes by code: three bits of mantissa under four of exponent, the last code is no number.
E4M3 = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7)
        for e in range(16) for m in range(8)][:-1]  # fmt: skip
COLUMNS, GROUP = 128, 32  # that share a scale: of tokens, of weights


def nearest(v: float) -> float:
    """The closest magnitude of E4M3; of two the one with an even code."""
    return min(enumerate(E4M3), key=lambda code: (abs(code[1] - v), code[0] % 2))[1]


def rounded(row: Tensor) -> Tensor:
    """The row as E4M3 times, for each 128 columns, the least power of two that they fit under."""
    out: list[float] = []
    for part in row.split(COLUMNS):
        scale = 2.0 ** math.ceil(math.log2(float(part.abs().max()) / E4M3[-1]))
        out += [math.copysign(nearest(abs(v) / scale), v) * scale for v in part.tolist()]
    return torch.tensor(out, dtype=torch.float64)


def weight(codes: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 [N, K / 2], low nibble first, [N, K / 32] -> [N, K] FP64."""
    table = torch.tensor(E2M1 + tuple(-v for v in E2M1), dtype=torch.float64)
    values = torch.stack((table[(codes & 15).long()], table[(codes >> 4).long()]), dim=2)
    return values.flatten(1) * (2.0 ** (scales.double() - 127)).repeat_interleave(GROUP, dim=1)


def by_hand(case: MoeCase) -> Tensor:
    """moe_routed_w4a8 of one token after the other."""
    w1, s1, w3, s3, w2, s2 = case.stored
    out = torch.zeros(case.x.shape, dtype=torch.float64)
    for t, token in enumerate(case.x.double()):
        x = rounded(token)
        for e, share in zip(case.ids[t].tolist(), case.routing[t].double(), strict=True):
            gate = (weight(w1[e], s1[e]) @ x).clamp(max=case.limit)
            up = (weight(w3[e], s3[e]) @ x).clamp(-case.limit, case.limit)
            hidden = gate / (1 + torch.exp(-gate)) * up * share
            out[t] += weight(w2[e], s2[e]) @ rounded(hidden)
    return out


@cache
def example() -> tuple[MoeCase, Tensor]:
    """Two tokens of two experts each, and what is right.

    The first 64 columns are small and weigh as much as the others: a scale of their own would show.
    """
    case = MoeCase.random(2, 256, 128, 4, K=2, has_shared=False)
    case.x[:, :64] *= 2.0**-14
    for scales in (case.weights[1], case.weights[3]):
        scales[:, :, 0, :, : 64 // GROUP] += 14  # of the first tile
    return case, by_hand(case)


def deviation() -> float:
    """How far the oracle is from it."""
    case, want = example()
    return relative_error(experts.moe_routed_w4a8(**case.wide().args_w4a8()), want)
