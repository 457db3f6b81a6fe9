"""Affinity of an expert and the weights of the chosen ones."""

import triton
import triton.language as tl

# log2(e) as the sum of two FP32 numbers.
LOG2E_HIGH = tl.constexpr(1.4426950216293335)
LOG2E_LOW = tl.constexpr(1.92596298909109e-08)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp_negative(x):
    """exp of x <= 0 with the error of the hardware's exp2 alone; NaN stays NaN.

    exp2 takes a rounded argument, so that by itself its relative error would grow with |x|.
    """
    bounded = tl.where(x < -110.0, -110.0, x)
    high = bounded * LOG2E_HIGH
    factor = tl.full(bounded.shape, LOG2E_HIGH, tl.float32)
    low = tl.fma(bounded, factor, -high) + bounded * LOG2E_LOW
    power = tl.exp2(high)
    return power + power * (low * LN2)


@triton.jit
def log1p_unit(e):
    """log(1 + e) for 0 <= e <= 1 as 2 atanh(e / (2 + e)): exact to some ulp, small e included."""
    z = e / (2.0 + e)
    w = z * z
    p = w * (1.0 / 17) + 1.0 / 15
    p = p * w + 1.0 / 13
    p = p * w + 1.0 / 11
    p = p * w + 1.0 / 9
    p = p * w + 1.0 / 7
    p = p * w + 1.0 / 5
    p = p * w + 1.0 / 3
    return 2.0 * z + 2.0 * z * (w * p)


@triton.jit
def affinity(x):
    """sqrt(softplus(x)) of FP32; softplus(x) = max(x, 0) + log(1 + exp(-|x|)). NaN stays NaN."""
    softplus = tl.where(x > 0, x, 0.0) + log1p_unit(exp_negative(-tl.abs(x)))
    return tl.sqrt(tl.where(x == x, softplus, x))


@triton.jit
def choice_weights(logits_ptr, ids, is_live, scaling, E: tl.constexpr):
    """Weights [n, K] of the experts `ids` [n, K] of rows of E logits; 0 where not live."""
    logits = tl.load(logits_ptr + ids, is_live & (ids >= 0) & (ids < E), 0.0)
    scores = tl.where(is_live, affinity(logits), 0.0)
    total = tl.sum(scores, axis=1)[:, None]
    total = tl.where(is_live, total, 1.0)
    return tl.where(is_live, scores / total * scaling, 0.0)
