"""Where the shortest prefix of a ranking ends, found by thresholds in a list of candidates.

The list holds ids of a row of logits, ascending; a place is a position in it.
"""

import triton
import triton.language as tl

from dsv4.kernels.common.sampling import (
    KEY_MAX,
    KEY_MIN,
    NO_ID,
    from_key,
    load_logits,
    pick,
    share,
    to_key,
)


@triton.jit
def list_logits(row_ptr, list_ptr, at, mask):
    """Ids and logits of places in a list; -inf where masked."""
    i = tl.load(list_ptr + at, mask, 0)
    return i, load_logits(row_ptr, i, mask)


@triton.jit
def load_places(row_ptr, list_ptr, start, n, best, rate, SPAN: tl.constexpr):
    """Ids, keys and shares of SPAN places of a list from `start`; KEY_MIN and 0 past its end."""
    at = start + tl.arange(0, SPAN)
    ids, x = list_logits(row_ptr, list_ptr, at, at < n)
    return ids, tl.where(at < n, to_key(x), KEY_MIN), share(x, best, rate)


@triton.jit
def above_levels(key, w, level, low, high):
    """Count and mass of what is at or above each level, of keys from low to high."""
    is_left = ((key >= low) & (key <= high))[None, :]
    is_above = (key[None, :] >= level[:, None]) & is_left
    mass = tl.sum(tl.where(is_above, w[None, :], 0.0), axis=1)
    return tl.sum(is_above.to(tl.int32), axis=1), mass.to(tl.float64)


@triton.jit
def find_cut(
    row_ptr, list_ptr, n, key, w, low, high, count, mass, best, rate, k, target,
    BY_MASS: tl.constexpr, SPLIT: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The last key that is kept, of the n in the list, and how many ties of it.

    key, w       of the first SPAN places
    low, high    least and largest key of the list
    count, mass  of what is above the list
    k, target    the prefix to find: k elements, or BY_MASS the shortest of mass >= target
    ->           key, ties kept, count above the key, mass of the prefix

    Each round sets SPLIT thresholds between the bounds and goes on in the bin that the prefix ends
    in, until that is one key or holds one element.
    """
    s, ties = tl.arange(0, SPLIT), n * 0
    while (low < high) & (ties != 1):
        span = high.to(tl.int64) - low.to(tl.int64)
        level = (high.to(tl.int64) - span * s // (SPLIT - 1)).to(tl.int32)
        counts, masses = above_levels(key, w, level, low, high)
        for start in range(SPAN, n, SPAN):
            _, other, shares = load_places(row_ptr, list_ptr, start, n, best, rate, SPAN)
            more, more_mass = above_levels(other, shares, level, low, high)
            counts, masses = counts + more, masses + more_mass
        above, above_mass = count + counts, mass + masses
        reaches = above_mass >= target if BY_MASS else above >= k
        reaches |= above == tl.max(above, axis=0)  # all that is left, should rounding lack some
        last = tl.min(tl.where(reaches, s, SPLIT - 1), axis=0)
        is_first = last == 0
        high = tl.where(is_first, high, pick(level, s, last - 1) - 1)
        low, ties = pick(level, s, last), pick(above, s, last)
        count = tl.where(is_first, count, pick(above, s, last - 1))
        mass = tl.where(is_first, mass, pick(above_mass, s, last - 1))
        ties -= count
    if low < high:
        _, low = key_range(row_ptr, list_ptr, n, key, low, high, best, rate, SPAN)
    elif ties == 0:  # no round: all of the list is one key
        ties = n
    one = share(from_key(low), best, rate).to(tl.float64)
    needed = tl.ceil((target - mass) / tl.where(one > 0, one, 1.0)) if BY_MASS else k - count
    kept = tl.minimum(tl.maximum(needed, 1), ties).to(tl.int32)
    return low, kept, count, mass + kept * one


@triton.jit
def key_range(row_ptr, list_ptr, n, key, low, high, best, rate, SPAN: tl.constexpr):
    """Least and largest of the keys from low to high in a list; `key` is its first SPAN."""
    is_left = (key >= low) & (key <= high)
    least = tl.min(tl.where(is_left, key, KEY_MAX), axis=0)
    most = tl.max(tl.where(is_left, key, KEY_MIN), axis=0)
    for start in range(SPAN, n, SPAN):
        _, other, _ = load_places(row_ptr, list_ptr, start, n, best, rate, SPAN)
        is_left = (other >= low) & (other <= high)
        least = tl.minimum(least, tl.min(tl.where(is_left, other, KEY_MAX), axis=0))
        most = tl.maximum(most, tl.max(tl.where(is_left, other, KEY_MIN), axis=0))
    return least, most


@triton.jit
def tie_id(row_ptr, list_ptr, n, cut, ties, best, rate, SPAN: tl.constexpr):
    """Id of the tie number `ties` of the key `cut` in a list."""
    seen, found = n * 0, n * 0 + NO_ID
    for start in range(0, n, SPAN):
        ids, key, _ = load_places(row_ptr, list_ptr, start, n, best, rate, SPAN)
        is_tie = (key == cut).to(tl.int32)
        is_last = (is_tie > 0) & (seen + tl.cumsum(is_tie, axis=0) == ties)
        found = tl.minimum(found, tl.min(tl.where(is_last, ids, NO_ID), axis=0))
        seen += tl.sum(is_tie, axis=0)
    return found
