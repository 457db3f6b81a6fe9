"""Expert oracles: clamped SwiGLU, the routed sum and the shared expert (paper sec. 2.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.reference.linear import linear
from dsv4.reference.precision import wide

ExpertWeights = tuple[Tensor, Tensor, Tensor]


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """SwiGLU with bounded inputs.

        a = silu(min(g, limit)) * clamp(u, -limit, limit)

    gate, up [T, F] -> [T, F] FP32. The gate has no lower bound.
    """
    return F.silu(wide(gate).clamp(max=limit)) * wide(up).clamp(-limit, limit)


def expert(
    x: Tensor, weights: ExpertWeights, limit: float, routing: Tensor | None = None,
    simulate_activation: bool = False,
) -> Tensor:  # fmt: skip
    """One expert.

        y = W2 (g * swiglu(W1 x, W3 x))

    x       [T, D]
    weights w1 (gate) [F, D], w2 (down) [D, F], w3 (up) [F, D]
    routing [T] FP32 or None: multiplied in before the rounding and W2, as in the official code
    ->      [T, D] in x's dtype
    """
    w1, w2, w3 = weights
    hidden = clamped_swiglu(
        linear(x, w1, simulate_activation), linear(x, w3, simulate_activation), limit
    )
    if routing is not None:
        hidden = hidden * routing[:, None]
    return linear(hidden.to(x.dtype), w2, simulate_activation)


def moe(
    x: Tensor, experts: Tensor, routing: Tensor, routed: Callable[[int], ExpertWeights],
    shared: ExpertWeights, limit: float, simulate_activation: bool = False,
) -> Tensor:  # fmt: skip
    """The routed experts of every token plus the shared expert.

        y = sum_{e chosen} E_e(x; g_e) + E_shared(x)

    x       [T, D]
    experts [T, k] ids; routing [T, k] FP32
    routed  gives the weights of one expert; called once for each expert hit
    shared  weights of the shared expert, clamped like the routed ones
    ->      [T, D] in x's dtype, summed in FP32 in order of expert id, shared last, one rounding
    """
    total = wide(torch.zeros_like(x))
    for e in experts.unique().tolist():
        token, slot = (experts == e).nonzero(as_tuple=True)
        y = expert(x[token], routed(e), limit, routing[token, slot], simulate_activation)
        total.index_add_(0, token, wide(y))
    shared_out = expert(x, shared, limit, simulate_activation=simulate_activation)
    return (total + wide(shared_out)).to(x.dtype)
