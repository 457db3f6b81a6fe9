"""Logits as sortable integers, their shares of a row, and the random number of a position."""

import triton
import triton.language as tl

from dsv4.kernels.common.bits import widen

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
KEY_MAX = tl.constexpr(0x7FFFFFFF)
KEY_MIN = tl.constexpr(-0x80000000)
NO_ID = tl.constexpr(0x7FFFFFFF)
MINUS_INF_KEY = tl.constexpr(-0x7F800001)


@triton.jit
def load_logits(row_ptr, at, mask):
    """FP32 logits; NaN and what the mask leaves out are -inf, and -0 is 0."""
    x = widen(tl.load(row_ptr + at, mask, float("-inf")))
    x = tl.where(x == x, x, float("-inf"))
    return tl.where(x == 0, 0.0, x)


@triton.jit
def to_key(x):
    """FP32 without NaN as int32 of the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & KEY_MAX)


@triton.jit
def from_key(key):
    """The FP32 number of a key."""
    return (key ^ ((key >> 31) & KEY_MAX)).to(tl.float32, bitcast=True)


@triton.jit
def load_rate(temperature_ptr, b):
    """log2(e) / T of a row in FP64; 0 where the row is greedy."""
    t = tl.load(temperature_ptr + b).to(tl.float64)
    # What FP32 cannot hold acts as 0 and infinity do: shares are 1 and 0.
    return tl.where(t > 0, LOG2E / tl.maximum(tl.where(t > 0, t, 1.0), 1e-37), 0.0)


@triton.jit
def share(x, best, rate):
    """exp((x - best) / T) in FP32 for x <= best, best above -inf; 0 below 2^-126.

    The exponent is a sum of two FP32 numbers, so that its rounding does not grow with it.
    """
    rate_high = rate.to(tl.float32)
    rate_low = (rate - rate_high.to(tl.float64)).to(tl.float32)
    d = x - best
    t = d * rate_high
    rest = tl.fma(d, tl.zeros(x.shape, tl.float32) + rate_high, -t) + d * rate_low
    power = tl.exp2(t)
    some = tl.where(t > -126.0, power + power * (rest * LN2), 0.0)
    return tl.where(x == best, 1.0, some)  # an infinite best leaves no difference


@triton.jit
def uniform(seed, position):
    """The number in [0, 1) of dsv4.reference.sampler.TokenRng, in FP64 with 53 random bits."""
    low, high = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    zero = low * 0
    first, second, _, _ = tl.philox(seed, low, high, zero, zero)
    bits = ((first >> 5).to(tl.int64) << 26) + (second >> 6).to(tl.int64)
    return bits.to(tl.float64) * (1.0 / 9007199254740992.0)


@triton.jit
def pick(x, i, at):
    """Element `at` of a vector with indices `i`; 0 if there is none."""
    return tl.sum(tl.where(i == at, x, 0), axis=0)
