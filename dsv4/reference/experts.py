"""Expert oracles: clamped SwiGLU, the routed sum and the shared expert (paper sec. 2.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.core.expert_tiles import from_tiles
from dsv4.core.formats import FORMATS, BlockScaledTensor
from dsv4.reference.linear import linear, linear_fp8
from dsv4.reference.precision import wide
from dsv4.reference.quant import dequantize

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


def moe_routed(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, shared: Tensor | None, limit: float,
    first_expert: int, format: str,
) -> Tensor:  # fmt: skip
    """The routed experts on weights in tiles of the stored bytes, plus what the shared expert gave.

    x is read as it is (W4A16).

    x       [T, D]
    ids     [T, K] int32; those outside first_expert .. first_expert + E - 1 belong to others
            (another device's experts, or a padding row) and count nothing
    routing [T, K] FP32
    w1, w3  [E, F / 8, D / 128, 8, 64] uint8 nibbles of gate and up, `core.expert_tiles.to_tiles` of
            [E, F, D / 2]; s1, s3 [E, F / 8, D / 128, 8, 128 / group] their scales as bytes
    w2, s2  [E, D / 8, F / 128, 8, 64] of down, and its scales
    global_scale  [3, E] FP32 of w1, w3 and w2 ("nvfp4"), or None
    shared  [T, D] or None
    format  "mxfp4" or "nvfp4"
    ->      [T, D] in x's dtype, summed in FP32 in order of expert id, shared last, one rounding
    """
    weights = tuple(from_tiles(w) for w in (w1, s1, w3, s3, w2, s2))
    return _routed(x, ids, routing, weights, global_scale, shared, limit, first_expert, format)


def moe_with_shared(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, global_scale: Tensor | None, gate_up: Tensor, gate_up_scale: Tensor,
    down: Tensor, down_scale: Tensor, limit: float, first_expert: int, format: str,
    after_router: bool,
) -> Tensor:  # fmt: skip
    """`moe_routed` with the shared expert's matrices in place of what it gave.

        y = sum_e g_e W2_e swiglu(W1_e x, W3_e x) + D swiglu(G x, U x)

    gate_up [2 F, D] float8_e4m3fn, G above U; down [D, F]; scales one for each 128 x 128 of either,
            float8_e8m0fnu or FP32
    after_router  whether the launch just before is that of router_topk or router_hash, which gave
            ids and routing; x and weights were there before it. Nothing but time depends on it
    """
    gate, up = linear_fp8(x, gate_up, gate_up_scale).chunk(2, dim=1)
    hidden = clamped_swiglu(gate, up, limit).to(x.dtype)
    shared = linear_fp8(hidden, down, down_scale)
    return moe_routed(
        x, ids, routing, w1, s1, w3, s3, w2, s2, global_scale, shared, limit, first_expert, format
    )


def moe_routed_w4a8(
    x: Tensor, ids: Tensor, routing: Tensor, w1: Tensor, s1: Tensor, w3: Tensor, s3: Tensor,
    w2: Tensor, s2: Tensor, shared: Tensor | None, limit: float, first_expert: int,
) -> Tensor:  # fmt: skip
    """As `moe_routed` with MXFP4 weights, the input of every product rounded to FP8.

        y = sum_e W2_e q(g_e swiglu(W1_e q(x), W3_e q(x))) + shared

    q rounds to E4M3 with a UE8M0 scale for each token and 128 columns: `fp8_act_quantize`, as the
    official inference code does for experts too.
    """
    weights = tuple(from_tiles(w) for w in (w1, s1, w3, s3, w2, s2))
    return _routed(x, ids, routing, weights, None, shared, limit, first_expert, "mxfp4", True)


def _routed(
    x: Tensor, ids: Tensor, routing: Tensor, stored: tuple[Tensor, ...],
    global_scale: Tensor | None, shared: Tensor | None, limit: float, first_expert: int,
    format: str, simulate_activation: bool = False,
) -> Tensor:  # fmt: skip
    w1, s1, w3, s3, w2, s2 = stored
    fmt = FORMATS[format]
    scale_dtype = torch.float8_e4m3fn if fmt.has_global else torch.float8_e8m0fnu

    def weight(i: int, e: int, data: Tensor, scale: Tensor) -> Tensor:
        one = None if global_scale is None else global_scale[i, e]
        stored = BlockScaledTensor(fmt, data[e], scale[e].view(scale_dtype), one)
        return dequantize(stored, wide(x).dtype)

    total = wide(torch.zeros_like(x))
    for e in ids.unique().tolist():
        local = e - first_expert
        if not 0 <= local < len(w1):
            continue
        token, slot = (ids == e).nonzero(as_tuple=True)
        parts = (weight(0, local, w1, s1), weight(2, local, w2, s2), weight(1, local, w3, s3))
        weights = tuple(w.to(x.dtype) for w in parts)
        y = expert(
            x[token], weights, limit, routing[token, slot].to(wide(x).dtype), simulate_activation
        )
        total.index_add_(0, token, wide(y))
    if shared is not None:
        total = total + wide(shared)
    return total.to(x.dtype)
