"""Linear layers and the projections around attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4.core.formats import FP8_BLOCK128, BlockScaledTensor
from dsv4.reference.norm import rms_norm, rms_norm_unweighted
from dsv4.reference.precision import wide
from dsv4.reference.quant import dequantize, fp8_act_dequantize, simulate_fp8

ACTIVATION_GROUP = 128


def linear(x: Tensor, weight: Tensor, simulate_activation: bool = False) -> Tensor:
    """y = W x, optionally with the input rounded to FP8 per token and 128 channels (W8A8).

    x      [T, K]
    weight [O, K], dequantised
    ->     [T, O] in x's dtype. Source: act_quant of the official inference code:
           e4m3 with UE8M0 scales, products accumulated in FP32.
    """
    return F.linear(simulate_fp8(x, ACTIVATION_GROUP) if simulate_activation else x, weight)


def linear_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, groups: int = 1, quantize_input: bool = False
) -> Tensor:
    """y = W x with FP8 block-scaled weights, optionally within groups of rows and columns.

        y_g = (s W)_g x_g

    x      [T, G K]  group g reads columns g K .. (g + 1) K - 1
    weight [N, K] float8_e4m3fn  rows g N/G .. (g + 1) N/G - 1 belong to group g
    scale  [ceil(N/128), ceil(K/128)] float8_e8m0fnu or FP32, one for each 128 x 128 of weight
    quantize_input  round x to FP8 per token and 128 columns (W8A8); else it stays as it is (W8A16)
    ->     [T, N] in x's dtype
    """
    x = simulate_fp8(x, ACTIVATION_GROUP) if quantize_input else x
    w_GOK = dequantize(BlockScaledTensor(FP8_BLOCK128, weight, scale), x.dtype)
    w_GOK = w_GOK.unflatten(0, (groups, -1))
    y_GTO = x.unflatten(-1, (groups, -1)).transpose(0, 1) @ w_GOK.transpose(1, 2)
    return y_GTO.transpose(0, 1).flatten(1)


def linear_fp8_w8a8(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, groups: int = 1
) -> Tensor:
    """linear_fp8 of an input that is FP8 already: what its `quantize_input` makes of it (W8A8).

    x        [T, G K] float8_e4m3fn, as fp8_act_quantize or sparse_attn_decode_fp8 gives it
    x_scale  [T, G K / 128] float8_e8m0fnu
    ->       [T, N] BF16; the rest as for linear_fp8
    """
    return linear_fp8(fp8_act_dequantize(x, x_scale, torch.bfloat16), weight, scale, groups)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """y = W x in FP32 (FP64 for FP64): compressor, router and LM head.

    x [T, K], weight [O, K] -> [T, O] FP32
    """
    return F.linear(wide(x), wide(weight))


def joined_wide_linear(
    x: Tensor, weight: Tensor, bias: Tensor, position: Tensor, parts: list[int]
) -> Tensor:
    """wide_linear of several matrices that share their input, with a bias by position.

        y = W x + B[position mod R]

    x        [T, K]
    weight   [N, K]  the matrices below each other, `parts` rows of each
    bias     [R, N] FP32  the place of a token in its window picks the row: a compressor's `ape`
    position [T] int64
    ->       [T N] FP32, one part after the other: [T, parts[0]], then [T, parts[1]], ...
    """
    y = wide_linear(x, weight) + wide(bias)[position % len(bias)]
    return torch.cat([part.flatten() for part in y.split(parts, dim=1)])


def query_latent(
    x: Tensor, wq_a: Tensor, q_norm: Tensor, eps: float, simulate_activation: bool = False
) -> Tensor:
    """Down-project the hidden state to the query latent, shared by the heads and the indexer.

        c^Q = RMSNorm(W^DQ h)            (paper sec. 2.3.1)

    x [T, D], wq_a [L, D], q_norm [L] -> [T, L]
    """
    return rms_norm(linear(x, wq_a, simulate_activation), q_norm, eps)


def query_heads(
    latent: Tensor, wq_b: Tensor, num_heads: int, eps: float, simulate_activation: bool = False
) -> Tensor:
    """Up-project the latent to the query heads and normalise each head, without a weight.

        q_h = RMSNorm(W^UQ_h c^Q)            (paper sec. 2.3.1)

    latent [T, L], wq_b [H C, L] -> [T, H, C], before RoPE
    """
    q_THC = linear(latent, wq_b, simulate_activation).unflatten(-1, (num_heads, -1))
    return rms_norm_unweighted(q_THC, eps)


def grouped_output(
    o: Tensor, wo_a: Tensor, wo_b: Tensor, groups: int, simulate_activation: bool = False
) -> Tensor:
    """Project the heads back to the hidden size in two steps: within groups, then across them.

        z_g = W^OA_g [o_h : h in group g],   u = W^OB [z_1; ...; z_G]            (paper sec. 2.3.1)

    o    [T, H, C]  attention output after the inverse RoPE
    wo_a [G O, H C / G]  rows g O .. (g + 1) O - 1 belong to group g
    wo_b [D, G O]
    ->   [T, D]. The input of wo_a is never quantised (it is BF16 in the official code).
    """
    o_TGK = o.flatten(1).unflatten(-1, (groups, -1))
    w_GOK = wo_a.unflatten(0, (groups, -1))
    z_GTO = o_TGK.transpose(0, 1) @ w_GOK.transpose(1, 2)
    return linear(z_GTO.transpose(0, 1).flatten(1), wo_b, simulate_activation)
