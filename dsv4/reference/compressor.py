"""Compressor oracles: how a window of tokens becomes one compressed entry (CSA and HCA)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.core.config import LayerKind
from dsv4.reference.linear import wide_linear
from dsv4.reference.precision import wide


@dataclass(frozen=True)
class CompressorState:
    """The raw rows of tokens whose window is unfinished, or still needed by the next window.

    kappa  [n, c d]  value rows, FP32
    gamma  [n, c d]  score rows, position bias already added, FP32
    start  absolute position of row 0, a multiple of the ratio
    length absolute position after the last row

    CSA keeps the last complete window too (c = 2, up to 7 rows between calls), because entries
    overlap; HCA keeps the open window only (c = 1, up to 127 rows).
    """

    kappa: Tensor
    gamma: Tensor
    start: int
    length: int

    @classmethod
    def empty(cls, width: int, like: Tensor) -> CompressorState:
        """The state before the first token; `like` gives device and precision."""
        rows = wide(like).new_zeros(0, width)
        return cls(rows, rows, 0, 0)


def compressor_rows(
    x: Tensor, positions: Tensor, wkv: Tensor, wgate: Tensor, ape: Tensor
) -> tuple[Tensor, Tensor]:
    """Value and score rows of each token.

        kappa_p = W^KV h_p,   gamma_p = W^Z h_p + B[p mod r]           (paper eqs. 9-12, 20-21)

    x [T, D], positions [T], wkv and wgate [c d, D], ape (B) [r, c d] -> kappa, gamma [T, c d] FP32
    """
    gamma = wide_linear(x, wgate) + wide(ape)[positions % ape.shape[0]]
    return wide_linear(x, wkv), gamma


def pool_windows(kappa: Tensor, gamma: Tensor) -> Tensor:
    """HCA: one entry for each window, a softmax over its tokens in every channel.

        v_w[i] = sum_p softmax_p(gamma_p[i]) kappa_p[i],   p in window w      (paper eqs. 20-23)

    kappa, gamma [n, r, d] -> [n, d] FP32
    """
    return (gamma.softmax(dim=1) * kappa).sum(dim=1)


def pool_overlapping_windows(kappa: Tensor, gamma: Tensor) -> Tensor:
    """CSA: one entry from each window and the window before it, 2r slots in every channel.

        v_w[i] = softmax-weighted sum over
            kappa_p[i],     gamma_p[i]      p in window w - 1   (first half of the channels)
            kappa_p[d + i], gamma_p[d + i]  p in window w       (second half)  (paper eqs. 9-12)

    kappa, gamma [n, r, 2d]  windows in order; window 0 has no predecessor here
    ->           [n, d] FP32. Entry 0 pools its own window only: the missing slots have value 0 and
                 score -inf. The caller drops entry 0 where a predecessor exists but was not given.
    """
    d = kappa.shape[-1] // 2
    previous = F.pad(kappa[:-1, :, :d], (0, 0, 0, 0, 1, 0))
    previous_gamma = F.pad(gamma[:-1, :, :d], (0, 0, 0, 0, 1, 0), value=float("-inf"))
    slots = torch.cat((previous, kappa[:, :, d:]), dim=1)
    scores = torch.cat((previous_gamma, gamma[:, :, d:]), dim=1)
    return pool_windows(slots, scores)


def compress(
    state: CompressorState, kappa: Tensor, gamma: Tensor, kind: LayerKind
) -> tuple[Tensor, CompressorState]:
    """Append the rows of new tokens; return the entries they complete.

    The same function is prefill (from an empty state), chunked prefill and step decode (one row).

    state        what earlier calls left
    kappa, gamma [T, c d] rows of the next T tokens
    ->           entries [n, d] FP32, before norm and RoPE; their indices are the windows that end
                 in positions state.length .. state.length + T - 1; and the new state
    """
    r = kind.ratio
    kappa, gamma = torch.cat((state.kappa, kappa)), torch.cat((state.gamma, gamma))
    end = state.start + len(kappa)
    first, last = state.length // r, end // r  # windows that these tokens complete
    base = state.start // r
    complete = (last - base) * r
    windows = (kappa[:complete].unflatten(0, (-1, r)), gamma[:complete].unflatten(0, (-1, r)))
    if kind is LayerKind.CSA:
        none = kappa[:0, : kappa.shape[1] // 2]
        entries = pool_overlapping_windows(*windows) if complete else none
        keep = max(last - 1, 0) * r  # the last complete window feeds the next entry
    else:
        entries = pool_windows(*windows) if complete else kappa[:0]
        keep = last * r
    cut = keep - state.start
    return entries[first - base :], CompressorState(kappa[cut:], gamma[cut:], keep, end)
