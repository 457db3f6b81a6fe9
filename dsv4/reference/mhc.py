"""mHC oracles: four residual streams, mixed before and after every sub-layer (paper sec. 2.2)."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

from dsv4.reference.norm import rms_norm
from dsv4.reference.precision import wide
from dsv4.reference.quant import fp8_act_quantize


def mhc_mixes(x: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """Project the RMS-normalised streams of a token to its raw mixing coefficients.

        m = (fn . vec(X)) / sqrt(mean(vec(X)^2) + eps)

    x  [T, N, D]   residual streams, flattened stream-major
    fn [M, N D]    M = N (N + 2) for a sub-layer, N for the head
    -> [T, M] FP32. The norm factor multiplies after the product, as in the official code; the norm
       has no weight.
    """
    flat = wide(x).flatten(1)
    rho = (flat.square().mean(dim=-1, keepdim=True) + norm_eps).rsqrt()
    return (flat @ wide(fn).T) * rho


def mhc_split_sinkhorn(
    mixes: Tensor, scale: Tensor, base: Tensor, iters: int = 20, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the raw mixes into the three maps of X' = B X + C F(A X).

        A = sigmoid(a) + eps   C = 2 sigmoid(c)   B^T = S(b)
        S: softmax over rows + eps, columns normalised; then iters - 1 times rows, columns
                                                                           (paper eq. 8)

    mixes [T, N(N+2)]  laid out [a: N | c: N | b: N N], T tokens, N = 4 streams
    scale [3]          gains of a, c and b
    base  [N(N+2)]     biases
    ->                 pre (A) [T, N], post (C) [T, N], comb (B transposed) [T, N, N], FP32

    comb[t, i, j] carries old stream i into new stream j. Every normalisation adds eps to its sum:
    the eps terms are part of the trained model, not a guard. See also eqs. 17-19 of the mHC paper,
    arXiv:2512.24880.
    """
    n = isqrt(mixes.shape[-1] + 1) - 1
    a_TN, c_TN, b = wide(mixes).split([n, n, n * n], dim=-1)
    a_base, c_base, b_base = wide(base).split([n, n, n * n])
    pre_TN = (a_TN * scale[0] + a_base).sigmoid() + eps
    post_TN = 2 * (c_TN * scale[1] + c_base).sigmoid()
    comb_TNN = (b * scale[2] + b_base).unflatten(-1, (n, n)).softmax(dim=-1) + eps
    comb_TNN = comb_TNN / (comb_TNN.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb_TNN = comb_TNN / (comb_TNN.sum(dim=-1, keepdim=True) + eps)
        comb_TNN = comb_TNN / (comb_TNN.sum(dim=-2, keepdim=True) + eps)
    return pre_TN, post_TN, comb_TNN


def mhc_pre(x: Tensor, pre: Tensor) -> Tensor:
    """Collapse the streams into the input of a sub-layer.

        y = sum_j A_j X_j            (paper sec. 2.2)

    x   [T, N, D]
    pre [T, N] FP32
    ->  [T, D] in x's dtype, one rounding
    """
    return (wide(pre)[:, :, None] * wide(x)).sum(dim=1).to(x.dtype)


def mhc_post(o: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Write the output of a sub-layer back into the streams, and mix them.

        X'_k = C_k o + sum_j comb_jk X_j            (paper sec. 2.2)

    o    [T, D]     output of the sub-layer
    x    [T, N, D]  the streams that entered mhc_pre
    post [T, N], comb [T, N, N] FP32
    ->   [T, N, D] in x's dtype. The sum runs over the first index of comb: B is its transpose.
    """
    mixed = wide(comb).transpose(1, 2) @ wide(x)
    return (wide(post)[:, :, None] * wide(o)[:, None, :] + mixed).to(x.dtype)


def hc_head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm_eps: float, eps: float
) -> Tensor:
    """Collapse the streams for the LM head.

        y = sum_j (sigmoid(s m_j + b_j) + eps) X_j

    x     [T, N, D]
    fn    [N, N D], scale [1], base [N] FP32
    ->    [T, D] in x's dtype
    """
    return mhc_pre(x, (mhc_mixes(x, fn, norm_eps) * scale + base).sigmoid() + eps)


def mhc_pre_norm(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, iters: int, norm_eps: float,
    eps: float, quantise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Everything between the streams and the first matrix product of a sub-layer.

        pre, post, comb = S(mixes(X));   y = RMSNorm(sum_j pre_j X_j) * norm

    x        [T, N, D]
    fn       [N(N+2), N D], scale [3], base [N(N+2)] FP32, as in mhc_mixes and mhc_split_sinkhorn
    norm     [D]    weight of the sub-layer's RMSNorm
    quantise        whether the FP8 form of y is wanted as well
    ->       y [T, D] in x's dtype, post [T, N], comb [T, N, N] FP32, and what fp8_act_quantize
             gives for y: [T, D] and [T, D/128]; without `quantise` both are [T, 0]
    """
    mixes = mhc_mixes(x, fn, norm_eps)
    pre, post, comb = mhc_split_sinkhorn(mixes, scale, base, iters, eps)
    y = rms_norm(mhc_pre(x, pre), norm, norm_eps)
    if quantise:
        return y, post, comb, *fp8_act_quantize(y)
    nothing = y.new_empty(len(y), 0)
    return y, post, comb, nothing.to(torch.float8_e4m3fn), nothing.to(torch.float8_e8m0fnu)


def mhc_post_pre(
    o: Tensor, x: Tensor, post: Tensor, comb: Tensor, fn: Tensor, scale: Tensor, base: Tensor,
    norm: Tensor, iters: int, norm_eps: float, eps: float, quantise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """mhc_post of one sub-layer, then mhc_pre_norm of the next.

    o, x, post, comb  as in mhc_post
    fn ... quantise   as in mhc_pre_norm, of the next sub-layer
    ->                the new streams [T, N, D], then the results of mhc_pre_norm
    """
    streams = mhc_post(o, x, post, comb)
    return streams, *mhc_pre_norm(streams, fn, scale, base, norm, iters, norm_eps, eps, quantise)


def hc_head_norm(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, norm: Tensor, norm_eps: float, eps: float
) -> Tensor:
    """hc_head, then the final RMSNorm.

    x [T, N, D], fn [N, N D], scale [1], base [N] FP32, norm [D] -> [T, D] in x's dtype
    """
    return rms_norm(hc_head(x, fn, scale, base, norm_eps, eps), norm, norm_eps)


def embed_streams(ids: Tensor, table: Tensor, num_streams: int) -> Tensor:
    """The streams before the first layer: the token's embedding in each of them.

    ids   [T] int64; a row whose id is outside the vocabulary, as padding may be, becomes zeros
    table [V, D]
    ->    [T, num_streams, D] in the table's dtype
    """
    known = (ids >= 0) & (ids < len(table))
    rows = table[torch.where(known, ids, 0)].masked_fill(~known[:, None], 0)
    return rows[:, None].expand(-1, num_streams, -1).contiguous()
