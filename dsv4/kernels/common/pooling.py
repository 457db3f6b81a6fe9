"""The softmax pooling of a compressor window, from rows of this step and from the state ring."""

import triton
import triton.language as tl


@triton.jit
def pool_window(
    kappa_ptr, gamma_ptr, ring_ptr, end, first_row, first_position, c,
    D: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Channels `c` of the entry of the window that ends before position `end`.

        v[i] = sum_p exp(gamma_p[i] - m[i]) kappa_p[i] / sum_p exp(gamma_p[i] - m[i])

    With OVERLAP the window before it takes part with the first half of the channels, this one with
    the second half. ring_ptr is the slot's kappa; its gamma follows. -> FP32 like c; lanes of
    channels from D on hold zeros.

    All rows are in registers at once: BLOCK_ROWS, a power of two, holds them. So every channel is
    summed in the one order that the shape of the tile gives, wherever a row came from.
    """
    HALVES: tl.constexpr = 2 if OVERLAP else 1
    SLOTS: tl.constexpr = HALVES * RATIO
    WIDTH: tl.constexpr = HALVES * D
    j = tl.arange(0, BLOCK_ROWS)[:, None]
    position = end - SLOTS + j
    is_new = position >= first_position
    offset = tl.where(is_new, first_row + (position - first_position), position % SLOTS) * WIDTH
    channel = c[None, :] + (j // RATIO) * D
    live = (position >= 0) & (j < SLOTS) & (c < D)[None, :]
    gamma_row_ptr = tl.where(is_new, gamma_ptr + offset, ring_ptr + SLOTS * WIDTH + offset)
    kappa_row_ptr = tl.where(is_new, kappa_ptr + offset, ring_ptr + offset)
    gamma = tl.load(gamma_row_ptr + channel, live, float("-inf"))
    kappa = tl.load(kappa_row_ptr + channel, live, 0.0)
    top = tl.where(c < D, tl.max(gamma, axis=0), 0.0)
    weight = tl.exp(gamma - top[None, :])
    total = tl.where(c < D, tl.sum(weight, axis=0), 1.0)
    return tl.div_rn(tl.sum(weight * kappa, axis=0), total)
