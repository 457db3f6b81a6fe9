"""Exact top-k of the FP32 numbers one program holds, by bisection on keys that order as they do.

What is chosen is a function of the numbers and their places alone: no atomics, no order of arrival.
"""

import triton
import triton.language as tl

from dsv4.kernels.common.bits import ABS_MASK, INF_BITS

DEAD = tl.constexpr(-0x7FFFFFFF)  # below the key of -inf
LINEAR_STEPS = tl.constexpr(14)


@triton.jit
def order_key(x):
    """Int32 that orders as FP32 x does: NaN as -inf, -0 equal to 0."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & ABS_MASK
    key = tl.where(bits < 0, -magnitude, magnitude)
    return tl.where(magnitude > INF_BITS, -INF_BITS, key)


@triton.jit
def topk_bracket(key, num_live, k):
    """Keys low < high with count(>= high) <= k <= count(>= low); also k - count(>= high).

    key       int32 [n]; DEAD where there is no number
    num_live  how many are not DEAD; 1 <= k <= num_live

    Either count(>= low) is k, and these are the top k, or all keys in between are equal.
    Halves the interval of values first, which for smooth scores closes in on k fastest; then the
    interval of keys, which ends after at most 32 steps whatever the numbers are.
    """
    low = tl.min(tl.where(key == DEAD, 0x7FFFFFFF, key), axis=0)
    high = tl.max(key, axis=0) + 1
    count_low, count_high = num_live, num_live * 0
    step = num_live * 0
    while (count_low != k) & (high != low + 1):
        low_value = tl.where(low < 0, -low | -0x80000000, low).to(tl.float32, bitcast=True)
        high_value = tl.where(high < 0, -high | -0x80000000, high).to(tl.float32, bitcast=True)
        bits = (0.5 * low_value + 0.5 * high_value).to(tl.int32, bitcast=True)
        linear = tl.where(bits < 0, -(bits & ABS_MASK), bits)  # of NaN it is out of range
        middle = (low & high) + ((low ^ high) >> 1)  # does not overflow
        is_linear = (step < LINEAR_STEPS) & (linear > low) & (linear < high)
        middle = tl.where(is_linear, linear, middle)
        count = tl.sum((key >= middle).to(tl.int32), axis=0)
        is_low = count >= k
        low, high = tl.where(is_low, middle, low), tl.where(is_low, high, middle)
        count_low = tl.where(is_low, count, count_low)
        count_high = tl.where(is_low, count_high, count)
        step += 1
    return low, high, k - count_high


@triton.jit
def topk_places(key, low, high, room):
    """Which keys are chosen, and the rank by place of each of them, from the bracket.

    All from `high` on, and of those in [low, high) the first `room`. At most 32,768 keys.
    """
    is_above = key >= high
    is_tied = (key >= low) & (key < high)
    # Both counts in one scan, 16 bits each.
    both = tl.cumsum(is_above.to(tl.int32) + (is_tied.to(tl.int32) << 16), axis=0)
    num_above, num_tied = both & 0xFFFF, (both >> 16) & 0xFFFF
    is_chosen = is_above | (is_tied & (num_tied <= room))
    return is_chosen, num_above + tl.minimum(num_tied, room) - 1
